"""
Evaluation: the base, SFT, DPO and RLHF models side by side. It measures what is often only claimed
about the stages: knowledge comes from pretraining, form comes from SFT, and RLHF can beat the
demonstrations, at the price of diversity.

Reads   out_dir/{base,sft,dpo,rlhf}.pt, those that exist; reward.pt for its cost; STAGE.jsonl;
        data_dir/val_*.bin, prompts_val.jsonl, benchmarks/*.jsonl
Writes  out_dir/report.md, report.json, curves.svg

CPU        $ python eval.py config/tiny.py
one GPU    $ python eval.py --data_dir=data/mine --out_dir=out/mine
8 GPUs     $ torchrun --standalone --nproc_per_node=8 eval.py config/d20.py

bits per byte  loss on the validation documents. It can be compared across tokenizers
benchmarks     fraction of questions answered correctly; in brackets: what guessing would give
answers        sampled for held-out prompts: all checks met, gold score, entropy, distinct n-grams
win rate       gold score against the SFT model's answer to the same prompt; a tie counts as a half
KL from SFT    of whole answers, in nats: the mean of log p(answer) - log p_SFT(answer)

A base model knows no chat template. It gets the words of the prompt as the start of a document.

Left out: few-shot examples; benchmarks with sampled answers (GSM8K, HumanEval); human judges.
"""
from configurator import configure # first: makes Ctrl-C one line, also while torch loads
import glob
import itertools
import json
import math
import os
import re
import statistics
import time

import numpy as np
import torch
from torch.nn import functional as F

from model import (
    Tokenizer,
    all_gather_list,
    all_sum,
    cleanup,
    generate,
    grade,
    load_checkpoint,
    load_model,
    pad_right,
    print0,
    read_jsonl,
    read_prompts,
    read_shard,
    seed_step,
    setup,
    write_text,
)

# -----------------------------------------------------------------------------
# settings
# what is measured
data_dir = 'data/toytown'   # folder with val_*.bin, prompts_val.jsonl and benchmarks/
out_dir = 'out/toytown'     # folder with the checkpoints; the report is written here
models = 'base,sft,dpo,rlhf' # columns of the report: stages in out_dir, or paths of checkpoints
benchmarks = ''             # names of files in benchmarks/, separated by commas; empty = all
max_questions = 500         # questions per benchmark; 0 = all
val_tokens = 100000         # validation tokens for bits per byte; 0 = skip
n_prompts = 300             # held-out prompts to answer; 0 = skip
# sampling
max_new_tokens = 64         # longest answer, in tokens
temperature = 1.0           # 1 samples from the model's own distribution, 0 is greedy
# system
batch_size = 16             # sequences in one forward pass
progress_seconds = 5        # print progress this often
device = 'auto'             # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'              # auto, float32, bfloat16
seed = 1337                 # for sampling and for the bootstrap
config = configure(globals())

# -----------------------------------------------------------------------------
# device and checkpoints
for name in ('batch_size', 'max_new_tokens'):
    assert config[name] > 0, f'{name} must be positive, not {config[name]}'
for name in ('max_questions', 'val_tokens', 'n_prompts', 'progress_seconds'):
    assert config[name] >= 0, f'{name} must be at least 0, not {config[name]}'
# dividing the logits by a tiny temperature would overflow
is_usable = temperature == 0 or temperature >= 0.01
assert is_usable, f'temperature must be 0 (greedy) or at least 0.01, not {temperature}'

run = setup(config)
started = time.time()

checkpoints = {}
for name in re.split(' *, *', models.strip()):
    is_path = name.endswith('.pt')
    path = name if is_path else os.path.join(out_dir, f'{name}.pt')
    # A stage that has not been run yet is left out. A path that somebody typed must exist.
    if is_path or os.path.exists(path):
        stages = ['base', 'sft', 'dpo', 'rlhf']
        checkpoints[name] = load_checkpoint(path, stages, 'bash speedrun.sh')
    else:
        print0(f'{path} does not exist: left out of the report')
assert checkpoints, \
    f'none of {models} is in {out_dir}: start with `python pretrain.py --out_dir={out_dir}`'

# -----------------------------------------------------------------------------
# how well a model predicts given text

def in_batches(items, label):
    """Yield batches of items. Every progress_seconds, print how many are done and the time left."""
    start = time.time()
    next_print = start + progress_seconds
    for done in range(0, len(items), batch_size):
        now = time.time()
        if done > 0 and now >= next_print:
            rate = done / (now - start)
            left = (len(items) - done) / rate
            print0(f'  {label}: {done:,} of {len(items):,} | {rate:.1f} per second | '
                   f'{left:,.0f} s left')
            next_print = now + progress_seconds
        yield items[done:done + batch_size]

@torch.no_grad()
def bits_per_byte(model, tok, label=''):
    """
    Loss on the first val_tokens of the validation shards, in bits per byte. None without shards.
    A loss per token cannot be compared across tokenizers: longer tokens are harder to predict,
    but there are fewer of them. The number of bytes does not depend on the tokenizer.
    """
    if val_tokens == 0:
        return None
    T = model.config.block_size
    tokens = np.zeros(0, np.int64)
    for path in sorted(glob.glob(os.path.join(glob.escape(data_dir), 'val_*.bin'))):
        missing = val_tokens + 1 - len(tokens) # + 1: the first token is never predicted
        shard = read_shard(path, tok.hash)[:missing]
        tokens = np.concatenate([tokens, shard.astype(np.int64)])
    n_windows = (len(tokens) - 1) // T # tokens at the end that do not fill a window are not used
    if n_windows < 1:
        return None

    tokens = torch.from_numpy(tokens)
    end = n_windows * T
    x = tokens[:end].view(n_windows, T)
    y = tokens[1:end + 1].view(n_windows, T) # the same tokens, one later
    # a special token costs bits, but it has no bytes: its size here is 0
    token_sizes = torch.tensor([len(tok.token_bytes(i)) for i in range(tok.n_vocab)])

    nats = 0.0
    n_bytes = 0
    mine = list(range(run.rank, n_windows, run.world_size))
    for rows in in_batches(mine, f'{label}: bits per byte'):
        inputs = x[rows].to(run.device)
        targets = y[rows].to(run.device)
        with run.autocast():
            logits = model(inputs)                                       # (B, T, V)
        logits = logits.float().flatten(0, 1)                            # (B*T, V)
        nats += F.cross_entropy(logits, targets.flatten(), reduction='sum').item()
        n_bytes += token_sizes[y[rows]].sum().item()
    nats, n_bytes = all_sum(nats, n_bytes)
    return nats / math.log(2) / n_bytes

@torch.no_grad()
def score(model, rows, lengths, pad, temperature=1.0, label=''):
    """
    Score the last lengths[i] tokens of each row of token ids. -> [(logprob, entropy, is_greedy)].

    logprob: sum of the log-probabilities of these tokens, in nats. entropy: sum of the entropies of
    the distributions that they come from. is_greedy: would greedy decoding give the same tokens?
    """
    # Rows of similar length share a batch, to save padding. The longest come first: if they fit
    # into memory, all others do, and the time left is not underestimated.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    scores = [None] * len(rows)
    for batch in in_batches(order, label):
        ids = pad_right([rows[i] for i in batch], pad, run.device)       # (B, T+1)
        with run.autocast():
            logits = model(ids[:, :-1])                                  # (B, T, V)
        for row, i in enumerate(batch):
            end = len(rows[i])
            start = end - lengths[i]
            targets = ids[row, start:end]                                # (N,)
            # the logits at t predict token t + 1; softmax only where it is needed, to save memory
            row_logits = logits[row, start - 1:end - 1].float()          # (N, V)
            logprobs = F.log_softmax(row_logits / temperature, dim=-1)   # (N, V)
            logprob = logprobs.gather(-1, targets[:, None]).sum().item()
            entropy = -(logprobs.exp() * logprobs).sum().item()
            is_greedy = (row_logits.argmax(-1) == targets).all().item()
            scores[i] = (logprob, entropy, is_greedy)
    return scores

# characters of scripts without blanks between words: Thai to Burmese, Khmer, Chinese, Japanese
NO_BLANKS = re.compile('[\u0e00-\u109f\u1780-\u17ff\u2e80-\u312f\u31a0-\u9fff'
                       '\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]')

def split_at_blanks(context, continuation):
    """
    Move the blanks between two texts to the continuation, because in running text ' owl' is one
    token. If there are none, put one in: llm-foundry's rows leave it out.
        ('Who? ', 'Anna') and ('Who?', 'Anna') -> ('Who?', ' Anna'), but ('谁', '我') -> ('谁', '我')
    """
    kept = context.rstrip(' \t\xa0\u3000') # a newline stays: it can be one token with what it ends
    blanks = context[len(kept):]
    border = context[-1:] + continuation[:1]
    has_blank = any(char.isspace() for char in border)
    if context and not has_blank and not NO_BLANKS.search(border):
        blanks = ' '
    return kept, blanks + continuation

def score_continuations(model, tok, pairs, label=''):
    """
    [(context, continuation)], two texts each -> [(loss, is_greedy)].
    loss: mean loss of the continuation's tokens, in nats. A sum would favour short continuations.
    is_greedy: would greedy decoding give exactly this continuation?
    """
    block_size = model.config.block_size
    rows = []
    lengths = []
    for context, text in pairs:
        context, text = split_at_blanks(context, text)
        # a tokenizer of characters drops those that it does not know
        continuation = tok.encode(text)[:block_size] or [tok.pad]
        room = block_size + 1 - len(continuation) # + 1: the last token is only predicted
        prefix = [tok.eot] + tok.encode(context)
        rows.append(prefix[-room:] + continuation) # of a long context, the end matters most
        lengths.append(len(continuation))

    losses = []
    scores = score(model, rows, lengths, tok.pad, label=label)
    for row, length, (logprob, entropy, is_greedy) in zip(rows, lengths, scores):
        loss = -logprob / length
        if row[-1] == tok.pad: # this model cannot write the continuation
            loss = math.inf
        losses.append((loss, is_greedy))
    return losses

# -----------------------------------------------------------------------------
# benchmarks

def load_benchmark(path):
    """
    Read the questions of a benchmark: [(choices, gold)]. choices: [(context, continuation)].
    gold: index of the right choice; None if there is one choice and greedy decoding must give it.

    Three kinds of rows, as in llm-foundry and DCLM:
        {query, choices, gold}                 which choice has the lowest loss per token?
        {context_options, continuation, gold}  which context gives the continuation the lowest loss?
        {context, continuation}                does greedy decoding give the continuation?
    """
    questions = []
    for line, row in read_jsonl(path):
        if 'messages' in row or 'test' in row: # the forms of GSM8K and HumanEval
            print0(f'{path}: left out, because its answers must be sampled')
            return []
        gold = None
        try:
            if 'choices' in row:
                options = row['choices']
                choices = [(row['query'], option) for option in options]
                gold = int(row['gold'])
            elif 'context_options' in row:
                options = row['context_options']
                choices = [(option, row['continuation']) for option in options]
                gold = int(row['gold'])
            else:
                options = []
                choices = [(row['context'], row['continuation'])]
            if not isinstance(options, list):
                raise TypeError(f'{options!r:.50} is not a list')
            for context, continuation in choices:
                if not isinstance(context, str) or not isinstance(continuation, str):
                    raise TypeError('a text is not a string')
                if not continuation.strip():
                    raise ValueError('a continuation is empty')
            if gold is not None and (gold != float(row['gold']) or not 0 <= gold < len(choices)):
                raise ValueError(f'gold is {row["gold"]}, but there are {len(choices)} choices')
        except (KeyError, OverflowError, TypeError, ValueError) as e: # int(inf) overflows
            raise AssertionError(
                f'{path}:{line}: {type(e).__name__}: {e}: a row holds query, choices, gold, or '
                'context_options, continuation, gold, or context, continuation') from None
        questions.append((choices, gold))
        if len(questions) == max_questions:
            break
    if not questions:
        print0(f'{path}: left out, because it has no questions')
    return questions

def accuracy(model, tok, questions, label=''):
    """-> (fraction of right answers, fraction right by guessing). Ranks share the questions."""
    mine = questions[run.rank::run.world_size]
    pairs = []
    for choices, gold in mine:
        pairs += choices
    scores = score_continuations(model, tok, pairs, label)

    n_right = 0
    first = 0 # where the scores of this question begin
    for choices, gold in mine:
        losses = [loss for loss, is_greedy in scores[first:first + len(choices)]]
        if gold is None:
            n_right += scores[first][1]
        elif min(losses) < math.inf and losses.index(min(losses)) == gold:
            n_right += 1
        first += len(choices)
    n_right = all_sum(n_right)[0]

    chances = []
    for choices, gold in questions:
        chances.append(1 / len(choices) if gold is not None else 0) # free text cannot be guessed
    return n_right / len(questions), statistics.fmean(chances)

# -----------------------------------------------------------------------------
# sampled answers

def score_answers(model, answers, pad, label=''):
    """-> for each answer (logprob, entropy, is_greedy) of its tokens, see score."""
    rows = [answer['query'] + answer['ids'] for answer in answers]
    lengths = [len(answer['ids']) for answer in answers]
    # the temperature of sampling; greedy answers come from no distribution: score them at 1
    return score(model, rows, lengths, pad, temperature or 1.0, label)

def answer_prompts(model, tok, is_chat, prompts, label=''):
    """Sample an answer to each prompt -> [dict(query, ids, text, ended, logprob, entropy)]."""
    mine = prompts[run.rank::run.world_size]
    seed_step(seed, 0, run.rank) # ranks must not draw the same answers
    new_tokens = min(max_new_tokens, model.config.block_size - 1)
    room = model.config.block_size - new_tokens
    stop = tok.end if is_chat else tok.eot

    queries = []
    for prompt in mine:
        if is_chat:
            ids, mask = tok.render(prompt['messages'], prompt=True)
        else:
            text = '\n'.join(message['content'] for message in prompt['messages'])
            ids = [tok.eot] + tok.encode(text + '\n')
        queries.append(ids[-room:]) # of a long prompt, the end matters most

    answers = []
    for batch in in_batches(queries, f'{label}: sampling answers'):
        with run.autocast():
            new_ids = generate(model, batch, new_tokens, stop, temperature)
        for query, ids in zip(batch, new_ids):
            text = tok.decode_answer(ids)
            answers.append(dict(query=query, ids=ids, text=text, ended=ids[-1] == stop))

    scores = score_answers(model, answers, tok.pad, f'{label}: scoring answers')
    for answer, (logprob, entropy, is_greedy) in zip(answers, scores):
        answer['logprob'] = logprob
        answer['entropy'] = entropy
    return all_gather_list(answers, run)

def distinct(texts, n, budget):
    """
    Fraction of different n-grams among the n-grams of the first `budget` words (Li et al. 2016).
    More words repeat more, so only equal budgets can be compared.
        distinct(['a b a', 'B c'], 1, 99) -> 0.6     a, b, c of a, b, a, b, c
    """
    ngrams = []
    n_words = 0
    for text in texts:
        words = text.lower().split()[:budget - n_words]
        n_words += len(words)
        for i in range(len(words) - n + 1): # an n-gram never reaches into the next text
            ngrams.append(tuple(words[i:i + n]))
    return len(set(ngrams)) / max(1, len(ngrams))

def win_rate(ours, theirs):
    """
    Compare paired scores: win 1, tie 0.5, loss 0. -> (mean, lower, upper) with a 95% interval.
    By bootstrap: how much does the mean vary when the prompts are drawn again, with replacement?
        win_rate([1, 0, 3, 4], [0, 1, 3, 3]) -> mean 0.625
    """
    differences = np.array(ours) - np.array(theirs)
    points = 0.5 + 0.5 * np.sign(differences)
    rng = np.random.default_rng(seed)
    means = rng.choice(points, (2000, len(points))).mean(1)
    lower, upper = np.quantile(means, [0.025, 0.975])
    return float(points.mean()), float(lower), float(upper)

# -----------------------------------------------------------------------------
# prompts and benchmarks
prompts = []
path = os.path.join(data_dir, 'prompts_val.jsonl')
if os.path.exists(path):
    first_checkpoint = next(iter(checkpoints.values()))
    tok = Tokenizer(first_checkpoint['tokenizer']) # only to check the prompts
    for row, ids in itertools.islice(read_prompts(path, tok), n_prompts):
        prompts.append(row)

paths = {}
for path in sorted(glob.glob(os.path.join(glob.escape(data_dir), 'benchmarks', '*.jsonl'))):
    name = os.path.basename(path).removesuffix('.jsonl')
    paths[name] = path
wanted = re.split(' *, *', benchmarks.strip()) if benchmarks else list(paths)
questions = {}
for name in wanted:
    assert name in paths, \
        f'no benchmark {name!r} in {data_dir}/benchmarks: choose from {", ".join(paths) or "none"}'
    questions[name] = load_benchmark(paths[name])

# -----------------------------------------------------------------------------
# measure each model
table = {}       # the report: model -> {measure: value}
all_answers = {} # model -> its answers, in the order of the prompts
sft_model = None # the first SFT model: DPO and RLHF models are compared with it
for name, ckpt in checkpoints.items():
    t0 = time.time()
    tok = Tokenizer(ckpt['tokenizer'])
    model = load_model(ckpt, run.device).eval()
    column = {}
    table[name] = column

    column['bits per byte'] = bits_per_byte(model, tok, name)
    for benchmark, rows in questions.items():
        if rows:
            right, chance = accuracy(model, tok, rows, f'{name}: {benchmark}')
            column[f'{benchmark} (chance {chance:.0%})'] = right

    if prompts:
        is_chat = ckpt['stage'] != 'base'
        answers = answer_prompts(model, tok, is_chat, prompts, name)
        all_answers[name] = answers
        for prompt, answer in zip(prompts, answers):
            if prompt.get('checks'):
                all_met, gold = grade(prompt['checks'], answer['text'])
                answer['all_met'] = all_met
                answer['gold'] = gold
        graded = [answer for answer in answers if 'gold' in answer]
        if graded:
            column['all checks met'] = statistics.fmean(answer['all_met'] for answer in graded)
            column['gold score'] = statistics.fmean(answer['gold'] for answer in graded)
        by_task = {} # prompts of Toytown name their task: fact, story, unknown, private, ...
        for prompt, answer in zip(prompts, answers):
            if 'task' in prompt and 'gold' in answer:
                by_task.setdefault(prompt['task'], []).append(answer['all_met'])
        for task in sorted(by_task):
            column[f'checks met: {task} ({len(by_task[task])})'] = statistics.fmean(by_task[task])
        n_tokens = sum(len(answer['ids']) for answer in answers)
        entropy = sum(answer['entropy'] for answer in answers)
        column['entropy, nats per token'] = entropy / n_tokens
        column['answers that end'] = statistics.fmean(answer['ended'] for answer in answers)
        column['tokens per answer'] = n_tokens / len(answers)

    if ckpt['stage'] == 'sft' and sft_model is None:
        sft_name = name
        sft_model = model
    print0(f'{name}: measured in {time.time() - t0:.0f} s')

# -----------------------------------------------------------------------------
# compare the models

# distinct n-grams are compared in equally many words: all that the least talkative model has said
n_words = []
for answers in all_answers.values():
    n_words.append(sum(len(answer['text'].split()) for answer in answers))
budget = min(n_words, default=0)

for name, answers in all_answers.items():
    column = table[name]
    texts = [answer['text'] for answer in answers]
    for n in (1, 2):
        column[f'distinct-{n} in {budget} words'] = distinct(texts, n, budget)

    if sft_model is None or checkpoints[name]['stage'] not in ('dpo', 'rlhf'):
        continue
    ours = [answer['gold'] for answer in answers if 'gold' in answer]
    theirs = [answer['gold'] for answer in all_answers[sft_name] if 'gold' in answer]
    if ours:
        mean, lower, upper = win_rate(ours, theirs)
        column['win rate against SFT'] = mean
        column['win rate, 95% interval'] = [lower, upper]
    if checkpoints[name]['tokenizer'] != checkpoints[sft_name]['tokenizer']:
        continue # the ids of these answers are other texts for the SFT model
    # how likely are these answers under the SFT model? Ranks share the work
    mine = answers[run.rank::run.world_size]
    tok = Tokenizer(checkpoints[name]['tokenizer'])
    scores = score_answers(sft_model, mine, tok.pad, f'{name}: KL from SFT')
    scores = all_gather_list(scores, run)
    log_ratios = []
    for answer, (ref_logprob, entropy, is_greedy) in zip(answers, scores):
        log_ratios.append(answer['logprob'] - ref_logprob)
    column['KL from SFT, nats per answer'] = statistics.fmean(log_ratios)

# -----------------------------------------------------------------------------
# the report

def show(value):
    """The text of a table cell. None is empty, a list is an interval 'a to b'."""
    if value is None:
        return ''
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ' to '.join(show(v) for v in value)
    if abs(value) >= 1000:
        return f'{value:,.0f}'
    return f'{value:.3f}'

def markdown(head, rows):
    """A Markdown table. Padding aligns its columns, so that it can be read as plain text too."""
    cells = [head]
    for row in rows:
        cells.append([show(value) for value in row])
    widths = [max(len(cell) for cell in column) for column in zip(*cells)]
    rule = ['-' * widths[0]]
    for width in widths[1:]:
        rule.append('-' * (width - 1) + ':') # the colon aligns a column to the right
    cells.insert(1, rule)

    lines = []
    for row in cells:
        padded = [cell.rjust(width) for cell, width in zip(row, widths)]
        padded[0] = row[0].ljust(widths[0])
        lines.append('| ' + ' | '.join(padded) + ' |')
    return '\n'.join(lines)

measures = {} # all measures of all models, in the order of their first appearance
for column in table.values():
    measures.update(column)
rows = []
for measure in measures:
    values = [column.get(measure) for column in table.values()]
    rows.append([measure, *values])
parts = ['# Report', markdown(['measure', *table], rows)]

# metrics in reward.pt: how often two judges prefer the same one of two held-out answers
JUDGES = {
    'val_accuracy': 'reward model and labeller',
    'val_gold_accuracy': 'reward model and gold score',
    'ceiling': 'labeller and gold score (the ceiling)',
    'self_agreement': 'labeller and labeller, asked twice'}

# what each stage has cost, from the metrics in its checkpoint
costs = {}
for stage in ('base', 'sft', 'reward', 'dpo', 'rlhf'):
    path = os.path.join(out_dir, f'{stage}.pt')
    if os.path.exists(path):
        metrics = load_checkpoint(path, [stage], 'bash speedrun.sh')['metrics']
        if 'flops' not in metrics: # a converted model, whose training cost is unknown
            continue
        kept = ['seconds', 'flops', 'tokens', *JUDGES]
        costs[stage] = {key: metrics[key] for key in kept if metrics.get(key)}
total = sum(cost['flops'] for cost in costs.values())
rows = []
for stage, cost in costs.items():
    flops = f'{cost["flops"]:.2e}'
    share = f'{cost["flops"] / total:.1%}'
    rows.append([stage, cost['seconds'], flops, share, cost['tokens']])
if rows:
    parts.append(markdown(['cost of training', 'seconds', 'FLOPs', 'share', 'tokens'], rows))

rows = []
for key, judges in JUDGES.items():
    if key in costs.get('reward', {}):
        rows.append([judges, f'{costs["reward"][key]:.1%}'])
if rows:
    parts.append(markdown(['who prefers the same one of two answers', 'agreement'], rows))

if all_answers:
    parts.append('## Answers to the same prompts')
    for i in np.random.default_rng(seed).permutation(len(prompts))[:6]:
        question = prompts[i]['messages'][-1]['content'].replace('\n', ' ')
        lines = [f'**{question}**', ''] # a list begins after an empty line
        for name, answers in all_answers.items():
            answer = answers[i]
            verdict = ''
            if 'all_met' in answer:
                verdict = ' (all checks met)' if answer['all_met'] else ' (not all checks met)'
            text = ' '.join(answer['text'].split()) # on one line
            lines.append(f'- {name}{verdict}: {text}')
        parts.append('\n'.join(lines))

# -----------------------------------------------------------------------------
# the curves of all stages, drawn as SVG
#
# One chart. (left, top) is the upper left corner of its frame; y grows downwards, as always in SVG.
#
#      title
# high +--------------------------+
#      |              ____________| label of this line     Labels stand on the right, outside of
#      |    _________/     _______| label of that line     the frame, where no line can cross them.
#  low +---/--------------/-------+
#                          step 600
CHARTS_PER_ROW = 3
WIDTH = 230                     # of a frame, in pixels
HEIGHT = 150
CELL_WIDTH = 48 + WIDTH + 72    # numbers on the left, labels on the right
CELL_HEIGHT = 32 + HEIGHT + 24  # title above, steps below
LABEL_GAP = 13                  # least distance of two labels in pixels; letters are 11 high
COLOURS = ['#2563eb', '#dc2626', '#059669']

def spread(wanted, gap, lowest, highest):
    """
    Move positions apart until neighbours are at least gap apart, inside lowest..highest.
        spread([10, 12, 50], gap=13, lowest=0, highest=100) -> [10, 23, 50]
    """
    placed = list(wanted)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    limit = lowest
    for i in order: # from the smallest up: keep the gap to the position before
        placed[i] = max(placed[i], limit)
        limit = placed[i] + gap
    limit = highest
    for i in reversed(order): # from the largest down: push back what is above `highest`
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    return placed

def draw(charts):
    """[(title, {label: (steps, values)})] -> the text of an SVG file with one chart each."""
    svg = []
    def write(x, y, text, style):
        position = f'x="{x:.1f}" y="{y:.1f}"'
        svg.append(f'<text {position} {style}>{text}</text>')

    for i, (title, curves) in enumerate(charts):
        left = i % CHARTS_PER_ROW * CELL_WIDTH + 48
        top = i // CHARTS_PER_ROW * CELL_HEIGHT + 32
        right = left + WIDTH
        bottom = top + HEIGHT
        low = min(min(values) for steps, values in curves.values())
        high = max(max(values) for steps, values in curves.values())
        last_step = max(max(steps) for steps, values in curves.values())
        x_scale = WIDTH / max(1, last_step)      # pixels per step
        y_scale = HEIGHT / (high - low or 1)     # pixels per unit; a constant curve has no range

        svg.append(f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" '
                   'fill="none" stroke="#bbb"/>')
        write(left, top - 10, title, 'font-weight="bold"')
        write(left - 4, top + 9, f'{high:.3g}', 'text-anchor="end"')
        write(left - 4, bottom, f'{low:.3g}', 'text-anchor="end"')
        write(right, bottom + 14, f'step {last_step:,}', 'text-anchor="end"')

        ends = []
        for (label, (steps, values)), colour in zip(curves.items(), COLOURS):
            points = []
            for step, value in zip(steps, values):
                x = left + x_scale * step
                y = bottom - y_scale * (value - low)
                points.append(f'{x:.1f},{y:.1f}')
            ends.append(y)
            svg.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" '
                       'stroke-width="1.5"/>')
        # each label stands at the height of its last value, or as near as the other labels allow
        heights = spread(ends, LABEL_GAP, top, bottom)
        for label, colour, y in zip(curves, COLOURS, heights):
            write(right + 5, y + 4, label, f'fill="{colour}"') # + 4: half the height of a letter

    n_rows = math.ceil(len(charts) / CHARTS_PER_ROW)
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{CHARTS_PER_ROW * CELL_WIDTH}" '
            f'height="{n_rows * CELL_HEIGHT}" font-family="sans-serif" font-size="11">')
    background = '<rect width="100%" height="100%" fill="white"/>'
    return '\n'.join([head, background, *svg, '</svg>', ''])

def read_curve(stage, key):
    """-> (steps, values) of one number in the log of a stage. Not every line of the log has it."""
    path = os.path.join(out_dir, f'{stage}.jsonl')
    steps = []
    values = []
    if os.path.exists(path):
        for line, row in read_jsonl(path, is_log=True):
            if row.get(key) is not None:
                steps.append(row['step'])
                values.append(row[key])
    return steps, values

# title, stage, {label: key in its log}; a key val_... is measured on held-out data
CHARTS = [
    ('pretraining: loss', 'base', {'train': 'loss', 'val': 'val_loss'}),
    ('SFT: loss', 'sft', {'train': 'loss', 'val': 'val_loss'}),
    ('reward model: held-out accuracy', 'reward',
     {'as labeller': 'val_accuracy', 'as gold': 'val_gold_accuracy'}),
    ('RLHF: score', 'rlhf', {'proxy score': 'score', 'gold score': 'gold'}),
    ('RLHF: KL from SFT, nats per answer', 'rlhf', {'KL': 'kl'}),
    ('RLHF: entropy, nats per token', 'rlhf', {'entropy': 'entropy'})]

charts = []
for title, stage, keys in CHARTS:
    curves = {label: read_curve(stage, key) for label, key in keys.items()}
    curves = {label: curve for label, curve in curves.items() if curve[0]} # without empty ones
    if curves:
        charts.append((title, curves))

# -----------------------------------------------------------------------------
# write the files
if run.master:
    if charts:
        parts.insert(1, '![curves of all stages](curves.svg)')
        write_text(os.path.join(out_dir, 'curves.svg'), draw(charts))
    numbers = dict(table=table, costs=costs, config=config)
    write_text(os.path.join(out_dir, 'report.json'), json.dumps(numbers, indent=1) + '\n')
    text = '\n\n'.join(parts) + '\n'
    path = os.path.join(out_dir, 'report.md')
    write_text(path, text)
    seconds = time.time() - started
    print(f'\n{text}\nwritten to {path} in {seconds:.0f} s')
cleanup(run)
