"`init_from_teacher`: what is copied, by hand, for many pairs of models; what keeps its own weights; what stays as it was"
import random
import numpy as np
import pytest, torch
from torch import nn
from torchvision import models as tv
from fastai.basics import Adam, params
from fastai.layers import ConvLayer
from fastai.data.transforms import Normalize
from fastai.tabular.model import TabularModel
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config, awd_lstm_lm_config
from fastai.text.models.core import get_language_model, get_text_classifier
from fastai.vision.learner import create_body, create_vision_model
from fastkd.all import *
from conftest import batches, learner, net, same, weights

def timm_model(name, **kwargs): return pytest.importorskip('timm').create_model(name, pretrained=False, num_classes=10, **kwargs)
def vit(depth, width, heads, **kwargs): return timm_model('vit_tiny_patch16_224', depth=depth, embed_dim=width, num_heads=heads, **{'img_size': 64, **kwargs})
def resnet(blocks, width, **kwargs):
    "A ResNet of basic blocks with any widths"
    model = tv.ResNet(tv.resnet.BasicBlock, [1]*4, num_classes=10)
    model.inplanes = width
    model.conv1,model.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False),nn.BatchNorm2d(width)
    for i,n in enumerate(blocks): setattr(model, f'layer{i+1}', model._make_layer(tv.resnet.BasicBlock, width*2**i, n, 1 + (i > 0)))
    model.fc = nn.Linear(width*8, 10)
    return model
def encoder(n, width, heads, hidden): return nn.TransformerEncoder(nn.TransformerEncoderLayer(width, heads, hidden, batch_first=True), n)
def text(n, hid, emb, words=60, classes=2):
    return get_text_classifier(AWD_LSTM, words, classes, config={**awd_lstm_clas_config, 'n_layers': n, 'n_hid': hid, 'emb_sz': emb})
def language(n, hid, emb, words=60): return get_language_model(AWD_LSTM, words, config={**awd_lstm_lm_config, 'n_layers': n, 'n_hid': hid, 'emb_sz': emb})
def table_model(*layers, classes=2): return TabularModel([(5,3),(4,2)], 3, classes, list(layers))

def moved(model):
    "A model whose BatchNorms have seen something"
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): m.running_mean.normal_(); m.running_var.uniform_(.5, 2); m.num_batches_tracked.fill_(7)
    return model

def by_hand(t, shape):
    "Element i of d is element floor(i*D/d) of D along each axis"
    if t.ndim != len(shape): t = t.reshape(*t.shape[:2], *shape[2:])  # a linear layer for a 1x1 convolution
    return torch.from_numpy(np.asarray(t.detach().numpy()[np.ix_(*[[i*D//d for i in range(d)] for d,D in zip(shape, t.shape)])]))

def check(student, teacher, table):
    "Each tensor of a layer that is said to be copied is the selection of its counterpart, each other one is not changed"
    s,t = weights(student),weights(teacher)
    for name,row in table.iterrows():
        tensors = {n: v for n,v in s.items() if n.rpartition('.')[0] == name}
        if row.share:
            for n,v in tensors.items():
                source = '.'.join(filter(None, [row['from'], n.rpartition('.')[2]]))
                assert torch.equal(v, by_hand(t[source], v.shape).to(v.dtype)), n
        else: assert row.note and not row['from']

# --- the same architecture -----------------------------------------------------------------------------------------

images,tokens = torch.randn(2,3,64,64),torch.randint(1, 60, (2,9))
@pytest.mark.parametrize('make,xb', [
    (lambda: tv.resnet18(num_classes=10), images),
    (lambda: tv.mobilenet_v3_small(num_classes=10), images),
    (lambda: create_vision_model(tv.resnet18, 3, pretrained=False), images),
    (lambda: create_body(tv.resnet18(), pretrained=False), images),
    (lambda: vit(2, 48, 3), images),
    (lambda: text(2, 20, 8), tokens), (lambda: language(2, 20, 8), tokens),
    (lambda: encoder(2, 16, 2, 24), torch.randn(2,5,16)),
    (lambda: table_model(10, 6), (torch.tensor([[1,2],[3,0]]), torch.randn(2,3))),
], ids=['resnet','mobilenet','vision_learner','body','vit','text','language model','transformer','tabular'])
def test_a_student_of_the_same_architecture_becomes_the_teacher(make, xb):
    xb = xb if isinstance(xb, tuple) else (xb,)
    student,teacher = make(),moved(make())
    table = init_from_teacher(student, teacher)
    assert (table.share == 1).all() and not table.note.any() and same(weights(student), weights(teacher))
    outputs = [m.eval()(*xb) for m in (student,teacher)]
    assert torch.equal(*[o[0] if isinstance(o, tuple) else o for o in outputs])

# --- fewer blocks, fewer channels ----------------------------------------------------------------------------------

@pytest.mark.parametrize('student,teacher', [
    (lambda: tv.resnet18(num_classes=10), lambda: tv.resnet34(num_classes=10)),
    (lambda: resnet([2,2,2,2], 8), lambda: resnet([2,2,2,2], 16)),
    (lambda: resnet([1,2,1,1], 6), lambda: resnet([2,2,2,2], 10)),
    (lambda: create_vision_model(tv.resnet18, 3, pretrained=False), lambda: create_vision_model(tv.resnet34, 3, pretrained=False)),
    (lambda: vit(2, 24, 3), lambda: vit(4, 48, 3)),
    (lambda: vit(2, 24, 2), lambda: vit(3, 60, 3)),
    (lambda: text(2, 10, 6), lambda: text(3, 20, 8)),
    (lambda: language(1, 10, 6), lambda: language(3, 20, 8)),
    (lambda: encoder(2, 16, 2, 20), lambda: encoder(4, 24, 3, 32)),
    (lambda: table_model(10, 4), lambda: table_model(20, 10)),
    (lambda: resnet([1,1,1,1], 16), lambda: resnet([1,1,1,1], 8)),
], ids=['resnet34 to 18','half the width','any width','vision_learner','vit','vit with fewer heads','text','language model','transformer','tabular','wider'])
def test_all_of_it_by_hand(student, teacher):
    student,teacher = student(),moved(teacher())
    table = init_from_teacher(student, teacher)
    assert not table.note.any() and table.share.between(0, 1, inclusive='right').all()
    check(student, teacher, table)

def test_of_more_blocks_the_first():
    student,teacher = tv.resnet18(num_classes=10),tv.resnet34(num_classes=10)
    table = init_from_teacher(student, teacher)
    assert list(table['from']) == list(table.index) and torch.equal(student.layer3[1].conv1.weight, teacher.layer3[1].conv1.weight)
    assert table.loc['bn1','share'] == 1 and table.loc['conv1','parameters'] == 64*3*49

def doubled(small):
    "A chain of twice the width that computes the same: each hidden unit is there twice, and each of the two gives half"
    layers = []
    linears = [l for l in small if isinstance(l, nn.Linear)]
    for l in small:
        if isinstance(l, nn.Linear):
            big = nn.Linear(l.in_features*(1 + (l is not linears[0])), l.out_features*(1 + (l is not linears[-1])), dtype=torch.double)
            w,b = l.weight.data,l.bias.data
            if l is not linears[-1]: w,b = w.repeat_interleave(2, 0),b.repeat_interleave(2)
            if l is not linears[0]: w = w.repeat_interleave(2, 1)/2
            big.weight.data,big.bias.data = w,b
            layers.append(big)
        elif isinstance(l, nn.BatchNorm1d): layers.append(nn.BatchNorm1d(2*l.num_features, dtype=torch.double))
        else: layers.append(l)
    return nn.Sequential(*layers)

def chain(*sizes, norm=False):
    layers = [o for a,b in zip(sizes, sizes[1:]) for o in (nn.Linear(a,b), *([nn.BatchNorm1d(b)] if norm else []), nn.ReLU())]
    return nn.Sequential(*layers[:-1-norm]).double()

def test_duplicated_units_that_are_dropped_leave_the_function_up_to_a_known_factor():
    small = chain(5, 7, 6, 3)
    for l in small:
        if isinstance(l, nn.Linear): l.bias.data.zero_()
    teacher,student,x = doubled(small),chain(5, 7, 6, 3),torch.randn(20,5, dtype=torch.double)
    assert torch.allclose(teacher(x), small(x))
    init_from_teacher(student, teacher)
    assert torch.allclose(student(x)*4, teacher(x), atol=1e-12)  # two layers read half of what they read

def test_after_a_normalization_the_factor_is_gone():
    small = chain(5, 7, 6, 3, norm=True)
    teacher,student,x = doubled(small),chain(5, 7, 6, 3, norm=True),torch.randn(20,5, dtype=torch.double)
    init_from_teacher(student, teacher)
    last = lambda m: (m(x) - m[-1].bias)
    for m in (student,teacher): m[1].eps = m[4].eps = 1e-14
    assert torch.allclose(2*last(student), last(teacher), atol=1e-8)

def test_the_gates_of_an_lstm():
    small,student,teacher = nn.LSTM(3,5),nn.LSTM(3,5),nn.LSTM(3,15)
    with torch.no_grad():  # three times each unit, gate by gate
        for n,p in teacher.named_parameters():
            rows = [gate.repeat_interleave(3, 0) for gate in getattr(small, n).chunk(4)]
            p.copy_(torch.cat([r.repeat_interleave(3, 1) if n == 'weight_hh_l0' else r for r in rows]))
    init_from_teacher(student, teacher)
    assert same(weights(student), weights(small))

def test_queries_keys_and_values():
    small,student,teacher = [nn.MultiheadAttention(n, 2) for n in (4,4,12)]
    with torch.no_grad():
        teacher.in_proj_weight.copy_(torch.cat([w.repeat_interleave(3, 0).repeat_interleave(3, 1) for w in small.in_proj_weight.chunk(3)]))
    init_from_teacher(student, teacher)
    assert torch.equal(student.in_proj_weight, small.in_proj_weight)

# --- other names ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('way', ['torchvision from fastai','fastai from torchvision','a Learner','pairs'])
def test_names_that_do_not_agree(way):
    fastai,bare = create_vision_model(tv.resnet34, 10, pretrained=False),tv.resnet34(num_classes=10)
    student,teacher = (bare,moved(fastai)) if way != 'fastai from torchvision' else (fastai,moved(bare))
    if way == 'a Learner': table = init_from_teacher(student, learner(batches(shape=(3,64,64), n=2, n_valid=2, bs=2), teacher))
    elif way == 'pairs': table = init_from_teacher(student, teacher, (['layer1','layer3'],['0.4','0.6']))
    else: table = init_from_teacher(student, teacher, xb=images)
    check(student, teacher, table)
    ours = [n for n,r in table.iterrows() if r.share]
    if way == 'pairs': assert {n.split('.')[0] for n in ours} == {'layer1','layer3'} and (table.note[table.share == 0] == 'not in `layers`').all()
    else:
        assert len(ours) == 72  # all convolutions and BatchNorms of a ResNet34, but no head
        assert set(table.note[table.share == 0]) == {"no counterpart in the teacher"}

def test_timm_and_torchvision():
    table = init_from_teacher(tv.resnet18(num_classes=10), timm_model('resnet34'))
    assert not table.note.any()

def test_blocks_with_other_names_in_order():
    class Block(nn.Module):
        def __init__(self, w): super().__init__(); self.first,self.second = ConvLayer(w,w),ConvLayer(w,w)
        def forward(self, x): return x + self.second(self.first(x))
    class Named(nn.Module):
        def __init__(self, w):
            super().__init__()
            self.a,self.norm_a,self.b,self.norm_b = nn.Conv2d(w,w,3,padding=1,bias=False),nn.BatchNorm2d(w),nn.Conv2d(w,w,3,padding=1,bias=False),nn.BatchNorm2d(w)
        def forward(self, x): return x + self.norm_b(self.b(self.norm_a(self.a(x)).relu()))
    def model(block, w, n): return nn.Sequential(ConvLayer(3,w,stride=2), nn.Sequential(*[block(w) for _ in range(n)]), ConvLayer(w,2*w,stride=2),
                                                 nn.Sequential(*[block(2*w) for _ in range(n)]), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2*w,10))
    student,teacher = model(Named, 4, 1),moved(model(Block, 8, 2))
    table = init_from_teacher(student, teacher, {'1': '1', '3': '3'})
    check(student, teacher, table)
    assert table.loc['3.0.b','from'] == '3.0.second.0' and table.share.astype(bool).sum() == 8

@pytest.mark.parametrize('wrap', [lambda m: nn.Sequential(nn.Upsample(scale_factor=2), m), nn.DataParallel, lambda m: nn.Sequential(nn.Identity(), nn.Sequential(m))],
                         ids=['resizing','DataParallel','twice'])
def test_wrapped_models(wrap):
    student,teacher = tv.resnet18(num_classes=10),tv.resnet34(num_classes=10)
    table = init_from_teacher(wrap(student), teacher)
    assert not table.note.any() and torch.equal(student.layer4[1].conv2.weight, teacher.layer4[1].conv2.weight)
    assert not init_from_teacher(tv.resnet18(num_classes=10), wrap(teacher)).note.any()

# --- what keeps its own weights ------------------------------------------------------------------------------------

def test_blocks_of_another_kind():
    student,teacher = tv.resnet18(num_classes=10),tv.resnet50(num_classes=10)
    before = weights(student)
    table = init_from_teacher(student, teacher)
    kept = table[table.index.str.startswith('layer')]
    assert len(kept) == 38 and (kept.note == "a Bottleneck in the teacher, a BasicBlock here").all() and not kept.share.any()
    assert all(torch.equal(v, before[n]) for n,v in weights(student).items() if n.startswith('layer'))
    assert torch.equal(student.conv1.weight, teacher.conv1.weight)
    before = weights(student)
    with pytest.raises(ValueError, match="'0.4' in the teacher has other layers"):
        init_from_teacher(student, create_vision_model(tv.resnet50, 10, pretrained=False), xb=images)
    assert same(before, weights(student))

def test_fewer_layers_before_the_head():
    student,teacher = chain(5, 7, 3),chain(5, 7, 6, 3)
    before = student[2].weight.clone()
    table = init_from_teacher(student, teacher)
    assert table.note['2'] == "a head in one model, and not in the other" and torch.equal(student[2].weight, before)
    assert table.share['0'] == 1

def test_a_patch_embedding_of_another_size():
    student,teacher = vit(2, 24, 3, patch_size=8),vit(2, 48, 3)
    before = weights(student)
    table = init_from_teacher(student, teacher)
    assert table.note['patch_embed.proj'] == '48 × 3 × 16 × 16 in the teacher, 24 × 3 × 8 × 8 here'
    assert torch.equal(student.patch_embed.proj.weight, before['patch_embed.proj.weight']) and torch.equal(student.pos_embed, before['pos_embed'])
    assert (table.share > 0).sum() == len(table) - 2

def test_other_groups_and_depthwise_convolutions():
    grouped = lambda groups, w: nn.Sequential(nn.Conv2d(w, w, 3, groups=groups), nn.BatchNorm2d(w))
    table = init_from_teacher(grouped(2,8), grouped(4,16))
    assert table.note['0'] == '4 groups in the teacher, 2 here' and table.share['1'] > 0
    assert not init_from_teacher(grouped(8,8), grouped(16,16)).note.any() and not init_from_teacher(grouped(4,8), grouped(4,16)).note.any()

def test_more_blocks_than_the_teacher_has():
    table = init_from_teacher(tv.resnet34(num_classes=10), tv.resnet18(num_classes=10))
    assert set(table.note) == {'', 'no such layer in the teacher'} and table.note['layer3.2.conv1']

def test_sizes_of_words_and_of_buffers_of_integers():
    class Model(nn.Module):
        def __init__(self, words, width, n):
            super().__init__()
            self.words,self.out = nn.Embedding(words, width),nn.Linear(width, 3)
            self.register_buffer('index', torch.arange(n))
    table = init_from_teacher(Model(10,4,5), Model(12,8,5))
    assert table.note['words'] == 'other words or categories in the teacher' and table.share['out'] and table.share['']
    assert init_from_teacher(Model(10,4,5), Model(10,8,7)).note[''] == '7 in the teacher, 5 here'

# --- classes and words ---------------------------------------------------------------------------------------------

def with_classes(vocab, width=4, **kwargs):
    learn = learner(model=net(width, classes=len(vocab)), **kwargs)
    learn.dls.vocab = vocab
    return learn

@pytest.mark.parametrize('classes,rows', [(['a','b','c'], [0,1,2]), (['c','a','b'], [2,0,1]), (['c','b'], [2,1])])
def test_the_head_by_class(classes, rows):
    student,teacher = with_classes(classes),with_classes(['a','b','c'], 6)
    table = init_from_teacher(student, teacher)
    assert not table.note.any()
    assert torch.equal(student.model.fc.bias, teacher.model.fc.bias[rows])
    assert torch.equal(student.model.fc.weight, by_hand(teacher.model.fc.weight[rows], (len(rows), 8)))
    bare = with_classes(classes)
    init_from_teacher(bare, Teacher(teacher.model, vocab=['a','b','c']))
    assert torch.equal(bare.model.fc.bias, student.model.fc.bias)

@pytest.mark.parametrize('student,teacher', [
    (lambda: with_classes(['a','d','b']), lambda: with_classes(['a','b','c'])),
    (lambda: net(classes=5), lambda: net(width=6)),
    (lambda: with_classes(['a','b']), lambda: net(width=6)),
], ids=['a class that the teacher does not know','other numbers','names on one side'])
def test_other_classes_keep_the_head(student, teacher):
    student,teacher = student(),teacher()
    head = student.model.fc if hasattr(student, 'model') else student.fc
    before = head.weight.clone()
    table = init_from_teacher(student, teacher)
    assert table.note['fc'] == 'other classes in the teacher' and torch.equal(head.weight, before) and (table.share > 0).sum() == len(table)-1

def test_words_by_vocabulary():
    ours,theirs = ['xxunk','dog','cat'],['xxunk','cat','bird','dog']
    student,teacher = learner(model=text(2, 10, 6, words=3)),learner(model=text(3, 20, 8, words=4))
    student.dls.vocab,teacher.dls.vocab = (ours,['n','p']),(theirs,['p','n'])
    table = init_from_teacher(student, teacher)
    s,t = student.model[0].module.encoder.weight,teacher.model[0].module.encoder.weight
    assert not table.note.any() and torch.equal(s, by_hand(t[[0,3,1]], s.shape)) and torch.equal(student.model[1].layers[-1][-1].weight, teacher.model[1].layers[-1][-1].weight[[1,0]])

def test_the_words_of_a_language_model_are_its_classes():
    student,teacher = learner(model=language(2, 10, 6, words=3)),learner(model=language(3, 20, 8, words=4))
    student.dls.vocab,teacher.dls.vocab = ['xxunk','dog','cat'],['xxunk','cat','bird','dog']
    assert not init_from_teacher(student, teacher).note.any()
    assert student.model[1].decoder.weight is student.model[0].encoder.weight
    assert torch.equal(student.model[1].decoder.bias, teacher.model[1].decoder.bias[[0,3,1]])
    assert torch.equal(student.model[0].encoder.weight, by_hand(teacher.model[0].encoder.weight[[0,3,1]], (3,6)))
    assert 'other words' in init_from_teacher(language(2, 10, 6, words=5), language(2, 20, 8)).note.iloc[0]

# --- what stays as it was, and training ----------------------------------------------------------------------------

def test_the_teacher_and_everything_else_stay():
    student,teacher = net(width=4),moved(net(width=8))
    student.conv1.weight.requires_grad_(False); student.bn1.eval(); teacher.bn2.eval()
    state = lambda: [[(m.training, [(p.requires_grad, p.grad, p.data_ptr()) for p in m.parameters(recurse=False)]) for m in o.modules()] for o in (student,teacher)]
    before,values,rng = state(),weights(teacher),(torch.get_rng_state().tolist(), random.getstate())
    init_from_teacher(student, teacher)
    assert state() == before and same(values, weights(teacher)) and (torch.get_rng_state().tolist(), random.getstate()) == rng

@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_precisions(dtype):
    student,teacher = net(),net(width=8).to(dtype)
    init_from_teacher(student, teacher)
    assert student.conv1.weight.dtype == torch.float32 and torch.equal(student.conv1.weight, teacher.conv1.weight[::2].float())

def splitter(m): return [params(m[:3]), params(m[3:])]

def test_freezing_and_discriminative_rates():
    student = learner(opt_func=Adam, splitter=splitter)
    student.fit(1)
    student.freeze()
    student.opt.set_hyper('lr', slice(1e-4,1e-2))
    hypers,flags = [dict(h) for h in student.opt.hypers],[p.requires_grad for p in student.model.parameters()]
    assert len(student.opt.state_dict()['state']) > 0
    init_from_teacher(student, net(width=8))
    assert [dict(h) for h in student.opt.hypers] == hypers and [p.requires_grad for p in student.model.parameters()] == flags
    assert student.opt.frozen_idx == 1 and not any('grad_avg' in s for s in student.opt.state.values())
    before = weights(student.model)
    student.fit_one_cycle(1, slice(1e-4,1e-2))
    assert torch.equal(before['conv1.weight'], student.model.conv1.weight) and not torch.equal(before['fc.weight'], student.model.fc.weight)
    student.unfreeze(); student.fit(1)
    assert not torch.equal(before['conv1.weight'], student.model.conv1.weight)

def test_a_learner_without_an_optimizer_and_a_distillation():
    teacher = learner(model=net(width=8, seed=7))
    student = learner()
    init_from_teacher(student, teacher)
    student.fit(1, cbs=KnowledgeDistillationCallback(teacher, [SoftTarget,Attention]))
    assert all(v.isfinite().all() for v in student.model.state_dict().values())

# --- the table, and bad input --------------------------------------------------------------------------------------

def test_the_table_shows_itself():
    table = init_from_teacher(tv.resnet18(num_classes=2), tv.resnet34())
    assert list(table.columns) == ['from','share','parameters','note'] and table.index.name == 'layer'
    for text in (repr(table), table._repr_html_()): assert all(n in text for n in table.index) and '100%' in text and '1,179,648' in text
    assert table.parameters.sum() == sum(p.numel() for p in tv.resnet18(num_classes=2).parameters())

bare = net()
@pytest.mark.parametrize('student,teacher,kwargs,error,says', [
    (tv.resnet18(), vit(2, 24, 3), {}, ValueError, 'have other names. Give `xb`'),
    (tv.resnet18(), vit(2, 24, 3), dict(xb=images), ValueError, r'Nothing of the teacher \(VisionTransformer\) fits the student \(ResNet\)'),
    (nn.Sequential(nn.Linear(3,4)), nn.Sequential(nn.Linear(3,4), nn.Linear(4,2)), dict(layers={'0': '1.0'}), ValueError, "Layer '1.0' of the teacher"),
    (net(), net(), dict(layers=(['conv1'],[])), ValueError, 'Layers are compared in pairs'),
    (net(), net(), dict(layers={'bn1': 'conv1'}), ValueError, 'Nothing of the teacher'),
    (bare, bare, {}, ValueError, 'The teacher is the student itself'),
    (net(), [net(), net()], {}, ValueError, 'A student starts from one model, but the teacher is 2'),
    (net(), lambda x: x, {}, TypeError, 'The teacher should be a model or a `Learner`, got function'),
    ('resnet18', net(), {}, TypeError, 'The student should be a model or a `Learner`, got str'),
    (net(), tv.resnet18, {}, TypeError, 'is a function that makes a model'),
], ids=range(10))
def test_bad_input(student, teacher, kwargs, error, says):
    before = weights(student) if isinstance(student, nn.Module) else None
    with pytest.raises(error, match=says): init_from_teacher(student, teacher, **kwargs)
    assert before is None or same(before, weights(student))

@pytest.mark.cuda
def test_cuda():
    student,teacher = net().cuda(),net(width=8)
    init_from_teacher(student, teacher)
    assert torch.equal(student.conv1.weight.cpu(), teacher.conv1.weight[::2]) and student.conv1.weight.is_cuda
    init_from_teacher(net(), student)

def test_a_flat_network_starts_stage_by_stage():
    "VGG: of more convolutions before a pooling the first, and the head"
    student,teacher = tv.vgg11_bn(num_classes=10),tv.vgg19_bn(num_classes=10)
    table = init_from_teacher(student, teacher, xb=images)
    convs = [[m for m in model.features if isinstance(m, nn.Conv2d)] for model in (student,teacher)]
    assert (table.share == 1).all()
    for i,j in zip(range(8), (0,2,4,5,8,9,12,13)): assert torch.equal(convs[0][i].weight, convs[1][j].weight)
    assert torch.equal(student.classifier[6].weight, teacher.classifier[6].weight)

# --- what sizes do not tell ----------------------------------------------------------------------------------------

def plain_cnn(width, places=4, image=3, classes=4):
    return nn.Sequential(nn.Conv2d(image, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d((places,1)), nn.Flatten(), nn.Linear(width*places, 2*width), nn.ReLU(), nn.Linear(2*width, classes))

def test_a_flattened_map_is_read_by_channel_and_place():
    "A teacher whose channels are there twice, and a student of half the width: the same outputs"
    small,big,student = plain_cnn(3),plain_cnn(6),plain_cnn(3)
    with torch.no_grad():
        big[0].weight.copy_(small[0].weight.repeat_interleave(2, 0)); big[0].bias.copy_(small[0].bias.repeat_interleave(2))
        read = small[4].weight.view(6,3,4).repeat_interleave(2, 1).flatten(1)/2
        big[4].weight.copy_(read.repeat_interleave(2, 0)); big[4].bias.copy_(small[4].bias.repeat_interleave(2))
        big[6].weight.copy_(small[6].weight.repeat_interleave(2, 1)/2); big[6].bias.copy_(small[6].bias)
    x = torch.randn(5,3,8,8)
    assert torch.allclose(big(x), small(x), atol=1e-6)
    assert not init_from_teacher(student, big).note.any()
    assert torch.allclose(student[4].weight*2, small[4].weight) and torch.allclose(student[6].weight*2, small[6].weight)  # each reads half of what there was twice
    other = init_from_teacher(plain_cnn(3, places=9), big)
    assert other.note['4'] == '4 places of each channel in the teacher, 9 here' and other.share['6']
    norm = lambda w: nn.Sequential(nn.Conv2d(3,w,3), nn.Flatten(), nn.BatchNorm1d(9*w))
    student,teacher = norm(2),moved(norm(4))
    init_from_teacher(student, teacher)
    assert torch.equal(student[2].running_mean, teacher[2].running_mean.view(4,9)[::2].flatten())

def test_the_head_of_a_vision_learner_reads_maxima_and_means():
    student,teacher = [create_vision_model(lambda pretrained=False, w=w: resnet([1,1,1,1], w), 3, pretrained=False, cut=-2) for w in (8,16)]
    assert not init_from_teacher(student, teacher).note.any()
    assert torch.equal(student[1][2].weight, teacher[1][2].weight[::2]) and torch.equal(student[1][4].weight, teacher[1][4].weight[:,::2])

def test_gray_images_and_other_channels():
    student,teacher,x = plain_cnn(6, image=1),plain_cnn(6),torch.randn(4,1,8,8)
    assert not init_from_teacher(student, teacher).note.any()
    assert torch.allclose(student(x), teacher(x.expand(-1,3,-1,-1)), atol=1e-5)
    assert init_from_teacher(plain_cnn(6, image=6), teacher).note['0'] == '3 channels of images in the teacher, 6 here'

class TwoHeads(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.head,self.body,self.other = nn.Linear(7, classes),nn.Sequential(nn.Linear(5, 7), nn.ReLU()),nn.Linear(7, classes)
    def forward(self, x): return self.head(self.body(x))

def test_every_head_by_class():
    student,teacher = [learner(model=TwoHeads(len(v))) for v in ('cab','abcd')]
    student.dls.vocab,teacher.dls.vocab = list('cab'),list('abcd')
    assert not init_from_teacher(student, teacher).note.any()
    for n in ('head','other'): assert torch.equal(getattr(student.model, n).weight, getattr(teacher.model, n).weight[[2,0,1]])
    def mlp(): return nn.Sequential(nn.Linear(5,3), nn.ReLU(), nn.Linear(3,3), nn.ReLU(), nn.Linear(3,3))  # three classes and three units
    def two(): return nn.Sequential(nn.Conv2d(3,4,3), nn.Flatten(), TwoHeads(3))  # three classes and three channels of images
    for make,names in ((mlp, ['4']), (two, ['2.head','2.other'])):
        student,teacher = learner(model=make()),learner(model=make())
        student.dls.vocab,teacher.dls.vocab = list('cab'),list('abc')
        init_from_teacher(student, teacher)
        for n in names: assert torch.equal(student.model.get_submodule(n).weight, teacher.model.get_submodule(n).weight[[2,0,1]])
        assert make is two or torch.equal(student.model[2].weight, teacher.model[2].weight)
    table = init_from_teacher(TwoHeads(3), TwoHeads(6))
    assert table.note['head'] == table.note['other'] == 'other classes in the teacher' and table.share['body.0'] == 1
    fcn = lambda n: tv.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True, num_classes=n)
    assert init_from_teacher(fcn(3), fcn(21)).note[['classifier.4','aux_classifier.4']].all()

def test_a_transposed_convolution_as_the_head():
    student,teacher = [learner(model=nn.Sequential(nn.Conv2d(3,4,3), nn.ReLU(), nn.ConvTranspose2d(4, n, 2))) for n in (3,3)]
    student.dls.vocab,teacher.dls.vocab = list('cab'),list('abc')
    init_from_teacher(student, teacher)
    assert torch.equal(student.model[2].weight, teacher.model[2].weight[:,[2,0,1]]) and torch.equal(student.model[2].bias, teacher.model[2].bias[[2,0,1]])
    assert init_from_teacher(nn.Sequential(nn.Conv2d(3,4,3), nn.ConvTranspose2d(4,2,2)), nn.Sequential(nn.Conv2d(3,4,3), nn.ConvTranspose2d(4,5,2))).note['1'] == 'other classes in the teacher'

def table_learner(categories, conts=('x','y'), seed=0):
    from fastai.tabular.all import CategoryBlock, Categorify, Normalize, TabularDataLoaders, tabular_learner
    import pandas as pd
    rng = np.random.RandomState(seed)
    df = pd.DataFrame({**{n: rng.permutation(np.resize(list(c), 40)) for n,c in categories.items()}, **{n: rng.randn(40).astype('f') for n in conts}, 't': ['no','yes']*20})
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,Normalize], cat_names=list(categories), cont_names=list(conts), y_names='t', y_block=CategoryBlock(), bs=8, valid_idx=list(range(8)))
    return tabular_learner(dls, layers=[6,4])

def test_columns_and_categories_of_a_table():
    student,teacher = table_learner(dict(k='cbde', m='xy')),table_learner(dict(k='abcde', m='xy'), seed=1)
    table = init_from_teacher(student, teacher)
    assert not table.note.any() and torch.equal(student.model.embeds[0].weight, teacher.model.embeds[0].weight[[0,2,3,4,5]])  # `#na#` comes first
    unknown = init_from_teacher(table_learner(dict(k='bcdef', m='xy')), teacher)
    assert unknown.note['embeds.0'] == 'other words or categories in the teacher' and unknown.share['embeds.1'] == 1
    assert init_from_teacher(table_learner(dict(k='ab', m='xy')), teacher).note['layers.0.0'] == 'embeddings of other sizes in the teacher'
    for other in (table_learner(dict(m='xy', k='abcde')), table_learner(dict(k='abcde', m='xy'), conts=('y','x'))):
        table = init_from_teacher(other, teacher)
        assert set(table.note[['embeds.0','embeds.1','bn_cont','layers.0.0']]) == {'other columns in the teacher'} and table.share['layers.1.0'] == 1

def test_words_of_a_language_model_for_a_classifier():
    student,teacher = learner(model=text(2, 20, 8, words=4)),learner(model=language(2, 20, 8, words=4))
    student.dls.vocab,teacher.dls.vocab = (['xxunk','dog','cat','bird'],['n','p']),['xxunk','cat','bird','dog']
    init_from_teacher(student, teacher)
    assert torch.equal(student.model[0].module.encoder.weight, teacher.model[0].encoder.weight[[0,3,1,2]])

class Positions(nn.Module):
    def __init__(self, n, width):
        super().__init__()
        self.pos_embed,self.out = nn.Parameter(torch.randn(n, width)),nn.Linear(width, 3)

def test_what_reads_a_pooled_map_does_not_start_from_what_reads_a_flattened_one():
    "The teacher's linear layer has four weights for each channel, the student's one"
    pooled,flat = plain_cnn(3, places=1),plain_cnn(6)
    for student,teacher,theirs,ours in ((pooled,flat,4,1),(plain_cnn(3),plain_cnn(6, places=1),1,4)):
        table = init_from_teacher(student, teacher)
        assert table.note['4'] == f'{theirs} places of each channel in the teacher, {ours} here' and table.share['6']
    conv = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Identity(), nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    twelve = lambda width, places: nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d((places,1)), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 4))
    table = init_from_teacher(twelve(3, 4), twelve(12, 1), xb=images)
    assert table.note['4'] == '1 places of each channel in the teacher, 4 here' and table.share['6']
    table = init_from_teacher(conv, plain_cnn(6))
    assert table.note['4'] == '4 places of each channel in the teacher, 1 here' and table.share['6'] and table.share['0']

def test_linear_layers_and_pointwise_convolutions_are_the_same_map():
    linear = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 5))
    class Norm(nn.LayerNorm):
        def forward(self, x): return super().forward(x.movedim(1, -1)).movedim(-1, 1)
    conv = nn.Sequential(nn.Conv2d(3, 8, 1), Norm(8), nn.ReLU(), nn.Conv2d(8, 5, 1))
    x = torch.randn(2,3,4,6)
    for student,teacher in ((conv,linear),(linear,conv)):
        for p in student.parameters(): nn.init.normal_(p)
        assert (init_from_teacher(student, teacher).share == 1).all()
        assert torch.allclose(conv(x), linear(x.movedim(1, -1)).movedim(-1, 1), atol=1e-6)
    table = init_from_teacher(nn.Sequential(nn.Conv2d(3, 8, 3), Norm(8), nn.ReLU(), nn.Conv2d(4, 5, 1, bias=False), nn.Conv2d(6, 6, 1, groups=2)), nn.Sequential(*linear, nn.Linear(6, 6)))
    assert not table.share['0'] and not table.share['4']  # a kernel, groups
    deep = lambda layer: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), layer(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3))
    turned = init_from_teacher(deep(nn.ConvTranspose2d), deep(nn.Conv2d))
    assert turned.share['0'] and not turned.share['2']  # it has its weights the other way round

@pytest.mark.parametrize('student,teacher', [('convnext_femto','convnext_tiny'), ('convnextv2_atto','convnextv2_tiny')])
def test_convnext_starts_from_a_larger_one(student, teacher):
    "The pair of the paper: timm's small ones have 1x1 convolutions, and another class of normalization, where the larger have linear layers"
    student,teacher = timm_model(student),timm_model(teacher, depths=(2,2,6,2), dims=(64,128,256,512))
    table = init_from_teacher(student, teacher)
    assert (table.share > 0).all()
    check(student, teacher, table)

def test_places_keep_their_number():
    assert init_from_teacher(Positions(16, 8), Positions(64, 16)).note[''] == '64 × 16 in the teacher, 16 × 8 here'
    student,teacher = Positions(16, 8),Positions(16, 16)
    assert init_from_teacher(student, teacher).share[''] == .5 and torch.equal(student.pos_embed, teacher.pos_embed[:,::2])

def test_names_that_are_numbers_of_other_layers():
    "VGG13 and VGG16: the names agree up to the third stage, and then mean other layers"
    student,teacher = tv.vgg13(num_classes=10),tv.vgg16(num_classes=10)
    table = init_from_teacher(student, teacher)
    assert table.note['features.15'] == table.note['features.22'] == 'other layers before it in the teacher' and table.share['features.12'] == 1
    assert (init_from_teacher(student, teacher, xb=images).share == 1).all()
    assert torch.equal(student.features[22].weight, teacher.features[26].weight)

def test_a_warning_for_another_normalization(recwarn):
    a,b,c = learner(),learner(),learner()
    for o,m in ((a,.5),(b,.5),(c,.1)): o.dls.add_tfms([Normalize(torch.full((1,3,1,1), m), torch.ones(1,3,1,1))], 'after_batch')
    init_from_teacher(a, b)
    init_from_teacher(a, net())
    assert not [w for w in recwarn if 'normalized' in str(w.message)]
    with pytest.warns(UserWarning, match='normalized in another way'): init_from_teacher(a, c)

def test_pairs_as_a_list():
    lists = init_from_teacher(tv.resnet18(), tv.resnet34(), layers=[('layer1','layer1'),('layer2','layer2')])
    assert list(lists['from']) == list(init_from_teacher(tv.resnet18(), tv.resnet34(), layers={'layer1': 'layer1', 'layer2': 'layer2'})['from']) and lists.share['layer2.0.conv1'] == 1
    for bad in ([], {}, 'layer1', ['layer1']):
        with pytest.raises(ValueError, match='Pairs of layers'): init_from_teacher(tv.resnet18(), tv.resnet34(), layers=bad)

class Functional(nn.Module):
    "Flattens without a layer for it, after pooling"
    def __init__(self, width, classes=3):
        super().__init__()
        self.conv,self.norm,self.fc = nn.Conv2d(1, width, 3, padding=1),nn.BatchNorm1d(4*width),nn.Linear(4*width, classes)
    def forward(self, x): return self.fc(self.norm(nn.functional.max_pool2d(self.conv(x).relu(), 4).flatten(1)))

def test_a_run_shows_what_reads_a_flattened_map():
    "the head too"
    teacher,xb = moved(Functional(6)),torch.randn(2,1,8,8)
    by_channel = lambda t: t.unflatten(-1, (6,4))[...,::2,:].flatten(-2)
    for student in (Functional(3), learner(model=Functional(3))):
        init_from_teacher(student, teacher if isinstance(student, nn.Module) else learner(model=teacher), xb=xb if isinstance(student, nn.Module) else None)
        model = getattr(student, 'model', student)
        assert torch.equal(model.fc.weight, by_channel(teacher.fc.weight)) and torch.equal(model.norm.running_mean, by_channel(teacher.norm.running_mean))
    head = lambda w: nn.Sequential(nn.Conv2d(1, w, 3), nn.Flatten(), nn.Linear(36*w, 2))
    student,teacher = head(2),head(4)
    init_from_teacher(student, teacher)
    assert torch.equal(student[2].weight, teacher[2].weight.unflatten(1, (4,36))[:,::2].flatten(1))

def test_what_reads_no_flattened_map_is_as_before():
    "Convolutions of several branches, of a gate, and a linear layer over places"
    class Branches(nn.Module):
        def __init__(self, w):
            super().__init__()
            self.branches,self.norm,self.gate,self.out = nn.ModuleList(nn.Conv1d(3, w, k, padding=k//2) for k in (1,3,5)),nn.BatchNorm1d(3*w),nn.Conv1d(1, 1, 3, padding=1),nn.Linear(3*w, 2)
        def forward(self, x): return self.out(self.norm(torch.cat([b(x) for b in self.branches], 1)).mean(-1))
    for xb in (None, torch.randn(2,3,9)):
        student,teacher = Branches(4),moved(Branches(8))
        assert not init_from_teacher(student, teacher, xb=xb).note.any()
        assert torch.equal(student.norm.running_mean, teacher.norm.running_mean[::2]) and torch.equal(student.out.weight, teacher.out.weight[:,::2])

class Tokens(nn.Module):
    def __init__(self, words=9, kinds=2):
        super().__init__()
        self.words,self.kinds,self.out = nn.Embedding(words, 4),nn.Embedding(kinds, 4),nn.Linear(4, 2)

def test_only_words_may_be_classes():
    student,teacher = [learner(model=Tokens()) for _ in range(2)]
    student.dls.vocab,teacher.dls.vocab = ['pos','neg'],['neg','pos']
    init_from_teacher(student, teacher)
    assert torch.equal(student.model.kinds.weight, teacher.model.kinds.weight) and torch.equal(student.model.out.bias, teacher.model.out.bias[[1,0]])

def test_bands_and_normalizations(recwarn):
    student,teacher = [learner(batches(shape=(c,8,8)), nn.Sequential(nn.Conv2d(c, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))) for c in (4,3)]
    for o,c in ((student,4),(teacher,3)): o.dls.add_tfms([Normalize(torch.full((1,c,1,1), .1*c), torch.ones(1,c,1,1))], 'after_batch')
    table = init_from_teacher(student, teacher)
    assert table.note['0'] == '3 channels of images in the teacher, 4 here' and table.share['3'] == 1

def test_layers_that_moved_and_layers_that_did_not():
    "A dropout in one head moves what follows in it; blocks before stay the first ones"
    class Mean(nn.Module):
        def forward(self, x): return x.mean(1)
    def model(n, drop): return nn.Sequential(encoder(n, 16, 2, 24), nn.Sequential(Mean(), *([nn.Dropout()] if drop else []), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3)))
    student,teacher = [learner(batches(shape=(5,16)), model(*o)) for o in ((2,False),(4,True))]
    table = init_from_teacher(student, teacher)
    blocks = [n for n in table.index if n.startswith('0.')]
    assert len(blocks) == 12 and list(table.loc[blocks,'from']) == blocks and table.loc['1.3','from'] == '1.4'

def test_heads_have_a_bias():
    "SwinV2's position networks have a row for each head of attention"
    class Model(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.attention,self.body,self.head = nn.Linear(6, 3, bias=False),nn.Linear(5, 7),nn.Linear(7, classes)
    table = init_from_teacher(Model(3), Model(10))
    assert table.share['attention'] == 1 and table.note['head'] == 'other classes in the teacher'
    student,teacher = nn.Sequential(nn.ConvTranspose2d(1,4,2), nn.Conv2d(4,3,3)),nn.Sequential(nn.ConvTranspose2d(3,8,2), nn.Conv2d(8,3,3))
    init_from_teacher(student, teacher)
    assert torch.equal(student[0].weight, teacher[0].weight[:1,::2])
    assert torch.equal(student[1].weight, teacher[1].weight[:,::2])

def test_tables_without_known_categories():
    from fastai.tabular.all import Normalize as NormalizeColumns, TabularDataLoaders, tabular_learner
    import pandas as pd
    df = pd.DataFrame(dict(k=np.resize([0,1,2], 24), x=np.random.randn(24).astype('f'), t=np.random.randn(24).astype('f')))
    dls = TabularDataLoaders.from_df(df, procs=[NormalizeColumns], cat_names=['k'], cont_names=['x'], y_names='t', bs=8, valid_idx=list(range(8)))
    make = lambda: learner(dls, TabularModel([(3,2)], 1, 1, [4]), loss_func=nn.MSELoss())
    student,teacher = make(),make()
    assert not init_from_teacher(student, teacher).note.any() and torch.equal(student.model.embeds[0].weight, teacher.model.embeds[0].weight)
