"""Settings from profiles and flags: each mistake gets one line that says what to do."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PRETRAIN = '''"""A stage."""
import json
import os  # not a setting
from configurator import configure

# -----------------------------------------------------------------------------
# data
data_dir = 'data/toytown'  # where the "#1" text is
start = 'x'                # é: a text
# training
max_iters = 600            # steps
batch_size = 4 * 8         # windows
learning_rate = 6e-4       # at its highest
compile = True             # torch.compile
betas = (0.9, 0.95)        # of AdamW
layers = [1, 2]            # a list
note = None                # anything
_private = 3
where = os.sep             # needs a name: not a setting
config = configure(globals())
derived = max_iters // 2
print(json.dumps(config))
assert all(globals()[k] == v for k, v in config.items()) and derived == config['max_iters'] // 2
'''
SFT = '''from configurator import configure
max_iters = 50    # steps
epochs = 3        # passes
config = configure(globals())
'''

@pytest.fixture
def folder(tmp_path):
    shutil.copy(ROOT / 'configurator.py', tmp_path)
    (tmp_path / 'pretrain.py').write_text(PRETRAIN, encoding='utf-8')
    (tmp_path / 'sft.py').write_text(SFT, encoding='utf-8')
    (tmp_path / 'model.py').write_text('value = 1\n', encoding='utf-8')  # no stage
    return tmp_path

def run(folder, *argv, script='pretrain.py', cwd=None, **env):
    """-> exit code, stdout, stderr of a script."""
    env = {**os.environ, 'PYTHONIOENCODING': 'utf-8', **env}
    done = subprocess.run([sys.executable, str(folder / script), *argv], cwd=cwd or folder, env=env,
                          capture_output=True, text=True, encoding='utf-8', timeout=60)
    return done.returncode, done.stdout, done.stderr

def settings(folder, *argv, **kw):
    code, out, err = run(folder, *argv, **kw)
    assert code == 0, err
    return json.loads(out.splitlines()[-1])

def error(folder, *argv, **kw):
    """The one line that a mistake gets."""
    code, out, err = run(folder, *argv, **kw)
    assert code == 1 and out == '' and err.count('\n') == 1, (code, out, err)
    return err.strip()

def profile(folder, text, name='tiny.py'):
    path = folder / 'config' / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding='utf-8')
    return f'config/{name}'

def test_defaults(folder):
    code, out, err = run(folder)
    assert (code, err, out.count('\n')) == (0, '', 1)  # nothing changed, nothing said
    assert json.loads(out) == dict(data_dir='data/toytown', start='x', max_iters=600, batch_size=32, learning_rate=6e-4,
                                   compile=True, betas=[0.9, 0.95], layers=[1, 2], note=None)

@pytest.mark.parametrize('flag, name, value', [
    ('--learning_rate=1', 'learning_rate', 1.0),
    ('--max_iters=1e4', 'max_iters', 10_000),
    ('--max_iters=10_000', 'max_iters', 10_000),
    ('--max-iters=7', 'max_iters', 7),
    ('--compile=false', 'compile', False),
    ('--compile=False', 'compile', False),
    ('--compile=0', 'compile', False),
    ('--compile=no', 'compile', False),
    ('--compile', 'compile', True),
    ('--compile=yes', 'compile', True),
    ('--start=42', 'start', '42'),
    ('--start=a=b', 'start', 'a=b'),
    ('--start=', 'start', ''),
    ("--start=__import__('os').abort()", 'start', "__import__('os').abort()"),
    ('--note=hi', 'note', 'hi'),
    ('--note=None', 'note', None),
    ('--note=3', 'note', 3),
    ("--note=__import__('os').abort()", 'note', "__import__('os').abort()"),  # text, never evaluated
    ('--betas=(0.8, 0.9)', 'betas', [0.8, 0.9]),
    ('--betas=0.8,0.9', 'betas', [0.8, 0.9]),
    ('--layers=(3, 4)', 'layers', [3, 4]),
    ('--batch_size=64', 'batch_size', 64),
])
def test_values(folder, flag, name, value):
    got = settings(folder, flag)[name]
    assert got == value and type(got) is type(value)

@pytest.mark.parametrize('argv, words', [
    (['--lerning_rate=1e-3'],
     "command line: unknown setting 'lerning_rate' of pretrain.py, did you mean 'learning_rate'?"),
    (['--epochs=2'], "unknown setting 'epochs' of pretrain.py, it is a setting of sft.py"),
    (['--max_iters', '100'], '--max_iters=100'),
    (['100'], "no config file '100' (settings are written --name=value)"),
    (['config/none.py'], "no config file 'config/none.py'"),
    (['sft.py'], "no config file 'sft.py'"),
    (['--max_iters=0.5'], "max_iters = '0.5' is not int (the default is 600)"),
    (['--max_iters=inf'], 'is not int'),
    (['--max_iters=ten'], "command line: max_iters = 'ten' is not int (the default is 600)"),
    (['--max_iters='], 'is not int'),
    (['--max_iters'], 'is not int'),
    (['--max_iters=True'], 'is not int'),
    (['--start'], 'is not str'),
    (['--compile=maybe'], "compile = 'maybe' is not bool"),
    (['--betas=3'], 'is not tuple'),
    (['--betas=os.getcwd()'], 'is not tuple'),
    (['--derived=3'], "unknown setting 'derived'"),
    (['--os=3'], "unknown setting 'os'"),
    (['--where=3'], "unknown setting 'where'"),
    (['--_private=3'], "unknown setting '_private'"),
    (['--config=[]'], "unknown setting 'config'"),
    (['--__name__=x'], "unknown setting '__name__'"),
    (['--=3'], "unknown setting ''"),
    (['-x'], "no config file '-x'"),
])
def test_mistakes(folder, argv, words):
    assert words in error(folder, *argv)

def test_profile_first_then_flags(folder):
    path = profile(folder, 'max_iters = 5\nlearning_rate = 1\ncompile = False\n')
    more = profile(folder, 'max_iters = 6\nbetas = [0.5, 0.6]\n', 'more.py')
    nine = '--max_iters=9'
    for argv in ([nine, path, more], [path, more, nine], [path, '--max_iters=8', more, nine]):
        got = settings(folder, *argv)
        assert (got['max_iters'], got['learning_rate'], got['compile'], got['betas']) == (9, 1.0, False, [0.5, 0.6])
    assert settings(folder, path, more)['max_iters'] == 6 and settings(folder, more, path)['max_iters'] == 5

def test_profile_of_all_stages(folder):
    path = profile(folder, 'import os.path\nfrom math import pi, sqrt\n_half = 10\nsft = dict(epochs=1)\n'
                           'pretrain = dict(max_iters=2 * _half)\nmax_iters = 5\nepochs = 2\n'
                           'def double(x):\n    return 2 * x\n')
    assert settings(folder, path)['max_iters'] == 20  # the dict wins wherever it stands
    code, out, err = run(folder, 'sft.py', path, script='configurator.py')
    assert json.loads(out) == dict(max_iters=5, epochs=1)

@pytest.mark.parametrize('text, words', [
    ('lerning_rate = 1', "config/tiny.py: unknown setting 'lerning_rate', did you mean 'learning_rate'?"),
    ('max_iters = "ten"', "config/tiny.py: max_iters = 'ten' is not int"),
    ('max_iters = "10"', "'10' is not int"),
    ('start = 3', 'start = 3 is not str'),
    ('compile = 1', 'is not bool'),
    ('sft = dict(epoch=1)', "config/tiny.py: unknown setting 'epoch' of sft.py, did you mean 'epochs'?"),
    ('sft = dict(epochs="1")', "epochs = '1' is not int"),
    ('pretrain = dict(epochs=1)', 'it is a setting of sft.py'),
    ('pretrian = dict(max_iters=1)', "did you mean 'pretrain'?"),
    ('pretrain = {3: 4}', "unknown setting '3'"),
    ('data_dir = "x"\nmax_iters = = 3', 'config/tiny.py:2: SyntaxError'),
    ('data_dir = "x"\n\nmax_iters = 1 / 0', 'config/tiny.py:3: ZeroDivisionError: division by zero'),
])
def test_profile_mistakes(folder, text, words):
    path = profile(folder, text)
    assert words in error(folder, path)
    for stage in ('pretrain.py', 'sft.py'):  # also those of stages that do not run now
        code, out, err = run(folder, stage, path, script='configurator.py')
        assert (code, out, err.count('\n')) == (1, '', 1)

def test_help(folder):
    path = profile(folder, 'max_iters = 5\n')
    code, out, err = run(folder, path, '--help', '--start=é')
    assert code == 0 and err == ''
    lines = [' '.join(line.split()) for line in out.splitlines()]
    assert 'max_iters = 5 steps (default: 600)' in lines
    assert """data_dir = 'data/toytown' where the "#1" text is""" in lines
    assert "start = 'é' é: a text (default: 'x')" in lines
    order = ['data', "start = 'é' é: a text (default: 'x')", 'training', 'max_iters = 5 steps (default: 600)']
    assert [line for line in lines if line in order] == order
    assert '_private' not in out and 'derived' not in out
    assert run(folder, '-h')[1] == run(folder, '--help')[1]

def test_overrides_are_printed_once_by_rank_0(folder):
    path = profile(folder, 'max_iters = 5\ncompile = False\n')
    code, out, err = run(folder, path, '--start=y', '--compile=true')
    first, second, config = out.splitlines()
    assert first == 'config/tiny.py: max_iters = 5'  # what won, and where it comes from
    assert sorted(second.removeprefix('command line: ').split(', ')) == ['compile = True', "start = 'y'"]
    code, out, err = run(folder, path, '--start=y', RANK='1')
    assert len(out.splitlines()) == 1
    assert run(folder, '--nonsense=1', RANK='1') == (1, '', '')  # every rank leaves, one speaks
    assert run(folder, '--help', RANK='1') == (0, '', '')

def test_any_folder(folder, tmp_path_factory):
    profile(folder, 'max_iters = 5\n')
    elsewhere = tmp_path_factory.mktemp('elsewhere')
    assert settings(folder, 'config/tiny.py', cwd=elsewhere)['max_iters'] == 5  # beside the script
    (elsewhere / 'mine.py').write_text('max_iters = 6\n', encoding='utf-8')
    assert settings(folder, 'mine.py', cwd=elsewhere)['max_iters'] == 6  # where the user stands

def test_json(folder):
    path = profile(folder, 'max_iters = 5\n')
    code, out, err = run(folder, 'pretrain.py', path, '--betas=1,2', script='configurator.py')
    assert json.loads(out) == {**settings(folder), 'max_iters': 5, 'betas': [1, 2]}
    assert 'torch' not in out and run(folder, 'model.py', script='configurator.py')[0] == 1
    assert error(folder, 'none.py', script='configurator.py') == 'none.py has no settings above a configure(globals())'

def test_a_stage_with_a_syntax_error_is_named(folder):
    (folder / 'sft.py').write_text(SFT + 'x = = 1\n', encoding='utf-8')
    assert settings(folder)['max_iters'] == 600  # it stops only those who need it
    assert 'sft.py:5: ' in error(folder, '--max_iters=3')
