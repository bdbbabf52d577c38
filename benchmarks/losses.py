"""What the losses cost: time and memory of each, forward and backward, beside a ResNet18's own step.

    python benchmarks/losses.py                     # ImageNet-like shapes, on the GPU if there is one
    python benchmarks/losses.py --batch 16          # a smaller machine
    python benchmarks/losses.py --table soft        # only SoftTarget beside the composition of torch calls

Times are the best of several rounds. All candidates take turns within a round, so that a busy machine slows all of them:
compare the ratios, not the milliseconds of two runs. Memory is the peak above what was allocated before the call.
The first table is `SoftTarget` (and `mean_softmax_kl`, the function in it, without the module's checks of shapes, precision and
autocast) beside the composition of torch calls, with the error of each (float32 against float64, relative,
at logits that differ by a tenth of their spread). The second is at float32, stages of a ResNet34 (teacher) and a ResNet18 (student)
at 224 pixels, 1000 classes; its column of products counts those of matrices and convolutions, forward and backward:
what a loss needs by its definition, however it is written.
"""
import argparse, os, sys, time, warnings
from pathlib import Path
os.environ.setdefault('KINETO_LOG_LEVEL', '5') # the profiler, which counts the memory, is talkative
warnings.filterwarnings('ignore', message='.*torch.jit.script.*')
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn.functional as F
from torch.profiler import profile, ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode
from fastkd.losses import *
from fastkd.feature_losses import *
from fastkd.methods import loss_classes

STAGES = ((64,56), (128,28), (256,14), (512,7)) # channels and size of the four stages of a ResNet18 or 34 at 224 pixels

def seconds(f, device):
    "Time of one call of `f`: on the CPU the processor's, which other programs do not disturb"
    if device != 'cuda':
        start = time.process_time(); f()
        return time.process_time() - start
    torch.cuda.synchronize(); start = time.perf_counter()
    f(); torch.cuda.synchronize()
    return time.perf_counter() - start

def peak(f, device):
    "Peak of the bytes allocated by `f`"
    if device == 'cuda':
        torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
        f(); torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: f()
    events = sorted((e.start_ns(), e.nbytes()) for e in prof.profiler.kineto_results.events() if e.name() == '[memory]')
    now = most = 0
    for _,n in events: now += n; most = max(most, now)
    return most

def best(fs, rounds, device):
    "The least time of each function in `fs`, over rounds in which they take turns"
    times = {k: float('inf') for k in fs}
    for f in fs.values(): f()
    for _ in range(rounds):
        for k,f in fs.items(): times[k] = min(times[k], seconds(f, device))
    return times

def products(f):
    "Floating-point operations of the matrix products and convolutions in `f`"
    with FlopCounterMode(display=False) as counter: f()
    return counter.get_total_flops()

def step(f, *leaves):
    "Forward and backward of `f`, from clean gradients"
    def _step():
        for x in leaves: x.grad = None
        f().backward()
    return _step

def all_losses(args):
    "Each loss beside the student's own step"
    from torchvision.models import resnet18
    B,C,dev = args.batch,1000,args.device
    student = resnet18().to(dev); x = torch.randn(B,3,224,224, device=dev); y = torch.randint(0, C, (B,), device=dev)
    own = step(lambda: F.cross_entropy(student(x), y), *student.parameters())
    s,t = torch.randn(B,C, device=dev, requires_grad=True), torch.randn(B,C, device=dev)
    acts = lambda grad: {i: torch.randn(B,c,h,h, device=dev).relu_().requires_grad_(grad) for i,(c,h) in enumerate(STAGES)}
    fm_s,fm_t = acts(True),acts(False)
    last = lambda fm: {3: fm[3]}
    seg = {1: torch.randn(B,21,56,56, device=dev, requires_grad=True), 0: torch.randn(B,21,56,56, device=dev)}
    def of(l):
        "A step of the loss `l` on what it needs; its authors' layers"
        l.to(dev)
        if not l.needs_features:
            z,z_t = (seg[1],seg[0]) if l.compares == 'maps' else (s,t)
            return step(lambda: l(pred=z, teacher_pred=z_t, **({'target': y} if l.needs_labels else {})), z)
        a,b = [last(fm) if l.paper_layers == 'last' else fm for fm in (fm_s,fm_t)]
        l.build(a, b)
        return step(lambda: l(fm_s=a, fm_t=b), *a.values(), *l.parameters())
    fs = {'SoftTarget, standardized': of(SoftTarget(standardize=True)), **{c.__name__: of(c()) for c in loss_classes()}}
    whole = best({'own': own}, args.student_rounds, dev)['own']
    print(f'\nResNet18, forward and backward: {whole:.2f} s', flush=True)
    times = best(fs, args.rounds, dev)
    work = products(own)
    print(f'\n| loss | ms | of a ResNet18 step ({whole*1e3:.0f} ms) | of its products | memory, MB |\n|---|---:|---:|---:|---:|')
    for k,f in fs.items(): print(f'| {k} | {times[k]*1e3:.2f} | {times[k]/whole:.2%} | {products(f)/work:.2%} | {peak(f, dev)/2**20:.1f} |', flush=True)
    print(f'| (the ResNet18 step itself) | {whole*1e3:.0f} | 100% | 100% | {peak(own, dev)/2**20:.0f} |')

def soft_target(args):
    "`SoftTarget` beside the composition of torch calls"
    def composed(s, t, T=5.): return T*T*F.kl_div((s/T).log_softmax(-1), (t/T).log_softmax(-1), reduction='batchmean', log_target=True)
    B,dev,ours = args.batch,args.device,SoftTarget()
    def error(f, C, n=10):
        "Largest relative error of `f` in `n` batches"
        pairs = [(s, s+0.1*torch.randn_like(s)) for s in torch.randn(n,B,C, device=dev)]
        return max(abs(f(s, t).item()/composed(s.double(), t.double()).item() - 1) for s,t in pairs)
    print(f'\n| classes (batch {B}) | SoftTarget, ms | mean_softmax_kl, ms | composition, ms | time | time of mean_softmax_kl | SoftTarget, MB | composition, MB | memory | SoftTarget, error | composition, error |'
          '\n|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|')
    for C in (100, 1000, 10_000, 100_000):
        s,t = torch.randn(B,C, device=dev, requires_grad=True), torch.randn(B,C, device=dev)
        again = max(1, 500_000//(B*C)) # short calls many times over
        def repeated(f):
            one = step(lambda: f(s, t), s)
            return one, lambda: [one() for _ in range(again)]
        (a,many_a),(b,many_b),(_,many_f) = repeated(ours),repeated(composed),repeated(lambda s,t: mean_softmax_kl(s, t, ours.T))
        times = best({'ours': many_a, 'function': many_f, 'composed': many_b}, args.soft_rounds, dev)
        ta,tf,tb = (times[k]/again for k in ('ours','function','composed')); ma,mb = peak(a, dev),peak(b, dev)
        print(f'| {C} | {ta*1e3:.3f} | {tf*1e3:.3f} | {tb*1e3:.3f} | {ta/tb:.2f} | {tf/tb:.2f} | {ma/2**20:.2f} | {mb/2**20:.2f} | {ma/mb:.2f} | {error(ours, C):.0e} | {error(composed, C):.0e} |', flush=True)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--batch', type=int, default=64)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--threads', type=int, default=1, help='CPU threads')
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--soft-rounds', type=int, default=30)
    p.add_argument('--student-rounds', type=int, default=2)
    p.add_argument('--table', choices=('soft','all','both'), default='both', help='SoftTarget beside the composition, all losses beside the student, or both')
    args = p.parse_args()
    torch.set_num_threads(args.threads); torch.manual_seed(0)
    print(f'torch {torch.__version__}, {args.device}, {args.threads} CPU thread(s), batch {args.batch}')
    if args.table != 'all': soft_target(args)
    if args.table != 'soft': all_losses(args)
