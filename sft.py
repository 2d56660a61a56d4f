"""
Stage 2: supervised fine-tuning (SFT). The objective is that of pretraining, but the data are
conversations, and the loss counts only the tokens that the assistant says. The result answers
questions instead of continuing text (Ouyang et al. 2022, step 1).

Several conversations share a row of max_length tokens (packing), since most of them are short.
Attention is blocked between them, and positions start at 0 in each, so nothing changes for a
conversation but the speed. Some rows can hold pretraining text instead (replay), of which every
token is learned: then the model forgets less of what it knows. The trap: if only such rows reach
the positions far from the start, long conversations drift into documents there.

Reads   out_dir/mid.pt or base.pt, data_dir/chat_{train,val}.jsonl; prompts_val.jsonl, if there, to
        be answered at each evaluation; train_*.bin, if replay > 0
Writes  out_dir/sft.pt, out_dir/sft.jsonl (the curve), out_dir/sft.resume.pt while it runs

on a laptop     $ python sft.py config/tiny.py           (on one GPU the same, or without a profile)
on 8 GPUs       $ torchrun --standalone --nproc_per_node=8 sft.py
on two nodes    with the flags that pretrain.py shows
look at it      $ python sft.py config/tiny.py --show_batch=true     (what is learned, in brackets)

Left out: loss on what the user says, weights per conversation.
"""
from configurator import configure # first, so that Ctrl-C gives no traceback while torch loads
import copy
import functools
import glob
import math
import os
import sys
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
    gather,
    generate,
    get_state,
    grade,
    load_checkpoint,
    load_model,
    load_resume,
    make_optimizers,
    open_log,
    print0,
    read_jsonl,
    read_prompts,
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
init_from = ''              # the model to start from; empty = out_dir/mid.pt, else out_dir/base.pt
max_length = 0              # cut conversations after this number of tokens; 0 = block_size
replay = 0.0                # share of the rows that hold pretraining text instead
skip_bad = False            # leave out bad lines and count them, instead of stopping
show_batch = False          # print the first batch and stop
# training
epochs = 3                  # passes over the training data
batch_size = 16             # rows in a micro-batch on each process; lower it to save memory
total_batch_size = 0        # rows in a step, all processes; 0 = one micro-batch on each process
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
eval_prompts = 200          # validation prompts to answer in an evaluation; 0 = none
max_new_tokens = 64         # longest answer, in tokens
log_interval = 10           # steps between log lines
save_interval = 500         # steps between saves of the resume file
# system
parallel = 'ddp'            # several processes: ddp, or fsdp for large models
device = 'auto'             # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'              # auto, float32, bfloat16 (and float16, in pretrain.py only)
compile = False             # use torch.compile: slow to start, then faster on a GPU
seed = 1337                 # seed of everything random
resume = True               # continue from the resume file if an interrupted run has left one
config = configure(globals())

for name in ('epochs', 'max_new_tokens',
             'batch_size', 'eval_interval', 'log_interval', 'save_interval'):
    assert config[name] > 0, f'{name} must be positive, not {config[name]}'
for name in ('total_batch_size', 'eval_prompts',
             'learning_rate', 'warmup_iters', 'weight_decay', 'grad_clip'):
    assert config[name] >= 0, f'{name} must be at least 0, not {config[name]}'
for name in ('replay', 'dropout', 'momentum', 'beta1', 'beta2'):
    assert 0 <= config[name] < 1, f'{name} must be at least 0 and below 1, not {config[name]}'
assert parallel in ('ddp', 'fsdp'), f"parallel must be 'ddp' or 'fsdp', not {parallel!r}"

# -----------------------------------------------------------------------------
# device and model
run = setup(config)
ddp = run.world_size > 1 and parallel == 'ddp'
fsdp = run.world_size > 1 and parallel == 'fsdp'
assert not (fsdp and optimizer == 'muon'), 'fsdp cuts matrices, muon needs whole ones: use adamw'
stage = 'sft'
before = 'mid' if os.path.exists(os.path.join(out_dir, 'mid.pt')) else 'base'
ckpt_path = init_from or os.path.join(out_dir, f'{before}.pt')
ckpt = load_checkpoint(ckpt_path, ['base', 'mid'], f'python pretrain.py --out_dir={out_dir}')
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
    next one, or -1 where it is not learned: only what the assistant says is learned. A conversation
    that is too long is cut after the last answer that fits; without any, the length is too large.
    """
    ids, mask = tok.render(row.get('messages'))
    if len(ids) > max_length + 1: # + 1: the last token is only predicted
        answer_ends = [i for i in range(max_length + 1) if mask[i] and ids[i] == tok.end]
        if answer_ends:
            ids = ids[:answer_ends[-1] + 1]
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
    n_bad = 0
    for path in found:
        for line, row in read_jsonl(path):
            try:
                example = read_example(row)
            except (TypeError, ValueError) as e:
                assert skip_bad, f'{path}:{line}: {e}: mend it, or leave it out with --skip_bad=true'
                n_bad += 1
                continue
            if example[0] > max_length:
                n_too_long += 1
            else:
                examples.append(example)

    if n_too_long + n_bad:
        print0(f'{split}: left out {n_too_long} too long and {n_bad} bad of '
               f'{n_too_long + n_bad + len(examples)} examples')
    assert examples, (f'{path}: no example fits into {max_length} tokens: '
                      'add shorter ones, or pretrain with a larger --block_size')
    return examples

def load_replay(n_rows):
    """n_rows rows of max_length tokens of the pretraining text, each from a random shard."""
    paths = sorted(glob.glob(os.path.join(glob.escape(data_dir), 'train_*.bin')))
    assert paths, f'no {data_dir}/train_*.bin for replay: run tokenizer.py, or use --replay=0'
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(n_rows):
        tokens = read_shard(paths[rng.integers(len(paths))], tok.hash)
        n = min(max_length, len(tokens) - 1)
        first = rng.integers(len(tokens) - n)
        row = tokens[first:first + n + 1].tolist()
        examples.append((n, row[:-1], row[1:]))
    return examples

def pack(lengths, room):
    """
    Share out examples to rows: each one, the longest first, where the least room is left (best
    fit). Returns for each row the indices of its examples.
        pack([5, 3, 4, 2], room=7) -> [[0, 3], [2, 1]]
    """
    rows = []
    rows_by_room = [[] for _ in range(room + 1)] # rows_by_room[n]: rows with room for n tokens
    longest_first = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    for i in longest_first:
        left = lengths[i]
        while left < room and not rows_by_room[left]:
            left += 1
        if rows_by_room[left]:
            row = rows_by_room[left].pop()
        else:
            row = [] # a new row, so left is room
            rows.append(row)
        row.append(i)
        rows_by_room[left - lengths[i]].append(row)
    return rows

train = load_examples('train')
val = load_examples('val')
known = {tuple(x) for _, x, _ in train}
n_copies = sum(tuple(x) in known for _, x, _ in val)
if n_copies:
    print0(f'warning: {n_copies} of {len(val)} validation conversations are training data too')
n_chats = len(train)
train_rows = pack([n for n, _, _ in train], max_length)
val_rows = pack([n for n, _, _ in val], max_length)
n_tokens = sum(n for n, _, _ in train)
print0(f'packing: {n_chats:,} conversations in {len(train_rows):,} rows of {max_length} tokens, '
       f'{1 - n_tokens / (max_length * len(train_rows)):.0%} padding; one a row would be '
       f'{1 - n_tokens / (max_length * n_chats):.0%}')
n_replay = round(len(train_rows) * replay / (1 - replay))
if n_replay:
    train += load_replay(n_replay)
    train_rows += [[n_chats + i] for i in range(n_replay)]

total_batch_size = total_batch_size or batch_size * run.world_size
config['total_batch_size'] = total_batch_size # decides the order of the data, batch_size does not
per_pass = batch_size * run.world_size # examples in a micro-batch, all processes
nearest = max(1, round(total_batch_size / per_pass)) * per_pass
assert total_batch_size == nearest, (
    f'total_batch_size {total_batch_size} is not a multiple of batch_size {batch_size} x '
    f'{run.world_size} processes: --total_batch_size={nearest}')
assert len(train_rows) >= total_batch_size, (
    f'{len(train_rows)} rows do not fill one step of {total_batch_size}: '
    f'--total_batch_size=0 --batch_size={max(1, len(train_rows) // run.world_size)}')
steps_per_epoch = len(train_rows) // total_batch_size
max_iters = epochs * steps_per_epoch
print0(f'data: {n_chats:,} examples, {len(val):,} for validation; {total_batch_size} rows a step, '
       f'{steps_per_epoch:,} steps an epoch, {max_iters:,} steps')

def to_batch(examples, rows):
    """
    Rows of packed examples -> x, y, pos (B, T) and mask (B, T, T).
    pos: positions, which start at 0 in each example. mask: True where two tokens belong to the same
    example; the model combines it with the causal mask. y is -1 at the padding, on the right.
    """
    shape = (len(rows), max_length)
    x = torch.full(shape, tok.pad)
    y = torch.full(shape, -1)
    pos = torch.zeros(shape, dtype=torch.long)
    owner = torch.full(shape, -1) # which example a token belongs to
    for b, row in enumerate(rows):
        end = 0
        for i in row:
            length, x_i, y_i = examples[i]
            start = end
            end = start + length
            x[b, start:end] = torch.tensor(x_i)
            y[b, start:end] = torch.tensor(y_i)
            pos[b, start:end] = torch.arange(length)
            owner[b, start:end] = i
    owner = owner.to(run.device)
    mask = owner[:, :, None] == owner[:, None, :]        # (B, T, T)
    return x.to(run.device), y.to(run.device), pos.to(run.device), mask

def marked(row):
    """The text of a row, with brackets around what is learned; in a terminal it is green, too."""
    left, right = ('\033[32m[', ']\033[0m') if sys.stdout.isatty() else ('[', ']')
    text = ''
    for i in row:
        length, x, y = train[i]
        for token, target in zip(x[1:] + y[-1:], y): # the last token is only in y
            word = tok.decode([token])
            text += word if target == -1 else left + word + right
        text += '\n'
    return text

@functools.lru_cache(maxsize=1)
def get_order(epoch):
    """A seeded shuffle, the same on all ranks -> (steps_per_epoch, total_batch_size), of rows."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(train_rows))[:steps_per_epoch * total_batch_size]
    return order.reshape(steps_per_epoch, total_batch_size)

def get_batches(step):
    """The micro-batches of this process in this step; they depend on (seed, step, rank) only."""
    order = get_order(step // steps_per_epoch)[step % steps_per_epoch]
    mine = order[run.rank::run.world_size]
    batches = []
    for first in range(0, len(mine), batch_size):
        rows = [train_rows[j] for j in mine[first:first + batch_size]]
        batches.append(to_batch(train, rows))
    return batches

# prompts to answer: programs check the answers, so training must never read them
prompts = []
prompts_path = os.path.join(data_dir, 'prompts_val.jsonl')
if eval_prompts and os.path.exists(prompts_path):
    for row, ids in read_prompts(prompts_path, tok):
        if row.get('checks') and len(ids) + max_new_tokens <= block_size:
            prompts.append((row, ids))
    prompts = prompts[:eval_prompts]

if show_batch:
    for j in get_order(0)[0]:
        print0(marked(train_rows[j]))
    sys.exit()
print0('the first conversation, [what is learned]:', marked([0])) # is the mask right?

# -----------------------------------------------------------------------------
# optimizer, and the state of an interrupted run
whole = copy.deepcopy(raw_model) if fsdp else raw_model # evaluates without other processes
if fsdp:
    shard(raw_model, run)
optimizers = make_optimizers(raw_model, learning_rate, weight_decay, (beta1, beta2),
                             kind=optimizer, momentum=momentum)
config['starts_from'] = ckpt['metrics'].get('seconds') # its run time identifies the checkpoint
first_step = 0
progress = dict(ema_loss=0.0, seconds=0.0, n_tokens=0, best={})
saved = load_resume(resume_path, config, resume, may_change=['batch_size'])
if saved:
    set_state(raw_model, optimizers, saved['state'])
    first_step = saved['step']
    progress = saved['progress']
model = torch.compile(raw_model) if compile else raw_model
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

def answer_prompts():
    """Sample an answer to each validation prompt. Returns means over the answers, see evaluate."""
    mine = prompts[run.rank::run.world_size]
    seed_step(seed, 0, run.rank) # the same random numbers in each evaluation
    n_met = 0
    n_ended = 0
    n_tokens = 0
    for first in range(0, len(mine), 64):
        batch = mine[first:first + 64]
        with run.autocast():
            answers = generate(whole, [ids for _, ids in batch], max_new_tokens, tok.end)
        for (row, _), ids in zip(batch, answers):
            all_met, _ = grade(row['checks'], tok.decode_answer(ids))
            n_met += all_met
            n_ended += ids[-1] == tok.end
            n_tokens += len(ids)
    n, n_met, n_ended, n_tokens = all_sum(len(mine), n_met, n_ended, n_tokens)
    return dict(val_met=n_met / n, val_ended=n_ended / n, val_length=n_tokens / n)

@torch.no_grad()
def evaluate():
    """
    val_loss: mean loss on the validation data, in nats per token. Of sampled answers to validation
    prompts: val_met, share that meets all checks; val_ended, share that stops; val_length, tokens.
    """
    if fsdp:
        gather(raw_model, whole)
    whole.eval()
    nats = 0.0
    n_tokens = 0
    for first in range(run.rank * batch_size, len(val_rows), run.world_size * batch_size):
        x, y, pos, mask = to_batch(val, val_rows[first:first + batch_size])
        with run.autocast():
            logits = whole(x, pos, mask)
        nats += get_loss(logits, y).item()
        n_tokens += (y != -1).sum().item()
    nats, n_tokens = all_sum(nats, n_tokens)
    found = dict(val_loss=nats / n_tokens)
    if prompts:
        found.update(answer_prompts())
    whole.train()
    return found

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
best = progress['best'] # the evaluation with the lowest validation loss, and its weights
started = time.time() - progress['seconds'] # as if the run had never been interrupted
t0 = time.time()
for step in range(first_step, max_iters + 1):
    # evaluate: all ranks take part
    if step % eval_interval == 0 or step == max_iters:
        val_metrics = evaluate()
        val_text = ' | '.join(f'{name} {value:.4f}' for name, value in val_metrics.items())
        print0(f'step {step:6d} | {val_text}')
        log(step=step, **val_metrics)
        if val_metrics['val_loss'] <= best.get('val_loss', math.inf):
            best = dict(val_metrics, step=step)
            if run.master: # the rank that saves them
                weights = whole.state_dict()
                best['weights'] = {name: p.to('cpu', copy=True) for name, p in weights.items()}
    if step == max_iters:
        break

    # save, and leave after Ctrl-C or SIGTERM
    leave = should_stop(run)
    if step > first_step and (leave or step % save_interval == 0):
        progress.update(ema_loss=ema_loss, seconds=time.time() - started, n_tokens=n_tokens,
                        best=best)
        state = get_state(raw_model, optimizers)
        save_resume(resume_path, step, state, config, **progress)
    assert not leave, f'stopped at step {step} and saved: the same command continues from there'

    # The loss is a sum over the tokens to learn (or rankings), divided by n_valid, their number in
    # all micro-batches and ranks. A mean of means would give some tokens more weight than others.
    t1 = time.time()
    seed_step(seed, step, run.rank)
    batches = get_batches(step)
    n_valid = 0
    n_seen = 0
    for x, y, _, _ in batches:
        n_valid += (y != -1).sum().item()
        n_seen += (x != tok.pad).sum().item()
    n_valid, n_seen = all_sum(n_valid, n_seen)
    n_tokens += n_seen

    # forward and backward
    lossf = 0.0 # loss of this step, as a float
    for micro, (x, y, pos, mask) in enumerate(batches):
        if fsdp: # reduce gradients only once, as ddp does below
            raw_model.set_requires_gradient_sync(micro == len(batches) - 1)
        if ddp: # exchange gradients only once, with the last micro-batch
            model.require_backward_grad_sync = micro == len(batches) - 1
        with run.autocast():
            logits = model(x, pos, mask)
        loss = get_loss(logits, y) / max(1, n_valid)
        (loss * run.world_size).backward() # ddp and fsdp average; we need the sum
        lossf += loss.detach() # .item() would wait for the GPU in each micro-batch
    lossf = all_sum(lossf)[0]

    # clip; one step with a gradient that is not finite would ruin the weights
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    if fsdp:
        norm = norm.full_tensor()
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
if best['step'] < max_iters:
    print0(f'val_loss has risen since step {best["step"]}: saving the weights of that step')
if run.master:
    flops = raw_model.flops_per_token(max_length) * n_tokens
    weights = best.pop('weights')
    metrics = dict(best, seconds=seconds, tokens=n_tokens, flops=flops)
    save_checkpoint(out_path, stage, weights, asdict(raw_model.config), tok,
                    config, best['step'], metrics)
    print(f'saved {out_path}: val_loss {best["val_loss"]:.4f}, {seconds:.0f} s')
cleanup(run)
