"""
kill -9 at random moments over all stages of a tiny run, each time followed by the same command:
are the corpus, the checkpoints and the report those of a run that nobody disturbed?

$ OMP_NUM_THREADS=1 python tests/bench/kill.py                # 50 kills, 9 minutes on a busy machine
$ OMP_NUM_THREADS=1 python tests/bench/kill.py --kills=200 --seed=1
$ OMP_NUM_THREADS=1 python tests/bench/kill.py --kills=0 --disks=40   # as root: it mounts a disk
$ OMP_NUM_THREADS=1 python tests/bench/kill.py --kills=0 --threads=2

A stage runs as a process of its own. There are three kinds of moments:
    clock   after a random share of the seconds that the undisturbed stage has taken
    change  just before the n-th change of the folder: a file is created, renamed, deleted, ...
    after   some milliseconds after such a change, while the file is being written
After each kill every file under its final name must be whole: a checkpoint with right checksums, a
token shard of the length that its header says, .gz and JSON that can be read to the end. Only the
last line of a log may be cut. Not for Windows (fork).

With --disks, each stage runs on a disk that is full after a random number of bytes, and on one that
cannot be written. It must end with one line `error: ...`, all files must be whole, and those of the
stages before must be as they were. With room again, the same command must end with the same result.

With --threads=1 the whole run is repeated, and must give the same bytes. With --threads=2 it may
differ: numbers are added in another order. Then the figures of both are printed side by side.
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1') # a forked process cannot use its parent's threads
import atexit, collections, contextlib, gzip, hashlib, json, random, runpy, select, shutil, signal
import subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy, tiktoken, torch, torch._dynamo # loaded once: a forked stage begins at once
import torch.distributed.checkpoint.state_dict

from model import load_tensors, read_jsonl, read_shard

PROFILE = '''
device, dtype, block_size, dropout = 'cpu', 'float32', 96, 0.1
log_interval, eval_interval, save_interval = 1, 4, 2
toytown = dict(n_people=20, n_pages=250, n_books=60, n_lessons=40, n_faults=20, n_chat=150,
               n_preferences=60, n_prompts=80, n_val=20)
prepare_data = dict(shard_bytes=100_000)
tokenizer = dict(vocab_size=512, processes=2)
pretrain = dict(arch='llama', n_layer=2, n_head=4, n_embd=32, batch_size=8, max_iters=40,
                learning_rate=1e-2, warmup_iters=4, eval_iters=2, optimizer='muon')
sft = dict(epochs=4, batch_size=4, learning_rate=5e-3, eval_prompts=8, max_new_tokens=16)
reward = dict(epochs=3, batch_size=8, sample_prompts=16, sample_answers=3, max_new_tokens=16)
rlhf = dict(max_iters=8, batch_size=16, minibatch_size=8, micro_batch_size=8, max_new_tokens=16,
            eval_prompts=10)
eval = dict(val_tokens=2000, n_prompts=16, pool_prompts=4, max_new_tokens=16, limit=20)
'''
STAGES = ['toytown', 'prepare_data', 'tokenizer', 'pretrain', 'sft', 'reward', 'rlhf', 'eval']
CHANGES = {'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.symlink', 'os.truncate'}
UNFINISHED = ('.partial', '.replaced', '.ready', '.moving') # what a killed run may leave behind
TIMED = {'costs', 'starts_from', 'config', 'stamps'} # these hold times, which differ in each run

numbers = dict(kills=50, disks=0, threads=0, seed=0)
for word in sys.argv[1:]:
    name, _, value = word.removeprefix('--').partition('=')
    assert name in numbers, f'no flag {word}: there are --kills=50 --disks=40 --threads=2 --seed=0'
    numbers[name] = int(value)

# -----------------------------------------------------------------------------
# run a stage, and kill it

def watch_changes(folder, n, is_after, pipe):
    """Kill this process just before the n-th change in the folder, or tell the parent of it."""
    n_changes = 0
    def hook(event, args):
        nonlocal n_changes
        writes = False
        if event == 'open' and isinstance(args[2], int): # path, mode, flags
            writes = args[2] & (os.O_WRONLY | os.O_RDWR) != 0
        if not writes and event not in CHANGES:
            return
        is_file = not isinstance(args[0], int) # else an open file's number
        if not is_file or not os.path.abspath(args[0]).startswith(str(folder)):
            return
        n_changes += 1
        os.write(pipe, b'.')
        if n_changes == n and not is_after:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def run(stage, world, moment=('never', 0, 0), threads=1):
    """
    Run a stage in a process of its own. moment: (kind, seconds or number of the change, delay).
    Returns the exit code (-9: it was killed), its output, the seconds, the number of changes.
    """
    kind, when, delay = moment
    printed = world.parent / 'printed.txt'
    from_child, to_parent = os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        out = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(world)
        torch.set_num_threads(threads)
        sys.argv = [f'{stage}.py', 'tiny.py']
        code = 0
        watch_changes(world, when if kind != 'clock' else -1, kind == 'after', to_parent)
        try:
            runpy.run_path(str(ROOT / f'{stage}.py'), run_name='__main__')
        except SystemExit as e:
            code = e.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        atexit._run_exitfuncs() # os._exit does not
        sys.stdout.flush()
        os._exit(code)
    os.close(to_parent)
    n_changes = 0
    while True:
        left = None
        if kind == 'clock':
            left = max(0, began + when - time.monotonic())
        readable, _, _ = select.select([from_child], [], [], left)
        if not readable: # the clock
            os.kill(pid, signal.SIGKILL)
            break
        told = os.read(from_child, 1)
        if not told: # it has ended
            break
        n_changes += 1
        if kind == 'after' and n_changes == when:
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
            break
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(from_child)
    seconds = time.monotonic() - began
    return code, printed.read_text(encoding='utf-8', errors='replace'), seconds, n_changes

# -----------------------------------------------------------------------------
# look at what is there

def final_files(world):
    """The files that a stage may read: all but those under a temporary name."""
    for path in sorted(world.rglob('*')):
        parts = path.relative_to(world).parts
        is_unfinished = any(part.endswith(UNFINISHED) for part in parts)
        if path.is_file() and parts[0] in ('data', 'out') and not is_unfinished:
            yield path

def read_whole(path):
    """The content of a file, or an error if it is not whole. Times are left out."""
    name = path.name
    if name.endswith('.pt'):
        return plain(load_tensors(path))
    if name.endswith('.bin'):
        return hashlib.sha256(read_shard(str(path)).tobytes()).hexdigest()
    if name.endswith('.warc.gz'):
        return hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
    if name.endswith(('.jsonl', '.jsonl.gz')):
        is_log = path.parent.parts[-2:] == ('out', 'toytown')
        return [plain(row) for _, row in read_jsonl(path, is_log)]
    if name.endswith('.json'):
        return plain(json.loads(path.read_text(encoding='utf-8')))
    return path.read_bytes()

def plain(value):
    """Tensors become digests of their bytes, and everything that depends on time goes."""
    if isinstance(value, torch.Tensor):
        array = value.contiguous().numpy()
        return array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).hexdigest()
    if isinstance(value, dict):
        kept = {}
        for key, v in value.items():
            if key not in TIMED and 'second' not in str(key):
                kept[key] = plain(v)
        return kept
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value

def compare(world, other):
    """The names of the files that differ, and of those that only one of the two folders has."""
    found = {}
    for place in (world, other):
        found[place] = {str(path.relative_to(place)): path for path in final_files(place)}
    different = []
    for name in sorted(found[world].keys() & found[other].keys()):
        is_timed = name.endswith(('report.md', 'report.html')) # their figures are in report.json
        if not is_timed and read_whole(found[world][name]) != read_whole(found[other][name]):
            different.append(name)
    missing = sorted(found[world].keys() ^ found[other].keys())
    left = [path.name for path in other.rglob('*') if path.name.endswith(UNFINISHED)]
    print(f'{len(found[world])} files compared; different: {different or "none"}, only in one: '
          f'{missing or "none"}, left over: {left or "none"}', flush=True)
    return different + missing + left

def new_world(name):
    world = folder / name
    world.mkdir(exist_ok=True)
    (world / 'tiny.py').write_text(PROFILE, encoding='utf-8')
    return world

# -----------------------------------------------------------------------------
# a run that nobody disturbs

folder = Path(tempfile.mkdtemp(prefix='kill'))
whole = new_world('whole')
took = {}    # seconds
changes = {} # of the folder
sizes = {}   # bytes that the stage has added
for stage in STAGES:
    before = sum(path.stat().st_size for path in final_files(whole))
    code, printed, took[stage], changes[stage] = run(stage, whole)
    assert code == 0, f'{stage}: exit code {code}: {printed[-2000:]}'
    sizes[stage] = sum(path.stat().st_size for path in final_files(whole)) - before
    print(f'{stage:13} {took[stage]:5.1f} s, {changes[stage]:4} changes of the folder', flush=True)

# -----------------------------------------------------------------------------
# one that is killed again and again

random.seed(numbers['seed'])
n_kills = collections.Counter() # stage -> kills
n_kinds = collections.Counter()
n_files = 0
killed = new_world('killed')
for i, stage in enumerate(STAGES):
    if not numbers['kills']:
        break
    n_wanted = numbers['kills'] * (i + 1) // len(STAGES) - n_kills.total()
    n_ended = 0
    n_resumed = 0
    while n_kills[stage] < n_wanted:
        kind = random.choice(['clock', 'change', 'after'])
        when = random.randint(1, changes[stage])
        if kind == 'clock':
            when = random.uniform(0, took[stage])
        delay = random.uniform(0, 0.01)
        code, printed, _, _ = run(stage, killed, (kind, when, delay))
        n_resumed += 'resuming from' in printed
        if code == 0: # it continued from a save, and ended before the moment came
            n_ended += 1
            continue
        problem = f'{stage}, {kind} {when}: exit code {code}: {printed[-2000:]}'
        assert code == -signal.SIGKILL, problem
        n_kills[stage] += 1
        n_kinds[kind] += 1
        for path in final_files(killed):
            read_whole(path)
            n_files += 1
    code, printed, _, _ = run(stage, killed)
    n_resumed += 'resuming from' in printed
    assert code == 0, f'{stage} after its kills: exit code {code}: {printed[-2000:]}'
    print(f'{stage:13} {n_kills[stage]:3} kills, {n_resumed} runs resumed, {n_ended} ended before '
          'the moment came', flush=True)
if numbers['kills']:
    kinds = ', '.join(f'{n} by {kind}' for kind, n in n_kinds.items())
    print(f'{n_kills.total()} kills ({kinds}); {n_files:,} files were whole after them')
    assert not compare(whole, killed), f'look at {folder}'

# -----------------------------------------------------------------------------
# the same once more, with this number of threads

if numbers['threads']:
    again = new_world('again')
    for stage in STAGES:
        code, printed, _, _ = run(stage, again, threads=numbers['threads'])
        assert code == 0, f'{stage}: exit code {code}: {printed[-2000:]}'
    print(f'once more, with {numbers["threads"]} threads:')
    different = compare(whole, again)
    assert not different or numbers['threads'] > 1, f'look at {folder}'
    for name in ('base', 'sft', 'reward', 'rlhf'):
        one, other = [load_tensors(world / f'out/toytown/{name}.pt') for world in (whole, again)]
        gap = 0.0
        for key, weight in one['weights'].items():
            gap = max(gap, (weight - other['weights'][key]).abs().max().item())
        print(f'{name}: weights differ by {gap:.1e} at most')
        for key, value in one['metrics'].items():
            if isinstance(value, float) and 'second' not in key:
                print(f'    {key:20} {value:.6f} {other["metrics"][key]:.6f}')

# -----------------------------------------------------------------------------
# a full disk, and one that cannot be written

def mount(*words):
    subprocess.run(['mount', *words], check=True)

@contextlib.contextmanager
def disk(place):
    """A disk in memory, until the end of the block."""
    place.mkdir()
    mount('-t', 'tmpfs', '-o', 'size=1g', 'tmpfs', str(place))
    try:
        yield
    finally:
        subprocess.run(['umount', '-l', str(place)], check=True)

def check_refusal(code, printed, where):
    """One line that says what is wrong, behind what the stage has printed, and no traceback."""
    lines = printed.splitlines()
    errors = [line for line in lines if line.startswith('error: ')]
    is_good = code == 1 and errors == lines[-1:] and 'Traceback' not in printed
    assert is_good, f'{where}: exit code {code}: {printed[-3000:]}'
    return errors[0]

n_full = 0
n_locked = 0
told = collections.Counter()
if numbers['disks']:
    full = folder / 'full'
    with disk(full):
        new_world('full')
        for i, stage in enumerate(STAGES):
            others = {path: path.read_bytes() for path in final_files(full)}
            mount('-o', 'remount,ro', str(full))
            code, printed, _, _ = run(stage, full)
            told[check_refusal(code, printed, f'{stage}, read-only')] += 1
            n_locked += 1
            mount('-o', 'remount,rw', str(full))
            for _ in range(numbers['disks'] // len(STAGES)):
                used = shutil.disk_usage(full).used
                room = random.randrange(sizes[stage])
                mount('-o', f'remount,size={used + room}', str(full))
                code, printed, _, _ = run(stage, full)
                if code == 0: # a part of it was there already
                    break
                told[check_refusal(code, printed, f'{stage}, {room:,} bytes of room')] += 1
                n_full += 1
                for path in final_files(full):
                    read_whole(path)
                for path, content in others.items():
                    assert path.read_bytes() == content, f'{stage}: {path} has changed'
            mount('-o', 'remount,size=1g', str(full))
            code, printed, _, _ = run(stage, full)
            assert code == 0, f'{stage} with room again: exit code {code}: {printed[-2000:]}'
        for line, n in told.most_common():
            print(f'{n:4} x {line.replace(str(folder), "")}')
        print(f'{n_full} times a full disk, {n_locked} times a read-only one: one line each time')
        assert not compare(whole, full), f'look at {folder}'
shutil.rmtree(folder)
