"Epochs that come again to the bit, and what a cache makes of them"
import random, warnings
from functools import partial
import numpy as np, pytest, torch
from torch import nn
from torch.utils.data import TensorDataset
from fastai.vision.all import (Callback, CancelBatchException, CategoryBlock, CrossEntropyLossFlat, CutMix, DataBlock, DataLoader, DataLoaders, ImageBlock, IndexSplitter, ItemGetter, Learner,
                               MixUp, RandomResizedCrop, Resize, WeightedDL, accuracy, aug_transforms, set_seed)
from fastai.callback.data import WeightedDL
from fastkd.all import Attention, Cache, FitNet, KnowledgeDistillationCallback as KD, PKT, RKD, SoftTarget, Teacher, Views

rng = np.random.default_rng(0)
images = [(rng.integers(0, 256, (20,20,3)).astype('uint8'), str(i%2)) for i in range(30)]

def photographs(num_workers=0, bs=8, **kwargs):
    block = DataBlock((ImageBlock, CategoryBlock), get_x=ItemGetter(0), get_y=ItemGetter(1), splitter=IndexSplitter(range(24, 30)), item_tfms=RandomResizedCrop(16, min_scale=.5),
        batch_tfms=aug_transforms(size=12))
    return block.dataloaders(images, bs=bs, num_workers=num_workers, device='cpu', **kwargs)

def rows(n=24): return TensorDataset(torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 2)
def pytorch(generator=None, bs=8):
    loader = torch.utils.data.DataLoader
    return DataLoaders(loader(rows(), bs, shuffle=True, generator=generator), loader(rows(), bs), device=torch.device('cpu'))
def weighted():
    dls = photographs()
    return DataLoaders(WeightedDL(dls.train_ds, bs=8, wgts=np.arange(1, 25), num_workers=0, after_item=dls.train.after_item, after_batch=dls.train.after_batch, shuffle=True, drop_last=True), dls.valid)

def student(dropout=0., width=4): return nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(4*width, 2))

class Counting(nn.Module):
    "A teacher that counts the rows that go through it, by epoch"
    def __init__(self): super().__init__(); self.net,self.rows = student(),0
    def forward(self, x):
        self.rows += len(x)
        return self.net(x)

class Watch(Callback):
    "What the model sees in each epoch, what it draws itself, and how many rows the teacher sees"
    order = 1001
    def __init__(self, teacher=None): self.teacher,self.seen,self.drawn,self.asked = teacher,[],[],[]
    def before_epoch(self):
        if hasattr(self.learn, 'lr_finder'): return
        self.seen.append([])
        if self.teacher is not None: self.teacher.rows = 0
    def before_batch(self):
        if not self.training: return
        self.seen[-1].append(self.x.numpy().tobytes())
        self.drawn.append((torch.rand(1).item(), random.random(), np.random.rand()))
    def after_train(self):
        if self.teacher is not None: self.asked.append(self.teacher.rows)

def fitted(dls, epochs, cbs=(), model=None, fit='fit', **kwargs):
    learn,watch = Learner(dls, model or student(), CrossEntropyLossFlat(), metrics=accuracy),Watch()
    with learn.no_bar(), learn.no_logging(): getattr(learn, fit)(epochs, 1e-3, cbs=[watch, *cbs], **kwargs)
    return watch

loaders = dict(images=photographs, workers=lambda: photographs(2), weighted=weighted, pytorch=pytorch, generator=lambda: pytorch(torch.Generator()))
mixing = dict(none=list, MixUp=lambda: [MixUp(.4)], CutMix=lambda: [CutMix()])

@pytest.mark.parametrize('mix', mixing)
@pytest.mark.parametrize('data', loaders)
def test_epochs_come_again_to_the_bit(data, mix):
    "for another student too, whatever it draws; what a student draws does not come again"
    if data == 'workers' and mix != 'MixUp': return
    a = fitted(loaders[data](), 5, [Views(2), *mixing[mix]()], student(dropout=.5))
    assert a.seen[0] == a.seen[2] == a.seen[4] and a.seen[1] == a.seen[3] != a.seen[0]
    b = fitted(loaders[data](), 2, [Views(2), *mixing[mix]()], student(width=6))
    assert b.seen == a.seen[:2] and len(set(a.drawn)) == len(a.drawn)
    other = fitted(loaders[data](), 1, [Views(2, seed=1), *mixing[mix]()])
    assert other.seen[0] != a.seen[0]

def test_the_students_streams_do_not_depend_on_the_views():
    drawn = []
    for views in Views(2),Views(3, seed=9):
        set_seed(3)
        drawn.append(fitted(photographs(), 3, [views], student(dropout=.5)).drawn)
    assert drawn[0] == drawn[1]

@pytest.mark.parametrize('mix', mixing)
@pytest.mark.parametrize('data', loaders)
@pytest.mark.parametrize('place', ['memory','folder'])
def test_from_epoch_n_on_the_teacher_sees_nothing(data, mix, place, tmp_path):
    "and in the next student's fit nothing at all; the numbers are those of a teacher that is asked each time"
    if data == 'workers' and (mix,place) != ('MixUp','memory') or place == 'folder' and mix == 'CutMix': return
    torch.manual_seed(0)
    t = Counting()
    cache = Cache(tmp_path/'z' if place == 'folder' else None, views=2)
    curves = []
    for teacher,epochs in (Teacher(t, cache=cache),5),(Teacher(t, cache=cache),3):
        learn,watch,kd = Learner(loaders[data](), student(.2), CrossEntropyLossFlat()),Watch(t),KD(teacher, SoftTarget)
        with warnings.catch_warnings(), learn.no_bar(), learn.no_logging():
            warnings.filterwarnings('error', message='.*inputs were new.*')
            learn.fit(epochs, 1e-3, cbs=[watch, kd, *mixing[mix]()])
        curves.append(watch.asked)
        assert not any(isinstance(cb, Views) or type(cb).__name__ == '_Drawn' for cb in learn.cbs)
    assert curves[0][2:] == [0,0,0] and curves[0][0] >= 16 and curves[1][1:] == [0,0] and curves[1][0] <= 8  # the first batch confirms whose cache it is
    assert curves[0][1] >= 16 or (data in ('pytorch','generator') and mix == 'none')  # where each epoch has the same inputs
    set_seed(5)
    model = student(.2)
    live,kept = [],[]
    for values,teacher in (live,t),(kept,Teacher(t, cache=cache)):
        set_seed(5)
        learn,kd = Learner(loaders[data](), student(.2), CrossEntropyLossFlat()),KD(teacher, SoftTarget)
        with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2, cbs=[kd, *mixing[mix](), *([Views(2)] if teacher is t else [])])
        values += kd.curves['train']['kd_loss']
    assert kept == pytest.approx(live, rel=1e-4, abs=1e-6)

def test_fine_tune_goes_on_with_the_views(tmp_path):
    learn = Learner(photographs(), student(), CrossEntropyLossFlat(), splitter=lambda m: [list(m[0].parameters()), list(m[-1].parameters())])
    t,watch = Counting(),Watch()
    kd = KD(Teacher(t, cache=Cache(views=3)), SoftTarget)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(3, 1e-3, cbs=[kd, watch])
    assert len(watch.seen) == 4 and len({tuple(s) for s in watch.seen[:3]}) == 3 and watch.seen[3] == watch.seen[0]
    views = Views(3)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(3, 1e-3, cbs=[views, again := Watch()])
    assert again.seen == watch.seen

def test_another_student_begins_at_the_first_view():
    kd,seen = KD(Teacher(Counting(), cache=Cache(views=3)), SoftTarget),[]
    for _ in range(2): seen.append(fitted(photographs(), 2, [kd]).seen)
    assert seen[0] == seen[1]

def test_a_fit_that_is_resumed_is_at_its_epoch():
    whole = fitted(photographs(), 4, [Views(3)])
    rest = fitted(photographs(), 4, [Views(3)], start_epoch=2)
    assert [s for s in rest.seen if s] == whole.seen[2:]

def test_lr_find_uses_no_view_up():
    kd = KD(Teacher(Counting(), cache=Cache(views=3)), SoftTarget)
    learn = Learner(photographs(), student(), CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging():
        with learn.added_cbs(kd): learn.lr_find(show_plot=False, num_it=5)
        learn.fit(1, 1e-3, cbs=[kd, watch := Watch()])
    assert watch.seen == fitted(photographs(), 1, [Views(3)]).seen

class OwnStream:
    "A transform that draws from a generator of its own"
    def __init__(self): self.rng = np.random.default_rng(0)
    def __call__(self, b): return b[0] + float(self.rng.random()), b[1]

def test_what_cannot_repeat_is_told_and_never_wrong():
    items = rows()
    dls = DataLoaders(DataLoader(items, bs=8, shuffle=True, num_workers=0, after_batch=OwnStream()), DataLoader(items, bs=8, num_workers=0), device='cpu')
    t = Counting()
    kd,watch = KD(Teacher(t, cache=Cache(views=2)), SoftTarget),Watch(t)
    learn = Learner(dls, student(), CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging(), pytest.warns(UserWarning, match='saw 2 epochs ago, but 100% of its inputs were new') as got: learn.fit(4, 1e-3, cbs=[kd, watch])
    assert len([w for w in got if 'were new' in str(w.message)]) == 1 and watch.asked[1:] == [24]*3

def test_processes_share_the_order_and_draw_for_themselves(monkeypatch):
    "of a distributed fit"
    plain = DataLoaders(DataLoader(rows(), bs=8, shuffle=True, num_workers=0), DataLoader(rows(), bs=8, num_workers=0), device='cpu')
    class Noise(Callback):
        def before_batch(self): self.learn.xb = (self.x + torch.rand(1),)
    seen = {}
    for rank in 0,1:
        monkeypatch.setattr('fastkd.views.rank_distrib', lambda: rank)
        seen[rank] = [fitted(plain, 1, [Views(2), *noise]).seen for noise in ([], [Noise()])]
    assert seen[0][0] == seen[1][0] and seen[0][1] != seen[1][1]

def test_an_error_leaves_no_views_behind():
    class Broken(Callback):
        def after_pred(self):
            if self.training and self.iter == 1: raise ZeroDivisionError('on the way')
    set_seed(1)
    learn = Learner(photographs(), student(), CrossEntropyLossFlat())
    before = [type(cb) for cb in learn.cbs]
    with pytest.raises(ZeroDivisionError), learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3, cbs=[KD(Teacher(Counting(), cache=Cache(views=2)), SoftTarget), Broken()])
    assert {type(cb) for cb in learn.cbs} == set(before)

@pytest.mark.parametrize('error', [KeyboardInterrupt, ZeroDivisionError])
def test_the_next_plain_fit_is_as_if_there_had_been_none(error):
    "after views whose fit was interrupted"
    class Broken(Callback):
        def after_pred(self):
            if self.training and self.iter == 1: raise error('on the way')
    learns = [Learner(photographs(), student(.2), CrossEntropyLossFlat()) for _ in range(2)]
    learns[1].model.load_state_dict(learns[0].model.state_dict())
    with pytest.raises(error), learns[1].no_bar(), learns[1].no_logging(): learns[1].fit(2, 0., cbs=[Views(2), Broken()])
    seen = []
    for learn in learns:
        learn.fit  # both from the same streams
        set_seed(2)
        learn.dls.train.rng = random.Random(2)
        watch = Watch()
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3, cbs=watch)
        seen.append(watch.seen)
        assert not any(type(cb).__name__ == '_Drawn' for cb in learn.cbs)
    assert seen[0] == seen[1]

def test_a_cancelled_batch_does_not_give_the_students_draws_again():
    class Cancels(Callback):
        order = 5
        def before_batch(self):
            if self.training and self.iter == 1: raise CancelBatchException
    watch = fitted(photographs(), 4, [Views(2), Cancels()])
    assert len(set(watch.drawn)) == len(watch.drawn) == 4*2

@pytest.mark.parametrize('n', [0, -1, 1.5, '8', True])
def test_a_number_of_views_that_is_none(n):
    for make in (Views, lambda n: Cache(views=n)):
        with pytest.raises(ValueError, match='whole number of 1 or more'): make(n)

def test_validation_inside_a_fit_is_no_epoch():
    class Validates(Callback):
        def after_batch(self):
            if not self.training or self.iter != 1 or self.learn.lock.locked(): return
            self.learn.validate()
            self.learn.training = True
            self.model.train()
    a,b = fitted(photographs(), 3, [Views(2)]),fitted(photographs(), 3, [Views(2), Validates()])
    assert sum(b.seen, []) == sum(a.seen, [])

@pytest.mark.parametrize('loss', [FitNet, lambda: [SoftTarget(),FitNet()]])
def test_activations_of_views_are_kept(loss, tmp_path):
    t = Counting()
    for first in True,False:
        learn,watch = Learner(photographs(), student(), CrossEntropyLossFlat()),Watch(t)
        kd = KD(Teacher(t, cache=Cache(tmp_path/'z', views=2)), loss(), '0', 'net.0')
        with learn.no_bar(), learn.no_logging(): learn.fit(4, 1e-3, cbs=[watch, kd, MixUp(.4)])
        assert watch.asked[1 if not first else 2:] == [0]*(3 if not first else 2)
        assert watch.asked[0] >= 24 if first else watch.asked[0] <= 20  # to find out where the layers have their channels

@pytest.mark.parametrize('loss,rows', [(RKD,8), (PKT,8), (partial(RKD, pool=False),8*5*5), ([RKD(),FitNet()],8*5*5), ([RKD(),PKT()],8)])
@pytest.mark.parametrize('axis', [None,1])
def test_what_is_only_looked_at_as_a_mean_is_kept_as_one(loss, rows, axis):
    "as the loss's contract says; the fit is that of a live teacher, up to half precision"
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    losses,values,start = [l if isinstance(l, nn.Module) else l() for l in (loss if isinstance(loss, list) else [loss])],[],student(width=8).state_dict()
    cache = Cache(views=1)
    for c in cache,None:
        for l in losses: l.channel_axis = axis
        kd,model = KD(Teacher(teacher, cache=c), losses, '0', '0'),student(width=8)
        model.load_state_dict(start)
        fitted(photographs(), 3, [kd, *([] if c else [Views(1)])], model)
        values.append(np.array([*kd.curves['train'].values()]))
    assert [np.prod(o.shape) for o in cache.stores.values()] == [rows if axis is None else 8*5*5]  # an axis of the user's: whole
    np.testing.assert_allclose(*values, rtol=2e-2, atol=2e-3)

@pytest.mark.parametrize('place', ['memory','folder'])
def test_the_start_line_says_how_much_room_the_cache_takes(place, tmp_path, capsys):
    "items × views × bytes of a row, before any of it is written but the first batch"
    dls = photographs()
    learn = Learner(dls, student(), CrossEntropyLossFlat())
    cache = Cache(tmp_path if place == 'folder' else None, views=1000)
    with learn.no_bar(): learn.fit(1, 1e-3, cbs=KD(Teacher(student(width=8), cache=cache), FitNet, '0', '0'))
    mb = 30*1000*(8*5*5*2 + 16)/1e6  # half precision, and 16 bytes for the key and the checksum
    assert f"the cache takes up to {mb:.0f} MB {'on disk' if place == 'folder' else 'in memory'}" in capsys.readouterr().out
