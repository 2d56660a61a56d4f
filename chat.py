"""
The last stage: talk to a model. Any checkpoint will do: an assistant (sft.pt, rlhf.pt) answers, a base model continues
what you type.

    $ python chat.py                                              talk to out/toytown/rlhf.pt
    $ python chat.py out/toytown/base.pt                          let a base model continue your words
    $ python chat.py --prompt="What pet does Anna have?"          one answer, then exit
    $ echo "Hello" | python chat.py --temperature=0               also from a pipe

In the conversation: /new forgets it, /retry answers again, /quit (or Ctrl-D) leaves; Ctrl-C stops an answer.
Settings of sampling are the common ones. Left out here: a web page and an HTTP API.
"""
import codecs, sys

import torch

import model as lib
from configurator import configure
from model import Tokenizer, die

# `python chat.py path.pt` is short for --checkpoint=path.pt
sys.argv[1:] = [f'--checkpoint={a}' if a.endswith('.pt') and not a.startswith('-') else a for a in sys.argv[1:]]
sys.stdout = sys.stdout if {'-h', '--help'} & set(sys.argv) else sys.stderr # what goes into a pipe is the answer alone

# -----------------------------------------------------------------------------
# settings
checkpoint = ''             # the model; empty = out_dir/rlhf.pt
out_dir = 'out/toytown'     # where checkpoints are
# sampling
prompt = ''                 # answer this and exit; empty = a conversation
system = ''                 # a system message that opens the conversation
max_new_tokens = 128        # longest answer
temperature = 0.8           # 0 always takes the likeliest token, 1 samples what the model believes
top_k = 0                   # sample from the k likeliest tokens only; 0 = all
top_p = 1.0                 # sample from the likeliest tokens that together hold this much probability
min_p = 0.0                 # drop tokens less likely than this share of the likeliest
# system
device = 'auto'             # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'              # auto, float32, bfloat16
seed = 0                    # of the sampling; 0 = another one each time
config = configure(globals())

# -----------------------------------------------------------------------------
# model
if top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1 or temperature < 0:
    die(f'top_k {top_k} and temperature {temperature} must not be negative, top_p {top_p}, min_p {min_p} lie in 0..1')
checkpoint = checkpoint or f'{out_dir}/rlhf.pt'
run = lib.start(config)
ckpt = lib.load_checkpoint(checkpoint, ['base', 'sft', 'rlhf'], 'bash speedrun.sh')
tok = Tokenizer(ckpt['tokenizer'])
net = lib.load_model(ckpt, run.device).eval()
chatty, size = ckpt['stage'] != 'base', net.config.block_size
max_new_tokens = min(max_new_tokens, size // 2) # leave room for the question
if seed == 0:
    torch.seed()
sys.stdout = sys.__stdout__
print(f'{checkpoint}: {net.n_params():,} parameters, stage {ckpt["stage"]}, context {size}. '
      + ('Ask something.' if chatty else 'It continues documents: begin one.') + ' /new /retry /quit', file=sys.stderr)

first = [dict(role='system', content=system)] if system else []

def truncate(probs):
    """(B, V): zero what sampling may not choose. Training never does this: RLHF needs answers as the model has them."""
    if top_k:
        probs = probs.masked_fill(probs < probs.topk(min(top_k, probs.size(-1)))[0][:, -1:], 0.0)
    if top_p < 1.0:
        p, order = probs.sort(descending=True)
        p[p.cumsum(-1) - p > top_p * p.sum(-1, keepdim=True)] = 0.0 # keeps the token that crosses top_p
        probs = torch.zeros_like(probs).scatter(-1, order, p)
    if min_p:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0.0)
    return probs

def answer(messages):
    """Print an answer to the messages token by token; returns its text."""
    if chatty:
        ids = tok.render(messages, prompt=True)[0]
        while len(ids) > size - max_new_tokens and len(messages) - len(first) > 2:
            del messages[len(first):len(first) + 2] # the oldest question and its answer
            print('(the conversation is longer than the context: its oldest turn is forgotten)', file=sys.stderr)
            ids = tok.render(messages, prompt=True)[0]
    else:
        ids = [tok.eot] + tok.encode(messages[-1]['content'])
    stop = tok.end if chatty else tok.eot
    decoder, parts = codecs.getincrementaldecoder('utf-8')('replace'), [] # a character may be split over tokens

    def show(new, final=False):
        text = decoder.decode(b''.join(tok.bytes_of(t) for t in new), final)
        parts.append(text.lstrip() if chatty and not ''.join(parts) else text) # an answer begins with a space
        print(parts[-1], end='', flush=True)
    try:
        with run.autocast():
            lib.generate(net, [ids], max_new_tokens, stop, temperature, truncate, show)
    except KeyboardInterrupt: # stops this answer, not the program
        print(' ...', end='')
    show([], final=True)
    print(flush=True)
    return ''.join(parts).rstrip()

# -----------------------------------------------------------------------------
# the conversation
if prompt:
    answer(first + [dict(role='user', content=prompt)])
    sys.exit()
messages, tty = list(first), sys.stdin.isatty()
while True:
    try:
        text = input('\n> ' if tty else '').strip()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        break
    if text == '/quit':
        break
    elif text == '/new':
        messages = list(first)
        print('(a new conversation)', file=sys.stderr)
        continue
    elif text == '/retry':
        if not messages or messages[-1]['role'] != 'assistant':
            print('(nothing to answer again)', file=sys.stderr)
            continue
        messages.pop()
    elif text:
        messages.append(dict(role='user', content=text))
    else:
        continue
    messages.append(dict(role='assistant', content=answer(messages)))
