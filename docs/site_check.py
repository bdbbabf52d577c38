"""Look at every page of `_docs/` in a headless Chromium: `make site-check SHOTS=FOLDER`.

Checks that nothing is wrong in the console and nothing is asked of another host, that every picture is shown and has a text, that no page
scrolls sideways at 1100 and 400 pixels, that the switch of the theme works and that the search finds `match_layers`. Then it saves
a picture of every page, light and dark, in the folder, which must lie outside of the repository. `CHROMIUM` names another browser."""
import base64, json, os, re, shutil, subprocess, sys, tempfile, threading, urllib.request
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from websocket import create_connection

root = Path(__file__).resolve().parent.parent
site = root/'_docs'


class QuietHandler(SimpleHTTPRequestHandler):
    "Serves files, and does not write of each of them."
    def log_message(self, *args): pass


class Browser:
    "A headless Chromium with one tab, driven by the DevTools protocol."
    def __init__(self, profile):
        program = next(filter(None, map(shutil.which, [os.environ.get('CHROMIUM', 'chromium'), 'chromium-browser', 'google-chrome'])), None)
        if program is None: sys.exit('No Chromium was found: install one, or name it in CHROMIUM.')
        # no other host can be reached, so whatever a page asks of one is an error in its console
        flags = ['--headless=new', '--no-sandbox', '--remote-debugging-port=0', '--remote-allow-origins=*', '--hide-scrollbars',
                 f'--user-data-dir={profile}', '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1']
        self.process = subprocess.Popen([program, *flags, 'about:blank'], stderr=subprocess.PIPE, text=True)
        port = next(m[1] for line in self.process.stderr if (m := re.search(r'127\.0\.0\.1:(\d+)/', line)))
        # read what it goes on to write, or the pipe would fill up
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        tabs = json.load(urllib.request.urlopen(f'http://127.0.0.1:{port}/json'))
        self.socket = create_connection(next(t['webSocketDebuggerUrl'] for t in tabs if t['type'] == 'page'), timeout=60)
        self.calls,self.events = 0,[]
        for domain in ('Page','Runtime','Log','Network'): self.call(f'{domain}.enable')
        # or a picture would catch the theme in the middle of a movement
        self.call('Emulation.setEmulatedMedia', features=[dict(name='prefers-reduced-motion', value='reduce')])

    def call(self, method, **params):
        "Call a method of the protocol; returns its result. Events that come meanwhile wait in `events`."
        self.calls += 1
        self.socket.send(json.dumps(dict(id=self.calls, method=method, params=params)))
        while (message := json.loads(self.socket.recv())).get('id') != self.calls: self.events.append(message)
        if 'error' in message: raise RuntimeError(f"{method}: {message['error']['message']}")
        return message['result']

    def wait_for(self, event):
        while not any(e['method'] == event for e in self.events): self.events.append(json.loads(self.socket.recv()))

    def open(self, url):
        self.events.clear()
        self.call('Page.navigate', url=url)
        self.wait_for('Page.loadEventFired')

    def run(self, script):
        "The value of a JavaScript expression, awaited if it is a promise."
        result = self.call('Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in result: raise RuntimeError(f"{script}: {result['exceptionDetails']}")
        return result['result'].get('value')

    def size(self, width, height=900):
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)

    def errors(self) -> list:
        "What the console complains of since the page was opened."
        found = []
        for e in self.events:
            p = e['params']
            match e['method']:
                case 'Runtime.exceptionThrown': found.append(p['exceptionDetails'].get('exception', {}).get('description', 'an exception'))
                case 'Log.entryAdded' if p['entry']['level'] == 'error': found.append(f"{p['entry']['text']} {p['entry'].get('url', '')}")
                case 'Runtime.consoleAPICalled' if p['type'] in ('error','assert'): found.append(str(p['args']))
        return found

    def screenshot(self, path):
        "The whole page."
        size = self.call('Page.getLayoutMetrics')['cssContentSize']
        clip = dict(x=0, y=0, width=size['width'], height=min(size['height'], 16000), scale=1)
        data = self.call('Page.captureScreenshot', captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(data['data']))

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait()


# pictures in the text that show nothing or say nothing
bad_pictures = """Promise.all([...document.querySelectorAll('.bd-article img')].map(async img => {
    img.loading = 'eager'; try { await img.decode() } catch { return `${img.src} cannot be shown` }
    if (!img.alt.trim() || img.alt.endsWith('.png')) return `${img.src} has no text`
    if (img.getBoundingClientRect().width < 10) return `${img.src} is not visible` })).then(found => found.filter(o => o))"""

# what reaches over the right edge of the page or of its text, without what is in a box of its own that scrolls
too_wide = """(() => { const edge = document.documentElement.clientWidth, article = document.querySelector('.bd-article-container')
    if (document.documentElement.scrollWidth <= edge && article.scrollWidth <= article.clientWidth) return []
    const right = Math.min(edge, article.getBoundingClientRect().right) + 1
    const scrolls = e => e != article && e != document.body && (getComputedStyle(e).overflowX != 'visible' || scrolls(e.parentElement))
    const wide = [...document.querySelectorAll('.bd-article *')].filter(e => e.getBoundingClientRect().right > right && !scrolls(e.parentElement))
    return [`${document.documentElement.scrollWidth} px`, ...wide.slice(-3).map(e => e.outerHTML.slice(0, 120))] })()"""

# Markdown that was not understood; what code prints is no Markdown
leftovers = """[...document.querySelectorAll('.bd-article :is(p, li, td)')].filter(e => !e.closest('.cell_output')).map(e => {
    const text = [...e.childNodes].filter(n => n.nodeType == Node.TEXT_NODE).map(n => n.data).join(' ')
    return /\\$|\\]\\(|\\*\\*|`|\\\\[a-z]/.test(text) && `shows Markdown: ${text.slice(0, 100)}` }).filter(o => o)"""


def check_page(browser, url) -> list:
    "What is wrong with a page."
    browser.size(1100)
    browser.open(url)
    wrong = browser.run(bad_pictures) + browser.run(leftovers)
    for width in (1100,400):
        browser.size(width)
        if wide := browser.run(too_wide): wrong.append(f"scrolls sideways at {width} px: {' '.join(wide)}")
    return wrong + [f'console: {e}' for e in browser.errors()]

def check_search(browser, address) -> list:
    "Is `match_layers` found, on its own page first?"
    browser.open(f'{address}/search.html?q=match_layers')
    found = browser.run("""new Promise(done => { let tries = 0; const timer = setInterval(() => {
        const links = [...document.querySelectorAll('#search-results li a')].map(a => a.getAttribute('href'))
        if (links.length || ++tries > 100) { clearInterval(timer); setTimeout(() => done(links), 500) } }, 100) })""")
    wrong = [f'console: {e}' for e in browser.errors()]
    return wrong if found and 'match_layers' in found[0] else [*wrong, f'finds {found[:3]} for match_layers']

def check_switch(browser, address) -> list:
    "Does the switch of the theme change the colors?"
    browser.size(1400)
    browser.open(f'{address}/index.html')
    color = 'getComputedStyle(document.body).backgroundColor'
    def choose(theme): return browser.run(f"document.querySelector('.theme-change-button[data-mode={theme}]').click(); {color}")
    light,dark = choose('light'),choose('dark')
    return [] if light != dark else [f'the switch of the theme leaves the page at {light}']

def save_screenshots(browser, url, name, folder):
    for theme in ('light','dark'):
        browser.size(1400)
        browser.run(f"localStorage.mode = localStorage.theme = '{theme}'")
        browser.open(url)
        browser.run(bad_pictures)  # loads pictures that wait until they are scrolled to
        browser.screenshot(folder/f'{name}-{theme}.png')


def main(folder):
    folder = Path(folder).resolve()
    if folder.is_relative_to(root): sys.exit('Give a folder outside of the repository for the pictures.')
    folder.mkdir(parents=True, exist_ok=True)
    if not site.exists(): sys.exit('There is no site yet: run `make docs` first.')
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(QuietHandler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}'
    paths = sorted(p.relative_to(site).as_posix() for p in site.rglob('*.html') if '_static' not in p.parts)
    wrong = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        try:
            for path in paths:
                wrong[path] = check_page(browser, f'{address}/{path}')
                save_screenshots(browser, f'{address}/{path}', path.removesuffix('.html').replace('/', '.'), folder)
            wrong['search'],wrong['theme'] = check_search(browser, address),check_switch(browser, address)
        finally: browser.close()
    server.shutdown()
    for path,problems in wrong.items():
        for problem in problems: print(f'{path}: {problem}')
    bad = sum(map(bool, wrong.values()))
    print(f'{len(paths)} pages, {bad or "none"} with problems; pictures in {folder}')
    return int(bad > 0)


if __name__ == '__main__':
    if len(sys.argv) != 2: sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
