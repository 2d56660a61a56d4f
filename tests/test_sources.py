"""sources.py, forms.py, warc.py: a server that does everything wrong, each public form by hand, broken WARC files."""

import collections, errno, functools, gzip, hashlib, http.server, io, json, lzma, os, random, re, resource, sys, tarfile
import threading, time, zipfile, zlib
from email.utils import formatdate
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import forms, sources, warc

BODY = random.Random(0).randbytes(500_000)
SHA = hashlib.sha256(BODY).hexdigest()
BLOCK = 1 << 15  # at most so much of what came is lost when a connection breaks

# -----------------------------------------------------------------------------
# downloads


class Server(http.server.ThreadingHTTPServer):
    """Answers each request with the next of `script`, the last again and again; `log`: (path, Range, bytes sent)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.log, self.script, self.body, self.tag, self.hang = [], ['whole'], BODY, '"v1"', threading.Event()
        self.url = f'http://127.0.0.1:{self.server_port}'
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, client):
        pass  # a client that hangs up is what some tests want


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        s = self.server
        act = s.script.pop(0) if len(s.script) > 1 else s.script[0]
        act = act(s, self.path) if callable(act) else act
        body, asked, tag = s.body, self.headers.get('Range'), s.tag
        row = [self.path, asked, 0, self.headers]
        s.log.append(row)
        if isinstance(act, tuple) or isinstance(act, int):
            code, headers = act if isinstance(act, tuple) else (act, {})
            self.send_response(code)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header('Content-Length', '0')
            return self.end_headers()
        start = int(re.match(r'bytes=(\d+)-', asked)[1]) if asked and act != 'no ranges' else 0
        if self.headers.get('If-Range', tag) != tag:
            start = 0
        if start and start >= len(body):
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{len(body)}')
            self.send_header('Content-Length', '0')
            return self.end_headers()
        coded = gzip.compress(body) if act == 'gzip' else body[start:]
        self.send_response(206 if start else 200)
        if start:
            shift = 7 if act == 'wrong range' else 0
            self.send_header('Content-Range', f'bytes {start + shift}-{len(body) - 1}/{len(body)}')
        if tag:
            self.send_header('ETag', tag)
        if act == 'gzip':
            self.send_header('Content-Encoding', 'gzip')
        length = len(coded) + {'says too much': 1000, 'says too little': -1000}.get(act, 0)
        self.send_header('Content-Length', str(length))
        self.end_headers()
        half = coded[: len(coded) // 2] if act in ('reset', 'stall', 'cut') else coded
        row[2] = len(half)  # before the client can have it all, and look
        self.wfile.write(half)
        self.wfile.flush()
        if act == 'stall':
            s.hang.wait(5)
        if act == 'reset':  # RST, not FIN
            self.connection.setsockopt(
                __import__('socket').SOL_SOCKET, __import__('socket').SO_LINGER, b'\1\0\0\0\0\0\0\0'
            )
            time.sleep(0.1)
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    for name, value in dict(TIMEOUT=(1, 0.4), WAIT=0.01, MAX_WAIT=1.5, TRIES=4).items():
        monkeypatch.setattr(sources, name, value)
    s = Server()
    yield s
    s.hang.set()
    s.shutdown()
    s.server_close()


def whole_and_clean(path):
    assert path.read_bytes() == BODY and sorted(p.name for p in path.parent.iterdir()) == [path.name]


@pytest.mark.parametrize(
    'script',
    [
        ['cut', 'whole'],
        ['reset', 'whole'],
        ['stall', 'whole'],
        ['cut', 'cut', 'cut', 'whole'],
        [500, 'cut', 503, 'whole'],
        ['cut', (429, {'Retry-After': '0'}), 'whole'],
    ],
)
def test_what_broke_off_goes_on_where_it_broke(server, tmp_path, script):
    server.script = list(script)
    assert sources.download(server.url + '/x', str(tmp_path / 'x'), len(BODY), SHA) == str(tmp_path / 'x')
    whole_and_clean(tmp_path / 'x')
    assert len(server.log) == len(script)
    sent = sum(row[2] for row in server.log)
    assert len(BODY) <= sent <= len(BODY) + BLOCK * len(script)  # nothing comes twice but the block that was broken
    sources.download(server.url + '/x', str(tmp_path / 'x'))
    assert len(server.log) == len(script)  # what is there is not asked for again


def test_a_run_that_was_killed_is_resumed_by_the_next(server, tmp_path):
    server.script = ['cut', 404]
    with pytest.raises(SystemExit):
        sources.download(server.url + '/x', str(tmp_path / 'x'))
    have = (tmp_path / 'x.part').stat().st_size
    assert len(BODY) // 2 - BLOCK <= have <= len(BODY) // 2
    server.script = ['whole']
    sources.download(server.url + '/x', str(tmp_path / 'x'))
    whole_and_clean(tmp_path / 'x')
    assert server.log[-1][1] == f'bytes={have}-' and server.log[-1][2] == len(BODY) - have


def test_killed_before_the_renaming_asks_for_nothing(server, tmp_path):
    (tmp_path / 'x.part').write_bytes(BODY)
    (tmp_path / 'x.part.json').write_text(json.dumps(dict(version='"v1"', total=len(BODY))))
    sources.download(server.url + '/x', str(tmp_path / 'x'))
    whole_and_clean(tmp_path / 'x')
    assert server.log == []


@pytest.mark.parametrize('junk', ['none', '', '{"version": 1', '[]'])
def test_a_part_without_its_note_is_not_trusted(server, tmp_path, junk):
    (tmp_path / 'x.part').write_bytes(b'other' * 1000)
    if junk != 'none':
        (tmp_path / 'x.part.json').write_text(junk)
    sources.download(server.url + '/x', str(tmp_path / 'x'))
    whole_and_clean(tmp_path / 'x')
    assert [row[1] for row in server.log] == [None]


@pytest.mark.parametrize('tag', ['"v2"', '', 'W/"v2"'])
def test_a_file_that_changes_between_two_tries_is_not_glued(server, tmp_path, tag):
    old = bytes(reversed(BODY))[:-10]
    server.body, server.tag = old, '"v1"'

    def change(s, path):
        s.body, s.tag = BODY, tag
        return 'whole'

    server.script = ['cut', change, 'whole']
    sources.download(server.url + '/x', str(tmp_path / 'x'))
    whole_and_clean(tmp_path / 'x')


def test_a_file_that_has_shrunk(server, tmp_path):
    (tmp_path / 'x.part').write_bytes(b'o' * 600_000)
    (tmp_path / 'x.part.json').write_text(json.dumps(dict(version='', total=700_000)))
    server.tag = ''
    sources.download(server.url + '/x', str(tmp_path / 'x'))
    whole_and_clean(tmp_path / 'x')


@pytest.mark.parametrize('act', ['no ranges', 'wrong range'])
def test_servers_that_cannot_resume(server, tmp_path, act):
    server.script = ['cut', act, 'whole']
    sources.download(server.url + '/x', str(tmp_path / 'x'))
    whole_and_clean(tmp_path / 'x')


def test_only_what_may_pass_is_tried_again(server, tmp_path, capsys):
    for code in (401, 403, 404, 410):
        server.script, server.log[:] = [code], []
        with pytest.raises(SystemExit, match=f'HTTP {code}') as stopped:
            sources.download(server.url + '/x', str(tmp_path / 'x'))
        message = str(stopped.value)
        assert server.url + '/x' in message and f"{tmp_path / 'x'} yourself" in message and '\n' not in message
        assert len(server.log) == 1 and not list(tmp_path.iterdir())
    server.script, server.log[:] = [500], []
    with pytest.raises(SystemExit, match='HTTP 500'):
        sources.download(server.url + '/x', str(tmp_path / 'x'))
    assert len(server.log) == 4  # TRIES


@pytest.mark.parametrize('after', ['1', 'date', 'soon', '-5', '99999999'])
def test_retry_after(server, tmp_path, after):
    date = formatdate(time.time() + 2, usegmt=True)  # a whole second: at least 1 s from now
    server.script = [(429, {'Retry-After': date if after == 'date' else after}), 'whole']
    began = time.time()
    sources.download(server.url + '/x', str(tmp_path / 'x'))
    whole_and_clean(tmp_path / 'x')
    took = time.time() - began
    assert took >= 0.9 if after in ('1', 'date') else took >= 1.4 if after == '99999999' else took < 0.7
    assert took < 3


@pytest.mark.parametrize('act', ['says too much', 'says too little'])
def test_lies_about_the_length(server, tmp_path, act):
    server.script = [act]
    with pytest.raises(SystemExit, match='http://127') as stopped:
        sources.download(server.url + '/x', str(tmp_path / 'x'), len(BODY), SHA)
    assert '\n' not in str(stopped.value) and not (tmp_path / 'x').exists()
    assert len(server.log) == 2 if act == 'says too little' else len(server.log) <= 8  # twice whole, and wrong
    server.script = [act, 'whole']
    sources.download(server.url + '/y', str(tmp_path / 'y'), len(BODY), SHA)
    assert (tmp_path / 'y').read_bytes() == BODY


def test_a_wrong_checksum_is_tried_once_more(server, tmp_path):
    for size, sha, word in ((None, '0' * 64, 'not the right file'), (7, None, '500,000 bytes, not 7')):
        server.log[:] = []
        with pytest.raises(SystemExit, match=word):
            sources.download(server.url + '/x', str(tmp_path / 'x'), size, sha)
        assert len(server.log) == 2 and not (tmp_path / 'x').exists() and not (tmp_path / 'x.part').exists()


def test_content_encoding(server, tmp_path):
    server.script = ['gzip']
    sources.download(server.url + '/x', str(tmp_path / 'x'))
    assert (tmp_path / 'x').read_bytes() == BODY and server.log[0][3]['Accept-Encoding'] == 'identity'
    sources.download(server.url + '/x.gz', str(tmp_path / 'x.gz'))  # as Apache labels files that are gzip
    assert gzip.decompress((tmp_path / 'x.gz').read_bytes()) == BODY


def test_a_full_disk_is_one_line_and_keeps_what_came(server, tmp_path, monkeypatch):
    room = [200_000]

    class Full(io.FileIO):
        def write(self, data):
            room[0] -= len(data)
            if room[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr(
        sources,
        'open',
        lambda path, mode='r', **kw: (
            Full(path, mode) if path.endswith('.part') and mode in ('ab', 'wb') else open(path, mode, **kw)
        ),
        raising=False,
    )
    with pytest.raises(SystemExit, match='No space left.*make room') as stopped:
        sources.download(server.url + '/x', str(tmp_path / 'x'))
    have = (tmp_path / 'x.part').stat().st_size
    assert '\n' not in str(stopped.value) and 150_000 < have <= 200_000 and len(server.log) == 1
    room[0] = 10**9
    sources.download(server.url + '/x', str(tmp_path / 'x'))
    whole_and_clean(tmp_path / 'x')
    assert server.log[1][1] == f'bytes={have}-'


def test_nobody_listens(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'WAIT', 0.01)
    with pytest.raises(SystemExit, match='ConnectionError: run again later'):
        sources.download('http://127.0.0.1:9/x', str(tmp_path / 'x'))
    with pytest.raises(SystemExit, match='no://such'):
        sources.download('no://such', str(tmp_path / 'x'))


def test_ranks_share_the_files_and_agree_on_the_list(server, tmp_path, monkeypatch):
    monkeypatch.setitem(
        sources.SOURCES, 'c4', ('text', '', '', '', server.url + '/c4-{00..20}-of.gz', server.url + '/v')
    )
    lists = [sources.fetch('c4', str(tmp_path), 5, rank, 3) for rank in range(3)]
    assert (
        lists[0] == lists[1] == lists[2] == [f'{tmp_path}/c4/c4-0{i}-of.gz' for i in range(5)] + [f'{tmp_path}/c4/v']
    )
    assert sorted(row[0] for row in server.log) == sorted([f'/c4-0{i}-of.gz' for i in range(5)] + ['/v'])  # each once
    sources.fetch('c4', str(tmp_path), 5)
    assert len(server.log) == 6
    assert len(sources.fetch('c4', str(tmp_path), 2)) == 3 and len(server.log) == 6
    with pytest.raises(SystemExit, match="no source 'c5'"):
        sources.fetch('c5', str(tmp_path))


def test_names_that_are_the_same(server, tmp_path, monkeypatch):
    monkeypatch.setitem(sources.SOURCES, 'hh', ('preferences', '', '', '', server.url + '/{a,b}/train.jsonl.gz'))
    assert [os.path.basename(p) for p in sources.fetch('hh', str(tmp_path))] == [
        'a-train.jsonl.gz',
        'b-train.jsonl.gz',
    ]


def test_common_crawl_files_are_spread_over_the_listing(server, tmp_path, monkeypatch):
    monkeypatch.setitem(
        sources.SOURCES, 'commoncrawl', ('text', '', '', '', server.url + '/crawl-data/CRAWL/KIND.paths.gz')
    )
    server.body = gzip.compress('\n'.join(f'crawl-data/X/{i}.warc.wet.gz' for i in range(10)).encode())
    paths = sources.fetch('commoncrawl', str(tmp_path), 3, 1, 2, 'X', wet=True)
    assert [os.path.basename(p) for p in paths] == ['0.warc.wet.gz', '3.warc.wet.gz', '6.warc.wet.gz']
    assert [row[0] for row in server.log] == ['/crawl-data/X/wet.paths.gz', '/crawl-data/X/3.warc.wet.gz']


def test_the_list_of_sources():
    for name, (kind, size, licence, what, *_) in sources.SOURCES.items():
        urls = [*sources.urls_of(name, 10**6)]
        assert all(re.fullmatch(r'https://[\w.-]+/[\w./~-]+', url) for url in urls) and len({*urls}) == len(
            urls
        ), name
        assert {*kind.split(', ')} <= {'text', 'tokens', 'chat', 'preferences', 'prompts', 'benchmarks'} and what
    assert [*sources.urls_of('c4', 2)] == [
        f'https://huggingface.co/datasets/allenai/c4/resolve/main/en/c4-train.0000{i}' '-of-01024.json.gz'
        for i in range(2)
    ]
    assert len([*sources.urls_of('core', 1)]) == 21 and len([*sources.urls_of('hh', 1)]) == 4


# -----------------------------------------------------------------------------
# forms: every row by hand


def read(path, source='files'):
    skipped = collections.Counter()
    return [*sources.read_file(str(path), source, skipped)], dict(skipped)


def lines(path, *rows):
    data = ''.join((row if isinstance(row, str) else json.dumps(row)) + '\n' for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
    return path


user, said = (lambda text: dict(role='user', content=text)), (lambda text: dict(role='assistant', content=text))


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
            [('benchmarks/gsm8k', dict(messages=[user('2+3?')], checks={'number': -5.0}))],
        ),
        (
            'hh',
            [dict(chosen='\n\nHuman: Q\n\nAssistant: good', rejected='\n\nHuman: Q\n\nAssistant: bad')],
            [
                ('prompts', dict(messages=[user('Q')])),
                ('preferences', dict(messages=[user('Q')], completions=['good', 'bad'], ranking=[0, 1])),
            ],
        ),
        (
            'oasst1',
            [dict(message_tree_id='1', prompt=TREE)],
            [
                ('chat', dict(messages=[user('Q'), said('good'), user('More?'), said('Sure')])),
                ('prompts', dict(messages=[user('Q')])),
                ('preferences', dict(messages=[user('Q')], completions=['good', 'fair', 'bad'], ranking=[0, 1, 2])),
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
            'helpsteer2',
            [
                dict(prompt='P', response='a', helpfulness=1),
                dict(prompt='P', response='b', helpfulness=4),
                dict(prompt='R\n<extra_id_1>Assistant\nS\n<extra_id_1>User\nT', response='c', helpfulness=3),
                dict(prompt='R\n<extra_id_1>Assistant\nS\n<extra_id_1>User\nT', response='d', helpfulness=2),
            ],
            [
                ('prompts', dict(messages=[user('P')])),
                ('preferences', dict(messages=[user('P')], completions=['a', 'b'], ranking=[1, 0])),
                ('prompts', dict(messages=[user('R'), said('S'), user('T')])),
                (
                    'preferences',
                    dict(messages=[user('R'), said('S'), user('T')], completions=['c', 'd'], ranking=[0, 1]),
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
            'hellaswag',
            [
                dict(
                    activity_label='Run',
                    ctx='[header] How [title] Go [step]  on',
                    endings=['a [x]b', 'c', 'd', 'e'],
                    label='2',
                )
            ],
            [('benchmarks/hellaswag', dict(query='Run: How. Go on', choices=['a b', 'c', 'd', 'e'], gold=2))],
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
    items, skipped = read(lines(tmp_path / 'x.jsonl', *rows), source)
    assert [(i['kind'], i['row']) for i in items] == wanted and not skipped
    assert {i['source'] for i in items} == {source}
    items, skipped = read(
        lines(tmp_path / 'x.jsonl.gz', '{', '[1]', dict(rows[0], **{k: None for k in rows[0]}), *rows), source
    )
    assert [(i['kind'], i['row']) for i in items][
        -len(wanted) :
    ] == wanted  # broken rows are counted, and that is all
    assert skipped['row that is no JSON object'] == 2 and sum(skipped.values()) + len(items) - len(wanted) == 3


def test_best_of_four(tmp_path, monkeypatch):
    monkeypatch.setattr(
        forms, 'gpt2', lambda: type('E', (), dict(decode=staticmethod(lambda ids: ''.join(map(chr, ids)))))
    )
    ids = lambda text: [ord(c) for c in text] + [50259, 50259]  # padding
    row = dict(query=ids('Once'), sample0=ids(' a'), sample1=ids(' b'), sample2=ids(' c'), sample3=ids(' a'), best=1)
    path = tmp_path / 'offline_5k.json'
    path.write_text(json.dumps([row, dict(row, sample0=ids('b'), sample2=ids('b'), sample3=ids('b'))]))
    items, skipped = read(path, 'openai_sentiment')
    assert [(i['kind'], i['row'].get('completions')) for i in items] == [
        ('prompts', None),
        ('preferences', ['b', 'a']),
        ('preferences', ['b', 'c']),
    ]
    assert all(i['row']['messages'] == [user('Once')] and i['row'].get('ranking', [0, 1]) == [0, 1] for i in items)
    assert skipped == {'ranking with nothing but ties': 1}


def test_other_languages_and_ties(tmp_path):
    tree = dict(message_tree_id='1', prompt=dict(TREE, lang='de'))
    assert read(lines(tmp_path / 'x.jsonl', tree), 'oasst2') == ([], {'conversation in another language': 1})
    tie = dict(prompt='P', response='a', helpfulness=1)
    assert read(lines(tmp_path / 'x.jsonl', tie, tie), 'helpsteer2') == ([], {'ranking with nothing but ties': 1})


def test_mmlu(tmp_path):
    with tarfile.open(tmp_path / 'data.tar', 'w') as tar:
        for name, text in (
            ('data/test/high_school_art_test.csv', '"Who, then?",x,y,z,w,C\nbroken,line\n'),
            ('data/dev/art_dev.csv', 'q,1,2,3,4,A\n'),
            ('data/README.md2', 'x'),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    items, skipped = read(tmp_path / 'data.tar', 'mmlu')
    assert items == [
        dict(
            kind='benchmarks/mmlu',
            source='mmlu',
            row=dict(
                query='Question: Who, then?\nChoices:\nA. x\nB. y\nC. z\nD. w\nAnswer:',
                choices=[*'ABCD'],
                gold=2,
                subject='high school art',
            ),
        )
    ]
    assert skipped == {
        'row that does not fit its form': 1,
        "MMLU's rows to practise on": 1,
        'file of an unknown kind': 1,
    }


# -----------------------------------------------------------------------------
# files of every kind


def test_text_rows_and_their_urls(tmp_path):
    path = lines(
        tmp_path / 'c4-train.00000.json.gz',
        dict(text='A', url='http://a', timestamp=''),
        dict(text='B'),
        dict(text=''),
    )
    assert read(path, 'c4')[0] == [
        dict(kind='text', source='c4', url='http://a', text='A'),
        dict(kind='text', source='c4', url=f'{path}:2', text='B'),
    ]
    assert read(lines(tmp_path / 'web_07.jsonl', dict(text='A')))[0][0]['source'] == 'web'


def test_archives(tmp_path):
    """As OpenWebText has it: in a tar, .xz files which are tars of texts."""
    inner = io.BytesIO()

    def add(tar, name, data):
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))

    with tarfile.open(fileobj=inner, mode='w:xz') as tar:
        add(tar, '1.txt', b'One.\n\n' * 2000)
        add(tar, '2.txt', b'Two.')
    with tarfile.open(tmp_path / 'urlsf_subset00.tar', 'w') as tar:
        add(tar, 'openwebtext/urlsf_subset00-1_data.xz', inner.getvalue())
    items, skipped = read(tmp_path / 'urlsf_subset00.tar', 'openwebtext')
    assert [i['text'] for i in items] == ['One.\n\n' * 2000, 'Two.'] and not skipped  # one file, one document
    with zipfile.ZipFile(tmp_path / 'mine.zip', 'w') as archive:
        archive.writestr('a/page.html', '<p>x')
        archive.writestr('quiz.jsonl', json.dumps(dict(context='c', continuation='d')))
        archive.writestr('.DS_Store', 'x')
    items, skipped = read(tmp_path / 'mine.zip')
    assert [(i['kind'], i['source']) for i in items] == [('text', 'mine'), ('benchmarks/quiz', 'mine')]
    assert items[0]['html'] == b'<p>x' and skipped == {'file of an unknown kind': 1}
    (tmp_path / 'x.tgz').write_bytes(b'no gzip')
    assert read(tmp_path / 'x.tgz', 'c4') == ([], {'damaged file': 1})
    with pytest.raises(SystemExit, match='x.tgz: the file is damaged'):
        read(tmp_path / 'x.tgz')


def old_pieces(text):
    parts = text.replace('\r\n', '\n').split('<|endoftext|>')
    return [
        p
        for p in (parts if len(parts) > 1 else re.findall(r'(?s)\S(?:.{3999,}?(?=\n\s*\n)|.*)', parts[0]))
        if p.strip()
    ]


@pytest.mark.parametrize('marks', [False, True])
def test_long_texts_are_read_in_pieces(tmp_path, monkeypatch, marks):
    rng = random.Random(1)
    text = ''.join(
        'é' * rng.randrange(900) + rng.choice(['\n', '\n \n', '\r\n\r\n', ' <|endoftext|>' if marks else ' '])
        for _ in range(9000)
    )  # 8 MB: several blocks
    (tmp_path / 'x.txt').write_bytes(text.encode())
    wanted = old_pieces(text)
    assert [i['text'] for i in read(tmp_path / 'x.txt')[0]] == wanted and len(wanted) > 500
    monkeypatch.setattr(sources, 'LIMIT', 4_000_000)  # pieces are now given out before the end is seen
    assert [i['text'] for i in read(tmp_path / 'x.txt')[0]] == wanted


def test_tokens_and_parquet(tmp_path):
    assert read(tmp_path / 'fineweb_train_000001.bin', 'fineweb')[0] == [
        dict(kind='tokens', source='fineweb', path=str(tmp_path / 'fineweb_train_000001.bin'))
    ]
    (tmp_path / 'x.parquet').write_bytes(b'PAR1')
    try:
        import pyarrow
    except ImportError:
        with pytest.raises(SystemExit, match='pip install pyarrow'):
            read(tmp_path / 'x.parquet')


def test_bombs_and_giants_stay_small(tmp_path, monkeypatch):
    """Zeros that unpack to 300 MB: as a line of JSON, as a page, as text, as WARC."""
    for module in (sources, warc):
        monkeypatch.setattr(module, 'LIMIT', 1_000_000)
    z = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b''.join(z.compress(bytes(1 << 20)) for _ in range(300)) + z.flush()
    tail = gzip.compress(b'\n' + json.dumps(dict(text='after')).encode())
    for name in ('x.jsonl.gz', 'x.html.gz', 'x.warc.gz', 'x.txt.gz'):
        (tmp_path / name).write_bytes(bomb + tail)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began, skipped = time.time(), collections.Counter()
        texts = [i.get('text', '')[:10] for i in sources.read_file(str(tmp_path / name), 'c4', skipped)]
        assert (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000 and time.time() - began < 20
        ), name  # KB
        if name == 'x.jsonl.gz':
            assert texts == ['after'] and skipped == {'row over 50 MB': 1}
        if name == 'x.warc.gz':
            assert skipped['gzip bomb'] == 1


# -----------------------------------------------------------------------------
# WARC


def record(
    body=b'<p>page', kind='response', url='http://x/', length=None, head=b'', status=b'200 OK', media=b'text/html'
):
    http_part = (
        b'HTTP/1.1 ' + status + b'\r\nContent-Type: ' + media + b'\r\n' + head + b'\r\n'
        if kind == 'response'
        else b''
    )
    content = http_part + body
    return (
        (
            f'WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nContent-Length: '
            f'{len(content) if length is None else length(len(content))}\r\n\r\n'
        ).encode()
        + content
        + b'\r\n\r\n'
    )


def pages(tmp_path, data, name='x.warc.gz'):
    (tmp_path / name).write_bytes(data)
    items, skipped = read(tmp_path / name, 'commoncrawl')
    return [i.get('html', i.get('text')) for i in items], skipped


ONE, TWO, THREE = (record(b'<p>%d' % i * 3000 + b'%d' % i, url=f'http://x/{i}') for i in (1, 2, 3))
GZ = [gzip.compress(r) for r in (ONE, TWO, THREE)]
PAGES = [b'<p>%d' % i * 3000 + b'%d' % i for i in (1, 2, 3)]


def test_whole_files(tmp_path):
    for data, name in (
        (b''.join(GZ), 'x.warc.gz'),
        (gzip.compress(ONE + TWO + THREE), 'x.warc.gz'),
        (ONE + TWO + THREE, 'x.warc'),
        (ONE + TWO + THREE, 'x.warc.gz'),
        (b''.join(GZ), 'x.warc'),
        (b''.join(GZ) + bytes(5000), 'x.warc.gz'),
        ((ONE + TWO + THREE).rstrip(b'\r\n'), 'x.warc'),
    ):
        assert pages(tmp_path, data, name) == (PAGES, {}), name
    items, _ = read(tmp_path / 'x.warc', 'commoncrawl')
    assert items[0] == dict(kind='text', source='commoncrawl', url='http://x/1', type='text/html', html=PAGES[0])


def test_a_broken_member_costs_one_record(tmp_path):
    rng = random.Random(3)
    for trial in range(60):
        broken = bytearray(GZ[1])
        at = rng.randrange(len(broken))
        broken[at : at + 20] = rng.randbytes(20)
        got, skipped = pages(tmp_path, GZ[0] + broken + GZ[2])
        assert got[0] == PAGES[0] and got[-1] == PAGES[2] and len(got) <= 3, (trial, at)
        assert len(got) == 3 or sum(skipped.values()) >= 1 or at < 10
    assert pages(tmp_path, GZ[0] + GZ[1][: len(GZ[1]) // 2] + GZ[2]) == (
        [PAGES[0], PAGES[2]],
        {'damaged WARC file': 1},
    )
    assert pages(tmp_path, GZ[0] + b'junk' * 50_000 + GZ[2]) == ([PAGES[0], PAGES[2]], {'damaged WARC file': 1})
    assert pages(tmp_path, GZ[0] + GZ[1][:-30]) == ([PAGES[0]], {'damaged WARC file': 1})
    assert pages(tmp_path, b'no gzip') == ([], {'damaged WARC file': 1})


def test_cut_at_every_byte(tmp_path):
    small = [record(b'<p>%d' % i) for i in range(2)]
    for data, name in ((b''.join(small), 'x.warc'), (b''.join(map(gzip.compress, small)), 'x.warc.gz')):
        for n in range(len(data)):
            got, skipped = pages(tmp_path, data[:n], name)
            assert got == [b'<p>0', b'<p>1'][: len(got)] and sum(skipped.values()) <= 1


@pytest.mark.parametrize(
    'lie',
    [
        lambda n: n + 5,
        lambda n: n - 5,
        lambda n: n + 500,
        lambda n: 0,
        lambda n: 40_000_000,
        lambda n: -3,
        lambda n: '',
        lambda n: 'many',
        lambda n: 10**17,
    ],
)
def test_lies_about_a_records_length(tmp_path, lie):
    got, skipped = pages(tmp_path, GZ[0] + gzip.compress(record(b'<p>' + b'x' * 400, length=lie)) + GZ[2])
    assert got[:1] == PAGES[:1] and sum(skipped.values()) >= 1
    assert got[1:] == PAGES[2:] or lie(9) == 10**17  # a record said to go on to the end takes the rest


@pytest.mark.parametrize(
    'body, head',
    [
        (b'4\r\n<p>w\r\n5;x=y\r\nikis!\r\n0\r\n\r\n', b'Transfer-Encoding: chunked\r\n'),
        (b'4\r\n<p>w\r\n5\r\nikis!', b'Transfer-Encoding: chunked\r\n'),
        (b'<p>wikis!', b'Transfer-Encoding: chunked\r\n'),
        (gzip.compress(b'<p>wikis!'), b'Content-Encoding: gzip\r\n'),
        (zlib.compress(b'<p>wikis!'), b'Content-Encoding: deflate\r\n'),
        (zlib.compress(b'<p>wikis!')[2:-4], b'Content-Encoding: deflate\r\n'),
        (b'<p>wikis!', b'Content-Encoding: gzip\r\n'),
        (b'<p>wikis!', b'Content-Encoding: br\r\n'),
    ],
)
def test_codings_of_http(tmp_path, body, head):
    assert pages(tmp_path, gzip.compress(record(body, head=head))) == ([b'<p>wikis!'], {})


def test_what_is_no_page(tmp_path):
    data = [
        record(media=b'image/png'),
        record(status=b'404 Not Found'),
        record(b''),
        record(kind='request'),
        record(kind='metadata'),
        record(b'\x0b\x02', head=b'Content-Encoding: br\r\n'),
        record(b'\x1f\x8bno', head=b'Content-Encoding: gzip\r\n'),
        record(b'<p>ok'),
    ]
    assert pages(tmp_path, b''.join(map(gzip.compress, data))) == (
        [b'<p>ok'],
        {'not a page (status or type)': 2, 'empty page': 1, 'page in an unknown coding': 2},
    )
    text = record('Grüße'.encode(), kind='conversion')
    assert pages(tmp_path, gzip.compress(text), 'x.warc.wet.gz') == (['Grüße'], {})


def test_pages_over_the_limit_are_passed_over(tmp_path, monkeypatch):
    for module in (sources, warc):
        monkeypatch.setattr(module, 'LIMIT', 20_000)
    big = record(random.Random(0).randbytes(300_000))
    packed = record(gzip.compress(bytes(300_000)), head=b'Content-Encoding: gzip\r\n')
    data = [ONE, big, packed, THREE]
    for form in (b''.join(map(gzip.compress, data)), gzip.compress(b''.join(data))):
        assert pages(tmp_path, form) == ([PAGES[0], PAGES[2]], {'page over 50 MB': 2})
