"Pairs of layers for many architectures, and tables of layers"
import itertools, math, random
import pytest, torch
from torch import nn
from torchvision import models as tv
from fastai.layers import ConvLayer
from fastai.tabular.model import TabularModel
from fastai.text.models.awdlstm import AWD_LSTM
from fastai.text.models.core import get_language_model
from fastai.vision.learner import create_unet_model, create_vision_model
from fastai.vision.models.xresnet import xresnet18, xresnet34
from fastkd.layers import get_model_layers
from fastkd.matching import evenly_spaced, layer_table, match_layers, pairs_by_depth
from conftest import net

# pairs depend on shapes only, and on the meta device shapes are all that is computed
def image(size=64, bs=2): return torch.empty(bs, 3, size, size, device='meta')

def build(make):
    with torch.device('meta'): return make()

def timm_model(name, **kwargs):
    timm = pytest.importorskip('timm')
    return build(lambda: timm.create_model(name, pretrained=False, num_classes=10, **kwargs))

def from_torchvision(name): return build(lambda: getattr(tv, name)(num_classes=10))

RESNET = ['layer1','layer2','layer3','layer4']

def blocks(name, *numbers): return [f'{name}.{n}' for n in numbers]

# --- pairs ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('size', [32,64,97,224])
def test_the_tutorials_pairs(size):
    teacher = build(lambda: create_vision_model(tv.resnet34, 2, pretrained=False))
    assert match_layers(from_torchvision('resnet18'), teacher, image(size)) == (RESNET, blocks('0', 4,5,6,7))

@pytest.mark.parametrize('name,student,teacher', [
    ('resnet50', RESNET, RESNET),
    ('densenet121', RESNET, [f'features.denseblock{i}' for i in (1,2,3,4)]),
    ('efficientnet_b0', RESNET, blocks('features', 2,3,5,7)),
    ('mobilenet_v3_small', RESNET, blocks('features', 1,3,8,11)),
    ('convnext_tiny', RESNET, blocks('features', 1,3,5,7)),
    ('swin_t', RESNET, blocks('features', 1,3,5,7)),
    ('maxvit_t', RESNET, blocks('blocks', 0,1,2,3)),                 # windows within a block
    ('shufflenet_v2_x0_5', RESNET[1:], ['stage2','stage3','stage4']),
    ('vgg11', RESNET[:3], blocks('features', 9,14,19)),
])
def test_resnet_and_torchvision(name, student, teacher):
    assert match_layers(from_torchvision('resnet18'), from_torchvision(name), image(224)) == (student, teacher)

@pytest.mark.parametrize('name,teacher', [
    ('efficientnet_b0', blocks('blocks', 1,2,4,6)),
    ('mobilenetv3_small_100', blocks('blocks', 0,1,3,4)),
    ('mobilenetv3_large_100', blocks('blocks', 1,2,4,5)),
    ('convnext_atto', blocks('stages', 0,1,2,3)),
    ('resnet26d', RESNET),
    ('regnety_002', ['s1','s2','s3','s4']),
    ('swin_tiny_patch4_window7_224', blocks('layers', 0,1,2,3)),     # puts out (n, h, w, c)
    ('vgg11', blocks('features', 9,14,19)),                          # the one block is made of the classifier's convolutions
    ('ghostnet_100', blocks('blocks', 2,4,6,8)),                     # two convolutions before the one that reduces the resolution
    ('twins_svt_small', ['blocks.0.1','blocks.1.1','blocks.2.9','blocks.3.3']),     # attention to a reduced map within a block
    ('mobilevit_xs', blocks('stages', 1,2,3,4)),                     # tokens of patches within a block
    ('vit_tiny_patch16_224', blocks('blocks', 2,5,8,11)),            # one resolution: by depth
    ('mixer_s32_224', blocks('blocks', 1,3,5,7)),                    # mixes tokens in a transposed MLP
])
def test_resnet_and_timm(name, teacher):
    assert match_layers(from_torchvision('resnet18'), timm_model(name), image(224)) == (RESNET[:len(teacher)], teacher)

def test_vits_of_different_depth():
    student,teacher = timm_model('vit_tiny_patch16_224'),timm_model('vit_tiny_patch16_224', depth=18)
    assert match_layers(student, teacher, image(224)) == (blocks('blocks', 2,5,8,11), blocks('blocks', 4,8,13,17))
    assert match_layers(student, teacher, image(224), n=2) == (blocks('blocks', 5,11), blocks('blocks', 8,17))
    assert len(match_layers(student, teacher, image(224), n=100)[0]) == 12
    assert match_layers(student, from_torchvision('vit_b_16'), image(224), n=1) == (['blocks.11'], ['encoder.layers.encoder_layer_11'])

def test_xresnet():
    resnet = from_torchvision('resnet18')
    assert match_layers(build(xresnet18), resnet, image()) == (['4','5','6','7'], RESNET)
    assert match_layers(build(xresnet18), build(xresnet34), image()) == (['4','5','6','7'],)*2

def test_plain_networks():
    plain = lambda *w: nn.Sequential(*[ConvLayer(a, b, stride=2) for a,b in zip(w, w[1:])], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(w[-1],2))
    assert match_layers(plain(3,4,8,8), plain(3,6,6,6,6), torch.randn(2,3,32,32)) == (['0','1','2'],)*2
    pooled = nn.Sequential(nn.Conv2d(3,4,3,padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4,8,3,padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8*64,2))
    assert match_layers(pooled, pooled, torch.randn(2,3,32,32)) == (['1','4'],)*2     # behind the activation function, before the pooling
    series = nn.Sequential(nn.Conv1d(2,4,3,2), nn.ReLU(), nn.Conv1d(4,8,3,2), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8,2))
    assert match_layers(series, series, torch.randn(3,2,64)) == (['1','3'],)*2

def test_stages_in_wrappers():
    class Block(nn.Module):
        def __init__(self, c): super().__init__(); self.a,self.b = nn.Conv2d(c,c,3,padding=1),nn.Conv2d(c,c,3,padding=1)
        def forward(self, x): return x + self.b(self.a(x).relu())
    body = nn.Sequential(nn.Conv2d(3,4,3,2,1), nn.Sequential(Block(4), Block(4)), nn.Sequential(nn.Conv2d(4,8,3,2,1), Block(8)))
    model = nn.Sequential(nn.Sequential(body), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,2))
    assert match_layers(model, body, torch.randn(2,3,16,16)) == (['0.0.1','0.0.2'], ['1','2'])      # two stages, and the body is not one of them
    late = nn.Sequential(nn.Sequential(nn.Sequential(Block(3), Block(3)), nn.Sequential(nn.Conv2d(3,8,3,2,1), Block(8))),
                         nn.Sequential(nn.Conv2d(8,8,3,2,1), Block(8)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,2))
    assert match_layers(late, late, torch.randn(2,3,16,16)) == (['0.0','0.1','1'],)*2               # the first stage at the resolution of the input
    assert match_layers(nn.DataParallel(model), model, torch.randn(2,3,16,16)) == (['0.0.1','0.0.2'],)*2

def test_dense_prediction():
    unet = create_unet_model(tv.resnet18, 3, (64,64), pretrained=False)
    s,t = match_layers(unet, unet, torch.randn(2,3,64,64))
    assert s == t and 'layers.0' not in s and 'layers.4' in s        # decoder blocks, not the whole encoder
    fcn = build(lambda: tv.segmentation.fcn_resnet50(weights=None, weights_backbone=None))
    assert match_layers(fcn, fcn, image())[0] == ['backbone.layer1','backbone.layer4']

def test_text_and_tables():
    lm = lambda n: get_language_model(AWD_LSTM, 20, config=dict(emb_sz=8, n_hid=12, n_layers=n, pad_token=1, bidir=False, output_p=0.1, hidden_p=0.1, input_p=0.1, embed_p=0.1, weight_p=0.1, tie_weights=True, out_bias=True))
    tokens = torch.randint(0, 20, (3,7))
    assert match_layers(lm(3), lm(3), tokens) == (blocks('0.rnns', 0,1,2),)*2
    assert match_layers(lm(2), lm(4), tokens) == (blocks('0.rnns', 0,1), blocks('0.rnns', 1,3))
    xb = torch.randint(0, 5, (4,2)), torch.randn(4,3)
    tab = lambda layers: TabularModel([(5,3),(5,4)], 3, 2, layers)
    assert match_layers(tab([30,20,10]), tab([30,20,10]), xb) == (blocks('layers', 0,1,2),)*2
    assert match_layers(tab([10]), tab([30,20]), xb) == (['layers.0'], ['layers.1'])

def test_strides_count_not_sizes():
    "A teacher with larger images is paired stage by stage"
    s,t = from_torchvision('resnet18'),from_torchvision('resnet34')
    assert match_layers(s, t, image(64), teacher_xb=image(128, bs=1)) == (RESNET, RESNET)

def test_one_common_resolution_is_not_enough():
    "A CIFAR network of strides 1, 2, 4 has stride 4 in common with a ResNet: its last stage, the ResNet's first"
    block = lambda a,b,s: nn.Sequential(nn.Conv2d(a,b,3,s,1), nn.ReLU(), nn.Conv2d(b,b,3,1,1), nn.ReLU())
    cifar = build(lambda: nn.Sequential(block(3,4,1), block(4,8,2), block(8,16,2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,10)))
    s,t = match_layers(cifar, from_torchvision('resnet18'), image(32))
    # depths 2/7, 4/7, 6/7 and 5/21, 10/21, 15/21, 20/21
    assert s == ['0','1','2'] and t == ['layer1','layer2','layer4']

@pytest.mark.parametrize('n,m', [(1,1),(1,4),(3,3),(3,5),(5,3),(4,7)])
def test_depth_pairs_are_the_best_of_all(n, m):
    rng = random.Random(n*10 + m)
    a,b = (sorted(rng.random() for _ in range(k)) for k in (n,m))
    cost = lambda pairs: sum(abs(a[i]-b[j]) for i,j in pairs)
    k = min(n, m)
    every = [list(zip(i, j)) for i in itertools.combinations(range(n), k) for j in itertools.combinations(range(m), k)]
    assert cost(pairs_by_depth(a, b)) == pytest.approx(min(map(cost, every)))

def testevenly_spaced():
    assert evenly_spaced('abcdefghijkl', 4) == list('cfil')
    assert evenly_spaced('abc', 5) == list('abc')
    assert evenly_spaced('abcd', 2) == list('bd')
    assert evenly_spaced('abcd', 1) == ['d']

def test_no_layer_to_compare_names_the_role():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(48,2))
    with pytest.raises(ValueError, match="student.*'1' \\(2, 2\\)"): match_layers(linear, net(), torch.randn(2,3,4,4), teacher_xb=torch.randn(2,1,8,8))
    with pytest.raises(TypeError, match='function'): match_layers(net(), lambda x: x, torch.randn(2,1,8,8))
    with pytest.raises(TypeError, match='inputs of the student'): match_layers(nn.Identity(), net(), 'cat.jpg')

def test_a_model_in_a_wrapper_is_no_stage():
    class Wrapper(nn.Module):
        def __init__(self, model): super().__init__(); self.net = model
        def forward(self, x): return self.net(x)
    def plain(width): return nn.Sequential(nn.Conv2d(1,width,3,padding=1), nn.ReLU(), nn.Conv2d(width,2*width,3,2,1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2*width,3))
    x = torch.randn(2,1,8,8)
    assert match_layers(plain(4), Wrapper(plain(6)), x) == (['1','3'], ['net.1','net.3'])
    assert match_layers(Wrapper(Wrapper(plain(4))), plain(6), x) == (['net.net.1','net.net.3'], ['1','3'])

# --- table ---------------------------------------------------------------------------------------------------------

def test_table_of_a_resnet():
    m = tv.resnet18(num_classes=10)
    table = layer_table(m, torch.randn(2,3,64,64))
    assert list(table.columns) == ['type','shape','stride','parameters','calls']
    assert list(table.index)[:6] == ['conv1','bn1','relu','maxpool','layer1','layer1.0']
    assert set(table.index) == set(get_model_layers(m))
    assert table.loc['layer3','shape'] == (2,256,4,4) and table.loc['layer3','stride'] == 16
    assert math.isnan(table.loc['fc','stride']) and table.loc['fc','shape'] == (2,10)
    assert table.loc['layer1.0.relu','calls'] == 2
    tops = layer_table(m, torch.randn(2,3,64,64), depth=1)
    assert list(tops.index) == ['conv1','bn1','relu','maxpool',*RESNET,'avgpool','fc']
    assert tops.parameters.sum() == sum(p.numel() for p in m.parameters())

def test_table_of_tokens():
    m = nn.Sequential(nn.Embedding(20,8), nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), nn.Linear(8,20))
    table = layer_table(m, torch.randint(0, 20, (3,7)))
    assert table.loc['1.layers.1','shape'] == (3,7,8) and table.loc['1.layers.1','stride'] == 1
    assert '1.layers' not in table.index         # a list of layers does not run

def test_table_of_a_recurrent_and_of_a_tabular_model():
    m = AWD_LSTM(20, 6, 8, 2)
    assert layer_table(m, torch.randint(0, 20, (4,5))).loc['rnns.1','shape'] == (4,5,6)
    m = TabularModel([(5,3)], 2, 2, [10])
    table = layer_table(m, (torch.randint(0, 5, (4,1)), torch.randn(4,2)))
    assert table.loc['embeds.0','shape'] == (4,3) and table.stride.isna().all()

def test_table_of_channels_last_maps():
    class Permuted(nn.Module):
        def __init__(self): super().__init__(); self.conv,self.norm = nn.Conv2d(3,8,4,4),nn.LayerNorm(8)
        def forward(self, x): return self.norm(self.conv(x).permute(0,2,3,1)).mean((1,2))
    table = layer_table(Permuted(), torch.randn(2,3,32,64))
    assert table.loc['norm','shape'] == (2,8,16,8) and table.loc['norm','stride'] == 4

def test_table_display():
    table = layer_table(tv.resnet18(num_classes=10), torch.randn(2,3,64,64))
    html = table._repr_html_()
    assert html.count('<tr') == len(table) + 2 and '2 × 512 × 2 × 2' in html and 'NaN' not in html
    assert '2 × 512' in table.loc[['layer4'], ['type','shape']]._repr_html_()

def test_a_batch_with_labels_and_learners_without_a_batch():
    from fastai.basics import Learner
    from conftest import batches, net
    dls = batches()
    student,teacher,batch = net(seed=1),net(width=6, seed=7),dls.one_batch()
    expected = match_layers(student, teacher, batch[0])
    s,t = [Learner(dls, m, nn.CrossEntropyLoss()) for m in (student,teacher)]
    assert expected == match_layers(student, teacher, batch) == match_layers(s, t) == match_layers(student, t) == match_layers(s, teacher, batch)
    assert layer_table(s).equals(layer_table(student, batch))
    with pytest.raises(TypeError, match='Learner'): match_layers(student, teacher)

def test_vectors_are_not_paired_with_maps():
    "What is offered, every loss on activations accepts"
    from conftest import net
    perceptron = nn.Sequential(nn.Flatten(), nn.Linear(64,32), nn.ReLU(), nn.Linear(32,16), nn.ReLU(), nn.Linear(16,3))
    x = torch.randn(4,1,8,8)
    for models in ((perceptron, net()), (net(), perceptron)):
        with pytest.raises(ValueError, match='vectors.*name layers for a loss'): match_layers(*models, x)
    assert match_layers(perceptron, perceptron, x)[0] == ['2','4']
