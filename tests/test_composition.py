"Promise 6: with fastai's other callbacks and ways to fit, the numbers are right"
import copy, math, pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.basics import Adam, Callback, CancelFitException, LabelSmoothingCrossEntropyFlat, OptimWrapper, SGD, TensorBase, set_seed
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.channelslast import *
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import *
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastkd.all import *
from fastkd.layers import unwrap
from conftest import batches, hooks, learner, net, same, weights

@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

def close(a, b, **tol):
    tol = tol or dict(rtol=1e-9, atol=1e-11)
    for k in a: assert torch.allclose(a[k].double(), b[k].double(), **tol), (k, (a[k]-b[k]).abs().max())

def plain_net(seed=1):
    "Without BatchNorm, whose statistics depend on the batch"
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1,4,3), nn.ReLU(), nn.Conv2d(4,6,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6,3))

def losses():
    "Terms on logits and on activations, one with parameters of its own"
    return [SoftTarget(T=3), Attention(layers={'0':'conv1'}), FitNet(bn=False, layers={'2':'conv2'})]

def teacher(): return net(width=5, seed=7)

# --- gradients

@pytest.mark.parametrize('loss', [SoftTarget, losses], ids=['logits','all'])
def test_accumulated_gradients_are_the_large_batchs(float64, loss):
    def fitted(bs, *cbs):
        model = plain_net()
        learn = learner(batches(n=24, bs=bs, shuffle=False), model)
        torch.manual_seed(3)  # for what FitNet starts from
        learn.fit(1, cbs=[KnowledgeDistillationCallback(teacher(), loss(), weight=.6), *cbs])
        return weights(model)
    close(fitted(8), fitted(2, GradientAccumulation(8)))

def test_clipped_gradients(float64):
    def objective(model, t, x, y): return .5*F.cross_entropy(model(x), y) + .5*25*F.kl_div(F.log_softmax(model(x)/5,1), F.softmax(t(x)/5,1), reduction='batchmean')
    dls,model,t = batches(shuffle=False),plain_net(),teacher().eval()
    for x,y in dls.train:
        model.zero_grad(); objective(model, t, x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), .05)
        with torch.no_grad():
            for p in model.parameters(): p -= .1*p.grad
    mine = plain_net()
    learner(dls, mine).fit(1, cbs=[KnowledgeDistillationCallback(t, SoftTarget), GradientClip(.05)])
    close(weights(model), weights(mine))

class CPUMixedPrecision(MixedPrecision):
    "fastai's, with the CPU's autocast: its own says 'cuda'"
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16 if self.amp_mode.value == 'bf16' else torch.float16)

@pytest.mark.filterwarnings('ignore:.*GradScaler.*', 'ignore:.*CUDA is not available.*')
@pytest.mark.parametrize('where', ['loss','teacher','student'])
@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_an_error_under_mixed_precision_leaves_it_off(where, error):
    "fastai turns it off in `after_loss`, which is not reached; on, it would keep the first weights' copies for all that follows"
    def fail(*args): raise error('on the way')
    t,learn = teacher(),learner()
    if where != 'loss': (t if where == 'teacher' else learn.model).fc.register_forward_hook(fail)
    kd = KnowledgeDistillationCallback(t, (lambda pred, teacher_pred: fail()) if where == 'loss' else SoftTarget)
    x = torch.randn(4,3)
    for outer in (False,True):  # the caller's own stays as it is
        with torch.autocast('cpu', torch.bfloat16, enabled=outer):
            with pytest.raises(error, match='on the way'): learn.fit(1, cbs=[CPUMixedPrecision('bf16'), kd])
            assert torch.is_autocast_enabled('cpu') == outer
        with torch.autocast('cpu', torch.bfloat16):  # its cache is emptied at the end of the outermost
            layer = nn.Linear(3, 1)
            before = layer(x)
        with torch.no_grad(): layer.weight.add_(1)
        with torch.autocast('cpu', torch.bfloat16): assert not torch.equal(layer(x), before)

@pytest.mark.filterwarnings('ignore:.*GradScaler.*', 'ignore:.*CUDA is not available.*')
@pytest.mark.parametrize('mode', ['fp16','bf16'])
def test_mixed_precision_computes_losses_in_float32(mode):
    seen = []
    def spy(pred, teacher_pred, fm_s, fm_t):
        seen.append({t.dtype for t in (pred, teacher_pred, *fm_s.values(), *fm_t.values())} | {(pred@pred.T).dtype})
        return F.mse_loss(pred, teacher_pred)
    raw = []
    t = teacher(); t.fc.register_forward_hook(lambda m,i,o: raw.append(o.dtype))
    learn = learner()
    learn.fit(1, cbs=[CPUMixedPrecision(mode), KnowledgeDistillationCallback(t, [spy,SoftTarget,Attention], ['relu1'], ['relu1'], weight=.2)])
    assert all(s == {torch.float32} for s in seen) and set(raw) == {torch.float16 if mode == 'fp16' else torch.bfloat16}

@pytest.mark.filterwarnings('ignore:.*GradScaler.*', 'ignore:.*CUDA is not available.*')
@pytest.mark.parametrize('loss', [Attention, Similarity, NST, RKD, PKT, FitNet, VID, Cosine], ids=lambda l: l.__name__)
def test_large_activations_in_half_precision(loss):
    "Activations of 1e3, whose squares and Gram products overflow in fp16"
    class Large(nn.Module):
        def forward(self, x): return x*1e3/x.detach().abs().max()
    def large(width, seed):
        m = net(width=width, seed=seed); m.relu2 = Large(); return m
    learn = learner(model=large(4, 1))
    kd = KnowledgeDistillationCallback(large(5, 7), loss, ['relu2'], ['relu2'], weight=1e-6, label_weight=1)
    learn.fit(1, lr=0, cbs=[CPUMixedPrecision('fp16'), kd])  # no rate: without a GPU nothing scales the student's own gradients
    assert all(math.isfinite(v) for v in kd.curves['train']['kd_loss'])

@pytest.mark.parametrize('scale', [2.**10, 2.**120], ids=['steps','overflows'])
def test_skipped_steps_of_the_scaler(scale):
    "Where the scaled gradients overflow, neither the student nor a loss's parameters move; where not, both do"
    class Scaled(CPUMixedPrecision):
        def before_fit(self):
            super().before_fit()
            self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=scale)
    seen = []
    class Watch(Callback):
        order = 30
        def before_backward(self): seen.append([p.detach().clone() for p in (*self.model.parameters(), *kd.session.loss_params.params)])
        def after_train(self): seen.append([p.detach().clone() for p in (*self.model.parameters(), *kd.session.loss_params.params)])
    kd = KnowledgeDistillationCallback(teacher(), [SoftTarget,FitNet], ['conv2'], ['conv2'], weight=.3)
    learner().fit(1, cbs=[Scaled('bf16' if scale < 2**20 else 'fp16'), kd, Watch()])
    moved = [not torch.equal(a, b) for a,b in zip(seen[0], seen[1])]
    assert len(moved) == 10+3 and (all(moved) if scale < 2**20 else not any(moved))

def test_channels_last():
    learn = learner()
    kd = KnowledgeDistillationCallback(teacher(), [SoftTarget,Attention], ['conv2'], ['conv2'])
    plain = learner(batches(shuffle=False), net(seed=1)); plain.fit(1, cbs=KnowledgeDistillationCallback(teacher(), [SoftTarget,Attention], ['conv2'], ['conv2']))
    learn = learner(batches(shuffle=False), net(seed=1)); learn.to_channelslast(use_amp=False); learn.fit(1, cbs=kd)
    close(weights(plain.model), weights(learn.model), rtol=1e-4, atol=1e-5)

# --- mixed inputs and labels

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_the_teacher_sees_the_mixed_input(mix):
    xs = {'student': [], 'teacher': []}
    t,learn = teacher(),learner()
    originals = torch.stack([x for x,_ in learn.dls.train_ds])
    t.conv1.register_forward_pre_hook(lambda m,i: xs['teacher'].append(i[0].clone()))
    learn.model.conv1.register_forward_pre_hook(lambda m,i: xs['student'].append(i[0].clone()))
    before = learn.loss_func
    learn.fit(2, cbs=[mix(), KnowledgeDistillationCallback(t, SoftTarget)])
    assert len(xs['student']) == 10 and len(xs['teacher']) == 6 and all(torch.equal(a, b) for a,b in zip(xs['student'][:3] + xs['student'][5:8], xs['teacher']))
    assert any(not any((x == o).all() for o in originals) for batch in xs['teacher'][:3] for x in batch)
    assert learn.loss_func is before

def test_the_teacher_sees_what_is_erased():
    set_seed(0)  # an erased rectangle may change nothing that was not the same before
    from fastai.vision.augment import RandomErasing
    from fastai.vision.core import TensorImage
    dls,xs = batches(),{'student': [], 'teacher': []}
    erase = RandomErasing(p=1., max_count=1)
    dls.train.after_batch = lambda b: (erase(TensorImage(b[0]), split_idx=0), b[1])
    t,learn = teacher(),learner(dls)
    t.conv1.register_forward_pre_hook(lambda m,i: xs['teacher'].append(i[0].clone()))
    learn.model.conv1.register_forward_pre_hook(lambda m,i: xs['student'].append(i[0].clone()))
    learn.fit(1, cbs=KnowledgeDistillationCallback(t, SoftTarget))
    assert len(xs['teacher']) == 3 and all(torch.equal(a, b) for a,b in zip(xs['student'], xs['teacher']))
    originals = torch.stack([x for x,_ in dls.train_ds])
    assert not any((x == o).all() for x in xs['teacher'][0] for o in originals)

@pytest.mark.parametrize('first', ['kd','mixup'])
def test_mixup_as_by_hand(first):
    "The labels' loss is MixUp's, the teacher's term that of the mixed input; either may be named first"
    dls,model,mine,t = batches(shuffle=False),plain_net(),plain_net(),teacher().eval()
    seen = []
    class Watch(Callback):
        order = 1
        def before_batch(self):
            if self.training: seen.append((self.x.clone(), self.y.clone(), self.mix_up.yb1[0].clone(), self.mix_up.lam.clone()))
    mixup = MixUp()
    kd = KnowledgeDistillationCallback(t, SoftTarget(T=2), weight=.7)
    learn = learner(dls, mine, loss_func=CrossEntropy())
    learn.fit(1, cbs=[*([kd,mixup] if first == 'kd' else [mixup,kd]), Watch()])
    for x,y,y1,lam in seen:
        z,z_t = model(x),t(x).detach()
        label = torch.lerp(F.cross_entropy(z, y1, reduction='none'), F.cross_entropy(z, y, reduction='none'), lam).mean()
        loss = .3*label + .7*4*F.kl_div(F.log_softmax(z/2, 1), F.softmax(z_t/2, 1), reduction='batchmean')
        model.zero_grad(); loss.backward()
        with torch.no_grad():
            for p in model.parameters(): p -= .1*p.grad
    assert len(seen) == 3
    close(weights(model), weights(mine), rtol=1e-4, atol=1e-6)  # float32, as fastai's MixUp draws its weights

class CrossEntropy:
    "Cross-entropy in the input's precision, with what `MixUp` asks of a loss"
    y_int,reduction = True,'mean'
    def __call__(self, pred, y): return F.cross_entropy(pred, y, reduction=self.reduction)

def test_label_smoothing():
    "The labels' term is the learner's loss, whatever it is"
    learn = learner(batches(shuffle=False), net(seed=1), loss_func=LabelSmoothingCrossEntropyFlat(eps=.2))
    x,y = next(iter(learn.dls.train))
    expected = F.cross_entropy(net(seed=1).train()(x), y, label_smoothing=.2).item()
    kd = KnowledgeDistillationCallback(teacher(), SoftTarget)
    learn.fit(1, cbs=kd)
    assert kd.curves['train']['label_loss'][0] == pytest.approx(expected, rel=1e-5)

def test_a_regularizer_that_adds_to_the_loss_is_not_scaled(float64):
    class Penalty(Callback):
        def after_loss(self):
            if self.training: self.learn.loss_grad += .1*self.model[0].weight.pow(2).sum()
    def fitted(w):
        model = plain_net()
        learner(batches(shuffle=False), model).fit(1, cbs=[Penalty(), KnowledgeDistillationCallback(lambda x: torch.zeros(len(x),3), lambda pred: 0*pred.sum(), weight=w, label_weight=1)])
        return weights(model)
    with pytest.warns(UserWarning): close(fitted(0.), fitted(.9))

# --- ways to fit

def fits():
    yield 'fit', lambda learn, kd: learn.fit(2, cbs=kd)
    yield 'fit_one_cycle', lambda learn, kd: learn.fit_one_cycle(2, .01, cbs=kd)
    yield 'fit_flat_cos', lambda learn, kd: learn.fit_flat_cos(2, .01, cbs=kd)
    yield 'fit_sgdr', lambda learn, kd: learn.fit_sgdr(1, 2, lr_max=.01, cbs=kd)
    yield 'fine_tune', lambda learn, kd: learn.fine_tune(1, .01, cbs=kd)
    yield 'slice', lambda learn, kd: learn.fit_one_cycle(2, slice(1e-4,1e-2), cbs=kd)

def halves(model): return [list(model[:3].parameters()), list(model[3:].parameters())]

@pytest.mark.parametrize('own', [True,False], ids=['Learner(cbs=)','fit(cbs=)'])
@pytest.mark.parametrize('opt_func', [SGD, Adam, lambda p, **kw: OptimWrapper(p, torch.optim.AdamW, **kw)], ids=['SGD','Adam','torch'])
@pytest.mark.parametrize('name,fit', fits(), ids=lambda o: o if isinstance(o, str) else '')
def test_ways_to_fit(name, fit, opt_func, own):
    learn = learner(model=net(seed=1), splitter=halves, opt_func=opt_func, wd=None)
    kd = KnowledgeDistillationCallback(teacher(), [SoftTarget,FitNet,VID], ['relu1','conv2'], ['relu1','conv2'], weight=.2)
    moved = []
    class Watch(Callback):
        order = 30
        def after_step(self):
            if not moved: moved.extend([p, p.detach().clone()] for p in kd.session.loss_params.params)
            assert len(self.opt.hypers) == 2 and self.opt.param_lists[-1][-1] is kd.session.loss_params.params[-1]
    if own: learn.add_cb(kd)
    learn.add_cb(Watch())
    fit(learn, None if own else kd)
    assert [len(o) for o in learn.opt.param_lists] == [len(o) for o in halves(learn.model)]
    n = len(list(learn.model.parameters()))
    state = learn.opt.state_dict()['state']
    assert len(state) <= n
    assert moved and all(not torch.equal(p, old) for p,old in moved)  # each parameter of each loss has trained
    learn.remove_cbs([Watch, KnowledgeDistillationCallback])
    learn.fit(1)  # and the optimizer still works

@pytest.mark.parametrize('loss', [FitNet, Cosine, VID, ReviewKD, ActivationBoundaries, ChannelWiseFeatures], ids=lambda l: l.__name__)
def test_each_parameter_of_each_loss_trains(loss):
    first,last = [],[]
    kd = KnowledgeDistillationCallback(teacher(), loss, ['conv1','conv2'], ['conv1','conv2'], weight=.5)
    class Watch(Callback):
        order = 30
        def before_backward(self):
            if not first: first.extend(p.detach().clone() for p in kd.session.loss_params.params)
        def after_train(self): last.extend(p.detach().clone() for p in kd.session.loss_params.params)
    learn = learner(opt_func=Adam)
    learn.fit(1, cbs=[kd, Watch()])
    assert first and all(not torch.equal(a, b) for a,b in zip(first, last))
    assert [len(o) for o in learn.opt.param_lists] == [len(list(learn.model.parameters()))] and len(learn.opt.state) == len(list(learn.model.parameters()))
    assert not list(kd.objective.terms[0].loss.parameters())  # the user's loss stays as it was

def test_parameters_of_losses_follow_the_last_groups_rate(float64):
    "FitNet by hand, with a rate for each half"
    t,dls = teacher().eval(),batches(shuffle=False)
    loss,mine = FitNet(bn=False),net(seed=1)
    kept = {}
    class Keep(Callback):
        order = 30
        def before_backward(self):
            if not kept: kept['R'] = [p.detach().clone() for p in kd.session.loss_params.params]
        def after_train(self): kept['end'] = [p.detach().clone() for p in kd.session.loss_params.params]
    kd = KnowledgeDistillationCallback(t, loss, 'conv2', 'conv2', weight=.5)
    learn = learner(dls, mine, splitter=halves)
    learn.fit(1, lr=slice(.01,.1), cbs=[kd,Keep()])
    model,R = net(seed=1),[p.requires_grad_() for p in kept['R']]
    for x,y in dls.train:
        f = {}
        h = [m.conv2.register_forward_hook(lambda m,i,o: f.__setitem__(m, o)) for m in (model,t)]
        z = model(x)
        with torch.no_grad(): t(x)
        for o in h: o.remove()
        r = F.conv2d(f[model.conv2], R[0], *R[1:])
        grads = torch.autograd.grad(.5*F.cross_entropy(z,y) + .5*F.mse_loss(r, f[t.conv2]), [*model.parameters(), *R])
        with torch.no_grad():
            rates = [.01]*len(halves(model)[0]) + [.1]*(len(halves(model)[1])+len(R))
            for p,g,lr in zip([*model.parameters(), *R], grads, rates): p -= lr*g
    close(weights(model), weights(mine))
    for a,b in zip(R, kept['end']): assert torch.allclose(a, b, rtol=1e-9)

def test_frozen_body(float64):
    learn = learner(model=net(seed=1), splitter=halves)
    learn.create_opt(); learn.freeze()
    before = weights(learn.model)
    learn.fit(1, cbs=KnowledgeDistillationCallback(teacher(), [SoftTarget,FitNet], 'conv2', 'conv2'))
    after = weights(learn.model)
    assert torch.equal(before['conv1.weight'], after['conv1.weight']) and not torch.equal(before['fc.weight'], after['fc.weight'])

# --- trackers, checkpoints

@pytest.mark.parametrize('monitor', ['train_loss','valid_loss','accuracy','kd_loss'])
@pytest.mark.parametrize('tracker', [SaveModelCallback, EarlyStoppingCallback, ReduceLROnPlateau])
def test_trackers_monitor_every_column(tmp_path, tracker, monitor):
    from fastai.metrics import accuracy
    learn = learner(metrics=accuracy, path=tmp_path)
    learn.fit(2, cbs=[KnowledgeDistillationCallback(teacher(), SoftTarget), tracker(monitor=monitor)])
    assert list(learn.recorder.metric_names) == ['epoch','train_loss','valid_loss','accuracy','kd_loss','time']

def test_csv_logger(tmp_path):
    learn = learner(path=tmp_path)
    learn.fit(2, cbs=[KnowledgeDistillationCallback(teacher(), SoftTarget), CSVLogger()])
    log = learn.csv_logger.read_log() if hasattr(learn, 'csv_logger') else __import__('pandas').read_csv(tmp_path/'history.csv')
    assert list(log.columns) == ['epoch','train_loss','valid_loss','kd_loss','time'] and len(log) == 2

def test_terminate_on_nan():
    kd = KnowledgeDistillationCallback(teacher(), lambda pred, pct_train: pred.sum()*(math.nan if pct_train > .3 else 1.))
    learn = learner()
    learn.fit(2, cbs=[kd, TerminateOnNaNCallback()])
    assert len(kd.curves['train']['kd_loss']) < 6

class StopAfter(Callback):
    order = 99
    def __init__(self, epoch): self.last = epoch
    def after_epoch(self):
        if self.epoch == self.last:
            self.learn.save('half', with_opt=True)
            raise CancelFitException()

@pytest.mark.parametrize('loss', [lambda: SoftTarget, lambda: [SoftTarget, FitNet(layers={'conv2':'conv2'}), VID(layers={'relu1':'relu1'})]], ids=['plain','with parameters'])
def test_training_resumed_from_a_checkpoint_goes_on(tmp_path, loss):
    def start():
        return (learner(batches(shuffle=False), net(seed=1), path=tmp_path, opt_func=Adam, lr=.01),
                KnowledgeDistillationCallback(teacher(), loss(), weight=.2, schedule=SchedCos(0.1, 1)))
    straight,kd = start()
    torch.manual_seed(0); straight.fit_one_cycle(4, .01, cbs=kd)
    first,kd = start()
    torch.manual_seed(0); first.fit_one_cycle(4, .01, cbs=[kd, StopAfter(1)])
    torch.save(kd.state_dict(), tmp_path/'kd.pth')
    again,kd = start()
    again.load('half', with_opt=True, weights_only=False)
    kd.load_state_dict(torch.load(tmp_path/'kd.pth'))
    again.fit_one_cycle(4, .01, cbs=kd, start_epoch=2)
    close(weights(straight.model), weights(again.model), rtol=1e-4, atol=1e-6)

# --- wrapped models

class Compiled:
    "`torch.compile` with the eager backend: the wrapper, its guards and its graph breaks, without a C++ compiler"
    def __call__(self, model): return torch.compile(model, backend='eager')

def inplace(model):
    model.compile(backend='eager')
    return model

@pytest.mark.parametrize('whom', ['student','teacher','both'])
@pytest.mark.parametrize('how', [Compiled(), inplace], ids=['torch.compile','model.compile'])
@pytest.mark.parametrize('loss', [SoftTarget, Attention, [SoftTarget,FitNet]], ids=['logits','features','both'])
def test_compiled_models(how, whom, loss):
    torch._dynamo.reset()
    def fitted(student, t):
        learn = learner(batches(shuffle=False), student)
        learn.fit(1, lr=0.); t(torch.zeros(8,1,8,8))  # both have been compiled, without hooks
        torch.manual_seed(2)
        kd = KnowledgeDistillationCallback(t, loss, *([] if loss is SoftTarget else [['bn1','conv2'],['bn1','conv2']]))
        learn.fit(2, cbs=kd)
        return kd,weights(unwrap(learn.model)),hooks(student, t)
    kd,expected,_ = fitted(net(seed=1), teacher())
    s,t = net(seed=1),teacher()
    compiled,mine,left = fitted(how(s) if whom != 'teacher' else s, how(t) if whom != 'student' else t)
    for column,curve in kd.curves['train'].items(): assert compiled.curves['train'][column] == pytest.approx(curve, rel=1e-3)
    close(expected, mine, rtol=1e-3, atol=1e-5)
    assert not left

def test_data_parallel():
    def fitted(wrap):
        s,t = net(seed=1),teacher()
        learner(batches(shuffle=False), wrap(s)).fit(1, cbs=KnowledgeDistillationCallback(wrap(t), [SoftTarget,Attention], ['bn1'], ['bn1']))
        return weights(s)
    assert same(fitted(lambda m: m), fitted(nn.DataParallel))

@pytest.mark.parametrize('names', [['ReviewKD','FitNet'],['FitNet','ReviewKD']])
@pytest.mark.parametrize('opt_func', [Adam, 'ranger'])
def test_losses_that_were_made_in_another_order_are_resumed(names, opt_func):
    "`ReviewKD` has no weight in the first batch of a training, but in the first after it was resumed"
    import fastkd.all, fastai.optimizer
    opt_func = getattr(fastai.optimizer, opt_func) if isinstance(opt_func, str) else opt_func
    make = lambda: KnowledgeDistillationCallback(net(width=6, seed=7), [getattr(fastkd.all, n) for n in names], ['conv1','conv2'], ['conv1','conv2'], weight='paper')
    ends = []
    class Keep(Callback):
        order = 100
        def __init__(self, kd, at): self.kd,self.at = kd,at
        def after_epoch(self):
            if self.epoch == self.at: ends.append((self.kd.state_dict(), {k: v.clone() for k,v in self.model.state_dict().items()}, copy.deepcopy(self.opt.state_dict())))
    def fresh(): return learner(batches(shuffle=False), net(seed=1), opt_func=opt_func, lr=1e-3)
    kd = make()
    fresh().fit(3, cbs=[kd, Keep(kd, 1), Keep(kd, 2)])
    learn,kd = fresh(),make()
    state,weights_,opt = ends[0]
    learn.create_opt()
    learn.model.load_state_dict(weights_)
    learn.opt.load_state_dict(copy.deepcopy(opt))
    kd.load_state_dict(state)
    learn.fit(3, cbs=[kd, Keep(kd, 2)], start_epoch=2)
    (whole,weights_a,_),(resumed,weights_b,_) = ends[1],ends[2]
    for k in weights_a: torch.testing.assert_close(weights_a[k], weights_b[k])
    for column in whole['losses']:
        for k,v in whole['losses'][column].items(): torch.testing.assert_close(v, resumed['losses'][column][k])

def test_lookahead_looks_ahead_for_the_losses_parameters_too():
    "fastai's `ranger`; of them nothing is left in the optimizer, and the next fit may have others"
    from fastai.optimizer import ranger
    learn,seen = learner(batches(shuffle=False), opt_func=ranger),[]
    class Watch(Callback):
        order = 30
        def after_step(self): seen.append([torch.equal(a, b) for a,b in ((p, s['slow']) for p,s in zip(kd.session.loss_params.params, kd.session.loss_params.state_of(kd.session.loss_params.params)))])
    kd = KnowledgeDistillationCallback(net(width=6, seed=7), FitNet, 'conv1', 'conv1', weight='paper')
    learn.fit(2, cbs=[kd, Watch()])
    assert len(seen) == 6 and seen[5] and all(seen[5]) and not any(seen[4])  # every sixth step it meets its slow weights; an epoch ends at the third
    def tidy(): return [len(o) for o in learn.opt.slow_weights] == [len(o) for o in learn.opt.param_lists] == [len(o) for o in learn.opt.state_dict()['slow_weights']]
    assert tidy()
    learn.fit(1, cbs=KnowledgeDistillationCallback(net(width=9, seed=8), FitNet, 'conv1', 'conv1', weight='paper'))
    assert tidy()

@pytest.mark.parametrize('before', ['lr_find','load'])
@pytest.mark.parametrize('opt_func', [SGD, Adam, lambda p, **kw: OptimWrapper(p, torch.optim.AdamW, **kw)], ids=['SGD','Adam','torch'])
def test_losses_with_parameters_join_an_optimizer_that_was_loaded(tmp_path, before, opt_func):
    "fastai's `load_state_dict` leaves a plain dictionary, which makes no entry for a new parameter"
    learn = learner(opt_func=opt_func, path=tmp_path)
    if before == 'lr_find': learn.lr_find(num_it=3, show_plot=False)
    else: learn.fit(1); learn.load(learn.save('a').stem, weights_only=False)
    kd = KnowledgeDistillationCallback(teacher(), FitNet, 'conv2', 'conv2')
    learn.fit(2, cbs=kd)
    assert len(kd.curves['train']['kd_loss']) == 6
