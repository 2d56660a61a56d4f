"""prepare_data.py as a whole: Toytown, each step on hand-made pages, the mixture, several ranks, kills, bad input."""
import collections
import contextlib
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import textwrap

import pytest
from conftest import ROOT, definitions

README = ROOT / 'README.md' # some file
REAL = ROOT.parent / 'shared' / 'data'
SMALL = dict(n_people=20, n_pages=250, n_books=60, n_lessons=40, n_faults=40, n_chat=150, n_preferences=60,
             n_prompts=150, n_val=30)


def flags(**settings):
    return [f'--{name}={value}' for name, value in settings.items()]


def rows(path):
    with (gzip.open if str(path).endswith('.gz') else open)(path, 'rt', encoding='utf-8') as f:
        return [json.loads(line) for line in f]


def documents(folder, side='*'):
    return [row for path in sorted(folder.glob(f'{side}/*.jsonl.gz')) for row in rows(path)]


def funnel(folder):
    return rows(folder / 'funnel.json')[0]


def contents(folder):
    """{name: hash} of all files; of funnel.json without the seconds."""
    found = {}
    for path in sorted(folder.rglob('*')):
        if path.is_file() and '.partial' not in path.relative_to(folder).parts:
            text = path.read_bytes()
            if path.name == 'funnel.json':
                text = json.dumps(dict(json.loads(text), seconds=0)).encode()
            found[str(path.relative_to(folder))] = hashlib.sha256(text).hexdigest()
    return found


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = text if isinstance(text, str) else ''.join(json.dumps(row) + '\n' for row in text)
    path.write_text(lines, encoding='utf-8')
    return path


def texts(word, n):
    return [{'text': ' '.join(f'{word}{i}x{j}' for j in range(40))} for i in range(n)]


TALK = [dict(role='user', content='Do %d.'), dict(role='assistant', content='Done.')]


def talks(n, key='messages'):
    return [{key: [dict(turn, content=turn['content'].replace('%d', str(i))) for turn in TALK]} for i in range(n)]


# -----------------------------------------------------------------------------
# Toytown


@pytest.fixture(scope='module')
def town(tmp_path_factory, scripts):
    """-> (the raw files, the corpus made of them)"""
    raw, out = tmp_path_factory.mktemp('raw') / 'toytown', tmp_path_factory.mktemp('out')
    scripts.ok('toytown.py', *flags(town_dir=raw, **SMALL))
    scripts.ok('prepare_data.py', *flags(files=raw, data_dir=out))
    return raw, out


def test_all_files_are_written_and_the_steps_find_what_was_planted(town):
    raw, out = town
    names = {'train', 'val', 'benchmarks', 'funnel.json', 'dropped.jsonl'}
    names |= {f'{task}_{side}.jsonl' for task in ('chat', 'preferences', 'prompts') for side in ('train', 'val')}
    assert {path.name for path in out.iterdir()} == names
    steps = funnel(out)['steps']
    for name in ('url', 'text', 'language', 'fineweb', 'dedup', 'pii'): # fineweb stands for the four that drop junk
        assert steps[name]['planted'] > 20, name
        assert steps[name]['precision'] >= 0.95 and steps[name]['recall'] >= 0.95, (name, steps[name])


def test_files_keep_their_side_and_sides_share_nothing(town):
    raw, out = town
    asked = dict(train=set(), val=set())
    for path in raw.glob('*_*.jsonl'):
        assert rows(path) == rows(out / path.name)
        turns = [turn for row in rows(path) for turn in row['messages']]
        asked[path.stem.split('_')[1]] |= {turn['content'] for turn in turns if turn['role'] == 'user'}
    assert asked['train'] and asked['val'] and not asked['train'] & asked['val']
    sides = [{doc['text'] for doc in documents(out, side)} for side in ('train', 'val')]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    for path in (raw / 'benchmarks').iterdir():
        assert rows(path) == rows(out / 'benchmarks' / path.name)


def test_mixture_of_the_folder(town):
    wanted = json.loads((town[0] / 'mixture.json').read_text())
    taken = funnel(town[1])['mixture']['text']
    for name, weight in wanted.items():
        assert abs(taken[name] / sum(taken.values()) - weight) < 0.02


def test_without_the_truth_the_corpus_is_the_same(town, tmp_path, scripts):
    shutil.copytree(town[0], tmp_path / 'raw')
    (tmp_path / 'raw' / 'truth.jsonl').unlink()
    scripts.ok('prepare_data.py', *flags(files=tmp_path / 'raw', data_dir=tmp_path / 'out'))
    for name, digest in contents(town[1]).items():
        if name.startswith(('train', 'val', 'chat', 'prompts', 'preferences', 'benchmarks')):
            assert (tmp_path / 'out' / name).exists()
            if not name.startswith(('train/', 'val/')): # urls of documents hold the path
                assert contents(tmp_path / 'out')[name] == digest
    for side in ('train', 'val'):
        new, old = documents(tmp_path / 'out', side), documents(town[1], side)
        assert sorted(doc['text'] for doc in new) == sorted(doc['text'] for doc in old)


# -----------------------------------------------------------------------------
# steps, on hand-made pages

HOUSE = ('The old house stood at the end of the road, and nobody had lived in it for many years. One day a family came '
         'to look at it. They liked the garden and the tall trees, but the roof had to be mended before they could '
         'move in with their dogs. In spring the apple trees were white, and the children of the street came to play.')


@pytest.fixture(scope='module')
def steps():
    return definitions('prepare_data.py')


def spell(i):
    return ''.join('abcdefghij'[int(digit)] for digit in str(i)) # numbers as words


def test_url(steps):
    def reason(url):
        return steps.url_step(dict(url=url))
    assert reason('http://10.2.3.4:80/x') == reason('http://[::1]/') == 'IP address'
    assert reason('https://a.spamfarm.example/') == 'blocked host'
    assert reason('http://x.example/best-casino') == 'blocked word'
    for url in ('https://essex.example/sextant', 'https://notspamfarm.example/', 'http://x.example/1.2.3.4',
                'folder/casino.html'):
        assert reason(url) is None


def test_quality_rules(steps):
    def reason(text):
        page = dict(text=text, source='web')
        for name in ('repetition', 'quality', 'c4', 'fineweb'):
            why = getattr(steps, f'{name}_step')(page)
            if why:
                return f'{name}: {why}'
        return page['text']
    five = HOUSE.replace(', and', '. And').replace(', but', '. But')
    assert reason(' '.join(five.split()[:50]) + '.').startswith('The old') # just at the floor
    bad = {
        'quality: number of words': 'Too short.',
        'c4: lorem ipsum': five + ' Lorem ipsum.',
        'c4: curly bracket': five + ' It is {name}.',
        'c4: few sentences': HOUSE.replace('.', ',') + ' It was so.',
        'quality: symbols': five + ''.join(f' #lantern{spell(i)}' for i in range(20)),
        'repetition: repeated lines': (five[:90] + '\n') * 9,
        'repetition: repeated 2-grams': 'the shop ' + ' '.join(f'the shop {spell(i)}' for i in range(40)),
        'repetition: repeated 5-grams': ' '.join(map(spell, [*range(100, 200), *range(10, 20), *range(110, 120),
                                                             *range(150, 160), *range(180, 190)])),
        'quality: stop words': ' '.join(f'cheap{spell(i)} lantern{spell(i)}' for i in range(30)),
        'quality: letters': five + ''.join(f' {i}' for i in range(30)),
        'fineweb: short lines': five + ''.join(f'\n{spell(i)} {spell(2 * i)} {spell(3 * i)}.' for i in range(400, 420)),
        'fineweb: punctuation': five + ''.join(
            '\n' + ' '.join(f'{word}{spell(100 * i)}' for word in 'lovely garden and the tallest tree'.split())
            for i in range(20)),
    }
    assert {why: reason(text) for why, text in bad.items()} == {why: why for why in bad}
    page = dict(text='Please enable JavaScript.\n' + five)
    assert steps.c4_step(page) is None and 'JavaScript' not in page['text']


def test_c4_removes_marks_of_citations_and_endless_words(steps):
    page = dict(text=f'He died in 1850.[2] She did not.[citation needed] Why?[] Nobody knows.[edit] It was so.\n'
                     f'This is {"x" * 1001} here.\nThis is {"x" * 1000} here.')
    assert steps.c4_step(page) is None
    assert page['text'] == (f'He died in 1850. She did not. Why? Nobody knows. It was so.\nThis is {"x" * 1000} here.')


def test_a_hard_wrapped_text_is_judged_as_if_it_were_not(steps):
    """Sentences end anywhere in a line; a last line of one word belongs to the sentence before."""
    paragraph = HOUSE.replace(', and', '. And').replace(', but', '. But') + ' And all of them were happy'
    paragraphs = []
    for i in range(6): # the last line has two words
        paragraph += ' again'
        lines = textwrap.wrap(paragraph + ' there.', 72)
        paragraphs.append('\n'.join(lines))
    shortest = min(len(text.split('\n')[-1].split()) for text in paragraphs)
    assert shortest < 3
    for text in (paragraphs[0], '\n\n'.join(f'{spell(i)} {text}' for i, text in enumerate(paragraphs))):
        page = dict(text=text)
        assert steps.c4_step(page) is None and page['text'] == text
        assert steps.fineweb_step(page) is None
    menu = dict(text='Home\nAbout us\n' + paragraphs[0].replace('\n', ' ') + '\nRead more\nPrivacy policy of this site')
    assert steps.c4_step(menu) is None and menu['text'] == paragraphs[0].replace('\n', ' ')


def test_mixture_by_hand(steps):
    mix = steps.mix_sources
    have = dict(web=300, books=100)
    assert mix(have, dict(web=1, books=1), 1) == dict(web=round(1 / 3, 9), books=1)
    assert mix(have, dict(web=1, books=1), 2) == dict(web=round(2 / 3, 9), books=2)
    assert mix(have, dict(web=1, books=1), 9) == dict(web=1, books=3) # until all are used up
    assert mix(have, dict(other=1), 1) == dict(web=1, books=1)
    assert mix(have, dict(web=1), 1) == dict(web=1, books=0)


def test_score_by_hand(steps):
    truth = dict(a=dict(text='x\ny', fault='url'), b=dict(text='x\ny'), c=dict(text='z', fault='quality'),
                 d=dict(text='b', group='b', fault='dedup'))
    fates = dict(a=dict(stopped='url'), b=dict(stopped=None, text='x\nw'), c=dict(stopped='quality', text='z'),
                 d=dict(stopped='dedup', text='b'), own=dict(stopped=None, text='?'))
    assert steps.score(truth, fates, ['url', 'text', 'repetition', 'quality', 'dedup', 'decontaminate']) == dict(
        url=(1, 1, 1), text=(4, 3 / 4, 3 / 4), quality=(1, 1, 1), dedup=(1, 1, 1))


# -----------------------------------------------------------------------------
# whole runs on small files


def test_duplicates_languages_personal_data_and_block_lists(tmp_path, scripts):
    story = [' '.join(f'word{i}a{j}' for j in range(60)) + '.' for i in range(40)]
    hosts = write(tmp_path / 'hosts.txt', '# bad ones\n0.0.0.0 bad.example\nworse.example\n')
    pages = [dict(text=text, url=f'http://good.example/{i}') for i, text in enumerate(story)]
    pages += [dict(text=story[0], url='http://good.example/again'),
              dict(text=story[1].replace('word1a30', 'other'), url='http://good.example/near'),
              dict(text='x', url='http://a.bad.example/'), dict(text='y', url='http://worse.example/'),
              dict(text=story[2] + ' My number is 078-05-1120.', url='http://good.example/ssn')]
    more = dict(files=write(tmp_path / 'p.jsonl', pages), data_dir=tmp_path / 'out', val_fraction=0.3)
    scripts.ok('prepare_data.py', *flags(
        filters='url,pii,dedup', blocked_hosts=f'x.example,{hosts}', drop_private='SSN', **more))
    dropped = funnel(tmp_path / 'out')['dropped']
    assert dropped == dict(url={'blocked host': 2}, text={}, pii={'has SSN': 1}, dedup={'exact': 1, 'near': 1})
    examples = rows(tmp_path / 'out' / 'dropped.jsonl')
    assert [row['reason'] for row in examples] == ['blocked host'] * 2 + ['has SSN', 'exact', 'near']

    german = 'Der Hund meiner Schwester lebt in dem Haus und hat keine Eile, weil das Wetter gut ist. '
    pages = [dict(text=HOUSE + f' It was {spell(i)}.') for i in range(30)]
    pages += [dict(text=german + spell(i)) for i in range(3)]
    write(tmp_path / 'p.jsonl', pages)
    for languages, n in (('en', 3), ('en,de', 0)):
        scripts.ok('prepare_data.py', *flags(filters='language', languages=languages, **more))
        assert funnel(tmp_path / 'out')['dropped']['language'] == ({'de': 3} if n else {})


def test_mixture_and_stale_files(tmp_path, scripts):
    write(tmp_path / 'chat_train.jsonl', 'from an earlier run')
    files = f"{write(tmp_path / 'a.jsonl', texts('one', 200))},{write(tmp_path / 'b.jsonl', texts('two', 200))}"
    scripts.ok('prepare_data.py', *flags(
        files=files, data_dir=tmp_path, filters='dedup', mixture='a:0.8,b:0.2', shard_bytes=20_000))
    taken = funnel(tmp_path)['mixture']['text']
    assert abs(taken['a'] / sum(taken.values()) - 0.8) < 0.01 and len(documents(tmp_path)) == 250
    assert not (tmp_path / 'chat_train.jsonl').exists() and len([*tmp_path.glob('train/*')]) > 3


def test_a_small_source_is_repeated(tmp_path, scripts):
    """a has 1/10 of the bytes of b, and is to have half: it is taken 4 times, b 4/10 of it."""
    files = f"{write(tmp_path / 'a.jsonl', texts('one', 100))},{write(tmp_path / 'b.jsonl', texts('two', 1000))}"
    scripts.ok('prepare_data.py', *flags(
        files=files, data_dir=tmp_path / 'out', filters='dedup', mixture='a:0.5,b:0.5', max_epochs=4))
    train, val = (collections.Counter(doc['text'] for doc in documents(tmp_path / 'out', side))
                  for side in ('train', 'val'))
    assert {n for text, n in train.items() if text.startswith('one')} == {4}
    assert {n for text, n in train.items() if text.startswith('two')} == {1} and set(val.values()) == {1}
    taken = funnel(tmp_path / 'out')['mixture']['text']
    assert abs(taken['a'] / sum(taken.values()) - 0.5) < 0.05 # val is never repeated
    assert not set(train) & set(val)


def test_exam_questions(tmp_path, scripts):
    """A text with thirteen words in a row of a question goes; with twelve it stays; so for conversations."""
    question = ' '.join(f'asked{i}' for i in range(20))
    pages = texts('told', 60)
    pages[0]['text'] += ' ' + ' '.join(question.split()[3:16]).upper() + '!'
    pages[1]['text'] += ' ' + ' '.join(question.split()[3:15])
    chats = talks(60)
    chats[7]['messages'][0]['content'] = question
    write(tmp_path / 'in' / 'pages.jsonl', pages)
    write(tmp_path / 'in' / 'talk.jsonl', chats)
    write(tmp_path / 'in' / 'quiz.jsonl', [dict(query=question, choices=['a', 'b'], gold=0)])
    write(tmp_path / 'in' / 'benchmarks' / 'sums.jsonl', [dict(question='What is 2+3?', answer='#### 5')])
    scripts.ok('prepare_data.py', *flags(
        files=tmp_path / 'in', data_dir=tmp_path / 'out', filters='dedup,decontaminate', val_fraction=0.3))
    found = {doc['text'] for doc in documents(tmp_path / 'out')}
    assert len(found) == 59 and pages[0]['text'] not in found and pages[1]['text'] in found
    assert sum(len(rows(tmp_path / 'out' / f'chat_{side}.jsonl')) for side in ('train', 'val')) == 59
    assert funnel(tmp_path / 'out')['dropped']['decontaminate'] == {'question of quiz': 1}
    assert funnel(tmp_path / 'out')['skipped'] == {'chat: question of quiz': 1}
    assert rows(tmp_path / 'out' / 'benchmarks' / 'sums.jsonl')[0]['checks'] == {'number': 5.0}


def test_chat_as_text_token_shards_and_odd_names(tmp_path, scripts):
    from model import write_shard
    import numpy as np
    write(tmp_path / '[x].txt', '\n\n'.join(f'word{i} ' * 50 for i in range(200)))
    write(tmp_path / 'talk.jsonl', talks(60))
    for name in ('fine_val_000000', 'fine_train_000001'):
        write_shard(str(tmp_path / f'{name}.bin'), np.arange(5, dtype=np.uint16), 0)
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'train_000009.bin').symlink_to(tmp_path / 'fine_train_000001.bin') # of an earlier run
    scripts.ok('prepare_data.py', *flags(
        files=f'{tmp_path}/[x].txt,{tmp_path}/*.jsonl,{tmp_path}/*.bin', data_dir=tmp_path / 'out', chat_as_text=True,
        filters='dedup', val_fraction=0.3))
    out = tmp_path / 'out'
    asked = {row['messages'][0]['content'] for row in rows(out / 'chat_train.jsonl')}
    told = {doc['text'].split('\n')[0] for doc in documents(out) if doc['text'].startswith('Do')}
    assert told == asked and len(told) > 20 # never what is asked in validation
    links = {path.name: path.resolve().name for path in out.glob('*.bin')}
    assert links == {'val_000000.bin': 'fine_val_000000.bin', 'train_000001.bin': 'fine_train_000001.bin'}
    assert funnel(out)['tokens'] == {tmp_path.name: 10} # all files of a pattern are one source


@pytest.mark.skipif(not REAL.exists(), reason='no real files at hand')
def test_real_files(tmp_path, scripts):
    names = ['shakespeare.txt', 'dolly_hhrlhf_small.jsonl', 'hh_harmless_base_test.jsonl.gz', 'gsm8k_test.jsonl',
             'core/arc_easy.jsonl', 'web/*.warc.gz']
    scripts.ok('prepare_data.py', *flags(files=','.join(f'{REAL}/{name}' for name in names), data_dir=tmp_path))
    assert sum(doc['source'] == 'shakespeare' for doc in documents(tmp_path)) > 200
    assert sum(len(rows(tmp_path / f'preferences_{side}.jsonl')) for side in ('train', 'val')) == 2308
    assert funnel(tmp_path)['skipped']['turns in another order than user, assistant'] == 4 # of 2,312


# -----------------------------------------------------------------------------
# several ranks, and kills


def crowd(folder, n_files=4):
    """Files of 400 KB each, whose texts are in part the same, or nearly; -> their pattern."""
    rng, old = random.Random(5), []
    vocabulary = [''.join(rng.choices('abcdefghijklmnopqrstuvwxyz', k=7)) for _ in range(5000)]
    for i in range(n_files):
        lines = []
        for _ in range(500):
            words = rng.choices(vocabulary, k=100)
            if old and rng.random() < 0.3: # a copy of an earlier one, of this file or another; half of them changed
                words = list(rng.choice(old))
                words[50] = rng.choice(vocabulary) if rng.random() < 0.5 else words[50]
            old.append(words)
            lines.append({'text': ' '.join(words) + '.'})
        write(folder / f'part{"abcdef"[i]}.jsonl', lines)
    write(folder / 'talk.jsonl', talks(100))
    return f'{folder}/*.jsonl'


def test_two_ranks_write_the_same_and_a_killed_run_continues(tmp_path, scripts):
    files = crowd(tmp_path / 'in')
    asked = ' '.join(rows(tmp_path / 'in' / 'partb.jsonl')[7]['text'].split()[20:40])
    exam = write(tmp_path / 'benchmarks' / 'quiz.jsonl', [dict(query=asked, choices=['a', 'b'], gold=0)])
    more = dict(files=f'{files},{exam}', filters='dedup,pii,decontaminate', shard_bytes=100_000) # many files
    scripts.ok('prepare_data.py', *flags(data_dir=tmp_path / 'one', **more))
    scripts.two('prepare_data.py', *flags(data_dir=tmp_path / 'two', **more))
    assert contents(tmp_path / 'one') == contents(tmp_path / 'two')
    found = funnel(tmp_path / 'one')
    assert found['dropped']['dedup']['exact'] > 150 and found['dropped']['dedup']['near'] > 150 # across files too
    assert found['dropped']['decontaminate'] == {'question of quiz': 1}
    texts_kept = [doc['text'] for doc in documents(tmp_path / 'one')]
    assert len(set(texts_kept)) == len(texts_kept) == found['steps']['dedup']['docs_out'] - 1
    names = [path.name for path in sorted((tmp_path / 'one' / 'train').iterdir())]
    assert names == [f'{i:06d}.jsonl.gz' for i in range(len(names))] and len(names) > 8

    # killed after the first group of pass one; then in pass two; then the same command
    for name in ('000000.json', 'chat_train.jsonl'):
        before = f'''
import os, model
replace = os.replace
def kill(a, b):
    replace(a, b)
    if str(b).endswith('{name}'):
        os.kill(os.getpid(), 9)
os.replace = kill
'''
        assert scripts('prepare_data.py', *flags(data_dir=tmp_path / 'out', **more), before=before).code != 0
        assert not (tmp_path / 'out' / 'train').exists()
    work = [*(tmp_path / 'out' / '.partial' / 'work').glob('*.json')]
    assert len(work) == 2
    forbid = 'import hashlib; hashlib.sha256 = None' # pass one has nothing left to do
    scripts.ok('prepare_data.py', *flags(data_dir=tmp_path / 'out', **more), before=forbid)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'one')
    assert not (tmp_path / 'out' / '.partial').exists()


def two_fail(scripts, **settings):
    """Two ranks that both must end with an error -> what they said."""
    results = scripts.two('prepare_data.py', *flags(**settings), check=False)
    assert [r.code for r in results] == [1, 1]
    return [r.err for r in results]


def test_rank_0_prints_the_error_of_another_rank(tmp_path, scripts):
    files = crowd(tmp_path / 'in')
    path = tmp_path / 'in' / 'partb.jsonl' # the second file, of rank 1
    path.write_text('not json\n' * 20 + path.read_text())
    assert 'partb.jsonl:1: not a JSON line' in two_fail(scripts, files=files, data_dir=tmp_path / 'out')[0]


def test_an_error_of_rank_0_ends_the_others(tmp_path, scripts):
    """It is found in pass two, in which the others help."""
    files = crowd(tmp_path / 'in')
    told = two_fail(scripts, files=files, data_dir=tmp_path / 'out', filters='dedup', mixture='boks:1')
    assert re.search('error: mixture: nothing from boks', told[0]) and 'Traceback' not in ''.join(told)


MOMENTS = '''
import os, shutil
copytree, n = shutil.copytree, [0]
def watched(f):
    def call(*args, **more):
        if os.path.exists({marker!r}) or os.path.exists({whole!r}):
            if n[0] == {kill}:
                os.kill(os.getpid(), 9)
            if {kill} is None: # what a kill would leave
                copytree({out!r}, os.path.join({moments!r}, '%03d' % n[0]))
            n[0] += 1
        return f(*args, **more)
    return call
for module, name in ((os, 'replace'), (os, 'remove'), (os, 'rmdir'), (shutil, 'rmtree')):
    setattr(module, name, watched(getattr(module, name)))
'''


def test_a_kill_at_every_rename_of_the_exchange(tmp_path, scripts):
    """
    The old corpus has conversations, the new one has none: they must go, whenever the run is killed. One run leaves a
    copy of its folder at every moment; that a kill leaves the same is shown for one of them.
    """
    old, new = write(tmp_path / 'old.jsonl', talks(40)), write(tmp_path / 'new.jsonl', texts('new', 60))
    out = tmp_path / 'out'
    scripts.ok('prepare_data.py', *flags(
        files=old, data_dir=out, filters='dedup', chat_as_text=True, val_fraction=0.3))
    start = tmp_path / 'start'
    shutil.copytree(out, start)
    more = dict(files=new, filters='dedup', val_fraction=0.3)
    moments = tmp_path / 'moments'
    names = dict(out=str(out), moments=str(moments), marker=str(out / '.partial' / 'finished.json'),
                 whole=str(out / '.partial' / 'new' / 'funnel.json'))
    scripts.ok('prepare_data.py', *flags(data_dir=out, **more), before=MOMENTS.format(kill=None, **names))
    whole = contents(out)
    assert 'chat_train.jsonl' in contents(start) and 'chat_train.jsonl' not in whole and len(whole) == 4
    copies = sorted(moments.iterdir())
    for n, copy in enumerate(copies):
        shutil.rmtree(out)
        if n == 5:
            shutil.copytree(start, out)
            killed = scripts('prepare_data.py', *flags(data_dir=out, **more), before=MOMENTS.format(kill=n, **names))
            assert killed.code == -9
            assert contents(out) == contents(copy) and contents(out / '.partial') == contents(copy / '.partial') != {}
        else:
            shutil.copytree(copy, out)
        # at any moment each file is either in its place or in .partial
        assert {'train', 'val', 'funnel.json', 'dropped.jsonl'} <= {path.name for path in out.rglob('*')}, n
        # another command finishes the exchange before anything else
        if n == 5:
            scripts.fails('no input file', 'prepare_data.py', *flags(data_dir=out, files=tmp_path / 'nosuch.txt'))
        scripts.ok('prepare_data.py', *flags(data_dir=out, **more))
        assert contents(out) == whole, n
        assert not (out / '.partial').exists()
    assert len(copies) > 10


@pytest.mark.parametrize('over_old', [True, False])
def test_the_exchange_is_repeated_from_any_point(tmp_path, over_old, monkeypatch):
    """As above, for everything that the exchange does to files, also if an exception (Ctrl-C) ends it."""
    out = tmp_path / 'out'
    old, new = {'train/0': 'old', 'chat_train.jsonl': 'old', 'funnel.json': 'old'}, {'train/0': 'new', 'funnel.json': 'new'}
    put_in_place = definitions('prepare_data.py', data_dir=str(out)).put_in_place
    n = done = 0
    while not done:
        shutil.rmtree(out, ignore_errors=True)
        for name, text in (old if over_old else {}).items():
            write(out / name, text)
        write(out / 'tokenizer.json', 'of another stage')
        for name, text in new.items():
            write(out / '.partial' / 'new' / name, text)
        write(out / '.partial' / 'work' / '000000.json', '{}')
        write(out / '.partial' / 'settings.json', '{}')
        write(out / '.partial' / 'finished.json.7.partial', '{') # of a run that was killed there
        write(out / '.partial' / 'finished.json', [dict(new=['funnel.json', 'train'], old=['chat_train.jsonl', 'val'])])
        left = [n]

        def deadly(call):
            def wrapper(*args, **more):
                left[0] -= 1
                if left[0] == -1:
                    raise KeyboardInterrupt
                return call(*args, **more)
            return wrapper
        with monkeypatch.context() as m:
            for name in ('replace', 'remove', 'unlink', 'rmdir', 'mkdir'):
                m.setattr(os, name, deadly(getattr(os, name)))
            with contextlib.suppress(KeyboardInterrupt):
                put_in_place()
                done = True
        if (out / '.partial' / 'finished.json').exists(): # else nothing is left to do
            put_in_place()
        shutil.rmtree(out / '.partial', ignore_errors=True) # as the next run does
        found = {str(path.relative_to(out)): path.read_text() for path in out.rglob('*') if path.is_file()}
        assert found == {**new, 'tokenizer.json': 'of another stage'}, n
        n += 1
    assert n > 10


FULL_DISK = 'import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); ' \
            'resource.setrlimit(resource.RLIMIT_FSIZE, ({n}, {n}))'


def test_a_full_disk_is_one_line_and_leaves_the_old_corpus_whole(tmp_path, scripts):
    more = dict(files=write(tmp_path / 'in.jsonl', texts('one', 300)), data_dir=tmp_path / 'out', filters='dedup')
    write(tmp_path / 'out' / 'funnel.json', 'old')
    scripts.fails(r'error: \S*/\.partial/work/000000\.jsonl\.gz: File too large', 'prepare_data.py', *flags(**more),
                  before=FULL_DISK.format(n=6000)) # bytes of the largest file that can be written
    scripts.fails(r'error: \S*/\.partial/work/000000\.npy: File too large', 'prepare_data.py', *flags(**more),
                  before=FULL_DISK.format(n=60_000)) # the signatures have 448 bytes a document
    assert (tmp_path / 'out' / 'funnel.json').read_text() == 'old'
    scripts.ok('prepare_data.py', *flags(**more))
    assert len(documents(tmp_path / 'out')) == 300 and not (tmp_path / 'out' / '.partial').exists()


# -----------------------------------------------------------------------------
# other people's files


def test_a_folder_of_many_small_files_is_one_source(tmp_path, scripts):
    """With what is not read named, bad rows skipped, and few lines printed, however many files there are."""
    folder = tmp_path / 'my notes [2024]'
    for i, row in enumerate(texts('one', 2000)):
        write(folder / f'{i}x{[".TXT", ".md", ".log"][i % 3]}', row['text'])
    for name in ('a.pdf', 'b.pdf', 'c.rst', 'd'):
        write(folder / 'more' / name, 'x')
    for name in ('truth.jsonl', 'mixture.json'): # no files of Toytown's
        write(folder / name, texts(name[0], 50))
    write(folder / 'bad.jsonl', [dict(text=None)])
    ran = scripts.ok('prepare_data.py', *flags(files=folder, data_dir=tmp_path / 'out', filters='dedup'))
    out = funnel(tmp_path / 'out')
    assert out['mixture']['text'].keys() == {folder.name} and len(documents(tmp_path / 'out')) == 1334 + 100
    assert out['skipped'] == {'bad row': 1} and f'{folder}/bad.jsonl:1: text must be a string' in ran.out
    assert '670 files of other kinds are left out: 666 .log, 2 .pdf, 1 ' in ran.out
    assert ran.out.count('\n') <= 40


def test_sources_that_settings_name(tmp_path, scripts):
    """A file that the mixture names is a source of its own; so is one that is named on the command line."""
    for name in ('web_1', 'web_2', 'books', 'notes', 'diary'):
        write(tmp_path / 'in' / f'{name}.jsonl', texts(name, 40))
    own = write(tmp_path / 'own.jsonl', texts('own', 40))
    more = dict(files=f'{tmp_path}/in/*.jsonl, {own}', data_dir=tmp_path / 'out', filters='dedup')
    scripts.ok('prepare_data.py', *flags(mixture='web:0.5,own:0.3,in:0.2', curated='books', **more))
    assert {doc['source'] for doc in documents(tmp_path / 'out')} == {'web', 'own', 'in'} # no weight: nothing of books
    scripts.ok('prepare_data.py', *flags(curated='books', **more))
    assert {doc['source'] for doc in documents(tmp_path / 'out')} == {'books', 'own', 'in'}


def test_a_few_texts_are_refused_with_the_value_that_does(tmp_path, scripts):
    path = write(tmp_path / 'a.txt', '\n\n'.join(row['text'] * 20 for row in texts('one', 3)))
    more = dict(files=path, data_dir=tmp_path / 'out', filters='dedup', val_fraction=1e-9)
    failed = scripts.fails(r'3 items are too few.*set --val_fraction=0\.\d{4}$', 'prepare_data.py', *flags(**more))
    more['val_fraction'] = failed.err.strip().split('=')[-1]
    scripts.ok('prepare_data.py', *flags(**more))
    assert documents(tmp_path / 'out', 'train') and documents(tmp_path / 'out', 'val')
    write(path, 'one two three')
    scripts.fails('1 items are too few.*divide the text', 'prepare_data.py', *flags(**more))


# -----------------------------------------------------------------------------
# bad input and settings


@pytest.mark.parametrize('name, text, message', [
    ('a.jsonl', '{"text": "fine"}\nnot json\n', r'a\.jsonl:2: not a JSON line'),
    ('a.jsonl', talks(1), 'too few'),
    ('a.jsonl', '', 'are empty'),
    ('a.txt', 'Too short.', 'no document of 1 is left'),
    ('a.exe', 'x', 'of a known kind'),
    ('a.bin', 'x', r'a\.bin is not a token shard'),
    ('a.jsonl.gz', 'no gzip', r'a\.jsonl\.gz: damaged'),
    ('a.jsonl', '{"text": 1}\n' * 99 + '{"text": "x"}\n', r'a\.jsonl:1: text must be a string'),
    ('a.jsonl', '{"text": "x"}\n' * 98 + '{"text": 1}\n' * 2, r'a\.jsonl:99: text.*: 2 of 100 rows are bad.*--max_bad_rows=0\.01'),
])
def test_bad_input_is_one_line_and_leaves_the_old_data_whole(tmp_path, name, text, message, scripts):
    out = tmp_path / 'out'
    write(out / 'chat_train.jsonl', 'old')
    scripts.fails(message, 'prepare_data.py', *flags(files=write(tmp_path / name, text), data_dir=out))
    assert {path.name for path in out.iterdir()} <= {'chat_train.jsonl', '.partial'}
    assert (out / 'chat_train.jsonl').read_text() == 'old'


@pytest.mark.parametrize('settings, message', [
    (dict(source='toytwon'), "no source 'toytwon'"),
    (dict(filters='url,speling'), 'speling'),
    (dict(val_fraction=0), 'val_fraction must be above 0'),
    (dict(), 'python toytown.py'),
    (dict(files='nosuch*.txt'), "no input file 'nosuch"),
    (dict(seed=-1), 'seed must be at least 0'),
    (dict(shard_bytes=0), 'shard_bytes must be positive'),
    (dict(mixture='web:x'), 'mixture'),
    (dict(languages='en,xx', files=README), "no 'xx'"),
    (dict(drop_private='SNN', files=README), "no kind 'SNN'"),
    (dict(source='c4', files=README), 'files = .* would be ignored: add files to --source=c4'),
    (dict(filters='dedup', drop_private='SSN', files=README), 'drop_private = .* add pii to --filters=dedup'),
    (dict(max_bad_rows=1.5), 'max_bad_rows is a share'),
])
def test_bad_settings(tmp_path, settings, message, scripts):
    scripts.fails(message, 'prepare_data.py', *flags(**settings), cwd=tmp_path)


def test_a_mixture_of_unknown_sources(tmp_path, scripts):
    files = write(tmp_path / 'a.jsonl', texts('one', 30))
    scripts.fails('mixture: nothing from boks; there is a', 'prepare_data.py',
                  *flags(files=files, data_dir=tmp_path / 'out', filters='dedup', mixture='a:1,boks:1'))


def test_input_is_never_replaced_by_its_result(tmp_path, scripts):
    text = ' '.join(f'word{i}' for i in range(5000)).replace('0 ', '0.\n\n')
    kept = write(tmp_path / 'raw' / 'mine.txt', text)
    scripts.ok('prepare_data.py', *flags(files=kept, data_dir=tmp_path, filters='dedup', val_fraction=0.4))
    assert kept.read_text() == text and documents(tmp_path)
    lost = write(tmp_path / 'benchmarks' / 'mine.txt', text)
    scripts.fails('would be replaced.*move it', 'prepare_data.py', *flags(files=lost, data_dir=tmp_path))
    assert lost.read_text() == text
