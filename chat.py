"""
The last stage: talk to a model. An assistant (sft.pt, dpo.pt, rlhf.pt) answers. A base model
(base.pt) continues what you type.

Reads   one checkpoint: out_dir/rlhf.pt, or the one that you name
Writes  nothing. Only answers go to stdout, everything else to stderr

talk to the RLHF model       $ python chat.py
to another checkpoint        $ python chat.py out/toytown/base.pt
one answer, then exit        $ python chat.py --prompt="What pet does Anna have?"
questions from a pipe        $ echo "Hello" | python chat.py --temperature=0

In a conversation: /new begins another one, /retry asks for another answer, /quit or Ctrl-D leaves.
Ctrl-C stops an answer.
Left out: a web page and an HTTP API.
"""
from configurator import configure # first: makes Ctrl-C one line, also while torch loads
import codecs, sys

import torch

from model import Tokenizer, generate, load_checkpoint, load_model, setup

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
# sampling
prompt = ''                 # answer this and exit; empty = a conversation
system = ''                 # system message at the start of the conversation
max_new_tokens = 128        # maximum length of an answer, in tokens
temperature = 0.8           # 0 takes the most likely token, 1 samples from the distribution itself
top_k = 0                   # sample from the k most likely tokens; 0 = off
top_p = 1.0                 # sample from the most likely tokens that together have this probability
min_p = 0.0                 # drop tokens below this fraction of the highest probability; 0 = off
# system
device = 'auto'             # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'              # auto, float32, bfloat16
seed = 0                    # random seed of the sampling; 0 = a different one each time
config = configure(globals())

assert temperature >= 0, f'temperature must not be negative, it is {temperature}'
assert top_k >= 0, f'top_k must not be negative, it is {top_k}: use 0 for all tokens'
assert 0 < top_p <= 1, f'top_p must lie in (0, 1], it is {top_p}: use 1 for all tokens'
assert 0 <= min_p <= 1, f'min_p must lie in [0, 1], it is {min_p}: use 0 for all tokens'
assert max_new_tokens > 0, f'max_new_tokens must be positive, not {max_new_tokens}'

# -----------------------------------------------------------------------------
# model

if not checkpoint:
    checkpoint = f'{out_dir}/rlhf.pt'
run = setup(config)
if seed == 0:
    torch.seed()

ckpt = load_checkpoint(checkpoint, ['base', 'sft', 'dpo', 'rlhf'], 'bash speedrun.sh')
tok = Tokenizer(ckpt['tokenizer'])
model = load_model(ckpt, run.device)
model.eval()
is_chat = ckpt['stage'] != 'base'
block_size = model.config.block_size
max_new_tokens = min(max_new_tokens, block_size // 2) # leave room for the question

task = 'Ask something.' if is_chat else 'It continues documents: begin one.'
print(f'{checkpoint}: stage {ckpt["stage"]}, {model.n_params():,} parameters, '
      f'context of {block_size} tokens')
print(f'{task} /new /retry /quit')

# -----------------------------------------------------------------------------
# an answer

def truncate_probs(probs):
    """
    Set the probabilities (B, V) that sampling may not choose to 0; the rest need not sum to 1.
    top_k: Fan et al. 2018; top_p (nucleus): Holtzman et al. 2020; min_p: Nguyen et al. 2024.
    Training never truncates: RLHF needs samples from exactly the distribution that it changes.
    """
    if top_k > 0:
        k = min(top_k, probs.size(-1))
        smallest = probs.topk(k).values[:, -1:]          # (B, 1)
        probs = probs.masked_fill(probs < smallest, 0.0)
    if top_p < 1:
        ordered, order = probs.sort(descending=True)     # (B, V)
        before = ordered.cumsum(-1) - ordered            # probability of all more likely tokens
        total = ordered.sum(-1, keepdim=True)
        # the token that crosses top_p stays
        ordered = ordered.masked_fill(before > top_p * total, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    if min_p > 0:
        highest = probs.amax(-1, keepdim=True)           # (B, 1)
        probs = probs.masked_fill(probs < min_p * highest, 0.0)
    return probs

def make_prompt(messages):
    """Token ids of a conversation. If it is too long, the oldest turns in messages are deleted."""
    if not is_chat:
        return [tok.eot] + tok.encode(messages[-1]['content'])
    n_system = 1 if system else 0
    ids, _ = tok.render(messages, prompt=True)
    while len(ids) > block_size - max_new_tokens and len(messages) > n_system + 1:
        del messages[n_system:n_system + 2] # a question and its answer
        print('(the context is full: the oldest turn is forgotten)')
        ids, _ = tok.render(messages, prompt=True)
    room = block_size - max_new_tokens
    if len(ids) > room: # one message alone is too long: generate keeps its end
        print(f'(the message is too long: only its last {room} tokens are read)')
    return ids

def answer(messages):
    """Print the answer to a conversation token by token, and return its text."""
    decoder = codecs.getincrementaldecoder('utf-8')('replace') # tokens may split a character
    text = ''

    def show(new_bytes, is_last=False):
        nonlocal text
        piece = decoder.decode(new_bytes, is_last)
        if is_chat and not text: # the chat template begins each text with a space
            piece = piece.lstrip()
        text += piece
        print(piece, end='', file=answers, flush=True)

    def on_token(new_ids):
        show(tok.token_bytes(new_ids[0]))

    stop = tok.end if is_chat else tok.eot
    ids = make_prompt(messages)
    try:
        with run.autocast():
            generate(model, [ids], max_new_tokens, stop, temperature, truncate_probs, on_token)
    except KeyboardInterrupt: # Ctrl-C stops this answer, not the program
        print(' ...', end='', file=answers)
    show(b'', is_last=True)
    print(file=answers, flush=True)
    return text.rstrip()

# -----------------------------------------------------------------------------
# the conversation

opening = [dict(role='system', content=system)] if system else []
if prompt:
    answer(opening + [dict(role='user', content=prompt)])
    sys.exit()

messages = list(opening)
sys.stdin.reconfigure(errors='replace') # bytes that are not UTF-8 become U+FFFD, not an error
while True:
    try:
        text = input('\n> ' if sys.stdin.isatty() else '').strip()
    except (EOFError, KeyboardInterrupt):
        print()
        break

    if not text:
        continue
    if text == '/quit':
        break
    if text == '/new':
        messages = list(opening)
        print('(a new conversation)')
        continue
    if text == '/retry':
        if not messages or messages[-1]['role'] != 'assistant':
            print('(there is no answer to replace)')
            continue
        messages.pop()
    else:
        messages.append(dict(role='user', content=text))
    messages.append(dict(role='assistant', content=answer(messages)))
