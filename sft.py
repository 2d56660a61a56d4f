"""
Stage 2: supervised fine-tuning (SFT). The objective is that of pretraining, but the data are
conversations, and the loss counts only the tokens that the assistant says. The result answers
questions instead of continuing text (Ouyang et al. 2022, step 1).

Reads   out_dir/base.pt, data_dir/chat_{train,val}.jsonl
Writes  out_dir/sft.pt, out_dir/sft.jsonl (the curve), out_dir/sft.resume.pt while it runs

on a laptop     $ python sft.py config/tiny.py           (on one GPU the same, or without a profile)
on 8 GPUs       $ torchrun --standalone --nproc_per_node=8 sft.py
on two nodes    with the flags that pretrain.py shows

Left out: packing several conversations into one row (attention would have to be blocked between
them). Instead, conversations of similar length share a batch.
"""
from configurator import configure # first: makes Ctrl-C one line, also while torch loads
import functools
import math
import os
import time
from dataclasses import asdict

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from model import (
    GPT,
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
    pad_right,
    print0,
    read_jsonl,
    save_checkpoint,
    save_resume,
    seed_step,
    set_state,
    setup,
    should_stop,
)

# -----------------------------------------------------------------------------
# settings
# data
data_dir = 'data/toytown'   # folder of the data
out_dir = 'out/toytown'     # folder of the checkpoints and logs
max_length = 0              # leave out examples with more tokens than this; 0 = block_size
# training
epochs = 3                  # passes over the training data
batch_size = 16             # examples in a micro-batch on each process; lower it to save memory
gradient_accumulation_steps = 1 # micro-batches in a step
dropout = 0.0               # share of the activations that is dropped while training
# optimizer
optimizer = 'adamw'         # adamw, or muon for the matrices in the blocks and adamw for the rest
learning_rate = 3e-5        # max learning rate
warmup_iters = 20           # steps of linear warm-up
weight_decay = 0.0          # weight decay of matrices; vectors do not decay
momentum = 0.95             # muon: momentum; 0.8 is better in a run of some hundred steps
beta1 = 0.9                 # adamw: decay rate of the first moment
beta2 = 0.95                # adamw: decay rate of the second moment
grad_clip = 1.0             # clip the gradient norm at this value; 0 = off
# evaluation and log
eval_interval = 100         # steps between evaluations
log_interval = 10           # steps between log lines
save_interval = 500         # steps between saves of the resume file
# system
device = 'auto'             # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'              # auto, float32, bfloat16 (and float16, in pretrain.py only)
compile = False             # use torch.compile: slow to start, then faster on a GPU
seed = 1337                 # seed of everything random
resume = True               # continue from the resume file if an interrupted run has left one
config = configure(globals())

for name in ('epochs', 'gradient_accumulation_steps',
             'batch_size', 'eval_interval', 'log_interval', 'save_interval'):
    assert config[name] > 0, f'{name} must be positive, not {config[name]}'
for name in ('learning_rate', 'warmup_iters', 'weight_decay', 'grad_clip'):
    assert config[name] >= 0, f'{name} must be at least 0, not {config[name]}'
for name in ('dropout', 'momentum', 'beta1', 'beta2'):
    assert 0 <= config[name] < 1, f'{name} must be at least 0 and below 1, not {config[name]}'

# -----------------------------------------------------------------------------
# device and model
run = setup(config)
ddp = run.world_size > 1
stage = 'sft'
ckpt_path = os.path.join(out_dir, 'base.pt')
ckpt = load_checkpoint(ckpt_path, ['base'], f'python pretrain.py --out_dir={out_dir}')
ckpt['model_args']['dropout'] = dropout
tok = Tokenizer(ckpt['tokenizer'])
raw_model = load_model(ckpt, run.device, GPT)
block_size = raw_model.config.block_size
max_length = min(max_length or block_size, block_size)
resume_path = os.path.join(out_dir, f'{stage}.resume.pt')
out_path = os.path.join(out_dir, f'{stage}.pt')

# -----------------------------------------------------------------------------
# data
def read_example(row):
    """
    A line of a chat file -> length, x, y. x: the tokens of the conversation. y: for each token the
    next one, or -1 where it is not learned: only what the assistant says is learned.
    """
    ids, mask = tok.render(row.get('messages'))
    x = ids[:-1]
    y = [token if learned else -1 for token, learned in zip(ids[1:], mask[1:])]
    return len(x), x, y

def load_examples(split):
    """All examples of the split that are not too long: a list of what read_example returns."""
    paths = [os.path.join(data_dir, f'chat_{split}.jsonl')]
    found = [path for path in paths if os.path.exists(path)]
    assert found, f'no {paths[-1]}: make it with `python prepare_data.py --data_dir={data_dir}`'
    examples = []
    n_too_long = 0
    for path in found:
        for line, row in read_jsonl(path):
            try:
                example = read_example(row)
            except (TypeError, ValueError) as e:
                raise AssertionError(f'{path}:{line}: {e}') from None
            if example[0] > max_length:
                n_too_long += 1
            else:
                examples.append(example)

    if n_too_long:
        print0(f'{split}: left out {n_too_long} of {n_too_long + len(examples)} examples, too long')
    assert examples, (f'{path}: no example fits into {max_length} tokens: '
                      'add shorter ones, or pretrain with a larger --block_size')
    return examples

train = load_examples('train')
val = load_examples('val')
step_size = batch_size * gradient_accumulation_steps * run.world_size # examples in a step
assert len(train) >= step_size, (
    f'{len(train)} examples do not fill one step of {step_size} (batch_size {batch_size} x '
    f'accumulation {gradient_accumulation_steps} x {run.world_size} processes): '
    f'--gradient_accumulation_steps=1 --batch_size={max(1, len(train) // run.world_size)}')
steps_per_epoch = len(train) // step_size
max_iters = epochs * steps_per_epoch
print0(f'data: {len(train):,} examples, {len(val):,} for validation; {step_size} a step, '
       f'{steps_per_epoch:,} steps an epoch, {max_iters:,} steps')

first_chat = '' # shows at a glance whether the mask is right
for token, target in zip(train[0][1][1:] + [tok.end], train[0][2]): # x lacks the last <|end|>
    text = tok.decode([token])
    first_chat += text if target == -1 else f'[{text}]'
print0('the first conversation, [what is learned]:', first_chat)

def to_batch(examples):
    """Examples -> x, y (B, T), padded on the right: causal attention never looks at pads there."""
    x = pad_right([x for _, x, _ in examples], tok.pad, run.device)
    y = pad_right([y for _, _, y in examples], -1, run.device)
    return x, y

@functools.lru_cache(maxsize=1)
def get_order(epoch):
    """A seeded shuffle, the same on all ranks -> (steps_per_epoch, step_size), indices of train."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(train))[:steps_per_epoch * step_size]
    # similar lengths share a step, so that little is padded: sort within pools of 16 steps
    pool_size = 16 * step_size
    by_length = []
    for first in range(0, len(order), pool_size):
        pool = order[first:first + pool_size]
        by_length += sorted(pool, key=lambda j: train[j][0])
    order = np.array(by_length).reshape(steps_per_epoch, step_size)
    return rng.permutation(order) # shuffles the rows, which are the steps

def get_batches(step):
    """The micro-batches of this process in this step; they depend on (seed, step, rank) only."""
    order = get_order(step // steps_per_epoch)[step % steps_per_epoch]
    mine = order[run.rank::run.world_size]
    batches = []
    for first in range(0, len(mine), batch_size):
        examples = [train[j] for j in mine[first:first + batch_size]]
        batches.append(to_batch(examples))
    return batches

# -----------------------------------------------------------------------------
# optimizer, and the state of an interrupted run
optimizers = make_optimizers(raw_model, learning_rate, weight_decay, (beta1, beta2),
                             kind=optimizer, momentum=momentum)
config['starts_from'] = ckpt['metrics'].get('seconds') # its run time identifies the checkpoint
first_step = 0
progress = dict(ema_loss=0.0, seconds=0.0, n_tokens=0)
saved = load_resume(resume_path, config, resume)
if saved:
    set_state(raw_model, optimizers, saved['state'])
    first_step = saved['step']
    progress = saved['progress']
model = torch.compile(raw_model) if compile else raw_model
if ddp: # averages the gradients over all ranks; raw_model is the same without this wrapper
    model = DDP(model, device_ids=[run.device.index] if run.device_type == 'cuda' else None)

# -----------------------------------------------------------------------------
# evaluation and learning rate
@torch.no_grad()
def evaluate():
    """val_loss: mean loss on the validation data, in nats per token."""
    raw_model.eval()
    nats = 0.0
    n_tokens = 0
    for first in range(run.rank * batch_size, len(val), run.world_size * batch_size):
        x, y = to_batch(val[first:first + batch_size])
        with run.autocast():
            logits = raw_model(x).float().flatten(0, 1) # (B T, V)
        loss = F.cross_entropy(logits, y.flatten(), ignore_index=-1, reduction='sum')
        nats += loss.item()
        n_tokens += (y != -1).sum().item()
    raw_model.train()
    nats, n_tokens = all_sum(nats, n_tokens)
    return dict(val_loss=nats / n_tokens)

def get_lr(step):
    """Linear warm-up, then linear decay to 0."""
    warmup = (step + 1) / (warmup_iters + 1)
    decay = (max_iters - step) / max(1, max_iters - warmup_iters)
    return learning_rate * min(warmup, decay)

# -----------------------------------------------------------------------------
# the loop
log = open_log(os.path.join(out_dir, f'{stage}.jsonl'), first_step)
catch_signals(run)
ema_loss = progress['ema_loss'] # running mean of the loss, for the log lines
n_tokens = progress['n_tokens'] # read so far
started = time.time() - progress['seconds'] # as if the run had never been interrupted
t0 = time.time()
for step in range(first_step, max_iters + 1):
    # evaluate: all ranks take part
    if step % eval_interval == 0 or step == max_iters:
        val_metrics = evaluate()
        val_text = ' | '.join(f'{name} {value:.4f}' for name, value in val_metrics.items())
        print0(f'step {step:6d} | {val_text}')
        log(step=step, **val_metrics)
    if step == max_iters:
        break

    # save, and leave after Ctrl-C or SIGTERM
    leave = should_stop(run)
    if step > first_step and (leave or step % save_interval == 0):
        progress.update(ema_loss=ema_loss, seconds=time.time() - started, n_tokens=n_tokens)
        state = get_state(raw_model, optimizers)
        save_resume(resume_path, step, state, config, **progress)
    assert not leave, f'stopped at step {step} and saved: the same command continues from there'

    # The loss is a sum over the tokens to learn (or pairs), divided by n_valid, their number in all
    # micro-batches and ranks. A mean of means would give some tokens more weight than others.
    t1 = time.time()
    seed_step(seed, step, run.rank)
    batches = get_batches(step)
    n_valid = 0
    n_seen = 0
    for x, y in batches:
        n_valid += (y != -1).sum().item()
        n_seen += x.numel()
    n_valid, n_seen = all_sum(n_valid, n_seen)
    n_tokens += n_seen

    # forward and backward
    lossf = 0.0 # loss of this step, as a float
    for micro, (x, y) in enumerate(batches):
        if ddp: # exchange gradients only once, with the last micro-batch
            model.require_backward_grad_sync = micro == len(batches) - 1
        with run.autocast():
            logits = model(x).float().flatten(0, 1) # (B T, V)
        loss = F.cross_entropy(logits, y.flatten(), ignore_index=-1, reduction='sum')
        loss = loss / max(1, n_valid)
        (loss * run.world_size).backward() # DDP averages over ranks; we need the sum
        lossf += loss.item()
    lossf = all_sum(lossf)[0]

    # clip; one step with a gradient that is not finite would ruin the weights
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    norm = norm.item()
    assert math.isfinite(norm), (
        f'step {step}: loss {lossf}, gradient norm {norm}: lower --learning_rate and use '
        f'--resume=false, which discards {resume_path}, the last good state')

    # update
    lr = get_lr(step)
    for opt in optimizers:
        for group in opt.param_groups:
            group['lr'] = lr
        opt.step()
    raw_model.zero_grad(set_to_none=True)

    # log
    ema_loss = 0.9 * ema_loss + 0.1 * lossf
    if step % log_interval == 0 or step == max_iters - 1:
        dt = time.time() - t1
        left = (time.time() - t0) / (step + 1 - first_step) * (max_iters - step - 1)
        smooth_loss = ema_loss / (1 - 0.9 ** (step + 1)) # corrects the start at 0, as Adam does
        print0(f'step {step:6d} | loss {smooth_loss:.4f} | lr {lr:.2e} | norm {norm:.3f} | '
               f'{n_seen / dt:,.0f} tok/s | '
               f'{(step + 1) / max_iters:.0%}, {left / 60:.1f} min left')
        log(step=step, loss=lossf, lr=lr, norm=norm,
            tokens_per_second=n_seen / dt)

# -----------------------------------------------------------------------------
# save
seconds = time.time() - started
weights = raw_model.state_dict()
if run.master:
    mean_length = n_tokens / max(1, max_iters * step_size)
    flops = raw_model.flops_per_token(mean_length) * n_tokens
    metrics = dict(val_metrics, seconds=seconds, tokens=n_tokens, flops=flops)
    save_checkpoint(out_path, stage, weights, asdict(raw_model.config), tok,
                    config, max_iters, metrics)
    print(f'saved {out_path}: {val_text}, {seconds:.0f} s')
cleanup(run)
