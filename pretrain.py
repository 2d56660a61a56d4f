"""
Stage 1: pretraining. Learn language, and what the documents say, by predicting the next token of each of them.
Most of the compute of the recipe is spent here; what comes out is a base model: it continues documents, it does not
answer.

Reads  data_dir/train_*.bin, val_*.bin, tokenizer.json      (tokenizer.py writes them)
Writes out_dir/base.pt, base.jsonl (the curve), base.resume.pt while it runs

on a laptop        $ python pretrain.py config/tiny.py
on one GPU         $ python pretrain.py
on 8 GPUs          $ torchrun --standalone --nproc_per_node=8 pretrain.py          (large models: --parallel=fsdp)
on two nodes       $ torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 pretrain.py
                   $ torchrun --nproc_per_node=8 --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 pretrain.py

Left out: a curriculum. Every window is packed full, from one long stream of documents: attention
crosses from one document into the next, and <|endoftext|> is what tells the model not to care.
"""
import contextlib, copy, functools, glob, json, math, os, subprocess, sys, time
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F

import model as lib
from configurator import configure
from estimate import estimate_run
from model import GPT, GPTConfig, Tokenizer, die, print0
from parallel import Engine, Pipeline, Whole

# -----------------------------------------------------------------------------
# settings: the shape of GPT-2 124M (89M with our 4,096 tokens instead of its 50,257); config/tiny.py: a laptop's
# data
data_dir = 'data/toytown'   # where the token shards are
out_dir = 'out/toytown'     # where the checkpoint goes
init_from = ''              # go on with this model: base.pt, a folder of Hugging Face's form, or a name there: gpt2, ..
# model
arch = 'gpt2'               # gpt2 (LayerNorm, learned positions, GELU) or llama (RMSNorm, rotary positions, gated MLP)
n_layer = 12                # blocks
n_head = 12                 # attention heads in a block
n_kv_head = 0               # heads of keys and values, 0 = n_head
n_embd = 768                # width
n_hidden = 0                # width of the MLP, 0 = 4 n_embd (gpt2) or 8/3 n_embd (llama)
block_size = 1024           # tokens of context
tie_embeddings = True       # one matrix for the input and the output embedding
qk_norm = False             # normalise queries and keys
key_shift = False           # half of the heads know a key by the token before it: small models copy sooner
smear = 0                   # an embedding also holds those of as many tokens before it: small models learn sooner
dropout = 0.1               # share of activations dropped while training; 0 where no text is seen twice
# training
batch_size = 12             # windows in a micro-batch, on each process: lower it for memory, total_batch_size stays
total_batch_size = 0        # windows in a step, of all processes and micro-batches; 0: one micro-batch on each process
max_iters = 600000          # steps; 0: as many as tokens_per_param asks for
tokens_per_param = 20.0     # tokens to train on for each parameter where max_iters = 0 (Hoffmann et al. 2022)
estimate = ''               # instead of training, say what it would need on GPUs, as 8xH100: memory, hours, dollars
sanity = False              # instead of training, learn one batch by heart: passes if the loss falls to nearly nothing
# optimizer
optimizer = 'adamw'         # adamw, or muon (for the matrices in the blocks; the rest stays with AdamW)
learning_rate = 3e-4        # at its highest
min_lr = 3e-5               # at the end of the cosine
warmup_iters = 2000         # steps of linear rise
weight_decay = 0.1          # of matrices; vectors do not decay
momentum = 0.95             # Muon: memory of the gradient; in a run of some hundred steps 0.8 is better
beta1 = 0.9                 # AdamW: memory of the gradient
beta2 = 0.95                # AdamW: memory of its square
grad_clip = 1.0             # longest gradient; 0 = any
# evaluation and log
eval_interval = 2000        # steps between evaluations
eval_iters = 200            # batches of validation text in one evaluation, over all processes
log_interval = 10           # steps between log lines
save_interval = 2000        # steps between saves of base.resume.pt
# system
device = 'auto'             # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'              # auto, float32, bfloat16, float16 (with a GradScaler, for GPUs without bfloat16)
parallel = 'ddp'            # of several processes: ddp, fsdp (models too large for one GPU), pipeline; see parallel.py
compile = False             # torch.compile: slow to start, then faster on a GPU; where it fails, training goes without
check_device = False        # first compare one forward and backward pass with the CPU in fp32
wandb_log = False           # also log to Weights & Biases, project out_dir (pip install wandb)
seed = 1337                 # of the initial weights and the order of the data
resume = True               # go on from base.resume.pt if a killed run left one
config = configure(globals())

# -----------------------------------------------------------------------------
# device, data
if estimate: # of the tokenizer's vocabulary if there is one, else of the one that these settings would make
    path = os.path.join(data_dir, 'tokenizer.json')
    if os.path.exists(path):
        vocab_size = Tokenizer.load(path).n_vocab
    else:
        settings = subprocess.check_output([sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)),
            'configurator.py'), 'tokenizer.py', *(word for word in sys.argv[1:] if not word.startswith('--'))])
        vocab_size = {'gpt2': 50304, 'char': 128}.get(json.loads(settings)['kind'], json.loads(settings)['vocab_size'])
    lib.check_settings(config)
    estimate_run(config, vocab_size)
    raise SystemExit
run = lib.start(config, fp16=True)
shards = {s: sorted(glob.glob(os.path.join(glob.escape(data_dir), f'{s}_*.bin'))) for s in ('train', 'val')}
for split, found in shards.items():
    if not found:
        die(f'no token shards {data_dir}/{split}_*.bin: make them with `python tokenizer.py --data_dir={data_dir}`')
tok = Tokenizer.load(os.path.join(data_dir, 'tokenizer.json'))
vocab_size = tok.n_vocab
shards = {s: [lib.read_shard(p, tok.hash) for p in found] for s, found in shards.items()}
windows = {s: [(len(tokens) - 1) // block_size for tokens in found] for s, found in shards.items()}
for split in windows:
    if not sum(windows[split]):
        n = sum(map(len, shards[split]))
        die(f'{data_dir}: {n:,} {split} tokens, too few for one window of block_size {block_size} + 1: '
            f'add text, or --block_size={max(1, n // 2)}')
token_bytes = torch.tensor([len(tok.bytes_of(i)) for i in range(tok.n_vocab)], device=run.device)
if parallel not in ('ddp', 'fsdp', 'pipeline'):
    die(f"parallel is 'ddp', 'fsdp' or 'pipeline', not {parallel!r}")
pipeline = parallel == 'pipeline' and run.ddp
if run.ddp and parallel == 'fsdp' and optimizer == 'muon' or run.dtype == torch.float16 and parallel != 'ddp':
    die("parallel='fsdp' goes with optimizer='adamw' (Muon needs whole matrices), float16 with parallel='ddp' only")
share, shares = (0, 1) if pipeline else (run.rank, run.world) # which part of each batch is computed here, of how many
total_batch_size = total_batch_size or batch_size * run.world
accumulation, rest = divmod(total_batch_size, batch_size * shares)
if rest or not accumulation:
    die(f'total_batch_size {total_batch_size} is no multiple of batch_size {batch_size} x {shares} processes: '
        f'--total_batch_size={max(1, round(total_batch_size / batch_size / shares)) * batch_size * shares}')
config['total_batch_size'] = total_batch_size # this counts for the order of the data, not on how many it is computed
tokens_per_step = total_batch_size * block_size
n_train = sum(map(len, shards['train']))

def get_windows(split, index):
    """Windows number `index` (list) of a split -> x, y (B, T) on the device; y is x one token later."""
    ends = np.cumsum(windows[split])
    rows = []
    for i in index:
        s = int(np.searchsorted(ends, i, side='right'))
        at = (i - (ends[s - 1] if s else 0)) * block_size
        rows.append(shards[split][s][at:at + block_size + 1].astype(np.int64))
    rows = torch.from_numpy(np.stack(rows))
    if rows.max() >= vocab_size:
        die(f'token {rows.max()} in the shards, but the vocabulary has {vocab_size}: run tokenizer.py again')
    rows = rows.pin_memory().to(run.device, non_blocking=True) if run.type == 'cuda' else rows.to(run.device)
    return rows[:, :-1], rows[:, 1:]

@functools.lru_cache(maxsize=2) # a batch may lie across two epochs
def get_order(epoch):
    """A seeded shuffle of the training windows, the same on all ranks."""
    return np.random.default_rng((seed, epoch)).permutation(sum(windows['train']))

def get_batch(step, micro):
    """The batch of this process. It depends on (seed, step, micro, share) only: every window comes once an epoch."""
    n = sum(windows['train'])
    first = step * total_batch_size + (micro * shares + share) * batch_size
    return get_windows('train', [int(get_order(g // n)[g % n]) for g in range(first, first + batch_size)])

# -----------------------------------------------------------------------------
# model, optimizer
if init_from: # its shape counts, not the settings above
    model_args, weights = lib.pretrained(init_from, tok, block_size, dropout)
    raw_model = GPT(GPTConfig(**model_args)).to(run.device)
    raw_model.load_state_dict(weights)
else:
    raw_model = GPT(GPTConfig(arch, vocab_size, block_size, n_layer, n_head, n_kv_head, n_embd, n_hidden, dropout,
                              tie_embeddings, qk_norm, key_shift, smear)).to(run.device)
n_params, flops_per_token = raw_model.n_params(), raw_model.flops_per_token(block_size)
max_iters = max_iters or math.ceil(tokens_per_param * n_params / tokens_per_step)
print0(f'data: {n_train:,} train and {sum(map(len, shards["val"])):,} val tokens; {tokens_per_step:,} tokens a step, '
       f'{max_iters:,} steps = {max_iters * tokens_per_step / n_train:.1f} epochs')
print0(f'model: {raw_model.config.arch}, {n_params:,} parameters ({raw_model.n_params(embedding=False):,} without '
       f'embeddings), {max_iters * tokens_per_step / n_params:.1f} tokens a parameter, '
       f'{flops_per_token * tokens_per_step:.2e} FLOPs a step')
loss_fn = lambda logits, y: F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
scaler = torch.amp.GradScaler(run.type, enabled=run.dtype == torch.float16)
if check_device: # drivers and new hardware can be silently wrong
    passes, (x, y) = [], get_windows('train', [0])
    for net, context in ((raw_model.eval(), run.autocast), (copy.deepcopy(raw_model).cpu(), contextlib.nullcontext)):
        with context():
            loss = loss_fn(net(x.to(net.wte.weight.device)), y.to(net.wte.weight.device))
        loss.backward()
        passes.append((loss.item(), torch.cat([p.grad.flatten().cpu() for p in net.parameters()])))
        net.zero_grad(set_to_none=True)
    (a, grad), (b, expected) = passes
    off, allowed = ((grad - expected).norm() / expected.norm()).item(), 0.01 if run.dtype == torch.float32 else 0.1
    words = f'loss {a:.4f} on {run.device} and {b:.4f} on the CPU, gradients {off:.1e} apart'
    if not (abs(a - b) < 0.01 * b and off < allowed): # `not`: NaN too
        die(f'check_device: {words}: this device computes something else, use --device=cpu or another driver')
    print0(f'check_device: pass, {words}')
    raw_model.train()
engine = (Pipeline(raw_model, run, loss_fn, accumulation, scaler) if pipeline else
          Engine(raw_model, parallel, run, loss_fn, accumulation, scaler))
optimizers = lib.make_optimizers(raw_model, learning_rate, weight_decay, (beta1, beta2), kind=optimizer,
                                 momentum=momentum)
resume_path, out_path = os.path.join(out_dir, 'base.resume.pt'), os.path.join(out_dir, 'base.pt')
config['tokenizer'] = tok.hash # a run does not go on with other tokens
whole = Whole(raw_model, optimizers, run, parallel)
free = lib.RESUMABLE | {'processes', 'batch_size', 'parallel', 'check_device', 'wandb_log'}
first_step, more = lib.load_resume(resume_path, [whole, scaler], [], config, resume, free)
model = raw_model
if compile and not pipeline:
    try: # the first call compiles
        model = torch.compile(raw_model)
        with run.autocast():
            model(get_batch(0, 0)[0]).mean().backward()
    except Exception as e:
        print0(f'compile: failed, going on without: {type(e).__name__}: {str(e).strip().splitlines()[0][:200]}')
        model = raw_model
    raw_model.zero_grad(set_to_none=True)
engine.wrap(model, optimizers)

# -----------------------------------------------------------------------------
# evaluation, schedule
@torch.no_grad()
def estimate_loss(split='val'):
    """Mean loss in nats a token, and bits per byte, which can be compared across tokenizers."""
    raw_model.eval()
    nats, tokens, n_bytes = 0.0, 0, 0
    n = min(sum(windows[split]), eval_iters * batch_size)
    for i in range(0, n, shares * batch_size): # the same windows for any number of processes
        mine = range(min(n, i + share * batch_size), min(n, i + (share + 1) * batch_size))
        x, y = get_windows(split, mine or [0]) # with fsdp all must take part, also those who have nothing left
        logits = engine.logits(x)                                                 # (B, T, V)
        if logits is not None and mine:
            nats += F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction='sum').item()
            tokens += y.numel()
            n_bytes += token_bytes[y].sum().item()
    raw_model.train()
    nats, tokens, n_bytes = lib.all_sum(nats, tokens, n_bytes)
    return nats / tokens, nats / math.log(2) / max(1, n_bytes)

def get_lr(step):
    """Linear warm-up, then a cosine down to min_lr at the last step."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    t = (step - warmup_iters) / max(1, max_iters - 1 - warmup_iters)
    return min_lr + 0.5 * (learning_rate - min_lr) * (1 + math.cos(math.pi * min(1.0, t)))

# -----------------------------------------------------------------------------
# sanity: can it learn one batch by heart? If not, the data, the model or the learning rate is wrong
if sanity:
    raw_model.eval() # without dropout
    for step in range(301):
        lossf = engine.forward_backward(functools.partial(get_batch, 0))
        if step % 50 == 0 or lossf < 0.1:
            print0(f'sanity: step {step}, loss {lossf:.3f} on one batch')
        if not math.isfinite(lossf) or lossf < 0.1:
            break
        engine.clip(grad_clip)
        engine.update(learning_rate * min(1, (step + 1) / 20))
        scaler.update()
        raw_model.zero_grad(set_to_none=True)
    print0(f'sanity: {"pass" if lossf < 0.1 else "FAIL"}')
    lib.finish(run)
    raise SystemExit(int(not lossf < 0.1))

# -----------------------------------------------------------------------------
# the loop
log = lib.open_log(os.path.join(out_dir, 'base.jsonl'), first_step)
if wandb_log and run.master:
    try:
        import wandb
    except ImportError:
        die('wandb is not installed: `pip install wandb`, or --wandb_log=false')
    wandb.init(project=os.path.basename(os.path.normpath(out_dir)), config=config)
    to_file, log = log, lambda step, **numbers: (to_file(step=step, **numbers), wandb.log(numbers, step=step))
run.catch_signals()
smooth, seconds = more.get('smooth', 0.0), more.get('seconds', 0.0)
bad, t0 = 0, time.time()
val_loss = val_bpb = float('nan')
peak, notes = lib.peak_flops(run), more.get('notes', {}) # notes: what the lines of diagnosis below compare with
for step in range(first_step, max_iters + 1):
    # evaluate: all ranks take part
    if step % eval_interval == 0 or step == max_iters:
        val_loss, val_bpb = estimate_loss()
        print0(f'step {step:6d} | val loss {val_loss:.4f} | {val_bpb:.4f} bits per byte'
               + (f' | an untrained model guesses: ln({vocab_size}) = {math.log(vocab_size):.4f}'
                  if step == 0 and not init_from else ''))
        log(step=step, val_loss=val_loss, val_bpb=val_bpb)
        if step:
            train_loss = smooth / (1 - 0.9 ** step)
            if val_loss > notes.get('val', val_loss) and train_loss < notes['train']:
                print0(f'  val loss rises, {notes["val"]:.4f} -> {val_loss:.4f}, while the training loss falls, '
                       f'{notes["train"]:.4f} -> {train_loss:.4f}: it memorises. More text, fewer steps or --dropout')
            if step > warmup_iters and train_loss > notes.get('start', train_loss):
                print0(f'  loss {train_loss:.4f} is above its start, {notes["start"]:.4f}: lower --learning_rate')
            notes.update(val=val_loss, train=train_loss)
    leave = lib.stopping(run)
    if leave or step == max_iters or step > first_step and step % save_interval == 0:
        more = dict(seconds=seconds + time.time() - t0, smooth=smooth, notes=notes)
        if step < max_iters:
            whole.gather()
            if run.master:
                lib.save_resume(resume_path, step, [whole, scaler], [], config, **more)
    if leave and step < max_iters:
        die(f'stopped at step {step} and saved: the same command goes on from there')
    if step == max_iters:
        break

    # forward and backward
    lib.seed_step(seed, step, run.rank)
    lr, t1 = get_lr(step), time.time()
    lossf = engine.forward_backward(functools.partial(get_batch, step))
    norm = engine.clip(grad_clip)
    notes.setdefault('start', lossf)
    epoch = (step + 1) * tokens_per_step // block_size // sum(windows['train'])
    if epoch > notes.get('epoch', 0):
        print0(f'step {step}: every window has been seen {epoch} times' if epoch > 1 else
               f'step {step}: every window has been seen once; from here on text repeats')
        notes['epoch'] = epoch

    # update, unless the step would ruin the weights
    if math.isfinite(lossf) and math.isfinite(norm):
        bad, smooth = 0, 0.9 * smooth + 0.1 * lossf # a running mean for the log, debiased below like Adam's
        engine.update(lr)
    elif math.isfinite(lossf) and scaler.get_scale() > 1:
        print0(f'step {step}: gradients too large for fp16 at a scale of {scaler.get_scale():.0f}: skipped, half it')
    else:
        bad += 1
        print0(f'step {step}: loss {lossf}, gradient norm {norm}: skipped ({bad} in a row)')
        if bad == 5:
            die('5 steps in a row without a finite loss: lower --learning_rate or --grad_clip, or --dtype=float32; '
                f'the last good state, if one was saved, is {resume_path}')
    scaler.update()
    raw_model.zero_grad(set_to_none=True)

    # log
    if step % log_interval == 0 or step == max_iters - 1:
        dt, left = time.time() - t1, (time.time() - t0) / (step - first_step + 1) * (max_iters - step - 1)
        print0(f'step {step:6d} | loss {smooth / (1 - 0.9 ** (step + 1)):.4f} | lr {lr:.2e} | norm {norm:.3f} | '
               f'{tokens_per_step / dt:,.0f} tok/s, {flops_per_token * tokens_per_step / dt / run.world / peak:.0%} MFU'
               f' | {100 * (step + 1) / max_iters:.0f}%, {left:.0f} s left')
        log(step=step, loss=lossf, lr=lr, norm=norm, tokens_per_second=tokens_per_step / dt)

# -----------------------------------------------------------------------------
# save
weights = whole.gather(optimizers=False).saved['weights']
if run.master:
    flops = flops_per_token * tokens_per_step * max_iters
    metrics = dict(val_loss=val_loss, val_bpb=val_bpb, seconds=more['seconds'], flops=flops,
                   tokens=tokens_per_step * max_iters)
    lib.save_checkpoint(out_path, 'base', SimpleNamespace(config=raw_model.config, state_dict=lambda: weights),
                        tok, config, max_iters, metrics)
    print(f'saved {out_path}: val loss {val_loss:.4f}, {val_bpb:.4f} bits per byte, {more["seconds"]:.0f} s')
lib.finish(run)
