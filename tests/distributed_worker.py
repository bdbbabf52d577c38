"One process of a distributed fit: `python distributed_worker.py OUT LOSS`, with RANK, WORLD_SIZE and the like in the environment"
import os, sys, warnings
warnings.filterwarnings('ignore')
import torch
from torch import nn
from fastai.distributed import *
from fastai.basics import Callback, SGD, rank_distrib
from fastkd.all import *
from conftest import batches, hooks, learner, net, weights

def broadcast(self, t, rank):
    "fastai's `_broadcast` wants a GPU"
    t = torch.LongTensor(t)
    torch.distributed.broadcast(t, rank)
    return t.tolist()

def plain_net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1,4,3), nn.ReLU(), nn.Conv2d(4,6,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6,3))

def callback(loss):
    terms = {'SoftTarget': SoftTarget, 'FitNet': FitNet(bn=False, layers={'2':'conv2'}), 'VID': VID(layers={'0':'conv1'}),
             'both': [SoftTarget, FitNet(bn=False, layers={'2':'conv2'})]}[loss]
    return KnowledgeDistillationCallback(net(width=5, seed=7), terms, weight=.3)

if __name__ == '__main__':
    DistributedDL._broadcast = broadcast
    out,loss = sys.argv[1:]
    learn,kd = learner(batches(n=24, bs=4, shuffle=False), plain_net(1)),callback(loss)
    torch.manual_seed(3 + 10*rank_distrib())  # a loss's parameters start from the first process's
    params = []
    watch = Callback(after_train=lambda cb: params.extend(p.detach().clone() for p in kd.session.loss_params.params))
    with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(2, cbs=[kd, watch])
    torch.save({'model': weights(learn.model), 'params': params, 'row': list(learn.recorder.values[-1]), 'hooks': len(hooks(learn.model))}, f'{out}/rank{rank_distrib()}.pth')
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort an interpreter that ends
