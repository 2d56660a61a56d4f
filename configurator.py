"""
Settings are plain globals at the top of a script; profiles (Python files) change them first, then flags:
    python pretrain.py config/tiny.py --max_iters=100 --compile=false     (--help prints every setting)
A setting is a line `name = literal  # comment` above `config = configure(globals())`; nothing else can be changed.
In a profile a plain name is for every stage that has it, `pretrain = dict(n_layer=4)` for that one, _names are its own.
"""
import ast, difflib, json, os, pathlib, re, sys, textwrap, types

RANK0 = os.environ.get('RANK', '0') == '0'
BOOLS = {'true': True, '1': True, 'yes': True, 'on': True, 'false': False, '0': False, 'no': False, 'off': False}

def fail(message):
    sys.exit(message if RANK0 else 1)  # one line on stderr and exit code 1; all ranks leave, one speaks

def read_settings(path):
    """-> {name: (default, comment, the heading above it)} of a script; None if it does not call configure."""
    text = path.read_text(encoding='utf-8', errors='replace') if path.is_file() else ''
    try:
        tree = ast.parse(text if 'configure(' in text else '')
    except SyntaxError as e:
        fail(f'{path}:{e.lineno}: {e.msg}')
    lines, settings = text.split('\n'), {}
    for node in tree.body:
        if re.match(r'(\w+ = )?(configurator\.)?configure\(globals\(', ast.unparse(node)):
            return settings
        names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]  # in a setting: its own, and no other
        if isinstance(node, ast.Assign) and names == [ast.unparse(node.targets[0])] and names[0][0] != '_':
            comment = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode().strip('# ')
            heading = lines[node.lineno - 2].strip('#-= ') if lines[node.lineno - 2].startswith('#') else ''
            settings[names[0]] = eval(ast.unparse(node.value)), comment, heading  # eval: `64 * 1024` is a literal too

def read_profile(path, stages):
    """-> [(source, stage, name, value)]: first the plain names (stage None), then those in the dict of one stage."""
    space = {'__file__': str(path)}
    try:
        exec(compile(path.read_text(encoding='utf-8'), str(path), 'exec'), space)
    except Exception as e:
        line = getattr(e, 'lineno', getattr(e.__traceback__.tb_next, 'tb_lineno', 1))
        fail(f'{path}:{line}: {type(e).__name__}: {e}')
    items = [(k, v) for k, v in space.items() if k[0] != '_' and not callable(v) and type(v) is not types.ModuleType]
    dicts = [(k, v) for k, v in items if k in stages and isinstance(v, dict)]
    return [(path, None, *i) for i in items if i not in dicts] + [(path, s, *i) for s, d in dicts for i in d.items()]

def cast(value, default, where, text):
    """A value (`text`: as typed) as the type of the default: 1 is a float too and 1e4 an int, but 0.5 is no int."""
    kind, new = type(default), value
    try:
        if text and kind is not str:
            new = BOOLS[value.lower()] if kind is bool else ast.literal_eval(value)
        if {kind, type(new)} in ({int, float}, {tuple, list}) and (type(new) is not float or new == int(new)):
            new = kind(new)
    except Exception:
        pass  # it stays as it is, which suits only a default of None
    if type(new) is not kind and default is not None:
        fail(f'{where} = {value!r} is not {kind.__name__} (the default is {default!r})')
    return new

def configure(space, argv=None, positional='', quiet=False):
    """Change the settings among a script's globals; -> all of them. `positional`: the setting for a bare word."""
    words = sys.argv[1:] if argv is None else argv
    argv = [word for word in words if word not in ('-h', '--help')]
    script, changes, flags, origin = pathlib.Path(space['__file__']), [], [], {}
    paths = sorted(script.parent.glob('*.py')) if argv else [script]  # all, to check the names for other stages too
    stages = {path.stem: rows for path in paths if (rows := read_settings(path)) is not None}
    settings = stages.get(script.stem) or fail(f'{script} has no settings above a configure(globals())')
    for before, word in zip(['', *argv], argv):
        path = next((p for p in (pathlib.Path(word), script.parent / word) if p.suffix == '.py' and p.is_file()), None)
        bare = before.startswith('--') and '=' not in before
        if word.startswith('--') or positional and not path and not bare and not word.endswith('.py'):
            name, equals, text = (word if word.startswith('--') else f'--{positional}={word}').partition('=')
            flags.append(('command line', script.stem, name[2:].replace('-', '_'), text if equals else True))
        elif path and read_settings(path) is None:
            changes += read_profile(path, stages)
        else:
            fail(f"no config file '{word}' (settings are written {f'{before}={word}' if bare else '--name=value'})")
    values, lines = {name: row[0] for name, row in settings.items()}, []
    for where, stage, name, value in changes + flags:  # flags last: they win, wherever they stand
        owners = [s for s in stages if name in stages[s]]
        if not owners or stage not in (None, *owners):
            known = stages[stage] if stage else [k for s in stages for k in (s, *stages[s])]
            hint = 'did you mean %r?' % (difflib.get_close_matches(str(name), known, 1) or ['--help'])[0]
            hint = f"it is a setting of {', '.join(s + '.py' for s in owners)}" if owners else hint
            fail(f"{where}: unknown setting '{name}'{f' of {stage}.py' if stage else ''}, {hint}")
        for s in owners if stage is None else [stage]:
            new = cast(value, stages[s][name][0], f'{where}: {name}', where == 'command line')
            if s == script.stem:
                values[name], origin[name] = new, where
    for name, (default, comment, heading) in settings.items():
        was = '' if values[name] == default else f' (default: {default!r})'
        lines.append(f'\n{heading}\n' * bool(heading) + f'  {name} = {values[name]!r}'.ljust(36) + f' {comment}{was}')
    if words != argv:
        sys.exit(print('\n'.join(lines)) if RANK0 else 0)  # print gives None, which is exit code 0 as well
    for where in dict.fromkeys(origin.values()) if RANK0 and not quiet else ():
        changed = ', '.join(f'{name} = {values[name]!r}' for name in origin if origin[name] == where)
        print(textwrap.fill(f'{where}: {changed}', 100, subsequent_indent='    ', break_long_words=False))
    space.update(values)
    return values

if __name__ == '__main__':  # `python configurator.py pretrain.py config/tiny.py`: the settings as JSON, without a run
    print(json.dumps(configure({'__file__': sys.argv[1]}, sys.argv[2:], quiet=True), indent=1))
