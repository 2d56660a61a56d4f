"""
convert.py: weights and tokenizers go out and come back; the exported files are computed by a small Llama and Qwen3 that
is written here, and by transformers where it is installed; damaged and foreign files; the Hub.
"""
import json
import math
import random
from dataclasses import asdict
from types import SimpleNamespace

import jinja2
import jinja2.ext
import pytest
import regex
import requests
import torch
from conftest import definitions, fails, make_spec
from torch.nn import functional as F

from model import GPT, GPTConfig, SPECIAL_TOKENS, Tokenizer, generate, save_checkpoint

TOK = Tokenizer(make_spec())
LLAMA = dict(arch='llama', n_layer=2, n_embd=32, n_hidden=40)
SHAPES = dict(
    gpt2=dict(arch='gpt2', n_layer=2, n_head=2, n_embd=12, n_hidden=20),
    gpt2_untied=dict(arch='gpt2', n_layer=1, n_head=2, n_embd=12, tie_embeddings=False, norm_eps=1e-3),
    llama=dict(LLAMA, n_head=4, n_kv_head=2, tie_embeddings=False, rope_theta=5e4, norm_eps=1e-3),
    llama_tied=dict(LLAMA, n_head=2),
    llama31=dict(LLAMA, n_head=2, rope_scaling=(8.0, 1.0, 4.0, 16)),
    qwen3=dict(LLAMA, n_head=4, n_kv_head=2, qk_norm=True, rope_theta=5e4),
    qwen3_untied=dict(LLAMA, n_head=2, qk_norm=True, tie_embeddings=False, norm_eps=1e-4),
    toytown=dict(LLAMA, n_head=4, qk_norm=True, key_shift=True),
    toytown_plain=dict(LLAMA, n_head=8, n_kv_head=4, key_shift=True, tie_embeddings=False))
DECODERS = [kind for kind in SHAPES if 'gpt2' not in kind]

def make_model(kind, vocab_size=TOK.n_vocab):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=vocab_size, block_size=32, **SHAPES[kind])).eval()
    for p in model.parameters(): # leaves nothing at 0 or 1, where an error could hide
        torch.nn.init.normal_(p, mean=0.02, std=0.3)
    return model

def save(model, path, stage='rlhf', tok=TOK):
    save_checkpoint(str(path), stage, model.state_dict(), asdict(model.config), tok, {}, 0, {})

@pytest.fixture(scope='module')
def convert():
    return definitions('convert.py')

@pytest.fixture(scope='module')
def exported(scripts, tmp_path_factory):
    """Export a kind of model once: -> (model, folder)."""
    done = {}

    def export(kind):
        if kind not in done:
            folder = tmp_path_factory.mktemp(kind)
            model = make_model(kind)
            save(model, folder / 'rlhf.pt')
            scripts.ok('convert.py', folder / 'rlhf.pt', folder / 'hf')
            done[kind] = model, folder / 'hf'
        return done[kind]
    return export

def read(convert, folder):
    config = json.loads((folder / 'config.json').read_text('utf-8'))
    return config, convert.read_safetensors(folder / 'model.safetensors')

def copy(folder, to):
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to

# -----------------------------------------------------------------------------
# out and back

@pytest.mark.parametrize('kind', SHAPES)
def test_out_and_back(exported, scripts, tmp_path, kind):
    model, folder = exported(kind)
    scripts.ok('convert.py', folder, tmp_path / 'back' / 'rlhf.pt')
    ckpt = torch.load(tmp_path / 'back' / 'rlhf.pt', weights_only=True)
    assert ckpt['stage'] == 'rlhf' and ckpt['model_args'] == asdict(model.config)
    assert ckpt['tokenizer'] == TOK.spec == json.loads((tmp_path / 'back' / 'tokenizer.json').read_text('utf-8'))
    weights = model.state_dict()
    assert ckpt['weights'].keys() == weights.keys()
    assert all(torch.equal(weights[name], ckpt['weights'][name]) for name in weights)

def rms_norm(x, weight, eps):
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight

def decoder(config, w, ids):
    """Llama, Qwen3 and ToytownForCausalLM from their papers: token by token, head by head. ids (T,) -> logits (T, V)."""
    eps, D, T = config['rms_norm_eps'], config['head_dim'], len(ids)
    H, H_kv = config['num_attention_heads'], config['num_key_value_heads']
    rates = config['rope_theta'] ** (-torch.arange(0, D, 2) / D)
    if config['rope_scaling']: # Llama 3.1, by wavelength: short ones stay, long ones are stretched, between them a mean
        factor, low, high, length = (config['rope_scaling'][name] for name in (
            'factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'))
        for i, rate in enumerate(rates.tolist()):
            wavelength = 2 * math.pi / rate
            if wavelength > length / low:
                rates[i] = rate / factor
            elif wavelength > length / high:
                smooth = (length / wavelength - low) / (high - low)
                rates[i] = (1 - smooth) * rate / factor + smooth * rate

    def turn(v, position):
        angle = rates * position
        a, b = v[:D // 2], v[D // 2:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))
    x = w['model.embed_tokens.weight'][ids]
    for layer in range(config['num_hidden_layers']):
        p = f'model.layers.{layer}.'
        h = rms_norm(x, w[p + 'input_layernorm.weight'], eps)
        q, k, v = ((h @ w[f'{p}self_attn.{name}_proj.weight'].T).view(T, -1, D) for name in 'qkv')
        if p + 'self_attn.q_norm.weight' in w:
            q, k = (rms_norm(t, w[f'{p}self_attn.{name}_norm.weight'], eps) for name, t in (('q', q), ('k', k)))
        y = torch.zeros(T, H, D)
        for head in range(H):
            kv = head // (H // H_kv)
            for t in range(T):
                keys = [k[s, kv] for s in range(t + 1)]
                if config.get('key_shift') and kv >= H_kv // 2:
                    keys = [torch.zeros(D), *keys[:-1]]
                scores = torch.stack([turn(q[t, head], t) @ turn(key, s) for s, key in enumerate(keys)]) / math.sqrt(D)
                y[t, head] = scores.softmax(0) @ v[:t + 1, kv]
        x = x + y.view(T, -1) @ w[p + 'self_attn.o_proj.weight'].T
        h = rms_norm(x, w[p + 'post_attention_layernorm.weight'], eps)
        gate, up = (h @ w[f'{p}mlp.{name}_proj.weight'].T for name in ('gate', 'up'))
        x = x + (F.silu(gate) * up) @ w[p + 'mlp.down_proj.weight'].T
    head = w['model.embed_tokens.weight' if config['tie_word_embeddings'] else 'lm_head.weight']
    return rms_norm(x, w['model.norm.weight'], eps) @ head.T

@pytest.mark.parametrize('kind', DECODERS)
@torch.no_grad()
def test_the_exported_weights_give_the_same_logits(convert, exported, kind):
    model, folder = exported(kind)
    config, tensors = read(convert, folder)
    ids = torch.randint(0, TOK.n_vocab, (9,), generator=torch.Generator().manual_seed(1))
    assert (decoder(config, tensors, ids) - model(ids[None])[0]).abs().max() < 1e-5

def test_names_and_shapes_of_gpt2(convert, exported):
    model, folder = exported('gpt2')
    config, tensors = read(convert, folder)
    # GPT2LMHeadModel keeps its matrices as (in, out): width 12, qkv 36, MLP 20
    w = tensors['transformer.h.1.attn.c_attn.weight']
    assert w.shape == (12, 36) and torch.equal(w, model.blocks[1].attn.qkv.weight.T)
    assert tensors['transformer.h.0.mlp.c_fc.weight'].shape == (12, 20)
    assert tensors['transformer.h.0.mlp.c_proj.weight'].shape == (20, 12)
    assert tensors['transformer.wpe.weight'].shape == (32, 12) and 'lm_head.weight' not in tensors
    assert len(tensors) == 2 + 2 + 2 * 12 # embeddings, the last norm, 2 blocks of 6 parts with weight and bias
    assert config['architectures'] == ['GPT2LMHeadModel'] and config['n_inner'] == 20
    assert config['n_positions'] == config['n_ctx'] == 32 # transformers reads the first, llama.cpp the second
    assert config['eos_token_id'] == TOK.end and config['tie_word_embeddings'] is True

def test_names_and_shapes_of_qwen3(convert, exported):
    model, folder = exported('qwen3')
    config, tensors = read(convert, folder)
    # heads of 32 / 4 = 8: q 32 rows, k and v 2 * 8 each, in the order of our one matrix
    parts = [tensors[f'model.layers.1.self_attn.{name}_proj.weight'] for name in 'qkv']
    assert [tuple(part.shape) for part in parts] == [(32, 32), (16, 32), (16, 32)]
    assert torch.equal(torch.cat(parts), model.blocks[1].attn.qkv.weight)
    assert torch.equal(tensors['model.layers.0.mlp.gate_proj.weight'], model.blocks[0].mlp.up.weight[:40]) # SiLU of it
    norms = [tensors[f'model.layers.0.self_attn.{name}_norm.weight'] for name in 'qk']
    assert torch.equal(norms[0], torch.full((8,), 12 / math.sqrt(8))) and torch.equal(norms[1], torch.ones(8))
    assert config['rms_norm_eps'] == model.config.norm_eps == 1e-5 # also of q_norm and k_norm
    assert len(tensors) == 2 + 2 * 11 and config['rope_theta'] == 5e4 and config['head_dim'] == 8

def test_where_a_base_and_a_chat_model_stop(exported, scripts, tmp_path):
    """A base model has never seen <|end|>; its documents end with <|endoftext|>."""
    save(make_model('llama'), tmp_path / 'base.pt', 'base')
    scripts.ok('convert.py', tmp_path / 'base.pt', tmp_path / 'hf')
    for folder, end, name in ((tmp_path / 'hf', TOK.eot, '<|endoftext|>'), (exported('llama')[1], TOK.end, '<|end|>')):
        ids = dict(bos_token_id=TOK.eot, eos_token_id=end, pad_token_id=TOK.pad)
        config, generation, tokenizer = (json.loads((folder / f'{part}.json').read_text('utf-8'))
                                         for part in ('config', 'generation_config', 'tokenizer_config'))
        assert generation == ids == {key: config[key] for key in ids}
        assert tokenizer['eos_token'] == name and tokenizer['bos_token'] == '<|endoftext|>'

HALF = dict(BF16=torch.bfloat16, F16=torch.float16, F32=torch.float32)

def write_shards(folder, tensors, dtype, n=3):
    """n files and their index, as large models come: a tensor stands in one of the files."""
    names = {}
    for i in range(n):
        header, data = {}, b''
        for name in list(tensors)[i::n]:
            raw = tensors[name].to(HALF[dtype]).contiguous().view(torch.uint8).numpy().tobytes()
            header[name] = dict(dtype=dtype, shape=list(tensors[name].shape), data_offsets=[len(data), len(data) + len(raw)])
            data += raw
            names[name] = f'model-0000{i + 1}-of-0000{n}.safetensors'
        (folder / names[name]).write_bytes(make_file(header, data))
    index = dict(metadata=dict(total_size=1), weight_map=names)
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index), 'utf-8')

@pytest.mark.parametrize('kind, dtype', [('qwen3', 'BF16'), ('gpt2', 'F16'), ('llama31', 'F32')])
def test_a_model_in_several_files(convert, exported, scripts, tmp_path, kind, dtype):
    model, ours = exported(kind)
    folder = copy(ours, tmp_path / 'hf')
    tensors = convert.read_safetensors(ours / 'model.safetensors')
    (folder / 'model.safetensors').unlink()
    write_shards(folder, tensors, dtype)
    (folder / 'consolidated.safetensors').write_bytes(b'the same weights in another form')
    scripts.ok('convert.py', folder, tmp_path / 'rlhf.pt')
    weights = torch.load(tmp_path / 'rlhf.pt', weights_only=True)['weights']
    for name, weight in model.state_dict().items():
        assert torch.equal(weights[name], weight.to(HALF[dtype]).float()), name

    if dtype == 'F32': # files that are missing, and names that lead out of the folder
        part = folder / 'model-00002-of-00003.safetensors'
        part.rename(tmp_path / 'part')
        scripts.fails('no file .*model-00002-of-00003.safetensors', 'convert.py', folder, tmp_path / 'base.pt')
        index = folder / 'model.safetensors.index.json'
        for content in (dict(weight_map=dict(a='../part')), dict(weight_map=dict(a=3)), dict(weight_map=[]), dict(), []):
            index.write_text(json.dumps(content), 'utf-8')
            with fails('index.json is damaged'):
                convert.weight_files(folder)
        index.unlink()
        scripts.fails('no file .*model.safetensors', 'convert.py', folder, tmp_path / 'base.pt')

# -----------------------------------------------------------------------------
# tokenizer

def test_find_merges(convert):
    tokens = [bytes([b]) for b in range(256)] + [b'lo', b'low', b' low', b'er', b' lower']
    assert convert.find_merges(tokens) == ['l o', 'lo w', 'Ġ low', 'e r', 'Ġlow er']
    assert convert.spell('ä\n'.encode()) == 'Ã¤Ċ' # as in GPT-2's vocab.json
    # Llama 3 has tokens that no merges of earlier ones make: then all pairs are listed, in the order of the tokens
    tokens += [b'we', b'owl'] # 'lowe' is lo we and low e; 'owl' is nothing
    assert convert.find_merges(tokens + [b'lowe']) == [
        'l o', 'lo w', 'Ġ low', 'e r', 'Ġlow er', 'w e', 'lo we', 'low e']

def hf_ids(data, text):
    """What Hugging Face's library computes with a tokenizer.json: split, then merge the pair that is listed first."""
    splits = data['pre_tokenizer'].get('pretokenizers', [data['pre_tokenizer']])
    pieces = [text]
    for split in splits:
        pattern = None
        if split['type'] == 'Split':
            pattern = split['pattern']['Regex']
        if split['type'] == 'Digits':
            pattern = r'\p{N}|\P{N}+'
        if split['type'] == 'ByteLevel' and split['use_regex']:
            pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
        if pattern:
            pieces = [word for piece in pieces for word in regex.findall(pattern, piece)]
    vocab, known = data['model']['vocab'], {}
    merges = [merge.split() if isinstance(merge, str) else merge for merge in data['model']['merges']]
    ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
    char_of = definitions('convert.py').BYTE_TO_CHAR
    ids = []
    for piece in pieces:
        if piece not in known:
            word = [char_of[b] for b in piece.encode()]
            if data['model'].get('ignore_merges') and ''.join(word) in vocab:
                word = [''.join(word)]
            while len(word) > 1:
                pairs = list(zip(word, word[1:]))
                best = min(pairs, key=lambda pair: ranks.get(pair, math.inf))
                if best not in ranks:
                    break
                i = pairs.index(best)
                word[i:i + 2] = [''.join(best)]
            known[piece] = [vocab[token] for token in word if token in vocab] # a token it lacks is left out
        ids += known[piece]
    return ids

def mixed_text(n):
    """n characters: words, numbers, code, blanks and some of all scripts."""
    rng = random.Random(1)
    words = ['the owl', "Anna's", "we'll", 'naïve', '你好', 'привет', '🙂', '12,345.67', '٣٤', 'x²', 'e\u0301', 'def f(x):', '{"a": [1, 2]}',
             '\n\n', '\t\t', '   ', ' \n', '\u00a0', '...', '--', 'http://a.b/c?d=1', 'low', 'lower', 'SHOUT', '\r\n', '\u3000']
    text = ' '.join(rng.choice(words) + rng.choice(['', '', '.', '7', ' ']) for _ in range(n // 4))
    assert len(text) >= n
    return text[:n]

def smollm2_form(data, special=('<|endoftext|>', '<|im_start|>', '<|im_end|>'), rare=(b'\x04', b'\xfe')):
    """A tokenizer.json of ours in the form of SmolLM2's: special tokens first, rare bytes missing, digits split first."""
    convert = definitions('convert.py')
    rare = [convert.spell(token) for token in rare]
    names = [*special] + [token for token in data['model']['vocab'] if token not in rare]
    model = dict(data['model'], vocab={token: i for i, token in enumerate(names)}, ignore_merges=False)
    added = [dict(id=i, content=token) for i, token in enumerate(special)]
    return dict(data, model=model, added_tokens=added, pre_tokenizer=dict(
        type='Sequence', pretokenizers=convert.CLASSES['splits'][0]))

def llama3_form(data):
    """Its merges are all pairs, and a token is taken as a whole where a piece is one: 'xyz' has no merges."""
    tokens = [*TOK.tokens, b'xyz', b'xyzxyz']
    definition = definitions('convert.py')
    model = dict(data['model'], vocab={definition.spell(token): i for i, token in enumerate(tokens)}, ignore_merges=True,
                 merges=definition.find_all_merges(tokens))
    return dict(data, model=model, added_tokens=[dict(id=len(tokens), content='<|begin_of_text|>')])

def gpt2_form(data):
    """It splits with the pattern of GPT-2, which it does not name; the file of GPT-2 itself is older than use_regex."""
    return dict(data, pre_tokenizer=dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True))

@pytest.mark.parametrize('form', [smollm2_form, llama3_form, gpt2_form])
def test_ids_of_a_megabyte(convert, exported, tmp_path, form):
    """Each of our ids stands for the id that the file gives, on a million characters."""
    path = tmp_path / 'tokenizer.json'
    data = form(json.loads((exported('gpt2')[1] / 'tokenizer.json').read_text('utf-8')))
    path.write_text(json.dumps(data), 'utf-8')
    tok, ids = convert.read_tokenizer(path)
    text = mixed_text(1_000_000 if form is smollm2_form else 100_000) + ' xyzxyz xyz xyzy'
    data['pre_tokenizer'].setdefault('use_regex', True)
    wanted = hf_ids(data, text)
    found = [ids[i] for i in tok.encode(text)]
    assert len(wanted) > len(text) / 4 and found == wanted and tok.decode(tok.encode(text)) == text
    # and out again
    assert hf_ids(convert.tokenizer_json(tok), text) == tok.encode(text)
    if form is llama3_form: # without ignore_merges the library finds xyz nowhere
        data['model']['ignore_merges'] = False
        path.write_text(json.dumps(data), 'utf-8')
        with fails('merges'):
            convert.read_tokenizer(path)

def test_tokenizer_files(exported):
    _, folder = exported('gpt2')
    data = json.loads((folder / 'tokenizer.json').read_text('utf-8'))
    assert data['model']['vocab']['Ġowl'] == TOK.encode(' owl')[0]
    assert {token['content']: token['id'] for token in data['added_tokens']}['<|end|>'] == TOK.end

def change(path, **changes):
    data = json.loads(path.read_text('utf-8'))
    data.update(changes)
    path.write_text(json.dumps({key: value for key, value in data.items() if value != 'DELETE'}), 'utf-8')

def test_foreign_tokenizers(convert, exported, tmp_path):
    folder = copy(exported('gpt2')[1], tmp_path / 'hf')
    path = folder / 'tokenizer.json'
    good = json.loads(path.read_text('utf-8'))
    assert convert.read_tokenizer(path)[0].hash == TOK.hash
    pairs = [merge.split() for merge in good['model']['merges']]
    change(path, model=dict(good['model'], merges=pairs, dropout=None)) # as newer versions write it
    assert convert.read_tokenizer(path)[0].hash == TOK.hash
    for says, changes in (('normalizer|changes', dict(normalizer=dict(type='NFC'))),
                          ('merges', dict(model=dict(good['model'], merges=good['model']['merges'][::-1]))),
                          ('ids', dict(model=dict(good['model'], vocab={t: i + 1 for t, i in good['model']['vocab'].items()}))),
                          ('another way', dict(pre_tokenizer=dict(type='Metaspace'))),
                          ('KeyError', dict(model=dict(good['model'], vocab={'▁the': 0}))),
                          ('added_tokens|model', dict(model='DELETE'))):
        path.write_text(json.dumps(good), 'utf-8')
        change(path, **changes)
        with fails('--tokenizer'):
            convert.read_tokenizer(path)
        with fails(says):
            convert.read_tokenizer(path)

def test_digits_first_is_one_pattern(convert):
    """The oracle makes each digit a piece, then splits the rest with GPT-2's pattern, as SmolLM2's tokenizer says."""
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    rng = random.Random(0)
    for _ in range(3000):
        text = ''.join(rng.choices("  \t\n\r\xa007٣²Ⅷaé\u0301中'st.,-🙂", k=rng.randrange(1, 12)))
        pieces = [piece for piece in regex.split(r'(\p{N})', text) if piece]
        wanted = [word for piece in pieces for word in regex.findall(gpt2, piece)]
        assert regex.findall(convert.DIGITS_PATTERN, text) == wanted, repr(text)

def test_special_tokens_first_and_bytes_that_are_missing(convert, exported, scripts, tmp_path):
    """A model in SmolLM2's form: ids from 0 are special tokens, two rare bytes have none."""
    model, ours = exported('llama_tied')
    folder = copy(ours, tmp_path / 'hf')
    config, tensors = read(convert, ours)
    data = json.loads((ours / 'tokenizer.json').read_text('utf-8'))
    old = data['model']['vocab']
    data = smollm2_form(data, special=['<|begin_of_text|>', '<|im_start|>', '<|im_end|>'])
    names = list(data['model']['vocab'])
    rare = [convert.spell(b'\x04'), convert.spell(b'\xfe')]
    (folder / 'tokenizer.json').write_text(json.dumps(data), 'utf-8')
    known = {'<|begin_of_text|>': TOK.eot, '<|im_start|>': TOK.user, '<|im_end|>': TOK.end, **old}
    embeddings = tensors['model.embed_tokens.weight']
    theirs = embeddings[[known[token] for token in names]]
    convert.write_safetensors(folder / 'model.safetensors', {**tensors, 'model.embed_tokens.weight': theirs})
    change(folder / 'config.json', vocab_size=len(names), bos_token_id=0)
    scripts.ok('convert.py', folder, tmp_path / 'base.pt')

    ckpt = torch.load(tmp_path / 'base.pt', weights_only=True)
    tok = Tokenizer(ckpt['tokenizer'])
    got = ckpt['weights']['wte.weight']
    assert len(got) == tok.n_vocab == ckpt['model_args']['vocab_size'] == TOK.n_vocab
    mean = theirs.mean(0)
    for i, token in enumerate(tok.tokens): # the same bytes have the same row
        name = convert.spell(token)
        assert torch.allclose(got[i], mean if name in rare else embeddings[old[name]], atol=1e-6), token
    assert torch.equal(got[tok.eot], embeddings[TOK.eot]) # theirs begins a document, under another name
    assert torch.allclose(got[tok.system:], mean.expand(5, -1), atol=1e-6)
    text = 'Say the owl has 12 cats.\n\x04'
    ids = tok.encode(text)
    assert tok.decode(ids) == text and tok.encode('has 12')[1:] == tok.encode(' ') + tok.encode('1') + tok.encode('2')

    # a token whose id the weights lack
    change(folder / 'config.json', vocab_size=len(names) - 1)
    convert.write_safetensors(folder / 'model.safetensors', {**tensors, 'model.embed_tokens.weight': theirs[:-1]})
    scripts.fails(f'has {len(names) - 1} tokens, the tokenizer {len(names)}', 'convert.py', folder, tmp_path / 'x' / 'base.pt')

def test_a_tokenizer_of_characters(scripts, tmp_path):
    """It has no form there: the model goes out without one, and comes back with --tokenizer."""
    spec = dict(make_spec(), kind='char', pattern='[abc]', ranks=['YQ==', 'Yg==', 'Yw=='])
    (tmp_path / 'char.json').write_text(json.dumps(spec), 'utf-8')
    model = make_model('llama', vocab_size=9)
    save(model, tmp_path / 'base.pt', 'base', Tokenizer(spec))
    scripts.ok('convert.py', tmp_path / 'base.pt', tmp_path / 'hf')
    assert not (tmp_path / 'hf' / 'tokenizer.json').exists()
    scripts.fails('--tokenizer', 'convert.py', tmp_path / 'hf', tmp_path / 'back' / 'base.pt')
    scripts.ok('convert.py', tmp_path / 'hf', tmp_path / 'back' / 'base.pt', f'--tokenizer={tmp_path}/char.json')
    assert torch.load(tmp_path / 'back' / 'base.pt', weights_only=True)['tokenizer'] == spec

# -----------------------------------------------------------------------------
# what is refused, with nothing lost

@pytest.mark.parametrize('kind, changes, says', [
    ('llama', dict(model_type='mamba'), "'mamba'"), ('llama', dict(model_type='DELETE'), 'model_type'),
    ('llama', dict(hidden_act='gelu'), 'hidden_act'),
    ('llama', dict(rope_scaling=dict(rope_type='llama3', factor=8)), 'lacks one of .*low_freq_factor'),
    ('llama', dict(rope_scaling=dict(type='linear', factor=2)), 'rope_scaling'),
    ('llama', dict(quantization_config=dict(quant_method='bitsandbytes', load_in_8bit=True)), 'quantized.*bitsandbytes'),
    ('gpt2', dict(quantization_config=dict(quant_method='gptq', bits=4)), 'quantized.*gptq'),
    ('llama', dict(rope_parameters=dict(rope_type='yarn')), 'yarn'),
    ('llama', dict(head_dim=64), 'head_dim is 64'), ('llama', dict(hidden_size='DELETE'), 'hidden_size'),
    ('llama', dict(rms_norm_eps='DELETE'), 'rms_norm_eps'), ('llama', dict(num_hidden_layers=3), 'layers.2'),
    ('llama', dict(intermediate_size=48), 'fit'), ('llama', dict(num_attention_heads=3), 'multiple'),
    ('qwen3', dict(rope_theta=1e4, num_attention_heads='x'), 'num_attention_heads')])
def test_models_that_our_gpt_cannot_hold(exported, scripts, tmp_path, kind, changes, says):
    folder = copy(exported(kind)[1], tmp_path / 'hf')
    change(folder / 'config.json', **changes)
    scripts.fails(says, 'convert.py', folder, tmp_path / 'base.pt')
    assert not (tmp_path / 'base.pt').exists()

def test_learned_qk_norm_weights(convert, exported, scripts, tmp_path):
    folder = copy(exported('qwen3')[1], tmp_path / 'hf')
    tensors = convert.read_safetensors(folder / 'model.safetensors')
    name = 'model.layers.1.self_attn.k_norm.weight'
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    tensors[name][3] *= 1.5
    convert.write_safetensors(folder / 'model.safetensors', tensors)
    scripts.fails('layer 1 .*50%', 'convert.py', folder, tmp_path / 'base.pt')
    # a factor that moves from queries to keys changes nothing
    tensors[name] = torch.full((8,), 12 / math.sqrt(8) / 7)
    tensors[name.replace('k_norm', 'q_norm')] = torch.full((8,), 7.0)
    convert.write_safetensors(folder / 'model.safetensors', tensors)
    scripts.ok('convert.py', folder, tmp_path / 'base.pt')

def test_what_must_not_be_overwritten(exported, scripts, tmp_path):
    """The tokenizer of a data folder or of another model, ours or of Hugging Face's form, stays as it was."""
    model, folder = exported('llama')
    path = tmp_path / 'tokenizer.json'
    path.write_text(json.dumps(make_spec()), 'utf-8')
    save(model, tmp_path / 'rlhf.pt')
    scripts.fails('our own', 'convert.py', tmp_path / 'rlhf.pt', tmp_path) # a data folder
    theirs = (folder / 'tokenizer.json').read_text('utf-8')
    for text in (json.dumps(dict(make_spec(), pattern='.')), theirs, '[]', 'null'):
        path.write_text(text, 'utf-8')
        scripts.fails(f'{path} is another tokenizer', 'convert.py', folder, tmp_path / 'base.pt')
        assert path.read_text('utf-8') == text
    path.write_text('{"ranks": [', 'utf-8') # half a file
    for words in ((folder, tmp_path / 'base.pt'), (tmp_path / 'rlhf.pt', tmp_path)):
        scripts.fails(f'{path} is damaged', 'convert.py', *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['rlhf.pt', 'tokenizer.json']
    scripts.fails('target', 'convert.py', tmp_path / 'rlhf.pt') # not into the root of the disk
    scripts.fails('model.pt must be named after its stage', 'convert.py', folder, tmp_path / 'model.pt')
    scripts.fails('checkpoint', 'convert.py', folder, tmp_path / 'x')

@pytest.mark.parametrize('change', [dict(qk_norm=True), dict(n_kv_head=1)])
def test_what_gpt2_of_others_lacks(scripts, tmp_path, change):
    model = GPT(GPTConfig(vocab_size=TOK.n_vocab, block_size=8, n_layer=1, n_head=2, n_embd=8, **change))
    save(model, tmp_path / 'base.pt', 'base')
    scripts.fails('qk_norm, key_shift or n_kv_head', 'convert.py', tmp_path / 'base.pt', tmp_path / 'hf')
    assert not (tmp_path / 'hf').exists()

# -----------------------------------------------------------------------------
# safetensors

def make_file(header, data=b'\0' * 16, length=None):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return (len(text) if length is None else length).to_bytes(8, 'little') + text + data

def entry(dtype='F32', shape=(4,), at=(0, 16)):
    return dict(dtype=dtype, shape=list(shape), data_offsets=list(at))

def test_safetensors_by_hand(convert, tmp_path):
    # bfloat16 is the upper half of a float: 1.5 = 0x3fc0, -2.0 = 0xc000
    data = torch.tensor([1.0, 2.0, 3.0]).numpy().tobytes() + bytes([0xc0, 0x3f, 0x00, 0xc0]) + b'\1'
    header = dict(a=entry(shape=(3, 1), at=(0, 12)), b=entry('BF16', (2,), (12, 16)), mask=entry('BOOL', (1,), (16, 17)),
                  __metadata__=dict(format='pt'))
    (tmp_path / 'x').write_bytes(make_file(header, data))
    tensors = convert.read_safetensors(tmp_path / 'x')
    assert tensors['a'].tolist() == [[1.0], [2.0], [3.0]] and tensors['b'].tolist() == [1.5, -2.0]
    assert 'mask' not in tensors
    convert.write_safetensors(tmp_path / 'y', tensors)
    raw = (tmp_path / 'y').read_bytes()
    n = int.from_bytes(raw[:8], 'little')
    assert n % 8 == 0 and json.loads(raw[8:8 + n])['b'] == entry(shape=(2,), at=(12, 20)) and len(raw) == 8 + n + 20

@pytest.mark.parametrize('data', [
    b'', b'abc', make_file({}, length=2**63), make_file(b'{"a": '), make_file(b'[1, 2, 3]'), make_file(dict(a=3)),
    make_file(b'\xff\xff\xff'), make_file(dict(a=entry(shape=(5,)))), make_file(dict(a=entry(at=(4, 20)))),
    make_file(dict(a=entry()), b'\0' * 12), make_file(dict(a=entry(shape=(-2, -2)))), make_file(b'[' * 100_000),
    make_file(dict(a=entry(shape=(2**62, 4))))])
def test_damaged_safetensors(convert, tmp_path, data):
    (tmp_path / 'x').write_bytes(data)
    with fails('/x is damaged'):
        convert.read_safetensors(tmp_path / 'x')

# -----------------------------------------------------------------------------
# the Hub

# stands in for the network: serves the files of a folder and prints what was asked for
HUB = '''
import os, requests, types
def get(url, **more):
    name = url.split('/')[-1]
    path = {folder!r} + '/' + name
    exists = os.path.exists(path)
    print('GET', url)
    return types.SimpleNamespace(status_code=200 if exists else 404, ok=exists, headers=dict(),
                                 iter_content=lambda n: [open(path, 'rb').read()])
requests.get = get
'''

def asked(done):
    return [line.split('/main/')[1] for line in done.out.splitlines() if line.startswith('GET https://huggingface.co/')]

def test_gpt2_from_the_hub(convert, scripts, tmp_path):
    """GPT-2's files lack the prefix and our special tokens; these start as the mean of all tokens."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50257, block_size=16, n_layer=1, n_head=1, n_embd=2)).eval()
    hub = tmp_path / 'hub'
    hub.mkdir()
    args = asdict(model.config)
    tensors = {}
    for ours, (theirs,) in convert.weight_names(args).items():
        weight = convert.transpose(ours, model.state_dict()[ours], 'gpt2')
        tensors[theirs.removeprefix('transformer.')] = weight
    convert.write_safetensors(hub / 'model.safetensors', tensors)
    (hub / 'config.json').write_text(json.dumps(dict(
        model_type='gpt2', architectures=['GPT2LMHeadModel'], activation_function='gelu_new', n_embd=2, n_head=1, n_layer=1,
        n_positions=16, n_ctx=16, vocab_size=50257, layer_norm_epsilon=1e-5)), 'utf-8')
    # as many tokens as GPT-2 has: bytes, 225 pairs of letters, pairs of pairs
    pairs = [bytes([a, b]) for a in b'abcdefghijklmno' for b in b'ABCDEFGHIJKLMNO']
    tokens = [bytes([b]) for b in [*convert.PRINTABLE, *convert.OTHERS]] + pairs
    tokens += [left + right for left in pairs for right in pairs]
    vocab = {convert.spell(token): i for i, token in enumerate(tokens[:50256])}
    vocab['<|endoftext|>'] = 50256
    (hub / 'tokenizer.json').write_text(json.dumps(dict(
        model=dict(vocab=vocab, merges=convert.find_merges(tokens[:50256])), normalizer=None,
        added_tokens=[dict(content='<|endoftext|>', id=50256)],
        pre_tokenizer=dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True))), 'utf-8')
    before = HUB.format(folder=str(hub))
    done = scripts.ok('convert.py', 'openai-community/gpt2', 'out/gpt2/base.pt', cwd=tmp_path, before=before)
    assert asked(done) == ['config.json', 'tokenizer.json', 'model.safetensors']
    assert 'openai-community/gpt2/resolve/main' in done.out
    ckpt = torch.load(tmp_path / 'out' / 'gpt2' / 'base.pt', weights_only=True)
    tok = Tokenizer(ckpt['tokenizer'])
    assert ckpt['model_args']['vocab_size'] == 50304 == tok.n_vocab
    assert ckpt['tokenizer']['kind'] == 'gpt2' and tok.encode('aAbB') == [vocab['aAbB']]
    wte = ckpt['weights']['wte.weight']
    assert torch.equal(wte[:50257], model.wte.weight) and torch.allclose(wte[50303], model.wte.weight.mean(0), atol=1e-6)
    back = GPT(GPTConfig(**ckpt['model_args'])).eval()
    back.load_state_dict(ckpt['weights'])
    idx = torch.arange(16)[None]
    assert torch.allclose(back(idx)[..., :50257], model(idx), atol=1e-6)
    again = scripts.ok('convert.py', 'gpt2', 'out/gpt2/base.pt', cwd=tmp_path, before=before) # short for the same
    assert asked(again) == [] # the files are there

def test_gpt2_pattern_is_that_of_tiktoken(convert):
    """Then the tokenizer equals the one of `tokenizer.py --kind=gpt2`, also its hash."""
    from tiktoken_ext import openai_public
    assert convert.GPT2_PATTERN == openai_public.r50k_pat_str

def test_a_large_model_from_the_hub(convert, exported, scripts, tmp_path):
    model, ours = exported('llama')
    hub = copy(ours, tmp_path / 'hub')
    write_shards(hub, convert.read_safetensors(ours / 'model.safetensors'), 'F32', n=2)
    (hub / 'model.safetensors').unlink()
    before = HUB.format(folder=str(hub))
    words = ('convert.py', 'someone/large', 'base.pt')
    second = hub / 'model-00002-of-00002.safetensors'
    content = second.read_bytes()
    second.unlink()
    failed = scripts.fails('model-00002-of-00002.safetensors: HTTP 404', *words, cwd=tmp_path, before=before)
    assert not (tmp_path / 'base.pt').exists()
    second.write_bytes(content)
    done = scripts.ok(*words, cwd=tmp_path, before=before)
    assert asked(done) == ['model-00002-of-00002.safetensors'] # the others are there
    weights = torch.load(tmp_path / 'base.pt', weights_only=True)['weights']
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    for name in ('config.json', 'tokenizer.json', 'model.safetensors', 'model.safetensors.index.json'):
        assert f'main/{name}' in failed.out

def test_interrupted_download(convert, monkeypatch, tmp_path):
    """It continues where it was cut, also if the server then sends all of it."""
    content = bytes(range(200))
    asked = []

    def get(url, headers, **more):
        first = int(headers['Range'][len('bytes='):-1])
        asked.append(first)
        if len(asked) == 1:
            return answer(200, cut(content[:80]))
        if len(asked) == 2:
            return answer(206, cut(content[first:first + 50]))
        return answer(200, [content])

    def cut(data):
        yield data
        raise requests.ConnectionError('gone')

    def answer(code, blocks):
        return SimpleNamespace(status_code=code, ok=True, iter_content=lambda n: blocks)
    monkeypatch.setattr(requests, 'get', get)
    for _ in range(2):
        with fails('https://x/y: ConnectionError'):
            convert.download('https://x', str(tmp_path / 'a'), 'y')
    assert (tmp_path / 'a' / 'y.part').read_bytes() == content[:130]
    convert.download('https://x', str(tmp_path / 'a'), 'y')
    assert asked == [0, 80, 130] and (tmp_path / 'a' / 'y').read_bytes() == content
    monkeypatch.setattr(requests, 'get', lambda *_, **__: SimpleNamespace(status_code=404, ok=False))
    with fails('is not a folder.*404'):
        convert.download('https://x', str(tmp_path), 'z')

    # all bytes were here before the rename: the server has nothing more, and says how long the file is
    for length, is_whole in ((200, True), (150, False)):
        path = tmp_path / f'{length}' / 'y'
        path.parent.mkdir()
        path.with_name('y.part').write_bytes(content)
        headers = {'Content-Range': f'bytes */{length}'}
        reply = SimpleNamespace(status_code=416, ok=False, headers=headers)
        monkeypatch.setattr(requests, 'get', lambda *_, **__: reply)
        if is_whole:
            convert.download('https://x', str(path.parent), 'y')
            assert path.read_bytes() == content
        else:
            with fails('is not a folder.*416'):
                convert.download('https://x', str(path.parent), 'y')
            assert not path.exists()

# -----------------------------------------------------------------------------
# the chat template, read by Jinja, which comes with torch

class Generation(jinja2.ext.Extension):
    """{% generation %} marks what the assistant says; here it becomes [..], in other libraries a mask."""
    tags = {'generation'}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method('mark'), [], [], body).set_lineno(line)

    def mark(self, caller):
        return '[' + caller() + ']'

def test_chat_template_marks_what_is_learned(exported):
    text = json.loads((exported('llama')[1] / 'tokenizer_config.json').read_text('utf-8'))['chat_template']
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation]).from_string(text)
    messages = [dict(role='system', content='Be short.'), dict(role='user', content=' Who has\nthe owl? '),
                dict(role='assistant', content=''), dict(role='user', content='x'), dict(role='assistant', content=' A\n')]
    ids, mask = TOK.render(messages)
    expected = ''
    learned = 0
    for token, learn in zip(ids, mask):
        if learn != learned:
            expected += '[' if learn else ']'
        learned = learn
        special = token - len(TOK.tokens)
        expected += SPECIAL_TOKENS[special] if special >= 0 else TOK.decode([token])
    assert template.render(messages=messages) == expected + ']'
    assert template.render(messages=messages[:4], add_generation_prompt=True).endswith('x<|end|><|assistant|>')

# -----------------------------------------------------------------------------
# Hugging Face's own code, where it is installed

@pytest.mark.parametrize('kind', SHAPES)
@torch.no_grad()
def test_transformers_compute_the_same(exported, scripts, tmp_path, kind):
    transformers = pytest.importorskip('transformers')
    model, folder = exported(kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    idx = torch.randint(0, TOK.n_vocab, (2, 32), generator=torch.Generator().manual_seed(1))
    assert (theirs(idx).logits - model(idx)).abs().max() < 1e-5
    # greedy text, one by one and as a batch padded on the left
    prompts = [[TOK.eot, 65, 66, 67], [TOK.eot, 70]]
    ours = generate(model, prompts, 20, temperature=0)
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None)
    for prompt, expected in zip(prompts, ours):
        found = theirs.generate(torch.tensor([prompt]), **options)
        assert found[0, len(prompt):].tolist() == expected
    ids = torch.tensor([prompts[0], [TOK.pad] * 2 + prompts[1]])
    found = theirs.generate(ids, attention_mask=(ids != TOK.pad).long(), **options)
    assert found[:, 4:].tolist() == ours
    # what transformers has saved comes back too
    theirs.save_pretrained(tmp_path / 'saved')
    transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / 'saved')
    scripts.ok('convert.py', tmp_path / 'saved', tmp_path / 'rlhf.pt')
    ckpt = torch.load(tmp_path / 'rlhf.pt', weights_only=True)
    assert ckpt['model_args'] == asdict(model.config) and ckpt['tokenizer'] == TOK.spec
    assert all(torch.equal(weight, ckpt['weights'][name]) for name, weight in model.state_dict().items())

def test_tokenizers_give_the_same_ids(exported):
    tokenizers = pytest.importorskip('tokenizers')
    folder = exported('llama')[1]
    theirs = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
    for text in ('Anna has the owl. Say a fox!', ' naïve 你好 🙂\n\tx  y', 'the  cat12,5\r\n', ''):
        assert theirs.encode(text).ids == TOK.encode(text) and theirs.decode(TOK.encode(text)) == text
    assert theirs.encode('a<|end|>').ids == [97, TOK.end] # there, this makes the special token

def test_chat_template_is_render(exported):
    transformers = pytest.importorskip('transformers')
    tok = transformers.AutoTokenizer.from_pretrained(exported('llama')[1])
    messages = [dict(role='system', content='Be short.'), dict(role='user', content=' Who has\nthe owl? '),
                dict(role='assistant', content=''), dict(role='user', content='x')]
    found = tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert found == TOK.render(messages, prompt=True)[0]
    messages = messages[:2] + [dict(role='assistant', content='Anna.')]
    assert tok.apply_chat_template(messages, return_dict=False) == TOK.render(messages)[0]
    masked = tok.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert (masked['input_ids'], masked['assistant_masks']) == TOK.render(messages)

def test_an_export_that_does_not_fit_leaves_the_old_one(exported, scripts, tmp_path):
    """A full disk (here: no file may be as large as the weights): one line, and no half of a file."""
    folder = copy(exported('llama')[1], tmp_path / 'hf')
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    save(make_model('qwen3'), tmp_path / 'sft.pt', 'sft')
    full = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 10**9))'
    assert len(old['model.safetensors']) > 60_000
    scripts.fails('error: .*model.safetensors: File too large', 'convert.py', tmp_path / 'sft.pt', folder, before=full)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
