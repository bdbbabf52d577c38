"Promise 7: every fastai application, with a distilled student that trains"
import math
import numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.basics import Adam, BCEWithLogitsLossFlat, CrossEntropyLossFlat, DataLoaders, Learner, RegressionBlock, SGD
from fastai.metrics import accuracy
from fastai.vision.learner import create_unet_model, vision_learner
from fastai.vision.all import DataBlock, ImageBlock, ImageDataLoaders, IndexSplitter, ItemGetter, MaskBlock, PILImage, PILMask, Resize, get_image_files, resnet18, resnet34, xresnet18
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.all import AWD_LSTM, BaseTokenizer, TextDataLoaders, Tokenizer, awd_lstm_clas_config, awd_lstm_lm_config, language_model_learner, text_classifier_learner
from fastkd.all import *
from fastkd.teacher import knowledge_of
from conftest import batches, hooks, learner, net, same, weights

def quiet(learn):
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    learn.logger = lambda *args: None
    return learn

def trains(learn, kd, epochs=1, lr=1e-3):
    "A fit moves the student, shows finite terms that are not 0, and leaves nothing"
    before,own,teacher = weights(learn.model),len(hooks(learn.model)),[weights(m) for m in kd.teacher.models if isinstance(m, nn.Module)]
    quiet(learn).fit(epochs, lr, cbs=kd)
    assert not same(before, weights(learn.model))
    for name,curve in kd.curves['train'].items(): assert curve and all(math.isfinite(v) for v in curve) and any(v != 0 for v in curve), name
    assert len(hooks(learn.model)) == own  # a unet has some
    assert [same(a, weights(m)) for a,m in zip(teacher, kd.teacher.models)] == [True]*len(teacher)
    return kd

# --- images

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "Drawn pictures, named as in Oxford-IIIT Pets"
    path,rng = tmp_path_factory.mktemp('images'),np.random.default_rng(0)
    for i in range(24):
        x = rng.integers(0, 100 if i%2 else 255, (40,40,3)).astype('uint8')
        PILImage.create(x).save(path/f"{'Cat' if i%2 else 'dog'}_{i}.jpg")
    return path

def pets(path): return ImageDataLoaders.from_name_func(path, get_image_files(path).sorted(), lambda f: f[0].isupper(), item_tfms=Resize(32), bs=8, num_workers=0, seed=1)

def test_the_tutorial(images):
    "The tutorial's lines as they stand, on small drawn pictures"
    files = get_image_files(images)
    def label_func(f): return f[0].isupper()
    dls = ImageDataLoaders.from_name_func(images, files, label_func, item_tfms=Resize(64), num_workers=0, bs=8)
    teacher = vision_learner(dls, resnet34, metrics=accuracy, pretrained=False)
    teacher.unfreeze(); quiet(teacher).fit_one_cycle(1, 1e-3)

    student = Learner(dls, resnet18(num_classes=2), metrics=accuracy)
    kd = KnowledgeDistillationCallback(teacher.model, SoftTarget)
    quiet(student).fit_one_cycle(1, 1e-3, cbs=kd)

    assert get_model_layers(student.model)[:5] == ['conv1','bn1','relu','maxpool','layer1']
    student = Learner(dls, resnet18(num_classes=2), metrics=accuracy)
    kd = KnowledgeDistillationCallback(teacher.model, Attention,
            ['layer1', 'layer2', 'layer3', 'layer4'], ['0.4', '0.5', '0.6', '0.7'], weight=0.9)
    quiet(student).fit_one_cycle(1, 1e-3, cbs=kd)
    assert list(student.recorder.metric_names) == ['epoch','train_loss','valid_loss','accuracy','kd_loss','time']
    assert 0 < kd.curves['train']['kd_loss'][0] < .1
    student.predict(files[0]); student.tta(); student.validate()

@pytest.mark.parametrize('loss', [SoftTarget, Attention, [SoftTarget,FitNet]], ids=['logits','features','both'])
def test_learner_as_teacher_and_matched_layers(images, loss):
    dls = pets(images)
    teacher = quiet(vision_learner(dls, resnet18, pretrained=False))
    trains(Learner(dls, xresnet18(n_out=2)), KnowledgeDistillationCallback(teacher, loss, weight=.4))

@pytest.mark.parametrize('student,teacher', [('mobilenetv3_small_050','efficientnet_lite0'), ('resnet10t','vit_tiny_patch16_224'), ('vit_tiny_patch16_224','resnet10t')])
def test_timm(images, student, teacher):
    timm = pytest.importorskip('timm')
    def model(name): return timm.create_model(name, num_classes=2, **({'img_size': 32} if 'vit' in name else {}))
    trains(Learner(pets(images), model(student)), KnowledgeDistillationCallback(model(teacher), SoftTarget))
    if 'vit' not in student+teacher: trains(Learner(pets(images), model(student)), KnowledgeDistillationCallback(model(teacher), [Attention,FitNet], weight=.3))

# --- segmentation

def masks(size=32, n=8, ignore=None):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (n,size,size), generator=g)
    if ignore is not None: y[:,:size//2] = ignore
    items = [(torch.randn(3,size,size, generator=g) + m[None], m) for m in y]
    return DataLoaders.from_dsets(items, items, bs=4, num_workers=0, device='cpu')

class Segmenter(nn.Module):
    def __init__(self, width=4): super().__init__(); self.body,self.head = nn.Conv2d(3,width,3,padding=1),nn.Conv2d(width,3,1)
    def forward(self, x): return self.head(self.body(x).relu())

def test_unet():
    dls = masks()
    def unet(): return create_unet_model(resnet18, 3, (32,32), pretrained=False)
    learn = Learner(dls, unet(), loss_func=CrossEntropyLossFlat(axis=1))
    trains(learn, KnowledgeDistillationCallback(unet(), SoftTarget))

def test_positions_are_rows():
    "The loss of a segmentation is the mean over pixels, whatever the size of the image, and the pixels to ignore are left out"
    student,teacher = Segmenter(),Segmenter(6).eval()
    def term(size, **kwargs):
        learn = Learner(masks(size, **kwargs), student, loss_func=CrossEntropyLossFlat(axis=1, ignore_index=255), opt_func=SGD)
        kd = KnowledgeDistillationCallback(teacher, SoftTarget(T=2))
        quiet(learn).fit(1, lr=0, cbs=kd)
        return sum(kd.curves['train']['kd_loss'])/2,learn.dls
    (small,_),(large,dls),(half,dls_half) = term(16),term(64),term(64, ignore=255)
    assert .5 < small/large < 2
    def by_hand(dls, rows):
        x = torch.stack([x for x,_ in dls.valid_ds])
        with torch.no_grad(): s,t = [m(x).permute(0,2,3,1)[:,rows].reshape(-1,3)/2 for m in (student,teacher)]
        return 4*F.kl_div(F.log_softmax(s, 1), F.softmax(t, 1), reduction='batchmean').item()
    assert large == pytest.approx(by_hand(dls, slice(None)), rel=1e-4) and half == pytest.approx(by_hand(dls_half, slice(32,None)), rel=1e-4)

def test_the_class_axis_of_a_users_own_loss_function():
    "It has no `axis`: the shape of the labels says where the classes are"
    student,teacher,dls = Segmenter(),Segmenter(6).eval(),masks(16)
    learn = Learner(dls, student, loss_func=lambda p,y: F.cross_entropy(p, y), opt_func=SGD)
    kd = KnowledgeDistillationCallback(teacher, SoftTarget(T=2))
    quiet(learn).fit(1, lr=0, cbs=kd)
    x = torch.stack([x for x,_ in dls.valid_ds])
    with torch.no_grad(): s,t = [m(x).movedim(1,-1).reshape(-1,3)/2 for m in (student,teacher)]
    assert sum(kd.curves['train']['kd_loss'])/len(kd.curves['train']['kd_loss']) == pytest.approx(4*F.kl_div(F.log_softmax(s, 1), F.softmax(t, 1), reduction='batchmean').item(), rel=1e-4)

def test_channel_wise_on_segmentation_logits():
    learn = Learner(masks(), Segmenter(), loss_func=CrossEntropyLossFlat(axis=1))
    trains(learn, KnowledgeDistillationCallback(Segmenter(6), ChannelWise, weight='paper'))

# --- tables

@pytest.fixture(scope='module')
def table():
    g = np.random.default_rng(0)
    df = pd.DataFrame({'a': g.choice(list('xyz'), 64), 'b': g.normal(size=64), 'c': g.normal(size=64)})
    df['y'] = np.where(df.b > 0, 'yes', 'no')
    df['z'] = df.b + df.c
    return df

def test_tabular(table):
    dls = TabularDataLoaders.from_df(table, procs=[Categorify,Normalize], cat_names=['a'], cont_names=['b','c'], y_names='y', bs=16, num_workers=0, valid_idx=list(range(16)))
    teacher = tabular_learner(dls, layers=[20,10])
    trains(tabular_learner(dls, layers=[8]), KnowledgeDistillationCallback(teacher.model, SoftTarget), lr=1e-2)
    trains(tabular_learner(dls, layers=[8]), KnowledgeDistillationCallback(teacher, [SoftTarget,FitNet], ['layers.0'], ['layers.1'], weight=.3), lr=1e-2)

def test_regression(table):
    dls = TabularDataLoaders.from_df(table, procs=[Categorify,Normalize], cat_names=['a'], cont_names=['b','c'], y_names='z', bs=16, num_workers=0, valid_idx=list(range(16)), y_block=RegressionBlock())
    teacher = tabular_learner(dls, layers=[20,10])
    trains(tabular_learner(dls, layers=[8]), KnowledgeDistillationCallback(teacher, Logits))

def test_multi_label():
    g = torch.Generator().manual_seed(0)
    items = [(torch.randn(1,8,8, generator=g), (torch.rand(3, generator=g) > .5).float()) for _ in range(16)]
    dls = DataLoaders.from_dsets(items, items, bs=8, num_workers=0, device='cpu')
    trains(Learner(dls, net(), loss_func=BCEWithLogitsLossFlat()), KnowledgeDistillationCallback(net(width=6), BinarySoftTarget))

# --- text

words = 'the a cat dog house tree sees likes builds eats big small red old'.split()

@pytest.fixture(scope='module')
def texts():
    g = np.random.default_rng(0)
    return pd.DataFrame({'text': [' '.join(g.choice(words, 12)) for _ in range(40)], 'label': g.choice(['p','n'], 40)})

def text_dls(df, is_lm):
    return TextDataLoaders.from_df(df, text_col='text', label_col='label', is_lm=is_lm, valid_pct=.25, seed=1, bs=4, seq_len=8, num_workers=0,
                                   tok_tfm=Tokenizer.from_df('text', tok=BaseTokenizer(), n_workers=1), device='cpu')

def small(config, **kwargs): return {**config, 'emb_sz': 8, 'n_hid': 12, 'n_layers': 2, **kwargs}

def test_language_model(texts):
    dls = text_dls(texts, True)
    def lm(n): return language_model_learner(dls, AWD_LSTM, config=small(awd_lstm_lm_config, n_hid=n), pretrained=False, drop_mult=.3)
    teacher = lm(16)
    kd = trains(lm(12), KnowledgeDistillationCallback(teacher.model, SoftTarget))
    assert kd.curves['train']['kd_loss'][0] < 5  # a mean over positions, along the last axis
    trains(lm(12), KnowledgeDistillationCallback(teacher.model, [SoftTarget,FitNet], ['0.rnns.0'], ['0.rnns.0'], weight=.3))

def test_the_teachers_hidden_state_is_reset_with_the_students(texts):
    dls = text_dls(texts, True)
    def lm(): return language_model_learner(dls, AWD_LSTM, config=small(awd_lstm_lm_config), pretrained=False)
    teacher,student,events = lm().model,lm(),[]
    for who,m in (('teacher',teacher[0]), ('student',student.model[0])):
        m.reset = lambda who=who, reset=m.reset: (events.append(who), reset())
    quiet(student).fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))
    assert events.count('teacher') >= 3  # training, validation, the end
    assert all(float(o.abs().sum()) == 0 for h in teacher[0].hidden for o in h)

def test_recurrent_teachers_that_are_copies(texts):
    "In half precision, and as the student's own average: fastai's `WeightDropout` computes weights, which `deepcopy` refuses"
    dls = text_dls(texts, True)
    def lm(n=12): return language_model_learner(dls, AWD_LSTM, config=small(awd_lstm_lm_config, n_hid=n), pretrained=False)
    teacher = lm(16)
    quiet(teacher).fit(1)
    trains(lm(), KnowledgeDistillationCallback(Teacher(teacher, dtype=torch.bfloat16), SoftTarget))
    trains(lm(), KnowledgeDistillationCallback(EMATeacher(.9), SoftTarget))

def test_text_classifier(texts):
    dls = text_dls(texts, False)
    def clas(n): return text_classifier_learner(dls, AWD_LSTM, config=small(awd_lstm_clas_config, n_hid=n), pretrained=False)
    trains(clas(12), KnowledgeDistillationCallback(clas(16), SoftTarget))
    trains(clas(12), KnowledgeDistillationCallback(clas(16).model, lambda pred, teacher_pred: F.mse_loss(pred, teacher_pred)))

# --- others' models

def test_hugging_face_classifier():
    transformers = pytest.importorskip('transformers')
    config = transformers.BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=3)
    teacher = transformers.BertForSequenceClassification(config)
    g = torch.Generator().manual_seed(0)
    items = [(torch.randint(0, 30, (6,), generator=g), torch.tensor(i%3)) for i in range(16)]
    dls = DataLoaders.from_dsets(items, items, bs=8, num_workers=0, device='cpu')
    class Bag(nn.Module):
        def __init__(self): super().__init__(); self.emb,self.fc = nn.Embedding(30, 4),nn.Linear(4, 3)
        def forward(self, x): return self.fc(self.emb(x).mean(1))
    kd = trains(Learner(dls, Bag(), loss_func=CrossEntropyLossFlat()), KnowledgeDistillationCallback(teacher, SoftTarget), lr=1e-2)
    with torch.no_grad(): z = teacher.eval()(items[0][0][None]).logits
    assert torch.equal(Teacher(teacher)(items[0][0][None]), z)
    tokens = KnowledgeDistillationCallback(teacher, FitNet, ['emb'], ['bert.encoder.layer.1'], weight=.5)  # activations (B, n, c)
    trains(Learner(dls, Bag(), loss_func=CrossEntropyLossFlat()), tokens, lr=1e-2)

def test_a_teacher_with_other_inputs():
    "Another size and normalisation"
    teacher = net(width=6, seed=7)
    inputs = lambda x: F.interpolate((x - .5)/.25, scale_factor=2.)
    kd = KnowledgeDistillationCallback(Teacher(teacher, inputs=inputs), [SoftTarget,Attention], ['conv2'], ['conv2'], weight=.3)
    learn = learner(batches(shuffle=False), net(seed=1))
    x = next(iter(learn.dls.train))[0]
    assert torch.equal(Teacher(teacher, inputs=inputs)(x), teacher.eval()(inputs(x)))
    trains(learn, kd)

# --- masks ---------------------------------------------------------------------------------------------------------

def mask_loaders(codes, *more, n_inp=1, size=8, **kwargs):
    m = np.random.default_rng(0).integers(0, 2, (32,size,size)).astype('uint8')
    getters = [lambda i: PILImage.create(np.stack([m[i]*100]*3, -1)), lambda i: PILMask.create(m[i]), lambda i: [1.,2.]]
    return DataBlock((ImageBlock, MaskBlock(codes), *more), getters=getters[:2+len(more)], n_inp=n_inp, splitter=IndexSplitter(range(8)), **kwargs).dataloaders(list(range(32)), bs=8, num_workers=0, device='cpu')

def test_codes_that_are_no_classes_of_the_output():
    "One logit for two codes; masks that are inputs"
    def make(codes): return learner(mask_loaders(codes), nn.Conv2d(3, 1, 1), loss_func=BCEWithLogitsLossFlat(axis=1))
    make(['bg','car']).fit(1, cbs=KnowledgeDistillationCallback(make(['bg','car'])))
    with pytest.raises(ValueError, match="The teacher's data name 2 classes, but the teacher outputs 1 logits"): make(['car','bg']).fit(1, cbs=KnowledgeDistillationCallback(make(['bg','car'])))
    knows = lambda *args, **kwargs: knowledge_of(mask_loaders(*args, **kwargs)).classes
    assert knows(['a','b'], RegressionBlock(n_out=2), n_inp=2) is None and knows(['a','b']) == ['a','b']

def test_what_distributed_loaders_know():
    from fastai.distributed import DistributedDL
    dls = mask_loaders(['bg','car'], batch_tfms=Normalize.from_stats([.5]*3, [.25]*3, cuda=False))
    there = DataLoaders(*[DistributedDL(dl, rank=0, world_size=1) for dl in dls.loaders])
    assert knowledge_of(there) == knowledge_of(dls) and knowledge_of(dls).normalize and knowledge_of(dls).classes == ['bg','car']

def test_a_peer_knows_no_other_classes():
    def make(codes):
        torch.manual_seed(0)
        return learner(mask_loaders(codes), nn.Conv2d(3, 2, 1), loss_func=CrossEntropyLossFlat(axis=1), opt_func=Adam, lr=1e-1)
    peer,student = make(['bg','car']),make(['car','bg'])
    kd = KnowledgeDistillationCallback(PeerTeacher(peer), Mutual())
    student.metrics = TeacherAgreement(kd.teacher)
    student.fit(4, cbs=kd)
    assert 'mapped' not in repr(kd) and student.validate()[1] > .9

def test_codes_of_masks_are_classes():
    "The teacher's masks number the classes in another order: its logits and its head are taken by name"
    g = np.random.default_rng(0)
    bright = [g.random((16,16)) > .5 for _ in range(24)]
    images = [(np.stack([b]*3, -1)*200 + g.integers(0, 50, (16,16,3))).astype('uint8') for b in bright]
    def loaders(codes):
        masks = [np.where(b, codes.index('light'), codes.index('dark')).astype('uint8') for b in bright]
        block = DataBlock((ImageBlock, MaskBlock(codes)), get_x=ItemGetter(0), get_y=ItemGetter(1), splitter=IndexSplitter(range(16, 24)))
        return block.dataloaders(list(zip(images, masks)), bs=8, num_workers=0, device='cpu')
    def pixels(pred, y): return (pred.argmax(1) == y).float().mean()
    def make(dls, width, classes=3, seed=0):
        torch.manual_seed(seed)
        return learner(dls, nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, classes, 1)), loss_func=CrossEntropyLossFlat(axis=1), metrics=pixels, opt_func=Adam, lr=1e-2)
    teacher = make(loaders(['dark','light','void']), 8)
    teacher.fit(12)
    right = teacher.validate()[1]
    assert right > .9
    student = make(loaders(['void','light','dark']), 4, seed=1)
    kd = KnowledgeDistillationCallback(teacher)
    student.fit(1, cbs=kd)
    assert kd.teacher_metrics()['pixels'] == pytest.approx(right) and "classes (3) are mapped" in repr(kd)
    twin = make(loaders(['void','light','dark']), 8, seed=2)
    init_from_teacher(twin, teacher)
    assert twin.validate()[1] == pytest.approx(right)
    init_from_teacher(fewer := make(loaders(['light','dark']), 8, 2, seed=2), teacher)
    assert torch.equal(fewer.model[2].weight, teacher.model[2].weight[[1,0]])
    with pytest.raises(ValueError, match="does not know the class 'grey'"): make(loaders(['grey','light','dark']), 4).fit(1, cbs=KnowledgeDistillationCallback(teacher))
