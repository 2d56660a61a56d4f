"""
Settings are plain globals at the top of a script; profiles (Python files) change them first, then flags:
    python pretrain.py config/tiny.py --max_iters=100 --compile=false     (--help prints every setting)
A setting is a line `name = literal  # comment` above `config = configure(globals())`; nothing else can be changed.
In a profile a plain name is for every stage that has it, `pretrain = dict(n_layer=4)` for that one, _names are its own.
"""
import ast, difflib, json, os, pathlib, re, sys, textwrap

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
    try:
        text, space = path.read_text(encoding='utf-8'), {'__file__': str(path)}
        exec(compile(text, str(path), 'exec'), space)
    except Exception as e:
        line = getattr(e, 'lineno', getattr(e.__traceback__.tb_next, 'tb_lineno', 1))
        fail(f'{path}:{line}: {type(e).__name__}: {e}')
    imported = {(a.asname or a.name).split('.')[0] for node in ast.parse(text).body for a in getattr(node, 'names', [])}
    items = [(k, v) for k, v in space.items() if k[0] != '_' and not callable(v) and k not in imported]
    dicts = [(k, v) for k, v in items if k in stages and isinstance(v, dict)]
    return [(path, None, *i) for i in items if i not in dicts] + [(path, s, *i) for s, d in dicts for i in d.items()]

def cast(value, default, where, name):
    """A value of a profile, or a word of the command line, as the type of the default: 1 is a float too, 1e4 an int."""
    kind, new = type(default), value
    try:
        if where == 'command line' and kind is not str:
            new = BOOLS[value.lower()] if kind is bool else ast.literal_eval(value)
        if {kind, type(new)} in ({int, float}, {tuple, list}) and (type(new) is not float or new == int(new)):
            new = kind(new)
    except Exception:
        pass  # it stays as it is, which suits only a default of None
    if type(new) is not kind and default is not None:
        fail(f'{where}: {name} = {value!r} is not {kind.__name__} (the default is {default!r})')
    return new

def configure(space, quiet=False):
    """Change the settings among a script's globals as the command line says; -> {name: value} of all of them."""
    argv = [word for word in sys.argv[1:] if word not in ('-h', '--help')]
    script, changes, flags, origin = pathlib.Path(space['__file__']), [], [], {}
    paths = sorted(script.parent.glob('*.py')) if argv else [script]  # all, to check the names for other stages too
    stages = {path.stem: rows for path in paths if (rows := read_settings(path)) is not None}
    settings = stages.get(script.stem) or fail(f'{script} has no settings above a configure(globals())')
    for before, word in zip(['', *argv], argv):
        path = next((p for p in (pathlib.Path(word), script.parent / word) if p.suffix == '.py' and p.is_file()), None)
        name, equals, text = word.partition('=')
        if word.startswith('--'):
            flags.append(('command line', script.stem, name[2:].replace('-', '_'), text if equals else True))
        elif path and read_settings(path) is None:
            changes += read_profile(path, stages)
        else:
            hint = f'{before}={word}' if before.startswith('--') and '=' not in before else '--name=value'
            fail(f"no config file '{word}' (settings are written {hint})")
    values = {name: row[0] for name, row in settings.items()}
    for where, stage, name, value in changes + flags:  # flags last: they win, wherever they stand
        owners = [s for s in stages if name in stages[s]]
        if not owners or stage not in (None, *owners):
            known = stages[stage] if stage else [k for s in stages for k in (s, *stages[s])]
            hint = 'did you mean %r?' % (difflib.get_close_matches(str(name), known, 1) or ['--help'])[0]
            hint = f"it is a setting of {', '.join(s + '.py' for s in owners)}" if owners else hint
            fail(f"{where}: unknown setting '{name}'{f' of {stage}.py' if stage else ''}, {hint}")
        new = {s: cast(value, stages[s][name][0], where, name) for s in owners if stage in (None, s)}
        if script.stem in new:
            values[name], origin[name] = new[script.stem], where
    lines = [f'usage: python {script.name} [profile.py ...] [--name=value ...]']
    for name, (default, comment, heading) in settings.items():
        was = '' if values[name] == default else f' (default: {default!r})'
        lines.append(f'\n{heading}\n' * bool(heading) + f'  {name} = {values[name]!r}'.ljust(36) + f' {comment}{was}')
    if len(argv) + 1 < len(sys.argv):  # --help was among them
        sys.exit(print('\n'.join(lines)) if RANK0 else 0)  # print gives None, which is exit code 0 as well
    for where in dict.fromkeys(origin.values()) if RANK0 and not quiet else ():
        changed = ', '.join(f'{name} = {values[name]!r}' for name in origin if origin[name] == where)
        print(textwrap.fill(f'{where}: {changed}', 100, subsequent_indent='    ', break_long_words=False))
    space.update(values)
    return values

if __name__ == '__main__':  # `python configurator.py pretrain.py config/tiny.py`: the settings as JSON, without a run
    print(json.dumps(configure({'__file__': sys.argv.pop(1)}, quiet=True), indent=1))
