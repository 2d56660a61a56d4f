"""
Stage 0: prepare the data. Raw pages, books and chats go in; a clean, mixed corpus comes out.

The steps for documents follow FineWeb (Penedo et al. 2024) and work on raw files of Common Crawl:
    URL filter -> main text of the page -> language -> repetition -> quality -> C4's and FineWeb's
    rules -> personal data -> duplicates -> benchmark questions -> mixture -> training, validation
Conversations, ranked answers, prompts and benchmark questions are converted to this project's form.
By default this runs on Toytown, a miniature internet with known faults (truth.jsonl lists them):
no step reads that list, but each step is scored with it at the end.

Reads:   the files that `files` names, or public data sets (config/sources.json) from the network.
         Kinds: .warc .wet .html .txt .md .jsonl .json .parquet .bin, most also as .gz. Files
         named *_train and *_val stay on that side; a folder named benchmarks/ holds exam questions.
         All files of one folder or pattern are one source, but for those that a setting names.
Writes:  data_dir/train/*.jsonl.gz  val/*.jsonl.gz   documents {"text", "source", "url"}
         chat_{train,val}.jsonl  preferences_{train,val}.jsonl  prompts_{train,val}.jsonl
         benchmarks/*.jsonl  funnel.json (what each step dropped)  dropped.jsonl (examples of it)

Toytown               python toytown.py && python prepare_data.py
your own files        python prepare_data.py --files=notes.txt,crawl/*.warc.gz --data_dir=data/mine
one file of the web   python prepare_data.py --source=commoncrawl --data_dir=data/cc
only download         python prepare_data.py config/d20.py --download_only=true
16 cores              torchrun --standalone --nproc_per_node=16 prepare_data.py --source=c4
four nodes            torchrun --nnodes=4 --nproc_per_node=64 --rdzv_backend=c10d \\
                          --rdzv_endpoint=NODE0:29500 prepare_data.py --source=commoncrawl \\
                          --n_files=1000 --data_dir=/disk/cc --raw_dir=/disk/raw

Pass one: the ranks share the input files. Each file is cleaned alone, and its result stays in
data_dir/.partial, so a killed run continues with the files that are missing. Pass two: rank 0 finds
duplicates, with 2 KB of memory for each document; then all ranks look for benchmark questions and
write the corpus. Any number of ranks writes the same corpus, byte for byte.

Left out: models that judge quality (FineWeb-Edu, DCLM); quality rules for other languages than
English (use --filters=url,language,pii,dedup for them); archives (unpack .zip and .tar yourself).
"""
from configurator import configure, read_settings # first, so that Ctrl-C gives no traceback
import collections, concurrent.futures, contextlib, datetime, functools, glob, gzip, hashlib, html
import io, ipaddress, itertools, json, mmap, os, pathlib, re, shutil, threading, time, typing, zlib

import numpy as np
import requests
import torch.distributed as dist

from model import (
    RANK, atomic_write, grade, join_parts, print0, read_jsonl, read_shard, write_jsonl, write_text)

# -----------------------------------------------------------------------------
# settings
# input and output
source = 'files'            # 'files' = the files below; or names from config/sources.json: c4,dolly
files = 'data/raw/toytown'  # files, folders, patterns such as crawl/*.warc.gz; commas between them
data_dir = 'data/toytown'   # where the corpus is written
raw_dir = 'data/raw'        # where downloads are kept; a file there is not downloaded again
n_files = 1                 # how many files to download of a source that has many
mirror = ''                 # download https://HOST/PATH from here, as MIRROR/HOST/PATH
first_bytes = 0             # download only so much of each file, for a rehearsal; 0 = whole files
download_only = False       # stop when the files are in raw_dir: before GPUs are rented
crawl = 'CC-MAIN-2025-51'   # which crawl of Common Crawl
wet = False                 # Common Crawl's extracted text (WET), a tenth of the size of its pages
chat_as_text = False        # also put the text of training conversations into the corpus
keep_dropped = 20           # how many dropped documents to keep per reason in dropped.jsonl
seed = 1337                 # random seed for the choice of documents
# the steps, with the source of each threshold
filters = 'url,language,repetition,quality,c4,fineweb,pii,dedup,decontaminate' # steps to run
curated = 'books,lessons,github,wikipedia,arxiv,stackexchange,shakespeare' # no quality filter
blocked_hosts = ('free-prizes.example,spamfarm.example,click-here.example,'
                 'malware-zone.example') # remove their pages; or files that list hosts
blocked_words = 'casino,poker,porn,sex,xxx,viagra,betting,jackpot' # words in a URL: page removed
languages = 'en'            # languages to keep, as in en,de; config/languages.json has all of them
min_language = 0.65         # lowest language score, 0..1 (FineWeb: 0.65 of fastText's score)
max_repeated_lines = (0.3, 0.2) # Gopher (Rae et al. 2021): share of duplicate lines, of characters
max_repeated_paragraphs = (0.3, 0.2) # Gopher: the same for paragraphs
max_top_ngram = (0.20, 0.18, 0.16) # Gopher: share of characters in the most frequent 2-, 3-, 4-gram
max_repeated_ngrams = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10) # Gopher: for duplicate 5- to 10-grams
page_words = (50, 100_000)  # Gopher: fewest and most words in a document
word_length = (3, 10)       # Gopher: shortest and longest mean word length, in characters
max_symbols = 0.1           # Gopher: '#' and '...' per word
max_marked_lines = (0.9, 0.3) # Gopher: share of lines that begin with a bullet, that end with '...'
min_alphabetic = 0.8        # Gopher: share of words that contain a letter
min_stop_words = 2          # Gopher: how many of: the, be, to, of, and, that, have, with
min_line_words = 3          # C4 (Raffel et al. 2020, 2.2): remove lines with fewer words
min_sentences = 5           # C4: fewest sentences in a document
min_punctuated = 0.12       # FineWeb: share of lines that end with punctuation
max_line_repeats = 0.1      # FineWeb: share of characters in duplicate lines
max_short_lines = 0.67      # FineWeb: share of lines shorter than 30 characters
near_duplicate = 0.7        # share of equal MinHash values that makes two texts duplicates
drop_private = ''           # drop documents with these kinds of personal data, as in SSN,CARD
# the corpus
mixture = ''                # shares of bytes, as in web:0.7,books:0.3; '' = all there is
max_epochs = 1              # how often a small source may be repeated (Muennighoff et al. 2023: 4)
val_fraction = 0.05         # share of documents and prompts for validation
max_bad_rows = 0.01         # share of bad rows that may be left out of your files
shard_bytes = 50_000_000    # bytes of text in one file of documents
config = configure(globals())

# -----------------------------------------------------------------------------
# check the settings, join the other ranks

def load_json(path):
    with open(path, encoding='utf-8') as f:
        try:
            return json.load(f)
        except ValueError as e:
            raise AssertionError(f'{path}: not JSON ({e}): repair or delete it') from None

CONFIG_DIR = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'config')
SOURCES = load_json(f'{CONFIG_DIR}/sources.json') # {name: {kind, bytes, text_bytes, rows, ...}}
ALL_STEPS = ['url', 'text', 'language', 'repetition', 'quality', 'c4', 'fineweb', 'pii', # pass one
             'dedup', 'decontaminate'] # pass two: these need other documents
NOT_FOR_CURATED = ['language', 'repetition', 'quality', 'c4', 'fineweb']
TASKS = ['chat', 'preferences', 'prompts'] # rows that are not documents
NEEDED = dict(files='files', crawl='commoncrawl', wet='commoncrawl', blocked_hosts='url',
              blocked_words='url', languages='language', drop_private='pii') # by these settings

for name in source.split(','):
    assert name == 'files' or name in SOURCES, \
        f"no source '{name}': take 'files' for your own, or one of {', '.join(SOURCES)}"
for name in filter(None, filters.split(',')):
    assert name in ALL_STEPS, f"filters: no step '{name}'; the steps are {','.join(ALL_STEPS)}"
for name in ('n_files', 'max_epochs', 'shard_bytes'):
    assert config[name] > 0, f'{name} must be positive, not {config[name]}'
for name in ('val_fraction', 'near_duplicate', 'min_language'):
    assert 0 < config[name] <= 1, f'{name} must be above 0 and at most 1, not {config[name]}'
assert 0 <= max_bad_rows <= 1, f'max_bad_rows is a share between 0 and 1, not {max_bad_rows}'
defaults = read_settings(pathlib.Path(__file__))
for name, needed in NEEDED.items():
    is_used = needed in [*source.split(','), *filters.split(',')]
    is_default = config[name] == defaults[name][0]
    setting = 'filters' if needed in ALL_STEPS else 'source'
    assert is_used or is_default, (f'{name} = {config[name]!r} would be ignored: add {needed} to '
                                   f'--{setting}={config[setting]}')
for name in ('seed', 'first_bytes'):
    assert config[name] >= 0, f'{name} must be at least 0, not {config[name]}'
weights = {} # source -> share of the bytes
for part in filter(None, mixture.split(',')):
    name, _, weight = part.partition(':')
    assert re.fullmatch(r'\d*\.?\d+', weight), f"mixture: '{part}' is not of the form web:0.7"
    weights[name] = float(weight)

world_size = int(os.environ.get('WORLD_SIZE', 1))
if world_size > 1: # a rank with a slow file keeps the others waiting, perhaps for days
    dist.init_process_group('gloo', timeout=datetime.timedelta(days=30))

def meet(problem=''):
    """Every rank waits here for all others. If one has a problem, all stop with it."""
    problems = [problem] * world_size
    if world_size > 1:
        try:
            dist.all_gather_object(problems, problem)
        except RuntimeError: # no connection to a rank: it has stopped, and said why
            raise SystemExit(1) from None
    found = [text for text in problems if text]
    assert not found, found[0]

# -----------------------------------------------------------------------------
# find the input files, and finish what a killed run has left

START = time.time()
PARTIAL = f'{data_dir}/.partial'        # everything is written here first
WORK = f'{PARTIAL}/work'                # the results of pass one
NEW = f'{PARTIAL}/new'                  # the new corpus
OLD = f'{PARTIAL}/old'                  # the corpus that it replaces
MARKER = f'{PARTIAL}/finished.json'     # exists when NEW is whole: only the exchange is left to do
OURS = ['train', 'val', 'benchmarks', 'dropped.jsonl', 'funnel.json',
        *[f'{task}_train.jsonl' for task in TASKS], *[f'{task}_val.jsonl' for task in TASKS]]
KNOWN = re.compile(r'\.((txt|html?|jsonl?|warc|wet)(\.gz)?|md|parquet|bin)$', re.I)
ENDING = re.compile(r'(\.(txt|md|jsonl?|html?|warc|wet|parquet|bin|gz))+$', re.I)

def put_in_place():
    """
    Exchange the old corpus for the new one.

    A kill between two renames must lose nothing, so every rename can be repeated: the marker lists
    the names, and what is no longer in NEW has been moved already. The marker is deleted last.
    """
    marker = load_json(MARKER)
    os.makedirs(OLD, exist_ok=True)
    for name in marker['old']: # the new corpus has no such file
        if os.path.lexists(f'{data_dir}/{name}'):
            os.replace(f'{data_dir}/{name}', f'{OLD}/{name}')
    for name in marker['new']:
        if os.path.lexists(f'{NEW}/{name}'):
            if os.path.lexists(f'{data_dir}/{name}'):
                os.replace(f'{data_dir}/{name}', f'{OLD}/{name}')
            os.replace(f'{NEW}/{name}', f'{data_dir}/{name}')
    if os.path.exists(f'{PARTIAL}/settings.json'):
        os.remove(f'{PARTIAL}/settings.json') # or the next run would use a half-deleted folder
    os.remove(MARKER)
    shutil.rmtree(PARTIAL, ignore_errors=True)

def name_of(path):
    """The name of a file without endings, number and side. 'in/web_00001.warc.gz' -> ('web', '')"""
    stem = ENDING.sub('', os.path.basename(path))
    stem = re.sub(r'[-_]\d+$|\d{3,}$', '', stem) or stem
    name, _, side = re.fullmatch('(.*?)([-_](train|val))?', stem, re.S).groups()
    return name, side

@functools.lru_cache
def names_in(folder):
    """{(name, side)} of all files in a folder"""
    return {name_of(file_name) for file_name in os.listdir(folder)}

def folder_name(pattern):
    """The last folder without wildcards: 'data/crawl/*/*.html' -> 'crawl'"""
    folder = os.path.abspath(pattern)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return os.path.basename(folder)

own_files = [] # paths of your files, in a fixed order
SOURCE_OF = {} # path -> its source, for files that were found in a folder or by a pattern
truth_files, mixture_files = [], [] # what toytown.py says about its files
names = files.split(',') if 'files' in source.split(',') else []
for name in names:
    name = os.path.expanduser(name.strip())
    found = [name] if os.path.isfile(name) else glob.glob(name, recursive=True)
    if os.path.isdir(name):
        found = glob.glob(f'{glob.escape(name)}/**', recursive=True)
    found = [path for path in sorted(found) if os.path.isfile(path)]
    known = [path for path in found if KNOWN.search(path)]
    remedy = 'name your files, as in --files=notes.txt,crawl/'
    if 'toytown' in name:
        remedy = 'run `python toytown.py` first'
    assert known, (f"no input file '{name}' of a known kind (.warc .wet .html .txt .md .jsonl "
                   f'.json .parquet .bin, also .gz): {remedy}')
    endings = collections.Counter(os.path.splitext(path)[1] for path in set(found) - set(known))
    if endings:
        kinds = ', '.join(f'{n:,} {ending}' for ending, n in endings.most_common(5))
        print0(f'{name}: {endings.total():,} files of other kinds are left out: {kinds}')
    special = {'truth.jsonl': truth_files, 'mixture.json': mixture_files}
    for path in known:
        folder, file_name = os.path.split(path)
        if file_name in special and os.path.exists(os.path.join(folder, 'web_00000.warc.gz')):
            special[file_name].append(path) # elsewhere, a file of this name is yours
            continue
        own_files.append(path)
        if path != name:
            SOURCE_OF[path] = folder_name(name)
for path in own_files:
    top = os.path.relpath(path, data_dir).split(os.sep)[0]
    assert top not in OURS, f'{path} would be replaced by its result: move it out of {data_dir}'
if mixture_files and not mixture:
    weights = load_json(mixture_files[0])
# All files of a folder or pattern are one source, but for those that a setting calls by their name
for path in own_files:
    name, _ = name_of(path)
    if name in weights or name in curated.split(','):
        SOURCE_OF[path] = name

# The results of a killed run are used only with the same settings, input files and code.
stamps = {}
for path in [*own_files, __file__, *sorted(glob.glob(f'{CONFIG_DIR}/*.json'))]:
    stamps[path] = [os.path.getsize(path), os.path.getmtime(path)]
decides = {name: value for name, value in config.items() if name not in ('mirror', 'download_only')}
settings = json.dumps([decides, weights, stamps], sort_keys=True)
settings_path = f'{PARTIAL}/settings.json'
if RANK == 0 and not download_only:
    if os.path.exists(MARKER):
        put_in_place()
    is_same = os.path.exists(settings_path) and load_json(settings_path) == json.loads(settings)
    if not is_same:
        if os.path.exists(settings_path):
            os.remove(settings_path) # first, so that nothing uses a half-deleted folder
        shutil.rmtree(PARTIAL, ignore_errors=True)
        os.makedirs(WORK)
        write_text(settings_path, settings)
meet() # the others wait until the folder is ready

# -----------------------------------------------------------------------------
# download public data

TIMEOUT = (10, 60)      # seconds to connect, and between two pieces of a file
TRIES = 6               # failures in a row that brought no new bytes
FIRST_WAIT = 1          # seconds before the second try, doubled after each failure
AT_ONCE = 8             # downloads at a time
TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504} # HTTP status codes of problems that may pass
PASSING = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
STOP = threading.Event() # set when a download has failed: the others end too
CAME = collections.Counter() # bytes of each file that have come

def urls_of(name, n_files):
    """
    The URLs of a source. {a,b} stands for both files, {00..20} for the first n_files.
        'http://x/{00..20}.gz', n_files=2 -> ['http://x/00.gz', 'http://x/01.gz']
    """
    urls = []
    for url in SOURCES[name]['urls']:
        start, braces, end = re.fullmatch(r'([^{]*)\{?([^}]*)\}?(.*)', url).groups()
        parts = braces.split(',')
        if '..' in braces:
            first, last = braces.split('..')
            numbers = range(int(first), int(last) + 1)[:n_files]
            parts = [str(number).zfill(len(first)) for number in numbers]
        urls += [start + part + end for part in parts]
    return urls

def part_of(path):
    """The part of a file that an earlier try has downloaded. -> (its path, its size)"""
    # The length of the whole file is in the name path.LENGTH.part, 0 if the server does not tell.
    parts = glob.glob(f'{glob.escape(path)}.*.part')
    return (parts[0], os.path.getsize(parts[0])) if parts else ('', 0)

def request(url, path, only_look):
    """
    Send one request for the missing bytes of a file, or only look whether the server has it.
    -> (what went wrong or '', the length of the file or 0 if the server does not tell)
    """
    part, have = part_of(path)
    if have and part == f'{path}.{have}.part': # nothing is missing
        os.replace(part, path)
        return '', have
    limit = 0 if url.endswith('.paths.gz') else first_bytes # lists of files are needed whole
    last = limit - 1 if limit else ''
    headers = {'Accept-Encoding': 'identity', 'Range': f'bytes={have}-{last}'} # not compressed
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as r:
        if r.status_code in TRY_AGAIN:
            return f'HTTP {r.status_code}', 0
        name = os.path.basename(os.path.dirname(path))
        assert r.status_code in (200, 206, 416), (
            f'{url}: HTTP {r.status_code} {r.reason}: put the file at {path} yourself, or take '
            f'{name} out of --source={source}')
        if url.endswith('.gz'):
            r.raw.headers.pop('Content-Encoding', None) # or requests would unpack the file
        span = re.fullmatch(r'bytes (\d+)-\d+/(\d+)', r.headers.get('Content-Range', ''))
        total = int(span[2] if span else r.headers.get('Content-Length', 0))
        if limit:
            total = min(total, limit)
        if only_look:
            return '', total
        whole_part = f'{path}.{total}.part'
        is_rest = r.status_code == 206 and span and int(span[1]) == have
        if part and not (is_rest and part == whole_part): # the server sends all, or another file
            os.remove(part)
            have = 0
        if r.status_code != 200 and not (is_rest and have == int(span[1])):
            return 'the file has changed: start over', 0
        with open(whole_part, 'ab' if have else 'wb') as f:
            for block in r.iter_content(1 << 15):
                if limit: # a server that knows no ranges sends the whole file
                    block = block[:limit - have]
                have += f.write(block)
                CAME[path] += len(block) # no other thread writes to this entry
                if have == limit:
                    break
                if STOP.is_set():
                    raise SystemExit # ends this thread
    if total and have != total:
        return f'{have:,} of {total:,} bytes came', 0
    os.replace(whole_part, path)
    return '', have

def download(url, path, only_look=False):
    """
    Download url to path, unless it is there; or only look how long it is. -> its length in bytes
    The next try, or run, continues one that failed.
    """
    if mirror:
        url = f'{mirror.rstrip("/")}/{url.split("://")[-1]}'
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    failures, most = 0, part_of(path)[1]
    while not os.path.exists(path) and not STOP.is_set():
        try:
            problem, length = request(url, path, only_look)
        except PASSING as e:
            problem = type(e).__name__
        except (requests.RequestException, ValueError) as e: # a bad URL: waiting does not help
            raise AssertionError(f'{url}: {" ".join(str(e).split())}') from None
        if not problem:
            return length
        have = part_of(path)[1]
        failures = 0 if have > most else failures + 1
        most = max(most, have)
        assert failures < TRIES, (f'{url}: {problem}: run the same command later (what came is '
                                  f'kept), or put the file at {path} yourself')
        print0(f'{url}: {problem}')
        STOP.wait(FIRST_WAIT * 2**max(0, failures - 1))
    return os.path.getsize(path) if os.path.exists(path) else 0

def files_of(name):
    """The files of a public source, equal on all ranks. -> [(name, url, path), ...]"""
    folder = f'{raw_dir}/{name}'
    if first_bytes: # a folder of their own, so that they are never taken for whole files
        folder = f'{raw_dir}/first_{first_bytes}/{name}'
    urls = urls_of(name, n_files)
    if name == 'commoncrawl': # its URL is that of a list of files; each rank gets a copy of it
        kind = 'wet' if wet else 'warc'
        listing = f'{folder}/{crawl}.{kind}.paths.{RANK}.gz'
        download(urls[0].replace('CRAWL', crawl).replace('KIND', kind), listing)
        with gzip.open(listing, 'rt', encoding='utf-8') as f:
            lines = f.read().split()
        n = min(n_files, len(lines))
        server = re.match(r'\w+://[^/]+/', urls[0])[0]
        places = [i * len(lines) // n for i in range(n)] # spread over the crawl
        urls = [server + lines[place] for place in places]
    file_names = [url.split('/')[-1] for url in urls]
    if len(set(file_names)) < len(file_names): # hh has four files named train.jsonl.gz
        file_names = ['-'.join(url.split('/')[-2:]) for url in urls]
    is_cut = first_bytes and file_names[0].endswith(('.bin', '.parquet'))
    assert not is_cut, f'first_bytes: a part of {file_names[0]} is of no use: leave {name} out'
    return [(name, url, f'{folder}/{file_name}') for url, file_name in zip(urls, file_names)]

def check_disk(files, lengths):
    """
    -> bytes to download. AssertionError if the disk has no room for all that will be made: for
    each byte of text one byte, since at most there are the results of pass one (packed, 0.4; the
    signatures, 448 of 2,000 bytes, 0.2) and the corpus (0.4), later that and the tokens (0.45).
    """
    n_missing = n_later = 0
    for (name, _, path), length in zip(files, lengths):
        entry = SOURCES[name]
        if entry['kind'] == 'text':
            n_later += length * entry['text_bytes'] / entry['bytes']
        if not os.path.exists(path):
            n_missing += length - part_of(path)[1]
    if n_missing == 0: # it was checked when they were downloaded
        return 0
    os.makedirs(data_dir, exist_ok=True)
    needs = [(raw_dir, n_missing), (data_dir, n_later)]
    if os.stat(raw_dir).st_dev == os.stat(data_dir).st_dev: # both are on one disk
        needs = [(data_dir, n_missing + n_later)]
    for folder, needed in needs:
        free = shutil.disk_usage(folder).free
        assert needed <= free, (
            f'the disk of {folder} is too small: {needed / 1e9:,.1f} GB are needed (downloads '
            f'{n_missing / 1e9:,.1f}, corpus and tokens {n_later / 1e9:,.1f}), {free / 1e9:,.1f} GB'
            ' are free: set raw_dir or data_dir to another disk, or n_files to a smaller number')
    return n_missing

def fetch(files):
    """Download the files [(name, url, path), ...] that are not there, several at a time."""
    urls = [url for _, url, _ in files]
    paths = [path for _, _, path in files]
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            # a file that is gone, or a small disk, must not be found out after hours
            look = functools.partial(download, only_look=True)
            n_missing = check_disk(files, pool.map(look, urls, paths))
            start = time.time()
            tasks = [pool.submit(download, url, path) for url, path in zip(urls, paths)]
            while tasks:
                done, tasks = concurrent.futures.wait(tasks, 10, 'FIRST_EXCEPTION')
                for task in done:
                    task.result() # raises what the download has raised
                came = sum(CAME[path] for path in paths)
                rate = came / (time.time() - start)
                if came:
                    minutes = max(0, n_missing - came) / rate / 60
                    print0(f'downloads: {came / 1e6:,.1f} of {n_missing / 1e6:,.1f} MB, '
                           f'{rate / 1e6:.1f} MB/s, {minutes:.1f} minutes left')
        except BaseException: # a problem, or Ctrl-C
            STOP.set()
            pool.shutdown(cancel_futures=True)
            raise

# -----------------------------------------------------------------------------
# read WARC files: web pages as a crawler received them (ISO 28500)

LIMIT = 50_000_000 # bytes; longer pages and documents are left out
HEADER_LIMIT = 1 << 16 # bytes of the fields before a record or a page
BLOCK = 1 << 12
GZIP_MAGIC = b'\x1f\x8b\x08' # every gzip member begins with it
WARC_LINE = re.compile(rb'WARC/\d\.\d+[ \t]*\r?\n') # the first line of a record
JUNK = re.compile(rb'[^\s\0]') # between two records stand only empty lines, or a padding
# The beginning of a page that is not compressed: a tag, a byte order mark, no control characters
PLAIN = re.compile(rb'\s*<|\xef\xbb\xbf|\xff\xfe|\xfe\xff|[^\0-\x08\x0e-\x1a\x1c-\x1f]*\Z')

def read_member(data, start):
    """
    Yield the content of the gzip member that begins at start: all at once, or if it holds a whole
    file, in parts of about LIMIT bytes that begin with a record. -> where the member ends
    """
    member = zlib.decompressobj(31) # 31: with gzip's header and check sum; zlib.error if damaged
    pieces, size = [], 0
    while not member.eof:
        block = data[start:start + BLOCK]
        if not block:
            raise zlib.error('cut short')
        pieces.append(member.decompress(block, LIMIT))
        if pieces == [b'']: # a file name without end would be searched again and again
            raise zlib.error('a header of 4 KB')
        size += len(pieces[-1])
        start += len(block) - len(member.unconsumed_tail) - len(member.unused_data)
        if size > LIMIT:
            content = b''.join(pieces)
            last = content.rfind(b'WARC/') # the last record goes on in the next part
            last = last if last > 0 else size
            yield content[:last]
            pieces, size = [content[last:]], size - last
    yield b''.join(pieces)
    return start

def warc_parts(f, skipped):
    """
    Yield the parts of a WARC file that can be read alone, as bytes: its gzip members, or all of a
    plain file. If each record is a member, a damaged one costs one record.
    """
    data = b''
    if f.peek(1): # mmap refuses an empty file
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    is_gzip = data[:3] == GZIP_MAGIC
    if not is_gzip and WARC_LINE.search(data):
        yield data
        return
    end = 0 # of the last member
    start = data.find(GZIP_MAGIC)
    if start < 0:
        skipped['file without any record'] += 1
        return
    while start >= 0:
        if JUNK.search(data, end, start):
            skipped['bytes that belong to no record'] += 1
        try:
            end = yield from read_member(data, start)
        except zlib.error:
            skipped['damaged record'] += 1
            end = data.find(GZIP_MAGIC, start + 1) # the damaged one reaches to the next
            end = len(data) if end < 0 else end
        start = data.find(GZIP_MAGIC, end)
    if JUNK.search(data, end):
        skipped['bytes that belong to no record'] += 1

def read_fields(f):
    """Read lines 'Name: value' up to an empty one. -> {name in lower case: value}; cut: None"""
    fields = {}
    line = f.readline()
    while line.strip():
        name, _, value = line.decode('utf-8', 'replace').partition(':')
        fields[name.strip().lower()] = value.strip()
        line = f.readline()
    return fields if line else None

def warc_records(data, skipped):
    """
    Yield (fields, content) of records: a line WARC/1.0, fields, an empty line, the content.

    A wrong length or a cut costs one record: each ends at the latest where the next one begins.
    """
    end = 0 # of the last record
    match = WARC_LINE.search(data)
    while match:
        start = match.start()
        if JUNK.search(data, end, start):
            skipped['bytes that belong to no record'] += 1
        following = WARC_LINE.search(data, match.end())
        limit = following.start() if following else len(data)
        header = io.BytesIO(data[start:min(limit, start + HEADER_LIMIT)])
        header.readline()
        fields = read_fields(header) or {}
        start += header.tell() # now of the content
        length = fields.get('content-length', '')
        is_number = re.fullmatch('[0-9]{1,15}', length)
        end = start + int(length) if is_number else limit
        fills_part = match.start() == 0 and end <= len(data) and not JUNK.search(data, end)
        if fills_part: # the record is alone in its gzip member: WARC_LINE in it is text of the page
            following = None
            limit = len(data)
        if not is_number:
            skipped['record with a broken header'] += 1
        elif end > limit:
            skipped['record cut short'] += 1
            end = limit
        elif end - start > LIMIT:
            skipped['page over 50 MB'] += 1
        else:
            yield fields, data[start:end]
        match = following
    if JUNK.search(data, end):
        skipped['bytes that belong to no record'] += 1

def read_page(fields, content, skipped):
    """A record of WARC or WET -> document {url, html, type}, {url, text}, or None."""
    url = fields.get('warc-target-uri', '').strip('<>')
    kind = fields.get('warc-type')
    if kind == 'conversion': # extracted text
        return dict(url=url, text=decode(content)[1])
    if kind in ('warcinfo', 'request', 'metadata'): # about a page
        return None
    if kind != 'response':
        skipped['record of another type (revisit, resource)'] += 1
        return None
    response = io.BytesIO(content[:HEADER_LIMIT]) # a status line, fields, an empty line, the page
    status = response.readline().split()
    fields = read_fields(response)
    if fields is None:
        skipped['page with a broken header'] += 1
        return None
    media_type = fields.get('content-type', 'text/html').lower()
    is_page = re.match('text/html|application/xhtml', media_type)
    if not is_page or status[1:2] != [b'200']:
        skipped['not a page (status or type)'] += 1
        return None
    page = content[response.tell():]
    coding = fields.get('content-encoding', '').lower()
    # Common Crawl has unpacked all pages, and kept the field
    if coding not in ('', 'identity') and not PLAIN.match(page[:1000]):
        skipped['compressed page'] += 1
        return None
    return dict(url=url, html=page, type=media_type) if page else None

def read_warc(f, skipped):
    """Yield documents {url, html, type} of a WARC file, {url, text} of a WET file."""
    n_documents = 0
    for part in warc_parts(f, skipped):
        for fields, content in warc_records(part, skipped):
            document = read_page(fields, content, skipped)
            if document:
                n_documents += 1
                yield document
    if not n_documents:
        print0(f'{f.name}: no page was found in it')

# -----------------------------------------------------------------------------
# convert the rows of public data sets
#
# A converter takes a row and returns [(kind, new row), ...]. The kind None stands for a row that is
# left out; then the reason takes the place of the new row.

ROLES = dict(human='user', gpt='assistant', prompter='user', Human='user', Assistant='assistant')

def messages_of(question, answer):
    return [dict(role='user', content=question.strip()),
            dict(role='assistant', content=answer.strip())]

def turns_of(value, role):
    """A text by this role, or a list of messages, perhaps with ShareGPT's names -> messages"""
    if isinstance(value, str):
        return [dict(role=role, content=value.strip())]
    messages = []
    for turn in value:
        name = turn.get('role', turn.get('from'))
        content = turn.get('content', turn.get('value'))
        messages.append(dict(role=ROLES.get(name, name), content=content))
    return messages

def split_dialog(text):
    """'\\n\\nHuman: Hi\\n\\nAssistant: Hello' -> messages"""
    first, *parts = re.split(r'(?:^|\n\n)(Human|Assistant): ?', text.lstrip())
    if first or not parts:
        raise ValueError('not a dialogue of the form "\\n\\nHuman: ... \\n\\nAssistant: ..."')
    pairs = zip(parts[::2], parts[1::2])
    return [dict(role=ROLES[name], content=content.strip()) for name, content in pairs]

def make_ranking(messages, completions, scores):
    """Rank by score, best first. Of completions with equal scores only the first is listed."""
    # sorted, since their order often tells the ranking: in hh-rlhf the better one comes first
    answers = sorted((text.strip(), score) for text, score in zip(completions, scores))
    completions = [text for text, _ in answers]
    first_with = {}
    for i, (_, score) in enumerate(answers):
        first_with.setdefault(score, i)
    ranking = [first_with[score] for score in sorted(first_with, reverse=True)]
    if len(ranking) < 2:
        return [(None, 'ranking of nothing but ties')]
    return [('preferences', dict(messages=messages, completions=completions, ranking=ranking))]

def from_instruction(row):
    """Alpaca and Dolly: an instruction, perhaps with an input, perhaps inside Alpaca's template."""
    parts = [row.get('instruction'), row.get('input') or row.get('context')]
    if 'prompt' in row:
        # not with a regular expression: it would try every beginning with every end
        _, _, filled = row['prompt'].partition('### Instruction:\n')
        filled, end, _ = filled.partition('\n### Response:')
        instruction, _, given = filled.partition('\n### Input:\n')
        parts = [instruction.strip(), given.strip()] if end else [row['prompt']]
    question = '\n\n'.join(part for part in parts if part)
    answer = row['response'] if 'response' in row else row['output']
    return [('chat', dict(messages=messages_of(question, answer)))]

def from_gsm8k(row):
    """The answer ends with '#### 42', which a program can check. Calculator notes <<2+3=5>> go."""
    messages = messages_of(row['question'], re.sub('<<[^<>\n]*>>', '', row['answer']))
    rows = [('chat', dict(messages=messages))]
    number = re.search(r'#### *(-?[\d.]*\d)', row['answer'].replace(',', ''))
    if number:
        checks = {'number': float(number[1])}
        rows.append(('prompts', dict(messages=messages[:1], checks=checks)))
    return rows

LETTERS = 'ABCDEFGHIJ'

def conversation_of(question, options, gold):
    """
    A question with choices, in one of the two forms in which eval.py asks such questions in a chat:
        'Which?\\nA. this\\nB. that' -> 'B' (MMLU)        'Which?' -> 'that' (ARC)
    The question itself decides, so that it is never in the training and in the validation data.
    """
    answer = options[gold]
    if zlib.crc32(question.encode('utf-8', 'replace')) % 2:
        answer = LETTERS[gold]
        for letter, option in zip(LETTERS, options):
            question += f'\n{letter}. {option.strip()}'
    return [('chat', dict(messages=messages_of(question, answer)))]

def from_choices(row):
    """CommonsenseQA and ARC: answerKey is the label of the right choice."""
    choices = row['question']['choices']
    labels = [choice['label'] for choice in choices]
    options = [choice['text'] for choice in choices]
    return conversation_of(row['question']['stem'], options, labels.index(row['answerKey']))

def from_hellaswag(row):
    """How does a text go on? Some are from wikiHow, with marks such as [title] and [step]."""
    texts = [f"{row['activity_label']}: {row['ctx']}", *row['endings']]
    texts = [re.sub(r'\.? \[title\]', '.', text) for text in texts] # a sentence ends there
    texts = [re.sub(r'\[\w+\]', '', text) for text in texts]
    question, *endings = [' '.join(text.split()) for text in texts]
    return conversation_of(question, endings, row['label'])

def from_gsm8k_exam(row):
    """With the solution: a base model is shown solved problems before its own."""
    rows = []
    for kind, new in from_gsm8k(row):
        if kind == 'prompts':
            rows.append(('benchmarks', dict(new, answer=row['answer'])))
    return rows

def from_lambada(row):
    """The last word is to be predicted."""
    context, continuation = row['text'].rsplit(' ', 1)
    return [('benchmarks', dict(context=context, continuation=continuation))]

def from_hh(row):
    """Two dialogues that differ in the last answer. What is common to both may stand apart."""
    dialogs = []
    for key in ('chosen', 'rejected'):
        is_text = isinstance(row[key], str) and 'prompt' not in row
        turns = split_dialog(row[key]) if is_text else turns_of(row[key], 'assistant')
        if turns[0]['role'] == 'assistant':
            turns = turns_of(row['prompt'], 'user') + turns
        dialogs.append(turns)
    chosen, rejected = dialogs
    n = 0 # turns in common
    shorter = min(len(chosen), len(rejected))
    while n < shorter and chosen[n] == rejected[n]:
        n += 1
    answers = chosen[n:n + 1] + rejected[n:n + 1]
    if n == 0 or [turn['role'] for turn in answers] != ['assistant', 'assistant']:
        return [(None, 'pair that does not differ in an answer')]
    return make_ranking(chosen[:n], [turn['content'] for turn in answers], [1, 0])

def from_ultrafeedback(row):
    """Four answers; the score of each is the mean of GPT-4's ratings of up to four qualities."""
    scores = []
    for answer in row['completions']:
        ratings = [note['Rating'] for note in answer['annotations'].values()]
        ratings = [float(rating) for rating in ratings if rating != 'N/A']
        scores.append(sum(ratings) / max(1, len(ratings)))
    question = messages_of(row['instruction'], '')[:1]
    return make_ranking(question, [answer['response'] for answer in row['completions']], scores)

def rank_of(node):
    return 1e9 if node.get('rank') is None else node['rank'] # 0 is the best

def from_oasst(row):
    """A tree of turns with ranked replies -> the conversation of the best ones, all rankings."""
    if row['prompt']['lang'] != 'en':
        return [(None, 'conversation in another language')]
    rows, best = [], None
    waiting = [([], row['prompt'])] # (the turns before a node, the node)
    while waiting:
        before, node = waiting.pop()
        role = ROLES.get(node['role'], node['role'])
        messages = before + [dict(role=role, content=node['text'].strip())]
        replies = sorted(node['replies'], key=rank_of)
        if best is None and not replies:
            best = messages # the best replies are followed first, so the first end is the best one
        answers = [node for node in replies if node['role'] == 'assistant' and rank_of(node) < 1e9]
        if len(answers) > 1:
            scores = [-rank_of(answer) for answer in answers]
            rows += make_ranking(messages, [answer['text'] for answer in answers], scores)
        waiting += [(messages, reply) for reply in reversed(replies)]
    best = best[:len(best) // 2 * 2] # up to the last answer
    return rows + [('chat', dict(messages=best)) if best else (None, 'question without an answer')]

def from_sharegpt(row):
    return [('chat', dict(messages=turns_of(row['conversations'], 'user')))]

def from_completion(row):
    """Texts, or lists of messages (TRL)."""
    turns = turns_of(row['prompt'], 'user') + turns_of(row['completion'], 'assistant')
    return [('chat', dict(messages=turns))]

# The keys of a row tell its form; the first line that fits counts. A function converts the row; a
# kind means that the row has our form already.
FORMS = {
    'messages completions ranking': 'preferences',
    'messages checks': 'prompts',
    'messages': 'chat',
    'conversations': from_sharegpt,
    'prompt response': from_instruction,
    'prompt completion': from_completion,
    'instruction output': from_instruction,
    'instruction response': from_instruction,
    'question answer': from_gsm8k,
    'question answerKey': from_choices,
    'activity_label ctx endings label': from_hellaswag,
    'chosen rejected': from_hh,
    'message_tree_id prompt': from_oasst,
    'instruction completions': from_ultrafeedback,
    'text': 'text',
    'query choices gold': 'benchmarks',
    'context continuation': 'benchmarks',
    'context_options gold': 'benchmarks',
    'task_id prompt test': 'benchmarks',
}
EXAM_FORMS = {**FORMS, 'question answer': from_gsm8k_exam, 'text': from_lambada,
              'messages checks': 'benchmarks'} # for files of benchmarks
KEYS = dict(chat=['messages'], prompts=['messages', 'checks', 'task'], text=['text'], # drop others
            preferences=['messages', 'completions', 'ranking', 'checks'])

def check_text(name, value, may_be_empty=True):
    if not isinstance(value, str):
        raise ValueError(f'{name} must be a string, not {type(value).__name__}')
    if not may_be_empty and not value.strip():
        raise ValueError(f'{name} is empty')

def check_exam(row):
    """ValueError if a question cannot be asked, or has no right answer."""
    for key in ('query', 'context', 'prompt', 'test'):
        check_text(key, row.get(key, ''))
    check_text('continuation', row.get('continuation', '?'), may_be_empty=False)
    for key in ('choices', 'context_options'):
        options = row.get(key, ['?'])
        if not isinstance(options, list):
            raise ValueError(f'{key} must be a list, not {type(options).__name__}')
        for option in options:
            check_text(f'one of the {key}', option, may_be_empty=key == 'context_options')
        gold = row['gold'] if key in row else 0
        if type(gold) is not int or not 0 <= gold < len(options):
            raise ValueError(f'gold {gold!r} is not one of {len(options)} {key}')

def check_row(kind, row):
    """-> why a row is left out, or None. ValueError if it is not what its keys promise."""
    if kind == 'text':
        check_text('text', row['text'])
    if kind == 'benchmarks':
        check_exam(row)
    if 'messages' not in row:
        return None
    if 'checks' in row:
        grade(row['checks'], 'a 1') # an unusable check is found here, not hours later
    for turn in row['messages']:
        turn['content'] = join_parts(turn['content'])
        check_text('content', turn['content'])
    roles = [turn['role'] for turn in row['messages']]
    spoken = {turn['role'] for turn in row['messages'] if turn['content'].strip()}
    if not set(roles) <= {'system', 'user', 'assistant'} or 'user' not in spoken:
        raise ValueError(f'messages need a user turn, and roles system, user, assistant: {roles}')
    if kind == 'chat' and 'assistant' not in spoken:
        raise ValueError('a conversation has no assistant turn, or an empty one')
    if kind == 'preferences':
        ranking, completions = row['ranking'], row['completions']
        if not isinstance(completions, list):
            raise ValueError(f'completions must be a list, not {type(completions).__name__}')
        for text in completions:
            check_text('a completion', text)
        n = len(completions)
        listed = sum([i if isinstance(i, list) else [i] for i in ranking], []) # a list is a tie
        is_valid = all(type(i) is int and 0 <= i < n for i in listed)
        if not is_valid or len(listed) < 2 or len(set(listed)) < len(listed):
            raise ValueError(f'ranking {ranking} must list two or more of {n} completions')
        if len({completions[i].strip() for i in listed}) < len(listed):
            return 'ranking of equal texts' # it would teach that a text is better than itself
    order = ''.join(role[0] for role in roles) # such as 'suaua'
    wanted = 's?(ua)+' if kind == 'chat' else 's?(ua)*u'
    return None if re.fullmatch(wanted, order) else 'turns in another order than user, assistant'

def convert_row(row, forms):
    """-> [(kind, our row), ...] of all that a row is good for; (None, reason) if it is left out"""
    fitting = [form for form in forms if set(form.split()) <= set(row)]
    form = fitting[0] if fitting else None
    if form is None:
        raise ValueError(f"no known form has the keys {', '.join(sorted(row))}; FORMS lists them")
    convert = forms[form]
    if isinstance(convert, str):
        wanted = KEYS.get(convert, row)
        rows = [(convert, {key: row[key] for key in wanted if key in row})]
    else:
        rows = convert(row)
    checked = []
    for kind, new in rows:
        problem = check_row(kind, new) if kind else None
        checked.append((None, problem) if problem else (kind, new))
        if kind == 'preferences' and not problem and 'ranking' not in form:
            checked.append(('prompts', dict(messages=new['messages']))) # for RLHF, without answers
    return checked

# -----------------------------------------------------------------------------
# read files of every kind

MARK = '<|endoftext|>' # separates the documents of a text file
N_LOOK = 10 # rows of each file are checked for their form before the work begins
DAMAGED = (EOFError, OSError, ValueError, RecursionError, zlib.error) # what damaged files raise
BETWEEN_ITEMS = re.compile(r'[\s,]*') # of a JSON list
# what rows raise that are not what was expected
MISFIT = (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError)

def read_text(f):
    """
    Yield what stands between the marks. Without marks, a piece ends at the first empty line after
    4,000 characters, or at any line after 16,000.
    """
    start = f.peek(1 << 20)
    charset = BYTE_ORDER_MARKS.get(start[:2], 'utf-8')
    has_marks = MARK in start.decode(charset, 'replace')
    # bytes that are not UTF-8 are kept as surrogates, which read_content takes back
    file = io.TextIOWrapper(f, charset, 'surrogateescape' if charset == 'utf-8' else 'replace')
    lines, size = [], 0
    for line in iter(lambda: file.readline(LIMIT), ''):
        if MARK in line:
            before, *documents, line = line.split(MARK)
            yield ''.join(lines) + before
            yield from documents
            lines, size = [], 0
        elif not has_marks and (size >= 16_000 or size >= 4000 and not line.strip()):
            yield ''.join(lines)
            lines, size = [], 0
        if size <= LIMIT: # what is longer is left out, so its end need not be kept
            lines.append(line)
            size += len(line)
    yield ''.join(lines)

def read_lines(f, skipped):
    """Yield the lines of a file. One over the limit becomes empty, and is never held in memory."""
    line = f.readline(LIMIT)
    while line:
        if len(line) == LIMIT:
            skipped['row over 50 MB'] += 1
            while len(line) == LIMIT:
                line = f.readline(LIMIT)
            line = b'\n'
        yield line
        line = f.readline(LIMIT)

def read_list(f):
    """Yield the items of a JSON list one by one: together they may take 24 times their bytes."""
    decoder = json.JSONDecoder()
    file = io.TextIOWrapper(f, 'utf-8-sig')
    buffer = file.read(1 << 16)
    start = buffer.index('[') + 1
    while True:
        start = BETWEEN_ITEMS.match(buffer, start).end()
        if buffer.startswith(']', start):
            return
        try:
            item, start = decoder.raw_decode(buffer, start)
        except ValueError: # perhaps the item goes on; twice as much each time is linear in all
            buffer = buffer[start:]
            start = 0
            more = file.read(max(1 << 16, len(buffer)))
            if not more or len(buffer) > LIMIT:
                raise
            buffer += more
        else:
            yield item

def read_json(f, path, is_own, skipped):
    """Yield (line number, row) of JSON lines or a list; for a bad line of yours, a ValueError."""
    is_list = path.endswith('.json') and f.peek(64).lstrip().startswith(b'[')
    for number, line in enumerate(read_list(f) if is_list else read_lines(f, skipped), 1):
        if not is_list and not line.strip():
            continue
        try:
            row = line if is_list else json.loads(line.decode('utf-8-sig'))
            if not isinstance(row, dict):
                raise ValueError(f'a JSON object is expected, this is {type(row).__name__}')
            yield number, row
        except (ValueError, RecursionError) as e:
            if is_own:
                yield number, ValueError(f'not a JSON line: {e}')
            else:
                skipped['row that is not a JSON object'] += 1

def read_parquet(f, path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise AssertionError(f'{path}: parquet needs a package: pip install pyarrow') from None
    number = 0
    for batch in pyarrow.parquet.ParquetFile(f).iter_batches(100):
        for row in batch.to_pylist():
            number += 1
            yield number, row

def read_rows(rows, path, benchmark, is_own, skipped):
    """Yield the items in (line number, row) pairs. benchmark: its name, if these are questions."""
    stem = os.path.basename(path).split('.')[0]
    for number, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            converted = convert_row(row, EXAM_FORMS if benchmark else FORMS)
        except MISFIT as e:
            reason = str(e)
            if not isinstance(e, ValueError):
                reason = f'a value is missing or of another type ({e!r})'
            if is_own:
                yield dict(kind='bad row', place=f'{path}:{number}', reason=reason)
                continue
            converted = [(None, 'row that does not fit its form')]
        for kind, new in converted:
            if kind is None:
                skipped[new] += 1
            elif kind == 'text' and new['text']:
                url = row.get('url') or f'{path}:{number}'
                yield dict(kind=kind, url=str(url), text=new['text'])
            elif kind == 'benchmarks':
                yield dict(kind=f'benchmarks/{benchmark or stem}', row=new)
            elif kind != 'text':
                yield dict(kind=kind, row=new)

def unpack(f):
    """All that can be unpacked of a .gz that first_bytes has cut."""
    pieces = []
    with contextlib.suppress(EOFError), gzip.open(f) as unpacked:
        for piece in iter(unpacked.read1, b''):
            pieces.append(piece)
    return b''.join(pieces)

def read_content(f, path, benchmark, is_own, skipped):
    """Yield the items of an open file."""
    if re.search(r'\.(warc|wet)(\.gz)?$', path, re.I):
        for document in read_warc(f, skipped):
            yield dict(document, kind='text')
        return
    name = path.lower()
    if name.endswith('.gz'):
        unpacked = io.BytesIO(unpack(f)) if first_bytes and not is_own else gzip.open(f)
        f = io.BufferedReader(unpacked, 1 << 20)
        name = name.removesuffix('.gz')
    if name.endswith(('.jsonl', '.json')) and f.peek(2)[:2] in (b'\xff\xfe', b'\xfe\xff'):
        text = f.read().decode('utf-16') # as some programs on Windows write
        f = io.BufferedReader(io.BytesIO(text.encode()))
    if name.endswith(('.jsonl', '.json', '.parquet')):
        rows = read_parquet(f, path) if name.endswith('t') else read_json(f, name, is_own, skipped)
        yield from read_rows(rows, path, benchmark, is_own, skipped)
    elif name.endswith(('.html', '.htm')):
        yield dict(kind='text', url=path, type='text/html', html=f.read(LIMIT))
    else:
        for i, text in enumerate(read_text(f)):
            _, text = decode(text.encode('utf-8', 'surrogateescape')) # each text has its charset
            if len(text) > LIMIT:
                skipped['document over 50 MB'] += 1
            elif text.strip():
                yield dict(kind='text', url=f'{path}#{i}', text=text)

def read_file(path, source_name, skipped):
    """
    Yield what is in a file:
        {kind: 'text', source, url, text}, or with type and html in place of text
        {kind: 'chat' | 'preferences' | 'prompts' | 'benchmarks/NAME', source, row}
        {kind: 'tokens', source, path} for a token shard
        {kind: 'bad row', place, reason} in your own files; in others bad rows are only counted
    and `side` for files named *_train and *_val, if both are there. source_name: 'files' for your
    own files: their names or folders become the source. skipped: a Counter of what is left out.
    """
    is_own = source_name == 'files'
    folder, file_name = os.path.split(os.path.abspath(path))
    stem = ENDING.sub('', file_name)
    extra = dict(source=source_name)
    if is_own:
        name, side = name_of(path)
        extra = dict(source=SOURCE_OF.get(path, name))
        other = dict(train='val', val='train').get(side)
        if other and (name, other) in names_in(folder):
            extra.update(side=side) # a file without the other side is split as all others are
    if path.lower().endswith('.bin'):
        yield dict(extra, kind='tokens', path=path)
        return
    benchmark = stem if is_own and os.path.basename(folder) == 'benchmarks' else ''
    if not is_own and SOURCES[source_name]['kind'] == 'benchmarks':
        is_many = source_name in ('core', 'arc') # each of their files is a benchmark
        benchmark = stem if is_many else source_name.removesuffix('_test')
    try:
        with open(path, 'rb', buffering=1 << 20) as f:
            for item in read_content(f, path, benchmark, is_own, skipped):
                yield {**item, **extra}
    except DAMAGED as e:
        # an error of the operating system has a number; a damaged .gz has none
        is_unreadable = isinstance(e, OSError) and e.errno
        assert not is_unreadable, f'{path} cannot be read ({e.strerror}): mend that, run this again'
        reason = f'damaged, the rest is left out ({e})'
        if is_own:
            yield dict(kind='bad row', place=path, reason=reason)
        elif not first_bytes: # then the end of a file is missing, as was asked for
            print0(f'{path}: {reason}')
            skipped['damaged file'] += 1

# -----------------------------------------------------------------------------
# step "url": adult and spam sites (FineWeb, Penedo et al. 2024)
#
# Each step takes a document, may change its text, and returns why it is dropped, or None.

def read_block_list(names):
    """'spam.example,lists/adult.txt' -> set of hosts. In a list, each line ends with a host."""
    hosts = set()
    for name in names.split(','):
        name = os.path.expanduser(name.strip())
        is_file = os.path.isfile(name)
        is_host = not re.search(r'[/\\]|\.(txt|csv|list|hosts)$', name)
        assert is_file or is_host, \
            f"blocked_hosts: no file '{name}': give a host, or a file of hosts"
        lines = open(name, encoding='utf-8', errors='replace') if is_file else [name]
        for line in lines:
            words = line.partition('#')[0].split() # without the comment
            if words:
                hosts.add(words[-1].lower())
    return hosts

BLOCKED_HOSTS = read_block_list(blocked_hosts)
BLOCKED_WORDS = set(blocked_words.split(','))

def url_step(doc):
    url = doc['url'].lower()
    host = re.match(r'\w+://(?:[^/@]*@)?(\[[^]]*\]|[^/:?#]*)', url)
    if not host: # a file of your own
        return None
    if re.fullmatch(r'[\d.]+|\[.*', host[1]):
        return 'IP address'
    parts = host[1][-253:].split('.') # no name is longer (RFC 1035)
    for i in range(len(parts)): # a.b.example, b.example, example: subdomains are blocked too
        if '.'.join(parts[i:]) in BLOCKED_HOSTS:
            return 'blocked host'
    words = set(re.findall('[a-z0-9]+', url)) # whole words: Essex is a county
    return 'blocked word' if words & BLOCKED_WORDS else None

# -----------------------------------------------------------------------------
# step "text": the main text of a page, without menus, adverts and comments
#
# Four passes, each linear in the size of the page:
#   strip_raw      removes scripts and comments
#   scan           splits the page at its tags; a stack of open elements makes blocks of text
#   choose_blocks  finds the article and drops its links and leftovers
#   html_to_text   joins the blocks
# The ideas: text and link density (boilerpipe, Kohlschuetter et al. 2010); neighbours decide about
# short blocks (jusText, Pomikalek 2011); tell-tale class names (trafilatura, Barbaresi 2021).
# A regular expression finds the tags, because html.parser takes eight times as long.

MAX_CHARS = 5_000_000 # of a page are read; it limits the memory to 0.6 GB
HTML = load_json(f'{CONFIG_DIR}/html.json') # names of tags and classes
VOID = set(HTML['void'].split())                # have no end tag, or one that does not matter
BLOCK_TAGS = set(HTML['block'].split())         # break a line; all others stand in a sentence
SKIP = set(HTML['skip'].split())                # their text is left out, the sentence goes on
FURNITURE = set(HTML['furniture'].split())      # are seldom main text
PROSE = set(HTML['prose'].split())              # hold sentences, whatever their class is
SHORT_LINES = set(HTML['short'].split())        # short texts are usual in these
ENDS_ITSELF = set(HTML['ends_itself'].split())  # a second <p> ends the first
BAD_WORDS = set(HTML['bad_words'].split())      # of a class, id or role that is not main text
COMMENT_WORDS = set(HTML['comment_words'].split()) # the same, of what readers wrote
GOOD_NAMES = re.compile('|'.join(HTML['good_names']), re.I)
LEFTOVER = re.compile('|'.join(HTML['leftovers']), re.I)
RAW_TAGS = HTML['raw'].split()                  # hold no HTML
RAW_START = re.compile(rf"<(?:!--|({'|'.join(RAW_TAGS)})\b)", re.I)
RAW_END = {tag: re.compile(f'</{tag}[^>]*>?', re.I) for tag in RAW_TAGS}
# <name attributes>. A '>' may stand in quotes. The last tag of a page may be cut anywhere, so every
# end is optional. Then the search never goes back, and the time stays linear.
TAG = re.compile(r'''<(?:(/?[a-zA-Z][^\s/>]*)'''
                 r'''([^>=]*(?:=(?:\s*"[^"]*"?|\s*'[^']*'?)?[^>=]*){0,500})|[!?/][^>]*)>?''')
ATTRIBUTE = re.compile(r'''([^\s"'=/]+)(?:\s*=\s*("[^"]*|'[^']*|[^\s"']+))?''') # name = value
NAMES = re.compile(r'''(?<![\w-])(?:class|id|role|itemprop)\s*=\s*'''
                   r'''("[^"]*|'[^']*|[^\s>]+)''', re.I)
NAME_WORD = re.compile('[A-Z]?[a-z]+|[A-Z]+') # shareButtons -> share, Buttons
MAY_HIDE = re.compile('hidden|none', re.I)    # worth a closer look
# not in a longer word: backface-visibility hides nothing
HIDING_STYLE = re.compile(r'(?<![\w-])(display\s*:\s*none|visibility\s*:\s*hidden)')
# Verdicts on an element. Names mislead: <div class="no-sidebar"> may hold the whole article. With
# more than this share of the paragraphs of a page, an element is main text whatever its names say.
HIDDEN = -4
COMMENTS = -3
NOT_MAIN = -2
BAD_NAME_OF_PROSE = -1 # one long paragraph in it is enough
ENOUGH = {HIDDEN: 0.9, COMMENTS: 0.9, NOT_MAIN: 0.5, BAD_NAME_OF_PROSE: 0}
LONG_NUMBER = re.compile('&#(?:[0-9]{8}|[xX][0-9a-fA-F]{8})[0-9a-fA-F]*') # int() would take forever
LINE_BREAK = '\x1e' # stands for <br> while white space is squeezed

class Block(typing.NamedTuple):
    text: str
    n_linked: int   # characters of the text that are in links
    element: int    # number of the element that it stands in
    tag: str        # of this element
    row: int        # number of the table row, or 0

def strip_raw(page):
    """Remove comments, scripts and the like. What is never closed ends with the page."""
    parts, pos = [], 0
    for match in RAW_START.finditer(page):
        if match.start() >= pos: # not inside what has been removed
            parts.append(page[pos:match.start()])
            if match[1]:
                end = RAW_END[match[1].lower()].search(page, match.end())
                pos = end.end() if end else len(page)
            else:
                end = page.find('-->', match.end() - 2) # <!--> is a whole comment
                pos = end + 3 if end >= 0 else len(page)
    return ''.join([*parts, page[pos:]])

@functools.lru_cache(20_000) # sites repeat the same few names
def judge_names(names):
    """The verdict on 'class id role itemprop': COMMENTS, NOT_MAIN, 2 main text, 0 unknown."""
    words = {word.lower() for word in NAME_WORD.findall(names)}
    if words & COMMENT_WORDS:
        return COMMENTS
    if words & BAD_WORDS:
        return NOT_MAIN
    return 2 if GOOD_NAMES.search(names) else 0

@functools.lru_cache(20_000)
def judge(attributes):
    """The verdict on an element by its attributes: HIDDEN, role=main 1, or what its names say."""
    if MAY_HIDE.search(attributes):
        pairs = ATTRIBUTE.findall(attributes)
        values = {name.lower(): value.strip('"\' ').lower() for name, value in pairs}
        is_hidden = 'hidden' in values or values.get('aria-hidden') == 'true'
        if is_hidden or HIDING_STYLE.search(values.get('style', '')):
            return HIDDEN
    names = ' '.join(NAMES.findall(attributes))
    verdict = judge_names(names) if names else 0
    return 1 if not verdict and 'main' in names and 'role' in attributes else verdict

def clean_block(text, is_code):
    """Decode &amp; and the like, squeeze white space (not in code)."""
    if '&' in text:
        text = html.unescape(LONG_NUMBER.sub('\ufffd', text))
    if is_code:
        return text.replace(LINE_BREAK, '\n').strip('\r\n').rstrip()
    lines = [' '.join(line.split()) for line in text.split(LINE_BREAK)]
    return '\n'.join(lines).strip()

def scan(page):
    """page -> (blocks, parent of each element, verdict on each element); element 0 is the page."""
    blocks, parents, verdicts = [], [0], [0]
    stack = [('', 0)]               # (tag, number) of the open elements
    n_open = collections.defaultdict(int) # tag -> how many of them are open
    skip_depth = 0                  # length of the stack where a skipped element began, or 0
    link_depth = 0                  # the same for a link
    row = 0                         # number of the table row
    is_item = False                 # does the next block begin a list item?
    buffer, n_linked = [], 0        # text since the last block, and its characters in links

    def end_block():
        nonlocal n_linked, is_item
        if not buffer or skip_depth: # the sentence may go on after what is skipped
            return
        text = ''.join(buffer)
        buffer.clear()
        if not text.isspace():
            text = clean_block(text, n_open['pre'])
            tag = 'li' if is_item else stack[-1][0]
            tag = 'pre' if n_open['pre'] else tag
            if text:
                blocks.append(Block(text, n_linked, stack[-1][1], tag, row))
                is_item = False
        n_linked = 0

    def close_last():
        nonlocal skip_depth, link_depth
        end_block()
        tag, _ = stack.pop()
        n_open[tag] -= 1
        skip_depth = 0 if skip_depth > len(stack) else skip_depth
        link_depth = 0 if link_depth > len(stack) else link_depth
        return tag

    # TAG has two groups, so split gives: text, tag, attributes, text, tag, attributes, text, ...
    page = strip_raw(page[:MAX_CHARS]).replace(LINE_BREAK, ' ')
    parts = iter(['b', '', *TAG.split(page)])
    for tag, attributes, text in zip(parts, parts, parts): # three at a time: text follows the tag
        tag = tag.lower() if tag else 'b' # no name: <!doctype html>, which is as harmless as <b>
        name = tag.lstrip('/')
        is_block = name in BLOCK_TAGS
        if is_block:
            end_block()
        if tag == 'br' and not skip_depth:
            buffer.append(LINE_BREAK)
        elif name in VOID:
            pass
        elif tag != name: # </div> also ends what was left open inside; a stray one ends nothing
            if n_open[name]:
                while close_last() != name:
                    pass
            link_depth = 0 if name == 'a' else link_depth
            row = 0 if name in ('tr', 'table') else row
            is_item = is_item and name != 'li'
        else:
            if name == 'a': # a second <a> ends a link
                link_depth = len(stack) if 'href' in attributes.lower() else 0
            verdict = 0
            if not skip_depth and attributes and (is_block or MAY_HIDE.search(attributes)):
                verdict = judge(attributes[:2000])
            begins_skip = name in SKIP or (verdict == HIDDEN and not is_block)
            if is_block:
                last = stack[-1][0]
                if last == 'p' or (last == name and name in ENDS_ITSELF):
                    close_last()
                is_page_header = name == 'header' and not n_open['article'] and not n_open['main']
                if name in FURNITURE or is_page_header:
                    verdict = min(verdict, NOT_MAIN)
                elif name in PROSE and verdict == NOT_MAIN:
                    verdict = BAD_NAME_OF_PROSE
                elif name in ('article', 'main'):
                    verdict = verdict or 1
                row = len(parents) + 1 if name == 'tr' else row
                is_item = name == 'li' or (is_item and name not in ('ul', 'ol'))
            if is_block or begins_skip or skip_depth: # <b> and the like are no elements here
                parents.append(stack[-1][1])
                stack.append((name, len(verdicts)))
                verdicts.append(verdict)
                n_open[name] += 1
                if begins_skip and not skip_depth:
                    skip_depth = len(stack)
        if text and not skip_depth:
            buffer.append(text)
            n_linked += len(text.strip()) if link_depth else 0
    while len(stack) > 1: # what is skipped may never end, and text before it wait
        close_last()
    end_block()
    return blocks, parents, verdicts

def add_up(sizes, parents):
    """The size of each element -> the same with all elements in it."""
    sums = list(sizes)
    for i in range(len(parents) - 1, 0, -1): # a parent has a smaller number than its children
        sums[parents[i]] += sums[i]
    return sums

def choose_blocks(blocks, parents, verdicts, by_name=True):
    """
    The blocks of the main text. Paragraphs (long, few links) show where it is.
    by_name: leave out elements whose names are bad.
    """
    is_paragraph = []
    sizes = [0] * len(parents) # characters of paragraphs in each element itself
    for block in blocks:
        is_long = len(block.text) > 80 or block.tag == 'pre'
        is_paragraph.append(is_long and block.n_linked < 0.3 * len(block.text))
        sizes[block.element] += len(block.text) if is_paragraph[-1] else 0
    sums = add_up(sizes, parents)
    is_out = [False] * len(parents)
    for i in range(1, len(parents)):
        is_bad = by_name and verdicts[i] < 0 and sums[i] <= ENOUGH[verdicts[i]] * sums[0]
        is_out[i] = is_bad or is_out[parents[i]]
        sizes[i] = 0 if is_out[i] else sizes[i]
    sums = add_up(sizes, parents)

    # the article is the best element that holds half of all paragraphs, or else the page
    best = (0, 0)
    for verdict, size in zip(verdicts, sums):
        if verdict > 0 and size > 0.5 * sums[0]:
            best = max(best, (verdict, size))
    inside = [best == (0, 0)] * len(parents)
    for i in range(1, len(parents)):
        is_article = verdicts[i] == best[0] and sums[i] > 0.5 * best[1] # or one of like size
        inside[i] = (is_article or inside[parents[i]]) and not is_out[i]
    kept = [i for i, block in enumerate(blocks)
            if inside[block.element] and block.n_linked < 0.5 * len(block.text)]
    paragraphs = [i for i in kept if is_paragraph[i]] or [0, len(blocks)] # none: nothing is outside

    chosen = []
    for i in kept:
        block = blocks[i]
        is_sentence = block.text.endswith(('.', '!', '?', '"', '”'))
        is_heading = re.fullmatch('h[1-6]', block.tag)
        is_line = block.tag in SHORT_LINES or '\n' in block.text
        # outside of the paragraphs only headings before them, sentences and lists stay
        is_outside = i > paragraphs[-1] or (i < paragraphs[0] and not is_heading)
        if is_outside and len(block.text) < 60 and not is_sentence and not is_line:
            continue
        # "Share" is a leftover, "Share prices fell." is a sentence
        limit = 15 if block.text.endswith('.') else 120
        if block.tag == 'pre' or len(block.text) >= limit or not LEFTOVER.match(block.text):
            chosen.append(block)
    return chosen

def html_to_text(page):
    """The main text: an empty line between paragraphs, '- ' before items, ' | ' between cells."""
    scanned = scan(page)
    blocks = choose_blocks(*scanned)
    size = sum(len(block.text) for block in blocks)
    size_of_page = sum(len(block.text) for block in scanned[0] if not block.n_linked)
    if size < max(200, 0.08 * size_of_page): # perhaps many bad names were misleading
        all_blocks = choose_blocks(*scanned, by_name=False)
        size_of_all = sum(len(block.text) for block in all_blocks)
        blocks = all_blocks if size_of_all > 2 * size + 200 else blocks
    parts, last = [], Block('', 0, 0, '', 0)
    for block in blocks:
        is_cell = block.row and block.row == last.row and block.tag in ('td', 'th')
        is_next_line = {block.tag, last.tag} <= SHORT_LINES - {'pre'}
        if is_cell and len(block.text) + len(last.text) < 400:
            parts.append(' | ')
        elif parts:
            parts.append('\n' if is_next_line else '\n\n')
        parts.append('- ' + block.text if block.tag == 'li' else block.text)
        last = block
    return ''.join(parts)

# Labels that browsers read as a larger charset (whatwg.org, Encoding). Only those in CHARSET count:
# no page may ask for rot13 or UTF-7. A label that can be read in ASCII is never right about UTF-16.
ALIAS = {'latin1': 'cp1252', 'iso-8859-1': 'cp1252', 'ascii': 'cp1252', 'us-ascii': 'cp1252',
         'iso8859-1': 'cp1252', 'iso-8859-9': 'cp1254', 'gb2312': 'gb18030', 'gbk': 'gb18030',
         'big5': 'big5hkscs', 'shift_jis': 'cp932', 'shift-jis': 'cp932', 'sjis': 'cp932',
         'euc-kr': 'cp949'}
CHARSET = re.compile(r'utf-?8|(windows-|cp)125\d|cp(866|874|932|949)|iso-?8859-\d\d?|koi8-[ru]|'
                     r'gb18030|big5hkscs|euc-jp|iso-2022-jp')
LABEL = re.compile(r'charset\s{0,9}=\s{0,9}["\']?\s{0,9}([\w-]+)') # limits keep the time linear
BYTE_ORDER_MARKS = {b'\xef\xbb\xbf': 'utf-8', b'\xff\xfe': 'utf-16-le', b'\xfe\xff': 'utf-16-be'}

def decode(raw, content_type=''):
    """
    Bytes -> (charset, text). UTF-8 comes before all labels, because no other text of some length is
    valid UTF-8; then the labels in the HTTP header and in <meta>; then cp1252. A charset fits if at
    most one in five characters beyond ASCII is broken, however much ASCII stands around them.
    """
    name = BYTE_ORDER_MARKS.get(raw[:2])
    if name: # UTF-16
        return name, raw.decode(name, 'replace').replace('\ufeff', '')
    names = [] if raw.isascii() else ['utf-8'] # ISO-2022-JP is in ASCII
    for text in (content_type, raw[:4096].decode('latin-1')):
        names += LABEL.findall(text.lower())[:3]
    for name in [*names, 'utf-8']:
        name = ALIAS.get(name, name)
        if not CHARSET.fullmatch(name):
            continue
        try:
            text = raw.decode(name, 'replace')
        except LookupError: # no such charset
            continue
        n_broken = text.count('\ufffd') - raw.count(b'\xef\xbf\xbd') # a page may say U+FFFD itself
        n_other = len(text) - len(text.encode('ascii', 'ignore'))
        if 5 * n_broken <= n_other:
            return name, text.replace('\ufeff', '')
    return 'cp1252', raw.decode('cp1252', 'replace')

# soft hyphen, zero width space, word joiner, byte order mark. They hide words from all later steps.
# The joiners U+200C and U+200D stay: Persian and emoji need them.
INVISIBLE = re.compile('[\0\xad\u200b\u2060\ufeff]')

def text_step(doc):
    if 'html' in doc:
        _, page = decode(doc.pop('html'), doc.pop('type'))
        doc['text'] = html_to_text(page)
    text = doc['text'].encode('utf-8', 'replace').decode() # no lone surrogates
    doc['text'] = INVISIBLE.sub('', text).replace('\xa0', ' ').strip()
    return None if doc['text'] else 'no text'

# -----------------------------------------------------------------------------
# step "language": naive Bayes over frequent words
#
# config/languages.json lists for 74 languages the most frequent words and how frequent they are.
# FineWeb uses fastText (Joulin et al. 2016), a model of 126 MB.

# runs of letters; single letters in scripts without spaces
WORD = re.compile(r'[\u0900-\u0dff]+|'
                  r'[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]|[^\W\d_]+')

@functools.lru_cache(1)
def language_table(path=f'{CONFIG_DIR}/languages.json'):
    """
    -> codes, {word: row}, log P(word | language) of shape (words + 1, languages + 1). The last row
    is for every other word, the last column ('und') for text in no language that is known here.
    """
    table = load_json(path) # {code: [words, ...]}; the words of string i have the frequency 2^-i
    words = ' '.join(' '.join(strings) for strings in table.values()).split()
    rows = {word: i for i, word in enumerate(sorted(set(words)))}
    p = np.zeros((len(rows) + 1, len(table) + 1))
    for column, strings in enumerate(table.values()):
        for i, string in enumerate(strings):
            p[[rows[word] for word in string.split()], column] = 2.0**-i
    p[-1] = np.clip(1 - p.sum(0), 0.35, 0.6)    # the share of words that are not in the table
    p[:-1, -1] = p[:-1, :-1].mean(1)            # 'und' may borrow a word of any language
    p[-1, -1] = 0.7
    return [*table, 'und'], rows, np.log(np.maximum(p, 1e-5))

def language_scores(text, max_evidence=50):
    """
    text -> {code: probability}. The words of a text depend on each other, so together they never
    count as more than max_evidence independent ones. A page in two languages is mostly 'und'.
    """
    codes, rows, log_p = language_table()
    counts = collections.Counter(WORD.findall(text[:10_000].lower()))
    known = [word for word in counts if word in rows]
    n_known = np.array([counts[word] for word in known], float)
    score = n_known @ log_p[[rows[word] for word in known]]  # (languages + 1,)
    score += (counts.total() - n_known.sum()) * log_p[-1]
    score[-1] += 5 # two or three words prove nothing: a table of numbers is in no language
    trust = min(1, max_evidence / max(1, counts.total()))
    p = np.exp((score - score.max()) * trust)
    return dict(zip(codes, (p / p.sum()).tolist()))

def language_step(doc):
    scores = language_scores(doc['text'])
    is_wanted = max(scores[code] for code in languages.split(',')) >= min_language
    return None if is_wanted else max(scores, key=scores.get)

for name in languages.split(','):
    assert name in language_table()[0], f"languages: no '{name}' in config/languages.json"

# -----------------------------------------------------------------------------
# steps "repetition" and "quality": Gopher's rules (Rae et al. 2021, A1.1)

FACTOR = np.uint64(0x9E3779B97F4A7C15) # odd, so that multiplying by it loses nothing

@functools.lru_cache(1) # several steps ask for the same text
def words_of(text):
    """The words in lower case, without punctuation around them."""
    return [word.strip('.,;:!?"\'()“”‘’').lower() for word in text.split()]

QUOTES = re.compile('["\'`´‘’‚‛“”„‟′″«»‹›「」『』\0\xad\u200b-\u200d\u2060\ufeff]') # and invisible ones
DASHES = re.compile('[-‐‑‒–—―−]')
# characters of scripts without blanks between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese
UNSPACED = re.compile('[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff'
                      '\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]')

def compared_words(text):
    """
    The words by which texts are compared: without case, punctuation, quotes and dashes. In scripts
    without blanks each character is a word.
        'She said: “It’s well-known 雨停。”' -> ['she', 'said', 'its', 'well', 'known', '雨', '停']
    """
    text = DASHES.sub(' ', QUOTES.sub('', text))
    text = UNSPACED.sub(r' \g<0> ', text)
    words = [word.strip('.,;:!?()[]…。、，；：？！（）《》') for word in text.lower().split()]
    return [word for word in words if word]

@functools.lru_cache(1)
def lines_of(text):
    return [line.strip() for line in text.split('\n') if line.strip()]

def mix(x):
    """The end of MurmurHash3 (Appleby 2011), uint64 -> uint64: each bit of x changes all others."""
    for constant in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(constant)
    return x ^ (x >> np.uint64(33))

def hash_ngrams(words, n):
    """A hash of each run of n words. -> (len(words) - n + 1,) uint64"""
    codes = (zlib.crc32(word.encode('utf-8', 'replace')) for word in words)
    single = mix(np.fromiter(codes, np.uint64, len(words)))
    hashes = single[:max(0, len(words) - n + 1)]
    for k in range(1, n): # the factor makes the order of the words count
        hashes = hashes * FACTOR + single[k:k + len(hashes)]
    return mix(hashes)

def duplicate_characters(hashes, sizes, n):
    """Characters in n-grams that occurred earlier in the text; none is counted twice."""
    seen, total, i = set(), 0, 0
    while i < len(hashes):
        if hashes[i] in seen:
            total += sizes[i]
            i += n # continue after the duplicate
        else:
            seen.add(hashes[i])
            i += 1
    return total

def repetition_step(doc):
    """Is the same said over and over? Shares of duplicate parts, by number and by characters."""
    text, words = doc['text'], words_of(doc['text'])
    paragraphs = re.split(r'\n\s*\n', text)
    for what, parts, limits in (('lines', lines_of(text), max_repeated_lines),
                                ('paragraphs', paragraphs, max_repeated_paragraphs)):
        different = set(parts)
        n_duplicates = len(parts) - len(different)
        n_characters = len(''.join(parts)) - len(''.join(different))
        if n_duplicates > limits[0] * len(parts) or n_characters > limits[1] * len(text):
            return f'repeated {what}'

    ends = np.cumsum([len(word) + 1 for word in words]) # as if the words were joined by spaces
    starts = np.append(0, ends)
    hashes = single = hash_ngrams(words, 1)
    for n in range(2, min(10, len(words)) + 1):
        hashes = hashes[:-1] * FACTOR + single[n - 1:] # from the hashes of (n - 1)-grams
        sizes = ends[n - 1:] - starts[:len(hashes)] - 1 # (len(words) - n + 1,) characters
        _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        if n <= 4:
            limit = max_top_ngram[n - 2] * ends[-1]
            top = counts.argmax()
            n_characters = 0
            if counts[top] > 1:
                n_characters = counts[top] * sizes[first[top]]
        else:
            limit = max_repeated_ngrams[n - 5] * ends[-1]
            n_characters = sizes.sum() - sizes[first].sum() # an upper bound: overlaps count twice
            if n_characters > limit:
                n_characters = duplicate_characters(hashes.tolist(), sizes, n)
        if n_characters > limit:
            return f'repeated {n}-grams'
    return None

def first_broken(rules):
    """{reason: is the rule met?} -> the first reason why not, or None"""
    return next((reason for reason, is_met in rules.items() if not is_met), None)

STOP_WORDS = {'the', 'be', 'to', 'of', 'and', 'that', 'have', 'with'}

def quality_step(doc):
    """Is it prose?"""
    text = doc['text']
    words = words_of(text)
    lines = lines_of(text)
    n, n_lines = len(words), len(lines)
    n_characters = len(''.join(text.split()))
    n_symbols = len(re.findall(r'#|\.\.\.|…', text))
    n_bullets = sum(line[0] in '*-•‣●' for line in lines)
    n_ellipses = sum(line.endswith(('...', '…')) for line in lines)
    n_with_letter = sum(any(map(str.isalpha, word)) for word in words)
    return first_broken({
        'number of words': page_words[0] <= n <= page_words[1],
        'word length': word_length[0] * n <= n_characters <= word_length[1] * n,
        'symbols': n_symbols <= max_symbols * n,
        'bullets': n_bullets <= max_marked_lines[0] * n_lines,
        'ellipses': n_ellipses <= max_marked_lines[1] * n_lines,
        'letters': n_with_letter >= min_alphabetic * n,
        'stop words': len(STOP_WORDS & set(words)) >= min_stop_words,
    })

# -----------------------------------------------------------------------------
# steps "c4" (Raffel et al. 2020, 2.2) and "fineweb" (Penedo et al. 2024, 3.6)

POLICY = re.compile('javascript|terms of use|privacy policy|cookie policy|uses? (?:of )?cookies',
                    re.I)
CITATION = re.compile(r'\[(?:\d*|edit|citation needed)\]', re.I)

def unwrap(text):
    """
    text -> lists of lines that belong together. In a text that was broken at a column (e-mail,
    Project Gutenberg) a line goes on where the next word did not fit; else each line is alone.
    """
    lines = [line.rstrip() for line in text.split('\n')]
    width = max(map(len, lines))
    if not 50 <= width <= 100:
        return [[line] for line in lines]
    n_open = 0          # lines that end in the middle of a sentence
    goes_on = set()     # numbers of the lines that continue the one before
    for i, (before, line) in enumerate(zip(lines, lines[1:]), 1):
        if before and line and before[-1] not in '.!?:':
            n_open += 1
            first_word = line.split(' ', 1)[0]
            if len(before) + 1 + len(first_word) > width:
                goes_on.add(i)
    groups = []
    for i, line in enumerate(lines):
        if i in goes_on and len(goes_on) > n_open / 2:
            groups[-1].append(line)
        else:
            groups.append([line])
    return groups

def c4_step(doc):
    """Remove citation marks and bad lines; then drop placeholder texts and code."""
    kept = []
    for lines in unwrap(doc['text']):
        lines = [CITATION.sub('', line) for line in lines]
        words = ' '.join(lines).split()
        is_sentence = len(words) >= min_line_words and not POLICY.search(' '.join(words))
        has_endless_word = max(map(len, words), default=0) > 1000
        if not words or (is_sentence and not has_endless_word):
            kept += lines
    text = doc['text'] = re.sub(r'\n{3,}', '\n\n', '\n'.join(kept)).strip()
    sentence_ends = re.findall(r'[.!?]["”’\')]*(?=\s|$)', text)
    return first_broken({
        'few sentences': len(sentence_ends) >= min_sentences,
        'lorem ipsum': 'lorem ipsum' not in text.lower(),
        'curly bracket': '{' not in text,
    })

def fineweb_step(doc):
    """Drop lists and menus. The authors found these rules by comparing good and bad crawls."""
    lines = [' '.join(lines).strip() for lines in unwrap(doc['text']) if lines[0]]
    n_punctuated = sum(line[-1] in '.!?"”\'' for line in lines)
    different = ''.join(set(lines))
    n_repeated = len(''.join(lines)) - len(different) # characters
    n_short = sum(len(line) < 30 for line in lines)
    return first_broken({
        'punctuation': n_punctuated >= min_punctuated * len(lines),
        'repeated lines': n_repeated <= max_line_repeats * len(doc['text']),
        'short lines': n_short <= max_short_lines * len(lines),
    })

# -----------------------------------------------------------------------------
# step "pii": personal data gives way to a placeholder, <EMAIL> for an address and so on
#
# A pattern finds what has the form; is_private then looks at what no pattern can tell. Every
# pattern begins with a set of characters, to which re can jump, and looks back only from there:
# (?<!\w.) means that no letter or digit is before the first character. That is ten times as fast.
# All repetitions have a limit, so the time is linear in the length of the text.

PII = load_json(f'{CONFIG_DIR}/personal_data.json') # {parts, patterns with examples, needed, words}

def fill_in(pattern):
    """Replace {GAP} and other names by the parts of patterns that they stand for."""
    for name, part in reversed(PII['parts'].items()): # a part may hold those before it
        pattern = pattern.replace(f'{{{name}}}', part)
    return re.compile(pattern)

PII_PATTERNS = [(row['kind'], fill_in(row['pattern']), row.get('after')) for row in PII['patterns']]
PII_KINDS = list(PII['needed'])
SAYS = {name: re.compile(pattern) for name, pattern in PII['words'].items()} # before an item
CARD_NUMBER = re.compile(r'4(\d{12}|\d{15}|\d{18})|3[47]\d{13}|3[0689]\d{12}|' # lengths and first
                         r'(5[1-5]|2[2-7]|35)\d{14}|(5[0678]|6\d)\d{11,17}')   # digits of all banks

def is_card(number):
    """Luhn's check: double every second digit from the right; the sum of all digits ends with 0."""
    total = 0
    for i, digit in enumerate(reversed(number)):
        value = int(digit) * (1 + i % 2)
        total += value // 10 + value % 10
    return total % 10 == 0 and CARD_NUMBER.fullmatch(number)

def is_public_ip(text, before):
    """Private networks, examples and versions such as 4.1.2.1 or Firefox 115.0.2.1 do not count."""
    try:
        ip = ipaddress.ip_address(text)
    except ValueError:
        return False
    if ip.version == 4:
        is_small = max(ip.packed) < 20 and len(set(ip.packed)) > 1
        is_named = max(ip.packed[1:]) < 100 and SAYS['name'].search(before)
        if is_small or is_named or SAYS['version'].search(before):
            return False
    ip = getattr(ip, 'ipv4_mapped', None) or ip
    return ip.is_global and not ip.is_multicast

def is_private(kind, found, before, after):
    """Decide what the pattern cannot: check digits, public addresses, the text before and after."""
    if kind == 'EMAIL':
        return not re.match('(git|hg|svn)@', found) # not a person: git@github.com
    if kind == 'CARD':
        return is_card(re.sub(r'\D', '', found))
    if kind == 'IP':
        return is_public_ip(found, before)
    if kind == 'ADDRESS':
        is_year = re.match(r'(1[5-9]|20)\d\d,? ', found) and SAYS['year'].search(before)
        is_list = re.match(r'\w+, ?\d', found) and not SAYS['flat'].search(before)
        is_other = SAYS['page'].search(before) or SAYS['street'].match(found)
        goes_on = re.match(' [a-z]', after) and not SAYS['place'].search(before)
        return not (is_year or is_list or is_other or goes_on)
    if kind == 'SSN':
        return True
    has_neighbour = re.search(r'\d[ ,\t|]*$', before) or re.match(r'[ ,\t|]*\d', after)
    is_table = ' ' in found and has_neighbour # one of many numbers in a row
    is_other = found.isdecimal() or is_table or SAYS['other number'].search(before)
    return found.startswith('+') or not is_other

def redact(text, kinds):
    """
    Replace personal data. -> (text, [(kind, what stood there), ...])
        'Call (555) 234-5678' -> ('Call <PHONE>', [('PHONE', '(555) 234-5678')])
    """
    found = []
    for kind in PII_KINDS:
        if kind not in kinds or not re.search(PII['needed'][kind], text): # most texts have none
            continue

        def replace(match):
            start, end = match.span()
            before = text[max(0, start - 50):start]
            after = text[end:end + 5]
            is_told = word and SAYS[word].search(before)
            if not is_told and (word or not is_private(kind, match[0], before, after)):
                return match[0]
            found.append((kind, match[0]))
            return f'<{kind}>'

        for name, pattern, word in PII_PATTERNS: # word: what must be said before
            if name == kind:
                text = pattern.sub(replace, text)
    return text, found

DROP_KINDS = drop_private.upper().replace(' ', '').split(',')

def pii_step(doc):
    doc['text'], doc['private'] = redact(doc['text'], PII_KINDS)
    unwanted = [kind for kind, _ in doc['private'] if kind in DROP_KINDS]
    return f'has {unwanted[0]}' if unwanted else None

for kind in filter(None, DROP_KINDS):
    assert kind in PII_KINDS, f"drop_private: no kind '{kind}'; the kinds are {','.join(PII_KINDS)}"

# -----------------------------------------------------------------------------
# pass one: clean each input file alone

FIRST_STEPS = dict(url=url_step, text=text_step, language=language_step, repetition=repetition_step,
                   quality=quality_step, c4=c4_step, fineweb=fineweb_step, pii=pii_step)
# 112 hashes x -> a x + b of 32 bits; with an odd a no two x get the same value
GENERATOR = np.random.default_rng(0)
RANDOM = GENERATOR.integers(0, 2**32, (2, 112), np.uint32)
HASH_A = RANDOM[0] | np.uint32(1)
HASH_B = RANDOM[1]

def minhash(text):
    """
    The signature of a text, (112,) uint32: the smallest values of 112 hashes of its 5-grams (Broder
    1997; FineWeb's numbers). Two texts share a value as often as their sets of 5-grams overlap.
    """
    words = compared_words(text)[:100_000] # the beginning of a long book is enough
    padding = [''] * (5 - len(words)) # of a very short text
    ngrams = hash_ngrams(words + padding, 5).astype(np.uint32)
    smallest = np.full(112, 2**32 - 1, np.uint32)
    for i in range(0, len(ngrams), 256): # blocks that fit into the cache
        block = ngrams[i:i + 256, None]
        values = block * HASH_A + HASH_B    # (256, 112)
        smallest = np.minimum(smallest, values.min(0))
    return smallest

def text_of(item):
    """All text of an item, whatever its kind."""
    if 'text' in item:
        return item['text']
    turns = [turn['content'] for turn in item['row'].get('messages', [])]
    return '\n\n'.join(turns + item['row'].get('completions', []))

def describe(item):
    """Add size (bytes), key (64-bit hash) and side: items with the same key are on one side."""
    text = text_of(item)
    turns = item.get('row', {}).get('messages', [])
    asked = [turn['content'] for turn in turns if turn['role'] == 'user']
    decides = asked[0] if asked else text # the first question, or the whole document
    digest = hashlib.sha256(decides.encode('utf-8', 'replace')).digest() # the same on every machine
    item['key'] = int.from_bytes(digest[:8], 'big')
    item['size'] = len(text.encode('utf-8', 'replace'))
    is_val = item['key'] < val_fraction * 2**64
    item.setdefault('side', 'val' if is_val else 'train') # a file's name may have said it
    return item

def n_bytes(doc):
    if 'html' in doc:
        return len(doc['html'])
    return len(doc['text'].encode('utf-8', 'replace'))

def run_step(doc, name, step, report):
    """Run a step on a document and count what it does. -> does the document stay?"""
    before = doc['text'] if 'text' in doc else doc['html']
    report[name].update(docs_in=1, bytes_in=n_bytes(doc))
    reason = step(doc)
    if reason is None:
        report[name].update(docs_out=1, bytes_out=n_bytes(doc))
    else:
        report[f'dropped {name}'][reason] += 1
        if report[f'dropped {name}'][reason] <= keep_dropped:
            start = before[:2000]
            if isinstance(start, bytes):
                _, start = decode(start)
            report['examples'].append(dict(step=name, reason=reason, url=doc['url'], text=start))
    if truth_files: # to be compared with what was planted
        fate = report['fates'].setdefault(doc['url'], {})
        fate['stopped'] = name if reason else None
        if name == 'text':
            fate['text'] = doc['text']
        if name == 'pii':
            fate['private'] = [found for _, found in doc['private']]
    return reason is None

def read_group(group, skipped):
    """Yield the items of some input files; with chat_as_text also the text of conversations."""
    for source_name, path in group:
        for item in read_file(path, source_name, skipped):
            yield item
            if item['kind'] == 'chat' and chat_as_text and describe(item)['side'] == 'train':
                yield dict(kind='text', source=item['source'], url=path, text=text_of(item))

def clean_group(group, report):
    """Yield what the steps keep of some input files. The report gets counts and signatures."""
    wanted = ['text', *filters.split(',')]
    for item in read_group(group, report['skipped']):
        report['read']['rows'] += 1
        if item['kind'] == 'bad row':
            report['skipped']['bad row'] += 1
            report['bad_rows'].append(f"{item['place']}: {item['reason']}")
            continue
        if item['kind'] == 'tokens': # no step can read tokens: link the file later
            report['tokens'][item['source']] += len(read_shard(item['path']))
            report['token_files'].append(os.path.abspath(item['path']))
            continue
        if item['kind'] == 'text':
            report['read']['documents'] += 1
            names = [name for name in FIRST_STEPS if name in wanted]
            if item['source'] in curated.split(','):
                names = [name for name in names if name not in NOT_FOR_CURATED]
            # all() stops at the first step that drops the document
            if not all(run_step(item, name, FIRST_STEPS[name], report) for name in names):
                continue
            report['private'].update(kind for kind, _ in item.pop('private', []))
            if 'dedup' in wanted:
                report['signatures'].append(minhash(item['text']))
        elif item['kind'].startswith('benchmarks/'):
            report['exams'].append((item['kind'].removeprefix('benchmarks/'), item['row']))
            continue
        report['read']['items'] += 1
        yield describe(item)

def new_report():
    return collections.defaultdict(collections.Counter, examples=[], fates={}, signatures=[],
                                   token_files=[], bad_rows=[], exams=[], kept={})

def result_path(i, ending):
    return f'{WORK}/{i:06d}.{ending}'

def clean_all(groups, sizes):
    """Clean this rank's groups of files, except those that have a report from an earlier run."""
    mine = []
    for i in range(RANK, len(groups), world_size):
        if not os.path.exists(result_path(i, 'json')):
            mine.append(i)
    n_all = sum(sizes[i] for i in mine)
    n_done = 0
    began = time.time()
    for i in mine:
        report = new_report()
        write_jsonl(result_path(i, 'jsonl.gz'), clean_group(groups[i], report))
        signatures = np.array(report.pop('signatures'), np.uint32)
        array = io.BytesIO() # np.save to a file would not say that the disk is full
        np.save(array, signatures.reshape(-1, 112))
        with atomic_write(result_path(i, 'npy')) as partial, open(partial, 'wb') as f:
            f.write(array.getvalue())
        write_text(result_path(i, 'json'), json.dumps(report)) # written last: the group is done
        n_done += sizes[i]
        seconds = time.time() - began
        if seconds > 5:
            rate = n_done / seconds
            minutes = (n_all - n_done) / rate / 60
            print0(f'pass one: {n_done / 1e6:,.1f} of {n_all / 1e6:,.1f} MB, '
                   f'{rate / 1e6:.2f} MB/s, {minutes:.1f} minutes left')

def check_form(paths):
    """Look at the first rows of your own files. AssertionError if they are bad in too many files."""
    bad = []
    for path in paths:
        items = [*itertools.islice(read_file(path, 'files', collections.Counter()), N_LOOK)]
        if items and all(item['kind'] == 'bad row' for item in items):
            bad.append(f"{items[0]['place']}: {items[0]['reason']}")
    assert len(bad) <= max_bad_rows * len(paths), \
        f'{bad[0]} ({len(bad)} of {len(paths)} files begin with bad rows)'

inputs = [('files', path) for path in own_files] # (source, path)
problem = ''
try:
    check_form(own_files[RANK::world_size])
    downloads = [] # (source, url, path)
    for name in source.split(','):
        if name != 'files':
            downloads += files_of(name)
    inputs += [(name, path) for name, _, path in downloads]
    if RANK == 0:
        fetch(downloads)
except AssertionError as e:
    problem = str(e)
meet(problem)
if download_only:
    print0(f'{len(downloads)} files are in {raw_dir}')
    raise SystemExit
groups, sizes = [], [] # small files make up a group; a large one is a group alone
for source_name, path in inputs:
    size = os.path.getsize(path)
    if not groups or sizes[-1] + size > 1_000_000:
        groups.append([])
        sizes.append(0)
    groups[-1].append((source_name, path))
    sizes[-1] += size
try:
    clean_all(groups, sizes)
except AssertionError as e: # a mistake in the files of one rank stops all of them
    problem = str(e)
meet(problem)

# -----------------------------------------------------------------------------
# pass two. Step "dedup": MinHash with FineWeb's numbers, 112 values in 14 bands of 8

def near_duplicates(signatures, threshold=0.7):
    """
    signatures (n, 112) uint32 -> (n,) index of the earlier text that each is a copy of, or its own.

    Two texts with a band of 8 equal values are compared: they are copies if at least `threshold` of
    their 112 values are equal. Each text is compared with the earlier ones that stay.
    """
    n = len(signatures)
    copy_of = np.arange(n)
    keys = np.zeros((n, 14), np.uint64) # a hash of each band
    keys += np.arange(14, dtype=np.uint64)
    for i in range(8):
        keys = mix(keys + signatures[:, i::8])
    values, counts = np.unique(keys, return_counts=True)
    is_shared = np.isin(keys, values[counts > 1])   # (n, 14); most bands occur once: ignore them
    kept_with = collections.defaultdict(list)       # band -> the texts that stay
    for i in np.flatnonzero(is_shared.any(1)).tolist():
        bands = keys[i][is_shared[i]].tolist()
        candidates = set().union(*[kept_with[band] for band in bands])
        candidates = np.array(sorted(candidates), int)
        alike = (signatures[candidates] == signatures[i]).mean(1) >= threshold
        if alike.any():
            copy_of[i] = candidates[alike.argmax()] # the earliest
        else:
            for band in bands:
                kept_with[band].append(i)
    return copy_of

def write_copies():
    """Write for each text of each group: 0 = it stays, 1 = a near copy, 2 = with the same words."""
    signatures = [np.load(result_path(i, 'npy')) for i in range(len(groups))]
    ends = np.cumsum([len(rows) for rows in signatures])
    signatures = np.concatenate(signatures)
    copy_of = near_duplicates(signatures, near_duplicate)
    copies = np.flatnonzero(copy_of != np.arange(len(copy_of)))
    is_same = (signatures[copies] == signatures[copy_of[copies]]).all(1)
    verdicts = np.zeros(len(copy_of), np.uint8)
    verdicts[copies] = np.where(is_same, 2, 1)
    for i, part in enumerate(np.split(verdicts, ends[:-1])):
        np.save(result_path(i, 'copies.npy'), part)

def dedup_step(doc):
    """Was this text, or one nearly like it, there before?"""
    return (None, 'near', 'exact')[doc['copy']]

# -----------------------------------------------------------------------------
# step "decontaminate": texts that contain a benchmark question (Brown et al. 2020, C)

def exam_text(row):
    """A question with its right answer, as one text."""
    parts = [row.get(key) for key in ('query', 'context', 'prompt', 'canonical_solution')]
    parts += [turn['content'] for turn in row.get('messages', [])]
    for key in ('context_options', 'choices'):
        if key in row:
            right = int(row['gold'])
            parts.append(row[key][right])
    return ' '.join(part for part in [*parts, row.get('continuation')] if part)

def exam_ngrams(exams):
    """{benchmark: rows} -> sorted hashes of all 13-grams, and the benchmark of each"""
    hashes, names = [np.zeros(0, np.uint64)], []
    for name, rows in exams.items():
        for row in rows:
            hashes.append(np.unique(hash_ngrams(compared_words(exam_text(row)), 13)))
            names += [name] * len(hashes[-1])
    hashes, first, counts = np.unique(np.concatenate(hashes), return_index=True, return_counts=True)
    is_rare = counts <= 10 # what more questions share is the form of the exam, not a question
    return hashes[is_rare], [names[i] for i in first[is_rare]]

def decontaminate_step(item):
    """Does the text share 13 words in a row with a benchmark question?"""
    if len(exam_hashes) == 0:
        return None
    ngrams = hash_ngrams(compared_words(text_of(item)), 13)
    places = np.searchsorted(exam_hashes, ngrams)
    places = np.minimum(places, len(exam_hashes) - 1)
    hits = np.flatnonzero(exam_hashes[places] == ngrams)
    return f'question of {exam_names[places[hits[0]]]}' if len(hits) else None

LAST_STEPS = dict(dedup=dedup_step, decontaminate=decontaminate_step)

def finish_groups():
    """The last steps for this rank's groups. A report lists the items that stay."""
    global exam_hashes, exam_names # for decontaminate_step
    exam_hashes = np.load(f'{WORK}/exam_hashes.npy', 'r') # 'r': the ranks share the memory
    exam_names = np.load(f'{WORK}/exam_names.npy', 'r')
    steps = [name for name in LAST_STEPS if name in filters.split(',')]
    for i in range(RANK, len(groups), world_size):
        report = new_report()
        copies = iter(np.load(result_path(i, 'copies.npy')).tolist())
        for line, item in read_jsonl(result_path(i, 'jsonl.gz')):
            if item['kind'] == 'text':
                item['copy'] = next(copies, 0)
                is_kept = all(run_step(item, name, LAST_STEPS[name], report) for name in steps)
            else:
                reason = decontaminate_step(item) if 'decontaminate' in steps else None
                is_kept = reason is None
                if reason:
                    report['skipped'][f"{item['kind']}: {reason}"] += 1
            if is_kept:
                row = [line - 1, item['size'], item['side'] == 'val', item['key']]
                report['kept'].setdefault(f"{item['kind']} {item['source']}", []).append(row)
        write_text(result_path(i, 'kept'), json.dumps(report))

def read_items(numbers):
    """Yield the items with these numbers, in this order. They should ascend as far as possible."""
    starts = np.load(f'{WORK}/starts.npy') # the number of the first item of each group
    last = -1
    for number in numbers:
        i = np.searchsorted(starts, number, 'right') - 1
        if last < starts[i] or number <= last: # of another group, or the next epoch begins
            lines = read_jsonl(result_path(i, 'jsonl.gz'))
        for line, item in lines:
            if starts[i] + line - 1 == number:
                break
        yield item
        last = number

def row_of(item):
    if item['kind'] == 'text':
        return {key: item[key] for key in ('text', 'source', 'url')}
    return item['row']

def write_shards():
    """Write this rank's share of the documents."""
    for path in sorted(glob.glob(f'{glob.escape(WORK)}/*.shards.npy')):
        numbers, shards = np.load(path) # of each document, and of the file that it goes to
        side = os.path.basename(path).split('.')[0]
        is_mine = shards * world_size // (shards[-1] + 1) == RANK # some shards, one after another
        items = read_items(numbers[is_mine])
        for shard, n in zip(*np.unique(shards[is_mine], return_counts=True)):
            documents = map(row_of, itertools.islice(items, n))
            write_jsonl(f'{NEW}/{side}/{shard:06d}.jsonl.gz', documents)

if RANK > 0: # the other ranks help with what takes longest; rank 0 alone does the rest
    meet() # the copies and the exam questions are found
    finish_groups()
    meet()
    meet() # the corpus is planned
    write_shards()
    meet()
    raise SystemExit

total = new_report() # all reports together

def add_report(report):
    for url, fate in report.pop('fates').items():
        total['fates'].setdefault(url, {}).update(fate)
    for name, value in report.items():
        if isinstance(value, list):
            total[name] += value
        else:
            total[name].update(value)

n_items = [0]
for i in range(len(groups)):
    report = load_json(result_path(i, 'json'))
    n_items.append(report.get('read', {}).get('items', 0))
    add_report(report)
bad_rows = total['bad_rows']
for text in bad_rows[:keep_dropped]:
    print0(f'left out: {text}')
n_rows = total['read']['rows']
assert len(bad_rows) <= max_bad_rows * n_rows, (
    f'{bad_rows[0]}: {len(bad_rows):,} of {n_rows:,} rows are bad: repair them, or raise '
    f'--max_bad_rows={max_bad_rows}')
shutil.rmtree(NEW, ignore_errors=True) # of a run that was killed in pass two
os.makedirs(NEW)
exams = collections.defaultdict(dict) # benchmark -> {row as text: row}; no row twice
for name, row in total['exams']:
    as_text = json.dumps(row, sort_keys=True)
    exams[name][as_text] = row
exams = {name: list(rows.values()) for name, rows in exams.items()}
for name, rows in exams.items():
    write_jsonl(f'{NEW}/benchmarks/{name}.jsonl', rows)
    print0(f'benchmarks/{name}.jsonl: {len(rows):,} questions')

exam_hashes, exam_names = exam_ngrams(exams)
np.save(f'{WORK}/exam_hashes.npy', exam_hashes)
np.save(f'{WORK}/exam_names.npy', np.array(exam_names, str))
write_copies()
meet()
finish_groups()
meet()

# which items stay, and what the mixture must know of them
kept = collections.defaultdict(lambda: collections.defaultdict(list)) # kind -> source -> numbers
starts = np.cumsum(n_items) # the number of the first item of each group, and the end
np.save(f'{WORK}/starts.npy', starts[:-1])
sizes = np.zeros(starts[-1], np.int64)
is_val = np.zeros(starts[-1], bool)
keys = np.zeros(starts[-1], np.uint64) # they decide the side
for i in range(len(groups)):
    report = load_json(result_path(i, 'kept'))
    for name, rows in report.pop('kept').items():
        kind, _, source_name = name.partition(' ')
        lines, *columns = np.array(rows, np.uint64).T
        numbers = starts[i] + lines.astype(int)
        sizes[numbers], is_val[numbers], keys[numbers] = columns
        kept[kind][source_name].append(numbers)
    add_report(report)
for numbers_of in kept.values():
    for name, parts in numbers_of.items():
        numbers_of[name] = np.concatenate(parts)

# -----------------------------------------------------------------------------
# the mixture: how often each item is taken. Weights are of bytes, among the sources of one kind

def mix_sources(have, weights, max_epochs):
    """
    {source: bytes}, {source: weight} -> {source: how many epochs of it to take}
        {'web': 300, 'books': 100}, {'web': 1, 'books': 1}, 1 -> {'web': 0.33, 'books': 1.0}
    The budget grows until a source would be repeated too often, or until all sources are used up.
    """
    wanted = {name: weights[name] for name in have if weights.get(name)}
    if not wanted:
        return {name: 1.0 for name in have} # no weight for this kind: take everything
    budgets = [have[name] / weight for name, weight in wanted.items()] # at which each is used up
    budget = min(max_epochs * min(budgets), max(budgets))
    epochs = {}
    for name in have:
        wanted_bytes = wanted.get(name, 0) * budget
        epochs[name] = round(wanted_bytes / have[name], 9) # 0.9999999999 is 1
    return epochs

n_read = total['read']['documents']
lost = []
for name in ALL_STEPS:
    n_lost = total[name]['docs_in'] - total[name]['docs_out']
    lost.append(f'{name} {n_lost:,}')
assert 'text' in kept or not n_read, (f'no document of {n_read:,} is left, dropped by '
                                      f'{", ".join(lost)}: run fewer steps: --filters=pii,dedup')
assert kept or total['token_files'] or exams, f'{files}: the input files are empty'
known = set().union(*kept.values())
unknown = sorted(set(weights) - known)
assert not unknown, (f'mixture: nothing from {", ".join(unknown)}; '
                     f'there is {", ".join(sorted(known))}')
times = np.zeros(len(sizes), np.int64) # how often each item is taken
rng = np.random.default_rng(seed)
for kind, numbers_of in sorted(kept.items()):
    have = {} # bytes of each source
    for name in sorted(numbers_of):
        have[name] = max(1, sizes[numbers_of[name]].sum())
    for name, epochs in mix_sources(have, weights, max_epochs).items():
        order = rng.permutation(numbers_of[name])
        times[order] += int(epochs) # whole epochs, then a part of the next one
        before = np.cumsum(sizes[order]) - sizes[order] # bytes before each item
        rest = (epochs - int(epochs)) * have[name]
        times[order[before < rest]] += 1
        if epochs > 1:
            print0(f'{kind}: {name} is too small for its share: {epochs:.2f} epochs of it')
times[is_val] = np.minimum(times[is_val], 1) # validation data is never repeated
for kind, numbers_of in kept.items():
    numbers = np.concatenate([*numbers_of.values()])
    numbers = numbers[times[numbers] > 0]
    n = len(numbers)
    n_val = is_val[numbers].sum()
    # an item is in val if its key, as a share of 2**64, is below val_fraction
    lowest = keys[numbers].min() / 2**64
    highest = keys[numbers].max() / 2**64
    remedy = 'add data, or divide the text with lines of <|endoftext|>'
    if lowest < highest:
        value = lowest + min(0.01, (highest - lowest) / 2)
        remedy = f'add data, or set --val_fraction={value:.4f}'
    assert 0 < n_val < n, \
        f'{kind}: {n} items are too few: {n - n_val} for training, {n_val} for validation: {remedy}'

# -----------------------------------------------------------------------------
# write the corpus

counts = collections.Counter()
mixed = collections.defaultdict(collections.Counter) # kind -> {source: bytes}

for kind, numbers_of in kept.items():
    for name, numbers in numbers_of.items():
        n_taken = int((sizes[numbers] * times[numbers]).sum())
        if n_taken:
            mixed[kind][name] = n_taken
    all_numbers = np.sort(np.concatenate([*numbers_of.values()]))
    for side in ('train', 'val'):
        numbers = all_numbers[is_val[all_numbers] == (side == 'val')]
        epochs = range(times[numbers].max())
        # all items once, then those to be repeated
        numbers = np.concatenate([numbers[times[numbers] > epoch] for epoch in epochs])
        n_before = np.cumsum(sizes[numbers]) - sizes[numbers] # bytes
        counts[f'{kind} {side} rows'] = len(numbers)
        counts[f'{kind} {side} bytes'] = int(sizes[numbers].sum())
        if kind == 'text':
            _, shards = np.unique(n_before // shard_bytes, return_inverse=True)
            np.save(f'{WORK}/{side}.shards.npy', np.stack([numbers, shards]))
        else:
            write_jsonl(f'{NEW}/{kind}_{side}.jsonl', map(row_of, read_items(numbers)))
            print0(f'{kind}_{side}.jsonl: {len(numbers):,} rows')
meet()
write_shards()
meet()
for path in total['token_files']: # token shards are linked, not copied
    name = os.path.basename(path)
    side = 'val' if re.search('(^|[_-])val[_-]', name) else 'train'
    number = re.sub('.*(train|val)_?', '', name)
    os.symlink(path, f'{NEW}/{side}_{number}')

# -----------------------------------------------------------------------------
# the score of each step, if it is known what was planted

def pairs_of(pages, urls, key):
    """-> {(url, line of its text)} or {(url, personal data in it)}"""
    pairs = set()
    for url in urls:
        values = pages[url].get(key, [])
        values = re.split(r'\s*\n\s*', values) if key == 'text' else values
        pairs.update((url, value) for value in values)
    return pairs

def score(truth, fates, names):
    """
    Compare what the steps did with what was planted. -> {step: (planted, precision, recall)}

    truth: {url: {text, fault, group, private}}, written by toytown.py. fault names the step that
    must drop the page; 'quality' is for the four steps that judge prose, together.
    fates: {url: {stopped, text, private}}, the step that dropped the page and what was found in it.
    """
    junk_steps = [name for name in names if name in ('repetition', 'quality', 'c4', 'fineweb')]
    arrived = [url for url in fates if url in truth]
    scores = {}
    for name in names:
        together = junk_steps if name in junk_steps else [name]
        if name != together[-1]: # scored with the last of them
            continue
        gone = {url for url in arrived if fates[url]['stopped'] in together}
        fault = 'quality' if name in junk_steps else name
        planted = {url for url in arrived if truth[url].get('fault') == fault}
        found = gone
        if name in ('text', 'pii'): # lines that must be found, strings that must be replaced
            key = 'text' if name == 'text' else 'private'
            planted = pairs_of(truth, arrived, key)
            found = pairs_of(fates, arrived, key)
        elif name == 'language': # planted junk is in no language: to drop it is not a mistake
            found = {url for url in gone if truth[url].get('fault') != 'quality'}
        elif name == 'dedup': # one page of each group of copies must stay, no matter which
            stays = {} # group -> the last url in this order, in which those that stay come last
            for url in sorted(arrived, key=lambda url: url not in gone):
                stays[truth[url].get('group', url)] = url
            planted = set(arrived) - set(stays.values())
        if name != 'decontaminate': # nothing is planted for it
            n_right = len(planted & found)
            precision = n_right / max(1, len(found))
            recall = n_right / max(1, len(planted))
            scores[name] = (len(planted), precision, recall)
        arrived = [url for url in arrived if url not in gone]
    return scores

step_names = [name for name in ALL_STEPS if name == 'text' or name in filters.split(',')]
truth = {}
for path in truth_files:
    truth.update((row['url'], row) for _, row in read_jsonl(path))
scores = score(truth, total['fates'], step_names) if truth else {}

# -----------------------------------------------------------------------------
# report

title = '  planted  precision  recall' if scores else ''
print0(f'\nstep           documents in      out    MB in      out{title}  dropped')
funnel = {}
for name in step_names:
    row = funnel[name] = dict(docs_in=0, docs_out=0, bytes_in=0, bytes_out=0)
    row.update(total[name])
    columns = ' ' * len(title)
    if name in scores:
        row['planted'], row['precision'], row['recall'] = scores[name]
        columns = f"{row['planted']:>9,}{row['precision']:>11.3f}{row['recall']:>8.3f}"
    most_common = total[f'dropped {name}'].most_common(3)
    reasons = [f'{reason} {n:,}' for reason, n in most_common]
    megabytes_in = row['bytes_in'] / 1e6
    megabytes_out = row['bytes_out'] / 1e6
    print0(f"{name:<14}{row['docs_in']:>13,}{row['docs_out']:>9,}{megabytes_in:>9.2f}"
           f"{megabytes_out:>9.2f}{columns}  {', '.join(reasons)}")
for kind, taken in mixed.items():
    wanted = {name: weights[name] for name in taken if name in weights} or taken
    n_taken = sum(taken.values())
    n_wanted = sum(wanted.values())
    if len(taken) > 20:
        print0(f'{kind}: {len(taken):,} sources (funnel.json lists them), the largest are:')
    for name, size in taken.most_common(20):
        share = size / n_taken
        wanted_share = wanted[name] / n_wanted
        print0(f'{kind}: {name} {size / 1e6:.2f} MB, {share:.1%} of bytes '
               f'(wanted {wanted_share:.1%})')
most_common = total['private'].most_common()
found = ', '.join(f'{kind} {n:,}' for kind, n in most_common)
print0(f"personal data replaced: {found or 'none'} | skipped: {dict(total['skipped'])}")

n_shown = collections.Counter()
shown = []
for example in total['examples']: # each group of files may have brought keep_dropped of them
    reason = (example['step'], example['reason'])
    n_shown[reason] += 1
    if n_shown[reason] <= keep_dropped:
        shown.append(example)
write_jsonl(f'{NEW}/dropped.jsonl', shown)
dropped = {name: total[f'dropped {name}'] for name in step_names}
write_jsonl(f'{NEW}/funnel.json', [dict(
    steps=funnel, dropped=dropped, private=total['private'], counts=counts, mixture=mixed,
    tokens=total['tokens'], skipped=total['skipped'], seconds=round(time.time() - START, 1))])

# -----------------------------------------------------------------------------
# the new corpus takes the place of the old one

new_names = sorted(os.listdir(NEW))
old_names = list(OURS)
for path in glob.glob(f'{glob.escape(data_dir)}/*.bin'):
    if os.path.islink(path): # tokenizer.py writes files, not links
        old_names.append(os.path.basename(path))
old_names = [name for name in old_names if name not in new_names]
write_text(MARKER, json.dumps(dict(new=new_names, old=old_names)))
put_in_place()
print0(f"{counts['text train rows']:,} documents for training, "
       f"{counts['text val rows']:,} for validation")
print0(f'written to {data_dir} in {time.time() - START:.1f} s')
