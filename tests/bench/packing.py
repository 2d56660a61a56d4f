"""
How many real tokens a second sft.py learns from packed rows, against one conversation a row. By hand, after speedrun.sh:

$ python tests/bench/packing.py out/toytown/base.pt data/toytown                  # Toytown's conversations
$ python prepare_data.py --files=dolly.jsonl --data_dir=data/dolly                 # others, such as Dolly's
$ python tests/bench/packing.py out/toytown/base.pt data/dolly 512                 # rows of 512 tokens

The model is that of the checkpoint, with new weights and the wanted context. The three ways learn from the same
conversations in turn, three times; medians. Seconds are those of the CPU in the
forward and backward pass, so that other programs do not disturb.
"""
import os, statistics, sys, time

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..')
sys.path[:0] = [ROOT, os.path.join(ROOT, 'tests')]
from types import SimpleNamespace

import torch

from conftest import definitions
from model import GPT, GPTConfig, Tokenizer, load_checkpoint

path, data_dir = sys.argv[1:3]
ckpt = load_checkpoint(path, ['base'], 'bash speedrun.sh')
room = int(sys.argv[3]) if len(sys.argv) > 3 else ckpt['model_args']['block_size']
tok = Tokenizer(ckpt['tokenizer'])
torch.manual_seed(0)
model = GPT(GPTConfig(**{**ckpt['model_args'], 'block_size': room}))
cpu = SimpleNamespace(device='cpu', device_type='cpu', rank=0, world_size=1)
sft = definitions('sft.py', data_dir=data_dir, tok=tok, max_length=room, run=cpu, compile=False)
examples = sft.load_examples('train')[:32_000 // room]
n_tokens = sum(length for length, _, _ in examples)

def learn(examples, rows, width, masked):
    """Forward and backward over the rows, 8 at a time -> seconds of the CPU."""
    t0 = time.process_time()
    for first in range(0, len(rows), 8):
        batch = rows[first:first + 8]
        longest = max(sum(examples[i][0] for i in row) for row in batch)
        T = longest if width == 'longest' else room
        x, y, pos, mask = sft.to_batch(examples, batch)
        x, y, pos, mask = x[:, :T], y[:, :T], pos[:, :T], mask[:, :T, :T]
        logits = model(x, pos, mask) if masked else model(x)
        sft.get_loss(logits, y).backward()
    return time.process_time() - t0

def one_a_row(order):
    return [[i] for i in order]

by_length = sorted(range(len(examples)), key=lambda i: examples[i][0])
packed = sft.pack([length for length, _, _ in examples], room)
ways = {
    'one a row, padded to the context': (one_a_row(range(len(examples))), 'context', False),
    'one a row, similar lengths together, padded to the longest': (one_a_row(by_length), 'longest', False),
    'packed': (packed, 'context', True)}
seconds = {name: [] for name in ways}
for _ in range(3):
    for name, (rows, width, masked) in ways.items():
        seconds[name].append(learn(examples, rows, width, masked))

print(f'{len(examples)} conversations, {n_tokens:,} tokens, rows of {room}; {torch.get_num_threads()} threads')
slowest = statistics.median(seconds['one a row, padded to the context'])
for name, times in seconds.items():
    median = statistics.median(times)
    print(f'{name:60} {len(ways[name][0]):4} rows {n_tokens / median:8,.0f} tokens/s  {slowest / median:.2f}x')
