"""tokenizer.py: the merges against a naive oracle, the encoder against merging by rank, shards, bad input, Ctrl-C."""
import ast
import atexit
import base64
import gc
import gzip
import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / 'tokenizer.py'
sys.path.insert(0, str(ROOT))
from model import SPECIAL_TOKENS, Tokenizer, read_shard, write_jsonl, write_shard

import huggingface
from bpe import BYTES, PATTERNS, merge, tokens_of, train_bpe, visible

# A stage script runs when it is imported, so only its functions are taken here.
tree = ast.parse(SCRIPT.read_text(encoding='utf-8'))
wanted = [n for n in tree.body if isinstance(n, (ast.Import, ast.FunctionDef))
          or isinstance(n, ast.ImportFrom) and n.module != 'configurator']
stage = {}
exec(compile(ast.Module(wanted, []), str(SCRIPT), 'exec'), stage)

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
    """run(--flags) runs the real script in this process (no new import of torch) -> (what it printed, its exit)."""
    def run(*flags, data=tmp_path):
        exits = []
        monkeypatch.setattr(sys, 'argv', [str(SCRIPT), f'--data_dir={data}', *flags])
        monkeypatch.setattr(atexit, 'register', lambda f, *a, **k: exits.append((f, a, k)))
        before, code = signal.getsignal(signal.SIGINT), 0
        try:
            runpy.run_path(str(SCRIPT), run_name='__main__')
        except SystemExit as e:
            code = e.code or 0
        finally:
            signal.signal(signal.SIGINT, before)
            gc.enable()
            for f, a, k in exits:
                f(*a, **k)
        return capsys.readouterr().out, code
    return run

def outputs(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}

def make_tokenizer(texts, n_merges=60, pattern=PATTERNS['gpt4'], **more):
    tokens = tokens_of(train_bpe(Counter(c for t in texts for c in regex.findall(pattern, t)), n_merges))
    return Tokenizer(dict(version=1, kind='bpe', pattern=pattern, special_tokens=SPECIAL_TOKENS,
                          ranks=[base64.b64encode(t).decode() for t in tokens], **more))

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
    assert tokens_of([(64, 64), (64, 65), (256, 257)])[256:] == [b'aa', b'ab', b'aaab']

def test_the_example_in_the_docstring():
    tokens = tokens_of(train_bpe(Counter(regex.findall(PATTERNS['gpt4'], 'low lower lowest')), 3))
    # lo and ow occur 3 times, lo is the smaller pair; then lo+w 3 times; now ' '+low and low+e occur twice: the blank
    # has id 220 (it does not print), low has 257, so (220, 257) is the smaller pair
    assert tokens[256:] == [b'lo', b'low', b' low']
    assert [*merge(b' lower', {t: i for i, t in enumerate(tokens)})][-1][0] == [b' low', b'e', b'r']

def test_bytes_have_the_ids_of_gpt2():
    # GPT-2's vocabulary begins with ! .. ~ (94), \xa1 .. \xac, \xae .. \xff (94), then 0 .. 32, 127 .. 160, 173
    assert sorted(BYTES) == list(range(256)) and BYTES[:3] == b'!"#' and BYTES[93:95] == b'~\xa1'
    assert BYTES[188:] == bytes([*range(33), *range(127, 161), 173])

def test_merges_equal_the_naive_oracle():
    text = SCRIPT.read_text(encoding='utf-8')[:6000] + ' '.join(STORIES)
    for pattern in PATTERNS.values():
        chunks = Counter(regex.findall(pattern, text))
        assert ''.join(regex.findall(pattern, text)) == text
        assert train_bpe(chunks, 120) == naive_bpe(chunks, 120)

def test_merges_equal_the_naive_oracle_on_repetitive_words():
    rng = random.Random(0)
    for alphabet in ('a', 'ab', 'abc', 'aé🙂'):
        for _ in range(30):
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
    assert time.time() - t0 < 5

def test_visible():
    assert visible(b' caf\xc3') == ' caf<c3>'
    assert visible('café 🙂'.encode()) == 'café 🙂'
    assert visible(b'\x00\n\x1b[31m') == '<00><0a><1b>[31m' # a terminal must not obey a token
    assert visible('\u202e'.encode()) == '<e2><80><ae>'

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
        assert b''.join(tok.bytes_of(i) for i in ids) == text.encode('utf-8')
    assert tok.decode(tok.encode('x \ud83d y')) == 'x \ufffd y' # a lone surrogate
    assert tok.decode(tok.encode('\ud83d\ude42')) == '🙂'        # a pair of them

def test_encode_equals_merging_by_rank():
    tok = make_tokenizer(STORIES, 100)
    ranks = {tok.bytes_of(i): i for i in range(tok.n_vocab - len(SPECIAL_TOKENS))}
    for text in HARD[:-1] + STORIES:
        ids = []
        for chunk in regex.findall(PATTERNS['gpt4'], text[:800]):
            pieces = [bytes([b]) for b in chunk.encode('utf-8')]
            while True:
                pairs = [(ranks.get(a + b, 10**9), i) for i, (a, b) in enumerate(zip(pieces, pieces[1:]))]
                if not pairs or min(pairs)[0] == 10**9:
                    break
                i = min(pairs)[1]
                pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]
            ids += [ranks[p] for p in pieces]
        assert tok.encode(text[:800]) == ids

def test_user_text_cannot_make_special_tokens():
    tok = make_tokenizer(STORIES + SPECIAL_TOKENS * 20, 200)
    for text in [' '.join(SPECIAL_TOKENS), *SPECIAL_TOKENS]:
        ids = tok.encode(text)
        assert max(ids) < tok.n_vocab - len(SPECIAL_TOKENS)
        assert tok.decode(ids) == text

# -----------------------------------------------------------------------------
# the stage

def test_end_to_end(tmp_path):
    """The real command in a process of its own, on documents written by hand."""
    write_documents(tmp_path, STORIES + ['', ' \n '], STORIES[:2] + ['<|endoftext|> <|user|>'])
    (tmp_path / 'train_000007.bin').write_bytes(b'stale')
    (tmp_path / 'val_000001.bin').write_bytes(b'stale')
    (tmp_path / 'train_notes.bin').write_bytes(b'not ours')
    r = subprocess.run([sys.executable, SCRIPT, f'--data_dir={tmp_path}', '--vocab_size=300', '--shard_tokens=150'],
                       capture_output=True, encoding='utf-8', env={**os.environ, 'PYTHONIOENCODING': 'ascii'})
    assert r.returncode == 0, r.stderr
    assert r.stderr == ''
    assert '2 empty ones skipped' in r.stdout and 'bytes per token' in r.stdout and 'largest tokens' in r.stdout

    tok = Tokenizer.load(str(tmp_path / 'tokenizer.json'))
    assert tok.n_vocab == 300 and [tok.bytes_of(i) for i in range(256)] == [bytes([b]) for b in BYTES]
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
        assert ids[0] == tok.eot # every shard begins with a whole document
        starts = np.flatnonzero(ids == tok.eot).tolist() + [len(ids)]
        texts += [tok.decode(ids[a + 1:b].tolist()) for a, b in zip(starts, starts[1:])]
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
    out, code = run()
    assert code == 0 and 'stopped early at 263 instead of 4,096' in out
    assert Tokenizer.load(str(tmp_path / 'tokenizer.json')).n_vocab == 263

def test_one_repeated_character(run, tmp_path):
    write_documents(tmp_path, ['a' * 50_000], ['aaa' + ' ' * 2_000_000 + 'x']) # tiktoken alone crashes on such blanks
    out, code = run()
    assert code == 0 and 'stopped early' in out
    tok = Tokenizer.load(str(tmp_path / 'tokenizer.json'))
    assert tok.decode(read_shard(str(tmp_path / 'val_000000.bin'))[1:].tolist()) == 'aaa' + ' ' * 10_000 + 'x'

def test_lone_surrogates_and_nuls_in_documents(run, tmp_path):
    write_documents(tmp_path, ['a \ud83d b \0 \udc00', 'x'], ['\ud83d'])
    assert run()[1] == 0
    tok = Tokenizer.load(str(tmp_path / 'tokenizer.json'))
    assert tok.decode(read_shard(str(tmp_path / 'val_000000.bin'))[1:].tolist()) == '\ufffd'

def test_custom_pattern_is_saved(run, tmp_path):
    write_documents(tmp_path)
    assert run(r'--pattern=[\p{L} ]+|[\s\S]', '--vocab_size=320')[1] == 0
    tok = Tokenizer.load(str(tmp_path / 'tokenizer.json'))
    assert tok.spec['pattern'] == r'[\p{L} ]+|[\s\S]'
    assert any(b'the cat' in tok.bytes_of(i) for i in range(256, tok.n_vocab)) # merges over blanks, unlike gpt4
    for text in HARD:
        assert tok.decode(tok.encode(text)) == text
    assert run('--pattern=gpt2', '--vocab_size=320')[1] == 0
    assert Tokenizer.load(str(tmp_path / 'tokenizer.json')).spec['pattern'] == PATTERNS['gpt2']

def test_train_chars_takes_a_share_of_each_file(run, tmp_path):
    write_documents(tmp_path, ['ab' * 50] * 10)
    with gzip.open(tmp_path / 'train' / '001.jsonl.gz', 'wt', encoding='utf-8') as f:
        f.write(json.dumps({'text': 'xy' * 500}) + '\n')
    out, code = run('--train_chars=200')
    tok = Tokenizer.load(str(tmp_path / 'tokenizer.json'))
    learned = [tok.bytes_of(i) for i in range(256, tok.n_vocab)]
    assert code == 0 and '200 characters in' in out and b'ab' in learned and b'xy' in learned

def test_large_vocabulary_is_uint32(run, tmp_path, monkeypatch):
    class Large(Tokenizer): # to learn 65,536 tokens for real takes too long for a test
        def __init__(self, spec):
            super().__init__(spec)
            self.n_vocab = 2**16 + extra
    monkeypatch.setattr('model.Tokenizer', Large)
    write_documents(tmp_path)
    for extra, dtype, head in ((0, np.uint16, [20240520, 1]), (1, np.uint32, [20240801, 7])):
        out, code = run('--vocab_size=300')
        ids = read_shard(str(tmp_path / 'train_000000.bin'))
        assert code == 0 and ids.dtype == dtype and dtype.__name__ in out
        assert np.fromfile(tmp_path / 'train_000000.bin', '<i4', 2).tolist() == head
        tok = Tokenizer.load(str(tmp_path / 'tokenizer.json'))
        assert (ids == tok.eot).sum() == len(STORIES) and tok.decode(ids.tolist()).count('lantern lantern') == 3

def test_show(run, tmp_path, monkeypatch):
    write_documents(tmp_path, ['abcabc abcabc é'] * 3)
    out, code = run('--show=abc')
    assert code != 0 and 'python tokenizer.py' in code
    run()
    before = outputs(tmp_path)
    out, code = run('--show=abc ñ\0\udcff')
    assert code == 0
    lines = [line.strip() for line in out.splitlines()]
    # ab and bc both occur 12 times; (97, 98) is the smaller pair, so ab has rank 256, and abc 257
    assert lines[lines.index("'abc' is 3 bytes") + 1:][:5] == [
        'bytes       | a|b|c', "| lowest rank: 256 'ab'",
        'rank    256 | ab|c', "| lowest rank: 257 'abc'", 'rank    257 | abc']
    assert '<c3>|<b1>' in out and '<00>' in out and '\0' not in out
    assert outputs(tmp_path) == before
    (tmp_path / 'tokenizer.json').write_text('{"version": 1, "ranks": ["?"]}', encoding='utf-8')
    out, code = run('--show=abc')
    assert 'tokenizer.json' in code and 'python tokenizer.py' in code and '\n' not in code

def test_processes_make_no_difference(tmp_path):
    """Two counting processes and one, in real runs on enough text (small corpora are counted by one)."""
    rng = random.Random(0)
    words = [''.join(rng.choices('abcdefghijklmnop', k=rng.randint(2, 9))) for _ in range(20_000)]
    texts = [' '.join(rng.choices(words, k=500)) for _ in range(800)] # 2.5 MB
    for n in 1, 2:
        write_documents(tmp_path / f'{n}', texts, texts[:2])
        flags = ['--vocab_size=400', f'--processes={n}', '--max_chunks=15000', '--shard_tokens=300000']
        r = subprocess.run([sys.executable, SCRIPT, f'--data_dir={tmp_path}/{n}', *flags],
                           capture_output=True, encoding='utf-8')
        assert r.returncode == 0 and r.stderr == ''
        # 20,000 words, and many more chunks than that: the rarest had to go, and it is said
        assert 'more than max_chunks = 15,000: ' in r.stdout
    one, two = (outputs(tmp_path / f'{n}') for n in (1, 2))
    assert one == two and len(one) > 5
    texts_of = {name: Tokenizer.load(str(tmp_path / '1' / 'tokenizer.json')).decode(
        read_shard(str(tmp_path / '1' / name))[:6000].tolist()) for name in one if name.startswith('train')}
    places = [texts.index(text.split('<|endoftext|>')[1]) for text in texts_of.values()]
    assert places != sorted(places) # shards do not follow the order of the documents

def test_char(run, tmp_path):
    write_documents(tmp_path, ['abca', 'é🙂\n'], ['abxé', 'xyz'])
    out, code = run('--kind=char')
    tok = Tokenizer.load(str(tmp_path / 'tokenizer.json'))
    assert code == 0 and 'val: 4 bytes left out' in out # x; x, y, z
    assert tok.tokens == ['\n'.encode(), b'a', b'b', b'c', 'é'.encode(), '🙂'.encode()] # by number of the character
    assert tok.n_vocab == 6 + 6 and tok.encode('cab🙂\n') == [3, 1, 2, 5, 0] and tok.encode('a\0ÿa') == [1, 1]
    docs = read_shard(str(tmp_path / 'val_000000.bin'), tok.hash).tolist()
    assert sorted(docs) == sorted([6, 1, 2, 4, 6])
    assert max(tok.encode('<|end|>a')) < 6 and tok.decode([1, 4, 5]) == 'aé🙂'
    ids, mask = tok.render([dict(role='user', content='a'), dict(role='assistant', content='b')])
    assert ids == [6, 8, 1, 10, 9, 2, 10] # no blank in this vocabulary
    assert run('--show=ab')[1] and 'one character' in run('--show=ab')[1]
    write_documents(tmp_path, ['^-]\\[a', '.*'], ['a-b']) # characters that mean something inside [...]
    assert run('--kind=char')[1] == 0
    tok = Tokenizer.load(str(tmp_path / 'tokenizer.json'))
    assert tok.decode(tok.encode('^-]\\[a.*Z_')) == '^-]\\[a.*'

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
    assert run('--kind=gpt2')[1] == 0
    tok = Tokenizer.load(str(tmp_path / 'tokenizer.json'))
    assert (tok.eot, tok.pad, tok.n_vocab) == (50256, 50261, 50304) and 50304 % 128 == 0
    assert tok.bytes_of(50303) == b'' and tok.said([50300, 64]) == 'a'
    assert read_shard(str(tmp_path / 'train_000000.bin'), tok.hash).dtype == np.uint16

def test_shards_that_came_from_elsewhere(run, tmp_path, monkeypatch):
    """FineWeb's shards, in GPT-2's tokens, need no documents; they stay, and no other tokenizer goes beside them."""
    monkeypatch.setattr('tiktoken.get_encoding', lambda name: FakeGPT2())
    for name in 'train_000001.bin', 'val_000000.bin':
        write_shard(str(tmp_path / name), np.array([50256, 5, 6], np.uint16), 0)
    before = outputs(tmp_path)
    assert run('--kind=gpt2')[1] == 0
    tok = Tokenizer.load(str(tmp_path / 'tokenizer.json'))
    assert outputs(tmp_path) == {**before, 'tokenizer.json': (tmp_path / 'tokenizer.json').read_bytes()}
    assert read_shard(str(tmp_path / 'train_000001.bin'), tok.hash).tolist() == [50256, 5, 6]
    write_documents(tmp_path, STORIES, STORIES)
    assert run('--kind=gpt2', '--shard_tokens=200')[1] == 0
    after = outputs(tmp_path)
    assert all(after[name] == before[name] for name in before)
    assert {'train_000000.bin', 'train_000002.bin', 'val_000001.bin'} <= set(after)
    out, code = run()
    assert 'train_000001.bin' in code and '--kind=gpt2' in code and outputs(tmp_path) == after

def test_gpt2_without_a_network(run, tmp_path, monkeypatch):
    def fail(name):
        raise ConnectionError('no route')
    monkeypatch.setattr('tiktoken.get_encoding', fail)
    write_documents(tmp_path)
    out, code = run('--kind=gpt2')
    assert 'TIKTOKEN_CACHE_DIR' in str(code) and '\n' not in str(code)
    assert run('--vocab_size=300')[1] == 0
    out, code = run('--compare=true') # without GPT-2 it compares the rest
    assert code == 0 and 'not at hand' in out and 'English' in out

@pytest.mark.skipif(not (ROOT / '../shared/data/tiktoken_cache').exists(), reason='no copy of GPT-2 at hand')
def test_our_merging_equals_the_real_gpt2(run, tmp_path, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(ROOT / '../shared/data/tiktoken_cache'))
    import tiktoken
    gpt2 = tiktoken.get_encoding('gpt2')
    write_documents(tmp_path)
    assert run('--kind=gpt2')[1] == 0
    tok = Tokenizer.load(str(tmp_path / 'tokenizer.json'))
    ranks = {token: i for i, token in enumerate(tok.tokens)}
    for text in HARD[:-1] + STORIES + [SCRIPT.read_text(encoding='utf-8')[:3000]]:
        chunks = regex.findall(PATTERNS['gpt2'], text)
        ours = [ranks[p] for chunk in chunks if len(chunk) < 1000 for p in [*merge(chunk.encode(), ranks)][-1][0]]
        assert tok.encode(text) == gpt2.encode_ordinary(text)
        assert max(map(len, chunks), default=0) >= 1000 or ours == gpt2.encode_ordinary(text)
    assert tok.eot == gpt2.eot_token
    assert [*map(len, huggingface.merges_of(tok.tokens[:3000]))] == [2] * (3000 - 256)

def test_compare(run, tmp_path, monkeypatch):
    monkeypatch.setattr('tiktoken.get_encoding', lambda name: FakeGPT2())
    write_documents(tmp_path, ['the cat, the hat'] * 3, ['the cat'])
    run('--vocab_size=264')
    # at, he and th occur 6 times; by id, a 64, h 71, t 83, at is the smallest pair, then he
    out, code = run('--compare=true')
    row = next(line.split() for line in out.splitlines() if line.startswith('val: documents'))
    tok = Tokenizer.load(str(tmp_path / 'tokenizer.json'))
    assert [b'at', b'he'] == sorted(tok.tokens[256:])
    # 'the cat\n': t he _ c at \n, 8 bytes in 6 tokens; the fake GPT-2 has a token a byte
    assert code == 0 and row[2:4] == ['1.00', f'{8 / 6:.2f}'] and row[4] == '█' * round(4 * 8 / 6)
    # used in train: t he _ c at , h: 7 of 258
    assert '251 of 258 tokens never occur' in out and "largest tokens: 'at' 'he'" in out

def test_export(run, tmp_path):
    """What we tell Hugging Face's engine, read by an engine of its kind: merges in their order, on spelled bytes."""
    write_documents(tmp_path)
    run('--vocab_size=330')
    out, code = run(f'--export={tmp_path}/hf')
    assert code == 0
    tok = Tokenizer.load(str(tmp_path / 'tokenizer.json'))
    spec = json.loads((tmp_path / 'hf/tokenizer.json').read_text('utf-8'))
    vocab, rank = spec['model']['vocab'], {tuple(m.split(' ')): i for i, m in enumerate(spec['model']['merges'])}
    assert len(vocab) == 324 and len(rank) == 324 - 256 and vocab['Ġthe'] == tok.tokens.index(b' the')
    added = [(t['content'], t['id']) for t in spec['added_tokens']]
    assert added == [(t, 324 + i) for i, t in enumerate(SPECIAL_TOKENS)]
    for text in HARD[:-1] + STORIES:
        ids = []
        for chunk in regex.findall(spec['pre_tokenizer']['pretokenizers'][0]['pattern']['Regex'], text[:500]):
            parts = [huggingface.CHARS[b] for b in chunk.encode()]
            while pairs := [(rank[p], i) for i, p in enumerate(zip(parts, parts[1:])) if p in rank]:
                i = min(pairs)[1]
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            ids += [vocab[p] for p in parts]
        assert ids == tok.encode(text[:500])
    lines = (tmp_path / 'hf/tokenizer.tiktoken').read_text('ascii').splitlines()
    assert [base64.b64decode(line.split()[0]) for line in lines] == tok.tokens
    assert [line.split()[1] for line in lines] == [str(i) for i in range(324)]
    template = json.loads((tmp_path / 'hf/tokenizer_config.json').read_text('utf-8'))['chat_template']
    assert template.count('<|endoftext|>') == 1 and "'<|assistant|>'" in template

def test_export_loses_nothing_and_says_what_it_cannot(run, tmp_path):
    write_documents(tmp_path)
    run('--vocab_size=300', r'--pattern=\w+|\W')
    before = outputs(tmp_path)
    out, code = run(f'--export={tmp_path}/../{tmp_path.name}')
    assert 'is data_dir' in code and outputs(tmp_path) == before
    out, code = run(f'--export={tmp_path}/hf')
    assert code == 0 and 'pattern of your own' in out
    spec = json.loads((tmp_path / 'tokenizer.json').read_text('utf-8'))
    spec['ranks'][256] = base64.b64encode('Tom the cat'.encode()).decode()
    (tmp_path / 'tokenizer.json').write_text(json.dumps(spec), 'utf-8')
    out, code = run(f'--export={tmp_path}/hf')
    assert 'not made of two tokens' in code and '\n' not in code

def test_compare_with_rows_without_text(run, tmp_path):
    write_documents(tmp_path)
    run('--vocab_size=300')
    with gzip.open(tmp_path / 'val' / '000.jsonl.gz', 'wt') as f:
        f.write('{"source": "x"}\n{"text": 3}\n{"text": "the cat", "source": "y"}\n')
    out, code = run('--compare=true')
    assert code == 0 and 'val: y' in out and 'val: x' not in out

@pytest.mark.parametrize('damage', [
    dict(n_vocab=10**13), dict(n_vocab=float('inf')), dict(n_vocab=400.5), dict(n_vocab=-1), dict(n_vocab='9'),
    dict(kind='foo'), dict(kind=3), dict(special_tokens=SPECIAL_TOKENS[::-1]), dict(special_tokens=SPECIAL_TOKENS[:5]),
    dict(ranks=['*']), dict(ranks=['']), dict(ranks={}), dict(ranks=None), dict(pattern=3), dict(pattern='[')])
def test_damaged_tokenizer_json(damage):
    spec = make_tokenizer(STORIES, 5).spec
    Tokenizer(spec)
    with pytest.raises(ValueError, match='damaged tokenizer'):
        Tokenizer({**spec, **damage})
    for ranks in (spec['ranks'] + spec['ranks'][-1:], spec['ranks'][1:], spec['ranks'] + ['']):
        with pytest.raises(ValueError, match='damaged tokenizer'):
            Tokenizer({**spec, 'ranks': ranks})

def test_merges_of_what_is_no_bpe():
    with pytest.raises(ValueError, match='token 256'): # two blanks and an a: neither '  ' nor ' a' came before
        huggingface.merges_of([bytes([b]) for b in BYTES] + [b'  a'])

@pytest.mark.parametrize('kind', ['bpe', 'char'])
def test_export_in_tokenizers(run, tmp_path, kind):
    tokenizers = pytest.importorskip('tokenizers')
    write_documents(tmp_path, STORIES + HARD[:-2])
    run(f'--kind={kind}', '--vocab_size=330')
    run(f'--export={tmp_path}/hf')
    tok = Tokenizer.load(str(tmp_path / 'tokenizer.json'))
    other = tokenizers.Tokenizer.from_file(str(tmp_path / 'hf/tokenizer.json'))
    for text in HARD + STORIES + [Path(huggingface.__file__).read_text(encoding='utf-8')[:200]]:
        ids = other.encode(text, add_special_tokens=False).ids
        assert ids == tok.encode(text)
        assert other.decode(ids) == tok.decode(ids)

# -----------------------------------------------------------------------------
# bad input: one line that helps, and what was there stays whole

@pytest.mark.parametrize('flag, says', [
    ('--vocab_size=262', '263'), ('--vocab_size=0', '263'),
    ('--kind=word', 'gpt2'), ('--processes=-1', 'processes'),
    ('--pattern=[a', 'regular expression'), ('--pattern=(a)|b', '(?:'),
    (r'--pattern=\b|[\s\S]', 'empty text'), ('--pattern=(?=a)|[\\s\\S]', 'empty text'),
    ('--pattern=[a-z&&[^c]]+|[\\s\\S]', 'tiktoken, which encodes, finds'), # one engine takes && for an intersection
    ('--pattern=gpt3', 'typo of gpt4'), (r'--pattern=\p{L}+', 'must match every character')])
def test_bad_settings(run, tmp_path, flag, says):
    write_documents(tmp_path)
    (tmp_path / 'tokenizer.json').write_text('old')
    (tmp_path / 'train_000000.bin').write_text('old')
    before = outputs(tmp_path)
    out, code = run(flag)
    assert says in code and '\n' not in code
    assert outputs(tmp_path) == before and not (tmp_path / 'tokenizer.partial').exists()

def test_bad_documents(run, tmp_path):
    out, code = run()
    assert 'python prepare_data.py' in code and '\n' not in code
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
        out, code = run()
        assert '000.jsonl.gz:2' in code and '\n' not in code
    path = write_documents(tmp_path) / 'train' / '000.jsonl.gz'
    path.write_bytes(path.read_bytes()[:-20])
    assert 'damaged' in run()[1]
    assert outputs(tmp_path) == {} and not (tmp_path / 'tokenizer.partial').exists()

def test_damaged_or_foreign_shard(run, tmp_path):
    write_documents(tmp_path)
    run('--vocab_size=280')
    tok, shard = Tokenizer.load(str(tmp_path / 'tokenizer.json')), tmp_path / 'train_000000.bin'
    ids = np.array(read_shard(str(shard), tok.hash))
    with pytest.raises(SystemExit, match='another tokenizer'):
        read_shard(str(shard), make_tokenizer(STORIES, 10).hash)
    for damaged in (shard.read_bytes()[:-2], shard.read_bytes() + b'x', shard.read_bytes()[:500], b''):
        (tmp_path / 'broken.bin').write_bytes(damaged)
        with pytest.raises(SystemExit, match='tokenizer.py') as e:
            read_shard(str(tmp_path / 'broken.bin'), tok.hash)
        assert '\n' not in str(e.value)
    write_shard(str(tmp_path / 'big.bin'), ids.astype(np.uint32), 0) # 0: of unknown origin, fits any tokenizer
    big = read_shard(str(tmp_path / 'big.bin'), tok.hash)
    assert big.dtype == np.uint32 and (big == ids).all()

@pytest.mark.parametrize('how', ['raise KeyboardInterrupt', 'os.kill(os.getpid(), 9)'])
def test_stopped_while_encoding_keeps_the_old_files(run, tmp_path, how):
    write_documents(tmp_path)
    run('--vocab_size=280', '--shard_tokens=200')
    before = outputs(tmp_path)
    code = f'''if True:
        import os, runpy, sys
        sys.path.insert(0, {str(ROOT)!r})
        import model
        def stop(*args):
            {how}
        n = [0]
        import numpy as np
        nonzero = np.flatnonzero # called for the merges, for the documents of train, for those of val
        np.flatnonzero = lambda x: (n.append(0), stop() if len(n) > 3 else nonzero(x))[1]
        sys.argv = ['tokenizer.py', {f'--data_dir={tmp_path}'!r}, '--vocab_size=300']
        runpy.run_path({str(SCRIPT)!r}, run_name='__main__')'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, encoding='utf-8')
    assert r.returncode != 0 and 'Traceback' not in r.stderr
    assert outputs(tmp_path) == before
    assert (tmp_path / 'tokenizer.partial').exists() == ('kill' in how)
    assert run('--vocab_size=300')[1] == 0 # the next run clears away what a killed one had to leave
    assert not (tmp_path / 'tokenizer.partial').exists()
    assert len(outputs(tmp_path)) == 3

def test_failure_between_the_renames_leaves_no_tokenizer_beside_missing_shards(run, tmp_path, monkeypatch):
    write_documents(tmp_path)
    run('--vocab_size=280', '--shard_tokens=200')
    with monkeypatch.context() as m:
        replace = os.replace
        done = []
        def fail(a, b):
            done.extend([b] * (Path(b).parent == tmp_path)) # not those into tokenizer.partial
            if len(done) == 2:
                raise RuntimeError('power cut')
            replace(a, b)
        m.setattr(os, 'replace', fail)
        with pytest.raises(RuntimeError):
            run('--vocab_size=280')
    assert not (tmp_path / 'tokenizer.json').exists()

def test_conversations_with_another_tokenizer(run, tmp_path):
    """Mid-training: another folder's tokens, each conversation as render spells it, twice in train and once in val."""
    write_documents(tmp_path / 'base')
    run('--vocab_size=300', data=tmp_path / 'base')
    write_documents(tmp_path / 'mid', train=['A page about owls.', 'Another page.'], val=['A page.'])
    answer = dict(role='assistant', content='A number.')
    chats = [[dict(role='user', content=f'What is {i}?'), answer] for i in range(3)]
    for split in 'train', 'val':
        write_jsonl(str(tmp_path / 'mid' / f'chat_{split}.jsonl'), [dict(messages=m) for m in chats])
    use = f'--use={tmp_path / "base" / "tokenizer.json"}'
    run(use, '--conversations=2', data=tmp_path / 'mid')
    tok, same = (Tokenizer.load(tmp_path / n / 'tokenizer.json') for n in ('mid', 'base'))
    assert tok.spec == same.spec and tok.hash == same.hash
    for split, pages, times in (('train', ['A page about owls.', 'Another page.'], 2), ('val', ['A page.'], 1)):
        ids = read_shard(str(tmp_path / 'mid' / f'{split}_000000.bin'), tok.hash).tolist()
        starts = [i for i, t in enumerate(ids) if t == tok.eot] + [len(ids)]
        found = sorted(ids[a:b] for a, b in zip(starts, starts[1:]))
        assert found == sorted([[tok.eot, *tok.encode(p)] for p in pages] + [tok.render(m)[0] for m in chats] * times)
    write_jsonl(str(tmp_path / 'mid' / 'chat_train.jsonl'), [dict(messages=chats[0]), dict(messages=chats[0][:1])])
    before = outputs(tmp_path / 'mid')
    out, code = run(use, '--conversations=1', data=tmp_path / 'mid')
    assert re.search(r'chat_train\.jsonl:2: turns are of user', str(code)), code
    assert outputs(tmp_path / 'mid') == before
