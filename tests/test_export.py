"Promise 5: exports stay small and free of fastkd"
import pickle, pickletools, subprocess, sys, zipfile
from operator import itemgetter
import pytest, torch
from torch import nn
from fastai.basics import Datasets, load_learner
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback
from fastkd.all import *
from conftest import batches, hooks, learner, net, same, weights

def mentions_fastkd(path):
    "Does the pickle in a file of `torch.save` name anything of the module? Its strings may: the path of the data"
    with zipfile.ZipFile(path) as z: data = z.read(next(n for n in z.namelist() if n.endswith('data.pkl')))
    strings = []
    for op,arg,_ in pickletools.genops(data):
        if op.name == 'GLOBAL' and arg.split()[0].split('.')[0] == 'fastkd': return True
        if isinstance(arg, str): strings.append(arg)
        if op.name == 'STACK_GLOBAL' and any(s.split('.')[0] == 'fastkd' for s in strings[-2:]): return True
    return False

def big(): return net(width=64, seed=7)

def exported(tmp_path, name, **kwargs):
    g = torch.Generator().manual_seed(0)
    items = [{'x': torch.randn(1,8,8, generator=g), 'y': torch.tensor(i%3)} for i in range(24)]
    dls = Datasets(items, [[itemgetter('x')],[itemgetter('y')]], splits=(range(16),range(16,24))).dataloaders(bs=8, num_workers=0, device='cpu')
    learn = learner(dls, model=net(seed=1), path=tmp_path, **kwargs)
    learn.logger = print
    learn.recorder.smooth_loss = type(learn.recorder.smooth_loss).__bases__[0]()  # fastai's own: a test's class cannot be loaded elsewhere
    return learn

@pytest.mark.parametrize('loss', [SoftTarget, Attention])
@pytest.mark.parametrize('own', [True, False], ids=['Learner(cbs=)','fit(cbs=)'])
def test_export_holds_the_student_only(tmp_path, loss, own):
    plain = exported(tmp_path, 'plain')
    plain.fit(1); plain.export('plain.pkl')
    kd = KnowledgeDistillationCallback(big(), loss, *(['bn1','bn1'] if loss is Attention else []))
    learn = exported(tmp_path, 'kd', **({'cbs': kd} if own else {}))
    learn.fit(1, cbs=None if own else kd)
    learn.export('kd.pkl')
    sizes = [(tmp_path/f'{n}.pkl').stat().st_size for n in ('plain','kd')]
    assert sizes[1] < sizes[0] + 1000
    assert not mentions_fastkd(tmp_path/'kd.pkl')
    again = load_learner(tmp_path/'kd.pkl')
    assert same(weights(learn.model), weights(again.model)) and not hooks(again.model)
    x = torch.stack([x for x,_ in learn.dls.valid_ds])
    assert torch.equal(again.model.eval()(x), learn.model.eval()(x))

def test_an_export_loads_where_there_is_no_fastkd(tmp_path):
    learn = exported(tmp_path, 'kd', cbs=KnowledgeDistillationCallback(big(), Attention, 'bn1', 'bn1'))
    learn.model = nn.Sequential(nn.Conv2d(1,4,3), nn.Flatten(), nn.Linear(144, 3))
    learn.knowledge_distillation.named_pairs = [('0','bn1')]
    learn.fit(1); learn.export('kd.pkl')
    code = f"""
import sys; sys.modules['fastkd'] = None
from fastai.basics import load_learner
import torch
learn = load_learner({str(tmp_path/'kd.pkl')!r})
print(tuple(learn.model(torch.zeros(2,1,8,8)).shape))
"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert done.stdout.strip().endswith('(2, 3)'), done.stderr

@pytest.mark.parametrize('exc', [ValueError, KeyboardInterrupt], ids=lambda e: e.__name__)
def test_export_after_a_fit_that_failed(tmp_path, exc):
    class Fail(Callback):
        order = 5
        def after_loss(self): raise exc('raised by a test')
    learn = exported(tmp_path, 'kd', cbs=KnowledgeDistillationCallback(big(), Attention, 'bn1', 'bn1'))
    with pytest.raises(exc): learn.fit(1, cbs=Fail())
    learn.export('kd.pkl')
    assert not mentions_fastkd(tmp_path/'kd.pkl')

def test_saved_models_hold_the_student_only(tmp_path):
    learn = exported(tmp_path, 'kd')
    learn.fit(2, cbs=[KnowledgeDistillationCallback(big(), [SoftTarget,Attention], 'bn1', 'bn1'), SaveModelCallback(monitor='valid_loss', fname='best', with_opt=True)])
    state = torch.load(tmp_path/'models'/'best.pth', weights_only=False)
    assert state['model'].keys() == net().state_dict().keys()
    assert len(state['opt']['state']) == len(list(learn.model.parameters()))

def test_the_callback_itself_keeps_its_teacher():
    kd = pickle.loads(pickle.dumps(KnowledgeDistillationCallback(big(), SoftTarget)))
    assert same(weights(kd.teacher.model), weights(big()))

@pytest.mark.parametrize('own', [True, False], ids=['Learner(cbs=)','fit(cbs=)'])
def test_an_export_in_the_middle_of_a_fit(tmp_path, own):
    "As of a callback that exports the best model at the end of an epoch"
    class KeepBest(Callback):
        order = 70
        def after_epoch(self):
            if self.epoch == 0:
                learn = self.learn
                learn.remove_cb(self)  # a test's class cannot be loaded elsewhere
                learn.export('mid.pkl')
    kd = KnowledgeDistillationCallback(big(), [SoftTarget,FitNet], 'bn1', 'bn1')
    learn = exported(tmp_path, 'mid', **({'cbs': kd} if own else {}))
    learn.fit(2, cbs=[KeepBest()] + ([] if own else [kd]))
    assert not mentions_fastkd(tmp_path/'mid.pkl') and (tmp_path/'mid.pkl').stat().st_size < 100_000
    code = f"import sys; sys.modules['fastkd'] = None\nfrom fastai.basics import load_learner\nprint(type(load_learner({str(tmp_path/'mid.pkl')!r}).model).__name__)"
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert done.stdout.strip().endswith('Sequential'), done.stderr
