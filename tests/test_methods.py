"Methods by name: what a text means, and what is refused"
import json
import pytest, torch
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
    assert [l for l,_ in seen] == [(),layers,()] and seen[1][1] == dict(weight='paper', label_weight=None, schedule=None)

def test_losses_are_not_copied():
    loss = Similarity()
    assert Method('mine', loss).callback(torch.nn.Identity(), (['a','b'],['c','d'])).objective.terms[0].loss.layers == [('b','d')] and loss.layers is None
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
    with pytest.raises(ValueError, match='20 epochs'): method('DecoupledKD(weight=paper)') + method('nkd')
    for text,words in ('soft+dkd','schedules or epochs'),('soft+none','none'),('soft+fitnet(epochs=3)','schedules or epochs'):
        with pytest.raises(ValueError, match=words): method(text)

@pytest.mark.parametrize('text', ['', 'soft(', 'soft(T=)', 'soft(T=os.getcwd())', 'soft(**{})', 'soft(T=4)(T=5)',
    'none(T=3)', 'soft+', 'soft(schedule=up)', 'soft(weight=-1)', 'soft(T=x)', 'os', 'nn', 'KDLoss', 'FitNet2', 'soft(temperature=3)'])
def test_no_method(text):
    with pytest.raises(ValueError) as e: method(text)
    assert '\n' not in str(e.value)

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

def test_settings_are_the_same_in_every_process():
    text = json.dumps([Method('mine', SoftTarget(T=SchedCos(2, 4)), schedule=lambda p: 1.).settings(), method('dkd').settings()])
    assert '0x' not in text and 'warmup' in text
