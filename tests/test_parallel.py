"""pretrain.py on two gloo processes, however the model lies on them, is pretrain.py on one; estimates; precision."""
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import estimate
import model as lib
from model import GPT, GPTConfig
from test_stages import distance, kill_at, load, log

SHAPES = dict(llama=[], gpt2=['--arch=gpt2', '--n_kv_head=0', '--smear=2'],
              untied=['--tie_embeddings=false', '--key_shift=true', '--qk_norm=true', '--n_layer=3'])

@pytest.fixture(scope='module')
def command(world):
    """Six steps of 8 windows, in micro-batches of 2."""
    return lambda out, *flags: ('pretrain.py', world.short, f'--data_dir={world.data}', f'--out_dir={out}', *flags,
                                '--total_batch_size=8', '--batch_size=2', '--max_iters=6', '--learning_rate=1e-3',
                                '--eval_interval=2', '--eval_iters=9', '--save_interval=100')

@pytest.fixture(scope='module')
def one(command, scripts, tmp_path_factory):
    """A shape and an optimizer -> out_dir of the run on one process."""
    made = {}
    def get(shape, optimizer):
        if (shape, optimizer) not in made:
            out = made[shape, optimizer] = tmp_path_factory.mktemp('one')
            scripts.ok(*command(out, *SHAPES[shape], f'--optimizer={optimizer}'))
        return made[shape, optimizer]
    return get

def same(a, b, tolerance=1e-5):
    assert distance(a / 'base.pt', b / 'base.pt') < tolerance
    for r, s in zip(log(a / 'base.jsonl'), log(b / 'base.jsonl'), strict=True):
        assert r.keys() == s.keys() and r['step'] == s['step']
        assert all(abs(r[k] - s[k]) < tolerance for k in ('loss', 'val_loss', 'val_bpb') if k in r), (r, s)
        assert r.get('norm', 0) == pytest.approx(s.get('norm', 0), rel=1e-4)

@pytest.mark.parametrize('parallel,shape,optimizer', [
    ('ddp', 'untied', 'muon'), ('fsdp', 'llama', 'adamw'), ('fsdp', 'gpt2', 'adamw'), ('pipeline', 'llama', 'adamw'),
    ('pipeline', 'gpt2', 'muon'), ('pipeline', 'untied', 'adamw')])
def test_two_processes_are_one(parallel, shape, optimizer, command, one, scripts, tmp_path):
    said = scripts.two(*command(tmp_path, *SHAPES[shape], f'--optimizer={optimizer}', f'--parallel={parallel}'))
    assert said[1].out == '' and 'saved' in said[0].out
    same(tmp_path, one(shape, optimizer))
    assert load(tmp_path / 'base.pt')['step'] == 6

def test_a_checkpoint_of_any_goes_on_in_any_other(command, one, scripts, tmp_path):
    """fsdp, stopped; pipeline, stopped; two processes with ddp, stopped; one process to the end."""
    stops = [('fsdp', 1), ('pipeline', 2), ('ddp', 3)]
    for parallel, at in stops:
        jobs = dict(before=kill_at(at, signal.SIGTERM))
        with pytest.raises(AssertionError, match=f'stopped at step {at + 1} and saved'):
            scripts.two(*command(tmp_path, '--optimizer=adamw', f'--parallel={parallel}'), **jobs)
        saved = load(tmp_path / 'base.resume.pt')
        assert saved['step'] == at + 1
        whole, = [m for m in saved['modules'] if m]
        assert all(whole['states'][n]['exp_avg'].shape == whole['weights'][n].shape for n in whole['states'])
        assert {'wte.weight', 'norm.weight', 'blocks.1.mlp.up.weight'} <= set(whole['weights'])
    said = scripts.ok(*command(tmp_path, '--optimizer=adamw', '--batch_size=8')).out
    assert 'at step 4' in said
    same(tmp_path, one('llama', 'adamw'))

def test_ddp_resumes_bit_for_bit(command, scripts, tmp_path):
    flags = ('--dropout=0.2', '--optimizer=muon')
    scripts.two(*command(tmp_path / 'whole', *flags))
    with pytest.raises(AssertionError, match='stopped at step 4'):
        scripts.two(*command(tmp_path / 'cut', *flags), before=kill_at(3, signal.SIGTERM))
    scripts.two(*command(tmp_path / 'cut', *flags))
    assert distance(tmp_path / 'cut' / 'base.pt', tmp_path / 'whole' / 'base.pt') == 0
    assert log(tmp_path / 'cut' / 'base.jsonl') == log(tmp_path / 'whole' / 'base.jsonl')

def test_what_does_not_go_together(command, scripts, tmp_path):
    go = lambda *flags: ('pretrain.py', *command(tmp_path)[1:4], *flags) # of two settings the last one counts
    scripts.fails("parallel is 'ddp', 'fsdp' or 'pipeline', not 'tensor'", *go('--parallel=tensor'))
    for size, nearest in ((7, 8), (9, 8), (1, 2)):
        scripts.fails(f'total_batch_size {size} is no multiple of batch_size 2 x 1 processes: '
                      f'--total_batch_size={nearest}$', *go(f'--total_batch_size={size}', '--batch_size=2'))
    env = dict(WORLD_SIZE=2, RANK=0, LOCAL_RANK=0)
    alone = 'import torch.distributed as d; d.init_process_group = d.destroy_process_group = lambda *a: 0'
    for flags, words in ((('--parallel=fsdp', '--optimizer=muon'), "'fsdp' goes with optimizer='adamw'"),
                         (('--parallel=pipeline', '--n_layer=1'), 'as many layers and micro-batches, not 1 and 4'),
                         (('--batch_size=3',), r'total_batch_size 8 is no .* 3 x 2 processes: --total_batch_size=6')):
        scripts.fails(words, *go('--total_batch_size=8', '--batch_size=2', *flags), env=env, before=alone)

# -----------------------------------------------------------------------------
# precision and devices

def test_fp16_with_a_scaler(command, scripts, tmp_path):
    out = scripts.ok(*command(tmp_path, '--dtype=float16')).out
    assert 'float16' in out and load(tmp_path / 'base.pt')['metrics']['val_loss'] < 5.7
    big = """
import torch
old = torch.amp.GradScaler
torch.amp.GradScaler = lambda *a, **k: old(*a, init_scale=2.**40, **k)"""
    out = scripts.ok(*command(tmp_path / 'big', '--dtype=float16', '--max_iters=30'), before=big).out
    skips = re.findall(r'too large for fp16 at a scale of (\d+): skipped', out)
    assert len(skips) > 5 and int(skips[0]) == 2 ** 40 and int(skips[1]) == 2 ** 39 # and then it goes
    assert load(tmp_path / 'big' / 'base.pt')['metrics']['val_loss'] < 5.7
    scripts.fails("float16 with parallel='ddp'", *command(tmp_path, '--dtype=float16', '--parallel=fsdp'))

def test_check_device(command, scripts, tmp_path):
    for dtype in 'float32', 'bfloat16':
        out = scripts.ok(*command(tmp_path / dtype, '--check_device=true', f'--dtype={dtype}')).out
        assert re.search(r'check_device: pass, loss 5\.\d+ on cpu and 5\.\d+ on the CPU, gradients \d', out)
    wrong = """
import copy, torch
old = copy.deepcopy
def twin(net, *memo): # what the device computes is not what the CPU does
    net = old(net, *memo)
    if hasattr(net, 'blocks'):
        net.blocks[0].mlp.proj.weight.data.add_(0.1)
    return net
copy.deepcopy = twin"""
    scripts.fails('check_device: loss .*: this device computes something else',
                  *command(tmp_path / 'wrong', '--check_device=true'), before=wrong)

def test_wandb(command, scripts, tmp_path):
    scripts.fails('pip install wandb', *command(tmp_path, '--wandb_log=true'),
                  before='import sys; sys.modules["wandb"] = None')
    fake = """
import sys, types
rows = []
sys.modules['wandb'] = types.SimpleNamespace(init=lambda **k: print('wandb', k['project'], len(k['config'])),
                                             log=lambda numbers, step: rows.append((step, sorted(numbers))))"""
    before = fake + '\nimport builtins; builtins.rows = rows'
    out = scripts.ok(*command(tmp_path / 'w', '--wandb_log=true'), before=before, after='print(rows)').out
    assert 'wandb w ' in out and "(0, ['val_bpb', 'val_loss'])" in out
    assert "(5, ['loss', 'lr', 'norm', 'tokens_per_second'])" in out
    assert len(log(tmp_path / 'w' / 'base.jsonl')) == 6 + 4 # the file has it too

# -----------------------------------------------------------------------------
# estimates

@pytest.mark.parametrize('shape', [
    dict(arch='gpt2'), dict(arch='llama', qk_norm=True, tie_embeddings=False, n_kv_head=2)], ids=str)
def test_activations_are_what_autograd_keeps(shape):
    """The same count on real tensors in fp32; attention on a CPU keeps what the fused kernel does."""
    config = GPTConfig(vocab_size=100, block_size=32, n_layer=2, n_head=4, n_embd=64, **shape)
    torch.manual_seed(0)
    net, x = GPT(config), torch.randint(100, (3, 32))
    weights, kept = {p.untyped_storage().data_ptr() for p in [*net.parameters(), *net.buffers()]}, {}
    def keep(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        torch.nn.functional.cross_entropy(net(x).flatten(0, 1), x.flatten())
    real = sum(n for n, _ in kept.values())
    assert estimate.activations(config, 3, torch.float32) - 3 * 32 * 100 * 8 == pytest.approx(real, rel=0.02)

def test_estimate_by_hand(scripts, tmp_path):
    """GPT-2 124M: the arithmetic of its parameters, FLOPs, states and hours."""
    out = scripts.ok('pretrain.py', f'--data_dir={tmp_path}', f'--out_dir={tmp_path}', 'config/gpt2.py',
                     '--estimate=8xH100', cwd=ROOT).out
    V, C, L, T = 50304, 768, 12, 1024
    n = V * C + T * C + L * (12 * C * C + 13 * C) + 2 * C
    assert f'parameters: {n:,} = {V * C:,} embedding + {T * C:,} positions' in out
    per_token = 6 * (n - T * C) + 12 * L * C * T # the embedding is the output matrix too
    assert f'FLOPs a token: {per_token:.3e}' in out
    assert re.search(r'0\.50 GB  weights, fp32\n +0\.50 GB  gradients, fp32\n +1\.00 GB  states of adamw', out)
    tokens = 19073 * 512 * 1024
    hours = tokens * per_token / (8 * 989e12 * 0.4) / 3600
    assert f'tokens: {tokens:,}' in out and f'{hours:.2f} hours; {hours * 8 * 3:.0f} dollars' in out
    assert not list(tmp_path.iterdir())

def test_profiles_fit_their_gpus(scripts, tmp_path):
    for profile, n, tokens in (('gpt2', 124e6, 10e9), ('d20', 561e6, 11.2e9), ('d32', 1.88e9, 37.6e9)):
        out = scripts.ok('pretrain.py', f'config/{profile}.py', f'--data_dir={tmp_path}', '--estimate=8xH100',
                         cwd=ROOT).out
        assert ' GB  of 80: fits' in out
        assert int(re.search(r'parameters: ([\d,]+)', out)[1].replace(',', '')) == pytest.approx(n, rel=0.01)
        assert int(re.search(r'tokens: ([\d,]+)', out)[1].replace(',', '')) == pytest.approx(tokens, rel=0.01)
    scripts.fails("8xH10'; kinds: B200, ", 'pretrain.py', '--estimate=8xH10', cwd=ROOT)
