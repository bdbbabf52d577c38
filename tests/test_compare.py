"Runs of a comparison: what they train, what identifies them, and what is not run again"
import json, random, re, warnings
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import SchedLin
from fastai.optimizer import Adam
from fastkd.experiments import Fit, Method, Parts, Recipe, Results, caption, find_recipe, run_recipe
from fastkd.experiments.recipes import ArrayLoader, perceptron, pytorch_adam
from fastkd.experiments.training import new_learner, recipe_learner, run_fit, train
from fastkd.feature_losses import FeatureLoss
from fastkd.losses import KDLoss, Logits, SoftTarget

results = Path(__file__).parents[1]/'nbs'/'tutorials'/'results'
C = import_module('fastkd.experiments.compare')  # the module: `fastkd.experiments.compare` is the function

def blobs(folder=None):
    "Three overlapping clouds of points"
    g = torch.Generator().manual_seed(0)
    y = torch.arange(180) % 3
    x = torch.randn(180, 2, generator=g) + torch.tensor([[0.,0.],[2.,0.],[0.,2.]])[y]
    return Parts('blobs', (x[:60],y[:60]), (x[60:90],y[60:90]), (x[90:],y[90:]))

recipe = Recipe('blobs', 'three clouds of points', blobs, teacher=partial(perceptron, 2, 16, 3), teacher_fit=Fit(2, 0.02, bs=20),
    student=partial(perceptron, 2, 3, 3, dropout=0.1), student_fit=Fit(2, 0.02, bs=20), layers=(['2'],['2']))
def compare(*args, **kwargs): return run_recipe(*args, **kwargs).frame
run = partial(compare, recipe, device='cpu', show=False)

def comparable(runs): return runs[['method','seed','accuracy','log']].values.tolist()

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')
    return out, run(['none','soft','fitnet'], 3, out=out)

def test_one_row_for_each_run(finished):
    _,runs = finished
    assert runs[['method','seed']].values.tolist() == [[m,s] for m in ('none','soft','fitnet') for s in range(3)]

def test_same_seed_same_numbers(finished, tmp_path):
    "also in another order and without the other methods"
    _,runs = finished
    again = run(['fitnet','none'], [2,0], out=tmp_path)
    expected = {(m,s): rest for m,s,*rest in comparable(runs)}
    assert {(m,s): rest for m,s,*rest in comparable(again)} == {k: expected[k] for k in [(m,s) for m in ('fitnet','none') for s in (0,2)]}

def test_seeds_differ(finished):
    logs = [json.dumps(log) for log in finished[1].log]
    assert len(set(logs)) == len(logs)

def test_the_student_alone_is_that_of_plain_fastai(finished):
    "the student alone, trained without this package: the same weights, batches and steps"
    parts = blobs()
    torch.manual_seed(1)
    model = recipe.student()
    loader = ArrayLoader(*parts.train, bs=20, shuffle=True)
    loader.seed(1)
    learn = Learner(DataLoaders(loader, ArrayLoader(*parts.valid)), model, CrossEntropyLossFlat(), opt_func=partial(Adam, wd=0.01))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 0.02)
    with torch.no_grad(): expected = (model.eval()(parts.test[0]).argmax(1) == parts.test[1]).float().mean()
    row = finished[1].query("method == 'none' and seed == 1").iloc[0]
    assert row.accuracy == pytest.approx(expected.item())
    assert row.log['train_loss'] == pytest.approx([v[0] for v in learn.recorder.values], abs=1e-6)

def test_the_sources_optimizer_is_pytorchs():
    "a loop of plain PyTorch, step by step"
    parts,fit = blobs(),Fit(3, 0.02, **pytorch_adam, bs=20)
    learn = new_learner(partial(recipe_learner, partial(perceptron, 2, 8, 3), parts.dls(fit.bs), fit), 5)
    result = train(learn, partial(run_fit, fit), learn.dls[2])
    torch.manual_seed(5)
    model = perceptron(2, 8, 3)
    opt = torch.optim.Adam(model.parameters(), 0.02)
    loader = ArrayLoader(*parts.train, bs=20, shuffle=True)
    loader.seed(5)
    for _ in range(3):
        for x,y in loader:
            torch.nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
    for a,b in zip(learn.model.parameters(), model.parameters()): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    with torch.no_grad(): assert result['values']['accuracy'] == pytest.approx((model(parts.test[0]).argmax(1) == parts.test[1]).float().mean().item())

def test_the_teacher_is_trained_once_and_kept(finished):
    out,runs = finished
    assert len(list(out.glob('teacher-*.pth'))) == 1
    assert len({t['checksum'] for t in runs.teacher}) == 1

class Counting(torch.nn.Sequential):
    "A teacher that counts the rows that it is asked about when it is no longer trained"
    rows = 0
    def forward(self, x):
        if not self.training: Counting.rows += len(x)
        return super().forward(x)

def counting(): return Counting(*perceptron(2, 16, 3))

def rows_asked(recipe, loss, out):
    "Rows that the teacher is asked about in five epochs of 60 rows, and the run"
    compare(recipe, ['soft'], [9], epochs=1, device='cpu', out=out, show=False)  # trains the teacher
    Counting.rows = 0
    runs = compare(recipe, [loss], 1, epochs=5, device='cpu', out=out, show=False)
    return Counting.rows, runs

@pytest.mark.parametrize('loss,rows', [('soft',60), ('fitnet',20+300), ('soft+fitnet',20+300)])  # 20 to find the layouts
def test_a_teacher_that_is_always_asked_the_same_is_asked_once(loss, rows, tmp_path, monkeypatch):
    "and one whose activations are compared, in each epoch"
    monkeypatch.setattr(C.Experiment, 'check', lambda *args: None)  # which asks an untrained teacher
    asked,runs = rows_asked(replace(recipe, teacher=counting), loss, tmp_path/'fixed')
    assert asked == rows
    if loss != 'soft': return

    def cropped(xs, idxs, rng=None): return xs[idxs]  # data that may be others in each epoch
    asked,again = rows_asked(replace(recipe, teacher=counting, data=lambda folder: replace(blobs(), batch_of=cropped)), loss, tmp_path/'cropped')
    assert asked == 300
    for name,values in runs.log[0].items(): assert values == pytest.approx(again.log[0][name], abs=1e-5)

def test_the_students_augmentation_is_for_the_students(finished, tmp_path):
    "of the same teacher, with and without which they train on other batches"
    out,single = finished
    for f in out.glob('teacher-*'): (tmp_path/f.name).write_bytes(f.read_bytes())
    seen = []
    def mirrored(x):
        seen.append(len(x))
        return -x
    runs = compare(replace(recipe, student_augment=mirrored), ['none','soft'], 1, device='cpu', out=tmp_path, show=False)
    assert seen == [20]*2 + [20]*3*2*2 and len(list(tmp_path.glob('teacher-*'))) == 1
    assert set(runs.comparison).isdisjoint(single.comparison) and runs.teacher[0] == single.teacher[0]
    assert runs.log[0]['train_loss'] != single.log[0]['train_loss']
    assert ', augmented,' in caption(runs) and 'augmented' not in caption(pd.concat([single.drop(columns=['augmented','bf16']), single]))

def test_the_students_callbacks_are_for_the_students(finished, tmp_path):
    "MixUp, with and without a teacher, who sees the mixed inputs of each epoch"
    out,single = finished
    for f in out.glob('teacher-*'): (tmp_path/f.name).write_bytes(f.read_bytes())
    runs = compare(replace(recipe, student_cbs=(partial(MixUp, 1.),)), ['none','soft'], 1, device='cpu', out=tmp_path, show=False)
    assert set(runs.comparison).isdisjoint(single.comparison) and runs.teacher[0] == single.teacher[0] and ', MixUp,' in caption(runs)
    assert runs.log[0]['train_loss'] != single.log[0]['train_loss'] and runs.accuracy.between(0.3, 1).all()
    again = compare(replace(recipe, student_cbs=(partial(MixUp, 1.),)), ['soft'], 1, device='cpu', out=tmp_path/'again', show=False)
    assert again.log[0] == runs.log[1] and again.comparison[0] == runs.comparison[1]
    other = compare(replace(recipe, student_cbs=(partial(MixUp, 0.5),)), ['soft'], 1, device='cpu', out=tmp_path, show=False)
    assert other.comparison[0] != runs.comparison[1]

def test_bfloat16(finished, tmp_path):
    "is another comparison, which ends near the one in single precision, with the same weights at its start"
    dtypes = []
    def student():
        model = recipe.student()
        def note(m, args, o):
            if m.training: dtypes.append((m.weight.dtype, o.dtype))
        model[1].register_forward_hook(note)
        return model
    bf16 = compare(replace(recipe, student=student), ['none','soft','fitnet'], 3, device='cpu', out=tmp_path, bf16=True, show=False)
    single = finished[1]
    assert set(dtypes) == {(torch.float32, torch.bfloat16)}
    assert set(bf16.comparison).isdisjoint(single.comparison)
    for a,b in zip(bf16.log, single.log):
        assert a['train_loss'] != b['train_loss']
        assert a['train_loss'] == pytest.approx(b['train_loss'], rel=0.03)
    assert 'bfloat16' in caption(bf16) and 'bfloat16' not in caption(pd.concat([single.drop(columns='bf16'), single]))  # and one of an earlier version

@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize('loss', ['none','soft'])
def test_an_error_in_bfloat16_leaves_no_autocast_behind(error, loss, tmp_path):
    "The next run is as if there had been none: autocast would keep its copies of the first step's weights for it"
    broken = []
    def student():
        model,calls = recipe.student(),[]
        def fail(module, args, output):
            if not (torch.is_autocast_enabled('cpu') and module.training): return
            calls.append(1)
            if len(calls) == 2: raise error('on the way')  # the first batch has been tried before
        broken.append(model[0].register_forward_hook(fail))
        return model
    with pytest.raises(error, match='on the way'): compare(replace(recipe, student=student), [loss], 1, device='cpu', bf16=True, out=tmp_path/'failed', show=False)
    assert len(broken) and not torch.is_autocast_enabled('cpu')
    first = run([loss], 1, bf16=True, out=tmp_path/'after')
    second = run([loss], 1, bf16=True, out=tmp_path/'again')
    assert first.log.tolist() == second.log.tolist() and first.log[0]['train_loss'][1] < first.log[0]['train_loss'][0]

def test_a_loss_that_cannot_work_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(C, 'train', lambda *a, **k: pytest.fail('there was a training'))
    def two(folder=None):
        parts = blobs()
        return replace(parts, **{k: (x, y.clamp(max=1)) for k in ('train','valid','test') for x,y in [getattr(parts, k)]})
    binary = replace(recipe, data=two, teacher=partial(perceptron, 2, 16, 2), student=partial(perceptron, 2, 3, 2))
    state = torch.get_rng_state()
    for loss in 'dkd','standardised','dist','soft+dist':
        with pytest.raises(ValueError, match=rf'{re.escape(loss)}: .*SoftTarget'): compare(binary, ['none','soft',loss], 1, device='cpu', out=tmp_path, show=False)
    assert torch.equal(torch.get_rng_state(), state) and not list(tmp_path.iterdir())

class Many(torch.nn.Module):
    "A loss that holds anything, and counts its calls"
    def __init__(self, held=None): super().__init__(); self.held,self.calls = held,0
    def forward(self, pred, teacher_pred):
        self.calls += 1
        return ((pred-teacher_pred)**2 * torch.as_tensor(np.asarray(self.held, dtype=float))).float().mean()

def raising(pred, teacher_pred): return [][0]

@pytest.mark.parametrize('methods,words', [(['attention'],'attention: Attention compares the places'),
    (["fitnet(layers=[('0','nope')])"],"no layer 'nope'|'nope'"),
    (["soft+fitnet(layers={'nope':'0'})"],"'nope'"), ({'mine': FeatureLoss},'mine: FeatureLoss is a base class'),
    ({'mine': KDLoss},'mine: KDLoss is a base class'), ({'mine': lambda pred, teacher_pred: pred},'not one number'),
    ({'mine': raising},'mine: IndexError: list index out of range'),
    ({'mine': Method('mine', SoftTarget, 1., schedule=SchedLin(1, -1))},'negative'),
    ({'mine': Method('mine', SoftTarget, schedule=lambda p: 'x')},'mine: '),
    ({'mine': Many(np.ones(4))},'mine: .*RuntimeError')], ids=str)
def test_a_method_that_does_not_suit_the_models_is_refused_before_anything_is_trained(methods, words, tmp_path, monkeypatch):
    monkeypatch.setattr(C, 'train', lambda *a, **k: pytest.fail('a student was trained'))
    monkeypatch.setattr(C, 'trained_teacher', lambda *a, **k: pytest.fail('a teacher was trained'))
    state = torch.get_rng_state(),random.getstate(),np.random.get_state()[1].tolist()
    with warnings.catch_warnings(), pytest.raises(ValueError, match=words) as e:
        warnings.simplefilter('error')  # the warnings of a fit are for the fit itself
        run([{'fine': Many(1.)}, methods] if isinstance(methods, dict) else ['none',*methods], 3, out=tmp_path)
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir())
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1] and np.random.get_state()[1].tolist() == state[2]

def test_each_method_is_tried_once_and_its_loss_stays_as_it_was(tmp_path, monkeypatch):
    tried,loss = [],Many(1.)
    original = C.try_batch
    monkeypatch.setattr(C, 'try_batch', lambda *a, **k: (tried.append(1), original(*a, **k)))
    runs = run(['none', {'mine': loss}], 3, out=tmp_path)
    assert len(tried) == 2 and len(runs) == 6 and loss.calls == 0
    run(['none', {'mine': loss}], 3, out=tmp_path)
    assert len(tried) == 2  # nothing is left to run

def test_a_run_does_not_depend_on_the_runs_before_it(tmp_path):
    "also with a loss that keeps a state"
    class Growing(torch.nn.Module):
        def __init__(self): super().__init__(); self.n = 0
        def forward(self, pred, teacher_pred): self.n += 1; return self.n*(pred-teacher_pred).square().mean()
    both,second = run({'mine': Growing()}, 2, out=tmp_path/'both'),run({'mine': Growing()}, [1], out=tmp_path/'second')
    assert both.log[1] == second.log[0]

@pytest.mark.parametrize('out', ['file','file/deeper','/proc/nope','/dev/full'])
def test_a_folder_that_cannot_be_written_is_found_before_anything_is_trained(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(C, 'trained_teacher', lambda *a, **k: pytest.fail('a teacher was trained'))
    Path('file').write_text('')
    with pytest.raises(ValueError, match='cannot be written'): run(['none'], 1, out=out)

def test_nothing_is_run_again(finished, monkeypatch):
    out,runs = finished
    before = (out/'results.jsonl').read_bytes()
    monkeypatch.setattr(C, 'train', lambda *a, **k: pytest.fail('a finished run was run again'))
    again = run(['none','soft','fitnet'], 3, out=out)
    assert again.when.tolist() == runs.when.tolist() and (out/'results.jsonl').read_bytes() == before

def test_other_settings_are_run(tmp_path):
    "a run is known by its comparison, the text of its method, and its seed"
    first,ran = run(['soft'], 1, out=tmp_path),[]
    changes = [dict(methods=[m]) for m in ('soft(T=2)','soft(weight=0.4)','SoftTarget')]
    changes += dict(epochs=1),dict(seeds=[7]),dict(teacher_epochs=1),dict(bf16=True)
    for change in changes: ran += run(**{'methods': ['soft'], 'seeds': 1, **change}, out=tmp_path).when.index.tolist()
    runs = Results(tmp_path/'results.jsonl').read()
    assert len(ran) == len(changes) and len(runs) == len(changes)+1
    assert len({(r.comparison,r.method,r.seed) for r in runs}) == len(runs) and len({r.comparison for r in runs}) == 4

def test_finished_runs_of_version_01_are_found(tmp_path, monkeypatch):
    "the committed results on digits, with nothing but their text"
    source = results/'digits.jsonl'
    (tmp_path/'results.jsonl').write_bytes(source.read_bytes())
    monkeypatch.setattr(C, 'train', lambda *a, **k: pytest.fail('a finished run was run again'))
    methods = list(dict.fromkeys(json.loads(line)['method'] for line in source.read_text().splitlines()))
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # and their settings are those of today
        runs = compare('digits', methods, 5, device='cpu', out=tmp_path, show=False)
    assert len(methods) == 16 and len(runs) == 80 and [f.name for f in tmp_path.iterdir()] == ['results.jsonl']
    assert (tmp_path/'results.jsonl').read_bytes() == source.read_bytes()

@pytest.mark.parametrize('name', ['cifar10','cifar10-longer','digits','mnist','pets-layers','pets-longer'])
def test_comparisons_of_version_01_are_known(name):
    "every recipe, augmentation and callback of the committed results, computed without their data"
    runs = Results(results/f'{name}.jsonl').read()
    for r in {r.comparison: r for r in runs}.values():
        changed,more = find_recipe(r.more['recipe']),r.more
        changed = replace(changed, layers=more['layers'], student_augment=changed.augment if more.get('augmented') else None,
            student_fit=replace(changed.student_fit, epochs=r.settings['fit']['epochs']), teacher_fit=replace(changed.teacher_fit, epochs=r.teacher_fit['epochs']),
            student_cbs=(partial(MixUp, 1.),) if isinstance(more.get('callbacks'), list) and more['callbacks'] else ())
        e = C.RecipeExperiment(changed, blobs(), torch.device('cpu'), Results('none'), bf16=more['bf16'])
        e.common = dict(e.common, data=r.data)
        assert e.comparison == r.comparison

def test_a_named_object_is_found_by_its_name(tmp_path):
    first = run(['none', {'mine': [SoftTarget(3), Logits()]}], 1, out=tmp_path)
    again = run({'mine': [SoftTarget(3), Logits()]}, 1, out=tmp_path)
    assert again.when[0] == first.when[1] and first.settings[1]['method']['loss'] == ['SoftTarget(T=3)', 'Logits()']
    assert run([Method('mine', [SoftTarget(3), Logits()])], 1, out=tmp_path).when[0] == first.when[1]

def test_two_names_make_two_methods(tmp_path):
    runs = run([{'light': Many(np.ones(3)), 'heavy': Many(np.ones(3)*100)}], 1, out=tmp_path)
    assert runs.log[0] != runs.log[1]
    with pytest.warns(UserWarning, match="'light' had other settings"): run({'light': Many(np.ones(3)*100)}, 1, out=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert run({'light': Many(np.ones(3))}, 1, out=tmp_path).when[0] == runs.when[0]

def recursive():
    def f(n): return f(n-1) if n else 0
    return f

def itself(loss):
    loss.__dict__['me'] = loss
    return loss

def holding(loss, o):
    loss.o = o
    return loss

@pytest.mark.parametrize('o', [Path('a'), pd.Series([1]), pd.DataFrame({'a': [1]}), b'a', range(3), recursive(), itself(Many(1.))],
    ids=lambda o: type(o).__name__)
def test_a_loss_may_hold_anything(o, tmp_path):
    runs = run({'mine': holding(Many(1.), o), 'other': itself(Many(2.))}, 1, out=tmp_path)
    assert runs.accuracy.notna().all() and Results(tmp_path/'results.jsonl').read()[0].method == 'mine'

@pytest.mark.parametrize('changed', [SoftTarget(4), [SoftTarget(3), Logits()], Method('mine', SoftTarget(3), 0.7)])
def test_an_object_that_has_changed_under_its_name_is_told(changed, tmp_path):
    first = run({'mine': SoftTarget(3)}, 1, out=tmp_path)
    with pytest.warns(UserWarning, match="'mine' had other settings in finished runs.*another name"): again = run({'mine': changed}, 1, out=tmp_path)
    assert again.when[0] == first.when[0]

def test_versions_do_not_make_another_run(tmp_path, monkeypatch):
    first = run(['none'], 1, out=tmp_path)
    monkeypatch.setattr(C, 'provenance', lambda: pytest.fail('a finished run was run again'))
    file = tmp_path/'results.jsonl'
    file.write_text(file.read_text().replace('"torch": "', '"torch": "1.'))
    assert run(['none'], 1, out=tmp_path).when[0] == first.when[0]

def test_augmentation_without_a_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match='define a function'): compare(replace(recipe, augment=lambda x: x), ['none'], 1, device='cpu', out=tmp_path, show=False)
    assert not list(tmp_path.iterdir())

def test_a_line_cut_short_is_run_again_and_the_rest_kept(finished, tmp_path):
    out,runs = finished
    for f in out.glob('teacher-*'): (tmp_path/f.name).write_bytes(f.read_bytes())
    lines = (out/'results.jsonl').read_bytes().splitlines(keepends=True)
    (tmp_path/'results.jsonl').write_bytes(b''.join(lines[:4]) + lines[4][:40])
    again = run(['none','soft','fitnet'], 3, out=tmp_path)
    after = (tmp_path/'results.jsonl').read_bytes().splitlines(keepends=True)
    assert after[:4] == lines[:4] and len(after) == 9 and comparable(again) == comparable(runs)
    for line in after: json.loads(line)

def test_a_damaged_teacher_is_refused(finished, tmp_path):
    out,_ = finished
    file = next(out.glob('teacher-*'))
    kept = torch.load(file, weights_only=True)
    next(iter(kept['state'].values()))[0] += 1
    torch.save(kept, tmp_path/file.name)
    with pytest.raises(ValueError, match='damaged'): run(['soft'], 1, out=tmp_path)
    (tmp_path/file.name).write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match='delete that file'): run(['soft'], 1, out=tmp_path)

def test_a_result_carries_what_reproduces_it(finished):
    r = finished[1].iloc[5]
    assert r.versions.keys() >= {'python','torch','fastai','fastkd'} and r.device == 'cpu' and r.seed == 2 and r.method == 'soft'
    assert r.settings['method']['weight'] == [0.5] and r.settings['fit']['epochs'] == 2 and len(r.seconds) == 2
    assert r.log.keys() == {'train_loss','valid_loss','accuracy','kd_loss'}
    assert all(np.isfinite(r.log['kd_loss']))
    assert not [line for line in finished[0].joinpath('results.jsonl').read_text().splitlines() if 'NaN' in line or str(finished[0]) in line]

def test_statistics_are_made_where_they_are_missing(tmp_path):
    first = run(['none'], 1, out=tmp_path)
    second = run(['none'], 1, out=tmp_path, statistics=True)
    assert 'statistics' not in first and second.statistics[0] and second.log[0] == first.log[0]
    third = run(['none'], 1, out=tmp_path)
    assert third.when[0] == second.when[0] and len(Results(tmp_path/'results.jsonl').read()) == 1

def test_runs_of_a_teacher_that_is_gone_are_no_part_of_a_comparison(tmp_path):
    run(['none'], 1, out=tmp_path)
    line = json.loads((tmp_path/'results.jsonl').read_text())
    line['teacher']['checksum'] = 'other'
    (tmp_path/'results.jsonl').write_text(json.dumps(line)+'\n')
    for methods in ['none','soft'],['soft']:
        with pytest.raises(ValueError, match='another teacher'): run(methods, 1, out=tmp_path)

def test_callbacks_of_the_student_that_cannot_work(tmp_path):
    for cbs,methods,words in ((MixUp(),),['none'],'make callbacks'),((MixUp,),['none','dkd'],'dkd: The loss DecoupledKD needs one class label'):
        with pytest.raises(ValueError, match=words): compare(replace(recipe, student_cbs=cbs), methods, 1, device='cpu', out=tmp_path, show=False)
    assert not list(tmp_path.iterdir())

def test_a_term_that_warms_up_has_a_mean(tmp_path):
    r = run(['dkd'], 1, out=tmp_path).iloc[0]
    assert all(v > 0 for v in r.log['kd_loss'])

def test_a_method_that_does_not_fit_says_so_in_one_sentence(tmp_path):
    def student():
        model,calls = recipe.student(),[]
        model[0].register_forward_hook(lambda *args: calls.append(1))
        model[1].register_forward_hook(lambda m, args, out: out*float('nan') if len(calls) > 4 else None)
        return model
    def afterwards(pred, teacher_pred):
        if pred.isnan().any(): raise ValueError('a broken student')
        return (pred-teacher_pred).square().mean()
    broken = replace(recipe, student=student)
    with pytest.raises(ValueError, match='^mine: a broken student$'): compare(broken, ['none', {'mine': afterwards}], 1, device='cpu', out=tmp_path, show=False)
    assert [r.method for r in Results(tmp_path/'results.jsonl').read()] == ['none']   # what was finished is kept

def test_a_run_prints_nothing(tmp_path, capsys):
    run(['none','soft','fitnet'], 1, out=tmp_path)
    assert capsys.readouterr().out == ''

def test_epochs_of_a_method(tmp_path):
    runs = run(['none','soft(epochs=1)'], 1, out=tmp_path)
    assert [len(s) for s in runs.seconds] == [2,1]

@pytest.mark.parametrize('kwargs,words', [(dict(methods=['none','none']),'once'), (dict(methods=[]),'one method or more'),
    (dict(seeds=0),'1 or more'), (dict(seeds=[1,1]),'once'), (dict(seeds=10**23),'10,000'), (dict(seeds=[-1]),'once'), (dict(seeds='12'),'seeds'),
    (dict(seeds=1.5),'seeds'),
    (dict(epochs=1.5),'1 or more'), (dict(teacher_epochs='3'),'1 or more'), (dict(device='meta'),"'meta' is not available"),
    (dict(device=[]),'no device'), (dict(seeds=[]),'each once'),
    (dict(epochs=0),'1 or more'), (dict(device='gpu'),'no device'), (dict(methods=[3]),'a name'), (dict(methods=[SoftTarget()]),"'mine': loss"),
    (dict(methods='sofd'),'did you mean soft')])
def test_refusals(kwargs, words, tmp_path):
    with pytest.raises(ValueError, match=words) as e: run(**{'methods': ['none'], 'out': tmp_path, **kwargs})
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir())
