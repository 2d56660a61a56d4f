"""
The last stage: talk to a model. An assistant (sft.pt, dpo.pt, rlhf.pt) answers. A base model
(base.pt) continues what you type.

Reads   the checkpoints of out_dir; the page also reads data_dir/prompts_train.jsonl and the logs
Writes  nothing in a terminal, where only answers go to stdout, everything else to stderr; the page
        writes your rankings, and the models that learn from them, to out_dir/human

talk to the RLHF model       $ python chat.py
to another checkpoint        $ python chat.py out/toytown/base.pt
one answer, then exit        $ python chat.py --prompt="What pet does Anna have?"
continue a text              $ python chat.py --complete=true --prompt="Anna has a"
questions from a pipe        $ echo "Hello" | python chat.py --temperature=0
page and API                 $ python chat.py config/tiny.py --web=true --port=8000

In a conversation: /reset begins another one, /retry asks for another answer, /model sft, /temp 0.5,
/top_k 20 and /seed 1 change a setting, /stats tells the speed, /quit or Ctrl-D leaves. Ctrl-C stops
an answer. The API is OpenAI's, below http://127.0.0.1:8000/v1. Answers that are written at the same
time are rows of one batch, which they join and leave at any step (Yu et al. 2022).
Left out: accounts and https. This server is for your own computer, or for a class that you trust.
"""
from configurator import configure # first, so that Ctrl-C gives no traceback while torch loads
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
    KVCache, ScalarModel, Tokenizer, last_token, load_checkpoint, load_model, pad_right, read_jsonl,
    sample, setup, write_jsonl)

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
data_dir = 'data/toytown'   # folder of the prompts that the page asks
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
host = '127.0.0.1'          # address to listen on; 0.0.0.0 lets everybody in your network connect
port = 8000                 # port to listen on
# system
device = 'auto'             # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'              # auto, float32, bfloat16
seed = 0                    # random seed of the sampling; 0 = a different one each time
config = configure(globals())

STAGES = ['base', 'mid', 'sft', 'dpo', 'rlhf']
if checkpoint: # the other models of the run lie beside it
    out_dir = os.path.dirname(checkpoint)
SAMPLING = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
                max_new_tokens=max_new_tokens)
LIMITS = dict(temperature=(0.0, 100.0), top_k=(0, 10**6), top_p=(1e-6, 1.0), min_p=(0.0, 1.0),
              max_new_tokens=(1, 10**6))

def check_sampling(values):
    """The settings of an answer, from the command line or from a request."""
    for name, (low, high) in LIMITS.items():
        value = values[name]
        is_good = type(value) in (int, type(low)) and low <= value <= high
        assert is_good, f'{name} must be a number from {low} to {high}, not {value!r}'

check_sampling(SAMPLING)
run = setup(config)

# -----------------------------------------------------------------------------
# sampling
def truncate_probs(probs, top_k, top_p, min_p):
    """
    Set the probabilities (B, V) that sampling may not choose to 0; the rest need not sum to 1. Each
    row has its own top_k (Fan et al. 2018), top_p (nucleus, Holtzman et al. 2020) and min_p (Nguyen
    et al. 2024), (B, 1). Training never truncates: RLHF needs samples from exactly the distribution
    that it changes.
    """
    if (top_k > 0).any():
        V = probs.size(-1)
        k = torch.where(top_k > 0, top_k, V).clamp(max=V)
        smallest = probs.sort(descending=True).values.gather(-1, k - 1) # (B, 1)
        probs = probs.masked_fill(probs < smallest, 0.0)
    if (top_p < 1).any():
        ordered, order = probs.sort(descending=True)     # (B, V)
        before = ordered.cumsum(-1) - ordered            # probability of all more likely tokens
        total = ordered.sum(-1, keepdim=True)
        # the token that crosses top_p stays
        is_dropped = (before > top_p * total) & (top_p < 1)
        ordered = ordered.masked_fill(is_dropped, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    highest = probs.amax(-1, keepdim=True)               # (B, 1)
    return probs.masked_fill(probs < min_p * highest, 0.0)

def choose(logits, answers):
    """Sample the next id of each answer from its row of logits (B, V), with its own settings."""
    def column(name, dtype=torch.float32):
        values = [[a.sampling[name]] for a in answers]
        return torch.tensor(values, dtype=dtype, device=logits.device) # (B, 1)

    assert logits.isfinite().all(), 'the model has diverged (NaN): train it again'
    temperature = column('temperature')
    probs = F.softmax(logits / temperature.clamp(min=1e-6), dim=-1)    # (B, V)
    top_k = column('top_k', torch.long)
    probs = truncate_probs(probs, top_k, column('top_p'), column('min_p'))
    # Each answer draws from its own generator, so it does not depend on who else is in the batch.
    u = torch.tensor([[a.random.random()] for a in answers], dtype=torch.float64)
    ids = sample(probs, u)                                             # (B, 1)
    ids = torch.where(temperature == 0, logits.argmax(-1, keepdim=True), ids)
    return ids[:, 0].tolist()

def show_token(tok, i):
    """The text of one token; '' for an id that only pads the vocabulary to a round number."""
    return tok.decode([i]) if i < tok.enc.n_vocab else ''

# -----------------------------------------------------------------------------
# an answer, and the batch that it is written in
class Answer:
    """An answer in the making. What is ready comes out of the queue `pieces`."""
    def __init__(self, batch, ids, sampling, index=0, stop=(), n_top=None, pieces=None):
        self.batch = batch
        self.ids = ids            # of the prompt
        self.sampling = sampling  # temperature, top_k, ... as in SAMPLING
        self.index = index        # among the answers to one request
        self.stop = stop          # texts that end it
        self.n_top = n_top        # send log-probabilities, and those of the n_top best tokens
        self.pieces = pieces or queue.SimpleQueue() # one queue for all answers to a request
        self.max_tokens = min(sampling['max_new_tokens'], batch.block_size - len(ids))
        self.random = random.Random()
        if sampling['seed']:
            self.random.seed(sampling['seed'] + index)
        # tokens may split a character
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self.text = ''
        self.n_sent = 0           # characters that are in the queue
        self.n_tokens = 0
        self.finish = None        # 'stop', 'length', or 'left' if nobody waits any more

    def add(self, token, logits):
        """The next token, and the logits (V,) that it was drawn from."""
        tok = self.batch.tok
        self.n_tokens += 1
        if token in (tok.end, tok.eot):
            self.finish = 'stop'
        elif self.n_tokens == self.max_tokens:
            self.finish = 'length'
        # at the end, half a character becomes U+FFFD
        self.text += self.decoder.decode(tok.token_bytes(token), final=self.finish is not None)
        if self.ids[-1] == tok.assistant: # the chat template begins each text with a space
            self.text = self.text.lstrip()
        ends = [self.text.find(stop) for stop in self.stop if stop in self.text]
        if ends:
            self.text = self.text[:min(ends)]
            self.finish = 'stop'
        n_ready = len(self.text)
        if self.stop and not self.finish: # the end may be the beginning of a stop text
            n_ready -= max(len(stop) for stop in self.stop) - 1
        piece = self.text[self.n_sent:max(n_ready, self.n_sent)]
        self.n_sent += len(piece)
        details = None if self.n_top is None else [self.describe(token, logits)]
        if piece or details or self.finish:
            self.pieces.put(SimpleNamespace(index=self.index, text=piece, logprobs=details,
                                            finish=self.finish))

    def describe(self, token, logits):
        """Log-probabilities of a token and of the best ones in its place, in OpenAI's form."""
        tok = self.batch.tok
        logprobs = logits.log_softmax(-1)
        entries = []
        for i in [token] + logprobs.topk(self.n_top).indices.tolist():
            entries.append(dict(token=show_token(tok, i), logprob=logprobs[i].item(),
                                bytes=list(tok.token_bytes(i))))
        return dict(entries[0], top_logprobs=entries[1:])

class Batch:
    """
    A model, and the answers that it is writing. They share one KV cache, padded on the left: row b
    has its tokens at first[b] .. n-1. A new answer takes the next row, and when one ends, the last
    row moves to its place. So the rows in use are always 0 .. B-1.
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
        self.answers = []                      # one for each row
        self.waiting = collections.deque()     # answers that wait for a row

    def make_prompt(self, messages, max_tokens, complete=False):
        """
        Messages -> (ids, note). Up to half of the context is for the answer. What does not fit into
        the rest is left out: the oldest turns, then the beginning of a text that alone is too long.
        The template around the texts always stays.
        """
        tok = self.tok
        room = self.block_size - min(max_tokens, self.block_size // 2)
        if complete or not self.is_chat:
            ids = tok.encode(messages[-1]['content'])
            note = f'the text is too long: only its last {room - 1} tokens are read'
            return [tok.eot] + ids[-(room - 1):], note if len(ids) >= room else ''

        ids, _ = tok.render(messages, prompt=True)
        starts = [i for i, token in enumerate(ids) if token == tok.user]
        head = ids[:starts[0]]                 # <|endoftext|>, and the system turn if there is one
        fits = [i for i in starts if len(head) + len(ids) - i <= room]
        start = fits[0] if fits else starts[-1]
        note = '' if start == starts[0] else 'the context is full: the oldest turn is forgotten'
        turns = ids[start:]
        excess = len(head) + len(turns) - room
        if excess > 0:
            # a long system message gets half of the room, and the last message the rest
            from_system = min(excess, max(0, len(head) - room // 2))
            head = head[:2] + head[2 + from_system:] # <|endoftext|> <|system|> text <|end|>
            # <|user|> text <|end|> <|assistant|>
            turns = turns[:1] + turns[1 + excess - from_system:]
            note = f'the message is too long: only its last {len(turns) - 3} tokens are read'
        return head + turns, note

    def rows(self, start, end, n):
        """Rows start .. end-1 as a cache of n tokens, in the memory of the whole one."""
        part = copy.copy(self.cache)
        part.keys = self.cache.keys[:, start:end] # (n_layer, rows, H_kv, block_size, D)
        part.values = self.cache.values[:, start:end]
        part.last_keys = self.cache.last_keys[:, start:end]
        part.n = n
        return part

    def shift(self, n):
        """Move the tokens of all rows in use n places to the right."""
        B = len(self.answers)
        for tensor in (self.cache.keys, self.cache.values):
            # A key got its position when it was made, so it may lie anywhere.
            tensor[:, :B] = tensor[:, :B].roll(n, dims=3)
        self.cache.n += n
        self.first += n

    def join(self, answer):
        """Read a prompt into the next row, all but its last token, which is for the next step."""
        row = len(self.answers)
        ids = answer.ids[:-1]
        if len(ids) > self.cache.n: # all rows end at n
            self.shift(len(ids) - self.cache.n)
        first = self.cache.n - len(ids)
        if ids: # none if the prompt is one token
            idx = torch.tensor([ids], device=run.device)                  # (1, T)
            pos = torch.arange(len(ids), device=run.device)               # (T,)
            mask = torch.arange(self.cache.n, device=run.device) >= first # (S,)
            # fills the cache; what else it returns is not needed
            self.model.hidden(idx, pos, mask[None], self.rows(row, row + 1, first))
        self.first[row] = first
        answer.last_id = answer.ids[-1]
        self.answers.append(answer)

    def leave(self, row):
        """The last row takes the place of this one."""
        last = len(self.answers) - 1
        for tensor in (self.cache.keys, self.cache.values, self.cache.last_keys):
            tensor[:, row] = tensor[:, last]
        self.first[row] = self.first[last]
        self.answers[row] = self.answers[last]
        self.answers.pop()

    def clear(self):
        self.answers.clear()
        self.waiting.clear()

    @torch.no_grad()
    def step(self):
        """Write the next token of each answer. Those that have ended make room for others."""
        for row in reversed(range(len(self.answers))): # from the end, because the last row moves
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
            if self.cache.n == self.block_size: # no answer is that long: all rows can move
                self.shift(-self.first[:B].min().item())
            n = self.cache.n
            first = self.first[:B, None]                                    # (B, 1)
            idx = torch.tensor([[a.last_id] for a in self.answers], device=run.device)
            mask = torch.arange(n + 1, device=run.device) >= first          # (B, S)
            # positions count from the first token of each row: n - first
            x = self.model.hidden(idx, n - first, mask, self.rows(0, B, n)) # (B, 1, C)
            logits = self.model.head(x[:, -1]).float()                      # (B, V)
        self.cache.n = n + 1
        for row, token in enumerate(choose(logits, self.answers)):
            self.answers[row].last_id = token
            self.answers[row].add(token, logits[row])

# -----------------------------------------------------------------------------
# a conversation in the terminal
def find_models():
    """Name -> path: the checkpoints of the run, and those that have learned from your rankings."""
    names = [*STAGES, 'human/dpo', 'human/rlhf']
    paths = {name: os.path.join(out_dir, f'{name}.pt') for name in names}
    return {name: path for name, path in paths.items() if os.path.exists(path)}

def print_answer(batch, messages):
    """Print the answer to a conversation as it is written -> (its text, statistics)."""
    ids, note = batch.make_prompt(messages, SAMPLING['max_new_tokens'], complete)
    if note:
        print(f'({note})')
    answer = Answer(batch, ids, dict(SAMPLING))
    batch.waiting.append(answer)
    times = [time.time()]
    try:
        while not answer.finish:
            batch.step()
            times.append(time.time())
            while not answer.pieces.empty(): # a step may end within a character
                print(answer.pieces.get().text, end='', file=answers, flush=True)
    except KeyboardInterrupt: # Ctrl-C stops this answer, not the program
        print(' ...', end='', file=answers)
        batch.clear()
    print(file=answers, flush=True)
    seconds = times[-1] - times[0]
    first = times[:2][-1] - times[0]
    stats = (f'{len(ids)} tokens read, {answer.n_tokens} written, the first after '
             f'{1000 * first:.0f} ms, {answer.n_tokens / max(seconds, 1e-9):.0f} tokens/s')
    return answer.text.rstrip(), stats

def change_sampling(command, value):
    """/temp 0.5, /top_k 20, /seed 1"""
    name = command.replace('temp', 'temperature')
    try:
        new = {**SAMPLING, name: type(SAMPLING[name])(value)}
        check_sampling(new)
    except (AssertionError, ValueError) as e:
        print(f'error: /{command} {value}: {e}')
    else:
        SAMPLING.update(new)
        print(f'({name} = {new[name]})')

def converse(batch, opening):
    """Read messages and commands from stdin until it ends."""
    messages = list(opening)
    stats = 'no answer so far'
    sys.stdin.reconfigure(errors='replace') # bytes that are not UTF-8 become U+FFFD, not an error
    while True:
        try:
            text = input('\n> ' if sys.stdin.isatty() else '').strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return

        command, _, value = text.partition(' ')
        if command == '/quit':
            return
        if command in ('/reset', '/new'):
            messages = list(opening)
            print('(a new conversation)')
        elif command in ('/temp', '/top_k', '/seed'):
            change_sampling(command[1:], value)
        elif command == '/stats':
            print(f'({stats})')
        elif command == '/model' and value in find_models():
            batch = Batch(find_models()[value])
            print(f'({value}, stage {batch.stage})')
        elif command == '/model':
            print(f'error: no model {value!r}, there are: {", ".join(find_models())}')
        elif command == '/retry' and messages and messages[-1]['role'] == 'assistant':
            messages.pop()
        elif command == '/retry':
            print('(there is no answer to replace)')
        elif command.startswith('/'):
            print(f'error: unknown command {command}, there are: {COMMANDS}')
        elif text:
            messages.append(dict(role='user', content=text))

        if messages and messages[-1]['role'] == 'user': # a new one, or again after /retry
            reply, stats = print_answer(batch, messages)
            messages.append(dict(role='assistant', content=reply))

COMMANDS = '/reset /retry /model /temp /top_k /seed /stats /quit'
if not web:
    batch = Batch(checkpoint or os.path.join(out_dir, 'rlhf.pt'))
    opening = [dict(role='system', content=system)] if system else []
    task = 'Ask something.' if batch.is_chat and not complete else 'It continues what you begin.'
    print(f'stage {batch.stage}, {batch.model.n_params():,} parameters, context of '
          f'{batch.block_size} tokens. {task} {COMMANDS}')
    if prompt:
        print_answer(batch, opening + [dict(role='user', content=prompt)])
    else:
        converse(batch, opening)
    sys.exit()

# -----------------------------------------------------------------------------
# the engine: one thread computes, those of the connections wait for it
ENGINE = ThreadPoolExecutor(1)
PLACES = threading.BoundedSemaphore(64) # requests that run or wait at a time
LOADED = {} # path -> (time of the file, what was made of it)

class Refused(Exception):
    """A reply with an HTTP status of its own. What an `assert` says has the status 400."""
    def __init__(self, status, message):
        super().__init__(message)
        self.status = status

def load(path, make):
    """make(path), once for each version of the file. It must run in the engine."""
    changed = os.path.getmtime(path)
    if path not in LOADED or LOADED[path][0] != changed: # the model has been trained again
        LOADED[path] = changed, make(path)
    return LOADED[path][1]

def get_batch(name=None):
    """The Batch of a model; None means the last stage of the run."""
    paths = find_models()
    assert paths, f'no checkpoint in {out_dir}: make it with `bash speedrun.sh`'
    name = name or [stage for stage in STAGES if stage in paths][-1]
    if name not in paths:
        raise Refused(404, f'no model {name!r}, there are: {", ".join(paths)}')
    return ENGINE.submit(load, paths[name], Batch).result()

def run_steps(batch):
    """One step, then others while there is work. Batches of several models take turns."""
    try:
        batch.step()
    except Exception as error: # the threads that wait for these answers raise it
        for answer in [*batch.answers, *batch.waiting]:
            answer.pieces.put(error)
        batch.clear()
    if batch.answers or batch.waiting: # behind what other requests have asked for meanwhile
        ENGINE.submit(run_steps, batch)

def start(answers):
    batch = answers[0].batch
    if not batch.answers and not batch.waiting: # else run_steps will come anyway
        ENGINE.submit(run_steps, batch)
    batch.waiting.extend(answers)

def get_pieces(handler, answers):
    """Yield the pieces of the answers to one request as they come, until all have ended."""
    if not PLACES.acquire(blocking=False):
        raise Refused(429, 'too many requests at a time: try again in some seconds')
    try:
        ENGINE.submit(start, answers)
        n_open = len(answers)
        while n_open > 0:
            handler.check_connection()
            try: # not for long, to notice when the client leaves
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
        PLACES.release()

# -----------------------------------------------------------------------------
# OpenAI's API. Each function gets a request (a dict) and its handler, and returns the reply
def make_answers(batch, request, messages, complete=False):
    """The answers that a request asks for, not yet begun."""
    given = {name: request[name] for name in SAMPLING if request.get(name) is not None}
    values = {**SAMPLING, 'seed': 0, **given}
    for name in ('max_tokens', 'max_completion_tokens'):
        if request.get(name) is not None:
            values['max_new_tokens'] = request[name]
    check_sampling(values)
    stop = request.get('stop') or []
    # one text, or a list of them
    stop = [stop] if isinstance(stop, str) else stop
    assert all(isinstance(text, str) and text for text in stop), 'stop must be texts'
    n = request.get('n', 1)
    assert type(n) is int and 1 <= n <= 16, f'n must be from 1 to 16, not {n!r}'
    n_top = request.get('top_logprobs') or 0
    assert type(n_top) is int and 0 <= n_top <= 20, 'top_logprobs must be from 0 to 20'
    if not request.get('logprobs'):
        n_top = None
    ids, _ = batch.make_prompt(messages, values['max_new_tokens'], complete)
    pieces = queue.SimpleQueue()
    return [Answer(batch, ids, values, index, stop, n_top, pieces) for index in range(n)]

def complete_chat(request, handler):
    batch = get_batch(request.get('model'))
    answers = make_answers(batch, request, request['messages'])
    return reply_to(request, handler, answers, 'chat.completion')

def complete_text(request, handler):
    batch = get_batch(request.get('model'))
    messages = [dict(role='user', content=request['prompt'])]
    answers = make_answers(batch, request, messages, complete=True)
    return reply_to(request, handler, answers, 'text_completion')

def reply_to(request, handler, answers, kind):
    """A reply, or with stream=true a generator of events, as they go over the wire."""
    is_stream = request.get('stream')
    if is_stream and kind == 'chat.completion':
        kind = 'chat.completion.chunk'
    frame = dict(id=f'answer-{os.urandom(8).hex()}', object=kind, created=int(time.time()),
                 model=str(request.get('model') or answers[0].batch.stage))

    def choice(index, text, logprobs, finish):
        found = dict(index=index, finish_reason=finish, text=text)
        found['logprobs'] = dict(content=logprobs) if logprobs else None
        if kind != 'text_completion':
            del found['text'] # a chat has it in a message, or what is new of it in a delta
            found['delta' if is_stream else 'message'] = dict(role='assistant', content=text)
        return found

    def count():
        n_read = len(answers[0].ids)
        n_written = sum(answer.n_tokens for answer in answers)
        return dict(prompt_tokens=n_read, completion_tokens=n_written,
                    total_tokens=n_read + n_written)

    def stream():
        for piece in get_pieces(handler, answers):
            found = choice(piece.index, piece.text, piece.logprobs, piece.finish)
            yield f'data: {json.dumps(dict(frame, choices=[found]))}\n\n'.encode()
        if (request.get('stream_options') or {}).get('include_usage'):
            yield f'data: {json.dumps(dict(frame, choices=[], usage=count()))}\n\n'.encode()
        yield b'data: [DONE]\n\n'

    if is_stream:
        return stream()
    logprobs = [[] for _ in answers]
    for piece in get_pieces(handler, answers):
        logprobs[piece.index] += piece.logprobs or []
    choices = [choice(a.index, a.text, logprobs[a.index], a.finish) for a in answers]
    return dict(frame, choices=choices, usage=count())

def list_models(request, handler):
    models = []
    for name, path in find_models().items():
        created = int(os.path.getmtime(path))
        models.append(dict(id=name, object='model', created=created, owned_by='you'))
    return dict(object='list', data=models)

def get_health(request, handler):
    return dict(status='ok')

# -----------------------------------------------------------------------------
# the page: chat and rank
HERE = os.path.dirname(os.path.abspath(__file__))
HUMAN_DIR = os.path.join(out_dir, 'human')
VERDICTS_PATH = os.path.join(HUMAN_DIR, 'preferences_train.jsonl')
AB_PATH = os.path.join(out_dir, 'preferences_ab.jsonl')
WRITING = threading.Lock()
FALLBACK_PROMPTS = ['Who are you?', 'How much is 2 plus 3?', 'Tell me a short story.']

def get_page(request, handler):
    with open(os.path.join(HERE, 'chat.html'), 'rb') as f:
        return f.read()

def get_info(request, handler):
    models = []
    for name in find_models():
        batch = get_batch(name)
        config = batch.model.config
        models.append(dict(name=name, stage=batch.stage, chat=batch.is_chat, n_layer=config.n_layer,
                           n_head=config.n_head, n_params=batch.model.n_params()))
    return dict(models=models, block_size=batch.block_size, n_vocab=batch.tok.n_vocab,
                out_dir=out_dir, local=handler.is_local())

def get_prompts(request, handler):
    rows = read_rows(os.path.join(data_dir, 'prompts_train.jsonl'))
    if not rows:
        rows = [dict(messages=[dict(role='user', content=text)]) for text in FALLBACK_PROMPTS]
    n = max(0, int(request.get('n', 40)))
    # without their checks: the page must not know the right answers
    chosen = random.sample(rows, min(n, len(rows)))
    return dict(prompts=[dict(messages=row['messages']) for row in chosen])

def post_answers(request, handler):
    """n different answers of several models in turn, shuffled."""
    names = request['models']
    n = request.get('n', 4)
    assert type(n) is int and 1 <= n <= 26, f'n must be from 1 to 26, not {n!r}'
    assert names, 'models must name one or more'
    found = {} # text -> name of the model
    for i in range(4 * n): # some come twice
        if len(found) < n:
            name = names[i % len(names)]
            [answer] = make_answers(get_batch(name), dict(request, n=1), request['messages'])
            for _ in get_pieces(handler, [answer]):
                pass
            found.setdefault(answer.text.strip(), name)
    completions = [dict(text=text, model=name) for text, name in found.items()]
    random.shuffle(completions) # nobody can guess the model from the place
    return dict(completions=completions)

def read_rows(path):
    return [row for _, row in read_jsonl(path)] if os.path.exists(path) else []

def append_row(path, row):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with WRITING, open(path, 'a', encoding='utf-8') as f:
        f.write(json.dumps(row) + '\n')

def get_places(ranking, n):
    """[2, [0, 1], 3] -> {2: 0, 0: 1, 1: 1, 3: 2}, the place of each of n answers that is ranked."""
    places = {}
    for place, item in enumerate(ranking):
        tied = item if isinstance(item, list) else [item]
        for i in tied:
            assert type(i) is int and 0 <= i < n and i not in places, f'bad ranking {ranking}'
            places[i] = place
    assert len(places) > 1, f'the ranking {ranking} must hold two or more answers'
    return places

def load_reward(path):
    ckpt = load_checkpoint(path, ['reward'], 'python reward.py')
    model = load_model(ckpt, run.device, ScalarModel).eval()
    return SimpleNamespace(model=model, tok=Tokenizer(ckpt['tokenizer']))

def get_reward():
    """The reward model that has learned from your rankings, else that of the run, or None."""
    for folder in (HUMAN_DIR, out_dir):
        path = os.path.join(folder, 'reward.pt')
        if os.path.exists(path):
            return load(path, load_reward)
    return None

@torch.no_grad()
def judge(verdicts):
    """On how many pairs does the reward model agree with the verdicts? -> (agreed, pairs)"""
    reward = get_reward()
    if reward is None:
        return 0, 0
    n_agreed = 0
    n_pairs = 0
    for row in verdicts:
        rows = []
        for text in row['completions']:
            turns = row['messages'] + [dict(role='assistant', content=text)]
            # An answer that is no text may take more tokens when it is read than it was written in.
            rows.append(reward.tok.render(turns)[0][:reward.model.config.block_size])
        with run.autocast():
            scores = reward.model(pad_right(rows, reward.tok.pad, run.device))
        scores = last_token(scores, rows).tolist()        # (K,)
        places = get_places(row['ranking'], len(rows))
        for a, b in itertools.combinations(places, 2): # a stands before b, or they are tied
            if places[a] < places[b]:
                n_pairs += 1
                n_agreed += scores[a] > scores[b]
    return n_agreed, n_pairs

def get_rank(request, handler):
    verdicts = read_rows(VERDICTS_PATH)
    n_agreed, n_pairs = ENGINE.submit(judge, verdicts).result()
    agreement = n_agreed / n_pairs if n_pairs else None
    return dict(count=len(verdicts), agreement=agreement, n_pairs=n_pairs)

def post_rank(request, handler):
    row = {name: request[name] for name in ('messages', 'completions', 'ranking')}
    get_places(row['ranking'], len(row['completions']))
    tok = get_batch().tok
    for text in row['completions']: # reward.py must be able to read it
        tok.render(row['messages'] + [dict(role='assistant', content=text)])
    append_row(VERDICTS_PATH, dict(row, judge='human'))
    return get_rank(request, handler)

def post_undo(request, handler):
    with WRITING:
        write_jsonl(VERDICTS_PATH, read_rows(VERDICTS_PATH)[:-1])
    return get_rank(request, handler)

def get_preference(request, handler):
    return dict(count=len(read_rows(AB_PATH)))

def post_preference(request, handler):
    """A blind verdict on two models; eval.py counts them."""
    assert request['winner'] in (0, 1, None), 'winner must be 0, 1 or null'
    names = ('messages', 'models', 'completions', 'winner')
    append_row(AB_PATH, {name: request[name] for name in names})
    return get_preference(request, handler)

# -----------------------------------------------------------------------------
# the page: train on the rankings, curves
TRAINING = SimpleNamespace(running=False, failed=False, what=None, commands=[],
                           lines=collections.deque(maxlen=200), process=None)
PROFILES = [word for word in sys.argv[1:] if word.endswith('.py')] or ['config/tiny.py']

def get_commands(what):
    """All is read from and written to HUMAN_DIR, so that the finished run stays as it is."""
    assert what in ('dpo', 'reward+rlhf'), f"what must be 'dpo' or 'reward+rlhf', not {what!r}"
    common = [*PROFILES, f'--out_dir={HUMAN_DIR}', f'--device={device}', '--resume=false']
    reward = ['reward.py', *common, f'--data_dir={HUMAN_DIR}', '--sample_prompts=0',
              '--batch_size=4', '--warmup_iters=4', '--log_interval=2']
    if what == 'dpo': # with more epochs on so few rankings it would forget how to answer
        return [reward + ['--objective=dpo', '--epochs=4']]
    # few updates: a lesson is short, and they are enough to see a taste
    few = ['--max_iters=10', '--eval_interval=5', '--eval_prompts=50', '--sample_interval=5']
    return [reward + ['--epochs=8'], ['rlhf.py', *common, f'--data_dir={data_dir}', *few]]

def run_commands(commands):
    """Run them one after the other, until one fails."""
    for words in commands:
        TRAINING.lines.append('$ python ' + ' '.join(words))
        TRAINING.process = subprocess.Popen(
            [sys.executable, os.path.join(HERE, words[0]), *words[1:]], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, encoding='utf-8', errors='replace')
        for line in TRAINING.process.stdout:
            TRAINING.lines.append(line.rstrip())
        TRAINING.failed = TRAINING.process.wait() != 0 # also if it was stopped
        if TRAINING.failed:
            break
    TRAINING.running = False

def get_train(request, handler):
    found = {name: value for name, value in vars(TRAINING).items() if name != 'process'}
    return dict(found, lines=list(TRAINING.lines))

def post_train(request, handler):
    commands = get_commands(request.get('what'))
    os.makedirs(HUMAN_DIR, exist_ok=True)
    with WRITING: # two clicks at a time start one training
        if TRAINING.running:
            raise Refused(409, 'a training is running')
        shutil.copy(os.path.join(out_dir, 'sft.pt'), HUMAN_DIR)
        shutil.copy(os.path.join(data_dir, 'preferences_val.jsonl'), HUMAN_DIR)
        TRAINING.running = True
    TRAINING.what = request['what']
    TRAINING.commands = ['python ' + ' '.join(words) for words in commands]
    TRAINING.lines.clear()
    threading.Thread(target=run_commands, args=[commands], daemon=True).start()
    return get_train(request, handler)

def stop_training(request, handler):
    if TRAINING.running:
        TRAINING.process.terminate() # the stage saves what it has and ends
    return get_train(request, handler)

def get_curves(request, handler):
    """The logs of the run, and those of the profile as it was shipped."""
    runs = {}
    for name in (*STAGES, 'reward', 'human/reward', 'human/dpo', 'human/rlhf'):
        path = os.path.join(out_dir, f'{name}.jsonl')
        if os.path.exists(path):
            runs[name] = []
            for _, row in read_jsonl(path, is_log=True): # which may be growing at this moment
                for key, value in list(row.items()):
                    if isinstance(value, float) and not math.isfinite(value): # no browser reads NaN
                        del row[key]
                runs[name].append(row)
    with open(os.path.join(HERE, 'config', 'curves.json'), encoding='utf-8') as f:
        profiles = json.load(f)
    expected = {}
    for word in PROFILES: # as in eval.py: the last one that has been shipped with its curves
        expected = profiles.get(os.path.basename(word), expected)
    return dict(runs=runs, expected=expected)

# -----------------------------------------------------------------------------
# the page: inside
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
            scores = (q @ k.mT).float() * scale           # (B, H, T, T)
            is_future = torch.ones(scores.shape[-2:], device=q.device).triu(1) > 0
            self.maps.append(scores.masked_fill(is_future, -math.inf).softmax(-1))
        return function(*args, **kwargs)

def get_merges(tok, ranks, i):
    """How byte-pair encoding makes a token: its pieces after each merge, from single bytes on."""
    if i >= len(tok.tokens) or tok.spec['kind'] == 'char':
        return [[show_token(tok, i)]]
    pieces = [bytes([b]) for b in tok.tokens[i]]
    steps = [pieces]
    while len(pieces) > 1:
        pairs = [ranks.get(a + b, math.inf) for a, b in zip(pieces, pieces[1:])]
        k = pairs.index(min(pairs)) # the pair that was learned first
        pieces = pieces[:k] + [pieces[k] + pieces[k + 1]] + pieces[k + 2:]
        steps.append(pieces)
    return [[piece.decode('utf-8', 'replace') for piece in pieces] for pieces in steps]

@torch.no_grad()
def look_inside(request, batches):
    """batches: name -> Batch of the models to look into, and of sft and rlhf."""
    names = request['models']
    tok = batches[names[0]].tok
    text = request['text']
    ids = [tok.eot] + tok.encode(text) # a document
    if request.get('chat'):
        question, _, answer = text.partition('\n---\n')
        turns = [dict(role='user', content=question), dict(role='assistant', content=answer)]
        ids, _ = tok.render(turns) if answer else tok.render(turns[:1], prompt=True)
    limit = min(batch.block_size for batch in batches.values())
    assert 1 < len(ids) <= limit, f'the text has {len(ids)} tokens, not from 2 to {limit}'
    idx = torch.tensor([ids], device=run.device)               # (1, T)

    logprobs = {}
    maps = {}
    for name, batch in batches.items():
        with run.autocast(), WatchAttention() as watch:
            logits = batch.model(idx)[0, :-1].float()          # (T-1, V)
        logprobs[name] = logits.log_softmax(-1)
        maps[name] = watch.maps

    models = {}
    for name in names:
        surprise = -logprobs[name].gather(1, idx[0, 1:, None]) # (T-1, 1)
        top = [[]]                                             # nothing predicts the first token
        for row in logprobs[name]:
            best = row.topk(5)
            tokens = [show_token(tok, i) for i in best.indices.tolist()]
            top.append(list(zip(tokens, best.values.exp().tolist())))
        models[name] = dict(surprise=[None] + surprise[:, 0].tolist(), top=top)

    kl = None
    if 'sft' in batches and 'rlhf' in batches:
        p = logprobs['rlhf']
        # by its definition, the sum over the whole vocabulary
        kl = [None] + (p.exp() * (p - logprobs['sft'])).sum(-1).tolist()
    attention = None
    if request.get('layer') is not None:
        layers = maps[request.get('attention_of') or names[-1]]
        attention = layers[request['layer']][0, request.get('head') or 0].tolist() # T rows of T
    reward = get_reward()
    scores = reward.model(idx)[0].tolist() if reward else None
    ranks = {token: i for i, token in enumerate(tok.tokens)}
    merges = [get_merges(tok, ranks, i) for i in ids]
    return dict(tokens=[show_token(tok, i) for i in ids], merges=merges, models=models, kl=kl,
                reward=scores, attention=attention)

def post_inside(request, handler):
    wanted = [name for name in ('sft', 'rlhf') if name in find_models()]
    batches = {name: get_batch(name) for name in request['models'] + wanted}
    return ENGINE.submit(look_inside, request, batches).result()

# -----------------------------------------------------------------------------
# the server
ROUTES = {
    'GET /': get_page, 'GET /health': get_health, 'GET /v1/models': list_models,
    'POST /v1/chat/completions': complete_chat, 'POST /v1/completions': complete_text,
    'GET /api/info': get_info, 'GET /api/prompts': get_prompts, 'POST /api/answers': post_answers,
    'GET /api/rank': get_rank, 'POST /api/rank': post_rank, 'POST /api/undo': post_undo,
    'GET /api/preference': get_preference, 'POST /api/preference': post_preference,
    'GET /api/train': get_train, 'POST /api/train': post_train,
    'POST /api/train/stop': stop_training, 'GET /api/curves': get_curves,
    'POST /api/inside': post_inside}

class Handler(BaseHTTPRequestHandler):
    DEADLINE = 20 # seconds until a request must have come, also one that comes byte by byte
    timeout = 10  # seconds without a byte, after which a connection is closed

    def setup(self):
        super().setup()
        close = [socket.SHUT_RDWR]
        # closing the connection ends the read that waits for more
        self.deadline = threading.Timer(self.DEADLINE, self.connection.shutdown, close)
        self.deadline.start()

    def finish(self):
        self.deadline.cancel()
        super().finish()

    def is_local(self):
        return self.client_address[0] in ('127.0.0.1', '::1')

    def check_connection(self):
        """Raise an error if the client has left."""
        readable, _, _ = select.select([self.connection], [], [], 0) # does not wait
        if readable and not self.connection.recv(1, socket.MSG_PEEK): # the end of its stream
            raise ConnectionError('the client has left')

    def check_sender(self, path):
        """A page of another site must not use this server through the browser of its reader."""
        name = self.headers.get('Host', '')
        # If the name of that site leads to our address, the browser still sends this name.
        is_address = re.fullmatch(r'(localhost|[\d.]+|\[[\da-f:.]+\])(:\d+)?', name)
        if not is_address and name.partition(':')[0] != host:
            raise Refused(403, f'unknown host {name!r}: use the address that chat.py has printed')
        if self.headers.get('Origin') not in (None, f'http://{name}'):
            raise Refused(403, 'this request comes from a page of another site')
        if self.command == 'POST' and path.startswith('/api/train') and not self.is_local():
            raise Refused(403, 'only the computer that runs chat.py may start training')

    def read_request(self, query):
        """The body of a POST, or the query of a GET, as a dict."""
        if self.command == 'GET':
            return dict(urllib.parse.parse_qsl(query))
        # a form of any site can send text/plain; for JSON a browser asks us first, and we refuse
        if self.headers.get_content_type() != 'application/json':
            raise Refused(415, 'send JSON, with Content-Type: application/json')
        length = int(self.headers.get('Content-Length', ''))
        if not 0 <= length <= 2**20:
            raise Refused(413, f'{length:,} bytes are too many: the limit is 1 MB')
        request = json.loads(self.rfile.read(length))
        assert isinstance(request, dict), 'send a JSON object'
        return request

    def respond(self):
        path, _, query = self.path.partition('?')
        try:
            self.check_sender(path)
            function = ROUTES.get(f'{self.command} {path}')
            if function is None:
                raise Refused(404, f'there is no {self.command} {path}')
            request = self.read_request(query)
            self.deadline.cancel()
            self.send(200, function(request, self))
        except Refused as e:
            self.send_error(e.status, str(e))
        except AssertionError as e:
            self.send_error(400, str(e))
        except (AttributeError, FileNotFoundError, LookupError, RecursionError, TypeError,
                ValueError) as e: # a part of the request is missing or of the wrong type
            self.send_error(400, f'{type(e).__name__}: {e}')

    do_GET = respond
    do_POST = respond

    def send(self, status, reply):
        """reply: a dict, the bytes of the page, or a generator of server-sent events."""
        parts = reply
        if isinstance(reply, dict):
            kind = 'application/json'
            parts = [json.dumps(reply).encode()]
        elif isinstance(reply, bytes):
            kind = 'text/html; charset=utf-8'
            parts = [reply]
        else: # wait for the first event: until then there can be an error, with its status
            kind = 'text/event-stream'
            parts = itertools.chain([next(reply)], reply)
        self.send_response(status)
        self.send_header('Content-Type', kind)
        self.send_header('X-Content-Type-Options', 'nosniff') # what a model writes is never HTML
        self.send_header('Cache-Control', 'no-store')         # the page or an answer of last time
        self.send_header('X-Frame-Options', 'DENY') # no other page can show this one as its own
        self.end_headers()
        for part in parts:
            self.wfile.write(part)

    def send_error(self, code, message=None, explain=None): # http.server calls it too
        self.send(code, dict(error=dict(message=message, type='invalid_request_error', code=code)))

    def log_message(self, *args):
        pass # no line for each request

class Server(ThreadingHTTPServer):
    request_queue_size = 128 # connections that wait until they are accepted

    def process_request(self, request, client_address):
        if threading.active_count() > 400: # two for each connection
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        if not isinstance(error, OSError): # which says that the client has left
            print(f'error: {type(error).__name__}: {error}')

get_batch() # before the first request
try:
    server = Server((host, port), Handler)
except (OSError, OverflowError) as e:
    message = f'cannot listen on {host}, port {port} ({e}): use another --port'
    raise AssertionError(message) from None
print(f'open http://{host}:{server.server_port} in a browser; Ctrl-C ends the server')
if host not in ('127.0.0.1', 'localhost', '::1'):
    print(f'warning: everybody who can reach {host} can talk to the model and rank; '
          'only this computer can start training')
try:
    server.serve_forever()
except KeyboardInterrupt:
    print()
os._exit(0) # the engine may be in the middle of an answer
