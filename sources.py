"""
Where public data are, how they come here, and how each of their forms becomes rows of our own.

  SOURCES     name -> kind, size, licence, what it is, URLs
  fetch       name -> paths on disk, after downloading what is missing; what broke off goes on where it broke
  read_file   path -> items: documents, conversations, ranked answers, prompts, questions to be examined on

Fatal are only the user's own mistakes: broken rows and pages in public files are counted, and left out.

the list of sources    $ python sources.py
"""
import contextlib, csv, email.utils, errno, gzip, hashlib, io, json, lzma, os, re, sys, tarfile, time
import zipfile, zlib

import requests

from extract import read_as
from forms import EXAMS, FORMS, read_row
from model import RANK, die, print0
from warc import LIMIT, warc_pages

# -----------------------------------------------------------------------------
# where: {a,b} are files that come together; of {00..20} a run takes the first n_files. Sizes are of all, or of one such
# file, and about; licences are of the data. Books to stackexchange is what LLaMA (Touvron et al. 2023) mixes with the
# web, as Dolma has it (Soldaini et al. 2024).
PLACES = {r'hub:([^/]+/[^/]+)': r'https://huggingface.co/datasets/\1/resolve/main', 'openai:':
          'https://openaipublic.blob.core.windows.net/', 'github:': 'https://raw.githubusercontent.com/', 'tasks:':
          'https://raw.githubusercontent.com/mosaicml/llm-foundry/main/scripts/eval/local_data/', 'dolma:':
          'https://olmo-data.org/dolma-v1_7/'}
SOURCES = {
    'shakespeare': ('text', '1.1 MB', 'public domain', "nanoGPT's first corpus",
                    'github:karpathy/char-rnn/master/data/tinyshakespeare/input.txt'),
    'tinystories': ('text', '2.2 GB', 'CDLA-Sharing-1.0', 'stories for children, by GPT-4',
                    'hub:roneneldan/TinyStories/TinyStoriesV2-GPT4-train.txt'),
    'c4': ('text', '320 MB', 'ODC-BY', 'pages of 2019', 'hub:allenai/c4/en/c4-train.{00000..01023}-of-01024.json.gz'),
    'openwebtext': ('text', '620 MB', 'CC0', "pages that Reddit liked, after GPT-2's WebText",
                    'hub:Skylion007/openwebtext/subsets/urlsf_subset{00..20}.tar'),
    'fineweb': ('tokens', '200 MB', 'ODC-BY', '100M GPT-2 tokens a file; the first is for validation',
                'hub:kjj0/fineweb10B-gpt2/fineweb_val_000000.bin',
                'hub:kjj0/fineweb10B-gpt2/fineweb_train_{000001..000103}.bin'),
    'fineweb_text': ('text', '2.1 GB', 'ODC-BY', 'the same as text, in parquet: needs pyarrow',
                     'hub:HuggingFaceFW/fineweb/sample/10BT/{000..014}_00000.parquet'),
    'commoncrawl': ('text', '1 GB, WET 0.1', 'commoncrawl.org', 'raw web pages, or their text',
                    'https://data.commoncrawl.org/crawl-data/CRAWL/KIND.paths.gz'), # the list of the files of a crawl
    'books': ('text', '3 GB', 'public domain', 'Project Gutenberg', 'dolma:books/books-{0000..0002}.json.gz'),
    'wikipedia': ('text', '3 GB', 'CC BY-SA', 'Wikipedia and Wikibooks', 'dolma:wiki/wiki-{0000..0001}.json.gz'),
    'github': ('text', '5 GB', 'permissive', 'code of The Stack', 'dolma:starcoder/starcoder-{0000..0048}.json.gz'),
    'arxiv': ('text', '300 MB', "the authors'", 'papers in LaTeX', 'dolma:redpajama-arxiv/arxiv-{0000..0099}.json.gz'),
    'stackexchange': ('text', '900 MB', 'CC BY-SA', 'questions and answers',
                      'dolma:redpajama-stackexchange/stackexchange-{0000..0025}.json.gz'),
    'alpaca': ('chat', '23 MB', 'CC BY-NC 4.0', '52k instructions, answers by GPT-3.5',
               'github:tatsu-lab/stanford_alpaca/main/alpaca_data.json'),
    'dolly': ('chat', '13 MB', 'CC BY-SA 3.0', '15k instructions, answers by people',
              'hub:databricks/databricks-dolly-15k/databricks-dolly-15k.jsonl'),
    'oasst1': ('chat, preferences', '40 MB', 'Apache-2.0', 'conversations by people, answers ranked',
               'hub:OpenAssistant/oasst1/2023-04-12_oasst_ready.trees.jsonl.gz'),
    'oasst2': ('chat, preferences', '54 MB', 'Apache-2.0', 'more of them, with those of oasst1',
               'hub:OpenAssistant/oasst2/2023-11-05_oasst2_ready.trees.jsonl.gz'),
    'gsm8k': ('chat, prompts', '4 MB', 'MIT', '7,473 sums in words, with checks',
              'github:openai/grade-school-math/master/grade_school_math/data/train.jsonl'),
    'hh': ('preferences', '90 MB', 'MIT', 'pairs for help and harm (offensive questions)', 'hub:Anthropic/hh-rlhf/'
           '{helpful-base,helpful-rejection-sampled,helpful-online,harmless-base}/train.jsonl.gz'),
    'openai_sentiment': ('preferences', '10 MB', 'not stated', 'best of 4 ends of a text (Ziegler et al. 2019)',
                         'openai:lm-human-preferences/labels/sentiment/offline_5k.json'),
    'openai_descriptiveness': ('preferences', '10 MB', 'not stated', 'the same texts, another taste',
                               'openai:lm-human-preferences/labels/descriptiveness/offline_5k.json'),
    'helpsteer2': ('preferences', '20 MB', 'CC BY 4.0', '10k pairs, rated by people',
                   'hub:nvidia/HelpSteer2/train.jsonl.gz'),
    'ultrafeedback': ('preferences', '940 MB', 'MIT', '64k prompts with 4 answers, rated by GPT-4',
                      'hub:openbmb/UltraFeedback/{evol_instruct,false_qa,flan,sharegpt,truthful_qa,ultrachat}.jsonl'),
    'core': ('benchmarks', '70 MB', 'mixed', 'the 22 tasks of CORE (Li et al. 2024); hellaswag counts twice',
        'tasks:commonsense_reasoning/{commonsense_qa,copa,openbook_qa,piqa}.jsonl',
        'tasks:language_understanding/{bigbench_language_identification,hellaswag,lambada_openai}.jsonl',
        'tasks:language_understanding/{winograd_wsc,winogrande}.jsonl',
        'tasks:reading_comprehension/{boolq,coqa,squad}.jsonl',
        'tasks:symbolic_problem_solving/{agi_eval_lsat_ar,bigbench_cs_algorithms,bigbench_dyck_languages}.jsonl',
        'tasks:symbolic_problem_solving/{bigbench_operators,bigbench_repeat_copy_logic}.jsonl',
        'tasks:world_knowledge/{arc_challenge,arc_easy,bigbench_qa_wikidata,jeopardy_all}.jsonl'),
    'mmlu': ('benchmarks', '166 MB', 'MIT', '57 subjects', 'https://people.eecs.berkeley.edu/~hendrycks/data.tar'),
    'arc': ('benchmarks', '1 MB', 'CC BY-SA', 'school science', 'tasks:world_knowledge/{arc_easy,arc_challenge}.jsonl'),
    'hellaswag': ('benchmarks', '12 MB', 'MIT', 'what happens next? (validation)',
                  'github:rowanz/hellaswag/master/data/hellaswag_val.jsonl'),
    'lambada': ('benchmarks', '1.8 MB', 'CC BY', 'the last word of a passage', 'openai:gpt-2/data/lambada_test.jsonl'),
    'humaneval': ('benchmarks', '45 KB', 'MIT', '164 Python functions',
                  'https://github.com/openai/human-eval/raw/master/data/HumanEval.jsonl.gz'),
    'gsm8k_test': ('benchmarks', '0.7 MB', 'MIT', '1,319 sums in words',
                   'github:openai/grade-school-math/master/grade_school_math/data/test.jsonl')}

def urls_of(name, n_files):
    """The URLs of a source, written out: {a,b} whole, of {00..20} the first n_files."""
    for url in SOURCES[name][4:]:
        for short, place in PLACES.items():
            url = re.sub(f'^{short}', place, url)
        start, braces, end = re.fullmatch(r'([^{]*)\{?([^}]*)\}?(.*)', url).groups()
        first, dots, last = braces.partition('..')
        numbers = range(int(first), int(last) + 1)[:n_files] if dots else ()
        parts = [f'{i:0{len(first)}d}' for i in numbers] if dots else braces.split(',')
        yield from (start + part + end for part in parts)

# -----------------------------------------------------------------------------
# downloading
TIMEOUT = (10, 60)       # seconds to connect, and between two pieces of the body
TRIES = 6                # tries in a row that bring nothing new
WAIT, MAX_WAIT = 1, 600  # seconds to the next try, doubled each time; the most, whatever a server asks for

def attempt(url, part, path):
    """One request for what part lacks -> (what went wrong or '', seconds to wait that the server asks for)."""
    note, have = {}, 0
    with contextlib.suppress(OSError, ValueError): # part counts only beside a note that says what it is a part of
        with open(f'{part}.json', encoding='utf-8') as f:
            note = json.load(f)
        have = os.path.getsize(part) if note else 0
    if have and have == note['total']:
        return '', 0 # stopped between the last byte and the renaming
    headers = {'Accept-Encoding': 'identity'} | ({'Range': f'bytes={have}-'} if have else {})
    if have and note['version']:
        headers['If-Range'] = note['version'] # what has changed comes whole
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as r:
        get, wait = r.headers.get, 0
        if r.status_code in (408, 425, 429) or r.status_code >= 500:
            for read in int, lambda date: email.utils.parsedate_to_datetime(date).timestamp() - time.time():
                with contextlib.suppress(TypeError, ValueError):
                    wait = read(get('Retry-After', ''))
            return f'HTTP {r.status_code}', wait
        version = re.sub('^W/.*', '', get('ETag', '')) or get('Last-Modified', '') # a weak tag promises too little
        span = re.match(r'bytes (\d+)-\d+/(\d+|\*)$', get('Content-Range', ''))
        if r.status_code == 416 or r.status_code == 206 and not (
                span and int(span[1]) == have and version in ('', note['version'])
                and span[2] in ('*', str(note['total'] or span[2]))):
            os.remove(part)
            return 'not the file that it was, it starts over', 0
        if r.status_code not in (200, 206):
            die(f'{url}: HTTP {r.status_code} {r.reason}: put the file at {path} yourself, or take another source')
        if re.search(r'\.t?gz$', path): # then gzip is no coding of the body, but the body
            r.raw.headers.pop('Content-Encoding', None)
        coded = r.raw.headers.get('Content-Encoding', 'identity') != 'identity'
        have = begin = have if r.status_code == 206 else 0
        total = have + int(get('Content-Length')) if get('Content-Length', '').isdigit() and not coded else None
        with open(part, 'ab') as f:
            if not have: # the note comes before the first byte; an empty one where bytes here are not bytes there
                f.truncate(0)
                with open(f'{part}.json', 'w', encoding='utf-8') as g:
                    json.dump({} if coded else dict(version=version, total=total), g)
            started = shown = time.time()
            for block in r.iter_content(1 << 15):
                have += f.write(block)
                if RANK == 0 and time.time() - shown > 1 and sys.stderr.isatty():
                    shown, speed = time.time(), (have - begin) / (time.time() - started)
                    left = f'of {total / 1e6:,.0f} MB, {(total - have) / speed:,.0f} s left' if total else 'MB'
                    print(f'\r{path}: {have / 1e6:,.0f} {left}, {speed / 1e6:.1f} MB/s ', end='', file=sys.stderr)
            print(end='\n' * (shown > started), file=sys.stderr)
    return '' if total in (None, have) else f'{have:,} of {total:,} bytes came', 0

def download(url, path, size=None, sha256=None):
    """
    Bring url to path, whole or not at all; -> path. A file that is there is not asked for again. Until it is whole it
    is path.part, with which a later try, or run, goes on if the server still has the same version of it.
    """
    if os.path.exists(path):
        return path
    part, fails, most, spoilt = f'{path}.part', 0, 0, 0
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    while fails < TRIES and spoilt < 2:
        try:
            problem, wait = attempt(url, part, path)
        except (ValueError, requests.TooManyRedirects, requests.exceptions.SSLError) as e: # waiting will not help
            die(f'{url}: {" ".join(str(e).split())}')
        except requests.RequestException as e: # which is an OSError too
            problem, wait = type(e).__name__, 0
        except OSError as e:
            full = ': make room, the same command goes on from there' * (e.errno in (errno.ENOSPC, errno.EDQUOT))
            die(f'cannot write {part}: {e.strerror}{full}')
        have = os.path.getsize(part) if os.path.exists(part) else 0
        if not problem:
            digest = hashlib.sha256()
            with open(part, 'rb') as f:
                while sha256 and (block := f.read(1 << 20)):
                    digest.update(block)
            if size in (None, have) and sha256 in (None, digest.hexdigest()):
                os.replace(part, path)
                os.remove(f'{part}.json')
                print0(f'{path}: {have / 1e6:,.1f} MB')
                return path
            os.remove(part)
            problem, spoilt = f"{have:,} bytes{f', not {size:,}' if size else ''}: not the right file", spoilt + 1
        fails, most = fails + 1 if have <= most else 0, max(most, have)
        print0(f'{url}: {problem}')
        time.sleep(min(max(WAIT * 2**fails / 2, wait), MAX_WAIT))
    die(f'{url}: {problem}: run again later (what came is kept), or put the file at {path} yourself')

def fetch(name, folder, n_files=1, rank=0, world=1, crawl='CC-MAIN-2025-51', wet=False):
    """Download this rank's share of a source into folder/name -> the paths of all ranks' files, always in one order."""
    if name not in SOURCES:
        die(f"no source '{name}'; there are {', '.join(SOURCES)}")
    folder, urls = os.path.join(folder, name), list(urls_of(name, n_files))
    if name == 'commoncrawl':
        kind = 'wet' if wet else 'warc'
        listing = f'{folder}/{crawl}.{kind}.paths.{rank}.gz' # each rank has its own: no two write one file
        download(urls[0].replace('CRAWL', crawl).replace('KIND', kind), listing)
        try:
            with gzip.open(listing, 'rt', encoding='utf-8') as f:
                lines = f.read().split()
        except (EOFError, OSError, ValueError, zlib.error) as e:
            die(f'{listing} is no list of files ({e}): delete it')
        n = min(n_files, len(lines)) # spread evenly over the crawl
        urls = [re.match(r'\w+://[^/]+/', urls[0])[0] + lines[i * len(lines) // n] for i in range(n)]
    files = [url.split('/')[-1] for url in urls]
    if len({*files}) < len(files): # hh has four train.jsonl.gz
        files = ['-'.join(url.split('/')[-2:]) for url in urls]
    paths = [f'{folder}/{file}' for file in files]
    for url, path in list(zip(urls, paths))[rank::world]:
        download(url, path)
    return paths

# -----------------------------------------------------------------------------
# reading files
DAMAGED = (EOFError, OSError, RuntimeError, ValueError, zlib.error, lzma.LZMAError, tarfile.TarError,
           zipfile.BadZipFile, csv.Error) # what reading a damaged file may raise; RecursionError is a RuntimeError

def read_text(f, whole, skipped):
    """
    Yield the documents of a text file: what stands between <|endoftext|> marks; without any the whole, or pieces of
    about 4,000 characters, each to a blank line, as for all that is very long.
    """
    stream, buf, marked, end = io.TextIOWrapper(f, read_as(f.peek())[0], 'replace'), '', False, False
    while not end:
        buf += (block := stream.read(1 << 20).replace('\ufeff', ''))
        end, marked = not block, marked or '<|endoftext|>' in buf
        if marked:
            *parts, buf = buf.split('<|endoftext|>')
            yield from parts + [buf] * end
            if len(buf) > LIMIT:
                skipped['document over 50 MB'] += 1
                buf = ''
        elif whole and end:
            yield buf
        elif end or len(buf) > LIMIT // 4:
            at, whole = 0, False
            while first := re.compile(r'\S').search(buf, at):
                blank = re.compile(r'\n\s*\n').search(buf, first.start() + 4000)
                if not blank and not end and len(buf) - first.start() < LIMIT // 4:
                    break
                at = blank.start() if blank else len(buf)
                yield buf[first.start():at]
            buf = buf[at:]

def read_json(f, where, maybe_list, own, skipped):
    """Yield (line, object) of JSON lines, or of a list. A bad line is fatal in the user's own files."""
    number = 0
    try:
        listed = maybe_list and f.peek(64).lstrip()[:1] == b'['
        for number, line in enumerate(json.load(f) if listed else iter(lambda: f.readline(LIMIT), b''), 1):
            if not listed and len(line) == LIMIT:
                skipped['row over 50 MB'] += 1
                while line and line[-1:] != b'\n':
                    line = f.readline(LIMIT)
            elif listed or line.strip():
                try:
                    row = line if listed else json.loads(line.decode('utf-8-sig'))
                    if not isinstance(row, dict):
                        raise ValueError(f'a JSON object is expected, this is {type(row).__name__}')
                except (ValueError, RecursionError) as e:
                    if own:
                        die(f'{where}:{number}: not a JSON line: {e}')
                    skipped['row that is no JSON object'] += 1
                else:
                    yield number, row
    except DAMAGED as e:
        if own:
            die(f'{where}: after line {number}: the file is damaged ({e})')
        skipped['damaged file'] += 1

def read_mmlu(f, where, own, skipped):
    """Yield the questions of a .csv of MMLU, in the words of CORE's commonsense_qa."""
    subject, part = re.search(r'([^/]*?)_?(test|dev|val|)\.csv', where).groups()
    for line, row in enumerate(csv.reader(io.TextIOWrapper(f, 'utf-8-sig', 'replace', '')), 1):
        if len(row) != 6 or row[5] not in tuple('ABCD'):
            if own:
                die(f'{where}:{line}: a .csv is read as MMLU: question, A, B, C, D, answer; this line is not')
            skipped['row that does not fit its form'] += 1
        elif part in ('dev', 'val') or 'auxiliary_train' in where:
            skipped["MMLU's rows to practise on"] += 1
        else:
            choices = '\n'.join(f'{letter}. {choice}' for letter, choice in zip('ABCD', row[1:5]))
            yield dict(query=f'Question: {row[0]}\nChoices:\n{choices}\nAnswer:', choices=[*'ABCD'],
                       gold='ABCD'.index(row[5]), subject=subject.replace('_', ' '))

def read_rows(rows, where, source, skipped):
    """The items of (line, row)s. A row that is nothing we know is fatal in the user's own files."""
    own, last, exam = source == 'files', None, SOURCES.get(source, [''])[0] == 'benchmarks'
    name = source.replace('_test', '')
    if own or source in ('core', 'arc'): # where a file is a benchmark
        name = re.sub(r'(\.(jsonl?|gz|xz|parquet))+$', '', os.path.basename(where))
    for line, row in rows:
        try:
            items = list(read_row(row, last, FORMS | EXAMS if exam else FORMS))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
            if own:
                die(f'{where}:{line}: {e if isinstance(e, ValueError) else f"not what its keys promise ({e!r})"}')
            items = [(None, 'row that does not fit its form')]
        for kind, new in items:
            if kind == 'text' and new['text']:
                yield dict(new, kind=kind, url=str(row.get('url') or f'{where}:{line}'))
            elif kind and kind != 'text':
                yield dict(kind=f'benchmarks/{name}' if kind == 'benchmarks' else kind, row=new)
            elif not kind:
                skipped[new] += 1
        last = row

def read_stream(f, where, source, skipped, depth=0):
    """The items of an open file; in an archive, `where` is its place there."""
    own, name = source == 'files', where.lower()
    if re.search(r'\.(warc|wet)(\.gz)?$', name):
        for url, media, page in warc_pages(f, name.endswith('.gz'), skipped):
            yield dict(kind='text', url=url, **(dict(type=media, html=page) if media else dict(text=page)))
        return
    while packed := re.search(r'\.(gz|xz|tgz)$', name):
        f, name = (lzma if packed[1] == 'xz' else gzip).open(f), name[:packed.start()] + '.tar' * (packed[1] == 'tgz')
    f = io.BufferedReader(f, 1 << 20)
    if name.endswith('.zip'):
        with zipfile.ZipFile(f) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    yield from read_stream(archive.open(info), f'{where}/{info.filename}', source, skipped, depth + 1)
    elif (name.endswith('.tar') or f.peek(262)[257:262] == b'ustar') and depth < 3: # in OpenWebText, x.xz is a tar
        with tarfile.open(fileobj=f, mode='r|') as archive:
            archive.fileobj.seekable = lambda: False # which io asks, and tarfile's stream does not say
            for member in archive:
                if member.isfile():
                    file = archive.extractfile(member)
                    yield from read_stream(file, f'{where}/{member.name}', source, skipped, depth + 1)
    elif name.endswith('.parquet'):
        try:
            import pyarrow.parquet
        except ImportError:
            die(f'{where}: parquet needs one more package: pip install pyarrow')
        batches = pyarrow.parquet.ParquetFile(f).iter_batches(100)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from read_rows(enumerate(rows, 1), where, source, skipped)
    elif re.search(r'\.jsonl?$', name):
        rows = read_json(f, where, name.endswith('.json'), own, skipped)
        yield from read_rows(rows, where, source, skipped)
    elif name.endswith('.csv'):
        yield from (dict(kind='benchmarks/mmlu', row=row) for row in read_mmlu(f, where, own, skipped))
    elif re.search(r'\.html?$', name):
        if len(page := f.read(LIMIT + 1)) <= LIMIT:
            yield dict(kind='text', url=where, type='text/html', html=page)
        else:
            skipped['page over 50 MB'] += 1
    elif re.search(r'\.(txt|md)$', name):
        texts = enumerate(read_text(f, depth > 0, skipped))
        yield from (dict(kind='text', url=f'{where}#{i}', text=text) for i, text in texts if text.strip())
    else:
        skipped['file of an unknown kind'] += 1

KNOWN = r'\.(txt|md|html?|jsonl?|csv|warc|wet|parquet|bin|tar|tgz|zip|(jsonl?|csv|txt|warc|wet|tar)\.(gz|xz))$'

def read_file(path, source, skipped):
    """
    Yield what is in a file: {kind: 'text', source, url, and text or type, html}, {kind, source, row} of the kinds chat,
    preferences, prompts and benchmarks/NAME, or {kind: 'tokens', source, path}. source: a name of SOURCES, or 'files'
    for the user's own; then the file's name is the source, and a bad row is fatal. `skipped` counts what is left out.
    """
    name = re.sub(r'(\.(txt|md|jsonl?|html?|csv|warc|wet|parquet|bin|tar|tgz|zip|gz|xz))+$', '', os.path.basename(path))
    label = (re.sub(r'[-_]\d+$|\d{3,}$', '', name) or name) if source == 'files' else source
    if path.endswith('.bin'):
        yield dict(kind='tokens', source=label, path=path)
        return
    try:
        with open(path, 'rb') as f:
            yield from (dict(item, source=label) for item in read_stream(f, path, source, skipped))
    except DAMAGED as e:
        if source == 'files':
            die(f'{path}: the file is damaged ({e})')
        print0(f'{path}: damaged, the rest is left out ({e})')
        skipped['damaged file'] += 1

if __name__ == '__main__':
    print(f"{'name':<23}{'kind':<18}{'files':>6}  {'size about':<14}{'licence':<18}what it is")
    for name, (kind, size, licence, what, *_) in SOURCES.items():
        n = len([*urls_of(name, 10**6)]) if name != 'commoncrawl' else 'many'
        print(f'{name:<23}{kind:<18}{n:>6}  {size:<14}{licence:<18}{what}')
