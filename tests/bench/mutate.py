"""
Break 40 lines, one at a time: does a test fail? (mutation testing)

$ OMP_NUM_THREADS=1 python tests/bench/mutate.py             # all, about 15 minutes on a quiet core
$ OMP_NUM_THREADS=1 python tests/bench/mutate.py --only=rlhf # those of rlhf.py
$ OMP_NUM_THREADS=1 python tests/bench/mutate.py --first=11 --last=20

Each row of the table changes one line in a copy of the project and runs the tests that should
notice. A line is found by its text. If the text has gone or stands there twice, the script says so,
and the row must be written anew. Needs pytest. Not for Windows (fork).
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ['PYTHONDONTWRITEBYTECODE'] = '1' # compiled files of a changed script would stay
import contextlib, shutil, signal, sys, tempfile, time
from pathlib import Path
sys.dont_write_bytecode = True

import pytest
import numpy, tiktoken, torch # loaded once, not by each run

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 900 # a run that takes longer is ended, and counts as a failure: somebody would notice

# file, old text, new text, file of tests, words for pytest -k
MUTATIONS = [
    ('configurator', 'BOOLS[value.lower()] if kind is bool', 'bool(value) if kind is bool', 'configurator', 'values'),
    ('configurator', 'return plain + of_stages', 'return of_stages + plain', 'configurator', 'profile'),

    ('model', 'is_causal = False if T == 1 else mask is None', 'is_causal = False', 'model', 'leak'),
    ('model', 'else 1 / math.sqrt(D)', 'else 1 / D', 'model', 'attention or cached'),
    ('model', ' - first).clamp(min=0) # (B, T)', ').clamp(min=0) # (B, T)', 'model', 'left_padded'),
    ('model', "dict(params=vectors, weight_decay=0.0)", "dict(params=vectors, weight_decay=weight_decay)",
     'model', 'every_parameter'),
    ('model', '[learn] * (len(text_ids) + 1)', '[learn] * len(text_ids) + [0]', 'model', 'render or learned'),
    ('model', 'return all(met), sum(met) / len(met) + bonus', 'return all(met), sum(met) / len(met)', 'model', 'grade'),
    ('model', '* 1_009 + rank)', '* 1_009)', 'model', 'seed_step'),
    ('model', "assert broken is None, f'wrong checksum of {broken}'", 'pass', 'model', 'flipped'),
    ('model', "if row['step'] < first_step", "if row['step'] <= first_step", 'model', 'log_drops'),

    ('toytown', "wrong_side = task['by_prompt'] and is_val != (side == 'val')", 'wrong_side = False',
     'toytown', 'sides_share'),

    ('prepare_data', 'total += value // 10 + value % 10', 'total += value', 'privacy', 'card'),
    ('prepare_data', "if '.'.join(parts[i:]) in BLOCKED_HOSTS:", 'if host[1] in BLOCKED_HOSTS:', 'prepare_data', 'test_url'),
    ('prepare_data', 'if 5 * n_broken <= n_other:', 'if n_broken == 0:', 'extract', 'charset'),
    ('prepare_data', 'sorted(first_with, reverse=True)]', 'sorted(first_with)]', 'sources', 'every_form'),
    ('prepare_data', 'hashes = hashes * FACTOR + single[k:', 'hashes = hashes + single[k:', 'dedup', 'order'),
    ('prepare_data', 'times[is_val] = np.minimum(times[is_val], 1)', 'pass', 'prepare_data', 'small_source'),

    ('tokenizer', 'elif k > 1: # "left right left right" -> "new new"', 'elif False:', 'tokenizer', 'oracle'),
    ('tokenizer', 'plain = [text for text in texts if EOT not in text]', 'plain = texts', 'tokenizer', 'special or end_to_end'),
    ('tokenizer', 'sorted(os.listdir(moving), reverse=True)', 'sorted(os.listdir(moving))', 'tokenizer', 'swap'),

    ('pretrain', '(1 + math.cos(math.pi * min(1.0, t)))', '(1 - math.cos(math.pi * min(1.0, t)))',
     'pretrain', 'learning_rate'),
    ('pretrain', 'val_bpb=nats / math.log(2) / max(1, n_bytes)', 'val_bpb=nats / max(1, n_bytes)', 'pretrain', 'chain'),
    ('pretrain', 'get_order(i // n_train)[i % n_train]', 'get_order(0)[i % n_train]', 'pretrain', 'every_window'),
    ('pretrain', 'raw_model.parameters(), grad_clip or math.inf)', 'raw_model.parameters(), math.inf)',
     'pretrain', 'clipped'),

    ('sft', 'token if learned else -1 for', 'token for', 'sft', 'targets'),
    ('sft', 'pos[b, start:end] = torch.arange(length)', 'pos[b, start:end] = torch.arange(start, end)', 'sft', 'packed'),
    ('sft', 'loss = get_loss(logits, y) / max(1, n_valid)', 'loss = get_loss(logits, y) / max(1, (y >= 0).sum())',
     'sft', 'unequal_masks'),

    ('reward', 'places[better] < places[worse], 1.0, 0.5)', 'places[better] < places[worse], 1.0, 1.0)', 'reward', 'tie'),
    ('reward', '1 / len(better)))', '1.0))', 'reward', 'counts_once'),
    ('reward', 'return beta * (model(x, mask) - reference(x, mask))', 'return beta * model(x, mask)', 'reward', 'dpo'),

    ('rlhf', 'rewards = -kl_coef * kl', 'rewards = kl_coef * kl', 'rlhf', 'rewards_by_hand'),
    ('rlhf', 'next_value = values[:, t] * response_mask[:, t]', 'next_value = values[:, t]', 'rlhf', 'gae'),
    ('rlhf', 'pg_loss = torch.max(pg_loss1, pg_loss2)', 'pg_loss = torch.min(pg_loss1, pg_loss2)', 'rlhf', 'clipped'),

    ('eval', 'else -logprob / len(text))', 'else -logprob)', 'eval', 'loss_of or scores_are'),
    ('eval', 'n_subsets = [math.comb(i, n - 1)', 'n_subsets = [math.comb(i, n)', 'eval', 'best_of'),
    ('eval', 'groups.append((prefix[-room:], answers))', 'groups.append((prefix[:room], answers))', 'exam', 'long_question'),

    ('chat', 'is_dropped = (before > top_p * total)', 'is_dropped = (before + ordered > top_p * total)', 'chat', 'truncate'),
    ('chat', "if self.headers.get('Origin') not in (None, f'http://{name}'):", 'if False:', 'chat', 'bad_requests'),

    ('convert', "if name.endswith(tuple(CLASSES['transposed'][arch])):", 'if False:', 'convert', 'gpt2 and not hub'),
]

flags = dict(only='', first='1', last=str(len(MUTATIONS)))
for word in sys.argv[1:]:
    name, _, value = word.removeprefix('--').partition('=')
    assert name in flags, f'no flag {word}: there are --only=rlhf --first=11 --last=20'
    flags[name] = value

def run_tests(copy, tests, words, printed):
    """Run them in a process of its own. -> pytest's exit code: 0 all passed, 1 some failed, 5 none was found"""
    pid = os.fork()
    if pid == 0:
        os.setsid() # with all the processes that the tests start
        out = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(copy)
        code = pytest.main(['-q', '-x', '-p', 'no:cacheprovider', f'tests/test_{tests}.py', '-k', words])
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
shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.git', '.venv', 'data', 'out', '__pycache__'))
caught = []
missed = []
for number, (script, old, new, tests, words) in enumerate(MUTATIONS, 1):
    if flags['only'] not in ('', script) or not int(flags['first']) <= number <= int(flags['last']):
        continue
    path = copy / f'{script}.py'
    text = path.read_text(encoding='utf-8')
    assert text.count(old) == 1, f'row {number}: {old!r} stands {text.count(old)} times in {script}.py: write it anew'
    path.write_text(text.replace(old, new), encoding='utf-8')
    began = time.monotonic()
    printed = folder / f'{number}.txt'
    code = run_tests(copy, tests, words, printed)
    path.write_text(text, encoding='utf-8')
    assert code in (0, 1), f'row {number}: pytest ended with {code}: {printed.read_text(errors="replace")[-3000:]}'
    (caught if code else missed).append(number)
    verdict = 'caught' if code else 'MISSED'
    by = [line for line in printed.read_text(encoding='utf-8', errors='replace').splitlines() if line.startswith(('FAILED', 'ERROR'))]
    by = by[0].split('::')[-1].split(' ')[0] if by else f'tests/test_{tests}.py -k "{words}"'
    print(f'{number:2} {verdict} {time.monotonic() - began:4.0f} s  {script}: {new[:60]}  ({by})', flush=True)
print(f'{len(caught)} of {len(caught) + len(missed)} caught; missed: {missed or "none"}')
shutil.rmtree(folder)
