"""
model.py and pretrain.py beside nanoGPT (a checkout of karpathy/nanoGPT) and transformers. By hand, on a quiet machine:

    python tests/bench/pretrain.py step NANOGPT                    tokens/s and memory of one training step, AdamW
    python tests/bench/pretrain.py sample                          batched generation: tokens/s, with and without cache
    python tests/bench/pretrain.py shakespeare NANOGPT TEXT [SEED ..]   its CPU recipe and ours, to one loss

Times are medians, ours and theirs in turn.
"""

import importlib.util, os, re, statistics, subprocess, sys, tempfile, time
from contextlib import redirect_stdout
from io import StringIO

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
import numpy as np
import torch
from torch.nn import functional as F
import model as lib

CPU = dict(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128)  # of nanoGPT's README, "I only have a macbook"


def nanogpt(folder, **args):
    spec = importlib.util.spec_from_file_location('nanogpt', os.path.join(folder, 'model.py'))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with redirect_stdout(StringIO()):
        net = module.GPT(module.GPTConfig(**args, dropout=0.0, bias=False))
        return net, net.configure_optimizers(0.1, 1e-3, (0.9, 0.99), 'cpu')


def ours(**args):
    net = lib.GPT(lib.GPTConfig(**args))
    return net, lib.make_optimizers(net, 1e-3, 0.1, (0.9, 0.99))[0]


def peak(work):
    """Bytes of tensors that are alive at once while work() runs, as the profiler counts them on a CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        work()
    live = top = 0
    for e in p.profiler.kineto_results.events():
        if e.name() == '[memory]':
            live += e.nbytes()
            top = max(top, live)
    return top


def step(folder):
    for name, args, batch in (
        ('4 layers, 128 wide, batch 12 x 64', CPU, 12),
        ('6 layers, 384 wide, batch 16 x 256', dict(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384), 16),
        ('4 layers, 256 wide, vocabulary 4,096, batch 8 x 256',
         dict(vocab_size=4096, block_size=256, n_layer=4, n_head=4, n_embd=256), 8),
    ):
        rows = torch.randint(args['vocab_size'], (batch, args['block_size'] + 1))
        x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        theirs, our = nanogpt(folder, **args), ours(**args)

        def one(net, opt, loss):
            loss(net).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)

        def our_loss(net):
            return F.cross_entropy(net(x).float().flatten(0, 1), y.flatten())

        runs = [lambda: one(*theirs, lambda net: net(x, y)[1]), lambda: one(*our, our_loss)]
        for run in runs:
            run(), run()
        memory = [peak(run) for run in runs]
        times, count = ([], []), max(3, int(2e6 / (batch * args['block_size'] * args['n_embd'])))
        for _ in range(11):
            for run, t in zip(runs, times):
                t0 = time.perf_counter()
                for _ in range(count):
                    run()
                t.append((time.perf_counter() - t0) / count)
        t = [statistics.median(x) for x in times]
        n = batch * args['block_size']
        print(f'{name}: nanoGPT {n / t[0]:,.0f} tok/s, ours {n / t[1]:,.0f}: {t[0] / t[1]:.2f}x; memory of a step '
              f'{memory[0] / 1e6:.1f} MB, ours {memory[1] / 1e6:.1f}: {memory[1] / memory[0]:.2f}x', flush=True)


if __name__ == '__main__':
    globals()[sys.argv[1]](*sys.argv[2:])
