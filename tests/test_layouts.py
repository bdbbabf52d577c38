"Where the channels of activations are: against the same networks in another layout, and against timm's own maps"
import gc, weakref
import pytest, torch
from torch import nn
from torchvision import models as tv
from fastai.tabular.model import TabularModel
from fastai.text.models.awdlstm import AWD_LSTM
from fastai.vision.models.xresnet import xresnet18
from fastkd.layers import ChannelTracker, FeatureHooks, Layout, channels_first, find_layouts, layout_error, token_grid, trace
from fastkd.matching import match_layers
from conftest import hooks, net

def stored(model, xb, names):
    h = FeatureHooks(model.eval(), names)
    with torch.no_grad(): h.run(*xb if isinstance(xb, tuple) else (xb,))
    return h.collect()

def maps(model, xb, names):
    "The activations of layers of `model`, channels first"
    layouts = find_layouts(model, xb)
    return {n: channels_first(a, layouts[n]) for n,a in stored(model, xb, names).items()}

# --- the same network in another layout ----------------------------------------------------------------------------

class Stage(nn.Module):
    "Two convolutions, with inputs and outputs in either layout"
    def __init__(self, i, o, stride, last):
        super().__init__()
        self.a,self.b,self.last = nn.Conv2d(i, o, 3, stride, 1),nn.Conv2d(o, o, 3, 1, 1),last
    def forward(self, x):
        x = self.a(x.movedim(-1,1) if self.last else x).relu()
        x = x + self.b(x).relu()
        return x.permute(0,2,3,1) if self.last else x

class Stages(nn.Module):
    def __init__(self, widths, strides, last, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.last = last
        self.s1,self.s2 = (Stage(i, o, s, last) for i,o,s in zip((3, *widths), widths, strides))
        self.free,self.fc = nn.Identity(),nn.Linear(widths[-1], 4)
    def forward(self, x):
        x = self.free(self.s2(self.s1(x.movedim(1,-1) if self.last else x)).relu())
        return self.fc(x.mean((1,2) if self.last else (2,3)))

@pytest.mark.parametrize('widths,strides,shape', [((4,8), (2,2), (3,16,16)), ((6,9), (1,2), (3,12,20)), ((8,8), (2,1), (3,16,16)), ((16,8), (1,2), (3,16,16))])
def test_channels_last_twin(widths, strides, shape):
    "In the last two, height and width are the number of channels, so that only what computes them can tell"
    x = torch.randn(8, *shape)
    names = ['s1','s2','free','s1.a','s2.b']
    first,last = (Stages(widths, strides, l) for l in (False, True))
    assert {n: l.channel_axis for n,l in find_layouts(last, x).items() if n in names} == {'s1':3, 's2':3, 'free':3, 's1.a':1, 's2.b':1}
    a,b = maps(first, x, names),maps(last, x, names)
    for n in names: torch.testing.assert_close(a[n], b[n])
    assert match_layers(first, last, x) == (['s1','s2'],)*2 if strides == (2,2) else True

class Series(nn.Module):
    "Layers over a sequence: `Conv1d` on (B, c, n), or the same as `Linear` layers on (B, n, c)"
    def __init__(self, linear):
        super().__init__()
        torch.manual_seed(0)
        a,b = nn.Conv1d(6,6,1),nn.Conv1d(6,6,1)
        if linear:
            la,lb = nn.Linear(6,6),nn.Linear(6,6)
            for l,c in ((la,a), (lb,b)): l.weight.data,l.bias.data = c.weight.data[...,0],c.bias.data
            a,b = la,lb
        self.a,self.b,self.act,self.linear = a,b,nn.ReLU(),linear
    def forward(self, x): return self.b(self.act(self.a(x.mT if self.linear else x))).mean(1 if self.linear else 2)

def test_convolutions_and_linear_layers_over_a_sequence():
    x = torch.randn(6,6,6)                       # examples, channels and positions are equally many
    a,b = (maps(Series(l), x, ['a','act','b']) for l in (False, True))
    for n in a: torch.testing.assert_close(a[n], b[n])
    assert [Layout(1),Layout(2)] == [find_layouts(Series(l), x)['act'] for l in (False, True)]

# --- timm's own maps -----------------------------------------------------------------------------------------------

VIT,SWIN = 'vit_tiny_patch16_224',dict(embed_dim=16, depths=(1,1,1,1), num_heads=(2,2,2,2), window_size=4)

@pytest.mark.parametrize('name,size,kwargs', [
    ('resnet10t', 64, {}), ('efficientnet_b0', 64, {}), ('mobilevit_xxs', 64, {}), ('pvt_v2_b0', 64, {}), ('levit_128s', 224, {}),
    (VIT, 64, dict(img_size=64)),
    (VIT, (32,64), dict(img_size=(32,64))),
    (VIT, 64, dict(img_size=64, reg_tokens=4)),
    (VIT, 32, dict(img_size=32, reg_tokens=4)),                             # nine tokens, of which five are no places
    (VIT, 64, dict(img_size=64, embed_dim=16, num_heads=2, class_token=False, global_pool='avg')),     # 16 tokens with 16 channels
    ('vit_base_patch16_reg4_gap_256', 64, dict(img_size=64)),
    ('deit_tiny_distilled_patch16_224', 64, dict(img_size=64)),
    ('swin_tiny_patch4_window7_224', 64, dict(img_size=64)),
    ('convnext_atto', 64, dict(depths=(1,2,1,1), dims=(16,8,20,24))),       # 16×16 positions with 16 channels, 8×8 with 8
    ('mixer_s32_224', 64, dict(img_size=64)), ('gmlp_s16_224', 64, dict(img_size=64)),
])
def test_timm(name, size, kwargs):
    timm = pytest.importorskip('timm')
    against_timm(timm.create_model(name, pretrained=False, num_classes=10, **kwargs), size)

def test_timm_with_as_many_channels_as_positions():
    pytest.importorskip('timm')
    from timm.models.mlp_mixer import MlpMixer
    from timm.models.swin_transformer import SwinTransformer
    against_timm(SwinTransformer(img_size=64, **SWIN), 64)                  # 16×16 positions with 16 channels
    against_timm(MlpMixer(img_size=64, patch_size=16, num_blocks=2, embed_dim=16), 64)    # 16 tokens with 16 channels

def against_timm(model, size):
    x = torch.randn(16, 3, *((size,size) if isinstance(size, int) else size))    # as many examples as channels
    names = [f['module'] for f in model.feature_info]
    with torch.no_grad(): want = model.eval().forward_intermediates(x, intermediates_only=True)
    got = maps(model, x, names)
    assert len(want) == len(names)
    for n,w in zip(names, want): torch.testing.assert_close(got[n], w, atol=1e-4, rtol=1e-4)

def test_tokens_are_the_map_of_the_patches():
    timm = pytest.importorskip('timm')
    got = maps(timm.create_model('vit_tiny_patch16_224', img_size=(64,96)), torch.randn(2,3,64,96), ['patch_embed.proj','patch_embed'])
    assert got['patch_embed'].shape == (2,192,4,6)
    torch.testing.assert_close(*got.values())

def test_layers_that_mix_tokens():
    "Inside an MLP-Mixer linear layers get (B, c, n), which is channels first"
    pytest.importorskip('timm')
    from timm.models.mlp_mixer import MlpMixer
    layouts = find_layouts(MlpMixer(img_size=64, patch_size=16, num_blocks=2, embed_dim=16), torch.randn(16,3,64,64))
    assert layouts['blocks.1.mlp_tokens'] == layouts['blocks.1.mlp_tokens.fc2'] == Layout(1,(4,4))
    assert layouts['blocks.1.mlp_channels'] == layouts['blocks.1.norm1'] == Layout(2,(4,4))

# --- other models --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('make,names,axis', [
    (lambda: tv.swin_t(num_classes=10), ['features.1','features.3.0','features.7'], 3),
    (lambda: tv.swin_v2_t(num_classes=10), ['features.1','features.3.0','features.7'], 3),
    (lambda: tv.convnext_tiny(num_classes=10), ['features.0','features.1.2','features.2','features.7'], 1),
    (lambda: tv.maxvit_t(num_classes=10), ['blocks.0','blocks.1','blocks.3'], 1),
    (lambda: tv.shufflenet_v2_x0_5(num_classes=10), ['stage2','stage2.1','stage4'], 1),
    (xresnet18, ['4','7'], 1),
    (lambda: tv.densenet121(num_classes=10), ['features.denseblock1','features.denseblock4'], 1),
])
def test_maps_of_torchvision_and_fastai(make, names, axis):
    with torch.device('meta'): model,x = make(),torch.randn(2,3,224,224)
    layouts = find_layouts(model, x)
    assert [layouts[n] for n in names] == [Layout(axis)]*len(names)

def test_convnext_block_with_as_many_channels_as_positions():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt
    model = ConvNeXt([CNBlockConfig(16, 8, 2), CNBlockConfig(8, None, 2)], num_classes=3)      # 16×16 with 16 channels, 8×8 with 8
    layouts = find_layouts(model, torch.randn(16,3,64,64))
    assert [layouts[f'features.{n}'].channel_axis for n in ('0','1','1.0','3','3.1')] == [1]*5
    assert [layouts[f'features.1.0.block.{i}'].channel_axis for i in range(7)] == [1,3,3,3,3,3,1]

def test_shuffled_channels_are_known_by_the_next_convolution():
    from torchvision.models.shufflenetv2 import InvertedResidual
    model = nn.Sequential(nn.Conv2d(3,8,3,2,1), InvertedResidual(8,8,1), InvertedResidual(8,8,1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,2))
    layouts = find_layouts(model, torch.randn(8,3,16,16))
    assert layouts['1'] == layouts['2'] == Layout(1)

def test_two_grids():
    "64 and 16 tokens of the same image, with and without a class token"
    class Tokens(nn.Module):
        def __init__(self, cls):
            super().__init__()
            self.fine,self.coarse,self.cls = nn.Conv2d(3,8,4,4),nn.Linear(32,12),nn.Parameter(torch.zeros(1,1,12)) if cls else None
            self.a,self.b = nn.LayerNorm(8),nn.LayerNorm(12)
        def forward(self, x):
            x = self.a(self.fine(x).flatten(2).mT)
            b,_,c = x.shape
            x = self.coarse(x.view(b,4,2,4,2,c).permute(0,1,3,2,4,5).reshape(b,16,4*c))    # as Swin's patch merging
            return self.b(x if self.cls is None else torch.cat([self.cls.expand(b,-1,-1), x], 1)).mean(1)
    x = torch.randn(2,3,32,32)
    for cls in (False, True):
        layouts = find_layouts(Tokens(cls), x)
        assert layouts['a'] == Layout(2,(8,8)) and layouts['coarse'] == Layout(2,(4,4)) and layouts['b'] == Layout(2,(4,4),int(cls))
    # `merged` averages 2×2 tokens, so the coarse map is the fine one after pooling
    model = Tokens(False)
    model.coarse = nn.Linear(32,8,bias=False)
    model.coarse.weight.data = torch.eye(8).repeat(1,4)/4
    model.b = nn.LayerNorm(8)
    got = maps(model, x, ['a','coarse'])
    torch.testing.assert_close(nn.functional.avg_pool2d(got['a'], 2), got['coarse'])

def test_texts_tables_and_volumes():
    tokens = torch.randint(0, 20, (7,49))                                       # as many tokens as 7×7 places, which they are not
    layouts = find_layouts(AWD_LSTM(20, 6, 8, 2), tokens)
    assert layouts['rnns.0'] == layouts['rnns.1'] == layouts['input_dp'] == Layout(2)
    xb = torch.randint(0, 5, (4,1)),torch.randn(4,2)
    assert set(find_layouts(TabularModel([(5,3)], 2, 2, [10]), xb).values()) == {Layout(1)}
    layouts = find_layouts(tv.video.r3d_18(num_classes=3), torch.randn(1,3,4,32,32))
    assert layouts['layer1'] == layouts['layer4'] == Layout(1)
    volume = nn.Sequential(nn.Conv3d(1,4,3,2,1), nn.ReLU(), nn.Flatten(2))
    got = maps(volume, torch.randn(4,1,8,8,8), ['1','2'])
    torch.testing.assert_close(got['1'], got['2'])                              # flattened, and a volume again

def test_transformers_of_pytorch():
    layer = lambda first: nn.TransformerEncoderLayer(6, 2, 12, batch_first=first)
    tokens = torch.randn(6,5,6)
    assert find_layouts(nn.Sequential(layer(True), nn.Linear(6,2)), tokens)['0'] == Layout(2)
    class SequenceFirst(nn.Module):
        def __init__(self): super().__init__(); self.block,self.lstm = layer(False),nn.LSTM(6,6)
        def forward(self, x): return self.lstm(self.block(x.transpose(0,1)))[0].transpose(0,1)
    layouts = find_layouts(SequenceFirst(), tokens)
    assert layouts['block'] is None and layouts['lstm'] is None                 # (n, B, c)
    layouts = find_layouts(SequenceFirst(), tokens.repeat(1,2,1)[:,:6])         # and as many tokens as examples
    assert layouts['block'] is None and layouts['lstm'] is None

# --- what cannot be known ------------------------------------------------------------------------------------------

def hidden(x):
    "Exchanges axes in a way that no PyTorch function shows"
    return torch.from_numpy(x.detach().numpy().transpose(0,3,2,1).copy())

class Opaque(nn.Module):
    def __init__(self): super().__init__(); self.conv,self.out = nn.Conv2d(3,8,3,2,1),nn.Identity()
    def forward(self, x): return self.out(hidden(self.conv(x))).mean((1,2))

def test_what_is_hidden_is_inferred_or_refused():
    assert find_layouts(Opaque(), torch.randn(4,3,32,32))['out'] == Layout(3)   # 16×16 positions have the image's proportions
    assert find_layouts(Opaque(), torch.randn(4,3,16,16))['out'] is None        # 8×8×8
    for use,layout in ((nn.Conv2d(8,4,1), Layout(1)), (nn.Linear(8,4), Layout(3))):
        class Used(Opaque):
            def __init__(self): super().__init__(); self.use = use
            def forward(self, x): return self.use(self.out(hidden(self.conv(x)))).mean((1,2))
        assert find_layouts(Used(), torch.randn(4,3,16,16))['out'] == layout    # the layer that uses it tells
    class Bare(nn.Module):
        "Nothing in it tells what is what"
        def __init__(self): super().__init__(); self.out = nn.Identity()
        def forward(self, x): return self.out(torch.einsum('bchw,bdhw->bhcd', x, x)).mean((2,3))
    layout = find_layouts(Bare(), torch.randn(4,8,8,8))['out']
    assert layout is None
    for error,words in ((layout_error('out', (4,8,8,8), 4, 'student'), ("'out' of the student", '(4, 8, 8, 8)', '`channel_axis=`')), (layout_error('w', (64,4,8), 4), ("'w' of the model", '4 examples'))):
        assert isinstance(error, ValueError) and all(w in str(error) for w in words)

def test_windows_and_single_numbers_have_no_layout():
    class Windows(nn.Module):
        def __init__(self): super().__init__(); self.cut,self.one = nn.Identity(),nn.Identity()
        def forward(self, x): return self.cut(x.reshape(-1,4,4)).reshape(len(x), -1) + self.one(x.mean((1,2,3)))[:,None]
    layouts = find_layouts(Windows(), torch.randn(2,1,8,8))
    assert layouts == {'': Layout(1), 'cut': None, 'one': None}

def test_scripted_layers():
    "take no hooks; the others of the model can be looked at"
    x,model = torch.randn(2,3,32,32),nn.Sequential(nn.Conv2d(3,8,3,2,1), torch.jit.script(nn.Conv2d(8,12,3)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12,2))
    layouts = find_layouts(model, x)
    assert '1' not in layouts and layouts['0'] == layouts['2'] == Layout(1)
    with pytest.raises(TypeError, match='TorchScript.*teacher'): match_layers(net(), torch.jit.script(model), torch.randn(2,1,8,8), teacher_xb=x)

# --- channels first ------------------------------------------------------------------------------------------------

def test_channels_first_is_a_view_and_differentiable():
    for act,layout in ((torch.randn(2,5), Layout(1)), (torch.randn(2,5,4,6), Layout(1)), (torch.randn(2,4,6,5), Layout(3)), (torch.randn(2,21,5), Layout(2,(4,4),5)), (torch.randn(2,5,16), Layout(1,(2,8)))):
        act = act.double().requires_grad_()
        out = channels_first(act, layout)
        assert out.shape[:2] == (2,5) and out.untyped_storage().data_ptr() == act.untyped_storage().data_ptr()
        assert torch.autograd.gradcheck(lambda a: channels_first(a, layout)**2, act)
    with pytest.raises(ValueError, match='20 tokens.*5 . 4 × 4'): channels_first(torch.randn(2,20,5), Layout(2,(4,4),5))

def test_token_grids():
    assert token_grid(197, [(14,14)], (224,224)) == ((14,14),1)
    assert token_grid(65, [(2,2),(4,4),(8,8)], (64,64)) == ((8,8),1)
    assert token_grid(32, [], (32,64)) == ((4,8),0)
    assert token_grid(17, [], (64,64)) == (None,0)           # nothing says that one of them is no place
    assert token_grid(7, [], (49,)) == token_grid(1, [(1,1)], (8,8)) == (None,0)
    assert token_grid(8, [(2,2,2)], (8,16,16)) == ((2,2,2),0)

# --- everything that is matched can be compared --------------------------------------------------------------------

@pytest.mark.parametrize('name', ['resnet18','vgg11','swin_t','convnext_tiny','efficientnet_b0','maxvit_t','mobilenet_v3_small','vit_b_32','densenet121','shufflenet_v2_x0_5'])
def test_matched_layers_have_layouts(name):
    with torch.device('meta'): student,teacher,x = tv.resnet18(),getattr(tv, name)(),torch.randn(2,3,224,224)
    for m,names in zip((student, teacher), match_layers(student, teacher, x)):
        layouts,shapes = find_layouts(m, x),{r.name: r.shape for r in trace(m, x).runs}
        for n in names:
            act = channels_first(torch.empty(shapes[n], device='meta'), layouts[n])
            assert act.ndim == 4 and act.shape[2] == act.shape[3]

# --- nothing stays -------------------------------------------------------------------------------------------------

def test_tracing_leaves_nothing():
    m,x = net(),torch.randn(2,1,8,8)
    seen = weakref.WeakSet()
    m.relu1.register_forward_hook(lambda layer, args, out: seen.add(out))
    result = trace(m, x)
    gc.collect()
    assert not seen and not any(isinstance(a, torch.Tensor) for r in result.runs for a in r.axes)
    assert len(hooks(m)) == 1
    with pytest.raises(RuntimeError): trace(m, torch.randn(2,2,8,8))
    assert torch.nn.functional.relu(x).shape == x.shape and not torch.overrides._get_current_function_mode_stack()
    assert len(hooks(m)) == 1

def test_keyword_inputs_and_outputs_in_tuples():
    with ChannelTracker() as tracker:
        a,b = torch.split(nn.functional.conv2d(input=torch.randn(2,3,4,4), weight=torch.randn(8,3,1,1)), 4, dim=1)
        c = torch.permute(input=a, dims=(0,2,3,1))
        d = torch.cat([a, b], dim=1)[:,:,None].mean(2)
    assert [tracker.axis_of(t) for t in (a, b, c)] == [1,1,None]
