"""
The benchmarks of eval.py: prompts and predictions against a plain loop written here, the figures by hand, answers read
from samples, programs that try to get out, and what happens to a run that is interrupted.
"""
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from conftest import ROOT, definitions, make_spec, write_rows
from model import GPT, GPTConfig, Tokenizer

CORE = ROOT.parent / 'shared' / 'data' / 'core'
TASKS = json.loads((ROOT / 'config' / 'benchmarks.json').read_text(encoding='utf-8'))
needs_data = pytest.mark.skipif(not CORE.exists(), reason='needs the files of CORE')

def one_process(rank=0, world_size=1):
    return SimpleNamespace(device=torch.device('cpu'), rank=rank, world_size=world_size, master=rank == 0,
                           autocast=lambda: torch.autocast('cpu', enabled=False))

def functions(**settings):
    """The functions of eval.py, on one CPU process."""
    return definitions('eval.py', **{'run': one_process(), 'batch_size': 8, **settings})

TOK = Tokenizer(make_spec())

def make_model(arch='llama', block_size=300, **more):
    """Random weights, large enough for clear preferences."""
    torch.manual_seed(1)
    config = GPTConfig(arch=arch, vocab_size=TOK.n_vocab, block_size=block_size, n_layer=2, n_head=4, n_embd=32, **more)
    model = GPT(config).eval()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model

# -----------------------------------------------------------------------------
# the oracle: CORE's task forms in the plainest way, one forward pass per choice, no batch, no cache

def write_example(row, option, delimiter):
    """-> the text of a row with one of its options."""
    if 'choices' in row:
        return row['query'] + delimiter + row['choices'][option]
    if 'context_options' in row:
        return row['context_options'][option] + delimiter + row['continuation']
    return row['context'].strip() + delimiter + row['continuation']

def plain_prompts(rows, i, task):
    """-> [(text without the answer, text with it)] of the options of row i."""
    row = rows[i]
    others = rows[:i] + rows[i + 1:]
    shots = random.Random(1234 + i).sample(others, min(task['shots'], len(others)))
    before = ''
    for shot in shots:
        before += write_example(shot, shot.get('gold', 0), task['delimiter']) + '\n\n'
    prompts = []
    for option in range(len(row.get('choices') or row.get('context_options') or [0])):
        text = before + write_example(row, option, task['delimiter'])
        answer = row['choices'][option] if 'choices' in row else row['continuation']
        assert text.endswith(answer)
        without = text[:len(text) - len(answer)]
        if without.endswith(' '): # ' owl' is one token
            without = without[:-1]
        prompts.append((without, text))
    return prompts

@torch.no_grad()
def plain_answers(model, tok, rows, task, n):
    """-> for the first n rows [(losses, is the answer greedy)]"""
    found = []
    for i in range(n):
        encoded = []
        for without, text in plain_prompts(rows, i, task):
            a, b = tok.encode(without), tok.encode(text)
            start = next((k for k in range(len(a)) if a[k] != b[k]), len(a))
            encoded.append(([tok.eot] + b[:start], b[start:]))
        if 'choices' in rows[i]: # all options see the same context
            longest = max(len(answer) for _, answer in encoded)
            encoded = [(context[-(model.config.block_size + 1 - longest):], answer) for context, answer in encoded]
        losses, greedy = [], False
        for context, answer in encoded:
            ids = (context + answer)[-(model.config.block_size + 1):]
            logits = model(torch.tensor([ids[:-1]]))[0, -len(answer):]
            losses.append(F.cross_entropy(logits, torch.tensor(answer)).item())
            greedy = logits.argmax(-1).tolist() == answer
        found.append((losses, greedy))
    return found

def same_answers(model, tok, rows, task, n):
    """How many of the first n answers of eval.py are those of the plain loop?"""
    f = functions()
    questions = [f.read_question(row) for row in rows]
    answers = f.ask(model, tok, questions[:n], task, questions)
    n_same = 0
    for row, answer, (losses, greedy) in zip(rows, answers, plain_answers(model, tok, rows, task, n)):
        assert answer['losses'] == pytest.approx(losses, abs=2e-4)
        right = losses.index(min(losses)) == row['gold'] if 'gold' in row else greedy
        n_same += answer['right'] == right
    return n_same

def made_up(kind, n=24):
    """Rows of one kind. Some are much longer than others, and options have one token or many."""
    rng = random.Random(kind)
    words = 'Anna has the owl cat dog fox, Say it. Bela 12 \n'.split(' ')
    def text(low, high):
        return ' '.join(rng.choices(words, k=rng.randint(low, high))).strip() + rng.choice(['', '.', '!'])
    rows = []
    for _ in range(n):
        if kind == 'choices':
            rows.append(dict(query=text(2, 20) + rng.choice(['', ' ']), choices=[text(1, 6) + c for c in 'abcd'], gold=rng.randrange(4)))
        elif kind == 'schema':
            rows.append(dict(context_options=[text(2, 9) + c for c in 'ab'], continuation=text(1, 5), gold=rng.randrange(2)))
        else:
            rows.append(dict(context=' ' + text(2, 20) + '\n', continuation=rng.choice(['owl', 'cat', 'the dog'])))
    return rows

@pytest.mark.parametrize('arch,block_size,more', [
    ('gpt2', 300, {}), ('llama', 300, dict(key_shift=True, n_kv_head=2)), ('llama', 60, dict(key_shift=True, qk_norm=True))])
@pytest.mark.parametrize('kind', ['choices', 'schema', 'text'])
def test_answers_are_those_of_a_plain_loop(kind, arch, block_size, more):
    """With a context of 60 tokens most questions are cut on their left."""
    model = make_model(arch, block_size, **more)
    for shots, delimiter in ((0, ' '), (3, '\nAnswer: ')):
        task = dict(shots=shots, delimiter=delimiter)
        assert same_answers(model, TOK, made_up(kind), task, 24) == 24

@needs_data
def test_the_questions_of_core_are_written_as_in_its_definition():
    """Every prompt, letter by letter: the first questions of each of the tasks that are at hand."""
    f = functions()
    n_tasks = 0
    for name, task in TASKS.items():
        path = CORE / f'{task["file"]}.jsonl'
        if not path.exists():
            continue
        n_tasks += 1
        questions, _ = f.load_benchmark(path)
        random.Random(f.SUBSET_SEED).shuffle(questions)
        rows = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
        random.Random(1337).shuffle(rows)
        for i in range(0, len(rows), len(rows) // 10):
            pairs = [f.join(questions[i], k, task['delimiter']) for k in range(len(questions[i]['choices']))]
            before = f.few_shot(questions, i, task)
            assert [(before + a, before + a + b) for a, b in pairs] == plain_prompts(rows, i, task)
    assert n_tasks == 18

@needs_data
def test_answers_to_core_are_those_of_a_plain_loop():
    model = make_model(block_size=200)
    for name in ('boolq', 'winograd', 'bigbench_language_identification', 'lambada_openai'):
        rows = [json.loads(line) for line in (CORE / f'{TASKS[name]["file"]}.jsonl').open(encoding='utf-8')]
        assert same_answers(model, TOK, rows[:300], TASKS[name], 8) == 8
