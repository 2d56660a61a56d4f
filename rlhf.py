"""
Stage 4: reinforcement learning from human feedback. PPO (Schulman et al. 2017) on the answers of the model itself, with
the reward model as judge and a KL penalty that keeps it near the SFT model (Ziegler et al. 2019; Ouyang et al. 2022).

Reads  out_dir/sft.pt, reward.pt, data_dir/prompts_train.jsonl, prompts_val.jsonl
Writes out_dir/rlhf.pt, rlhf.jsonl (the curves), rlhf.resume.pt while it runs

on a laptop        $ python rlhf.py config/tiny.py
on 8 GPUs          $ torchrun --standalone --nproc_per_node=8 rlhf.py

Four models: the actor answers and learns; the critic, started from the reward model, guesses how an answer will be
scored, at each of its tokens; the reference (the SFT model) and the reward model are frozen. One update:
    1. roll out: the actor answers a batch of prompts
    2. look back: log-probabilities of actor and reference, values of the critic, at every token of the answers
    3. score: the reward model reads each whole answer; an answer that did not stop is fined
    4. rewards: at every token -kl_coef * (logprob - ref_logprob), at the last one the score on top
    5. advantages by GAE, whitened
    6. learn: several passes of minibatches over the clipped PPO losses
Left out: an entropy bonus (the KL penalty keeps the answers spread), the mix-in of pretraining gradients (PPO-ptx), the
reuse of old answers.
"""
import functools, math, os, time

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import model as lib
from configurator import configure
from model import ScalarModel, Tokenizer, die, print0

# -----------------------------------------------------------------------------
# settings
# data
data_dir = 'data/toytown'   # where prompts_train.jsonl and prompts_val.jsonl are
out_dir = 'out/toytown'     # where sft.pt and reward.pt are, and rlhf.pt goes
# rollout
max_iters = 200             # updates; each answers a fresh batch of prompts
batch_size = 64             # prompts in an update, on each process
max_new_tokens = 64         # longest answer
temperature = 1.0           # of sampling; also divides the logits wherever log-probabilities are taken
missing_end_penalty = 1.0   # subtracted from the score of an answer that did not stop in time
# KL penalty
kl_coef = 0.05              # price of a nat away from the SFT model, in units of the normalised score
kl_target = 0.0             # nats an answer; > 0 adapts kl_coef towards it (Ziegler et al. 2019)
kl_horizon = 10000          # answers over which kl_coef adapts
# PPO
ppo_epochs = 4              # passes over the answers of an update
minibatch_size = 64         # answers in an optimizer step, on each process; divides batch_size
micro_batch_size = 64       # answers in a forward pass; divides minibatch_size: lower it for memory, results stay
gamma = 1.0                 # discount of later rewards
lam = 0.95                  # GAE: 0 trusts the critic, 1 the rewards
cliprange = 0.2             # the ratio of new to old probability earns nothing outside 1 +- this
cliprange_value = 0.2       # the critic moves at most this far from its old value; 0 = any
vf_coef = 0.1               # weight of the critic's loss
target_kl = 0.0             # leave the passes early when new and old policy are this many nats a token apart; 0 = never
# optimizer
learning_rate = 1e-5        # at its highest; then linear to 0
warmup_iters = 0            # updates of linear rise
weight_decay = 0.0          # of matrices
beta1 = 0.9                 # AdamW: memory of the gradient
beta2 = 0.95                # AdamW: memory of its square
adam_eps = 1e-5             # AdamW: larger than usual, calms the first updates
grad_clip = 1.0             # longest gradient; 0 = any
# evaluation and log
eval_interval = 20          # updates between evaluations on held-out prompts
eval_prompts = 200          # held-out prompts in one evaluation
sample_interval = 20        # updates between printed answers
save_interval = 20          # updates between saves of rlhf.resume.pt
# system
device = 'auto'             # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'              # auto, float32, bfloat16
seed = 1337                 # of the prompts' order and the answers
resume = True               # go on from rlhf.resume.pt if a killed run left one
config = configure(globals())

# -----------------------------------------------------------------------------
# device, models. Dropout is off in all four: else the ratio would not be 1 at the first step
run = lib.start(config)
if temperature <= 0:
    die(f'temperature is {temperature}: a policy that always takes the likeliest token explores nothing, take 1.0')
if batch_size % minibatch_size or minibatch_size % micro_batch_size:
    die(f'batch_size {batch_size} must be a multiple of minibatch_size {minibatch_size}, and that of micro_batch_size '
        f'{micro_batch_size}: --minibatch_size={batch_size} --micro_batch_size={batch_size}')
sft = lib.load_checkpoint(os.path.join(out_dir, 'sft.pt'), ['sft'], f'python sft.py --out_dir={out_dir}')
rm = lib.load_checkpoint(os.path.join(out_dir, 'reward.pt'), ['reward'], f'python reward.py --out_dir={out_dir}')
if sft['tokenizer'] != rm['tokenizer']:
    die(f'sft.pt and reward.pt have different tokenizers: run `python reward.py --out_dir={out_dir}` again')
sft['model_args']['dropout'] = rm['model_args']['dropout'] = 0.0
tok = Tokenizer(sft['tokenizer'])
block_size = min(sft['model_args']['block_size'], rm['model_args']['block_size'])

class ActorCritic(nn.Module):
    """Policy and value function in one module: one DDP wrap, one optimizer, one gradient norm."""

    def __init__(self, actor, critic):
        super().__init__()
        self.actor, self.critic = actor, critic

    def forward(self, ids, actions):
        return *get_logprobs(self.actor, ids, actions), self.critic(ids)[:, :-1]

def get_logprobs(policy, ids, actions):
    """
    ids (B, T) and actions (B, T-1), True where ids[:, 1:] is a token of the answer -> log-probabilities of those tokens
    and entropies of their distributions, both (B, T-1), 0 elsewhere. Logits are made at the answers' positions only.
    """
    logits = policy.head(policy.hidden(ids)[:, :-1][actions]).float() / temperature  # (actions, V)
    logp = F.log_softmax(logits, dim=-1)
    chosen = logp.gather(-1, ids[:, 1:][actions][:, None]).squeeze(-1)            # (actions,)
    entropy = -(logp.exp() * logp).sum(-1)
    zeros = torch.zeros(actions.shape, device=ids.device)
    return zeros.masked_scatter(actions, chosen), zeros.masked_scatter(actions, entropy)

raw_model = ActorCritic(lib.load_model(sft, run.device), lib.load_model(rm, run.device, ScalarModel))
reference = lib.load_model(sft, run.device).requires_grad_(False)
reward_model = lib.load_model(rm, run.device, ScalarModel).requires_grad_(False)
optimizers = lib.make_optimizers(raw_model, learning_rate, weight_decay, (beta1, beta2), adam_eps)
resume_path, out_path = os.path.join(out_dir, 'rlhf.resume.pt'), os.path.join(out_dir, 'rlhf.pt')
config['starts_from'] = [round(ckpt['metrics']['seconds'], 3) for ckpt in (sft, rm)] # tells them from others
first_step, more = lib.load_resume(resume_path, [raw_model], optimizers, config, resume)
model = DDP(raw_model, device_ids=[run.device.index] if run.type == 'cuda' else None) if run.ddp else raw_model

# -----------------------------------------------------------------------------
# prompts
def load_prompts(split):
    """The split's prompts: [(row, ids)]. Prompts that leave no room for an answer are counted and left out."""
    path, prompts, too_long = os.path.join(data_dir, f'prompts_{split}.jsonl'), [], 0
    for row, ids in lib.read_prompts(path, tok, data_dir):
        if len(ids) + max_new_tokens + 1 > block_size: # + 1 for the <|end|> that scoring may add
            too_long += 1
        else:
            prompts.append((row, ids))
    if too_long:
        print0(f'{path}: {too_long} of {too_long + len(prompts)} prompts leave no room for {max_new_tokens} new tokens')
    if not prompts:
        die(f'{path}: no prompt leaves room for {max_new_tokens} new tokens in {block_size}: lower --max_new_tokens')
    return prompts

train, val = load_prompts('train'), load_prompts('val')
print0(f'data: {len(train):,} prompts, {batch_size * run.world} an update, {max_iters} updates = '
       f'{max_iters * batch_size * run.world / len(train):.1f} passes; {len(val)} prompts to validate')

@functools.lru_cache(maxsize=2) # an update may lie across two passes
def get_order(epoch):
    """A seeded shuffle of the prompts, the same on all ranks."""
    return np.random.default_rng((seed, epoch)).permutation(len(train))

def get_prompts(step):
    """The prompts of this process in this update; they depend on (seed, step, rank) only."""
    rows = []
    for g in range((step * run.world + run.rank) * batch_size, (step * run.world + run.rank + 1) * batch_size):
        rows.append(train[get_order(g // len(train))[g % len(train)]])
    return rows

# -----------------------------------------------------------------------------
# phases 1 to 3: answers, what the models say of them, scores
@torch.no_grad()
def rollout(prompts):
    """
    Answer the prompts. Returns ids (B, T): prompt + answer, padded right; actions (B, T-1): True where ids[:, 1:] is of
    the answer; logprobs, ref_logprobs, entropy, values (B, T-1), 0 outside of actions; score, ended (B,); texts.
    """
    # 1. roll out: pure sampling (no top-k, no top-p), since the ratio assumes that answers come from the policy itself
    with run.autocast():
        queries = [ids for _, ids in prompts]
        responses = lib.generate(raw_model.actor, queries, max_new_tokens, tok.end, temperature)
        ids = lib.pad_right([q + r for q, r in zip(queries, responses)], tok.pad, run.device) # (B, T)
        first = torch.tensor([len(q) for q in queries], device=run.device)[:, None]
        last = torch.tensor([len(q) + len(r) for q, r in zip(queries, responses)], device=run.device)[:, None]
        at = torch.arange(1, ids.size(1), device=run.device)
        actions = (at >= first) & (at < last)                                     # (B, T-1)

        # 2. look back
        parts = [(*raw_model(i, a), get_logprobs(reference, i, a)[0])
                 for i, a in zip(ids.split(micro_batch_size), actions.split(micro_batch_size))]
        logprobs, entropy, values, ref_logprobs = map(torch.cat, zip(*parts))

        # 3. score the text that would be shown: up to <|end|>, which is added where the answer was cut off
        ended = torch.tensor([r[-1] == tok.end for r in responses], device=run.device)
        scored = [q + r + [tok.end] * (r[-1] != tok.end) for q, r in zip(queries, responses)]
        score = torch.cat([lib.at_end(reward_model(lib.pad_right(part, tok.pad, run.device)), part)
                           for i in range(0, len(scored), micro_batch_size)
                           for part in [scored[i:i + micro_batch_size]]])                     # (B,)
    return ids, actions, logprobs, ref_logprobs, entropy, values * actions, score, ended, list(map(tok.said, responses))

# -----------------------------------------------------------------------------
# phases 4 and 5: rewards, advantages
def get_rewards(score, ended, logprobs, ref_logprobs, actions, kl_coef):
    """(B, T-1): the KL penalty (the k1 estimator: unbiased) at each token, the score at the last."""
    rewards = -kl_coef * (logprobs - ref_logprobs) * actions
    last = actions.size(1) - 1 - actions.int().flip(1).argmax(1)                              # (B,)
    rewards[torch.arange(len(last)), last] += score - missing_end_penalty * ~ended
    return rewards

def gae(rewards, values, actions):
    """
    Generalised advantage estimation (Schulman et al. 2016): sum over l of (gamma lam)^l delta_{t+l}, from the right,
    with delta_t = r_t + gamma V_{t+1} - V_t, V = 0 after the answer. All (B, T-1) -> advantages, returns, 0 outside.
    """
    advantages, last_gae, next_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        last_gae = (delta + gamma * lam * last_gae) * actions[:, t]
        next_value = values[:, t] * actions[:, t]
        advantages[:, t] = last_gae
    return advantages, (advantages + values) * actions

def masked_mean(x, mask):
    """Mean of x where mask is True, over all ranks: pads are no actions."""
    total, n = lib.all_sum((x * mask).sum().item(), mask.sum().item())
    return total / max(1, n)

def variance(x, mask):
    """Variance of x where mask is True, over all ranks."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

def whiten(x, mask):
    """Mean 0 and variance 1 over the unmasked entries of all ranks; 0 elsewhere."""
    return (x - masked_mean(x, mask)) * mask / math.sqrt(variance(x, mask) + 1e-8)

@torch.no_grad()
def evaluate():
    """Held-out prompts, always the same seed: mean proxy score, KL, share that stops; gold score and checks met."""
    rows = val[:eval_prompts][run.rank::run.world]
    lib.seed_step(seed, 0, run.rank)
    total = np.zeros(7)
    for i in range(0, len(rows), batch_size):
        prompts = rows[i:i + batch_size]
        _, actions, logprobs, ref_logprobs, entropy, _, score, ended, texts = rollout(prompts)
        grades = [lib.grade(row['checks'], text) for (row, _), text in zip(prompts, texts) if row.get('checks')]
        total += [len(prompts), score.sum().item(), (logprobs - ref_logprobs).sum().item(), ended.sum().item(),
                  len(grades), sum(s for _, s in grades), sum(m for m, _ in grades)]
    n, score, kl, ended, graded, gold, met = lib.all_sum(*total)
    return dict(val_score=score / n, val_kl=kl / n, val_ended=ended / n,
                **(dict(val_gold=gold / graded, val_met=met / graded) if graded else {}))

def get_lr(step):
    """Linear warm-up, then linear down to 0."""
    return learning_rate * min((step + 1) / (warmup_iters + 1), (max_iters - step) / max(1, max_iters - warmup_iters))

# -----------------------------------------------------------------------------
# the loop
log = lib.open_log(os.path.join(out_dir, 'rlhf.jsonl'), first_step)
run.catch_signals()
kl_coef, seconds, n_tokens = more.get('kl_coef', kl_coef), more.get('seconds', 0.0), more.get('n_tokens', 0)
bad, t0, held_out = 0, time.time(), {}
for step in range(first_step, max_iters + 1):
    # evaluate: all ranks take part
    if step % eval_interval == 0 or step == max_iters:
        held_out = evaluate()
        print0(f'step {step:5d} | held out: ' + ' | '.join(f'{k[4:]} {v:.3f}' for k, v in held_out.items()))
        log(step=step, **held_out)
    leave = lib.stopping(run)
    if leave or step == max_iters or step > first_step and step % save_interval == 0:
        more = dict(seconds=seconds + time.time() - t0, n_tokens=n_tokens, kl_coef=kl_coef)
        if run.master and step < max_iters:
            lib.save_resume(resume_path, step, [raw_model], optimizers, config, **more)
    if leave and step < max_iters:
        die(f'stopped at step {step} and saved: the same command goes on from there')
    if step == max_iters:
        break

    # phases 1 to 5
    lib.seed_step(seed, step + 1, run.rank) # ranks draw different answers
    lr, t1, prompts = get_lr(step), time.time(), get_prompts(step)
    ids, actions, logprobs, ref_logprobs, entropy, values, score, ended, texts = rollout(prompts)
    rewards = get_rewards(score, ended, logprobs, ref_logprobs, actions, kl_coef)
    advantages, returns = gae(rewards, values, actions)
    advantages = whiten(advantages, actions)

    # 6. learn
    stats = {k: [] for k in ('approx_kl', 'clipfrac', 'ratio', 'ratio_gap', 'pg_loss', 'v_loss', 'norm')}
    for epoch in range(ppo_epochs):
        order = torch.randperm(batch_size)
        for mini in order.split(minibatch_size):
            n_actions = lib.all_sum(actions[mini].sum().item())[0]
            sums = torch.zeros(6)
            for micro, mb in enumerate(mini.split(micro_batch_size)):
                if run.ddp: # gradients travel only with the last micro-batch
                    model.require_backward_grad_sync = (micro + 1) * micro_batch_size >= minibatch_size
                with run.autocast():
                    mb_logprobs, _, mb_values = model(ids[mb], actions[mb])       # (micro, T-1)
                log_ratio = (mb_logprobs - logprobs[mb]) * actions[mb]
                ratio = log_ratio.exp()
                pg_loss = torch.max(-advantages[mb] * ratio,
                                    -advantages[mb] * ratio.clamp(1 - cliprange, 1 + cliprange))
                v_loss = (mb_values - returns[mb]) ** 2
                if cliprange_value:
                    v_clipped = values[mb] + (mb_values - values[mb]).clamp(-cliprange_value, cliprange_value)
                    v_loss = torch.max(v_loss, (v_clipped - returns[mb]) ** 2)
                loss = ((pg_loss + vf_coef * 0.5 * v_loss) * actions[mb]).sum() / n_actions
                (loss * run.world).backward() # DDP takes the mean over ranks, the sum is wanted
                with torch.no_grad():
                    k3 = ratio - 1 - log_ratio # Schulman's estimator of KL(old || new): never negative, low variance
                    gap = (ratio - 1).abs()
                    parts = (k3, gap > cliprange, ratio, gap, pg_loss, 0.5 * v_loss)
                    sums += torch.stack([(p * actions[mb]).sum() for p in parts]).cpu()
            sums = [s / n_actions for s in lib.all_sum(*sums)]
            norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or float('inf')).item()
            stop = not math.isfinite(norm) or 0 < target_kl < sums[0]
            if not stop:
                for opt in optimizers:
                    for group in opt.param_groups:
                        group['lr'] = lr
                    opt.step()
            raw_model.zero_grad(set_to_none=True)
            for name, value in zip(stats, sums + [norm]):
                stats[name].append(value)
            if stop:
                break
        if stop:
            break
    bad = 0 if math.isfinite(norm) else bad + 1
    if bad:
        print0(f'step {step}: gradient norm {norm}: skipped ({bad} in a row)')
    if bad == 5:
        die('5 updates in a row without a finite gradient: lower --learning_rate or raise --kl_coef; the last good '
            f'state, if one was saved, is {resume_path}')

    # log: the curves to watch are score, kl and gold; the losses tell little
    grades = [(lib.grade(row['checks'], text)) for (row, _), text in zip(prompts, texts) if row.get('checks')]
    row_kl = (logprobs - ref_logprobs).sum(1)                                  # (B,) nats an answer
    n, s, s2, kl, length, stopped, graded, gold, met, seen = lib.all_sum(
        batch_size, score.sum().item(), (score ** 2).sum().item(), row_kl.sum().item(), actions.sum().item(),
        ended.sum().item(), len(grades), sum(g for _, g in grades), sum(m for m, _ in grades),
        (ids != tok.pad).sum().item())
    # k3 is steady near the reference only: far from it, its tail is heavy and single updates jump
    k3 = masked_mean((ref_logprobs - logprobs).exp() - 1 - (ref_logprobs - logprobs), actions) * length / n
    line = dict(step=step, score=s / n, score_std=math.sqrt(max(0, s2 / n - (s / n) ** 2)), kl=kl / n, kl_k3=k3,
                rlhf_reward=(s - kl_coef * kl) / n, entropy=masked_mean(entropy, actions), length=length / n,
                ended=stopped / n, ratio_gap_first=stats['ratio_gap'][0], kl_coef=kl_coef, lr=lr,
                explained_variance=1 - variance(returns - values, actions) / max(1e-8, variance(returns, actions)),
                **{k: float(np.mean(v)) for k, v in stats.items()})
    if graded:
        line.update(gold=gold / graded, met=met / graded)
    log(**line)
    n_tokens += seen
    left = (time.time() - t0) / (step - first_step + 1) * (max_iters - step - 1)
    print0(f'step {step:5d} | score {line["score"]:+.3f} | kl {line["kl"]:.2f} | '
           + (f'gold {line["gold"]:.3f} | met {line["met"]:.0%} | ' if graded else '')
           + f'entropy {line["entropy"]:.3f} | clip {line["clipfrac"]:.3f} | length {line["length"]:.1f} | '
           f'ended {line["ended"]:.0%} | norm {line["norm"]:.2f} | {time.time() - t1:.1f} s, {left:.0f} s left')
    if step % sample_interval == 0:
        for (row, _), text, sc, k in list(zip(prompts, texts, score.tolist(), row_kl.tolist()))[:3]:
            print0(f'    {row["messages"][-1]["content"]!r}\n      -> {text!r} (score {sc:+.2f}, kl {k:.1f})')
    if kl_target: # proportional controller, fed by the KL of all ranks, so that they stay together
        kl_coef *= 1 + float(np.clip(line['kl'] / kl_target - 1, -0.2, 0.2)) * n / kl_horizon

# -----------------------------------------------------------------------------
# save
if run.master:
    # a token is sampled once, read by four models, learned by two ppo_epochs times; reading costs a third of learning
    per_token = raw_model.actor.flops_per_token(n_tokens / max(1, max_iters * batch_size * run.world))
    flops = per_token * n_tokens * (5 / 3 + 2 * ppo_epochs)
    metrics = dict(**held_out, seconds=more['seconds'], flops=flops, tokens=n_tokens)
    lib.save_checkpoint(out_path, 'rlhf', raw_model.actor, tok, config, max_iters, metrics)
    print(f'saved {out_path}: score {held_out["val_score"]:+.3f}, KL {held_out["val_kl"]:.2f} nats an answer, '
          f'{more["seconds"]:.0f} s')
lib.finish(run)
