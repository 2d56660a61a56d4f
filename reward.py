"""
Stage 3: the reward model. It is easier to compare answers than to write them. So people rank
answers of the SFT model, and a model learns to score answers as they would (Christiano et al. 2017;
Ouyang et al. 2022, step 2).

Reads   out_dir/sft.pt, data_dir/preferences_{train,val}.jsonl; if sample_prompts > 0 also
        data_dir/prompts_{train,val}.jsonl, to make out_dir/preferences_{train,val}.jsonl
Writes  out_dir/reward.pt, out_dir/reward.jsonl (the curve), out_dir/reward.resume.pt while it runs

on a laptop     $ python reward.py config/tiny.py        (on one GPU the same, or without a profile)
on 8 GPUs       $ torchrun --standalone --nproc_per_node=8 reward.py
on two nodes    with the flags that pretrain.py shows

The body starts as the SFT model. A new head gives one number per token, the score, read at the last
token of the answer. A ranking of K answers gives K (K - 1) / 2 pairs. The loss of a pair is
-log sigmoid(score(better) - score(worse)), the Bradley-Terry model. At the end the scores are
normalised, so that a KL coefficient of the next stage means the same for every reward model.

Left out: a margin that says how much better an answer is (Llama 2), several labellers who disagree.
"""
from configurator import configure # first: makes Ctrl-C one line, also while torch loads
import functools
import itertools
import math
import os
import time
from dataclasses import asdict

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from model import (
    ScalarModel,
    Tokenizer,
    all_gather_list,
    all_sum,
    catch_signals,
    cleanup,
    generate,
    get_state,
    grade,
    last_token,
    load_checkpoint,
    load_model,
    load_resume,
    make_optimizers,
    open_log,
    pad_right,
    print0,
    read_jsonl,
    read_prompts,
    save_checkpoint,
    save_resume,
    seed_step,
    set_state,
    setup,
    should_stop,
    simulated_ranking,
    write_jsonl,
)

# -----------------------------------------------------------------------------
# settings
# data
data_dir = 'data/toytown'   # folder of the data
out_dir = 'out/toytown'     # folder of the checkpoints and logs
max_length = 0              # leave out examples with more tokens than this; 0 = block_size
# sampling: the SFT model answers prompts, a simulated labeller ranks the answers
sample_prompts = 0          # prompts to answer; 0 = use only the rankings in data_dir
sample_answers = 4          # answers to each prompt
sample_batch = 64           # prompts answered at a time
max_new_tokens = 64         # maximum length of an answer
temperature = 1.0           # sampling temperature
labeller_noise = 0.2        # the labeller sees the gold score plus N(0, labeller_noise)
# training
epochs = 1                  # passes over the training data
batch_size = 8              # examples in a micro-batch on each process; lower it to save memory
gradient_accumulation_steps = 1 # micro-batches in a step
dropout = 0.0               # share of the activations that is dropped while training
# optimizer
optimizer = 'adamw'         # adamw, or muon for the matrices in the blocks and adamw for the rest
learning_rate = 1e-5        # max learning rate
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
             'sample_answers', 'sample_batch', 'max_new_tokens',
             'batch_size', 'eval_interval', 'log_interval', 'save_interval'):
    assert config[name] > 0, f'{name} must be positive, not {config[name]}'
for name in ('temperature', 'labeller_noise',
             'learning_rate', 'warmup_iters', 'weight_decay', 'grad_clip'):
    assert config[name] >= 0, f'{name} must be at least 0, not {config[name]}'
for name in ('dropout', 'momentum', 'beta1', 'beta2'):
    assert 0 <= config[name] < 1, f'{name} must be at least 0 and below 1, not {config[name]}'

# -----------------------------------------------------------------------------
# device and model
run = setup(config)
ddp = run.world_size > 1
stage = 'reward'
ckpt_path = os.path.join(out_dir, 'sft.pt')
ckpt = load_checkpoint(ckpt_path, ['sft'], f'python sft.py --out_dir={out_dir}')
ckpt['model_args']['dropout'] = dropout
tok = Tokenizer(ckpt['tokenizer'])
raw_model = load_model(ckpt, run.device, ScalarModel)
block_size = raw_model.config.block_size
max_length = min(max_length or block_size, block_size)
resume_path = os.path.join(out_dir, f'{stage}.resume.pt')
out_path = os.path.join(out_dir, f'{stage}.pt')
config['starts_from'] = ckpt['metrics'].get('seconds') # its run time identifies the checkpoint
saved = load_resume(resume_path, config, resume) # before answers are sampled

# -----------------------------------------------------------------------------
# answers of the SFT model, ranked by the simulated labeller
def sample_rankings(split):
    """
    Sample answers to prompts, have them ranked, write out_dir/preferences_SPLIT.jsonl. Returns the
    share of pairs that the labeller orders alike when asked twice, and the tokens processed.
    """
    path = os.path.join(data_dir, f'prompts_{split}.jsonl')
    prompts = []
    for row, ids in read_prompts(path, tok, need_checks=True):
        if len(ids) + max_new_tokens + 1 <= max_length: # + 1 for <|end|>
            prompts.append((row, ids))
    assert prompts, (f'{path}: no prompt leaves room for {max_new_tokens} new tokens in '
                     f'{max_length}: lower --max_new_tokens')
    rng = np.random.default_rng((seed, split == 'val')) # the same labeller on all ranks
    prompts = [prompts[i] for i in rng.permutation(len(prompts))[:sample_prompts]]

    policy = load_model(ckpt, run.device).eval()
    seed_step(seed, int(split == 'val'), run.rank) # each rank draws its own random numbers
    mine = prompts[run.rank::run.world_size]
    answers = [] # for each of my prompts a list of texts
    n_tokens = 0
    for first in range(0, len(mine), sample_batch):
        queries = []
        for _, ids in mine[first:first + sample_batch]:
            queries += [ids] * sample_answers
        with run.autocast():
            responses = generate(policy, queries, max_new_tokens, tok.end, temperature)
        n_tokens += sum(len(ids) for ids in queries + responses)
        texts = [tok.decode_answer(ids) for ids in responses]
        for i in range(0, len(texts), sample_answers):
            answers.append(texts[i:i + sample_answers])
        print0(f'{split}: answered {len(answers)} of {len(mine)} prompts')

    rows = []
    n_pairs = 0
    n_same = 0
    for (row, _), texts in zip(prompts, all_gather_list(answers, run)):
        texts = list(dict.fromkeys(texts)) # each text once; '' stays, since PPO may answer it too
        gold = [grade(row['checks'], text)[1] for text in texts]
        ranking = simulated_ranking(gold, labeller_noise, rng)
        second = simulated_ranking(gold, labeller_noise, rng)
        if len(ranking) < 2: # all answers are equally good: nothing to learn
            continue
        rows.append({**row, 'completions': texts, 'ranking': ranking})
        for better, worse in itertools.combinations(ranking, 2):
            n_pairs += 1
            n_same += second.index(better) < second.index(worse)
    assert rows, (f'{path}: the answers to each prompt are equally good, nothing to learn: '
                  'raise --sample_answers or --temperature')
    if run.master:
        write_jsonl(os.path.join(out_dir, f'preferences_{split}.jsonl'), rows)
    print0(f'{split}: {len(rows)} prompts ranked, {n_pairs} pairs; when asked twice, the labeller '
           f'orders {n_same / n_pairs:.1%} of them alike')
    return n_same / n_pairs, all_sum(n_tokens)[0] # all_sum waits until the file is written

t0 = time.time()
sampled = {} # stays empty if nothing is sampled, or if it was before an interruption
if sample_prompts and not saved:
    _, n_train = sample_rankings('train')
    agreement, n_val = sample_rankings('val')
    sampled = dict(self_agreement=agreement, n_sampled=n_train + n_val, seconds=time.time() - t0)

# -----------------------------------------------------------------------------
# data
def read_example(row):
    """
    A line of a preferences file -> length, answers, gold. answers: prompt and answer as tokens,
    best first. gold: their gold scores, 0 if there are no checks. length: of the longest answer.
    """
    for name in ('messages', 'completions', 'ranking'):
        if not isinstance(row.get(name), list):
            raise ValueError(f'{name} is missing, or is not a list')
    texts = row['completions']
    ranking = row['ranking']
    if len(ranking) < 2 or len(set(ranking)) < len(ranking):
        raise ValueError(f'ranking {ranking} must name two or more different answers')
    if not set(ranking) <= set(range(len(texts))):
        raise ValueError(f'ranking {ranking} must hold numbers from 0 to {len(texts) - 1}')
    answers = []
    gold = []
    for i in ranking:
        answer = dict(role='assistant', content=texts[i])
        answers.append(tok.render(row['messages'] + [answer])[0])
        gold.append(grade(row['checks'], texts[i])[1] if row.get('checks') else 0.0)
    return max(len(ids) for ids in answers), answers, gold

def load_examples(split):
    """All examples of the split that are not too long: a list of what read_example returns."""
    paths = [os.path.join(data_dir, f'preferences_{split}.jsonl')]
    if sample_prompts:
        paths.insert(0, os.path.join(out_dir, f'preferences_{split}.jsonl'))
        if split == 'val': # self_agreement is measured on the sampled ones only
            paths.pop()
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

@functools.lru_cache(maxsize=1)
def get_order(epoch):
    """A seeded shuffle, the same on all ranks -> (steps_per_epoch, step_size), indices of train."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(train))[:steps_per_epoch * step_size]
    return order.reshape(steps_per_epoch, step_size)

def get_batches(step):
    """The micro-batches of this process in this step; they depend on (seed, step, rank) only."""
    order = get_order(step // steps_per_epoch)[step % steps_per_epoch]
    mine = order[run.rank::run.world_size]
    batches = []
    for first in range(0, len(mine), batch_size):
        examples = [train[j] for j in mine[first:first + batch_size]]
        batches.append(examples)
    return batches

# -----------------------------------------------------------------------------
# optimizer, and the state of an interrupted run
optimizers = make_optimizers(raw_model, learning_rate, weight_decay, (beta1, beta2),
                             kind=optimizer, momentum=momentum)
first_step = 0
progress = dict(ema_loss=0.0, seconds=0.0, n_tokens=0)
progress.update(sampled)
if saved:
    set_state(raw_model, optimizers, saved['state'])
    first_step = saved['step']
    progress = saved['progress']
model = torch.compile(raw_model) if compile else raw_model
if ddp: # averages the gradients over all ranks; raw_model is the same without this wrapper
    model = DDP(model, device_ids=[run.device.index] if run.device_type == 'cuda' else None)

# -----------------------------------------------------------------------------
# scores and pairs
def get_scores(model, rankings):
    """Scores of all answers (n_answers,), each read at the answer's last token, <|end|>."""
    rows = list(itertools.chain(*[answers for _, answers, _ in rankings]))
    x = pad_right(rows, tok.pad, run.device)
    with run.autocast():
        scores = model(x) # (n_answers, T)
    return last_token(scores, rows)

def pair_margins(scores, rankings):
    """
    score(better) - score(worse) of all pairs (n_pairs,). scores (n_answers,): the answers of a
    ranking stand together, best first.
        pair_margins([5, 3, 1], a ranking of 3 answers) -> [5 - 3, 5 - 1, 3 - 1]
    """
    margins = []
    first = 0
    for _, answers, _ in rankings:
        better, worse = torch.triu_indices(len(answers), len(answers), offset=1)
        margins.append(scores[first + better] - scores[first + worse])
        first += len(answers)
    return torch.cat(margins)

# -----------------------------------------------------------------------------
# evaluation and learning rate
@torch.no_grad()
def evaluate():
    """
    val_loss: mean loss on validation data. val_accuracy: share of pairs that are ordered as by the
    labeller. val_gold_accuracy: as by the gold scores, of the pairs whose gold scores differ.
    """
    raw_model.eval()
    sums = torch.zeros(5)
    for first in range(run.rank * batch_size, len(val), run.world_size * batch_size):
        batch = val[first:first + batch_size]
        margins = pair_margins(get_scores(raw_model, batch), batch).cpu()
        gold = torch.tensor(list(itertools.chain(*[gold for _, _, gold in batch])))
        gold_margins = pair_margins(gold, batch)
        is_right = margins > 0
        is_known = gold_margins != 0 # 0: no checks, or equally good
        is_gold = is_known & (is_right == (gold_margins > 0))
        loss = -F.logsigmoid(margins).sum()
        n_pairs = torch.tensor(len(margins))
        sums += torch.stack([loss, n_pairs, is_right.sum(), is_known.sum(), is_gold.sum()])
    raw_model.train()
    loss, n_pairs, n_right, n_known, n_gold = all_sum(*sums)
    found = dict(val_loss=loss / n_pairs, val_accuracy=n_right / n_pairs)
    if n_known:
        found['val_gold_accuracy'] = n_gold / n_known
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
    for _, answers, _ in itertools.chain(*batches):
        n_valid += math.comb(len(answers), 2)
        n_seen += sum(len(ids) for ids in answers)
    n_valid, n_seen = all_sum(n_valid, n_seen)
    n_tokens += n_seen

    # forward and backward
    lossf = 0.0 # loss of this step, as a float
    n_right = 0
    for micro, batch in enumerate(batches):
        if ddp: # exchange gradients only once, with the last micro-batch
            model.require_backward_grad_sync = micro == len(batches) - 1
        margins = pair_margins(get_scores(model, batch), batch) # (n_pairs,)
        loss = -F.logsigmoid(margins).sum()
        loss = loss / max(1, n_valid)
        (loss * run.world_size).backward() # DDP averages over ranks; we need the sum
        lossf += loss.item()
        n_right += (margins > 0).sum().item()
    lossf = all_sum(lossf)[0]
    accuracy = all_sum(n_right)[0] / n_valid # of the pairs of this step

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
               f'{n_seen / dt:,.0f} tok/s | accuracy {accuracy:.2f} | '
               f'{(step + 1) / max_iters:.0%}, {left / 60:.1f} min left')
        log(step=step, loss=lossf, lr=lr, norm=norm,
            tokens_per_second=n_seen / dt, accuracy=accuracy)

# -----------------------------------------------------------------------------
# normalise: mean 0 and standard deviation 1 over the answers of the training data
raw_model.eval()
with torch.no_grad():
    scores = torch.cat([get_scores(raw_model, train[first:first + batch_size])
                        for first in range(0, len(train), batch_size)])
raw_model.mean.copy_(scores.mean())
raw_model.std.copy_(scores.std().clamp(min=1e-4))
print0(f'mean {scores.mean():.3f} and std {scores.std():.3f} of the scores become 0 and 1')

# -----------------------------------------------------------------------------
# save
seconds = time.time() - started
weights = raw_model.state_dict()
if run.master:
    lengths = [len(ids) for ids in itertools.chain(*[answers for _, answers, _ in train])]
    n_forward = progress.get('n_sampled', 0) + sum(lengths) # no backward: a third of the cost
    mean_length = sum(lengths) / len(lengths)
    flops = raw_model.body.flops_per_token(mean_length) * (n_tokens + n_forward / 3)
    metrics = dict(val_metrics, seconds=seconds, tokens=n_tokens, flops=flops,
                   self_agreement=progress.get('self_agreement'))
    save_checkpoint(out_path, stage, weights, asdict(raw_model.config), tok,
                    config, max_iters, metrics)
    print(f'saved {out_path}: {val_text}, {seconds:.0f} s')
cleanup(run)
