"""
Stage 0: data. Raw pages, books and conversations in; a clean, mixed corpus out.

The steps are those of FineWeb, in its order (Penedo et al. 2024), fit for files of Common Crawl:
    url -> html to text -> language -> repetition -> quality -> C4 -> FineWeb's own -> duplicates -> personal data
    -> benchmark questions -> mixture -> train and val
By default they run on Toytown, a miniature internet with planted faults that toytown.py builds in data_dir/raw, with
conversations about the same little town. No step sees the list of what was planted; only its score, at the end, does.
Left out: models as judges of quality (FineWeb-Edu, DCLM), other languages' stop words and punctuation.

the toy world           $ python prepare_data.py config/tiny.py
your own files          $ python prepare_data.py --source=files --files=notes.txt,crawl/*.warc.gz --data_dir=data/mine
one file of the web     $ python prepare_data.py --source=commoncrawl --data_dir=data/cc
LLaMA's mixture         $ python prepare_data.py config/llama_mixture.py        (python sources.py lists what there is)
all cores               $ torchrun --standalone --nproc_per_node=16 prepare_data.py --source=commoncrawl --n_files=64
a crawl on four nodes   $ torchrun --nnodes=4 --nproc_per_node=64 --rdzv_backend=c10d --rdzv_endpoint=NODE0:29500 \\
                            prepare_data.py --source=commoncrawl --n_files=1000 --data_dir=/disk/cc --raw_dir=/disk/raw
Ranks share the files, of which there should be several for each; any number of ranks writes the same corpus, byte for
byte. Both folders lie where every node sees them. A thousand WARC files are 1 TB to download (a rank deletes nothing)
and 2 million pages that stay; rank 0 holds the duplicate index, half a kilobyte a page, and every other rank one
document. Whatever is killed goes on where it was: what a finished file gave is in data_dir/.partial until the end.
"""
import array, collections, datetime, functools, glob, gzip, hashlib, itertools, json, os, pathlib, re, shutil
import time
from types import SimpleNamespace

import numpy as np
import torch.distributed as dist

import model
from configurator import configure
from dedup import FACTOR, grams, near_duplicates, signature, words_of
from extract import decode, html_to_text
from language import CODES, language_scores
from model import RANK, atomic, check_settings, die, print0, read_jsonl, write_jsonl
from privacy import KINDS, hide
from sources import KNOWN, SOURCES, download, fetch, read_file

# -----------------------------------------------------------------------------
# settings
# what comes in and goes out
source = 'toytown'          # toytown: a world made here; files: those below; or public data: `python sources.py`
files = ''                  # for source = files: names, folders and patterns with *, separated by commas
data_dir = 'data/toytown'   # where everything is written
raw_dir = 'data/raw'        # where downloads stay, for every data_dir; one that is there is not asked for again
n_files = 1                 # how many files of each source that comes in many
crawl = 'CC-MAIN-2025-51'   # which one of Common Crawl
wet = False                 # its files of text, a tenth as large, instead of its pages
chat_as_text = False        # also put the text of conversations into the corpus
keep_dropped = 20           # of each reason this many dropped documents are put into dropped.jsonl, for looking at
seed = 1337                 # of the world, and of the choice of documents
# toytown
world = 'config/toytown.json' # names, facts, templates, tasks: edit it
n_people = 60               # inhabitants, with six facts each
n_pages = 5000              # good web pages
n_books = 1600              # pages of stories
n_lessons = 1300            # pages of sums, lists and notes
n_faults = 300              # pages planted with each kind of fault
val_facts = 0.3             # share of facts and sums that are never asked in training data
n_chat = 3000               # conversations to train on
n_preferences = 1500        # ranked answers to train on
n_prompts = 4000            # prompts to train on
n_val = 200                 # of each to validate on (of prompts half as many again)
flaw_rate = 0.4             # share of demonstrations by a tired contractor
like_rate = 0.3             # share of the others that end with a friendly phrase
labeller_noise = 0.2        # of the simulated labeller: standard deviation, in units of the gold score
# the steps, with the source of each threshold
filters = 'url,language,repetition,quality,c4,fineweb,dedup,pii,decontaminate' # those to run
curated = 'books,lessons,github,wikipedia,arxiv,stackexchange,shakespeare' # chosen by somebody: no language, no quality
blocked_hosts = 'free-prizes.example,spamfarm.example,click-here.example,malware-zone.example' # + lists: paths, URLs
blocked_words = 'casino,poker,porn,sex,xxx,viagra,betting,jackpot' # as whole words of a URL
languages = 'en'            # those to keep, as in en,de: config/languages.json has the others
min_language = 0.65         # language score 0..1 (FineWeb has 0.65 of fastText's)
max_repeated_lines = (0.3, 0.2) # Gopher (Rae et al. 2021, A1.1): share of lines that stood before, of their characters
max_repeated_paragraphs = (0.3, 0.2) # Gopher: the same of paragraphs
max_top_ngram = (0.20, 0.18, 0.16) # Gopher: share of characters in the most frequent 2-, 3-, 4-gram
max_repeated_ngrams = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10) # Gopher: share in 5- to 10-grams that stood before
page_words = (50, 100_000)  # Gopher: fewest and most words
word_length = (3, 10)       # Gopher: mean, in characters
max_symbols = 0.1           # Gopher: '#' and '...' per word
max_marked_lines = (0.9, 0.3) # Gopher: share of lines that start with a bullet, and that end in '...'
min_alphabetic = 0.8        # Gopher: share of words with a letter in them
min_stop_words = 2          # Gopher: how many of the, be, to, of, and, that, have, with
min_line_words = 3          # C4 (Raffel et al. 2020, 2.2): shorter lines are cut out
min_sentences = 5           # C4: fewest of a page
min_punctuated = 0.12       # FineWeb: share of lines that end like a sentence
max_line_repeats = 0.1      # FineWeb: share of characters in lines that stood before
max_short_lines = 0.67      # FineWeb: share of lines under 30 characters
near_duplicate = 0.7        # share of equal hashes from which two texts are one (FineWeb's 14 x 8 finds from 0.75)
drop_private = ''           # personal data whose pages are dropped, as in SSN,CARD; others get a placeholder
# the corpus
mixture = ''                # shares of bytes, as in web:0.7,books:0.3; '' = toytown's own, or everything
max_epochs = 1              # a source too small for its share may be repeated (Muennighoff et al. 2023: 4 are fine)
val_fraction = 0.05         # share of documents, and of prompts from files, to validate on
shard_bytes = 50_000_000    # of text in one file of documents
config = configure(globals())
start_time, world_size = time.time(), int(os.environ.get('WORLD_SIZE', 1))
ONE_BY_ONE = 'url text language repetition quality c4 fineweb'.split() # steps that need no other document
STEPS = [*ONE_BY_ONE, 'dedup', 'pii', 'decontaminate']
for name, given, known in (('source', source, ['toytown', 'files', *SOURCES]), ('filters', filters, STEPS)):
    if wrong := set(filter(None, given.split(','))) - set(known):
        die(f"{name} = '{given}' has no {', '.join(sorted(wrong))}; known are {','.join(known)}")
if 'toytown' in source and source != 'toytown':
    die(f"source = '{source}': toytown stands alone, its exams know what its documents tell")
check_settings(config)
if wrong := set(languages.split(',')) - set(CODES):
    die(f"languages = '{languages}' has no {', '.join(sorted(wrong))}; known are {','.join(CODES)}")
if not re.fullmatch(r'([^:,]+:\s*\d*\.?\d+\s*(,|$))*', mixture):
    die(f"mixture = '{mixture}' is not of the form web:0.7,books:0.3")
shares_of = lambda text: {k.strip(): float(v) for k, v in (part.split(':') for part in text.split(',') if part)}
weights = shares_of(mixture)
if world_size > 1: # days: a rank with a slow file keeps the others waiting
    dist.init_process_group('gloo', timeout=datetime.timedelta(days=30))
barrier = dist.barrier if world_size > 1 else lambda: None

# -----------------------------------------------------------------------------
# what comes in. All is made in a folder of its own: what an earlier run left stays whole until the end
tmp, TASKS = f'{data_dir}/.partial', ('chat', 'preferences', 'prompts')
is_input = lambda path: re.search(KNOWN, path) and not re.search('raw.truth.jsonl$', path) # what is planted is no input
ours = [f'{kind}_{side}.jsonl' for kind in TASKS for side in ('train', 'val')]
ours += ['train', 'val', 'benchmarks', 'dropped.jsonl', 'funnel.json'] + ['raw'] * (source == 'toytown')
inputs = []
if 'files' in source.split(','):
    files or die('no files: name them, --files=notes.txt,web/*.warc.gz')
    for name in map(os.path.expanduser, files.split(',')):
        pattern = f'{name}/**' if os.path.isdir(name) else name
        found = [name] if os.path.isfile(name) else glob.glob(pattern, recursive=True)
        inputs += [('files', path) for path in sorted(found) if is_input(path) and os.path.isfile(path)] or die(
            f'no file {name} of a known kind: .txt .md .html .jsonl .json .csv .warc .wet .tar .zip .parquet, also .gz')
if lost := [path for _, path in inputs if os.path.relpath(path, data_dir).split(os.sep)[0] in ours]:
    die(f'{lost[0]} would be replaced by what is made of it: move it out of {data_dir}')
code = [os.path.join(os.path.dirname(os.path.abspath(__file__)), f'{name}.py')
        for name in 'prepare_data dedup extract forms language privacy sources toytown warc'.split()]
about = [config, [(path, *os.stat(path)[6:9:2]) for path in [*(path for _, path in inputs), *code]]]
about = json.dumps([about, os.path.getmtime(world) if os.path.exists(world) else 0])
if RANK == 0 and not (os.path.exists(f'{tmp}/about') and open(f'{tmp}/about', encoding='utf-8').read() == about):
    shutil.rmtree(tmp, ignore_errors=True) # of other settings, files or code
    for name in 'work', 'raw': # raw: of toytown
        os.makedirs(f'{tmp}/{name}')
    with open(f'{tmp}/about', 'w', encoding='utf-8') as f:
        f.write(about)
barrier()

if source == 'toytown':
    import toytown
    town = toytown.load(world, seed, n_people, val_facts)
    weights = weights or shares_of(town['mixture'])
    if RANK == 0 and not os.path.exists(f'{tmp}/raw/truth.jsonl'):
        toytown.write_tasks(town, tmp, n_chat, n_preferences, n_prompts, n_val, flaw_rate, like_rate, labeller_noise)
        toytown.write_benchmarks(town, f'{tmp}/benchmarks')
        toytown.write_web(town, f'{tmp}/raw', n_pages, n_books, n_lessons, n_faults, blocked_hosts, blocked_words)
    barrier()
    inputs = [('files', path) for path in sorted(glob.glob(f'{glob.escape(tmp)}/raw/*')) if is_input(path)]
model.QUIET = False # from here each rank has files of its own, and errors of its own
for name in source.split(','):
    if name in SOURCES:
        inputs += [(name, path) for path in fetch(name, raw_dir, n_files, RANK, world_size, crawl, wet)]
barrier()

# -----------------------------------------------------------------------------
# the steps: each takes a document, may change its text, and returns why the document is dropped, or None
def block_list(names):
    """'spam.example,lists/adult.txt,https://...' -> set of hosts. A list has a host at the end of each line."""
    hosts = set()
    for name in filter(None, names.split(',')):
        if '://' in name:
            path = f'{raw_dir}/block_lists/{key_of(name):016x}' + '.gz' * name.endswith('.gz')
            if RANK == 0 and not os.path.exists(path):
                download(name, path)
            barrier()
            name = path
        if os.path.isfile(name):
            with (gzip.open if name.endswith('.gz') else open)(name, 'rt', encoding='utf-8', errors='replace') as f:
                hosts.update(line.split()[-1].lower() for line in f if line.strip() and line.lstrip()[0] != '#')
        else:
            hosts.add(name.lower())
    return hosts

def url_step(doc):
    """FineWeb (Penedo et al. 2024): blocked hosts, blocked words (whole ones: Essex is a county); and bare IPs."""
    host = re.match(r'\w+://(?:[^/@]*@)?(\[[^]]*\]|[^/:?#]*)', doc['url'].lower())
    if not host: # a file of one's own
        return None
    if re.fullmatch(r'[\d.]+|\[.*', host[1]):
        return 'IP address'
    parts = host[1].split('.')
    if any('.'.join(parts[i:]) in blocked for i in range(len(parts))): # with its subdomains
        return 'blocked host'
    return 'blocked word' if bad_words & set(re.findall('[a-z0-9]+', doc['url'].lower())) else None

def text_step(doc):
    text = html_to_text(decode(doc.pop('html'), doc['type'])) if 'html' in doc else doc['text']
    text = text.encode('utf-8', 'replace').decode().replace('\0', '').replace('\xa0', ' ') # no lone surrogates
    doc['text'] = text.strip()
    return None if doc['text'] else 'no text'

def language_step(doc):
    """The page is in one of the wanted languages. FineWeb: English at fastText's 0.65."""
    scores = language_scores(doc['text'])
    return None if max(scores.get(code, 0) for code in languages.split(',')) >= min_language else max(
        scores, key=scores.get, default='no language')

@functools.lru_cache(1)
def lines_of(text):
    return [line.strip() for line in text.split('\n') if line.strip()]

def key_of(text):
    """64 bits that depend on the text alone: on every machine and in every run the same."""
    return int.from_bytes(hashlib.sha256(text.encode('utf-8', 'replace')).digest()[:8], 'big')

def repetition_step(doc):
    """Gopher (Rae et al. 2021, A1.1): said over and over? Shares of what stood before, in number and in characters."""
    lines, paragraphs = lines_of(doc['text']), re.split(r'\n\s*\n', doc['text'])
    for what, parts, limits in (('lines', lines, max_repeated_lines),
                                ('paragraphs', paragraphs, max_repeated_paragraphs)):
        again, seen = [], set()
        for part in parts:
            again += [len(part)] * (part in seen)
            seen.add(part)
        if len(again) > limits[0] * len(parts) or sum(again) > limits[1] * len(doc['text']):
            return f'repeated {what}'
    words = words_of(doc['text'])
    ends = np.cumsum([len(word) + 1 for word in words]) # as if they were joined by spaces
    starts, limits = np.append(0, ends), [*enumerate(max_top_ngram, 2), *enumerate(max_repeated_ngrams, 5)]
    hashes = single = grams(words, 1)
    for n, limit in limits: # n = 2, 3, ..., 10: each made of the one before
        if len(words) < n:
            break
        hashes = hashes[:-1] * FACTOR + single[n - 1:]
        size = ends[n - 1:] - starts[:len(hashes)] - 1 # (len(words) - n + 1,) characters
        _, first, count = np.unique(hashes, return_index=True, return_counts=True)
        if n < 5:
            most = count.argmax()
            share = count[most] * size[first[most]] * (count[most] > 1)
        else:
            size[first] = 0
            share = size.sum() # an upper bound: most texts need no more
            if share > limit * ends[-1]: # what stood before is jumped over, so that no character counts twice
                i, share, seen, size = 0, 0, set(), ends[n - 1:] - starts[:len(hashes)] - 1
                while i < len(hashes):
                    run, again = int(hashes[i]), int(hashes[i]) in seen
                    share, i = share + size[i] * again, i + (n if again else 1)
                    seen.add(run)
        if share > limit * ends[-1]:
            return f'repeated {n}-grams'

def quality_step(doc):
    """Gopher (Rae et al. 2021, A1.1): is it prose? The first rule that is not met is the reason."""
    text, words, lines = doc['text'], words_of(doc['text']), lines_of(doc['text'])
    letters = len(''.join(text.split()))
    rules = {
        'number of words': page_words[0] <= len(words) <= page_words[1],
        'word length': word_length[0] * len(words) <= letters <= word_length[1] * len(words),
        'symbols': len(re.findall(r'#|\.\.\.|…', text)) <= max_symbols * len(words),
        'bullets': sum(line[0] in '*-•‣●' for line in lines) <= max_marked_lines[0] * len(lines),
        'ellipses': sum(line.endswith(('...', '…')) for line in lines) <= max_marked_lines[1] * len(lines),
        'letters': sum(any(map(str.isalpha, word)) for word in words) >= min_alphabetic * len(words),
        'stop words': len({'the', 'be', 'to', 'of', 'and', 'that', 'have', 'with'} & set(words)) >= min_stop_words}
    return next((reason for reason, met in rules.items() if not met), None)

POLICY = re.compile('javascript|terms of use|privacy policy|cookie policy|uses? (?:of )?cookies', re.I)

def c4_step(doc):
    """C4 (Raffel et al. 2020, 2.2): lines about cookies and scripts go, short ones too; no placeholders, no code."""
    keep = lambda line: not line.strip() or len(line.split()) >= min_line_words and not POLICY.search(line)
    text = '\n'.join(line for line in doc['text'].split('\n') if keep(line))
    doc['text'] = text = re.sub(r'\n{3,}', '\n\n', text).strip()
    if len(re.findall(r'[.!?]["”’\')]*(?=\s|$)', text)) < min_sentences:
        return 'few sentences'
    return 'lorem ipsum' if 'lorem ipsum' in text.lower() else 'curly bracket' if '{' in text else None

def fineweb_step(doc):
    """FineWeb's own (Penedo et al. 2024, 3.6): lists and menus rather than sentences."""
    lines = lines_of(doc['text'])
    repeated = len(''.join(lines)) - len(''.join(set(lines)))
    rules = {'punctuation': sum(line[-1] in '.!?"”\'' for line in lines) >= min_punctuated * len(lines),
             'repeated lines': repeated <= max_line_repeats * len(doc['text']),
             'short lines': sum(len(line) < 30 for line in lines) <= max_short_lines * len(lines)}
    return next((reason for reason, met in rules.items() if not met), None)

def pii_step(doc):
    """Personal data give way to a placeholder of their kind, or the page goes."""
    doc['text'], found = hide(doc['text'], KINDS)
    doc['found'], doc['kinds'] = [what for _, what in found], [kind for kind, _ in found]
    return next((f'has {kind}' for kind in doc['kinds'] if kind in drop_private.split(',')), None)

def exam_grams(folder):
    """The runs of 13 words of the questions in a folder: sorted hashes, and of which file each is."""
    hashes, owners, names = [], [], sorted(glob.glob(f'{glob.escape(folder)}/*.jsonl'))
    for k, name in enumerate(names):
        for _, row in read_jsonl(name):
            turns = [turn['content'] for turn in row.get('messages', ())]
            right = [row[key][int(row['gold'])] for key in ('context_options', 'choices') if key in row]
            told = [row.get(key) for key in ('query', 'context', 'prompt', 'canonical_solution')] + turns + right
            new = np.unique(grams(words_of(' '.join(filter(None, told + [row.get('continuation')]))), 13))
            hashes.append(new)
            owners.append(np.full(len(new), k))
    hashes, first, count = np.unique(np.concatenate(hashes or [np.zeros(0, np.uint64)]), return_index=True,
                                     return_counts=True)
    once = count <= 10 # what more questions share is the form of an exam
    owners = np.concatenate(owners or [np.zeros(0, int)])[first[once]]
    return hashes[once], [os.path.basename(names[k])[:-6] for k in owners]

def decontaminate_step(doc):
    """A text with 13 words in a row of an exam question goes (Brown et al. 2020, C): a model must not have read it."""
    if not len(exam[0]): # no exams at hand
        return None
    have = grams(words_of(text_of(doc)), 13)
    at = np.searchsorted(exam[0], have)
    hit = np.flatnonzero(exam[0][np.minimum(at, len(exam[0]) - 1)] == have)
    return f'question of {exam[1][at[hit[0]]]}' if len(hit) else None

# -----------------------------------------------------------------------------
# the flow, in passes over the files. What a pass makes of a group of files is whole or not there: a run that was killed
# goes on with the groups that are missing
COPIES = None, 'exact', 'near'
steps = dict(url=url_step, text=text_step, language=language_step, repetition=repetition_step, quality=quality_step,
             c4=c4_step, fineweb=fineweb_step, dedup=lambda doc: doc['copy'], pii=pii_step,
             decontaminate=decontaminate_step)
steps = {name: step for name, step in steps.items() if name in ['text', *filters.split(',')]}
is_val = lambda key: key < int(val_fraction * 2**64) # of texts alike, all are on one side
blocked, bad_words = block_list(blocked_hosts), set(blocked_words.split(','))
groups, group_sizes = [], [] # of inputs; in bytes
for one in inputs: # small files make up a group; a large one is a group of its own
    if not groups or group_sizes[-1] + os.path.getsize(one[1]) > 1_000_000:
        groups.append([])
        group_sizes.append(0)
    groups[-1].append(one)
    group_sizes[-1] += os.path.getsize(one[1])
results = [f'{tmp}/work/{i:06d}' for i in range(len(groups))] # of each group; stage and kind are added to the name

def text_of(item):
    """What is told in an item, of whatever kind."""
    row = item.get('row', {})
    return item['text'] if 'text' in item else '\n\n'.join(
        [turn['content'] for turn in row.get('messages', ())] + row.get('completions', []))

def size_of(item):
    """Bytes of a page or text; of a row about."""
    return len(item['html'] if 'html' in item else item['text'].encode('utf-8', 'replace') if 'text' in item else
               json.dumps(item['row']))

def side_key(item):
    """What decides the side: the text, or the first question, for rows of every kind alike."""
    asked = [turn['content'] for turn in item.get('row', {}).get('messages', ()) if turn['role'] == 'user']
    return key_of(asked[0] if asked else text_of(item))

def passes(doc, name, step, report):
    """Run a step on a document, count it, keep examples of what it drops; -> does it stay?"""
    before = doc.get('text', doc.get('html'))
    report[name].update(docs_in=1, bytes_in=size_of(doc))
    if reason := step(doc):
        report[f'dropped {name}'][reason] += 1
        if report[f'dropped {name}'][reason] <= keep_dropped:
            text = decode(before[:2000]) if isinstance(before, bytes) else before[:2000]
            report['examples'].append(dict(step=name, reason=reason, url=doc['url'], text=text))
    else:
        report[name].update(docs_out=1, bytes_out=size_of(doc))
    if source == 'toytown': # to be compared with what was planted
        more = dict(stopped=name if reason else None, found=doc.get('found', []))
        report['fate'].setdefault(doc['url'], {}).update(more, **({'extracted': doc['text']} if name == 'text' else {}))
    return not reason

def over_groups(stage, work):
    """Call work(path of results, group, report) for the groups of this rank that have no report of this stage yet."""
    order = sorted(range(len(groups)), key=lambda i: -group_sizes[i])[RANK::world_size] # large ones first
    began, done, total = time.time(), 0, sum(group_sizes[i] for i in order)
    for i in order:
        path = results[i]
        if os.path.exists(f'{path}.{stage}.json'):
            total -= group_sizes[i]
            continue
        report = collections.defaultdict(collections.Counter, examples=[], fate={})
        work(path, groups[i], report)
        write_jsonl(f'{path}.{stage}.json', [report]) # the last of its files: it stands for all
        done += group_sizes[i]
        if time.time() - began > 5:
            rate = done / (time.time() - began)
            print0(f'{stage}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB, {rate / 1e6:.2f} MB/s, '
                   f'{(total - done) / rate / 60:.1f} minutes left')
    barrier()

def add_up(*stages):
    """The reports of all groups together: counts, what became of each page, examples of what was dropped."""
    total, fate, examples = collections.defaultdict(collections.Counter), {}, []
    for stage, path in itertools.product(stages, results):
        _, report = next(read_jsonl(f'{path}.{stage}.json'))
        for url, more in report.pop('fate').items():
            fate[url] = {**fate.get(url, {}), **more}
        examples += report.pop('examples')
        for key, counts in report.items():
            total[key].update(counts)
    return total, fate, examples

class Table:
    """What is known of each item: its label (kind and source), size, and the key that decides its side; of texts also
    the signature, to find copies. 18 bytes an item, 466 with a signature."""
    def __init__(self):
        self.labels, self.label, self.size, self.key, self.signatures = [], *map(array.array, 'HQQ'), bytearray()

    def add(self, item, signature=b''):
        if (label := f"{item['kind']} {item['source']}") not in self.labels:
            self.labels.append(label)
        self.label.append(self.labels.index(label))
        self.size.append(size_of(item))
        self.key.append(side_key(item))
        self.signatures += signature

    def save(self, path):
        with atomic(path) as partial, open(partial, 'wb') as f:
            np.savez(f, labels=np.array(self.labels, str), label=np.array(self.label, np.uint16),
                     size=np.array(self.size), key=np.array(self.key),
                     signatures=np.frombuffer(self.signatures, np.uint32).reshape(-1, 112))

def table_of(path, *names):
    with np.load(path) as f: # an array is read when it is asked for
        return SimpleNamespace(**{name: f[name] for name in names or f.files})

def read_group(group, report):
    """Yield the items of a group's files; of conversations also the text, with chat_as_text."""
    for name, path in group:
        for item in read_file(path, name, report['skipped']):
            item['url'] = str(item.get('url', '')).replace(f'{tmp}/', '')
            if item['kind'] == 'tokens': # tokenised already, no step can read it: it goes to data_dir as it is
                end = os.path.basename(path)
                shard = f"{tmp}/{'val' if 'val' in end else 'train'}_{re.sub('.*(train|val)_?', '', end)}"
                report['tokens'][item['source']] += len(model.read_shard(path))
                if not os.path.exists(shard):
                    os.symlink(os.path.abspath(path), shard)
                continue
            yield item
            if item['kind'] == 'chat' and chat_as_text and not is_val(side_key(item)):
                yield dict(kind='text', source=item['source'], url=item['url'], text=text_of(item))

def first_pass(path, group, report):
    """The steps that see one document alone; the signature of what is left."""
    table = Table()
    def kept():
        for item in read_group(group, report):
            if item['kind'] == 'text':
                report['read'].update(documents=1)
                chosen = item['source'] in curated.split(',')
                names = [name for name in steps if name in (('url', 'text') if chosen else ONE_BY_ONE)]
                if not all(passes(item, name, steps[name], report) for name in names):
                    continue
            table.add(item, signature(item['text']).tobytes() if item['kind'] == 'text' and 'dedup' in steps else b'')
            yield item
    write_jsonl(f'{path}.kept.jsonl.gz', kept())
    table.save(f'{path}.kept.npz')

def second_pass(path, group, report):
    """The steps that know of other documents, and personal data."""
    table, copies = Table(), np.load(f'{path}.copies.npy')
    def kept():
        for copy, (_, item) in zip(copies, read_jsonl(f'{path}.kept.jsonl.gz')):
            item['copy'] = COPIES[copy]
            if item['kind'] == 'text':
                if not all(passes(item, name, steps[name], report) for name in steps if name not in ONE_BY_ONE):
                    continue
                report['private'].update(item.get('kinds', ()))
            elif item['kind'] in TASKS and 'decontaminate' in steps and (reason := decontaminate_step(item)):
                report['skipped'][f"{item['kind']}: {reason}"] += 1
                continue
            table.add(item)
            yield {key: item[key] for key in ('kind', 'source', 'url', 'text', 'row') if key in item}
    write_jsonl(f'{path}.clean.jsonl.gz', kept())
    table.save(f'{path}.clean.npz')

def third_pass(path, group, report):
    """What the mixture has chosen, to its side: shards of documents, and parts of the other files."""
    table, times = table_of(f'{path}.clean.npz'), np.load(f'{path}.times.npy')
    kinds = np.array([label.split()[0] for label in table.labels] or ['none'])[table.label]
    for kind, side in itertools.product(['text', *TASKS], ('train', 'val')):
        mine = np.where((kinds == kind) & (is_val(table.key) == (side == 'val')), times, 0)
        def chosen():
            for epoch in range(mine.max(initial=0)):
                for n, (_, item) in zip(mine, read_jsonl(f'{path}.clean.jsonl.gz')):
                    if n > epoch:
                        size = size_of(item)
                        report[f'{kind} {side}'].update(rows=1, bytes=size)
                        report[f'{kind} mixture'][item['source']] += size
                        yield {k: item[k] for k in ('text', 'source', 'url')} if kind == 'text' else item['row']
        if kind == 'text':
            shards = itertools.groupby(chosen(), key=lambda _: report[f'text {side}']['bytes'] // shard_bytes)
            for k, (_, rows) in enumerate(shards):
                write_jsonl(f'{tmp}/{side}/{os.path.basename(path)}_{k:03d}.jsonl.gz', rows)
        elif mine.any():
            write_jsonl(f'{path}.{kind}_{side}.jsonl', chosen())

over_groups('kept', first_pass)
if RANK == 0 and not os.path.exists(f'{tmp}/work/copies'):
    texts = [np.array([label[:5] == 'text ' for label in t.labels] or [0], bool)[t.label]
             for t in (table_of(f'{path}.kept.npz', 'labels', 'label') for path in results)]
    ends = np.cumsum([part.sum() for part in texts], dtype=int)
    hashes, signatures = np.zeros(ends[-1], np.uint64), np.zeros((ends[-1], 112), np.uint32)
    for path, part, end in zip(results, texts, ends) if 'dedup' in steps else ():
        table, mine = table_of(f'{path}.kept.npz'), slice(end - part.sum(), end)
        hashes[mine], signatures[mine] = table.key[part], table.signatures
    first = near_duplicates(signatures, hashes, near_duplicate) if 'dedup' in steps else np.arange(ends[-1])
    code = np.where(first == np.arange(len(first)), 0, np.where(hashes == hashes[first], 1, 2))
    for path, part, end in zip(results, texts, ends):
        copies = np.zeros(len(part), np.uint8)
        copies[part] = code[end - part.sum():end]
        np.save(f'{path}.copies.npy', copies)
    del signatures
    exams = collections.defaultdict(dict)
    for path in results:
        if any(label.startswith('benchmarks') for label in table_of(f'{path}.kept.npz', 'labels').labels):
            for _, item in read_jsonl(f'{path}.kept.jsonl.gz'):
                if item['kind'].startswith('benchmarks/'): # two sources may have the same one: each row once
                    exams[item['kind']][json.dumps(item['row'], sort_keys=True)] = item['row']
    for name, rows in exams.items():
        write_jsonl(f'{tmp}/{name}.jsonl', rows.values())
        print0(f'{name}.jsonl: {len(rows):,} questions')
    pathlib.Path(f'{tmp}/work/copies').touch()
barrier()
exam = exam_grams(f'{tmp}/benchmarks') if 'decontaminate' in steps else None
over_groups('clean', second_pass)

# -----------------------------------------------------------------------------
# the mixture: how often each item is taken. Weights are of bytes, among the sources of one kind
if RANK == 0:
    total, fate, examples = add_up('kept', 'clean')
if RANK == 0 and not os.path.exists(f'{tmp}/work/times'):
    tables = [table_of(f'{path}.clean.npz', 'labels', 'label', 'size', 'key') for path in results]
    labels = sorted({label for table in tables for label in table.labels.tolist()})
    codes = [np.array([labels.index(x) for x in table.labels] or [0])[table.label] for table in tables]
    label, size, key = (np.concatenate(parts) for parts in (
        codes, [table.size for table in tables], [table.key for table in tables]))
    n_read = total['read']['documents']
    if not any(name.startswith('text ') for name in labels) and (n_read or not labels and not total['tokens']):
        lost = ', '.join(f"{name} dropped {total[name]['docs_in'] - total[name]['docs_out']:,}" for name in steps)
        die(f"no document is left of {n_read:,} ({lost}); --filters=dedup,pii runs fewer steps" if n_read else
            f'{files or source}: nothing is in there, neither documents nor conversations')
    known = {name.split(' ', 1)[1] for name in labels}
    if missing := set(weights) - known:
        die(f"mixture: no documents from {', '.join(sorted(missing))}; there are {', '.join(sorted(known)) or 'none'}")
    rng, times = np.random.default_rng(seed), np.zeros(len(label), np.uint8)
    for kind in dict.fromkeys(name.split()[0] for name in labels):
        here = {name.split(' ', 1)[1]: i for i, name in enumerate(labels) if name.split()[0] == kind}
        have = {name: max(1, int(size[label == i].sum())) for name, i in here.items()} # bytes
        wanted = {name: weights[name] for name in weights if name in here and weights[name]} or have
        most = [have[name] / weight for name, weight in wanted.items()]
        budget = min(max_epochs * min(most), max(most)) # until one would be repeated too often, or all are used
        for name, weight in wanted.items():
            rows = rng.permutation(np.flatnonzero(label == here[name]))
            again, rest = divmod(weight * budget * (1 - 1e-9), have[name])
            times[rows] += int(again)
            times[rows[np.cumsum(size[rows]) - size[rows] < rest]] += 1
            if again:
                print0(f'{kind}: {name} runs dry and is repeated: {weight * budget / have[name]:.2f} epochs')
    times[is_val(key)] = np.minimum(times[is_val(key)], 1)
    for path, part in zip(results, np.split(times, np.cumsum([len(table.key) for table in tables])[:-1])):
        np.save(f'{path}.times.npy', part)
    for kind in dict.fromkeys(name.split()[0] for name in labels if name.split()[0] in ('text', *TASKS)):
        mine = np.isin(label, [i for i, name in enumerate(labels) if name.split()[0] == kind]) & (times > 0)
        for side, on_it in ('train', ~is_val(key)), ('val', is_val(key)):
            if not (mine & on_it).any():
                n, what = int(mine.sum()), 'documents' if kind == 'text' else f'rows for {kind}'
                die(f'{n} {what} are too few, {side} has none: val_fraction = {val_fraction}')
    pathlib.Path(f'{tmp}/work/times').touch()
barrier()
over_groups('mixed', third_pass)
if RANK: # the rest is for one
    raise SystemExit

mixed = add_up('mixed')[0]
for kind, side in itertools.product(TASKS, ('train', 'val')):
    parts = [f'{path}.{kind}_{side}.jsonl' for path in results]
    if parts := [part for part in parts if os.path.exists(part)]:
        with atomic(f'{tmp}/{kind}_{side}.jsonl') as partial, open(partial, 'wb') as out:
            for part in parts:
                with open(part, 'rb') as f:
                    shutil.copyfileobj(f, out)
        print0(f"{kind}_{side}.jsonl: {mixed[f'{kind} {side}']['rows']:,} rows")

# -----------------------------------------------------------------------------
# the funnel, and how well each step found what was planted
funnel = {name: total[name] for name in steps}
if source == 'toytown':
    toytown.score(dict((row['url'], row) for _, row in read_jsonl(f'{tmp}/raw/truth.jsonl')), fate, funnel)
planted = '  planted  precision  recall' * (source == 'toytown')
print0(f'\nstep           documents in      out    MB in      out{planted}  dropped')
for name, row in funnel.items():
    score = ''
    if fate:
        score = f"{row['planted']:>9,}{row['precision']:>11.3f}{row['recall']:>8.3f}" if 'planted' in row else ' ' * 28
    reasons = ', '.join(f'{reason} {n:,}' for reason, n in total[f'dropped {name}'].most_common(3))
    print0(f"{name:<14}{row['docs_in']:>13,}{row['docs_out']:>9,}"
           f"{row['bytes_in'] / 1e6:>9.2f}{row['bytes_out'] / 1e6:>9.2f}{score}  {reasons}")
for kind in 'text', *TASKS:
    taken = mixed[f'{kind} mixture']
    wanted = {name: weights[name] for name in taken if name in weights} or dict(taken)
    for name, size in taken.items() if len(taken) > 1 or kind == 'text' else ():
        print0(f'{kind}: {name} {size / 1e6:.2f} MB, {size / sum(taken.values()):.1%} of bytes '
               f'(wanted {wanted[name] / sum(wanted.values()):.1%})')
if total['private']:
    print0('personal data hidden:', ', '.join(f'{kind} {n:,}' for kind, n in total['private'].most_common()))
counts = {f'{side} {what}': mixed[f'text {side}'][key] for side in ('train', 'val')
          for what, key in (('documents', 'rows'), ('bytes', 'bytes'))}
print0('corpus:', ', '.join(f'{what} {n:,}' for what, n in counts.items()), f"| skipped: {dict(total['skipped'])}")
seen = collections.Counter()
write_jsonl(f'{tmp}/dropped.jsonl', (row for row in examples if not seen.update([(row['step'], row['reason'])])
                                     and seen[row['step'], row['reason']] <= keep_dropped))
write_jsonl(f'{tmp}/funnel.json', [dict(
    steps=funnel, dropped={name: total[f'dropped {name}'] for name in steps}, private=total['private'], counts=counts,
    mixture={kind: mixed[f'{kind} mixture'] for kind in ('text', *TASKS)}, tokens=total['tokens'],
    skipped=total['skipped'], seconds=round(time.time() - start_time, 1))])
for name in ours + [os.path.basename(path) for path in glob.glob(f'{glob.escape(tmp)}/*.bin')]:
    for old, new in (f'{data_dir}/{name}', f'{tmp}/old_{name}'), (f'{tmp}/{name}', f'{data_dir}/{name}'):
        if os.path.lexists(old): # all is whole: it takes the place of what an earlier run left
            os.replace(old, new)
shutil.rmtree(tmp)
print0(f'written to {data_dir} in {time.time() - start_time:.1f} s')
