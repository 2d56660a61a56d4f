"""
Convert models and tokenizers, from Hugging Face to our checkpoints and back.

a model on the Hub     $ python convert.py gpt2 out/gpt2/base.pt          (others: owner/name)
a folder               $ python convert.py some_folder out/mine/base.pt
a checkpoint of ours   $ python convert.py out/toytown/rlhf.pt out/toytown/hf

Reads   a checkpoint; or a folder with config.json, *.safetensors and tokenizer.json; or the Hub,
        whose files are kept in data/models
Writes  a checkpoint with our tokenizer.json next to it, to train further with `python pretrain.py
        --init_from=out/gpt2/base.pt`; or a folder for transformers, vLLM and llama.cpp

These classes compute the same as our GPT. config/huggingface/ translates the names.
    arch='gpt2'               GPT2LMHeadModel
    arch='llama'              LlamaForCausalLM
    arch='llama', qk_norm     Qwen3ForCausalLM
    arch='llama', key_shift   ToytownForCausalLM, with its code: load it with trust_remote_code=True
                              (in transformers only)

llama.cpp's convert_hf_to_gguf.py knows the tokenizers of others by a hash. It stops at ours and
prints its chkhsh. Then add to get_vocab_base_pre() in its conversion/base.py:
    if chkhsh == "...": res = "llama-bpe"   # or "gpt-2" for pattern=gpt2, "smollm" for SmolLM2's

Left out: quantized weights, learned weights of qk_norm (as in Qwen3 itself), rope scaling but that
of Llama 3, and retries: if a download was interrupted, the same command continues it.
"""
from configurator import configure # first, so that Ctrl-C gives no traceback while torch loads
import base64, json, math, os, re, shutil, sys
from dataclasses import asdict

import numpy as np
import regex
import requests
import torch

from model import (
    GPT, GPTConfig, SPECIAL_TOKENS, Tokenizer, atomic_write, load_checkpoint, print0,
    save_checkpoint, write_text,
)

# The two words that are neither flags nor profiles are the settings source and target.
words = [word for word in sys.argv[1:] if not re.search(r'^-|\.py$', word)]
for setting, word in zip(['source', 'target'], words):
    sys.argv[sys.argv.index(word)] = f'--{setting}={word}'

# -----------------------------------------------------------------------------
# settings
source = ''     # what to convert: a checkpoint, a folder, or the name of a model on the Hub
target = ''     # what to write: a folder, or a checkpoint: base.pt, sft.pt or rlhf.pt
tokenizer = ''  # for a model that comes in: path of our tokenizer.json; empty = convert the model's
block_size = 0  # for a model that comes in: cut its context, which saves memory; 0 = leave it
config = configure(globals())

def read_json(path):
    assert os.path.exists(path), f'no file {path}'
    try:
        with open(path, encoding='utf-8') as f:
            return json.load(f)
    except ValueError as e: # not JSON, or not UTF-8
        raise AssertionError(f'{path} is damaged: {e}') from None

FORMS = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'config', 'huggingface')
CLASSES = read_json(f'{FORMS}/classes.json')
STAGES = ('base', 'mid', 'sft', 'dpo', 'rlhf')
OPTIONAL = ('n_hidden', 'n_kv_head', 'rope_theta', 'tie_embeddings', 'qk_norm', 'key_shift')

# -----------------------------------------------------------------------------
# tokenizer

# Hugging Face's vocabularies are text, so every byte needs a character. A printable byte is its
# own, the others take the characters from 256 on. The space becomes 'Ġ'.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
THEMSELVES = {b: chr(b) for b in PRINTABLE}
BYTE_TO_CHAR = THEMSELVES | {b: chr(256 + i) for i, b in enumerate(OTHERS)}
CHAR_TO_BYTE = {char: b for b, char in BYTE_TO_CHAR.items()}

def spell(token):
    return ''.join(BYTE_TO_CHAR[b] for b in token)

def find_merges(tokens):
    """The merge that makes each token: [.., b'h', b'i', b'hi', b' hi'] -> ['h i', 'Ġ hi']."""
    merges = []
    ranks = {} # of the tokens before this one
    for token in tokens:
        pieces = [bytes([b]) for b in token]
        while len(pieces) > 2:
            # byte pair encoding: join the neighbors whose token comes first
            pairs = [left + right for left, right in zip(pieces, pieces[1:])]
            pair_ranks = [ranks.get(pair, math.inf) for pair in pairs]
            first = min(pair_ranks)
            if first == math.inf: # it is found only as a whole word, as some tokens of Llama 3
                return find_all_merges(tokens)
            i = pair_ranks.index(first)
            pieces[i:i + 2] = [pairs[i]]
        if len(pieces) == 2:
            left, right = pieces
            merges.append(f'{spell(left)} {spell(right)}')
        ranks[token] = len(ranks)
    return merges

def find_all_merges(tokens):
    """All pairs of tokens that make a token: Llama 3's tokenizer.json has these."""
    merges = []
    ranks = {token: i for i, token in enumerate(tokens)}
    for token in tokens:
        pairs = []
        for i in range(1, len(token)):
            if token[:i] in ranks and token[i:] in ranks:
                pairs.append((ranks[token[:i]], ranks[token[i:]]))
        for left, right in sorted(pairs):
            merges.append(f'{spell(tokens[left])} {spell(tokens[right])}')
    return merges

def tokenizer_json(tok):
    """A Tokenizer -> the content of Hugging Face's tokenizer.json. It gives texts the same ids."""
    # One exception: <|end|> written in a text becomes the special token there, plain text here.
    data = read_json(f'{FORMS}/tokenizer.json')
    split = data['pre_tokenizer']['pretokenizers'][0]
    split['pattern']['Regex'] = tok.spec['pattern']
    data['model']['vocab'] = {spell(token): i for i, token in enumerate(tok.tokens)}
    data['model']['merges'] = find_merges(tok.tokens)
    for i, token in enumerate(data['added_tokens']):
        token['id'] = len(tok.tokens) + i
    return data

# Two ways to split texts that Hugging Face has without a pattern. GPT-2's, as tiktoken writes it:
GPT2_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$"
                r'|\s+(?!\S)|\s')
# SmolLM2 first makes each digit a piece, then splits the rest as GPT-2 does. Here as one pattern:
DIGITS_PATTERN = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
                  r'|\s+(?![^\s\p{N}])|\s+')

def read_tokenizer(path):
    """
    Hugging Face's tokenizer.json -> Tokenizer, ids. ids: for each of our tokens its id in the file;
    -1 if it has none. The file must be byte-level BPE, as of GPT-2, Llama 3 and SmolLM2.
    """
    try:
        data = read_json(path)
        vocab = data['model']['vocab']
        ignore_merges = data['model'].get('ignore_merges', False)
        merges = data['model']['merges']
        if isinstance(merges[0], list): # newer files have pairs
            merges = [' '.join(pair) for pair in merges]
        splits = data['pre_tokenizer'].get('pretokenizers', [data['pre_tokenizer']])
        splits[-1].setdefault('use_regex', True) # GPT-2's own file is old
        pattern = GPT2_PATTERN
        if splits[0]['type'] == 'Split':
            pattern = splits[0]['pattern']['Regex']
        if splits[0]['type'] == 'Digits':
            pattern = DIGITS_PATTERN
        special = {token['content']: token['id'] for token in data['added_tokens']}
        tokens = {} # token: its id in the file
        for token in sorted(vocab, key=vocab.get):
            if token not in special: # SmolLM2's vocabulary begins with its special tokens
                tokens[bytes(CHAR_TO_BYTE[char] for char in token)] = vocab[token]
        for b in range(256):
            tokens.setdefault(bytes([b]), -1) # SmolLM2 lacks those that are rare
        ranks = [base64.b64encode(token).decode() for token in tokens]
        spec = dict(version=1, kind='bpe', pattern=pattern, special_tokens=SPECIAL_TOKENS)
        if pattern == GPT2_PATTERN and len(tokens) == 50256: # as tokenizer.py --kind=gpt2 makes it
            spec.update(kind='gpt2', n_vocab=50304)
        tok = Tokenizer(dict(spec, ranks=ranks))
        # If what we would write equals what we have read, every text gets the same ids.
        ours = tokenizer_json(tok)
        assert set(vocab.values()) == set(range(len(vocab))), 'the ids do not count from 0'
        assert ours['model']['merges'] == merges, 'the merges are not in the order of the ids'
        n_merged = len(tokens) - 256
        assert ignore_merges or len(merges) == n_merged, f'{n_merged} tokens, {len(merges)} merges'
        known = [*CLASSES['splits'], ours['pre_tokenizer']['pretokenizers']]
        assert splits in known, 'it splits texts in another way'
        assert not data['normalizer'], 'it changes texts'
        text = "It's naïve: 12,345 🙂\n\tend "
        assert tok.decode(tok.encode(text)) == text, 'a text does not come back'
    except (AssertionError, LookupError, AttributeError, TypeError, ValueError, regex.error) as e:
        raise AssertionError(
            f'{path} cannot become a tokenizer of ours ({type(e).__name__}: {e}): give the path of '
            'our tokenizer.json with --tokenizer') from None
    ids = list(tokens.values())
    for name in SPECIAL_TOKENS:
        ids.append(special.get(name, -1))
    return tok, ids

# -----------------------------------------------------------------------------
# safetensors: 8 bytes with the length of the header; the header, JSON; the data

DTYPES = dict(F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16)

def read_safetensors(path):
    """{name: tensor}, mapped from the disk. Skips tensors of integers: they are attention masks."""
    tensors = {}
    try:
        data = np.memmap(path, np.uint8, mode='c')
        start = 8 + int.from_bytes(data[:8].tobytes(), 'little')
        header = json.loads(data[8:start].tobytes())
        header.pop('__metadata__', None)
        for name, entry in header.items():
            first, last = entry['data_offsets'] # in bytes, from the end of the header
            part = torch.from_numpy(data[start + first:start + last])
            if entry['dtype'] in DTYPES:
                tensors[name] = part.view(DTYPES[entry['dtype']]).view(entry['shape'])
    except Exception as e: # a cut or foreign file fails in many ways
        raise AssertionError(f'{path} is damaged ({type(e).__name__}): download it again') from None
    return tensors

def write_safetensors(path, tensors):
    """Write {name: tensor} as float32."""
    header = {'__metadata__': {'format': 'pt'}}
    last = 0
    for name, tensor in tensors.items():
        first = last
        last = first + 4 * tensor.numel() # 4 bytes a number
        header[name] = dict(dtype='F32', shape=list(tensor.shape), data_offsets=[first, last])
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8) # the data must start at a multiple of 8 bytes
    with atomic_write(path) as tmp, open(tmp, 'wb') as f:
        f.write(len(text).to_bytes(8, 'little') + text)
        for tensor in tensors.values():
            f.write(tensor.float().contiguous().numpy().data)

# -----------------------------------------------------------------------------
# weights

def weight_names(args):
    """{our name of a weight: list of theirs}. Our attn.qkv joins three of Llama's, mlp.up two."""
    names = {}
    for ours, theirs in CLASSES['weights'][args['arch']].items():
        for layer in map(str, range(args['n_layer'])): # a name without * is set anew each time
            names[ours.replace('*', layer)] = [name.replace('*', layer) for name in theirs]
    if args['tie_embeddings']:
        del names['head.weight']
    return names

def transpose(name, weight, arch):
    # GPT2LMHeadModel stores the matrices of its blocks as (in, out), ours are (out, in)
    if name.endswith(tuple(CLASSES['transposed'][arch])):
        return weight.T
    return weight

def qk_norm_names(layer):
    return [f'model.layers.{layer}.self_attn.{part}_norm.weight' for part in 'qk']

def qk_norm_product(args):
    # Our scores are 12 / D (q k), q and k normalized. Those of Qwen3 are 1 / sqrt(D) (u q) (v k)
    # with learned weights u and v, q_norm and k_norm. Both are equal if u v is this number.
    D = args['n_embd'] // args['n_head']
    return 12 / math.sqrt(D)

def download(hub, folder, file, optional=False):
    """
    Download a file to the folder, unless it is there. The next run continues an interrupted
    download. Returns False if there is no such file and it is optional.
    """
    url = f'{hub}/{file}'
    path = f'{folder}/{file}'
    if os.path.exists(path):
        return True
    os.makedirs(folder, exist_ok=True)
    with open(f'{path}.part', 'ab') as f:
        rest = {'Range': f'bytes={f.tell()}-', 'Accept-Encoding': 'identity'}
        try:
            response = requests.get(url, headers=rest, stream=True, timeout=30)
            code = response.status_code
            if code == 404 and optional:
                return False
            # a run was stopped after the last byte, and the server confirms the length
            length = f'bytes */{f.tell()}'
            is_whole = code == 416 and response.headers.get('Content-Range') == length
            assert response.ok or is_whole, f'{source} is not a folder; {url}: HTTP {code}'
            if code == 200: # not 206: this server sends all of it
                f.truncate(0)
            if not is_whole:
                f.writelines(response.iter_content(1 << 20))
        except requests.RequestException as e:
            raise AssertionError(f'{url}: {type(e).__name__}: the same command continues') from None
    os.replace(f'{path}.part', path)
    return True

WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json' # of a large model, whose weights are in several files

def weight_files(folder):
    """The names of the files that hold the weights."""
    path = f'{folder}/{INDEX}'
    if os.path.exists(f'{folder}/{WEIGHTS}') or not os.path.exists(path):
        return [WEIGHTS]
    try:
        files = set(read_json(path)['weight_map'].values()) # {name of a weight: its file}
        assert all(re.fullmatch(r'[\w.-]+\.safetensors', file) for file in files), 'bad names'
    except (AssertionError, AttributeError, LookupError, TypeError) as e:
        raise AssertionError(f'{path} is damaged ({e}): download it again') from None
    return sorted(files)

# -----------------------------------------------------------------------------
# Hugging Face -> a checkpoint

if target.endswith('.pt'):
    stage = os.path.basename(target).removesuffix('.pt')
    assert stage in STAGES, f'{target} must be named after its stage: {", ".join(STAGES)}'
    folder = source
    if not os.path.isdir(source):
        repo = source if '/' in source else f'openai-community/{source}'
        folder = f'data/models/{repo}'
        hub = f'https://huggingface.co/{repo}/resolve/main'
        download(hub, folder, 'config.json')
        if not tokenizer:
            download(hub, folder, 'tokenizer.json')
        is_large = os.path.exists(f'{folder}/{INDEX}')
        if is_large or not download(hub, folder, WEIGHTS, optional=True):
            download(hub, folder, INDEX)
            for file in weight_files(folder):
                download(hub, folder, file)

    # settings
    theirs = read_json(f'{folder}/config.json')
    quantized = theirs.get('quantization_config')
    assert not quantized, f'{folder} holds quantized weights, {quantized}: take the original model'
    rope = theirs.get('rope_parameters') or theirs.get('rope_scaling') or {}
    theirs.update(rope)
    scaling = ()
    if theirs.get('rope_type') == 'llama3':
        scaling = tuple(rope.get(name) for name in CLASSES['llama3'])
        assert None not in scaling, f'{folder}: {rope} lacks one of {CLASSES["llama3"]}'
        theirs.update(rope_scaling=None, rope_type='default')
    kind = theirs.get('model_type')
    kinds = list(CLASSES['constants'])
    assert kind in kinds, f'{folder}: model_type is {kind!r}, our GPT can only be one of {kinds}'
    # a property that is not a setting of our GPT must have the one value that our GPT has
    for name, value in CLASSES['constants'][kind].items():
        found = theirs.get(name, value)
        assert found == value, f'{folder}: {name} is {found!r}, our GPT has only {value!r}'
    arch = 'gpt2' if kind == 'gpt2' else 'llama'
    args = dict(arch=arch, tie_embeddings=arch == 'gpt2', qk_norm=kind == 'qwen3',
                rope_scaling=scaling)
    for ours, name in CLASSES['settings'][arch].items():
        value = theirs.get(name)
        if value is not None:
            assert isinstance(value, (int, float)), f'{folder}: {name} is {value!r}, not a number'
            args[ours] = value
        else: # GPTConfig has defaults for the optional ones
            assert ours in OPTIONAL, f'{folder}: config.json has no {name}'
    args = asdict(GPTConfig(**args))
    head_dim = args['n_embd'] // args['n_head']
    found = theirs.get('head_dim') or head_dim
    assert found == head_dim, f'{folder}: head_dim is {found}, not n_embd / n_head = {head_dim}'

    # weights
    tensors = {}
    for file in weight_files(folder):
        path = f'{folder}/{file}'
        assert os.path.exists(path), f'no file {path}: download it'
        tensors.update(read_safetensors(path))
    if 'wte.weight' in tensors: # the files of GPT-2 itself lack a prefix
        tensors = {f'transformer.{name}': tensor for name, tensor in tensors.items()}
    weights = {}
    try:
        for ours, names in weight_names(args).items():
            parts = [tensors[name].float() for name in names]
            weights[ours] = transpose(ours, torch.cat(parts), args['arch']).contiguous()
        if args['tie_embeddings']:
            weights['head.weight'] = weights['wte.weight']
        with torch.device('meta'): # checks the shapes and needs no memory
            GPT(GPTConfig(**args)).load_state_dict(weights, assign=True)
        if args['qk_norm']:
            for layer in range(args['n_layer']):
                q_norm, k_norm = [tensors[name].float() for name in qk_norm_names(layer)]
                products = torch.outer(q_norm, k_norm)              # (D, D)
                error = (products / qk_norm_product(args) - 1).abs().max()
                # bfloat16 rounds by up to 0.4%
                assert error < 0.01, (
                    f'{folder}: q_norm and k_norm of layer {layer} are learned: our GPT can only '
                    f'have a product of 12 / sqrt(head_dim), theirs is off by {error:.0%}')
    except (KeyError, RuntimeError) as e:
        problem = ' '.join(str(e).split())
        raise AssertionError(f'{folder}: weights do not fit config.json: {problem}') from None

    # tokenizer
    if tokenizer:
        tok = Tokenizer.load(tokenizer)
        ids = list(range(len(tok.tokens))) # and its special tokens are the model's next ones
    else:
        tok, ids = read_tokenizer(f'{folder}/tokenizer.json')
        bos = theirs.get('bos_token_id')
        if ids[tok.eot] == -1 and isinstance(bos, int): # Llama 3 has another name for it
            ids[tok.eot] = bos
    n_known = args['vocab_size']
    n_tokens = max(ids) + 1
    assert n_tokens <= n_known, f'{folder} has {n_known:,} tokens, the tokenizer {n_tokens:,}'
    ids += sorted(set(range(len(ids), n_known)) - set(ids)) # rows that no token uses stay
    ids += [-1] * (tok.n_vocab - len(ids))
    args['vocab_size'] = len(ids)
    for name in ('wte.weight', 'head.weight'):
        # tokens that the model lacks, -1, start as the mean of all tokens (Hewitt 2021)
        mean = weights[name].mean(0, keepdim=True)                  # (1, C)
        weights[name] = torch.cat((weights[name], mean))[ids]
    if args['tie_embeddings']: # make them one tensor, which is saved once
        weights['head.weight'] = weights['wte.weight']
    length = block_size or args['block_size']
    assert 0 < length <= args['block_size'], (
        f'block_size {length}: {folder} has a context of {args["block_size"]} tokens')
    args['block_size'] = length
    if args['arch'] == 'gpt2':
        weights['wpe.weight'] = weights['wpe.weight'][:length].clone() # not a view of the whole

    path = os.path.join(os.path.dirname(target), 'tokenizer.json')
    is_other = os.path.exists(path) and read_json(path) != tok.spec
    assert not is_other, f'{path} is another tokenizer: choose another folder'
    save_checkpoint(target, stage, weights, args, tok, config, 0, {})
    write_text(path, json.dumps(tok.spec, indent=1))
    print0(f'wrote {target} and {path}')

# -----------------------------------------------------------------------------
# a checkpoint -> Hugging Face

else:
    assert source.endswith('.pt'), f'{source!r} or {target!r} must be a checkpoint, .pt: see --help'
    assert target, 'no target: add the folder to write to'
    ckpt = load_checkpoint(source, STAGES, 'python pretrain.py')
    args = asdict(GPTConfig(**ckpt['model_args']))
    tok = Tokenizer(ckpt['tokenizer'])
    kind = args['arch']
    if args['qk_norm']:
        kind = 'qwen3'
    if args['key_shift']:
        kind = 'toytown'
    is_plain = kind == 'gpt2' and args['n_kv_head'] == args['n_head']
    assert args['arch'] == 'llama' or is_plain, (
        "arch='gpt2' with qk_norm, key_shift or n_kv_head fits no class of theirs: train with "
        '--arch=llama')
    path = f'{target}/tokenizer.json'
    is_ours = os.path.exists(path) and 'ranks' in read_json(path)
    assert not is_ours, f'{path} is our own and would be lost: choose another folder'

    # settings
    head_dim = args['n_embd'] // args['n_head']
    theirs = dict(CLASSES['constants'][kind], head_dim=head_dim, torch_dtype='float32')
    for ours, name in CLASSES['settings'][args['arch']].items():
        theirs[name] = args[ours]
    if kind == 'gpt2':
        theirs['n_ctx'] = args['block_size'] # llama.cpp wants it
    if args['rope_scaling']:
        scaling = dict(zip(CLASSES['llama3'], args['rope_scaling']), rope_type='llama3')
        theirs.update(rope_scaling=scaling, rope_type='llama3')
    # where generation stops: a base model has seen the ends of documents, but never <|end|>
    end = tok.eot if ckpt['stage'] in ('base', 'mid') else tok.end
    generation = dict(bos_token_id=tok.eot, eos_token_id=end, pad_token_id=tok.pad)
    theirs.update(generation)

    # weights
    tensors = {}
    kv_width = args['n_kv_head'] * head_dim
    for ours, names in weight_names(args).items():
        weight = transpose(ours, ckpt['weights'][ours], args['arch'])
        parts = [weight]
        if len(names) == 2: # gate, up
            parts = weight.chunk(2)
        if len(names) == 3: # queries, keys, values
            parts = weight.split([args['n_embd'], kv_width, kv_width])
        tensors.update(zip(names, parts))
    if args['qk_norm']:
        ones = torch.ones(head_dim)
        for layer in range(args['n_layer']):
            q_norm, k_norm = qk_norm_names(layer)
            tensors[q_norm] = qk_norm_product(args) * ones
            tensors[k_norm] = ones

    # tokenizer
    texts = {'config.json': json.dumps(theirs, indent=1),
             'generation_config.json': json.dumps(generation, indent=1)}
    if tok.spec['kind'] == 'char':
        print0('Hugging Face has no form for a tokenizer of characters: the folder gets none')
    else:
        settings = read_json(f'{FORMS}/tokenizer_config.json')
        settings['eos_token'] = SPECIAL_TOKENS[end - len(tok.tokens)]
        with open(f'{FORMS}/chat_template.jinja', encoding='utf-8') as f:
            settings['chat_template'] = f.read().strip() # the same as Tokenizer.render
        texts['tokenizer.json'] = json.dumps(tokenizer_json(tok), ensure_ascii=False, indent=1)
        texts['tokenizer_config.json'] = json.dumps(settings, indent=1)

    write_safetensors(f'{target}/model.safetensors', tensors) # first: it may not fit on the disk
    for name, text in texts.items():
        write_text(f'{target}/{name}', text)
    if args['key_shift']:
        shutil.copy(f'{FORMS}/modeling_toytown.py', target)
    print0(f'wrote {target}')
