"""
Mutated input for everything that reads: no traceback, no hang, no gigabyte of memory.

$ OMP_NUM_THREADS=1 python tests/bench/fuzz.py                          # 8 x 10,000 inputs
$ OMP_NUM_THREADS=1 python tests/bench/fuzz.py --cases=500 --only=warc,api
$ OMP_NUM_THREADS=1 python tests/bench/fuzz.py --only=warc --case=17    # one input, with its traceback

Each target takes good inputs, damages them (bytes, or values of the wrong type, size and sign) and
calls the functions that a stage reads them with. The reader may accept the input, or refuse it with
what configurator.py prints as one line. A failure is everything else: a traceback, more than 5
seconds of CPU time or 60 of the clock, more than 1 GB of memory, a crash. Input i of a target is the
same in every run. Not for Windows (fork).
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import base64, collections, contextlib, copy, functools, gzip, io, json, mmap, random, re
import resource, shutil, signal, socket, struct, sys, tempfile, threading, time, traceback, zipfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import numpy as np
import torch
import torch.distributed.checkpoint.state_dict

import configurator
import model
from conftest import definitions, make_data, make_spec

CPU_SECONDS = 5
CLOCK_SECONDS = 60
MEMORY = 1 << 30
flags = dict(cases='10000', only='', case='')
for word in sys.argv[1:]:
    name, _, value = word.removeprefix('--').partition('=')
    assert name in flags, f'no flag {word}: there are --cases=500 --only=warc,api --case=17'
    flags[name] = value
sys.argv = sys.argv[:1] # the configurator reads it

# -----------------------------------------------------------------------------
# damage

NUMBERS = [0, -1, 1, 2, 255, 2**31, -2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float('nan'),
           float('inf'), 1e-320]
TEXTS = ['', ' ', 'x', '\0', '\ud800', '<|end|>', 'é🙂', 'A' * 5000, ' ' * 30_000, '1' * 400, '../..',
         'true', '1e999', '-', '{}']
OTHERS = [None, True, False, [], {}, [[]], [None], {'': None}, [{}], [0, 0]]
SNIPPETS = [b'\0', b'\xff', b'\n', b'\r\n', b'"', b'\\', b'{', b'}', b'[', b']', b'<', b'>', b'&#',
            b'&#x110000;', b'<!--', b'<![CDATA[', b'</', b'\x1f\x8b\x08', b'WARC/1.0\r\n', b'-1',
            b'99999999999', b'1e999', b'NaN', b'\xef\xbb\xbf', b'\xff\xfe', b'\xed\xa0\x80', b'=', b',']

def damage_bytes(data, rng):
    """Up to eight small changes: cut, repeat, overwrite, insert, exchange."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        n = len(data)
        i = rng.randrange(n + 1)
        j = min(n, i + rng.choice([1, 1, 2, 4, 16, 200]))
        kind = rng.randrange(7)
        if kind == 0:
            del data[i:j]
        elif kind == 1:
            data[i:i] = data[i:j] * rng.choice([1, 2, 50])
        elif kind == 2 and i < n:
            data[i] = rng.randrange(256)
        elif kind == 3 and i < n:
            data[i] ^= 1 << rng.randrange(8)
        elif kind == 4:
            data[i:j] = rng.choice(SNIPPETS)
        elif kind == 5:
            data[i:i] = rng.randbytes(rng.choice([1, 4, 64]))
        elif rng.random() < 0.2: # not always: nothing is left to damage in a short rest
            del data[i:]
    return bytes(data)

def places_of(value, place=()):
    """The paths to all items of nested lists and dicts."""
    found = [place]
    items = []
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        found += places_of(item, (*place, key))
    return found

def damage_value(value, rng, others=()):
    """A copy in which up to three items are replaced, removed, renamed or repeated."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2, 3])):
        *path, key = rng.choice(places_of(value)[1:] or [(None,)])
        if key is None:
            break
        parent = value
        for step in path:
            parent = parent[step]
        new = rng.choice([*NUMBERS, *TEXTS, *OTHERS, *others])
        kind = rng.randrange(6)
        old = parent[key]
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            twice = key * 2 if isinstance(key, str) else 'y'
            name = rng.choice(['x', '', twice])
            parent[name] = parent.pop(key)
        elif kind == 2 and isinstance(parent, list):
            parent += [old] * rng.choice([1, 5, 300])
        elif kind == 3 and isinstance(old, str):
            damaged = damage_bytes(old.encode('utf-8', 'replace'), rng)
            parent[key] = damaged.decode('utf-8', 'replace')
        elif kind == 4 and type(old) in (int, float): # a bool is neither
            parent[key] = rng.choice([-old, old + 1, old * 10**6, str(old)])
        else:
            parent[key] = copy.deepcopy(new)
    return value

def damage_json(value, rng):
    """A value as JSON, damaged before or after it was written -> bytes."""
    if rng.random() < 0.7:
        value = damage_value(value, rng)
        return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode('utf-8', 'surrogatepass')
    return damage_bytes(json.dumps(value).encode(), rng)

# -----------------------------------------------------------------------------
# targets: each is a class that makes what it needs, and whose object reads input i

class Config:
    """Command lines, and profiles."""
    def __init__(self, folder):
        self.profile = folder / 'profile.py'
        self.texts = [path.read_bytes() for path in sorted((ROOT / 'config').glob('*.py'))]
        configurator.read_settings = functools.cache(configurator.read_settings)
        self.settings = {}
        for path in sorted(ROOT.glob('*.py')):
            found = configurator.read_settings(path)
            if found:
                self.settings[path] = {name: default for name, (default, _, _) in found.items()}

    def read(self, rng):
        script = rng.choice(list(self.settings))
        words = []
        for _ in range(rng.choice([1, 1, 2, 4])):
            settings = self.settings[rng.choice(list(self.settings))]
            name = rng.choice(list(settings))
            value = rng.choice([settings[name], rng.choice(NUMBERS), rng.choice(TEXTS)])
            word = rng.choice(['--{}={}', '--{}={}', '{}={}', '--{}', '-{}={}']).format(name, value)
            if rng.random() < 0.5:
                damaged = damage_bytes(word.encode('utf-8', 'replace'), rng)
                word = damaged.decode('utf-8', 'surrogateescape') # as Python reads sys.argv
            words.append(word.replace('\0', '')) # no command line can hold it
        if rng.random() < 0.5:
            self.profile.write_bytes(damage_bytes(rng.choice(self.texts), rng))
            words.append(str(self.profile))
        if rng.random() < 0.1:
            words.append('--help')
        sys.argv = [script.name, *words]
        with contextlib.suppress(SystemExit): # --help
            configurator.configure({'__file__': str(script)})

class Pages:
    """WARC, ARC, WET, HTML, text files: reading, and all steps of pass one."""
    def __init__(self, folder):
        self.folder = folder
        self.prepare = definitions('prepare_data.py')
        sentences = ' '.join(f'Anna has {i} owls, and they live in the old house.' for i in range(20))
        body = f'<h1>Owls</h1><p>{sentences}</p><ul><li>One<li>Two</ul><table><tr><td>a<td>b</table>'
        extra = '<script>if (a < b) {}</script><!-- no --><pre>x\n y</pre><a href="/x">&eacute;&#233;</a>'
        self.html = [
            f'<!doctype html><html><head><meta charset=utf-8><title>Owls</title></head><body>{body}{extra}'
            f'<p>{sentences}</body></html>'.encode(),
            f'<div class="nav"><a href=x>x</a></div><article>{body * 3}</article>'.encode('utf-16'),
            ('<p>é</p>' * 30 + body).encode('latin-1'), b'<' * 3000, b'<div>' * 3000 + b'x', b'&' * 5000]
        self.records = [self.record(page, f'http://a.example/{i}') for i, page in enumerate(self.html)]
        wet = ('WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: http://b.example/\r\n'
               f'Content-Length: {len(sentences)}\r\n\r\n{sentences}\r\n\r\n')
        self.records.append(wet.encode())
        http = b'HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n' + self.html[0]
        self.arc = (b'filedesc://x 0.0.0.0 2008 text/plain 4\nabc\n\n'
                    b'http://c.example/ 1.2.3.4 2008 text/html %d\n%s\n' % (len(http), http))
        self.steps = [step for name, step in self.prepare.FIRST_STEPS.items() if name != 'text']

    def record(self, page, url):
        http = b'HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n' + page
        head = (f'WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\n'
                f'Content-Length: {len(http)}\r\n\r\n')
        return head.encode() + http + b'\r\n\r\n'

    def read(self, rng):
        kind = rng.choice(['warc.gz', 'warc', 'arc.gz', 'arc', 'html', 'txt', 'html.gz', 'wet.gz', 'json'])
        if kind in ('html', 'txt', 'html.gz', 'json'):
            data = damage_bytes(rng.choice(self.html), rng)
        elif kind.startswith('arc'):
            data = damage_bytes(self.arc, rng)
        else:
            records = rng.choices(self.records, k=rng.choice([1, 2, 3]))
            if rng.random() < 0.7:
                records = [damage_bytes(record, rng) for record in records]
            if kind.endswith('.gz'):
                records = [gzip.compress(record) for record in records]
            data = b''.join(records)
            if rng.random() < 0.5:
                data = damage_bytes(data, rng)
        if kind in ('arc.gz', 'html.gz'):
            data = gzip.compress(data)
            if rng.random() < 0.5:
                data = damage_bytes(data, rng)
        path = self.folder / f'x.{kind}'
        path.write_bytes(data)
        skipped = collections.Counter()
        refused = False
        for item in self.prepare.read_file(str(path), 'files', skipped):
            refused = refused or item['kind'] == 'bad row'
            if item['kind'] == 'text' and not self.prepare.text_step(item):
                for step in self.steps:
                    step(item)
                self.prepare.minhash(item['text'])
        return refused or skipped

class Rows:
    """Chats, rankings, prompts, benchmarks, documents and logs, as every stage reads them."""
    def __init__(self, folder):
        self.folder = folder
        data = folder / 'data'
        make_data(data)
        self.tok = model.Tokenizer(make_spec())
        known = dict(tok=self.tok, data_dir=str(folder), out_dir=str(folder), max_length=48, block_size=48,
                     max_new_tokens=6, run=SimpleNamespace(world_size=1, rank=0), print0=lambda *words: None)
        self.prepare = definitions('prepare_data.py', print0=known['print0'])
        self.tokenizer = definitions('tokenizer.py', tok=self.tok, dtype=np.uint16, prepare_command='x',
                                     print0=known['print0'])
        self.sft = definitions('sft.py', **known)
        self.reward = definitions('reward.py', **known)
        self.rlhf = definitions('rlhf.py', **{**known, 'reward': 'checks', 'task': ''})
        self.eval = definitions('eval.py', **known)
        self.rows = {}
        for kind in ('chat', 'preferences', 'prompts'):
            self.rows[kind] = [row for _, row in model.read_jsonl(data / f'{kind}_train.jsonl')]
        checks = dict(contains=['owl'], excludes=['x'], count={'of': ['a', 'b'], 'min': 1}, number=3,
                      min_words=1, max_words=9, likes=['please'], equals='owl')
        self.rows['prompts'].append(dict(messages=self.rows['prompts'][0]['messages'], checks=checks, task='t'))
        self.rows['preferences'].append(dict(self.rows['preferences'][0], checks=checks, ranking=[0, [1, 2]]))
        self.rows['benchmarks'] = []
        for path in sorted((data / 'benchmarks').glob('*')):
            self.rows['benchmarks'] += [row for _, row in model.read_jsonl(path)]
        messages = [dict(role='user', content='What is 1/2 + 3?')]
        self.rows['benchmarks'] += [
            dict(messages=messages, checks=dict(number=3.5), answer='#### 3.5'),
            dict(prompt='def f():\n', test='assert f()', entry_point='f', task_id='HumanEval/1')]
        replies = [dict(text=text, role='assistant', rank=i, replies=[]) for i, text in enumerate(['Yo', 'No'])]
        node = dict(text='Hi', role='prompter', lang='en', replies=replies)
        self.rows['public'] = [
            dict(conversations=[{'from': 'human', 'value': 'Hi'}, {'from': 'gpt', 'value': 'Yo'}]),
            dict(instruction='Say', output='x'), dict(question='1+1?', answer='<<1+1=2>> #### 2'),
            dict(prompt='### Instruction:\nSay\n### Response:', response='x'), dict(prompt='Hi', completion='Yo'),
            dict(chosen='\n\nHuman: Hi\n\nAssistant: Yo', rejected='\n\nHuman: Hi\n\nAssistant: No'),
            dict(message_tree_id='1', prompt=node),
            dict(instruction='Say', completions=[
                dict(response='a', annotations=dict(x=dict(Rating='1'))),
                dict(response='b', annotations=dict(x=dict(Rating='N/A')))])]
        self.rows['documents'] = [dict(text='Anna has the owl.', source='web', url='http://x')]
        self.rows['logs'] = [dict(step=i, loss=3.0 - i, val_loss=2.5) for i in range(3)]

    def read(self, rng):
        kind = rng.choice(list(self.rows))
        lines = [json.dumps(row).encode() for row in rng.choices(self.rows[kind], k=rng.choice([1, 3]))]
        i = rng.randrange(len(lines))
        lines[i] = damage_json(json.loads(lines[i]), rng)
        names = dict(chat='chat_train', preferences='preferences_train', prompts='prompts_train', logs='base')
        path = self.folder / f'{names.get(kind, kind)}.jsonl'
        path.write_bytes(b'\n'.join(lines) + b'\n')
        if kind == 'logs':
            self.eval.read_curve('base', 'loss')
            return
        refused = 0
        for item in self.prepare.read_file(str(path), 'files', collections.Counter()):
            if item['kind'] == 'bad row':
                refused += 1
            else:
                self.prepare.describe(item)
        readers = dict(
            chat=[lambda: self.sft.load_examples('train'), lambda: list(self.tokenizer.encode_conversations(path))],
            preferences=[lambda: self.reward.load_examples('train')],
            prompts=[lambda: self.rlhf.load_prompts('train')],
            benchmarks=[self.read_benchmark],
            documents=[lambda: list(self.tokenizer.read_batches('x', [str(path)], collections.Counter()))],
            public=[])
        for reader in readers[kind]:
            refused += is_refused(reader)
        return refused

    def read_benchmark(self):
        questions, _ = self.eval.load_benchmark(str(self.folder / 'benchmarks.jsonl'))
        for i, question in enumerate(questions):
            task = dict(shots=1, delimiter=' ')
            before = self.eval.few_shot(questions, i, task)
            pairs = [self.eval.join(question, k, ' ') for k in range(len(question['choices']))]
            self.eval.encode_question(self.tok, before, pairs, 48)

class TokenizerFile:
    """tokenizer.json, ours and Hugging Face's, and then a text."""
    def __init__(self, folder):
        self.path = folder / 'tokenizer.json'
        self.convert = definitions('convert.py')
        spec = make_spec()
        spec['pattern'] = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
                           r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s+(?!\S)|\s")
        self.ours = [make_spec(), spec, dict(make_spec(), n_vocab=300)]
        self.theirs = self.convert.tokenizer_json(model.Tokenizer(make_spec()))

    def read(self, rng):
        if rng.random() < 0.7:
            spec = copy.copy(rng.choice(self.ours))
            if rng.random() < 0.3: # else most of the damage is done to one of 256 bytes
                pattern = damage_bytes(spec['pattern'].encode(), rng)
                spec['pattern'] = pattern.decode('utf-8', 'replace')
                self.path.write_text(json.dumps(spec), encoding='utf-8')
            else:
                self.path.write_bytes(damage_json(spec, rng))
            tok = model.Tokenizer.load(str(self.path))
        else:
            self.path.write_bytes(damage_json(self.theirs, rng))
            tok, _ = self.convert.read_tokenizer(str(self.path))
        turns = [dict(role='user', content="It's 12,345 🙂\n\tend  "),
                 dict(role='assistant', content='Anna has the owl')]
        ids, _ = tok.render(turns)
        tok.decode(ids)
        tok.decode_answer(ids)

class Shards:
    """Token shards, as prepare_data.py, tokenizer.py and pretrain.py look at them."""
    def __init__(self, folder):
        self.path = folder / 'train_000000.bin'
        self.tok = model.Tokenizer(make_spec())
        self.tokenizer = definitions('tokenizer.py')
        run = SimpleNamespace(device_type='cpu', device='cpu')
        self.pretrain = definitions('pretrain.py', run=run, tok=self.tok, block_size=16,
                                    vocab_size=self.tok.n_vocab)
        self.good = []
        for kind in (np.uint16, np.uint32):
            ids = np.arange(270, dtype=kind)
            model.write_shard(str(self.path), ids, self.tok.hash)
            self.good.append(self.path.read_bytes())

    def read(self, rng):
        data = bytearray(rng.choice(self.good))
        if rng.random() < 0.5: # the four numbers of the header
            place = rng.randrange(4)
            value = rng.choice([0, -1, 1, 271, 269, 2**31 - 1, -2**31, rng.randrange(2**31)])
            data[4 * place:4 * place + 4] = struct.pack('<i', value)
        if rng.random() < 0.6:
            data = damage_bytes(data, rng)
        self.path.write_bytes(data)
        self.tokenizer.is_foreign(str(self.path))
        shard = model.read_shard(str(self.path), self.tok.hash)
        n_windows = max(0, len(shard) - 1) // 16
        if n_windows: # what pretrain.py does next
            ends = np.array([n_windows])
            self.pretrain.space.update(shards=dict(train=[shard]), window_ends=dict(train=ends))
            self.pretrain.get_windows('train', range(n_windows))

class Safetensors:
    """Weights of other people."""
    def __init__(self, folder):
        self.path = folder / 'model.safetensors'
        self.convert = definitions('convert.py')
        self.convert.write_safetensors(str(self.path), dict(a=torch.ones(3, 4), b=torch.zeros(5), c=torch.zeros(0)))
        data = self.path.read_bytes()
        n = int.from_bytes(data[:8], 'little')
        self.header = json.loads(data[8:8 + n])
        self.header['b']['dtype'] = 'BF16'
        self.header['b']['shape'] = [10]
        self.values = data[8 + n:]

    def read(self, rng):
        header = json.dumps(self.header).encode()
        if rng.random() < 0.7:
            header = damage_json(self.header, rng)
        header += b' ' * (-len(header) % rng.choice([8, 8, 8, 3]))
        n = len(header)
        if rng.random() < 0.1:
            n = rng.choice([0, n + 1, n - 1, 2**62, 2**63, 2**64 - 1])
        data = (n % 2**64).to_bytes(8, 'little') + header + self.values
        if rng.random() < 0.3:
            data = damage_bytes(data, rng)
        self.path.write_bytes(data)
        for tensor in self.convert.read_safetensors(str(self.path)).values():
            tensor.float().sum()

class Checkpoints:
    """STAGE.pt, then a forward pass; STAGE.resume.pt, then its optimizer."""
    def __init__(self, folder):
        self.folder = folder
        self.tok = model.Tokenizer(make_spec())
        self.config = model.GPTConfig('llama', self.tok.n_vocab, 16, n_layer=1, n_head=2, n_embd=8)
        self.good = {}
        for stage, kind in (('base', model.GPT), ('reward', model.ScalarModel)):
            net = kind(self.config)
            path = folder / f'{stage}.pt'
            model.save_checkpoint(str(path), stage, net.state_dict(), asdict(self.config), self.tok,
                                  dict(seed=1, learning_rate=0.1), 3, dict(val_loss=1.5))
            self.good[stage] = path.read_bytes()
        self.net, self.optimizers = self.start()
        self.net(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
        for optimizer in self.optimizers:
            optimizer.step()
        state = model.get_state(self.net, self.optimizers)
        path = folder / 'sft.resume.pt'
        model.save_resume(str(path), 3, state, dict(seed=1), ema_loss=1.0, seconds=2.0)
        self.good['resume'] = path.read_bytes()
        self.values = {name: torch.load(io.BytesIO(data), weights_only=True) for name, data in self.good.items()}
        self.tensors = [torch.zeros(0), torch.zeros(2, 3), torch.zeros(8, dtype=torch.int64), torch.tensor(3.0),
                        torch.zeros(1).expand(10**9), torch.full((8,), float('nan')), torch.zeros(3).to_sparse(),
                        torch.zeros(8, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.complex64)]

    def start(self):
        net = model.GPT(self.config)
        return net, model.make_optimizers(net, 0.1, 0.1, (0.9, 0.95))

    def damage(self, kind, rng):
        way = rng.randrange(4)
        if way == 0: # the check sums of the zip file find it
            return damage_bytes(self.good[kind], rng)
        if way == 1: # they fit again, so the pickle is read
            return self.rezip(self.good[kind], rng)
        buffer = io.BytesIO()
        torch.save(damage_value(self.values[kind], rng, self.tensors * 4), buffer)
        return buffer.getvalue()

    def rezip(self, data, rng):
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, 'w') as new:
            names = old.namelist()
            chosen = rng.choice([name for name in names if name.endswith('data.pkl')] * 5 + names)
            for name in names:
                content = old.read(name)
                new.writestr(name, damage_bytes(content, rng) if name == chosen else content)
        return buffer.getvalue()

    def read(self, rng):
        kind = rng.choice(list(self.good))
        data = self.damage(kind, rng)
        if kind == 'resume':
            path = self.folder / 'sft.resume.pt'
            path.write_bytes(data)
            saved = model.load_resume(str(path), dict(seed=1))
            net, optimizers = self.start()
            model.set_state(net, optimizers, saved['state'])
            return
        path = self.folder / f'{kind}.pt'
        path.write_bytes(data)
        ckpt = model.load_checkpoint(str(path), [kind], 'python x.py')
        tok = model.Tokenizer(ckpt['tokenizer'])
        net = model.load_model(ckpt, 'cpu', model.ScalarModel if kind == 'reward' else model.GPT)
        n = min(4, net.config.block_size)
        ids = [tok.eot] + tok.encode('Anna has the owl') # a damaged pattern may find nothing there
        net(torch.tensor([ids[:n]]))

class Requests:
    """The server: every path, with a body or a head that is damaged. It must answer, and go on."""
    def __init__(self, folder):
        self.folder = folder
        tok = model.Tokenizer(make_spec())
        config = model.GPTConfig('llama', tok.n_vocab, 32, n_layer=1, n_head=2, n_embd=8)
        for stage in ('base', 'sft', 'rlhf', 'reward'):
            net = model.ScalarModel(config) if stage == 'reward' else model.GPT(config)
            path = str(folder / f'{stage}.pt')
            model.save_checkpoint(path, stage, net.state_dict(), asdict(config), tok, {}, 1, {})
        (folder / 'preferences_val.jsonl').write_text('', encoding='utf-8')
        run = SimpleNamespace(device=torch.device('cpu'), device_type='cpu', dtype=torch.float32,
                              autocast=contextlib.nullcontext)
        self.chat = definitions('chat.py', run=run, out_dir=str(folder), data_dir=str(folder))
        self.chat.space.update(PROFILES=['config/tiny.py'], run_commands=self.no_training)
        turns = [dict(role='system', content='Hi'), dict(role='user', content='Say')]
        ask = dict(model='sft', messages=turns, max_tokens=3, temperature=1.0, top_k=3, top_p=0.9, min_p=0.1, seed=3,
                   n=2, stop=['x'], logprobs=True, top_logprobs=2, stream=False, stream_options=dict(include_usage=True))
        user = turns[1:]
        rank = dict(messages=user, completions=['a', 'b', 'c'], ranking=[0, [1, 2]])
        self.good = [
            ('POST', '/v1/chat/completions', ask), ('POST', '/v1/chat/completions', dict(ask, stream=True)),
            ('POST', '/v1/completions', dict(ask, prompt='Anna')), ('GET', '/health', None), ('GET', '/v1/models', None),
            ('GET', '/api/info', None), ('GET', '/api/prompts?n=3', None), ('GET', '/api/rank', None),
            ('GET', '/api/curves', None), ('GET', '/api/train', None), ('GET', '/api/preference', None),
            ('POST', '/api/answers', dict(messages=user, models=['sft', 'rlhf'], n=2, max_tokens=2)),
            ('POST', '/api/rank', rank), ('POST', '/api/undo', {}), ('POST', '/api/train', dict(what='dpo')),
            ('POST', '/api/train/stop', {}),
            ('POST', '/api/preference', dict(messages=user, models=['sft', 'rlhf'], completions=['a', 'b'], winner=1)),
            ('POST', '/api/inside', dict(models=['sft'], text='Say\n---\nowl', chat=True, layer=0, head=1)),
            ('POST', '/api/inside', dict(models=['base', 'rlhf'], text='Anna has', layer=0, attention_of='base'))]
        self.server = self.chat.Server(('127.0.0.1', 0), self.chat.Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def no_training(self, commands):
        self.chat.TRAINING.running = False

    def read(self, rng):
        method, path, body = rng.choice(self.good)
        payload = b''
        if body is not None:
            payload = damage_json(body, rng)
        elif rng.random() < 0.5:
            path = damage_bytes(path.encode(), rng).decode('latin-1')
        head = f'{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
        head = f'{head}Content-Length: {len(payload)}\r\n\r\n'.encode('latin-1')
        if rng.random() < 0.15:
            head = damage_bytes(head, rng)
        if rng.random() < 0.02: # else each request about rankings has more and more to judge
            shutil.rmtree(self.folder / 'human', ignore_errors=True)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            reply = self.send(head + payload)
        assert not printed.getvalue(), f'the server prints {printed.getvalue()!r:.300}'
        status = re.match(rb'HTTP/1.0 (\d+)', reply)
        status = int(status[1]) if status else 0
        assert status < 500 or status in (501, 505), reply[:300] # 501, 505: of another protocol
        return status != 200

    def send(self, data):
        with socket.create_connection(('127.0.0.1', self.server.server_port), timeout=0.5) as s:
            reply = b''
            with contextlib.suppress(ConnectionError):
                s.sendall(data)
                while True:
                    try:
                        part = s.recv(1 << 16)
                    except TimeoutError: # it may wait for the rest of a body: there is none
                        s.settimeout(CLOCK_SECONDS)
                        s.shutdown(socket.SHUT_WR)
                        continue
                    reply += part
                    if not part:
                        break
        return reply

TARGETS = dict(config=Config, warc=Pages, jsonl=Rows, tokenizer=TokenizerFile, shards=Shards,
               safetensors=Safetensors, checkpoints=Checkpoints, api=Requests)

# -----------------------------------------------------------------------------
# what counts as a failure

def is_refused(reader):
    """Call it. A refusal of one line must not keep the other readers from trying."""
    try:
        reader()
    except Exception as e:
        if problem_of(e):
            raise
        return True
    return False

def problem_of(error):
    """'' if the user would read one line about his input, else where and what the error is."""
    text = str(error)
    if isinstance(error, MemoryError) or 'allocate' in text or 'out of memory' in text:
        return f'memory: {text:.200}'
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        configurator.print_error(type(error), error, error.__traceback__)
    lines = printed.getvalue().rstrip('\n').split('\n')
    if len(lines) == 1 and lines[0].startswith('error: '):
        return ''
    frames = traceback.extract_tb(error.__traceback__)
    inner = [frame for frame in frames if str(ROOT) in frame.filename][-1]
    return f'{Path(inner.filename).name}:{inner.lineno}: {type(error).__name__}: {text[:150]!r}'

def try_case(target, name, i):
    """-> (refused with one line?, problem)"""
    try:
        refused = target.read(random.Random(f'{name} {i}'))
    except BaseException as e: # a panic of Rust code is no Exception
        problem = problem_of(e)
        if flags['case']:
            traceback.print_exc()
        return True, problem
    return bool(refused), ''

def run_cases(name, first, n_cases, place, results):
    """In a process of its own: try the cases first .. n_cases - 1, tell the parent where we are."""
    if not flags['case']: # a panic of Rust code writes there, whatever sys.stderr is
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    folder = Path(tempfile.mkdtemp(prefix='fuzz'))
    silent = io.StringIO()
    with contextlib.redirect_stdout(silent):
        target = TARGETS[name](folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    used = int(re.search(r'VmSize:\s+(\d+)', Path('/proc/self/status').read_text())[1]) * 1024
    if name != 'api': # its threads reserve address space that they never use
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, -1))
    found = dict(refused=0, problems=[])
    for i in range(first, n_cases):
        place[:8] = i.to_bytes(8, 'little')
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS) # at their ends the system ends the process
        signal.setitimer(signal.ITIMER_REAL, CLOCK_SECONDS)
        with contextlib.redirect_stdout(silent):
            refused, problem = try_case(target, name, i)
        found['refused'] += refused
        if problem:
            found['problems'].append([i, problem])
        silent.truncate(0)
        found['memory'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before # KB
        if problem or i % 100 == 0 or i == n_cases - 1:
            results.write_text(json.dumps(found), encoding='utf-8')
    shutil.rmtree(folder)

def fuzz(name, first, n_cases):
    """All cases of a target, in as many processes as are needed. -> refused, problems, memory in MB"""
    place = mmap.mmap(-1, 8)
    work = Path(tempfile.mkdtemp(prefix='fuzz'))
    refused = 0
    problems = []
    memory = 0
    while first < n_cases:
        results = work / f'{first}.json'
        pid = os.fork()
        if pid == 0:
            run_cases(name, first, n_cases, place, results)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if results.exists():
            found = json.loads(results.read_text(encoding='utf-8'))
            refused += found['refused']
            problems += found['problems']
            memory = max(memory, found['memory'] / 1024)
        first = n_cases
        if code != 0:
            last = int.from_bytes(place[:8], 'little')
            reasons = {-signal.SIGPROF: f'more than {CPU_SECONDS} CPU seconds',
                       -signal.SIGALRM: f'more than {CLOCK_SECONDS} seconds'}
            problems.append([last, reasons.get(code, f'exit code {code}')])
            first = last + 1
    shutil.rmtree(work)
    return refused, problems, memory

names = flags['only'].split(',') if flags['only'] else list(TARGETS)
n_failed = 0
for name in names:
    assert name in TARGETS, f'no target {name}: there are {", ".join(TARGETS)}'
    first, n_cases = 0, int(flags['cases'])
    if flags['case']:
        first = int(flags['case'])
        n_cases = first + 1
    began = time.monotonic()
    refused, problems, memory = fuzz(name, first, n_cases)
    seconds = time.monotonic() - began
    print(f'{name:12} {n_cases - first:6,} inputs, {refused:6,} refused in one line, {len(problems):4} failures, '
          f'{seconds:5.0f} s, {memory:4.0f} MB more at most', flush=True)
    by_kind = collections.defaultdict(list)
    for i, problem in problems:
        by_kind[problem[:100]].append(i)
    for problem, cases in sorted(by_kind.items(), key=lambda item: -len(item[1]))[:20]:
        print(f'    {len(cases):4} x {problem}, as --case={cases[0]}', flush=True)
    n_failed += len(problems)
sys.exit(n_failed > 0)
