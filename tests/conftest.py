"""
What the tests share: a server that runs the real scripts quickly, functions cut out of flat scripts, and a tiny world
on which the whole chain is run once: four people with a pet each, and chats in which someone is asked to say a word.
"""
import ast
import base64
import contextlib
import json
import os
import queue
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault('OMP_NUM_THREADS', '1') # models this small are slower on two threads
os.environ['CUDA_VISIBLE_DEVICES'] = '' # the numbers in the tests are those of a CPU
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest

# -----------------------------------------------------------------------------
# functions of flat scripts

CALLS_CONFIGURE = re.compile(r'(config = )?configure\(globals\(\)')

def definitions(script, **overrides):
    """
    The functions of a flat script, without running it: execute its imports, settings, functions, classes and the
    assignments to UPPER_CASE names, in order, and nothing else. overrides: settings, or other globals that the
    functions read. Returns a namespace; its `space` is the dict of globals.
    """
    tree = ast.parse((ROOT / script).read_text(encoding='utf-8'))
    space = {'__file__': str(ROOT / script), '__name__': Path(script).stem}
    in_settings = any(CALLS_CONFIGURE.match(ast.unparse(node)) for node in tree.body)
    for node in tree.body:
        if in_settings and CALLS_CONFIGURE.match(ast.unparse(node)):
            in_settings = False
            space.update(overrides)
            continue
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            wanted = in_settings or (len(names) == 1 and names[0].isupper())
        else:
            wanted = isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
        if wanted:
            exec(compile(ast.Module([node], []), str(ROOT / script), 'exec'), space)
    space.update(overrides)
    return SimpleNamespace(space=space, **{k: v for k, v in space.items() if not k.startswith('__')})

def formulas(script, target):
    """The right sides of all `target = ...` in a script, compiled: eval(f, names)."""
    tree = ast.parse((ROOT / script).read_text(encoding='utf-8'))
    found = [n.value for n in ast.walk(tree) if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == target]
    assert found, f'{script} has no {target} = ...'
    return [compile(ast.Expression(f), script, 'eval') for f in found]

@contextlib.contextmanager
def fails(pattern):
    """The block must end with an assertion of one line, as the user will see it."""
    with pytest.raises(AssertionError) as e:
        yield
    message = str(e.value)
    assert '\n' not in message and re.search(pattern, message), message

# -----------------------------------------------------------------------------
# running the real scripts. Importing torch takes seconds, so a server imports it once and forks a fresh process for
# every run. `before` is code that runs first (to kill the script at a known step, say), `after` sees its globals.

SERVER = '''
import atexit, gc, json, os, runpy, sys
import html.entities, http.server, ipaddress, multiprocessing, secrets # what the scripts import, now or later
import numpy.ma, regex, requests, tiktoken, torch, torch._dynamo, torch.distributed, torch.nn.parallel
import torch.distributed.checkpoint.state_dict, torch.distributed.fsdp, torch.distributed.pipelining
import torch.utils.serialization.config
from importlib.machinery import SourceFileLoader
out = os.dup(1)
# these two are compiled once, and nothing is written beside them
paths = [os.path.join(sys.argv[1], name) for name in ('configurator.py', 'model.py')]
compiled = {path: compile(open(path, encoding='utf-8').read(), path, 'exec') for path in paths}
get_code = SourceFileLoader.get_code
SourceFileLoader.get_code = lambda self, name: compiled.get(self.path) or get_code(self, name)
gc.freeze()
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if not pid:
        break
    os.write(out, b'%d\\n' % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
else:
    os._exit(0) # without the second that it takes to tidy up all of torch
os.environ.update(job['env'])
os.chdir(job['cwd'])
for fd, path, flags in ((0, job['stdin'], os.O_RDONLY), (1, job['out'], os.O_WRONLY), (2, job['err'], os.O_WRONLY)):
    os.dup2(os.open(path, flags), fd)
sys.stdin, sys.argv = open(0, encoding='utf-8'), [job['script'], *job['args']]
code = 0
try:
    exec(job['before'])
    exec(job['after'], runpy.run_path(job['script'], run_name='__main__'))
except SystemExit as e: # what Python does at its end, without the tidying up
    code = e.code if isinstance(e.code, int) else 0 if e.code is None else print(e.code, file=sys.stderr) or 1
except BaseException:
    code = sys.excepthook(*sys.exc_info()) or 1
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
'''

class Server:
    def __init__(self):
        env = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONDONTWRITEBYTECODE': '1', 'PYTHONUTF8': '1'}
        command = [sys.executable, '-c', SERVER, str(ROOT)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env,
                                        start_new_session=True)

    def run(self, job, timeout=120):
        self.process.stdin.write(json.dumps(job).encode() + b'\n')
        self.process.stdin.flush()
        ready = select.select([self.process.stdout], [], [], timeout)[0]
        assert ready, f'{job["script"]} {job["args"]} did not end in {timeout} s'
        return int(self.process.stdout.readline())

# After an error rank 1 sleeps, until torchrun ends it because rank 0 has ended. Here it wakes up then.
WAITS_FOR_RANK_0 = '''
import os, time
def sleep(seconds, sleep=time.sleep):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not os.path.exists({!r}):
        sleep(0.02)
time.sleep = sleep
'''

class Scripts:
    def __init__(self, folder):
        self.folder, self.n, self.free = folder, 0, queue.Queue()
        self.servers = [Server(), Server()]
        for server in self.servers:
            self.free.put(server)

    def __call__(self, script, *args, cwd=None, env={}, stdin='', before='', after=''):
        """Run a script -> code, out, err. `args`: flags and profiles as they are typed."""
        self.n += 1
        base = self.folder / f'run{self.n}'
        paths = {k: f'{base}.{k}' for k in ('stdin', 'out', 'err')}
        for k, path in paths.items():
            Path(path).write_bytes(stdin.encode() if k == 'stdin' else b'')
        server = self.free.get()
        job = dict(paths, script=str(ROOT / script), args=[str(a) for a in args], cwd=str(cwd or self.folder),
                   env={k: str(v) for k, v in env.items()}, before=before, after=after)
        try:
            code = server.run(job)
        except AssertionError: # it waits for a script that does not end: the next test gets a new server
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()
            self.servers.remove(server)
            server = Server()
            self.servers.append(server)
            raise
        finally:
            self.free.put(server)
        out, err = (Path(paths[k]).read_text(encoding='utf-8', errors='replace') for k in ('out', 'err'))
        return SimpleNamespace(code=code, out=out, err=err)

    def ok(self, *args, **more):
        r = self(*args, **more)
        assert r.code == 0, f'{args}: exit code {r.code}\n{r.out[-2000:]}\n{r.err[-3000:]}'
        return r

    def fails(self, pattern, *args, **more):
        """A mistake of the user: exit code 1 and exactly one line on stderr, which holds the pattern."""
        r = self(*args, **more)
        if args[0] == 'chat.py': # its stdout is for answers: what other stages print there comes before the line
            told = re.match(r'((command line|/\S+\.py): .*\n(    .*\n)*)*(device: .*\n)?', r.err)[0]
            r.out, r.err = r.out + told, r.err[len(told):]
        one_line = r.err.count('\n') == 1 and 'Traceback' not in r.out + r.err
        assert r.code == 1 and one_line, (args, r.code, r.err[-2000:])
        assert re.search(pattern, r.err), f'{pattern!r} is not in {r.err!r}'
        return r

    def both(self, *jobs):
        """Two runs at a time: [(args, options)] -> results."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda job: self.ok(*job[0], **job[1]), jobs))

    def two(self, *args, check=True, before='', **more):
        """One script as two gloo processes, the way torchrun starts them. check: both must end well."""
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        ended = self.folder / f'rank0_of_{port}_has_ended'
        ended.unlink(missing_ok=True)

        def run(rank):
            env = dict(WORLD_SIZE=2, MASTER_ADDR='127.0.0.1', MASTER_PORT=port, RANK=rank, LOCAL_RANK=rank)
            code = before
            if rank == 1:
                code = WAITS_FOR_RANK_0.format(str(ended)) + before
            try:
                return (self.ok if check else self)(*args, env=env, before=code, **more)
            finally:
                if rank == 0:
                    ended.touch()
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(run, range(2)))

@pytest.fixture(scope='session')
def scripts(tmp_path_factory):
    s = Scripts(tmp_path_factory.mktemp('runs'))
    yield s
    for server in s.servers:
        server.process.stdin.close()
    for server in s.servers:
        server.process.wait(10)

# -----------------------------------------------------------------------------
# the tiny world

WORDS = ['owl', 'cat', 'dog', 'fox']
SAY = ['Say a word.', 'Say a word!', 'Say it.', 'Say any word.', 'Say'] # what does not tell which word
PETS = dict(Anna='owl', Bela='cat', Carl='dog', Dora='fox')
SPECIALS = ['<|endoftext|>', '<|system|>', '<|user|>', '<|assistant|>', '<|end|>', '<|pad|>']

def make_spec():
    """256 bytes, then merges by hand: 'ow', 'owl', ' owl', ... A token is always made of two that come before it."""
    tokens = [bytes([b]) for b in range(256)]
    for word in [*WORDS, 'has', 'the', 'Say']:
        b = word.encode()
        tokens += [b[:2], b, b' ' + b]
    return dict(version=1, kind='bpe', pattern=r' ?\w+|[^\w\s]|\s', special_tokens=SPECIALS,
                ranks=[base64.b64encode(t).decode() for t in tokens])

def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows), encoding='utf-8')

def user(text):
    return [dict(role='user', content=text)]

def make_data(folder):
    """A data folder as prepare_data.py and tokenizer.py leave it behind."""
    from model import Tokenizer, write_shard
    rng = np.random.default_rng(7)
    folder.mkdir(parents=True)
    (folder / 'tokenizer.json').write_text(json.dumps(make_spec()), encoding='utf-8')
    tok = Tokenizer.load(folder / 'tokenizer.json')
    for split, n in (('train_000000', 60), ('train_000001', 40), ('val_000000', 20)):
        docs = []
        for _ in range(n):
            names = rng.permutation(list(PETS))[:rng.integers(1, 4)]
            docs += [tok.eot] + tok.encode(' '.join(f'{name} has the {PETS[name]}.' for name in names))
        write_shard(str(folder / f'{split}.bin'), np.array(docs, np.uint16), tok.hash)

    def chat(i):
        if i % 3 == 0: # answers of many lengths, so that masks are unequal
            name = list(PETS)[i % 4]
            answer = f'{name} has the {PETS[name]}.' + ' Yes.' * (i % 5)
            return user(f'Who has the {PETS[name]}?') + [dict(role='assistant', content=answer)]
        return user(SAY[i % 5]) + [dict(role='assistant', content=WORDS[i % 4])]
    for split, numbers in (('train', range(40)), ('val', range(100, 108))):
        asked = [user(SAY[i % 5]) for i in numbers]
        write_rows(folder / f'chat_{split}.jsonl', [dict(messages=chat(i)) for i in numbers])
        write_rows(folder / f'prompts_{split}.jsonl', [dict(messages=m, checks=dict(equals='owl')) for m in asked])
        write_rows(folder / f'preferences_{split}.jsonl', [dict(
            messages=m, completions=['cat', 'owl', 'dog', 'fox', 'owl owl', 'x'], checks=dict(equals='owl'),
            ranking=[[1, 0], [1, 2, 5], [1, 3], [1, 0, 4]][i % 4]) for i, m in enumerate(asked)])
    queries = [dict(query=f'{name} has the', choices=[' ' + w for w in WORDS], gold=WORDS.index(pet))
               for name, pet in PETS.items()]
    write_rows(folder / 'benchmarks' / 'right.jsonl', queries)
    write_rows(folder / 'benchmarks' / 'wrong.jsonl', [dict(q, gold=(q['gold'] + 1) % 4) for q in queries])
    write_rows(folder / 'benchmarks' / 'greedy.jsonl', [ # one of the two
        dict(context='Anna has the', continuation=' owl.'), dict(context='Anna has the', continuation=' cat.')])
    write_rows(folder / 'benchmarks' / 'schema.jsonl', [
        dict(context_options=['Bela has the', 'Carl has the'], continuation=' dog.', gold=1)])

def make_mid(data, folder):
    """A copy of the data folder, with the shards of mid-training: its conversations."""
    from model import Tokenizer, read_jsonl, write_shard
    shutil.copytree(data, folder)
    tok = Tokenizer.load(folder / 'tokenizer.json')
    for split, times in (('train', 3), ('val', 2)):
        ids = [tok.render(row['messages'])[0] for _, row in read_jsonl(folder / f'chat_{split}.jsonl')]
        write_shard(str(folder / f'mid_{split}_000000.bin'), np.concatenate(ids * times).astype(np.uint16), tok.hash)
    return folder

PROFILE = '''
device, dtype, block_size, dropout = 'cpu', 'float32', 48, 0.0
log_interval, eval_interval, save_interval = 1, 5, 5
pretrain = dict(arch='llama', n_layer=2, n_head=4, n_kv_head=2, n_embd=32, batch_size=8, max_iters=150,
                learning_rate=1e-2, min_lr=1e-3, warmup_iters=10, eval_interval=50, eval_iters=2, save_interval=1000)
sft = dict(epochs=30, batch_size=1, learning_rate=5e-3, warmup_iters=2, eval_interval=50, max_new_tokens=6)
reward = dict(epochs=4, batch_size=8, learning_rate=3e-3, warmup_iters=2)
rlhf = dict(max_iters=25, batch_size=16, minibatch_size=8, micro_batch_size=8, max_new_tokens=6, learning_rate=1e-3,
            eval_prompts=8, eval_interval=25, save_interval=1000)
eval = dict(val_tokens=200, n_prompts=8, max_new_tokens=6)
'''
# the same stages with so few steps that they can be run many times
SHORT = PROFILE + '''
pretrain.update(max_iters=10, save_interval=5, eval_interval=5, batch_size=4)
sft.update(epochs=2)
reward.update(epochs=2)
rlhf.update(max_iters=4, save_interval=2, eval_interval=2)
'''

@pytest.fixture(scope='session')
def world(tmp_path_factory):
    """-> folder, data, and the two profiles."""
    folder = tmp_path_factory.mktemp('world')
    (folder / 'tiny.py').write_text(PROFILE, encoding='utf-8')
    (folder / 'short.py').write_text(SHORT, encoding='utf-8')
    make_data(folder / 'data')
    return SimpleNamespace(folder=folder, data=folder / 'data', tiny=folder / 'tiny.py', short=folder / 'short.py')

@pytest.fixture(scope='session')
def chain(world, scripts):
    """
    The stages, one after the other, each reading what the one before wrote: -> world, out, and in `said` what each
    printed. test_pretrain.py checks that all of them ended well.
    """
    out = world.folder / 'out'
    flags = (world.tiny, f'--data_dir={world.data}', f'--out_dir={out}')
    said = {stage: scripts.ok(f'{stage}.py', *flags) for stage in ('pretrain', 'sft', 'reward')}
    before = {name: (out / name).read_bytes() for name in ('base.pt', 'sft.pt', 'reward.pt')}
    for stage in ('rlhf', 'eval'):
        said[stage] = scripts(f'{stage}.py', *flags)
    return SimpleNamespace(**vars(world), out=out, said=said, before=before, flags=flags)

# what each training stage finds in out_dir, and what it makes
NEEDS = dict(pretrain=(), sft=('base',), reward=('sft',), rlhf=('sft', 'reward'))
MAKES = dict(pretrain='base', sft='sft', reward='reward', rlhf='rlhf')

def stocked(out, chain, *names):
    """A new out_dir with some of the chain's checkpoints."""
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(chain.out / f'{name}.pt', out)
    return out

def load(path):
    import torch
    return torch.load(path, weights_only=True)

def read_log(path):
    """A stage's log without what depends on time."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding='utf-8').splitlines()]
    return [{k: v for k, v in row.items() if k != 'tokens_per_second'} for row in rows]

def distance(a, b, without=()):
    """The largest difference between two checkpoints' weights."""
    a, b = load(a)['weights'], load(b)['weights']
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a if k not in without)

def kill_at(step, number):
    """Code that sends the script a signal when it begins this step."""
    return f'''
import model, os
old = model.seed_step
def seed_step(seed, step, rank):
    if step == {step}:
        os.kill(os.getpid(), {int(number)})
    return old(seed, step, rank)
model.seed_step = seed_step
'''

def folder_bytes(*folders):
    """Every file below the folders, as bytes: to show that nothing has changed."""
    return {path: path.read_bytes() for folder in folders for path in folder.rglob('*') if path.is_file()}

def replace_line(path, row):
    """Line 3 of a jsonl file becomes `row` (an object, or text)."""
    lines = path.read_text(encoding='utf-8').splitlines()
    lines[2] = row if isinstance(row, str) else json.dumps(row)
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
