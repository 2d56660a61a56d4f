"""
The large profiles, rehearsed: a server on this machine hands out miniature files in the form of every source, and all
stages run as speedrun.sh runs them, with a model of two layers.
"""
import gzip
import http.server
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

import configurator
from conftest import ROOT, definitions, load
from model import GPT, GPTConfig, ScalarModel

# -----------------------------------------------------------------------------
# miniature files. Their texts are made here; their keys are those of the real files.

NOUNS = ('river farmer winter letter garden engine window village teacher bridge market forest kitchen summer train '
         'doctor island library mountain captain morning harbour story clock valley student lantern baker road ship '
         'painter castle question answer number city morning music paper field').split()
VERBS = ('found carried watched followed painted repaired crossed visited remembered counted opened described reached '
         'measured cleaned borrowed collected answered missed believed').split()
WORDS = ('old quiet narrow early bright heavy gentle distant wooden famous empty careful golden simple northern '
         'friendly yellow curious patient broken').split()

def sentence(rng):
    a, b, c = rng.sample(NOUNS, 3)
    x, y = rng.sample(WORDS, 2)
    u, v = rng.sample(VERBS, 2)
    return rng.choice([f'The {x} {a} {u} a {b} that {v} the {y} {c}.', f'When the {a} {u} the {x} {b}, we {v} the {c}.',
                       f'With a {x} {a} they {u} the {b} and {v} every {y} {c} of the town.',
                       f'It was the {y} {c} to which a {a} {u} and {v} the {x} {b}.'])

def prose(rng, fewest, most):
    return ' '.join(sentence(rng) for _ in range(rng.randint(fewest, most)))

def page(rng, i):
    paragraphs = [prose(rng, 3, 6) for _ in range(rng.randint(2, 5))]
    return dict(text='\n'.join(paragraphs), timestamp='2019-04-25T12:57:54Z', url=f'http://pages.example/{i}')

def dolly(rng, i):
    return dict(instruction=f'What is number {i}? {sentence(rng)}', context=prose(rng, 0, 2), response=prose(rng, 1, 3),
                category='open_qa')

def message(rng, role, *replies, rank=None):
    return dict(message_id=f'{rng.random()}', text=prose(rng, 1, 2), role=role, lang='en', rank=rank, review_count=3,
                deleted=False, emojis={'+1': 1}, replies=[*replies])

def oasst(rng, i):
    more = message(rng, 'prompter', message(rng, 'assistant', rank=0))
    answers = message(rng, 'assistant', more, rank=0), message(rng, 'assistant', rank=1)
    return dict(message_tree_id=f'{i}', tree_state='ready_for_export', prompt=message(rng, 'prompter', *answers))

def gsm8k(rng, i):
    a, b, thing = rng.randint(1, 50), rng.randint(1, 50), rng.choice(NOUNS)
    return dict(question=f'Problem {i}: {sentence(rng)} There are {a} of one {thing} and {b} of another. How many?',
                answer=f'There are {a} + {b} = <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}')

def hellaswag(rng, i):
    return dict(ind=i, activity_label=rng.choice(NOUNS).title(), ctx_a=sentence(rng), ctx_b='',
                ctx=f'{i} {sentence(rng)}', split='train', split_type='indomain', label=rng.randrange(4),
                source_id=f'activitynet~{i}', endings=[sentence(rng) for _ in range(4)])

def commonsense_qa(rng, i):
    choices = [dict(label=letter, text=text) for letter, text in zip('ABCDE', rng.sample(NOUNS, 5))]
    return dict(answerKey=rng.choice('ABCDE'), id=f'{i}', question=dict(
        question_concept='town', choices=choices, stem=f'{i}: {sentence(rng)} What is meant?'))

def hh(rng, i):
    before = f'\n\nHuman: {i} {prose(rng, 1, 2)}\n\nAssistant: '
    return dict(chosen=before + prose(rng, 1, 3), rejected=before + prose(rng, 1, 2))

def ultrafeedback(rng, i):
    def completion():
        qualities = ('instruction_following', 'honesty', 'truthfulness', 'helpfulness')
        ratings = {name: dict(Rating=str(rng.randint(1, 5)), Rationale=sentence(rng)) for name in qualities}
        return {'model': 'm', 'principle': 'honesty', 'custom_system_prompt': sentence(rng), 'critique': sentence(rng),
                'response': prose(rng, 1, 3), 'annotations': ratings, 'overall_score': 7.0, 'fine-grained_score': 3.5}
    return dict(source='evol_instruct', instruction=f'{i} {sentence(rng)}', models=['m'] * 4,
                completions=[completion() for _ in range(4)], correct_answers=['None'], incorrect_answers=['None'])

def choices(rng, i):
    return dict(query=f'{i} {sentence(rng)}', choices=rng.sample(NOUNS, 4), gold=rng.randrange(4), category='history')

def continuation(rng, i):
    return dict(context=f'{i} {sentence(rng)} It was the', continuation=rng.choice(NOUNS))

def schema(rng, i):
    return dict(context_options=[f'{i} {sentence(rng)} {word}' for word in rng.sample(NOUNS, 2)],
                continuation='was there', gold=rng.randrange(2))

def humaneval(rng, i):
    return dict(task_id=f'HumanEval/{i}', prompt=f'def add_{i}(a, b):\n    """{sentence(rng)}"""\n',
                entry_point=f'add_{i}', canonical_solution='    return a + b\n',
                test='def check(f):\n    assert f(1, 2) == 3\n')

# part of a URL -> the form of its rows; the first that fits. What is left are questions with choices.
FORMS = {
    '/c4/': page, 'dolly': dolly, 'oasst2': oasst, 'grade-school-math': gsm8k, 'hellaswag_train': hellaswag,
    'commensenseqa': commonsense_qa, 'hh-rlhf': hh, 'UltraFeedback': ultrafeedback, 'HumanEval': humaneval,
    'winograd_wsc': schema, 'winogrande': schema, 'bigbench_language': choices, 'bigbench': continuation,
    'lambada': continuation, 'jeopardy': continuation, 'squad': continuation, 'coqa': continuation}

def write_mirror(folder, profile, n_files, n_rows):
    """A file for every URL of a profile's sources, as https://HOST/PATH -> folder/HOST/PATH."""
    data = definitions('prepare_data.py')
    source = settings_of('prepare_data.py', profile)['source']
    for url in [url for name in source.split(',') for url in data.urls_of(name, n_files)]:
        rng = random.Random(url)
        form = next((form for part, form in FORMS.items() if part in url), choices)
        lines = ''.join(json.dumps(form(rng, i)) + '\n' for i in range(n_rows)).encode()
        path = folder / url.removeprefix('https://')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(lines) if url.endswith('.gz') else lines)

def settings_of(script, *profiles):
    """The settings of a script with these profiles, such as d20."""
    argv = sys.argv
    sys.argv = [script, *(f'config/{profile}.py' for profile in profiles)]
    try:
        return configurator.configure({'__file__': str(ROOT / script)}, quiet=True)
    finally:
        sys.argv = argv

class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the files below server.folder, also a range of bytes."""
    def do_GET(self):
        path = self.server.folder / self.path.lstrip('/')
        if not path.is_file():
            return self.send_error(404)
        content = path.read_bytes()
        first, last = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers['Range']).groups()
        part = content[int(first):int(last) + 1 if last else None]
        self.server.asked.append((self.path, len(part)))
        self.send_response(206)
        self.send_header('Content-Range', f'bytes {first}-{int(first) + len(part) - 1}/{len(content)}')
        self.send_header('Content-Length', str(len(part)))
        self.end_headers()
        try:
            self.wfile.write(part)
        except ConnectionError:
            pass # prepare_data.py only looked whether the file is there

    def log_message(self, *_):
        pass

def serve(folder):
    """A server of the files in a folder, in a thread. -> the server; its url"""
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.folder, server.asked = folder, []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server, f'http://127.0.0.1:{server.server_port}'

# -----------------------------------------------------------------------------
# what speedrun.sh runs

MADE = dict(toytown='data/raw/toytown/truth.jsonl', prepare_data='{data_dir}/funnel.json',
            tokenizer='{data_dir}/tokenizer.json', pretrain='{out_dir}/{stage}.pt', sft='{out_dir}/sft.pt',
            reward='{out_dir}/reward.pt', rlhf='{out_dir}/rlhf.pt', eval='{out_dir}/report.md', scaling='estimate')
STUB = '''
import os
config = configure(globals(), quiet=True)
path = MADE.format(**config)
os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
open(path, 'w').close()
if config.get('mid_chats'):
    open(config['data_dir'] + '/mid_train_000000.bin', 'w').close()
'''

@pytest.fixture
def speedrun(tmp_path):
    """speedrun.sh with the settings of the real scripts, which only touch what they would write. -> its commands"""
    for name in ('configurator.py', 'speedrun.sh', 'requirements.txt'):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / 'config', tmp_path / 'config')
    (tmp_path / 'model.py').touch()
    for name, made in MADE.items():
        settings = [f'{key} = {default!r} # {comment}\n' for key, (default, comment, _) in
                    configurator.read_settings(ROOT / f'{name}.py').items()]
        stub = STUB.replace('MADE', repr(made))
        (tmp_path / f'{name}.py').write_text('from configurator import configure\n' + ''.join(settings) + stub)
    programs = tmp_path / '.venv' / 'bin'
    programs.mkdir(parents=True)
    (programs / 'python').write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (programs / 'torchrun').write_text('#!/bin/sh\nshift 2\nexec python "$@"\n') # after its two flags
    for path in programs.iterdir():
        path.chmod(0o755)
    shutil.copy(tmp_path / 'requirements.txt', tmp_path / '.venv' / 'installed.txt')

    def run(*words, **env):
        done = subprocess.run(['bash', 'speedrun.sh', *words], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, **env}, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return re.findall(r'^\$ (.*)\n(?!finished before)', done.stdout, re.M)
    run.folder = tmp_path
    return run

def test_the_commands_of_a_profile(speedrun):
    def commands(words, train='python'):
        scripts = ['pretrain.py', 'pretrain.py', 'sft.py', 'reward.py', 'rlhf.py', 'eval.py']
        trained = [f'{train} {script} {words}' for script in scripts]
        trained[1] += ' stage=mid'
        clean = f'torchrun --standalone --nproc_per_node=cpu prepare_data.py {words}'
        return [clean, f'python tokenizer.py {words}', *trained]
    # the rehearsal changes the profile, so it comes last
    assert speedrun('--rehearse=true', 'config/d20.py') == commands('config/d20.py config/rehearse.py')
    # a setting of mid-training is none of the base model, which costs a hundred times as much
    words = 'config/d20.py config/rehearse.py', '--mid_lr_scale=0.5'
    assert speedrun(*words[0].split(), words[1]) == commands('config/d20.py config/rehearse.py mid_lr_scale=0.5')[3:]
    # without mid-training: a mid.pt that is left over would be the start of sft.py
    (speedrun.folder / 'data/rehearsal/mid_train_000000.bin').unlink() # as tokenizer.py does
    ran = speedrun('config/d20.py', 'config/rehearse.py', '--mid_chats=0', NPROC='2')
    every = commands('config/d20.py config/rehearse.py mid_chats=0', 'torchrun --standalone --nproc_per_node=2')
    assert ran == every[1:3] + every[4:]
    assert not (speedrun.folder / 'out/rehearsal/mid.pt').exists()
    assert speedrun('config/d20.py', '--estimate=8xH100') == [] and (speedrun.folder / 'estimate').exists()

def test_the_commands_of_midtrain(speedrun):
    """It starts from the raw pages and the base model of another run."""
    ran = speedrun('config/tiny.py', 'config/midtrain.py')
    assert [command.split()[1] for command in ran] == [
        'prepare_data.py', 'tokenizer.py', 'pretrain.py', 'sft.py', 'reward.py', 'rlhf.py', 'eval.py']
    assert ran[2] == 'python pretrain.py config/tiny.py config/midtrain.py stage=mid'

@pytest.mark.parametrize('profiles', [['d20'], ['d32'], ['d20', 'rehearse'], ['d32', 'rehearse']], ids=str)
def test_fewer_processes_do_the_same_updates(profiles):
    """The examples of a step, in all, are what 1, 2, 4 or 8 processes share without a remainder."""
    for n in (1, 2, 4, 8):
        for script in ('pretrain.py', 'sft.py', 'reward.py'):
            s = settings_of(script, *profiles)
            assert s['total_batch_size'] > 0 and s['total_batch_size'] % (n * s['batch_size']) == 0, (script, n)
        s = settings_of('rlhf.py', *profiles)
        assert s['batch_size'] % s['minibatch_size'] == 0 and s['minibatch_size'] % n == 0

# -----------------------------------------------------------------------------
# the rehearsal

N_BYTES = 30_000
FAST = dict(prepare_data=[f'first_bytes={N_BYTES}'], tokenizer=['mid_chats=1'],
            pretrain=['max_iters=2', 'total_batch_size=8', 'eval_iters=1'], mid=['eval_iters=1'],
            sft=['max_new_tokens=6'], reward=['share=0.3'],
            rlhf=['max_iters=2', 'batch_size=4', 'minibatch_size=4', 'max_new_tokens=6'],
            eval=['limit=1', 'n_robust=0', 'n_prompts=2', 'pool_prompts=1', 'val_tokens=2000', 'max_new_tokens=6',
                  'max_exam_tokens=6'])

@pytest.fixture(scope='module')
def mirror(tmp_path_factory):
    folder = tmp_path_factory.mktemp('mirror')
    write_mirror(folder, 'd20', n_files=2, n_rows=24)
    server, url = serve(folder)
    yield SimpleNamespace(folder=folder, server=server, url=url)
    server.shutdown()

@pytest.fixture(scope='module')
def d20(mirror, scripts, tmp_path_factory):
    """All stages of config/d20.py, rehearsed -> the folder in which they ran."""
    folder = tmp_path_factory.mktemp('d20')
    words = ['config/d20.py', f'mirror={mirror.url}', 'config/rehearse.py']
    for stage in ('prepare_data', 'tokenizer', 'pretrain', 'mid', 'sft', 'reward', 'rlhf', 'eval'):
        script, more = ('pretrain.py', ['stage=mid']) if stage == 'mid' else (f'{stage}.py', [])
        scripts.ok(script, *words, *more, *FAST.get(stage, []), cwd=folder)
    return folder

def check_checkpoints(profile, out):
    """
    The checkpoints of a rehearsal are those of the full profile, but for the settings that the rehearsal changes: with
    these, a model of the full profile on the meta device has the same names and shapes.
    """
    settings = settings_of('pretrain.py', profile)
    settings['vocab_size'] = settings_of('tokenizer.py', profile)['vocab_size']
    names = GPTConfig.__dataclass_fields__
    full = asdict(GPTConfig(**{name: value for name, value in settings.items() if name in names}))
    with torch.device('meta'):
        large_models = {kind: kind(GPTConfig(**full)).state_dict() for kind in (GPT, ScalarModel)}
    for stage, kind in dict(base=GPT, mid=GPT, sft=GPT, reward=ScalarModel, rlhf=GPT).items():
        large = large_models[kind]
        ckpt = load(out / f'{stage}.pt')
        changed = {name: value for name, value in ckpt['model_args'].items() if value != full[name]}
        assert sorted(changed) == ['block_size', 'n_embd', 'n_head', 'n_hidden', 'n_kv_head', 'n_layer', 'vocab_size']
        with torch.device('meta'):
            small = kind(GPTConfig(**{**full, **changed})).state_dict()
        shapes = {name: tensor.shape for name, tensor in ckpt['weights'].items()}
        assert shapes == {name: tensor.shape for name, tensor in small.items()}, stage
        in_any_block = re.compile(r'blocks\.\d+')
        assert {in_any_block.sub('blocks.N', name) for name in shapes} == {in_any_block.sub('blocks.N', name)
                                                                          for name in large}
        assert all(len(shape) == large[name].dim() for name, shape in shapes.items())
        assert ckpt['stage'] == stage

def test_d20(d20, mirror, scripts):
    """Every source gives rows of its kinds, from no more than the first bytes of each file; all stages end well."""
    files = {str(path.relative_to(mirror.folder)) for path in mirror.folder.rglob('*') if path.is_file()}
    assert {path.lstrip('/') for path, _ in mirror.server.asked} == files
    assert max(n for _, n in mirror.server.asked) == N_BYTES
    funnel = json.loads((d20 / 'data/rehearsal/funnel.json').read_text(encoding='utf-8'))
    assert {kind: set(sources) for kind, sources in funnel['mixture'].items()} == dict(
        text={'c4'}, chat={'oasst2', 'dolly', 'gsm8k', 'hellaswag_train', 'commonsense_qa_train'},
        preferences={'hh', 'ultrafeedback', 'oasst2'}, prompts={'hh', 'ultrafeedback', 'oasst2', 'gsm8k'})
    assert len(list((d20 / 'data/rehearsal/benchmarks').iterdir())) == 24
    check_checkpoints('d20', d20 / 'out/rehearsal')
    report = json.loads((d20 / 'out/rehearsal/report.json').read_text(encoding='utf-8'))
    text = json.dumps(report)
    assert all(name in text for name in ('CORE', 'mmlu', 'gsm8k', 'humaneval', 'arc_easy'))
    page = (d20 / 'out/rehearsal/report.html').read_text(encoding='utf-8')
    assert all(f'>{model}<' in page for model in ('base', 'mid', 'sft', 'rlhf')) and 'mid-training: loss' in page
    said = scripts.ok('chat.py', 'out/rehearsal/rlhf.pt', '--prompt=Who are you?', '--max_new_tokens=8', cwd=d20)
    assert said.out.strip()

def test_d32_on_two_processes(d20, scripts, tmp_path):
    """The models are in pieces (fsdp), the checkpoints are whole."""
    shutil.copytree(d20 / 'data', tmp_path / 'data')
    words = ['config/d32.py', 'config/rehearse.py']
    for stage in ('pretrain', 'mid', 'sft', 'reward', 'rlhf'):
        script, more = ('pretrain.py', ['stage=mid']) if stage == 'mid' else (f'{stage}.py', [])
        scripts.two(script, *words, *more, *FAST.get(stage, []), cwd=tmp_path)
    check_checkpoints('d32', tmp_path / 'out/rehearsal')
