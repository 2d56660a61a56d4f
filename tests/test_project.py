"""What holds for the project as a whole: sizes, widths, a comment on every setting, imports, shell scripts, README."""
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator

CAPS = dict(configurator=100, model=860, parallel=190, estimate=115, scaling=175, prepare_data=620, sources=400,
            forms=150, warc=145, extract=225, language=45,
            dedup=75, privacy=105, toytown=275, tokenizer=370, bpe=145, huggingface=240, pretrain=380, sft=280,
            reward=320, rlhf=460, eval=480, chat=300)
PARTS = {'toytown', 'sources', 'forms', 'warc', 'extract', 'language', 'dedup', 'privacy'}  # of prepare_data.py
STAGES = ['prepare_data', 'tokenizer', 'pretrain', 'sft', 'reward', 'rlhf', 'eval', 'chat']
PACKAGES = {'torch', 'numpy', 'tiktoken', 'requests', 'regex'}  # regex comes with tiktoken
EXTRAS = {'pyarrow', 'wandb'}  # only inside the branch that needs them
SHELL = ['speedrun.sh', 'tests/run.sh', '.ci/run']

def text_of(name):
    path = ROOT / name
    if not path.exists():
        pytest.skip(f'no {name}')
    return path.read_text(encoding='utf-8')

def settings_of(stage):
    text_of(f'{stage}.py')
    return configurator.read_settings(ROOT / f'{stage}.py')

def own_files():
    """All text files of ours: tracked ones and new ones, in a checkout; else what lies in the usual places."""
    git = ['git', 'ls-files', '--cached', '--others', '--exclude-standard']
    done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]
    paths = [p for glob in ('*', 'config/*', 'tests/*', '.ci/*') for p in ROOT.glob(glob) if p.is_file()]
    return [str(p.relative_to(ROOT)) for p in paths]

@pytest.mark.parametrize('name', CAPS)
def test_lines(name):
    lines = text_of(f'{name}.py').count('\n')
    assert lines <= CAPS[name]

def test_lines_in_all():
    lines = [text_of(name).count('\n') for name in own_files() if name.removesuffix('.py') in CAPS]
    assert sum(lines) < 5800

def test_lines_in_the_readme():
    told = re.findall(r'^    (\S+\.(?:py|sh)) +(\d+)  ', text_of('README.md'), re.M)
    assert len(told) > 10 and [(n, text_of(n).count('\n')) for n, _ in told] == [(n, int(lines)) for n, lines in told]

def test_width():
    names = [n for n in own_files() if n.endswith(('.py', '.sh')) or n == '.ci/run']
    assert names
    wide = [f'{n}:{i}' for n in names for i, line in enumerate(text_of(n).split('\n'), 1) if len(line) > 120]
    assert wide == []

@pytest.mark.parametrize('name', [f'{n}.py' for n in CAPS])
def test_style(name):
    text = text_of(name)
    tree = ast.parse(text)
    assert ast.get_docstring(tree) and text.startswith('"""\n') and '\t' not in text
    assert [i for i, line in enumerate(text.split('\n'), 1) if line != line.rstrip()] == []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'open':  # on Windows the default is not utf-8
            mode = node.args[1].value if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) else 'r'
            assert 'b' in mode or any(k.arg == 'encoding' for k in node.keywords), f'{name}:{node.lineno}: no encoding'

@pytest.mark.parametrize('stage', STAGES)
def test_settings(stage):
    settings = settings_of(stage)
    assert settings, 'no settings above configure(globals())'
    assert [name for name, (_, comment, _) in settings.items() if len(comment) < 3] == []  # each says what it is
    assert len(settings) <= (60 if stage == 'prepare_data' else 45) # every threshold of its filters is one
    for node in ast.parse(text_of(f'{stage}.py')).body:  # what looks like a setting is one
        if isinstance(node, ast.Assign) and 'configure(' in ast.unparse(node):
            break
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id[0] != '_':
            assert node.targets[0].id in settings, f'{node.targets[0].id} cannot be set: its default is no literal'

@pytest.mark.parametrize('stage', STAGES)
def test_common_settings(stage):
    common = dict(data_dir='data/toytown', out_dir='out/toytown', seed=None, device='auto', dtype='auto', resume=True)
    for name, (default, _, _) in settings_of(stage).items():
        if common.get(name) is not None:
            assert default == common[name]  # a plain name of a profile means the same in all stages
    for other in STAGES:
        if (ROOT / f'{other}.py').exists():
            theirs = settings_of(other)
            for name, (default, _, _) in settings_of(stage).items():
                if name in theirs and None not in (default, theirs[name][0]):
                    kinds = {type(default), type(theirs[name][0])}
                    assert len(kinds) == 1 or kinds == {int, float}, f'{name} has another type in {other}.py'

@pytest.mark.parametrize('name', [f'{n}.py' for n in CAPS])
def test_imports(name):
    tree = ast.parse(text_of(name))
    def roots(nodes):
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from (a.name.split('.')[0] for a in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module.split('.')[0]
    ours = set() if name in ('configurator.py', 'model.py') else {'model', 'configurator'}
    for stage, parts in (('prepare_data', PARTS), ('tokenizer', {'bpe', 'huggingface'}), ('model', {'huggingface'}),
                         ('pretrain', {'parallel', 'estimate'})):
        ours |= parts if name[:-3] in {stage, *parts} else set() # what only they import
    extras = EXTRAS | ({'sources'} if name == 'model.py' else set()) # in the branch that downloads weights
    packages = set() if name == 'configurator.py' else PACKAGES  # it is asked before anything is installed
    allowed = set(sys.stdlib_module_names) | ours | packages
    assert set(roots(tree.body)) <= allowed
    assert set(roots(ast.walk(tree))) <= allowed | extras
    assert 'pickle' not in set(roots(ast.walk(tree)))

HELP = """
import contextlib, io, json, runpy, sys
import model
pages = {}
for stage in sys.argv[1:]:
    sys.argv[:], code = [f'{stage}.py', '--help'], None
    with contextlib.redirect_stdout(io.StringIO()) as page:
        try:
            runpy.run_path(f'{stage}.py', run_name='__main__')
        except SystemExit as e:
            code = e.code
    pages[stage] = code, page.getvalue()
json.dump(pages, sys.stdout)
"""

def test_help():
    """--help of every script, in one process: importing torch eight times would take longer than all other tests."""
    stages = [stage for stage in STAGES if (ROOT / f'{stage}.py').exists()]
    done = subprocess.run([sys.executable, '-c', HELP, *stages], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          encoding='utf-8', env={**os.environ, 'RANK': '0', 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr[-1000:]
    for stage, (code, page) in json.loads(done.stdout).items():
        assert not code, f'{stage}.py --help ends with {code}'
        assert [name for name in settings_of(stage) if f'  {name} = ' not in page] == []

@pytest.mark.parametrize('path', sorted(p.name for p in (ROOT / 'config').glob('*.py')))
def test_profiles(path):
    for stage in STAGES:
        if (ROOT / f'{stage}.py').exists():
            done = subprocess.run([sys.executable, 'configurator.py', f'{stage}.py', f'config/{path}'], cwd=ROOT,
                                  capture_output=True, text=True)
            assert done.returncode == 0, done.stderr

@pytest.mark.parametrize('name', SHELL)
def test_shell(name):
    text = text_of(name)
    assert 'set -euo pipefail' in text and 'sudo' not in text
    subprocess.run(['bash', '-n', name], cwd=ROOT, check=True)

def commands(text):
    """The words of each `python X.py ...` in a text: its own lines, those after a $, and those in `backticks`."""
    for line in re.findall(r'(?:python3?|torchrun[^`\n]*?|bash) +[\w/.-]+\.(?:py|sh)\b[^`\n|>#]*', text):
        words = re.split(r' {2,}|\s*(?:&&|;)', line)[0].split()  # two spaces: the explanation begins
        first = next(i for i, word in enumerate(words) if word.endswith(('.py', '.sh')))
        yield words[first:]

@pytest.mark.parametrize('name', ['README.md'] + [f'{stage}.py' for stage in STAGES])
def test_commands_in_texts(name):
    """Each command that a reader may copy names a script, profiles and settings that exist."""
    text = text_of(name)
    if name.endswith('.py'):
        text = ast.get_docstring(ast.parse(text))
    every = {key for stage in STAGES if (ROOT / f'{stage}.py').exists() for key in settings_of(stage)}
    for script, *words in commands(text):
        if not (ROOT / script).exists() and Path(script).stem in STAGES + ['speedrun']:
            continue  # not written yet
        assert (ROOT / script).is_file(), f'{name}: no script {script}'
        stage = 'any' if script == 'configurator.py' else Path(script).stem
        known = settings_of(stage) if stage in STAGES else every
        for word in words:
            if re.fullmatch(r'config/\w+\.py', word) and (ROOT / 'config').exists():
                assert (ROOT / word).is_file() or not list((ROOT / 'config').glob('*.py')), f'{name}: no profile {word}'
            flag = re.match(r'--([\w-]+)', word)
            if flag and flag[1] != 'help' and script.endswith(('.py', 'speedrun.sh')):
                assert flag[1].replace('-', '_') in known, f'{name}: {script} has no setting {flag[1]}'

def test_nothing_made_is_checked_in():
    ends = ('.pt', '.bin', '.partial', '.pyc')
    assert [n for n in own_files() if n.startswith(('data/', 'out/', '.venv/')) or n.endswith(ends)] == []

def test_requirements():
    names = re.findall(r'^([\w-]+)', text_of('requirements.txt'), re.M)
    assert names == ['torch', 'numpy', 'tiktoken', 'requests']
