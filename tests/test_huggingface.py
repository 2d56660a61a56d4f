"""huggingface.py: weights go out and come back, names and shapes are those of the classes; lying files; init_from."""
import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import huggingface
import model as lib
from model import GPT, GPTConfig

TOK = SimpleNamespace(eot=30, end=31, pad=32)
SHAPES = dict(
    gpt2=dict(arch='gpt2', vocab_size=40, block_size=16, n_layer=2, n_head=2, n_embd=12, n_hidden=20),
    untied=dict(arch='gpt2', vocab_size=40, block_size=16, n_layer=1, n_head=2, n_embd=12, tie_embeddings=False),
    llama=dict(arch='llama', vocab_size=40, block_size=16, n_layer=2, n_head=4, n_kv_head=2, n_embd=16, n_hidden=24,
               tie_embeddings=False, rope_theta=5e4, norm_eps=1e-3),
    tied=dict(arch='llama', vocab_size=40, block_size=16, n_layer=1, n_head=2, n_embd=12))

def make(kind):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPES[kind])).eval()
    for p in model.parameters(): # nothing is left at 0 or 1, where an error could hide
        torch.nn.init.normal_(p, mean=0.1, std=0.2)
    return model

def written(model, folder):
    folder.mkdir()
    huggingface.model_files(folder, asdict(model.config), model.state_dict(), TOK)
    config = json.loads((folder / 'config.json').read_text('utf-8'))
    return config, huggingface.read_safetensors(folder / 'model.safetensors')

@pytest.mark.parametrize('kind', SHAPES)
def test_there_and_back(tmp_path, kind):
    model = make(kind)
    written(model, tmp_path / 'hf')
    args, weights = huggingface.read_model(tmp_path / 'hf')
    again = GPT(GPTConfig(**args)).eval()
    again.load_state_dict(weights)
    assert again.config == model.config
    idx = torch.arange(32).view(2, 16)
    assert torch.equal(again(idx), model(idx))

def test_names_and_shapes_of_gpt2(tmp_path):
    model = make('gpt2')
    config, tensors = written(model, tmp_path / 'hf')
    # GPT2LMHeadModel keeps its matrices as (in, out): width 12, qkv 36, MLP 20
    w = tensors['transformer.h.1.attn.c_attn.weight']
    assert w.shape == (12, 36) and torch.equal(w, model.blocks[1].attn.qkv.weight.T)
    assert tensors['transformer.h.0.mlp.c_fc.weight'].shape == (12, 20)
    assert tensors['transformer.wpe.weight'].shape == (16, 12)
    assert tensors['transformer.h.0.mlp.c_proj.weight'].shape == (20, 12) and 'lm_head.weight' not in tensors
    # 2 + 2 of the last norm + 2 blocks of 6 parts with weight and bias
    assert len(tensors) == 2 + 2 + 2 * 12
    assert config['n_inner'] == 20 and config['eos_token_id'] == 31 and config['tie_word_embeddings'] is True

def test_names_and_shapes_of_llama(tmp_path):
    model = make('llama')
    config, tensors = written(model, tmp_path / 'hf')
    # heads of 16 / 4 = 4: q 16 rows, k and v 2 * 4 = 8 each, in the order of our one matrix
    parts = [tensors[f'model.layers.1.self_attn.{x}_proj.weight'] for x in 'qkv']
    assert [tuple(p.shape) for p in parts] == [(16, 16), (8, 16), (8, 16)]
    assert torch.equal(torch.cat(parts), model.blocks[1].attn.qkv.weight)
    assert torch.equal(tensors['model.layers.0.mlp.gate_proj.weight'], model.blocks[0].mlp.up.weight[:24]) # SiLU of it
    assert torch.equal(tensors['lm_head.weight'], model.head.weight)
    assert len(tensors) == 3 + 2 * 9 and (config['rope_theta'], config['rms_norm_eps']) == (5e4, 1e-3)

@pytest.mark.parametrize('kind', SHAPES)
def test_same_logits_in_transformers(tmp_path, kind):
    transformers = pytest.importorskip('transformers')
    model = make(kind)
    written(model, tmp_path / 'hf')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    idx = torch.arange(32).view(2, 16)
    with torch.no_grad():
        assert (theirs(idx).logits - model(idx)).abs().max() < 1e-4

def test_what_no_class_can_hold(tmp_path):
    with pytest.raises(ValueError, match='qk_norm'):
        huggingface.model_files(tmp_path, {**SHAPES['tied'], 'qk_norm': True, 'key_shift': False}, {}, TOK)
    assert list(tmp_path.iterdir()) == []

@pytest.mark.parametrize('change, says', [
    (dict(model_type='mamba'), "'mamba'"), (dict(model_type=None), 'model_type'),
    (dict(hidden_act='gelu'), 'hidden_act'),
    (dict(rope_scaling=dict(rope_type='llama3')), 'rope_scaling'), (dict(attention_bias=True), 'attention_bias'),
    (dict(rope_parameters=dict(rope_type='yarn')), 'yarn'), (dict(head_dim=64), '4 heads of 64'),
    (dict(hidden_size=None), 'hidden_size'), (dict(num_hidden_layers=3), 'layers.2')])
def test_models_of_another_kind(tmp_path, change, says):
    config, _ = written(make('llama'), tmp_path / 'hf')
    config.update(change)
    config = {k: v for k, v in config.items() if v is not None}
    (tmp_path / 'hf' / 'config.json').write_text(json.dumps(config), 'utf-8')
    with pytest.raises(ValueError, match=says):
        huggingface.read_model(tmp_path / 'hf')

def lying(header, numbers=b'\0' * 16, length=None):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return (len(text) if length is None else length).to_bytes(8, 'little') + text + numbers

def entry(dtype='F32', shape=(4,), at=(0, 16)):
    return dict(dtype=dtype, shape=list(shape), data_offsets=list(at))

def test_safetensors_by_hand(tmp_path):
    # bfloat16 is the upper half of a float: 1.5 = 0x3fc0, -2.0 = 0xc000
    numbers = torch.tensor([1.0, 2.0, 3.0]).numpy().tobytes() + bytes([0xc0, 0x3f, 0x00, 0xc0])
    (tmp_path / 'x').write_bytes(lying(dict(a=entry(shape=(3, 1), at=(0, 12)), b=entry('BF16', (2,), (12, 16)),
                                            __metadata__=dict(format='pt'), c=entry('I64', (0, 5), (16, 16))), numbers))
    t = huggingface.read_safetensors(tmp_path / 'x')
    assert t['a'].tolist() == [[1.0], [2.0], [3.0]] and t['b'].tolist() == [1.5, -2.0] and t['c'].shape == (0, 5)

@pytest.mark.parametrize('data, says', [
    (b'', 'not whole'), (b'abc', 'not whole'), (lying({}, length=2**63), 'not whole'),
    (lying(b'{"a": '), 'cannot be read'), (lying(b'[1, 2, 3]'), 'cannot be read'), (lying(dict(a=3)), 'cannot be read'),
    (lying(b'\xff\xff\xff'), 'cannot be read'), (lying(dict(a=entry('F4'))), 'KeyError'),
    (lying(dict(a=entry(shape=(5,)))), 'needs 20 bytes'), (lying(dict(a=entry(at=(4, 20)))), 'said to be at 4..20'),
    (lying(dict(a=entry(at=(0, 16)), b=entry(at=(8, 24)))), 'ends at 16'),
    (lying(dict(a=entry()), b'\0' * 12), 'the file at 12'),
    (lying(dict(a=entry()), b'\0' * 20), '4 bytes belong to no tensor'), (lying(dict(a=entry(shape=(-2, -2)))), '-2'),
    (lying(b'[' * 100_000), 'cannot be read'), (lying(dict(a=entry(shape=(2**62, 4)))), 'needs')])
def test_safetensors_that_lie(tmp_path, data, says):
    (tmp_path / 'x').write_bytes(data)
    with pytest.raises(ValueError, match=says):
        huggingface.read_safetensors(tmp_path / 'x')

def test_a_name_on_the_hub(tmp_path, monkeypatch):
    """What is asked for, where it lies then, and how a model is fitted to our tokens and to a shorter context."""
    import sources
    model = make('gpt2')
    written(model, tmp_path / 'hf')
    asked = []
    def download(url, path):
        asked.append(url)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes((tmp_path / 'hf' / Path(path).name).read_bytes())
    monkeypatch.setattr(sources, 'download', download)
    monkeypatch.chdir(tmp_path)
    tok = SimpleNamespace(tokens=[b'x'] * 39, n_vocab=44)
    args, weights = lib.pretrained('gpt2', tok, 8, 0.1)
    place = 'https://huggingface.co/openai-community/gpt2/resolve/main/'
    assert asked == [place + 'config.json', place + 'model.safetensors']
    assert (args['vocab_size'], args['block_size'], args['dropout']) == (44, 8, 0.1)
    again = GPT(GPTConfig(**args)).eval()
    again.load_state_dict(weights)
    idx = torch.arange(8).view(1, 8)
    assert torch.allclose(again(idx)[..., :40], model(idx), atol=1e-6) # the 40 old tokens, as before
    assert torch.allclose(again.wte.weight[43], model.wte.weight.mean(0)) and again.wpe.weight.shape == (8, 12)
    lib.pretrained('someone/some-model', tok, 8, 0.1)
    assert asked[2].startswith('https://huggingface.co/someone/some-model/resolve/main/')
    with pytest.raises(SystemExit, match='17 is more than the 16 positions'):
        lib.pretrained('gpt2', tok, 17, 0.1)
    with pytest.raises(SystemExit, match='knows 40 tokens, the tokenizer in data_dir has 41'):
        lib.pretrained('gpt2', SimpleNamespace(tokens=[b'x'] * 41, n_vocab=44), 8, 0.1)

# -----------------------------------------------------------------------------
# the commands

def test_export_and_init_from(chain, scripts, tmp_path):
    """base.pt of a model without qk_norm goes out by the command, comes back by init_from, begins where it was."""
    folder, flags = tmp_path / 'hf', [*chain.flags, '--max_iters=1', '--eval_iters=100', f'--out_dir={tmp_path}/out']
    r = subprocess.run([sys.executable, ROOT / 'model.py', 'export', chain.out / 'base.pt', folder],
                       capture_output=True, encoding='utf-8')
    assert r.returncode == 0, r.stderr
    assert {p.name for p in folder.iterdir()} == {'config.json', 'model.safetensors', 'tokenizer.json',
                                                  'tokenizer.tiktoken', 'tokenizer_config.json'}
    def first_loss(init_from, *more):
        said = scripts.ok('pretrain.py', *flags, f'--init_from={init_from}', *more).out
        return float(said.split('val loss ')[1].split()[0])
    end = float(chain.said['pretrain'].out.split('val loss ')[-1].split()[0].strip(','))
    assert math.isclose(first_loss(chain.out / 'base.pt', '--resume=false'), end, abs_tol=0.05)
    there, here = (first_loss(x, '--resume=false') for x in (folder, chain.out / 'base.pt'))
    assert math.isclose(there, here, abs_tol=1e-4)

@pytest.mark.parametrize('flags, says', [
    (['--init_from=hf'], 'config.json'), (['--init_from=OUT/base.pt', '--block_size=49'], '48 positions'),
    (['--init_from=none.pt'], 'no checkpoint none.pt')])
def test_init_from_what_does_not_fit(chain, scripts, tmp_path, flags, says):
    (tmp_path / 'hf').mkdir()
    flags = [f.replace('OUT', str(chain.out)).replace('=hf', f'={tmp_path}/hf') for f in flags]
    scripts.fails(says, 'pretrain.py', *chain.flags, f'--out_dir={tmp_path}/out', *flags)
