"""
Stage 3: the reward model. Comparing answers is easier than writing them, so people rank the answers of the SFT model,
and a model learns to score answers as they would (Christiano et al. 2017; Ouyang et al. 2022, step 2).

Reads  out_dir/sft.pt, data_dir/preferences_{train,val}.jsonl; with sample_prompts data_dir/prompts_{train,val}.jsonl
Writes out_dir/reward.pt, reward.jsonl, reward.resume.pt while it runs; with sample_prompts out_dir/preferences_*.jsonl

on a laptop        $ python reward.py config/tiny.py
on 8 GPUs          $ torchrun --standalone --nproc_per_node=8 reward.py

The body starts as the SFT model; the output matrix is replaced by one number, read at the answer's last token. Each
ranking of K answers gives K (K - 1) / 2 pairs; the loss of a pair is -log sigmoid(score of the better - score of the
worse), the Bradley-Terry model. Scores are normalised at the end, so that the KL coefficient of the next stage keeps
its meaning. Left out: a margin for how much better (Llama 2), several labellers with opinions of their own.
"""
import functools, itertools, math, os, sys, time

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import model as lib
from configurator import configure
from model import ScalarModel, Tokenizer, die, print0

# -----------------------------------------------------------------------------
# settings
# data
data_dir = 'data/toytown'   # where preferences_*.jsonl and prompts_*.jsonl are
out_dir = 'out/toytown'     # where sft.pt is and reward.pt goes
max_length = 0              # tokens of the longest prompt with answer; 0 = the model's block_size
# sampling answers and having them ranked
sample_prompts = 0          # prompts for which the SFT model answers; 0 = only rank files are used
sample_answers = 4          # answers to each prompt
sample_batch = 64           # prompts answered at a time
max_new_tokens = 64         # longest answer
temperature = 1.0           # of the sampling
labeller_noise = 0.2        # the simulated labeller sees the gold score plus N(0, this)
# training
epochs = 1                  # passes over the rankings: a few thousand labels are learned by heart in more
batch_size = 8              # rankings in a step, on each process
# optimizer
learning_rate = 1e-5        # at its highest; then linear to 0
warmup_iters = 20           # steps of linear rise
weight_decay = 0.0          # of matrices
beta1 = 0.9                 # AdamW: memory of the gradient
beta2 = 0.95                # AdamW: memory of its square
grad_clip = 1.0             # longest gradient; 0 = any
# evaluation and log
eval_interval = 200         # steps between evaluations
log_interval = 10           # steps between log lines
save_interval = 500         # steps between saves of reward.resume.pt
# system
device = 'auto'             # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'              # auto, float32, bfloat16
seed = 1337                 # of the answers, the labeller, the new head and the order of the data
resume = True               # go on from reward.resume.pt if a killed run left one
config = configure(globals())

# -----------------------------------------------------------------------------
# device, models
run = lib.start(config)
sft = lib.load_checkpoint(os.path.join(out_dir, 'sft.pt'), ['sft'], f'python sft.py --out_dir={out_dir}')
tok = Tokenizer(sft['tokenizer'])
sft['model_args']['dropout'] = 0.0
raw_model = lib.load_model(sft, run.device, ScalarModel)
max_length = min(max_length or raw_model.config.block_size, raw_model.config.block_size)
resume_path, out_path = os.path.join(out_dir, 'reward.resume.pt'), os.path.join(out_dir, 'reward.pt')
started, n_sampled = time.time(), 0

# -----------------------------------------------------------------------------
# answers of the SFT model, ranked by the simulated labeller
def sample_rankings(split, n):
    """Answer n prompts of the split, rank the answers, write out_dir/preferences_SPLIT.jsonl."""
    global n_sampled
    path, prompts = os.path.join(data_dir, f'prompts_{split}.jsonl'), []
    for row, ids in lib.read_prompts(path, tok, data_dir, ranked=True):
        if len(ids) + max_new_tokens <= max_length:
            prompts.append((row, ids))
    if not prompts:
        die(f'{path}: no prompt leaves room for {max_new_tokens} new tokens in {max_length}: lower --max_new_tokens')
    rng = np.random.default_rng((seed, split == 'val')) # the same labeller on all ranks
    prompts = [prompts[i] for i in rng.permutation(len(prompts))[:n]]
    policy, answers, t0 = lib.load_model(sft, run.device).eval(), [], time.time()
    lib.seed_step(seed, int(split == 'val'), run.rank) # each rank draws answers of its own
    mine = prompts[run.rank::run.world]
    for i in range(0, len(mine), sample_batch):
        queries = [ids for _, ids in mine[i:i + sample_batch] for _ in range(sample_answers)]
        with run.autocast():
            new = lib.generate(policy, queries, max_new_tokens, tok.end, temperature)
        n_sampled += sum(map(len, queries)) + sum(map(len, new)) # read and said
        texts = [tok.said(r) for r in new]
        answers += [texts[k:k + sample_answers] for k in range(0, len(texts), sample_answers)]
        done = len(answers) / len(mine)
        if run.master and (sys.stdout.isatty() or done == 1):
            left = (time.time() - t0) * (1 / done - 1)
            print(f'\r{split}: answered {done:.0%} of {len(prompts)} prompts, {left:.0f} s left ',
                  end='\n' if done == 1 else '', flush=True)
    rows, same, agree, pairs = [], 0, 0, 0
    for (row, _), texts in zip(prompts, lib.gather(answers, run)):
        texts = list(dict.fromkeys(texts)) # an empty answer too: else PPO finds that nobody ever scored one
        gold = [lib.grade(row['checks'], t)[1] for t in texts]
        ranking, again = (lib.simulated_ranking(gold, labeller_noise, rng) for _ in range(2))
        if len(ranking) < 2:
            continue # all answers as good: nothing to learn
        rows.append(dict(messages=row['messages'], completions=texts, ranking=ranking, checks=row['checks']))
        for a, b in itertools.combinations(ranking, 2):
            same, agree, pairs = same + (again.index(a) < again.index(b)), agree + (gold[a] > gold[b]), pairs + 1
    if not rows:
        die(f'{path}: the labeller found all answers alike, nothing to learn: more --sample_answers or --temperature')
    if run.master:
        lib.write_jsonl(os.path.join(out_dir, f'preferences_{split}.jsonl'), rows)
    print0(f'{split}: {len(rows)} prompts ranked, {pairs} pairs; the labeller agrees with the gold order on '
           f'{agree / pairs:.1%}, and with itself, asked again, on {same / pairs:.1%}')
    lib.all_sum(0) # all ranks wait until the file is written
    return same / pairs

self_agreement = None
if sample_prompts and not (resume and os.path.exists(resume_path)):
    sample_rankings('train', sample_prompts)
    self_agreement = sample_rankings('val', sample_prompts)
    n_sampled = lib.all_sum(n_sampled)[0]

# -----------------------------------------------------------------------------
# data: a ranking -> its answers as tokens, best first, and their gold scores where checks are known
def load_rankings(split):
    name, rankings, too_long = f'preferences_{split}.jsonl', [], 0
    paths = [os.path.join(out_dir, name)] * bool(sample_prompts) + [os.path.join(data_dir, name)]
    if sample_prompts and split == 'val':
        paths.pop() # held out are the SFT model's own answers: the labeller's agreement with itself is known on those
    for path in filter(os.path.exists, paths):
        for line, row in lib.read_jsonl(path):
            try:
                texts, ranking = row['completions'], row['ranking']
                if len(set(ranking)) != len(ranking) or len(ranking) < 2 or not set(ranking) <= set(range(len(texts))):
                    raise ValueError(f'ranking {ranking} of {len(texts)} completions needs 2 or more different indices')
                ids = [tok.render(row['messages'] + [dict(role='assistant', content=texts[i])])[0] for i in ranking]
                gold = [lib.grade(row['checks'], texts[i])[1] for i in ranking] if row.get('checks') else None
            except (KeyError, TypeError, ValueError) as e:
                die(f'{path}:{line}: {f"no {e}" if isinstance(e, KeyError) else e}')
            if max(map(len, ids)) > max_length:
                too_long += 1
            else:
                rankings.append((ids, gold))
    if too_long:
        print0(f'{name}: {too_long} of {too_long + len(rankings)} rankings left out, longer than {max_length} tokens')
    if not rankings and too_long:
        die(f'{name}: all {too_long} rankings are longer than {max_length} tokens: pretrain with a larger --block_size')
    if not rankings:
        die(f'no rankings in {" or ".join(paths)}: make them with `python prepare_data.py --data_dir={data_dir}`')
    return rankings

train, val = load_rankings('train'), load_rankings('val')
step_size = batch_size * run.world
if len(train) < step_size:
    die(f'{len(train)} rankings do not fill one step of {step_size} (batch_size {batch_size} x {run.world} processes): '
        f'--batch_size={max(1, len(train) // run.world)}')
steps_per_epoch = len(train) // step_size
max_iters = epochs * steps_per_epoch
print0(f'data: {len(train):,} rankings, {sum(math.comb(len(ids), 2) for ids, _ in train):,} pairs; {step_size} a step, '
       f'{max_iters} steps; {len(val)} rankings to validate')

@functools.lru_cache(maxsize=1)
def get_order(epoch):
    """A seeded shuffle of the rankings, the same on all ranks."""
    return np.random.default_rng((seed, epoch)).permutation(len(train))

def get_batch(step):
    """The rankings of this process in this step; they depend on (seed, step, rank) only."""
    first = step % steps_per_epoch * step_size
    return [train[j] for j in get_order(step // steps_per_epoch)[first:first + step_size][run.rank::run.world]]

def score(model, rankings):
    """Scores of all answers, (number of answers,): the head's number at each one's last real token, <|end|>."""
    rows = [ids for answers, _ in rankings for ids in answers]
    with run.autocast():
        return lib.at_end(model(lib.pad_right(rows, tok.pad, run.device)), rows)

def pair_margins(scores, rankings):
    """score(better) - score(worse) of every pair; the answers of a ranking stand together in scores, best first."""
    margins, at = [], 0
    for answers, _ in rankings:
        i, j = torch.triu_indices(len(answers), len(answers), 1)
        margins.append(scores[at + i] - scores[at + j])
        at += len(answers)
    return torch.cat(margins)

@torch.no_grad()
def evaluate():
    """Loss, accuracy against the labeller, accuracy against the gold order (None where no checks are known)."""
    loss = right = pairs = gold_right = gold_pairs = 0
    for i in range(run.rank * batch_size, len(val), run.world * batch_size):
        batch = val[i:i + batch_size]
        margins = pair_margins(score(raw_model, batch), batch).cpu()
        gold = [g for answers, scores in batch for g in scores or [0.0] * len(answers)]
        true = pair_margins(torch.tensor(gold), batch) # 0 where the gold order is unknown
        loss -= F.logsigmoid(margins).sum().item()
        right += (margins > 0).sum().item()
        pairs += len(margins)
        gold_right += ((margins > 0) == (true > 0))[true != 0].sum().item()
        gold_pairs += (true != 0).sum().item()
    loss, right, pairs, gold_right, gold_pairs = lib.all_sum(loss, right, pairs, gold_right, gold_pairs)
    return loss / pairs, right / pairs, gold_right / gold_pairs if gold_pairs else None

# -----------------------------------------------------------------------------
# optimizer, schedule
optimizers = lib.make_optimizers(raw_model, learning_rate, weight_decay, (beta1, beta2))
config['starts_from'] = round(sft['metrics']['seconds'], 3) # tells one sft.pt from another
first_step, more = lib.load_resume(resume_path, [raw_model], optimizers, config, resume)
model = DDP(raw_model, device_ids=[run.device.index] if run.type == 'cuda' else None) if run.ddp else raw_model

def get_lr(step):
    """Linear warm-up, then linear down to 0."""
    return learning_rate * min((step + 1) / (warmup_iters + 1), (max_iters - step) / max(1, max_iters - warmup_iters))

# -----------------------------------------------------------------------------
# the loop
log = lib.open_log(os.path.join(out_dir, 'reward.jsonl'), first_step)
run.catch_signals()
self_agreement, n_sampled = more.get('self_agreement', self_agreement), more.get('n_sampled', n_sampled)
smooth, seconds, n_tokens = more.get('smooth', 0.0), more.get('seconds', 0.0), more.get('n_tokens', 0)
bad, t0, accuracy, gold_accuracy = 0, time.time(), float('nan'), None
for step in range(first_step, max_iters + 1):
    # evaluate: all ranks take part
    if step % eval_interval == 0 or step == max_iters:
        val_loss, accuracy, gold_accuracy = evaluate()
        print0(f'step {step:6d} | val loss {val_loss:.4f} | {accuracy:.1%} of held-out pairs as the labeller'
               + (f', {gold_accuracy:.1%} as the gold order' if gold_accuracy is not None else ''))
        log(step=step, val_loss=val_loss, accuracy=accuracy, gold_accuracy=gold_accuracy)
    leave = lib.stopping(run)
    if leave or step == max_iters or step > first_step and step % save_interval == 0:
        more = dict(seconds=seconds + time.time() - started, smooth=smooth, n_tokens=n_tokens, n_sampled=n_sampled,
                    self_agreement=self_agreement)
        if run.master and step < max_iters:
            lib.save_resume(resume_path, step, [raw_model], optimizers, config, **more)
    if leave and step < max_iters:
        die(f'stopped at step {step} and saved: the same command goes on from there')
    if step == max_iters:
        break

    # forward and backward: the sum over all pairs of the step, divided by their number on all ranks
    lib.seed_step(seed, step, run.rank)
    lr, t1, batch = get_lr(step), time.time(), get_batch(step)
    margins = pair_margins(score(model, batch), batch)                            # (pairs,)
    n_pairs, n_seen = lib.all_sum(len(margins), sum(len(ids) for answers, _ in batch for ids in answers))
    loss = -F.logsigmoid(margins).sum() / n_pairs
    (loss * run.world).backward() # DDP takes the mean over ranks, the sum is wanted
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or float('inf')).item()
    lossf, right = lib.all_sum(loss.item(), (margins > 0).sum().item())
    n_tokens += n_seen

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
        left = (time.time() - t0) / (step - first_step + 1) * (max_iters - step - 1)
        print0(f'step {step:6d} | loss {smooth / (1 - 0.9 ** (step + 1)):.4f} | {right / n_pairs:.0%} right '
               f'| lr {lr:.2e} | norm {norm:.3f} | {n_seen / (time.time() - t1):,.0f} tok/s '
               f'| {100 * (step + 1) / max_iters:.0f}%, {left:.0f} s left')
        log(step=step, loss=lossf, accuracy=right / n_pairs, lr=lr, norm=norm)

# -----------------------------------------------------------------------------
# normalise: mean 0 and standard deviation 1 over the answers that were ranked
with torch.no_grad():
    scores = torch.cat([score(raw_model, train[i:i + batch_size]) for i in range(0, len(train), batch_size)])
    mean, std = scores.mean(), scores.std().clamp(min=1e-4)
    raw_model.mean.copy_(mean)
    raw_model.std.copy_(std)
    again = (scores - mean) / std # what the model says from now on
print0(f'scores of the ranked answers: mean {mean:.3f}, std {std:.3f}; then {again.mean():.3f}, {again.std():.3f}')

# -----------------------------------------------------------------------------
# save
if run.master:
    lengths = [len(ids) for answers, _ in train for ids in answers]
    n_read = sum(lengths) + n_sampled # for the normalisation and the sampling: forward only, a third of the cost
    per_token = raw_model.body.flops_per_token(sum(lengths) / len(lengths))
    metrics = dict(val_loss=val_loss, accuracy=accuracy, gold_accuracy=gold_accuracy, self_agreement=self_agreement,
                   seconds=more['seconds'], tokens=n_tokens, flops=per_token * (n_tokens + n_read / 3))
    lib.save_checkpoint(out_path, 'reward', raw_model, tok, config, max_iters, metrics)
    print(f'saved {out_path}: {accuracy:.1%} of held-out pairs as the labeller, {more["seconds"]:.0f} s')
lib.finish(run)
