"""
Turns text into numbers: trains a byte-level BPE tokenizer on our own documents, then encodes the documents with it.

    data_dir/train/*.jsonl.gz, val/*.jsonl.gz  ->  data_dir/tokenizer.json, train_000000.bin .., val_000000.bin ..

Byte pair encoding starts from the 256 bytes, so that no text is ever unknown. It looks for the pair of neighbours that
is most frequent in the corpus, makes it a new token, and repeats. Encoding applies the same merges in the same order.
Left out: several processes; corpora whose tokens, 2 bytes each, do not fit in memory.

    python tokenizer.py config/tiny.py                         train and encode: seconds on a laptop
    python tokenizer.py config/tiny.py --show=understanding    watch the merges of a word, with the trained tokenizer
    python tokenizer.py --data_dir=data/web --vocab_size=32768 --train_chars=2_000_000_000
"""
import atexit, base64, glob, heapq, json, os, shutil, signal, sys, time
from collections import Counter, defaultdict
import numpy as np
import regex # comes with tiktoken; unlike re it knows \p{L}, "any letter"
from configurator import configure
from model import SHARD_FORMS, SPECIAL_TOKENS, Tokenizer, check_settings, die, print0, read_jsonl

# -----------------------------------------------------------------------------
# settings
data_dir = 'data/toytown'  # where prepare_data.py has put train/ and val/; tokenizer.json and the shards go there too
vocab_size = 4096          # tokens in all: 256 bytes + merges + 6 special tokens
pattern = 'gpt4'           # how text is split before merging: 'gpt4', 'gpt2' or a regular expression
train_chars = 0            # learn the merges from this many characters, an equal share of each file (0 = all)
shard_tokens = 100_000_000 # tokens per .bin file, at most; a document is never cut (0 = one file)
seed = 1337                # order of the documents in the shards
show = ''                  # a text: show its merges step by step with the trained tokenizer, then exit
config = configure(globals())
# -----------------------------------------------------------------------------
# functions

# Merges never cross the borders of these chunks: "dog." and "dog!" share the token "dog". \p{L} is a letter, \p{N} a
# digit; "++" is a "+" that never gives back what it took, which keeps the matching fast.
PATTERNS = dict(
    gpt2=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    gpt4=r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
         r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s")

def whole(text):
    """Joins surrogate pairs; a lone half, which no UTF-8 can hold, becomes U+FFFD (tiktoken does the same)."""
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')

def documents(path):
    """Yields the texts of one file; empty documents are skipped and remembered in `empty`."""
    for line, row in read_jsonl(path):
        if not isinstance(row.get('text'), str):
            die(f'{path}:{line}: no text in this document, expected {{"text": "..."}}')
        if not row['text'].strip():
            empty.add((path, line))
        else: # tiktoken's matcher overflows its stack on a run of a million blanks: such runs are cut short
            yield regex.sub(r'(?<!\s)(\s{10000})\s++', r'\1', whole(row['text']))

def progress(what, done, total, t0):
    """Prints rate and time left, ten times in all however many steps there are."""
    if done * 10 // total > (done - 1) * 10 // total:
        dt = time.time() - t0
        print0(f'{what} | {done:6,}/{total:,} | {done / dt:7,.0f}/s | {dt / done * (total - done):3.0f} s left')

def visible(token):
    """b' caf\\xc3\\n' -> ' caf<c3><0a>': bytes that are no printable text of their own are shown in hex."""
    return ''.join(c if c.isprintable() else ''.join(f'<{b:02x}>' for b in c.encode('utf-8', 'surrogateescape'))
                   for c in token.decode('utf-8', 'surrogateescape'))

def train_bpe(chunks, n_merges):
    """
    {chunk: how often it occurs} -> the merges, as pairs of ids. Bytes are ids 0..255, merge number k makes id 256 + k.
    Tie rule: the highest count wins; of equal counts, the smallest pair of ids (the left one is compared first).
    Stops early when no pair occurs twice: such a token would save nothing.

        train_bpe({'aaabdaaabac': 1}, 9) -> [(97, 97), (97, 98), (256, 257)]    aa, ab, aaab; then nothing occurs twice
    """
    words, times = [list(chunk.encode()) for chunk in chunks], list(chunks.values())
    count = defaultdict(int)  # pair -> how often it occurs in the whole text
    where = defaultdict(list) # pair -> indices of the words it occurs in, or once did
    for w, ids in enumerate(words):
        for pair in zip(ids, ids[1:]):
            count[pair] += times[w]
            where[pair].append(w)
    # The heap brings up the best pair. An entry may be out of date, but only too high (a count rises only in the step
    # that makes the pair): then it goes back with the count of today.
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)
    merges, t0 = [], time.time()
    while len(merges) < n_merges and heap:
        best, pair = heapq.heappop(heap)
        if count[pair] != -best:
            heapq.heappush(heap, (-count[pair], pair))
            continue
        if -best < 2:
            break
        (a, b), new = pair, 256 + len(merges)
        merges.append(pair)
        fresh = set() # pairs that this merge has made
        # Only words that hold the pair are touched: the cost grows with the number of *distinct* chunks, not of all.
        for w in set(where.pop(pair)):
            ids, merged, i = words[w], [], 0
            while i < len(ids):
                found = ids[i] == a and ids[i + 1:i + 2] == [b]
                merged.append(new if found else ids[i])
                i += 1 + found
            words[w] = merged
            for old in zip(ids, ids[1:]):
                count[old] -= times[w]
            for now in zip(merged, merged[1:]):
                count[now] += times[w]
                if new in now:
                    where[now].append(w)
                    fresh.add(now)
        for now in fresh:
            heapq.heappush(heap, (-count[now], now))
        progress(f'merge, {-best:9,} times', len(merges), n_merges, t0)
    return merges

def write_shard(path, ids, tok_hash):
    """Token shard: a header of 256 int32 (magic, version, number of tokens, hash of the tokenizer), then the tokens."""
    magic, version = next((magic, form[0]) for magic, form in SHARD_FORMS.items() if form[1] == ids.dtype)
    with open(path, 'wb') as f:
        f.write(np.array([magic, version, len(ids), tok_hash] + [0] * 252, '<i4').tobytes())
        f.write(ids.tobytes())

# -----------------------------------------------------------------------------
# show the merges of a text

again = ' '.join(a for a in sys.argv[1:] if a.endswith('.py') or a.startswith('--data_dir=')) # for the hints below
tokenizer_json = os.path.join(data_dir, 'tokenizer.json')
sys.stdout.reconfigure(errors='backslashreplace') # what a terminal cannot show is shown by its number, without a crash

if show:
    tok = Tokenizer.load(tokenizer_json)
    ranks = {tok.bytes_of(i): i for i in range(tok.n_vocab - len(SPECIAL_TOKENS))}
    colour = sys.stdout.isatty() and 'NO_COLOR' not in os.environ # the newest token on yellow, the others on two blues
    form = '\033[30;{}m{}\033[0m' if colour else '{1}'
    for chunk in regex.findall(tok.spec['pattern'], whole(show)):
        pieces, newest, choices = [bytes([b]) for b in chunk.encode()], -1, True
        print0(f"\n'{visible(chunk.encode())}' is {len(pieces)} bytes")
        while choices:
            line = ('' if colour else '|').join(form.format(43 if i == newest else (46, 104)[i % 2], visible(p))
                                                for i, p in enumerate(pieces))
            print0(f'rank {ranks[pieces[newest]]:6} |' if newest >= 0 else 'bytes       |', line)
            # What may merge now? The lowest rank does, the merge that was learned first; the leftmost one of equals.
            pairs = [a + b for a, b in zip(pieces, pieces[1:])]
            choices = sorted((ranks[p], i) for i, p in enumerate(pairs) if p in ranks)
            if choices:
                names = list(dict.fromkeys(f"{rank} '{visible(pairs[i])}'" for rank, i in choices))
                print0('            | lowest rank:', ', not '.join(names[:4]))
                newest = choices[0][1]
                pieces[newest:newest + 2] = [pairs[newest]]
        print0('ids         |', *(ranks[p] for p in pieces))
    sys.exit()

# -----------------------------------------------------------------------------
# count the chunks, learn the merges

t_start = time.time()
check_settings(config)
n_merges = vocab_size - 256 - len(SPECIAL_TOKENS)
if n_merges < 1:
    die(f'vocab_size = {vocab_size} is too small: bytes, special tokens and one merge make {257 + len(SPECIAL_TOKENS)}')
tokens = [bytes([b]) for b in range(256)] # the id of a byte is its value
spec = dict(version=1, kind='bpe', pattern=PATTERNS.get(pattern, pattern), special_tokens=SPECIAL_TOKENS,
            ranks=[base64.b64encode(t).decode() for t in tokens])
try: # both engines must understand the pattern: `regex` counts the chunks here, tiktoken encodes with it later
    if regex.compile(spec['pattern']).groups:
        raise ValueError('write (?:...) instead of (...), which would return only the group')
    if regex.match(spec['pattern'], ''):
        raise ValueError('it matches the empty text')
    Tokenizer(spec)
except (regex.error, ValueError) as e:
    die(f'pattern = {pattern!r} is neither gpt4, gpt2 nor a regular expression: {e}')
files = {split: sorted(glob.glob(f'{glob.escape(data_dir)}/{split}/*.jsonl.gz')) for split in ('train', 'val')}
for split in files:
    if not files[split]:
        die(f'no documents {data_dir}/{split}/*.jsonl.gz: make them with `python prepare_data.py {again}`')

empty = set() # (file, line) of the documents without text
chunks, n_chars = Counter(), 0
for k, path in enumerate(files['train']):
    share = (train_chars - n_chars) // (len(files['train']) - k) if train_chars > 0 else sys.maxsize
    for text in documents(path):
        if share <= 0:
            break
        chunks.update(regex.findall(spec['pattern'], text[:share]))
        n_chars += len(text[:share])
        share -= len(text)
    progress('count, files', k + 1, len(files['train']), t_start)
print0(f'{n_chars:,} characters in {sum(chunks.values()):,} chunks, {len(chunks):,} of them distinct')

merges = train_bpe(chunks, n_merges)
for a, b in merges:
    tokens.append(tokens[a] + tokens[b])
spec['ranks'] = [base64.b64encode(t).decode() for t in tokens]
tok = Tokenizer(spec)
print0(f'256 bytes + {len(merges):,} merges + {len(SPECIAL_TOKENS)} special tokens = {tok.n_vocab:,} tokens')
if len(merges) < n_merges:
    print0(f'stopped early at {tok.n_vocab:,} instead of {vocab_size:,}: no pair of tokens occurs twice any more')

# -----------------------------------------------------------------------------
# encode the documents, then put the new files in the place of the old

# Everything is written to a folder of its own first, so that a run that is stopped leaves the old files as they were.
partial = os.path.join(data_dir, 'tokenizer.partial')
shutil.rmtree(partial, ignore_errors=True) # of a run that was killed
atexit.register(shutil.rmtree, partial, ignore_errors=True)
os.makedirs(partial)
with open(os.path.join(partial, 'tokenizer.json'), 'w', encoding='utf-8') as f:
    json.dump(spec, f, indent=1)
dtype = np.uint16 if tok.n_vocab <= 2**16 else np.uint32

for split in files:
    docs, n_bytes, used, t0 = [], 0, np.zeros(tok.n_vocab, int), time.time() # used: how often each token occurs
    for k, path in enumerate(files[split]):
        for text in documents(path):
            # <|endoftext|> stands *before* each document: also the first one begins after it.
            docs.append(np.array([tok.eot] + tok.encode(text), dtype))
            np.add.at(used, docs[-1], 1)
            n_bytes += len(text.encode())
        progress(f'encode {split}, files', k + 1, len(files[split]), t0)
    if not docs:
        die(f'all documents in {data_dir}/{split} are empty: look at what `python prepare_data.py {again}` prints')
    if used @ [len(tok.bytes_of(i)) for i in range(tok.n_vocab)] != n_bytes:
        die(f'pattern = {pattern!r} loses text: it must match every character. A typo of gpt4? Else add |[\\s\\S]')

    np.random.default_rng(seed).shuffle(docs)
    shards, room = [], 0 # whole documents, as many in a shard as fit
    for doc in docs:
        if len(doc) > room:
            shards.append([])
            room = shard_tokens if shard_tokens > 0 else sys.maxsize
        shards[-1].append(doc)
        room -= len(doc)
    for k, shard in enumerate(shards):
        write_shard(os.path.join(partial, f'{split}_{k:06d}.bin'), np.concatenate(shard), tok.hash)
    n_empty = sum(path in files[split] for path, line in empty)
    sizes = [f'{sum(map(len, shard)):,}' for shard in shards]
    print0(f'{split}: {len(docs):,} documents, {n_empty:,} empty ones skipped | {n_bytes:,} bytes | '
           f'{n_bytes / (used.sum() - len(docs)):.2f} bytes per token | {np.sum(used == 0):,} tokens never used | '
           f'{np.dtype(dtype).name} shards of ' + ', '.join(sizes[:5]) + ' ..' * (len(sizes) > 5) + ' tokens')

for number in (signal.SIGINT, signal.SIGTERM): # not in these milliseconds
    signal.signal(number, signal.SIG_IGN)
new = os.listdir(partial)
for name in sorted(os.listdir(data_dir)): # tokenizer.json goes first and comes back last: where it is, its shards are
    if regex.fullmatch(r'tokenizer\.json|(train|val)_\d{6}\.bin', name): # also of an older run with more shards
        os.remove(os.path.join(data_dir, name))
for name in sorted(new, reverse=True):
    os.replace(os.path.join(partial, name), os.path.join(data_dir, name))

largest = sorted(range(len(tokens)), key=lambda i: (-len(tokens[i]), i))[:10]
print0('largest tokens: ' + ' '.join(f"'{visible(tokens[i])}'" for i in largest))
for word in ('understanding', ' understanding', ' unhappily', ' 1234567', ' naïve', ' 🙂'):
    print0(f'{word:14} -> ' + '|'.join(visible(tok.bytes_of(i)) for i in tok.encode(word)))
print0(f'wrote {tokenizer_json} and {len(new) - 1} shards in {time.time() - t_start:.1f} s')
