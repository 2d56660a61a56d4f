"""
What the stages share. The model comes first, the plumbing last:
  1. GPT            the language model: attention, MLP, block, initialisation
  2. generate       sampling with a KV cache
  3. ScalarModel    one number per token instead of logits: reward model and critic
  4. optimizers     AdamW and Muon
  5. Tokenizer      text <-> token ids, and the chat template
  6. grade          the gold reward: what a program can check about an answer
  7. plumbing       device, processes, files, checkpoints, log: skip it on a first read
Letters in shape comments: B batch, T tokens, S keys (cached tokens + T), C n_embd, H n_head,
H_kv n_kv_head, D head_dim = C / H, V vocab_size, P tokens of the longest prompt.
"""
import base64, contextlib, functools, glob, gzip, hashlib, json, math, os, re, signal, zipfile, zlib
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import regex
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F

# -----------------------------------------------------------------------------
# 1. GPT

@dataclass
class GPTConfig:
    arch: str = 'gpt2'           # or llama: RMSNorm, rotary positions, gated MLP
    vocab_size: int = 50257
    block_size: int = 1024       # maximum context length, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0           # heads of keys and values (grouped-query attention); 0 = n_head
    n_embd: int = 768
    n_hidden: int = 0            # MLP width; 0 = 4 (gpt2) or 8/3 (llama) n_embd, rounded up to 32s
    dropout: float = 0.0
    tie_embeddings: bool = True  # share one matrix between the input and the output embedding
    qk_norm: bool = False        # RMSNorm on queries and keys: allows higher learning rates
    key_shift: bool = False      # half of the key heads get the key of the token before
    rope_theta: float = 10000.0  # larger = slower rotation, for longer contexts
    norm_eps: float = 1e-5       # keeps a norm from dividing by 0
    rope_scaling: tuple = ()     # Llama 3.1: factor, low and high frequency factor, old block_size

    def __post_init__(self):
        assert self.arch in ('gpt2', 'llama'), f"arch must be 'gpt2' or 'llama', not {self.arch!r}"
        if self.n_kv_head == 0:
            self.n_kv_head = self.n_head
        if self.n_hidden == 0:
            # a gated MLP has three matrices instead of two: 8/3 C gives it as many parameters
            width = 4 * self.n_embd if self.arch == 'gpt2' else 8 * self.n_embd / 3
            self.n_hidden = 32 * math.ceil(width / 32)
        for large, small in (('n_embd', 'n_head'), ('n_head', 'n_kv_head')):
            a = getattr(self, large)
            b = getattr(self, small)
            assert b > 0 and a % b == 0, f'{large} {a} must be a multiple of {small} {b}'
        assert not self.key_shift or self.n_kv_head > 1, 'key_shift needs n_kv_head > 1'
        head_dim = self.n_embd // self.n_head
        assert self.arch == 'gpt2' or head_dim % 2 == 0, f'n_embd / n_head {head_dim} must be even'
        assert 0 < self.block_size <= 2**20, f'block_size {self.block_size:,} is not 1 to 1,048,576'
        assert 0 <= self.dropout < 1, f'dropout {self.dropout} is not from 0 to below 1'
        for name in ('norm_eps', 'rope_theta'):
            assert getattr(self, name) > 0, f'{name} {getattr(self, name)} must be above 0'

class RMSNorm(nn.RMSNorm):
    def forward(self, x): # torch's fast kernel wants weights of the type of x, bf16 under autocast
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)

def make_norm(config):
    norm = nn.LayerNorm if config.arch == 'gpt2' else RMSNorm
    return norm(config.n_embd, eps=config.norm_eps)

def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021): rotate each pair (x1, x2) by an angle that grows with the
    position, so that the product of a query and a key depends on their distance. x (B, H, T, D)."""
    swapped = x.roll(x.size(-1) // 2, dims=-1) # x1 and x2 are the halves of D: -> (x2, x1)
    # (x1 cos - x2 sin, x2 cos + x1 sin); the minus sign is in `sin`
    return torch.addcmul(x * cos, swapped, sin).type_as(x)

class Attention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017)."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.head_dim = config.n_embd // config.n_head
        bias = config.arch == 'gpt2'
        # queries, keys and values of all heads come from one matrix
        n_heads = config.n_head + 2 * config.n_kv_head
        self.qkv = nn.Linear(config.n_embd, n_heads * self.head_dim, bias=bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=bias)

    def forward(self, x, pos, rope, mask, cache, layer):
        """x (B, T, C) -> (B, T, C). The other arguments come from GPT.hidden."""
        config = self.config
        B, T, C = x.shape
        H, H_kv, D = config.n_head, config.n_kv_head, self.head_dim
        qkv = self.qkv(x).view(B, T, H + 2 * H_kv, D).transpose(1, 2) # (B, H + 2 H_kv, T, D)
        # norm and rotation treat queries and keys alike, so both are done at once
        qk, v = qkv.split([H + H_kv, H_kv], dim=1)        # (B, H + H_kv, T, D), (B, H_kv, T, D)
        if config.qk_norm: # bounds the scores, so that training is stable at high learning rates
            qk = F.rms_norm(qk, (D,), eps=config.norm_eps)
        if config.key_shift:
            # An induction head looks for what followed an earlier copy of this token (Olsson et al.
            # 2022), so its keys must know the token before them. In plain attention they learn it
            # from an earlier layer. With shifted keys a small model learns to copy much sooner.
            qk, shifted = qk.split([H + H_kv // 2, H_kv - H_kv // 2], dim=1)
            before = shifted.roll(1, dims=2)
            if cache is not None:
                before[:, :, :1] = cache.last_keys[layer]
                cache.last_keys[layer] = shifted[:, :, -1:]
            exists = (pos > 0).view(-1, 1, T, 1)          # nothing stands before the first token
            qk = torch.cat((qk, before * exists), dim=1)
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k = qk.split([H, H_kv], dim=1)
        if cache is not None: # keys and values of the earlier tokens, when generating
            k, v = cache.append(layer, k, v)              # (B, H_kv, S, D)
        # The usual scale is 1 / sqrt(D). Normed queries and keys have length sqrt(D), so 12 / D
        # bounds their scores by +-12: enough to single out one token.
        scale = 12 / D if config.qk_norm else 1 / math.sqrt(D)
        if cache is not None and cache.mask is not None:
            y = static_attention(q, k, v, cache.mask, scale)
        else:
            if H_kv != H: # grouped-query attention (Ainslie et al. 2023): queries share keys
                k = k.repeat_interleave(H // H_kv, dim=1) # (B, H, S, D)
                v = v.repeat_interleave(H // H_kv, dim=1)
            dropout = config.dropout if self.training else 0.0
            is_causal = False if T == 1 else mask is None # a single query may see all keys
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout,
                                               is_causal=is_causal, scale=scale)
        y = y.transpose(1, 2).reshape(B, T, C)            # put the heads side by side
        return F.dropout(self.proj(y), config.dropout, self.training)

class MLP(nn.Module):
    """gpt2: GELU(x W1) W2. llama: (SiLU(x W_gate) * (x W_up)) W2 (Shazeer 2020)."""
    def __init__(self, config):
        super().__init__()
        self.gated = config.arch == 'llama'
        self.dropout = config.dropout
        bias = config.arch == 'gpt2'
        width = 2 * config.n_hidden if self.gated else config.n_hidden # gate and up in one matrix
        self.up = nn.Linear(config.n_embd, width, bias=bias)
        self.proj = nn.Linear(config.n_hidden, config.n_embd, bias=bias)

    def forward(self, x):
        if self.gated:
            gate, up = self.up(x).chunk(2, dim=-1)
            h = F.silu(gate) * up
        else:
            h = F.gelu(self.up(x), approximate='tanh') # as GPT-2 computes it
        return F.dropout(self.proj(h), self.dropout, self.training)

class Block(nn.Module):
    """In attention the tokens communicate, in the MLP each one computes."""
    def __init__(self, config):
        super().__init__()
        self.norm1 = make_norm(config)
        self.attn = Attention(config)
        self.norm2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, pos, rope, mask, cache, layer):
        x = x + self.attn(self.norm1(x), pos, rope, mask, cache, layer)
        return x + self.mlp(self.norm2(x))

class GPT(nn.Module):
    """The language model. model(idx) gives logits; model.hidden(idx), the vectors before `head`."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        C = config.n_embd
        is_gpt2 = config.arch == 'gpt2'
        self.wte = nn.Embedding(config.vocab_size, C)
        self.wpe = nn.Embedding(config.block_size, C) if is_gpt2 else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config)
        self.head = nn.Linear(C, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.wte.weight
        if not is_gpt2:
            half = C // config.n_head // 2
            rates = config.rope_theta ** (-torch.arange(half).float() / half)
            if config.rope_scaling: # pairs of D that turn slowly turn slower, for a longer context
                factor, low, high, length = config.rope_scaling
                turns = length * rates / (2 * math.pi)    # of each pair, in the old context
                share = ((turns - low) / (high - low)).clamp(0, 1) # of its old rate
                rates = rates * (share + (1 - share) / factor)
            angles = torch.outer(torch.arange(config.block_size).float(), rates) # (block_size, D/2)
            cos = torch.cat((angles.cos(), angles.cos()), dim=1)                  # (block_size, D)
            sin = torch.cat((-angles.sin(), angles.sin()), dim=1)
            self.register_buffer('cos', cos, persistent=False)
            self.register_buffer('sin', sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        is_gpt2 = self.config.arch == 'gpt2'
        for name, p in self.named_parameters():
            into_residual = name.endswith('proj.weight')
            if 'norm' in name and name.endswith('weight'):
                nn.init.ones_(p)
            elif p.dim() < 2: # biases
                nn.init.zeros_(p)
            elif is_gpt2 and into_residual: # the sum over all blocks keeps its size
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif is_gpt2 or not name.startswith('blocks.'): # small: the first loss is near ln(V)
                nn.init.normal_(p, std=0.02)
            elif into_residual: # llama: every block starts as the identity
                nn.init.zeros_(p)
            else: # llama: 1 / sqrt(fan_in), so that vectors keep their size
                nn.init.normal_(p, std=p.size(1) ** -0.5)
        if self.config.key_shift:
            # keys start equal to queries, so that like attends to like: a head with shifted keys
            # finds what followed a token like this one (Trockman and Kolter 2023)
            H, H_kv = self.config.n_head, self.config.n_kv_head
            for block in self.blocks:
                heads = block.attn.qkv.weight.view(H + 2 * H_kv, -1, self.config.n_embd)
                heads[H:H + H_kv] = heads[0:H:H // H_kv]

    def embed(self, idx, pos):
        """idx (B, T), pos (T,) or (B, T) -> (B, T, C)."""
        x = self.wte(idx)
        if self.wpe is not None:
            x = x + self.wpe(pos)
        if x.device.type == 'cuda' and torch.is_autocast_enabled('cuda'):
            # all blocks add to x: in bf16 they move half as many bytes as in fp32
            x = x.to(torch.get_autocast_dtype('cuda'))
        return F.dropout(x, self.config.dropout, self.training)

    def rope(self, pos):
        """pos (T,) or (B, T) -> cos and sin for `rotate`; None for gpt2."""
        if self.config.arch == 'gpt2':
            return None
        shape = (-1, 1, pos.size(-1), self.cos.size(1))   # (1 or B, 1, T, D)
        return self.cos[pos].view(shape), self.sin[pos].view(shape)

    def hidden(self, idx, pos=None, mask=None, cache=None):
        """idx (B, T) -> normed hidden vectors (B, T, C). cache: a KVCache of the tokens before idx.
        If rows are padded on the left: pos (B, T) positions, mask (B, S) True at real tokens. If rows
        hold several texts: pos (B, T), mask (B, T, S) True where query and key are in one text."""
        start = 0 if cache is None else cache.n
        S = start + idx.size(1)
        assert S <= self.config.block_size, f'{S} tokens > block_size {self.config.block_size}'
        if pos is None:
            pos = torch.arange(start, S, device=idx.device)
        mask = make_attention_mask(start, S, mask, idx.device)
        x = self.embed(idx, pos)
        rope = self.rope(pos)
        for layer, block in enumerate(self.blocks):
            x = block(x, pos, rope, mask, cache, layer)
        if cache is not None:
            cache.n = S
        return self.norm(x)

    def forward(self, idx, pos=None, mask=None, cache=None):
        """idx (B, T) -> logits (B, T, V). The logits at t predict the token at t + 1."""
        return self.head(self.hidden(idx, pos, mask, cache))

    def n_params(self, embedding=True):
        """Parameters, with or without embeddings (scaling laws omit them: Kaplan et al. 2020)."""
        skip = () if embedding else ('wte', 'wpe', 'head')
        return sum(p.numel() for name, p in self.named_parameters() if not name.startswith(skip))

    def flops_per_token(self, T):
        """FLOPs to learn a token in sequences of T: 6 N + 12 n_layer C T (Chowdhery et al. 2022)"""
        output = 0 if self.head is None else self.head.weight.numel()
        N = self.n_params(embedding=False) + output # embeddings are looked up, not multiplied
        return 6 * N + 12 * self.config.n_layer * self.config.n_embd * T

def make_attention_mask(start, S, mask, device):
    """Which of the keys 0..S-1 may the queries start..S-1 see? mask: see GPT.hidden."""
    if mask is None and (start == 0 or S - start == 1):
        return None # no mask needed: `is_causal` does it, or a single query sees all keys
    queries = torch.arange(start, S, device=device)[:, None]
    keys = torch.arange(S, device=device)[None, :]
    seen = keys <= queries                                # (T, S)
    if mask is not None:
        if mask.dim() == 2:
            mask = mask[:, None, :]                       # (B, 1, S)
        seen = seen & mask                                # (B, T, S)
        # A query that is padding sees no real key, and a softmax over nothing is NaN: let it see
        # itself. Nobody reads what comes out.
        seen = seen | (keys == queries)
        seen = seen[:, None]                              # (B, 1, T, S)
    return seen

# -----------------------------------------------------------------------------
# 2. generate

class KVCache:
    """Keys and values of the tokens so far; the memory for `length` tokens is allocated once."""
    def __init__(self, config, batch_size, length, device, dtype):
        D = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, config.n_kv_head, length, D)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        last = (config.n_layer, batch_size, config.n_kv_head - config.n_kv_head // 2, 1, D)
        self.last_keys = torch.zeros(last, device=device, dtype=dtype) # key_shift: before the shift
        self.n = 0 # number of tokens in the cache
        self.mask = None # static_steps sets it, and also `at` and `n_read`

    def append(self, layer, k, v):
        S = self.n + k.size(2) # k, v (B, H_kv, T, D) are new; the results are (B, H_kv, S, D)
        if self.mask is None:
            self.keys[layer, :, :, self.n:S] = k
            self.values[layer, :, :, self.n:S] = v
        else:
            S = self.n_read # more than are filled: a mask hides the others
            self.keys[layer].index_copy_(2, self.at, k.type_as(self.keys))
            self.values[layer].index_copy_(2, self.at, v.type_as(self.values))
        return self.keys[layer, :, :, :S], self.values[layer, :, :, :S]

    def keep(self, rows):
        self.keys = self.keys[:, rows] # rows (B,): True at the rows of the batch that stay
        self.values = self.values[:, rows]
        self.last_keys = self.last_keys[:, rows]

def sample(probs, u=None):
    """Draw an id from each row of probs (B, V), which need not sum to 1 -> (B, 1). A random number
    a row is enough, u (B, 1) from [0, 1); torch.multinomial draws B x V, which is slower."""
    if probs.device.type != 'mps': # which has no fp64
        probs = probs.double()
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    u = torch.rand_like(total) if u is None else u.to(total)
    # slightly below the total, so that rounding never picks a last id of probability 0
    u = u * total * (1 - 1e-7)
    return torch.searchsorted(cdf, u, right=True).clamp(max=probs.size(-1) - 1)

def plain_steps(model, cache, idx, first, next_ids):
    """The steps of `generate`, without end: yields ids (B, 1) and the logits (B, V) behind them.
    idx (B, T) is not in the cache yet: the prompts, or an id a row. first: see generate."""
    is_padded = first.any()
    while True:
        S = cache.n + idx.size(1)
        pos, mask = None, None
        if is_padded:
            # positions count from the first real token, as if there were no padding
            pos = (torch.arange(cache.n, S, device=idx.device) - first).clamp(min=0) # (B, T)
            mask = torch.arange(S, device=idx.device) >= first # (B, S)
        x = model.hidden(idx, pos, mask, cache)           # (B, T, C)
        logits = model.head(x[:, -1])                     # (B, V)
        idx = next_ids(logits)                            # (B, 1)
        yield idx, logits

@torch.no_grad()
def generate(model, prompts, max_new_tokens, stop=None, temperature=1.0, truncate_probs=None,
             on_token=None):
    """Continue each prompt (a list of ids) by up to max_new_tokens ids, or up to the id `stop`.
    Returns lists of new ids, including `stop`. temperature=0 takes the most likely token.
    truncate_probs (B, V) -> (B, V) may set probabilities to 0 (top-k, top-p). on_token gets the new
    ids of each step. A prompt that is too long for the context loses its oldest ids."""
    device = model.wte.weight.device
    block_size = model.config.block_size
    max_new_tokens = min(max_new_tokens, block_size - 1)
    P = min(max(len(prompt) for prompt in prompts), block_size - max_new_tokens)
    # pad on the left, so that all rows grow at the right edge
    n_padding = [max(0, P - len(prompt)) for prompt in prompts]
    padded_rows = [[0] * n + prompt[-P:] for n, prompt in zip(n_padding, prompts)]
    idx = torch.tensor(padded_rows, device=device)        # (B, P)
    first = torch.tensor(n_padding, device=device)[:, None] # (B, 1) index of the first real token
    is_autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if is_autocast else model.wte.weight.dtype
    length = 64 * math.ceil((P + max_new_tokens) / 64)    # static_steps reads multiples of 64
    cache = KVCache(model.config, len(prompts), length, device, dtype)

    def next_ids(logits):
        if temperature == 0:
            return logits.argmax(-1, keepdim=True)        # (B, 1)
        if temperature != 1:
            logits = logits.float() / temperature
        probs = F.softmax(logits, dim=-1, dtype=torch.float32)
        return sample(truncate_probs(probs) if truncate_probs else probs)

    is_static = device.type in STATIC_DEVICES
    make_steps = static_steps if is_static else plain_steps
    steps = make_steps(model, cache, idx, first, next_ids)
    # to read ids, Python waits for the GPU, and then the GPU for Python: every 16 steps is enough
    interval = 16 if is_static and on_token is None else 1
    answers = torch.zeros(len(prompts), max_new_tokens, dtype=torch.long, device=device)
    rows = torch.arange(len(prompts), device=device)      # (B,) the prompt that a row continues
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for i in range(max_new_tokens):
        idx, logits = next(steps)
        answers[rows, i] = idx[:, 0]
        if on_token is not None:
            on_token(idx[~done, 0].tolist())
        done = done | (idx[:, 0] == (-1 if stop is None else stop))
        if (i + 1) % interval > 0 and i + 1 < max_new_tokens:
            continue
        total = logits.sum(dtype=torch.float32)
        assert total.isfinite(), 'the model has diverged (NaN): lower --learning_rate'
        if done.all():
            break
        # Drop finished rows. This copies the whole cache, so wait until they are a quarter of all.
        if 4 * done.sum() >= len(done):
            cache.keep(~done)
            rows = rows[~done]
            first = first[~done]
            steps = make_steps(model, cache, idx[~done], first, next_ids)
            done = done[~done]
    outputs = answers.tolist()
    for output in outputs:
        if stop in output: # what a row says after its end is not part of the answer
            del output[output.index(stop) + 1:]
    return outputs

# generate on a GPU: skip it on a first read

STATIC_DEVICES = {'cuda'} # where generate uses static_steps

def static_steps(model, cache, idx, first, next_ids):
    """plain_steps for a GPU, which runs the 250 kernels of a step faster than Python starts them. A
    CUDA graph starts all of them with one call, on the same memory: what changes is in tensors."""
    if cache.n == 0: # the prompts
        idx, logits = next(plain_steps(model, cache, idx, first, next_ids))
        yield idx, logits
    cache.at = torch.tensor([cache.n], device=idx.device)
    idx = idx.clone()                                     # (B, 1) a step reads and overwrites it

    def step():
        keys = torch.arange(cache.n_read, device=idx.device)
        seen = (keys >= first) & (keys <= cache.at)       # (B, S)
        mask = torch.zeros(seen.shape, device=idx.device, dtype=cache.keys.dtype)
        cache.mask = mask.masked_fill(~seen, -math.inf)[:, None, None] # (B, 1, 1, S)
        logits = model(idx, cache.at - first, cache=cache)[:, -1]
        idx.copy_(next_ids(logits))
        cache.at.add_(1)
        return logits

    while True:
        # a new graph for each 64 keys: to read the whole cache at every step would take longer
        start = cache.n
        cache.n_read = 64 * (start // 64 + 1)
        run = step # once without a graph: kernels must be loaded before they can be recorded
        for n in range(start, cache.n_read):
            if n == start + 1 and STATIC_DEVICES:
                run = capture(step)
            cache.n = n # recording has changed it
            logits = run()
            cache.n = n + 1 # a graph does not change it
            yield idx.clone(), logits

def capture(step):
    """A CUDA graph of what step() does -> a function that repeats it; `step` itself on an error."""
    try:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.stream(torch.cuda.current_stream()) # to return to it after an error
        with stream, torch.cuda.graph(graph, capture_error_mode='thread_local'):
            logits = step() # runs nothing; the graph will always write to this tensor
    except RuntimeError as e:
        print0(f'generation is slower, without a CUDA graph: {str(e).splitlines()[0]}')
        STATIC_DEVICES.clear() # do not try again
        for generator in torch.cuda.default_generators: # they still expect a capture
            generator.graphsafe_set_state(generator.clone_state())
        return step

    def replay():
        graph.replay()
        return logits
    return replay

def static_attention(q, k, v, mask, scale):
    """One query a row: two products read k and v (B, H_kv, S, D) faster than one fused kernel.
    q and the result (B, H, 1, D); mask (B, 1, 1, S) is added to the scores."""
    grouped = q.reshape(len(q), k.size(1), -1, q.size(3)) # (B, H_kv, H / H_kv, D)
    scores = (grouped * scale) @ k.transpose(2, 3) + mask # (B, H_kv, H / H_kv, S)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return (weights @ v).reshape(q.shape)

# -----------------------------------------------------------------------------
# 3. ScalarModel

class ScalarModel(nn.Module):
    """A GPT body, and one score per token instead of logits. reward.py sets mean and std last."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.body = GPT(config)
        self.body.head = None # DDP would wait for the gradient of an unused matrix
        self.head = nn.Linear(config.n_embd, 1)
        nn.init.normal_(self.head.weight, std=(config.n_embd + 1) ** -0.5) # reward.py sets 0
        nn.init.zeros_(self.head.bias)
        self.register_buffer('mean', torch.zeros(()))
        self.register_buffer('std', torch.ones(()))

    def forward(self, idx):
        """idx (B, T), padded on the right, where causal attention never looks -> scores (B, T)."""
        x = self.body.hidden(idx).float() # self.head(x) in bf16 would round to three digits
        score = (x * self.head.weight).sum(-1) + self.head.bias
        return (score - self.mean) / self.std

def pad_right(rows, pad, device=None):
    """Lists of ids -> (B, T) tensor, filled up with `pad` on the right."""
    T = max(len(row) for row in rows)
    return torch.tensor([row + [pad] * (T - len(row)) for row in rows], device=device)

def last_token(values, rows):
    """values (B, T) of rows that were padded on the right -> (B,) at each row's last real token."""
    last = torch.tensor([len(row) - 1 for row in rows], device=values.device)
    return values.gather(1, last[:, None]).squeeze(1)

# -----------------------------------------------------------------------------
# 4. optimizers

class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, then make the update of a matrix orthogonal, so that it
    changes all directions by the same amount. torch.optim.Muon does the same in bf16, which most
    CPUs lack. So this one computes in fp32, and stacks matrices of one shape into one batch."""
    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None): # torch.distributed.checkpoint passes a closure
        for group in self.param_groups:
            lr, momentum = group['lr'], group['momentum']
            by_shape = {}
            for p in group['params']:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    average = self.state[p].setdefault('momentum_buffer', torch.zeros_like(p))
                    average.lerp_(p.grad, 1 - momentum)
                    updates.append(p.grad.lerp(average, momentum)) # Nesterov momentum
                updates = orthogonalize(torch.stack(updates)) # (matrices, n, m)
                size = 0.2 * math.sqrt(max(shape)) # as large as a typical update of AdamW
                for p, update in zip(params, updates):
                    p.mul_(1 - lr * group['weight_decay'])
                    p.add_(update, alpha=-lr * size)

def orthogonalize(x):
    """SVD x = U S V' -> about U V' by Newton-Schulz iteration: products only. x (matrices, n, m)"""
    a, b, c = 3.4445, -4.7750, 2.0315 # chosen by Jordan: all singular values end near 1
    is_tall = x.size(1) > x.size(2)
    if is_tall: # makes x x' the smaller square (' means transposed)
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    # five steps x <- p x, where p = a + b x x' + c (x x')^2. Only the square x x' is iterated. The
    # product q of all p meets x once, at the end: half the time in fp32, but unstable in bf16.
    identity = torch.eye(x.size(1), device=x.device)
    xx, q = x @ x.mT, identity
    for _ in range(5):
        p = a * identity + b * xx + c * xx @ xx
        xx = p @ xx @ p
        q = p @ q
    x = q @ x
    return x.mT if is_tall else x

def make_optimizers(model, learning_rate, weight_decay, betas, eps=1e-8, kind='adamw',
                    momentum=0.95):
    """A list: AdamW, and with kind='muon' also Muon for the matrices inside the blocks."""
    assert kind in ('adamw', 'muon'), f"optimizer must be 'adamw' or 'muon', not {kind!r}"
    matrices, vectors, inner_matrices = [], [], []
    for name, p in model.named_parameters():
        if p.dim() < 2: # norms and biases do not decay
            vectors.append(p)
        elif kind == 'muon' and 'blocks.' in name:
            inner_matrices.append(p)
        else:
            matrices.append(p)
    groups = [dict(params=matrices, weight_decay=weight_decay),
              dict(params=vectors, weight_decay=0.0)]
    device_type = next(model.parameters()).device.type
    fused = device_type in ('cuda', 'cpu') # one kernel for all parameters
    optimizers = [torch.optim.AdamW(groups, learning_rate, betas, eps, fused=fused)]
    if inner_matrices and device_type == 'cuda':
        optimizers.append(torch.optim.Muon(inner_matrices, learning_rate, weight_decay, momentum,
                                           adjust_lr_fn='match_rms_adamw'))
    elif inner_matrices:
        optimizers.append(Muon(inner_matrices, learning_rate, weight_decay, momentum))
    return optimizers

# -----------------------------------------------------------------------------
# 5. Tokenizer

SPECIAL_TOKENS = ['<|endoftext|>', '<|system|>', '<|user|>', '<|assistant|>', '<|end|>', '<|pad|>']

def clean(text):
    """Repair what tiktoken cannot encode."""
    # JSON can hold half of a surrogate pair, UTF-8 cannot: it becomes U+FFFD.
    text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    # A million blanks overflow tiktoken's stack: cut runs of white space to 10,000. Such a run
    # fills at least one block of 5,000. To look for such a block first is fast.
    if any(text[i:i + 5000].isspace() for i in range(0, len(text), 5000)):
        text = re.sub(r'(?<!\s)(\s{10000})\s+', r'\1', text)
    return text

def join_parts(content):
    """The content of a turn; OpenAI's [{'type': 'text', 'text': 'Hi'}] becomes 'Hi'."""
    if isinstance(content, list) and content and all(part['type'] == 'text' for part in content):
        content = ''.join(part['text'] for part in content)
    return content

class Tokenizer:
    """A tiktoken encoding built from tokenizer.json, and the chat template."""
    def __init__(self, spec):
        self.spec = spec
        self.tokens = [base64.b64decode(token, validate=True) for token in spec['ranks']]
        n = len(self.tokens)
        assert spec['special_tokens'] == SPECIAL_TOKENS, 'it has other special tokens'
        assert b'' not in self.tokens and len(set(self.tokens)) == n, 'a token is empty or repeated'
        assert spec['kind'] == 'char' or sum(len(t) < 2 for t in self.tokens) == 256, 'byte missing'
        specials = {name: n + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.eot, self.system, self.user, self.assistant, self.end, self.pad = specials.values()
        self.n_vocab = spec.get('n_vocab', n + len(specials)) # padded to a round number for GPT-2
        assert 0 <= self.n_vocab - n - len(specials) < 1000, \
            f'n_vocab {self.n_vocab} does not suit {n} tokens'
        ranks = {token: i for i, token in enumerate(self.tokens)}
        self.enc = tiktoken.Encoding('ours', pat_str=spec['pattern'], mergeable_ranks=ranks,
                                     special_tokens=specials)
        for piece in regex.finditer(spec['pattern'], "It's 1 x.\n"):
            assert piece[0], 'its pattern matches the empty text' # which tiktoken cannot encode
        self.decode = self.enc.decode # bytes that are not valid UTF-8 become U+FFFD
        digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).digest()
        self.hash = int.from_bytes(digest[:4], 'big') & 0x7fffffff # stored in each token shard

    @classmethod
    def load(cls, path):
        remedy = f'run `python tokenizer.py --data_dir={os.path.dirname(path)}`'
        assert os.path.exists(path), f'no tokenizer {path}: {remedy}'
        try:
            with open(path, encoding='utf-8') as f:
                return cls(json.load(f))
        except (AssertionError, KeyError, TypeError, ValueError, regex.error) as e: # or bad JSON
            raise AssertionError(f'{path} is damaged ({type(e).__name__}: {e}): {remedy}') from None

    def encode(self, text):
        # text that spells a special token gives ordinary tokens: a user cannot inject a turn
        return self.enc.encode_ordinary(clean(text))

    def token_bytes(self, i):
        return self.tokens[i] if i < len(self.tokens) else b'' # special tokens have no text

    def decode_answer(self, ids):
        """Decode an answer: drop special tokens, and spaces at both ends."""
        return b''.join(self.token_bytes(i) for i in ids).decode('utf-8', 'replace').strip()

    def render(self, messages, prompt=False):
        """Messages -> (ids, mask). mask is 1 at the tokens to learn: those of the assistant.
            <|endoftext|> <|user|> Hi <|end|> <|assistant|> Hello! <|end|>
                  0          0     0     0         0           1      1
        With prompt=True the ids end after <|assistant|>, ready to be answered. Raises ValueError
        unless user and assistant take turns, after an optional system message."""
        openers = dict(system=self.system, user=self.user, assistant=self.assistant)
        try:
            roles = [turn['role'] for turn in messages]
            order = ' '.join(roles)
            # + '': a TypeError if it is no text
            texts = [join_parts(turn['content']) + '' for turn in messages]
        except (KeyError, TypeError):
            raise ValueError('messages must be a list of {"role": .., "content": text}') from None
        last = 'user' if prompt else 'assistant'
        alternate = re.fullmatch('(system )?user( assistant user)*( assistant)?', order)
        if not alternate or roles[-1] != last:
            raise ValueError(f'roles must alternate and end with {last}, but they are: {order}')
        ids, mask = [self.eot], [0]
        for role, text in zip(roles, texts):
            # a space first, as in running text, so that a word is the same token everywhere
            text_ids = self.encode(' ' + text) if text else []
            learn = 1 if role == 'assistant' else 0
            ids += [openers[role]] + text_ids + [self.end]
            mask += [0] + [learn] * (len(text_ids) + 1)
        if prompt:
            ids.append(self.assistant)
            mask.append(0)
        return ids, mask

def read_prompts(path, tok, need_checks=False):
    """Yield (row, ids) of each prompt of a file. A bad row is an error with path and line."""
    assert os.path.exists(path), f'no prompts {path}: make them with `python prepare_data.py`'
    for line, row in read_jsonl(path):
        try:
            ids, _ = tok.render(row.get('messages'), prompt=True)
            if need_checks or 'checks' in row:
                grade(row.get('checks'), 'any text') # find a bad check now, not hours later
        except ValueError as e:
            raise AssertionError(f'{path}:{line}: {e}') from None
        yield row, ids

# -----------------------------------------------------------------------------
# 6. grade

def grade(checks, text):
    """What a program can check about an answer -> (all checks met, score). The score is the share
    of checks met, plus 0.25 if the text has one of the phrases in `likes`: the labeller's taste.
        grade({'contains': ['owl'], 'max_words': 1}, 'An owl!') -> (False, 0.5)
    Raises ValueError for unknown checks and values of the wrong type."""
    words = re.findall(r"\w+(?:['’]\w+)*", text)
    # 9,500 and 9{,}500 and 9 500 are one number; 1/2 is one, a date is not; 3-4 has no minus
    separator = r'(?<=\d)(?<!\d{4})(?<!\.\d)(?<!\.\d\d)(?:,|\{,\}|[^\S\n])(?=\d{3}(?!\d))'
    fraction = r'(?<![\d/])\d+/[1-9]\d*(?!\.?[\d/])'
    decimal = r'(?:\d+\.|(?<![a-zA-Z\d.])\.)?\d+'
    ascii_text = re.sub('[−–]', '-', text)
    joined = re.sub(separator, '', ascii_text)
    numbers = re.findall(rf'(?:(?<![a-zA-Z\d])-)?(?:{fraction}|{decimal})', joined)
    top, _, bottom = (numbers or ['nan'])[-1].partition('/') # nan equals no number
    last_number = float(top) / float(bottom or 1)

    def has(phrase): # as whole words: 'owl' is not in 'bowl'
        return re.search(rf'(?<!\w){re.escape(phrase.lower())}(?!\w)', text.lower()) is not None

    def count(phrases):
        return sum(has(phrase) for phrase in phrases + []) # + []: text is not a list, an error

    def plain(s):
        return s.strip().lower().rstrip('.!')

    rules = {
        'contains': lambda phrases: count(phrases) == len(phrases),
        'excludes': lambda phrases: count(phrases) == 0,
        'count': lambda value: count(value['of']) >= value['min'],
        'equals': lambda value: plain(text) == plain(value),
        'number': lambda value: last_number == float(value),
        'min_words': lambda n: len(words) >= n,
        'max_words': lambda n: 0 < len(words) <= n,
    }
    try:
        met = [rules[check](value) for check, value in checks.items() if check != 'likes']
        bonus = 0.25 if count(checks.get('likes', [])) else 0.0
        return all(met), sum(met) / len(met) + bonus
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as e:
        raise ValueError(f'bad checks {checks!r}: {e!r}; known are {", ".join(rules)}') from None

def simulated_ranking(scores, noise, rng):
    """A simulated labeller sees each gold score plus N(0, noise): indices, best first."""
    seen = np.asarray(scores) + noise * rng.standard_normal(len(scores))
    # of answers with equal gold scores only the first is listed: nobody could tell them apart
    listed = [i for i, score in enumerate(scores) if scores.index(score) == i]
    return sorted(listed, key=lambda i: -seen[i])

# -----------------------------------------------------------------------------
# 7. plumbing, skip on a first read: device and processes

RANK = int(os.environ.get('RANK', 0)) # set by torchrun

def print0(*args, **kwargs):
    if RANK == 0:
        print(*args, **kwargs, flush=True)

def setup(config, allow_fp16=False):
    """Choose device and dtype, join the process group of torchrun, seed torch. Returns a namespace:
    device, device_type, dtype, rank, world_size, master, stop, and autocast."""
    assert 0 <= config['seed'] < 2**32, f'seed must be from 0 to 2**32 - 1, not {config["seed"]}'
    world_size = int(os.environ.get('WORLD_SIZE', 1))
    best = 'mps' if torch.backends.mps.is_available() else 'cpu'
    best = 'cuda' if torch.cuda.is_available() else best
    device = best if config['device'] == 'auto' else config['device']
    device_type = device.partition(':')[0]
    assert device_type in ('cpu', best), f'no device {device!r} here: use --device=auto'
    if device == 'cuda' or (device_type == 'cuda' and world_size > 1): # torch wants the number
        device = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group('nccl' if device_type == 'cuda' else 'gloo')
    if device_type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high') # TF32
    elif 'OMP_NUM_THREADS' not in os.environ and hasattr(os, 'sched_getaffinity'):
        torch.set_num_threads(len(os.sched_getaffinity(0))) # the cores that taskset leaves to us
    dtype = config['dtype']
    if dtype == 'auto':
        dtype = 'float32'
        if device_type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False):
            dtype = 'bfloat16'
        elif device_type == 'cuda' and allow_fp16: # older GPUs, such as T4 and V100
            dtype = 'float16'
    allowed = ['float32', 'bfloat16', 'float16'] if allow_fp16 else ['float32', 'bfloat16']
    assert dtype in allowed, f"dtype must be 'auto' or one of {allowed}, not {dtype!r}"
    torch.manual_seed(config['seed'])
    config['world_size'] = world_size
    run = SimpleNamespace(device=torch.device(device), device_type=device_type, rank=RANK,
                          dtype=getattr(torch, dtype), world_size=world_size, master=RANK == 0,
                          stop=False)
    run.autocast = functools.partial(torch.autocast, device_type, run.dtype, dtype != 'float32')
    print0(f'device: {device}, {dtype}, {world_size} x {torch.get_num_threads()} threads')
    return run

def cleanup(run):
    if run.world_size > 1: # a run that does not leave the process group ends with warnings
        dist.barrier()
        dist.destroy_process_group()

def catch_signals(run):
    """Ctrl-C and SIGTERM set run.stop: the step is finished first. A second one ends at once."""
    def on_signal(number, frame):
        run.stop = True
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

def should_stop(run):
    return all_sum(run.stop)[0] > 0 # True if any rank must stop; call it on all at the same step

def all_sum(*values):
    """Sum each number over all ranks; returns a list of floats."""
    device = 'cuda' if dist.is_initialized() and dist.get_backend() == 'nccl' else 'cpu'
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()

def all_gather_list(mine, run):
    """All-gather lists that were split as items[rank::world_size], and restore the order."""
    parts = [mine] * run.world_size
    if run.world_size > 1:
        dist.all_gather_object(parts, mine)
    n = sum(len(part) for part in parts)
    return [parts[i % run.world_size][i // run.world_size] for i in range(n)]

def seed_step(seed, step, rank):
    # a resumed run needs no generator state: (seed, step, rank) decide all randomness of a step
    torch.manual_seed((seed * 1_000_003 + step) * 1_009 + rank)

# plumbing: files

@contextlib.contextmanager
def atomic_write(path):
    # with atomic_write('x') as tmp: write to tmp, which becomes x when it is whole
    tmp = f'{path}.{os.getpid()}.partial'
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    for left in glob.glob(f'{glob.escape(str(path))}.[0-9]*.partial'): # by a run that was killed
        with contextlib.suppress(OSError):
            os.remove(left)
    try:
        yield tmp
        os.replace(tmp, path)
    except OSError as e:
        if e.errno and not e.filename: # a full disk does not say where
            e.filename = str(path)
        raise
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)

def write_text(path, text):
    with atomic_write(path) as tmp, open(tmp, 'w', encoding='utf-8', newline='') as f:
        f.write(text)

def read_jsonl(path, is_log=False):
    """Yield (line number, object) of a .jsonl or .jsonl.gz. Errors name the path and the line. The
    last line of a log is left out if it was cut: its run was killed, or the disk was full."""
    open_text = gzip.open if str(path).endswith('.gz') else open
    line = 0
    text = ''
    try:
        with open_text(path, 'rt', encoding='utf-8-sig') as f:
            for line, text in enumerate(f, 1):
                if text.strip():
                    row = json.loads(text)
                    assert isinstance(row, dict), f'{path}:{line}: not a JSON object'
                    yield line, row
    except (ValueError, RecursionError, EOFError, gzip.BadGzipFile, zlib.error) as e:
        if is_log and not text.endswith('\n'):
            return
        why = getattr(e, 'msg', e) # the rest of a JSON error counts lines within this one
        raise AssertionError(f'{path}:{line}: not a JSON line, or damaged after it ({why}): '
                             'mend this line or delete it') from None

def write_jsonl(path, rows):
    """Write one object a line. A .gz has no time stamp: the same rows give the same bytes."""
    with atomic_write(path) as tmp, open(tmp, 'wb') as raw:
        out = gzip.GzipFile('', 'wb', 6, raw, mtime=0) if str(path).endswith('.gz') else raw
        for row in rows:
            out.write((json.dumps(row, ensure_ascii=False) + '\n').encode('utf-8', 'replace'))
        if out is not raw:
            out.close()

# token shards, as llm.c and modded-nanogpt write them: magic number -> version, dtype
SHARD_FORMATS = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}

def read_shard(path, tok_hash=0):
    """Token shard -> memory map of its tokens. A tok_hash of 0, here or in the file, fits any."""
    remedy = f'run `python tokenizer.py --data_dir={os.path.dirname(path)}` again'
    header = np.fromfile(path, dtype='<i4', count=256)
    magic, version, n_tokens, file_hash = (header.tolist() + [0] * 4)[:4] # 0 if the file is cut
    assert magic in SHARD_FORMATS, f'{path} is not a token shard: {remedy}'
    expected_version, dtype = SHARD_FORMATS[magic]
    found = (os.path.getsize(path) - 1024) / np.dtype(dtype).itemsize
    assert version == expected_version and found == n_tokens, \
        f'{path} is damaged: version {version}, {found:,.1f} of {n_tokens:,} tokens: {remedy}'
    assert 0 in (tok_hash, file_hash) or tok_hash == file_hash, \
        f'{path} was written with another tokenizer than the one in use: {remedy}'
    if n_tokens == 0: # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode='r', offset=1024, shape=(n_tokens,))

def write_shard(path, ids, tok_hash):
    """A header of 256 int32 (magic, version, number of tokens, tokenizer hash), then the tokens."""
    magic = 20240520 if ids.dtype == np.uint16 else 20240801
    header = np.zeros(256, '<i4')
    header[:4] = magic, SHARD_FORMATS[magic][0], len(ids), tok_hash
    with atomic_write(path) as tmp, open(tmp, 'wb') as f:
        f.write(header.tobytes())
        f.write(ids.tobytes())

def open_log(path, first_step):
    """Returns log(step=.., loss=..), which adds a line to the .jsonl file of a stage. If two runs
    write to one folder, only the one that started last goes on: its mark replaces the other's."""
    stem = str(path).removesuffix('.jsonl')
    mark = f'{stem}.resume.run-{os.urandom(4).hex()}' # unlike a lock, no kill -9 makes it wrong
    old = read_jsonl(path, is_log=True) if first_step > 0 and os.path.exists(path) else []
    if RANK == 0: # a resumed run drops the lines of the steps that it repeats
        write_jsonl(path, [row for _, row in old if row['step'] < first_step])
        for other in glob.glob(f'{glob.escape(stem)}.resume.run-*'):
            os.remove(other)
        write_text(mark, 'the last run that started here\n')

    def log(**numbers):
        if RANK == 0:
            assert os.path.exists(mark), (
                f'another run has started to write {path}: this one ends, use another --out_dir')
            with open(path, 'a', encoding='utf-8') as f:
                f.write(json.dumps(numbers) + '\n')
    return log

# plumbing: checkpoints

def save_tensors(path, values):
    with atomic_write(path) as tmp:
        try:
            torch.save(values, tmp)
        except RuntimeError: # which says neither where nor why
            raise AssertionError(f'{path} cannot be written: is the disk full?') from None

def load_tensors(path):
    """What save_tensors wrote: a zip file with checksums, which torch.load does not look at."""
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    assert broken is None, f'wrong checksum of {broken}'
    return torch.load(path, map_location='cpu', weights_only=True)

@contextlib.contextmanager
def report_damage(what, remedy):
    """A cut or foreign file fails in many ways inside zip and pickle: one line for all of them."""
    try:
        yield
    except (PermissionError, MemoryError, torch.OutOfMemoryError): # the file may be whole
        raise
    except Exception as e:
        why = ' '.join(f'{type(e).__name__}: {e}'.split())[:150]
        raise AssertionError(f'{what} is damaged or of another version ({why}): {remedy}') from None

def save_checkpoint(path, stage, weights, model_args, tok, config, step, metrics):
    """STAGE.pt: fp32 weights (a state dict) and plain values, enough to chat. Called on rank 0."""
    finite = all(math.isfinite(v) for v in metrics.values() if isinstance(v, float))
    assert finite, f'this run has diverged: {metrics}: lower --learning_rate; {path} is unchanged'
    weights = {name: tensor.float().cpu() for name, tensor in weights.items()}
    if model_args['tie_embeddings'] and 'wte.weight' in weights: # .cpu() may have made two copies of it
        weights['head.weight'] = weights['wte.weight']
    save_tensors(path, dict(stage=stage, weights=weights, model_args=model_args,
                            tokenizer=tok.spec, config=config, step=step, metrics=metrics))
    for left in glob.glob(glob.escape(path.removesuffix('.pt')) + '.resume.*'):
        os.remove(left) # the run is over, nothing is left to resume

def load_checkpoint(path, stages, command):
    """Read a checkpoint of one of these stages. command: what makes it, for the error message."""
    assert os.path.exists(path), f'no checkpoint {path}: make it with `{command}`'
    with report_damage(path, f'make it again with `{command}`'):
        ckpt = load_tensors(path)
        stage, weights = ckpt['stage'], ckpt['weights']
        assert isinstance(ckpt['metrics'], dict), 'no metrics'
        # a file can claim any size: check them all before one of them takes memory
        json.dumps([ckpt['model_args'], ckpt['metrics']]) # no tensors, which take it when compared
        config = GPTConfig(**ckpt['model_args'])
        n_tokens = Tokenizer(ckpt['tokenizer']).n_vocab
        assert n_tokens <= config.vocab_size, f'{n_tokens} tokens, vocab_size {config.vocab_size}'
        assert config.n_layer <= len(weights), f'n_layer {config.n_layer}, {len(weights)} weights'
        # 4 bytes a number; tied embeddings are stored once and counted twice
        n_numbers = sum(tensor.numel() for tensor in weights.values())
        assert 2 * n_numbers <= os.path.getsize(path), f'it claims to hold {n_numbers:,} numbers'
        with torch.device('meta'): # tensors without memory
            model = ScalarModel(config) if stage == 'reward' else GPT(config)
        model.load_state_dict(weights, assign=True) # checks names and shapes
    assert stage in stages, (
        f'{path} is of stage {stage}, not {" or ".join(stages)}: make one with `{command}`')
    return ckpt

def load_model(ckpt, device, kind=GPT):
    """A GPT or ScalarModel with the weights of a checkpoint; only `reward` has a head of scores."""
    model = kind(GPTConfig(**ckpt['model_args']))
    weights = ckpt['weights']
    if kind is ScalarModel and ckpt['stage'] != 'reward':
        body = {f'body.{name}': tensor for name, tensor in weights.items() if name[:5] != 'head.'}
        weights = {**model.state_dict(), **body}
    model.load_state_dict(weights)
    return model.to(device)

def shard(model, run):
    """Fully sharded data parallel (Rajbhandari et al. 2020): each process holds a piece of every
    tensor, and gathers a layer only while it computes. Call it before the optimizer is made."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard # takes a second
    policy = MixedPrecisionPolicy(run.dtype, torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(run.device_type, (run.world_size,))
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)

@torch.no_grad()
def gather(model, whole):
    """Copy the weights of a sharded model into `whole`, a plain copy of it, which a process can use
    without the others: they may have fewer prompts, or shorter answers. All ranks must call this."""
    for whole_p, p in zip(whole.parameters(), model.parameters(), strict=True):
        whole_p.copy_(p.full_tensor())

def get_state(model, optimizers):
    """Weights and optimizer states by name, on the CPU, and whole, also if fsdp has sharded them.
    All ranks must call it; only rank 0 gets the values."""
    import torch.distributed.checkpoint.state_dict as dcp # takes a second, so not at the top
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, optimizer_states = dcp.get_state_dict(model, optimizers, options=options)
    return dict(weights=weights, optimizers=optimizer_states)

def set_state(model, optimizers, state):
    """Put back what get_state returned, on any number of processes."""
    import torch.distributed.checkpoint.state_dict as dcp
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    with report_damage('the resume file', 'use --resume=false'):
        shapes = {name: p.shape for name, p in model.named_parameters()}
        missing = shapes.keys() - state['weights'].keys() # which dcp would not tell
        assert not missing, f'no {min(missing)}'
        for name, values in state['optimizers']['state'].items():
            for tensor in values.values(): # a number of steps, or a moment of each weight
                assert tensor.shape in ((), shapes[name]), f'{name}: shape {tuple(tensor.shape)}'
        dcp.set_state_dict(model, optimizers, model_state_dict=state['weights'],
                           optim_state_dict=state['optimizers'], options=options)

def save_resume(path, step, state, config, **progress):
    """STAGE.resume.pt: what a killed run needs to continue with the same numbers."""
    if RANK == 0:
        save_tensors(path, dict(step=step, state=state, config=config, progress=progress))

MAY_CHANGE = ['device', 'dtype', 'compile', 'resume', 'out_dir', 'log_interval', 'eval_interval',
              'save_interval', 'world_size', 'parallel'] # they do not decide what a run learns

def load_resume(path, config, resume=True, may_change=()):
    """What save_resume wrote, or None for a fresh start. A run with other settings is refused, also
    if it would replace a finished checkpoint."""
    done = path.removesuffix('.resume.pt') + '.pt'
    found = path if os.path.exists(path) else done
    if not resume or not os.path.exists(found):
        return None
    with report_damage(found, 'use --resume=false'):
        saved = load_tensors(found)
        assert found == done or {'state', 'progress'} <= saved.keys(), 'no state'
        old_config = {**saved['config']}
        json.dumps(old_config) # plain values only: a tensor could not be compared below
        where = f'{path} is at step {int(saved["step"])} of a run'
    remedy = 'finish that one, or discard it with --resume=false and start at step 0'
    if found == done:
        where = f'{done} is finished, a run'
        remedy = '--resume=false starts at step 0 and replaces it, another --out_dir keeps it'
    for name, value in config.items():
        old = old_config.get(name)
        assert old == value or name in MAY_CHANGE or name in may_change, \
            f'{where} with {name} = {old!r}, not {value!r}: {remedy}'
    if found == done:
        print0(f'{done} is finished: the same run starts again at step 0 and replaces it at its end')
        return None
    print0(f'resuming from {path} at step {saved["step"]}')
    return saved
