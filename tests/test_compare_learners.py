"Comparisons of learners of one's own: what they train, what they refuse, and who shares their work"
import copy, io, json, os, random, signal, subprocess, sys, time, warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
import numpy as np, pytest, torch
from torch import nn
from torch.utils.data import TensorDataset
from fastai.basics import AvgMetric, Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, MSELossFlat, accuracy, mse, set_seed
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
import fastkd
from fastkd.cli import main
from fastkd.experiments import Results, compare
from fastkd.metrics import TeacherAgreement
from fastkd.online_teachers import PeerTeacher
from fastkd.teacher import Teacher

C = import_module('fastkd.experiments.compare')

def blobs(n=150, seed=0):
    "Three overlapping clouds of points"
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return torch.randn(n, 2, generator=g) + torch.tensor([[0.,0.],[2.,0.],[0.,2.]])[y], y

def loaders(bs=20, **kwargs):
    x,y = blobs()
    return DataLoaders(DataLoader(TensorDataset(x[:80], y[:80]), bs=bs, shuffle=True, num_workers=0),
        DataLoader(TensorDataset(x[80:], y[80:]), bs=70, num_workers=0), device=torch.device('cpu'))

dls = loaders()
x,y = blobs(60, seed=1)
test_dl = DataLoader(TensorDataset(x, y), bs=60, num_workers=0)

def net(width=4, classes=3): return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, classes))
def make_student(): return Learner(dls, net(), CrossEntropyLossFlat(), metrics=accuracy)

def trained(width=32, dls=dls, epochs=8):
    set_seed(7)
    dls.train.rng = random.Random(7)
    learn = Learner(dls, net(width), CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 0.02)
    return learn

@pytest.fixture(scope='module')
def teacher(): return trained()

run = partial(compare, make_student, methods=['none','soft'], seeds=2, epochs=2, lr=0.02, show=False)
def numbers(runs): return {(r.method,r.seed): (r.value,r.log) for r in runs}

@pytest.fixture(scope='module')
def finished(tmp_path_factory, teacher):
    out = tmp_path_factory.mktemp('mine')
    return out,run(teacher, out=out)

def by_hand(seed, cbs=None):
    "A plain fit of fastai, without this package"
    torch.manual_seed(seed); np.random.seed(seed); random.seed(seed)
    learn = make_student()
    learn.dls.train.rng = random.Random(seed)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(2, 0.02, cbs=cbs)
        log = [list(v) for v in learn.recorder.values]
        return log,learn.validate()[1]

def test_the_student_alone_is_a_plain_fit(finished):
    for r in finished[1]:
        if r.method != 'none': continue
        log,value = by_hand(r.seed)
        assert r.value == pytest.approx(value) and r.log['train_loss'] == pytest.approx([row[0] for row in log]) and r.log['accuracy'] == pytest.approx([row[2] for row in log])
        assert r.parameters == 4*2+4+3*4+3 and len(r.seconds) == 2 and r.on == 'validation' and r.metric == 'accuracy'

def test_equal_seeds_give_equal_numbers_whatever_ran_before(finished, teacher, tmp_path):
    "The learners share their loaders, whose random streams go on"
    make_student().fit(1)
    again = run(teacher, methods=['soft','none'], seeds=[1,0], out=tmp_path)
    assert numbers(again) == numbers(finished[1]) and len({str(v) for v in numbers(again).values()}) == 4

def test_loaders_of_pytorch_start_from_the_seed(teacher, tmp_path):
    "with a generator of their own, too"
    def pytorch():
        x,y = blobs()
        return DataLoaders(torch.utils.data.DataLoader(TensorDataset(x[:80], y[:80]), 20, shuffle=True, generator=torch.Generator()),
            torch.utils.data.DataLoader(TensorDataset(x[80:], y[80:]), 70), device=torch.device('cpu'))
    shared = pytorch()
    def make(): return Learner(shared, net(), CrossEntropyLossFlat(), metrics=accuracy)
    both,second = compare(make, teacher, ['none'], 2, 1, show=False, out=tmp_path/'a'),compare(make, teacher, ['none'], [1], 1, show=False, out=tmp_path/'b')
    assert numbers(both)['none',1] == numbers(second)['none',1] != numbers(both)['none',0]

def test_finished_runs_are_not_run_again(finished, teacher, monkeypatch):
    out,runs = finished
    before = (out/'results.jsonl').read_bytes()
    monkeypatch.setattr(C, 'train', lambda *a, **k: pytest.fail('a finished run was run again'))
    assert numbers(run(teacher, out=out)) == numbers(runs) and (out/'results.jsonl').read_bytes() == before

def other_rate(): return Learner(dls, net(), CrossEntropyLossFlat(), metrics=accuracy, wd=0.1)
def other_width(): return Learner(dls, net(5), CrossEntropyLossFlat(), metrics=accuracy)
def other_loss(): return Learner(dls, net(), CrossEntropyLossFlat(label_smoothing=0.1), metrics=accuracy)
def other_data(): return Learner(loaders(bs=10), net(), CrossEntropyLossFlat(), metrics=accuracy)
def other_weights():
    learn = make_student()
    with torch.no_grad(): learn.model[0].weight.mul_(2)
    return learn
def frozen():
    learn = make_student()
    learn.model[0].weight.requires_grad_(False)
    return learn
def other_attribute():
    learn = make_student()
    learn.model[2].p = 0.2
    return learn
def other_labels():
    x,y = blobs()
    y[70] = (y[70]+1) % 3  # in no first batch
    data = DataLoaders(DataLoader(TensorDataset(x[:80], y[:80]), bs=20, shuffle=True, num_workers=0), DataLoader(TensorDataset(x[80:], y[80:]), bs=70, num_workers=0), device=torch.device('cpu'))
    return Learner(data, net(), CrossEntropyLossFlat(), metrics=accuracy)
def mixed_little(): return Learner(dls, net(), CrossEntropyLossFlat(), metrics=accuracy, cbs=MixUp(0.3))
def other_callback(): return Learner(dls, net(), CrossEntropyLossFlat(), metrics=accuracy, cbs=MixUp(0.2))
def of_function():
    "The name of the function and of the module do not matter"
    return make_student()

@pytest.mark.parametrize('change', [dict(make_student=f) for f in (other_rate,other_width,other_loss,other_data,other_weights,other_callback,frozen,other_attribute,other_labels)] +
    [dict(epochs=1), dict(lr=0.01), dict(teacher=1), dict(test=test_dl), dict(fit=Learner.fine_tune), dict(fit=Learner.fit)], ids=str)
def test_whatever_decides_the_numbers_makes_another_comparison(change, finished, teacher, tmp_path):
    if 'teacher' in change: change = dict(teacher=trained(epochs=3))
    kwargs = dict(make_student=of_function, teacher=teacher, methods=['none'], seeds=1, epochs=2, lr=0.02, out=tmp_path, show=False)
    first = compare(**kwargs)
    assert first.runs[0].comparison == finished[1].runs[0].comparison
    assert compare(**{**kwargs, **change}).runs[0].comparison != first.runs[0].comparison

def test_settings_and_code_are_part_of_what_a_run_is_known_by(teacher, tmp_path):
    "of callbacks, metrics, functions that teach and train, and of the teacher's data"
    def known(make=make_student, t=teacher, **kwargs):
        return compare(make, t, ['none'], 1, 1, out=tmp_path, show=False, **kwargs).runs[0].comparison
    def metric(at): return lambda pred, targ: (pred.argmax(1) == targ).float().mean() if at else accuracy(pred, targ)
    def learner(**kwargs): return lambda: Learner(dls, net(), CrossEntropyLossFlat(), **kwargs)
    def first(pred, targ): return accuracy(pred, targ)
    def second(pred, targ): return 1 - accuracy(pred, targ)
    second.__name__ = 'first'
    def teach(x): return teacher.model(x)
    def other(x): return 2*teacher.model(x)
    other.__name__ = other.__qualname__ = 'teach'
    class Tanh(nn.Sequential): pass
    pairs = [(dict(make=lambda: learner(metrics=accuracy, cbs=MixUp(.4))()), dict(make=lambda: learner(metrics=accuracy, cbs=MixUp(.2))())), (dict(make=learner(metrics=first)), dict(make=learner(metrics=second))),
        (dict(t=teach), dict(t=other)), (dict(t=Teacher(teacher.model, outputs=lambda o: o)), dict(t=Teacher(teacher.model, outputs=lambda o: -o))),
        (dict(t=teacher.model), dict(t=nn.Sequential(teacher.model[0], nn.Tanh(), *teacher.model[2:]))),
        (dict(fit=lambda learn, n, cbs: learn.fit(n, cbs=cbs)), dict(fit=lambda learn, n, cbs: learn.fit(n, 1e-3, cbs=cbs)))]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for a,b in pairs:
            assert known(**a) == known(**a) != known(**b)

def test_a_changed_loss_of_ones_own_is_told(teacher, tmp_path):
    def mine(pred, teacher_pred): return (pred-teacher_pred).square().mean()
    first = mine
    def mine(pred, teacher_pred): return 2*(pred-teacher_pred).square().mean()
    run(teacher, methods=['none', {'mine': first}], seeds=1, out=tmp_path)
    with pytest.warns(UserWarning, match="'mine' had other settings in finished runs"): run(teacher, methods=['none', {'mine': mine}], seeds=1, out=tmp_path)

def test_loaders_that_do_not_repeat_are_told(teacher, tmp_path):
    class InPlace(DataLoader):
        "fastai's `LMDataLoader` shuffles in this way"
        def shuffle_fn(self, idxs):
            self.held = [self.held[i] for i in super().shuffle_fn(list(range(len(idxs))))] if hasattr(self, 'held') else super().shuffle_fn(idxs)
            return self.held
    x,y = blobs()
    data = DataLoaders(InPlace(TensorDataset(x[:80], y[:80]), bs=20, shuffle=True, num_workers=0), DataLoader(TensorDataset(x[80:], y[80:]), bs=70, num_workers=0), device=torch.device('cpu'))
    with pytest.warns(UserWarning, match='does not repeat its batches for equal seeds'):
        compare(lambda: Learner(data, net(), CrossEntropyLossFlat(), metrics=accuracy), teacher, ['none'], 1, 1, out=tmp_path, show=False)

def test_of_two_metrics_of_one_name_the_first_counts(teacher, tmp_path):
    def make():
        a,b = AvgMetric(lambda p, t: torch.tensor(0.25)),AvgMetric(lambda p, t: torch.tensor(0.75))
        a._name = b._name = 'same'
        return Learner(dls, net(), CrossEntropyLossFlat(), metrics=[Named(a, 'same'), Named(b, 'same')])
    r = compare(make, teacher, ['none'], 1, 1, out=tmp_path, show=False).runs[0]
    assert r.value == 0.25 and r.log['same'] == [0.25]

class Named(AvgMetric):
    def __init__(self, m, name): super().__init__(m.func); self.named = name
    @property
    def name(self): return self.named

def test_another_training_is_what_was_asked_for(teacher, tmp_path):
    def two_phases(learn, epochs, lr, cbs):
        learn.fit(1, lr, cbs=cbs)
        learn.fit(epochs, lr/2, cbs=cbs)
    r = run(teacher, methods=['soft'], seeds=1, fit=two_phases, out=tmp_path).runs[0]
    assert len(r.seconds) == len(r.log['kd_loss']) == len(r.log['accuracy']) == 3 and all(v > 0 for v in r.log['kd_loss'])

def test_a_test_set_is_what_the_end_is_measured_on(teacher, tmp_path):
    runs = run(teacher, test=test_dl, seeds=1, out=tmp_path)
    set_seed(0)
    log,_ = by_hand(0)
    assert 'accuracy on 60 test rows that trained no model' in ' '.join(repr(runs).split()) and runs.runs[0].data[1:4] == [80,70,60]
    assert 'validation rows (too good for a method that is chosen by them' in repr(run(teacher, seeds=1, out=tmp_path)).replace('\n', ' ')
    with torch.no_grad(): right = (teacher.model.eval()(x).argmax(1) == y).float().mean().item()
    assert runs.table().accuracy['teacher'] == pytest.approx(100*right)

def test_less_is_better_of_a_loss(tmp_path):
    "Regression: the sign of gains, the order of rows, the share of the gap"
    X = torch.randn(90, 3, generator=torch.Generator().manual_seed(0))
    Y = (X @ torch.tensor([[1.],[2.],[-1.]]))
    data = DataLoaders(DataLoader(TensorDataset(X[:60], Y[:60]), bs=20, shuffle=True, num_workers=0), DataLoader(TensorDataset(X[60:], Y[60:]), bs=30, num_workers=0),
        device=torch.device('cpu'))
    def make(): return Learner(data, nn.Linear(3, 1), MSELossFlat(), metrics=mse)
    class Worse(nn.Module):
        def forward(self, pred, teacher_pred): return (pred - 10).square().mean()
    exact = nn.Linear(3, 1)
    with torch.no_grad(): exact.weight.copy_(torch.tensor([[1.,2.,-1.]])); exact.bias.zero_()
    runs = compare(make, exact, ['none', 'logits', {'worse': Worse()}], 2, 3, 0.1, out=tmp_path, show=False)
    t = runs.table()
    assert t.mse['teacher'] == pytest.approx(0, abs=1e-9) and t.index[-1] == 'worse' and t.difference['worse'] > 0
    assert (t.closed.dropna() > 0).tolist() == (t.difference[t.closed.notna()] < 0).tolist()
    assert 'mse' in repr(runs) and '%' not in repr(runs).split('\n')[0].replace('95 %', '')

@pytest.mark.parametrize('o,words', [(lambda: 'digits', 'recipe'), (lambda: make_student(), 'Each run trains a new student'),
    (lambda: (lambda learn=make_student(): learn), 'same model twice'), (lambda: net, 'must return a new `Learner`'), (lambda: (lambda a: a), 'without arguments'), (lambda: 3, 'Each run')])
def test_what_makes_no_new_student_is_refused(o, words, teacher, tmp_path):
    o = o()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=words) as e: compare(o, teacher, out=tmp_path, show=False)
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir())
    assert torch.equal(torch.get_rng_state(), state)

@pytest.mark.parametrize('kwargs,words', [(dict(metric='dice'), "no metric 'dice'; it has accuracy, valid_loss"), (dict(methods=['sofd']), 'did you mean soft'),
    (dict(better='Lower'), "'higher' or 'lower'"), (dict(test=[1]), '`test` must be'), (dict(executor='x'), 'process of its own'),
    (dict(fit=lambda learn, epochs, lr, cbs: learn.fit(epochs, lr)), 'pass them on'), (dict(seeds=[[1]]), 'each once'), (dict(views=0), 'whole number'),
    (dict(seeds=0), '1 or more'), (dict(epochs=0), '1 or more'), (dict(methods=['none','attention']), 'attention: Attention compares'), (dict(out='/proc/nope'), 'cannot be written')])
def test_what_cannot_work_is_one_sentence_before_anything_is_trained(kwargs, words, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(C, 'train', lambda *a, **k: pytest.fail('there was a training'))
    with pytest.raises(ValueError, match=words) as e: run(teacher, **{'out': tmp_path, **kwargs})
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('teacher', [None, 'resnet34', nn.Linear, []])
def test_what_cannot_teach_is_one_sentence(teacher, tmp_path):
    with pytest.raises(ValueError) as e: run(teacher, out=tmp_path)
    assert '\n' not in str(e.value)

def test_a_learner_without_a_validation_set_is_refused(teacher, tmp_path):
    data = DataLoaders(dls.train, device=torch.device('cpu'))
    with pytest.raises(ValueError, match='no validation set'): compare(lambda: Learner(data, net(), CrossEntropyLossFlat()), teacher, out=tmp_path, show=False)

def test_a_teacher_of_other_classes_is_refused(tmp_path):
    with pytest.raises(ValueError, match='soft: .*5'): run(net(8, 5), out=tmp_path)
    assert [*run(net(8, 5), methods=['none'], seeds=1, out=tmp_path)]  # it has no metric here, and the student alone needs none

def test_an_untrained_teacher_is_told(tmp_path):
    torch.manual_seed(0)
    bad = net(32)
    with torch.no_grad(): bad[-1].bias.copy_(torch.tensor([50.,0.,0.]))  # always the first class
    with pytest.warns(UserWarning, match="The teacher's accuracy is .* of an untrained student .*was it trained"): run(bad, methods=['none'], seeds=1, out=tmp_path)

def test_a_metric_that_is_no_number(teacher, tmp_path):
    "in some runs"
    def odd(pred, targ): return float('nan') if torch.initial_seed() == 1 else 0.5
    def make(): return Learner(dls, net(), CrossEntropyLossFlat(), metrics=odd)
    runs = compare(make, teacher, ['none','soft'], 3, 1, metric='odd', out=tmp_path, show=False)
    assert [r.value for r in runs if r.method == 'none'] == [0.5,None,0.5] and runs.table().n['soft'] == 2
    assert '2 of 6 runs, whose metric is no number, are left out' in ' '.join(repr(runs).split())
    assert [r.value for r in Results(tmp_path/'results.jsonl').read()].count(None) == 2
    runs.plot(), runs.plot_curves()

def test_a_learner_without_metrics_is_compared_by_its_loss(teacher, tmp_path):
    def make(): return Learner(dls, net(), CrossEntropyLossFlat())
    runs = compare(make, teacher, ['none','soft'], 2, 2, 0.02, out=tmp_path, show=False)
    assert runs.runs[0].metric == 'valid_loss' and runs.runs[0].better == 'lower' and 'valid_loss' in repr(runs)

def test_it_shows_itself(finished):
    runs = finished[1]
    html = runs._repr_html_()
    assert html.count('<img') == 2 and 'student alone' in html and html.count('alt=') == 2 and str(finished[0]) not in html
    assert 'student alone' in repr(runs) and len(runs) == 4 and len(runs.frame) == 4 and max(map(len, repr(runs).splitlines())) <= 80

def test_another_metric_of_the_same_runs(teacher, tmp_path):
    "such as how often the student decides as its teacher does"
    def make(): return Learner(dls, net(), CrossEntropyLossFlat(), metrics=[accuracy, TeacherAgreement(teacher)])
    runs = compare(make, teacher, ['none','soft'], 2, 2, 0.02, out=tmp_path, show=False)
    other = runs.by('teacher_agreement')
    assert [r.value for r in other] == [r.more['values']['teacher_agreement'] for r in runs] and 'teacher_agreement' in repr(other) and len(other._repr_html_())
    lines = repr(other).splitlines()
    assert lines[0].startswith(' ') and 'value, %' in lines[0] and max(map(len, lines)) <= 80  # long names leave room for the methods'
    assert not [l for l in lines if l.startswith('teacher')] and any(l.startswith('student alone  ') for l in lines)  # its own value is unknown
    losses = runs.by('valid_loss').table()
    assert losses.attrs['better'] == 'lower' and np.isnan(losses.valid_loss['teacher']) and losses.valid_loss['soft'] == pytest.approx(np.mean([r.log['valid_loss'][-1] for r in runs if r.method == 'soft']))
    with pytest.raises(ValueError, match='no metric \'dice\'; they have'): runs.by('dice')

def test_a_run_made_by_hand(teacher, tmp_path):
    runs = run(teacher, out=tmp_path)
    set_seed(0)
    learn = make_student()
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 0.02)
    assert len(runs.add(learn, 'mine', 0)) == 5 and runs.table().loc['mine','pairs'] == 1
    assert Results(tmp_path/'results.jsonl').read()[-1].method == 'mine' and len(runs.runs[-1].log['accuracy']) == 3
    assert np.isnan(runs.table().time['mine']) and 'mine' in repr(runs)
    runs.plot(), runs.plot_curves()

# more than one process

def worker(out, wait=0.):
    "A process that makes the runs of a comparison"
    torch.set_num_threads(1)
    class Slow(nn.Module):
        def forward(self, pred, teacher_pred):
            time.sleep(wait)
            return (pred-teacher_pred).square().mean()
    run(trained(), methods=['none','soft','logits'], seeds=3, out=out)

def test_processes_share_the_runs_of_one_folder(tmp_path):
    "Every run is there once, with the numbers of one process"
    torch.set_num_threads(1)
    alone = run(trained(), methods=['none','soft','logits'], seeds=3, out=tmp_path/'one')
    processes = [get_context('fork').Process(target=worker, args=(tmp_path/'two',)) for _ in range(2)]
    for p in processes: p.start()
    for p in processes: p.join()
    lines = (tmp_path/'two'/'results.jsonl').read_text().splitlines()
    assert not any(p.exitcode for p in processes) and len(lines) == 9
    assert numbers(Results(tmp_path/'two'/'results.jsonl').read()) == numbers(alone)

def hold(path, key):
    with Results(path).claim(*key) as mine:
        print(mine, flush=True)
        time.sleep(100)

def test_a_claim_dies_with_its_process(tmp_path):
    path,key = tmp_path/'results.jsonl',('c','soft',0)
    holder = get_context('fork').Process(target=hold, args=(path, key), daemon=True)
    holder.start()
    while not list(tmp_path.glob('.locks/*')): time.sleep(0.01)
    def claimed():
        with Results(path).claim(*key) as mine: return not mine
    for _ in range(500):
        if claimed(): break
        time.sleep(0.01)
    assert claimed()
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert not claimed()

def test_an_executor_makes_the_runs(tmp_path):
    "What is sent can be pickled; this process alone writes"
    torch.set_num_threads(1)
    with ProcessPoolExecutor(2, mp_context=get_context('fork')) as executor: there = run(trained(), executor=executor, out=tmp_path/'there')
    assert numbers(there) == numbers(run(trained(), out=tmp_path/'here')) and len((tmp_path/'there'/'results.jsonl').read_text().splitlines()) == 4

def test_what_is_finished_is_kept_when_a_run_fails(teacher, tmp_path):
    calls = []
    def make():
        calls.append(1)
        if len(calls) == 7: raise KeyboardInterrupt
        return make_student()
    with pytest.raises(KeyboardInterrupt): compare(make, teacher, ['none','soft'], 2, 2, 0.02, out=tmp_path, show=False)
    kept = len(Results(tmp_path/'results.jsonl').read())
    assert 0 < kept < 4 and len(compare(make, teacher, ['none','soft'], 2, 2, 0.02, out=tmp_path, show=False)) == 4

@pytest.mark.parametrize('cb', [partial(SaveModelCallback, monitor='accuracy'), partial(EarlyStoppingCallback, min_delta=100, patience=0), partial(ReduceLROnPlateau, patience=0)])
def test_callbacks_that_follow_epochs(cb, teacher, tmp_path):
    "They train as in a fit by hand, whether the learner has them or `fit` gets them"
    def make(*cbs):
        learn = make_student()
        learn.add_cbs(cbs)
        return learn
    def fit(learn, epochs, lr, cbs): learn.fit(epochs, lr, cbs=[*cbs, cb()])
    runs = [compare(f, teacher, ['none','soft'], 1, 4, 0.05, out=tmp_path/str(i), show=False, **k).runs for i,(f,k) in enumerate([(lambda: make(cb()), dict(fit=Learner.fit)), (make, dict(fit=fit))])]
    learn = C.new_learner(make, 0)
    with learn.no_bar(), learn.no_logging(): learn.fit(4, 0.05, cbs=cb())
    epochs = len(learn.recorder.values)
    assert [r.value for r in runs[0]] == [r.value for r in runs[1]] and runs[0][0].value == pytest.approx(float(learn.validate()[1]))
    assert all(len(r.log['accuracy']) == len(r.seconds) for o in runs for r in o) and len(runs[0][0].log['accuracy']) == epochs

def test_runs_keep_their_best_models_apart(teacher, tmp_path):
    "beside each other they would load each other's"
    def make(): return Learner(dls, net(), CrossEntropyLossFlat(), metrics=accuracy, cbs=SaveModelCallback(monitor='valid_loss'), path=tmp_path)
    runs = compare(make, teacher, ['none','soft'], 2, 2, 0.02, out=tmp_path/'runs', show=False)
    assert len(list((tmp_path/'runs'/'models').rglob('model.pth'))) == len(runs) == 4 and not (tmp_path/'models').exists()
    for r in runs: assert r.more['values']['valid_loss'] == pytest.approx(min(r.log['valid_loss']), rel=1e-5)

def test_a_peer_begins_each_run_as_it_was_given(tmp_path):
    "so the order of the runs does not count, and the user's own learner is not changed"
    set_seed(3)
    peer = make_student()
    before = copy.deepcopy(peer.model.state_dict())
    def run(name, seeds): return {r.seed: r.value for r in compare(make_student, PeerTeacher(peer), ['none','soft'], seeds, 2, 0.02, out=tmp_path/name, show=False) if r.method == 'soft'}
    assert run('a', [0,1]) == run('b', [1,0]) and run('c', [1])[1] == run('a', [0,1])[1]
    assert all(torch.equal(before[k], v) for k,v in peer.model.state_dict().items())

# where the student starts, and what it is shown

def test_a_student_that_starts_from_its_teacher(tmp_path):
    "of the same architecture it begins as good as its teacher; the student alone does not"
    def make(): return Learner(dls, net(32), CrossEntropyLossFlat(), metrics=accuracy)
    t = trained(epochs=12)
    runs = compare(make, t, ['none','init','init+soft'], 1, 1, lr=1e-9, out=tmp_path, show=False)
    teacher = runs.table().accuracy['teacher']
    assert runs.table().accuracy[['init','init+soft']].tolist() == pytest.approx([teacher]*2) and runs.table().accuracy['student alone'] < teacher - 10
    assert runs.runs[1].settings['method']['init'] is True and 'init' not in runs.runs[0].settings['method']

def test_what_cannot_be_mixed_says_why(teacher, tmp_path):
    "A loss function of PyTorch gets labels of two images at once"
    def make(): return Learner(dls, net(), nn.CrossEntropyLoss(), metrics=accuracy)
    with pytest.raises(ValueError, match='class labels need a loss function of fastai'): compare(make, teacher, ['none','funmatch'], 1, 1, out=tmp_path, show=False)

def test_mixed_inputs_are_part_of_a_method(teacher, tmp_path):
    "`funmatch` is KL at T=1 on mixed inputs, without labels"
    runs = run(teacher, methods=['none','none(mixup=0.4)','funmatch','soft(T=1,weight=1,label_weight=0,mixup=1)'], seeds=1, out=tmp_path)
    logs = [r.log['train_loss'] for r in runs]
    assert logs[0] != logs[1] and logs[2] == logs[3] and runs.runs[2].settings['method']['label_weight'] == 0
    set_seed(0)
    learn = make_student()
    dls.train.rng = random.Random(0)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 0.02, cbs=[MixUp(0.4)])
    assert logs[1] == pytest.approx([v[0] for v in learn.recorder.values])

# views

class Asked(nn.Module):
    "A teacher that counts the rows it is asked about"
    rows = 0
    def __init__(self): super().__init__(); self.net = net(32)
    def forward(self, x):
        Asked.rows += len(x)
        return self.net(x)

def mixed_student(): return Learner(dls, net(), CrossEntropyLossFlat(), metrics=accuracy, cbs=MixUp(0.4))

@pytest.mark.filterwarnings('ignore:The teacher')
def test_methods_share_what_the_teacher_saw(tmp_path):
    "of each seed; the numbers of a run are the same whoever asked first"
    torch.manual_seed(0)
    t = Asked()
    kwargs = dict(seeds=2, epochs=5, lr=0.02, views=2, show=False)
    Asked.rows = 0
    compare(mixed_student, t, ['soft'], out=tmp_path/'a', **kwargs)
    first = Asked.rows
    Asked.rows = 0
    both = compare(mixed_student, t, ['soft','logits','none'], out=tmp_path/'a', **kwargs)
    assert 2*2*80 <= first <= 2*2*80 + 300 and Asked.rows <= 200  # two views of two seeds; then what finds out and confirms whose cache it is
    again = compare(mixed_student, t, ['none','logits','soft'], out=tmp_path/'b', **kwargs)
    assert numbers(again) == numbers(both)
    live = compare(mixed_student, t, ['soft'], out=tmp_path/'c', **{**kwargs, 'views': None})
    assert live.runs[0].comparison != both.runs[0].comparison

@pytest.mark.filterwarnings('ignore:The teacher')
def test_the_student_alone_sees_the_views_of_its_seed(tmp_path):
    seen = {}
    def make():
        learn = mixed_student()
        class See(Callback):
            order = 1001
            def before_batch(self):
                if self.training: seen.setdefault(len(made), []).append(self.x.clone())
        made.append(1)
        learn.add_cb(See())
        return learn
    made = []
    compare(make, Asked(), ['none','soft'], 2, 3, 0.02, views=2, out=tmp_path, show=False)
    runs = [torch.cat(v) for v in seen.values() if len(v) == 12]
    assert len(runs) == 4 and torch.equal(runs[0], runs[1]) and torch.equal(runs[2], runs[3]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(runs[0][:80], runs[0][160:]) and not torch.equal(runs[0][:80], runs[0][80:160])

# what is said

class Terminal(io.StringIO):
    def __init__(self, tty): super().__init__(); self.tty = tty
    def isatty(self): return self.tty

@pytest.mark.parametrize('tty', [True,False])
def test_what_a_user_sees_meanwhile(tty, teacher, tmp_path, monkeypatch):
    out = Terminal(tty)
    monkeypatch.setattr(sys, 'stdout', out)
    monkeypatch.setenv('COLUMNS', '80')
    run(teacher, show=True, out=tmp_path)
    text = out.getvalue()
    lines = [l.split('\r')[-1].replace('\x1b[K', '') for l in text.split('\n') if l]
    assert [l.split(' (')[0] for l in lines] == [f'run {i+1} of 4: {m}, seed {s}: accuracy {r.value*100:.2f} %' for i,(s,m,r) in enumerate(
        (s,m,next(r for r in Results(tmp_path/'results.jsonl').read() if (r.method,r.seed) == (m,s))) for s in (0,1) for m in ('none','soft'))]
    assert ('\r' in text) == tty and ('epoch 1 of 2, accuracy' in text) == tty
    if tty: assert all(len(part.replace('\x1b[K', '')) <= 80 for l in text.split('\n') for part in l.split('\r'))

def test_one_seed_and_no_baseline_are_told(teacher, tmp_path, capsys):
    run(teacher, methods=['soft'], seeds=1, show=True, out=tmp_path)
    out = capsys.readouterr().out
    assert 'One seed has no interval' in out and "There is no 'none' among these methods" in out

# files and the command

def test_a_new_file_runs_as_it_stands(tmp_path):
    env = {**os.environ, 'PYTHONPATH': str(Path(fastkd.__file__).parents[1]), 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}
    def fastkd_(*args): return subprocess.run([sys.executable, '-W', 'ignore', '-m', 'fastkd', *args], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert 'fastkd run mine.py' in fastkd_('new','mine.py').stdout and 'exists already' in fastkd_('new','mine.py').stderr
    ran = fastkd_('run','mine.py','--seeds','1','--methods','none,soft','--set','epochs=1,n_train=60')
    assert ran.returncode == 0 and 'run 2 of 2: soft, seed 0: accuracy' in ran.stdout and '600 test rows' in ran.stdout, ran.stderr
    assert json.loads((tmp_path/'runs'/'mine'/'results.jsonl').read_text().splitlines()[0])['data'][:2] == ['mine',60]
    assert (tmp_path/'runs'/'mine'/'chart.png').exists()

@pytest.mark.parametrize('text,args,words', [(None, [], 'fastkd new mine.py'), ('def make_student(): pass', [], 'has no function `make_teacher'),
    ('epochs = 3\n'*2, ['--set','epoch=3'], "has no setting 'epoch'; it has epochs"), ('', ['--set','epochs'], 'Write settings as name=value'), ('', ['--bf16'], '`--bf16` is for recipes')])
def test_files_that_cannot_be_run_are_one_sentence(text, args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if text is not None: Path('mine.py').write_text(text)
    assert main(['run','mine.py',*args]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count('\n') == 1

@pytest.mark.parametrize('args,words', [(['new','x.txt'],'Name a Python file'), (['new','a-b.py'],'Name a Python file'), (['new','no/where.py'],'cannot be written'), (['new'],'file')])
def test_files_that_cannot_be_written_are_one_sentence(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    err = capsys.readouterr().err
    assert words in err and err.count('\n') == 1
