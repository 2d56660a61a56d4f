"""
The files of Hugging Face's libraries, written and read: tokenizer.json and its companions, model.safetensors and
config.json. A part of tokenizer.py (--export), of model.py (`python model.py export`) and of pretrain.py (--init_from).
Ids and text are those of ours, but for two things: a text that spells a special token makes one there, never here; and
their engine may read a pattern of your own in another way (gpt4 and gpt2: the same).
"""
import base64, json, math, os, re
import numpy as np
import torch
from bpe import BYTES, merge

# -----------------------------------------------------------------------------
# the tokenizer

# Their vocabularies are text: every byte has a printable character, 'Ġ' is the blank.
CHARS = {b: chr(b) if i < 188 else chr(256 + i - 188) for i, b in enumerate(BYTES)}

# A turn as Tokenizer.render spells it.
CHAT_TEMPLATE = ("{{ '<|endoftext|>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
                 "{% if m['content'] %}{{ ' ' + m['content'] }}{% endif %}{{ '<|end|>' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")

def merges_of(tokens):
    """The two parts of every token of several bytes: what is left of it when only the tokens before it may be used."""
    ranks, merges = {}, []
    for i, token in enumerate(tokens):
        if len(token) > 1:
            *_, (parts, _, _) = merge(token, ranks)
            if len(parts) != 2:
                raise ValueError(f'token {i}, {token}, is not made of two tokens before it')
            merges.append(parts)
        ranks[token] = i
    return merges

def tokenizer_files(tok):
    """A Tokenizer -> {file name: its text}, for `tokenizers`, `transformers` (AutoTokenizer) and tiktoken."""
    char = tok.spec['kind'] == 'char'
    spell = bytes.decode if char else lambda token: ''.join(CHARS[b] for b in token)
    vocab = {spell(token): i for i, token in enumerate(tok.tokens)}
    level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=False)
    pattern = re.sub(r'\\U(.{8})', r'\\x{\1}', tok.spec['pattern']) # how their engine spells a character
    split = dict(type='Split', pattern=dict(Regex=pattern), invert=char,
                 behavior='Removed' if char else 'Isolated') # of char, what is no character of the table goes
    added = [dict(id=len(vocab) + i, content=name, special=True, single_word=False, lstrip=False, rstrip=False,
                  normalized=False) for i, name in enumerate(tok.spec['special_tokens'])]
    if char: # no merges: a table of characters
        model = dict(type='WordLevel', vocab=vocab, unk_token='')
    else:
        model = dict(type='BPE', vocab=vocab, merges=[' '.join(map(spell, parts)) for parts in merges_of(tok.tokens)],
                     dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                     fuse_unk=False, byte_fallback=False, ignore_merges=False)
    spec = dict(version='1.0', truncation=None, padding=None, added_tokens=added, normalizer=None, model=model,
                pre_tokenizer=split if char else dict(type='Sequence', pretokenizers=[split, level]),
                decoder=dict(type='Fuse') if char else level, post_processor=None)
    more = dict(tokenizer_class='PreTrainedTokenizerFast', bos_token='<|endoftext|>', eos_token='<|end|>',
                pad_token='<|pad|>', clean_up_tokenization_spaces=False, chat_template=CHAT_TEMPLATE)
    ranks = [f'{base64.b64encode(token).decode()} {i}\n' for i, token in enumerate(tok.tokens)]
    return {'tokenizer.json': json.dumps(spec, ensure_ascii=False, indent=1), 'tokenizer.tiktoken': ''.join(ranks),
            'tokenizer_config.json': json.dumps(more, indent=1)}

# -----------------------------------------------------------------------------
# safetensors: 8 bytes, the length of the header; the header, JSON: dtype, shape and place of each tensor; the numbers

DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64,
              I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8, BOOL=torch.bool)

def read_safetensors(path):
    """-> {name: tensor}, mapped from the disk. ValueError where the header says what the size of the file denies."""
    size = os.path.getsize(path)
    with open(path, 'rb') as f:
        n = int.from_bytes(f.read(8), 'little')
        if not 2 <= n <= size - 8:
            raise ValueError(f'its header would have {n:,} bytes, the file has {size:,}: not whole, or no safetensors')
        try:
            header = json.loads(f.read(n))
            header.pop('__metadata__', None)
            places = [(*map(int, t['data_offsets']), name, DTYPES[t['dtype']], [*map(int, t['shape'])])
                      for name, t in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise ValueError(f'its header cannot be read ({type(e).__name__}: {e})') from None
    data, end, tensors = np.memmap(path, np.uint8, 'c')[8 + n:], 0, {}
    for first, last, name, dtype, shape in sorted(places, key=lambda place: place[:2]):
        need = math.prod(shape) * dtype.itemsize
        if first != end or last - first != need or last > len(data) or min(shape, default=0) < 0:
            raise ValueError(f'{name}, {shape}, needs {need:,} bytes and is said to be at {first:,}..{last:,}; the '
                             f'tensor before it ends at {end:,}, the file at {len(data):,}')
        part = torch.from_numpy(data[first:last]) if need else torch.empty(0, dtype=torch.uint8)
        tensors[name], end = part.view(dtype).view(shape), last
    if end != len(data):
        raise ValueError(f'{len(data) - end:,} bytes belong to no tensor')
    return tensors

def write_safetensors(path, tensors):
    """Writes fp32 tensors; the header is padded so that the numbers begin at a multiple of 8."""
    header, at = dict(__metadata__=dict(format='pt')), 0
    for name, t in tensors.items():
        header[name] = dict(dtype='F32', shape=list(t.shape), data_offsets=[at, at + 4 * t.numel()])
        at += 4 * t.numel()
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with open(path, 'wb') as f:
        f.write(len(text).to_bytes(8, 'little') + text)
        for t in tensors.values():
            f.write(t.float().contiguous().numpy().data)

# -----------------------------------------------------------------------------
# the model: GPT2LMHeadModel and LlamaForCausalLM, whose rotary positions pair the same halves as ours

LLAMA = {'norm1': 'input_layernorm', 'attn.qkv': 'self_attn.q_proj self_attn.k_proj self_attn.v_proj',
         'attn.proj': 'self_attn.o_proj', 'norm2': 'post_attention_layernorm',
         'mlp.up': 'mlp.gate_proj mlp.up_proj', 'mlp.proj': 'mlp.down_proj'}
GPT2 = {'norm1': 'ln_1', 'attn.qkv': 'attn.c_attn', 'attn.proj': 'attn.c_proj', 'norm2': 'ln_2', 'mlp.up': 'mlp.c_fc',
        'mlp.proj': 'mlp.c_proj'}

def names_of(args):
    """Yields (our name of a weight, theirs: several where ours is one matrix of them, is theirs transposed?)."""
    yield 'wte.weight', ['transformer.wte.weight' if args['arch'] == 'gpt2' else 'model.embed_tokens.weight'], False
    if not args['tie_embeddings']:
        yield 'head.weight', ['lm_head.weight'], False
    if args['arch'] == 'llama':
        yield 'norm.weight', ['model.norm.weight'], False
    else:
        yield 'wpe.weight', ['transformer.wpe.weight'], False
        yield from ((f'norm.{w}', [f'transformer.ln_f.{w}'], False) for w in ('weight', 'bias'))
    for i in range(args['n_layer']):
        if args['arch'] == 'llama':
            for ours, theirs in LLAMA.items():
                yield f'blocks.{i}.{ours}.weight', [f'model.layers.{i}.{name}.weight' for name in theirs.split()], False
        else: # their matrices are (in, out)
            for ours, theirs in GPT2.items():
                matrix = 'norm' not in ours
                yield f'blocks.{i}.{ours}.weight', [f'transformer.h.{i}.{theirs}.weight'], matrix
                yield f'blocks.{i}.{ours}.bias', [f'transformer.h.{i}.{theirs}.bias'], False

def model_files(folder, args, weights, tok):
    """Writes config.json and model.safetensors. ValueError for what no standard class can hold."""
    if args['qk_norm'] or args['key_shift'] or args.get('smear'):
        raise ValueError('qk_norm, key_shift and smear have no place in LlamaForCausalLM or GPT2LMHeadModel: to take a '
                         'model along, train one without them')
    D = args['n_embd'] // args['n_head']
    common = dict(vocab_size=args['vocab_size'], tie_word_embeddings=args['tie_embeddings'], torch_dtype='float32',
                  bos_token_id=tok.eot, eos_token_id=tok.end, pad_token_id=tok.pad)
    if args['arch'] == 'gpt2':
        config = dict(
            architectures=['GPT2LMHeadModel'], model_type='gpt2', n_positions=args['block_size'],
            n_embd=args['n_embd'], n_layer=args['n_layer'], n_head=args['n_head'], n_inner=args['n_hidden'],
            activation_function='gelu_new', layer_norm_epsilon=args['norm_eps'], **common)
    else:
        config = dict(
            architectures=['LlamaForCausalLM'], model_type='llama', max_position_embeddings=args['block_size'],
            hidden_size=args['n_embd'], intermediate_size=args['n_hidden'], num_hidden_layers=args['n_layer'],
            num_attention_heads=args['n_head'], num_key_value_heads=args['n_kv_head'], head_dim=D, hidden_act='silu',
            rms_norm_eps=args['norm_eps'], rope_theta=args['rope_theta'], attention_bias=False, mlp_bias=False,
            **common)
    sizes, tensors = dict(qkv=[args['n_head'] * D] + [args['n_kv_head'] * D] * 2, up=[args['n_hidden']] * 2), {}
    for ours, theirs, transposed in names_of(args):
        w = weights[ours].T if transposed else weights[ours]
        parts = w.split(sizes[ours.split('.')[-2]]) if len(theirs) > 1 else [w]
        tensors.update(zip(theirs, parts))
    with open(os.path.join(folder, 'config.json'), 'w', encoding='utf-8') as f:
        json.dump(config, f, indent=1)
    write_safetensors(os.path.join(folder, 'model.safetensors'), tensors)

def read_model(folder):
    """Folder with config.json and *.safetensors -> (model_args, weights fp32). ValueError for what GPT cannot hold."""
    with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
        c = json.load(f)
    kind, rope = c.get('model_type'), c.get('rope_parameters') or {}
    known = dict(model_type=('gpt2', 'llama'), activation_function=('gelu_new', 'gelu_pytorch_tanh'),
                 hidden_act=('silu',), rope_scaling=(None,), rope_type=('default',), attention_bias=(False,),
                 mlp_bias=(False,), scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,))
    odd = [f'{key} = {value!r}' for key, value in {'model_type': None, **rope, **c}.items()
           if key in known and value not in known[key]]
    if odd:
        raise ValueError(f'{folder}/config.json: {", ".join(odd)} is nothing that GPT in model.py computes')
    try:
        if kind == 'gpt2':
            args = dict(arch='gpt2', vocab_size=c['vocab_size'], block_size=c['n_positions'], n_layer=c['n_layer'],
                        n_head=c['n_head'], n_embd=c['n_embd'], n_hidden=c.get('n_inner') or 4 * c['n_embd'],
                        n_kv_head=c['n_head'], norm_eps=c.get('layer_norm_epsilon', 1e-5))
        else:
            args = dict(arch='llama', vocab_size=c['vocab_size'], block_size=c['max_position_embeddings'],
                        n_layer=c['num_hidden_layers'], n_head=c['num_attention_heads'], n_embd=c['hidden_size'],
                        n_hidden=c['intermediate_size'], norm_eps=c['rms_norm_eps'],
                        n_kv_head=c.get('num_key_value_heads') or c['num_attention_heads'],
                        rope_theta=float(rope.get('rope_theta') or c.get('rope_theta', 10000.0)))
    except KeyError as e:
        raise ValueError(f'{folder}/config.json: {e} is missing') from None
    if (c.get('head_dim') or args['n_embd'] // args['n_head']) * args['n_head'] != args['n_embd']:
        raise ValueError(f"{folder}/config.json: {args['n_head']} heads of {c['head_dim']}, GPT needs n_embd / n_head")
    args['tie_embeddings'] = c.get('tie_word_embeddings', kind == 'gpt2')
    tensors = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith('.safetensors'):
            try:
                tensors.update(read_safetensors(os.path.join(folder, name)))
            except ValueError as e:
                raise ValueError(f'{folder}/{name}: {e}') from None
    prefix = 'transformer.' * ('wte.weight' in tensors) # which the files of GPT-2 itself lack
    weights = {}
    for ours, theirs, transposed in names_of(args):
        missing = [name for name in theirs if name.removeprefix(prefix) not in tensors]
        if missing:
            raise ValueError(f'{folder}: no tensor {missing[0]} in its .safetensors')
        parts = [tensors[name.removeprefix(prefix)].float() for name in theirs]
        weights[ours] = torch.cat([part.T for part in parts] if transposed else parts).contiguous()
    if args['tie_embeddings']:
        weights['head.weight'] = weights['wte.weight']
    return args, weights
