"""prepare_data.py: the toy world, each step on hand-made pages, files of every form, bad input."""

import collections
import gzip
import hashlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / 'prepare_data.py')
REAL = ROOT.parent / 'shared' / 'data'
SMALL = dict(
    n_people=20,
    n_pages=400,
    n_books=80,
    n_lessons=60,
    n_faults=60,
    n_chat=150,
    n_preferences=60,
    n_prompts=150,
    n_val=30,
)
sys.path.insert(0, str(ROOT))
import toytown


def run(folder, **settings):
    """The real script in this process (torch is imported once) -> its globals, so that its functions can be called."""
    argv, sys.argv = sys.argv, [SCRIPT] + [f'--{k}={v}' for k, v in dict(settings, data_dir=folder).items()]
    try:
        return runpy.run_path(SCRIPT)
    finally:
        sys.argv = argv


def rows(path):
    with (gzip.open if str(path).endswith('.gz') else open)(path, 'rt', encoding='utf-8') as f:
        return [json.loads(line) for line in f]


def documents(folder, side='*'):
    return [
        row
        for path in sorted(Path(folder).glob(f'{side}/*.jsonl.gz'))
        if path.parent.name != 'raw'
        for row in rows(path)
    ]


def funnel(folder):
    return json.loads((Path(folder) / 'funnel.json').read_text(encoding='utf-8'))


def contents(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(folder).rglob('*'))
        if p.is_file() and p.name != 'funnel.json' and '.partial' not in str(p)
    }


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        text if isinstance(text, str) else ''.join(json.dumps(row) + '\n' for row in text), encoding='utf-8'
    )
    return path


FILLER = (
    'The old house stood at the end of the road, and nobody had lived in it for many years. '
    'One day a family came to look at it. '
    'They liked the garden and the tall trees, but the roof had to be mended before they could move in with their {}. '
)


def story(*words):
    return ' '.join(FILLER.format(word) for word in words)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp('world') / 'toytown'
    return folder, run(folder, **SMALL)


def test_every_output_is_there_and_a_second_run_is_the_same(world, tmp_path):
    folder, _ = world
    for name in (
        'train',
        'val',
        'benchmarks',
        'raw',
        'funnel.json',
        'chat_train.jsonl',
        'chat_val.jsonl',
        'preferences_train.jsonl',
        'preferences_val.jsonl',
        'prompts_train.jsonl',
        'prompts_val.jsonl',
        'raw/web_00000.warc.gz',
        'raw/truth.jsonl',
    ):
        assert (folder / name).exists(), name
    flags = [f'--{k}={v}' for k, v in SMALL.items()]
    done = subprocess.run(
        [sys.executable, SCRIPT, '--data_dir=again', *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONHASHSEED='7'),
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / 'again') == contents(folder)
    assert not (tmp_path / 'again' / '.partial').exists()


def test_another_seed_is_another_world(world, tmp_path):
    run(tmp_path, **dict(SMALL, seed=1))
    assert contents(tmp_path)['chat_train.jsonl'] != contents(world[0])['chat_train.jsonl']


def test_filters_find_what_was_planted(world):
    funnel = json.loads((world[0] / 'funnel.json').read_text(encoding='utf-8'))['steps']
    for name in ('url', 'text', 'language', 'fineweb', 'dedup', 'pii'):  # fineweb stands for the four that drop junk
        assert funnel[name]['planted'] > 20, name
        assert funnel[name]['precision'] >= 0.95 and funnel[name]['recall'] >= 0.95, (name, funnel[name])


def test_the_steps_never_see_the_truth():
    source = Path(SCRIPT).read_text(encoding='utf-8')
    steps = source[source.index('\n# the steps: each') : source.index('\n# the funnel')]
    assert [
        line for line in steps.split('\n') if 'truth' in line and 'toytown' not in line and 'truth.jsonl' not in line
    ] == []


def test_sides_share_nothing(world):
    folder, _ = world
    assert not {d['text'] for d in documents(folder, 'train')} & {d['text'] for d in documents(folder, 'val')}
    asked = {
        side: {
            m['content']
            for kind in ('chat', 'preferences', 'prompts')
            for row in rows(folder / f'{kind}_{side}.jsonl')
            for m in row['messages']
            if m['role'] == 'user'
        }
        for side in ('train', 'val')
    }
    assert asked['train'] and asked['val'] and not asked['train'] & asked['val']


def test_val_facts_are_told_but_never_asked(world):
    folder, g = world
    asked = ' '.join(
        m['content']
        for kind in ('chat', 'preferences', 'prompts')
        for row in rows(folder / f'{kind}_train.jsonl')
        for m in row['messages']
        if m['role'] == 'user'
    ) + ' '.join(d['text'] for d in documents(folder))
    for fact in g['town']['facts']['val']:
        for question in fact['ask']:
            assert toytown.expand(question, dict(fact), None) not in asked
    told = sum(
        f"{fact['name']}" in d['text'] and fact[fact['relation']] in d['text']
        for fact in g['town']['facts']['val']
        for d in documents(folder)
    )
    assert told > len(g['town']['facts']['val'])


def test_checks_are_met_by_good_answers_and_rankings_are_valid(world):
    folder, g = world
    for row in rows(folder / 'preferences_train.jsonl'):
        assert len(set(row['completions'])) == len(row['completions']) and len(row['ranking']) >= 2
        assert set(row['ranking']) <= set(range(len(row['completions'])))
    limits = [row['checks'] for row in rows(folder / 'prompts_train.jsonl')]
    assert all('max_words' in checks or 'equals' in checks for checks in limits)
    for row in rows(folder / 'chat_train.jsonl'):
        assert row['messages'][-1]['role'] == 'assistant'
        assert all(len(m['content'].split()) <= 60 for m in row['messages'])
    for row in rows(folder / 'benchmarks' / 'toytown_facts.jsonl'):
        assert len(set(row['choices'])) == 4 and 0 <= row['gold'] < 4


def test_expand():
    expand = toytown.expand
    slots = {'name': 'Anna Baker', 'pet': ['owl', 'cat']}
    assert expand('{name}: a {pet:a}, a {pet:b}, {Pet:a}', slots, random.Random(0)) in (
        'Anna Baker: an owl, a cat, Owl',
        'Anna Baker: a cat, an owl, Cat',
    )
    with pytest.raises(SystemExit, match='nosuchlist'):
        expand('{nosuchlist}', {}, random.Random(0))


PAGE = '''<!doctype html><html><head><title>No</title>
<style>p { color: red }</style><script>if (a < b) document.write("<p>No</p>")</script></head>
<body class="no-sidebar"><div id="cookie-banner">No cookies</div><nav><a href=1>No</a></nav>
<div><a href=1>No</a> | <a href=2>No</a></div><h1>Title</h1><p>First &amp; <b>bold</b>
text with <a href=x>one link</a>.<p>Caf&eacute;&nbsp;&#8212; <!-- no -->second<br>line.</p>
<ul><li>one<li>two</ul><pre>  a
    b</pre></b></div><aside>No</aside><p class="advert">No<p>Last.<footer>No</footer></body>'''


def test_main_text_of_a_page(world):
    text = world[1]['html_to_text'](PAGE).replace('\xa0', ' ')
    assert (
        text.strip()
        == 'Title\n\nFirst & bold text with one link.\n\nCafé — second\nline.\n\n- one\n- two\n\n  a\n    b\n\nLast.'
    )


@pytest.mark.parametrize(
    'page',
    [
        '<div>' * 100_000 + 'deep',
        '<' * 2000,
        '<p>cut <a href="',
        '<![CDATA[x',
        '<!doctype',
        '</p>' * 1000 + 'x',
        '',
        '<script>never closed',
        '&#xffffffff; &#0; &nosuch;',
        '<p\x00>nul',
        '<table><tr><td>' * 2000,
    ],
)
def test_broken_pages_are_no_crash(world, page):
    assert isinstance(world[1]['html_to_text'](page), str)


def test_charsets(world):
    decode = world[1]['decode']
    for raw, header in (
        ('Café'.encode(), ''),
        ('Café'.encode(), 'text/html; charset=UTF-8'),
        ('Café'.encode('cp1252'), 'text/html; charset=iso-8859-1'),
        ('Café'.encode('cp1252'), 'text/html'),
        ('Café'.encode('utf-16'), ''),
        ('\ufeffCafé'.encode(), ''),
        ('Café'.encode('cp1252'), 'text/html; charset=nosuchcharset'),
        ('Café'.encode(), 'charset="rot13"'),
    ):
        assert decode(raw, header) == 'Café', (raw, header)
    assert decode('<meta charset=koi8-r>Кафе'.encode('koi8-r')).endswith('Кафе')


PRIVATE = [
    'jo.doe+x@mail.example.org',
    '4111 1111 1111 1111',
    '4222-2222-2222-2',
    '378282246310005',
    '3400 000000 00009',
    '123-45-6789',
    '(212) 555-0123',
    '+44 20 7946 0958',
    '212-555-0123',
    '8.8.8.8',
    '12 Harbour Street',
    '7 North Kingsley Road',
]
TRAPS = [
    'version 8.8.8.8',
    '192.168.1.1',
    '4111 1111 1111 1112',
    'ISBN 978-0-306-40615-7',
    '2024-05-17',
    '$1,299.00',
    'in 1999 Harbour Street',
    '1990 1991 1992',
    '51.5074, -0.1278',
    '@toytown',
    '3.10.12',
    '10:30-11:45',
    'Harbour Street',
]


def test_personal_data_and_what_only_looks_so(world):
    pii = world[1]['pii_step']
    for private in PRIVATE:
        doc = {'text': f'It was {private}, they said. Then they left {private}.'}
        pii(doc)
        assert doc['found'] == [private] * 2 and private not in doc['text'], (private, doc)
    doc = {'text': '. '.join(TRAPS) + '.'}
    pii(doc)
    assert doc['found'] == []


@pytest.mark.parametrize('after', [' 12/27', ' 10 times', ' 2027', ', 4 cards', ' 4111111111111111'])
@pytest.mark.parametrize('card', ['4111111111111111', '4111 1111 1111 1111', '3400-000000-00009'])
def test_a_card_is_found_whatever_number_follows(world, card, after):
    doc = {'text': f'Paid with {card}{after} today.'}
    world[1]['pii_step'](doc)
    assert doc['found'][0] == card and '<CARD>' in doc['text'] and card not in doc['text']


def test_patterns_take_linear_time(world):
    """A megabyte without a blank, as minified files have it: quadratic patterns would take hours."""
    doc = {'text': 'a.' * 500_000 + '1-' * 200_000 + '+1 ' * 1000}
    world[1]['pii_step'](doc)
    assert doc['found'] == []


def test_duplicates(tmp_path):
    base = story('books', 'dogs', 'lamps', 'chairs', 'tools')
    near, other = base.replace('dogs', 'cats') + 'The end.', ' '.join(
        f'word{i} and the thing{i} of it.' for i in range(60)
    )
    rows_in = [{'text': t} for t in (base, base, near, other, story('x', 'y').upper()[:200] + other[::-1])]
    run(
        tmp_path / 'out',
        source='files',
        files=write(tmp_path / 'a.jsonl', rows_in),
        filters='dedup',
        val_fraction=0.5,
    )
    assert funnel(tmp_path / 'out')['dropped']['dedup'] == {'exact': 1, 'near': 1}
    run(tmp_path / 'all', source='files', files=tmp_path / 'a.jsonl', filters='dedup', val_fraction=0.5,
        near_duplicate=1.0)
    assert funnel(tmp_path / 'all')['dropped']['dedup'] == {'exact': 1} # the setting is heard


def test_language_and_quality(world):
    g = world[1]
    english, doc = FILLER.format(
        'dogs'
    ) + 'In spring the apple trees were white, and the children of the street came to play.', lambda text: {
        'text': text,
        'source': 'web',
    }
    spanish = 'El perro de mi hermana vive en la casa y no tiene prisa, porque hace buen tiempo. ' * 3
    scots = 'De hond van mijn zus woont in het oude huis en heeft geen haast, want het is mooi weer. ' * 3
    assert (
        g['language_step'](doc(english)) is None
        and g['language_step'](doc(english + ' "El perro de mi hermana," he said.')) is None
    )
    assert (
        g['language_step'](doc(spanish))
        and g['language_step'](doc(scots))
        and g['language_step'](doc('猫は家にいる'))
    )

    def reason(text):
        """Of the steps in their order, the first that drops a page, and why."""
        page = doc(text)
        for name in ('repetition', 'quality', 'c4', 'fineweb'):
            if why := g[f'{name}_step'](page):
                return f'{name}: {why}'
        return page['text']

    five = english.replace(', and', '. And').replace(', but', '. But')
    assert reason(' '.join(five.split()[:50]) + '.').startswith('The old')  # just at the floor
    spell = lambda i: ''.join('abcdefghij'[int(d)] for d in str(i))  # numbers as words
    lines = lambda form, n: ''.join('\n' + ' '.join(f'{w}{spell(100 * i)}' for w in form.split()) for i in range(n))
    bad = {
        'quality: number of words': 'Too short.',
        'c4: lorem ipsum': five + ' Lorem ipsum.',
        'c4: curly bracket': five + ' It is {name}.',
        'c4: few sentences': english.replace('.', ',') + ' It was so.',
        'quality: symbols': five + ''.join(f' #lantern{spell(i)}' for i in range(20)),
        'repetition: repeated lines': (five[:90] + '\n') * 9,
        'repetition: repeated 2-grams': 'the shop ' + ' '.join(f'the shop {spell(i)}' for i in range(40)),
        'repetition: repeated 5-grams': ' '.join(
            map(spell, [*range(100, 200), *range(10, 20), *range(110, 120), *range(150, 160), *range(180, 190)])
        ),
        'quality: stop words': ' '.join(f'cheap{spell(i)} lantern{spell(i)}' for i in range(30)),
        'quality: letters': five + ''.join(f' {i}' for i in range(30)),
        'fineweb: short lines': five
        + ''.join(f'\n{spell(i)} {spell(2 * i)} {spell(3 * i)}.' for i in range(400, 420)),
        'fineweb: punctuation': five + lines('lovely garden and the tallest tree', 20),
    }
    assert {why: reason(text) for why, text in bad.items()} == {why: why for why in bad}
    page = doc('Please enable JavaScript.\n' + five)
    assert g['c4_step'](page) is None and 'JavaScript' not in page['text']


def test_url(world):
    step = lambda url: world[1]['url_step']({'url': url, 'html': b''})
    assert (
        step('http://10.2.3.4:80/x')
        and step('https://a.spamfarm.example/')
        and step('http://x.example/best-casino')
        and step('http://[::1]/')
    )
    assert not any(
        map(
            step,
            (
                'https://essex.example/sextant',
                'https://notspamfarm.example/',
                'http://x.example/1.2.3.4',
                'folder/casino.html',
            ),
        )
    )


def test_a_cut_warc_and_junk_in_it(world, tmp_path):
    whole = (world[0] / 'raw' / 'web_00000.warc.gz').read_bytes()
    (tmp_path / 'cut.warc.gz').write_bytes(whole[: len(whole) // 2])
    (tmp_path / 'junk.warc').write_bytes(
        b'junk\r\nWARC/1.0\r\nWARC-Type: response\r\nContent-Length: 99999\r\n\r\nHTTP/1.1 200 OK\r\n\r\nshort'
    )
    (tmp_path / 'no.warc.gz').write_bytes(b'no gzip')
    run(tmp_path / 'out', source='files', files=f"{tmp_path}/*.warc*")
    assert funnel(tmp_path / 'out')['skipped'] == {'damaged WARC file': 2, 'WARC record cut short': 1}
    assert len(documents(tmp_path / 'out')) > 50


TALK = [{'role': 'user', 'content': 'Hi %d'}, {'role': 'assistant', 'content': 'Hello.'}]


def test_files_of_every_form(tmp_path):
    n = range(30)
    talk = lambda i: [dict(m, content=m['content'].replace('%d', str(i))) for m in TALK]
    write(
        tmp_path / 'notes.txt',
        '\n\n'.join(
            story(f'a{i}', f'b{i}') + ' '.join(f'{w}{i}' for w in 'one two three four five six seven'.split())
            for i in n
        ),
    )
    write(
        tmp_path / 'marks.md',
        '<|endoftext|>'.join(' '.join(f'{w}{i} is the one of {i}.' for w in 'red green blue'.split()) for i in n),
    )
    write(tmp_path / 'page.html', PAGE)
    write(
        tmp_path / 'text.jsonl',
        [{'text': f'The number {i} of the list\ud800 is{i} here{i} and there{i}.'} for i in n],
    )
    write(tmp_path / 'talk.jsonl', [{'messages': talk(i)} for i in n])
    write(
        tmp_path / 'alpaca.jsonl',
        [{'prompt': f'Below is.\n\n### Instruction:\nDo {i}.\n\n### Response:\n', 'response': 'Done.'} for i in n],
    )
    write(
        tmp_path / 'gsm.jsonl',
        [{'question': f'What is {i}+{i}?', 'answer': f'It is <<{i}+{i}={2 * i}>>{2 * i}\n#### 1,{i:03d}'} for i in n],
    )
    write(
        tmp_path / 'hh.jsonl',
        [
            {
                'chosen': f'\n\nHuman: Q{i}\n\nAssistant: A\n\nHuman: B\n\nAssistant: good',
                'rejected': f'\n\nHuman: Q{i}\n\nAssistant: A\n\nHuman: B\n\nAssistant: bad',
            }
            for i in n
        ],
    )
    write(
        tmp_path / 'rank.jsonl',
        [dict(messages=talk(i)[:1], completions=['a', 'b', 'c'], ranking=[2, 0], checks={'equals': 'c'}) for i in n],
    )
    write(tmp_path / 'checks.jsonl', [{'messages': talk(i)[:1], 'checks': {'max_words': 3}} for i in n])
    write(tmp_path / 'quiz.jsonl', [{'query': 'q', 'choices': ['a', 'b'], 'gold': 0}])
    write(tmp_path / 'cloze.jsonl', [{'context': 'c', 'continuation': 'd'}])
    out = tmp_path / 'out'
    run(out, source='files', files=tmp_path, filters='dedup', val_fraction=0.3)
    texts, chats = [d['text'] for d in documents(out)], [
        c['messages'] for s in ('train', 'val') for c in rows(out / f'chat_{s}.jsonl')
    ]
    assert (
        any(t.startswith('Title') for t in texts)
        and not any('<|endoftext|>' in t for t in texts)
        and not any('\ud800' in t for t in texts)
    )
    assert {d['source'] for d in documents(out)} == {'notes', 'marks', 'page', 'text'}
    assert (
        len(chats) == 90
        and [{'role': 'user', 'content': 'Do 7.'}, {'role': 'assistant', 'content': 'Done.'}] in chats
    )
    assert [
        {'role': 'user', 'content': 'What is 7+7?'},
        {'role': 'assistant', 'content': 'It is 14\n#### 1,007'},
    ] in chats
    ranked, prompts = (
        [r for s in ('train', 'val') for r in rows(out / f'{k}_{s}.jsonl')] for k in ('preferences', 'prompts')
    )
    assert (
        len(ranked) == 60
        and {'completions': ['good', 'bad'], 'ranking': [0, 1]}.items()
        <= next(r for r in ranked if len(r['messages']) == 3).items()
    )
    assert sum(r.get('checks') == {'equals': 'c'} for r in ranked) == 30  # reward.py scores the gold order with them
    assert len(prompts) == 90 and {'number': 1007.0} in [p.get('checks') for p in prompts]
    assert (out / 'benchmarks' / 'quiz.jsonl').exists() and (out / 'benchmarks' / 'cloze.jsonl').exists()


@pytest.mark.parametrize(
    'name, text, message',
    [
        ('a.jsonl', '{"text": "fine"}\nnot json\n', r'a\.jsonl:2'),
        ('a.jsonl', [{'messages': TALK[:1]}], r'a\.jsonl:1: .*no assistant turn'),
        ('a.jsonl', [{'messages': [{'role': 'robot', 'content': 'x'}]}], r'a\.jsonl:1: .*roles'),
        ('a.jsonl', [{'messages': 'x'}], r'a\.jsonl:1: '),
        ('a.jsonl', [{'text': 5}], r'a\.jsonl:1: '),
        ('a.jsonl', [{'what': 1, 'is': 2}], r'a\.jsonl:1: no known form has the keys is, what'),
        ('a.jsonl', [{'messages': TALK[:1], 'completions': ['a', 'b'], 'ranking': [0, 5]}], r'a\.jsonl:1: ranking'),
        ('a.jsonl', [{'chosen': 'x', 'rejected': 'y'}], r'a\.jsonl:1: not a dialogue'),
        ('a.jsonl', [{'messages': [{'role': '', 'content': ''}, *TALK]}], r'a\.jsonl:1: '),
        ('a.jsonl', [dict(messages=TALK[:1], completions=['a', None], ranking=[0, 1])], r'a\.jsonl:1: ranking'),
        ('a.jsonl', [dict(messages=TALK[:1], completions=['a', 'b'], ranking=[0.0, True])], r'a\.jsonl:1: ranking'),
        ('a.jsonl', [dict(messages=TALK[:1], checks={'max_words': 'x'})], r'a\.jsonl:1: a check'),
        ('a.jsonl', '[' * 100_000, r'a\.jsonl:1: not a JSON line'),
        ('a.jsonl', '', 'nothing is in there'),
        ('a.jsonl', [{'messages': TALK}], r'too few'),
        ('a.txt', '', 'no document is left|nothing'),
        ('a.txt', 'Too short.', 'no document is left'),
        ('a.exe', 'x', 'of a known kind'),
        ('a.bin', 'x', r'a\.bin is no token shard'),
        ('a.jsonl.gz', 'no gzip', r'a\.jsonl\.gz'),
    ],
)
def test_bad_input_is_one_line_and_leaves_the_old_data_whole(tmp_path, name, text, message):
    out = tmp_path / 'out'
    out.mkdir()
    write(out / 'chat_train.jsonl', 'old')
    with pytest.raises(SystemExit, match=message) as stopped:
        run(out, source='files', files=write(tmp_path / name, text))
    assert '\n' not in str(stopped.value) and contents(out) == {
        'chat_train.jsonl': hashlib.sha256(b'old').hexdigest()
    }


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(source='toytwon'), 'toytwon'),
        (dict(filters='url,speling'), 'speling'),
        (dict(val_fraction=0), 'val_fraction'),
        (dict(source='files'), 'no files'),
        (dict(source='files', files='nosuch*.txt'), 'no file nosuch'),
        (dict(world='no.json'), 'no.json'),
        (dict(n_people=2), 'n_people'),
        (dict(seed=-1), 'seed must be at least 0'),
        (dict(flaw_rate=2.0), 'flaw_rate'),
        (dict(shard_bytes=0), 'shard_bytes must be at least 1'),
        (dict(SMALL, mixture='web:x'), 'mixture'),
        (dict(SMALL, mixture='web:1,boks:1'), 'boks'),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, **settings)


def test_the_input_is_never_replaced_by_what_is_made_of_it(tmp_path):
    text = ' '.join(f'word{i}' for i in range(5000)).replace('0 ', '0.\n\n')
    kept = write(tmp_path / 'raw' / 'mine.txt', text)  # the name of a folder that only toytown makes
    run(tmp_path, source='files', files=kept, filters='dedup', val_fraction=0.4)
    assert kept.read_text() == text and documents(tmp_path)
    lost = write(tmp_path / 'benchmarks' / 'mine.txt', text)
    with pytest.raises(SystemExit, match='would be replaced.*move it'):
        run(tmp_path, source='files', files=lost, filters='dedup', val_fraction=0.4)
    assert lost.read_text() == text


def test_names_that_look_like_patterns(tmp_path):
    text = '\n\n'.join(f'word{i} ' * 50 for i in range(200))
    run(tmp_path / 'out', source='files', files=write(tmp_path / '[x].txt', text), filters='dedup', val_fraction=0.4)
    assert documents(tmp_path / 'out')


def test_extreme_shares_of_facts(tmp_path):
    for share in (0.001, 0.999):
        assert all(
            toytown.load(str(ROOT / 'config/toytown.json'), 1, 8, share)[k][side]
            for k in ('facts', 'sums')
            for side in ('train', 'val')
        )


def test_mixture_and_stale_files(tmp_path):
    write(tmp_path / 'chat_train.jsonl', 'from an earlier run')
    lines = lambda word: [{'text': ' '.join(f'{word}{i}x{j}' for j in range(40))} for i in range(200)]
    files = f"{write(tmp_path / 'a.jsonl', lines('one'))},{write(tmp_path / 'b.jsonl', lines('two'))}"
    run(tmp_path, source='files', files=files, filters='dedup', mixture='a:0.8,b:0.2')
    taken = funnel(tmp_path)['mixture']['text']
    share = taken['a'] / sum(taken.values())
    assert abs(share - 0.8) < 0.01 and len(documents(tmp_path)) == 250
    assert not (tmp_path / 'chat_train.jsonl').exists()


@pytest.mark.skipif(not REAL.exists(), reason='no real files at hand')
def test_real_files(tmp_path):
    names = (
        'shakespeare.txt',
        'dolly_hhrlhf_small.jsonl',
        'hh_harmless_base_test.jsonl.gz',
        'gsm8k_test.jsonl',
        'core/arc_easy.jsonl',
        'web/*.warc.gz',
    )
    run(tmp_path, source='files', files=','.join(f'{REAL}/{name}' for name in names))
    assert sum(d['source'] == 'shakespeare' for d in documents(tmp_path)) > 200
    assert sum(len(rows(tmp_path / f'preferences_{side}.jsonl')) for side in ('train', 'val')) == 2308
    assert funnel(tmp_path)['skipped']['turns in another order than user, assistant'] == 4  # of 2,312


def test_ctrl_c_leaves_the_old_data_whole(tmp_path):
    write(tmp_path / 'chat_train.jsonl', 'old')
    child = subprocess.Popen(
        [sys.executable, '-u', SCRIPT, f'--data_dir={tmp_path}'],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    child.stdout.readline()
    while not (tmp_path / '.partial').exists():
        time.sleep(0.05)
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=20)
    assert child.returncode and 'Traceback' not in errors and 'stopped' in errors
    assert {p.name for p in tmp_path.iterdir()} == {'chat_train.jsonl', '.partial'}  # where the next run goes on


def crowd(folder, n_files=5):
    """Files of 400 KB each, whose texts are in part the same, or nearly; -> their pattern."""
    rng, old = random.Random(5), []
    vocabulary = [''.join(rng.choices('abcdefghijklmnopqrstuvwxyz', k=7)) for _ in range(5000)]
    for i in range(n_files):
        texts = []
        for _ in range(500):
            words = rng.choices(vocabulary, k=100)
            if old and rng.random() < 0.3:  # a copy of an earlier one, of this file or another; half of them changed
                words = list(rng.choice(old))
                words[50] = rng.choice(vocabulary) if rng.random() < 0.5 else words[50]
            old.append(words)
            texts.append({'text': ' '.join(words) + '.'})
        write(folder / f'part{"abcdef"[i]}.jsonl', texts)
    write(
        folder / 'talk.jsonl',
        [{'messages': [dict(m, content=m['content'].replace('%d', str(i))) for m in TALK]} for i in range(100)],
    )
    return f'{folder}/*.jsonl'


def processes(n, folder, files, **more):
    """n gloo processes, as torchrun starts them; -> their exit codes and what they printed."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    flags = dict(dict(source='files', files=files, data_dir=folder, filters='dedup,pii'), **more)
    command = [sys.executable, SCRIPT, *(f'--{k}={v}' for k, v in flags.items())]
    env = dict(os.environ, WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    started = [
        subprocess.Popen(
            command, env=dict(env, RANK=str(r)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for r in range(n)
    ]
    return [(child.communicate(timeout=100)[0], child.returncode) for child in started]


def test_any_number_of_processes_writes_the_same(tmp_path):
    files, found = crowd(tmp_path / 'in'), []
    for n in (1, 2, 3):
        for said, code in processes(n, tmp_path / f'out{n}', files):
            assert code == 0, said
        found.append(contents(tmp_path / f'out{n}'))
    assert found[0] == found[1] == found[2] and len(documents(tmp_path / 'out1')) > 1000
    drop = funnel(tmp_path / 'out3')
    drop.pop('seconds')
    assert drop == {k: v for k, v in funnel(tmp_path / 'out1').items() if k != 'seconds'}
    assert drop['dropped']['dedup']['exact'] > 200 and drop['dropped']['dedup']['near'] > 200  # across files too
    texts = [d['text'] for d in documents(tmp_path / 'out1')]
    assert len(texts) == len(set(texts)) == drop['steps']['pii']['docs_out']


def test_another_rank_than_the_first_says_its_error(tmp_path):
    files = crowd(tmp_path / 'in')
    (tmp_path / 'in' / 'partb.jsonl').write_text('not json\n' + (tmp_path / 'in' / 'partb.jsonl').read_text())
    said = ' '.join(said for said, _ in processes(2, tmp_path / 'out', files))
    assert 'partb.jsonl:1: not a JSON line' in said


@pytest.mark.parametrize('kill_at', ['kept', 'clean', 'mixed', 'copies', 'times'])
def test_killed_and_started_again(tmp_path, kill_at, scripts):
    """SIGKILL after the first group of a pass, or in what rank 0 does between two: nothing is lost or doubled."""
    flags = ['--source=files', f'--files={crowd(tmp_path / "in")}', '--filters=dedup']
    scripts.ok('prepare_data.py', *flags, f'--data_dir={tmp_path / "whole"}')
    before = f'''
import os, model, pathlib
old, touch = model.write_jsonl, pathlib.Path.touch
def write(path, rows):
    old(path, rows)
    if path.endswith('{kill_at}.json'):
        os.kill(os.getpid(), 9)
def stop(path):
    if path.name == '{kill_at}':
        os.kill(os.getpid(), 9)
    touch(path)
model.write_jsonl, pathlib.Path.touch = write, stop
'''
    killed = scripts('prepare_data.py', *flags, f'--data_dir={tmp_path / "out"}', before=before)
    assert killed.code != 0 and not (tmp_path / 'out' / 'train').exists()
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / 'out' / '.partial' / 'work').glob('*.json')}
    assert stamps
    after = f"import json, os; print(json.dumps([p for p in {[str(p) for p in stamps]} if os.path.exists(p)]))"
    scripts.ok('prepare_data.py', *flags, f'--data_dir={tmp_path / "out"}', after=after)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')
    assert not (tmp_path / 'out' / '.partial').exists()


def test_a_source_that_runs_dry_is_repeated(tmp_path):
    """a has 1/10 of the bytes of b, and is to have half: it is taken 4 times, b 4/10 of it. 4 + 4 = half and half."""
    lines = lambda word, n: [{'text': ' '.join(f'{word}{i}x{j}y' for j in range(40))} for i in range(n)]
    files = f"{write(tmp_path / 'a.jsonl', lines('one', 1000))},{write(tmp_path / 'b.jsonl', lines('two', 10000))}"
    run(tmp_path / 'out', source='files', files=files, filters='dedup', mixture='a:0.5,b:0.5', max_epochs=4)
    train, val = (collections.Counter(d['text'] for d in documents(tmp_path / 'out', s)) for s in ('train', 'val'))
    assert {n for text, n in train.items() if text.startswith('one')} == {4}
    assert {n for text, n in train.items() if text.startswith('two')} == {1} and set(val.values()) == {1}
    taken = funnel(tmp_path / 'out')['mixture']['text']
    assert abs(taken['a'] / sum(taken.values()) - 0.5) < 0.03  # val is never repeated: 5% of a counts once
    assert not set(train) & set(val)


def test_exam_questions_go(tmp_path):
    """A text with thirteen words in a row of a question goes; with twelve it stays; so for conversations."""
    question = ' '.join(f'asked{i}' for i in range(20))
    pages = [{'text': f'{i} ' + ' '.join(f'told{i}x{j}' for j in range(30))} for i in range(60)]
    pages[0]['text'] += ' ' + ' '.join(question.split()[3:16]).upper() + '!'
    pages[1]['text'] += ' ' + ' '.join(question.split()[3:15])
    write(tmp_path / 'in' / 'pages.jsonl', pages)
    write(tmp_path / 'in' / 'exam.jsonl', [dict(query=question, choices=['a', 'b'], gold=0)])
    write(
        tmp_path / 'in' / 'talk.jsonl',
        [{'messages': [dict(TALK[0], content=f'{i} {question if i == 7 else "hello"}'), TALK[1]]} for i in range(60)],
    )
    run(tmp_path / 'out', source='files', files=tmp_path / 'in', filters='dedup,decontaminate', val_fraction=0.3)
    texts, chats = {d['text'][:2] for d in documents(tmp_path / 'out')}, [
        r for s in ('train', 'val') for r in rows(tmp_path / 'out' / f'chat_{s}.jsonl')
    ]
    assert len(texts) == 59 and '0 ' not in texts and '1 ' in texts and len(chats) == 59
    assert funnel(tmp_path / 'out')['dropped']['decontaminate'] == {'question of exam': 1}
    assert [r['reason'] for r in rows(tmp_path / 'out' / 'dropped.jsonl')] == ['question of exam']


def test_block_lists_languages_and_dropped_pages(tmp_path):
    listed = write(tmp_path / 'hosts.txt', '# bad ones\n0.0.0.0 bad.example\nworse.example\n')
    text = lambda i: story(*(f'a{i}b{j}' for j in range(4))) + ' '.join(f'w{i}x{j}' for j in range(40)) + '.'
    pages = [
        dict(text=text(i), url=f'http://{host}/{i}')
        for i, host in enumerate(['a.bad.example', 'worse.example', 'notworse.example'] + ['good.example'] * 40)
    ]
    pages[5]['text'] += ' My number is 078-05-1120.'
    pages[6]['text'] = 'Der Hund meiner Schwester lebt in dem Haus und hat keine Eile, weil das Wetter gut ist. ' * 2
    run(
        tmp_path / 'out',
        source='files',
        files=write(tmp_path / 'p.jsonl', pages),
        blocked_hosts=f'x.example,{listed}',
        filters='url,language,pii',
        drop_private='SSN',
        languages='en',
        val_fraction=0.3,
    )
    drop = funnel(tmp_path / 'out')['dropped']
    assert drop['url'] == {'blocked host': 2} and drop['pii'] == {'has SSN': 1} and drop['language'] == {'de': 1}
    run(tmp_path / 'both', source='files', files=tmp_path / 'p.jsonl', filters='language', languages='en,de')
    assert funnel(tmp_path / 'both')['dropped']['language'] == {}
