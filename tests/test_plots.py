"What is drawn is what was given"
import math
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest, torch
from fastkd.callback import KnowledgeDistillationCallback
from fastkd.feature_losses import Attention
from fastkd.losses import SoftTarget
from fastkd.plots import attention_images, plot_losses, plot_similarity, plot_temperature, show_attention
from conftest import learner, net

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

def test_temperature_is_softmax():
    logits = torch.tensor([3.,1.,-2.], requires_grad=True)
    ax = plot_temperature(logits, (1,4), labels=['a','b','c'])
    for bars,T in zip(ax.containers, (1,4)):
        e = [math.exp(z/T) for z in (3,1,-2)]
        assert [b.get_height() for b in bars] == pytest.approx([o/sum(e) for o in e])
    assert [t.get_text() for t in ax.get_xticklabels()] == ['a','b','c']
    assert len(plot_temperature(np.zeros(100)).lines) == 4
    with pytest.raises(ValueError, match='take one row'): plot_temperature(torch.zeros(2,3))

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

def test_attention_shows_each_map_over_its_image():
    imgs = torch.rand(3,3,8,6)
    student,teacher = [torch.rand(3,4,3),torch.rand(3,2,2)],[torch.rand(3,8,6),torch.rand(3,1,1)]
    pairs = [('layer1','0.4'),('layer2','0.5')]
    axs = show_attention(imgs, student, teacher, pairs)
    assert axs.shape == (3,5)
    assert [ax.get_title() for ax in axs[0]] == ['image','student\nlayer1','teacher\n0.4','student\nlayer2','teacher\n0.5']
    order = [student[0],teacher[0],student[1],teacher[1]]
    for i in range(3):
        for j,ax in enumerate(axs[i]):
            np.testing.assert_allclose(ax.images[0].get_array(), imgs[i].permute(1,2,0).numpy())
            assert all(im.get_extent() == [0,6,8,0] for im in ax.images)
            if j: np.testing.assert_allclose(ax.images[1].get_array(), order[j-1][i].numpy())
    as_dicts = show_attention(list(imgs.permute(0,2,3,1).numpy()), dict(zip(pairs, student)), dict(zip(pairs, teacher)))
    assert [ax.get_title() for ax in as_dicts[0]] == [ax.get_title() for ax in axs[0]]
    mine = plt.subplots(1, 3)[1]
    assert show_attention((imgs[:1]*255).byte(), student[:1], teacher[:1], pairs[:1], axs=mine)[0,1] is mine[1]
    with pytest.raises(ValueError, match='2 layers of the student, of 1'): show_attention(imgs, student, teacher[:1], pairs)

def test_after_a_fit():
    learn = learner()
    kd = KnowledgeDistillationCallback(net(width=6, seed=7), [SoftTarget, Attention], ['relu1','relu2'], ['relu1','relu2'])
    learn.fit(2, cbs=kd)
    lines = drawn(kd.plot_losses())
    assert lines['label_loss'].shape == (2*len(learn.dls.train),2)
    axs = kd.show_attention(n=2)
    assert axs.shape == (2,5) and axs[0,4].get_title() == 'teacher\nrelu2'
