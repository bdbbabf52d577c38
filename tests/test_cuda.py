"On a card: `pytest -m cuda`. What a CPU can do as well runs there too, so that it works the first time on a card"
import gc, os, subprocess, sys
from pathlib import Path
import pytest, torch
from torch import nn
from torch.utils.data import TensorDataset
from fastai.basics import Callback, DataLoader, DataLoaders
from fastai.callback.channelslast import *
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import *
from fastai.callback.training import GradientClip
from fastkd.all import *
from conftest import batches, hooks, learner, net, same, weights
from test_export import exported

on_a_card = pytest.mark.cuda
devices = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=on_a_card)])
KD = KnowledgeDistillationCallback

@pytest.fixture(autouse=True)
def exact():
    "Without TF32, so that a card and a CPU agree"
    kept = torch.backends.cuda.matmul.allow_tf32,torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32,torch.backends.cudnn.allow_tf32 = kept

def learner_on(device, model=None, **kwargs):
    dls = batches(shuffle=False)
    dls.to(torch.device(device))
    return learner(dls, (model or net(seed=1)).to(device), **kwargs)

def teacher(): return net(width=6, seed=7)
losses = {'logits': lambda: KD(teacher(), SoftTarget), 'maps': lambda: KD(teacher(), Attention), 'parameters': lambda: KD(teacher(), FitNet, weight=.5),
          'all': lambda: KD(teacher(), [SoftTarget,FitNet,Similarity], ['conv2'], ['conv2'], weight=[.3,.5,10], label_weight=.5)}

class Amp(MixedPrecision):
    "fastai's, also on a CPU; `scale` is where its scaler begins"
    def __init__(self, mode, scale=2.**10): super().__init__(mode); self.scale = scale
    def before_fit(self):
        device = self.dls.device.type
        super().before_fit()
        self.autocast = torch.autocast(device, dtype=torch.bfloat16 if self.amp_mode.value == 'bf16' else torch.float16)
        self.learn.scaler = torch.amp.GradScaler(device, init_scale=self.scale, enabled=self.amp_mode.value == 'fp16')

class Parameters(Callback):
    "What the student and the losses hold before each backward, and at the end of the training"
    order = 30
    def __init__(self, kd): self.kd,self.seen = kd,[]
    def before_backward(self): self.seen.append([p.detach().clone() for p in (*self.model.parameters(), *self.kd.session.loss_params.params)])
    def after_train(self): self.before_backward()
    def moved(self, i): return [not torch.equal(a, b) for a,b in zip(self.seen[i], self.seen[i+1])]

quiet = pytest.mark.filterwarnings('ignore:.*GradScaler.*', 'ignore:.*CUDA is not available.*', 'ignore:.*lr_scheduler.*')

# the numbers of a card

@on_a_card
@pytest.mark.parametrize('kind', ['logits','maps'])  # what FitNet's parameters start from differs between devices
def test_a_card_trains_as_a_cpu_does(kind):
    fits = []
    for device in 'cpu','cuda':
        learn,kd = learner_on(device),losses[kind]()
        learn.fit(2, .05, cbs=kd)
        fits.append((learn, kd.curves['train']))
    (a,on_cpu),(b,on_card) = fits
    assert {c: v[:3] for c,v in on_card.items()} == {c: pytest.approx(v[:3], rel=2e-3) for c,v in on_cpu.items()}
    assert all(torch.allclose(p, q.cpu(), rtol=1e-2, atol=1e-3) for p,q in zip(a.model.parameters(), b.model.parameters()))

@on_a_card
def test_every_loss_is_the_same_on_a_card():
    g = torch.Generator().manual_seed(0)
    s,t,y = torch.randn(16,5, generator=g),torch.randn(16,5, generator=g),torch.randint(5, (16,), generator=g)
    for loss in (SoftTarget(), SoftTarget(T=20), Logits(), DecoupledKD(), NormalizedKD(), DIST(), Mutual()):
        inputs = dict(pred=s, teacher_pred=t, **({'target': y} if 'target' in loss.needs else {}))
        assert loss(**inputs).item() == pytest.approx(loss(**{k: v.cuda() for k,v in inputs.items()}).item(), rel=1e-4), loss.name
    fm = [{('a','a'): torch.randn(8,4,6,6, generator=g)} for _ in range(2)]
    for loss in (Attention(), Cosine(), Similarity(), RKD(), PKT(), NST()):
        there = [{k: v.cuda() for k,v in o.items()} for o in fm]
        assert loss(fm_s=fm[0], fm_t=fm[1]).item() == pytest.approx(loss(fm_s=there[0], fm_t=there[1]).item(), rel=1e-3), loss.name

# the teacher's place

@devices
@pytest.mark.parametrize('kind', losses)
def test_the_teacher_comes_and_goes_back(device, kind):
    "From the CPU to where the student is, and back, with its weights as they were"
    kd = losses[kind]()
    t = kd.teacher.models[0]
    before,seen = weights(t),[]
    t.conv1.register_forward_pre_hook(lambda m,x: seen.append((m.weight.device.type, x[0].device.type)))
    learner_on(device).fit(1, cbs=kd)
    assert set(seen) == {(device,device)} and {p.device.type for p in t.parameters()} == {'cpu'} and same(before, weights(t)) and all(m.training for m in t.modules())

@on_a_card
def test_a_teacher_that_lives_on_the_card_stays():
    t = teacher().cuda()
    learner_on('cuda').fit(1, cbs=KD(t, SoftTarget))
    assert {p.device.type for p in t.parameters()} == {'cuda'}

@on_a_card
def test_a_teacher_on_the_card_for_a_student_on_the_cpu():
    t = teacher().cuda()
    kd = KD(t, SoftTarget)
    learner_on('cpu').fit(1, cbs=kd)
    assert {p.device.type for p in t.parameters()} == {'cuda'} and kd.curves['train']['kd_loss'][0] > 0

class Spread(nn.Module):
    "A model spread over two devices"
    def __init__(self, first, second):
        super().__init__()
        layers = list(net(width=6, seed=7))
        self.first,self.second = nn.Sequential(*layers[:3]).to(first),nn.Sequential(*layers[3:]).to(second)
    def forward(self, x):
        a,b = [next(m.parameters()).device for m in (self.first,self.second)]
        return self.second(self.first(x.to(a)).to(b))

@on_a_card
@pytest.mark.parametrize('other', ['cpu','cuda:1'])
def test_a_teacher_spread_over_devices_stays_spread(other):
    if other == 'cuda:1' and torch.cuda.device_count() < 2: pytest.skip('one card')
    t,whole = Spread(other, 'cuda:0'),KD(teacher(), SoftTarget)
    learner_on('cuda').fit(1, 0., cbs=whole)
    kd = KD(t, SoftTarget)
    learner_on('cuda').fit(1, 0., cbs=kd)
    assert {str(p.device) for p in t.parameters()} == {other,'cuda:0'}
    assert kd.curves['train']['kd_loss'] == pytest.approx(whole.curves['train']['kd_loss'], rel=1e-3)

# half precision

@quiet
@devices
@pytest.mark.parametrize('mode', ['fp16','bf16'])
@pytest.mark.parametrize('kind', losses)
def test_mixed_precision(device, mode, kind):
    "The terms are those of single precision, as far as half precision goes; nothing is left"
    values = []
    for cbs in [],[Amp(mode)]:
        learn,kd = learner_on(device),losses[kind]()
        torch.manual_seed(3)
        learn.fit(1, 0., cbs=[kd, *cbs])
        values.append(torch.tensor(list(kd.curves['train'].values())))
        assert not hooks(learn.model, kd.teacher.models[0]) and not torch.is_autocast_enabled(device) and {p.dtype for p in learn.model.parameters()} == {torch.float32}
    assert values[0].isfinite().all() and torch.allclose(*values, rtol=.15, atol=.02)

@quiet
@devices
def test_a_step_that_the_scaler_skips(device):
    "Neither the student nor a loss's parameters move; the next steps do"
    kd = losses['parameters']()
    learn = learner_on(device)
    watch = Parameters(kd)
    class Overflow(Callback):
        "An infinite gradient in the second batch"
        order = 5
        def before_backward(self):
            if self.iter == 1: self.learn.loss_grad = self.learn.loss_grad*float('inf')
    learn.fit(1, cbs=[Amp('fp16'), kd, watch, Overflow()])
    assert all(watch.moved(0)) and not any(watch.moved(1)) and all(watch.moved(2)) and len(watch.seen) == 4
    assert len(watch.seen[0]) > len(list(learn.model.parameters()))
    assert all(p.isfinite().all() for p in learn.model.parameters())

@quiet
@devices
def test_clipping_in_half_precision_reaches_the_losses_parameters(device):
    "One norm over both, after the scaler's factor is taken out"
    norms = []
    class Norm(Callback):
        order = 2000
        def before_step(self): norms.append(torch.stack([p.grad.norm() for p in (*self.model.parameters(), *kd.session.loss_params.params)]))
    kd = losses['parameters']()
    learner_on(device).fit(1, cbs=[Amp('fp16'), GradientClip(.01), kd, Norm()])
    ours = len(list(net().parameters()))
    assert len(norms) and all(n[:ours].norm() < .0101 and n[ours:].norm() < .0101 for n in norms)

@quiet
@devices
@pytest.mark.parametrize('mode', ['fp16','bf16'])
def test_a_moving_average_in_half_precision(device, mode):
    "The average itself is kept in single precision"
    kd = KD(EMATeacher(.5), SoftTarget)
    learn = learner_on(device)
    learn.fit(2, cbs=[Amp(mode), kd])
    model = kd.teacher.models[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32} and all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(a.cpu(), b.cpu()) for a,b in zip(model.parameters(), learn.model.parameters()))

@devices
@pytest.mark.parametrize('kind', ['logits','maps'])
def test_channels_last(device, kind):
    values = []
    for last in False,True:
        learn,kd = learner_on(device),losses[kind]()
        if last:
            learn.to_channelslast(use_amp=False)
            kd = KD(Teacher(teacher(), channels_last=True), kd.objective.terms[0].loss)
        learn.fit(1, cbs=kd)
        values.append(kd.curves['train']['kd_loss'])
    assert values[0] == pytest.approx(values[1], rel=1e-3)

@devices
def test_a_teacher_in_bfloat16(device):
    t = teacher()
    kd,plain = KD(Teacher(t, dtype=torch.bfloat16, channels_last=True), SoftTarget),KD(teacher(), SoftTarget)
    for o in kd,plain: learner_on(device).fit(1, 0., cbs=o)
    assert kd.curves['train']['kd_loss'] == pytest.approx(plain.curves['train']['kd_loss'], rel=.1) and {p.dtype for p in t.parameters()} == {torch.float32}

# compiled models

@on_a_card
@pytest.mark.parametrize('loss', [SoftTarget, Attention], ids=['logits','maps'])
def test_compiled_models(loss):
    values = []
    for compiled in False,True:
        model = net(seed=1).cuda()
        learn = learner_on('cuda', model)
        if compiled: learn.model = torch.compile(model)
        kd = KD(Teacher(teacher(), compile=compiled), loss, *(() if loss is SoftTarget else (['relu1','relu2'],)*2))
        learn.fit(2, .05, cbs=kd)
        values.append(kd.curves['train']['kd_loss'])
        assert not hooks(model, kd.teacher.models[0])
    assert values[0] == pytest.approx(values[1], rel=1e-2)

# batches

def tensors(device, bs=8, pin=False):
    "Plain tensors in PyTorch's loaders; `pin`ned on the CPU if there is a card"
    g = torch.Generator().manual_seed(0)
    x,y = torch.randn(24,1,8,8, generator=g),torch.randint(3, (24,), generator=g)
    make = lambda: torch.utils.data.DataLoader(TensorDataset(x, y), bs, pin_memory=pin and torch.cuda.is_available())
    return DataLoaders(make(), make(), device=torch.device(device))

@devices
@pytest.mark.parametrize('pin', [False,True])
def test_the_cache_knows_its_rows_on_any_device(device, pin, tmp_path):
    "The teacher runs in the first epoch only, and another fit of another device is answered from the folder"
    calls,t = [],teacher()
    t.fc.register_forward_hook(lambda m,x,o: calls.append(len(o)))
    def fit(device, n):
        kd = KD(Teacher(t, cache=tmp_path/'logits'), SoftTarget)
        learner(tensors(device, pin=pin), net(seed=1).to(device)).fit(n, 0., cbs=kd)
        return kd.curves['train']['kd_loss']
    first = fit(device, 2)
    assert sum(calls) <= 24 + 8 and first[:3] == pytest.approx(first[3:], rel=1e-5)
    calls.clear()
    assert fit('cpu', 1) == pytest.approx(first[:3], rel=1e-3) and sum(calls) <= 8  # a handful is run again, to know the owner

@devices
def test_mixup_on_the_device(device):
    "The teacher sees the mixed inputs, where the student does"
    xs = {'student': [], 'teacher': []}
    kd,learn = losses['logits'](),learner_on(device)
    kd.teacher.models[0].conv1.register_forward_pre_hook(lambda m,i: xs['teacher'].append(i[0].clone()))
    learn.model.conv1.register_forward_pre_hook(lambda m,i: xs['student'].append(i[0].clone()) if m.training else None)
    learn.fit(1, cbs=[MixUp(), kd])
    assert len(xs['teacher']) == 3 and all(torch.equal(a, b) and a.device.type == device for a,b in zip(*xs.values()))

# what comes again, and where a student starts

@devices
@pytest.mark.parametrize('place', ['memory','folder'])
def test_views_repeat_what_is_drawn_on_the_device(device, place, tmp_path):
    "augmentation on the card, MixUp and rows without labels come again to the bit, and the cache knows them; what the student draws does not come again"
    class Noise(Callback):
        order = 5
        def before_batch(self):
            if self.training: self.learn.xb = (self.x + torch.randn_like(self.x),)
    class Seen(Callback):
        order = 1001
        def __init__(self): self.inputs,self.own,self.rows,self.teacher = [],[],[],0
        def before_train(self): self.teacher = 0
        def before_batch(self):
            if self.training:
                self.inputs.append(self.x.cpu())
                self.own.append(torch.rand(1, device=device).item())
        def after_train(self): self.rows.append(self.teacher)
    seen,model,learn = Seen(),teacher(),learner_on(device)
    def count(m, args): seen.teacher += len(args[0])
    model.register_forward_pre_hook(count)
    more = DataLoader([(torch.randn(1, 8, 8),) for _ in range(24)], bs=8, shuffle=True, num_workers=0, device=torch.device(device))
    cache = Cache(tmp_path if place == 'folder' else None, views=2)
    learn.fit(5, cbs=[KD(Teacher(model, cache=cache), SoftTarget, unlabeled=more), Noise(), MixUp(.4), seen])
    n = len(seen.inputs)//5
    epochs = [seen.inputs[i*n:(i+1)*n] for i in range(5)]
    assert all(map(torch.equal, epochs[0], epochs[2])) and all(map(torch.equal, epochs[1], epochs[3])) and not torch.equal(epochs[0][0], epochs[1][0])
    assert seen.rows[1] == 16*n and seen.rows[2:] == [0,0,0] and len(set(seen.own)) == len(seen.own)

@devices
def test_a_student_starts_from_a_teacher_elsewhere(device):
    learn,other = learner_on(device),teacher()  # the teacher is on the CPU
    init_from_teacher(learn, other)
    assert torch.equal(learn.model.conv1.weight.cpu(), other.conv1.weight[[0,1,3,4]]) and learn.model.conv1.weight.device.type == device
    learn.fit(1)

# what is left

@on_a_card
@pytest.mark.parametrize('kind', losses)
def test_a_fit_keeps_no_memory(kind):
    "After a second fit as much is allocated as after the first"
    learn,kd = learner_on('cuda'),losses[kind]()
    def allocated():
        learn.fit(1, cbs=kd)
        learn.opt = learn.pred = learn.loss = learn.loss_grad = None
        gc.collect()
        return torch.cuda.memory_allocated()
    allocated()
    assert allocated() <= allocated()

@on_a_card
def test_the_peak_is_that_of_a_step_with_the_teachers_forward():
    "Beside a hand-written loop that runs the teacher without gradients"
    def wide(seed): torch.manual_seed(seed); return nn.Sequential(*[o for i in range(4) for o in (nn.Conv2d(3 if i == 0 else 64, 64, 3, padding=1), nn.ReLU())], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64,3)).cuda()
    g = torch.Generator().manual_seed(0)
    x,y = torch.randn(64,3,64,64, generator=g),torch.randint(3, (64,), generator=g)
    dls = DataLoaders.from_dsets(*[list(zip(x, y))]*2, bs=32, num_workers=0, device='cuda')
    def peak(f):
        gc.collect(); torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
        f()
        return torch.cuda.max_memory_allocated()
    class Floor(Callback):
        def __init__(self, t): self.t = t
        def before_batch(self):
            if self.training:
                with torch.no_grad(): self.t(*self.xb)
    s,t = wide(1),wide(2).eval()
    fit = lambda cb: learner(dls, s).fit(1, 0., cbs=cb)
    assert peak(lambda: fit(KD(t, SoftTarget))) <= 1.02*peak(lambda: fit(Floor(t)))

@quiet
@devices
def test_lr_find(device):
    learn,kd = learner_on(device),losses['all']()
    before = weights(learn.model)
    with learn.added_cbs(kd): learn.lr_find(num_it=6, show_plot=False)
    assert same(before, weights(learn.model)) and not hooks(learn.model, kd.teacher.models[0])
    assert {p.device.type for p in kd.teacher.models[0].parameters()} == {'cpu'}

@devices
def test_an_export_loads_without_the_card_and_without_fastkd(device, tmp_path):
    learn = exported(tmp_path, 'student')
    learn.dls.to(torch.device(device))
    learn.model.to(device)
    learn.fit(1, cbs=losses['all']())
    learn.export('student.pkl')
    x = torch.randn(4,1,8,8, generator=torch.Generator().manual_seed(1))
    learn.model.eval()
    with torch.no_grad(): expected = learn.model(x.to(device)).cpu()
    torch.save((x, expected), tmp_path/'expected.pth')
    code = ("import sys, torch; sys.modules['fastkd'] = None\n"
            "from fastai.basics import load_learner\n"
            f"x,y = torch.load({str(tmp_path/'expected.pth')!r})\n"
            f"m = load_learner({str(tmp_path/'student.pkl')!r}).model\n"
            "assert next(m.parameters()).device.type == 'cpu' and torch.allclose(m.eval()(x), y, rtol=1e-3, atol=1e-4)")
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': '',}
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr

@on_a_card
@pytest.mark.parametrize('backend', ['gloo','nccl'])
def test_two_processes(backend, tmp_path):
    "On one card with gloo; nccl wants a card for each"
    if backend == 'nccl' and torch.cuda.device_count() < 2: pytest.skip('one card: nccl allows one process on each')
    from test_distributed import free_port
    env = {**os.environ, 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port()), 'PYTHONPATH': os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent), os.environ.get('PYTHONPATH', '')])}
    code = ("import torch, torch.distributed as dist, os\nfrom conftest import *\nfrom fastkd.all import *\nfrom test_cuda import learner_on, losses\n"
            f"rank = int(os.environ['RANK']); torch.cuda.set_device(rank if {backend!r} == 'nccl' else 0)\n"
            f"dist.init_process_group({backend!r})\n"
            "learn = learner_on('cuda')\nlearn.model = nn.parallel.DistributedDataParallel(learn.model)\n"
            "kd = losses['all']()\ntorch.manual_seed(rank)\nlearn.fit(2, .05, cbs=kd)\n"
            f"torch.save({{k: v.cpu() for k,v in learn.model.module.state_dict().items()}}, {str(tmp_path)!r} + f'/{{rank}}.pth')\nos._exit(0)")
    ranks = [subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code], env={**env, 'RANK': str(r), 'LOCAL_RANK': str(r)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(2)]
    said = [r.communicate(timeout=240)[0] for r in ranks]
    assert all(r.returncode == 0 for r in ranks), '\n'.join(said)
    assert same(*[torch.load(tmp_path/f'{r}.pth') for r in range(2)])
