"""
The benchmarks of eval.py: prompts and predictions against a plain loop written here, the figures by hand, answers read
from samples, programs that try to get out, and what happens to a run that is interrupted.
"""
import itertools
import json
import math
import os
import random
import socket
import time
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

# -----------------------------------------------------------------------------
# HumanEval runs programs that a model wrote

needs_fork = pytest.mark.skipif(not hasattr(os, 'fork'), reason='programs are run on Linux and macOS only')

ROW = dict(prompt='import math\n\ndef double(x):\n    """Twice x."""\n', entry_point='double',
           test='def check(f):\n    assert f(2) == 4 and f(math.pi) == 2 * math.pi\n')

@needs_fork
@pytest.mark.parametrize('answer,is_right', [
    ('    return 2 * x\n', True), ('    return 2 + x\n', False), ('    pass\n', False), ('', False), ('    return (\n', False),
    ('    return 2 * x\n\nprint(double(1/0))\n# and on it goes', True), # a base model does not stop by itself
    ('    y = x\n\n    return x + y', True),
    ('Here it is:\n```python\ndef double(x):\n    return x + x\n```\nAsk me anything!', True),
    ('```\n    return x + x\n```', True), ('def double(x):\n    return x + math.floor(x)\n', False)], ids=repr)
def test_an_answer_to_humaneval(answer, is_right):
    f = functions()
    assert f.passes(f.code_of(ROW, answer)) == is_right

# Programs that an honest sandbox must survive. Each must count as failed.
HOSTILE = {
    'fork bomb': 'while True:\n    os.fork()',
    'fork bomb that hides its errors': 'while True:\n    try:\n        os.fork()\n    except OSError:\n        pass',
    '10 GB': 'x = bytearray(10 * 2**30)',
    'endless loop': 'while True:\n    pass',
    'endless output': 'while True:\n    os.write(1, b"x" * 10**6)\n    os.write(2, b"x" * 10**6)',
    'deleting files': 'import shutil\nshutil.rmtree(OUTSIDE)\nos.remove(SECRET)',
    'reading the environment': 'assert any(name in os.environ for name in ("PATH", "HOME", "PYTHONPATH"))',
    'killing the parent': 'os.kill(os.getppid(), 9)\nos.kill(0, 9)\nwhile True:\n    pass',
    'swallowing signals': 'import signal\nfor n in range(1, 32):\n    try:\n        signal.signal(n, signal.SIG_IGN)\n'
                          '    except OSError:\n        pass\nwhile True:\n    pass',
    'daemon': 'os.setsid()\nif os.fork():\n    os._exit(0)\nimport time\ntime.sleep(3)\nopen(SECRET, "w").write("I live")',
    'symlink out': 'os.symlink(OUTSIDE, "link")\nopen("link/new", "w").write("out")',
    'huge file': 'f = open("big", "wb")\nfor _ in range(100):\n    f.write(b"x" * 10**6)\n    f.flush()',
    'sys.exit(0)': 'sys.exit(0)',
    'os._exit(0)': 'os._exit(0)',
    'guessing the word': 'for fd in range(3, 64):\n    try:\n        os.write(fd, b"0" * 32)\n    except OSError:\n        pass\nos._exit(0)',
    'reading a file': 'assert open(SECRET).read() == "secret"\nos._exit(0)',
    'network': 'import socket\nsocket.create_connection(("127.0.0.1", PORT), 1).send(b"hello")\nos._exit(0)',
}

# what only a folder and a network of its own can stop
NEEDS_SPACE = ['deleting files', 'symlink out', 'reading a file', 'network']

@pytest.fixture(scope='module')
def has_space():
    """Root has it, and others on most systems."""
    return functions().passes('import os\nassert os.listdir("/") == []')

def contents(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob('*')}

@needs_fork
@pytest.mark.parametrize('name', HOSTILE)
def test_a_hostile_program_is_contained_and_fails(name, has_space, tmp_path):
    if name in NEEDS_SPACE and not has_space:
        pytest.skip('this system gives no folder and network of its own')
    outside = tmp_path / 'outside'
    outside.mkdir()
    (outside / 'secret').write_text('secret')
    before = contents(tmp_path)
    f = functions(CODE_SECONDS=1)
    names = dict(OUTSIDE=str(outside), SECRET=str(outside / 'secret'))
    head = 'import os, sys\n' + ''.join(f'{key} = {value!r}\n' for key, value in names.items())
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        server.listen()
        server.settimeout(0.1)
        start = time.monotonic()
        assert not f.passes(f'{head}PORT = {server.getsockname()[1]}\n{HOSTILE[name]}\n')
        assert time.monotonic() - start < 30
        with pytest.raises(TimeoutError): # nobody has called
            server.accept()
    assert contents(tmp_path) == before

@needs_fork
def test_what_a_program_finds():
    """No environment, no open file, an empty folder, no second process, no gigabyte."""
    with open(ROOT / 'eval.py', encoding='utf-8') as opened:
        os.set_inheritable(opened.fileno(), True)
        assert functions().passes(f'''
import os, sys
assert not [name for name in os.environ if name != 'LC_CTYPE'], os.environ # Python sets this one
assert os.listdir('.') == []
def fails(do, *args):
    try:
        do(*args)
    except (OSError, MemoryError):
        return True
assert fails(os.fstat, {opened.fileno()}) and fails(os.fork) and fails(bytearray, 10**9)
''')

# -----------------------------------------------------------------------------
# sampled answers

@pytest.mark.parametrize('text,number', [
    ('#### 18', 18), ('He has $1,234.50.', 1234.5), ('#### $1,234.50.', 1234.5), ('It is -3', -3), ('#### -3', -3),
    ('2 + 5 = 7\n#### 7 apples', 7), ('#### 7 apples and 3 pears', 7), ('1/2', 0.5), ('#### 1/2 of it', 0.5),
    ('First 3, then 4', 4), ('#### 5\n\nQuestion: What is 9 + 9?\nAnswer: 18\n#### 18', 5),
    ('It is 6.\n\nQuestion: What is 9 + 9?', 6), ('#### none, but 8 before', 8), ('12 of them ####', 12)])
def test_the_number_of_an_answer(text, number):
    f = functions()
    assert f.grade({'number': number}, f.number_of(text))[0]
    assert not f.grade({'number': number + 1}, f.number_of(text))[0]

def test_answers_without_a_number_are_wrong():
    f = functions()
    assert not any(f.grade({'number': n}, f.number_of(text))[0] for n in (0, 1) for text in ('', '####', 'I do not know.'))

@pytest.mark.skipif(not CORE.exists(), reason='needs gsm8k_test.jsonl')
def test_the_official_answers_to_gsm8k_are_right():
    f = functions()
    n_right = 0
    for line in (CORE.parent / 'gsm8k_test.jsonl').read_text(encoding='utf-8').splitlines():
        answer = json.loads(line)['answer']
        number = float(answer.split('####')[1].replace(',', ''))
        n_right += f.grade({'number': number}, f.number_of(answer))[0]
    assert n_right == 1319

def test_pass_at_k_is_an_enumeration():
    """Of all subsets of k samples, the share that has a right one."""
    pass_at_k = functions().pass_at_k
    for n in range(1, 8):
        for n_right in range(n + 1):
            for k in range(1, n + 1):
                hits = [min(subset) < n_right for subset in itertools.combinations(range(n), k)]
                assert pass_at_k(n, n_right, k) == pytest.approx(sum(hits) / len(hits))
