"How teachers run: whatever they are, they rest, say the same for the same input, and are left as they were found"
import copy, warnings
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
from functools import partial
from fastai.basics import Callback, CancelBatchException, CrossEntropyLossFlat, DataLoader, DataLoaders
from fastkd.all import *
from conftest import hooks, learner, same, weights
from test_kinds_axes import KD, by_hand, data, draw, kd_loss

x,y = draw(16,5),draw(16, classes=4)
modes = lambda m: [o.training for o in m.modules()]
no_global_hooks = lambda: not nn.modules.module._global_forward_pre_hooks and not nn.modules.module._global_forward_hooks

def student():
    torch.manual_seed(2)
    return nn.Linear(5,4)

class Net(nn.Module):
    "Dropout as a layer and as a function, and BatchNorm"
    def __init__(self): super().__init__(); torch.manual_seed(1); self.bn,self.d,self.fc = nn.BatchNorm1d(5),nn.Dropout(),nn.Linear(5,4)
    def forward(self, x): return F.dropout(self.fc(self.d(self.bn(x))), .5, self.training)

class Holder:
    "An object that is no module"
    def __init__(self, m): self.m = m
    def __call__(self, x): return self.m(x)
    def predict(self, x): return self.m(x)

ways = dict(module=lambda m: m, function=lambda m: lambda x: m(x), partial=lambda m: partial(lambda m, x: m(x), m), method=lambda m: m.forward, object=Holder, method_of_object=lambda m: Holder(m).predict,
    functional=lambda m: lambda x: torch.func.functional_call(m, dict(m.named_parameters()), (x,)), ensemble=lambda m: [lambda x: m(x), lambda x: m(x)], partial_of_method=lambda m: partial(m.forward))

@pytest.mark.parametrize('way', ways)
def test_every_kind_of_teacher_rests(way):
    t = Net()
    t.d.eval()
    before,was = weights(t),modes(t)
    right = by_hand(student()(x[:8]), copy.deepcopy(t).eval()(x[:8]), 1)
    assert kd_loss(data(x, y), student(), F.cross_entropy, ways[way](t), SoftTarget) == pytest.approx(right, rel=1e-4)
    assert same(before, weights(t)) and modes(t) == was and no_global_hooks() and not hooks(t)

@pytest.mark.parametrize('exc', [RuntimeError, KeyboardInterrupt])
def test_a_function_that_fails_leaves_its_modules_as_they_were(exc):
    t = Net()
    t.bn.eval()
    was = modes(t)
    def fails(x): t(x); raise exc('raised by a test')
    with pytest.raises(exc): kd_loss(data(x, y), student(), F.cross_entropy, fails, SoftTarget)
    assert modes(t) == was and no_global_hooks()

def test_a_module_that_student_and_function_share():
    "... trains in the student's forward and rests in the teacher's"
    class Shared(nn.Module):
        def __init__(self): super().__init__(); self.body,self.fc = nn.BatchNorm1d(5),student()
        def forward(self, x): return self.fc(self.body(x))
    s,head = Shared(),nn.Linear(5,4)
    kd_loss(data(x, y), s, F.cross_entropy, lambda x: head(s.body(x)), SoftTarget)
    assert s.body.num_batches_tracked == 2

@pytest.mark.parametrize('make', [torch.jit.script, lambda m: torch.jit.trace(m.eval(), x[:8]), lambda m: torch.jit.freeze(torch.jit.trace(m.eval(), x[:8])),
    lambda m: torch.jit.optimize_for_inference(torch.jit.script(m.eval())), lambda m: torch.compile(m, backend='eager'), lambda m: torch.export.export(m.eval(), (x[:8],)).module()])
def test_compiled_and_exported_teachers(make):
    right = by_hand(student()(x[:8]), Net().eval()(x[:8]), 1)
    assert kd_loss(data(x, y), student(), F.cross_entropy, make(Net()), SoftTarget) == pytest.approx(right, rel=1e-4)

class Inference(nn.Module):
    def __init__(self): super().__init__(); self.m = Net()
    @torch.inference_mode()
    def forward(self, x): return self.m(x)

class Grad(nn.Module):
    "Turns gradients on in its forward"
    def __init__(self): super().__init__(); self.m = Net()
    def forward(self, x):
        with torch.enable_grad(): return self.m(x)

def mse(pred, teacher_pred): return F.mse_loss(pred, teacher_pred)
def of_features(fm_s, fm_t): return F.mse_loss(*map(lambda d: next(iter(d.values())), (fm_s, fm_t)))

@pytest.mark.parametrize('make', [Inference, Grad])
@pytest.mark.parametrize('loss', [SoftTarget, Logits, mse, FitNet, of_features])
def test_no_gradient_reaches_the_teacher(make, loss):
    class S(nn.Module):
        def __init__(self): super().__init__(); self.fc = student()
        def forward(self, x): return self.fc(x)
    t,s,plain = make(),S(),S()
    named = dict(activations_student='fc', activations_teacher='m.fc') if loss in (FitNet, of_features) else {}
    kd_loss(data(x, y), s, F.cross_entropy, t, loss, **named)
    assert all(p.grad is None for p in t.parameters())
    usual = {**named, **({'activations_teacher': 'fc'} if named else {})}
    assert kd_loss(data(x, y), S(), F.cross_entropy, t, loss, **named) == pytest.approx(kd_loss(data(x, y), plain, F.cross_entropy, Net(), loss, **usual), rel=1e-5)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize('wrap', [lambda m: m, lambda m: [m, Net()]], ids=['alone','with_another'])
def test_a_teacher_of_another_dtype(dtype, wrap):
    right = by_hand(student()(x[:8]), Net().eval()(x[:8]), 1)
    t = Net().to(dtype)
    assert kd_loss(data(x, y), student(), F.cross_entropy, wrap(t), SoftTarget) == pytest.approx(right, rel=1e-5 if dtype == torch.float64 else 1e-2)
    assert all(p.dtype == dtype for p in t.parameters())

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_activations_of_another_dtype(dtype):
    class S(nn.Module):
        def __init__(self): super().__init__(); self.fc = student()
        def forward(self, x): return self.fc(x)
    right = F.mse_loss(S()(x[:8]), Net().eval()(x[:8])).item()
    assert kd_loss(data(x, y), S(), F.cross_entropy, Net().to(dtype), FitNet, activations_student='fc', activations_teacher='fc') == pytest.approx(right, rel=1e-2)

def test_a_teacher_on_meta():
    with pytest.raises(ValueError, match="'meta'.*no weights.*load"): kd_loss(data(x, y), student(), F.cross_entropy, Net().to('meta'), SoftTarget)

# what scikit-learn and NumPy give

@pytest.mark.parametrize('cast', [lambda z: z.double(), lambda z: z.detach().numpy(), lambda z: z.detach().double().numpy(), lambda z: np.asfortranarray(z.detach().numpy()), lambda z: z.detach().numpy()[::-1][::-1]])
def test_arrays_and_doubles(cast):
    t = Net().eval()
    right = by_hand(student()(x[:8]), t(x[:8]), 1)
    s = student()
    assert kd_loss(data(x, y), s, F.cross_entropy, lambda x: cast(t(x)), SoftTarget) == pytest.approx(right, rel=1e-4)

def test_a_model_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    sk = LogisticRegression().fit(x.numpy(), y.numpy())
    ask = lambda x: sk.predict_proba(x.numpy())
    right = by_hand(student()(x[:8]), torch.from_numpy(sk.predict_log_proba(x[:8].numpy())), 1)
    kd = KD(Teacher(ask, probs=True), SoftTarget)
    learn = learner(data(x, y), student(), loss_func=F.cross_entropy)
    before = weights(learn.model)
    learn.fit(1, cbs=kd)
    assert kd.curves['train']['kd_loss'][0] == pytest.approx(right, rel=1e-4) and not same(before, weights(learn.model))
    assert kd.teacher_metrics()['loss'] == pytest.approx(F.nll_loss(torch.from_numpy(sk.predict_log_proba(x.numpy())), y).item(), rel=1e-4)
    with pytest.warns(UserWarning, match='probabilities.*`Teacher\\(model, probs=True\\)`'): kd_loss(data(x, y), student(), F.cross_entropy, ask, SoftTarget)

# probabilities

@pytest.mark.parametrize('loss_func,target,loss,act', [(F.cross_entropy, y, SoftTarget, lambda z: z.softmax(-1)), (F.cross_entropy, y, DIST, lambda z: z.softmax(-1)),
    (nn.BCEWithLogitsLoss(), (draw(16,4) > 0).float(), BinarySoftTarget, torch.sigmoid)])
@pytest.mark.parametrize('n', [1,2])
def test_probabilities_say_the_same_as_their_logits(loss_func, target, loss, act, n):
    ts = [Net().eval() for _ in range(n)]
    for i,t in enumerate(ts): t.fc.weight.data *= 1+i
    f = lambda t: lambda x: act(t(x))
    dls = data(x, target)
    assert kd_loss(dls, student(), loss_func, Teacher(list(map(f, ts)), probs=True), loss) == pytest.approx(kd_loss(dls, student(), loss_func, ts, loss), rel=1e-4)

def test_probabilities_of_maps():
    t,s = nn.Conv2d(2,4,1),nn.Conv2d(2,4,1)
    xm,ym = draw(16,2,6,5),draw(16,6,5, classes=4)
    right = by_hand(s(xm[:8]), t(xm[:8]), 1)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert kd_loss(data(xm, ym), s, nn.CrossEntropyLoss(), Teacher(lambda x: t(x).softmax(1), probs=True), SoftTarget, label_weight=1.) == pytest.approx(right, rel=1e-4)
    with pytest.warns(UserWarning, match='probs=True'): kd_loss(data(xm, ym), s, nn.CrossEntropyLoss(), lambda x: t(x).softmax(1), SoftTarget)

def test_certain_probabilities_are_finite():
    hard = lambda x: F.one_hot(x.argmax(1) % 4, 4).float()
    assert np.isfinite(kd_loss(data(x, y), student(), F.cross_entropy, Teacher(hard, probs=True), SoftTarget))

# what is no teacher

@pytest.mark.parametrize('make,match', [
    (lambda: [Teacher(Net()), Net()], 'list of teachers holds models.*is a Teacher'), (lambda: [EMATeacher(.9), Net()], 'is a EMATeacher'),
    (lambda: [PeerTeacher(learner(data(x, y), student(), loss_func=F.cross_entropy))], 'is a PeerTeacher'), (lambda: Teacher(Teacher(Net())), 'is a Teacher'),
    (lambda: [[Net()], Net()], 'a list of these, got list'), (lambda: Net, 'the class Net'), (lambda: 'teacher.pkl', "got str \\('teacher.pkl'\\). Load it first, `load_learner"),
    (lambda: Net().state_dict(), "^.{0,300}`model.load_state_dict\\(weights\\)`.$"), (lambda: None, 'got NoneType'), (lambda: [], 'empty')])
def test_what_cannot_teach_is_refused_at_once(make, match):
    with pytest.raises(TypeError, match=match): KD(make(), SoftTarget)

def test_functions_that_make_models():
    import torchvision, timm
    from fastai.vision.models import xresnet
    for f in (torchvision.models.resnet34, timm.create_model, xresnet.xresnet18, timm.models.resnet18):
        with pytest.raises(TypeError, match=f'{f.__name__}.*makes a model: call it'): KD(f, SoftTarget)
    with pytest.raises(TypeError, match='makes a model, so call it'): kd_loss(data(x, y), student(), F.cross_entropy, lambda _: Net(), SoftTarget)

def test_images_of_another_size_than_the_configuration_names():
    timm = pytest.importorskip('timm')
    teacher,images = timm.create_model('vit_tiny_patch16_224', num_classes=4, depth=1),torch.randn(16,3,32,32)
    def small(): return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12,4))
    for kd in (KD(teacher, SoftTarget), KD(teacher, Similarity, ['0'], ['blocks']), KD(teacher, FitNet)):
        learn = learner(data(images, y), small(), loss_func=F.cross_entropy)
        with pytest.raises(ValueError, match=r"32 × 32 pixels .*names 224 × 224. Give it those: `Teacher\(model, inputs="): learn.fit(1, cbs=kd)
    resize = Teacher(teacher, inputs=lambda x: F.interpolate(x, size=(224,224), mode='bilinear'))
    assert np.isfinite(kd_loss(data(images, y), small(), F.cross_entropy, resize, SoftTarget))

def test_other_errors_of_a_model_with_a_configuration_stay_what_they_are():
    timm = pytest.importorskip('timm')
    model = timm.create_model('resnet18', num_classes=4)  # takes any size
    with pytest.raises(RuntimeError, match='3 channels'): Teacher(model).run(torch.randn(2,1,64,64))
    class Full(nn.Module):
        pretrained_cfg = dict(input_size=(3,224,224))
        def __init__(self, error): super().__init__(); self.error = error
        def forward(self, x): raise self.error
    for error in (torch.OutOfMemoryError('full'), CancelBatchException(), KeyError('x')):
        with pytest.raises(type(error)): Teacher(Full(error)).run(torch.randn(2,3,64,64))

# early exits, hidden states

def teacher_activations(t, layer, xs, loss=None):
    "What a loss on activations gets of the teacher in each batch"
    got = []
    def watch(fm_s, fm_t): got.append(next(iter(fm_t.values())).clone()); return next(iter(fm_s.values())).square().mean()
    dls = DataLoaders(*[DataLoader([(x, torch.randint(4, (len(x),))) for x in xs], bs=None, num_workers=0)]*2)
    learner(dls, copy.deepcopy(t), loss_func=F.cross_entropy).fit(1, 0., cbs=KD(t, watch, layer, layer))
    return got

def by_itself(t, layer, xs):
    "The same of a teacher that runs alone, its last call in each batch"
    t,got = copy.deepcopy(t).eval(),[]
    h = t.get_submodule(layer).register_forward_hook(lambda m, i, o: got.__setitem__(-1, o.detach().clone()))
    for b in xs:
        got.append(None)
        with torch.no_grad(): t(b)
    h.remove()
    return got

class Pieces(nn.Module):
    "Runs its encoder once for each four columns"
    def __init__(self): super().__init__(); self.enc,self.fc = nn.Linear(4,6),nn.Linear(6,4)
    def forward(self, x): return self.fc(torch.stack([self.enc(c) for c in x.split(4,1)],1).mean(1))

class ByValue(nn.Module):
    "Runs its layer more often for some inputs, whose shape is the same"
    def __init__(self): super().__init__(); self.enc,self.fc = nn.Linear(4,4),nn.Linear(4,4)
    def forward(self, x):
        x = self.enc(x)
        return self.fc(self.enc(x) if x.mean() > 0 else x)

class Attribute(nn.Module):
    "A hidden state in an attribute"
    def __init__(self): super().__init__(); self.enc,self.fc,self.h = nn.Linear(4,4),nn.Linear(4,4),0.
    def forward(self, x):
        z = self.enc(x + self.h)
        self.h = self.fc(z).mean(0).detach()
        return self.fc(z)

@pytest.mark.parametrize('make,xs', [(Pieces, [(8,4),(8,8),(8,4),(8,12)]), (Attribute, [(8,4)]*4)])
def test_the_last_call_counts_whatever_came_before(make, xs):
    torch.manual_seed(1)
    t,xs = make(),[draw(*s)+i for i,s in enumerate(xs)]
    for right,got in zip(by_itself(t, 'enc', xs), teacher_activations(t, 'enc', xs), strict=True): assert torch.allclose(got, right, atol=1e-6)

def test_a_recurrent_teacher_keeps_its_hidden_state():
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
    from fastai.text.models.core import get_language_model
    from fastai.callback.rnn import ModelResetter, RNNCallback
    def lm(seed): torch.manual_seed(seed); return get_language_model(AWD_LSTM, 20, config={**awd_lstm_lm_config, 'emb_sz': 8, 'n_hid': 12, 'n_layers': 2})
    q = torch.randint(20, (4,29), generator=torch.Generator().manual_seed(0))
    b = [(q[:,i*7:i*7+7], q[:,i*7+1:i*7+8]) for i in range(4)]
    dls = DataLoaders(*[DataLoader(b, bs=None, num_workers=0)]*2)
    ref,want,got = lm(1).eval(),[],[]
    ref.reset()
    ref[0].rnns[0].register_forward_hook(lambda m, i, o: want.append(o[0].detach().clone()))
    with torch.no_grad(): [ref(o) for o,_ in b]
    def watch(fm_s, fm_t): got.append(next(iter(fm_t.values())).clone()); return next(iter(fm_s.values())).mean()
    learner(dls, lm(2), loss_func=CrossEntropyLossFlat(), cbs=[ModelResetter, RNNCallback()]).fit(1, cbs=KD(lm(1), watch, '0.rnns.0', '0.rnns.0'))
    assert len(got) == 4
    for g,w in zip(got, want): assert torch.allclose(g.movedim(1, -1), w, atol=1e-5)  # a loss gets the channels first

# inputs

class InPlace(nn.Module):
    def __init__(self): super().__init__(); self.fc,self.seen = student(),[]
    def forward(self, x): self.seen.append(x.clone()); return self.fc(x.sub_(2.).mul_(3.))

def test_neither_sees_what_the_other_changes():
    s,t,xs = InPlace(),InPlace(),draw(16,5)
    learner(data(xs.clone(), y), s, loss_func=F.cross_entropy).fit(1, 0., cbs=KD(t, SoftTarget))
    assert torch.allclose(torch.cat(t.seen), xs) and torch.allclose(torch.cat(s.seen)[:16], xs)

def test_inputs_in_dictionaries_that_are_changed_in_place():
    class D(nn.Module):
        def __init__(self): super().__init__(); self.fc,self.seen = student(),[]
        def forward(self, b): self.seen.append(b['v'].clone()); return self.fc(b['v'].add_(1.))
    class Items:
        def __len__(self): return 16
        def __getitem__(self, i): return {'v': x[i].clone()},y[i]
    dls = DataLoaders(*[DataLoader(Items(), bs=8, num_workers=0) for _ in range(2)], device='cpu')
    s,t = D(),D()
    learner(dls, s, loss_func=F.cross_entropy).fit(1, 0., cbs=KD(t, SoftTarget))
    assert torch.equal(torch.cat(t.seen), x) and torch.equal(torch.cat(s.seen)[:16], x)

def test_the_teacher_runs_before_the_student():
    "... so a callback that changes the input after the prediction changes nothing of it"
    class Zero(Callback):
        def after_pred(self): self.learn.xb = (self.xb[0]*0,)
    t = Net().eval()
    assert kd_loss(data(x, y), student(), F.cross_entropy, t, SoftTarget, cbs=[Zero()]) == pytest.approx(by_hand(student()(x[:8]), t(x[:8]), 1), rel=1e-4)
