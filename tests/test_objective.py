"The numbers: the objective, weights, schedules, columns and curves against hand-written loops"
import math, pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.basics import Callback, CancelEpochException
from fastai.callback.schedule import SchedCos, SchedLin, combine_scheds
from fastai.metrics import Perplexity, accuracy
from fastkd.all import *
from fastkd.losses import mean_logits
from conftest import batches, learner, net, weights

@pytest.fixture(autouse=True)
def float64():
    "fastai's recorder starts from numbers of the default type"
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

def soft(z_s, z_t, T): return T*T*F.kl_div(F.log_softmax(z_s/T, 1), F.softmax(z_t/T, 1), reduction='batchmean')
def attention(a): return F.normalize(a.pow(2).mean(1).flatten(1))

def hand_loop(dls, student, objective, steps, lr=.1):
    "Plain SGD on `objective(x, y, progress)`"
    student.train()
    losses = []
    for i,(x,y) in enumerate(list(dls.train)[:steps]):
        loss = objective(x, y, i/len(dls.train))
        student.zero_grad(); loss.backward()
        with torch.no_grad():
            for p in student.parameters(): p -= lr*p.grad
        losses.append(loss.item())
    return losses

def pair(dtype=torch.float64, **kwargs):
    "The same untrained student twice, data in a fixed order, a teacher"
    dls = batches(dtype=dtype, shuffle=False, **kwargs)
    return dls, net(seed=1).to(dtype), net(seed=1).to(dtype), net(width=6, seed=7).to(dtype).eval()

def close(a, b):
    for k in a: assert torch.allclose(a[k].double(), b[k].double(), rtol=1e-10, atol=1e-12), k

@pytest.mark.parametrize('T,weight,label_weight,a,b', [(5,.5,None,.5,.5), (5,100,.5,.5,100), (7,.7,None,.3,.7), (7,.7,.3,.3,.7), (5,.9,None,.1,.9), (4,1.,0.,0,1)])
def test_soft_target_as_by_hand(T, weight, label_weight, a, b):
    dls,mine,theirs,teacher = pair()
    def objective(x, y, _):
        z = theirs(x)
        with torch.no_grad(): z_t = teacher(x)
        return a*F.cross_entropy(z, y) + b*soft(z, z_t, T)
    losses = hand_loop(dls, theirs, objective, 3, lr=.01)
    learn = learner(dls, mine, lr=.01)
    kd = KnowledgeDistillationCallback(teacher, SoftTarget(T=T), weight=weight, label_weight=label_weight)
    learn.fit(1, cbs=kd)
    close(weights(theirs), weights(mine))
    total = [a*l+b*k for l,k in zip(*kd.curves['train'].values())]
    assert total == pytest.approx(losses, rel=1e-5)

def test_attention_as_by_hand():
    dls,mine,theirs,teacher = pair()
    def objective(x, y, _):
        def stages(m):
            a = m.bn1(m.conv1(x)); b = m.bn2(m.conv2(F.relu(a)))
            return m.fc(F.relu(b).mean((2,3))), a, b
        z,*a_s = stages(theirs)
        with torch.no_grad(): _,*a_t = stages(teacher)
        return .1*F.cross_entropy(z, y) + .9*sum(F.mse_loss(attention(s), attention(t)) for s,t in zip(a_s, a_t))
    hand_loop(dls, theirs, objective, 3)
    learner(dls, mine).fit(1, cbs=KnowledgeDistillationCallback(teacher, Attention, ['bn1','bn2'], ['bn1','bn2'], weight=.9))
    close(weights(theirs), weights(mine))

def test_two_losses_two_weights():
    dls,mine,theirs,teacher = pair()
    def objective(x, y, _):
        z,z_t = theirs(x),teacher(x).detach()
        return .3*F.cross_entropy(z, y) + .5*soft(z, z_t, 5) + .2*F.mse_loss(z, z_t)
    hand_loop(dls, theirs, objective, 3)
    kd = KnowledgeDistillationCallback(teacher, [SoftTarget,Logits], weight=[.5,.2])
    learner(dls, mine).fit(1, cbs=kd)
    close(weights(theirs), weights(mine))
    assert list(kd.curves['train']) == ['label_loss','soft_target_loss','logits_loss']

def test_one_weight_is_shared_by_the_losses():
    dls,mine,theirs,teacher = pair()
    def objective(x, y, _):
        z,z_t = theirs(x),teacher(x).detach()
        return .4*F.cross_entropy(z, y) + .3*(soft(z, z_t, 5) + F.mse_loss(z, z_t))
    hand_loop(dls, theirs, objective, 3)
    learner(dls, mine).fit(1, cbs=KnowledgeDistillationCallback(teacher, [SoftTarget,Logits], weight=.6))
    close(weights(theirs), weights(mine))

@pytest.mark.parametrize('schedule', [SchedCos(0, 1), SchedLin(1, .2), combine_scheds([.5,.5], [SchedLin(0,1),SchedCos(1,0)])])
@pytest.mark.parametrize('label_weight', [None,.5])
def test_schedule(schedule, label_weight):
    dls,mine,theirs,teacher = pair()
    def objective(x, y, progress):
        w = .8*float(schedule(progress))
        z,z_t = theirs(x),teacher(x).detach()
        return (1-w if label_weight is None else label_weight)*F.cross_entropy(z, y) + w*soft(z, z_t, 5)
    hand_loop(dls, theirs, objective, 3)
    learner(dls, mine).fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget, weight=.8, label_weight=label_weight, schedule=schedule))
    close(weights(theirs), weights(mine))

def test_scheduled_temperature():
    dls,mine,theirs,teacher = pair()
    T = SchedLin(8, 1)
    def objective(x, y, progress):
        z,z_t = theirs(x),teacher(x).detach()
        return .5*F.cross_entropy(z, y) + .5*soft(z, z_t, T(progress))
    hand_loop(dls, theirs, objective, 3)
    learner(dls, mine).fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget(T=T)))
    close(weights(theirs), weights(mine))

def test_plain_functions_take_what_they_name():
    dls,mine,theirs,teacher = pair()
    losses = [lambda pred, teacher_pred: F.mse_loss(pred, teacher_pred), lambda teacher_pred, pred, **kwargs: F.mse_loss(pred, teacher_pred), Logits, Logits()]
    results = []
    for loss in losses:
        model = net(seed=1).double()
        learner(dls, model).fit(1, cbs=KnowledgeDistillationCallback(teacher, loss))
        results.append(weights(model))
    for r in results[1:]: close(results[0], r)

def test_a_peers_loss_that_walks_both_dicts_works():
    seen = []
    def peer(pred, fm_s, fm_t, **kwargs):
        for a,b in zip(fm_s, fm_t): seen.append((fm_s[a].shape[1], fm_t[b].shape[1]))
        return pred.sum()
    learner().fit(1, cbs=KnowledgeDistillationCallback(net(width=6), peer, ['conv2','conv1','conv2'], ['bn2','bn1','conv2']))
    assert seen[:3] == [(8,12),(4,6),(8,12)]  # the user's order, one layer in two pairs

def test_paper_weights():
    kd = KnowledgeDistillationCallback(net(), Attention, ['conv1'], ['conv1'], weight='paper')
    assert kd.objective.at(0) == (1, {kd.objective.terms[0]: 1000})
    kd = KnowledgeDistillationCallback(net(), SoftTarget, weight='paper')
    assert kd.objective.at(0) == (.1, {kd.objective.terms[0]: .9})
    def each(*args, **kwargs): return [t.weight for t in KnowledgeDistillationCallback(net(), *args, **kwargs).objective.terms]
    assert each(SoftTarget(standardize=True), weight="paper") == [9]
    assert each([SoftTarget,Attention], weight='paper', label_weight=1) == [.9,1000]

def test_paper_weights_for_some():
    def each(*args, **kwargs):
        o = KnowledgeDistillationCallback(net(), *args, **kwargs).objective
        return o.at(0.).label, [t.weight for t in o.terms]
    assert each([SoftTarget,ChannelWise], weight=[.5,'paper']) == (.5, [.5,3.]) and each([ChannelWise,SoftTarget], weight=('paper',.3)) == (.7, [3.,.3])
    assert each([SoftTarget,Attention], weight=['paper','paper']) == (.1, [.9,1000.]) and each([SoftTarget,FitNet], weight=[.5,'paper'], label_weight=2) == (2, [.5,100.])
    assert each([SoftTarget,FitNet], weight=[.5,'paper']) == each([SoftTarget,FitNet])
    with pytest.raises(TypeError, match='one number for each loss'): each([SoftTarget,FitNet], weight=[.5,'papers'])
    with pytest.raises(ValueError, match='2 losses but 1 weights'): each([SoftTarget,FitNet], weight=['paper'])
    with pytest.raises(ValueError, match='no weights from a paper'): each([SoftTarget,lambda pred: 0.], weight=[.5,'paper'])

@pytest.mark.parametrize('loss,weight,says', [
    ([SoftTarget,ChannelWise], None, "Take `weight=[0.25, 'paper']`."), (ChannelWise, .1, "Take `weight='paper'`."),
    (FitNet, .5, "Take `weight='paper'`, or leave `weight` out."), ([FitNet,SoftTarget], [.5,.5], "Take `weight=['paper', 0.5]`, or leave `weight` out.")])
def test_a_weight_that_hardly_teaches_says_what_to_give(loss, weight, says):
    with pytest.warns(UserWarning) as record: KnowledgeDistillationCallback(net(), loss, weight=weight).objective.warn_of_weights()
    assert str(record[0].message).endswith(says)

def test_default_weights():
    "0.5 for losses on logits, shared by several; the papers' for losses on activations, whose scale is the paper's business"
    def weights_of(loss, **kwargs):
        o = KnowledgeDistillationCallback(net(), loss, **kwargs).objective
        return o.at(0.).label, [t.weight for t in o.terms]
    assert weights_of(SoftTarget) == (.5, [.5]) and weights_of([SoftTarget,Logits]) == (.5, [.25,.25])
    assert weights_of(Attention) == (1., [1000.]) and weights_of([SoftTarget,FitNet]) == (.5, [.5,100.])
    assert weights_of([SoftTarget,Attention], weight='paper') == (.1, [.9,1000.])  # the smallest label weight of the papers
    assert weights_of(lambda fm_s, fm_t: 0.) == (.5, [.5])  # no paper

class Table:
    "What the learner logs"
    def __init__(self, learn): self.rows = []; learn.logger = self.rows.append
    @property
    def head(self): return list(self.learn.recorder.metric_names)

@pytest.mark.parametrize('loss', [SoftTarget, [SoftTarget,Attention], FitNet], ids=['logits','list','parameters'])
def test_the_table_is_the_plain_fits_with_a_column_for_each_term(teacher, loss):
    dls = batches(n_valid=12)  # batches of 8 and 4: a mean over rows, not over batches
    learn = learner(dls, metrics=[accuracy, Perplexity()])
    kd = KnowledgeDistillationCallback(teacher, loss)
    learn.fit(2, cbs=kd)
    columns = ['soft_target_loss','attention_loss'] if isinstance(loss, list) else ['kd_loss']
    assert list(learn.recorder.metric_names) == ['epoch','train_loss','valid_loss','accuracy','perplexity',*columns,'time']
    row = list(learn.recorder.values[-1])
    assert learn.recorder.losses[0] == pytest.approx(kd.curves['train']['label_loss'][0], rel=1e-5)  # train_loss too
    assert row[1:4] == pytest.approx(list(learn.validate()), rel=1e-6)  # valid_loss and metrics are the student's own
    for c,mean in zip(columns, row[4:]): assert mean == pytest.approx(sum(kd.curves['train'][c][3:])/3, rel=1e-5)
    assert [len(c) for c in kd.curves['train'].values()] == [6]*(len(columns)+1) and kd.curves['steps'] == [3,6]
    learn.fit(1)
    assert list(learn.recorder.metric_names) == ['epoch','train_loss','valid_loss','accuracy','perplexity','time'] and len(learn.recorder.values[-1]) == 4

def test_no_teacher_runs_in_validation():
    calls = []
    def teacher(x): calls.append(len(x)); return torch.zeros(len(x), 3)
    with pytest.warns(UserWarning, match='does nothing any more'): kd = KnowledgeDistillationCallback(teacher, SoftTarget, valid=True)
    learner().fit(1, cbs=kd)
    assert calls == [8]*3

def test_several_losses_of_one_kind_have_columns_of_their_own():
    kd = KnowledgeDistillationCallback(net(), [SoftTarget(T=1),SoftTarget(T=4),lambda pred: pred.sum()], weight=.1)
    assert [t.column for t in kd.objective.terms] == ['soft_target_loss_1','soft_target_loss_2','kd_loss']

def test_ensemble_is_the_mean_at_the_losss_temperature():
    dls,mine,theirs,teacher = pair()
    other = net(width=5, seed=9).double().eval()
    def objective(x, y, _):
        z = theirs(x)
        with torch.no_grad(): p = (F.softmax(teacher(x)/4, 1) + F.softmax(other(x)/4, 1))/2
        return .5*F.cross_entropy(z, y) + .5*16*F.kl_div(F.log_softmax(z/4, 1), p, reduction='batchmean')
    hand_loop(dls, theirs, objective, 3)
    learner(dls, mine).fit(1, cbs=KnowledgeDistillationCallback([teacher,other], SoftTarget(T=4)))
    close(weights(theirs), weights(mine))

def test_an_ensemble_for_yes_and_no_is_the_mean_of_sigmoids():
    z = [4*torch.randn(5, 3) for _ in range(3)]
    for T in 1.,2.: torch.testing.assert_close((mean_logits(z, T, axis=None)/T).sigmoid(), torch.stack([(o/T).sigmoid() for o in z]).mean(0))
    assert torch.isfinite(mean_logits([1e4*o for o in z], axis=None)).all()

def test_a_loss_without_a_temperature_says_what_is_averaged():
    class Yes(KDLoss):
        ensemble = 'sigmoid'
        def forward(self, pred, teacher_pred):
            seen.append(teacher_pred)
            return pred.mean()
    seen,teachers = [],[lambda x, z=z: torch.full((len(x),3), z) for z in (-3.,1.)]
    learner(batches(shuffle=False, dtype=torch.float64)).fit(1, cbs=KnowledgeDistillationCallback(teachers, Yes))
    torch.testing.assert_close(seen[0].sigmoid(), torch.full((8,3), (1/(1+math.e**3) + 1/(1+math.e**-1))/2))

@pytest.mark.parametrize('loss', [SoftTarget, BinarySoftTarget, ChannelWise, Logits, DIST])
def test_two_teachers_that_agree_are_one(loss):
    "also where the numbers of a row are not the probabilities of one class among several"
    class Maps(nn.Conv2d):
        def __init__(self, seed): torch.manual_seed(seed); super().__init__(1, 3, 1)
    make = Maps if loss is ChannelWise else lambda seed: net(seed=seed)
    seen = []
    for teacher in make(7),[make(7),make(7)]:
        def plain(z, y): return z.square().mean()
        kd = KnowledgeDistillationCallback(teacher, loss, axis=1)
        learner(batches(shuffle=False, dtype=torch.float64), make(1), loss_func=plain).fit(1, cbs=kd)
        seen.append(kd.curves['train']['kd_loss'])
    assert seen[0] == pytest.approx(seen[1], rel=1e-9) and min(seen[0]) > 0

def test_a_last_batch_of_one_row_does_not_end_the_fit():
    "In validation the last batch is what is left over; RKD compares rows with each other"
    kd = KnowledgeDistillationCallback(net(width=6, seed=7), [RKD,Similarity,PKT], ['conv2'], ['conv2'], weight=.1)
    learner(batches(n_valid=9)).fit(1, cbs=kd)
    assert all(math.isfinite(v) and v > 0 for c in kd.curves['train'].values() for v in c)

class Late(KDLoss):
    "A loss whose weight is 0 in the first batch, and which makes its parameters in its own first"
    paper,warmup_epochs = (1.,1.),1
    def build(self, fm_s, fm_t): self.scale = nn.Parameter(torch.ones(()))
    def forward(self, pred, teacher_pred): return self.scale*F.mse_loss(pred, teacher_pred)

def test_a_loss_is_trained_while_another_is_not_yet_made():
    seen = []
    for losses in [Mine],[Mine,Late]:
        dls,mine,_,teacher = pair()
        class Watch(Callback):
            order = 30
            def after_step(self): steps.append([p.detach().clone() for p in kd.session.loss_params.params[:2]])
        kd,steps = KnowledgeDistillationCallback(teacher, losses, weight='paper'),[]
        learner(dls, mine).fit(1, cbs=[kd, Watch()])
        seen.append(steps[:2])
    assert len(seen[0]) == 2
    for alone,joined in zip(*seen):
        for a,b in zip(alone, joined): torch.testing.assert_close(a, b)

class Mine(KDLoss):
    "A user's loss with parameters that are there from the start"
    paper = (1.,1.)
    def __init__(self): super().__init__(); torch.manual_seed(5); self.map = nn.Linear(3, 3)
    def forward(self, pred, teacher_pred): return F.mse_loss(self.map(pred), teacher_pred)

class Foreign(nn.Module):
    "The same as any module, which knows nothing of fastkd"
    def __init__(self): super().__init__(); torch.manual_seed(5); self.map = nn.Linear(3, 3)
    def forward(self, pred, teacher_pred): return F.mse_loss(self.map(pred), teacher_pred)

@pytest.mark.parametrize('make', [Mine, Foreign])
def test_parameters_that_a_loss_comes_with_are_trained(make):
    dls,mine,theirs,teacher = pair()
    loss,by_hand = make(),make()
    end = []
    class Watch(Callback):
        order = 30
        def after_train(self): end.extend(p.detach().clone() for p in kd.session.loss_params.params)
    kd = KnowledgeDistillationCallback(teacher, loss, weight=.5)
    learner(dls, mine).fit(1, cbs=[kd, Watch()])
    for x,y in dls.train:
        z = theirs.train()(x)
        grads = torch.autograd.grad(.5*F.cross_entropy(z, y) + .5*by_hand(z, teacher(x).detach()), [*theirs.parameters(), *by_hand.parameters()])
        with torch.no_grad():
            for p,g in zip([*theirs.parameters(), *by_hand.parameters()], grads): p -= .1*g
    close(weights(theirs), weights(mine))
    assert all(torch.allclose(a, b) for a,b in zip(end, by_hand.parameters()))
    assert torch.equal(loss.map.weight, make().map.weight)  # the user's object stays as it is

def test_validating_in_the_middle_of_an_epoch_keeps_the_losses_parameters_in_training():
    sizes = []
    class Peek(Callback):
        order = 70
        def after_batch(self):
            if self.training and self.create_mbar:
                sizes.append(len(self.opt.param_lists[-1]))
                self.learn.validate()
                self.learn.dl = self.dls.train; self.learn.training = True; self.model.train()
    learn = learner()
    learn.fit(1, cbs=[KnowledgeDistillationCallback(net(width=6, seed=7), FitNet, ['conv2'], ['conv2']), Peek()])
    assert len(set(sizes)) == 1 and sizes[0] > len(list(learn.model.parameters()))

def test_an_epoch_that_was_cut_short_keeps_what_it_trained():
    class Cut(Callback):
        order = 5
        def after_batch(self):
            if self.training and self.epoch == 1: raise CancelEpochException()
    kd = KnowledgeDistillationCallback(net(width=6, seed=7), SoftTarget)
    learner().fit(2, cbs=[kd, Cut()])
    assert kd.curves['steps'] == [3,4] and all(v > 0 for v in kd.curves['train']['kd_loss'])

def test_the_parameters_of_losses_go_on_in_the_next_fit_of_the_same_student():
    "`fine_tune` is two fits; FitNet's projections are not made anew in the second"
    def kd(): return KnowledgeDistillationCallback(net(width=6, seed=7), FitNet, ['conv2'], ['conv2'])
    class Watch(Callback):
        order = 1001
        def before_backward(self): started.append([p.detach().clone() for p in self.learn.knowledge_distillation.session.loss_params.params])
    def first_step_of(fit):
        started.clear()
        fit()
        return started[0]
    started,one = [],kd()
    learn = learner(cbs=[one, Watch()])
    learn.fit(1)
    end = {k: v.clone() for k,v in one.state_dict()['losses']['kd_loss'].items()}
    again = first_step_of(lambda: learn.fit(1))
    assert all(any(torch.equal(p, v) for v in end.values()) for p in again)
    anew = first_step_of(lambda: learn.fit(1, reset_opt=True))
    other = learner(cbs=[kd(), Watch()])
    for fit in (lambda: learn.fit(1, reset_opt=True), lambda: other.fit(1)):
        anew = first_step_of(fit)
        assert not any(torch.equal(p, v) for p in anew for v in one.result.loss_state['losses']['kd_loss'].values() if p.ndim > 1)

def test_lr_find_does_not_use_up_a_state():
    def kd(): return KnowledgeDistillationCallback(net(width=6, seed=7), FitNet, ['conv2'], ['conv2'])
    first = kd(); learner().fit(1, cbs=first)
    state,again = first.state_dict(),kd()
    again.load_state_dict(state)
    learn = learner(cbs=again)
    learn.lr_find(num_it=3, show_plot=False)
    started = []
    class Watch(Callback):
        order = 30
        def before_backward(self): started.append([p.detach().clone() for p in again.session.loss_params.params])
    learn.fit(1, cbs=Watch())
    kept = [v for k,v in state['losses']['kd_loss'].items() if 'running' not in k and 'num_batches' not in k]
    assert all(torch.equal(a, b) for a,b in zip(started[0], kept))
