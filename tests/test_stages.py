"""pretrain, sft, reward, rlhf, eval, chat: the formulas inside the scripts, and the real scripts on a tiny world."""
import functools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import model as lib
from conftest import PETS, ROOT, SAY, WORDS, cut, formulas, make_spec, user, write_rows
from model import GPT, GPTConfig, ScalarModel, Tokenizer

CPU = SimpleNamespace(device='cpu', type='cpu', rank=0, world=1, ddp=False,
                      autocast=lambda: torch.autocast('cpu', enabled=False))

def load(path):
    return torch.load(path, weights_only=True)

def log(path):
    """A stage's log without what depends on time."""
    return [{k: v for k, v in row.items() if k != 'tokens_per_second'} for _, row in lib.read_jsonl(path)]

def distance(a, b, without=()):
    a, b = load(a)['weights'], load(b)['weights']
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a if k not in without)

def stocked(out, chain, *names):
    """A fresh out_dir with some of the chain's checkpoints."""
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(chain.out / f'{name}.pt', out)
    return out

# what each stage finds in out_dir
NEEDS = dict(pretrain=(), sft=('base',), reward=('sft',), rlhf=('sft', 'reward'))
MAKES = dict(pretrain='base', sft='sft', reward='reward', rlhf='rlhf')

# -----------------------------------------------------------------------------
# the chain

def test_chain_learns(chain):
    """Every stage ran on what the one before wrote, and got better at what it is for."""
    assert not any(s.err for s in chain.said.values())
    base, sft, reward, rlhf = (log(chain.out / f'{s}.jsonl') for s in ('base', 'sft', 'reward', 'rlhf'))
    assert abs(base[0]['val_loss'] - math.log(283)) < 0.2 and base[-1]['val_loss'] < 0.5
    assert 'ln(283) = 5.6454' in chain.said['pretrain'].out
    assert sft[-1]['val_loss'] < sft[0]['val_loss'] / 2
    assert abs(reward[0]['val_loss'] - math.log(2)) < 0.1 and reward[-1]['accuracy'] == reward[-1]['gold_accuracy'] == 1
    # the bandit: SFT says one of four words, the reward model likes owls, 25 updates later all say owl
    assert rlhf[0]['val_met'] <= 0.7 and rlhf[-1]['val_met'] >= 0.9 and rlhf[-1]['val_score'] > rlhf[0]['val_score']
    assert abs(rlhf[0]['val_kl']) < 1e-4 < rlhf[-1]['val_kl'] # policy = reference at the start
    for name in ('base', 'sft', 'reward', 'rlhf'):
        ckpt = load(chain.out / f'{name}.pt')
        assert ckpt['stage'] == name and ckpt['metrics']['seconds'] > 0 and ckpt['metrics']['flops'] > 0
        assert ckpt['metrics']['tokens'] > 0
        assert not (chain.out / f'{name}.resume.pt').exists()
    assert not list(chain.out.glob('*.partial'))

def test_later_stages_leave_the_earlier_checkpoints_alone(chain):
    for name, data in chain.before.items():
        assert (chain.out / name).read_bytes() == data

# -----------------------------------------------------------------------------
# resume: a killed run ends at the same numbers, bit for bit

LAST = dict(pretrain=10, sft=10, reward=10, rlhf=4) # steps with short.py
EXTRA = dict(pretrain=['--dropout=0.2'], sft=['--dropout=0.2', '--optimizer=muon'],
             rlhf=['--kl_target=5', '--kl_horizon=100'],
             # answers are ranked once, before the kill
             reward=['--sample_prompts=16', '--max_new_tokens=6', '--labeller_noise=0.5'])

def kill_at(step, number):
    """Code that sends the script a signal when it begins this step (rlhf.py seeds step + 1)."""
    return f'''
import model, os
old = model.seed_step
def seed_step(seed, step, rank):
    if step == {step} and not os.path.exists('sampling'):
        os.kill(os.getpid(), {int(number)})
    return old(seed, step, rank)
model.seed_step = seed_step
'''

@pytest.fixture(scope='module')
def uninterrupted(chain, scripts):
    """stage -> its out_dir after a short run that nobody stopped."""
    made = {}
    def get(stage):
        if stage not in made:
            made[stage] = stocked(chain.folder / f'whole_{stage}', chain, *NEEDS[stage])
            scripts.ok(f'{stage}.py', chain.short, f'--data_dir={chain.data}', f'--out_dir={made[stage]}',
                       *EXTRA[stage])
        return made[stage]
    return get

@pytest.mark.parametrize('stage,number',
                         [(s, n) for s in NEEDS for n in (signal.SIGKILL, signal.SIGTERM)]
                         + [('pretrain', signal.SIGINT)], ids=str)
def test_resume_is_bit_identical(stage, number, chain, scripts, uninterrupted, tmp_path):
    whole, name, out = uninterrupted(stage), MAKES[stage], stocked(tmp_path / 'out', chain, *NEEDS[stage])
    command = (f'{stage}.py', chain.short, f'--data_dir={chain.data}', f'--out_dir={out}', *EXTRA[stage])
    at = 3 if stage == 'rlhf' else 7 # saves are at 5 (rlhf: 2)
    if number == signal.SIGKILL:
        assert scripts(*command, before=kill_at(at, number)).code == -signal.SIGKILL
        saved = 2 if stage == 'rlhf' else 5
    else:
        scripts.fails('stopped at step .* the same command goes on', *command, before=kill_at(at, number))
        saved = 3 if stage == 'rlhf' else 8 # the step in which the signal came is finished
    assert load(out / f'{name}.resume.pt')['step'] == saved and not (out / f'{name}.pt').exists()
    assert not list(out.glob('*.partial'))
    again = scripts.ok(*command)
    assert f'at step {saved}' in again.out and 'answered' not in again.out
    assert not (out / f'{name}.resume.pt').exists()
    assert distance(out / f'{name}.pt', whole / f'{name}.pt') == 0
    assert log(out / f'{name}.jsonl') == log(whole / f'{name}.jsonl')
    kept = ('val_loss', 'val_bpb', 'accuracy', 'self_agreement', 'tokens', 'flops', 'val_score')
    a, b = (load(d / f'{name}.pt')['metrics'] for d in (out, whole))
    assert {k: a.get(k) for k in kept} == {k: b.get(k) for k in kept}

@pytest.mark.parametrize('stage', NEEDS)
def test_stop_in_the_last_step_loses_nothing(stage, chain, scripts, tmp_path):
    out, name = stocked(tmp_path / 'out', chain, *NEEDS[stage]), MAKES[stage]
    last = LAST[stage] if stage == 'rlhf' else LAST[stage] - 1 # rlhf.py seeds step + 1
    r = scripts(f'{stage}.py', chain.short, f'--data_dir={chain.data}', f'--out_dir={out}', '--save_interval=1000',
                before=kill_at(last, signal.SIGTERM))
    assert (out / f'{name}.pt').exists() or (out / f'{name}.resume.pt').exists(), r.err

def test_a_run_on_other_settings_is_not_resumed(chain, scripts, tmp_path):
    command = ('pretrain.py', chain.short, f'--data_dir={chain.data}', f'--out_dir={tmp_path}')
    scripts.fails('stopped at step 4', *command, before=kill_at(3, signal.SIGTERM))
    before = (tmp_path / 'base.resume.pt').read_bytes()
    scripts.fails('learning_rate 0.01 -> 0.002.*--resume=false', *command, '--learning_rate=0.002')
    assert (tmp_path / 'base.resume.pt').read_bytes() == before
    scripts.fails('total_batch_size 4 -> 2.*--resume=false', *command, '--batch_size=2')
    (tmp_path / 'base.resume.pt').write_bytes(before[:1000])
    scripts.fails('damaged.*--resume=false', *command)
    scripts.ok(*command, '--resume=false') # starts over
    assert log(tmp_path / 'base.jsonl')[0]['step'] == 0
    out = stocked(tmp_path / 'sft', chain, 'base')
    command = ('sft.py', chain.short, f'--data_dir={chain.data}', f'--out_dir={out}')
    scripts.fails('stopped at step 4', *command, before=kill_at(3, signal.SIGTERM))
    other = 'import model; start = model.start; model.start = lambda c: (start(c), c.update(processes=2))[0]'
    scripts.fails('processes 1 -> 2.*--resume=false', *command, before=other) # other ranks would see other batches

# -----------------------------------------------------------------------------
# the same numbers, however the batch is cut

def test_accumulation_with_unequal_masks(chain, scripts, tmp_path):
    """4 conversations at once = 1 at a time and 4 micro-batches, though their answers have 2 to 20 tokens."""
    outs = [stocked(tmp_path / n, chain, 'base') for n in 'ab']
    common = ('sft.py', chain.short, f'--data_dir={chain.data}', '--learning_rate=1e-4')
    scripts.both(*(((*common, f'--out_dir={out}', f'--batch_size={b}', f'--gradient_accumulation_steps={4 // b}'), {})
                   for out, b in zip(outs, (4, 1))))
    assert distance(outs[0] / 'sft.pt', outs[1] / 'sft.pt') < 1e-6
    assert distance(outs[0] / 'sft.pt', chain.out / 'base.pt') > 1e-3 # it did move
    for a, b in zip(*(log(out / 'sft.jsonl') for out in outs)):
        assert a == pytest.approx(b, rel=1e-3)

def test_pretrain_under_torchrun(chain, scripts, tmp_path):
    """Two gloo processes with two micro-batches of one window each = one process with a batch of four."""
    # all of val for both
    common = [str(chain.short), f'--data_dir={chain.data}', '--learning_rate=1e-3', '--eval_iters=100']
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                str(ROOT / 'pretrain.py')]
    r = subprocess.run([*torchrun, *common, '--batch_size=1', '--total_batch_size=4',
                        f'--out_dir={tmp_path / "two"}'], capture_output=True, text=True, timeout=100)
    assert r.returncode == 0, r.stderr[-3000:]
    assert r.stdout.count('saved ') == 1 and '2 processes' in r.stdout # only rank 0 speaks
    scripts.ok('pretrain.py', *common, '--batch_size=4', f'--out_dir={tmp_path / "one"}')
    assert distance(tmp_path / 'two' / 'base.pt', tmp_path / 'one' / 'base.pt') < 1e-5
    for a, b in zip(log(tmp_path / 'two' / 'base.jsonl'), log(tmp_path / 'one' / 'base.jsonl'), strict=True):
        assert a == pytest.approx(b, rel=1e-4)

@pytest.mark.parametrize('stage', ['sft', 'reward'])
def test_two_processes_are_one(stage, chain, scripts, tmp_path):
    one, two = (stocked(tmp_path / n, chain, *NEEDS[stage]) for n in ('one', 'two'))
    common = (f'{stage}.py', chain.short, f'--data_dir={chain.data}', '--learning_rate=1e-4')
    scripts.ok(*common, '--batch_size=4', f'--out_dir={one}')
    said = scripts.two(*common, '--batch_size=2', f'--out_dir={two}')
    assert said[1].out == ''
    # A bias cancels out of every margin: its gradient is rounding, which Adam makes as large as any. The mean takes it
    # off.
    free = ('head.bias', 'mean') if stage == 'reward' else ()
    assert distance(one / f'{stage}.pt', two / f'{stage}.pt', free) < 1e-5
    if free:
        a, b = (load(out / 'reward.pt')['weights'] for out in (one, two))
        assert (a['mean'] - a['head.bias']).item() == pytest.approx((b['mean'] - b['head.bias']).item(), abs=1e-5)
    for a, b in zip(*(log(out / f'{stage}.jsonl') for out in (one, two)), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)

ANSWER = '''
import model
model.generate = lambda net, prompts, n, stop, temperature: [
    [97 + len(p) % 5] * (1 + len(p) % 4) + [stop] * (len(p) % 3 > 0) for p in prompts]
'''
def test_rlhf_on_two_processes_is_rlhf_on_one(chain, scripts, tmp_path):
    """Ranks draw answers of their own, so here the prompts give them: what is learned of them is the same."""
    one, two = (stocked(tmp_path / n, chain, 'sft', 'reward') for n in ('one', 'two'))
    def flags(n, out):
        return (chain.short, f'--data_dir={chain.data}', f'--out_dir={out}', f'--batch_size={n}', '--max_iters=2',
                f'--minibatch_size={n}', f'--micro_batch_size={n}', '--learning_rate=1e-4', '--ppo_epochs=3')
    scripts.ok('rlhf.py', *flags(8, one), before=ANSWER)
    scripts.two('rlhf.py', *flags(4, two), before=ANSWER)
    assert distance(one / 'rlhf.pt', two / 'rlhf.pt') < 1e-5 < 1e-4 < distance(one / 'rlhf.pt', one / 'sft.pt')
    for a, b in zip(*(log(out / 'rlhf.jsonl') for out in (one, two)), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)

def test_rlhf_and_sampling_on_two_processes(chain, scripts, tmp_path):
    out = stocked(tmp_path, chain, 'sft', 'reward')
    common = (chain.short, f'--data_dir={chain.data}', f'--out_dir={out}', '--max_new_tokens=6')
    said = scripts.two('rlhf.py', *common, '--batch_size=8', '--minibatch_size=4', '--micro_batch_size=2')
    assert said[1].out == '' and 'saved' in said[0].out
    rows = log(out / 'rlhf.jsonl')
    # 4 updates, evaluated at 0, 2, 4
    assert len(rows) == 4 + 3 and all(math.isfinite(v) for r in rows for v in r.values())
    assert all(r['ratio_gap_first'] < 1e-4 for r in rows if 'ratio_gap_first' in r)
    said = scripts.two('reward.py', *common, '--sample_prompts=10', '--batch_size=4')
    ranked = [row for _, row in lib.read_jsonl(out / 'preferences_train.jsonl')]
    assert 1 <= len(ranked) <= 10 and said[1].out == ''
    tables = []
    for run_it in (scripts.two, scripts.ok): # what is not sampled is the same on two processes and on one
        run_it('eval.py', *common)
        tables.append(json.loads((out / 'report.json').read_text(encoding='utf-8'))['table'])
    for name in ('sft', 'rlhf'):
        a, b = ({k: v for k, v in t[name].items() if 'chance' in k or 'bits' in k} for t in tables)
        assert len(a) == 5 and a == pytest.approx(b, rel=1e-5)

# -----------------------------------------------------------------------------
# pretrain

def test_every_window_once_an_epoch_and_y_is_x_later():
    shards = [np.arange(0, 23, dtype=np.uint16), np.arange(100, 109, dtype=np.uint16),
              np.arange(200, 203, dtype=np.uint16)]
    T = 4 # windows of 4 + 1 that share an end: (23 - 1) // 4 = 5, (9 - 1) // 4 = 2, (3 - 1) // 4 = 0
    windows = [(len(s) - 1) // T for s in shards]
    space = dict(np=np, torch=torch, shards=dict(train=shards), windows=dict(train=windows), block_size=T,
                 vocab_size=300, seed=3,
                 total_batch_size=4, shares=2, batch_size=1, functools=functools, die=lib.die)
    ranks = [cut('pretrain.py', 'get_windows', 'get_order', 'get_batch', **space,
                 share=r, run=SimpleNamespace(device='cpu', type='cpu')) for r in range(2)]
    firsts = []
    for step in range(7): # 2 micro-batches x 2 ranks x 1 = 4 windows a step, so 28 = 4 epochs of 7
        for micro in range(2):
            for rank in ranks:
                x, y = rank.get_batch(step, micro)
                # no window crosses from one shard into the next
                assert x.shape == y.shape == (1, T) and torch.equal(y, x + 1)
                firsts.append(x[0, 0].item())
    epochs = [firsts[i:i + 7] for i in range(0, 28, 7)]
    assert all(sorted(e) == [0, 4, 8, 12, 16, 100, 104] for e in epochs) and len(set(map(tuple, epochs))) > 2

@pytest.mark.parametrize('stage', NEEDS)
def test_learning_rate(stage):
    s = cut(f'{stage}.py', 'get_lr', math=math, learning_rate=1.0, min_lr=0.1, warmup_iters=4, max_iters=105)
    assert [round(s.get_lr(i), 6) for i in range(4)] == [0.2, 0.4, 0.6, 0.8] # never 0, and 1 at step 4
    assert s.get_lr(4) == pytest.approx(1.0)
    if stage == 'pretrain': # half way down the cosine between 4 and 104, then the floor
        assert s.get_lr(54) == pytest.approx(0.55) and s.get_lr(104) == pytest.approx(0.1) == s.get_lr(105)
    else: # linear to 0 at the step after the last
        assert s.get_lr(104) == pytest.approx(1 / 101)
    rates = [s.get_lr(i) for i in range(4, 105)]
    assert rates == sorted(rates, reverse=True)

def test_published_shards_need_their_tokenizer(chain, scripts, tmp_path):
    """A token that the vocabulary lacks is an error with both numbers, no index error."""
    data = shutil.copytree(chain.data, tmp_path / 'data')
    header = np.array([20240520, 1, 100] + [0] * 253, '<i4').tobytes()
    (data / 'train_000000.bin').write_bytes(header + np.full(100, 50000, '<u2').tobytes())
    (data / 'train_000001.bin').unlink()
    scripts.fails('50000.*283', 'pretrain.py', chain.short, f'--data_dir={data}', f'--out_dir={tmp_path}')

# -----------------------------------------------------------------------------
# sft

def learned(ids, tok):
    """Which tokens are the assistant's words or the <|end|> after them, read off the tokens."""
    out, who = [], None
    for t in ids:
        out.append(who == tok.assistant)
        who = t if t in (tok.system, tok.user, tok.assistant) else None if t == tok.end else who
    return out

def test_sft_targets(chain, tmp_path):
    tok = Tokenizer(make_spec())
    write_rows(tmp_path / 'chat_train.jsonl', [
        dict(messages=[dict(role='system', content='the'), *user('Say'), dict(role='assistant', content='owl cat'),
                       *user('x'), dict(role='assistant', content='')]),
        dict(messages=user('Say') + [dict(role='assistant', content='fox')])])
    s = cut('sft.py', 'load_chats', 'to_batch', os=__import__('os'), data_dir=str(tmp_path), lib=lib, tok=tok,
            max_length=48, die=lib.die, print0=lib.print0, run=CPU)
    chats = s.load_chats('train')
    x, y = s.to_batch(chats)
    assert x.shape == y.shape == (2, len(chats[0][0]))
    for (row_x, row_y), (ids, targets) in zip(zip(x.tolist(), y.tolist()), chats):
        n = len(ids)
        assert row_x == ids + [tok.pad] * (len(row_x) - n) and row_y[n:] == [-1] * (len(row_y) - n)
        whole = ids + [tok.end]
        assert [t != -1 for t in row_y[:n]] == learned(whole, tok)[1:]
        assert all(t in (-1, whole[i + 1]) for i, t in enumerate(row_y[:n])) # y is x one token later
    owl, cat, fox = (i for w in (' owl', ' cat', ' fox') for i in tok.encode(w)) # one token each, behind a space
    # two answers, the second empty
    assert [t for t in y[0].tolist() if t != -1] == [owl, cat, tok.end, tok.end]
    assert [t for t in y[1].tolist() if t != -1] == [fox, tok.end]

def test_masked_tokens_get_exactly_zero_gradient(chain, scripts, tmp_path):
    watch = '''
import builtins, torch, torch.nn.functional as F
builtins.seen, real = [], F.cross_entropy
def cross_entropy(logits, y, **more):
    if logits.requires_grad:
        logits.register_hook(lambda g: seen.append((g.clone(), y.clone())))
    return real(logits, y, **more)
F.cross_entropy = cross_entropy
'''
    stocked(tmp_path, chain, 'base')
    scripts.ok('sft.py', chain.short, f'--data_dir={chain.data}', f'--out_dir={tmp_path}', before=watch,
               after=f'torch.save(seen, {str(tmp_path / "seen")!r})')
    seen = load(tmp_path / 'seen')
    assert len(seen) == LAST['sft']
    for grad, y in seen:
        largest = grad.flatten(0, -2).abs().amax(-1)
        assert (largest[y == -1] == 0).all() and (largest[y != -1] > 0).all()
        # the loss is the mean over what is learned: each row's gradient is (p - onehot) / n, so -(1 - p) / n at the
        # target
        n = (y != -1).sum()
        assert (grad.flatten(0, -2)[y != -1].gather(1, y[y != -1][:, None]) * n).min() >= -1 - 1e-5

def test_batches_of_sft_hold_every_conversation_once(chain):
    train = [(list(range(n)), None) for n in np.random.default_rng(0).integers(3, 40, 60)]
    s = cut('sft.py', 'get_order', functools=functools, np=np, seed=1, train=train, steps_per_epoch=15, step_size=4)
    orders = [s.get_order(e) for e in (0, 0, 1)]
    assert np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[0], orders[2])
    for order in orders:
        assert order.shape == (15, 4) and sorted(order.flatten()) == list(range(60))
        spread = np.mean([np.ptp([len(train[j][0]) for j in step]) for step in order])
        assert spread < 8 # of like length: 4 drawn at random of 3..39 would spread over 22

# -----------------------------------------------------------------------------
# reward

def test_margins_by_hand_and_their_sign():
    s = cut('reward.py', 'pair_margins', torch=torch)
    rankings = [([[1], [2], [3]], None), ([[4], [5]], None)]
    scores = torch.tensor([5.0, 3.0, 1.0, -1.0, 2.0])
    # 5-3, 5-1, 3-1 of the first ranking, -1-2 of the second; no pair across rankings
    assert s.pair_margins(scores, rankings).tolist() == [2.0, 4.0, 2.0, -3.0]
    swapped = s.pair_margins(scores[[0, 1, 2, 4, 3]], rankings)
    assert swapped.tolist() == [2.0, 4.0, 2.0, 3.0]

def scorer(path):
    ckpt = load(path)
    tok = Tokenizer(ckpt['tokenizer'])
    score = cut('reward.py', 'score', torch=torch, lib=lib, tok=tok, run=CPU).score
    return score, lib.load_model(ckpt, 'cpu', ScalarModel), tok

@torch.no_grad()
def test_score_is_read_at_the_last_real_token(chain):
    score, net, tok = scorer(chain.out / 'reward.pt')
    rows = [tok.render(user('Say it.') + [dict(role='assistant', content=a)])[0]
            for a in ('owl', 'cat dog fox owl cat', '')]
    together = score(net, [(rows, None)])
    for row, got in zip(rows, together):
        assert row[-1] == tok.end
        want = net(torch.tensor([row]))[0, -1] # alone, without any pad
        assert got == pytest.approx(want.item(), abs=1e-4)
    assert together.std() > 0.1

@torch.no_grad()
def test_scores_are_normalised(chain):
    score, net, tok = scorer(chain.out / 'reward.pt')
    rows = [r for _, r in lib.read_jsonl(chain.data / 'preferences_train.jsonl')]
    ids = [[tok.render(r['messages'] + [dict(role='assistant', content=r['completions'][i])])[0]
            for i in r['ranking']] for r in rows]
    got = score(net, [(i, None) for i in ids])
    assert abs(got.mean()) < 1e-3 and abs(got.std() - 1) < 1e-3
    assert net.std > 0 and net.std != 1

def test_simulated_labels(chain, scripts, tmp_path):
    """sample_prompts: the SFT model answers, the labeller ranks; without noise the ranking is the gold order."""
    out = stocked(tmp_path, chain, 'sft')
    r = scripts.ok('reward.py', chain.short, f'--data_dir={chain.data}', f'--out_dir={out}', '--sample_prompts=30',
                   '--sample_answers=6',
                   '--labeller_noise=0', '--max_new_tokens=6')
    assert 'agrees with the gold order on 100.0%, and with itself, asked again, on 100.0%' in r.out
    for split in ('train', 'val'):
        rows = [row for _, row in lib.read_jsonl(out / f'preferences_{split}.jsonl')]
        asked = [row for _, row in lib.read_jsonl(chain.data / f'prompts_{split}.jsonl')]
        assert rows and all(dict(messages=r['messages'], checks=r['checks']) in asked for r in rows)
        for row in rows:
            gold = [lib.grade(row['checks'], t)[1] for t in row['completions']]
            assert len(set(row['completions'])) == len(row['completions']) > 1
            assert len(row['ranking']) > 1 and [gold[i] for i in row['ranking']] == sorted(set(gold), reverse=True)
    assert load(out / 'reward.pt')['metrics']['self_agreement'] == 1.0

# -----------------------------------------------------------------------------
# rlhf: the formulas

def ppo(*names, **space):
    return cut('rlhf.py', *names, **{**dict(torch=torch, math=math, F=F, lib=lib), **space})

def random_answers(B=6, T=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    first, last = torch.randint(0, 4, (B,), generator=g), torch.randint(4, T + 1, (B,), generator=g)
    at = torch.arange(T)
    actions = (at >= first[:, None]) & (at < last[:, None])
    return torch.randn(B, T, generator=g), torch.randn(B, T, generator=g) * actions, actions

@pytest.mark.parametrize('gamma,lam', [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_the_double_sum(gamma, lam):
    rewards, values, actions = random_answers()
    rewards = rewards * actions
    got, returns = ppo('gae', gamma=gamma, lam=lam).gae(rewards, values, actions)
    for b in range(len(rewards)):
        where = actions[b].nonzero()[:, 0].tolist()
        for t in range(rewards.size(1)):
            if t not in where:
                assert got[b, t] == 0 and returns[b, t] == 0
                continue
            # A_t = sum over l of (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}), V = 0 after the answer
            after = {s: values[b, s + 1] if s + 1 in where else 0 for s in where}
            want = sum((gamma * lam) ** (s - t) * (rewards[b, s] + gamma * after[s] - values[b, s])
                       for s in where if s >= t)
            assert got[b, t].item() == pytest.approx(want.item(), abs=1e-5)
            assert returns[b, t].item() == pytest.approx((want + values[b, t]).item(), abs=1e-5)
            if gamma == lam == 1: # the critic cancels out: what is still to be earned
                assert returns[b, t].item() == pytest.approx(sum(rewards[b, s].item() for s in where if s >= t),
                                                             abs=1e-5)

def test_gae_ignores_what_is_outside_of_the_answer():
    rewards, values, actions = random_answers()
    gae = ppo('gae', gamma=0.9, lam=0.8).gae
    noise = torch.where(actions, 0.0, 100.0)
    for a, b in zip(gae(rewards * actions, values, actions), gae(rewards * actions + noise, values + noise, actions)):
        torch.testing.assert_close(a, b)

def test_whitening_ignores_pads():
    x, _, actions = random_answers()
    s = ppo('masked_mean', 'variance', 'whiten')
    got = s.whiten(5 + 3 * x, actions)
    inside = got[actions]
    assert abs(inside.mean()) < 1e-5 and abs(inside.std(unbiased=False) - 1) < 1e-4 and (got[~actions] == 0).all()
    torch.testing.assert_close(got, s.whiten(torch.where(actions, 5 + 3 * x, 1e4), actions), atol=1e-4, rtol=1e-4)
    assert s.masked_mean(x, actions) == pytest.approx(x[actions].mean().item(), abs=1e-6)
    assert s.masked_mean(x, torch.zeros_like(actions)) == 0 # no NaN

def test_rewards_by_hand():
    """Score and fine once, at the last token of the answer; the KL penalty at every token of it, nowhere else."""
    actions = torch.tensor([[False, True, True, False], [True, True, True, True]])
    logprobs = torch.tensor([[9.0, -1.0, -2.0, 9.0], [-1.0, -1.0, -1.0, -1.0]])
    ref = torch.tensor([[0.0, -2.0, -1.0, 0.0], [-1.0, -1.0, -1.0, -3.0]])
    ended, score = torch.tensor([True, False]), torch.tensor([10.0, 20.0])
    got = ppo('get_rewards', missing_end_penalty=3.0).get_rewards(score, ended, logprobs, ref, actions, 0.5)
    # row 0: -0.5 (-1+2) = -0.5; -0.5 (-2+1) = +0.5, + 10.
    # row 1: 0, 0, 0, -0.5 (-1+3) = -1, + 20 - 3 since it did not stop
    assert got.tolist() == [[0.0, -0.5, 10.5, 0.0], [0.0, 0.0, 0.0, 16.0]]
    none = ppo('get_rewards', missing_end_penalty=3.0).get_rewards(score, ended, ref, ref, actions, 0.5)
    assert none.sum().item() == 10 + 20 - 3

def test_kl_estimators_are_exact_in_expectation():
    """Answers of one token from p = (1/2, 1/4, 1/4), listed in that proportion: their mean is the expectation."""
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.2, 0.2, 0.6])
    kl = (p * (p / q).log()).sum().item()
    answers = torch.tensor([0, 0, 1, 2])
    logprobs, ref = p.log()[answers][:, None], q.log()[answers][:, None]
    actions, n, zero = torch.ones(4, 1, dtype=torch.bool), 4, torch.zeros(4)
    k1 = -ppo('get_rewards', missing_end_penalty=0.0).get_rewards(zero, zero == 0, logprobs, ref, actions, 1.0)
    assert k1.mean().item() == pytest.approx(kl, abs=1e-6)
    masked_mean = ppo('masked_mean').masked_mean
    of_reference = dict(torch=torch, masked_mean=masked_mean, logprobs=logprobs, ref_logprobs=ref, actions=actions,
                        length=4, n=4)
    of_step = dict(ratio=(ref - logprobs).exp(), log_ratio=ref - logprobs) # the new policy is q
    found = []
    for f in formulas('rlhf.py', 'k3'):
        value = eval(f, dict(of_reference, **of_step))
        found.append(value.mean().item() if isinstance(value, torch.Tensor) else value)
    assert len(found) == 2 and found == pytest.approx([kl, kl], abs=1e-6)
    assert (of_step['ratio'] - 1 - of_step['log_ratio'] >= 0).all()

def test_every_prompt_once_a_pass_whatever_the_ranks():
    for world, size in ((1, 6), (2, 3), (3, 2)):
        ranks = [ppo('get_prompts', 'get_order', functools=functools, np=np, seed=1, batch_size=size,
                     train=list('abcdefghi'), run=SimpleNamespace(rank=r, world=world)) for r in range(world)]
        drawn = [x for step in range(3) for rank in ranks for x in rank.get_prompts(step)] # 18 = two passes over 9
        assert sorted(drawn[:9]) == sorted(drawn[9:]) == list('abcdefghi') and drawn[:9] != drawn[9:]

@torch.no_grad()
def test_rollout(chain):
    """Which tokens are the answer's, what is said of them, and what the reward model gets to read."""
    tok = Tokenizer(make_spec())
    sft, rm = load(chain.out / 'sft.pt'), load(chain.out / 'reward.pt')
    owl, cat, x = (tok.encode(w)[0] for w in ('owl', ' cat', 'x'))
    queries = [[tok.eot, tok.user, x, x, x, tok.end, tok.assistant], [tok.eot, tok.user, tok.end, tok.assistant]]
    said = [[owl, cat, tok.end], [cat, owl, x, cat]]
    s = ppo('rollout', 'get_logprobs', 'ActorCritic', nn=torch.nn, tok=tok, run=CPU, max_new_tokens=4, temperature=1.0,
            micro_batch_size=1,
            reference=lib.load_model(load(chain.out / 'base.pt'), 'cpu'),
            reward_model=lib.load_model(rm, 'cpu', ScalarModel),
            lib=SimpleNamespace(generate=lambda *a: said, pad_right=lib.pad_right, at_end=lib.at_end))
    s.space['raw_model'] = net = s.ActorCritic(lib.load_model(sft, 'cpu'), lib.load_model(rm, 'cpu', ScalarModel))
    ids, actions, logprobs, ref_logprobs, entropy, values, score, ended, texts = s.rollout(list(zip('ab', queries)))
    assert ids.tolist() == [queries[0] + said[0], queries[1] + said[1] + [tok.pad] * 2]
    # ids[:, 1:] is of the answer
    assert actions.tolist() == [[False] * 6 + [True] * 3, [False] * 3 + [True] * 4 + [False] * 2]
    assert ended.tolist() == [True, False] and texts == ['owl cat', 'catowlx cat']
    assert (logprobs[~actions] == 0).all() and (values[~actions] == 0).all() and (logprobs[actions] < 0).all()
    for b, (q, a) in enumerate(zip(queries, said)):
        # where each token of the answer is chosen
        row, at = torch.tensor([q + a]), torch.arange(len(q) - 1, len(q) + len(a) - 1)
        for model, got in ((net.actor, logprobs), (s.space['reference'], ref_logprobs)):
            want = F.log_softmax(model(row)[0, at], -1)[torch.arange(len(a)), torch.tensor(a)]
            torch.testing.assert_close(got[b, at], want, atol=1e-4, rtol=1e-4)
        # the value before the token is known
        torch.testing.assert_close(values[b, at], net.critic(row)[0, at], atol=1e-4, rtol=1e-4)
        read = torch.tensor([q + a + [tok.end] * (a[-1] != tok.end)]) # a cut answer is ended for the reward model
        torch.testing.assert_close(score[b], s.space['reward_model'](read)[0, -1], atol=1e-4, rtol=1e-4)

@torch.no_grad()
def test_logprobs_of_answers():
    torch.manual_seed(0)
    net = GPT(GPTConfig('gpt2', 50, 16, 2, 2, n_embd=32))
    ids, (_, _, actions) = torch.randint(50, (6, 10)), random_answers()
    logprobs, entropy = ppo('get_logprobs', temperature=0.7).get_logprobs(net, ids, actions)
    logp = F.log_softmax(net(ids)[:, :-1] / 0.7, -1)
    torch.testing.assert_close(logprobs, logp.gather(-1, ids[:, 1:, None])[..., 0] * actions, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1) * actions, atol=1e-5, rtol=1e-5)

# -----------------------------------------------------------------------------
# rlhf: runs

def test_nothing_has_changed_at_the_first_minibatch(chain):
    rows = [r for r in log(chain.out / 'rlhf.jsonl') if 'ratio_gap_first' in r]
    assert len(rows) == 25 and all(r['ratio_gap_first'] < 1e-4 for r in rows)
    assert any(r['clipfrac'] > 0 for r in rows) # later minibatches do differ

def test_bfloat16(chain, scripts, tmp_path):
    out = stocked(tmp_path, chain)
    for stage in NEEDS:
        scripts.ok(f'{stage}.py', chain.short, f'--data_dir={chain.data}', f'--out_dir={out}', '--dtype=bfloat16')
        assert all(math.isfinite(v) for row in log(out / f'{MAKES[stage]}.jsonl') for v in row.values())
        assert all(v.dtype == torch.float32 for v in load(out / f'{MAKES[stage]}.pt')['weights'].values())
    assert all(r['ratio_gap_first'] < 0.2 for r in log(out / 'rlhf.jsonl') if 'ratio_gap_first' in r)

@pytest.fixture(scope='module')
def one_pass(chain, scripts):
    """One pass, one minibatch, in micro-batches of the whole and of 4: each update is taken at the old policy."""
    outs = []
    for micro in (16, 4):
        outs.append(stocked(chain.folder / f'micro{micro}', chain, 'sft', 'reward'))
        check = ''' # reference and reward model are unchanged, actor and critic are not
assert not any(p.requires_grad for m in (reference, reward_model) for p in m.parameters())
for m, ckpt in ((reference, sft), (reward_model, rm)):
    assert all(torch.equal(v, ckpt['weights'][k]) for k, v in m.state_dict().items())
assert any(not torch.equal(v, sft['weights'][k]) for k, v in raw_model.actor.state_dict().items())
assert any(not torch.equal(v, rm['weights'][k]) for k, v in raw_model.critic.state_dict().items())
'''
        scripts.ok('rlhf.py', chain.short, f'--data_dir={chain.data}', f'--out_dir={outs[-1]}', '--ppo_epochs=1',
                   '--minibatch_size=16', f'--micro_batch_size={micro}', '--learning_rate=1e-3', after=check)
    return outs

def test_one_pass_is_on_policy(one_pass):
    for row in log(one_pass[0] / 'rlhf.jsonl'):
        if 'approx_kl' in row:
            assert abs(row['approx_kl']) < 1e-6 and row['clipfrac'] == 0 and abs(row['ratio'] - 1) < 1e-5
            assert abs(row['pg_loss']) < 1e-4 # the mean of whitened advantages

def test_micro_batches_change_nothing(one_pass):
    assert distance(one_pass[0] / 'rlhf.pt', one_pass[1] / 'rlhf.pt') < 1e-5
    for a, b in zip(*(log(out / 'rlhf.jsonl') for out in one_pass), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)

def test_huge_kl_coef_keeps_the_policy_where_it_is(chain, scripts, tmp_path):
    out = stocked(tmp_path, chain, 'sft', 'reward')
    scripts.ok('rlhf.py', chain.tiny, f'--data_dir={chain.data}', f'--out_dir={out}', '--kl_coef=100')
    free, held = (log(d / 'rlhf.jsonl')[-1]['val_kl'] for d in (chain.out, out))
    assert abs(held) < 0.3 < 1 < free

def test_adaptive_kl_coef(chain, scripts, tmp_path):
    """KL starts at 0, below the target: the coefficient falls by 0.2 n / horizon = 0.2 x 16 / 160 = 2% an update."""
    out = stocked(tmp_path, chain, 'sft', 'reward')
    scripts.ok('rlhf.py', chain.short, f'--data_dir={chain.data}', f'--out_dir={out}', '--kl_target=50',
               '--kl_horizon=160', '--kl_coef=0.1')
    found = [r['kl_coef'] for r in log(out / 'rlhf.jsonl') if 'kl_coef' in r]
    assert found == pytest.approx([0.1 * 0.98 ** i for i in range(4)])

# -----------------------------------------------------------------------------
# eval

def report(out):
    return json.loads((out / 'report.json').read_text(encoding='utf-8'))

@torch.no_grad()
def test_bits_per_byte_by_hand(chain):
    ckpt = load(chain.out / 'base.pt')
    net, tok, T = lib.load_model(ckpt, 'cpu').eval(), Tokenizer(ckpt['tokenizer']), 48
    tokens = lib.read_shard(chain.data / 'val_000000.bin').tolist()[:201] # val_tokens = 200, and one to predict
    bits = n_bytes = 0
    for i in range(0, 192, T): # four windows fit
        logp = F.log_softmax(net(torch.tensor([tokens[i:i + T]]))[0], -1)
        for t, target in enumerate(tokens[i + 1:i + T + 1]):
            bits -= logp[t, target].item() / math.log(2)
            n_bytes += len(tok.bytes_of(target)) # <|endoftext|> costs bits and has no bytes
    assert report(chain.out)['table']['base']['bits per byte'] == pytest.approx(bits / n_bytes, rel=1e-4)

def test_benchmarks_of_a_model_that_knows(chain):
    table = report(chain.out)['table']['base']
    assert table['right (chance 25%)'] == 1 and table['wrong (chance 25%)'] == 0
    assert table['schema (chance 50%)'] == 1 and table['greedy (chance 0%)'] == 0.5

def test_report(chain):
    r, text = report(chain.out), (chain.out / 'report.md').read_text(encoding='utf-8')
    assert list(r['table']) == ['base', 'sft', 'rlhf'] and list(r['costs']) == ['base', 'sft', 'reward', 'rlhf']
    for name in r['table']['rlhf']:
        assert name in text and name in chain.said['eval'].out
    assert all(q in text for q in ('- base', '- sft', '- rlhf')) and any(q in text for q in SAY)
    assert (chain.out / 'curves.svg').read_text(encoding='utf-8').startswith('<svg')
    rlhf = r['table']['rlhf']
    assert rlhf['win rate against SFT'] > 0.5
    assert rlhf['win rate, 95% interval'][0] <= rlhf['win rate against SFT'] <= rlhf['win rate, 95% interval'][1]
    assert rlhf['all checks met'] >= 0.9 and 0 < rlhf['KL from SFT, nats an answer'] < 10
    assert rlhf['entropy, nats a token'] < r['table']['sft']['entropy, nats a token']

def test_a_model_against_itself(chain, scripts, tmp_path):
    """An rlhf.pt with the weights of sft.pt says the same: half the points, no KL, no width."""
    stocked(tmp_path, chain, 'sft')
    torch.save({**load(tmp_path / 'sft.pt'), 'stage': 'rlhf'}, tmp_path / 'rlhf.pt')
    scripts.ok('eval.py', *chain.flags[:2], f'--out_dir={tmp_path}')
    table = report(tmp_path)['table']
    assert list(table) == ['sft', 'rlhf'] # no base.pt: left out
    assert table['rlhf']['win rate against SFT'] == 0.5 and table['rlhf']['win rate, 95% interval'] == [0.5, 0.5]
    assert abs(table['rlhf']['KL from SFT, nats an answer']) < 1e-5
    assert {k: v for k, v in table['rlhf'].items() if k in table['sft']} == table['sft']

def test_gather_weaves_the_ranks_back_together(monkeypatch):
    def all_gather_object(parts, mine):
        parts[:] = [['a', 'd', 'g'], ['b', 'e'], ['c', 'f']] # each rank had every third of a .. g
    monkeypatch.setattr(lib.dist, 'all_gather_object', all_gather_object)
    assert ''.join(lib.gather(['a', 'd', 'g'], SimpleNamespace(ddp=True, world=3))) == 'abcdefg'

def test_win_rate():
    win_rate = cut('eval.py', 'win_rate', np=np, seed=1).win_rate
    assert win_rate([1.0, 0.5], [1.0, 0.5]) == (0.5, 0.5, 0.5)
    assert win_rate([1, 1, 1], [0, 0, 0])[0] == 1 and win_rate([1, 0, 3, 4], [0, 1, 3, 3])[0] == 2.5 / 4
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, 400) / 3, rng.integers(0, 4, 400) / 3
    (x, lo, hi), (y, lo2, hi2) = win_rate(a, b), win_rate(b, a)
    assert x == pytest.approx(1 - y) and lo < x < hi # symmetric
    # points are 0, 1/2, 1 with shares 3/8, 1/4, 3/8: standard error sqrt(3/16 / 400) = 0.0217, the interval 4 of them
    # wide
    assert hi - lo == pytest.approx(2 * 1.96 * math.sqrt(3 / 16 / 400), rel=0.15)
    assert (lo + hi2) == pytest.approx(1, abs=0.01)

def test_distinct():
    distinct = cut('eval.py', 'distinct').distinct
    assert distinct(['a b a', 'B c'], 1, 99) == 3 / 5     # a b c of a b a b c
    assert distinct(['a b a', 'B c'], 2, 99) == 3 / 3     # ab ba bc, none across answers
    assert distinct(['a a a a'], 2, 99) == 1 / 3
    assert distinct(['a b a', 'B c'], 1, 3) == 2 / 3      # the budget: only a b a is read
    assert distinct([], 1, 5) == distinct(['a'], 2, 5) == 0

# -----------------------------------------------------------------------------
# chat

def test_chat_answers_once(chain, scripts):
    """What goes into a pipe is the answer alone; settings, device and model are told on stderr."""
    for flags in ((f'--out_dir={chain.out}',), (chain.out / 'rlhf.pt',), (f'--checkpoint={chain.out / "rlhf.pt"}',)):
        r = scripts.ok('chat.py', *flags, '--prompt=Say a word.', '--temperature=0')
        assert r.out == 'owl\n'
        assert all(told in r.err for told in ('temperature = 0', 'device: ', 'stage rlhf'))

def test_chat_from_a_pipe(chain, scripts):
    said = 'Say a word.\n\n/retry\n/new\n/retry\nSay it.\n/quit\nSay\n'
    r = scripts.ok('chat.py', chain.out / 'rlhf.pt', '--temperature=0', stdin=said)
    assert [line.strip() for line in r.out.splitlines()] == ['owl'] * 3 and 'nothing to answer again' in r.err
    assert scripts.ok('chat.py', chain.out / 'rlhf.pt', stdin='').out == '' # nothing asked: nothing said

def test_an_answer_has_no_space_before_it(chain, scripts):
    """render() puts a space before each text: the one that the model says is no part of the answer."""
    watch = """
import builtins, model
builtins.asked, real = [], model.generate
def generate(net, prompts, *more):
    asked.extend(prompts)
    return real(net, prompts, *more)
model.generate = generate
"""
    seen = chain.folder / 'asked.json'
    r = scripts.ok('chat.py', chain.out / 'rlhf.pt', '--temperature=0', stdin='Say\nSay\n', before=watch,
                   after=f'import json; json.dump(asked, open({str(seen)!r}, "w"))')
    tok = Tokenizer(make_spec())
    turns = user('Say') + [dict(role='assistant', content='owl')] + user('Say')
    # the second question stands behind the first answer as training would spell it
    assert json.loads(seen.read_text()) == [tok.render(turns[:1], prompt=True)[0], tok.render(turns, prompt=True)[0]]
    assert r.out == 'owl\nowl\n'

def test_chat_with_a_base_model_continues(chain, scripts):
    for name, pet in PETS.items():
        r = scripts.ok('chat.py', chain.out / 'base.pt', '--temperature=0', f'--prompt={name} has the')
        assert r.out.splitlines()[-1].startswith(f' {pet}.')

def test_chat_longer_than_the_context(chain, scripts):
    r = scripts.ok('chat.py', chain.out / 'rlhf.pt', '--max_new_tokens=8', stdin='Say a word.\n' * 8)
    assert 'oldest turn is forgotten' in r.err
    r = scripts.ok('chat.py', chain.out / 'rlhf.pt', '--max_new_tokens=8', stdin='Say a word. ' * 40 + '\nSay it.\n')
    assert 'the last 40 fit' in r.err

def test_chat_seed(chain, scripts):
    """A base model at this temperature rambles: two seeds say the same 24 tokens with a chance of about nil."""
    flags = (chain.out / 'base.pt', '--temperature=3', '--max_new_tokens=24', '--prompt=Anna')
    said = [scripts.ok('chat.py', *flags, f'--seed={s}').out for s in (1, 1, 2)]
    assert said[0] == said[1] != said[2]

def test_chat_never_splits_a_character(capsys):
    said = 'é🙂'.encode() + b'\xff' + '日'.encode()[:2] # bytes come one at a time; the end is no whole character
    def generate(net, prompts, max_new_tokens, stop, temperature, warp, on_token):
        for b in said:
            on_token([b])
            pieces.append(capsys.readouterr().out)
    pieces, tok = [], Tokenizer(make_spec())
    s = cut('chat.py', 'answer', 'truncate', codecs=__import__('codecs'), sys=sys, run=CPU, tok=tok, chatty=True,
            size=48, max_new_tokens=8, first=[], net=None,
            temperature=1.0, lib=SimpleNamespace(generate=generate), top_k=0, top_p=1.0, min_p=0.0)
    text = s.answer(user('x'))
    pieces.append(capsys.readouterr().out.rstrip('\n'))
    assert text == ''.join(pieces) == 'é🙂\ufffd\ufffd'
    assert pieces[:6] == ['', 'é', '', '', '', '🙂']

# -----------------------------------------------------------------------------
# bad input: one line that says what to do, exit code 1, and everything that was there stays as it was

def cut_off(path):
    path.write_bytes(path.read_bytes()[:-7])

def put(name, *rows):
    """Break data_dir/name: its third line becomes this one (a string, or an object as JSON)."""
    def act(data, out):
        lines = (data / name).read_text(encoding='utf-8').splitlines()
        lines[2:3] = [r if isinstance(r, str) else json.dumps(r) for r in rows]
        (data / name).write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return act

def only(name, *rows):
    return lambda data, out: write_rows(data / name, rows)

def gone(*names):
    return lambda data, out: [(d / n).unlink() for n in names for d in (data, out) if (d / n).exists()]

def other_tokenizer(data, out):
    spec = make_spec()
    (data / 'tokenizer.json').write_text(json.dumps({**spec, 'pattern': r'\w+|\s+|[^\w\s]+'}))

def other_tokenizer_in_sft(data, out):
    torch.save({**load(out / 'sft.pt'), 'tokenizer': {**make_spec(), 'pattern': '.'}}, out / 'sft.pt')

SAID = dict(role='assistant', content='owl')
RANKED = dict(messages=user('Say'), completions=['owl', 'cat'], ranking=[0, 1])
BAD = [
    # nothing there: the message names the command
    ('pretrain', gone('train_000000.bin', 'train_000001.bin'), [], r'train_\*\.bin.*python tokenizer\.py'),
    ('pretrain', gone('val_000000.bin'), [], r'val_\*\.bin.*python tokenizer\.py'),
    ('pretrain', gone('tokenizer.json'), [], r'tokenizer\.json.*python tokenizer\.py'),
    ('sft', gone('base.pt'), [], r'base\.pt.*python pretrain\.py'),
    ('sft', gone('chat_train.jsonl'), [], r'chat_train\.jsonl.*python prepare_data\.py'),
    ('sft', gone('chat_val.jsonl'), [], r'chat_val\.jsonl.*python prepare_data\.py'),
    ('reward', gone('sft.pt'), [], r'sft\.pt.*python sft\.py'),
    ('reward', gone('preferences_train.jsonl'), [], r'preferences_train\.jsonl.*python prepare_data\.py'),
    ('reward', gone('prompts_val.jsonl'), ['--sample_prompts=4', '--max_new_tokens=6'],
     r'prompts_val\.jsonl.*prepare_data\.py'),
    ('rlhf', gone('sft.pt'), [], r'sft\.pt.*python sft\.py'),
    ('rlhf', gone('reward.pt'), [], r'reward\.pt.*python reward\.py'),
    ('rlhf', gone('prompts_train.jsonl'), [], r'prompts_train\.jsonl.*python prepare_data\.py'),
    ('eval', gone('base.pt', 'sft.pt', 'rlhf.pt'), [], r'python pretrain\.py'),
    ('eval', None, ['--benchmarks=right,write'], 'write.*right'),
    ('eval', None, ['--models=nothing.pt'], r'nothing\.pt'),
    ('chat', gone('rlhf.pt'), [], r'rlhf\.pt.*speedrun\.sh'),
    # damaged files
    ('pretrain', lambda data, out: cut_off(data / 'train_000001.bin'), [],
     r'train_000001\.bin is damaged.*tokenizer\.py'),
    ('pretrain', other_tokenizer, [], 'another tokenizer.*tokenizer.py'),
    ('pretrain', lambda data, out: (data / 'tokenizer.json').write_text('{'), [],
     r'tokenizer\.json.*python tokenizer\.py'),
    ('pretrain', None, ['--block_size=5000'], '5000.*--block_size='),
    ('sft', lambda data, out: cut_off(out / 'base.pt'), [], r'base\.pt is no whole checkpoint.*python pretrain\.py'),
    ('rlhf', lambda data, out: cut_off(out / 'reward.pt'), [], r'reward\.pt is no whole checkpoint.*python reward\.py'),
    ('sft', lambda data, out: shutil.copy(out / 'sft.pt', out / 'base.pt'), [], "'sft'.*'base'"),
    ('rlhf', lambda data, out: shutil.copy(out / 'sft.pt', out / 'reward.pt'), [], "'sft'.*'reward'"),
    ('eval', None, ['--models=base,reward'], "'reward'"),
    ('chat', lambda data, out: shutil.copy(out / 'reward.pt', out / 'rlhf.pt'), [], "'reward'"),
    ('rlhf', other_tokenizer_in_sft, [], 'different tokenizers.*reward.py'),
    # lines
    *((stage, put(f'{name}.jsonl', '{"messages": '), [], rf'{name}\.jsonl:3: ') for stage, name in (
        ('sft', 'chat_train'), ('sft', 'chat_val'), ('reward', 'preferences_val'), ('rlhf', 'prompts_train'),
        ('eval', 'prompts_val'), ('eval', 'benchmarks/right'))),
    *(('sft', put('chat_train.jsonl', row), [], r'chat_train\.jsonl:3: ') for row in (
        dict(messages=user('x')), dict(messages=[]), dict(messages='x'), dict(text='x'),
        dict(messages=user('x') + user('y') + [SAID]),
        dict(messages=[dict(role=['user'], content='x'), SAID]),
        dict(messages=[dict(role='user', content=None), SAID]), '[1]', '"x"')),
    *(('reward', put('preferences_train.jsonl', row), [], r'preferences_train\.jsonl:3: ') for row in (
        {**RANKED, 'ranking': [0, 2]}, {**RANKED, 'ranking': [0, -1]}, {**RANKED, 'ranking': [1, 1]},
        {**RANKED, 'ranking': [0]}, {**RANKED, 'ranking': 3},
        {**RANKED, 'ranking': [[0], [1]]}, {**RANKED, 'ranking': ['0', '1']}, {**RANKED, 'completions': [1, 2]},
        {**RANKED, 'completions': None},
        {**RANKED, 'messages': [*user('x'), SAID]}, {**RANKED, 'messages': None}, dict(messages=user('x')),
        {**RANKED, 'checks': dict(kontains=['x'])},
        {**RANKED, 'checks': 'x'}, {**RANKED, 'checks': dict(max_words='x')})),
    *(('rlhf', put('prompts_train.jsonl', row), [], r'prompts_train\.jsonl:3: ') for row in (
        dict(messages=[*user('x'), SAID]), dict(checks=dict(max_words=3)),
        dict(messages=user('x'), checks=dict(shout=True)), dict(messages=user('x'), checks=['x']),
        dict(messages=user('x'), checks=dict(contains=3)))),
    *(('reward', put('prompts_train.jsonl', row), ['--sample_prompts=4', '--max_new_tokens=6'],
       r'prompts_train\.jsonl:3: ') for row in (
        dict(messages=user('x')), dict(messages=user('x'), checks=dict(shout=True)),
        dict(messages=user('x'), checks=['x']))),
    *(('eval', put('prompts_val.jsonl', row), [], r'prompts_val\.jsonl:3: ') for row in (
        dict(messages=[*user('x'), SAID]), dict(prompt='x'), dict(messages=user('x'), checks=dict(shout=True)),
        dict(messages=user('x'), checks=['x']))),
    *(('eval', put('benchmarks/right.jsonl', row), [], r'right\.jsonl:3: ') for row in (
        dict(query='x', choices=['a', 'b']), dict(query='x', choices=['a', 'b'], gold='b'),
        dict(query='x', choices=3, gold=0), dict(x=1),
        dict(query='x', choices=['a', 'b'], gold=2), dict(query='x', choices=[1, 2], gold=0),
        dict(query=None, choices=['a'], gold=0), dict(context='x', continuation=3),
        dict(query='x', choices=[], gold=0))),
    # nothing fits, nothing is left
    ('sft', only('chat_train.jsonl', dict(messages=user('x' * 99) + [SAID])), [],
     'no conversation fits into 48.*block_size'),
    ('sft', only('chat_val.jsonl'), [], r'chat_val\.jsonl'),
    ('sft', only('chat_train.jsonl', *[dict(messages=user('x') + [SAID])] * 3), [],
     '3 conversations.*8.*--batch_size=3'),
    ('reward', only('preferences_train.jsonl', {**RANKED, 'messages': user('x' * 99)}), [], 'preferences_train'),
    ('reward', only('preferences_train.jsonl', RANKED), [], '1 rankings.*8'),
    ('rlhf', only('prompts_train.jsonl', dict(messages=user('x' * 99))), [],
     'room for 6 new tokens in 48.*--max_new_tokens'),
    ('rlhf', only('prompts_val.jsonl'), [], r'prompts_val\.jsonl'),
    ('rlhf', None, ['--max_new_tokens=99'], 'room for 99'),
    # settings
    ('pretrain', None, ['--learning_rat=1'], 'learning_rate'),
    ('sft', None, ['--epochs=many'], 'epochs'),
    ('rlhf', None, ['--batch_size=20', '--minibatch_size=8'], '20.*8'),
    ('reward', None, ['--device=toaster'], 'toaster'),
    ('pretrain', None, ['--arch=bert'], 'bert'),
    ('pretrain', None, ['--n_head=5'], '32.*5'),
    ('pretrain', None, ['--beta1=1'], 'beta1'), ('pretrain', None, ['--seed=18446744073709551616'], r'2\*\*32'),
    ('pretrain', None, ['--learning_rate=-1'], 'learning_rate must be at least 0, not -1'),
    ('sft', None, ['--warmup_iters=-1'], 'warmup_iters must be at least 0'),
    ('reward', None, ['--temperature=-1', '--sample_prompts=4'], 'temperature'),
    ('rlhf', None, ['--kl_target=1', '--kl_horizon=0'], 'kl_horizon must be at least 1'),
    ('eval', None, ['--n_prompts=-1'], 'n_prompts'), ('eval', None, ['--temperature=1e-50'], 'temperature'),
    # checks that only fail once there are words or numbers to check
    *((stage, put(f'prompts_{split}.jsonl', dict(messages=user('x'), checks=checks)), [],
       rf'prompts_{split}\.jsonl:3: ') for stage, split in (('rlhf', 'train'), ('eval', 'val'))
      for checks in (dict(max_words='x'), dict(number='abc'))),
    # of the right stage, but not of this version
    ('sft', lambda data, out: torch.save(dict(stage='base'), out / 'base.pt'), [], 'no whole checkpoint'),
    ('sft', lambda data, out: torch.save({**load(out / 'base.pt'), 'model_args': dict(depth=3)}, out / 'base.pt'), [],
     'no whole checkpoint')]

def test_a_run_that_diverges_in_its_last_steps_leaves_the_old_checkpoint(chain, scripts, tmp_path):
    """Five bad steps in a row end a run; what goes wrong after that is seen before the old file is replaced."""
    out = stocked(tmp_path, chain, 'base')
    old = (out / 'base.pt').read_bytes()
    scripts.fails('diverged.*--learning_rate', 'pretrain.py', chain.short, f'--data_dir={chain.data}',
                  f'--out_dir={out}', '--learning_rate=1e30', '--arch=gpt2', '--n_kv_head=0', '--max_iters=3')
    assert (out / 'base.pt').read_bytes() == old

@pytest.mark.parametrize('error,line', [
    (PermissionError(13, 'Permission denied', '/x/y.txt'), 'error: /x/y.txt: Permission denied'),
    (MemoryError(), 'error: out of memory.*--batch_size'),
    (RuntimeError('CUDA out of memory. Tried'), 'error: out of memory.*--batch_size'),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 'error: out of memory.*--batch_size'),
    (RuntimeError('probability tensor contains either `inf`, `nan`'), 'error: .*not finite.*--learning_rate'),
    (KeyboardInterrupt(), '\nstopped; .*starts again'), (BrokenPipeError(32, 'Broken pipe'), '.*Broken pipe')])
def test_one_line_for_what_is_no_error_of_the_program(error, line, capsys):
    lib.on_error(type(error), error, None, default=lambda *_: print('traceback', file=sys.stderr))
    said = capsys.readouterr().err
    assert re.fullmatch(line + '.*\n', said), said
    for bug in (ValueError('a bug'), RuntimeError('unsupported memory format')):
        lib.on_error(type(bug), bug, None, default=lambda *_: print('traceback', file=sys.stderr))
        assert capsys.readouterr().err == 'traceback\n'

@pytest.mark.parametrize('stage,act,flags,pattern', BAD, ids=[f'{i}-{b[0]}-{b[3][:40]}' for i, b in enumerate(BAD)])
def test_bad_input(stage, act, flags, pattern, chain, scripts, tmp_path):
    data, out = shutil.copytree(chain.data, tmp_path / 'data'), tmp_path / 'out'
    before = NEEDS.get(stage, ('base', 'sft', 'reward', 'rlhf'))
    stocked(out, chain, *before, *(['sft'] if stage == 'sft' else []))
    for name in ('report.md', 'report.json'):
        (out / name).write_text('old')
    if act:
        act(data, out)
    def picture():
        return {p: p.read_bytes() for d in (data, out) for p in d.rglob('*') if p.is_file()}
    old = picture()
    scripts.fails(pattern, f'{stage}.py', *([chain.short] if stage in NEEDS else [chain.tiny]), f'--out_dir={out}',
                  *flags,
                  *([] if stage == 'chat' else [f'--data_dir={data}']))
    new = picture()
    # made before val was found missing
    sampled = {out / 'preferences_train.jsonl'} if '--sample_prompts=4' in flags else set()
    assert new.keys() - sampled == old.keys() and all(new[p] == old[p] for p in old)

def test_what_is_too_long_is_counted_and_left_out(chain, scripts, tmp_path):
    data = shutil.copytree(chain.data, tmp_path / 'data')
    out = stocked(tmp_path / 'out', chain, 'base', 'sft', 'reward')
    long = user('x' * 99)
    put('chat_train.jsonl', dict(messages=long + [SAID]))(data, out)
    put('preferences_train.jsonl', {**RANKED, 'completions': ['x' * 99, 'owl']})(data, out)
    put('prompts_train.jsonl', dict(messages=long))(data, out)
    for stage in ('sft', 'reward', 'rlhf'):
        r = scripts.ok(f'{stage}.py', chain.short, f'--data_dir={data}', f'--out_dir={out}')
        assert '1 of 40' in r.out

def test_a_batch_without_anything_to_learn_is_no_nan(chain, scripts, tmp_path):
    """A conversation is never without something to learn (its <|end|>), but an answer may be empty."""
    data, out = shutil.copytree(chain.data, tmp_path / 'data'), stocked(tmp_path / 'out', chain, 'base')
    only('chat_train.jsonl', *[dict(messages=user('x') + [dict(role='assistant', content='')])] * 8)(data, out)
    scripts.ok('sft.py', chain.short, f'--data_dir={data}', f'--out_dir={out}', '--batch_size=1')
    assert all(math.isfinite(v) for row in log(out / 'sft.jsonl') for v in row.values())

def test_a_loss_that_is_not_finite_is_skipped_then_ends_the_run(chain, scripts, tmp_path):
    """Five steps in a row: one line with what to do, and no checkpoint of ruined weights."""
    r = scripts.fails('5 steps in a row', 'pretrain.py', chain.short, f'--data_dir={chain.data}',
                      f'--out_dir={tmp_path}',
                      before='import torch, torch.nn.functional as F\nreal = F.cross_entropy\n'
                             'F.cross_entropy = lambda *a, **k: real(*a, **k) * float("nan")')
    assert r.out.count('skipped') == 5 and not (tmp_path / 'base.pt').exists()

def test_exams_that_need_sampling_are_left_out(tmp_path, capsys):
    """GSM8K's and HumanEval's rows lie beside the others once they are downloaded: eval.py goes on without them."""
    from model import die
    f = cut('eval.py', 'load_benchmark', lib=lib, die=die, max_questions=0)
    rows = dict(gsm8k=dict(messages=[], checks={'number': 1}), he=dict(task_id='x', prompt='p', test='t'))
    for name, row in rows.items():
        (tmp_path / name).write_text(json.dumps(row) + '\n', encoding='utf-8')
        assert f.load_benchmark(tmp_path / name) == [] and f'{name}: left out' in capsys.readouterr().out
