"Runs, results and statistics of a comparison"
import json, re
from dataclasses import replace
from functools import partial
from itertools import product
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import SchedCos, combine_scheds
from fastai.optimizer import Adam
from fastkd.callback import KnowledgeDistillationCallback
from fastkd.compare import (Method, Results, caption, chart, compare, curves, describe, holm, loss_class, markdown, method, methods, overtakes, paired, table, train)
from fastkd.losses import Attention, Logits, SoftTarget
from fastkd.recipes import ArrayLoader, Fit, Parts, Recipe, perceptron, pytorch_adam

def blobs(folder=None):
    "Three overlapping clouds of points"
    g = torch.Generator().manual_seed(0)
    y = torch.arange(180) % 3
    x = torch.randn(180, 2, generator=g) + torch.tensor([[0.,0.],[2.,0.],[0.,2.]])[y]
    return Parts('blobs', (x[:60],y[:60]), (x[60:90],y[60:90]), (x[90:],y[90:]))

recipe = Recipe('blobs', 'three clouds of points', blobs, teacher=partial(perceptron, 2, 16, 3), teacher_fit=Fit(2, 0.02, bs=20),
    student=partial(perceptron, 2, 3, 3, dropout=0.1), student_fit=Fit(2, 0.02, bs=20), layers=(['2'],['2']))
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
    learn,result = train(partial(perceptron, 2, 8, 3), parts.dls(fit.bs), fit, 5)
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
    with torch.no_grad(): assert result['accuracy'] == pytest.approx((model(parts.test[0]).argmax(1) == parts.test[1]).float().mean().item())

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

@pytest.mark.parametrize('loss,rows', [('soft',60), ('fitnet',300), ('soft+fitnet',300)])
def test_a_teacher_that_is_always_asked_the_same_is_asked_once(loss, rows, tmp_path):
    "and one whose activations are compared, in each epoch"
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
    assert seen == [20]*3*2*2 and len(list(tmp_path.glob('teacher-*'))) == 1
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
    assert again.log[0] == runs.log[1] and again.key[0] == runs.key[1]
    other = compare(replace(recipe, student_cbs=(partial(MixUp, 0.5),)), ['soft'], 1, device='cpu', out=tmp_path, show=False)
    assert other.key[0] != runs.key[1]

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
    assert set(bf16.key).isdisjoint(single.key) and set(bf16.comparison).isdisjoint(single.comparison)
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
        model = recipe.student()
        def fail(module, args, output):
            if torch.is_autocast_enabled('cpu') and module.training: raise error('on the way')
        broken.append(model[0].register_forward_hook(fail))
        return model
    with pytest.raises(error, match='on the way'): compare(replace(recipe, student=student), [loss], 1, device='cpu', bf16=True, out=tmp_path/'failed', show=False)
    assert len(broken) and not torch.is_autocast_enabled('cpu')
    first = run([loss], 1, bf16=True, out=tmp_path/'after')
    second = run([loss], 1, bf16=True, out=tmp_path/'again')
    assert first.log.tolist() == second.log.tolist() and first.log[0]['train_loss'][1] < first.log[0]['train_loss'][0]

def test_a_loss_that_cannot_work_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr('fastkd.compare.train', lambda *a, **k: pytest.fail('there was a training'))
    def two(folder=None):
        parts = blobs()
        return replace(parts, **{k: (x, y.clamp(max=1)) for k in ('train','valid','test') for x,y in [getattr(parts, k)]})
    binary = replace(recipe, data=two, teacher=partial(perceptron, 2, 16, 2), student=partial(perceptron, 2, 3, 2))
    state = torch.get_rng_state()
    for loss in 'dkd','standardised','dist','soft+dist':
        with pytest.raises(ValueError, match=rf'{re.escape(loss)}: .*SoftTarget'): compare(binary, ['none','soft',loss], 1, device='cpu', out=tmp_path, show=False)
    assert torch.equal(torch.get_rng_state(), state)

def test_what_a_function_is_includes_its_defaults():
    def of(a):
        def turned(x, angle=a, *, more=a): return x*angle
        return turned
    assert describe(of(1)) == describe(of(1)) != describe(of(2))

def test_nothing_is_run_again(finished, monkeypatch):
    out,runs = finished
    before = (out/'results.jsonl').read_bytes()
    monkeypatch.setattr('fastkd.compare.train', lambda *a, **k: pytest.fail('a finished run was run again'))
    again = run(['none','soft','fitnet'], 3, out=out)
    assert again.when.tolist() == runs.when.tolist() and (out/'results.jsonl').read_bytes() == before

def test_other_settings_are_run(finished, tmp_path):
    ran = []
    first = run(['soft'], 1, out=tmp_path)
    for change in dict(methods=['soft(T=2)']), dict(methods=['soft(weight=0.4)']), dict(methods=['soft'], epochs=1), dict(methods=['soft'], seeds=[7]), dict(methods=['soft'], teacher_epochs=1):
        runs = run(**{'seeds': 1, **change}, out=tmp_path)
        ran += runs.key.tolist()
    assert len({*first.key, *ran}) == 6 and len(Results(tmp_path/'results.jsonl').read()) == 6

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
    assert r.log.keys() == {'train_loss','valid_loss','accuracy','label_loss','kd_loss'}
    assert all(np.isfinite(r.log['label_loss'] + r.log['kd_loss']))
    assert not [line for line in finished[0].joinpath('results.jsonl').read_text().splitlines() if 'NaN' in line or str(finished[0]) in line]

def test_methods_as_objects(tmp_path):
    runs = run([Method('mine', [SoftTarget(3), Logits()], [0.2,0.1], schedule=SchedCos(0, 1)), Logits, 'none'], 1, out=tmp_path)
    assert runs.method.tolist() == ['mine','Logits','none']
    again = run([Method('mine', [SoftTarget(3), Logits()], [0.2,0.1], schedule=SchedCos(0, 1)), Method('none')], 1, out=tmp_path)
    assert again.when.tolist() == runs.when[[0,2]].tolist()

def test_a_name_is_not_what_a_method_is_known_by(tmp_path):
    a,b = [run([Method('mine', SoftTarget(T))], 1, out=tmp_path) for T in (3,4)]
    assert a.key[0] != b.key[0]
    with pytest.raises(ValueError, match='name of its own'): table(pd.concat([a,b]))

def test_two_names_of_one_method_are_refused(tmp_path):
    with pytest.raises(ValueError, match='one method'): run(['none','soft','soft(weight=0.5)'], 1, out=tmp_path)
    assert not list(tmp_path.iterdir())

def test_a_run_bears_the_name_that_was_asked_for(finished):
    "whichever it was made under"
    out,runs = finished
    assert run(['soft(weight=0.5)'], [1], out=out)[['method','when']].values.tolist() == [['soft(weight=0.5)', runs.query("method == 'soft' and seed == 1").when.iloc[0]]]

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
        with pytest.raises(ValueError, match='another teacher'): run(['none','soft'], 1, out=tmp_path)
    with pytest.raises(ValueError, match='makers'): compare(replace(recipe, student_cbs=(MixUp(),)), ['none'], 1, device='cpu', out=tmp_path/'other', show=False)
    with pytest.raises(ValueError, match='one class label'): compare(replace(recipe, student_cbs=(MixUp,)), ['none','dkd'], 1, device='cpu', out=tmp_path/'other', show=False)
    assert not (tmp_path/'other').exists()

def test_the_weights_of_a_method_are_those_after_its_warm_up():
    "so that in a join they are not 0; a warm-up in epochs cannot be joined"
    assert method('dkd').weights() == (1.,[1.]) and method('dkd+review').weights() == (1.,[1.,1.])
    counted = method('DecoupledKD(weight=paper)')
    assert counted.weights() == (1.,[1.]) and counted.settings() != method('DecoupledKD(weight=1,label_weight=1)').settings()
    with pytest.raises(ValueError, match='20 epochs'): counted + method('nkd')

def test_a_term_that_warms_up_has_a_mean(tmp_path):
    r = run(['dkd'], 1, out=tmp_path).iloc[0]
    assert all(v > 0 for v in r.log['kd_loss'])

def test_a_method_that_does_not_fit_says_so_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match='^attention: Attention compares places') as e: run(['none','attention'], 1, out=tmp_path)
    assert '\n' not in str(e.value)
    assert [r['method'] for r in Results(tmp_path/'results.jsonl').read()] == ['none']   # what was finished is kept

def test_epochs_of_a_method(tmp_path):
    runs = run(['none','soft(epochs=1)'], 1, out=tmp_path)
    assert [len(s) for s in runs.seconds] == [2,1]

@pytest.mark.parametrize('kwargs,words', [(dict(methods=['none','none']),'once'), (dict(methods=[]),'one method or more'), (dict(seeds=0),'one seed or more'), (dict(seeds=[1,1]),'once'),
    (dict(epochs=0),'1 or more'), (dict(device='gpu'),'no device'), (dict(methods=[3]),'a name'), (dict(methods='sofd'),'did you mean soft')])
def test_refusals(kwargs, words, tmp_path):
    with pytest.raises(ValueError, match=words) as e: run(**{'methods': ['none'], 'out': tmp_path, **kwargs})
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir())

# methods as text

def test_text_and_object_are_one():
    m = method('attention-paper+soft(T=3,weight=0.2)')
    cb = m.callback(torch.nn.Identity(), (['a'],['b']))
    assert [type(t.loss) for t in cb.terms] == [Attention,SoftTarget] and m.weights() == (0.8,[1000.,0.2]) and cb.terms[1].loss.T == 3
    plain = KnowledgeDistillationCallback(torch.nn.Identity(), SoftTarget(T=7), weight=0.7)
    cb = method('soft(T=7, weight=0.7)').callback(torch.nn.Identity())
    assert cb.weights.at(0.5) == plain.weights.at(0.5) and cb.terms[0].loss.T == 7

def test_a_schedule_by_name():
    cb = method('soft(schedule=cos)').callback(torch.nn.Identity())
    assert [cb.weights.at(p)[1][0] for p in (0,0.5,1)] == pytest.approx([0,0.25,0.5])
    hint = method('fitnet(schedule=hint)').callback(torch.nn.Identity()).weights
    assert [hint.at(p) for p in (0,0.25,0.5,0.75,1)] == [(1,[100]),(1,[50]),(1,[0]),(1,[0]),(1,[0])]
    warmup = method('dkd').schedule
    assert [warmup(p) for p in (0,1/24,1/12,1)] == pytest.approx([0,0.5,1,1], abs=1e-6)

@pytest.mark.parametrize('text', ['', 'soft(', 'soft(T=)', 'soft(T=os.getcwd())', 'soft(**{})', 'soft(T=4)(T=5)', 'none(T=3)', 'soft+', 'soft(schedule=up)', 'soft(weight=-1)', 'soft(T=x)', 'os', 'nn'])
def test_no_method(text):
    with pytest.raises(ValueError) as e: method(text)
    assert '\n' not in str(e.value)

def test_every_named_method_can_be_made():
    for name,(cls,_,_) in methods.items():
        assert loss_class(cls), name
        assert method(name).settings()['weight']

def test_descriptions():
    f = lambda k: (lambda pred, teacher_pred: k*pred.mean())
    assert describe(f(1)) != describe(f(2)) and describe(f(1)) == describe(f(1))
    scheds = [combine_scheds([0.5,0.5], [SchedCos(0, 1), SchedCos(1, a)]) for a in (0,0.5,0)]
    assert describe(scheds[0]) == describe(scheds[2]) != describe(scheds[1])
    json.dumps(describe([f(1), scheds[0], SoftTarget(), method('fitnet').loss]))
    assert '0x' not in json.dumps(describe([f(1), partial(f, 2), scheds[0], method('vid').loss]))

def test_descriptions_see_what_is_inside():
    "layers of a loss, the code of its class, and sets in whichever order they come"
    class Net(torch.nn.Module):
        def __init__(self, n):
            super().__init__()
            self.layer = torch.nn.Linear(2, n)
        def forward(self, pred, teacher_pred): return self.layer(pred).mean()
    first = describe(Net(2))
    assert first == describe(Net(2)) != describe(Net(3)) and json.dumps(first)
    class Net(Net):
        def forward(self, pred, teacher_pred): return 2*self.layer(pred).mean()
    assert describe(Net(2)) != first
    class A:
        margin = 1.
        def f(self, p): return p
        @staticmethod
        def g(x): return x
        @property
        def h(self): return 1
    class Slots:
        __slots__ = 'x',
        def __init__(self, x): self.x = x
    one = describe([A(), A, partial(A, 1), A().f, Slots(1)])
    assert one == describe([A(), A, partial(A, 1), A().f, Slots(1)]) and json.dumps(one) and '0x' not in json.dumps(one)
    def changed(**attributes): return type('A', (), {**{k: v for k,v in vars(A).items() if k in ('margin','f','g','h')}, '__module__': A.__module__, '__qualname__': A.__qualname__, **attributes})
    assert describe(changed()()) == describe(A())
    for attributes in dict(margin=2.),dict(f=lambda self, p: -p),dict(g=staticmethod(lambda x: -x)),dict(h=property(lambda self: 2)):
        B = changed(**attributes)
        assert describe(B()) != describe(A()) and describe(B) != describe(A) and describe(partial(B, 1)) != describe(partial(A, 1))
    assert describe(Slots(1)) != describe(Slots(2)) and describe(A().f) != describe(changed(margin=2.)().f)
    json.dumps(describe([torch.nn.LazyLinear(2), torch.nn.LazyBatchNorm1d(), MixUp, partial(MixUp, 1.), MixUp(0.5)]))
    assert describe({'b','a','c'}) == describe({'c','b','a'}) == ['a','b','c']
    assert describe(lambda x: x in {1,2}) != describe(lambda x: x in {1,3})

def test_small_numbers_are_kept():
    from fastkd.compare import _number
    assert _number(4.21234567e-7) == 4.212346e-7 and _number(float('nan')) is None

# statistics

def made(**accuracies):
    "Runs with given accuracies in %"
    return pd.DataFrame([dict(key=f'{m}{s}', comparison='c', method=m, seed=s, accuracy=a/100, parameters=7, settings=m, seconds=[1.,1.,2.] if m == 'none' else [7.,1.,1.],
        log=dict(accuracy=[0.1,0.2,a/100]), teacher=dict(accuracy=0.9, parameters=70, checksum='t')) for m,accs in accuracies.items() for s,a in enumerate(accs)])

def test_table_worked_by_hand():
    t = table(made(none=[50.,60.,70.], a=[51.,62.,73.], b=[50.,60.]))
    assert t.loc['none',['accuracy','sd','n']].tolist() == pytest.approx([60,10,3])
    a = t.loc['a']
    # differences 1, 2, 3: mean 2, sd 1, t = 2·√3, t(2 degrees, 97.5 %) = 4.30265
    assert [a.difference, a.low, a.high, a.n, a.pairs] == pytest.approx([2, 2-4.30265/3**0.5, 2+4.30265/3**0.5, 3, 3], abs=1e-4)
    t2 = 2*3**0.5  # the t distribution with two degrees of freedom has a closed form
    assert a.p == pytest.approx(1 - t2/(2+t2**2)**0.5)
    assert a.time == pytest.approx(9/4) and a.closed == pytest.approx(100*2/30)
    b = t.loc['b']
    assert b[['n','pairs','difference']].tolist() == [2,2,0] and t.p_holm['a'] == a.p
    assert t.loc['teacher','accuracy'] == 90

def test_only_common_seeds_are_paired():
    runs = made(none=[50.,60.,70.], a=[51.,62.,73.])
    t = table(runs[~((runs.method == 'none') & (runs.seed == 0))])
    assert t.loc['a',['n','pairs','difference']].tolist() == pytest.approx([3,2,2.5])
    assert '(2 pairs)' in markdown(t)

def test_one_seed_has_no_interval():
    t = table(made(none=[50.], a=[51.]))
    assert t.difference['a'] == pytest.approx(1) and t[['low','high','p','p_holm']].loc['a'].isna().all()
    assert markdown(t).count('\n') == 4

@pytest.mark.parametrize('gain', [0.,0.3])
def test_equal_differences_are_no_certainty(gain):
    "also where they are equal but for rounding, as accuracies in single precision are"
    a,b = np.float32([0.5,0.75]),np.float32([0.5+gain/100,0.75+gain/100])
    d,*rest = paired(100*(b.astype(float)-a.astype(float)))
    assert d == pytest.approx(gain, abs=1e-4) and np.isnan(rest).all()

def test_there_is_no_way_to_a_teacher_that_is_worse():
    assert np.isnan(table(made(none=[90.,95.], a=[91.,97.])).closed['a'])

def test_a_table_says_what_it_compares_with():
    runs = made(none=[50.,60.], a=[51.,62.])
    assert 'difference to the student alone' in markdown(table(runs)) and 'difference to a ' in markdown(table(runs, 'a'))

def test_several_teachers_make_no_table():
    runs = made(none=[50.], a=[51.])
    runs['teacher'] = [dict(accuracy=0.9, parameters=70, checksum=c) for c in 'tu']
    with pytest.raises(ValueError, match='different teachers'): table(runs)

def test_without_the_baseline_nothing_is_compared():
    assert table(made(a=[50.,51.])).difference.isna().all()

def test_several_comparisons_make_no_table():
    runs = made(none=[50.], a=[51.])
    runs['comparison'] = ['c','d']
    with pytest.raises(ValueError, match='several comparisons'): table(runs)

def test_holm():
    # Holm's own steps: 0.01·4; max(0.04, 0.013·3); max(., 0.03·2); max(., 0.04·1)
    assert holm([0.04,0.01,np.nan,0.03,0.013]) == pytest.approx([0.06,0.04,np.nan,0.06,0.04], nan_ok=True)
    assert holm([0.5,0.4]).tolist() == [0.8,0.8] and holm([]).tolist() == [] and holm([0.9,0.8]).max() == 1

def test_interval_covers_as_often_as_it_says():
    g = np.random.default_rng(0)
    inside = [low < 0.3 < high for _,low,high,_ in (paired(d) for d in g.normal(0.3, 1, (1000,5)))]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.02)

def test_markdown_is_a_table():
    lines = markdown(table(made(none=[50.,60.], a=[51.,62.]))).splitlines()
    assert len(lines) == 5 and len({line.count('|') for line in lines}) == 1
    assert '+1.50' in lines[4] and '56.50 ± 7.78' in lines[4] and 'student alone' in lines[3]

def test_overtaking():
    runs = made(none=[50.], a=[60.,40.])
    o = overtakes(runs).loc['a']
    assert o.tolist() == [3,9/4,1,2]
    early = overtakes(made(a=[60.,40.], none=[50.,70.]))  # their mean, 60, the better one has passed after 3 epochs
    assert list(early.index) == ['none','a'] and early.loc['none'].tolist() == [3,1,1,2]
    with pytest.raises(ValueError, match='no runs'): overtakes(runs, 'b')

def test_charts(finished, tmp_path, monkeypatch):
    from matplotlib import pyplot as plt
    for draw,notebook in product((chart,curves), (False,True)):
        monkeypatch.setattr('fastkd.compare.IN_NOTEBOOK', notebook)
        before = plt.get_fignums()
        draw(finished[1], path=tmp_path/'c.png')
        assert plt.get_fignums() == before  # a notebook shows it once, and a loop fills no memory
        assert (tmp_path/'c.png').read_bytes()[:4] == b'\x89PNG'
    a,b = chart(made(none=[50.,60.], a=[51.,62.])).axes
    assert [t.get_text() for t in a.get_yticklabels()] == ['student alone','a']
    assert sorted(a.lines[0].get_xdata()) == [50,60]
    many = made(**{f'method{i}': [50.] for i in range(23)})
    for ax in curves(many).axes: assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 23
