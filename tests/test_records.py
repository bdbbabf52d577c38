"Finished runs in a file, and what they are known by"
import json
from functools import partial
from multiprocessing import get_context
from pathlib import Path
import pytest, torch
from fastai.callback.mixup import MixUp
from fastkd.experiments.records import Results, Run, parse_run, fingerprint, model_layout, named_function, provenance, same_settings

#: what a run has besides its comparison, its method and its seed
rest = dict(accuracy=0.5, parameters=7, seconds=[1.], log=dict(accuracy=[0.5]), data=['blobs',1,1,1,'x'], settings=dict(fit=dict(epochs=1), method={}),
    teacher=dict(accuracy=0.9, parameters=70, checksum='t'), teacher_fit=dict(epochs=1), device='cpu', versions=dict(torch='2'))

def line(method='soft', seed=0, comparison='c', **more): return dict(comparison=comparison, method=method, seed=seed, **rest, **more)
def run(*args, **kwargs): return parse_run(json.dumps(line(*args, **kwargs)))

def written(path, *runs):
    results = Results(path/'results.jsonl')
    for r in runs: results.append(r)
    return results

def test_what_was_written_is_read(tmp_path):
    runs = [run(seed=s) for s in range(3)] + [run('none'), run(comparison='d')]
    results = written(tmp_path/'deep'/'er', *runs)
    assert results.read() == runs and results.finished('d') == {('soft',0): runs[-1]}
    assert set(results.finished('c')) == {('soft',0),('soft',1),('soft',2),('none',0)}

def test_a_run_that_was_made_again_replaces_the_first(tmp_path):
    results = written(tmp_path, run(), run('none'), run(statistics=1))
    assert results.read() == [run(statistics=1), run('none')]

def test_runs_of_version_01_are_kept_apart_by_their_keys(tmp_path):
    "in which one name could stand for several methods; the last of them is found, and a new run replaces them all"
    a,b,again = run(key='a'),run(key='b'),run(key='a', statistics=1)
    results = written(tmp_path, a, b, again)
    assert results.read() == [again, b]
    results.append(run(new=1))
    assert results.read() == [run(new=1)]

@pytest.mark.parametrize('torn', [1, 20, 45])
def test_a_torn_line_is_not_read_and_cut_off(torn, tmp_path):
    results = written(tmp_path, run())
    whole = results.path.read_bytes()
    results.path.write_bytes(whole + json.dumps(line(seed=1)).encode()[:torn])
    assert results.read() == [run()]
    results.append(run(seed=2))
    assert results.read() == [run(), run(seed=2)] and results.path.read_bytes().startswith(whole)

def test_a_damaged_line_is_named(tmp_path):
    results = written(tmp_path, run())
    results.path.write_bytes(results.path.read_bytes() + b'{"comparison": \n')
    with pytest.raises(ValueError, match='Line 2 of .* is not the record of a run'): results.read()

@pytest.mark.parametrize('line', ['{}', '[]', 'null', '5', '"x"', 'NaN', '', '{"key": "a"}', '{"key":"a","comparison":"c","teacher":{}}', '['*10**5, '\xff',
    *[json.dumps({k: v for k,v in line().items() if k != lost}) for lost in ('method','seed','accuracy','seconds','log','settings','teacher','device')],
    *[json.dumps(line() | odd) for odd in (dict(accuracy='0.5'), dict(accuracy=None), dict(seconds=[]), dict(teacher=[]), dict(log={}), dict(seed=None))]])
def test_a_line_that_is_no_run_is_named(line, tmp_path):
    results = written(tmp_path, run())
    results.path.write_bytes(results.path.read_bytes() + line.encode('latin1') + b'\n')
    with pytest.raises(ValueError, match='Line 2 of .*: remove that line') as e: results.read()
    assert '\n' not in str(e.value)

def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    results = written(tmp_path, run(), run(seed=1))
    results.path.write_bytes(results.path.read_bytes().rstrip(b'\n'))
    assert results.read() == [run(), run(seed=1)]
    results.append(run(seed=2))
    assert results.read() == [run(), run(seed=1), run(seed=2)] and results.path.read_bytes().count(b'\n') == 3

def append_many(me, path):
    for i in range(100): Results(path).append(run(f'{me}', i, pad='y'*20_000))

def test_processes_append_to_one_file_and_no_row_is_lost(tmp_path):
    "also if the file ends with a torn line when they start"
    path = tmp_path/'results.jsonl'
    path.write_bytes(b'{"comparison": "c", "meth')
    processes = [get_context('fork').Process(target=append_many, args=(i, path)) for i in range(4)]
    for p in processes: p.start()
    for p in processes: p.join()
    assert not any(p.exitcode for p in processes)
    assert {(r.method,r.seed) for r in Results(path).lines()} == {(f'{i}',j) for i in range(4) for j in range(100)}
    assert len(path.read_bytes().splitlines()) == 400 and sorted(f.name for f in tmp_path.iterdir()) == ['.locks','results.jsonl']

def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path/'file').write_text('')
    (tmp_path/'folder'/'results.jsonl').mkdir(parents=True)
    for folder in tmp_path/'file',tmp_path/'file'/'deeper',Path('/proc/nope'),Path('/dev/full'),tmp_path/'folder':
        with pytest.raises(ValueError, match='cannot be written.*another folder') as e: Results(folder/'results.jsonl').check_writable()
        assert '\n' not in str(e.value)
    Results(tmp_path/'new'/'er'/'results.jsonl').check_writable()
    assert not list((tmp_path/'new'/'er').iterdir())
    with pytest.raises(ValueError, match='cannot be read'): Results(tmp_path/'folder'/'results.jsonl').read()

@pytest.mark.parametrize('file', sorted((Path(__file__).parents[1]/'nbs'/'tutorials'/'results').glob('*.jsonl')), ids=lambda f: f.name)
def test_every_committed_result_is_read(file): assert len(list(Results(file).lines())) == len(file.read_text().splitlines()) > 0

def test_a_model_is_known_by_its_layout():
    state = torch.get_rng_state()
    net = lambda n, act=torch.nn.ReLU: torch.nn.Sequential(torch.nn.Linear(2, n), act())
    assert model_layout(partial(net, 3)) == model_layout(partial(net, 3)) != model_layout(partial(net, 4))
    assert model_layout(partial(net, 3)) != model_layout(partial(net, 3, torch.nn.Tanh))
    assert torch.equal(torch.get_rng_state(), state)

def test_functions_are_known_by_name():
    def turned(x, angle): return x
    assert named_function(turned) == 'turned' and named_function(None) is None and named_function((MixUp,)) == ['MixUp']
    assert named_function((partial(MixUp, 0.5),)) == [['partial','MixUp',[0.5],{}]] != named_function((partial(MixUp, 1.),))
    assert named_function(partial(turned, angle=3)) == ['partial','turned',[],{'angle': 3}]
    turned.recorded_as = ['turned', 'as before']
    assert named_function(turned) == ['turned', 'as before']
    for o in (lambda x: x), MixUp(0.5), partial(lambda x: x, 1):
        with pytest.raises(ValueError, match='define a function'): named_function(o)

def test_fingerprints():
    assert fingerprint(dict(b=(1,2), a='x')) == fingerprint(dict(a='x', b=[1,2])) != fingerprint(dict(a='x', b=[2,1]))

def test_settings_of_two_versions_are_compared_as_far_as_they_can_be():
    old = lambda T, w=0.5: dict(loss=[['SoftTarget',{'T': T}]], weight=[w], label_weight=0.5, schedule=None, epochs=None)
    new = lambda T, w=0.5: dict(loss=[f'SoftTarget(T={T})'], weight=[w], label_weight=0.5, schedule=None, epochs=None)
    assert same_settings([old(4), new(4), new(4)]) and same_settings([dict(epochs=None)]*2) and same_settings([])
    for a,b in (old(4),old(5)),(new(4),new(5)),(old(4),new(4, 0.6)),(dict(epochs=None),dict(epochs=3)),(dict(epochs=None),new(4)): assert not same_settings([a,b])

def test_provenance():
    p = provenance()
    assert p['versions'].keys() >= {'python','torch','fastai','fastkd'} and p['threads'] >= 1 and json.dumps(p)
