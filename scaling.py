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
a profile  $ python scaling.py config/d20.py --estimate=8xH100    (memory, hours, dollars)

Reads   data_dir/train_*.bin, val_*.bin, tokenizer.json
Writes  out_dir/scaling.svg, scaling.json, a folder for each run (a finished one is not repeated)

What would spoil the law: one learning rate for all widths, text that is read twice, FLOPs without
the head and attention (half of all in such small models), a run that stops before its schedule
ends (half-way, a long run has a higher loss than a run of half the length at its end).
"""
from configurator import configure, read_profile # first, so that Ctrl-C gives no traceback
import collections
import copy
import functools
import glob
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

import numpy as np
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from model import (
    GPT, GPTConfig, ScalarModel, Tokenizer, load_checkpoint, print0, read_shard, write_text)

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

HERE = Path(__file__).resolve().parent

def read_stage(name):
    """The settings of another script -> a namespace, as this command line makes them."""
    words = sys.argv
    sys.argv = [word for word in words if not word.startswith('--')] # those are for scaling.py
    settings = configure({'__file__': str(HERE / f'{name}.py')}, quiet=True)
    sys.argv = words
    return SimpleNamespace(**settings)

def read_config(name):
    return json.loads((HERE / 'config' / name).read_text(encoding='utf-8'))

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
        self.one = torch.ones((), dtype=torch.bfloat16, device='meta', requires_grad=True)

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
        if function is F.rms_norm: # the fused kernel keeps its input, as this product does
            return (args[0] * self.one).contiguous()
        if function is F.layer_norm:
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

def reading_bytes(config):
    """Bytes that a token takes in the MLP of a block, without gradients."""
    C, H = config.n_embd, config.n_hidden
    if config.arch == 'gpt2': # the sum of all blocks; its norm in fp32 and bf16; two of the MLP
        return 2 * C + 6 * C + 2 * 2 * H
    return 2 * C + 2 * C + 2 * 4 * H # the sum, its norm, gate and up, SiLU(gate), the product

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
        if n_gpus > 1 and not fsdp:
            parts["ddp's copy of the gradients"] = 4 * n_trained

    # now it learns, or it samples
    n_rows = size * stage.rows
    logit_bytes = 4 if stage.compiled else 12 # with gradients, in bf16; in fp32, also logarithms
    learning = {'logits': n_rows * stage.n_logits * vocab_size * logit_bytes, 'activations': 0}
    if stage.optimizer:
        if size < stage.share: # micro-batches are added up. fsdp divides the sum, not the parts
            learning['gradients'] = 4 * n_trained # otherwise they come while activations go
        for model in stage.trained:
            row_bytes = count_activations(model, stage.length, stage.compiled)
            learning['activations'] += n_rows * row_bytes
    n_tokens = stage.sampled * gpt.config.block_size
    cache = n_tokens * cache_bytes(gpt)
    # First the model reads all prompts at once. Later, when answers end, 3/4 of the keys are copied.
    reading = max(n_tokens * reading_bytes(gpt.config), 3 * cache // 8)
    sampling = {'keys and values': cache, 'reading the prompts': reading}
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
    for size in (stage.size, 1):
        for sampled in range(stage.sampled - 1, 0, -1):
            fewer = copy.copy(stage)
            fewer.sampled = sampled
            if sum(memory(fewer, size).values()) < USABLE * gpu_bytes:
                return (f'it does NOT fit: --sample_batch={sampled} and --{stage.size_name}={size} '
                        'fit')
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
                          share=share)
        stage.size = min(rlhf.micro_batch_size, share)
        stage.sampled = min(rlhf.sample_batch, answers)
        stage.size_name = 'micro_batch_size'
        n_prompt = data['prompts'] / data['prompts rows'] / TOKEN_BYTES
        n_tokens = rlhf.max_iters * rlhf.batch_size * (n_prompt + rlhf.max_new_tokens)
        passes = (len(trained) + len(frozen)) / 3 + len(trained) * rlhf.ppo_epochs
        seconds = learn_seconds(passes * n_tokens * flops_per_token, stage)
        n_batches = rlhf.max_iters * answers / stage.sampled
        seconds += n_batches * sample_seconds(gpt, stage.sampled, n_prompt, rlhf.max_new_tokens)
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
# a run: pretrain.py with config/scaling.py and some flags
PROFILE = HERE / 'config/scaling.py'
changes = read_profile(PROFILE, ['pretrain'])
shared = {name: value for _, stage, name, value in changes if stage == 'pretrain'} # of all runs
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
