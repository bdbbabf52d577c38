"Similarity of layers against its definition"
import itertools, math, weakref
import numpy as np
import pandas as pd
import pytest, torch
from torch import nn
from fastai.tabular.model import TabularModel
from fastkd.layers import FeatureHooks
from fastkd.matching import match_layers
from fastkd.similarity import layer_similarity
from conftest import batches, hooks, learner, net

def hsic1(k, l):
    "The definition: a mean over all ordered quadruples of different examples (Song et al., 2012)"
    q = list(itertools.permutations(range(len(k)), 4))
    return sum(k[i,j]*l[i,j] + k[i,j]*l[q,r] - 2*k[i,j]*l[i,q] for i,j,q,r in q)/len(q)

def grams(model, names, xb):
    with FeatureHooks(model, names) as stored, torch.no_grad(): model(xb)
    return [(a.flatten(1) @ a.flatten(1).T).double() for a in stored.collect().values()]

@pytest.mark.parametrize('sizes', [(6,), (5,7,4)])
def test_similarity_is_its_definition(sizes):
    torch.manual_seed(0)
    s,t = net(seed=1).double().eval(),net(width=6, seed=2).double().eval()
    names = ['conv1','relu2','fc']
    xs = [torch.randn(n,1,8,8).double() for n in sizes]
    a,b = [grams(s, names, x) for x in xs],[grams(t, names, x) for x in xs]
    h = lambda p,i,q,j: sum(n*hsic1(k[i], l[j]) for n,k,l in zip(sizes, p, q))
    want = [[h(a,i,b,j)/math.sqrt(h(a,i,a,i)*h(b,j,b,j)) for j in range(3)] for i in range(3)]
    got = layer_similarity(s, t, xs, (names, names))
    assert list(got.index) == list(got.columns) == names
    np.testing.assert_allclose(got.to_numpy(), np.array(want, dtype=float), rtol=1e-9)

def test_similarity_tends_to_the_population():
    "Of linear layers XA, XB on standard normal X it is |A'B|^2/(|A'A| |B'B|), Frobenius norms"
    torch.manual_seed(0)
    a,b = nn.Linear(6,4),nn.Linear(6,9)
    A,B = a.weight.detach().T,b.weight.detach().T
    want = (A.T @ B).norm()**2/((A.T @ A).norm()*(B.T @ B).norm())
    got = layer_similarity(nn.Sequential(a), nn.Sequential(b), (torch.randn(64,6) for _ in range(60)), (['0'],['0']), n_batches=60)
    assert abs(got.iloc[0,0] - want) < 0.02

def test_similarity_of_independent_layers_is_zero_on_average():
    "where the plain estimate from eight examples of many features is far from it"
    class Halves(nn.Module):
        def __init__(self, first): super().__init__(); self.first,self.out = first,nn.Identity()
        def forward(self, x): return self.out(x[:,:200] if self.first else x[:,200:])
    torch.manual_seed(0)
    xs = [torch.randn(8,400) for _ in range(100)]
    got = layer_similarity(Halves(True), Halves(False), xs, (['out'],['out']), n_batches=100).iloc[0,0]
    x = xs[0] - xs[0].mean(0)
    k,l = x[:,:200] @ x[:,:200].T,x[:,200:] @ x[:,200:].T
    assert abs(got) < 0.1 and (k*l).sum()/(k.norm()*l.norm()) > 0.5

def linear_after(m, weight, shift=0.):
    "`m` with the linear map `weight` behind it"
    new = nn.Linear(*weight.shape[::-1]).double()
    with torch.no_grad(): new.weight.copy_(weight); new.bias.fill_(shift)
    return nn.Sequential(m, new)

def test_invariances():
    torch.manual_seed(0)
    m,other = nn.Linear(7,5).double(),nn.Sequential(nn.Linear(7,6).double())
    xs = [torch.randn(12,7).double() for _ in range(3)]
    q = torch.linalg.qr(torch.randn(5,5).double())[0]
    sim = lambda model, name='1': layer_similarity(model, other, xs, ([name],['0'])).iloc[0,0]
    plain = sim(linear_after(m, torch.eye(5).double()))
    assert sim(linear_after(m, q)) == pytest.approx(plain, rel=1e-9)              # rotation
    assert sim(linear_after(m, 7*torch.eye(5).double())) == pytest.approx(plain, rel=1e-9)   # isotropic scale
    assert sim(linear_after(m, torch.eye(5).double(), 100.)) == pytest.approx(plain, rel=1e-9)   # shift
    assert abs(sim(linear_after(m, torch.diag(torch.tensor([10.,1,1,1,1]).double()))) - plain) > 1e-3    # but not any linear map
    flipped = layer_similarity(linear_after(m, q), other, [x.flip(0) for x in xs], (['1'],['0'])).iloc[0,0]
    assert flipped == pytest.approx(plain, rel=1e-9)                              # order of examples
    there,back = layer_similarity(nn.Sequential(m), other, xs, (['0'],['0'])),layer_similarity(other, nn.Sequential(m), xs, (['0'],['0']))
    assert there.iloc[0,0] == pytest.approx(back.iloc[0,0], rel=1e-12)

def test_similarity_takes_what_match_layers_gives_and_all_kinds_of_batches():
    s,t = net(seed=1),net(width=6, seed=2)
    dls = batches(shuffle=False)
    xs = [b[0] for b in dls.valid]
    pairs = match_layers(s, t, xs[0])
    want = layer_similarity(s, t, xs, pairs)
    for dl in (dls.valid, [(x, torch.zeros(8)) for x in xs], torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.cat(xs)), batch_size=8)):
        pd.testing.assert_frame_equal(layer_similarity(s, t, dl, pairs), want)
    pd.testing.assert_frame_equal(layer_similarity(s, learner(dls, t), xs, dict(zip(*pairs))), want)
    pd.testing.assert_frame_equal(layer_similarity(s, t, xs, pairs, inputs=lambda x: x), want)
    assert not layer_similarity(s, t, xs, pairs, inputs=lambda x: x.flip(-1)).equals(want)
    assert layer_similarity(s, t, xs, n_batches=1).shape == (2,2)                # the stages, where no layers are named

def test_similarity_of_several_inputs_and_of_tokens():
    tab = TabularModel([(5,3)], 2, 2, [10,8])
    xb = torch.randint(0, 5, (16,1)), torch.randn(16,2)
    class TwoInputs(list): n_inp = 2                                              # as fastai's loaders say it
    got = layer_similarity(tab, tab, TwoInputs([(*xb, torch.zeros(16))]), (['layers.0','layers.1'],)*2)
    np.testing.assert_allclose(np.diag(got), 1, rtol=1e-6)
    lm = nn.Sequential(nn.Embedding(20,8), nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3))
    got = layer_similarity(lm, lm, [torch.randint(0, 20, (6,7)) for _ in range(2)])
    assert list(got.index) == ['1.layers.0','1.layers.1','1.layers.2']
    np.testing.assert_allclose(np.diag(got), 1, rtol=1e-6)

def test_memory_does_not_grow_with_batches():
    "A generator is read batch by batch, and no more than one batch is alive"
    alive,most = weakref.WeakSet(),[0]
    def dl():
        for _ in range(6):
            x = torch.randn(8,1,8,8)
            alive.add(x)
            most[0] = max(most[0], len(alive))
            yield x
    layer_similarity(net(), net(), dl(), (['relu1'],['relu2']))
    assert most[0] <= 2

def test_similarity_refuses():
    m,x = net(),torch.randn(8,1,8,8)
    with pytest.raises(ValueError, match='four examples'): layer_similarity(m, m, [x[:3]], (['conv1'],['conv1']))
    with pytest.raises(ValueError, match='four examples'): layer_similarity(m, m, [])
    with pytest.raises(ValueError, match=r"teacher.*'conv1' \(8, 4, 8, 8\)"): layer_similarity(m, m, [x], (['conv1'],['conv']))
    class Windows(nn.Module):
        def __init__(self): super().__init__(); self.cut,self.unused = nn.Identity(),nn.Identity()
        def forward(self, x): return self.cut(x.reshape(-1,16)).reshape(len(x), -1)
    with pytest.raises(ValueError, match='32 rows for a batch of 8'): layer_similarity(Windows(), m, [x], (['cut'],['conv1']))
    with pytest.raises(ValueError, match="'unused' of the student .* did not run"): layer_similarity(Windows(), m, [x], (['unused'],['conv1']))
    assert not hooks(m)

def test_one_number_for_each_example():
    "A layer of shape (B,) is a single feature; one without a batch axis is refused"
    class Squeezed(nn.Module):
        def __init__(self): super().__init__(); self.line,self.single,self.mean = nn.Linear(4,1),nn.Identity(),nn.Identity()
        def forward(self, x): x = self.single(self.line(x)[:,0]); return x + self.mean(x.mean())
    m,xs = Squeezed(),[torch.randn(8,4) for _ in range(2)]
    assert layer_similarity(m, m, xs, (['single'],['line'])).iloc[0,0] == pytest.approx(1, rel=1e-6)
    with pytest.raises(ValueError, match='1 rows for a batch of 8'): layer_similarity(m, m, xs, (['single'],['mean']))
