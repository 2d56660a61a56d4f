"""
model.py and pretrain.py against nanoGPT (a checkout of karpathy/nanoGPT) and transformers. By hand, on a quiet machine:

    python tests/bench/pretrain.py step NANOGPT                    tokens/s and memory of one training step, AdamW
    python tests/bench/pretrain.py sample                          batched generation: tokens/s, with and without cache
    python tests/bench/pretrain.py shakespeare NANOGPT TEXT [SEED ..]   its CPU recipe and ours, to one loss

Times are medians; ours and theirs are measured in turn.
"""

import base64, importlib.util, os, pickle, re, statistics, subprocess, sys, tempfile, time
from contextlib import redirect_stdout
from dataclasses import asdict
from io import StringIO

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
import numpy as np
import torch
from torch.nn import functional as F
from model import (
    GPT,
    SPECIAL_TOKENS,
    GPTConfig,
    Tokenizer,
    generate,
    load_model,
    make_optimizers,
    read_jsonl,
    save_checkpoint,
    write_jsonl,
)

CPU = dict(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128)  # the CPU recipe of nanoGPT's README


def nanogpt(folder, **args):
    spec = importlib.util.spec_from_file_location('nanogpt', os.path.join(folder, 'model.py'))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with redirect_stdout(StringIO()):
        net = module.GPT(module.GPTConfig(**args, dropout=0.0, bias=False))
        return net, net.configure_optimizers(0.1, 1e-3, (0.9, 0.99), 'cpu')


def ours(**args):
    net = GPT(GPTConfig(**args))
    return net, make_optimizers(net, 1e-3, 0.1, (0.9, 0.99))[0]


def peak(work):
    """Bytes of tensors that are alive at once while work() runs, as the profiler counts them on a CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        work()
    live = top = 0
    for e in p.profiler.kineto_results.events():
        if e.name() == '[memory]':
            live += e.nbytes()
            top = max(top, live)
    return top


def step(folder):
    for name, args, batch in (
        ('4 layers, 128 wide, batch 12 x 64', CPU, 12),
        (
            '6 layers, 384 wide, batch 16 x 256',
            dict(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384),
            16,
        ),
        (
            '4 layers, 256 wide, vocabulary 4,096, batch 8 x 256',
            dict(vocab_size=4096, block_size=256, n_layer=4, n_head=4, n_embd=256),
            8,
        ),
    ):
        rows = torch.randint(args['vocab_size'], (batch, args['block_size'] + 1))
        x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        theirs, our = nanogpt(folder, **args), ours(**args)

        def one(net, opt, loss):
            loss(net).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)

        def our_loss(net):
            return F.cross_entropy(net(x).float().flatten(0, 1), y.flatten())

        runs = [lambda: one(*theirs, lambda net: net(x, y)[1]), lambda: one(*our, our_loss)]
        for run in runs:
            run(), run()
        memory = [peak(run) for run in runs]
        times, count = ([], []), max(3, int(2e6 / (batch * args['block_size'] * args['n_embd'])))
        for _ in range(11):
            for run, t in zip(runs, times):
                t0 = time.perf_counter()
                for _ in range(count):
                    run()
                t.append((time.perf_counter() - t0) / count)
        t = [statistics.median(x) for x in times]
        n = batch * args['block_size']
        print(
            f'{name}: nanoGPT {n / t[0]:,.0f} tok/s, ours {n / t[1]:,.0f}: {t[0] / t[1]:.2f}x; memory of a step '
            f'{memory[0] / 1e6:.1f} MB, ours {memory[1] / 1e6:.1f}: {memory[1] / memory[0]:.2f}x',
            flush=True,
        )


def sample():
    """4 layers, 256 wide, vocabulary 4,096: 64 prompts of 32 tokens, 128 new ones each, temperature 1."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    args = dict(arch='llama', vocab_size=4096, block_size=256, n_layer=4, n_head=4, n_embd=256, tie_embeddings=True)
    net = GPT(GPTConfig(**args)).eval()
    prompts = torch.randint(4000, (64, 32))

    @torch.no_grad()
    def no_cache():  # the whole sequence for every new token, the output matrix on the last position only
        x = prompts
        for _ in range(128):
            probs = F.softmax(net.head(net.hidden(x)[:, -1]), dim=-1)
            x = torch.cat((x, torch.multinomial(probs, 1)), dim=1)

    with tempfile.TemporaryDirectory() as folder:
        spec = dict(version=1, kind='bpe', pattern=r'[\s\S]', special_tokens=SPECIAL_TOKENS, ranks=ranks())
        ckpt = f'{folder}/base.pt'
        save_checkpoint(ckpt, 'base', net.state_dict(), asdict(net.config), Tokenizer(spec), {}, 0, {})
        timed(f'{ROOT}/convert.py', ckpt, f'{folder}/hf', cwd=ROOT)
        theirs = AutoModelForCausalLM.from_pretrained(f'{folder}/hf')
    theirs.generation_config.eos_token_id = None
    with torch.no_grad():
        gap = (theirs(prompts).logits - net(prompts)).abs().max().item()
    runs = {
        'cache': lambda: generate(net, prompts.tolist(), 128),
        'transformers': lambda: theirs.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            min_new_tokens=128,
            max_new_tokens=128,
            pad_token_id=0,
        ),
        'no cache': no_cache,
    }
    times = {name: [] for name in runs}
    for i in range(4):
        for name, run in runs.items():
            t0 = time.perf_counter()
            if name != 'no cache' or i < 3:
                run()
                times[name] += [time.perf_counter() - t0] * (i > 0)
    t = {name: statistics.median(x) for name, x in times.items()}
    print(
        f'same weights, logits {gap:.1e} apart; ' + ', '.join(f'{n} {64 * 128 / x:,.0f} tok/s' for n, x in t.items())
    )
    print(
        f'{t["no cache"] / t["cache"]:.1f}x the whole sequence again, '
        f'{t["transformers"] / t["cache"]:.2f}x transformers'
    )


def ranks():
    """4,090 tokens without meaning."""
    pairs = [bytes([a, b]) for a in range(32, 127) for b in range(32, 127)]
    tokens = [bytes([b]) for b in range(256)] + pairs[: 4090 - 256]
    return [base64.b64encode(t).decode() for t in tokens]


RECIPE = (
    '--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 '
    '--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0'
).split()  # nanoGPT's README


@torch.no_grad()
def whole_loss(net, ids):
    """Mean loss on all windows of 64."""
    n = (len(ids) - 1) // 64
    x, y = torch.tensor(ids[: n * 64]).view(n, 64), torch.tensor(ids[1 : n * 64 + 1]).view(n, 64)
    logits = torch.cat([net(part) for part in x.split(64)])
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()).item()


def timed(*command, cwd):
    t0 = time.time()
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, encoding='utf-8')
    assert done.returncode == 0, done.stderr
    return done.stdout, time.time() - t0


def shakespeare(folder, path, *seeds):
    """Training time is steps x median time of a step, evaluations left out; process time is all of it."""
    with open(path, encoding='utf-8') as f:
        text = f.read()
    cut, chars = int(0.9 * len(text)), sorted(set(text))  # as its prepare.py does
    with tempfile.TemporaryDirectory() as tmp:
        code, data = os.path.join(tmp, 'nanoGPT'), os.path.join(tmp, 'data')
        subprocess.run(['cp', '-r', folder, code], check=True)
        for split, part in ('train', text[:cut]), ('val', text[cut:]):
            np.array([chars.index(c) for c in part], np.uint16).tofile(f'{code}/data/shakespeare_char/{split}.bin')
            write_jsonl(f'{data}/{split}/0.jsonl.gz', [dict(text=part)])
        with open(f'{code}/data/shakespeare_char/meta.pkl', 'wb') as f:
            pickle.dump(dict(vocab_size=len(chars), stoi={c: i for i, c in enumerate(chars)}), f)
        timed(f'{ROOT}/tokenizer.py', f'--data_dir={data}', '--kind=char', cwd=tmp)

        out, whole = timed(
            'train.py', 'config/train_shakespeare_char.py', *RECIPE, f'--out_dir={tmp}/theirs', cwd=code
        )
        times = [float(t) for t in re.findall(r'time ([\d.]+)ms', out)]
        train = 2000 * statistics.median(times) / 1000
        net, _ = nanogpt(code, **CPU)
        net.load_state_dict(torch.load(f'{tmp}/theirs/ckpt.pt', weights_only=False)['model'])
        net.eval()
        # without targets it gives the last position only, so they are given
        loss = whole_loss(lambda x: net(x, x)[0], [chars.index(c) for c in text[cut:]])
        n = sum(p.numel() for p in net.transformer.h.parameters()) + net.transformer.ln_f.weight.numel()
        print(
            f'nanoGPT, {n:,} parameters: loss {loss:.4f}, training {train:.1f} s, process {whole:.1f} s', flush=True
        )

        tok = Tokenizer.load(f'{data}/tokenizer.json')
        for seed in seeds or (101, 102, 103, 104):
            out, ours_whole = timed(
                f'{ROOT}/pretrain.py',
                f'{ROOT}/config/shakespeare.py',
                f'--data_dir={data}',
                f'--out_dir={tmp}/{seed}',
                '--log_interval=1',
                f'--seed={seed}',
                cwd=tmp,
            )
            rows = [r for _, r in read_jsonl(f'{tmp}/{seed}/base.jsonl') if 'loss' in r]
            n_step = int(re.search(r'steps of ([\d,]+) tokens', out)[1].replace(',', ''))
            ours_train = len(rows) * statistics.median(n_step / r['tokens_per_second'] for r in rows)
            net = load_model(torch.load(f'{tmp}/{seed}/base.pt', weights_only=True), 'cpu').eval()
            loss = whole_loss(net, tok.encode(text[cut:]))
            print(
                f'ours, seed {seed}, {net.n_params(embedding=False):,} parameters: loss {loss:.4f}, training '
                f'{ours_train:.1f} s = 1/{train / ours_train:.1f}, process {ours_whole:.1f} s = '
                f'1/{whole / ours_whole:.1f}',
                flush=True,
            )


if __name__ == '__main__':
    globals()[sys.argv[1]](*sys.argv[2:])
