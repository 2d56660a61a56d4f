"""
Does every command of README.md and COURSE.md work as it is written? Each one is run by bash, in the
order of the text, in a temporary copy of the project with a small world and a small model.

$ python tests/bench/readme.py                  # all: 5 minutes on two cores
$ python tests/bench/readme.py COURSE.md        # one text; speedrun.sh makes its models first
$ python tests/bench/readme.py --only=convert   # only the commands that hold this text
$ python tests/bench/readme.py --keep=FOLDER    # the copy is there, stays, and can be used again

It prints ok, failed (with the end of the output) or skipped for each command, and ends with 1 if
one has failed. Skipped are those whose comment says that they download something or need a GPU.
The copy differs in two ways: SMALL is appended to config/tiny.py, and its .venv/bin/python replaces
the numbers of the flags in LIMITS and appends those of MORE. A chat gets QUESTION to read, a judge
VERDICTS; the page is asked once and then stopped with Ctrl-C. A forked process has torch at once,
so a command takes seconds. Not for Windows.
"""
import os
os.environ['OMP_NUM_THREADS'] = '1' # a forked process cannot use its parent's threads
import atexit, json, re, runpy, shutil, signal, socket, subprocess, sys, tempfile, time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LEFT_OUT = ('.git', '.venv', 'data', 'out', '__pycache__', '.pytest_cache')

SMALL = '''
# appended by tests/bench/readme.py
device, dtype, log_interval, eval_interval, save_interval = 'cpu', 'float32', 2, 4, 2
toytown = dict(n_people=20, n_pages=250, n_books=60, n_lessons=40, n_faults=20, n_chat=150,
               n_preferences=60, n_prompts=80, n_val=20)
tokenizer = dict(vocab_size=600, processes=2)
pretrain = dict(arch='llama', n_layer=2, n_head=4, n_embd=32, block_size=160, batch_size=8,
                learning_rate=1e-2, warmup_iters=2, eval_iters=2, max_iters=40, optimizer='muon')
sft = dict(epochs=4, batch_size=8, learning_rate=5e-3, eval_prompts=8, max_new_tokens=16)
reward = dict(epochs=1, batch_size=8, sample_prompts=0, sample_answers=4, max_new_tokens=16)
rlhf = dict(max_iters=2, batch_size=16, minibatch_size=8, micro_batch_size=8, max_new_tokens=16,
            eval_prompts=8, sample_interval=1)
eval = dict(val_tokens=2000, n_prompts=16, pool_prompts=2, max_new_tokens=16, limit=10, n_robust=4)
'''
# smaller numbers for the flags of a command, and more flags for a script
LIMITS = dict(max_iters=40, sample_prompts=24, judge_pairs=2)
MORE = dict(scaling=['--widths=(32, 48, 64)', '--steps=(4, 8, 12)'])
QUESTION = 'Who are you?\n'
VERDICTS = 'a>b\na>b>c\na>b>c>d\n' * 30 + 'a\n' * 30 # rankings, comparisons

# How .venv/bin/python of the copy begins a script: it asks the server below for a forked process.
CLIENT = '''#!{python} -IS
import json, os, signal, socket, sys
words = sys.argv[1:]
stem = os.path.basename(words[0])[:-3] if words else ''
if stem not in {stems!r}: # configurator.py, -m, -c
    os.execv({python!r}, [{python!r}, *words])
limits = {limits!r}
for i, word in enumerate(words):
    flag, equals, _ = word.partition('=')
    if flag.lstrip('-') in limits:
        words[i] = flag + '=' + str(limits[flag.lstrip('-')])
if '--estimate' not in ' '.join(words):
    words += {more!r}.get(stem, [])
job = dict(words=words, cwd=os.getcwd(), env=dict(os.environ))
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
socket.send_fds(server, [b'x'], [0, 1, 2])
server.sendall(json.dumps(job).encode() + b'\\n')
told = server.makefile()
pid = int(told.readline())
signal.signal(signal.SIGINT, lambda *_: os.kill(pid, signal.SIGINT))
sys.exit(int(told.readline()))
'''

def run_script(words, cwd, env):
    """What `python SCRIPT ...` does. It does not return."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.stdin = open(0, encoding='utf-8', closefd=False)
    sys.argv = words
    sys.path[0] = os.path.dirname(os.path.abspath(words[0]))
    code = 0
    try:
        runpy.run_path(words[0], run_name='__main__')
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    atexit._run_exitfuncs() # os._exit does not
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)

def serve(listener):
    """Fork a process for each client. It does not return."""
    import numpy, requests, tiktoken, torch, torch._dynamo
    import torch.distributed.checkpoint.state_dict, torch.distributed.fsdp
    signal.signal(signal.SIGCHLD, signal.SIG_IGN) # no zombies
    while True:
        client, _ = listener.accept()
        if os.fork() > 0:
            client.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        listener.close()
        # the client's stdin, stdout and stderr become those of the script
        _, files, _, _ = socket.recv_fds(client, 1, 3)
        job = json.loads(client.makefile().readline())
        pid = os.fork()
        if pid == 0:
            client.close()
            for number, file in enumerate(files):
                os.dup2(file, number)
                os.close(file)
            run_script(**job)
        client.sendall(b'%d\n' % pid)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        client.sendall(b'%d\n' % (code if code >= 0 else 128 - code))
        os._exit(0)

# -----------------------------------------------------------------------------
# the copy

def make_copy(folder):
    ignore = shutil.ignore_patterns(*LEFT_OUT)
    shutil.copytree(ROOT, folder, ignore=ignore, dirs_exist_ok=True)
    with open(folder / 'config/tiny.py', 'a', encoding='utf-8') as f:
        f.write(SMALL)
    # A .venv of the copy's own: its Python is the client, and speedrun.sh finds nothing to install.
    bin = folder / '.venv/bin'
    bin.mkdir(parents=True, exist_ok=True)
    stems = {path.stem for path in ROOT.glob('*.py')} - {'model', 'configurator'}
    files = dict(
        python=CLIENT.format(
            python=sys.executable, stems=stems, limits=LIMITS, more=MORE,
            path=str(folder / 'socket')),
        torchrun=f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n',
        activate=f'export PATH="{bin}:$PATH"\n')
    for name, text in files.items():
        (bin / name).write_text(text, encoding='utf-8')
        (bin / name).chmod(0o755)
    shutil.copy(folder / 'requirements.txt', folder / '.venv/installed.txt')

def make_own_files(folder):
    """What a reader has: notes.txt, crawl/*.warc.gz, chats.jsonl."""
    text = '\n\n'.join(path.read_text(encoding='utf-8') for path in sorted(ROOT.glob('*.md')))
    (folder / 'notes.txt').write_text(text, encoding='utf-8')
    raw = folder / 'data/raw/toytown'
    (folder / 'crawl').mkdir(exist_ok=True)
    shutil.copy(sorted(raw.glob('*.warc.gz'))[0], folder / 'crawl')
    shutil.copy(sorted(raw.glob('chat*.jsonl'))[0], folder / 'chats.jsonl')

# -----------------------------------------------------------------------------
# the commands

def commands(text):
    """Each command of a text, and its comment: those in indented lines, and those in `...`."""
    text = re.sub(r'```.*?```', '', text, flags=re.S) # diffs are not commands
    begin = r'(?:\w+=\S+ )?(?:python|pip|bash|torchrun|source|cp|diff) '
    seen = set()
    for found in re.finditer(rf'^    ({begin}.*)$|`({begin}[^`]+|\w+\.py [^`]+)`', text, re.M):
        command, _, comment = (found[1] or ' '.join(found[2].split())).partition(' #')
        command = command.strip()
        if re.match(r'\w+\.py ', command): # in a sentence, `rlhf.py config/tiny.py` is enough
            command = 'python ' + command
        if command not in seen:
            seen.add(command)
            yield command, comment.strip()

def is_skipped(comment):
    return re.search(r'\bdownloads\b|\bneeds (a GPU|\d+ GPUs)\b', comment) is not None

def ask_page(process, port):
    """One question over the API, then Ctrl-C. Returns the answer."""
    body = json.dumps(dict(messages=[dict(role='user', content='Who are you?')], max_tokens=8))
    request = urllib.request.Request(
        f'http://127.0.0.1:{port}/v1/chat/completions', body.encode(),
        {'Content-Type': 'application/json'})
    end = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.load(response)['choices'][0]['message']['content']
            break
        except OSError as e:
            if time.monotonic() > end or process.poll() is not None:
                answer = f'no answer: {e}'
                break
            time.sleep(0.2) # the server is not there yet
    os.killpg(process.pid, signal.SIGINT)
    return answer

def run(command, folder):
    """Returns whether the command worked, and what it printed."""
    is_page = '--web=true' in command
    line = command
    if is_page:
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        line += f' --port={port}'
    if command == 'bash tests/run.sh':
        line += ' tests/test_course.py' # of all tests these
    if command == 'bash speedrun.sh --seed=2':
        line += ' && bash speedrun.sh' # or the next commands meet the other seed's data
    if command == 'python -m venv .venv':
        # .venv is there; and who has no bash starts without data and models
        line = 'rm -r data out && python -m venv --without-pip another_venv'
    if 'notes.txt' in command:
        make_own_files(folder)
    env = dict(os.environ, PATH=f'{folder}/.venv/bin:' + os.environ['PATH'])
    with open(folder / 'answers.txt', 'w+', encoding='utf-8') as answers, \
            open(folder / 'printed.txt', 'w+', encoding='utf-8', errors='replace') as printed:
        answers.write(VERDICTS if 'judge' in command else QUESTION)
        answers.seek(0)
        # a session of its own, so that Ctrl-C reaches bash and all that it has started
        process = subprocess.Popen(
            ['bash', '-c', line], cwd=folder, env=env, stdin=answers, stdout=printed,
            stderr=subprocess.STDOUT, start_new_session=True)
        answer = ask_page(process, port) if is_page else ''
        try:
            code = process.wait(1200)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = 'no end after 1200 s'
        printed.seek(0)
        text = f'exit code {code}\n{printed.read()}\n{answer}'
    good = {0}
    if command.startswith('diff '):
        good = {0, 1} # 1: the files differ
    if is_page:
        good = {0, 130} # 130: Ctrl-C
    return code in good and 'Traceback' not in text and 'no answer' not in text, text

if __name__ == '__main__':
    texts = [word for word in sys.argv[1:] if not word.startswith('--')]
    texts = texts or ['README.md', 'COURSE.md']
    flags = {}
    for word in sys.argv[1:]:
        if word.startswith('--'):
            name, _, value = word[2:].partition('=')
            flags[name] = value
    unknown = [name for name in flags if name not in ('only', 'keep')]
    assert not unknown, f'no flag {unknown[0]}: there are --only=TEXT --keep=FOLDER'
    todo = [('', 'bash speedrun.sh', '')] # all later commands need it
    for name in texts:
        for command, comment in commands((ROOT / name).read_text(encoding='utf-8')):
            is_wanted = flags.get('only', '') in command
            if is_wanted and command not in [done for _, done, _ in todo]:
                todo.append((name, command, comment))

    folder = Path(flags.get('keep') or tempfile.mkdtemp(prefix='readme_')).absolute()
    make_copy(folder)
    (folder / 'socket').unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / 'socket'))
    listener.listen()
    server = os.fork()
    if server == 0:
        serve(listener)
    counts = dict(ok=0, failed=0, skipped=0)
    for name, command, comment in todo:
        began = time.monotonic()
        if is_skipped(comment):
            verdict = 'skipped'
            printed = ''
        else:
            is_ok, printed = run(command, folder)
            verdict = 'ok' if is_ok else 'failed'
        counts[verdict] += 1
        print(f'{verdict:8}{time.monotonic() - began:5.0f} s  {command}', flush=True)
        if verdict == 'failed':
            print('\n'.join('    ' + line for line in printed.split('\n')[-12:]), flush=True)
    os.kill(server, signal.SIGTERM)
    print(', '.join(f'{n} {verdict}' for verdict, n in counts.items()), f'of {len(todo)} commands')
    if 'keep' not in flags:
        shutil.rmtree(folder)
    sys.exit(1 if counts['failed'] else 0)
