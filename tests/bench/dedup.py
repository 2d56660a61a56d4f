"""
Duplicates: pairs of texts with a known Jaccard similarity J of their sets of 5-grams; which of them are found?
Beside them 1 - (1 - J^8)^14, the chance that one of 14 bands of 8 hashes is the same, and datasketch's MinHashLSH.

$ python tests/bench/dedup.py [--pairs=2000] [--million] [--peer]
"""
import os, random, sys, time, tracemalloc
import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from conftest import definitions

ours = definitions('prepare_data.py')
near_duplicates, minhash = ours.near_duplicates, ours.minhash

PAIRS = int(next((a[8:] for a in sys.argv if a.startswith('--pairs=')), 2000))
rng = random.Random(0)
VOCABULARY = [
    ''.join(rng.choice('abcdefghijklmnopqrstuvwxyz') for _ in range(rng.randrange(2, 9))) for _ in range(20_000)
]
grams = lambda words: {tuple(words[i:i + 5]) for i in range(len(words) - 4)}

def pair(low, high):
    """Two texts and the true J of them: words are replaced, runs are cut out or the end is another, until J fits."""
    while True:
        a = rng.choices(VOCABULARY, k=rng.randrange(150, 500))
        b, want, way = list(a), rng.uniform(low, high), rng.randrange(3)
        n = round(len(a) * 2 * want / (1 + want)) # the shared ones
        if way == 0: # another end
            b[n:] = rng.choices(VOCABULARY, k=len(a) - n)
        elif way == 1: # words here and there: each costs up to five grams
            for _ in range(round(len(a) * (1 - want) / (1 + want) / 5) + 1):
                b[rng.randrange(len(b))] = rng.choice(VOCABULARY)
            if want < 0.6:
                for i in rng.sample(range(len(b)), len(b) // 9):
                    b[i] = rng.choice(VOCABULARY)
        else: # a part was cut out
            b = b[:round(len(b) * want)]
        x, y = grams(a), grams(b)
        if low <= (j := len(x & y) / len(x | y)) < high:
            return ' '.join(a), ' '.join(b), j

ranges = [(0.3, 0.5), (0.5, 0.7), (0.7, 0.75), (0.75, 0.85), (0.85, 0.99999)]
planted = [(k, *pair(*limits)) for k, limits in enumerate(ranges) for _ in range(PAIRS)]
texts, kinds, js = [t for _, a, b, _ in planted
                    for t in (a, b)], np.array([k for k, *_ in planted]), np.array([j for *_, j in planted])
size = sum(map(len, texts)) / 1e6
start = time.process_time()
signatures = np.array([minhash(text) for text in texts])
seconds = time.process_time() - start
print(
    f'minhash: {len(texts):,} texts, {size:.1f} MB, {size / seconds:.1f} MB/s, {len(texts) / seconds:,.0f} texts/s')
error = (signatures[::2] == signatures[1::2]).mean(1) - js
for k, (low, high) in enumerate(ranges):
    e, j = error[kinds == k], js[kinds == k]
    print(
        f'  J {low:.2f}-{high:.2f}: share of equal hashes - J'
        f': mean {e.mean():+.5f} (standard error {e.std() / len(e)**0.5:.5f}), '
        f'sd {e.std():.4f}, theory {np.sqrt(np.mean(j * (1 - j) / 112)):.4f}')
start = time.process_time()
first = near_duplicates(signatures)
print(f'near_duplicates: {len(texts) / (time.process_time() - start):,.0f} texts/s')
ours = first[1::2] == np.arange(0, len(texts), 2)
stray = (first[::2] != np.arange(0, len(texts), 2)) | ~ours & (first[1::2] != np.arange(1, len(texts), 2))
theirs = None
if '--peer' in sys.argv:
    from datasketch import MinHash, MinHashLSH
    start, lsh, theirs, checked = time.process_time(), MinHashLSH(num_perm=112, params=(14, 8)), [], []
    for i, text in enumerate(texts):
        words = text.split()
        m = MinHash(num_perm=112)
        m.update_batch([' '.join(words[k:k + 5]).encode() for k in range(len(words) - 4)])
        if i % 2:
            theirs.append(str(i - 1) in lsh.query(m))
            checked.append(theirs[-1] and last.jaccard(m) >= 0.7)
        else:
            lsh.insert(str(i), m)
            last = m
    seconds = time.process_time() - start
    print(f'datasketch: {size / seconds:.2f} MB/s, {len(texts) / seconds:,.0f} texts/s for hashing and look-up')
for k, (low, high) in enumerate(ranges):
    of = kinds == k
    peer = (f', datasketch {np.mean(np.array(theirs)[of]):.4f}, with its '
                f'estimate >= 0.7 {np.mean(np.array(checked)[of]):.4f}') if theirs else ''
    print(
        f'  J {low:.2f}-{high:.2f}: {of.sum():,} pairs, found {ours[of].mean():.4f}'
        f', strangers taken for copies {stray[of].mean():.4f}, '
        f'theory of a shared band {np.mean(1 - (1 - js[of]**8)**14):.4f}{peer}')

# a chain: each text shares J = 0.8 with the next one, less with those further on
words = rng.choices(VOCABULARY, k=4000)
chain = np.array([minhash(' '.join(words[33 * i:33 * i + 300])) for i in range(100)])
to = near_duplicates(chain)
kept = to == np.arange(100)
sets = [grams(words[33 * i:33 * i + 300]) for i in range(100)]
j_of = lambda i, j: len(sets[i] & sets[j]) / len(sets[i] | sets[j])
print(
    f'a chain of 100 texts, J = {j_of(0, 1):.2f} from one to the next'
    f': {kept.sum()} stay, {sum(j_of(i, t) < 0.5 for i, t in enumerate(to))} '
    f'go that have J < 0.5 with what stays'
    f'; by union-find 1 stays, and {sum(j_of(i, 0) < 0.5 for i in range(100))} such go'
)

if '--million' in sys.argv: # 1 million: 5% exact copies, 10% near ones with 10% of the hashes others
    n, g = 1_000_000, np.random.default_rng(0)
    signatures = g.integers(0, 2**32, (n, 112), np.uint32)
    copies = g.permutation(n)[:150_000]
    copies = copies[(copies > 1) & ~np.isin(copies // 2, copies)] # of originals only
    signatures[copies] = signatures[copies // 2]
    other = np.flatnonzero(np.arange(len(copies)) % 3 > 0)
    for i in np.array_split(copies[other], 20):
        signatures[i] = np.where(
            g.random((len(i), 112)) < 0.1, g.integers(0, 2**32, (len(i), 112), np.uint32), signatures[i])
    start = time.process_time()
    first = near_duplicates(signatures)
    seconds = time.process_time() - start
    tracemalloc.start() # in a run of its own: it takes time
    near_duplicates(signatures)
    peak = tracemalloc.get_traced_memory()[1]
    print(
        f'1,000,000 signatures ({signatures.nbytes / 1e6:.0f} MB): {seconds:.1f} s'
        f', at most {peak / n:.0f} bytes a text '
        f'beyond them; {(first != np.arange(n)).mean():.2%} go of {len(copies) / n:.2%} planted')
