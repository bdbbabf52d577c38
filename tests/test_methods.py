"Methods by name: what a text means, and what is refused"
import json, os, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.schedule import SchedCos
from fastkd.callback import KnowledgeDistillationCallback
from fastkd.feature_losses import Attention, FitNet, RKD, Similarity
from fastkd.losses import ChannelWise, KDLoss, Logits, SoftTarget
from fastkd.methods import Method, as_methods, loss_classes, method, named_methods, schedules

#: the names of version 0.1, with what they meant: (class, weight of the labels, of the loss, schedule)
version_01 = {'soft': ('SoftTarget',0.5,0.5,None), 'soft-paper': ('SoftTarget',0.1,0.9,None), 'standardised': ('SoftTarget',0.1,9.,None),
    'logits': ('Logits',0.5,0.5,None), 'mutual': ('Mutual',0.5,0.5,None), 'dkd': ('DecoupledKD',1.,1.,'warmup'), 'nkd': ('NormalizedKD',1.,1.,None),
    'dist': ('DIST',1.,2.,None), 'attention': ('Attention',0.1,0.9,None), 'attention-paper': ('Attention',1.,1000.,None), 'fitnet': ('FitNet',1.,100.,None),
    'cosine': ('Cosine',0.75,0.25,None), 'similarity': ('Similarity',1.,3000.,None), 'rkd': ('RKD',1.,1.,None), 'pkt': ('PKT',1.,30000.,None),
    'nst': ('NST',1.,50.,None), 'vid': ('VID',1.,1.,None), 'review': ('ReviewKD',1.,1.,'warmup')}

@pytest.mark.parametrize('name', version_01)
def test_the_names_of_version_01_mean_what_they_meant(name):
    cls,label,weight,schedule = version_01[name]
    m = method(name)
    assert [type(t.loss).__name__ for t in m.terms] == [cls] and m.schedule == schedule and m.name == name and not m.warmup_epochs
    assert m.weights() == (pytest.approx(label), [weight]) and m.epochs is None

def test_the_temperatures_of_version_01():
    T = {'soft': 5, 'soft-paper': 4, 'standardised': 2, 'mutual': 1, 'dkd': 4, 'nkd': 1, 'dist': 1}
    assert {n: method(n).terms[0].loss.T for n in T} == T and method('standardised').terms[0].loss.standardize

def test_every_loss_with_a_paper_has_a_name():
    "derived from the classes, so that there is no second list"
    import fastkd.losses, fastkd.feature_losses
    public = {c for module in (fastkd.losses,fastkd.feature_losses) for c in vars(module).values() if isinstance(c, type) and issubclass(c, KDLoss) and c.paper}
    assert set(loss_classes()) == public == {c for c,_ in named_methods().values()}
    assert method('channelwise').weights() == (1.,[3.]) and type(method('channelwise').terms[0].loss) is ChannelWise
    for name in named_methods(): assert method(name).terms and json.dumps(method(name).settings())

def test_a_new_loss_of_the_package_has_names_at_once():
    class Mine(KDLoss):
        paper = (0.5, 7.)
        __module__ = 'fastkd.losses'
        def __init__(self, margin=1):
            super().__init__()
            self.margin = margin
        def forward(self, pred, teacher_pred): return (pred-teacher_pred).abs().mean()
    assert method('mine').weights() == (0.5,[7.]) and method('mine(margin=3)').terms[0].loss.margin == 3
    Mine.methods = {'near': dict(weight=0.3), 'far': dict(margin=9, label_weight=1., epochs=2)}
    assert method('near').weights() == (0.7,[0.3]) and method('far').weights() == (1.,[7.]) and method('far').epochs == 2
    assert method('far').terms[0].loss.margin == 9
    class Closer(Mine): __module__ = 'fastkd.losses'
    assert type(method('closer').terms[0].loss) is Closer and type(method('near').terms[0].loss) is Mine  # names are not inherited
    Closer.__module__ = 'elsewhere'
    with pytest.raises(ValueError, match="no method 'mine'"): method('mine')
    Mine.__module__ = 'elsewhere'
    with pytest.raises(ValueError, match="no method 'near'"): method('near')

def test_class_names():
    m = method('SoftTarget(T=7)')
    assert (m.name, m.weights(), m.terms[0].loss.T) == ('SoftTarget(T=7)', (0.5,[0.5]), 7)
    assert method('FitNet').weights() == (1.,[100.])  # the callback's default for losses on activations
    assert method('DecoupledKD(weight=paper)').warmup_epochs == 20

def test_text_and_object_are_one():
    m = method('attention-paper+soft(T=3,weight=0.2)')
    cb = m.callback(torch.nn.Identity(), (['a'],['b']))
    assert isinstance(cb, KnowledgeDistillationCallback) and [type(t.loss) for t in cb.objective.terms] == [Attention,SoftTarget]
    assert m.weights() == (0.8,[1000.,0.2]) and cb.objective.terms[1].loss.T == 3
    assert method('soft(T=7, weight=0.7)').settings() == Method('mine', SoftTarget(T=7), weight=0.7).settings()

def test_the_student_alone_has_no_callback():
    m = method('none(epochs=7)')
    assert m.callback(torch.nn.Identity(), (['a'],['b'])) is None and m.epochs == 7 and m.weights() == (1.,[]) and not m.compares_activations

def test_layers_are_for_losses_that_compare_them():
    layers = ['a'],['b']
    assert [method(n).compares_activations for n in ('soft','fitnet','soft+fitnet')] == [False,True,True]
    seen = []
    class Spy:
        def __init__(self, teacher, loss, *layers, **kwargs): seen.append((layers, kwargs))
    import fastkd.methods as M
    original,M.KnowledgeDistillationCallback = M.KnowledgeDistillationCallback,Spy
    try:
        for n in 'soft','fitnet': method(n).callback(None, layers)
        method('fitnet').callback(None)
    finally: M.KnowledgeDistillationCallback = original
    assert [l for l,_ in seen] == [(),layers,()] and seen[1][1] == dict(weight='paper', label_weight=None, schedule=None, unlabeled=None)

def test_losses_are_not_copied():
    loss = Similarity()
    assert Method('mine', loss).callback(torch.nn.Identity(),
    (['a','b'],['c','d'])).objective.terms[0].loss.layers == [('b','d')] and loss.layers is None
    assert [l.paper_layers for l in (Similarity,RKD,FitNet)] == ['last','last','all']

def test_a_schedule_by_name():
    objective = method('soft(schedule=cos)').objective
    assert [objective.at(p).terms.get(objective.terms[0], 0) for p in (0,0.5,1)] == pytest.approx([0,0.25,0.5])
    hint = method('fitnet(schedule=hint)').objective
    assert [(w.label, [*w.terms.values()]) for w in map(hint.at, (0,0.25,0.5,0.75,1))] == [(1,[100]),(1,[50]),(1,[]),(1,[]),(1,[])]
    warmup = schedules[method('dkd').schedule]
    assert [warmup(p) for p in (0,1/24,1/12,1)] == pytest.approx([0,0.5,1,1], abs=1e-6)

def test_joining():
    assert method('soft+fitnet').weights() == (0.5,[0.5,100.]) and method('dkd+review').weights() == (1.,[1.,1.])
    assert (method('soft')+method('soft(T=2,weight=0.3)')).weights() == (0.5,[0.5,0.3])
    assert Method('mine', [SoftTarget, Logits], 0.6).weights() == (0.4,[0.3,0.3])  # one number is shared
    assert method('soft+init').init and method('soft+init').settings() == method('init+soft').settings() and method('soft+init').name == 'soft+init' and method('soft+init+init').init and method('init+init').init
    with pytest.raises(ValueError, match='20 epochs'): method('DecoupledKD(weight=paper)') + method('nkd')
    for text,words in ('soft+dkd','schedules, epochs, learning rates or mixing'),('soft+none','none'),('soft+fitnet(epochs=3)','schedules, epochs, learning rates or'):
        with pytest.raises(ValueError, match=words): method(text)

@pytest.mark.parametrize('text', ['', 'soft(', 'soft(T=)', 'soft(T=os.getcwd())', 'soft(**{})', 'soft(T=4)(T=5)',
    'none(T=3)', 'soft+', 'soft(schedule=up)', 'soft(weight=-1)', 'soft(T=x)', 'os', 'nn', 'KDLoss', 'FitNet2', 'soft(temperature=3)'])
def test_no_method(text):
    with pytest.raises(ValueError) as e: method(text)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('text,words', [('none(epochs=-1)','1 or more, got -1'), ('none(epochs=0)','1 or more, got 0'),
    ('soft(epochs=1.5)','got 1.5'), ('soft(epochs=abc)',"got 'abc'"),
    ('soft(epochs=True)','got True'), ('soft(schedule=3)','schedules are cos, lin'), ('soft(schedule=[])','schedules are cos'),
    ('soft(schedule=up)','schedules are cos'),
    ('fitnet(layers=3)','`layers` are pairs'), ('fitnet(layers="x")','`layers` are pairs'), ("fitnet(layers=['0','1'])",'`layers` are pairs'),
    ('attention(channel_axis=9)','got 9'),
    ('fitnet(channel_axis=0)','axis 0 is the batch'), ('fitnet(channel_axis=x)',"got 'x'"), ('fitnet(channel_axis=(1,-7))',r'got \(1, -7\)'),
    ('soft(weight=-1)','non-negative, got -1'),
    ('soft(weight=nan)',"got 'nan'"), ('soft(weight=1e999)','finite'), ('soft(weight={})','a number'),
    ('soft(weight=[0.2,0.3])','1 losses but 2 weights|2 weights'), ('soft(label_weight=x)','`label_weight` is a number'),
    ('soft(T=x)',"`T` of soft must be a number, got 'x'"), ('soft(T=True)','must be a number'),
    ('dkd(alpha=x)','`alpha` of dkd must be a number'), ('fitnet(bn=3)','must be True or False'),
    ('attention(p=None)','must be a number'), ('soft(T=0)','above 0'), ('soft(T=-1)+fitnet','above 0'), ('soft+fitnet(epochs=-1)','got -1')])
def test_an_argument_that_makes_no_sense_is_one_sentence(text, words):
    with pytest.raises(ValueError, match=words) as e: as_methods(['none', text])
    assert '\n' not in str(e.value) and 'str' not in str(e.value).split() and "'<'" not in str(e.value)

@pytest.mark.parametrize('name', ['KDLoss','FeatureLoss','TrainedFeatureLoss','FunctionLoss'])
def test_an_abstract_loss_is_no_method(name):
    with pytest.raises(ValueError, match='There is no method'): method(name)

@pytest.mark.parametrize('kwargs', [dict(epochs=0), dict(epochs=1.), dict(schedule=3), dict(weight='much'),
    dict(weight=None, label_weight=-1), dict(weight=object())])
def test_an_object_with_settings_that_make_no_sense(kwargs):
    with pytest.raises(ValueError, match='^mine: '): Method('mine', SoftTarget, **kwargs)

def test_what_an_argument_could_be_is_said():
    with pytest.raises(ValueError, match="no argument 'temperature'; it takes T, standardize, weight"): method('soft(temperature=3)')
    with pytest.raises(ValueError, match="no argument 'T'; it takes epochs"): method('none(T=3)')
    with pytest.raises(ValueError, match='did you mean soft'): method('sofd')

@pytest.mark.parametrize('o', [SoftTarget(), SoftTarget, lambda pred, teacher_pred: 0, 3, None])
def test_an_object_needs_a_name(o):
    with pytest.raises(ValueError, match=r"\{'mine': loss\}") as e: as_methods(['none', o])
    assert '\n' not in str(e.value)

def test_objects_with_names():
    loss = SoftTarget(3)
    ms = as_methods(['none', {'mine': loss, 'both': [loss, FitNet]}, Method('third', Logits, 0.2, schedule=SchedCos(0, 1))])
    assert [m.name for m in ms] == ['none','mine','both','third'] and ms[1].terms[0].loss is loss and len(ms[2].terms) == 2
    assert [m.name for m in as_methods({'a': loss, 'b': 'soft(T=4)', 'c': Method('d', Logits)})] == ['a','b','c']
    assert [m.name for m in as_methods('soft')] == ['soft']

def test_a_name_cannot_stand_for_something_else_than_it_says():
    assert as_methods({'soft': method('soft')})[0].settings() == method('soft').settings()
    for o in {'soft': SoftTarget(T=9)}, {'none': SoftTarget()}, Method('fitnet', FitNet, 0.5):
        with pytest.raises(ValueError, match='another name'): as_methods(o)

class Weighted(torch.nn.Module):
    "A loss of a user that holds anything"
    def __init__(self, held): super().__init__(); self.held = held
    def forward(self, pred, teacher_pred): return (pred-teacher_pred).square().mean()

def recursive():
    def f(n): return f(n-1) if n else 0
    return f

def itself(x):
    loss = Weighted(x)
    loss.__dict__['me'] = loss
    return loss

@pytest.mark.parametrize('a,b', [(np.ones(3),np.arange(3.)), (np.float32(1),np.float32(9)), (np.int64(1),np.int64(9)), (np.bool_(0),np.bool_(1)),
    (b'a',b'b'), (range(1),range(9)), ([1.],[2.]),
    (torch.ones(3),torch.zeros(3)), (torch.ones(3),torch.ones(3).bfloat16()), (Path('a'),Path('b')), (pd.Series([1]),pd.Series([2])),
    (pd.DataFrame({'a': [1]}),pd.DataFrame({'a': ['x']})),
    ({1,2},{1,3}), ({'a': [1]},{'a': [2]}), (np.array([1,'x'],object),np.array([1,'y'],object)), (recursive(),3), (itself(1),itself(2)),
    (np,torch)], ids=lambda o: type(o).__name__)
def test_losses_that_hold_something_else_have_other_settings(a, b):
    settings = [Method('mine', Weighted(o)).settings() for o in (a,a,b)]
    assert settings[0] == settings[1] != settings[2] and json.dumps(settings)

def test_arguments_of_a_loss_are_in_its_settings():
    texts = [Method('mine', l).settings()['loss'][0] for l in (FitNet(), FitNet(bn=False), FitNet(layers=[('0','1')]), SoftTarget(T=3), RKD(distance=1))]
    assert len(set(texts)) == 5 and texts[0] == 'FitNet()' and texts[3] == 'SoftTarget(T=3)'

def test_a_loss_of_a_user_has_the_same_settings_in_another_process():
    code = ("import sys, json; sys.path.insert(0, sys.argv[1]); from test_methods import *; "
            "print(json.dumps(Method('mine', itself([{'b','a','c'}, np.ones(3), Path('x'), recursive(), torch.nn.Linear(2, 2)])).settings()))")
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1])}
    command = [sys.executable, '-W', 'ignore', '-c', code, Path(__file__).parent]
    said = [subprocess.run(command, env=env | {'PYTHONHASHSEED': seed}, capture_output=True, text=True).stdout for seed in '12']
    assert said[0] == said[1] and json.loads(said[0])['loss'][0].startswith('Weighted')

def test_settings_are_the_same_in_every_process():
    text = json.dumps([Method('mine', SoftTarget(T=SchedCos(2, 4)), schedule=lambda p: 1.).settings(), method('dkd').settings()])
    assert '0x' not in text and 'warmup' in text
