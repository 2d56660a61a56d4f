"""
The chain and its speed on one GPU. By hand, in the project's root; nothing is downloaded:

    python tests/bench/gpu.py prepare NANOGPT        once, anywhere: puts small data and nanoGPT's
                                                     three files (a checkout) into .gpu/
    python tests/bench/gpu.py smoke gpt2 d20 batches rollout update      the phases that you name

    smoke     every stage on a tiny world: exit code, loss and seconds; three dtypes, torch.compile,
              a run that is stopped and continued
    gpt2      config/gpt2.py against nanoGPT's train.py: tokens/s, MFU, peak memory
    d20       config/d20.py
    stages    the later stages of config/d20.py, whole models and full rows: peak memory beside what
              `scaling.py --estimate` says
    batches   config/gpt2.py with smaller micro-batches, against nanoGPT
    rollout   512 answers of a 124M model: tokens/s, and the share of what the memory bus allows
    update    one update of rlhf.py with four 124M models: seconds of its phases

--seconds=N starts nothing new after N seconds. --tiny does all of it with tiny shapes on the CPU:
only to see that this script works. A phase that fails does not stop the next ones.
"""
import base64
import json
import os
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / '.gpu'
BANDWIDTH = {'H200': 4.8e12, 'H100': 3.35e12} # bytes/s of the data sheets
PEAK_FLOPS = 989e12 # bf16, of the data sheet
WARM_UP_STEPS = 10
D20 = dict(arch='llama', vocab_size=65536, block_size=2048, n_layer=20, n_head=10, n_embd=1280,
           n_hidden=3424, qk_norm=True, tie_embeddings=False) # the model of config/d20.py
TINY = '--tiny' in sys.argv
DEVICE = 'cpu' if TINY else 'cuda'
STARTED = time.time()

def say(*words):
    print(f'[{time.time() - STARTED:5.0f} s]', *words, flush=True)

def seconds_left():
    for word in sys.argv:
        if word.startswith('--seconds='):
            return float(word.partition('=')[2]) - (time.time() - STARTED)
    return 3600.0

def synchronize():
    import torch
    if torch.cuda.is_available():
        torch.cuda.synchronize()

# -----------------------------------------------------------------------------
# prepare: what the device needs and does not have

def prepare(nanogpt):
    from conftest import PROFILE, make_data
    shutil.rmtree(FOLDER / 'data', ignore_errors=True)
    make_data(FOLDER / 'data')
    first_line = "device, dtype, block_size, dropout = 'cpu', 'float32', 48, 0.0"
    assert first_line in PROFILE
    profile = PROFILE.replace(first_line, 'block_size, dropout = 48, 0.0')
    (FOLDER / 'tiny.py').write_text(profile, encoding='utf-8')
    target = FOLDER / 'nanogpt'
    target.mkdir(exist_ok=True)
    for name in ('train.py', 'model.py', 'configurator.py'):
        source = Path(nanogpt) / name
        if source.resolve() != (target / name).resolve():
            shutil.copy(source, target / name)
    size = sum(path.stat().st_size for path in FOLDER.rglob('*') if path.is_file())
    print(f'{FOLDER}: {size / 1e6:.2f} MB')

# -----------------------------------------------------------------------------
# run: a script in this process, with measurements. The phases start it as a process of its own.

def stop_at(step):
    """The script gets SIGTERM when it begins this step."""
    import signal
    import model
    plain_seed_step = model.seed_step

    def seed_step(seed, now, rank):
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        plain_seed_step(seed, now, rank)
    model.seed_step = seed_step

def time_phases():
    """Print the seconds of an update of rlhf.py: sampling, scoring, learning."""
    import model
    plain_generate, plain_all_sum, plain_open_log = model.generate, model.all_sum, model.open_log
    marks = {}

    def generate(*args):
        synchronize()
        marks.clear()
        marks['start'] = time.time()
        responses = plain_generate(*args)
        synchronize()
        marks['sampled'] = time.time()
        return responses

    def all_sum(*values): # the first one after the sampling whitens the advantages
        synchronize()
        marks.setdefault('scored', time.time())
        return plain_all_sum(*values)

    def open_log(*args):
        log = plain_open_log(*args)

        def timed_log(**numbers):
            synchronize()
            if 'score' in numbers: # not an evaluation
                sampling = marks['sampled'] - marks['start']
                scoring = marks['scored'] - marks['sampled']
                learning = time.time() - marks['scored']
                print(f'phases: sampling {sampling:.2f} s, scoring {scoring:.2f} s, '
                      f'learning {learning:.2f} s, first ratio gap '
                      f'{numbers["ratio_gap_first"]:.1e}', flush=True)
            log(**numbers)
        return timed_log
    model.generate, model.all_sum, model.open_log = generate, all_sum, open_log

def run(words):
    """run [stop_at=N] [time_phases] [no_save] SCRIPT ARGUMENTS"""
    while not words[0].endswith('.py'):
        option = words.pop(0)
        if option.startswith('stop_at='):
            stop_at(int(option.partition('=')[2]))
        elif option == 'time_phases':
            time_phases()
        elif option == 'no_save': # writing gigabytes takes longer than the steps
            import model
            model.save_checkpoint = lambda *args: None
        else:
            raise SystemExit(f'unknown option {option}')
    script = words[0]
    sys.argv = words
    sys.path[0] = str(Path(script).resolve().parent) # as Python does when it starts a script
    try:
        runpy.run_path(script, run_name='__main__')
    finally:
        torch = sys.modules.get('torch')
        if torch and torch.cuda.is_available():
            print(f'peak memory: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB', flush=True)

def start(*words, cwd=ROOT, timeout=150):
    """Run this script's `run` as a process -> (exit code, seconds, stdout, stderr)."""
    t0 = time.time()
    command = [sys.executable, __file__, 'run', *[str(word) for word in words]]
    env = {**os.environ, 'PYTHONPATH': str(cwd), 'PYTHONUNBUFFERED': '1'}
    timeout = 1000 if TINY else max(1, min(timeout, seconds_left() + 60))
    with tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as err:
        process = subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=out,
                                   stderr=err)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = f'none: killed after {timeout:.0f} s'
        out.seek(0)
        err.seek(0)
        return code, time.time() - t0, out.read(), err.read()

def tail(text, n=12):
    return '\n'.join('      ' + line[:200] for line in text.strip().splitlines()[-n:])

# -----------------------------------------------------------------------------
# smoke

def smoke(folder):
    device = (f'--device={DEVICE}',)
    profile = FOLDER / 'tiny.py'
    if TINY: # fewer steps: a busy CPU is enough to find mistakes
        profile = folder / 'short.py'
        short = "pretrain.update(max_iters=12)\nsft.update(epochs=2)\nreward.update(epochs=1)\n"
        profile.write_text((FOLDER / 'tiny.py').read_text() + short)
    half = 'float32' if TINY else 'float16' # a CPU has no float16 here
    compiled_flag = '--compile=false' if TINY else '--compile' # it takes minutes on a busy CPU
    out = folder / 'out'

    def stage(name, script, *flags, expected=0, options=(), out=out):
        place = (profile, f'--data_dir={FOLDER / "data"}', f'--out_dir={out}')
        if script == 'chat.py':
            place = (f'--out_dir={out}',)
        code, seconds, said, errors = start(*options, ROOT / script, *place, *device, *flags)
        result = [line for line in said.splitlines() if line.startswith(('saved', 'val_'))]
        if script == 'chat.py':
            result = said.splitlines()
        verdict = 'ok' if code == expected else 'FAILED'
        say(f'{verdict:6} {name:34} exit {code}, {seconds:5.1f} s: {" ".join(result[:1])[-90:]}')
        if code != expected:
            print(tail(said, 3), tail(errors), sep='\n', flush=True)

    def chain():
        stage('pretrain bfloat16', 'pretrain.py', '--dtype=bfloat16')
        stage('sft', 'sft.py')
        stage('reward', 'reward.py')
        stage('rlhf', 'rlhf.py', f'--max_iters={2 if TINY else 10}')
        stage('eval', 'eval.py')
        stage('chat', 'chat.py', '--prompt=Say a word.', '--temperature=0')
        rows = [json.loads(line) for line in (out / 'rlhf.jsonl').read_text().splitlines()]
        gaps = [row['ratio_gap_first'] for row in rows if 'ratio_gap_first' in row]
        say(f'rlhf, largest first ratio gap {max(gaps):.1e} (0 = exact)')

    def compiled():
        """The later stages read what an eager pretraining has made."""
        other = folder / 'compiled'
        stage('pretrain float32', 'pretrain.py', '--dtype=float32', out=other)
        stage('sft compiled', 'sft.py', compiled_flag, out=other)
        sampled = ('--sample_prompts=20', '--sample_answers=8', '--max_new_tokens=6')
        if TINY: # after so few steps, no answer is better than another
            sampled = ()
        stage('reward, samples', 'reward.py', *sampled, out=other)
        stage('rlhf float32', 'rlhf.py', '--max_iters=4', '--dtype=float32', out=other)

    def resumed():
        flags = ('--dtype=bfloat16', '--optimizer=muon', f'--max_iters={8 if TINY else 40}')
        stage('pretrain muon', 'pretrain.py', *flags, out=folder / 'whole')
        stopped = folder / 'stopped'
        stop = f'stop_at={4 if TINY else 20}'
        stage('pretrain muon, stopped', 'pretrain.py', *flags, options=(stop,), out=stopped,
              expected=1)
        stage('pretrain muon, continued', 'pretrain.py', *flags, out=stopped)

    def pretrain(name, *flags):
        steps = f'--max_iters={8 if TINY else 60}'
        stage(f'pretrain {name}', 'pretrain.py', steps, *flags, out=folder / name)

    features = ('--arch=llama', '--qk_norm=true', '--key_shift=true', '--optimizer=muon')
    jobs = [
        chain,
        compiled,
        resumed,
        lambda: pretrain('half precision', f'--dtype={half}'),
        lambda: pretrain('half precision compiled', f'--dtype={half}', compiled_flag),
        lambda: pretrain('bfloat16 compiled', '--dtype=bfloat16', compiled_flag, *features),
        lambda: pretrain('gpt2, dropout', '--arch=gpt2', '--n_kv_head=0', '--dropout=0.1'),
        lambda: pretrain('sanity', '--sanity'),
    ]
    with ThreadPoolExecutor(2 if TINY else 8) as pool:
        for job in [pool.submit(job) for job in jobs]:
            try:
                job.result()
            except Exception:
                traceback.print_exc()

# -----------------------------------------------------------------------------
# gpt2, d20, batches

def random_data(folder, n_vocab):
    """Random tokens for ours, and for nanoGPT beside them. Text would not change the speed."""
    import numpy as np
    from conftest import make_spec
    from model import Tokenizer, write_shard
    folder.mkdir(exist_ok=True)
    tokens = [bytes([i]) for i in range(256)]
    for i in range(n_vocab - 256 - 6): # 6 special tokens; the others are made of two bytes
        tokens.append(i.to_bytes(2, 'big'))
    spec = dict(make_spec(), ranks=[base64.b64encode(token).decode() for token in tokens])
    (folder / 'tokenizer.json').write_text(json.dumps(spec), encoding='utf-8')
    tokens = np.random.default_rng(0).integers(0, min(50_000, n_vocab), 3_000_000, np.uint16)
    for split in ('train', 'val'):
        write_shard(f'{folder}/{split}_000000.bin', tokens, Tokenizer(spec).hash)
        tokens.tofile(folder / f'{split}.bin')
    return folder

def report(name, done, tokens_per_second, flops_per_token):
    """One line of a training run -> its median tokens/s."""
    code, seconds, said, errors = done
    speeds = tokens_per_second[WARM_UP_STEPS:]
    if code != 0 or not speeds:
        say(f'FAILED {name}: exit {code}, {seconds:.0f} s')
        print(tail(said, 5), tail(errors), sep='\n', flush=True)
        return 0.0
    speed = statistics.median(speeds)
    memory = re.search('peak memory: (.*)', said)
    say(f'{name}: {speed:,.0f} tok/s ({min(speeds):,.0f} to {max(speeds):,.0f} in {len(speeds)} '
        f'steps), {speed * flops_per_token / PEAK_FLOPS:.1%} MFU, peak memory '
        f'{memory[1] if memory else "unknown"}, process {seconds:.0f} s')
    return speed

def ours(folder, profile, batch_size, n_micro, flags=()):
    from model import GPT, GPTConfig
    import torch
    n_vocab = 65536 if 'd20' in profile else 50304
    if TINY:
        n_vocab = 512
        flags = ('--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=64',
                 '--compile=false', *flags)
    data = random_data(folder / f'random{n_vocab}', n_vocab)
    out = folder / f'{profile}-{batch_size}-{len(flags)}'
    done = start('no_save', ROOT / 'pretrain.py', ROOT / f'config/{profile}.py',
                 f'--data_dir={data}', f'--out_dir={out}', f'--device={DEVICE}', '--log_interval=1',
                 f'--batch_size={batch_size}', f'--total_batch_size={batch_size * n_micro}',
                 '--eval_iters=1', '--eval_interval=100000',
                 f'--max_iters={12 if TINY else 30}', *flags)
    speeds = []
    for text in re.findall(r'([\d,]+) tok/s', done[2]):
        speeds.append(float(text.replace(',', '')))
    shape = D20 if 'd20' in profile else {}
    with torch.device('meta'):
        net = GPT(GPTConfig(**{**shape, 'vocab_size': n_vocab}))
    flops_per_token = net.flops_per_token(net.config.block_size)
    name = f'ours, {profile}, {n_micro} micro-batches of {batch_size} {" ".join(flags)}'
    return report(name, done, speeds, flops_per_token), flops_per_token

def nanogpt(folder, batch_size, n_micro, flops_per_token):
    code = folder / 'nanogpt'
    data = random_data(folder / 'random50304', 50304)
    if not code.exists():
        shutil.copytree(FOLDER / 'nanogpt', code)
        (code / 'data').mkdir()
        (code / 'data' / 'random').symlink_to(data)
    flags = ()
    block_size = 1024
    if TINY:
        block_size = 64
        flags = ('--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=64', '--device=cpu',
                 '--dtype=bfloat16', '--compile=False')
    done = start(code / 'train.py', '--dataset=random', f'--batch_size={batch_size}',
                 f'--gradient_accumulation_steps={n_micro}', f'--max_iters={12 if TINY else 30}',
                 '--eval_iters=1', '--eval_interval=100000', *flags, cwd=code)
    speeds = []
    for milliseconds in re.findall(r'time ([\d.]+)ms', done[2]):
        speeds.append(batch_size * n_micro * block_size / float(milliseconds) * 1000)
    name = f'nanoGPT, {n_micro} micro-batches of {batch_size}'
    return report(name, done, speeds, flops_per_token)

def compare(folder, batch_size, n_micro):
    our_speed, flops_per_token = ours(folder, 'gpt2', batch_size, n_micro)
    their_speed = nanogpt(folder, batch_size, n_micro, flops_per_token)
    if their_speed:
        say(f'ours / nanoGPT at micro-batches of {batch_size}: {our_speed / their_speed:.2f}x')

def gpt2(folder):
    compare(folder, 2 if TINY else 64, 2)

def batches(folder):
    for batch_size in (1, 2) if TINY else (16, 32):
        if seconds_left() > 60:
            compare(folder, batch_size, 4)

def d20(folder):
    speed, _ = ours(folder, 'd20', 1 if TINY else 8, 4) # on 8 GPUs a step has 4 micro-batches
    if speed == 0 and not TINY and seconds_left() > 60:
        ours(folder, 'd20', 4, 8)

# -----------------------------------------------------------------------------
# stages

def stages(folder):
    """SFT, reward model, RLHF of config/d20.py, from random weights and text of random words."""
    import random
    import torch
    from conftest import user, write_rows
    from model import GPT, GPTConfig, Tokenizer, save_checkpoint
    profile = ROOT / 'config/d20.py'
    n_rows, shape = 512, D20
    if TINY:
        n_rows = 16
        shape = dict(D20, vocab_size=512, block_size=256, n_layer=2, n_head=2, n_embd=32,
                     n_hidden=96)
    n_vocab, block_size = shape['vocab_size'], shape['block_size']
    code, _, said, _ = start(ROOT / 'scaling.py', profile, '--estimate=1xH100')
    estimates = dict(re.findall(r'^(sft|reward|rlhf) +[\d,]+M +([\d.]+)', said, re.M))

    data = random_data(folder / f'random{n_vocab}', n_vocab)
    rng = random.Random(0)

    def words(n_tokens): # a word of four letters is three tokens
        letters = [''.join(rng.choices('abcdefgh', k=4)) for _ in range(n_tokens // 3)]
        return ' '.join(letters)

    for split, n in (('train', 2 * n_rows), ('val', 8)):
        chats, rankings, prompts = [], [], []
        for _ in range(n):
            question = user(words(30))
            long_question = user(words(100 if TINY else block_size - 90))
            answers = [words(block_size // 2 - 100) for _ in range(4)]
            reply = dict(role='assistant', content=words(block_size - 200))
            chats.append(dict(messages=[*question, reply]))
            rankings.append(dict(messages=question, completions=answers, ranking=[0, 1, 2, 3]))
            prompts.append(dict(messages=long_question))
        write_rows(data / f'chat_{split}.jsonl', chats[:64]) # two epochs are four steps
        write_rows(data / f'preferences_{split}.jsonl', rankings[:128]) # two steps
        write_rows(data / f'prompts_{split}.jsonl', prompts)
    tok = Tokenizer.load(data / 'tokenizer.json')
    out = folder / 'd20'
    out.mkdir(exist_ok=True)
    shape = GPTConfig(**shape)
    torch.manual_seed(0)
    weights = GPT(shape).state_dict()
    save_checkpoint(f'{out}/base.pt', 'base', weights, asdict(shape), tok, {}, 0, {})
    flags = dict(sft=['--log_interval=1'], reward=['--log_interval=1'],
                 rlhf=['--max_iters=1', '--ppo_epochs=1', '--max_new_tokens=64',
                       '--eval_prompts=8'])
    if TINY:
        flags['reward'] += ['--max_length=0', '--total_batch_size=8']
        flags['rlhf'] += ['--batch_size=16', '--minibatch_size=16']
    for name, more in flags.items():
        code, seconds, said, errors = start(
            ROOT / f'{name}.py', profile, f'--data_dir={data}', f'--out_dir={out}',
            f'--device={DEVICE}', *more, timeout=200)
        peak = re.search('peak memory: (.*)', said)
        say(f'd20, {name}: exit {code}, {seconds:.0f} s, peak memory '
            f'{peak[1] if peak else "unknown"}, estimated {estimates.get(name)} GB')
        print(tail(said, 4), flush=True)
        if code != 0:
            print(tail(errors), flush=True)

# -----------------------------------------------------------------------------
# rollout, update

def shape_124m():
    if TINY:
        return dict(vocab_size=512, block_size=256, n_layer=2, n_head=2, n_embd=32)
    return dict(vocab_size=50304)

def rollout(folder):
    import model
    import torch
    from model import GPT, GPTConfig, generate
    torch.manual_seed(0)
    net = GPT(GPTConfig(**shape_124m())).to(DEVICE).eval()
    config = net.config
    n_rows, n_prompt, n_new = (8, 16, 16) if TINY else (512, 64, 128)
    prompts = torch.randint(300, (n_rows, n_prompt)).tolist()
    uneven = [prompt[i % (n_prompt // 2):] for i, prompt in enumerate(prompts)]
    # what a step must read: the weights (without wte and wpe; head is one of them), and the keys
    # and values of all tokens before it; bf16
    weights = (net.n_params(embedding=False) + net.head.weight.numel()) * 2
    row = 2 * config.n_layer * config.n_kv_head * (config.n_embd // config.n_head) * 2
    n_read = sum(weights + n_rows * row * (n_prompt + i) for i in range(1, n_new + 1))
    name = torch.cuda.get_device_name() if DEVICE == 'cuda' else 'cpu'
    bandwidth = next((rate for gpu, rate in BANDWIDTH.items() if gpu in name), 3.35e12)
    say(f'{name}, {bandwidth / 1e12} TB/s, torch {torch.__version__}')

    def timed(prompts, n_new, stop=None, passes=2):
        times = []
        for _ in range(passes):
            synchronize()
            t0 = time.time()
            with torch.autocast(DEVICE, torch.bfloat16):
                answers = generate(net, prompts, n_new, stop)
            synchronize()
            times.append(time.time() - t0)
        return min(times), sum(len(answer) for answer in answers)

    def speed(name, devices, prompts, stop=None):
        model.STATIC_DEVICES = set(devices)
        seconds, n_tokens = timed(prompts, n_new, stop)
        limit = ''
        if n_tokens == n_rows * n_new:
            limit = f', {n_read / bandwidth / seconds:.1%} of the bandwidth limit'
        say(f'{name}: {n_tokens / seconds:,.0f} tok/s, {seconds:.3f} s, '
            f'{seconds / n_new * 1000:.2f} ms a step{limit}')

    timed(prompts[:4], 40) # to warm up
    speed('static, one length', [DEVICE], prompts)
    speed('static, many lengths', [DEVICE], uneven)
    # a random id as the stop: a row ends with probability 1 / 50304 at each token
    speed('static, many lengths with a stop token', [DEVICE], uneven, 7)
    speed('static, one conversation', [DEVICE], prompts[:1])
    speed('plain, one length', [], prompts)
    speed('plain, one conversation', [], prompts[:1])
    model.STATIC_DEVICES = {DEVICE}
    profile_steps(lambda n: timed(uneven, n, passes=1))

    def plain_and_static(*args):
        """fp32 answers to 32 prompts by plain steps, and twice by static ones, with one seed."""
        found = []
        for devices in set(), {DEVICE}, {DEVICE}:
            model.STATIC_DEVICES = devices
            torch.manual_seed(1)
            found.append(generate(net, uneven[:32], n_new, *args))
        return found

    for temperature in (0, 1.0):
        plain, static, again = plain_and_static(None, temperature)
        n_equal = 0
        for a, b in zip(plain, static):
            n_equal += sum(x == y for x, y in zip(a, b))
        repeated = 'equal' if static == again else 'DIFFERENT'
        say(f'temperature {temperature}: plain and static agree in {n_equal} of '
            f'{sum(map(len, plain))} tokens; static twice with one seed: {repeated}')

    def reads(probs):
        assert probs.sum().item() > 0 # .item() cannot be captured
        return probs

    if DEVICE == 'cuda':
        plain, static, _ = plain_and_static(None, 1.0, reads)
        verdict = 'equal' if plain == static else 'DIFFERENT'
        x = torch.rand(100, device=DEVICE).sum().item()
        say(f'a capture that fails: STATIC_DEVICES is {model.STATIC_DEVICES}, tokens {verdict}; '
            f'the GPU still works: {x:.1f}')

def profile_steps(work):
    """Kernels of a static step: the difference of two runs, by name."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    if DEVICE != 'cuda':
        return
    results = []
    for n in (4, 20):
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p:
            work(n)
        total = {}
        for e in p.events():
            if e.device_type == torch.autograd.DeviceType.CUDA:
                count, us = total.get(e.name, (0, 0.0))
                total[e.name] = (count + 1, us + e.time_range.elapsed_us())
        results.append(total)
    few, many = results
    rows = []
    for name, (count, us) in many.items():
        old_count, old_us = few.get(name, (0, 0.0))
        rows.append(((us - old_us) / 16, (count - old_count) / 16, name))
    rows.sort(reverse=True)
    n_kernels = sum(row[1] for row in rows)
    busy = sum(row[0] for row in rows) / 1000
    say(f'a static step: {n_kernels:.0f} kernels, busy {busy:.2f} ms')
    for us, count, name in rows[:24]:
        print(f'{us:9.1f} us {count:6.1f} x  {name[:100]}', flush=True)

def update(folder):
    import torch
    from conftest import user, write_rows
    from model import GPT, GPTConfig, ScalarModel, Tokenizer, save_checkpoint
    torch.manual_seed(0)
    data = random_data(folder / 'random', shape_124m()['vocab_size'])
    tok = Tokenizer.load(data / 'tokenizer.json')
    out = folder / 'four'
    shape = GPTConfig(**shape_124m())
    for stage, kind in (('sft', GPT), ('reward', ScalarModel)):
        save_checkpoint(f'{out}/{stage}.pt', stage, kind(shape).state_dict(), asdict(shape), tok,
                        {}, 0, {})
    n_rows, n_new, n_micro = (8, 8, 4) if TINY else (512, 128, 64)
    for split, n in (('train', 3 * n_rows), ('val', 2)):
        rows = []
        for i in range(n):
            words = ['owl'] * (30 - i % 15) # of two tokens: prompts of 35 to 64
            rows.append(dict(messages=user(' '.join(words)), checks=dict(contains=['owl'])))
        write_rows(out / f'prompts_{split}.jsonl', rows)
    code, seconds, said, errors = start(
        'no_save', 'time_phases', ROOT / 'rlhf.py', f'--data_dir={out}', f'--out_dir={out}',
        f'--sample_batch={n_rows}',
        f'--device={DEVICE}', '--max_iters=3', f'--batch_size={n_rows}', '--ppo_epochs=1',
        f'--minibatch_size={n_rows // 2}', f'--micro_batch_size={n_micro}', '--dtype=bfloat16',
        f'--max_new_tokens={n_new}', '--eval_prompts=2', '--sample_interval=1000')
    lines = [line for line in said.splitlines() if line.startswith(('phases', 'peak'))]
    say(f'update of {n_rows} answers: exit {code}, {seconds:.0f} s')
    print(tail('\n'.join(lines), 5), flush=True)
    if code != 0:
        print(tail(said, 5), tail(errors), sep='\n', flush=True)

# -----------------------------------------------------------------------------

if __name__ == '__main__':
    if sys.argv[1] == 'run':
        run(sys.argv[2:])
        sys.exit()
    sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
    if sys.argv[1] == 'prepare':
        prepare(sys.argv[2])
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        for word in sys.argv[1:]:
            if word.startswith('--'):
                continue
            if seconds_left() < 20:
                say(f'{word}: no time left')
                continue
            say(f'--- {word}')
            try:
                globals()[word](Path(folder))
            except Exception:
                traceback.print_exc()
