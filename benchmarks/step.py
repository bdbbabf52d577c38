"""What a teacher costs: time per batch of a real `fit`, plain and distilled in several ways, on synthetic images in memory.

    python benchmarks/step.py                       # ResNet34 to ResNet18, 64 pixels, batch 64, on the GPU if there is one
    python benchmarks/step.py --size 224 --batch 32 --classes 1000
    python benchmarks/step.py --tiny                # the models of the digits: here the Python around the arithmetic counts
    python benchmarks/step.py --profile             # where that Python is, function by function
    python benchmarks/step.py --clock cpu --threads 1   # a busy machine: processor time, not the wall's
    python benchmarks/step.py --precision float16 --channels-last --waiting   # on a GPU: also how long it waits for Python

All rows take turns of a few batches each, in an order that changes from round to round; a ratio is the median of the rounds' ratios, so
a busy machine slows both of its sides, and `±` is half the distance of its quartiles. The first batch of a turn, with a fit's preparations, does not count.
Rows that need what is not installed are skipped. The last table has the figures that fastkd is meant to reach.
"""
import argparse, copy, cProfile, inspect, json, os, platform, pstats, random, statistics, subprocess, sys, time, warnings
from collections import defaultdict
from pathlib import Path
warnings.filterwarnings('ignore', message='.*torch.jit.script.*')
root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root))
import torch
import torch.nn.functional as F
from torch import nn
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.progress import ProgressCallback # `Learner.no_bar`
from fastkd.callback import KnowledgeDistillationCallback
from fastkd.feature_losses import Attention
from fastkd.losses import SoftTarget
from fastkd.experiments.recipes import ArrayLoader, digits
from fastkd.experiments.training import Bfloat16
from fastkd.teacher import Teacher

T = 5. # the temperature of all rows
amp = {'float16': MixedPrecision, 'bfloat16': Bfloat16}
clocks = {'wall': time.perf_counter, 'cpu': time.process_time}

class Missing(Exception): "What a row needs is not there"

def watched(model, watch):
    "`model`, which tells `watch` when its forward begins and ends; copies of it do too, and its layers keep their names"
    class Watched(type(model)):
        def forward(self, *args, **kwargs):
            watch.begin()
            try: return super().forward(*args, **kwargs)
            finally: watch.end()
    model.__class__ = Watched
    return model

class Watch:
    "When a teacher runs, how long, and how many tensors are saved for backward by then"
    def __init__(self, now, cuda): self.now,self.cuda,self.running,self.marks,self.saved,self.bytes = now,cuda,False,[],0,{}
    def mark(self):
        if not self.cuda: return self.now()
        event = torch.cuda.Event(enable_timing=True); event.record()
        return event
    def begin(self): self.running = True; self.marks.append([self.mark()])
    def end(self): self.marks[-1].append(self.mark()); self.running = False
    def times(self):
        "Seconds of each forward; the GPU has to be waited for before"
        return [a.elapsed_time(b)/1e3 if self.cuda else b - a for a,b in self.marks]
    def pack(self, t):
        self.saved += self.running
        self.bytes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t.detach()
    def new_epoch(self): self.marks = []
    def new_batch(self): self.saved,self.bytes = 0,{}

class Clock(Callback):
    "Stamps at the ends of batches of the last epoch; the interval between two is a whole step, loading included"
    order = 1000 # after all others
    def __init__(self, now, watch): self.now,self.watch,self.stamps = now,watch,[]
    def before_train(self): self.stamps = []; self.watch.new_epoch()
    def before_batch(self):
        if self.training: self.watch.new_batch()
    def after_batch(self):
        if not self.training: return
        if self.watch.cuda: torch.cuda.synchronize()
        self.stamps.append(self.now())
    def after_train(self): self.forwards = self.watch.times()

class Floor(Callback):
    "The least that a teacher costs: its forward"
    def __init__(self, teacher): self.model_t = teacher
    def after_pred(self):
        if not self.training: return
        with torch.no_grad(): self.model_t(*self.xb)

class HandWritten(Callback):
    "The shortest callback that distils"
    def __init__(self, teacher): self.model_t = teacher
    def after_loss(self):
        if not self.training: return
        with torch.no_grad(): logits = self.model_t(*self.xb)
        self.learn.loss_grad = 0.5*self.learn.loss_grad + 0.5*soft(self.pred, logits)
        self.learn.loss = self.learn.loss_grad.clone()

def soft(s, t): return T*T*F.kl_div((s/T).log_softmax(-1), (t/T).log_softmax(-1), reduction='batchmean', log_target=True)

class Fit:
    "One row: a learner that is fitted for an epoch at each turn, or two where the first only fills a cache"
    def __init__(self, args, models, cbs, epochs=1):
        student,teacher = models
        self.args,self.epochs,self.cbs = args,epochs,list(cbs(teacher))
        self.learn = Learner(None, copy.deepcopy(student), loss_func=CrossEntropyLossFlat())
        if args.compile: self.learn.model = torch.compile(self.learn.model)
        if args.channels_last: self.learn.add_cb(ChannelsLast())
        if args.precision in amp: self.learn.add_cb(amp[args.precision]())
        self.clock = Clock(clocks[args.clock], args.watch)

    def __call__(self, dls):
        self.learn.dls = dls
        with self.learn.no_bar(), self.learn.no_logging(): self.learn.fit(self.epochs, 1e-3, cbs=[self.clock, *self.cbs])
        return self.clock.stamps, self.clock.forwards

class Loop:
    "One row: a loop without fastai's `Learner`, with or without a teacher"
    def __init__(self, args, student, teacher=None):
        self.args,self.student,self.teacher = args,copy.deepcopy(student),teacher
        self.opt = torch.optim.AdamW(self.student.parameters(), lr=1e-3)

    def __call__(self, dls):
        stamps = []
        self.args.watch.new_epoch()
        self.student.train()
        for x,y in dls.train:
            self.args.watch.new_batch()
            pred = self.student(x)
            loss = F.cross_entropy(pred, y)
            if self.teacher:
                with torch.no_grad(): logits = self.teacher(x)
                loss = 0.5*loss + 0.5*soft(pred, logits)
            loss.backward()
            self.opt.step(); self.opt.zero_grad()
            if self.args.watch.cuda: torch.cuda.synchronize()
            stamps.append(clocks[self.args.clock]())
        return stamps, self.args.watch.times()

def kd(teacher, *layers, loss=None, **settings):
    "fastkd's callback; `settings` go to `Teacher`"
    missing = [o for o in settings if o not in inspect.signature(Teacher).parameters]
    if missing: raise Missing(f"this fastkd's `Teacher` has no {', '.join(missing)}")
    return KnowledgeDistillationCallback(Teacher(teacher, **settings), loss or SoftTarget(T=T), *layers)

def cache_of(**settings):
    try: from fastkd.cache import Cache
    except ImportError: raise Missing("this fastkd has no views") from None
    return Cache(**settings)

def peer(teacher):
    "fasterai's callback"
    try: from fasterai.distill.all import KnowledgeDistillationCallback as PeerCallback, SoftTarget as peer_soft
    except ImportError: raise Missing("fasterai is not installed") from None
    return PeerCallback(copy.deepcopy(teacher), peer_soft) # it leaves gradients on its teacher

def stages(model, n):
    "The names of the first `n` stages"
    names = [f'layer{i+1}' for i in range(n)]
    if not all(hasattr(model, o) for o in names): raise Missing("the models have no layer1 ... layer4")
    return names

def rows(args):
    "Name and maker of each row"
    student,teacher = models = args.models
    fit = lambda *cbs, **kw: lambda: Fit(args, models, lambda t: [o(t) for o in cbs], **kw)
    attend = lambda n: lambda t: kd(t, stages(student, n), stages(t, n), loss=Attention())
    out = {'plain student': fit(), 'floor: plain + teacher forward': fit(Floor)}
    if args.tiny:
        out['plain PyTorch loop'] = lambda: Loop(args, student)
        out['hand-written PyTorch loop with teacher'] = lambda: Loop(args, student, teacher)
    out |= {'hand-written callback': fit(HandWritten), 'fastkd, SoftTarget': fit(kd),
        'fastkd, Attention on four stages': fit(attend(4)), 'fastkd, Attention on two early stages': fit(attend(2)),
        'fastkd, teacher bfloat16 + channels last': fit(lambda t: kd(t, dtype=torch.bfloat16, channels_last=True)),
        'fastkd, cached teacher, second epoch': fit(lambda t: kd(t, cache=True), epochs=2), 'fasterai, SoftTarget': fit(peer)}
    def mixup(t): return MixUp(0.4)
    def views(n, *layers, **settings): return lambda t: kd(t, *[stages(o, 4) for o in layers or ()], cache=cache_of(views=n), **settings)
    out |= {'MixUp, plain student': fit(mixup), 'MixUp, floor': fit(mixup, Floor), 'MixUp, fastkd, first epochs with views': fit(mixup, views(10**6)),
        'MixUp, fastkd, from the epoch on where views come again': fit(mixup, views(1), epochs=2)}
    if not args.tiny: out['MixUp, fastkd, Attention on four stages, views come again'] = fit(mixup, views(1, student, teacher, loss=Attention()), epochs=2)
    return {k: f for k,f in out.items() if not args.only or k == 'plain student' or k.startswith('floor') or any(o in k for o in args.only)}

def data(args, steps):
    "`DataLoaders` of `steps` batches to train on and two items to validate on"
    n,(c,h,w) = steps*args.batch,args.shape
    g = torch.Generator().manual_seed(0)
    x,y = torch.randn(n+2, c, h, w, generator=g).to(args.device), torch.randint(0, args.classes, (n+2,), generator=g).to(args.device)
    return DataLoaders(ArrayLoader(x[:n], y[:n], bs=args.batch, shuffle=True), ArrayLoader(x[n:], y[n:], bs=2), device=torch.device(args.device))

def memory(row, args, dls):
    "Tensors that the teacher saves for backward in a step, and bytes: saved for backward in a step, on a GPU those at the peak of a short fit"
    watch = args.watch
    with torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda t: t): row(dls)
    saved,n = watch.saved,sum(watch.bytes.values())
    if watch.cuda: # without the hooks, which keep more alive than autograd does
        torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
        row(dls); torch.cuda.synchronize()
        n = torch.cuda.max_memory_allocated() - before
    return saved,n

def ratio(tops, bottoms):
    "Median of the rounds' ratios, and half the distance of the quartiles"
    rs = [a/b for a,b in zip(tops, bottoms)]
    low,_,high = statistics.quantiles(rs, n=4) if len(rs) > 1 else rs*3
    return statistics.median(rs), (high - low)/2

def measure(args):
    "Let all rows take turns; returns the medians of each turn, by row: seconds per step, and of a teacher's forward"
    made,bytes_,saved = {},{},{}
    short,dls = data(args, 2),data(args, args.steps)
    for name,make in rows(args).items():
        try: made[name] = make()
        except Missing as e: print(f'skipped: {name}: {e}', flush=True)
    for name,row in list(made.items()):
        try: saved[name],bytes_[name] = memory(row, args, short)
        except Exception as e:
            if name == 'plain student': raise
            print(f'skipped: {name}: {type(e).__name__}: {e}', flush=True); del made[name]
    steps,forwards = defaultdict(list),defaultdict(list)
    turns,rng = list(made),random.Random(0)
    for r in range(args.rounds):
        rng.shuffle(turns)
        for name in turns:
            stamps,times = made[name](dls)
            steps[name].append(statistics.median(b - a for a,b in zip(stamps, stamps[1:])))
            forwards[name].append(statistics.median(times[1:]) if len(times) > 1 else 0.)
        if args.verbose: print(f'round {r+1}: ' + ', '.join(f'{steps[k][-1]*1e3:.3g}' for k in made) + ' ms', flush=True)
    return {k: steps[k] for k in made}, forwards, bytes_, saved

def waiting(row, dls):
    "The share of a turn's time in which the GPU has nothing to do"
    activity = torch.profiler.ProfilerActivity
    row(dls)
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as prof:
        row(dls)
        torch.cuda.synchronize()
    spans = sorted((e.time_range.start, e.time_range.end) for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    busy,end = 0.,0.
    for a,b in spans: busy,end = busy + max(0., b - max(a, end)),max(end, b)
    return 1 - busy/(end - spans[0][0])

def import_seconds():
    "Seconds that `import fastkd.all` takes after `fastai.vision.all`, in a fresh process"
    code = "import time\nfrom fastai.vision.all import *\nstart = time.perf_counter()\nimport fastkd.all\nprint(time.perf_counter()-start)"
    one = lambda: float(subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=root, capture_output=True, text=True, check=True).stdout)
    return statistics.median(one() for _ in range(5))

def report(args):
    "The table of all rows, and that of the figures to reach"
    steps,forwards,bytes_,saved = measure(args)
    plain,floor = [next(k for k in steps if k.startswith(o)) for o in ('plain','floor')]
    what = 'peak memory, MB' if args.watch.cuda else 'saved for backward, MB'
    print(f'\n| row | ms per step | / plain | ± | / floor | ± | teacher forward, ms | {what} more than plain | tensors saved by the teacher |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|')
    for k,times in steps.items():
        (p,dp),(f,df) = ratio(times, steps[plain]),ratio(times, steps[floor])
        print(f'| {k} | {statistics.median(times)*1e3:.{1 if times[0] > 0.02 else 3}f} | {p:.3f} | {dp:.3f} | {f:.3f} | {df:.3f} | '
              f'{statistics.median(forwards[k])*1e3:.{1 if times[0] > 0.02 else 3}f} | {(bytes_[k]-bytes_[plain])/2**20:.2f} | {saved[k]} |')
    print(f'\n(plain: {bytes_[plain]/2**20:.2f} MB {"at the peak" if args.watch.cuda else "saved for backward"})')
    name = lambda part: next((k for k in steps if part in k), None)
    soft_,cached,early,lean,peer_ = map(name, ('fastkd, SoftTarget','cached','early','bfloat16','fasterai'))
    goals = []
    def goal(text, top, bottom, most, of=steps):
        if top and bottom: goals.append((text, f'{ratio(of[top], of[bottom])[0]:.3f}', f'≤ {most}', ratio(of[top], of[bottom])[0] <= most))
    if args.tiny:
        loop,loop_kd,callback = map(name, ('plain PyTorch loop','hand-written PyTorch loop','hand-written callback'))
        goal('SoftTarget / hand-written callback', soft_, callback, 1.10)
        goal('SoftTarget / hand-written loop', soft_, loop_kd, 1.10)
        if loop and loop_kd:
            steps['both'] = [kd - own + fit for kd,own,fit in zip(steps[loop_kd], steps[loop], steps[plain])]
            goal("SoftTarget / hand-written loop + what `Learner` adds to a plain loop", soft_, 'both', 1.10)
    else: goal('SoftTarget / floor', soft_, floor, 1.03)
    goal('SoftTarget / fasterai', soft_, peer_, 0.65)
    if not args.tiny: goal('bfloat16 + channels last / floor', lean, floor, 0.90)
    goal("Attention on two early stages: teacher's share / full forward", early, floor, 0.6, forwards)
    if not args.tiny: goal('cached, second epoch / plain', cached, plain, 1.05)
    mixed,mixed_floor,first,again,four = map(name, ('MixUp, plain','MixUp, floor','first epochs','from the epoch on','stages, views'))
    goal('views, first epochs / floor with MixUp', first, mixed_floor, 1.05)
    goal('views that come again, logits / plain with MixUp', again, mixed, 1.03)
    goal('views that come again, four stages and Attention / plain with MixUp', four, mixed, 1.10)
    if soft_: goals.append(('tensors saved for backward by the teacher (SoftTarget)', str(saved[soft_]), '0', saved[soft_] == 0))
    if not args.no_import:
        s = import_seconds()
        goals.append(('`import fastkd.all` after `fastai.vision.all`', f'{s:.2f} s', '≤ 0.2 s', s <= 0.2))
    print('\n| figure | measured | to reach | |\n|---|---:|---:|---|')
    for text,got,most,ok in goals: print(f'| {text} | {got} | {most} | {"yes" if ok else "no"} |')
    waits = {}
    if args.waiting:
        dls,made = data(args, args.steps),rows(args)
        waits = {k: waiting(made[k](), dls) for k in steps if k in (plain,floor,soft_)}
        print('\n| row | share of the time in which the GPU waits |\n|---|---:|')
        for k,w in waits.items(): print(f'| {k} | {w:.1%} |')
    if args.json:
        found = {k: dict(seconds=statistics.median(times), per_plain=ratio(times, steps[plain]), per_floor=ratio(times, steps[floor]),
            bytes=bytes_.get(k), waiting=waits.get(k)) for k,times in steps.items()}
        Path(args.json).write_text(json.dumps(dict(settings=vars(args) | dict(watch=None, models=None), rows=found, goals=goals), default=str))

def profile(args):
    "Where a distilled fit spends its Python: fastkd's functions, and what they call"
    row,dls = Fit(args, args.models, lambda t: [kd(t)]),data(args, args.steps)
    row(data(args, 2))
    prof = cProfile.Profile() if args.clock == 'wall' else cProfile.Profile(clocks[args.clock])
    prof.runcall(row, dls)
    stats,total = pstats.Stats(prof).stats,pstats.Stats(prof).total_tt
    # the patched `fit` runs everything, and the loader stands for the user's
    ours = lambda f: os.sep + 'fastkd' + os.sep in f[0] and f[2] != 'fit' and not f[0].endswith('recipes.py')
    own,called,entered = [],defaultdict(lambda: [0,0.]),0.
    for f,(_,n,tt,ct,callers) in stats.items():
        for c,(_,m,_,cct) in callers.items():
            if ours(f) and os.sep + 'fastai' + os.sep in c[0]: entered += cct
            if ours(c) and not ours(f): called[f, c][0] += m; called[f, c][1] += cct
        if ours(f): own.append((ct, tt, n, f))
    per = lambda s: f'{s/args.steps*1e6:.1f}'
    name = lambda f: f'{Path(f[0]).name}:{f[1]} {f[2]}' if f[1] else f[2]
    print(f'\nA profiled step of {per(total)} µs; in the events of fastkd and what they call, the teacher and the loss included, {per(entered)} µs ({entered/total:.0%}). The profiler slows Python, and not the arithmetic.')
    print('\n| function of fastkd | calls per step | with what it calls, µs per step | own, µs per step |\n|---|---:|---:|---:|')
    for ct,tt,n,f in sorted(own, reverse=True)[:args.lines]: print(f'| {name(f)} | {n/args.steps:.2f} | {per(ct)} | {per(tt)} |')
    print('\n| called by fastkd | from | calls per step | µs per step |\n|---|---|---:|---:|')
    for (f,c),(n,ct) in sorted(called.items(), key=lambda o: -o[1][1])[:args.lines]: print(f'| {name(f)} | {name(c)} | {n/args.steps:.2f} | {per(ct)} |')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tiny', action='store_true', help='the models of the recipe `digits`, 8 by 8 pixels, batch 32')
    p.add_argument('--teacher', default='resnet34', help="name of one of torchvision's models")
    p.add_argument('--student', default='resnet18', help="name of one of torchvision's models")
    p.add_argument('--size', type=int, default=64, help='height and width of the images')
    p.add_argument('--batch', type=int)
    p.add_argument('--classes', type=int, default=10)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--threads', type=int, help='CPU threads')
    p.add_argument('--clock', choices=list(clocks), default='wall', help="the wall's time or the processor's (CPU only)")
    p.add_argument('--rounds', type=int, help='turns of each row')
    p.add_argument('--steps', type=int, help='batches in a turn')
    p.add_argument('--only', nargs='+', metavar='TEXT', help='only rows with one of these texts in their names, beside the plain step and the floor')
    p.add_argument('--precision', choices=['float32',*amp], default='float32', help="of the student's fit")
    p.add_argument('--tf32', action='store_true', help='let the GPU multiply float32 as TF32')
    p.add_argument('--channels-last', action='store_true')
    p.add_argument('--compile', action='store_true', help='compile the student')
    p.add_argument('--waiting', action='store_true', help='profile how long the GPU waits (CUDA only)')
    p.add_argument('--json', metavar='FILE', help='write the figures there too')
    p.add_argument('--profile', action='store_true', help='profile a distilled fit of the models of `digits` instead')
    p.add_argument('--lines', type=int, default=25, help='length of the tables of the profile')
    p.add_argument('--no-import', action='store_true', help='leave out the time of the import')
    p.add_argument('--verbose', action='store_true', help='print each round')
    args = p.parse_args()
    args.tiny |= args.profile
    args.rounds = args.rounds or (31 if args.tiny else 9)
    args.steps = args.steps or (1000 if args.profile else 100 if args.tiny else 6)
    args.batch = args.batch or (32 if args.tiny else 64)
    cuda = torch.device(args.device).type == 'cuda'
    if cuda and args.clock == 'cpu': p.error("the processor's time says nothing about a GPU")
    if args.waiting and not cuda: p.error('only a GPU waits')
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    if args.threads: torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.tiny: student,teacher,args.shape,args.classes = digits.student(),digits.teacher(),(1,8,8),10
    else:
        import torchvision
        student,teacher = [getattr(torchvision.models, o)(num_classes=args.classes) for o in (args.student,args.teacher)]
        args.shape = 3,args.size,args.size
    args.watch = Watch(clocks[args.clock], cuda)
    args.models = student.to(args.device), watched(teacher.to(args.device).eval(), args.watch)
    where = torch.cuda.get_device_name() if cuda else f'CPU ({platform.machine()}), {torch.get_num_threads()} thread(s)'
    print(f"torch {torch.__version__}, {where}, {'digits models' if args.tiny else f'{args.teacher} to {args.student}'}, "
          f"{'x'.join(map(str, args.shape))}, batch {args.batch}, {args.classes} classes, {args.clock} clock" + ('' if args.profile else f', {args.rounds} rounds of {args.steps} batches'))
    profile(args) if args.profile else report(args)

if __name__ == '__main__': main()
