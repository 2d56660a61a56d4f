"""
What the stages share, and nothing else. Sections, in order; a reader can skip between them:

  1 words to the user, files      4 generation with a KV cache     7 devices, processes, checkpoints
  2 the tokenizer and chat form   5 the scalar head                8 the gold reward
  3 the GPT                       6 optimizers

Letters in shape comments: B batch, T tokens, S keys seen so far (cache + T), C n_embd, H heads, D = C/H, V vocabulary.
"""
import base64, contextlib, gzip, hashlib, json, math, os, re, signal, sys, time, zlib
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F

# -----------------------------------------------------------------------------
# 1. words to the user, files

RANK = int(os.environ.get('RANK', 0)) # set by torchrun

def print0(*args, **kwargs):
    """print, on rank 0 only."""
    if RANK == 0:
        print(*args, **kwargs, flush=True)

QUIET = RANK > 0 # where all ranks meet the same error, one says so
def die(message):
    """End the program for a mistake of its user: one line (from rank 0), exit code 1, no traceback."""
    raise SystemExit(1 if QUIET else f'error: {message}')

def on_error(kind, value, trace, default=sys.excepthook):
    """One line instead of a traceback for what is no error of the program: Ctrl-C, disks, memory, divergence."""
    text = str(value)
    if kind is KeyboardInterrupt:
        text = '\nstopped; nothing is half-written, the same command starts again'
    elif isinstance(value, OSError) and value.filename:
        text = f'error: {value.filename}: {value.strerror}'
    elif isinstance(value, MemoryError) or re.search('out of memory|allocate memory', text):
        text = 'error: out of memory: lower --batch_size or --micro_batch_size, or take a smaller model'
    elif 'probability tensor' in text:
        text = 'error: the model no longer gives probabilities, its weights are not finite: lower --learning_rate'
    elif kind is not BrokenPipeError: # whoever reads our output through a pipe may leave
        return default(kind, value, trace)
    print(text, file=sys.stderr)

sys.excepthook = on_error
signal.signal(signal.SIGTERM, lambda *_: die('terminated; nothing is half-written, the same command starts again'))

@contextlib.contextmanager
def atomic(path):
    """`with atomic('x') as tmp:` write to tmp; it becomes x only when whole. A crash leaves the old x as it was."""
    tmp = f'{path}.{os.getpid()}.partial'
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        yield tmp
        os.replace(tmp, path)
    except OSError as e:
        die(f'cannot write {path}: {e.strerror or e}')
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)

def read_jsonl(path, raw=None):
    """
    Yield (line number, object) of a .jsonl or .jsonl.gz file; a bad line ends the program with its place.
    raw: a .gz that the caller has opened; its raw.tell() says how far we are.
    """
    number = 0
    try:
        with (gzip.open if str(path).endswith('.gz') else open)(raw or path, 'rt', encoding='utf-8-sig') as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f'a JSON object is expected, this is {type(row).__name__}')
                    yield number, row
    except FileNotFoundError:
        die(f'no file {path}')
    except UnicodeDecodeError as e:
        die(f'{path}: after line {number}: not UTF-8 ({e.reason})')
    except (ValueError, RecursionError) as e:
        die(f'{path}:{number}: not a JSON line: {e}')
    except (OSError, EOFError, zlib.error) as e:
        die(f'{path}: after line {number}: the file is damaged ({e})')

def write_jsonl(path, rows):
    """Write objects one a line, whole or not at all; .gz by name, without a time stamp: same rows, same bytes."""
    with atomic(path) as tmp, open(tmp, 'wb') as raw, contextlib.ExitStack() as stack:
        out = stack.enter_context(gzip.GzipFile('', 'wb', 6, raw, mtime=0)) if str(path).endswith('.gz') else raw
        for row in rows:
            out.write((json.dumps(row, ensure_ascii=False) + '\n').encode('utf-8', 'replace'))

def write_texts(folder, texts):
    """Write {file name: text} into a folder, each file whole or not at all."""
    for name, text in texts.items():
        with atomic(os.path.join(folder, name)) as tmp, open(tmp, 'w', encoding='utf-8', newline='') as f:
            f.write(text)

SHARD_FORMS = {20240520: (1, np.uint16), 20240801: (7, np.uint32)} # magic: version, dtype; llm.c and modded-nanogpt

def read_shard(path, tok_hash=0):
    """Token shard -> read-only memory map of its tokens. A hash of 0, here or there, means unknown: not compared."""
    again = f'run `python tokenizer.py --data_dir={os.path.dirname(path)}` again'
    try:
        header = np.fromfile(path, dtype='<i4', count=256)
    except OSError as e:
        die(f'cannot read {path}: {e.strerror}')
    if len(header) < 256 or header[0] not in SHARD_FORMS or header[1] != SHARD_FORMS[header[0]][0]:
        die(f'{path} is no token shard (bad header): {again}')
    dtype = np.dtype(SHARD_FORMS[header[0]][1])
    has, says = (os.path.getsize(path) - 1024) / dtype.itemsize, int(header[2])
    if has != says:
        die(f'{path} is damaged: its header says {says:,} tokens, it holds {has:,.1f}: {again}')
    if tok_hash and header[3] and header[3] != tok_hash:
        die(f'{path} was written with another tokenizer than the one in use: {again}')
    return np.memmap(path, dtype=dtype, mode='r', offset=1024, shape=(says,)) if says else np.zeros(0, dtype)

def write_shard(path, ids, tok_hash):
    """Token shard: a header of 256 int32 (magic, version, number of tokens, hash of the tokenizer), then the tokens."""
    magic, version = next((magic, form[0]) for magic, form in SHARD_FORMS.items() if form[1] == ids.dtype)
    with atomic(path) as tmp, open(tmp, 'wb') as f:
        f.write(np.array([magic, version, len(ids), tok_hash] + [0] * 252, '<i4').tobytes())
        f.write(ids.data)

# -----------------------------------------------------------------------------
# 2. the tokenizer and chat form

SPECIAL_TOKENS = ['<|endoftext|>', '<|system|>', '<|user|>', '<|assistant|>', '<|end|>', '<|pad|>']

class Tokenizer:
    """A tiktoken encoding made from tokenizer.json, and the way a conversation is spelled in tokens."""

    def __init__(self, spec):
        try:
            self.tokens = [base64.b64decode(t, validate=True) for t in spec['ranks']]
            if spec['kind'] not in ('bpe', 'char', 'gpt2') or spec['special_tokens'] != SPECIAL_TOKENS:
                raise ValueError('of another kind, or with other special tokens')
            if spec['kind'] != 'char' and not {bytes([b]) for b in range(256)} <= set(self.tokens):
                raise ValueError('not every byte is a token')
            if len({b'', *self.tokens}) != len(self.tokens) + 1:
                raise ValueError('a token is empty or there twice')
            specials = {name: len(self.tokens) + i for i, name in enumerate(spec['special_tokens'])}
            self.enc = tiktoken.Encoding('ours', pat_str=spec['pattern'], special_tokens=specials,
                                         mergeable_ranks={t: i for i, t in enumerate(self.tokens)})
            self.eot, self.system, self.user, self.assistant, self.end, self.pad = (specials[s] for s in SPECIAL_TOKENS)
            self.n_vocab = spec.get('n_vocab', len(self.tokens) + len(specials)) # padded, of GPT-2
            if type(self.n_vocab) is not int or not 0 <= self.n_vocab - len(self.tokens) - len(specials) < 2**16:
                raise ValueError(f'n_vocab = {self.n_vocab} of {len(self.tokens)} tokens')
        except (KeyError, TypeError, ValueError) as e: # binascii.Error is a ValueError
            raise ValueError(f'damaged tokenizer ({type(e).__name__}: {e})') from e
        self.spec, self.decode = spec, self.enc.decode # ids -> text; bytes that are no valid UTF-8 become U+FFFD
        self.hash = int(hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:8], 16) & 0x7fffffff

    @classmethod
    def load(cls, path):
        """Read tokenizer.json; missing or damaged ends the program with the command that makes it."""
        try:
            with open(path, encoding='utf-8') as f:
                return cls(json.load(f))
        except FileNotFoundError:
            die(f'no tokenizer {path}: make it with `python tokenizer.py --data_dir={os.path.dirname(path)}`')
        except ValueError as e: # json.JSONDecodeError is one too
            die(f'{path}: {e}: make it again with `python tokenizer.py --data_dir={os.path.dirname(path)}`')

    def encode(self, text):
        """Text -> ids. Text that spells a special token gives ordinary tokens: users cannot inject turns."""
        return self.enc.encode_ordinary(text)

    def bytes_of(self, i):
        """The bytes of one token; a special token has none (it is no text)."""
        return self.tokens[i] if i < len(self.tokens) else b''

    def said(self, ids):
        """The text of an answer: special tokens are no text, and the space before its first word is no part of it."""
        return b''.join(map(self.bytes_of, ids)).decode('utf-8', 'replace').strip()

    def render(self, messages, prompt=False):
        """
        Messages -> (ids, mask); mask is 1 on what the assistant says, its <|end|> included: the tokens to learn.
            <|endoftext|> <|user|>Hi<|end|> <|assistant|>Hello!<|end|>
                  0          0    0   0         0          1     1
        With prompt=True it ends after <|assistant|>, ready to be answered. Raises ValueError on a bad conversation.
        """
        openers = dict(system=self.system, user=self.user, assistant=self.assistant)
        try:
            turns = [(turn['role'], openers[turn['role']], turn['content'] + '') for turn in messages]
        except (KeyError, TypeError):
            raise ValueError('messages are not a list of {"role": system|user|assistant, "content": text}') from None
        order = ' '.join(role for role, _, _ in turns)
        if not re.fullmatch('(system )?user( assistant user)*' + ' assistant' * (not prompt), order):
            raise ValueError(f'turns are of {order or "nobody"}: user and assistant take turns, the last one is of the '
                             + ('user' if prompt else 'assistant'))
        ids, mask = [self.eot], [0]
        for role, opener, text in turns:
            said = self.encode(' ' + text) if text else [] # a space, as in running text: a word is one token everywhere
            learn = int(role == 'assistant')
            ids += [opener, *said, self.end]
            mask += [0] + [learn] * (len(said) + 1)
        return (ids + [self.assistant], mask + [0]) if prompt else (ids, mask)

def read_prompts(path, tok, data_dir, ranked=False):
    """Yield (row, ids) of each prompt in a file; a bad row, or with ranked one without checks, ends the program."""
    if not os.path.exists(path):
        die(f'no prompts {path}: make them with `python prepare_data.py --data_dir={data_dir}`')
    for line, row in read_jsonl(path):
        try:
            ids = tok.render(row.get('messages'), prompt=True)[0]
            if ranked or row.get('checks'):
                grade(row.get('checks') or {}, 'a 1')
        except ValueError as e:
            die(f'{path}:{line}: {e}' + '; without checks no program can rank answers: --sample_prompts=0' * ranked)
        yield row, ids

# -----------------------------------------------------------------------------
# 3. the GPT

@dataclass
class GPTConfig:
    arch: str = 'gpt2'           # gpt2: LayerNorm, learned positions, GELU; llama: RMSNorm, rotary, gated MLP
    vocab_size: int = 50257
    block_size: int = 1024       # the longest text it can see, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0           # heads of keys and values (grouped-query attention); 0 = n_head
    n_embd: int = 768
    n_hidden: int = 0            # width of the MLP; 0 = 4 C (gpt2) or 8/3 C rounded up to a multiple of 32 (llama)
    dropout: float = 0.0
    tie_embeddings: bool = True  # input and output embedding are one matrix
    qk_norm: bool = False        # RMSNorm on queries and keys: attention logits stay bounded at high learning rates
    key_shift: bool = False      # half of the heads know a key by the token before it: copying takes one layer, not two
    smear: int = 0               # an embedding also holds, in a learned mix, those of as many tokens before it
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_hidden = self.n_hidden or (4 * self.n_embd if self.arch == 'gpt2' else -(-8 * self.n_embd // 96) * 32)
        if self.arch not in ('gpt2', 'llama'):
            die(f"arch is 'gpt2' or 'llama', not {self.arch!r}")
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head:
            die(f'n_embd {self.n_embd} must be a multiple of n_head {self.n_head}, that of n_kv_head {self.n_kv_head}')
        if self.key_shift and self.n_kv_head < 2:
            die('key_shift needs two heads of keys or more: it shifts half of them')
        if self.arch == 'llama' and self.n_embd // self.n_head % 2:
            die(f'rotary positions need an even head width, n_embd / n_head is {self.n_embd // self.n_head}')

def make_norm(c):
    return nn.LayerNorm(c.n_embd, eps=c.norm_eps) if c.arch == 'gpt2' else nn.RMSNorm(c.n_embd, eps=c.norm_eps)

class Attention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017), with grouped keys and values (Ainslie et al. 2023)."""

    def __init__(self, c):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = c.n_head, c.n_kv_head, c.n_embd // c.n_head
        self.dropout, self.qk_norm, self.key_shift = c.dropout, c.qk_norm, c.key_shift
        self.qkv = nn.Linear(c.n_embd, (c.n_head + 2 * c.n_kv_head) * self.head_dim, bias=c.arch == 'gpt2')
        self.proj = nn.Linear(c.n_embd, c.n_embd, bias=c.arch == 'gpt2')

    def forward(self, x, pos, rope, mask, cache, layer):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)      # (B, H + 2 H_kv, T, D)
        qk, v = qkv.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=1)
        if self.qk_norm:
            qk = F.rms_norm(qk, (self.head_dim,))
        q, k = qk.split([self.n_head, self.n_kv_head], dim=1)
        if self.key_shift:
            half = self.n_kv_head // 2
            first = torch.zeros_like(k[:, :, :1]) if cache is None else cache.last_key(layer, k)
            before = torch.cat((first, k[:, :, :-1]), dim=2) * (pos > 0).view(-1, 1, T, 1)  # nothing is before a text
            k = torch.cat((k[:, :half], before[:, half:]), dim=1)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(layer, k, v)                                      # (B, H_kv, S, D)
        if self.n_kv_head != self.n_head:
            k, v = (t.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                                           dropout_p=self.dropout if self.training else 0.0,
                                           # normed queries and keys: scores within +-12, enough to single out a token
                                           scale=12 / self.head_dim if self.qk_norm else None)
        y = self.proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)

def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021): turn each pair (x1, x2) by an angle that grows with its position."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin).type_as(x)    # (B, H, T, D)

class MLP(nn.Module):
    """gpt2: GELU(x W) W'. llama: SiLU(x W_gate) * (x W_up) W' (Shazeer 2020), gate and up in one matrix."""

    def __init__(self, c):
        super().__init__()
        self.gated, self.dropout = c.arch == 'llama', c.dropout
        self.up = nn.Linear(c.n_embd, (1 + self.gated) * c.n_hidden, bias=c.arch == 'gpt2')
        self.proj = nn.Linear(c.n_hidden, c.n_embd, bias=c.arch == 'gpt2')

    def forward(self, x):
        h = self.up(x)
        if self.gated:
            gate, h = h.chunk(2, dim=-1)
            h = F.silu(gate) * h
        else:
            h = F.gelu(h, approximate='tanh')
        return F.dropout(self.proj(h), self.dropout, self.training)

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = make_norm(c), Attention(c), make_norm(c), MLP(c)

    def forward(self, x, pos, rope, mask, cache, layer):
        x = x + self.attn(self.norm1(x), pos, rope, mask, cache, layer)
        return x + self.mlp(self.norm2(x))

class GPT(nn.Module):
    """The language model. model(idx) gives logits; model.hidden(idx) the normed vectors under them."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = nn.Embedding(c.block_size, c.n_embd) if c.arch == 'gpt2' else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = make_norm(c)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.smear:
            self.smear = nn.Parameter(torch.zeros(c.smear, c.n_embd))
        if c.tie_embeddings:
            self.head.weight = self.wte.weight
        if c.arch == 'llama':
            half = c.n_embd // c.n_head // 2
            rates = c.rope_theta ** (-torch.arange(half).float() / half)
            angles = torch.outer(torch.arange(c.block_size).float(), rates)
            self.register_buffer('cos', angles.cos().repeat(1, 2), persistent=False)                  # (block_size, D)
            self.register_buffer('sin', torch.cat((-angles.sin(), angles.sin()), 1), persistent=False)
        self.init_weights()

    def init_weights(self):
        """
        embeddings, output    N(0, 0.02): logits start near 0, the loss near ln(V)
        matrices              N(0, 0.02) in gpt2; N(0, 1/sqrt(fan in)) in llama
        into the residual     gpt2: divided by sqrt(2 n_layer), so that the sum of all blocks keeps its size;
                              llama: 0, every block starts as the identity
        biases and smear 0, norms 1
        with key_shift, keys start as queries do, so that like attends to like (Trockman and Kolter 2023)
        """
        for name, p in self.named_parameters():
            if p.dim() < 2 or name == 'smear':
                nn.init.constant_(p, float('norm' in name and name.endswith('weight')))
            elif self.config.arch == 'gpt2' or not name.startswith('blocks'):
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * self.config.n_layer) if 'proj' in name else 1))
            else:
                nn.init.normal_(p, std=0.0 if 'proj' in name else p.size(1) ** -0.5)
        for attn in (block.attn for block in self.blocks) if self.config.key_shift else ():
            w = attn.qkv.weight.data.view(-1, attn.head_dim, self.config.n_embd)              # (H + 2 H_kv, D, C)
            w[attn.n_head:-attn.n_kv_head] = w[:attn.n_head:attn.n_head // attn.n_kv_head]

    def embed(self, idx, pos, cache=None):
        """idx (B, T), pos (T,) or (B, T) -> (B, T, C)."""
        T, K = idx.size(1), self.config.smear
        x = self.wte(idx) + (0 if self.wpe is None else self.wpe(pos))
        if K: # short-range context from the start: the first layer need not gather it
            idx = torch.cat((idx.new_zeros(len(idx), K) if cache is None else cache.last_ids, idx), dim=1)
            for j in range(1, K + 1):
                x = x + self.smear[j - 1] * self.wte(idx[:, K - j:K - j + T]) * (pos >= j)[..., None]
            x = F.rms_norm(x, x.shape[-1:])
            if cache is not None:
                cache.last_ids = idx[:, -K:]
        return F.dropout(x, self.config.dropout, self.training)

    def rope(self, pos):
        """Cosines and sines for `rotate`, (1 or B, 1, T, D) each; None in gpt2."""
        if self.config.arch == 'llama':
            return [t[pos].view(-1, 1, pos.size(-1), t.size(1)) for t in (self.cos, self.sin)]

    def hidden(self, idx, pos=None, mask=None, cache=None):
        """idx (B, T) -> (B, T, C). pos (B, T): positions where rows are padded left; mask (B, S): True at real keys."""
        T, start = idx.size(1), cache.n if cache is not None else 0
        S = start + T
        if S > self.config.block_size:
            raise ValueError(f'{S} tokens do not fit in a block_size of {self.config.block_size}')
        pos = torch.arange(start, S, device=idx.device) if pos is None else pos   # (T,) or (B, T)
        x, rope = self.embed(idx, pos, cache), self.rope(pos)
        if mask is not None or 0 < start < S - 1: # else plain causal attention, or one query that may see all keys
            seen = torch.ones(T, S, dtype=torch.bool, device=idx.device).tril(start)  # (T, S)
            if mask is not None:
                # a query that is padding itself sees only itself: a row with no key at all would give NaN
                seen = seen & mask[:, None, :] | torch.eye(T, S, dtype=torch.bool, device=idx.device).roll(start, 1)
                seen = seen[:, None]                                              # (B, 1, T, S)
            mask = seen
        for layer, block in enumerate(self.blocks):
            x = block(x, pos, rope, mask, cache, layer)
        if cache is not None:
            cache.n = S
        return self.norm(x)

    def forward(self, idx, pos=None, mask=None, cache=None):
        """idx (B, T) -> logits (B, T, V); logits at t predict the token at t + 1."""
        return self.head(self.hidden(idx, pos, mask, cache))

    def n_params(self, embedding=True):
        """Number of parameters; embedding=False leaves out embeddings, as scaling laws count (Kaplan et al. 2020)."""
        skip = () if embedding else ('wte', 'wpe', 'smear', 'head')
        return sum(p.numel() for n, p in self.named_parameters() if not n.startswith(skip))

    def flops_per_token(self, T):
        """Forward and backward: 6 N + 12 L C T (Chowdhery et al. 2022), N with the output matrix, without lookups."""
        output = 0 if self.head is None else self.head.weight.numel()
        return 6 * (self.n_params(embedding=False) + output) + 12 * self.config.n_layer * self.config.n_embd * T

# -----------------------------------------------------------------------------
# 4. generation with a KV cache

class KVCache:
    """Keys and values of the tokens seen so far; room for all that are to come is taken at the start."""

    def __init__(self, config, batch, length, device, dtype):
        heads = config.n_kv_head, length, config.n_embd // config.n_head
        self.kv, self.n = torch.zeros(config.n_layer, 2, batch, *heads, device=device, dtype=dtype), 0
        self.last = torch.zeros_like(self.kv[:, 0, :, :, :1]) # of key_shift: each layer's last key, not yet shifted
        self.last_ids = torch.zeros(batch, config.smear, device=device, dtype=torch.long)

    def last_key(self, layer, k):
        before = self.last[layer].clone()
        self.last[layer] = k[:, :, -1:]
        return before

    def keep(self, rows):
        self.kv, self.last, self.last_ids = self.kv[:, :, rows], self.last[:, rows], self.last_ids[rows]

    def append(self, layer, k, v):
        S = self.n + k.size(2)
        self.kv[layer, 0, :, :, self.n:S] = k
        self.kv[layer, 1, :, :, self.n:S] = v
        return self.kv[layer, 0, :, :, :S], self.kv[layer, 1, :, :, :S]

def draw(probs):
    """probs (B, V), not necessarily normed -> (B, 1), one id each. multinomial would draw B x V random numbers."""
    cdf = probs.double().cumsum(-1) if probs.device.type != 'mps' else probs.cumsum(-1)
    if not cdf[:, -1].isfinite().all():
        raise RuntimeError('probability tensor with inf or nan') # on_error says what it means
    u = torch.rand_like(cdf[:, :1]) * cdf[:, -1:] * (1 - 1e-7) # never all of it: what is cut off cannot be drawn
    return torch.searchsorted(cdf, u, right=True).clamp(max=probs.size(-1) - 1)

@torch.no_grad()
def generate(model, prompts, max_new_tokens, stop=None, temperature=1.0, warp=None, on_token=None):
    """
    Continue each prompt (a list of ids) by up to max_new_tokens ids; returns the new ids, with `stop` where it came.
    Rows of unequal length are padded on the left, so that all grow at the right edge; ended rows leave by quarters.
    temperature 0 is greedy; warp (B, V) -> (B, V) may change the probabilities, on_token gets each step's new ids.
    A prompt that leaves no room in the context loses its oldest tokens, and a line says so.
    """
    device, size = model.wte.weight.device, model.config.block_size
    max_new_tokens = min(max_new_tokens, size - 1)
    room, longest = size - max_new_tokens, max(map(len, prompts))
    if longest > room:
        print0(f'prompt of {longest} tokens: the last {room} fit beside {max_new_tokens} new ones', file=sys.stderr)
    rows, P = [p[-room:] for p in prompts], min(longest, room)
    idx = torch.tensor([[0] * (P - len(r)) + r for r in rows], device=device)     # (B, P)
    start = torch.tensor([P - len(r) for r in rows], device=device)      # (B,) padding before a row
    mask = torch.arange(size, device=device) >= start[:, None]                    # (B, block_size)
    padded = bool((start > 0).any())
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.wte.weight.dtype
    cache = KVCache(model.config, len(rows), P + max_new_tokens, device, dtype)
    out, alive = [[] for _ in rows], torch.arange(len(rows), device=device)
    done = torch.zeros(len(rows), dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        S = cache.n + idx.size(1)
        pos = (torch.arange(cache.n, S, device=device) - start[:, None]).clamp(min=0) if padded else None
        x = model.hidden(idx, pos, mask[:, :S] if padded else None, cache)
        logits = model.head(x[:, -1]).float()                                     # (B, V)
        if temperature == 0:
            idx = logits.argmax(-1, keepdim=True)                                 # (B, 1)
        else:
            probs = F.softmax(logits / temperature, dim=-1)
            idx = draw(warp(probs) if warp else probs)                            # (B, 1)
        new = idx[~done, 0].tolist()
        for row, token in zip(alive[~done].tolist(), new):
            out[row].append(token)
        if on_token is not None:
            on_token(new)
        done |= idx[:, 0] == (-1 if stop is None else stop)
        if done.all():
            break
        if 4 * done.sum() >= len(done): # enough rows have ended to be worth a copy of the cache without them
            cache.keep(~done)
            idx, alive, start, mask, done = (t[~done] for t in (idx, alive, start, mask, done))
    return out

# -----------------------------------------------------------------------------
# 5. the scalar head: reward model and critic

class ScalarModel(nn.Module):
    """A GPT body with one number per position instead of logits; score = (head - mean) / std."""

    def __init__(self, config):
        super().__init__()
        self.config, self.body = config, GPT(config)
        self.body.head = None # no logits here; an unused matrix would also stall DDP
        self.head = nn.Linear(config.n_embd, 1)
        nn.init.normal_(self.head.weight, std=(config.n_embd + 1) ** -0.5) # Stiennon et al. 2020
        nn.init.zeros_(self.head.bias)
        self.register_buffer('mean', torch.zeros(()))
        self.register_buffer('std', torch.ones(()))

    def forward(self, idx):
        """idx (B, T) -> (B, T). Pads stand on the right, where causal attention keeps them from being seen."""
        h = self.body.hidden(idx).float() # in fp32 also under autocast: bf16 would round scores to three digits
        return ((h * self.head.weight).sum(-1) + self.head.bias - self.mean) / self.std

def pad_right(rows, pad, device=None):
    """List of lists of ids -> (B, T) tensor."""
    T = max(map(len, rows))
    return torch.tensor([r + [pad] * (T - len(r)) for r in rows], device=device)

def at_end(values, rows):
    """values (B, T) of rows (lists of ids) that were padded on the right -> (B,), each row's at its last real token."""
    return values[torch.arange(len(rows)), torch.tensor([len(r) - 1 for r in rows])]

# -----------------------------------------------------------------------------
# 6. optimizers

class Muon(torch.optim.Optimizer):
    """
    torch.optim.Muon (Jordan et al. 2024) for CPUs: the same update, matrices of one shape in one batch, in fp32, since
    bf16, which torch has, takes a CPU without bf16 units longer than all the rest of the step.
    """
    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, decay, momentum = group['lr'], group['weight_decay'], group['momentum']
            for shape in dict.fromkeys(p.shape for p in group['params']):
                params = [p for p in group['params'] if p.shape == shape]
                bufs = [self.state[p].setdefault('momentum_buffer', torch.zeros_like(p)) for p in params]
                for p, buf in zip(params, bufs):
                    buf.lerp_(p.grad, 1 - momentum)
                grad, buf = torch.stack([p.grad for p in params]), torch.stack(bufs)       # (matrices, n, m)
                for p, update in zip(params, orthogonalize(grad.lerp(buf, momentum))): # Nesterov
                    p.mul_(1 - lr * decay).add_(update, alpha=-lr * 0.2 * math.sqrt(max(shape))) # sized as AdamW's

def orthogonalize(x):
    """
    Newton-Schulz: U S V' -> about U V', all singular values near 1, by products alone. x (matrices, n, m).
    Five times x <- p x with p = a + b xx' + c (xx')^2; all of it can be done on the small square xx' <- p xx' p.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    flip = x.size(1) > x.size(2)
    x = x.mT if flip else x
    xx, q = x @ x.mT, None
    for _ in range(5):
        p = torch.baddbmm(xx, xx, xx, beta=b, alpha=c)
        p.diagonal(dim1=1, dim2=2).add_(a)
        xx, q = p @ (p @ xx), p if q is None else p @ q
    x = q @ x
    return x.mT if flip else x

def make_optimizers(model, learning_rate, weight_decay, betas, eps=1e-8, kind='adamw', momentum=0.95):
    """
    Matrices decay, vectors (norms, biases) do not (Brown et al. 2020). With kind 'muon' the matrices inside the blocks
    go to Muon, at the same learning rate, since its update is scaled to the size of AdamW's.
    """
    if kind not in ('adamw', 'muon'):
        die(f"optimizer is 'adamw' or 'muon', not {kind!r}")
    matrices, vectors, inner = [], [], []
    for name, p in model.named_parameters():
        (vectors if p.dim() < 2 else inner if kind == 'muon' and 'blocks.' in name else matrices).append(p)
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
    device = next(model.parameters()).device.type
    optimizers = [torch.optim.AdamW(groups, learning_rate, betas, eps, fused=device in ('cuda', 'cpu'))]
    if inner and device == 'cuda':
        optimizers.append(torch.optim.Muon(inner, learning_rate, weight_decay, momentum,
                                           adjust_lr_fn='match_rms_adamw'))
    elif inner:
        optimizers.append(Muon(inner, learning_rate, weight_decay, momentum))
    return optimizers

# -----------------------------------------------------------------------------
# 7. devices and processes, checkpoints

AT_LEAST_1 = ('batch_size minibatch_size micro_batch_size gradient_accumulation_steps sample_answers sample_batch '
              'epochs max_iters tokens_per_param ppo_epochs n_layer n_head n_embd block_size max_new_tokens eval_iters '
              'eval_prompts eval_interval log_interval save_interval sample_interval kl_horizon shard_bytes n_files '
              'max_epochs n_people n_pages n_books n_lessons n_chat n_preferences n_val').split()

def check_settings(config):
    """Refuse numbers that no stage can work with: negative ones, shares of more than everything, nothing held out."""
    for name, value in config.items():
        least = name in AT_LEAST_1 and not (name == 'max_iters' and 'tokens_per_param' in config)
        if isinstance(value, (int, float)) and not value >= least: # `not >=`: NaN too
            die(f'{name} must be at least {int(least)}, not {value}')
        below = name in ('dropout', 'beta1', 'beta2', 'momentum', 'val_fraction', 'val_facts')
        none = name in ('val_fraction', 'val_facts') and value == 0
        if none or below and value >= 1 or name in ('flaw_rate', 'like_rate') and value > 1:
            die(f'{name} is a share and lies in 0..1, not at {value}')
    if config['seed'] >= 2**32 or 0 < config.get('temperature', 1) < 0.01:
        die(f"seed is below 2**32, not {config['seed']}; temperature is 0 or at least 0.01")

def start(config, fp16=False):
    """
    Find device, precision, process group (torchrun sets RANK, LOCAL_RANK, WORLD_SIZE); seed torch; refuse bad settings.
    Returns device, type, dtype, rank, world, ddp, master, autocast (use as `with run.autocast():`), stop (see below).
    """
    check_settings(config)
    device, dtype = config['device'], config['dtype']
    rank, local, world = RANK, int(os.environ.get('LOCAL_RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    here = ['cuda'] * torch.cuda.is_available() + ['mps'] * torch.backends.mps.is_available() + ['cpu'] # best first
    device = here[0] if device == 'auto' else device
    kind, _, number = device.partition(':')
    if kind not in here or kind == 'cuda' and number.isdigit() and int(number) >= torch.cuda.device_count():
        die(f"device {device!r} is not here: use --device=cpu, or leave it at 'auto'")
    if world > 1:
        device = f'cuda:{local}' if kind == 'cuda' else device
        if not dist.is_initialized():
            dist.init_process_group('nccl' if kind == 'cuda' else 'gloo')
    if kind == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high') # TF32
    elif world == 1 and 'OMP_NUM_THREADS' not in os.environ: # all that this process may use (taskset, Slurm)
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())
    old = kind == 'cuda' and not torch.cuda.is_bf16_supported(including_emulation=False) # T4, V100: it would be slow
    if dtype == 'auto': # fp16 needs loss scaling, which only pretrain.py has
        dtype = 'float32' if kind != 'cuda' or old and not fp16 else 'float16' if old else 'bfloat16'
    if dtype not in ('float32', 'bfloat16') + ('float16',) * fp16:
        die(f"dtype is 'auto', 'float32', 'bfloat16' or, in pretrain.py, 'float16', not {dtype!r}")
    torch.manual_seed(config['seed'])
    config['processes'] = world # a killed run goes on with as many as it had: the batches depend on it
    run = SimpleNamespace(device=torch.device(device), type=kind, dtype=getattr(torch, dtype), rank=rank, world=world,
                          ddp=world > 1, master=rank == 0, stop=False)
    run.autocast = lambda: torch.autocast(kind, run.dtype, enabled=dtype != 'float32')

    def on_signal(number, frame): # finish the step, save, leave; a second signal ends at once
        run.stop = True
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    run.catch_signals = lambda: [signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)]
    print0(f'device: {device}, {dtype}, {world} process{"es" if world > 1 else ""}, {torch.get_num_threads()} threads')
    return run

PEAKS = dict(B200=2250, H200=989, H100=989, A100=312, L40S=362, L4=121, A10=125, T4=65, V100=125, MI300X=1307) # dense
PEAKS.update({'RTX 4090': 165, 'RTX 3090': 71}) # bf16, or fp16 where there is none, TFLOP/s, of the makers' data sheets

def peak_flops(run):
    """FLOP/s that the device can do at best: a GPU's by its name (NaN if unknown); of a CPU, what a product reaches."""
    if run.type == 'cuda':
        name = torch.cuda.get_device_name(run.device)
        return next((1e12 * peak for key, peak in PEAKS.items() if key in name), float('nan'))
    if run.type != 'cpu':
        return float('nan')
    a, best = torch.ones(768, 768), math.inf
    for _ in range(5):
        t0 = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - t0)
    return 2 * 768 ** 3 / best

def all_sum(*values):
    """Sum each number over all ranks; returns a list of floats."""
    if not dist.is_initialized():
        return [float(v) for v in values]
    device = 'cuda' if dist.get_backend() == 'nccl' else 'cpu'
    total = torch.tensor([float(v) for v in values], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()

def gather(mine, run):
    """Lists of all ranks, each with every world-th item, woven back together."""
    if not run.ddp:
        return mine
    parts = [None] * run.world
    dist.all_gather_object(parts, mine)
    return [parts[i % run.world][i // run.world] for i in range(sum(map(len, parts)))]

def seed_step(seed, step, rank):
    """All that is random in a step depends on (seed, step, rank) alone, so a resumed run needs no saved generator."""
    torch.manual_seed((seed * 1_000_003 + step) * 1_009 + rank)

def stopping(run):
    """Has any rank been told to stop (Ctrl-C, SIGTERM)? All ranks must ask at the same step."""
    return all_sum(run.stop)[0] > 0

def finish(run):
    """Leave the process group; a run that ends without it prints warnings."""
    if run.ddp:
        dist.barrier()
        dist.destroy_process_group()

def open_log(path, first_step):
    """STAGE.jsonl: returns log(step=..., loss=...), which adds a line. A resumed run drops what came after its step."""
    old = [r for _, r in read_jsonl(path) if r['step'] < first_step] if first_step and os.path.exists(path) else []
    if RANK == 0:
        write_jsonl(path, old)

    def log(**numbers):
        if RANK == 0:
            with open(path, 'a', encoding='utf-8') as f:
                f.write(json.dumps(numbers) + '\n')
    return log

def save_checkpoint(path, stage, model, tokenizer, config, step, metrics):
    """STAGE.pt: fp32 weights and plain values, enough to chat; loads with weights_only. STAGE.resume.pt has served."""
    if not all(math.isfinite(v) for v in metrics.values() if isinstance(v, float)):
        die(f'this run has diverged ({metrics}): lower --learning_rate; {path} stays as it was')
    with atomic(path) as tmp:
        torch.save(dict(stage=stage, weights={k: v.float().cpu() for k, v in model.state_dict().items()}, config=config,
                        model_args=asdict(model.config), tokenizer=tokenizer.spec, step=step, metrics=metrics), tmp)
    with contextlib.suppress(FileNotFoundError):
        os.remove(path.removesuffix('.pt') + '.resume.pt')

def load_checkpoint(path, stages, command):
    """Read STAGE.pt and check that it is one of `stages`; `command` is what would make it."""
    if not os.path.exists(path):
        die(f'no checkpoint {path}: make it with `{command}`')
    try:
        ckpt = torch.load(path, map_location='cpu', weights_only=True)
        found, *_ = ckpt['stage'], ckpt['weights'], Tokenizer(ckpt['tokenizer']), GPTConfig(**ckpt['model_args'])
    except Exception as e: # a cut or foreign file fails in many ways inside zip and pickle
        die(f'{path} is no whole checkpoint of this version ({type(e).__name__}): make it again with `{command}`')
    if found not in stages:
        die(f'{path} is a checkpoint of stage {found!r}, needed is {" or ".join(map(repr, stages))}: `{command}`')
    return ckpt

def load_model(ckpt, device, kind=GPT):
    """A GPT or ScalarModel with the checkpoint's weights. A ScalarModel made from a GPT's weights gets a fresh head."""
    model, weights = kind(GPTConfig(**ckpt['model_args'])), ckpt['weights']
    if kind is ScalarModel and 'mean' not in weights:
        body = {'body.' + k: v for k, v in weights.items() if not k.startswith('head.')}
        weights = {**model.state_dict(), **body}
    model.load_state_dict(weights)
    return model.to(device)

def pretrained(init_from, tok, block_size, dropout):
    """
    (arguments, weights) of a model to go on with: a checkpoint STAGE.pt, a folder of Hugging Face's form (config.json,
    model.safetensors), or a name on its Hub: gpt2, gpt2-medium, .. Our special tokens, where it has none, start as the
    mean of all tokens (Hewitt 2021).
    """
    import huggingface
    if init_from.endswith('.pt'):
        ckpt = load_checkpoint(init_from, ('base', 'sft', 'rlhf'), 'python pretrain.py')
        args, weights = ckpt['model_args'], ckpt['weights']
        if Tokenizer(ckpt['tokenizer']).hash != tok.hash:
            die(f'{init_from} was trained with another tokenizer than the one in data_dir')
    else:
        folder = init_from
        if not os.path.isdir(folder):
            from sources import download
            name = init_from if '/' in init_from else f'openai-community/{init_from}'
            folder = os.path.join('data/models', name)
            for file in ('config.json', 'model.safetensors'):
                download(f'https://huggingface.co/{name}/resolve/main/{file}', os.path.join(folder, file))
        try:
            args, weights = huggingface.read_model(folder)
        except (ValueError, OSError) as e:
            die(f'--init_from={init_from}: {e}')
    if block_size > args['block_size']:
        die(f"--block_size={block_size} is more than the {args['block_size']} positions of {init_from}")
    if len(tok.tokens) > args['vocab_size']:
        die(f"{init_from} knows {args['vocab_size']:,} tokens, the tokenizer in data_dir has {len(tok.tokens):,}: take "
            'that of the model (of GPT-2: `python tokenizer.py --kind=gpt2`)')
    more = max(0, tok.n_vocab - args['vocab_size'])
    for name in ('wte.weight', 'head.weight') if more else ():
        weights[name] = torch.cat((weights[name], weights[name].mean(0, keepdim=True).expand(more, -1)))
    if args['arch'] == 'gpt2':
        weights['wpe.weight'] = weights['wpe.weight'][:block_size]
    return {**args, 'vocab_size': args['vocab_size'] + more, 'block_size': block_size, 'dropout': dropout}, weights

def save_resume(path, step, modules, optimizers, config, **more):
    """STAGE.resume.pt: what a killed run needs to go on to the same numbers: weights, optimizer states, step."""
    with atomic(path) as tmp:
        torch.save(dict(step=step, modules=[m.state_dict() for m in modules], config=config, more=more,
                        optimizers=[o.state_dict() for o in optimizers]), tmp)

RESUMABLE = set('device dtype compile resume out_dir log_interval eval_interval save_interval sample_interval'.split())

def load_resume(path, modules, optimizers, config, wanted=True, free=RESUMABLE):
    """Put a killed run's state back; returns (step, more), or (0, {}) for a fresh start. Other settings: refused."""
    if not wanted or not os.path.exists(path):
        return 0, {}
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True)
        old = saved['config']
    except Exception as e:
        die(f'{path} is damaged ({type(e).__name__}): start over with --resume=false')
    changed = [k for k in config if k not in free and old.get(k) != config[k]]
    if changed:
        what = ', '.join(f'{k} {old.get(k)!r} -> {config[k]!r}' for k in changed[:3])
        die(f'{path} is of an unfinished run with other settings ({what}): start over with --resume=false')
    for part, state in zip([*modules, *optimizers], saved['modules'] + saved['optimizers']):
        part.load_state_dict(state)
    print0(f'resuming from {path} at step {saved["step"]}')
    return saved['step'], saved['more']

# -----------------------------------------------------------------------------
# 8. the gold reward

def grade(checks, text):
    """
    What a program can check of an answer -> (all checks met?, score). score = share of checks met, + 0.25 if the text
    holds one of the `likes`: taste, which counts for a labeller and for no check.
        grade({'contains': ['owl'], 'max_words': 3}, 'An owl!') -> (True, 1.0)
    """
    if not isinstance(checks, dict):
        raise ValueError(f'checks are an object, not {type(checks).__name__}')
    words, low = re.findall(r"\w+(?:['’]\w+)*", text), text.lower()
    has = lambda phrase: re.search(rf'(?<!\w){re.escape(phrase.lower())}(?!\w)', low) is not None
    plain = lambda s: s.strip().lower().rstrip('.!')
    numbers = re.findall(r'-?\d+(?:\.\d+)?', re.sub(r'(?<=\d),(?=\d{3})', '', text))
    rules = dict(
        contains=lambda v: all(map(has, v)), excludes=lambda v: not any(map(has, v)),
        equals=lambda v: plain(text) == plain(v), number=lambda v: bool(numbers) and float(numbers[-1]) == float(v),
        min_words=lambda v: len(words) >= v, max_words=lambda v: 0 < len(words) <= v,
        count=lambda v: sum(map(has, v['of'])) >= v['min'],
        starts_with=lambda v: plain(text).startswith(plain(v)), ends_with=lambda v: plain(text).endswith(plain(v)))
    hard = {k: v for k, v in checks.items() if k != 'likes'}
    unknown = set(hard) - set(rules)
    if unknown or not hard:
        raise ValueError(f'unknown check {unknown}, known are {sorted(rules)}' if unknown else 'no checks')
    try:
        met = [rules[k](v) for k, v in hard.items()]
        return all(met), sum(met) / len(met) + 0.25 * any(map(has, checks.get('likes', [])))
    except (AttributeError, KeyError, OverflowError, TypeError) as e:
        raise ValueError(f'a check has a value of the wrong kind ({e})') from e

def simulated_ranking(scores, noise, rng):
    """
    A labeller who sees each answer's gold score through noise: indices, best first. Of answers with one gold score only
    one is listed: nobody could tell them apart.
    """
    seen = np.asarray(scores) + noise * rng.standard_normal(len(scores))
    first = {s: i for i, s in reversed(list(enumerate(scores)))}
    return sorted(first.values(), key=lambda i: -seen[i])

# -----------------------------------------------------------------------------
# python model.py export out/x/sft.pt folder: for AutoModelForCausalLM, llama.cpp, vLLM

if __name__ == '__main__':
    import huggingface
    if len(sys.argv) != 4 or sys.argv[1] != 'export':
        die('python model.py export CHECKPOINT.pt FOLDER')
    ckpt = load_checkpoint(sys.argv[2], ('base', 'sft', 'rlhf'), 'python sft.py')
    tok = Tokenizer(ckpt['tokenizer'])
    try:
        os.makedirs(sys.argv[3], exist_ok=True)
        huggingface.model_files(sys.argv[3], ckpt['model_args'], ckpt['weights'], tok)
        write_texts(sys.argv[3], huggingface.tokenizer_files(tok))
    except ValueError as e:
        die(e)
    print0(f'wrote {sys.argv[3]}: ' + ', '.join(sorted(os.listdir(sys.argv[3]))))
