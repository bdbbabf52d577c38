"What goes on around a batch: labels that are missing, other people's callbacks and fits, gradients that are cut"
import contextlib, copy, math, pickle, warnings
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader as TorchLoader, TensorDataset
from torch.utils.checkpoint import checkpoint
from functools import partial
from fastcore.basics import patch_to
from fastai.basics import Callback, CancelFitException, DataLoaders, Learner, SGD
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.callback.schedule import SchedCos, SchedLin
from fastai.callback.tracker import TerminateOnNaNCallback
from fastkd.all import *
from conftest import hooks, learner, same, weights
from test_kinds_axes import KD, by_hand, data, draw, kd_loss

x,y = draw(32,5),draw(32, classes=4)
def lin(seed=2):
    torch.manual_seed(seed)
    return nn.Linear(5,4)
def row(learn): return dict(zip(list(learn.recorder.metric_names)[1:], learn.recorder.values[-1]))
def kl(s, t, x, T=5.): return by_hand(s(x).detach(), t(x).detach(), 1, T)

# batches without labels

@pytest.mark.parametrize('label_weight', [None, 0, 1])
@pytest.mark.parametrize('loss_func', [nn.CrossEntropyLoss(), F.cross_entropy])
def test_batches_without_labels_train_on_the_terms(label_weight, loss_func):
    "A step is the gradient of weight times the divergence"
    s,t = lin(),lin(3)
    right = copy.deepcopy(s)
    for i in range(4):
        z,w = right(x[8*i:8*i+8]),t(x[8*i:8*i+8]).detach()
        loss = .7*25*F.kl_div((z/5).log_softmax(1), (w/5).softmax(1), reduction='batchmean')
        g = torch.autograd.grad(loss, right.parameters())
        with torch.no_grad(): [p.sub_(.1*o) for p,o in zip(right.parameters(), g)]
    kd = KD(t, SoftTarget, weight=.7, label_weight=label_weight)
    learner(data(x), s, loss_func=loss_func).fit(1, .1, cbs=kd)
    assert all(torch.allclose(a, b, atol=1e-6) for a,b in zip(s.parameters(), right.parameters()))
    assert len(kd.curves['train']['kd_loss']) == 4 and all(map(math.isnan, kd.curves['train']['label_loss']))

class Mixed(Callback):
    "Every other batch has no labels"
    def before_batch(self):
        if self.training and self.iter % 2: self.learn.yb = ()

@pytest.mark.parametrize('cbs', [[], [GradientAccumulation(8)], [GradientClip(.1)], [TerminateOnNaNCallback()]])
@pytest.mark.parametrize('loss,names', [(SoftTarget, ()), (FitNet, ('0','0')), ([SoftTarget,Cosine], ('0','0'))])
def test_labels_that_come_and_go(cbs, loss, names):
    s,t = nn.Sequential(lin()),nn.Sequential(lin(3))
    before = weights(s)
    kd = KD(t, loss, *names)
    learn = learner(data(x, y), s, loss_func=F.cross_entropy)
    learn.fit(1, .01, cbs=[Mixed(), kd, *cbs])
    assert not same(before, weights(s)) and math.isfinite(learn.recorder.values[-1][0])
    assert [math.isnan(v) for v in kd.curves['train']['label_loss']] == [False,True,False,True]
    assert all(math.isfinite(v) for c in set(kd.curves['train']) - {'label_loss'} for v in kd.curves['train'][c])

def test_a_fit_without_labels_and_without_terms_learns_nothing_as_ever():
    s = lin()
    before = weights(s)
    learner(data(x), s, loss_func=F.cross_entropy).fit(1, .1, cbs=KD(lin(3), SoftTarget, weight=0))
    assert same(before, weights(s))

def test_lr_find_without_labels():
    learn = learner(data(x), lin(), loss_func=F.cross_entropy, cbs=KD(lin(3), SoftTarget))
    learn.lr_find(num_it=6, show_plot=False)
    assert all(map(math.isfinite, learn.recorder.losses)) and len(learn.recorder.losses) >= 6

# other fits

class OwnFit(Learner):
    "A fit of its own, which does not call fastai's"
    def fit(self, n_epoch, lr=None, wd=None, cbs=None, reset_opt=False, start_epoch=0):
        with self.added_cbs(cbs):
            self.create_opt()
            self.opt.set_hypers(lr=self.lr if lr is None else lr)
            self.n_epoch = n_epoch
            self._with_events(self._do_fit, 'fit', CancelFitException, self._end_cleanup)

class AroundFit(Learner):
    "A fit of its own around fastai's"
    def fit(self, *args, **kwargs): return super().fit(*args, **kwargs)

def silent(cls, *args, **kwargs):
    learn = cls(*args, opt_func=SGD, lr=.1, wd=0., **kwargs)
    learn.remove_cb(learn.progress)
    learn.logger = lambda *args: None
    return learn

@pytest.mark.parametrize('cls', [Learner, OwnFit, AroundFit])
@pytest.mark.parametrize('own', [False,True])
def test_a_learner_with_a_fit_of_its_own_distils(cls, own):
    s,t = lin(),lin(3)
    right = kl(s, t, x[:8])
    kd = KD(t, SoftTarget)
    learn = silent(cls, data(x, y), s, F.cross_entropy, cbs=[kd] if own else [])
    for _ in range(2):
        learn.fit(1, 0., cbs=[] if own else kd)
        assert kd.curves['train']['kd_loss'][0] == pytest.approx(right, rel=1e-4) and 'kd_loss' in list(learn.recorder.metric_names)
        assert kd.session is None and not hooks(s, t) and len(learn.metrics) == 0

@contextlib.contextmanager
def fit_kept():
    fit,export,orig = Learner.fit,Learner.export,getattr(Learner, '_orig_fit', None)
    try: yield
    finally:
        Learner.fit,Learner.export = fit,export
        if orig is not None: Learner._orig_fit = orig
        elif hasattr(Learner, '_orig_fit'): del Learner._orig_fit

def patched_with_orig():
    @patch_to(Learner)
    def fit(self, n_epoch, lr=None, wd=None, cbs=None, reset_opt=False, start_epoch=0): return self._orig_fit(n_epoch, lr, wd, cbs, reset_opt, start_epoch)
def patched_by_hand():
    old = Learner.fit
    def fit(self, *args, **kwargs): return old(self, *args, **kwargs)
    Learner.fit = fit
def patched_to_fastais():
    "Somebody puts fastai's own back"
    f = Learner.fit
    while hasattr(f, '__wrapped__'): f = f.__wrapped__
    Learner.fit = f

@pytest.mark.parametrize('how', [patched_with_orig, patched_by_hand, patched_to_fastais])
def test_a_later_patch_of_fit(how):
    s,t = lin(),lin(3)
    right = kl(s, t, x[:8])
    with fit_kept():
        how()
        kd = KD(t, SoftTarget)
        learn = learner(data(x, y), s, loss_func=F.cross_entropy)
        learn.fit(1, 0., cbs=kd)
        assert kd.curves['train']['kd_loss'][0] == pytest.approx(right, rel=1e-4) and 'kd_loss' in list(learn.recorder.metric_names)
        assert kd.session is None and not learn.metrics

@pytest.mark.parametrize('how', [pickle.dumps, lambda kd: pickle.dumps(copy.copy(kd)), lambda kd: pickle.dumps([kd])])
def test_a_callback_that_was_pickled_distils(how):
    t = lin(3)
    for kd in (KD(t, SoftTarget(T=3)), KD([t, lin(4)], [SoftTarget, Logits])):
        back = pickle.loads(how(kd))
        back = back[0] if isinstance(back, list) else back
        a,b = (learner(data(x, y), lin(), loss_func=F.cross_entropy) for _ in range(2))
        a.fit(1, .1, cbs=kd); b.fit(1, .1, cbs=back)
        assert same(weights(a.model), weights(b.model)) and kd.curves['steps'] == back.curves['steps'] == [4]
        pickle.loads(how(kd))  # after a fit too

@pytest.mark.parametrize('fit', [lambda l, kd: l.fit(2, .01, cbs=kd), lambda l, kd: l.fit_one_cycle(2, .01, cbs=kd), lambda l, kd: l.fit_flat_cos(2, .01, cbs=kd), lambda l, kd: l.fit_sgdr(1, 2, .01, cbs=kd),
    lambda l, kd: l.fine_tune(1, .01, cbs=kd), lambda l, kd: l.fit(3, .01, cbs=kd, start_epoch=1), lambda l, kd: l.fit_one_cycle(3, .01, cbs=kd, start_epoch=1)],
    ids=['fit','one_cycle','flat_cos','sgdr','fine_tune','start_epoch','one_cycle_start_epoch'])
@pytest.mark.parametrize('loss,names', [(SoftTarget, ()), (FitNet, ('0','0'))])
def test_every_way_to_fit_has_a_value_for_each_batch_trained(fit, loss, names):
    t,steps = nn.Sequential(lin(3)),[0]
    class Count(Callback):
        order = -100
        def after_step(self): steps[0] += 1
    kd,s = KD(t, loss, *names),nn.Sequential(lin())
    learn = learner(data(x, y), s, loss_func=F.cross_entropy, cbs=Count(), splitter=lambda m: [[p] for p in m.parameters()])
    fit(learn, kd)
    assert all(map(math.isfinite, kd.curves['train']['kd_loss'])) and len(kd.curves['train']['kd_loss']) in (steps[0], steps[0]//2) and kd.curves['steps'][-1] == len(kd.curves['train']['kd_loss'])
    assert row(learn)['kd_loss'] == pytest.approx(np.mean(kd.curves['train']['kd_loss'][-4:]), rel=1e-5)
    assert not learn.metrics and not hooks(s, t) and len(learn.opt.param_lists.concat()) == 2

@pytest.mark.parametrize('silence', ['no_mbar','no_bar','no_logging'])
def test_a_fits_validation_is_the_students_however_it_is_shown(silence):
    s,t = lin(),lin(3)
    right = F.cross_entropy(s(x), y).item()
    learn = learner(data(x, y), s, loss_func=F.cross_entropy)
    kd = KD(t, SoftTarget, weight=.9)
    with getattr(learn, silence)(): learn.fit(1, 0., cbs=kd)
    assert row(learn)['valid_loss'] == pytest.approx(right, rel=1e-5) and row(learn)['kd_loss'] == pytest.approx(np.mean(kd.curves['train']['kd_loss']), rel=1e-5)

class Counting(nn.Module):
    def __init__(self): super().__init__(); self.m,self.n = lin(3),0
    def forward(self, x): self.n += 1; return self.m(x)

class Inside(Callback):
    "Does `what` once, at an event of a fit"
    def __init__(self, what, at, order): self.what,self.at,self.order,self.done = what,at,order,False
    def __call__(self, name):
        if name != self.at or self.done or (not self.learn.training and name != 'after_epoch') or (name.endswith('batch') and self.learn.iter != 1): return
        self.done = True
        learn = self.learn
        kept = {k: getattr(learn, k) for k in ('xb','yb','pred','loss','loss_grad','dl','iter','n_iter','epoch','n_epoch','pct_train','train_iter','training') if hasattr(learn, k)}
        mode = learn.model.training
        with torch.random.fork_rng(): self.what(learn)  # a loader draws a number, from which a loss's parameters would start
        for k,v in kept.items():
            setattr(learn, k, v)
        learn.model.train(mode)

@pytest.mark.parametrize('what', [lambda l: l.get_preds(), lambda l: l.get_preds(with_loss=True), lambda l: l.validate(), lambda l: l.get_preds(dl=l.dls.train)], ids=['get_preds','with_loss','validate','of_train'])
@pytest.mark.parametrize('at,order', [('after_loss',60), ('before_step',60), ('after_step',60), ('after_batch',60), ('after_train',70), ('after_epoch',70)])
def test_a_foreign_validation_inside_a_fit(what, at, order):
    "It runs no teacher, and the fit trains as without it"
    def fit(*cbs):
        t = Counting()
        learn,kd = learner(data(x, y), lin(), loss_func=F.cross_entropy),KD(t, SoftTarget)
        learn.fit(2, .1, cbs=[kd, *cbs])
        return learn,kd,t
    (a,ka,ta),(b,kb,tb) = fit(),fit(Inside(what, at, order))
    assert tb.n == ta.n == 8
    assert ka.curves['train'] == kb.curves['train'] and same(weights(a.model), weights(b.model))
    assert not b.metrics and not hooks(b.model, tb)

def test_nested_learners():
    "A fit of another learner, distilled too, inside a fit"
    def inner(learn):
        kd = KD(lin(5), SoftTarget)
        learner(data(x, y), lin(6), loss_func=F.cross_entropy).fit(1, .1, cbs=kd)
        assert len(kd.curves['train']['kd_loss']) == 4
    class Nest(Callback):
        def after_batch(self):
            if self.training: inner(self.learn)
    a,b = (learner(data(x, y), lin(), loss_func=F.cross_entropy) for _ in range(2))
    ka,kb = KD(lin(3), SoftTarget),KD(lin(3), SoftTarget)
    a.fit(1, .1, cbs=ka); b.fit(1, .1, cbs=[kb, Nest()])
    assert same(weights(a.model), weights(b.model)) and ka.curves['train']['kd_loss'] == kb.curves['train']['kd_loss']

def test_the_teachers_learner_fits_in_between():
    "A learner that teaches may itself be trained with a teacher, and by the same callback class in its own `cbs`"
    teacher = learner(data(x, y), lin(3), loss_func=F.cross_entropy, cbs=KD(lin(4), SoftTarget))
    s = learner(data(x, y), lin(), loss_func=F.cross_entropy)
    kd = KD(teacher, SoftTarget)
    teacher.fit(1, .1)
    right = kl(s.model, teacher.model, x[:8])
    s.fit(1, 0., cbs=kd)
    assert kd.curves['train']['kd_loss'][0] == pytest.approx(right, rel=1e-4)

# gradients

class Ck(nn.Module):
    def __init__(self, re=None, no_grad=False): super().__init__(); torch.manual_seed(1); self.a,self.b,self.fc,self.re,self.no = nn.Linear(5,5),nn.Linear(5,5),nn.Linear(5,4),re,no_grad
    def forward(self, x):
        f = lambda z: self.b(z).relu()
        z = self.a(x)
        if self.no:
            with torch.no_grad(): z = f(z)
            return self.fc(z)
        return self.fc(f(z) if self.re is None else checkpoint(f, z, use_reentrant=self.re))

@pytest.mark.parametrize('loss', [FitNet, Cosine, VID, Similarity])
def test_layers_without_a_graph_are_refused(loss):
    t = Ck()
    t.b.weight.data *= 3
    for s in (Ck(True), Ck(no_grad=True)):
        before = weights(s)
        with pytest.raises(ValueError, match="'b' of the student.*(gradients turned off|use_reentrant)"):
            learner(data(x, y), s, loss_func=F.cross_entropy).fit(1, .1, cbs=KD(t, loss, 'b', 'b'))
        assert same(before, weights(s)) and not hooks(s, t)
    for s in (Ck(), Ck(False)): # the same weights, a graph
        learner(data(x, y), s, loss_func=F.cross_entropy).fit(1, .1, cbs=KD(t, loss, 'b', 'b', weight=1., label_weight=1.))
        plain = Ck()
        learner(data(x, y), plain, loss_func=F.cross_entropy).fit(1, .1)
        assert not torch.equal(plain.a.weight, s.a.weight)

def test_a_frozen_body_is_warned_about():
    s,t = Ck(),Ck()
    for p in (*s.a.parameters(), *s.b.parameters()): p.requires_grad_(False)
    t.b.weight.data *= 3
    with pytest.warns(UserWarning, match="Nothing before 'b' of the student is trained"): kd_loss(data(x, y), s, F.cross_entropy, t, FitNet, activations_student='b', activations_teacher='b')

def test_a_fit_in_which_nothing_is_learned():
    s,t = Ck(),Ck()
    for p in s.parameters(): p.requires_grad_(False)
    s.fc.weight.requires_grad_(True)
    with pytest.raises(ValueError, match='Nothing of the student can be learned'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learner(data(x, y), s, loss_func=F.cross_entropy).fit(1, .1, cbs=KD(t, Similarity, 'b', 'b', label_weight=0))

@pytest.mark.parametrize('loss', [SoftTarget, FitNet, Attention])
def test_in_place_dropout_after_a_frozen_part(loss):
    class D(nn.Module):
        def __init__(self): super().__init__(); self.a,self.d,self.fc = nn.Conv2d(2,3,1),nn.Dropout(.5, inplace=True),nn.Linear(3,4)
        def forward(self, x): return self.fc(self.d(self.a(x)).mean((2,3)))
    class Frozen(Callback):
        def before_train(self): self.model.a.eval()
    names = () if loss is SoftTarget else ('a','a')
    xs,ys = draw(32,2,6,5),draw(32, classes=4)
    torch.manual_seed(3)
    s,t = D(),D()
    right = None if loss is SoftTarget else float(loss()(fm_s={'a': s.a(xs[:8])}, fm_t={'a': t.a(xs[:8])}))
    kd = KD(t, loss, *names)
    learner(data(xs, ys), s, loss_func=F.cross_entropy).fit(3, 0., cbs=[kd, Frozen()])
    assert len(kd.curves['train']['kd_loss']) == 12
    if right is not None: assert kd.curves['train']['kd_loss'][::4] == pytest.approx([right]*3, rel=1e-4)  # before the dropout

class Norms(Callback):
    "The norms of the gradients as the optimizer gets them"
    order = 2000
    def __init__(self): self.norms = []
    def before_step(self):
        ps = list(self.opt.all_params())
        mine = {id(p) for p in self.model.parameters()}
        norm = lambda ps: torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in ps])).item()
        self.norms.append([norm([p for p,*_ in ps if id(p) in mine]), norm([p for p,*_ in ps if id(p) not in mine] or [p for p,*_ in ps])])

@pytest.mark.parametrize('loss', [FitNet, VID, Cosine])
def test_gradient_clipping_reaches_the_losses_parameters(loss):
    s,t = nn.Sequential(nn.Linear(5,6), nn.ReLU(), nn.Linear(6,4)),nn.Sequential(nn.Linear(5,8), nn.ReLU(), nn.Linear(8,4))
    n = Norms()
    learner(data(x, y), s, loss_func=F.cross_entropy).fit(1, .1, cbs=[KD(t, loss, '0', '0', weight=1000., label_weight=1.), GradientClip(.01), n])
    assert len(n.norms) == 4 and all(o == pytest.approx(.01, rel=1e-3) for both in n.norms for o in both)

# losses of several numbers

class Hardest(Callback):
    "The mean of the hardest four"
    def __init__(self, order=0): self.order = order
    def after_loss(self):
        if self.training: self.learn.loss_grad = self.learn.loss_grad.topk(4).values.mean()

each = nn.CrossEntropyLoss(reduction='none')
@pytest.mark.parametrize('weight,label_weight', [(0,None), (.5,None), (.5,1.), (1.,0)])
@pytest.mark.parametrize('order', [0,5])
def test_a_loss_for_each_item(weight, label_weight, order):
    s,t = lin(),lin(3)
    right = copy.deepcopy(s)
    for i in range(4):
        xb,yb = x[8*i:8*i+8],y[8*i:8*i+8]
        z,w = right(xb),t(xb).detach()
        term = 25*F.kl_div((z/5).log_softmax(1), (w/5).softmax(1), reduction='batchmean')
        a = 1-weight if label_weight is None else label_weight
        g = torch.autograd.grad(a*each(z, yb).topk(4).values.mean() + weight*term, right.parameters())
        with torch.no_grad(): [p.sub_(.1*o) for p,o in zip(right.parameters(), g)]
    learner(data(x, y), s, loss_func=each).fit(1, .1, cbs=[KD(t, SoftTarget, weight=weight, label_weight=label_weight), Hardest(order)])
    assert all(torch.allclose(a, b, atol=1e-5) for a,b in zip(s.parameters(), right.parameters()))

def test_weight_0_with_a_loss_for_each_item_is_the_plain_fit():
    a,b = lin(),lin()
    learner(data(x, y), a, loss_func=each).fit(2, .1, cbs=Hardest())
    learner(data(x, y), b, loss_func=each).fit(2, .1, cbs=[KD(lin(3), SoftTarget, weight=0), Hardest()])
    assert same(weights(a), weights(b))

@pytest.mark.parametrize('shape', [(), (1,), (1,1)])
@pytest.mark.parametrize('label_weight', [None, 0, 1])
def test_a_loss_of_one_number_in_any_shape(shape, label_weight):
    def fit(lf):
        s,kd = lin(),KD(lin(3), SoftTarget, weight=.5, label_weight=label_weight)
        learn = learner(data(x, y), s, loss_func=lf)
        learn.fit(1, .1, cbs=kd)
        return weights(s),row(learn)
    (a,ra),(b,rb) = fit(F.cross_entropy),fit(lambda p, y: F.cross_entropy(p, y).reshape(shape))
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a) and {k: v for k,v in ra.items() if k != 'time'} == pytest.approx({k: v for k,v in rb.items() if k != 'time'}, rel=1e-5)

# what a batch is turned into

class ToFloat(Callback):
    order = 500
    def before_batch(self): self.learn.xb = tuple(o.float()/255 for o in self.xb)

@pytest.mark.parametrize('kwargs', [dict(loss=SoftTarget), dict(loss=Cosine), dict(loss=Cosine, activations_student='0', activations_teacher='0'), dict(loss=SoftTarget, inputs=lambda x: x-x.mean())])
def test_the_batch_is_seen_as_the_model_will_see_it(kwargs):
    raw = torch.randint(256, (32,5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    s,t = nn.Sequential(lin(), nn.ReLU(), nn.Linear(4,4)),nn.Sequential(lin(3), nn.ReLU(), nn.Linear(4,4))
    inputs = kwargs.get('inputs')
    xs = raw[:8].float()/255
    teacher_in = inputs(xs) if inputs else xs
    kd = KD(Teacher(t, inputs=inputs), **{k: v for k,v in kwargs.items() if k != 'inputs'})
    learner(data(raw, y), s, loss_func=F.cross_entropy).fit(1, 0., cbs=[ToFloat(), kd])
    got = kd.curves['train']['kd_loss'][0]
    if kwargs['loss'] is SoftTarget: assert got == pytest.approx(by_hand(s(xs), t(teacher_in), 1), rel=1e-4)
    else: assert any(got == pytest.approx((1-F.cosine_similarity(f(s), f(t), dim=1)).mean().item(), rel=1e-4) for f in (lambda m: m[0](xs), lambda m: m[1](m[0](xs))))

def test_the_loaders_of_pytorch():
    xs,ys = draw(32,3,16,16),draw(32, classes=4)
    dls = DataLoaders(*[TorchLoader(TensorDataset(xs, ys), 8) for _ in range(2)])
    cnn = lambda w: nn.Sequential(nn.Conv2d(3,w,3,2,1), nn.ReLU(), nn.Conv2d(w,w,3,2,1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(w,4))
    s,t = cnn(4),cnn(6)
    right = float(Attention()(fm_s={'a': s[:4](xs[:8])}, fm_t={'a': t[:4](xs[:8])}))
    kd = KD(t, Attention, '3', '3')
    learn = learner(dls, s, loss_func=nn.CrossEntropyLoss())
    learn.fit(1, 0., cbs=kd)
    assert kd.curves['train']['kd_loss'][0] == pytest.approx(right, rel=1e-4)
    assert kd.teacher_metrics()['loss'] == pytest.approx(F.cross_entropy(t.eval()(xs), ys).item(), rel=1e-4)
    assert kd.teacher_metrics(learn) == kd.teacher_metrics()

# settings

@pytest.mark.parametrize('kwargs,exc,match', [
    (dict(weight={}), TypeError, "`weight` is a number.*got \\{\\}"), (dict(weight=[None,.3]), TypeError, '`weight`'), (dict(weight='x'), ValueError, "'paper'.*got 'x'"),
    (dict(weight=[.1,.2,.3]), ValueError, '2 losses but 3 weights'), (dict(weight=[.3]), ValueError, '2 losses but 1 weights'), (dict(label_weight='x'), TypeError, "`label_weight` is a number, got 'x'"), (dict(weight=math.nan), ValueError, 'finite'),
    (dict(weight=-1), ValueError, 'non-negative'), (dict(label_weight=math.inf), ValueError, 'finite'), (dict(schedule=3), TypeError, 'function of training progress, got 3'),
    (dict(schedule='cos'), TypeError, "SchedCos\\(0, 1\\)"), (dict(schedule='lin'), TypeError, "SchedLin\\(0, 1\\)")])
def test_settings_that_make_no_sense_are_refused_at_once(kwargs, exc, match):
    with pytest.raises(exc, match=match): KD(lin(3), [SoftTarget,FitNet], '0', '0', **kwargs)

@pytest.mark.parametrize('weight', [np.array([.3,.2]), torch.tensor([.3,.2]), (.3,.2), [np.float32(.3),torch.tensor(.2)]])
def test_weights_of_any_kind(weight):
    s,t = nn.Sequential(lin()),nn.Sequential(lin(3))
    kd = KD(t, [SoftTarget,Logits], weight=weight)
    assert [o.weight for o in kd.objective.terms] == pytest.approx([.3,.2], rel=1e-6)
    learner(data(x, y), s, loss_func=F.cross_entropy).fit(1, 0., cbs=kd)

@pytest.mark.parametrize('weight', [np.float64(.4), torch.tensor(.4), np.array(.4)])
def test_a_number_of_any_kind(weight): assert [o.weight for o in KD(lin(3), [SoftTarget,Logits], weight=weight).objective.terms] == pytest.approx([.2,.2], rel=1e-6)

def test_a_schedule_of_any_kind():
    for schedule in (SchedCos(0, 1), lambda p: p, partial(pow, 2)):
        kd = KD(lin(3), SoftTarget, schedule=schedule)
        learner(data(x, y), lin(), loss_func=F.cross_entropy).fit(1, 0., cbs=kd) if schedule(0) <= 1 and schedule(1) <= 1 else None

@pytest.mark.parametrize('state', [{'other': 1}, {'losses': {}}, {'losses': {'kd_loss': {}}, 'opt': [], 'slow': None}, {'losses': {'soft_target_loss': {}}}, 5, 'x'])
def test_a_foreign_state_is_refused_with_a_sentence(state):
    kd = KD(nn.Sequential(nn.Linear(5,6), nn.Linear(6,4)), FitNet, '0', '0')
    learn = learner(data(x, y), nn.Sequential(lin()), loss_func=F.cross_entropy)
    with pytest.raises(ValueError, match='state'):
        kd.load_state_dict(state)
        learn.fit(1, cbs=kd)
    assert not hooks(learn.model) and not learn.metrics

# the first batches count for nothing

@pytest.mark.parametrize('schedule', [SchedLin(0, 1), lambda p: float(p > .5)])
@pytest.mark.parametrize('teacher,loss,names,match', [
    (lambda: nn.Sequential(nn.Linear(5,7)), SoftTarget, (), 'same classes'), (lambda: nn.Sequential(nn.Linear(5,4), nn.Flatten(0)), SoftTarget, (), 'same classes'),
    (lambda: nn.Sequential(lin()), Cosine, ('0','9'), "'9' of the teacher"), (lambda: nn.Sequential(lin()), Attention, ('0','0'), 'vectors'), (lambda: nn.Sequential(nn.Linear(5,4*3)), [Logits], (), 'same classes')])
def test_what_cannot_work_is_refused_though_the_first_weights_are_0(schedule, teacher, loss, names, match):
    s = nn.Sequential(lin())
    with pytest.raises(ValueError, match=match): learner(data(x, y), s, loss_func=F.cross_entropy).fit(1, .1, cbs=KD(teacher(), loss, *names, schedule=schedule))
    assert not hooks(s)

class TooMany:
    "More batches than its length says"
    def __init__(self): self.n_inp,self.dataset = 1,range(40)
    def __len__(self): return 3
    def __iter__(self): return iter([(x[:8], y[:8])]*5)

@pytest.mark.parametrize('where', ['T','schedule'])
def test_training_progress_ends_at_1(where):
    seen = []
    def f(p):
        seen.append(p)
        return 1 + 8*(1-p)**.5 if where == 'T' else .5 + .5*(1-p)**.5
    kd = KD(lin(3), SoftTarget(T=f) if where == 'T' else SoftTarget, **({} if where == 'T' else dict(schedule=f)))
    learn = learner(DataLoaders(TooMany(), TooMany()), lin(), loss_func=F.cross_entropy)
    learn.fit(1, .1, cbs=kd)
    assert max(seen) == 1 and len(kd.curves['train']['kd_loss']) == 5
