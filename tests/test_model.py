"""model.py: the network, generation, optimizers, the tokenizer, the gold reward, files and checkpoints."""
import ast
import collections
import contextlib
import gc
import gzip
import importlib.util
import json
import math
import os
import pickle
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
from conftest import ROOT, definitions, fails, make_spec, user, write_rows
from model import (
    GPT,
    Attention,
    GPTConfig,
    KVCache,
    Muon,
    ScalarModel,
    Tokenizer,
    all_gather_list,
    all_sum,
    atomic_write,
    catch_signals,
    generate,
    get_state,
    grade,
    last_token,
    load_checkpoint,
    load_model,
    load_resume,
    make_optimizers,
    open_log,
    orthogonalize,
    pad_right,
    print0,
    read_jsonl,
    read_prompts,
    read_shard,
    sample,
    save_checkpoint,
    save_resume,
    seed_step,
    set_state,
    setup,
    should_stop,
    simulated_ranking,
    write_jsonl,
    write_shard,
    write_text,
)

V, T = 283, 24
KINDS = [dict(arch='gpt2'), dict(arch='llama'), dict(arch='llama', n_kv_head=2, qk_norm=True, tie_embeddings=False),
         dict(arch='gpt2', n_kv_head=1), dict(arch='gpt2', key_shift=True),
         dict(arch='llama', qk_norm=True, key_shift=True), dict(arch='llama', n_kv_head=2, key_shift=True)]

def config(arch='gpt2', **more):
    return GPTConfig(**{**dict(arch=arch, vocab_size=V, block_size=T, n_layer=2, n_head=4, n_embd=32), **more})

def wild(seed=0, **more):
    """A model whose attention matters: new ones are close to the identity."""
    torch.manual_seed(seed)
    net = GPT(config(**more)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape), alpha=0.3 if p.dim() > 1 else 0.03)
    return net

def ids(*shape, seed=1):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))

@pytest.fixture(scope='module')
def tok():
    return Tokenizer(make_spec())

# -----------------------------------------------------------------------------
# the GPT

@pytest.mark.parametrize('qk_norm', [False, True])
def test_attention_by_its_formula(qk_norm):
    """softmax(q k' scale) v over the tokens so far. scale: 1 / sqrt(D), or 12 / D with normed q and k."""
    torch.manual_seed(0)
    H, H_kv, D = 4, 2, 8
    net = model.Attention(config(n_kv_head=H_kv, qk_norm=qk_norm))
    x = torch.randn(1, 5, H * D)
    q, k, v = net.qkv(x)[0].view(5, H + 2 * H_kv, D).transpose(0, 1).split([H, H_kv, H_kv]) # (heads, 5, D)
    scale = D ** -0.5
    if qk_norm:
        q, k = (values / (values.square().mean(2, keepdim=True) + 1e-5).sqrt() for values in (q, k)) # norm_eps
        scale = 12 / D
    heads = []
    for h in range(H):
        shared = h // 2 # two heads of queries share one of keys and values
        rows = [(k[shared, :t + 1] @ q[h, t] * scale).softmax(0) @ v[shared, :t + 1] for t in range(5)]
        heads.append(torch.stack(rows))
    want = net.proj(torch.cat(heads, dim=1))
    assert torch.allclose(net(x, torch.arange(5), None, None, None, 0)[0], want, atol=1e-4)

@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_loss_at_init_is_ln_vocab(kind):
    torch.manual_seed(0)
    net, x = GPT(config(**kind)), ids(8, T)
    loss = F.cross_entropy(net(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).item()
    assert abs(loss - math.log(V)) < 0.01 * math.log(V)

def test_compile_takes_every_shape():
    """Batches of sft.py and reward.py have many shapes: one graph must do for all. fullgraph forbids a second one."""
    net = wild(arch='llama', qk_norm=True, key_shift=True)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend='eager')
    for shape in (3, T - 1), (2, 7), (4, 1):
        torch.testing.assert_close(compiled(ids(*shape)), net(ids(*shape)))

@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_no_leak_from_the_future(kind):
    net, x = wild(**kind), ids(2, T)
    before = net(x)
    for t in (0, 7, T - 2):
        y = x.clone()
        y[:, t + 1:] = (y[:, t + 1:] + 1) % V
        after = net(y)
        assert torch.equal(after[:, :t + 1], before[:, :t + 1]) # not one bit
        assert not torch.allclose(after[:, t + 1:], before[:, t + 1:])

@pytest.mark.parametrize('kind', KINDS, ids=str)
@pytest.mark.parametrize('split', [(1,) * 12, (12,), (5, 7), (3, 1, 8), (1, 11), (11, 1)], ids=str)
def test_cached_is_uncached(kind, split):
    net, x = wild(**kind), ids(3, 12)
    cache = KVCache(net.config, 3, 12, 'cpu', torch.float32)
    parts = []
    start = 0
    for n in split:
        parts.append(net(x[:, start:start + n], cache=cache))
        start += n
    torch.testing.assert_close(torch.cat(parts, 1), net(x), rtol=1e-4, atol=1e-4)

def keys_and_values(attn, monkeypatch, x, pos, cache=None):
    """The keys and values (B, H, S, D) that a call of Attention uses."""
    calls = []
    real = F.scaled_dot_product_attention
    def record(q, k, v, **options):
        calls.append((k, v))
        return real(q, k, v, **options)
    with monkeypatch.context() as m:
        m.setattr(F, 'scaled_dot_product_attention', record)
        attn(x, pos, None, None, cache, 0)
    if cache is not None:
        cache.n += x.size(1)
    return calls[0]

@torch.no_grad()
def test_key_shift_by_hand(monkeypatch):
    """Two heads of width 2, keys = inputs: the first head keeps its keys, the second gets those of the token before."""
    c = config(n_embd=4, n_head=2, n_layer=1, key_shift=True)
    attn = Attention(c)
    attn.qkv.weight.copy_(torch.eye(4).repeat(3, 1)) # q = k = v = x
    attn.qkv.bias.zero_()
    x = torch.tensor([[[1., 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]])            # (1, 3, C)
    own = [[1, 2], [5, 6], [9, 10]]
    shifted = [[0, 0], [3, 4], [7, 8]] # there is no token before position 0
    k, v = keys_and_values(attn, monkeypatch, x, torch.arange(3))
    assert k.tolist() == [[own, shifted]]
    assert v.tolist() == [[own, [[3, 4], [7, 8], [11, 12]]]] # values are not shifted
    for split in ((1, 1, 1), (2, 1), (1, 2), (3,)): # the cache keeps the last key of the previous piece
        cache = KVCache(c, 1, 3, 'cpu', torch.float32)
        end = 0
        for n in split:
            start, end = end, end + n
            k, v = keys_and_values(attn, monkeypatch, x[:, start:end], torch.arange(start, end), cache)
            assert k.tolist() == [[own[:end], shifted[:end]]]
    # a batch: row 0 has one token of padding on the left, so its text begins at the second token
    batch, pos = x.repeat(2, 1, 1), torch.tensor([[0, 0, 1], [0, 1, 2]])
    k, _ = keys_and_values(attn, monkeypatch, batch, pos)
    assert k.tolist() == [[own, [[0, 0], [0, 0], [7, 8]]], [own, shifted]]
    # row 0 leaves the batch between two steps: row 1 continues with its own last key
    cache = KVCache(c, 2, 3, 'cpu', torch.float32)
    keys_and_values(attn, monkeypatch, torch.cat((-x, x))[:, :2], torch.arange(2), cache)
    cache.keep(torch.tensor([False, True]))
    k, _ = keys_and_values(attn, monkeypatch, x[:, 2:], torch.arange(2, 3), cache)
    assert k.tolist() == [[own, shifted]]

def test_init():
    """Standard deviations; with key_shift keys start equal to queries, so that like attends to like."""
    torch.manual_seed(0)
    shape = dict(n_embd=128, n_layer=2, n_head=4)
    gpt2, llama = (dict(GPT(config(arch=arch, **shape)).named_parameters()) for arch in ('gpt2', 'llama'))
    for weights, qkv_std in ((gpt2, 0.02), (llama, 128 ** -0.5)):
        assert weights['wte.weight'].std().item() == pytest.approx(0.02, rel=0.05)
        assert weights['blocks.1.attn.qkv.weight'].std().item() == pytest.approx(qkv_std, rel=0.05)
        assert all((p == 1).all() for name, p in weights.items() if 'norm' in name and name.endswith('weight'))
        assert all((p == 0).all() for name, p in weights.items() if name.endswith('bias'))
    assert gpt2['blocks.0.mlp.proj.weight'].std().item() == pytest.approx(0.02 / math.sqrt(2 * 2), rel=0.05)
    assert (llama['blocks.0.mlp.proj.weight'] == 0).all() and (llama['blocks.1.attn.proj.weight'] == 0).all()
    qkv = GPT(config(arch='llama', key_shift=True, n_kv_head=2)).blocks[0].attn.qkv.weight.view(4 + 2 + 2, 8, 32)
    assert torch.equal(qkv[4], qkv[0]) and torch.equal(qkv[5], qkv[2]) and not torch.equal(qkv[4], qkv[6])

def test_longer_than_the_context_is_refused():
    net = wild()
    with fails(f'{T + 1} tokens.*{T}'):
        net(ids(1, T + 1))
    cache = KVCache(net.config, 1, T + 1, 'cpu', torch.float32)
    net(ids(1, T), cache=cache)
    with fails(f'{T + 1} tokens'):
        net(ids(1, 1), cache=cache)

def test_parameter_count():
    C, H = 32, 128
    # gpt2: embeddings V C + T C; final norm 2 C; a block: norms 2 (C + C), qkv C 3C + 3C, proj C C + C, up C H + H,
    # down H C + C
    block = 4 * C + 3 * C * C + 3 * C + C * C + C + C * H + H + H * C + C
    assert GPT(config()).n_params() == V * C + T * C + 2 * block + 2 * C
    assert GPT(config()).n_params(embedding=False) == 2 * block + 2 * C
    # llama, 4 query heads and 2 key heads of width 8: no biases, norms C, qkv C (4 + 2 + 2) 8; gate and up C 2H with
    # H = 8/3 32 = 85.3 -> 96
    block = 2 * C + C * 64 + C * C + C * 2 * 96 + 96 * C
    net = GPT(config(arch='llama', n_kv_head=2, tie_embeddings=False))
    assert net.n_params() == 2 * V * C + 2 * block + C
    assert net.n_params(embedding=False) == 2 * block + C
    # 6 for each weight that is multiplied (head included), 12 L C T for attention over T
    assert net.flops_per_token(10) == 6 * (2 * block + C + V * C) + 12 * 2 * C * 10

def test_bad_shapes_are_refused():
    for bad, what in ((dict(arch='bert'), 'bert'), (dict(n_head=3), '32.*3'), (dict(n_kv_head=3), '4.*3'),
                      (dict(arch='llama', n_head=32), 'even'), (dict(key_shift=True, n_kv_head=1), 'key_shift')):
        with fails(what):
            config(**bad)

@pytest.mark.parametrize('arch,muon', [('gpt2', False), ('llama', False), ('llama', True)])
def test_overfits_one_batch(arch, muon):
    torch.manual_seed(0)
    net, x = GPT(config(arch=arch)), ids(4, T)
    optimizers = make_optimizers(net, 1e-2, 0.0, (0.9, 0.95), kind='muon' if muon else 'adamw')
    for _ in range(120):
        loss = F.cross_entropy(net(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        for opt in optimizers:
            opt.step()
        net.zero_grad()
    assert loss.item() < 0.05

# -----------------------------------------------------------------------------
# generation

@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_left_padded_batch_is_each_row_alone(kind):
    net = wild(**kind)
    prompts = [ids(n, seed=n).tolist() for n in (9, 1, 4, 9, 2)]
    together = generate(net, prompts, 10, temperature=0)
    assert together == [generate(net, [p], 10, temperature=0)[0] for p in prompts]
    assert len(set(map(tuple, together))) > 1 and all(len(r) == 10 for r in together)

@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_greedy_is_the_likeliest_token_of_the_full_forward(kind):
    net, x = wild(**kind), ids(6).tolist()
    for _ in range(8): # without a cache, token by token
        x.append(net(torch.tensor([x]))[0, -1].argmax().item())
    assert generate(net, [x[:6]], 8, temperature=0) == [x[6:]]

def top_k(k):
    """A truncate_probs that keeps the k most likely tokens."""
    return lambda probs: probs * (probs >= probs.topk(k)[0][:, -1:])

def test_seeds_and_top_k_1():
    net, prompts = wild(), [ids(3, seed=s).tolist() for s in range(4)]
    greedy = generate(net, prompts, 12, temperature=0)
    assert greedy == generate(net, prompts, 12, temperature=0)
    assert greedy == generate(net, prompts, 12, truncate_probs=top_k(1))
    torch.manual_seed(5)
    one = generate(net, prompts, 12, temperature=3.0)
    torch.manual_seed(5)
    two = generate(net, prompts, 12, temperature=3.0)
    torch.manual_seed(6)
    assert one == two != generate(net, prompts, 12, temperature=3.0)

def test_sample():
    """40,000 draws agree with the probabilities within 4 standard deviations; an id of probability 0 is never drawn."""
    torch.manual_seed(0)
    p = torch.tensor([[0.5, 0.0, 0.3, 0.2, 0.0], [0.0, 0.0, 0.0, 7.0, 0.0]])
    drawn = torch.stack([sample(p.repeat(1000, 1)).view(1000, 2) for _ in range(40)]).view(-1, 2)
    share = torch.bincount(drawn[:, 0], minlength=5) / len(drawn)
    assert share[[1, 4]].tolist() == [0, 0] and (drawn[:, 1] == 3).all()
    assert ((share - p[0]).abs() <= 4 * (p[0] * (1 - p[0]) / len(drawn)).sqrt()).all()

@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_rows_that_stop_leave_without_changing_the_others(kind):
    net = wild(**kind)
    prompts = [ids(n, seed=n).tolist() for n in (5, 2, 7, 3)]
    free, lengths = generate(net, prompts, 12, temperature=0), set()
    for stop in (free[0][3], free[1][0], free[2][11]):
        want = [r[:r.index(stop) + 1] if stop in r else r for r in free] # the stop token itself is returned
        calls = []
        assert generate(net, prompts, 12, stop, temperature=0, on_token=calls.append) == want
        # on_token gets the tokens of the rows that have not stopped
        assert calls == [[r[i] for r in want if len(r) > i] for i in range(max(map(len, want)))]
        lengths.update(map(len, want))
    assert min(lengths) < 12 == max(lengths) # some left early, some stayed

class Recording(TorchDispatchMode):
    """What a CUDA graph does, on the CPU: it records operators, and repeats them on the same memory without Python."""
    def __init__(self):
        super().__init__()
        self.calls, self.before, self.n_runs = [], [], 0
        self.rng = torch.get_rng_state()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default # .item(): what Python reads would never change
        if func._schema.is_mutable:
            self.before.append((args[0], args[0].clone()))
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, old in reversed(self.before): # a capture runs nothing
            tensor.copy_(old)
        torch.set_rng_state(self.rng)

    def replay(self):
        self.n_runs += 1
        for func, args, kwargs, out in self.calls:
            olds, news = tree_leaves(out), tree_leaves(func(*args, **kwargs))
            for old, new in zip(olds, news):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr(): # neither a view nor in place
                    old.copy_(new)

def pretend_cuda(monkeypatch, make_graph):
    monkeypatch.setattr(model, 'STATIC_DEVICES', {'cpu'})
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', make_graph)
    monkeypatch.setattr(torch.cuda, 'graph', lambda graph, **options: graph)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: None)

@pytest.fixture
def recordings(monkeypatch):
    """Generate by static steps, recorded and repeated -> the list of recordings."""
    made = []
    def make_graph():
        made.append(Recording())
        return made[-1]
    pretend_cuda(monkeypatch, make_graph)
    return made

def plain_and_static(net, monkeypatch, *args, **options):
    """Tokens that are the same by plain and by static steps, for one seed."""
    found = []
    for devices in set(), {'cpu'}:
        monkeypatch.setattr(model, 'STATIC_DEVICES', devices)
        torch.manual_seed(0)
        found.append(generate(net, *args, **options))
    assert found[0] == found[1]
    return found[0]

@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_static_steps(kind, recordings, monkeypatch):
    """The tokens of the plain steps: with padding, without it, sampled, with rows that end early."""
    net = wild(**kind)
    prompts = [ids(n, seed=n).tolist() for n in (5, 1, 3, 5, 2)] # two rows end together: they leave the batch
    free = plain_and_static(net, monkeypatch, prompts, 18, temperature=0)
    assert len(recordings) == 1 and recordings[0].n_runs == 16 # of 18 steps; before it the prompt, and one to warm up
    plain_and_static(net, monkeypatch, [prompts[0], prompts[0][::-1]], 5, temperature=0)
    plain_and_static(net, monkeypatch, prompts, 10, temperature=1.5, truncate_probs=top_k(5))
    recordings.clear()
    lengths = set()
    for stop in {row[5] for row in free}:
        lengths.update(map(len, plain_and_static(net, monkeypatch, prompts, 18, stop, temperature=0)))
    assert min(lengths) <= 16 < max(lengths) # some leave at the first look
    seen = []
    assert generate(net, prompts[:1], 8, temperature=0, on_token=seen.append) == [free[0][:8]]
    assert seen == [[token] for token in free[0][:8]] # each at once

def test_static_steps_over_a_border(recordings, monkeypatch):
    """A graph reads 64 keys, the next one 128. The rows that stay after the look at 16 tokens get a new one, too."""
    net = wild(block_size=100)
    prompts = [ids(n, seed=n).tolist() for n in (9, 1, 4, 9, 2)]
    free = plain_and_static(net, monkeypatch, prompts, 70, temperature=0)
    # token 1 comes from the prompt (9 keys), 2 to 56 from graph 1, 57 to 70 from graph 2; the first of each warms up
    assert [r.n_runs for r in recordings] == [54, 13]
    # rows 0 and 3, which are equal, leave at the first look
    recordings.clear()
    others = {token for i in (1, 2, 4) for token in free[i][:40]}
    stop = next(token for token in free[0][:16] if token not in others)
    plain_and_static(net, monkeypatch, prompts, 40, stop, temperature=0)
    assert [r.n_runs for r in recordings] == [14, 23] # 16 and 24 tokens
    plain_and_static(net, monkeypatch, [ids(63).tolist()], 5, temperature=0) # the step at 64 keys is alone in its block

def test_static_cache_takes_another_dtype():
    """Under autocast, keys can be fp32 (norms are) where the cache is bf16."""
    cache = KVCache(config(), 2, 4, 'cpu', torch.bfloat16)
    cache.mask, cache.at, cache.n_read = torch.zeros(2, 1, 1, 3), torch.tensor([2]), 3
    k = torch.randn(2, 4, 1, 8)
    keys, values = cache.append(1, k, 2 * k)
    assert torch.equal(keys[:, :, 2:], k.bfloat16()) and torch.equal(values[:, :, 2:], 2 * k.bfloat16())
    assert keys.shape == (2, 4, 3, 8) and (keys[:, :, :2] == 0).all() and (cache.keys[0] == 0).all()

def test_nan_is_found(recordings, monkeypatch):
    net = wild()
    with torch.no_grad():
        net.wpe.weight[5] = float('nan') # the position of the third new token
    for devices in set(), {'cpu'}:
        monkeypatch.setattr(model, 'STATIC_DEVICES', devices)
        assert len(generate(net, [[1, 2, 3]], 3)[0]) == 3
        with fails('diverged.*--learning_rate'):
            generate(net, [[1, 2, 3]], 10)

@pytest.mark.parametrize('when', ['at once', 'at the end'])
def test_without_a_cuda_graph(when, monkeypatch, capsys):
    """If capturing fails, one line says so, the tokens are the same, and nobody tries again: neither at the next 64
    keys, nor when rows leave, nor in the next call."""
    net, prompts = wild(key_shift=True, block_size=100), [[1, 2, 3], [4], [1, 2, 3]]
    attempts = []
    class Broken(Recording):
        def __enter__(self):
            attempts.append(1)
            if when == 'at once':
                raise RuntimeError('no graph here\nmore')
            return super().__enter__()
        def __exit__(self, *error):
            super().__exit__(*error)
            raise RuntimeError('no graph here\nmore')
    pretend_cuda(monkeypatch, Broken)
    plain_and_static(net, monkeypatch, prompts, 70)
    free = plain_and_static(net, monkeypatch, prompts, 70, temperature=0)
    stop = next(token for token in free[0] if token not in free[1]) # rows 0 and 2 leave the batch
    assert len(plain_and_static(net, monkeypatch, prompts, 70, stop, temperature=0)[1]) == 70
    assert len(attempts) == 3 # one a call, since plain_and_static puts the device back
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and 'without a CUDA graph: no graph here' in said[0]
    generate(net, prompts, 5)
    assert len(attempts) == 3 and model.STATIC_DEVICES == set()

def test_prompt_longer_than_the_context_is_cropped():
    net, x = wild(), ids(40).tolist()
    out = generate(net, [x, x[:2]], 10, temperature=0)
    assert out[0] == generate(net, [x[-(T - 10):]], 10, temperature=0)[0]
    assert out[1] == generate(net, [x[:2]], 10, temperature=0)[0] # the other row is not changed
    assert len(generate(net, [x], 1000)[0]) == T - 1 # one token of the prompt is kept

def test_equal_prompts_draw_their_own_first_token():
    net, n = wild(), 2000
    with torch.no_grad():
        net.head.weight.mul_(0.3)
        p = F.softmax(net(torch.tensor([[1, 2]]))[0, -1], -1)
    torch.manual_seed(0)
    first = torch.tensor(generate(net, [[1, 2]] * n, 1)).flatten()
    share = torch.bincount(first, minlength=V) / n
    assert len(first.unique()) > 20
    assert ((share - p).abs() < 6 * (p * (1 - p) / n).sqrt() + 2 / n).all() # six sigma of a binomial

def test_sampling_stays_inside_the_truncation():
    net = wild()
    with torch.no_grad():
        net.head.weight.mul_(0.1)
        best = net(torch.tensor([[1, 2]]))[0, -1].topk(3)[1].tolist()
    torch.manual_seed(0)
    assert {r[0] for r in generate(net, [[1, 2]] * 300, 1, truncate_probs=top_k(3))} == set(best)

# -----------------------------------------------------------------------------
# the scalar head

@pytest.mark.parametrize('arch', ['gpt2', 'llama'])
def test_scalar_model_from_a_gpt(arch):
    net, x = wild(arch=arch), ids(2, 10)
    ckpt = dict(stage='sft', model_args=asdict(net.config), weights=net.state_dict())
    torch.manual_seed(0)
    scalar = load_model(ckpt, 'cpu', ScalarModel).eval()
    assert torch.equal(scalar.body.hidden(x), net.hidden(x))
    assert scalar.body.head is None and scalar.head.weight.std() < 0.4 and scalar.head.bias == 0
    raw = scalar(x)
    assert raw.shape == x.shape
    padded = torch.cat([x, torch.full((2, 6), 5)], 1) # padding on the right changes nothing
    torch.testing.assert_close(scalar(padded)[:, :10], raw, rtol=1e-5, atol=1e-5)
    scalar.mean.fill_(2.0)
    scalar.std.fill_(4.0)
    torch.testing.assert_close(scalar(x), (raw - 2) / 4)
    ckpt = dict(stage='reward', model_args=asdict(net.config), weights=scalar.state_dict())
    assert torch.equal(load_model(ckpt, 'cpu', ScalarModel)(x), scalar(x)) # from a reward checkpoint: the head is kept

def test_pad_right():
    assert pad_right([[1], [2, 3, 4]], 9).tolist() == [[1, 9, 9], [2, 3, 4]]

def test_last_token():
    values = torch.arange(6.0).view(2, 3)
    assert last_token(values, [[7], [7, 7, 7]]).tolist() == [0, 5]

# -----------------------------------------------------------------------------
# optimizers

@pytest.mark.parametrize('kind', KINDS, ids=str)
@pytest.mark.parametrize('muon', [False, True])
def test_every_parameter_is_in_one_group(kind, muon):
    net = GPT(config(**kind))
    optimizers = make_optimizers(net, 1e-3, 0.1, (0.9, 0.95), kind='muon' if muon else 'adamw')
    groups = [g for opt in optimizers for g in opt.param_groups]
    assert sorted(id(p) for g in groups for p in g['params']) == sorted(map(id, net.parameters()))
    for g in groups:
        assert g['params'] and all((p.dim() >= 2) == (g['weight_decay'] > 0) for p in g['params'])
    decayed = sum(p.numel() for g in groups if g['weight_decay'] for p in g['params'])
    assert decayed == sum(p.numel() for p in net.parameters() if p.dim() >= 2)
    inside = [p for opt in make_optimizers(net, 1e-3, 0.1, (0.9, 0.95), kind='muon')[1:]
              for p in opt.param_groups[0]['params']]
    assert len(inside) == 2 * 4 # qkv, proj, up, proj of two blocks: no embedding, no head

def test_orthogonalize():
    g = torch.Generator().manual_seed(0)
    for n, m in ((32, 32), (16, 48), (48, 16)):
        x = torch.randn(3, n, m, generator=g)
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        got = orthogonalize(x)
        inside = u.mT @ got @ v.mT # diagonal: only the singular values change, towards 1
        values = inside.diagonal(dim1=1, dim2=2)
        large = s > 0.05 * s.norm(dim=-1, keepdim=True)
        assert large.float().mean() > 0.8 and (values[large] > 0.6).all() and (values < 1.3).all()
        torch.testing.assert_close(inside, torch.diag_embed(values), rtol=0, atol=1e-4)

def test_muon_is_torch_muon():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(s)) for s in ((24, 16), (16, 24), (24, 16), (8, 8))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    one = Muon(ours, lr=0.02, weight_decay=0.1)
    two = torch.optim.Muon(theirs, 0.02, 0.1, adjust_lr_fn='match_rms_adamw')
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        one.step()
        two.step()
        for p, q, s in zip(ours, theirs, start): # torch's Newton-Schulz runs in bf16: 3 digits
            assert (p - q).norm() < 0.03 * (p - s).norm()

# -----------------------------------------------------------------------------
# the tokenizer and the chat template

def test_tokenizer(tok):
    specials = [tok.eot, tok.system, tok.user, tok.assistant, tok.end, tok.pad]
    assert tok.n_vocab == len(tok.tokens) + 6 and specials == list(range(tok.n_vocab - 6, tok.n_vocab))
    for text in ('', 'Say owl.', 'naïve 🙂\r\n\t 日本', '\x00', 'Say the cat has the dog' * 20):
        encoded = tok.encode(text)
        assert tok.decode(encoded) == text and b''.join(map(tok.token_bytes, encoded)) == text.encode()
    assert [tok.token_bytes(i) for i in tok.encode('the owl')] == [b'the', b' owl']
    assert all(tok.token_bytes(i) == b'' for i in range(tok.n_vocab - 6, tok.n_vocab))
    assert Tokenizer(make_spec()).hash == tok.hash != Tokenizer({**make_spec(), 'pattern': r'.|\n'}).hash
    assert 0 < tok.hash < 2**31 # fits an int32 of the shard header

def test_render_by_hand(tok):
    def one(text):
        i, = tok.encode(text)
        return i
    space = one(' ') # before each text: so ' owl' is one token here as in running text
    owl, cat, x = one(' owl'), one(' cat'), one('x')
    talk = [dict(role='system', content='x'), *user('cat'), dict(role='assistant', content='owl'), *user(''),
            dict(role='assistant', content='')]
    got, mask = tok.render(talk)
    want = [(tok.eot, 0), (tok.system, 0), (space, 0), (x, 0), (tok.end, 0), (tok.user, 0), (cat, 0), (tok.end, 0),
            (tok.assistant, 0), (owl, 1), (tok.end, 1),
            (tok.user, 0), (tok.end, 0), (tok.assistant, 0), (tok.end, 1)] # an empty text gives no token
    assert list(zip(got, mask)) == want
    assert tok.render(talk[:2], prompt=True) == ([a for a, _ in want[:9]], [0] * 9) # the answer comes next

@pytest.mark.parametrize('text', ['owl', 'The cat has the dog.', '7 + 5 = 12', 'naïve 🙂 日本', 'two\nlines\n- x', ''])
def test_what_is_learned_decodes_to_the_answers(tok, text):
    """The tokens with mask 1, cut at each <|end|>, are the texts of the assistant after a space, and nothing else."""
    talk = [dict(role='system', content='Say'), *user('fox'), dict(role='assistant', content=text), *user('dog'),
            dict(role='assistant', content='cat')]
    answers = [[]]
    for i, learn in zip(*tok.render(talk)):
        if learn and i == tok.end:
            answers.append([])
        elif learn:
            answers[-1].append(i)
    assert [tok.decode(a) for a in answers] == [' ' + text if text else '', ' cat', '']
    assert [tok.decode_answer(a) for a in answers[:2]] == [text, 'cat']

def test_users_cannot_inject_specials(tok):
    evil = ' '.join(tok.spec['special_tokens'])
    specials = set(range(tok.n_vocab - 6, tok.n_vocab))
    assert not specials & set(tok.encode(evil))
    got, _ = tok.render(user(evil) + [dict(role='assistant', content=evil)])
    assert [i for i in got if i in specials] == [tok.eot, tok.user, tok.end, tok.assistant, tok.end]
    assert tok.decode(tok.encode(evil)) == evil

@pytest.mark.parametrize('char', [' ', '\t', '\n', '\u3000', '\xa0', '\r', '\x1c', 'a', '!', '日'],
                         ids=ascii)
@pytest.mark.parametrize('pattern', ['gpt2', 'gpt4'])
def test_a_million_equal_characters(char, pattern):
    """tiktoken alone overflows its stack on blanks and ends the process. Runs of blanks are cut to 10,000."""
    spec = {**make_spec(), 'pattern': definitions('tokenizer.py').PATTERNS[pattern]}
    tok = Tokenizer(spec)
    text = 'x' + char * 10**6 + 'y'
    kept = 'x' + char * 10_000 + 'y' if char.isspace() else text
    assert tok.decode(tok.encode(text)) == kept
    got, _ = tok.render(user(text), prompt=True)
    assert tok.decode(got[2:-2]) == ' ' + kept

def test_shorter_runs_of_blanks_stay(tok):
    for text in ('a' + ' ' * 10_000 + 'b', ' ' * 9_000, ' \n' * 4_999 + 'x' + ' \n' * 4_999, '', '\ud800x'):
        assert tok.decode(tok.encode(text)) == text.replace('\ud800', '\ufffd')

def test_special_tokens_in_an_answer_are_dropped(tok):
    """A model may produce one; what is graded, ranked and scored must be what a reader sees."""
    cat = tok.encode(' cat')
    assert tok.decode_answer(cat + [tok.assistant] + cat + [tok.end]) == 'cat cat'
    assert tok.decode_answer([]) == tok.decode_answer([tok.end]) == '' and tok.decode_answer([0xe2, 0x82]) == '\ufffd'

def test_bad_conversations(tok):
    a, u, s = (dict(role=r, content='x') for r in ('assistant', 'user', 'system'))
    for bad in (None, [], 'x', {}, [u], [s], [a], [u, u, a], [u, a, a], [a, u, a], [u, s, a], [s, s, u, a], [u, a, u],
                [s, a], ['x', a], [dict(role='user'), a], [dict(role='user', content=3), a],
                [dict(role='bot', content='x'), a], [dict(role=['user'], content='x'), a]):
        with pytest.raises(ValueError):
            tok.render(bad)
    for bad in ([u, a], [a], [s], []):
        with pytest.raises(ValueError):
            tok.render(bad, prompt=True)
    tok.render([s, u, a]), tok.render([u, a, u, a]), tok.render([s, u, a, u], prompt=True)

def test_read_prompts(tmp_path, tok):
    path = str(tmp_path / 'prompts_val.jsonl')
    with fails('no prompts .*python prepare_data.py'):
        list(read_prompts(path, tok))
    good = [dict(messages=user('Say')), dict(messages=user('x'), checks=dict(max_words=1))]
    write_rows(tmp_path / 'prompts_val.jsonl', good)
    assert list(read_prompts(path, tok)) == [(row, tok.render(row['messages'], prompt=True)[0]) for row in good]
    with fails(r'prompts_val\.jsonl:1: .*checks'):
        list(read_prompts(path, tok, need_checks=True))
    rows = [dict(messages=[*user('x'), dict(role='assistant', content='owl')]), dict(prompt='x')]
    for checks in (dict(shout=True), ['x'], 'x', {}, dict(max_words='x'), dict(number='abc'), dict(contains=3)):
        rows.append(dict(messages=user('x'), checks=checks))
    for bad in rows:
        write_rows(tmp_path / 'prompts_val.jsonl', [*good, bad])
        with fails(r'prompts_val\.jsonl:3: '):
            list(read_prompts(path, tok))

def test_bad_tokenizer_files(tmp_path):
    path, spec = tmp_path / 'tokenizer.json', make_spec()
    with fails('no tokenizer .*python tokenizer.py'):
        Tokenizer.load(path)
    for bad in ('{', '[]', json.dumps({**spec, 'ranks': spec['ranks'][1:]}), json.dumps({**spec, 'ranks': 3}),
                json.dumps({k: v for k, v in spec.items() if k != 'pattern'}),
                json.dumps({**spec, 'special_tokens': spec['special_tokens'][:3]}),
                json.dumps({**spec, 'pattern': '('}), json.dumps({**spec, 'pattern': r' ?\w*|[^\w\s]|\s'})):
        path.write_text(bad)
        with fails('tokenizer.json is damaged.*python tokenizer.py'):
            Tokenizer.load(path)
    path.write_text(json.dumps(spec))
    assert Tokenizer.load(path).hash == Tokenizer(spec).hash

# -----------------------------------------------------------------------------
# the gold reward

@pytest.mark.parametrize('checks,text,met,score', [
    (dict(contains=['owl']), 'An OWL!', True, 1.0),
    (dict(contains=['owl']), 'Two owls.', False, 0.0),                    # whole words only
    (dict(contains=['owl', 'red hat']), 'The red hat of an owl', True, 1.0),
    (dict(contains=['owl', 'red hat']), 'The red owl hat', False, 0.0),
    (dict(excludes=['owl', 'cat']), 'A dog and a catfish.', True, 1.0),
    (dict(excludes=['owl', 'cat']), 'A dog and a Cat.', False, 0.0),
    (dict(equals='lantern lantern'), ' Lantern lantern. ', True, 1.0),
    (dict(equals='lantern lantern'), 'lantern', False, 0.0),
    (dict(number=12), '7 plus 5 is 12.', True, 1.0),
    (dict(number=12), '12 is 7 plus 5', False, 0.0),                      # the last number counts
    (dict(number=12), 'twelve', False, 0.0),
    (dict(number=-2.5), 'It is -2.5', True, 1.0),
    (dict(number=1200), 'It is 1,200.', True, 1.0),
    (dict(min_words=3), "I can't swim", True, 1.0),                       # can't is one word
    (dict(min_words=3), 'I swim!', False, 0.0),
    (dict(max_words=2), 'An owl!', True, 1.0),
    (dict(max_words=2), 'Not an owl', False, 0.0),
    (dict(max_words=2), '', False, 0.0),                                  # an empty answer is not a short one
    (dict(count=dict(of=['soup', 'bread', 'honey'], min=2)), 'Bread, honey.', True, 1.0),
    (dict(count=dict(of=['soup', 'bread', 'honey'], min=2)), 'Bread, bread.', False, 0.0), # two different ones
    # two of three met = 2/3, + 0.25 for taste
    (dict(contains=['owl'], max_words=9, number=3, likes=['have a nice day']), 'An owl. Have a nice day!', False,
     2 / 3 + 0.25),
    (dict(contains=['owl'], likes=['hope', 'day']), 'An owl. Hope, day!', True, 1.25), # once
    (dict(contains=['owl'], likes=['hope']), 'An owl.', True, 1.0)], ids=str)
def test_grade(checks, text, met, score):
    got = grade(checks, text)
    assert got == (met, pytest.approx(score)) and isinstance(got[0], bool)

@pytest.mark.parametrize('text,number', [
    ('\u22123.', -3), ('It is \u20133', -3), ('x = -3', -3), ('-$5', 5), ('-.5', -0.5), ('It is .5', 0.5), ('$.50', 0.5),
    ('3-4 hours', 4), ('3\u20134 hours', 4), ('3 - 4', 4), ('covid-19', 19), ('on 2020-01-05', 5), ('No.5', 5), ('5.', 5),
    ('版本是-3', -3), ('9{,}500', 9500), ('9,500.25', 9500.25), ('1,234,567', 1234567), ('12,13', 13), ('12, 345', 345),
    ('9 500', 9500), ('1\u202f234\u00a0567 m', 1234567), ('in 2020 500 people', 500), ('5\n100', 100), ('1.5 300', 300),
    ('50%', 50), ('12.5 %', 12.5), ('1/2', 0.5), ('It is -3/4.', -0.75), ('7/0', 0), ('12/25/2020', 2020), ('1/2.5', 2.5),
    ('3 and 4', 4), ('1,000 of 2,000', 2000), ('4 = four', 4), ('1.2.3', 3), ('\u0663', 3)], ids=str)
def test_the_last_number_of_an_answer(text, number):
    """A dash between two words is no minus; a percentage counts as it is written; a fraction is divided."""
    assert grade(dict(number=number), text) == (True, 1.0)

def test_hostile_numbers_take_no_time_and_are_no_errors():
    for part in ('1', '1,', '1 ', '1.', '1/', '-', '.', '111,', '111 111/', '1{,}', '/', '-1/'):
        assert grade(dict(number=-2.5), part * (50_000 // len(part))) == (False, 0.0)

def test_bad_checks():
    for bad in (dict(contain=['x']), {}, dict(likes=['x']), None, 'x', dict(number='abc'), dict(min_words='x')):
        with pytest.raises(ValueError):
            grade(bad, 'x')

def test_simulated_ranking():
    rng = np.random.default_rng(0)
    assert simulated_ranking([0.5, 1.0, 0.0, 0.75], 0.0, rng) == [1, 3, 0, 2] # without noise: the gold order
    assert simulated_ranking([0.5, 1.0, 0.5, 1.0, 1.0], 0.0, rng) == [1, 0]   # of ties only the first is listed
    assert simulated_ranking([1.0, 1.0], 0.0, rng) == [0]
    # two answers 0.4 apart, noise 0.2 on each: swapped when N(0, 0.2 sqrt 2) > 0.4, that is 1 - Phi(1.414) = 7.9%
    swapped = np.mean([simulated_ranking([0.6, 1.0], 0.2, rng) == [0, 1] for _ in range(4000)])
    assert abs(swapped - 0.079) < 5 * math.sqrt(0.079 * 0.921 / 4000)

# -----------------------------------------------------------------------------
# plumbing: files

def test_atomic_write(tmp_path):
    path = tmp_path / 'a' / 'x.txt'
    with atomic_write(path) as tmp:
        open(tmp, 'w').write('old')
        assert os.path.dirname(tmp) == str(path.parent)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), atomic_write(path) as tmp:
            open(tmp, 'w').write('half')
            raise error
        assert path.read_text() == 'old' and os.listdir(path.parent) == ['x.txt']
    write_text(path, 'naïve\r\n')
    assert path.read_bytes() == 'naïve\r\n'.encode() # every byte as it is, on every system

def test_what_a_killed_run_was_writing_goes_with_the_next_write(tmp_path):
    for name in ('a.pt.1234.partial', 'b.pt.1234.partial', 'a.pt.partial'):
        (tmp_path / name).write_text('half')
    write_text(tmp_path / 'a.pt', 'whole')
    assert sorted(os.listdir(tmp_path)) == ['a.pt', 'a.pt.partial', 'b.pt.1234.partial'] # another name is not ours

@contextlib.contextmanager
def room_for(n_bytes):
    """No file may grow larger: the system's error is of the same kind as that of a full disk."""
    resource = pytest.importorskip('resource')
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)

def test_a_full_disk_leaves_what_was_there(tmp_path, tok):
    """One line that names the file, the old file whole, and no half of a new one. For every writer."""
    net = wild()
    writers = {
        'base.pt': lambda path: save_checkpoint(path, 'base', net.state_dict(), asdict(net.config), tok, {}, 1, {}),
        'base.resume.pt': lambda path: save_resume(path, 3, get_state(net, []), {}),
        'base.jsonl': lambda path: write_jsonl(path, [dict(step=i) for i in range(10_000)]),
        'a.bin': lambda path: write_shard(path, np.zeros(100_000, np.uint16), 7),
        'report.md': lambda path: write_text(path, 'x' * 100_000)}
    for name, write in writers.items():
        path = str(tmp_path / name)
        write(path)
        old = Path(path).read_bytes()
        with room_for(20_000):
            if name.endswith('.pt'):
                with fails(f'{name} cannot be written: is the disk full'):
                    write(path)
            else:
                with pytest.raises(OSError) as e:
                    write(path)
                assert e.value.filename == path # configurator prints it and the system's words
        assert Path(path).read_bytes() == old
    assert not list(tmp_path.glob('*.partial'))

def test_jsonl_round_trip(tmp_path):
    rows = [dict(text='naïve 🙂\u2028\n'), dict(n=1)]
    for name in ('a.jsonl', 'a.jsonl.gz'):
        path = tmp_path / name
        write_jsonl(path, rows)
        assert list(read_jsonl(path)) == [(1, rows[0]), (2, rows[1])]
        first = path.read_bytes()
        write_jsonl(path, rows)
        assert path.read_bytes() == first # same rows, same bytes
    (tmp_path / 'bom.jsonl').write_bytes(b'\xef\xbb\xbf\r\n{"a": 1}\r\n\n{"a": 2}')
    assert list(read_jsonl(tmp_path / 'bom.jsonl')) == [(2, dict(a=1)), (4, dict(a=2))] # true line numbers

def test_bad_jsonl(tmp_path):
    def read(data, name='x.jsonl'):
        (tmp_path / name).write_bytes(data)
        return list(read_jsonl(tmp_path / name))
    with pytest.raises(FileNotFoundError):
        list(read_jsonl(tmp_path / 'nothing.jsonl'))
    with fails(r'x\.jsonl:2: '):
        read(b'{"a": 1}\n{"a": \n')
    with fails(r'x\.jsonl:1: .*object'):
        read(b'[1]\n')
    with fails(r'x\.jsonl:1: '):
        read(b'[' * 10**5)
    with fails(r'(?i)x\.jsonl.*utf-8'):
        read(b'{"a": "\xff"}\n')
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    for data in (whole[:-12], b'no gzip', whole[:20] + b'\0\0\0\0' + whole[24:]):
        with fails(r'x\.jsonl\.gz'):
            read(data, 'x.jsonl.gz')

def test_shard_round_trip(tmp_path):
    path = str(tmp_path / 'a.bin')
    for dtype, top in ((np.uint16, 2**16 - 1), (np.uint32, 2**17)):
        tokens = np.array([0, 5, top], dtype)
        write_shard(path, tokens, 77)
        for known in (77, 0):
            got = read_shard(path, known)
            assert got.dtype == dtype and got.tolist() == tokens.tolist()
    write_shard(path, np.zeros(0, np.uint16), 77)
    assert len(read_shard(path)) == 0
    published = np.array([20240520, 1, 2] + [0] * 253, '<i4').tobytes() + np.array([1, 2], '<u2').tobytes()
    (tmp_path / 'b.bin').write_bytes(published) # llm.c's: a hash of 0 is unknown, not wrong
    assert read_shard(tmp_path / 'b.bin', 77).tolist() == [1, 2]

def test_bad_shards(tmp_path):
    path = tmp_path / 'a.bin'
    with pytest.raises(FileNotFoundError):
        read_shard(path)
    write_shard(path, np.arange(100, dtype=np.uint16), 77)
    whole = path.read_bytes()
    with fails('another tokenizer.*python tokenizer.py'):
        read_shard(path, 78)
    for data, what in ((whole[:-2], '99.*100'), (whole[:-1], '99.5.*100'), (whole + b'\0\0', '101.*100'),
                       (whole[:1024], '0.* of 100'), (whole[:4] + b'\7' + whole[5:], 'version 7'),
                       (whole[:500], 'damaged'), (b'', 'not a token shard'),
                       (b'\1' + whole[1:], 'not a token shard')):
        path.write_bytes(data)
        with fails(what + '.*python tokenizer.py'):
            read_shard(path)

def test_log_drops_what_came_after_the_step(tmp_path):
    path = tmp_path / 'base.jsonl'
    log = open_log(path, 0)
    for step in range(4):
        log(step=step, loss=1.0)
    open_log(path, 2)(step=2, loss=9.0)
    want = [dict(step=0, loss=1.0), dict(step=1, loss=1.0), dict(step=2, loss=9.0)]
    assert [row for _, row in read_jsonl(path)] == want
    open_log(path, 0)
    assert path.read_text() == ''

@pytest.mark.parametrize('torn', [b'{"step": 2, "lo', b'{"step": 2, "loss": 1.0', b'\0\0\0\0',
                                  b'{"step": 2, "loss": 1.0}'])
def test_a_torn_last_line_of_a_log_is_dropped(torn, tmp_path):
    """Of a run that was killed while it wrote, or of a full disk. The next run and the report go on."""
    path, steps = tmp_path / 'base.jsonl', [dict(step=0, loss=3.0), dict(step=1, loss=2.0)]
    write_rows(path, steps)
    path.write_bytes(path.read_bytes() + torn)
    found = [0, 1, 2] if torn.endswith(b'}') else [0, 1]
    read_curve = definitions('eval.py', out_dir=str(tmp_path)).read_curve
    assert read_curve('base', 'loss') == (found, [3.0, 2.0, 1.0][:len(found)])
    open_log(path, 2)(step=2, loss=1.5)
    assert [row for _, row in read_jsonl(path)] == [*steps, dict(step=2, loss=1.5)]
    for middle in (torn + b'x\n', torn + b'x\n{"step": 3}\n'): # a whole line that is damaged, or one in the middle
        path.write_bytes(json.dumps(steps[0]).encode() + b'\n' + middle)
        with fails(r'base\.jsonl:2: '):
            open_log(path, 9)
    with fails(r'base\.jsonl:2: '):
        path.write_bytes(json.dumps(steps[0]).encode() + b'\n{"te')
        list(read_jsonl(path)) # but data of others must be whole

def test_of_two_runs_in_one_folder_the_last_goes_on(tmp_path, tok):
    path = tmp_path / 'base.jsonl'
    first = open_log(path, 0)
    for step in range(3):
        first(step=step)
    second = open_log(path, 2) # it continues from a save at step 2
    second(step=2)
    with fails(r'another run has started to write .*base\.jsonl: this one ends'):
        first(step=3)
    third = open_log(path, 3) # the second one was killed with -9: nothing is in its way
    third(step=3)
    assert [row for _, row in read_jsonl(path)] == [dict(step=i) for i in range(4)]
    open_log(tmp_path / 'sft.jsonl', 0)(step=0) # another stage
    third(step=4)
    net = wild()
    save_checkpoint(str(tmp_path / 'base.pt'), 'base', net.state_dict(), asdict(net.config), tok, {}, 1, {})
    assert [name for name in os.listdir(tmp_path) if name.startswith('base.resume')] == []
    with fails('another run'):
        second(step=3) # also when the other one has finished

# -----------------------------------------------------------------------------
# plumbing: checkpoints

def test_checkpoint_round_trip(tmp_path, tok):
    net, path = wild().bfloat16(), str(tmp_path / 'new' / 'base.pt')
    save_checkpoint(path, 'base', net.state_dict(), asdict(net.config), tok, dict(seed=3), 7, dict(val_loss=1.5))
    raw = torch.load(path, weights_only=True) # plain values only, no code
    assert all(v.dtype == torch.float32 for v in raw['weights'].values())
    ckpt = load_checkpoint(path, ['base', 'sft'], 'python pretrain.py')
    assert (ckpt['stage'], ckpt['step']) == ('base', 7)
    assert (ckpt['config'], ckpt['metrics']) == (dict(seed=3), dict(val_loss=1.5))
    loaded = load_model(ckpt, 'cpu')
    assert loaded.config == net.config and Tokenizer(ckpt['tokenizer']).hash == tok.hash
    assert all(torch.equal(v, net.state_dict()[k].float()) for k, v in loaded.state_dict().items())
    assert loaded.head.weight is loaded.wte.weight # still one matrix
    assert os.listdir(tmp_path / 'new') == ['base.pt']

def test_a_checkpoint_ends_a_run(tmp_path, tok):
    net, resume_path = wild(), tmp_path / 'base.resume.pt'
    resume_path.write_text('x')
    (tmp_path / 'base.resume.pt.1234.partial').write_text('x') # of a run that was killed while it saved
    (tmp_path / 'sft.resume.pt').write_text('x')
    save_checkpoint(str(tmp_path / 'base.pt'), 'base', net.state_dict(), asdict(net.config), tok, {}, 1, {})
    assert sorted(os.listdir(tmp_path)) == ['base.pt', 'sft.resume.pt']

def test_bad_checkpoints(tmp_path, tok):
    path, load = tmp_path / 'sft.pt', lambda p: load_checkpoint(str(p), ['sft'], 'python sft.py')
    with fails('no checkpoint .*python sft.py'):
        load(path)
    net = wild()
    save_checkpoint(str(path), 'base', net.state_dict(), asdict(net.config), tok, {}, 1, {})
    with fails('base.*sft.*python sft.py'):
        load(path)
    whole = path.read_bytes()
    ckpt = torch.load(path, weights_only=True)
    torch.save(dict(weights={}), tmp_path / 'foreign.pt')
    torch.save([1, 2], tmp_path / 'list.pt')
    torch.save({**ckpt, 'model_args': dict(depth=3)}, tmp_path / 'args.pt')
    torch.save({**ckpt, 'tokenizer': {}}, tmp_path / 'tokenizer.pt')
    for name, data in (('cut', whole[:len(whole) // 2]), ('cut2', whole[:-10]), ('empty', b''), ('text', b'hello')):
        (tmp_path / f'{name}.pt').write_bytes(data)
    for name in ('foreign', 'list', 'args', 'tokenizer', 'cut', 'cut2', 'empty', 'text'):
        with fails('damaged or of another version.*python sft.py'):
            load(tmp_path / f'{name}.pt')

HUGE = 10**9
MISSHAPEN = [
    ('a weight is missing', lambda ckpt: ckpt['weights'].pop('blocks.1.norm1.weight'), 'Missing key.*blocks.1.norm1'),
    ('a weight too many', lambda ckpt: ckpt['weights'].update(x=torch.zeros(2)), 'Unexpected key.*"x"'),
    ('another shape', lambda ckpt: ckpt['weights'].update({'norm.weight': torch.zeros(33)}), 'size mismatch.*norm'),
    ('no tensor', lambda ckpt: ckpt['weights'].update({'norm.weight': 3}), ''),
    ('no weights', lambda ckpt: ckpt.update(weights=[]), ''),
    ('no metrics', lambda ckpt: ckpt.pop('metrics'), ''),
    ('a smaller vocabulary', lambda ckpt: ckpt['model_args'].update(vocab_size=200), '283 tokens, vocab_size 200'),
    *((f'{name} = 1e9', lambda ckpt, name=name: ckpt['model_args'].update({name: HUGE}), '')
      for name in ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_hidden', 'vocab_size', 'block_size')),
    *((f'{name} = x', lambda ckpt, name=name: ckpt['model_args'].update({name: 'x'}), '')
      for name in ('n_layer', 'n_head', 'n_embd', 'vocab_size', 'block_size')),
    ('n_layer = -1', lambda ckpt: ckpt['model_args'].update(n_layer=-1), ''),
    *((f'{name} = {value}', lambda ckpt, name=name, value=value: ckpt['model_args'].update({name: value}), '')
      for name in ('dropout', 'norm_eps', 'rope_theta') for value in ('x', -1.0, math.nan)),
    ('block_size = 0', lambda ckpt: ckpt['model_args'].update(block_size=0), 'block_size 0 is not 1 to'),
    ('a setting is a tensor', lambda ckpt: ckpt['model_args'].update(qk_norm=torch.zeros(2)), ''),
    ('a size is 1e9 numbers', lambda ckpt: ckpt['model_args'].update(vocab_size=torch.zeros(1).expand(HUGE)), ''),
    ('a figure is a tensor', lambda ckpt: ckpt['metrics'].update(val_loss=torch.zeros(2)), ''),
    ('n_vocab = 1e9', lambda ckpt: ckpt['tokenizer'].update(n_vocab=HUGE), 'n_vocab 1000000000 does not suit 277'),
    ('one number, repeated', lambda ckpt: (ckpt['weights'].update({'wte.weight': torch.zeros(1).expand(HUGE, 32)}),
                                           ckpt['model_args'].update(vocab_size=HUGE)), 'claims to hold 32,0')]

@pytest.mark.parametrize('arch', ['gpt2', 'llama'])
@pytest.mark.parametrize('name,change,what', MISSHAPEN, ids=[row[0] for row in MISSHAPEN])
def test_a_misshapen_checkpoint_is_one_line(name, change, what, arch, tmp_path, tok):
    """Sizes are compared before they take memory: of 1e9 layers or words none is made."""
    net, path = wild(arch=arch), str(tmp_path / 'base.pt')
    save_checkpoint(path, 'base', net.state_dict(), asdict(net.config), tok, {}, 1, {})
    ckpt = load_checkpoint(path, ['base'], 'python pretrain.py')
    ckpt['tokenizer'] = dict(ckpt['tokenizer'])
    change(ckpt)
    torch.save(ckpt, path)
    started = time.process_time()
    with fails(f'base.pt is damaged.*{what}.*python pretrain.py'):
        load_checkpoint(path, ['base'], 'python pretrain.py')
    assert time.process_time() - started < 10

@pytest.mark.parametrize('error', [PermissionError(13, 'Permission denied', 'base.pt'), MemoryError(),
                                   torch.OutOfMemoryError('CUDA out of memory')], ids=repr)
def test_what_cannot_be_read_now_is_not_called_damaged(error, tmp_path, tok, monkeypatch):
    net, path = wild(), str(tmp_path / 'base.pt')
    save_checkpoint(path, 'base', net.state_dict(), asdict(net.config), tok, {}, 1, {})
    def load(*args, **more):
        raise error
    monkeypatch.setattr(model.torch, 'load', load)
    with pytest.raises(type(error)):
        load_checkpoint(path, ['base'], 'python pretrain.py')

def test_flipped_bits_are_found(tmp_path, tok):
    """A file with one wrong bit is refused, or what it says is the same all the same (a bit that nobody reads)."""
    path, resume_path = str(tmp_path / 'base.pt'), str(tmp_path / 'sft.resume.pt')
    net = wild(n_layer=1)
    save_checkpoint(path, 'base', net.state_dict(), asdict(net.config), tok, {}, 1, {})
    save_resume(resume_path, 3, get_state(net, []), {})
    want = load_checkpoint(path, ['base'], 'x')['weights']
    rng, refused = np.random.default_rng(5), 0
    for kind, load in (('base.pt', lambda: load_checkpoint(path, ['base'], 'x')['weights']),
                       ('sft.resume.pt', lambda: load_resume(resume_path, {})['state']['weights'])):
        whole = (tmp_path / kind).read_bytes()
        for bit in rng.integers(8 * len(whole), size=60):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            (tmp_path / kind).write_bytes(flipped)
            try:
                got = load()
            except AssertionError as e:
                assert 'damaged' in str(e) and '\n' not in str(e)
                refused += 1
            else:
                assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    assert refused > 100 # of 120: most of the bits belong to weights

class Hostile:
    """An object whose pickle makes a file when it is read, as that of an attacker would run a program."""
    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return Path.touch, (self.made,)

def test_a_hostile_checkpoint_is_not_executed(tmp_path, tok):
    net, made = wild(n_layer=1), tmp_path / 'made'
    path, resume_path = tmp_path / 'base.pt', tmp_path / 'sft.resume.pt'
    save_checkpoint(str(path), 'base', net.state_dict(), asdict(net.config), tok, {}, 1, {})
    whole = torch.load(path, weights_only=True)
    assert pickle.loads(pickle.dumps(Hostile(made))) is None and made.exists() # it does run
    made.unlink()
    for name in whole:
        hostile = dict(whole, **{name: Hostile(made)})
        writers = [lambda file: torch.save(hostile, file), lambda file: file.write_bytes(pickle.dumps(hostile)),
                   lambda file: torch.save(hostile, file, _use_new_zipfile_serialization=False)]
        for write in writers:
            write(path)
            write(resume_path)
            with fails('base.pt is damaged'):
                load_checkpoint(str(path), ['base'], 'python pretrain.py')
            with fails('sft.resume.pt is damaged'):
                load_resume(str(resume_path), {})
            assert not made.exists()

def test_a_hostile_data_file_is_not_executed(tmp_path):
    """A pickle under the name of every file that a stage reads: it is refused, or is nothing but text."""
    made = tmp_path / 'made'
    array = np.array([Hostile(made)], dtype=object)
    prepare, convert = definitions('prepare_data.py'), definitions('convert.py')
    def read(path):
        items = list(prepare.read_file(path, 'files', collections.Counter()))
        assert all('row' not in item for item in items) # no row of a chat, a ranking, ...
        return items
    readers = {'chat.jsonl': lambda path: list(read_jsonl(path)), 'text.jsonl.gz': lambda path: list(read_jsonl(path)),
               'tokenizer.json': Tokenizer.load, 'train_000000.bin': read_shard, 'funnel.json': prepare.load_json,
               'model.safetensors': convert.read_safetensors, 'signatures.npy': np.load}
    names = 'warc warc.gz arc wet html txt md json json.gz jsonl jsonl.gz'.split()
    readers.update({f'raw.{name}': read for name in names})
    for name, reader in readers.items():
        path = tmp_path / name
        if name.endswith('.npy'):
            np.save(path, array, allow_pickle=True)
        else:
            path.write_bytes(pickle.dumps(Hostile(made)))
        if reader == read:
            read(str(path))
        else:
            with pytest.raises((AssertionError, ValueError)): # ValueError: np.load, of a file that we wrote ourselves
                reader(str(path))
        assert not made.exists(), name

# what runs text as a program or reads a pickle -> where it is what the script is for: eval.py runs HumanEval's programs
RUNS_CODE = {'eval': ['configurator.py'], 'exec': ['configurator.py', 'eval.py'], 'torch.load': ['model.py'], 'compile': [],
             '__import__': [], 'os.system': [], 'os.popen': [], 'pickle.load': [], 'pickle.loads': [], 'runpy.run_path': []}

def test_nothing_that_is_read_is_run():
    """A profile, the defaults above configure() and, with --allow_code, HumanEval are Python; no other input is."""
    for path in sorted(ROOT.glob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert path.name in RUNS_CODE.get(name, [path.name]), f'{path.name}:{node.lineno}: {name}'
            values = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert name != 'torch.load' or values['weights_only'] == 'True'
            assert 'True' not in (values.get('allow_pickle'), values.get('shell')), f'{path.name}:{node.lineno}'

def test_a_misshapen_resume_file_is_one_line(tmp_path):
    def fresh():
        net = GPT(config())
        return net, make_optimizers(net, 1e-2, 0.1, (0.9, 0.95))
    net, optimizers = fresh()
    train_steps(net, optimizers, range(2))
    name = 'blocks.0.norm1.weight'
    changes = [lambda state: state['weights'].pop(name), lambda state: state['weights'].update({name: torch.zeros(7)}),
               lambda state: state['optimizers']['state'][name].update(exp_avg=torch.zeros(7)),
               lambda state: state['optimizers']['state'][name].update(exp_avg=torch.zeros(1).expand(HUGE)),
               lambda state: state['optimizers']['state'].update(x=dict(exp_avg=torch.zeros(7))),
               lambda state: state['optimizers']['state'].pop(name), lambda state: state['optimizers'].pop('state'),
               lambda state: state.pop('weights'), lambda state: state.update(optimizers=3)]
    for change in changes:
        state = get_state(net, optimizers)
        change(state)
        with fails('the resume file is damaged.*--resume=false'):
            set_state(*fresh(), state)
    set_state(*fresh(), get_state(net, optimizers))

def train_steps(net, optimizers, steps):
    for step in steps:
        x = ids(4, T, seed=step)
        F.cross_entropy(net(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
        for opt in optimizers:
            opt.step()
            opt.zero_grad()

@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_a_resumed_run_is_the_same_run(kind, tmp_path):
    """Five steps = three steps, a file, a fresh process' model, two steps; bit for bit."""
    path, settings = str(tmp_path / 'base.resume.pt'), dict(seed=1, out_dir='a')
    def fresh(seed):
        torch.manual_seed(seed)
        net = GPT(config(arch='llama'))
        return net, make_optimizers(net, 1e-2, 0.1, (0.9, 0.95), kind=kind)
    net, optimizers = fresh(0)
    train_steps(net, optimizers, range(3))
    save_resume(path, 3, get_state(net, optimizers), settings, ema_loss=0.5)
    train_steps(net, optimizers, range(3, 5))
    saved = load_resume(path, dict(settings, out_dir='b'))
    assert saved['step'] == 3 and saved['progress'] == dict(ema_loss=0.5)
    other, other_optimizers = fresh(1)
    set_state(other, other_optimizers, saved['state'])
    train_steps(other, other_optimizers, range(3, 5))
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in other.state_dict().items())
    assert other.head.weight is other.wte.weight

def test_which_runs_are_resumed(tmp_path, capsys):
    path, settings = str(tmp_path / 'base.resume.pt'), dict(seed=1, learning_rate=0.1, epochs=2)
    assert load_resume(path, settings) is None
    save_resume(path, 3, {}, settings)
    assert load_resume(path, settings, resume=False) is None
    assert load_resume(path, settings)['step'] == 3 and 'at step 3' in capsys.readouterr().out
    for changed in (dict(seed=2), dict(learning_rate=0.2), dict(new=1)):
        with fails(f'{list(changed)[0]}.*--resume=false'):
            load_resume(path, {**settings, **changed})
    assert load_resume(path, dict(settings, epochs=3), may_change=('epochs',))['step'] == 3
    (tmp_path / 'base.resume.pt').write_bytes(b'x')
    with fails('damaged.*--resume=false'):
        load_resume(path, settings)
    torch.save(dict(step=3, config=settings), path) # the rest is missing
    with fails('damaged.*--resume=false'):
        load_resume(path, settings)
    for damaged in (torch.zeros(3), dict(settings, seed=torch.zeros(3)), 5): # what cannot be compared with settings
        save_resume(path, 3, {}, damaged)
        with fails('damaged.*--resume=false'):
            load_resume(path, settings)

def test_a_finished_checkpoint_is_not_replaced_by_another_run(tmp_path, tok, capsys):
    net, path, resume_path = wild(), str(tmp_path / 'base.pt'), str(tmp_path / 'base.resume.pt')
    settings = dict(max_iters=200, starts_from=1.5, out_dir='a')
    save_checkpoint(path, 'base', net.state_dict(), asdict(net.config), tok, settings, 200, {})
    for max_iters in (100, 400):
        with fails(rf'base\.pt is finished, a run with max_iters = 200, not {max_iters}: --resume=false .*replaces it'):
            load_resume(resume_path, dict(settings, max_iters=max_iters))
        assert load_resume(resume_path, dict(settings, max_iters=max_iters), resume=False) is None # it was told to
    assert not capsys.readouterr().out
    for same in (settings, dict(settings, out_dir='b')): # the same run gives the same checkpoint: it says what it does
        assert load_resume(resume_path, same) is None
        assert 'starts again at step 0 and replaces it' in capsys.readouterr().out
    save_resume(resume_path, 150, {}, settings)
    with fails(r'base\.resume\.pt is at step 150 of a run with max_iters = 200, not 400: finish that one, or .*'):
        load_resume(resume_path, dict(settings, max_iters=400))

# -----------------------------------------------------------------------------
# plumbing: processes

def test_importing_model_has_no_effects():
    before = sys.excepthook, signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), gc.isenabled()
    generator = torch.get_rng_state()
    spec = importlib.util.spec_from_file_location('another_model', ROOT / 'model.py')
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    after = sys.excepthook, signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), gc.isenabled()
    assert after == before and torch.equal(torch.get_rng_state(), generator)

def test_only_rank_0_prints(monkeypatch, capsys):
    print0('a')
    monkeypatch.setattr(model, 'RANK', 1)
    print0('b')
    assert capsys.readouterr().out == 'a\n'

def test_setup(capsys):
    config = dict(device='cpu', dtype='auto', seed=5)
    run = setup(config)
    assert (run.device, run.device_type, run.dtype) == (torch.device('cpu'), 'cpu', torch.float32)
    assert (run.rank, run.world_size, run.master, run.stop) == (0, 1, True, False) and config['world_size'] == 1
    assert torch.initial_seed() == 5 and 'device: cpu, float32' in capsys.readouterr().out
    with run.autocast():
        assert not torch.is_autocast_enabled('cpu')
    with setup(dict(device='cpu', dtype='bfloat16', seed=5)).autocast():
        assert torch.get_autocast_dtype('cpu') == torch.bfloat16 and torch.is_autocast_enabled('cpu')
    assert setup(dict(device='cpu', dtype='float16', seed=5), allow_fp16=True).dtype == torch.float16

def test_setup_refuses_what_is_not_here():
    if not torch.cuda.is_available():
        with fails('device.*cuda'):
            setup(dict(device='cuda', dtype='auto', seed=1))
    for bad, what in ((dict(device='toaster'), 'toaster'), (dict(dtype='float16'), 'float16'), (dict(seed=-1), 'seed'),
                      (dict(seed=2**32), 'seed')):
        with fails(what):
            setup({**dict(device='cpu', dtype='auto', seed=1), **bad})

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_a_run_to_stop(number):
    old = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)]
    run = SimpleNamespace(stop=False)
    try:
        catch_signals(run)
        assert not should_stop(run)
        os.kill(os.getpid(), number)
        assert run.stop and should_stop(run)
        assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler) # a second one ends at once
    finally:
        for n, handler in old:
            signal.signal(n, handler)

def test_all_sum_without_a_group():
    assert all_sum(1, 2.5, True, torch.tensor(3)) == [1.0, 2.5, 1.0, 3.0]

def test_all_gather_list_restores_the_order(monkeypatch):
    def all_gather_object(parts, mine):
        parts[:] = [['a', 'd', 'g'], ['b', 'e'], ['c', 'f']] # each rank had every third of a .. g
    monkeypatch.setattr(model.dist, 'all_gather_object', all_gather_object)
    assert ''.join(all_gather_list(['a', 'd', 'g'], SimpleNamespace(world_size=3))) == 'abcdefg'
    assert all_gather_list(['a', 'b'], SimpleNamespace(world_size=1)) == ['a', 'b']

def test_seed_step_depends_on_all_three():
    draws = []
    for seed, step, rank in ((1, 0, 0), (1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)):
        seed_step(seed, step, rank)
        draws.append(torch.rand(()).item())
    assert draws[0] == draws[1] and len(set(draws)) == 4
