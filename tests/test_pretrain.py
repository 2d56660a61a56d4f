"""pretrain.py beside its loop: length of a run, sanity, what its lines of diagnosis say, compile that fails, MFU."""
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model as lib

@pytest.fixture
def go(world, scripts, tmp_path):
    """go(--flags) -> what pretrain.py printed, a short run in a folder of its own."""
    fixed = ('pretrain.py', world.short, f'--data_dir={world.data}', f'--out_dir={tmp_path}', '--resume=false')
    return lambda *flags, **more: scripts.ok(*fixed, '--batch_size=4', *flags, **more).out

def test_length_by_tokens_per_param(go, scripts, world, tmp_path):
    out = go('--max_iters=0', '--tokens_per_param=1', '--eval_iters=1', '--log_interval=50')
    n = int(re.search(r'model: llama, ([\d,]+) parameters', out)[1].replace(',', ''))
    steps = int(re.search(r'tokens a step, ([\d,]+) steps', out)[1].replace(',', ''))
    assert steps == math.ceil(n / (4 * 48)) # batch 4, context 48
    assert re.search(r', 1\.0 tokens a parameter', out) and (tmp_path / 'base.pt').exists()
    scripts.fails('tokens_per_param must be at least 1', 'pretrain.py', world.short, f'--data_dir={world.data}',
                  f'--out_dir={tmp_path}', '--max_iters=0', '--tokens_per_param=0')

def test_sanity(go, scripts, world, tmp_path):
    out = go('--sanity=true', '--learning_rate=1e-2')
    assert 'sanity: pass' in out and not (tmp_path / 'base.pt').exists()
    r = scripts('pretrain.py', world.short, f'--data_dir={world.data}', f'--out_dir={tmp_path}', '--batch_size=4',
                '--sanity=true', '--learning_rate=1e-7')
    assert r.code == 1 and 'sanity: FAIL' in r.out and r.err == ''

def test_an_epoch_that_repeats_is_said_once(go):
    out = go('--max_iters=40') # 60 + 40 documents of some 10 tokens are a few dozen windows of 48
    n = int(re.search(r'data: ([\d,]+) train', out)[1].replace(',', ''))
    assert out.count('every window has been seen once; from here on text repeats') == 1
    first = int(re.search(r'step (\d+): every window has been seen once', out)[1])
    assert abs((first + 1) * 4 - n / 48) <= 4 + 2 # 4 windows a step; each of 2 shards loses less than one at its end

def test_memorising_is_said(go):
    """A few pages again and again: training loss falls to nothing, validation rises."""
    out = go('--max_iters=300', '--learning_rate=3e-2', '--eval_interval=50', '--log_interval=100',
             '--save_interval=1000', '--weight_decay=0')
    vals = [float(v) for v in re.findall(r'^step +\d+ \| val loss ([\d.]+)', out, re.M)]
    rises = sum(b > a for a, b in zip(vals[1:], vals[2:]))
    assert rises and 1 <= out.count('it memorises') <= rises + 1

def test_a_learning_rate_that_is_too_high_is_said(go):
    out = go('--max_iters=20', '--learning_rate=2', '--eval_interval=5', '--warmup_iters=1', '--grad_clip=0',
             '--optimizer=adamw')
    assert 'is above its start' in out and '--learning_rate' in out

def test_compile_that_fails(go):
    before = """
import torch
def fail(*args):
    raise RuntimeError('no compiler here' + chr(10) + 'and more')
torch.compile = fail"""
    out = go('--compile=true', before=before)
    assert 'compile: failed, going on without: RuntimeError: no compiler here\n' in out and 'saved' in out

def test_peak_flops(monkeypatch):
    assert 1e8 < lib.peak_flops(SimpleNamespace(type='cpu')) < 1e14
    assert math.isnan(lib.peak_flops(SimpleNamespace(type='mps')))
    gpu = SimpleNamespace(type='cuda', device='cuda:0')
    for name, peak in (('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA A100-SXM4-40GB', 312e12), ('NVIDIA L4', 121e12),
                       ('NVIDIA L40S', 362e12), ('NVIDIA GeForce RTX 4090', 165e12), ('Tesla T4', 65e12)):
        monkeypatch.setattr('torch.cuda.get_device_name', lambda device: name)
        assert lib.peak_flops(gpu) == peak
    monkeypatch.setattr('torch.cuda.get_device_name', lambda device: 'Something New')
    assert math.isnan(lib.peak_flops(gpu))

def test_mfu_is_in_the_log(go):
    assert re.search(r'tok/s, \d+% MFU \|', go('--max_iters=2'))
