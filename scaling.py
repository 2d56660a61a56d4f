"""
Scaling laws, measured: train a grid of small models for different lengths, fit

    L(N, D) = E + A / N^a + B / D^b         N parameters, D tokens (Hoffmann et al. 2022, "Chinchilla", approach 3)

and read off how to spend a compute budget C = 6 N D: more parameters, or more tokens? E is what no model can know of
this text, A / N^a the price of a small model, B / D^b that of a short run.

    bash speedrun.sh scaling                       on Toytown, 17 minutes on two cores
    python scaling.py --data_dir=data/shakespeare  on other tokens: any folder that tokenizer.py has filled

Reads  data_dir/train_*.bin, val_*.bin, tokenizer.json
Writes out_dir/scaling.svg (loss against compute), scaling.json, and each run's folder; finished runs are not run again

N leaves embeddings out, as in Kaplan et al. 2020: in models this small they are most of the parameters. Every run has
its own schedule down to zero, since a long run's loss half-way says nothing of a run half as long.
"""
import concurrent.futures, itertools, json, math, os, subprocess, sys, time

import numpy as np
import torch

from configurator import configure
from model import check_settings, die, print0, write_texts

# -----------------------------------------------------------------------------
# settings
data_dir = 'data/toytown'                          # where the token shards are
out_dir = 'out/scaling'                            # where the runs, the fit and the drawing go
widths = (32, 48, 64, 96)                          # n_embd of the models: 3 layers, heads of 16
lengths = (400_000, 800_000, 1_600_000, 2_400_000) # tokens each of them is trained on
learning_rate = 1.2e-2                             # of Muon, for all widths: its update has a size of its own
batch_size = 8                                     # windows in a step
block_size = 128                                   # tokens in a window
seed = 1337                                        # of weights and order
config = configure(globals())
check_settings(config)

# -----------------------------------------------------------------------------
# the runs: each is pretrain.py with flags, on one core

def train(width, length):
    """-> (N, D, loss on the validation set)."""
    folder = os.path.join(out_dir, f'width{width}_tokens{length}')
    steps = max(20, round(length / batch_size / block_size))
    command = [sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), 'pretrain.py')] + [
        f'--{k}={v}' for k, v in dict(
            data_dir=data_dir, out_dir=folder, arch='llama', n_layer=3, n_head=width // 16, n_embd=width, dropout=0.0,
            block_size=block_size, batch_size=batch_size, qk_norm=True, key_shift=True, optimizer='muon', device='cpu',
            learning_rate=learning_rate, min_lr=0.0, warmup_iters=20, max_iters=steps, eval_interval=10**9,
            eval_iters=100, save_interval=10**9, seed=seed).items()]
    settings = os.path.join(folder, 'command.json')
    finished = os.path.exists(os.path.join(folder, 'base.pt')) and os.path.exists(settings)
    if not finished or json.load(open(settings, encoding='utf-8')) != command[2:]:
        done = subprocess.run(command + ['--resume=false'], capture_output=True, encoding='utf-8',
                              env={**os.environ, 'OMP_NUM_THREADS': '1'})
        if done.returncode:
            die(f'{folder}: {done.stderr.strip()}')
        write_texts(folder, {'command.json': json.dumps(command[2:])})
    ckpt = torch.load(os.path.join(folder, 'base.pt'), weights_only=True)
    N = sum(v.numel() for k, v in ckpt['weights'].items() if not k.startswith(('wte', 'wpe', 'head')))
    return N, ckpt['metrics']['tokens'], ckpt['metrics']['val_loss']

grid = sorted(itertools.product(widths, lengths), key=lambda g: -g[0] ** 2 * g[1]) # the longest first
points, start = [], time.time()
work, total = 0, sum(w ** 2 * n for w, n in grid)
with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    jobs = {pool.submit(train, *g): g for g in grid}
    for job in concurrent.futures.as_completed(jobs):
        try:
            points.append(job.result())
        except SystemExit as e:
            pool.shutdown(cancel_futures=True)
            die(str(e.code).removeprefix('error: '))
        work += jobs[job][0] ** 2 * jobs[job][1]
        print0('{:9,} parameters, {:9,} tokens: loss {:.4f} | {:.0%}, {:.0f} s left'.format(
            *points[-1], work / total, (time.time() - start) * (total / work - 1)))
points.sort()
N, D, L = torch.tensor(points, dtype=torch.float64).T

# -----------------------------------------------------------------------------
# the fit: Huber loss on log L, from many starts, since it has several valleys

def predict(p, N, D):
    """log L of p = (log E, log A, log B, a, b)."""
    e, A, B, a, b = p
    return torch.logsumexp(torch.stack((e.expand_as(N), A - a * N.log(), B - b * D.log())), 0)

def fit():
    best = None
    for e, A, B, a, b in itertools.product((-2, -0.5, 0.5), (2, 6), (2, 6), (0.3, 0.7), (0.3, 0.7)):
        p = torch.tensor([e, A, B, a, b], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([p], max_iter=500, line_search_fn='strong_wolfe', tolerance_grad=1e-10)
        def closure():
            optimizer.zero_grad()
            loss = torch.nn.functional.huber_loss(predict(p, N, D), L.log(), delta=1e-2, reduction='sum')
            loss.backward()
            return loss
        optimizer.step(closure)
        loss = closure().item()
        if math.isfinite(loss) and min(p[3:]) > 0 and (best is None or loss < best[0]):
            best = loss, p.detach().clone()
    return best[1] if best else die('the losses fit no such law: train longer or more sizes, --lengths, --widths')

p = fit()
E, A, B, (a, b) = *p[:3].exp().tolist(), p[3:].tolist()
error = (predict(p, N, D).exp() - L).abs()

def best_size(C):
    """N that makes L(N, C / 6N) smallest: a A / N^a = b B / D^b."""
    return (a * A / (b * B)) ** (1 / (a + b)) * (C / 6) ** (b / (a + b))

print0(f'\nL(N, D) = {E:.3f} + {A:.4g} / N^{a:.3f} + {B:.4g} / D^{b:.3f}     '
       f'off by {error.mean():.4f} on average, at most {error.max():.4f}')
halves = [math.ceil(2 * math.log10(6 * c)) for c in (min(N * D), 100 * max(N * D))] # budgets: powers of sqrt(10)
for C in (10 ** (k / 2) for k in range(*halves)):
    n = best_size(C)
    loss = predict(p, torch.tensor([n]).double(), torch.tensor([C / 6 / n]).double()).exp().item()
    print0(f'{C:.0e} FLOPs: {n:11,.0f} parameters, {C / 6 / n:13,.0f} tokens, {C / 6 / n / n:7.1f} tokens a parameter, '
           f'loss {loss:.3f}')
print0(f'optimal N grows as C^{b / (a + b):.2f}, D as C^{a / (a + b):.2f} (Hoffmann et al.: both as C^0.5, 20 tokens a '
       'parameter)')

# -----------------------------------------------------------------------------
# drawing: loss against compute, one line a size, and the best of all sizes at each budget

colors = ['#1f77b4', '#2ca02c', '#9467bd', '#ff7f0e', '#d62728', '#8c564b', '#17becf', '#7f7f7f']
C = 6 * N * D
lo, hi, top, low = math.log10(C.min()) - 0.1, math.log10(C.max()) + 0.6, L.max().item() * 1.03, L.min().item() * 0.93
X = lambda c: 60 + 640 * (math.log10(c) - lo) / (hi - lo)
Y = lambda l: 20 + 360 * (math.log(top) - math.log(l)) / (math.log(top) - math.log(low))
line = lambda pts, style: ('<polyline fill="none" ' + style + ' points="'
                           + ' '.join(f'{X(c):.1f},{Y(l):.1f}' for c, l in pts) + '"/>')
svg = ['<svg xmlns="http://www.w3.org/2000/svg" width="860" height="430" font-family="sans-serif" font-size="12">',
       '<rect width="860" height="430" fill="white"/>']
for i, n in enumerate(dict.fromkeys(N.tolist())):
    color, at = colors[i % len(colors)], N == n
    d = torch.logspace(math.log10(D.min()), math.log10(D.max()), 40, dtype=torch.float64)
    fitted = predict(p, torch.full_like(d, n), d).exp().tolist()
    svg.append(line(zip((6 * n * d).tolist(), fitted), f'stroke="{color}"'))
    svg += [f'<circle cx="{X(c):.1f}" cy="{Y(l):.1f}" r="4" fill="{color}"/>'
            for c, l in zip(C[at].tolist(), L[at].tolist())]
    svg.append(f'<text x="715" y="{40 + 20 * i}" fill="{color}">{n:,.0f} parameters</text>')
c = torch.logspace(lo, hi, 60, dtype=torch.float64)
n = best_size(c)
frontier = [(x, y) for x, y in zip(c.tolist(), predict(p, n, c / 6 / n).exp().tolist()) if low < y < top]
svg.append(line(frontier, 'stroke="black" stroke-dasharray="5 4"'))
svg.append(f'<text x="715" y="{50 + 20 * len(set(N.tolist()))}">- - best size at each</text>')
svg += [f'<text x="{X(10**k):.0f}" y="400" text-anchor="middle">1e{k}</text>'
        for k in range(math.ceil(lo), int(hi) + 1)]
svg += [f'<text x="52" y="{Y(l) + 4:.0f}" text-anchor="end">{l:.2f}</text>'
        for l in np.geomspace(low * 1.02, top * 0.98, 6)]
svg += ['<text x="380" y="420" text-anchor="middle">FLOPs = 6 N D</text>',
        '<text x="60" y="14">validation loss</text>', '</svg>']
write_texts(out_dir, {'scaling.svg': '\n'.join(svg), 'scaling.json': json.dumps(dict(
    E=E, A=A, B=B, a=a, b=b, points=[dict(N=n, D=d, loss=l) for n, d, l in points]), indent=1)})
print0(f'wrote {out_dir}/scaling.svg, scaling.json; {time.time() - start:.0f} s')
