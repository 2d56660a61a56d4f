"""
Learn a byte-level BPE tokenizer from our own documents, then encode the documents with it.

Byte pair encoding starts from the 256 bytes, so every text can be encoded. It looks for the pair of
neighbouring tokens that is most frequent in the corpus, makes it a new token, and repeats (Sennrich
et al. 2016; on bytes as in GPT-2, Radford et al. 2019). Encoding applies the merges in that order.

Reads   data_dir/train/*.jsonl.gz, val/*.jsonl.gz (documents), chat_{train,val}.jsonl if wanted
Writes  data_dir/tokenizer.json, token shards train_000000.bin .., val_*.bin, mid_{train,val}_*.bin

    python tokenizer.py config/tiny.py                         # learn and encode: seconds
    python tokenizer.py config/tiny.py --show=understanding    # watch the merges of a word
    python tokenizer.py config/tiny.py --compare=true          # bytes per token, next to GPT-2
    python tokenizer.py --data_dir=data/web --vocab_size=32768 --train_chars=2_000_000_000

It uses all cores of one machine and never holds the whole corpus in memory.
Left out: other ways to choose tokens (WordPiece, Unigram), BPE dropout, several machines.
"""
from configurator import configure # first, so that Ctrl-C gives no traceback while torch loads
import atexit, base64, collections, concurrent.futures, gc, glob, heapq, itertools, json
import multiprocessing, operator, os, shutil, signal, sys, threading, time

import numpy as np
import regex # comes with tiktoken; unlike re it knows \p{L}, "any letter"
import tiktoken

from model import (SHARD_FORMATS, SPECIAL_TOKENS, Tokenizer, clean, print0, read_jsonl, write_shard,
                   write_text)

# -----------------------------------------------------------------------------
# settings
data_dir = 'data/toytown'  # folder with train/ and val/ of prepare_data.py; results go there too
kind = 'bpe'               # bpe: learn merges; char: one token per character; gpt2: GPT-2's own
vocab_size = 4096          # bpe: number of tokens = 256 bytes + merges + 6 special tokens
pattern = 'gpt4'           # bpe: split text by this pattern: gpt4, gpt2 or a regular expression
use = ''                   # encode with this tokenizer.json (of a trained model), learn nothing
mid_chats = 0              # mid-training: chat_train.jsonl this many times, as sft.py renders it
mid_text = 0.1             # mid-training: and this share of the documents, so less is forgotten
train_chars = 0            # learn from this many characters, an equal share of each file (0 = all)
max_chunks = 2_000_000     # keep at most this many distinct words, forget the rarest (0 = all)
shard_tokens = 100_000_000 # max tokens in a .bin file; documents are never cut (0 = one file)
processes = 0              # processes that count, and threads that encode (0 = one per core)
seed = 1337                # order of the documents in the shards
show = ''                  # show the merges of this text with the tokenizer in data_dir, then exit
compare = False            # show how well the tokenizer in data_dir compresses texts, then exit
config = configure(globals())

# -----------------------------------------------------------------------------
# byte pair encoding: learn the merges

# Text is first split into chunks, roughly words, and merges stay inside a chunk: "dog." and "dog!"
# share the token "dog". \p{L} is a letter, \p{N} a digit, \s white space; "++" never backtracks.
PATTERNS = dict(
    gpt2=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s++$|\s+(?!\S)|\s",
    gpt4=r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s")

# The first 256 tokens are the bytes, in the order of GPT-2 and Hugging Face: printable ones first.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = bytes(PRINTABLE + [b for b in range(256) if b not in PRINTABLE]) # BYTES[i] is token i
BYTE_TO_ID = bytes.maketrans(BYTES, bytes(range(256)))

def train_bpe(chunks, n_merges):
    """
    Learn up to n_merges merges from {chunk: how often it occurs}. Returns pairs of token ids; merge
    number k makes token 256 + k. The most frequent pair is merged first; of equally frequent pairs,
    the one with the smallest ids. Stops when no pair occurs twice: its token would save nothing.
        train_bpe({'low': 5, 'lower': 2}, 2) -> [(l, o), (256, w)], with l, o, w the ids of bytes
    """
    # A word is a string in which the character chr(i) stands for token i. Then a pair is a string
    # of two characters, strings are sorted by ids, and str.split and str.join do a merge.
    words = []
    for chunk in chunks:
        ids = chunk.encode().translate(BYTE_TO_ID)
        words.append(ids.decode('latin-1')) # byte i becomes chr(i)
    freqs = list(chunks.values())

    counts = collections.defaultdict(int) # pair -> how often it occurs in the corpus
    where = collections.defaultdict(list) # pair -> indices of the words that may contain it
    for i, word in enumerate(words):
        for pair in map(operator.add, word, word[1:]): # all neighbours: 'abc' -> 'ab', 'bc'
            counts[pair] += freqs[i]
            where[pair].append(i)

    # heapq keeps the smallest item in front, so counts are negative in the heap.
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)

    merges = []
    while heap and len(merges) < n_merges:
        count, pair = heapq.heappop(heap)
        count = -count
        if count != counts[pair]: # out of date: other merges have used up some of these pairs
            heapq.heappush(heap, (-counts[pair], pair))
            continue
        if count < 2:
            break
        left, right = pair
        new = chr(256 + len(merges))
        merges.append((ord(left), ord(right)))

        # Merge the pair in every word. Only its neighbours change: "x left right y" -> "x new y".
        new_counts = collections.defaultdict(int)
        for i in set(where.pop(pair)): # a word is listed for each of its pairs
            parts = words[i].split(pair) # from left to right: 'aaab' -> '', 'ab'
            words[i] = new.join(parts)

            replaced = [] # (old pair, new pair)
            for k in range(1, len(parts)): # a new token stands between parts[k - 1] and parts[k]
                before = parts[k - 1]
                after = parts[k]
                if before:
                    replaced.append((before[-1] + left, before[-1] + new))
                elif k > 1: # "left right left right" -> "new new"
                    replaced.append((right + left, new + new))
                if after:
                    replaced.append((right + after[0], new + after[0]))

            for old_pair, new_pair in replaced:
                counts[old_pair] -= freqs[i]
                new_counts[new_pair] += freqs[i]
                where[new_pair].append(i)

        counts.update(new_counts)
        for new_pair, count in new_counts.items():
            heapq.heappush(heap, (-count, new_pair))
        if len(merges) % 5000 == 0:
            print0(f'{len(merges):,} of {n_merges:,} merges')
    return merges

def merges_to_tokens(merges):
    """Pairs of ids -> the bytes of every token: the 256 bytes, then one token per merge."""
    tokens = [bytes([b]) for b in BYTES]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return tokens

# -----------------------------------------------------------------------------
# byte pair encoding: apply the merges, step by step (tiktoken does the same in Rust)

def merge_steps(chunk, ranks):
    """
    Encode the bytes of a chunk with ranks, {token: id}. Yields at the start and after each merge:
    pieces    the bytes in their current tokens: [l, o, w], then [lo, w], then [low]
    newest    index of the piece that was made last, None at the start
    choices   sorted (rank, index of the left piece) of all merges that are possible now
    """
    pieces = [bytes([b]) for b in chunk]
    newest = None
    while True:
        choices = []
        for i in range(len(pieces) - 1):
            rank = ranks.get(pieces[i] + pieces[i + 1])
            if rank is not None:
                choices.append((rank, i))
        choices.sort()
        yield pieces, newest, choices
        if not choices:
            return
        # The lowest rank is merged first, as it was learned first; of equal ranks, the leftmost.
        newest = choices[0][1]
        merged = pieces[newest] + pieces[newest + 1]
        pieces = pieces[:newest] + [merged] + pieces[newest + 2:]

def printable(token):
    """Bytes -> text that is safe to print. Other characters are escaped, as repr() does it."""
    text = token.decode('utf-8', 'backslashreplace')
    return ''.join(char if char.isprintable() else repr(char)[1:-1] for char in text)

def show_merges(chunk, ranks, color):
    """Print the merges of a chunk, a line each: newest token on yellow, others on two blues."""
    print(f"\n'{printable(chunk)}' is {len(chunk)} bytes")
    for pieces, newest, choices in merge_steps(chunk, ranks):
        label = 'bytes' if newest is None else f'rank {ranks[pieces[newest]]:6}'
        texts = [printable(piece) for piece in pieces]
        if color:
            for i in range(len(texts)):
                background = 43 if i == newest else (46, 104)[i % 2] # codes of yellow, two blues
                texts[i] = f'\033[30;{background}m{texts[i]}\033[0m'
        print(f'{label:11} |', ('' if color else '|').join(texts))
        names = {rank: f"{rank} '{printable(pieces[i] + pieces[i + 1])}'" for rank, i in choices}
        if names:
            print('            | lowest rank:', ', not '.join(list(names.values())[:4]))
    print('ids         |', *(ranks[piece] for piece in pieces))

# -----------------------------------------------------------------------------
# documents: read, count and encode them in parallel
EOT = SPECIAL_TOKENS[0] # <|endoftext|>

def read_batches(what, files, stats, max_chars=0):
    """
    Yield the documents of the files as lists of texts, about a million characters each.
    max_chars: stop after this many characters, an equal share of each file (0 = read all).
    stats: a Counter, in which 'chars', 'documents', 'empty' count those read and those skipped.
    """
    total = sum(os.path.getsize(path) for path in files)
    done = 0
    start = last_print = time.time()
    batch = []
    batch_chars = 0
    for k, path in enumerate(files):
        room = (max_chars - stats['chars']) // (len(files) - k) if max_chars else sys.maxsize
        for line, row in read_jsonl(path):
            if room <= 0:
                break
            text = row.get('text')
            assert isinstance(text, str), f'{path}:{line}: no text, a document is {{"text": "..."}}'
            if not text or text.isspace():
                stats['empty'] += 1
                continue
            text = text[:room]
            batch.append(text)
            room -= len(text)
            batch_chars += len(text)
            stats['chars'] += len(text)
            stats['documents'] += 1
            if batch_chars > 1_000_000:
                yield batch
                batch = []
                batch_chars = 0

        done += os.path.getsize(path)
        now = time.time()
        if now > last_print + 10:
            last_print = now
            rate = done / (now - start)
            left = (total - done) / rate
            print0(f'{what} | {done / total:4.0%} | {rate / 1e6:.1f} MB/s | {left:.0f} s left')
    folder = os.path.dirname(files[0])
    assert stats['chars'], f'all documents in {folder} are empty: look at `{prepare_command}`'
    if batch:
        yield batch

def map_in_order(pool, function, batches):
    """Like pool.map, which would read the whole corpus ahead; this reads two batches per worker."""
    waiting = collections.deque()
    for batch in batches:
        waiting.append(pool.submit(function, batch))
        if len(waiting) > 2 * n_workers:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()

def init_worker():
    """Start of a counting process: leave Ctrl-C to the parent, and exit when the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    def exit_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=exit_with_parent, daemon=True).start()

def count_chunks(texts):
    """List of texts -> Counter of their chunks."""
    chunks = []
    for text in texts:
        chunks += split_pattern.findall(clean(text))
    return collections.Counter(chunks)

def encode_documents(texts):
    """List of texts -> ids of all, each document after an <|endoftext|>; number of bytes."""
    texts = [clean(text) for text in texts]
    n_bytes = sum(len(text.encode()) for text in texts)
    # One call for all documents is twice as fast as one for each. Only a document that spells
    # <|endoftext|> itself is encoded alone: there it must not become the special token.
    plain = [text for text in texts if EOT not in text]
    parts = [[tok.eot] + tok.encode(text) for text in texts if EOT in text]
    if plain:
        joined = EOT + EOT.join(plain)
        parts.append(tok.enc.encode_to_numpy(joined, allowed_special={EOT}, disallowed_special=()))
    return np.concatenate(parts).astype(dtype), n_bytes

def encode_conversations(path):
    """Yield (ids, number of bytes) of each conversation of a file."""
    for line, row in read_jsonl(path):
        try:
            ids, _ = tok.render(row.get('messages'))
        except ValueError as e:
            raise AssertionError(f'{path}:{line}: {e}') from None
        yield np.array(ids, dtype), sum(len(tok.token_bytes(i)) for i in ids)

def load_gpt2():
    """GPT-2's encoding, from tiktoken's cache or from the network."""
    try:
        return tiktoken.get_encoding('gpt2')
    except Exception as e: # the network, the disk and the checksum raise different ones
        raise AssertionError(f"cannot load GPT-2's vocabulary ({type(e).__name__}): set TIKTOKEN_"
                             'CACHE_DIR to the cache of a machine that has downloaded it') from None

# -----------------------------------------------------------------------------
# files: what is in data_dir, and how new files take the place of old ones
tokenizer_json = os.path.join(data_dir, 'tokenizer.json')
partial = os.path.join(data_dir, 'tokenizer.partial') # 1. new files are written here
ready = os.path.join(data_dir, 'tokenizer.ready')     # 2. all are whole; old files are deleted
moving = os.path.join(data_dir, 'tokenizer.moving')   # 3. new files are moved to data_dir

def find(pattern):
    return sorted(glob.glob(os.path.join(glob.escape(data_dir), pattern)))

def is_foreign(path):
    """Was this shard published by others? Those of FineWeb, in GPT-2's tokens, have no hash."""
    header = np.fromfile(path, '<i4', 4).tolist()
    return len(header) == 4 and header[0] in SHARD_FORMATS and header[3] == 0

def finish_swap():
    """
    Put the new files in the place of the old ones. The folder's name says how far we are, so a run
    that was killed here is completed by the next one. tokenizer.json is deleted first and moved
    last: without it no other stage starts on half of the shards.
    """
    if os.path.isdir(ready):
        own = find('tokenizer.json') + find('mid_*_??????.bin')
        for path in own + find('train_??????.bin') + find('val_??????.bin'):
            if not is_foreign(path):
                os.remove(path)
        os.rename(ready, moving)
    if os.path.isdir(moving):
        for name in sorted(os.listdir(moving), key=lambda name: name == 'tokenizer.json'):
            os.replace(os.path.join(moving, name), os.path.join(data_dir, name))
        os.rmdir(moving)

finish_swap()
documents = {split: find(f'{split}/*.jsonl.gz') for split in ('train', 'val')}
samples_json = os.path.join(os.path.dirname(__file__), 'config', 'samples.json')
with open(samples_json, encoding='utf-8') as f:
    samples = json.load(f) # kind of text -> a short text

# -----------------------------------------------------------------------------
# --show, --compare: look at the tokenizer in data_dir
if show:
    tok = Tokenizer.load(tokenizer_json)
    assert tok.spec['kind'] != 'char', '--show: every token is one character, nothing is merged'
    ranks = {token: i for i, token in enumerate(tok.tokens)}
    color = sys.stdout.isatty() and 'NO_COLOR' not in os.environ
    for chunk in regex.findall(tok.spec['pattern'], clean(show)):
        show_merges(chunk.encode(), ranks, color)
    sys.exit()

if compare:
    tok = Tokenizer.load(tokenizer_json)
    try:
        gpt2 = load_gpt2()
    except AssertionError as e:
        print0(e)
        gpt2 = None

    for path in documents['val'][:30]: # add 100 documents of each file to the samples
        for _, row in itertools.islice(read_jsonl(path), 100):
            name = f"val: {row.get('source', 'documents')}"
            samples[name] = samples.get(name, '') + clean(str(row.get('text'))) + '\n'

    print0(f'\n{"bytes per token":30} GPT-2   ours')
    for name, text in samples.items():
        theirs = '-'
        if gpt2:
            theirs = f'{len(text.encode()) / max(1, len(gpt2.encode_ordinary(text))):.2f}'
        ids = tok.encode(text)
        n_bytes = sum(len(tok.token_bytes(i)) for i in ids) # char has no token for a new character
        ours = n_bytes / max(1, len(ids))
        bar = '█' * min(round(4 * ours), 60)
        print0(f'{name[:28]:28} {theirs:>7} {ours:6.2f} {bar}')
    sys.exit()

# -----------------------------------------------------------------------------
# check the settings
assert kind in ('bpe', 'char', 'gpt2'), f"kind must be 'bpe', 'char' or 'gpt2', not {kind!r}"
split_pattern = regex.compile(r'[\s\S]') # of kind = 'char'
for name in ('mid_chats', 'train_chars', 'max_chunks', 'shard_tokens', 'processes', 'seed'):
    assert config[name] >= 0, f'{name} must not be negative, as {config[name]} is'
n_merges = vocab_size - 256 - len(SPECIAL_TOKENS)
if kind == 'bpe':
    assert 263 <= vocab_size <= 10**6, f'vocab_size must be 263 to 1,000,000, not {vocab_size:,}'

    # Two regex engines read the pattern: regex counts the chunks here, tiktoken encodes with it
    # later. Both must accept it and keep every character.
    sample = '\n'.join(samples.values())
    bytes_only = {bytes([b]): b for b in range(256)}
    try:
        split_pattern = regex.compile(PATTERNS.get(pattern, pattern))
        trial = tiktoken.Encoding('trial', pat_str=split_pattern.pattern,
                                  mergeable_ranks=bytes_only, special_tokens={})
        assert split_pattern.groups == 0, 'write (?:...) instead of (...)'
        chunks = split_pattern.findall(sample)
        assert '' not in chunks, 'it matches the empty text'
        kept = [''.join(chunks), trial.decode(trial.encode_ordinary(sample))]
        assert kept == [sample, sample], 'it must match every character, add |[\\s\\S] at the end'
    except (AssertionError, ValueError, regex.error) as e:
        raise AssertionError(f'pattern {pattern!r} is not gpt4, gpt2 or a good one: {e}') from None

foreign = [path for path in find('train_??????.bin') + find('val_??????.bin') if is_foreign(path)]
assert not foreign or kind == 'gpt2', f"{foreign[0]} has GPT-2's tokens: add --kind=gpt2"
profiles = [word for word in sys.argv[1:] if word.endswith('.py') or word.startswith('--data_dir=')]
prepare_command = ' '.join(['python prepare_data.py'] + profiles)
for split in documents:
    assert documents[split] or (foreign and not mid_chats), \
        f'no documents {data_dir}/{split}/*.jsonl.gz: make them with `{prepare_command}`'
    assert not mid_chats or find(f'chat_{split}.jsonl'), \
        f'mid_chats={mid_chats} needs {data_dir}/chat_{split}.jsonl: `{prepare_command}` makes it'

# -----------------------------------------------------------------------------
# learn the tokens
t_start = time.time()
gc.disable() # it walks through millions of small objects, and finds no cycle among them
n_workers = processes or os.cpu_count() or 1
spec = dict(version=1, kind=kind, pattern=split_pattern.pattern, special_tokens=SPECIAL_TOKENS)

if use:
    spec = Tokenizer.load(use).spec
    kind = spec['kind']
elif kind == 'gpt2':
    gpt2 = load_gpt2()
    tokens = [gpt2.decode_single_token_bytes(i) for i in range(50256)]
    spec['pattern'] = gpt2._pat_str
    spec['n_vocab'] = 50304 # 50,256 + 6 tokens, padded to a multiple of 128: faster on GPUs
else:
    pool = concurrent.futures.ThreadPoolExecutor(1)
    if n_workers > 1 and 'fork' in multiprocessing.get_all_start_methods():
        # Processes, since only one thread runs Python at a time. Forked ones have split_pattern.
        fork = multiprocessing.get_context('fork')
        pool = concurrent.futures.ProcessPoolExecutor(n_workers, fork, init_worker)

    chunks = collections.Counter()
    stats = collections.Counter()
    rare = 0 # chunks that occur this often or less are forgotten
    with pool:
        batches = read_batches('count', documents['train'], stats, train_chars)
        for batch_chunks in map_in_order(pool, count_chunks, batches):
            chunks.update(batch_chunks)
            while kind == 'bpe' and len(chunks) > max_chunks > 0:
                rare += 1
                chunks = collections.Counter({c: n for c, n in chunks.items() if n > rare})
    print0(f"{stats['chars']:,} characters in {chunks.total():,} chunks, {len(chunks):,} distinct")
    if rare:
        print0(f'more than max_chunks = {max_chunks:,}: the rarest were forgotten {rare} times')

    if kind == 'char':
        tokens = [char.encode() for char in sorted(chunks)]
        # This pattern skips all other characters. Escape those that mean something inside [...].
        escaped = [c if c.isalnum() else f'\\U{ord(c):08x}' for c in sorted(chunks)]
        spec['pattern'] = '[' + ''.join(escaped) + ']'
    else:
        merges = train_bpe(chunks, n_merges)
        tokens = merges_to_tokens(merges)
        seconds = time.time() - t_start
        print0(f'256 bytes, {len(merges):,} merges, 6 special tokens | {seconds:.2f} s')
        if len(merges) < n_merges:
            print0(f'stopped before {n_merges:,} merges: no pair of tokens occurs twice any more')

if not use:
    spec['ranks'] = [base64.b64encode(token).decode() for token in tokens]
tok = Tokenizer(spec)

# -----------------------------------------------------------------------------
# encode the documents
# All is written to `partial` first: a run that stops before the swap leaves the old files alone.
shutil.rmtree(partial, ignore_errors=True) # of a run that was killed
atexit.register(shutil.rmtree, partial, ignore_errors=True)
os.makedirs(partial)
write_text(os.path.join(partial, 'tokenizer.json'), json.dumps(spec, indent=1))
dtype = np.uint16 if tok.n_vocab <= 2**16 else np.uint32
token_sizes = np.array([len(tok.token_bytes(i)) for i in range(tok.n_vocab)])

def write_shards(prefix, order):
    """Write the documents with these numbers, in this order, to PREFIX_000000.bin .."""
    # Any document can land in any shard, and only one shard at a time is in memory.
    ends = np.cumsum(sizes[order])
    names = (f'{prefix}_{k:06d}.bin' for k in itertools.count())
    free_names = (name for name in names if os.path.join(data_dir, name) not in foreign)
    first = 0
    while first < len(order):
        # documents first .. last - 1: as many as fit, at least one
        limit = ends[first] - sizes[order[first]] + (shard_tokens or ends[-1])
        last = max(first + 1, np.searchsorted(ends, limit, 'right'))
        ids = np.concatenate([flat[starts[i]:starts[i] + sizes[i]] for i in order[first:last]])
        write_shard(os.path.join(partial, next(free_names)), ids, tok.hash)
        first = last

for split in documents:
    if not documents[split]:
        continue

    # First write all tokens to one file, in the order of the documents.
    stats = collections.Counter()
    starts = [] # where each document starts
    n_bytes = 0
    n_lost = 0  # bytes that are not in any token
    n_tokens = 0
    flat_path = os.path.join(partial, 'flat')
    with concurrent.futures.ThreadPoolExecutor(n_workers) as pool, open(flat_path, 'wb') as f:
        batches = read_batches(f'encode {split}', documents[split], stats)
        sources = [map_in_order(pool, encode_documents, batches)] # tiktoken frees the GIL
        if mid_chats: # the conversations follow, each one once
            sources.append(encode_conversations(f'{data_dir}/chat_{split}.jsonl'))
        for ids, size in itertools.chain(*sources):
            f.write(ids.data)
            starts.append(n_tokens + np.flatnonzero(ids == tok.eot))
            n_bytes += size
            n_lost += size - token_sizes[ids].sum()
            n_tokens += len(ids)

    # Lost are characters that are not in the vocabulary of char, or that the pattern skips.
    assert kind == 'char' or n_lost == 0, \
        f'pattern = {pattern!r} loses {n_lost:,} bytes: add |[\\s\\S] at the end'

    # Then shuffle the documents and write the shards.
    starts = np.concatenate(starts)
    sizes = np.diff(starts, append=n_tokens)
    flat = np.asarray(np.memmap(flat_path, dtype, 'r'))
    rng = np.random.default_rng(seed)
    order = rng.permutation(stats['documents'])
    write_shards(split, order)
    if mid_chats:
        replay = order[np.cumsum(sizes[order]) <= mid_text * sizes[order].sum()]
        chats = np.arange(len(order), len(starts)).repeat(mid_chats)
        write_shards(f'mid_{split}', rng.permutation(np.append(replay, chats)))
    os.remove(flat_path)

    bytes_per_token = n_bytes / max(1, n_tokens - len(starts))
    print0(f"{split}: {len(starts):,} documents, {stats['empty']:,} empty ones skipped | "
           f'{n_bytes:,} bytes, {n_lost:,} lost | {n_tokens:,} tokens, {np.dtype(dtype).name} | '
           f'{bytes_per_token:.2f} bytes per token')

# -----------------------------------------------------------------------------
# put the new files in the place of the old ones
os.rename(partial, ready)
finish_swap()
longest = sorted(tok.tokens, key=len, reverse=True)[:10]
print0('longest tokens: ' + ' '.join(f"'{printable(token)}'" for token in longest))
seconds = time.time() - t_start
print0(f'wrote {tokenizer_json} ({tok.n_vocab:,} tokens) and the shards in {seconds:.1f} s')
