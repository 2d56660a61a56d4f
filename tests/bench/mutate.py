"""
Break 40 lines, one at a time: does a test fail? (mutation testing)

$ OMP_NUM_THREADS=1 python tests/bench/mutate.py             # all, 15 minutes on a busy machine
$ OMP_NUM_THREADS=1 python tests/bench/mutate.py --only=rlhf # those of rlhf.py
$ OMP_NUM_THREADS=1 python tests/bench/mutate.py --first=11 --last=20

Each row of the table changes one line in a copy of the project and runs the tests that should
notice. A line is found by its text. If the text has gone or stands there twice, the script says so,
and the row must be written anew. Needs pytest. Not for Windows (fork).
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ['PYTHONDONTWRITEBYTECODE'] = '1' # compiled files of a changed script would stay
import contextlib, re, shutil, signal, sys, tempfile, time
from pathlib import Path
sys.dont_write_bytecode = True

import pytest
import numpy, tiktoken, torch # loaded once, not by each run

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 900 # a run that takes longer is ended, and counts as a failure: somebody would notice

# file, file of tests, words for pytest -k, then the old text and the new one
MUTATIONS = [
    ('configurator', 'configurator', 'values',
     'BOOLS[value.lower()] if kind is bool',
     'bool(value) if kind is bool'),
    ('configurator', 'configurator', 'profile',
     'return plain + of_stages',
     'return of_stages + plain'),

    ('model', 'model', 'leak',
     'is_causal = False if T == 1 else mask is None',
     'is_causal = False'),
    ('model', 'model', 'attention or cached',
     'else 1 / math.sqrt(D)',
     'else 1 / D'),
    ('model', 'model', 'left_padded',
     ' - first).clamp(min=0) # (B, T)',
     ').clamp(min=0) # (B, T)'),
    ('model', 'model', 'every_parameter',
     'dict(params=vectors, weight_decay=0.0)',
     'dict(params=vectors, weight_decay=weight_decay)'),
    ('model', 'model', 'render or learned',
     '[learn] * (len(text_ids) + 1)',
     '[learn] * len(text_ids) + [0]'),
    ('model', 'model', 'grade',
     'return all(met), sum(met) / len(met) + bonus',
     'return all(met), sum(met) / len(met)'),
    ('model', 'model', 'seed_step',
     '* 1_009 + rank)',
     '* 1_009)'),
    ('model', 'model', 'flipped',
     "assert broken is None, f'wrong checksum of {broken}'",
     'pass'),
    ('model', 'model', 'log_drops',
     "if row['step'] < first_step",
     "if row['step'] <= first_step"),

    ('toytown', 'toytown', 'sides_share',
     "wrong_side = task['by_prompt'] and is_val != (side == 'val')",
     'wrong_side = False'),

    ('prepare_data', 'privacy', 'card',
     'total += value // 10 + value % 10',
     'total += value'),
    ('prepare_data', 'prepare_data', 'test_url',
     "if '.'.join(parts[i:]) in BLOCKED_HOSTS:",
     'if host[1] in BLOCKED_HOSTS:'),
    ('prepare_data', 'extract', 'charset',
     'if 5 * n_broken <= n_other:',
     'if n_broken == 0:'),
    ('prepare_data', 'sources', 'every_form',
     'sorted(first_with, reverse=True)]',
     'sorted(first_with)]'),
    ('prepare_data', 'dedup', 'order',
     'hashes = hashes * FACTOR + single[k:',
     'hashes = hashes + single[k:'),
    ('prepare_data', 'prepare_data', 'small_source',
     'times[is_val] = np.minimum(times[is_val], 1)',
     'pass'),

    ('tokenizer', 'tokenizer', 'oracle',
     'elif k > 1: # "left right left right" -> "new new"',
     'elif False:'),
    ('tokenizer', 'tokenizer', 'special or end_to_end',
     'plain = [text for text in texts if EOT not in text]',
     'plain = texts'),
    ('tokenizer', 'tokenizer', 'swap',
     "os.listdir(moving), key=lambda name: name == 'tokenizer.json')",
     'os.listdir(moving))'),

    ('pretrain', 'pretrain', 'learning_rate',
     '(1 + math.cos(math.pi * min(1.0, t)))',
     '(1 - math.cos(math.pi * min(1.0, t)))'),
    ('pretrain', 'pretrain', 'chain',
     'val_bpb=nats / math.log(2) / max(1, n_bytes)',
     'val_bpb=nats / max(1, n_bytes)'),
    ('pretrain', 'pretrain', 'every_window',
     'get_order(i // n_train)[i % n_train]',
     'get_order(0)[i % n_train]'),
    ('pretrain', 'pretrain', 'clipped',
     'raw_model.parameters(), grad_clip or math.inf)',
     'raw_model.parameters(), math.inf)'),

    ('sft', 'sft', 'targets',
     'token if learned else -1 for',
     'token for'),
    ('sft', 'sft', 'packed',
     'pos[b, start:end] = torch.arange(length)',
     'pos[b, start:end] = torch.arange(start, end)'),
    ('sft', 'sft', 'unequal_masks',
     'loss = get_loss(logits, y) / max(1, n_valid)',
     'loss = get_loss(logits, y) / max(1, (y >= 0).sum())'),

    ('reward', 'reward', 'tie',
     'places[better] < places[worse], 1.0, 0.5)',
     'places[better] < places[worse], 1.0, 1.0)'),
    ('reward', 'reward', 'counts_once',
     '1 / len(better)))',
     '1.0))'),
    ('reward', 'reward', 'dpo',
     'return beta * (model(x, mask) - reference(x, mask))',
     'return beta * model(x, mask)'),

    ('rlhf', 'rlhf', 'rewards_by_hand',
     'rewards = -kl_coef * kl',
     'rewards = kl_coef * kl'),
    ('rlhf', 'rlhf', 'gae',
     'next_value = values[:, t] * response_mask[:, t]',
     'next_value = values[:, t]'),
    ('rlhf', 'rlhf', 'clipped',
     'pg_loss = torch.max(pg_loss1, pg_loss2)',
     'pg_loss = torch.min(pg_loss1, pg_loss2)'),

    ('eval', 'eval', 'loss_of or scores_are',
     'else -logprob / len(text))',
     'else -logprob)'),
    ('eval', 'eval', 'best_of',
     'n_subsets = [math.comb(i, n - 1)',
     'n_subsets = [math.comb(i, n)'),
    ('eval', 'exam', 'long_question',
     'groups.append((prefix[-room:], answers))',
     'groups.append((prefix[:room], answers))'),

    ('chat', 'chat', 'truncate',
     'is_dropped = (before > top_p * total)',
     'is_dropped = (before + ordered > top_p * total)'),
    ('chat', 'chat', 'bad_requests',
     "if self.headers.get('Origin') not in (None, f'http://{name}'):",
     'if False:'),

    ('convert', 'convert', 'gpt2 and not hub',
     "if name.endswith(tuple(CLASSES['transposed'][arch])):",
     'if False:'),
]

flags = dict(only='', first='1', last=str(len(MUTATIONS)))
for word in sys.argv[1:]:
    name, _, value = word.removeprefix('--').partition('=')
    assert name in flags, f'no flag {word}: there are --only=rlhf --first=11 --last=20'
    flags[name] = value

def run_tests(copy, tests, words, printed):
    """Run them in a process of its own. -> pytest's exit code: 0 all passed, 1 some failed"""
    pid = os.fork()
    if pid == 0:
        os.setsid() # with all the processes that the tests start
        out = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(copy)
        words_of_pytest = ['-q', '-x', '-p', 'no:cacheprovider', f'tests/test_{tests}.py', '-k', words]
        code = pytest.main(words_of_pytest)
        sys.stdout.flush()
        os._exit(int(code))
    ends = time.monotonic() + SECONDS
    status = (0, 0)
    while status[0] == 0 and time.monotonic() < ends:
        time.sleep(0.1)
        status = os.waitpid(pid, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if status[0] == 0:
        os.waitpid(pid, 0)
        return 1
    return os.waitstatus_to_exitcode(status[1])

folder = Path(tempfile.mkdtemp(prefix='mutate'))
copy = folder / 'project'
made = shutil.ignore_patterns('.git', '.venv', 'data', 'out', '__pycache__')
shutil.copytree(ROOT, copy, ignore=made)
caught = []
missed = []
for number, (script, tests, words, old, new) in enumerate(MUTATIONS, 1):
    if flags['only'] not in ('', script) or not int(flags['first']) <= number <= int(flags['last']):
        continue
    path = copy / f'{script}.py'
    text = path.read_text(encoding='utf-8')
    n = text.count(old)
    assert n == 1, f'row {number}: {old!r} stands {n} times in {script}.py: write the row anew'
    path.write_text(text.replace(old, new), encoding='utf-8')
    began = time.monotonic()
    printed = folder / f'{number}.txt'
    code = run_tests(copy, tests, words, printed)
    path.write_text(text, encoding='utf-8')
    seconds = time.monotonic() - began
    told = printed.read_text(encoding='utf-8', errors='replace')
    assert code in (0, 1), f'row {number}: pytest ended with {code}: {told[-3000:]}'
    if code == 1:
        caught.append(number)
        failed = re.search(r'^(?:FAILED|ERROR) \S+?::(\S+)', told, re.M)
        verdict = f'caught by {failed[1]}' if failed else 'caught: it did not end'
    else:
        missed.append(number)
        verdict = f'MISSED by tests/test_{tests}.py -k "{words}"'
    print(f'{number:2} {seconds:4.0f} s  {script}: {new[:60]}: {verdict}', flush=True)
print(f'{len(caught)} of {len(caught) + len(missed)} caught; missed: {missed or "none"}')
shutil.rmtree(folder)
