"""
Measure scaling laws. How low does the loss get with N parameters, D tokens, C FLOPs, and what is
the best size for a budget? Many small models are trained; two fits (Hoffmann et al. 2022) answer:

    IsoFLOP (approach 2)     equal C, several sizes: the losses lie on a parabola, its lowest point
                             is the best size; how does it grow from budget to budget?
    parametric (approach 3)  L(N, D) = E + A / N^a + B / D^b for all runs. E is what no model can
                             avoid, A / N^a the price of a small model, B / D^b of a short run.

The check: the largest run takes no part in the fits; the law must predict its loss.

the data   $ for script in toytown prepare_data tokenizer; do
                 python $script.py config/scaling.py
             done
the runs   $ python scaling.py config/scaling.py

Reads   data_dir/train_*.bin, val_*.bin, tokenizer.json
Writes  out_dir/scaling.svg, scaling.json, a folder for each run (a finished one is not repeated)

What would spoil the law: one learning rate for all widths, text that is read twice, FLOPs without
the head and attention (half of all in such small models), a run that stops before its schedule
ends (half-way, a long run has a higher loss than a run of half the length at its end).
"""
from configurator import configure # first: makes Ctrl-C one line, also while torch loads
import glob
import itertools
import json
import math
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from model import GPT, GPTConfig, Tokenizer, load_checkpoint, print0, read_shard, write_text

# -----------------------------------------------------------------------------
# settings
data_dir = 'data/toytown'      # folder of the token shards
out_dir = 'out/scaling'        # folder of the runs, the fits and the drawing
widths = (32, 40, 48, 64, 80)  # n_embd of the models; heads are 16 wide, or 20
budgets = (2.8e11, 5.6e11, 1.12e12) # FLOPs of a run; every width is trained with every budget
held_out = (48, 2.24e12)       # width and FLOPs of the run that no fit sees
sweep_widths = (32, 64, 96)    # widths for which learning rates are tried
sweep_rates = (0.01, 0.02, 0.04) # these learning rates
sweep_steps = 300              # steps of these runs
n_bootstrap = 300              # fits to resampled runs, for the intervals
seed = 1337                    # seed of the weights and of the order of the data
config = configure(globals())

# -----------------------------------------------------------------------------
# a run: pretrain.py with config/scaling.py and some flags
HERE = Path(__file__).resolve().parent
PROFILE = HERE / 'config/scaling.py'
shared = runpy.run_path(str(PROFILE))['pretrain'] # settings of all runs
block_size = shared['block_size']
tokens_per_step = shared['batch_size'] * block_size
tok = Tokenizer.load(f'{data_dir}/tokenizer.json')

def model_size(width):
    """Parameters with embeddings, and the FLOPs to learn a token, head and attention included."""
    with torch.device('meta'): # tensors without memory
        gpt = GPT(GPTConfig(arch=shared['arch'], vocab_size=tok.n_vocab, block_size=block_size,
                            n_layer=shared['n_layer'], n_embd=width, n_head=1)) # any n_head will do
    return gpt.n_params(), gpt.flops_per_token(block_size)

def steps_for(width, flops):
    """The number of steps that a budget of FLOPs pays for."""
    _, flops_per_token = model_size(width)
    return round(flops / flops_per_token / tokens_per_step)

ROW = ('{width} wide, {N:,.0f} parameters, {D:,.0f} tokens, {C:.2e} FLOPs, learning rate '
       '{learning_rate}, seed {seed}: loss {loss:.4f}')

def train(width, n_steps, learning_rate, run_seed):
    """Train one model, unless this run has finished before. Returns what ROW prints."""
    folder = f'{out_dir}/width{width}_steps{n_steps}_rate{learning_rate}_seed{run_seed}'
    flags = dict(data_dir=data_dir, out_dir=folder, n_embd=width, n_head=width // 16,
                 max_iters=n_steps, learning_rate=learning_rate, seed=run_seed)
    settings = json.dumps([flags, shared], sort_keys=True)
    finished = Path(folder, 'finished.txt') # holds the settings of the finished run
    if not finished.exists() or finished.read_text(encoding='utf-8') != settings:
        command = [sys.executable, HERE / 'pretrain.py', PROFILE]
        for name, value in flags.items():
            command.append(f'--{name}={value}')
        env = dict(os.environ, OMP_NUM_THREADS='1')
        run = subprocess.run(command, capture_output=True, encoding='utf-8', env=env)
        assert run.returncode == 0, f'{folder}: {run.stderr.strip()}'
        write_text(finished, settings)

    ckpt = load_checkpoint(f'{folder}/base.pt', ['base'], f'rm -r {folder}')
    metrics = ckpt['metrics']
    n_params, _ = model_size(width)
    return dict(width=width, learning_rate=learning_rate, seed=run_seed, N=n_params,
                D=metrics['tokens'], C=metrics['flops'], loss=metrics['val_loss'])

def train_all(runs):
    """One run on each core, the longest first. runs: arguments of `train`. Returns its results."""
    runs = sorted(runs, key=lambda run: run[1], reverse=True) # so that no core waits at the end
    pool = ThreadPoolExecutor(os.cpu_count())
    rows = []
    try:
        for row in pool.map(train, *zip(*runs)):
            print0(ROW.format(**row))
            rows.append(row)
    finally:
        pool.shutdown(cancel_futures=True) # after an error, start no more runs
    return rows

longest_of_grid = steps_for(min(widths), max(budgets))
longest = max(longest_of_grid, steps_for(*held_out))
n_needed = longest * tokens_per_step
n_train = 0
for path in glob.glob(f'{glob.escape(data_dir)}/train_*.bin'):
    n_train += len(read_shard(path, tok.hash))
assert n_needed < 0.98 * n_train, (
    f'{data_dir} has {n_train:,} tokens, the longest run needs {n_needed:,}, and text that is read '
    'twice bends the law: make more (see `python scaling.py --help`), or lower --budgets')

# -----------------------------------------------------------------------------
# 1. A learning rate for each width. Near the best one, the loss is a parabola of x = ln(rate). Its
# lowest point moves with the width:  loss = bend x^2 + (s + t ln width) x + height of this width
def column(rows, name):
    return np.array([row[name] for row in rows])

sweep = train_all(itertools.product(sweep_widths, [sweep_steps], sweep_rates, [seed]))
x = np.log(column(sweep, 'learning_rate'))
width = column(sweep, 'width')
columns = [x * x, x, x * np.log(width)]
for each in sweep_widths: # 1 in the rows of this width, 0 in the others
    columns.append(width == each)
equations = np.stack(columns, axis=1) # (rows, columns)
factors, *_ = np.linalg.lstsq(equations, column(sweep, 'loss'))
bend, s, t, *sweep_heights = factors.tolist()
assert bend > 0, 'no learning rate of the sweep is the best: try others with --sweep_rates'

def best_rate(width):
    """The lowest point, where the slope  2 bend x + s + t ln width  is 0."""
    x = -(s + t * math.log(width)) / (2 * bend)
    return float('%.3g' % math.exp(x))

rates = {width: best_rate(width) for width in widths}
power = -t / (2 * bend)
print0('learning rates: {}, they grow as width^{:.2f}'.format(rates, power))

# -----------------------------------------------------------------------------
# 2. The grid: every width with every budget. A second seed at the corners measures the noise.
def plan(width, flops, run_seed):
    return width, steps_for(width, flops), best_rate(width), run_seed

grid = [plan(*held_out, seed)]
for width, budget in itertools.product(widths, budgets):
    grid.append(plan(width, budget, seed))
for width, budget in itertools.product({widths[0], widths[-1]}, {budgets[0], budgets[-1]}):
    grid.append(plan(width, budget, seed + 1))
runs = train_all(grid)
runs.sort(key=lambda row: (row['C'], row['seed']))
largest = runs.pop() # held out: no fit sees it

squares = []
for first, second in itertools.pairwise(runs):
    if first['C'] == second['C']:
        squares.append((first['loss'] - second['loss']) ** 2)
noise = math.sqrt(np.mean(squares) / 2) # a difference has the noise of two runs
runs.sort(key=lambda row: (row['N'], -row['seed']))
print0('noise: between two seeds, the loss has a standard deviation of %.4f' % noise)

# -----------------------------------------------------------------------------
# 3. IsoFLOP: for each budget, loss = bend x^2 + slope x + height with x = ln N. Each row of
# `losses` is fitted: first the real losses, then losses with noise, for the intervals.
def interval(values):
    """The middle 95% of the values: [low, high]."""
    return np.quantile(values, [0.025, 0.975]).tolist()

rng = np.random.default_rng(seed)
parabolas = [] # for each budget: its runs, the parabola
best_sizes = [] # for each budget: ln N
for budget in budgets:
    rows = []
    for row in runs:
        if 0.9 < row['C'] / budget < 1.1: # steps are whole numbers
            rows.append(row)
    size = 1 + n_bootstrap, len(rows)
    losses = rng.normal(0, noise, size)
    losses[0] = 0
    losses += column(rows, 'loss')
    x = np.log(column(rows, 'N'))
    factors = np.polyfit(x, losses.T, 2) # (3, fits)
    parabolas.append((rows, np.poly1d(factors[:, 0])))
    bends, slopes, _ = factors
    lowest = -slopes / (2 * bends)
    best_sizes.append(lowest)
    best, *others = np.exp(lowest)
    print0('{:.2e} FLOPs: best with {:,.0f} parameters ({:,.0f} to {:,.0f})'.format(
        budget, best, *interval(others)))
best_sizes = np.stack(best_sizes) # (budgets, fits)
powers, _ = np.polyfit(np.log(budgets), best_sizes, 1)
isoflop, *others = powers.tolist()
isoflop_interval = interval(others)
print0('IsoFLOP: the best N grows as C^{:.2f} ({:.2f} to {:.2f})'.format(
    isoflop, *isoflop_interval))

# -----------------------------------------------------------------------------
# 4. The parametric fit. With a and b given, the law is linear in E, A and B: least squares finds
# them. So all pairs of exponents are tried, which cannot end in a local minimum.
EXPONENTS = torch.arange(0.1, 1.51, 0.02, dtype=torch.float64)
PAIRS = torch.cartesian_prod(EXPONENTS, EXPONENTS)               # (pairs, 2)

def fit_law(N, D, L):
    """The law with the least squared relative error: E, A, B, a, b. N, D, L: tensors (runs,)"""
    a = PAIRS[:, :1]                                             # (pairs, 1)
    b = PAIRS[:, 1:]
    columns = [torch.ones(len(PAIRS), len(N)), N ** -a, D ** -b] # (pairs, runs) each
    terms = torch.stack(columns, dim=2) / L[:, None]             # (pairs, runs, 3)
    target = torch.ones_like(terms[:, :, :1])                    # L / L
    factors = torch.linalg.lstsq(terms, target).solution         # (pairs, 3, 1)
    errors = (terms @ factors - target).square().sum(dim=(1, 2)) # (pairs,)
    lowest = factors[:, 1:].amin(dim=(1, 2)) # of A and B; E may have any sign
    errors[lowest < 0] = math.inf # a larger model or a longer run would be worse
    best = errors.argmin()
    assert errors[best] < math.inf, 'the loss rises with N or D: more --budgets, or --sweep_rates'
    return [*factors[best, :, 0].tolist(), *PAIRS[best].tolist()]

def predict(law, row):
    E, A, B, a, b = law
    return E + A / row['N'] ** a + B / row['D'] ** b

columns = [column(runs, name) for name in ('N', 'D', 'loss')]
data = torch.tensor(np.stack(columns)) # (3, runs)
law = fit_law(*data)
resampled_laws = [] # of as many runs, drawn with replacement
for _ in range(n_bootstrap):
    picked = rng.integers(len(runs), size=len(runs))
    resampled_laws.append(fit_law(*data[:, picked]))
law_intervals = {}
for name, value, *others in zip('EABab', law, *resampled_laws):
    law_intervals[name] = interval(others)
    print0('L = E + A / N^a + B / D^b: {} = {:.4g} ({:.4g} to {:.4g})'.format(
        name, value, *law_intervals[name]))
errors = [abs(predict(law, row) / row['loss'] - 1) for row in runs]
print0('the law is off by at most {:.1%}'.format(max(errors)))

# the check: the run that took no part
predicted = predict(law, largest)
low, high = interval([predict(each, largest) for each in resampled_laws])
error = predicted / largest['loss'] - 1
print0('held out: ' + ROW.format(**largest))
print0('predicted: {:.4f} ({:.4f} to {:.4f}), an error of {:+.1%}'.format(
    predicted, low, high, error))

# -----------------------------------------------------------------------------
# 5. Training longer beats bigger? The middle width against the widest, with equal FLOPs
longer = []
bigger = []
middle = sorted(widths)[len(widths) // 2]
for rows, _ in parabolas:
    by_width = {row['width']: row for row in rows} # of two seeds, the first comes last
    longer.append(by_width[middle])
    bigger.append(by_width[max(widths)])
    print0('longer: ' + ROW.format(**longer[-1]))
    print0('bigger: ' + ROW.format(**bigger[-1]))

# -----------------------------------------------------------------------------
# the drawing: four panels
RED, BLUE, *_ = COLORS = ['#c0392b', '#2471a3', '#1e8449', '#b9770e', '#6c3483']
LINE = '<polyline points="{}" stroke="{}" fill="none"/>'
CIRCLE = '<circle cx="{:.1f}" cy="{:.1f}" r="4" fill="{}"/>'
svg = ['<svg xmlns="http://www.w3.org/2000/svg" width="960" height="760" font-size="12" '
       'font-family="sans-serif">', '<rect width="960" height="760" fill="white"/>']

def write(x, y, color, text):
    svg.append('<text x="{:.0f}" y="{:.0f}" fill="{}">{}</text>'.format(x, y, color, text))

def draw_panel(left, bottom, title, lines):
    """
    Loss against something. lines: (kind, x, loss, color, label at the end); the kinds are 'dots'
    and 'line', x and loss arrays. The x axis is logarithmic.
    """
    write(left - 40, bottom - 300, 'black', title)
    _, all_x, all_loss, *_ = zip(*lines)
    all_x = np.log(np.concatenate(all_x))
    all_loss = np.concatenate(all_loss)
    x_low = all_x.min()
    loss_low = all_loss.min()
    width = np.ptp(all_x)
    height = np.ptp(all_loss)

    def place(x, loss):
        """Values -> pixels."""
        across = (np.log(x) - x_low) / width
        up = np.subtract(loss, loss_low) / height
        return left + 310 * across, bottom - 270 * up

    for share in (0, 0.25, 0.5, 0.75, 1): # ticks
        x = math.exp(x_low + share * width)
        loss = loss_low + share * height
        across, up = place(x, loss)
        write(across - 15, bottom + 22, 'gray', '%.2g' % x)
        write(left - 40, up + 4, 'gray', '%.2f' % loss)
    for kind, x, loss, color, label in lines:
        pixels = list(zip(*place(x, loss)))
        if kind == 'line':
            points = ' '.join('%.1f,%.1f' % pixel for pixel in pixels)
            svg.append(LINE.format(points, color))
        else:
            for pixel in pixels:
                svg.append(CIRCLE.format(*pixel, color))
        across, up = pixels[-1]
        write(across + 8, up + 4, color, label)

def dots(rows, name, color):
    return 'dots', column(rows, name), column(rows, 'loss'), color, ''

def curve(parabola, low, high, color, label):
    x = np.geomspace(low, high)
    return 'line', x, parabola(np.log(x)), color, label

lines = []
for width, height, color in zip(sweep_widths, sweep_heights, COLORS):
    rows = [row for row in sweep if row['width'] == width]
    slope = s + t * math.log(width)
    parabola = np.poly1d([bend, slope, height])
    lines.append(dots(rows, 'learning_rate', color))
    lines.append(curve(parabola, min(sweep_rates), max(sweep_rates), color, f'{width} wide'))
draw_panel(50, 320, '1. Loss of short runs against the learning rate', lines)

lines = []
for budget, (rows, parabola), color in zip(budgets, parabolas, COLORS):
    lines.append(dots(rows, 'N', color))
    lines.append(curve(parabola, rows[0]['N'], rows[-1]['N'], color, f'{budget:.2g} FLOPs'))
draw_panel(530, 320, '2. IsoFLOP: loss against parameters, for equal FLOPs', lines)

limit, *_ = law # E
first = budgets[0]
last = largest['C']
lines = [
    dots(runs, 'C', BLUE),
    dots([largest], 'C', RED),
    ('line', [last, last], [low, high], RED, 'held out, and its predicted interval'),
    ('line', [first, 10 * last], [limit, limit], 'gray', 'E = %.2f' % limit),
]
draw_panel(50, 700, '3. The law: loss against FLOPs', lines)

lines = [
    dots(longer, 'C', BLUE),
    dots(bigger, 'C', RED),
    ('line', column(longer, 'C'), column(longer, 'loss'), BLUE, f'{middle} wide, longer'),
    ('line', column(bigger, 'C'), column(bigger, 'loss'), RED, f'{max(widths)} wide'),
]
draw_panel(530, 700, '4. Longer against bigger: loss against FLOPs', lines)
svg.append('</svg>')
write_text(f'{out_dir}/scaling.svg', '\n'.join(svg))

found = dict(
    sweep=sweep, learning_rates=rates, runs=runs, noise=noise, isoflop=isoflop,
    isoflop_interval=isoflop_interval, law=dict(zip('EABab', law)), law_intervals=law_intervals,
    held_out=dict(largest, predicted=predicted, interval=[low, high]))
write_text(f'{out_dir}/scaling.json', json.dumps(found, indent=1))
print0('wrote {0}/scaling.svg and scaling.json; the runs took {1:,.0f} CPU seconds'.format(
    out_dir, os.times().children_user))
