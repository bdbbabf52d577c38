"""What fastkd does on a GPU, in one command: the tests, the experiment of the tutorial, the step.

    python benchmarks/gpu.py --data FOLDER          # photographs of cats and dogs, named as in Oxford-IIIT Pets; 8 minutes
    python benchmarks/gpu.py --minutes 30 --out FOLDER

The parts run in this order, the most telling first, and each is written to `gpu.md` and `gpu.json` as soon as it is done, so a run that is
cut off has shown what it finished. What does not fit into the time, or is not there, is named in the report. Without a GPU
everything runs in small on the CPU, to see that it works; figures of such a run mean nothing.
"""
import argparse, importlib.util, json, os, platform, re, subprocess, sys, time, warnings
from dataclasses import replace
from pathlib import Path
warnings.filterwarnings('ignore', message='.*torch.jit.script.*')
root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root))
import torch
from fastkd.experiments import run_recipe, table
from fastkd.experiments.recipes import Fit, augmented, pets_scratch
from fastkd.experiments.reports import caption, markdown

first_two = "fitnet(layers={'layer1':'0.4','layer2':'0.5'})"  # the layers that did best in nbs/tutorials/results.ipynb
methods = ['none', 'soft', 'attention', 'attention-paper', first_two]
precisions = {'float32': [], 'TF32': ['--tf32'], 'float16': ['--precision','float16'], 'bfloat16': ['--precision','bfloat16'],
              'bfloat16, channels last': ['--precision','bfloat16','--channels-last'], 'float32, compiled': ['--compile']}

class Report:
    "The parts that are done, and what was left out; written after each"
    def __init__(self, folder, minutes):
        self.folder,self.end,self.parts,self.left_out = Path(folder),time.monotonic() + 60*minutes,{},[]
        self.folder.mkdir(parents=True, exist_ok=True)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU: everything in small on the CPU, the figures mean nothing'
        self.title = f'torch {torch.__version__}, Python {platform.python_version()}, {device}'

    def left(self): return self.end - time.monotonic()
    def omit(self, what):
        self.left_out.append(what)
        print(f'left out: {what}', flush=True)
        self.write()

    def attempt(self, what, part, *args):
        "`part(self, *args)`, after whose failure the next part begins"
        try: return part(self, *args)
        except Exception as e: self.omit(f'{what}: {type(e).__name__}: {e}')

    def add(self,
        part, # Its heading
        text, # In Markdown
        seconds, # How long it took
        **figures # For `gpu.json`
    ):
        self.parts[part] = dict(text=text, seconds=round(seconds, 1), **figures)
        print(f'\n## {part} ({seconds:.0f} s)\n\n{text}', flush=True)
        self.write()

    def write(self):
        parts = [f"## {name} ({p['seconds']:.0f} s)\n\n{p['text']}" for name,p in self.parts.items()]
        if self.left_out: parts.append('## Left out\n\n' + '\n'.join(f'- {o}' for o in self.left_out))
        (self.folder/'gpu.md').write_text('\n\n'.join([f'# fastkd on a GPU\n\n{self.title}', *parts]) + '\n')
        (self.folder/'gpu.json').write_text(json.dumps(dict(title=self.title, parts=self.parts, left_out=self.left_out), indent=1))

def ran(report, args, seconds):
    "The output of a script of this checkout, and how long it took; `None` if it took more than `seconds`, or what is left"
    env,start = {**os.environ, 'PYTHONPATH': os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))},time.monotonic()
    try: done = subprocess.run([sys.executable, '-W', 'ignore', *map(str, args)], cwd=root, env=env, capture_output=True, text=True, timeout=max(1, min(seconds, report.left())))
    except subprocess.TimeoutExpired: return None,time.monotonic()-start
    return done,time.monotonic()-start

def tests(report, small):
    "The tests marked `cuda`, and those of the same file that a CPU can run"
    if not importlib.util.find_spec('pytest'): return report.omit('the tests: pytest is not installed')
    done,seconds = ran(report, ['-m','pytest','-q','-rfEs','-p','no:cacheprovider','tests/test_cuda.py'], 180)
    if done is None: return report.omit(f'the tests: they took more than {seconds:.0f} s')
    lines = done.stdout.splitlines()
    told = [l for l in lines if re.match(r'(FAILED|ERROR|SKIPPED|E  )', l)]
    report.add('Tests', f"{lines[-1] if lines else done.stderr[-500:]}\n" + ''.join(f'\n    {l}' for l in told[:60]), seconds, returncode=done.returncode)
    if small: report.omit('the tests marked `cuda`: there is no GPU')

def photographs(folder):
    "Forty drawn pictures, named as cats and dogs, where there are no photographs"
    from PIL import Image
    g = torch.Generator().manual_seed(0)
    for i in range(40):
        x = torch.rand(72,80,3, generator=g)*(255 if i%2 else 128)
        Image.fromarray(x.byte().numpy()).save(folder/f"{'Cat' if i%2 else 'dog'}_{i}.jpg")
    return folder

def tutorial(report, small, data, epochs):
    "The tutorial's experiment with students augmented on the device, for a number of epochs; returns how long it took"
    start = time.monotonic()
    teacher_fit = Fit(1 if small else 45, 1e-3)
    recipe = replace(pets_scratch, teacher_fit=teacher_fit, student_fit=Fit(1 if small else epochs, 1e-3), student_augment=augmented)
    runs = run_recipe(recipe, methods, seeds=2 if small else 3, data=data, out=report.folder/'pets', show=False).frame
    t = table(runs)
    report.add(f'Tutorial, {epochs} epochs', f'{caption(runs)}\n\n{markdown(t)}', time.monotonic()-start, runs=json.loads(t.rename_axis('method').reset_index().to_json(orient='records')))
    return time.monotonic()-start

def step(report, small, size, name, options):
    "One setting of `step.py`"
    out = report.folder/'step.json'
    what = f'the step at {size} pixels, {name}'
    sizes = ['--tiny','--rounds',2,'--steps',3] if small else ['--size',size,'--batch',64 if size < 200 else 32,'--rounds',5,'--steps',10,'--waiting']
    done,seconds = ran(report, ['benchmarks/step.py', *sizes, *options, '--no-import','--json',out], 150)
    if done is None or done.returncode: return report.omit(f"{what}: {'no time was left' if done is None else (done.stderr.strip().splitlines() or ['failed'])[-1]}")
    d = json.loads(out.read_text())
    lines = [f"| {k} | {r['seconds']*1e3:.2f} | {r['per_plain'][0]:.3f} | {r['per_floor'][0]:.3f} | {(r['bytes'] or 0)/2**20:.1f} | {'' if r['waiting'] is None else format(r['waiting'], '.0%')} |" for k,r in d['rows'].items() if k != 'both']
    skipped = [l for l in done.stdout.splitlines() if l.startswith('skipped')]
    report.add(f"Step, {'the small models of the digits' if small else f'{size} pixels'}, {name}", '| row | ms per step | / plain | / floor | peak memory, MB | the GPU waits |\n|---|---:|---:|---:|---:|---:|\n' + '\n'.join(lines + [f'\n{l}' for l in skipped]), seconds, **d)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', default='runs/gpu', help='folder for `gpu.md`, `gpu.json` and the runs')
    p.add_argument('--minutes', type=float, default=8, help='begin nothing that will hardly end within this time')
    p.add_argument('--data', help='folder of photographs of cats and dogs')
    args = p.parse_args()
    report,small = Report(args.out, args.minutes),not torch.cuda.is_available()
    print(report.title, flush=True)
    report.attempt('the tests', tests, small)
    data = args.data
    if data is None:
        report.omit('the tutorial on photographs: no `--data`')
        data = photographs(report.folder) if small else None
    seconds = report.attempt('the tutorial', tutorial, small, data, 10) if data else None
    for size in (64,224):
        for name,options in precisions.items():
            if report.left() < 20: report.omit(f'the step at {size} pixels, {name}: no time was left')
            elif small and (size,name) not in ((64,'float32'), (64,'bfloat16')): report.omit(f'the step at {size} pixels, {name}: there is no GPU')
            else: report.attempt(f'the step at {size} pixels, {name}', step, small, size, name, options)
    if small: report.omit("of the step: the ResNets (the digits' models take their place), peak memory, and how long the GPU waits")
    for epochs in (30,100):  # the students alone, with the teacher that is there
        what = f'the tutorial with {epochs} epochs'
        if seconds is None: continue
        if small or seconds*epochs/10 > report.left(): report.omit(f"{what}: {'there is no GPU' if small else 'no time was left'}")
        else: report.attempt(what, tutorial, small, data, epochs)
    if not importlib.util.find_spec('fasterai'): report.omit("the step of fasterai: it is not installed")
    print(f"\nWritten to {report.folder/'gpu.md'}")

if __name__ == '__main__': main()
