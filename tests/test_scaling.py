"""scaling.py: a known law is found, the best size is the best, finished runs are not repeated, drawing, errors."""
import json
import math
import re
import xml.etree.ElementTree
from pathlib import Path

import pytest

# pretrain.py's place is taken by the law L = 1 + 60 / N^0.4 + 300 / D^0.5
LAW = r'''
import os, subprocess, types, torch
from model import GPT, GPTConfig, Tokenizer
from conftest import make_spec
def law(command, **more):
    flags = dict(word[2:].split('=') for word in command[3:])
    width, D = int(flags['n_embd']), int(flags['max_iters']) * 1024
    args = dict(arch='llama', vocab_size=283, block_size=8, n_layer=1, n_head=1, n_embd=width)
    net = GPT(GPTConfig(**args))
    N = net.n_params(embedding=False)
    os.write(1, f'trained {N} {D}\n'.encode()) # whole, though two threads write
    os.makedirs(flags['out_dir'], exist_ok=True)
    torch.save(dict(stage='base', weights=net.state_dict(), model_args=args, tokenizer=make_spec(), metrics=dict(
        tokens=D, val_loss=1 + 60 / N ** 0.4 + 300 / D ** 0.5)), os.path.join(flags['out_dir'], 'base.pt'))
    return types.SimpleNamespace(returncode=0)
subprocess.run = law
'''

# for runs whose fit does not matter: it takes seconds
NO_FIT = '\nimport torch\ntorch.optim.LBFGS.step = lambda self, closure: None\n'

def test_a_known_law(scripts, tmp_path):
    before = f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})' + LAW
    command = ('scaling.py', f'--out_dir={tmp_path}', '--widths=(32, 64, 128)', '--steps=(100, 400, 1600)')
    out = scripts.ok(*command, before=before).out
    assert out.count('trained') == 9 and '102,400 tokens: loss' in out
    found = json.loads((tmp_path / 'scaling.json').read_text(encoding='utf-8'))
    assert [found[k] for k in 'EABab'] == pytest.approx([1, 60, 300, 0.4, 0.5], rel=0.05)
    assert len(found['points']) == 9
    N, D, loss = found['points'][0]
    assert D == 102400 and loss == pytest.approx(1 + 60 / N ** 0.4 + 300 / D ** 0.5)

    # every budget of the table: the best of many sizes, by trying them
    rows = re.findall(r'(\S+) FLOPs: +([\d,]+) parameters, +([\d,]+) tokens, loss (\S+)', out)
    assert len(rows) == 9
    for row in rows:
        C, n, d, loss = (float(x.replace(',', '')) for x in row)
        C = 6 * n * d # the table rounds it
        tried = [(1 + 60 / N ** 0.4 + 300 / (C / 6 / N) ** 0.5, N) for N in (10 ** (k / 100) for k in range(200, 1000))]
        assert loss == pytest.approx(min(tried)[0], abs=5e-3) and abs(math.log(n / min(tried)[1])) < 0.2
    assert 'C^0.5' in out # 0.5 / 0.9 = 0.56

    svg = xml.etree.ElementTree.parse(tmp_path / 'scaling.svg').getroot()
    tags = [e.tag.split('}')[1] for e in svg]
    assert tags.count('circle') == 9 and tags.count('polyline') == 4 # three sizes and the best of all
    texts = [e.text for e in svg if e.text]
    assert 'best size' in texts and sum('parameters' in text for text in texts) == 3

    # finished runs are not repeated, a changed setting repeats them
    out = scripts.ok(*command, '--widths=(32, 64, 128, 256)', before=before + NO_FIT).out
    assert out.count('trained') == 3
    assert scripts.ok(*command, '--seed=1', before=before + NO_FIT).out.count('trained') == 9

def test_real_runs(world, scripts, tmp_path):
    """The flags and the profile suit pretrain.py, and its checkpoints have what scaling.py reads."""
    out = scripts.ok('scaling.py', f'--out_dir={tmp_path}', f'--data_dir={world.data}', '--widths=(32,)',
                     '--steps=(2, 3)', before=NO_FIT).out
    assert '2,048 tokens: loss' in out and '3,072 tokens: loss' in out

def test_errors(scripts, tmp_path):
    scripts.fails('width32_steps20: error: no t.*tokenizer.py', 'scaling.py', f'--out_dir={tmp_path}',
                  f'--data_dir={tmp_path}', '--widths=(32,)', '--steps=(20,)')
