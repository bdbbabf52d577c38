"The command, as users run it"
import json, os, re, signal, subprocess, sys, time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
import pytest
import fastkd
from fastkd.cli import main
from fastkd.experiments import run_recipe
from fastkd.experiments.recipes import augmented, recipes
from fastkd.methods import named_methods, schedules

def command(*args, **kwargs):
    env = {**os.environ, 'PYTHONPATH': str(Path(fastkd.__file__).parents[1]), 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'}
    return subprocess.Popen([sys.executable, '-m', 'fastkd', *map(str, args)], env=env,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)

def lines(out):
    file = out/'results.jsonl'
    return file.read_bytes().splitlines(keepends=True) if file.exists() else []

run = 'run','digits','--methods','none,soft(T=4)','--seeds',4,'--epochs',4,'--teacher-epochs',2,'--device','cpu','--out'

@pytest.fixture(scope='module')
def killed(tmp_path_factory):
    "Results of a command that was killed on its way, and of the same command given again"
    out = tmp_path_factory.mktemp('killed')
    process = command(*run, out)
    while len(lines(out)) < 2 and process.poll() is None: time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before,teacher = lines(out),next(out.glob('teacher-*')).stat().st_mtime_ns
    if before[-1].endswith(b'\n'): (out/'results.jsonl').write_bytes(b''.join(before)+before[-1][:50])  # the kill that comes while a line is written
    else: before = before[:-1]
    again = command(*run, out)
    text,err = again.communicate()
    return out, process.returncode, before, teacher, again.returncode, text, err

def test_a_killed_command_goes_on_where_it_stopped(killed):
    out,status,before,teacher,again,text,err = killed
    assert status == -signal.SIGKILL and again == 0, err
    after = lines(out)
    assert 1 <= len(before) < 8 and after[:len(before)] == before and len(after) == 8
    runs = [json.loads(line) for line in after]
    assert {(r['method'],r['seed']) for r in runs} == {(m,s) for m in ('none','soft(T=4)') for s in range(4)}
    assert next(out.glob('teacher-*')).stat().st_mtime_ns == teacher
    assert f'{len(before)} of 8 runs are finished already' in text

def test_its_numbers_are_those_of_an_unbroken_one(killed, tmp_path):
    unbroken = run_recipe('digits', ['none','soft(T=4)'], 4, epochs=4, teacher_epochs=2, device='cpu', out=tmp_path, show=False)
    expected = {(r.method,r.seed): (r.accuracy,r.log) for r in unbroken.frame.itertuples()}
    assert {(r['method'],r['seed']): (r['value'],r['log']) for r in map(json.loads, lines(killed[0]))} == expected

def test_table_and_charts_are_written(killed):
    out,*_,text,err = killed
    table = (out/'table.md').read_text()
    assert table.count('\n|') == 4 and '| student alone' in table and '1,000 test rows' in table
    shown = text[text.index('  accuracy, %'):]
    assert 'student alone' in shown and '1,000 test rows' in shown and f'{out}/table.md' in shown
    assert max(len(l) for l in shown.splitlines() if str(out) not in l) <= 80
    for name in 'chart.png','curves.png': assert (out/name).read_bytes()[:4] == b'\x89PNG'
    assert 'Traceback' not in err

def test_a_finished_command_runs_nothing(killed, capsys):
    before = lines(killed[0])
    assert main([*map(str, run), str(killed[0])]) == 0
    assert lines(killed[0]) == before and '8 of 8 runs are finished already' in capsys.readouterr().out

def test_table_and_plot_alone(killed, capsys):
    out = killed[0]
    for name in 'table.md','chart.png','curves.png': (out/name).unlink()
    assert main(['table',str(out)]) == 0 and main(['plot',str(out)]) == 0
    assert 'student alone' in capsys.readouterr().out and (out/'table.md').read_text().count('\n|') == 4
    assert (out/'chart.png').exists() and (out/'curves.png').exists()

def test_two_comparisons_in_one_folder(killed, tmp_path, capsys):
    (tmp_path/'results.jsonl').write_bytes(b''.join(lines(killed[0])))
    for f in killed[0].glob('teacher-*'): (tmp_path/f.name).write_bytes(f.read_bytes())
    args = list(map(str, run))
    args[args.index('--epochs')+1] = '1'
    args[args.index('--seeds')+1] = '1'
    assert main([*args, str(tmp_path)]) == 0
    assert (tmp_path/'table.md').read_text().count('test rows') == 2 and len(list(tmp_path.glob('chart-*.png'))) == 2

def test_two_teachers_in_one_folder_make_two_tables(killed, tmp_path, capsys):
    runs = [json.loads(line) for line in lines(killed[0])]
    for r in runs[:4]: r['teacher']['checksum'] = 'other'
    (tmp_path/'results.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in runs))
    assert main(['table',str(tmp_path)]) == 0 and capsys.readouterr().out.count('test rows') == 2

@pytest.mark.parametrize('args,words', [
    (['rum'], "no command 'rum'"), (['run'], 'what'), (['run','digit'], 'mnist'), (['run','digits','--methods','sotf'], 'did you mean soft'),
    (['run','digits','--methods','soft(T=)'], 'name=value'), (['run','digits','--methods','soft(weight=2)'], 'label_weight'),
    (['run','digits','--methods','none,none'], 'once'),
    (['run','digits','--seeds','0'], '1 or more'), (['run','digits','--seeds','three'], "must be a whole number, got 'three'"),
    (['run','digits','--epochs','-1'], '1 or more'),
    (['run','digits','--device','gpu'], 'no device'), (['run','digits','--augment'], 'no augmentation'),
    (['run','digits','--sseds','3'], 'nrecognized'), (['table','nowhere'], 'no results'), (['plot','nowhere'], 'no results'),
    (['models','digit'], 'no recipe'), (['table'], 'out'), (['run','digits','--methods','attention'], 'attention: Attention compares the places'),
    (['run','digits','--methods','none(epochs=-1)'], '1 or more'), (['run','digits','--methods','soft(T=x)'], 'must be a number'),
    (['run','digits','--device','meta'], 'not available'),
    (['run','digits','--seeds','99999999999999999999999'], '10,000'), (['run','digits','--epochs','1.5'], 'must be a whole number'),
    (['run','digits','--methods','none','--out','/proc/nope'], 'cannot be written')])
def test_bad_arguments_are_one_sentence_and_status_2(args, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    out,err = capsys.readouterr()
    assert words in err and err.count('\n') == 1 and not out and not list(tmp_path.iterdir())

@pytest.mark.parametrize('line', ['{}', '[]', '5', '{"key":"a","comparison":"c","teacher":{}}', '{'])
def test_a_line_that_is_no_run_is_one_sentence(killed, line, tmp_path, capsys):
    (tmp_path/'results.jsonl').write_bytes(b''.join(lines(killed[0])) + line.encode() + b'\n')
    for args in ['table',str(tmp_path)],['plot',str(tmp_path)],[*map(str, run),str(tmp_path)]:
        assert main(args) == 2
        out,err = capsys.readouterr()
        assert 'Line 9 of' in err and err.count('\n') == 1 and not out

def test_files_that_cannot_be_written_are_one_sentence(killed, tmp_path, capsys):
    (tmp_path/'results.jsonl').write_bytes(b''.join(lines(killed[0])))
    for name in 'table.md','chart.png': (tmp_path/name).mkdir()
    for command in 'table','plot':
        assert main([command, str(tmp_path)]) == 1
        err = capsys.readouterr().err
        assert 'cannot be' in err and err.count('\n') == 1

def test_photographs_of_one_class_and_damaged_ones_are_one_sentence(tmp_path, capsys):
    from PIL import Image
    for i in range(40):
        (tmp_path/'a').mkdir(exist_ok=True)
        Image.new('RGB', (70,70)).save(tmp_path/'a'/f'x_{i}.jpg')
    assert main(['run','pets-scratch','--data',str(tmp_path),'--out',str(tmp_path/'out')]) == 1
    assert 'one kind' in (err := capsys.readouterr().err) and err.count('\n') == 1
    (tmp_path/'b').mkdir()
    for i in range(20): (tmp_path/'a'/f'x_{i}.jpg').rename(tmp_path/'b'/f'y_{i}.jpg')
    (tmp_path/'b'/'y_3.jpg').write_bytes((tmp_path/'b'/'y_3.jpg').read_bytes()[:300])
    assert main(['run','pets-scratch','--data',str(tmp_path),'--out',str(tmp_path/'out')]) == 1
    assert 'y_3.jpg cannot be read as an image' in (err := capsys.readouterr().err) and err.count('\n') == 1 and not (tmp_path/'out').exists()

def test_missing_data_are_one_sentence_and_status_1(capsys, tmp_path):
    assert main(['run','mnist','--data',str(tmp_path/'nothing'),'--out',str(tmp_path/'out')]) == 1
    err = capsys.readouterr().err
    assert '--data' in err and err.count('\n') == 1 and not (tmp_path/'out').exists()

def test_a_failing_download_does_not_show_a_stack(capsys, tmp_path, monkeypatch):
    import torchvision
    def offline(*args, **kwargs): raise RuntimeError('Error downloading train-images-idx3-ubyte.gz:\nTried …')
    monkeypatch.setattr(torchvision.datasets, 'MNIST', offline)
    assert main(['run','mnist','--out',str(tmp_path/'out')]) == 1
    assert capsys.readouterr().err.count('\n') == 1

def test_interrupted_with_a_sentence(capsys, monkeypatch):
    def interrupted(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(import_module('fastkd.experiments.compare'), 'run_recipe', interrupted)
    assert main(['run','digits']) == 130
    assert 'the same command resumes' in capsys.readouterr().err

def test_the_students_batches_are_augmented_when_asked(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(import_module('fastkd.experiments.compare'), 'run_recipe', lambda recipe, *args: asked.append(recipe))
    for options in [], ['--augment']: main(['run','pets-scratch','--out','nowhere',*options])
    assert [r.student_augment for r in asked] == [None, augmented] and asked[1] == replace(asked[0], student_augment=augmented)

def test_help(capsys):
    assert main([]) == 0 and main(['--help']) == 0
    out = capsys.readouterr().out
    for name in 'run','new','table','plot','models': assert f'  {name} ' in out
    assert main(['run','--help']) == 0
    out = capsys.readouterr().out
    for option in 'what','--methods','--set','--seeds','--epochs','--device','--data','--out','--bf16','--augment': assert option in out
    for choice in *recipes,'none',*named_methods(),*schedules: assert re.search(rf'(^|[ ,]){re.escape(choice)}([ ,.:]|$)', out, re.M), choice
    assert max(map(len, out[out.index('Recipes'):].splitlines())) <= 80
    assert main(['--version']) == 0 and capsys.readouterr().out.strip() == fastkd.__version__

def test_models(capsys):
    assert main(['models','digits']) == 0
    assert [l.split()[-1] for l in capsys.readouterr().out.splitlines() if l.startswith('Total params')] == ['66,154','1,930']
