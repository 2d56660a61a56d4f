"""
chat.html in a real browser: Chromium without a window, driven over the pipe of its DevTools protocol with real keys
and a real mouse, against a real chat.py with tiny random models. Skipped where no Chromium is installed.
"""
import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict

import pytest
import torch

from conftest import ROOT, SHORT, make_data, make_spec, user
from model import GPT, GPTConfig, ScalarModel, Tokenizer, save_checkpoint

NAMES = ['chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome']
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
if not CHROMIUM or os.name == 'nt':
    pytest.skip('no Chromium is installed: chat.html was not tried', allow_module_level=True)

# -----------------------------------------------------------------------------
# the browser

KEY_CODES = dict(Enter=13, Escape=27, ArrowLeft=37, ArrowRight=39)

class Browser:
    def __init__(self):
        self.home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_read, self.to = os.pipe()
        self.back, to_write = os.pipe()

        def place_pipes():
            """Chromium reads commands from 3 and answers on 4. Copies first: the pipes may be 3 or 4 themselves."""
            copies = [os.dup(to_read), os.dup(to_write)]
            os.dup2(copies[0], 3)
            os.dup2(copies[1], 4)
        flags = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--remote-debugging-pipe',
                 '--no-first-run', f'--user-data-dir={self.home.name}']
        self.process = subprocess.Popen([CHROMIUM, *flags], preexec_fn=place_pipes, close_fds=False,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_read)
        os.close(to_write)
        self.n = 0
        self.rest = b''
        self.errors = [] # what the page could not do, in the words of its console
        self.session = None
        target = self.do('Target.createTarget', url='about:blank')['targetId']
        self.session = self.do('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log'):
            self.do(f'{domain}.enable')
        self.resize(1280, 800)

    def close(self):
        self.session = None
        self.do('Browser.close')
        self.process.wait(20)
        os.close(self.to)
        os.close(self.back)
        self.home.cleanup()

    def do(self, method, **params):
        """One command of the protocol -> its result. Messages end with a zero byte."""
        self.n += 1
        command = dict(id=self.n, method=method, params=params)
        if self.session:
            command['sessionId'] = self.session
        os.write(self.to, json.dumps(command).encode() + b'\0')
        while True:
            while b'\0' not in self.rest:
                assert select.select([self.back], [], [], 60)[0], f'Chromium does not answer to {method}'
                piece = os.read(self.back, 1 << 20)
                assert piece, 'Chromium has ended'
                self.rest += piece
            line, self.rest = self.rest.split(b'\0', 1)
            message = json.loads(line)
            if message.get('method') == 'Runtime.exceptionThrown':
                self.errors.append(json.dumps(message['params']['exceptionDetails'])[:1000])
            if message.get('method') == 'Log.entryAdded' and message['params']['entry']['level'] == 'error':
                self.errors.append(message['params']['entry']['text'])
            if message.get('id') == self.n:
                assert 'error' not in message, (method, message)
                return message['result']

    def js(self, code):
        """The value of an expression in the page; a promise is waited for."""
        r = self.do('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in r, (code, r['exceptionDetails'])
        return r['result'].get('value')

    def until(self, code, seconds=20):
        """Wait until an expression in the page is true -> its value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = self.js(code)
            if value:
                return value
            time.sleep(0.02)
        raise AssertionError(f'{code} stayed {value!r}; the page says: {self.js("document.body.innerText")[:2000]}')

    def open(self, url):
        self.do('Page.navigate', url=url)
        self.until('document.readyState === "complete" && info.models.length > 0')

    def resize(self, width, height, scheme='light'):
        self.do('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.do('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=scheme)])

    def key(self, *keys):
        for key in keys:
            press = dict(key=key, windowsVirtualKeyCode=KEY_CODES.get(key, 0))
            text = dict(Enter='\r').get(key, key)
            if len(text) == 1:
                press['text'] = text
            self.do('Input.dispatchKeyEvent', type='keyDown', **press)
            self.do('Input.dispatchKeyEvent', type='keyUp', **press)

    def write(self, text):
        self.do('Input.insertText', text=text)

    def place(self, selector, part=0.5):
        """Where an element is in the window -> x, y; part: of its height, from the top. A token may be on two lines."""
        return self.js(f'''(() => {{
            const box = [...document.querySelector({json.dumps(selector)}).getClientRects()].at(-1)
            return [box.left + Math.min(40, box.width / 2), box.top + {part} * box.height]
        }})()''')

    def mouse(self, kind, x, y, **more):
        self.do('Input.dispatchMouseEvent', type=kind, x=x, y=y, **more)

    def point(self, selector):
        self.js(f'document.querySelector({json.dumps(selector)}).scrollIntoView({{block: "center"}})')
        self.mouse('mouseMoved', *self.place(selector))

    def click(self, selector):
        self.point(selector)
        self.drag(selector, selector, 0.5)

    def drag(self, selector, target, part):
        """Press the mouse on an element and let it go on a part of another: 0 is its upper edge, 1 the lower one."""
        x, y = self.place(selector)
        to_x, to_y = self.place(target, part)
        self.mouse('mouseMoved', x, y)
        self.mouse('mousePressed', x, y, button='left', buttons=1, clickCount=1)
        for share in (0.5, 1):
            self.mouse('mouseMoved', x + share * (to_x - x), y + share * (to_y - y), button='left', buttons=1)
        self.mouse('mouseReleased', to_x, to_y, button='left', clickCount=1)

    def photo(self, path):
        """A picture of the window, to look at."""
        picture = self.do('Page.captureScreenshot', format='png')['data']
        with open(path, 'wb') as f:
            f.write(base64.b64decode(picture))

# -----------------------------------------------------------------------------
# the server

def save_models(out):
    """base, sft, rlhf and reward: random, and each another one."""
    tok = Tokenizer(make_spec())
    out.mkdir(parents=True)
    for seed, stage in enumerate(('base', 'sft', 'rlhf', 'reward')):
        torch.manual_seed(seed)
        config = GPTConfig(arch='llama', vocab_size=tok.n_vocab, block_size=128, n_layer=2, n_head=4, n_embd=32)
        model = ScalarModel(config) if stage == 'reward' else GPT(config)
        save_checkpoint(str(out / f'{stage}.pt'), stage, model.state_dict(), asdict(config), tok, {}, 1, {})

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('page')
    make_data(folder / 'data')
    save_models(folder / 'out')
    (folder / 'short.py').write_text(SHORT, encoding='utf-8')
    return folder

@pytest.fixture(scope='module')
def address(folder):
    command = [sys.executable, 'chat.py', folder / 'short.py', '--web=true', '--port=0', '--max_new_tokens=16',
               f'--out_dir={folder / "out"}', f'--data_dir={folder / "data"}']
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, encoding='utf-8')
    for line in process.stderr:
        if line.startswith('open '):
            break
    yield line.split()[1]
    process.kill()
    process.wait()
    process.stderr.close()

@pytest.fixture(scope='module')
def browser():
    browser = Browser()
    yield browser
    browser.close()

@pytest.fixture
def page(browser, address):
    """The page as on the first visit. At the end of a test, nothing may have gone wrong in it."""
    browser.open(address)
    browser.js('localStorage.clear(), messages = []')
    browser.open(address)
    browser.js('document.activeElement.blur()')
    browser.errors.clear()
    yield browser
    assert browser.errors == []

def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]

# a stream of chat.py, made by the page itself: what no tiny model would say
FAKE = '''
window.real ??= window.fetch
window.fetch = async (path, options) => {
    if (!path.startsWith('/v1/')) return window.real(path, options)
    const pieces = PIECES
    const stream = new ReadableStream({
        async start(sink) {
            options.signal.addEventListener('abort', () => sink.error(new DOMException('', 'AbortError')))
            for (const content of pieces) {
                const event = JSON.stringify({choices: [{delta: {content}}]})
                sink.enqueue(new TextEncoder().encode(`data: ${event}\\n\\n`))
            }
            if (ENDS) sink.enqueue(new TextEncoder().encode('data: [DONE]\\n\\n'))
            if (ENDS) sink.close()
        }
    })
    return new Response(stream)
}
'''

def say(page, text):
    page.key('/')
    page.write(text)
    page.key('Enter')

def say_fake(page, pieces, ends=True):
    page.js(FAKE.replace('PIECES', json.dumps(pieces)).replace('ENDS', json.dumps(ends)))
    say(page, 'Say')

ANSWERED = 'talking === null && messages.at(-1)?.role === "assistant"'

# -----------------------------------------------------------------------------
# the tests

def test_chat(page, address):
    """An answer is streamed, shown, told its speed, and survives a reload; retry and edit replace."""
    page.open(address)
    page.until('document.activeElement === $("write")') # ready to write, without a key or a click
    page.write('Say a word.')
    page.key('Enter')
    page.until(ANSWERED)
    first = page.js('messages[1].content')
    shown = page.js('document.querySelector(".message.assistant .text").textContent')
    assert shown == page.js('visible(messages[1].content)') and first
    assert 'tokens/s' in page.js('document.querySelector(".message.assistant").innerText')

    page.open(address) # a reload
    assert page.js('messages.map(({content}) => content)') == ['Say a word.', first]
    page.key('Escape', 'y') # retry; the seed is free, so 16 random tokens are others
    page.until(f'{ANSWERED} && messages[1].content !== {json.dumps(first)}')
    page.key('Escape', 'e')
    page.js('$("write").value = ""')
    page.write('Say it.')
    page.key('Enter')
    page.until(f'{ANSWERED} && messages[0].content === "Say it."')
    assert page.js('messages.length') == 2
    page.key('Escape', 'n')
    assert page.js('document.querySelectorAll(".message").length') == 0

def test_same_seed_same_answer(page):
    page.key('s')
    page.write('7')
    page.key('Escape')
    answers = []
    for _ in range(2):
        say(page, 'Say')
        page.until(ANSWERED)
        answers.append(page.js('messages[1].content'))
        page.key('Escape', 'n')
    assert answers[0] == answers[1]
    page.js('$("model").value = "base", $("model").dispatchEvent(new Event("change"))')
    assert 'has not learned to answer' in page.js('$("chat").innerText')
    say(page, 'Anna has the')
    page.until(ANSWERED)

def test_stop(page):
    """A stream that never ends: Esc stops it, and what came stays."""
    say_fake(page, ['So\x07 ', 'far'], ends=False)
    page.until('document.querySelector(".message.assistant .text")?.textContent === "So\\\\u0007 far"')
    page.key('Escape')
    page.until(ANSWERED)
    assert page.js('messages[1].content') == 'So\x07 far' and 'stopped' in page.js('messages[1].note')

def test_reload_in_the_middle_of_an_answer(page, address):
    say_fake(page, ['So ', 'far'], ends=False)
    page.until('messages[1]?.content === "So far"')
    page.open(address)
    assert page.js('messages.map(({content}) => content)') == ['Say', 'So far']

def test_a_stream_that_breaks_off(page):
    page.js('window.real ??= window.fetch, window.fetch = async () => new Response("data: {\\"choices\\": []}\\n\\n")')
    say(page, 'Say')
    page.until('$("status").textContent.includes("broken off") && talking === null')
    assert page.js('messages.length') == 1 # nothing came: the question waits for another try

def test_what_a_model_writes_is_text(page):
    """HTML, markdown, links, ANSI codes and turned letters stay what they are: text."""
    evil = '<script>hacked = 1</script><img src=x onerror="hacked = 2"><b>**bold**</b> [x](javascript:hacked=3)'
    say_fake(page, [evil[:20], evil[20:], ' \x1b[31mred\x07 \u202egnp'])
    page.until(ANSWERED)
    shown = page.js('document.querySelector(".message.assistant .text").textContent')
    assert shown == evil + ' \\u001b[31mred\\u0007 \\u202egnp'
    assert page.js('typeof hacked') == 'undefined'
    assert page.js('document.querySelectorAll("#messages :is(script, img, b, a)").length') == 0
    assert page.js('messages[1].content') == evil + ' \x1b[31mred\x07 \u202egnp' # the model gets its own words back

def test_100_000_characters(page):
    """One word of them, in 1000 pieces: all shown, within the width, and the page still answers."""
    say_fake(page, ['longword' * 12 + 'word'] * 1000)
    page.until(ANSWERED)
    assert page.js('document.querySelector(".message.assistant .text").textContent.length') == 100_000
    assert page.js('document.documentElement.scrollWidth <= innerWidth')
    page.key('Escape', 'r')
    assert page.js('!$("rank").hidden')

def get_answers(page, n=4):
    page.key('r', 'g')
    page.until(f'!$("ranking").hidden && $("cards").children.length === {n}')
    return page.js('current.answers.map(({text}) => text)')

def test_rank_with_keys(page, folder):
    path = folder / 'out' / 'human' / 'preferences_train.jsonl'
    texts = get_answers(page)
    page.key('3', '1', '=', '2', 'Enter') # 4 is left: it is the last
    page.until('$("progress").value === 1')
    row = read_rows(path)[-1]
    assert row['completions'] == texts and row['ranking'] == [2, [0, 1], 3]
    assert 'agrees with you on' in page.js('$("count").textContent')

    page.until('!$("ranking").hidden')
    page.key('u', 'u') # takes back the saved one, and shows it again
    page.until('$("progress").value === 0 && $("status").textContent.includes("taken back")')
    assert page.js('current.answers.map(({text}) => text)') == texts and read_rows(path) == []
    page.key('4', '4', '2') # 4 pressed twice is not ranked; the rest is tied
    assert page.js('groups') == [[1]]
    page.key('s') # skipped: nothing is saved
    page.until(f'current.answers[0].text !== {json.dumps(texts[0])} && !$("ranking").hidden')
    assert read_rows(path) == []

def test_rank_with_the_mouse(page, folder):
    """Dragged above, below, and onto another; clicked; and no name of a model is to be seen before."""
    get_answers(page)
    assert 'sft' not in page.js('$("ranking").innerText')
    card = '.card[data-answer="{}"]'.format
    page.drag(card(2), card(0), 0.1)
    assert page.js('groups') == [[2], [0], [1], [3]]
    page.drag(card(0), card(3), 0.9)
    assert page.js('groups') == [[2], [1], [3], [0]]
    page.drag(card(3), card(2), 0.5)
    assert page.js('groups') == [[2, 3], [1], [0]]
    page.click(f'{card(1)} .number') # a click takes it out, and another one appends it
    page.click(f'{card(1)} .number')
    assert page.js('groups') == [[2, 3], [0], [1]]
    page.click('#save')
    page.until('$("progress").value === 1')
    assert read_rows(folder / 'out' / 'human' / 'preferences_train.jsonl')[-1]['ranking'] == [[2, 3], 0, 1]

def test_rank_with_a_finger(page):
    """A finger on the number drags the answer, a finger on its text does not."""
    get_answers(page)
    for part, groups in (('.text', []), ('.number', [[1], [2], [0], [3]])):
        x, y = page.place(f'.card[data-answer="0"] {part}')
        to_y = page.place('.card[data-answer="2"]', 0.9)[1]
        page.do('Input.dispatchTouchEvent', type='touchStart', touchPoints=[dict(x=x, y=y)])
        for share in (0.5, 1):
            page.do('Input.dispatchTouchEvent', type='touchMove', touchPoints=[dict(x=x, y=y + share * (to_y - y))])
        page.do('Input.dispatchTouchEvent', type='touchEnd', touchPoints=[])
        assert page.js('groups') == groups

def test_blind_comparison(page, folder):
    page.key('r', 'b', 'B') # A is sft, B is rlhf
    texts = get_answers(page, 2)
    models = page.js('current.answers.map(({model}) => model)')
    page.key('2', 'Enter')
    page.until('$("count").textContent.startsWith("1 blind")')
    row = read_rows(folder / 'out' / 'preferences_ab.jsonl')[-1]
    assert row['winner'] == 1 and row['models'] == models and row['completions'] == texts
    assert sorted(models) == ['rlhf', 'sft'] and page.js('$("reveal").textContent') == ''
    page.until('!$("ranking").hidden')
    page.key('0', 'Enter')
    page.until('$("count").textContent.startsWith("2 blind")')
    assert read_rows(folder / 'out' / 'preferences_ab.jsonl')[-1]['winner'] is None

def test_train_on_it(page, folder):
    """Rankings, a press of a key, a log, curves, and the same question to the model before and after."""
    row = dict(messages=user('Say'), completions=['owl', 'cat', 'dog'], ranking=[0, 1, 2])
    for _ in range(6):
        page.js(f'ask("/api/rank", {json.dumps(row)})')
    page.js(f'remember("ranked", {json.dumps([user("Say"), user("Say it.")])})')
    page.key('t')
    page.until('!$("train_dpo").disabled')
    page.key('2')
    page.until('$("commands").textContent.includes("reward.py")')
    assert '--objective=dpo' in page.js('$("commands").textContent')
    page.until('$("status").textContent === "The training is over."', 120)
    page.until('$("compared").rows.length === 3')
    cells = page.js('[...$("compared").rows].map(row => [...row.cells].map(cell => cell.textContent))')
    assert cells[0] == ['Question', 'Before: sft', 'After: human/dpo'] and cells[2][0] == 'Say it.'
    assert 'saved' in page.js('$("log").textContent')
    assert page.js('document.querySelectorAll("#train_charts svg path").length') > 0
    assert (folder / 'out' / 'human' / 'dpo.pt').exists()

def test_inside(page):
    page.key('i')
    page.js('$("inside_text").value = "Who has the owl?\\n---\\nAnna has the owl."')
    page.key('g')
    page.until('!$("insights").hidden && $("guesses").children.length === 3')
    panels = page.js('[...$("panels").children].map(panel => [...panel.querySelectorAll(".token")].length)')
    assert len(panels) == 6 and len(set(panels)) == 1 # base, sft, rlhf, reward, KL, attention
    text = page.js('[...document.querySelector(".panel").querySelectorAll(".token")].map(t => t.textContent).join("")')
    assert text == '<|endoftext|><|user|> Who has the owl?<|end|><|assistant|> Anna has the owl.<|end|>'
    # the colour is the surprise, the panel of the chosen token tells it in figures
    colours = page.js('[...document.querySelector(".panel").querySelectorAll(".token")].map(t => t.style.background)')
    assert colours[0] == '' and all(colour.startswith('rgb') for colour in colours[1:])
    page.key('ArrowRight', 'ArrowRight', 'ArrowLeft')
    assert page.js('chosen') == 2
    surprise = page.js('found.models.sft.surprise[2]')
    assert f'surprise {surprise:.2f} nats' in page.js('$("guesses").children[1].textContent')
    owl = page.js('found.tokens.indexOf(" owl")')
    page.point(f'#panels .panel:nth-child(2) [data-token="{owl}"]')
    page.until(f'chosen === {owl}')
    assert page.js('$("merges").textContent').endswith('␣ o w l  →  ␣ ow l  →  ␣ owl  →  ␣owl')
    assert 'looks most at' in page.js('$("map_says").textContent')
    before = page.js('$("map").toDataURL()')
    page.js('$("head").value = "1", $("head").dispatchEvent(new Event("change"))')
    page.until(f'$("map").toDataURL() !== {json.dumps(before)}') # another head, another map

def test_curves(page, folder):
    """A new line of a log moves the curve; the values of a chart are those of the log."""
    rows = [dict(step=0, val_score=0.1, val_kl=0.0), dict(step=0, score=0.1, kl=0.0, entropy=0.62),
            dict(step=5, score=0.5, kl=1.25, entropy=0.5)]
    log = folder / 'out' / 'rlhf.jsonl'
    log.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    page.key('v')
    titles = page.until('[...document.querySelectorAll("#charts h3")].map(title => title.textContent)')
    assert {'rlhf: reward', 'rlhf: KL', 'rlhf: entropy'} <= set(titles)
    kl = titles.index('rlhf: KL')
    caption = f'$("charts").children[{kl}].querySelector("figcaption").textContent'
    assert 'step 5' in page.js(caption) and 'kl 1.25' in page.js(caption)
    with open(log, 'a', encoding='utf-8') as f:
        f.write(json.dumps(dict(step=10, score=0.6, kl=2.5, entropy=0.4)) + '\n')
    page.until(f'{caption}.includes("kl 2.50")')

def test_a_long_log_and_the_expected_curve(page):
    """A log of 200,000 steps is thinned out, its last value stays; the expected curve is drawn behind."""
    page.js('''drawCharts("charts",
        {base: [...Array(200000).keys()].map(step => ({step, loss: 1 / (1 + step), val_loss: NaN}))},
        {base: [{step: 0, loss: 1}, {step: 100, loss: 0.5}]})''')
    paths = page.js('[...document.querySelectorAll("#charts path")].map(p => [p.getAttribute("class"), '
                    'p.getAttribute("d").split("L").length])')
    assert paths == [['expected', 2], ['expected', 1], [None, 1000]]
    assert 'step 199999' in page.js('$("charts").textContent')

def test_narrow_and_dark(page):
    """400 pixels are enough for each tab, and a dark screen gets dark paper and light letters."""
    seen = {}
    for width, scheme in ((1280, 'light'), (1280, 'dark'), (400, 'light')):
        page.resize(width, 800, scheme)
        for tab in ('r', 't', 'i', 'v', 'c'):
            page.js('document.activeElement.blur()')
            page.key(tab)
            assert page.js('document.documentElement.scrollWidth <= innerWidth'), (width, tab)
            seen[scheme] = page.js('[getComputedStyle(document.body).backgroundColor, '
                                   'getComputedStyle(document.body).color]')
    page.resize(1280, 800)
    assert seen['light'] == ['rgb(255, 255, 255)', 'rgb(22, 25, 29)']
    assert seen['dark'] == ['rgb(20, 23, 26)', 'rgb(238, 241, 244)']

def test_every_key_is_shown(page):
    """Each control that has a key shows it beside itself, and no key is used twice in a tab."""
    hidden = page.js('''[...document.querySelectorAll("[data-key]")].filter(control =>
        ![control, control.parentElement].some(box => box.querySelector("kbd"))).map(control => control.id)''')
    assert hidden == []
    for tab in ('chat', 'rank', 'train', 'inside', 'curves'):
        keys = page.js(f'[...document.querySelectorAll("nav [data-key], #{tab} [data-key]")].map(c => c.dataset.key)')
        assert len(keys) == len(set(keys)), tab
