"Promise 1: what should not be touched is not"
import math, pytest, torch
from torch import nn
from fastai.basics import set_seed
from fastai.callback.mixup import MixUp
from fastkd.all import *
from conftest import batches, learner, net, same, weights

def fitted(cbs=None, epochs=2, dropout=.5, **kwargs):
    set_seed(3)
    learn = learner(model=net(seed=1, dropout=dropout), **kwargs)
    set_seed(4)
    learn.fit_one_cycle(epochs, .1, cbs=cbs)
    return weights(learn.model), torch.rand(1)

class Noisy(nn.Module):
    "A teacher that draws random numbers even in eval mode"
    def __init__(self): super().__init__(); self.net = net(width=6)
    def forward(self, x): return self.net(x + torch.randn_like(x))

@pytest.mark.parametrize('kwargs', [dict(loss=SoftTarget), dict(loss=Attention, activations_student=['bn1','conv2'], activations_teacher=['relu1','conv2']),
                                    dict(loss=[SoftTarget,Logits]), dict(loss=Attention)], ids=['logits','features','list','matched'])
def test_weight_0_is_bit_identical(kwargs):
    plain,rng = fitted()
    kd = KnowledgeDistillationCallback(Noisy() if 'activations_student' not in kwargs and kwargs['loss'] is SoftTarget else net(width=6), weight=0, **kwargs)
    distilled,rng_kd = fitted(kd)
    assert same(plain, distilled) and torch.equal(rng, rng_kd)
    other,_ = fitted(KnowledgeDistillationCallback(net(width=6, seed=7), **{**kwargs, 'weight': .3}))
    assert not same(plain, other)  # or the comparison could not fail

def test_weight_0_with_mixup():
    plain,_ = fitted(MixUp())
    assert same(plain, fitted([MixUp(), KnowledgeDistillationCallback(net(width=6), SoftTarget, weight=0)])[0])

def test_a_live_teacher_draws_no_random_number():
    "A deterministic teacher and a term whose gradient is 0: the same fit, dropout's stream included"
    plain,rng = fitted()
    zero = lambda pred, teacher_pred, fm_s, fm_t: (pred*0).sum()
    kd = KnowledgeDistillationCallback(net(width=6, seed=7, dropout=.5), zero, weight=1., label_weight=1.)
    with pytest.warns(UserWarning, match='exactly 0'): distilled,rng_kd = fitted(kd)
    assert same(plain, distilled) and torch.equal(rng, rng_kd)

def test_the_teacher_is_not_run_where_every_weight_is_0():
    calls = []
    def teacher(x):
        calls.append(len(x))
        return torch.zeros(len(x), 3)
    learner().fit(2, cbs=KnowledgeDistillationCallback(teacher, SoftTarget, weight=0))
    assert not calls
    ran = []
    schedule = lambda p: 0. if p < .5 else 1.
    learn = learner(batches(n=32))  # 4 batches, 2 of validation
    learn.fit(2, cbs=KnowledgeDistillationCallback(teacher, SoftTarget, schedule=schedule))
    assert len(calls) == 4  # from half the training on

def test_a_term_that_is_not_finite_does_no_harm_at_weight_0():
    plain,_ = fitted()
    bad = lambda pred: pred.sum()*math.nan
    assert same(plain, fitted(KnowledgeDistillationCallback(net(), bad, weight=0))[0])
    kd = KnowledgeDistillationCallback(net(seed=7), [bad,SoftTarget], weight=[0,.5])
    one = fitted(KnowledgeDistillationCallback(net(seed=7), SoftTarget, weight=.5))[0]
    assert same(one, fitted(kd)[0])

def test_a_broken_label_loss_does_no_harm_at_label_weight_0():
    learn = learner(loss_func=lambda pred, y: pred.sum()*math.nan)
    learn.fit(1, cbs=KnowledgeDistillationCallback(net(seed=7), SoftTarget, weight=1, label_weight=0))
    assert all(p.isfinite().all() for p in learn.model.parameters())

def test_batchnorm_of_the_teacher_and_counts_stay(teacher):
    before = weights(teacher.train())
    learner().fit(1, cbs=KnowledgeDistillationCallback(teacher, [SoftTarget,Attention], ['bn1'], ['bn1']))
    assert same(before, weights(teacher))

def test_the_students_batchnorm_moves_once_a_batch(teacher):
    learn = learner()
    learn.fit(1, cbs=KnowledgeDistillationCallback(teacher, Attention))
    assert learn.model.bn1.num_batches_tracked == 3
