"""
Stage 4: reinforcement learning from human feedback (RLHF). The SFT model, now called the policy,
answers prompts; the reward model scores the answers; the policy learns to give answers with higher
scores, and a KL penalty keeps it close to the SFT model (Ziegler et al. 2019; Stiennon et al. 2020;
Ouyang et al. 2022). The default algorithm is PPO (Schulman et al. 2017).

Reads   out_dir/sft.pt, out_dir/reward.pt, data_dir/prompts_train.jsonl, data_dir/prompts_val.jsonl
Writes  out_dir/rlhf.pt, out_dir/rlhf.jsonl (the curves), out_dir/rlhf.resume.pt while it runs

on a laptop    $ python rlhf.py config/tiny.py
on one GPU     $ python rlhf.py
on 8 GPUs      $ torchrun --standalone --nproc_per_node=8 rlhf.py
on two nodes   $ torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 rlhf.py
               $ torchrun --nproc_per_node=8 --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 rlhf.py
no critic      $ python rlhf.py config/tiny.py --algo=grpo --group_size=8
no reward model, but a program that checks the answers (RL with verifiable rewards)
               $ python rlhf.py config/tiny.py --algo=grpo --group_size=8 --reward=checks --task=sum
a second round: rank answers of the RLHF model, train a new reward model, and go on from there
               $ python reward.py config/tiny.py --init_from=out/toytown/rlhf.pt --out_dir=out/round2
               $ python rlhf.py config/tiny.py --init_from=out/toytown/rlhf.pt --out_dir=out/round2

Four models take part in PPO. The actor (the policy) writes the answers; it starts as the SFT model.
The critic (the value function) predicts, at each token of an answer, the reward that is still to
come; it starts as the reward model. Both are trained. The reference (the SFT model) and the reward
model are frozen. One update has six phases:
    1. roll out: the actor answers a batch of prompts
    2. log-probabilities and values: actor, reference and critic read the answers
    3. score: the reward model, or a program, scores each answer
    4. rewards: each token gets -kl_coef * (logprob - ref_logprob), the last one also the score
    5. advantages: was the answer, or this token of it, better than expected?
    6. learn: several epochs of minibatches; tokens with positive advantages become more likely
The algorithms differ mainly in phase 5: each has another expectation, see get_advantages. A few
lines of get_loss differ, too: GRPO has its KL penalty there. Only PPO has a critic.

Shapes: B answers (responses), P tokens of a prompt (query), R tokens of its answer, T the largest
P + R of a batch, C n_embd, V vocab_size. The logits at one token predict the next token. So tensors
that describe tokens have T-1 positions: position t belongs to token t+1. With P = 5, R = 3, T = 9:

    token                   0       1       2       3       4       5       6       7       8
    query_responses (B, T)  <eot>   <user>  Job?    <end>   <asst>  A       baker   <end>   <pad>
    position                        0       1       2       3       4       5       6       7
    response_mask (B, T-1)          0       0       0       0       1       1       1       0
    logprobs      (B, T-1)          0       0       0       0       -0.8    -1.6    -0.1    0
    values        (B, T-1)          0       0       0       0       +0.2    +0.3    +0.6    0
    rewards       (B, T-1)          0       0       0       0       -c*kl   -c*kl   s-c*kl  0

The mask is 1 at positions P-1 to P+R-2. The value at position t is predicted before token t+1 is
known. c is kl_coef, kl is logprob - ref_logprob, and s is the score, minus a penalty if <end> is
missing. `grep 'PPO detail' rlhf.py` lists the details that decide whether PPO works. The script
prints one answer as such a table, and answers the same prompts at each evaluation.

What to watch                  healthy               sick
    gold (checks), and score   both rise             falls: the policy exploits the reward model
    kl, in nats per answer     grows to 2 .. 20      beyond: raise kl_coef
    explained_variance         above 0, rising       below 0: the critic is worse than a constant
    ratio_gap_first            0, up to rounding     not 0: phases 2 and 6 disagree
    ended                      above 0.95            below: raise missing_end_penalty
    duplicates, entropy        change slowly         all answers become one

Left out: an entropy bonus (the KL penalty already keeps the answers diverse), pretraining gradients
(PPO-ptx), a replay buffer (an answer is used in one update only), a running scale of the scores
(reward.py has scaled them, and whitening removes what is left).
"""
from configurator import configure # first, so that Ctrl-C gives no traceback while torch loads
import functools
import math
import os
import time
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from model import (
    ScalarModel, Tokenizer, all_gather_list, all_sum, catch_signals, cleanup, gather, generate,
    get_state, grade, last_token, load_checkpoint, load_model, load_resume, make_optimizers,
    open_log, pad_right, print0, read_prompts, save_checkpoint, save_resume, seed_step, set_state,
    setup, shard, should_stop)

# -----------------------------------------------------------------------------
# settings
# data
data_dir = 'data/toytown'   # folder of the data
out_dir = 'out/toytown'     # folder of the checkpoints and logs
init_from = ''              # the policy to start from, also the reference; empty = out_dir/sft.pt
reward_from = ''            # the reward model; empty = out_dir/reward.pt
task = ''                   # only the prompts of this task, such as sum; empty = all
# algorithm
algo = 'ppo'                # ppo, grpo, rloo or reinforce: see get_advantages
group_size = 1              # answers to each prompt; grpo and rloo compare these: at least 2
baseline = True             # reinforce: subtract the mean return
group_std = True            # grpo: divide by the standard deviation of the group
length_norm = True          # grpo: divide the loss of an answer by its length
critic = 'separate'         # ppo: separate, a model of its own; shared, a head on the actor
# reward
reward = 'model'            # model: its score; checks: 1 if all are met, else 0; both: the sum
score_clip = 0.0            # clip the scores to this distance from 0; 0 = off
missing_end_penalty = 1.0   # subtracted from the score of an answer without <|end|>
kl_coef = 0.05              # KL penalty coefficient (reward per nat of KL from the reference)
kl_target = 0.0             # adapt kl_coef to reach this KL, in nats per answer; 0 = off
kl_horizon = 10000          # number of answers over which kl_coef adapts
# rollout
max_iters = 200             # number of updates; each one answers a new batch of prompts
batch_size = 64             # answers per update, over all processes
sample_batch = 256          # answers that a process samples at a time; lower = less memory
max_new_tokens = 64         # maximum length of an answer, in tokens
temperature = 1.0           # sampling temperature; also used for all log-probabilities
# learning
ppo_epochs = 4              # passes over the answers of one update; use 1 with reinforce
minibatch_size = 64         # answers per optimizer step, over all processes; divides batch_size
micro_batch_size = 64       # most answers in a forward pass of one process; lower = less memory
gamma = 1.0                 # ppo: discount factor of later rewards
gae_lambda = 0.95           # ppo: GAE lambda, 0 = trust the critic, 1 = trust the rewards
cliprange = 0.2             # clip range for the probability ratio; not used by reinforce
cliprange_value = 0.2       # ppo: clip range for the change of a value; 0 = off
vf_coef = 0.1               # ppo: coefficient of the value loss
target_kl = 0.0             # end the PPO epochs early above this KL from the old policy; 0 = off
# optimizer
learning_rate = 1e-5        # max learning rate
critic_learning_rate = 0.0  # critic='separate': its max learning rate; 0 = learning_rate
warmup_iters = 0            # updates of linear warm-up
weight_decay = 0.0          # weight decay of matrices; vectors do not decay
beta1 = 0.9                 # adamw: decay rate of the first moment
beta2 = 0.95                # adamw: decay rate of the second moment
adam_eps = 1e-5             # adamw: epsilon; PyTorch's default is 1e-8
grad_clip = 1.0             # clip the gradient norm at this value; 0 = off
# evaluation and log
eval_interval = 20          # updates between evaluations
eval_prompts = 200          # validation prompts in one evaluation
sample_interval = 20        # updates between printed tables of an answer
snapshots = False           # keep the actor of each evaluation, as rlhf.00020.pt
save_interval = 20          # updates between saves of the resume file
# system
parallel = 'ddp'            # several processes: ddp, or fsdp (large models)
device = 'auto'             # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'              # auto, float32, bfloat16
seed = 1337                 # seed of everything random
resume = True               # continue from the resume file if an interrupted run has left one
config = configure(globals())

for name in ('group_size', 'max_iters', 'batch_size', 'sample_batch', 'max_new_tokens',
             'kl_horizon', 'ppo_epochs', 'minibatch_size', 'micro_batch_size', 'eval_interval',
             'eval_prompts', 'sample_interval', 'save_interval'):
    assert config[name] > 0, f'{name} must be positive, not {config[name]}'
for name in ('score_clip', 'missing_end_penalty', 'kl_coef', 'kl_target', 'gamma', 'gae_lambda',
             'cliprange', 'cliprange_value', 'vf_coef', 'target_kl', 'learning_rate',
             'critic_learning_rate', 'warmup_iters', 'weight_decay', 'adam_eps', 'grad_clip'):
    assert config[name] >= 0, f'{name} must be at least 0, not {config[name]}'
for name in ('beta1', 'beta2'):
    assert 0 <= config[name] < 1, f'{name} must be at least 0 and below 1, not {config[name]}'
for name, allowed in (('algo', ('ppo', 'grpo', 'rloo', 'reinforce')),
                      ('critic', ('separate', 'shared')), ('reward', ('model', 'checks', 'both')),
                      ('parallel', ('ddp', 'fsdp'))):
    assert config[name] in allowed, f'{name} must be one of {allowed}, not {config[name]!r}'
assert temperature >= 0.01, (
    f'temperature must be at least 0.01, not {temperature}: greedy answers explore nothing')
assert group_size > 1 or algo not in ('grpo', 'rloo'), (
    f'{algo} compares the answers to one prompt, so it needs more than 1: --group_size=8')

# -----------------------------------------------------------------------------
# device and checkpoints
run = setup(config)
ddp = run.world_size > 1 and parallel == 'ddp'
fsdp = run.world_size > 1 and parallel == 'fsdp'
stage = 'rlhf'
# PPO detail: minibatch updates. A minibatch is one optimizer step; micro-batches only save memory.
# Each process answers whole groups, and has an equal share of each minibatch.
nearest_minibatch = max(1, round(minibatch_size / run.world_size)) * run.world_size
multiple = math.lcm(nearest_minibatch, group_size * run.world_size)
nearest_batch = max(1, round(batch_size / multiple)) * multiple
assert minibatch_size == nearest_minibatch and batch_size == nearest_batch, (
    f'batch_size {batch_size} must be a multiple of minibatch_size {minibatch_size} and of '
    f'group_size {group_size} x {run.world_size} processes, minibatch_size of {run.world_size}: '
    f'--batch_size={nearest_batch} --minibatch_size={nearest_minibatch}')
own_batch_size = batch_size // run.world_size # of this process
own_minibatch_size = minibatch_size // run.world_size
sft_path = init_from or os.path.join(out_dir, 'sft.pt')
sft = load_checkpoint(sft_path, ['sft', 'dpo', 'rlhf'], f'python sft.py --out_dir={out_dir}')
tok = Tokenizer(sft['tokenizer'])
block_size = sft['model_args']['block_size']
# their run times identify the checkpoints
config['starts_from'] = [sft['metrics'].get('seconds')]
reward_ckpt = None # stays None if a program scores the answers
if reward != 'checks':
    reward_path = reward_from or os.path.join(out_dir, 'reward.pt')
    reward_ckpt = load_checkpoint(reward_path, ['reward'], f'python reward.py --out_dir={out_dir}')
    assert sft['tokenizer'] == reward_ckpt['tokenizer'], (
        f'{sft_path} and {reward_path} have different tokenizers: make the reward model again with '
        f'`python reward.py --out_dir={out_dir}`')
    block_size = min(block_size, reward_ckpt['model_args']['block_size'])
    config['starts_from'].append(reward_ckpt['metrics'].get('seconds'))
    if reward_ckpt['config'].get('starts_from') != sft['metrics'].get('seconds'):
        print0(f'warning: {reward_path} was not made from {sft_path} and may misjudge its answers: '
               f'`python reward.py --init_from={sft_path} --out_dir={out_dir}` makes it again')
resume_path = os.path.join(out_dir, f'{stage}.resume.pt')
out_path = os.path.join(out_dir, f'{stage}.pt')

# -----------------------------------------------------------------------------
# prompts
def load_prompts(split):
    """The prompts of a split: list of (row, ids), without those that leave no room to answer."""
    path = os.path.join(data_dir, f'prompts_{split}.jsonl')
    prompts = []
    n_too_long = 0
    for row, ids in read_prompts(path, tok):
        if task and row.get('task') != task:
            continue
        assert reward == 'model' or row.get('checks'), (
            f'{path}: reward={reward} needs checks, this prompt has none: {row["messages"]}: use '
            f'--reward=model, or --task=NAME to take only prompts that have them')
        if len(ids) + max_new_tokens + 1 > block_size: # + 1: phase 3 may append <|end|>
            n_too_long += 1
        else:
            prompts.append((row, ids))
    if n_too_long:
        print0(f'{path}: left out {n_too_long} of {n_too_long + len(prompts)} prompts, '
               f'no room for {max_new_tokens} new tokens')
    assert prompts or n_too_long, f'{path}: no prompt of task {task!r}: leave --task out'
    assert prompts, (f'{path}: no prompt leaves room for {max_new_tokens} new tokens in a context '
                     f'of {block_size}: lower --max_new_tokens')
    return prompts

train_prompts = load_prompts('train')
val_prompts = load_prompts('val')
n_epochs = max_iters * batch_size / group_size / len(train_prompts)
print0(f'data: {len(train_prompts):,} prompts, {len(val_prompts):,} for validation; {batch_size} '
       f'answers an update, {group_size} to each prompt, {max_iters:,} updates, {n_epochs:.1f} epochs')

@functools.lru_cache(maxsize=2) # an update may begin in one epoch and end in the next
def get_order(epoch):
    """A seeded shuffle, the same on all ranks -> indices of train_prompts."""
    return np.random.default_rng((seed, epoch)).permutation(len(train_prompts))

def get_prompts(step):
    """The prompts of this process in this update, each one group_size times in a row."""
    n_prompts = batch_size // run.world_size // group_size
    first = (step * run.world_size + run.rank) * n_prompts
    prompts = []
    for i in range(first, first + n_prompts):
        epoch, place = divmod(i, len(train_prompts))
        prompts += [train_prompts[get_order(epoch)[place]]] * group_size
    return prompts

# -----------------------------------------------------------------------------
# models
class ActorCritic(nn.Module):
    """
    PPO detail: actor and critic in one module, for one DDP or FSDP wrapper and one gradient norm.
    critic: a ScalarModel; or nn.Linear(C, 1), a head on the actor's body; or None.
    """

    def __init__(self, actor, critic):
        super().__init__()
        self.actor = actor
        self.critic = critic

    def forward(self, query_responses, response_mask):
        """ids (B, T), mask (B, T-1) -> logits (N, V) of the N response tokens, values (B, T-1)."""
        hidden = self.actor.hidden(query_responses)             # (B, T, C)
        logits = get_logits(self.actor, hidden, response_mask)
        # PPO detail: the critic reads prompt and response, and predicts before the token is known.
        if self.critic is None:
            values = torch.zeros(query_responses.shape, device=query_responses.device)
        elif isinstance(self.critic, nn.Linear):
            # as in ScalarModel: nn.Linear would compute in bf16 and round to three digits
            values = (hidden.float() * self.critic.weight).sum(-1) + self.critic.bias
        else:
            values = self.critic(query_responses)
        return logits, values[:, :-1]                           # (N, V), (B, T-1)

def get_logits(policy, hidden, response_mask):
    """
    Logits of the N response tokens, (N, V): logits of all tokens would be the largest tensor here.
    hidden: (B, T, C) of the policy. response_mask: (B, T-1), see rollout.
    """
    logits = policy.head(hidden[:, :-1][response_mask]).float() # (N, V)
    # PPO detail: divide the logits by the sampling temperature, here as in generate(). Otherwise
    # these are not the probabilities with which the answers were drawn.
    return logits / temperature

def get_logprobs(logits, query_responses, response_mask):
    """Log-probabilities of the response tokens, (B, T-1), in nats, 0 where the mask is False."""
    next_tokens = query_responses[:, 1:][response_mask]         # (N,) PPO detail: shift by one
    logprobs = -F.cross_entropy(logits, next_tokens, reduction='none') # (N,)
    # put the N numbers back in their places
    zeros = torch.zeros(response_mask.shape, device=query_responses.device)
    return zeros.masked_scatter(response_mask, logprobs)

def freeze(model):
    """Turn off gradients. On a GPU, keep large matrices in the dtype of autocast: less memory."""
    for p in model.parameters():
        p.requires_grad_(False)
        is_large = p.dim() > 1 and len(p) > 1 # ScalarModel.head, with one row, stays in fp32
        if run.device_type == 'cuda' and is_large:
            p.data = p.data.to(run.dtype)
    return model

# PPO detail: no dropout in any of the four models. Otherwise the first ratio is not 1.
sft['model_args']['dropout'] = 0.0
actor = load_model(sft, run.device)
reference = freeze(load_model(sft, run.device))
reward_model = None
value_model = None
if reward_ckpt is not None:
    reward_ckpt['model_args']['dropout'] = 0.0
    reward_model = freeze(load_model(reward_ckpt, run.device, ScalarModel))
if algo == 'ppo' and critic == 'shared':
    # PPO detail: the values start at 0, so the first advantages depend on the rewards only.
    value_model = nn.Linear(actor.config.n_embd, 1).to(run.device)
    nn.init.zeros_(value_model.weight)
    nn.init.zeros_(value_model.bias)
elif algo == 'ppo':
    # PPO detail: separate networks for actor and critic. The critic starts as the reward model.
    value_model = load_model(reward_ckpt or sft, run.device, ScalarModel)
    if reward_ckpt is None:
        nn.init.zeros_(value_model.head.weight)
raw_model = ActorCritic(actor, value_model)
sampler = actor
if fsdp:
    # A forward pass of a sharded model needs all ranks. But they sample until their own longest
    # answer has ended, so each one samples with a whole copy of the actor.
    sampler = load_model(sft, run.device)
    shard(raw_model, run)

# -----------------------------------------------------------------------------
# optimizer, and the state of an interrupted run
# PPO detail: Adam's epsilon is 1e-5. With 1e-8 the first updates are too large.
optimizers = make_optimizers(actor, learning_rate, weight_decay, (beta1, beta2), eps=adam_eps)
if value_model is not None:
    separate_lr = critic_learning_rate if critic == 'separate' else 0.0
    optimizers += make_optimizers(value_model, separate_lr or learning_rate, weight_decay,
                                  (beta1, beta2), eps=adam_eps)
max_lrs = [opt.param_groups[0]['lr'] for opt in optimizers]
first_step = 0
progress = dict(kl_coef=kl_coef, seconds=0.0, n_tokens=0, n_bad_critic=0)
# On another number of processes an update has the same size and prompts, but other random numbers.
saved = load_resume(resume_path, config, resume, may_change=[
    'sample_interval', 'micro_batch_size'])
if saved:
    set_state(raw_model, optimizers, saved['state'])
    first_step = saved['step']
    progress = saved['progress']
model = raw_model
if ddp: # averages the gradients over all ranks; raw_model is the same without this wrapper
    model = DDP(model, device_ids=[run.device.index] if run.device_type == 'cuda' else None)

# -----------------------------------------------------------------------------
# phases 1 to 3: roll out, log-probabilities and values, score
def split_by_length(rows, lengths):
    """
    Sort rows (n,), indices, by length, and split them into micro-batches: [(indices, T), ...]. T is
    the largest length in each. In micro-batches of mixed lengths half of the work is on pads.
    """
    by_length = rows[lengths[rows].argsort(stable=True)]
    parts = by_length.split(micro_batch_size)
    return [(part, lengths[part].max().item()) for part in parts]

@torch.no_grad()
def rollout(prompts, net):
    """
    Answer the prompts, a list of (row, ids). net: the ActorCritic. Returns a namespace:
        query_responses         (B, T) ids of prompt and response, padded on the right
        response_mask           (B, T-1) True where the next token is a response token
        logprobs, ref_logprobs  (B, T-1) of actor and reference; 0 where the mask is False
        entropy, values         (B, T-1) of actor and critic; 0 where the mask is False
        scores                  (B,) of the reward model, of the checks, or of both
        ended                   (B,) False where the response has no <|end|>
        lengths                 (B,) tokens of prompt and response, on the CPU
        texts                   list of B strings, the decoded responses
    """
    # 1. roll out
    # PPO detail: pure sampling, no top-k or top-p: the ratio needs answers of the policy itself.
    # PPO detail: left padding, with positions that do not count the pads. generate() does it.
    queries = [ids for _, ids in prompts]
    responses = []
    for first in range(0, len(queries), sample_batch):
        some = queries[first:first + sample_batch]
        with run.autocast():
            responses += generate(sampler, some, max_new_tokens, tok.end, temperature)
    rows = [query + response for query, response in zip(queries, responses)]
    query_responses = pad_right(rows, tok.pad, run.device)      # (B, T)

    # PPO detail: everything after <|end|> is masked, in all losses and in all means.
    # PPO detail: <|pad|> is not the stop token. Otherwise <|end|> is masked too and never learned.
    prompt_length = torch.tensor([[len(query)] for query in queries], device=run.device)    # (B, 1)
    row_length = torch.tensor([[len(row)] for row in rows], device=run.device)              # (B, 1)
    token = torch.arange(1, query_responses.size(1), device=run.device)             # (T-1,)
    response_mask = (token >= prompt_length) & (token < row_length)                 # (B, T-1)

    # 2. log-probabilities and values
    # PPO detail: the old log-probabilities and values are computed once, before any learning.
    logprobs = torch.zeros(response_mask.shape, device=run.device)
    ref_logprobs = torch.zeros_like(logprobs)
    entropy = torch.zeros_like(logprobs)
    values = torch.zeros_like(logprobs)
    lengths = torch.tensor([len(row) for row in rows])          # (B,)
    all_rows = torch.arange(len(rows))
    for part, T in split_by_length(all_rows, lengths):
        ids = query_responses[part, :T]
        mask = response_mask[part, :T - 1]
        with run.autocast():
            logits, values[part, :T - 1] = net(ids, mask)
            ref_logits = get_logits(reference, reference.hidden(ids), mask)
        logprobs[part, :T - 1] = get_logprobs(logits, ids, mask)
        ref_logprobs[part, :T - 1] = get_logprobs(ref_logits, ids, mask)
        logp = F.log_softmax(logits, dim=-1)                    # (N, V)
        token_entropies = -(logp.exp() * logp).sum(-1)          # (N,)
        entropy[part, :T - 1] = torch.zeros_like(mask, dtype=torch.float).masked_scatter(
            mask, token_entropies)
    values = values * response_mask

    # 3. score
    ended = [row[-1] == tok.end for row in rows]
    texts = [tok.decode_answer(response) for response in responses]
    scores = torch.zeros(len(rows), device=run.device)          # (B,)
    if reward != 'checks':
        # PPO detail: EOS trick. A response is cut at <|end|>. If it has none, <|end|> is appended,
        # because the reward model has learned to score there, and phase 4 subtracts a penalty.
        # PPO detail: the reward model reads prompt and response; the score is at the last token.
        # It reads the decoded text, encoded again. Otherwise the policy could raise its score by
        # spelling a word with unusual tokens, a difference that no labeller can see.
        judged_rows = []
        for (row, _), text in zip(prompts, texts):
            answer = dict(role='assistant', content=text)
            ids, _ = tok.render(row['messages'] + [answer])     # as reward.py renders it
            if len(ids) > block_size: # the same text can take more tokens than the policy used
                ids = ids[:block_size - 1] + [tok.end]
            judged_rows.append(ids)
        judged_lengths = torch.tensor([len(row) for row in judged_rows])
        for part, _ in split_by_length(all_rows, judged_lengths):
            part_rows = [judged_rows[i] for i in part.tolist()]
            with run.autocast():
                token_scores = reward_model(pad_right(part_rows, tok.pad, run.device))
            # PPO detail: reward normalization: reward.py has scaled them to mean 0 and std 1.
            scores[part] = last_token(token_scores, part_rows)
    if reward != 'model': # the only place where a check, the gold reward, becomes part of a reward
        for i, (row, _) in enumerate(prompts):
            all_met, _ = grade(row['checks'], texts[i])
            scores[i] += float(all_met)
    assert scores.isfinite().all(), (
        f'a score is {scores[~scores.isfinite()][0]}: make {reward_path} again with `python reward.py`')
    if score_clip > 0: # PPO detail: reward clipping, against single huge scores
        scores = scores.clamp(-score_clip, score_clip)

    return SimpleNamespace(
        query_responses=query_responses, response_mask=response_mask, logprobs=logprobs,
        ref_logprobs=ref_logprobs, entropy=entropy, values=values, scores=scores, lengths=lengths,
        ended=torch.tensor(ended, device=run.device), texts=texts)

# -----------------------------------------------------------------------------
# phases 4 and 5: rewards, advantages
def get_rewards(batch, kl_coef):
    """Rewards (B, T-1): the KL penalty at each response token, and the score at the last one."""
    # PPO detail: per-token KL penalty. The sum of logprob - ref_logprob over a response is the k1
    # estimator of KL(policy || reference): unbiased, but negative for some responses.
    kl = batch.logprobs - batch.ref_logprobs                    # (B, T-1)
    rewards = -kl_coef * kl * batch.response_mask
    if algo == 'grpo': # its KL penalty is in the loss
        rewards = torch.zeros_like(rewards)
    # An answer that max_new_tokens cuts off is over: its score gets a penalty, and the value after
    # it is 0. The critic sees how long the answer is, so it can predict the cut.
    scores = torch.where(batch.ended, batch.scores, batch.scores - missing_end_penalty)
    # The last response token is the first True from the right: argmax returns the first maximum.
    from_right = batch.response_mask.int().flip(1).argmax(1)    # (B,)
    last = batch.response_mask.size(1) - 1 - from_right         # (B,)
    rewards[torch.arange(len(last)), last] += scores
    return rewards

def get_advantages(batch, rewards):
    """
    Was it better than expected? (B, T-1) rewards -> advantages and returns (B, T-1), 0 where the
    mask is False. This is where the algorithms differ: in what they expect.

        ppo        what the critic predicts at this token                   Schulman et al. 2017
        reinforce  nothing; with baseline, the mean return of all tokens    Williams 1992
        rloo       the mean reward of the other answers to the same prompt  Ahmadian et al. 2024
        grpo       the mean of the group; then divided by its deviation     Shao et al. 2024

    Dividing by the group's standard deviation gives too much weight to groups whose answers are
    nearly all right or all wrong. Dr. GRPO (Liu et al. 2025) does not divide.
    """
    mask = batch.response_mask
    if algo == 'ppo':
        advantages, returns = gae(rewards, batch.values, mask)
        # PPO detail: advantage whitening, on all ranks together. It removes the rewards' scale.
        return whiten(advantages, mask), returns

    if algo == 'reinforce':
        returns = rewards.flip(1).cumsum(1).flip(1) * mask      # what is still to come
        expected = masked_mean(returns, mask) if baseline else 0.0
        return (returns - expected) * mask, returns

    total = rewards.sum(1)                                      # (B,) one number for an answer
    groups = total.view(-1, group_size)                         # (prompts, group_size)
    # Only differences count. So advantages are exactly 0 if all answers of a group score the same.
    groups = groups - groups[:, :1]
    mean = groups.mean(1, keepdim=True)
    if algo == 'rloo':
        others = (mean * group_size - groups) / (group_size - 1)
        advantages = groups - others
    else:
        advantages = groups - mean
        if group_std:
            advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)
    return advantages.view(-1, 1) * mask, total[:, None] * mask # all tokens get the same

def gae(rewards, values, response_mask):
    """
    Generalized advantage estimation (Schulman et al. 2016): was each token better than expected?

        delta_t     = r_t + gamma * V_{t+1} - V_t
        advantage_t = delta_t + gamma * gae_lambda * advantage_{t+1}

    The value after the last token is 0. All tensors are (B, T-1). Returns advantages and returns
    (the targets of the critic), both 0 where the mask is False.
    """
    advantages = torch.zeros_like(rewards)
    advantage = 0.0
    next_value = 0.0
    for t in reversed(range(rewards.size(1))):                  # PPO detail: GAE from the right
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * gae_lambda * advantage) * response_mask[:, t]
        advantages[:, t] = advantage
        next_value = values[:, t] * response_mask[:, t]
    returns = (advantages + values) * response_mask             # PPO detail: the value target
    return advantages, returns

def masked_mean(x, mask):
    """Mean of x over the True positions of mask, on all ranks together."""
    total, count = all_sum((x * mask).sum().item(), mask.sum().item())
    return total / max(1, count)

def masked_variance(x, mask):
    """Variance of x over the True positions of mask, on all ranks together."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)   # PPO detail: biased variance

def whiten(x, mask):
    """Scale x to mean 0 and variance 1 over the True positions of mask; 0 elsewhere."""
    std = math.sqrt(masked_variance(x, mask) + 1e-8)
    return (x - masked_mean(x, mask)) * mask / std

# -----------------------------------------------------------------------------
# phase 6: the loss
STATISTICS = ('approx_kl', 'clipfrac', 'ratio', 'ratio_gap', 'pg_loss', 'v_loss')

def get_loss(batch, rows, T):
    """
    The loss of a micro-batch. For PPO: Schulman et al. 2017, equations 7 and 9, without entropy.

    batch: from rollout(), with advantages, returns, token_weights. rows, T: from split_by_length().
    Returns the weighted sum of the loss over the response tokens; the weighted sums of STATISTICS,
    (6,); and the largest ratio.
    """
    ids = batch.query_responses[rows, :T]
    response_mask = batch.response_mask[rows, :T - 1]           # (rows, T-1)
    advantages = batch.advantages[rows, :T - 1]
    returns = batch.returns[rows, :T - 1]
    old_values = batch.values[rows, :T - 1]
    old_logprobs = batch.logprobs[rows, :T - 1]
    ref_logprobs = batch.ref_logprobs[rows, :T - 1]
    weights = batch.token_weights[rows, :T - 1]                       # 0 where the mask is False
    with run.autocast():
        logits, values = model(ids, response_mask)
    logprobs = get_logprobs(logits, ids, response_mask)

    # PPO detail: clipped surrogate objective. A token whose ratio has left the clip range in the
    # direction of its advantage gets no gradient. At ratio 1 the gradient is that of REINFORCE.
    log_ratio = (logprobs - old_logprobs) * response_mask
    ratio = log_ratio.exp()                                     # new probability / old probability
    if algo == 'reinforce':
        pg_loss = -advantages * logprobs # exact only before the first step of the update
    else:
        pg_loss1 = -advantages * ratio
        pg_loss2 = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
        pg_loss = torch.max(pg_loss1, pg_loss2)

    if algo == 'grpo':
        # The KL penalty is in the loss, estimated by k3. The gradient of k3 is that of
        # KL(reference || policy); k1 in the reward follows KL(policy || reference).
        ref_log_ratio = (ref_logprobs - logprobs) * response_mask
        pg_loss = pg_loss + kl_coef * (ref_log_ratio.exp() - 1 - ref_log_ratio)

    # PPO detail: value function loss clipping around the old values.
    v_loss = 0.5 * (values - returns) ** 2 # ppo only: others log it, but do not learn from it
    if cliprange_value > 0:
        change = (values - old_values).clamp(-cliprange_value, cliprange_value)
        v_loss_clipped = 0.5 * (old_values + change - returns) ** 2
        v_loss = torch.max(v_loss, v_loss_clipped)

    # PPO detail: overall loss, here without an entropy bonus.
    loss = pg_loss
    if algo == 'ppo':
        loss = loss + vf_coef * v_loss                          # (rows, T-1)

    # PPO detail: debug variables. approx_kl is the k3 estimator of KL(old policy || new policy):
    # never negative, low variance (Schulman 2020, "Approximating KL divergence").
    with torch.no_grad():
        approx_kl = ratio - 1 - log_ratio
        ratio_gap = (ratio - 1).abs()
        clipfrac = ratio_gap > cliprange
        statistics = (approx_kl, clipfrac, ratio, ratio_gap, pg_loss, v_loss)
        sums = torch.stack([(x * weights).sum() for x in statistics])
    return (loss * weights).sum(), sums, ratio.max().detach()

# -----------------------------------------------------------------------------
# evaluation and learning rate
def mean_gold(prompts, texts):
    """Gold rewards of the answers, for the log. gold: mean score; met: share that is correct."""
    n = 0
    gold = 0.0
    met = 0
    for (row, _), text in zip(prompts, texts):
        if row.get('checks'):
            all_met, score = grade(row['checks'], text)
            n += 1
            gold += score
            met += all_met
    n, gold, met = all_sum(n, gold, met)
    return dict(gold=gold / n, met=met / n) if n > 0 else {}

@torch.no_grad()
def evaluate():
    """
    Answer validation prompts, always the same ones, with the same seed. Prints some of the answers,
    so that one sees them change. Returns means over the answers.
    """
    prompts = val_prompts[:eval_prompts][run.rank::run.world_size]
    policy = ActorCritic(sampler, None) # nothing here needs values
    seed_step(seed, 0, run.rank)
    score = 0.0
    kl = 0.0
    ended = 0
    texts = []
    for first in range(0, len(prompts), own_batch_size):
        batch = rollout(prompts[first:first + own_batch_size], policy)
        score += batch.scores.sum().item()
        kl += (batch.logprobs - batch.ref_logprobs).sum().item()
        ended += batch.ended.sum().item()
        texts += batch.texts
    for (row, _), text in zip(prompts[:3], texts):
        print0(f'    {row["messages"][-1]["content"]!r} -> {text!r}')
    n, score, kl, ended = all_sum(len(prompts), score, kl, ended)
    metrics = dict(val_score=score / n, val_kl=kl / n, val_ended=ended / n)
    for name, mean in mean_gold(prompts, texts).items():
        metrics[f'val_{name}'] = mean
    return metrics

def print_answer(batch, rewards, i):
    """Print answer i token by token: what the policy did, and what it learns from each token."""
    print0('           token  logprob      ref       kl    value   reward advantage')
    for t in batch.response_mask[i].nonzero()[:, 0].tolist():
        token = tok.decode([batch.query_responses[i, t + 1].item()])
        logprob = batch.logprobs[i, t].item()
        ref_logprob = batch.ref_logprobs[i, t].item()
        print0(f'{token!r:>16} {logprob:8.2f} {ref_logprob:8.2f} {logprob - ref_logprob:+8.2f} '
               f'{batch.values[i, t]:+8.2f} {rewards[i, t]:+8.3f} {batch.advantages[i, t]:+8.2f}')

def save(path, step, metrics):
    """Save the actor as a chat model."""
    if run.master:
        save_checkpoint(path, stage, sampler.state_dict(), asdict(sampler.config), tok,
                        config, step, metrics)

def get_lr_factor(step):
    """Linear warm-up from 0 to 1, then linear decay to 0."""
    warmup = (step + 1) / (warmup_iters + 1)
    decay = (max_iters - step) / max(1, max_iters - warmup_iters)
    return min(warmup, decay)

# -----------------------------------------------------------------------------
# the loop
PRINTED = ('score', 'kl', 'gold', 'met', 'entropy', 'clipfrac', 'explained_variance', 'length',
           'ended', 'norm')
log = open_log(os.path.join(out_dir, f'{stage}.jsonl'), first_step)
catch_signals(run)
kl_coef = progress['kl_coef']
n_tokens = progress['n_tokens'] # in prompts and responses so far
n_bad_critic = progress['n_bad_critic'] # updates in a row in which the critic was of no use
started = time.time() - progress['seconds'] # as if the run had never been interrupted
t0 = time.time()
for step in range(first_step, max_iters + 1):
    if fsdp:
        gather(actor, sampler)

    # evaluate: all ranks take part
    if step % eval_interval == 0 or step == max_iters:
        val_metrics = evaluate()
        val_text = ' | '.join(f'{name} {value:.4f}' for name, value in val_metrics.items())
        print0(f'step {step:6d} | {val_text}')
        log(step=step, **val_metrics)
        if snapshots and step > 0: # the best point of an over-optimised run is in the middle
            save(os.path.join(out_dir, f'{stage}.{step:05d}.pt'), step, val_metrics)
    if step == max_iters:
        break

    # save, and leave after Ctrl-C or SIGTERM
    leave = should_stop(run)
    if step > first_step and (leave or step % save_interval == 0):
        progress.update(kl_coef=kl_coef, seconds=time.time() - started, n_tokens=n_tokens,
                        n_bad_critic=n_bad_critic)
        state = get_state(raw_model, optimizers)
        save_resume(resume_path, step, state, config, **progress)
    assert not leave, f'stopped at step {step} and saved: the same command continues from there'

    # phases 1 to 5
    t1 = time.time()
    # PPO detail: a seed that depends on the rank, so that the processes sample different answers.
    seed_step(seed, step + 1, run.rank) # evaluate() uses step 0
    prompts = get_prompts(step)
    batch = rollout(prompts, raw_model)
    rewards = get_rewards(batch, kl_coef)
    batch.advantages, batch.returns = get_advantages(batch, rewards)

    # 6. learn
    # PPO detail: a new permutation in each epoch. Each epoch uses each answer once.
    minibatches = []
    for epoch in range(ppo_epochs):
        minibatches += torch.randperm(own_batch_size).split(own_minibatch_size)
    lr_factor = get_lr_factor(step) # PPO detail: learning rate annealing
    # Each token has the same weight. GRPO first takes the mean over each answer, so a token of a
    # long answer has less weight: long wrong answers are punished less, and become longer.
    batch.token_weights = batch.response_mask.float()                 # (B, T-1)
    if algo == 'grpo' and length_norm:
        batch.token_weights = batch.token_weights / batch.token_weights.sum(1, keepdim=True)
    history = [] # statistics of each minibatch
    for minibatch in minibatches:
        # The loss is a sum over the response tokens, divided by their number (their weights) in the
        # minibatch: all micro-batches, all ranks.
        n_valid = all_sum(batch.token_weights[minibatch].sum().item())[0]
        sums = torch.zeros(len(STATISTICS), device=run.device)
        ratio_max = torch.zeros((), device=run.device)
        micro_batches = split_by_length(minibatch, batch.lengths)
        for micro, (rows, T) in enumerate(micro_batches):
            if fsdp: # reduce gradients only once, as ddp does below
                raw_model.set_requires_gradient_sync(micro == len(micro_batches) - 1)
            if ddp: # exchange gradients only once, with the last micro-batch
                model.require_backward_grad_sync = micro == len(micro_batches) - 1
            loss, micro_sums, micro_max = get_loss(batch, rows, T)
            sums += micro_sums
            ratio_max = torch.maximum(ratio_max, micro_max)
            loss = loss / n_valid
            loss = loss * run.world_size # ddp and fsdp average over ranks; we need the sum
            loss.backward()
        means = [total / n_valid for total in all_sum(*sums.tolist())]

        # PPO detail: global gradient clipping, of actor and critic together
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
        if fsdp:
            norm = norm.full_tensor()
        norm = norm.item()
        assert math.isfinite(norm), (
            f'step {step}: gradient norm {norm}: lower --learning_rate or raise --kl_coef, and use '
            f'--resume=false, which discards {resume_path}, the last good state')
        history.append(dict(zip(STATISTICS, means), norm=norm, ratio_max=ratio_max.item()))

        # PPO detail: early stopping, if the new policy is too far from the old one
        if 0 < target_kl < history[-1]['approx_kl']:
            raw_model.zero_grad(set_to_none=True)
            break

        # update
        for opt, max_lr in zip(optimizers, max_lrs):
            for group in opt.param_groups:
                group['lr'] = max_lr * lr_factor
            opt.step()
        raw_model.zero_grad(set_to_none=True)

    # log. Watch score, kl and gold; the losses say little.
    every_answer = torch.ones_like(batch.ended)                 # (B,) mask for numbers per answer
    row_kl = (batch.logprobs - batch.ref_logprobs).sum(1)       # (B,) in nats, k1 estimate
    kl = masked_mean(row_kl, every_answer)
    length = masked_mean(batch.response_mask.sum(1), every_answer)
    # kl_k3: another estimate of the same KL, by k3 as in get_loss; low variance near the reference
    log_ratio = batch.ref_logprobs - batch.logprobs
    token_k3 = masked_mean(log_ratio.exp() - 1 - log_ratio, batch.response_mask)
    metrics = dict(
        score=masked_mean(batch.scores, every_answer),
        score_std=math.sqrt(masked_variance(batch.scores, every_answer)),
        rlhf_reward=masked_mean(rewards.sum(1), every_answer), # with the penalties; grpo: no KL
        kl=kl, kl_k3=token_k3 * length, kl_coef=kl_coef, length=length,
        ended=masked_mean(batch.ended, every_answer),
        entropy=masked_mean(batch.entropy, batch.response_mask),
        duplicates=1 - len(set(all_gather_list(batch.texts, run))) / batch_size,
        ratio_gap_first=history[0]['ratio_gap'], # PPO detail: the first ratio must be 1
        lr=learning_rate * lr_factor)
    for name in history[0]:
        metrics[name] = float(np.mean([statistics[name] for statistics in history]))
    metrics['ratio_max'] = max(all_gather_list([max(h['ratio_max'] for h in history)], run))
    metrics.update(mean_gold(prompts, batch.texts))
    if algo == 'ppo':
        # explained_variance: 1 = the critic predicts the returns, 0 = no better than a constant
        error_variance = masked_variance(batch.returns - batch.values, batch.response_mask)
        return_variance = masked_variance(batch.returns, batch.response_mask)
        explained_variance = 1 - error_variance / max(1e-8, return_variance)
        metrics['explained_variance'] = explained_variance
        n_bad_critic = n_bad_critic + 1 if explained_variance < 0 else 0
        if n_bad_critic in (5, 20):
            print0(f'warning: explained_variance below 0 in {n_bad_critic} updates: the critic harms. '
                   'Raise --vf_coef, or use --algo=rloo --group_size=4, which needs no critic')
    if group_size > 1: # equal scores: of such a group grpo and rloo learn only the penalties
        groups = batch.scores.view(-1, group_size)
        is_flat = groups.max(1).values == groups.min(1).values
        metrics['flat_groups'] = masked_mean(is_flat, torch.ones_like(is_flat))
    log(step=step, **metrics)
    n_tokens += all_sum((batch.query_responses != tok.pad).sum().item())[0]
    dt = time.time() - t1
    left = (time.time() - t0) / (step + 1 - first_step) * (max_iters - step - 1)
    text = ' | '.join(f'{name} {metrics[name]:.3f}' for name in PRINTED if name in metrics)
    print0(f'step {step:6d} | {text} | {dt:.1f} s, {left / 60:.1f} min left')

    # PPO detail: print answers. They show reward hacking (bad answers with high scores) first.
    if step % sample_interval == 0:
        question = prompts[0][0]['messages'][-1]['content']
        print0(f'    {question!r} -> {batch.texts[0]!r}, score {batch.scores[0]:+.2f}')
        print_answer(batch, rewards, 0)

    # PPO detail: adaptive KL coefficient (Ziegler et al. 2019). kl is the mean over all ranks, so
    # the coefficient is the same on all ranks.
    if kl_target > 0:
        error = min(max(kl / kl_target - 1, -0.2), 0.2)
        kl_coef *= 1 + error * batch_size / kl_horizon

# -----------------------------------------------------------------------------
# save
seconds = time.time() - started
# Each token is sampled once, read by the trained and the frozen models, and learned in each epoch.
# flops_per_token is the cost of learning; a forward pass costs a third of it.
n_trained = 1 if algo != 'ppo' or critic == 'shared' else 2
n_frozen = 1 if reward_model is None else 2
passes = (1 + n_trained + n_frozen) / 3 + n_trained * ppo_epochs
mean_length = n_tokens / max(1, max_iters * batch_size)
flops = actor.flops_per_token(mean_length) * n_tokens * passes
save(out_path, max_iters, dict(val_metrics, seconds=seconds, tokens=n_tokens, flops=flops))
print0(f'saved {out_path}: {val_text}, {seconds:.0f} s')
cleanup(run)
