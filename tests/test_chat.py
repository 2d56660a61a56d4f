"""
chat.py: answers from a flag, a pipe and a terminal; what goes to stdout; sampling; long conversations; Ctrl-C; the batch;
the API and the calls of the page; requests that are wrong, slow or hostile.
"""
import http.client
import itertools
import json
import math
import random
import re
import socket
import sys
import threading
import time
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from conftest import definitions, folder_bytes, make_spec, stocked, user, write_rows
from model import (
    GPT, GPTConfig, ScalarModel, Tokenizer, generate, load_checkpoint, load_model, make_optimizers, pad_right,
    save_checkpoint)

TEXTS = {'Anna has the': ' owl.', 'Bela has the': ' cat.'} # what the base model continues
SAY = ['Say a word.', 'Say it.', 'Say']                    # what the assistant answers with 'owl'

@pytest.fixture(scope='module')
def out(tmp_path_factory):
    """A folder with base.pt and rlhf.pt: one small model that has learned the texts and the answer by heart."""
    tok = Tokenizer(make_spec())
    rows = [[tok.eot] + tok.encode(start + end) + [tok.eot] for start, end in TEXTS.items()]
    for text in SAY:
        turns = user(text) + [dict(role='assistant', content='owl')]
        rows += [tok.render(turns)[0], tok.render(turns + turns)[0], tok.render(turns + turns + turns)[0]]
    torch.manual_seed(0)
    model = GPT(GPTConfig(arch='llama', vocab_size=tok.n_vocab, block_size=48, n_layer=2, n_head=4, n_embd=32))
    optimizers = make_optimizers(model, 1e-2, 0.0, (0.9, 0.95))
    ids = pad_right([row[:49] for row in rows], tok.pad)
    for _ in range(120):
        logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=tok.pad)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    folder = tmp_path_factory.mktemp('chat')
    for stage in ('base', 'rlhf'):
        save_checkpoint(str(folder / f'{stage}.pt'), stage, model.state_dict(), asdict(model.config), tok, {}, 1, {})
    return folder

def test_one_answer(out, scripts):
    """Stdout has the answer alone; settings, device and model are told on stderr."""
    for flags in ((f'--out_dir={out}',), (out / 'rlhf.pt',), (f'--checkpoint={out / "rlhf.pt"}',)):
        r = scripts.ok('chat.py', *flags, '--prompt=Say a word.', '--temperature=0')
        assert r.out == 'owl\n'
        assert all(told in r.err for told in ('device: ', 'stage rlhf', 'temperature = 0'))

def test_from_a_pipe(out, scripts):
    typed = 'Say a word.\n\n/retry\n/reset\n/retry\nSay it.\n/quit\nSay\n'
    r = scripts.ok('chat.py', out / 'rlhf.pt', '--temperature=0', stdin=typed)
    assert r.out.splitlines() == ['owl'] * 3 and 'no answer to replace' in r.err
    assert scripts.ok('chat.py', out / 'rlhf.pt', stdin='').out == ''

def test_a_conversation_is_rendered_as_in_training(out, scripts):
    """The space before an answer comes from the chat template: it is not part of the answer."""
    seen = out / 'seen.txt'
    watch = f'''
import model
hidden = model.GPT.hidden
def spy(self, idx, *more):
    with open({str(seen)!r}, 'a') as f:
        print(*idx[0].tolist(), file=f)
    return hidden(self, idx, *more)
model.GPT.hidden = spy
'''
    r = scripts.ok('chat.py', out / 'rlhf.pt', '--temperature=0', '--system=Hi', stdin='Say\nSay\n', before=watch)
    calls = [[int(i) for i in line.split()] for line in seen.read_text().splitlines()]
    # a prompt is read but for its last token, which is the first one that the batch continues
    prompts = [ids + then for ids, then in zip(calls, calls[1:]) if len(ids) > 1]
    tok = Tokenizer(make_spec())
    turns = [dict(role='system', content='Hi')] + user('Say')
    more = turns + [dict(role='assistant', content=r.out.split('\n')[0])] + user('Say')
    assert prompts == [tok.render(turns, prompt=True)[0], tok.render(more, prompt=True)[0]]

def test_a_base_model_continues(out, scripts):
    for start, end in TEXTS.items():
        r = scripts.ok('chat.py', out / 'base.pt', '--temperature=0', f'--prompt={start}')
        assert r.out == f'{end}\n' and 'what you begin' in r.err

def test_longer_than_the_context(out, scripts):
    r = scripts.ok('chat.py', out / 'rlhf.pt', '--max_new_tokens=8', stdin='Say a word.\n' * 6)
    assert 'oldest turn is forgotten' in r.err
    r = scripts.ok('chat.py', out / 'rlhf.pt', '--max_new_tokens=8', stdin='Say a word. ' * 40 + '\nSay it.\n')
    assert 'only its last 36 tokens are read' in r.err

def test_commands(out, scripts):
    typed = 'Say\n/stats\n/temp 0\n/temp x\n/top_k 3\n/seed 7\n/model base\nAnna has the\n/model rlhf\n/model no\n/stop it\n'
    r = scripts.ok('chat.py', f'--out_dir={out}', '--temperature=0', stdin=typed)
    assert r.out == 'owl\n owl.\n'
    lines = r.err.splitlines()[3:]
    tok = Tokenizer(make_spec())
    n_read, n_written = len(tok.render(user('Say'), prompt=True)[0]), len(tok.encode(' owl')) + 1
    assert lines[0].startswith(f'({n_read} tokens read, {n_written} written, the first after ')
    assert lines[1:] == [
        '(temperature = 0.0)', "error: /temp x: could not convert string to float: 'x'", '(top_k = 3)', '(seed = 7)',
        '(base, stage base)', '(rlhf, stage rlhf)', "error: no model 'no', there are: base, rlhf",
        'error: unknown command /stop, there are: /reset /retry /model /temp /top_k /seed /stats /quit', '']

def test_a_text_is_continued(out, scripts):
    """--complete=true: without the chat template, also with a model that answers."""
    r = scripts.ok('chat.py', out / 'rlhf.pt', '--temperature=0', '--complete=true', '--prompt=Bela has the')
    assert r.out == ' cat.\n'

def test_seed(out, scripts):
    flags = (out / 'base.pt', '--temperature=30', '--max_new_tokens=24', '--prompt=Anna')
    answers = [scripts.ok('chat.py', *flags, f'--seed={seed}').out for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]

def test_bytes_that_are_no_text(out, scripts):
    """Half a character on stdin, and in an argument; a terminal that lacks characters."""
    stdin = 'import io, sys; sys.stdin = io.TextIOWrapper(io.BytesIO(b"ca\\xc3\\nSay\\n"), encoding="utf-8")'
    r = scripts.ok('chat.py', out / 'rlhf.pt', '--temperature=0', before=stdin)
    assert r.out.count('\n') == 2
    half = 'import sys; sys.argv.append("--prompt=ca\\udcc3")'
    scripts.ok('chat.py', out / 'rlhf.pt', '--temperature=0', before=half)
    odd = """import sys, model
sys.stdout.reconfigure(encoding='latin-1', errors='strict')
model.Tokenizer.token_bytes = lambda self, i: '’'.encode()"""
    r = scripts.ok('chat.py', out / 'rlhf.pt', '--prompt=Say', '--max_new_tokens=2', before=odd)
    assert r.out.startswith('\\u2019')

def test_a_message_of_a_million_blanks(out, scripts):
    r = scripts.ok('chat.py', out / 'rlhf.pt', '--temperature=0', stdin='Say' + ' ' * 10**6 + 'it.\nSay\n')
    assert r.out.count('\n') == 2 and 'only its last' in r.err

def test_no_page_without_a_model_or_a_port(out, scripts, tmp_path):
    web = ('chat.py', '--web=true')
    scripts.fails(f'no checkpoint in {tmp_path}: make it with `bash speedrun.sh`', *web, f'--out_dir={tmp_path}')
    with socket.create_server(('127.0.0.1', 0)) as busy:
        port = busy.getsockname()[1]
        scripts.fails(f'cannot listen on 127.0.0.1, port {port} .*: use another --port', *web, f'--out_dir={out}',
                      f'--port={port}')
    scripts.fails('use another --port', *web, f'--out_dir={out}', '--port=99999')

def test_bad_settings(out, scripts, tmp_path):
    bad = {'--temperature=-1': 'temperature must be a number from 0.0', '--top_p=0': 'top_p must be a number from',
           '--min_p=2': 'min_p must be a number from 0.0 to 1.0, not 2.0', f'--out_dir={tmp_path}': 'no checkpoint .*rlhf.pt.*speedrun.sh'}
    for flag, pattern in bad.items():
        r = scripts('chat.py', f'--out_dir={out}', flag, '--prompt=Say')
        lines = [line for line in r.err.splitlines() if not line.startswith(('device: ', 'command line: '))]
        assert r.code == 1 and r.out == '' and len(lines) == 1
        assert lines[0].startswith('error: ') and re.search(pattern, lines[0])

# -----------------------------------------------------------------------------
# sampling

def draw(settings, logits, n):
    """n draws of `choose` for each dict of settings, all in one batch -> counts (len(settings), V)."""
    rng = random.Random(0)
    defaults = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    answers = [SimpleNamespace(sampling={**defaults, **s}, random=rng) for s in settings for _ in range(n)]
    ids = np.array(definitions('chat.py').choose(logits.expand(len(answers), -1), answers)).reshape(len(settings), n)
    return np.stack([np.bincount(row, minlength=logits.numel()) for row in ids])

def exact(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution by its definition, token by token."""
    weights = [math.exp(x / temperature) for x in logits.tolist()]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    order = order[:top_k or None]
    total, kept, sum_kept = sum(weights[i] for i in order), [], 0.0
    for i in order: # the smallest set that has top_p
        if sum_kept <= top_p * total:
            kept.append(i)
            sum_kept += weights[i]
    kept = [i for i in kept if weights[i] >= min_p * weights[order[0]]]
    return np.array([weights[i] if i in kept else 0.0 for i in range(len(weights))]) / sum(weights[i] for i in kept)

def chi_square(counts, p):
    """-> (statistic, its quantile of 1 - 1e-4 by Wilson and Hilferty 1931)"""
    possible = p > 0
    assert counts[~possible].sum() == 0
    expected = p[possible] * counts.sum()
    k = max(1, possible.sum() - 1)
    return ((counts[possible] - expected) ** 2 / expected).sum(), k * (1 - 2 / (9 * k) + 3.72 * (2 / (9 * k)) ** 0.5) ** 3

SETTINGS = [dict(), dict(temperature=0.5), dict(temperature=2.0), dict(top_k=4), dict(top_p=0.7), dict(min_p=0.15),
            dict(temperature=1.5, top_k=9, top_p=0.9, min_p=0.05)]

def test_the_distribution_of_samples_is_exact():
    """In one batch whose rows have different settings."""
    logits = torch.linspace(2.0, -3.0, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    counts = draw(SETTINGS, logits, 5_000)
    for found, settings in zip(counts, SETTINGS):
        statistic, limit = chi_square(found, exact(logits, **settings))
        assert statistic < limit, (settings, statistic, limit)
    statistic, limit = chi_square(counts[1], exact(logits, temperature=0.57)) # the test can fail
    assert statistic > limit

def test_greedy_is_argmax():
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    answers = [SimpleNamespace(sampling=dict(temperature=0, top_k=0, top_p=0.3, min_p=0.0), random=random.Random(i))
               for i in range(40)]
    assert definitions('chat.py').choose(logits, answers) == logits.argmax(-1).tolist()

PROBS = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.97, 0.01, 0.01, 0.01]])

@pytest.mark.parametrize('settings, kept', [
    ((0, 1.0, 0.0), [[1, 1, 1, 1], [1, 1, 1, 1]]), ((2, 1.0, 0.0), [[1, 0, 1, 0], [1, 1, 1, 1]]),
    ((0, 0.65, 0.0), [[1, 0, 1, 0], [1, 0, 0, 0]]), ((0, 1.0, 0.5), [[1, 0, 1, 1], [1, 0, 0, 0]]),
    ((9, 1.0, 0.0), [[1, 1, 1, 1], [1, 1, 1, 1]])])
def test_truncate_probs(settings, kept):
    top_k, top_p, min_p = [torch.tensor([[value]] * 2) for value in settings]
    probs = definitions('chat.py').truncate_probs(PROBS, top_k, top_p, min_p)
    assert torch.equal(probs, PROBS * torch.tensor(kept)) # equal values stay together with top_k

# -----------------------------------------------------------------------------
# the batch

CPU = SimpleNamespace(device=torch.device('cpu'), dtype=torch.float32,
                      autocast=lambda: torch.autocast('cpu', enabled=False))
GREEDY = dict(temperature=0, top_k=0, top_p=1.0, min_p=0.0, seed=0, max_new_tokens=8)

def random_model(path, stage='sft', kind=GPT, **more):
    """A checkpoint whose weights are so large that its distributions are not flat."""
    tok = Tokenizer(make_spec())
    torch.manual_seed(0)
    args = dict(arch='llama', vocab_size=tok.n_vocab, block_size=24, n_layer=2, n_head=4, n_embd=32)
    model = kind(GPTConfig(**{**args, **more}))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.4)
    save_checkpoint(str(path), stage, model.state_dict(), asdict(model.config), tok, {}, 1, {})
    return str(path)

def finish(batch, waves):
    """Answers enter in waves, one wave a step."""
    for answers in itertools.chain(waves, itertools.repeat([])):
        batch.waiting.extend(answers)
        batch.step()
        if not batch.answers and not batch.waiting:
            return

def text_of(tok, ids):
    return b''.join(tok.token_bytes(i) for i in ids).decode('utf-8', 'replace')

@pytest.mark.parametrize('more', [
    dict(arch='gpt2'), dict(n_kv_head=2, qk_norm=True, key_shift=True), dict(n_head=2)])
def test_rows_that_join_and_leave_change_no_answer(more, tmp_path):
    """Each answer equals that of `generate`, which has the prompt alone: rows move, the cache is shifted both ways."""
    chat = definitions('chat.py', run=CPU)
    batch = chat.Batch(random_model(tmp_path / 'sft.pt', **more))
    batch.MAX_ROWS = 4
    shifts = []
    shift = batch.shift
    batch.shift = lambda n: (shifts.append(n), shift(n))
    tok, rng = batch.tok, random.Random(1)
    answers = []
    for _ in range(40):
        ids = [tok.eot] + [rng.randrange(256) for _ in range(rng.choice([0, 1, 3, 14]))]
        answers.append(chat.Answer(batch, ids, dict(GREEDY, max_new_tokens=rng.randrange(1, 16))))
    waves = [answers[:7], [], answers[7:8], *([a] for a in answers[8:20]), answers[20:]]
    finish(batch, waves)
    assert min(shifts) < 0 < max(shifts)
    for answer in answers:
        [ids] = generate(batch.model, [answer.ids], answer.max_tokens, tok.end, 0)
        if tok.eot in ids:
            ids = ids[:ids.index(tok.eot) + 1]
        assert (answer.text, answer.n_tokens) == (text_of(tok, ids), len(ids))
        assert answer.finish == ('stop' if ids[-1] in (tok.end, tok.eot) else 'length')
    assert len({answer.text for answer in answers}) > 20

def test_a_seed_decides_an_answer_whoever_else_is_there(tmp_path):
    chat = definitions('chat.py', run=CPU)
    batch = chat.Batch(random_model(tmp_path / 'sft.pt'))
    def sampled(seed):
        return chat.Answer(batch, [batch.tok.eot, 65], dict(GREEDY, temperature=1.0, seed=seed, max_new_tokens=20))
    alone, crowd = sampled(5), [sampled(seed) for seed in (1, 2, 5, 0)]
    finish(batch, [[alone]])
    finish(batch, [crowd[:1], crowd[1:]])
    texts = [answer.text for answer in crowd]
    assert texts[2] == alone.text and len(set(texts)) == 4

def fed(pieces, stop=(), chat_turn=False):
    """An Answer that gets these bytes, one token each, and then <|end|> -> what it sends."""
    tok = Tokenizer(make_spec())
    chat = definitions('chat.py')
    ids = [tok.eot, tok.assistant] if chat_turn else [tok.eot]
    answer = chat.Answer(SimpleNamespace(tok=tok, block_size=99), ids, dict(GREEDY, max_new_tokens=90), stop=stop)
    sent = []
    for token in [*pieces, tok.end]:
        if not answer.finish:
            answer.add(token, None)
            sent.append(answer.pieces.get().text if not answer.pieces.empty() else '')
    assert answer.text == ''.join(sent)
    return sent

def test_characters_are_never_split():
    said = 'é🙂'.encode() + b'\xff' + '日'.encode()[:2] # the end is not a whole character
    assert fed(said) == ['', 'é', '', '', '', '🙂', '\ufffd', '', '', '\ufffd']

def test_stop_texts():
    """They are cut off, also across tokens, and nothing of them is sent before it is known."""
    assert fed(b'abSTOcd', ['STOP']) == ['', '', '', 'a', 'b', 'S', 'T', 'Ocd']
    assert fed(b'abSTOPcd', ['STOP']) == ['', '', '', 'a', 'b', '']
    assert ''.join(fed(b'ab cSTOPcd', ['c', 'STOP'])) == 'ab '
    assert fed(b'  hi', chat_turn=True) == ['', '', 'h', 'i', ''] # the space of the chat template

def test_prompts_keep_their_template(tmp_path):
    chat = definitions('chat.py', run=CPU)
    batch = chat.Batch(random_model(tmp_path / 'sft.pt', block_size=40))
    tok = batch.tok
    room = 40 - 10
    def turn(role, n):
        return dict(role=role, content='x' * n) # n + 1 tokens: 'x' is one, the space before it another
    def ids_of(role, n):
        return [getattr(tok, role)] + tok.encode(' ')[:n > 0] + tok.encode('x') * n + [tok.end]
    assert len(tok.encode(' xx')) == 3
    short = [turn('user', 3), turn('assistant', 2), turn('user', 4)]
    assert batch.make_prompt(short, 10) == (tok.render(short, prompt=True)[0], '')
    long = [turn('user', 9), turn('assistant', 9), turn('user', 4)]
    ids, note = batch.make_prompt([turn('system', 2)] + long, 10)
    assert ids == [tok.eot, *ids_of('system', 2), *ids_of('user', 4), tok.assistant] and 'forgotten' in note
    ids, note = batch.make_prompt(long[:2] + [turn('user', 99)], 10)
    assert ids == [tok.eot, tok.user, *tok.encode('x') * (room - 4), tok.end, tok.assistant] and 'too long' in note
    ids, note = batch.make_prompt([turn('system', 99), turn('user', 99)], 10) # half of the room for each
    text = tok.encode('x')
    assert ids == [tok.eot, tok.system, *text * (15 - 3), tok.end, tok.user, *text * (15 - 3), tok.end, tok.assistant]
    ids, note = batch.make_prompt([turn('system', 99), turn('user', 2)], 10)
    assert len(ids) == room and ids[-6:] == [*ids_of('user', 2), tok.assistant] and ids[:2] == [tok.eot, tok.system]
    ids, note = batch.make_prompt([turn('user', 99)], 10, complete=True)
    assert ids == [tok.eot, *text * (room - 1)] and 'too long' in note

def test_ctrl_c_stops_an_answer(tmp_path, capsys):
    chat = definitions('chat.py', run=CPU, complete=False, answers=sys.stdout)
    batch = chat.Batch(random_model(tmp_path / 'sft.pt'))
    steps = iter(range(3))
    def step():
        if next(steps) == 2:
            raise KeyboardInterrupt
        for b in b' ha':
            batch.waiting[0].add(b, None)
    batch.step = step
    chat.space['answers'] = sys.stdout
    text, _ = chat.print_answer(batch, user('x'))
    assert text == 'ha ha' and capsys.readouterr().out == 'ha ha ...\n' and not batch.waiting

# -----------------------------------------------------------------------------
# the server

@pytest.fixture(scope='module')
def web(tmp_path_factory):
    """A server in this process, with random models: .chat, .port, .folder"""
    folder = tmp_path_factory.mktemp('web')
    for stage in ('base', 'sft'):
        random_model(folder / f'{stage}.pt', stage, n_kv_head=2, qk_norm=True, key_shift=True)
    random_model(folder / 'rlhf.pt', 'rlhf', n_layer=1)
    random_model(folder / 'reward.pt', 'reward', ScalarModel)
    (folder / 'sft.jsonl').write_text('{"step": 0, "loss": 2.5}\n{"step": 1, "loss": NaN}\n{"st', encoding='utf-8')
    write_rows(folder / 'prompts_train.jsonl', [dict(messages=user(f'Q{i}'), checks={}) for i in range(5)])
    write_rows(folder / 'preferences_val.jsonl', [])
    chat = definitions('chat.py', run=CPU, out_dir=str(folder), data_dir=str(folder))
    chat.space['PROFILES'] = ['config/tiny.py']
    server = chat.Server(('127.0.0.1', 0), chat.Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(chat=chat, port=server.server_port, folder=folder)
    server.shutdown()
    server.server_close()

def call(web, path, body=None, headers={}, status=200):
    """A GET, or a POST of body (an object, or bytes) -> what comes back: an object, or the events of a stream."""
    connection = http.client.HTTPConnection('127.0.0.1', web.port, timeout=30)
    if body is None:
        connection.request('GET', path, headers=headers)
    else:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request('POST', path, data, {'Content-Type': 'application/json', **headers})
    response = connection.getresponse()
    text = response.read().decode()
    assert response.status == status, (path, response.status, text)
    if response.headers['Content-Type'] == 'text/event-stream':
        events = text.split('\n\n')
        assert events[-2:] == ['data: [DONE]', '']
        return [json.loads(event.removeprefix('data: ')) for event in events[:-2]]
    return json.loads(text) if 'json' in response.headers['Content-Type'] else text

ASK = dict(messages=user('Say'), max_tokens=12, temperature=1.0, seed=3)

def test_openai_form(web):
    """Streamed or not, the same seed gives the same answers; usage, n, stop and logprobs are right."""
    whole = call(web, '/v1/chat/completions', dict(ASK, n=3, model='sft', logprobs=True, top_logprobs=2))
    assert whole['object'] == 'chat.completion' and whole['model'] == 'sft'
    texts = [choice['message']['content'] for choice in whole['choices']]
    assert len(set(texts)) == 3 and [choice['index'] for choice in whole['choices']] == [0, 1, 2]
    entries = [choice['logprobs']['content'] for choice in whole['choices']]
    batch = web.chat.get_batch('sft')
    prompt, _ = batch.tok.render(ASK['messages'], prompt=True)
    n_written = sum(len(tokens) for tokens in entries)
    assert whole['usage'] == dict(prompt_tokens=len(prompt), completion_tokens=n_written,
                                  total_tokens=len(prompt) + n_written)
    for text, tokens, choice in zip(texts, entries, whole['choices']):
        assert choice['finish_reason'] == ('length' if len(tokens) == 12 else 'stop')
        assert bytes(b for entry in tokens for b in entry['bytes']).decode('utf-8', 'replace').lstrip() == text
    for tokens in entries: # against a forward pass over prompt and answer
        ids = list(prompt)
        for entry in tokens:
            logprobs = batch.model(torch.tensor([ids]))[0, -1].log_softmax(-1)
            best = logprobs.topk(2)
            assert entry['top_logprobs'][0]['token'] == batch.tok.decode([best.indices[0]])
            assert entry['top_logprobs'][1]['logprob'] == pytest.approx(best.values[1].item(), abs=1e-4)
            same = [i for i in range(batch.tok.n_vocab) if list(batch.tok.token_bytes(i)) == entry['bytes']]
            i = min(same, key=lambda i: abs(logprobs[i].item() - entry['logprob']))
            assert logprobs[i].item() == pytest.approx(entry['logprob'], abs=1e-4)
            ids.append(i)

    events = call(web, '/v1/chat/completions', dict(ASK, n=3, model='sft', stream=True,
                                                    stream_options=dict(include_usage=True)))
    assert events.pop()['usage'] == whole['usage']
    streamed = ['', '', '']
    reasons = [None] * 3
    for event in events:
        [choice] = event['choices']
        assert event['object'] == 'chat.completion.chunk' and reasons[choice['index']] is None
        streamed[choice['index']] += choice['delta']['content']
        reasons[choice['index']] = choice['finish_reason']
    assert streamed == texts and reasons == [choice['finish_reason'] for choice in whole['choices']]

    stop = texts[0][4:6]
    cut = call(web, '/v1/chat/completions', dict(ASK, model='sft', stop=stop))['choices'][0]
    assert cut['message']['content'] == texts[0][:texts[0].index(stop)] and cut['finish_reason'] == 'stop'

def test_other_calls(web, monkeypatch):
    ids = [web.chat.get_batch('base').tok.eot, *web.chat.get_batch('base').tok.encode('Anna')]
    [expected] = generate(web.chat.get_batch('base').model, [ids], 3, None, 0)
    body = dict(prompt='Anna', model='base', temperature=0, max_tokens=3)
    found = call(web, '/v1/completions', body)
    assert found['object'] == 'text_completion'
    assert found['choices'][0]['text'] == text_of(web.chat.get_batch('base').tok, expected)
    assert [m['id'] for m in call(web, '/v1/models')['data']] == ['base', 'sft', 'rlhf']
    assert call(web, '/health') == dict(status='ok')
    info = call(web, '/api/info')
    assert [(m['name'], m['chat'], m['n_layer']) for m in info['models']] == [
        ('base', False, 2), ('sft', True, 2), ('rlhf', True, 1)]
    assert info['local'] and info['block_size'] == 24
    asked = [p['messages'] for p in call(web, '/api/prompts?n=9')['prompts']]
    assert sorted(m[0]['content'] for m in asked) == [f'Q{i}' for i in range(5)]
    runs = call(web, '/api/curves')
    # without NaN, which JSON lacks, and without the line that is being written
    assert runs['runs'] == dict(sft=[dict(step=0, loss=2.5), dict(step=1)])
    assert {'base', 'sft', 'reward', 'rlhf'} <= runs['expected'].keys()
    # an experiment is drawn over the healthy run: the last profile that has curves, as in the report
    experiment = ['config/tiny.py', 'config/broken/healthy.py', 'config/broken/high_lr.py']
    monkeypatch.setitem(web.chat.space, 'PROFILES', experiment)
    healthy = call(web, '/api/curves')['expected']
    assert healthy.keys() == {'base'} and healthy['base'][-1]['step'] == 200

def test_a_model_that_was_trained_again_is_read_again(web):
    old = web.chat.get_batch('rlhf')
    assert web.chat.get_batch() is old # the last stage is the default
    random_model(web.folder / 'rlhf.pt', 'rlhf', n_layer=1, n_embd=64)
    assert web.chat.get_batch('rlhf').model.config.n_embd == 64

def test_rank(web, monkeypatch):
    answers = call(web, '/api/answers', dict(messages=user('Say'), models=['sft', 'rlhf'], n=4, temperature=2.0,
                                             max_tokens=9))['completions']
    texts = [answer['text'] for answer in answers]
    assert len(set(texts)) == 4 and {answer['model'] for answer in answers} == {'sft', 'rlhf'}

    # a reward model that prefers short answers agrees with 4 of the 5 pairs of these two verdicts
    def longer_is_worse(ids):
        return -(ids != pad).sum(-1, keepdim=True).expand(ids.shape).float()
    longer_is_worse.config = SimpleNamespace(block_size=24)
    tok = web.chat.get_batch('sft').tok
    pad = tok.pad
    monkeypatch.setitem(web.chat.space, 'get_reward', lambda: SimpleNamespace(model=longer_is_worse, tok=tok))
    first = dict(messages=user('Say'), completions=['x', 'xx', 'xxx', 'xxxx'], ranking=[1, [0, 2]])
    assert call(web, '/api/rank', first) == dict(count=1, agreement=0.5, n_pairs=2)
    second = dict(first, ranking=[0, 3, 2])
    # 0 < 3, 0 < 2 agree; 3 < 2 does not
    assert call(web, '/api/rank', second) == dict(count=2, agreement=3 / 5, n_pairs=5)
    for row in (dict(first, ranking=[1, 1]), dict(first, ranking=[4, 0]), dict(first, ranking=[0]),
                dict(first, completions=[1, 2, 3, 4]), dict(first, messages=[]), dict(first, ranking=None)):
        call(web, '/api/rank', row, status=400)
    path = web.folder / 'human' / 'preferences_train.jsonl'
    rows = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
    assert rows == [dict(first, judge='human'), dict(second, judge='human')]
    reward = definitions('reward.py', tok=tok) # reads what the page has written
    assert reward.read_example(rows[0]).places.tolist() == [0, 1, 1]
    assert call(web, '/api/undo', {})['count'] == 1 == call(web, '/api/rank')['count']
    assert call(web, '/api/undo', {})['count'] == 0 == call(web, '/api/undo', {})['count']

    verdict = dict(messages=user('Say'), models=['sft', 'rlhf'], completions=['a', 'b'], winner=1)
    assert call(web, '/api/preference', verdict) == dict(count=1) == call(web, '/api/preference')
    call(web, '/api/preference', dict(verdict, winner=2), status=400)
    assert json.loads((web.folder / 'preferences_ab.jsonl').read_text(encoding='utf-8')) == verdict

def wait_until(ready):
    for _ in range(600):
        if ready():
            return
        time.sleep(0.05)
    raise TimeoutError

FAKE = 'import sys\nprint("trains", *sys.argv[1:])\nsys.exit(%d)\n'

def test_training_is_started_and_told(web, monkeypatch, tmp_path):
    monkeypatch.setitem(web.chat.space, 'HERE', str(tmp_path))
    for code in (0, 1):
        (tmp_path / 'reward.py').write_text(FAKE % code, encoding='utf-8')
        (tmp_path / 'rlhf.py').write_text(FAKE % 0, encoding='utf-8')
        commands = call(web, '/api/train', dict(what='reward+rlhf'))['commands']
        wait_until(lambda: not call(web, '/api/train')['running'])
        told = call(web, '/api/train')
        assert told['failed'] == (code == 1) and told['what'] == 'reward+rlhf'
        expected = []
        for command in commands[:2 - code]: # what fails is the last one
            expected += ['$ ' + command, 'trains ' + command.split('.py ', 1)[1]]
        assert told['lines'] == expected
    (tmp_path / 'reward.py').write_text('import time\ntime.sleep(60)', encoding='utf-8')
    call(web, '/api/train', dict(what='dpo'))
    call(web, '/api/train', dict(what='dpo'), status=409)
    wait_until(lambda: web.chat.TRAINING.process.poll() is None)
    call(web, '/api/train/stop', {})
    wait_until(lambda: not web.chat.TRAINING.running)
    call(web, '/api/train', dict(what='rm -r'), status=400)
    monkeypatch.setattr(web.chat.Handler, 'is_local', lambda self: False) # as if it came from another computer
    call(web, '/api/train', dict(what='dpo'), status=403)

@pytest.mark.parametrize('what, stages', [('dpo', ['dpo']), ('reward+rlhf', ['reward', 'rlhf'])])
def test_the_commands_train(what, stages, chain, scripts, tmp_path):
    """On the rankings alone; the run that they start from stays as it is."""
    out = stocked(tmp_path / 'out', chain, 'sft', 'rlhf')
    human = stocked(out / 'human', chain, 'sft')
    rows = [dict(messages=user('Say'), completions=['owl', 'cat'], ranking=[1, 0], judge='human')] * 8
    write_rows(human / 'preferences_train.jsonl', rows)
    write_rows(human / 'preferences_val.jsonl', rows[:2])
    before = {path: data for path, data in folder_bytes(out).items() if human not in path.parents}
    chat = definitions('chat.py', out_dir=str(out), data_dir=str(chain.data), device='cpu')
    chat.space['PROFILES'] = [str(chain.short)]
    for words in chat.get_commands(what):
        scripts.ok(*[word.replace('max_iters=10', 'max_iters=1') for word in words])
    assert all((human / f'{stage}.pt').exists() for stage in stages)
    assert {path: data for path, data in folder_bytes(out).items() if human not in path.parents} == before

def test_inside(web):
    chat, tok = web.chat, web.chat.get_batch('sft').tok
    text = 'Say\n---\n owl'
    body = dict(text=text, chat=True, models=['sft', 'rlhf'], layer=1, head=2, attention_of='sft')
    found = call(web, '/api/inside', body)
    ids, _ = tok.render(user('Say') + [dict(role='assistant', content=' owl')])
    assert found['tokens'] == [tok.decode([i]) for i in ids]
    idx = torch.tensor([ids])
    p = {name: chat.get_batch(name).model(idx)[0].softmax(-1) for name in ('sft', 'rlhf')}
    for name in p:
        surprise, top = found['models'][name]['surprise'], found['models'][name]['top']
        assert surprise[0] is None and top[0] == []
        for t in range(1, len(ids)):
            assert surprise[t] == pytest.approx(-math.log(p[name][t - 1, ids[t]].item()), abs=1e-4)
            values, best = p[name][t - 1].topk(5)
            assert [token for token, _ in top[t]] == [tok.decode([i]) for i in best.tolist()]
            assert [value for _, value in top[t]] == pytest.approx(values.tolist(), abs=1e-5)
    kl = (p['rlhf'] * (p['rlhf'].log() - p['sft'].log())).sum(-1)
    assert found['kl'][1:] == pytest.approx(kl[:-1].tolist(), abs=1e-4) and found['kl'][0] is None
    reward = load_model(load_checkpoint(str(web.folder / 'reward.pt'), ['reward'], ''), 'cpu', ScalarModel)
    assert found['reward'] == pytest.approx(reward(idx)[0].tolist(), abs=1e-4)
    weights = torch.tensor(found['attention'])
    assert torch.allclose(weights.sum(1), torch.ones(len(ids))) and weights.triu(1).abs().max() == 0
    owl = ids.index(tok.encode(' owl')[-1])
    assert found['merges'][owl] == [[' ', 'o', 'w', 'l'], [' ', 'ow', 'l'], [' ', 'owl'], [' owl']]
    assert found['merges'][0] == [['<|endoftext|>']]
    found = call(web, '/api/inside', dict(text='Anna', models=['base']))
    assert found['tokens'] == ['<|endoftext|>', *map(lambda i: tok.decode([i]), tok.encode('Anna'))]
    assert found['attention'] is None
    for bad in (dict(text='x' * 99), dict(text=''), dict(layer=9), dict(models=[]), dict(text=5)):
        call(web, '/api/inside', {**body, **bad, 'chat': False}, status=400)

@pytest.mark.parametrize('scale', [None, 0.7])
def test_attention_weights_are_those_that_torch_uses(scale):
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    with definitions('chat.py').WatchAttention() as watch:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    assert torch.allclose(watch.maps[0] @ v, y, atol=1e-5)

# -----------------------------------------------------------------------------
# requests that are wrong, slow or hostile

CHAT = '/v1/chat/completions'

@pytest.mark.parametrize('path, body, headers, status', [
    (CHAT, b'', {}, 400), (CHAT, b'{', {}, 400), (CHAT, b'[]', {}, 400), (CHAT, b'[' * 10**5, {}, 400),
    (CHAT, b'\xff\xfe', {}, 400), (CHAT, {}, {}, 400), (CHAT, dict(messages=5), {}, 400),
    (CHAT, dict(messages=[]), {}, 400), (CHAT, dict(messages=[5]), {}, 400),
    (CHAT, dict(messages=[dict(role='user', content=5)]), {}, 400),
    (CHAT, dict(messages=[dict(role='judge', content='x')]), {}, 400),
    (CHAT, dict(messages=user('x') + user('y')), {}, 400),
    *((CHAT, dict(ASK, **bad), {}, 400) for bad in (
        dict(temperature='hot'), dict(temperature=-1), dict(temperature=float('nan')), dict(temperature=[1]),
        dict(top_k=0.5), dict(top_k=-1), dict(top_k=10**30), dict(top_p=0), dict(top_p=2), dict(min_p=-1),
        dict(max_tokens=0), dict(max_tokens='x'), dict(max_tokens=10**9), dict(n=0), dict(n=17), dict(n='x'),
        dict(stop=5), dict(stop=['']), dict(stop=[5]), dict(seed=[1]), dict(logprobs=True, top_logprobs=99),
        dict(logprobs=True, top_logprobs=2.0),
        dict(logprobs=True, top_logprobs='x'), dict(stream=True, stop=5), dict(temperature=True))),
    (CHAT, dict(ASK, model='gpt-4'), {}, 404), (CHAT, dict(ASK, model='../sft'), {}, 404),
    (CHAT, dict(ASK, model=['sft']), {}, 400),
    ('/v1/completions', dict(prompt=[1, 2]), {}, 400), ('/nothing', {}, {}, 404), ('/v1/models', {}, {}, 404),
    (CHAT, ASK, {'Content-Type': 'text/plain'}, 415), # what a form of another site can send
    (CHAT, ASK, {'Origin': 'http://evil.example'}, 403), (CHAT, ASK, {'Origin': 'null'}, 403),
    (CHAT, ASK, {'Host': 'evil.example'}, 403), (CHAT, ASK, {'Host': ''}, 403),
    (CHAT, b'', {'Content-Length': str(10**8)}, 413), (CHAT, b'', {'Content-Length': '-1'}, 413),
    (CHAT, b'', {'Content-Length': 'x'}, 400),
    ('/api/answers', dict(messages=user('x'), models=[], n=2), {}, 400),
    ('/api/answers', dict(messages=user('x'), models=['sft'], n=10**9), {}, 400),
    ('/../chat.py', None, {}, 404), ('/%2e%2e/%2e%2e/etc/passwd', None, {}, 404), ('//etc/passwd', None, {}, 404),
    ('/api/prompts?n=x', None, {}, 400), ('/api/info', None, {'Host': 'evil.example:80'}, 403)])
def test_bad_requests(path, body, headers, status, web):
    assert call(web, path, body, headers, status)['error']['message']

def raw(web, data):
    s = socket.create_connection(('127.0.0.1', web.port), timeout=30)
    s.sendall(data)
    return s

HEAD = b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'

def test_no_http(web):
    for data in (b'\0' * 1000 + b'\r\n\r\n', b'GET /health\r\n\r\n', b'BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n',
                 b'GET / HTTP/9.9\r\n\r\n', b'GET /' + b'x' * 70_000 + b' HTTP/1.1\r\n\r\n',
                 b'GET / HTTP/1.1\r\n' + b'a: b\r\n' * 200 + b'\r\n'):
        with raw(web, data) as s:
            reply = s.recv(100)
            assert reply == b'' or re.search(rb'HTTP/1.0 [45]\d\d|"error"', reply), reply
    assert call(web, '/health')

def test_slow_senders_are_dropped(web, monkeypatch):
    """Byte by byte, in the head and in the body: a byte a second would keep a connection for ever."""
    monkeypatch.setattr(web.chat.Handler, 'DEADLINE', 0.3)
    for begin in (b'GE', HEAD, HEAD + b'Content-Length: 1000\r\n\r\n{'):
        with raw(web, begin) as s:
            s.settimeout(0.05)
            start = time.monotonic()
            with pytest.raises(OSError): # the connection is closed
                while time.monotonic() < start + 20:
                    s.sendall(b' ')
                    try:
                        assert not s.recv(100).startswith(b'HTTP/1.0 2')
                        raise ConnectionError
                    except TimeoutError:
                        pass

def free_places(web):
    return web.chat.PLACES._value

def test_too_many_at_a_time(web):
    for _ in range(64):
        assert web.chat.PLACES.acquire(blocking=False)
    for more in (dict(), dict(stream=True)):
        call(web, CHAT, dict(ASK, **more), status=429)
    web.chat.PLACES.release(64)
    assert call(web, CHAT, ASK)['choices'] and free_places(web) == 64

def test_a_client_that_leaves_frees_its_place(web, monkeypatch):
    batch = web.chat.get_batch('sft')
    step = type(batch).step
    monkeypatch.setattr(type(batch), 'step', lambda self: (time.sleep(0.05), step(self)))
    for stream in (True, False): # not streamed: nothing is written by which one could tell
        body = json.dumps(dict(ASK, model='sft', n=16, temperature=2.0, stream=stream)).encode()
        with raw(web, HEAD + b'Content-Length: %d\r\n\r\n' % len(body) + body):
            wait_until(lambda: free_places(web) < 64 and len(batch.answers) == 16)
            running = list(batch.answers)
        wait_until(lambda: free_places(web) == 64 and not batch.answers)
        assert {answer.finish for answer in running} >= {'left'}

def test_an_error_in_the_engine_is_told_and_forgotten(web, monkeypatch, capsys):
    batch = web.chat.get_batch('sft')
    def fail(self):
        raise RuntimeError('out of luck')
    with monkeypatch.context() as patch:
        patch.setattr(type(batch), 'step', fail)
        with pytest.raises((http.client.HTTPException, OSError)):
            call(web, CHAT, dict(ASK, model='sft'))
    assert call(web, CHAT, dict(ASK, model='sft'))['choices'] and free_places(web) == 64

def test_what_a_model_writes_is_never_html(web, monkeypatch):
    """It goes out as JSON, which no browser shows as a page."""
    evil = '<script>alert(1)</script>\x1b[2J# *a* \u2028' + 'y' * 20
    monkeypatch.setattr(web.chat.Answer, 'add', lambda self, token, logprobs: (
        setattr(self, 'text', evil), setattr(self, 'finish', 'stop'),
        self.pieces.put(SimpleNamespace(index=self.index, text=evil, logprobs=None, finish='stop'))))
    assert call(web, CHAT, ASK)['choices'][0]['message']['content'] == evil
    assert call(web, CHAT, dict(ASK, stream=True))[0]['choices'][0]['delta']['content'] == evil
    connection = http.client.HTTPConnection('127.0.0.1', web.port, timeout=30)
    connection.request('POST', CHAT, json.dumps(ASK), {'Content-Type': 'application/json'})
    headers = connection.getresponse().headers
    assert headers['Content-Type'] == 'application/json' and headers['X-Content-Type-Options'] == 'nosniff'
