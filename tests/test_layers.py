"Layers: names, tables, pairs for many architectures, similarity against its definition; and models that stay as they were"
import itertools, math, random, weakref
import numpy as np
import pandas as pd
import pytest, torch
from torch import nn
from torchvision import models as tv
from fastai.layers import ConvLayer
from fastai.tabular.model import TabularModel
from fastai.text.models.awdlstm import AWD_LSTM
from fastai.text.models.core import get_language_model
from fastai.vision.learner import create_unet_model, create_vision_model
from fastai.vision.models.xresnet import xresnet18, xresnet34
from fastkd.layers import Taps, find_layer, get_model_layers, layer_similarity, layer_table, match_layers
from fastkd.layers import _by_depth, _evenly
from conftest import batches, hooks, learner, net, same, weights

# pairs depend on shapes only, and on the meta device shapes are all that is computed
def image(size=64, bs=2): return torch.empty(bs, 3, size, size, device='meta')

def build(make):
    with torch.device('meta'): return make()

def timm_model(name, **kwargs):
    timm = pytest.importorskip('timm')
    return build(lambda: timm.create_model(name, pretrained=False, num_classes=10, **kwargs))

def from_torchvision(name): return build(lambda: getattr(tv, name)(num_classes=10))

RESNET = ['layer1','layer2','layer3','layer4']

def blocks(name, *numbers): return [f'{name}.{n}' for n in numbers]

# --- pairs ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('size', [32,64,97,224])
def test_the_tutorials_pairs(size):
    teacher = build(lambda: create_vision_model(tv.resnet34, 2, pretrained=False))
    assert match_layers(from_torchvision('resnet18'), teacher, image(size)) == (RESNET, blocks('0', 4,5,6,7))

@pytest.mark.parametrize('name,student,teacher', [
    ('resnet50', RESNET, RESNET),
    ('densenet121', RESNET, [f'features.denseblock{i}' for i in (1,2,3,4)]),
    ('efficientnet_b0', RESNET, blocks('features', 2,3,5,7)),
    ('mobilenet_v3_small', RESNET, blocks('features', 1,3,8,11)),
    ('convnext_tiny', RESNET, blocks('features', 1,3,5,7)),
    ('swin_t', RESNET, blocks('features', 1,3,5,7)),
    ('maxvit_t', RESNET, blocks('blocks', 0,1,2,3)),                 # windows within a block
    ('shufflenet_v2_x0_5', RESNET[1:], ['stage2','stage3','stage4']),
    ('vgg11', RESNET[:3], blocks('features', 9,14,19)),
])
def test_resnet_and_torchvision(name, student, teacher):
    assert match_layers(from_torchvision('resnet18'), from_torchvision(name), image(224)) == (student, teacher)

@pytest.mark.parametrize('name,teacher', [
    ('efficientnet_b0', blocks('blocks', 1,2,4,6)),
    ('mobilenetv3_small_100', blocks('blocks', 0,1,3,4)),
    ('mobilenetv3_large_100', blocks('blocks', 1,2,4,5)),
    ('convnext_atto', blocks('stages', 0,1,2,3)),
    ('resnet26d', RESNET),
    ('regnety_002', ['s1','s2','s3','s4']),
    ('swin_tiny_patch4_window7_224', blocks('layers', 0,1,2,3)),     # puts out (n, h, w, c)
    ('vgg11', blocks('features', 9,14,19)),                          # the one block is made of the classifier's convolutions
    ('ghostnet_100', blocks('blocks', 2,4,6,8)),                     # two convolutions before the one that reduces the resolution
    ('twins_svt_small', ['blocks.0.1','blocks.1.1','blocks.2.9','blocks.3.3']),     # attention to a reduced map within a block
    ('mobilevit_xs', blocks('stages', 1,2,3,4)),                     # tokens of patches within a block
    ('vit_tiny_patch16_224', blocks('blocks', 2,5,8,11)),            # one resolution: by depth
    ('mixer_s32_224', blocks('blocks', 1,3,5,7)),                    # mixes tokens in a transposed MLP
])
def test_resnet_and_timm(name, teacher):
    assert match_layers(from_torchvision('resnet18'), timm_model(name), image(224)) == (RESNET[:len(teacher)], teacher)

def test_vits_of_different_depth():
    student,teacher = timm_model('vit_tiny_patch16_224'),timm_model('vit_tiny_patch16_224', depth=18)
    assert match_layers(student, teacher, image(224)) == (blocks('blocks', 2,5,8,11), blocks('blocks', 4,8,13,17))
    assert match_layers(student, teacher, image(224), n=2) == (blocks('blocks', 5,11), blocks('blocks', 8,17))
    assert len(match_layers(student, teacher, image(224), n=100)[0]) == 12
    assert match_layers(student, from_torchvision('vit_b_16'), image(224), n=1) == (['blocks.11'], ['encoder.layers.encoder_layer_11'])

def test_xresnet():
    resnet = from_torchvision('resnet18')
    assert match_layers(build(xresnet18), resnet, image()) == (['4','5','6','7'], RESNET)
    assert match_layers(build(xresnet18), build(xresnet34), image()) == (['4','5','6','7'],)*2

def test_plain_networks():
    plain = lambda *w: nn.Sequential(*[ConvLayer(a, b, stride=2) for a,b in zip(w, w[1:])], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(w[-1],2))
    assert match_layers(plain(3,4,8,8), plain(3,6,6,6,6), torch.randn(2,3,32,32)) == (['0','1','2'],)*2
    pooled = nn.Sequential(nn.Conv2d(3,4,3,padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4,8,3,padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8*64,2))
    assert match_layers(pooled, pooled, torch.randn(2,3,32,32)) == (['1','4'],)*2     # behind the activation function, before the pooling
    series = nn.Sequential(nn.Conv1d(2,4,3,2), nn.ReLU(), nn.Conv1d(4,8,3,2), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8,2))
    assert match_layers(series, series, torch.randn(3,2,64)) == (['1','3'],)*2

def test_stages_in_wrappers():
    class Block(nn.Module):
        def __init__(self, c): super().__init__(); self.a,self.b = nn.Conv2d(c,c,3,padding=1),nn.Conv2d(c,c,3,padding=1)
        def forward(self, x): return x + self.b(self.a(x).relu())
    body = nn.Sequential(nn.Conv2d(3,4,3,2,1), nn.Sequential(Block(4), Block(4)), nn.Sequential(nn.Conv2d(4,8,3,2,1), Block(8)))
    model = nn.Sequential(nn.Sequential(body), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,2))
    assert match_layers(model, body, torch.randn(2,3,16,16)) == (['0.0.1','0.0.2'], ['1','2'])      # two stages, and the body is not one of them
    late = nn.Sequential(nn.Sequential(nn.Sequential(Block(3), Block(3)), nn.Sequential(nn.Conv2d(3,8,3,2,1), Block(8))),
                         nn.Sequential(nn.Conv2d(8,8,3,2,1), Block(8)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,2))
    assert match_layers(late, late, torch.randn(2,3,16,16)) == (['0.0','0.1','1'],)*2               # the first stage at the resolution of the input
    assert match_layers(nn.DataParallel(model), model, torch.randn(2,3,16,16)) == (['0.0.1','0.0.2'],)*2

def test_dense_prediction():
    unet = create_unet_model(tv.resnet18, 3, (64,64), pretrained=False)
    s,t = match_layers(unet, unet, torch.randn(2,3,64,64))
    assert s == t and 'layers.0' not in s and 'layers.4' in s        # decoder blocks, not the whole encoder
    fcn = build(lambda: tv.segmentation.fcn_resnet50(weights=None, weights_backbone=None))
    assert match_layers(fcn, fcn, image())[0] == ['backbone.layer1','backbone.layer4']

def test_text_and_tables():
    lm = lambda n: get_language_model(AWD_LSTM, 20, config=dict(emb_sz=8, n_hid=12, n_layers=n, pad_token=1, bidir=False, output_p=0.1, hidden_p=0.1, input_p=0.1, embed_p=0.1, weight_p=0.1, tie_weights=True, out_bias=True))
    tokens = torch.randint(0, 20, (3,7))
    assert match_layers(lm(3), lm(3), tokens) == (blocks('0.rnns', 0,1,2),)*2
    assert match_layers(lm(2), lm(4), tokens) == (blocks('0.rnns', 0,1), blocks('0.rnns', 1,3))
    xb = torch.randint(0, 5, (4,2)), torch.randn(4,3)
    tab = lambda layers: TabularModel([(5,3),(5,4)], 3, 2, layers)
    assert match_layers(tab([30,20,10]), tab([30,20,10]), xb) == (blocks('layers', 0,1,2),)*2
    assert match_layers(tab([10]), tab([30,20]), xb) == (['layers.0'], ['layers.1'])

def test_strides_count_not_sizes():
    "A teacher with larger images is paired stage by stage"
    s,t = from_torchvision('resnet18'),from_torchvision('resnet34')
    assert match_layers(s, t, image(64), teacher_xb=image(128, bs=1)) == (RESNET, RESNET)

def test_one_common_resolution_is_not_enough():
    "A CIFAR network of strides 1, 2, 4 has stride 4 in common with a ResNet: its last stage, the ResNet's first"
    block = lambda a,b,s: nn.Sequential(nn.Conv2d(a,b,3,s,1), nn.ReLU(), nn.Conv2d(b,b,3,1,1), nn.ReLU())
    cifar = build(lambda: nn.Sequential(block(3,4,1), block(4,8,2), block(8,16,2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,10)))
    s,t = match_layers(cifar, from_torchvision('resnet18'), image(32))
    # depths 2/7, 4/7, 6/7 and 5/21, 10/21, 15/21, 20/21
    assert s == ['0','1','2'] and t == ['layer1','layer2','layer4']

@pytest.mark.parametrize('n,m', [(1,1),(1,4),(3,3),(3,5),(5,3),(4,7)])
def test_depth_pairs_are_the_best_of_all(n, m):
    rng = random.Random(n*10 + m)
    a,b = (sorted(rng.random() for _ in range(k)) for k in (n,m))
    cost = lambda pairs: sum(abs(a[i]-b[j]) for i,j in pairs)
    k = min(n, m)
    every = [list(zip(i, j)) for i in itertools.combinations(range(n), k) for j in itertools.combinations(range(m), k)]
    assert cost(_by_depth(a, b)) == pytest.approx(min(map(cost, every)))

def test_evenly():
    assert _evenly('abcdefghijkl', 4) == list('cfil')
    assert _evenly('abc', 5) == list('abc')
    assert _evenly('abcd', 2) == list('bd')
    assert _evenly('abcd', 1) == ['d']

def test_no_layer_to_compare_says_whose():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(48,2))
    with pytest.raises(ValueError, match="student.*'1' \\(2, 2\\)"): match_layers(linear, net(), torch.randn(2,3,4,4), teacher_xb=torch.randn(2,1,8,8))
    with pytest.raises(TypeError, match='function'): match_layers(net(), lambda x: x, torch.randn(2,1,8,8))
    with pytest.raises(TypeError, match='inputs of the student'): match_layers(nn.Identity(), net(), 'cat.jpg')

# --- models stay as they were --------------------------------------------------------------------------------------

def looks():
    x = torch.randn(8,1,8,8)
    return {'layer_table': lambda m: layer_table(m, x), 'match_layers': lambda m: match_layers(m, m, x), 'layer_similarity': lambda m: layer_similarity(m, m, [x,x])}

@pytest.mark.parametrize('look', ['layer_table','match_layers','layer_similarity'])
def test_looking_changes_nothing(look):
    class Noise(nn.Module):
        "Draws in eval mode too"
        def forward(self, x): return x + 0*torch.rand_like(x)*np.random.rand()*random.random()
    m = net(dropout=0.5).train()
    m.noise = Noise()
    m.bn1.eval()
    m.fc.weight.requires_grad_(False)
    look = looks()[look]
    before,modes = weights(m),[o.training for o in m.modules()]
    states = torch.get_rng_state(),np.random.get_state()[1].copy(),random.getstate()
    look(m)
    assert same(before, weights(m)) and modes == [o.training for o in m.modules()] and not hooks(m)
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all() and states[2] == random.getstate()
    assert not m.fc.weight.requires_grad and all(p.grad is None for p in m.parameters())

@pytest.mark.parametrize('look', ['layer_table','match_layers','layer_similarity'])
def test_an_error_in_the_model_changes_nothing(look):
    class Fails(nn.Module):
        def forward(self, x): raise RuntimeError('out of luck')
    m = nn.Sequential(net(), Fails())
    with pytest.raises(RuntimeError, match='out of luck'): looks()[look](m)
    assert m.training and not hooks(m)

def test_hidden_state_stays():
    m = AWD_LSTM(20, 6, 8, 2)
    tokens = torch.randint(0, 20, (4,5))
    m(tokens)
    hidden = [[t.clone() for t in h] for h in m.hidden]
    layer_table(m, tokens)
    layer_similarity(m, m, [tokens], (['rnns.0','rnns.1'],)*2)
    assert all(torch.equal(a, b) for h,k in zip(hidden, m.hidden) for a,b in zip(h, k))
    again = AWD_LSTM(20, 6, 8, 2)
    layer_table(again, tokens)
    again(tokens)                                # the weights after dropout are made anew

def test_compiled_models():
    "Hooks that come after the compilation would not be seen"
    m,x = net(),torch.randn(4,1,8,8)
    names = list(layer_table(m, x).index)
    m.eval().compile(backend='eager')
    with torch.no_grad(): m(x)                   # as it will run when it is looked at: the code is there already
    assert list(layer_table(m, x).index) == names
    assert match_layers(m, torch.compile(net(), backend='eager'), x) == (['relu1','relu2'],)*2
    assert list(Taps(learner(model=m), ['conv1']).layers) == ['conv1']

def test_shuffling_stays():
    "Training after a look sees the batches in the order that it would have seen"
    def order(look):
        torch.manual_seed(0); random.seed(0); np.random.seed(0)
        dls = batches()
        learn = learner(dls)
        look(learn)
        return torch.cat([yb for _,yb in dls.train]), torch.cat([xb.flatten(1) for xb,_ in dls.train])
    plain = order(lambda learn: None)
    for look in (lambda learn: learn.layer_table(), lambda learn: layer_similarity(learn, net(), learn.dls.train)):
        assert all(torch.equal(a, b) for a,b in zip(plain, order(look)))

# --- table ---------------------------------------------------------------------------------------------------------

def test_table_of_a_resnet():
    m = tv.resnet18(num_classes=10)
    table = layer_table(m, torch.randn(2,3,64,64))
    assert list(table.columns) == ['type','shape','stride','parameters','calls']
    assert list(table.index)[:6] == ['conv1','bn1','relu','maxpool','layer1','layer1.0']
    assert set(table.index) == set(get_model_layers(m))
    assert table.loc['layer3','shape'] == (2,256,4,4) and table.loc['layer3','stride'] == 16
    assert math.isnan(table.loc['fc','stride']) and table.loc['fc','shape'] == (2,10)
    assert table.loc['layer1.0.relu','calls'] == 2
    tops = layer_table(m, torch.randn(2,3,64,64), depth=1)
    assert list(tops.index) == ['conv1','bn1','relu','maxpool',*RESNET,'avgpool','fc']
    assert tops.parameters.sum() == sum(p.numel() for p in m.parameters())

def test_table_of_tokens():
    m = nn.Sequential(nn.Embedding(20,8), nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), nn.Linear(8,20))
    table = layer_table(m, torch.randint(0, 20, (3,7)))
    assert table.loc['1.layers.1','shape'] == (3,7,8) and table.loc['1.layers.1','stride'] == 1
    assert '1.layers' not in table.index         # a list of layers does not run

def test_table_of_a_recurrent_and_of_a_tabular_model():
    m = AWD_LSTM(20, 6, 8, 2)
    assert layer_table(m, torch.randint(0, 20, (4,5))).loc['rnns.1','shape'] == (4,5,6)
    m = TabularModel([(5,3)], 2, 2, [10])
    table = layer_table(m, (torch.randint(0, 5, (4,1)), torch.randn(4,2)))
    assert table.loc['embeds.0','shape'] == (4,3) and table.stride.isna().all()

def test_table_of_channels_last_maps():
    class Permuted(nn.Module):
        def __init__(self): super().__init__(); self.conv,self.norm = nn.Conv2d(3,8,4,4),nn.LayerNorm(8)
        def forward(self, x): return self.norm(self.conv(x).permute(0,2,3,1)).mean((1,2))
    table = layer_table(Permuted(), torch.randn(2,3,32,64))
    assert table.loc['norm','shape'] == (2,8,16,8) and table.loc['norm','stride'] == 4

def test_table_display():
    table = layer_table(tv.resnet18(num_classes=10), torch.randn(2,3,64,64))
    html = table._repr_html_()
    assert html.count('<tr') == len(table) + 2 and '2 × 512 × 2 × 2' in html and 'NaN' not in html
    assert '2 × 512' in table.loc[['layer4'], ['type','shape']]._repr_html_()

# --- names ---------------------------------------------------------------------------------------------------------

def test_wrong_names():
    m = net()
    with pytest.raises(ValueError, match="student.*does not exist.*'conv1'.*get_model_layers"): find_layer(m, 'conv', 'student')
    with pytest.raises(ValueError, match=r"'conv2' \(2, 8, 4, 4\)"): find_layer(m, 'conv3', xb=torch.randn(2,1,8,8))
    with pytest.raises(ValueError, match='is a Parameter'): find_layer(m, 'fc.weight')
    with pytest.raises(ValueError, match='is a method'): find_layer(m, 'fc.forward')
    with pytest.raises(TypeError, match="its name.*'fc'"): find_layer(m, m.fc)
    with pytest.raises(TypeError, match='list'): find_layer(m, ['fc'])
    with pytest.raises(TypeError, match='function'): find_layer(m, lambda x: x)
    with pytest.raises(ValueError, match=r"'conv1' \(2, 4, 8, 8\)"): Taps(m, ['conv'], xb=torch.randn(2,1,8,8))

def test_a_list_of_layers_never_runs():
    class Listed(nn.Module):
        def __init__(self): super().__init__(); self.layers = nn.ModuleList([nn.Linear(2,2)])
        def forward(self, x): return self.layers[0](x)
    taps = Taps(Listed(), ['layers'])
    taps.run(torch.randn(2,2))
    with pytest.raises(ValueError, match='ModuleList never runs itself'): taps.activations()

# --- similarity ----------------------------------------------------------------------------------------------------

def hsic1(k, l):
    "The definition: a mean over all ordered quadruples of different examples (Song et al., 2012)"
    q = list(itertools.permutations(range(len(k)), 4))
    return sum(k[i,j]*l[i,j] + k[i,j]*l[q,r] - 2*k[i,j]*l[i,q] for i,j,q,r in q)/len(q)

def grams(model, names, xb):
    with Taps(model, names) as taps, torch.no_grad(): model(xb)
    return [(a.flatten(1) @ a.flatten(1).T).double() for a in taps.activations().values()]

@pytest.mark.parametrize('sizes', [(6,), (5,7,4)])
def test_similarity_is_its_definition(sizes):
    torch.manual_seed(0)
    s,t = net(seed=1).double().eval(),net(width=6, seed=2).double().eval()
    names = ['conv1','relu2','fc']
    xs = [torch.randn(n,1,8,8).double() for n in sizes]
    a,b = [grams(s, names, x) for x in xs],[grams(t, names, x) for x in xs]
    h = lambda p,i,q,j: sum(n*hsic1(k[i], l[j]) for n,k,l in zip(sizes, p, q))
    want = [[h(a,i,b,j)/math.sqrt(h(a,i,a,i)*h(b,j,b,j)) for j in range(3)] for i in range(3)]
    got = layer_similarity(s, t, xs, (names, names))
    assert list(got.index) == list(got.columns) == names
    np.testing.assert_allclose(got.to_numpy(), np.array(want, dtype=float), rtol=1e-9)

def test_similarity_tends_to_the_population():
    "Of linear layers XA, XB on standard normal X it is |A'B|^2/(|A'A| |B'B|), Frobenius norms"
    torch.manual_seed(0)
    a,b = nn.Linear(6,4),nn.Linear(6,9)
    A,B = a.weight.detach().T,b.weight.detach().T
    want = (A.T @ B).norm()**2/((A.T @ A).norm()*(B.T @ B).norm())
    got = layer_similarity(nn.Sequential(a), nn.Sequential(b), (torch.randn(64,6) for _ in range(60)), (['0'],['0']), n_batches=60)
    assert abs(got.iloc[0,0] - want) < 0.02

def test_similarity_of_independent_layers_is_zero_on_average():
    "where the plain estimate from eight examples of many features is far from it"
    class Halves(nn.Module):
        def __init__(self, first): super().__init__(); self.first,self.out = first,nn.Identity()
        def forward(self, x): return self.out(x[:,:200] if self.first else x[:,200:])
    torch.manual_seed(0)
    xs = [torch.randn(8,400) for _ in range(100)]
    got = layer_similarity(Halves(True), Halves(False), xs, (['out'],['out']), n_batches=100).iloc[0,0]
    x = xs[0] - xs[0].mean(0)
    k,l = x[:,:200] @ x[:,:200].T,x[:,200:] @ x[:,200:].T
    assert abs(got) < 0.1 and (k*l).sum()/(k.norm()*l.norm()) > 0.5

def linear_after(m, weight, shift=0.):
    "`m` with the linear map `weight` behind it"
    new = nn.Linear(*weight.shape[::-1]).double()
    with torch.no_grad(): new.weight.copy_(weight); new.bias.fill_(shift)
    return nn.Sequential(m, new)

def test_invariances():
    torch.manual_seed(0)
    m,other = nn.Linear(7,5).double(),nn.Sequential(nn.Linear(7,6).double())
    xs = [torch.randn(12,7).double() for _ in range(3)]
    q = torch.linalg.qr(torch.randn(5,5).double())[0]
    sim = lambda model, name='1': layer_similarity(model, other, xs, ([name],['0'])).iloc[0,0]
    plain = sim(linear_after(m, torch.eye(5).double()))
    assert sim(linear_after(m, q)) == pytest.approx(plain, rel=1e-9)              # rotation
    assert sim(linear_after(m, 7*torch.eye(5).double())) == pytest.approx(plain, rel=1e-9)   # isotropic scale
    assert sim(linear_after(m, torch.eye(5).double(), 100.)) == pytest.approx(plain, rel=1e-9)   # shift
    assert abs(sim(linear_after(m, torch.diag(torch.tensor([10.,1,1,1,1]).double()))) - plain) > 1e-3    # but not any linear map
    flipped = layer_similarity(linear_after(m, q), other, [x.flip(0) for x in xs], (['1'],['0'])).iloc[0,0]
    assert flipped == pytest.approx(plain, rel=1e-9)                              # order of examples
    there,back = layer_similarity(nn.Sequential(m), other, xs, (['0'],['0'])),layer_similarity(other, nn.Sequential(m), xs, (['0'],['0']))
    assert there.iloc[0,0] == pytest.approx(back.iloc[0,0], rel=1e-12)

def test_similarity_takes_what_match_layers_gives_and_all_kinds_of_batches():
    s,t = net(seed=1),net(width=6, seed=2)
    dls = batches(shuffle=False)
    xs = [b[0] for b in dls.valid]
    pairs = match_layers(s, t, xs[0])
    want = layer_similarity(s, t, xs, pairs)
    for dl in (dls.valid, [(x, torch.zeros(8)) for x in xs], torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.cat(xs)), batch_size=8)):
        pd.testing.assert_frame_equal(layer_similarity(s, t, dl, pairs), want)
    pd.testing.assert_frame_equal(layer_similarity(s, learner(dls, t), xs, dict(zip(*pairs))), want)
    pd.testing.assert_frame_equal(layer_similarity(s, t, xs, pairs, inputs=lambda x: x), want)
    assert not layer_similarity(s, t, xs, pairs, inputs=lambda x: x.flip(-1)).equals(want)
    assert layer_similarity(s, t, xs, n_batches=1).shape == (2,2)                # the stages, where no layers are named

def test_similarity_of_several_inputs_and_of_tokens():
    tab = TabularModel([(5,3)], 2, 2, [10,8])
    xb = torch.randint(0, 5, (16,1)), torch.randn(16,2)
    class TwoInputs(list): n_inp = 2                                              # as fastai's loaders say it
    got = layer_similarity(tab, tab, TwoInputs([(*xb, torch.zeros(16))]), (['layers.0','layers.1'],)*2)
    np.testing.assert_allclose(np.diag(got), 1, rtol=1e-6)
    lm = nn.Sequential(nn.Embedding(20,8), nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3))
    got = layer_similarity(lm, lm, [torch.randint(0, 20, (6,7)) for _ in range(2)])
    assert list(got.index) == ['1.layers.0','1.layers.1','1.layers.2']
    np.testing.assert_allclose(np.diag(got), 1, rtol=1e-6)

def test_memory_does_not_grow_with_batches():
    "A generator is read batch by batch, and no more than one batch is alive"
    alive,most = weakref.WeakSet(),[0]
    def dl():
        for _ in range(6):
            x = torch.randn(8,1,8,8)
            alive.add(x)
            most[0] = max(most[0], len(alive))
            yield x
    layer_similarity(net(), net(), dl(), (['relu1'],['relu2']))
    assert most[0] <= 2

def test_similarity_refuses():
    m,x = net(),torch.randn(8,1,8,8)
    with pytest.raises(ValueError, match='four examples'): layer_similarity(m, m, [x[:3]], (['conv1'],['conv1']))
    with pytest.raises(ValueError, match='four examples'): layer_similarity(m, m, [])
    with pytest.raises(ValueError, match=r"teacher.*'conv1' \(8, 4, 8, 8\)"): layer_similarity(m, m, [x], (['conv1'],['conv']))
    class Windows(nn.Module):
        def __init__(self): super().__init__(); self.cut,self.unused = nn.Identity(),nn.Identity()
        def forward(self, x): return self.cut(x.reshape(-1,16)).reshape(len(x), -1)
    with pytest.raises(ValueError, match='32 rows for a batch of 8'): layer_similarity(Windows(), m, [x], (['cut'],['conv1']))
    with pytest.raises(ValueError, match="'unused' of the student did not run"): layer_similarity(Windows(), m, [x], (['unused'],['conv1']))
    assert not hooks(m)

def test_a_model_in_a_wrapper_of_somebodys_is_no_stage():
    class Wrapper(nn.Module):
        def __init__(self, model): super().__init__(); self.net = model
        def forward(self, x): return self.net(x)
    def plain(width): return nn.Sequential(nn.Conv2d(1,width,3,padding=1), nn.ReLU(), nn.Conv2d(width,2*width,3,2,1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2*width,3))
    x = torch.randn(2,1,8,8)
    assert match_layers(plain(4), Wrapper(plain(6)), x) == (['1','3'], ['net.1','net.3'])
    assert match_layers(Wrapper(Wrapper(plain(4))), plain(6), x) == (['net.net.1','net.net.3'], ['1','3'])
