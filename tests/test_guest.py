"Promise 2: the teacher is a guest. Promise 3: only `fit` distils"
import pytest, torch
import fastai.vision.all
from torch import nn
from fastai.basics import DataLoader, DataLoaders
from fastai.callback.core import Callback
from fastai.callback.schedule import *
from fastai.callback.hook import *  # summary
from fastkd.all import *
from conftest import batches, hooks, learner, net, same, weights

def test_names_are_guests_too():
    "`from fastkd.all import *` hides no name of fastai"
    public = {}
    exec('from fastkd.all import *', public)
    public = [n for n in public if n != '__builtins__']
    assert 30 <= len(public) <= 50 and not [n for n in public if hasattr(fastai.vision.all, n) or n == 'fastkd']

class Spy(nn.Module):
    "A teacher that writes down how it is run"
    def __init__(self):
        super().__init__()
        self.net,self.seen = net(width=6, seed=7),[]
    def forward(self, x):
        self.seen.append((torch.is_grad_enabled(), self.training or self.net.bn1.training, len(x)))
        return self.net(x)

def state(model):
    return ([m.training for m in model.modules()], [(p.requires_grad, p.device, p.dtype, p.grad) for p in model.parameters()], len(hooks(model)))

@pytest.mark.parametrize('wrap', [lambda m: m, lambda m: learner(model=m), lambda m: [m], lambda m: Teacher(m)], ids=['module','learner','list','Teacher'])
def test_run_without_gradient_in_eval_and_put_back(wrap):
    teacher = Spy()
    teacher.net.conv1.weight.requires_grad_(False)
    teacher.net.bn2.eval(); teacher.net.drop.eval()
    teacher.net.register_forward_hook(lambda *args: None)
    before,values = state(teacher),weights(teacher)
    learner().fit(2, cbs=KnowledgeDistillationCallback(wrap(teacher), [SoftTarget,Attention], ['conv1'], ['net.conv1']))
    assert state(teacher) == before and same(values, weights(teacher))
    assert len(teacher.seen) == 2*3 and not any(grad or training for grad,training,_ in teacher.seen)

def test_a_teacher_on_another_device_comes_and_goes():
    "The meta device stands for another one: it can be left, and it can be told"
    moves = []
    class Moved(nn.Linear):
        def to(self, device): moves.append(torch.device(device)); return self
    away = Moved(2, 2, device='meta')
    with Teacher(away).on('cpu'): assert moves == [torch.device('cpu')]
    assert moves == [torch.device('cpu'), torch.device('meta')]

def test_shared_modules_train_in_the_student_and_rest_in_the_teacher():
    body = nn.Sequential(nn.Conv2d(1,4,3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    student,teacher = nn.Sequential(body, nn.Linear(4,3)),nn.Sequential(body, nn.Linear(4,3))
    seen = []
    body[1].register_forward_hook(lambda m, i, o: seen.append(m.training))
    learner(model=student).fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))
    assert seen[:6] == [False,True]*3
    assert body[1].num_batches_tracked == 3

def test_a_plain_callable_teaches():
    seen = []
    def teacher(x):
        seen.append(torch.is_grad_enabled())
        return (x.flatten(1)[:,:3]*2, 'more')
    learn = learner()
    kd = KnowledgeDistillationCallback(teacher, SoftTarget)
    learn.fit(1, cbs=kd)
    assert seen and not any(seen) and kd.curves['train']['kd_loss'][0] > 0

def test_several_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self, out): super().__init__(); self.a,self.out = nn.Linear(2,3),out
        def forward(self, x, z): return self.out(self.a(x) + z)
    g = torch.Generator().manual_seed(0)
    from fastai.basics import DataLoaders
    items = [(torch.randn(2, generator=g), torch.randn(3, generator=g), torch.tensor(i%3)) for i in range(16)]
    dls = DataLoaders.from_dsets(items, items, bs=8, num_workers=0, device='cpu')
    dls.n_inp = 2
    teacher = Two(lambda o: (o, o+1))
    kd = KnowledgeDistillationCallback(teacher, SoftTarget)
    learner(dls, Two(lambda o: o)).fit(1, cbs=kd)
    assert kd.curves['train']['kd_loss'][0] > 0

def test_the_teacher_sees_its_own_inputs():
    seen = []
    def teacher(x): seen.append(x.shape); return torch.zeros(len(x), 3)
    learner().fit(1, cbs=KnowledgeDistillationCallback(Teacher(teacher, inputs=lambda x: nn.functional.interpolate(x, scale_factor=2.)), SoftTarget))
    assert seen[0] == (8,1,16,16)

def test_the_forward_ends_after_the_last_layer_where_no_logits_are_needed():
    teacher = net(width=6, seed=7)
    ran = []
    teacher.fc.register_forward_hook(lambda *args: ran.append('fc'))
    teacher.conv2.register_forward_hook(lambda *args: ran.append('conv2'))
    learner().fit(1, cbs=KnowledgeDistillationCallback(teacher, Attention, ['relu1'], ['relu1']))
    assert ran == ['conv2','fc']*2  # once to find the channels, and in the first batch, which shows what runs

def test_a_teacher_with_a_hidden_state_always_runs_to_its_end():
    "It would lose its state, or keep an old one"
    class Remembers(nn.Module):
        def __init__(self): super().__init__(); self.a,self.fc,self.n = nn.Linear(64,8),nn.Linear(8,3),0
        def forward(self, x): z = self.fc(self.a(x.flatten(1))); self.n += 1; return z
    teacher = Remembers()
    learner(model=Remembers()).fit(2, cbs=KnowledgeDistillationCallback(teacher, FitNet, 'a', 'a'))
    assert teacher.n == 6

def test_a_layer_that_runs_more_often_for_other_inputs_is_not_stopped_early():
    class Chunks(nn.Module):
        def __init__(self): super().__init__(); torch.manual_seed(1); self.enc,self.fc = nn.Linear(1,6),nn.Linear(6,4)
        def forward(self, x): return self.fc(torch.cat([self.enc(c[...,None]) for c in x.split(4, 1)], 1).mean(1))
    t,seen = Chunks(),[]
    def last(fm_s, fm_t):
        seen.append(fm_t['enc','enc'].clone())
        return fm_s['enc','enc'].mean()
    data = [(torch.randn(8,n), torch.randint(3, (8,))) for n in (4,8,4,8,12)]
    dls = DataLoaders(DataLoader(data, bs=None, num_workers=0), DataLoader(data[:1], bs=None, num_workers=0))
    learner(dls, Chunks(), loss_func=nn.functional.cross_entropy).fit(1, cbs=KnowledgeDistillationCallback(t, last, 'enc', 'enc'))
    for (x,_),a in zip(data, seen): assert torch.equal(a.mT, t.enc(x[:,-4:,None]))  # channels first

def outside(learn):
    "What a learner does outside of a fit"
    return [*learn.validate(), *learn.get_preds()[0].flatten().tolist(), *learn.get_preds(with_loss=True)[2].tolist()]

@pytest.mark.parametrize('loss', [SoftTarget, Attention])
def test_only_fit_distils(loss):
    plain = learner(batches(shuffle=False), model=net(seed=1))
    expected = outside(plain)
    teacher = Spy()
    learn = learner(model=net(seed=1), cbs=KnowledgeDistillationCallback(teacher, loss, *([['conv1'],['net.conv1']] if loss is Attention else [])))
    assert outside(learn) == expected and not teacher.seen
    learn.summary()
    assert not teacher.seen and not hooks(learn.model, teacher)
    learn.fit(1)
    n = len(teacher.seen)
    assert n
    outside(learn); learn.summary()
    assert len(teacher.seen) == n and len(learn.metrics) == 0

def test_what_looks_like_a_fit_leaves_the_last_ones_curves():
    "`tta`, and `with learn`, send the events of a fit; also inside one"
    learn = learner(batches(shuffle=False), cbs=KnowledgeDistillationCallback(Spy(), SoftTarget))
    kd = learn.knowledge_distillation
    class Open(Callback):
        order = 30
        def after_train(self):
            with self.learn: pass
    learn.fit(2, cbs=Open())
    assert len(kd.curves['train']['kd_loss']) == 6 and 'kd_loss' in list(learn.recorder.metric_names)
    before = str(kd.curves)
    with learn: pass
    assert str(kd.curves) == before and not learn.metrics
    with learn.no_mbar(): learn.fit(1)
    assert len(kd.curves['train']['kd_loss']) == 3

def test_batches_outside_of_a_fit_are_the_students_own():
    "`with learn`, before the first fit and after it; what a failing callback leaves open ends with the next fit"
    teacher = Spy()
    learn = learner(batches(shuffle=False), cbs=KnowledgeDistillationCallback(teacher, Attention, ['conv2'], ['net.conv2']))
    kd = learn.knowledge_distillation
    for _ in range(2):
        teacher.seen.clear()
        with learn: learn._do_epoch_validate()
        assert not teacher.seen and kd.session is None and not hooks(learn.model, teacher)
        learn.fit(1)
        assert len(kd.curves['train']['kd_loss']) == 3
    class Fails(Callback):
        order = 30
        def before_fit(self): raise KeyError('of its own')
    learn.add_cb(Fails())
    with pytest.raises(KeyError):
        with learn: pass
    learn.remove_cb(Fails)
    learn.fit(2)
    assert len(kd.curves['steps']) == 2

def test_lr_find_distils():
    teacher = Spy()
    learn = learner(cbs=KnowledgeDistillationCallback(teacher, SoftTarget))
    before = weights(learn.model)
    learn.lr_find(num_it=4, show_plot=False)
    assert teacher.seen and same(before, weights(learn.model)) and len(learn.metrics) == 0

def test_validate_within_a_fit_leaves_the_fit_alone():
    "Another callback validates in the middle of an epoch; fastai resets its own progress then, the distillation goes on"
    class Peek(Callback):
        order = 70
        def after_epoch(self):
            if self.epoch == 0 and self.create_mbar: self.results = self.learn.validate()
    teacher,peek = Spy(),Peek()
    learn = learner()
    kd = KnowledgeDistillationCallback(teacher, SoftTarget)
    learn.fit(2, cbs=[kd,peek])
    assert len(teacher.seen) == 2*3
    assert len(kd.curves['train']['kd_loss']) == 6 and len(learn.metrics) == 0

def test_the_same_callback_in_two_learners():
    kd = KnowledgeDistillationCallback(net(width=6, seed=7), Attention)
    a,b = learner(batches(shuffle=False), model=net(seed=1)),learner(batches(shuffle=False), model=net(seed=1))
    a.fit(1, cbs=kd); torch.manual_seed(0); b.fit(1, cbs=kd)
    fresh = learner(batches(shuffle=False), model=net(seed=1))
    torch.manual_seed(0); fresh.fit(1, cbs=KnowledgeDistillationCallback(net(width=6, seed=7), Attention))
    assert same(weights(b.model), weights(fresh.model)) and not hooks(a.model, b.model)
