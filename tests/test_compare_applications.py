"A comparison on each application of fastai: it runs, is found again, and gives equal numbers for equal seeds"
import numpy as np, pandas as pd, pytest
from torch import nn
from fastai.vision.all import (ConvLayer, CrossEntropyLossFlat, DataBlock, Dice, ImageBlock, ImageDataLoaders, IndexSplitter, ItemGetter, Learner, MaskBlock,
                               PILImage, RandomResizedCrop, RegressionBlock, accuracy, aug_transforms, foreground_acc, get_image_files, rmse)
from fastai.text.all import AWD_LSTM, TextDataLoaders, WordTokenizer, awd_lstm_clas_config, text_classifier_learner
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastkd.experiments import compare

def vision(folder):
    rng = np.random.default_rng(0)
    for i in range(40):
        image = rng.integers(0, 256 if i%2 else 100, (24,24,3)).astype('uint8')
        PILImage.create(image).save(folder/f"{'Cat' if i%2 else 'dog'}_{i}.png")
    dls = ImageDataLoaders.from_name_func(folder, get_image_files(folder).sorted(), lambda f: 'cat' if f[0].isupper() else 'dog', item_tfms=RandomResizedCrop(20),
        batch_tfms=aug_transforms(size=16), bs=8, seed=0, num_workers=0, device='cpu')
    def make(width): return Learner(dls, nn.Sequential(ConvLayer(3, width, stride=2), ConvLayer(width, 2*width, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2*width, 2)), metrics=accuracy)
    return make, ['none','soft','fitnet'], 'accuracy', 'higher'

def text(folder):
    df = pd.DataFrame(dict(text=['the cat sees a dog today','a tree grows over the river now']*16, label=['a','b']*16, valid=[False]*20+[True]*12))
    dls = TextDataLoaders.from_df(df, text_col='text', label_col='label', valid_col='valid', bs=4, num_workers=0, tok_tfm=WordTokenizer(), device='cpu')
    def make(width): return text_classifier_learner(dls, AWD_LSTM, config={**awd_lstm_clas_config, 'emb_sz': width, 'n_hid': width, 'n_layers': 1}, pretrained=False, metrics=accuracy)
    return make, ['none','soft'], 'accuracy', 'higher'

def tabular(folder):
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=rng.normal(size=80), b=rng.integers(0, 3, 80).astype(str)))
    df['y'] = np.where(df.a + (df.b == '1') > 0, 'yes', 'no')
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,Normalize], cat_names=['b'], cont_names=['a'], y_names='y', valid_idx=list(range(60, 80)), bs=20, device='cpu')
    def make(width): return tabular_learner(dls, layers=[width], metrics=accuracy)
    return make, ['none','soft'], 'accuracy', 'higher'

def segmentation(folder):
    rng = np.random.default_rng(0)
    items = [(rng.integers(0, 256, (16,16,3)).astype('uint8'), (rng.random((16,16)) > .5).astype('uint8')) for _ in range(24)]
    block = DataBlock((ImageBlock, MaskBlock(['no','yes'])), get_x=ItemGetter(0), get_y=ItemGetter(1), splitter=IndexSplitter(range(16, 24)))
    dls = block.dataloaders(items, bs=4, num_workers=0, device='cpu')
    def make(width): return Learner(dls, nn.Sequential(ConvLayer(3, width), nn.Conv2d(width, 2, 1)), loss_func=CrossEntropyLossFlat(axis=1), metrics=[Dice(axis=1), foreground_acc])
    return make, ['none','soft','channelwise'], 'dice', 'higher'

def regression(folder):
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=rng.normal(size=80), b=rng.normal(size=80)))
    df['y'] = df.a - 2*df.b
    dls = TabularDataLoaders.from_df(df, procs=[Normalize], cont_names=['a','b'], y_names='y', valid_idx=list(range(60, 80)), bs=20, y_block=RegressionBlock(), device='cpu')
    def make(width): return tabular_learner(dls, layers=[width], metrics=rmse)
    return make, ['none','logits'], '_rmse', 'lower'

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('application', [vision,text,tabular,segmentation,regression])
def test_an_application(application, tmp_path):
    (tmp_path/'data').mkdir()
    make,methods,metric,better = application(tmp_path/'data')
    teacher = make(16)
    with teacher.no_bar(), teacher.no_logging(): teacher.fit(2, 1e-2)
    kwargs = dict(seeds=2, epochs=2, lr=1e-2, show=False)
    runs = compare(lambda: make(4), teacher, methods, out=tmp_path/'a', **kwargs)
    assert {r.metric for r in runs} == {metric} and {r.better for r in runs} == {better} and len(runs) == 2*len(methods)
    assert runs.table()[metric].notna().all() and all(m in repr(runs) for m in methods[1:])
    make(4).fit(1)  # the loaders' streams go on
    again = compare(lambda: make(4), teacher, list(reversed(methods)), out=tmp_path/'b', **kwargs)
    assert {(r.method,r.seed): (r.value,r.log) for r in again} == {(r.method,r.seed): (r.value,r.log) for r in runs}
    assert {r.comparison for r in again} == {r.comparison for r in runs}
    assert compare(lambda: make(4), teacher, methods, out=tmp_path/'a', **kwargs).frame.when.tolist() == runs.frame.when.tolist()
    assert compare(lambda: make(5), teacher, ['none'], out=tmp_path/'a', **kwargs).runs[0].comparison != runs.runs[0].comparison
