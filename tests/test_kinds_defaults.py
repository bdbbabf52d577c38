"What is right by default: the epoch table, vocabularies, normalization, weights, the start line"
import copy, math, warnings
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
from functools import partial
from fastai.basics import (AccumMetric, AvgMetric, Callback, CrossEntropyLossFlat, BCEWithLogitsLossFlat, MSELossFlat, DataLoader, DataLoaders, IndexSplitter, DataBlock, CategoryBlock,
                           MultiCategoryBlock, Learner, SGD, load_learner, skm_to_fastai)
from fastai.metrics import (F1Score, DiceMulti, Perplexity, R2Score, RocAucBinary, accuracy, accuracy_multi, error_rate, foreground_acc, mse, rmse, top_k_accuracy)
from fastai.callback.schedule import SchedCos, SchedLin
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import ShortEpochCallback
from fastai.callback.mixup import MixUp
from fastai.data.transforms import Normalize
from fastai.vision.data import ImageBlock
from fastkd.all import *
from conftest import batches, hooks, learner, net, same, weights
from test_kinds_axes import KD, by_hand, data, draw, kd_loss

x,y = draw(32,5),draw(32, classes=4)
def lin(seed=2, n=4):
    torch.manual_seed(seed)
    return nn.Linear(5,n)

# the epoch table

class Maps(nn.Module):
    def __init__(self, n=4): super().__init__(); torch.manual_seed(2); self.c = nn.Conv2d(2,n,1)
    def forward(self, x): return self.c(x)

xm,ym = draw(32,2,6,5),draw(32,6,5, classes=4)
yes = (draw(32,4) > 0).float()
def balanced(y, p):
    from sklearn.metrics import balanced_accuracy_score
    return balanced_accuracy_score(y, p)
cases = dict(
    classes=(data(x, y), lambda: lin(), CrossEntropyLossFlat(), [accuracy, error_rate, partial(top_k_accuracy, k=2), F1Score(average='macro'), skm_to_fastai(balanced, axis=-1)], None),
    probabilities=(data(x, y % 2), lambda: lin(n=2), CrossEntropyLossFlat(), [RocAucBinary(), AccumMetric(accuracy, flatten=False)], None),
    multi_label=(data(x, yes), lambda: lin(), BCEWithLogitsLossFlat(), [accuracy_multi, partial(accuracy_multi, thresh=.3)], None),
    regression=(data(x, draw(32,4)), lambda: lin(), MSELossFlat(), [mse, rmse, R2Score()], None),
    maps=(data(xm, ym), Maps, CrossEntropyLossFlat(axis=1), [foreground_acc, DiceMulti(), partial(accuracy, axis=1), AvgMetric(lambda p, y: (p.argmax(1) == y).float().mean())], None),
    uneven=(data(x[:29], y[:29]), lambda: lin(), CrossEntropyLossFlat(), [accuracy, F1Score(average='micro')], None))

@pytest.mark.parametrize('name', cases)
@pytest.mark.parametrize('loss', [None, 'features', 'both'])
def test_the_last_row_of_the_table_is_what_validate_says(name, loss):
    dls,make,loss_func,metrics,_ = cases[name]
    s,t = nn.Sequential(make(), nn.Identity()),nn.Sequential(make(), nn.Identity())
    with torch.no_grad(): next(t.parameters()).mul_(3.)
    loss,names = {None: (None, ()), 'features': (Cosine, ('0','0')), 'both': ([Logits,Cosine], ('0','0'))}[loss]
    learn = learner(dls, s, loss_func=loss_func, metrics=metrics)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(2, .1, cbs=KD(t, loss, *names))
        names = list(learn.recorder.metric_names)
        said = dict(zip(names[1:], learn.recorder.values[-1]))
        row = list(learn.recorder.values[-1])
        right = learn.validate()  # which adds a row of its own
    assert names[:3] == ['epoch','train_loss','valid_loss'] and names[3:3+len(metrics)] == [m.name for m in learn.metrics] and names[-1] == 'time'
    assert said['valid_loss'] == row[1] and row[1:2+len(metrics)] == pytest.approx(list(right), rel=1e-5)

def texts():
    "Batches of a language model"
    q = torch.randint(20, (4,36), generator=torch.Generator().manual_seed(0))
    b = [(q[:,i*7:i*7+7], q[:,i*7+1:i*7+8]) for i in range(5)]
    return DataLoaders(DataLoader(b, bs=None, num_workers=0), DataLoader(b[3:], bs=None, num_workers=0))

@pytest.mark.parametrize('loss', [SoftTarget, FitNet])
def test_perplexity_is_the_language_models_own(loss):
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
    from fastai.text.models.core import get_language_model
    from fastai.callback.rnn import ModelResetter, RNNCallback, RNNRegularizer
    def lm(seed): torch.manual_seed(seed); return get_language_model(AWD_LSTM, 20, config={**awd_lstm_lm_config, 'emb_sz': 8, 'n_hid': 12, 'n_layers': 1})
    learn = learner(texts(), lm(1), loss_func=CrossEntropyLossFlat(), metrics=[Perplexity(), accuracy], cbs=[ModelResetter, RNNCallback(), RNNRegularizer(2., 1.)])
    learn.fit(2, .1, cbs=KD(lm(2), loss, *(('0.rnns.0','0.rnns.0') if loss is FitNet else ()), weight=.9))
    loss,perplexity,acc = learn.recorder.values[-1][1:4]
    assert [loss,perplexity,acc] == pytest.approx(list(learn.validate()), rel=1e-5) and perplexity == pytest.approx(math.exp(loss), rel=1e-4)

def test_weight_0_gives_the_plain_fits_table():
    "... to the last digit, whatever the metric"
    for dls,make,loss_func,metrics,_ in cases.values():
        rows = []
        for kd in (None, KD(make(), Logits, weight=0)):
            s = make()
            learn = learner(dls, s, loss_func=loss_func, metrics=metrics)
            torch.manual_seed(4); learn.fit(2, .1, cbs=kd)
            rows.append([[v for v in row[:2+len(metrics)]] for row in learn.recorder.values])
        assert rows[0] == rows[1]

def test_after_the_best_model_is_loaded(tmp_path):
    learn = learner(data(x, y), lin(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path)
    learn.fit(4, 3., cbs=[KD(lin(3), SoftTarget), SaveModelCallback()])
    best = min(learn.recorder.values, key=lambda row: row[1])
    assert list(best[1:3]) == pytest.approx(list(learn.validate()), rel=1e-5)

def test_short_epochs():
    learn = learner(data(x, y), lin(), loss_func=CrossEntropyLossFlat(), metrics=[accuracy, F1Score(average='macro')])
    kd = KD(lin(3), SoftTarget)
    learn.fit(2, .1, cbs=[kd, ShortEpochCallback(pct=.5, short_valid=False)])
    row = list(learn.recorder.values[-1][:3])  # fastai leaves out `train_loss` of an epoch that was cut
    assert row == pytest.approx(list(learn.validate()), rel=1e-5)
    assert kd.curves['steps'] == [len(kd.curves['train']['kd_loss'])//2, len(kd.curves['train']['kd_loss'])]

@pytest.mark.parametrize('tracker', [EarlyStoppingCallback, ReduceLROnPlateau])
def test_trackers_follow_the_student(tracker):
    "The objective grows while the student's own loss falls: nothing is stopped"
    s = lin()
    t = lambda x: 100*lin(3)(x)
    rows = []
    for kd in (None, KD(t, SoftTarget, weight=0, label_weight=1)):
        learn = learner(data(x, y), copy.deepcopy(s), loss_func=CrossEntropyLossFlat())
        learn.fit(4, .1, cbs=[tracker(patience=0), *([kd] if kd else [])])
        rows.append([r[:2] for r in learn.recorder.values])
    assert rows[0] == rows[1]
    losses = [r[1] for r in rows[0]]
    learn = learner(data(x, y), s, loss_func=CrossEntropyLossFlat())
    learn.fit(4, .1, cbs=[EarlyStoppingCallback(monitor='valid_loss', patience=1), KD(t, SoftTarget, schedule=SchedLin(0, 1), label_weight=1., weight=1e-6)])
    assert len(learn.recorder.values) == 4 and learn.recorder.values[-1][1] == pytest.approx(losses[-1], rel=1e-2)

# classes and normalization

pictures = np.random.default_rng(0).integers(0, 256, (24,8,8,3), dtype=np.uint8)
pictures[::3] //= 4; pictures[1::3] = pictures[1::3]//4 + 190
def picture(i): return pictures[i]
def label(i): return ['dark','light','mixed'][i % 3]
def photos(vocab=None, mean_std=None, bs=8):
    dls = DataBlock((ImageBlock, CategoryBlock(vocab=vocab, sort=False) if vocab else CategoryBlock), get_x=picture, get_y=label, splitter=IndexSplitter(range(16,24)),
        batch_tfms=[Normalize.from_stats(*mean_std, cuda=False)] if mean_std else None).dataloaders(list(range(24)), bs=bs, num_workers=0, device='cpu')
    dls.train.shuffle = False
    return dls
def cnn(n=3, seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3,4,3,2,1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,n))
stats = ([.5,.4,.3],[.3,.2,.1])
plain = torch.tensor(pictures[:8]/255).permute(0,3,1,2).float()
normalized = (plain - torch.tensor(stats[0])[:,None,None])/torch.tensor(stats[1])[:,None,None]

def quiet(dls, model, cls=Learner, **kw):
    learn = cls(dls, model, opt_func=SGD, **kw)
    learn.remove_cb(learn.progress)
    learn.logger = lambda *args: None
    return learn

def start(capsys): return ' '.join(capsys.readouterr().out.split())

@pytest.mark.parametrize('how', ['learner','vocab=','disk'])
@pytest.mark.parametrize('classes', [['dark','light','mixed'], ['mixed','light','dark'], ['other','mixed','dark','more','light']])
def test_the_teachers_classes_are_mapped(how, classes, capsys, tmp_path):
    t,s = cnn(len(classes)),cnn(seed=2)
    dls = photos(['dark','light','mixed'])
    theirs = photos(classes)
    if how == 'disk':
        Learner(theirs, t, path=tmp_path).export('t.pkl')
        teacher = load_learner(tmp_path/'t.pkl')
    else: teacher = Learner(theirs, t) if how == 'learner' else Teacher(t, vocab=classes)
    kd,learn = KD(teacher, SoftTarget),quiet(dls, s)
    learn.fit(1, 0., cbs=kd)
    columns = [classes.index(c) for c in ('dark','light','mixed')]
    assert kd.curves['train']['kd_loss'][0] == pytest.approx(by_hand(s.eval()(plain), t.eval()(plain)[:,columns], 1), rel=1e-3)
    assert ('classes' in start(capsys)) == (columns != [0,1,2])
    right = np.mean([F.cross_entropy(t(torch.tensor(pictures[16:]/255).permute(0,3,1,2).float())[:,columns], torch.tensor([dls.vocab.o2i[label(i)] for i in range(16,24)])).item()])
    assert kd.teacher_metrics()['loss'] == pytest.approx(right, rel=1e-3)

@pytest.mark.parametrize('how', ['learner','vocab=','ensemble'])
def test_a_class_that_the_teacher_does_not_know(how):
    t,classes = cnn(),['dark','light','grey']
    dls = photos()
    other = photos()
    other.vocab = classes
    teacher = {'learner': lambda: Learner(other, t), 'vocab=': lambda: Teacher(t, vocab=classes), 'ensemble': lambda: [cnn(seed=5), Learner(other, t)]}[how]()
    learn = quiet(dls, cnn(seed=2))
    before = weights(learn.model)
    with pytest.raises(ValueError, match="does not know the class 'mixed'.*'grey'"): learn.fit(1, cbs=KD(teacher, SoftTarget))
    assert same(before, weights(learn.model))

def test_an_ensemble_is_mapped_model_by_model():
    a,b = ['dark','light','mixed'],['mixed','dark','light','more']
    ta,tb,s = cnn(3, 3),cnn(4, 4),cnn(seed=2)
    kd,learn = KD([Learner(photos(a), ta), Learner(photos(b), tb)], Logits),quiet(photos(a), s)
    learn.fit(1, 0., cbs=kd)
    right = (s(plain) - (ta(plain) + tb(plain)[:,[1,2,0]])/2).square().mean().item()
    assert kd.curves['train']['kd_loss'][0] == pytest.approx(right, rel=1e-4)

def two_labels(i): return [label(i), 'x']
def test_yes_and_no_labels_are_mapped_too():
    def dls(vocab): return DataBlock((ImageBlock, MultiCategoryBlock(vocab=vocab)), get_x=picture, get_y=two_labels, splitter=IndexSplitter(range(16,24))).dataloaders(list(range(24)), bs=8, shuffle=False, num_workers=0, device='cpu')
    s,t = cnn(4, 2),cnn(5)
    kd = KD(Learner(dls(['x','light','mixed','dark','z']), t), BinarySoftTarget)
    quiet(dls(['dark','light','mixed','x']), s).fit(1, 0., cbs=kd)
    right = BinarySoftTarget()(s(plain), t(plain)[:,[3,1,2,0]])
    assert kd.curves['train']['kd_loss'][0] == pytest.approx(float(right), rel=1e-4)

@pytest.mark.parametrize('mine,theirs', [(None,stats), (stats,None), (stats,([.1]*3,[.7]*3)), (None,None)])
@pytest.mark.parametrize('how', ['learner','normalize=','disk'])
def test_the_teachers_images_are_normalized_as_in_its_training(mine, theirs, how, capsys, tmp_path):
    norm = lambda x, ms: x if ms is None else (x - torch.tensor(ms[0])[:,None,None])/torch.tensor(ms[1])[:,None,None]
    s,t = cnn(seed=2),cnn()
    if how == 'disk':
        Learner(photos(mean_std=theirs), t, path=tmp_path).export('t.pkl')
        teacher = load_learner(tmp_path/'t.pkl')
    else: teacher = Learner(photos(mean_std=theirs), t) if how == 'learner' else Teacher(t, normalize=theirs or ())
    for loss,names,right in ((SoftTarget, (), by_hand(s(norm(plain, mine)), t(norm(plain, theirs)), 1)), (Attention, ('0','0'), float(Attention()(fm_s={'a': s[0](norm(plain, mine))}, fm_t={'a': t[0](norm(plain, theirs))})))):
        kd,learn = KD(teacher, loss, *names),quiet(photos(mean_std=mine), s)
        learn.fit(1, 0., cbs=kd)
        assert kd.curves['train']['kd_loss'][0] == pytest.approx(right, rel=1e-3)
        assert ('normalized as in its own training' in start(capsys)) == (mine != theirs)
    valid = norm(torch.tensor(pictures[16:]/255).permute(0,3,1,2).float(), theirs)
    assert kd.teacher_metrics()['loss'] == pytest.approx(F.cross_entropy(t(valid), torch.tensor([learn.dls.vocab.o2i[label(i)] for i in range(16,24)])).item(), rel=1e-3)

def test_a_configuration_that_differs_is_a_warning_that_names_the_cure():
    t = cnn()
    t.pretrained_cfg = dict(mean=(.5,.5,.5), std=(.2,.2,.2))
    with pytest.warns(UserWarning, match=r'Teacher\(model, normalize=\(\(0.5, 0.5, 0.5\), \(0.2, 0.2, 0.2\)\)\)'): quiet(photos(mean_std=stats), cnn(seed=2)).fit(1, 0., cbs=KD(t, SoftTarget))
    for teacher,ms in ((t, ([.5]*3,[.2]*3)), (Teacher(t, normalize=stats), stats), (Learner(photos(mean_std=stats), t), stats)):
        with warnings.catch_warnings(record=True) as got:
            warnings.simplefilter('always')
            quiet(photos(mean_std=ms), cnn(seed=2)).fit(1, 0., cbs=KD(teacher, SoftTarget))
        assert not [w for w in got if 'normalize' in str(w.message) and 'worse' not in str(w.message) and 'right on' not in str(w.message)]

def test_other_words_are_an_error():
    a,b = (texts() for _ in range(2))
    a.vocab,b.vocab = ['xxpad','a','b'],['xxpad','b','a']
    class LM(nn.Module):
        def __init__(self): super().__init__(); self.e,self.fc = nn.Embedding(20,4),nn.Linear(4,20)
        def forward(self, x): return self.fc(self.e(x))
    for i,(va,vb) in enumerate(((['xxpad','a','b'],['xxpad','b','a']), ([['xxpad','a','b'],['neg','pos']],[['xxpad','b','a'],['neg','pos']]))):
        a.vocab,b.vocab = va,vb
        if i: # of a text classifier: words and classes
            with pytest.raises(ValueError, match='word vocabularies'): learner(a, LM(), loss_func=CrossEntropyLossFlat()).fit(1, cbs=KD(Learner(b, LM(), CrossEntropyLossFlat()), SoftTarget))

def test_test_time_augmentation_inside_a_fit_and_outside():
    "`tta` runs no teacher, and the fit goes on"
    class Spy(nn.Module):
        def __init__(self): super().__init__(); self.m,self.n = cnn(),0
        def forward(self, x): self.n += 1; return self.m(x)
    class Late(Callback):
        order = 70
        def after_epoch(self):
            kept = {k: getattr(self.learn, k) for k in ('xb','yb','pred','loss','dl','epoch','n_epoch')}
            if self.epoch == 0: self.learn.tta(n=2)
            for k,v in kept.items(): setattr(self.learn, k, v)
    t = Spy()
    learn,kd = quiet(photos(), cnn(seed=2)),KD(t, SoftTarget)
    learn.fit(2, .1, cbs=[kd, Late()])
    assert t.n == 4 and kd.curves['steps'] == [2,4] and not learn.metrics
    learn.add_cb(kd)
    learn.tta(n=2)
    assert t.n == 4 and kd.session is None and not hooks(learn.model)

# losses and weights by default

@pytest.mark.parametrize('loss_func,target,right', [(CrossEntropyLossFlat(), y, SoftTarget), (F.cross_entropy, y, SoftTarget), (BCEWithLogitsLossFlat(), yes, BinarySoftTarget), (MSELossFlat(), draw(32,4), Logits),
    (nn.SmoothL1Loss(), draw(32,4), Logits), (partial(F.mse_loss, reduction='mean'), draw(32,4), Logits), (lambda p, y: F.binary_cross_entropy_with_logits(p, y), yes, BinarySoftTarget)])
def test_left_out_the_loss_suits_the_task(loss_func, target, right, capsys):
    s,t = lin(),lin(3)
    got = kd_loss(data(x, target), s, loss_func, t, None)
    assert right.__name__ in start(capsys)
    assert got == pytest.approx(float(right()(pred=s(x[:8]), teacher_pred=t(x[:8]))), rel=1e-5)

@pytest.mark.parametrize('loss_func,target,cure', [(BCEWithLogitsLossFlat(), yes, 'BinarySoftTarget'), (MSELossFlat(), draw(32,4), 'Logits')])
@pytest.mark.parametrize('loss', [SoftTarget, DIST, Mutual, [Logits,SoftTarget]])
def test_a_loss_that_does_not_suit_the_task_is_refused(loss_func, target, cure, loss):
    s = lin()
    before = weights(s)
    with pytest.raises(ValueError, match=f'use `{cure}`'): learner(data(x, target), s, loss_func=loss_func).fit(1, .1, cbs=KD(lin(3), loss))
    assert same(before, weights(s))

fitting = lambda: KD(lin(3), SoftTarget)
@pytest.mark.parametrize('losses,kwargs,weight,label', [
    (SoftTarget, {}, [.5], None), (Attention, {}, [1000.], 1.), ([SoftTarget,Logits], {}, [.25,.25], None), ([SoftTarget,Attention], {}, [.5,1000.], .5), ([SoftTarget,FitNet,Attention], {}, [.5,100.,1000.], .5),
    (SoftTarget, dict(weight='paper'), [.9], .1), ([SoftTarget,Attention], dict(weight='paper'), [.9,1000.], .1), ([SoftTarget,Attention], dict(weight=.5), [.25,.25], None), ([SoftTarget,Attention], dict(weight=[.5,7]), [.5,7], 'error'),
    ([SoftTarget,Attention], dict(weight=[.5,7], label_weight=1), [.5,7], 1), (Cosine, {}, [.25], .75), (partial(SoftTarget, T=4), dict(weight=.9), [.9], None), ([SoftTarget,Logits], dict(label_weight=2), [.25,.25], 2)])
def test_weights_by_default(losses, kwargs, weight, label):
    if label == 'error':
        with pytest.raises(ValueError, match='label_weight'): KD(lin(3), losses, **kwargs)
        return
    kd = KD(lin(3), losses, **kwargs)
    assert [t.weight for t in kd.objective.terms] == pytest.approx(weight) and kd.objective.at(1.).label == pytest.approx(1-sum(weight) if label is None else label)

@pytest.mark.parametrize('loss', [Similarity, RKD, PKT])
@pytest.mark.parametrize('weight', [None, 'paper', 10.])
def test_the_last_stage_alone_for_losses_that_compare_that_alone(loss, weight):
    s,t = net(4, seed=1),net(6, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        one,all_ = KD(t, loss, weight=weight, label_weight=1.),KD(t, Attention)
        learner(model=s).fit(1, 0., cbs=one); learner(model=s).fit(1, 0., cbs=all_)
    assert len(all_.pairs) == 2 and one.pairs == all_.pairs[-1:]
    both = KD(t, [Attention, loss])
    learner(model=s).fit(1, 0., cbs=both)
    assert both.pairs == all_.pairs

@pytest.mark.parametrize('loss,weight,warned', [(Attention,.9,True), (Attention,99,True), (Attention,101,False), (Attention,None,False), (Attention,'paper',False), (FitNet,9,True), (Similarity,299,True), (SoftTarget,.05,True), (SoftTarget,.5,False), (Attention,0,False)])
def test_a_weight_that_is_hardly_meant(loss, weight, warned):
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter('always')
        learner(model=net(4, seed=1)).fit(1, 0., cbs=KD(net(6, seed=2), loss, weight=weight, label_weight=1. if weight not in ('paper',None) else None))
    said = [str(w.message) for w in got if 'tenth' in str(w.message)]
    assert len(said) == warned and (not warned or ("weight='paper'" in said[0] and loss.__name__ in said[0]))

# a bad teacher

class Says(nn.Module):
    "Always right, always wrong, or always the most frequent label"
    def __init__(self, what): super().__init__(); self.p,self.what = nn.Parameter(torch.zeros(1)),what
    def forward(self, x):
        labels = (x[:,0]*1000).round().long() % 4
        return F.one_hot({'right': labels, 'wrong': (labels+1) % 4, 'frequent': labels*0}[self.what], 4).float()*5

labels = torch.tensor([0]*18 + [1]*6 + [2]*4 + [3]*4)
xl = torch.cat([labels[:,None]/1000, draw(32,4)], 1)

@pytest.mark.parametrize('what,cbs,warned', [('wrong', [], True), ('right', [], False), ('frequent', [], False), ('wrong', [MixUp], False)])
@pytest.mark.parametrize('loss', [SoftTarget, [SoftTarget,Logits]])
def test_a_teacher_worse_than_chance(what, cbs, warned, loss):
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter('always')
        learner(data(xl, labels), lin(), loss_func=CrossEntropyLossFlat()).fit(3, .01, cbs=[KD(Says(what), loss), *[c() for c in cbs]])
    said = [str(w.message) for w in got if 'most frequent label' in str(w.message)]
    assert len(said) == warned and (not warned or ('0.0%' in said[0] and '56.2%' in said[0] and 'teacher_metrics' in said[0]))

def test_items_without_a_label_say_nothing_of_the_teacher():
    ys = labels.clone()
    ys[18:] = -100
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', category=DeprecationWarning)
        learner(data(xl, ys), lin(), loss_func=CrossEntropyLossFlat()).fit(1, .01, cbs=KD(Says('right'), SoftTarget))

@pytest.mark.parametrize('what', ['mse','bce','ema'])
def test_nothing_is_said_of_other_tasks_and_moving_teachers(what):
    dls,lf,t = {'mse': (data(x, draw(32,4)), MSELossFlat(), lin(3)), 'bce': (data(x, yes), BCEWithLogitsLossFlat(), lin(3)), 'ema': (data(x, y), CrossEntropyLossFlat(), EMATeacher(.9))}[what]
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter('always')
        learner(dls, lin(), loss_func=lf).fit(1, .01, cbs=KD(t))
    assert not [w for w in got if 'most frequent' in str(w.message)]

def test_a_term_that_is_0_all_through_an_epoch():
    t = lin()
    with pytest.warns(UserWarning, match='kd_loss was exactly 0'): learner(data(x, y), lin(), loss_func=F.cross_entropy).fit(1, 0., cbs=KD(t, SoftTarget))

# what is given as a loss, a layer, a method

@pytest.mark.parametrize('loss', [partial(SoftTarget, T=4), partial(partial(SoftTarget), T=4), SoftTarget(T=4), lambda pred, teacher_pred: SoftTarget(T=4)(pred, teacher_pred)])
def test_a_partial_is_its_instance(loss):
    s,t = lin(),lin(3)
    assert kd_loss(data(x, y), s, F.cross_entropy, t, loss) == pytest.approx(by_hand(s(x[:8]), t(x[:8]), 1, T=4), rel=1e-4)
    assert kd_loss(data(x, y), s, F.cross_entropy, t, [loss], weight=.3) == pytest.approx(by_hand(s(x[:8]), t(x[:8]), 1, T=4), rel=1e-4)

def test_a_partial_of_a_loss_with_parameters():
    s,t = net(4, seed=1),net(6, seed=2)
    kd = KD(t, [partial(FitNet, bn=False), partial(RKD, layers={'relu2': 'bn2'})], 'relu1', 'relu1')
    learner(model=s).fit(1, 0., cbs=kd)
    assert kd.pairs == [('relu1','relu1'),('relu2','bn2')]

def test_layers_given_as_modules():
    s,t,dls = net(4, seed=1),net(6, seed=2),batches(shuffle=False)
    kd = KD(t, Attention, [s.relu1, 'bn2'], [t.bn1, t.relu2])
    learner(dls, s).fit(1, 0., cbs=kd)
    named = KD(t, Attention, ['relu1','bn2'], ['bn1','relu2'])
    learner(dls, s).fit(1, 0., cbs=named)
    assert kd.pairs == named.pairs and kd.curves['train']['kd_loss'] == pytest.approx(named.curves['train']['kd_loss'])
    for a,b in ((s.relu1, t.bn1), (s.relu1, 'bn1')):
        one = KD(t, Attention, a, b)
        learner(model=s).fit(1, 0., cbs=one)
        assert one.pairs == [('relu1','bn1')]
    own = KD(t, Attention(layers={s.relu1: t.bn1}))
    learner(model=s).fit(1, 0., cbs=own)
    assert own.pairs == [('relu1','bn1')]

@pytest.mark.parametrize('a,b,match', [(3, 3, 'got int 3'), ([0,1], [0,1], 'got int 0'), (nn.ReLU(), 'bn1', 'got ReLU'), ('bn1', nn.ReLU(), 'modules of the teacher, got ReLU'), (None, 'bn1', 'pairs'), (1.5, 1.5, 'got float 1.5')])
def test_layers_that_are_none(a, b, match):
    with pytest.raises((TypeError,ValueError), match=match): learner(model=net(4, seed=1)).fit(1, 0., cbs=KD(net(6, seed=2), Attention, a, b))

# the start line

def test_the_start_line_says_what_happens(capsys):
    s,t = net(4, seed=1),net(6, seed=2)
    kd = KD(Teacher(t, dtype=torch.bfloat16), [SoftTarget(T=3),Attention], ['relu1','relu2'], ['relu1','relu2'], weight=[.4,500], label_weight=.7)
    learner(model=s).fit(2, 0., cbs=kd)
    out = capsys.readouterr().out
    n = lambda m: f'{sum(p.numel() for p in m.parameters()):,}'
    for part in (n(s), n(t), '0.7', '0.4', 'SoftTarget', 'T=3', '500', 'Attention', 'relu1 ~ relu1', 'relu2 ~ relu2', 'bfloat16'): assert part in out, part
    assert out.count('Distilling') == 1 and repr(kd) == out.strip() and len(out.strip().split('\n')) <= 3

def test_what_the_start_line_says_of_schedules(capsys):
    for kw,parts in ((dict(schedule=SchedCos(0, 1)), ('schedule','0.5')), (dict(weight=.3), ('0.7','0.3')), (dict(weight=.3, label_weight=2), ('2','0.3'))):
        learner(data(x, y), lin(), loss_func=F.cross_entropy).fit(1, 0., cbs=KD(lin(3), SoftTarget, **kw))
        out = capsys.readouterr().out
        assert all(p in out for p in parts)

def test_the_start_line_says_that_nothing_is_distilled(capsys):
    learn = learner()
    learn.logger = print
    learn.fit(1, cbs=KD(net(seed=2), SoftTarget, weight=0))
    assert '1·train_loss + 0·SoftTarget' in capsys.readouterr().out

def test_when_nothing_is_said(capsys, monkeypatch):
    kd = KD(lin(3), SoftTarget)
    learn = learner(data(x, y), lin(), loss_func=F.cross_entropy, cbs=kd)
    learn.lr_find(num_it=4, show_plot=False)
    learn.validate(); learn.get_preds()
    with learn.no_logging(): learn.fit(1, 0.)
    with learn.no_bar(), learn.no_logging(), learn.no_mbar(): learn.fit(1, 0.)
    assert 'Distilling' not in capsys.readouterr().out
    monkeypatch.setattr('fastkd.session.rank_distrib', lambda: 1)
    learn.fit(1, 0.)
    assert 'Distilling' not in capsys.readouterr().out
    monkeypatch.undo()
    learn.fit(1, 0.)
    assert capsys.readouterr().out.count('Distilling') == 1

class Own(KDLoss):
    def forward(self, pred, teacher_pred): return (pred-teacher_pred).square().mean()
def by_name(pred, teacher_pred): return (pred-teacher_pred).square().mean()

@pytest.mark.parametrize('make', [lambda: KD(lin(3)), lambda: KD(lin(3), SoftTarget), lambda: KD([lin(3),lin(4)], [SoftTarget(T=3),Logits]), lambda: KD(lambda x: x[:,:4], by_name), lambda: KD(lin(3), Own), lambda: KD(EMATeacher(.9), SoftTarget, schedule=SchedCos(0,1)),
    lambda: KD(Teacher(lin(3), inputs=lambda x: x, outputs=lambda x: x), [lambda pred, teacher_pred: pred.mean()]), lambda: KD(learner(data(x, y), lin(3), loss_func=F.cross_entropy), partial(SoftTarget, T=4)),
    lambda: KD(PeerTeacher(learner(data(x, y), lin(3), loss_func=F.cross_entropy)), Mutual)])
def test_reprs_name_no_address(make, capsys):
    kd = make()
    for o in (kd, kd.teacher, kd.objective): assert ' at 0x' not in repr(o) and 'object' not in repr(o), repr(o)
    learner(data(x, y), lin(), loss_func=F.cross_entropy).fit(1, 0., cbs=kd)
    assert ' at 0x' not in repr(kd) and ' at 0x' not in capsys.readouterr().out

@pytest.mark.parametrize('loss', [SoftTarget, Logits, Mutual, DecoupledKD, NormalizedKD, DIST, BinarySoftTarget, ChannelWise, Attention, Similarity, RKD, PKT, NST, FitNet, Cosine, VID, ActivationBoundaries, ReviewKD, ChannelWiseFeatures])
def test_defaults_stand_in_signatures(loss):
    "What an instance holds is what its signature says"
    import inspect
    sig = inspect.signature(loss)
    assert not any(p.kind in (p.VAR_POSITIONAL,p.VAR_KEYWORD) for p in sig.parameters.values()), sig
    assert loss.__name__ in repr(loss())
