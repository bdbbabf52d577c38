"Promise 4: nothing is left behind, however a fit ends"
import gc, weakref
import pytest, torch
from fastai.basics import (Callback, CancelBatchException, CancelBackwardException, CancelEpochException, CancelFitException, CancelStepException,
                           CancelTrainException, CancelValidException, set_seed)
from fastai.callback.core import _inner_loop, event
from fastkd.all import *
from fastkd.session import Session
from conftest import batches, hooks, learner, net, same, weights

events = [e for e in vars(event) if e.startswith(('before_','after_')) and e != 'after_create' and 'cancel' not in e]
cancels = [CancelBatchException, CancelBackwardException, CancelEpochException, CancelFitException, CancelStepException, CancelTrainException, CancelValidException]

class Raise(Callback):
    "Raises at the second time of an event (the first, for those that come once)"
    def __init__(self, at, exc, order, valid): self.at,self.exc,self.order,self.n,self.valid = at,exc,order,0,valid
    def __call__(self, name):
        if name != self.at or (name in _inner_loop and self.learn.training == self.valid): return
        self.n += 1
        if self.n == (1 if name.endswith('_fit') else 2): raise self.exc('raised by a test')

def fit(learn, kd, cb=None, own=False):
    set_seed(5)
    if own: learn.add_cb(kd)
    learn.fit(2, cbs=[*([] if own else [kd]), *([cb] if cb else [])])

def distillation(teacher):
    return KnowledgeDistillationCallback(teacher, [SoftTarget,Attention], ['relu1','bn2'], ['bn1','relu2'], weight=.4)

def expected():
    "What a fresh fit gives"
    learn = learner(batches(shuffle=False), model=net(seed=1))
    fit(learn, distillation(net(width=6, seed=7)))
    return weights(learn.model)

@pytest.fixture(scope='module')
def fresh(): return expected()

def begin_anew(learn):
    learn.model.load_state_dict(net(seed=1).state_dict())
    learn.model.zero_grad()  # fastai keeps the gradients of a batch that ended between backward and step
    learn.opt = None

def check_clean(learn, teacher, kd, before):
    assert not hooks(learn.model, teacher)
    assert [m.training for m in teacher.modules()] == before['modes'] and same(before['teacher'], weights(teacher))
    assert all(p.grad is None for p in teacher.parameters())
    assert list(learn.metrics) == [] and learn.loss_func is before['loss_func']
    assert learn.opt is None or [len(o) for o in learn.opt.param_lists] == [len(list(learn.model.parameters()))]
    assert kd.session is None and not [cb for cb in learn.cbs if isinstance(cb, Session)]

@pytest.mark.parametrize('exc', [*cancels, ValueError, KeyboardInterrupt], ids=lambda e: e.__name__)
@pytest.mark.parametrize('at', events)
@pytest.mark.parametrize('order', [-5,5], ids=['before','after'])
def test_ended_at_every_event(at, exc, order, fresh):
    teacher,learn = net(width=6, seed=7),learner(batches(shuffle=False), model=net(seed=1))
    teacher.bn1.eval()
    kd,before = distillation(teacher),{'modes': [m.training for m in teacher.modules()], 'teacher': weights(teacher), 'loss_func': learn.loss_func}
    try: fit(learn, kd, Raise(at, exc, order, valid=False))
    except (ValueError, KeyboardInterrupt, *cancels): pass
    check_clean(learn, teacher, kd, before)
    assert kd.learn is None
    # the next fit gives the numbers of a fresh one
    begin_anew(learn)
    fit(learn, kd)
    assert same(fresh, weights(learn.model))
    check_clean(learn, teacher, kd, before)

@pytest.mark.parametrize('exc', [ValueError, KeyboardInterrupt, CancelFitException, CancelValidException], ids=lambda e: e.__name__)
@pytest.mark.parametrize('at', ['before_batch','after_pred','after_loss','after_batch'])
def test_ended_in_validation(at, exc, fresh):
    teacher,learn = net(width=6, seed=7),learner(batches(shuffle=False), model=net(seed=1))
    kd,before = distillation(teacher),{'modes': [m.training for m in teacher.modules()], 'teacher': weights(teacher), 'loss_func': learn.loss_func}
    try: fit(learn, kd, Raise(at, exc, 5, valid=True))
    except (ValueError, KeyboardInterrupt): pass
    check_clean(learn, teacher, kd, before)

class Broken(torch.nn.Module):
    "Fails in the middle of a forward"
    def __init__(self, exc, at): super().__init__(); self.exc,self.at,self.n = exc,at,0
    def forward(self, x):
        self.n += 1
        if self.n == self.at: raise self.exc('raised by a test')
        return x

@pytest.mark.parametrize('whose', ['student','teacher'])
@pytest.mark.parametrize('exc', [RuntimeError, KeyboardInterrupt], ids=lambda e: e.__name__)
def test_a_forward_that_fails(whose, exc):
    teacher,learn = net(width=6, seed=7),learner(batches(shuffle=False), model=net(seed=1))
    (teacher if whose == 'teacher' else learn.model).drop = Broken(exc, 2)
    kd,before = distillation(teacher),{'modes': [m.training for m in teacher.modules()], 'teacher': weights(teacher), 'loss_func': learn.loss_func}
    with pytest.raises(exc): fit(learn, kd)
    check_clean(learn, teacher, kd, before)

@pytest.mark.parametrize('exc', [ValueError, KeyboardInterrupt], ids=lambda e: e.__name__)
@pytest.mark.parametrize('at', [e for e in events if not e.endswith('fit')])
def test_ended_as_the_learners_own_callback(at, exc, fresh):
    "fastai tells a callback of `Learner(cbs=)` nothing of an error"
    teacher,learn = net(width=6, seed=7),learner(batches(shuffle=False), model=net(seed=1))
    kd,before = distillation(teacher),{'modes': [m.training for m in teacher.modules()], 'teacher': weights(teacher), 'loss_func': learn.loss_func}
    learn.add_cb(kd)
    with pytest.raises(exc): learn.fit(2, cbs=Raise(at, exc, 5, valid=False))
    check_clean(learn, teacher, kd, before)
    begin_anew(learn)
    set_seed(5); learn.fit(2)
    assert same(fresh, weights(learn.model))
    check_clean(learn, teacher, kd, before)
    learn.remove_cb(kd)

@pytest.mark.parametrize('end', [None, ValueError, KeyboardInterrupt, CancelFitException])
def test_no_graph_and_no_activation_lives_on(end):
    alive = []
    def watch(pred, teacher_pred, fm_s, fm_t):
        alive.extend(weakref.ref(t) for t in (pred, teacher_pred, *fm_s.values(), *fm_t.values()))
        return pred.mean()
    teacher,learn = net(width=6, seed=7),learner()
    kd = KnowledgeDistillationCallback(teacher, watch, ['relu1','bn2'], ['relu1','bn2'])
    try: learn.fit(1, cbs=[kd] + ([Raise('after_loss', end, 5, valid=False)] if end else []))
    except (ValueError, KeyboardInterrupt): pass
    learn._end_cleanup(); learn.loss_grad = None  # fastai keeps its last batch after an error
    gc.collect()
    assert alive and not any(r() is not None for r in alive)
