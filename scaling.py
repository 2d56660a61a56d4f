"""
Measure a scaling law. Train a grid of small models for different numbers of steps and fit

    L(N, D) = E + A / N^a + B / D^b        N parameters, D tokens (Hoffmann et al. 2022, approach 3)

E is the loss that no model can avoid, A / N^a the price of a small model, B / D^b that of a short
run. The law tells how to spend a budget of C = 6 N D FLOPs: on more parameters or on more tokens.

on Toytown      $ python scaling.py                (about 17 minutes on two CPU cores)
on other data   $ python scaling.py --data_dir=data/shakespeare

Reads   data_dir/train_*.bin, val_*.bin, tokenizer.json
Writes  out_dir/scaling.svg, scaling.json, a folder for each run (a finished one is not repeated)

N leaves embeddings out (Kaplan et al. 2020): they are most of such a small model. Each run has its
own schedule: half-way, a long run has a higher loss than a run of half the length at its end.
"""
from configurator import configure # first: makes Ctrl-C one line, also while torch loads
import itertools
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn import functional as F

from model import GPT, GPTConfig, load_checkpoint, print0, write_text

# -----------------------------------------------------------------------------
# settings
data_dir = 'data/toytown'      # folder of the token shards
out_dir = 'out/scaling'        # folder of the runs, the fit and the drawing
widths = (32, 48, 64, 96)      # n_embd of the models; heads are 16 wide
steps = (391, 781, 1562, 2344) # steps of the runs, of 1,024 tokens each
seed = 1337                    # seed of the weights and of the order of the data
config = configure(globals())

# -----------------------------------------------------------------------------
# the runs: pretrain.py with config/scaling.py and these flags, one on each core
def train(width, max_iters):
    """Train one model, unless this run has finished before. Returns (N, D, validation loss)."""
    folder = f'{out_dir}/width{width}_steps{max_iters}'
    flags = dict(data_dir=data_dir, out_dir=folder, n_embd=width, n_head=width // 16,
                 max_iters=max_iters, seed=seed)
    profile = HERE / 'config/scaling.py'
    settings = str(flags) + profile.read_text(encoding='utf-8')
    finished = Path(folder, 'finished.txt') # holds the settings of the finished run
    if not finished.exists() or finished.read_text(encoding='utf-8') != settings:
        command = [sys.executable, HERE / 'pretrain.py', profile]
        for name, value in flags.items():
            command.append(f'--{name}={value}')
        env = dict(os.environ, OMP_NUM_THREADS='1')
        run = subprocess.run(command, capture_output=True, encoding='utf-8', env=env)
        assert run.returncode == 0, f'{folder}: {run.stderr.strip()}'
        write_text(finished, settings)

    ckpt = load_checkpoint(f'{folder}/base.pt', ['base'], f'rm -r {folder}')
    gpt = GPT(GPTConfig(**ckpt['model_args']))
    N = gpt.n_params(embedding=False)
    return N, ckpt['metrics']['tokens'], ckpt['metrics']['val_loss']

HERE = Path(__file__).resolve().parent
grid = list(itertools.product(widths, steps))
grid.sort(key=math.prod, reverse=True) # large runs first: no core waits long at the end
points = []
pool = ThreadPoolExecutor(os.cpu_count())
try:
    for N, D, loss in pool.map(train, *zip(*grid)):
        points.append((N, D, loss))
        print0('{:,} parameters, {:,} tokens: loss {:.4f}'.format(N, D, loss))
finally:
    pool.shutdown(cancel_futures=True) # after an error, start no more runs
points.sort()
N, D, L = torch.tensor(points, dtype=torch.float64).T

# -----------------------------------------------------------------------------
# the fit: Huber loss on log L, from many starts, because it has several local minima
def predict(p, N, D):
    """The loss that the law predicts, with p = (log E, log A, log B, a, b)."""
    E, A, B = p[:3].exp()
    a, b = p[3:]
    return E + A / N ** a + B / D ** b

least = math.inf
for start in itertools.product((-2, -0.5, 0.5), (2, 6), (2, 6), (0.3, 0.7)):
    q = torch.tensor([*start, 0.5], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([q], max_iter=500, history_size=10, # 100 is slower
                                  line_search_fn='strong_wolfe')

    def closure():
        optimizer.zero_grad()
        log_loss = predict(q, N, D).log()
        error = F.huber_loss(log_loss, L.log(), delta=1e-2, reduction='sum')
        error.backward()
        return error

    optimizer.step(closure)
    error = closure().item()
    if error < least and min(q[3:]) > 0: # from some starts the fit diverges
        least = error
        p = q.detach()
assert least < math.inf, 'the losses fit no such law: try more --widths or longer --steps'
E, A, B = p[:3].exp().tolist()
a, b = p[3:].tolist()
fitted = predict(p, N, D)
print0('L(N, D) = {:.3f} + {:.4g} / N^{:.3f} + {:.4g} / D^{:.3f}'.format(E, A, a, B, b))

# The best size for a budget C has the smallest L(N, C / 6N). There, a A / N^a = b B / D^b.
share = b / (a + b)
print0('the best N grows as C^{:.2f} (Hoffmann et al.: as C^0.5)'.format(share))
flops = 6 * N * D
budgets = flops.min() * torch.logspace(0, 4, 9)
ratio = (a * A) / (b * B)
ND = budgets / 6
best_N = ratio ** (share / b) * ND ** share
best_D = ND / best_N
best_L = predict(p, best_N, best_D)
for row in zip(budgets, best_N, best_D, best_L):
    print0('{:.1e} FLOPs: {:,.0f} parameters, {:,.0f} tokens, loss {:.3f}'.format(*row))

# -----------------------------------------------------------------------------
# the drawing: loss against compute. Both axes are logarithmic.
TEXT = '<text x="{:.1f}" y="{:.1f}" fill="{}">{}</text>'
LINE = '<polyline points="{}" stroke="{}" fill="none"/>'
CIRCLE = '<circle cx="{:.1f}" cy="{:.1f}" r="4" fill="{}"/>'
svg = ['<svg xmlns="http://www.w3.org/2000/svg" width="800" height="500" font-size="12">',
       '<text x="10" y="15">validation loss against FLOPs = 6 N D</text>']

def to_pixels(flops, losses):
    x = 60 + 150 * (flops / budgets[0]).log10() # 150 pixels for a factor of 10
    y = 40 - 300 * (losses / L.max()).log()     # 300 pixels for a factor of e
    return list(zip(x.tolist(), y.tolist()))

def draw_line(flops, losses, label, color):
    """A line with its label at the right end."""
    pixels = to_pixels(flops, losses)
    points = ' '.join('{:.1f},{:.1f}'.format(x, y) for x, y in pixels)
    x, y = pixels[-1]
    svg.append(LINE.format(points, color))
    svg.append(TEXT.format(x + 8, y + 4, color, label))

for i, n in enumerate(N.unique()): # for each size: the law as a line, its runs as circles
    color = f'hsl({80 * i}, 70%, 40%)'
    rows = N == n
    draw_line(flops[rows], fitted[rows], f'{n:,.0f} parameters', color)
    for x, y in to_pixels(flops[rows], L[rows]):
        svg.append(CIRCLE.format(x, y, color))
draw_line(budgets, best_L, 'best size', 'black')
ticks = to_pixels(budgets, best_L) # the axes show the numbers of the printed table
for (x, y), C, loss in zip(ticks, budgets, best_L):
    svg.append(TEXT.format(x, 480, 'black', '%.0e' % C))
    svg.append(TEXT.format(10, y, 'black', '%.2f' % loss))
svg.append('</svg>')
write_text(f'{out_dir}/scaling.svg', '\n'.join(svg))
law = dict(E=E, A=A, B=B, a=a, b=b, points=points) # points: N, D, loss
write_text(f'{out_dir}/scaling.json', json.dumps(law, indent=1))
print0(f'wrote {out_dir}/scaling.svg and scaling.json')
