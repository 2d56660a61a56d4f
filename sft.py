"""
Stage 2: supervised fine-tuning (SFT). The same objective as pretraining on different data: conversations, in which only
what the assistant says is learned. What comes out answers instead of continuing (Ouyang et al. 2022, step 1).

Reads  out_dir/base.pt, data_dir/chat_train.jsonl, chat_val.jsonl
Writes out_dir/sft.pt, sft.jsonl (the curve), sft.resume.pt while it runs

on a laptop        $ python sft.py config/tiny.py
on 8 GPUs          $ torchrun --standalone --nproc_per_node=8 sft.py
on two nodes       $ torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 sft.py
                   $ torchrun --nproc_per_node=8 --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 sft.py

Left out: packing several conversations into a row (attention would have to be kept from crossing); instead,
conversations of like length share a batch. `diff pretrain.py sft.py` shows what is new: the mask, and dividing by the
number of tokens that it leaves.
"""
import functools, math, os, time

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import model as lib
from configurator import configure
from model import Tokenizer, die, print0

# -----------------------------------------------------------------------------
# settings
# data
data_dir = 'data/toytown'   # where chat_train.jsonl and chat_val.jsonl are
out_dir = 'out/toytown'     # where base.pt is and sft.pt goes
max_length = 0              # tokens of the longest conversation taken; 0 = the model's block_size
# training
epochs = 3                  # passes over the conversations
batch_size = 16             # conversations in a micro-batch, on each process
gradient_accumulation_steps = 1 # micro-batches in a step
dropout = 0.0               # share of activations dropped while training
# optimizer
optimizer = 'adamw'         # adamw or muon, as in pretrain.py
learning_rate = 3e-5        # at its highest; then linear to 0
warmup_iters = 20           # steps of linear rise
weight_decay = 0.0          # of matrices
beta1 = 0.9                 # AdamW: memory of the gradient
beta2 = 0.95                # AdamW: memory of its square
grad_clip = 1.0             # longest gradient; 0 = any
# evaluation and log
eval_interval = 100         # steps between evaluations
log_interval = 10           # steps between log lines
save_interval = 500         # steps between saves of sft.resume.pt
# system
device = 'auto'             # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'              # auto, float32, bfloat16
compile = False             # torch.compile: recompiles for new lengths, pays off on long runs only
seed = 1337                 # of the order of the data
resume = True               # go on from sft.resume.pt if a killed run left one
config = configure(globals())

# -----------------------------------------------------------------------------
# device, model
run = lib.start(config)
base = lib.load_checkpoint(os.path.join(out_dir, 'base.pt'), ['base'], f'python pretrain.py --out_dir={out_dir}')
tok = Tokenizer(base['tokenizer'])
base['model_args']['dropout'] = dropout
raw_model = lib.load_model(base, run.device)
max_length = min(max_length or raw_model.config.block_size, raw_model.config.block_size)

# -----------------------------------------------------------------------------
# data: conversation -> tokens x, targets y; y is -1 where nothing is learned
def load_chats(split):
    path, chats, too_long = os.path.join(data_dir, f'chat_{split}.jsonl'), [], 0
    if not os.path.exists(path):
        die(f'no conversations {path}: make them with `python prepare_data.py --data_dir={data_dir}`')
    for line, row in lib.read_jsonl(path):
        try:
            ids, mask = tok.render(row.get('messages'))
        except ValueError as e:
            die(f'{path}:{line}: {e}')
        if len(ids) - 1 > max_length:
            too_long += 1
        else:
            chats.append((ids[:-1], [t if m else -1 for t, m in zip(ids[1:], mask[1:])]))
    if too_long:
        print0(f'{path}: {too_long} of {too_long + len(chats)} conversations left out, longer than {max_length} tokens')
    if not chats:
        die(f'{path}: no conversation fits into {max_length} tokens: add some, or pretrain with a larger --block_size')
    return chats

train, val = load_chats('train'), load_chats('val')
step_size = batch_size * gradient_accumulation_steps * run.world # conversations in a step
if len(train) < step_size:
    die(f'{len(train)} conversations do not fill one step of {step_size} (batch_size {batch_size} x accumulation '
        f'{gradient_accumulation_steps} x {run.world} processes): --gradient_accumulation_steps=1 '
        f'--batch_size={max(1, len(train) // run.world)}')
steps_per_epoch = len(train) // step_size
max_iters = epochs * steps_per_epoch
n_learn = sum(t != -1 for _, y in train for t in y)
print0(f'data: {len(train):,} conversations, {n_learn:,} tokens to learn; {step_size} a step, '
       f'{steps_per_epoch} steps an epoch, {max_iters} steps; {len(val)} conversations to validate')
x0, y0 = train[0]
print0('first one, [what is learned]:', ''.join(f'[{tok.decode([t])}]' if t != -1 else tok.decode([x])
                                                for x, t in zip(x0[1:] + [tok.pad], y0)))

def to_batch(chats):
    """Chats -> x, y (B, T), padded on the right, where causal attention keeps pads from being seen."""
    x, y = zip(*chats)
    return lib.pad_right(x, tok.pad, run.device), lib.pad_right(y, -1, run.device)

@functools.lru_cache(maxsize=1)
def get_order(epoch):
    """A seeded shuffle, the same on all ranks, in which the conversations of one step are of like length."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(train))[:steps_per_epoch * step_size]
    pools = np.split(order, range(16 * step_size, len(order), 16 * step_size)) # 16 steps in each
    pools = [sorted(pool, key=lambda j: len(train[j][0])) for pool in pools]
    return rng.permutation(np.concatenate(pools).reshape(steps_per_epoch, step_size)) # shuffles whole steps

def get_batches(step):
    """The micro-batches of this process in this step; they depend on (seed, step, rank) only."""
    mine = get_order(step // steps_per_epoch)[step % steps_per_epoch][run.rank::run.world]
    return [to_batch([train[j] for j in mine[i:i + batch_size]]) for i in range(0, len(mine), batch_size)]

# -----------------------------------------------------------------------------
# optimizer
optimizers = lib.make_optimizers(raw_model, learning_rate, weight_decay, (beta1, beta2), kind=optimizer)
resume_path, out_path = os.path.join(out_dir, 'sft.resume.pt'), os.path.join(out_dir, 'sft.pt')
config['starts_from'] = round(base['metrics']['seconds'], 3) # tells one base.pt from another
first_step, more = lib.load_resume(resume_path, [raw_model], optimizers, config, resume)
model = torch.compile(raw_model) if compile else raw_model
model = DDP(model, device_ids=[run.device.index] if run.type == 'cuda' else None) if run.ddp else model

# -----------------------------------------------------------------------------
# evaluation, schedule
@torch.no_grad()
def estimate_loss():
    """Mean loss of the validation answers, in nats a token."""
    raw_model.eval()
    nats, tokens = 0.0, 0
    for i in range(run.rank * batch_size, len(val), run.world * batch_size):
        x, y = to_batch(val[i:i + batch_size])
        with run.autocast():
            logits = raw_model(x)                                                 # (B, T, V)
        nats += F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), ignore_index=-1, reduction='sum').item()
        tokens += (y != -1).sum().item()
    raw_model.train()
    nats, tokens = lib.all_sum(nats, tokens)
    return nats / max(1, tokens)

def get_lr(step):
    """Linear warm-up, then linear down to 0."""
    return learning_rate * min((step + 1) / (warmup_iters + 1), (max_iters - step) / max(1, max_iters - warmup_iters))

# -----------------------------------------------------------------------------
# the loop
log = lib.open_log(os.path.join(out_dir, 'sft.jsonl'), first_step)
run.catch_signals()
smooth, seconds, n_tokens = more.get('smooth', 0.0), more.get('seconds', 0.0), more.get('n_tokens', 0)
bad, t0 = 0, time.time()
val_loss = float('nan')
for step in range(first_step, max_iters + 1):
    # evaluate: all ranks take part
    if step % eval_interval == 0 or step == max_iters:
        val_loss = estimate_loss()
        print0(f'step {step:6d} | val loss {val_loss:.4f}' + (' | before any fine-tuning' if step == 0 else ''))
        log(step=step, val_loss=val_loss)
    leave = lib.stopping(run)
    if leave or step == max_iters or step > first_step and step % save_interval == 0:
        more = dict(seconds=seconds + time.time() - t0, smooth=smooth, n_tokens=n_tokens)
        if run.master and step < max_iters:
            lib.save_resume(resume_path, step, [raw_model], optimizers, config, **more)
    if leave and step < max_iters:
        die(f'stopped at step {step} and saved: the same command goes on from there')
    if step == max_iters:
        break

    # forward and backward
    lib.seed_step(seed, step, run.rank)
    lr, lossf, t1 = get_lr(step), 0.0, time.time()
    batches = get_batches(step)
    # The loss is a sum over the tokens to learn, divided by their number in the whole step: all micro-batches, all
    # ranks. A mean of means would weigh the tokens of short answers more, and be 0/0 where a mask is empty.
    n_valid, n_seen = lib.all_sum(sum((y != -1).sum().item() for _, y in batches), sum(x.numel() for x, _ in batches))
    for micro, (x, y) in enumerate(batches):
        if run.ddp: # gradients travel only with the last micro-batch
            model.require_backward_grad_sync = micro == len(batches) - 1
        with run.autocast():
            logits = model(x)                                                     # (B, T, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), ignore_index=-1, reduction='sum')
        loss = loss / max(1, n_valid)
        (loss * run.world).backward() # DDP takes the mean over ranks, the sum is wanted
        lossf += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or float('inf')).item()
    lossf, n_tokens = lib.all_sum(lossf)[0], n_tokens + n_seen

    # update, unless the step would ruin the weights
    if math.isfinite(lossf) and math.isfinite(norm):
        bad, smooth = 0, 0.9 * smooth + 0.1 * lossf # a running mean for the log, debiased below like Adam's
        for opt in optimizers:
            for group in opt.param_groups:
                group['lr'] = lr
            opt.step()
    else:
        bad += 1
        print0(f'step {step}: loss {lossf}, gradient norm {norm}: skipped ({bad} in a row)')
        if bad == 5:
            die('5 steps in a row without a finite loss: lower --learning_rate or --grad_clip, or --dtype=float32; '
                f'the last good state, if one was saved, is {resume_path}')
    raw_model.zero_grad(set_to_none=True)

    # log
    if step % log_interval == 0 or step == max_iters - 1:
        dt, left = time.time() - t1, (time.time() - t0) / (step - first_step + 1) * (max_iters - step - 1)
        print0(f'step {step:6d} | loss {smooth / (1 - 0.9 ** (step + 1)):.4f} | lr {lr:.2e} | norm {norm:.3f} | '
               f'{n_seen / dt:,.0f} tok/s | {100 * (step + 1) / max_iters:.0f}%, {left:.0f} s left')
        log(step=step, loss=lossf, lr=lr, norm=norm, tokens_per_second=n_seen / dt)

# -----------------------------------------------------------------------------
# save
if run.master:
    flops = raw_model.flops_per_token(n_tokens / max(1, max_iters * step_size)) * n_tokens
    metrics = dict(val_loss=val_loss, seconds=more['seconds'], flops=flops, tokens=n_tokens)
    lib.save_checkpoint(out_path, 'sft', raw_model, tok, config, max_iters, metrics)
    print(f'saved {out_path}: val loss {val_loss:.4f}, {more["seconds"]:.0f} s')
lib.finish(run)
