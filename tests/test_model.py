"""model.py: the network against its own laws, generation, optimizers, files, chat form, the gold reward."""
import base64
import gzip
import json
import math
import os

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import model as lib
from conftest import WORDS, cut, dies, make_spec, user
from model import GPT, GPTConfig, ScalarModel, Tokenizer

V, T = 278, 24
KINDS = [dict(arch='gpt2'), dict(arch='llama'), dict(arch='llama', n_kv_head=2, qk_norm=True, tie_embeddings=False),
         dict(arch='gpt2', n_kv_head=1), dict(arch='llama', qk_norm=True, key_shift=True),
         dict(arch='llama', n_kv_head=2, key_shift=True), dict(arch='gpt2', smear=2),
         dict(arch='llama', smear=3, key_shift=True)]

def config(arch='gpt2', **more):
    return GPTConfig(**{**dict(arch=arch, vocab_size=V, block_size=T, n_layer=2, n_head=4, n_embd=32), **more})

def wild(seed=0, **more):
    """A model whose attention matters: fresh ones start near (llama: at) the identity."""
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

@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_loss_at_init_is_ln_vocab(kind):
    torch.manual_seed(0)
    net, x = GPT(config(**kind)), ids(8, T)
    loss = F.cross_entropy(net(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).item()
    assert abs(loss - math.log(V)) < 0.01 * math.log(V)

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
    cache, parts, at = lib.KVCache(net.config, 3, 12, 'cpu', torch.float32), [], 0
    for n in split:
        parts.append(net(x[:, at:at + n], cache=cache))
        at += n
    torch.testing.assert_close(torch.cat(parts, 1), net(x), rtol=1e-4, atol=1e-4)

def keys_of(attn, monkeypatch, x, pos, cache=None):
    """The keys and values that this call attends to, (B, H_kv, S, D)."""
    seen, real = [], F.scaled_dot_product_attention
    with monkeypatch.context() as m:
        m.setattr(F, 'scaled_dot_product_attention', lambda q, k, v, **o: seen.append((k, v)) or real(q, k, v, **o))
        attn(x, pos, None, None, cache, 0)
    if cache is not None:
        cache.n += x.size(1)
    return seen[0]

@torch.no_grad()
def test_key_shift_by_hand(monkeypatch):
    """Two heads of width 2, keys = inputs: the first head has its own keys, the second those of the token before."""
    c = config(n_embd=4, n_head=2, n_layer=1, key_shift=True)
    attn = lib.Attention(c)
    attn.qkv.weight.copy_(torch.eye(4).repeat(3, 1)) # q = k = v = x
    attn.qkv.bias.zero_()
    x = torch.tensor([[[1., 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]])            # (1, 3, C)
    own, before = [[1, 2], [5, 6], [9, 10]], [[0, 0], [3, 4], [7, 8]] # position 0 has nothing before it
    k, v = keys_of(attn, monkeypatch, x, torch.arange(3))
    assert k.tolist() == [[own, before]]
    assert v.tolist() == [[own, [[3, 4], [7, 8], [11, 12]]]] # values stay where they are
    for split in ((1, 1, 1), (2, 1), (1, 2), (3,)): # with a cache: the last key of the piece before is remembered
        cache, at = lib.KVCache(c, 1, 3, 'cpu', torch.float32), 0
        for n in split:
            k, v = keys_of(attn, monkeypatch, x[:, at:at + n], torch.arange(at, at + n), cache)
            at += n
            assert k.tolist() == [[own[:at], before[:at]]]
    # a batch: row 0 has one pad on the left, so its text begins at the second token and nothing is before that
    two, pos = x.repeat(2, 1, 1), torch.tensor([[0, 0, 1], [0, 1, 2]])
    k, _ = keys_of(attn, monkeypatch, two, pos)
    assert k.tolist() == [[own, [[0, 0], [0, 0], [7, 8]]], [own, before]]
    # row 0 leaves the batch between two steps: row 1 goes on from its own last key
    cache = lib.KVCache(c, 2, 3, 'cpu', torch.float32)
    keys_of(attn, monkeypatch, torch.cat((-x, x))[:, :2], torch.arange(2), cache)
    cache.keep(torch.tensor([1]))
    k, _ = keys_of(attn, monkeypatch, x[:, 2:], torch.arange(2, 3), cache)
    assert k.tolist() == [[own, before]]

def test_longer_than_the_context_is_refused():
    net = wild()
    with pytest.raises(ValueError, match=f'{T + 1} tokens'):
        net(ids(1, T + 1))
    cache = lib.KVCache(net.config, 1, T + 1, 'cpu', torch.float32)
    net(ids(1, T), cache=cache)
    with pytest.raises(ValueError):
        net(ids(1, 1), cache=cache)

def test_parameter_count():
    C, H = 32, 128
    # gpt2: embeddings V C + T C; a block: norms 2 (C + C), qkv C 3C + 3C, proj C C + C, up C H + H, down H C + C; last
    # norm 2 C
    block = 4 * C + 3 * C * C + 3 * C + C * C + C + C * H + H + H * C + C
    assert GPT(config()).n_params() == V * C + T * C + 2 * block + 2 * C
    assert GPT(config()).n_params(embedding=False) == 2 * block + 2 * C
    # llama, 4 heads of 8, 2 of keys and values: no biases, norms C, qkv C (4 + 2 + 2) 8; H = 8/3 32 = 85.3 -> 96, and
    # gate and up
    block = 2 * C + C * 64 + C * C + C * 2 * 96 + 96 * C
    net = GPT(config(arch='llama', n_kv_head=2, tie_embeddings=False))
    assert net.n_params() == 2 * V * C + 2 * block + C
    assert net.n_params(embedding=False) == 2 * block + C
    # 6 for each weight that is multiplied (head included), 12 L C T for attention over T
    assert net.flops_per_token(10) == 6 * (2 * block + C + V * C) + 12 * 2 * C * 10

def test_bad_shapes_are_refused():
    for bad, what in ((dict(arch='bert'), 'bert'), (dict(n_head=3), '32.*3'), (dict(n_kv_head=3), '4.*3'),
                      (dict(arch='llama', n_head=32), 'even')):
        with dies(what):
            config(**bad)

@pytest.mark.parametrize('arch,muon', [('gpt2', False), ('llama', False), ('llama', True)])
def test_overfits_one_batch(arch, muon):
    torch.manual_seed(0)
    net, x = GPT(config(arch=arch)), ids(4, T)
    optimizers = lib.make_optimizers(net, 1e-2, 0.0, (0.9, 0.95), kind='muon' if muon else 'adamw')
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
    together = lib.generate(net, prompts, 10, temperature=0)
    assert together == [lib.generate(net, [p], 10, temperature=0)[0] for p in prompts]
    assert len(set(map(tuple, together))) > 1 and all(len(r) == 10 for r in together)

@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_greedy_is_the_likeliest_token_of_the_full_forward(kind):
    net, x = wild(**kind), ids(6).tolist()
    for _ in range(8): # without a cache, token by token
        x.append(net(torch.tensor([x]))[0, -1].argmax().item())
    assert lib.generate(net, [x[:6]], 8, temperature=0) == [x[6:]]

def truncate(top_k, top_p, min_p):
    """chat.py's function with these settings."""
    return cut('chat.py', 'truncate', torch=torch, top_k=top_k, top_p=top_p, min_p=min_p).truncate

def test_seeds_and_top_k_1():
    net, prompts = wild(), [ids(3, seed=s).tolist() for s in range(4)]
    greedy = lib.generate(net, prompts, 12, temperature=0)
    assert greedy == lib.generate(net, prompts, 12, temperature=0)
    assert greedy == lib.generate(net, prompts, 12, warp=truncate(1, 1.0, 0.0))
    torch.manual_seed(5)
    one = lib.generate(net, prompts, 12, temperature=3.0)
    torch.manual_seed(5)
    two = lib.generate(net, prompts, 12, temperature=3.0)
    torch.manual_seed(6)
    assert one == two != lib.generate(net, prompts, 12, temperature=3.0)

def test_draw():
    """Shares of 40,000 draws, within 4 standard deviations; what has no share is never drawn; NaN is an error."""
    torch.manual_seed(0)
    p = torch.tensor([[0.5, 0.0, 0.3, 0.2, 0.0], [0.0, 0.0, 0.0, 7.0, 0.0]])
    drawn = torch.stack([lib.draw(p.repeat(1000, 1)).view(1000, 2) for _ in range(40)]).view(-1, 2)
    share = torch.bincount(drawn[:, 0], minlength=5) / len(drawn)
    assert share[[1, 4]].tolist() == [0, 0] and (drawn[:, 1] == 3).all()
    assert ((share - p[0]).abs() <= 4 * (p[0] * (1 - p[0]) / len(drawn)).sqrt()).all()
    with pytest.raises(RuntimeError, match='probability tensor'):
        lib.draw(torch.tensor([[0.5, float('nan')]]))

@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_rows_that_stop_leave_without_changing_the_others(kind):
    net = wild(**kind)
    prompts = [ids(n, seed=n).tolist() for n in (5, 2, 7, 3)]
    free, lengths = lib.generate(net, prompts, 12, temperature=0), set()
    for stop in (free[0][3], free[1][0], free[2][11]):
        want = [r[:r.index(stop) + 1] if stop in r else r for r in free] # the stop token itself is returned
        calls = []
        assert lib.generate(net, prompts, 12, stop, temperature=0, on_token=calls.append) == want
        # on_token sees each step's tokens of the rows still there
        assert calls == [[r[i] for r in want if len(r) > i] for i in range(max(map(len, want)))]
        lengths.update(map(len, want))
    assert min(lengths) < 12 == max(lengths) # some left early, some stayed

def test_prompt_longer_than_the_context_is_cropped_with_a_line(capsys):
    net, x = wild(), ids(40).tolist()
    out = lib.generate(net, [x, x[:2]], 10, temperature=0)
    assert f'the last {T - 10} fit' in capsys.readouterr().err # not where an answer may be piped on
    assert out[0] == lib.generate(net, [x[-(T - 10):]], 10, temperature=0)[0]
    assert out[1] == lib.generate(net, [x[:2]], 10, temperature=0)[0] # the short row beside it is untouched
    assert capsys.readouterr().out == ''
    assert len(lib.generate(net, [x], 1000)[0]) == T - 1 # one token of the prompt stays, then to the end of the context

def test_equal_prompts_draw_their_own_first_token():
    net, n = wild(), 2000
    with torch.no_grad():
        net.head.weight.mul_(0.3)
        p = F.softmax(net(torch.tensor([[1, 2]]))[0, -1], -1)
    torch.manual_seed(0)
    first = torch.tensor(lib.generate(net, [[1, 2]] * n, 1)).flatten()
    share = torch.bincount(first, minlength=V) / n
    assert len(first.unique()) > 20
    assert ((share - p).abs() < 6 * (p * (1 - p) / n).sqrt() + 2 / n).all() # six sigma of a binomial

def test_sampling_stays_inside_the_truncation():
    net = wild()
    with torch.no_grad():
        net.head.weight.mul_(0.1)
        best = net(torch.tensor([[1, 2]]))[0, -1].topk(3)[1].tolist()
    torch.manual_seed(0)
    assert {r[0] for r in lib.generate(net, [[1, 2]] * 300, 1, warp=truncate(3, 1.0, 0.0))} == set(best)

def brute_truncate(p, top_k, top_p, min_p):
    """One filter after the other, in plain Python."""
    p = list(p)
    if top_k:
        floor = sorted(p)[-min(top_k, len(p))]
        p = [x if x >= floor else 0.0 for x in p]
    if top_p < 1:
        kept, mass, total = set(), 0.0, sum(p)
        for i in sorted(range(len(p)), key=lambda i: -p[i]):
            if mass < top_p * total:
                kept.add(i)
            mass += p[i]
        p = [x if i in kept else 0.0 for i, x in enumerate(p)]
    return [x if x >= min_p * max(p) else 0.0 for x in p]

@pytest.mark.parametrize('top_k,top_p,min_p', [
    (0, 1.0, 0.0), (1, 1.0, 0.0), (5, 1.0, 0.0), (999, 1.0, 0.0), (0, 0.5, 0.0), (0, 0.01, 0.0), (0, 0.999, 0.0),
    (0, 1.0, 0.3), (0, 1.0, 1.0), (6, 0.7, 0.2)])
def test_truncate_is_brute_force(top_k, top_p, min_p):
    probs = F.softmax(2 * torch.randn(20, 30, generator=torch.Generator().manual_seed(0)), -1).double()
    want = torch.tensor([brute_truncate(row.tolist(), top_k, top_p, min_p) for row in probs])
    got = truncate(top_k, top_p, min_p)(probs.clone())
    torch.testing.assert_close(got, want.double())
    assert (got > 0).any(-1).all() # something is always left
    if (top_k, top_p, min_p) == (0, 1.0, 0.0):
        assert torch.equal(got, probs)

# -----------------------------------------------------------------------------
# the scalar head

@pytest.mark.parametrize('arch', ['gpt2', 'llama'])
def test_scalar_model_from_a_gpt(arch):
    net, x = wild(arch=arch), ids(2, 10)
    ckpt = dict(model_args=vars(net.config), weights=net.state_dict())
    torch.manual_seed(0)
    scalar = lib.load_model(ckpt, 'cpu', ScalarModel).eval()
    assert torch.equal(scalar.body.hidden(x), net.hidden(x))
    assert scalar.body.head is None and scalar.head.weight.std() < 0.4 and scalar.head.bias == 0
    raw = scalar(x)
    assert raw.shape == x.shape
    padded = torch.cat([x, torch.full((2, 6), 5)], 1) # pads on the right change nothing
    torch.testing.assert_close(scalar(padded)[:, :10], raw, rtol=1e-5, atol=1e-5)
    scalar.mean.fill_(2.0)
    scalar.std.fill_(4.0)
    torch.testing.assert_close(scalar(x), (raw - 2) / 4)
    again = lib.load_model(dict(model_args=vars(net.config), weights=scalar.state_dict()), 'cpu', ScalarModel)
    assert torch.equal(again(x), scalar(x)) # from a reward checkpoint: the head is kept

def test_pad_right():
    assert lib.pad_right([[1], [2, 3, 4]], 9).tolist() == [[1, 9, 9], [2, 3, 4]]

# -----------------------------------------------------------------------------
# optimizers

@pytest.mark.parametrize('kind', KINDS, ids=str)
@pytest.mark.parametrize('muon', [False, True])
def test_every_parameter_is_in_one_group(kind, muon):
    net = GPT(config(**kind))
    optimizers = lib.make_optimizers(net, 1e-3, 0.1, (0.9, 0.95), kind='muon' if muon else 'adamw')
    groups = [g for opt in optimizers for g in opt.param_groups]
    assert sorted(id(p) for g in groups for p in g['params']) == sorted(map(id, net.parameters()))
    for g in groups:
        assert g['params'] and all((p.dim() >= 2) == (g['weight_decay'] > 0) for p in g['params'])
    decayed = sum(p.numel() for g in groups if g['weight_decay'] for p in g['params'])
    assert decayed == sum(p.numel() for p in net.parameters() if p.dim() >= 2)
    inside = [p for opt in lib.make_optimizers(net, 1e-3, 0.1, (0.9, 0.95), kind='muon')[1:]
              for p in opt.param_groups[0]['params']]
    assert len(inside) == 2 * 4 # qkv, proj, up, proj of two blocks: no embedding, no head

def test_orthogonalize():
    g = torch.Generator().manual_seed(0)
    for n, m in ((32, 32), (16, 48), (48, 16)):
        x = torch.randn(3, n, m, generator=g)
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        got = lib.orthogonalize(x)
        inside = u.mT @ got @ v.mT # diagonal: the singular values, moved towards 1; directions stay
        values = inside.diagonal(dim1=1, dim2=2)
        large = s > 0.05 * s.norm(dim=-1, keepdim=True)
        assert large.float().mean() > 0.8 and (values[large] > 0.6).all() and (values < 1.3).all()
        torch.testing.assert_close(inside, torch.diag_embed(values), rtol=0, atol=1e-4)

def test_muon_is_torch_muon():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(s)) for s in ((24, 16), (16, 24), (24, 16), (8, 8))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    one = lib.Muon(ours, lr=0.02, weight_decay=0.1)
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
# checkpoints and other files

def test_checkpoint_round_trip(tmp_path, tok):
    net, path = wild().bfloat16(), str(tmp_path / 'new' / 'base.pt')
    lib.save_checkpoint(path, 'base', net, tok, dict(seed=3), 7, dict(val_loss=1.5))
    raw = torch.load(path, weights_only=True) # plain values only: nobody's code runs
    assert all(v.dtype == torch.float32 for v in raw['weights'].values())
    ckpt = lib.load_checkpoint(path, ['base', 'sft'], 'python pretrain.py')
    assert (ckpt['stage'], ckpt['step']) == ('base', 7)
    assert (ckpt['config'], ckpt['metrics']) == (dict(seed=3), dict(val_loss=1.5))
    again = lib.load_model(ckpt, 'cpu')
    assert again.config == net.config and Tokenizer(ckpt['tokenizer']).hash == tok.hash
    assert all(torch.equal(v, net.state_dict()[k].float()) for k, v in again.state_dict().items())
    assert again.head.weight is again.wte.weight # still one matrix
    assert os.listdir(tmp_path / 'new') == ['base.pt']

def test_bad_checkpoints(tmp_path, tok):
    path, load = tmp_path / 'sft.pt', lambda p: lib.load_checkpoint(str(p), ['sft'], 'python sft.py')
    with dies('no checkpoint .*python sft.py'):
        load(path)
    lib.save_checkpoint(str(path), 'base', wild(), tok, {}, 1, {})
    with dies("'base'.*'sft'.*python sft.py"):
        load(path)
    whole = path.read_bytes()
    torch.save(dict(weights={}), tmp_path / 'foreign.pt')
    torch.save([1, 2], tmp_path / 'list.pt')
    for name, data in (('cut', whole[:len(whole) // 2]), ('cut2', whole[:-10]), ('empty', b''), ('text', b'hello'),
                       ('foreign', None), ('list', None)):
        if data is not None:
            (tmp_path / f'{name}.pt').write_bytes(data)
        with dies('no whole checkpoint.*python sft.py'):
            load(tmp_path / f'{name}.pt')

def test_atomic(tmp_path):
    path = tmp_path / 'a' / 'x.txt'
    with lib.atomic(path) as tmp:
        open(tmp, 'w').write('old')
        assert os.path.dirname(tmp) == str(path.parent)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), lib.atomic(path) as tmp:
            open(tmp, 'w').write('half')
            raise error
        assert path.read_text() == 'old' and os.listdir(path.parent) == ['x.txt']
    (tmp_path / 'file').write_text('')
    with dies('cannot write'), lib.atomic(tmp_path / 'file' / 'x') as tmp: # a folder that is a file
        open(tmp, 'w')

def test_jsonl_round_trip(tmp_path):
    rows = [dict(text='naïve 🙂\u2028\n'), dict(n=1)]
    for name in ('a.jsonl', 'a.jsonl.gz'):
        path = tmp_path / name
        lib.write_jsonl(path, rows)
        assert list(lib.read_jsonl(path)) == [(1, rows[0]), (2, rows[1])]
        first = path.read_bytes()
        lib.write_jsonl(path, rows)
        assert path.read_bytes() == first # same rows, same bytes
    (tmp_path / 'bom.jsonl').write_bytes(b'\xef\xbb\xbf\r\n{"a": 1}\r\n\n{"a": 2}')
    assert list(lib.read_jsonl(tmp_path / 'bom.jsonl')) == [(2, dict(a=1)), (4, dict(a=2))] # true line numbers

def test_bad_jsonl(tmp_path):
    def read(data, name='x.jsonl'):
        (tmp_path / name).write_bytes(data)
        return list(lib.read_jsonl(tmp_path / name))
    with dies('no file .*nothing.jsonl'):
        list(lib.read_jsonl(tmp_path / 'nothing.jsonl'))
    with dies(r'x\.jsonl:2: '):
        read(b'{"a": 1}\n{"a": \n')
    with dies(r'x\.jsonl:1: .*list'):
        read(b'[1]\n')
    with dies(r'x\.jsonl: .*UTF-8'):
        read(b'{"a": "\xff"}\n')
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    for data in (whole[:-12], b'no gzip', whole[:20] + b'\0\0\0\0' + whole[24:]):
        with dies(r'x\.jsonl\.gz'):
            read(data, 'x.jsonl.gz')

def write_shard(path, tokens, tok_hash):
    lib.write_shard(str(path), tokens, tok_hash)

def test_shard_round_trip(tmp_path):
    for dtype, top in ((np.uint16, 2**16 - 1), (np.uint32, 2**17)):
        tokens = np.array([0, 5, top], dtype)
        write_shard(tmp_path / 'a.bin', tokens, 77)
        for known in (77, 0):
            got = lib.read_shard(tmp_path / 'a.bin', known)
            assert got.dtype == dtype and got.tolist() == tokens.tolist()
    write_shard(tmp_path / 'a.bin', np.zeros(0, np.uint16), 77)
    assert len(lib.read_shard(tmp_path / 'a.bin')) == 0
    published = np.array([20240520, 1, 2] + [0] * 253, '<i4').tobytes() + np.array([1, 2], '<u2').tobytes()
    (tmp_path / 'b.bin').write_bytes(published) # llm.c's: a hash of 0 is unknown, not wrong
    assert lib.read_shard(tmp_path / 'b.bin', 77).tolist() == [1, 2]

def test_bad_shards(tmp_path):
    path = tmp_path / 'a.bin'
    with dies('cannot read .*a.bin'):
        lib.read_shard(path)
    write_shard(path, np.arange(100, dtype=np.uint16), 77)
    whole = path.read_bytes()
    with dies('another tokenizer'):
        lib.read_shard(path, 78)
    for data, what in ((whole[:-2], '100.*99'), (whole[:-1], '100.*99.5'), (whole + b'\0\0', '100.*101'),
                       (whole[:1024], '100.* 0'),
                       (whole[:500], 'no token shard'), (b'', 'no token shard'), (b'\1' + whole[1:], 'no token shard'),
                       (whole[:4] + b'\7' + whole[5:], 'no token shard')):
        path.write_bytes(data)
        with dies(what):
            lib.read_shard(path)

def test_log_drops_what_came_after_the_step(tmp_path):
    path = tmp_path / 'base.jsonl'
    log = lib.open_log(path, 0)
    for step in range(4):
        log(step=step, loss=1.0)
    lib.open_log(path, 2)(step=2, loss=9.0)
    want = [dict(step=0, loss=1.0), dict(step=1, loss=1.0), dict(step=2, loss=9.0)]
    assert [r for _, r in lib.read_jsonl(path)] == want
    lib.open_log(path, 0)
    assert path.read_text() == ''

def test_all_sum_without_a_group():
    assert lib.all_sum(1, 2.5, True, torch.tensor(3)) == [1.0, 2.5, 1.0, 3.0]

def test_seed_step_depends_on_all_three():
    draws = []
    for seed, step, rank in ((1, 0, 0), (1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)):
        lib.seed_step(seed, step, rank)
        draws.append(torch.rand(()).item())
    assert draws[0] == draws[1] and len(set(draws)) == 4

# -----------------------------------------------------------------------------
# the tokenizer and the chat form

def test_tokenizer(tok):
    specials = [tok.eot, tok.system, tok.user, tok.assistant, tok.end, tok.pad]
    assert tok.n_vocab == len(tok.tokens) + 6 and specials == list(range(tok.n_vocab - 6, tok.n_vocab))
    for text in ('', 'Say owl.', 'naïve 🙂\r\n\t 日本', '\x00', 'Say the cat has the dog' * 20):
        said = tok.encode(text)
        assert tok.decode(said) == text and b''.join(map(tok.bytes_of, said)) == text.encode()
    assert [tok.bytes_of(i) for i in tok.encode('the owl')] == [b'the', b' owl']
    assert all(tok.bytes_of(i) == b'' for i in range(tok.n_vocab - 6, tok.n_vocab))
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
            (tok.user, 0), (tok.end, 0), (tok.assistant, 0), (tok.end, 1)] # nothing said is no token, no space either
    assert list(zip(got, mask)) == want
    assert tok.render(talk[:2], prompt=True) == ([a for a, _ in want[:9]], [0] * 9) # what the answer is put behind

@pytest.mark.parametrize('said', ['owl', 'The cat has the dog.', '7 + 5 = 12', 'naïve 🙂 日本', 'two\nlines\n\n- and', ''])
def test_what_is_learned_decodes_to_the_answers(tok, said):
    """The tokens with mask 1, cut at each <|end|>, are the texts of the assistant behind one space, and no others."""
    talk = [dict(role='system', content='Say'), *user('fox'), dict(role='assistant', content=said), *user('dog'),
            dict(role='assistant', content='cat')]
    answers = [[]]
    for i, learn in zip(*tok.render(talk)):
        if learn and i == tok.end:
            answers.append([])
        elif learn:
            answers[-1].append(i)
    assert [tok.decode(a) for a in answers] == [' ' + said if said else '', ' cat', '']
    assert [tok.said(a) for a in answers[:2]] == [said.strip(), 'cat'] # what the stages make of an answer

def test_users_cannot_inject_specials(tok):
    evil = ' '.join(tok.spec['special_tokens'])
    specials = set(range(tok.n_vocab - 6, tok.n_vocab))
    assert not specials & set(tok.encode(evil))
    got, _ = tok.render(user(evil) + [dict(role='assistant', content=evil)])
    assert [i for i in got if i in specials] == [tok.eot, tok.user, tok.end, tok.assistant, tok.end]
    assert tok.decode(tok.encode(evil)) == evil

def test_special_tokens_in_an_answer_are_no_text(tok):
    """A model may say one; what is graded, ranked and scored must be what a reader sees."""
    cat = tok.encode(' cat')
    assert tok.said(cat + [tok.assistant] + cat + [tok.end]) == 'cat cat'
    assert tok.said([]) == tok.said([tok.end]) == '' and tok.said([0xe2, 0x82]) == '\ufffd'

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

def test_bad_tokenizer_files(tmp_path):
    path, spec = tmp_path / 'tokenizer.json', make_spec()
    with dies('no tokenizer .*python tokenizer.py'):
        Tokenizer.load(path)
    for bad in ('{', '[]', json.dumps({**spec, 'ranks': spec['ranks'][1:]}), json.dumps({**spec, 'ranks': 3}),
                json.dumps({k: v for k, v in spec.items() if k != 'pattern'}),
                json.dumps({**spec, 'special_tokens': spec['special_tokens'][:3]}),
                json.dumps({**spec, 'pattern': '('})):
        path.write_text(bad)
        with dies('tokenizer.json: .*python tokenizer.py'):
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
    (dict(max_words=2), '', False, 0.0),                                  # an empty answer is no short one
    (dict(count=dict(of=['soup', 'bread', 'honey'], min=2)), 'Bread, honey.', True, 1.0),
    (dict(count=dict(of=['soup', 'bread', 'honey'], min=2)), 'Bread, bread.', False, 0.0), # two different ones
    (dict(starts_with='Dear Anna'), 'dear anna, hello', True, 1.0),
    (dict(starts_with='Dear Anna'), 'Hello dear Anna', False, 0.0),
    (dict(ends_with='Bye.'), 'So long, bye.', True, 1.0),
    (dict(ends_with='Bye.'), 'Bye, Anna', False, 0.0),
    # two of three met = 2/3, + 0.25 for taste
    (dict(contains=['owl'], max_words=9, number=3, likes=['have a nice day']), 'An owl. Have a nice day!', False,
     2 / 3 + 0.25),
    (dict(contains=['owl'], likes=['hope', 'day']), 'An owl. Hope, day!', True, 1.25), # once
    (dict(contains=['owl'], likes=['hope']), 'An owl.', True, 1.0)], ids=str)
def test_grade(checks, text, met, score):
    got = lib.grade(checks, text)
    assert got == (met, pytest.approx(score)) and isinstance(got[0], bool)

def test_grade_refuses_what_it_does_not_know():
    for bad in (dict(contain=['x']), {}, dict(likes=['x'])):
        with pytest.raises(ValueError):
            lib.grade(bad, 'x')

def test_simulated_ranking():
    rng = np.random.default_rng(0)
    assert lib.simulated_ranking([0.5, 1.0, 0.0, 0.75], 0.0, rng) == [1, 3, 0, 2] # without noise: the gold order
    assert lib.simulated_ranking([0.5, 1.0, 0.5, 1.0, 1.0], 0.0, rng) == [1, 0]   # of ties only the first is listed
    assert lib.simulated_ranking([1.0, 1.0], 0.0, rng) == [0]
    # two answers 0.4 apart, noise 0.2 on each: swapped when N(0, 0.2 sqrt 2) > 0.4, that is 1 - Phi(1.414) = 7.9%
    swapped = np.mean([lib.simulated_ranking([0.6, 1.0], 0.2, rng) == [0, 1] for _ in range(4000)])
    assert abs(swapped - 0.079) < 5 * math.sqrt(0.079 * 0.921 / 4000)

# -----------------------------------------------------------------------------
# words to the user

def test_only_rank_0_speaks(monkeypatch, capsys):
    monkeypatch.setattr(lib, 'RANK', 1)
    monkeypatch.setattr(lib, 'QUIET', True) # which follows from the rank when model.py is imported
    lib.print0('x')
    with pytest.raises(SystemExit) as e:
        lib.die('x')
    assert e.value.code == 1 and capsys.readouterr().out == ''

def test_start_refuses_what_is_not_here():
    if not torch.cuda.is_available():
        with dies('cuda.*--device=cpu'):
            lib.start(dict(device='cuda', dtype='auto', seed=1))
    with dies('toaster'):
        lib.start(dict(device='toaster', dtype='auto', seed=1))
    with dies('float16'):
        lib.start(dict(device='cpu', dtype='float16', seed=1))
