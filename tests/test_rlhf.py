"""rlhf.py: the formulas of PPO against brute force, and the real script on the tiny world."""
import json
import math
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from conftest import definitions, fails, formulas, make_spec, user, write_rows
from model import (GPT, GPTConfig, ScalarModel, Tokenizer, generate, load_model, pad_right, read_jsonl,
                   save_checkpoint)

CPU = SimpleNamespace(device='cpu', device_type='cpu', rank=0, world_size=1,
                      autocast=lambda: torch.autocast('cpu', enabled=False))
ppo = definitions

def load(path):
    return torch.load(path, weights_only=True)

def log(out):
    return [row for _, row in read_jsonl(out / 'rlhf.jsonl')]

def updates(out):
    """The log lines of the updates, without those of the evaluations."""
    return [row for row in log(out) if 'score' in row]

def distance(a, b):
    a, b = load(a)['weights'], load(b)['weights']
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)

def stocked(out, chain):
    """A fresh out_dir with the checkpoints that rlhf.py reads."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ('sft.pt', 'reward.pt'):
        shutil.copy(chain.out / name, out)
    return out

def command(chain, out, *flags, profile=None, data=None):
    return ('rlhf.py', profile or chain.short, f'--data_dir={data or chain.data}', f'--out_dir={out}', *flags)

def random_answers(B=6, T=9, seed=0):
    """-> rewards, values, response_mask (B, T) with answers of many lengths at many places."""
    g = torch.Generator().manual_seed(seed)
    first = torch.randint(0, 4, (B,), generator=g)
    last = torch.randint(4, T + 1, (B,), generator=g)
    position = torch.arange(T)
    mask = (position >= first[:, None]) & (position < last[:, None])
    return torch.randn(B, T, generator=g) * mask, torch.randn(B, T, generator=g) * mask, mask

# -----------------------------------------------------------------------------
# phases 4 and 5: rewards, advantages

@pytest.mark.parametrize('gamma,gae_lambda', [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_the_double_sum(gamma, gae_lambda):
    rewards, values, mask = random_answers()
    advantages, returns = ppo('rlhf.py', gamma=gamma, gae_lambda=gae_lambda).gae(rewards, values, mask)
    for b in range(len(rewards)):
        where = mask[b].nonzero()[:, 0].tolist()
        for t in range(rewards.size(1)):
            if t not in where:
                assert advantages[b, t] == 0 and returns[b, t] == 0
                continue
            # A_t = sum over l of (gamma lambda)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}), V = 0 after the answer
            after = {s: values[b, s + 1] if s + 1 in where else 0 for s in where}
            want = sum((gamma * gae_lambda) ** (s - t) * (rewards[b, s] + gamma * after[s] - values[b, s])
                       for s in where if s >= t)
            assert advantages[b, t].item() == pytest.approx(want.item(), abs=1e-5)
            assert returns[b, t].item() == pytest.approx((want + values[b, t]).item(), abs=1e-5)
            if gamma == gae_lambda == 1: # the critic cancels out: returns are the rewards that are still to come
                to_go = sum(rewards[b, s].item() for s in where if s >= t)
                assert returns[b, t].item() == pytest.approx(to_go, abs=1e-5)

def test_gae_ignores_what_is_outside_of_the_answer():
    rewards, values, mask = random_answers()
    gae = ppo('rlhf.py', gamma=0.9, gae_lambda=0.8).gae
    noise = torch.where(mask, 0.0, 100.0)
    for a, b in zip(gae(rewards, values, mask), gae(rewards + noise, values + noise, mask)):
        torch.testing.assert_close(a, b)

def test_whitening_ignores_pads():
    x, _, mask = random_answers()
    s = ppo('rlhf.py')
    white = s.whiten(5 + 3 * x, mask)
    inside = white[mask]
    assert abs(inside.mean()) < 1e-5 and abs(inside.std(unbiased=False) - 1) < 1e-4
    assert (white[~mask] == 0).all()
    torch.testing.assert_close(white, s.whiten(torch.where(mask, 5 + 3 * x, 1e4), mask), atol=1e-4, rtol=1e-4)
    assert s.masked_mean(x, mask) == pytest.approx(x[mask].mean().item(), abs=1e-6)
    assert s.masked_variance(x, mask) == pytest.approx(x[mask].var(unbiased=False).item(), abs=1e-6)
    assert s.masked_mean(x, torch.zeros_like(mask)) == 0 # not NaN

def test_rewards_by_hand():
    """Score and penalty once, at the last token of the answer; the KL at each token of it and nowhere else."""
    batch = SimpleNamespace(
        response_mask=torch.tensor([[False, True, True, False], [True, True, True, True]]),
        logprobs=torch.tensor([[9.0, -1.0, -2.0, 9.0], [-1.0, -1.0, -1.0, -1.0]]),
        ref_logprobs=torch.tensor([[0.0, -2.0, -1.0, 0.0], [-1.0, -1.0, -1.0, -3.0]]),
        ended=torch.tensor([True, False]), scores=torch.tensor([10.0, 20.0]))
    s = ppo('rlhf.py', missing_end_penalty=3.0)
    # row 0: -0.5 (-1 + 2) = -0.5; -0.5 (-2 + 1) = +0.5, and the score 10
    # row 1: 0, 0, 0, -0.5 (-1 + 3) = -1, and the score 20 - 3, since it has no <|end|>
    assert s.get_rewards(batch, 0.5).tolist() == [[0.0, -0.5, 10.5, 0.0], [0.0, 0.0, 0.0, 16.0]]
    assert batch.scores.tolist() == [10.0, 20.0] # unchanged
    batch.logprobs = batch.ref_logprobs
    assert s.get_rewards(batch, 0.5).sum().item() == 10 + 20 - 3

# six answers to two prompts: their tokens, rewards, and totals 3, 1, 2, and 4, -2, 1
MASK = torch.tensor([[0, 1, 1], [0, 1, 0], [1, 1, 1], [0, 0, 1], [1, 1, 0], [0, 1, 1]]).bool()
REWARDS = torch.tensor([[0, -0.5, 3.5], [0, 1, 0], [1, -1, 2], [0, 0, 4], [1, -3, 0], [0, 0, 1]])
TO_GO = [[0, 3, 3.5], [0, 1, 0], [2, 1, 2], [0, 0, 4], [-2, -3, 0], [0, 1, 1]] # their mean is 13.5 / 11

@pytest.mark.parametrize('algo,settings,per_answer', [
    ('rloo', {}, [1.5, -1.5, 0, 4.5, -4.5, 0]),                             # 3 - (1 + 2) / 2, ...
    ('grpo', dict(group_std=False), [1, -1, 0, 3, -3, 0]),                  # 3 - (3 + 1 + 2) / 3, ...
    ('grpo', dict(group_std=True), [1 / 1.0001, -1 / 1.0001, 0, 3 / 3.0001, -3 / 3.0001, 0]), # deviations 1 and 3
    ('reinforce', dict(baseline=False), None), ('reinforce', dict(baseline=True), None)])
def test_advantages_by_hand(algo, settings, per_answer):
    s = ppo('rlhf.py', algo=algo, group_size=3, **settings)
    advantages, returns = s.get_advantages(SimpleNamespace(response_mask=MASK), REWARDS)
    if per_answer is None: # each token gets what is still to come
        want = torch.tensor(TO_GO) - (13.5 / 11 if settings['baseline'] else 0)
        assert returns.tolist() == TO_GO
    else: # all tokens of an answer get the same
        want = torch.tensor(per_answer).float()[:, None].expand(6, 3)
    torch.testing.assert_close(advantages, want * MASK, atol=1e-6, rtol=1e-6)
    assert (advantages[~MASK] == 0).all()

def test_advantages_of_ppo():
    """With a critic that says 0 and lambda 1: what is still to come, whitened over the tokens of all answers."""
    s = ppo('rlhf.py', algo='ppo', gae_lambda=1.0)
    batch = SimpleNamespace(response_mask=MASK, values=torch.zeros(6, 3))
    advantages, returns = s.get_advantages(batch, REWARDS)
    assert returns.tolist() == TO_GO
    tokens = returns[MASK]
    want = (returns - tokens.mean()) / tokens.std(unbiased=False) * MASK
    torch.testing.assert_close(advantages, want, atol=1e-6, rtol=1e-6)

@pytest.mark.parametrize('algo', ['grpo', 'rloo'])
def test_a_group_of_equal_answers_teaches_nothing(algo):
    for group_size in range(2, 10): # with 7 and 8 the mean of seven or eight times 0.1 is not 0.1
        rewards = torch.zeros(2 * group_size, 3)
        rewards[:group_size, 1] = 0.1
        rewards[group_size:, 2] = 0.1 * torch.arange(group_size)
        batch = SimpleNamespace(response_mask=torch.ones_like(rewards).bool())
        advantages, _ = ppo('rlhf.py', algo=algo, group_size=group_size).get_advantages(batch, rewards)
        assert (advantages[:group_size] == 0).all()
        assert advantages[group_size:].isfinite().all() and advantages[group_size:].abs().max() > 0.04

@pytest.mark.parametrize('algo', ['ppo', 'grpo', 'rloo', 'reinforce'])
def test_answers_of_one_token(algo):
    rewards = torch.tensor([[1.0], [3.0]])
    batch = SimpleNamespace(response_mask=torch.ones(2, 1).bool(), values=torch.zeros(2, 1))
    want = dict(ppo=1.0, grpo=1 / (2 ** 0.5 + 1e-4), rloo=2.0, reinforce=1.0)[algo]
    s = ppo('rlhf.py', algo=algo, group_size=2)
    advantages, returns = s.get_advantages(batch, rewards)
    assert advantages[:, 0].tolist() == pytest.approx([-want, want], abs=1e-6) and returns.tolist() == [[1], [3]]
    one_answer = SimpleNamespace(response_mask=torch.ones(1, 1).bool(), values=torch.zeros(1, 1))
    if algo in ('ppo', 'reinforce'): # no deviation, and nothing is divided by 0
        assert s.get_advantages(one_answer, rewards[:1])[0].tolist() == [[0.0]]

def test_grpo_has_its_kl_penalty_in_the_loss():
    batch = SimpleNamespace(
        response_mask=torch.tensor([[True, True]]), logprobs=torch.tensor([[-1.0, -2.0]]), ended=torch.tensor([False]),
        ref_logprobs=torch.zeros(1, 2), scores=torch.tensor([5.0]))
    assert ppo('rlhf.py', algo='grpo', missing_end_penalty=1.0).get_rewards(batch, 0.5).tolist() == [[0, 4]]
    assert ppo('rlhf.py', algo='rloo', missing_end_penalty=1.0).get_rewards(batch, 0.5).tolist() == [[0.5, 5]]

# -----------------------------------------------------------------------------
# phase 6: the loss

def one_token_answers(logprobs, **more):
    """A batch of answers of one token each, for get_loss: logprobs (B,)."""
    B = len(logprobs)
    batch = dict(query_responses=torch.zeros(B, 2, dtype=torch.long), logprobs=logprobs[:, None],
                 response_mask=torch.ones(B, 1, dtype=torch.bool), values=torch.zeros(B, 1),
                 advantages=torch.zeros(B, 1), returns=torch.zeros(B, 1), ref_logprobs=logprobs[:, None],
                 token_weights=torch.ones(B, 1))
    batch.update({name: x[:, None] for name, x in more.items()})
    return SimpleNamespace(**batch)

def losses(batch, logprobs, values=None, **settings):
    """get_loss with a model that says these log-probabilities and values -> loss sum, {statistic: sum}."""
    if values is None:
        values = torch.zeros(len(logprobs))
    def model(query_responses, response_mask): # token 0 has this probability, and token 1 what is left
        chosen = logprobs[response_mask[:, 0]]
        logits = torch.stack([chosen, (-chosen.expm1()).log()], -1)
        return logits, values[:, None]
    s = ppo('rlhf.py', run=CPU, model=model, **settings)
    loss, sums, ratio_max = s.get_loss(batch, torch.arange(len(logprobs)), 2)
    log_ratios = (logprobs.detach() - batch.logprobs[:, 0]) * batch.response_mask[:, 0]
    assert ratio_max.item() == pytest.approx(log_ratios.exp().max().item(), rel=1e-5)
    return loss, dict(zip(s.STATISTICS, sums.tolist(), strict=True))

def test_kl_estimators_are_exact_in_expectation():
    """Answers of one token from p = (1/2, 1/4, 1/4), listed in that proportion: their mean is the expectation."""
    p = torch.tensor([0.5, 0.25, 0.25])
    q = torch.tensor([0.2, 0.2, 0.6])
    kl = (p * (p / q).log()).sum().item()
    answers = torch.tensor([0, 0, 1, 2])
    batch = one_token_answers(p.log()[answers], scores=torch.zeros(4), ended=torch.ones(4, dtype=torch.bool),
                              ref_logprobs=q.log()[answers])
    batch.scores, batch.ended = batch.scores[:, 0], batch.ended[:, 0]
    s = ppo('rlhf.py')
    k1 = -s.get_rewards(batch, 1.0)
    assert k1.mean().item() == pytest.approx(kl, abs=1e-6)
    k3, = formulas('rlhf.py', 'token_k3')
    names = dict(batch=batch, log_ratio=batch.ref_logprobs - batch.logprobs, masked_mean=s.masked_mean)
    assert eval(k3, names) == pytest.approx(kl, abs=1e-6)
    # KL(old policy || new policy), where the new policy is q
    _, sums = losses(batch, q.log()[answers])
    assert sums['approx_kl'] / 4 == pytest.approx(kl, abs=1e-6)
    for i in range(4): # k3 is never negative
        single = one_token_answers(p.log()[answers[i:i + 1]])
        assert losses(single, q.log()[answers[i:i + 1]])[1]['approx_kl'] >= 0

def test_clipped_surrogate_objective():
    """Past the clip range in the direction of the advantage: a constant loss. Everywhere else: -advantage * ratio."""
    cases = [ # ratio, advantage, loss, gradient of log-probability
        (1.0, 2.0, -2.0, -2.0), (1.1, 2.0, -2.2, -2.2), (1.5, 2.0, -2.4, 0.0), (0.5, 2.0, -1.0, -1.0),
        (1.0, -2.0, 2.0, 2.0), (0.9, -2.0, 1.8, 1.8), (0.5, -2.0, 1.6, 0.0), (1.5, -2.0, 3.0, 3.0)]
    for ratio, advantage, want, want_grad in cases:
        old = torch.tensor([-3.0])
        new = (old + math.log(ratio)).requires_grad_()
        batch = one_token_answers(old, advantages=torch.tensor([advantage]))
        loss, sums = losses(batch, new, cliprange=0.2, vf_coef=0.1)
        loss.backward()
        assert loss.item() == pytest.approx(want, abs=1e-5) and sums['pg_loss'] == pytest.approx(want, abs=1e-5)
        assert new.grad.item() == pytest.approx(want_grad, abs=1e-5) # at ratio 1 that of REINFORCE: -advantage
        assert sums['ratio'] == pytest.approx(ratio, abs=1e-5)
        assert sums['ratio_gap'] == pytest.approx(abs(ratio - 1), abs=1e-5)
        assert sums['clipfrac'] == (abs(ratio - 1) > 0.2)

def test_value_loss_and_its_clipping():
    cases = [ # old value, new value, return, loss with a clip range of 0.2, without
        (0.0, 0.1, 1.0, 0.405, 0.405), (0.0, 0.5, 1.0, 0.32, 0.125), (0.0, 1.5, 1.0, 0.32, 0.125),
        (0.0, -0.5, 1.0, 1.125, 1.125)]
    for old, new, wanted, clipped, plain in cases:
        batch = one_token_answers(torch.tensor([-1.0]), values=torch.tensor([old]), returns=torch.tensor([wanted]))
        for cliprange_value, want in ((0.2, clipped), (0.0, plain)):
            loss, sums = losses(batch, batch.logprobs[:, 0], torch.tensor([new]), cliprange_value=cliprange_value,
                                vf_coef=0.5)
            assert sums['v_loss'] == pytest.approx(want) and loss.item() == pytest.approx(0.5 * want)

def categorical(theta, answers, reference=None, **more):
    """
    Answers of one token each, drawn from softmax(theta) -> batch, and a model whose logits are theta for all of them.
    """
    logprobs = F.log_softmax(theta.detach(), -1)[answers]
    batch = one_token_answers(logprobs, **more)
    batch.query_responses[:, 1] = answers
    if reference is not None:
        batch.ref_logprobs = reference.log()[answers][:, None]
    def model(query_responses, response_mask):
        return theta.expand(len(answers), -1), torch.zeros(len(answers), 1)
    return batch, model

def test_k3_in_the_loss_follows_forward_kl():
    """
    Answers in proportion to p = (1/2, 1/4, 1/4), so their mean is the expectation. The value of GRPO's term is
    KL(p || q), where q is the reference, but its gradient is that of KL(q || p): p - q, by the logits of p.
    """
    p = torch.tensor([0.5, 0.25, 0.25])
    q = torch.tensor([0.2, 0.2, 0.6])
    theta = p.log().requires_grad_()
    batch, model = categorical(theta, torch.tensor([0, 0, 1, 2]), q)
    s = ppo('rlhf.py', run=CPU, model=model, algo='grpo', kl_coef=0.3)
    loss, _, _ = s.get_loss(batch, torch.arange(4), 2)
    (loss / 4).backward()
    assert loss.item() / 4 == pytest.approx(0.3 * (p * (p / q).log()).sum().item(), abs=1e-6)
    torch.testing.assert_close(theta.grad, 0.3 * (p - q))
    reverse = p.log().requires_grad_() # the other KL has another gradient
    (reverse.softmax(0) * (reverse.log_softmax(0) - q.log())).sum().backward()
    assert (reverse.grad - (p - q)).abs().max() > 0.02

def test_at_ratio_1_all_gradients_are_that_of_reinforce():
    """By hand: the gradient of -A log p_i by the logits is A (p - 1_i)."""
    p = torch.tensor([0.5, 0.25, 0.25])
    answers = torch.tensor([0, 2, 1, 2, 0])
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.1])
    want = (advantages[:, None] * (p - F.one_hot(answers, 3))).sum(0)
    for algo, first_loss in (('reinforce', None), ('ppo', -2.6), ('rloo', -2.6), ('grpo', -2.6)):
        theta = p.log().requires_grad_()
        batch, model = categorical(theta, answers, advantages=advantages)
        s = ppo('rlhf.py', run=CPU, model=model, algo=algo, vf_coef=0.0)
        loss, _, ratio_max = s.get_loss(batch, torch.arange(5), 2)
        loss.backward()
        torch.testing.assert_close(theta.grad, want, atol=1e-6, rtol=1e-6)
        if algo == 'reinforce': # -mean(rewards x logprobs)
            first_loss = -(advantages * p.log()[answers]).sum().item()
        assert loss.item() == pytest.approx(first_loss, abs=1e-5) and ratio_max == pytest.approx(1, abs=1e-6)

@pytest.mark.parametrize('length_norm', [True, False])
def test_length_norm_counts_each_answer_the_same(length_norm):
    """GRPO's mean of means, and the mean over tokens of all other losses: answers of 1 and 3 tokens."""
    mask = torch.tensor([[True, False, False], [True, True, True]])
    batch = SimpleNamespace(
        response_mask=mask, query_responses=torch.zeros(2, 4, dtype=torch.long), logprobs=torch.full((2, 3), -1.0),
        ref_logprobs=torch.full((2, 3), -1.0), values=torch.zeros(2, 3), returns=torch.zeros(2, 3),
        advantages=torch.tensor([[1.0], [-2.0]]) * mask)
    every_token, normed = formulas('rlhf.py', 'batch.token_weights')
    batch.token_weights = eval(every_token, dict(batch=batch))
    assert batch.token_weights.tolist() == [[1, 0, 0], [1, 1, 1]]
    if length_norm:
        batch.token_weights = eval(normed, dict(batch=batch))
    logprobs = torch.full((4,), -1.0, requires_grad=True)
    def model(query_responses, response_mask):
        return torch.stack([logprobs, (-logprobs.expm1()).log()], -1), torch.zeros(2, 3)
    s = ppo('rlhf.py', run=CPU, model=model, algo='grpo')
    loss, _, _ = s.get_loss(batch, torch.arange(2), 4)
    (loss / batch.token_weights.sum()).backward()
    # the losses of the four tokens are -1, and three times 2
    want, grad = (0.5, [-1 / 2, 1 / 3, 1 / 3, 1 / 3]) if length_norm else (5 / 4, [-1 / 4, 1 / 2, 1 / 2, 1 / 2])
    assert loss.item() / batch.token_weights.sum().item() == pytest.approx(want, abs=1e-6)
    assert logprobs.grad.tolist() == pytest.approx(grad, abs=1e-6)

def test_the_loss_ignores_what_is_outside_of_the_answer():
    batch = one_token_answers(torch.tensor([-1.0, 3.0, -3.0]), advantages=torch.ones(3), returns=torch.ones(3))
    batch.response_mask[1:] = False
    batch.token_weights[1:] = 0
    values = torch.tensor([0.0, 7.0, 9.0]).requires_grad_()
    loss, sums = losses(batch, torch.tensor([-1.0, -0.1, -2.0]), values, vf_coef=1.0)
    loss.backward()
    assert loss.item() == -1 + 0.5 and values.grad[1:].tolist() == [0, 0]
    assert sums['ratio'] == 1 and sums['approx_kl'] == 0 and sums['clipfrac'] == 0

# -----------------------------------------------------------------------------
# phases 1 to 3: prompts, rollout

def test_every_prompt_once_an_epoch_whatever_the_ranks():
    orders = []
    for world_size in (1, 2, 3):
        ranks = []
        for rank in range(world_size):
            run = SimpleNamespace(rank=rank, world_size=world_size)
            ranks.append(ppo('rlhf.py', seed=1, batch_size=6, train_prompts=list('abcdefghi'), run=run))
        drawn = []
        for step in range(3): # 18 prompts are two epochs of 9
            for rank in ranks:
                drawn += rank.get_prompts(step)
        assert sorted(drawn[:9]) == sorted(drawn[9:]) == list('abcdefghi') and drawn[:9] != drawn[9:]
        orders.append(drawn)
    assert orders[0] == orders[1] == orders[2] # each update has the same prompts

def test_the_answers_of_a_group_stand_side_by_side():
    for world_size in (1, 2):
        drawn = []
        for rank in range(world_size):
            run = SimpleNamespace(rank=rank, world_size=world_size)
            s = ppo('rlhf.py', seed=1, batch_size=12, group_size=3, train_prompts=list('abcd'), run=run)
            drawn += s.get_prompts(0)
        assert drawn == [prompt for prompt in drawn[::3] for _ in range(3)] and set(drawn) == set('abcd')

@torch.no_grad()
@pytest.mark.parametrize('critic', ['separate', 'shared', None])
def test_rollout(critic, chain):
    """Which tokens belong to the answer, what the models say about them, and what the reward model reads."""
    tok = Tokenizer(make_spec())
    sft, reward = load(chain.out / 'sft.pt'), load(chain.out / 'reward.pt')
    owl, cat, x = (tok.encode(word)[0] for word in ('owl', ' cat', 'x'))
    prompts = [(row, tok.render(row['messages'], prompt=True)[0]) for row in (
        dict(messages=user('xxx')), dict(messages=user('')))]
    queries = [ids for _, ids in prompts]
    assert [len(ids) for ids in queries] == [8, 4]
    answers = [[owl, cat, tok.end], [cat, owl, x, cat]]
    s = ppo('rlhf.py', tok=tok, run=CPU, max_new_tokens=4, micro_batch_size=1,
            reference=load_model(load(chain.out / 'base.pt'), 'cpu'), sampler=None,
            reward_model=load_model(reward, 'cpu', ScalarModel), generate=lambda *args: answers, block_size=48)
    actor = load_model(sft, 'cpu')
    value_model = None
    if critic == 'separate':
        value_model = load_model(reward, 'cpu', ScalarModel)
    elif critic == 'shared':
        value_model = torch.nn.Linear(actor.config.n_embd, 1)
    net = s.ActorCritic(actor, value_model)
    batch = s.rollout(prompts, net)
    assert batch.query_responses.tolist() == [queries[0] + answers[0], queries[1] + answers[1] + [tok.pad] * 3]
    mask = batch.response_mask # True where the next token belongs to the answer: positions P-1 .. P+R-2
    assert mask.tolist() == [[False] * 7 + [True] * 3, [False] * 3 + [True] * 4 + [False] * 3]
    assert batch.ended.tolist() == [True, False] and batch.texts == ['owl cat', 'catowlx cat']
    for numbers in (batch.logprobs, batch.ref_logprobs, batch.entropy, batch.values):
        assert (numbers[~mask] == 0).all()
        assert (numbers[mask] != 0).all() or (critic is None and numbers is batch.values)
    assert batch.lengths.tolist() == [11, 8]
    for b, (query, answer) in enumerate(zip(queries, answers)):
        row = torch.tensor([query + answer])
        at = torch.arange(len(query) - 1, len(query) + len(answer) - 1) # where each token of the answer is predicted
        for model, found in ((net.actor, batch.logprobs), (s.space['reference'], batch.ref_logprobs)):
            logp = F.log_softmax(model(row)[0, at], -1)
            want = logp[torch.arange(len(answer)), torch.tensor(answer)]
            torch.testing.assert_close(found[b, at], want, atol=1e-4, rtol=1e-4)
            if model is net.actor:
                entropy = -(logp.exp() * logp).sum(-1)
                torch.testing.assert_close(batch.entropy[b, at], entropy, atol=1e-5, rtol=1e-5)
        if critic == 'separate':
            torch.testing.assert_close(batch.values[b, at], net.critic(row)[0, at], atol=1e-4, rtol=1e-4)
        elif critic == 'shared':
            values = actor.hidden(row)[0, at] @ value_model.weight[0] + value_model.bias
            torch.testing.assert_close(batch.values[b, at], values, atol=1e-4, rtol=1e-4)
        # the reward model reads what it was trained on: the text, with <|end|>, and not the tokens that were drawn
        said = dict(role='assistant', content=batch.texts[b])
        complete, _ = tok.render(prompts[b][0]['messages'] + [said])
        assert complete[-1] == tok.end and complete != query + answer
        score = s.space['reward_model'](torch.tensor([complete]))[0, -1]
        torch.testing.assert_close(batch.scores[b], score, atol=1e-4, rtol=1e-4)

def score(answers, scores=(0.0, 0.0), **settings):
    """rollout() of two prompts, whose answers and scores of the reward model are known -> scores."""
    tok = Tokenizer(make_spec())
    torch.manual_seed(0)
    policy = GPT(GPTConfig('llama', tok.n_vocab, 48, 1, 2, n_embd=16))
    prompts = [(row, tok.render(row['messages'], prompt=True)[0]) for row in (
        dict(messages=user('Say')), dict(messages=user('Say a word.')))]
    for (row, _), checks in zip(prompts, (dict(equals='owl'), dict(max_words=1, contains=['cat']))):
        row['checks'] = checks
    def reward_model(ids):
        return torch.tensor(scores)[:, None].expand(-1, ids.size(1))
    said = [tok.encode(answer) + [tok.end] for answer in answers]
    s = ppo('rlhf.py', tok=tok, run=CPU, reference=policy, block_size=48, micro_batch_size=2, reward_model=reward_model,
            reward_path='out/reward.pt', sampler=policy, generate=lambda *args: said, **settings)
    return s.rollout(prompts, s.ActorCritic(policy, None)).scores.tolist()

def test_scores():
    """Of the model, of the checks, all or nothing, or of both; and clipped."""
    answers = ['owl', 'cat and dog'] # the second one meets one check of two
    assert score(answers, (5.0, -0.5)) == [5, -0.5]
    assert score(answers, (5.0, -0.5), score_clip=2.0) == [2, -0.5]
    assert score(answers, (5.0, -5.0), score_clip=2.0) == [2, -2]
    assert score(answers, None, reward='checks') == [1, 0]
    assert score(['cat', 'cat'], None, reward='checks') == [0, 1]
    assert score(answers, (5.0, -0.5), reward='both') == [6, -0.5]

@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite(bad):
    for settings in (dict(), dict(reward='both'), dict(score_clip=1.0)):
        with fails(rf'a score is {bad}: make out/reward\.pt again with `python reward\.py`'):
            score(['owl', 'cat'], (0.0, bad), **settings)

def test_task_takes_some_of_the_prompts(tmp_path):
    tok = Tokenizer(make_spec())
    rows = [dict(messages=user(str(i)), task='sum', checks=dict(number=i)) for i in range(3)]
    rows += [dict(messages=user('Say'), task='say'), dict(messages=user('x'))]
    write_rows(tmp_path / 'prompts_train.jsonl', rows)
    def load_prompts(**settings):
        s = ppo('rlhf.py', data_dir=str(tmp_path), tok=tok, block_size=48, max_new_tokens=6, **settings)
        return [row['messages'][0]['content'] for row, _ in s.load_prompts('train')]
    assert load_prompts() == ['0', '1', '2', 'Say', 'x'] and load_prompts(task='say') == ['Say']
    assert load_prompts(task='sum', reward='checks') == ['0', '1', '2']
    with fails("no prompt of task 'sums': leave --task out"):
        load_prompts(task='sums')
    with fails('reward=both needs checks, this prompt has none.*--reward=model, or --task=NAME'):
        load_prompts(reward='both')

def logprobs_of(net, ids, mask, temperature):
    s = ppo('rlhf.py', temperature=temperature)
    return s.get_logprobs(s.get_logits(net, net.hidden(ids), mask), ids, mask)

@torch.no_grad()
def test_logprobs_of_answers():
    torch.manual_seed(0)
    net = GPT(GPTConfig('gpt2', 50, 16, 2, 2, n_embd=32))
    ids = torch.randint(50, (6, 10))
    _, _, mask = random_answers()
    logprobs = logprobs_of(net, ids, mask, temperature=0.7)
    logp = F.log_softmax(net(ids)[:, :-1] / 0.7, -1)
    torch.testing.assert_close(logprobs, logp.gather(-1, ids[:, 1:, None])[..., 0] * mask, atol=1e-5, rtol=1e-5)

@torch.no_grad()
@pytest.mark.parametrize('arch', ['gpt2', 'llama'])
def test_recomputed_logprobs_are_those_of_the_sampler(arch):
    """With left padding, positions and a KV cache, the sampler drew from the same probabilities as phase 2 computes."""
    torch.manual_seed(0)
    net = GPT(GPTConfig(arch, 50, 24, 2, 2, n_embd=32))
    prompts = [torch.randint(50, (n,)).tolist() for n in (3, 9, 1, 6)]
    probs = []
    def keep(p):
        probs.append(p)
        return p
    answers = generate(net, prompts, 7, None, 0.8, keep)
    rows = [prompt + answer for prompt, answer in zip(prompts, answers)]
    ids = pad_right(rows, 0)
    mask = torch.zeros(len(rows), ids.size(1) - 1, dtype=torch.bool)
    for b, prompt in enumerate(prompts):
        mask[b, len(prompt) - 1:len(rows[b]) - 1] = True
    logprobs = logprobs_of(net, ids, mask, temperature=0.8)
    for b, answer in enumerate(answers):
        sampled = torch.tensor([probs[t][b, token].log() for t, token in enumerate(answer)])
        torch.testing.assert_close(logprobs[b][mask[b]], sampled, atol=1e-5, rtol=1e-5)

def test_learning_rate():
    factor = ppo('rlhf.py', warmup_iters=4, max_iters=104).get_lr_factor
    assert [round(factor(step), 6) for step in range(4)] == [0.2, 0.4, 0.6, 0.8] # never 0
    assert factor(4) == 1 and factor(54) == pytest.approx(0.5) and 0 < factor(103) < 0.02

# -----------------------------------------------------------------------------
# runs

def test_bandit(chain):
    """SFT says one of four words, the reward model likes owls, 25 updates later nearly all answers are owls."""
    rows = log(chain.out)
    first, last = rows[0], rows[-1]
    assert first['val_met'] <= 0.7 and last['val_met'] >= 0.8 and last['val_score'] > first['val_score']
    assert abs(first['val_kl']) < 1e-4 < last['val_kl'] # the policy starts as the reference
    half = updates(chain.out)[12:] # evaluations have 8 answers only; these are 13 x 16
    assert np.mean([row['met'] for row in half]) >= 0.9
    assert np.mean([row['rlhf_reward'] for row in half]) > updates(chain.out)[0]['rlhf_reward'] + 0.4
    ckpt = load(chain.out / 'rlhf.pt')
    assert ckpt['stage'] == 'rlhf' and ckpt['step'] == 25
    assert all(ckpt['metrics'][name] > 0 for name in ('seconds', 'flops', 'tokens'))
    assert not list(chain.out.glob('*.partial')) and not (chain.out / 'rlhf.resume.pt').exists()

def test_the_log(chain):
    rows = updates(chain.out)
    assert len(rows) == 25
    assert all(row['ratio_gap_first'] < 1e-4 for row in rows) # nothing has been learned at the first minibatch
    assert any(row['clipfrac'] > 0 for row in rows) # later minibatches do differ
    for row in log(chain.out): # validation and training have different keys
        names = set(row) - {'step'}
        assert all(name.startswith('val_') for name in names) or not any(name.startswith('val_') for name in names)
    for row in rows: # the reward that is maximized: the score minus all penalties
        want = row['score'] - row['kl_coef'] * row['kl'] - 1.0 * (1 - row['ended'])
        assert row['rlhf_reward'] == pytest.approx(want, abs=1e-5)

@pytest.fixture(scope='module')
def one_epoch(chain, scripts):
    """One epoch of one minibatch, in micro-batches of 16 and of 5: each update is taken at the old policy."""
    outs = []
    for micro in (16, 5):
        outs.append(stocked(chain.folder / f'micro{micro}', chain))
        check = ''' # reference and reward model are unchanged, actor and critic are not
assert not any(p.requires_grad for m in (reference, reward_model) for p in m.parameters())
for m, ckpt in ((reference, sft), (reward_model, reward_ckpt)):
    assert all(torch.equal(v, ckpt['weights'][k]) for k, v in m.state_dict().items())
assert any(not torch.equal(v, sft['weights'][k]) for k, v in raw_model.actor.state_dict().items())
assert any(not torch.equal(v, reward_ckpt['weights'][k]) for k, v in raw_model.critic.state_dict().items())
'''
        flags = ('--ppo_epochs=1', '--minibatch_size=16', f'--micro_batch_size={micro}', '--learning_rate=1e-3')
        scripts.ok(*command(chain, outs[-1], *flags), after=check)
    return outs

def test_one_epoch_is_on_policy(one_epoch):
    for row in updates(one_epoch[0]):
        assert abs(row['approx_kl']) < 1e-6 and row['clipfrac'] == 0 and abs(row['ratio'] - 1) < 1e-5
        assert abs(row['pg_loss']) < 1e-4 # the mean of whitened advantages

def test_micro_batches_change_nothing(one_epoch):
    assert distance(one_epoch[0] / 'rlhf.pt', one_epoch[1] / 'rlhf.pt') < 1e-5
    for a, b in zip(*(log(out) for out in one_epoch), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)

def test_huge_kl_coef_keeps_the_policy_where_it_is(chain, scripts, tmp_path):
    out = stocked(tmp_path, chain)
    scripts.ok(*command(chain, out, '--kl_coef=100', '--max_iters=10', profile=chain.tiny))
    free, held = (np.mean([row['kl'] for row in updates(folder)[5:10]]) for folder in (chain.out, out))
    assert abs(held) < 0.3 < 1 < free

# the optimizer steps of a run that is over
STEPS = 'assert {int(p["step"]) for opt in optimizers for p in opt.state.values()} == {%s}'

def test_target_kl_stops_the_epochs_early(chain, scripts, tmp_path):
    """The first minibatch is at the old policy and learned; the second is not, so this is one step an update."""
    out = stocked(tmp_path, chain)
    scripts.ok(*command(chain, out, '--target_kl=1e-9'), after=STEPS % 'max_iters')

def test_bfloat16(chain, scripts, tmp_path):
    out = stocked(tmp_path, chain)
    scripts.ok(*command(chain, out, '--dtype=bfloat16', '--max_iters=1'))
    assert all(math.isfinite(value) for row in log(out) for value in row.values())
    assert all(weight.dtype == torch.float32 for weight in load(out / 'rlhf.pt')['weights'].values())
    assert all(row['ratio_gap_first'] < 0.2 for row in updates(out))

def test_a_second_round_and_snapshots(chain, scripts, tmp_path):
    """The RLHF model is now the policy and the reference: KL 0, and the answers with which the first round ended."""
    first_round = log(chain.out)[-1]
    start_from = f'--init_from={chain.out}/rlhf.pt', f'--reward_from={chain.out}/reward.pt'
    said = scripts.ok(*command(chain, tmp_path, *start_from, '--snapshots=true', '--eval_interval=2',
                               '--sample_interval=3')).out
    warning = f'warning: {chain.out}/reward.pt was not made from {chain.out}/rlhf.pt and may misjudge its answers: '
    assert said.count(warning) == 1 and 'misjudge' not in chain.said['rlhf'].out
    start = log(tmp_path)[0]
    assert start['step'] == 0 and abs(start['val_kl']) < 1e-4
    for name in ('val_score', 'val_met', 'val_gold', 'val_ended'):
        assert start[name] == pytest.approx(first_round[name], abs=1e-5)
    assert sorted(path.name for path in tmp_path.glob('*.pt')) == ['rlhf.00002.pt', 'rlhf.00004.pt', 'rlhf.pt']
    assert load(tmp_path / 'rlhf.00002.pt')['step'] == 2
    assert distance(tmp_path / 'rlhf.00004.pt', tmp_path / 'rlhf.pt') == 0
    assert 0 < distance(tmp_path / 'rlhf.00002.pt', tmp_path / 'rlhf.pt')
    talk = ['--prompt=Say a word.', '--temperature=0']
    a, b = (scripts.ok('chat.py', tmp_path / name, *talk).out for name in ('rlhf.00004.pt', 'rlhf.pt'))
    assert a == b != ''
    # the table of an answer: a row for each of its tokens, and the reward is the score minus the KL penalty
    head = r', score ([+-][\d.]+)\n +token +logprob +ref +kl +value +reward +advantage\n'
    tables = re.findall(head + r'((?: .*\n)+?)(?=step|warn)', said)
    assert len(tables) == 2 # updates 0 and 3
    for score, table in tables:
        rows = [line.split() for line in table.splitlines()]
        rows = [row[-6:] for row in rows if re.search(r"' +-?\d", ' '.join(row))]
        assert rows
        kl = sum(float(row[2]) for row in rows)
        assert sum(float(row[4]) for row in rows) == pytest.approx(float(score) - 0.05 * kl, abs=0.02)

# -----------------------------------------------------------------------------
# learning: tasks with a known solution. The policy answers with random digits, mostly its first one is that of the
# prompt, as if it had seen some demonstrations of copying

DIGITS = '4567'
LENGTH = '''
import model
def grade(checks, text):
    score = 1 - abs(len(text) - 4) / 4
    return score, score
model.grade = grade
'''

@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """-> a folder with sft.pt, and a data folder for each task."""
    folder = tmp_path_factory.mktemp('digits')
    tok = Tokenizer(make_spec())
    torch.manual_seed(0)
    net = GPT(GPTConfig('llama', tok.n_vocab, 16, 1, 2, n_embd=32))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    prompts = torch.tensor([tok.render(user(digit), prompt=True)[0] for digit in DIGITS])    # (4, P)
    P = prompts.size(1)
    for _ in range(100):
        asked = prompts[torch.randint(4, (64,))]
        given = asked[:, 3]
        said = prompts[torch.randint(4, (64, 7)), 3]
        said[:32, 0] = given[:32]
        length = torch.randint(1, 7, (64, 1))
        said[torch.arange(7) == length] = tok.end
        logits = net(torch.cat([asked, said], 1))[:, P - 1:-1]
        real = torch.arange(7) <= length
        loss = F.cross_entropy(logits[real], said[real]) + F.cross_entropy(logits[:, 0], said[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_checkpoint(str(folder / 'sft.pt'), 'sft', net.state_dict(), vars(net.config), tok, {}, 0, {})
    checks = dict(bandit=lambda digit: dict(equals='7'), copy=lambda digit: dict(equals=digit),
                  length=lambda digit: dict(max_words=1))
    for task, check in checks.items():
        rows = [dict(messages=user(digit), checks=check(digit)) for digit in DIGITS]
        for split in ('train', 'val'):
            write_rows(folder / task / f'prompts_{split}.jsonl', rows)
    return folder

TASKS = [
    ('bandit', 15, 'ppo'), ('copy', 20, 'ppo'), ('length', 15, 'ppo --critic=shared'),
    ('bandit', 12, 'grpo --group_size=8'), ('copy', 20, 'rloo --group_size=8'),
    ('bandit', 12, 'reinforce --ppo_epochs=1 --minibatch_size=16 --micro_batch_size=16')]

@pytest.mark.parametrize('task,max_iters,algo', TASKS, ids=[f'{task}-{algo}' for task, _, algo in TASKS])
def test_learns(task, max_iters, algo, digits, scripts, tmp_path):
    """Say 7; say the digit of the prompt; say 4 digits: nearly always right after a few updates of 64 answers."""
    n = 8 if task == 'length' else 1
    penalty = 1 if task == 'length' else 0 # an answer of one token has no room for <|end|>
    scripts.ok('rlhf.py', f'--algo={algo.split()[0]}', *algo.split()[1:], '--reward=checks',
               f'--init_from={digits}/sft.pt', f'--data_dir={digits / task}', f'--out_dir={tmp_path}',
               f'--max_iters={max_iters}', f'--max_new_tokens={n}', f'--missing_end_penalty={penalty}',
               '--learning_rate=3e-3', '--device=cpu', '--dtype=float32', '--eval_prompts=4', '--eval_interval=100',
               before=LENGTH if task == 'length' else '')
    score = [row['score'] for row in updates(tmp_path)]
    first, last = score[0], np.mean(score[-3:])
    assert len(score) == max_iters and first <= 0.65 and last >= 0.9 and last - first >= 0.3

# -----------------------------------------------------------------------------
# resume: an interrupted run ends at the same numbers, bit for bit

def kill_at(step, number):
    """Code that sends the script a signal when it begins this update (rlhf.py seeds step + 1)."""
    return f'''
import model, os
old = model.seed_step
def seed_step(seed, step, rank):
    if step == {step} + 1:
        os.kill(os.getpid(), {int(number)})
    return old(seed, step, rank)
model.seed_step = seed_step
'''

ADAPTIVE = ('--kl_target=50', '--kl_horizon=160', '--kl_coef=0.1')
GRPO = ('--algo=grpo', '--group_size=4')
SHARED = ('--critic=shared',)

@pytest.fixture(scope='module')
def uninterrupted(chain, scripts, tmp_path_factory):
    """Flags -> out_dir of a run that nobody stopped. Each update has two minibatches."""
    made = {}
    def get(flags):
        if flags not in made:
            made[flags] = stocked(tmp_path_factory.mktemp('uninterrupted'), chain)
            scripts.ok(*command(chain, made[flags], *flags), after=STEPS % '2 * ppo_epochs * max_iters')
        return made[flags]
    return get

def test_adaptive_kl_coef(uninterrupted):
    """KL starts at 0, below the target: the coefficient falls by 0.2 n / horizon = 0.2 x 16 / 160 = 2% an update."""
    coefs = [row['kl_coef'] for row in updates(uninterrupted(ADAPTIVE))]
    assert coefs == pytest.approx([0.1 * 0.98 ** i for i in range(4)])

@pytest.mark.parametrize('number,flags', [(signal.SIGKILL, ADAPTIVE), (signal.SIGTERM, (*SHARED, *ADAPTIVE)),
                                          (signal.SIGTERM, GRPO)], ids=['ppo', 'shared', 'grpo'])
def test_resume_is_bit_identical(number, flags, chain, uninterrupted, scripts, tmp_path):
    whole = uninterrupted(flags)
    out = stocked(tmp_path / 'out', chain)
    run = command(chain, out, *flags)
    if number == signal.SIGKILL:
        assert scripts(*run, before=kill_at(3, number)).code == -signal.SIGKILL
        saved = 2
    else: # the update in which the signal came is finished
        scripts.fails('stopped at step 3 .* the same command continues', *run, before=kill_at(2, number))
        saved = 3
    assert load(out / 'rlhf.resume.pt')['step'] == saved and not (out / 'rlhf.pt').exists()
    assert not list(out.glob('*.partial'))
    assert f'at step {saved}' in scripts.ok(*run, '--sample_interval=1').out
    assert not (out / 'rlhf.resume.pt').exists()
    assert distance(out / 'rlhf.pt', whole / 'rlhf.pt') == 0
    assert log(out) == log(whole)
    a, b = (load(folder / 'rlhf.pt')['metrics'] for folder in (out, whole))
    assert {**a, 'seconds': 0} == {**b, 'seconds': 0}
    if flags == GRPO: # no critic
        assert 'explained_variance' not in updates(out)[0] and 'flat_groups' in updates(out)[0]

def test_a_stop_in_the_last_update_loses_nothing(chain, scripts, tmp_path):
    out = stocked(tmp_path, chain)
    scripts(*command(chain, out, '--save_interval=1000'), before=kill_at(3, signal.SIGTERM))
    assert (out / 'rlhf.pt').exists() or (out / 'rlhf.resume.pt').exists()

def test_other_checkpoints_or_settings_are_not_resumed(chain, scripts, tmp_path):
    out = stocked(tmp_path, chain)
    run = command(chain, out)
    scripts.fails('stopped at step 1', *run, before=kill_at(0, signal.SIGTERM))
    before = (out / 'rlhf.resume.pt').read_bytes()
    scripts.fails('gae_lambda.*--resume=false', *run, '--gae_lambda=0.5')
    ckpt = load(out / 'sft.pt')
    ckpt['metrics']['seconds'] += 1
    torch.save(ckpt, out / 'sft.pt')
    scripts.fails('starts_from.*--resume=false', *run)
    assert (out / 'rlhf.resume.pt').read_bytes() == before

# -----------------------------------------------------------------------------
# two processes

ANSWER = '''
import model
def answer(net, prompts, n, stop, temperature):
    answers = []
    for i, p in enumerate(prompts):
        nth = sum(q is p for q in prompts[:i]) # the answers of a group differ
        answers.append([97 + (len(p) + nth) % 5] * (1 + (len(p) + nth) % 4) + [stop] * (len(p) % 3 > 0))
    return answers
model.generate = answer
'''

def same(a, b):
    """Equal curves and weights, up to rounding: of each out_dir its rlhf.jsonl and rlhf.pt."""
    assert distance(a / 'rlhf.pt', b / 'rlhf.pt') < 1e-5
    for r, s in zip(log(a), log(b), strict=True):
        assert r == pytest.approx(s, rel=1e-3, abs=1e-5)
        assert all(abs(r[name] - s[name]) < 1e-5 for name in ('pg_loss', 'v_loss', 'score', 'val_score') if name in r)

@pytest.fixture(scope='module')
def learning(chain):
    """Two updates of 8 answers, one minibatch each."""
    return lambda out, *flags: command(chain, out, '--batch_size=8', '--minibatch_size=8', '--max_iters=2',
                                       '--learning_rate=1e-4', '--ppo_epochs=3', *flags)

@pytest.fixture(scope='module')
def one(chain, learning, scripts, tmp_path_factory):
    """Flags -> out_dir of the run on one process."""
    made = {}
    def get(*flags):
        if flags not in made:
            out = made[flags] = stocked(tmp_path_factory.mktemp('one'), chain)
            scripts.ok(*learning(out, *flags), before=ANSWER)
            assert distance(out / 'rlhf.pt', out / 'sft.pt') > 1e-4
        return made[flags]
    return get

@pytest.mark.parametrize('parallel,flags', [
    ('ddp', ()), ('ddp', GRPO), ('fsdp', ()), ('fsdp', SHARED), ('fsdp', GRPO)],
    ids=['ddp-ppo', 'ddp-grpo', 'fsdp-ppo', 'fsdp-shared', 'fsdp-grpo'])
def test_two_processes_are_one(parallel, flags, chain, learning, one, scripts, tmp_path):
    """Each rank samples its own answers, so here the prompts decide the answers: learning from them is the same."""
    out = stocked(tmp_path, chain)
    said = scripts.two(*learning(out, *flags, f'--parallel={parallel}', '--micro_batch_size=3'), before=ANSWER)
    assert said[1].out == '' and 'saved' in said[0].out
    same(out, one(*flags))

def test_a_run_moves_to_other_processes(chain, learning, one, scripts, tmp_path):
    """Begun by two processes with fsdp, ended by one."""
    out = stocked(tmp_path, chain)
    with pytest.raises(AssertionError, match='stopped at step 1 and saved'):
        scripts.two(*learning(out, '--parallel=fsdp'), before=ANSWER + kill_at(0, signal.SIGTERM))
    saved = load(out / 'rlhf.resume.pt')['state']
    moments = saved['optimizers']['state']
    assert moments.keys() == saved['weights'].keys() - {'critic.mean', 'critic.std', 'actor.head.weight'}
    assert all(moments[name]['exp_avg'].shape == saved['weights'][name].shape for name in moments)
    assert 'at step 1' in scripts.ok(*learning(out), before=ANSWER).out
    same(out, one())

def test_fsdp_samples_as_ddp_does(chain, scripts, tmp_path):
    """
    A rank draws its answers from the same probabilities with the same seed. They have different lengths, a process has
    two micro-batches, and at the evaluation rank 0 needs two rollouts, rank 1 one.
    """
    half = '''
sizes = [(p.to_local().numel(), p.numel()) for p in raw_model.parameters()]
assert sum(own for own, _ in sizes) < 0.51 * sum(whole for _, whole in sizes), sizes
'''
    outs = []
    for parallel, check in (('ddp', ''), ('fsdp', half)):
        outs.append(stocked(tmp_path / parallel, chain))
        scripts.two(*command(chain, outs[-1], f'--parallel={parallel}', '--batch_size=4', '--minibatch_size=4',
                             '--micro_batch_size=1', '--ppo_epochs=2', '--max_iters=2', '--eval_prompts=5',
                             '--eval_interval=1', '--snapshots=true'), after=check)
    same(*outs)
    for name in ('rlhf.00001.pt', 'rlhf.00002.pt'):
        assert distance(outs[0] / name, outs[1] / name) < 1e-5
    assert distance(outs[0] / 'rlhf.00001.pt', outs[0] / 'rlhf.pt') > 1e-4

def test_sizes_of_processes(chain, scripts, tmp_path):
    """What does not divide by the processes: one line with the numbers, and sizes that do."""
    env = dict(WORLD_SIZE=3, RANK=0, LOCAL_RANK=0)
    alone = 'import torch.distributed as d; d.init_process_group = d.destroy_process_group = lambda *a: 0'
    run = command(chain, tmp_path, '--batch_size=16', '--minibatch_size=8')
    said = scripts.fails('batch_size 16 .* minibatch_size 8 .* 1 x 3 processes', *run, env=env, before=alone).err
    proposed = re.findall(r'--\w+=\d+', said)
    assert proposed == ['--batch_size=18', '--minibatch_size=9']
    scripts.fails('no checkpoint', *run, *proposed, env=env, before=alone)

def test_two_processes_sample_and_resume(chain, scripts, tmp_path):
    flags = ('--batch_size=8', '--minibatch_size=4', '--micro_batch_size=2', '--ppo_epochs=1', '--max_iters=2',
             '--eval_interval=2', '--save_interval=1', *SHARED, *ADAPTIVE)
    whole, out = stocked(tmp_path / 'whole', chain), stocked(tmp_path / 'out', chain)
    scripts.two(*command(chain, whole, *flags))
    rows = log(whole)
    assert len(rows) == 2 + 2 # 2 updates, evaluations at 0 and 2
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(row['ratio_gap_first'] < 1e-4 for row in updates(whole))
    leave = kill_at(1, 0).replace('os.kill(os.getpid(), 0)', 'os._exit(3)') # on both ranks, after the save
    with pytest.raises(AssertionError, match='exit code 3'):
        scripts.two(*command(chain, out, *flags), before=leave)
    assert load(out / 'rlhf.resume.pt')['step'] == 1
    scripts.two(*command(chain, out, *flags))
    assert distance(out / 'rlhf.pt', whole / 'rlhf.pt') == 0 and log(out) == rows

# -----------------------------------------------------------------------------
# bad input: one line that says what to do, exit code 1, and everything that was there stays as it was

def put(name, row):
    """Break data_dir/name: its third line becomes this one (a string, or an object as JSON)."""
    def act(data, out):
        lines = (data / name).read_text(encoding='utf-8').splitlines()
        lines[2] = row if isinstance(row, str) else json.dumps(row)
        (data / name).write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return act

def only(name, *rows):
    return lambda data, out: write_rows(data / name, rows)

def gone(name):
    return lambda data, out: [(folder / name).unlink() for folder in (data, out) if (folder / name).exists()]

def cut_off(data, out):
    (out / 'reward.pt').write_bytes((out / 'reward.pt').read_bytes()[:-7])

def other_tokenizer(data, out):
    torch.save({**load(out / 'sft.pt'), 'tokenizer': {**make_spec(), 'pattern': '.'}}, out / 'sft.pt')

BAD = [
    (gone('sft.pt'), [], r'sft\.pt.*python sft\.py'),
    (gone('reward.pt'), [], r'reward\.pt.*python reward\.py'),
    (gone('prompts_train.jsonl'), [], r'prompts_train\.jsonl.*python prepare_data\.py'),
    (cut_off, [], r'reward\.pt .*python reward\.py'),
    (lambda data, out: shutil.copy(out / 'sft.pt', out / 'reward.pt'), [], 'sft.*reward'),
    (other_tokenizer, [], r'different tokenizers.*reward\.py'),
    (put('prompts_train.jsonl', '{"messages": '), [], r'prompts_train\.jsonl:3: '),
    (only('prompts_train.jsonl', dict(messages=user('x' * 99))), [], '6 new tokens .* 48: lower --max_new_tokens'),
    (only('prompts_val.jsonl'), [], r'prompts_val\.jsonl'),
    (None, ['--max_new_tokens=99'], '99 new tokens.*--max_new_tokens'),
    (None, ['--batch_size=20', '--minibatch_size=8'], '20.*8.*--minibatch_size='),
    (None, ['--kl_target=1', '--kl_horizon=0'], 'kl_horizon must be positive'),
    (None, ['--cliprange=-0.1'], 'cliprange must be at least 0'),
    (None, ['--temperature=0'], 'temperature.*0.01'),
    (None, ['--kl_coef=-0.1'], 'kl_coef must be at least 0, not -0.1'),
    (None, ['--algo=dpo'], r"algo must be one of \('ppo', 'grpo', 'rloo', 'reinforce'\), not 'dpo'"),
    (None, ['--critic=none'], 'critic must be one of .*separate.*shared'),
    (None, ['--reward=gold'], 'reward must be one of .*model.*checks.*both'),
    (None, ['--group_size=0'], 'group_size must be positive'),
    (None, ['--task=sums'], "no prompt of task 'sums': leave --task out"),
    (only('prompts_val.jsonl', dict(messages=user('x'))), ['--reward=checks'], r'prompts_val\.jsonl: .*--reward=model')]

@pytest.mark.parametrize('act,flags,pattern', BAD, ids=[f'{i}-{bad[2][:40]}' for i, bad in enumerate(BAD)])
def test_bad_input(act, flags, pattern, chain, scripts, tmp_path):
    data = shutil.copytree(chain.data, tmp_path / 'data')
    out = stocked(tmp_path / 'out', chain)
    (out / 'rlhf.pt').write_text('old')
    if act is not None:
        act(data, out)
    def picture():
        return {p: p.read_bytes() for folder in (data, out) for p in folder.rglob('*') if p.is_file()}
    before = picture()
    scripts.fails(pattern, *command(chain, out, *flags, data=data))
    assert picture() == before

@pytest.mark.parametrize('flags', [
    ['--batch_size=20', '--minibatch_size=8'], ['--minibatch_size=7'],
    ['--algo=grpo'], ['--algo=rloo'], ['--algo=rloo', '--group_size=5'], ['--group_size=6', '--batch_size=8']], ids=str)
def test_proposed_sizes_work(flags, chain, scripts, tmp_path):
    """With what the message proposes the next error is that of the folder, which has no checkpoints."""
    said = scripts.fails('batch_size|group_size', *command(chain, tmp_path, *flags)).err
    proposed = re.findall(r'--\w+=\d+', said)
    assert proposed
    scripts.fails('no checkpoint', *command(chain, tmp_path, *flags, *proposed))

@pytest.mark.parametrize('row', [
    dict(messages=[*user('x'), dict(role='assistant', content='owl')]), dict(checks=dict(max_words=3)),
    dict(messages=user('x'), checks=dict(shout=True)), dict(messages=user('x'), checks=dict(number='abc'))], ids=str)
def test_bad_prompts(row, tmp_path):
    write_rows(tmp_path / 'prompts_train.jsonl', [dict(messages=user('x')), dict(messages=user('x')), row])
    s = ppo('rlhf.py', data_dir=str(tmp_path), tok=Tokenizer(make_spec()), block_size=48, max_new_tokens=6)
    with fails(r'prompts_train\.jsonl:3: '):
        s.load_prompts('train')

def test_prompts_that_are_too_long_are_counted_and_left_out(tmp_path, capsys):
    tok = Tokenizer(make_spec())
    write_rows(tmp_path / 'prompts_train.jsonl', [dict(messages=user(text)) for text in ('Say', 'x' * 99, 'x')])
    s = ppo('rlhf.py', data_dir=str(tmp_path), tok=tok, block_size=48, max_new_tokens=6)
    assert [row['messages'] for row, _ in s.load_prompts('train')] == [user('Say'), user('x')]
    assert 'left out 1 of 3 prompts, no room for 6 new tokens' in capsys.readouterr().out

def test_a_reward_model_that_says_nan(chain, scripts, tmp_path):
    out = stocked(tmp_path, chain)
    ckpt = load(out / 'reward.pt')
    ckpt['weights']['head.bias'].fill_(math.nan)
    torch.save(ckpt, out / 'reward.pt')
    before = {name: (out / name).read_bytes() for name in ('sft.pt', 'reward.pt')}
    scripts.fails(r'a score is nan: make .*reward\.pt again with `python reward\.py`', *command(chain, out))
    assert before == {path.name: path.read_bytes() for path in out.glob('*.pt')}

def test_a_gradient_that_is_not_finite_stops_the_run_at_once(chain, scripts, tmp_path):
    """The last good state stays, and the weights are not touched."""
    out = stocked(tmp_path, chain)
    nan = '''
import torch
real, calls = torch.nn.utils.clip_grad_norm_, []
def clip(parameters, *args):
    parameters = list(parameters)
    calls.append(1)
    if len(calls) > 8 * 3: # 8 minibatches an update: in the fourth
        parameters[0].grad.fill_(float('nan'))
    return real(parameters, *args)
torch.nn.utils.clip_grad_norm_ = clip
'''
    scripts.fails('step 3: gradient norm nan: lower --learning_rate', *command(chain, out), before=nan)
    saved = load(out / 'rlhf.resume.pt')
    assert saved['step'] == 2 and not (out / 'rlhf.pt').exists()
    assert all(weight.isfinite().all() for weight in saved['state']['weights'].values())
