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

@pytest.mark.parametrize('loss', ['SoftTarget','both','VID'])
def test_two_ranks_are_one(tmp_path, loss):
    env = {**os.environ, 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port()), 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1',
           'PYTHONPATH': os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])}
    ranks = [subprocess.Popen([sys.executable, Path(__file__).parent/'distributed_worker.py', tmp_path, loss], env={**env, 'RANK': str(r), 'LOCAL_RANK': str(r)},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(2)]
    said = [r.communicate(timeout=240)[0] for r in ranks]
    assert all(r.returncode == 0 for r in ranks), '\n'.join(said)
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
