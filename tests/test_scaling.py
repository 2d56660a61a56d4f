"""scaling.py: a law that is known is found again, the best size is the best, runs are made once, drawing, errors."""
import json
import math
import re
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# pretrain.py's place is taken by the law L = 1 + 60 / N^0.4 + 300 / D^0.5; N is 36 width^2
LAW = r'''
import os, subprocess, types, torch
def law(command, **more):
    flags = dict(word[2:].split('=') for word in command[2:])
    N, D = 36 * int(flags['n_embd']) ** 2, int(flags['max_iters']) * int(flags['batch_size']) * int(flags['block_size'])
    os.write(1, f'trained {N} {D}\n'.encode()) # whole, though two threads write
    os.makedirs(flags['out_dir'], exist_ok=True)
    torch.save(dict(weights={'blocks.0': torch.zeros(N), 'wte.weight': torch.zeros(99)}, metrics=dict(
        tokens=D, val_loss=1 + 60 / N ** 0.4 + 300 / D ** 0.5)), os.path.join(flags['out_dir'], 'base.pt'))
    return types.SimpleNamespace(returncode=0)
subprocess.run = law
'''

def test_a_known_law(scripts, tmp_path):
    command = ('scaling.py', f'--out_dir={tmp_path}', '--widths=(32, 64, 128)', '--lengths=(102400, 409600, 1638400)')
    out = scripts.ok(*command, before=LAW).out
    assert out.count('trained') == 9 and '36,864 parameters' in out and '| 100%, 0 s left' in out
    found = json.loads((tmp_path / 'scaling.json').read_text(encoding='utf-8'))
    assert [found[k] for k in 'EABab'] == pytest.approx([1, 60, 300, 0.4, 0.5], rel=0.05)
    assert len(found['points']) == 9
    assert found['points'][0] == dict(N=36864, D=102400, loss=pytest.approx(2.8322, abs=1e-3))
    # a budget of 1e12: the best of many sizes, by trying them
    row = re.search(r'1e\+12 FLOPs: +([\d,]+) parameters, +([\d,]+) tokens, +([\d.]+) tokens a parameter, loss (\S+)',
                    out)
    n, d, ratio, loss = (float(x.replace(',', '')) for x in row.groups())
    best = min((1 + 60 / N ** 0.4 + 300 / (1e12 / 6 / N) ** 0.5, N) for N in (10 ** (k / 100) for k in range(300, 900)))
    assert loss == pytest.approx(best[0], abs=2e-3) and math.log(n / best[1]) == pytest.approx(0, abs=0.2)
    assert 6 * n * d == pytest.approx(1e12, rel=1e-3) and ratio == pytest.approx(d / n, rel=0.05)
    svg = xml.etree.ElementTree.parse(tmp_path / 'scaling.svg').getroot()
    tags = [e.tag.split('}')[1] for e in svg]
    assert tags.count('circle') == 9 and tags.count('polyline') == 4 # three sizes and the best of all
    again = scripts.ok(*command, '--widths=(32, 64, 128, 256)', before=LAW).out # what is there is not trained again
    assert again.count('trained') == 3 and again.count('trained 2359296 ') == 3

def test_errors(scripts, tmp_path):
    scripts.fails('width32_tokens2000: error: no token shards.*tokenizer.py', 'scaling.py', f'--out_dir={tmp_path}',
                  f'--data_dir={tmp_path}', '--widths=(32,)', '--lengths=(2000,)')
