"""
Make languages.json, the table of language_scores: each language's most frequent words, by how often they come.

    $ pip install wordfreq
    $ python make_languages.py FrequencyWords/content/2018 texts languages.json

Frequencies are those of wordfreq (Speer 2022) where it has the language, else of FrequencyWords (Dave 2018, from
OpenSubtitles: <code>/<code>_50k.txt), else counted in texts/<code>.txt. A language's row is a list of strings: the
words in its i-th string come once in about 2^i words.
"""

import collections, json, math, os, re, sys

import wordfreq

# as in prepare_data.py: runs of letters, with vowel signs in India's scripts; in scripts without spaces single letters
WORD = re.compile(r'[\u0900-\u0dff]+|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]|[^\W\d_]+')
CODES = """af ar bg bis bn br ca cs cy da de el en eo es et eu fa fi fo fr fy ga gd gl he hi hr hu hwc hy id is it ja
    jam kk ko la lb lt lv mk ml ms mt nb nds nl nn oc pcm pl pt ro ru sco si sk sl sq srn sv sw ta te th tl tpi tr uk
    ur vi zh""".split()  # ISO 639, hr with its neighbours bs and sr in Latin letters
N_WORDS = dict(en=1000, sco=450, pcm=250)  # of each language; English and what is written almost like it need more
NAMES = dict(hr='sh', tl='fil')  # what wordfreq calls them


def counts_of(code, subtitles, texts):
    """-> Counter of words. A list's entries are cut up like a text: don't counts as don and t."""
    counts, paths = collections.Counter(), [f'{subtitles}/{code}/{code}_{kind}.txt' for kind in ('50k', 'full')]
    if NAMES.get(code, code) in wordfreq.available_languages() and code != 'el':  # whose final sigmas it lacks
        entries = wordfreq.get_frequency_dict(NAMES.get(code, code), 'best').items()
    elif path := next(filter(os.path.exists, paths), None):
        entries = (line.rsplit(' ', 1) for line in open(path, encoding='utf-8'))
    else:
        entries = [(open(f'{texts}/{code}.txt', encoding='utf-8').read(), 1)]
    for entry, n in entries:
        for word in WORD.findall(entry.lower()):
            counts[word] += float(n)
    return counts


def row_of(code, counts):
    """The most frequent words, by -log2 of their share of all words, rounded."""
    total, row, latin = sum(counts.values()), collections.defaultdict(list), counts.most_common(1)[0][0] < '\u0250'
    # single Latin consonants are initials, units, variables: of every language
    words = [(word, n) for word, n in counts.most_common() if not re.fullmatch('[b-hj-np-tv-xz]', word)]
    words = [(word, n) for word, n in words if code != 'en' or len(word) > 1 or word in 'ai']
    for word, n in words[: N_WORDS.get(code, 120) if latin else 60]:  # another script betrays itself sooner
        row[round(-math.log2(n / total))].append(word)
    return [' '.join(row[i]) for i in range(max(row) + 1)]


if __name__ == '__main__':
    subtitles, texts, path = sys.argv[1:]
    rows = {code: row_of(code, counts_of(code, subtitles, texts)) for code in CODES}
    with open(path, 'w', encoding='utf-8') as f:
        lines = (f'"{code}": {json.dumps(row, ensure_ascii=False)}' for code, row in rows.items())  # one per language
        f.write('{\n' + ',\n'.join(lines) + '\n}\n')
