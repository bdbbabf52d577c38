"Bodies trained without labels: against loops by hand and scikit-learn; what the labels and the probes may not change"
import copy, random, subprocess, sys
from functools import partial
import numpy as np
import pytest, torch
import torch.nn.functional as F
from operator import itemgetter
from torch import nn
from torchvision.models import resnet18
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from fastai.basics import Adam, DataLoader, DataLoaders, Datasets, Learner, Normalize, SGD
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import SchedCos, SchedLin
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.metrics import accuracy
from fastai.tabular.model import TabularModel
from fastkd.all import *
from fastkd.bodies import BodyDistillation
from conftest import batches, hooks, net, same, weights

def backbone(width=4, seed=1): return nn.Sequential(*list(net(width=width, seed=seed))[:6])  # maps of 2·width channels

def distilled(dls=None, body=None, teacher=None, loss=Cosine, **kwargs):
    learn = distill_learner(dls or batches(shuffle=False), body or backbone(), teacher or backbone(seed=7), loss, **{'opt_func': SGD, 'wd': 0., 'lr': .1, **kwargs})
    learn.remove_cb(learn.progress)
    learn.logger = lambda *args: None
    return learn

def rows(dls, i=0): return [torch.stack(o) for o in zip(*dls[i].dataset)]
def cosine(a, b): return 1 - F.cosine_similarity(a, b).mean()
def column(learn, name): return [row[learn.recorder.metric_names.index(name)-1] for row in learn.recorder.values]

# --- what is trained -----------------------------------------------------------------------------------------------

def test_a_loop_by_hand():
    dls,body,teacher = batches(shuffle=False),backbone(),backbone(seed=7)
    hand,x = copy.deepcopy(body),rows(dls)[0]
    learn = distilled(dls, body, teacher)
    learn.fit(2)
    opt,teacher = torch.optim.SGD(hand.parameters(), lr=.1),teacher.eval()
    for _ in range(2):
        for xb in x.split(8):
            loss = cosine(hand.train()(xb).mean((2,3)), teacher(xb).mean((2,3)).detach())
            opt.zero_grad(); loss.backward(); opt.step()
    for a,b in zip(body.state_dict().values(), hand.state_dict().values()): assert torch.allclose(a, b, atol=1e-6)

def test_the_model_returns_pooled_features():
    body,x = backbone(),torch.randn(4,1,8,8)
    learn = distilled(body=body)
    assert torch.allclose(learn.model.eval()(x), body.eval()(x).mean((2,3)), atol=1e-6)

def test_the_teachers_architecture_reaches_it():
    learn = distilled(opt_func=Adam, dls=batches(n=64, shuffle=False))
    learn.fit_one_cycle(30, 1e-2)
    losses = learn.body_distillation.curves['train']['kd_loss']
    assert losses[0] > .1 and losses[-1] < .02 and column(learn, 'valid_loss')[-1] < .05

def test_valid_loss_is_the_distillation_loss_by_hand():
    dls,teacher = batches(),backbone(width=6, seed=7)
    learn = distilled(dls, teacher=teacher)
    learn.fit(2)
    learn.model.eval(), teacher.eval()
    state = next(iter(learn.body_distillation.state_dict()['losses'].values()))
    w,b = state['parts.0.weight'],state['parts.0.bias']
    x = rows(dls, 1)[0]
    truth = cosine(learn.model(x)@w.T + b, teacher(x).mean((2,3))).item()
    assert column(learn, 'valid_loss')[-1] == pytest.approx(truth, abs=1e-5)
    assert learn.recorder.losses[0].item() == pytest.approx(learn.body_distillation.curves['train']['kd_loss'][0], abs=1e-6)
    assert learn.recorder.metric_names == ['epoch','train_loss','valid_loss','kd_loss','time']

@pytest.mark.parametrize('form', [dict, lambda d: list(d.items())])
def test_losses_with_layers_of_their_own(form):
    "beside the pooled features, by the names that the layers have in body and teacher"
    dls,body,teacher = batches(shuffle=False, n=8),backbone(),backbone(seed=7)
    by_hand,other = copy.deepcopy(body),copy.deepcopy(teacher).eval()
    learn = distilled(dls, body, teacher, [Cosine(), Similarity(layers=form({'3': '0'}))], weight=[1.,2.])
    learn.fit(1)
    x = rows(dls)[0]
    z,t = by_hand(x).mean((2,3)),other(x).mean((2,3))
    gram = lambda a: F.normalize(a.flatten(1) @ a.flatten(1).T)
    loss = cosine(z, t) + 2*F.mse_loss(gram(by_hand[:4](x)), gram(other[:1](x)))
    for p,d in zip(by_hand.parameters(), torch.autograd.grad(loss, by_hand.parameters())): p.data -= .1*d
    for p,q in zip(body.parameters(), by_hand.parameters()): torch.testing.assert_close(p, q)

def test_batch_norm_of_a_loss_rests_in_validation():
    learns = [distilled(batches(n_valid=n, shuffle=False), body=backbone(), teacher=backbone(6, 7), loss=FitNet, layers={'3': '3'}) for n in (16, 8)]
    states = []
    for learn in learns:
        torch.manual_seed(0)
        learn.fit(2)
        states.append(learn.body_distillation.state_dict()['losses']['kd_loss'])
    assert any('running_mean' in k for k in states[0]) and same(*states)

def test_labels_never_count():
    results = []
    for order in (None, 0, 1):
        dls = batches(shuffle=False)
        x,y = rows(dls)
        if order is not None: y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(order))]
        items = list(zip(x, y)) if order is not None else [(o,) for o in x]
        valid = dls.valid.dataset if order is not None else [(o,) for o in rows(dls, 1)[0]]
        learn = distilled(DataLoaders.from_dsets(items, valid, bs=8, num_workers=0, shuffle=(False,False), device='cpu'))
        learn.fit(2)
        results.append((weights(learn.model), column(learn, 'valid_loss')))
    assert same(results[0][0], results[1][0]) and same(results[1][0], results[2][0])
    assert results[0][1] == results[1][1] == results[2][1]

# --- models and data -----------------------------------------------------------------------------------------------

def test_images_without_labels_for_architectures_by_function_and_name(tmp_path):
    from fastai.vision.all import DataBlock, ImageBlock, RandomSplitter, Resize, get_image_files
    for i in range(6): Image.fromarray(np.random.RandomState(i).randint(0, 255, (40,40,3), np.uint8)).save(tmp_path/f'{i}.png')
    dls = DataBlock(blocks=ImageBlock, get_items=get_image_files, splitter=RandomSplitter(.34, seed=0), item_tfms=Resize(32)).dataloaders(tmp_path, bs=2, num_workers=0)
    teacher,x = nn.Sequential(nn.Conv2d(3,5,8,8), nn.BatchNorm2d(5)),torch.randn(2,3,32,32)
    for body,n in ((resnet18, 512), ('mobilenetv3_small_050', 1024)):
        if isinstance(body, str): pytest.importorskip('timm')
        learn = distilled(dls, body, teacher)
        learn.fit(1)
        assert learn.model.eval()(x).shape == (2,n) and column(learn, 'valid_loss')[0] > 0

def test_a_body_takes_the_datas_channels():
    assert distilled(body=resnet18).model.eval()(torch.randn(2,1,8,8)).shape == (2,512)

def test_tables_have_several_inputs():
    g = torch.Generator().manual_seed(0)
    items = [(torch.randint(5, (1,), generator=g), torch.randn(2, generator=g), torch.tensor(0.)) for _ in range(16)]
    dls = DataLoaders.from_dsets(items, items, bs=8, num_workers=0, device='cpu')
    for dl in dls.loaders: dl._n_inp = 2
    body,teacher = (TabularModel([(5,3)], 2, n, [6]) for n in (4,7))
    learn = distilled(dls, body, teacher, RKD)
    learn.fit(1)
    assert learn.model is body and column(learn, 'kd_loss')[0] > 0

def test_texts_are_pooled_over_tokens():
    items = [(torch.randint(20, (6,)), torch.tensor(0)) for _ in range(16)]
    dls = DataLoaders.from_dsets(items, items, bs=8, num_workers=0, device='cpu')
    def encoder(n, layers=1): return nn.Sequential(nn.Embedding(20, n), *[nn.TransformerEncoderLayer(n, 2, 8, batch_first=True) for _ in range(layers)])
    body = encoder(4)
    learn = distilled(dls, body, encoder(8))
    learn.fit(1)
    x = torch.randint(20, (3,6))
    assert torch.allclose(learn.model.eval()(x), body(x).mean(1), atol=1e-6)

def test_a_learner_as_teacher_brings_its_body_and_normalization():
    body,x = backbone(seed=7),torch.randn(4,1,8,8)
    dls = batches()
    dls.add_tfms([Normalize.from_stats([.3],[.5], cuda=False)], 'after_batch')
    trained = Learner(dls, nn.Sequential(body, net()[6:]), loss_func=nn.CrossEntropyLoss(), metrics=accuracy)
    trained.recorder.metric_names,trained.recorder.values = ['epoch','train_loss','valid_loss','accuracy','time'],[[0.,0.,1.]]
    said = []
    learn = distilled(teacher=trained)
    kd = learn.body_distillation
    with kd.teacher.on(dls=batches()): output = kd.teacher.run(x, layers=('',), logits=False).activations['']
    assert torch.allclose(output, body.eval()((x-.3)/.5).mean((2,3)), atol=1e-5)
    learn.fit(1)  # and no warning that its head is missed: warnings are errors below
    assert kd.teacher.learners == [None]

def test_a_teacher_whose_output_holds_several_tensors():
    class Vit(nn.Module):
        def __init__(self): super().__init__(); self.m = backbone(seed=7)
        def forward(self, x): return {'last_hidden_state': self.m(x).flatten(2).mT, 'pooler_output': self.m(x).amax((2,3))}
    x,model = torch.randn(4,1,8,8),Vit().eval()
    for outputs,truth in ((None, model(x)['last_hidden_state'].mean(1)), (itemgetter('pooler_output'), model(x)['pooler_output'])):
        kd = distilled(teacher=Teacher(model, outputs=outputs)).body_distillation
        assert torch.allclose(kd.teacher.run(x, layers=('',), logits=False).activations[''], truth, atol=1e-6)

def test_a_teacher_with_settings_runs_as_it_says():
    teacher = Teacher(backbone(seed=7), inputs=lambda x: F.interpolate(x, size=16), cache=True)
    learn = distilled(teacher=teacher)
    learn.fit(2)
    assert column(learn, 'kd_loss')[-1] > 0 and teacher.model[0].in_channels == 1 and len(teacher.models[0]) == 6

@pytest.mark.parametrize('layers,pairs', [({'2': '2', '5': '5'}, [('0.2','2'),('0.5','5')]), ([('5','2')], [('0.5','2')]), ('match', None)])
def test_layers_named_or_matched(layers, pairs):
    learn = distilled(teacher=backbone(width=6, seed=7), layers=layers)
    learn.fit(1)
    found = learn.body_distillation.pairs
    assert found == pairs if pairs else found and all(s and t for s,t in found)

@pytest.mark.parametrize('loss', [FitNet, RKD, Similarity, PKT, [Cosine, RKD]])
def test_losses_on_vectors(loss, recwarn):
    learn = distilled(loss=loss, teacher=backbone(width=6, seed=7), weight=[1., 2.] if isinstance(loss, list) else None)
    learn.fit(1)
    assert all(v == v for v in learn.recorder.values[-1]) and not [w for w in recwarn if 'weight' in str(w.message)]

def test_lr_find_and_a_second_fit():
    learn = distilled(teacher=backbone(width=6, seed=7))
    before = weights(learn.model)
    learn.lr_find(num_it=5, show_plot=False)
    assert same(weights(learn.model), before)
    learn.fit(1)
    first = copy.deepcopy(learn.body_distillation.state_dict()['losses']['kd_loss'])
    learn.fit(1, lr=0.)
    assert same(first, learn.body_distillation.state_dict()['losses']['kd_loss'])  # the projection goes on

@pytest.mark.parametrize('cb', [MixUp, partial(GradientAccumulation, 16)])
def test_callbacks(cb):
    learn = distilled(cbs=cb())
    learn.fit(1)
    assert column(learn, 'valid_loss')[0] > 0

def without_labels(n=16):
    items = [(o[0],) for o in batches(n=n).train.dataset]
    return DataLoaders.from_dsets(items, items, bs=8, num_workers=0, device='cpu')

@pytest.mark.parametrize('mixing', [MixUp, CutMix])
def test_images_without_labels_are_mixed(mixing):
    "as those with labels are"
    plain,mixed = distilled(without_labels()),distilled(without_labels(), cbs=mixing(.4))
    for learn in (plain,mixed): learn.fit(1)
    assert column(mixed, 'valid_loss')[0] > 0 and not same(weights(mixed.model), weights(plain.model))

def test_valid_loss_does_not_follow_the_schedule():
    "A student that does not move has one validation loss"
    body = nn.Sequential(nn.Conv2d(1,4,3), nn.ReLU())
    losses = []
    for schedule in (None, SchedLin(1,0), SchedCos(0,1)):
        learn = distilled(body=copy.deepcopy(body), schedule=schedule, lr=0.)
        learn.fit(3)
        losses += column(learn, 'valid_loss')
    assert losses == pytest.approx([losses[0]]*9, rel=1e-6) and losses[0] > 0

class FromDictionary(nn.Module):
    def __init__(self): super().__init__(); self.body = backbone()
    def forward(self, o): return self.body(o['x'])

def test_inputs_in_a_dictionary_without_labels():
    items = [(dict(x=o[0]),) for o in batches(n=16).train.dataset]
    dls = DataLoaders(*[DataLoader(items, bs=8, num_workers=0, n_inp=1) for _ in range(2)])
    learn = distilled(dls, FromDictionary(), FromDictionary())
    learn.fit(1)
    assert column(learn, 'kd_loss')[0] >= 0

class TwoInputs(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Conv2d(1,4,3),nn.Conv2d(4,4,3)
    def forward(self, x, y): return self.b(self.a(x) + self.a(y))

def test_maps_of_bodies_with_several_inputs_are_refused():
    items = [(torch.randn(1,8,8), torch.randn(1,8,8), i % 2) for i in range(16)]
    dls = DataLoaders(*[DataLoader(items, bs=8, num_workers=0, n_inp=2) for _ in range(2)])
    dls.n_inp = 2
    for f in (lambda: distill_learner(dls, TwoInputs(), TwoInputs()), lambda: linear_probe(TwoInputs(), dls)):
        with pytest.raises(ValueError, match='A body of 2 inputs must return pooled features'): f()
    with pytest.raises(ValueError, match='a body of one input, and the data have 2'): body_learner(dls, TwoInputs(), 2)

def test_a_probe_takes_the_labels_of_tables():
    "of shape `(N, 1)`"
    x,y = torch.randn(40,4),torch.arange(40) % 2
    flat,column_ = [DataLoaders.from_dsets(items := list(zip(x, o)), items, bs=8, num_workers=0, device='cpu') for o in (y,y[:,None])]
    assert linear_probe(nn.Identity(), flat) == linear_probe(nn.Identity(), column_)

# --- nothing is left -----------------------------------------------------------------------------------------------

def test_nothing_is_left_behind(tmp_path):
    teacher = backbone(width=6, seed=7)
    teacher.train(); teacher[1].eval()
    modes,before = [m.training for m in teacher.modules()],weights(teacher)
    learn = distilled(teacher=teacher)
    keys,metrics = list(learn.model.state_dict()),list(learn.metrics)
    learn.fit(2, cbs=SaveModelCallback(monitor='valid_loss', fname='best', with_opt=True))
    assert not hooks(learn.model, teacher) and [m.training for m in teacher.modules()] == modes and same(before, weights(teacher))
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert list(learn.model.state_dict()) == keys and list(learn.metrics) == metrics and learn.body_distillation.session is None
    assert sum(map(len, learn.opt.param_lists)) == len(list(learn.model.parameters()))
    state = torch.load(learn.path/'models'/'best.pth', weights_only=False)
    assert len(state['opt']['state']) == len(list(learn.model.parameters()))

def test_validate_and_get_preds_run_no_teacher():
    class Spy(nn.Module):
        def __init__(self, m): super().__init__(); self.m,self.n = m,0
        def forward(self, x): self.n += 1; return self.m(x)
    spy = Spy(backbone(seed=7))
    learn = distilled(teacher=spy)
    learn.fit(1)
    n,x = spy.n,rows(learn.dls, 1)
    assert np.isnan(learn.validate()[0])
    preds,targets = learn.get_preds()
    assert torch.allclose(preds, learn.model.eval()(x[0]), atol=1e-6) and torch.equal(targets, x[1]) and spy.n == n
    class Look(Callback):
        "Validates inside the fit, and looks for hooks when the body has run"
        order = 2000
        def after_loss(self): assert not hooks(self.learn.model)
        def after_epoch(self):
            if self.learn.lock.locked(): return  # `validate` sends this event too
            n = spy.n
            self.found = self.learn.validate()[0],spy.n - n
    learn.fit(1, cbs=(look := Look()))
    assert np.isnan(look.found[0]) and look.found[1] == 0

def test_a_fit_that_fails_in_validation_leaves_nothing():
    class Fail(Callback):
        order = 2000
        def before_batch(self):
            if not self.training: raise ValueError('by a test')
    learn = distilled()
    with pytest.raises(ValueError, match='by a test'): learn.fit(1, cbs=Fail())
    assert not hooks(learn.model) and learn.body_distillation.session is None
    learn.fit(1)

def test_an_export_holds_the_body_and_loads_without_fastkd(tmp_path):
    g = torch.Generator().manual_seed(0)
    items = [{'x': torch.randn(1,8,8, generator=g), 'y': torch.tensor(i%3)} for i in range(24)]
    dls = Datasets(items, [[itemgetter('x')],[itemgetter('y')]], splits=(range(16),range(16,24))).dataloaders(bs=8, num_workers=0, device='cpu')
    learn = distill_learner(dls, resnet18, backbone(width=64, seed=7), path=tmp_path, metrics=LinearProbe(dls))
    with learn.no_bar(): learn.fit(1)
    learn.export('body.pkl')
    torch.save(learn.model, tmp_path/'alone.pt')
    assert (tmp_path/'body.pkl').stat().st_size < (tmp_path/'alone.pt').stat().st_size + 100_000
    code = f"""
import sys; sys.modules['fastkd'] = None
from fastai.basics import load_learner
import torch
learn = load_learner({str(tmp_path/'body.pkl')!r})
torch.save((learn.model.eval()(torch.ones(2,1,8,8)), learn.cbs.map(str)), {str(tmp_path/'out.pt')!r})
"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    features,cbs = torch.load(tmp_path/'out.pt', weights_only=False)
    assert torch.equal(features, learn.model.eval()(torch.ones(2,1,8,8))) and 'BodyDistillation' not in str(cbs)
    assert len(learn.cbs) == len(set(learn.cbs)) and any(isinstance(cb, BodyDistillation) for cb in learn.cbs)

# --- probes --------------------------------------------------------------------------------------------------------

def test_a_probe_is_scikit_learns():
    dls,body = batches(n=40, n_valid=30),backbone()
    model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    (X,y),(Xv,yv) = [(model(x).detach().numpy(), y.numpy()) for x,y in (rows(dls, 0), rows(dls, 1))]
    found = linear_probe(model, dls, C=.5, k=3)
    scaler = StandardScaler().fit(X)
    truth = dict(linear=LogisticRegression(C=.5, max_iter=1000).fit(scaler.transform(X), y).score(scaler.transform(Xv), yv),
                 neighbors=KNeighborsClassifier(3, metric='cosine').fit(X, y).score(Xv, yv))
    assert found == pytest.approx(truth, abs=1e-9) and found == linear_probe(body, dls, C=.5, k=3)  # maps are pooled

def test_a_probe_leaves_everything_as_it_was():
    dls,model = batches(),nn.Sequential(backbone(), nn.Dropout(.5))
    model.train(); model[0][1].eval()
    modes,before = [m.training for m in model.modules()],weights(model)
    twin = batches()
    for o in (dls, twin): o.train.rng = random.Random(3)
    def states(): return random.getstate()[1],tuple(np.random.get_state()[1]),tuple(torch.get_rng_state().tolist())
    found,state = linear_probe(model, dls),states()
    assert found == linear_probe(model, dls) and states() == state
    assert [m.training for m in model.modules()] == modes and same(weights(model), before) and not hooks(model)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for x,y in zip(dls.train, twin.train) for a,b in zip(x, y))

def test_a_probe_sees_no_augmentation():
    from fastai.vision.all import RandTransform, TensorImage
    class Noise(RandTransform):
        split_idx,order = 0,1
        def encodes(self, x:TensorImage): return x*0
    items = [{'x': TensorImage(torch.randn(3)+i%2*9), 'y': torch.tensor(i%2)} for i in range(24)]
    dls = Datasets(items, [[itemgetter('x'), Noise()],[itemgetter('y')]], splits=(range(16),range(16,24))).dataloaders(bs=5, num_workers=0, device='cpu', after_batch=Noise())
    assert not dls.train.one_batch()[0].any()
    assert linear_probe(nn.Flatten(), dls)['linear'] == 1.
    assert not dls.train.one_batch()[0].any() and dls.train_ds.split_idx == 0

@pytest.mark.parametrize('labeled', [True, False])
def test_the_probe_as_a_column(labeled):
    dls = batches(shuffle=False)
    own = dls if labeled else DataLoaders.from_dsets([(o,) for o in rows(dls)[0]], [(o,) for o in rows(dls, 1)[0]], bs=8, num_workers=0, shuffle=(False,False), device='cpu')
    learn,plain = distilled(own, metrics=LinearProbe(dls)),distilled(own)
    for l in (learn, plain): l.fit(2)
    assert same(weights(learn.model), weights(plain.model))
    assert column(learn, 'linear_probe')[-1] == linear_probe(learn.model, dls)['linear']
    assert learn.recorder.metric_names == ['epoch','train_loss','valid_loss','linear_probe','kd_loss','time']

def test_a_probe_of_an_ordinary_learner():
    dls = batches()
    learn = Learner(dls, backbone().append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(8,3)), loss_func=nn.CrossEntropyLoss(), metrics=LinearProbe(dls))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert column(learn, 'linear_probe')[0] == linear_probe(learn, dls)['linear']
    learn.get_preds()
    assert learn.metrics[0].value is None  # no regression, and no model that is kept

# --- with a head ---------------------------------------------------------------------------------------------------

def test_a_body_with_a_head_is_fine_tuned():
    learn,dls = distilled(),batches()
    learn.fit(1)
    student = body_learner(dls, learn, n_out=3, metrics=accuracy, loss_func=nn.CrossEntropyLoss())
    assert student.model[0] is learn.model and student.model[1].weight.shape == (3,8)
    student.freeze()
    assert not student.model[0][0][0].weight.requires_grad and student.model[1].weight.requires_grad
    with student.no_bar(), student.no_logging(): student.fine_tune(1)
    assert student.model(torch.randn(2,1,8,8)).shape == (2,3)

# --- refusals ------------------------------------------------------------------------------------------------------

def no_pool(pretrained=False): return nn.Sequential(nn.Conv2d(3,4,3), nn.ReLU())

class Maps(nn.Module):
    def forward(self, x): return {'features': x}

@pytest.mark.parametrize('kwargs,error,says', [
    (dict(loss=SoftTarget), ValueError, 'The loss SoftTarget does not compare activations'),
    (dict(loss=[Cosine, Logits]), ValueError, 'The loss Logits does not compare activations'),
    (dict(loss=RKD(layers={'conv7': '3'})), ValueError, "Layer 'conv7' of the body"),
    (dict(loss=RKD(layers={'3': 'conv7'})), ValueError, "Layer 'conv7' of the teacher"),
    (dict(body=no_pool), ValueError, 'no_pool has no pooling layer'),
    (dict(body=3), TypeError, 'A body is'),
    (dict(body='resnet_of_nobody'), ValueError, "timm has no model 'resnet_of_nobody'"),
    (dict(body=Maps()), TypeError, 'The body returns a dict'),
    (dict(body=nn.Linear(9,2)), ValueError, 'The body cannot run'),
    (dict(teacher=nn.Linear(9,2)), ValueError, 'The teacher cannot run'),
    (dict(teacher=resnet18), TypeError, 'makes a model: call it'),
    (dict(teacher=lambda x: x), TypeError, 'A body learns from a module, got <lambda>'),
    (dict(teacher=EMATeacher()), ValueError, 'A body learns from a fixed teacher'),
    (dict(teacher=[backbone(), backbone()]), ValueError, 'A body learns from one teacher'),
    (dict(layers='last'), ValueError, "`layers` is"),
    (dict(layers={'conv7': '1'}), ValueError, "Layer 'conv7' of the body"),
    (dict(layers={'1': 'conv7'}), ValueError, "Layer 'conv7' of the teacher"),
    (dict(weight=0), ValueError, 'nothing is learned'),
])
def test_refused(kwargs, error, says):
    with pytest.raises(error, match=says): distilled(**kwargs)

def test_a_teacher_that_is_the_body():
    body = backbone()
    with pytest.raises(ValueError, match='The teacher is the body itself'): distilled(body=body, teacher=body)

def test_probes_need_labels():
    x = [(o,) for o in torch.randn(8,1,8,8)]
    dls = DataLoaders.from_dsets(x, x, bs=8, num_workers=0, device='cpu')
    with pytest.raises(ValueError, match='one class label for each item'): linear_probe(backbone(), dls)
    floats = DataLoaders.from_dsets([(o,torch.rand(2)) for o, in x], x, bs=8, num_workers=0, device='cpu')
    with pytest.raises(ValueError, match='one class label for each item'): linear_probe(backbone(), floats)
    with pytest.raises(TypeError, match='A probe needs a model'): linear_probe('resnet18', batches())
