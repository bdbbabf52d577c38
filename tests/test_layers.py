"Layers: names, what hooks store, and models that stay as they were"
import random, weakref
import numpy as np
import pytest, torch
from torch import nn
from fastai.text.models.awdlstm import AWD_LSTM
from fastkd.layers import FeatureHooks, find_layer
from fastkd.matching import layer_table, match_layers
from fastkd.similarity import layer_similarity
from conftest import batches, hooks, learner, net, same, weights

# --- names ---------------------------------------------------------------------------------------------------------

def test_wrong_names():
    m = net()
    with pytest.raises(ValueError, match="student.*does not exist.*'conv1'.*get_model_layers"): find_layer(m, 'conv', 'student')
    with pytest.raises(ValueError, match=r"'conv2' \(2, 8, 4, 4\)"): find_layer(m, 'conv3', xb=torch.randn(2,1,8,8))
    with pytest.raises(ValueError, match='is a Parameter'): find_layer(m, 'fc.weight')
    with pytest.raises(ValueError, match='is a method'): find_layer(m, 'fc.forward')
    assert find_layer(m, m.fc) is m.fc  # a layer itself is as good as its name
    with pytest.raises(TypeError, match='modules of the student, got int 3'): find_layer(m, 3, 'student')
    with pytest.raises(TypeError, match='list'): find_layer(m, ['fc'])
    with pytest.raises(TypeError, match='function'): find_layer(m, lambda x: x)
    with pytest.raises(ValueError, match=r"'conv1' \(2, 4, 8, 8\)"): FeatureHooks(m, ['conv'], xb=torch.randn(2,1,8,8))

def test_a_list_of_layers_never_runs():
    class Listed(nn.Module):
        def __init__(self): super().__init__(); self.layers = nn.ModuleList([nn.Linear(2,2)])
        def forward(self, x): return self.layers[0](x)
    listed = FeatureHooks(Listed(), ['layers'])
    listed.run(torch.randn(2,2))
    with pytest.raises(ValueError, match='ModuleList never runs itself'): listed.collect()

# --- models stay as they were --------------------------------------------------------------------------------------

def looks():
    x = torch.randn(8,1,8,8)
    return {'layer_table': lambda m: layer_table(m, x), 'match_layers': lambda m: match_layers(m, m, x), 'layer_similarity': lambda m: layer_similarity(m, m, [x,x])}

@pytest.mark.parametrize('look', ['layer_table','match_layers','layer_similarity'])
def test_looking_changes_nothing(look):
    class Noise(nn.Module):
        "Draws in eval mode too"
        def forward(self, x): return x + 0*torch.rand_like(x)*np.random.rand()*random.random()
    m = net(dropout=0.5).train()
    m.noise = Noise()
    m.bn1.eval()
    m.fc.weight.requires_grad_(False)
    look = looks()[look]
    before,modes = weights(m),[o.training for o in m.modules()]
    states = torch.get_rng_state(),np.random.get_state()[1].copy(),random.getstate()
    look(m)
    assert same(before, weights(m)) and modes == [o.training for o in m.modules()] and not hooks(m)
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all() and states[2] == random.getstate()
    assert not m.fc.weight.requires_grad and all(p.grad is None for p in m.parameters())

@pytest.mark.parametrize('look', ['layer_table','match_layers','layer_similarity'])
def test_an_error_in_the_model_changes_nothing(look):
    class Fails(nn.Module):
        def forward(self, x): raise RuntimeError('out of luck')
    m = nn.Sequential(net(), Fails())
    with pytest.raises(RuntimeError, match='out of luck'): looks()[look](m)
    assert m.training and not hooks(m)

def test_hidden_state_stays():
    m = AWD_LSTM(20, 6, 8, 2)
    tokens = torch.randint(0, 20, (4,5))
    m(tokens)
    hidden = [[t.clone() for t in h] for h in m.hidden]
    layer_table(m, tokens)
    layer_similarity(m, m, [tokens], (['rnns.0','rnns.1'],)*2)
    assert all(torch.equal(a, b) for h,k in zip(hidden, m.hidden) for a,b in zip(h, k))
    again = AWD_LSTM(20, 6, 8, 2)
    layer_table(again, tokens)
    again(tokens)                                # the weights after dropout are made anew

def test_compiled_models():
    "Hooks that come after the compilation would not be seen"
    m,x = net(),torch.randn(4,1,8,8)
    names = list(layer_table(m, x).index)
    m.eval().compile(backend='eager')
    with torch.no_grad(): m(x)                   # as it will run when it is looked at: the code is there already
    assert list(layer_table(m, x).index) == names
    assert match_layers(m, torch.compile(net(), backend='eager'), x) == (['relu1','relu2'],)*2
    assert list(FeatureHooks(learner(model=m), ['conv1']).layers) == ['conv1']

def test_shuffling_stays():
    "Training after a look sees the batches in the order that it would have seen"
    def order(look):
        torch.manual_seed(0); random.seed(0); np.random.seed(0)
        dls = batches()
        learn = learner(dls)
        look(learn)
        return torch.cat([yb for _,yb in dls.train]), torch.cat([xb.flatten(1) for xb,_ in dls.train])
    plain = order(lambda learn: None)
    for look in (lambda learn: learn.layer_table(), lambda learn: layer_similarity(learn, net(), learn.dls.train)):
        assert all(torch.equal(a, b) for a,b in zip(plain, order(look)))

# --- hooks ---------------------------------------------------------------------------------------------------------

def test_a_module_with_two_names():
    m = nn.Sequential(nn.Linear(2,2), nn.ReLU())
    m.again = m[0]
    with pytest.raises(ValueError, match="'0' and 'again' of the teacher are the same module"): FeatureHooks(m, ['0','again'], 'teacher')

def test_only_a_function_of_the_output_is_stored():
    "and the output itself is freed as soon as the model goes on"
    m,alive = net().eval(),[]
    def store(act):
        alive.append(weakref.ref(act))
        return act.sum()
    class Checks(nn.Module):
        def forward(self, x):
            assert alive[0]() is None       # conv1's output, two layers on
            return x
    m.relu1,m.conv2 = nn.ReLU(),nn.Sequential(m.conv2, Checks())
    stored = FeatureHooks(m, ['conv1'], store=store)
    x = torch.randn(2,1,8,8)
    with torch.no_grad(): stored.run(x)
    torch.testing.assert_close(stored.collect()['conv1'], m.conv1(x).sum())

def test_no_hook_stays_after_an_interrupt_while_hooks_are_set(monkeypatch):
    m = net()
    def interrupted(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(m.fc, 'register_forward_hook', interrupted)
    stored = FeatureHooks(m, ['conv1','fc'])
    with pytest.raises(KeyboardInterrupt): stored.__enter__()
    assert hooks(m)
    stored.__exit__()
    assert not hooks(m)
