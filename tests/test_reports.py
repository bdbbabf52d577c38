"Statistics worked by hand; tables, charts and curves of made-up runs"
import json
from itertools import product
from pathlib import Path
import numpy as np, pandas as pd, pytest
from fastkd.experiments import reports
from fastkd.experiments.records import Results
from fastkd.experiments.reports import caption, chart, curves, epochs_to_baseline, holm, markdown, paired, plain_table, table

results = Path(__file__).parents[1]/'nbs'/'tutorials'/'results'

def made(**accuracies):
    "Runs with given accuracies in %"
    return pd.DataFrame([dict(comparison='c', method=m, seed=s, accuracy=a/100, parameters=7, data=['three blobs',60,30,90,'x'],
        settings=dict(fit=dict(epochs=3), method=dict(loss=[m], weight=[0.5])),
        seconds=[1.,1.,2.] if m == 'none' else [7.,1.,1.], log=dict(accuracy=[0.1,0.2,a/100]), teacher=dict(accuracy=0.9, parameters=70, checksum='t'))
        for m,accs in accuracies.items() for s,a in enumerate(accs)])

def test_table_worked_by_hand():
    t = table(made(none=[50.,60.,70.], a=[51.,62.,73.], b=[50.,60.]))
    assert t.loc['student alone',['accuracy','sd','n']].tolist() == pytest.approx([60,10,3])
    a = t.loc['a']
    # differences 1, 2, 3: mean 2, sd 1, t = 2·√3, t(2 degrees, 97.5 %) = 4.30265
    assert [a.difference, a.low, a.high, a.n, a.pairs] == pytest.approx([2, 2-4.30265/3**0.5, 2+4.30265/3**0.5, 3, 3], abs=1e-4)
    t2 = 2*3**0.5  # the t distribution with two degrees of freedom has a closed form
    assert a.p == pytest.approx(1 - t2/(2+t2**2)**0.5)
    assert a.time == pytest.approx(9/4) and a.closed == pytest.approx(100*2/30)
    b = t.loc['b']
    assert b[['n','pairs','difference']].tolist() == [2,2,0] and t.p_holm['a'] == a.p
    assert t.loc['teacher','accuracy'] == 90

def test_rows_are_teacher_baseline_then_the_largest_gain():
    runs = made(b=[51.,58.], lost=[49.,49.], none=[50.,50.], a=[53.,53.])
    assert list(table(runs).index) == ['teacher','student alone','b','a','lost']
    assert list(table(runs, 'a').index) == ['teacher','a','b','student alone','lost']
    assert list(table(runs[runs.method != 'none']).index) == ['teacher','b','a','lost']  # without a baseline by accuracy
    unpaired = runs[(runs.method != 'b') | (runs.seed > 0)]
    assert list(table(unpaired[(unpaired.method == 'b') | (unpaired.seed < 1)]).index) == ['teacher','student alone','a','lost','b']  # an unknown gain is last

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

@pytest.mark.parametrize('change', [dict(weight=[0.6]), dict(epochs=2), dict(label_weight=1.)])
def test_one_name_of_several_methods_makes_no_table(change):
    runs = made(none=[50.], a=[51.,52.])
    table(runs)
    runs['settings'] = [runs.settings[0], runs.settings[1], dict(runs.settings[2], method=runs.settings[2]['method'] | change)]
    with pytest.raises(ValueError, match="'a' names several methods"): table(runs)

def test_one_name_of_several_methods_in_results_of_version_01():
    runs = made(none=[50.], a=[51.,52.])
    runs['settings'] = [dict(fit={}, method=dict(loss=[['SoftTarget',{'T': T}]])) for T in (3,3,4)]
    with pytest.raises(ValueError, match="'a' names several methods"): table(runs)

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

@pytest.mark.parametrize('names', [('a',), ('soft(T=7,weight=0.7)','a'),
    ('soft(T=4,weight=0.5,label_weight=0.5)+fitnet(weight=100,layers={"layer1":"0.4"})+' + 'attention(weight=1)'*3,)])
def test_the_table_of_a_terminal_fits_80_columns(names):
    runs = made(none=[50.,60.,100.], **{n: [1.,62.,0.] for n in names})
    runs = runs[~((runs.method == 'none') & (runs.seed == 1))]  # two pairs
    text = plain_table(table(runs))
    assert max(map(len, text.splitlines())) <= 80
    for words in (*names,'student alone','teacher','75.00 ± 35.36','-74.50','(2 pairs)','p (Holm)','difference: points, to the student alone'):
        assert ''.join(words.split()) in ''.join(text.split()), text
    assert 'relative to a.' in ' '.join(plain_table(table(made(a=[50.], none=[50.]), 'a')).split())

def test_epochs_to_the_baseline():
    assert epochs_to_baseline(made(none=[50.], a=[50.])).loc['a','passed'] == 0  # reached, not passed
    runs = made(none=[50.], a=[60.,40.])
    o = epochs_to_baseline(runs).loc['a']
    assert o.tolist() == [3,9/4,1,2]
    early = epochs_to_baseline(made(a=[60.,40.], none=[50.,70.]))  # their mean, 60, the better one has passed after 3 epochs
    assert list(early.index) == ['student alone','a'] and early.loc['student alone'].tolist() == [3,1,1,2]
    runs = pd.concat([made(b=[40.], none=[50.], a=[60.]), made(c=[60.]).assign(log=[dict(accuracy=[0.6,0.2,0.1])])])
    assert list(epochs_to_baseline(runs).index) == ['student alone','c','a','b']  # the fewest epochs first, last who never passes
    with pytest.raises(ValueError, match='no runs of the baseline'): epochs_to_baseline(runs, 'd')

@pytest.mark.parametrize('name,method,difference,low,high,significant', [('digits','dist',1.84,1.09,2.59,True),
    ('mnist','dkd',-1.65,-2.54,-0.76,True),
    ('cifar10','fitnet',3.97,3.81,4.13,True), ('pets-scratch','attention-paper',7.25,3.47,11.03,False)])
def test_results_of_version_01_give_the_same_table(name, method, difference, low, high, significant):
    "the figures of the README"
    runs = pd.DataFrame([r.row() for r in Results(results/f'{name}.jsonl').read()])
    if name == 'pets-scratch': runs = runs[~runs.method.isin(['dist','standardised'])]
    row = table(runs).loc[method]
    assert row[['difference','low','high']].tolist() == pytest.approx([difference,low,high], abs=0.006)
    assert (row.p_holm < 0.05) == significant and 'test rows' in caption(runs)

def test_captions():
    run = dict(data=['blobs',60,30,90,'x'], settings=dict(fit=dict(epochs=2)), teacher_fit=dict(epochs=4), device='cpu', versions=dict(torch='2'), method='none')
    text = caption(pd.DataFrame([dict(run, seed=s) for s in range(3)]))
    assert text == ("blobs: accuracy on 90 test rows that trained no model and chose no setting; student trained for 2 epochs on 60 rows, teacher for 4 on the same; "
                    "mean ± standard deviation over 3 seeds, differences within seeds; cpu, torch 2.")
    new = dict(run, bf16=True, augmented=True, callbacks=['MixUp'])
    text = caption(pd.DataFrame([dict(new, seed=0)]))
    assert '60 rows, augmented, MixUp, teacher' in text and 'cpu, bfloat16, torch' in text
    # the first one is of an earlier version
    mixed = caption(pd.DataFrame([dict(run, seed=0), dict(new, seed=1), dict(new, method='soft', seed=0)]))
    assert 'augmented' not in mixed and 'bfloat16' not in mixed and 'over 1 to 2 seeds' in mixed

def test_charts(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt
    for draw,notebook in product((chart,curves), (False,True)):
        monkeypatch.setattr(reports, 'IN_NOTEBOOK', notebook)
        before = plt.get_fignums()
        draw(made(none=[50.,60.], a=[51.,62.]), path=tmp_path/'c.png')
        assert plt.get_fignums() == before  # a notebook shows it once, and a loop fills no memory
        assert (tmp_path/'c.png').read_bytes()[:4] == b'\x89PNG'
    fig = chart(made(none=[50.,60.], a=[51.,62.], b=[54.,65.], lost=[48.,57.]))
    a,b = fig.axes
    assert fig._suptitle.get_text() == 'three blobs, 2 seeds'
    assert [t.get_text() for t in a.get_yticklabels()] == ['student alone','b','a','lost'] and a.yaxis_inverted()  # the largest gain on top
    means,runs = a.lines[:2]
    assert means.get_xdata() == pytest.approx([55,59.5,56.5,52.5]) and sorted(runs.get_xdata()) == pytest.approx([48,50,51,54,57,60,62,65])
    gains = {line.get_color(): list(line.get_xdata()) for line in b.lines if line.get_marker() == 'o'}
    assert {k: v for k,v in gains.items() if v} == {'0.6': pytest.approx([4.5,1.5,-2.5])}  # two seeds tell nothing
    sure = chart(made(none=[50.,60.,70.], b=[54.,64.,74.1], lost=[48.,58.,68.1])).axes[1]
    assert {line.get_color(): len(line.get_xdata()) for line in sure.lines if line.get_marker() == 'o'} == {'C0': 1, 'C3': 1, '0.6': 0}
    many = made(**{f'method{i}': [50.] for i in range(23)})
    for ax in curves(many).axes: assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 24  # with the teacher's

@pytest.mark.parametrize('baseline', ['none','other'])
def test_one_seed_or_no_baseline_is_drawn(baseline, recwarn):
    fig = chart(made(a=[51.], none=[50.]), baseline)
    assert fig._suptitle.get_text() == 'three blobs, 1 seed' and not recwarn.list
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == (['student alone','a'] if baseline == 'none' else ['a','student alone'])

def test_curves_have_a_band_over_seeds_and_begin_where_methods_differ():
    runs = made(a=[60.,64.], none=[50.,60.])
    runs['log'] = [dict(accuracy=[0.1,0.5,a]) for a in runs.accuracy]
    ax = curves(runs).axes[0]
    assert [line.get_label() for line in ax.lines] == ['student alone','a','teacher'] and ax.lines[0].get_color() == 'black'
    band = ax.collections[1].get_paths()[0].vertices
    assert {round(y, 3) for x,y in band if x == 3} == {round(62-8**0.5, 3), round(62+8**0.5, 3)}
    assert 30 < ax.get_ylim()[0] < 50  # the first epoch, 10 %, is left out
    assert curves(made(none=[50.])).axes[0].get_ylim()[0] < 10

def drawn(fig):
    "What is written around the plots of a figure: `(text, box)`, and the boxes of the plots"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    FigureCanvasAgg(fig).draw()
    texts = [fig._suptitle, *[t for legend in fig.legends for t in legend.get_texts()]]
    for ax in fig.axes:
        (left,right),(low,high) = ax.get_xlim(),sorted(ax.get_ylim())
        texts += [ax.xaxis.label, ax.yaxis.label, *ax.texts]
        texts += [l for l in ax.get_xticklabels() if left <= l.get_position()[0] <= right]
        texts += [l for l in ax.get_yticklabels() if low <= l.get_position()[1] <= high]
    shown = [t for t in texts if t is not None and t.get_visible() and t.get_text()]
    return [(t.get_text(), t.get_window_extent()) for t in shown], [ax.get_window_extent() for ax in fig.axes]

@pytest.mark.parametrize('draw', [chart,curves])
@pytest.mark.parametrize('names', [('a',), [f'soft(T={i},weight=0.{i}5,label_weight=0.5)' for i in range(9)], [f'method{i}' for i in range(23)]], ids=len)
def test_nothing_in_a_chart_is_cut_or_covered(draw, names):
    fig = draw(made(none=[50.,60.], **{n: [51.,62.] for n in names}))
    texts,plots = drawn(fig)
    assert {'three blobs, 2 seeds','student alone',*names} <= {t for t,_ in texts}
    for text,box in texts: assert -1 <= box.x0 and box.x1 <= fig.bbox.x1+1 and -1 <= box.y0 and box.y1 <= fig.bbox.y1+1, text
    for plot in plots: assert plot.width > 150 and not [t for t,box in texts if box.overlaps(plot)]

def test_epochs_are_whole_numbers_and_one_epoch_is_seen():
    runs = made(none=[50.], a=[60.])
    for ax in curves(runs).axes[:1]: assert all(float(t).is_integer() for t in ax.get_xticks())
    runs['log'],runs['seconds'] = [[dict(accuracy=[0.5])]*2,[[1.]]*2]
    assert all(line.get_marker() == 'o' for ax in curves(runs).axes for line in ax.lines if line.get_label() != 'teacher')
