"""dedup.py: hashes estimate the Jaccard similarity; the first of each cluster stays."""

import random, sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dedup import near_duplicates, signature

rng = random.Random(0)
words = lambda n: [f'w{rng.randrange(10**6)}' for _ in range(n)]
ids = lambda n: np.arange(n, dtype=np.uint64)


def test_share_of_equal_hashes_is_the_jaccard_similarity():
    errors = []
    for _ in range(200):  # 96 of 2 * 196 - 96 = 296 runs are shared
        a = words(200)
        errors.append((signature(' '.join(a)) == signature(' '.join(a[:100] + words(100)))).mean() - 96 / 296)
    sd = (96 / 296 * 200 / 296 / 112) ** 0.5
    assert abs(np.mean(errors)) < 4 * sd / 200**0.5 and 0.8 * sd < np.std(errors) < 1.2 * sd


def test_signature_is_of_words_in_their_order():
    a = words(50)
    base = signature(' '.join(a))
    assert base.shape == (112,) and base.dtype == np.uint32
    assert (signature('  ' + ', '.join(a).upper() + '!') == base).all()  # neither case nor punctuation
    assert (signature(' '.join(a * 3)) == base).mean() > 0.6 and (signature(' '.join(a[::-1])) == base).sum() == 0
    assert signature('').shape == signature('\ud800 one').shape == (112,)
    assert (signature('one two') != signature('two one')).any() and (signature('one') == signature('One.')).all()


def signatures(*changed):
    """Rows that differ from the first one in so many of the 112 hashes, from the left."""
    rows = np.tile(np.arange(112, dtype=np.uint32), (len(changed), 1))
    for i, n in enumerate(changed):
        rows[i, :n] += np.uint32(1000 * (i + 1))
    return rows


def test_threshold_and_the_first_stays():
    s = signatures(0, 33, 34, 112, 0)  # 79 of 112 are 0.705, 78 are 0.696
    assert near_duplicates(s, ids(5)).tolist() == [0, 0, 2, 3, 0]
    assert near_duplicates(s, ids(5), 0.5).tolist() == [0, 0, 0, 3, 0]
    assert near_duplicates(s[::-1], ids(5)).tolist() == [0, 1, 2, 0, 0]
    assert near_duplicates(s[:0], ids(0)).tolist() == [] and near_duplicates(s[:1], ids(1)).tolist() == [0]


def test_a_chain_is_cut_where_the_ends_differ():
    s = np.tile(np.arange(112, dtype=np.uint32), (4, 1))
    for i in range(1, 4):  # each differs from the one before in 24 more, so from the one before that in 48: too many
        s[i:, 24 * (i - 1) : 24 * i] += np.uint32(1000 * i)
    assert near_duplicates(s, ids(4)).tolist() == [0, 0, 2, 2]


def test_the_same_as_one_after_the_other():
    """An oracle: each text against all that stay, in order; copies here share three bands at least."""
    g = np.random.default_rng(0)
    s = g.integers(0, 2**32, (300, 112), np.uint32)
    for i in range(1, 300):
        if g.random() < 0.5:
            s[i] = s[g.integers(i)]
            s[i, : g.integers(0, 60)] = g.integers(0, 2**32)
    want = []
    for i in range(300):
        want.append(next((j for j in range(i) if want[j] == j and (s[i] == s[j]).mean() >= 0.7), i))
    assert near_duplicates(s, ids(300)).tolist() == want and len(set(want)) < 250


def test_who_goes_points_at_one_that_stays_and_is_like_it():
    g = np.random.default_rng(1)
    for _ in range(30):  # crowded: chains and clusters, where a second round finds more
        s = g.integers(0, 2**32, (150, 112), np.uint32)
        for i in range(5, 150):
            s[i] = s[g.integers(max(0, i - 20), i)]
            s[i, g.random(112) < 0.12] = g.integers(0, 2**32)
        first = near_duplicates(s, ids(150))
        assert (first[first] == first).all() and (first <= np.arange(150)).all() and (first != np.arange(150)).any()
        assert ((s == s[first]).mean(1) >= 0.7).all()
