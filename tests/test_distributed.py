"Two processes on half batches give what one gives on the whole"
import os, socket, subprocess, sys
from pathlib import Path
import pytest, torch
pytest.importorskip('accelerate')
from fastai.basics import Callback
from torch import nn
from fastkd.all import *
from conftest import batches, learner, net, weights
from distributed_worker import callback, plain_net

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def two_processes(worker, *args):
    "Run a script in two processes of one distributed fit, with these arguments"
    here = Path(__file__).parent
    env = {**os.environ, 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port()), 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1',
           'PYTHONPATH': os.pathsep.join([str(here), os.environ.get('PYTHONPATH') or str(here.parent)])}
    ranks = [subprocess.Popen([sys.executable, worker, *args], env={**env, 'RANK': str(r), 'LOCAL_RANK': str(r)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(2)]
    said = [r.communicate(timeout=240)[0] for r in ranks]
    assert all(r.returncode == 0 for r in ranks), '\n'.join(said)

#: What a worker begins with, and how it ends
head = """import sys, warnings; warnings.filterwarnings('ignore')
import torch
from torch import nn
from fastai.distributed import *
from fastai.basics import *
from fastkd.all import *
from conftest import batches, learner, net, weights
from distributed_worker import broadcast, plain_net
DistributedDL._broadcast = broadcast
"""
tail = """
torch.save(out, f'{sys.argv[1]}/rank{rank_distrib()}.pth')
sys.stdout.flush(); os._exit(0)  # gloo's threads sometimes abort an interpreter that ends
"""
def outputs_of(tmp_path, code):
    "What `code` has put into `out` in each of two processes"
    (tmp_path/'worker.py').write_text(head + code + tail)
    two_processes(tmp_path/'worker.py', tmp_path)
    return [torch.load(tmp_path/f'rank{r}.pth', weights_only=False) for r in range(2)]

@pytest.mark.parametrize('loss', ['SoftTarget','both','VID'])
def test_two_ranks_are_one(tmp_path, loss):
    two_processes(Path(__file__).parent/'distributed_worker.py', tmp_path, loss)
    a,b = [torch.load(tmp_path/f'rank{r}.pth') for r in range(2)]

    # a distributed loader gives each rank a half of the items: the whole batches are joined from the two halves
    dls = batches(n=24, bs=4, shuffle=False)
    items = list(dls.train_ds)
    joined = [items[i] for k in range(0, 12, 4) for i in [*range(k,k+4), *range(12+k,12+k+4)]]
    learn,kd = learner(type(dls).from_dsets(joined, list(dls.valid_ds), bs=8, shuffle=False, num_workers=0, device='cpu'), plain_net(1)),callback(loss)
    params = []
    watch = Callback(after_train=lambda cb: params.extend(p.detach().clone() for p in kd.session.loss_params.params))
    torch.manual_seed(3)
    learn.fit(2, cbs=[kd, watch])
    for rank in (a,b):
        for k,v in weights(learn.model).items(): assert torch.allclose(v, rank['model'][k], rtol=1e-4, atol=1e-6), k
        assert len(params) == len(rank['params']) and all(torch.allclose(p, q, rtol=1e-4, atol=1e-6) for p,q in zip(params, rank['params']))
        assert rank['hooks'] == 0
    assert a['row'][1:] == pytest.approx(list(learn.recorder.values[-1])[1:], rel=1e-4)

def test_a_model_replaced_at_the_start_of_the_fit_keeps_its_layers():
    "As `DistributedTrainer` does, which converts BatchNorm layers and wraps the model after the callback's own `before_fit`"
    class Replace(Callback):
        order = 11
        def before_fit(self): self.learn.model = nn.DataParallel(net(seed=1))
        def after_fit(self): self.learn.model = self.learn.model.module
    learn = learner()
    kd = KnowledgeDistillationCallback(net(width=6, seed=7), Attention, ['bn1'], ['bn1'])
    learn.fit(1, cbs=[kd, Replace()])
    assert kd.curves['train']['kd_loss'][0] > 0

def test_two_processes_have_one_peer(tmp_path):
    "The peer's gradients are averaged as the student's are"
    (sa,pa),(sb,pb) = outputs_of(tmp_path, """
dls = batches(n=24, bs=4, shuffle=False)
learn,peer = learner(dls, plain_net(1)),learner(dls, plain_net(2))
with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(1, cbs=KnowledgeDistillationCallback(PeerTeacher(peer), Mutual))
out = weights(learn.model),weights(peer.model)""")
    for a,b in ((sa,sb),(pa,pb)): assert max((a[k]-b[k]).abs().max().item() for k in a) < 1e-6

def test_rows_without_labels(tmp_path):
    "Each process has rows of its own; gradients are averaged: equal to a loop by hand on what both have seen"
    (wa,seen_a,init),(wb,seen_b,_) = outputs_of(tmp_path, """
set_seed(0)
dls = batches(n=24, bs=4, shuffle=False)
learn,seen = learner(dls, plain_net(1), opt_func=partial(SGD, mom=0., wd=0.)),[]
out0 = weights(learn.model)
more = [(torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(i)),) for i in range(40)]
kd = KnowledgeDistillationCallback(net(width=5, seed=7), Logits, weight=.3, unlabeled=DataLoader(more, bs=6, shuffle=True, num_workers=0))
watch = Callback(before_batch=lambda cb: seen.append((cb.xb[0].clone(), cb.yb[0].clone())) if cb.training else None)
watch.order = 950
with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(2, .1, cbs=[kd, watch])
out = weights(learn.model),[(tensor(x), tensor(y)) for x,y in seen],out0""")
    model,teacher = plain_net(1),net(width=5, seed=7).eval()
    assert all(torch.equal(v, init[k]) for k,v in weights(model).items()) and len(seen_a) == len(seen_b) == 6
    for (xa,ya),(xb,yb) in zip(seen_a, seen_b):
        assert len(xa) == len(xb) == 10 and not torch.equal(xa[4:], xb[4:])
        def loss(x, y): return .7*nn.functional.cross_entropy(model(x)[:4], y) + .3*nn.functional.mse_loss(model(x), teacher(x).detach())
        for p,d in zip(model.parameters(), torch.autograd.grad((loss(xa, ya) + loss(xb, yb))/2, model.parameters())): p.data -= .1*d
    for k,v in weights(model).items():
        for w in (wa,wb): torch.testing.assert_close(w[k], v, rtol=1e-4, atol=1e-6)

def test_a_student_that_starts_from_its_teacher(tmp_path):
    a,b = outputs_of(tmp_path, """
learn,teacher = learner(batches(n=24, bs=4, shuffle=False), net(width=4, seed=rank_distrib())),net(width=8, seed=7)
init_from_teacher(learn, teacher)
start = weights(learn.model)
with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))
out = start,weights(learn.model)""")
    for x,y in zip(a, b): assert all(torch.allclose(x[k], y[k]) for k in x)
    assert any(not torch.equal(a[0][k], a[1][k]) for k in a[0])

def test_a_body_without_labels(tmp_path):
    "Two processes train one body, and its projection"
    (wa,la),(wb,lb) = outputs_of(tmp_path, """
dls = batches(n=24, bs=4, shuffle=False)
teacher,body = nn.Sequential(*list(plain_net(7))[:-1]),nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
torch.manual_seed(rank_distrib())
learn,params = distill_learner(dls, body, teacher),[]
watch = Callback(after_train=lambda cb: params.extend(p.detach().clone() for p in cb.learn.distillation_session.loss_params.params))
with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(2, 1e-2, cbs=watch)
out = weights(learn.model),params""")
    assert all(torch.allclose(wa[k], wb[k]) for k in wa) and la and all(torch.allclose(p, q) for p,q in zip(la, lb))
