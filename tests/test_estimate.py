"""
scaling.py --estimate: memory, hours and dollars of all stages, against arithmetic by hand, against our own
measurements on an H100 (LOG.md), and against nanochat's published run.
"""
import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from conftest import ROOT, definitions, make_spec, user, write_rows
from model import GPT, GPTConfig, ScalarModel

D20 = dict(arch='llama', n_layer=20, n_head=10, n_embd=1280, n_hidden=3424, tie_embeddings=False, qk_norm=True,
           vocab_size=65536, block_size=2048)
D32 = dict(D20, n_layer=32, n_head=16, n_embd=2048, n_hidden=5472)

@pytest.fixture
def load():
    """load(n_gpus=8, ...) -> the functions of --estimate."""
    return lambda **more: definitions('scaling.py', **dict(dict(n_gpus=1, block_size=2048, gpu_bytes=84.9e9), **more))

def meta(kind=GPT, **shape):
    with torch.device('meta'):
        return kind(GPTConfig(**shape))

def gigabytes(functions, stage):
    return sum(functions.memory(stage, stage.size).values()) / 1e9

# -----------------------------------------------------------------------------
# activations

SHAPES = [dict(arch='gpt2'), dict(arch='llama', qk_norm=True, tie_embeddings=False, n_kv_head=2)]

@pytest.mark.parametrize('shape', SHAPES, ids=['gpt2', 'llama'])
def test_eager_activations_are_what_autograd_keeps(shape, load, monkeypatch):
    """The same count on real tensors: CPU autocast, with LayerNorm in fp32, as it is on a GPU."""
    config = GPTConfig(vocab_size=100, block_size=32, n_layer=2, n_head=4, n_embd=64, **shape)
    net, x = GPT(config), torch.randint(100, (3, 32))
    norm, one = F.layer_norm, torch.ones((), dtype=torch.bfloat16, requires_grad=True)
    monkeypatch.setattr(F, 'rms_norm', lambda x, *more, **options: (x * one).contiguous()) # keeps x, as the GPU's kernel
    monkeypatch.setattr(F, 'layer_norm', lambda x, *more, **options: norm(x.float(), *more, **options))
    embed = net.embed
    net.embed = lambda idx, pos: embed(idx, pos).bfloat16() # which model.py does on a GPU only
    kept = {}
    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast('cpu', torch.bfloat16):
        net.hidden(x)
    for weight in [*net.parameters(), *net.buffers()]:
        kept.pop(weight.untyped_storage().data_ptr(), None)
    copies = {tuple(sorted(p.shape)) for p in net.parameters()} # matrices in bf16 are no activations
    real = sum(t.untyped_storage().nbytes() for t in kept.values() if tuple(sorted(t.shape)) not in copies)
    counted = 3 * load().count_activations(meta(**vars(config)), 32, False)
    assert counted == pytest.approx(real, rel=0.03)

def test_compiled_activations_by_hand(load):
    """
    Numbers of two bytes for each token. torch's own partitioner (torch.compile with aot_eager_decomp_partition) keeps
    16.0 C a layer of the first and, with the H = 2.69 C of d20, 19.1 C of the second.
    """
    T, L, C, H = 32, 3, 64, 192
    common = dict(vocab_size=100, block_size=T, n_layer=L, n_head=4, n_embd=C)
    # gpt2: norm C, qkv 3C, y C, sum C, norm C, up 4C, GELU 4C, sum C; before the output matrix: norm C
    gpt2 = L * 16 * C + C
    # llama: norm C, qkv 3C, q and k after norm and rotation 2C, y C, with its heads side by side C, sum C, norm C,
    # up 2H, gated H, sum C
    llama = L * (11 * C + 3 * H) + C
    count = load().count_activations
    assert count(meta(**common), T, True) == 2 * T * gpt2
    assert count(meta(**common, arch='llama', n_hidden=H, qk_norm=True), T, True) == 2 * T * llama

# -----------------------------------------------------------------------------
# memory, against what was measured

def test_memory_of_our_runs_on_an_h100(load):
    """LOG.md, "the first run on a GPU"; one GPU."""
    functions = load(block_size=1024)
    gpt2 = meta(vocab_size=50304)
    settings = SimpleNamespace(batch_size=64, total_batch_size=128, compile=True)
    assert gigabytes(functions, functions.new_stage(settings, [gpt2])) == pytest.approx(35.4, rel=0.05)

    functions = load(block_size=2048)
    settings = SimpleNamespace(batch_size=16, total_batch_size=64, compile=True, optimizer='muon')
    assert gigabytes(functions, functions.new_stage(settings, [meta(**D20)])) == pytest.approx(49.8, rel=0.05)

    # an update of RLHF with four models of 124M: 512 answers, 64 at a time, 64 + 128 tokens
    functions = load(block_size=192)
    gpt2 = meta(vocab_size=50304, block_size=192)
    scorer = meta(ScalarModel, vocab_size=50304, block_size=192).body
    stage = functions.new_stage(
        SimpleNamespace(batch_size=512), [gpt2, scorer], frozen=[gpt2, scorer], size=64, share=256, n_logits=128,
        sampled=512)
    assert gigabytes(functions, stage) == pytest.approx(17.1, rel=0.1)

def nanochat_d20():
    """Our GPT with nanochat's MLP and without weights in the norms."""
    gpt = meta(**D20)
    for block in gpt.blocks:
        block.mlp = torch.nn.Sequential(
            torch.nn.Linear(1280, 5120, bias=False, device='meta'), Square(),
            torch.nn.Linear(5120, 1280, bias=False, device='meta'))
    for module in [gpt, *gpt.blocks]:
        for name in ('norm', 'norm1', 'norm2'):
            if hasattr(module, name):
                setattr(module, name, torch.nn.RMSNorm(1280, elementwise_affine=False))
    return gpt

class Square(torch.nn.Module):
    def forward(self, x):
        return x.relu().square()

def test_nanochat_d20(load):
    """
    What a report of nanochat's speedrun.sh (October 2025, 8xH100) says: 560,988,160 parameters, 3.491758e+09 FLOPs a
    token, 21,400 steps of 524,288 tokens, 3.917670e+19 FLOPs, device_batch_size 32, "Peak memory usage: 75422.02MiB".
    Its optimizers divide their states among the GPUs, it has no DDP, its token embeddings are in bf16, and it rotates
    queries and keys before it transposes them, so that the heads of y stand side by side without a copy.
    """
    functions = load(n_gpus=8)
    gpt = nanochat_d20()
    assert gpt.n_params() == 560_988_160
    assert gpt.flops_per_token(2048) == pytest.approx(3.491758e9, rel=1e-6)
    assert 21400 * 524_288 * gpt.flops_per_token(2048) == pytest.approx(3.917670e19, rel=1e-6)
    ours = meta(**D20) # a gated MLP and weights in the norms
    assert ours.n_params() == 561_859_840
    assert ours.flops_per_token(2048) == pytest.approx(3.491758e9, rel=0.01)

    settings = SimpleNamespace(batch_size=32, total_batch_size=256, compile=True, optimizer='muon')
    parts = functions.memory(functions.new_stage(settings, [gpt]), 32)
    assert 'gradients' not in parts # one micro-batch is the step, so they come when activations go
    del parts["ddp's copy of the gradients"]
    parts['muon'] /= 8
    parts['weights'] -= 2 * 65536 * 1280
    parts['activations'] -= 32 * 2048 * 20 * 1280 * 2
    used = sum(parts.values())
    assert used == pytest.approx(75422.02 * 2**20, rel=0.1) and used == pytest.approx(75.4e9, rel=0.1)

def test_nanochat_hours(load):
    """
    The whole speedrun took 3h51m. Of it 21,400 steps of pretraining and 765 of mid-training, of 524,288 tokens each;
    SFT of 20,843 conversations; 13 minutes of examinations, by the times of its report.
    """
    functions = load(n_gpus=8, gpu_flops=989e12)
    stage = SimpleNamespace(compiled=True)
    n_tokens = (21400 + 765) * 524_288 + 20_843 * 500
    seconds = functions.learn_seconds(n_tokens * 3.491758e9, stage) + 13 * 60
    assert seconds / 3600 == pytest.approx(3 + 51 / 60, rel=0.25)

def test_d20_with_ddp(load):
    """Four bytes for each of 561,859,840 parameters: 2.25 GB of gradients, and as much for DDP's buckets."""
    functions = load(n_gpus=8)
    gpt = meta(**D20)
    settings = SimpleNamespace(batch_size=8, total_batch_size=256, compile=True, optimizer='muon')
    parts = functions.memory(functions.new_stage(settings, [gpt]), 8)
    n = 561_859_840
    matrices = 20 * (4 * 1280**2 + 3 * 3424 * 1280) # Muon keeps one number of these, AdamW two of the others
    n_tokens = 8 * 2048
    gb = {
        'weights': 4 * n, 'gradients': 4 * n, "ddp's copy of the gradients": 4 * n,
        'weights in bf16': 2 * (matrices + 65536 * 1280 + 41 * 1280), 'muon': 4 * (2 * n - matrices),
        'logits': n_tokens * 65536 * 4, 'activations': n_tokens * 2 * (20 * (11 * 1280 + 3 * 3424) + 1280)}
    assert parts == gb
    assert round(parts["ddp's copy of the gradients"] / 1e9, 2) == 2.25

# -----------------------------------------------------------------------------
# RLHF, four models

def rlhf_stage(functions, shape, **settings):
    gpt, scorer = meta(**shape), meta(ScalarModel, **shape).body
    settings = SimpleNamespace(batch_size=512, **settings)
    return functions.new_stage(settings, [gpt, scorer], frozen=[gpt, scorer], size=2, share=64, n_logits=256,
                               sampled=32, whole=True)

def test_four_models_of_1_9_billion_fit_8_gpus_with_fsdp(load):
    functions = load(n_gpus=8)
    stage = rlhf_stage(functions, D32, parallel='fsdp')
    n = 1_881_278_464
    critic = n - 65536 * 2048 # no output matrix
    parts = functions.memory(stage, 2)
    assert parts['weights'] == 4 * (n + critic) / 8 and parts['adamw'] == 8 * (n + critic) / 8
    assert parts['frozen models'] == 2 * (n + critic) and parts['a whole copy'] == 4 * n
    assert parts['gradients'] == 4 * (n + critic) # of 32 micro-batches, whole until the last one
    assert functions.get_verdict(stage) == 'it fits'
    assert functions.get_verdict(rlhf_stage(functions, D32, parallel='ddp')).endswith('use --parallel=fsdp')

def test_rlhf_of_d20_fits_with_ddp(load):
    assert load(n_gpus=8).get_verdict(rlhf_stage(load(n_gpus=8), D20)) == 'it fits'
    # on one GPU all 512 answers are sampled at once: 512 * 2048 tokens of 2 * 20 layers * 1280 numbers of two bytes
    functions = load()
    stage = rlhf_stage(functions, D20)
    stage.sampled = 512
    assert functions.memory(stage, 2)['keys and values'] == 512 * 2048 * 20 * 2 * 1280 * 2
    # 1280 + 1280 + 4 * 3424 numbers of the MLP would be 34 GB; 3/8 of the keys and values are more
    assert functions.memory(stage, 2)['reading the prompts'] == 512 * 2048 * 20 * 2 * 1280 * 2 * 3 / 8
    verdict = functions.get_verdict(stage)
    stage.sampled = int(re.search(r'--sample_batch=(\d+) and --\w+=2 fit', verdict)[1])
    assert functions.get_verdict(stage) == 'it fits'

# -----------------------------------------------------------------------------
# the micro-batch that fits

def test_a_gpu_that_is_too_small(load):
    """d20 on one 4090: of 25.3 GB, 92% can be used; 256 windows in a step, so micro-batches of 8, 4, 2, 1 do."""
    functions = load(gpu_bytes=25.3e9)
    stage = functions.new_stage(
        SimpleNamespace(batch_size=8, total_batch_size=256, compile=True, optimizer='muon'), [meta(**D20)])
    assert functions.get_verdict(stage) == 'it does NOT fit: --batch_size=4 fits'
    used = {size: sum(functions.memory(stage, size).values()) for size in (4, 8)}
    assert used[4] < 0.92 * 25.3e9 < used[8]
    stage.size = 4
    assert functions.get_verdict(stage) == 'it fits'
    assert 'larger GPUs' in load(gpu_bytes=5e9).get_verdict(stage)

# -----------------------------------------------------------------------------
# the table

PROFILE = '''
data_dir, out_dir, block_size = 'DATA', 'DATA/out', 1024
prepare_data = dict(source='c4,dolly,gsm8k,hh,core', n_files=10)
tokenizer = dict(vocab_size=32768, train_chars=10**9, mid_chats=3, mid_text=0.2)
pretrain = dict(arch='llama', n_layer=2, n_head=4, n_embd=256, n_hidden=512, tie_embeddings=False, batch_size=4,
                total_batch_size=64, max_iters=10**7, compile=True)
sft = dict(epochs=5, batch_size=8)
reward = dict(epochs=2, batch_size=4)
rlhf = dict(max_iters=10**5, batch_size=64, minibatch_size=64, micro_batch_size=8, max_new_tokens=100, ppo_epochs=2)
'''
N_EMBEDDING = 32768 * 256
N = 2 * N_EMBEDDING + 2 * (4 * 256**2 + 3 * 512 * 256) + 5 * 256 # blocks, and two norms in each and one behind
FLOPS = 6 * (N - N_EMBEDDING) + 12 * 2 * 256 * 1024

def read_table(out):
    """-> {stage: (tokens, GB, hours, dollars, GB of disk, GB of downloads, verdict)}"""
    rows = {}
    for line in out.splitlines():
        found = re.fullmatch(r'(\w+) +(?:([\d,]+)M)? +([\d.]+ )? *([\d,.]+) +([\d,]+) +([\d.]+) +([\d.]+)(?:  (.*))?',
                             line)
        if found:
            numbers = [float((text or '0').replace(',', '')) for text in found.groups()[1:7]]
            rows[found[1]] = (numbers[0] * 1e6, *numbers[1:], found[8] or '')
    return rows

@pytest.fixture(scope='module')
def profile(tmp_path_factory):
    folder = tmp_path_factory.mktemp('profile')
    path = folder / 'profile.py'
    path.write_text(PROFILE.replace('DATA', str(folder / 'data').replace('\\', '/')), encoding='utf-8')
    return path

def test_table_by_hand(profile, scripts):
    out = scripts.ok('scaling.py', profile, '--estimate=8xA100').out
    assert f'{N:,} parameters' in out and f'{FLOPS:.3e} FLOPs a token' in out
    rows = read_table(out)
    assert [*rows] == ['data', 'tokenizer', 'base', 'mid', 'sft', 'reward', 'rlhf', 'eval', 'total']
    sources = json.loads((ROOT / 'config/sources.json').read_text(encoding='utf-8'))
    c4, dolly, gsm8k, hh, core = (sources[name] for name in ('c4', 'dolly', 'gsm8k', 'hh', 'core'))

    def check(stage, *expected):
        for found, number, margin in zip(rows[stage], expected, (0.6e6, 0.06, 0.006, 0.6, 0.06, 0.06)):
            assert number is None or found == pytest.approx(number, abs=margin), (stage, rows[stage], expected)
    def hours(flops, mfu): # of 8 GPUs with 312e12 FLOP/s
        return flops / (8 * 312e12 * mfu) / 3600

    # data: 104 cores clean 0.7 MB/s each
    text = 10 * c4['text_bytes']
    download = sum(source['bytes'] for source in (dolly, gsm8k, hh, core)) + 10 * c4['bytes']
    corpus = 0.7 * text / 4.5 # tokens
    check('data', corpus, None, (download / 100e6 + text / 72.8e6) / 3600, None,
          (download + 0.7 * 0.4 * text) / 1e9, download / 1e9)
    check('tokenizer', corpus, None, (0.7 * text + 1e9) / 60e6 / 3600, None, 2 * corpus / 1e9, 0)
    # base: 64 windows of 1024 tokens a step
    seen = 64 * 1024 * 1e7
    check('base', seen, None, hours(seen * FLOPS, 0.4), hours(seen * FLOPS, 0.4) * 8 * 1.8, 4 * N / 1e9, 0)
    chat = (dolly['text_bytes'] + gsm8k['text_bytes']) / 4.5
    check('mid', 3 * chat + 0.2 * corpus, None, hours((3 * chat + 0.2 * corpus) * FLOPS, 0.4))
    check('sft', 5 * chat, None, hours(5 * chat * FLOPS, 0.2))
    check('reward', 2 * hh['text_bytes'] / 4.5, None, hours(2 * hh['text_bytes'] / 4.5 * FLOPS, 0.2))
    # rlhf: prompts are those of gsm8k and hh. Four models read each answer, at a third of the cost of learning; actor
    # and critic learn it twice. Sampling: 100 steps, each reads the weights and 8 rows of keys and values, at 18% of
    # 2 TB/s.
    prompt = (gsm8k['text_bytes'] + hh['text_bytes']) / (gsm8k['rows'] + hh['rows']) / 4.5
    seen = 1e5 * 64 * (prompt + 100)
    n_read = 2 * (N - N_EMBEDDING) + 8 * (prompt + 50) * 2 * 2 * 2 * 256
    learning = hours(seen * FLOPS * (4 / 3 + 2 * 2), 0.2)
    check('rlhf', seen, None, learning + 1e5 * 100 * n_read / (0.18 * 2e12) / 3600, None, 4 * N / 1e9, 0)
    # the total of the disk has two resume files of actor and critic
    kept = download + 0.7 * 0.4 * text + 2 * corpus + 5 * 4 * N + 2 * 12 * (2 * N - N_EMBEDDING)
    check('total', 0, 0, None, None, kept / 1e9, download / 1e9)
    assert rows['total'][2] == pytest.approx(sum(row[2] for row in [*rows.values()][:-1]), abs=0.05)

    # fewer GPUs: the same tokens, eight times the hours
    assert f'base reads its text {64 * 1024 * 1e7 / corpus:.1f} times' in out
    fewer = read_table(scripts.ok('scaling.py', profile, '--estimate=1xA100').out)
    assert fewer['base'][0] == rows['base'][0] and fewer['base'][2] == pytest.approx(8 * rows['base'][2], rel=1e-3)
    assert not (profile.parent / 'data').exists() # an estimate writes nothing

def test_what_is_there_is_counted(profile, scripts, tmp_path):
    """Conversations in data_dir instead of those of the sources, its tokenizer, and the model to start from."""
    from model import Tokenizer, save_checkpoint
    tok = Tokenizer(make_spec())
    (tmp_path / 'tokenizer.json').write_text(json.dumps(tok.spec), encoding='utf-8')
    size = len(json.dumps(dict(messages=user('x' * 8_999_000)))) + 1
    write_rows(tmp_path / 'chat_train.jsonl', [dict(messages=user('x' * 8_999_000))])
    config = GPTConfig(vocab_size=tok.n_vocab, n_embd=32, n_layer=1, n_head=1, block_size=64)
    net = GPT(config)
    save_checkpoint(str(tmp_path / 'base.pt'), 'base', net.state_dict(), vars(config), tok, {}, 0, {})
    out = scripts.ok('scaling.py', profile, '--estimate=1xH200', f'data_dir={tmp_path}',
                     f'init_from={tmp_path / "base.pt"}').out
    assert f'{net.n_params():,} parameters' in out and 'base ' not in out
    assert read_table(out)['sft'][0] == round(5 * size / 4.5, -6) == 10e6

@pytest.mark.parametrize('name,n,tokens', [('gpt2', 124e6, 10e9), ('d20', 561e6, 11.2e9), ('d32', 1.88e9, 37.6e9)])
def test_profiles_fit_their_gpus(name, n, tokens, scripts):
    out = scripts.ok('scaling.py', f'config/{name}.py', '--estimate=8xH100', cwd=ROOT).out
    assert int(re.search(r'([\d,]+) parameters', out)[1].replace(',', '')) == pytest.approx(n, rel=0.01)
    rows = read_table(out)
    assert rows['base'][0] == pytest.approx(tokens, rel=0.01)
    assert rows['data'][0] >= rows['base'][0] # no text is read twice
    stages = [row[-1] for stage, row in rows.items() if stage not in ('data', 'tokenizer', 'total')]
    assert stages == ['it fits'] * len(stages)

def test_errors(scripts):
    for kind in ('8xH10', '0xH100', 'H100', '8'):
        scripts.fails(f"not '{kind}'; known kinds: H100, H200, A100, 4090", 'scaling.py', f'--estimate={kind}')
    scripts.fails("source 'c5' is not in config/sources.json", 'scaling.py', '--estimate=8xH100', 'source=c5')
