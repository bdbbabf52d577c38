"Small data, models and learners that the tests share"
import warnings
warnings.filterwarnings('ignore', message='.*torch.jit.script.*')
from collections import OrderedDict
import pytest, torch
from torch import nn
from fastai.basics import AvgSmoothLoss, DataLoaders, Learner, SGD, CrossEntropyLossFlat
from fastai.callback.schedule import *  # fit_one_cycle

torch.set_num_threads(1)  # the models are too small for more

def batches(n=24, n_valid=16, bs=8, classes=3, shape=(1,8,8), dtype=None, seed=0, shuffle=True):
    "`DataLoaders` of noise with labels that a model can learn from it"
    dtype = dtype or torch.get_default_dtype()
    g = torch.Generator().manual_seed(seed)
    def items(n):
        y = torch.randint(classes, (n,), generator=g)
        x = torch.randn(n, *shape, generator=g, dtype=dtype) + y.to(dtype).reshape(-1, *[1]*len(shape))
        return list(zip(x, y))
    dls = DataLoaders.from_dsets(items(n), items(n_valid), bs=bs, num_workers=0, shuffle=(shuffle, False), device='cpu')
    return dls

def net(width=4, classes=3, seed=None, dropout=0.):
    "A small convolutional network with BatchNorm, in-place ReLUs and two resolutions"
    if seed is not None: torch.manual_seed(seed)
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(1, width, 3, padding=1), bn1=nn.BatchNorm2d(width), relu1=nn.ReLU(inplace=True),
        conv2=nn.Conv2d(width, 2*width, 3, stride=2, padding=1), bn2=nn.BatchNorm2d(2*width), relu2=nn.ReLU(inplace=True),
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), drop=nn.Dropout(dropout), fc=nn.Linear(2*width, classes)))

class SmoothLoss(AvgSmoothLoss):
    "fastai's starts from a float32, and `lerp` wants one type: without this a float64 model cannot be fitted"
    def reset(self): self.count,self.val = 0,torch.zeros(())

def learner(dls=None, model=None, seed=1, **kwargs):
    "A learner on noise; `SGD` and no weight decay unless told, so that a hand-written loop can follow it"
    # fastai's losses compute in float32 whatever comes in
    kwargs = {'loss_func': CrossEntropyLossFlat() if torch.get_default_dtype() == torch.float32 else nn.CrossEntropyLoss(), 'opt_func': SGD, 'wd': 0., 'lr': 0.1, **kwargs}
    learn = Learner(dls or batches(), model or net(seed=seed), **kwargs)
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    learn.recorder.smooth_loss = SmoothLoss()
    learn.logger = lambda *args: None
    return learn

def weights(model): return {k: v.clone() for k,v in model.state_dict().items()}

def same(a, b):
    "Are two state dicts equal to the last bit?"
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def hooks(*models):
    "All hooks on the modules of `models`"
    return [h for model in models for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values(), *m._backward_hooks.values())]

def pytest_collection_modifyitems(items):
    for o in items:
        if o.get_closest_marker('cuda') and not torch.cuda.is_available(): o.add_marker(pytest.mark.skip(reason='no CUDA device'))

@pytest.fixture
def teacher(): return net(width=6, seed=7)

@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch):
    "A learner makes `models/` in the folder that the test runs in"
    monkeypatch.chdir(tmp_path)
