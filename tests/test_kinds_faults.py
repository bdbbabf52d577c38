"Nothing is left behind, wherever a fit ends: Ctrl-C at any line, errors at any event, with losses that have parameters and teachers that are moved"
import functools, os, sys
import pytest, torch
from torch import nn
from fastai.basics import Callback, CancelFitException, set_seed
from fastai.callback.core import _inner_loop, event
from fastai.callback.training import GradientAccumulation, GradientClip
import fastkd
from fastkd.all import *
from conftest import batches, hooks, learner, net, same, weights
from test_kinds_axes import KD

events = [e for e in vars(event) if e.startswith(('before_','after_')) and e != 'after_create' and 'cancel' not in e]

class Raise(Callback):
    "Raises at the second time of an event of training (the first, for those that come once)"
    def __init__(self, at, exc, order): self.at,self.exc,self.order,self.n = at,exc,order,0
    def __call__(self, name):
        if name != self.at or (name in _inner_loop and not self.learn.training): return
        self.n += 1
        if self.n == (1 if name.endswith('_fit') else 2): raise self.exc('raised by a test')

folder = os.path.dirname(fastkd.__file__) + os.sep
# the modules that hook, move and put back
watched = {folder + o for o in ('callback.py','session.py','layers.py','teacher.py','online_teachers.py')}

class CtrlC:
    "Within the block `KeyboardInterrupt` comes before the line number `at` (all lines that run in the modules that are watched are counted); `lines` are those that ran"
    def __init__(self, at=None): self.at,self.lines = at,[]
    def _line(self, frame, name, arg):
        if name == 'line':
            self.lines.append(frame.f_code.co_filename.split(os.sep)[-1] + f':{frame.f_lineno} {frame.f_code.co_name}')
            if len(self.lines)-1 == self.at:
                sys.settrace(None)
                self.stack = []
                while frame: self.stack,frame = [*self.stack, frame.f_code.co_name if frame.f_code.co_filename.startswith(folder) else ''],frame.f_back
                raise KeyboardInterrupt
        return self._line
    def _call(self, frame, name, arg): return self._line if frame.f_code.co_filename in watched else None
    def __enter__(self): sys.settrace(self._call); return self
    def __exit__(self, *args): sys.settrace(None)

def fit(learn, kd, *cbs, n=1):
    set_seed(5)
    learn.fit(n, cbs=[kd, *cbs])

def make(kind):
    teacher = net(width=6, seed=7)
    teacher.bn1.eval()
    learn = learner(batches(n=16, n_valid=8, shuffle=False), model=net(seed=1))
    kd = {'features': lambda: KD(teacher, [SoftTarget,FitNet,Attention], ['relu1','bn2'], ['bn1','relu2'], weight=.2),
          'matched': lambda: KD(teacher, FitNet), 'half': lambda: KD(Teacher(teacher, dtype=torch.bfloat16), SoftTarget),
          'function': lambda: KD(lambda x: teacher(x), SoftTarget), 'ema': lambda: KD(EMATeacher(.9), SoftTarget), 'cache': lambda: KD(Teacher(teacher, cache=True), SoftTarget)}[kind]()
    return learn,teacher,kd

def left(learn, teacher, kd, before):
    "What is left behind"
    all_ = [*hooks(learn.model, teacher), *nn.modules.module._global_forward_pre_hooks.values(), *nn.modules.module._global_forward_hooks.values()]
    return [k for k,v in dict(hooks=all_, modes=[m.training for m in teacher.modules()] != before['modes'], teacher=not same(before['teacher'], weights(teacher)), grads=any(p.grad is not None for p in teacher.parameters()),
        metrics=len(learn.metrics), optimizer=learn.opt is not None and [len(o) for o in learn.opt.param_lists] != [len(list(learn.model.parameters()))], state=learn.opt is not None and len([p for p in learn.opt.state if not any(p is q for q in learn.model.parameters())]),
        callbacks=[cb for cb in learn.cbs if cb not in before['cbs']], session=getattr(kd, 'session', None) is not None, running=kd.teacher.running is not None, moved=getattr(kd.teacher, 'moved', None), flags=any(not p.requires_grad for p in (*teacher.parameters(), *learn.model.parameters())),
        autocast=torch.is_autocast_enabled('cpu'), grad=not torch.is_grad_enabled()).items() if v]

def state_before(learn, teacher): return {'cbs': list(learn.cbs), 'modes': [m.training for m in teacher.modules()], 'teacher': weights(teacher)}
cleaning = {'close','leave','__exit__','forget_batch','after_fit','clear'}

@functools.cache
def lines_of(kind):
    learn,teacher,kd = make(kind)
    with CtrlC() as c: fit(learn, kd)
    return c.lines

# functions that hook, move, add or hand on
moving = {'fit','before_fit','open','prepare','before_batch','after_pred','join_terms','term_values','build','join','set','begin','_move','run','_forward','_resting','_keep','__enter__','collect','trace','find_layouts','after_step','snapshot','update','eval_when_called','__call__','rest','resting'}

def each_line(kind):
    "The number of the first run of every line"
    first = {}
    for i,l in enumerate(lines_of(kind)): first.setdefault(l, i)
    return first

def interrupted(kind, at):
    "What is left behind by a Ctrl-C before line number `at` of a fit, and whether it came into the cleaning up"
    learn,teacher,kd = make(kind)
    before = state_before(learn, teacher)
    with pytest.raises(KeyboardInterrupt), CtrlC(at) as c: fit(learn, kd)
    late = bool(cleaning & set(c.stack))
    if late:
        learn.opt = None
        fit(learn, kd)
    return left(learn, teacher, kd, before),late

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', ['features','half','function','ema'])
def test_ctrl_c_at_every_line(kind):
    "Whatever was begun is known to what takes it back, and the graph is kept: nothing is left"
    known = each_line('features') if kind != 'features' else {}
    found = {l: interrupted(kind, at) for l,at in each_line(kind).items() if l.split()[-1] in moving and l not in known}
    assert not {l: what for l,(what,_) in found.items() if what}

# errors in a fit with parameters of losses

def parameters_of(learn): return [p for ps in learn.opt.param_lists for p in ps] if learn.opt is not None else []
make_losses = {'fitnet': lambda: [FitNet], 'several': lambda: [SoftTarget,FitNet,VID], 'own': lambda: [Mine]}

class Mine(KDLoss):
    "A loss that comes with its parameters"
    def __init__(self): super().__init__(); torch.manual_seed(9); self.w = nn.Parameter(torch.ones(1))
    def forward(self, fm_s, fm_t): return sum((self.w*a.mean(1) - b.mean(1)).square().mean() for a,b in zip(fm_s.values(), fm_t.values()))

def distilling(loss): return KD(net(width=6, seed=7), make_losses[loss](), ['relu1','bn2'], ['bn1','relu2'], weight=.1, label_weight=1.)

@functools.cache
def fresh(loss):
    learn = learner(batches(n=16, n_valid=8, shuffle=False), model=net(seed=1))
    kd = distilling(loss)
    fit(learn, kd)
    return weights(learn.model),kd.curves['train']

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('exc,loss', [(ValueError,'several'), (KeyboardInterrupt,'own'), (CancelFitException,'fitnet')])
@pytest.mark.parametrize('at', events)
@pytest.mark.parametrize('order', [-5,2000])
def test_an_error_leaves_no_parameter_of_a_loss_in_the_optimizer(at, exc, loss, order):
    learn = learner(batches(n=16, n_valid=8, shuffle=False), model=net(seed=1))
    kd = distilling(loss)
    teacher = kd.teacher.models[0]
    before = state_before(learn, teacher)
    own = {id(p) for p in learn.model.parameters()}
    try: fit(learn, kd, Raise(at, exc, order), n=2)
    except (ValueError, KeyboardInterrupt, CancelFitException): pass
    assert all(id(p) in own for p in parameters_of(learn)) and not left(learn, teacher, kd, before)
    learn.model.load_state_dict(net(seed=1).state_dict()); learn.model.zero_grad()
    set_seed(5); learn.fit(1, cbs=kd, reset_opt=True)
    right,curves = fresh(loss)
    assert same(right, weights(learn.model)) and kd.curves['train'] == curves

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('at', ['after_pred','after_loss','before_step','after_step','after_epoch'])
@pytest.mark.parametrize('cbs', [lambda: [GradientAccumulation(16)], lambda: [GradientClip(.1)]])
def test_the_next_fit_goes_on_with_the_parameters_that_were_trained(at, cbs):
    "A fit that was interrupted keeps what the losses have learned"
    learn = learner(batches(n=16, n_valid=8, shuffle=False), model=net(seed=1))
    kd = distilling('several')
    with pytest.raises(KeyboardInterrupt): fit(learn, kd, Raise(at, KeyboardInterrupt, 5), *cbs(), n=3)
    assert all(id(p) in {id(q) for q in learn.model.parameters()} for p in parameters_of(learn))
    state = kd.state_dict()
    assert set(state['losses']) == {'fit_net_loss','vid_loss'}
    kept = {k: v.clone() for k,v in state['losses']['fit_net_loss'].items()}
    fit(learn, kd, *cbs())
    assert kd.state_dict()['losses']['fit_net_loss'].keys() == kept.keys()
    learn.fit(1, 0., cbs=kd)
    assert len(kd.curves['steps']) == 1

def test_saving_in_the_middle_of_a_fit(tmp_path):
    "`learn.save` inside a fit holds the student alone, and training goes on with the losses' parameters"
    class SaveNow(Callback):
        def after_batch(self):
            if self.training: self.learn.save('m')
    learn = learner(batches(n=16, n_valid=8, shuffle=False), model=net(seed=1), path=tmp_path)
    kd = distilling('fitnet')
    fit(learn, kd, SaveNow())
    right,curves = fresh('fitnet')
    assert kd.curves['train'] == curves
    again = learner(batches(n=16, n_valid=8, shuffle=False), model=net(seed=3), path=tmp_path)
    again.create_opt()
    again.load('m')
    assert same(weights(again.model), torch.load(tmp_path/'models'/'m.pth', weights_only=False)['model'])
