"The losses on logits, and `Attention`: against hand loops, closed forms, invariances and limits."
import copy, inspect, math, pickle, pytest, torch
from functools import partial
from torch import nn, tensor
import torch.nn.functional as F
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from torch.autograd import gradcheck, gradgradcheck
from fastkd.losses import *
from fastkd.feature_losses import Attention, FeatureLoss, attention_map
from fastkd.losses import mean_softmax_kl, pearson, softmax_kl, standardize_rows

torch.set_num_threads(1)
inf = float('inf')

def rand(*shape, seed=0, scale=1., dtype=torch.float64):
    return (scale*torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)

LABELS = tensor([2,0,4,1,3,2])
def grad(loss, s, *args, **kw):
    "Value and gradient of `loss` at `s`"
    s = s.clone().requires_grad_()
    value = loss(s, *args, **kw)
    return value.item(), torch.autograd.grad(value, s)[0]

# ---- the definitions, by loops over Python numbers

def softmax(z, T=1.):
    e = [math.exp((v-max(z))/T) for v in z]
    return [v/sum(e) for v in e]
def kl(p, q): return sum(a*math.log(a/b) for a,b in zip(p, q))
def rows(f): return lambda s,t,*a: sum(f(*r) for r in zip(s.tolist(), t.tolist(), *(x.tolist() for x in a)))/len(s)
def zscore(z):
    m = sum(z)/len(z); sd = math.sqrt(sum((v-m)**2 for v in z)/(len(z)-1))
    return [(v-m)/(1e-7+sd) for v in z]
def drop(z, y): return z[:y]+z[y+1:]
def binary(p, y): return [p[y], sum(drop(p, y))]

def hand_dkd(s, t, y, alpha=1., beta=8., T=4.):
    return T*T*(alpha*kl(binary(softmax(t,T),y), binary(softmax(s,T),y)) + beta*kl(softmax(drop(t,y),T), softmax(drop(s,y),T)))
def hand_nkd(s, t, y, gamma=1.5, T=1.):
    others = sum(a*math.log(b) for a,b in zip(softmax(drop(t,y),T), softmax(drop(s,y),T)))
    return -softmax(t)[y]*math.log(softmax(s)[y]) - gamma*T*T*others
def hand_rho(a, b):
    a,b = ([v-sum(x)/len(x) for v in x] for x in (a,b))
    dot = lambda x,y: sum(u*v for u,v in zip(x,y))
    return dot(a,b)/(math.sqrt(dot(a,a))*math.sqrt(dot(b,b))+1e-8)
def hand_dist(s, t, beta=1., gamma=1., T=1.):
    p,q = ([softmax(r,T) for r in z.tolist()] for z in (s,t))
    inter = sum(map(hand_rho, p, q))/len(p)
    intra = sum(map(hand_rho, zip(*p), zip(*q)))/len(p[0])
    return T*T*(beta*(1-inter) + gamma*(1-intra))
def hand_binary(s, t, T=2.):
    sig = lambda v: 1/(1+math.exp(-v/T))
    return T*T*sum(kl([sig(b),1-sig(b)], [sig(a),1-sig(a)]) for a,b in zip(s,t))/len(s)
def hand_cwd(s, t, T=1.):
    s,t = s.flatten(2).tolist(), t.flatten(2).tolist()
    return T*T*sum(kl(softmax(b,T), softmax(a,T)) for x,y in zip(s,t) for a,b in zip(x,y))/(len(s)*len(s[0]))

LOGIT = { # loss, its definition, does it take labels
    'SoftTarget':     (SoftTarget(), rows(lambda s,t: 25*kl(softmax(t,5), softmax(s,5))), False),
    'SoftTarget T=1': (SoftTarget(T=1), rows(lambda s,t: kl(softmax(t), softmax(s))), False),
    'standardized':   (SoftTarget(standardize=True), rows(lambda s,t: 4*kl(softmax(zscore(t),2), softmax(zscore(s),2))), False),
    'Mutual':         (Mutual(), rows(lambda s,t: kl(softmax(t), softmax(s))), False),
    'Logits':         (Logits(), rows(lambda s,t: sum((a-b)**2 for a,b in zip(s,t))/len(s)), False),
    'DecoupledKD':    (DecoupledKD(), rows(hand_dkd), True),
    'DecoupledKD 2':  (DecoupledKD(alpha=2, beta=.5, T=2), rows(lambda *a: hand_dkd(*a, 2., .5, 2.)), True),
    'NormalizedKD':   (NormalizedKD(), rows(hand_nkd), True),
    'NormalizedKD 2': (NormalizedKD(gamma=.5, T=3), rows(lambda *a: hand_nkd(*a, .5, 3.)), True),
    'DIST':           (DIST(), hand_dist, False),
    'DIST 2':         (DIST(beta=2, gamma=.5, T=4), lambda s,t: hand_dist(s,t,2.,.5,4.), False),
    'BinarySoftTarget': (BinarySoftTarget(), rows(hand_binary), False),
}
logit_losses = pytest.mark.parametrize('loss,hand,labels', LOGIT.values(), ids=LOGIT)
NEW = [SoftTarget, lambda: SoftTarget(standardize=True), Logits, Mutual, DecoupledKD, NormalizedKD, DIST, BinarySoftTarget]
def args_for(loss, y): return (y,) if isinstance(loss, (DecoupledKD,NormalizedKD)) else ()

@logit_losses
def test_is_the_definition(loss, hand, labels):
    s,t,y = rand(6,5,scale=2), rand(6,5,scale=2,seed=1), (LABELS,)*labels
    want = hand(s, t, *y)
    assert loss(s, t, *y).item() == pytest.approx(want, rel=1e-12)
    assert loss(s.float(), t.float(), *y).item() == pytest.approx(hand(s.float(), t.float(), *y), rel=1e-6)

@logit_losses
def test_gradient(loss, hand, labels):
    s,t,y = rand(6,5), rand(6,5,seed=1), (LABELS,)*labels
    f = lambda s: loss(s, t, *y)
    assert gradcheck(f, s.clone().requires_grad_())
    assert gradgradcheck(f, s.clone().requires_grad_())
    g,g32 = grad(loss, s, t, *y)[1], grad(loss, s.float(), t.float(), *y)[1]
    torch.testing.assert_close(g32.double(), g, rtol=0, atol=1e-6*g.abs().max().item())

@logit_losses
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_finite_for_extreme_logits(loss, hand, labels, dtype):
    big = tensor([[1e4,-1e4,0,1e4,-1e4],[-1e4]*5,[1e4]*5,[0.]*5,[0,0,1e4,0,0],[-1e4,0,0,0,0]], dtype=dtype)
    for s,t in ((big, big.flip(1)), (big, big), (big, -big), (big.flip(0), big), (big*0, big), (big, big*0)):
        value,g = grad(loss, s, t, *(LABELS,)*labels)
        assert math.isfinite(value) and g.isfinite().all()

@logit_losses
def test_batch_of_one_is_finite(loss, hand, labels):
    value,g = grad(loss, rand(1,5), rand(1,5,seed=1), *(LABELS[:1],)*labels)
    assert math.isfinite(value) and g.isfinite().all()

@logit_losses
@pytest.mark.parametrize('half', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(loss, hand, labels, half):
    s,t,y = rand(6,5,dtype=half), rand(6,5,seed=1,dtype=half), (LABELS,)*labels
    want = loss(s.float(), t.float(), *y)
    with torch.autocast('cpu', torch.bfloat16): got = loss(s.requires_grad_(), t, *y)
    assert got.dtype is torch.float32 and got.item() == want.item()
    got.backward()
    assert s.grad.dtype is half and s.grad.isfinite().all()

@logit_losses
def test_class_axis_and_positions(loss, hand, labels):
    s,t,y = rand(2,5,3,4), rand(2,5,3,4,seed=1), torch.randint(0, 5, (2,3,4), generator=torch.Generator().manual_seed(2))
    flat = lambda z: z.permute(0,2,3,1).reshape(-1,5)
    if isinstance(loss, BinarySoftTarget): return # has no classes
    want = loss(flat(s), flat(t), *(y.flatten(),)*labels).item()
    assert loss(s, t, *(y,)*labels, axis=1).item() == pytest.approx(want, rel=1e-12)
    last = [z.permute(0,2,3,1) for z in (s,t)]
    assert loss(*last, *(y,)*labels).item() == pytest.approx(want, rel=1e-12)

@logit_losses
def test_ignored_positions_do_not_count(loss, hand, labels):
    if isinstance(loss, BinarySoftTarget): return
    s,t,y = rand(2,3,5), rand(2,3,5,seed=1), LABELS.view(2,3).clone()
    y[0,1] = y[1,2] = -100
    s[0,1],t[1,2] = inf,float('nan') # whatever stands there
    keep = y.flatten() != -100
    kept = [z.reshape(-1,5)[keep] for z in (s,t)]
    want = loss(*kept, target=y.flatten()[keep]) if labels else loss(*kept)
    value,g = grad(lambda s: loss(pred=s, teacher_pred=t, target=y, ignore_index=-100), s)
    assert value == pytest.approx(want.item(), rel=1e-12)
    assert g.isfinite().all() and (g.reshape(-1,5)[~keep] == 0).all()
    nothing = loss(pred=s, teacher_pred=t, target=torch.full_like(y, -100), ignore_index=-100)
    assert nothing.item() == 0

@logit_losses
def test_teacher_gets_no_gradient(loss, hand, labels):
    s,t = rand(6,5).requires_grad_(), rand(6,5,seed=1).requires_grad_()
    loss(s, t, *(LABELS,)*labels).backward()
    assert t.grad is None and s.grad.abs().sum() > 0

@logit_losses
def test_protocol(loss, hand, labels):
    "Keywords, subclasses of tensors, copies and pickles"
    class Image(torch.Tensor): pass
    s,t,y = rand(6,5), rand(6,5,seed=1), dict(target=LABELS)
    want = loss(s, t, **y) if labels else loss(s, t)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        got = other(pred=s.as_subclass(Image), teacher_pred=t.as_subclass(Image), **(y if labels else {}))
        assert type(got) is torch.Tensor and got.item() == want.item()
    assert not list(loss.parameters()) and len(loss.paper) == 2

@pytest.mark.parametrize('new', NEW)
def test_errors_of_shapes(new):
    loss = new(); y = args_for(loss, tensor([0,1]))
    with pytest.raises(ValueError, match='same classes'): loss(rand(2,5), rand(2,4), *y)
    if not isinstance(loss, (BinarySoftTarget,Logits)):
        with pytest.raises(ValueError, match='column|classes'): loss(rand(2,1), rand(2,1), *y)

def test_single_column_where_it_makes_sense():
    s,t = rand(4,1), rand(4,1,seed=1)
    assert Logits()(s, t).item() == pytest.approx(sum((a-b)**2 for a,b in zip(s.flatten().tolist(), t.flatten().tolist()))/4)
    assert BinarySoftTarget()(s, t).item() == pytest.approx(sum(hand_binary([a],[b]) for a,b in zip(s.flatten().tolist(), t.flatten().tolist()))/4)

@pytest.mark.parametrize('new', [SoftTarget, DecoupledKD, NormalizedKD, DIST, BinarySoftTarget, ChannelWise])
def test_temperature_is_checked_and_may_be_a_schedule(new):
    for T in (0, -1, float('nan'), inf):
        with pytest.raises(ValueError, match='above 0'): new(T=T)
    s,t = (rand(2,5,3,3), rand(2,5,3,3,seed=1)) if new is ChannelWise else (rand(2,5), rand(2,5,seed=1))
    y = args_for(new(), tensor([0,1]))
    loss = new(T=lambda p: 8-7*p)
    assert loss(s, t, *y, pct_train=.5).item() == new(T=4.5)(s, t, *y).item()
    with pytest.raises(ValueError, match='pct_train'): loss(s, t, *y)
    with pytest.raises(ValueError, match='above 0'): loss(s, t, *y, pct_train=2.)

def test_temperature_by_fastai_annealer():
    from fastai.callback.schedule import SchedCos
    s,t = rand(2,5), rand(2,5,seed=1)
    assert SoftTarget(T=SchedCos(8, 1))(s, t, pct_train=1.).item() == pytest.approx(Mutual()(s, t).item())
    assert [str(SoftTarget(T=T)) for T in (SchedCos(8, 1),partial(max, 2))] == ['SoftTarget(T=sched_cos)','SoftTarget(T=max)']  # no address

# ---- the contract

SIGNATURES = {
    SoftTarget: "(T='auto', standardize=False)", Mutual: '()', Logits: '()', DecoupledKD: '(alpha=1.0, beta=8.0, T=4.0)', NormalizedKD: '(gamma=1.5, T=1.0)',
    DIST: '(beta=1.0, gamma=1.0, T=1.0)', BinarySoftTarget: '(T=2.0)', ChannelWise: '(T=1.0)', KDLoss: '()', FeatureLoss: '(layers=None, channel_axis=None)'}

@pytest.mark.parametrize('loss', SIGNATURES, ids=lambda l: l.__name__)
def test_the_signature_shows_what_counts(loss): assert str(inspect.signature(loss)) == SIGNATURES[loss]

def test_temperature_of_soft_target():
    "The default depends on `standardize`; a number that is given counts"
    got = {o: eval(o, dict(SoftTarget=SoftTarget)) for o in ('SoftTarget()', 'SoftTarget(T=4)', 'SoftTarget(7)', 'SoftTarget(standardize=True)', 'SoftTarget(T=5, standardize=True)')}
    assert [l.T for l in got.values()] == [5,4,7,2,5]
    assert [l.paper for l in got.values()] == [(.1,.9)]*3 + [(.1,9.)]*2
    for T in ('automatic', 'none'):
        with pytest.raises(ValueError, match='above 0'): SoftTarget(T=T)

def test_which_losses_need_all_logits():
    "`Teacher(topk=)` keeps the probabilities of the largest logits at T=1, and the mass of the rest"
    class Mine(KDLoss):
        def forward(self, pred, teacher_pred): return (pred - teacher_pred).abs().mean()
    all_ = Logits(), DIST(), SoftTarget(standardize=True), ChannelWise(), BinarySoftTarget(), DecoupledKD(), Mine(), as_loss(lambda pred, teacher_pred: 0.)
    assert all(l.needs_all_logits for l in all_)
    assert not any(l.needs_all_logits for l in (SoftTarget(), SoftTarget(T=1), Mutual(), NormalizedKD()))

# ---- SoftTarget

def test_soft_target_gradient_in_closed_form():
    s,t = rand(6,5), rand(6,5,seed=1)
    want = 3*(F.softmax(s/3, -1) - F.softmax(t/3, -1))/6
    torch.testing.assert_close(grad(SoftTarget(T=3), s, t)[1], want, rtol=1e-12, atol=1e-15)

@pytest.mark.parametrize('T', [1, 5, 100])
def test_soft_target_is_zero_and_stationary_at_the_teacher(T):
    for dtype in (torch.float32, torch.float64):
        s = rand(64,100,dtype=dtype)
        value,g = grad(SoftTarget(T=T), s, s)
        assert value == 0 and (g == 0).all()

def test_mean_softmax_kl_is_the_mean_of_the_rows():
    for shape in ((6,5), (2,3,5)):
        s,t = rand(*shape).requires_grad_(), rand(*shape, seed=1)
        assert mean_softmax_kl(s, t, 3.).item() == pytest.approx(9*softmax_kl(s, t, 3.).mean().item(), rel=1e-12)
        for create_graph in (False,True):
            got,want = (torch.autograd.grad(l, s, create_graph=create_graph)[0] for l in (mean_softmax_kl(s, t, 3.), 9*softmax_kl(s, t, 3.).mean()))
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)
        assert gradcheck(lambda s: mean_softmax_kl(s, t, 3.), s) and gradgradcheck(lambda s: mean_softmax_kl(s, t, 3.), s)
    none = torch.zeros(0,5, requires_grad=True)
    mean_softmax_kl(none, torch.zeros(0,5)).backward()
    assert none.grad.shape == (0,5)

def test_two_classes_leave_standardized_logits_and_correlations_of_rows_nothing_to_say():
    "Both are a step of which class is ahead, with a gradient only where it leaps, and a huge one there: refused, with the cure"
    s,t = rand(6,2).requires_grad_(), rand(6,2,seed=1)
    for value in (standardize_rows(s), pearson(s.softmax(-1), t.softmax(-1))):
        torch.testing.assert_close(value.abs(), torch.full_like(value, .5**.5 if value.ndim == 2 else 1.), rtol=1e-5, atol=0)
        assert torch.autograd.grad(value.abs().sum(), s)[0].abs().max() < 1e-4
    for loss,cure in ((SoftTarget(standardize=True), r'use `SoftTarget\(\)`'), (DIST(), r'`DIST\(beta=0\)`'), (DecoupledKD(), 'use `SoftTarget`')):
        with pytest.raises(ValueError, match=cure): loss(s, t, *([tensor([0,1]*3)] if isinstance(loss, DecoupledKD) else []))
        with pytest.raises(ValueError, match=cure): loss(s.reshape(3,2,2), t.reshape(3,2,2), target=tensor([0,1]*3).reshape(3,2), axis=1)
    columns = torch.stack([torch.corrcoef(torch.stack([a,b]))[0,1] for a,b in zip(s.softmax(-1).T, t.softmax(-1).T)])
    assert DIST(beta=0)(s, t).item() == pytest.approx(1-columns.mean().item(), rel=1e-6)

def test_a_logit_that_is_no_number_shows():
    for f in (softmax_kl, mean_softmax_kl):
        for i in range(2):
            z = [rand(2,5), rand(2,5,seed=1)]
            z[i][0,2] = math.nan
            assert f(*z).isnan().any()

def test_soft_target_near_equal_logits_do_not_go_negative():
    "The plain sum of single precision is off by 1e-7 a row, either sign; times T² that is 1e-3 at T=100"
    s = rand(256,100,dtype=torch.float32); t = s + 1e-3*rand(256,100,seed=1,dtype=torch.float32)
    plain = F.kl_div((s/100).log_softmax(-1), (t/100).log_softmax(-1), reduction='none', log_target=True).sum(-1)
    got,want = softmax_kl(s, t, 100.), softmax_kl(s.double(), t.double(), 100.)
    assert plain.min() < -1e-7 and (plain-want).abs().max() > 1e-7
    assert (got >= 0).all() and (got-want).abs().max() < 2e-8
    assert SoftTarget(T=1000.)(s, t).item() >= 0

@pytest.mark.parametrize('T', [1, 5, 20, 100])
@pytest.mark.parametrize('noise', [1e-1, 1e-3, 1e-4])
@pytest.mark.parametrize('C', [10, 1000])
def test_near_equal_logits_keep_their_digits(T, noise, C):
    "In single precision, value and gradient agree with double precision, however high the temperature"
    s = rand(64,C,dtype=torch.float32); t = s + noise*rand(64,C,seed=1,dtype=torch.float32)
    p_s,p_t = ((z.double()/T).softmax(-1) for z in (s,t))
    d = (s.double() - t.double())/T  # the divergence of logits that differ by d is log E[exp(d)] - E[d] over p_t
    want = T*T*((d.exp()*p_t).sum(-1).log() - (p_t*d).sum(-1)).mean().item()
    value,g = grad(SoftTarget(T=T), s, t)
    exact = T*(p_s - p_t)/64
    assert value == pytest.approx(want, rel=5e-6)
    assert (g.double() - exact).norm() <= 1e-6*exact.norm()

def test_near_equal_logits_in_the_siblings():
    s,y = rand(64,100,dtype=torch.float32), torch.arange(64)
    t = s + 1e-3*rand(64,100,seed=1,dtype=torch.float32)
    for loss,tol in ((BinarySoftTarget(T=20.), 1e-5), (Logits(), 1e-6), (SoftTarget(standardize=True), 5e-3), (DecoupledKD(T=20.), 5e-3)):
        labels = (y,) if isinstance(loss, DecoupledKD) else ()
        (value,g),(want,exact) = grad(loss, s, t, *labels),grad(loss, s.double(), t.double(), *labels)
        assert value == pytest.approx(want, rel=tol) and (g.double()-exact).norm() <= tol*exact.norm()
    maps = lambda z: z.reshape(16,4,10,10)
    (value,g),(want,exact) = (grad(ChannelWise(T=20.), maps(s.to(d)), maps(t.to(d))) for d in (torch.float32,torch.float64))
    assert value == pytest.approx(want, rel=5e-6) and (g.double()-exact).norm() <= 1e-6*exact.norm()

@pytest.mark.parametrize('shape', [(3,70_000), (500,400), (0,5)], ids=str)
def test_soft_target_in_blocks(shape):
    "Rows are worked through some at a time; also of tensors that are not contiguous"
    s,t = rand(*shape[::-1]).T, rand(*shape[::-1], seed=1).T
    want = F.kl_div((s/3).log_softmax(-1), (t/3).log_softmax(-1), reduction='none', log_target=True).sum(-1)
    torch.testing.assert_close(softmax_kl(s, t, 3.), want, rtol=1e-9, atol=1e-12)
    value,g = grad(lambda s: mean_softmax_kl(s, t, 3.), s)
    assert value == pytest.approx(9*want.mean().item() if len(want) else 0, rel=1e-9)
    torch.testing.assert_close(g, 3*((s/3).softmax(-1) - (t/3).softmax(-1))/max(len(s), 1), rtol=1e-9, atol=1e-12)

def test_soft_target_at_high_temperature_matches_centered_logits():
    s,t = rand(6,10), rand(6,10,seed=1)
    centered = (s-s.mean(-1,True)) - (t-t.mean(-1,True))
    assert SoftTarget(T=1e5)(s, t).item() == pytest.approx(centered.square().mean().item()/2, rel=1e-4)

def test_soft_target_ignores_a_shift_and_standardized_the_scale():
    s,t = rand(6,5), rand(6,5,seed=1)
    shift,scale = rand(6,1,seed=2), rand(6,1,seed=3).abs()
    assert SoftTarget()(s+shift, t).item() == pytest.approx(SoftTarget()(s, t).item(), rel=1e-10)
    std = SoftTarget(standardize=True)
    assert std(scale*s+shift, t).item() == pytest.approx(std(s, t).item(), rel=1e-5)

@logit_losses
def test_classes_masked_in_both(loss, hand, labels):
    "A class that is `-inf` in both models is left out: the loss of the other classes alone"
    s,t,keep,y = rand(6,5,scale=2), rand(6,5,scale=2,seed=1), [0,1,3,4], tensor([1,0,4,1,3,0])
    want = hand(s[:,keep], t[:,keep], *(tensor([keep.index(i) for i in y.tolist()]),)*labels)
    s[:,2] = t[:,2] = -inf
    value,g = grad(loss, s, t, *(y,)*labels)
    assert value == pytest.approx(want, rel=1e-12)
    assert g.isfinite().all() and (g[:,2] == 0).all()
    assert loss(s.float(), t.float(), *(y,)*labels).item() == pytest.approx(want, rel=1e-5)

def test_other_classes_masked_in_each_row():
    s,t,m = rand(6,5,scale=2), rand(6,5,scale=2,seed=1), tensor([[0,1,0,0,0],[0]*5,[0,0,1,1,0],[1,0,0,0,0],[0]*5,[0,0,0,0,1]]).bool()
    kept = [[[z[i,j].item() for j in range(5) if not m[i,j]] for i in range(6)] for z in (s,t)]
    s[m] = t[m] = -inf
    mean = lambda f, rows: sum(f(a,b) for a,b in rows)/len(rows)
    flat = [sum(rows, []) for rows in kept]
    assert Logits()(s, t).item() == pytest.approx(mean(lambda a,b: (a-b)**2, list(zip(*flat))), rel=1e-12)
    assert BinarySoftTarget()(s, t).item() == pytest.approx(mean(lambda a,b: hand_binary([a],[b]), list(zip(*flat))), rel=1e-12)
    assert SoftTarget(T=3)(s, t).item() == pytest.approx(mean(lambda a,b: 9*kl(softmax(b,3), softmax(a,3)), list(zip(*kept))), rel=1e-12)
    p,q = ([softmax(r) for r in rows] for rows in kept)
    columns = []
    for j in range(5):
        rows = [i for i in range(6) if not m[i,j]]
        at = [int((~m[i,:j]).sum()) for i in rows]
        columns.append(hand_rho([p[i][k] for i,k in zip(rows,at)], [q[i][k] for i,k in zip(rows,at)]))
    assert DIST()(s, t).item() == pytest.approx(2 - mean(hand_rho, list(zip(p,q))) - sum(columns)/5, rel=1e-12)

def test_channel_masked_in_both():
    "A class that segmentation models of one body do not have"
    s,t,keep = rand(2,4,3,3), rand(2,4,3,3,seed=1), [0,2,3]
    want = hand_cwd(s[:,keep], t[:,keep])
    s[:,1] = t[:,1] = -inf
    value,g = grad(ChannelWise(), s, t)
    assert value == pytest.approx(want, rel=1e-12) and g.isfinite().all() and (g[:,1] == 0).all()

def test_a_mask_hides_no_nan():
    for loss in (Logits(), DIST(), BinarySoftTarget(), SoftTarget()):
        for i in range(2):
            z = [rand(3,5), rand(3,5,seed=1)]
            z[0][:,2] = z[1][:,2] = -inf
            z[i][1,1] = math.nan
            assert math.isnan(loss(*z).item())

def test_masked_classes_in_the_other_losses():
    s,t,y,keep = rand(6,6), rand(6,6,seed=1), LABELS, [0,1,2,3,4]
    s[:,5] = t[:,5] = -inf
    for loss in (DecoupledKD(), NormalizedKD()):
        value,g = grad(loss, s, t, y)
        assert value == pytest.approx(loss(s[:,keep], t[:,keep], y).item(), rel=1e-12) and g.isfinite().all()
    value,g = grad(DIST(), s, t)
    assert math.isfinite(value) and g.isfinite().all()

def test_mask_in_one_model_only():
    s,t = rand(3,5), rand(3,5,seed=1)
    masked = s.clone(); masked[:,2] = -inf
    assert SoftTarget()(masked, t).item() == inf      # the student holds for impossible what the teacher does not
    p,q = softmax(s[0].tolist()), softmax(drop(t[0].tolist(), 2))
    t2 = t[:1].clone(); t2[:,2] = -inf
    assert Mutual()(s[:1], t2).item() == pytest.approx(kl(q, drop(p, 2)), rel=1e-12)

def test_nan_is_not_hidden():
    s = rand(3,5); s[1,1] = float('nan')
    assert math.isnan(SoftTarget()(s, rand(3,5)).item()) and math.isnan(SoftTarget()(rand(3,5), s).item())

def test_not_the_known_mistakes():
    "Probabilities for log-probabilities, 'mean' for 'batchmean', batchmean over pixels"
    s,t = rand(8,10,dtype=torch.float32), rand(8,10,seed=1,dtype=torch.float32)
    want = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction='batchmean').item()
    assert Mutual()(s, t).item() == pytest.approx(want, rel=1e-5)
    one = Mutual()(s[:,:,None,None], t[:,:,None,None], axis=1).item()
    many = Mutual()(*(z[:,:,None,None].expand(-1,-1,16,16) for z in (s,t)), axis=1).item()
    assert one == pytest.approx(want, rel=1e-5) and many == pytest.approx(want, rel=1e-5)

def test_soft_target_keeps_less_for_the_backward_pass_than_the_composition():
    def kept(f):
        s,t = rand(8,1000).requires_grad_(), rand(8,1000,seed=1); ours = {s.data_ptr(), t.data_ptr()}; seen = {}
        def pack(x):
            if x.data_ptr() not in ours: seen[x.data_ptr()] = x.numel()
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x): out = f(s, t)
        return sum(seen.values()), out
    n,_ = kept(SoftTarget()); m,_ = kept(lambda s,t: 25*F.kl_div((s/5).log_softmax(-1), (t/5).log_softmax(-1), reduction='batchmean', log_target=True))
    assert n < 8100 and m > 15900

def test_label_vectors_do_not_disturb():
    "`ignore_index` concerns indices; with labels that are probabilities, nothing is left out"
    s,t = rand(6,5), rand(6,5,seed=1)
    assert SoftTarget()(s, t, target=F.one_hot(LABELS, 5).double(), ignore_index=-100).item() == SoftTarget()(s, t).item()

def test_arguments_are_not_dropped():
    s = rand(6,5)
    with pytest.raises((TypeError,ValueError)): Logits()(s, s, LABELS, -1, -100, 0., 0.)
    with pytest.raises(TypeError): SoftTarget()(s, s, pred=s)
    with pytest.raises(TypeError): SoftTarget()(s, s, temperature=3)

def test_labels_of_the_wrong_number():
    with pytest.raises(ValueError, match='one label for each position'): DecoupledKD()(rand(6,5), rand(6,5), LABELS[:4])
    with pytest.raises(ValueError, match='one label for each position'): SoftTarget()(rand(6,5), rand(6,5), target=LABELS[:4], ignore_index=-100)

# ---- DecoupledKD, NormalizedKD

def test_decoupled_parts_sum_to_the_soft_target():
    s,t,y = rand(6,5), rand(6,5,seed=1), LABELS
    for i in range(6):
        rest = 1 - softmax(t[i].tolist(), 4)[y[i]]
        assert DecoupledKD(alpha=1, beta=rest)(s[i:i+1], t[i:i+1], y[i:i+1]).item() == pytest.approx(SoftTarget(T=4)(s[i:i+1], t[i:i+1]).item(), rel=1e-12)

def test_decoupled_needs_three_classes_and_labels():
    with pytest.raises(ValueError, match='always 0'): DecoupledKD()(rand(2,2), rand(2,2), tensor([0,1]))
    for loss in (DecoupledKD(), NormalizedKD()):
        with pytest.raises(ValueError, match='class labels'): loss(rand(2,5), rand(2,5), rand(2,5))
        with pytest.raises(TypeError, match='target'): loss(pred=rand(2,5), teacher_pred=rand(2,5))

def test_decoupled_for_a_very_sure_student():
    "Value by hand: the student is sure of class 0 by a logit of d; the teacher is uniform"
    d,C = 1e4,10
    s = torch.zeros(1,C); s[0,0] = d
    tckd = (1/C)*math.log(1/C) + (1-1/C)*(math.log(1-1/C) + d/4 - math.log(C-1))
    assert DecoupledKD()(s, torch.zeros(1,C), tensor([0])).item() == pytest.approx(16*tckd, rel=1e-6)
    assert DecoupledKD(alpha=0)(s, torch.zeros(1,C), tensor([0])).item() == 0

def test_normalized_kd_is_least_at_the_teacher_for_other_classes():
    t,y = rand(6,5), LABELS
    loss = lambda s: (NormalizedKD(gamma=1.)(s, t, y) - NormalizedKD(gamma=0.)(s, t, y)).item()
    entropy = sum(-sum(p*math.log(p) for p in softmax(drop(r, c))) for r,c in zip(t.tolist(), y.tolist()))/6
    assert loss(t) == pytest.approx(entropy, rel=1e-12)
    assert all(loss(t + .1*rand(6,5,seed=i)) > loss(t) for i in range(1,5))

def test_warm_up_is_stated():
    assert DecoupledKD.warmup_epochs == 20 and SoftTarget.warmup_epochs == 0

# ---- DIST

def test_pearson_under_affine_maps():
    x,y = rand(6,20), rand(6,20,seed=1)
    a,b = rand(6,1,seed=2).abs()+.1, rand(6,1,seed=3)
    torch.testing.assert_close(pearson(a*x+b, y), pearson(x, y), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(pearson(-x, y), -pearson(x, y))

def test_dist_rows_ignore_an_affine_map_of_probabilities():
    p = rand(6,10).softmax(-1)
    q = .5*p + .5/10 # still probabilities
    rows_only = DIST(gamma=0)
    assert rows_only(q.log(), p.log()).item() == pytest.approx(0, abs=1e-6)
    assert rows_only(rand(6,10,seed=1), p.log()).item() > .1

# ---- ChannelWise

def test_channel_wise_is_the_definition():
    s,t = rand(2,3,4,5), rand(2,3,4,5,seed=1)
    for T in (1.,4.):
        assert ChannelWise(T=T)(s, t).item() == pytest.approx(hand_cwd(s, t, T), rel=1e-12)
        assert ChannelWise(T=T)(s.float(), t.float()).item() == pytest.approx(hand_cwd(s.float(), t.float(), T), rel=1e-6)
    assert ChannelWise()(s.movedim(1,-1), t.movedim(1,-1), axis=-1).item() == pytest.approx(hand_cwd(s, t), rel=1e-12)
    assert gradcheck(lambda s: ChannelWise()(s, t), s.clone().requires_grad_())

def test_channel_wise_needs_space():
    with pytest.raises(ValueError, match='space'): ChannelWise()(rand(2,5), rand(2,5))
    with pytest.raises(ValueError, match='resize'): ChannelWise()(rand(2,5,3,3), rand(2,5,4,4))
    with pytest.raises(ValueError, match='same classes'): ChannelWise()(rand(2,5,3,3), rand(2,4,3,3))
    value,g = grad(ChannelWise(), 1e4*rand(2,3,4,4).sign(), torch.zeros(2,3,4,4, dtype=torch.float64))
    assert math.isfinite(value) and g.isfinite().all()

# ---- Attention

def hand_attention(s, t, p=2):
    "On maps of one size"
    total = 0
    for a,b in zip(s, t):
        A,B = (sum(ch.abs()**p for ch in x).flatten()/len(x) for x in (a, b))
        A,B = (x/math.sqrt(sum(v*v for v in x.tolist())) for x in (A, B))
        total += sum((u-v)**2 for u,v in zip(A.tolist(), B.tolist()))/len(A)
    return total/len(s)

def test_attention_is_the_definition():
    s,t = rand(2,3,4,4), rand(2,5,8,8,seed=1)
    small = t.reshape(2,5,4,2,4,2).mean((3,5))
    for p in (1,2,3,4):
        want = hand_attention(s, small, p)
        assert Attention(p=p)({'a':s}, {'a':t}).item() == pytest.approx(want, rel=1e-12)
        assert Attention(p=p)({'a':t}, {'a':s}).item() == pytest.approx(want, rel=1e-12)
        assert Attention(p=p)({'a':s.float()}, {'a':t.float()}).item() == pytest.approx(hand_attention(s.float().double(), small.float().double(), p), rel=2e-6)
    assert gradcheck(lambda s: Attention()({0:s}, {0:t}), s.clone().requires_grad_())

def test_attention_sums_over_pairs_in_order():
    a,b,c,d = (rand(2,3,4,4,seed=i) for i in range(4))
    want = hand_attention(a, b) + hand_attention(c, d)
    assert Attention()({('l1','x'):a, ('l2','y'):c}, {('l1','x'):b, ('l2','y'):d}).item() == pytest.approx(want, rel=1e-12)
    assert Attention()({0:a, 1:a}, {0:b, 1:d}).item() == pytest.approx(hand_attention(a,b)+hand_attention(a,d), rel=1e-12)

def test_attention_ignores_order_sign_and_scale_of_channels():
    s,t = rand(2,6,4,4), rand(2,3,4,4,seed=1)
    for p in (1,2,3):
        value = Attention(p=p)({0:s}, {0:t}).item()
        assert Attention(p=p)({0:-3*s[:,[2,0,5,1,4,3]]}, {0:t}).item() == pytest.approx(value, rel=1e-10)

def test_attention_of_dead_maps():
    t = rand(2,3,4,4)
    for p in (1,2,3):
        for s in (torch.zeros(2,3,4,4), torch.cat([torch.zeros(1,3,4,4), rand(1,3,4,4,dtype=torch.float32)])):
            value,g = grad(lambda s: Attention(p=p)({0:s}, {0:t}), s)
            assert math.isfinite(value) and g.isfinite().all() and g.abs().max() < 1e3
        assert math.isfinite(Attention(p=p)({0:t}, {0:t*0}).item())

@pytest.mark.parametrize('shape,axis', [((2,6,3),None), ((2,3,6),1), ((2,3,4,2,3),None), ((2,4,4,3),-1)], ids=['tokens','conv1d','conv3d','channels last'])
def test_attention_on_other_shapes(shape, axis):
    s,t = rand(*shape), rand(*shape, seed=1)
    c = -1 if axis is None and len(shape) == 3 else 1 if axis is None else axis
    first = lambda x: x.movedim(c, 1).flatten(2)[...,None]
    assert Attention(channel_axis=axis)({0:s}, {0:t}).item() == pytest.approx(hand_attention(first(s), first(t)), rel=1e-12)

def test_attention_pools_tokens_and_each_axis():
    s,t = rand(2,6,3), rand(2,3,5,seed=1)
    pooled = s.reshape(2,3,2,3).mean(2)
    assert Attention()({0:s}, {0:t}).item() == pytest.approx(Attention()({0:pooled}, {0:t}).item(), rel=1e-12)
    s,t = rand(2,3,8,2), rand(2,3,4,4,seed=1)
    a,b = s.reshape(2,3,4,2,2).mean(3), t.reshape(2,3,4,2,2).mean(4)
    assert Attention()({0:s}, {0:t}).item() == pytest.approx(hand_attention(a, b), rel=1e-12)

def test_attention_errors():
    m,v,tok = rand(2,3,4,4), rand(2,3), rand(2,6,3)
    for s,t,word in ((v,v,'before the pooling'), (m,tok,'one kind'), (m,v,'before the pooling')):
        with pytest.raises(ValueError, match=word): Attention()({0:s}, {0:t})
    with pytest.raises(ValueError, match='pairs'): Attention()({0:m,1:m}, {0:m})
    with pytest.raises(ValueError, match='name the layers'): Attention()({}, {})
    with pytest.raises(ValueError, match='above 0'): Attention(p=0)

def test_attention_in_half_precision_with_large_activations():
    s,t = (6e4*torch.rand(2,64,8,8, generator=torch.Generator().manual_seed(i)) for i in range(2))
    with torch.autocast('cpu', torch.bfloat16):
        value,g = grad(lambda s: Attention()({0:s.half()}, {0:t.half()}), s)
    assert value == pytest.approx(Attention()({0:s.half().float()}, {0:t.half().float()}).item()) and g.isfinite().all()

def test_layers_are_kept():
    assert Attention(layers={'layer1':'0.4'}).layers == {'layer1':'0.4'}

def test_paper_weights():
    want = {SoftTarget:(.1,.9), Logits:(0,1), Mutual:(1,1), DecoupledKD:(1,1), NormalizedKD:(1,1), DIST:(1,2), BinarySoftTarget:(.5,.5), ChannelWise:(1,3), Attention:(1,1000)}
    for loss,weights in want.items(): assert loss.paper == weights and loss().paper == weights
    assert SoftTarget(standardize=True).paper == (.1,9)
    assert (SoftTarget().T, SoftTarget(standardize=True).T, DecoupledKD().T, NormalizedKD().T, DIST().T, BinarySoftTarget().T, ChannelWise().T) == (5,2,4,1,1,2,1)

@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(), MSELossFlat(), nn.CrossEntropyLoss(), F.mse_loss, nn.KLDivLoss])
def test_losses_of_fastai_and_pytorch_are_refused_at_once(loss):
    "They name their arguments otherwise, also where fastai wraps one of PyTorch"
    with pytest.raises(TypeError, match='requires input.*wrap it'): as_loss(loss)
