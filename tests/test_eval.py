"""eval.py: each measure against numbers made by hand, the drawing, the report, and what it refuses."""
import html
import itertools
import json
import math
import re
import shutil
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from configurator import configure
from conftest import ROOT, definitions, fails, user, write_rows
from model import GPT, GPTConfig, ScalarModel, Tokenizer, load_checkpoint, load_model, read_shard, save_checkpoint

T = 48 # block_size

def one_process(rank=0, world_size=1):
    return SimpleNamespace(device=torch.device('cpu'), rank=rank, world_size=world_size, master=rank == 0,
                           autocast=lambda: torch.autocast('cpu', enabled=False))

def functions(**settings):
    """The functions of eval.py, on one CPU process."""
    return definitions('eval.py', **{'run': one_process(), 'batch_size': 3, **settings})

@pytest.fixture(scope='module')
def trained(world, tmp_path_factory):
    """out: a base model that has learned who has which pet, an 'SFT' model near it, a reward model's metrics, logs."""
    out = tmp_path_factory.mktemp('trained')
    tok = Tokenizer.load(world.data / 'tokenizer.json')
    torch.manual_seed(0)
    config = GPTConfig(arch='llama', vocab_size=tok.n_vocab, block_size=T, n_layer=2, n_head=4, n_embd=32)
    model = GPT(config)
    tokens = np.concatenate([read_shard(world.data / f'train_00000{i}.bin') for i in range(2)])
    tokens = torch.from_numpy(tokens.astype(np.int64))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(100):
        windows = tokens[torch.randint(len(tokens) - T, (8, 1)) + torch.arange(T + 1)]
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {'base': model.state_dict()}
    weights['sft'] = {name: w + 0.02 * torch.randn(w.shape) for name, w in weights['base'].items()}
    weights['reward'] = ScalarModel(config).state_dict()
    metrics = dict(seconds=2.0, flops=1e9, tokens=5000)
    agreement = dict(val_accuracy=0.8, val_gold_accuracy=0.9, self_agreement=0.85)
    for stage, state in weights.items():
        more = agreement if stage == 'reward' else {}
        save_checkpoint(str(out / f'{stage}.pt'), stage, state, asdict(config), tok, {}, 100, {**metrics, **more})
    write_rows(out / 'base.jsonl', [dict(step=0, val_loss=5.6), dict(step=0, loss=5.5), dict(step=99, loss=0.5)])
    write_rows(out / 'reward.jsonl', [dict(step=0, val_accuracy=0.5, val_gold_accuracy=0.5), dict(step=0, accuracy=0.1),
                                      dict(step=9, val_accuracy=0.8, val_gold_accuracy=0.9)])
    return SimpleNamespace(out=out, tok=tok, data=world.data, profile=world.tiny,
                           model=load_model(load_checkpoint(out / 'base.pt', ['base'], ''), 'cpu').eval())

def run_eval(scripts, trained, out, *flags):
    scripts.ok('eval.py', trained.profile, f'--data_dir={trained.data}', f'--out_dir={out}', *flags)
    return json.loads((out / 'report.json').read_text(encoding='utf-8'))

# -----------------------------------------------------------------------------
# how well a model predicts given text

@torch.no_grad()
def bits_and_bytes(model, tok, tokens):
    """Token by token: bits to encode the windows that fit into tokens, and the bytes of their text."""
    bits = n_bytes = 0
    for i in range(0, len(tokens) - T, T):
        logprobs = F.log_softmax(model(torch.tensor([tokens[i:i + T]]))[0], -1)
        for t, target in enumerate(tokens[i + 1:i + T + 1]):
            bits -= logprobs[t, target].item() / math.log(2)
            n_bytes += len(tok.token_bytes(target)) # <|endoftext|> costs bits and has no bytes
    return bits, n_bytes

def test_bits_per_byte_by_hand(trained):
    tokens = read_shard(trained.data / 'val_000000.bin').tolist()
    for val_tokens in (200, 192, 191, 10**6): # 200: four windows fit, and 8 tokens are left over
        bits, n_bytes = bits_and_bytes(trained.model, trained.tok, tokens[:val_tokens + 1])
        f = functions(data_dir=str(trained.data), val_tokens=val_tokens)
        measures = f.language_modelling(trained.model, trained.tok)
        assert measures['bits per byte'] == pytest.approx(bits / n_bytes, rel=1e-4)
        n_tokens = (min(val_tokens, len(tokens) - 1)) // T * T
        assert measures['perplexity'] == pytest.approx(2 ** (bits / n_tokens), rel=1e-4)
    f = functions(data_dir=str(trained.data), val_tokens=0)
    assert f.language_modelling(trained.model, trained.tok) == {'perplexity': None, 'bits per byte': None}

def test_bits_per_byte_of_several_shards_and_ranks(trained, tmp_path):
    """val_tokens counts across shards; the ranks' sums add up to those of one process."""
    for i in range(2):
        shutil.copy(trained.data / 'val_000000.bin', tmp_path / f'val_00000{i}.bin')
    tokens = read_shard(trained.data / 'val_000000.bin').tolist()
    bits, n_bytes = bits_and_bytes(trained.model, trained.tok, (tokens + tokens)[:len(tokens) + 100])
    sums = []
    for rank in range(2):
        def all_sum(nats, n_tokens, n_bytes):
            sums.append((nats / math.log(2), n_bytes))
            return nats, n_tokens, n_bytes
        f = functions(data_dir=str(tmp_path), val_tokens=len(tokens) + 99, run=one_process(rank, 2), all_sum=all_sum)
        f.language_modelling(trained.model, trained.tok)
    assert sum(s[1] for s in sums) == n_bytes and min(s[1] for s in sums) > 0
    assert sum(s[0] for s in sums) == pytest.approx(bits, rel=1e-4)

@torch.no_grad()
def test_scores_are_those_of_each_row_alone(trained):
    g = torch.Generator().manual_seed(0)
    lengths = [1, 3, 2, 6, 1, 4, 5]
    rows = [torch.randint(trained.tok.n_vocab, (n,), generator=g).tolist() for n in (9, 4, 30, 7, 2, 12, 18)]
    rows[1][1:] = [] # rows[1]: one token, and the three that greedy decoding puts behind it
    for _ in range(3):
        rows[1].append(trained.model(torch.tensor([rows[1]]))[0, -1].argmax().item())
    for temperature in (1.0, 0.5):
        answers = [dict(query=row[:-n], ids=row[-n:]) for row, n in zip(rows, lengths)]
        scores = functions(temperature=temperature).score_answers(trained.model, answers, trained.tok.pad)
        for row, length, (logprob, entropy, is_greedy) in zip(rows, lengths, scores):
            probs = F.softmax(trained.model(torch.tensor([row]))[0] / temperature, -1)
            steps = range(len(row) - length, len(row))
            entropies = [-(probs[t - 1] * probs[t - 1].log()).sum().item() for t in steps]
            assert logprob == pytest.approx(sum(math.log(probs[t - 1, row[t]]) for t in steps), abs=1e-4)
            assert entropy == pytest.approx(sum(entropies), abs=1e-4)
            assert is_greedy == all(probs[t - 1].argmax() == row[t] for t in steps)
        assert [is_greedy for _, _, is_greedy in scores] == [False, True] + [False] * 5

@torch.no_grad()
def test_loss_of_continuations_by_hand(trained):
    """
    Which tokens are scored: a space between the two texts, no context, a long context, a long continuation. Blanks at
    the end of a context belong to the continuation, a newline stays; beside Chinese no space is put in.
    """
    tok = trained.tok
    says = 'Anna has the owl. ' * 12
    long = tok.encode(says)
    assert len(long) > 2 * T
    cases = [(('Anna has the', 'owl.'), [tok.eot] + tok.encode('Anna has the'), tok.encode(' owl.')),
             (('Anna has the', ' owl.'), [tok.eot] + tok.encode('Anna has the'), tok.encode(' owl.')),
             (('Anna has the ', 'owl.'), [tok.eot] + tok.encode('Anna has the'), tok.encode(' owl.')),
             (('Anna has the \t', ' owl.'), [tok.eot] + tok.encode('Anna has the'), tok.encode(' \t owl.')),
             (('Anna has the\n', 'owl.'), [tok.eot] + tok.encode('Anna has the\n'), tok.encode('owl.')),
             (('Anna:\n ', 'owl.'), [tok.eot] + tok.encode('Anna:\n'), tok.encode(' owl.')),
             (('2+2=', '4'), [tok.eot] + tok.encode('2+2='), tok.encode(' 4')),
             (('二加二等于', '四'), [tok.eot] + tok.encode('二加二等于'), tok.encode('四')),
             (('二加二等于 ', '四'), [tok.eot] + tok.encode('二加二等于'), tok.encode(' 四')),
             (('2+2=', '四。'), [tok.eot] + tok.encode('2+2='), tok.encode('四。')),
             (('答：', 'A'), [tok.eot] + tok.encode('答：'), tok.encode('A')),
             (('ネコは', 'です'), [tok.eot] + tok.encode('ネコは'), tok.encode('です')),
             (('แมว', 'ดำ'), [tok.eot] + tok.encode('แมว'), tok.encode('ดำ')),
             (('둘 더하기 둘은', '넷'), [tok.eot] + tok.encode('둘 더하기 둘은'), tok.encode(' 넷')), # Korean has blanks
             (('', 'owl'), [tok.eot], tok.encode('owl')),
             ((' ', 'owl'), [tok.eot], tok.encode(' owl')),
             ((says, 'Bela'), long[:-1][-(T + 1 - len(tok.encode(' Bela'))):], tok.encode(' Bela')),
             (('x', ' ' + says), tok.encode('x'), tok.encode(' ' + says)[:T])]
    questions = made(*[([pair], None) for pair, _, _ in cases])
    got = functions().ask(trained.model, tok, questions, dict(shots=0, delimiter=None))
    for answer, (_, context, continuation) in zip(got, cases):
        loss, = answer['losses']
        ids = torch.tensor([context + continuation])
        assert ids.size(1) <= T + 1
        logits = trained.model(ids[:, :-1])[0, -len(continuation):]
        assert loss == pytest.approx(F.cross_entropy(logits, torch.tensor(continuation)).item(), abs=1e-4), continuation

def test_progress_is_printed_with_the_time_left(capsys):
    assert list(functions(progress_seconds=0, batch_size=2).in_batches('abcde', 'x')) == ['ab', 'cd', 'e']
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and re.fullmatch(r'  x: 2 of 5 \| [\d.]+ per second \| [\d,]+ s left', lines[0])
    assert list(functions(progress_seconds=9).in_batches([], 'x')) == []
    assert list(functions(progress_seconds=9).in_batches([1, 2], 'x')) == [[1, 2]] and capsys.readouterr().out == ''

# -----------------------------------------------------------------------------
# benchmarks

def examine(f, trained, questions, tok=None):
    """-> accuracy and chance of questions that are asked without shots"""
    answers = f.ask(trained.model, tok or trained.tok, questions, dict(shots=0, delimiter=None))
    result = f.summarize(answers, questions)
    return result['accuracy'], result['chance']

def made(*questions):
    """[(choices, gold)] -> questions as load_benchmark reads them"""
    return [dict(choices=choices, gold=gold, category='') for choices, gold in questions]

def test_the_kinds_of_benchmarks(trained):
    """A model that knows the pets; in `wrong` the gold answers are false, in `greedy` one of two."""
    f = functions()
    want = dict(right=(1, 0.25), wrong=(0, 0.25), schema=(1, 0.5), greedy=(0.5, 0))
    for name, result in want.items():
        questions, _ = f.load_benchmark(trained.data / 'benchmarks' / f'{name}.jsonl')
        assert examine(f, trained, questions) == result
    mixed = made(([('a', 'b'), ('a', 'c')], 0), ([('a', 'b')] * 4, 1), ([('a', 'b')], None))
    assert examine(f, trained, mixed)[1] == pytest.approx((1 / 2 + 1 / 4 + 0) / 3)

def test_blanks_at_the_end_of_a_query_change_nothing(trained):
    f = functions()
    questions, _ = f.load_benchmark(trained.data / 'benchmarks' / 'right.jsonl')
    for question in questions:
        question['choices'] = [(context + ' ', text.strip()) for context, text in question['choices']]
    assert examine(f, trained, questions) == (1, 0.25)

def test_a_text_that_the_tokenizer_cannot_write_is_never_right(trained):
    """A tokenizer of characters drops those that it does not know."""
    tok = SimpleNamespace(eot=trained.tok.eot, pad=trained.tok.pad,
                          encode=lambda text: [] if 'é' in text else trained.tok.encode(text))
    greedy = trained.tok.decode([trained.model(torch.tensor([[trained.tok.eot]]))[0, -1].argmax().item()])
    questions = made(([('', 'é'), ('', 'éé')], 0), ([('', 'é')], None), ([('', greedy)], None), ([('', 'é'), ('', 'x')], 1))
    assert examine(functions(), trained, questions, tok)[0] == 2 / 4

def test_the_ranks_share_the_questions(trained):
    questions, _ = functions().load_benchmark(trained.data / 'benchmarks' / 'right.jsonl')
    questions[2]['gold'] = (questions[2]['gold'] + 1) % 4 # one of four is wrong now
    n_right = []
    for rank in range(2):
        f = functions(run=one_process(rank, 2), all_gather_list=lambda answers, run: answers)
        answers = f.ask(trained.model, trained.tok, questions, dict(shots=0, delimiter=None))
        n_right.append([(answer['question'], answer['right']) for answer in answers])
    assert n_right == [[(0, True), (2, False)], [(1, True), (3, True)]]

@pytest.mark.parametrize('row', [
    dict(query='x', choices=['a', 'b']), dict(query='x', choices=['a', 'b'], gold='b'),
    dict(query='x', choices=3, gold=0), dict(x=1), dict(query='x', choices=['a', 'b'], gold=2),
    dict(query='x', choices=['a', 'b'], gold=-1),
    dict(query='x', choices=[1, 2], gold=0), dict(query=None, choices=['a'], gold=0), dict(context='x', continuation=3),
    dict(query='x', choices=[], gold=0), dict(context_options=['a', 'b'], continuation='c'),
    dict(context='2+2=', continuation=4), dict(context='x ', continuation=''), dict(context='', continuation=''),
    dict(context='x', continuation=' \n'), dict(context_options=['', 'b'], continuation='', gold=1),
    dict(query='x', choices=['a', ''], gold=0), dict(query='x', choices='ab', gold=0),
    dict(query='x', choices=dict(a=1, b=2), gold=0), dict(context_options='ab', continuation='c', gold=0),
    dict(messages=[], checks=dict(number=3)), dict(messages=['x'], checks=dict(number=3)),
    *[dict(query='x', choices=['a', 'b'], gold=gold) for gold in (math.inf, math.nan, 0.5, None, [1], '')]], ids=str)
def test_a_bad_row_names_its_place(row, tmp_path):
    path = tmp_path / 'bad.jsonl'
    good = dict(query='x', choices=['a', 'b'], gold=1)
    write_rows(path, [good, good, row])
    with fails(r'bad\.jsonl:3: .*query, choices, gold'):
        functions().load_benchmark(path)
    write_rows(path, [good, good])
    assert functions().load_benchmark(path) == (made(([('x', 'a'), ('x', 'b')], 1)) * 2, [])

def test_an_empty_file_has_no_questions(tmp_path, capsys):
    write_rows(tmp_path / 'empty', [])
    assert functions().load_benchmark(tmp_path / 'empty') == ([], []) and 'no questions' in capsys.readouterr().out

# -----------------------------------------------------------------------------
# sampled answers

@torch.no_grad()
def test_answers_and_their_logprobs(trained):
    f = functions(max_new_tokens=6, temperature=0.7)
    tok = trained.tok
    prompts = [dict(messages=user(text)) for text in ('Say', 'Who has the owl?', 'x' * 99, 'Say it.')]
    for is_chat in (True, False):
        answers = f.answer_prompts(trained.model, tok, is_chat, prompts)
        scores = f.score_answers(trained.model, answers, tok.pad)
        stop = tok.end if is_chat else tok.eot
        for prompt, answer, (logprob, entropy, _) in zip(prompts, answers, scores):
            text = prompt['messages'][0]['content']
            query = tok.render(prompt['messages'], prompt=True)[0] if is_chat else [tok.eot] + tok.encode(text + '\n')
            assert answer['query'] == query[-(T - 6):] # the context has room for 6 new tokens
            assert 1 <= len(answer['ids']) <= 6 and answer['ended'] == (answer['ids'][-1] == stop)
            assert answer['text'] == tok.decode_answer(answer['ids'])
            logits = trained.model(torch.tensor([answer['query'] + answer['ids']]))[0, len(answer['query']) - 1:-1]
            logprobs = F.log_softmax(logits / 0.7, -1)
            chosen = logprobs[range(len(answer['ids'])), answer['ids']]
            assert logprob == pytest.approx(chosen.sum().item(), abs=1e-4)
            assert entropy == pytest.approx(-(logprobs.exp() * logprobs).sum().item(), abs=1e-4)
    again = f.answer_prompts(trained.model, tok, False, prompts)
    assert again == answers # the seed decides
    f = functions(max_new_tokens=6, temperature=0.0)
    scores = f.score_answers(trained.model, f.answer_prompts(trained.model, tok, False, prompts), tok.pad)
    assert all(math.isfinite(logprob) for logprob, _, _ in scores) # scored at temperature 1

def test_a_chat_model_stops_at_end_and_a_base_model_at_the_end_of_the_document(trained):
    tok = trained.tok
    f = functions(generate=lambda model, batch, n, stop, temperature: [[stop] for _ in batch])
    for is_chat, stop in ((True, tok.end), (False, tok.eot)):
        answer, = f.answer_prompts(trained.model, tok, is_chat, [dict(messages=user('Say'))])
        assert answer['ids'] == [stop] and answer['ended'] and answer['text'] == ''

def test_distinct_by_hand():
    distinct = functions().distinct
    assert distinct(['a b a', 'B c'], 1, 99) == 3 / 5     # a b c of a b a b c
    assert distinct(['a b a', 'B c'], 2, 99) == 3 / 3     # ab ba bc, none across answers
    assert distinct(['a a a a'], 2, 99) == 1 / 3
    assert distinct(['a b a', 'B c'], 1, 3) == 2 / 3      # the budget: only a b a is read
    assert distinct([], 1, 5) == distinct(['a'], 2, 5) == 0

def test_refusals():
    says = functions().REFUSALS.search
    for text in ('I do not know anybody called Vera.', 'Sorry, that is private.', "I'm sorry, but I can't help."):
        assert says(text), text
    for text in ('Anna has the owl.', 'I know Vera.', 'A private road.', ''):
        assert not says(text), text

# -----------------------------------------------------------------------------
# preference

def test_wilson_by_hand():
    """The interval holds the shares p0 for which (p - p0)^2 <= 1.96^2 p0 (1 - p0) / n."""
    for p, n in ((0.5, 100), (0.0, 10), (1.0, 3), (0.7, 300)):
        for p0 in functions().wilson(p, n):
            assert (p - p0) ** 2 == pytest.approx(1.96 ** 2 * p0 * (1 - p0) / n, abs=1e-12) and -1e-12 <= p0 <= 1 + 1e-12

def test_rounds_by_hand():
    rounds = functions().get_rounds(np.array([[1, 0], [1, 2], [0, 1]])) # three models, two prompts
    assert rounds[0].tolist() == [[0, 0.5, 1], [0.5, 0, 1], [0, 0, 0]]
    assert rounds[1].tolist() == [[0, 0, 0], [1, 0, 1], [1, 0, 0]]

def test_elo_of_two_is_known_and_of_many_fits():
    f = functions(seed=1)
    ratings, (lower, upper) = f.elo(f.get_rounds(np.array([[1] * 30 + [0] * 10, [0] * 30 + [1] * 10])))
    assert ratings[0] - ratings[1] == pytest.approx(400 * math.log10(30.5 / 10.5)) and sum(ratings) == pytest.approx(2000)
    # the rating is half of the difference: by the delta method its standard error is 400 / ln 10 / 2 / sqrt(n p q)
    width = 2 * 1.96 * 200 / math.log(10) / math.sqrt(40 * 0.75 * 0.25)
    assert lower[0] < ratings[0] < upper[0] and upper[0] - lower[0] == pytest.approx(width, rel=0.2)
    rng = np.random.default_rng(0)
    rounds = f.get_rounds(rng.integers(0, 4, (4, 60)) + np.array([[0], [1], [2], [9]])) # one always wins
    ratings, _ = f.elo(rounds)
    chances = 1 / (1 + 10 ** ((ratings[None, :] - ratings[:, None]) / 400))
    others = 1 - np.eye(4)
    points = rounds.sum(0) + 0.5 * others # the maximum: as many points as are expected
    assert (61 * chances * others).sum(1) == pytest.approx(points.sum(1), abs=0.01)
    assert ratings.tolist() == sorted(ratings) and ratings[3] < 2500
    played = np.zeros((3, 3, 3)) # a verdict is a round in which two have met
    played[:, 0, 2] = 1
    assert f.elo(played)[0].argsort().tolist() == [2, 1, 0]

# -----------------------------------------------------------------------------
# many answers to one prompt

def test_best_of_n_is_the_mean_over_all_subsets():
    f = functions()
    rng = np.random.default_rng(0)
    scores, values = rng.permutation(21).reshape(3, 7), rng.integers(0, 5, (3, 7)) / 4
    for n in range(1, 8):
        best = [values[row, max(subset, key=lambda i: scores[row, i])]
                for row in range(3) for subset in itertools.combinations(range(7), n)]
        assert f.best_of(scores, values, n) == pytest.approx(np.mean(best), abs=1e-12), n
    assert f.best_of([[1, 2, 3]], [[10, 20, 30]], 2) == pytest.approx((20 + 30 + 30) / 3) # of the docstring

def test_pairs_of_answers_by_hand():
    accuracy = functions().pair_accuracy
    assert accuracy([[1, 2, 3]], [[0, 1, 0]]) == 1 / 2
    assert accuracy([[1, 2, 3], [5, 5, 9]], [[0, 0, 1], [0, 1, 0.5]]) == (1 + 1 + 1 / 2 + 1 + 0) / 5
    assert accuracy([[1, 2]], [[1, 1]]) is None # no pair has a right order

def test_grades_with_and_without_the_liked_phrases():
    prompts = [dict(checks=dict(contains=['owl'], max_words=2, likes=['Hope that helps!'])), dict(checks=dict(equals='x'))]
    found = functions().grade_all(prompts * 2, ['owl. Hope that helps!', 'x', 'owl', 'y'])
    assert found['gold'].tolist() == [0.75, 1, 1, 0] and found['plain'].tolist() == [0.5, 1, 1, 0]
    assert found['all_met'].tolist() == [0, 1, 1, 0]

@torch.no_grad()
def test_reward_scores_are_read_at_the_end_of_the_answer(trained):
    tok = trained.tok
    torch.manual_seed(0)
    model = ScalarModel(trained.model.config).eval()
    prompts = [dict(messages=user(text)) for text in ('Say', 'Who has the owl?', 'Say it.', 'x' * 99)]
    texts = ['owl', '', 'Anna has the owl.', 'fox']
    for prompt, text, score in zip(prompts, texts, functions().reward_scores(model, tok, prompts, texts)):
        ids = tok.render(prompt['messages'] + [dict(role='assistant', content=text)])[0]
        assert ids[-1] == tok.end and score == pytest.approx(model(torch.tensor([ids[-T:]]))[0, -1].item(), abs=1e-5)

# -----------------------------------------------------------------------------
# tables and charts

def test_tables():
    f = functions()
    cells = {None: '', 'x': 'x', 0.5: '0.500', 999.9: '999.900', 12345.6: '12,346', -2000: '-2,000', True: '1.000'}
    assert {value: f.show(value) for value in cells} == cells
    assert f.show([0.25, 0.5]) == '0.250 to 0.500'
    assert f.markdown(['measure', 'a', 'b'], [['x', 1, None], ['longer name', 0.25, '10%']]) == (
        '| measure     |     a |   b |\n'
        '| ----------- | ----: | --: |\n'
        '| x           | 1.000 |     |\n'
        '| longer name | 0.250 | 10% |')

def test_spread():
    spread = functions().spread
    assert spread([10, 12, 50], 13, 0, 100) == [10, 23, 50]
    assert spread([50, 12, 10], 13, 0, 100) == [50, 23, 10]   # in the order of the input
    assert spread([99, 100], 13, 0, 100) == [87, 100]         # nothing leaves the range
    rng = np.random.default_rng(0)
    for _ in range(200):
        wanted = rng.uniform(0, 100, rng.integers(1, 8)).tolist()
        placed = spread(wanted, 13, 0, 100)
        gaps = np.diff(sorted(placed))
        assert (gaps > 13 - 1e-9).all() and min(placed) >= -1e-9 and max(placed) <= 100 + 1e-9
        assert np.argsort(wanted).tolist() == np.argsort(placed).tolist() # and the order stays

def boxes(svg):
    """(left, top, right, bottom) of each text, at 0.6 of the font's size per letter, and the points of all lines."""
    texts = []
    for x, y, style, text in re.findall(r'<text x="(\S+)" y="(\S+)" (.*?)>(.*?)</text>', svg):
        width = 0.6 * 11 * len(text)
        left = float(x) - width if 'text-anchor="end"' in style else float(x)
        texts.append((left, float(y) - 9, left + width, float(y) + 2, text))
    points = []
    for line in re.findall(r'points="(.*?)"', svg):
        points.append([tuple(map(float, point.split(','))) for point in line.split()])
    return texts, points

def test_labels_stand_free_of_lines_and_of_each_other():
    f = functions()
    steps = [0, 50, 100]
    charts = [
        dict(title='same end', curves={'training': (steps, [5, 1, 0]), 'held-out': (steps, [6, 2, 0.01])}),
        dict(title='at the top', curves={'reward model': (steps, [0, 1, 2]), 'gold score': (steps, [0, 1.9, 1.99])}),
        dict(title='three', curves={'one': (steps, [1, 1, 1]), 'two': (steps, [1, 1, 1]), 'three': (steps, [1, 1, 1])}),
        dict(title='constant', curves={'KL': ([0], [0.0])}),
        dict(title='logarithmic', is_log=True, curves={'training': (steps, [7.6, 1.9, 0.49]), 'x': (steps, [5, 2, 1])}),
        dict(title='of gold', x='√KL', curves={'KL coef. 0.02': ([0.0, 6.5, 5.1], [1, 3, 2]),
                                              'best of n': ([0.4, 1.4], [1, 2])})]
    svg = f.draw(charts)
    texts, lines = boxes(svg)
    assert len(lines) == 11 and svg.count('<circle') == 2
    # labels; per chart title, high, low, step; 5, 2 and 1 between the logarithms of 7.6 and 0.49
    assert len(texts) == 12 + 6 * 4 + 3 and '>√KL 6.5<' in svg
    width, height = (float(v) for v in re.search(r'width="(\d+)" height="(\d+)"', svg).groups())
    for i, (left, top, right, bottom, text) in enumerate(texts):
        assert 0 <= left and right <= width and 0 <= top and bottom <= height, text # inside of the picture
        for left2, top2, right2, bottom2, other in texts[:i]:
            assert right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top, (text, other)
        for line in lines: # a line goes from left to right, so its bounding box is enough
            xs, ys = zip(*line)
            assert max(xs) <= left or min(xs) >= right or max(ys) <= top or min(ys) >= bottom, text

def test_points_of_a_curve_by_hand():
    """Low is at the bottom of the frame, high at its top, the last step at its right edge."""
    f = functions()
    _, lines = boxes(f.draw([dict(title='x', curves={'a': ([0, 10, 20], [1, 2, 3]), 'b': ([0, 10], [1, 3])}),
                             dict(title='y', is_log=True, curves={'a': ([0, 10, 20], [1, 10, 100])})]))
    left, top, right, bottom = 48, 32, 48 + f.WIDTH, 32 + f.HEIGHT
    assert lines[0] == [(left, bottom), ((left + right) / 2, (top + bottom) / 2), (right, top)]
    assert lines[1] == [(left, bottom), ((left + right) / 2, top)]
    assert lines[2] == [(x + f.CELL_WIDTH, y) for x, y in lines[0]] # a factor of 10 is as high everywhere
    assert f.get_ticks(0.49, 7.6) == [0.5, 1, 2, 5] and f.get_ticks(1, 1) == []

# -----------------------------------------------------------------------------
# the script

def test_report(trained, scripts, tmp_path):
    out = shutil.copytree(trained.out, tmp_path / 'out')
    for coefficient, rows in {'0': [(0.0, -0.1, 0.7), (4.0, 1.2, 1.1), (16.0, 1.5, 0.9)], '0.2': [(-0.01, 0, 0.7)]}.items():
        rows = [dict(step=i, val_kl=kl, val_score=proxy, val_gold=gold) for i, (kl, proxy, gold) in enumerate(rows)]
        write_rows(out / 'overoptimise' / coefficient / 'rlhf.jsonl', [dict(step=0, loss=1.0), *rows])
    hack = '</table><script>alert(1)</script> & <b>'
    path = tmp_path / 'data'
    shutil.copytree(trained.data, path)
    rows = [json.loads(line) for line in (path / 'prompts_val.jsonl').read_text(encoding='utf-8').splitlines()]
    write_rows(path / 'prompts_val.jsonl', [dict(row, messages=user(hack)) for row in rows])
    report = run_eval(scripts, trained, out, f'--data_dir={path}')
    assert list(report['table']) == ['base', 'sft'] # there is no rlhf.pt
    assert list(report['costs']) == ['base', 'sft', 'reward']
    base = report['table']['base']
    accuracies = {name: result['accuracy'] for name, result in report['benchmarks']['base'].items()}
    assert accuracies == dict(right=1, schema=1, greedy=0.5, wrong=0)
    only_chat = {'pairs of answers that the reward model orders as gold does'}
    assert set(report['table']['sft']) - set(base) == only_chat and 'win rate against SFT' not in base
    assert len(report['benchmarks']['sft']) == 8 and 'right, chat' in report['benchmarks']['sft'] # both forms
    first, *bests = report['best_of_n']
    assert [row['answers'] for row in bests] == [f'best of {n}' for n in (2, 4, 8, 16)]
    assert bests[1]['KL, nats'] == pytest.approx(math.log(4) - 3 / 4)
    assert first['preferred to SFT'] == pytest.approx(0.5) # the SFT model against itself
    proxies = [row['reward model'] for row in report['best_of_n']]
    assert min(np.diff(proxies)) > -1e-6 # each is the best by this score
    drawn = (out / 'overoptimise.svg').read_text(encoding='utf-8')
    texts, lines = boxes(drawn)
    assert len(lines) == 4 and drawn.count('<circle') == 8 # proxy and gold: two runs, and four best-of-n
    assert drawn.count('>KL coef. 0.2<') == 2 and drawn.count('>√KL 4.0<') == 2
    xs, ys = zip(*max(lines, key=len)) # that of coefficient 0
    assert xs[0] == 48 and xs[2] - xs[0] == pytest.approx(2 * (xs[1] - xs[0]), abs=0.2) # KL 4 is half of the way to 16
    assert 0 <= base['all checks met'] <= 1 <= base['tokens per answer'] <= 6
    text = (out / 'report.md').read_text(encoding='utf-8')
    assert all(measure in text for measure in base) and '- sft: ' in text and '<script>' not in text
    assert re.search(r'right +\| +0 \| +4 \| +25% \| +25% \| 100.0% ± 0.0% \|', text)
    assert re.search(r'reward model and labeller +\| +80\.0%', text) and re.search(r'asked twice +\| +85\.0%', text)
    assert '33.3%' in text # each of the three has a third of the FLOPs
    svg = (out / 'curves.svg').read_text(encoding='utf-8')
    assert svg.startswith('<svg') and '![curves.svg](curves.svg)' in text
    # of the reward model's two kinds of accuracy only the held-out ones are drawn; and what to expect of both stages
    assert len(boxes(svg)[1]) == 4 + 2 and svg.count('stroke-dasharray') == 2 and '>step 1,500<' in svg
    page = (out / 'report.html').read_text(encoding='utf-8')
    check_page(page, ['Results', 'What to expect', 'Curves', 'Benchmarks: accuracy and its standard error', 'Best of n: what RLHF has to beat',
                      'Preference, by gold score', 'Preference, by reward model', 'Cost', 'The reward model',
                      'Answers to the same prompts', 'Settings, hardware, seed'])
    assert html.escape(hack) in page and page.count('<figure>') == 2 + 2
    expected = json.loads((ROOT / 'config' / 'curves.json').read_text(encoding='utf-8'))['tiny.py']
    assert f'<td>{expected["base"][-1]["val_loss"]:.3f}</td><td>5.600</td>' in page # beside what was got

CURVES = json.loads((ROOT / 'config' / 'curves.json').read_text(encoding='utf-8'))

@pytest.mark.parametrize('name', CURVES)
def test_expected_curves_are_those_of_their_profile(name, monkeypatch):
    """They end at the last step of the profile as it stands there, and start near the loss of a uniform guess."""
    [path] = ROOT.glob(f'config/**/{name}')
    profiles = [ROOT / 'config' / 'tiny.py', path]
    monkeypatch.setattr(sys, 'argv', ['pretrain.py', *map(str, profiles)])
    settings = configure({'__file__': str(ROOT / 'pretrain.py')}, quiet=True)
    for stage, rows in CURVES[name].items():
        steps = [row['step'] for row in rows]
        assert steps == sorted(steps) and all(math.isfinite(value) for row in rows for value in row.values())
        if stage == 'base':
            assert steps[-1] == settings['max_iters']
            val_losses = [row['val_loss'] for row in rows if 'val_loss' in row]
            assert len(val_losses) > 1 and min(val_losses) == val_losses[-1] < 0.6 * val_losses[0]

class Page(HTMLParser):
    """The titles of a page; its tags must be closed in order, and nothing in it needs another file or runs."""
    def __init__(self):
        super().__init__()
        self.open, self.titles, self.allowed = [], [], set()

    def handle_starttag(self, tag, attrs):
        assert tag not in ('script', 'link', 'img', 'iframe', 'b') and not {'src', 'href'} & set(dict(attrs)), tag
        if tag != 'meta':
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in ('rect', 'polyline', 'path', 'circle'), tag

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ['h2']:
            self.titles.append(data)

def check_page(text, titles):
    page = Page()
    page.feed(text)
    assert page.open == [] and page.titles == titles
    assert re.findall(r'https?://(?!www\.w3\.org/2000/svg)', text) == [] and 'url(' not in text
    assert text.count('</table></div><p class="source">Source: ') == len(titles) - 2 # curves and settings name theirs

def test_a_model_against_itself(trained, scripts, tmp_path):
    """An rlhf.pt with the weights of sft.pt says the same: half of the points, no KL, no width."""
    shutil.copy(trained.out / 'sft.pt', tmp_path)
    ckpt = torch.load(tmp_path / 'sft.pt', weights_only=True)
    torch.save({**ckpt, 'stage': 'rlhf'}, tmp_path / 'rlhf.pt')
    table = run_eval(scripts, trained, tmp_path)['table']
    lower, upper = table['rlhf']['win rate, 95% interval']
    assert table['rlhf']['win rate against SFT'] == 0.5 == pytest.approx((lower + upper) / 2)
    assert abs(table['rlhf']['KL from SFT, nats per answer']) < 1e-5
    assert table['rlhf']['win rate without liked phrases against SFT'] == 0.5
    same = {k: v for k, v in table['rlhf'].items() if k in table['sft'] and 'seconds' not in k}
    assert {**table['sft'], **same} == table['sft'] and len(same) == len(table['sft']) - 1
    assert not (tmp_path / 'curves.svg').exists() # without logs there is nothing to draw

def test_the_sft_model_is_found_by_its_stage(trained, scripts, tmp_path):
    """The columns may be paths. KL needs the same tokens; the win rate compares texts."""
    shutil.copy(trained.out / 'sft.pt', tmp_path / 'mine.pt')
    ckpt = torch.load(tmp_path / 'mine.pt', weights_only=True)
    torch.save({**ckpt, 'stage': 'rlhf'}, tmp_path / 'same.pt')
    torch.save({**ckpt, 'stage': 'rlhf', 'tokenizer': dict(ckpt['tokenizer'], n=1)}, tmp_path / 'other.pt')
    names = [str(tmp_path / f'{name}.pt') for name in ('same', 'mine', 'other')]
    table = run_eval(scripts, trained, tmp_path, f'--models={", ".join(names)}', '--val_tokens=0')['table']
    assert list(table) == names
    assert table[names[0]]['win rate against SFT'] == table[names[2]]['win rate against SFT'] == 0.5
    assert abs(table[names[0]]['KL from SFT, nats per answer']) < 1e-5
    assert 'KL from SFT, nats per answer' not in table[names[2]]
    assert not any('SFT' in measure for measure in table[names[1]])

def test_what_is_missing_is_left_out(trained, scripts, tmp_path):
    """A data folder with nothing but prompts without checks, and a model that was converted from elsewhere."""
    data = tmp_path / 'data'
    write_rows(data / 'prompts_val.jsonl', [dict(messages=user('Say'))])
    ckpt = torch.load(trained.out / 'base.pt', weights_only=True)
    torch.save({**ckpt, 'metrics': {}}, tmp_path / 'base.pt')
    report = run_eval(scripts, trained, tmp_path, f'--data_dir={data}')
    base = report['table']['base']
    assert base['bits per byte'] is None and 'all checks met' not in base and report['costs'] == {}
    assert base['tokens per answer'] >= 1 and report['benchmarks'] == {'base': {}}

def test_two_processes_are_one(trained, scripts, tmp_path):
    """Greedy answers, so that both runs have the same ones."""
    shutil.copy(trained.out / 'sft.pt', tmp_path)
    shutil.copy(trained.out / 'reward.pt', tmp_path)
    ckpt = torch.load(trained.out / 'base.pt', weights_only=True)
    torch.save({**ckpt, 'stage': 'rlhf'}, tmp_path / 'rlhf.pt')
    one = run_eval(scripts, trained, tmp_path, '--temperature=0')['table']['rlhf']
    shutil.rmtree(tmp_path / 'answers') # or two would read the answers of one
    scripts.two('eval.py', trained.profile, f'--data_dir={trained.data}', f'--out_dir={tmp_path}', '--temperature=0')
    two = json.loads((tmp_path / 'report.json').read_text(encoding='utf-8'))['table']['rlhf']
    assert 'KL from SFT, nats per answer' in one and list(one) == list(two)
    for measure, value in one.items():
        assert two[measure] == pytest.approx(value, abs=1e-4) or measure.startswith('seconds'), measure

def test_a_person_compares_answers(trained, scripts, tmp_path):
    """Blind and in random order; verdicts are kept, are counted by the next report, and can be learned from."""
    for name in ('base', 'sft'):
        shutil.copy(trained.out / f'{name}.pt', tmp_path)
    flags = (trained.profile, f'--data_dir={trained.data}', f'--out_dir={tmp_path}', '--val_tokens=0', '--pool_prompts=0',
             '--benchmarks=greedy', '--max_new_tokens=8')
    done = scripts.ok('eval.py', *flags, '--judge_pairs=20', stdin='maybe\na\nb\ns\n=\nA\nq\n')
    path = tmp_path / 'preferences_ab.jsonl'
    rows = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
    given = [row for row in rows if row['completions'][0] != row['completions'][1]] # equal ones are ties, not asked
    assert [row['winner'] for row in given] == [0, 1, None, 0]
    assert [row['ranking'] for row in given] == [[0, 1], [1, 0], [[0, 1]], [0, 1]]
    assert 'base' not in done.out[done.out.index('1 of 20:'):done.out.index('# Report')] # blind
    assert {tuple(row['models']) for row in rows} == {('base', 'sft'), ('sft', 'base')} # the order is shuffled
    points = sum({0: row['models'][0] == 'sft', 1: row['models'][1] == 'sft', None: 0.5}[row['winner']] for row in rows)
    with open(path, 'a', encoding='utf-8') as f: # another model's, and a line that was cut
        f.write(json.dumps(dict(rows[0], models=['sft', 'dpo'])) + '\n{"messages"')
    report = run_eval(scripts, trained, tmp_path, *flags[3:])
    share = report['preferences']['people'][1][3] # sft against base
    assert share.startswith(f'{points / len(rows):.0%} (')
    reads = definitions('reward.py', tok=trained.tok).read_example
    assert [reads(row).places.tolist() for row in given] == [[0, 1], [0, 1], [0, 0], [0, 1]]
    scripts.fails('judge_pairs', 'eval.py', *flags, '--judge_pairs=-1')

SAID = dict(role='assistant', content='owl')

@pytest.mark.parametrize('flags,pattern,prompt', [
    (['--models=rlhf'], r'rlhf.*python pretrain\.py', None),
    (['--models=nothing.pt'], r'nothing\.pt.*speedrun\.sh', None),
    (['--models=base,reward'], 'reward.*base', None),
    (['--benchmarks=right,write'], 'write.*right', None),
    (['--n_prompts=-1'], 'n_prompts', None), (['--batch_size=0'], 'batch_size', None),
    (['--temperature=1e-50'], 'temperature', None),
    ([], r'prompts_val\.jsonl:1: ', dict(messages=[*user('x'), SAID])),
    ([], r'prompts_val\.jsonl:1: ', dict(messages=user('x'), checks=dict(shout=True))),
    ([], r'prompts_val\.jsonl:1: ', dict(messages=user('x'), checks=dict(max_words='x')))], ids=str)
def test_bad_input_is_one_line_and_the_old_report_stays(flags, pattern, prompt, trained, scripts, tmp_path):
    out = tmp_path / 'out'
    out.mkdir()
    for name in ('base.pt', 'reward.pt'):
        shutil.copy(trained.out / name, out)
    (out / 'report.md').write_text('old')
    if prompt:
        write_rows(tmp_path / 'prompts_val.jsonl', [prompt])
    scripts.fails(pattern, 'eval.py', trained.profile, f'--data_dir={tmp_path if prompt else trained.data}',
                  f'--out_dir={out}', *flags)
    assert sorted(path.name for path in out.iterdir()) == ['base.pt', 'report.md', 'reward.pt']
    assert (out / 'report.md').read_text() == 'old'

def test_report_of_the_chain(chain):
    """The real stages: their logs and metrics have the names that eval.py looks for."""
    report = json.loads((chain.out / 'report.json').read_text(encoding='utf-8'))
    assert list(report['table']) == ['base', 'sft', 'rlhf']
    assert list(report['costs']) == ['base', 'sft', 'reward', 'rlhf']
    text = (chain.out / 'report.md').read_text(encoding='utf-8')
    rlhf = report['table']['rlhf']
    assert all(measure in text and measure in chain.said['eval'].out for measure in rlhf)
    assert rlhf['all checks met'] > report['table']['sft']['all checks met'] and rlhf['win rate against SFT'] > 0.5
    lower, upper = rlhf['win rate, 95% interval']
    assert lower <= rlhf['win rate against SFT'] <= upper
    assert 0 < rlhf['KL from SFT, nats per answer'] < 10
    assert rlhf['entropy, nats per token'] < report['table']['sft']['entropy, nats per token']
    assert 'reward model and gold score' in text
    assert list(report['preferences']) == ['gold score', 'reward model']
    svg = (chain.out / 'curves.svg').read_text(encoding='utf-8')
    assert len(boxes(svg)[1]) == 3 + 3 + 3 + 3 + 3 + 2 + 2 # every curve of every chart, and what to expect
