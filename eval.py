"""
Evaluation: the base, SFT, DPO and RLHF models side by side. It measures what is often only claimed
about the stages: knowledge comes from pretraining, form comes from SFT, and RLHF can beat the
demonstrations, at the price of diversity.

Reads   out_dir/{base,sft,dpo,rlhf}.pt, those that exist; reward.pt for its cost; STAGE.jsonl;
        data_dir/val_*.bin, prompts_val.jsonl, benchmarks/*.jsonl
        config/curves.json, what to expect; out_dir/overoptimise/*/rlhf.jsonl
Writes  out_dir/report.html, report.md, report.json, curves.svg, overoptimise.svg;
        out_dir/preferences_ab.jsonl, your verdicts

CPU        $ python eval.py config/tiny.py
one GPU    $ python eval.py --data_dir=data/mine --out_dir=out/mine
8 GPUs     $ torchrun --standalone --nproc_per_node=8 eval.py config/d20.py
you judge  $ python eval.py config/tiny.py --judge_pairs=20

bits per byte  loss on the validation documents. It can be compared across tokenizers
benchmarks     fraction of questions answered correctly; in brackets: what guessing would give
answers        sampled for held-out prompts: all checks met, gold score, entropy, distinct n-grams
win rate       gold score against the SFT model's answer to the same prompt; a tie counts as a half.
               RLHF learns the labeller's taste first, so a second row leaves out liked phrases
best of n      the SFT model answers n times, the reward model picks one: what RLHF has to beat
Elo            of all models, by the gold score, by the reward model and by your blind verdicts.
               These are also ranked answers: reward.py can train on them
KL from SFT    of whole answers, in nats: the mean of log p(answer) - log p_SFT(answer)

A base model knows no chat template. It gets the words of the prompt as the start of a document.

Left out: few-shot examples; sampled benchmarks (GSM8K, HumanEval); a language model as judge.
"""
from configurator import configure # first: makes Ctrl-C one line, also while torch loads
import glob
import html
import itertools
import json
import math
import os
import platform
import re
import statistics
import sys
import time

import numpy as np
import torch
from torch.nn import functional as F

from model import (
    ScalarModel,
    Tokenizer,
    all_gather_list,
    all_sum,
    cleanup,
    generate,
    grade,
    last_token,
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
pool_prompts = 100          # of these, prompts that get many answers each, for best-of-n; 0 = skip
judge_pairs = 0             # pairs of answers that you compare, without knowing who gave them
# sampling
max_new_tokens = 64         # longest answer, in tokens
temperature = 1.0           # 1 samples from the model's own distribution, 0 is greedy
# system
batch_size = 16             # sequences in one forward pass
sample_batch = 64           # prompts answered at a time
progress_seconds = 5        # print progress this often
device = 'auto'             # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'              # auto, float32, bfloat16
seed = 1337                 # for sampling and for the bootstrap
config = configure(globals())

# -----------------------------------------------------------------------------
# device and checkpoints
for name in ('batch_size', 'sample_batch', 'max_new_tokens'):
    assert config[name] > 0, f'{name} must be positive, not {config[name]}'
for name in ('max_questions', 'val_tokens', 'n_prompts', 'pool_prompts', 'judge_pairs',
             'progress_seconds'):
    assert config[name] >= 0, f'{name} must be at least 0, not {config[name]}'
# dividing the logits by a tiny temperature would overflow
is_usable = temperature == 0 or temperature >= 0.01
assert is_usable, f'temperature must be 0 (greedy) or at least 0.01, not {temperature}'

run = setup(config)
is_alone = judge_pairs == 0 or run.world_size == 1
assert is_alone, f'--judge_pairs={judge_pairs} needs one process, not torchrun'
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

def in_batches(items, label, batch_size=batch_size):
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

def sample_answers(model, tok, is_chat, prompts, label='', step=0):
    """
    Sample an answer to each prompt of this rank -> [dict(query, ids, text, ended)]. step: a number
    of its own for each call, so that two calls draw different answers.
    """
    mine = prompts[run.rank::run.world_size]
    seed_step(seed, step, run.rank) # ranks must not draw the same answers
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

    answers = [None] * len(mine)
    order = sorted(range(len(mine)), key=lambda i: len(queries[i])) # so that little is padded
    for batch in in_batches(order, f'{label}: sampling answers', sample_batch):
        with run.autocast():
            new_ids = generate(model, [queries[i] for i in batch], new_tokens, stop, temperature)
        for i, ids in zip(batch, new_ids):
            text = tok.decode_answer(ids)
            answers[i] = dict(query=queries[i], ids=ids, text=text, ended=ids[-1] == stop)
    return answers

def answer_prompts(model, tok, is_chat, prompts, label=''):
    """Sample an answer to each prompt -> [dict(query, ids, text, ended, logprob, entropy)]."""
    answers = sample_answers(model, tok, is_chat, prompts, label)
    scores = score_answers(model, answers, tok.pad, f'{label}: scoring answers')
    for answer, (logprob, entropy, is_greedy) in zip(answers, scores):
        answer['logprob'] = logprob
        answer['entropy'] = entropy
    return all_gather_list(answers, run)

@torch.no_grad()
def reward_scores(model, tok, prompts, texts, label=''):
    """
    -> the score of each text as an answer to its prompt. model and tok: those of reward.pt. It reads
    the text that would be shown, in the chat template, so it can score models of any tokenizer.
    """
    rows = []
    for prompt, text in zip(prompts, texts):
        said = dict(role='assistant', content=text)
        ids, mask = tok.render([*prompt['messages'], said])
        rows.append(tuple(ids[-model.config.block_size:]))
    different = sorted(set(rows), key=lambda row: (len(row), row)) # answers repeat: read them once
    scores = []
    for batch in in_batches(different[run.rank::run.world_size], f'{label}: reading answers'):
        with run.autocast():
            x = pad_right([list(row) for row in batch], tok.pad, run.device)
            values = model(x)                                            # (B, T)
        scores += last_token(values, batch).tolist()
    score_of = dict(zip(different, all_gather_list(scores, run)))
    return [score_of[row] for row in rows]

def grade_all(prompts, texts):
    """
    Grade texts by the checks of their prompts -> arrays (N,): all_met; gold, the gold score; plain,
    the same without the points for liked phrases.
    """
    grades = []
    for prompt, text in zip(prompts, texts):
        checks = prompt['checks']
        plain_checks = {name: value for name, value in checks.items() if name != 'likes'}
        all_met, gold = grade(checks, text)
        grades.append((all_met, gold, grade(plain_checks, text)[1]))
    all_met, gold, plain = np.array(grades, float).T
    return dict(all_met=all_met, gold=gold, plain=plain)

# -----------------------------------------------------------------------------
# many answers to one prompt

def best_of(scores, values, n):
    """
    Best-of-n: of n answers take the one with the highest score. Returns the mean of its value, over
    all subsets of n of the N answers to each prompt. scores, values: (prompts, N) arrays.
        best_of([[1, 2, 3]], [[10, 20, 30]], 2) -> (20 + 30 + 30) / 3
    Its KL from the model that it samples from is at most ln n - (n - 1) / n (Beirami et al. 2024).
    """
    order = np.argsort(scores, axis=1) # the worst answer first
    ordered = np.take_along_axis(np.asarray(values), order, axis=1)
    N = ordered.shape[1]
    # answer i is the best of a subset if all other n - 1 are among the i answers below it
    n_subsets = [math.comb(i, n - 1) for i in range(N)]
    weights = np.array(n_subsets) / math.comb(N, n)
    return float((ordered * weights).sum(1).mean())

def pair_accuracy(scores, gold):
    """
    How often do the scores order two answers to one prompt as the gold scores do? Of all pairs
    whose gold scores differ (None if there are none); equal scores count half. scores, gold:
    (prompts, N) arrays.
        pair_accuracy([[1, 2, 3]], [[0, 1, 0]]) -> 0.5, right about the first two answers only
    """
    scores = np.asarray(scores)
    gold = np.asarray(gold)
    first, second = np.triu_indices(gold.shape[1], 1)
    gaps = gold[:, first] - gold[:, second]                              # (prompts, pairs)
    margins = scores[:, first] - scores[:, second]
    points = 0.5 + 0.5 * np.sign(gaps) * np.sign(margins)
    is_known = np.abs(gaps) > 1e-6
    return float(points[is_known].mean()) if is_known.any() else None

def duplicates(texts):
    """Share of answers that repeat one before them. texts: for each prompt its N answers."""
    n_different = sum(len(set(answers)) for answers in texts)
    return 1 - n_different / sum(len(answers) for answers in texts)

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

def wilson(p, n):
    """95% interval of a share p of n trials (Wilson 1927): good for few trials and near 0 and 1."""
    z2 = 1.96 ** 2
    centre = p + z2 / (2 * n)
    radius = math.sqrt(z2 * p * (1 - p) / n + z2 * z2 / (4 * n * n))
    return [(centre - radius) / (1 + z2 / n), (centre + radius) / (1 + z2 / n)]

def get_rounds(scores):
    """
    Everybody meets everybody: scores (M, R) of M models in R rounds -> rounds (R, M, M), [r, i, j]:
    the points of model i against j; win 1, tie 1/2, loss 0. Also 0 for a pair that has not met.
    """
    M = len(scores)
    differences = scores[:, None, :] - scores[None, :, :]                # (M, M, R)
    points = 0.5 + 0.5 * np.sign(differences)
    points[range(M), range(M)] = 0 # nobody meets himself
    return points.transpose(2, 0, 1)

def elo(rounds):
    """
    The strengths of the Bradley-Terry model as Elo points, 1000 on average. Who has 400 more than
    another wins 10 times as often as he loses. rounds: (R, M, M), see get_rounds. -> ratings (M,),
    [lower (M,), upper (M,)], their 95% intervals: how they vary if the rounds are drawn again.
    """
    R, M, _ = rounds.shape
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(R, [1 / R] * R, 200) # how often each round is drawn
    weights = np.concatenate([np.ones((1, R)), drawn])                   # (201, R)
    points = np.tensordot(weights, rounds, 1)                            # (201, M, M)
    points += 0.5 - 0.5 * np.eye(M) # one more tie: who has never won is not at minus infinity
    games = points + points.transpose(0, 2, 1)
    strength = np.ones((len(weights), M))
    for _ in range(1000): # minorization-maximization (Hunter 2004)
        shares = games / (strength[:, :, None] + strength[:, None, :])
        strength = points.sum(2) / shares.sum(2)
        strength = strength / strength.mean(1, keepdims=True)
    ratings = 400 * np.log10(strength)
    ratings = ratings - ratings.mean(1, keepdims=True) + 1000
    return ratings[0], np.quantile(ratings[1:], [0.025, 0.975], axis=0)

# how answers in English say that they do not answer
REFUSALS = re.compile("^sorry|^i am sorry|^i'm sorry|not know|don't know|cannot|can't|unable to"
                      "|not able to|is private", re.IGNORECASE)

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
# the reward model, if there is one: it reads the answers of all models
reward_model = None
path = os.path.join(out_dir, 'reward.pt')
if prompts and os.path.exists(path):
    ckpt = load_checkpoint(path, ['reward'], f'python reward.py --out_dir={out_dir}')
    reward_tok = Tokenizer(ckpt['tokenizer'])
    reward_model = load_model(ckpt, run.device, ScalarModel).eval()

# many answers to each of the first prompts with checks
N_BEST = (2, 4, 8, 16)
POOL_SIZE = 16      # of the SFT model, for best-of-n
SMALL_POOL_SIZE = 4 # of the other models
checked = [i for i, prompt in enumerate(prompts) if prompt.get('checks')]
pool_indices = checked[:pool_prompts] # in prompts

def measure_pool(model, tok, size, label):
    """
    Sample `size` answers to each prompt of pool_indices, and grade them. Returns texts, a list for
    each prompt, and arrays (prompts, size): all_met, gold, plain, and score if there is a reward.pt.
    """
    asked = []
    for i in pool_indices:
        asked += [prompts[i]] * size
    answers = all_gather_list(sample_answers(model, tok, True, asked, label, step=1), run)
    texts = [answer['text'] for answer in answers]
    pool = grade_all(asked, texts)
    if reward_model is not None:
        pool['score'] = np.array(reward_scores(reward_model, reward_tok, asked, texts, label))
    pool = {name: values.reshape(-1, size) for name, values in pool.items()}
    pool['texts'] = [texts[first:first + size] for first in range(0, len(texts), size)]
    return pool

# -----------------------------------------------------------------------------
# measure each model
table = {}       # the report: model -> {measure: value}
all_answers = {} # model -> its answers, in the order of the prompts
grades = {}      # model -> what grade_all says of its answers to the prompts with checks
judged = {}      # model -> scores of its answers by the reward model
pools = {}       # chat model -> what measure_pool returns
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
        texts = [answer['text'] for answer in answers]
        by_task = {} # prompts of Toytown name their task: fact, story, unknown, private, ...
        if checked:
            found = grade_all([prompts[i] for i in checked], [texts[i] for i in checked])
            grades[name] = found
            column['all checks met'] = found['all_met'].mean()
            column['all checks met, 95% interval'] = wilson(found['all_met'].mean(), len(checked))
            column['gold score'] = found['gold'].mean()
            for i, all_met in zip(checked, found['all_met']):
                answers[i]['all_met'] = all_met
                if 'task' in prompts[i]:
                    by_task.setdefault(prompts[i]['task'], []).append(all_met)
        if reward_model is not None:
            judged[name] = reward_scores(reward_model, reward_tok, prompts, texts, name)
            column['reward model: score'] = statistics.fmean(judged[name])
        for task in sorted(by_task):
            column[f'checks met: {task} ({len(by_task[task])})'] = statistics.fmean(by_task[task])
        n_tokens = sum(len(answer['ids']) for answer in answers)
        entropy = sum(answer['entropy'] for answer in answers)
        column['entropy, nats per token'] = entropy / n_tokens
        column['answers that end'] = statistics.fmean(answer['ended'] for answer in answers)
        column['tokens per answer'] = n_tokens / len(answers)
        column['answers that refuse'] = statistics.fmean(
            REFUSALS.search(text) is not None for text in texts)
        if is_chat and pool_indices:
            is_first_sft = ckpt['stage'] == 'sft' and sft_model is None
            size = POOL_SIZE if is_first_sft else SMALL_POOL_SIZE
            pools[name] = measure_pool(model, tok, size, f'{name}: {size} answers a prompt')

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
    # RLHF learns the labeller's taste first. So the second row is without the liked phrases.
    for kind, row in (('gold', 'win rate'), ('plain', 'win rate without liked phrases')):
        if checked:
            differences = grades[name][kind] - grades[sft_name][kind]
            points = 0.5 + 0.5 * np.sign(differences) # a tie is half a win
            column[f'{row} against SFT'] = points.mean()
            column[f'{row}, 95% interval'] = wilson(points.mean(), len(points))
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

# What a model learns from a reward model depends on whether this is right about the model's own
# answers. After training it may be wrong: those that are left differ in what it cannot see.
for name, pool in pools.items():
    column = table[name]
    few = [texts[:SMALL_POOL_SIZE] for texts in pool['texts']] # more answers repeat more
    column[f'duplicates among {SMALL_POOL_SIZE} answers to a prompt'] = duplicates(few)
    if 'score' in pool:
        share = pair_accuracy(pool['score'], pool['gold'])
        column["reward model orders pairs of X's answers as gold does"] = share

# Best-of-n is what RLHF must beat: the SFT model answers n times, the reward model picks one. `score`,
# `gold`, ... are means over its answers, or over those of a trained model to the same prompts.
BEST_COLUMNS = {
    'score': 'reward model', 'gold': 'gold score', 'all_met': 'all checks met',
    'preferred': 'preferred to SFT', 'plain_preferred': 'without liked phrases'}
best_rows = []
sft_pool = pools.get(sft_name, {}) if sft_model is not None else {}
if 'score' in sft_pool:
    samples = []
    for name, pool in pools.items():
        kl = table[name].get('KL from SFT, nats per answer')
        samples.append((name, 0.0 if name == sft_name else kl, pool, 1))
    for n in N_BEST:
        samples.append((f'best of {n}', math.log(n) - (n - 1) / n, sft_pool, n))
    for label, kl, pool, n in samples:
        # Each answer meets all 16 of the SFT model. One of these is itself, if it is from there.
        for kind, name in (('gold', 'preferred'), ('plain', 'plain_preferred')):
            differences = pool[kind][:, :, None] - sft_pool[kind][:, None, :] # (prompts, N, 16)
            pool[name] = (0.5 + 0.5 * np.sign(differences)).mean(2)
        values = [best_of(pool['score'], pool[kind], n) for kind in BEST_COLUMNS]
        best_rows.append([label, kl, *values])
BEST_HEAD = ['answers', 'KL, nats', *BEST_COLUMNS.values()]

# -----------------------------------------------------------------------------
# tables
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

# -----------------------------------------------------------------------------
# who is preferred to whom: by the gold score, by the reward model, by a person
ab_path = os.path.join(out_dir, 'preferences_ab.jsonl')

def ask_person(n_asked):
    """
    Compare pairs of answers in the terminal. Each verdict is appended to ab_path at once, with the
    models' names, and with the ranking that reward.py learns from. n_asked: how many are there.
    """
    rng = np.random.default_rng((seed, n_asked)) # other pairs than the last time
    print('Which answer is better? a, b, = (equally good), s (skip), q (stop)')
    for number in range(judge_pairs):
        i = int(rng.integers(len(prompts)))
        pair = rng.permutation(list(all_answers))[:2].tolist() # blind, so in random order
        texts = [all_answers[name][i]['text'] for name in pair]
        print(f'\n{number + 1} of {judge_pairs}:', prompts[i]['messages'][-1]['content'])
        print(f'  a) {texts[0]}\n  b) {texts[1]}')
        reply = '=' if texts[0] == texts[1] else '' # nobody needs to be asked
        while reply not in ('a', 'b', '=', 's', 'q'):
            try:
                reply = input('> ').strip().lower()
            except EOFError: # Ctrl-D, or the end of a file
                reply = 'q'
        if reply == 'q':
            break
        if reply == 's':
            continue
        winner = dict(a=0, b=1).get(reply) # None is a tie
        ranking = [[0, 1]] if winner is None else [winner, 1 - winner]
        row = dict(messages=prompts[i]['messages'], models=pair, completions=texts,
                   winner=winner, ranking=ranking, judge='human')
        line = json.dumps(row, ensure_ascii=False) + '\n'
        with open(ab_path, 'ab', buffering=0) as f: # one write: two programs never mix their lines
            f.write(line.encode('utf-8', 'replace'))

def read_verdicts():
    """The verdicts of people on the models of this report, as rounds (R, M, M), see get_rounds."""
    names = list(all_answers)
    rounds = []
    rows = read_jsonl(ab_path, is_log=True) if os.path.exists(ab_path) else []
    for line, row in rows:
        if set(row.get('models', [])) <= set(names): # others may have been judged, too
            first, second = [names.index(name) for name in row['models']]
            points = {0: 1.0, 1: 0.0}.get(row['winner'], 0.5)
            played = np.zeros((len(names), len(names)))
            played[first, second] = points
            played[second, first] = 1 - points
            rounds.append(played)
    return np.array(rounds)

judges = {} # name -> rounds (R, M, M)
if len(all_answers) > 1:
    if judge_pairs > 0:
        ask_person(len(read_verdicts()))
    # programs score each answer by itself, so the order of the two cannot sway them
    if checked:
        judges['gold score'] = get_rounds(np.array([grades[name]['gold'] for name in all_answers]))
    if judged:
        judges['reward model'] = get_rounds(np.array([judged[name] for name in all_answers]))
    if len(read_verdicts()) > 0:
        judges['people'] = read_verdicts()

def describe_share(points, games):
    """-> the cell of a table: the share of points, with its Wilson interval."""
    if games == 0:
        return None
    return f'{points / games:.0%} ({show(wilson(points / games, games))})'

preferences = {} # judge -> rows of a table
for judge, rounds in judges.items():
    ratings, limits = elo(rounds)
    points = rounds.sum(0)                                               # (M, M)
    games = points + points.T
    rows = []
    for i, name in enumerate(all_answers):
        shares = [describe_share(points[i, j], games[i, j]) for j in range(len(points))]
        rows.append([name, f'{ratings[i]:.0f}', f'{limits[0, i]:.0f} to {limits[1, i]:.0f}', *shares])
    preferences[judge] = rows

# -----------------------------------------------------------------------------
# the report: sections, each a dict(title, source, head, rows)
measures = {} # all measures of all models, in the order of their first appearance
for column in table.values():
    measures.update(column)
rows = []
for measure in measures:
    rows.append([measure, *[column.get(measure) for column in table.values()]])
sections = [dict(
    title='Results', head=['measure', *table], rows=rows,
    source=f'checkpoints in {out_dir}; in {data_dir}: val_*.bin for bits per byte, benchmarks/*.jsonl '
           'under their names, prompts_val.jsonl for all else; reward.pt where the reward model judges')]
if best_rows:
    sections.append(dict(
        title='Best of n: what RLHF has to beat', head=BEST_HEAD, rows=best_rows,
        source=f'{POOL_SIZE} answers of {sft_name} to {len(pool_indices)} prompts of '
               'prompts_val.jsonl, reward.pt; the KL of best-of-n is a bound, ln n - (n-1)/n'))
for judge, rows in preferences.items():
    head = ['model', 'Elo', '95% interval', *[f'preferred to {name}' for name in all_answers]]
    source = 'preferences_ab.jsonl' if judge == 'people' else 'answers to prompts_val.jsonl'
    sections.append(dict(title=f'Preference, by {judge}', source=source, head=head, rows=rows))

# metrics in reward.pt: how often two judges prefer the same one of two held-out answers
JUDGES = {
    'val_accuracy': 'reward model and labeller',
    'val_gold_accuracy': 'reward model and gold score',
    'ceiling': 'labeller and gold score (the ceiling)',
    'self_agreement': 'labeller and labeller, asked twice'}

# what each stage has cost and how it was set, from its checkpoint
costs = {}
settings = {} # stage -> settings
for stage in ('base', 'sft', 'reward', 'dpo', 'rlhf'):
    path = os.path.join(out_dir, f'{stage}.pt')
    if os.path.exists(path):
        ckpt = load_checkpoint(path, [stage], 'bash speedrun.sh')
        metrics = ckpt['metrics']
        if 'flops' not in metrics: # a converted model, whose training cost is unknown
            continue
        kept = ['seconds', 'flops', 'tokens', *JUDGES]
        costs[stage] = {key: metrics[key] for key in kept if metrics.get(key)}
        settings[stage] = ckpt['config']
total = sum(cost['flops'] for cost in costs.values())
rows = []
for stage, cost in costs.items():
    flops = f'{cost["flops"]:.2e}'
    share = f'{cost["flops"] / total:.1%}'
    rows.append([stage, cost['seconds'], flops, share, cost['tokens']])
if rows:
    head = ['cost of training', 'seconds', 'FLOPs', 'share', 'tokens']
    sections.append(dict(title='Cost', source=f'STAGE.pt in {out_dir}', head=head, rows=rows))

rows = []
for key, who in JUDGES.items():
    if key in costs.get('reward', {}):
        rows.append([who, f'{costs["reward"][key]:.1%}'])
if rows:
    head = ['who prefers the same one of two answers', 'agreement']
    sections.append(dict(title='The reward model', source='reward.pt', head=head, rows=rows))

settings['eval'] = config
processor = platform.processor() or platform.machine()
if run.device_type == 'cuda':
    processor = torch.cuda.get_device_name()
hardware = (f'{run.world_size} x {run.device} ({processor}), {os.cpu_count()} cores, '
            f'{platform.platform()}, Python {platform.python_version()}, PyTorch {torch.__version__}')

# the same few prompts for all models
samples = []
if all_answers:
    for i in np.random.default_rng(seed).permutation(len(prompts))[:6]:
        row = [prompts[i]['messages'][-1]['content']]
        for answers in all_answers.values():
            verdict = ''
            if 'all_met' in answers[i]:
                verdict = 'all checks met: ' if answers[i]['all_met'] else 'not all checks met: '
            row.append(verdict + answers[i]['text'])
        samples.append([' '.join(text.split()) for text in row]) # each on one line

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
CELL_WIDTH = 48 + WIDTH + 92    # numbers on the left, labels on the right
CELL_HEIGHT = 32 + HEIGHT + 24  # title above, steps below
LABEL_GAP = 13                  # least distance of two labels in pixels; letters are 11 high
COLOURS = ['#2563eb', '#dc2626', '#059669', '#b45309', '#9333ea', '#0e7490']
DOTS = 'best of n'              # a curve of this name is drawn as dots,
EXPECTED = 'expected'           # and one of this name dashed

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

def get_ticks(low, high):
    """The numbers 1, 2, 5 times a power of 10 between two positive ones, for a logarithmic axis."""
    ticks = []
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high))):
        ticks += [digit * 10 ** power for digit in (1, 2, 5)]
    return [tick for tick in ticks if low < tick < high]

def draw(charts):
    """
    -> the text of an SVG file. A chart is a dict: title; curves, {label: (xs, ys)}; x, the name of
    the x axis ('step' if it is missing); is_log, True for a logarithmic y axis.
    """
    svg = []
    def write(x, y, text, style):
        position = f'x="{x:.1f}" y="{y:.1f}"'
        svg.append(f'<text {position} {style}>{html.escape(text)}</text>')

    for i, chart in enumerate(charts):
        left = i % CHARTS_PER_ROW * CELL_WIDTH + 48
        top = i // CHARTS_PER_ROW * CELL_HEIGHT + 32
        right = left + WIDTH
        bottom = top + HEIGHT
        curves = chart['curves']
        low = min(min(ys) for xs, ys in curves.values())
        high = max(max(ys) for xs, ys in curves.values())
        last_x = max(max(xs) for xs, ys in curves.values())
        is_log = chart.get('is_log', False) and low > 0
        scale = math.log if is_log else float
        x_scale = WIDTH / (last_x or 1)                     # pixels per unit of x
        y_scale = HEIGHT / (scale(high) - scale(low) or 1)  # a constant curve has no range
        def height_of(y):
            return bottom - y_scale * (scale(y) - scale(low))

        svg.append(f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" '
                   'fill="none" stroke="#bbb"/>')
        write(left, top - 10, chart['title'], 'font-weight="bold"')
        write(left - 4, top + 9, f'{high:.3g}', 'text-anchor="end"')
        write(left - 4, bottom, f'{low:.3g}', 'text-anchor="end"')
        write(right, bottom + 14, f'{chart.get("x", "step")} {round(last_x, 2):,}',
              'text-anchor="end"')
        ticks = get_ticks(low, high) if is_log else []
        for tick in ticks:
            y = height_of(tick)
            if top + 9 + LABEL_GAP <= y + 4 <= bottom - LABEL_GAP: # beside no other number
                write(left - 4, y + 4, f'{tick:.3g}', 'text-anchor="end"')
                svg.append(f'<path d="M{left} {y:.1f}h{WIDTH}" stroke="#eee"/>')

        ends = []
        for (label, (xs, ys)), colour in zip(curves.items(), itertools.cycle(COLOURS)):
            points = [(left + x_scale * x, height_of(y)) for x, y in zip(xs, ys)]
            ends.append(points[-1][1])
            if label == DOTS:
                for x, y in points:
                    svg.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
                continue
            line = ' '.join(f'{x:.1f},{y:.1f}' for x, y in points)
            style = f'stroke="{colour}" stroke-width="1.5"'
            if label == EXPECTED:
                style = 'stroke="#777" stroke-dasharray="2 3"'
            svg.append(f'<polyline points="{line}" fill="none" {style}/>')
        # each label stands at the height of its last value, or as near as the other labels allow
        heights = spread(ends, LABEL_GAP, top, bottom)
        for label, colour, y in zip(curves, itertools.cycle(COLOURS), heights):
            colour = '#777' if label == EXPECTED else colour
            write(right + 5, y + 4, label, f'fill="{colour}"') # + 4: half the height of a letter

    width = min(len(charts), CHARTS_PER_ROW) * CELL_WIDTH
    height = math.ceil(len(charts) / CHARTS_PER_ROW) * CELL_HEIGHT
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">')
    background = '<rect width="100%" height="100%" fill="white"/>'
    return '\n'.join([head, background, *svg, '</svg>', ''])

def read_curve(stage, key, x='step'):
    """-> (xs, ys) of two numbers in the log of a stage. Not every line of the log has both."""
    path = os.path.join(out_dir, f'{stage}.jsonl')
    xs = []
    ys = []
    if os.path.exists(path):
        for line, row in read_jsonl(path, is_log=True):
            if row.get(key) is not None and row.get(x) is not None:
                xs.append(row[x])
                ys.append(row[key])
    return xs, ys

# stage, title, {label: key in its log}; a key val_... is measured on held-out data
CHARTS = [
    dict(stage='base', title='pretraining: loss', is_log=True,
         keys={'training': 'loss', 'held-out': 'val_loss'}),
    dict(stage='sft', title='SFT: loss', is_log=True,
         keys={'training': 'loss', 'held-out': 'val_loss'}),
    dict(stage='reward', title='reward model: held-out accuracy',
         keys={'as gold': 'val_gold_accuracy', 'as labeller': 'val_accuracy'}),
    dict(stage='dpo', title='DPO: held-out accuracy',
         keys={'as gold': 'val_gold_accuracy', 'as labeller': 'val_accuracy'}),
    dict(stage='rlhf', title='RLHF: score, in training',
         keys={'gold score': 'gold', 'reward model': 'score'}),
    dict(stage='rlhf', title='RLHF: score, held-out',
         keys={'gold score': 'val_gold', 'reward model': 'val_score'}),
    dict(stage='rlhf', title='RLHF: KL from SFT, nats per answer', keys={'KL': 'kl'}),
    dict(stage='rlhf', title='RLHF: entropy, nats per token', keys={'entropy': 'entropy'})]

# what to expect: the curves of the shipped profile, as a run of it has made them
expected = {} # stage -> rows of its log
for word in sys.argv[1:]:
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'config', 'curves.json')
    if word.endswith('.py') and os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            expected = json.load(f).get(os.path.basename(word), expected)

charts = []
expected_rows = []
for chart in CHARTS:
    log = f'{chart["stage"]}.jsonl'
    curves = {label: read_curve(chart['stage'], key) for label, key in chart['keys'].items()}
    curves = {label: curve for label, curve in curves.items() if curve[0]} # without empty ones
    if not curves:
        continue
    label, key = list(chart['keys'].items())[-1] # the curve that has an expectation
    rows = [row for row in expected.get(chart['stage'], []) if key in row]
    if rows and label in curves:
        measure = f'{chart["title"]}, {label}'
        expected_rows.append([measure, rows[-1][key], curves[label][1][-1], f'{log}: {key}'])
        curves[EXPECTED] = ([row['step'] for row in rows], [row[key] for row in rows])
    charts.append(dict(chart, curves=curves, source=f'{log}: {", ".join(chart["keys"].values())}'))
if expected_rows:
    sections.insert(1, dict(
        title='What to expect', source='config/curves.json, and the logs',
        head=['at the end of', 'expected', 'this run', 'source'], rows=expected_rows))

# Over-optimisation (Gao et al. 2022): the farther a policy moves from the SFT model, the better the
# reward model likes it, but the gold score falls again. A line for each run of rlhf.py in
# out_dir/overoptimise/KL_COEF. The distance is the square root of the KL.
OVEROPTIMISATION = [
    ('val_score', 'reward model', 'score of the reward model (proxy)'),
    ('val_gold', 'gold score', 'gold score (never trained on)'),
    ('val_met', 'all checks met', 'answers with all checks met')]

def get_root(kl):
    return math.sqrt(max(0, kl)) # an estimate can be negative

def over_optimisation(runs):
    """runs: names of logs in out_dir, without .jsonl -> charts of held-out scores, with best-of-n."""
    found = []
    for key, column, title in OVEROPTIMISATION:
        curves = {}
        for log in runs:
            kls, ys = read_curve(log, key, 'val_kl')
            if kls:
                coefficient = os.path.basename(os.path.dirname(log))
                curves[f'KL coef. {coefficient}'] = ([get_root(kl) for kl in kls], ys)
        bests = best_rows[len(pools):] # the rows of best-of-n
        if curves and bests:
            place = BEST_HEAD.index(column)
            curves[DOTS] = ([get_root(row[1]) for row in bests], [row[place] for row in bests])
        if curves:
            source = f'overoptimise/*/rlhf.jsonl: val_kl, {key}'
            found.append(dict(title=title, x='√KL', curves=curves, source=source))
    return found

runs = []
paths = glob.glob(os.path.join(glob.escape(out_dir), 'overoptimise', '*', 'rlhf.jsonl'))
for path in sorted(paths, key=os.path.dirname):
    runs.append(os.path.relpath(path, out_dir).removesuffix('.jsonl'))
over_optimised = over_optimisation(runs)

# -----------------------------------------------------------------------------
# report.html: one page that needs no other file. A model may say anything, so all texts are escaped.
STYLE = '''
:root { color-scheme: light dark }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1140px; margin: auto; padding: 0 1em 3em }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2em .6em; border-bottom: 1px solid #8886; text-align: right; vertical-align: top }
th:first-child, td:first-child, .samples th, .samples td { text-align: left }
.samples td { min-width: 9em; overflow-wrap: anywhere }
.source { color: #888; font-size: 13px; margin: .3em 0 }
.charts { display: flex; flex-wrap: wrap; gap: 1em }
figure { margin: 0; max-width: 100% }
svg { max-width: 100%; height: auto }
@media (prefers-color-scheme: dark) { svg { filter: invert(.93) hue-rotate(180deg) } }
'''

def html_section(section, kind=''):
    """A section as HTML: title, table, source. kind: a class of STYLE for the table."""
    lines = [f'<h2>{html.escape(section["title"])}</h2>', f'<div class="wide"><table class="{kind}">']
    for tag, rows in (('th', [section['head']]), ('td', section['rows'])):
        for row in rows:
            cells = [f'<{tag}>{html.escape(show(value))}</{tag}>' for value in row]
            lines.append(f'<tr>{"".join(cells)}</tr>')
    lines.append(f'</table></div><p class="source">Source: {html.escape(section["source"])}</p>')
    return '\n'.join(lines)

def html_page(drawn):
    """The whole report as a page. drawn: charts, with their sources."""
    head = ('<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Report</title><meta '
            f'name="viewport" content="width=device-width"><style>{STYLE}</style>')
    lines = [head, f'<h1>Report on {html.escape(out_dir)}</h1>']
    lines += [html_section(section) for section in sections[:2]]
    lines.append('<h2>Curves</h2><div class="charts">')
    for chart in drawn:
        caption = f'<figcaption class="source">{html.escape(chart["source"])}</figcaption>'
        lines.append(f'<figure>{draw([chart])}{caption}</figure>')
    lines.append('</div>')
    lines += [html_section(section) for section in sections[2:]]
    if samples:
        answers = dict(title='Answers to the same prompts', source='prompts_val.jsonl',
                       head=['prompt', *all_answers], rows=samples)
        lines.append(html_section(answers, 'samples'))
    lines.append(f'<h2>Settings, hardware, seed</h2><p>Evaluated with seed {seed} on '
                 f'{html.escape(hardware)}. The settings of each stage, from its checkpoint:</p>'
                 f'<pre>{html.escape(json.dumps(settings, indent=1))}</pre>')
    return '\n'.join(lines) + '\n</html>\n'

# -----------------------------------------------------------------------------
# write the files
if run.master:
    parts = ['# Report']
    for name, drawn in (('curves.svg', charts), ('overoptimise.svg', over_optimised)):
        if drawn:
            parts.append(f'![{name}]({name})')
            write_text(os.path.join(out_dir, name), draw(drawn))
    for section in sections:
        parts.append(f'## {section["title"]}')
        parts.append(markdown(section['head'], section['rows']))
        parts.append(f'Source: {section["source"]}')
    for question, *texts in samples:
        lines = [f'**{question}**', ''] # a list begins after an empty line
        for name, text in zip(all_answers, texts):
            lines.append(f'- {name}: {text}')
        parts.append(html.escape('\n'.join(lines), quote=False)) # Markdown may hold HTML
    best_of_n = [dict(zip(BEST_HEAD, row)) for row in best_rows]
    numbers = dict(table=table, best_of_n=best_of_n, preferences=preferences, costs=costs,
                   config=config)
    write_text(os.path.join(out_dir, 'report.json'), json.dumps(numbers, indent=1) + '\n')
    write_text(os.path.join(out_dir, 'report.html'), html_page(charts + over_optimised))
    text = '\n\n'.join(parts) + '\n'
    path = os.path.join(out_dir, 'report.md')
    write_text(path, text)
    seconds = time.time() - started
    print(f'\n{text}\nwritten to {path} and report.html in {seconds:.0f} s')
cleanup(run)
