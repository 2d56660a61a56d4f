"""
Evaluation: base, SFT and RLHF model side by side. What is often asserted of the stages is measured here: knowledge
comes from pretraining, form from SFT, and RLHF can beat the demonstrations, at the price of diversity.

Reads  out_dir/{base,sft,rlhf}.pt as far as they exist, reward.pt for its cost; data_dir/val_*.bin, prompts_val.jsonl,
       benchmarks/*.jsonl
Writes out_dir/report.md, report.json, curves.svg

on a laptop        $ python eval.py config/tiny.py
on 8 GPUs          $ torchrun --standalone --nproc_per_node=8 eval.py

  bits per byte      of the validation documents: comparable across tokenizers
  benchmarks         multiple choice {query, choices, gold}: the choice with the lowest loss a token; the same for
                     schemas {context_options, continuation, gold}; {context, continuation}: does greedy say it?
  answers            to held-out prompts, sampled: all checks met, gold score, entropy, distinct n-grams
  win rate           gold score against the SFT model's answer to the same prompt, ties halved, 95% interval (bootstrap)
  KL from SFT        of the whole answer, in nats: mean over answers of log p(answer) - log p_SFT(answer)
A base model knows no turns: it gets the words of the prompt as the start of a document and continues.
"""
import glob, itertools, json, math, os, time

import numpy as np
import torch
from torch.nn import functional as F

import model as lib
from configurator import configure
from model import Tokenizer, die, print0

# -----------------------------------------------------------------------------
# settings
# what is measured
data_dir = 'data/toytown'   # where val_*.bin, prompts_val.jsonl and benchmarks/ are
out_dir = 'out/toytown'     # where the checkpoints are and the report goes
models = 'base,sft,rlhf'    # columns: stages in out_dir, or paths of checkpoints
benchmarks = ''             # names of files in benchmarks/, comma-separated; empty = all
max_questions = 500         # of each benchmark; 0 = all
val_tokens = 100000         # validation tokens for bits per byte
n_prompts = 300             # held-out prompts that are answered
# sampling
max_new_tokens = 64         # longest answer
temperature = 1.0           # 1 samples what the model believes
# system
batch_size = 16             # sequences in a forward pass
device = 'auto'             # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'              # auto, float32, bfloat16
seed = 1337                 # of the answers and the bootstrap
config = configure(globals())

# -----------------------------------------------------------------------------
# device, checkpoints
run = lib.start(config)
started, checkpoints = time.time(), {}
for name in models.split(','):
    path = name if name.endswith('.pt') else os.path.join(out_dir, f'{name}.pt')
    if os.path.exists(path) or name.endswith('.pt'):
        checkpoints[name] = lib.load_checkpoint(path, ['base', 'sft', 'rlhf'], 'bash speedrun.sh')
    else:
        print0(f'no {path}: left out of the report')
if not checkpoints:
    die(f'none of {models} in {out_dir}: make them, beginning with `python pretrain.py --out_dir={out_dir}`')

# -----------------------------------------------------------------------------
# measures of one model
@torch.no_grad()
def bits_per_byte(net, tok):
    """Loss on the first val_tokens of the validation shards, in bits per byte of their text; None without shards."""
    nats, n_bytes, T = 0.0, 0, net.config.block_size
    paths = sorted(glob.glob(os.path.join(glob.escape(data_dir), 'val_*.bin')))
    shards = [lib.read_shard(p, tok.hash)[:val_tokens + 1] for p in paths]
    tokens = np.concatenate(shards or [np.zeros(0)])[:val_tokens + 1]
    windows = torch.tensor([tokens[i:i + T + 1].astype(np.int64).tolist() for i in range(0, len(tokens) - T, T)])
    sizes = torch.tensor([len(tok.bytes_of(i)) for i in range(tok.n_vocab)])
    for rows in windows[run.rank::run.world].split(batch_size) if len(windows) else ():
        rows = rows.to(run.device)
        with run.autocast():
            logits = net(rows[:, :-1])
        nats += F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction='sum').item()
        n_bytes += sizes[rows[:, 1:].cpu()].sum().item()
    nats, n_bytes = lib.all_sum(nats, n_bytes)
    return nats / math.log(2) / n_bytes if n_bytes else None

@torch.no_grad()
def continuations(net, tok, pairs):
    """(context, continuation) texts -> per pair: mean loss of the continuation's tokens, and whether greedy says it."""
    rows = []
    for context, text in pairs:
        glue = '' if not context or context[-1].isspace() or text[:1].isspace() else ' '
        said = tok.encode(glue + text)[:net.config.block_size]
        room = net.config.block_size + 1 - len(said) # the end of a long context matters most
        ids = ([tok.eot] + tok.encode(context))[-room:]
        rows.append((ids + said, len(said)))
    out = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    for batch in (order[i:i + batch_size] for i in range(0, len(order), batch_size)):
        ids = lib.pad_right([rows[i][0] for i in batch], tok.pad, run.device)     # (B, T)
        with run.autocast():
            logits = net(ids[:, :-1]).float()
        loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction='none')  # (B, T-1)
        right = logits.argmax(-1) == ids[:, 1:]
        for row, i in enumerate(batch):
            span = slice(len(rows[i][0]) - 1 - rows[i][1], len(rows[i][0]) - 1)
            out[i] = loss[row, span].mean().item(), bool(right[row, span].all())
    return out

def load_benchmark(path):
    """Questions as (list of (context, continuation), index of the right one or None)."""
    questions = []
    for line, row in lib.read_jsonl(path):
        if {'messages', 'test'} & set(row): # GSM8K, HumanEval: their answers have to be sampled
            lib.print0(f'{path}: left out, its answers are no choices or continuations')
            return []
        try:
            if 'choices' in row:
                options, gold = [(row['query'], c) for c in row['choices']], int(row['gold'])
            elif 'context_options' in row:
                options, gold = [(c, row['continuation']) for c in row['context_options']], int(row['gold'])
            else:
                options, gold = [(row['context'], row['continuation'])], None
            if not all(isinstance(text, str) for pair in options for text in pair):
                raise TypeError('a text is no string')
            if gold is not None and not 0 <= gold < len(options):
                raise ValueError(f'gold {gold} of {len(options)} choices')
            questions.append((options, gold))
        except (KeyError, TypeError, ValueError) as e:
            die(f'{path}:{line}: neither query/choices/gold nor context/continuation nor context_options/... ({e})')
        if max_questions and len(questions) == max_questions:
            break
    return questions

def examine(net, tok, questions):
    """Share of questions answered rightly, and what guessing gives."""
    mine, right = questions[run.rank::run.world], 0
    losses = iter(continuations(net, tok, [pair for options, _ in mine for pair in options]))
    for options, gold in mine:
        scored = [next(losses) for _ in options]
        right += scored[0][1] if gold is None else min(range(len(options)), key=lambda i: scored[i][0]) == gold
    chance = np.mean([0 if gold is None else 1 / len(options) for options, gold in questions])
    return lib.all_sum(right)[0] / len(questions), float(chance)

@torch.no_grad()
def logprobs_of(net, queries, answers, pad):
    """Per answer: sum of its tokens' log-probabilities, sum of the entropies of their distributions."""
    out = []
    for i in range(0, len(queries), batch_size):
        q, a = queries[i:i + batch_size], answers[i:i + batch_size]
        ids = lib.pad_right([x + y for x, y in zip(q, a)], pad, run.device)       # (B, T)
        with run.autocast():
            logp = F.log_softmax(net(ids[:, :-1]).float() / (temperature or 1.0), dim=-1)  # (B, T-1, V)
        chosen = logp.gather(-1, ids[:, 1:, None]).squeeze(-1)                    # (B, T-1)
        entropy = -(logp.exp() * logp).sum(-1)
        for row, (x, y) in enumerate(zip(q, a)):
            span = slice(len(x) - 1, len(x) + len(y) - 1)
            out.append((chosen[row, span].sum().item(), entropy[row, span].sum().item()))
    return out

def answer(net, tok, chatty, prompts):
    """Sample an answer to each prompt: list of dicts with text, query, ids, logp, entropy."""
    mine, stop, out = prompts[run.rank::run.world], tok.end if chatty else tok.eot, []
    lib.seed_step(seed, 0, run.rank)
    new_tokens = min(max_new_tokens, net.config.block_size - 1)
    room = net.config.block_size - new_tokens
    queries = [tok.render(p['messages'], prompt=True)[0] if chatty else
               [tok.eot] + tok.encode('\n'.join(m['content'] for m in p['messages']) + '\n') for p in mine]
    queries = [q[-room:] for q in queries]
    for i in range(0, len(mine), batch_size):
        with run.autocast():
            new = lib.generate(net, queries[i:i + batch_size], new_tokens, stop, temperature)
        out += [dict(text=tok.said(r), ids=r, ended=r[-1] == stop) for r in new]
    for o, query, (logp, entropy) in zip(out, queries, logprobs_of(net, queries, [o['ids'] for o in out], tok.pad)):
        o.update(query=query, logp=logp, entropy=entropy)
    return lib.gather(out, run)

def distinct(texts, n, budget):
    """Share of different n-grams among the n-grams of the first `budget` words of all texts together."""
    grams, words = [], 0
    for text in texts:
        split = text.lower().split()[:budget - words]
        words += len(split)
        grams += [tuple(split[i:i + n]) for i in range(len(split) - n + 1)]
    return len(set(grams)) / max(1, len(grams))

def win_rate(ours, theirs):
    """Mean of win 1, tie 0.5, loss 0 over paired scores, and its 95% interval by bootstrap over prompts."""
    points = 0.5 + 0.5 * np.sign(np.array(ours) - np.array(theirs))
    draws = np.random.default_rng(seed).choice(points, (2000, len(points))).mean(1)
    return float(points.mean()), *(float(q) for q in np.quantile(draws, [0.025, 0.975]))

# -----------------------------------------------------------------------------
# the measuring, model by model
path, prompts = os.path.join(data_dir, 'prompts_val.jsonl'), []
any_tok = Tokenizer(next(iter(checkpoints.values()))['tokenizer'])
if os.path.exists(path):
    prompts = [row for row, _ in itertools.islice(lib.read_prompts(path, any_tok, data_dir), n_prompts)]
files = sorted(glob.glob(os.path.join(glob.escape(data_dir), 'benchmarks', '*.jsonl')))
if benchmarks:
    have = {os.path.basename(f)[:-6]: f for f in files}
    missing = [b for b in benchmarks.split(',') if b not in have]
    if missing:
        die(f'no benchmark {missing[0]} in {data_dir}/benchmarks, which has {", ".join(have) or "none"}')
    files = [have[b] for b in benchmarks.split(',')]
exams = {os.path.basename(f)[:-6]: load_benchmark(f) for f in files}
nets, table, answers = {}, {}, {}
for name, ckpt in checkpoints.items():
    t0, tok = time.time(), Tokenizer(ckpt['tokenizer'])
    net = nets[name] = lib.load_model(ckpt, run.device).eval()
    column = table[name] = {'bits per byte': bits_per_byte(net, tok)}
    for exam, questions in exams.items():
        if questions:
            right, chance = examine(net, tok, questions)
            column[f'{exam} (chance {chance:.0%})'] = right
    if prompts:
        said = answers[name] = answer(net, tok, ckpt['stage'] != 'base', prompts)
        graded = [lib.grade(p['checks'], a['text']) for p, a in zip(prompts, said) if p.get('checks')]
        if graded:
            column['all checks met'] = float(np.mean([met for met, _ in graded]))
            column['gold score'] = float(np.mean([score for _, score in graded]))
        column['entropy, nats a token'] = sum(a['entropy'] for a in said) / sum(len(a['ids']) for a in said)
        column['answers that stop'] = float(np.mean([a['ended'] for a in said]))
        column['tokens an answer'] = float(np.mean([len(a['ids']) for a in said]))
    print0(f'{name}: measured in {time.time() - t0:.0f} s')
budget = min((sum(len(a['text'].split()) for a in said) for said in answers.values()), default=0)
for name, said in answers.items():
    column = table[name]
    for n in (1, 2):
        column[f'distinct-{n} of {budget} words'] = distinct([a['text'] for a in said], n, budget)
    if 'sft' in answers and checkpoints[name]['stage'] == 'rlhf':
        scored = [i for i, p in enumerate(prompts) if p.get('checks')]
        if scored:
            ours, theirs = ([lib.grade(prompts[i]['checks'], answers[m][i]['text'])[1] for i in scored]
                            for m in (name, 'sft'))
            column['win rate against SFT'], *interval = win_rate(ours, theirs)
            column['win rate, 95% interval'] = interval
        mine = range(run.rank, len(said), run.world)
        query, new = ([said[i][k] for i in mine] for k in ('query', 'ids'))
        ref = lib.gather(logprobs_of(nets['sft'], query, new, tok.pad), run)
        column['KL from SFT, nats an answer'] = float(np.mean([a['logp'] - r for a, (r, _) in zip(said, ref)]))

# -----------------------------------------------------------------------------
# the report
costs = {}
for stage in ('base', 'sft', 'reward', 'rlhf'):
    path = os.path.join(out_dir, f'{stage}.pt')
    if os.path.exists(path):
        metrics = lib.load_checkpoint(path, [stage], 'bash speedrun.sh')['metrics']
        costs[stage] = {k: metrics[k] for k in ('seconds', 'flops', 'tokens') if k in metrics}
        if stage == 'reward':
            agreement = 'accuracy', 'gold_accuracy', 'self_agreement'
            costs[stage].update({k: metrics[k] for k in agreement if metrics.get(k)})

def show(value):
    if isinstance(value, list):
        return ' - '.join(map(show, value))
    return '' if value is None else f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.3f}'

def markdown(head, rows):
    """A table whose columns are as wide as their widest cell, readable as plain text too."""
    cells = [head] + [[r if isinstance(r, str) else show(r) for r in row] for row in rows]
    wide = [max(len(row[i]) for row in cells) for i in range(len(head))]
    cells.insert(1, ['-' * wide[0]] + ['-' * (w - 1) + ':' for w in wide[1:]])
    pad = lambda row: [row[0].ljust(wide[0])] + [c.rjust(w) for c, w in zip(row[1:], wide[1:])]
    return '\n'.join('| ' + ' | '.join(pad(row)) + ' |' for row in cells)

measures = list(dict.fromkeys(m for column in table.values() for m in column))
rows = [[m, *(column.get(m) for column in table.values())] for m in measures]
parts = ['# Report', markdown(['measure', *table], rows)]
total = sum(c['flops'] for c in costs.values())
if total:
    rows = [[s, c['seconds'], f'{c["flops"]:.2e}', f'{c["flops"] / total:.1%}', c['tokens']] for s, c in costs.items()]
    parts.append(markdown(['cost of training', 'seconds', 'FLOPs', 'share of FLOPs', 'tokens'], rows))
if costs.get('reward', {}).get('accuracy'):
    r = costs['reward']
    parts.append(f'Reward model: ranks {r["accuracy"]:.1%} of held-out pairs as the labeller did'
                 + (f' (who agrees with itself on {r["self_agreement"]:.1%})' if r.get('self_agreement') else '')
                 + (f', {r["gold_accuracy"]:.1%} as the gold score does.' if r.get('gold_accuracy') else '.'))
if answers:
    parts.append('## The same prompts, answered by each')
    for i in np.random.default_rng(seed).permutation(len(prompts))[:6]:
        lines = [f'**{prompts[i]["messages"][-1]["content"]}**'.replace('\n', ' ')]
        for name, said in answers.items():
            text, checks = said[i]['text'], prompts[i].get('checks')
            mark = '' if not checks else ' (all checks met)' if lib.grade(checks, text)[0] else ' (not met)'
            lines.append(f'- {name}{mark}: ' + ' '.join(text.split()))
        parts.append('\n'.join(lines))

def curve(stage, key):
    """(steps, values) of a logged number, empty if there is no log."""
    path = os.path.join(out_dir, f'{stage}.jsonl')
    rows = [r for _, r in lib.read_jsonl(path) if r.get(key) is not None] if os.path.exists(path) else []
    return [r['step'] for r in rows], [r[key] for r in rows]

def draw(panels, width=300, height=170):
    """Line charts as SVG text: [(title, {label: (xs, ys)})], three a row."""
    colours, out = ['#2563eb', '#dc2626', '#059669'], []
    for i, (title, lines) in enumerate(panels):
        x0, y0 = i % 3 * (width + 20) + 50, i // 3 * (height + 50) + 30
        w, h = width - 60, height - 20
        xs, ys = ([v for line in lines.values() for v in line[a]] for a in (0, 1))
        lo, hi, end = min(ys), max(ys), max(max(xs), 1)
        out.append(f'<text x="{x0}" y="{y0 - 10}" font-weight="bold">{title}</text>'
                   f'<rect x="{x0}" y="{y0}" width="{w}" height="{h}" fill="none" stroke="#bbb"/>'
                   f'<text x="{x0 - 4}" y="{y0 + 10}" text-anchor="end">{hi:.3g}</text>'
                   f'<text x="{x0 - 4}" y="{y0 + h}" text-anchor="end">{lo:.3g}</text>'
                   f'<text x="{x0 + w}" y="{y0 + h + 14}" text-anchor="end">step {end}</text>')
        for (label, (x, y)), colour, row in zip(lines.items(), colours, range(3)):
            scale = h / (hi - lo or 1)
            points = ' '.join(f'{x0 + w * a / end:.1f},{y0 + h - scale * (b - lo):.1f}' for a, b in zip(x, y))
            out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
                       f'<text x="{x0 + w - 6}" y="{y0 + 14 + 13 * row}" text-anchor="end" fill="{colour}">'
                       f'{label}</text>')
    size = 3 * (width + 20) + 20, -(-len(panels) // 3) * (height + 50) + 10
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" font-family="sans-serif" '
            f'font-size="11"><rect width="100%" height="100%" fill="white"/>' + '\n'.join(out) + '</svg>\n')

charts = [('pretraining: loss', 'base', dict(train='loss', val='val_loss')),
          ('SFT: loss', 'sft', dict(train='loss', val='val_loss')),
          ('reward model: held-out accuracy', 'reward', {'as labeller': 'accuracy', 'as gold': 'gold_accuracy'}),
          ('RLHF: reward', 'rlhf', {'proxy score': 'score', 'gold score': 'gold'}),
          ('RLHF: KL from SFT, nats an answer', 'rlhf', dict(kl='kl')),
          ('RLHF: entropy, nats a token', 'rlhf', dict(entropy='entropy'))]
panels = [(title, {label: curve(stage, key) for label, key in keys.items()}) for title, stage, keys in charts]
panels = [(title, {label: c for label, c in lines.items() if c[0]}) for title, lines in panels]
panels = [p for p in panels if p[1]]
if run.master:
    if panels:
        parts.insert(1, '![curves of all stages](curves.svg)')
        with lib.atomic(os.path.join(out_dir, 'curves.svg')) as tmp, open(tmp, 'w', encoding='utf-8') as f:
            f.write(draw(panels))
    with lib.atomic(os.path.join(out_dir, 'report.json')) as tmp, open(tmp, 'w', encoding='utf-8') as f:
        json.dump(dict(table=table, costs=costs, config=config), f, indent=1)
    with lib.atomic(os.path.join(out_dir, 'report.md')) as tmp, open(tmp, 'w', encoding='utf-8') as f:
        f.write('\n\n'.join(parts) + '\n')
    print('\n' + '\n\n'.join(parts), f'\n\nwritten to {out_dir}/report.md in {time.time() - started:.0f} s')
lib.finish(run)
