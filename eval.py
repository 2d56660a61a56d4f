"""
Evaluation: the base, SFT, DPO and RLHF models side by side. It measures what is often only claimed
about the stages: knowledge comes from pretraining, form comes from SFT, and RLHF can beat the
demonstrations, at the price of diversity.

Reads   out_dir/{base,mid,sft,dpo,rlhf}.pt, those that exist; reward.pt, the judge; STAGE.jsonl;
        out_dir/overoptimise/*/rlhf.jsonl
        data_dir/val_*.bin, prompts_val.jsonl, benchmarks/*.jsonl, mmlu/{dev,test}/*.csv
        config/benchmarks.json, how to ask; config/curves.json, what to expect
Writes  out_dir/report.html, report.md, report.json, curves.svg, overoptimise.svg;
        out_dir/answers/MODEL/BENCHMARK.jsonl, every answer; preferences_ab.jsonl, your verdicts

CPU        $ python eval.py config/tiny.py
one GPU    $ python eval.py --data_dir=data/mine --out_dir=out/mine
8 GPUs     $ torchrun --standalone --nproc_per_node=8 eval.py config/d20.py
you judge  $ python eval.py config/tiny.py --judge_pairs=20

bits per byte  loss on the validation documents. It can be compared across tokenizers
benchmarks     fraction of questions answered correctly, beside that of guessing, and of the best
               answer that is always the same. Chat models are asked twice: in bare text as base
               models are, and in a conversation
answers        sampled for held-out prompts: all checks met, gold score, entropy, distinct n-grams
win rate       gold score against the SFT model's answer to the same prompt; a tie counts as a half.
               RLHF learns the labeller's taste first, so a second row leaves out liked phrases
best of n      the SFT model answers n times, the reward model picks one: what RLHF has to beat
Elo            of all models, by the gold score, by the reward model and by your blind verdicts.
               These are also ranked answers: reward.py can train on them
KL from SFT    of whole answers, in nats: the mean of log p(answer) - log p_SFT(answer)

A base model knows no chat template. It gets the words of the prompt as the start of a document.

Left out: a language model as judge; examples (shots) in conversations.
"""
from configurator import configure # first, so that Ctrl-C gives no traceback while torch loads
import collections
import contextlib
import csv
import glob
import html
import inspect
import itertools
import json
import math
import os
import pathlib
import platform
import random
import re
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from torch.nn import functional as F

from model import (
    KVCache,
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
    write_jsonl,
    write_text,
)

# -----------------------------------------------------------------------------
# settings
# what is measured
data_dir = 'data/toytown'   # folder with val_*.bin, prompts_val.jsonl and benchmarks/
out_dir = 'out/toytown'     # folder with the checkpoints; the report is written here
models = 'base,mid,sft,dpo,rlhf' # columns of the report: stages in out_dir, or paths of .pt files
benchmarks = ''             # names, separated by commas; empty = all whose file is in data_dir
limit = 500                 # questions per benchmark, a seeded choice; 0 = all
n_robust = 50               # questions that are asked again with typos, case, spacing; 0 = skip
n_samples = 1               # answers to a question of GSM8K, HumanEval; 1 = the most likely one
max_exam_tokens = 256       # longest answer to such a question, in tokens
allow_code = False          # run the programs of HumanEval: code that a model has written
val_tokens = 10_000_000     # at most so many validation tokens for bits per byte; 0 = skip
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
for name in ('batch_size', 'sample_batch', 'max_new_tokens', 'n_samples', 'max_exam_tokens'):
    assert config[name] > 0, f'{name} must be positive, not {config[name]}'
for name in ('limit', 'n_robust', 'val_tokens', 'n_prompts', 'pool_prompts', 'judge_pairs',
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
checkpoint_paths = {}
for name in re.split(' *, *', models.strip()):
    is_path = name.endswith('.pt')
    path = name if is_path else os.path.join(out_dir, f'{name}.pt')
    # A stage that has not been run yet is left out. A path that somebody typed must exist.
    if is_path or os.path.exists(path):
        checkpoint_paths[name] = path
        stages = ['base', 'mid', 'sft', 'dpo', 'rlhf']
        checkpoints[name] = load_checkpoint(path, stages, 'bash speedrun.sh')
    else:
        print0(f'{path} does not exist: left out of the report')
assert checkpoints, \
    f'none of {models} is in {out_dir}: start with `python pretrain.py --out_dir={out_dir}`'

# -----------------------------------------------------------------------------
# how well a model predicts given text

def find(folder, *pattern):
    """-> the sorted paths of the files in a folder that match."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), *pattern)))

def read_log(path):
    """-> the rows of a .jsonl file that grows; its last line may be cut. Empty if it is missing."""
    if not os.path.exists(path):
        return []
    return [row for line, row in read_jsonl(path, is_log=True)]

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

def document_sources(tokens, tok, is_cut):
    """Validation tokens -> (names of sources, the index of each token's source). The shards were
    written from val/*.jsonl.gz, document by document. Shards from elsewhere have no sources."""
    sources = []
    for path in find(data_dir, 'val', '*.jsonl.gz'):
        sources += [row.get('source', '') for _, row in read_jsonl(path)]
    numbers = np.cumsum(tokens == tok.eot) - 1 # <|endoftext|> stands before each document
    n_documents = numbers[-1] + 1
    is_whole = n_documents == len(sources) or (is_cut and n_documents <= len(sources))
    if not is_whole or tokens[0] != tok.eot:
        return [''], np.zeros(len(tokens), np.int64)
    names = sorted(set(sources))
    index = np.array([names.index(source) for source in sources])
    return names, index[numbers]

@torch.no_grad()
def language_modelling(model, tok, label=''):
    """
    Predict the first val_tokens of the validation shards. -> {'perplexity': .., 'bits per byte':
    .., 'bits per byte: SOURCE': ..}; None without shards.

    A loss per token, and so the perplexity, cannot be compared across tokenizers: longer tokens are
    harder to predict, but there are fewer of them. The number of bytes is the same for all.
    """
    nothing = {'perplexity': None, 'bits per byte': None}
    if val_tokens == 0:
        return nothing
    T = model.config.block_size
    tokens = np.zeros(0, np.int64)
    for path in find(data_dir, 'val_*.bin'):
        missing = val_tokens + 1 - len(tokens) # + 1: the first token is never predicted
        shard = read_shard(path, tok.hash)[:missing]
        tokens = np.concatenate([tokens, shard.astype(np.int64)])
    n_windows = (len(tokens) - 1) // T # tokens at the end that do not fill a window are not used
    if n_windows < 1:
        return nothing

    names, source_of = document_sources(tokens, tok, len(tokens) > val_tokens)
    end = n_windows * T
    source_of = source_of[1:end + 1].reshape(n_windows, T) # of the tokens that are predicted
    tokens = torch.from_numpy(tokens)
    x = tokens[:end].view(n_windows, T)
    y = tokens[1:end + 1].view(n_windows, T) # the same tokens, one later
    # a special token costs bits, but it has no bytes: its size here is 0
    token_sizes = torch.tensor([len(tok.token_bytes(i)) for i in range(tok.n_vocab)])

    sums = np.zeros((3, len(names))) # nats, tokens and bytes of each source
    mine = list(range(run.rank, n_windows, run.world_size))
    for rows in in_batches(mine, f'{label}: bits per byte'):
        inputs = x[rows].to(run.device)
        targets = y[rows].to(run.device)
        with run.autocast():
            logits = model(inputs)                                       # (B, T, V)
        logits = logits.float().flatten(0, 1)                            # (B*T, V)
        losses = F.cross_entropy(logits, targets.flatten(), reduction='none').cpu().double()
        sizes = token_sizes[y[rows]].flatten()
        for row, weights in enumerate((losses, torch.ones_like(losses), sizes)):
            sums[row] += np.bincount(source_of[rows].flatten(), weights.numpy(), len(names))
    sums = np.array(all_sum(*sums.flatten().tolist())).reshape(sums.shape)
    nats, n_tokens, n_bytes = sums.sum(1)
    result = {'perplexity': math.exp(nats / n_tokens),
              'bits per byte': nats / math.log(2) / n_bytes}
    if len(names) > 1:
        for name, (nats, _, n_bytes) in zip(names, sums.T):
            if n_bytes > 0:
                result[f'bits per byte: {name}'] = nats / math.log(2) / n_bytes
    return result

@torch.no_grad()
def score_groups(model, groups, pad, temperature=1.0):
    """
    Score continuations of one or more prefixes: groups is [(prefix ids, [continuation ids])].
    -> for each group [(logprob, entropy, is_greedy)], one for each continuation.

    logprob: sum of the log-probabilities of the continuation's tokens, in nats. entropy: sum of the
    entropies of the distributions that they come from. is_greedy: would greedy decoding write it?

    What the continuations of a group share is computed once: its keys and values go into a cache.
        pass 1, a row per group         [pad  pad  head  head  head]
        pass 2, a row per continuation                              [tail  text  text  pad]
    Pass 2 has as many columns as the longest continuation of the batch needs. Groups with shorter
    ones put the end of their prefix there, so that no row gets longer than the context. If nothing
    is shared, all of a row belongs to pass 2, which is then the only one.
    """
    # the last token of a text is only predicted
    T = max(max(len(text) for text in texts) for _, texts in groups) - 1
    if all(len(texts) == 1 for _, texts in groups):
        T = max(len(prefix) + len(texts[0]) for prefix, texts in groups) - 1
    heads = []
    rows = []    # tail and text
    owners = []  # the group of each row
    starts = []  # where the text begins in its row
    lengths = []
    for owner, (prefix, texts) in enumerate(groups):
        longest = max(len(text) for text in texts) - 1
        n_head = max(0, len(prefix) + longest - T)
        heads.append(prefix[:n_head])
        tail = prefix[n_head:]
        for text in texts:
            rows.append(tail + text)
            owners.append(owner)
            starts.append(len(tail))
            lengths.append(len(text))

    # pass 1 is padded on the left, so that pass 2 begins in one column, as in `generate`
    P = max(len(head) for head in heads)
    n_padding = [P - len(head) for head in heads]
    padded = [[pad] * n + head for n, head in zip(n_padding, heads)]
    idx = torch.tensor(padded, device=run.device)                        # (B, P)
    owners = torch.tensor(owners, device=run.device)                     # (N,)
    pos, mask, more_pos, more_mask = None, None, None, None
    if max(n_padding) > 0: # without padding attention is plainly causal, which is faster
        columns = torch.arange(P + T, device=run.device)
        first = torch.tensor(n_padding, device=run.device)[:, None]
        all_pos = (columns - first).clamp(min=0)                         # (B, P+T)
        real = columns >= first                                          # (B, P+T)
        pos, mask = all_pos[:, :P], real[:, :P]
        more_pos, more_mask = all_pos[owners, P:], real[owners]
    targets = pad_right(rows, pad, run.device)                           # (N, T+1)
    columns = torch.arange(T + 1, device=run.device)
    starts = torch.tensor(starts, device=run.device)[:, None]
    ends = starts + torch.tensor(lengths, device=run.device)[:, None]
    is_text = (starts <= columns) & (columns < ends)                     # (N, T+1)
    with run.autocast():
        if P == 0: # padded on the right only, so that no mask is needed
            x = model.hidden(targets[:, :-1])                            # (N, T, C)
            targets, is_text = targets[:, 1:], is_text[:, 1:]
        elif T == 0: # answers of one token, such as A, B, C or D, need no second pass
            x = model.hidden(idx, pos, mask)[owners, -1:]                # (N, 1, C)
        else:
            is_autocast = torch.is_autocast_enabled(run.device.type)
            dtype = torch.get_autocast_dtype(run.device.type) if is_autocast else torch.float32
            cache = KVCache(model.config, len(groups), P + T, run.device, dtype)
            x = model.hidden(idx, pos, mask, cache)[owners, -1:]
            cache.keep(owners) # a copy of the prefix for each continuation
            more = model.hidden(targets[:, :-1], more_pos, more_mask, cache)
            x = torch.cat((x, more), dim=1)                              # (N, T+1, C)
        # the head is a large matrix: it is used only where a text stands
        logits = model.head(x[is_text]).float()                          # (tokens, V)
    targets = targets[is_text]                                           # (tokens,)
    is_right = logits.argmax(-1) == targets
    logprobs = F.log_softmax(logits / temperature, dim=-1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    logprobs = logprobs.gather(-1, targets[:, None]).squeeze(1)

    scores = [[] for _ in groups]
    start = 0
    for owner, length in zip(owners.tolist(), lengths):
        tokens = slice(start, start + length)
        logprob = logprobs[tokens].sum().item()
        entropy = entropies[tokens].sum().item()
        scores[owner].append((logprob, entropy, is_right[tokens].all().item()))
        start += length
    return scores

def sample_answers(model, queries, n, stop, heat, label, step=0):
    """Sample at most n tokens for each query, at temperature heat -> [ids]. Ranks share the work.
    Calls with another step draw other answers."""
    mine = queries[run.rank::run.world_size]
    seed_step(seed, step, run.rank) # ranks must not draw the same answers
    answers = [None] * len(mine)
    order = sorted(range(len(mine)), key=lambda i: len(mine[i])) # so that little is padded
    for batch in in_batches(order, label, sample_batch):
        with run.autocast():
            new_ids = generate(model, [mine[i] for i in batch], n, stop, heat)
        for i, ids in zip(batch, new_ids):
            answers[i] = ids
    return all_gather_list(answers, run)

def score_answers(model, answers, pad, label=''):
    """-> [(logprob, entropy, is_greedy)] of all answers, dict(query, ids, ..). Ranks share them."""
    mine = answers[run.rank::run.world_size]
    # Rows of similar length share a batch, to save padding. The longest come first: if they fit
    # into memory, all others do, and the time left is not underestimated.
    sizes = [len(answer['query']) + len(answer['ids']) for answer in mine]
    order = sorted(range(len(mine)), key=sizes.__getitem__, reverse=True)
    # the temperature of sampling; greedy answers come from no distribution: score them at 1
    heat = temperature or 1.0
    scores = [None] * len(mine)
    for batch in in_batches(order, label):
        groups = [(mine[i]['query'], [mine[i]['ids']]) for i in batch]
        for i, group in zip(batch, score_groups(model, groups, pad, heat)):
            scores[i] = group[0]
    return all_gather_list(scores, run)

# characters of scripts without blanks between words: Thai to Burmese, Khmer, Chinese, Japanese
NO_BLANKS = re.compile('[\u0e00-\u109f\u1780-\u17ff\u2e80-\u312f\u31a0-\u9fff'
                       '\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]')

def split_at_blanks(context, continuation):
    """
    Move the blanks between two texts to the continuation: in running text ' owl' is one token. If
    there are none, put one in: llm-foundry's rows leave it out.
        ('Who? ', 'Anna') and ('Who?', 'Anna') -> ('Who?', ' Anna'), but ('谁', '我') -> ('谁', '我')
    """
    kept = context.rstrip(' \t\xa0\u3000') # a newline stays: it can be one token with what it ends
    blanks = context[len(kept):]
    border = context[-1:] + continuation[:1]
    has_blank = any(char.isspace() for char in border)
    if context and not has_blank and not NO_BLANKS.search(border):
        blanks = ' '
    return kept, blanks + continuation

# -----------------------------------------------------------------------------
# benchmarks: reading the questions, writing the prompts

# {name: {file, shots, delimiter, baseline, core, chat_core, header}}
CONFIG = pathlib.Path(__file__).resolve().parent / 'config'
BENCHMARKS = json.loads((CONFIG / 'benchmarks.json').read_text(encoding='utf-8'))
# CORE's choice of questions and shots (Li et al. 2024; seeds as in nanochat), so that its figures
# can be compared: they do not depend on our setting `seed`
SUBSET_SEED = 1337
SHOTS_SEED = 1234
LETTERS = 'ABCD'

def read_question(row):
    """
    A row of a benchmark -> dict(choices, gold, category). choices: [(context, continuation)].
    gold: index of the right choice; None if greedy decoding must give the only one.
    Raises LookupError, OverflowError, TypeError, ValueError if the row has another form.

        {query, choices, gold}                 which choice has the lowest loss per token?
        {context_options, continuation, gold}  which context gives the continuation the lowest loss?
        {context, continuation}                does greedy decoding give the continuation?
    These are the forms of llm-foundry and DCLM. Two more need sampled answers, and keep their row:
        {messages, checks, answer}             GSM8K (Cobbe et al. 2021): are the checks met?
        {prompt, test, entry_point}            HumanEval (Chen et al. 2021): are the tests passed?
    """
    question = dict(gold=None, category=str(row.get('category', '')))
    options = []
    if 'choices' in row:
        options = row['choices']
        choices = [(row['query'], option) for option in options]
    elif 'context_options' in row:
        options = row['context_options']
        choices = [(option, row['continuation']) for option in options]
    elif 'messages' in row:
        grade(row['checks'], 'any text') # find a bad check now
        solution = row.get('answer') or f'#### {row["checks"].get("number")}'
        choices = [(f'Question: {row["messages"][-1]["content"]}\nAnswer:', solution)]
        question['row'] = row
    elif 'test' in row:
        choices = [(row['prompt'], row['test'] + row['entry_point'])]
        question['row'] = row
    else:
        choices = [(row['context'], row['continuation'])]
    if not isinstance(options, list):
        raise TypeError(f'{options!r:.50} is not a list')
    for context, continuation in choices:
        if not isinstance(context, str) or not isinstance(continuation, str):
            raise TypeError('a text is not a string')
        if not continuation.strip():
            raise ValueError('a continuation is empty')
    if 'choices' in row or 'context_options' in row:
        gold = question['gold'] = int(row['gold'])
        if gold != float(row['gold']) or not 0 <= gold < len(choices):
            raise ValueError(f'gold is {row["gold"]}, but there are {len(choices)} choices')
    question['choices'] = choices
    return question

def load_benchmark(path):
    """A .jsonl file or MMLU's folder -> ([question], [solved questions], MMLU's examples)."""
    if os.path.isdir(path):
        return load_mmlu(path, 'test'), load_mmlu(path, 'dev')
    questions = []
    for line, row in read_jsonl(path):
        try:
            questions.append(read_question(row))
        except (LookupError, OverflowError, TypeError, ValueError) as e: # int(inf) overflows
            raise AssertionError(
                f'{path}:{line}: {type(e).__name__}: {e}: a row holds query, choices, gold, or '
                'context_options, continuation, gold, or context, continuation, or messages, '
                'checks, answer, or prompt, test, entry_point') from None
    if not questions:
        print0(f'{path}: left out, because it has no questions')
    return questions, []

def load_mmlu(folder, part):
    """MMLU as published (Hendrycks et al. 2021): folder/PART/SUBJECT_PART.csv, without a head.
    A row: question, A, B, C, D, answer."""
    questions = []
    paths = find(folder, part, f'*_{part}.csv')
    assert paths, f'{folder}/{part} has no *_{part}.csv: unpack MMLU in {folder}'
    for path in paths:
        subject = os.path.basename(path).removesuffix(f'_{part}.csv').replace('_', ' ')
        with open(path, encoding='utf-8-sig', newline='') as f:
            for line, row in enumerate(csv.reader(f), 1):
                assert len(row) == 6 and row[5] in tuple(LETTERS), \
                    f'{path}: row {line} is not question, A, B, C, D, answer: {row!r:.80}'
                query = row[0]
                for letter, option in zip(LETTERS, row[1:]):
                    query += f'\n{letter}. {option}'
                gold = LETTERS.index(row[5])
                questions.append(read_question(
                    dict(query=query, choices=list(LETTERS), gold=gold, category=subject)))
    return questions

def join(question, i, delimiter):
    """Choice i of a question as (context, continuation), to be written one after the other. A blank
    between them is part of the continuation, see split_at_blanks."""
    context, continuation = question['choices'][i]
    if delimiter is None: # a benchmark that is not in the table
        return split_at_blanks(context, continuation)
    if question['gold'] is None: # CORE trims the contexts of this form only
        context = context.strip()
    text = context + delimiter
    kept = text.removesuffix(' ')
    return kept, text[len(kept):] + continuation

def few_shot(questions, i, task):
    """The text before question i: a header, and solved questions, two newlines after each. They are
    drawn from the other questions, or are MMLU's for its subject."""
    parts = []
    if 'header' in task:
        parts.append(task['header'].format(**questions[i]))
    category = questions[i]['category']
    solved = [shot for shot in task.get('solved', []) if shot['category'] == category]
    shots = solved[:task['shots']]
    if not solved: # CORE draws them from the questions themselves
        n = min(task['shots'], len(questions) - 1)
        for j in random.Random(SHOTS_SEED + i).sample(range(len(questions) - 1), n):
            shots.append(questions[j + 1 if j >= i else j]) # i itself is left out
    for shot in shots:
        parts.append(''.join(join(shot, shot['gold'] or 0, task['delimiter'])))
    return ''.join(part + '\n\n' for part in parts)

def ask_user(tok, context):
    """A question as a user asks it, without the words that lead a base model. -> ids"""
    text = re.sub(r'^(Question|Q):|(Answer|A):$', '', context.strip())
    return tok.render([dict(role='user', content=text.strip())], prompt=True)[0]

def encode_question(tok, before, pairs, block_size, is_chat=False):
    """
    [(context, continuation)] of a question -> (groups for score_groups, was a context cut?)

    Context and continuation are encoded together, since that is how the model has seen text. If the
    tokenizer joins the end of one with the beginning of the other, that token belongs to the
    answer. In a conversation the user says the context, and the continuation is the answer.
    """
    groups = []
    cut = False
    for context, same in itertools.groupby(pairs, key=lambda pair: pair[0]):
        texts = [text for _, text in same]
        if is_chat:
            prefix = ask_user(tok, context)
            answers = [tok.encode(' ' + text.strip()) for text in texts]
        else:
            rows = [tok.encode(before + context + text) for text in texts]
            # works for lists too, in spite of its name: what all of them begin with
            shared = os.path.commonprefix([tok.encode(before + context), *rows])
            prefix = [tok.eot] + shared
            answers = [row[len(shared):] for row in rows]
        # a tokenizer of characters drops those that it does not know
        answers = [answer[:block_size] or [tok.pad] for answer in answers]
        room = block_size + 1 - max(len(answer) for answer in answers) # + 1: the last is predicted
        cut = cut or len(prefix) > room
        groups.append((prefix[-room:], answers)) # of a long context, the end matters most
    return groups, cut

# -----------------------------------------------------------------------------
# benchmarks: asking, marking

def mark(question, groups, scores, pad):
    """The scores of a question's choices -> what is kept: dict(losses, choice, gold, right, ..)."""
    losses = [] # mean loss of a choice's tokens, in nats. A sum would favour short choices
    n_tokens = 0 # that the model has read
    for (prefix, texts), group in zip(groups, scores):
        n_tokens += len(prefix)
        for text, (logprob, entropy, is_greedy) in zip(texts, group):
            n_tokens += len(text) - 1
            losses.append(math.inf if text[-1] == pad else -logprob / len(text))
    answer = dict(losses=losses, tokens=n_tokens)
    if question['gold'] is None:
        answer['right'] = is_greedy and losses[0] < math.inf
    else:
        choice = answer['choice'] = losses.index(min(losses))
        answer['gold'] = question['gold']
        # choices with the same text are equally right
        is_same = question['choices'][choice] == question['choices'][answer['gold']]
        answer['right'] = is_same and min(losses) < math.inf
    return answer

def ask(model, tok, questions, task, pool=None, is_chat=False, label=''):
    """Ask all questions. Ranks share them. -> [dict(question, cut, losses, right, ..)], see `mark`.
    pool: the questions that shots are drawn from, if they are others."""
    pool = pool or questions

    def prompt(i):
        if is_chat:
            return '', questions[i]['choices']
        pairs = [join(questions[i], k, task['delimiter'])
                 for k in range(len(questions[i]['choices']))]
        return few_shot(pool, i, task), pairs

    mine = range(run.rank, len(questions), run.world_size)
    sizes = {}
    n_choices = 1
    for i in mine:
        before, pairs = prompt(i)
        longest = max(len(context) + len(text) for context, text in pairs)
        sizes[i] = len(before) + longest # in characters: close enough to sort by
        n_choices = max(n_choices, len(pairs))
    order = sorted(mine, key=sizes.get, reverse=True) # as in score_answers

    answers = {}
    for batch in in_batches(order, label, max(1, batch_size // n_choices)):
        encoded = []
        for i in batch:
            encoded.append(encode_question(tok, *prompt(i), model.config.block_size, is_chat))
        groups = list(itertools.chain(*[groups for groups, _ in encoded]))
        scores = iter(score_groups(model, groups, tok.pad))
        for i, (groups, cut) in zip(batch, encoded):
            marked = mark(questions[i], groups, [next(scores) for _ in groups], tok.pad)
            answers[i] = dict(question=i, cut=cut, **marked)
    return all_gather_list([answers[i] for i in mine], run)

def disturb(question, kind, rng):
    """A harmless change of a question (HELM, Liang et al. 2022): 'typos', 'case' or 'spacing'."""
    context = question['choices'][0][0]
    parts = re.split(r'(\w{4,}| )', context) # long words and blanks, and what is between them
    for i, part in enumerate(parts):
        if kind == 'case':
            parts[i] = part.lower()
        elif kind == 'spacing' and part == ' ' and rng.random() < 0.3:
            parts[i] = '   '
        elif kind == 'typos' and re.fullmatch(r'\w{4,}', part) and rng.random() < 0.3:
            letters = list(part)
            k = rng.randrange(1, len(part) - 1)
            letters.insert(k, letters.pop(k + 1)) # two letters change places
            parts[i] = ''.join(letters)
    changed = ''.join(parts)
    choices = [(changed, text) for _, text in question['choices']]
    return {**question, 'choices': choices}

def calibration_error(answers, n_bins=10):
    """Expected calibration error (Guo et al. 2017): |accuracy - confidence|, in bins of confidence,
    which is the softmax over the choices of -loss, at the choice that was made."""
    gaps = [0.0] * n_bins
    for answer in answers:
        lowest = min(answer['losses'])
        if lowest < math.inf:
            confidence = 1 / sum(math.exp(lowest - loss) for loss in answer['losses'])
            gaps[min(n_bins - 1, int(confidence * n_bins))] += answer['right'] - confidence
    return sum(abs(gap) for gap in gaps) / len(answers)

def summarize(answers, questions):
    """Answers to a benchmark -> its figures. chance: accuracy of guessing, 0 for free text;
    constant: of the best answer that is always the same; n_cut: questions that were cut to the
    context; tokens: read per question."""
    n = len(answers)
    points = [float(answer['right']) for answer in answers]
    robust = [float(answer['robust']) for answer in answers if 'robust' in answer]
    result = dict(
        n=n, n_cut=sum(answer['cut'] for answer in answers), accuracy=statistics.fmean(points),
        stderr=0.0, chance=0.0, constant=0.0,
        tokens=statistics.fmean(answer['tokens'] for answer in answers))
    if n > 1: # stdev divides by n - 1, because the mean is estimated from the same points
        result['stderr'] = statistics.stdev(points) / math.sqrt(n)
    if robust:
        result['robust'] = statistics.fmean(robust)
    if 'n_right' in answers[0]:
        for k in (1, 10, 100):
            if k <= n_samples:
                result[f'pass@{k}'] = statistics.fmean(
                    pass_at_k(n_samples, answer['n_right'], k) for answer in answers)
        return result
    golds = collections.Counter()
    by_category = collections.defaultdict(list)
    for answer in answers:
        question = questions[answer['question']]
        _, text = question['choices'][0]
        golds[answer.get('gold', text.strip())] += 1 # of free text, the text itself
        by_category[question['category']].append(answer['right'])
    result['constant'] = golds.most_common(1)[0][1] / n
    chances = [1 / len(answer['losses']) for answer in answers if 'gold' in answer]
    result['chance'] = sum(chances) / n # free text cannot be guessed
    if result['chance'] > 0:
        result['calibration error'] = calibration_error(answers)
    if len(by_category) > 1: # such as the subjects of MMLU
        for name in sorted(by_category):
            result[f'category: {name}'] = statistics.fmean(by_category[name])
    return result

# -----------------------------------------------------------------------------
# benchmarks with sampled answers

def code_runner():
    """
    Run a program that a model wrote, in a process of its own: `passes` sends it this source text.
    Reads {program, word, seconds, limits} from stdin. Exit code 0: the program came to its end.

    This is no security boundary. It stops accidents and simple malice: limits of time, memory,
    files and processes; where the system allows it no network, and an empty folder as all files.
    """
    import ctypes, json, os, resource, select, signal, sys
    # what solutions may import; later, the folder of these modules is out of reach
    import bisect, collections, copy, datetime, decimal, fractions, functools, hashlib, heapq
    import itertools, math, operator, random, re, statistics, string, time, typing
    job = json.load(sys.stdin)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2): # output is thrown away, so it may be endless
        os.dup2(null, fd)
    is_root = os.geteuid() == 0
    may_chroot = is_root
    if sys.platform == 'linux':
        libc = ctypes.CDLL(None)
        spaces = 0x40000000 | 0x20000000 | 0x08000000 # own network, process ids, shared memory
        if not is_root: # then it is allowed in an own space of users only, if at all
            spaces |= 0x10000000
        is_apart = libc.unshare(spaces) == 0
        may_chroot = is_root or is_apart
    if may_chroot:
        os.chroot('.') # the empty folder
        os.chdir('/')
    if is_root: # become nobody, because root has no limit of processes
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    reader, writer = os.pipe()
    pid = os.fork() # a program that kills its parent kills this process, not eval.py
    if pid == 0:
        if sys.platform == 'linux':
            libc.prctl(1, signal.SIGKILL) # die with the parent
        for name, value in job['limits'].items():
            resource.setrlimit(getattr(resource, name), (value, value))
        exec(job['program'], {'__name__': 'program'})
        os.write(writer, job['word'].encode()) # exit code 0 alone would not prove that it got here
        os._exit(0)
    os.close(writer)
    # the program has its own limit of CPU time, but it could sleep
    ready, _, _ = select.select([reader], [], [], job['seconds'])
    said = os.read(reader, 100) if ready else b''
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os._exit(0 if said == job['word'].encode() else 1)

CODE_SECONDS = 10 # of the clock; HumanEval's programs need less than one
CODE_LIMITS = dict(RLIMIT_CPU=5, RLIMIT_AS=2**29, RLIMIT_FSIZE=2**20, RLIMIT_NPROC=0,
                   RLIMIT_NOFILE=64, RLIMIT_CORE=0) # seconds, bytes, bytes, processes, files, bytes

def passes(program):
    """Does a program come to its end without an error? See code_runner for what it may do."""
    job = dict(program=program, word=secrets.token_hex(16), seconds=CODE_SECONDS,
               limits=CODE_LIMITS)
    source = inspect.getsource(code_runner) + '\ncode_runner()\n'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o777) # for nobody
        process = subprocess.Popen(
            [sys.executable, '-I', '-S', '-c', source], cwd=folder, env={}, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.communicate(json.dumps(job).encode(), timeout=CODE_SECONDS + 20)
        except subprocess.TimeoutExpired:
            pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL) # what is left of its group
        process.wait()
    return process.returncode == 0

def code_of(row, text):
    """The program that tests an answer to a question of HumanEval: a completion, or the whole
    function, perhaps in a block of Markdown."""
    block = re.search(r'```(?:python|py)?\n(.*?)(?:```|$)', text, re.S)
    text = block[1] if block else text
    before = row['prompt']
    head = f'def {row["entry_point"]}('
    if head in text:
        before = before.partition(head)[0] # imports and helpers
    else: # the text of a base model goes on after the function: with what begins a line
        text = re.split(r'\n(?=\S)', '\n' + text)[0]
    return f'{before}{text}\n{row["test"]}\ncheck({row["entry_point"]})\n'

def number_of(text):
    """The part of an answer to GSM8K that has its number: '2 + 3 = 5\n#### 5 pears' -> '5'."""
    text, mark, after = text.partition('####')
    numbers = [word for word in after.split() if re.search(r'\d', word)]
    if numbers:
        return numbers[0]
    # A base model goes on with the next question. Of the rest, `grade` takes the last number
    return text.split('\nQuestion:')[0]

def pass_at_k(n, n_right, k):
    """Chen et al. 2021: the probability that of k of n samples at least one is right, unbiased."""
    return 1 - math.comb(n - n_right, k) / math.comb(n, k)

def answer_exam(model, tok, questions, task, is_chat=False, label=''):
    """n_samples answers to each question -> [dict(question, texts, n_right, right, ..)], right: the
    share of right ones. Ranks share the work."""
    # at least half of the context is for the question
    new_tokens = min(max_exam_tokens, model.config.block_size // 2)
    room = model.config.block_size - new_tokens
    prompts = []
    for i, question in enumerate(questions):
        context = question['choices'][0][0]
        if not is_chat:
            prompts.append([tok.eot] + tok.encode(few_shot(questions, i, task) + context))
        elif 'test' in question['row']:
            prompts.append(ask_user(tok, f'Complete this Python function.\n\n{context}'))
        else:
            prompts.append(tok.render(question['row']['messages'], prompt=True)[0])
    queries = []
    for ids in prompts:
        queries += [ids[-room:]] * n_samples
    heat = temperature if n_samples > 1 else 0 # many answers must differ
    stop = tok.end if is_chat else tok.eot
    sampled = sample_answers(model, queries, new_tokens, stop, heat, label)

    answers = []
    mine = range(run.rank, len(questions), run.world_size)
    for done in in_batches(mine, f'{label}: marking', 1):
        i = done[0]
        row = questions[i]['row']
        texts = []
        n_right = 0
        for ids in sampled[i * n_samples:(i + 1) * n_samples]:
            # not decode_answer, because code begins with blanks
            data = b''.join(tok.token_bytes(token) for token in ids)
            text = data.decode('utf-8', 'replace')
            texts.append(text)
            if 'test' in row:
                n_right += passes(code_of(row, text))
            else:
                said = number_of(text) if 'number' in row['checks'] else text
                n_right += grade(row['checks'], said)[0]
        answers.append(dict(question=i, cut=len(prompts[i]) > room, tokens=len(prompts[i]),
                            texts=texts, n_right=n_right, right=n_right / n_samples))
    return all_gather_list(answers, run)

# -----------------------------------------------------------------------------
# sampled answers

def answer_prompts(model, tok, is_chat, prompts, label='', step=0):
    """Sample an answer to each prompt -> [dict(query, ids, text, ended)]. Ranks share the work."""
    new_tokens = min(max_new_tokens, model.config.block_size - 1)
    room = model.config.block_size - new_tokens
    stop = tok.end if is_chat else tok.eot
    queries = []
    for prompt in prompts:
        if is_chat:
            ids, mask = tok.render(prompt['messages'], prompt=True)
        else:
            text = '\n'.join(message['content'] for message in prompt['messages'])
            ids = [tok.eot] + tok.encode(text + '\n')
        queries.append(ids[-room:]) # of a long prompt, the end matters most
    label = f'{label}: sampling answers'
    sampled = sample_answers(model, queries, new_tokens, stop, temperature, label, step)
    answers = []
    for query, ids in zip(queries, sampled):
        text = tok.decode_answer(ids)
        answers.append(dict(query=query, ids=ids, text=text, ended=ids[-1] == stop))
    return answers

@torch.no_grad()
def reward_scores(model, tok, prompts, texts, label=''):
    """-> the score of each text as an answer to its prompt. model and tok: those of reward.pt. It
    reads the text in the chat template, so it can score models of any tokenizer."""
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
    """Grade texts by the checks of their prompts -> arrays (N,): all_met; gold, the gold score;
    plain, the same without the points for liked phrases."""
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

def get_points(differences):
    """-> 1 for a win, where a difference is positive; 1/2 for a tie; 0 for a loss."""
    return 0.5 + 0.5 * np.sign(differences)

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
    points = get_points(gaps * margins)
    is_known = np.abs(gaps) > 1e-6
    return float(points[is_known].mean()) if is_known.any() else None

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
    """All meet all: scores (M, R) of M models in R rounds -> rounds (R, M, M). [r, i, j]
    is what model i has won against j; 0 for a pair that has not met."""
    M = len(scores)
    points = get_points(scores[:, None, :] - scores[None, :, :])         # (M, M, R)
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
# one examination, and what all of them say together

CHAT = ', chat' # after the name of a benchmark that was asked in a conversation
DECIDES = ('limit', 'n_robust', 'n_samples', 'max_exam_tokens', 'temperature', 'seed', 'dtype')

def take_exam(model, tok, name, benchmark, form):
    """The figures of one model in one benchmark, see summarize. The single answers are written to
    out_dir/answers. If they are there, from the same files and settings, they are read."""
    questions = exams[benchmark]
    task = tasks[benchmark]
    in_chat = form == CHAT
    label = benchmark + form
    folder = re.sub(r'[^\w.-]+', '_', name)
    path = os.path.join(out_dir, 'answers', folder, f'{label}.jsonl')
    stamps = []
    file = paths[task['file']]
    for source in (checkpoint_paths[name], file, CONFIG / 'benchmarks.json', __file__):
        stamps.append([os.path.getsize(source), os.path.getmtime(source)])
    key = dict(stamps=stamps, settings=[config[setting] for setting in DECIDES])

    kept = read_log(path)
    if kept and kept[0].get('key') != key:
        kept = []
    kept = all_gather_list([kept] if run.master else [], run)[0] # others may not see the file
    if kept:
        head, *answers = kept
        seconds = head['seconds']
    else:
        start = time.time()
        examine = answer_exam if 'row' in questions[0] else ask
        answers = examine(model, tok, questions, task, is_chat=in_chat, label=f'{name}: {label}')
        seconds = (time.time() - start) / len(questions)
        contexts = {context for context, _ in questions[0]['choices']}
        is_choice = questions[0]['gold'] is not None and len(contexts) == 1
        if is_choice and not in_chat: # HELM's robustness
            for kind in ('typos', 'case', 'spacing'):
                changed = []
                for i, question in enumerate(questions[:n_robust]):
                    changed.append(disturb(question, kind, random.Random(f'{seed} {kind} {i}')))
                again = ask(model, tok, changed, task, questions, label=f'{name}: {label}, {kind}')
                for answer, other in zip(answers, again): # the worst of three counts
                    answer['robust'] = answer.get('robust', True) and other['right']
        if run.master:
            write_jsonl(path, [dict(key=key, seconds=seconds), *answers])
    result = {**summarize(answers, questions), 'seconds': seconds}
    result['shots'] = 0 if in_chat else task['shots']
    cut = f', {result["n_cut"]:,} longer than the context' if result['n_cut'] else ''
    came = 'kept from an earlier run' if kept else f'{seconds:.4f} s each'
    print0(f'{name}: {label}: {result["accuracy"]:.3f}, standard error {result["stderr"]:.3f}, '
           f'{result["n"]:,} questions{cut}, {came}')
    return result

# figures of a benchmark -> rows of the report
HELM = {
    'calibration error': 'calibration error', 'robust': 'accuracy in spite of typos, case, spacing',
    'tokens': 'tokens per question', 'seconds': 'seconds per question'}

def overall_figures(results):
    """{benchmark: figures} of one model -> {measure: value}: CORE (Li et al. 2024), nanochat's
    ChatCORE, and the means of HELM's calibration, robustness, efficiency (Liang et al. 2022)."""
    measures = {}
    for measure, key, form in (('CORE', 'core', ''), ('ChatCORE', 'chat_core', CHAT)):
        members = [benchmark for benchmark, task in BENCHMARKS.items() if key in task]
        centred = [] # 0 is the baseline, 1 is perfect
        for benchmark in members:
            if benchmark + form in results:
                baseline = BENCHMARKS[benchmark]['baseline']
                accuracy = results[benchmark + form]['accuracy']
                centred.append((accuracy - baseline) / (1 - baseline))
        if centred:
            if len(centred) < len(members):
                measure += f' (partial: {len(centred)} of {len(members)} tasks)'
            measures[measure] = statistics.fmean(centred)
    # HELM's means are over the multiple-choice questions in bare text, which every model is asked
    results = [result for label, result in results.items()
               if 'calibration error' in result and not label.endswith(CHAT)]
    for key, measure in HELM.items():
        values = [result[key] for result in results if key in result]
        if values:
            measures[f'{measure} (mean of {len(values)})'] = statistics.fmean(values)
    return measures

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
for path in find(data_dir, 'benchmarks', '*.jsonl'):
    name = os.path.basename(path).removesuffix('.jsonl')
    paths[name] = path
if os.path.isdir(os.path.join(data_dir, 'mmlu')):
    paths['mmlu'] = os.path.join(data_dir, 'mmlu')
tasks = {name: task for name, task in BENCHMARKS.items() if task['file'] in paths}
known_files = {task['file'] for task in BENCHMARKS.values()}
for name in paths:
    if name not in known_files:
        tasks[name] = dict(file=name, shots=0, delimiter=None)
wanted = re.split(' *, *', benchmarks.strip()) if benchmarks else list(tasks)
exams = {} # benchmark -> its questions
for name in wanted:
    assert name in tasks, (f'no benchmark {name!r} in {data_dir}/benchmarks: choose from '
                           f'{", ".join(tasks) or "none"}')
    found, solved = load_benchmark(paths[tasks[name]['file']])
    if found and 'test' in found[0].get('row', ''):
        if not allow_code:
            print0(f'{name}: left out, because it runs code that a model has written: '
                   '--allow_code=true allows that')
            continue
        is_posix = hasattr(os, 'killpg') # not on Windows
        assert is_posix and passes('import math'), 'allow_code: no program can be run here: leave it out'
    random.Random(SUBSET_SEED).shuffle(found)
    tasks[name] = {**tasks[name], 'solved': solved}
    if found:
        exams[name] = found[:limit or None]
core = [name for name, task in BENCHMARKS.items() if 'core' in task]
missing = [name for name in core if name not in exams]
if 0 < len(missing) < len(core):
    print0(f'CORE is partial, without {", ".join(missing)}')

# -----------------------------------------------------------------------------
# the reward model, if there is one: it reads the answers of all models
reward_model = None
path = os.path.join(out_dir, 'reward.pt')
if prompts and os.path.exists(path):
    ckpt = load_checkpoint(path, ['reward'], f'python reward.py --out_dir={out_dir}')
    reward_tok = Tokenizer(ckpt['tokenizer'])
    reward_model = load_model(ckpt, run.device, ScalarModel).eval()

# many answers to each of the first prompts with checks, sampled for best-of-n
N_BEST = (2, 4, 8, 16)
POOL_SIZE = 16      # of the SFT model
SMALL_POOL_SIZE = 4 # of the other models
checked = [i for i, prompt in enumerate(prompts) if prompt.get('checks')]
pool_indices = checked[:pool_prompts] # in prompts

# -----------------------------------------------------------------------------
# measure each model
table = {}       # the report: model -> {measure: value}
results = {}     # model -> {benchmark: figures, see summarize}
all_answers = {} # model -> its answers, in the order of the prompts
grades = {}      # model -> what grade_all says of its answers to the prompts with checks
judged = {}      # model -> scores of its answers by the reward model
pools = {}       # chat model -> {all_met, gold, plain, score: arrays (prompts, answers)}
sft_name = ''    # the first SFT model: DPO and RLHF models are compared with it
sft_model = None
for name, ckpt in checkpoints.items():
    t0 = time.time()
    tok = Tokenizer(ckpt['tokenizer'])
    model = load_model(ckpt, run.device).eval()
    column = {}
    table[name] = column

    column.update(language_modelling(model, tok, name))
    is_chat = ckpt['stage'] not in ('base', 'mid')
    if ckpt['stage'] == 'sft' and sft_model is None:
        sft_name = name
        sft_model = model
    results[name] = {}
    for benchmark, questions in exams.items():
        forms = ['', CHAT] if is_chat else ['']
        if 'row' in questions[0]: # sampling takes long: ask a chat model in a conversation only
            forms = forms[-1:]
        for form in forms:
            results[name][benchmark + form] = take_exam(model, tok, name, benchmark, form)
    column.update(overall_figures(results[name]))

    if prompts:
        answers = answer_prompts(model, tok, is_chat, prompts, name)
        all_answers[name] = answers
        scores = score_answers(model, answers, tok.pad, f'{name}: scoring answers')
        for answer, (logprob, entropy, _) in zip(answers, scores):
            answer['logprob'] = logprob
            answer['entropy'] = entropy
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
            size = POOL_SIZE if name == sft_name else SMALL_POOL_SIZE
            label = f'{name}: {size} answers a prompt'
            asked = []
            for i in pool_indices:
                asked += [prompts[i]] * size
            answers = answer_prompts(model, tok, True, asked, label, step=1)
            texts = [answer['text'] for answer in answers]
            pool = grade_all(asked, texts)
            if reward_model is not None:
                scores = reward_scores(reward_model, reward_tok, asked, texts, label)
                pool['score'] = np.array(scores)
            pools[name] = {key: values.reshape(-1, size) for key, values in pool.items()}
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
            points = get_points(grades[name][kind] - grades[sft_name][kind])
            column[f'{row} against SFT'] = points.mean()
            column[f'{row}, 95% interval'] = wilson(points.mean(), len(points))
    if checkpoints[name]['tokenizer'] != checkpoints[sft_name]['tokenizer']:
        continue # the ids of these answers are other texts for the SFT model
    # how likely are these answers under the SFT model?
    tok = Tokenizer(checkpoints[name]['tokenizer'])
    scores = score_answers(sft_model, answers, tok.pad, f'{name}: KL from SFT')
    column['KL from SFT, nats per answer'] = statistics.fmean(
        answer['logprob'] - ref_logprob for answer, (ref_logprob, _, _) in zip(answers, scores))

# What a model learns from a reward model depends on whether this is right about the model's own
# answers. After training it may be wrong: those that are left differ in what it cannot see.
for name, pool in pools.items():
    if 'score' in pool:
        share = pair_accuracy(pool['score'], pool['gold'])
        table[name]['pairs of answers that the reward model orders as gold does'] = share

# Best-of-n is what RLHF must beat: the SFT model answers n times, the reward model picks one.
# Means over these, and over the answers of each trained model to the same prompts.
BEST_COLUMNS = {
    'score': 'reward model', 'gold': 'gold score', 'all_met': 'all checks met',
    'preferred': 'preferred to SFT', 'plain_preferred': 'without liked phrases'}
best_of_n = [] # rows of a table, {column: value}
sft_pool = pools.get(sft_name, {})
if 'score' in sft_pool:
    samplers = []
    for name, pool in pools.items():
        kl = table[name].get('KL from SFT, nats per answer')
        samplers.append((name, 0.0 if name == sft_name else kl, pool, 1))
    for n in N_BEST:
        samplers.append((f'best of {n}', math.log(n) - (n - 1) / n, sft_pool, n))
    for label, kl, pool, n in samplers:
        # Each answer meets all 16 of the SFT model. One of these is itself, if it is from there.
        for kind, name in (('gold', 'preferred'), ('plain', 'plain_preferred')):
            differences = pool[kind][:, :, None] - sft_pool[kind][:, None, :] # (prompts, N, 16)
            pool[name] = get_points(differences).mean(2)
        row = {'answers': label, 'KL, nats': kl}
        for kind, title in BEST_COLUMNS.items():
            row[title] = best_of(pool['score'], pool[kind], n)
        best_of_n.append(row)

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
    """Compare pairs of answers in the terminal. Each verdict is appended to ab_path at once, with
    the ranking that reward.py learns from. n_asked: how many are there."""
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
    for row in read_log(ab_path):
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
    verdicts = read_verdicts()
    if len(verdicts) > 0:
        judges['people'] = verdicts

def describe_share(points, games):
    """-> the cell of a table: the share of points, with its Wilson interval."""
    if games == 0:
        return None
    lower, upper = wilson(points / games, games)
    return f'{points / games:.0%} ({lower:.0%} to {upper:.0%})'

preferences = {} # judge -> rows of a table
for judge, rounds in judges.items():
    ratings, limits = elo(rounds)
    points = rounds.sum(0)                                               # (M, M)
    games = points + points.T
    rows = []
    for i, name in enumerate(all_answers):
        shares = [describe_share(points[i, j], games[i, j]) for j in range(len(points))]
        interval = f'{limits[0, i]:.0f} to {limits[1, i]:.0f}'
        rows.append([name, f'{ratings[i]:.0f}', interval, *shares])
    preferences[judge] = rows

# -----------------------------------------------------------------------------
# the report: sections, each a dict(title, source, head, rows)
sections = []

def add_section(title, source, head, rows):
    if rows:
        sections.append(dict(title=title, source=source, head=head, rows=rows))

measures = {} # all measures of all models, in the order of their first appearance
for column in table.values():
    measures.update(column)
rows = []
for measure in measures:
    rows.append([measure, *[column.get(measure) for column in table.values()]])
add_section(
    'Results', f'checkpoints in {out_dir}; in {data_dir}: val_*.bin for bits per byte, '
    'prompts_val.jsonl for the answers; reward.pt where the reward model judges',
    ['measure', *table], rows)

# accuracy beside that of guessing, and of the best answer that is always the same
accuracies = {} # benchmark -> its row, {column: text}
for name, figures in results.items():
    for label, result in figures.items():
        row = accuracies.setdefault(label, {'benchmark': label, 'shots': str(result['shots'])})
        row['questions'] = f'{result["n"]:,}'
        row['chance'] = f'{result["chance"]:.0%}'
        row['always the same'] = f'{result["constant"]:.0%}'
        row[name] = f'{result["accuracy"]:.1%} ± {result["stderr"]:.1%}'
        for k in ('pass@10', 'pass@100'):
            if k in result:
                row[name] += f', {k} {result[k]:.1%}'
head = ['benchmark', 'shots', 'questions', 'chance', 'always the same', *table]
add_section(
    'Benchmarks: accuracy and its standard error',
    f'{data_dir}/benchmarks; every answer: {out_dir}/answers/MODEL/BENCHMARK.jsonl',
    head, [[row.get(name) for name in head] for row in accuracies.values()])
if best_of_n:
    add_section(
        'Best of n: what RLHF has to beat',
        f'{POOL_SIZE} answers of {sft_name} to {len(pool_indices)} prompts of prompts_val.jsonl, '
        'reward.pt; the KL of best-of-n is a bound, ln n - (n-1)/n',
        list(best_of_n[0]), [list(row.values()) for row in best_of_n])
for judge, rows in preferences.items():
    add_section(
        f'Preference, by {judge}',
        'preferences_ab.jsonl' if judge == 'people' else 'answers to prompts_val.jsonl',
        ['model', 'Elo', '95% interval', *[f'preferred to {name}' for name in all_answers]], rows)

# metrics in reward.pt: how often two judges prefer the same one of two held-out answers
JUDGES = {
    'val_accuracy': 'reward model and labeller',
    'val_gold_accuracy': 'reward model and gold score',
    'ceiling': 'labeller and gold score (the ceiling)',
    'self_agreement': 'labeller and labeller, asked twice'}

# what each stage has cost and how it was set, from its checkpoint
costs = {}
settings = {} # stage -> settings
for stage in ('base', 'mid', 'sft', 'reward', 'dpo', 'rlhf'):
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
head = ['cost of training', 'seconds', 'FLOPs', 'share', 'tokens']
add_section('Cost', f'STAGE.pt in {out_dir}', head, rows)

rows = []
for key, who in JUDGES.items():
    if key in costs.get('reward', {}):
        rows.append([who, f'{costs["reward"][key]:.1%}'])
head = ['who prefers the same one of two answers', 'agreement']
add_section('The reward model', 'reward.pt', head, rows)

settings['eval'] = config
processor = platform.processor() or platform.machine()
if run.device_type == 'cuda':
    processor = torch.cuda.get_device_name()
hardware = (f'{run.world_size} x {run.device} ({processor}), {os.cpu_count()} cores, '
            f'{platform.platform()}, Python {platform.python_version()}, '
            f'PyTorch {torch.__version__}')

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
    """-> the text of an SVG file. A chart is a dict: title; curves, {label: (xs, ys)}; x, the name
    of the x axis ('step' if it is missing); is_log, True for a logarithmic y axis."""
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
    xs = []
    ys = []
    for row in read_log(os.path.join(out_dir, f'{stage}.jsonl')):
        if row.get(key) is not None and row.get(x) is not None:
            xs.append(row[x])
            ys.append(row[key])
    return xs, ys

# stage, title, {label: key in its log}; a key val_... is measured on held-out data
CHARTS = [
    dict(stage='base', title='pretraining: loss', is_log=True,
         keys={'training': 'loss', 'held-out': 'val_loss'}),
    dict(stage='mid', title='mid-training: loss', is_log=True,
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
profiles = json.loads((CONFIG / 'curves.json').read_text(encoding='utf-8'))
expected = {} # stage -> rows of its log
for word in sys.argv[1:]:
    expected = profiles.get(os.path.basename(word), expected)

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
        steps, values = curves[label]
        expected_rows.append([measure, rows[-1][key], values[-1], f'{log}: {key}'])
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

logs = {} # KL coefficient -> the log of its run
for path in find(out_dir, 'overoptimise', '*', 'rlhf.jsonl'):
    coefficient = os.path.basename(os.path.dirname(path))
    logs[coefficient] = os.path.join('overoptimise', coefficient, 'rlhf')
over_optimised = [] # charts
for key, column, title in OVEROPTIMISATION:
    curves = {}
    for coefficient, log in logs.items():
        kls, ys = read_curve(log, key, 'val_kl')
        if kls: # an estimate of the KL can be negative
            roots = [math.sqrt(max(0, kl)) for kl in kls]
            curves[f'KL coef. {coefficient}'] = (roots, ys)
    bests = best_of_n[len(pools):] # without the models' own rows
    if curves and bests:
        roots = [math.sqrt(row['KL, nats']) for row in bests]
        curves[DOTS] = (roots, [row[column] for row in bests])
    if curves:
        source = f'overoptimise/*/rlhf.jsonl: val_kl, {key}'
        over_optimised.append(dict(title=title, x='√KL', curves=curves, source=source))

# -----------------------------------------------------------------------------
# report.html: one page that needs no other file. Models may say anything: texts are escaped
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
    lines = [f'<h2>{html.escape(section["title"])}</h2>']
    lines.append(f'<div class="wide"><table class="{kind}">')
    for tag, rows in (('th', [section['head']]), ('td', section['rows'])):
        for row in rows:
            cells = [f'<{tag}>{html.escape(show(value))}</{tag}>' for value in row]
            lines.append(f'<tr>{"".join(cells)}</tr>')
    lines.append(f'</table></div><p class="source">Source: {html.escape(section["source"])}</p>')
    return '\n'.join(lines)

page = ['<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Report</title>',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>',
        f'<h1>Report on {html.escape(out_dir)}</h1>']
for section in sections[:2]:
    page.append(html_section(section))
page.append('<h2>Curves</h2><div class="charts">')
for chart in charts + over_optimised:
    caption = f'<figcaption class="source">{html.escape(chart["source"])}</figcaption>'
    page.append(f'<figure>{draw([chart])}{caption}</figure>')
page.append('</div>')
for section in sections[2:]:
    page.append(html_section(section))
if samples:
    answers = dict(title='Answers to the same prompts', source='prompts_val.jsonl',
                   head=['prompt', *all_answers], rows=samples)
    page.append(html_section(answers, 'samples'))
page.append(f'<h2>Settings, hardware, seed</h2><p>Evaluated with seed {seed} on '
            f'{html.escape(hardware)}. The settings of each stage, from its checkpoint:</p>'
            f'<pre>{html.escape(json.dumps(settings, indent=1))}</pre></html>\n')

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
    numbers = dict(table=table, benchmarks=results, best_of_n=best_of_n,
                   preferences=preferences, costs=costs, config=config)
    write_text(os.path.join(out_dir, 'report.json'), json.dumps(numbers, indent=1) + '\n')
    write_text(os.path.join(out_dir, 'report.html'), '\n'.join(page))
    text = '\n\n'.join(parts) + '\n'
    path = os.path.join(out_dir, 'report.md')
    write_text(path, text)
    seconds = time.time() - started
    print(f'\n{text}\nwritten to {path} and report.html in {seconds:.0f} s')
cleanup(run)
