"""
Byte pair encoding, all of it: split text into chunks, learn merges from the chunks, apply the merges, watch them.
It is the method of Sennrich et al. 2016, on bytes as in GPT-2 (Radford et al. 2019). tokenizer.py feeds it a corpus.

    chunks = collections.Counter(regex.findall(PATTERNS['gpt4'], 'low lower lowest'))
    tokens = tokens_of(train_bpe(chunks, 3))            the bytes, then b'lo', b'low', b' low'
    ranks = {token: i for i, token in enumerate(tokens)}
    [*merge(b' lower', ranks)][-1][0]                   [b' low', b'e', b'r']
"""
import heapq
import numpy as np

# Merges never cross the borders of these chunks: "dog." and "dog!" share the token "dog". \p{L} is a letter, \p{N} a
# digit, \s a blank; "++" is a "+" that gives nothing back.
PATTERNS = dict(
    gpt2=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s++$|\s+(?!\S)|\s",
    gpt4=r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s")

# The order of the 256 bytes, their ids, is that of GPT-2 and Hugging Face: those that print come first.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = bytes(PRINTABLE + [b for b in range(256) if b not in PRINTABLE])

EDGE, SIDE = -1, 2**24 # less and more than any id

def train_bpe(chunks, n_merges, tell=lambda done: None):
    """
    {chunk: how often it occurs} -> the merges, as pairs of ids. BYTES[i] has id i, merge number k makes id 256 + k.
    Tie rule: the highest count wins; of equal counts, the smallest pair of ids (the left one is compared first).
    Stops early when no pair occurs twice: such a token would save nothing.
    """
    # All chunks stand in one row of N tokens, an edge before, between and behind them. A merge writes the new token
    # over the left one of the pair and takes the right one out of the row, a linked list: left[i], i, right[i].
    words = [chunk.encode() for chunk in chunks]
    sizes = [1] + [len(word) + 1 for word in words]
    edges = np.cumsum(sizes) - 1
    row = (b'\0' + b'\0'.join(words) + b'\0').translate(bytes.maketrans(BYTES, bytes(range(256))))
    row = np.frombuffer(row, np.uint8).astype(np.int32)                                                  # (N,)
    times = np.repeat(np.fromiter([0, *chunks.values()], np.int64), sizes) # how often its chunk occurs    (N,)
    row[edges] = EDGE
    left, right = np.arange(-1, len(row) - 1, dtype=np.int32), np.arange(1, len(row) + 1, dtype=np.int32)
    count, where, heap = {}, {}, [] # a pair (a, b) is one number, a << 32 | b

    def groups(keys, places, weights):
        """Yields (key, its places in ascending order, the sum of their weights) of each different key."""
        order = keys.argsort(kind='stable')
        keys, places = keys[order], places[order]
        first = np.concatenate(([0], (keys[1:] != keys[:-1]).nonzero()[0] + 1))
        sums = np.add.reduceat(weights[order], first).tolist()
        for key, n, i, j in zip(keys[first].tolist(), sums, first.tolist(), [*first[1:].tolist(), len(keys)]):
            yield key, places[i:j], n

    inner = np.flatnonzero((row[:-1] != EDGE) & (row[1:] != EDGE))
    for key, places, n in groups(row[inner] * 256 + row[inner + 1], inner, times[inner]) if len(inner) else ():
        pair = key >> 8 << 32 | key & 255
        count[pair], where[pair] = n, places
        heap.append((-n, pair))
    heapq.heapify(heap)
    merges = []
    while len(merges) < n_merges and heap:
        n, pair = heap[0]
        if count[pair] != -n: # out of date, but only too high (a count rises only in the step that makes its pair)
            heapq.heapreplace(heap, (-count[pair], pair))
            continue
        if n > -2:
            break
        heapq.heappop(heap)
        a, b, new = pair >> 32, pair & 0xffffffff, 256 + len(merges)
        merges.append((a, b))
        at = where.pop(pair)
        at = at[(row[at] == a) & (row[right[at]] == b)]
        if a == b: # aaa holds aa twice, but they overlap: the first one is taken
            free, keep = -1, []
            for i in at.tolist():
                if i != free:
                    keep.append(i)
                    free = right[i]
            at = np.array(keep, np.int32)
        gone = right[at]
        row[at], row[gone] = new, EDGE
        right[at] = after = right[gone]
        left[after] = at
        before = left[at]
        neighbours = np.concatenate((row[before], row[after] + SIDE))
        for key, places, n in groups(neighbours, np.concatenate((before, at)), np.concatenate((times[at], times[at]))):
            if key in (EDGE, SIDE + EDGE, new): # new new is seen from its other side too
                continue
            if key < SIDE: # key a b -> key new
                old, now = key << 32 | a, key << 32 | new
            else: # a b key -> new key
                key -= SIDE
                old, now = b << 32 | (a if key == new else key), new << 32 | key
            if old in count:
                count[old] -= n
            if n > 1: # a pair that occurs once is never merged
                count[now], where[now] = n, places
                heapq.heappush(heap, (-n, now))
        tell(len(merges))
    return merges

def tokens_of(merges):
    """The bytes of every token that these merges make, by id."""
    tokens = [bytes([b]) for b in BYTES]
    for a, b in merges:
        tokens.append(tokens[a] + tokens[b])
    return tokens

def merge(chunk, ranks):
    """
    Encode the bytes of one chunk; ranks: {token: id}. Yields at the start and after every merge: pieces, number of the
    newest piece, and what may merge next as [(rank, number of the left piece)]. The last pieces are the tokens.
    tiktoken does the same in Rust, and is what the stages encode with.
    """
    pieces, newest = [bytes([b]) for b in chunk], -1
    while True:
        # The lowest rank goes first, the merge that was learned first; the leftmost one of equals.
        choices = sorted((ranks[a + b], i) for i, (a, b) in enumerate(zip(pieces, pieces[1:])) if a + b in ranks)
        yield pieces, newest, choices
        if not choices:
            return
        newest = choices[0][1]
        pieces = [*pieces[:newest], pieces[newest] + pieces[newest + 1], *pieces[newest + 2:]]

def visible(token):
    """b' caf\\xc3\\n' -> ' caf<c3><0a>': bytes that are no printable text of their own are shown in hex."""
    return ''.join(c if c.isprintable() else ''.join(f'<{b:02x}>' for b in c.encode('utf-8', 'surrogateescape'))
                   for c in token.decode('utf-8', 'surrogateescape'))

def show_merges(chunk, ranks, colour):
    """Print the merges of one chunk, step by step: the newest token on yellow, the others on two blues."""
    form = '\033[30;{}m{}\033[0m' if colour else '{1}'
    print(f"\n'{visible(chunk)}' is {len(chunk)} bytes")
    for pieces, newest, choices in merge(chunk, ranks):
        line = ('' if colour else '|').join(form.format(43 if i == newest else (46, 104)[i % 2], visible(piece))
                                            for i, piece in enumerate(pieces))
        print(f'rank {ranks[pieces[newest]]:6} |' if newest >= 0 else 'bytes       |', line)
        if choices:
            names = dict.fromkeys(f"{rank} '{visible(pieces[i] + pieces[i + 1])}'" for rank, i in choices)
            print('            | lowest rank:', ', not '.join([*names][:4]))
    print('ids         |', *(ranks[piece] for piece in pieces))
