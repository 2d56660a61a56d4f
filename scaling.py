"""
Measure a scaling law. Train a grid of small models for different numbers of steps and fit

    L(N, D) = E + A / N^a + B / D^b        N parameters, D tokens (Hoffmann et al. 2022, approach 3)

E is the loss that no model can avoid, A / N^a the price of a small model, B / D^b that of a short
run. The law tells how to spend a budget of C = 6 N D FLOPs: on more parameters or on more tokens.

on Toytown      $ python scaling.py                (about 17 minutes on two CPU cores)
on other data   $ python scaling.py --data_dir=data/shakespeare
a whole profile $ python scaling.py config/d20.py --estimate=8xH100    (memory, hours, dollars)

Reads   data_dir/train_*.bin, val_*.bin, tokenizer.json
Writes  out_dir/scaling.svg, scaling.json, a folder for each run (a finished one is not repeated)

N leaves embeddings out (Kaplan et al. 2020): they are most of such a small model. Each run has its
own schedule: half-way, a long run has a higher loss than a run of half the length at its end.
"""
from configurator import configure # first: makes Ctrl-C one line, also while torch loads
import collections
import copy
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from model import GPT, GPTConfig, ScalarModel, Tokenizer, load_checkpoint, print0, write_text

# -----------------------------------------------------------------------------
# settings
data_dir = 'data/toytown'      # folder of the token shards
out_dir = 'out/scaling'        # folder of the runs, the fit and the drawing
widths = (32, 48, 64, 96)      # n_embd of the models; heads are 16 wide
steps = (391, 781, 1562, 2344) # steps of the runs, of 1,024 tokens each
seed = 1337                    # seed of the weights and of the order of the data
# instead of training
estimate = ''                  # print what a profile needs on these GPUs, such as 8xH100, and stop
config = configure(globals())

# -----------------------------------------------------------------------------
# --estimate: what every stage of a profile needs, without running it. First the assumptions, then
# memory, time and data, then the stages in their order, and the table.
GPUS = { # FLOP/s in bf16, bytes of memory, bytes/s of its bus (data sheets); dollars an hour, about
    'H100': (989e12, 84.9e9, 3.35e12, 3.0), # sold as 80 GB, which are 79.1 times 2^30 bytes
    'H200': (989e12, 150e9, 4.8e12, 3.5),
    'A100': (312e12, 85.1e9, 2.0e12, 1.8),
    '4090': (165e12, 25.3e9, 1.0e12, 0.4)}
USABLE = 0.92        # share of the memory; CUDA and the gaps between tensors take the rest
MFU = {True: 0.4, False: 0.2} # share of the FLOP/s in training, with torch.compile and without
BUS_SHARE = 0.18     # share of the bus in sampling
CORES = 13           # CPU cores that are rented with each GPU
DOWNLOAD = 100e6     # bytes/s
CLEAN = 0.7e6        # prepare_data.py: bytes of text/s on each core
READ = 60e6          # tokenizer.py: bytes of text/s. One core reads them, the others are faster
KEPT = 0.7           # share of the text that the filters keep
PACKED = 0.4         # bytes of .jsonl.gz for a byte of text
TOKEN_BYTES = 4.5    # bytes of text in a token
N_ANSWERS = 4        # answers in a ranking
EXAM_TOKENS = 2400   # to ask a question: four choices, with examples before each

def read_stage(name):
    """The settings of another script -> a namespace, as this command line makes them."""
    words = sys.argv
    sys.argv = [word for word in words if not word.startswith('--')] # those are for scaling.py
    script = Path(__file__).resolve().parent / f'{name}.py'
    settings = configure({'__file__': str(script)}, quiet=True)
    sys.argv = words
    return SimpleNamespace(**settings)

def read_config(name):
    path = Path(__file__).resolve().parent / 'config' / name
    return json.loads(path.read_text(encoding='utf-8'))

# memory
class Autocast(TorchFunctionMode):
    """
    Gives tensors on the meta device the types that they have on a GPU under autocast, and lists
    what a model multiplies. On the meta device tensors have shapes, but take no memory.
    """

    def __init__(self):
        super().__init__()
        self.weights = []   # matrices in bf16
        self.products = []  # what matrix products read and write
        self.attention = [] # what the fused kernel of attention reads and writes

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            q, k, v = [x.to(torch.bfloat16) for x in args]
            y = torch.empty_like(q)
            self.attention += [q, k, v, y]
            return y
        if function is F.linear:
            x, *weights = [x if x is None else x.to(torch.bfloat16) for x in args]
            y = function(x, *weights)
            self.weights.append(weights[0])
            self.products += [x, y]
            return y
        if function in (F.layer_norm, F.rms_norm):
            args = (args[0].float(), *args[1:])
        y = function(*args, **(kwargs or {}))
        return y.to(torch.bfloat16) if function is F.embedding else y

@functools.cache
def count_activations(gpt, n_tokens, compiled):
    """
    Bytes that a row of n_tokens keeps between the forward and the backward pass, without logits.
    torch.compile keeps what is multiplied, and computes the rest again. Without it, autograd keeps
    what every operation needs.
    """
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    x = torch.zeros(1, n_tokens, dtype=torch.long, device='meta')
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Autocast() as mode:
        mode.products.append(gpt.hidden(x).to(torch.bfloat16)) # the output matrix reads it
    kept = mode.attention + (mode.products if compiled else saved)
    weights = [*gpt.parameters(), *gpt.buffers(), *mode.weights]
    seen = {weight.untyped_storage()._cdata for weight in weights}
    n_bytes = 0
    for tensor in kept:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen: # views share a storage
            seen.add(storage._cdata)
            n_bytes += storage.nbytes()
    return n_bytes

def n_multiplied(gpt):
    """Parameters of matrix products: without embeddings, which are looked up."""
    output = 0 if gpt.head is None else gpt.head.weight.numel()
    return gpt.n_params(embedding=False) + output

def cache_bytes(gpt):
    """Bytes of the keys and values of a token, in bf16."""
    c = gpt.config
    return 2 * 2 * c.n_layer * c.n_kv_head * c.n_embd // c.n_head

def new_stage(settings, trained, **more):
    """What memory() must know about a stage -> a namespace. trained: models on the meta device."""
    stage = SimpleNamespace(
        trained=trained, optimizer=getattr(settings, 'optimizer', 'adamw'),
        parallel=getattr(settings, 'parallel', 'ddp'), compiled=getattr(settings, 'compile', False),
        size=settings.batch_size, size_name='batch_size', # of a micro-batch: examples
        rows=1,                # rows of an example
        length=block_size,     # tokens of a row ...
        n_logits=block_size,   # ... of which so many get logits
        frozen=[],             # models that are not trained
        whole=False,           # fsdp: is there a whole copy, which samples and evaluates?
        sampled=0)             # answers that are sampled at a time
    total = getattr(settings, 'total_batch_size', 0) or stage.size * n_gpus
    stage.share = total // n_gpus # examples of each process in a step
    vars(stage).update(more)
    return stage

def memory(stage, size):
    """What takes memory on each GPU, with micro-batches of this size -> {what: bytes}."""
    fsdp = n_gpus > 1 and stage.parallel == 'fsdp'
    n_shards = n_gpus if fsdp else 1
    gpt = stage.trained[0]
    vocab_size = gpt.config.vocab_size
    n_trained = sum(model.n_params() for model in stage.trained)
    n_frozen = sum(model.n_params() for model in stage.frozen)
    parts = {'weights': 4 * n_trained / n_shards, 'frozen models': 2 * n_frozen} # these in bf16
    if fsdp: # the embeddings and two blocks are whole, and the gradient of one of these
        block = sum(p.numel() for p in gpt.blocks[0].parameters())
        outer = gpt.n_params() - block * len(gpt.blocks)
        parts['gathered layers'] = 2 * (outer + 2 * block) + 4 * max(outer, block)
        if stage.whole:
            parts['a whole copy'] = 4 * gpt.n_params()
    else:
        parts['weights in bf16'] = 2 * sum(n_multiplied(model) for model in stage.trained)
    if stage.optimizer:
        n_moments = 2 * n_trained # AdamW keeps two numbers for each parameter, Muon one
        if stage.optimizer == 'muon':
            n_moments -= sum(p.numel() for p in gpt.blocks.parameters() if p.dim() > 1)
        parts[stage.optimizer] = 4 * n_moments / n_shards
        if size < stage.share: # micro-batches are added up. fsdp divides the sum, not the parts
            parts['gradients'] = 4 * n_trained # otherwise they come while activations go
        if n_gpus > 1 and not fsdp:
            parts["ddp's copy of the gradients"] = 4 * n_trained

    # now it learns, or it samples
    n_rows = size * stage.rows
    logit_bytes = 4 if stage.compiled else 12 # with gradients, in bf16; in fp32, also logarithms
    learning = {'logits': n_rows * stage.n_logits * vocab_size * logit_bytes, 'activations': 0}
    if stage.optimizer:
        for model in stage.trained:
            row_bytes = count_activations(model, stage.length, stage.compiled)
            learning['activations'] += n_rows * row_bytes
    sampling = {'keys and values': stage.sampled * gpt.config.block_size * cache_bytes(gpt)}
    sampling['logits'] = stage.sampled * vocab_size * 22 # in bf16 and fp32, and two in fp64
    parts.update(max(learning, sampling, key=lambda work: sum(work.values())))
    return {what: n_bytes for what, n_bytes in parts.items() if n_bytes}

def get_verdict(stage):
    """Does the stage fit? If not, which micro-batch does?"""
    for size in range(stage.size, 0, -1):
        if size < stage.size and stage.share % size > 0: # a step has only whole micro-batches
            continue
        if sum(memory(stage, size).values()) < USABLE * gpu_bytes:
            if size == stage.size:
                return 'it fits'
            return f'it does NOT fit: --{stage.size_name}={size} fits'
    for sampled in range(stage.sampled - 1, 0, -1):
        fewer = copy.copy(stage)
        fewer.sampled = sampled
        if sum(memory(fewer, 1).values()) < USABLE * gpu_bytes:
            return f'it does NOT fit: a GPU can sample only {sampled} answers at a time'
    if stage.parallel == 'ddp' and stage.optimizer and n_gpus > 1:
        return 'it does NOT fit: use --parallel=fsdp'
    return 'it does NOT fit: use larger GPUs, or more of them with --parallel=fsdp'

# time
def learn_seconds(flops, stage):
    return flops / (n_gpus * gpu_flops * MFU[stage.compiled])

def sample_seconds(gpt, n_answers, n_prompt, n_new):
    """A GPU samples n_answers of n_new tokens. A step reads the weights, all keys and values."""
    n_read = 2 * n_multiplied(gpt) + n_answers * cache_bytes(gpt) * (n_prompt + n_new / 2)
    return n_new * n_read / (gpu_bus * BUS_SHARE)

# data
def measure_data(prepare):
    """What prepare_data.py will have -> a Counter: bytes of each kind and its rows, and more."""
    found = collections.Counter()
    sources = read_config('sources.json')
    for name in prepare.source.split(','):
        if name == 'files':
            continue
        assert name in sources, f'source {name!r} is not in config/sources.json'
        entry = sources[name]
        n_files = 1 # an entry tells the size of one file of a series, or else of all its files
        for first, last in re.findall(r'{(\d+)\.\.(\d+)}', ' '.join(entry['urls'])):
            n_files = min(prepare.n_files, int(last) - int(first) + 1)
        if name == 'commoncrawl': # its URL is that of a list
            n_files = prepare.n_files
        found['download'] += n_files * entry['bytes']
        for kind in entry['kind'].split(', '):
            size = entry['bytes'] if kind == 'tokens' else entry['text_bytes']
            found[kind] += n_files * size
            found[f'{kind} rows'] += n_files * entry['rows']
    # RLHF answers the prompts of rankings, too. Counted with their answers, they are a bit long.
    found['prompts'] += found['preferences']
    found['prompts rows'] += found['preferences rows']
    for kind in ('chat', 'preferences', 'prompts'): # what has been made is known exactly
        path = Path(prepare.data_dir, f'{kind}_train.jsonl')
        if path.exists():
            found[kind] = path.stat().st_size
            found[f'{kind} rows'] = path.read_bytes().count(b'\n')
    return found

if estimate:
    count, _, gpu = estimate.rpartition('x')
    assert count.isdigit() and int(count) > 0 and gpu in GPUS, (
        f'estimate must be a number of GPUs and their kind, such as 8xH100, not {estimate!r}; '
        f'known kinds: {", ".join(GPUS)}')
    n_gpus = int(count)
    gpu_flops, gpu_bytes, gpu_bus, gpu_dollars = GPUS[gpu]
    names = ('prepare_data', 'tokenizer', 'pretrain', 'sft', 'reward', 'rlhf', 'eval')
    prepare, tokenizer, pretrain, sft, reward, rlhf, exam = map(read_stage, names)
    data = measure_data(prepare)
    text = KEPT * data['text']
    n_corpus = data['tokens'] / 2 + text / TOKEN_BYTES
    table = [] # rows: name, tokens, seconds, bytes on the disk, bytes to download, stage

    # the model: that of the settings, or of the checkpoint from which the profile starts
    names = [field.name for field in fields(GPTConfig)]
    shape = {name: value for name, value in vars(pretrain).items() if name in names}
    shape['vocab_size'] = 50304 if tokenizer.kind == 'gpt2' else tokenizer.vocab_size
    tok_path = Path(prepare.data_dir, 'tokenizer.json')
    if tok_path.exists():
        shape['vocab_size'] = Tokenizer.load(tok_path).n_vocab
    if sft.init_from:
        shape = load_checkpoint(sft.init_from, ['base'], 'python convert.py')['model_args']
    with torch.device('meta'):
        gpt = GPT(GPTConfig(**shape))
        scorer = ScalarModel(GPTConfig(**shape)).body # its own head is only one row
    block_size = gpt.config.block_size
    n_params = gpt.n_params()
    flops_per_token = gpt.flops_per_token(block_size)
    weights = 4 * n_params # bytes of a checkpoint

    # data and tokenizer use no GPU, but the CPU cores that come with the GPUs
    download = data['download']
    seconds = download / DOWNLOAD + data['text'] / (CLEAN * CORES * n_gpus)
    table.append(('data', n_corpus, seconds, download + PACKED * text, download, None))
    seconds = (text + tokenizer.train_chars) / READ
    table.append(('tokenizer', n_corpus, seconds, 2 * text / TOKEN_BYTES, 0, None))

    # base model and mid-training
    if not sft.init_from:
        stage = new_stage(pretrain, [gpt])
        n_windows = pretrain.total_batch_size or stage.size * n_gpus # in a step
        n_wanted = pretrain.tokens_per_param * n_params
        n_steps = pretrain.max_iters or math.ceil(n_wanted / n_windows / block_size)
        n_tokens = n_steps * n_windows * block_size
        seconds = learn_seconds(n_tokens * flops_per_token, stage)
        table.append(('base', n_tokens, seconds, weights, 0, stage))
    if tokenizer.mid_chats:
        n_tokens = tokenizer.mid_chats * data['chat'] / TOKEN_BYTES + tokenizer.mid_text * n_corpus
        n_tokens *= pretrain.mid_epochs
        stage = new_stage(pretrain, [gpt])
        seconds = learn_seconds(n_tokens * flops_per_token, stage)
        table.append(('mid', n_tokens, seconds, weights, 0, stage))

    if data['chat rows']:
        length = min(sft.max_length or block_size, block_size)
        stage = new_stage(sft, [gpt], length=length, n_logits=length, whole=True)
        n_tokens = sft.epochs * data['chat'] / TOKEN_BYTES / (1 - sft.replay)
        seconds = learn_seconds(n_tokens * flops_per_token, stage)
        table.append(('sft', n_tokens, seconds, weights, 0, stage))

    # reward model; or DPO, for which the SFT model reads all rankings, too
    if data['preferences rows']:
        length = min(reward.max_length or block_size, block_size)
        stage = new_stage(reward, [scorer], length=length, n_logits=0, rows=N_ANSWERS, whole=True)
        n_tokens = reward.epochs * reward.share * data['preferences'] / TOKEN_BYTES
        seconds = learn_seconds(n_tokens * flops_per_token, stage)
        if reward.objective == 'dpo':
            vars(stage).update(trained=[gpt], frozen=[gpt], n_logits=length)
            seconds *= 4 / 3
        table.append((reward.objective, n_tokens, seconds, weights, 0, stage))

    # RLHF: hours for prompts of the mean length, memory for those that fill the context
    n_prompt = 0
    if data['prompts rows']:
        has_critic = rlhf.algo == 'ppo' and rlhf.critic == 'separate'
        trained = [gpt, scorer] if has_critic else [gpt]
        frozen = [gpt] if rlhf.reward == 'checks' else [gpt, scorer]
        answers = max(1, rlhf.batch_size // n_gpus)   # of each process in an update ...
        share = max(1, rlhf.minibatch_size // n_gpus) # ... and in a step
        stage = new_stage(rlhf, trained, frozen=frozen, n_logits=rlhf.max_new_tokens, whole=True,
                          share=share, sampled=answers)
        stage.size = min(rlhf.micro_batch_size, share)
        stage.size_name = 'micro_batch_size'
        n_prompt = data['prompts'] / data['prompts rows'] / TOKEN_BYTES
        n_tokens = rlhf.max_iters * rlhf.batch_size * (n_prompt + rlhf.max_new_tokens)
        passes = (len(trained) + len(frozen)) / 3 + len(trained) * rlhf.ppo_epochs
        seconds = learn_seconds(passes * n_tokens * flops_per_token, stage)
        seconds += rlhf.max_iters * sample_seconds(gpt, answers, n_prompt, rlhf.max_new_tokens)
        table.append(('rlhf', n_tokens, seconds, weights, 0, stage))

    # the examination of every language model
    stage = new_stage(exam, [gpt], optimizer='', sampled=exam.sample_batch)
    n_models = sum(name in ('base', 'mid', 'sft', 'dpo', 'rlhf') for name, *_ in table)
    n_tokens = exam.val_tokens
    if data['benchmarks']:
        limit = exam.limit or 1000
        n_tokens += limit * len(read_config('benchmarks.json')) * EXAM_TOKENS
    n_tokens *= n_models
    seconds = learn_seconds(n_tokens / 3 * flops_per_token, stage) # no backward pass
    n_batches = n_models * exam.n_prompts / exam.sample_batch / n_gpus
    seconds += n_batches * sample_seconds(gpt, exam.sample_batch, n_prompt, exam.max_new_tokens)
    table.append(('eval', n_tokens, seconds, 0, 0, stage))

    # the table
    heading = 'stage          tokens  GB a GPU    hours  dollars   disk GB  download GB'
    row_format = '{:10}{:>11}{:>10}{:9.2f}{:9,.0f}{:10.1f}{:13.1f}  {}'
    per_hour = n_gpus * gpu_dollars

    def print_row(name, tokens, used, seconds, on_disk, download, verdict):
        hours = seconds / 3600
        row = row_format.format(name, tokens, used, hours, hours * per_hour, on_disk / 1e9,
                                download / 1e9, verdict)
        print0(row.rstrip())

    n_inner = gpt.n_params(embedding=False)
    print0(f'{gpt.config.arch}, {n_params:,} parameters ({n_inner:,} without embeddings), '
           f'{flops_per_token:.3e} FLOPs a token')
    print0(f'{n_gpus} {gpu} of {gpu_bytes / 1e9:.0f} GB, {gpu_dollars} dollars an hour each')
    print0(heading)
    details = []
    largest = 0 # parameters in a resume file
    for name, n_tokens, *costs, stage in table:
        used = ''
        verdict = ''
        if stage:
            parts = memory(stage, stage.size)
            used = '{:.1f}'.format(sum(parts.values()) / 1e9)
            verdict = get_verdict(stage)
            texts = ['{} {:.1f}'.format(what, n_bytes / 1e9) for what, n_bytes in parts.items()]
            details.append(f'  {name}: ' + ', '.join(texts))
            n_trained = sum(model.n_params() for model in stage.trained)
            largest = max(largest, n_trained)
        print_row(name, '{:,.0f}M'.format(n_tokens / 1e6), used, *costs, verdict)
    seconds, on_disk, download = [sum(row[i] for row in table) for i in (2, 3, 4)]
    on_disk += 2 * 12 * largest # two files with weights and both moments, in fp32
    print_row('total', '', '', seconds, on_disk, download, '')
    n_base = sum(row[1] for row in table if row[0] == 'base')
    if n_base > n_corpus > 0:
        print0(f'base reads its text {n_base / n_corpus:.1f} times: raise n_files, or add sources')

    print0('\nGB on each GPU:', *details, sep='\n')
    without_gpu = (table[0][2] + table[1][2]) / 3600
    to_copy = 2 * n_corpus + data['chat'] + data['preferences'] + data['prompts']
    print0('data and tokenizer need no GPU: another machine saves {:,.0f} dollars; then copy its\n'
           'data_dir without train/ and val/, {:.1f} GB.'.format(without_gpu * per_hour,
                                                                to_copy / 1e9))
    print0('Memory is for rows that fill the context, hours are for mean lengths. The total of the '
           'disk\nincludes two resume files of the largest stage: one is written before one goes.')
    print0(f'Assumed: {MFU[True]:.0%} of the peak FLOP/s with torch.compile (44 to 47% measured on '
           f'one H100), {MFU[False]:.0%}\nwithout (22% measured), sampling at {BUS_SHARE:.0%} of '
           f'the memory bus (measured), {CORES} CPU cores with each GPU,\n{CLEAN / 1e6} MB of '
           f'text/s cleaned by each (measured), {KEPT:.0%} of it kept, {TOKEN_BYTES} bytes in a '
           f'token, {DOWNLOAD / 1e6:.0f} MB/s of downloads.')
    raise SystemExit

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
