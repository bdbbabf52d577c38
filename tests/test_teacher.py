"How a teacher is run: precision, cache, teachers that move"
import math, subprocess, sys, time, warnings
from collections import OrderedDict, UserDict, namedtuple
from pathlib import Path
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.basics import DataLoader, DataLoaders, Callback, CrossEntropyLossFlat, accuracy
from fastai.callback.mixup import MixUp
from fastai.distributed import DistributedDL
from fastai.callback.training import GradientAccumulation
from fastkd.all import *
from fastkd.layers import unwrap
from fastkd.cache import Cache, row_keys
from conftest import batches, hooks, learner, net, same, weights

class Counting(nn.Module):
    "A teacher that counts the rows it is run on"
    def __init__(self, seed=7): super().__init__(); self.net,self.rows = net(width=6, seed=seed),0
    def forward(self, x): self.rows += len(x); return self.net(x)

def fitted(teacher, dls=None, epochs=3, cbs=(), loss=SoftTarget):
    if loss is Attention: loss = Attention(layers={'conv2':'net.conv2'})
    learn = learner(dls or batches(shuffle=False), net(seed=1))
    kd = KnowledgeDistillationCallback(teacher, loss)
    learn.fit(epochs, cbs=[kd, *cbs])
    return weights(learn.model),kd

def close(a, b, **tol):
    for k in a: assert torch.allclose(a[k], b[k], **(tol or dict(rtol=1e-4, atol=1e-6))), k

# --- the cache

class Watch(Callback):
    "Compares what the teacher says in every batch with what it says when it is asked directly"
    order,run_valid = -2,False
    def __init__(self, teacher, model): self.teacher,self.model_,self.worst = teacher,model,0.
    def after_loss(self):
        with torch.no_grad(): z = self.model_.eval()(self.x)
        self.worst = max(self.worst, (self.teacher.run(*self.xb).logits[0] - z).abs().max().item())

def loaders():
    g = torch.Generator().manual_seed(0)
    items = [(torch.randn(1,8,8, generator=g), torch.tensor(i%3)) for i in range(50)]
    train,valid = items[:30],items[30:]
    kw = dict(bs=8, device='cpu')
    yield 'shuffled', DataLoader(train, shuffle=True, num_workers=0, **kw),DataLoader(valid, num_workers=0, **kw)
    yield 'workers', DataLoader(train, shuffle=True, num_workers=2, **kw),DataLoader(valid, num_workers=2, **kw)
    yield 'drop_last', DataLoader(train, shuffle=True, drop_last=True, num_workers=0, **kw),DataLoader(valid, num_workers=0, **kw)
    yield 'batch of 1', DataLoader(train, shuffle=True, bs=1, num_workers=0, device='cpu'),DataLoader(valid, num_workers=0, **kw)
    yield 'weighted', Weighted(train, num_workers=0, **kw),DataLoader(valid, num_workers=0, **kw)
    for rank in range(2): yield f'distributed, rank {rank}',Distributed(DataLoader(train, shuffle=True, num_workers=0, **kw), rank, 2),DataLoader(valid, num_workers=0, **kw)
    yield "PyTorch's", torch.utils.data.DataLoader(train, batch_size=8, shuffle=True),torch.utils.data.DataLoader(valid, batch_size=8)

class Weighted(DataLoader):
    "Draws with replacement"
    def get_idxs(self): return torch.randint(len(self.dataset), (len(self.dataset),)).tolist()

class Distributed(DistributedDL):
    "One process's share of the items, without the others to agree with"
    def _broadcast(self, t, rank): return t

@pytest.mark.parametrize('place', ['memory','folder'])
@pytest.mark.parametrize('name,train,valid', loaders(), ids=lambda o: o if isinstance(o, str) else '')
def test_cached_logits_belong_to_their_inputs(tmp_path, name, train, valid, place):
    model = Counting()
    teacher = Teacher(model, cache=True if place == 'memory' else tmp_path/'logits')
    watch = Watch(teacher, model.net)
    learn = learner(DataLoaders(train, valid, device='cpu'), net(seed=1))
    kd = KnowledgeDistillationCallback(teacher, SoftTarget)
    model.rows = 0
    learn.add_cb(kd)
    learn.fit(4, cbs=watch)
    assert watch.worst < 1e-5
    assert 24 <= len(teacher.cache) <= 30
    if name != 'weighted': assert model.rows == len(teacher.cache)  # each item once, in four epochs

def test_a_cached_fit_is_the_uncached_fit():
    plain,kd = fitted(Counting())
    cached,kd_c = fitted(Teacher(Counting(), cache=True))
    close(plain, cached)
    assert kd_c.curves['train']['kd_loss'] == pytest.approx(kd.curves['train']['kd_loss'], rel=1e-4)

def test_a_folder_serves_later_runs_and_other_batch_sizes(tmp_path):
    first = Counting()
    fitted(Teacher(first, cache=tmp_path/'z'))
    assert first.rows == 24
    again = Counting()
    fitted(Teacher(again, cache=tmp_path/'z'), batches(bs=5, shuffle=True))
    assert again.rows <= 4  # the probe at most

def test_a_folder_refuses_another_teacher(tmp_path):
    fitted(Teacher(Counting(), cache=tmp_path/'z'))
    with pytest.raises(ValueError, match="another teacher's"): fitted(Teacher(Counting(seed=8), cache=tmp_path/'z'))
    with pytest.raises(ValueError, match="another teacher's"): fitted(Teacher(Counting(), dtype=torch.bfloat16, cache=tmp_path/'z'))
    with pytest.raises(ValueError, match="another teacher's"): fitted(Teacher(Counting(), cache=tmp_path/'z', topk=2))

def test_memory_forgets_a_teacher_that_was_trained_on():
    model = Counting()
    teacher = Teacher(model, cache=True)
    fitted(teacher)
    with torch.no_grad(): model.net.fc.bias += 1.
    n = model.rows
    fitted(teacher)
    assert model.rows == n + 24

def test_changed_data_are_asked_anew(tmp_path):
    model = Counting()
    fitted(Teacher(model, cache=tmp_path/'z'))
    dls = batches(shuffle=False)
    x,y = dls.train_ds[3]
    x += 1.
    model.rows = 0
    teacher = Teacher(model, cache=tmp_path/'z')
    watch = Watch(teacher, model.net)
    fitted(teacher, dls, cbs=[watch])
    assert 1 <= model.rows <= 1+4 and watch.worst < 1e-5

def test_random_inputs_are_refused():
    class Noise(Callback):
        order = -5
        def before_batch(self): self.learn.xb = (self.x + torch.randn_like(self.x)*.1,)
    with pytest.raises(ValueError, match='squish'): fitted(Teacher(Counting(), cache=True), cbs=[Noise()])
    with pytest.raises(ValueError, match='views=8'): fitted(Teacher(Counting(), cache=True), cbs=[MixUp()])

def test_an_interrupted_write_moves_no_row(tmp_path, monkeypatch):
    cache = Cache(tmp_path/'z')
    cache.open('a teacher')
    z = lambda *values: torch.tensor(values)[:,None].expand(-1, 4)
    cache.put([1], z(1.))
    append = Cache._append
    def interrupted(self, rows):
        append(self, rows)
        raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Cache, '_append', interrupted)
        cache.put([2,20], z(2.,20.))
    cache.put([3], z(3.))
    assert cache.missing([1,2,3,20]) == [1,3] and torch.equal(cache.get([3,1]), z(3.,1.))
    cache.put([2], z(2.))
    other = Cache(tmp_path/'z')
    other.open('a teacher')
    assert torch.equal(other.get([1,2,3]), z(1.,2.,3.))

def test_other_layers_with_the_same_weights_are_another_teacher(tmp_path):
    from fastai.layers import Lambda
    from fastkd.teacher import digest
    of = lambda act: (torch.manual_seed(0), digest([nn.Sequential(nn.Linear(2, 3), act, nn.Linear(3, 2))]))[1]
    assert of(nn.ReLU()) == of(nn.ReLU()) != of(nn.Tanh())
    assert of(Lambda(lambda x: x)) == of(Lambda(lambda x: x))  # whose text tells an address

def test_logits_of_another_precision_are_not_taken():
    "Under autocast the same teacher says something else"
    model = net(width=6, seed=7)
    teacher,x = Teacher(model, cache=True),torch.randn(8,1,8,8)
    with torch.no_grad(): exact = model.eval()(x)
    for _ in range(2):
        with teacher.on(): assert torch.equal(teacher.run(x).logits[0], exact)
        with teacher.on(), torch.autocast('cpu', torch.bfloat16): assert 0 < (teacher.run(x).logits[0]-exact).abs().max() < .1
    assert len(teacher.cache) == 16

def test_one_input_in_two_precisions_is_one_item():
    "The metrics of the teacher, on the validation set, are taken without the autocast of the fit"
    class Bf16(Callback):
        order = -20
        def before_batch(self):
            self.cast = torch.autocast('cpu', torch.bfloat16)
            self.cast.__enter__()
        def after_batch(self): self.cast.__exit__(None, None, None)
    class Ask(Callback):
        order = 30
        def after_epoch(self): asked.append(kd.teacher_metrics())
    asked,kd = [],KnowledgeDistillationCallback(Teacher(net(width=6, seed=7), cache=True), SoftTarget)
    learner(batches(shuffle=False), net(seed=1)).fit(2, cbs=[kd, Bf16(), Ask()])
    assert len(asked) == 2 and len(kd.teacher.cache) == 24+16

def test_rows_of_others_can_be_read_where_the_own_first_write_failed(tmp_path, monkeypatch):
    z = torch.ones(2, 4)
    other,cache = Cache(tmp_path/'z'),Cache(tmp_path/'z')
    other.open('a teacher')
    other.put([1,2], z)
    cache.open('a teacher')
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        def interrupted(*args): raise KeyboardInterrupt
        m.setattr(Cache, '_check', staticmethod(interrupted))
        cache.put([3], z[:1])
    assert torch.equal(cache.get([1,2]), z)

def test_topk_wants_the_classes_last():
    class Maps(nn.Conv2d):
        def __init__(self): super().__init__(1, 3, 1)
    learn = learner(DataLoaders.from_dsets(*[[(torch.randn(1,4,4), torch.zeros(4,4).long())]*8]*2, bs=8, device='cpu'), Maps(), loss_func=CrossEntropyLossFlat(axis=1))
    with pytest.raises(ValueError, match='last axis'): learn.fit(1, cbs=KnowledgeDistillationCallback(Teacher(Maps(), cache=True, topk=2), SoftTarget))

@pytest.mark.parametrize('both', [False,True])
@pytest.mark.parametrize('place', ['memory','folder'])
def test_activations_are_kept(place, both, tmp_path):
    "alone and beside logits; the fit is that without a cache, up to half precision"
    def loss(): return [Attention(layers={'conv2':'net.conv2'}), *([SoftTarget()] if both else [])]
    plain,kd = fitted(Counting(), loss=loss())
    model = Counting()
    cache = True if place == 'memory' else tmp_path/'z'
    cached,kd_c = fitted(teacher := Teacher(model, cache=cache), loss=loss())
    rows = model.rows
    close(plain, cached, rtol=0, atol=.06)  # small errors grow in ten steps of the weight 1000
    for name,values in kd.curves['train'].items(): assert kd_c.curves['train'][name][0] == pytest.approx(values[0], rel=1e-3)
    more = Counting()
    fitted(teacher if place == 'memory' else Teacher(more, cache=cache), loss=loss(), epochs=5)
    found_out = 2*8 + 4  # the first batch, for the layouts of layers, and what confirms whose folder it is
    assert rows <= 24 + found_out and (model.rows - rows if place == 'memory' else more.rows) <= found_out

def test_a_layer_that_joins_is_asked_once_more():
    model = Counting()
    teacher = Teacher(model, cache=True)
    fitted(teacher)
    before = model.rows
    fitted(teacher, loss=Attention)
    assert 24 <= model.rows - before <= 24 + 20
    assert [*teacher.cache.stores] == ['net.conv2'] and len(teacher.cache.store('net.conv2')) == 24

def test_inputs_of_another_shape_or_type_have_other_keys():
    "also of the same bytes, or padded with zeros"
    xs = torch.ones(1,2,8),torch.ones(1,8,2),torch.ones(1,16),torch.tensor([[1.]]),torch.tensor([[1.,0.]]),torch.ones(1,16).view(torch.int32)
    assert len({row_keys(x).item() for x in xs}) == len(xs)

def test_what_takes_too_much_room_is_refused():
    "before it is written"
    tiny = Cache(max_gb=1e-6)
    with pytest.raises(ValueError, match=r'would take up to 0.0 GB: \d+ items × [\d,]+ bytes. Compare fewer layers'): fitted(Teacher(Counting(), cache=tiny), loss=Attention)
    assert not len(tiny.store('net.conv2'))
    with pytest.raises(ValueError, match='× 3 views ×'): fitted(Teacher(Counting(), cache=Cache(views=3, max_gb=1e-6)), loss=Attention)

def test_large_activations_are_kept_as_the_largest_numbers():
    cache = Cache()
    cache.open('t')
    z = cache.run_layers(lambda x: {'a': x*1e6}, ['a'], torch.tensor([[1.],[-1.],[1e-6]]))['a']
    assert z.flatten().tolist() == [65504,-65504,1]

def test_a_stateful_teacher_is_refused():
    class Stateful(nn.Module):
        def reset(self): pass
    with pytest.raises(ValueError, match='hidden state'): Teacher(Stateful(), cache=True)

def test_every_loss_on_logits_works_from_the_cache():
    for loss in (SoftTarget, Logits, Mutual, DecoupledKD, NormalizedKD, DIST):
        plain,_ = fitted(Counting(), loss=loss); cached,_ = fitted(Teacher(Counting(), cache=True), loss=loss)
        close(plain, cached, rtol=1e-3, atol=1e-5)

def test_an_ensemble_from_the_cache():
    a,b = Counting(7),Counting(8)
    plain,_ = fitted([a,b]); cached,_ = fitted(Teacher([a,b], cache=True))
    close(plain, cached)

def test_a_killed_writer_loses_at_most_its_last_row(tmp_path):
    "A process is killed while it writes; what it wrote before is right, and the next one goes on"
    code = f"""
import torch, sys
from fastkd.cache import Cache, row_keys
cache = Cache({str(tmp_path/'z')!r}); cache.open('a teacher')
g = torch.Generator().manual_seed(0)
for i in range(10**6):
    x = torch.randn(16, 500, generator=g)
    cache.put(row_keys(x).tolist(), x)
    if i == 20: print('going', flush=True)
"""
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline().strip() == 'going'
    time.sleep(.2); p.kill(); p.wait()
    cache = Cache(tmp_path/'z'); cache.open('a teacher')
    assert len(cache) >= 16*20
    g = torch.Generator().manual_seed(0)
    found = 0
    while found < len(cache):
        x = torch.randn(16, 500, generator=g); keys = row_keys(x).tolist()
        have = [i for i in range(16) if keys[i] in cache.index]
        assert have and torch.equal(cache.get([keys[i] for i in have]), x[have])
        found += len(have)

def test_two_processes_share_a_folder(tmp_path):
    a,b = Cache(tmp_path/'z'),Cache(tmp_path/'z')
    a.open('t'); b.open('t')
    x = torch.randn(8,3)
    a.put([1,2,3], x[:3]); b.put([3,4], x[2:4])
    c = Cache(tmp_path/'z'); c.open('t')
    assert torch.equal(c.get([4,3,2,1]), x[:4].flip(0))

# --- the keys

Pair = namedtuple('Pair', 'a b')

def test_keys_know_the_rows_in_any_layout():
    x = torch.randn(6,4,3)
    for o in (x.transpose(1,2), x.flip(0)[::2], x.expand(2,6,4,3)[1], torch.randn(1,6).t(), torch.arange(6)[None].t(), torch.randn(6,2,4,4).to(memory_format=torch.channels_last)):
        assert torch.equal(row_keys(o), row_keys(o.clone(memory_format=torch.contiguous_format)))
        assert [row_keys(o[i:i+1]).item() for i in range(len(o))] == row_keys(o).tolist()
    assert row_keys(torch.zeros(0,3)).tolist() == [] and len(set(row_keys(torch.zeros(3,0), torch.arange(3)).tolist())) == 3

def test_keys_of_nested_inputs():
    a,b = torch.randn(5,3),torch.randint(9, (5,2))
    for x in ({'ids': b, 'x': a}, [a,b], (a,(b,{'c': a})), Pair(a, b), UserDict(ids=b, x=a), {'x': a, 'n': 2, 'm': None, 'flag': True}):
        keys = row_keys(x)
        assert len(set(keys.tolist())) == 5
        assert torch.equal(row_keys(copy_rows(x, [3,1])), keys[[3,1]])  # of a row, whatever batch it is in
    base = row_keys({'x': a, 'n': 2})
    for other in ({'x': a, 'n': 3}, {'x': a, 'm': 2}, {'x': a+1e-6, 'n': 2}, {'x': a}): assert not set(base.tolist()) & set(row_keys(other).tolist())
    for bad,word in (({'x': a, 'texts': ['one']*5}, 'got str'), ({'x': a, 'sizes': [1,2,3,4,5]}, 'int in a list'), ({'x': np.zeros(5)}, 'ndarray')):
        with pytest.raises(TypeError, match=word): row_keys(bad)
    for bad in ((a, b[:1]), ({'n': 2},)):
        with pytest.raises(ValueError, match='one row for each item'): row_keys(*bad)

def copy_rows(x, rows):
    if isinstance(x, (dict,UserDict)): return type(x)({k: copy_rows(v, rows) for k,v in x.items()})
    if isinstance(x, Pair): return Pair(*(copy_rows(o, rows) for o in x))
    if isinstance(x, (list,tuple)): return type(x)(copy_rows(o, rows) for o in x)
    return x[rows] if isinstance(x, torch.Tensor) else x

@pytest.mark.parametrize('kind', [dict, OrderedDict, UserDict, list, Pair], ids=lambda k: k.__name__)
@pytest.mark.parametrize('place', ['memory','folder'])
def test_a_model_of_nested_inputs_from_the_cache(tmp_path, kind, place):
    "It gets containers of the type that it knows, also for some of the rows and for the probe"
    torch.manual_seed(0)
    body,seen = nn.Linear(3,2),[]
    def model(o):
        seen.append(type(o))
        return body(o['a'] if kind in (dict,OrderedDict,UserDict) else o[0]) * (o['b'] if kind in (dict,OrderedDict,UserDict) else o[1])
    make = lambda a,b: kind(a=a, b=b) if kind in (dict,OrderedDict,UserDict,Pair) else kind([a,b])
    a,b = torch.randn(8,3),torch.randn(8,1)
    for _ in range(2):
        cache = Cache(None if place == 'memory' else tmp_path/'z')
        for rows in ([0,1,2],[2,3,4,0],[7,6,5,4]):
            cache.open('t')
            assert torch.allclose(cache.run(model, make(a[rows], b[rows])), body(a[rows])*b[rows], atol=1e-6)
        assert len(cache) == 8
    assert set(seen) == {kind}

# --- the owner

class InList(nn.Module):
    def __init__(self, seed): super().__init__(); self.m = [seeded(seed)]
    def forward(self, x): return self.m[0](x)
class NonPersistent(nn.Module):
    def __init__(self, seed): super().__init__(); self.register_buffer('w', seeded(seed).weight.detach().t(), persistent=False)
    def forward(self, x): return x@self.w
class Attribute(nn.Module):
    def __init__(self, seed): super().__init__(); self.m,self.T = seeded(7),1+.1*seed
    def forward(self, x): return self.m(x)/self.T
class Function(nn.Module):
    def __init__(self, seed): super().__init__(); m = seeded(seed); self.f = lambda x: m(x)
    def forward(self, x): return self.f(x)
def seeded(seed): torch.manual_seed(seed); return nn.Linear(8,4)
def quantized(seed): return torch.ao.quantization.quantize_dynamic(nn.Sequential(seeded(seed)), {nn.Linear})

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('make', [InList, NonPersistent, Attribute, Function, quantized], ids=lambda m: m.__name__)
def test_another_teacher_with_the_same_digest_is_found_by_its_output(tmp_path, make):
    x,a,b = torch.randn(6,8),make(1),make(2)
    with torch.no_grad():
        cache = Cache(tmp_path/'z'); cache.open('t'); cache.run(a, x)
        other = Cache(tmp_path/'z'); other.open('t')
        for _ in range(2):  # not only the first time
            with pytest.raises(ValueError, match="another teacher's"): other.run(b, x)
        same = Cache(tmp_path/'z'); same.open('t')
        assert torch.allclose(same.run(a, x), a(x), atol=1e-6)
        memory = Cache(); memory.open('t'); memory.run(a, x)
        memory.open('t')
        assert torch.allclose(memory.run(b, x), b(x), atol=1e-6) and len(memory) == 6

def test_the_probe_costs_four_rows_once_for_each_use(tmp_path):
    rows = []
    def model(x): rows.append(len(x)); return 2*x
    x = torch.randn(10,3)
    for place in (None,tmp_path/'z'):
        cache = Cache(place); cache.open('t')
        for o in x.split(4): cache.run(model, o)
        assert rows == [4,4,2]
        cache.open('t')
        for o in x.flip(0).split(5): cache.run(model, o)
        assert rows == [4,4,2,4]
        rows.clear()
    again = Cache(tmp_path/'z'); again.open('t'); again.run(model, x)
    assert rows == [4]

def test_inputs_of_another_form(tmp_path):
    "A folder is for one form of inputs; memory begins anew"
    x,y = torch.randn(6,3),torch.randn(6,3)
    for place in (None,tmp_path/'z'):
        cache = Cache(place); cache.open('t'); cache.run(lambda x: x, x)
        cache.open('t')
        if place is None: assert torch.equal(cache.run(lambda x,y: x+y, x, y), x+y) and len(cache) == 6
        else:
            with pytest.raises(ValueError, match='1 tensors, got 2'): cache.run(lambda x,y: x+y, x, y)

def test_each_precision_has_its_probe(tmp_path):
    model,x = seeded(1),torch.randn(6,8)
    def half(x):
        with torch.autocast('cpu', torch.bfloat16): return model(x)
    for _ in range(2):
        cache = Cache(tmp_path/'z'); cache.open('t')
        with torch.no_grad():
            assert torch.equal(cache.run(model, x), model(x))
            assert torch.equal(cache.run(half, x, precision='bfloat16'), half(x).float())
            assert len(cache) == 12 and not cache.unconfirmed

def test_rounding_is_not_another_teacher(tmp_path):
    x = torch.randn(6,50)
    masked = lambda f: lambda x: torch.cat([f(x), torch.full_like(x[:,:1], -math.inf)], 1)
    cache = Cache(tmp_path/'z'); cache.open('t'); cache.run(masked(lambda x: 5*x), x)
    for f,ok in ((lambda x: 5*x + 1e-3, True), (lambda x: 5.2*x, False), (lambda x: 5*x[:,:-1], False)):
        other = Cache(tmp_path/'z'); other.open('t')
        if ok: other.run(masked(f), x)
        else:
            with pytest.raises(ValueError, match='random'): other.run(masked(f), x)

def test_two_owners_cannot_share_a_folder(tmp_path):
    "Also if both opened it before either wrote"
    keys,z = row_keys(torch.randn(4,3)).tolist(),torch.ones(4,2)
    a,b = Cache(tmp_path/'z'),Cache(tmp_path/'z')
    a.open('A'); b.open('B')
    a.put(keys, z)
    with pytest.raises(ValueError, match="another teacher's"): b.put(keys[:2], 2*z[:2])
    c = Cache(tmp_path/'z'); c.open('A')
    assert torch.equal(c.get(keys), z)

@pytest.mark.parametrize('text', [None, '', '{"owner": "A"', '{}', 'null', '[]', '"A"', '\0'*5, '{"owner": "A", "shape": ["x"], "classes": 2}'], ids=repr)
def test_a_lost_or_damaged_meta_is_refused_with_the_cure(tmp_path, text):
    a = Cache(tmp_path/'z'); a.open('A'); a.put([1,2], torch.ones(2,2))
    if text is None: (tmp_path/'z'/'meta.json').unlink()
    else: (tmp_path/'z'/'meta.json').write_text(text)
    for owner in 'AB':
        cache = Cache(tmp_path/'z')
        for _ in range(2):
            with pytest.raises(ValueError, match='delete the folder'): cache.open(owner)

def test_rows_under_the_meta_of_another_teacher_are_not_read(tmp_path):
    for owner in 'AB':
        cache = Cache(tmp_path/owner); cache.open(owner); cache.put([1,2], torch.ones(2,2))
    (tmp_path/'A'/'meta.json').write_text((tmp_path/'B'/'meta.json').read_text())
    b = Cache(tmp_path/'A'); b.open('B')
    assert b.missing([1,2]) == [0,1]

def test_a_folder_of_an_earlier_version_is_refused(tmp_path):
    (tmp_path/'meta.json').write_text('{"owner": "A", "shape": [2], "classes": 2}')
    with pytest.raises(ValueError, match='earlier version'): Cache(tmp_path).open('A')

@pytest.mark.parametrize('damage', [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:50]), lambda p: p.write_bytes(b'')])
def test_a_lost_or_damaged_probe_is_refused_with_the_cure(tmp_path, damage):
    cache = Cache(tmp_path/'z'); cache.open('t'); cache.run(lambda x: x, torch.randn(4,3))
    damage(tmp_path/'z'/'probe.pt')
    with pytest.raises(ValueError, match='delete the folder'): Cache(tmp_path/'z').open('t')

# --- padding

def padded(*lengths, value=1, first=False):
    "A batch of texts, padded to the longest"
    texts = [torch.randint(2, 99, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    return torch.stack([F.pad(t, (max(lengths)-len(t),0) if first else (0,max(lengths)-len(t)), value=value) for t in texts])

@pytest.mark.parametrize('first', [False,True])
@pytest.mark.parametrize('as_dict', [False,True])
def test_padding_is_named_in_the_first_epoch(first, as_dict):
    wrap = lambda ids: {'ids': ids, 'mask': (ids != 1).long()} if as_dict else ids
    model = lambda x: (x['ids'] if as_dict else x)[:,:2].float()
    cache = Cache(); cache.open('t', n_items=6)
    cache.run(model, wrap(padded(5,8,3, first=first)))
    with pytest.warns(UserWarning, match='longest of their batch'): cache.run(model, wrap(padded(6,4,9, first=first)))
    with pytest.raises(ValueError, match='pad all items to one length'): cache.run(model, wrap(padded(5,4,3, first=first)))

def test_no_false_alarm_of_padding():
    "One length for all; batches of equal lengths; a last token that all texts share; images of integers"
    model = lambda x: x.flatten(1)[:,:2].float()
    one = [F.pad(padded(*n), (0,20-max(n)), value=1) for n in ((5,8,3),(6,4,9))]
    g = torch.Generator().manual_seed(0)
    equal = [torch.randint(2, 1000, (4,n), generator=g) for n in (5,8,9)]
    end = [torch.cat([o, torch.full((4,2), 7)], 1) for o in equal]
    images = [torch.randint(0, 255, (4,1,n,n), generator=g, dtype=torch.uint8) for n in (5,8)]
    for batches_ in (one, equal, end, images):
        cache = Cache(); cache.open('t', n_items=100)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            for o in batches_: cache.run(model, o)

# --- precision

@pytest.mark.parametrize('kwargs,tol', [(dict(dtype=torch.bfloat16), .05), (dict(channels_last=True), 1e-5), (dict(dtype=torch.bfloat16, channels_last=True), .05)], ids=str)
@pytest.mark.parametrize('loss', [SoftTarget, Attention])
def test_precision_and_layout(kwargs, tol, loss):
    model = Counting()
    before = weights(model)
    _,exact = fitted(model, loss=loss)
    _,kd = fitted(Teacher(model, **kwargs), loss=loss)
    assert kd.curves['train']['kd_loss'] == pytest.approx(exact.curves['train']['kd_loss'], rel=tol)
    assert same(before, weights(model)) and all(p.dtype == torch.float32 and p.is_contiguous() for p in model.parameters())

def test_the_students_autocast_leaves_a_teacher_with_its_own_dtype_alone():
    seen = []
    model = net(width=6); model.fc.register_forward_hook(lambda m,i,o: seen.append(o.dtype))
    with torch.autocast('cpu', dtype=torch.float16): Teacher(model, dtype=torch.bfloat16)(torch.randn(2,1,8,8))
    assert seen == [torch.bfloat16]

# --- is the teacher any good?

def test_teacher_metrics():
    dls = batches(shuffle=False)
    learn = learner(dls, metrics=accuracy)
    model = net(width=6, seed=7).train()
    kd = KnowledgeDistillationCallback(model, SoftTarget)
    x,y = map(torch.stack, zip(*dls.valid_ds))
    with torch.no_grad(): z = model.eval()(x)
    model.train()
    expected = {'loss': F.cross_entropy(z, y).item(), 'accuracy': (z.argmax(1) == y).float().mean().item()}
    assert kd.teacher_metrics(learn) == pytest.approx(expected, rel=1e-5) and model.training
    with pytest.raises(ValueError, match='fit'): kd.teacher_metrics()
    learn.fit(1, cbs=kd)
    assert kd.teacher_metrics() == pytest.approx(expected, rel=1e-5)

@pytest.mark.parametrize('loss_func,mean', [(nn.MSELoss(), lambda z: z.mean(0)), (nn.BCEWithLogitsLoss(), lambda z: z.sigmoid().mean(0).logit()),
    (CrossEntropyLossFlat(), lambda z: z.softmax(-1).mean(0).log()), (CrossEntropyLossFlat(axis=1), lambda z: z.softmax(2).mean(0).log())], ids=['regression','labels','classes','maps'])
def test_the_metrics_of_an_ensemble_are_of_what_its_loss_averages(loss_func, mean):
    maps = getattr(loss_func, 'axis', -1) == 1
    def model(seed): torch.manual_seed(seed); return nn.Conv2d(1, 3, 1) if maps else nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x = torch.randn(8,1,4,4)
    classes = isinstance(loss_func, CrossEntropyLossFlat)
    y = torch.randint(3, (8,4,4) if maps else (8,)) if classes else torch.rand(8, 3).round()
    teachers,items = [model(s).requires_grad_(False) for s in (1,2)],list(zip(x, y))
    learn = learner(DataLoaders.from_dsets(items, items, bs=8, device='cpu'), model(3), loss_func=loss_func)
    by_hand = loss_func(mean(torch.stack([m(x) for m in teachers])), y)
    assert KnowledgeDistillationCallback(teachers, Logits).teacher_metrics(learn)['loss'] == pytest.approx(by_hand.item(), rel=1e-5)

# --- teachers that move

def test_ema_teacher_is_the_moving_average(tmp_path):
    history = []
    class Keep(Callback):
        order = -5
        def before_fit(self): history.append(weights(self.model))
        def after_step(self): history.append(weights(self.model))
    learn,ema = learner(batches(shuffle=False), net(seed=1)),EMATeacher(decay=.6)
    learn.fit(2, cbs=[KnowledgeDistillationCallback(ema, SoftTarget), Keep()])
    average = {k: v.double() for k,v in history[0].items()}
    for n,w in enumerate(history[1:], 1):
        d = min(.6, (1+n)/(10+n))
        for k in average: average[k] = d*average[k] + (1-d)*w[k].double() if w[k].is_floating_point() else w[k].double()
    for k,v in ema.model.state_dict().items(): assert torch.allclose(v.double(), average[k], rtol=1e-4, atol=1e-6), k
    before = len(history)
    learn.fit(1, cbs=KnowledgeDistillationCallback(ema, SoftTarget))
    assert unwrap(learn.model) is not ema.model and before

@pytest.mark.parametrize('moving', ['average','peer'])
def test_lr_find_puts_a_moving_teacher_back(moving):
    learn,peer = learner(batches(shuffle=False), net(seed=1)),learner(batches(shuffle=False), net(width=5, seed=2))
    teacher = EMATeacher(.9) if moving == 'average' else PeerTeacher(peer)
    learn.add_cb(KnowledgeDistillationCallback(teacher, SoftTarget))
    learn.fit(1)
    before = weights(teacher.models[0])
    learn.lr_find(end_lr=1e4, num_it=6, show_plot=False)
    assert same(before, weights(teacher.models[0]))

def test_a_moving_average_in_half_precision_moves():
    learn,ema = learner(batches(shuffle=False), net(seed=1)),EMATeacher(.5, dtype=torch.bfloat16)
    gaps = []
    class Watch(Callback):
        order = 30
        def after_step(self): gaps.append(max((a.float()-b.float()).abs().max().item() for a,b in zip(ema.running[0].parameters(), ema.average.module.parameters())))
    learn.fit(2, lr=1., cbs=[KnowledgeDistillationCallback(ema, SoftTarget), Watch()])
    assert max(gaps) < .02  # rounding, and no more

def test_a_moving_average_teaches_by_its_activations():
    learn = learner(batches(shuffle=False), net(seed=1))
    kd = KnowledgeDistillationCallback(EMATeacher(.9), [SoftTarget,Attention], ['conv2'], ['conv2'], weight=.3)
    learn.fit(2, cbs=kd)
    assert any(v > 0 for v in kd.curves['train']['attention_loss']) and not hooks(learn.model, *kd.teacher.models)

def test_what_a_peer_cannot_do_is_refused():
    peer = learner(batches(shuffle=False), net(seed=2))
    with pytest.raises(ValueError, match='logits only'): fitted(PeerTeacher(peer), loss=[SoftTarget,Attention(layers={'conv2':'conv2'})])
    with pytest.raises(ValueError, match='GradientAccumulation'): fitted(PeerTeacher(peer), cbs=[GradientAccumulation(16)])
    assert not hooks(peer.model)

def test_a_table_without_continuous_columns_has_keys():
    cat = torch.arange(6).reshape(3,2)
    assert len(set(row_keys(cat, torch.empty(3,0)).tolist())) == 3

def test_metrics_in_the_middle_of_a_fit_leave_the_teacher_on():
    kept = []
    class Ask(Callback):
        order = 30
        def after_batch(self):
            if self.training and self.iter == 0: kd.teacher_metrics(); kept.append(kd.teacher.running[0])
    kd = KnowledgeDistillationCallback(Teacher(net(width=6, seed=7), dtype=torch.bfloat16), SoftTarget)
    learner(batches(shuffle=False), net(seed=1)).fit(2, cbs=[kd, Ask()])
    assert len(kept) == 2 and kept[0] is kept[1]

def test_ema_teacher_refuses_a_cache():
    with pytest.raises(ValueError, match='cached'): EMATeacher(cache=True)
    with pytest.raises(ValueError, match='decay'): EMATeacher(decay=1.)

def test_mutual_learning_as_by_hand():
    dls = batches(shuffle=False)
    a,b,A,B = net(seed=1),net(width=5, seed=2),net(seed=1).train(),net(width=5, seed=2).train()
    learn,peer = learner(dls, a),learner(dls, b)
    learn.fit(1, cbs=KnowledgeDistillationCallback(PeerTeacher(peer), Mutual, weight='paper'))
    kl = lambda s,t: F.kl_div(F.log_softmax(s,1), F.softmax(t.detach(),1), reduction='batchmean')
    for x,y in dls.train:
        za,zb = A(x),B(x)
        la,lb = F.cross_entropy(za,y) + kl(za,zb),F.cross_entropy(zb,y) + kl(zb,za)
        for m,l in ((A,la),(B,lb)): m.zero_grad(); l.backward()
        with torch.no_grad():
            for p in [*A.parameters(), *B.parameters()]: p -= .1*p.grad
    close(weights(A), weights(a)); close(weights(B), weights(b))

def test_a_peer_knows_where_the_classes_are():
    seen = []
    def mutual(pred, teacher_pred, axis, ignore_index, target):
        seen.append((axis, ignore_index, target.shape))
        return SoftTarget(T=1)(pred=pred, teacher_pred=teacher_pred, axis=axis)
    items = [(torch.randn(1,4,4), torch.zeros(4,4).long())]*8
    learn,peer = [learner(DataLoaders.from_dsets(items, items, bs=8, device='cpu'), nn.Conv2d(1, 3, 1), loss_func=CrossEntropyLossFlat(axis=1, ignore_index=9)) for _ in range(2)]
    learn.fit(2, cbs=KnowledgeDistillationCallback(PeerTeacher(peer, loss=mutual), Mutual))
    assert seen == [(1,9,(8,4,4))]*2
    with pytest.raises(ValueError, match='logits only'): PeerTeacher(peer, loss=Attention)

def test_peers_are_saved_on_their_own(tmp_path):
    dls = batches(shuffle=False)
    learn,peer = learner(dls, net(seed=1), path=tmp_path),learner(dls, net(width=5, seed=2), path=tmp_path)
    learn.fit(2, cbs=KnowledgeDistillationCallback(PeerTeacher(peer), Mutual, weight='paper'))
    learn.save('a'); peer.save('b')
    assert torch.load(tmp_path/'models'/'b.pth', weights_only=False)['model'].keys() == peer.model.state_dict().keys()
    assert not hooks(learn.model, peer.model) and peer.validate() and learn.validate()
    with pytest.raises(TypeError, match='Learner'): PeerTeacher(net())

@pytest.mark.parametrize('place', ['memory','folder'])
def test_activations_of_equal_weights_and_another_forward(place, tmp_path):
    "are another teacher's: memory forgets them, a folder refuses"
    cache = Cache() if place == 'memory' else tmp_path/'z'
    fitted(Teacher(Counting(), cache=cache), loss=Attention)
    other = Counting()
    real = other.net.forward
    other.net.forward = lambda x: real(-2*x)
    if place == 'folder':
        with pytest.raises(ValueError, match="another teacher's"): fitted(Teacher(other, cache=cache), loss=Attention)
    else:
        fitted(Teacher(other, cache=cache), loss=Attention)
        assert other.rows >= 24

def test_processes_see_each_others_rows_from_the_next_epoch_on(tmp_path):
    "two on one folder, in turns; a row that is half written is left out until it is whole"
    model,x = net(seed=7),torch.randn(24, 1, 8, 8)
    count = []
    model.register_forward_pre_hook(lambda m,a: count.append(len(a[0])))
    a,b = [Teacher(model, cache=tmp_path) for _ in range(2)]
    def rows(t, *xs, layers=()):
        count.clear()
        for o in xs: t.run(o, layers=layers)
        return sum(count)
    with a.on(), b.on():
        assert rows(a, x[:8], layers=('conv1',)) == 8 and rows(b, x[8:16], layers=('conv1',)) == 8 + 4  # four confirm that it is the same teacher
        for t in a,b: t.cache.begin_epoch()
        count.clear()
        assert rows(b, x[:8], layers=('conv1',)) == 0 and rows(a, x[8:16], layers=('conv1',)) == 0
        torch.testing.assert_close(a.run(x[8:16]).logits[0], model.eval()(x[8:16]).detach())
        whole = a.cache.file.read_bytes()
        rows(a, x[16:])
        longer = a.cache.file.read_bytes()
        a.cache.file.write_bytes(longer[:-5] + bytes(5))  # the last row is half written
        b.cache.begin_epoch()
        assert rows(b, x[16:23]) == 0 and len(b.cache.missing(row_keys(x[23:]).tolist())) == 1
        a.cache.file.write_bytes(longer)
        b.cache.begin_epoch()
        assert rows(b, x[16:]) == 0

@pytest.mark.parametrize('mean,std,warned', [((127/255,)*3,(128/255,)*3,False), ((.5,)*3,(.5,)*3,False), ((.485,.456,.406),(.229,.224,.225),True), ((.5,)*3,(.55,)*3,True)])
def test_a_configuration_that_is_rounded_is_no_other_one(mean, std, warned, recwarn):
    "timm says mean 0.5 of models whose authors wrote 127/255"
    from types import SimpleNamespace
    from fastai.data.transforms import Normalize
    model = nn.Linear(2, 2)
    model.pretrained_cfg = dict(mean=(.5,)*3, std=(.5,)*3)
    dls = SimpleNamespace(vocab=None, after_batch=SimpleNamespace(fs=[Normalize.from_stats(mean, std, cuda=False)]))
    Teacher(model).adapt(dls)
    assert bool([w for w in recwarn if "configuration names images" in str(w.message)]) == warned
