"""
Which texts are copies of one another? MinHash (Broder 1997) with FineWeb's numbers (Penedo et al. 2024): 112 hashes of
the runs of five words, in 14 bands of 8. Two texts share a hash as often as their sets of runs overlap (Jaccard), and
those that share a band are compared. Share of copies found, and of others taken for copies: tests/bench/dedup.py.
"""
import functools, zlib

import numpy as np

FACTOR = np.uint64(0x9E3779B97F4A7C15) # odd

@functools.lru_cache(1)
def words_of(text):
    """The words of a text in small letters, without what stands before and after them."""
    return [word.strip('.,;:!?"\'()').lower() for word in text.split()]

def grams(words, n):
    """A hash of each run of n words. -> (len(words) - n + 1,) uint64"""
    hashes = mix(np.fromiter((zlib.crc32(word.encode('utf-8', 'replace')) for word in words), np.uint64, len(words)))
    runs = hashes[:max(0, len(words) - n + 1)]
    for k in range(1, n): # an odd factor: the order of the words counts
        runs = runs * FACTOR + hashes[k:k + len(runs)]
    return mix(runs)

def mix(x):
    """The last steps of MurmurHash3 (Appleby 2011), uint64 -> uint64: each bit of x moves all of the result."""
    for constant in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ x >> np.uint64(33)) * np.uint64(constant)
    return x ^ x >> np.uint64(33)

hash_a, hash_b = np.random.default_rng(0).integers(0, 2**32, (2, 112), np.uint32)
hash_a |= np.uint32(1) # odd: x -> a x + b mod 2**32 is one to one

def signature(text):
    """The smallest of its runs of five words by each of 112 hashes: two texts share one as often as they are alike."""
    words = words_of(text)[:100_000] # the start of a long book will do
    runs, smallest = grams(words + [''] * (5 - len(words)), 5).astype(np.uint32), np.full(112, 2**32 - 1, np.uint32)
    for i in range(0, len(runs), 256): # blocks that fit the cache
        np.minimum(smallest, (runs[i:i + 256, None] * hash_a + hash_b).min(0), out=smallest)
    return smallest

def near_duplicates(signatures, hashes, threshold=0.7):
    """
    signatures (n, 112) uint32, hashes (n,) uint64 of the whole texts -> (n,) int64: the kept text each is a copy of, or
    itself. As a star: who goes is like a text that stays, not only like one that went. So the order decides, and in a
    chain a ~ b ~ c, where c is not like a, b goes and c stays.
    """
    first = left = np.arange(len(signatures))
    stays = set() # those that somebody went for
    for _ in range(3): # again without those that went, who may have stood between two others
        pairs, shares = np.zeros(0, np.int64), np.zeros(len(left), bool)
        for band in range(15): # the last for exact copies
            keys = hashes[left] if band == 14 else np.zeros(len(left), np.uint64)
            for i in range(8 * band, min(112, 8 * band + 8)):
                keys = mix(keys + signatures[left, i])
            order = np.argsort(keys, kind='stable')
            same = np.append(False, keys[order[1:]] == keys[order[:-1]]) # as the one before
            later = np.flatnonzero(same)
            heads = np.maximum.accumulate(np.where(same, 0, np.arange(len(left))))[later] # the first of the equal ones
            shares[order[later]] = shares[order[heads]] = True
            both = left[order[later]] * len(signatures)
            pairs = np.unique(np.concatenate([pairs, both + left[order[heads]], both + left[order[later - 1]]]))
        first = first.copy()
        for part in np.split(pairs, range(4096, len(pairs), 4096)): # sorted by the later text, then the earlier one
            late, early = np.divmod(part, len(signatures))
            alike = (signatures[late] == signatures[early]).mean(1) >= threshold
            for i, j in zip(late[alike].tolist(), early[alike].tolist()):
                if first[j] == j and first[i] == i and i not in stays:
                    first[i] = j
                    stays.add(j)
        gone = first[left] != left
        left = left[shares & ~gone]
        if not gone.any():
            break
    return first
