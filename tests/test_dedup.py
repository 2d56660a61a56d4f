"""prepare_data.py, duplicates: equal values estimate the Jaccard similarity; the first of each cluster stays."""
import random

import numpy as np
import pytest
from conftest import definitions

ours = definitions('prepare_data.py')
minhash, near_duplicates = ours.minhash, ours.near_duplicates
rng = random.Random(0)


def words(n):
    return [f'w{rng.randrange(10**6)}' for _ in range(n)]


def test_share_of_equal_values_is_the_jaccard_similarity():
    errors = []
    for _ in range(200): # 96 of 2 * 196 - 96 = 296 5-grams are shared
        a = words(200)
        errors.append((minhash(' '.join(a)) == minhash(' '.join(a[:100] + words(100)))).mean() - 96 / 296)
    sd = (96 / 296 * 200 / 296 / 112) ** 0.5
    assert abs(np.mean(errors)) < 4 * sd / 200**0.5 and 0.8 * sd < np.std(errors) < 1.2 * sd


def test_signature_is_of_words_in_their_order():
    a = words(50)
    base = minhash(' '.join(a))
    assert base.shape == (112,) and base.dtype == np.uint32
    assert (minhash('  ' + ', '.join(a).upper() + '!') == base).all() # neither case nor punctuation
    assert (minhash(' '.join(a * 3)) == base).mean() > 0.6 and (minhash(' '.join(a[::-1])) == base).sum() == 0
    assert minhash('').shape == minhash('\ud800 one').shape == (112,)
    assert (minhash('one two') != minhash('two one')).any() and (minhash('one') == minhash('One.')).all()


TYPED = ('"It\'s a well-known tale," she said - "of the \'old\' house in 1990-1995, and of those who lived in it -- '
         'well, until the roof fell in." Nobody\'s there now; the owners\' garden is over-grown.')
PRINTED = ('“It’s a well‑known tale,” she said – “of the ‘old’ house in 1990–1995, and of those who lived in it — well, '
           'until the roof fell in.” Nobody’s there now; the owners’ garden is over‐grown.')


def test_quotes_and_dashes_make_no_difference():
    for other in (PRINTED, PRINTED.replace(' — ', '—'), TYPED.upper(), PRINTED.replace('well', 'we\u00adll\u200b')):
        assert (minhash(TYPED) == minhash(other)).all(), other
    assert ours.compared_words('She said: “It’s well-known 雨停。” …') == ['she', 'said', 'its', 'well', 'known', '雨', '停']
    assert ours.compared_words('2-3=5') != ours.compared_words('2+3=5') # an operator is no punctuation


def test_every_copy_that_differs_only_in_quotes_and_dashes_is_found():
    quoted = random.Random(3)
    typed, printed = [], []
    for _ in range(300):
        tale = words(60)
        for i in quoted.sample(range(1, 59), 20):
            tale[i] = quoted.choice(['"%s"', "'%s'", "%s's", 'un-%s', '%s -', '(%s)']) % tale[i]
        typed.append(' '.join(tale))
        new = typed[-1].replace(' "', ' “').replace('" ', '” ').replace(" '", ' ‘').replace("'", '’')
        printed.append(new.replace(' -', ' —').replace('-', quoted.choice('‐‑–')))
    assert all(a != b for a, b in zip(typed, printed))
    copy_of = near_duplicates(np.array([minhash(text) for text in typed + printed]))
    assert copy_of.tolist() == [*range(300)] * 2


@pytest.mark.parametrize('letters', ['雨停了以后我们走到港口去看船是不是已从海上回来天', 'あめがやんだあとわたしたちはみなとへいってふねをみた',
                                     'เมื่อฝนหยุดเราเดินไปที่ท่าเรือ'])
def test_near_copies_in_scripts_without_blanks(letters):
    """The whole text is one word between blanks: the characters are compared."""
    def draw(n):
        return ''.join(rng.choice(letters) for _ in range(n))
    text, other = draw(400), draw(400)
    copy = text[:200] + rng.choice(letters) * 2 + text[202:]
    assert near_duplicates(np.array([minhash(text), minhash(copy), minhash(other)])).tolist() == [0, 0, 2]


def test_exam_questions_escape_neither_by_quotes_nor_by_hyphens():
    question = ('According to the "old" sailor\'s tale, which of the well-known harbours of the north was first - '
                'and only for a year - closed by ice?')
    mine = definitions('prepare_data.py')
    mine.space['exam_hashes'], mine.space['exam_names'] = mine.exam_ngrams({'quiz': [dict(query=question)]})
    printed = question.replace(' "', ' “').replace('" ', '” ').replace("'", '’').replace(' - ', '—')
    hidden = question.replace('tale', 'ta\u00adle').replace('harbours', 'har\u200bbours')
    for text in (question, printed, hidden, question.upper()):
        for item in (dict(text=f'It was asked: {text}'), dict(row=dict(messages=[dict(role='user', content=text)]))):
            assert mine.decontaminate_step(item) == 'question of quiz', text
    assert mine.decontaminate_step(dict(text='Which harbour was closed by ice?')) is None
    chinese = '雨停了以后我们走到港口去看看船是不是已经从海上回来了'
    mine.space['exam_hashes'], mine.space['exam_names'] = mine.exam_ngrams({'quiz': [dict(query=chinese)]})
    assert mine.decontaminate_step(dict(text='他问：' + chinese[3:20])) == 'question of quiz'
    assert mine.decontaminate_step(dict(text='他问：' + chinese[3:15])) is None # 12 characters


def signatures(*changed):
    """Rows that differ from the first one in so many of the 112 values, from the left."""
    rows = np.tile(np.arange(112, dtype=np.uint32), (len(changed), 1))
    for i, n in enumerate(changed):
        rows[i, :n] += np.uint32(1000 * (i + 1))
    return rows


def test_threshold_and_the_first_stays():
    s = signatures(0, 33, 34, 112, 0) # 79 of 112 are 0.705, 78 are 0.696
    assert near_duplicates(s).tolist() == [0, 0, 2, 3, 0]
    assert near_duplicates(s, 0.5).tolist() == [0, 0, 0, 3, 0]
    assert near_duplicates(s[::-1]).tolist() == [0, 1, 2, 0, 0]
    assert near_duplicates(s[:0]).tolist() == [] and near_duplicates(s[:1]).tolist() == [0]


def test_a_chain_is_cut_where_the_ends_differ():
    s = np.tile(np.arange(112, dtype=np.uint32), (4, 1))
    for i in range(1, 4): # each differs from the one before in 24 more, so from the one before that in 48: too many
        s[i:, 24 * (i - 1):24 * i] += np.uint32(1000 * i)
    assert near_duplicates(s).tolist() == [0, 0, 2, 2]


def test_the_same_as_one_after_the_other():
    """An oracle: each text against all that stay, in order; copies here share three bands at least."""
    g = np.random.default_rng(0)
    s = g.integers(0, 2**32, (300, 112), np.uint32)
    for i in range(1, 300):
        if g.random() < 0.5:
            s[i] = s[g.integers(i)]
            s[i, :g.integers(0, 60)] = g.integers(0, 2**32)
    want = []
    for i in range(300):
        want.append(next((j for j in range(i) if want[j] == j and (s[i] == s[j]).mean() >= 0.7), i))
    assert near_duplicates(s).tolist() == want and len(set(want)) < 250


def test_what_goes_points_at_one_that_stays_and_is_like_it():
    g = np.random.default_rng(1)
    for _ in range(30):
        s = g.integers(0, 2**32, (150, 112), np.uint32)
        for i in range(5, 150):
            s[i] = s[g.integers(max(0, i - 20), i)]
            s[i, g.random(112) < 0.12] = g.integers(0, 2**32)
        copy_of = near_duplicates(s)
        assert (copy_of[copy_of] == copy_of).all() and (copy_of <= np.arange(150)).all()
        assert (copy_of != np.arange(150)).any() and ((s == s[copy_of]).mean(1) >= 0.7).all()
