"What the pages say is so: their examples run, their tables agree with the classes"
import inspect, json, os, re, statistics, subprocess, sys
from pathlib import Path
import pytest, torch
import fastai.vision.all as vision
from scipy import stats
import fastkd.all as everything
from fastkd.all import *
from fastkd.losses import KDLoss

root = Path(__file__).resolve().parents[1]
def blocks(page): return re.findall(r'^```python\n(.*?)^```', (root/page).read_text(), re.M|re.S)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('page', ['README.md','docs/quickstart.md'])
def test_the_examples_run_one_after_another(page, tmp_path, monkeypatch):
    "... with an epoch for each training"
    monkeypatch.chdir(tmp_path)
    code = '\n'.join(blocks(page))
    names = {}
    exec(re.sub(r'epochs=\d+', 'epochs=1', re.sub(r'fit_one_cycle\(\d+', 'fit_one_cycle(1', code)), names)
    assert isinstance(names['kd'], KnowledgeDistillationCallback)

def rows(page):
    "The cells of all tables"
    return [[c.strip() for c in l.strip('|').split('|')] for l in (root/page).read_text().splitlines() if l.startswith('| ') and not l.startswith(('| paper ','| data ')) and '---' not in l]

def test_the_papers_weights_are_those_of_the_classes():
    seen = set()
    for _,classes,setting,weights,*_ in rows('docs/papers.md'):
        for name in re.findall(r'`(\w+)`', classes):
            seen.add(name)
            call = next((c for c in re.findall(r'`(\w+\(.*?\))`', setting) if c.startswith(name + '(')))
            loss = eval(call)
            label,term = map(float, weights.split(', '))
            assert loss.paper == (label,term), name
            assert ('last stage' in setting) == (loss.paper_layers == 'last') and ('growing' in setting) == bool(loss.warmup_epochs), name
    losses = {n for n,c in vars(everything).items() if isinstance(c, type) and issubclass(c, KDLoss) and c.paper}
    assert losses - seen == {'BinarySoftTarget'}

def test_every_class_that_is_named_exists():
    for page in ('README.md', *(f'docs/{p.name}' for p in (root/'docs').glob('*.md'))):
        text = re.sub(r'```.*?```', '', (root/page).read_text(), flags=re.S)
        for call in re.findall(r'`([A-Z]\w+)\(', text):
            assert hasattr(everything, call) or hasattr(vision, call) or hasattr(torch.nn, call), (page, call)

def test_the_figures_of_the_readme_are_those_of_the_results():
    files = dict(digits='digits', MNIST='mnist', CIFAR='cifar10', cats='pets-scratch')
    found = [r for r in rows('README.md') if len(r) == 5]
    assert len(found) == len(files)
    for (data,teacher,alone,soft,best),(start,file) in zip(found, files.items()):
        assert data.startswith(start)
        runs = [json.loads(l) for l in (root/'nbs'/'tutorials'/'results'/f'{file}.jsonl').read_text().splitlines()]
        of = lambda m: {r['seed']: 100*r['accuracy'] for r in runs if r['method'] in (m, m.replace('ized', 'ised'))}  # the old name
        none = of('none')
        assert teacher == f"{100*runs[0]['teacher']['accuracy']:.2f}" and alone == f'{sum(none.values())/len(none):.2f}'
        for name,cell in (('soft',soft), (re.match('`(.*?)`', best)[1], best.split('` ')[1])):
            d = [v - none[s] for s,v in of(name).items() if s in none]
            mean,sd = statistics.mean(d),statistics.stdev(d)
            half = stats.t.ppf(.975, len(d)-1)*sd/len(d)**.5
            assert cell == f'{mean:+.2f} ({mean-half:+.2f} to {mean+half:+.2f})', (data, name)

def accuracies(name):
    "`{method: {seed: test accuracy in %}}` of a results file, without trainings of other lengths"
    runs = [json.loads(l) for l in (root/'nbs'/'tutorials'/'results'/f'{name}.jsonl').read_text().splitlines()]
    return {m: {r['seed']: 100*r['value'] for r in runs if r['method'] == m} for m in {r['method'] for r in runs} if 'epochs=' not in m},100*runs[0]['teacher']['value']

def best_of(methods):
    "The most accurate of the methods with several seeds"
    return max((m for m in methods if len(methods[m]) > 2 and m != 'none'), key=lambda m: statistics.mean(methods[m].values()))

def test_the_figures_of_the_pretrained_teacher_are_those_of_the_results():
    methods,teacher = accuracies('pets-lite')
    none,best = methods['none'],methods[best_of(methods)]
    d = [v - none[s] for s,v in best.items()]
    half = stats.t.ppf(.975, len(d)-1)*statistics.stdev(d)/len(d)**.5
    text,mean = (root/'README.md').read_text(),lambda runs: statistics.mean(runs.values())
    assert f"({teacher:.2f} %, EfficientNet-Lite0)" in text
    gain = statistics.mean(d)
    assert f'gains {gain:+.2f} points ({gain-half:+.2f} to {gain+half:+.2f})' in text and f'{mean(best):.2f} instead of {mean(none):.2f} %' in text
    few,_ = accuracies('pets-lite-few')
    assert f"reaches {mean(few[best_of(few)]):.2f} instead of {mean(few['none']):.2f} %" in text

@pytest.mark.parametrize('name', [n for n in dir(everything) if not n.startswith('_')])
def test_help_explains_every_argument(name):
    doc = vars(everything)[name].__doc__
    assert doc.count('Arguments:') <= 1
    for p in inspect.signature(vars(everything)[name]).parameters.values():
        if p.name not in ('self','args','kwargs'): assert f'    {p.name}: ' in doc, p.name

def test_the_import_warns_of_nothing():
    r = subprocess.run([sys.executable, '-c', 'import fastkd.all'], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(root)})
    assert (r.returncode,r.stdout,r.stderr) == (0, '', '')
