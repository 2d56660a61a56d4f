"""sft.py: targets and masks, order of the data, resume, two processes, bad input."""
import json
import math
import shutil
import signal
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import (definitions, distance, fails, folder_bytes, kill_at, load, make_spec, read_log, replace_line,
                      stocked, user, write_rows)
from model import GPT, GPTConfig, Tokenizer

CPU = SimpleNamespace(device='cpu', device_type='cpu', rank=0, world_size=1)
OWL = dict(role='assistant', content='owl')

def command(chain, out, *flags, data=None):
    return ('sft.py', chain.short, f'--data_dir={data or chain.data}', f'--out_dir={out}', *flags)

def learned(ids, tok):
    """Which tokens are the assistant's words or the <|end|> after them, read off the tokens."""
    out, who = [], None
    for t in ids:
        out.append(who == tok.assistant)
        if t in (tok.system, tok.user, tok.assistant):
            who = t
        elif t == tok.end:
            who = None
    return out

def test_targets(tmp_path):
    tok = Tokenizer(make_spec())
    write_rows(tmp_path / 'chat_train.jsonl', [
        dict(messages=[dict(role='system', content='the'), *user('Say'), dict(role='assistant', content='owl cat'),
                       *user('x'), dict(role='assistant', content='')]),
        dict(messages=user('Say') + [dict(role='assistant', content='fox')])])
    s = definitions('sft.py', data_dir=str(tmp_path), tok=tok, max_length=48, run=CPU)
    chats = s.load_examples('train')
    x, y, pos, mask = s.to_batch(chats, [[0], [1]])
    assert x.shape == y.shape == pos.shape == (2, 48) and mask.shape == (2, 48, 48)
    for (row_x, row_y), (n, ids, targets) in zip(zip(x.tolist(), y.tolist()), chats):
        assert n == len(ids) == len(targets)
        assert row_x == ids + [tok.pad] * (48 - n) and row_y[n:] == [-1] * (48 - n)
        whole = ids + [tok.end]
        assert [t != -1 for t in row_y[:n]] == learned(whole, tok)[1:]
        assert all(t in (-1, whole[i + 1]) for i, t in enumerate(row_y[:n])) # y is x one token later
    owl, cat, fox = (i for w in (' owl', ' cat', ' fox') for i in tok.encode(w)) # one token each, after a space
    # two answers, the second one empty
    assert [t for t in y[0].tolist() if t != -1] == [owl, cat, tok.end, tok.end]
    assert [t for t in y[1].tolist() if t != -1] == [fox, tok.end]

def test_content_in_parts():
    """OpenAI's list of parts is read if all of them are text."""
    s = definitions('sft.py', tok=Tokenizer(make_spec()), max_length=48)
    parts = [dict(type='text', text='ow'), dict(type='text', text='l')]
    row = dict(messages=user('Say') + [dict(role='assistant', content=parts)])
    assert s.read_example(row) == s.read_example(dict(messages=user('Say') + [OWL]))
    for bad in ([*parts, dict(type='image_url', text='x')], [], ['owl'], [dict(type='text')], [dict(type='text', text=1)]):
        row['messages'][1]['content'] = bad
        with pytest.raises(ValueError, match='messages must be a list'):
            s.read_example(row)

def test_pack():
    """Best fit by hand: 5 opens a row with 2 left, 4 a row with 3 left; 3 fills it; 2 fills the first row."""
    s = definitions('sft.py')
    assert s.pack([5, 3, 4, 2], 7) == [[0, 3], [2, 1]]
    lengths = np.random.default_rng(0).integers(1, 101, 500).tolist()
    rows = s.pack(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(500)) # each one once
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= 100 and sum(filled) / (100 * len(rows)) > 0.9

@pytest.mark.parametrize('arch', ['gpt2', 'llama'])
def test_a_packed_conversation_is_as_if_it_were_alone(arch):
    """Logits, loss and gradient of three conversations in one row = those of three rows with one each."""
    torch.manual_seed(0)
    llama = dict(key_shift=True, qk_norm=True, n_kv_head=2) if arch == 'llama' else {}
    model = GPT(GPTConfig(arch=arch, vocab_size=50, block_size=40, n_layer=2, n_head=4, n_embd=32, **llama))
    torch.nn.init.normal_(model.blocks[0].attn.proj.weight, std=0.5) # zeros would hide what attention sees
    rng = np.random.default_rng(0)
    examples = []
    for n in (9, 14, 12):
        ids = rng.integers(0, 50, n + 1).tolist()
        examples.append((n, ids[:-1], [-1] * 3 + ids[4:]))
    s = definitions('sft.py', tok=SimpleNamespace(pad=0), max_length=40, run=CPU)

    def learn(rows):
        x, y, pos, mask = s.to_batch(examples, rows)
        logits = model(x, pos, mask)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction='sum')
        grads = torch.autograd.grad(loss, list(model.parameters()))
        return logits, loss.item(), torch.cat([g.flatten() for g in grads])

    packed, packed_loss, packed_grad = learn([[0, 1, 2]])
    alone, loss, grad = learn([[0], [1], [2]])
    start = 0
    for i, (n, x, _) in enumerate(examples):
        lone = model(torch.tensor([x])) # neither mask nor padding
        assert (packed[0, start:start + n] - lone[0]).abs().max() < 1e-5
        assert (alone[i, :n] - lone[0]).abs().max() < 1e-5
        start += n
    assert packed_loss == pytest.approx(loss, rel=1e-6)
    assert (packed_grad - grad).abs().max() < 1e-4 * grad.abs().max()

def test_long_conversations_are_cut_after_an_answer():
    """The cut is after the last answer that fits: 2 of 3 here. One token less, and only the first one fits."""
    tok = Tokenizer(make_spec())
    turns = [user('Say') + [OWL]] * 3
    messages = [turn for pair in turns for turn in pair]
    ids = [tok.render(messages[:n])[0] for n in (2, 4, 6)]
    for room, kept in ((len(ids[2]) - 1, 2), (len(ids[2]) - 2, 1), (len(ids[1]) - 1, 1), (len(ids[1]) - 2, 0)):
        s = definitions('sft.py', tok=tok, max_length=room)
        length, x, y = s.read_example(dict(messages=messages))
        assert x == ids[kept][:-1] and y[-1] == tok.end and length == len(x) <= room
    s = definitions('sft.py', tok=tok, max_length=len(ids[0]) - 2)
    assert s.read_example(dict(messages=messages))[0] > s.max_length # nothing fits: it is left out

def test_each_epoch_has_every_row_once():
    s = definitions('sft.py', seed=1, train_rows=[[i] for i in range(60)], steps_per_epoch=15, total_batch_size=4)
    orders = [s.get_order(epoch) for epoch in (0, 0, 1)]
    assert np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[0], orders[2])
    for order in orders:
        assert order.shape == (15, 4) and sorted(order.flatten()) == list(range(60))

def test_pads_are_not_counted_as_tokens(chain):
    """30 epochs of the chain's conversations, whose lengths differ."""
    s = definitions('sft.py', data_dir=str(chain.data), tok=Tokenizer(make_spec()), max_length=48)
    lengths = [n for n, _, _ in s.load_examples('train')]
    assert len(set(lengths)) > 5 # the batch size 1: no row is left out
    assert load(chain.out / 'sft.pt')['metrics']['tokens'] == 30 * sum(lengths)

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
    scripts.ok(*command(chain, tmp_path), before=watch, after=f'torch.save(seen, {str(tmp_path / "seen")!r})')
    seen = load(tmp_path / 'seen')
    assert len(seen) == sum('loss' in row for row in read_log(tmp_path / 'sft.jsonl')) > 5 # steps
    for grad, y in seen:
        largest = grad.abs().amax(-1)
        assert (largest[y == -1] == 0).all() and (largest[y != -1] > 0).all()
        # the loss is the mean over what is learned: the gradient is (p - onehot) / n, so -(1 - p) / n at the target
        n = (y != -1).sum()
        assert (grad[y != -1].gather(1, y[y != -1][:, None]) * n).min() >= -1 - 1e-5

def test_learning_rate():
    s = definitions('sft.py', learning_rate=1.0, warmup_iters=4, max_iters=105)
    assert [round(s.get_lr(i), 6) for i in range(4)] == [0.2, 0.4, 0.6, 0.8] # never 0, and 1 at step 4
    assert s.get_lr(4) == pytest.approx(1.0) and s.get_lr(104) == pytest.approx(1 / 101) # 0 after the last step
    rates = [s.get_lr(i) for i in range(4, 105)]
    assert rates == sorted(rates, reverse=True)

# after a run with fsdp: each of the two processes holds half of every tensor
HALF = 'assert all(0.6 * p.numel() > p.to_local().numel() for p in raw_model.parameters() if len(p) > 1)'

# five prompts: processes have different numbers of them
SAME = ('--learning_rate=2e-4', '--total_batch_size=4', '--epochs=3', '--eval_prompts=5')

def same(one, two, tolerance=1e-5):
    assert distance(one / 'sft.pt', two / 'sft.pt') < tolerance
    for a, b in zip(read_log(one / 'sft.jsonl'), read_log(two / 'sft.jsonl'), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
        assert all(abs(a[k] - b[k]) < 1e-5 for k in ('loss', 'val_loss') if k in a)
    a, b = (load(out / 'sft.pt')['metrics'] for out in (one, two))
    assert all(a[k] == pytest.approx(b[k], abs=1e-5) for k in ('val_loss', 'tokens', 'flops'))

@pytest.fixture(scope='module')
def one(chain, scripts):
    out = stocked(chain.folder / 'one_sft', chain, 'base')
    scripts.ok(*command(chain, out, *SAME, '--batch_size=4'))
    return out

def test_accumulation_with_unequal_masks(one, chain, scripts, tmp_path):
    """4 conversations at once = 1 at a time and 4 micro-batches, though their answers have 2 to 20 tokens."""
    out = stocked(tmp_path, chain, 'base')
    scripts.ok(*command(chain, out, *SAME, '--batch_size=1'))
    same(one, out, 1e-6)
    assert distance(out / 'sft.pt', chain.out / 'base.pt') > 1e-3 # it did move

def test_two_processes_are_one(one, chain, scripts, tmp_path):
    two = stocked(tmp_path, chain, 'base')
    said = scripts.two(*command(chain, two, *SAME, '--batch_size=2'))
    assert said[1].out == '' and 'saved' in said[0].out
    same(one, two)

def test_fsdp_is_one_process_and_moves_to_it_and_back(one, chain, scripts, tmp_path):
    """Two processes with fsdp, stopped; one process, stopped; two processes with fsdp and smaller micro-batches."""
    out = stocked(tmp_path, chain, 'base')
    two = command(chain, out, *SAME, '--batch_size=2', '--parallel=fsdp')
    with pytest.raises(AssertionError, match='stopped at step 2 and saved'):
        scripts.two(*two, before=kill_at(1, signal.SIGTERM))
    scripts.fails('stopped at step 4 and saved', *command(chain, out, *SAME, '--batch_size=4'),
                  before=kill_at(3, signal.SIGTERM))
    said = scripts.two(*two, '--batch_size=1', after=HALF)
    assert 'at step 4' in said[0].out and 'saved' in said[0].out and said[1].out == ''
    same(one, out)

def test_what_does_not_go_together(chain, scripts, tmp_path):
    """The first of two processes of sft.py and reward.py, without the second."""
    out = stocked(tmp_path, chain, 'base', 'sft')
    env = dict(WORLD_SIZE=2, RANK=0, LOCAL_RANK=0)
    alone = 'import torch.distributed as d; d.init_process_group = d.destroy_process_group = lambda *a: 0'
    for flags, words in ((('--parallel=fsdp', '--optimizer=muon'), 'muon needs whole ones: use adamw'),
                         (('--batch_size=3',), r'total_batch_size 8 is not .* 3 x 2 processes: --total_batch_size=6')):
        for script in ('sft.py', 'reward.py'):
            scripts.fails(words, script, *command(chain, out, '--total_batch_size=8', *flags)[1:], env=env, before=alone)

EXTRA = ('--dropout=0.2', '--optimizer=muon')

@pytest.fixture(scope='module')
def uninterrupted(chain, scripts):
    out = stocked(chain.folder / 'whole_sft', chain, 'base')
    scripts.ok(*command(chain, out, *EXTRA))
    return out

@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM], ids=str)
def test_resume_is_bit_identical(number, chain, scripts, uninterrupted, tmp_path):
    out = stocked(tmp_path, chain, 'base')
    if number == signal.SIGKILL:
        assert scripts(*command(chain, out, *EXTRA), before=kill_at(7, number)).code == -signal.SIGKILL
    else:
        scripts.fails('stopped at step 8 .* the same command continues', *command(chain, out, *EXTRA),
                      before=kill_at(7, number))
    saved = 5 if number == signal.SIGKILL else 8 # the step in which SIGTERM came is finished
    assert load(out / 'sft.resume.pt')['step'] == saved and not (out / 'sft.pt').exists()
    assert not list(out.glob('*.partial'))
    assert f'at step {saved}' in scripts.ok(*command(chain, out, *EXTRA)).out
    assert not (out / 'sft.resume.pt').exists()
    assert distance(out / 'sft.pt', uninterrupted / 'sft.pt') == 0
    assert read_log(out / 'sft.jsonl') == read_log(uninterrupted / 'sft.jsonl')
    a, b = (load(folder / 'sft.pt')['metrics'] for folder in (out, uninterrupted))
    assert all(a[k] == b[k] for k in ('val_loss', 'tokens', 'flops'))

def test_a_run_with_other_settings_is_not_resumed(chain, scripts, tmp_path):
    out = stocked(tmp_path, chain, 'base')
    scripts.fails('stopped at step 4', *command(chain, out), before=kill_at(3, signal.SIGTERM))
    old = (out / 'sft.resume.pt').read_bytes()
    scripts.fails('learning_rate.*0.005.*0.002.*--resume=false', *command(chain, out, '--learning_rate=0.002'))
    scripts.fails('total_batch_size = 1, not 2.*--resume=false', *command(chain, out, '--batch_size=2')) # other batches
    ckpt = load(out / 'base.pt')
    ckpt['metrics']['seconds'] += 1
    torch.save(ckpt, out / 'base.pt')
    scripts.fails('starts_from.*--resume=false', *command(chain, out)) # another base.pt
    assert (out / 'sft.resume.pt').read_bytes() == old
    scripts.ok(*command(chain, out, '--resume=false')) # starts over
    assert read_log(out / 'sft.jsonl')[0]['step'] == 0

def test_empty_answers_and_long_conversations(chain, scripts, tmp_path):
    """Of an empty answer only its <|end|> is learned. What is too long is counted and left out."""
    data, out = shutil.copytree(chain.data, tmp_path / 'data'), stocked(tmp_path / 'out', chain, 'base')
    short = dict(messages=user('x') + [dict(role='assistant', content='')])
    write_rows(data / 'chat_train.jsonl', [short] * 8 + [dict(messages=user('x' * 99) + [OWL])])
    r = scripts.ok(*command(chain, out, '--batch_size=1', data=data))
    assert 'left out 1 too long and 0 bad of 9 examples' in r.out and '[<|end|>]' in r.out
    assert all(math.isfinite(v) for row in read_log(out / 'sft.jsonl') for v in row.values())

def test_replay_and_show_batch(chain, scripts, tmp_path):
    """A quarter of the rows is pretraining text, learned as a whole; --show_batch shows a step and writes nothing."""
    out = stocked(tmp_path, chain, 'base')
    flags = ('--replay=0.25', '--batch_size=4', '--show_batch=true')
    r = scripts.ok(*command(chain, out, *flags))
    assert '<|end|><|assistant|>[' in r.out and list(out.iterdir()) == [out / 'base.pt']
    lines = [line for line in r.out.splitlines() if line.startswith('[')] # begins with a learned token
    assert lines, r.out
    r = scripts.ok(*command(chain, out, *flags[:2]))
    assert (out / 'sft.pt').exists()

def test_the_best_weights_are_kept(chain, scripts, tmp_path):
    """A model that is trained already learns other answers: its validation loss rises from the first step."""
    data, out = shutil.copytree(chain.data, tmp_path / 'data'), stocked(tmp_path / 'out', chain, 'sft')
    torch.save(dict(load(out / 'sft.pt'), stage='base'), out / 'base.pt')
    write_rows(data / 'chat_train.jsonl', [dict(messages=user('Say') + [dict(role='assistant', content='x x')])] * 40)
    r = scripts.ok(*command(chain, out, '--eval_interval=2', '--resume=false', data=data))
    losses = [row['val_loss'] for row in read_log(out / 'sft.jsonl') if 'val_loss' in row]
    assert losses[0] == min(losses) < losses[-1] - 0.1
    assert 'risen since step 0' in r.out
    assert distance(out / 'sft.pt', out / 'base.pt') == 0
    assert load(out / 'sft.pt')['metrics']['val_loss'] == losses[0]
    weights = load(out / 'sft.pt')['weights'] # the tied matrix is in the file once
    assert weights['head.weight'].data_ptr() == weights['wte.weight'].data_ptr()

def test_copies_and_bad_lines_are_counted(chain, scripts, tmp_path):
    data, out = shutil.copytree(chain.data, tmp_path / 'data'), stocked(tmp_path / 'out', chain, 'base')
    replace_line(data / 'chat_train.jsonl', dict(messages=user('x')))
    shutil.copy(data / 'chat_train.jsonl', data / 'chat_val.jsonl')
    r = scripts.ok(*command(chain, out, '--skip_bad=true', data=data))
    assert 'train: left out 0 too long and 1 bad of 40 examples' in r.out
    assert '39 of 39 validation conversations are training data' in r.out

def test_from_a_folder_in_gpt2_form(chain, scripts, tmp_path):
    """convert.py, sft.py with init_from, reward.py. Of our special tokens the folder has <|endoftext|> only."""
    torch.manual_seed(0)
    tok = Tokenizer(make_spec())
    model = GPT(GPTConfig(arch='gpt2', vocab_size=tok.eot + 1, block_size=48, n_layer=1, n_head=2, n_embd=16))
    c = definitions('convert.py')
    args = asdict(model.config)
    tensors = {}
    for ours, (theirs,) in c.weight_names(args).items():
        tensors[theirs] = c.transpose(ours, model.state_dict()[ours], 'gpt2')
    hf = tmp_path / 'hf'
    hf.mkdir()
    c.write_safetensors(hf / 'model.safetensors', tensors)
    config = {name: args[ours] for ours, name in c.CLASSES['settings']['gpt2'].items()}
    (hf / 'config.json').write_text(json.dumps(dict(config, model_type='gpt2')))
    data = c.tokenizer_json(tok)
    data['added_tokens'] = data['added_tokens'][:1]
    (hf / 'tokenizer.json').write_text(json.dumps(data))
    scripts.ok('convert.py', hf, tmp_path / 'gpt2' / 'base.pt')

    out = tmp_path / 'out'
    scripts.ok(*command(chain, out, f'--init_from={tmp_path}/gpt2/base.pt', '--learning_rate=1e-2'))
    losses = [row['val_loss'] for row in read_log(out / 'sft.jsonl') if 'val_loss' in row]
    assert losses[0] == pytest.approx(math.log(tok.n_vocab), abs=0.3) and losses[-1] < losses[0] - 1
    ckpt = load(out / 'sft.pt')
    assert ckpt['tokenizer'] == tok.spec and ckpt['model_args'] == dict(args, vocab_size=tok.n_vocab)
    scripts.ok('reward.py', chain.short, f'--data_dir={chain.data}', f'--out_dir={out}', '--learning_rate=1e-2')
    assert load(out / 'reward.pt')['metrics']['val_loss'] < math.log(2)

def test_bfloat16(chain, scripts, tmp_path):
    out = stocked(tmp_path, chain, 'base')
    scripts.ok(*command(chain, out, '--dtype=bfloat16'))
    assert all(math.isfinite(v) for row in read_log(out / 'sft.jsonl') for v in row.values())
    assert all(v.dtype == torch.float32 for v in load(out / 'sft.pt')['weights'].values())

def test_a_gradient_that_is_not_finite_ends_the_run_at_once(chain, scripts, tmp_path):
    out = stocked(tmp_path, chain, 'base', 'sft')
    old = folder_bytes(out)
    nan = '''
import torch.nn.functional as F
real = F.cross_entropy
F.cross_entropy = lambda logits, *a, **k: real(logits, *a, **k) * (float("nan") if logits.requires_grad else 1)'''
    scripts.fails('step 0: .*gradient norm nan.*--learning_rate', *command(chain, out, '--resume=false'), before=nan)
    new = folder_bytes(out)
    assert all(new[path] == old[path] for path in old) and not (out / 'sft.resume.pt').exists()

# -----------------------------------------------------------------------------
# bad input

@pytest.mark.parametrize('row', [
    dict(messages=user('x')), dict(messages=[]), dict(messages='x'), dict(text='x'),
    dict(messages=user('x') + user('y') + [OWL]), dict(messages=user('x') + [dict(role='tool', content='x'), OWL]),
    dict(messages=[dict(role=['user'], content='x'), OWL]),
    dict(messages=[dict(role='user', content=None), OWL]), '{"messages": ', '[1]', '"x"'], ids=str)
def test_bad_lines(row, chain, tmp_path):
    """The message names the line; no traceback of the tokenizer."""
    shutil.copy(chain.data / 'chat_train.jsonl', tmp_path)
    replace_line(tmp_path / 'chat_train.jsonl', row)
    s = definitions('sft.py', data_dir=str(tmp_path), tok=Tokenizer(make_spec()), max_length=48)
    with fails(r'chat_train\.jsonl:3: '):
        s.load_examples('train')

def without_special_tokens(path):
    ckpt = load(path)
    ckpt['tokenizer']['special_tokens'] = ['<|endoftext|>']
    torch.save(ckpt, path)

BAD = [
    (lambda data, out: (out / 'base.pt').unlink(), [], r'base\.pt.*python pretrain\.py'),
    (lambda data, out: (out / 'base.pt').write_bytes((out / 'base.pt').read_bytes()[:-7]), [],
     r'base\.pt.*damaged.*python pretrain\.py'),
    (lambda data, out: shutil.copy(out / 'sft.pt', out / 'base.pt'), [], 'of stage sft'),
    (lambda data, out: without_special_tokens(out / 'base.pt'), [], r'base\.pt.*it has other special tokens'),
    (lambda data, out: (data / 'chat_train.jsonl').unlink(), [], r'chat_train\.jsonl.*python prepare_data\.py'),
    (lambda data, out: write_rows(data / 'chat_val.jsonl', []), [], r'chat_val\.jsonl'),
    (lambda data, out: write_rows(data / 'chat_train.jsonl', [dict(messages=user('x' * 99) + [OWL])]), [],
     'no example fits into 48.*block_size'),
    (lambda data, out: write_rows(data / 'chat_train.jsonl', [dict(messages=user('x') + [OWL])] * 3),
     ['--batch_size=2'], '1 rows.*2.*--batch_size=1'),
    (None, ['--parallel=pipeline'], "parallel must be 'ddp' or 'fsdp', not 'pipeline'"),
    (None, ['--warmup_iters=-1'], 'warmup_iters must be at least 0, not -1'),
    (None, ['--beta1=1'], 'beta1 must be at least 0 and below 1'),
    (None, ['--optimizer=sgd'], 'sgd')]

@pytest.mark.parametrize('act,flags,pattern', BAD, ids=[row[2][:30] for row in BAD])
def test_bad_input_changes_nothing(act, flags, pattern, chain, scripts, tmp_path):
    data, out = shutil.copytree(chain.data, tmp_path / 'data'), stocked(tmp_path / 'out', chain, 'base', 'sft')
    if act:
        act(data, out)
    old = folder_bytes(data, out)
    scripts.fails(pattern, *command(chain, out, *flags, data=data))
    assert folder_bytes(data, out) == old
