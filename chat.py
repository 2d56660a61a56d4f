"""
The last stage: talk to a model. An assistant (sft.pt, dpo.pt, rlhf.pt) answers. A base model
(base.pt) continues what you type.

Reads   the checkpoints in out_dir; of data_dir only prompts_train.jsonl, for the ranking page
Writes  nothing in a terminal, where only answers go to stdout. The page writes your rankings and
        the models that learn from them to out_dir/human

talk to the RLHF model       $ python chat.py
to another checkpoint        $ python chat.py out/toytown/base.pt
one answer, then exit        $ python chat.py --prompt="What pet does Anna have?"
continue a text              $ python chat.py --complete=true --prompt="Anna has a"
questions from a pipe        $ echo "Hello" | python chat.py --temperature=0
page and API                 $ python chat.py config/tiny.py --web=true --port=8000

In a conversation: /reset begins another one, /retry asks for another answer, /quit or Ctrl-D leaves;
/model sft, /temp 0.5, /top_k 20 and /seed 1 change a setting; /stats tells the speed of the last
answer. Ctrl-C stops an answer.
The API has the form of OpenAI's, at http://127.0.0.1:8000/v1. Answers that are asked for at the
same time share one batch, which answers join and leave at any step (Yu et al. 2022).
Left out: accounts, https and several GPUs. Use a real server for strangers.
"""
from configurator import configure # first: makes Ctrl-C one line, also while torch loads
import codecs
import collections
import copy
import itertools
import json
import math
import os
import queue
import random
import re
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from model import (
    GPT, GPTConfig, KVCache, ScalarModel, Tokenizer, last_token, load_checkpoint, load_model,
    pad_right, read_jsonl, setup, write_jsonl)

# `python chat.py path.pt` is short for --checkpoint=path.pt
for i, word in enumerate(sys.argv):
    if word.endswith('.pt') and not word.startswith('-'):
        sys.argv[i] = f'--checkpoint={word}'

# a pipe should get the answers and nothing else: print() writes to stderr from here on
answers = sys.stdout
if '--help' not in sys.argv and '-h' not in sys.argv:
    sys.stdout = sys.stderr

# -----------------------------------------------------------------------------
# settings
checkpoint = ''             # path of the model; empty = out_dir/rlhf.pt
out_dir = 'out/toytown'     # folder of the checkpoints
data_dir = 'data/toytown'   # folder of the prompts that the ranking page asks
# sampling
prompt = ''                 # answer this and exit; empty = a conversation
complete = False            # continue the text, as a base model does, instead of answering it
system = ''                 # system message at the start of the conversation
max_new_tokens = 128        # maximum length of an answer, in tokens
temperature = 0.8           # 0 takes the most likely token, 1 samples from the distribution itself
top_k = 0                   # sample from the k most likely tokens; 0 = off
top_p = 1.0                 # sample from the most likely tokens that together have this probability
min_p = 0.0                 # drop tokens below this fraction of the highest probability; 0 = off
# page and API
web = False                 # serve them, instead of a conversation in the terminal
host = '127.0.0.1'          # address to listen on; 0.0.0.0 = everybody in your network may connect
port = 8000                 # port to listen on
# system
device = 'auto'             # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'              # auto, float32, bfloat16
seed = 0                    # random seed of the sampling; 0 = a different one each time
config = configure(globals())

STAGES = ['base', 'mid', 'sft', 'dpo', 'rlhf']
LIMITS = dict(temperature=100, top_k=10**6, top_p=1, min_p=1, max_new_tokens=10**6)

def check_sampling(values):
    """The settings of an answer, from the command line or from a request: a dict of numbers."""
    for name, highest in LIMITS.items():
        value = values[name]
        assert type(value) in (int, float), f'{name} must be a number, not {value!r}'
        assert 0 <= value <= highest, f'{name} must lie in [0, {highest}], it is {value}'
    for name in ('top_k', 'max_new_tokens'):
        assert type(values[name]) is int, f'{name} must be a whole number, not {values[name]}'
    for name in ('top_p', 'max_new_tokens'):
        assert values[name] > 0, f'{name} must be above 0'

sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
                max_new_tokens=max_new_tokens)
check_sampling(sampling)
run = setup(config)

# -----------------------------------------------------------------------------
# sampling
def truncate_probs(probs, top_k, top_p, min_p):
    """
    Set the probabilities (B, V) that sampling may not choose to 0; the rest need not sum to 1.
    top_k, top_p and min_p (B, 1) differ from row to row.
    top_k: Fan et al. 2018; top_p (nucleus): Holtzman et al. 2020; min_p: Nguyen et al. 2024.
    Training never truncates: RLHF needs samples from exactly the distribution that it changes.
    """
    if (top_k > 0).any():
        k = torch.where(top_k > 0, top_k, probs.size(-1)).clamp(max=probs.size(-1))
        smallest = probs.sort(descending=True).values.gather(-1, k - 1) # (B, 1)
        probs = probs.masked_fill(probs < smallest, 0.0)
    if (top_p < 1).any():
        ordered, order = probs.sort(descending=True)     # (B, V)
        before = ordered.cumsum(-1) - ordered            # probability of all more likely tokens
        total = ordered.sum(-1, keepdim=True)
        # the token that crosses top_p stays
        is_tail = (before > top_p * total) & (top_p < 1)
        ordered = ordered.masked_fill(is_tail, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    highest = probs.amax(-1, keepdim=True)               # (B, 1)
    return probs.masked_fill(probs < min_p * highest, 0.0)

def choose(logits, answers):
    """Sample the next id of each answer from its row of logits (B, V), with its own settings."""
    def column(name):
        return torch.tensor([[answer.sampling[name]] for answer in answers], device=logits.device)

    temperature = column('temperature')                  # (B, 1)
    probs = F.softmax(logits / temperature.clamp(min=1e-6), dim=-1)
    probs = truncate_probs(probs, column('top_k'), column('top_p'), column('min_p'))
    if probs.device.type != 'mps': # which has no fp64
        probs = probs.double()
    cdf = probs.cumsum(-1)
    # An answer draws its own random numbers: they do not depend on who else is in the batch.
    u = [[answer.random.random() * (1 - 1e-7)] for answer in answers]
    u = torch.tensor(u, dtype=cdf.dtype, device=cdf.device)
    ids = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)
    ids = torch.where(temperature == 0, logits.argmax(-1, keepdim=True), ids)
    return ids[:, 0].tolist()

# -----------------------------------------------------------------------------
# answers, and the batch that writes them
class Answer:
    """An answer in the making. Its pieces of text come out of a queue."""
    def __init__(self, batch, ids, sampling, index=0, stop=(), n_top=None, pieces=None):
        self.batch = batch
        self.ids = ids            # of the prompt
        self.sampling = sampling
        self.max_tokens = min(sampling['max_new_tokens'], batch.block_size - len(ids))
        self.random = random.Random()
        if sampling['seed']:
            self.random.seed(sampling['seed'] + index)
        self.index = index        # among the answers to one request
        self.stop = stop          # texts that end it
        self.n_top = n_top        # send the log-probabilities of this many tokens; None = of none
        self.pieces = pieces or queue.SimpleQueue()
        self.is_chat = ids[-1] == batch.tok.assistant
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace') # tokens may split a character
        self.text = ''
        self.n_sent = 0           # characters
        self.n_tokens = 0
        self.finish = None        # 'stop', 'length' or 'left'

    def add(self, token, logprobs):
        """One more token; logprobs (V,)."""
        tok = self.batch.tok
        self.n_tokens += 1
        if token in (tok.end, tok.eot):
            self.finish = 'stop'
        elif self.n_tokens == self.max_tokens:
            self.finish = 'length'
        self.text += self.decoder.decode(tok.token_bytes(token), self.finish is not None)
        if self.is_chat: # the chat template begins each text with a space
            self.text = self.text.lstrip()
        found = [self.text.find(stop) for stop in self.stop if stop in self.text]
        if found:
            self.text = self.text[:min(found)]
            self.finish = 'stop'
        n_ready = len(self.text)
        if self.stop and not self.finish: # what may be the beginning of a stop text has to wait
            n_ready -= max(len(stop) for stop in self.stop) - 1
        piece = self.text[self.n_sent:max(n_ready, self.n_sent)]
        self.n_sent += len(piece)
        details = self.describe(token, logprobs) if self.n_top is not None else None
        self.pieces.put(SimpleNamespace(answer=self, text=piece, logprobs=details, finish=self.finish))

    def describe(self, token, logprobs):
        """A token and the most likely ones at its place, in the form of OpenAI's API."""
        def entry(i, logprob):
            part = self.batch.tok.decode([i])
            return dict(token=part, logprob=logprob, bytes=list(self.batch.tok.token_bytes(i)))

        values, ids = logprobs.topk(min(self.n_top, len(logprobs)))
        top = [entry(i, value) for i, value in zip(ids.tolist(), values.tolist())]
        return dict(entry(token, logprobs[token].item()), top_logprobs=top)

class Batch:
    """
    A model and the answers that it writes at the moment. All have one KV cache, padded on the left:
    row b holds its tokens at first[b] .. n-1. A new answer takes the next free row, and the last
    row takes the place of one that ends, so the rows in use are always 0 .. B-1.
    """
    MAX_ROWS = 16

    def __init__(self, path):
        ckpt = load_checkpoint(path, STAGES, 'bash speedrun.sh')
        self.stage = ckpt['stage']
        self.is_chat = self.stage not in ('base', 'mid')
        self.tok = Tokenizer(ckpt['tokenizer'])
        self.model = load_model(ckpt, run.device).eval()
        self.block_size = self.model.config.block_size
        self.cache = KVCache(self.model.config, self.MAX_ROWS, self.block_size, run.device,
                             run.dtype)
        self.first = torch.zeros(self.MAX_ROWS, dtype=torch.long, device=run.device)
        self.answers = []                      # of the rows
        self.waiting = collections.deque()     # until a row is free

    def make_prompt(self, messages, max_tokens, complete=False):
        """
        Messages -> (token ids, note). If they are longer than the context, the oldest turns are
        left out; then the beginnings of texts are, but never the template around them.
        """
        room = self.block_size - min(max_tokens, self.block_size // 2) # the rest is for the answer
        tok = self.tok
        if complete or not self.is_chat:
            ids = tok.encode(messages[-1]['content'])
            note = f'the text is too long: only its last {room - 1} tokens are read'
            return [tok.eot] + ids[-(room - 1):], note if len(ids) > room - 1 else ''

        ids, _ = tok.render(messages, prompt=True)
        starts = [i for i, token in enumerate(ids) if token == tok.user]
        head = ids[:starts[0]]                 # <|endoftext|>, and the system turn if there is one
        for start in starts:
            turns = ids[start:]
            if len(head) + len(turns) <= room:
                break
        note = '' if start == starts[0] else 'the context is full: the oldest turn is forgotten'
        excess = len(head) + len(turns) - room
        if excess > 0: # the last message alone is too long
            from_system = min(excess, max(0, len(head) - room // 2))
            head = head[:2] + head[2 + from_system:]
            turns = turns[:1] + turns[1 + excess - from_system:]
            note = f'the message is too long: only its last {len(turns) - 3} tokens are read'
        return head + turns, note

    def rows(self, start, end, n):
        """Rows start .. end-1 as a cache of n tokens. It shares the memory of the whole one."""
        part = copy.copy(self.cache)
        part.keys = self.cache.keys[:, start:end]
        part.values = self.cache.values[:, start:end]
        part.last_keys = self.cache.last_keys[:, start:end]
        part.n = n
        return part

    def shift(self, n):
        """Move all tokens in the cache n places to the right."""
        self.cache.keys = self.cache.keys.roll(n, dims=3)
        self.cache.values = self.cache.values.roll(n, dims=3)
        self.first += n
        self.cache.n += n

    def join(self, answer):
        """Read a prompt into the next row. Its last token waits: `step` gives it to the model."""
        row = len(self.answers)
        ids = answer.ids[:-1]
        if len(ids) > self.cache.n:
            self.shift(len(ids) - self.cache.n)
        first = self.cache.n - len(ids)
        self.first[row] = first
        if ids:
            idx = torch.tensor([ids], device=run.device)                    # (1, T)
            pos = torch.arange(len(ids), device=run.device)                 # (T,)
            mask = torch.arange(self.cache.n, device=run.device) >= first   # (S,)
            self.model.hidden(idx, pos, mask[None], self.rows(row, row + 1, first))
        answer.last_id = answer.ids[-1]
        self.answers.append(answer)

    def leave(self, row):
        last = len(self.answers) - 1
        for tensor in (self.cache.keys, self.cache.values, self.cache.last_keys):
            tensor[:, row] = tensor[:, last]
        self.first[row] = self.first[last]
        self.answers[row] = self.answers[last]
        self.answers.pop()

    @torch.no_grad()
    def step(self):
        """One more token for each answer. Those that have ended make room for those that wait."""
        for row in reversed(range(len(self.answers))):
            if self.answers[row].finish:
                self.leave(row)
        if not self.answers:
            self.cache.n = 0
        with run.autocast():
            while self.waiting and len(self.answers) < self.MAX_ROWS:
                answer = self.waiting.popleft()
                if not answer.finish: # its client may have left
                    self.join(answer)
            B = len(self.answers)
            if B == 0:
                return
            if self.cache.n == self.block_size: # no answer is that long, so all can move
                self.shift(-self.first[:B].min().item())
            n = self.cache.n
            first = self.first[:B, None]                                    # (B, 1)
            idx = torch.tensor([[answer.last_id] for answer in self.answers], device=run.device)
            mask = torch.arange(n + 1, device=run.device) >= first          # (B, S)
            x = self.model.hidden(idx, n - first, mask, self.rows(0, B, n)) # (B, 1, C)
            logits = self.model.head(x[:, -1]).float()                      # (B, V)
        self.cache.n = n + 1
        logprobs = logits.log_softmax(-1)
        for row, token in enumerate(choose(logits, self.answers)):
            self.answers[row].last_id = token
            self.answers[row].add(token, logprobs[row])

    def stop_all(self):
        """Forget all answers: one of them was stopped in the middle of a step."""
        self.answers.clear()
        self.waiting.clear()
        self.cache.n = 0

# -----------------------------------------------------------------------------
# the conversation in a terminal
def find_models():
    """Name -> path of the checkpoints of the run, and of those that learned from your rankings."""
    paths = {stage: os.path.join(out_dir, f'{stage}.pt') for stage in STAGES}
    for stage in ('dpo', 'rlhf'):
        paths[f'human/{stage}'] = os.path.join(out_dir, 'human', f'{stage}.pt')
    return {name: path for name, path in paths.items() if os.path.exists(path)}

def print_answer(batch, messages):
    """Print the answer to a conversation token by token -> (its text, statistics)."""
    ids, note = batch.make_prompt(messages, sampling['max_new_tokens'], complete)
    if note:
        print(f'({note})')
    answer = Answer(batch, ids, dict(sampling))
    batch.waiting.append(answer)
    times = [time.time()]
    try:
        while not answer.finish:
            batch.step()
            times.append(time.time())
            print(answer.pieces.get().text, end='', file=answers, flush=True)
    except KeyboardInterrupt: # Ctrl-C stops this answer, not the program
        print(' ...', end='', file=answers)
        batch.stop_all()
    print(file=answers, flush=True)
    speed = answer.n_tokens / max(1e-9, times[-1] - times[0])
    first = (times[min(1, len(times) - 1)] - times[0]) * 1000
    return answer.text.rstrip(), (f'{len(ids)} tokens read, {answer.n_tokens} written, {speed:.0f} '
                                  f'tokens/s, the first after {first:.0f} ms')

def change_setting(command, value):
    """/temp 0.5, /top_k 20, /seed 1"""
    name = 'temperature' if command == 'temp' else command
    try:
        new = dict(sampling, **{name: type(sampling[name])(value)})
        check_sampling(new)
        sampling.update(new)
        print(f'({name} = {sampling[name]})')
    except (AssertionError, ValueError) as e:
        print(f'error: /{command} {value}: {e}')

def converse(batch):
    """Read questions and commands from stdin until it ends."""
    opening = [dict(role='system', content=system)] if system else []
    messages = list(opening)
    stats = 'no answer so far'
    sys.stdin.reconfigure(errors='replace') # bytes that are not UTF-8 become U+FFFD, not an error
    while True:
        try:
            text = input('\n> ' if sys.stdin.isatty() else '').strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return

        if not text:
            continue
        command, _, value = text[1:].partition(' ')
        if not text.startswith('/'):
            messages.append(dict(role='user', content=text))
        elif command == 'quit':
            return
        elif command in ('temp', 'top_k', 'seed'):
            change_setting(command, value)
        elif command == 'stats':
            print(f'({stats})')
        elif command in ('reset', 'new'):
            messages = list(opening)
            print('(a new conversation)')
        elif command == 'model':
            paths = find_models()
            if value in paths:
                batch = Batch(paths[value])
                print(f'({value}: stage {batch.stage})')
            else:
                print(f'error: no model {value!r}, there are: {", ".join(paths)}')
        elif command != 'retry':
            print(f'error: unknown command /{command}: /reset /retry /model /temp /top_k /seed '
                  '/stats /quit')
        elif not messages or messages[-1]['role'] != 'assistant':
            print('(there is no answer to replace)')
        else:
            messages.pop()

        if messages and messages[-1]['role'] == 'user':
            reply, stats = print_answer(batch, messages)
            messages.append(dict(role='assistant', content=reply))

if not web:
    batch = Batch(checkpoint or os.path.join(out_dir, 'rlhf.pt'))
    is_answering = batch.is_chat and not complete
    task = 'Ask something.' if is_answering else 'It continues documents: begin one.'
    print(f'stage {batch.stage}, {batch.model.n_params():,} parameters, context of '
          f'{batch.block_size} tokens\n{task} /reset /retry /model /temp /top_k /seed /stats /quit')
    if prompt:
        opening = [dict(role='system', content=system)] if system else []
        print_answer(batch, opening + [dict(role='user', content=prompt)])
    else:
        converse(batch)
    sys.exit()

# -----------------------------------------------------------------------------
# the engine: one thread computes, the threads of the connections only wait for it
engine = ThreadPoolExecutor(1)
places = threading.BoundedSemaphore(64) # requests that may run or wait at a time
loaded = {} # path -> (time of the file, what was made of it)

class Refused(Exception):
    """A reply with an HTTP status of its own. What an `assert` says is a reply with status 400."""
    def __init__(self, status, message):
        super().__init__(message)
        self.status = status

def load(path, make):
    """make(path), once. Only the engine calls it, as everything that touches a model."""
    changed = os.path.getmtime(path)
    if path not in loaded or loaded[path][0] != changed: # it has been trained again
        loaded[path] = changed, make(path)
    return loaded[path][1]

def get_batch(name=None):
    """The Batch of a model, of the default one for None."""
    paths = find_models()
    name = name or list(paths)[-1]
    if name not in paths:
        raise Refused(404, f'no model {name!r}, there are: {", ".join(paths)}')
    return load(paths[name], Batch)

def run_steps(batch):
    """One step, and then others for as long as there is work. Several batches take turns."""
    try:
        batch.step()
    except Exception as error:
        for answer in batch.answers + list(batch.waiting):
            answer.pieces.put(error)
        batch.stop_all()
    if batch.answers or batch.waiting:
        engine.submit(run_steps, batch)

def enter(answers):
    """Answers of one batch begin to wait for their place in it. Only the engine calls it."""
    batch = answers[0].batch
    is_idle = not batch.answers and not batch.waiting
    batch.waiting.extend(answers)
    if is_idle:
        engine.submit(run_steps, batch)

def get_pieces(handler, answers):
    """Yield the pieces of the answers to one request as they come, until all have ended."""
    if not places.acquire(blocking=False):
        raise Refused(429, 'too many requests at a time: try again in some seconds')
    try:
        engine.submit(enter, answers)
        n_open = len(answers)
        while n_open:
            handler.check_connection()
            try:
                piece = answers[0].pieces.get(timeout=0.1)
            except queue.Empty:
                continue
            if isinstance(piece, Exception):
                raise piece
            if piece.finish:
                n_open -= 1
            yield piece
    finally: # if the client has left, its answers make room for others
        for answer in answers:
            answer.finish = answer.finish or 'left'
        places.release()

# -----------------------------------------------------------------------------
# the API: a function of the request (a dict) and its handler returns the reply; a generator of
# dicts is streamed
def make_answers(batch, request, messages, complete=False):
    """The answers that a request in OpenAI's form asks for."""
    given = {name: request[name] for name in sampling if request.get(name) is not None}
    values = dict(sampling, seed=0, **given)
    for name in ('max_tokens', 'max_completion_tokens'):
        values['max_new_tokens'] = request.get(name) or values['max_new_tokens']
    check_sampling(values)
    stop = request.get('stop') or []
    stop = [stop] if isinstance(stop, str) else stop
    assert all(isinstance(text, str) and text for text in stop), 'stop must be texts'
    n = request.get('n') or 1
    assert type(n) is int and 1 <= n <= 16, f'n must be from 1 to 16, not {n!r}'
    n_top = request.get('top_logprobs') or 0 if request.get('logprobs') else None
    ids, _ = batch.make_prompt(messages, values['max_new_tokens'], complete)
    pieces = queue.SimpleQueue()
    return [Answer(batch, ids, values, index, stop, n_top, pieces) for index in range(n)]

def create_completion(request, handler):
    """/v1/chat/completions and /v1/completions"""
    is_chat = 'chat' in handler.path
    batch = engine.submit(get_batch, request.get('model')).result()
    if is_chat:
        messages = request['messages']
    else:
        messages = [dict(role='user', content=request['prompt'])]
    answers = make_answers(batch, request, messages, complete=not is_chat)
    is_stream = request.get('stream', False)
    kind = 'chat.completion' if is_chat else 'text_completion'
    if is_chat and is_stream:
        kind = 'chat.completion.chunk'
    frame = dict(id=f'answer-{os.urandom(8).hex()}', object=kind, created=int(time.time()),
                 model=request.get('model') or 'default')

    def choice(index, text, logprobs, finish):
        found = dict(index=index, finish_reason=finish, logprobs=None)
        if logprobs:
            found['logprobs'] = dict(content=logprobs)
        if not is_chat:
            found['text'] = text
        else:
            found['delta' if is_stream else 'message'] = dict(role='assistant', content=text)
        return found

    def usage():
        n_read = len(answers[0].ids)
        n_written = sum(answer.n_tokens for answer in answers)
        return dict(prompt_tokens=n_read, completion_tokens=n_written,
                    total_tokens=n_read + n_written)

    def stream():
        for piece in get_pieces(handler, answers):
            logprobs = [piece.logprobs] if piece.logprobs else None
            if piece.text or piece.finish or logprobs:
                yield dict(frame, choices=[choice(piece.answer.index, piece.text, logprobs, piece.finish)])
        if (request.get('stream_options') or {}).get('include_usage'):
            yield dict(frame, choices=[], usage=usage())

    if is_stream:
        return stream()
    logprobs = [[] for _ in answers]
    for piece in get_pieces(handler, answers):
        if piece.logprobs:
            logprobs[piece.answer.index].append(piece.logprobs)
    choices = [choice(a.index, a.text, logprobs[a.index], a.finish) for a in answers]
    return dict(frame, choices=choices, usage=usage())

def list_models(request, handler):
    found = [dict(id=name, object='model', created=int(os.path.getmtime(path)), owned_by='you')
             for name, path in find_models().items()]
    return dict(object='list', data=found)

def get_health(request, handler):
    return dict(status='ok')

# -----------------------------------------------------------------------------
# the page
HERE = os.path.dirname(os.path.abspath(__file__))
human_dir = os.path.join(out_dir, 'human')

def get_page(request, handler):
    with open(os.path.join(HERE, 'chat.html'), 'rb') as f:
        return f.read()

def get_info(request, handler):
    models = []
    for name in find_models():
        batch = engine.submit(get_batch, name).result()
        config = batch.model.config
        models.append(dict(name=name, stage=batch.stage, n_params=batch.model.n_params(),
                           n_layer=config.n_layer, n_head=config.n_head, chat=batch.is_chat))
    return dict(models=models, block_size=batch.block_size, n_vocab=batch.tok.n_vocab,
                out_dir=out_dir, local=handler.is_local())

FALLBACK_PROMPTS = ['Who are you?', 'How much is 2 plus 3?', 'Tell me a short story.']

def get_prompts(request, handler):
    n = min(1000, int(request.get('n', 40)))
    path = os.path.join(data_dir, 'prompts_train.jsonl')
    if os.path.exists(path):
        prompts = [row['messages'] for _, row in read_jsonl(path)]
    else:
        prompts = [[dict(role='user', content=text)] for text in FALLBACK_PROMPTS]
    chosen = random.sample(prompts, min(n, len(prompts)))
    return dict(prompts=[dict(messages=messages) for messages in chosen])

def post_answers(request, handler):
    """Different answers of several models in turn, shuffled."""
    names = request['models']
    n = request.get('n', 4)
    assert type(n) is int and 1 <= n <= 26, f'n must be from 1 to 26, not {n!r}'
    found = {} # text -> model
    for _ in range(4): # some answers are equal: then ask again
        missing = n - len(found)
        for i, name in enumerate(names):
            n_asked = len(range(i, missing, len(names)))
            if n_asked:
                batch = engine.submit(get_batch, name).result()
                answers = make_answers(batch, dict(request, n=min(16, n_asked)), request['messages'])
                list(get_pieces(handler, answers))
                for answer in answers:
                    found.setdefault(answer.text.strip(), name)
    completions = [dict(text=text, model=name) for text, name in found.items()][:n]
    random.shuffle(completions)
    return dict(completions=completions)

# ---- rank
writing = threading.Lock() # the files of rankings
ab_path = os.path.join(out_dir, 'preferences_ab.jsonl')
verdict_paths = [os.path.join(human_dir, f'preferences_{split}.jsonl') for split in ('train', 'val')]

def read_rows(path):
    return [row for _, row in read_jsonl(path)] if os.path.exists(path) else []

def append_row(path, row):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'a', encoding='utf-8') as f:
        f.write(json.dumps(row) + '\n')

def get_places(ranking, n):
    """[2, [0, 1], 3] -> {2: 0, 0: 1, 1: 1, 3: 2}, the place of each of n answers that is ranked."""
    places = {}
    for place, tied in enumerate(ranking):
        for i in tied if isinstance(tied, list) else [tied]:
            assert type(i) is int and 0 <= i < n and i not in places, f'bad ranking {ranking}'
            places[i] = place
    assert len(places) > 1, f'ranking {ranking} must name two answers or more'
    return places

def load_reward(path):
    ckpt = load_checkpoint(path, ['reward'], 'python reward.py')
    return SimpleNamespace(model=load_model(ckpt, run.device, ScalarModel).eval(),
                           tok=Tokenizer(ckpt['tokenizer']))

def get_reward():
    """The reward model that has learned from your rankings, or else that of the run, or None."""
    for folder in (human_dir, out_dir):
        path = os.path.join(folder, 'reward.pt')
        if os.path.exists(path):
            return load(path, load_reward)
    return None

@torch.no_grad()
def judge(verdicts):
    """On how many pairs does the reward model agree with the verdicts? -> (agreed, pairs)"""
    reward = get_reward()
    n_agreed = 0
    n_pairs = 0
    for row in verdicts:
        places = get_places(row['ranking'], len(row['completions']))
        if not reward:
            continue
        rows = []
        for text in row['completions']:
            turns = row['messages'] + [dict(role='assistant', content=text)]
            rows.append(reward.tok.render(turns)[0])
        with run.autocast():
            scores = reward.model(pad_right(rows, reward.tok.pad, run.device))
        scores = last_token(scores, rows).tolist()
        for a, b in itertools.combinations(places, 2): # a stands before b, or they are tied
            if places[a] < places[b]:
                n_pairs += 1
                n_agreed += scores[a] > scores[b]
    return n_agreed, n_pairs

def get_rank(request, handler):
    verdicts = []
    for path in verdict_paths:
        verdicts += read_rows(path)
    n_agreed, n_pairs = engine.submit(judge, verdicts).result()
    agreement = n_agreed / n_pairs if n_pairs else None
    return dict(count=len(verdicts), agreement=agreement, n_pairs=n_pairs)

def post_rank(request, handler):
    row = dict(messages=request['messages'], completions=request['completions'],
               ranking=request['ranking'], judge='human')
    engine.submit(judge, [row]).result() # reward.py could not read a bad row later
    tok = engine.submit(get_batch).result().tok
    tok.render(row['messages'], prompt=True)
    with writing:
        number = 1 + sum(len(read_rows(path)) for path in verdict_paths)
        append_row(verdict_paths[number % 5 == 0], row) # every fifth is for validation
    return get_rank(request, handler)

def post_undo(request, handler):
    with writing:
        number = sum(len(read_rows(path)) for path in verdict_paths)
        if number:
            path = verdict_paths[number % 5 == 0]
            write_jsonl(path, read_rows(path)[:-1])
    return get_rank(request, handler)

def get_preference(request, handler):
    return dict(count=len(read_rows(ab_path)))

def post_preference(request, handler):
    assert request['winner'] in (0, 1, None), 'winner must be 0, 1 or null'
    names = ('messages', 'models', 'completions', 'winner')
    with writing:
        append_row(ab_path, {name: request[name] for name in names})
    return get_preference(request, handler)

# ---- train
training = SimpleNamespace(what=None, commands=[], lines=collections.deque(maxlen=200),
                           process=None, running=False, failed=False)
profiles = [word for word in sys.argv[1:] if word.endswith('.py')] or ['config/tiny.py']

def get_commands(what):
    """Everything is written to out_dir/human, so the finished run stays as it is."""
    common = [*profiles, f'--out_dir={human_dir}', f'--device={device}', '--resume=false']
    reward = ['reward.py', *common, f'--data_dir={human_dir}', '--sample_prompts=0',
              '--batch_size=4', '--epochs=8', '--warmup_iters=4', '--log_interval=2']
    if what == 'dpo':
        return [reward + ['--objective=dpo']]
    assert what == 'reward+rlhf', f"what must be 'dpo' or 'reward+rlhf', not {what!r}"
    return [reward, ['rlhf.py', *common, f'--data_dir={data_dir}']]

def run_commands(commands):
    for words in commands:
        training.lines.append('$ python ' + ' '.join(words))
        script = os.path.join(HERE, words[0])
        env = dict(os.environ, PYTHONUNBUFFERED='1')
        training.process = subprocess.Popen(
            [sys.executable, script, *words[1:]], env=env, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, encoding='utf-8', errors='replace')
        for line in training.process.stdout:
            training.lines.append(line.rstrip())
        if training.process.wait() != 0:
            training.failed = True
            break
    training.running = False

def get_train(request, handler):
    return dict(what=training.what, running=training.running, commands=training.commands,
                lines=list(training.lines), failed=training.failed)

def post_train(request, handler):
    if not handler.is_local():
        raise Refused(403, 'only the computer that runs chat.py may start training')
    commands = get_commands(request.get('what'))
    with writing:
        if training.running:
            raise Refused(409, 'a training is running')
        os.makedirs(human_dir, exist_ok=True)
        shutil.copy(os.path.join(out_dir, 'sft.pt'), human_dir)
        training.running = True
    training.what = request['what']
    training.failed = False
    training.commands = ['python ' + ' '.join(words) for words in commands]
    training.lines.clear()
    threading.Thread(target=run_commands, args=[commands], daemon=True).start()
    return dict(commands=training.commands)

def stop_training(request, handler):
    if not handler.is_local():
        raise Refused(403, 'only the computer that runs chat.py may stop training')
    if training.running:
        training.process.terminate()
    return get_train(request, handler)

# ---- inside
class WatchAttention(TorchFunctionMode):
    """While it is active, it keeps the attention weights (B, H, T, T) of each layer in maps."""
    def __init__(self):
        super().__init__()
        self.maps = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k = args[:2]
            scale = kwargs['scale'] or q.size(-1) ** -0.5
            scores = (q @ k.mT).float() * scale
            is_future = torch.ones(scores.shape[-2:], device=q.device).triu(1) > 0
            self.maps.append(scores.masked_fill(is_future, -math.inf).softmax(-1))
        return function(*args, **kwargs)

def get_merges(tok, ranks, i):
    """How byte-pair encoding makes a token: its pieces after each merge, beginning with bytes."""
    if i >= len(tok.tokens) or tok.spec['kind'] == 'char':
        return [[tok.decode([i])]]
    pieces = [bytes([b]) for b in tok.tokens[i]]
    steps = [pieces]
    while len(pieces) > 1:
        pairs = [ranks.get(a + b, math.inf) for a, b in zip(pieces, pieces[1:])]
        k = pairs.index(min(pairs)) # the pair that was learned first
        pieces = pieces[:k] + [pieces[k] + pieces[k + 1]] + pieces[k + 2:]
        steps.append(pieces)
    return [[piece.decode('utf-8', 'replace') for piece in pieces] for pieces in steps]

@torch.no_grad()
def look_inside(request):
    names = request['models']
    batch = get_batch(names[0])
    tok = batch.tok
    text = request['text']
    if request.get('chat'):
        question, _, answer = text.partition('\n---\n')
        turns = [dict(role='user', content=question), dict(role='assistant', content=answer)]
        ids, _ = tok.render(turns) if answer else tok.render(turns[:1], prompt=True)
    else:
        ids = [tok.eot] + tok.encode(text)
    assert 1 < len(ids) <= batch.block_size, \
        f'the text has {len(ids)} tokens, it must have from 1 to {batch.block_size}'
    idx = torch.tensor([ids], device=run.device)          # (1, T)

    logprobs = {}
    attention = None
    watched = request.get('attention_of') or names[-1]
    paths = find_models()
    for name in dict.fromkeys(names + [name for name in ('sft', 'rlhf') if name in paths]):
        with run.autocast(), WatchAttention() as watch:
            logits = get_batch(name).model(idx)[0, :-1].float() # (T-1, V)
        logprobs[name] = logits.log_softmax(-1)
        if name == watched and request.get('layer') is not None:
            weights = watch.maps[request['layer']][0, request.get('head') or 0] # (T, T)
            attention = weights.tolist()

    models = {}
    for name in names:
        surprise = -logprobs[name].gather(1, idx[0, 1:, None])[:, 0] # (T-1,)
        values, best = logprobs[name].exp().topk(5)       # (T-1, 5)
        top = []
        for row_ids, row in zip(best.tolist(), values.tolist()):
            top.append([[tok.decode([i]), value] for i, value in zip(row_ids, row)])
        models[name] = dict(surprise=[None] + surprise.tolist(), top=[[]] + top)
    kl = None
    if 'sft' in logprobs and 'rlhf' in logprobs:
        p = logprobs['rlhf']
        kl = [None] + (p.exp() * (p - logprobs['sft'])).sum(-1).tolist()
    reward = get_reward()
    ranks = {token: i for i, token in enumerate(tok.tokens)}
    return dict(tokens=[tok.decode([i]) for i in ids], models=models, kl=kl, attention=attention,
                merges=[get_merges(tok, ranks, i) for i in ids],
                reward=reward.model(idx)[0].tolist() if reward else None)

def post_inside(request, handler):
    return engine.submit(look_inside, request).result()

def get_curves(request, handler):
    """The logs of the run, and those that the profile had when it was shipped."""
    runs = {}
    for name in (*STAGES, 'reward', 'human/reward', 'human/dpo', 'human/rlhf'):
        path = os.path.join(out_dir, f'{name}.jsonl')
        if os.path.exists(path):
            runs[name] = [row for _, row in read_jsonl(path, is_log=True)]
    with open(os.path.join(HERE, 'config', 'curves.json'), encoding='utf-8') as f:
        expected = json.load(f).get(os.path.basename(profiles[0]), {})
    return dict(runs=runs, expected=expected)

ROUTES = {
    'GET /': get_page, 'GET /health': get_health, 'GET /v1/models': list_models,
    'POST /v1/chat/completions': create_completion, 'POST /v1/completions': create_completion,
    'GET /api/info': get_info, 'GET /api/prompts': get_prompts, 'POST /api/answers': post_answers,
    'GET /api/rank': get_rank, 'POST /api/rank': post_rank, 'POST /api/undo': post_undo,
    'GET /api/preference': get_preference, 'POST /api/preference': post_preference,
    'GET /api/train': get_train, 'POST /api/train': post_train,
    'POST /api/train/stop': stop_training, 'POST /api/inside': post_inside,
    'GET /api/curves': get_curves}

# -----------------------------------------------------------------------------
# the server
class Handler(BaseHTTPRequestHandler):
    timeout = 10 # seconds without a byte, after which a connection is closed

    def setup(self):
        super().setup()
        # a request that comes byte by byte must still be complete after these seconds
        self.deadline = threading.Timer(20, self.connection.shutdown, [socket.SHUT_RDWR])
        self.deadline.start()

    def finish(self):
        self.deadline.cancel()
        super().finish()

    def check_connection(self):
        """Raise an error if the client has left."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if readable and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionError('the client has left')

    def is_local(self):
        return self.client_address[0] in ('127.0.0.1', '::1')

    def check_sender(self):
        """A page of another site must not use this server through the browser of its reader."""
        name = self.headers.get('Host', '')
        # The attacker's name may lead to our address, but the browser still sends that name.
        is_address = re.fullmatch(r'(localhost|[\d.]+|\[[\da-f:.]+\])(:\d+)?', name)
        if not is_address and name.partition(':')[0] != host:
            raise Refused(403, f'unknown host {name!r}: use the address that chat.py has printed')
        if self.headers.get('Origin') not in (None, f'http://{name}'):
            raise Refused(403, 'a page of another site must not ask this server')

    def read_request(self):
        """The body of a POST, or the query of a GET, as a dict."""
        if self.command == 'GET':
            return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
        if self.headers.get_content_type() != 'application/json':
            raise Refused(415, 'send JSON, with Content-Type: application/json')
        length = int(self.headers.get('Content-Length', ''))
        if not 0 <= length <= 2**20:
            raise Refused(413, f'{length:,} bytes are too many: 1 MB is the limit')
        request = json.loads(self.rfile.read(length))
        assert isinstance(request, dict), 'send a JSON object'
        return request

    def respond(self):
        path = urllib.parse.urlsplit(self.path).path
        try:
            self.check_sender()
            function = ROUTES.get(f'{self.command} {path}')
            if not function:
                raise Refused(404, f'there is no {self.command} {path}')
            request = self.read_request()
            self.deadline.cancel()
            reply = function(request, self)
            if isinstance(reply, (dict, bytes)):
                self.send(200, reply)
            else:
                self.stream(reply)
        except Refused as e:
            self.send_error(e.status, str(e))
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as e:
            self.send_error(400, f'{type(e).__name__}: {e}')
        except OSError: # the client has left
            pass

    do_GET = respond
    do_POST = respond

    def start_reply(self, status, content_type):
        self.send_response(status)
        self.send_header('Content-Type', content_type)
        self.send_header('X-Content-Type-Options', 'nosniff')
        self.send_header('Cache-Control', 'no-store')
        # chat.html is one file: no script from elsewhere runs in it, and it loads nothing else
        self.send_header('Content-Security-Policy', "default-src 'none'; connect-src 'self'; "
                         "script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
                         "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
        self.end_headers()

    def send(self, status, reply):
        if isinstance(reply, dict):
            self.start_reply(status, 'application/json')
            reply = json.dumps(reply).encode()
        else:
            self.start_reply(status, 'text/html; charset=utf-8')
        self.wfile.write(reply)

    def send_error(self, code, message=None, explain=None):
        self.send(code, dict(error=dict(message=message, type='invalid_request_error', code=code)))

    def stream(self, chunks):
        """Server-sent events, as OpenAI's API sends them."""
        first = next(chunks) # an error before it still gets its status
        self.start_reply(200, 'text/event-stream')
        for chunk in itertools.chain([first], chunks):
            self.wfile.write(f'data: {json.dumps(chunk)}\n\n'.encode())
        self.wfile.write(b'data: [DONE]\n\n')

    def log_message(self, *args):
        pass

class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def process_request(self, request, client_address):
        if threading.active_count() > 500: # two for each connection
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

engine.submit(get_batch).result()
server = Server((host, port), Handler)
print(f'open http://{host}:{server.server_port} in a browser; Ctrl-C stops')
if host not in ('127.0.0.1', 'localhost', '::1'):
    print(f'warning: everybody who reaches {host} can use this server; only you can start training')
try:
    server.serve_forever()
except KeyboardInterrupt:
    print()
os._exit(0) # does not wait for the engine
