"The command for a GPU, in small on a CPU"
import importlib.util, json, sys
from pathlib import Path
import pytest, torch

root = Path(__file__).resolve().parents[1]

@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(sys, 'path', list(sys.path))
    spec = importlib.util.spec_from_file_location('gpu', root/'benchmarks'/'gpu.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, 'methods', ['none','soft'])
    monkeypatch.setattr(module, 'tests', lambda report, small: report.omit('the tests: this is one'))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    return module

def test_it_runs_in_small_and_names_what_it_leaves_out(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['gpu.py','--out',str(tmp_path/'out'),'--minutes','3'])
    gpu.main()
    said,d = (tmp_path/'out'/'gpu.md').read_text(),json.loads((tmp_path/'out'/'gpu.json').read_text())
    assert [p.split(',')[0] for p in d['parts']] == ['Tutorial','Step','Step'] and 'no GPU' in d['title']
    assert {r['method'] for r in d['parts']['Tutorial, 10 epochs']['runs']} >= {'student alone','soft'}
    assert 'fastkd, SoftTarget' in d['parts']["Step, the small models of the digits, bfloat16"]['rows']
    for o in ('the tests', 'no `--data`', '64 pixels, float16', '224 pixels, float32, compiled', '30 epochs', '100 epochs'): assert any(o in l for l in d['left_out']), o
    assert all(o in said for o in d['left_out'])

def test_what_does_not_fit_into_the_time_is_named(gpu, tmp_path):
    report = gpu.Report(tmp_path, 0)
    assert gpu.ran(report, ['-c','import time; time.sleep(60)'], 60)[0] is None
    gpu.step(report, True, 64, 'float32', [])
    assert 'no time was left' in (tmp_path/'gpu.md').read_text()

def test_after_a_part_that_fails_the_next_begins(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['gpu.py','--out',str(tmp_path),'--data',str(tmp_path/'nothing')])
    monkeypatch.setattr(gpu, 'precisions', {})
    gpu.main()
    assert 'the tutorial: MissingData' in (tmp_path/'gpu.md').read_text()
