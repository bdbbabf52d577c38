"Where the classes are, which label is left out, which output is meant: each value is computed by hand beside the fit's"
import functools, dataclasses
import pytest, torch
import torch.nn.functional as F
from torch import nn
from functools import partial
from collections import namedtuple
from fastai.basics import DataLoader, DataLoaders, CrossEntropyLossFlat, BCEWithLogitsLossFlat, MSELossFlat, L1LossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.losses import DiceLoss
from fastai.callback.mixup import MixUp, CutMix
from fastkd.all import *
from conftest import hooks, learner

KD = KnowledgeDistillationCallback

def data(*ts, n_inp=1, bs=8):
    "Batches of the rows of `ts`, the first `n_inp` of which are inputs"
    dls = DataLoaders(*[DataLoader(list(zip(*ts)), bs=bs, num_workers=0) for _ in range(2)], device='cpu')
    for dl in dls.loaders: dl.n_inp = n_inp
    return dls

def kd_loss(dls, s, loss_func, t, loss, cbs=(), **kwargs):
    "The distillation term of the first batch"
    kd = KD(t, loss, **kwargs)
    learner(dls, s, loss_func=loss_func).fit(1, 0., cbs=[kd, *cbs])
    return kd.curves['train']['kd_loss'][0]

def by_hand(a, b, axis, T=5., keep=None):
    "T² times the mean over positions of KL(teacher ‖ student)"
    a,b = a.double()/T,b.double()/T
    kl = (b.softmax(axis)*(b.log_softmax(axis) - a.log_softmax(axis))).sum(axis)
    return T*T*(kl if keep is None else kl[keep]).mean().item()

def models(make, factor=3.):
    "Student and teacher of one kind"
    torch.manual_seed(3)
    s,t = make(),make()
    with torch.no_grad():
        for p in t.parameters(): p *= factor
    return s,t

def draw(*shape, classes=None):
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=g) if classes is None else torch.randint(classes, shape, generator=g)

conv = lambda: nn.Conv2d(2, 4, 1)
class Last(nn.Module):
    "Logits with the classes last"
    def __init__(self): super().__init__(); self.c = conv()
    def forward(self, x): return self.c(x).movedim(1, -1)

def opaque(p, y):
    "A focal loss of somebody's own"
    lp = p.log_softmax(1).gather(1, y[:,None])[:,0]
    return -((1-lp.exp())**2*lp).mean()

class Wrapped(nn.Module):
    def __init__(self, **kw): super().__init__(); self.inner = nn.CrossEntropyLoss(**kw)
    def forward(self, p, y): return self.inner(p, y)

class Plain:
    "A class that is no module"
    def __init__(self, **kw): self.inner = nn.CrossEntropyLoss(**kw)
    def __call__(self, p, y): return self.inner(p, y)
    def compute(self, p, y): return self.inner(p, y)

y_map = draw(16,6,5, classes=4)
one_hot = F.one_hot(y_map, 4).movedim(-1, 1).float()
soft = draw(16,4,6,5).softmax(1)
dice = lambda p, y: 1-((2*p.softmax(1)*y).sum((2,3))/(p.softmax(1)+y).sum((2,3))).mean()
weighted = lambda p, y, w: (F.cross_entropy(p, y, reduction='none')*w).mean()

@pytest.mark.parametrize('loss_func,ys', [
    (nn.CrossEntropyLoss(), (y_map,)), (F.cross_entropy, (y_map,)), (partial(F.cross_entropy, label_smoothing=.1), (y_map,)), (opaque, (y_map,)),
    (lambda p, y: F.cross_entropy(p, y), (y_map,)), (CrossEntropyLossFlat(axis=1), (y_map,)), (FocalLossFlat(axis=1), (y_map,)), (DiceLoss(), (y_map,)),
    (LabelSmoothingCrossEntropyFlat(axis=1), (y_map,)), (Wrapped(), (y_map,)), (Plain(), (y_map,)), (Plain().compute, (y_map,)),
    (weighted, (y_map, draw(16,6,5).abs())), (dice, (one_hot,)), (dice, (soft,)), (nn.BCEWithLogitsLoss(), (one_hot,)), (nn.CrossEntropyLoss(), (soft,)),
    (lambda p, y: F.cross_entropy(p, y[:,0]), (y_map[:,None],)), (lambda p, y: F.cross_entropy(p, y.long()), (y_map.to(torch.uint8),)),
    (functools.wraps(opaque)(lambda p, y: opaque(p, y)), (y_map,))])
@pytest.mark.parametrize('loss', [SoftTarget(), DIST(), ChannelWise()], ids=lambda l: type(l).__name__)
def test_maps_have_their_classes_on_axis_1(loss_func, ys, loss):
    s,t = models(conv)
    x = draw(16,2,6,5)
    a,b = s(x[:8]).detach(),t(x[:8]).detach()
    if isinstance(loss, SoftTarget): right = by_hand(a, b, 1)
    elif isinstance(loss, ChannelWise): right = by_hand(a.flatten(2), b.flatten(2), -1, T=1)
    else:
        p,q = (z.double().softmax(1).movedim(1,-1).reshape(-1,4) for z in (a,b))
        rho = lambda u, v: torch.stack([torch.corrcoef(torch.stack(o))[0,1] for o in zip(u, v)]).mean()
        right = (2 - rho(p,q) - rho(p.T,q.T)).item()
    assert kd_loss(data(x, *ys), s, loss_func, t, loss) == pytest.approx(right, rel=1e-4)

@pytest.mark.parametrize('loss_func', [lambda p, y: F.cross_entropy(p.movedim(-1, 1), y), CrossEntropyLossFlat()])
def test_maps_with_the_classes_last(loss_func):
    s,t = models(Last)
    x = draw(16,2,6,5)
    assert kd_loss(data(x, y_map), s, loss_func, t, SoftTarget) == pytest.approx(by_hand(s(x[:8]), t(x[:8]), -1), rel=1e-4)

class Shaped(nn.Module):
    "Logits of any shape from one number for each of them"
    def __init__(self, *shape): super().__init__(); self.w = nn.Parameter(torch.randn(shape))
    def forward(self, x): return x.reshape(-1, *[1]*self.w.ndim)*self.w

@pytest.mark.parametrize('shape,labels,axis', [((4,), (), 1), ((4,7), (7,), 1), ((7,4), (7,), 2), ((4,3,5,6), (3,5,6), 1), ((3,5,6,4), (3,5,6), 4), ((5,4,6), (5,6), 2), ((4,7,1), (7,1), 1)])
def test_labels_lack_one_axis(shape, labels, axis):
    "An own loss function says nothing; the labels do"
    s,t = models(lambda: Shaped(*shape))
    x,y = draw(16),draw(16, *labels, classes=4)
    own = lambda p, y: F.cross_entropy(p.movedim(axis, 1), y)
    assert kd_loss(data(x, y), s, own, t, SoftTarget) == pytest.approx(by_hand(s(x[:8]), t(x[:8]), axis), rel=1e-4)

@pytest.mark.parametrize('loss', [SoftTarget, DIST, ChannelWise, DecoupledKD])
def test_where_two_axes_could_be_meant_an_argument_settles_it(loss):
    s,t = models(lambda: Shaped(4,4,5))
    x,y = draw(16),draw(16,4,5, classes=4)
    with pytest.raises(ValueError, match='`?axis=') : kd_loss(data(x, y), s, opaque, t, loss)
    assert not hooks(s, t)
    kd_loss(data(x, y), s, opaque, t, loss, axis=1)
    if loss is SoftTarget:
        for axis in (1,2): assert kd_loss(data(x, y), s, opaque, t, loss, axis=axis) == pytest.approx(by_hand(s(x[:8]), t(x[:8]), axis), rel=1e-4)
        assert kd_loss(data(x, y), s, nn.CrossEntropyLoss(), t, loss) == pytest.approx(by_hand(s(x[:8]), t(x[:8]), 1), rel=1e-4)

says_binary = [nn.BCEWithLogitsLoss(), BCEWithLogitsLossFlat(), lambda p, y: F.binary_cross_entropy_with_logits(p, y)]
says_nothing = lambda p, y: (F.softplus(p)-p*y).mean()
@pytest.mark.parametrize('loss_func,shape', [(f, shape) for f in says_binary for shape in ((), (1,), (1,6,5), (6,5))] + [(says_nothing, ()), (says_nothing, (1,6,5))])
@pytest.mark.parametrize('loss', [SoftTarget, DIST, Mutual])
def test_yes_and_no_have_no_classes(loss_func, shape, loss):
    s,t = models(lambda: Shaped(*shape))
    x,y = draw(16),(draw(16,*shape) > 0).float()
    with pytest.raises(ValueError, match='BinarySoftTarget|axis='): kd_loss(data(x, y), s, loss_func, t, loss)
    a,b = (torch.stack([m(x[:8]), torch.zeros(8,*shape)], -1) for m in (s,t))
    assert kd_loss(data(x, y), s, loss_func, t, BinarySoftTarget(T=2)) == pytest.approx(by_hand(a, b, -1, T=2), rel=1e-4)

@pytest.mark.parametrize('loss_func', [MSELossFlat(), L1LossFlat(), nn.SmoothL1Loss(), F.huber_loss, lambda p, y: F.mse_loss(p, y)])
def test_regression_with_several_columns_has_no_classes(loss_func):
    s,t = models(lambda: nn.Linear(5, 3))
    x,y = draw(16,5),draw(16,3)
    with pytest.raises(ValueError, match='Logits'): kd_loss(data(x, y), s, loss_func, t, SoftTarget)
    right = (s(x[:8])-t(x[:8])).square().mean().item()
    assert kd_loss(data(x, y), s, loss_func, t, None) == pytest.approx(right, rel=1e-5)

# the ignored label

class Own:
    "An object whose method says in a default what it ignores"
    def compute(self, p, y, ignore_index=255): return F.cross_entropy(p, y, ignore_index=ignore_index)

def with_default(p, y, ignore_index=255): return F.cross_entropy(p, y, ignore_index=ignore_index)
ce255 = nn.CrossEntropyLoss(ignore_index=255)
wrappers = dict(module=ce255, partial=partial(F.cross_entropy, ignore_index=255), partial_of_partial=partial(partial(F.cross_entropy, ignore_index=255), label_smoothing=.1),
    in_module=Wrapped(ignore_index=255), in_object=Plain(ignore_index=255), method=Plain(ignore_index=255).compute, default=with_default, closure=lambda p, y: ce255(p, y),
    fastai=CrossEntropyLossFlat(axis=1, ignore_index=255), in_sum=lambda p, y: ce255(p, y) + .1*p.square().mean())

@pytest.mark.parametrize('name', wrappers)
@pytest.mark.parametrize('loss', [SoftTarget(), DecoupledKD(), NormalizedKD(), Logits(), DIST()], ids=lambda l: type(l).__name__)
def test_an_ignored_label_is_found_in_what_wraps_it(name, loss):
    "The teacher differs at ignored places only: nothing of that may be seen"
    x,y = draw(16,2,6,5),y_map.clone()
    y[:,:3] = 255
    s = conv()
    def odd(x): z = s(x).detach().clone(); z[:,0,:3] += 9; return z
    same = lambda x: s(x).detach()
    assert kd_loss(data(x, y), s, wrappers[name], odd, loss) == pytest.approx(kd_loss(data(x, y), s, wrappers[name], same, loss), abs=1e-6)

@pytest.mark.parametrize('name', wrappers)
def test_the_mean_is_over_the_places_that_count(name):
    x,y = draw(16,2,6,5),y_map.clone()
    y[:,:3] = 255
    s,t = models(conv)
    assert kd_loss(data(x, y), s, wrappers[name], t, SoftTarget) == pytest.approx(by_hand(s(x[:8]), t(x[:8]), 1, keep=y[:8] != 255), rel=1e-4)

def test_the_default_of_a_function_is_minus_100():
    x,y = draw(16,2,6,5),y_map.clone()
    y[:,:3] = -100
    s,t = models(conv)
    for f in (F.cross_entropy, nn.CrossEntropyLoss(), lambda p, y: F.cross_entropy(p, y), Wrapped()):
        assert kd_loss(data(x, y), s, f, t, SoftTarget) == pytest.approx(by_hand(s(x[:8]), t(x[:8]), 1, keep=y[:8] >= 0), rel=1e-4)

def test_a_hidden_label_is_asked_for():
    x,y = draw(16,2,6,5),y_map.clone()
    y[:,:3] = 7
    hidden = lambda p, y: F.cross_entropy(p, y, ignore_index=7)
    s,t = models(conv)
    for loss in (SoftTarget, DecoupledKD):
        with pytest.raises(ValueError, match='contain 7.*4 classes.*`ignore_index=7`'): kd_loss(data(x, y), s, hidden, t, loss)
    assert kd_loss(data(x, y), s, hidden, t, SoftTarget, ignore_index=7) == pytest.approx(by_hand(s(x[:8]), t(x[:8]), 1, keep=y[:8] != 7), rel=1e-4)

def test_an_item_without_a_label_learns_from_the_teacher():
    "... a place without one is padding"
    x,y = draw(16,5),draw(16, classes=4)
    y[::2] = -100
    s,t = models(lambda: nn.Linear(5,4))
    assert kd_loss(data(x, y), s, nn.CrossEntropyLoss(), t, SoftTarget) == pytest.approx(by_hand(s(x[:8]), t(x[:8]), 1), rel=1e-4)
    labelled = kd_loss(data(x[1::2], y[1::2], bs=4), s, nn.CrossEntropyLoss(), t, DecoupledKD)
    assert kd_loss(data(x, y), s, nn.CrossEntropyLoss(), t, DecoupledKD) == pytest.approx(labelled, rel=1e-5)

def test_padded_tokens_are_seen_by_neither():
    x,y = draw(16,6,5),draw(16,6, classes=4)
    y[:,4:] = 1
    s,t = models(lambda: nn.Linear(5,4))
    assert kd_loss(data(x, y), s, CrossEntropyLossFlat(ignore_index=1), t, SoftTarget) == pytest.approx(by_hand(s(x[:8]), t(x[:8]), -1, keep=y[:8] != 1), rel=1e-4)

# several labels

@pytest.mark.parametrize('order', [1,-1])
def test_the_labels_among_several_targets(order):
    "Labels and their weights, in either order"
    x,y,w = draw(16,5),draw(16, classes=4),draw(16).abs()
    s,t = models(lambda: nn.Linear(5,4))
    lf = lambda p, *yw: (F.cross_entropy(p, yw[::order][0], reduction='none')*yw[::order][1]).mean()
    for loss in (SoftTarget, DecoupledKD, NormalizedKD):
        assert kd_loss(data(x, *(y,w)[::order]), s, lf, t, loss) == pytest.approx(kd_loss(data(x, y), s, F.cross_entropy, t, loss), rel=1e-6)

def test_two_labels_that_could_be_meant():
    x,y,z = draw(16,5),draw(16, classes=4),draw(16, classes=4)
    s,t = models(lambda: nn.Linear(5,4))
    lf = lambda p, y, z: F.cross_entropy(p, y) + F.cross_entropy(p, z)
    with pytest.raises(ValueError, match='needs class labels.*several.*SoftTarget'): kd_loss(data(x, y, z), s, lf, t, DecoupledKD)
    assert kd_loss(data(x, y, z), s, lf, t, SoftTarget) == pytest.approx(by_hand(s(x[:8]), t(x[:8]), 1), rel=1e-4)

def function(pred, teacher_pred, target=None): return (pred-teacher_pred).square().mean()

@pytest.mark.parametrize('mix', [MixUp, CutMix])
@pytest.mark.parametrize('loss', [function, DecoupledKD, NormalizedKD])
def test_mixed_labels_are_not_one_label(mix, loss):
    x,y = draw(16,2,6,5),draw(16, classes=4)
    s = nn.Sequential(nn.Flatten(), nn.Linear(60,4))
    with pytest.raises(ValueError, match=f'needs one class label.*{mix.__name__}'): kd_loss(data(x, y), s, CrossEntropyLossFlat(), nn.Sequential(nn.Flatten(), nn.Linear(60,4)), loss, cbs=[mix()])

# outputs

class Heads(nn.Module):
    "A model whose `wrap` says how it puts out logits and something else of the same shape"
    def __init__(self, wrap): super().__init__(); self.a,self.c,self.wrap = nn.Linear(5,4),nn.Linear(5,4),wrap
    def forward(self, x): return self.wrap(self.a(x), self.c(x))

Out = namedtuple('Out', 'features logits')
@dataclasses.dataclass
class Record: features:torch.Tensor; logits:torch.Tensor

@pytest.mark.parametrize('wrap', [lambda f, z: {'features': f, 'logits': z}, lambda f, z: {'logits': z, 'features': f}, Out, Record, lambda f, z: {'loss': f.mean(), 'logits': z}])
@pytest.mark.parametrize('teacher_alone', [False,True])
def test_logits_by_name_come_first(wrap, teacher_alone):
    s,t = models(lambda: Heads(wrap))
    if teacher_alone: s = nn.Linear(5,4)
    x,y = draw(16,5),draw(16, classes=4)
    logits = lambda o: o if isinstance(o, torch.Tensor) else o['logits'] if isinstance(o, dict) else o.logits
    lf = lambda o, y: F.cross_entropy(logits(o), y)
    a,b = logits(s(x[:8])),logits(t(x[:8]))
    assert kd_loss(data(x, y), s, lf, t, SoftTarget) == pytest.approx(by_hand(a, b, 1), rel=1e-4)
    assert kd_loss(data(x, y), s, lf, lambda x: t(x), SoftTarget) == pytest.approx(by_hand(a, b, 1), rel=1e-4)
    kd = KD(t, SoftTarget)
    if not teacher_alone: assert kd.teacher_metrics(learner(data(x, y), s, loss_func=lf))['loss'] == pytest.approx(F.cross_entropy(logits(t(x)), y).item(), rel=1e-5)

@pytest.mark.parametrize('wrap', [lambda f, z: (f, z), lambda f, z: [f, z], lambda f, z: {'a': f, 'b': z}])
def test_of_several_tensors_the_first_is_taken_and_the_start_line_says_so(wrap, capsys):
    s,t = models(lambda: Heads(wrap))
    x,y = draw(16,5),draw(16, classes=4)
    first = lambda o: next(iter(o.values())) if isinstance(o, dict) else o[0]
    got = kd_loss(data(x, y), s, lambda o, y: F.cross_entropy(first(o), y), t, SoftTarget)
    assert got == pytest.approx(by_hand(s.a(x[:8]), t.a(x[:8]), 1), rel=1e-4)
    assert 'first' in capsys.readouterr().out

def test_outputs_picks_the_teachers():
    t = Heads(lambda f, z: (f, z))
    s,x,y = nn.Linear(5,4),draw(16,5),draw(16, classes=4)
    assert kd_loss(data(x, y), s, F.cross_entropy, Teacher(t, outputs=lambda o: o[1]), SoftTarget) == pytest.approx(by_hand(s(x[:8]), t.c(x[:8]), 1), rel=1e-4)
    assert KD(Teacher(t, outputs=lambda o: o[1])).teacher_metrics(learner(data(x, y), s, loss_func=F.cross_entropy))['loss'] == pytest.approx(F.cross_entropy(t.c(x), y).item(), rel=1e-5)

@pytest.mark.parametrize('shape', [(4,12,10), (4,3,5)])
def test_maps_of_another_size(shape):
    "The message speaks of sizes, not of classes, and the cure in it works"
    s,t = conv(),nn.Sequential(conv(), nn.AdaptiveAvgPool2d(shape[1:]))
    x = draw(16,2,6,5)
    with pytest.raises(ValueError, match='sizes.*outputs='): kd_loss(data(x, y_map), s, nn.CrossEntropyLoss(), t, SoftTarget)
    resized = Teacher(t, outputs=lambda o: F.interpolate(o, size=(6,5)))
    assert kd_loss(data(x, y_map), s, nn.CrossEntropyLoss(), resized, SoftTarget) == pytest.approx(by_hand(s(x[:8]), F.interpolate(t(x[:8]), size=(6,5)), 1), rel=1e-4)

def test_texts_of_another_length():
    s,t = nn.Linear(5,4),nn.Linear(5,4)
    with pytest.raises(ValueError, match='sizes'): kd_loss(data(draw(16,6,5), draw(16,6, classes=4)), s, CrossEntropyLossFlat(), lambda x: t(x)[:,:4], SoftTarget)

# numbers

def test_classes_masked_in_both_models():
    s,t = torch.randn(6,5, generator=torch.Generator().manual_seed(0)),torch.randn(6,5, generator=torch.Generator().manual_seed(1))
    whole = {L: float(L()(s[:,:4], t[:,:4])) for L in (SoftTarget, Mutual)}
    s[:,4] = t[:,4] = -torch.inf
    for L,right in whole.items(): assert float(L()(s, t)) == pytest.approx(right, rel=1e-5)
