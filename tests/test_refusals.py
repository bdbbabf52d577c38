"Promise 8: what cannot work is refused at the start of the fit, with the cure in the message"
import copy, math, pickle, pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.callback.mixup import MixUp
from fastai.losses import BCEWithLogitsLossFlat, MSELossFlat
from fastkd.all import *
from conftest import batches, hooks, learner, net, same, weights

def refused(exc, match, *args, learn=None, cbs=(), **kwargs):
    "The fit is refused before a weight has moved, and the learner is as before"
    learn = learn or learner()
    before = weights(learn.model)
    with pytest.raises(exc, match=match): learn.fit(1, cbs=[KnowledgeDistillationCallback(*args, **kwargs), *cbs])
    params = [k for k,_ in learn.model.named_parameters()]
    assert all(torch.equal(before[k], weights(learn.model)[k]) for k in params) and not hooks(learn.model) and not learn.metrics

def test_unknown_layer_names_the_nearest_of_the_right_model():
    refused(ValueError, "'conv3' of the student.*'conv1'|'conv2'", net(), Attention, 'conv3', 'conv1')
    refused(ValueError, "'bn9' of the teacher", net(), Attention, 'bn1', 'bn9')
    refused(ValueError, 'Parameter, not a layer', net(), Attention, 'conv1.weight', 'conv1')
    refused(ValueError, 'method, not a layer', net(), Attention, 'forward', 'conv1')

@pytest.mark.parametrize('s,t', [(['conv1','conv2'],['conv1']), ('conv1',None), (None,['conv1']), ([],['conv1']), ([],[])])
def test_unequal_lists(s, t): refused(ValueError, 'pairs', net(), Attention, s, t)

def test_the_same_pair_twice(): refused(ValueError, 'twice', net(), Attention, ['conv1','bn1','conv1'], ['conv1','bn1','conv1'])

def test_one_layer_in_two_pairs_works():
    kd = KnowledgeDistillationCallback(net(width=6, seed=7), Attention, ['bn1','bn1'], ['conv1','bn1'])
    learner().fit(1, cbs=kd)
    assert kd.pairs == [('bn1','conv1'),('bn1','bn1')]

def test_two_names_of_one_module():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(1,4,3), relu, nn.Conv2d(4,4,3), relu, nn.Flatten(), nn.Linear(64,3))
    refused(ValueError, "are the same module", net(), Attention, ['1','3'], ['conv1','conv2'], learn=learner(model=model))

def test_a_layer_that_never_runs():
    class Idle(nn.Module):
        def __init__(self): super().__init__(); self.net,self.idle = net(),nn.Linear(2,2)
        def forward(self, x): return self.net(x)
    refused(ValueError, "'idle' of the student.*did not run", net(), Attention, 'idle', 'conv1', learn=learner(model=Idle()))
    refused(ValueError, "'idle' of the teacher.*did not run", Idle(), Attention, 'conv1', 'idle')

def test_of_a_module_that_runs_twice_the_last_call_counts():
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.conv,self.fc = nn.Conv2d(1,1,3,padding=1),nn.Linear(64,3)
        def forward(self, x): return self.fc(self.conv(self.conv(x)+1).flatten(1))
    model,seen = Twice(),[]
    learn = learner(batches(shuffle=False), model)
    x = next(iter(learn.dls.train))[0]
    expected = model.conv(model.conv(x)+1).detach()
    learn.fit(1, lr=0, cbs=KnowledgeDistillationCallback(Twice(), lambda fm_s, fm_t: (seen.append(list(fm_s.values())[0].detach().clone()), sum(o.sum() for o in fm_s.values()))[1], 'conv', 'conv'))
    assert torch.allclose(seen[0], expected)

@pytest.mark.parametrize('loss', [SoftTarget, Logits, Mutual])
def test_other_number_of_classes(loss): refused(ValueError, r'\(8, 3\).*\(8, 5\)|same classes', net(classes=5), loss)

def test_a_column_against_none():
    student = nn.Sequential(nn.Flatten(), nn.Linear(64,1))
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64,1), nn.Flatten(0))
    refused(ValueError, r'\(8, 1\).*\(8,\)', teacher, Logits, learn=learner(model=student, loss_func=lambda p,y: p.mean()))

def test_soft_target_on_one_column():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64,1))
    refused(ValueError, 'column', nn.Sequential(nn.Flatten(), nn.Linear(64,1)), SoftTarget, learn=learner(model=model, loss_func=lambda p,y: p.mean()))

@pytest.mark.parametrize('teacher,what', [(None,'NoneType'), ('teacher.pth','str'), (nn.Linear,'class Linear'), ([],'empty'), ([None],'NoneType'), (3,'int')])
def test_no_model_as_teacher(teacher, what): refused(TypeError, what, teacher, SoftTarget)

def test_the_student_as_its_own_teacher():
    learn = learner()
    refused(ValueError, 'student itself', learn.model, SoftTarget, learn=learn)
    refused(ValueError, 'student itself', learn, SoftTarget, learn=learn)

def test_a_function_as_teacher_has_no_layers(): refused(ValueError, 'no layers', lambda x: x, Attention, 'conv1', 'conv1')

def test_no_loss():
    refused(TypeError, 'function, got 3', net(), 3)
    refused(TypeError, r'write `\[SoftTarget\(T=4\), FitNet\(\)\]`', net(), 'soft(T=4)+fitnet')

def test_an_empty_list_of_losses(): refused(ValueError, 'empty', net(), [])

@pytest.mark.parametrize('loss', [lambda pred: pred, lambda pred: 1., lambda pred: None, lambda pred: F.mse_loss(pred, pred, reduction='none')])
def test_a_loss_that_is_no_number(loss): refused(ValueError, 'not one number', net(), loss)

def test_paper_weight_of_a_loss_without_one(): refused(ValueError, 'paper', net(), lambda pred: pred.sum(), weight='paper')

@pytest.mark.parametrize('T', [0, -1])
def test_temperature(T):
    with pytest.raises(ValueError, match='temperature'): SoftTarget(T=T)

@pytest.mark.parametrize('kwargs,match', [(dict(weight=-.1),'finite and non-negative'), (dict(weight=math.nan),'finite and non-negative'), (dict(weight=math.inf),'finite and non-negative'), (dict(weight=1.5),'label_weight'),
    (dict(weight=100),'label_weight'), (dict(weight=.5, label_weight=-1),'finite and non-negative'), (dict(weight=[.5]*2),'1 losses but 2'), (dict(weight='papers'),'paper')])
def test_weights(kwargs, match): refused(ValueError, match, net(), SoftTarget, **kwargs)

def test_weights_of_a_list_above_1(): refused(ValueError, 'label_weight', net(), [SoftTarget,Logits], weight=[.6,.6])

def test_a_one_channel_output_does_not_broadcast():
    student = nn.Sequential(nn.Conv2d(1,3,1))
    teacher = nn.Sequential(nn.Conv2d(1,1,1))
    refused(ValueError, r'\(8, 3, 8, 8\).*\(8, 1, 8, 8\)', teacher, Logits, learn=learner(model=student, loss_func=lambda p,y: p.mean()))

def test_nan_of_the_teacher_is_the_teachers():
    teacher = net()
    with torch.no_grad(): teacher.fc.bias[0] = math.nan
    refused(FloatingPointError, 'teacher', teacher, SoftTarget)
    with torch.no_grad(): teacher.conv1.bias[0] = math.nan
    refused(FloatingPointError, 'teacher', teacher, Attention, 'conv1', 'conv1')

def test_a_broken_teacher_is_found_where_its_logits_come_in_later():
    "`DecoupledKD` at its paper's weights is 0 in the first batch"
    teacher = net(width=6)
    teacher.fc.weight.data.fill_(float('nan'))
    refused(FloatingPointError, 'teacher', teacher, [FitNet(layers={'conv1':'conv1'}),DecoupledKD], weight='paper', label_weight=1.)

def test_labels_that_mixup_mixes():
    refused(ValueError, 'label', net(), lambda pred, target: pred.sum(), cbs=[MixUp()])

class Named(nn.Module):
    "A student whose layers have a learner's names"
    def __init__(self):
        super().__init__()
        self.model,self.loss,self.opt = nn.Conv2d(1,4,3),nn.BatchNorm2d(4),nn.Linear(4,3)
    def forward(self, x): return self.opt(self.loss(self.model(x)).mean((2,3)))

def test_layers_with_a_learners_names():
    kd = KnowledgeDistillationCallback(Named(), Attention, ['model','loss'], ['model','loss'])
    learner(model=Named()).fit(1, cbs=kd)
    assert kd.curves['train']['kd_loss'][0] > 0

def test_a_term_that_is_always_0_is_warned_about_once(recwarn):
    learner().fit(3, cbs=KnowledgeDistillationCallback(net(), lambda pred: pred.sum()*0))
    assert len([w for w in recwarn if 'exactly 0' in str(w.message)]) == 1

def test_layers_that_no_loss_uses_are_warned_about():
    with pytest.warns(UserWarning, match='none of the losses'): learner().fit(1, cbs=KnowledgeDistillationCallback(net(), SoftTarget, 'conv1', 'conv1'))

def test_left_out_the_pairs_are_found_and_said(capsys):
    kd = KnowledgeDistillationCallback(net(width=6, seed=7), Attention)
    learner().fit(1, cbs=kd)
    assert kd.pairs and 'layers relu1 ~ relu1' in capsys.readouterr().out

def test_two_callbacks_in_one_fit():
    kd = KnowledgeDistillationCallback(net(), SoftTarget)
    learn = learner(cbs=kd)
    for other in (kd, KnowledgeDistillationCallback(net(), Logits)):
        with pytest.raises(ValueError, match='two distillation callbacks'): learn.fit(1, cbs=other)
    learn.fit(1)

def test_copies_and_pickles_distil():
    "As `joblib` and `spawn` make them; a callback that silently does nothing must not exist"
    curves = []
    for f in (lambda o: o, copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        kd = f(KnowledgeDistillationCallback(net(width=6, seed=7), SoftTarget))
        learner(batches(shuffle=False)).fit(1, cbs=kd)
        curves.append(kd.curves)
        kd = f(kd)  # after a fit too
        learner(batches(shuffle=False)).fit(1, cbs=kd)
        curves.append(kd.curves)
    assert all(c == curves[0] for c in curves)

@pytest.mark.parametrize('loss', [nn.MSELoss(), nn.KLDivLoss(), F.kl_div, lambda pred, teacher_logits: 0.], ids=str)
def test_a_loss_that_asks_for_other_arguments(loss): refused(TypeError, 'wrap it|takes none', net(), loss)

@pytest.mark.parametrize('schedule', [lambda p: 4., lambda p: -1.])
def test_a_schedule_that_makes_a_weight_negative(schedule): refused(ValueError, 'negative weight', net(), SoftTarget, schedule=schedule)

def test_no_curves_before_a_fit():
    with pytest.raises(ValueError, match='no fit'): KnowledgeDistillationCallback(net(), SoftTarget).plot_losses()

def test_activations_of_a_student_on_several_devices():
    model = nn.DataParallel(net())
    model.device_ids = [0,1]  # as with two GPUs
    with pytest.raises(ValueError, match='distrib_ctx'): learner(model=model).fit(1, cbs=[KnowledgeDistillationCallback(net(), Attention, 'conv1', 'conv1')])
