"""
Turns text into numbers: learns a byte-level BPE tokenizer from our own documents, then encodes the documents with it.

    data_dir/train/*.jsonl.gz, val/*.jsonl.gz  ->  data_dir/tokenizer.json, train_000000.bin .., val_000000.bin ..

Byte pair encoding starts from the 256 bytes, so that no text is ever unknown. It looks for the pair of neighbours that
is most frequent in the corpus, makes it a new token, and repeats. Encoding applies the same merges in the same order.
bpe.py has the algorithm; here are the corpus, the processes and the files. The corpus is never in memory as a whole.

    python tokenizer.py config/tiny.py                             learn and encode: seconds on a laptop
    python tokenizer.py config/tiny.py --show=understanding        watch the merges of a word
    python tokenizer.py config/tiny.py --compare=true              bytes per token by kind of text, beside GPT-2
    python tokenizer.py config/tiny.py --export=out/toytown/hf     for Hugging Face's libraries and for tiktoken
    python tokenizer.py --data_dir=data/web --vocab_size=32768 --train_chars=2_000_000_000
    python tokenizer.py config/tiny.py config/midtrain.py          with another's tokenizer, conversations mixed in
"""
import atexit, base64, collections, concurrent.futures, gc, glob, itertools, json, multiprocessing, os, shutil, signal
import sys, time
import numpy as np
import regex # comes with tiktoken; unlike re it knows \p{L}, "any letter"
import tiktoken
from bpe import PATTERNS, show_merges, tokens_of, train_bpe, visible
from configurator import configure
from huggingface import tokenizer_files
from model import (SHARD_FORMS, SPECIAL_TOKENS, Tokenizer, atomic, check_settings, die, print0, read_jsonl, read_shard,
                   write_shard, write_texts)

# -----------------------------------------------------------------------------
# settings
data_dir = 'data/toytown'  # where prepare_data.py has put train/ and val/; tokenizer.json and the shards go there too
kind = 'bpe'               # bpe: learned here; char: every character of train/ is a token; gpt2: that of GPT-2
vocab_size = 4096          # of bpe: tokens in all, 256 bytes + merges + 6 special tokens
pattern = 'gpt4'           # of bpe: how text is split before merging: gpt4, gpt2 or a regular expression
use = ''                   # a tokenizer.json to encode with, instead of learning one: that of a model to go on with
conversations = 0          # how often chat_train.jsonl is mixed in, with the special tokens, as sft.py sees it
train_chars = 0            # learn from this many characters, an equal share of each file (0 = all)
max_chunks = 2_000_000     # distinct chunks kept while counting; of more, the rarest are forgotten
shard_tokens = 100_000_000 # tokens per .bin file, at most; a document is never cut (0 = one file)
processes = 0              # that count chunks; as many threads encode (0 = one per core)
seed = 1337                # order of the documents in the shards
show = ''                  # a text: show its merges step by step with the tokenizer in data_dir, then exit
compare = False            # show how well the tokenizer in data_dir packs which kind of text, then exit
export = ''                # a folder: write the tokenizer in data_dir there in the forms of other libraries, then exit
config = configure(globals())
# -----------------------------------------------------------------------------
# functions

EOT = SPECIAL_TOKENS[0] # <|endoftext|>
gc.disable() # millions of small objects, none in a circle: the collector would walk through them again and again

def clean(text):
    """Joins surrogate pairs; a lone half, which no UTF-8 can hold, becomes U+FFFD (tiktoken does the same)."""
    text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    # tiktoken's matcher overflows its stack on a run of a million blanks: runs of more than 10,000 are cut short
    long = any(text[i:i + 5000].isspace() for i in range(0, len(text), 5000))
    return regex.sub(r'(?<!\s)(\s{10000})\s++', r'\1', text) if long else text

def meter(what, total, unit, size=1):
    """-> a function to be told what is done: it prints rate and time left at every tenth and twice a minute."""
    start = last = time.time()
    tenth = 0
    def tell(done):
        nonlocal last, tenth
        now = time.time()
        if now > last + (1 if done * 10 // total > tenth else 30):
            last, tenth, rate = now, done * 10 // total, done / max(now - start, 1e-9)
            print0(f'{what} | {done / total:4.0%} | {rate / size:,.1f} {unit}/s | {(total - done) / rate:.0f} s left')
    return tell

def batches(what, files, n_chars=0):
    """Yields lists of documents, a million characters each; n_chars: of as many in all, an equal share of each file."""
    sizes, batch, size, before = [os.path.getsize(path) for path in files], [], 0, 0
    tell = meter(what, sum(sizes), 'MB of files', 1e6)
    for k, path in enumerate(files):
        room = (n_chars - seen[what, 'chars']) // (len(files) - k) if n_chars else sys.maxsize
        with open(path, 'rb') as raw:
            for line, row in read_jsonl(path, raw):
                text = row.get('text')
                if not isinstance(text, str):
                    die(f'{path}:{line}: no text in this document, expected {{"text": "..."}}')
                if not text or text.isspace():
                    seen[what, 'empty'] += 1
                    continue
                batch.append(text[:room])
                room, size = room - len(batch[-1]), size + len(batch[-1])
                seen[what, 'chars'] += len(batch[-1])
                if size > 10**6 or not room:
                    tell(before + raw.tell())
                    yield batch
                    batch, size = [], 0
                if not room:
                    break
        before += sizes[k]
    if batch:
        yield batch
    tell(before)

def in_parallel(pool, work, batches):
    """work(batch) of every batch, in order. Unlike pool.map it does not read the corpus ahead: two batches a worker."""
    waiting = collections.deque()
    for batch in batches:
        waiting.append(pool.submit(work, batch))
        if len(waiting) > 2 * workers:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()

def begin_worker(parent=os.getpid()): # the default is of the process that reads this line: the parent
    """Of a process that counts: Ctrl-C is for its parent; when that is killed, it leaves within a second."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, lambda *_: os.getppid() == parent or os._exit(1))
    signal.setitimer(signal.ITIMER_REAL, 1, 1)

def count_chunks(texts):
    """-> how often each chunk occurs in these documents."""
    chunks = collections.Counter()
    for text in texts:
        chunks.update(regex.findall(split_by, clean(text)))
    return chunks

def encode_documents(texts):
    """-> (ids of the documents, each after an <|endoftext|>; their bytes). One call for all: short ones are slow."""
    texts = [clean(text) for text in texts]
    plain = [text for text in texts if EOT not in text] # a text that spells it goes alone: it must not become one
    parts = [[tok.eot, *tok.encode(text)] for text in texts if EOT in text]
    if plain:
        parts.append(tok.enc.encode_to_numpy(EOT + EOT.join(plain), allowed_special={EOT}, disallowed_special=()))
    return np.concatenate(parts).astype(dtype), sum(len(text.encode()) for text in texts)

def encode_conversations(path):
    """Yields the same of the conversations of a file, a thousand at a time."""
    rows = read_jsonl(path)
    while part := list(itertools.islice(rows, 1000)):
        ids = []
        for line, row in part:
            try:
                ids += tok.render(row.get('messages'))[0]
            except ValueError as e:
                die(f'{path}:{line}: {e}')
        yield np.array(ids, dtype), sum(len(tok.bytes_of(i)) for i in ids)

def gpt2():
    """GPT-2's encoding, from tiktoken's cache or the network; RuntimeError if neither has it."""
    try:
        return tiktoken.get_encoding('gpt2')
    except Exception as e: # whatever requests, the disk or the check of the file raises
        raise RuntimeError(f"GPT-2's vocabulary is not at hand ({type(e).__name__}): once downloaded on a machine with "
                           'a network, the folder that TIKTOKEN_CACHE_DIR names holds it') from None

def print_largest(tok):
    largest = sorted(range(len(tok.tokens)), key=lambda i: (-len(tok.tokens[i]), i))[:10]
    print0('largest tokens: ' + ' '.join(f"'{visible(tok.tokens[i])}'" for i in largest))

# -----------------------------------------------------------------------------
# look at the tokenizer, or take it along

again = ' '.join(a for a in sys.argv[1:] if a.endswith('.py') or a.startswith('--data_dir=')) # for the hints below
tokenizer_json = os.path.join(data_dir, 'tokenizer.json')
sys.stdout.reconfigure(errors='backslashreplace') # what a terminal cannot show is shown by its number, without a crash
check_settings(config)
files = {split: sorted(glob.glob(f'{glob.escape(data_dir)}/{split}/*.jsonl.gz')) for split in ('train', 'val')}
shards = {split: sorted(glob.glob(f'{glob.escape(data_dir)}/{split}_*.bin')) for split in files}
seen = collections.Counter() # (what, 'chars' or 'empty'): how much has been read
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'config/samples.json'), encoding='utf-8') as f:
    samples = json.load(f) # kind of text: a text

if show:
    tok = Tokenizer.load(tokenizer_json)
    if tok.spec['kind'] == 'char':
        die('every token is one character: nothing is merged')
    ranks = {token: i for i, token in enumerate(tok.tokens)}
    for chunk in regex.findall(tok.spec['pattern'], clean(show)):
        show_merges(chunk.encode(), ranks, colour=sys.stdout.isatty() and 'NO_COLOR' not in os.environ)

if compare:
    tok, other = Tokenizer.load(tokenizer_json), None
    try:
        other = gpt2()
    except RuntimeError as e:
        print0(e)
    for path in files['val']:
        for _, row in read_jsonl(path):
            name, text = f"val: {row.get('source', 'documents')}", row.get('text')
            if isinstance(text, str) and len(samples.get(name, '')) < 10**5 and (name in samples or len(samples) < 50):
                samples[name] = samples.get(name, '') + clean(text) + '\n'
    print0(f'\n{"bytes per token":30} GPT-2   ours')
    for name, text in samples.items():
        ids, theirs = tok.encode(text), f'{len(text.encode()) / len(other.encode_ordinary(text)):.2f}' if other else '-'
        rate = sum(len(tok.bytes_of(i)) for i in ids) / max(1, len(ids)) # of char, without the characters it left out
        print0(f'{name[:28]:28} {theirs:>7} {rate:6.2f} ' + '█' * min(round(4 * rate), 60))
    print_largest(tok)
    used = np.zeros(tok.n_vocab, int)
    for path in shards['train']:
        for part in np.array_split(read_shard(path, tok.hash), 100): # bincount needs 8 bytes a token
            used += np.bincount(part, minlength=tok.n_vocab)
    unused = [token for token, n in zip(tok.tokens, used) if not n]
    print0(f'{len(unused):,} of {len(tok.tokens):,} tokens never occur in the training shards' + ', the largest: ' *
           bool(unused) + ' '.join(f"'{visible(token)}'" for token in sorted(unused, key=len)[:-11:-1]))

if export:
    tok = Tokenizer.load(tokenizer_json)
    if os.path.realpath(export) == os.path.realpath(data_dir):
        die(f'--export={export} is data_dir: its tokenizer.json would be overwritten; take another folder')
    try:
        forms = tokenizer_files(tok)
    except ValueError as e:
        die(f'{tokenizer_json} cannot be exported: {e}')
    if tok.spec['pattern'] not in PATTERNS.values() and tok.spec['kind'] == 'bpe':
        print0('a pattern of your own: other engines may split it in another way, compare the ids')
    write_texts(export, forms)
    for name in forms:
        print0(f'wrote {os.path.join(export, name)}')

if show or compare or export:
    sys.exit()

# -----------------------------------------------------------------------------
# learn the tokens

t_start = time.time()
partial = os.path.join(data_dir, 'tokenizer.partial')
shutil.rmtree(partial, ignore_errors=True) # of a run that was killed
spec = dict(version=1, kind=kind, pattern=PATTERNS.get(pattern, pattern), special_tokens=SPECIAL_TOKENS)
n_merges = vocab_size - 256 - len(SPECIAL_TOKENS)
if kind not in ('bpe', 'char', 'gpt2'):
    die(f"kind is 'bpe', 'char' or 'gpt2', not {kind!r}")
if kind == 'bpe' and n_merges < 1:
    die(f'vocab_size = {vocab_size} is too small: bytes, special tokens and one merge make {257 + len(SPECIAL_TOKENS)}')
try: # both engines must understand the pattern: `regex` counts the chunks here, tiktoken encodes with it later
    split_by = regex.compile(spec['pattern'] if kind == 'bpe' else r'[\s\S]')
    if split_by.groups:
        raise ValueError('write (?:...) instead of (...), which would return only the group')
    pieces = [piece.encode() for text in samples.values() for piece in split_by.findall(text)]
    if split_by.match('') or b'' in pieces:
        raise ValueError('it matches the empty text')
    words = dict.fromkeys([bytes([b]) for b in range(256)] + pieces) # where these are tokens, each piece becomes itself
    trial = tiktoken.Encoding('trial', pat_str=split_by.pattern, mergeable_ranks={w: i for i, w in enumerate(words)},
                              special_tokens={})
    theirs = [trial.decode_single_token_bytes(i) for text in samples.values() for i in trial.encode_ordinary(text)]
    if theirs != pieces:
        ours, theirs = next(((a, b) for a, b in zip(pieces, theirs) if a != b), (b'', b''))
        raise ValueError(f'`regex`, which learns, finds {visible(ours)!r} where tiktoken, which encodes, finds '
                         f'{visible(theirs)!r}')
except (regex.error, ValueError) as e:
    die(f'pattern = {pattern!r} is neither gpt4, gpt2 nor a regular expression: {e}')
heads = {path: np.fromfile(path, '<i4', 4).tolist() for found in shards.values() for path in found}
foreign = {path for path, head in heads.items() if head[:1] in ([magic] for magic in SHARD_FORMS) and head[3:] == [0]}
if foreign and kind != 'gpt2':
    die(f'{min(foreign)} was not made here, its tokens are those of GPT-2: add --kind=gpt2, or take another data_dir')
for split in files:
    if not files[split] and not foreign & set(shards[split]): # FineWeb's shards come without documents
        die(f'no documents {data_dir}/{split}/*.jsonl.gz: make them with `python prepare_data.py {again}`')

workers = processes or os.cpu_count() or 1
if use:
    known = Tokenizer.load(use)
    spec, tokens, kind = known.spec, known.tokens, known.spec['kind']
elif kind == 'gpt2':
    try:
        enc = gpt2()
    except RuntimeError as e:
        die(e)
    tokens, spec['pattern'] = [enc.decode_single_token_bytes(i) for i in range(50256)], enc._pat_str
    spec['n_vocab'] = 50304 # 50,256 + 6 tokens, padded to a multiple of 128: GPUs multiply such matrices faster
else:
    small = sum(map(os.path.getsize, files['train'])) < 10**6 # soon done: processes would only take time to start
    if workers == 1 or small or 'fork' not in multiprocessing.get_all_start_methods():
        pool = concurrent.futures.ThreadPoolExecutor(1)
    else:
        pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context('fork'), begin_worker)
    chunks, rare = collections.Counter(), 0
    with pool:
        for found in in_parallel(pool, count_chunks, batches('count', files['train'], train_chars)):
            chunks.update(found)
            while len(chunks) > max_chunks > 0 and kind == 'bpe':
                rare += 1
                chunks = collections.Counter({chunk: n for chunk, n in chunks.items() if n > rare})
    print0(f"{seen['count', 'chars']:,} characters in {chunks.total():,} chunks, {len(chunks):,} of them distinct")
    if rare:
        print0(f'more than max_chunks = {max_chunks:,}: {rare} times the rarest were forgotten, first those seen once')
    if kind == 'char':
        chars = sorted(chunks)
        tokens = [c.encode() for c in chars]
        spec['pattern'] = '[' + ''.join(c if c.isalnum() else f'\\U{ord(c):08x}' for c in chars) + ']'
    else:
        merges = train_bpe(chunks, n_merges, meter('learn', n_merges, 'merges'))
        tokens = tokens_of(merges)
        print0(f'256 bytes + {len(merges):,} merges + {len(SPECIAL_TOKENS)} special tokens | '
               f'{time.time() - t_start:.1f} s')
        if len(merges) < n_merges:
            print0(f'stopped early at {vocab_size - n_merges + len(merges):,} instead of {vocab_size:,}: no pair of '
                   'tokens occurs twice any more')
spec['ranks'] = [base64.b64encode(token).decode() for token in tokens]
tok = Tokenizer(spec)

# -----------------------------------------------------------------------------
# encode the documents, then put the new files in the place of the old

# Everything is written to a folder of its own first, so that a run that is stopped leaves the old files as they were.
atexit.register(shutil.rmtree, partial, ignore_errors=True)
with atomic(os.path.join(partial, 'tokenizer.json')) as tmp, open(tmp, 'w', encoding='utf-8') as f:
    json.dump(spec, f, indent=1)
dtype = np.uint16 if tok.n_vocab <= 2**16 else np.uint32

for split in files:
    if not files[split]:
        continue
    # First all tokens go into one file, in the order of the documents; then each shard takes its documents from there,
    # wherever they are. So any document can land in any shard, and no more than one shard is in memory.
    starts, used, n_bytes, n_tokens = [], np.zeros(tok.n_vocab, int), 0, 0 # used: how often each token occurs
    flat, t0 = os.path.join(partial, 'tokens'), time.time()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool, atomic(flat) as tmp, open(tmp, 'wb') as f:
        encoded = [in_parallel(pool, encode_documents, batches(f'encode {split}', files[split]))]
        chat = os.path.join(data_dir, f'chat_{split}.jsonl')
        if conversations and os.path.exists(chat):
            encoded += [encode_conversations(chat) for _ in range(conversations if split == 'train' else 1)]
        for ids, n in itertools.chain(*encoded):
            f.write(ids.data)
            starts.append(n_tokens + np.flatnonzero(ids == tok.eot))
            used += np.bincount(ids, minlength=tok.n_vocab)
            n_bytes, n_tokens = n_bytes + n, n_tokens + len(ids)
    if not starts:
        die(f'all documents in {data_dir}/{split} are empty: look at what `python prepare_data.py {again}` prints')
    lost = n_bytes - used @ [len(tok.bytes_of(i)) for i in range(tok.n_vocab)]
    if lost and kind == 'char':
        print0(f'{split}: {lost:,} bytes left out, of characters that {data_dir}/train does not have')
    elif lost:
        die(f'pattern = {pattern!r} loses text: it must match every character. A typo of gpt4? Else add |[\\s\\S]')

    starts = np.concatenate(starts)
    sizes = np.diff(starts, append=n_tokens)
    order = np.random.default_rng(seed).permutation(len(starts))
    ends, tokens, first, written = np.cumsum(sizes[order]), np.asarray(np.memmap(flat, dtype, 'r')), 0, []
    free = (path for k in range(10**6) if (path := f'{split}_{k:06d}.bin') not in map(os.path.basename, foreign))
    while first < len(order): # whole documents, as many in a shard as fit
        last = np.searchsorted(ends, (ends[first - 1] if first else 0) + (shard_tokens or n_tokens), 'right')
        last = max(last, first + 1)
        docs = order[first:last]
        ids = np.concatenate([tokens[i:i + n] for i, n in zip(starts[docs].tolist(), sizes[docs].tolist())])
        write_shard(os.path.join(partial, next(free)), ids, tok.hash)
        written.append(len(ids))
        first = last
    os.remove(flat)
    print0(f"{split}: {len(order):,} documents, {seen[f'encode {split}', 'empty']:,} empty ones skipped | "
           f'{n_bytes:,} bytes | {n_bytes / max(1, n_tokens - len(order)):.2f} bytes per token | '
           f'{np.sum(used == 0):,} tokens never used | {np.dtype(dtype).name} shards of '
           + ', '.join(f'{n:,}' for n in written[:5]) + ' ..' * (len(written) > 5)
           + f' tokens | {time.time() - t0:.2f} s')

for number in (signal.SIGINT, signal.SIGTERM): # not in these milliseconds
    signal.signal(number, signal.SIG_IGN)
new = os.listdir(partial)
for name in sorted(os.listdir(data_dir)): # tokenizer.json goes first and comes back last: where it is, its shards are
    if regex.fullmatch(r'tokenizer\.json|(train|val)_\d{6}\.bin', name) and os.path.join(data_dir, name) not in foreign:
        os.remove(os.path.join(data_dir, name)) # also of an older run with more shards
for name in sorted(new, reverse=True):
    os.replace(os.path.join(partial, name), os.path.join(data_dir, name))

print_largest(tok)
for word in ('understanding', ' understanding', ' unhappily', ' 1234567', ' naïve', ' 🙂'):
    print0(f'{word:14} -> ' + '|'.join(visible(tok.bytes_of(i)) for i in tok.encode(word)))
print0(f'wrote {tokenizer_json}, {tok.n_vocab:,} tokens, and {len(new) - 1} shards in {time.time() - t_start:.1f} s')
