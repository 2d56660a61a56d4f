"""
tokenizer.py: the merges against a naive oracle, the encoder against merging by rank, the shards, bad input, and runs
that are killed.
"""
import atexit
import base64
import gzip
import json
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken

from conftest import ROOT, definitions
from model import SPECIAL_TOKENS, Tokenizer, read_shard, write_jsonl, write_shard

SCRIPT = ROOT / 'tokenizer.py'
stage = definitions('tokenizer.py')
BYTES, PATTERNS = stage.BYTES, stage.PATTERNS
train_bpe, merges_to_tokens, merge_steps = stage.train_bpe, stage.merges_to_tokens, stage.merge_steps

STORIES = ['The cat sat on the mat. The cat was fat.', 'A dog and a cat ran to the lantern, and the dog sat.',
           'Anna keeps a parrot. The parrot said: the cat, the cat, the cat!',
           'Tom had 123 apples.\n\nTom has 124 apples now.',
           'naïve café, naïve café; 🙂🙂🙂 日本語 日本語', 'the lantern lantern lantern and the mat and the cat'] * 3

def write_documents(folder, train=STORIES, val=STORIES[:3]):
    for split, texts in (('train', train), ('val', val)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        with gzip.open(folder / split / '000.jsonl.gz', 'wt', encoding='utf-8') as f:
            for text in texts:
                f.write(json.dumps({'text': text}) + '\n')
    return folder

@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(--flags) runs the real script in this process (no new import of torch) -> (what it printed, its error)."""
    def run(*flags, data=tmp_path):
        exits = []
        monkeypatch.setattr(sys, 'argv', [str(SCRIPT), f'--data_dir={data}', '--processes=1', *flags])
        monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
        monkeypatch.setattr(atexit, 'register', lambda f, *a, **k: exits.append((f, a, k)))
        error = ''
        try:
            runpy.run_path(str(SCRIPT), run_name='__main__')
        except AssertionError as e:
            error = str(e)
            assert error and '\n' not in error
        except SystemExit as e:
            assert not e.code
        for f, a, k in exits:
            f(*a, **k)
        return capsys.readouterr().out, error
    return run

def load(folder):
    return Tokenizer.load(str(folder / 'tokenizer.json'))

def outputs(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}

def work_folders(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith('tokenizer.') and p.is_dir())

def make_tokenizer(texts, n_merges=60, pattern=PATTERNS['gpt4']):
    chunks = Counter()
    for text in texts:
        chunks.update(regex.findall(pattern, text))
    tokens = merges_to_tokens(train_bpe(chunks, n_merges))
    return Tokenizer(dict(version=1, kind='bpe', pattern=pattern, special_tokens=SPECIAL_TOKENS,
                          ranks=[base64.b64encode(t).decode() for t in tokens]))

# -----------------------------------------------------------------------------
# merges

def replace(ids, pair, new):
    out = []
    for i in ids:
        out.append(i)
        if out[-2:] == list(pair):
            out[-2:] = [new]
    return out

def naive_bpe(chunks, n_merges):
    """The definition: count all pairs anew for each merge."""
    words = {chunk: [BYTES.index(b) for b in chunk.encode('utf-8')] for chunk in chunks}
    merges = []
    while len(merges) < n_merges:
        count = Counter()
        for chunk, ids in words.items():
            for pair in zip(ids, ids[1:]):
                count[pair] += chunks[chunk]
        best = min(count, key=lambda pair: (-count[pair], pair), default=None)
        if best is None or count[best] < 2:
            break
        words = {chunk: replace(ids, best, 256 + len(merges)) for chunk, ids in words.items()}
        merges.append(best)
    return merges

def test_wikipedia_example():
    # aaabdaaabac: aa 4 times (overlaps count) -> Z=256: ZabdZabac. Now Za and ab occur twice; the smaller pair of ids
    # is ab (a is the 65th byte that prints, id 64) -> Y=257: ZYdZYac. ZY twice -> X=258: XdXac. No pair occurs twice.
    assert train_bpe({'aaabdaaabac': 1}, 9) == [(64, 64), (64, 65), (256, 257)]
    assert train_bpe({'aaabdaaabac': 1}, 2) == [(64, 64), (64, 65)]
    assert merges_to_tokens([(64, 64), (64, 65), (256, 257)])[256:] == [b'aa', b'ab', b'aaab']

def test_the_example_in_the_docstring():
    l, o, w = (BYTES.index(c) for c in b'low')
    assert train_bpe({'low': 5, 'lower': 2}, 2) == [(l, o), (256, w)]
    tokens = merges_to_tokens(train_bpe(Counter(regex.findall(PATTERNS['gpt4'], 'low lower lowest')), 3))
    # lo and ow occur 3 times, lo is the smaller pair; then lo+w 3 times; now ' '+low and low+e occur twice: the blank
    # has id 220 (it does not print), low has 257, so (220, 257) is the smaller pair
    assert tokens[256:] == [b'lo', b'low', b' low']
    steps = list(merge_steps(b' lower', {token: i for i, token in enumerate(tokens)}))
    assert [pieces for pieces, _, _ in steps][1:] == [
        [b' ', b'lo', b'w', b'e', b'r'], [b' ', b'low', b'e', b'r'], [b' low', b'e', b'r']]

def test_bytes_have_the_ids_of_gpt2():
    # GPT-2's vocabulary begins with ! .. ~ (94), \xa1 .. \xac, \xae .. \xff (94), then 0 .. 32, 127 .. 160, 173
    assert sorted(BYTES) == list(range(256)) and BYTES[:3] == b'!"#' and BYTES[93:95] == b'~\xa1'
    assert BYTES[188:] == bytes([*range(33), *range(127, 161), 173])

def test_merges_equal_the_naive_oracle():
    text = SCRIPT.read_text(encoding='utf-8')[3000:7000] + ' '.join(STORIES)
    for pattern in PATTERNS.values():
        chunks = Counter(regex.findall(pattern, text))
        assert ''.join(regex.findall(pattern, text)) == text
        assert train_bpe(chunks, 120) == naive_bpe(chunks, 120)

def test_merges_equal_the_naive_oracle_on_repetitive_words():
    rng = random.Random(0)
    for alphabet in ('a', 'ab', 'abc', 'aé🙂'):
        for _ in range(40):
            words = [''.join(rng.choices(alphabet, k=rng.randint(1, 20))) for _ in range(rng.randint(1, 12))]
            chunks = {word: rng.randint(1, 4) for word in words}
            assert train_bpe(chunks, 40) == naive_bpe(chunks, 40), chunks

def test_order_of_the_chunks_does_not_matter():
    chunks = Counter(regex.findall(PATTERNS['gpt4'], ' '.join(STORIES)))
    mixed = list(chunks.items())
    random.Random(1).shuffle(mixed)
    assert train_bpe(dict(mixed), 100) == train_bpe(chunks, 100)

def test_degenerate_chunks():
    assert train_bpe({}, 5) == []
    assert train_bpe({'a': 9, '': 3}, 5) == []
    t0 = time.time()
    assert len(train_bpe({'a' * 300_000: 1}, 100)) < 30 # one repeated character: quick, and it stops early
    assert train_bpe({'abcdefgh': 10**9, ' x': 1}, 3) == train_bpe({'abcdefgh': 2, ' x': 1}, 3)
    assert time.time() - t0 < 10

def test_tokens_whose_characters_are_surrogates():
    """In the strings of train_bpe, tokens 0xd800 .. 0xdfff are halves of surrogate pairs: merges must not notice."""
    chars = [chr(c) for c in range(0x10000, 0x10000 + 60_000)] # four bytes each
    merges = train_bpe(dict.fromkeys(chars, 2), 70_000)
    assert len(merges) > 60_000
    assert {char.encode() for char in chars} <= set(merges_to_tokens(merges))

def test_printable():
    assert stage.printable(b' caf\xc3') == r' caf\xc3'
    assert stage.printable('café 🙂'.encode()) == 'café 🙂'
    assert stage.printable(b'\x00\n\x1b[31m') == r'\x00\n\x1b[31m' # a terminal must not obey a token
    assert stage.printable('\u202e'.encode()) == r'\u202e'

# -----------------------------------------------------------------------------
# encoding

HARD = ['', ' ', 'hello',
        'The cat 🙂👩‍👩‍👧 sat', '日本語 мир العربية', 'nul \0 \0\0 end', '\ufefffirst', '\r\n\t \u3000 \u00a0',
        'a' * 5000,
        "I'm DON'T we'll", '12345678', b'\xff\xfe\x80 caf\xe9'.decode('latin-1'), ''.join(map(chr, range(1, 600)))]

@pytest.mark.parametrize('name', PATTERNS)
def test_round_trip(name):
    tok = make_tokenizer(STORIES, pattern=PATTERNS[name])
    for text in HARD:
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert b''.join(tok.token_bytes(i) for i in ids) == text.encode('utf-8')
    assert tok.decode(tok.encode('x \ud83d y')) == 'x \ufffd y' # a lone surrogate
    assert tok.decode(tok.encode('\ud83d\ude42')) == '🙂'        # a pair of them
    assert tok.decode([BYTES.index(b) for b in b'a\xff']) == 'a\ufffd' # bytes that are not UTF-8

def merge_text(text, pattern, ranks):
    """Encode a text with merge_steps."""
    ids = []
    for chunk in regex.findall(pattern, text):
        *_, (pieces, _, choices) = merge_steps(chunk.encode('utf-8'), ranks)
        assert not choices
        ids += [ranks[piece] for piece in pieces]
    return ids

def test_merge_steps_equal_tiktoken():
    tok = make_tokenizer(STORIES, 100)
    ranks = {token: i for i, token in enumerate(tok.tokens)}
    for text in HARD[:-1] + STORIES:
        assert merge_text(text[:800], PATTERNS['gpt4'], ranks) == tok.encode(text[:800])

def test_user_text_cannot_make_special_tokens():
    tok = make_tokenizer(STORIES + SPECIAL_TOKENS * 20, 200)
    for text in [' '.join(SPECIAL_TOKENS), *SPECIAL_TOKENS]:
        ids = tok.encode(text)
        assert max(ids) < tok.n_vocab - len(SPECIAL_TOKENS)
        assert tok.decode(ids) == text

# -----------------------------------------------------------------------------
# the stage

def documents_of(folder, name, tok):
    """The ids of each document of a shard, without the <|endoftext|> before it."""
    ids = read_shard(str(folder / name), tok.hash).tolist()
    assert ids[0] == tok.eot # every shard begins with a whole document
    starts = [i for i, t in enumerate(ids) if t == tok.eot] + [len(ids)]
    return [ids[a + 1:b] for a, b in zip(starts, starts[1:])]

def test_end_to_end(tmp_path):
    """The real command in a process of its own, on documents written by hand."""
    write_documents(tmp_path, STORIES + ['', ' \n '], STORIES[:2] + ['<|endoftext|> <|user|>'])
    (tmp_path / 'train_000007.bin').write_bytes(b'stale')
    (tmp_path / 'val_000001.bin').write_bytes(b'stale')
    (tmp_path / 'train_notes.bin').write_bytes(b'not ours')
    flags = ['--vocab_size=300', '--shard_tokens=150', '--processes=2']
    r = subprocess.run([sys.executable, SCRIPT, f'--data_dir={tmp_path}', *flags],
                       capture_output=True, encoding='utf-8', env={**os.environ, 'PYTHONIOENCODING': 'ascii'})
    assert r.returncode == 0, r.stderr
    assert r.stderr == ''
    assert '2 empty ones skipped' in r.stdout and 'bytes per token' in r.stdout and 'longest tokens' in r.stdout

    tok = load(tmp_path)
    assert tok.n_vocab == 300 and [tok.token_bytes(i) for i in range(256)] == [bytes([b]) for b in BYTES]
    names = sorted(p.name for p in tmp_path.iterdir())
    trains = [n for n in names if n.startswith('train_0')]
    assert names == ['tokenizer.json', 'train', *trains, 'train_notes.bin', 'val', 'val_000000.bin']
    assert len(trains) > 1 and trains == [f'train_{k:06d}.bin' for k in range(len(trains))]

    header = np.fromfile(tmp_path / trains[0], '<i4', 256)
    assert header[:4].tolist() == [20240520, 1, header[2], tok.hash] and not header[4:].any()
    assert (tmp_path / trains[0]).stat().st_size == 1024 + 2 * header[2]
    texts = []
    for name in trains:
        ids = read_shard(str(tmp_path / name), tok.hash)
        assert ids.dtype == np.uint16 and len(ids) <= 150
        texts += [tok.decode(ids) for ids in documents_of(tmp_path, name, tok)]
    assert sorted(texts) == sorted(STORIES) and texts != STORIES # all of them, in another order
    val = read_shard(str(tmp_path / 'val_000000.bin'), tok.hash)
    assert (val == tok.eot).sum() == 3 and (val > tok.eot).sum() == 0

def test_deterministic_and_seed(run, tmp_path):
    for name in 'abc':
        write_documents(tmp_path / name)
        run('--vocab_size=290', f'--seed={5 if name == "c" else 1}', data=tmp_path / name)
    a, b, c = (outputs(tmp_path / name) for name in 'abc')
    assert a == b
    assert a['tokenizer.json'] == c['tokenizer.json'] and a['train_000000.bin'] != c['train_000000.bin']

def test_stops_early(run, tmp_path):
    write_documents(tmp_path, ['abab'], ['ab'])
    out, error = run()
    assert not error and 'stopped before 3,834 merges' in out
    assert load(tmp_path).n_vocab == 263

def test_one_repeated_character(run, tmp_path):
    write_documents(tmp_path, ['a' * 50_000], ['aaa' + ' ' * 2_000_000 + 'x']) # tiktoken alone crashes on such blanks
    out, error = run()
    assert not error and 'stopped before' in out
    tok = load(tmp_path)
    assert tok.decode(documents_of(tmp_path, 'val_000000.bin', tok)[0]) == 'aaa' + ' ' * 10_000 + 'x'

def test_lone_surrogates_and_nuls_in_documents(run, tmp_path):
    write_documents(tmp_path, ['a \ud83d b \0 \udc00', 'x'], ['\ud83d'])
    assert not run()[1]
    assert load(tmp_path).decode(read_shard(str(tmp_path / 'val_000000.bin'))[1:].tolist()) == '\ufffd'

def test_custom_pattern_is_saved(run, tmp_path):
    write_documents(tmp_path)
    assert not run(r'--pattern=[\p{L} ]+|[\s\S]', '--vocab_size=320')[1]
    tok = load(tmp_path)
    assert tok.spec['pattern'] == r'[\p{L} ]+|[\s\S]'
    assert any(b'the cat' in token for token in tok.tokens) # merges over blanks, unlike gpt4
    for text in HARD:
        assert tok.decode(tok.encode(text)) == text
    assert not run('--pattern=gpt2', '--vocab_size=320')[1]
    assert load(tmp_path).spec['pattern'] == PATTERNS['gpt2']

def test_train_chars_takes_a_share_of_each_file(run, tmp_path):
    write_documents(tmp_path, ['ab' * 50] * 10)
    with gzip.open(tmp_path / 'train' / '001.jsonl.gz', 'wt', encoding='utf-8') as f:
        f.write(json.dumps({'text': 'xy' * 500}) + '\n')
    out, error = run('--train_chars=200')
    learned = load(tmp_path).tokens[256:]
    assert not error and '200 characters in' in out and b'ab' in learned and b'xy' in learned

def test_large_vocabulary_is_uint32(run, tmp_path, monkeypatch):
    class Large(Tokenizer): # to learn 65,536 tokens for real takes too long for a test
        def __init__(self, spec):
            super().__init__(spec)
            self.n_vocab = 2**16 + extra
    monkeypatch.setattr('model.Tokenizer', Large)
    write_documents(tmp_path)
    for extra, dtype, head in ((0, np.uint16, [20240520, 1]), (1, np.uint32, [20240801, 7])):
        out, error = run('--vocab_size=300')
        ids = read_shard(str(tmp_path / 'train_000000.bin'))
        assert not error and ids.dtype == dtype and dtype.__name__ in out
        assert np.fromfile(tmp_path / 'train_000000.bin', '<i4', 2).tolist() == head
        tok = load(tmp_path)
        assert (ids == tok.eot).sum() == len(STORIES) and tok.decode(ids.tolist()).count('lantern lantern') == 3

def test_show(run, tmp_path):
    write_documents(tmp_path, ['abcabc abcabc é'] * 3)
    out, error = run('--show=abc')
    assert 'python tokenizer.py' in error
    run()
    before = outputs(tmp_path)
    out, error = run('--show=abc ñ\0\udcff')
    assert not error
    lines = [line.strip() for line in out.splitlines()]
    # ab and bc both occur 12 times; (97, 98) is the smaller pair, so ab has rank 256, and abc 257
    assert lines[lines.index("'abc' is 3 bytes") + 1:][:5] == [
        'bytes       | a|b|c', "| lowest rank: 256 'ab'",
        'rank    256 | ab|c', "| lowest rank: 257 'abc'", 'rank    257 | abc']
    assert r'\xc3|\xb1' in out and r'\x00' in out and '\0' not in out
    assert outputs(tmp_path) == before
    (tmp_path / 'tokenizer.json').write_text('{"version": 1, "ranks": ["?"]}', encoding='utf-8')
    out, error = run('--show=abc')
    assert 'tokenizer.json' in error and 'python tokenizer.py' in error

def test_show_in_colour(capsys):
    stage.show_merges(b'abc', {b'a': 0, b'b': 1, b'c': 2, b'ab': 3}, color=True)
    lines = capsys.readouterr().out.splitlines()
    # the newest token on yellow (43), the others on two blues in turn (46, 104)
    assert lines[2] == 'bytes       | \033[30;46ma\033[0m\033[30;104mb\033[0m\033[30;46mc\033[0m'
    assert lines[4] == 'rank      3 | \033[30;43mab\033[0m\033[30;104mc\033[0m'

def test_processes_make_no_difference(scripts, tmp_path):
    """Two counting processes and one, in real runs; more chunks than may be kept, many shards."""
    rng = random.Random(0)
    words = [''.join(rng.choices('abcdefghijklmnop', k=rng.randint(2, 9))) for _ in range(20_000)]
    texts = [' '.join(rng.choices(words, k=500)) for _ in range(500)] # 1.6 MB
    for n in 1, 2:
        write_documents(tmp_path / f'{n}', texts, texts[:2])
        flags = ['--vocab_size=400', f'--processes={n}', '--max_chunks=15000', '--shard_tokens=150000']
        r = scripts.ok('tokenizer.py', f'--data_dir={tmp_path}/{n}', *flags)
        assert r.err == '' and 'more than max_chunks = 15,000: ' in r.out
    one, two = (outputs(tmp_path / f'{n}') for n in (1, 2))
    assert one == two and len(one) > 5
    tok = load(tmp_path / '1')
    places = [texts.index(tok.decode(documents_of(tmp_path / '1', name, tok)[0]))
              for name in one if name.startswith('train')]
    assert places != sorted(places) # shards do not follow the order of the documents

@pytest.mark.skipif(not os.path.exists('/proc/self/task'), reason='needs /proc')
def test_counting_processes_leave_when_the_parent_is_killed(scripts, tmp_path):
    """kill -9 of the parent in the middle of counting: no process stays behind."""
    write_documents(tmp_path, ['the cat sat on the mat ' * 50_000] * 3)
    before = """if True:
        import collections, os
        update, parent = collections.Counter.update, os.getpid()
        def kill_parent(self, *args, **kwargs):
            if os.getpid() == parent and args and type(args[0]) is collections.Counter: # the first results
                print(open(f'/proc/{parent}/task/{parent}/children').read(), flush=True)
                os.kill(parent, 9)
            update(self, *args, **kwargs)
        collections.Counter.update = kill_parent"""
    r = scripts('tokenizer.py', f'--data_dir={tmp_path}', '--processes=2', before=before)
    assert r.code == -9, r.err
    children = [int(pid) for pid in r.out.splitlines()[-1].split()]
    assert len(children) == 2

    def is_running(pid):
        stat = Path(f'/proc/{pid}/stat')
        try:
            return stat.read_text().rsplit(')', 1)[1].split()[0] != 'Z'
        except OSError:
            return False
    deadline = time.time() + 30
    while any(map(is_running, children)) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, children))

def test_char(run, tmp_path):
    write_documents(tmp_path, ['abca', 'é🙂\n'], ['abxé', 'xyz'])
    out, error = run('--kind=char')
    tok = load(tmp_path)
    assert not error and '4 lost' in out # x; x, y, z
    assert tok.tokens == ['\n'.encode(), b'a', b'b', b'c', 'é'.encode(), '🙂'.encode()] # by number of the character
    assert tok.n_vocab == 6 + 6 and tok.encode('cab🙂\n') == [3, 1, 2, 5, 0] and tok.encode('a\0ÿa') == [1, 1]
    docs = read_shard(str(tmp_path / 'val_000000.bin'), tok.hash).tolist()
    assert sorted(docs) == sorted([6, 1, 2, 4, 6])
    assert max(tok.encode('<|end|>a')) < 6 and tok.decode([1, 4, 5]) == 'aé🙂'
    ids, mask = tok.render([dict(role='user', content='a'), dict(role='assistant', content='b')])
    assert ids == [6, 8, 1, 10, 9, 2, 10] # no blank in this vocabulary
    assert 'one character' in run('--show=ab')[1]
    write_documents(tmp_path, ['^-]\\[a', '.*'], ['a-b']) # characters that mean something inside [...]
    assert not run('--kind=char')[1]
    tok = load(tmp_path)
    assert tok.decode(tok.encode('^-]\\[a.*Z_')) == '^-]\\[a.*'

@pytest.mark.parametrize('flags', [['--kind=char'], ['--kind=bpe'], ['--kind=char', '--mid_chats=1']], ids=str)
def test_documents_of_nothing_but_blanks(flags, run, tmp_path):
    """One line, and what was there stays: there is nothing to learn from."""
    write_documents(tmp_path)
    assert not run('--kind=char')[1]
    old = outputs(tmp_path)
    for split in 'train', 'val':
        write_jsonl(str(tmp_path / f'chat_{split}.jsonl'), [dict(messages=[
            dict(role='user', content='a'), dict(role='assistant', content='b')])])
    for train, val, split in (([' ', '\n\t', '\u3000', ''], STORIES, 'train'), (STORIES, [' \n'], 'val')):
        write_documents(tmp_path, train, val)
        out, error = run(*flags)
        assert f'all documents in {tmp_path}/{split} are empty: look at `python prepare_data.py' in error
    assert {name: data for name, data in outputs(tmp_path).items() if name in old} == old and work_folders(tmp_path) == []

class FakeGPT2:
    """50,256 tokens as GPT-2 has them: bytes, then what is made of two earlier ones."""
    _pat_str = PATTERNS['gpt2']
    tokens = [bytes([b]) for b in BYTES] + [bytes([b, c]) for b in BYTES[:200] for c in BYTES[:250]]
    def decode_single_token_bytes(self, i):
        return self.tokens[i]
    def encode_ordinary(self, text):
        return list(text.encode())

def test_gpt2(run, tmp_path, monkeypatch):
    monkeypatch.setattr('tiktoken.get_encoding', lambda name: FakeGPT2())
    write_documents(tmp_path)
    assert not run('--kind=gpt2')[1]
    tok = load(tmp_path)
    assert (tok.eot, tok.pad, tok.n_vocab) == (50256, 50261, 50304) and 50304 % 128 == 0
    assert tok.token_bytes(50303) == b'' and tok.decode_answer([50300, 64]) == 'a'
    assert read_shard(str(tmp_path / 'train_000000.bin'), tok.hash).dtype == np.uint16

def test_shards_that_came_from_elsewhere(run, tmp_path, monkeypatch):
    """FineWeb's shards, in GPT-2's tokens, need no documents; they stay, and no other tokenizer comes next to them."""
    monkeypatch.setattr('tiktoken.get_encoding', lambda name: FakeGPT2())
    for name in 'train_000001.bin', 'val_000000.bin':
        write_shard(str(tmp_path / name), np.array([50256, 5, 6], np.uint16), 0)
    before = outputs(tmp_path)
    assert not run('--kind=gpt2')[1]
    tok = load(tmp_path)
    assert outputs(tmp_path) == {**before, 'tokenizer.json': (tmp_path / 'tokenizer.json').read_bytes()}
    assert read_shard(str(tmp_path / 'train_000001.bin'), tok.hash).tolist() == [50256, 5, 6]
    write_documents(tmp_path, STORIES, STORIES)
    assert not run('--kind=gpt2', '--shard_tokens=200')[1]
    after = outputs(tmp_path)
    assert all(after[name] == before[name] for name in before)
    assert {'train_000000.bin', 'train_000002.bin', 'val_000001.bin'} <= set(after)
    out, error = run()
    assert 'train_000001.bin' in error and '--kind=gpt2' in error and outputs(tmp_path) == after

def test_gpt2_without_a_network(run, tmp_path, monkeypatch):
    def fail(name):
        raise ConnectionError('no route')
    monkeypatch.setattr('tiktoken.get_encoding', fail)
    write_documents(tmp_path)
    assert 'TIKTOKEN_CACHE_DIR' in run('--kind=gpt2')[1]
    assert not run('--vocab_size=300')[1]
    out, error = run('--compare=true') # without GPT-2 it compares the rest
    assert not error and 'cannot load' in out and 'English' in out

@pytest.mark.skipif(not (ROOT / '../shared/data/tiktoken_cache').exists(), reason='no copy of GPT-2 at hand')
def test_our_merging_equals_the_real_gpt2(run, tmp_path, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(ROOT / '../shared/data/tiktoken_cache'))
    gpt2 = tiktoken.get_encoding('gpt2')
    write_documents(tmp_path)
    assert not run('--kind=gpt2')[1]
    tok = load(tmp_path)
    ranks = {token: i for i, token in enumerate(tok.tokens)}
    for text in HARD[:-1] + STORIES + [SCRIPT.read_text(encoding='utf-8')[:3000]]:
        assert tok.encode(text) == gpt2.encode_ordinary(text)
        if max(map(len, regex.findall(PATTERNS['gpt2'], text)), default=0) < 1000:
            assert merge_text(text, PATTERNS['gpt2'], ranks) == gpt2.encode_ordinary(text)
    assert tok.eot == gpt2.eot_token

def test_compare(run, tmp_path, monkeypatch):
    monkeypatch.setattr('tiktoken.get_encoding', lambda name: FakeGPT2())
    write_documents(tmp_path, ['the cat, the hat'] * 3, ['the cat', '\n'])
    run('--vocab_size=264')
    # at, he and th occur 6 times; by id, a 64, h 71, t 83, at is the smallest pair, then he
    assert [b'at', b'he'] == sorted(load(tmp_path).tokens[256:])
    out, error = run('--compare=true')
    row = next(line.split() for line in out.splitlines() if line.startswith('val: documents'))
    # 'the cat\n\n\n': t he _ c at \n \n \n, 10 bytes in 8 tokens; the fake GPT-2 has a token a byte
    assert not error and row[2:4] == ['1.00', f'{10 / 8:.2f}'] and row[4] == '█' * 5
    with gzip.open(tmp_path / 'val' / '000.jsonl.gz', 'wt') as f:
        f.write('{"source": "x"}\n{"text": 3}\n{"text": "the cat", "source": "y"}\n')
    out, error = run('--compare=true')
    assert not error and 'val: x' in out and 'val: y' in out

# -----------------------------------------------------------------------------
# bad input: one line that helps, and what was there stays whole

@pytest.mark.parametrize('flag, says', [
    ('--vocab_size=262', '263'), ('--vocab_size=0', '263'),
    ('--kind=word', 'gpt2'), ('--processes=-1', 'processes'),
    ('--pattern=[a', 'is not gpt4, gpt2 or'), ('--pattern=(a)|b', '(?:'),
    (r'--pattern=\b|[\s\S]', 'empty text'), ('--pattern=(?=a)|[\\s\\S]', 'empty text'),
    ('--pattern=gpt3', 'gpt4, gpt2'), (r'--pattern=\p{L}+', 'must match every character'),
    (r'--pattern=[\x00-\U0001ffff--[\u0e01]]', 'every character')])
def test_bad_settings(run, tmp_path, flag, says):
    write_documents(tmp_path)
    (tmp_path / 'tokenizer.json').write_text('old')
    (tmp_path / 'train_000000.bin').write_text('old')
    before = outputs(tmp_path)
    assert says in run(flag)[1]
    assert outputs(tmp_path) == before and not work_folders(tmp_path)

def test_pattern_that_loses_a_rare_character(run, tmp_path):
    """The samples do not hold every character: the bytes of the documents are counted too."""
    write_documents(tmp_path, STORIES, ['The cat \U0001d11e'])
    assert 'loses 4 bytes' in run('--pattern=[^\U0001d11e]')[1]
    assert outputs(tmp_path) == {} and not work_folders(tmp_path)

def test_bad_documents(run, tmp_path):
    (tmp_path / 'mine.py').write_text('seed = 1\n')
    assert f'`python prepare_data.py --data_dir={tmp_path} {tmp_path}/mine.py`' in run(f'{tmp_path}/mine.py')[1]
    os.remove(tmp_path / 'mine.py')
    write_documents(tmp_path)
    os.remove(tmp_path / 'val' / '000.jsonl.gz')
    assert 'val' in run()[1]
    write_documents(tmp_path, ['', ' '])
    assert 'train are empty' in run()[1]
    write_documents(tmp_path, STORIES, [''])
    assert 'val are empty' in run()[1]
    for line in ('{"text": "a"', '[1]', '{"txt": "a"}', '{"text": 3}'):
        with gzip.open(tmp_path / 'train' / '000.jsonl.gz', 'wt') as f:
            f.write('{"text": "fine"}\n' + line + '\n')
        assert '000.jsonl.gz:2' in run()[1]
    path = write_documents(tmp_path) / 'train' / '000.jsonl.gz'
    path.write_bytes(path.read_bytes()[:-20])
    assert 'damaged' in run()[1]
    assert outputs(tmp_path) == {} and not work_folders(tmp_path)

@pytest.mark.parametrize('damage', [
    dict(n_vocab=-1), dict(special_tokens=SPECIAL_TOKENS[::-1]), dict(ranks=['*']), dict(ranks=['']), dict(ranks=None),
    dict(ranks=['YQ==', 'YQ==']), dict(pattern='[')])
def test_damaged_tokenizer_json(tmp_path, damage):
    spec = {**make_tokenizer(STORIES, 5).spec, **damage}
    (tmp_path / 'tokenizer.json').write_text(json.dumps(spec), encoding='utf-8')
    with pytest.raises(AssertionError, match='damaged.*python tokenizer.py'):
        load(tmp_path)

# -----------------------------------------------------------------------------
# runs that are stopped

@pytest.mark.parametrize('how', ['raise KeyboardInterrupt', 'os.kill(os.getpid(), 9)'])
def test_stopped_while_encoding_keeps_the_old_files(scripts, run, tmp_path, how):
    write_documents(tmp_path)
    run('--vocab_size=280', '--shard_tokens=200')
    before = outputs(tmp_path)
    stop = f"""if True:
        import os
        import numpy as np
        nonzero, n = np.flatnonzero, []
        def stop(x): # called for the documents of train, then for those of val
            n.append(0)
            if len(n) == 2:
                {how}
            return nonzero(x)
        np.flatnonzero = stop"""
    r = scripts('tokenizer.py', f'--data_dir={tmp_path}', '--vocab_size=300', before=stop)
    assert r.code != 0 and 'Traceback' not in r.err
    assert outputs(tmp_path) == before
    assert work_folders(tmp_path) == ['tokenizer.partial'] * ('kill' in how)
    assert not run('--vocab_size=300')[1] # the next run clears away what a killed one had to leave
    assert not work_folders(tmp_path)
    assert len(outputs(tmp_path)) == 3

def test_killed_at_every_step_of_the_swap(run, tmp_path, monkeypatch):
    """
    Before every rename and removal of a run: the folder never has a tokenizer.json with shards of another run, and
    whatever command comes next finds the old files or the new ones, all of them.
    """
    class Kill(BaseException):
        pass
    start = write_documents(tmp_path / 'start')
    run('--vocab_size=280', '--shard_tokens=100', data=start)
    done = tmp_path / 'done'
    shutil.copytree(start, done)
    run('--vocab_size=300', '--shard_tokens=200', data=done)
    old, new = outputs(start), outputs(done)
    assert set(new) < set(old) # fewer shards than before
    n_steps = 0
    states = Counter()
    while True:
        data = tmp_path / f'{n_steps}'
        shutil.copytree(start, data)
        with monkeypatch.context() as m:
            steps = []
            for name in 'remove', 'rename', 'replace':
                def step(*args, do=getattr(os, name)):
                    if str(args[0]).startswith(str(data)):
                        if len(steps) == n_steps:
                            raise Kill
                        steps.append(args)
                    return do(*args)
                m.setattr(os, name, step)
            m.setattr(shutil, 'rmtree', lambda *args, **kwargs: None) # a killed process clears nothing away
            try:
                run('--vocab_size=300', '--shard_tokens=200', data=data)
                break
            except Kill:
                pass
        now = outputs(data)
        assert 'tokenizer.json' not in now or now in (old, new)
        assert not run('--show=cat', data=data)[1] # the next command, whatever it is
        assert outputs(data) in (old, new)
        states[outputs(data) == new] += 1
        n_steps += 1
    assert outputs(data) == new and states[False] >= 3 and states[True] >= len(old) + len(new)

def test_shards_of_mid_training(run, tmp_path):
    """
    Another folder's tokens. train_*.bin as without mid_chats; mid_*.bin hold each conversation as render spells it, as
    often as asked, and whole documents with a share of their tokens; without mid_chats they go.
    """
    write_documents(tmp_path / 'base')
    run('--vocab_size=300', data=tmp_path / 'base')
    pages = dict(train=[f'Page {i} is about owls.' for i in range(40)], val=[f'{i} pages.' for i in range(20)])
    data = write_documents(tmp_path / 'mid', **pages)
    answer = dict(role='assistant', content='A number.')
    chats = [[dict(role='user', content=f'What is {i}?'), answer] for i in range(3)]
    for split in 'train', 'val':
        write_jsonl(str(data / f'chat_{split}.jsonl'), [dict(messages=m) for m in chats])
    use = f'--use={tmp_path / "base" / "tokenizer.json"}'
    assert not run(use, data=data)[1]
    plain = outputs(data)
    assert not run(use, '--mid_chats=2', '--mid_text=0.3', '--shard_tokens=200', data=data)[1]
    tok, same = load(data), load(tmp_path / 'base')
    assert tok.spec == same.spec and tok.hash == same.hash
    for split, texts in pages.items():
        encoded = [tok.encode(text) for text in texts]
        found, mid = ([ids for path in sorted(data.glob(f'{prefix}{split}_*.bin'))
                       for ids in documents_of(data, path.name, tok)] for prefix in ('', 'mid_'))
        assert sorted(found) == sorted(encoded)
        rendered = sorted([tok.render(m)[0][1:] for m in chats] * 2)
        assert sorted(ids for ids in mid if tok.user in ids) == rendered
        replay = [ids for ids in mid if tok.user not in ids]
        assert len({*map(tuple, replay)}) == len(replay) and all(ids in encoded for ids in replay)
        share = sum(len(ids) + 1 for ids in replay) / sum(len(ids) + 1 for ids in encoded)
        assert 0.3 - 1 / len(texts) < share <= 0.3 and mid != replay + rendered # shuffled
    assert len(list(data.glob('mid_train_*.bin'))) > 1
    both = outputs(data)
    (data / 'chat_val.jsonl').rename(data / 'away')
    assert re.search(r'mid_chats=1 needs .*chat_val\.jsonl: `python prepare_data', run(use, '--mid_chats=1', data=data)[1])
    (data / 'away').rename(data / 'chat_val.jsonl')
    write_jsonl(str(data / 'chat_train.jsonl'), [dict(messages=chats[0]), dict(messages=chats[0][:1])])
    error = run(use, '--mid_chats=1', data=data)[1]
    assert re.search(r'chat_train\.jsonl:2: .*user', error), error
    assert {**outputs(data), 'chat_train.jsonl': 0} == {**both, 'chat_train.jsonl': 0}
    assert not run(use, data=data)[1]
    assert {**outputs(data), 'chat_train.jsonl': 0} == {**plain, 'chat_train.jsonl': 0}
