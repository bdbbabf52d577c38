"Activations come to the losses channels first, each model's by its own layout: one network written in several layouts says one thing"
import warnings
import pytest, torch
import torch.nn.functional as F
from torch import nn
from fastkd.all import *
from conftest import learner
from test_kinds_axes import KD, data, draw

losses = [Attention, FitNet, Cosine, NST, RKD, PKT, Similarity, VID, ActivationBoundaries, ReviewKD, ChannelWiseFeatures]
conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

class Stage(nn.Module):
    "A stage that takes and puts out its channels last, or first"
    def __init__(self, i, o, last, d):
        super().__init__()
        self.a,self.b,self.last = conv[d](i,o,3,2,1),conv[d](o,o,3,1,1),last
    def forward(self, x):
        x = x.movedim(-1, 1) if self.last else x
        x = self.b(self.a(x).relu()).relu()
        return x.movedim(1, -1) if self.last else x

class Net(nn.Module):
    def __init__(self, c, last=False, d=2):
        super().__init__()
        torch.manual_seed(c)
        self.s1,self.s2,self.fc,self.last = Stage(1,c,last,d),Stage(c,2*c,last,d),nn.Linear(2*c,4),last
    def forward(self, x):
        x = self.s2(self.s1(x.movedim(1, -1) if self.last else x))
        return self.fc(x.flatten(1, -2).mean(1) if self.last else x.flatten(2).mean(2))

def value(s, t, loss, names, x):
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        kd = KD(t, loss, *names, label_weight=1., weight=1.)
        learner(data(x, draw(16, classes=4)), s, loss_func=F.cross_entropy).fit(1, 0., cbs=kd)
    return kd.curves['train']['kd_loss'][0],kd.pairs

@pytest.mark.parametrize('loss', losses)
@pytest.mark.parametrize('d,side,sizes', [(1,20,(3,5)), (2,16,(3,5)), (2,16,(4,4)), (3,8,(3,5))])
def test_one_network_in_two_layouts(loss, d, side, sizes):
    if d == 3 and loss is ReviewKD: side = 12
    x,(a,b) = draw(16,1,*[side]*d),sizes
    for names in ((), (['s1','s2'],['s1','s2']))[:1 + (d == 2)]:
        right,pairs = value(Net(a, d=d), Net(b, d=d), loss, names, x)
        for s_last,t_last in ((False,True), (True,False), (True,True)):
            got,p = value(Net(a, s_last, d), Net(b, t_last, d), loss, names, x)
            assert p == pairs and got == pytest.approx(right, rel=1e-4, abs=1e-6), (names, s_last, t_last)

@pytest.mark.parametrize('loss', losses)
@pytest.mark.parametrize('side', [8])
def test_as_many_channels_as_places_in_a_row(loss, side):
    "Sizes do not tell where the channels are; what the layers are does"
    x = draw(16,1,2*side,2*side)
    right,_ = value(Net(side), Net(side+1), loss, ('s1','s1'), x)
    got,_ = value(Net(side), Net(side+1, True), loss, ('s1','s1'), x)
    assert got == pytest.approx(right, rel=1e-4)

@pytest.mark.parametrize('loss', losses)
def test_equal_networks_are_equal(loss):
    "... and a loss of equal activations is what it is for two equal maps"
    s,t,x = Net(4, True),Net(4),draw(16,1,16,16)
    got,_ = value(s, t, loss, ('s1','s1'), x)
    right,_ = value(Net(4), t, loss, ('s1','s1'), x)
    assert got == pytest.approx(right, rel=1e-4, abs=1e-7)
    if loss in (Attention, FitNet, NST, RKD, PKT, Similarity, Cosine): assert got == pytest.approx(0, abs=1e-6)

def test_the_axis_given_for_each_model():
    x = draw(16,1,16,16)
    right,_ = value(Net(4), Net(5), Attention, ('s1','s1'), x)
    for axis,s,t in (((1,-1),Net(4),Net(5,True)), ((-1,1),Net(4,True),Net(5)), (1,Net(4),Net(5)), (-1,Net(4,True),Net(5,True))):
        got,_ = value(s, t, Attention(channel_axis=axis), ('s1','s1'), x)
        assert got == pytest.approx(right, rel=1e-4)

class Tokens(nn.Module):
    "A patch embedding of `k` pixels with `n` extra tokens, and a layer that leaves tokens as they are"
    def __init__(self, c, k, n=0):
        super().__init__()
        torch.manual_seed(1)
        self.embed,self.extra,self.mix,self.fc = nn.Conv2d(1,c,k,k),nn.Parameter(9*torch.ones(1,n,c)),nn.Linear(c,c),nn.Linear(c,4)
    def forward(self, x):
        t = self.embed(x).flatten(2).mT
        if self.extra.shape[1]: t = torch.cat([self.extra.expand(len(x),-1,-1), t], 1)
        return self.fc(self.mix(t).mean(1))
    def map(self, x): return self.mix(self.embed(x).movedim(1, -1)).movedim(-1, 1)

class Cnn(nn.Module):
    def __init__(self, c, k): super().__init__(); torch.manual_seed(2); self.c,self.fc = nn.Conv2d(1,c,k,k),nn.Linear(c,4)
    def forward(self, x): return self.fc(self.c(x).mean((2,3)))

@pytest.mark.parametrize('loss', [Attention, FitNet, Cosine, NST, ChannelWiseFeatures])
@pytest.mark.parametrize('n', [0,1,5])
@pytest.mark.parametrize('k,size', [((4,4),(16,16)), ((2,4),(16,16)), ((4,8),(24,16))])
def test_tokens_of_a_grid_are_compared_by_place(loss, n, k, size):
    "A CNN of stride k[1] and tokens of k[0] pixels, on images that need not be square"
    s,t,x = Cnn(6, k[1]),Tokens(6, k[0], n),draw(16,1,*size)
    for a,b,names,maps in ((s, t, ('c','mix'), (s.c(x[:8]), t.map(x[:8]))), (t, s, ('mix','c'), (t.map(x[:8]), s.c(x[:8])))):
        got,_ = value(a, b, loss, names, x)
        assert got == pytest.approx(float(loss()(fm_s={'a': maps[0].detach()}, fm_t={'a': maps[1].detach()})), rel=1e-3)

@pytest.mark.parametrize('n,m', [(0,0), (1,0), (1,2)])
def test_tokens_of_two_grids_are_pooled_by_place(n, m):
    s,t,x = Tokens(6, 2, n),Tokens(6, 4, m),draw(16,1,16,16)
    got,_ = value(s, t, Attention, ('mix','mix'), x)
    assert got == pytest.approx(float(Attention()(fm_s={'a': s.map(x[:8]).detach()}, fm_t={'a': t.map(x[:8]).detach()})), rel=1e-3)

timm_models = {'swin': ('swin_s3_tiny_224', dict(img_size=64, window_size=2, embed_dim=24, depths=(1,1,1,1), num_heads=(1,1,1,1)), ['layers.1','layers.3'], lambda a: a.movedim(-1, 1)),
    'vit': ('vit_tiny_patch16_224', dict(img_size=64, patch_size=8, embed_dim=24, depth=2, num_heads=2), ['blocks.0','blocks.1'], lambda a: a[:,1:].mT.unflatten(2, (8,8))),
    'vit_reg': ('vit_small_patch14_reg4_dinov2', dict(img_size=64, patch_size=8, embed_dim=24, depth=2, num_heads=2), ['blocks.0','blocks.1'], lambda a: a[:,5:].mT.unflatten(2, (8,8))),
    'convnext': ('convnext_atto', dict(depths=(1,1,1,1), dims=(8,12,16,24)), ['stages.1','stages.2'], lambda a: a),
    'deit_distilled': ('deit_tiny_distilled_patch16_224', dict(img_size=64, patch_size=8, embed_dim=24, depth=2, num_heads=2), ['blocks.0','blocks.1'], lambda a: a[:,2:].mT.unflatten(2, (8,8))),
    'resnet': ('resnet18', dict(), ['layer2','layer3'], lambda a: a)}

def timm_model(name):
    import timm
    arch,kw,layers,first = timm_models[name]
    torch.manual_seed(len(name))
    m = timm.create_model(arch, num_classes=4, **kw).eval()
    for o in m.modules():
        if isinstance(o, nn.BatchNorm2d): o.momentum = 0.
    return m,layers,first

def activation(m, layer, x):
    got = []
    h = m.get_submodule(layer).register_forward_hook(lambda m, i, o: got.append(o))
    with torch.no_grad(): m(x)
    h.remove()
    return got[-1]

@pytest.mark.parametrize('a,b', [('resnet','swin'), ('resnet','vit'), ('vit','resnet'), ('swin','convnext'), ('convnext','vit_reg'), ('deit_distilled','vit'), ('swin','vit')])
def test_models_of_timm_against_each_other(a, b):
    "The value is that of the maps which the activations are, by hand; and what is matched is accepted by every loss"
    (s,ls,fs),(t,lt,ft) = timm_model(a),timm_model(b)
    for m in (*s.modules(),):
        if isinstance(m, (nn.Dropout,nn.BatchNorm2d)): m.eval()
    x = draw(16,3,64,64)
    t.eval()
    seen = {}
    def watch(fm_s, fm_t): seen.update(s=list(fm_s.values()), t=list(fm_t.values())); return sum(o.mean() for o in fm_s.values())
    learner(data(x, draw(16, classes=4)), s, loss_func=F.cross_entropy).fit(1, 0., cbs=KD(t, watch, ls, lt))
    for got,layer in zip(seen['t'], lt): assert torch.allclose(got, ft(activation(t, layer, x[8:])), atol=1e-4)
    for got,layer in zip(seen['s'], ls): assert got.shape == fs(activation(s.eval(), layer, x[8:])).shape
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        kd = KD(t, [Attention,FitNet,NST,Similarity,VID,RKD,PKT,Cosine])
        learner(data(x, draw(16, classes=4)), s, loss_func=F.cross_entropy).fit(1, 0., cbs=kd)
    assert kd.pairs and all(v == v for c in kd.curves['train'].values() for v in c)

class Secret(nn.Module):
    "An activation of which nothing tells where its channels are"
    def __init__(self): super().__init__(); self.w,self.here,self.fc = nn.Parameter(torch.randn(36,5,5,5)),nn.Identity(),nn.Linear(125,4)
    def forward(self, x): return self.fc(self.here(torch.einsum('bi,icde->bcde', x.flatten(1), self.w)).flatten(1))

@pytest.mark.parametrize('loss', [Attention, FitNet, NST, RKD])
def test_where_nothing_tells_the_axis_is_asked_for(loss):
    x = draw(16,1,6,6)
    with pytest.raises(ValueError, match="Layer 'here' of the (student|teacher).*channel_axis="): value(Secret(), Secret(), loss, ('here','here'), x)
    assert value(Secret(), Secret(), loss(channel_axis=1), ('here','here'), x)[0] > 0
