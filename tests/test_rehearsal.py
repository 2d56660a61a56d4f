"""
The large profiles, rehearsed: a server on this machine hands out miniature files in the form of every source, and all
stages run as speedrun.sh runs them, with a model of two layers.
"""
import gzip
import http.server
import json
import random
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from conftest import ROOT, definitions, load
from model import GPT, GPTConfig, ScalarModel

# -----------------------------------------------------------------------------
# miniature files. Their texts are made here; their keys are those of the real files.

NOUNS = ('river farmer winter letter garden engine window village teacher bridge market forest kitchen summer train '
         'doctor island library mountain captain morning harbour story clock valley student lantern baker road ship '
         'painter castle question answer number city morning music paper field').split()
VERBS = ('found carried watched followed painted repaired crossed visited remembered counted opened described reached '
         'measured cleaned borrowed collected answered missed believed').split()
WORDS = ('old quiet narrow early bright heavy gentle distant wooden famous empty careful golden simple northern friendly '
         'yellow curious patient broken').split()

def sentence(rng):
    a, b, c = rng.sample(NOUNS, 3)
    x, y = rng.sample(WORDS, 2)
    u, v = rng.sample(VERBS, 2)
    return rng.choice([f'The {x} {a} {u} a {b} that {v} the {y} {c}.', f'When the {a} {u} the {x} {b}, we {v} the {c}.',
                       f'With a {x} {a} they {u} the {b} and {v} every {y} {c} of the town.',
                       f'It was the {y} {c} to which a {a} {u} and {v} the {x} {b}.'])

def prose(rng, fewest, most):
    return ' '.join(sentence(rng) for _ in range(rng.randint(fewest, most)))

def page(rng, i):
    paragraphs = [prose(rng, 3, 6) for _ in range(rng.randint(2, 5))]
    return dict(text='\n'.join(paragraphs), timestamp='2019-04-25T12:57:54Z', url=f'http://pages.example/{i}')

def dolly(rng, i):
    return dict(instruction=f'What is number {i}? {sentence(rng)}', context=prose(rng, 0, 2), response=prose(rng, 1, 3),
                category='open_qa')

def message(rng, role, *replies, rank=None):
    return dict(message_id=f'{rng.random()}', text=prose(rng, 1, 2), role=role, lang='en', rank=rank, review_count=3,
                deleted=False, emojis={'+1': 1}, replies=[*replies])

def oasst(rng, i):
    more = message(rng, 'prompter', message(rng, 'assistant', rank=0))
    answers = message(rng, 'assistant', more, rank=0), message(rng, 'assistant', rank=1)
    return dict(message_tree_id=f'{i}', tree_state='ready_for_export', prompt=message(rng, 'prompter', *answers))

def gsm8k(rng, i):
    a, b, thing = rng.randint(1, 50), rng.randint(1, 50), rng.choice(NOUNS)
    return dict(question=f'Problem {i}: {sentence(rng)} There are {a} of one {thing} and {b} of another. How many?',
                answer=f'There are {a} + {b} = <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}')

def hellaswag(rng, i):
    return dict(ind=i, activity_label=rng.choice(NOUNS).title(), ctx_a=sentence(rng), ctx_b='', ctx=f'{i} {sentence(rng)}',
                split='train', split_type='indomain', label=rng.randrange(4), source_id=f'activitynet~{i}',
                endings=[sentence(rng) for _ in range(4)])

def commonsense_qa(rng, i):
    choices = [dict(label=letter, text=text) for letter, text in zip('ABCDE', rng.sample(NOUNS, 5))]
    return dict(answerKey=rng.choice('ABCDE'), id=f'{i}', question=dict(
        question_concept='town', choices=choices, stem=f'{i}: {sentence(rng)} What is meant?'))

def hh(rng, i):
    before = f'\n\nHuman: {i} {prose(rng, 1, 2)}\n\nAssistant: '
    return dict(chosen=before + prose(rng, 1, 3), rejected=before + prose(rng, 1, 2))

def ultrafeedback(rng, i):
    def completion():
        qualities = ('instruction_following', 'honesty', 'truthfulness', 'helpfulness')
        ratings = {name: dict(Rating=str(rng.randint(1, 5)), Rationale=sentence(rng)) for name in qualities}
        return {'model': 'm', 'principle': 'honesty', 'custom_system_prompt': sentence(rng), 'critique': sentence(rng),
                'response': prose(rng, 1, 3), 'annotations': ratings, 'overall_score': 7.0, 'fine-grained_score': 3.5}
    return dict(source='evol_instruct', instruction=f'{i} {sentence(rng)}', models=['m'] * 4,
                completions=[completion() for _ in range(4)], correct_answers=['None'], incorrect_answers=['None'])

def choices(rng, i):
    return dict(query=f'{i} {sentence(rng)}', choices=rng.sample(NOUNS, 4), gold=rng.randrange(4), category='history')

def continuation(rng, i):
    return dict(context=f'{i} {sentence(rng)} It was the', continuation=rng.choice(NOUNS))

def schema(rng, i):
    return dict(context_options=[f'{i} {sentence(rng)} {word}' for word in rng.sample(NOUNS, 2)],
                continuation='was there', gold=rng.randrange(2))

def humaneval(rng, i):
    return dict(task_id=f'HumanEval/{i}', prompt=f'def add_{i}(a, b):\n    """{sentence(rng)}"""\n', entry_point=f'add_{i}',
                canonical_solution='    return a + b\n', test='def check(f):\n    assert f(1, 2) == 3\n')

# part of a URL -> the form of its rows; the first that fits. What is left are questions with choices.
FORMS = {
    '/c4/': page, 'dolly': dolly, 'oasst2': oasst, 'grade-school-math': gsm8k, 'hellaswag_train': hellaswag,
    'commensenseqa': commonsense_qa, 'hh-rlhf': hh, 'UltraFeedback': ultrafeedback, 'HumanEval': humaneval,
    'winograd_wsc': schema, 'winogrande': schema, 'bigbench_language': choices, 'bigbench': continuation,
    'lambada': continuation, 'jeopardy': continuation, 'squad': continuation, 'coqa': continuation}

def write_mirror(folder, profile, n_files, n_rows):
    """A file for every URL of a profile's sources, as https://HOST/PATH -> folder/HOST/PATH."""
    data = definitions('prepare_data.py')
    source = settings_of('prepare_data.py', f'config/{profile}.py')['source']
    for url in [url for name in source.split(',') for url in data.urls_of(name, n_files)]:
        rng = random.Random(url)
        form = next((form for part, form in FORMS.items() if part in url), choices)
        lines = ''.join(json.dumps(form(rng, i)) + '\n' for i in range(n_rows)).encode()
        path = folder / url.removeprefix('https://')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(lines) if url.endswith('.gz') else lines)

def settings_of(*words):
    """The settings of a script, as python configurator.py SCRIPT PROFILE .. prints them."""
    done = subprocess.run([sys.executable, 'configurator.py', *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)

class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the files below server.folder, also a range of bytes."""
    def do_GET(self):
        path = self.server.folder / self.path.lstrip('/')
        if not path.is_file():
            return self.send_error(404)
        content = path.read_bytes()
        first, last = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers['Range']).groups()
        part = content[int(first):int(last) + 1 if last else None]
        self.server.asked.append((self.path, len(part)))
        self.send_response(206)
        self.send_header('Content-Range', f'bytes {first}-{int(first) + len(part) - 1}/{len(content)}')
        self.send_header('Content-Length', str(len(part)))
        self.end_headers()
        try:
            self.wfile.write(part)
        except ConnectionError:
            pass # prepare_data.py only looked whether the file is there

    def log_message(self, *_):
        pass

def serve(folder):
    """A server of the files in a folder, in a thread. -> the server; its url"""
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.folder, server.asked = folder, []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server, f'http://127.0.0.1:{server.server_port}'
