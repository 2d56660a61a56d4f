"""
Stage 3: the reward model. It is easier to compare answers than to write them. So people rank
answers of the SFT model, and a model learns to score answers as they would (Christiano et al. 2017;
Ouyang et al. 2022, step 2).

Reads   out_dir/sft.pt, data_dir/preferences_{train,val}.jsonl; if sample_prompts > 0 also
        data_dir/prompts_{train,val}.jsonl, to make out_dir/preferences_{train,val}.jsonl
Writes  out_dir/reward.pt, out_dir/reward.jsonl (the curve), out_dir/reward.resume.pt while it runs;
        with --objective=dpo the same three, named dpo

on a laptop     $ python reward.py config/tiny.py        (on one GPU the same, or without a profile)
on 8 GPUs       $ torchrun --standalone --nproc_per_node=8 reward.py
on two nodes    with the flags that pretrain.py shows
you rank        $ python reward.py config/tiny.py --judge=human --sample_prompts=100 --resume=false
DPO             $ python reward.py config/tiny.py --objective=dpo
look at it      $ python reward.py --show="How much is 2 plus 3?" --answer="It is 5."

A ranking lists the indices of completions, best first, with ties as lists: [2, [0, 1], 3]. The body
of the model starts as the SFT model. A new head gives one number per token, the score, read at the
last token of the answer. The loss of a pair is -log sigmoid(score(better) - score(worse)), the
Bradley-Terry model; that of a ranking is the mean over its pairs. At the end the scores are
normalised, so that a KL coefficient of the next stage means the same for every reward model.

Direct preference optimization (DPO, Rafailov et al. 2023) does without a reward model and PPO:
    RLHF looks for the policy p that maximises the mean of score - beta log(p / p_ref).
    The best one is known: p = p_ref exp(score / beta) / Z, where Z depends on the prompt only.
    Solve this for the score: score = beta log(p / p_ref) + beta log Z.
    Answers to one prompt have the same Z, which cancels out of score(better) - score(worse).
    So beta log(p / p_ref) can be the score in the loss above; the p that it learns is the policy.
    Here p starts as the SFT model, and p_ref stays the SFT model.

Left out: a margin that says how much better an answer is (Llama 2), several labellers who disagree.
"""
from configurator import configure # first, so that Ctrl-C gives no traceback while torch loads
import copy
import functools
import itertools
import json
import math
import os
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from model import (
    ScalarModel, Tokenizer, all_gather_list, all_sum, catch_signals, cleanup, gather, generate,
    get_state, grade, last_token, load_checkpoint, load_model, load_resume, make_optimizers,
    open_log, pad_right, print0, read_jsonl, read_prompts, save_checkpoint, save_resume, seed_step,
    set_state, setup, shard, should_stop, simulated_ranking, write_jsonl)

# -----------------------------------------------------------------------------
# settings
# data
data_dir = 'data/toytown'   # folder of the data
out_dir = 'out/toytown'     # folder of the checkpoints and logs
init_from = ''              # the chat model to start from; empty = out_dir/sft.pt
max_length = 0              # leave out examples with more tokens than this; 0 = block_size
skip_bad = False            # leave out bad lines and count them, instead of stopping
# sampling: the SFT model answers prompts, and a judge ranks the answers
judge = 'labeller'          # labeller: simulated; human: you; file: take the rankings in out_dir
sample_prompts = 0          # prompts to answer; 0 = use only the rankings in data_dir
sample_answers = 4          # answers to each prompt
sample_batch = 64           # prompts answered at a time
max_new_tokens = 64         # maximum length of an answer
temperature = 1.0           # sampling temperature
labeller_noise = 0.2        # the labeller sees the gold score plus N(0, labeller_noise)
# training
share = 1.0                 # share of the training rankings to learn from
objective = 'reward'        # reward: a model that gives scores; dpo: a policy
beta = 0.1                  # dpo: KL coefficient; higher = stays closer to the SFT model
epochs = 1                  # passes over the training data
batch_size = 8              # examples in a micro-batch on each process; lower it to save memory
total_batch_size = 0        # examples in a step, all processes; 0 = one micro-batch on each process
dropout = 0.0               # share of the activations that is dropped while training
# optimizer
optimizer = 'adamw'         # adamw, or muon for the matrices in the blocks and adamw for the rest
learning_rate = 1e-5        # max learning rate
warmup_iters = 20           # steps of linear warm-up
weight_decay = 0.0          # weight decay of matrices; vectors do not decay
momentum = 0.95             # muon: momentum; 0.8 is better in a run of some hundred steps
beta1 = 0.9                 # adamw: decay rate of the first moment
beta2 = 0.95                # adamw: decay rate of the second moment
grad_clip = 1.0             # clip the gradient norm at this value; 0 = off
# evaluation and log
show = ''                   # print the score of --answer to this prompt after each token, and stop
answer = ''                 # the answer to show
eval_interval = 100         # steps between evaluations
log_interval = 10           # steps between log lines
save_interval = 500         # steps between saves of the resume file
# system
parallel = 'ddp'            # several processes: ddp, or fsdp for large models
device = 'auto'             # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'              # auto, float32, bfloat16 (and float16, in pretrain.py only)
seed = 1337                 # seed of everything random
resume = True               # continue from the resume file if an interrupted run has left one
config = configure(globals())

LETTERS = list('abcdefghijklmnopqrstuvwxyz') # names of answers, for a person
for name in ('epochs', 'beta', 'sample_answers', 'sample_batch', 'max_new_tokens',
             'batch_size', 'eval_interval', 'log_interval', 'save_interval'):
    assert config[name] > 0, f'{name} must be positive, not {config[name]}'
for name in ('total_batch_size', 'temperature', 'labeller_noise',
             'learning_rate', 'warmup_iters', 'weight_decay', 'grad_clip'):
    assert config[name] >= 0, f'{name} must be at least 0, not {config[name]}'
for name in ('dropout', 'momentum', 'beta1', 'beta2'):
    assert 0 <= config[name] < 1, f'{name} must be at least 0 and below 1, not {config[name]}'
assert parallel in ('ddp', 'fsdp'), f"parallel must be 'ddp' or 'fsdp', not {parallel!r}"
for name, allowed in (('judge', ('labeller', 'human', 'file')), ('objective', ('reward', 'dpo'))):
    assert config[name] in allowed, f'{name} must be one of {allowed}, not {config[name]!r}'
assert 0 < share <= 1, f'share must be above 0 and at most 1, not {share}'
assert judge != 'human' or 0 < sample_prompts and sample_answers <= len(LETTERS), (
    f'judge=human needs prompts (--sample_prompts=100) and at most {len(LETTERS)} answers to each')

# -----------------------------------------------------------------------------
# device and model
class Policy(nn.Module):
    """A GPT that reads answers, for DPO. Like ScalarModel it has a body and gives (B, T) scores."""
    def __init__(self, gpt):
        super().__init__()
        self.body = gpt
        self.config = gpt.config

    def forward(self, idx, mask):
        """idx (B, T), mask (B, T) True in answers -> (B, T) log p(answer up to this token)."""
        # only for the N tokens of answers: logits (B, T, V) would be the largest tensor
        before = mask.roll(-1, dims=1)                    # the logits at t predict token t + 1
        logits = self.body.head(self.body.hidden(idx)[before]).float() # (N, V)
        logprobs = -F.cross_entropy(logits, idx[mask], reduction='none') # (N,)
        zeros = torch.zeros(mask.shape, device=idx.device)
        return zeros.masked_scatter(mask, logprobs).cumsum(1)

run = setup(config)
assert run.world_size == 1 or judge != 'human', 'judge=human needs one process, not torchrun'
ddp = run.world_size > 1 and parallel == 'ddp'
fsdp = run.world_size > 1 and parallel == 'fsdp'
assert not (fsdp and optimizer == 'muon'), 'fsdp cuts matrices, muon needs whole ones: use adamw'
total_batch_size = total_batch_size or batch_size * run.world_size
config['total_batch_size'] = total_batch_size # decides the order of the data, batch_size does not
per_pass = batch_size * run.world_size # examples in a micro-batch, all processes
nearest = max(1, round(total_batch_size / per_pass)) * per_pass
assert total_batch_size == nearest, (
    f'total_batch_size {total_batch_size} is not a multiple of batch_size {batch_size} x '
    f'{run.world_size} processes: --total_batch_size={nearest}')
stage = objective
ckpt_path = init_from or os.path.join(out_dir, 'sft.pt')
ckpt = load_checkpoint(ckpt_path, ['sft', 'dpo', 'rlhf'], f'python sft.py --out_dir={out_dir}')
ckpt['model_args']['dropout'] = dropout
tok = Tokenizer(ckpt['tokenizer'])
if objective == 'reward':
    raw_model = load_model(ckpt, run.device, ScalarModel)
    nn.init.zeros_(raw_model.head.weight) # all scores start at 0, and the loss at ln 2
else:
    raw_model = Policy(load_model(ckpt, run.device))
    reference = Policy(load_model(ckpt, run.device)).requires_grad_(False).eval()
    for p in reference.parameters():
        if run.device_type == 'cuda' and p.dim() > 1: # autocast reads matrices in this dtype anyway
            p.data = p.data.to(run.dtype)
block_size = raw_model.config.block_size
max_length = min(max_length or block_size, block_size)
resume_path = os.path.join(out_dir, f'{stage}.resume.pt')
out_path = os.path.join(out_dir, f'{stage}.pt')
config['starts_from'] = ckpt['metrics'].get('seconds') # its run time identifies the checkpoint
saved = None
if not show: # before answers are sampled
    saved = load_resume(resume_path, config, resume, may_change=['batch_size'])

# -----------------------------------------------------------------------------
# scores
def get_token_scores(model, rows, starts):
    """
    rows: prompts with their answers, lists of ids. starts: where the answers begin. Returns
    (n_rows, T): what an answer would score if it ended at this token.
    """
    x = pad_right(rows, tok.pad, run.device)
    with run.autocast():
        if objective == 'reward':
            return model(x)
        starts = torch.tensor(starts, device=run.device)[:, None]
        in_answer = torch.arange(x.size(1), device=run.device) >= starts
        mask = in_answer & (x != tok.pad)                 # (n_rows, T)
        return beta * (model(x, mask) - reference(x, mask))

def get_scores(model, rankings):
    """
    The scores of the answers of each ranking, [(K,), ...], read at the last token, <|end|>. Each
    answer is read once, however many pairs it is in.
    """
    rows = []
    starts = []
    for ranking in rankings:
        rows += ranking.answers
        starts += [ranking.start] * len(ranking.answers)
    scores = last_token(get_token_scores(model, rows, starts), rows) # (n_answers,)
    return scores.split([len(ranking.answers) for ranking in rankings])

@torch.no_grad()
def score_all(model, rankings):
    """As get_scores, for any number of rankings, on the CPU. The ranks share the work."""
    mine = rankings[run.rank::run.world_size]
    scores = []
    for first in range(0, len(mine), batch_size):
        scores += [values.cpu() for values in get_scores(model, mine[first:first + batch_size])]
    return all_gather_list(scores, run)

if show:
    trained = load_checkpoint(out_path, [stage], f'python reward.py --objective={objective}')
    trained_model = raw_model if objective == 'reward' else raw_model.body
    trained_model.load_state_dict(trained['weights'])
    question = [dict(role='user', content=show)]
    start = len(tok.render(question, prompt=True)[0])
    ids, _ = tok.render([*question, dict(role='assistant', content=answer)])
    with torch.no_grad():
        scores = get_token_scores(raw_model.eval(), [ids], [start])[0].tolist()
    for token, score in zip(ids[start:], scores[start:]):
        print0(f'{score:+8.3f} {tok.decode([token])}')
    sys.exit()

# -----------------------------------------------------------------------------
# rankings
def get_places(ranking, n):
    """
    A ranking of some of n answers -> {answer: its place}, best first. Raises ValueError.
        get_places([2, [0, 1], 3], 4) -> {2: 0, 0: 1, 1: 1, 3: 2}
    """
    places = {}
    n_listed = 0
    for place, listed in enumerate(ranking):
        tied = listed if isinstance(listed, list) else [listed]
        for i in tied:
            if type(i) is not int or not 0 <= i < n:
                raise ValueError(f'ranking {ranking} must hold numbers from 0 to {n - 1}')
            places[i] = place
        n_listed += len(tied)
    if len(places) < 2 or len(places) < n_listed:
        raise ValueError(f'ranking {ranking} must name two or more different answers')
    return places

def read_example(row):
    """
    A line of a preferences file -> a namespace. The K listed answers stand best first in answers
    (prompt and answer as tokens; start: where the answers begin), indices (in completions), places
    (equal for a tie) and gold (gold scores, 0 if there are no checks). length: of the longest.
    """
    for name in ('messages', 'completions', 'ranking'):
        if not isinstance(row.get(name), list):
            raise ValueError(f'{name} is missing, or is not a list')
    texts = row['completions']
    places = get_places(row['ranking'], len(texts))
    listed = {} # text -> index; of identical answers only the best one stays
    for i in places:
        listed.setdefault(texts[i], i)
    answers = []
    gold = []
    for text in listed:
        answer = dict(role='assistant', content=text)
        answers.append(tok.render(row['messages'] + [answer])[0])
        gold.append(grade(row['checks'], text)[1] if row.get('checks') else 0.0)
    return SimpleNamespace(
        answers=answers, start=len(tok.render(row['messages'], prompt=True)[0]),
        indices=list(listed.values()), places=torch.tensor([places[i] for i in listed.values()]),
        gold=torch.tensor(gold), n_same=len(places) - len(listed),
        length=max(len(ids) for ids in answers), n_tokens=sum(len(ids) for ids in answers))

def read_rankings(path):
    """(line number, object) of a preferences file, without the verdicts that a person took back."""
    rows = list(read_jsonl(path))
    taken_back = [row['undo'] for _, row in rows if 'undo' in row]
    for line, row in rows:
        if row in taken_back:
            taken_back.remove(row) # one only: the same verdict may be given twice
        elif 'undo' not in row:
            yield line, row

def load_examples(split):
    """All examples of the split that are not too long: a list of what read_example returns."""
    paths = [os.path.join(data_dir, f'preferences_{split}.jsonl')]
    if sample_prompts or judge == 'file':
        paths.insert(0, os.path.join(out_dir, f'preferences_{split}.jsonl'))
        if split == 'val' and os.path.exists(paths[0]): # self_agreement is measured on these only
            paths.pop()
    found = [path for path in paths if os.path.exists(path)]
    assert found, f'no {paths[-1]}: make it with `python prepare_data.py --data_dir={data_dir}`'
    examples = []
    n_too_long = 0
    n_bad = 0
    n_same = 0
    for path in found:
        for line, row in read_rankings(path):
            try:
                example = read_example(row)
            except (TypeError, ValueError) as e:
                assert skip_bad, f'{path}:{line}: {e}: mend it, or leave it out with --skip_bad=true'
                n_bad += 1
                continue
            n_same += example.n_same
            if example.length > max_length:
                n_too_long += 1
            elif len(example.answers) > 1 and 'repeat' not in row:
                examples.append(example)

    if n_too_long + n_bad + n_same:
        print0(f'{split}: left out {n_too_long} too long and {n_bad} bad examples, and '
               f'{n_same} answers that repeat a better one; {len(examples)} examples are left')
    assert examples, (f'{path}: no example fits into {max_length} tokens: '
                      'add shorter ones, or pretrain with a larger --block_size')
    for order, falling in (('first', False), ('last', True)):
        if all(e.indices == sorted(e.indices, reverse=falling) for e in examples):
            print0(f'warning: {split}: the best answer always stands {order}: if the judge saw them '
                   'in this order, it may have preferred the position')
    return examples

# -----------------------------------------------------------------------------
# pairs, and a report on them
def get_pairs(scores, rankings):
    """
    All pairs of all rankings -> margins, targets, weights, (n_pairs,) each. scores: one (K,) for
    each ranking. margins: score(better) - score(worse). targets: 1; 1/2 if the two are tied.
    weights: 1 / number of pairs in the ranking.
        scores 5, 3, 1 of places 0, 1, 1 -> [2, 4, 2], [1, 1, 1/2], [1/3, 1/3, 1/3]
    """
    margins = []
    targets = []
    weights = []
    for values, ranking in zip(scores, rankings):
        places = ranking.places
        better, worse = torch.triu_indices(len(places), len(places), offset=1)
        margins.append(values[better] - values[worse])
        targets.append(torch.where(places[better] < places[worse], 1.0, 0.5))
        weights.append(torch.full((len(better),), 1 / len(better)))
    margins = torch.cat(margins)
    return margins, torch.cat(targets).to(margins.device), torch.cat(weights).to(margins.device)

def share_above(margins):
    """Share of the margins above 0; those that are 0 count half."""
    return 0.5 + 0.5 * margins.sign().float().mean().item()

def wilson(p, n):
    """95% interval of a share p of n trials (Wilson 1927): good for few trials and near 0 and 1."""
    z2 = 1.96 ** 2
    centre = p + z2 / (2 * n)
    radius = math.sqrt(z2 * p * (1 - p) / n + z2 * z2 / (4 * n * n))
    return [(centre - radius) / (1 + z2 / n), (centre + radius) / (1 + z2 / n)]

def report(scores):
    """Print what the scores of the held-out rankings tell, and return it for the checkpoint."""
    lengths = [torch.tensor([len(ids) - r.start for ids in r.answers]).float() for r in val]
    margins, targets, _ = get_pairs(scores, val)
    gold, _, _ = get_pairs([ranking.gold for ranking in val], val)
    longer, _, _ = get_pairs(lengths, val)
    earlier, _, _ = get_pairs([-torch.tensor(ranking.indices) for ranking in val], val)
    is_pair = targets == 1 # tied answers have no right order
    is_right = (margins[is_pair] > 0).float()
    n = len(is_right)
    found = dict(n_pairs=n, interval=wilson(is_right.mean().item(), n))
    found['always_longer'] = share_above(longer[is_pair]) # what simple rules would reach
    found['always_first'] = share_above(earlier[is_pair])
    # calibration: how sure is it, from 0.5 to 1, and how often is it right? In ten bins
    sure = margins[is_pair].abs().sigmoid()
    bins = (20 * (sure - 0.5)).long().clamp(max=9)
    errors = torch.zeros(10).index_add(0, bins, sure - is_right)
    found['calibration_error'] = errors.abs().sum().item() / n
    both = torch.stack([torch.cat(scores), torch.cat(lengths)])
    found['length_correlation'] = both.corrcoef()[0, 1].nan_to_num().item() # NaN: all as long
    known = is_pair & (gold != 0)
    if known.any():
        found['ceiling'] = share_above(gold[known]) # of a perfect model: the labeller errs in the rest
        is_gold = ((margins > 0) == (gold > 0))[known].float()
        by_gap = gold[known].abs().argsort().chunk(3)
        found['by_gap'] = [is_gold[part].mean().item() for part in by_gap] # small, middle, large
    for name, value in found.items():
        values = value if isinstance(value, list) else [value]
        print0(f'{name:20s}', *[f'{number:.3f}' for number in values])

    pairs = []
    for ranking in val:
        for better, worse in itertools.combinations(ranking.answers, 2):
            pairs.append([ranking.start, better, worse])
    print0('its most confident mistakes, as the labeller sees it:')
    mistakes = torch.where(is_pair & (margins < 0))[0]
    for k in mistakes[margins[mistakes].argsort()[:10]].tolist():
        start, better, worse = pairs[k]
        print0(f'{margins[k]:+.2f} {tok.decode_answer(better[:start])}\n'
               f'      labeller: {tok.decode_answer(better[start:])}\n'
               f'      model:    {tok.decode_answer(worse[start:])}')
    return found

# -----------------------------------------------------------------------------
# answers of the SFT model, ranked by the simulated labeller or by a person
def read_human(path):
    """The verdicts of a person in a preferences file, if there is one."""
    rows = read_rankings(path) if os.path.exists(path) else []
    return [row for _, row in rows if row.get('judge') == 'human']

def sample_rankings(split):
    """
    Sample answers to prompts, have them ranked, write out_dir/preferences_SPLIT.jsonl. Returns the
    share of pairs that the labeller orders alike when asked twice, and the tokens processed.
    """
    path = os.path.join(data_dir, f'prompts_{split}.jsonl')
    prompts = []
    for row, ids in read_prompts(path, tok, need_checks=judge == 'labeller'):
        if len(ids) + max_new_tokens + 1 <= max_length: # + 1 for <|end|>
            prompts.append((row, ids))
    assert prompts, (f'{path}: no prompt leaves room for {max_new_tokens} new tokens in '
                     f'{max_length}: lower --max_new_tokens')
    rng = np.random.default_rng((seed, split == 'val')) # the same labeller on all ranks
    prompts = [prompts[i] for i in rng.permutation(len(prompts))[:sample_prompts]]
    prompts.sort(key=lambda prompt: len(prompt[1])) # so that little is padded

    policy = load_model(ckpt, run.device).eval()
    seed_step(seed, int(split == 'val'), run.rank) # each rank draws its own random numbers
    mine = prompts[run.rank::run.world_size]
    answers = [] # for each of my prompts a list of texts
    n_tokens = 0
    for first in range(0, len(mine), sample_batch):
        queries = []
        for _, ids in mine[first:first + sample_batch]:
            queries += [ids] * sample_answers
        with run.autocast():
            responses = generate(policy, queries, max_new_tokens, tok.end, temperature)
        n_tokens += sum(len(ids) for ids in queries + responses)
        texts = [tok.decode_answer(ids) for ids in responses]
        for i in range(0, len(texts), sample_answers):
            answers.append(texts[i:i + sample_answers])
        print0(f'{split}: answered {len(answers)} of {len(mine)} prompts')
    answered = []
    for (row, _), texts in zip(prompts, all_gather_list(answers, run)):
        # each text once; '' stays, since PPO may answer it too
        answered.append({**row, 'completions': list(dict.fromkeys(texts))})
    if judge == 'human':
        ask_person([answered[i] for i in rng.permutation(len(answered))])
        return None, n_tokens

    rows = []
    n_pairs = 0
    n_same = 0
    for row in answered:
        gold = [grade(row['checks'], text)[1] for text in row['completions']]
        ranking = simulated_ranking(gold, labeller_noise, rng)
        second = simulated_ranking(gold, labeller_noise, rng)
        if len(ranking) < 2: # all answers are equally good: nothing to learn
            continue
        rows.append({**row, 'ranking': ranking})
        for better, worse in itertools.combinations(ranking, 2):
            n_pairs += 1
            n_same += second.index(better) < second.index(worse)
    assert rows, (f'{path}: the answers to each prompt are equally good, nothing to learn: '
                  'raise --sample_answers or --temperature')
    if run.master:
        path = os.path.join(out_dir, f'preferences_{split}.jsonl')
        write_jsonl(path, rows + read_human(path)) # a person's verdicts are never lost
    print0(f'{split}: {len(rows)} prompts ranked, {n_pairs} pairs; when asked twice, the labeller '
           f'orders {n_same / n_pairs:.1%} of them alike')
    return n_same / n_pairs, all_sum(n_tokens)[0] # all_sum waits until the file is written

HELP = 'b>a=c: b is the best, a and c are equally good; s skip, u undo, q stop'

def read_verdict(shown):
    """A person's verdict on the answers shown (indices): a ranking, or one of 's', 'u', 'q'."""
    while True:
        try:
            text = input('> ').replace(' ', '').lower()
        except EOFError: # Ctrl-D, or the end of a file
            return 'q'
        if text in ('s', 'u', 'q'):
            return text
        try:
            ranking = []
            for place in text.split('>'):
                tied = [shown[LETTERS.index(letter)] for letter in place.split('=')]
                ranking.append(tied if len(tied) > 1 else tied[0])
            get_places(ranking, len(shown))
            return ranking
        except (IndexError, ValueError): # no such letter, or one twice
            print(HELP)

def append_row(path, row):
    """Append an object to a .jsonl in one write: two programs never mix their lines."""
    with open(path, 'ab', buffering=0) as f:
        f.write((json.dumps(row, ensure_ascii=False) + '\n').encode('utf-8', 'replace'))

def ask_person(answered):
    """
    A person ranks answers in the terminal. Each verdict is appended to preferences_train.jsonl at
    once, so the next session goes on where this one stopped. Every tenth question comes again,
    with its answers in reverse order: its second verdict holds the first one as "repeat".
    """
    path = os.path.join(out_dir, 'preferences_train.jsonl')
    os.makedirs(out_dir, exist_ok=True) # append_row does not make it
    verdicts = read_human(path)
    n_old = len(verdicts)
    asked = [(row['messages'], row['completions']) for row in verdicts]
    waiting = [row for row in answered if len(row['completions']) > 1]
    waiting = [row for row in waiting if (row['messages'], row['completions']) not in asked]
    print(HELP)
    while waiting:
        row = waiting.pop(0)
        print(f'\n{len(waiting)} left:', row['messages'][-1]['content'])
        shown = list(range(len(row['completions'])))
        if 'repeat' in row:
            shown.reverse()
        for letter, i in zip(LETTERS, shown):
            print(f'  {letter}) {row["completions"][i]}')
        verdict = read_verdict(shown)
        if verdict == 'q':
            break
        if verdict == 'u':
            waiting.insert(0, row)
            if len(verdicts) > n_old:
                row = verdicts.pop()
                append_row(path, dict(undo=row)) # a new file could lose what others append now
                again = {**row, 'repeat': row['ranking']} # its planned repetition goes, too
                waiting = [row] + [other for other in waiting if other != again]
        elif verdict != 's':
            row = {**row, 'ranking': verdict, 'judge': 'human'}
            append_row(path, row)
            verdicts.append(row)
            if len(verdicts) % 10 == 0 and 'repeat' not in row:
                waiting.insert(5, {**row, 'repeat': verdict}) # after five others
    compare(verdicts)

def agreement(one, two):
    """Two judges of the same pairs; one, two: their margins (n_pairs,), 0 for a tie. Returns the
    share ordered alike and kappa (Cohen 1960): 1 if all are, 0 if as many as by chance."""
    alike = (one.sign() == two.sign()).float().mean().item()
    ties = [(margins == 0).float().mean().item() for margins in (one, two)]
    # by chance: both say "tie", or both say "not tied" and then agree in half of the pairs
    chance = ties[0] * ties[1] + (1 - ties[0]) * (1 - ties[1]) / 2
    return alike, (alike - chance) / max(1e-9, 1 - chance)

def compare(verdicts):
    """Print how often people agree with their own first verdicts, and with other judges."""
    firsts = [row for row in verdicts if 'repeat' not in row]
    repeats = [row for row in verdicts if 'repeat' in row]
    before = []
    for row in repeats:
        places = get_places(row['repeat'], len(row['completions']))
        scores = [-places.get(i, math.nan) for i in read_example(row).indices]
        before.append(torch.tensor(scores)) # NaN: ranked the second time only
    judges = {'yourself': ([read_example(row) for row in repeats], before)}
    checked = [read_example(row) for row in firsts if row.get('checks')]
    seen = []
    for example in checked:
        gold, groups = example.gold.unique(return_inverse=True) # equal gold scores stay tied
        seen.append((gold + labeller_noise * torch.randn(gold.shape))[groups])
    judges['the labeller'] = (checked, seen)
    if objective == 'reward' and os.path.exists(out_path):
        trained = load_checkpoint(out_path, [stage], f'python reward.py --out_dir={out_dir}')
        last_model = load_model(trained, run.device, ScalarModel).eval()
        examples = [read_example(row) for row in firsts]
        judges['the last reward model'] = (examples, score_all(last_model, examples))
    for name, (examples, scores) in judges.items():
        if examples:
            yours, _, _ = get_pairs([-example.places for example in examples], examples)
            theirs, _, _ = get_pairs(scores, examples)
            known = ~theirs.isnan()
            alike, kappa = agreement(yours[known], theirs[known])
            print(f'you agree with {name} on {alike:.0%} of {known.sum()} pairs, kappa {kappa:.2f}')

t0 = time.time()
sampled = {} # stays empty if nothing is sampled, or if a resumed run has sampled before
reward_path = os.path.join(out_dir, 'reward.pt')
if objective == 'dpo' and judge == 'labeller' and sample_prompts and os.path.exists(reward_path):
    reward = load_checkpoint(reward_path, ['reward'], f'python reward.py --out_dir={out_dir}')
    made_by = ('starts_from', 'judge', 'sample_prompts', 'sample_answers', 'labeller_noise')
    if all(reward['config'][name] == config[name] for name in made_by):
        print0(f'learning from the rankings in {out_dir} that the reward model has learned from')
        judge = 'file'
        sampled = dict(self_agreement=reward['metrics'].get('self_agreement'))
if judge != 'file' and sample_prompts and not saved:
    self_agreement, n_sampled = sample_rankings('train')
    if judge == 'labeller':
        self_agreement, n_val = sample_rankings('val')
        n_sampled += n_val
    sampled = dict(self_agreement=self_agreement, n_sampled=n_sampled, seconds=time.time() - t0)

# -----------------------------------------------------------------------------
# data
train = load_examples('train')
val = load_examples('val')
# the first of one shuffled order: what a small share holds is in every larger one
order = np.random.default_rng(seed).permutation(len(train))
train = [train[i] for i in sorted(order[:round(share * len(train))])]
assert len(train) >= total_batch_size, (
    f'{len(train)} examples do not fill one step of {total_batch_size}: '
    f'--total_batch_size=0 --batch_size={max(1, len(train) // run.world_size)}')
steps_per_epoch = len(train) // total_batch_size
max_iters = epochs * steps_per_epoch
assert any(ranking.places[0] < ranking.places[-1] for ranking in val), 'validation: only ties'
print0(f'data: {len(train):,} examples, {len(val):,} for validation; {total_batch_size} a step, '
       f'{steps_per_epoch:,} steps an epoch, {max_iters:,} steps')

@functools.lru_cache(maxsize=1)
def get_order(epoch):
    """A seeded shuffle, the same on all ranks -> (steps_per_epoch, total_batch_size), of train."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(train))[:steps_per_epoch * total_batch_size]
    # similar lengths share a step, so that little is padded: sort within pools of 16 steps
    pool_size = 16 * total_batch_size
    by_length = []
    for first in range(0, len(order), pool_size):
        pool = order[first:first + pool_size]
        by_length += sorted(pool, key=lambda j: train[j].length)
    order = np.array(by_length).reshape(steps_per_epoch, total_batch_size)
    return rng.permutation(order) # shuffles the rows, which are the steps

def get_batches(step):
    """The micro-batches of this process in this step; they depend on (seed, step, rank) only."""
    order = get_order(step // steps_per_epoch)[step % steps_per_epoch]
    mine = order[run.rank::run.world_size]
    batches = []
    for first in range(0, len(mine), batch_size):
        batches.append([train[j] for j in mine[first:first + batch_size]])
    return batches

# -----------------------------------------------------------------------------
# optimizer, and the state of an interrupted run
whole = copy.deepcopy(raw_model) if fsdp else raw_model # evaluates without other processes
if fsdp:
    shard(raw_model, run)
optimizers = make_optimizers(raw_model, learning_rate, weight_decay, (beta1, beta2),
                             kind=optimizer, momentum=momentum)
first_step = 0
progress = dict(ema_loss=0.0, seconds=0.0, n_tokens=0)
progress.update(sampled)
if saved:
    set_state(raw_model, optimizers, saved['state'])
    first_step = saved['step']
    progress = saved['progress']
model = raw_model
if ddp: # averages the gradients over all ranks; raw_model is the same without this wrapper
    model = DDP(model, device_ids=[run.device.index] if run.device_type == 'cuda' else None)

# -----------------------------------------------------------------------------
# evaluation and learning rate
def evaluate():
    """
    val_loss: mean loss on validation data. val_accuracy: share of pairs that are ordered as by the
    labeller. val_gold_accuracy: as by the gold scores, of the pairs whose gold scores differ.
    """
    if fsdp:
        gather(raw_model, whole)
    whole.eval()
    margins, targets, weights = get_pairs(score_all(whole, val), val)
    whole.train()
    gold, _, _ = get_pairs([ranking.gold for ranking in val], val)
    loss = F.binary_cross_entropy_with_logits(margins, targets, weights, reduction='sum')
    is_right = margins > 0
    found = dict(val_loss=loss.item() / len(val))
    found['val_accuracy'] = is_right[targets == 1].float().mean().item()
    is_known = (targets == 1) & (gold != 0) # 0: no checks, or equally good
    if is_known.any():
        is_gold = is_right == (gold > 0)
        found['val_gold_accuracy'] = is_gold[is_known].float().mean().item()
    return found

def get_lr(step):
    """Linear warm-up, then linear decay to 0."""
    warmup = (step + 1) / (warmup_iters + 1)
    decay = (max_iters - step) / max(1, max_iters - warmup_iters)
    return learning_rate * min(warmup, decay)

# -----------------------------------------------------------------------------
# the loop
log = open_log(os.path.join(out_dir, f'{stage}.jsonl'), first_step)
catch_signals(run)
ema_loss = progress['ema_loss'] # running mean of the loss, for the log lines
n_tokens = progress['n_tokens'] # read so far
started = time.time() - progress['seconds'] # as if the run had never been interrupted
t0 = time.time()
for step in range(first_step, max_iters + 1):
    # evaluate: all ranks take part
    if step % eval_interval == 0 or step == max_iters:
        val_metrics = evaluate()
        val_text = ' | '.join(f'{name} {value:.4f}' for name, value in val_metrics.items())
        print0(f'step {step:6d} | {val_text}')
        log(step=step, **val_metrics)
    if step == max_iters:
        break

    # save, and leave after Ctrl-C or SIGTERM
    leave = should_stop(run)
    if step > first_step and (leave or step % save_interval == 0):
        progress.update(ema_loss=ema_loss, seconds=time.time() - started, n_tokens=n_tokens)
        state = get_state(raw_model, optimizers)
        save_resume(resume_path, step, state, config, **progress)
    assert not leave, f'stopped at step {step} and saved: the same command continues from there'

    # The loss is a sum over the tokens to learn (or rankings), divided by n_valid, their number in
    # all micro-batches and ranks. A mean of means would give some tokens more weight than others.
    t1 = time.time()
    seed_step(seed, step, run.rank)
    batches = get_batches(step)
    n_valid = 0
    n_seen = 0
    for batch in batches:
        n_valid += len(batch)
        n_seen += sum(ranking.n_tokens for ranking in batch)
    n_valid, n_seen = all_sum(n_valid, n_seen)
    n_tokens += n_seen

    # forward and backward
    lossf = 0.0 # loss of this step, as a float
    n_pairs = 0
    n_right = 0
    for micro, batch in enumerate(batches):
        if fsdp: # reduce gradients only once, as ddp does below
            raw_model.set_requires_gradient_sync(micro == len(batches) - 1)
        if ddp: # exchange gradients only once, with the last micro-batch
            model.require_backward_grad_sync = micro == len(batches) - 1
        margins, targets, weights = get_pairs(get_scores(model, batch), batch) # (n_pairs,) each
        loss = F.binary_cross_entropy_with_logits(margins, targets, weights, reduction='sum')
        loss = loss / max(1, n_valid)
        (loss * run.world_size).backward() # ddp and fsdp average; we need the sum
        lossf += loss.detach() # .item() would wait for the GPU in each micro-batch
        n_pairs += (targets == 1).sum().item() # ties have no right order
        n_right += ((targets == 1) & (margins > 0)).sum().item()
    lossf, n_pairs, n_right = all_sum(lossf, n_pairs, n_right)
    accuracy = n_right / max(1, n_pairs) # of the pairs of this step

    # clip; one step with a gradient that is not finite would ruin the weights
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    if fsdp:
        norm = norm.full_tensor()
    norm = norm.item()
    assert math.isfinite(norm), (
        f'step {step}: loss {lossf}, gradient norm {norm}: lower --learning_rate and use '
        f'--resume=false, which discards {resume_path}, the last good state')

    # update
    lr = get_lr(step)
    for opt in optimizers:
        for group in opt.param_groups:
            group['lr'] = lr
        opt.step()
    raw_model.zero_grad(set_to_none=True)

    # log
    ema_loss = 0.9 * ema_loss + 0.1 * lossf
    if step % log_interval == 0 or step == max_iters - 1:
        dt = time.time() - t1
        left = (time.time() - t0) / (step + 1 - first_step) * (max_iters - step - 1)
        smooth_loss = ema_loss / (1 - 0.9 ** (step + 1)) # corrects the start at 0, as Adam does
        print0(f'step {step:6d} | loss {smooth_loss:.4f} | lr {lr:.2e} | norm {norm:.3f} | '
               f'{n_seen / dt:,.0f} tok/s | accuracy {accuracy:.2f} | '
               f'{(step + 1) / max_iters:.0%}, {left / 60:.1f} min left')
        log(step=step, loss=lossf, lr=lr, norm=norm,
            tokens_per_second=n_seen / dt, accuracy=accuracy)

# -----------------------------------------------------------------------------
# normalise: mean 0 and standard deviation 1 over the answers of the training data
whole.eval()
found = report(score_all(whole, val))
n_forward = progress.get('n_sampled', 0) # tokens without a backward pass: a third of the cost
if objective == 'reward':
    some = train[::math.ceil(len(train) / 1000)] # enough to know a mean
    scores = torch.cat(score_all(whole, some))
    whole.mean.copy_(scores.mean())
    whole.std.copy_(scores.std().clamp(min=1e-4))
    print0(f'mean {scores.mean():.3f} and std {scores.std():.3f} of the scores become 0 and 1')
    n_forward += sum(ranking.n_tokens for ranking in some)
else:
    n_forward += n_tokens # of the reference

# -----------------------------------------------------------------------------
# save
seconds = time.time() - started
if run.master:
    mean_length = sum(r.n_tokens for r in train) / sum(len(r.answers) for r in train)
    flops = raw_model.body.flops_per_token(mean_length) * (n_tokens + n_forward / 3)
    metrics = dict(val_metrics, **found, seconds=seconds, tokens=n_tokens, flops=flops,
                   self_agreement=progress.get('self_agreement'))
    weights = whole.state_dict() if objective == 'reward' else whole.body.state_dict()
    save_checkpoint(out_path, stage, weights, asdict(raw_model.config), tok,
                    config, max_iters, metrics)
    print(f'saved {out_path}: {val_text}, {seconds:.0f} s')
cleanup(run)
