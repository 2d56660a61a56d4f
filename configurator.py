"""
Settings are plain globals at the top of a script. Profiles (Python files) change them, then flags:

    python pretrain.py config/tiny.py --max_iters=100 --compile=false
    python pretrain.py config/tiny.py --help            # every setting, its value and its comment
    python configurator.py pretrain.py config/tiny.py   # the settings as JSON, without a run

A setting is a line `name = literal  # comment` above `config = configure(globals())`. In a profile,
`n_layer = 4` is for every stage that has n_layer; `sft = dict(epochs=1)` is for sft.py only.
"""
import os
import signal
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
RANK = int(os.environ.get('RANK', 0)) # set by torchrun
STOPPED = 'stopped; the same command continues'

def leave_at_once(number, frame):
    """Handles Ctrl-C while torch is imported. numpy would hide an exception in another one."""
    if RANK == 0:
        print(STOPPED, file=sys.stderr)
    os._exit(130)

script_folder = os.path.dirname(os.path.realpath(sys.argv[0])) # another one if this is a test
old_handler = signal.getsignal(signal.SIGINT) # after nohup Ctrl-C is ignored
if script_folder == HERE and old_handler is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave_at_once) # until configure() is called

import ast
import difflib
import errno
import itertools
import json
import re
import time
import traceback
from pathlib import Path

TEXTS = ('prompt', 'system', 'show', 'pattern') # settings in which ~ is a letter, not a folder
BOOLS = {'true': True, 'yes': True, '1': True, 'false': False, 'no': False, '0': False}

# -----------------------------------------------------------------------------
# reading: a change is (source, stage, name, value); stage None means every stage that has the name
def read_settings(path):
    """Settings of a script: {name: (default, comment, heading)}. Empty if it has no configure()."""
    text = path.read_text(encoding='utf-8', errors='replace')
    text, call, _ = text.partition('\nconfig = configure(globals()')
    if not call:
        return {}
    lines = text.split('\n')
    settings = {}
    for node in ast.parse(text, str(path)).body:
        # A literal uses no other name. `import os`, `x = os.sep` and `_x = 1` are not settings.
        names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
        if isinstance(node, ast.Assign) and len(names) == 1 and not names[0].startswith('_'):
            default = eval(ast.unparse(node.value)) # literal_eval would refuse 64 * 1024
            rest = lines[node.end_lineno - 1].encode()[node.end_col_offset:] # ast counts in bytes
            above = lines[node.lineno - 2]
            heading = above.strip('# ') if above.startswith('# ') else ''
            settings[names[0]] = default, rest.decode().strip('# '), heading
    return settings

def read_profile(path, stages):
    """Run a profile and return its changes: plain names, then the dicts of stages, which win."""
    space = {'__file__': str(path)}
    try:
        exec(path.read_text(encoding='utf-8'), space)
    except Exception as e: # the line number of a SyntaxError is part of its text
        raise AssertionError(f'{path}: {type(e).__name__}: {e}') from None
    plain = []
    of_stages = []
    for name, value in space.items(): # a profile may also import modules and define functions
        is_helper = name.startswith('_') or callable(value) or isinstance(value, type(os))
        if name in stages and isinstance(value, dict):
            of_stages += [(path, name, key, v) for key, v in value.items()]
        elif not is_helper:
            plain.append((path, None, name, value))
    return plain + of_stages

def read_command_line(words, script, stages):
    """Return the changes of all words: profiles first, so that flags win wherever they stand."""
    profiles = []
    flags = []
    for word in words:
        name, equals, text = word.partition('=')
        path = Path(word) if Path(word).is_file() else script.parent / word
        if word.startswith('--'):
            value = text if equals else True # `--compile` alone means true
            flags.append(('command line', script.stem, name[2:].replace('-', '_'), value))
        elif equals and name.isidentifier(): # without dashes it is like a line of a profile
            flags.append(('command line', None, name, text))
        else:
            is_profile = path.suffix == '.py' and path.is_file() and not read_settings(path)
            assert is_profile, f"no config file '{word}' (settings are written --name=value)"
            profiles += read_profile(path, stages)
    return profiles + flags

# -----------------------------------------------------------------------------
# checking and setting
def find_owners(source, stage, name, stages):
    """The stages that a change is for. An unknown name is an error that hints at a similar one."""
    owners = [s for s in stages if name in stages[s]]
    if owners and stage in (None, *owners):
        return [stage] if stage else owners
    if owners:
        hint = 'it is a setting of ' + ', '.join(f'{s}.py' for s in owners)
    else:
        known = list(itertools.chain(stages, *stages.values())) # names of stages and of settings
        nearest = difflib.get_close_matches(str(name), known, 1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else '--help lists all'
    of_stage = f' of {stage}.py' if stage else ''
    raise AssertionError(f"{source}: unknown setting '{name}'{of_stage}, {hint}")

def cast(value, default, source, name):
    """The value in the type of the default: '1e4' becomes 10000 where the default is 600."""
    kind = type(default)
    is_bare = value is True and source == 'command line' # --batch_size, and nothing behind it
    assert kind is bool or not is_bare, f'{source}: --{name} needs a value: --{name}=VALUE'
    if source == 'command line' and isinstance(value, str) and kind is not str:
        try: # text is never run as code: this understands literals only
            value = BOOLS[value.lower()] if kind is bool else ast.literal_eval(value)
        except Exception:
            pass # it stays text; the last line accepts that only if the default is None
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer(): # 1e4, but not 0.5
        value = int(value)
    if type(value) is str and name not in TEXTS: # the shell expands ~ only where a word begins
        parts = re.split('(, *)', value) # of a list, with the commas
        value = ''.join(map(os.path.expanduser, parts))
    wrong = f'{name} = {value!r} is not {kind.__name__} (the default is {default!r})'
    assert default is None or type(value) is kind, f'{source}: {wrong}'
    return value

def configure(space, quiet=False):
    """Change the settings in a script's globals() and return all of them as {name: value}."""
    if signal.getsignal(signal.SIGINT) is leave_at_once: # all has been imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    script = Path(space['__file__'])
    # All scripts are read, so that names and values for the other stages are checked too.
    stages = {path.stem: read_settings(path) for path in sorted(script.parent.glob('*.py'))}
    settings = stages.get(script.stem)
    assert settings, f'{script} has no settings above a configure(globals())'

    words = [word for word in sys.argv[1:] if word not in ('-h', '--help')]
    values = {name: default for name, (default, _, _) in settings.items()}
    printed = {} # source -> what it changes
    for source, stage, name, value in read_command_line(words, script, stages):
        for owner in find_owners(source, stage, name, stages):
            new = cast(value, stages[owner][name][0], source, name)
            if owner == script.stem:
                values[name] = new
                printed.setdefault(source, []).append(f'{name} = {new!r}')

    if len(words) < len(sys.argv) - 1: # --help was among them
        print(f'usage: python {script.name} [profile.py ...] [--name=value ...]')
        for name, (default, comment, heading) in settings.items():
            if heading:
                print(f'\n{heading}')
            note = f' (default: {default!r})' if values[name] != default else ''
            print(f'  {name} = {values[name]!r}'.ljust(36) + f' {comment}{note}')
        sys.exit()

    for source, changes in printed.items():
        if RANK == 0 and not quiet:
            print(f'{source}: ' + ', '.join(changes))
    space.update(values)
    return values

# -----------------------------------------------------------------------------
# errors: what a user can correct is one line without a traceback
def print_error(kind, error, trace):
    """sys.excepthook of every script. After it, Python exits with code 1."""
    raised_in = os.path.realpath(traceback.extract_tb(trace)[-1].filename)
    is_ours = os.path.dirname(raised_in) == HERE
    text = str(error)
    if isinstance(error, AssertionError) and text and is_ours:
        # Ctrl-C between two steps is no error: the stage has saved and says so
        line = text if text.startswith('stopped at') else f'error: {text}'
    elif isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):
        line = f'error: {error.filename or "output"}: {error.strerror}'
    elif isinstance(error, ModuleNotFoundError) and is_ours:
        line = f'error: {text} in {sys.executable}: make and activate .venv, see README.md'
    elif isinstance(error, MemoryError) or 'out of memory' in text or 'allocate memory' in text:
        line = 'error: out of memory: lower --batch_size, --micro_batch_size or --block_size'
    elif isinstance(error, KeyboardInterrupt):
        line = STOPPED
    elif isinstance(error, BrokenPipeError): # `python chat.py | head`: the reader has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1) # Python flushes stdout once more at its end
        return
    else:
        return sys.__excepthook__(kind, error, trace)
    if RANK > 0: # most errors happen on all ranks: rank 0 prints, and torchrun ends this process
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    one_line = ' '.join(line.splitlines()) # a name can hold a line break
    print(one_line, file=sys.stderr)

sys.excepthook = print_error
if hasattr(sys.stdout, 'reconfigure'): # a terminal may lack characters: print escapes them
    sys.stdout.reconfigure(errors='backslashreplace')

if __name__ == '__main__':
    print(json.dumps(configure({'__file__': sys.argv.pop(1)}, quiet=True), indent=1))
