"Rows without labels that join the batches of a fit"
import random
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from fastai.basics import Callback, CancelBatchException, CrossEntropyLossFlat, DataLoader, DataLoaders, L, Learner, SGD, Transform, accuracy, noop, set_seed
from fastai.callback.all import CutMix, GradientAccumulation, MixUp, ModelResetter, RNNCallback
from fastai.text.all import AWD_LSTM, TextDataLoaders, TensorText, get_text_classifier
from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, IndexSplitter, ItemGetter, RandomResizedCrop, TensorImage, aug_transforms
from fastkd.all import Cache, DecoupledKD, EMATeacher, FitNet, KnowledgeDistillationCallback as KD, Logits, Mutual, NormalizedKD, PeerTeacher, SoftTarget, Teacher, Views, compare
from fastkd.unlabeled import mixed, texts_joined, unlabeled_loader
from test_export import mentions_fastkd

g = torch.Generator().manual_seed(0)
x,y,u = torch.randn(24, 5, generator=g),torch.arange(24) % 3,torch.randn(32, 5, generator=g)

def data(n=24, bs=8, labeled=True, shuffle=False, cls=DataLoader):
    items = list(zip(x[:n], y[:n])) if labeled else [(o,) for o in x[:n]]
    return DataLoaders(*[DataLoader(items, bs=bs, shuffle=shuffle and i == 0, num_workers=0) for i in range(2)], device=torch.device('cpu'))

def rows(bs=8, shuffle=True, items=None): return DataLoader([(o,) for o in u] if items is None else items, bs=bs, shuffle=shuffle, num_workers=0)
def net(seed=0, ni=5, no=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(ni, 6), nn.Tanh(), nn.Linear(6, no))

class Seen(Callback):
    "What the model gets, and what is left of it afterwards"
    order = 950
    def __init__(self): self.inputs,self.after,self.preds,self.valid = [],[],[],[]
    def before_batch(self): (self.inputs if self.training else self.valid).append(self.x.clone())
    def after_loss(self):
        if self.training:
            self.after.append((self.x.clone(), len(self.pred), len(self.y)))
            self.preds.append(self.pred.detach().clone())

def fit(learn, kd, epochs=1, lr=.1, cbs=(), **kwargs):
    seen = Seen()
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr, cbs=[cb for cb in (kd, seen, *cbs) if cb], **kwargs)
    return seen

def learner(dls=None, model=None, **kwargs): return Learner(dls or data(), model or net(), CrossEntropyLossFlat(), opt_func=partial(SGD, mom=0., wd=0.), metrics=accuracy, **kwargs)

def test_equal_to_a_loop_by_hand():
    "the labels' loss of the labeled rows, the term of all"
    learn,teacher = learner(),net(1)
    by_hand = deepcopy(learn.model)
    seen = fit(learn, KD(teacher, SoftTarget(T=2), weight=.3, unlabeled=rows()), epochs=2)
    assert [len(o) for o in seen.inputs] == [16]*6 and [len(o) for o in seen.valid] == [8]*6
    for i,xb in enumerate(seen.inputs):
        assert torch.equal(xb[:8], x[i%3*8:i%3*8+8]) and all(any(torch.equal(o, r) for r in u) for o in xb[8:])
        z,t = by_hand(xb),teacher(xb).detach()
        kl = (F.softmax(t/2, -1)*(F.log_softmax(t/2, -1)-F.log_softmax(z/2, -1))).sum(-1).mean()*4
        loss = .7*F.cross_entropy(z[:8], y[i%3*8:i%3*8+8]) + .3*kl
        for p,d in zip(by_hand.parameters(), torch.autograd.grad(loss, by_hand.parameters())): p.data -= .1*d
    for p,q in zip(learn.model.parameters(), by_hand.parameters()): torch.testing.assert_close(p, q)

def test_others_see_the_labeled_rows():
    seen = fit(learner(), KD(net(1), SoftTarget, unlabeled=rows(bs=5)))
    assert all(torch.equal(a, xb[:8]) and (n,m) == (8,8) for (a,n,m),xb in zip(seen.after, seen.inputs)) and [len(o) for o in seen.inputs] == [13]*3

def test_weight_0_is_the_plain_fit():
    a,b = learner(),learner()
    seen = fit(a, KD(net(1), SoftTarget, weight=0, unlabeled=rows()))
    fit(b, None)
    assert [len(o) for o in seen.inputs] == [8]*3
    assert all(torch.equal(p, q) for p,q in zip(a.model.parameters(), b.model.parameters()))

def test_a_schedule_that_is_0_joins_nothing():
    seen = fit(learner(), KD(net(1), SoftTarget, schedule=lambda p: float(p >= .5), unlabeled=rows()), epochs=2)
    assert [len(o) for o in seen.inputs] == [8]*3 + [16]*3

@pytest.mark.parametrize('loss', [DecoupledKD, NormalizedKD])
def test_losses_of_labels_see_the_labeled_rows(loss):
    learn,teacher = learner(),net(1)
    by_hand,l = deepcopy(learn.model),loss()
    seen = fit(learn, KD(teacher, [l, Logits()], weight=[.5,.5], label_weight=0, unlabeled=rows()))
    for i,xb in enumerate(seen.inputs):
        z,t = by_hand(xb),teacher(xb).detach()
        total = .5*loss()(z[:8], t[:8], target=y[i*8:i*8+8]) + .5*F.mse_loss(z, t)
        for p,d in zip(by_hand.parameters(), torch.autograd.grad(total, by_hand.parameters())): p.data -= .1*d
    for p,q in zip(learn.model.parameters(), by_hand.parameters()): torch.testing.assert_close(p, q)

@pytest.mark.parametrize('ignored', [0,2,255])
def test_maps_without_labels_count_everywhere(ignored):
    "an ignored label leaves out places of labeled rows; rows without labels have no label to ignore"
    im = torch.randn(12, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    masks = torch.arange(12*16).reshape(12, 4, 4) % 3
    masks[:,:2] = ignored
    more = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    dls = DataLoaders(*[DataLoader(list(zip(im, masks)), bs=4, num_workers=0)]*2, device='cpu')
    make = lambda s: nn.Conv2d(2, 3, 1).requires_grad_() if s is None else [torch.manual_seed(s), nn.Conv2d(2, 3, 1)][1]
    model,teacher = make(0),make(1)
    learn = Learner(dls, deepcopy(model), CrossEntropyLossFlat(axis=1, ignore_index=ignored), opt_func=partial(SGD, mom=0., wd=0.))
    seen = fit(learn, KD(teacher, SoftTarget(T=1), weight=1., label_weight=0, unlabeled=rows(4, items=[(o,) for o in more])))
    for i,xb in enumerate(seen.inputs):
        keep = torch.ones(8, 4, 4, dtype=torch.bool)
        keep[:4] = masks[i*4:i*4+4] != ignored
        z,t = [m(xb).movedim(1, -1)[keep] for m in (model,teacher)]
        loss = F.kl_div(z.log_softmax(-1), t.detach().log_softmax(-1), log_target=True, reduction='batchmean')
        for p,d in zip(model.parameters(), torch.autograd.grad(loss, model.parameters())): p.data -= .1*d
    for p,q in zip(learn.model.parameters(), model.parameters()): torch.testing.assert_close(p, q)

def test_activations_of_all_rows():
    learn,teacher = learner(),net(1)
    by_hand = deepcopy(learn.model)
    seen = fit(learn, KD(teacher, FitNet, '0', '0', weight=1., label_weight=0, unlabeled=rows()))
    for xb in seen.inputs:
        loss = F.mse_loss(by_hand[0](xb), teacher[0](xb).detach())
        for p,d in zip(by_hand[0].parameters(), torch.autograd.grad(loss, by_hand[0].parameters())): p.data -= .1*d
    for p,q in zip(learn.model.parameters(), by_hand.parameters()): torch.testing.assert_close(p, q)

def test_epochs_are_those_of_the_labeled_rows_and_all_others_come():
    seen = fit(learner(data(n=8)), KD(net(1), SoftTarget, unlabeled=rows()), epochs=40)
    shown = torch.cat([xb[8:] for xb in seen.inputs])
    assert len(seen.inputs) == 40 and len(shown.unique(dim=0)) == len(u)
    seen = fit(learner(), KD(net(1), SoftTarget, unlabeled=rows(items=[(o,) for o in u[:16]])))  # fewer than labeled ones
    assert len(torch.cat([xb[8:] for xb in seen.inputs])) == 24

def test_a_batch_of_another_size():
    "as many as its loader yields"
    seen = fit(learner(), KD(net(1), SoftTarget, unlabeled=rows(bs=20)))
    assert [len(o) for o in seen.inputs] == [28,20,28]

pictures = [(np.random.default_rng(i).integers(0, 256, (20,20,3)).astype('uint8'), str(i%2)) for i in range(40)]
def photographs(bs=8, n=16, cls=None):
    block = DataBlock((ImageBlock, CategoryBlock), get_x=ItemGetter(0), get_y=ItemGetter(1), splitter=IndexSplitter(range(n-8, n)), item_tfms=RandomResizedCrop(16, min_scale=.3),
        batch_tfms=aug_transforms(size=12))
    return block.dataloaders(pictures[:n], bs=bs, num_workers=0, device='cpu')
def convnet(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

def test_a_list_of_items_is_shuffled_and_augmented():
    dls = photographs()
    dl = unlabeled_loader(pictures[16:], dls)
    assert (dl.bs, dl.n, dl.shuffle) == (8,24,True)
    a,b = [torch.cat([o[0] for o in dl]) for _ in range(2)]
    assert a.shape == b.shape == (24,3,12,12) and not torch.equal(a.mean((1,2,3)).sort().values, b.mean((1,2,3)).sort().values)  # of whole images the means would agree
    assert dl.dataset.split_idx == 0 and dls.valid_ds.split_idx == 1 and dls.valid.after_batch.split_idx in (1,None)
    valid = [torch.cat([o[0] for o in dls.valid]) for _ in range(2)]
    assert torch.equal(*valid)
    seen = fit(Learner(dls, convnet(), CrossEntropyLossFlat()), KD(convnet(1), SoftTarget, unlabeled=pictures[16:]), epochs=2)
    assert [len(o) for o in seen.inputs] == [16]*2

def test_few_items():
    dl = unlabeled_loader(pictures[16:19], photographs())
    assert [len(b[0]) for b in dl] == [3]

def test_a_table():
    import pandas as pd
    from fastai.tabular.all import Categorify, FillMissing, Normalize as Norm, TabularDataLoaders, tabular_learner
    df = pd.DataFrame(dict(a=list('xyz')*20, b=np.arange(60.), y=[0,1]*30))
    dls = TabularDataLoaders.from_df(df[:30], procs=[Categorify,FillMissing,Norm], cat_names=['a'], cont_names=['b'], y_names='y', y_block=CategoryBlock, valid_idx=list(range(20,30)), bs=5)
    learn = tabular_learner(dls, layers=[4])
    t = tabular_learner(dls, layers=[8]).model
    sizes = []
    learn.model.register_forward_pre_hook(lambda m,a: sizes.append((len(a[0]), len(a[1]))) if m.training else None)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .1, cbs=KD(t, SoftTarget, unlabeled=df[30:].drop(columns='y')))
    assert set(sizes) == {(10,10)}

@pytest.mark.parametrize('make', [lambda: rows(shuffle=False), lambda: torch.utils.data.DataLoader(TensorDataset(u), 8), lambda: photographs().test_dl(pictures[16:])])
def test_a_loader_that_does_not_shuffle_is_a_warning(make):
    with pytest.warns(UserWarning, match='does not shuffle'): unlabeled_loader(make(), None)

@pytest.mark.parametrize('make', [rows, lambda: torch.utils.data.DataLoader(TensorDataset(u), 8, shuffle=True)])
def test_a_loader_that_shuffles_is_none(make, recwarn):
    fit(learner(), KD(net(1), SoftTarget, unlabeled=make()))
    assert not [w for w in recwarn if 'shuffle' in str(w.message)]

def test_what_labels_the_loader_has_does_not_matter():
    items = [(o,torch.tensor(7)) for o in u]
    seen = fit(learner(), KD(net(1), SoftTarget, unlabeled=rows(items=items)))
    assert [len(o) for o in seen.inputs] == [16]*3

@pytest.mark.parametrize('mixer', [MixUp,CutMix])
def test_mixed_among_themselves_with_the_same_share(mixer):
    dls = DataLoaders(*[DataLoader([(torch.full((1,16,16), 10.+i), torch.tensor(i%3)) for i in range(8)], bs=8, num_workers=0)]*2, device='cpu')
    more = DataLoader([(torch.full((1,16,16), 1000.*(i+1)),) for i in range(12)], bs=12, shuffle=True, num_workers=0)
    cb,shares = mixer(1.),[]
    class Share(Callback):
        order = 940
        def before_batch(self):
            if self.training: shares.append((cb.lam.clone().reshape(-1), len(cb.yb1[0])))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 3))
    seen = fit(Learner(dls, model, CrossEntropyLossFlat()), KD(deepcopy(model), SoftTarget, unlabeled=more), cbs=[cb, Share()], lr=0., epochs=4)
    for xb,(lam,n) in zip(seen.inputs, shares):
        assert n == 8 and xb[:8].max() < 20 and xb[8:].min() >= 1000 and len(xb) == 20  # each kind among itself
        if mixer is MixUp:
            for k,o in enumerate(xb[8:]):  # lam*a + (1-lam)*b for some a, b
                found = [(a,b) for a in range(1, 13) for b in range(1, 13) if abs(lam[k%8]*a*1000 + (1-lam[k%8])*b*1000 - o.mean()) < .1]
                assert found
        else: assert len({int(o.unique().numel()) for o in xb[8:]}) <= 2

def test_mixed_leaves_the_callback_as_it_was():
    cb = MixUp(1.)
    learn = learner(cbs=[cb])
    cb.before_train()
    cb.yb1 = (y[:2],)
    cb.lam,learn.xb,learn.yb = torch.tensor([.7,.6]),(x[:2],),(y[:2],)
    before,distrib = dict(vars(cb)),cb.distrib
    out, = mixed(cb, (u[:3],))
    assert out.shape == (3,5) and all(vars(cb)[k] is v for k,v in before.items()) and len(vars(cb)) == len(before) and cb.distrib is distrib and len(learn.xb[0]) == 2
    assert mixed(cb, (u[:1],))[0] is not None

def test_batches_without_any_label():
    learn,teacher = learner(data(labeled=False)),net(1)
    by_hand = deepcopy(learn.model)
    learn.metrics = []
    seen = Seen(); seen.after_loss = noop
    learn.dls.n_inp = 1
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .1, cbs=[KD(teacher, Logits, weight=1., unlabeled=rows()), seen])
    for xb in seen.inputs:
        assert len(xb) == 16
        loss = F.mse_loss(by_hand(xb), teacher(xb).detach())
        for p,d in zip(by_hand.parameters(), torch.autograd.grad(loss, by_hand.parameters())): p.data -= .1*d
    for p,q in zip(learn.model.parameters(), by_hand.parameters()): torch.testing.assert_close(p, q)

def test_accumulation():
    "a step after two batches is the step of their sum"
    learn,teacher = learner(data(n=16)),net(1)
    by_hand = deepcopy(learn.model)
    seen = fit(learn, KD(teacher, Logits, weight=.5, unlabeled=rows()), cbs=[GradientAccumulation(16)])
    total = 0
    for i,xb in enumerate(seen.inputs):
        z = by_hand(xb)
        total = total + (.5*F.cross_entropy(z[:8], y[i*8:i*8+8]) + .5*F.mse_loss(z, teacher(xb).detach()))/2
    for p,d in zip(by_hand.parameters(), torch.autograd.grad(total, by_hand.parameters())): p.data -= .1*d
    for p,q in zip(learn.model.parameters(), by_hand.parameters()): torch.testing.assert_close(p, q)

def test_mixed_precision():
    from fastkd.experiments.training import Bfloat16
    dtypes,learn = set(),learner()
    learn.model[0].register_forward_hook(lambda m,a,o: dtypes.add((o.dtype, len(o))) if m.training else None)
    fit(learn, KD(net(1), [SoftTarget(),FitNet()], '0', '0', unlabeled=rows()), cbs=[Bfloat16()])
    assert dtypes == {(torch.bfloat16,16)} and all(p.isfinite().all() and p.dtype == torch.float32 for p in learn.model.parameters())

@pytest.mark.parametrize('place', ['memory','folder'])
def test_views_repeat_them_too(place, tmp_path):
    "so a cache knows them from epoch n on, and so it does for the next student"
    teacher = convnet(1)
    count = []
    teacher.register_forward_pre_hook(lambda m,a: count.append(len(a[0])))
    cache = Cache(None if place == 'memory' else tmp_path, views=2)
    dls = photographs()
    learn,watch = Learner(dls, convnet(), CrossEntropyLossFlat()),[]
    class Epochs(Callback):
        def before_train(self): count.clear()
        def after_train(self): watch.append(sum(count))
    kd = KD(Teacher(teacher, cache=cache), SoftTarget, unlabeled=pictures[16:])
    seen = fit(learn, kd, 5, cbs=[Epochs(), MixUp(1.)])
    assert watch[1] == 16 and watch[2:] == [0,0,0] and watch[0] in (16,17,20,24,32), watch
    assert [torch.equal(a, b) for a,b in zip(seen.inputs[:1], seen.inputs[2:3])] == [True]

@pytest.mark.parametrize('views', [False,True])
@pytest.mark.parametrize('make', [lambda: rows(bs=32), lambda: torch.utils.data.DataLoader(TensorDataset(u), 32, shuffle=True)])
def test_each_process_has_its_own(make, views, monkeypatch):
    import fastkd.unlabeled as U
    monkeypatch.setattr(U, 'num_distrib', lambda: 2)
    orders = []
    for rank in range(2):
        monkeypatch.setattr(U, 'rank_distrib', lambda: rank)
        set_seed(0)
        v = Views(2) if views else None
        if views: v.view = 0
        cb = U.Unlabeled(make(), lambda: True, v)
        cb.dl = cb.items
        cb.learn = SimpleNamespace(xb=(x,))
        cb.before_train()
        orders.append(next(cb.batches)[0])
    assert not torch.equal(*orders)

def test_texts():
    "each row is read as by itself, and the labels belong to their rows"
    import pandas as pd
    rng = random.Random(0)
    texts = [' '.join(rng.choice('abcdefgh')*2 for _ in range(rng.randint(2, 90))) for _ in range(40)]
    df = pd.DataFrame(dict(text=texts, label=[t.split()[0] in ('aa','bb','cc') for t in texts]))
    dls = TextDataLoaders.from_df(df[:24], text_col='text', label_col='label', valid_pct=.25, seed=0, bs=6, seq_len=16, num_workers=0, device='cpu')
    config = dict(emb_sz=8, n_hid=12, n_layers=1, pad_token=1, bidir=False, output_p=0., hidden_p=0., input_p=0., embed_p=0., weight_p=.2)
    def model(s):
        torch.manual_seed(s)
        m = get_text_classifier(AWD_LSTM, len(dls.vocab[0]), 2, seq_len=16, config=config, drop_mult=1., lin_ftrs=[6], ps=[0.])
        return m

    learn = Learner(dls, model(0), CrossEntropyLossFlat(), cbs=[ModelResetter(), RNNCallback()])
    class Look(Callback):
        order = 895
        def before_batch(self):
            if self.training: self.whole = self.learn.xb[0]
        def after_loss(self):
            if self.training:
                rows = [r[r != 1].tolist() for r in self.x]
                all_rows = [r[r != 1].tolist() for r in self.whole]
                assert len(self.whole) == 12 and len(self.x) == len(self.pred) == 6 and all(r in all_rows for r in rows)
                assert sorted(map(len, all_rows), reverse=True) == list(map(len, all_rows))
                for r,p in zip(rows, self.pred): assert any(torch.equal(p, o) and r == q for o,q in zip(self.learn.rows_without_labels.output[0], all_rows))
    fit(learn, KD(model(1), SoftTarget, unlabeled=df[24:]), cbs=[Look()], lr=1e-3)
    a,b = next(iter(dls.train))[0],TensorText(torch.tensor([[5,6,7,8],[9,8,7,6]]))
    (whole,),pos = texts_joined(a, b, dls.train, 1)
    for i,p in enumerate(pos.tolist()): assert whole[p][whole[p] != 1].tolist() == a[i][a[i] != 1].tolist()
    assert sorted(r[r != 1].tolist() for r in whole if len(r[r != 1]) == 4 and r[r != 1][0] in (5,9))[-1] == [9,8,7,6]

def test_inputs_in_dictionaries():
    class Dict(nn.Module):
        def __init__(self): super().__init__(); self.net = net()
        def forward(self, d): return dict(logits=self.net(d['a']+d['b']))
    items = [(dict(a=a,b=a),l) for a,l in zip(x,y)]
    dls = DataLoaders(*[DataLoader(items, bs=8, num_workers=0)]*2, device='cpu')
    teacher = Dict(); teacher.net = net(1)
    learn,sizes = Learner(dls, Dict(), lambda p,t: F.cross_entropy(p['logits'], t)),[]
    learn.model.net.register_forward_pre_hook(lambda m,a: sizes.append(len(a[0])) if m.training else None)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .1, cbs=KD(teacher, SoftTarget, unlabeled=rows(items=[(dict(a=o,b=o),) for o in u])))
    assert sizes == [16]*3

def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r'\(4,\) of real numbers, and those of the training batch \(5,\)'): fit(learner(), KD(net(1), SoftTarget, unlabeled=rows(items=[(o[:4],) for o in u])))

@pytest.mark.parametrize('items,word', [([],'empty list'), (rows(items=[]),'no batch'), ([object()]*3,'make no batch')])
def test_nothing_to_join_is_refused(items, word):
    dls = photographs() if word == 'make no batch' else data()
    model = convnet() if word == 'make no batch' else net()
    with pytest.raises(ValueError, match=word): fit(Learner(dls, model, CrossEntropyLossFlat()), KD(deepcopy(model), SoftTarget, unlabeled=items))

def test_a_peer_is_refused():
    dls = data()
    with pytest.raises(ValueError, match='leave out `unlabeled`'): fit(learner(dls), KD(PeerTeacher(learner(dls, net(1))), Mutual, unlabeled=rows()))

def test_a_moving_average_teaches():
    learn = learner()
    seen = fit(learn, KD(EMATeacher(), SoftTarget, unlabeled=rows()), epochs=2)
    assert [len(o) for o in seen.inputs] == [16]*6

class Exporting(Callback):
    order = 960
    def after_batch(self):
        if self.training: self.learn.export('x.pkl')

def test_nothing_is_left_behind(tmp_path):
    learn = learner()
    class Fail(Callback):
        order = 960
        def before_batch(self):
            if self.training and self.iter == 1: raise KeyboardInterrupt
    cbs = list(learn.cbs)
    with pytest.raises(KeyboardInterrupt): fit(learn, KD(net(1), SoftTarget, unlabeled=rows()), cbs=[Fail()])
    assert [type(cb).__name__ for cb in learn.cbs if type(cb).__module__.startswith('fastkd')] == []
    learn = Learner(photographs(), convnet(), CrossEntropyLossFlat(), path=tmp_path)
    fit(learn, KD(convnet(1), SoftTarget, unlabeled=pictures[16:]), cbs=[Exporting()])
    assert not mentions_fastkd(tmp_path/'x.pkl')

def test_lr_find_and_validate():
    learn = learner(data(n=24))
    kd = KD(net(1), SoftTarget, unlabeled=rows())
    before = learn.validate()
    learn.add_cb(kd)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=4, show_plot=False)
    assert learn.validate() == before

def test_the_start_line_says_so(capsys):
    learn = learner()
    kd = KD(net(1), SoftTarget, unlabeled=rows())
    with learn.no_bar(): learn.fit(1, .1, cbs=kd)
    assert '8 rows without labels join each batch of 8' in capsys.readouterr().out

def test_of_10_percent_of_the_labels_the_rest_helps():
    "digits: what the teacher says of rows without labels makes a better student than the labels alone"
    from sklearn.datasets import load_digits
    d = load_digits()
    X,Y = torch.tensor(d.images, dtype=torch.float32).flatten(1)/16,torch.tensor(d.target)
    few,rest,test = [list(zip(X[s], Y[s])) for s in (slice(0,80),slice(80,1200),slice(1200,None))]
    def mlp(h): return nn.Sequential(nn.Linear(64, h), nn.ReLU(), nn.Linear(h, 10))
    def loaders(a): return DataLoaders(DataLoader(a, bs=40, shuffle=True, num_workers=0), DataLoader(test, bs=512, num_workers=0), device='cpu')
    set_seed(0)
    t = Learner(loaders(few+rest), mlp(64), CrossEntropyLossFlat(), metrics=accuracy)
    scores = []
    with t.no_bar(), t.no_logging(): t.fit_one_cycle(15, 1e-2)
    for unlabeled in (False,True):
        set_seed(1)
        s = Learner(loaders(few), mlp(24), CrossEntropyLossFlat(), metrics=accuracy)
        kd = KD(t, SoftTarget(T=2), unlabeled=DataLoader([(a,) for a,_ in rest], bs=40, shuffle=True, num_workers=0)) if unlabeled else None
        with s.no_bar(), s.no_logging(): s.fit_one_cycle(100, 1e-2, cbs=kd)
        scores.append(s.validate()[1])
    assert scores[1] > scores[0] + .02, scores

def digits():
    from sklearn.datasets import load_digits
    d = load_digits()
    return torch.tensor(d.images, dtype=torch.float32).flatten(1)/16,torch.tensor(d.target)

@pytest.mark.parametrize('given', ['loader','list'])
def test_in_a_comparison(given, tmp_path):
    "methods see them, the student alone does not; equal seeds give equal runs, other rows are another comparison"
    X,Y = digits()
    def make_student():
        dls = DataLoaders.from_dsets(list(zip(X[:60], Y[:60])), list(zip(X[60:90], Y[60:90])), bs=20, num_workers=0, device=torch.device('cpu'))
        return Learner(dls, nn.Linear(64, 10), CrossEntropyLossFlat(), metrics=accuracy)
    more = [(a,) for a in X[100:180]]
    def unlabeled(n=80): return more[:n] if given == 'list' else DataLoader(more[:n], bs=20, shuffle=True, num_workers=0)
    teacher = nn.Linear(64, 10)
    def run(out, **kwargs): return compare(make_student, teacher, ['none','soft'], seeds=2, epochs=2, lr=1e-2, out=tmp_path/out, show=False, **kwargs)
    a,b,c = run('a', unlabeled=unlabeled()),run('b', unlabeled=unlabeled()),run('c')
    values = lambda runs, m: [(r.value, r.log['train_loss']) for r in runs.runs if r.method == m]
    assert values(a, 'none') == values(b, 'none') == values(c, 'none') and values(a, 'soft') == values(b, 'soft') != values(c, 'soft')
    again,other = run('a', unlabeled=unlabeled()),run('a', unlabeled=unlabeled(40))
    assert [r.more['when'] for r in again.runs] == [r.more['when'] for r in a.runs] and other.runs[0].comparison != a.runs[0].comparison
    assert '60 rows and 80 without labels' in repr(a).replace('\n', ' ') and 'without labels' not in repr(c)

def test_a_recipe_with_a_share_of_its_labels(tmp_path, capsys):
    from fastkd.experiments.compare import run_recipe
    from fastkd.experiments.recipes import digits_data
    parts = digits_data()
    few = parts.with_labels(.1)
    assert (len(few.train[0]), len(few.unlabeled)) == (40,360) and few.train[1].bincount().tolist() == [4]*10
    rows_of = lambda xs: {o.numpy().tobytes() for o in xs}
    assert rows_of(few.train[0]) | rows_of(few.unlabeled) == rows_of(parts.train[0]) and few.valid is parts.valid and few.test is parts.test
    a = run_recipe('digits', ['none','soft(T=4)'], 1, 2, 1, out=tmp_path, labels=.25, show=False)
    assert [r.settings['fit']['epochs'] for r in a.runs] == [8,8] and a.runs[0].data[1] == 100 and a.runs[0].more['unlabeled'] == 300
    assert a.runs[0].teacher_fit['epochs'] == 4 and '100 rows and 300 without labels' in repr(a).replace('\n', ' ')
    b = run_recipe('digits', ['none'], 1, 2, 1, out=tmp_path, show=False)
    assert b.runs[0].comparison != a.runs[0].comparison and b.runs[0].teacher['checksum'] != a.runs[0].teacher['checksum']
    for share in 0,1.5,-1,.001:
        with pytest.raises(ValueError, match='share of the 400 training rows'): run_recipe('digits', ['none'], 1, 2, 1, out=tmp_path, labels=share)

def test_the_command(tmp_path, capsys, monkeypatch):
    from fastkd.cli import main
    monkeypatch.chdir(tmp_path)
    assert main(['run','digits','--methods','none,soft(T=4)','--seeds','2','--epochs','1','--teacher-epochs','1','--labels','0.5','--out','o']) == 0
    assert '200 rows and 200 without labels' in capsys.readouterr().out.replace('\n', ' ')
    assert main(['run','x.py','--labels','0.5']) == 2 and '`--labels` is for recipes' in capsys.readouterr().err

@pytest.mark.parametrize('text,lr', [('soft(lr=0.003)',.003), ('init(lr=0.003)',.003), ('init(lr=0.003)+soft',.003), ('init+soft(lr=0.003)',.003), ('none',None)])
def test_a_method_with_its_learning_rate(text, lr):
    from fastkd.methods import method
    m = method(text)
    assert m.lr == lr and m.settings().get('lr') == lr

def test_rates_of_joined_methods():
    from fastkd.methods import method
    with pytest.raises(ValueError, match='learning rates'): method('soft(lr=0.01)+cosine')
    with pytest.raises(ValueError, match='`lr` must be a number above 0'): method('soft(lr=-1)')

def test_a_rate_is_used(tmp_path):
    from fastkd.experiments.compare import run_recipe
    a = run_recipe('digits', ['none','none(lr=0.001)'], 1, 1, 1, out=tmp_path, show=False)
    assert [r.settings['fit']['lr'] for r in a.runs] == [.01,.001] and a.runs[0].value != a.runs[1].value

# found by a stranger who tried to break it

def test_a_list_at_weight_0_leaves_the_random_streams_alone():
    fits = []
    for kd in None,KD(convnet(1), SoftTarget, weight=0, unlabeled=pictures[16:]):
        set_seed(0)
        learn = Learner(photographs(), convnet(), CrossEntropyLossFlat())
        set_seed(1)
        fit(learn, kd, 2)
        fits.append([p.detach().clone() for p in learn.model.parameters()])
    assert all(map(torch.equal, *fits))

class Later(Callback):
    "Lets MixUp begin in the second epoch"
    order = -5
    def __init__(self, mixer): self.mixer = mixer
    def before_epoch(self): self.mixer.run = self.epoch == 1

@pytest.mark.parametrize('mixer', [MixUp,CutMix])
def test_what_does_not_mix_a_batch_does_not_mix_these(mixer):
    dls = DataLoaders(*[DataLoader([(torch.full((1,8,8), 10.+i), torch.tensor(i%3)) for i in range(8)], bs=8, num_workers=0)]*2, device='cpu')
    more = DataLoader([(torch.full((1,8,8), 1000.*(i+1)),) for i in range(8)], bs=8, shuffle=True, num_workers=0)
    torch.manual_seed(0)
    model,cb = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),mixer(1.)
    seen = fit(Learner(dls, model, CrossEntropyLossFlat()), KD(deepcopy(model), SoftTarget, unlabeled=more), cbs=[cb, Later(cb)], lr=0., epochs=3)
    whole = [sorted(xb[8:].flatten(1).mean(1).tolist()) == [1000.*(i+1) for i in range(8)] for xb in seen.inputs]
    assert whole == [True,False,True]

class Brighter(Transform):
    split_idx,order = 0,200
    def encodes(self, o:TensorImage): return o*0 + 7

def test_the_transforms_of_the_training_loader_alone():
    dls = photographs()
    dls.add_tfms([Brighter()], 'after_batch', loaders='train')
    assert unlabeled_loader(pictures[16:], dls).one_batch()[0].unique().tolist() == [7.]

def test_transforms_run_outside_of_autocast():
    class Watch(Transform):
        def encodes(self, o:TensorImage):
            found.append(torch.is_autocast_enabled('cpu'))
            return o
    from fastkd.experiments.training import Bfloat16
    dls,found = photographs(),[]
    dls.device = torch.device('cpu')
    dls.add_tfms([Watch()], 'after_batch')
    fit(Learner(dls, convnet(), CrossEntropyLossFlat()), KD(convnet(1), SoftTarget, unlabeled=pictures[16:]), cbs=[Bfloat16()])
    assert found and not any(found)

def test_inputs_keep_the_type_of_the_labeled_ones():
    kinds = [{type(o) for o in fit(Learner(photographs(), convnet(), CrossEntropyLossFlat()), KD(convnet(1), SoftTarget, unlabeled=items)).inputs} for items in (None,pictures[16:])]
    assert kinds[0] == kinds[1]

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return ((torch.full((5,), float(i)),) for i in range(64))

@pytest.mark.parametrize('make', [lambda: torch.utils.data.DataLoader(Stream(), 8), lambda: DataLoader(Stream(), bs=8, num_workers=0)])
def test_a_stream_goes_on(make, recwarn):
    seen = fit(learner(data(n=8)), KD(net(1), SoftTarget, unlabeled=make()), epochs=8)
    assert torch.cat([xb[8:,0] for xb in seen.inputs]).tolist() == list(range(64))
    assert not [w for w in recwarn if 'shuffle' in str(w.message)]

def test_a_batch_sampler_that_shuffles(recwarn):
    batches = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(u), 8, False)
    unlabeled_loader(torch.utils.data.DataLoader(TensorDataset(u), batch_sampler=batches), None)
    assert not [w for w in recwarn if 'shuffle' in str(w.message)]

def test_an_output_without_rows_is_refused():
    class Flat(nn.Module):
        def __init__(self): super().__init__(); self.net = net()
        def forward(self, x): return self.net(x[:,None].repeat(1, 2, 1)).flatten(0, 1)
    model = Flat()
    with pytest.raises(ValueError, match='a row for each'): fit(learner(model=model), KD(deepcopy(model), SoftTarget, unlabeled=rows()))

def test_whole_numbers_do_not_join_real_ones():
    with pytest.raises(ValueError, match='of whole numbers'): fit(learner(), KD(net(1), SoftTarget, unlabeled=rows(items=[(torch.arange(5),) for _ in range(16)])))

def test_what_the_loader_holds_stays():
    held = torch.rand(8, 3, 12, 12)
    more = DataLoader([(held,)], bs=None, shuffle=True, num_workers=0)
    before = held.clone()
    fit(Learner(photographs(), convnet(), CrossEntropyLossFlat()), KD(convnet(1), SoftTarget, unlabeled=more), cbs=[CutMix()], epochs=2)
    assert torch.equal(held, before)

@pytest.mark.parametrize('order', [0,-1,5,1100])
def test_a_callback_of_any_place_sees_the_labeled_rows_after_the_forward(order):
    class Look(Callback):
        def after_pred(self):
            if self.training: sizes.append((len(self.x), len(self.pred), len(self.y)))
    look,sizes = Look(),[]
    look.order = order
    fit(learner(), KD(net(1), SoftTarget, unlabeled=rows()), cbs=[look])
    assert sizes == [(8,8,8)]*3

@pytest.mark.parametrize('event', ['before_batch','after_pred','after_loss'])
def test_a_cancelled_batch(event):
    class Cancel(Callback):
        order = 995
        def after_batch(self): sizes.append(len(self.x))
    def cancel(self):
        if self.training and self.iter == 1: raise CancelBatchException
    setattr(Cancel, event, cancel)
    learn,sizes = learner(),[]
    learn.recorder.train_metrics = True
    seen = fit(learn, KD(net(1), SoftTarget, unlabeled=rows()), cbs=[Cancel()])
    assert set(sizes) == {8} and len(seen.inputs) == 3

def test_a_language_model_is_refused():
    import pandas as pd
    df = pd.DataFrame(dict(text=['a b c d e f g h']*20))
    dls = TextDataLoaders.from_df(df, text_col='text', is_lm=True, bs=4, seq_len=8, num_workers=0)
    with pytest.raises(ValueError, match='needs no labels'): unlabeled_loader(df, dls)

def test_names_of_the_user_stay(recwarn):
    learn = learner()
    learn.unlabeled = 'mine'
    learn.model.output = learn.model.rows = 1
    fit(learn, KD(net(1), SoftTarget, unlabeled=rows()))
    assert learn.unlabeled == 'mine' and not hasattr(learn, 'rows_without_labels') and not [w for w in recwarn if 'shadowing' in str(w.message)]

@pytest.mark.parametrize('items', ['a/path', Path('a/path'), 3, DataLoaders(rows(), rows())])
def test_what_is_no_list_of_items_is_refused(items):
    with pytest.raises(TypeError, match='list of items'): KD(net(1), SoftTarget, unlabeled=items)

@pytest.mark.parametrize('make', [lambda o: iter(o), set, lambda o: (p for p in o), tuple, L])
def test_items_of_any_collection(make):
    items = [(o,) for o in u]
    kd = KD(net(1), SoftTarget, unlabeled=make(items))
    for _ in range(2):
        seen = fit(learner(), kd)
        assert [len(o) for o in seen.inputs] == [16]*3

@pytest.mark.parametrize('share', ['0.5',.999,True])
def test_a_share_that_leaves_nothing(share):
    from fastkd.experiments.recipes import digits_data
    with pytest.raises(ValueError, match='share of the 400 training rows'): digits_data().with_labels(share)

# found in review

def test_a_list_is_shuffled_by_the_learners_stream():
    "other seeds and other fits show other rows, equal seeds equal ones"
    def shown(seed, fits=1):
        set_seed(seed)
        learn = Learner(photographs(n=16), convnet(), CrossEntropyLossFlat())
        return [fit(learn, KD(convnet(1), SoftTarget, unlabeled=pictures[16:])).inputs[0][8:] for _ in range(fits)]
    (a,),(b,c),(d,) = shown(1),shown(1, 2),shown(2)
    assert torch.equal(a, b) and not torch.equal(b, c) and not torch.equal(a, d)

def test_workers_end_with_the_fit():
    import gc, multiprocessing
    gc.collect()
    before = len(multiprocessing.active_children())
    gc.disable()
    try:
        kd = KD(net(1), SoftTarget, unlabeled=DataLoader([(o,) for o in u], bs=8, shuffle=True, num_workers=1))
        fit(learner(), kd)
        assert len(multiprocessing.active_children()) == before
    finally: gc.enable()

def test_a_sampler_has_its_own_generator_for_the_fit_alone(monkeypatch):
    import fastkd.unlabeled as U
    monkeypatch.setattr(U, 'num_distrib', lambda: 2)
    dl = torch.utils.data.DataLoader(TensorDataset(u), 8, shuffle=True)
    cb = U.Unlabeled(dl, lambda: True)
    cb.dl,cb.learn = dl,SimpleNamespace(xb=(x,))
    cb.before_train()
    next(cb.batches)
    assert dl.sampler.generator is not None
    cb.close()
    assert dl.sampler.generator is None

def test_what_other_callbacks_make_of_the_output_counts():
    "as it does without rows that joined: the labeled rows come to the terms as they are left"
    class Double(Callback):
        def after_pred(self):
            if self.training: self.learn.pred = self.pred*2
    learn,teacher = learner(),net(1)
    by_hand = deepcopy(learn.model)
    seen = fit(learn, KD(teacher, Logits, weight=1., label_weight=0, unlabeled=rows()), cbs=[Double()])
    for xb in seen.inputs:
        z = by_hand(xb)
        loss = F.mse_loss(torch.cat([2*z[:8], z[8:]]), teacher(xb).detach())
        for p,d in zip(by_hand.parameters(), torch.autograd.grad(loss, by_hand.parameters())): p.data -= .1*d
    for p,q in zip(learn.model.parameters(), by_hand.parameters()): torch.testing.assert_close(p, q)

def test_a_batch_that_is_cancelled_before_rows_join_keeps_its_own():
    class Cancel(Callback):
        order = 5
        def before_batch(self):
            if self.training and self.iter == 1: raise CancelBatchException
        def after_batch(self):
            if self.training: kept.append(self.x.clone())
    kept = []
    fit(learner(), KD(net(1), SoftTarget, unlabeled=rows()), cbs=[Cancel()])
    assert torch.equal(torch.cat(kept), x)

def test_no_graph_outlives_its_batch():
    held = []
    class Look(Callback):
        order = 2000
        def before_validate(self): held.append([self.learn.rows_without_labels.output, self.learn.rows_without_labels.labeled_xb])
    fit(learner(), KD(net(1), SoftTarget, unlabeled=rows()), cbs=[Look()])
    assert held == [[None,None]]

def test_mixing_that_ended_while_nothing_was_distilled():
    dls = DataLoaders(*[DataLoader([(torch.full((1,8,8), 10.+i), torch.tensor(i%3)) for i in range(8)], bs=8, num_workers=0)]*2, device='cpu')
    more = DataLoader([(torch.full((1,8,8), 1000.*(i+1)),) for i in range(8)], bs=8, shuffle=True, num_workers=0)
    torch.manual_seed(0)
    model,cb = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),MixUp(1.)
    class Until(Callback):
        order = -5
        def before_epoch(self): cb.run = self.epoch < 1
    seen = fit(Learner(dls, model, CrossEntropyLossFlat()), KD(deepcopy(model), SoftTarget, schedule=lambda p: float(p >= .3), unlabeled=more), cbs=[cb, Until()], lr=0., epochs=3)
    assert [len(o) for o in seen.inputs] == [8,16,16]
    assert all(sorted(xb[8:].flatten(1).mean(1).tolist()) == [1000.*(i+1) for i in range(8)] for xb in seen.inputs[1:])

def test_epochs_of_methods_grow_with_few_labels_too(tmp_path):
    from fastkd.experiments.compare import run_recipe
    a = run_recipe('digits', ['none','soft(epochs=1)'], 1, 2, 1, out=tmp_path, labels=.5, show=False)
    assert [r.settings['fit']['epochs'] for r in a.runs] == [4,2]
    b = run_recipe('digits', ['none'], 1, 2, 1, out=tmp_path, show=False)
    import pandas as pd
    from fastkd.experiments import caption
    both = pd.DataFrame([r.row() for r in [*b.runs, *a.runs]])
    assert 'nan' not in caption(both) and '400 rows;' in caption(both).replace(',', ';')

def test_a_start_and_a_loss_of_other_rates():
    from fastkd.methods import method
    assert method('init(lr=0.01)+soft(lr=0.01)').lr == .01
    with pytest.raises(ValueError, match='different `lr`'): method('init(lr=0.01)+soft(lr=0.02)')
