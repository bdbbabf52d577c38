"A comparison whose runs an engine places, and a search for settings"
import os, signal, sys, threading, time, warnings
import numpy as np, pytest, torch
from torch import nn
from fastkd.experiments import Results, compare
from fastkd.experiments.tune import search_space, tune
from fastkd.feature_losses import FitNet
from fastkd.losses import SoftTarget
import test_compare_learners as T

def slow(pred, teacher_pred):
    time.sleep(0.05)
    return (pred-teacher_pred).square().mean()

def test_dask_makes_the_runs_though_a_worker_is_killed(tmp_path):
    "Every run is there once, with the numbers of one process"
    distributed,cloudpickle = pytest.importorskip('distributed'),pytest.importorskip('cloudpickle')
    torch.set_num_threads(1)
    for module in (T, sys.modules[__name__]): cloudpickle.register_pickle_by_value(module)  # these modules are not installed
    kwargs = dict(methods=['none', {'slow': slow}], seeds=4, epochs=2, lr=0.02, show=False)
    here = compare(T.make_student, T.trained(), out=tmp_path/'here', **kwargs)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, distributed.Client(cluster) as client:
        pids,file = client.run(os.getpid),tmp_path/'there'/'results.jsonl'
        def kill():
            while not file.exists(): time.sleep(0.01)
            os.kill(next(iter(pids.values())), signal.SIGKILL)
        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        there = compare(T.make_student, T.trained(), out=tmp_path/'there', executor=client.get_executor(), **kwargs)
        killer.join()
    assert T.numbers(there) == T.numbers(here) == T.numbers(Results(file).read()) and len(file.read_text().splitlines()) == 8

optuna = pytest.importorskip('optuna')
searched = dict(trials=5, seeds=2, epochs=2, lr=0.02, show=False)

def test_what_was_found_is_trained_again_on_fresh_seeds(tmp_path, capsys):
    runs = tune(T.make_student, T.trained(), test=T.test_dl, out=tmp_path, **{**searched, 'show': True})
    names = list(dict.fromkeys(r.method for r in runs))
    assert names[0] == 'none' and names[1].startswith('soft(weight=') and 'label_weight=' in names[1] and ',T=' in names[1]
    assert [r.seed for r in runs] == [0,1,0,1] and {r.on for r in runs} == {'test'} and len(Results(tmp_path/'results.jsonl').read()) == 4
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path/'study.db'}")
    best = max(t.value for t in study.trials if t.value is not None)
    assert study.best_value == best and len(study.trials) == 5 and capsys.readouterr().out.count('trial ') == 5

def test_a_search_goes_on(tmp_path, monkeypatch):
    "also one that was stopped in the middle of a trial"
    first = tune(T.make_student, T.trained(), out=tmp_path, **{**searched, 'trials': 2})
    calls = []
    def make():
        calls.append(1)
        if len(calls) == 6: raise KeyboardInterrupt
        return T.make_student()
    with pytest.raises(KeyboardInterrupt): tune(make, T.trained(), out=tmp_path, **searched)
    again = tune(T.make_student, T.trained(), out=tmp_path, **searched)
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path/'study.db'}")
    assert len([t for t in study.trials if t.state.is_finished()]) == 5 and len(again) == 4
    none = [r.value for r in first if r.method == 'none']
    assert [r.value for r in again if r.method == 'none'] == none
    before = (tmp_path/'results.jsonl').read_bytes()
    tune(T.make_student, T.trained(), out=tmp_path, **searched)  # nothing is left to do
    assert (tmp_path/'results.jsonl').read_bytes() == before

def test_a_trial_that_falls_behind_is_stopped(tmp_path):
    tune(T.make_student, T.trained(), out=tmp_path, **{**searched, 'trials': 12, 'epochs': 3, 'seeds': 1})
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path/'study.db'}")
    states = [t.state.name for t in study.trials]
    assert 'PRUNED' in states and set(states) == {'PRUNED','COMPLETE'} and len(states) == 12

def test_the_same_search_finds_the_same(tmp_path):
    a,b = [tune(T.make_student, T.trained(), out=tmp_path/n, **searched) for n in 'ab']
    assert T.numbers(a) == T.numbers(b)

def test_what_is_searched():
    space = search_space(SoftTarget())
    assert space.keys() == {'weight','label_weight','T'} and space['T'] == ('log',(1.,10.))
    pairs = [('a','x'),('b','y'),('c','z')]
    parts = search_space(FitNet(), pairs)['layers'][1]
    assert [eval(p) for p in parts] == [{'a': 'x'}, {'a': 'x','b': 'y'}, {'a': 'x','b': 'y','c': 'z'}, {'b': 'y','c': 'z'}, {'c': 'z'}]
    assert search_space(FitNet())['weight'] == ('log',(FitNet.paper[1]/10, FitNet.paper[1]*10)) and 'layers' not in search_space(FitNet(layers={'a': 'x'}), pairs)

def test_layers_are_searched(tmp_path):
    runs = tune(T.make_student, T.trained(width=4), 'fitnet', out=tmp_path, **searched)
    assert runs.runs[-1].method.startswith('fitnet(weight=')

@pytest.mark.parametrize('loss,words', [('sofd','did you mean'), ('soft+fitnet','one loss'), ('none','one loss'), ('soft(T=3)','one loss'), ('attention','attention: Attention compares')])
def test_what_cannot_be_tuned_is_one_sentence(loss, words, tmp_path):
    with pytest.raises(ValueError, match=words) as e: tune(T.make_student, T.trained(epochs=1), loss, out=tmp_path, **searched)
    assert '\n' not in str(e.value)
