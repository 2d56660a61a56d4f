"""
How well and how fast prepare_data.py finds the main text of pages: trafilatura's evaluation set (Barbaresi 2021)

About 990 pages, each with up to six segments that must be in the text ('with') and six that must not ('without'),
whitespace aside. A wanted segment found is a true positive, one missing a false negative, an unwanted one found a false
positive; precision, recall and F are over all segments of all pages. Everybody gets the same decoded string, one page
after the other in one process; seconds are of this process (CPU). Ours was tuned on one half of the pages only.

$ git clone --depth 1 https://github.com/adbar/trafilatura
$ pip install trafilatura justext readability-lxml lxml_html_clean   # each is optional
$ python tests/bench/extraction.py trafilatura            # or a bare git folder
"""

import hashlib, html, io, json, os, re, subprocess, sys, tarfile, time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from conftest import definitions

ours = definitions('prepare_data.py')
html_to_text = ours.html_to_text


def decode(raw):
    return ours.decode(raw)[1]


def read_tests(folder):
    """-> (evaldata.json, {name of a page: its bytes}), from a work tree or a git folder without one."""
    files = {}
    if os.path.isfile(f'{folder}/tests/evaldata.json'):
        for part in ('', 'cache', 'eval'):
            for entry in os.scandir(os.path.join(folder, 'tests', part)):
                if entry.is_file():
                    with open(entry.path, 'rb') as f:
                        files.setdefault(entry.name, f.read())
    else:
        done = subprocess.run(['git', f'--git-dir={folder}', 'archive', 'HEAD', 'tests'], capture_output=True)
        if done.returncode:
            sys.exit(
                f'error: {folder} has no tests/evaldata.json and is no git folder: {done.stderr.decode().strip()}'
            )
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
            for part in tar:
                if part.isfile() and re.fullmatch(r'tests/((cache|eval)/)?[^/]+', part.name):
                    files.setdefault(os.path.basename(part.name), tar.extractfile(part).read())
    return json.loads(files['evaldata.json']), files


def extractors():
    """-> {name: function of a page}: ours, the two ends of the scale, and those of the others that are installed."""
    found = {'prepare_data.py': html_to_text, 'all text': lambda page: html.unescape(re.sub('<[^>]*>', ' ', page))}
    try:
        import trafilatura

        options = dict(include_comments=False)
        found[f'trafilatura {trafilatura.__version__}'] = lambda page: trafilatura.extract(page, **options) or ''
        found['  its fast mode'] = lambda page: trafilatura.extract(page, fast=True, **options) or ''
        found['  as datatrove calls it'] = (
            lambda page: trafilatura.extract(page, favor_precision=True, deduplicate=True, **options) or ''
        )
    except ImportError as e:
        print(f'without trafilatura ({e})')
    try:
        import justext

        words = frozenset().union(*map(justext.get_stoplist, justext.get_stoplists()))
        found['justext'] = lambda page: '\n'.join(
            p.text for p in justext.justext(page.encode(), words, encoding='utf-8') if not p.is_boilerplate
        )
    except ImportError as e:
        print(f'without justext ({e})')
    try:
        import lxml.html, readability

        found['readability-lxml'] = lambda page: lxml.html.fromstring(
            readability.Document(page).summary()
        ).text_content()
    except ImportError as e:
        print(f'without readability ({e})')
    return found


def scores(counts):
    """[(true positives, false positives, wanted), ...] of pages -> 'precision recall F'."""
    right, wrong, wanted = map(sum, zip(*counts))
    precision, recall = right / max(1, right + wrong), right / max(1, wanted)
    return f'{precision:9.3f}{recall:8.3f}{2 * right / (right + wrong + wanted):7.3f}'


if __name__ == '__main__':
    if len(sys.argv) < 2:
        sys.exit(__doc__.strip())
    (pages, files), squash = read_tests(sys.argv[1]), lambda text: re.sub(r'\s+', ' ', text).strip()
    missing = [
        page['file']
        for page in pages.values()
        if len(files.get(page['file'], b'').split(b'\n')) < 4
        and files.get(page['file'], b'version https://git-lfs').startswith(b'version https://git-lfs')
    ]
    pages = [page for page in pages.values() if page['file'] not in missing]
    half = ['01234567'.count(hashlib.sha256(page['file'].encode()).hexdigest()[0]) for page in pages]  # 1: tuned on
    texts = [decode(files[page['file']]) for page in pages]
    print(
        f'{len(pages)} pages, {sum(map(len, texts)) / 1e6:.0f} million characters; missing {len(missing)} {missing}'
    )
    print(f"\n{'':24}precision  recall      F   F tuned   held out    pages/s    crashes")
    for name, extract in extractors().items():
        if len(sys.argv) > 2 and not re.search(sys.argv[2], name):
            continue
        counts, crashes, seconds = [], 0, 0.0
        for page, text in zip(pages, texts):
            start = time.process_time()
            try:
                text = extract(text)
            except Exception:  # an empty page to some of them
                text, crashes = '', crashes + 1
            seconds += time.process_time() - start
            text = squash(text)
            right, wrong = (sum(squash(part) in text for part in page[key]) for key in ('with', 'without'))
            counts.append((right, wrong, len(page['with'])))
        f_tuned, f_held = (scores([c for c, h in zip(counts, half) if h == side])[-7:] for side in (1, 0))
        print(
            f'{name:24}{scores(counts)}{f_tuned:>10}{f_held:>11}{len(pages) / seconds:11.1f}{crashes:11}', flush=True
        )
