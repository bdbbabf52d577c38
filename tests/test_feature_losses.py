"The losses on activations: against hand loops, invariances, and training of the parameters that some have."
import copy, inspect, math, pickle, pytest, torch
from torch import nn, tensor
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastkd.feature_losses import *
from fastkd.feature_losses import unit, angle_loss, angles, connector, distances, pyramid_loss

torch.set_num_threads(1)

def rand(*shape, seed=0, scale=1., dtype=torch.float64):
    return (scale*torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)

def grad(loss, s, *args):
    s = s.clone().requires_grad_()
    value = loss(s, *args)
    return value.item(), torch.autograd.grad(value, s)[0]
def on(loss): return lambda s,t: loss({0:s}, {0:t})

# ---- the definitions, by loops over Python numbers

dot = lambda a,b: sum(x*y for x,y in zip(a,b))
norm = lambda a: math.sqrt(dot(a,a))
sub = lambda a,b: [x-y for x,y in zip(a,b)]
smooth = lambda d: .5*d*d if abs(d) < 1 else abs(d)-.5
mean = lambda xs: sum(xs)/len(xs)
vectors = lambda x: x.flatten(1).tolist()
pooled = lambda x: x.flatten(2).mean(-1).tolist()

def hand_similarity(s, t):
    def G(e):
        g = [[dot(a,b) for b in e] for a in e]
        return [[v/norm(r) for v in r] for r in g]
    s,t = G(vectors(s)), G(vectors(t))
    return sum((a-b)**2 for x,y in zip(s,t) for a,b in zip(x,y))/len(s)**2

def hand_rkd(s, t, distance=25., angle=50.):
    def D(e):
        d = [[math.sqrt(max(dot(sub(a,b),sub(a,b)), 1e-12)) if i != j else 0. for j,b in enumerate(e)] for i,a in enumerate(e)]
        m = mean([v for r in d for v in r if v > 0])
        return [v/m for r in d for v in r]
    def A(e):
        u = lambda a,b: [v/max(norm(sub(a,b)), 1e-12) for v in sub(a,b)]
        return [dot(u(a,c), u(b,c)) for c in e for a in e for b in e]
    return distance*mean([smooth(v) for v in sub(D(s),D(t))]) + angle*mean([smooth(v) for v in sub(A(s),A(t))])

def hand_pkt(s, t):
    def P(e):
        e = [[v/(norm(a)+1e-7) for v in a] for a in e]
        p = [[(dot(a,b)+1)/2 for b in e] for a in e]
        return [v/sum(r) for r in p for v in r]
    return mean([b*math.log((b+1e-7)/(a+1e-7)) for a,b in zip(P(s),P(t))])

def hand_nst(s, t):
    chans = lambda x: [[v/norm(c) for v in c] for c in x]
    k = lambda x,y: mean([dot(a,b)**2 for a in x for b in y])
    return mean([k(b,b) + k(a,a) - 2*k(a,b) for a,b in ((chans(x),chans(y)) for x,y in zip(s.flatten(2).tolist(), t.flatten(2).tolist()))])

def hand_cosine(s, t): return 1 - mean([dot(a,b)/norm(a)/norm(b) for a,b in zip(vectors(s), vectors(t))])
def hand_mse(s, t): return mean([(a-b)**2 for a,b in zip(s.flatten().tolist(), t.flatten().tolist())])
def hand_ab(s, t, m=1.):
    return sum((a+m)**2*(a > -m and b <= 0) + (a-m)**2*(a <= m and b > 0) for a,b in zip(s.flatten().tolist(), t.flatten().tolist()))/len(s)
def hand_cwd(s, t, T=4.):
    def soft(z): e = [math.exp((v-max(z))/T) for v in z]; return [v/sum(e) for v in e]
    return T*T*mean([sum(b*math.log(b/a) for a,b in zip(soft(x),soft(y))) for x,y in zip(s.flatten(0,1).flatten(1).tolist(), t.flatten(0,1).flatten(1).tolist())])

def rkd_pooled(s, t): return hand_rkd(pooled(s), pooled(t))
def pkt_pooled(s, t): return hand_pkt(pooled(s), pooled(t))
FREE = { # losses that compare any two widths
    'Similarity': (Similarity(), hand_similarity),
    'RKD':        (RKD(), rkd_pooled),
    'RKD flat':   (RKD(distance=1, angle=2, pool=False), lambda s,t: hand_rkd(vectors(s), vectors(t), 1., 2.)),
    'PKT':        (PKT(), pkt_pooled),
    'PKT flat':   (PKT(pool=False), lambda s,t: hand_pkt(vectors(s), vectors(t))),
    'NST':        (NST(), hand_nst)}
SAME = { # losses that need a projection where widths differ; here they agree
    'FitNet':     (FitNet, hand_mse),
    'Cosine':     (Cosine, hand_cosine),
    'ActivationBoundaries': (ActivationBoundaries, hand_ab),
    'ChannelWiseFeatures': (ChannelWiseFeatures, hand_cwd)}
TRAINED = [FitNet, Cosine, VID, ActivationBoundaries, ReviewKD, ChannelWiseFeatures]
free = pytest.mark.parametrize('loss,hand', FREE.values(), ids=FREE)
trained = pytest.mark.parametrize('new', TRAINED)

# maps of 3 and 5 channels; with more places than channels and with fewer
MAPS = [(rand(4,2,3,1), rand(4,3,3,1,seed=1)), (rand(4,5,2,1), rand(4,6,2,1,seed=1))]

@free
@pytest.mark.parametrize('s,t', MAPS, ids=['3x1','2x1'])
def test_is_the_definition(loss, hand, s, t):
    f,want = on(loss), hand(s, t)
    assert f(s, t).item() == pytest.approx(want, rel=1e-11)
    s32,t32 = s.float(),t.float()
    assert f(s32, t32).item() == pytest.approx(hand(s32.double(), t32.double()), rel=2e-6)
    assert gradcheck(lambda s: f(s, t), s.clone().requires_grad_())
    g,g32 = grad(f, s, t)[1], grad(f, s32, t32)[1]
    torch.testing.assert_close(g32.double(), g, rtol=0, atol=5e-6*g.abs().max().item())

@pytest.mark.parametrize('new,hand', SAME.values(), ids=SAME)
def test_is_the_definition_where_widths_agree(new, hand):
    s,t = rand(4,3,3,3), rand(4,3,3,3,seed=1)
    loss = new(); f = on(loss); want = hand(s, t)
    assert f(s, t).item() == pytest.approx(want, rel=1e-12) and not list(loss.parameters())
    assert on(new())(s.float(), t.float()).item() == pytest.approx(hand(s.float().double(), t.float().double()), rel=1e-6)
    assert gradcheck(lambda s: f(s, t), s.clone().requires_grad_())

@pytest.mark.parametrize('loss', [NST(), FitNet(), Cosine(), ActivationBoundaries(), ChannelWiseFeatures()], ids=lambda l: type(l).__name__)
def test_the_larger_map_is_pooled(loss):
    s,t = rand(2,3,4,4), rand(2,3,8,8,seed=1)
    small = t.reshape(2,3,4,2,4,2).mean((3,5))
    assert on(loss)(s, t).item() == pytest.approx(on(loss)(s, small).item(), rel=1e-12)
    assert on(loss)(t, s).item() == pytest.approx(on(loss)(small, s).item(), rel=1e-12)

@pytest.mark.parametrize('loss', [*(l for l,_ in FREE.values()), *(n() for n,_ in SAME.values())], ids=lambda l: type(l).__name__)
def test_zero_at_the_teacher_and_sums_over_pairs(loss):
    a,b,c,d = (rand(4,3,3,3,seed=i) for i in range(4))
    if not isinstance(loss, ActivationBoundaries): assert on(copy.deepcopy(loss))(a, a).item() == pytest.approx(0, abs=1e-7)
    one,two = on(copy.deepcopy(loss))(a, b).item(), on(copy.deepcopy(loss))(c, d).item()
    assert copy.deepcopy(loss)({'x':a,'y':c}, {'x':b,'y':d}).item() == pytest.approx(one+two, rel=1e-12)
    assert on(copy.deepcopy(loss))(a, d).item() != pytest.approx(one, rel=1e-3)

ALL = [*(lambda l=l: copy.deepcopy(l) for l,_ in FREE.values()), FitNet, Cosine, VID, ActivationBoundaries, ReviewKD, ChannelWiseFeatures]
IDS = [*FREE, 'FitNet','Cosine','VID','ActivationBoundaries','ReviewKD','ChannelWiseFeatures']
every = pytest.mark.parametrize('new', ALL, ids=IDS)
SHAPES = {'vectors': ((4,3),(4,5)), 'tokens': ((4,6,3),(4,6,5)), 'more tokens': ((4,6,3),(4,3,5)), 'maps': ((4,3,4,4),(4,5,8,8)), 'oblong': ((4,3,8,2),(4,5,4,4)), '3-D': ((4,3,2,4,4),(4,5,2,2,2))}

@every
@pytest.mark.parametrize('shapes', SHAPES.values(), ids=SHAPES)
def test_shapes(new, shapes):
    "A finite value and gradient, float32 as float64"
    loss = new(); s,t = rand(*shapes[0]), rand(*shapes[1],seed=1)
    if len(shapes[0]) == 2 and isinstance(loss, (NST,ChannelWiseFeatures)):
        with pytest.raises(ValueError, match='before the pooling|space'): on(loss)(s, t)
        return
    value,g = grad(on(loss), s, t)
    assert math.isfinite(value) and g.isfinite().all() and g.abs().sum() > 0
    value32,_ = grad(on(loss.float()), s.float(), t.float())
    assert value32 == pytest.approx(value, rel=1e-5, abs=1e-6)

@every
def test_one_dimensional_convolutions(new):
    "With `channel_axis=1`, `(B, c, l)` is a map of one axis: the same as `(B, c, l, 1)`, up to BatchNorm of the projections"
    loss = new()
    loss.channel_axis = 1
    s,t = rand(4,5,6), rand(4,5,6,seed=1)
    value,g = grad(on(loss), s, t)
    assert math.isfinite(value) and g.isfinite().all()
    if not isinstance(loss, (VID,ReviewKD)):
        assert value == pytest.approx(on(new())(s[...,None], t[...,None]).item(), rel=1e-12)

@every
def test_half_precision_is_computed_in_single(new):
    s,t = 300*rand(4,3,4,4,dtype=torch.float16), 300*rand(4,5,4,4,seed=1,dtype=torch.float16)
    torch.manual_seed(0); want = on(new())(s.float(), t.float())
    torch.manual_seed(0); loss = new()
    with torch.autocast('cpu', torch.bfloat16): got = on(loss)(s.requires_grad_(), t)
    assert got.dtype is torch.float32 and got.item() == want.item() and all(p.dtype is torch.float32 for p in loss.parameters())
    got.backward()
    assert s.grad.dtype is torch.float16

@every
def test_large_activations_stay_finite(new):
    "The largest of half precision: Gram products of those overflow in it"
    s,t = 6e4*torch.rand(4,64,8,8), 6e4*torch.rand(4,48,8,8)
    loss = new()
    with torch.autocast('cpu', torch.bfloat16): value,g = grad(on(loss), s.half().float(), t.half())
    assert math.isfinite(value) and g.isfinite().all()

@every
def test_dead_activations(new):
    t = rand(4,5,4,4,dtype=torch.float32)
    one_dead = rand(4,3,4,4,dtype=torch.float32); one_dead[0] = 0
    channel_dead = rand(4,3,4,4,dtype=torch.float32); channel_dead[:,1] = 0
    for s in (torch.zeros(4,3,4,4), one_dead, channel_dead):
        for teacher in (t, t*0):
            value,g = grad(on(new()), s, teacher)
            assert math.isfinite(value) and g.isfinite().all() and g.abs().max() < 1e8

@every
def test_batch_of_one(new):
    loss = new(); s,t = rand(1,3,4,4), rand(1,5,4,4,seed=1)
    if isinstance(loss, RKD):
        with pytest.raises(ValueError, match='batch size'): on(loss)(s, t)
        return
    value,g = grad(on(loss), s, t)
    assert math.isfinite(value) and g.isfinite().all()
    if isinstance(loss, (Similarity,PKT)): assert value == 0 and g.abs().max() < 1e-20

@every
def test_teacher_gets_no_gradient(new):
    s,t = rand(4,3,4,4).requires_grad_(), rand(4,5,4,4,seed=1).requires_grad_()
    on(new())(s, t).backward()
    assert t.grad is None and s.grad.abs().sum() > 0

@every
def test_protocol(new):
    "What the callback reads: the signature, `paper`, `layers`; copies and pickles, built and not"
    loss = new()
    assert {'fm_s','fm_t'} <= set(inspect.signature(loss.forward).parameters) <= {'fm_s','fm_t','pct_train'} and len(loss.paper) == 2 and loss.layers is None
    s,t = {('a','b'):rand(4,3,4,4)}, {('a','b'):rand(4,5,4,4,seed=1)}
    pickle.loads(pickle.dumps(loss)); copy.deepcopy(loss)
    want = loss(fm_s=s, fm_t=t).item()
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))): assert other(fm_s=s, fm_t=t).item() == want
    assert type(loss)(layers=[('a','b')]).layers == [('a','b')]

@every
def test_errors(new):
    m,v,tok = rand(4,3,4,4), rand(4,3), rand(4,6,3)
    with pytest.raises(ValueError, match='in pairs'): new()({0:m,1:m}, {0:m})
    with pytest.raises(ValueError, match='name the layers'): new()({}, {})
    if not isinstance(new(), (Similarity,RKD,PKT)):
        with pytest.raises(ValueError, match='one kind'): on(new())(m, tok)

# ---- relations

def turn(n, seed=5): return torch.linalg.qr(rand(n,n,seed=seed))[0]

def test_rkd_under_rotation_shift_and_scale():
    e,t = rand(6,4), rand(6,3,seed=1)
    want = on(RKD())(e, t).item()
    assert on(RKD())(3*e@turn(4)+1, t).item() == pytest.approx(want, rel=1e-9)
    value,g = grad(on(RKD()), 3*e@turn(4)+1, e)
    assert value == pytest.approx(0, abs=1e-9) and g.abs().max() < 1e-9

def test_similarity_under_rotation_and_scale():
    e,t = rand(6,4), rand(6,3,seed=1)
    assert on(Similarity())(3*e@turn(4), t).item() == pytest.approx(on(Similarity())(e, t).item(), rel=1e-10)
    assert on(PKT())(e@turn(4), t).item() == pytest.approx(on(PKT())(e, t).item(), rel=1e-10)

def test_relations_follow_the_order_of_the_batch():
    s,t,p = rand(6,4), rand(6,3,seed=1), [3,1,5,0,4,2]
    for loss in (Similarity(), RKD(), PKT()):
        assert on(loss)(s[p], t[p]).item() == pytest.approx(on(loss)(s, t).item(), rel=1e-10)
        assert on(loss)(s[p], t).item() != pytest.approx(on(loss)(s, t).item(), rel=1e-3)

def test_angles_of_a_triangle():
    tri = tensor([[0.,0.],[4.,0.],[0.,3.]], dtype=torch.float64)
    a = angles(tri, tri)
    assert a[0,1,2].item() == pytest.approx(0) and a[1,0,2].item() == pytest.approx(.8) and a[2,0,1].item() == pytest.approx(.6)
    d = distances(tri)
    assert d[0].tolist() == pytest.approx([0,1,.75]) and d[1,2].item() == pytest.approx(1.25)

@pytest.mark.parametrize('room', [1, 200, 2**20])
def test_angles_by_parts_are_the_same(room):
    s,t = rand(9,5), rand(9,3,seed=1)
    def whole(s): return F.smooth_l1_loss(angles(s, s), angles(t, t))
    value,g = grad(whole, s)
    value2,g2 = grad(lambda s: angle_loss(s, t, room=room), s)
    assert value2 == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(g2, g, rtol=1e-10, atol=1e-14)

class Largest(TorchDispatchMode):
    "Elements of the largest tensor made"
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.n = max([self.n, *(x.untyped_storage().nbytes()//x.element_size() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out

def test_angles_do_not_hold_all_triplets():
    B = 160
    s,t = rand(B,8,dtype=torch.float32).requires_grad_(), rand(B,8,seed=1,dtype=torch.float32)
    with Largest() as seen: on(RKD())(s, t).backward()
    assert seen.n <= 2**20 < B**3/3

def test_angles_keep_little_for_the_backward_pass():
    B,kept = 128,{}
    def pack(x): kept[x.untyped_storage().data_ptr()] = x.numel(); return x
    s,t = rand(B,8).requires_grad_(), rand(B,8,seed=1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x): angle_loss(s, t)
    assert sum(kept.values()) < B**2

def test_distances_far_from_the_origin_keep_their_digits():
    "In single precision, embeddings whose differences are a thousandth of their length"
    e = rand(6,8) + 1000.
    torch.testing.assert_close(distances(e.float()).double(), distances(e), rtol=1e-3, atol=1e-3)
    want = [[math.sqrt(dot(sub(a,b),sub(a,b))) for b in e.tolist()] for a in e.tolist()]
    m = sum(map(sum, want))/30
    torch.testing.assert_close(distances(e), tensor(want, dtype=torch.float64)/m, rtol=1e-9, atol=1e-9)

def test_pkt_of_near_equal_neighborhoods_keeps_its_digits():
    "Times 30000: the plain sum in single precision is off by a part in ten, or negative"
    t = rand(32,16); s = t + 1e-3*rand(32,16,seed=1)
    want = on(PKT())(s, t).item()
    assert on(PKT())(s.float(), t.float()).item() == pytest.approx(want, rel=1e-2)

def test_nst_takes_the_cheaper_form():
    for shape,largest in (((2,200,2,2), 2*200*4), ((2,4,20,20), 2*4*400)):
        with Largest() as seen: on(NST())(rand(*shape), rand(*shape, seed=1))
        assert seen.n <= largest

def test_rkd_with_images_that_coincide():
    "Distance 0 has no direction: no gradient of the order of 1/eps"
    s,t = rand(6,4), rand(6,3,seed=1)
    s[3] = s[1]
    value,g = grad(on(RKD()), s, t)
    assert math.isfinite(value) and g.abs().max() < 1e3

def test_unit_is_normalize_with_no_gradient_at_zero():
    x = rand(5,4)
    torch.testing.assert_close(unit(x), F.normalize(x), rtol=1e-14, atol=0)
    assert gradcheck(unit, x.requires_grad_())
    z = torch.zeros(2,4, requires_grad=True)
    unit(z).sum().backward()
    assert (z.grad == 0).all()

def test_nst_two_forms_agree():
    "Fewer places than channels, and more: padded with places where nothing responds"
    s,t = rand(2,6,2,2), rand(2,7,2,2,seed=1)
    wide = lambda x: F.pad(x.flatten(2), (0,40))[...,None]
    assert on(NST())(s, t).item() == pytest.approx(on(NST())(wide(s), wide(t)).item(), rel=1e-12)
    assert on(NST())(s, t).item() == pytest.approx(hand_nst(s, t), rel=1e-12)

def test_channel_order_does_not_count():
    s,t = rand(4,3,4,4), rand(4,5,4,4,seed=1)
    for loss in (Similarity(), NST()):
        assert on(loss)(s[:,[2,0,1]], t[:,[4,2,0,1,3]]).item() == pytest.approx(on(loss)(s, t).item(), rel=1e-11)

# ---- losses with parameters

S,T_ = {i: rand(4,3*2**i,8//2**i,8//2**i,seed=i) for i in range(3)}, {i: rand(4,5*2**i,8//2**i,8//2**i,seed=9+i) for i in range(3)}

@trained
def test_build_leaves_the_random_stream_alone(new):
    torch.manual_seed(3); want = torch.rand(2)
    torch.manual_seed(3); loss = new(); loss.build(S, T_); got = torch.rand(2)
    assert loss.built and (got == want).all()
    torch.manual_seed(3); again = new(); again.build(S, T_)
    assert all((a == b).all() for a,b in zip(loss.parameters(), again.parameters()))

@trained
def test_build_dtype_and_default_device(new):
    for dtype,want in ((torch.float64,torch.float64), (torch.float32,torch.float32), (torch.float16,torch.float32)):
        loss = new(); loss.build({k:v.to(dtype) for k,v in S.items()}, {k:v.to(dtype) for k,v in T_.items()})
        assert {p.dtype for p in loss.parameters()} == {want} and all(p.requires_grad for p in loss.parameters())
    with torch.device('meta'): loss = new(); loss.build(S, T_)
    assert {p.device.type for p in loss.parameters()} == {'cpu'}

@trained
def test_builds_itself_when_called(new):
    torch.manual_seed(0); a = new(); a.build(S, T_)
    torch.manual_seed(0); b = new()
    assert not b.built and a(S, T_).item() == b(S, T_).item() and b.built
    with pytest.raises(ValueError, match='build'): b({0:S[0]}, {0:T_[0]})

@trained
def test_every_parameter_is_trained(new):
    loss = new(); loss.build(S, T_)
    params = dict(loss.named_parameters())
    assert params
    before = {n: p.clone() for n,p in params.items()}
    opt = torch.optim.Adam(loss.parameters(), lr=.01)
    first = loss(S, T_)
    for _ in range(20):
        value = loss(S, T_); opt.zero_grad(); value.backward(); opt.step()
    assert value < first and all((before[n] != p).any() for n,p in params.items())

@trained
def test_state_resumes(new):
    torch.manual_seed(0); loss = new(); loss.build(S, T_)
    torch.manual_seed(1); other = new(); other.build(S, T_)
    assert loss(S, T_).item() != other(S, T_).item()
    other = new(); other.build(S, T_); other.load_state_dict(loss.state_dict())
    assert loss.eval()(S, T_).item() == other.eval()(S, T_).item()

def test_temperature_schedule_of_channel_wise_features():
    s,t = rand(4,3,3,3), rand(4,3,3,3,seed=1)
    loss = ChannelWiseFeatures(T=lambda p: 8-4*p)
    assert loss({0:s}, {0:t}, pct_train=1.).item() == on(ChannelWiseFeatures(T=4))(s, t).item()
    with pytest.raises(ValueError, match='pct_train'): loss({0:s}, {0:t})

@every
def test_without_gradients(new):
    "As in validation: the same value, no graph, no warning"
    import warnings
    loss = new(); s,t = rand(4,3,4,4), rand(4,5,4,4,seed=1)
    want = on(loss)(s.clone().requires_grad_(), t).item()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('error')
        got = on(loss)(s, t)
    assert got.item() == pytest.approx(want, rel=1e-12) and not got.requires_grad

def test_connector():
    assert isinstance(connector(S[0], S[0]), nn.Identity)
    kinds = lambda m: [type(x) for x in (m if isinstance(m, nn.Sequential) else [m])]
    assert kinds(connector(S[0], T_[0])) == [nn.Conv2d, nn.BatchNorm2d] and kinds(connector(S[0], T_[0], bn=False)) == [nn.Conv2d]
    assert kinds(connector(rand(4,3), rand(4,5))) == [nn.Linear]
    assert kinds(connector(rand(4,3,2,2,2), rand(4,5,2,2,2))) == [nn.Conv3d, nn.BatchNorm3d]

def test_fitnet_with_a_projection():
    "By hand: 1x1 convolution, BatchNorm of the batch, mean square"
    s,t = S[0],T_[0]; loss = FitNet(); loss.build({0:s}, {0:t})
    w = loss.parts[0][0].weight.detach()[:,:,0,0]
    y = torch.einsum('oc,bchw->bohw', w, s)
    y = (y - y.mean((0,2,3), keepdim=True))/torch.sqrt(y.var((0,2,3), unbiased=False, keepdim=True) + 1e-5)
    assert on(loss)(s, t).item() == pytest.approx((y-t).square().mean().item(), rel=1e-10)

def test_vid_by_hand():
    s,t = S[0],T_[0]; loss = VID(); loss.build({0:s}, {0:t}); part = loss.parts[0]
    with torch.no_grad(): part.a.copy_(rand(5,seed=4))
    ws = [m.weight[:,:,0,0] for m in part.mean if isinstance(m, nn.Conv2d)]
    assert len(ws) == 3 and not any(m.bias is not None for m in part.mean if isinstance(m, nn.Conv2d))
    x = s.permute(0,2,3,1)
    x = ((x@ws[0].T).relu()@ws[1].T).relu()@ws[2].T
    total = 0.
    for c in range(5):
        var = math.log(1+math.exp(part.a[c].item())) + 1e-5
        total += sum(.5*((m-v)**2/var + math.log(var)) for m,v in zip(x[...,c].flatten().tolist(), t[:,c].flatten().tolist()))
    assert on(loss)(s, t).item() == pytest.approx(total/t.numel(), rel=1e-12)
    assert gradcheck(lambda s: on(loss)(s, t), s.clone().requires_grad_())

def test_vid_variance_starts_at_five_and_is_learned():
    z = torch.zeros(2,3,4,4, dtype=torch.float64); loss = VID()
    assert on(loss)(z, z).item() == pytest.approx(.5*math.log(5), rel=1e-12)
    assert {n.split('.')[-1] for n,_ in loss.named_parameters()} == {'a','weight'}
    on(loss)(z, z).backward()
    assert loss.parts[0].a.grad.abs().sum() > 0

def test_activation_boundaries_by_hand():
    s,t = tensor([[-2.,-1.,0.,1.,2.],[.5]*5]), tensor([[1.,1.,1.,1.,1.],[0.,-1.,1.,-3.,2.]])
    assert on(ActivationBoundaries())(s, t).item() == pytest.approx((9+4+1+0+0 + 3*2.25+2*.25)/2)
    assert on(ActivationBoundaries(margin=.5))(s, t).item() == pytest.approx((6.25+2.25+.25+0+0 + 3*1.+0)/2)

# ---- ReviewKD

def test_pyramid_loss_by_hand():
    s,t = rand(2,3,8,8), rand(2,3,8,8,seed=1)
    def pool(x, l): return x.reshape(2,3,l,8//l,l,8//l).mean((3,5))
    mse = lambda l: (pool(s,l)-pool(t,l)).square().mean().item()
    assert pyramid_loss(s, t).item() == pytest.approx((mse(8)+mse(4)/2+mse(2)/4+mse(1)/8)/(1+.5+.25+.125), rel=1e-12)
    s,t = pool(s,4),pool(t,4)
    def pool(x, l): return x.reshape(2,3,l,4//l,l,4//l).mean((3,5))
    assert pyramid_loss(s, t).item() == pytest.approx((mse(4)+mse(2)/2+mse(1)/4)/1.75, rel=1e-12)
    s,t = pool(s,1),pool(t,1)
    assert pyramid_loss(s, t).item() == pytest.approx((s-t).square().mean().item(), rel=1e-12)

def test_review_by_hand():
    "Two stages in eval mode (BatchNorm is 1/sqrt(1+eps)): project, upsample, mix, 3x3 convolution, pyramid"
    s,t = {0:S[0],1:S[1]}, {0:T_[0],1:T_[1]}
    loss = ReviewKD(); loss.build(s, t); loss.eval()
    shallow,deep = loss.parts
    bn = (1+1e-5)**-.5
    x = bn*torch.einsum('oc,bchw->bohw', deep.project[0].weight[:,:,0,0], s[1])
    conv3 = lambda x,m: bn*F.conv2d(F.pad(x, (1,1,1,1)), m.out[0].weight)
    want = pyramid_loss(conv3(x, deep), t[1])
    y = bn*torch.einsum('oc,bchw->bohw', shallow.project[0].weight[:,:,0,0], s[0])
    up = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    a = torch.sigmoid(torch.einsum('oc,bchw->bohw', shallow.attention[0].weight[:,:,0,0], torch.cat([y,up],1)) + shallow.attention[0].bias[:,None,None])
    want = want + pyramid_loss(conv3(y*a[:,0,None] + up*a[:,1,None], shallow), t[0])
    assert loss(s, t).item() == pytest.approx(want.item(), rel=1e-12)
    assert deep.attention is None and shallow.project[0].out_channels == min(512, S[1].shape[1])

def test_review_takes_other_sizes_of_the_teacher_and_a_vector():
    s = {0:rand(4,3,8,8), 1:rand(4,6,4,4), 2:rand(4,6)}
    t = {0:rand(4,5,16,16), 1:rand(4,7,2,2), 2:rand(4,9)}
    loss = ReviewKD(); value = loss(s, t); value.backward()
    assert value.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())

def test_review_wants_shallow_to_deep():
    back = lambda d: dict(reversed(d.items()))
    with pytest.raises(ValueError, match='shallow'): ReviewKD()(back(S), back(T_))
    with pytest.raises(ValueError, match='one kind'): ReviewKD()({0:S[0],1:rand(4,6,3)}, {0:T_[0],1:rand(4,6,3)})
    assert ReviewKD.warmup_epochs == 20

SIGNATURES = {
    Similarity: '', NST: '', Cosine: '', VID: '', ReviewKD: '', RKD: 'distance=25.0, angle=50.0, pool=True, ', PKT: 'pool=True, ', FitNet: 'bn=True, ',
    ActivationBoundaries: 'margin=1.0, ', ChannelWiseFeatures: 'T=4.0, ', FeatureLoss: '', TrainedFeatureLoss: ''}

@pytest.mark.parametrize('loss', SIGNATURES, ids=lambda l: l.__name__)
def test_the_signature_shows_what_counts(loss): assert str(inspect.signature(loss)) == f'({SIGNATURES[loss]}layers=None, channel_axis=None)'

def test_paper_weights():
    want = {Similarity:(1,3000), RKD:(1,1), PKT:(1,30000), NST:(1,50), FitNet:(1,100), Cosine:(.75,.25), VID:(1,1), ActivationBoundaries:(0,1), ReviewKD:(1,1), ChannelWiseFeatures:(1,3)}
    for loss,weights in want.items(): assert loss.paper == weights
    assert (RKD().distance, RKD().angle, ActivationBoundaries().margin, ChannelWiseFeatures().T) == (25,50,1,4)
