"More of the kinds: what was found to go wrong after the first round"
import collections, contextlib, copy, importlib, types, warnings
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
from functools import partial
from fastai.basics import BCEWithLogitsLossFlat, CrossEntropyLossFlat, DataLoaders, Learner, accuracy
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import SchedLin
from fastai.data.transforms import Normalize
from fastai.vision.core import imagenet_stats
import fastkd.callback
from fastkd.all import *
from conftest import batches, learner, net, same, weights
from test_kinds_axes import KD, Heads, Shaped, by_hand, conv, data, draw, kd_loss, models, y_map
from test_kinds_defaults import cnn, photos, quiet
from test_kinds_faults import cleaning, each_line, interrupted, lines_of
from test_kinds_fit import Inside, TooMany, fit_kept, kl, lin
from test_kinds_layouts import Net as LayoutNet
from test_kinds_teachers import Net, by_itself, modes, student, teacher_activations

x,y = draw(32,5),draw(32, classes=4)
yes = (draw(32,4) > 0).float()

# the task, where the loss function says little

class OwnBCE(nn.Module):
    def forward(self, p, y): return F.binary_cross_entropy_with_logits(p, y)
class OwnMSE:
    def __call__(self, p, y): return F.mse_loss(p, y)

@pytest.mark.parametrize('loss_func,target', [(OwnBCE(), yes), (OwnMSE(), draw(32,4)), (lambda p, y: nn.functional.l1_loss(p, y), draw(32,4)), (lambda p, y: torch.nn.functional.binary_cross_entropy_with_logits(p, y), yes),
    (lambda p, y: ((p-y)**2).mean(), draw(32,4)), (lambda p, y: (F.softplus(p)-p*y).mean(), yes), (nn.SoftMarginLoss(), yes*2-1), (nn.PoissonNLLLoss(), yes), (F.multilabel_soft_margin_loss, yes)])
@pytest.mark.parametrize('loss', [SoftTarget, None])
def test_labels_of_the_logits_shape_that_sum_to_no_1_are_no_classes(loss_func, target, loss):
    "Whatever the loss function is, the labels themselves say it"
    if loss is SoftTarget:
        with pytest.raises(ValueError, match='BinarySoftTarget|Logits|axis='): kd_loss(data(x, target), lin(), loss_func, lin(3), loss)
    else:
        with contextlib.suppress(ValueError):  # or refused
            got = kd_loss(data(x, target), lin(), loss_func, lin(3), loss)
            assert got != pytest.approx(by_hand(lin()(x[:8]), lin(3)(x[:8]), 1), rel=1e-4)

def test_the_advice_for_a_single_column_can_be_followed():
    s,t = models(lambda: Shaped(1))
    with pytest.raises(ValueError, match='BinarySoftTarget|Logits'): kd_loss(data(draw(16), (draw(16,1) > 0).float()), s, lambda p, y: (F.softplus(p)-p*y).mean(), t, DIST)

# the ignored label

class ForwardDefault(nn.Module):
    def forward(self, p, y, ignore_index=0): return F.cross_entropy(p, y, ignore_index=ignore_index)
class CallDefault:
    def __call__(self, p, y, ignore_index=0): return F.cross_entropy(p, y, ignore_index=ignore_index)
    def method(self, p, y, ignore_index=0): return F.cross_entropy(p, y, ignore_index=ignore_index)
class InList(nn.Module):
    def __init__(self): super().__init__(); self.parts = [nn.CrossEntropyLoss(ignore_index=0)]
    def forward(self, p, y): return sum(f(p, y) for f in self.parts)
class InDict:
    def __init__(self): self.parts = {'ce': nn.CrossEntropyLoss(ignore_index=0)}
    def __call__(self, p, y): return self.parts['ce'](p, y)
parts = [nn.CrossEntropyLoss(ignore_index=0)]

@pytest.mark.parametrize('loss_func', [ForwardDefault(), CallDefault(), CallDefault().method, InList(), InDict(), lambda p, y: parts[0](p, y)], ids=['forward','call','method','list','dict','global'])
def test_an_ignored_label_that_is_a_class_too(loss_func):
    "Label 0 is ignored: nothing in the labels tells, so it must be found"
    s,t = models(conv)
    xm = draw(16,2,6,5)
    assert kd_loss(data(xm, y_map), s, loss_func, t, SoftTarget) == pytest.approx(by_hand(s(xm[:8]), t(xm[:8]), 1, keep=y_map[:8] != 0), rel=1e-4)

class Weighs(KDLoss):
    "A user's loss whose labels have a default"
    seen = []
    def forward(self, pred, teacher_pred, target=None): self.seen.append(target); return (pred-teacher_pred).square().mean()

def test_a_users_loss_gets_no_first_label_of_mixed_ones():
    s,t = (nn.Sequential(nn.Flatten(), nn.Linear(60,4)) for _ in range(2))
    Weighs.seen.clear()
    with contextlib.suppress(ValueError): kd_loss(data(draw(16,2,6,5), draw(16, classes=4)), s, CrossEntropyLossFlat(), t, Weighs, cbs=[MixUp()])
    assert not [o for o in Weighs.seen if o is not None]

# numbers

def test_logits_of_classes_that_are_masked_in_both():
    g = torch.Generator().manual_seed(0)
    s,t = torch.randn(6,5, generator=g),torch.randn(6,5, generator=g)
    right = float((s-t)[:,:4].square().mean())
    s[:,4] = t[:,4] = -torch.inf
    s.requires_grad_()
    v = Logits()(s, t)
    v.backward()
    assert s.grad.isfinite().all() and float(v) in (pytest.approx(right), pytest.approx(right*4/5))

@pytest.mark.parametrize('T', [5,20])
def test_logits_that_are_nearly_equal(T):
    g = torch.Generator().manual_seed(0)
    s = torch.randn(64,1000, generator=g)
    t = s + 1e-3*torch.randn(64,1000, generator=g)
    a,b = s.clone().requires_grad_(),s.double().requires_grad_()
    u,v = SoftTarget(T)(a, t),SoftTarget(T)(b, t.double())
    u.backward(); v.backward()
    # the differences of the logits themselves have 4 digits
    assert float(u) == pytest.approx(float(v), rel=1e-3) and (a.grad.double()-b.grad).norm() < 1e-3*b.grad.norm()

# teachers at rest

def rests(make, model, right=None):
    "A teacher that holds `model` gives the logits of eval mode and leaves `model` as it was"
    before,was = weights(model),modes(model)
    right = copy.deepcopy(model).eval() if right is None else right
    got = kd_loss(data(x, y), student(), F.cross_entropy, make(model), SoftTarget)
    assert same(before, weights(model)) and modes(model) == was
    assert got == pytest.approx(by_hand(student()(x[:8]), right(x[:8]), 1), rel=1e-4)

def test_a_function_that_calls_forward_itself(): rests(lambda m: lambda x: m.forward(x), Net())
def test_a_function_that_calls_a_scripted_model(): rests(lambda m: lambda x: m(x), torch.jit.script(Net()), Net().eval())

@pytest.mark.parametrize('where', ['inputs','outputs'])
def test_modules_that_map_inputs_and_outputs_rest_too(where):
    base = lin(7)
    model = nn.Sequential(nn.BatchNorm1d(5 if where == 'inputs' else 4), nn.Dropout())
    right = copy.deepcopy(model).eval()
    rests(lambda m: Teacher(base, **{where: m}), model, lambda x: base(right(x)) if where == 'inputs' else right(base(x)))

def test_probabilities_are_between_0_and_1():
    with pytest.raises(ValueError, match='prob'): kd_loss(data(x, y), student(), F.cross_entropy, Teacher(Net(), probs=True), SoftTarget)

def test_a_teacher_that_ends_in_a_sigmoid_is_warned_about():
    with pytest.warns(UserWarning, match='probs=True'): kd_loss(data(x, yes), student(), BCEWithLogitsLossFlat(), lambda x: lin(3)(x).sigmoid(), BinarySoftTarget)

def test_a_function_of_another_dtype_names_the_cure():
    m = lin(3).bfloat16()
    try: got = kd_loss(data(x, y), student(), F.cross_entropy, lambda x: m(x), SoftTarget)
    except Exception as e: assert 'dtype=' in str(e)
    else: assert got == pytest.approx(kd_loss(data(x, y), student(), F.cross_entropy, m, SoftTarget), rel=1e-3)

@pytest.mark.parametrize('f', [lambda: partial(__import__('torchvision').models.resnet18, num_classes=4), lambda: lambda: lin(3)], ids=['partial','no_arguments'])
def test_other_functions_that_make_models(f):
    with pytest.raises(TypeError, match='call it'): kd_loss(data(draw(16,3,32,32), draw(16, classes=4)), nn.Sequential(nn.Flatten(), nn.Linear(3072,4)), F.cross_entropy, f(), SoftTarget)

def test_of_several_outputs_of_the_teacher_the_first_is_taken_and_the_start_line_says_so(capsys):
    kd_loss(data(x, y), student(), F.cross_entropy, Heads(lambda f, z: (f, z)), SoftTarget)
    assert 'first' in capsys.readouterr().out

# hidden states that are no attributes of their own

class Stateful(nn.Module):
    "The mean of the last batch's outputs is added to the next inputs; the state changes after the layer that is wanted"
    def __init__(self, get, put, make):
        super().__init__()
        self.enc,self.fc,self.get,self.put = nn.Linear(4,4),nn.Linear(4,4),get,put
        make(self)
    def forward(self, x):
        z = self.enc(x + self.get(self))
        self.put(self, self.fc(z).mean(0).detach())
        return self.fc(z)

states = dict(
    buffer=(lambda m: m.h, lambda m, v: setattr(m, 'h', v), lambda m: m.register_buffer('h', torch.zeros(4))),
    buffer_in_place=(lambda m: m.h, lambda m, v: m.h.copy_(v), lambda m: m.register_buffer('h', torch.zeros(4))),
    attribute_in_place=(lambda m: m.h, lambda m, v: m.h.copy_(v), lambda m: setattr(m, 'h', torch.zeros(4))),
    dictionary=(lambda m: m.c['h'], lambda m, v: m.c.update(h=v), lambda m: setattr(m, 'c', {'h': 0.})),
    deque=(lambda m: m.c[-1], lambda m, v: m.c.append(v), lambda m: setattr(m, 'c', collections.deque([0.]))),
    list=(lambda m: m.c[-1], lambda m, v: m.c.append(v), lambda m: setattr(m, 'c', [0.])),
    object=(lambda m: m.c.h, lambda m, v: setattr(m.c, 'h', v), lambda m: setattr(m, 'c', types.SimpleNamespace(h=0.))))

@pytest.mark.parametrize('state', states)
def test_a_hidden_state_of_any_kind_is_kept(state):
    torch.manual_seed(1)
    t,xs = Stateful(*states[state]),[draw(8,4)+i for i in range(4)]
    right = by_itself(t, 'enc', xs)
    for g,r in zip(teacher_activations(t, 'enc', xs), right, strict=True): assert torch.allclose(g, r, atol=1e-5)

# foreign code around a fit

@pytest.mark.parametrize('what', [lambda l: l.get_preds(), lambda l: l.validate(), lambda l: l.get_preds(with_loss=True)], ids=['get_preds','validate','with_loss'])
@pytest.mark.parametrize('at,order', [('before_batch',2000), ('after_pred',60), ('after_loss',-60), ('after_loss',60), ('before_step',60), ('after_batch',60), ('after_epoch',70)])
@pytest.mark.parametrize('loss,names', [(SoftTarget, ()), (FitNet, ('0','0'))])
@pytest.mark.filterwarnings('ignore')
def test_a_foreign_validation_inside_a_fit_changes_nothing(what, at, order, loss, names):
    "... not the curves, their epochs, the column of the table, nor what is trained"
    def fit(*cbs):
        learn,kd = learner(data(x, y), nn.Sequential(lin()), loss_func=F.cross_entropy),KD(nn.Sequential(nn.Linear(5,6), nn.Linear(6,4)), loss, *names, weight=.3, label_weight=1.)
        torch.manual_seed(4)
        learn.fit(2, .1, cbs=[kd, *cbs])
        return kd.curves,weights(learn.model)
    torch.manual_seed(3); curves,right = fit()
    torch.manual_seed(3); got,w = fit(Inside(what, at, order))
    assert got['steps'] == curves['steps'] and got['train'] == curves['train'] and same(right, w)

def test_what_validate_says_inside_a_fit():
    "The loss and the learner's own metrics, and no term"
    got = []
    learn = learner(data(x, y), lin(), loss_func=F.cross_entropy, metrics=accuracy)
    learn.fit(1, .1, cbs=[KD(lin(3), SoftTarget), Inside(lambda l: got.extend(l.validate()), 'after_batch', 60)])
    assert len(got) == 2

def test_the_column_of_an_epoch_with_a_foreign_validation_is_the_mean_of_all_its_batches():
    learn,kd = learner(data(x, y), lin(), loss_func=F.cross_entropy),KD(lin(3), SoftTarget)
    learn.fit(1, .1, cbs=[kd, Inside(lambda l: l.validate(), 'after_batch', 60)])
    assert list(learn.recorder.metric_names)[-2] == 'kd_loss'
    assert learn.recorder.values[-1][-1] == pytest.approx(np.mean(kd.curves['train']['kd_loss']), rel=1e-5)

@pytest.mark.parametrize('given', ['before','after'])
def test_a_module_that_is_loaded_again(given):
    s,t = lin(),lin(3)
    right,kept = kl(s, t, x[:8]),dict(vars(fastkd.callback))
    with fit_kept():
        try:
            kd = KD(t, SoftTarget)
            importlib.reload(fastkd.callback)
            if given == 'after': kd = fastkd.callback.KnowledgeDistillationCallback(t, SoftTarget)
            learn = learner(data(x, y), s, loss_func=F.cross_entropy)
            for _ in range(2):
                learn.fit(1, 0., cbs=kd)
                assert kd.curves['train']['kd_loss'][0] == pytest.approx(right, rel=1e-4) and kd.session is None and not learn.metrics
        finally: vars(fastkd.callback).update(kept)

def test_loaders_that_are_no_loaders_of_a_data_set():
    class Batches:
        n_inp = 1
        def __len__(self): return 4
        def __iter__(self): return iter([(x[i:i+8], y[i:i+8]) for i in range(0,32,8)])
    s,t = lin(),lin(3)
    learner(DataLoaders(Batches(), Batches()), lin(), loss_func=F.cross_entropy).fit(1, .1)
    assert kd_loss(DataLoaders(Batches(), Batches()), s, F.cross_entropy, t, SoftTarget) == pytest.approx(by_hand(s(x[:8]), t(x[:8]), 1), rel=1e-4)

@pytest.mark.parametrize('what', ['layer_table','show_attention'])
def test_the_loaders_of_pytorch_show(what):
    import matplotlib.pyplot as plt
    from torch.utils.data import DataLoader, TensorDataset
    xs = draw(32,3,16,16)
    body = lambda w: nn.Sequential(nn.Conv2d(3,w,3,2,1), nn.ReLU(), nn.Conv2d(w,w,3,2,1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(w,4))
    learn,kd = learner(DataLoaders(*[DataLoader(TensorDataset(xs, y), 8)]*2), body(4), loss_func=nn.CrossEntropyLoss()),KD(body(6), Attention, '3', '3')
    learn.fit(1, 0., cbs=kd)
    if what == 'layer_table': assert list(learn.layer_table().index) == [str(i) for i in range(7)]
    else: kd.show_attention(2); plt.close('all')

@pytest.mark.parametrize('s_last,t_last', [(True,False), (False,True)])
def test_show_attention_draws_the_map_of_a_model_with_channels_last(s_last, t_last):
    import matplotlib.pyplot as plt
    kd = KD(LayoutNet(5, t_last), Attention, 's1', 's1')
    dls = batches(classes=4, shape=(1,16,16))
    dls.valid.decode = lambda b: b
    learn = learner(dls, LayoutNet(4, s_last), loss_func=F.cross_entropy)
    learn.fit(1, 0., cbs=kd)
    axs = kd.show_attention(2)
    shapes = [tuple(ax.images[-1].get_array().shape) for ax in axs[0,1:]]
    plt.close('all')
    assert shapes == [(8,8),(8,8)]

def test_a_layer_of_the_teacher_that_does_not_exist_is_refused_before_anything_is_trained():
    s = nn.Sequential(lin())
    before = weights(s)
    with pytest.raises(ValueError, match="'9' of the teacher"): learner(data(x, y), s, loss_func=F.cross_entropy).fit(1, .1, cbs=KD(nn.Sequential(lin(3)), Cosine, '0', '9', schedule=SchedLin(0, 1)))
    assert same(before, weights(s))

def test_progress_of_a_peer_ends_at_1_too():
    seen = []
    def T(p): seen.append(p); return 1 + 8*(1-p)**.5
    peer = learner(data(x, y), lin(5), loss_func=F.cross_entropy)
    learner(DataLoaders(TooMany(), TooMany()), lin(), loss_func=F.cross_entropy).fit(1, .1, cbs=KD(PeerTeacher(peer, loss=SoftTarget(T=T)), Mutual))
    assert max(seen) == 1

# right by default

def test_match_layers_takes_a_batch_and_learners():
    dls = batches()
    s,t = learner(dls, net(4)),learner(dls, net(6))
    right = match_layers(s, t, dls.one_batch()[0])
    assert match_layers(s, t, dls.one_batch()) == match_layers(s, t) == right

@pytest.mark.parametrize('method,cure', [('soft', r'SoftTarget'), ('soft(T=4)', r'SoftTarget\(T=4\)'), ('soft+fitnet', r'\[SoftTarget.*FitNet'), ('fitnet', 'FitNet'), (['soft','fitnet'], 'SoftTarget.*FitNet'), ('attention-paper', "Attention.*'paper'")])
def test_methods_by_name_are_refused_with_the_equivalent_expression(method, cure):
    with pytest.raises((TypeError,ValueError), match=cure): KD(net(6), method)

def test_a_temperature_that_is_a_function_has_a_useful_repr(capsys):
    kd = KD(lin(3), SoftTarget(T=lambda p: 3.))
    learner(data(x, y), lin(), loss_func=F.cross_entropy).fit(1, 0., cbs=kd)
    assert ' at 0x' not in repr(kd) + repr(SoftTarget(T=lambda p: 3.)) + capsys.readouterr().out

@pytest.mark.parametrize('how', ['config','normalize='])
def test_equal_statistics_are_equal_though_one_is_in_single_precision(how, capsys):
    t = cnn()
    if how == 'config': t.pretrained_cfg = dict(mean=imagenet_stats[0], std=imagenet_stats[1])
    else: t = Teacher(t, normalize=imagenet_stats)
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter('always')
        quiet(photos(mean_std=imagenet_stats), cnn(seed=2)).fit(1, 0., cbs=KD(t, SoftTarget))
    assert not [w for w in got if 'configuration' in str(w.message)] and 'normalized' not in capsys.readouterr().out

def test_a_teacher_whose_recorded_metric_is_far_from_what_it_makes_of_these_data():
    "`vision_learner` adds `Normalize` to shared `dls` in place"
    dls = photos()
    teacher = quiet(dls, cnn(), metrics=accuracy)
    teacher.fit(30, .3)
    assert teacher.recorder.values[-1][2] == 1
    dls.add_tfms([Normalize.from_stats([5.]*3, [.1]*3, cuda=False)], 'after_batch')
    with pytest.warns(UserWarning, match='accuracy'): quiet(dls, cnn(seed=2), metrics=accuracy).fit(1, 0., cbs=KD(teacher, SoftTarget))

def test_a_teacher_that_was_validated_after_its_training():
    "`validate` replaces its epoch table by the metrics of whatever it was shown"
    dls = photos()
    teacher = quiet(dls, cnn(), metrics=accuracy)
    teacher.fit(30, .3)
    teacher.validate()
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        quiet(dls, cnn(seed=2), metrics=accuracy).fit(1, 0., cbs=KD(teacher, SoftTarget))

def test_classes_that_no_loss_looks_at():
    "Losses on activations know no classes; the refusal of unknown classes itself advises them"
    other = photos()
    other.vocab = ['a','b','c']
    teacher = Learner(other, cnn())
    for loss in (Attention, FitNet): quiet(photos(), cnn(seed=2)).fit(1, 0., cbs=KD(teacher, loss, '0', '0'))

@pytest.mark.parametrize('normalize', [.5, ([.5]*2,[.5]*2), ([.5]*3,), [.5,.5,.5]])
def test_statistics_that_are_none(normalize):
    with pytest.raises((TypeError,ValueError), match='normalize'): quiet(photos(), cnn(seed=2)).fit(1, 0., cbs=KD(Teacher(cnn(), normalize=normalize), SoftTarget))

def test_more_names_than_classes():
    "A name for each logit"
    with pytest.raises(ValueError, match='vocab'): quiet(photos(), cnn(seed=2)).fit(1, 0., cbs=KD(Teacher(cnn(), vocab=['dark','mixed','light','more']), SoftTarget))

# Ctrl-C during the cleaning up

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', ['features','function'])
def test_ctrl_c_in_the_cleaning_up(kind):
    "It stays a KeyboardInterrupt, and the next fit closes what was left open"
    found = {}
    for l,at in each_line(kind).items():
        if l.split()[-1] not in cleaning | {'reset'}: continue
        try: what,_ = interrupted(kind, at)
        except BaseException as e: what = [f'{type(e).__name__}: {e}']
        if what: found[l] = what
    assert not found
