"""
Which language is a text in? Naive Bayes over frequent words, as a reader would tell: by "the" and "und" and "och".

config/languages.json has for 74 languages the most frequent words and how frequent they are, counted by others
(wordfreq, FrequencyWords; tests/bench/make_languages.py says what of). FineWeb asks fastText (Joulin et al. 2016), a
model of 126 MB; how this one compares: tests/bench/languages.py.
"""
import collections, json, os, re

import numpy as np

WORD = re.compile(r'[\u0900-\u0dff]+|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]|[^\W\d_]+')

def language_table(path):
    """-> {code: column}, {word: row}, log P(word | language) (words + 1, languages): the last row is any other word."""
    with open(path, encoding='utf-8') as f:
        table = json.load(f) # {code: [words, ...]}, where the words of the i-th string come once in 2^i
    words = {word for strings in table.values() for string in strings for word in string.split()}
    rows = {word: i for i, word in enumerate(sorted(words))}
    p = np.zeros((len(rows) + 1, len(table) + 1))
    for column, strings in enumerate(table.values()):
        for i, words in enumerate(strings):
            p[[rows[word] for word in words.split()], column] = 2.0**-i
    p[-1] = np.clip(1 - p.sum(0), 0.35, 0.6) # the share of words that are not in the table
    p[:-1, -1], p[-1, -1] = p[:-1, :-1].mean(1), 0.7 # 'und', no language known here: now and then anybody's word
    return {code: i for i, code in enumerate([*table, 'und'])}, rows, np.log(np.maximum(p, 1e-5))

here = os.path.dirname(os.path.abspath(__file__))
CODES, ROWS, LOG_P = language_table(os.path.join(here, 'config', 'languages.json'))

def language_scores(text, sure=50):
    """-> {code: probability} by naive Bayes over the words of the table; 'und' stands for every other language and for
    no language at all. Words depend on each other, so any number of them counts as `sure` at most. A page half in
    one language and half in another is mostly 'und': it is too rare in either."""
    counts = collections.Counter(WORD.findall(text[:10_000].lower()))
    known = [word for word in counts if word in ROWS]
    n, n_of = counts.total(), np.array([counts[word] for word in known], float)
    log_p = n_of @ LOG_P[[ROWS[word] for word in known]] + (n - n_of.sum()) * LOG_P[-1]
    log_p[-1] += 5 # and two or three words prove nothing, say those over a table of numbers
    p = np.exp((log_p - log_p.max()) * min(1, sure / max(1, n)))
    return dict(zip(CODES, (p / p.sum()).tolist()))
