"""Drive a headless Chromium over the pipe of its DevTools protocol: real key presses, real mouse, no packages."""
import base64
import json
import os
import shutil
import subprocess
import tempfile
import time

NAMES = ['chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome']
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
CODES = dict(Enter=13, Escape=27, ArrowLeft=37, ArrowRight=39, Tab=9)

class Browser:
    def __init__(self, width=1280, height=800):
        self.home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_browser, self.to = os.pipe()
        self.back, from_browser = os.pipe()

        def place_pipes():
            # Chromium reads commands from 3 and answers on 4. High numbers first: 3 or 4 may be in use
            high = [os.dup(fd) + 0 for fd in (to_browser, from_browser)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)
        flags = ['--headless', '--no-sandbox', '--disable-gpu', '--remote-debugging-pipe', '--disable-dev-shm-usage',
                 '--no-first-run', f'--user-data-dir={self.home.name}', 'about:blank']
        self.process = subprocess.Popen([CHROMIUM, *flags], preexec_fn=place_pipes, close_fds=False,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self.n = 0
        self.rest = b''
        self.errors = [] # what the page's console says of errors
        self.session = None
        target = self.do('Target.createTarget', url='about:blank')['targetId']
        self.session = self.do('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log'):
            self.do(f'{domain}.enable')
        self.resize(width, height)

    def close(self):
        self.session = None
        self.do('Browser.close')
        self.process.wait(10)
        self.home.cleanup()

    def read(self):
        while b'\0' not in self.rest:
            piece = os.read(self.back, 1 << 20)
            assert piece, 'the browser has ended'
            self.rest += piece
        line, self.rest = self.rest.split(b'\0', 1)
        return json.loads(line)

    def do(self, method, **params):
        """One command of the protocol -> its result."""
        self.n += 1
        command = dict(id=self.n, method=method, params=params)
        if self.session:
            command['sessionId'] = self.session
        os.write(self.to, json.dumps(command).encode() + b'\0')
        while True:
            message = self.read()
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
            time.sleep(0.03)
        raise AssertionError(f'{code} stayed false; status line: {self.js("document.getElementById(`status`).textContent")}')

    def open(self, url):
        self.do('Page.navigate', url=url)
        self.until('document.readyState === "complete"')

    def resize(self, width, height, dark=False):
        self.do('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = 'dark' if dark else 'light'
        self.do('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=scheme)])

    def key(self, *keys):
        for key in keys:
            code = CODES.get(key, 0)
            press = dict(key=key, windowsVirtualKeyCode=code)
            text = '\r' if key == 'Enter' else key
            if len(text) == 1:
                press['text'] = text
            self.do('Input.dispatchKeyEvent', type='keyDown', **press)
            self.do('Input.dispatchKeyEvent', type='keyUp', key=key, windowsVirtualKeyCode=code)

    def write(self, text):
        self.do('Input.insertText', text=text)

    def middle(self, selector, part=0.5):
        """Where an element is -> x, y; part of its height from the top."""
        return self.js(f'''(() => {{
            const element = document.querySelector({json.dumps(selector)})
            element.scrollIntoView({{block: 'center'}})
            const box = element.getBoundingClientRect()
            return [box.left + Math.min(40, box.width / 2), box.top + {part} * box.height]
        }})()''')

    def mouse(self, kind, x, y, **more):
        self.do('Input.dispatchMouseEvent', type=kind, x=x, y=y, **more)

    def click(self, selector):
        x, y = self.middle(selector)
        self.mouse('mouseMoved', x, y)
        self.mouse('mousePressed', x, y, button='left', buttons=1, clickCount=1)
        self.mouse('mouseReleased', x, y, button='left', clickCount=1)

    def drag(self, selector, target, part):
        """Drag one element onto a part of another: 0 is its upper edge, 1 the lower one."""
        x, y = self.middle(selector)
        to_x, to_y = self.middle(target, part)
        self.mouse('mouseMoved', x, y)
        self.mouse('mousePressed', x, y, button='left', buttons=1, clickCount=1)
        for share in (0.3, 0.7, 1.0):
            self.mouse('mouseMoved', x + share * (to_x - x), y + share * (to_y - y), button='left', buttons=1)
        self.mouse('mouseReleased', to_x, to_y, button='left', clickCount=1)

    def photo(self, path, whole=True):
        r = self.do('Page.captureScreenshot', format='png', captureBeyondViewport=whole)
        with open(path, 'wb') as f:
            f.write(base64.b64decode(r['data']))
