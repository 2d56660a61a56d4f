"""Settings from profiles and flags, and errors: a mistake of the user is one line that says what to do."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator

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
def folder(tmp_path, monkeypatch):
    shutil.copy(ROOT / 'configurator.py', tmp_path)
    (tmp_path / 'pretrain.py').write_text(PRETRAIN, encoding='utf-8')
    (tmp_path / 'sft.py').write_text(SFT, encoding='utf-8')
    (tmp_path / 'model.py').write_text('value = 1\n', encoding='utf-8')  # not a script
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # configure sets it
    return tmp_path

def run(folder, *argv, script='pretrain.py', cwd=None, **env):
    """-> exit code, stdout, stderr of a script."""
    env = {**os.environ, 'PYTHONIOENCODING': 'utf-8', **env}
    done = subprocess.run([sys.executable, str(folder / script), *argv], cwd=cwd or folder, env=env,
                          capture_output=True, text=True, encoding='utf-8', timeout=60)
    return done.returncode, done.stdout, done.stderr

def settings(folder, *argv, script='pretrain.py'):
    """What configure returns, without a process of its own."""
    before = sys.argv
    sys.argv = [script, *argv]
    try:
        return configurator.configure({'__file__': str(folder / script)}, quiet=True)
    finally:
        sys.argv = before

def error(folder, *argv, **kw):
    """The one line that a mistake gets."""
    with pytest.raises(AssertionError) as e:
        settings(folder, *argv, **kw)
    assert '\n' not in str(e.value)
    return str(e.value)

def profile(folder, text, name='tiny.py'):
    path = folder / 'config' / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding='utf-8')
    return f'config/{name}'

def test_defaults(folder):
    code, out, err = run(folder)
    assert (code, err, out.count('\n')) == (0, '', 1)  # nothing changed, nothing said
    assert json.loads(out) == dict(data_dir='data/toytown', start='x', max_iters=600, batch_size=32, learning_rate=6e-4,
                                   compile=True, betas=[0.9, 0.95], note=None)

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
    ('--betas=(0.8, 0.9)', 'betas', (0.8, 0.9)),
    ('--betas=0.8,0.9', 'betas', (0.8, 0.9)),
    ('--batch_size=64', 'batch_size', 64),
    ('batch_size=64', 'batch_size', 64), # a line of a profile
    ('compile=no', 'compile', False),
])
def test_values(folder, flag, name, value):
    got = settings(folder, flag)[name]
    assert got == value and type(got) is type(value)

@pytest.mark.parametrize('argv, words', [
    (['--lerning_rate=1e-3'],
     "command line: unknown setting 'lerning_rate' of pretrain.py, did you mean 'learning_rate'?"),
    (['--epochs=2'], "unknown setting 'epochs' of pretrain.py, it is a setting of sft.py"),
    (['--max_iters', '100'], "no config file '100' (settings are written --name=value)"),
    (['100'], "no config file '100' (settings are written --name=value)"),
    (['config/none.py'], "no config file 'config/none.py'"),
    (['sft.py'], "no config file 'sft.py'"),
    (['--max_iters=0.5'], "max_iters = 0.5 is not int (the default is 600)"),
    (['--max_iters=inf'], 'is not int'),
    (['--max_iters=ten'], "command line: max_iters = 'ten' is not int (the default is 600)"),
    (['--max_iters='], 'is not int'),
    (['--max_iters'], 'command line: --max_iters needs a value: --max_iters=VALUE'),
    (['--max_iters=True'], 'is not int'),
    (['--start'], '--start needs a value'),
    (['--betas', '0.8,0.9'], "no config file '0.8,0.9' (settings are written --name=value)"),
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
    (['lerning_rate=1'], "unknown setting 'lerning_rate', did you mean 'learning_rate'?"),
    (['epochs=two'], "epochs = 'two' is not int"), # the value is checked for sft.py
    (['-x'], "no config file '-x'"),
])
def test_mistakes(folder, argv, words):
    assert words in error(folder, *argv)

def test_profile_first_then_flags(folder):
    path = profile(folder, 'max_iters = 5\nlearning_rate = 1\ncompile = False\n')
    more = profile(folder, 'max_iters = 6\nbetas = 0.5, 0.6\n', 'more.py')
    nine = '--max_iters=9'
    for argv in ([nine, path, more], [path, more, nine], [path, '--max_iters=8', more, nine]):
        got = settings(folder, *argv)
        assert (got['max_iters'], got['learning_rate'], got['compile'], got['betas']) == (9, 1.0, False, (0.5, 0.6))
    assert settings(folder, 'max_iters=9', 'epochs=1', path)['max_iters'] == 9
    assert settings(folder, path, more)['max_iters'] == 6 and settings(folder, more, path)['max_iters'] == 5

def test_profile_of_all_stages(folder):
    path = profile(folder, 'import os.path\nfrom math import pi as _pi, sqrt\n_half = 10\nsft = dict(epochs=1)\n'
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
    ('max_iters = five', "config/tiny.py: NameError: name 'five' is not defined"),
    ('betas = [0.5, 0.6]', 'is not tuple'),
    ('sft = dict(epochs="1")', "epochs = '1' is not int"),
    ('pretrain = dict(epochs=1)', 'it is a setting of sft.py'),
    ('pretrian = dict(max_iters=1)', "did you mean 'pretrain'?"),
    ('pretrain = {3: 4}', "unknown setting '3'"),
    ('data_dir = "x"\nmax_iters = = 3', 'config/tiny.py: SyntaxError: invalid syntax (<string>, line 2)'),
    ('data_dir = "x"\n\nmax_iters = 1 / 0', 'config/tiny.py: ZeroDivisionError: division by zero'),
])
def test_profile_mistakes(folder, text, words):
    path = profile(folder, text)
    assert words in error(folder, path)
    assert words in error(folder, path, script='sft.py') # each stage checks those of all stages

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
    path = profile(folder, 'max_iters = 5\ncompile = False\nepochs = 1\n')
    code, out, err = run(folder, path, '--start=y', '--compile=true')
    first, second, config = out.splitlines()
    assert first == 'config/tiny.py: max_iters = 5, compile = False'
    assert second == "command line: start = 'y', compile = True"
    code, out, err = run(folder, path, '--start=y', RANK='1')
    assert len(out.splitlines()) == 1

def test_any_folder(folder, tmp_path_factory):
    profile(folder, 'max_iters = 5\n')
    elsewhere = tmp_path_factory.mktemp('elsewhere')
    (elsewhere / 'mine.py').write_text('max_iters = 6\n', encoding='utf-8')
    code, out, err = run(folder, 'config/tiny.py', cwd=elsewhere) # in the script's folder
    assert code == 0 and json.loads(out.splitlines()[-1])['max_iters'] == 5
    code, out, err = run(folder, 'mine.py', cwd=elsewhere) # in the working directory
    assert code == 0 and json.loads(out.splitlines()[-1])['max_iters'] == 6

def test_json(folder):
    path = profile(folder, 'max_iters = 5\n')
    code, out, err = run(folder, 'pretrain.py', path, '--betas=1,2', script='configurator.py')
    assert code == 0 and json.loads(out) == {**settings(folder), 'max_iters': 5, 'betas': [1, 2]}
    for script in ('none.py', 'model.py', 'configurator.py'):
        code, out, err = run(folder, script, script='configurator.py')
        assert (code, out) == (1, '') and err == f'error: {script} has no settings above a configure(globals())\n'

def test_a_stage_with_a_syntax_error_is_named(folder):
    (folder / 'sft.py').write_text('x = = 1\n' + SFT, encoding='utf-8')
    code, out, err = run(folder)
    assert code == 1 and 'sft.py", line 1' in err and 'SyntaxError' in err
    (folder / 'sft.py').write_text(SFT + 'x = = 1\n', encoding='utf-8') # below the settings: only sft.py stops
    assert run(folder)[0] == 0

@pytest.mark.parametrize('typed, path', [
    ('~/corpus', '{}/corpus'), ('~', '{}'), ('~/a.txt,~/b.txt', '{}/a.txt,{}/b.txt'), ('x.txt, ~/b c', 'x.txt, {}/b c'),
    ('a~/b', 'a~/b'), ('/x/~/y', '/x/~/y'), ('x~', 'x~'), ('~nobody-of-this-name/x', '~nobody-of-this-name/x')])
def test_every_path_may_begin_with_the_home_folder(folder, monkeypatch, typed, path):
    """The shell does not expand ~ behind = and in quotes. In a profile nobody does."""
    monkeypatch.setenv('HOME', '/home/me')
    monkeypatch.setenv('USERPROFILE', '/home/me')
    in_profile = profile(folder, f'data_dir = {typed!r}\n')
    for word in (f'--data_dir={typed}', f'data_dir={typed}', in_profile):
        assert settings(folder, word)['data_dir'] == path.format('/home/me', '/home/me')

def test_a_text_for_the_model_keeps_its_tilde(monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    for script, name in (('chat.py', 'prompt'), ('chat.py', 'system'), ('tokenizer.py', 'show'),
                         ('tokenizer.py', 'pattern')):
        monkeypatch.setattr(sys, 'argv', [script, f'--{name}=~/x'])
        assert configurator.configure({'__file__': str(ROOT / script)}, quiet=True)[name] == '~/x'

# -----------------------------------------------------------------------------
# errors
STOPS = """from configurator import configure
steps = 3  # a setting
config = configure(globals())
"""
FAIL = """
def fail(message):
    assert False, message
"""
OUT_OF_MEMORY = 'error: out of memory: lower --batch_size, --micro_batch_size or --block_size'

def stop(folder, code, **env):
    """-> exit code, stdout, stderr of a script that ends like this. The modules ours and theirs can fail for it."""
    (folder / 'stops.py').write_text(STOPS + code, encoding='utf-8')
    (folder / 'ours.py').write_text(FAIL, encoding='utf-8')
    (folder / 'package').mkdir(exist_ok=True)
    (folder / 'package' / 'theirs.py').write_text(FAIL, encoding='utf-8')
    return run(folder, script='stops.py', **env)

@pytest.mark.parametrize('code, line', [
    ('assert steps == 2, f"steps {steps} is not 2: pass --steps=2"', 'error: steps 3 is not 2: pass --steps=2'),
    ('import ours; ours.fail("of a shared file")', 'error: of a shared file'),
    ('raise AssertionError("x.jsonl:3: bad row") from ValueError()', 'error: x.jsonl:3: bad row'),
    ('open("none.bin")', 'error: none.bin: No such file or directory'),
    ('open("no\\nsuch file")', 'error: no such file: No such file or directory'), # a name of two lines
    ('raise OSError(28, "No space left on device")', 'error: output: No space left on device'),
    ('raise OSError(28, "No space left on device", "out/base.jsonl")', 'error: out/base.jsonl: No space left on device'),
    ('assert False, "stopped at step 3 and saved"', 'stopped at step 3 and saved'), # the user's wish is no error
    ('raise MemoryError', OUT_OF_MEMORY),
    ('raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory: you tried to ...")', OUT_OF_MEMORY),
    ('raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")', OUT_OF_MEMORY),
])
def test_a_mistake_is_one_line(folder, code, line):
    assert stop(folder, code) == (1, '', line + '\n')

@pytest.mark.parametrize('code, words', [
    ('from package import theirs; theirs.fail("shape")', 'AssertionError: shape'),
    ('assert steps == 2', 'AssertionError'),
    ('raise ValueError("a bug")', 'ValueError: a bug'),
])
@pytest.mark.parametrize('rank', ['0', '1'])
def test_other_errors_keep_their_traceback(folder, code, words, rank):
    code, out, err = stop(folder, code, RANK=rank)
    assert code == 1 and err.startswith('Traceback') and words in err

def test_ctrl_c_and_a_closed_pipe(folder):
    code, out, err = stop(folder, 'raise KeyboardInterrupt')
    assert code != 0 and err == 'stopped; the same command continues\n'
    assert stop(folder, 'print("x")\nraise BrokenPipeError(32, "Broken pipe")')[::2] == (1, '')

CTRL_C = """
import os, signal
class Torch: # numpy makes an ImportError of an exception that happens while it is imported
    try:
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(10**6)) # time for the signal
    except BaseException:
        raise ImportError('numpy is not installed well: please read 40 lines')
"""

def test_ctrl_c_while_torch_is_imported(folder):
    listen = 'import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n' # also if started with nohup
    (folder / 'stops.py').write_text(listen + STOPS.replace('steps', CTRL_C + 'steps', 1), encoding='utf-8')
    assert run(folder, script='stops.py') == (130, '', 'stopped; the same command continues\n')
    assert run(folder, script='stops.py', RANK='1') == (130, '', '')
    # later it is an exception as always
    caught = 'try:' + CTRL_C.replace('\n', '\n    ') + '\nexcept ImportError as e:\n    print(e)'
    (folder / 'stops.py').write_text(listen + STOPS + caught, encoding='utf-8')
    assert run(folder, script='stops.py') == (0, 'numpy is not installed well: please read 40 lines\n', '')

def test_configurator_is_imported_before_torch():
    """It makes Ctrl-C one line, so all scripts import it first."""
    for path in ROOT.glob('*.py'):
        text = path.read_text(encoding='utf-8')
        if 'configure(globals())' in text and path.name != 'configurator.py':
            first = [line for line in text.split('\n') if line.startswith(('import ', 'from '))][0]
            assert first.startswith('from configurator import configure'), path.name

def test_a_terminal_that_lacks_characters(folder):
    """print never fails, wherever the text comes from: an answer, a name, half of a character in an argument."""
    for encoding, shown in (('latin-1', '\\u2019'), ('ascii', '\\u2019'), ('utf-8', '’')):
        code, out, err = stop(folder, 'print("x’y", flush=True)\nprint("\\udcc3")', PYTHONIOENCODING=encoding)
        assert (code, out, err) == (0, f'x{shown}y\n\\udcc3\n', '')

def test_rank_0_prints_for_all(folder):
    """Other ranks wait until torchrun ends them. What one rank alone meets is printed after three seconds."""
    assert stop(folder, 'assert steps == 2, "only here"', RANK='1') == (1, '', 'error: only here\n')
    process = subprocess.Popen([sys.executable, 'stops.py'], cwd=folder, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, 'RANK': '1'})
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=1.5)
    process.terminate()
    assert process.communicate(timeout=10)[1] == ''
