"""prepare_data.py, input: a server that does everything wrong, each public form by hand, files of every kind, WARC."""
import collections
import contextlib
import glob
import gzip
import http.server
import itertools
import json
import os
import random
import re
import shutil
import socket
import struct
import threading
import time
import tracemalloc
import zlib
from types import SimpleNamespace

import pytest
from conftest import definitions, fails

BODY = random.Random(0).randbytes(500_000)
BLOCK = 1 << 15 # at most so much of what came is lost when a connection breaks

# -----------------------------------------------------------------------------
# downloads


class Server(http.server.ThreadingHTTPServer):
    """Answers each request with the next of `script`, the last again and again; `log`: [path, Range, bytes sent]."""
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.log, self.script, self.body, self.bodies, self.hang = [], ['whole'], BODY, {}, threading.Event()
        self.url = f'http://127.0.0.1:{self.server_port}'
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, client):
        pass # a client that hangs up is what some tests want


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, code, headers, body=b'', sent=None):
        self.send_response(code)
        for key, value in dict({'Content-Length': str(len(body))}, **headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body if sent is None else sent)
        self.wfile.flush()

    def do_GET(self):
        s = self.server
        act = s.script.pop(0) if len(s.script) > 1 else s.script[0]
        asked = self.headers['Range']
        row = [self.path, asked, 0]
        s.log.append(row)
        whole = s.bodies.get(self.path, s.body)
        if whole is None:
            act = 404
        if isinstance(act, int):
            return self.answer(act, {})
        if act == 'together': # is not answered before as many requests are there as the barrier waits for
            s.barrier.wait()
        start, last = re.match(r'bytes=(\d+)-(\d*)', asked).groups()
        start, n = 0 if act == 'no ranges' else int(start), len(whole)
        if start >= n:
            return self.answer(416, {'Content-Range': f'bytes */{n}'})
        body = whole[start:int(last) + 1 if last and act != 'no ranges' else n]
        half = body[:len(body) // 2] if act in ('reset', 'stall', 'cut') else body
        row[2] = len(half) # before the client can have it all, and look
        headers = {} if act == 'no ranges' else {'Content-Range': f'bytes {start}-{start + len(body) - 1}/{n}'}
        if act == 'labelled gzip':
            headers['Content-Encoding'] = 'gzip'
        self.answer(200 if act == 'no ranges' else 206, headers, body, half)
        if act == 'stall':
            s.hang.wait(3)
        if act == 'reset': # RST, not FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        self.close_connection = True


@pytest.fixture
def server():
    s = Server()
    yield s
    s.hang.set()
    s.shutdown()
    s.server_close()


def ours(**more):
    return definitions('prepare_data.py', **dict(dict(
        TIMEOUT=(1, 0.4), FIRST_WAIT=0.001, TRIES=4, world_size=1, RANK=0), **more))


def whole_and_clean(path):
    assert path.read_bytes() == BODY and [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize('script', [
    ['cut', 'whole'],
    ['reset', 'whole'],
    ['stall', 'whole'],
    ['cut', 'cut', 'cut', 'whole'],
    [500, 'cut', 429, 'whole'],
])
def test_a_broken_download_continues(server, tmp_path, script):
    server.script = list(script)
    download = ours().download
    download(server.url + '/x', str(tmp_path / 'x'))
    whole_and_clean(tmp_path / 'x')
    assert len(server.log) == len(script)
    if 'reset' not in script: # which may lose all that was on its way
        sent = sum(row[2] for row in server.log)
        assert len(BODY) <= sent <= len(BODY) + BLOCK * len(script) # nothing comes twice but the broken block
    download(server.url + '/x', str(tmp_path / 'x'))
    assert len(server.log) == len(script) # what is there is not asked for again


def test_the_next_run_continues(server, tmp_path):
    server.script = ['cut', 404]
    with fails('HTTP 404'):
        ours().download(server.url + '/x', str(tmp_path / 'x'))
    have = (tmp_path / 'x.500000.part').stat().st_size
    assert len(BODY) // 2 - BLOCK <= have <= len(BODY) // 2
    server.script = ['whole']
    ours().download(server.url + '/x', str(tmp_path / 'x'))
    whole_and_clean(tmp_path / 'x')
    assert server.log[-1][1] == f'bytes={have}-' and server.log[-1][2] == len(BODY) - have


def test_killed_before_the_renaming(server, tmp_path):
    (tmp_path / 'x.500000.part').write_bytes(BODY)
    ours().download(server.url + '/x', str(tmp_path / 'x'))
    whole_and_clean(tmp_path / 'x')
    assert not server.log # it is known to be whole


@pytest.mark.parametrize('name, size', [('x.700000.part', 1000), ('x.700000.part', 600_000), ('x.0.part', 1000)])
def test_a_file_of_another_length_starts_over(server, tmp_path, name, size):
    (tmp_path / name).write_bytes(b'o' * size)
    ours().download(server.url + '/x', str(tmp_path / 'x'))
    whole_and_clean(tmp_path / 'x')


def test_a_server_without_ranges(server, tmp_path):
    server.script = ['cut', 'no ranges']
    ours().download(server.url + '/x', str(tmp_path / 'x'))
    whole_and_clean(tmp_path / 'x')


def test_only_what_may_pass_is_tried_again(server, tmp_path):
    for code in (401, 404, 410):
        server.script, server.log[:] = [code], []
        with fails(f'HTTP {code}.*put the file at .*x yourself, or take {tmp_path.name} out of --source=files'):
            ours().download(server.url + '/x', str(tmp_path / 'x'))
        assert len(server.log) == 1 and not list(tmp_path.iterdir())
    server.script, server.log[:] = [500], []
    with fails('HTTP 500: run the same command later'):
        ours().download(server.url + '/x', str(tmp_path / 'x'))
    assert len(server.log) == 4 # TRIES
    with fails('no://such'):
        ours().download('no://such', str(tmp_path / 'x'))
    with fails('ConnectionError'):
        ours().download('http://127.0.0.1:9/x', str(tmp_path / 'x'))


def test_a_gz_stays_packed(server, tmp_path):
    server.body, server.script = gzip.compress(BODY), ['labelled gzip'] # as Apache labels files that are gzip
    ours().download(server.url + '/x.gz', str(tmp_path / 'x.gz'))
    assert gzip.decompress((tmp_path / 'x.gz').read_bytes()) == BODY


def stocked(server, tmp_path, n=4, **more):
    """-> functions that know one source of n files, and a folder for them."""
    entry = dict(kind='text', urls=[server.url + '/c4-{00..20}-of.gz'], bytes=100, text_bytes=200)
    return ours(SOURCES=dict(c4=entry), raw_dir=f'{tmp_path}/raw', data_dir=f'{tmp_path}/data', n_files=n, **more)


def test_all_ranks_know_the_files_and_several_come_at_once(server, tmp_path):
    lib = stocked(server, tmp_path)
    files = lib.files_of('c4')
    assert files == [('c4', f'{server.url}/c4-0{i}-of.gz', f'{tmp_path}/raw/c4/c4-0{i}-of.gz') for i in range(4)]
    assert files == stocked(server, tmp_path, RANK=1, world_size=2).files_of('c4') and not server.log
    server.script, server.barrier = ['together'], threading.Barrier(4, timeout=20) # one by one would be an error
    lib.fetch(files)
    assert all(open(path, 'rb').read() == BODY for _, _, path in files)
    assert sorted(row[0] for row in server.log) == sorted(2 * [f'/c4-0{i}-of.gz' for i in range(4)]) # look, download
    server.log.clear()
    lib.fetch(files)
    assert not server.log


def test_a_file_that_is_gone_stops_all_before_the_first_download(server, tmp_path):
    lib = stocked(server, tmp_path)
    server.bodies['/c4-03-of.gz'] = None
    with fails(r'c4-03-of\.gz: HTTP 404 .*: put the file at \S*/raw/c4/c4-03-of\.gz yourself, or take c4 out of'):
        lib.fetch(lib.files_of('c4'))
    assert not any((tmp_path / 'raw' / 'c4').iterdir())
    (tmp_path / 'raw' / 'c4' / 'c4-03-of.gz').write_bytes(b'mine') # the advice helps
    lib = stocked(server, tmp_path)
    lib.fetch(lib.files_of('c4'))
    assert len([*(tmp_path / 'raw' / 'c4').iterdir()]) == 4


def test_a_download_that_fails_ends_the_others(server, tmp_path, monkeypatch):
    """One file is gone after it was there; the other would never end."""
    left = threading.Event()

    def endless(handler):
        server.log.append(handler.path)
        if handler.path == '/c4-01-of.gz' and server.log.count(handler.path) > 1:
            while not glob.glob(f'{tmp_path}/raw/c4/c4-00-of.gz.*.part') and not server.hang.wait(0.01):
                pass # until a piece of the other file is here
            return handler.answer(404, {})
        with contextlib.suppress(OSError): # the client hangs up
            headers = {'Content-Range': 'bytes 0-999999999/1000000000', 'Content-Length': '1000000000'}
            handler.answer(206, headers, bytes(1 << 16))
            while server.log.count(handler.path) > 1 and not server.hang.wait(0.01):
                handler.wfile.write(bytes(1 << 15))
            return None
        left.set()
    monkeypatch.setattr(Handler, 'do_GET', endless)
    lib = stocked(server, tmp_path, 2)
    with fails('HTTP 404'):
        lib.fetch(lib.files_of('c4'))
    assert left.wait(5) and len([*(tmp_path / 'raw' / 'c4').glob('c4-00-of.gz.*.part')]) == 1 # continues next time


def test_a_small_disk_is_found_before_the_first_byte(server, tmp_path, monkeypatch):
    """By hand: 3 GB of downloads and 6 GB of text, on one disk and on two."""
    free, disks = dict(raw=8.9e9, data=8.9e9), dict(raw=1, data=1)
    def usage(path):
        return SimpleNamespace(free=free[os.path.basename(path)])
    def stat(path):
        return SimpleNamespace(st_dev=disks[os.path.basename(path)])
    monkeypatch.setattr(shutil, 'disk_usage', usage)
    lib = stocked(server, tmp_path, 1)
    lib.space['os'] = SimpleNamespace(**dict(vars(os), stat=stat))
    files = lib.files_of('c4')
    with fails(r'/data is too small: 9\.0 GB are needed \(downloads 3\.0, corpus and tokens 6\.0\), 8\.9 GB are free: set'):
        lib.check_disk(files, [3_000_000_000])
    free['data'] = 9.1e9
    assert lib.check_disk(files, [3_000_000_000]) == 3_000_000_000
    disks['data'] = 2
    free.update(raw=2.9e9, data=6.1e9)
    with fails(r'/raw is too small: 3\.0 GB are needed'):
        lib.check_disk(files, [3_000_000_000])
    free.update(raw=3.1e9, data=5.9e9)
    with fails(r'/data is too small: 6\.0 GB are needed'):
        lib.check_disk(files, [3_000_000_000])
    lib.space['os'] = os
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=1000))
    with fails('too small'):
        lib.fetch(files)
    assert not any((tmp_path / 'raw' / 'c4').iterdir())
    lib.SOURCES['c4']['kind'] = 'chat' # only of text is a corpus made
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=len(BODY)))
    ours(SOURCES=lib.SOURCES, raw_dir=f'{tmp_path}/raw', data_dir=f'{tmp_path}/data').fetch(files)
    assert (tmp_path / 'raw' / 'c4' / 'c4-00-of.gz').read_bytes() == BODY


@pytest.mark.parametrize('act', ['whole', 'no ranges', 'cut'])
def test_first_bytes_have_a_folder_of_their_own(server, tmp_path, act):
    server.script = [act, act, 'whole'] if act == 'cut' else [act]
    lib = stocked(server, tmp_path, 1, first_bytes=100_000)
    files = lib.files_of('c4')
    lib.fetch(files)
    cut = tmp_path / 'raw' / 'first_100000' / 'c4' / 'c4-00-of.gz'
    assert cut.read_bytes() == BODY[:100_000] and [path.name for path in cut.parent.iterdir()] == [cut.name]
    server.script = ['whole']
    lib = stocked(server, tmp_path, 1)
    lib.fetch(lib.files_of('c4'))
    assert (tmp_path / 'raw' / 'c4' / 'c4-00-of.gz').read_bytes() == BODY # whole
    lib = stocked(server, tmp_path, 1, first_bytes=10**9) # a file may be shorter
    lib.fetch(lib.files_of('c4'))
    assert (tmp_path / 'raw' / 'first_1000000000' / 'c4' / 'c4-00-of.gz').read_bytes() == BODY
    entry = dict(kind='tokens', urls=[server.url + '/train.bin'])
    with fails('first_bytes: a part of train.bin is of no use: leave fineweb out'):
        ours(SOURCES=dict(fineweb=entry), first_bytes=5).files_of('fineweb')


def test_a_mirror(server, tmp_path):
    lib = ours(raw_dir=str(tmp_path), mirror=server.url + '/')
    lib.fetch(lib.files_of('gsm8k'))
    path = '/raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/train.jsonl'
    assert {row[0] for row in server.log} == {path} and (tmp_path / 'gsm8k' / 'train.jsonl').read_bytes() == BODY
    server.bodies[path] = None
    (tmp_path / 'gsm8k' / 'train.jsonl').unlink()
    with fails(f'{server.url}{path}: HTTP 404'): # the address that was asked
        lib.fetch(lib.files_of('gsm8k'))


def test_names_that_are_the_same_and_files_of_common_crawl(server, tmp_path):
    entry = dict(kind='preferences', urls=[server.url + '/{a,b}/train.jsonl.gz'])
    files = ours(SOURCES=dict(hh=entry), raw_dir=str(tmp_path)).files_of('hh')
    assert [os.path.basename(path) for _, _, path in files] == ['a-train.jsonl.gz', 'b-train.jsonl.gz']
    entry = dict(kind='text', urls=['https://data.example/crawl-data/CRAWL/KIND.paths.gz'], bytes=1, text_bytes=1)
    server.body = gzip.compress('\n'.join(f'crawl-data/X/{i}.warc.wet.gz' for i in range(10)).encode())
    lib = ours(SOURCES=dict(commoncrawl=entry), raw_dir=str(tmp_path), n_files=3, RANK=1, world_size=2, crawl='X',
               wet=True, mirror=server.url, first_bytes=20)
    files = lib.files_of('commoncrawl')
    assert [os.path.basename(path) for _, _, path in files] == ['0.warc.wet.gz', '3.warc.wet.gz', '6.warc.wet.gz']
    lib.fetch(files[:1])
    folder = '/data.example/crawl-data/X'
    assert [row[0] for row in server.log] == [f'{folder}/wet.paths.gz', *2 * [f'{folder}/0.warc.wet.gz']]
    assert os.path.getsize(files[0][2]) == 20 # the list itself came whole


def test_the_list_of_sources():
    lib = ours()
    for name, entry in lib.SOURCES.items():
        urls = lib.urls_of(name, 10**6)
        assert all(re.fullmatch(r'https://[\w.-]+/[\w./~-]+', url) for url in urls), name
        assert len(set(urls)) == len(urls) and entry['licence'] and entry['about']
        assert all(type(entry[key]) is int and entry[key] > 0 for key in ('bytes', 'text_bytes', 'rows')), name
        assert set(entry['kind'].split(', ')) <= {'text', 'tokens', 'chat', 'preferences', 'prompts', 'benchmarks'}
    assert lib.urls_of('c4', 2)[1].endswith('allenai/c4/resolve/main/en/c4-train.00001-of-01024.json.gz')
    assert len(lib.urls_of('core', 1)) == 21 and len(lib.urls_of('hh', 1)) == 4


# -----------------------------------------------------------------------------
# forms: every row by hand

LIB = ours()


def read(path, source='files'):
    skipped = collections.Counter()
    return [*LIB.read_file(str(path), source, skipped)], dict(skipped)


def lines(path, *rows):
    data = ''.join((row if isinstance(row, str) else json.dumps(row)) + '\n' for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
    return path


def user(text):
    return dict(role='user', content=text)


def said(text):
    return dict(role='assistant', content=text)


def node(role, text, *replies, rank=None, lang='en'):
    return dict(role=role, text=text, rank=rank, lang=lang, replies=[*replies])


TREE = node(
    'prompter',
    'Q',
    node('assistant', 'bad', rank=2),
    node(
        'assistant',
        'good',
        node('prompter', 'More?', node('assistant', 'Yes', rank=1), node('assistant', 'Sure', rank=0)),
        rank=0,
    ),
    node('assistant', 'fair', node('prompter', 'Thanks'), rank=1),
    node('assistant', 'unranked'),
)
PAIRS = {'instruction_following': {'Rating': '5'}, 'honesty': {'Rating': 'N/A'}}


@pytest.mark.parametrize(
    'source, rows, wanted',
    [
        (
            'alpaca',
            [dict(instruction='Add.', input='1 2', output='3'), dict(instruction='Hi', input='', output='Hello')],
            [
                ('chat', dict(messages=[user('Add.\n\n1 2'), said('3')])),
                ('chat', dict(messages=[user('Hi'), said('Hello')])),
            ],
        ),
        (
            'dolly',
            [dict(instruction='Who?', context='Anna did.', response='Anna', category='qa')],
            [('chat', dict(messages=[user('Who?\n\nAnna did.'), said('Anna')]))],
        ),
        (
            'gsm8k',
            [dict(question='2+3?', answer='It is <<2+3=5>>5\n#### 1,005')],
            [
                ('prompts', dict(messages=[user('2+3?')], checks={'number': 1005.0})),
                ('chat', dict(messages=[user('2+3?'), said('It is 5\n#### 1,005')])),
            ],
        ),
        (
            'gsm8k_test',
            [dict(question='2+3?', answer='#### -5')],
            [('benchmarks/gsm8k', dict(messages=[user('2+3?')], checks={'number': -5.0},
                                     answer='#### -5'))],
        ),
        (
            'hh',
            [dict(chosen='\n\nHuman: Q\n\nAssistant: good', rejected='\n\nHuman: Q\n\nAssistant: bad')],
            [
                ('prompts', dict(messages=[user('Q')])),
                ('preferences', dict(messages=[user('Q')], completions=['bad', 'good'], ranking=[1, 0])),
            ],
        ),
        (
            'oasst1',
            [dict(message_tree_id='1', prompt=TREE)],
            [
                ('chat', dict(messages=[user('Q'), said('good'), user('More?'), said('Sure')])),
                ('prompts', dict(messages=[user('Q')])),
                ('preferences', dict(messages=[user('Q')], completions=['bad', 'fair', 'good'], ranking=[2, 1, 0])),
                ('prompts', dict(messages=[user('Q'), said('good'), user('More?')])),
                (
                    'preferences',
                    dict(
                        messages=[user('Q'), said('good'), user('More?')], completions=['Sure', 'Yes'], ranking=[0, 1]
                    ),
                ),
            ],
        ),
        (
            'ultrafeedback',
            [
                dict(
                    instruction='I',
                    completions=[
                        dict(
                            response='w', annotations={'honesty': {'Rating': '2'}, 'helpfulness': {'Rating': '3'}}
                        ),  # 2.5
                        dict(response='x', annotations=PAIRS),
                        dict(response='y', annotations=PAIRS),  # 5 and 5
                        dict(response='z', annotations={'honesty': {'Rating': '3'}}),
                    ],
                )
            ],
            [
                ('prompts', dict(messages=[user('I')])),
                ('preferences', dict(messages=[user('I')], completions=[*'wxyz'], ranking=[1, 3, 0])),
            ],
        ),
        (
            'commonsense_qa_train',
            [dict(answerKey='B', id='1', question=dict(stem=stem, question_concept='x', choices=[
                dict(label=label, text=text) for label, text in zip('ABCDE', ['a pot', 'a tin', 'c', 'd', 'e'])]))
                for stem in ('Where?', 'When?')],
            [('chat', dict(messages=[user('When?\nA. a pot\nB. a tin\nC. c\nD. d\nE. e'), said('B')])),
             ('chat', dict(messages=[user('Where?'), said('a tin')]))],
        ),
        (
            'hellaswag_train',
            [dict(ind=4, activity_label='Roof', ctx_a=ctx, ctx_b='he', ctx=ctx, split='train', label=3,
                  endings=['x', 'y', 'z', 'jumps [substeps] off. [title] Then  stop.']) for ctx in ('[header] How', 'So')],
            [('chat', dict(messages=[user('Roof: So\nA. x\nB. y\nC. z\nD. jumps off. Then stop.'), said('D')])),
             ('chat', dict(messages=[user('Roof: How'), said('jumps off. Then stop.')]))],
        ),
        (
            'lambada',
            [dict(text='He saw the dog')],
            [('benchmarks/lambada', dict(context='He saw the', continuation='dog'))],
        ),
        (
            'humaneval',
            [dict(task_id='H/0', prompt='def f', test='assert', entry_point='f')],
            [('benchmarks/humaneval', dict(task_id='H/0', prompt='def f', test='assert', entry_point='f'))],
        ),
        (
            'core',
            [dict(query='q', choices=['a', 'b'], gold=1)],
            [('benchmarks/x', dict(query='q', choices=['a', 'b'], gold=1))],
        ),
    ],
)
def test_every_form(tmp_path, source, rows, wanted):
    def in_order(items):
        return sorted(((item['kind'], item['row']) for item in items), key=str)
    items, skipped = read(lines(tmp_path / 'x.jsonl', *rows), source)
    assert in_order(items) == sorted(wanted, key=str) and not skipped
    assert {item['source'] for item in items} == {source}
    broken = ['{', '[1]', dict(rows[0], **{key: None for key in rows[0]})]
    items, skipped = read(lines(tmp_path / 'x.jsonl.gz', *broken, *rows), source) # is counted, and that is all
    assert in_order(items[len(items) - len(wanted):]) == sorted(wanted, key=str)
    assert skipped['row that is not a JSON object'] == 2 and sum(skipped.values()) + len(items) - len(wanted) == 3


def test_what_is_left_out(tmp_path):
    tree = dict(message_tree_id='1', prompt=dict(TREE, lang='de'))
    assert read(lines(tmp_path / 'x.jsonl', tree), 'oasst2') == ([], {'conversation in another language': 1})
    tie = dict(instruction='I', completions=[dict(response='x', annotations=PAIRS)] * 2)
    assert read(lines(tmp_path / 'x.jsonl', tie), 'ultrafeedback') == ([], {'ranking of nothing but ties': 1})
    same = dict(chosen='\n\nHuman: Q\n\nAssistant: A', rejected='\n\nHuman: Q\n\nAssistant: A')
    assert read(lines(tmp_path / 'x.jsonl', same), 'hh') == ([], {'pair that does not differ in an answer': 1})
    order = dict(messages=[user('Q'), user('R'), said('A')])
    assert read(lines(tmp_path / 'x.jsonl', order)) == ([], {'turns in another order than user, assistant': 1})


@pytest.mark.parametrize('row, message', [
    ('{"text": "cut', r'a\.jsonl:2: not a JSON line'),
    ('[' * 100_000, r'a\.jsonl:2: not a JSON line'),
    (dict(messages=[user('x')]), r'a\.jsonl:2: .*no assistant turn'),
    (dict(messages=[dict(role='robot', content='x')]), r'a\.jsonl:2: .*roles'),
    (dict(messages=[dict(role='', content=''), user('x'), said('y')]), r'a\.jsonl:2: '),
    (dict(messages='x'), r'a\.jsonl:2: '),
    (dict(text=5), r'a\.jsonl:2: text must be a string'),
    (dict(what=1, **{'is': 2}), r'a\.jsonl:2: no known form has the keys is, what'),
    (dict(messages=[user('x')], completions=['a', 'b'], ranking=[0, 5]), r'a\.jsonl:2: ranking'),
    (dict(messages=[user('x')], completions=['a', None], ranking=[0, 1]), r'a\.jsonl:2: a completion must be a string'),
    (dict(messages=[user('x')], completions='ab', ranking=[0, 1]), r'a\.jsonl:2: completions must be a list, not str'),
    (dict(messages=[user('x')], completions=['a', 'b'], ranking=[0.0, True]), r'a\.jsonl:2: ranking'),
    (dict(messages=[user('x')], checks={'max_words': 'x'}), r'a\.jsonl:2: '),
    (dict(chosen='x', rejected='y'), r'a\.jsonl:2: not a dialogue'),
    (dict(text=None), r'a\.jsonl:2: text must be a string, not NoneType'),
    (dict(messages=[user('x'), said(None)]), r'a\.jsonl:2: content must be a string, not NoneType'),
    (dict(conversations=[{'from': 'robot', 'value': 'x'}]), r'a\.jsonl:2: .*roles'),
    (dict(prompt='x', chosen=None, rejected='y'), r'a\.jsonl:2: a value is missing or of another type'),
    (dict(query='q', choices=['a'], gold=1), r'a\.jsonl:2: gold 1'),
    (dict(query='q', choices=['a', 'b'], gold=2), r'a\.jsonl:2: gold 2 is not one of 2 choices'),
    (dict(context_options=['a', 'b'], gold=2, continuation='c'), r'a\.jsonl:2: gold 2 is not one of 2 context_options'),
    (dict(query='q', choices=['a', 'b'], gold=float('inf')), r'a\.jsonl:2: gold inf'),
    (dict(query='q', choices='ab', gold=1), r'a\.jsonl:2: choices must be a list, not str'),
    (dict(query='q', choices=['a', 2], gold=1), r'a\.jsonl:2: one of the choices must be a string, not int'),
    (dict(query='q', choices=['a', ' '], gold=0), r'a\.jsonl:2: one of the choices is empty'),
    (dict(context='2+2=', continuation=4), r'a\.jsonl:2: continuation must be a string, not int'),
    (dict(context='2+2=', continuation=''), r'a\.jsonl:2: continuation is empty'),
    (dict(context=None, continuation='4'), r'a\.jsonl:2: context must be a string, not NoneType'),
])
def test_a_bad_row_in_your_own_file_is_named_with_its_place(tmp_path, row, message):
    path = lines(tmp_path / 'a.jsonl', dict(text='fine'), row, dict(text='fine too'))
    items, skipped = read(path)
    bad = items.pop(1)
    assert bad['kind'] == 'bad row' and re.search(message, f"{bad['place']}: {bad['reason']}"), bad
    assert [item['text'] for item in items] == ['fine', 'fine too'] and not skipped
    items, skipped = read(path, 'c4')
    assert len(items) == 2 and sum(skipped.values()) == 1 # in public files it is counted


def test_bad_checks_of_an_exam(tmp_path):
    (tmp_path / 'benchmarks').mkdir()
    path = lines(tmp_path / 'benchmarks' / 'a.jsonl', dict(messages=[user('2+2?')], checks=dict(numbr=4)))
    assert 'known are contains' in read(path)[0][0]['reason']


@pytest.mark.parametrize('row, wanted', [
    (dict(prompt='Q ', completion=' A'), [('chat', dict(messages=[user('Q'), said('A')]))]),
    (dict(prompt=[user('Q')], completion=[said('A')]), [('chat', dict(messages=[user('Q'), said('A')]))]),
    (dict(id='1', conversations=[{'from': 'system', 'value': 'S'}, {'from': 'human', 'value': 'Q'},
                                 {'from': 'gpt', 'value': 'A'}]),
     [('chat', dict(messages=[dict(role='system', content='S'), user('Q'), said('A')]))]),
    (dict(conversations=[user('Q'), said('A')]), [('chat', dict(messages=[user('Q'), said('A')]))]),
    *[(row, [('preferences', dict(messages=[user('Q')], completions=['A', 'B'], ranking=[0, 1])),
             ('prompts', dict(messages=[user('Q')]))]) for row in (
        dict(prompt='Q', chosen='A', rejected='B'),
        dict(prompt='Q', chosen=[said('A')], rejected=[said('B')]),
        dict(prompt=[user('Q')], chosen=[said('A')], rejected=[said('B')]),
        dict(prompt='Q', chosen=[user('Q'), said('A')], rejected=[user('Q'), said('B')]),
        dict(chosen=[user('Q'), said('A')], rejected=[user('Q'), said('B')]))],
])
def test_common_forms_of_rows(tmp_path, row, wanted):
    items, skipped = read(lines(tmp_path / 'a.jsonl', row))
    assert [(item['kind'], item['row']) for item in items] == wanted and not skipped


def test_content_in_parts(tmp_path):
    """OpenAI's list of parts is one text if all parts are text; with an image it is a bad row."""
    parts = [dict(type='text', text='Say '), dict(type='text', text='hi')]
    turns = [dict(role='user', content=parts), dict(role='assistant', content='hi')]
    items, _ = read(lines(tmp_path / 'a.jsonl', dict(messages=turns)))
    assert items[0]['row']['messages'][0] == user('Say hi')
    with pytest.raises(ValueError, match='content must be a string'):
        LIB.convert_row(dict(messages=[dict(role='user', content=[dict(type='image_url')]), turns[1]]), LIB.FORMS)


def test_a_ranking_of_equal_texts_is_dropped_and_counted(tmp_path):
    own = dict(messages=[user('Q')], completions=['A', 'B', 'A '], ranking=[0, 2])
    pair = dict(prompt='Q', chosen='A', rejected=' A')
    path = lines(tmp_path / 'a.jsonl', own, pair, dict(own, ranking=[0, 1]))
    items, skipped = read(path)
    assert [item['kind'] for item in items] == ['preferences']
    assert skipped == {'ranking of equal texts': 1, 'pair that does not differ in an answer': 1}


def test_converters_take_linear_time(tmp_path):
    """1 MB of every short text that they look for, in every field."""
    marks = ['<', '<<', '<<1', '<<>', '#', '#### ', '#### 1', '####.', '1', '1,', '.', ' ', '\n', '\n\n', 'x',
             '\n\nHuman: ', '\n\nAssistant: ', 'Human: ', '### Instruction:\n', '\n### Input:\n', '\n### Response:',
             '### Instruction:\n\n### Input:\n']
    rows = []
    for mark in marks:
        text = mark * (1_000_000 // len(mark))
        rows += [dict(question=text, answer=text), dict(prompt=text, response=text), dict(text=text),
                 dict(chosen=text, rejected=text + 'x'), dict(prompt=text, chosen=text, rejected=text + 'x')]
    start = time.process_time()
    for row in rows:
        with contextlib.suppress(*LIB.MISFIT):
            LIB.convert_row(row, LIB.EXAM_FORMS)
    assert time.process_time() - start < 30
    filled = 'Below.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n'
    asked = [LIB.from_instruction(dict(prompt=text, response='3'))[0][1]['messages'][0]['content']
             for text in (filled, filled.replace('### Input:\n1 2\n\n', ''), '### Instruction: none')]
    assert asked == ['Add.\n\n1 2', 'Add.', '### Instruction: none']


# -----------------------------------------------------------------------------
# files of every kind


def test_names_sides_and_urls(tmp_path):
    path = lines(tmp_path / 'c4-train.00000.json.gz', dict(text='A', url='http://a', timestamp=''), dict(text='B'),
                 dict(text=''))
    assert read(path, 'c4')[0] == [dict(kind='text', source='c4', url='http://a', text='A'),
                                   dict(kind='text', source='c4', url=f'{path}:2', text='B')]
    (tmp_path / 'list.json').write_text(json.dumps([dict(text='A'), dict(text='B')]))
    assert len(read(tmp_path / 'list.json')[0]) == 2
    assert read(lines(tmp_path / 'web_07.jsonl', dict(text='A')))[0][0]['source'] == 'web'
    chat_train = lines(tmp_path / 'chat_train.jsonl', dict(text='A'))
    assert read(chat_train)[0][0] == dict(kind='text', source='chat', url=f'{chat_train}:1', text='A')
    lines(tmp_path / 'chat_val.jsonl.gz', dict(text='A')) # now both sides are there
    LIB.names_in.cache_clear()
    assert read(chat_train)[0][0]['side'] == 'train'
    assert read(tmp_path / 'chat_val.jsonl.gz')[0][0]['side'] == 'val'
    (tmp_path / 'benchmarks').mkdir()
    exam = lines(tmp_path / 'benchmarks' / 'last_word.jsonl', dict(text='He saw the dog'))
    assert read(exam)[0][0] == dict(kind='benchmarks/last_word', source='last_word',
                                    row=dict(context='He saw the', continuation='dog'))
    (tmp_path / 'page.html').write_bytes(b'<p>x')
    assert read(tmp_path / 'page.html')[0][0]['html'] == b'<p>x'


@pytest.mark.parametrize('marks', [False, True])
def test_text_is_read_in_pieces(tmp_path, marks):
    rng = random.Random(1)
    ends = ['\n', '\n \n', '\r\n\r\n', ' <|endoftext|>' if marks else ' ']
    text = ''.join('é' * rng.randrange(900) + rng.choice(ends) for _ in range(4000))
    (tmp_path / 'x.txt').write_bytes(text.encode())
    text = text.replace('\r\n', '\n')
    found = [item['text'] for item in read(tmp_path / 'x.txt')[0]]
    assert ''.join(''.join(found).split()) == ''.join(text.replace('<|endoftext|>', '').split())
    if marks:
        assert found == [part for part in text.split('<|endoftext|>') if part.strip()] and len(found) > 500
    else:
        assert len(found) > 200 and all(4000 <= len(piece) < 20_000 for piece in found[:-1])
        assert all(not piece.split('\n')[0].strip() for piece in found[1:]) # each begins with an empty line


def test_a_text_without_empty_lines_is_read_in_pieces(tmp_path):
    (tmp_path / 'x.txt').write_text('A line of a poem.\n' * 5000)
    found = [item['text'] for item in read(tmp_path / 'x.txt')[0]]
    assert ''.join(found) == 'A line of a poem.\n' * 5000 and all(16_000 <= len(text) < 17_000 for text in found[:-1])


def test_names_in_capitals_and_utf_16(tmp_path):
    (tmp_path / 'NOTES.TXT').write_text('A')
    (tmp_path / 'A.HTML').write_text('<p>x')
    (tmp_path / 'TOKENS.BIN').write_bytes(b'')
    lines(tmp_path / 'b.gz', dict(text='A')).rename(tmp_path / 'B.JSONL.GZ')
    assert read(tmp_path / 'NOTES.TXT')[0] == [
        dict(kind='text', source='NOTES', url=f'{tmp_path}/NOTES.TXT#0', text='A')]
    assert read(tmp_path / 'A.HTML')[0][0]['html'] == b'<p>x' and read(tmp_path / 'TOKENS.BIN')[0][0]['kind'] == 'tokens'
    assert read(tmp_path / 'B.JSONL.GZ')[0][0]['text'] == 'A'
    for charset in ('utf-16', 'utf-16-be', 'utf-8-sig'):
        text = '{"text": "Größe"}\n{"text": "2"}\n'
        (tmp_path / 'x.jsonl').write_bytes(('\ufeff' * (charset == 'utf-16-be') + text).encode(charset))
        assert [item['text'] for item in read(tmp_path / 'x.jsonl')[0]] == ['Größe', '2']
        (tmp_path / 'x.json').write_bytes('[{"text": "Größe"}, {"text": "2"}]'.encode(charset))
    (tmp_path / 'x.json').write_bytes('[{"text": "Größe"}, {"text": "2"}]'.encode('utf-16'))
    assert [item['text'] for item in read(tmp_path / 'x.json')[0]] == ['Größe', '2']


def test_a_file_that_was_cut_gives_what_is_whole(tmp_path):
    rng = random.Random(0)
    whole = lines(tmp_path / 'a.jsonl.gz', *[dict(text=rng.randbytes(500).hex()) for _ in range(4000)]) # 4 MB
    whole.write_bytes(whole.read_bytes()[:1_900_000])
    items, _ = read(whole)
    assert len(items) > 2000 and [item['kind'] for item in items[-2:]] == ['text', 'bad row']
    assert items[-1]['place'] == str(whole) and 'damaged, the rest is left out' in items[-1]['reason']


def test_tokens_and_parquet(tmp_path):
    assert read(tmp_path / 'fineweb_train_000001.bin', 'fineweb')[0] == [
        dict(kind='tokens', source='fineweb', path=str(tmp_path / 'fineweb_train_000001.bin'))]
    (tmp_path / 'x.parquet').write_bytes(b'PAR1')
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        with fails('pip install pyarrow'):
            read(tmp_path / 'x.parquet')
    else:
        pyarrow.parquet.write_table(pyarrow.table(dict(text=['A', 'B'])), tmp_path / 'x.parquet')
        assert [item['text'] for item in read(tmp_path / 'x.parquet')[0]] == ['A', 'B']


# -----------------------------------------------------------------------------
# WARC


def record(body=b'<p>page', kind='response', url='http://x/', length=None, head=b'', status=b'200 OK',
           media=b'text/html'):
    http_part = b'HTTP/1.1 ' + status + b'\r\nContent-Type: ' + media + b'\r\n' + head + b'\r\n'
    content = (http_part if kind == 'response' else b'') + body
    n = len(content) if length is None else length(len(content))
    fields = f'WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nContent-Length: {n}\r\n\r\n'
    return fields.encode() + content + b'\r\n\r\n'


def pages(tmp_path, data, name='x.warc.gz'):
    (tmp_path / name).write_bytes(data)
    items, skipped = read(tmp_path / name, 'commoncrawl')
    return [item.get('html', item.get('text')) for item in items], skipped


ONE, TWO, THREE = (record(b'<p>%d' % i * 3000 + b'%d' % i, url=f'http://x/{i}') for i in (1, 2, 3))
GZ = [gzip.compress(r) for r in (ONE, TWO, THREE)]
GZIP = GZ[0][:3]
PAGES = [b'<p>%d' % i * 3000 + b'%d' % i for i in (1, 2, 3)]


def test_whole_files(tmp_path):
    for data, name in ((b''.join(GZ), 'x.warc.gz'), (gzip.compress(ONE + TWO + THREE), 'x.warc.gz'),
                       (ONE + TWO + THREE, 'x.warc'), (ONE + TWO + THREE, 'x.warc.gz'), (b''.join(GZ), 'x.warc'),
                       (b''.join(GZ) + bytes(5000), 'x.warc.gz'), ((ONE + TWO + THREE).rstrip(b'\r\n'), 'x.warc')):
        assert pages(tmp_path, data, name) == (PAGES, {}), name
    items, _ = read(tmp_path / 'x.warc', 'commoncrawl')
    assert items[0] == dict(kind='text', source='commoncrawl', url='http://x/1', type='text/html', html=PAGES[0])


def test_a_broken_member_costs_one_record(tmp_path):
    rng = random.Random(3)
    for trial in range(40):
        broken = bytearray(GZ[1])
        at = rng.randrange(len(broken))
        broken[at:at + 20] = rng.randbytes(20)
        got, skipped = pages(tmp_path, GZ[0] + broken + GZ[2])
        assert got[0] == PAGES[0] and got[-1] == PAGES[2] and len(got) <= 3, (trial, at)
        assert len(got) == 3 or sum(skipped.values()) >= 1 or at < 10
    assert pages(tmp_path, GZ[0] + GZ[1][:len(GZ[1]) // 2] + GZ[2])[0] == [PAGES[0], PAGES[2]]
    assert pages(tmp_path, GZ[0] + b'junk' * 50_000 + GZ[2])[0] == [PAGES[0], PAGES[2]]
    assert pages(tmp_path, GZ[0] + GZ[1][:-30]) == ([PAGES[0]], {'damaged record': 1})
    assert pages(tmp_path, b'no gzip') == ([], {'file without any record': 1})


def test_cut_at_every_byte(tmp_path):
    small = [record(b'<p>%d' % i) for i in range(2)]
    for data, name in ((b''.join(small), 'x.warc'), (b''.join(map(gzip.compress, small)), 'x.warc.gz')):
        for n in range(1, len(data), 3):
            got, skipped = pages(tmp_path, data[:n], name)
            assert got == [b'<p>0', b'<p>1'][:len(got)] and sum(skipped.values()) <= 1


@pytest.mark.parametrize('lie', [lambda n: n + 5, lambda n: n + 500, lambda n: 40_000_000, lambda n: -3, lambda n: '',
                                 lambda n: 'many', lambda n: 10**17])
def test_lies_about_a_length_cost_one_record(tmp_path, lie):
    got, skipped = pages(tmp_path, GZ[0] + gzip.compress(record(b'<p>' + b'x' * 400, length=lie)) + GZ[2])
    assert (got[0], got[-1]) == (PAGES[0], PAGES[2]) and len(got) + sum(skipped.values()) == 3


def test_what_is_not_a_page(tmp_path):
    data = [record(media=b'image/png'), record(status=b'404 Not Found'), record(b''), record(kind='request'),
            record(kind='metadata'), record(b'\x0b\x02', head=b'Content-Encoding: br\r\n'),
            record(b'<p>ok', head=b'Content-Encoding: br\r\n')] # Common Crawl unpacks pages and keeps the field
    assert pages(tmp_path, b''.join(map(gzip.compress, data))) == (
        [b'<p>ok'], {'not a page (status or type)': 2, 'compressed page': 1})
    text = record('Grüße'.encode(), kind='conversion')
    assert pages(tmp_path, gzip.compress(text), 'x.warc.wet.gz') == (['Grüße'], {})


def test_pages_and_members_over_the_limit(tmp_path, monkeypatch):
    monkeypatch.setitem(LIB.space, 'LIMIT', 20_000)
    big = record(random.Random(0).randbytes(300_000))
    assert pages(tmp_path, ONE + big + THREE, 'x.warc') == ([PAGES[0], PAGES[2]], {'page over 50 MB': 1})
    z = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b''.join(z.compress(bytes(1 << 20)) for _ in range(30)) + z.flush() # 30 MB of zeros
    data = [GZ[0], gzip.compress(big), bomb, GZ[2]]
    got, skipped = pages(tmp_path, b''.join(data))
    assert got == [PAGES[0], PAGES[2]] and skipped['record cut short'] == 1


# -----------------------------------------------------------------------------
# WARC: lies, cuts, old versions


def members(packing, records):
    """The records as one plain file, one gzip member, or a member each."""
    if packing == 'plain':
        return b''.join(records)
    return gzip.compress(b''.join(records)) if packing == 'one member' else b''.join(map(gzip.compress, records))


@pytest.mark.parametrize('packing', ['plain', 'one member', 'a member each'])
@pytest.mark.parametrize('fault', ['length', 'cut'])
def test_a_wrong_length_or_a_cut_costs_one_record_of_a_warc(tmp_path, packing, fault):
    """All other pages are found, and what is lost is counted, once."""
    rng = random.Random(12)
    good = [f'<p>{i} '.encode() * rng.randrange(1, 60) for i in range(12)]
    for trial in range(60):
        at = rng.randrange(12)
        records = [record(page, url=f'http://x/{i}') for i, page in enumerate(good)]
        if fault == 'length':
            records[at] = record(good[at], length=lambda n: n + rng.choice([5, rng.randrange(5, 4000), 10**8, 10**20]))
        else:
            records[at] = records[at][:rng.randrange(1, len(records[at]) - 4)] # the last four bytes are an empty line
        got, skipped = pages(tmp_path, members(packing, records), 'x.warc')
        assert got == good[:at] + good[at + 1:], (trial, at)
        assert sum(skipped.values()) == 1, (trial, at, skipped)


def test_a_whole_warc_in_one_gzip_member_may_be_larger_than_the_limit(tmp_path, monkeypatch):
    """ClueWeb's files are packed as a whole: a gigabyte in one member."""
    monkeypatch.setitem(LIB.space, 'LIMIT', 30_000)
    small = [record(b'<p>%d' % i * 500) for i in range(300)]
    good = [b'<p>%d' % i * 500 for i in range(300)]
    assert pages(tmp_path, gzip.compress(b''.join(small))) == (good, {})
    big = record(random.Random(0).randbytes(100_000))
    got, skipped = pages(tmp_path, gzip.compress(b''.join([*small[:150], big, *small[150:]])))
    assert got == good and skipped['record cut short'] == 1


def test_damage_to_the_first_line_of_a_warc_costs_one_record(tmp_path):
    for at in range(3):
        records = [ONE, TWO, THREE]
        records[at] = b'XARC' + records[at][4:]
        assert pages(tmp_path, b''.join(records), 'x.warc') == (
            PAGES[:at] + PAGES[at + 1:], {'bytes that belong to no record': 1})
        packed = [*GZ]
        packed[at] = b'\x1f\x8c' + GZ[at][2:]
        got, skipped = pages(tmp_path, b''.join(packed))
        assert got == PAGES[:at] + PAGES[at + 1:] and sum(skipped.values()) == 1


def test_a_page_may_hold_a_warc_file(tmp_path):
    """In a gzip member of its own it is whole; else it ends at the first line of its record."""
    inner = b'<pre>' + ONE + b'\n' + TWO
    each = members('a member each', [record(inner), THREE, record(inner)])
    assert pages(tmp_path, each) == ([inner, PAGES[2], inner], {})
    got, skipped = pages(tmp_path, ONE + record(inner) + THREE, 'x.warc')
    assert (got[0], got[-1]) == (PAGES[0], PAGES[2]) and skipped == {'record cut short': 1}


@pytest.mark.parametrize('version', ['0.17', '0.18', '1.0', '1.1'])
@pytest.mark.parametrize('end', ['\n', '\r\n'])
def test_every_version_of_warc(tmp_path, version, end):
    """ClueWeb09 is WARC/0.18, with \\n at the ends of lines."""
    def old(body, kind='response', http=f'HTTP/1.1 200 OK{end}Content-Type: text/html{end}{end}'):
        content = (http if kind == 'response' else '') + body
        fields = [f'WARC/{version}', f'WARC-Type: {kind}', 'WARC-Target-URI: http://x/',
                  f'Content-Length: {len(content)}', '', content, '', '']
        return end.join(fields).encode()
    data = [old('software: x', 'warcinfo'), old('<p>one'), old('', 'revisit'), old('<p>two')]
    for packing in ('plain', 'one member', 'a member each'):
        assert pages(tmp_path, members(packing, data), 'x.warc') == (
            [b'<p>one', b'<p>two'], {'record of another type (revisit, resource)': 1})


def test_the_status_of_a_page_is_the_second_word(tmp_path):
    for status in (b'404 Error 200', b'2000', b'304 200', b'', b'x'):
        assert pages(tmp_path, record(status=status), 'x.warc') == ([], {'not a page (status or type)': 1})
    for status in (b'200 OK', b'200', b' 200  404'):
        assert pages(tmp_path, record(status=status), 'x.warc') == ([b'<p>page'], {})


def test_a_warc_that_gives_nothing_says_so(tmp_path, capfd):
    for data in (b'', b'what is this', record(kind='revisit'), gzip.compress(b'no record')):
        got, skipped = pages(tmp_path, data, 'x.warc.gz')
        assert got == [] and sum(skipped.values()) == 1, (data, skipped)
        assert 'x.warc.gz: no page was found in it' in capfd.readouterr().out


@pytest.mark.parametrize('coding', ['gzip', 'br', 'deflate', 'zstd'])
def test_a_plain_page_that_claims_to_be_compressed(tmp_path, coding):
    """Common Crawl unpacks pages and keeps the field; a page need not begin with a tag."""
    head = f'Content-Encoding: {coding}\r\n'.encode()
    for page in (b'\xef\xbb\xbf<p>x', b'\n\n<p>x', b'Only text.', 'Grüße'.encode(), 'Grüße'.encode('cp1252'),
                 '<p>x'.encode('utf-16'), b'\x1b$B%F%9%H\x1b(B', b'Text ' * 1000 + b'\0'):
        assert pages(tmp_path, record(page, head=head), 'x.warc') == ([page], {})
    packed = [gzip.compress(b'<p>page' * 99), zlib.compress(b'<p>page' * 99), random.Random(0).randbytes(200)]
    for page in packed:
        assert pages(tmp_path, record(page, head=head), 'x.warc') == ([], {'compressed page': 1})


# -----------------------------------------------------------------------------
# hostile sizes


@pytest.mark.parametrize('name, text', [
    ('x.json.gz', '[' + ('{"text": "", "x": [' + '[],' * 999 + '[]]},') * 500 + '{"text": "end"}]'),
    ('x.json.gz', '[{"text": "' + 'x' * 10_000_000 + '"}]'),
    ('x.jsonl.gz', '{"text": "' + 'x' * 10_000_000 + '"}\n{"text": "end"}'),
    ('x.txt.gz', 'x' * 10_000_000),
    ('x.txt.gz', 'x ' * 5_000_000 + '<|endoftext|>end'),
    ('x.txt.gz', ('many words ' * 100 + '\n') * 9000),
], ids=lambda text: text[:12])
def test_a_small_packed_file_takes_little_memory(tmp_path, monkeypatch, name, text):
    """1.4 MB once took 3.2 GB: all rows, or one row of 1.4 GB."""
    monkeypatch.setitem(LIB.space, 'LIMIT', 100_000)
    (tmp_path / name).write_bytes(gzip.compress(text.encode(), 1))
    tracemalloc.start()
    last = None
    for last in LIB.read_file(str(tmp_path / name), 'c4', collections.Counter()):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 7_000_000 # two buffers of 1 MB are among them
    is_cut = name == 'x.txt.gz' and '<|' not in text # a text without marks is read in pieces
    assert last is None or last['text'] == 'end' or is_cut and len(last['text']) <= 100_000


def test_an_item_of_a_json_list_may_lie_across_blocks(tmp_path):
    rows = [dict(text='é"]},[ ' * (i % 700) + str(i)) for i in range(2000)] + [dict(text='x' * 400_000)]
    path = tmp_path / 'x.json'
    for indent in (None, 1):
        data = json.dumps(rows, ensure_ascii=indent is None, indent=indent)
        path.write_text(data, encoding='utf-8')
        assert [item['text'] for item in read(path)[0]] == [row['text'] for row in rows]
    path.write_text(data[:-100], encoding='utf-8') # what was whole is kept
    items, skipped = read(path, 'c4')
    assert len(items) == 2000 and skipped == {'damaged file': 1}
    assert re.match('damaged', read(path)[0][-1]['reason'])


RESPONSE = b'WARC/1.0\r\nWARC-Type: response\r\nContent-Length: 900000\r\n\r\nHTTP/1.1 200 OK\r\n'
HOSTILE = { # what stands before the repeated string, and the strings
    'x.warc': [(b'', b'WARC/1.0\r\n', RESPONSE[:50], RESPONSE, RESPONSE + b'Content-Type: text/html; charset='),
               (b'WARC/1\n', b'WARC/1.0\r\n', b'WARC/1.0\nContent-Length: 1\n\n', b' ', b'\r\n', b'\na: ', b'9', b'<',
                b'\0', b'http:', b';charset=', b'= ', b'"', b'200 ')],
    'x.warc.gz': [(b'',), (GZIP + b'\x08', gzip.compress(b'WARC/1.0\n\n'))],
    'x.txt': [(b'',), (b'<|endoftext|>', b'<|', b'\n', b'\r', b'\n ', b'\x93', b'\xe2\x80', b'\xff\xfe', b'\0')],
    'x.json': [(b'[', b'[{"text": "'), (b'[', b']', b'{', b',', b' ', b'\n', b'1', b'\\', b'"a":', b'\\u')],
    'x.html': [(b'',), (b'charset', b'charset=', b'charset= ', b'charset =\n', b'\x93', b'\xe2\x80')],
}


@pytest.mark.parametrize('name', HOSTILE)
def test_a_megabyte_of_any_short_string_is_read_in_seconds(tmp_path, name):
    for before, short in itertools.product(*HOSTILE[name]):
        (tmp_path / name).write_bytes(before + short * (1_000_000 // len(short)))
        start = time.process_time()
        for item in read(tmp_path / name, 'commoncrawl')[0][:1]:
            LIB.url_step(item)
            if 'html' in item:
                LIB.decode(item['html'], item['type'])
        assert time.process_time() - start < 15, (before, short) # in quadratic time it would take hours


def test_a_megabyte_of_any_short_string_in_a_url_or_label():
    for short in ('.', '@', ':', '/', '://', '[', ']', '#', 'a.', '1.', 'a', ' ', 'charset=', 'charset', '"', '= '):
        text = short * (1_000_000 // len(short))
        start = time.process_time()
        for before in ('', 'http://', 'http://[', 'http://a@'):
            LIB.url_step(dict(url=before + text))
        for before in ('', 'charset=', 'charset = "'):
            LIB.decode(b'\x93', before + text)
        assert time.process_time() - start < 15, short


# -----------------------------------------------------------------------------
# block lists, files that cannot be read


def test_a_block_list_that_is_missing_is_an_error(tmp_path):
    path = tmp_path / 'bad.lst'
    path.write_bytes('# caf\u00e9\n0.0.0.0 bad.example # a comment\n\nWorse.Example\n'.encode('cp1252'))
    read_block_list = LIB.read_block_list
    assert read_block_list(f'x.example, {path}') == {'x.example', 'bad.example', 'worse.example'}
    assert read_block_list('') == set()
    for name in (f'{tmp_path}/none.lst', 'lists/none', 'none.txt', str(tmp_path)):
        with fails(f"blocked_hosts: no file '{re.escape(name)}': give a host, or a file of hosts"):
            read_block_list(f'x.example,{name}')


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = lines(tmp_path / 'x.jsonl', dict(text='A'))
    def denied(*args, **more):
        raise PermissionError(13, 'Permission denied', args[0])
    monkeypatch.setitem(LIB.space, 'open', denied)
    for source in ('files', 'c4'): # a public file too: without it the corpus would be another one
        with fails(r'x\.jsonl cannot be read \(Permission denied\)'):
            read(path, source)
    monkeypatch.undo()
    (tmp_path / 'x.jsonl.gz').write_bytes(b'no gzip')
    assert re.match('damaged', read(tmp_path / 'x.jsonl.gz')[0][0]['reason'])


# -----------------------------------------------------------------------------
# charsets of text files


def test_a_text_file_in_windows_1252_wherever_its_quotes_stand(tmp_path):
    """The first curly quote may come after megabytes of ASCII."""
    plain = 'Plain ASCII in many lines.\n' * 60_000
    for text in ('“Hello” — café’s\n', plain + '“Hello” — café’s\n', '“Hello”\n\n' + plain):
        for codec in ('cp1252', 'utf-8', 'utf-8-sig', 'utf-16'):
            (tmp_path / 'x.txt').write_bytes(text.encode(codec))
            assert ''.join(item['text'] for item in read(tmp_path / 'x.txt')[0]) == text, codec


def test_each_text_of_a_file_has_its_charset(tmp_path):
    texts = ['“One” ' * 9, '“Two” ' * 9, 'Three ' * 9]
    raw = texts[0].encode('cp1252') + b'<|endoftext|>' + texts[1].encode() + b'<|endoftext|>' + texts[2].encode()
    (tmp_path / 'x.txt').write_bytes(raw)
    assert [item['text'] for item in read(tmp_path / 'x.txt')[0]] == texts


# -----------------------------------------------------------------------------
# all public sources in miniature, from a mirror


def small_row(source, form, i):
    """Row i of a source, in its own form."""
    rng = random.Random(f'{source} {form} {i}')
    words = [rng.randbytes(4).hex() for _ in range(30)]
    text, short = ' '.join(words) + '.', words[0]
    if source in ('c4', 'books', 'wikipedia', 'github', 'arxiv', 'stackexchange'):
        return dict(text=text, id=short, url=f'http://x/{i}', metadata=dict(length=30))
    return dict(
        alpaca=dict(instruction=text, input='', output=short),
        dolly=dict(instruction=text, context='', response=short, category='qa'),
        oasst1=dict(message_tree_id=short, prompt=dict(TREE, text=text)),
        oasst2=dict(message_tree_id=short, prompt=dict(TREE, text=text)),
        gsm8k=dict(question=text, answer=f'So it is <<1+1=2>>2\n#### {i}'),
        gsm8k_test=dict(question=text, answer=f'#### {i}'),
        hellaswag_train=dict(ind=i, activity_label='Roof', ctx=text, endings=words[:4], label=i % 4, split='train'),
        commonsense_qa_train=dict(answerKey='AB'[i % 2], id=short, question=dict(stem=text, choices=[
            dict(label='A', text='x'), dict(label='B', text='y')])),
        hh=dict(chosen=f'\n\nHuman: {text}\n\nAssistant: good', rejected=f'\n\nHuman: {text}\n\nAssistant: bad'),
        ultrafeedback=dict(instruction=text, completions=[
            dict(response=word, annotations=dict(honesty=dict(Rating=str(n)))) for n, word in enumerate(words[:4])]),
        mmlu=dict(query=text, choices=[*'ABCD'], gold=i % 4, category='law'),
        arc=dict(query=text, choices=words[:4], gold=i % 4),
        lambada=dict(text=text),
        humaneval=dict(task_id=f'H/{i}', prompt=text, test='assert', entry_point='f'),
        core=[dict(query=text, choices=words[:2], gold=i % 2), dict(context=text, continuation=short),
              dict(context_options=words[:2], continuation=text, gold=i % 2)][form % 3],
    )[source]


N_SMALL = 16 # rows


def small_file(source, form, n=N_SMALL):
    """A file of a source as it is published, but with few rows."""
    rows = [small_row(source, form, i) for i in range(n)] if source not in ('shakespeare', 'tinystories') else []
    if source == 'alpaca':
        return json.dumps(rows, indent=4).encode()
    if source in ('shakespeare', 'tinystories'):
        mark = '\n<|endoftext|>\n' if source == 'tinystories' else '\n\n'
        texts = [' '.join(random.Random(f'{source}{i}').randbytes(4).hex() for _ in range(450)) for i in range(n)]
        return mark.join(texts).encode()
    return ''.join(json.dumps(row) + '\n' for row in rows).encode()


def test_all_sources_in_miniature(server, tmp_path, scripts):
    """Each row of each source arrives in our form; of cut files, those at the beginning; nothing is an error."""
    names = [name for name in LIB.SOURCES if name not in ('fineweb', 'fineweb_text')] # tokens; needs a package
    server.body = None # all other files are gone
    for name in names:
        for form, url in enumerate(LIB.urls_of(name, 2)):
            body = small_file(name, form) if name != 'commoncrawl' else b'crawl-data/a.warc.gz'
            url = url.replace('CRAWL', LIB.crawl).replace('KIND', 'warc')
            server.bodies[url.removeprefix('https:/')] = gzip.compress(body) if url.endswith('.gz') else body
    server.bodies['/data.commoncrawl.org/crawl-data/a.warc.gz'] = b''.join(
        gzip.compress(record(f'<p>{small_row("c4", 9, i)["text"] * 3}'.encode(), url=f'http://y/{i}'))
        for i in range(N_SMALL))
    flags = [f'--source={",".join(names)}', f'--mirror={server.url}', f'--raw_dir={tmp_path}/raw', '--filters=dedup',
             '--val_fraction=0.3', '--n_files=2']
    found = {}
    for first_bytes in (0, 2000):
        out = tmp_path / str(first_bytes)
        more = [*flags, f'--first_bytes={first_bytes}', f'--data_dir={out}']
        if first_bytes:
            told = scripts.ok('prepare_data.py', *more, '--download_only=true').out
            assert 'files are in' in told and not (out / 'funnel.json').exists()
            server.bodies.clear() # all files are gone now
        scripts.ok('prepare_data.py', *more)
        result = json.loads((out / 'funnel.json').read_text())
        found[first_bytes] = result['counts']
        texts = {name for name in names if LIB.SOURCES[name]['kind'] == 'text'}
        assert set(result['mixture']['text']) == texts
        assert set(result['mixture']['chat']) == {name for name in names if 'chat' in LIB.SOURCES[name]['kind']}
        assert set(result['mixture']['preferences']) == {'oasst1', 'oasst2', 'hh', 'ultrafeedback'}
        exams = {path.stem for path in (out / 'benchmarks').iterdir()}
        assert {'mmlu', 'gsm8k', 'humaneval', 'lambada', 'hellaswag', 'arc_easy', 'squad'} <= exams and len(exams) == 25
        assert 'damaged file' not in result['skipped'] and (first_bytes or not result['skipped'])
    whole, cut = found.values()
    assert whole['chat train rows'] + whole['chat val rows'] == 7 * N_SMALL
    assert whole['preferences train rows'] + whole['preferences val rows'] == (2 * 2 + 4 + 6) * N_SMALL
    assert whole['text train rows'] + whole['text val rows'] == (1 + 1 + 2 * 6 + 1) * N_SMALL
    for kind in ('chat', 'preferences', 'prompts', 'text'):
        assert 0 < cut[f'{kind} train rows'] < whole[f'{kind} train rows']
    names_kept = {path.parent.name for path in (tmp_path / 'raw' / 'first_2000').rglob('*') if path.is_file()}
    assert names_kept == set(names)
