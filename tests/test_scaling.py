"""scaling.py: a known law is found, with its learning rates and best sizes; FLOPs; what is kept; drawing; errors."""
import json
import math
import re
import xml.etree.ElementTree
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import definitions, fails, make_spec

# The law and the best learning rate of the runs that take pretrain.py's place
E, A, B, a, b = 0.9, 60, 300, 0.4, 0.5
LAW = r'''
import math, os, subprocess, torch, types
from model import GPT, GPTConfig
from conftest import make_spec
def law(command, **more):
    flags = dict(word[2:].split('=') for word in command[3:])
    width, D = int(flags['n_embd']), int(flags['max_iters']) * 512
    args = dict(arch='llama', vocab_size=283, block_size=64, n_layer=2, n_head=int(flags['n_head']), n_embd=width)
    net = GPT(GPTConfig(**args))
    off = math.log(float(flags['learning_rate']) / (0.16 / width ** 0.5))
    loss = 0.9 + 60 / net.n_params() ** 0.4 + 300 / D ** 0.5 + 0.2 * off ** 2
    if flags['seed'] == '8':
        loss += 0.02
    os.write(1, f'trained {width} {D} {flags["seed"]}\n'.encode()) # whole, though two threads write
    os.makedirs(flags['out_dir'], exist_ok=True)
    metrics = dict(tokens=D, flops=D * net.flops_per_token(64), val_loss=loss)
    torch.save(dict(stage='base', weights=net.state_dict(), model_args=args, tokenizer=make_spec(), metrics=metrics),
               flags['out_dir'] + '/base.pt')
    return types.SimpleNamespace(returncode=0)
subprocess.run = law
'''
BEFORE = f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})' + LAW

@pytest.fixture(scope='module')
def text(tmp_path_factory):
    """A tokenizer and 1,500,000 tokens."""
    from model import Tokenizer, write_shard
    folder = tmp_path_factory.mktemp('text')
    (folder / 'tokenizer.json').write_text(json.dumps(make_spec()), encoding='utf-8')
    write_shard(str(folder / 'train_000000.bin'), np.zeros(1_500_000, np.uint16), Tokenizer(make_spec()).hash)
    return folder

def size_by_hand(width, V=283, L=2, T=64):
    """Parameters and FLOPs per token (6 N with the head, 12 L C T for attention) of config/scaling.py's models."""
    hidden = 32 * math.ceil(8 * width / 3 / 32)
    block = 4 * width ** 2 + 3 * width * hidden + 2 * width
    N = V * width + L * block + width
    return N, 6 * N + 12 * L * width * T

def test_sizes():
    from model import Tokenizer
    shared = dict(arch='llama', n_layer=2)
    m = definitions('scaling.py', shared=shared, block_size=64, tok=Tokenizer(make_spec()), tokens_per_step=512)
    assert m.model_size(32) == size_by_hand(32) == (35_840, 264_192)
    assert m.model_size(80) == size_by_hand(80)
    assert m.steps_for(32, 264_192 * 512 * 70) == 70

def test_a_known_law(scripts, tmp_path, text):
    command = ('scaling.py', f'--data_dir={text}', f'--out_dir={tmp_path}', '--widths=(32, 64, 96)', '--seed=7',
               '--budgets=(2e10, 4e10, 8e10)', '--held_out=(64, 3e11)', '--sweep_widths=(32, 96)', '--n_bootstrap=20')
    out = scripts.ok(*command, before=BEFORE).out
    assert out.count('trained') == 6 + 9 + 4 + 1 # sweep, grid, corners, held out
    found = json.loads((tmp_path / 'scaling.json').read_text(encoding='utf-8'))

    # a learning rate for each width: 0.16 / sqrt(width)
    assert 'they grow as width^-0.50' in out
    for width, rate in found['learning_rates'].items():
        assert rate == pytest.approx(0.16 / int(width) ** 0.5, rel=2e-3)

    # the second seed of each corner has a loss that is 0.02 higher: a standard deviation of 0.02 / sqrt(2)
    runs = found['runs']
    corners = {(row['width'], round(row['C'] / 1e10)) for row in runs if row['seed'] == 8}
    assert corners == {(32, 2), (32, 8), (96, 2), (96, 8)}
    assert found['noise'] == pytest.approx(0.02 / math.sqrt(2), rel=1e-3)

    # true FLOPs; all widths with equal FLOPs
    assert len(runs) == 13 and all(row['C'] == row['D'] * size_by_hand(row['width'])[1] for row in runs)
    assert max(row['C'] for row in runs) < 0.81e11 # the run that is held out is not among them
    assert found['held_out']['C'] == pytest.approx(3e11, rel=0.01)

    # the second seeds bend the law a little, by less than their 0.02
    held = found['held_out']
    assert held['loss'] == pytest.approx(E + A / held['N'] ** a + B / held['D'] ** b)
    assert held['predicted'] == pytest.approx(held['loss'], abs=0.02)
    low, high = held['interval']
    assert low < held['predicted'] < high

    svg = xml.etree.ElementTree.parse(tmp_path / 'scaling.svg').getroot()
    tags = [element.tag.split('}')[1] for element in svg]
    # sweep, runs twice (IsoFLOP, law), held out, three pairs; two and three parabolas, four lines
    assert tags.count('circle') == 6 + 2 * 13 + 1 + 6 and tags.count('polyline') == 2 + 3 + 4
    for element in svg:
        for name in ('x', 'y', 'cx', 'cy'):
            assert 0 <= float(element.get(name, 0)) <= 960

    # finished runs are not repeated; a changed setting repeats those that it changes
    again = scripts.ok(*command, before=BEFORE)
    assert 'trained' not in again.out
    assert json.loads((tmp_path / 'scaling.json').read_text(encoding='utf-8')) == found
    out = scripts.ok(*command, '--budgets=(2e10, 4e10, 1.6e11)', before=BEFORE).out
    assert out.count('trained') == 3 + 2 # three widths, and the second seed of two

def test_fit():
    """Exact losses give back the law; the best size by the parabola is that by trying sizes."""
    torch = pytest.importorskip('torch')
    m = definitions('scaling.py')
    rng = np.random.default_rng(1)
    N = torch.tensor(rng.choice([38e3, 60e3, 105e3, 172e3], 16))
    D = torch.tensor(rng.uniform(5e4, 1e6, 16))
    law = m.fit_law(N, D, E + A / N ** a + B / D ** b)
    assert law == pytest.approx([E, A, B, a, b], rel=1e-6)
    assert m.predict(law, dict(N=1e6, D=1e6)) == pytest.approx(0.9 + 60 / 1e6 ** 0.4 + 0.3)
    # what the law cannot be: a larger model, a longer run that are worse
    with fails('the loss rises with N or D'):
        m.fit_law(N, D, 2 + 1e-6 * N - 3e-7 * D)

def test_real_run(world, tmp_path):
    """The flags and the profile suit pretrain.py, and its checkpoint has what scaling.py reads."""
    import runpy
    from model import Tokenizer
    tok = Tokenizer.load(world.data / 'tokenizer.json')
    m = definitions('scaling.py', data_dir=str(world.data), out_dir=str(tmp_path), tok=tok, block_size=64)
    m.space['shared'] = runpy.run_path(str(m.PROFILE))['pretrain']
    row = m.train(32, 3, 0.02, 5)
    N, flops = size_by_hand(32)
    assert (row['N'], row['D'], row['C'], row['width'], row['seed']) == (N, 3 * 512, 3 * 512 * flops, 32, 5)
    assert 3 < row['loss'] < math.log(283) + 0.2
    written = (tmp_path / 'width32_steps3_rate0.02_seed5' / 'base.pt').stat().st_mtime_ns
    assert m.train(32, 3, 0.02, 5) == row
    assert (tmp_path / 'width32_steps3_rate0.02_seed5' / 'base.pt').stat().st_mtime_ns == written

def test_errors(scripts, tmp_path, text):
    where = (f'--data_dir={text}', f'--out_dir={tmp_path}', '--budgets=(1e10,)', '--held_out=(32, 2e10)')
    scripts.fails('no t.*tokenizer.py', 'scaling.py', f'--data_dir={tmp_path}')
    scripts.fails('has 1,500,000 tokens, the longest run needs .* --budgets', 'scaling.py', *where, '--budgets=(1e12,)')
    failed = "import subprocess, types\nsubprocess.run = lambda *a, **k: types.SimpleNamespace(returncode=1, stderr='why')"
    scripts.fails('width32_steps300.*: why', 'scaling.py', *where, before=failed)
    # a loss that falls ever faster with the rate has no lowest point
    falling = BEFORE + r"""
import model
load_checkpoint = model.load_checkpoint
def load(path, *more):
    ckpt = load_checkpoint(path, *more)
    ckpt['metrics']['val_loss'] = 1 - float(path.split('rate')[1].split('_')[0])
    return ckpt
model.load_checkpoint = load
"""
    scripts.fails('--sweep_rates', 'scaling.py', *where, before=falling)
