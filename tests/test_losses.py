"The losses on logits, and `Attention`: against closed forms, hand-worked numbers and invariances."
import math, pytest, torch
from torch import nn
import torch.nn.functional as F
from fastkd.losses import *
from fastkd.losses import softmax_kl

torch.set_num_threads(1)
inf = float('inf')

def rand(*shape, seed=0, scale=1., dtype=torch.float64):
    return scale*torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

def hand_kl(s, t, T=1.):
    "KL of softmaxes by Python loops"
    out = []
    for a,b in zip(s.tolist(), t.tolist()):
        za,zb = sum(math.exp(v/T) for v in a), sum(math.exp(v/T) for v in b)
        out.append(sum(math.exp(w/T)/zb * ((w/T - math.log(zb)) - (v/T - math.log(za))) for v,w in zip(a, b)))
    return out

def test_soft_target_is_the_definition():
    s,t = rand(6,5), rand(6,5,seed=1)
    want = 9*sum(hand_kl(s, t, 3))/6
    assert SoftTarget(T=3)(s, t).item() == pytest.approx(want, rel=1e-12)
    assert SoftTarget(T=3)(s.float(), t.float()).item() == pytest.approx(want, rel=1e-6)

def test_soft_target_gradient():
    s,t = rand(6,5).requires_grad_(), rand(6,5,seed=1)
    SoftTarget(T=3)(s, t).backward()
    torch.testing.assert_close(s.grad, 3*(F.softmax(s/3, -1) - F.softmax(t/3, -1)).detach()/6, rtol=1e-12, atol=1e-15)
    assert torch.autograd.gradcheck(lambda s: SoftTarget(T=3)(s, t), s)
    assert torch.autograd.gradgradcheck(lambda s: SoftTarget(T=3)(s, t), s)

def test_soft_target_near_equal_logits_do_not_cancel():
    s = rand(64,100,dtype=torch.float32); t = s + 1e-5*rand(64,100,seed=1,dtype=torch.float32)
    got = SoftTarget(T=100)(s, t).item()
    want = SoftTarget(T=100)(s.double(), t.double()).item()
    assert got >= 0 and abs(got - want) < 1e-8 # the plain sum is off by 1e-3, either sign
    assert (softmax_kl(s, t, 1000.) >= 0).all()

def test_masked_logits():
    s,t = rand(3,5), rand(3,5,seed=1)
    s[:,2] = t[:,2] = -inf
    s.requires_grad_()
    loss = SoftTarget(T=2)(s, t); loss.backward()
    keep = [0,1,3,4]
    assert loss.item() == pytest.approx(4*sum(hand_kl(s.detach()[:,keep], t[:,keep], 2))/3, rel=1e-12)
    assert s.grad.isfinite().all() and (s.grad[:,2] == 0).all()

def test_attention_is_the_definition():
    s,t = rand(2,3,4,4), rand(2,5,8,8,seed=1)
    tp = t.reshape(2,5,4,2,4,2).mean((3,5))
    want = 0
    for a,b in zip(s, tp):
        A,B = (sum(ch**2 for ch in x).flatten()/len(x) for x in (a, b))
        want += ((A/A.square().sum().sqrt() - B/B.square().sum().sqrt())**2).sum().item()/32
    assert Attention()({'a':s}, {'a':t}).item() == pytest.approx(want, rel=1e-12)
    assert Attention()({'a':s, 'b':s}, {'a':t, 'b':t}).item() == pytest.approx(2*want, rel=1e-12)

def test_attention_of_odd_power_does_not_cancel_signs():
    x = rand(2,3,4,4)
    assert Attention(p=3)({0: x}, {0: -x}).item() == 0

def test_attention_of_a_dead_map_is_finite():
    s = torch.zeros(2,3,4,4, requires_grad=True)
    loss = Attention()({0: s}, {0: torch.rand(2,3,4,4)}); loss.backward()
    assert loss.isfinite() and s.grad.isfinite().all()
