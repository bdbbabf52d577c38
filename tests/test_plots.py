"What is drawn is what was given"
import math
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import random
import numpy as np
import pandas as pd
import pytest, torch
from torch import nn
from torch.utils.data import DataLoader as TorchLoader, TensorDataset
from torchvision import models as tv
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, MSELossFlat, RegressionBlock
from fastai.vision.all import ImageDataLoaders, Normalize, PILImage, Resize, create_unet_model, get_image_files, imagenet_stats
from fastai.tabular.model import TabularModel
from fastkd.callback import KnowledgeDistillationCallback
from fastkd.feature_losses import Attention
from fastkd.losses import SoftTarget
from fastkd import metrics as _metrics  # `kd.teacher_metrics()`
from fastkd.matching import layer_table
from fastkd.plots import attention_images, draw_attention, plot_losses, plot_similarity, plot_temperature, show_attention
from fastkd.teacher import Teacher
from conftest import batches, hooks, learner, net

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

CURVES = {'train': {'label_loss': [3.,2.,1.,1.], 'kd_loss': [math.nan,math.nan,4.,2.]}, 'steps': [2,4]}

def drawn(ax): return {l.get_label(): l.get_xydata() for l in ax.lines if not l.get_label().startswith('_')}

def test_losses_are_the_curves():
    ax = plot_losses(CURVES, smooth=0)
    lines = drawn(ax)
    assert list(lines) == ['label_loss','kd_loss']
    np.testing.assert_array_equal(lines['label_loss'], [[1,3],[2,2],[3,1],[4,1]])
    np.testing.assert_array_equal(lines['kd_loss'], [[1,math.nan],[2,math.nan],[3,4],[4,2]])

def test_smoothing_is_the_recorders():
    "fastai's AvgSmoothLoss: beta*old + (1-beta)*new, divided by 1 - beta**count; it skips NaN"
    beta,mean,want = 0.7,0.,[]
    for i,v in enumerate([3.,2.,1.,1.]):
        mean = beta*mean + (1-beta)*v
        want.append(mean/(1-beta**(i+1)))
    lines = drawn(plot_losses(CURVES, smooth=beta))
    np.testing.assert_allclose(lines['label_loss'][:,1], want)
    np.testing.assert_allclose(lines['kd_loss'][2:,1], [4,(beta*4+2)/(beta+1)])

def test_losses_log_axis_terms_and_axes():
    ax = plt.figure().gca()
    assert plot_losses(CURVES, ax=ax) is ax and ax.get_yscale() == 'linear'
    wide = {'train': {'a': [1.,1.], 'b': [1000.,900.]}, 'steps': [2]}
    assert plot_losses(wide).get_yscale() == 'log'
    assert plot_losses(wide, log=False).get_yscale() == 'linear'
    assert plot_losses({'train': {'a': [1.,1.], 'b': [-1000.,900.]}, 'steps': [2]}).get_yscale() == 'linear'
    assert list(drawn(plot_losses(CURVES, ['kd_loss']))) == ['kd_loss']
    assert tuple(plot_losses(CURVES, figsize=(3,2)).figure.get_size_inches()) == (3,2)
    with pytest.raises(ValueError, match="'label_loss'"): plot_losses(CURVES, ['nothing'])

def test_losses_of_a_fit_without_batches():
    assert not drawn(plot_losses({'train': {}, 'steps': []}))
    assert list(drawn(plot_losses({'train': {'a': [1.]}, 'steps': [1]}))) == ['a']
    plot_losses({'train': {'a': [1.,2.,3.]}, 'steps': []})      # stopped in the first epoch

def test_ticks_of_what_is_counted_are_whole():
    for n in (1,2,3,7,50):
        ax = plot_losses({'train': {'a': [1.]*n}, 'steps': [n]})
        assert all(float(t).is_integer() for t in ax.get_xticks())
    for n in (21,25): assert all(float(t).is_integer() for t in plot_temperature(torch.zeros(n)).get_xticks())

def test_temperature_is_softmax():
    logits = torch.tensor([3.,1.,-2.], requires_grad=True)
    ax = plot_temperature(logits, (1,4), labels=['a','b','c'])
    for bars,T in zip(ax.containers, (1,4)):
        e = [math.exp(z/T) for z in (3,1,-2)]
        assert [b.get_height() for b in bars] == pytest.approx([o/sum(e) for o in e])
    assert [t.get_text() for t in ax.get_xticklabels()] == ['a','b','c']
    assert len(plot_temperature(np.zeros(100)).lines) == 4
    with pytest.raises(ValueError, match='take one row'): plot_temperature(torch.zeros(2,3))

@pytest.mark.parametrize('given', [lambda: learner(), lambda: net(), lambda: Teacher(net()), lambda: 'cat', lambda: max], ids=['Learner','module','Teacher','str','function'])
def test_temperature_takes_logits(given):
    with pytest.raises(TypeError, match=r'the logits of one example.*`teacher.model\(xb\)\[0\]`') as e: plot_temperature(given())
    assert type(given()).__name__ in str(e.value)

def test_similarity_is_the_table():
    table = pd.DataFrame([[0.1,0.9,0.3],[0.2,0.4,1.0]], index=['s.a','s.b'], columns=['0.4','0.5','0.7'])
    ax = plot_similarity(table, (['s.a','s.b'],['0.5','0.7']))
    np.testing.assert_array_equal(ax.images[0].get_array(), table.to_numpy())
    assert [t.get_text() for t in ax.texts] == ['0.10','0.90','0.30','0.20','0.40','1.00']
    assert [(p.get_x()+0.5, p.get_y()+0.5) for p in ax.patches] == [(1,0),(2,1)]
    assert [t.get_text() for t in ax.get_yticklabels()] == ['a','b'] and [t.get_text() for t in ax.get_xticklabels()] == ['4','5','7']
    assert not plot_similarity(table, annotate=False, ax=plt.figure().gca()).texts
    with pytest.raises(ValueError, match="'s.c'"): plot_similarity(table, (['s.c'],['0.5']))

def test_attention_images_is_its_definition():
    act = torch.randn(2,3,4,5)
    want = [[[sum(act[b,c,i,j].item()**2 for c in range(3))/3 for j in range(5)] for i in range(4)] for b in range(2)]
    torch.testing.assert_close(attention_images(act), torch.tensor(want))
    tokens = act.flatten(2).transpose(1,2)[:,:16]                                  # 4 x 4 positions
    torch.testing.assert_close(attention_images(tokens).flatten(1), attention_images(act).flatten(1)[:,:16])
    torch.testing.assert_close(attention_images(torch.cat([torch.randn(2,1,3), tokens], 1)), attention_images(tokens))
    with pytest.raises(ValueError, match='positions'): attention_images(torch.randn(3,4))

def overlays(axs):
    "The maps that are drawn over the images: rows for images, columns for layers"
    return [[np.asarray(ax.images[1].get_array()) for ax in row[1:]] for row in axs]

@pytest.mark.parametrize('draw', [draw_attention, show_attention])
def test_attention_shows_each_map_over_its_image(draw):
    imgs = torch.rand(3,3,8,6)
    student,teacher = [torch.rand(3,4,3),torch.rand(3,2,2)],[torch.rand(3,8,6),torch.rand(3,1,1)]
    pairs = [('layer1','0.4'),('layer2','0.5')]
    axs = draw(imgs, student, teacher, pairs)
    assert axs.shape == (3,5)
    assert [ax.get_title() for ax in axs[0]] == ['image','student\nlayer1','teacher\n0.4','student\nlayer2','teacher\n0.5']
    order = [student[0],teacher[0],student[1],teacher[1]]
    for i in range(3):
        for j,ax in enumerate(axs[i]):
            np.testing.assert_allclose(ax.images[0].get_array(), imgs[i].permute(1,2,0).numpy())
            assert all(im.get_extent() == [0,6,8,0] for im in ax.images)
            if j: np.testing.assert_allclose(ax.images[1].get_array(), order[j-1][i].numpy())
    as_dicts = draw(list(imgs.permute(0,2,3,1).numpy()), dict(zip(pairs, student)), dict(zip(pairs, teacher)))
    assert [ax.get_title() for ax in as_dicts[0]] == [ax.get_title() for ax in axs[0]]
    by_name = draw(imgs=imgs, maps_student=student, maps_teacher=teacher, pairs=pairs, alpha=.5)
    assert by_name.shape == (3,5) and by_name[0,1].images[1].get_alpha() == .5
    mine = plt.subplots(1, 3)[1]
    assert draw((imgs[:1]*255).byte(), student[:1], teacher[:1], pairs[:1], axs=mine)[0,1] is mine[1]
    with pytest.raises(ValueError, match='2 layers of the student, of 1'): draw(imgs, student, teacher[:1], pairs)

def test_color_bar_says_what_bright_means():
    axs = draw_attention(torch.rand(2,3,8,8), [torch.rand(2,4,4)], [torch.rand(2,4,4)])
    bar, = [ax for ax in axs[0,0].figure.axes if ax not in axs.flatten()]
    text = ' '.join((bar.get_xlabel() or bar.get_ylabel()).split())
    assert text == 'attention: mean squared activation, from least to most in each map'
    for ax in axs[:,1]:  # and so it is
        m = ax.images[1]
        assert m.norm.vmin == m.get_array().min() and m.norm.vmax == m.get_array().max()

# --- any two models ------------------------------------------------------------------------------------------------

def by_hand(model, name, xb):
    "The mean of squares over the channels of the output `(n, c, h, w)` of a layer, in eval mode"
    kept,training = [],model.training
    handle = dict(model.named_modules())[name].register_forward_hook(lambda m,i,o: kept.append(o.clone()))
    with torch.no_grad(): model.eval()(xb)
    handle.remove()
    model.train(training)
    return (kept[0]**2).mean(1).numpy()

def test_maps_of_two_models_are_the_layers_own():
    dls,student,teacher = batches(),net(seed=1),net(width=6, seed=2)
    xb,_ = dls.valid.one_batch()
    want = [by_hand(m, l, xb) for l in ('relu1','relu2') for m in (student,teacher)]
    for models in ((student, teacher), [learner(dls, student), teacher], (student, Teacher(teacher)), (student, learner(dls, teacher))):
        axs = show_attention(models, dls.valid, (['relu1','relu2'],)*2, n=3)
        assert axs.shape == (3,5) and [ax.get_title() for ax in axs[0,1:]] == ['student\nrelu1','teacher\nrelu1','student\nrelu2','teacher\nrelu2']
        for i,row in enumerate(overlays(axs)):
            for m,w in zip(row, want): np.testing.assert_allclose(m, w[i], rtol=1e-4, atol=1e-6)

def test_layers_are_matched_named_or_modules():
    dls,student,teacher = batches(),net(seed=1),net(width=6, seed=2)
    titles = lambda **kw: [ax.get_title().split('\n')[-1] for ax in show_attention((student, teacher), dls, **kw)[0,1:]]
    assert titles() == ['relu1','relu1','relu2','relu2']
    assert titles(layers={'relu1':'bn2'}) == ['relu1','bn2'] == titles(layers=('relu1','bn2')) == titles(layers=([student.relu1],[teacher.bn2]))
    with pytest.raises(ValueError, match="'relu7' of the student"): titles(layers=('relu7','relu2'))
    with pytest.raises(ValueError, match='pairs, got 2 of the student'): titles(layers=(['relu1','relu2'],['relu1']))

def test_one_model():
    dls,model = batches(),net(seed=1)
    xb,_ = dls.valid.one_batch()
    for models in (model, learner(dls, model), (model,), Teacher(model)):
        axs = show_attention(models, dls.valid, ['relu1','relu2'], n=2)
        assert [ax.get_title() for ax in axs[0,1:]] == ['relu1','relu2']
        np.testing.assert_allclose(overlays(axs)[1][0], by_hand(model, 'relu1', xb)[1], rtol=1e-4, atol=1e-6)
    assert show_attention(learner(dls, model)).shape == (4,3)  # its own data, matched layers

def test_all_kinds_of_data():
    xb,yb = torch.rand(8,1,8,8),torch.randint(0, 3, (8,))
    models,layers = (net(seed=1),net(seed=2)),('relu2','relu2')
    torch_dl = TorchLoader(TensorDataset(xb, yb), batch_size=8)
    from_list = DataLoaders.from_dsets(list(zip(xb, yb)), list(zip(xb, yb)), bs=8, shuffle=False, num_workers=0, device='cpu')
    want = overlays(show_attention(models, (xb,yb), layers))
    for dl in (torch_dl, from_list, from_list.valid, [xb,yb], xb, [(xb,yb)], (b for b in [(xb,yb)])):
        axs = show_attention(models, dl, layers)
        np.testing.assert_allclose(overlays(axs), want, rtol=1e-5)
        np.testing.assert_allclose(axs[1,0].images[0].get_array(), xb[1].expand(3,8,8).permute(1,2,0))
    assert show_attention(models, (xb[:2],yb[:2]), layers).shape == (2,3)  # a small batch
    with pytest.raises(ValueError, match='give a `DataLoader` or a batch'): show_attention(models)
    with pytest.raises(TypeError, match='loader or a batch, got int'): show_attention(models, 7)

# --- layouts -------------------------------------------------------------------------------------------------------

class Stage(nn.Module):
    "A convolution that gives its output in either layout"
    def __init__(self, i, o, last): super().__init__(); self.conv,self.last = nn.Conv2d(i, o, 3, 2, 1),last
    def forward(self, x):
        x = self.conv(x.movedim(-1,1) if self.last else x).relu()
        return x.permute(0,2,3,1) if self.last else x

class Stages(nn.Module):
    def __init__(self, last):
        super().__init__()
        torch.manual_seed(0)
        self.last,self.s1,self.s2,self.fc = last,Stage(3,8,last),Stage(8,4,last),nn.Linear(4,2)
    def forward(self, x): return self.fc(self.s2(self.s1(x.movedim(1,-1) if self.last else x)).mean((1,2) if self.last else (2,3)))

def test_channels_last_twin_looks_where_its_twin_does():
    "In the first stage height, width and channels are all 8"
    axs = show_attention((Stages(False), Stages(True)), torch.rand(4,3,16,16), (['s1','s2'],)*2)
    for first,last,first2,last2 in overlays(axs):
        np.testing.assert_allclose(first, last, rtol=1e-5)
        np.testing.assert_allclose(first2, last2, rtol=1e-5)
        assert first.shape == (8,8) and first2.shape == (4,4)

def test_transformers():
    torch.manual_seed(0)
    vit = tv.VisionTransformer(image_size=32, patch_size=8, num_layers=4, num_heads=2, hidden_dim=12, mlp_dim=24, num_classes=3)
    swin = tv.SwinTransformer([2,2], 12, [1,1], [2,2], [4,4], num_classes=3)
    x = torch.rand(2,3,32,32)
    kept = {}
    for m,name in ((vit, 'encoder.layers.encoder_layer_1'), (swin, 'features.3')):
        m.eval().get_submodule(name).register_forward_hook(lambda m,i,o,name=name: kept.setdefault(name, o))
        with torch.no_grad(): m(x)
    tokens,nhwc = kept.values()
    layers = tuple(kept)
    axs = show_attention((vit, swin), x, layers)
    for i,(v,s) in enumerate(overlays(axs)):
        np.testing.assert_allclose(v, (tokens[i,1:]**2).mean(-1).reshape(4,4), rtol=1e-4)  # without the class token
        np.testing.assert_allclose(s, (nhwc[i]**2).mean(-1), rtol=1e-4)
    assert axs[0,1].get_title() == 'student\nencoder.layers.\nencoder_layer_1'
    assert show_attention((vit, swin), x).shape[1] > 2 and show_attention((swin, vit), x).shape[1] > 2

def test_a_layout_that_is_not_known_is_asked_for():
    class Bare(nn.Module):
        "Nothing in it tells what is what"
        def __init__(self): super().__init__(); self.out = nn.Identity()
        def forward(self, x): return self.out(torch.einsum('bchw,bdhw->bhcd', x, x)).mean((2,3))
    x = torch.rand(4,3,3,3)
    with pytest.raises(ValueError, match="'out' of the model.*`channel_axis=`"): show_attention(Bare(), x, 'out')
    got = overlays(show_attention(Bare(), x, 'out', channel_axis=-1))
    act = torch.einsum('bchw,bdhw->bhcd', x, x)
    np.testing.assert_allclose([row[0] for row in got], (act**2).mean(-1), rtol=1e-4)

# --- what the data say ---------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Dark cats and bright dogs"
    path,rng = tmp_path_factory.mktemp('pictures'),np.random.default_rng(0)
    for i in range(16):
        x = rng.integers(0, 100, (24,32,3)) + 155*(i%2)
        PILImage.create(x.astype('uint8')).save(path/f"{'dog' if i%2 else 'cat'}_{i}.png")
    return path

def pets(path, **kwargs):
    kwargs = dict(batch_tfms=Normalize.from_stats(*imagenet_stats), **kwargs)
    return ImageDataLoaders.from_name_re(path, get_image_files(path).sorted(), r'(.*)_', item_tfms=Resize(24, method='squish'), bs=8, num_workers=0, seed=1, **kwargs)

class Bright(nn.Module):
    "Says dog of what is bright, or of what is dark"
    def __init__(self, sign=1.): super().__init__(); self.conv,self.sign = nn.Conv2d(3,4,3,1,1),nn.Parameter(torch.tensor(sign))
    def forward(self, x): return torch.stack([torch.zeros(len(x)), self.sign*x.mean((1,2,3))], 1) + 0*self.conv(x).mean()

@pytest.mark.parametrize('sign,color', [(1.,'green'), (-1.,'red')])
def test_titles_are_label_and_prediction(pictures, sign, color):
    dls = pets(pictures)
    model = Bright(sign)
    items = dls.valid.items[:4]
    labels = [f.name.split('_')[0] for f in items]
    assert set(labels) == {'cat','dog'}
    said = labels if sign > 0 else [{'cat':'dog','dog':'cat'}[l] for l in labels]
    for axs in (show_attention(model, dls.valid, 'conv'), show_attention((Learner(dls, model), Bright()), layers=('conv','conv'))):
        assert [ax.get_title() for ax in axs[:,0]] == [f'{l}\npredicted {p}' for l,p in zip(labels, said)]
        assert {ax.title.get_color() for ax in axs[:,0]} == {color}
    unlabeled = dls.test_dl(items)
    axs = show_attention(Learner(dls, model), unlabeled, 'conv')
    assert [ax.get_title() for ax in axs[:,0]] == [f'predicted {p}' for p in said]

def test_titles_without_a_vocabulary():
    model,(xb,yb) = net(seed=1),batches().valid.one_batch()
    axs = show_attention(model, (xb,yb), 'relu1')
    assert [ax.get_title() for ax in axs[:,0]] == [f'{y}\npredicted {p}' for y,p in zip(yb[:4].tolist(), model.eval()(xb).argmax(1).tolist())]
    axs = show_attention(model, xb, 'relu1')                                      # neither labels nor what the outputs are
    assert [ax.get_title() for ax in axs[:,0]] == ['image','','','']
    axs = show_attention(model, (xb, torch.rand(8,8,8)), 'relu1')                 # a label that is no text
    assert [ax.get_title() for ax in axs[:,0]] == ['image','','','']

def test_titles_of_numbers(pictures):
    files = get_image_files(pictures).sorted()
    dls = ImageDataLoaders.from_lists(pictures, files, [i/8 for i in range(len(files))], y_block=RegressionBlock, item_tfms=Resize(8), bs=8, num_workers=0)
    model = nn.Sequential(nn.Conv2d(3,1,3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    axs = show_attention(Learner(dls, model, loss_func=MSELossFlat()), layers='0')
    xb,yb = dls.valid.one_batch()
    assert [ax.get_title().split() for ax in axs[:,0]] == [[f"{y:.4g}", "predicted", f"{p:.4g}"] for y,p in zip(yb.tolist(), model(xb).flatten().tolist())][:len(axs)]
    assert axs[0,0].title.get_color() == 'black'

def test_no_title_is_cut():
    titles = [('american_pit_bull_terrier\npredicted\namerican_pit_\nbull_terrier','red')]*2
    for h,w,ts,name in ((8,16,titles,'0.4'), (16,8,titles,'0.4'), (8,8,None,'0.4'), (8,8,titles[:1],'features.stages.3.blocks.2.attention.projection')):
        axs = draw_attention(torch.rand(2,3,h,w), [torch.rand(2,4,4)]*4, [torch.rand(2,4,4)]*4, [(name,name)]*4, titles=ts)
        fig = axs[0,0].figure
        fig.canvas.draw()
        for ax in axs.flat:
            box = ax.title.get_window_extent()
            assert box.y1 <= fig.bbox.y1 and box.x0 >= 0 and (not ax.get_title() or box.width < 1.15*1.25*fig.dpi)
        above,below = axs[0,0].get_position(),axs[1,0].get_position()
        assert above.y0 - below.y1 < 1.2/fig.get_size_inches()[1]                # no large gaps either

def test_images_have_their_true_colors(pictures):
    dls = pets(pictures)
    axs = show_attention(Bright(), dls.valid, 'conv')
    for f,ax in zip(dls.valid.items, axs[:,0]):
        want = np.asarray(PILImage.create(f).resize((24,24), resample=2))/255
        np.testing.assert_allclose(ax.images[0].get_array(), want, atol=1.5/255)

def test_batches_that_nothing_decodes_are_visible():
    x = torch.stack([torch.linspace(-2, 2, 64).reshape(1,8,8), torch.linspace(0, 255, 64).reshape(1,8,8)])
    axs = show_attention(net(), x, 'relu1')
    for ax in axs[:,0]: np.testing.assert_allclose(np.asarray(ax.images[0].get_array())[...,0].ravel(), np.linspace(0, 1, 64), atol=1e-6)

def test_a_teacher_gets_its_own_inputs(pictures):
    "Those that it gets in a fit: mapped by `inputs`, and normalized as in its own training"
    dls,plain = pets(pictures),ImageDataLoaders.from_name_re(pictures, get_image_files(pictures), r'(.*)_', item_tfms=Resize(24), bs=8, num_workers=0)
    student,teacher = Bright(),Bright()
    xb,_ = dls.valid.one_batch()
    raw = xb*torch.tensor(imagenet_stats[1])[:,None,None] + torch.tensor(imagenet_stats[0])[:,None,None]
    for given,inputs in ((teacher, xb), (Learner(plain, teacher), raw), (Teacher(teacher, inputs=lambda x: x.flip(-1)), xb.flip(-1)),
                         (Teacher(teacher, normalize=([0.]*3,[1.]*3)), raw), (Teacher(teacher, dtype=torch.bfloat16), xb)):
        row = overlays(show_attention((student, given), dls.valid, ('conv','conv')))
        np.testing.assert_allclose([m for _,m in row], by_hand(teacher, 'conv', inputs)[:4], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose([m for m,_ in row], by_hand(student, 'conv', xb)[:4], rtol=1e-3, atol=1e-5)

# --- nothing is changed --------------------------------------------------------------------------------------------

class Noisy(list):
    "Items that are different each time, as with augmentation"
    def __getitem__(self, i):
        x,y = super().__getitem__(i)
        return x + random.random(),y

def test_looking_changes_nothing():
    def order(look):
        torch.manual_seed(0); random.seed(0); np.random.seed(0)
        items = Noisy((torch.rand(1,8,8), torch.tensor(i%3)) for i in range(24))
        dls = DataLoaders.from_dsets(items, items, bs=8, num_workers=0, device='cpu')
        student,teacher = net(dropout=.5),net(width=6, dropout=.5)
        student.eval(); student.bn1.train(); teacher.train()
        models = (student, teacher)
        before = [{k: v.clone() for k,v in m.state_dict().items()} for m in models],[[l.training for l in m.modules()] for m in models]
        look(models, dls)
        after = [dict(m.state_dict()) for m in models],[[l.training for l in m.modules()] for m in models]
        assert before[1] == after[1] and not hooks(*models)
        for a,b in zip(before[0], after[0]): assert all(torch.equal(a[k], b[k]) for k in a)
        return torch.cat([xb.flatten() for xb,_ in dls.train]),torch.rand(2),np.random.rand(),random.random()
    plain = order(lambda models, dls: None)
    for look in (lambda models, dls: show_attention(models, dls.train), lambda models, dls: show_attention((models[0], learner(dls, models[1]))),
                 lambda models, dls: show_attention(models, TorchLoader(dls.train_ds, batch_size=8, shuffle=True))):
        got = order(look)
        assert torch.equal(plain[0], got[0]) and torch.equal(plain[1], got[1]) and plain[2:] == got[2:]

# --- after a fit ---------------------------------------------------------------------------------------------------

def layers_shown(axs): return [ax.get_title().split('\n', 1)[-1].replace('\n', '') for ax in axs[0,1:]]

def test_attention_after_a_fit_without_pairs():
    learn = learner()
    kd = KnowledgeDistillationCallback(net(width=6, seed=7), SoftTarget)
    with pytest.raises(ValueError, match='no fit yet.*show_attention'): kd.show_attention()
    learn.fit(1, cbs=kd)
    assert layers_shown(kd.show_attention()) == ['relu1','relu1','relu2','relu2']
    assert layers_shown(kd.show_attention(layers=('relu1','bn2'))) == ['relu1','bn2']

def test_attention_with_a_unet():
    x,y = torch.rand(8,3,32,32),torch.randint(0, 3, (8,32,32))
    dls = DataLoaders.from_dsets(list(zip(x, y)), list(zip(x, y)), bs=4, num_workers=0, device='cpu')
    def unet(): return create_unet_model(tv.resnet18, 3, (32,32), pretrained=False)
    learn = learner(dls, unet(), loss_func=CrossEntropyLossFlat(axis=1))
    kd,n_hooks = KnowledgeDistillationCallback(unet(), SoftTarget),len(hooks(learn.model))
    learn.fit(1, lr=0, cbs=kd)
    axs = kd.show_attention(n=2)
    assert axs.shape == (2,9) and axs[0,0].get_title() == 'image'  # a mask is no title
    assert len(hooks(learn.model)) == n_hooks                        # a unet has some

def test_at_most_four_pairs_the_last_among_them():
    names = ['conv1','bn1','relu1','conv2','bn2','relu2']
    learn = learner()
    kd = KnowledgeDistillationCallback(net(seed=7), Attention, names, names)
    learn.fit(1, cbs=kd)
    shown = layers_shown(kd.show_attention())[::2]
    assert len(shown) == 4 and shown[-1] == 'relu2'
    assert layers_shown(kd.show_attention(n_pairs=6))[::2] == names
    assert layers_shown(show_attention(learn, layers=names)) == names  # what is named is shown
    deep = nn.Sequential(*[nn.Sequential(nn.Conv2d(1 if not i else 4, 4, 3, 1, 1), nn.ReLU()) for i in range(9)], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,3))
    shown = layers_shown(show_attention((deep, deep), torch.rand(4,1,8,8)))
    assert len(shown) == 8 and shown[-1] == '8'

def test_text_and_tables_are_refused():
    lstm = nn.Sequential(nn.Embedding(20,8), nn.Linear(8,8), nn.Linear(8,3))
    tab = TabularModel([(5,3)], 2, 2, [10,8])
    for model,batch in ((lstm, torch.randint(0, 20, (4,7))), (tab, (torch.randint(0, 5, (4,1)), torch.randn(4,2), torch.zeros(4).long()))):
        with pytest.raises(ValueError, match='needs images.*layers with positions') as e: show_attention((model, model), batch)
        assert str(e.value).count('. ') == 0
    with pytest.raises(ValueError, match=r"'fc' of the teacher.*\(4, 3\).*positions"): show_attention((net(), net()), torch.rand(4,1,8,8), ('relu1','fc'))
    with pytest.raises(TypeError, match='teacher'): show_attention((net(), lambda x: x), torch.rand(4,1,8,8))

def test_pytorch_loaders():
    x,y = torch.randn(32,1,8,8),torch.randint(0, 3, (32,))
    dls = DataLoaders(TorchLoader(TensorDataset(x, y), 8, shuffle=True), TorchLoader(TensorDataset(x, y), 8))
    learn = learner(dls, loss_func=nn.CrossEntropyLoss())
    kd = KnowledgeDistillationCallback(net(width=6, seed=7), Attention, 'relu2', 'relu2')
    learn.fit(1, cbs=kd)
    axs = kd.show_attention(2)
    assert axs.shape == (2,3) and axs[0,0].get_title().startswith(f'{y[0]}\npredicted ')
    torch.manual_seed(3)
    state = torch.get_rng_state()
    table = learn.layer_table()
    assert torch.equal(state, torch.get_rng_state())
    pd.testing.assert_frame_equal(table, layer_table(learn.model, x[:8]))
    assert kd.teacher_metrics(learn)['loss'] > 0
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(3,2)
        def forward(self, a, b): return self.lin(a + b)
    pair = TorchLoader(TensorDataset(torch.randn(8,3), torch.randn(8,3), torch.zeros(8)), 4)
    assert Learner(DataLoaders(pair, pair), Two(), loss_func=nn.MSELoss()).layer_table().loc['lin','shape'] == (4,2)  # all but the last, as in a fit

def test_after_a_fit():
    learn = learner()
    kd = KnowledgeDistillationCallback(net(width=6, seed=7), [SoftTarget, Attention], ['relu1','relu2'], ['relu1','relu2'])
    learn.fit(2, cbs=kd)
    lines = drawn(kd.plot_losses())
    assert lines['label_loss'].shape == (2*len(learn.dls.train),2)
    axs = kd.show_attention(n=2)
    assert axs.shape == (2,5) and axs[0,4].get_title() == 'teacher\nrelu2'
