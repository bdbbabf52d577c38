"`TeacherAgreement` and `TeacherKL`: their values by hand, and that teacher and exports stay as they were"
import copy, math, pickle, subprocess, sys
import numpy as np
import pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.basics import BCEWithLogitsLossFlat, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, MSELossFlat
from fastai.callback.core import Callback, CancelValidException
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import SaveModelCallback
from fastai.data.transforms import Normalize
from fastai.metrics import accuracy
from fastkd.all import *
from conftest import batches, hooks, learner, net, same, weights
from test_export import big, exported, mentions_fastkd

def both(teacher, **kwargs): return [TeacherAgreement(teacher, **kwargs), TeacherKL(teacher, **kwargs)]
def logits(model, dl):
    was = [m.training for m in model.modules()]
    with torch.no_grad(): z = [model.eval()(x) for x,*_ in dl]
    for m,t in zip(model.modules(), was): m.training = t
    return torch.cat(z)
def kl(t, s, axis=1): return (t.softmax(axis)*(t.log_softmax(axis) - s.log_softmax(axis))).sum(axis)

def rows(*shape, label, n=22, bs=8, seed=0):
    "`DataLoaders` of noise with the labels `label(i, generator)`"
    g = torch.Generator().manual_seed(seed)
    items = [(torch.randn(*shape, generator=g), label(i, g)) for i in range(n)]
    return DataLoaders.from_dsets(items, items, bs=bs, num_workers=0, device='cpu')

# --- values --------------------------------------------------------------------------------------------------------

def test_classes_by_hand():
    "... with a last batch that is smaller"
    teacher,learn = net(width=6, seed=7),learner(batches(n_valid=19))
    learn.metrics = both(teacher)
    s,t = logits(learn.model, learn.dls.valid),logits(teacher, learn.dls.valid)
    _,agreement,divergence = learn.validate()
    assert agreement == pytest.approx(sum(int(a.argmax()) == int(b.argmax()) for a,b in zip(s, t))/19)
    assert divergence == pytest.approx(kl(t, s).mean().item(), rel=1e-5)
    assert list(learn.metrics.attrgot('name')) == ['teacher_agreement','teacher_kl_loss']

def test_a_learner_is_its_own_double():
    learn = learner()
    learn.metrics = both(learn.model)
    assert learn.validate()[1:] == [1., 0.]
    learn.metrics = both(copy.deepcopy(learn))  # a Learner
    assert learn.validate()[1:] == [1., 0.]

def test_it_changes_no_training_and_stands_in_the_table():
    plain,learn = [learner(batches(shuffle=False), metrics=[accuracy, *more]) for more in ([], both(net(width=6, seed=7)))]
    plain.fit(2); learn.fit(2)
    assert same(weights(plain.model), weights(learn.model))
    assert list(learn.recorder.metric_names)[1:] == ['train_loss','valid_loss','accuracy','teacher_agreement','teacher_kl_loss','time']
    assert [len(v) for v in learn.recorder.values] == [5,5] and list(learn.recorder.values[-1])[3:] == learn.validate()[2:]

def test_yes_no_labels():
    teacher,model = nn.Linear(5,3),nn.Linear(5,3)
    dls = rows(5, label=lambda i, g: torch.randint(2, (3,), generator=g).float())
    learn = learner(dls, model, loss_func=BCEWithLogitsLossFlat(), metrics=both(teacher))
    s,t = logits(model, dls.valid),logits(teacher, dls.valid)
    _,agreement,divergence = learn.validate()
    assert agreement == pytest.approx(((s > 0) == (t > 0)).float().mean().item())
    p,q = t.sigmoid(),s.sigmoid()
    assert divergence == pytest.approx((p*(p/q).log() + (1-p)*((1-p)/(1-q)).log()).mean().item(), rel=1e-5)

def segmentation(ignored=0.3):
    def label(i, g): return torch.where(torch.rand(6,6, generator=g) < ignored, 255, torch.randint(4, (6,6), generator=g))
    return rows(2, 6, 6, label=label)

def test_maps_without_the_ignored_places():
    teacher,model,dls = nn.Conv2d(2,4,3,padding=1),nn.Conv2d(2,4,3,padding=1),segmentation()
    learn = learner(dls, model, loss_func=CrossEntropyLossFlat(axis=1, ignore_index=255), metrics=both(teacher))
    s,t,y = logits(model, dls.valid),logits(teacher, dls.valid),torch.cat([y for _,y in dls.valid])
    _,agreement,divergence = learn.validate()
    assert agreement == pytest.approx((s.argmax(1) == t.argmax(1))[y != 255].float().mean().item())
    assert divergence == pytest.approx(kl(t, s)[y != 255].mean().item(), rel=1e-5)

def test_axis_and_label_may_be_named():
    teacher,model,dls = nn.Conv2d(2,4,3,padding=1),nn.Conv2d(2,4,3,padding=1),segmentation()
    def loss_func(pred, y): return sum(F.cross_entropy(p[None], o[None], ignore_index=255) for p,o in zip(pred, y))/len(y)
    learn = learner(dls, model, loss_func=loss_func, metrics=both(teacher, axis=1, ignore_index=255))
    keep = torch.cat([y for _,y in dls.valid]) != 255
    assert learn.validate()[1] == pytest.approx((logits(model, dls.valid).argmax(1) == logits(teacher, dls.valid).argmax(1))[keep].float().mean().item())

def test_everything_ignored_has_no_value():
    dls = segmentation(ignored=2)
    learn = learner(dls, nn.Conv2d(2,4,3,padding=1), loss_func=CrossEntropyLossFlat(axis=1, ignore_index=255), metrics=both(nn.Conv2d(2,4,3,padding=1)))
    assert learn.validate()[1:] == [None,None]

def test_an_item_without_a_label_still_counts():
    "... as it does in distillation: the teacher says something of it"
    teacher,dls = nn.Linear(5,3),rows(5, n=60, label=lambda i, g: torch.tensor(-100 if i%2 else i%3))
    learn = learner(dls, nn.Linear(5,3), metrics=both(teacher))
    assert learn.validate()[1] == pytest.approx((logits(learn.model, dls.valid).argmax(1) == logits(teacher, dls.valid).argmax(1)).float().mean().item())

def test_ensembles_and_probabilities():
    models,learn = [net(width=6, seed=i) for i in (7,8)],learner()
    learn.metrics = [TeacherAgreement(models), TeacherKL(models), TeacherKL(Teacher(lambda x: models[0](x).softmax(1), probs=True))]
    s,(a,b) = logits(learn.model, learn.dls.valid),[logits(m, learn.dls.valid) for m in models]
    mean = (a.softmax(1)+b.softmax(1)).log()
    _,agreement,divergence,of_probs = learn.validate()
    assert agreement == pytest.approx((s.argmax(1) == mean.argmax(1)).float().mean().item())
    assert divergence == pytest.approx(kl(mean, s).mean().item(), rel=1e-5) and of_probs == pytest.approx(kl(a, s).mean().item(), rel=1e-4)

# --- other classes, other normalization ----------------------------------------------------------------------------

def with_vocab(vocab, **kwargs):
    learn = learner(**kwargs)
    learn.dls.vocab = vocab
    return learn

@pytest.mark.parametrize('loss', [None, SoftTarget, Attention], ids=['validate','in a fit on logits','in a fit on activations'])
def test_classes_in_another_order(loss):
    "The same `Teacher` may serve a fit that compares no logits, and so maps no classes"
    learn = with_vocab(['a','b','c'])
    teacher = with_vocab(['c','a','b'], model=copy.deepcopy(learn.model))
    with torch.no_grad(): teacher.model.fc.weight.copy_(learn.model.fc.weight[[2,0,1]]); teacher.model.fc.bias.copy_(learn.model.fc.bias[[2,0,1]])
    teacher = Teacher(teacher)
    learn.metrics = both(teacher)
    names = (['bn1'],['bn1']) if loss is Attention else ()
    if loss: learn.fit(1, cbs=KnowledgeDistillationCallback(teacher, loss, *names, weight=.5))
    else: learn.validate()
    s,t = logits(learn.model, learn.dls.valid),logits(teacher.model, learn.dls.valid)[:,[1,2,0]]
    assert learn.metrics[0].value == (s.argmax(1) == t.argmax(1)).float().mean().item()
    assert learn.metrics[1].value == pytest.approx(kl(t, s).mean().item(), abs=1e-6)
    assert teacher.positions == [None] and teacher.running is None

def test_unknown_classes_are_refused():
    learn = with_vocab(['a','b','d'], metrics=TeacherAgreement(with_vocab(['c','a','b'])))
    with pytest.raises(ValueError, match="The teacher does not know the class 'd'"): learn.validate()

def test_another_normalization():
    learn,teacher = learner(batches(shape=(3,8,8)), nn.Sequential(nn.Flatten(), nn.Linear(192,3))),nn.Sequential(nn.Flatten(), nn.Linear(192,3))
    for dl in learn.dls.loaders: dl.after_batch.add(Normalize(*[torch.full((1,3,1,1), v) for v in (2.,4.)]))
    learn.metrics = TeacherAgreement(Teacher(teacher, normalize=([0.]*3,[1.]*3)))
    x = torch.cat([x for x,_ in learn.dls.valid])
    with torch.no_grad(): expected = (learn.model(x).argmax(1) == teacher(x*4+2).argmax(1)).float().mean().item()
    assert learn.validate()[1] == pytest.approx(expected)

# --- a guest -------------------------------------------------------------------------------------------------------

class Spy(nn.Module):
    def __init__(self): super().__init__(); self.net,self.seen = net(width=6, seed=7),[]
    def forward(self, x): self.seen.append((torch.is_grad_enabled(), self.training or self.net.bn1.training)); return self.net(x)

def state(model): return [m.training for m in model.modules()],[(p.requires_grad, p.grad) for p in model.parameters()],len(hooks(model))

def test_the_teacher_runs_on_what_is_validated_alone():
    spy = Spy()
    learn = learner(metrics=TeacherAgreement(spy))
    before,values = state(spy),weights(spy)
    learn.fit(2)
    assert spy.seen == 2*2*[(False,False)] and state(spy) == before and same(weights(spy), values)
    learn.get_preds(); learn.get_preds(with_loss=True)
    assert len(spy.seen) == 4
    learn.validate()
    assert len(spy.seen) == 6

class Away(nn.Linear):
    "A teacher on another device, for which the meta device stands"
    def __init__(self): super().__init__(2, 2, device='meta'); self.moves = []
    def to(self, device): self.moves.append(str(device)); return self
    def forward(self, x): return x.flatten(1)[:,:3]

@pytest.mark.parametrize('exc', [None, ValueError, KeyboardInterrupt, CancelValidException])
@pytest.mark.parametrize('way', ['validate','fit'])
def test_the_teacher_goes_home_however_a_validation_ends(exc, way, monkeypatch):
    monkeypatch.setattr(Teacher, 'adapt', lambda *args, **kwargs: [])  # which refuses the meta device
    class Fail(Callback):
        def after_pred(self):
            if exc and not self.training and self.iter == 1: raise exc('raised by a test')
    away = Away()
    teacher = Teacher(away)
    learn = learner(metrics=both(teacher))
    def run():
        with learn.added_cbs(Fail()): learn.validate() if way == 'validate' else learn.fit(1)
    if exc in (None, CancelValidException): run()
    else:
        with pytest.raises(exc): run()
    assert away.moves == ['cpu','meta'] and teacher.running is None and not teacher.moved

def test_a_cache_serves_both_metrics():
    spy = Spy()
    learn = learner(metrics=both(Teacher(spy, cache=True)))
    first,second = learn.validate(),learn.validate()
    assert len(spy.seen) <= 4 and first == second  # now and then a cache asks again whether its teacher still says the same

@pytest.mark.parametrize('shared', [True, False])
def test_beside_the_callback(shared):
    model = net(width=6, seed=7)
    teacher = Teacher(model)
    plain,learn = [learner(batches(shuffle=False), metrics=m) for m in (None, both(teacher if shared else model))]
    for l in (plain, learn): l.fit(2, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))
    assert same(weights(plain.model), weights(learn.model)) and teacher.running is None
    assert list(learn.recorder.metric_names)[-4:-1] == ['teacher_agreement','teacher_kl_loss','kd_loss']
    assert list(learn.recorder.values[-1])[2:4] == learn.validate()[1:]
    assert list(KnowledgeDistillationCallback(teacher).teacher_metrics(learn)) == ['loss']

def test_a_recurrent_teacher_starts_each_validation_anew():
    class Counts(nn.Module):
        def __init__(self): super().__init__(); self.n = 0
        def reset(self): self.n = 0
        def forward(self, x): self.n += 1; return F.one_hot(torch.full((len(x),), (self.n-1)%3), 3).float()
    teacher = Teacher(Counts())
    learn = learner(batches(n=32), metrics=TeacherAgreement(teacher))  # 4 batches
    learn.fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))
    assert [list(learn.recorder.values[-1])[2]] == learn.validate()[1:] == learn.validate()[1:]

def test_mixup_and_metrics_on_training_batches():
    learn = learner(metrics=both(net(width=6, seed=7)))
    learn.recorder.train_metrics = True
    learn.fit(1, cbs=MixUp())
    assert all(math.isfinite(v) for v in learn.recorder.values[-1]) and len(learn.recorder.values[-1]) == 6

# --- exports -------------------------------------------------------------------------------------------------------

def test_exports_and_saved_models_leave_it_out(tmp_path):
    plain = exported(tmp_path, 'plain')
    plain.fit(1); plain.export('plain.pkl')
    learn = exported(tmp_path, 'kd', metrics=both(big()))
    learn.fit(1, cbs=SaveModelCallback(fname='best')); learn.export('kd.pkl')
    assert len(learn.metrics) == 2
    assert (tmp_path/'kd.pkl').stat().st_size < (tmp_path/'plain.pkl').stat().st_size + 1000 and not mentions_fastkd(tmp_path/'kd.pkl')
    assert torch.load(tmp_path/'models'/'best.pth').keys() == net().state_dict().keys()
    code = f"import sys; sys.modules['fastkd'] = None\nfrom fastai.basics import load_learner\nprint(len(load_learner({str(tmp_path/'kd.pkl')!r}).metrics))"
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert done.stdout.strip().endswith('0'), done.stderr

def test_a_pickled_metric_keeps_its_teacher():
    metric = pickle.loads(pickle.dumps(TeacherAgreement(big())))
    assert same(weights(metric.teacher.model), weights(big()))

# --- bad input -----------------------------------------------------------------------------------------------------

def test_what_is_no_decision_is_refused():
    learn = learner(rows(5, label=lambda i, g: torch.randn(1, generator=g)), nn.Linear(5,1), loss_func=MSELossFlat(), metrics=TeacherKL(nn.Linear(5,1)))
    with pytest.raises(ValueError, match=r'`TeacherKL` compares classes or yes/no labels, .* of shape \(8, 1\)'): learn.validate()

def test_what_is_no_teacher_is_refused():
    with pytest.raises(TypeError, match='A teacher is a trained model'): TeacherAgreement('resnet34')
    learn = learner(metrics=TeacherAgreement(net(classes=5)))
    with pytest.raises(ValueError, match='5'): learn.validate()

# how sure it is

def test_the_calibration_error_by_hand():
    "over the whole set, and not the mean of batches"
    pytest.importorskip('torchmetrics')
    from fastkd.metrics import CalibrationError
    z,y = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))*2,torch.arange(90) % 4
    dls = DataLoaders(*[DataLoader(list(zip(z, y)), bs=16, num_workers=0)]*2, device=torch.device('cpu'))
    model = nn.Linear(4, 4)
    model.load_state_dict(dict(weight=torch.eye(4), bias=torch.zeros(4)))
    learn = Learner(dls, model, CrossEntropyLossFlat(), metrics=CalibrationError(5))
    with learn.no_bar(), learn.no_logging(): value = learn.validate()[1]
    sure,right = z.softmax(1).max(1).values,(z.argmax(1) == y).float()
    truth = sum(m.sum()/90*(right[m].mean() - sure[m].mean()).abs() for i in range(5) if (m := (sure > i/5) & (sure <= (i+1)/5)).any())
    assert value == pytest.approx(truth.item(), abs=1e-6) and learn.metrics[0].name == 'calibration_error'

def test_the_calibration_error_of_tables_and_of_what_has_no_classes():
    pytest.importorskip('torchmetrics')
    from fastkd.metrics import CalibrationError
    z,y,model = torch.randn(24, 3),torch.arange(24) % 3,nn.Linear(3, 3)
    def value(targets):
        dls = DataLoaders(*[DataLoader(list(zip(z, targets)), bs=8, num_workers=0)]*2, device=torch.device('cpu'))
        learn = Learner(dls, model, lambda *_: torch.tensor(0.), metrics=CalibrationError())
        with learn.no_bar(), learn.no_logging(): return learn.validate()[1]
    assert value(y[:,None]) == value(y)  # fastai's tables
    for targets in (torch.eye(3)[y], torch.eye(3)[y].long()):
        with pytest.raises(ValueError, match='needs a class number for each decision'): value(targets)

def test_trackers_know_that_less_is_better():
    from fastai.callback.tracker import SaveModelCallback
    learn = learner(metrics=TeacherKL(net(seed=1)))
    cb = SaveModelCallback(monitor='teacher_kl_loss')
    learn.fit(1, cbs=cb)
    assert cb.comp == np.less

def test_without_torchmetrics_it_says_what_to_install(monkeypatch):
    import sys
    from fastkd.metrics import CalibrationError
    for name in [n for n in sys.modules if n.startswith('torchmetrics')] or ['torchmetrics']: monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, 'torchmetrics', None)
    with pytest.raises(ImportError, match='pip install torchmetrics'): CalibrationError()
