"Sizes, operations and times of two models: what is counted, and that nothing is changed"
import random
import numpy as np
import pandas as pd, pytest, torch
from torch import nn
from torchvision.models import resnet18
from fastai.basics import DataLoaders
from fastai.callback.tracker import SaveModelCallback
from fastai.metrics import accuracy
from fastai.text.models.awdlstm import AWD_LSTM
from fastkd.all import *
from conftest import batches, hooks, learner, net, same, weights

def measured(student, teacher, xb=None, **kwargs): return size_and_speed(student, teacher, xb, **{'seconds': 1e-3, **kwargs})
def images(n=4, **kwargs): return torch.randn(n, 1, 8, 8, **kwargs)

class Two(nn.Module):
    def __init__(self, n): super().__init__(); self.a,self.b = nn.Linear(3,n),nn.Linear(n,2)
    def forward(self, x, y): return self.b(self.a(x)*y['scale'])

# --- what is counted -----------------------------------------------------------------------------------------------

def test_sizes_by_hand():
    table = measured(net(width=4), net(width=8), images())
    def adds(w): return 64*9*w + 16*9*w*2*w + 2*w*3
    def params(w): return 9*w + w + 2*w + 9*w*2*w + 2*w + 4*w + 2*w*3 + 3
    for role,w in dict(student=4, teacher=8).items():
        assert table[role]['multiply-adds'] == adds(w) and table[role]['parameters'] == params(w)
    assert table.ratio['multiply-adds'] == adds(8)/adds(4)
    assert list(table.columns) == ['student','teacher','ratio']
    assert list(table.index) == ['parameters','MB','multiply-adds','ms for 1 item','ms for 4 items']
    assert (table > 0).all().all()

def test_resnet18_has_the_published_figures():
    table = measured(resnet18(), resnet18(), torch.randn(1,3,224,224))
    assert table.student['parameters'] == 11_689_512                      # torchvision's documentation
    assert table.student['multiply-adds']/1e9 == pytest.approx(1.814, abs=5e-4)
    assert table.student['MB'] == pytest.approx(46.8, abs=.1) and (table.ratio[:3] == 1).all()
    assert 'ms for 1 items' not in table.index and len(table) == 4

def test_operations_that_pytorch_fuses():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    table = measured(nn.LSTM(8,6,batch_first=True), layer, torch.randn(2,5,8))
    assert table.student['multiply-adds'] == 5*4*6*(8+6)
    assert table.teacher['multiply-adds'] == 5*8*8*4 + 2*5*5*8 + 2*5*8*16
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.mkldnn.enabled

def test_shared_weights_count_once():
    tied = nn.Sequential(nn.Linear(4,4), nn.Linear(4,4))
    tied[1].weight = tied[0].weight
    table = measured(tied, Teacher([nn.Linear(4,4), nn.Linear(4,4)]), torch.randn(3,4))
    assert table.student['parameters'] == 16+4+4 and table.teacher['parameters'] == 2*20
    assert table.student['multiply-adds'] == table.teacher['multiply-adds'] == 32

def test_models_without_parameters():
    table = measured(nn.Flatten(), net(), images())
    assert table.student['parameters'] == table.student['multiply-adds'] == 0 and table.ratio['parameters'] == float('inf')
    assert 'inf' in repr(table)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_precisions(dtype):
    table = measured(net().to(dtype), net(), images())
    assert table.student['multiply-adds'] == table.teacher['multiply-adds']
    wide = measured(nn.Linear(500,500).to(dtype), nn.Linear(500,500), torch.randn(2,500))
    assert wide.ratio['MB'] == pytest.approx(4/dtype.itemsize, rel=.01)

def test_half_precision_inputs_for_a_model_in_single_precision():
    assert measured(net(), net().bfloat16(), images().bfloat16()).ratio['multiply-adds'] == 1

def test_several_inputs():
    xb = torch.randn(6,3),{'scale': torch.randn(6,1)}
    table = measured(Two(4), Two(8), xb)
    assert list(table.student[:3:2]) == [3*4+4+4*2+2, 3*4+4*2] and 'ms for 6 items' in table.index

def test_each_model_takes_its_inputs_of_a_batch_with_labels():
    assert measured(net(), net(), (images(), torch.zeros(4).long())).ratio['parameters'] == 1

# --- Learners and Teachers -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('metrics', [[accuracy], []])
def test_a_learner_brings_its_batch_and_its_metric(metrics):
    student,teacher = learner(metrics=metrics),learner(metrics=metrics, model=net(width=8, seed=2))
    student.fit(2)
    values = vars(student.recorder)['values']
    table = measured(student, teacher)
    assert student.recorder.values is values and len(values) == 2
    assert 'ms for 8 items' in table.index and ('accuracy' in table.index) == bool(metrics)
    if metrics:
        assert list(table.loc['accuracy'][:2]) == [o.validate()[1] for o in (student, teacher)]
        assert pd.isna(table.ratio['accuracy'])
    assert 'accuracy' not in measured(student, teacher, metric=False).index

def test_a_learner_that_keeps_its_best_model():
    student = learner(metrics=accuracy, cbs=SaveModelCallback(monitor='accuracy'))
    student.fit(1)
    cbs = list(student.cbs)
    assert measured(student, learner(metrics=accuracy)).student['accuracy'] == student.recorder.values[-1][-1]
    assert set(student.cbs) == set(cbs)

def test_one_learner_is_enough():
    table = measured(net(), learner(metrics=accuracy, model=net(width=8)))
    assert 'ms for 8 items' in table.index and pd.isna(table.student['accuracy']) and 0 <= table.teacher['accuracy'] <= 1

def test_a_teacher_runs_as_in_a_fit():
    seen = []
    def smaller(x): seen.append(x.shape); return x[...,::2,::2]
    teacher = Teacher([net(width=8), net(width=8)], dtype=torch.bfloat16, inputs=smaller, cache=True)
    table = measured(net(width=8), teacher, images())
    assert set(seen) == {(1,1,8,8),(4,1,8,8)} and len(seen) > 3
    def adds(side): return side**2*9*8 + (side//2)**2*9*8*16 + 16*3
    assert table.teacher['multiply-adds'] == 2*adds(4) and table.student['multiply-adds'] == adds(8)
    assert teacher.running is None and {p.dtype for p in teacher.models[0].parameters()} == {torch.float32}

def test_text():
    model = AWD_LSTM(50, 6, 10, 2)
    model(torch.randint(50, (3,5)))
    hidden = [h.clone() for l in model.hidden for h in l]
    table = measured(model, model, torch.randint(50, (2,7)))
    assert table.student['multiply-adds'] == 7*(4*10*(6+10) + 4*6*(10+6))
    assert all(torch.equal(a, b) for a,b in zip(hidden, [h for l in model.hidden for h in l]))

# --- nothing is changed --------------------------------------------------------------------------------------------

def test_everything_is_left_as_it_was():
    models = [net(dropout=.5), net(width=8, dropout=.5)]
    for m in models:
        m.train()
        m.bn2.eval()
        m.conv1.weight.requires_grad_(False)
        m.fc.register_forward_hook(lambda *args: None)
    modes = lambda: [[l.training for l in m.modules()] for m in models]
    flags = lambda: [[(p.requires_grad, p.grad) for p in m.parameters()] for m in models]
    streams = lambda: (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    dls,xb = batches(),images()
    learners = [learner(dls, m, metrics=accuracy) for m in models]
    order = dls.train.rng.getstate(),dls.valid.rng.getstate()
    before = modes(),flags(),streams(),len(hooks(*models)),xb.clone()
    values = [weights(m) for m in models]
    measured(*learners, xb)
    measured(learners[0], Teacher(models[1]))
    assert (modes(),flags(),streams(),len(hooks(*models))) == before[:4] and torch.equal(xb, before[4])
    assert all(same(a, weights(m)) for a,m in zip(values, models)) and order == (dls.train.rng.getstate(),dls.valid.rng.getstate())
    assert torch.is_grad_enabled() and not nn.modules.module._global_forward_pre_hooks
    assert [type(cb).__name__ for cb in learners[0].cbs] == [type(cb).__name__ for cb in learner(dls).cbs]
    with torch.no_grad():
        measured(*models, xb)
        assert not torch.is_grad_enabled()
    learners[0].fit(1)

def test_models_that_change_their_inputs():
    xb = images()
    kept = xb.clone()
    measured(nn.Sequential(nn.ReLU(inplace=True), net()), net(), xb)
    assert torch.equal(xb, kept)

def test_after_an_error():
    class Fails(nn.Module):
        def __init__(self): super().__init__(); self.layer,self.runs = nn.Linear(2,2),0
        def forward(self, x):
            self.runs += 1
            if len(x) == 1: raise KeyboardInterrupt
            return self.layer(x)
    model = Fails()
    with pytest.raises(KeyboardInterrupt): measured(nn.Linear(2,2), model, torch.randn(3,2))
    assert model.training and torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled() and torch.backends.mkldnn.enabled

# --- bad input -----------------------------------------------------------------------------------------------------

@pytest.fixture
def untimed(monkeypatch):
    "No model may be timed"
    monkeypatch.setattr('fastkd.size_and_speed.milliseconds', lambda *args: pytest.fail('a model was timed'))

@pytest.mark.parametrize('student,teacher,xb,error,says', [
    (net, net(), images(), TypeError, "The student should be a model, a `Learner` or a `Teacher` of models, got net."),
    (net(), 'resnet34', images(), TypeError, "The teacher should be a model, a `Learner` or a `Teacher` of models, got str."),
    (net(), Teacher(lambda x: x), images(), TypeError, "The teacher should be a model"),
    (net(), None, images(), TypeError, "got NoneType"),
    (net(), net().to('meta'), images(), ValueError, "The parameter 'conv1.weight' of the teacher has no values yet"),
    (net(), nn.LazyLinear(3), images(), ValueError, "The parameter 'weight' of the teacher has no values yet"),
    (net(), net(), None, TypeError, "Give `xb`, a batch of inputs"),
    (net(), net(), 'cat.jpg', TypeError, "`xb` should be a tensor"),
    (net(), net(), torch.tensor(1.), TypeError, "`xb` should be a tensor"),
    (net(), net(), (), TypeError, "`xb` should be a tensor"),
    (net(), net(), images(0), ValueError, r"`xb` has no items: its shape is \(0, 1, 8, 8\)"),
    (net(), net(), torch.randn(2,3,8,8), ValueError, r"The student cannot run on inputs of shape \(2, 3, 8, 8\)"),
    (net(), Two(3), images(), ValueError, "The teacher cannot run on inputs"),
    (nn.Sequential(nn.Flatten(0), nn.Linear(128,2)), net(), images(2), ValueError, "The student cannot run on inputs"),  # one item is too few
])
def test_bad_input_is_refused_before_anything_is_timed(untimed, student, teacher, xb, error, says):
    with pytest.raises(error, match=says): size_and_speed(student, teacher, xb)

def test_no_time_is_no_time(untimed):
    with pytest.raises(ValueError, match='`seconds` should be above 0, got 0'): size_and_speed(net(), net(), images(), seconds=0)

def test_a_learner_without_validation_items(untimed):
    learn = learner()
    for dls in (DataLoaders(learn.dls.train), DataLoaders(learn.dls.train, learn.dls.valid.new(dataset=[]))):
        learn.dls = dls
        with pytest.raises(TypeError, match='Give `xb`'): size_and_speed(learn, net())

# --- how it shows --------------------------------------------------------------------------------------------------

def test_how_it_shows():
    from fastkd.size_and_speed import SizeTable
    table = SizeTable(dict(student=[11689512., .1234567, 99.96, float('nan')]), index=list('abcd'))
    assert repr(table).split() == ['student','a','11,689,512','b','0.123','c','100','d'] and '11,689,512' in table._repr_html_()
    assert isinstance(table.loc[['a']], SizeTable)

@pytest.mark.cuda
def test_cuda():
    student,teacher = net().cuda().half(),learner(model=net(width=8).cuda(), metrics=accuracy)
    for a,b in ((student,teacher),(teacher,student),(net(),student)):
        table = measured(a, b, images())
        assert (table.iloc[:5] > 0).all().all()
    assert next(student.parameters()).is_cuda and next(teacher.model.parameters()).is_cuda
