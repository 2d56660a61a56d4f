"""chat.py: answers from a flag, a pipe and a terminal; what goes to stdout; sampling; long conversations; Ctrl-C."""
import json
import re
from dataclasses import asdict

import pytest
import torch
from torch.nn import functional as F

from conftest import definitions, make_spec, user
from model import GPT, GPTConfig, Tokenizer, make_optimizers, pad_right, save_checkpoint

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
    typed = 'Say a word.\n\n/retry\n/new\n/retry\nSay it.\n/quit\nSay\n'
    r = scripts.ok('chat.py', out / 'rlhf.pt', '--temperature=0', stdin=typed)
    assert r.out.splitlines() == ['owl'] * 3 and 'no answer to replace' in r.err
    assert scripts.ok('chat.py', out / 'rlhf.pt', stdin='').out == ''

def test_a_conversation_is_rendered_as_in_training(out, scripts):
    """The space before an answer comes from the chat template: it is not part of the answer."""
    watch = '''
import builtins, model
builtins.asked, real = [], model.generate
def generate(net, prompts, *more):
    asked.extend(prompts)
    return real(net, prompts, *more)
model.generate = generate
'''
    seen = out / 'asked.json'
    r = scripts.ok('chat.py', out / 'rlhf.pt', '--temperature=0', '--system=Hi', stdin='Say\nSay\n', before=watch,
                   after=f'import json; json.dump(asked, open({str(seen)!r}, "w"))')
    tok = Tokenizer(make_spec())
    turns = [dict(role='system', content='Hi')] + user('Say')
    more = turns + [dict(role='assistant', content=r.out.split('\n')[0])] + user('Say')
    assert json.loads(seen.read_text()) == [tok.render(turns, prompt=True)[0], tok.render(more, prompt=True)[0]]

def test_a_base_model_continues(out, scripts):
    for start, end in TEXTS.items():
        r = scripts.ok('chat.py', out / 'base.pt', '--temperature=0', f'--prompt={start}')
        assert r.out == f'{end}\n' and 'begin one' in r.err

def test_longer_than_the_context(out, scripts):
    r = scripts.ok('chat.py', out / 'rlhf.pt', '--max_new_tokens=8', stdin='Say a word.\n' * 6)
    assert 'oldest turn is forgotten' in r.err
    r = scripts.ok('chat.py', out / 'rlhf.pt', '--max_new_tokens=8', stdin='Say a word. ' * 40 + '\nSay it.\n')
    assert 'only its last 40 tokens are read' in r.err

def test_seed(out, scripts):
    flags = (out / 'base.pt', '--temperature=30', '--max_new_tokens=24', '--prompt=Anna')
    answers = [scripts.ok('chat.py', *flags, f'--seed={seed}').out for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]

def test_bytes_that_are_no_text(out, scripts):
    """Half a character on stdin, and in an argument; a terminal that lacks characters."""
    stdin = 'import io, sys; sys.stdin = io.TextIOWrapper(io.BytesIO(b"ca\\xc3\\nSay\\n"), encoding="utf-8")'
    r = scripts.ok('chat.py', out / 'rlhf.pt', '--temperature=0', before=stdin)
    assert r.out.count('\n') == 2
    scripts.ok('chat.py', out / 'rlhf.pt', '--temperature=0', before='import sys; sys.argv.append("--prompt=ca\\udcc3")')
    odd = """import sys, model
sys.stdout.reconfigure(encoding='latin-1', errors='strict')
model.Tokenizer.token_bytes = lambda self, i: '’'.encode()"""
    assert scripts.ok('chat.py', out / 'rlhf.pt', '--prompt=Say', '--max_new_tokens=2', before=odd).out.startswith('\\u2019')

def test_a_message_of_a_million_blanks(out, scripts):
    r = scripts.ok('chat.py', out / 'rlhf.pt', '--temperature=0', stdin='Say' + ' ' * 10**6 + 'it.\nSay\n')
    assert r.out.count('\n') == 2 and 'only its last' in r.err

def test_bad_settings(out, scripts, tmp_path):
    bad = {'--temperature=-1': 'temperature must not be negative', '--top_p=0': 'top_p must lie in',
           '--min_p=2': 'min_p must lie in', f'--out_dir={tmp_path}': 'no checkpoint .*rlhf.pt.*speedrun.sh'}
    for flag, pattern in bad.items():
        r = scripts('chat.py', f'--out_dir={out}', flag, '--prompt=Say')
        lines = [line for line in r.err.splitlines() if not line.startswith(('device: ', 'command line: '))]
        assert r.code == 1 and r.out == '' and len(lines) == 1
        assert lines[0].startswith('error: ') and re.search(pattern, lines[0])

# -----------------------------------------------------------------------------
# functions

PROBS = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.97, 0.01, 0.01, 0.01]])

@pytest.mark.parametrize('settings, kept', [
    (dict(), [[1, 1, 1, 1], [1, 1, 1, 1]]), (dict(top_k=2), [[1, 0, 1, 0], [1, 1, 1, 1]]),
    (dict(top_p=0.65), [[1, 0, 1, 0], [1, 0, 0, 0]]), (dict(min_p=0.5), [[1, 0, 1, 1], [1, 0, 0, 0]]),
    (dict(top_k=9), [[1, 1, 1, 1], [1, 1, 1, 1]])])
def test_truncate_probs(settings, kept):
    probs = definitions('chat.py', **settings).truncate_probs(PROBS)
    assert torch.equal(probs, PROBS * torch.tensor(kept)) # equal values stay together with top_k

class FakeRun:
    def autocast(self):
        return torch.autocast('cpu', enabled=False)

def answer_of(generate, **more):
    tok = Tokenizer(make_spec())
    chat = definitions('chat.py', tok=tok, run=FakeRun(), model=None, is_chat=True, block_size=48, max_new_tokens=8,
                       generate=generate, **more)
    return chat.answer(user('x'))

def test_characters_are_never_split(capsys):
    said = 'é🙂'.encode() + b'\xff' + '日'.encode()[:2] # one byte at a time; the end is not a whole character
    pieces = []
    def generate(model, prompts, max_new_tokens, stop, temperature, truncate_probs, on_token):
        for b in said:
            on_token([b])
            pieces.append(capsys.readouterr().out)
    text = answer_of(generate)
    pieces.append(capsys.readouterr().out.rstrip('\n'))
    assert text == ''.join(pieces) == 'é🙂\ufffd\ufffd'
    assert pieces[:6] == ['', 'é', '', '', '', '🙂']

def test_ctrl_c_stops_an_answer(capsys):
    def generate(model, prompts, max_new_tokens, stop, temperature, truncate_probs, on_token):
        for b in b' half':
            on_token([b])
        raise KeyboardInterrupt
    assert answer_of(generate) == 'half' and capsys.readouterr().out == 'half ...\n'
