"""
Stage 1: pretraining. The model learns the language, and the facts in the documents, by predicting
each next token. This takes most of the compute of the recipe. The result is a base model: it
continues documents, it does not answer questions.

Mid-training (optional) does the same once more: it starts from the base model and makes one pass
over conversations and some documents, with lower learning rates. The model meets the form of the
conversations, and more of them than SFT needs (Hu et al. 2024: the best data belongs at the end).

Reads   data_dir/train_*.bin, data_dir/val_*.bin, data_dir/tokenizer.json
Writes  out_dir/base.pt, out_dir/base.jsonl (the curve), out_dir/base.resume.pt while it runs
With --stage=mid it reads out_dir/base.pt and mid_{train,val}_*.bin, and writes out_dir/mid.* alike.

on a laptop     $ python pretrain.py config/tiny.py
mid-training    $ python pretrain.py config/tiny.py config/midtrain.py --stage=mid
on one GPU      $ python pretrain.py config/gpt2.py
on 8 GPUs       $ torchrun --standalone --nproc_per_node=8 pretrain.py config/gpt2.py
on two nodes    $ torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 \
                      pretrain.py config/gpt2.py             (on the other node: --node_rank=1)

Without a profile, the settings are those of GPT-2 124M: 600,000 steps of 12,288 tokens, far too
many for a CPU or a small corpus. The length is printed first, the time left on each log line.
Left out: a curriculum (easy text first); a mask between documents. Windows are cut from one long
stream, so attention crosses from one document into the next; <|endoftext|> tells where they meet.
"""
from configurator import configure # first, so that Ctrl-C gives no traceback while torch loads
import functools
import glob
import math
import os
import time
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from model import (
    GPT,
    GPTConfig,
    Tokenizer,
    all_sum,
    catch_signals,
    cleanup,
    get_state,
    load_checkpoint,
    load_model,
    load_resume,
    make_optimizers,
    open_log,
    print0,
    read_shard,
    save_checkpoint,
    save_resume,
    seed_step,
    set_state,
    setup,
    shard,
    should_stop,
)

# -----------------------------------------------------------------------------
# settings
# data
data_dir = 'data/toytown'   # folder of the data
out_dir = 'out/toytown'     # folder of the checkpoints and logs
stage = 'base'              # base: pretraining; mid: mid-training
init_from = ''              # start from this checkpoint (.pt) and its model, not the one below
# model
arch = 'gpt2'               # gpt2 (LayerNorm, learned positions, GELU) or llama (RMSNorm, rotary)
n_layer = 12                # number of blocks
n_head = 12                 # attention heads in a block
n_kv_head = 0               # heads of keys and values (grouped-query attention); 0 = n_head
n_embd = 768                # width of the embeddings and of the residual stream
n_hidden = 0                # MLP width; 0 = 4 (gpt2) or 8/3 (llama) n_embd, rounded up to 32s
block_size = 1024           # maximum context length, in tokens
tie_embeddings = True       # share one matrix between the input and the output embedding
qk_norm = False             # RMSNorm on queries and keys: allows higher learning rates
key_shift = False           # half of the key heads get the key of the token before (small models)
# training
max_iters = 600000          # steps; 0 = as many as tokens_per_param asks for
tokens_per_param = 20.0     # if max_iters = 0: tokens per parameter (Hoffmann et al. 2022)
mid_epochs = 1              # mid: passes over the data; they decide the number of steps
batch_size = 12             # examples in a micro-batch on each process; lower it to save memory
total_batch_size = 0        # examples in a step, all processes; 0 = one micro-batch on each process
dropout = 0.1               # share of the activations that is dropped while training
# optimizer
optimizer = 'adamw'         # adamw, or muon for the matrices in the blocks and adamw for the rest
learning_rate = 3e-4        # max learning rate
min_lr = 3e-5               # learning rate at the end of the cosine
warmup_iters = 2000         # steps of linear warm-up
mid_lr_scale = 0.3          # mid: learning_rate and min_lr times this, without warm-up
weight_decay = 0.1          # weight decay of matrices; vectors do not decay
momentum = 0.95             # muon: momentum; 0.8 is better in a run of some hundred steps
beta1 = 0.9                 # adamw: decay rate of the first moment
beta2 = 0.95                # adamw: decay rate of the second moment
grad_clip = 1.0             # clip the gradient norm at this value; 0 = off
# evaluation and log
eval_interval = 2000        # steps between evaluations
eval_iters = 200            # micro-batches of validation data in an evaluation, over all processes
log_interval = 10           # steps between log lines
save_interval = 2000        # steps between saves of the resume file
# instead of training
sanity = False              # learn one batch by heart: proves that data, model and optimizer work
# system
parallel = 'ddp'            # several processes: ddp, fsdp (large models), pipeline (slow networks)
device = 'auto'             # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'              # auto, float32, bfloat16 (and float16, in pretrain.py only)
compile = False             # use torch.compile: slow to start, then faster on a GPU
seed = 1337                 # seed of everything random
resume = True               # continue from the resume file if an interrupted run has left one
config = configure(globals())

for name in ('eval_iters', 'batch_size', 'eval_interval', 'log_interval', 'save_interval',
             'mid_epochs', 'mid_lr_scale'):
    assert config[name] > 0, f'{name} must be positive, not {config[name]}'
for name in ('max_iters', 'total_batch_size', 'min_lr',
             'learning_rate', 'warmup_iters', 'weight_decay', 'grad_clip'):
    assert config[name] >= 0, f'{name} must be at least 0, not {config[name]}'
for name in ('dropout', 'momentum', 'beta1', 'beta2'):
    assert 0 <= config[name] < 1, f'{name} must be at least 0 and below 1, not {config[name]}'
assert max_iters or tokens_per_param > 0, '--max_iters=0 needs a positive --tokens_per_param'
assert stage in ('base', 'mid'), f"stage must be 'base' or 'mid', not {stage!r}"
assert parallel in ('ddp', 'fsdp', 'pipeline'), (
    f"parallel must be 'ddp', 'fsdp' or 'pipeline', not {parallel!r}")

tok_path = os.path.join(data_dir, 'tokenizer.json')
tok = Tokenizer.load(tok_path)
vocab_size = tok.n_vocab
config.update(vocab_size=vocab_size, tokenizer=tok.hash) # a resumed run must have the same
gpt_config = GPTConfig(
    arch=arch, vocab_size=vocab_size, block_size=block_size, n_layer=n_layer, n_head=n_head,
    n_kv_head=n_kv_head, n_embd=n_embd, n_hidden=n_hidden, dropout=dropout,
    tie_embeddings=tie_embeddings, qk_norm=qk_norm, key_shift=key_shift)

# -----------------------------------------------------------------------------
# device and data
run = setup(config, allow_fp16=True)
ddp = run.world_size > 1 and parallel == 'ddp'
fsdp = run.world_size > 1 and parallel == 'fsdp'
pipeline = run.world_size > 1 and parallel == 'pipeline'
assert not (fsdp and optimizer == 'muon'), 'fsdp cuts matrices, muon needs whole ones: use adamw'
assert run.dtype != torch.float16 or parallel == 'ddp', 'float16 works with --parallel=ddp only'
prefix = '' # of the token shards
if stage == 'mid':
    prefix = 'mid_'
    init_from = init_from or os.path.join(out_dir, 'base.pt')
    learning_rate *= mid_lr_scale
    min_lr *= mid_lr_scale
    warmup_iters = 0
else: # base: it does not use these, so a resumed run may change them
    del config['mid_epochs'], config['mid_lr_scale']
if sanity: # the same loop on one batch, with settings that suit it
    stage = 'sanity'
    max_iters = save_interval = 301 # it saves nothing, unless it is interrupted
    warmup_iters = 20
    min_lr = learning_rate
    gpt_config.dropout = 0.0
resume_path = os.path.join(out_dir, f'{stage}.resume.pt')
out_path = os.path.join(out_dir, f'{stage}.pt')

shards = {} # split -> token shards
window_ends = {} # split -> for each shard the number of windows up to its end
for split in ('train', 'val'):
    paths = sorted(glob.glob(os.path.join(glob.escape(data_dir), f'{prefix}{split}_*.bin')))
    remedy = f'python tokenizer.py --data_dir={data_dir}' + (' --mid_chats=1' if prefix else '')
    assert paths, f'no {data_dir}/{prefix}{split}_*.bin: run `{remedy}`'
    shards[split] = [read_shard(path, tok.hash) for path in paths]
    window_ends[split] = np.cumsum([max(0, len(t) - 1) // block_size for t in shards[split]])
    n_tokens = sum(len(tokens) for tokens in shards[split])
    assert window_ends[split][-1] > 0, (
        f'{data_dir} has {n_tokens:,} {split} tokens, fewer than one window of block_size '
        f'{block_size} + 1: add text, or --block_size={max(1, n_tokens // 2)}')
n_train = int(window_ends['train'][-1]) # windows in an epoch
token_bytes = torch.tensor([len(tok.token_bytes(i)) for i in range(vocab_size)], device=run.device)

# data-parallel ranks get different examples; all stages of a pipeline work on the same ones
dp_rank = 0 if pipeline else run.rank
dp_world = 1 if pipeline else run.world_size
total_batch_size = total_batch_size or batch_size * run.world_size
config['total_batch_size'] = total_batch_size # decides the order of the data, batch_size does not
per_pass = batch_size * dp_world # examples in a micro-batch, all processes
gradient_accumulation_steps = total_batch_size // per_pass
nearest = max(1, round(total_batch_size / per_pass)) * per_pass
assert total_batch_size == nearest, (
    f'total_batch_size {total_batch_size} is not a multiple of batch_size {batch_size} x '
    f'{dp_world} processes: --total_batch_size={nearest}')
tokens_per_step = total_batch_size * block_size

def get_windows(split, index):
    """Windows with these numbers -> x, y (B, T); y is x one token later."""
    rows = []
    for i in index:
        k = int(np.searchsorted(window_ends[split], i, side='right')) # number of the shard
        windows_before = window_ends[split][k - 1] if k > 0 else 0
        first = (i - windows_before) * block_size
        rows.append(shards[split][k][first:first + block_size + 1].astype(np.int64))
    rows = torch.from_numpy(np.stack(rows)) # (B, T + 1)
    assert rows.max() < vocab_size, (
        f'token {rows.max()} is not in the vocabulary of {vocab_size}: run tokenizer.py again')
    if run.device_type == 'cuda':
        rows = rows.pin_memory() # lets the copy run while the GPU computes
    rows = rows.to(run.device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]

@functools.lru_cache(maxsize=2) # a step may begin in one epoch and end in the next
def get_order(epoch):
    """A seeded shuffle of the training windows, the same on all ranks."""
    return np.random.default_rng((seed, epoch)).permutation(n_train)

def get_batches(step):
    """The micro-batches of this process in this step; they depend on (seed, step, rank) only."""
    batches = []
    for micro in range(gradient_accumulation_steps):
        first = step * total_batch_size + (micro * dp_world + dp_rank) * batch_size
        numbers = range(first, first + batch_size) # of examples, counted from the start of the run
        index = [int(get_order(i // n_train)[i % n_train]) for i in numbers]
        batches.append(get_windows('train', index))
    return batches

# -----------------------------------------------------------------------------
# model
if init_from:
    ckpt = load_checkpoint(init_from, ['base', 'mid', 'sft', 'dpo', 'rlhf'], 'python pretrain.py')
    config['starts_from'] = ckpt['metrics'].get('seconds') # its run time identifies the checkpoint
    model_args = ckpt['model_args']
    assert Tokenizer(ckpt['tokenizer']).hash == tok.hash, (
        f'{init_from} has another tokenizer than {tok_path}: encode the data with its own, '
        f'`python tokenizer.py --data_dir={data_dir} --use=ITS_TOKENIZER.json`')
    assert block_size <= model_args['block_size'], (
        f'{init_from} has a context of {model_args["block_size"]} tokens, not {block_size}: '
        f'--block_size={model_args["block_size"]}')
    model_args.update(block_size=block_size, dropout=gpt_config.dropout)
    if 'wpe.weight' in ckpt['weights']: # learned positions: keep those within block_size
        ckpt['weights']['wpe.weight'] = ckpt['weights']['wpe.weight'][:block_size]
    raw_model = load_model(ckpt, run.device)
else:
    raw_model = GPT(gpt_config).to(run.device)
n_params = raw_model.n_params()
flops_per_token = raw_model.flops_per_token(block_size)
max_iters = max_iters or math.ceil(tokens_per_param * n_params / tokens_per_step)
if stage == 'mid':
    max_iters = math.ceil(mid_epochs * n_train / total_batch_size)
n_epochs = max_iters * total_batch_size / n_train
print0(f'model: {raw_model.config.arch}, {n_params:,} parameters '
       f'({raw_model.n_params(embedding=False):,} without embeddings), block_size {block_size}; '
       f'a uniform guess has loss ln({vocab_size}) = {math.log(vocab_size):.4f}')
n_total = max_iters * tokens_per_step
print0(f'length: {max_iters:,} steps of {tokens_per_step:,} tokens = {n_total:,} tokens, '
       f'{n_total / n_params:.1f} a parameter, {n_epochs:,.1f} epochs of {n_train:,} windows')
if n_epochs > 100:
    print0('a small corpus for such a long run: lower --max_iters, or start with config/tiny.py')

# -----------------------------------------------------------------------------
# only for parallel='pipeline': each process holds some of the layers
if pipeline: # importing these takes seconds
    from torch.distributed.checkpoint import state_dict as dcp
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

class Pipeline(torch.nn.Module):
    """
    One stage of a GPT: the first takes ids, the last returns logits, the others pass (B, T, C) on.
    Micro-batches follow one another through the stages, forward and backward in turn ("1F1B",
    Narayanan et al. 2019). Little is sent between processes, so a slow network is enough.
    """

    def __init__(self, gpt):
        super().__init__()
        n_layer = len(gpt.blocks)
        assert run.world_size <= min(n_layer, gradient_accumulation_steps), (
            f'a pipeline of {run.world_size} processes needs as many layers and micro-batches, not '
            f'{n_layer} and {gradient_accumulation_steps}: lower --nproc_per_node, or use '
            f'--total_batch_size={run.world_size * batch_size}')
        self.gpt = gpt
        self.is_first = run.rank == 0
        self.is_last = run.rank == run.world_size - 1
        self.tied = gpt.config.tie_embeddings

        # remove what the other stages hold; what remains keeps its name
        first = n_layer * run.rank // run.world_size
        end = n_layer * (run.rank + 1) // run.world_size
        for i in range(n_layer):
            if not first <= i < end:
                gpt.blocks[i] = None
        if not self.is_first:
            gpt.wpe = None
        if not self.is_last:
            gpt.norm = gpt.head = None
        if not (self.is_first or (self.is_last and self.tied)): # tied: both ends hold it
            gpt.wte = None
        self.ends = dist.new_group([0, run.world_size - 1]) # the first and the last process
        own_stage = PipelineStage(self, run.rank, run.world_size, run.device)
        self.schedule = Schedule1F1B(own_stage, gradient_accumulation_steps, self.get_loss,
                                     scale_grads=False) # get_loss divides already

    def forward(self, x):
        pos = torch.arange(x.size(1), device=x.device)
        rope = self.gpt.rope(pos)
        if self.is_first:
            x = self.gpt.embed(x, pos) # (B, T) -> (B, T, C)
        for layer, block in enumerate(self.gpt.blocks):
            if block is not None:
                x = block(x, pos, rope, None, None, layer)
        if self.is_last:
            x = self.gpt.head(self.gpt.norm(x)) # (B, T, C) -> (B, T, V)
        return x

    def get_loss(self, logits, y):
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction='sum')
        return loss / tokens_per_step

    def forward_backward(self, batches):
        """Compute the gradients of a step. Returns its loss on the last process, 0 elsewhere."""
        losses = []
        with run.autocast():
            if self.is_first:
                self.schedule.step(torch.cat([x for x, _ in batches]))
            elif self.is_last:
                self.schedule.step(target=torch.cat([y for _, y in batches]), losses=losses)
            else:
                self.schedule.step()
        if self.tied and (self.is_first or self.is_last): # the copies get the sum of both gradients
            dist.all_reduce(self.gpt.wte.weight.grad, group=self.ends)
        return sum(loss.item() for loss in losses)

    def clip_grad_norm_(self, max_norm):
        """As torch.nn.utils.clip_grad_norm_, over the parameters of all stages."""
        square = 0.0
        for name, p in self.gpt.named_parameters():
            is_copy = self.is_last and name == 'wte.weight' # the first stage counts it
            square += 0.0 if is_copy else p.grad.double().square().sum().item()
        norm = torch.tensor(all_sum(square)[0] ** 0.5)
        torch.nn.utils.clip_grads_with_norm_(self.gpt.parameters(), max_norm, norm)
        return norm

    def logits(self, x):
        """x (B, T) -> logits (B, T, V) on the last process, None on the others."""
        if not self.is_first:
            x = torch.empty(*x.shape, self.gpt.config.n_embd, device=run.device)
            dist.recv(x, run.rank - 1)
        x = self(x)
        if self.is_last:
            return x
        dist.send(x.float(), run.rank + 1)
        return None

    def get_state(self, optimizers):
        """The same as model.get_state: the state of the whole model, on rank 0."""
        options = dcp.StateDictOptions(cpu_offload=True)
        part = dcp.get_state_dict(self.gpt, optimizers, options=options)
        parts = [None] * run.world_size if run.master else None
        dist.gather_object(part, parts)
        weights = {}
        moments = {}
        groups = []
        for stage_weights, optimizer_states in parts or []:
            weights.update(stage_weights)
            moments.update(optimizer_states.get('state', {}))
            groups += optimizer_states.get('param_groups', [])
        return dict(weights=weights, optimizers=dict(state=moments, param_groups=groups))

    def set_state(self, optimizers, state):
        """Take this stage's part of what get_state returned, here or in a run with ddp or fsdp."""
        dcp.set_state_dict(self.gpt, optimizers, model_state_dict=state['weights'],
                           optim_state_dict=state['optimizers'],
                           options=dcp.StateDictOptions(strict=False))

if pipeline:
    pipe = Pipeline(raw_model)

# -----------------------------------------------------------------------------
# symptoms of common mistakes: config/broken has an experiment for each
class Symptoms:
    """Watches the losses and the gradient norms, and prints warnings with a remedy."""

    def __init__(self):
        self.lowest_loss = math.inf # of the running mean of the training loss
        self.lowest_val = math.inf
        self.loss_then = math.inf # training loss when the validation loss was lowest
        self.n_clipped = 0 # steps in a row

    def after_evaluation(self, val_loss, smooth_loss):
        if val_loss > 1.03 * self.lowest_val and smooth_loss < self.loss_then:
            print0('warning: val_loss rises while the training loss falls: it memorises: '
                   f'add data, or lower --max_iters (now {n_epochs:.0f} epochs)')
        if val_loss < self.lowest_val:
            self.lowest_val = val_loss
            self.loss_then = smooth_loss

    def after_step(self, step, loss, smooth_loss, norm):
        uniform = math.log(vocab_size) # loss of a uniform guess
        is_late = step == warmup_iters + max(100, min(1000, max_iters // 2))
        if step == 0 and loss > 1.1 * uniform and not init_from:
            print0('warning: the first loss is above that of a uniform guess: lower the std in '
                   'init_weights of model.py')
        if is_late and smooth_loss > 0.62 * uniform and not init_from:
            print0('warning: the loss has hardly fallen: raise --learning_rate, or lower it if it '
                   'is far too high')
        self.lowest_loss = min(self.lowest_loss, smooth_loss)
        if smooth_loss > 1.1 * self.lowest_loss + 0.2: # more than the noise of small batches
            print0(f'warning: the loss has risen from {self.lowest_loss:.2f} to {smooth_loss:.2f}: '
                   'lower --learning_rate, or raise --warmup_iters')
            self.lowest_loss = smooth_loss # the next warning only if it rises further
        self.n_clipped += 1
        if step < warmup_iters or not grad_clip or norm < 2 * grad_clip:
            self.n_clipped = 0
        if self.n_clipped == 100:
            print0('warning: 100 gradients in a row had twice the norm that grad_clip allows: '
                   'raise --grad_clip, or change --learning_rate')

symptoms = Symptoms()

# -----------------------------------------------------------------------------
# optimizer, and the state of an interrupted run
if fsdp:
    shard(raw_model, run)
optimizers = make_optimizers(raw_model, learning_rate, weight_decay, (beta1, beta2),
                             kind=optimizer, momentum=momentum)
# fp16 has few exponent bits: scale the loss up, so that small gradients do not become 0
scaler = torch.amp.GradScaler(run.device_type, enabled=run.dtype == torch.float16)
first_step = 0
progress = dict(ema_loss=0.0, seconds=0.0, n_tokens=0)
saved = load_resume(resume_path, config, resume, may_change=['batch_size'])
if saved:
    if pipeline:
        pipe.set_state(optimizers, saved['state'])
    else:
        set_state(raw_model, optimizers, saved['state'])
    first_step = saved['step']
    progress = saved['progress']
    scaler.load_state_dict(progress['scaler'] or scaler.state_dict()) # {}: it did not run in fp16
model = torch.compile(raw_model) if compile and not pipeline else raw_model
if ddp: # averages the gradients over all ranks; raw_model is the same without this wrapper
    model = DDP(model, device_ids=[run.device.index] if run.device_type == 'cuda' else None)

# -----------------------------------------------------------------------------
# loss, evaluation and learning rate
def get_loss(logits, y):
    """Sum of the losses of the tokens to learn. logits (B, T, V); y (B, T), -1 = not learned."""
    logits = logits.float().flatten(0, 1) # (B T, V)
    return F.cross_entropy(logits, y.flatten(), ignore_index=-1, reduction='sum')

if compile: # the logits are the largest tensor: without their fp32 copies, less time and memory
    get_loss = torch.compile(get_loss)

@torch.no_grad()
def evaluate():
    """val_loss: mean, in nats per token. val_bpb: bits per byte, comparable across tokenizers."""
    raw_model.eval()
    nats = 0.0
    n_tokens = 0
    n_bytes = 0
    n_windows = min(int(window_ends['val'][-1]), eval_iters * batch_size)
    for start in range(0, n_windows, dp_world * batch_size):
        first = start + dp_rank * batch_size
        mine = range(first, min(n_windows, first + batch_size))
        # with fsdp every rank must take part in every forward pass, also when it has nothing left
        x, y = get_windows('val', mine or [0])
        with run.autocast():
            logits = pipe.logits(x) if pipeline else raw_model(x) # (B, T, V)
        if mine and logits is not None:
            nats += get_loss(logits, y).item()
            n_tokens += y.numel()
            n_bytes += token_bytes[y].sum().item()
    raw_model.train()
    nats, n_tokens, n_bytes = all_sum(nats, n_tokens, n_bytes)
    return dict(val_loss=nats / n_tokens, val_bpb=nats / math.log(2) / max(1, n_bytes))

def get_lr(step):
    """Linear warm-up, then cosine decay to min_lr."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    t = (step - warmup_iters) / max(1, max_iters - 1 - warmup_iters) # 0 .. 1
    return min_lr + 0.5 * (learning_rate - min_lr) * (1 + math.cos(math.pi * min(1.0, t)))

# -----------------------------------------------------------------------------
# the loop
log = open_log(os.path.join(out_dir, f'{stage}.jsonl'), first_step)
peak_flops = 0.0 # unknown
PEAK_FLOPS = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12, '4090': 165e12} # bf16, data sheets
if run.device_type == 'cuda':
    for gpu, flops in PEAK_FLOPS.items():
        if gpu in torch.cuda.get_device_name(run.device):
            peak_flops = flops
catch_signals(run)
ema_loss = progress['ema_loss'] # running mean of the loss, for the log lines
n_tokens = progress['n_tokens'] # read so far
smooth_loss = ema_loss / (1 - 0.9 ** max(1, first_step)) # ema_loss without its start at 0
started = time.time() - progress['seconds'] # as if the run had never been interrupted
t0 = time.time()
for step in range(first_step, max_iters + 1):
    # evaluate: all ranks take part
    if step % eval_interval == 0 or step == max_iters:
        val_metrics = evaluate()
        val_text = ' | '.join(f'{name} {value:.4f}' for name, value in val_metrics.items())
        print0(f'step {step:6d} | {val_text}')
        log(step=step, **val_metrics)
        symptoms.after_evaluation(val_metrics['val_loss'], smooth_loss)
    if step == max_iters:
        break

    # save, and leave after Ctrl-C or SIGTERM
    leave = should_stop(run)
    if step > first_step and (leave or step % save_interval == 0):
        progress.update(ema_loss=ema_loss, seconds=time.time() - started, n_tokens=n_tokens)
        progress['scaler'] = scaler.state_dict()
        state = pipe.get_state(optimizers) if pipeline else get_state(raw_model, optimizers)
        save_resume(resume_path, step, state, config, **progress)
    assert not leave, f'stopped at step {step} and saved: the same command continues from there'

    # The loss is a sum over the tokens to learn (or rankings), divided by n_valid, their number in
    # all micro-batches and ranks. A mean of means would give some tokens more weight than others.
    t1 = time.time()
    seed_step(seed, step, run.rank)
    batches = get_batches(0 if sanity else step)
    n_valid = tokens_per_step # all windows are full
    n_seen = tokens_per_step
    n_tokens += n_seen

    # forward and backward
    lossf = 0.0 # loss of this step, as a float
    if pipeline:
        lossf = pipe.forward_backward(batches)
        batches = [] # the loop below has nothing to do
    for micro, (x, y) in enumerate(batches):
        if fsdp: # reduce gradients only once, as ddp does below
            raw_model.set_requires_gradient_sync(micro == len(batches) - 1)
        if ddp: # exchange gradients only once, with the last micro-batch
            model.require_backward_grad_sync = micro == len(batches) - 1
        with run.autocast():
            logits = model(x)
        loss = get_loss(logits, y) / max(1, n_valid)
        scaler.scale(loss * run.world_size).backward() # ddp and fsdp average; we need the sum
        lossf += loss.detach() # .item() would wait for the GPU in each micro-batch
    lossf = all_sum(lossf)[0]
    if sanity and lossf < 0.1:
        break

    # clip; one step with a gradient that is not finite would ruin the weights
    if pipeline:
        norm = pipe.clip_grad_norm_(grad_clip or math.inf)
    else:
        for opt in optimizers:
            scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    if fsdp:
        norm = norm.full_tensor()
    norm = norm.item()
    overflow = scaler.get_scale() > 1 and not math.isfinite(norm)
    if overflow: # happens now and then in fp16
        print0(f'step {step}: fp16 overflow: step skipped, loss scale {scaler.get_scale()} halved')
    assert overflow or math.isfinite(norm), (
        f'step {step}: loss {lossf}, gradient norm {norm}: lower --learning_rate and use '
        f'--resume=false, which discards {resume_path}, the last good state')

    # update
    lr = get_lr(step)
    for opt in optimizers:
        for group in opt.param_groups:
            group['lr'] = lr
        scaler.step(opt) # opt.step(), except in fp16
    scaler.update()
    raw_model.zero_grad(set_to_none=True)

    # log
    ema_loss = 0.9 * ema_loss + 0.1 * lossf
    smooth_loss = ema_loss / (1 - 0.9 ** (step + 1)) # corrects the start at 0, as Adam does
    if step % log_interval == 0 or step == max_iters - 1:
        dt = time.time() - t1
        left = (time.time() - t0) / (step + 1 - first_step) * (max_iters - step - 1)
        speed = flops_per_token * n_seen / dt / run.world_size # FLOP/s of each process
        usage = f'{speed / peak_flops:.0%} MFU' if peak_flops else f'{speed:.1e} FLOP/s'
        print0(f'step {step:6d} | loss {smooth_loss:.4f} | lr {lr:.2e} | norm {norm:.3f} | '
               f'{n_seen / dt:,.0f} tok/s | {usage} | '
               f'{(step + 1) / max_iters:.0%}, {left / 60:.1f} min left')
        log(step=step, loss=lossf, lr=lr, norm=norm,
            tokens_per_second=n_seen / dt)

    symptoms.after_step(step, lossf, smooth_loss, norm)

# -----------------------------------------------------------------------------
# save
if sanity:
    assert lossf < 0.1, f'sanity: FAIL: loss {lossf:.3f} on one batch after {step} steps, not < 0.1'
    print0(f'sanity: pass: loss {lossf:.3f} on one batch after {step} steps')
    cleanup(run)
    raise SystemExit
seconds = time.time() - started
weights = raw_model.state_dict()
if pipeline:
    weights = pipe.get_state([])['weights']
if fsdp:
    weights = get_state(raw_model, [])['weights']
if run.master:
    flops = flops_per_token * n_tokens
    metrics = dict(val_metrics, seconds=seconds, tokens=n_tokens, flops=flops)
    save_checkpoint(out_path, stage, weights, asdict(raw_model.config), tok,
                    config, max_iters, metrics)
    print(f'saved {out_path}: {val_text}, {seconds:.0f} s')
cleanup(run)
