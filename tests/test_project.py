"""The project as a whole: its files, how the code reads, imports, settings, help, commands in texts, speedrun.sh."""
import ast
import difflib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator

# The number of lines that each file was planned with; it may have 15% more. Some were planned with less: what they
# must do on other people's files, and after kills and full disks, does not fit in plain code of that length.
LINES = dict(
    prepare_data=2075, tokenizer=460, model=923, pretrain=560, sft=431, reward=682, rlhf=730, eval=1490,
    chat=890, configurator=180, toytown=345, convert=423, scaling=665)
SCRIPTS = [name for name in LINES if name not in ('model', 'configurator')]
STAGES = ['prepare_data', 'tokenizer', 'pretrain', 'sft', 'reward', 'rlhf', 'eval']
OTHERS = {'README.md', 'COURSE.md', 'LOG.md', 'LICENSE', 'requirements.txt', 'speedrun.sh', 'curves.svg', '.gitignore',
          'config', 'tests', '.ci'}
SHELL = ['speedrun.sh', 'tests/run.sh', '.ci/run']

PACKAGES = {'torch', 'numpy', 'tiktoken', 'requests', 'regex'} # regex comes with tiktoken
EXTRAS = {'pyarrow', 'wandb', 'transformers'} # only inside the branch that needs them
FORBIDDEN = {'pickle', 'fcntl'} # unsafe to load; not on Windows

def text_of(name):
    path = ROOT / name
    if not path.exists():
        pytest.skip(f'no {name}') # test_layout fails then
    return path.read_text(encoding='utf-8')

def tree_of(script):
    return ast.parse(text_of(f'{script}.py'))

def settings_of(script):
    text_of(f'{script}.py')
    return configurator.read_settings(ROOT / f'{script}.py')

def existing():
    return [script for script in SCRIPTS if (ROOT / f'{script}.py').exists()]

def own_files():
    """All files that belong to the project: those in git, or new and not ignored; else all in the usual places."""
    git = ['git', 'ls-files', '--cached', '--others', '--exclude-standard']
    done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return sorted(name for name in set(done.stdout.splitlines()) if (ROOT / name).is_file())
    paths = [p for glob in ('*', 'config/**/*', 'tests/**/*', '.ci/*') for p in ROOT.glob(glob) if p.is_file()]
    return sorted(str(p.relative_to(ROOT)) for p in paths if '__pycache__' not in p.parts)

# -----------------------------------------------------------------------------
# files

def test_layout():
    expected = {f'{name}.py' for name in LINES} | OTHERS
    assert {name.split('/')[0] for name in own_files()} - {'chat.html'} == expected

@pytest.mark.parametrize('name', LINES)
def test_lines(name):
    assert text_of(f'{name}.py').count('\n') <= round(1.15 * LINES[name])

def test_lines_of_speedrun():
    assert text_of('speedrun.sh').count("\n") <= 120

def test_nothing_made_is_checked_in():
    ends = ('.pt', '.bin', '.partial', '.pyc')
    assert [n for n in own_files() if n.startswith(('data/', 'out/', '.venv/')) or n.endswith(ends)] == []

def test_texts():
    """utf-8, no blanks at the end of a line, a newline at the end of the file, nothing about where it was written."""
    private = re.compile(r'/work/(main|shared)|/tmp/(before|team)|\bissue \d|pypi\.org|/root/')
    for name in own_files():
        text = text_of(name)
        if name.endswith(('.py', '.sh', '.md', '.txt', 'run')):
            assert '\t' not in text and text.endswith('\n') and not text.endswith('\n\n'), name
            assert [f'{name}:{i}' for i, line in enumerate(text.split('\n'), 1) if line != line.rstrip()] == []
        if name != 'tests/test_project.py':
            assert not private.search(text), f'{name}: {private.search(text)[0]}'

def test_requirements():
    names = re.findall(r'^([\w-]+)', text_of('requirements.txt'), re.M)
    assert names == ['torch', 'numpy', 'tiktoken', 'requests']

# -----------------------------------------------------------------------------
# how the code reads

def idioms(tree):
    """Lines with an idiom that saves a line and costs a reader."""
    found = []
    for node in ast.walk(tree):
        name = None
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for side in (node.left, node.right):
                is_not = isinstance(side, ast.UnaryOp) and isinstance(side.op, ast.Not)
                is_bool = isinstance(side, ast.Call) and getattr(side.func, 'id', '') == 'bool'
                if isinstance(side, (ast.Compare, ast.BoolOp)) or is_not or is_bool:
                    name = 'times a truth value'
        if isinstance(node, ast.IfExp) and isinstance(node.orelse, ast.IfExp):
            name = 'if in if'
        if len(getattr(node, 'generators', [])) > 1:
            name = 'two loops in one'
        if isinstance(node, ast.For) and isinstance(node.iter, ast.IfExp):
            name = 'for over an if'
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            name = 'a lambda with a name'
        if name:
            found.append(f'line {node.lineno}: {name}')
    return found

@pytest.mark.parametrize('name', LINES)
def test_texture(name):
    """Few wide lines, few expressions in a line, enough comments: the measures of nanoGPT, CleanRL and minbpe."""
    text = text_of(f'{name}.py')
    tree = ast.parse(text)
    lines = text.split('\n')[:-1]
    wide = [i for i, line in enumerate(lines, 1) if len(line) > 100]
    assert len(wide) <= 0.05 * len(lines), f'lines over 100 columns: {wide}'

    documented = (ast.Module, ast.FunctionDef, ast.ClassDef)
    docstrings = [n.body[0] for n in ast.walk(tree) if isinstance(n, documented) and ast.get_docstring(n)]
    n_docstring = sum(node.end_lineno - node.lineno + 1 for node in docstrings)
    n_code = sum(bool(line.strip()) and not line.strip().startswith('#') for line in lines) - n_docstring
    n_expressions = sum(isinstance(node, ast.expr) for node in ast.walk(tree))
    assert n_expressions / n_code <= 6.5

    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    n_comments = sum(token.type == tokenize.COMMENT for token in tokens)
    assert n_comments / sum(bool(line.strip()) for line in lines) >= 0.15

    assert idioms(tree) == []

@pytest.mark.parametrize('name', LINES)
def test_docstring(name):
    docstring = ast.get_docstring(tree_of(name))
    assert docstring and text_of(f'{name}.py').startswith('"""\n')
    if name in SCRIPTS:
        assert f'{name}.py' in docstring # how to run it
    if name in STAGES:
        for word in 'Reads', 'Writes', 'Left out':
            assert word in docstring, f'{name}.py has no {word}'

@pytest.mark.parametrize('names', ['sft reward', 'pretrain sft'])
def test_scripts_differ_where_the_stages_do(names):
    """
    `diff sft.py reward.py` shows the lesson: what is the same in both is the same letter by letter. From the optimizer
    on, the stages do the same; what comes before (data, pipeline) is their own.
    """
    tails = []
    for name in names.split():
        text = text_of(f'{name}.py')
        tails.append(text[text.index('# optimizer, and the state of an interrupted run'):].splitlines())
    changed = [line for line in difflib.ndiff(*tails) if line[0] in '+-']
    assert len(changed) <= 170

@pytest.mark.parametrize('name', LINES)
def test_encodings_are_named(name):
    """The default encoding is not utf-8 everywhere."""
    for node in ast.walk(tree_of(name)):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        is_text = call.endswith(('.read_text', '.write_text'))
        if call == 'open' or call == 'gzip.open':
            mode = node.args[1] if len(node.args) > 1 else ast.Constant('r' if call == 'open' else 'rb')
            mode = next((k.value for k in node.keywords if k.arg == 'mode'), mode)
            letters = getattr(mode, 'value', 'b')
            is_text = 't' in letters if call == 'gzip.open' else 'b' not in letters
        if is_text:
            assert any(k.arg == 'encoding' for k in node.keywords), f'{name}.py:{node.lineno}: no encoding'

# -----------------------------------------------------------------------------
# imports

def imported(nodes):
    """The packages that these nodes import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split('.')[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module.split('.')[0])
    return found

@pytest.mark.parametrize('name', LINES)
def test_imports(name):
    """No script imports another one. The configurator runs before anything is installed."""
    allowed = set(sys.stdlib_module_names) - FORBIDDEN
    if name != 'configurator':
        allowed |= PACKAGES
    if name in SCRIPTS:
        allowed |= {'model', 'configurator'}
    tree = tree_of(name)
    assert imported(tree.body) - allowed == set()
    assert imported(ast.walk(tree)) - allowed - EXTRAS == set()

IMPORTS = """
import contextlib, gc, io, json, os, runpy, signal, sys, threading
import numpy, torch, tiktoken
def state():
    handlers = {s: str(signal.getsignal(s)) for s in signal.valid_signals()}
    return (sys.excepthook, handlers, threading.active_count(), os.listdir(), gc.isenabled(), gc.get_threshold(),
            dict(os.environ), torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed(), sys.stdout)
before = state()
import model
same = [a == b for a, b in zip(before, state())]
pages = {}
for script in sys.argv[2:]:
    path, code = os.path.join(sys.argv[1], script + '.py'), None
    sys.argv, argv = [path, '--help'], sys.argv
    with contextlib.redirect_stdout(io.StringIO()) as page:
        try:
            runpy.run_path(path, run_name='__main__')
        except SystemExit as e:
            code = e.code
        except Exception as e:
            code = repr(e)
    pages[script] = code, page.getvalue()
    sys.argv = argv
json.dump([same, pages], sys.stdout)
"""

def test_import_of_model_and_help(tmp_path):
    """In one process, because importing torch takes long: `import model` has no effects; --help of every script."""
    text_of('model.py')
    env = {**os.environ, 'RANK': '0', 'PYTHONPATH': str(ROOT), 'PYTHONDONTWRITEBYTECODE': '1'}
    done = subprocess.run([sys.executable, '-c', IMPORTS, str(ROOT), *existing()], cwd=tmp_path, capture_output=True,
                          text=True, timeout=120, encoding='utf-8', env=env)
    assert done.returncode == 0, done.stderr[-1000:]
    same, pages = json.loads(done.stdout)
    assert all(same), same
    for script, (code, page) in pages.items():
        assert not code, f'{script}.py --help ends with {code}'
        assert page.startswith(f'usage: python {script}.py')
        assert [name for name in settings_of(script) if f'  {name} = ' not in page] == []

# -----------------------------------------------------------------------------
# settings

@pytest.mark.parametrize('script', SCRIPTS)
def test_settings(script):
    settings = settings_of(script)
    assert settings, 'no settings above configure(globals())'
    assert [name for name, (_, comment, _) in settings.items() if len(comment) < 3] == []
    names = [node.targets[0].id for node in tree_of(script).body
             if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    first = names.index(next(iter(settings)))
    between = names[first:names.index('config')]
    assert between == list(settings) # every name among the settings has a literal as its default

def test_common_settings():
    """A plain name in a profile means the same in all stages."""
    kinds = {}
    for script in existing():
        for name, (default, _, _) in settings_of(script).items():
            kind = 'number' if type(default) in (int, float) else type(default).__name__
            kinds.setdefault(name, {})[script] = kind
            if name == 'data_dir':
                assert default == 'data/toytown'
            if name == 'out_dir' and script != 'scaling':
                assert default == 'out/toytown'
    assert {name: of for name, of in kinds.items() if len(set(of.values())) > 1} == {}

@pytest.mark.parametrize('path', sorted(p.name for p in (ROOT / 'config').glob('*.py')))
def test_profiles(path, monkeypatch):
    """Every setting that a profile names exists and has the right type."""
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    profiles = [f'{ROOT}/config/tiny.py'] if path == 'midtrain.py' else []
    for script in existing():
        monkeypatch.setattr(sys, 'argv', [script, *profiles, f'{ROOT}/config/{path}'])
        assert configurator.configure({'__file__': f'{ROOT}/{script}.py'}, quiet=True)

# -----------------------------------------------------------------------------
# commands in texts

def commands(text):
    """The words of each `python X.py ...` in a text, from the script on."""
    text = text.replace('\\\n', ' ')
    for line in re.findall(r'(?:python3?|torchrun[^`\n]*?|bash) +[\w/.-]+\.(?:py|sh)\b[^`\n|>#]*', text):
        words = re.split(r' {2,}|\s*(?:&&|;)', line)[0].split() # two spaces: an explanation begins
        first = [i for i, word in enumerate(words) if word.endswith(('.py', '.sh'))]
        if first:
            yield words[first[0]:]

@pytest.mark.parametrize('name', ['README.md', 'COURSE.md', 'speedrun.sh', *(f'{script}.py' for script in LINES),
                                  *sorted(f'config/{p.name}' for p in (ROOT / 'config').glob('*.py'))])
def test_commands_in_texts(name):
    """Each command that a reader may copy names a script, profiles and settings that exist."""
    text = text_of(name)
    if name.endswith('.py') and '/' not in name:
        text = ast.get_docstring(ast.parse(text))
    every = {'quick'} | {key for script in existing() for key in settings_of(script)}
    for script, *words in commands(text):
        assert (ROOT / script).is_file(), f'{name}: no script {script}'
        known = settings_of(Path(script).stem) if Path(script).stem in SCRIPTS else every
        for word in words:
            if script == 'speedrun.sh':
                assert word in ('setup', 'overoptimise') or word.startswith('--') or word.endswith('.py'), f'{name}: speedrun.sh {word}'
            if re.fullmatch(r'config/\w+\.py', word):
                assert (ROOT / word).is_file(), f'{name}: no profile {word}'
            flag = re.match(r'--([\w-]+)', word)
            if flag and flag[1] != 'help' and not script.startswith('tests/'):
                assert flag[1].replace('-', '_') in known, f'{name}: {script} has no setting {flag[1]}'

def test_readme():
    """The numbers of lines are right, and every file is named."""
    text = text_of('README.md')
    assert 'TODO' not in text
    told = re.findall(r'`(\w+\.(?:py|sh))` *\| *(\d+) *\|', text)
    assert len(told) > 10 and [(n, text_of(n).count('\n')) for n, _ in told] == [(n, int(lines)) for n, lines in told]
    assert [name for name in LINES if f'{name}.py' not in text] == []
    assert [p.name for p in (ROOT / 'config').glob('*.py') if p.name not in text] == []

# -----------------------------------------------------------------------------
# shell scripts

@pytest.mark.parametrize('name', SHELL)
def test_shell(name):
    text = text_of(name)
    assert text.startswith('#!/usr/bin/env bash\n') and 'set -euo pipefail' in text and 'sudo' not in text
    assert [line for line in text.split('\n') if len(line) > 110] == []
    subprocess.run(['bash', '-n', name], cwd=ROOT, check=True)

FAKE_STAGE = """
import os
from configurator import configure
town_dir = 'raw' # only toytown.py
files = 'raw'   # only prepare_data.py
source = 'files' # only prepare_data.py
data_dir = 'data' # a comment
out_dir = 'out' # a comment
seed = 1 # a comment
resume = True # a comment
NAME_steps = 3 # a comment
config = configure(globals())
assert not os.path.exists('fail_NAME'), 'fail_NAME is there'
os.makedirs('OUTPUT'.split('/')[0], exist_ok=True)
open('OUTPUT', 'w').write('x')
"""

@pytest.fixture
def recipe(tmp_path):
    """speedrun.sh with stages that do nothing; -> a function that runs it and returns the stages that ran."""
    for name in 'configurator.py', 'speedrun.sh', 'requirements.txt':
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / 'config').mkdir()
    (tmp_path / 'config' / 'tiny.py').write_text('seed = 2\n')
    (tmp_path / 'config' / 'world.json').write_text('{}')
    (tmp_path / 'model.py').write_text('')
    outputs = dict(toytown='raw/truth.jsonl', prepare_data='data/funnel.json', tokenizer='data/tokenizer.json',
                   pretrain='out/base.pt', sft='out/sft.pt', reward='out/reward.pt', rlhf='out/rlhf.pt',
                   eval='out/report.md')
    for name, output in outputs.items():
        text = FAKE_STAGE.replace('NAME', name).replace('OUTPUT', output)
        (tmp_path / f'{name}.py').write_text(text)
    (tmp_path / '.venv' / 'bin').mkdir(parents=True)
    (tmp_path / '.venv' / 'bin' / 'python').write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / '.venv' / 'bin' / 'python').chmod(0o755)
    shutil.copy(tmp_path / 'requirements.txt', tmp_path / '.venv' / 'installed.txt')

    def run(*words, code=0):
        done = subprocess.run(['bash', str(tmp_path / 'speedrun.sh'), *words], cwd=tmp_path.parent, text=True,
                              capture_output=True, timeout=120)
        assert done.returncode == code, done.stdout + done.stderr
        ran = re.findall(r'^\$ python (\w+)\.py(?!.*\nfinished)', done.stdout, re.M)
        return ran if code == 0 else (ran, done.stderr)
    run.folder = tmp_path
    return run

ALL = ['toytown', *STAGES]

def test_speedrun(recipe):
    (recipe.folder / 'fail_sft').write_text('')
    ran, err = recipe(code=1)
    assert ran == ALL[:5] and err == 'error: fail_sft is there\n'
    (recipe.folder / 'fail_sft').unlink()
    assert recipe() == ALL[4:] # the same command continues
    assert recipe('config/tiny.py', '--rlhf_steps=4') == ALL[6:] # a changed setting: its stage and all later ones
    os.utime(recipe.folder / 'reward.py')
    assert recipe('--rlhf_steps=4') == ALL[5:] # a changed script
    (recipe.folder / 'config' / 'quick.py').write_text('seed = 3\n')
    assert recipe('--quick', '--rlhf_steps=4') == ALL # another seed for all of them

def test_speedrun_with_other_input(recipe):
    (recipe.folder / 'raw.txt').write_text('x')
    flags = '--files=raw.txt', '--seed=3'
    assert recipe(*flags) == STAGES # toytown.py is not needed
    assert recipe(*flags) == []
    os.utime(recipe.folder / 'raw.txt')
    assert recipe(*flags) == STAGES

def test_speedrun_stops_at_a_mistake(recipe):
    for word, message in (('--sed=1', "unknown setting 'sed', did you mean 'seed'?"), ('--seed=x', 'is not int'),
                          ('none.py', "no config file 'none.py'")):
        ran, err = recipe(word, code=1)
        assert ran == [] and message in err and err.count('\n') == 1
    assert not (recipe.folder / 'raw').exists()
