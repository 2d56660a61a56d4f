"""
The benchmarks of eval.py: prompts and predictions against a plain loop written here, the figures by hand, answers read
from samples, programs that try to get out, and what happens to a run that is interrupted.
"""
import base64
import itertools
import json
import math
import os
import random
import socket
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from conftest import ROOT, definitions, fails, make_spec
from model import GPT, GPTConfig, Tokenizer, save_checkpoint

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
        assert same_answers(model, TOK, made_up(kind), task, 10) == 10

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
        for i in range(0, len(rows), len(rows) // 4):
            pairs = [f.join(questions[i], k, task['delimiter']) for k in range(len(questions[i]['choices']))]
            before = f.few_shot(questions, i, task)
            assert [(before + a, before + a + b) for a, b in pairs] == plain_prompts(rows, i, task)
    assert n_tasks == 18

@needs_data
def test_answers_to_core_are_those_of_a_plain_loop():
    model = make_model(block_size=200)
    for name in ('boolq', 'winograd', 'lambada_openai'):
        rows = [json.loads(line) for line in (CORE / f'{TASKS[name]["file"]}.jsonl').open(encoding='utf-8')]
        assert same_answers(model, TOK, rows[:300], TASKS[name], 4) == 4

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
    f = functions(CODE_SECONDS=0.5)
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

def sampled(row, generated, is_chat=False, **settings):
    """What answer_exam makes of a question when the model says these texts, one after the other."""
    f = functions(max_exam_tokens=100, temperature=0.7, seed=1, **settings)
    said = []
    def generate(model, prompts, n, stop, heat):
        f.space['asked'] = (prompts, n, stop, heat)
        texts = [generated[len(said) + k] for k in range(len(prompts))]
        said.extend(texts)
        return [TOK.encode(text) + [stop] for text in texts]
    f.space['generate'] = generate
    answers = f.answer_exam(make_model(), TOK, [f.read_question(row)], dict(shots=0, delimiter=None), is_chat)
    return answers[0], f

GSM = dict(messages=[dict(role='user', content='2 + 3?')], checks=dict(number=5.0), answer='2+3=5\n#### 5')

def test_sampled_answers_are_marked():
    answer, f = sampled(GSM, ['#### 5', 'It is 6', 'so 5', '#### 5 6'], n_samples=4, batch_size=3)
    assert answer['n_right'] == 3 and answer['right'] == 0.75 and answer['texts'][1] == 'It is 6'
    prompts, n, stop, heat = f.space['asked']
    assert prompts[0] == [TOK.eot] + TOK.encode('Question: 2 + 3?\nAnswer:') and (stop, heat) == (TOK.eot, 0.7)
    result = f.summarize([dict(answer, n_right=3)], [f.read_question(GSM)])
    assert result['accuracy'] == result['pass@1'] == 0.75 and 'pass@10' not in result

def test_one_sampled_answer_is_the_most_likely_one():
    answer, f = sampled(GSM, ['I say 5'], is_chat=True, n_samples=1)
    prompts, n, stop, heat = f.space['asked']
    assert answer['right'] == 1 and heat == 0 and stop == TOK.end and prompts[0] == TOK.render(GSM['messages'], prompt=True)[0]

@needs_fork
def test_sampled_programs_are_run():
    answer, f = sampled(dict(ROW, task_id='x'), ['    return 2 * x\n', '    return x\n'], n_samples=2)
    assert answer['n_right'] == 1 and f.space['asked'][0][0] == [TOK.eot] + TOK.encode(ROW['prompt'])

# -----------------------------------------------------------------------------
# questions that are unlike others

def test_mmlu_is_written_as_published(tmp_path):
    for part, n in (('dev', 5), ('test', 3)):
        for subject in ('abstract_algebra', 'zoology'):
            rows = [f'"{subject}, {part} {i}?",a,b,"c, d",{i},{"ABCD"[i % 4]}' for i in range(n)]
            path = tmp_path / part / f'{subject}_{part}.csv'
            path.parent.mkdir(exist_ok=True)
            path.write_text('\n'.join(rows) + '\n', encoding='utf-8')
    f = functions()
    questions, solved = f.load_benchmark(str(tmp_path))
    assert len(questions) == 6 and len(solved) == 10
    task = dict(TASKS['mmlu'], solved=solved)
    def written(part, i, answer):
        return f'zoology, {part} {i}?\nA. a\nB. b\nC. c, d\nD. {i}\nAnswer:{answer}'
    text = 'The following are multiple choice questions (with answers) about zoology.\n\n'
    for i in range(5):
        text += written('dev', i, ' ' + 'ABCD'[i % 4]) + '\n\n'
    assert f.few_shot(questions, 4, task) == text
    pairs = [f.join(questions[4], k, task['delimiter']) for k in range(4)]
    assert pairs == [(written('test', 1, ''), f' {letter}') for letter in 'ABCD'] and questions[4]['gold'] == 1
    (tmp_path / 'test' / 'zoology_test.csv').write_text('What?,a,b,c,d\n')
    with fails(r'zoology_test\.csv: row 1 is not question'):
        f.load_benchmark(str(tmp_path))
    with fails('has no .*csv: unpack MMLU'):
        f.load_benchmark(str(tmp_path / 'dev'))

def test_a_token_that_joins_context_and_answer_belongs_to_the_answer():
    """'x a' and 'bc' become the tokens 'x', ' ', 'ab', 'c'."""
    spec = make_spec()
    spec['pattern'] = r'[\s\S]+'
    spec['ranks'] += [base64.b64encode(b'ab').decode()]
    tok = Tokenizer(spec)
    f = functions()
    groups, cut = f.encode_question(tok, '', [('x a', 'bc'), ('x a', 'c')], 50)
    (prefix, answers), = groups
    assert prefix == [tok.eot, *b'x '] and answers == [[len(spec['ranks']) - 1, ord('c')], [*b'ac']] and not cut

def test_a_long_question_loses_its_beginning_and_is_counted():
    f = functions()
    text = 'Anna has the ' * 30
    groups, cut = f.encode_question(TOK, text, [('Say', ' owl'), ('Say', ' x y z')], 20)
    (prefix, answers), = groups
    assert cut and len(prefix) + max(map(len, answers)) == 21
    assert prefix == TOK.encode(text + 'Say')[-len(prefix):]
    questions = [dict(choices=[(text, ' owl')], gold=None, category=''), dict(choices=[('Say', ' owl')], gold=None, category='')]
    answers = f.ask(make_model(block_size=20), TOK, questions, dict(shots=0, delimiter=None))
    assert [answer['cut'] for answer in answers] == [True, False] and f.summarize(answers, questions)['n_cut'] == 1

def test_choices_of_the_same_text_are_equally_right():
    f = functions()
    for gold in (0, 1):
        question = dict(choices=[('Say', ' owl'), ('Say', ' owl')], gold=gold, category='')
        answer, = f.ask(make_model(), TOK, [question], dict(shots=0, delimiter=None))
        assert answer['right'] and answer['choice'] == 0

def test_a_conversation_asks_without_the_words_that_lead_a_base_model():
    f = functions()
    groups, _ = f.encode_question(TOK, 'shots', [('Question: Who has it?\nAnswer:', ' Anna'), ('Question: Who has it?\nAnswer:', 'Bela')], 200, True)
    user = [dict(role='user', content='Who has it?')]
    assert groups == [(TOK.render(user, prompt=True)[0], [TOK.encode(' Anna'), TOK.encode(' Bela')])]

# -----------------------------------------------------------------------------
# figures

def test_figures_by_hand():
    f = functions()
    questions = [dict(choices=[('x', 'y')] * 4, gold=gold, category='ab'[i % 2]) for i, gold in enumerate([2, 2, 2, 1])]
    answers = []
    for i, (right, losses) in enumerate([(True, [1, 0]), (True, [0, 3]), (False, [0, math.inf]), (False, [0.5, 0.5])]):
        answers.append(dict(question=i, cut=i == 0, tokens=10 * i, losses=losses, gold=questions[i]['gold'], right=right))
    answers[0]['robust'] = True
    answers[1]['robust'] = False
    result = f.summarize(answers, questions)
    assert result['accuracy'] == 0.5 and result['stderr'] == pytest.approx(math.sqrt(4 * 0.25 / 3) / 2)
    assert result['constant'] == 0.75 and result['chance'] == 0.5 and result['n_cut'] == 1 and result['tokens'] == 15
    assert result['robust'] == 0.5 and result['category: a'] == 0.5 and result['category: b'] == 0.5
    # confidences: 1 / (1 + 1/e) = 0.731 right, 1 / (1 + e**-3) = 0.953 right, 1 wrong, 0.5 wrong; bins 7, 9, 9, 5
    confidence = [1 / (1 + math.exp(-gap)) for gap in (1, 3, math.inf, 0)]
    error = abs(1 - confidence[0]) + abs(1 - confidence[1] - confidence[2]) + confidence[3]
    assert result['calibration error'] == pytest.approx(error / 4)

def test_core_is_the_mean_of_centred_accuracies():
    f = functions()
    results = {name: dict(accuracy=task['baseline'] + 0.1 * (1 - task['baseline'])) for name, task in TASKS.items() if 'core' in task}
    assert f.overall_figures(results) == {'CORE': pytest.approx(0.1)} and len(results) == 22
    few = {'boolq': dict(accuracy=0.81), 'copa': dict(accuracy=0.25)} # 0.19 / 0.38 and -0.25 / 0.5
    assert f.overall_figures(few) == {'CORE (partial: 2 of 22 tasks)': pytest.approx(0)}
    chat = {'mmlu, chat': dict(accuracy=0.4), 'gsm8k, chat': dict(accuracy=0.1)}
    assert f.overall_figures(chat) == {'ChatCORE (partial: 2 of 5 tasks)': pytest.approx((0.2 + 0.1) / 2)}

def test_changes_that_should_not_matter():
    f = functions()
    text = 'Question: Which animal lives with Anna?\nA. owl\nAnswer:'
    changed = {}
    for kind in ('typos', 'case', 'spacing'):
        question = f.disturb(dict(choices=[(text, ' A'), (text, ' B')], gold=1), kind, random.Random(1))
        (changed[kind], a), (other, b) = question['choices']
        assert changed[kind] == other != text and (a, b, question['gold']) == (' A', ' B', 1)
    assert changed['case'] == text.lower() and changed['spacing'].split() == text.split()
    for new, old in zip(changed['typos'].split(), text.split()):
        assert sorted(new) == sorted(old) and new[0] == old[0]

# -----------------------------------------------------------------------------
# an interrupted run

def test_finished_benchmarks_are_kept(world, scripts, tmp_path):
    """Ctrl-C in the third benchmark; the same command asks only what is left, and the figures are the same."""
    config = GPTConfig(arch='llama', vocab_size=TOK.n_vocab, block_size=48, n_layer=1, n_head=2, n_embd=16)
    torch.manual_seed(0)
    weights = GPT(config).state_dict()
    for out in ('a', 'b'):
        save_checkpoint(str(tmp_path / out / 'base.pt'), 'base', weights, asdict(config), TOK, {}, 1, {})
    def flags(out):
        return ('eval.py', world.tiny, f'--data_dir={world.data}', f'--out_dir={tmp_path / out}', '--n_prompts=0', '--n_robust=0')
    stop = '''
import model
old = model.pad_right # called once for each batch
n = [0]
def pad_right(*args):
    n[0] += 1
    if n[0] == 3:
        raise KeyboardInterrupt
    return old(*args)
model.pad_right = pad_right
'''
    stopped = scripts(*flags('a'), before=stop)
    assert stopped.code != 0 and stopped.err == 'stopped; the same command continues\n'
    kept = sorted(path.name for path in (tmp_path / 'a' / 'answers' / 'base').iterdir())
    assert kept == ['greedy.jsonl', 'right.jsonl']
    again = scripts.ok(*flags('a')).out
    assert [line.split(':')[1] for line in again.splitlines() if 'kept from an earlier run' in line] == [' greedy', ' right']
    scripts.ok(*flags('b'))
    reports = [json.loads((tmp_path / out / 'report.json').read_text())['benchmarks']['base'] for out in 'ab']
    for figures in itertools.chain(*[report.values() for report in reports]):
        figures.pop('seconds')
    assert reports[0] == reports[1] and len(reports[0]) == 4
    rows = [json.loads(line) for line in (tmp_path / 'a' / 'answers' / 'base' / 'right.jsonl').open()]
    assert [row['question'] for row in rows[1:]] == [0, 1, 2, 3] and all(len(row['losses']) == 4 for row in rows[1:])
    # another choice of questions is another examination
    assert 'kept' not in scripts.ok(*flags('a'), '--limit=2').out
