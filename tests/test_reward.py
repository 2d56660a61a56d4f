"""reward.py: pairs and their margins, the simulated labeller, normalised scores, resume, two processes, bad input."""
import math
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch

from conftest import (definitions, distance, fails, folder_bytes, kill_at, load, make_spec, read_log, replace_line,
                      stocked, user, write_rows)
from model import ScalarModel, Tokenizer, grade, load_model, read_jsonl

CPU = SimpleNamespace(device='cpu', device_type='cpu', rank=0, world_size=1,
                      autocast=lambda: torch.autocast('cpu', enabled=False))
SAMPLED = ('--sample_prompts=16', '--max_new_tokens=6', '--labeller_noise=0.5')
RANKED = dict(messages=user('Say'), completions=['owl', 'cat'], ranking=[0, 1])

def command(chain, out, *flags, data=None):
    return ('reward.py', chain.short, f'--data_dir={data or chain.data}', f'--out_dir={out}', *flags)

# -----------------------------------------------------------------------------
# the formulas

def test_margins_by_hand_and_their_sign():
    s = definitions('reward.py')
    rankings = [(0, [[1], [2], [3]], None), (0, [[4], [5]], None)]
    scores = torch.tensor([5.0, 3.0, 1.0, -1.0, 2.0])
    # 5-3, 5-1, 3-1 of the first ranking, -1-2 of the second; no pair across rankings
    assert s.pair_margins(scores, rankings).tolist() == [2.0, 4.0, 2.0, -3.0]
    swapped = s.pair_margins(scores[[0, 1, 2, 4, 3]], rankings)
    assert swapped.tolist() == [2.0, 4.0, 2.0, 3.0]

def test_accuracies_by_hand(monkeypatch):
    """Three rankings: the labeller's order, the gold scores, and what the model says."""
    val = [(0, [[1], [2], [3]], [3.0, 1.0, 2.0]),       # gold: 1 > 3 > 2, the labeller swapped 2 and 3
           (0, [[4], [5]], [0.0, 0.0]),                  # no gold scores known
           (0, [[6], [7]], [1.0, 0.5])]
    scores = {1: 5.0, 2: 1.0, 3: 4.0, 4: 1.0, 5: 0.0, 6: 0.0, 7: 2.0}
    s = definitions('reward.py', val=val, run=CPU, batch_size=2, raw_model=torch.nn.Identity(),
                    get_scores=lambda model, batch: torch.tensor([scores[a[0]] for _, b, _ in batch for a in b]))
    found = s.evaluate()
    margins = torch.tensor([5 - 1.0, 5 - 4, 1 - 4, 1 - 0, 0 - 2])
    assert found['val_accuracy'] == 3 / 5 # (1, 2), (1, 3) and (4, 5)
    assert found['val_gold_accuracy'] == 3 / 4 # (1, 2), (1, 3) and (3, 2) of four
    assert found['val_loss'] == pytest.approx(torch.nn.functional.softplus(-margins).mean().item())
    s.space['val'] = val[1:2]
    assert 'val_gold_accuracy' not in s.evaluate()

def scorer(path):
    ckpt = load(path)
    tok = Tokenizer(ckpt['tokenizer'])
    return definitions('reward.py', tok=tok, run=CPU).get_scores, load_model(ckpt, 'cpu', ScalarModel), tok

@torch.no_grad()
def test_the_score_is_read_at_the_last_real_token(chain):
    get_scores, net, tok = scorer(chain.out / 'reward.pt')
    rows = [tok.render(user('Say it.') + [dict(role='assistant', content=a)])[0]
            for a in ('owl', 'cat dog fox owl cat', '')]
    together = get_scores(net, [(0, rows, None)])
    for row, got in zip(rows, together):
        assert row[-1] == tok.end
        want = net(torch.tensor([row]))[0, -1] # alone, without any pad
        assert got == pytest.approx(want.item(), abs=1e-4)
    assert together.std() > 0.1

@torch.no_grad()
def test_saved_scores_are_normalised(chain):
    get_scores, net, tok = scorer(chain.out / 'reward.pt')
    s = definitions('reward.py', tok=tok)
    rankings = [s.read_example(row) for _, row in read_jsonl(chain.data / 'preferences_train.jsonl')]
    got = get_scores(net, rankings)
    assert abs(got.mean()) < 1e-3 and abs(got.std() - 1) < 1e-3
    assert net.std > 0 and net.std != 1

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
    assert abs(validation[0]['val_loss'] - math.log(2)) < 0.1
    assert validation[-1]['val_accuracy'] == validation[-1]['val_gold_accuracy'] == 1
    metrics = load(chain.out / 'reward.pt')['metrics']
    assert metrics['val_accuracy'] == metrics['val_gold_accuracy'] == 1 and metrics['self_agreement'] is None
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

def same(one, two, chain):
    # A bias cancels out of every margin: its gradient is rounding, which Adam makes as large as any. The mean takes it
    # off.
    assert distance(one / 'reward.pt', two / 'reward.pt', ('head.bias', 'mean')) < 1e-5
    a, b = (load(out / 'reward.pt')['weights'] for out in (one, two))
    assert (a['mean'] - a['head.bias']).item() == pytest.approx((b['mean'] - b['head.bias']).item(), abs=1e-5)
    for a, b in zip(read_log(one / 'reward.jsonl'), read_log(two / 'reward.jsonl'), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)

def test_processes_and_micro_batches_change_nothing(chain, scripts, tmp_path):
    one, two, micro = (stocked(tmp_path / n, chain, 'sft') for n in ('one', 'two', 'micro'))
    flags = ('--learning_rate=1e-4', '--weight_decay=0')
    scripts.both((command(chain, one, *flags, '--batch_size=4'), {}),
                 (command(chain, micro, *flags, '--batch_size=1', '--gradient_accumulation_steps=4'), {}))
    said = scripts.two(*command(chain, two, *flags, '--batch_size=2'))
    assert said[1].out == '' and 'saved' in said[0].out
    same(one, two, chain)
    same(one, micro, chain)

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
    {**RANKED, 'ranking': [0]}, {**RANKED, 'ranking': 3}, {**RANKED, 'ranking': [[0], [1]]},
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

def test_long_answers_are_counted_and_left_out(chain, tmp_path, capsys):
    shutil.copy(chain.data / 'preferences_train.jsonl', tmp_path)
    replace_line(tmp_path / 'preferences_train.jsonl', {**RANKED, 'completions': ['x' * 99, 'owl']})
    s = definitions('reward.py', data_dir=str(tmp_path), tok=Tokenizer(make_spec()), max_length=48)
    assert len(s.load_examples('train')) == 39 and 'left out 1 of 40 examples' in capsys.readouterr().out

def test_equal_answers_are_one_and_a_ranking_of_one_is_dropped(chain, tmp_path, capsys):
    """Two equal texts have no margin: gradient 0, and counted as wrong. In a longer ranking the first place counts."""
    tok = Tokenizer(make_spec())
    equal = {**RANKED, 'completions': ['owl', 'owl']}
    longer = {**RANKED, 'completions': ['owl', 'cat', 'owl'], 'ranking': [1, 0, 2], 'checks': dict(equals='owl')}
    write_rows(tmp_path / 'preferences_train.jsonl', [equal, RANKED, longer, equal])
    s = definitions('reward.py', data_dir=str(tmp_path), tok=tok, max_length=48)
    examples = s.load_examples('train')
    assert [[tok.decode_answer(ids) for ids in answers] for _, answers, _ in examples] == [
        ['Say owl', 'Say cat'], ['Say cat', 'Say owl']]
    assert examples[1][2] == [0.0, 1.0] # the gold scores stay beside their answers
    assert 'left out 2 of 4 examples, equal answers' in capsys.readouterr().out
    write_rows(tmp_path / 'preferences_train.jsonl', [equal])
    with fails('no example'):
        s.load_examples('train')

BAD = [
    (lambda data, out: (out / 'sft.pt').unlink(), [], r'sft\.pt.*python sft\.py'),
    (lambda data, out: (data / 'preferences_train.jsonl').unlink(), [],
     r'preferences_train\.jsonl.*python prepare_data\.py'),
    (lambda data, out: write_rows(data / 'preferences_train.jsonl', [RANKED]), [], '1 examples.*8'),
    (lambda data, out: write_rows(data / 'preferences_train.jsonl', [{**RANKED, 'messages': user('x' * 99)}]), [],
     r'preferences_train\.jsonl: no example fits'),
    (None, ['--device=toaster'], 'toaster'), (None, ['--sample_answers=0'], 'sample_answers must be positive'),
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
