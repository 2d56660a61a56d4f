"""pretrain.py on one process: data, length of a run, resume, sanity, fp16, init_from, bad input; the chain."""
import math
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import (MAKES, NEEDS, ROOT, definitions, distance, folder_bytes, kill_at, load, make_mid, make_spec,
                      read_log, stocked)
from configurator import configure
from model import GPT, GPTConfig, Tokenizer, load_model, read_shard, write_shard

@pytest.fixture
def go(world, scripts, tmp_path):
    """go(--flags) -> what pretrain.py printed, a short run in a folder of its own."""
    fixed = ('pretrain.py', world.short, f'--data_dir={world.data}', f'--out_dir={tmp_path}', '--resume=false')
    return lambda *flags, **more: scripts.ok(*fixed, *flags, **more).out

def command(world, out, *flags, data=None):
    return ('pretrain.py', world.short, f'--data_dir={data or world.data}', f'--out_dir={out}', *flags)

# -----------------------------------------------------------------------------
# the chain

def test_chain_learns(chain):
    """Every stage ran on what the one before wrote, and got better at what it is for."""
    for stage, r in chain.said.items():
        assert r.code == 0 and not r.err, (stage, r.err[-2000:])
    base, sft = (read_log(chain.out / f'{s}.jsonl') for s in ('base', 'sft'))
    assert abs(base[0]['val_loss'] - math.log(283)) < 0.2 and base[-1]['val_loss'] < 0.5
    assert 'ln(283) = 5.6454' in chain.said['pretrain'].out
    tok = Tokenizer(make_spec())
    shard = read_shard(str(chain.data / 'val_000000.bin'), tok.hash)
    n = min(2 * 8, (len(shard) - 1) // 48) * 48 # tokens that an evaluation predicts: windows of 48
    n_bytes = sum(len(tok.token_bytes(i)) for i in shard[1:n + 1])
    assert base[-1]['val_bpb'] == pytest.approx(base[-1]['val_loss'] * n / math.log(2) / n_bytes)
    assert sft[-1]['val_loss'] < sft[0]['val_loss'] / 2
    for name in MAKES.values():
        ckpt = load(chain.out / f'{name}.pt')
        assert ckpt['stage'] == name
        assert all(ckpt['metrics'][k] > 0 for k in ('seconds', 'flops', 'tokens'))
        assert not (chain.out / f'{name}.resume.pt').exists()
    assert not list(chain.out.glob('*.partial'))
    for name, data in chain.before.items(): # later stages leave the earlier checkpoints alone
        assert (chain.out / name).read_bytes() == data

# -----------------------------------------------------------------------------
# data and schedule

def test_every_window_once_an_epoch_and_y_is_x_later():
    shards = [np.arange(0, 23, dtype=np.uint16), np.arange(100, 109, dtype=np.uint16),
              np.arange(200, 203, dtype=np.uint16)]
    T = 4 # windows of 4 + 1 that share an end: (23 - 1) // 4 = 5, (9 - 1) // 4 = 2, (3 - 1) // 4 = 0
    ranks = [definitions('pretrain.py', shards=dict(train=shards), window_ends=dict(train=np.array([5, 7, 7])),
                         n_train=7, block_size=T, vocab_size=300, seed=3, total_batch_size=4, batch_size=1,
                         gradient_accumulation_steps=2, dp_rank=r, dp_world=2,
                         run=SimpleNamespace(device='cpu', device_type='cpu')) for r in range(2)]
    firsts = []
    for step in range(7): # 2 micro-batches x 2 ranks x 1 = 4 windows a step, so 28 = 4 epochs of 7
        batches = [rank.get_batches(step) for rank in ranks]
        for micro in range(2):
            for of_rank in batches:
                x, y = of_rank[micro]
                # no window crosses from one shard into the next
                assert x.shape == y.shape == (1, T) and torch.equal(y, x + 1)
                firsts.append(x[0, 0].item())
    epochs = [firsts[i:i + 7] for i in range(0, 28, 7)]
    assert all(sorted(e) == [0, 4, 8, 12, 16, 100, 104] for e in epochs) and len(set(map(tuple, epochs))) > 2

def test_learning_rate():
    s = definitions('pretrain.py', learning_rate=1.0, min_lr=0.1, warmup_iters=4, max_iters=105)
    assert [round(s.get_lr(i), 6) for i in range(4)] == [0.2, 0.4, 0.6, 0.8] # never 0, and 1 at step 4
    assert s.get_lr(4) == pytest.approx(1.0) # half way down the cosine between 4 and 104, then the floor
    assert s.get_lr(54) == pytest.approx(0.55) and s.get_lr(104) == pytest.approx(0.1) == s.get_lr(105)

@pytest.mark.parametrize('stage', ['pretrain', 'sft', 'reward'])
def test_the_gradient_is_clipped(stage, chain, scripts, tmp_path):
    """A gradient of length 1e-12 is nothing beside Adam's epsilon of 1e-8: no weight moves, whatever the learning rate."""
    start = {'pretrain': 'base', 'sft': 'base', 'reward': 'sft'}[stage]
    scripts.ok(f'{stage}.py', chain.short, f'--data_dir={chain.data}', f'--out_dir={tmp_path}', '--weight_decay=0',
               f'--init_from={chain.out / start}.pt', '--grad_clip=1e-12', 'eval_prompts=0')
    old, new = load(chain.out / f'{start}.pt')['weights'], load(tmp_path / f'{MAKES[stage]}.pt')['weights']
    for name, weight in old.items():
        if stage != 'reward' or name != 'head.weight': # another head
            moved = new[f'body.{name}' if stage == 'reward' else name] - weight
            assert moved.abs().max() < 1e-5, name

def test_length_and_time_are_printed_first(go, world, scripts):
    out = go('--max_iters=0', '--tokens_per_param=1', '--eval_interval=1000', '--log_interval=50')
    n = int(re.search(r'model: llama, ([\d,]+) parameters', out)[1].replace(',', ''))
    steps = int(re.search(r'length: ([\d,]+) steps of 192 tokens', out)[1].replace(',', ''))
    assert steps == math.ceil(n / (4 * 48)) and '1.0 a parameter' in out # batch 4, context 48
    epochs = float(re.search(r'([\d.]+) epochs of', out)[1])
    windows = int(re.search(r'epochs of ([\d,]+) windows', out)[1])
    assert epochs == pytest.approx(4 * steps / windows, abs=0.1)
    # a run that is far too long for its data says so, and how long it will take, by its first step
    long = scripts(*command(world, world.folder / 'long', '--max_iters=600000'), before=kill_at(1, signal.SIGTERM))
    before, step_0 = long.out.split('step      0 | loss')
    assert 'length: 600,000 steps' in before and 'lower --max_iters' in before and 'min left' in step_0
    assert 'FLOP/s' in step_0 and 'MFU' not in long.out # on a CPU

# -----------------------------------------------------------------------------
# resume

@pytest.fixture(scope='module')
def uninterrupted(world, scripts):
    out = world.folder / 'whole_base'
    scripts.ok(*command(world, out, '--dropout=0.2'))
    return out

@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=str)
def test_resume_is_bit_identical(number, world, scripts, uninterrupted, tmp_path):
    run = command(world, tmp_path, '--dropout=0.2')
    if number == signal.SIGKILL:
        assert scripts(*run, before=kill_at(7, number)).code == -signal.SIGKILL
    else:
        scripts.fails('stopped at step 8 .* the same command continues', *run, before=kill_at(7, number))
    saved = 5 if number == signal.SIGKILL else 8 # the step in which the signal came is finished
    assert load(tmp_path / 'base.resume.pt')['step'] == saved and not (tmp_path / 'base.pt').exists()
    assert f'at step {saved}' in scripts.ok(*run).out and not (tmp_path / 'base.resume.pt').exists()
    assert distance(tmp_path / 'base.pt', uninterrupted / 'base.pt') == 0
    assert read_log(tmp_path / 'base.jsonl') == read_log(uninterrupted / 'base.jsonl')

@pytest.mark.parametrize('stage', ['pretrain', 'sft', 'reward'])
def test_a_stop_in_the_first_or_last_step_loses_nothing(stage, chain, scripts, tmp_path):
    out, name = stocked(tmp_path / 'out', chain, *NEEDS[stage]), MAKES[stage]
    run = (f'{stage}.py', chain.short, f'--data_dir={chain.data}', f'--out_dir={out}', '--save_interval=1000',
           'eval_prompts=0') # else sft.py answers prompts before its first step
    scripts.fails('stopped at step 1 ', *run, before=kill_at(0, signal.SIGTERM))
    r = scripts(*run, before=kill_at(9, signal.SIGTERM)) # of 10 steps
    assert 'at step 1' in r.out
    assert (out / f'{name}.pt').exists() or (out / f'{name}.resume.pt').exists(), r.err

def test_a_run_with_other_settings_is_not_resumed(world, scripts, tmp_path):
    run = command(world, tmp_path)
    scripts.fails('stopped at step 4', *run, before=kill_at(3, signal.SIGTERM))
    old = (tmp_path / 'base.resume.pt').read_bytes()
    scripts.fails('learning_rate.*0.01.*0.002.*--resume=false', *run, '--learning_rate=0.002')
    scripts.fails('total_batch_size.*4.*2.*--resume=false', *run, '--batch_size=2')
    assert (tmp_path / 'base.resume.pt').read_bytes() == old
    (tmp_path / 'base.resume.pt').write_bytes(old[:1000])
    scripts.fails('damaged.*--resume=false', *run)
    scripts.ok(*run, '--resume=false') # starts over
    assert read_log(tmp_path / 'base.jsonl')[0]['step'] == 0

def test_a_finished_run_is_not_replaced_by_another_one(world, scripts, tmp_path):
    """Asked for more or fewer steps, it says what would happen; told --resume=false, it does that."""
    run = command(world, tmp_path, '--max_iters=4', '--eval_interval=4')
    scripts.ok(*run)
    old = folder_bytes(tmp_path)
    for steps in (2, 8):
        scripts.fails(f'base.pt is finished, a run with max_iters = 4, not {steps}: --resume=false .* replaces it',
                      *run, f'--max_iters={steps}')
    assert folder_bytes(tmp_path) == old
    assert 'base.pt is finished: the same run starts again at step 0' in scripts.ok(*run).out
    assert 'is finished' not in scripts.ok(*run, '--max_iters=2', '--resume=false').out
    assert load(tmp_path / 'base.pt')['step'] == 2
    scripts.fails('stopped at step 2', *run, '--resume=false', before=kill_at(1, signal.SIGTERM))
    scripts.fails(r'base\.resume\.pt is at step 2 of a run with max_iters = 4, not 9: finish that one, or', *run,
                  '--max_iters=9')
    scripts.ok(*run)
    assert load(tmp_path / 'base.pt')['step'] == 4

def test_a_stop_is_no_error(world, scripts, tmp_path):
    r = scripts.fails('stopped at step 2', *command(world, tmp_path), before=kill_at(1, signal.SIGINT))
    assert r.err.startswith('stopped at step 2 and saved: the same command continues')

def test_a_full_disk(world, scripts, tmp_path, uninterrupted):
    """The save fails in one line; with room again, the same command goes on and ends as if nothing had been."""
    run = command(world, tmp_path, '--dropout=0.2')
    scripts.fails('stopped at step 3', *run, before=kill_at(2, signal.SIGTERM))
    full = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 10**9))'
    scripts.fails(r'error: .*base\.resume\.pt cannot be written: is the disk full\?', *run, before=full)
    assert not list(tmp_path.glob('*.partial'))
    with open(tmp_path / 'base.jsonl', 'a', encoding='utf-8') as f:
        f.write('{"step": 5, "los') # half a line, as far as it went
    assert 'at step 3' in scripts.ok(*run).out
    assert distance(tmp_path / 'base.pt', uninterrupted / 'base.pt') == 0
    assert read_log(tmp_path / 'base.jsonl') == read_log(uninterrupted / 'base.jsonl')

def test_two_runs_in_one_folder(world, scripts, tmp_path):
    """The second one goes on, the first one ends when it wants to write; each line stands once."""
    run = command(world, tmp_path)
    waits, goes_on = tmp_path / 'waits', tmp_path / 'goes_on'
    until_the_second_has_ended = f'''
import os, time, model
old = model.seed_step
def seed_step(seed, step, rank):
    if step == 3:
        open({str(waits)!r}, 'w').close()
        while not os.path.exists({str(goes_on)!r}):
            time.sleep(0.01)
    return old(seed, step, rank)
model.seed_step = seed_step
'''
    with ThreadPoolExecutor() as pool:
        first = pool.submit(scripts.fails, r'another run has started to write .*base\.jsonl: this one ends', *run,
                            before=until_the_second_has_ended)
        while not waits.exists() and not first.done():
            time.sleep(0.01)
        try:
            scripts.ok(*run)
        finally:
            goes_on.touch()
        first.result()
    assert [row['step'] for row in read_log(tmp_path / 'base.jsonl') if 'loss' in row] == list(range(10))
    assert load(tmp_path / 'base.pt')['step'] == 10 and not list(tmp_path.glob('base.resume*'))

# -----------------------------------------------------------------------------
# sanity, precision, divergence

def test_sanity(go, world, scripts, tmp_path):
    go('--max_iters=2')
    old = folder_bytes(tmp_path)
    flags = ('--sanity=true', '--eval_interval=1000', '--log_interval=100')
    assert 'sanity: pass' in go(*flags, '--learning_rate=1e-2')
    scripts.fails('sanity: FAIL: loss', *command(world, tmp_path, *flags, '--batch_size=1', '--learning_rate=1e-7'))
    new = folder_bytes(tmp_path)
    assert all(new[path] == old[path] for path in old) # the curve and the checkpoint of a real run

# -----------------------------------------------------------------------------
# warnings, and the experiments that show what they are about

LARGE_WEIGHTS = """
import model
old = model.GPT.init_weights
def init_weights(self):
    old(self)
    self.wte.weight.data *= 50
model.GPT.init_weights = init_weights
"""
LATE = '--max_iters=111' # the step that is 100 after the warm-up is the last one

@pytest.mark.parametrize('warning,before,flags', [
    ('the first loss is above that of a uniform guess: lower the std in init_weights', LARGE_WEIGHTS, []),
    (r'the loss has risen from \d+\.\d\d to \d+\.\d\d: lower --learning_rate, or raise --warmup_iters', '',
     ['--learning_rate=3', '--warmup_iters=0']),
    ('the loss has hardly fallen: raise --learning_rate', '',
     [LATE, '--learning_rate=1e-5', '--min_lr=0', '--grad_clip=0']),
    ('100 gradients in a row had twice the norm .*: raise --grad_clip, or change --learning_rate', '',
     [LATE, '--grad_clip=0.001'])], ids=['init', 'risen', 'flat', 'clipped'])
def test_a_common_mistake_is_named(warning, before, flags, go):
    out = go(*flags, '--eval_interval=1000', '--log_interval=50', before=before)
    assert re.findall('warning: .*', out) == re.findall(f'warning: {warning}.*', out) != [] # and no other one

def test_memorising_is_named(chain):
    """The chain reads its few windows 32 times, and val_loss rises in the end. It has no other warning."""
    smooth, best, then, rises, average = 0, math.inf, 0, [], 0
    for row in read_log(chain.out / 'base.jsonl'): # a line for each step
        if 'val_loss' in row:
            if row['val_loss'] > 1.03 * best and smooth < then:
                rises.append(row['step'])
            if row['val_loss'] < best:
                best, then = row['val_loss'], smooth
        else:
            average = 0.9 * average + 0.1 * row['loss']
            smooth = average / (1 - 0.9 ** (row['step'] + 1))
    out = chain.said['pretrain'].out
    text = ('warning: val_loss rises while the training loss falls: it memorises: add data, or lower --max_iters '
            '(now 32 epochs)')
    assert re.findall('warning: .*', out) == [text] * len(rises) and rises == [150]
    assert out.index('step    150 | val_loss') < out.index('warning: ') < out.index('saved ')

BROKEN = ROOT / 'config' / 'broken'

@pytest.mark.parametrize('name', sorted(path.stem for path in BROKEN.glob('*.py')))
def test_an_experiment_changes_little(name, monkeypatch):
    """Each has a folder of its own, and differs from the healthy run in a few settings of what its name says."""
    settings = {}
    for which in ('healthy', name):
        profiles = [ROOT / 'config' / 'tiny.py', BROKEN / 'healthy.py', BROKEN / f'{which}.py']
        monkeypatch.setattr(sys, 'argv', ['pretrain.py', *map(str, profiles)])
        settings[which] = configure({'__file__': str(ROOT / 'pretrain.py')}, quiet=True)
    changed = {key for key, value in settings[name].items() if value != settings['healthy'][key]}
    assert settings[name]['out_dir'] == f'out/broken/{name}'
    assert len(changed - {'out_dir', 'data_dir'}) <= 2

def test_fp16_with_a_scaler(go, tmp_path, world, scripts):
    assert 'float16' in go('--dtype=float16') and load(tmp_path / 'base.pt')['metrics']['val_loss'] < 5.7
    big = """
import torch
old = torch.amp.GradScaler
torch.amp.GradScaler = lambda *a, **k: old(*a, init_scale=2.**40, **k)"""
    out = go('--dtype=float16', '--max_iters=30', before=big)
    scales = [float(s) for s in re.findall(r'fp16 overflow: step skipped, loss scale (\S+) halved', out)]
    assert len(scales) > 5 and scales[:2] == [2.0 ** 40, 2.0 ** 39] # and then it goes
    assert load(tmp_path / 'base.pt')['metrics']['val_loss'] < 5.7
    scripts.fails('float16 works with --parallel=ddp only', *command(world, tmp_path, '--dtype=float16',
                                                                     '--parallel=fsdp'))

def test_bfloat16(go, tmp_path):
    go('--dtype=bfloat16')
    assert all(math.isfinite(v) for row in read_log(tmp_path / 'base.jsonl') for v in row.values())
    assert all(v.dtype == torch.float32 for v in load(tmp_path / 'base.pt')['weights'].values())

NAN = '''
import torch.nn.functional as F
real = F.cross_entropy
F.cross_entropy = lambda logits, *a, **k: real(logits, *a, **k) * (float("nan") if logits.requires_grad else 1)'''

@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_a_gradient_that_is_not_finite_ends_the_run_at_once(dtype, chain, scripts, tmp_path):
    """One line with what to do, and no checkpoint of ruined weights. In fp16 the scaler tries smaller scales first."""
    out = stocked(tmp_path, chain, 'base')
    old = folder_bytes(out)
    r = scripts.fails('gradient norm nan.*--learning_rate',
                      *command(chain, out, f'--dtype={dtype}', '--max_iters=50', '--resume=false'),
                      before=NAN)
    assert r.out.count('step skipped') == (16 if dtype == 'float16' else 0) # 2**16 -> 1
    new = folder_bytes(out)
    assert all(new[path] == old[path] for path in old)

def test_a_run_that_diverges_in_its_last_step_leaves_the_old_checkpoint(chain, scripts, tmp_path):
    out = stocked(tmp_path, chain, 'base')
    old = (out / 'base.pt').read_bytes()
    scripts.fails('--learning_rate', *command(chain, out, '--learning_rate=1e30', '--arch=gpt2', '--n_kv_head=0',
                                              '--max_iters=3', '--resume=false'))
    assert (out / 'base.pt').read_bytes() == old

# -----------------------------------------------------------------------------
# torch.compile

@pytest.mark.parametrize('stage', ['pretrain', 'sft'])
def test_compile_changes_nothing(stage, chain, scripts, tmp_path):
    """
    Graphs are captured as on a GPU, also for batches of many shapes, but run without the slow code generator. The loss
    is in a graph: outside of one, the fp32 copies of the logits would take most of the memory of a GPU.
    """
    before = '''
import torch
names, plain_compile = [], torch.compile
def compile(f):
    names.append(getattr(f, '__name__', type(f).__name__))
    return plain_compile(f, backend='aot_eager')
torch.compile, torch.compiled = compile, names
'''
    for kind, more in (('eager', {}), ('compiled', dict(before=before, after='import torch; print(torch.compiled)'))):
        out = stocked(tmp_path / kind, chain, *NEEDS[stage])
        flags = (chain.short, f'--data_dir={chain.data}', f'--out_dir={out}', f'--compile={kind == "compiled"}')
        said = scripts.ok(f'{stage}.py', *flags, **more).out
    assert said.splitlines()[-1] == "['GPT', 'get_loss']"
    assert distance(*(tmp_path / kind / f'{MAKES[stage]}.pt' for kind in ('eager', 'compiled'))) < 1e-4

# -----------------------------------------------------------------------------
# init_from

def test_init_from(chain, scripts, tmp_path):
    out = scripts.ok(*command(chain, tmp_path, f'--init_from={chain.out / "base.pt"}', '--block_size=32',
                              '--learning_rate=1e-4', '--n_layer=5')).out
    rows = read_log(tmp_path / 'base.jsonl')
    assert rows[0]['val_loss'] < 0.7 and 'block_size 32' in out # it knows already
    args = load(tmp_path / 'base.pt')['model_args']
    assert args['n_layer'] == 2 and args['block_size'] == 32 # the checkpoint's shape, this run's context
    scripts.fails('context of 48 tokens, not 64', *command(chain, tmp_path, f'--init_from={chain.out / "base.pt"}',
                                                           '--block_size=64'))
    ckpt = load(chain.out / 'base.pt')
    torch.save({**ckpt, 'tokenizer': {**make_spec(), 'pattern': '.'}}, tmp_path / 'other.pt')
    scripts.fails('another tokenizer', *command(chain, tmp_path, f'--init_from={tmp_path / "other.pt"}'))

# -----------------------------------------------------------------------------
# mid-training

def test_mid_training(chain, scripts, tmp_path):
    """One pass over mid_*.bin from base.pt on, with lower learning rates and no warm-up; sft.py goes on from there."""
    data, out = make_mid(chain.data, tmp_path / 'data'), stocked(tmp_path / 'out', chain, 'base')
    old = folder_bytes(out)
    run = command(chain, out, '--stage=mid', '--mid_lr_scale=0.1', '--eval_interval=1000', data=data)
    said = scripts.ok(*run).out
    shard = read_shard(str(data / 'mid_train_000000.bin'))
    n_windows = (len(shard) - 1) // 48
    steps = math.ceil(n_windows / 4)
    rows = read_log(out / 'mid.jsonl')
    assert f'length: {steps} steps of 192 tokens' in said and f'1.0 epochs of {n_windows} windows' in said
    lrs = [row['lr'] for row in rows if 'lr' in row]
    assert len(lrs) == steps and lrs == sorted(lrs, reverse=True)
    assert lrs[0] == pytest.approx(1e-3) and lrs[-1] == pytest.approx(1e-4) # of 1e-2 and 1e-3

    # the first loss is that of the base model, on the text of mid_val
    tokens = torch.from_numpy(read_shard(str(data / 'mid_val_000000.bin')).astype(np.int64))
    n = (len(tokens) - 1) // 48 * 48
    with torch.no_grad():
        logits = load_model(load(out / 'base.pt'), 'cpu').eval()(tokens[:n].view(-1, 48))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:n + 1]).item()
    assert rows[0]['val_loss'] == pytest.approx(loss, abs=1e-4) and rows[-1]['val_loss'] < loss - 0.5
    ckpt = load(out / 'mid.pt')
    assert ckpt['stage'] == 'mid' and ckpt['config']['starts_from'] == load(out / 'base.pt')['metrics']['seconds']
    assert all((out / path.name).read_bytes() == content for path, content in old.items())

    scripts.ok('sft.py', chain.short, f'--data_dir={data}', f'--out_dir={out}', '--epochs=1', '--eval_prompts=0')
    assert load(out / 'sft.pt')['config']['starts_from'] == ckpt['metrics']['seconds']
    (out / 'sft.pt').unlink()
    scripts.ok('sft.py', chain.short, f'--data_dir={data}', f'--out_dir={out}', '--epochs=1', '--eval_prompts=0',
               f'--init_from={out / "base.pt"}')
    assert load(out / 'sft.pt')['config']['starts_from'] == load(out / 'base.pt')['metrics']['seconds']

def test_mid_training_continues_and_is_no_setting_of_the_base(chain, scripts, tmp_path):
    data, out = make_mid(chain.data, tmp_path / 'data'), stocked(tmp_path / 'out', chain, 'base')
    run = command(chain, out, '--stage=mid', data=data)
    scripts.fails('stopped at step 3', *run, before=kill_at(2, signal.SIGTERM))
    scripts.fails('mid_lr_scale = 0.3, not 0.2', *run, '--mid_lr_scale=0.2')
    assert 'at step 3' in scripts.ok(*run).out
    whole = stocked(tmp_path / 'whole', chain, 'base')
    scripts.ok(*command(chain, whole, '--stage=mid', data=data))
    assert distance(out / 'mid.pt', whole / 'mid.pt') == 0
    base = command(chain, tmp_path / 'base')
    scripts.fails('stopped at step 3', *base, before=kill_at(2, signal.SIGTERM))
    assert 'at step 3' in scripts.ok(*base, '--mid_lr_scale=0.2', '--mid_epochs=2').out

def test_mid_training_of_what_does_not_fit(chain, scripts, tmp_path):
    data, out = make_mid(chain.data, tmp_path / 'data'), stocked(tmp_path / 'out', chain, 'base')
    ckpt = load(chain.out / 'base.pt')
    torch.save({**ckpt, 'tokenizer': {**make_spec(), 'pattern': '.'}}, tmp_path / 'other.pt')
    old = folder_bytes(data, out)
    for pattern, in_folder, *flags in (
            (r'no .*mid_train_\*\.bin: run `python tokenizer\.py .*--mid_chats=1`', chain.data),
            (r'no checkpoint .*/none/base\.pt: make it with `python pretrain\.py`', data, f'--out_dir={tmp_path}/none'),
            ('other.pt has another tokenizer', data, f'--init_from={tmp_path}/other.pt'),
            ('context of 48 tokens, not 64: --block_size=48', data, '--block_size=64'),
            ('is of stage reward, not base or mid', data, f'--init_from={chain.out}/reward.pt')):
        scripts.fails(pattern, *command(chain, out, '--stage=mid', *flags, data=in_folder))
    scripts.fails("stage must be 'base' or 'mid', not 'middle'", *command(chain, out, '--stage=middle'))
    assert folder_bytes(data, out) == old

# -----------------------------------------------------------------------------
# bad input

def cut_off(path):
    path.write_bytes(path.read_bytes()[:-7])

def other_tokenizer(data, out):
    import json
    (data / 'tokenizer.json').write_text(json.dumps({**make_spec(), 'pattern': r'\w+|\s+|[^\w\s]+'}))

def test_published_shards_need_their_tokenizer(chain, scripts, tmp_path):
    """A token that the vocabulary lacks is an error with both numbers, not an index error."""
    data = shutil.copytree(chain.data, tmp_path / 'data')
    header = np.array([20240520, 1, 100] + [0] * 253, '<i4').tobytes()
    (data / 'train_000000.bin').write_bytes(header + np.full(100, 50000, '<u2').tobytes())
    (data / 'train_000001.bin').unlink()
    scripts.fails('50000.*283', *command(chain, tmp_path / 'out', data=data))

BAD = [
    (lambda data, out: [p.unlink() for p in data.glob('train_*.bin')], [], r'train_\*\.bin.*python tokenizer\.py'),
    (lambda data, out: (data / 'val_000000.bin').unlink(), [], r'val_\*\.bin.*python tokenizer\.py'),
    (lambda data, out: (data / 'tokenizer.json').unlink(), [], r'tokenizer\.json.*python tokenizer\.py'),
    (lambda data, out: cut_off(data / 'train_000001.bin'), [], r'train_000001\.bin is damaged.*tokenizer\.py'),
    (lambda data, out: (data / 'tokenizer.json').write_text('{'), [], r'tokenizer\.json.*python tokenizer\.py'),
    (other_tokenizer, [], 'another tokenizer.*tokenizer.py'),
    (None, ['--block_size=5000'], '5000.*--block_size='),
    (None, ['--learning_rat=1'], 'learning_rate'),
    (None, ['--arch=bert'], 'bert'),
    (None, ['--n_head=5'], '32.*5'),
    (None, ['--beta1=1'], 'beta1'),
    (None, ['--seed=18446744073709551616'], 'seed'),
    (None, ['--learning_rate=-1'], 'learning_rate must be at least 0, not -1'),
    (None, ['--max_iters=0', '--tokens_per_param=0'], 'positive --tokens_per_param'),
    (None, ['--parallel=tensor'], "'ddp', 'fsdp' or 'pipeline', not 'tensor'"),
    *((None, ['--batch_size=2', f'--total_batch_size={n}'],
       f'total_batch_size {n} is not a multiple of batch_size 2 x 1 processes: --total_batch_size={nearest}$')
      for n, nearest in ((7, 8), (9, 8), (1, 2)))]

@pytest.mark.parametrize('act,flags,pattern', BAD, ids=[f'{i}-{row[2][:30]}' for i, row in enumerate(BAD)])
def test_bad_input_changes_nothing(act, flags, pattern, chain, scripts, tmp_path):
    data, out = shutil.copytree(chain.data, tmp_path / 'data'), stocked(tmp_path / 'out', chain, 'base')
    if act:
        act(data, out)
    old = folder_bytes(data, out)
    scripts.fails(pattern, *command(chain, out, *flags, data=data))
    assert folder_bytes(data, out) == old
