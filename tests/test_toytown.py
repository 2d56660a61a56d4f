"""toytown.py: the grammar, the people and sums, what is planted, the two sides, and the swap of the folders."""
import collections
import gzip
import hashlib
import json
import re
import shutil
import zlib

import pytest

from conftest import ROOT, definitions, fails
from model import grade

WORLD = ROOT / 'config/toytown.json'
SMALL = dict(n_people=12, n_pages=60, n_books=5, n_lessons=8, n_faults=10, n_chat=60,
             n_preferences=30, n_prompts=40, n_val=10)
FLAGS = [f'--{name}={value}' for name, value in SMALL.items()]

def rows(path):
    open_file = gzip.open if path.suffix == '.gz' else open
    with open_file(path, 'rt', encoding='utf-8') as f:
        return [json.loads(line) for line in f]

def contents(folder):
    """{relative path: bytes} of all files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}

def members(path):
    """The gzip members of a file, decompressed."""
    raw = path.read_bytes()
    while raw:
        decoder = zlib.decompressobj(31)
        yield decoder.decompress(raw)
        raw = decoder.unused_data

@pytest.fixture(scope='module')
def town(scripts, tmp_path_factory):
    folder = tmp_path_factory.mktemp('town') / 'raw'
    scripts.ok('toytown.py', f'--town_dir={folder}', *FLAGS)
    return folder

@pytest.fixture(scope='module')
def other_town(scripts, tmp_path_factory):
    folder = tmp_path_factory.mktemp('other') / 'raw'
    scripts.ok('toytown.py', f'--town_dir={folder}', '--seed=7', *FLAGS)
    return folder

# -----------------------------------------------------------------------------
# functions

def test_expand():
    toytown = definitions('toytown.py')
    expand = toytown.expand
    slots = {'name': 'Anna', 'animal': ['{size} owl', 'fox'], 'size': ['tiny']}
    text = expand('{Animal:a} saw a {animal:b}. {name} saw the {animal:a}.', slots)
    assert text in ('Tiny owl saw a fox. Anna saw the tiny owl.', 'Fox saw a tiny owl. Anna saw the fox.')
    # every entry once before any twice
    drawn = expand(' '.join(['{day}'] * 8), dict(day=['1', '2', '3', '4'])).split()
    assert sorted(drawn[:4]) == sorted(drawn[4:]) == ['1', '2', '3', '4']
    # the inner slot names the list of the outer one; a vowel makes `an` of `a`
    assert expand('{kind:k}: a {{kind:k}:1}', dict(kind=['birds'], birds=['owl'])) == 'birds: an owl'
    with fails(r'no word list or fact for \{nothing:a\}'):
        expand('one {nothing:a}', {})

def test_moves_change_what_a_page_is_about():
    toytown = definitions('toytown.py')
    slots = dict(name='Anna', next=[dict(name='Bela')], new=[dict(scope=1)], animal=['owl', 'fox'])
    assert toytown.expand('{name}, {next}{name}', slots) == 'Anna, Bela'
    first, second = toytown.expand('{animal:a} {new}{animal:a}', slots).split()
    assert first != second # the label was forgotten

@pytest.mark.parametrize('share', [0.0, 0.001, 0.3, 0.999, 1.0])
def test_both_sides_have_something(share):
    sides = definitions('toytown.py', val_facts=share).split(list(range(36)))
    assert sides['val'] and sides['train'] and sides['val'] + sides['train'] == list(range(36))

# -----------------------------------------------------------------------------
# what the script writes

def test_outputs_and_the_same_bytes_again(town, other_town, scripts, tmp_path):
    tasks = [f'{kind}_{side}.jsonl' for kind in ('chat', 'preferences', 'prompts') for side in ('train', 'val')]
    assert set(contents(town)) == {
        'web_00000.warc.gz', 'web_00001.warc.gz', 'books.jsonl.gz', 'lessons.txt', 'mixture.json', 'truth.jsonl',
        *(f'benchmarks/toytown_{name}.jsonl' for name in ('facts', 'people', 'sums')), *tasks}
    sizes = dict(chat=(60, 10), preferences=(30, 10), prompts=(40, 15))
    for name in tasks:
        kind, side = name[:-6].split('_')
        assert len(rows(town / name)) == sizes[kind][side == 'val'], name
    assert set(json.loads((town / 'mixture.json').read_text())) == {'web', 'books', 'lessons'}
    scripts.ok('toytown.py', f'--town_dir={tmp_path}/raw/', *FLAGS) # a slash at the end changes nothing
    assert contents(tmp_path / 'raw') == contents(town)
    assert [path.name for path in tmp_path.iterdir()] == ['raw']
    assert contents(other_town)['chat_train.jsonl'] != contents(town)['chat_train.jsonl']

def test_warc_records(town):
    truth = {row['url']: row for row in rows(town / 'truth.jsonl')}
    urls = []
    for part in ('web_00000.warc.gz', 'web_00001.warc.gz'):
        records = list(members(town / part))
        assert b'WARC-Type: warcinfo\r\n' in records[0]
        for record in records:
            head, block = record.split(b'\r\n\r\n', 1)
            length = int(re.search(rb'\r\nContent-Length: (\d+)', head)[1])
            assert head.startswith(b'WARC/1.0\r\n') and block[length:] == b'\r\n\r\n'
        for record in records[1:]:
            head, http, body = record.split(b'\r\n\r\n', 2)
            urls.append(re.search(rb'WARC-Target-URI: (\S+)', head)[1].decode())
            assert http.startswith(b'HTTP/1.1 200 OK\r\nContent-Type: text/html') and b'<title>' in body.lower()
    assert sorted(urls) == sorted(truth) and len(urls) == 60 + 5 * 10

def test_planted_faults(town):
    truth = rows(town / 'truth.jsonl')
    count = collections.Counter(row.get('fault') for row in truth)
    assert count == {None: 60, 'url': 10, 'language': 10, 'quality': 10, 'dedup': 20}
    by_url = {row['url']: row for row in truth}
    five_grams = definitions('toytown.py').five_grams
    exact = 0
    for row in truth:
        assert all(secret in row['text'] for secret in row.get('private', ())) or row.get('fault') == 'dedup'
        if row.get('fault') == 'dedup':
            original = by_url[row['group']]
            assert original['group'] == row['group'] and original['url'] != row['url']
            a, b = five_grams(original['text']), five_grams(row['text'])
            assert len(a & b) >= 0.8 * len(a | b)
            exact += row['text'] == original['text']
    assert exact == 10
    assert sum(bool(row.get('private')) for row in truth if 'fault' not in row) == 10
    spam = [row['url'] for row in truth if row.get('fault') == 'url']
    words = json.loads(WORLD.read_text('utf-8'))['words']
    bad = '|'.join([*words['blocked_host'], *words['blocked_word'], r'//[\d.]+[:/]']).replace('example', 'example\\b')
    assert all(re.search(bad, url) for url in spam)

def test_the_sides_share_nothing_and_facts_of_validation_are_never_asked(town):
    asked = {}
    for side in ('train', 'val'):
        messages = []
        for kind in ('chat', 'preferences', 'prompts'):
            for row in rows(town / f'{kind}_{side}.jsonl'):
                messages += row['messages']
        asked[side] = {turn['content'] for turn in messages if turn['role'] == 'user'}
    assert asked['train'] and asked['val'] and not asked['train'] & asked['val']

    # in few rows none may come twice by luck. The hash of a prompt decides its side: 15% of all prompts are val's
    by_prompt = [task['task'] for task in json.loads(WORLD.read_text('utf-8'))['tasks'] if task['by_prompt']]
    for side in ('train', 'val'):
        found = [row['messages'][0]['content'] for row in rows(town / f'prompts_{side}.jsonl') if row['task'] in by_prompt]
        places = [int(hashlib.sha256(prompt.encode()).hexdigest()[:12], 16) / 16**12 for prompt in found]
        assert places and all((place < 0.15) == (side == 'val') for place in places)

    documents = ' '.join(row['text'] for row in rows(town / 'books.jsonl.gz') + rows(town / 'truth.jsonl'))
    documents += (town / 'lessons.txt').read_text('utf-8')
    told = 0
    for row in rows(town / 'benchmarks/toytown_facts.jsonl'):
        question = row['query'].split('\n')[0].removeprefix('Question: ')
        assert not any(question in text for text in asked['train']) and question not in documents
        assert len(set(row['choices'])) == 4 and all(choice[0] == ' ' for choice in row['choices'])
        told += row['choices'][row['gold']].split()[-1] in documents
    assert told # documents do tell what the questions ask for

def test_benchmarks(town):
    facts, people, sums = (rows(town / f'benchmarks/toytown_{name}.jsonl') for name in ('facts', 'people', 'sums'))
    assert len(facts) == len(people) == round(0.3 * 12 * 6)
    for fact, whose in zip(facts, people):
        assert fact['gold'] == whose['gold'] and len(set(whose['context_options'])) == 4
        name = re.match(r'[A-Z]\w+ [A-Z]\w+|.* of ([A-Z]\w+ [A-Z]\w+)', whose['context_options'][whose['gold']])
        assert (name[1] or name[0]) in fact['query'] # the same fact, seen from both ends
        assert whose['continuation'] in fact['choices'][fact['gold']]
    contexts = [row['context'] for row in sums]
    for row in sums:
        x, y = re.findall(r'\d+', row['context'])
        assert int(x) + int(y) == int(row['continuation'])
        assert f'Question: What is {y} plus {x}?\nAnswer:' in contexts # both orders are on one side
    assert len(set(contexts)) == len(contexts)

def test_rankings_checks_and_answers(town):
    for row in rows(town / 'preferences_train.jsonl'):
        n = len(row['completions'])
        assert len(set(row['completions'])) == n and len(row['ranking']) >= 2
        assert set(row['ranking']) <= set(range(n)) and row['messages'][-1]['role'] == 'user'
    for row in rows(town / 'prompts_train.jsonl'):
        grade(row['checks'], 'any text') # raises for checks that are not valid
        assert '{' not in json.dumps(row['checks'])[1:].replace('{"of"', '')
        assert type(row['checks'].get('number', 0)) is int and type(row['checks'].get('count', {}).get('of', [])) is list
    roles = [[turn['role'] for turn in row['messages']] for row in rows(town / 'chat_train.jsonl')]
    assert all(turns[-2:] == ['user', 'assistant'] for turns in roles)
    assert max(map(len, roles)) >= 4 # some have a second turn

# -----------------------------------------------------------------------------
# the swap of the folders

KILL = '''
import os, shutil, model
def die_at(module, name, number):
    real = getattr(module, name)
    calls = []
    def wrapper(*args, **more):
        calls.append(args)
        if len(calls) == number:
            os._exit(9)
        return real(*args, **more)
    setattr(module, name, wrapper)
die_at({})
'''

@pytest.mark.parametrize('where, left', [
    ('model, "write_jsonl", 4', 'old'), ('os, "rename", 1', 'old'), # while writing; before the swap
    ('os, "rename", 2', 'moved'), ('shutil, "rmtree", 3', 'new')])  # in the middle of it; after it
def test_killed_at_any_moment(where, left, town, other_town, scripts, tmp_path):
    folder = tmp_path / 'raw'
    shutil.copytree(town, folder)
    command = ['toytown.py', f'--town_dir={folder}', *FLAGS, '--seed=7']
    assert scripts(*command, before=KILL.format(where)).code == 9
    # one whole town is left: the old one, in its place or moved aside, or the new one
    assert folder.exists() == (left != 'moved')
    whole = tmp_path / 'raw.replaced' if left == 'moved' else folder
    assert contents(whole) == contents(other_town if left == 'new' else town)
    scripts.ok(*command)
    assert contents(folder) == contents(other_town)
    assert [path.name for path in tmp_path.iterdir()] == ['raw']

FULL_DISK = 'import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); ' \
            'resource.setrlimit(resource.RLIMIT_FSIZE, ({n}, {n}))' # bytes of the largest file

def test_a_full_disk_leaves_the_old_town_whole(town, other_town, scripts, tmp_path):
    folder = tmp_path / 'raw'
    shutil.copytree(town, folder)
    command = ['toytown.py', f'--town_dir={folder}', *FLAGS, '--seed=7']
    for n in (3000, max(path.stat().st_size for path in other_town.rglob('*.*')) - 1):
        scripts.fails(rf'error: {folder}\.partial/\S+: File too large', *command, before=FULL_DISK.format(n=n))
        assert contents(folder) == contents(town)
    scripts.ok(*command)
    assert contents(folder) == contents(other_town) and [path.name for path in tmp_path.iterdir()] == ['raw']

def edited(**changes):
    """The world of config/toytown.json, with changes: a function of it each."""
    world = json.loads(WORLD.read_text('utf-8'))
    for key, change in changes.items():
        world[key] = change(world[key])
    return json.dumps(world)

@pytest.mark.parametrize('changes, message', [
    (dict(tasks=lambda tasks: [dict(tasks[0], prompt=['Hello.'], by_prompt=True)]), "rows for chat_... are found in .*'Hello.'"),
    (dict(rankings=lambda rules: ['{good}']), 'for preferences_train'),
    (dict(words=lambda words: dict(words, page=['A title\n\nToo short.'])), "near copy of the page 'A title.n.nToo short"),
    (dict(words=lambda words: dict(words, page=['Eight words\n\n' + 'a b c d e f.'])), "near copy of the page 'Eight words"),
])
def test_an_edited_town_never_takes_forever(changes, message, scripts, tmp_path):
    (tmp_path / 'world.json').write_text(edited(**changes), encoding='utf-8')
    command = ['toytown.py', *FLAGS, f'--world={tmp_path}/world.json', f'--town_dir={tmp_path}/a']
    scripts.fails(message, *command)
    assert not (tmp_path / 'a').exists()

def test_bad_input_destroys_nothing(scripts, tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    scripts.fails("holds .*notes.txt.*--town_dir", 'toytown.py', f'--town_dir={tmp_path}', *FLAGS)
    assert contents(tmp_path) == {'notes.txt': b'mine'}
    scripts.fails('n_people = 1000', 'toytown.py', f'--town_dir={tmp_path}', *FLAGS, '--n_people=1000')
    assert contents(tmp_path) == {'notes.txt': b'mine'}
    world = tmp_path / 'world.json'
    world.write_text('{"words": [}')
    scripts.fails('world.json is not valid JSON: .*line 1', 'toytown.py', f'--world={world}', f'--town_dir={tmp_path}/a')
    scripts.fails('n_pages must be positive, not 0', 'toytown.py', '--n_pages=0', f'--town_dir={tmp_path}/a')
    scripts.fails('flaw_rate is a share', 'toytown.py', '--flaw_rate=30', f'--town_dir={tmp_path}/a')
