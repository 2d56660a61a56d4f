"""reward.py: pairs and scores, DPO, the labeller and a person, the report, resume, two processes, bad input."""
import json
import math
import re
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch

from conftest import (definitions, distance, fails, folder_bytes, formulas, kill_at, load, make_spec, read_log,
                      replace_line, stocked, user, write_rows)
from model import ScalarModel, Tokenizer, grade, load_model, read_jsonl

CPU = SimpleNamespace(device='cpu', device_type='cpu', rank=0, world_size=1,
                      autocast=lambda: torch.autocast('cpu', enabled=False))
SAMPLED = ('--sample_prompts=16', '--max_new_tokens=6', '--labeller_noise=0.5')
RANKED = dict(messages=user('Say'), completions=['owl', 'cat'], ranking=[0, 1])

def command(chain, out, *flags, data=None):
    return ('reward.py', chain.short, f'--data_dir={data or chain.data}', f'--out_dir={out}', *flags)

# -----------------------------------------------------------------------------
# the formulas

def ranking(answers, places=None, gold=None, start=1):
    """A ranking as read_example returns it; without places nothing is tied."""
    k = len(answers)
    return SimpleNamespace(answers=answers, start=start, places=torch.tensor(places or list(range(k))),
                           gold=torch.tensor(gold or [0.0] * k), indices=list(range(k)))

def test_pairs_by_hand_and_their_sign():
    s = definitions('reward.py')
    rankings = [ranking([[1], [2], [3]], [0, 1, 1]), ranking([[4], [5]])]
    scores = [torch.tensor([5.0, 3.0, 1.0]), torch.tensor([-1.0, 2.0])]
    margins, targets, weights = s.get_pairs(scores, rankings)
    # 5-3, 5-1, 3-1 of the first ranking, -1-2 of the second; no pair across rankings
    assert margins.tolist() == [2.0, 4.0, 2.0, -3.0]
    assert targets.tolist() == [1.0, 1.0, 0.5, 1.0]
    assert weights.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])
    swapped, _, _ = s.get_pairs([scores[0], scores[1].flip(0)], rankings)
    assert swapped.tolist() == [2.0, 4.0, 2.0, 3.0]

def test_a_ranking_counts_once_and_a_tie_half():
    """The loss of the script against the formulas written out."""
    s = definitions('reward.py')
    loss_of = formulas('reward.py', 'loss')[-2]
    scores = [torch.tensor([5.0, 3.0, 1.0]), torch.tensor([-1.0, 2.0])]
    rankings = [ranking([[1], [2], [3]], [0, 1, 1]), ranking([[4], [5]])]
    margins, targets, weights = s.get_pairs(scores, rankings)
    logsigmoid = torch.nn.functional.logsigmoid
    one = lambda margin: -logsigmoid(torch.tensor(margin)).item()
    first = (one(2.0) + one(4.0) + (one(2.0) + one(-2.0)) / 2) / 3 # a tie is half of both directions
    names = dict(s.space, margins=margins, targets=targets, weights=weights)
    assert eval(loss_of, names).item() == pytest.approx(first + one(-3.0))
    # a tie pulls the two scores together, whichever is named first
    for score in (0.0, 1.5, -1.5):
        x = torch.tensor([score, 0.0], requires_grad=True)
        margins, targets, weights = s.get_pairs([x], [ranking([[1], [2]], [0, 0])])
        eval(loss_of, dict(s.space, margins=margins, targets=targets, weights=weights)).backward()
        push = 1 / (1 + math.exp(-score)) - 0.5
        assert x.grad.tolist() == pytest.approx([push, -push])

def test_accuracies_by_hand(monkeypatch):
    """Three rankings: the labeller's order, the gold scores, and what the model says."""
    val = [ranking([[1], [2], [3]], None, [3.0, 1.0, 2.0]),  # gold: 1 > 3 > 2, the labeller swapped 2 and 3
           ranking([[4], [5]]),                               # no gold scores known
           ranking([[6], [7]], None, [1.0, 0.5])]
    scores = {1: 5.0, 2: 1.0, 3: 4.0, 4: 1.0, 5: 0.0, 6: 0.0, 7: 2.0}
    s = definitions('reward.py', val=val, run=CPU, batch_size=2, whole=torch.nn.Identity(), fsdp=False,
                    get_scores=lambda model, batch: [torch.tensor([scores[a[0]] for a in r.answers]) for r in batch])
    found = s.evaluate()
    losses = [torch.nn.functional.softplus(-torch.tensor(m)).mean().item()
              for m in ([5 - 1.0, 5 - 4, 1 - 4], [1.0 - 0], [0 - 2.0])]
    assert found['val_accuracy'] == pytest.approx(3 / 5) # (1, 2), (1, 3) and (4, 5)
    assert found['val_gold_accuracy'] == 3 / 4 # (1, 2), (1, 3) and (3, 2) of four
    assert found['val_loss'] == pytest.approx(sum(losses) / 3)
    s.space['val'] = val[1:2]
    assert 'val_gold_accuracy' not in s.evaluate()

def scorer(path, **more):
    ckpt = load(path)
    tok = Tokenizer(ckpt['tokenizer'])
    s = definitions('reward.py', tok=tok, run=CPU, **more)
    if ckpt['stage'] == 'reward':
        return s, load_model(ckpt, 'cpu', ScalarModel), tok
    return s, s.Policy(load_model(ckpt, 'cpu')), tok

def rendered(tok, *texts):
    question = user('Say it.')
    rows = [tok.render(question + [dict(role='assistant', content=text)])[0] for text in texts]
    return ranking(rows, start=len(tok.render(question, prompt=True)[0]))

@torch.no_grad()
def test_the_score_is_read_at_the_last_real_token(chain):
    s, net, tok = scorer(chain.out / 'reward.pt')
    both = rendered(tok, 'owl', 'cat dog fox owl cat', '')
    together, = s.get_scores(net, [both])
    for row, got in zip(both.answers, together):
        assert row[-1] == tok.end
        want = net(torch.tensor([row]))[0, -1] # alone, without any pad
        assert got == pytest.approx(want.item(), abs=1e-5)
    assert together.std() > 0.1

@torch.no_grad()
def test_the_score_of_dpo_by_its_formula(chain):
    """beta times (log p - log p_ref), summed over the answer and its <|end|>; alone as in a batch of longer ones."""
    reference = load_model(load(chain.out / 'sft.pt'), 'cpu')
    s, policy, tok = scorer(chain.out / 'rlhf.pt', objective='dpo', beta=0.3)
    s.space['reference'] = s.Policy(reference)
    both = rendered(tok, 'owl', 'cat dog fox owl cat', '')
    together, = s.get_scores(policy, [both])
    for row, got in zip(both.answers, together):
        want = 0.0
        for t in range(both.start, len(row)): # token by token
            for net, sign in ((policy.body, 1), (reference, -1)):
                logits = net(torch.tensor([row[:t]]))[0, -1]
                want += 0.3 * sign * logits.log_softmax(-1)[row[t]].item()
        assert got == pytest.approx(want, abs=1e-5)
    assert together.std() > 0.01
    same, = s.get_scores(s.Policy(reference), [both])
    assert same.tolist() == [0, 0, 0] # so the loss starts at ln 2

@torch.no_grad()
def test_saved_scores_are_normalised(chain):
    s, net, tok = scorer(chain.out / 'reward.pt')
    rankings = [s.read_example(row) for _, row in read_jsonl(chain.data / 'preferences_train.jsonl')]
    got = torch.cat(s.get_scores(net, rankings))
    assert abs(got.mean()) < 1e-3 and abs(got.std() - 1) < 1e-3
    assert net.std > 0 and net.std != 1

def test_interval():
    s = definitions('reward.py')
    assert s.wilson(0.8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4) # as in textbooks
    low, high = s.wilson(1.0, 20)
    assert low == pytest.approx(0.8389, abs=1e-4) and high == pytest.approx(1)

def test_report_by_hand(capsys):
    """Four rankings of two answers and a tie. Answers 1, 3, 5, 7 are better, gold scores know it of the first three."""
    tok = Tokenizer(make_spec())
    words = ['owl', 'cat dog', 'dog', 'fox', 'cat', 'owl owl', 'fox', 'cat owl dog']
    val = []
    for first, gold in ((0, [1.0, 0.75]), (2, [1.0, 0.5]), (4, [0.0, 1.0]), (6, None)):
        one = rendered(tok, *words[first:first + 2])
        val.append(SimpleNamespace(**{**vars(one), 'gold': torch.tensor(gold or [0.0, 0.0]), 'indices': [0, 1] if first < 4 else [2, 1]}))
    val.append(rendered(tok, 'owl', 'fox'))
    val[-1].places = torch.tensor([0, 0])
    s = definitions('reward.py', tok=tok, val=val)
    scores = [torch.tensor(pair) for pair in ([2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.1, 0.0], [9.0, 0.0])]
    found = s.report(scores)
    assert found['n_pairs'] == 4 and found['interval'] == s.wilson(3 / 4, 4)
    assert found['ceiling'] == pytest.approx(2 / 3) # the labeller errs in the third
    assert found['by_gap'] == [1, 0, 0] # gaps 0.25, 0.5 and 1: the model says 1, 4 and 5
    sizes = [len(words[i].split()) < len(words[i + 1].split()) for i in (0, 4, 6)]
    assert all(sizes) and found['always_longer'] == 0.5 / 4 # dog and fox are equally long
    assert found['always_first'] == 2 / 4
    sigmoid = [1 / (1 + math.exp(-m)) for m in (2, 1, 3, 0.1)]
    in_last_bins = abs(sigmoid[0] - 1) + abs(sigmoid[1]) + abs(sigmoid[2] - 1) + abs(sigmoid[3] - 1)
    assert found['calibration_error'] == pytest.approx(in_last_bins / 4) # 0.88, 0.73, 0.95 and 0.52: four bins
    out = capsys.readouterr().out
    assert out.endswith('labeller sees it:\n-1.00 Say it.\n      labeller: dog\n      model:    fox\n') # the only one

def test_learning_rate():
    s = definitions('reward.py', learning_rate=1.0, warmup_iters=4, max_iters=105)
    assert [round(s.get_lr(i), 6) for i in (0, 3, 4, 104)] == [0.2, 0.8, 1.0, round(1 / 101, 6)]

# -----------------------------------------------------------------------------
# the chain and the simulated labeller

def test_it_learns_and_its_logs_have_different_keys(chain):
    rows = read_log(chain.out / 'reward.jsonl')
    training, validation = [row for row in rows if 'loss' in row], [row for row in rows if 'val_loss' in row]
    assert len(training) + len(validation) == len(rows)
    assert all(set(row) == {'step', 'loss', 'lr', 'norm', 'accuracy'} for row in training)
    assert all(set(row) == {'step', 'val_loss', 'val_accuracy', 'val_gold_accuracy'} for row in validation)
    assert validation[0]['val_loss'] == pytest.approx(math.log(2)) # all scores are 0
    assert validation[-1]['val_accuracy'] > 0.75 and validation[-1]['val_gold_accuracy'] > 0.75 # from one half
    metrics = load(chain.out / 'reward.pt')['metrics']
    assert metrics['val_accuracy'] == validation[-1]['val_accuracy'] and metrics['self_agreement'] is None
    assert metrics['ceiling'] == 1 and metrics['interval'][0] < metrics['val_accuracy'] <= metrics['interval'][1]
    assert metrics['tokens'] > 0 and metrics['flops'] > 0 and metrics['seconds'] > 0

def test_simulated_labels(chain, scripts, tmp_path):
    """sample_prompts: the SFT model answers, the labeller ranks; without noise the ranking is the gold order."""
    out = stocked(tmp_path, chain, 'sft')
    r = scripts.ok(*command(chain, out, '--sample_prompts=30', '--sample_answers=6', '--labeller_noise=0',
                            '--max_new_tokens=6'))
    assert r.out.count('orders 100.0% of them alike') == 2
    for split in ('train', 'val'):
        rows = [row for _, row in read_jsonl(out / f'preferences_{split}.jsonl')]
        asked = [row for _, row in read_jsonl(chain.data / f'prompts_{split}.jsonl')]
        assert rows and all(dict(messages=r['messages'], checks=r['checks']) in asked for r in rows)
        for row in rows:
            gold = [grade(row['checks'], text)[1] for text in row['completions']]
            assert len(set(row['completions'])) == len(row['completions']) > 1
            assert len(row['ranking']) > 1 and [gold[i] for i in row['ranking']] == sorted(set(gold), reverse=True)
    assert load(out / 'reward.pt')['metrics']['self_agreement'] == 1.0

@pytest.fixture(scope='module')
def dpo(chain, scripts):
    """DPO after a reward model that has sampled its rankings."""
    out = stocked(chain.folder / 'dpo', chain, 'sft')
    flags = '--sample_prompts=16', '--max_new_tokens=6', '--labeller_noise=0.5'
    scripts.ok(*command(chain, out, *flags))
    before = (out / 'preferences_train.jsonl').read_bytes()
    r = scripts.ok(*command(chain, out, *flags, '--objective=dpo', '--beta=0.5'))
    assert (out / 'preferences_train.jsonl').read_bytes() == before and 'answered' not in r.out
    return SimpleNamespace(out=out, said=r.out)

def test_dpo_learns_from_the_same_rankings(dpo, chain, scripts):
    rows = read_log(dpo.out / 'dpo.jsonl')
    assert rows[0]['val_loss'] == pytest.approx(math.log(2), abs=1e-6) # policy and reference are the same
    assert rows[-1]['val_loss'] < 0.99 * math.log(2)
    ckpt, sft = load(dpo.out / 'dpo.pt'), load(dpo.out / 'sft.pt')
    assert ckpt['stage'] == 'dpo' and ckpt['weights'].keys() == sft['weights'].keys()
    assert ckpt['metrics']['self_agreement'] == load(dpo.out / 'reward.pt')['metrics']['self_agreement']
    assert not (dpo.out / 'dpo.resume.pt').exists() and distance(dpo.out / 'dpo.pt', dpo.out / 'sft.pt') > 0

def test_dpo_is_evaluated_and_talked_to(dpo, chain, scripts):
    scripts.ok('eval.py', chain.short, f'--data_dir={chain.data}', f'--out_dir={dpo.out}')
    table = json.loads((dpo.out / 'report.json').read_text(encoding='utf-8'))['table']
    assert list(table) == ['sft', 'dpo']
    assert {'KL from SFT, nats per answer', 'entropy, nats per token', 'win rate against SFT'} <= table['dpo'].keys()
    assert 'labeller and gold score' in (dpo.out / 'report.md').read_text(encoding='utf-8')
    scripts.ok('chat.py', dpo.out / 'dpo.pt', '--prompt=Say', '--max_new_tokens=3', '--device=cpu')

def test_dpo_samples_anew_for_another_sft(dpo, chain, scripts):
    ckpt = load(dpo.out / 'sft.pt')
    ckpt['metrics']['seconds'] += 1
    out = shutil.copytree(dpo.out, dpo.out.parent / 'dpo2')
    torch.save(ckpt, out / 'sft.pt')
    flags = ('--objective=dpo', '--resume=false')
    r = scripts.ok(*command(chain, out, '--sample_prompts=16', '--max_new_tokens=6', *flags))
    assert 'answered' in r.out
    first = (out / 'preferences_train.jsonl').read_bytes()
    r = scripts.ok(*command(chain, out, '--judge=file', *flags)) # says it outright
    assert 'answered' not in r.out and (out / 'preferences_train.jsonl').read_bytes() == first

@torch.no_grad()
def test_show(dpo, chain, scripts):
    for stage in ('reward', 'dpo'):
        r = scripts.ok('reward.py', f'--out_dir={dpo.out}', f'--objective={stage}', '--show=Say', '--answer=owl cat',
                       '--device=cpu')
        lines = r.out.splitlines()[-3:]
        assert [line.split()[1] for line in lines] == ['owl', 'cat', '<|end|>']
        s, net, tok = scorer(dpo.out / f'{stage}.pt', objective=stage)
        s.space['reference'] = s.Policy(load_model(load(dpo.out / 'sft.pt'), 'cpu'))
        one = s.read_example(dict(messages=user('Say'), completions=['owl cat', 'x'], ranking=[0, 1]))
        assert float(lines[-1].split()[0]) == pytest.approx(s.get_scores(net, [one])[0][0].item(), abs=1e-3)
    bare = stocked(dpo.out.parent / 'bare', chain, 'sft')
    scripts.fails(r'reward\.pt.*python reward\.py', 'reward.py', f'--out_dir={bare}', '--show=Say', '--device=cpu')

# -----------------------------------------------------------------------------
# a person

def session(chain, scripts, out, typed, *flags):
    more = '--resume=false', '--judge=human', '--sample_prompts=8', '--max_new_tokens=6', *flags
    return scripts.ok(*command(chain, out, *more), stdin=typed).out

def human_rows(out):
    return definitions('reward.py').read_human(out / 'preferences_train.jsonl')

def test_a_person_ranks(chain, scripts, tmp_path):
    """Nonsense is asked again, a skipped question is not written, an undone one is asked again; then it goes on."""
    out = stocked(tmp_path, chain, 'sft', 'reward')
    said = session(chain, scripts, out, 'b>z\na\n\nb>\nB > A\ns\nb=a\na>b\nu\nb>a\nq\n')
    assert said.count('b is the best') == 1 + 4 # at the start, and after each nonsense
    first = human_rows(out)
    assert [row['ranking'] for row in first] == [[1, 0], [[1, 0]], [1, 0]]
    assert re.search(r'you agree with the labeller on \d+% of 3 pairs, kappa ', said)
    assert re.search(r'you agree with the last reward model on \d+% of 3 pairs, kappa ', said)
    assert 'with yourself' not in said
    assert load(out / 'reward.pt')['config']['judge'] == 'human' # and it has learned from them
    before = (out / 'preferences_train.jsonl').read_bytes()
    left = int(re.findall(r'(\d+) left', said)[0])
    said = session(chain, scripts, out, 'a>b\n') # then the input ends
    assert int(re.findall(r'(\d+) left', said)[0]) == left - 3
    assert (out / 'preferences_train.jsonl').read_bytes().startswith(before) and len(human_rows(out)) == 4
    # the simulated labeller keeps them
    scripts.ok(*command(chain, out, *SAMPLED, '--resume=false'))
    assert human_rows(out)[:3] == first and len(human_rows(out)) == 4

# types these verdicts, then dies without a word
KILLED = """
import builtins, os
typed = iter({})
def ask(prompt):
    return next(typed, None) or os._exit(0)
builtins.input = ask
"""

def test_what_was_typed_is_safe(chain, scripts, tmp_path):
    """A session that is killed, then two at once: each verdict is a whole line, and an undo takes only its own."""
    out = stocked(tmp_path, chain, 'sft')
    words = command(chain, out, '--judge=human', '--sample_prompts=8', '--max_new_tokens=6')
    scripts.ok(*words, before=KILLED.format(['a>b', 'b>a']))
    assert [row['ranking'] for row in human_rows(out)] == [[0, 1], [1, 0]] and not (out / 'reward.pt').exists()
    scripts.both((words, dict(before=KILLED.format(['a>b', 'u'] * 6 + ['a>b'] * 3))),
                 (words, dict(before=KILLED.format(['b>a'] * 3))))
    assert sorted(row['ranking'] for row in human_rows(out)[2:]) == [[0, 1]] * 3 + [[1, 0]] * 3

def test_kappa_by_hand():
    """Eight pairs, five of them ordered alike; then against the textbook's table of both ways to read each pair."""
    s = definitions('reward.py')
    one = torch.tensor([1.0, 2, 3, -1, -1, 1, 0, 0])
    two = torch.tensor([9.0, 1, -1, -2, -1, 0, 0, 3])
    alike, kappa = s.agreement(one, two)
    # ties: 2/8 and 1/4 of them; better by chance: 6/16 times 6/16, and worse as often
    assert alike == 5 / 8 and kappa == pytest.approx((5 / 8 - 22 / 64) / (1 - 22 / 64))
    table = {}
    for a, b in [*zip(one.sign().tolist(), two.sign().tolist()), *zip((-one).sign().tolist(), (-two).sign().tolist())]:
        table[a, b] = table.get((a, b), 0) + 1 / 16
    observed = sum(p for (a, b), p in table.items() if a == b)
    chance = sum(sum(p for (a, _), p in table.items() if a == v) * sum(p for (_, b), p in table.items() if b == v)
                 for v in (-1, 0, 1))
    assert kappa == pytest.approx((observed - chance) / (1 - chance))
    assert s.agreement(one, one) == (1, 1) and s.agreement(one[:6], -one[:6]) == (0, -1)
    assert s.agreement(one[6:], one[6:])[0] == 1 # only ties: no division by zero

def test_agreement_after_a_session(tmp_path, capsys):
    """With the labeller, who is without noise here, with a model, and with oneself."""
    rows = [dict(messages=user('Say'), completions=['owl', 'cat', 'dog'], ranking=[0, [2, 1]], judge='human',
                 checks=dict(contains=['owl'])),
            {**RANKED, 'ranking': [1, 0], 'judge': 'human', 'checks': dict(contains=['owl'])},
            {**RANKED, 'judge': 'human'}, # without checks: the labeller has no opinion
            dict(messages=user('Say'), completions=['owl', 'cat', 'dog'], ranking=[0, [1, 2]], repeat=[1, 0],
                 judge='human')]
    (tmp_path / 'reward.pt').touch()
    scores = [torch.tensor([3.0, 1.0, 2.0]), torch.tensor([5.0, 5.0]), torch.tensor([0.0, 1.0])]
    s = definitions('reward.py', tok=Tokenizer(make_spec()), run=CPU, out_path=tmp_path / 'reward.pt', stage='reward',
                    labeller_noise=0.0, load_checkpoint=lambda *_: None, load_model=lambda *_: torch.nn.Identity(),
                    score_all=lambda model, examples: scores[:len(examples)])
    s.compare(rows)
    assert capsys.readouterr().out.splitlines() == [
        'you agree with yourself on 0% of 1 pairs, kappa -1.00', # the dog was ranked only once
        # 0 > 1, 0 > 2, 1 = 2 and 1 > 0: all but the last. Chance 1/16 + 2 (3/8)^2 = 22/64
        f'you agree with the labeller on 75% of 4 pairs, kappa {(48 - 22) / (64 - 22):.2f}',
        # of five: 0 > 1 and 0 > 2; a tie each, but another pair. Chance 1/25 + 2 (4/10)^2 = 9/25
        f'you agree with the last reward model on 40% of 5 pairs, kappa {(10 - 9) / (25 - 9):.2f}']
    s.compare([]) # stopped at once
    assert capsys.readouterr().out == ''

def ranks(tmp_path, monkeypatch, typed, n=16):
    """A person is asked n questions with three answers each, in this process -> its functions, the verdicts."""
    s = definitions('reward.py', tok=Tokenizer(make_spec()), run=CPU, out_dir=str(tmp_path), out_path='none',
                    data_dir=str(tmp_path / 'no data'), max_length=48)
    answered = [dict(messages=user('Say' + '!' * i), completions=['owl', 'cat', 'dog']) for i in range(n)]
    typed = iter(typed)
    monkeypatch.setattr('builtins.input', lambda _: next(typed, 'q'))
    s.ask_person(answered)
    return s, s.read_human(tmp_path / 'preferences_train.jsonl')

def test_every_tenth_question_comes_again(tmp_path, monkeypatch, capsys):
    """In reverse order: who always prefers the first answer contradicts himself, who prefers the owl does not."""
    s, rows = ranks(tmp_path, monkeypatch, ['a>b=c'] * 15 + ['c>a=b'] + ['a>b=c'])
    out = capsys.readouterr().out
    asked = re.findall(r'left: (.*)\n  a\) (.*)\n  b\) (.*)\n  c\) (.*)', out)
    assert asked[9] == ('Say!!!!!!!!!', 'owl', 'cat', 'dog') and asked[15] == ('Say!!!!!!!!!', 'dog', 'cat', 'owl')
    assert len(asked) == len(rows) == 17 and len({row['messages'][0]['content'] for row in rows}) == 16
    assert [row['ranking'] for row in rows if 'repeat' in row] == [[0, [2, 1]]]
    assert 'you agree with yourself on 100% of 3 pairs, kappa 1.00' in out
    s.space['judge'] = 'file'
    assert len(s.load_examples('train')) == 16 # the second verdict is not learned from
    (tmp_path / 'preferences_train.jsonl').unlink()
    ranks(tmp_path, monkeypatch, ['a>b=c'] * 17)
    # 0 > 1, 0 > 2, 1 = 2 and then 2 > 0, 2 > 1, 1 = 0: never alike. Chance 1/9 + 2 (1/3)^2 = 1/3
    assert 'you agree with yourself on 0% of 3 pairs, kappa -0.50' in capsys.readouterr().out

def test_undo_of_what_comes_again(tmp_path, monkeypatch, capsys):
    """The tenth verdict is undone and given anew: it comes again once. A repeat can be undone and skipped too."""
    _, rows = ranks(tmp_path, monkeypatch, ['a>b'] * 10 + ['u', 'b>a'] + ['a>b'] * 5 + ['a>b', 'u', 'b>a'])
    assert [(row['repeat'], row['ranking']) for row in rows if 'repeat' in row] == [([1, 0], [1, 2])]
    assert [row['ranking'] for row in rows].count([1, 0]) == 1 and len(rows) == 16
    assert len(re.findall(r'left: Say!{9}\n', capsys.readouterr().out)) == 4 # twice each

def test_undo_loses_nothing_of_another_program(tmp_path, monkeypatch):
    """It has the file open since before the undo, and writes the very same verdict before and another after it."""
    path = tmp_path / 'preferences_train.jsonl'
    mine = dict(messages=user('Say'), completions=['owl', 'cat', 'dog'], ranking=[0, 1], judge='human')
    with open(path, 'ab', buffering=0) as other:
        def typed():
            yield 'a>b'
            other.write(json.dumps(mine).encode() + b'\n')
            yield 'u'
            other.write(json.dumps({**mine, 'ranking': [2, 1]}).encode() + b'\n')
            yield 'b>a'
        _, rows = ranks(tmp_path, monkeypatch, typed())
    assert [row['ranking'] for row in rows] == [[0, 1], [2, 1], [1, 0]]
    assert rows[0] == mine

def test_a_smaller_share_is_a_part_of_a_larger_one():
    """share=1.0 changes nothing; the examples keep their order."""
    import numpy as np
    order_of, train_of = formulas('reward.py', 'order')[0], formulas('reward.py', 'train')[-1]
    parts = {}
    for share in (0.1, 0.3, 1.0):
        names = dict(np=np, seed=1, share=share, train=list(range(50)))
        names['order'] = eval(order_of, names)
        parts[share] = eval(train_of, names)
    assert parts[1.0] == list(range(50)) and [len(part) for part in parts.values()] == [5, 15, 50]
    assert set(parts[0.1]) < set(parts[0.3]) and parts[0.3] == sorted(parts[0.3]) != list(range(15))

# -----------------------------------------------------------------------------
# resume and processes

@pytest.fixture(scope='module')
def uninterrupted(chain, scripts):
    out = stocked(chain.folder / 'whole_reward', chain, 'sft')
    scripts.ok(*command(chain, out, *SAMPLED))
    return out

@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM], ids=str)
def test_resume_is_bit_identical(number, chain, scripts, uninterrupted, tmp_path):
    out = stocked(tmp_path, chain, 'sft')
    if number == signal.SIGKILL:
        assert scripts(*command(chain, out, *SAMPLED), before=kill_at(7, number)).code == -signal.SIGKILL
    else:
        scripts.fails('stopped at step 8 .* the same command continues', *command(chain, out, *SAMPLED),
                      before=kill_at(7, number))
    saved = 5 if number == signal.SIGKILL else 8 # the step in which SIGTERM came is finished
    assert load(out / 'reward.resume.pt')['step'] == saved and not (out / 'reward.pt').exists()
    second = scripts.ok(*command(chain, out, *SAMPLED)).out
    assert f'at step {saved}' in second and 'answered' not in second # the answers are sampled only once
    assert distance(out / 'reward.pt', uninterrupted / 'reward.pt') == 0
    assert read_log(out / 'reward.jsonl') == read_log(uninterrupted / 'reward.jsonl')
    a, b = (load(folder / 'reward.pt')['metrics'] for folder in (out, uninterrupted))
    assert a['self_agreement'] is not None
    assert {k: v for k, v in a.items() if k != 'seconds'} == {k: v for k, v in b.items() if k != 'seconds'}

# after a run with fsdp: each of the two processes holds half of every tensor
HALF = 'assert all(0.6 * p.numel() > p.to_local().numel() for p in raw_model.parameters() if len(p) > 1)'

def same(one, two, stage='reward'):
    # A bias cancels out of every margin: its gradient is rounding, which Adam makes as large as any. The mean takes it
    # off.
    assert distance(one / f'{stage}.pt', two / f'{stage}.pt', ('head.bias', 'mean')) < 1e-5
    if stage == 'reward':
        a, b = (load(out / 'reward.pt')['weights'] for out in (one, two))
        assert (a['mean'] - a['head.bias']).item() == pytest.approx((b['mean'] - b['head.bias']).item(), abs=1e-5)
    for a, b in zip(read_log(one / f'{stage}.jsonl'), read_log(two / f'{stage}.jsonl'), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
        assert all(abs(a[k] - b[k]) < 1e-5 for k in ('loss', 'val_loss') if k in a)
    a, b = (load(out / f'{stage}.pt')['metrics'] for out in (one, two))
    for name in ('tokens', 'flops', 'calibration_error', 'length_correlation'):
        assert a[name] == pytest.approx(b[name], abs=1e-5)

def test_processes_and_micro_batches_change_nothing(chain, scripts, tmp_path):
    one, two, moved = (stocked(tmp_path / n, chain, 'sft') for n in ('one', 'two', 'moved'))
    flags = ('--learning_rate=1e-4', '--total_batch_size=4', '--share=0.5') # two epochs of five steps
    scripts.ok(*command(chain, one, *flags, '--batch_size=4'))
    said = scripts.two(*command(chain, two, *flags, '--batch_size=2'))
    assert said[1].out == '' and 'saved' in said[0].out
    same(one, two)
    # two processes with fsdp, stopped; one process with four micro-batches, stopped; again two
    words = command(chain, moved, *flags, '--batch_size=2', '--parallel=fsdp')
    with pytest.raises(AssertionError, match='stopped at step 2 and saved'):
        scripts.two(*words, before=kill_at(1, signal.SIGTERM))
    scripts.fails('stopped at step 7 and saved', *command(chain, moved, *flags, '--batch_size=1'),
                  before=kill_at(6, signal.SIGTERM))
    said = scripts.two(*words, '--batch_size=1', after=HALF)
    assert 'at step 7' in said[0].out and 'saved' in said[0].out and said[1].out == ''
    same(one, moved)

def test_dpo_in_two_processes(chain, scripts, tmp_path):
    one, two, fsdp = (stocked(tmp_path / n, chain, 'sft') for n in ('one', 'two', 'fsdp'))
    flags = ('--learning_rate=1e-4', '--objective=dpo', '--epochs=1', '--total_batch_size=8')
    scripts.ok(*command(chain, one, *flags, '--batch_size=8'))
    scripts.two(*command(chain, two, *flags, '--batch_size=4'))
    assert distance(one / 'dpo.pt', one / 'sft.pt') > 1e-4
    same(one, two, 'dpo')
    scripts.two(*command(chain, fsdp, *flags, '--batch_size=2', '--parallel=fsdp'), after=HALF)
    same(one, fsdp, 'dpo')

def test_two_processes_sample(chain, scripts, tmp_path):
    out = stocked(tmp_path, chain, 'sft')
    said = scripts.two(*command(chain, out, '--sample_prompts=10', '--max_new_tokens=6', '--batch_size=4'))
    ranked = [row for _, row in read_jsonl(out / 'preferences_train.jsonl')]
    assert 1 <= len(ranked) <= 10 and said[1].out == ''

def test_bfloat16(chain, scripts, tmp_path):
    out = stocked(tmp_path, chain, 'sft')
    scripts.ok(*command(chain, out, '--dtype=bfloat16'))
    assert all(math.isfinite(v) for row in read_log(out / 'reward.jsonl') for v in row.values())
    assert all(v.dtype == torch.float32 for v in load(out / 'reward.pt')['weights'].values())

# -----------------------------------------------------------------------------
# bad input

@pytest.mark.parametrize('row', [
    {**RANKED, 'ranking': [0, 2]}, {**RANKED, 'ranking': [0, -1]}, {**RANKED, 'ranking': [1, 1]},
    {**RANKED, 'ranking': [0]}, {**RANKED, 'ranking': 3}, {**RANKED, 'ranking': [[[0], 1]]},
    {**RANKED, 'ranking': [[0, 1], 1]}, {**RANKED, 'ranking': [True, 0]},
    {**RANKED, 'ranking': ['0', '1']}, {**RANKED, 'completions': [1, 2]}, {**RANKED, 'completions': None},
    {**RANKED, 'completions': 'ab'}, {**RANKED, 'completions': dict(a=1, b=2)}, {**RANKED, 'ranking': [True, False]},
    {**RANKED, 'ranking': [0, 1.0]}, {**RANKED, 'ranking': [0, math.inf]},
    {**RANKED, 'messages': [*user('x'), dict(role='assistant', content='owl')]}, {**RANKED, 'messages': None},
    dict(messages=user('x')), {**RANKED, 'checks': dict(kontains=['x'])}, {**RANKED, 'checks': 'x'},
    {**RANKED, 'checks': dict(max_words='x')}, '{"messages": '], ids=str)
def test_bad_lines(row, chain, tmp_path):
    shutil.copy(chain.data / 'preferences_train.jsonl', tmp_path)
    replace_line(tmp_path / 'preferences_train.jsonl', row)
    s = definitions('reward.py', data_dir=str(tmp_path), tok=Tokenizer(make_spec()), max_length=48)
    with fails(r'preferences_train\.jsonl:3: '):
        s.load_examples('train')

def with_rows(chain, tmp_path, *rows, **more):
    """load_examples on the tiny world's rankings and these."""
    old = [row for _, row in read_jsonl(chain.data / 'preferences_train.jsonl')]
    write_rows(tmp_path / 'preferences_train.jsonl', [*old, *rows])
    s = definitions('reward.py', data_dir=str(tmp_path), tok=Tokenizer(make_spec()), max_length=48, **more)
    return s.load_examples('train')[len(old):]

def test_ties_and_identical_answers(world, tmp_path, capsys):
    texts = ['owl', 'cat', 'owl', 'dog', 'cat']
    tie, same, gone = with_rows(world, tmp_path, {**RANKED, 'completions': texts, 'ranking': [3, [0, 1]]},
                                {**RANKED, 'completions': texts, 'ranking': [1, 3, 4, 0, 2]},
                                RANKED)
    assert tie.indices == [3, 0, 1] and tie.places.tolist() == [0, 1, 1]
    assert same.indices == [1, 3, 0] and same.places.tolist() == [0, 1, 3] # the best of each text
    assert '2 answers that repeat a better one' in capsys.readouterr().out
    assert with_rows(world, tmp_path, {**RANKED, 'completions': texts, 'ranking': [0, 2]}) == [] # one text only
    check_row = definitions('prepare_data.py').check_row # it lets through what this stage reads
    assert check_row('preferences', {**RANKED, 'completions': texts, 'ranking': [3, [0, 1]]}) is None
    for bad in ([3, [0, 3]], [[0]], [[0, 5]], [[[0], 1]], ['ab']):
        with pytest.raises((TypeError, ValueError)):
            check_row('preferences', {**RANKED, 'completions': texts, 'ranking': bad})

def test_bad_lines_can_be_skipped(world, tmp_path, capsys):
    rows = with_rows(world, tmp_path, {**RANKED, 'ranking': [0]}, RANKED, {**RANKED, 'completions': [1, 2]},
                     skip_bad=True)
    assert len(rows) == 1 and '2 bad' in capsys.readouterr().out

def test_position_bias_is_told(world, tmp_path, capsys):
    assert with_rows(world, tmp_path, RANKED) and 'warning' not in capsys.readouterr().out
    for order, place in (([0, 1], 'first'), ([1, 0], 'last')):
        write_rows(tmp_path / 'preferences_val.jsonl', [{**RANKED, 'ranking': order}] * 3)
        s = definitions('reward.py', data_dir=str(tmp_path), tok=Tokenizer(make_spec()), max_length=48)
        s.load_examples('val')
        assert f'always stands {place}' in capsys.readouterr().out

def test_long_answers_are_counted_and_left_out(chain, tmp_path, capsys):
    shutil.copy(chain.data / 'preferences_train.jsonl', tmp_path)
    replace_line(tmp_path / 'preferences_train.jsonl', {**RANKED, 'completions': ['x' * 99, 'owl']})
    s = definitions('reward.py', data_dir=str(tmp_path), tok=Tokenizer(make_spec()), max_length=48)
    assert len(s.load_examples('train')) == 39 and 'left out 1 too long' in capsys.readouterr().out

BAD = [
    (lambda data, out: (out / 'sft.pt').unlink(), [], r'sft\.pt.*python sft\.py'),
    (lambda data, out: (data / 'preferences_train.jsonl').unlink(), [],
     r'preferences_train\.jsonl.*python prepare_data\.py'),
    (lambda data, out: write_rows(data / 'preferences_train.jsonl', [RANKED]), [], '1 examples.*8'),
    (lambda data, out: write_rows(data / 'preferences_train.jsonl', [{**RANKED, 'messages': user('x' * 99)}]), [],
     r'preferences_train\.jsonl: no example fits'),
    (None, ['--device=toaster'], 'toaster'), (None, ['--sample_answers=0'], 'sample_answers must be positive'),
    (None, ['--judge=human'], 'judge=human needs prompts'),
    (None, ['--parallel=pipeline'], "parallel must be 'ddp' or 'fsdp', not 'pipeline'"),
    (None, ['--share=0'], 'share must be above 0 and at most 1, not 0'),
    (None, ['--objective=ppo'], 'objective must be one of'),
    (lambda data, out: (data / 'prompts_train.jsonl').unlink(), ['--sample_prompts=4', '--max_new_tokens=6'],
     r'prompts_train\.jsonl.*prepare_data\.py'),
    (lambda data, out: replace_line(data / 'prompts_train.jsonl', dict(messages=user('x'))),
     ['--sample_prompts=4', '--max_new_tokens=6'], r'prompts_train\.jsonl:3: '),
    (None, ['--sample_prompts=4', '--max_new_tokens=99'], 'room for 99 new tokens in 48'),
    (None, ['--sample_prompts=4', '--max_new_tokens=6', '--temperature=-1'], 'temperature')]

@pytest.mark.parametrize('act,flags,pattern', BAD, ids=[row[2][:30] for row in BAD])
def test_bad_input_changes_nothing(act, flags, pattern, chain, scripts, tmp_path):
    data, out = shutil.copytree(chain.data, tmp_path / 'data'), stocked(tmp_path / 'out', chain, 'sft', 'reward')
    if act:
        act(data, out)
    old = folder_bytes(data, out)
    scripts.fails(pattern, *command(chain, out, '--resume=false', *flags, data=data))
    assert folder_bytes(data, out) == old
