"Tables: a teacher that was trained on other columns, categories and statistics sees each row as its own loaders would show it"
import warnings
import numpy as np, pandas as pd, pytest, torch
from fastai.tabular.all import (CategoryBlock, Categorify, FillMissing, Normalize, RegressionBlock, TabularDataLoaders, TabularPandas, Learner, accuracy, load_learner, mae, set_seed,
                                tabular_learner)
from fastkd.all import *
from fastkd.tables import column_map, columns_of

procs = [Categorify,FillMissing,Normalize]
def rows(n=120, seed=0, cities=('Aa','Bb','Cc','Dd'), missing=()):
    g = np.random.default_rng(seed)
    df = pd.DataFrame(dict(age=g.normal(50, 15, n), pay=g.normal(9, 3, n), kids=g.normal(2, 1, n), city=g.choice(list(cities), n), job=g.integers(0, 3, n), pet=g.choice(['cat','dog','no'], n)))
    df['y'] = np.where((df.age > 50) ^ df.city.isin(['Aa','Bb']), 'yes', 'no')
    for name in missing: df.loc[g.random(n) < .3, name] = np.nan
    return df

def loaders(df, cats=('city','job','pet'), conts=('age','pay','kids'), procs=procs, y='y'):
    return TabularDataLoaders.from_df(df, procs=list(procs), cat_names=list(cats), cont_names=list(conts), y_names=y,
        y_block=CategoryBlock() if y == 'y' else RegressionBlock(), valid_idx=list(range(0, len(df), 5)), bs=16, num_workers=0)

def learner(dls, layers=(8,), **kwargs):
    learn = tabular_learner(dls, layers=list(layers), **{'metrics': accuracy, **kwargs})
    learn.remove_cb(learn.progress)
    learn.logger = lambda *args: None
    return learn

def trained(dls, epochs=6):
    set_seed(0)
    learn = learner(dls, (16,))
    learn.fit_one_cycle(epochs, 2e-2)
    return learn

def plain(teacher, df):
    "The teacher's logits for raw rows, by its own loaders and a plain forward pass"
    batch = teacher.dls.test_dl(df.copy(), bs=len(df)).one_batch()
    with torch.no_grad(): return teacher.model.eval()(*batch[:2])

def seen(teacher, dls, df):
    "The teacher's logits for the batch that the student's loaders make of raw rows"
    batch = dls.test_dl(df.copy(), bs=len(df)).one_batch()
    t = Teacher(teacher)
    with t.on(dls=dls): return t.run(*batch[:2]).logits[0]

gaps,few = ('age','kids'),[Categorify,FillMissing]
older = rows().query('age > 45').reset_index(drop=True)
cases = {  # the teacher's rows and settings of its loaders, and the student's
    'columns in another order': (rows(), {}, rows(), dict(cats=('job','pet','city'), conts=('pay','kids','age'))),
    'other statistics': (rows(), {}, older, {}),
    'fewer categories': (rows(), {}, rows(cities=('Dd','Bb')), {}),
    'categories that the teacher does not know': (rows(cities=('Aa','Cc')), {}, rows(), {}),
    'more columns': (rows(), {}, rows().assign(more=1., other='a'), dict(cats=('other','job','pet','city'), conts=('more','pay','age','kids'))),
    'nothing normalized': (rows(), {}, older, dict(procs=few)),
    'a teacher without normalization': (rows(), dict(procs=few), older, {}),
    'missing numbers, filled with other medians': (rows(missing=gaps), {}, rows(seed=1, missing=gaps).assign(age=lambda d: d.age+20), {}),
    'missing in the data of the teacher only': (rows(missing=gaps), {}, rows(seed=1), {}),
    'missing in other columns': (rows(missing=gaps), {}, rows(seed=2, missing=('age','pay')), dict(conts=('pay','kids','age'))),
}

@pytest.mark.parametrize('name', cases)
def test_the_teacher_sees_each_row_as_its_own_loaders_show_it(name):
    theirs,settings,ours,kwargs = cases[name]
    teacher,dls = trained(loaders(theirs, **settings), 2),loaders(ours, **kwargs)
    new = ours.head(40).fillna({'pay': 9.})  # the teacher knows no missing ones there
    assert torch.allclose(seen(teacher, dls, new), plain(teacher, new), atol=1e-4)

def test_a_fit_its_metrics_and_its_first_line(capsys):
    df = rows(400)
    teacher = trained(loaders(df), 10)
    student = learner(loaders(df, ('job','pet','city'), ('kids','age','pay')))
    student.metrics = [accuracy,TeacherAgreement(teacher)]
    kd = KnowledgeDistillationCallback(teacher)
    student.fit(1, cbs=kd)
    right = teacher.validate(dl=teacher.dls.test_dl(df.iloc[::5].copy(), with_labels=True))[1]
    assert right > 0.85 and kd.teacher_metrics()['accuracy'] == pytest.approx(right)
    assert 'translated' in repr(kd)
    truth = (plain(teacher, df.iloc[::5]).argmax(1) == student.get_preds()[0].argmax(1)).float().mean()
    assert student.validate()[2] == pytest.approx(float(truth))

def test_a_teacher_from_a_file(tmp_path):
    df = rows(400)
    trained(loaders(df), 8).export(tmp_path/'t.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        teacher = load_learner(tmp_path/'t.pkl')
    dls = loaders(df.query("city != 'Aa'").reset_index(drop=True), conts=('pay','age','kids'))
    new = df.query("city != 'Aa'").head(20).reset_index(drop=True)
    assert torch.allclose(seen(teacher, dls, new), plain(teacher, new), atol=1e-4)

@pytest.mark.parametrize('change', ['float32', 'strings', 'no flag'])
def test_categories_and_gaps_that_are_written_in_another_way(change):
    "fastai reads numbers as float32 unless told; '1' is not 1, and a table that fills gaps in silence cannot say where they were"
    df = rows(missing=('age',) if change == 'no flag' else ())
    df['job'] = df.job*0.1
    def make(df, procs=procs, **kwargs):
        to = TabularPandas(df.copy(), list(procs), ['city','job','pet'], ['age','pay','kids'], 'y', y_block=CategoryBlock(), splits=(list(range(20, len(df))),list(range(20))), **kwargs)
        return to.dataloaders(bs=16)
    teacher = trained(make(df, reduce_memory=False), 1)
    if change == 'float32':
        t,dls = Teacher(teacher),make(df)
        with t.on(dls=dls): assert torch.allclose(t.run(*dls.valid.one_batch()[:2]).logits[0], plain(teacher, df.head(16)), atol=1e-4)
    else:
        dls = make(df.assign(job=df.job.astype(str))) if change == 'strings' else make(df, [Categorify,FillMissing(add_col=False),Normalize])
        with pytest.warns(UserWarning, match="none of the categories of 'job'" if change == 'strings' else "'age_na' which numbers are missing"): seen(teacher, dls, df)

def test_batches_of_other_kinds():
    "Numbers alone, and inputs that are no part of the table"
    theirs,ours = columns_of(loaders(rows())),columns_of(loaders(older, conts=('pay','age','kids')))
    translate = column_map(ours, theirs)
    cats,numbers,text = torch.ones(4, 3).long(),torch.randn(4, 3),torch.randn(4, 5)
    new = translate(cats, numbers, text)
    assert len(new) == 3 and new[2] is text and not torch.equal(new[1], numbers)
    assert len(translate(cats)) == 1
    (alone,) = column_map(({}, ours[1]), ({}, theirs[1]))(numbers)
    assert torch.equal(alone, new[1])

def test_a_peer_gets_the_students_batches_as_they_are():
    peer,student = learner(loaders(rows(400), conts=('kids','age','pay'))),learner(loaders(rows(400)))
    kd = KnowledgeDistillationCallback(PeerTeacher(peer), Mutual())
    student.fit(6, 2e-2, cbs=kd)
    assert 'translated' not in repr(kd) and kd.teacher_metrics()['accuracy'] == pytest.approx(Learner(student.dls, peer.model, student.loss_func, metrics=accuracy).validate()[1])

def test_a_comparison_leaves_a_teacher_as_it_was(tmp_path):
    teacher = trained(loaders(rows(), conts=('kids','age','pay')), 1)
    t,xb = Teacher(teacher),teacher.dls.valid.one_batch()[:2]
    before = t(*xb)
    compare(lambda: learner(loaders(rows())), t, ['soft'], 1, 1, out=tmp_path, show=False)
    assert torch.equal(t(*xb), before)

def test_equal_data_are_not_touched():
    a,b = loaders(rows()),loaders(rows())
    assert column_map(columns_of(a), columns_of(b)) is None
    assert column_map(None, columns_of(b)) is None and columns_of(None) is None
    teacher,student = trained(a, 1),learner(b)
    kd = KnowledgeDistillationCallback(teacher)
    student.fit(1, cbs=kd)
    assert 'translated' not in repr(kd)

@pytest.mark.parametrize('kwargs,words', [
    (dict(conts=('age','pay')), "reads the column 'kids' as numbers, and the student's table has 'age', 'pay'"),
    (dict(cats=('city','pet')), "reads the column 'job' as categories, and the student's table has 'city', 'pet'"),
    (dict(cats=('city','pet'), conts=('age','pay','kids','job')), "'job' as categories"),
])
def test_a_column_that_is_not_there_is_refused(kwargs, words):
    teacher,student = trained(loaders(rows()), 1),learner(loaders(rows(), **kwargs))
    with pytest.raises(ValueError, match=words): student.fit(1, cbs=KnowledgeDistillationCallback(teacher))
    kd = KnowledgeDistillationCallback(Teacher(teacher, inputs=lambda cats, conts: (torch.ones(len(cats), 3).long(), torch.zeros(len(cats), 3))))
    student.fit(1, cbs=kd)  # the user's own map
    assert 'translated' not in repr(kd)

def test_an_ensemble_and_a_cache():
    df = rows(200)
    teachers = [trained(loaders(d, conts=c), 2) for d,c in ((df,('kids','age','pay')), (df.query('age > 40').reset_index(drop=True),('age','pay','kids')))]
    dls = loaders(df, conts=('pay','kids','age'))
    new = df.head(30)
    batch = dls.test_dl(new.copy(), bs=30).one_batch()
    for cache in (None,True):
        t = Teacher(teachers, cache=cache)
        with t.on(dls=dls):
            for _ in range(2):
                for z,teacher in zip(t.run(*batch[:2]).logits, teachers): assert torch.allclose(z, plain(teacher, new), atol=1e-4)
    cache,answers = Cache(),[]
    for data in (dls,loaders(df, conts=('age','pay','kids'))):  # the same numbers are other rows in other columns
        for t in (Teacher(teachers[0]),Teacher(teachers[0], cache=cache)):
            with t.on(dls=data): answers.append(t.run(*batch[:2]).logits[0])
    assert torch.allclose(answers[0], answers[1]) and torch.allclose(answers[2], answers[3]) and not torch.allclose(answers[0], answers[2])

def test_numbers_only_and_regression():
    df = rows(200)
    make = lambda d, conts: loaders(d, (), conts, y='pay')
    set_seed(0)
    teacher = learner(make(df, ('age','kids','job')), metrics=mae)
    teacher.fit(1)
    student = learner(make(df.query('age > 40').reset_index(drop=True), ('kids','job','age')), metrics=mae)
    kd = KnowledgeDistillationCallback(teacher)
    student.fit(1, cbs=kd)
    valid = df.query('age > 40').reset_index(drop=True).iloc[::5]
    assert kd.teacher_metrics()['mae'] == pytest.approx(float((plain(teacher, valid)[:,0] - torch.tensor(valid.pay.values)).abs().mean()), rel=1e-4)

def test_a_start_from_other_statistics_is_a_warning():
    df = rows()
    teacher = trained(loaders(df), 1)
    with pytest.warns(UserWarning, match="tables were normalized in another way"): init_from_teacher(learner(loaders(df.query('age > 45').reset_index(drop=True))), teacher)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        init_from_teacher(learner(loaders(df)), teacher)
