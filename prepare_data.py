"""
Stage 0: data. Raw pages, books and conversations in; a clean, mixed corpus out.

The steps are those of FineWeb, in its order (Penedo et al. 2024), fit for files of Common Crawl:
    url filter -> html to text -> language -> quality -> duplicates -> personal data -> mixture -> train and val
By default they run on Toytown, a miniature internet with planted faults that toytown.py builds in data_dir/raw, with
conversations about the same little town. No step sees the list of what was planted; only its score, at the end, does.
Left out: downloads, several processes, models as judges of language and quality, the removal of benchmark questions.

the toy world      $ python prepare_data.py config/tiny.py
your own files     $ python prepare_data.py --source=files --files=notes.txt,crawl/*.warc.gz --data_dir=data/mine
"""
import atexit, collections, contextlib, email, glob, gzip, hashlib, io, ipaddress, itertools, json, os, re, shutil
import html.parser, pathlib, time, zlib

import numpy as np

from configurator import configure
from model import check_settings, die, grade, print0, read_jsonl, write_jsonl

# -----------------------------------------------------------------------------
# settings
# what comes in and goes out
source = 'toytown'          # toytown: a world made here, without a network; files: those named below
files = ''                  # for source = files: names, folders and patterns with *, separated by commas
data_dir = 'data/toytown'   # where everything is written
chat_as_text = False        # also put the text of conversations into the corpus
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
filters = 'url,language,quality,dedup,pii' # those to run
curated = 'books,lessons'   # sources that somebody chose: no language and quality filter (as LLaMA does with books)
blocked_hosts = 'free-prizes.example,spamfarm.example,click-here.example,malware-zone.example' # and their subdomains
blocked_words = 'casino,poker,porn,sex,xxx,viagra,betting,jackpot' # as whole words of a URL
min_english = 0.65          # language score 0..1 (FineWeb has 0.65 of fastText's)
page_words = (50, 100_000)  # Gopher (Rae et al. 2021, A1.1): fewest and most words
word_length = (3, 10)       # Gopher: mean, in characters
max_symbols = 0.1           # Gopher: '#' and '...' per word
max_marked_lines = (0.9, 0.3) # Gopher: share of lines that start with a bullet, and that end in '...'
min_alphabetic = 0.8        # Gopher: share of words with a letter in them
min_stop_words = 2          # Gopher: how many of the, be, to, of, and, that, have, with
max_repeated_lines = (0.3, 0.1) # Gopher: share of lines that stood before; FineWeb: of characters in them
max_repeated_ngrams = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10) # Gopher: share in 5- to 10-grams that stood before
min_punctuated = 0.12       # FineWeb: share of lines that end like a sentence
max_short_lines = 0.67      # FineWeb: share of lines under 30 characters
near_duplicate = 0.7        # share of equal hashes from which two texts are one (FineWeb's 14 x 8 finds from 0.75)
# the corpus
mixture = ''                # shares of bytes, as in web:0.7,books:0.3; '' = toytown's own, or of files everything
val_fraction = 0.05         # share of documents, and of prompts from files, to validate on
shard_bytes = 50_000_000    # of text in one file of documents
config = configure(globals())
start_time = time.time()
for name, given, known in (('source', source, 'toytown,files'), ('filters', filters, 'url,language,quality,dedup,pii')):
    if set(filter(None, given.split(','))) - set(known.split(',')):
        die(f"{name} = '{given}'; known are {known}")
check_settings(config)
# everything is made in a folder of its own, which is gone at the end: what an earlier run left stays whole until then
tmp = os.path.join(data_dir, '.partial')
atexit.register(shutil.rmtree, tmp, ignore_errors=True)
shutil.rmtree(tmp, ignore_errors=True)
os.makedirs(f'{tmp}/raw' if source == 'toytown' else tmp)

def unit(text):
    """A number in [0, 1) that depends on the text alone: on every machine and in every run the same."""
    return int(hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:12], 16) / 16**12

if source == 'toytown':
    import toytown
    town = toytown.load(world, seed, n_people, val_facts)
    truth = toytown.write_web(town, f'{tmp}/raw', n_pages, n_books, n_lessons, n_faults, blocked_hosts, blocked_words)
    toytown.write_tasks(town, tmp, n_chat, n_preferences, n_prompts, n_val, flaw_rate, like_rate, labeller_noise)
    toytown.write_benchmarks(town, f'{tmp}/benchmarks')
    files, mixture = f'{tmp}/raw', mixture or town['mixture']

# -----------------------------------------------------------------------------
# reading: files -> documents, conversations, ranked answers, prompts, benchmarks
rows_of, skipped = collections.defaultdict(list), collections.Counter() # what is no document; what could not be read
# where the keys of a row say that it belongs; {question, answer} is GSM8K, {chosen, rejected} hh-rlhf
FORMS = {'messages completions ranking': 'preferences', 'messages checks': 'prompts', 'messages': 'chat',
         'prompt response': 'chat', 'question answer': 'chat', 'chosen rejected': 'preferences', 'text': 'text',
         'query choices gold': 'benchmarks', 'context continuation': 'benchmarks', 'context_options gold': 'benchmarks'}

def warc_pages(path):
    """Yield (url, content type, body) of the pages in a WARC file. What is broken is counted, never fatal."""
    fields_of = lambda f: email.message_from_bytes(b''.join(itertools.takewhile(bytes.strip, f))) # to the empty line
    with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as f:
        try:
            while line := f.readline():
                if not line.startswith(b'WARC/'):
                    continue
                fields = fields_of(f)
                size = int(fields.get('Content-Length', 0))
                page = io.BytesIO(f.read(size))
                if page.getbuffer().nbytes < size:
                    skipped['WARC record cut short'] += 1
                elif fields['WARC-Type'] == 'response':
                    status, kind = page.readline(), str(fields_of(page).get('Content-Type', 'text/html')).lower()
                    if b' 200' in status and re.match('text/html|application/xhtml', kind):
                        yield str(fields.get('WARC-Target-URI', '')).strip('<>'), kind, page.read()
                    else:
                        skipped['not a page (status or type)'] += 1
        except (EOFError, MemoryError, OSError, OverflowError, ValueError, zlib.error) as e:
            print0(f'{path}: damaged, the rest is left out ({e})')
            skipped['damaged WARC file'] += 1

turns = lambda asked, said: [dict(role='user', content=asked.strip()), dict(role='assistant', content=said.strip())]
def dialog(text):
    """'\\n\\nHuman: Hi\\n\\nAssistant: Hello' -> messages."""
    first, *parts = re.split(r'(?:^|\n\n)(Human|Assistant): ?', text.lstrip())
    if first or not parts:
        raise ValueError('not a dialogue of the form "\\n\\nHuman: ... \\n\\nAssistant: ..."')
    roles = {'Human': 'user', 'Assistant': 'assistant'}
    return [dict(role=roles[who], content=said.strip()) for who, said in zip(parts[::2], parts[1::2])]

def read_row(row, name):
    """Put a row of a .jsonl file where its keys say that it belongs; -> its text, if it is one for the corpus."""
    form = next((form for form in FORMS if set(form.split()) <= set(row)), None)
    if not form:
        raise ValueError(f"no known form has the keys {', '.join(sorted(row))}; FORMS in prepare_data.py lists them")
    kind, new = FORMS[form], {key: row[key] for key in [*form.split(), 'checks'] if key in row}
    if kind == 'text':
        return row['text'] + ''
    if kind == 'benchmarks':
        return rows_of[f'benchmarks/{name}'].append(row)
    grade(new.get('checks', {'equals': ''}), 'a 1') # a check that is of no use is found here, not hours later
    if form == 'prompt response':
        alpaca = re.search(r'### Instruction:\n(.*?)(?:\n+### Input:\n(.*?))?\n+### Response:', row['prompt'], re.S)
        prompt = '\n\n'.join(filter(None, alpaca.groups())) if alpaca else row['prompt']
        new = dict(messages=turns(prompt, row['response']))
    elif form == 'question answer': # GSM8K; <<2+3=5>> was for its calculator
        new = dict(messages=turns(row['question'], re.sub(r'<<.*?>>', '', row['answer'])))
        if number := re.search(r'#### *(-?[\d.]*\d)', row['answer'].replace(',', '')):
            rows_of['prompts'].append(dict(messages=new['messages'][:1], checks={'number': float(number[1])}))
    elif form == 'chosen rejected':
        a, b = dialog(row['chosen']), dialog(row['rejected'])
        n = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), 0) # up to here they are the same
        if not n or not a[n]['role'] == b[n]['role'] == 'assistant':
            return skipped.update(['pair that does not differ in an answer'])
        new = dict(messages=a[:n], completions=[a[n]['content'], b[n]['content']], ranking=[0, 1])
    roles = {message['role'] for message in new['messages'] if message['content'].strip()}
    if 'user' not in roles or not roles <= {'system', 'user', 'assistant'}:
        raise ValueError(f'messages need a user turn and no roles but system, user, assistant; not {sorted(roles)}')
    if kind == 'chat' and 'assistant' not in roles:
        raise ValueError('a conversation with no assistant turn, or an empty one')
    if not re.fullmatch('s?(ua)+' if kind == 'chat' else 's?(ua)*u', ''.join(m['role'][0] for m in new['messages'])):
        return skipped.update(['turns in another order than user, assistant'])
    if kind == 'preferences' and not (1 < len(r := new['ranking']) == len({*r} & {*range(len(new['completions']))})
                                      and {*map(type, r)} == {int} and {*map(type, new['completions'])} == {str}):
        raise ValueError(f'ranking {r} must name two or more of the completions, which are texts, each once')
    rows_of[kind].append(new)
    if form == 'chosen rejected': # a ranking's prompt is also one to practise on
        rows_of['prompts'].append(dict(messages=new['messages']))
    if kind == 'chat' and chat_as_text and side_of(new) == 'train':
        return '\n\n'.join(message['content'] for message in new['messages'])

def side_of(row):
    """The first question decides, for rows of every kind alike."""
    return 'val' if unit(next(m['content'] for m in row['messages'] if m['role'] == 'user')) < val_fraction else 'train'

def documents(paths):
    """Yield every document: {source, url, text} or, when it is no text yet, {source, url, type, html}."""
    for path in paths:
        name = re.sub(r'(\.(txt|md|jsonl|html?|warc|gz))+$', '', os.path.basename(path))
        doc, label = dict(source=re.sub(r'[-_]?\d+$', '', name) or name), path.replace(f'{tmp}/', '')
        if re.search(r'\.warc(\.gz)?$', path):
            yield from (dict(doc, url=url, type=kind, html=body) for url, kind, body in warc_pages(path))
        elif re.search(r'\.jsonl(\.gz)?$', path):
            for line, row in read_jsonl(path):
                try:
                    if text := read_row(row, name):
                        yield dict(doc, url=str(row.get('url', f'{label}:{line}')), text=text)
                except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
                    die(f'{path}:{line}: {e if isinstance(e, ValueError) else f"not what its keys promise ({e!r})"}')
        elif re.search(r'\.html?$', path):
            yield dict(doc, url=label, type='text/html', html=pathlib.Path(path).read_bytes())
        else:
            parts = (text := decode(pathlib.Path(path).read_bytes()).replace('\r\n', '\n')).split('<|endoftext|>')
            if len(parts) == 1: # no such marks: pieces of about 4,000 characters, each to a blank line
                parts = re.findall(r'(?s)\S(?:.{3999,}?(?=\n\s*\n)|.*)', text)
            yield from (dict(doc, url=f'{label}#{i}', text=part) for i, part in enumerate(parts))

# -----------------------------------------------------------------------------
# the steps: each takes a document, may change its text, and returns why the document is dropped, or None
def url_step(doc):
    """FineWeb (Penedo et al. 2024): blocked hosts, blocked words (whole ones: Essex is a county); and bare IPs."""
    host = re.match(r'\w+://(?:[^/@]*@)?(\[[^]]*\]|[^/:?#]*)', doc['url'].lower())
    if not host or 'text' in doc: # text files were chosen by the user
        return None
    if re.fullmatch(r'[\d.]+|\[.*', host[1]):
        return 'IP address'
    if any(f'.{host[1]}'.endswith(f'.{blocked}') for blocked in blocked_hosts.split(',') if blocked):
        return 'blocked host'
    return 'blocked word' if set(re.findall('[a-z0-9]+', doc['url'].lower())) & set(blocked_words.split(',')) else None

INLINE = set('abbr b big cite code del dfn em font i ins kbd mark q s small span strike strong sub sup u'.split())
SKIP = set('aside button footer form head iframe nav noscript object script select style svg template title'.split())
VOID = set('area base br col embed img input link meta param source track wbr'.split())
CLOSES = set('p li dt dd tr td th option h1 h2 h3 h4'.split()) # a second one of these ends the first
BOILERPLATE = re.compile(r'(^|[-_\s])(nav(bar|igation)?|menu|sidebar|footer|cookies?|consent|banner|advert\w*|ads?|'
    r'share|social|related|newsletter|popup|comments?|breadcrumbs?|widget|promo|sponsor\w*|signup|login|t(opb|oolb)ar|'
    r'pagination|search|contentinfo)($|[-_\s])', re.I)

class Page(html.parser.HTMLParser):
    """Collects the blocks of a page: lists of [tag, (text, in a link?, in the main part?), ...]."""
    def __init__(self):
        super().__init__()
        self.stack, self.open, self.blocks = [], collections.Counter(), [['']]

    def handle_starttag(self, tag, attrs):
        if tag in CLOSES and self.stack and self.stack[-1][0] == tag:
            self.handle_endtag(tag)
        if tag not in INLINE | VOID:
            names = ' '.join(value or '' for key, value in attrs if key in ('class', 'id', 'role'))
            skip = tag in SKIP or tag == 'header' and not self.open['MAIN'] or 'hidden' in dict(attrs)
            skip = skip or BOILERPLATE.search(names) and tag not in ('html', 'body', 'main', 'article')
            main = tag in ('main', 'article') or ('role', 'main') in attrs
            self.stack.append([tag, 'SKIP' * bool(skip), 'MAIN' * main])
            self.open.update(self.stack[-1])
            self.blocks += [[tag]] * (tag != 'a')
        self.handle_data('\n' * (tag == 'br'), keep=True)

    def handle_endtag(self, tag):
        while self.open[tag]: # also ends what was left open in it; a stray end tag ends nothing
            self.open.subtract(self.stack[-1])
            if self.stack.pop()[0] == tag:
                break
        self.blocks += [['']] * (tag not in INLINE and tag != 'a')

    def handle_data(self, data, keep=False):
        if not self.open['SKIP']:
            data = data if keep or self.open['pre'] else re.sub(r'\s+', ' ', data)
            self.blocks[-1].append((data, self.open['a'] > 0, self.open['MAIN'] > 0))

def html_to_text(page):
    """The main text of a page: no menus, scripts, adverts, lists of links; lines of lists, verses, code are kept."""
    parser, blocks, text, last = Page(), [], '', ''
    with contextlib.suppress(AssertionError, ValueError): # where the parser gives up: keep what came before
        parser.feed(page)
        parser.close()
    for tag, *parts in parser.blocks:
        block, linked = ''.join(part for part, _, _ in parts), sum(len(part) for part, link, _ in parts if link)
        if block.strip() and linked <= 0.5 * len(block): # not mostly links
            block = block.strip('\n') if tag == 'pre' else re.sub(r' *\n *', '\n', block).strip()
            blocks.append((tag, block, any(main for _, _, main in parts)))
    main = [block for block in blocks if block[2]]
    for tag, block, _ in main if 4 * sum(len(b[1]) for b in main) >= sum(len(b[1]) for b in blocks) else blocks:
        text += ('\n' if tag == last and tag in ('li', 'td', 'dd') else '\n\n') + '- ' * (tag == 'li') + block
        last = tag
    return re.sub(r'\n{3,}', '\n\n', text)

def decode(raw, content_type=''):
    """Bytes -> text by the byte order mark, the HTTP header, the meta tag, as UTF-8, or else as windows-1252."""
    told = re.findall(r'charset\s*=\s*["\']?\s*([\w-]+)', f"{content_type} {raw[:2048].decode('latin-1')}".lower())
    mark = {b'\xef\xbb': ['utf-8'], b'\xff\xfe': ['utf-16'], b'\xfe\xff': ['utf-16']}.get(raw[:2], [])
    for name in [*mark, *told, 'utf-8']:
        name = 'windows-1252' if name in ('iso-8859-1', 'latin1', 'latin-1', 'us-ascii') else name # as browsers do
        with contextlib.suppress(LookupError, UnicodeError): # no such charset
            text = raw.decode(name, 'replace').replace('\ufeff', '')
            if text.count('\ufffd') <= len(text) / 200: # a few broken bytes: still the right charset
                return text
    return raw.decode('windows-1252', 'replace')

def text_step(doc):
    text = html_to_text(decode(doc.pop('html'), doc['type'])) if 'html' in doc else doc['text']
    text = text.encode('utf-8', 'replace').decode().replace('\0', '').replace('\xa0', ' ') # no lone surrogates
    doc['text'] = doc['extracted'] = text.strip()
    return None if doc['text'] else 'no text'

ENGLISH = set("""the of and to in a is that for it was on with as at by from be are this have or an not they which you
    we his her had has he she but were their all can will if there more when what who said so no do my me your our i
    him them then than been would could about into out up very some any how why where its did does just only over also
    after before other these those because through while between every never us am again here down now""".split())
OTHERS = set("""el la los las de del que y en un una es se por con para su al como pero más está der die das und ist
    nicht ein eine mit den von zu im dem auf sich auch wir sie ich er le les des et est dans pour qui sur pas avec au
    ce il elle je ne het een van dat niet zijn op te aan met voor maar om ook naar bij ik di che è non per sono gli
    nel da więc się na nie jest że jak po os uma não dos em mais foi og det att som på är av för inte med till jag har
    kan af eller men ett hon han""".split())

def language_step(doc):
    """The share of English function words, times their share among those of all languages. FineWeb: fastText's 0.65."""
    words = re.findall(r'[^\W\d_]+', doc['text'].lower())
    yes, no = sum(word in ENGLISH for word in words), sum(word in OTHERS for word in words)
    score = min(1, 5 * yes / max(1, len(words))) * yes / max(1, yes + no) # a fifth of function words is plenty
    return 'not English' if score < min_english else None

def gopher(text, words, lines):
    """Gopher (Rae et al. 2021, A1.1): is it prose, not said over and over? -> {rule: is it met?}, as in the others."""
    rules = {
        'Gopher: words': page_words[0] <= len(words) <= page_words[1],
        'Gopher: word length': word_length[0] * len(words) <= len(''.join(text.split())) <= word_length[1] * len(words),
        'Gopher: symbols': len(re.findall(r'#|\.\.\.|…', text)) <= max_symbols * len(words),
        'Gopher: bullets': sum(line[0] in '*-•‣●' for line in lines) <= max_marked_lines[0] * len(lines),
        'Gopher: ellipses': sum(line.endswith(('...', '…')) for line in lines) <= max_marked_lines[1] * len(lines),
        'Gopher: letters': sum(any(map(str.isalpha, word)) for word in words) >= min_alphabetic * len(words),
        'Gopher: stop words': len(set('the be to of and that have with'.split()) & set(words)) >= min_stop_words,
        'Gopher: repeated lines': len(lines) - len(set(lines)) <= max_repeated_lines[0] * len(lines)}
    for k, limit in enumerate(max_repeated_ngrams, 5):
        i, again, seen = 0, 0, set()
        while i + k <= len(words): # what stood before is jumped over, so that no character counts twice
            gram = ' '.join(words[i:i + k])
            again += len(gram) * (gram in seen)
            i += k if gram in seen else 1
            seen.add(gram)
        rules[f'Gopher: repeated {k}-grams'] = again <= limit * len(' '.join(words))
    return rules

def fineweb(text, lines):
    """FineWeb (Penedo et al. 2024): lists and menus rather than sentences."""
    return {
        'FineWeb: repeated lines': len(''.join(lines)) - len(''.join(set(lines))) <= max_repeated_lines[1] * len(text),
        'FineWeb: punctuation': sum(line[-1] in '.!?"”' for line in lines) >= min_punctuated * len(lines),
        'FineWeb: short lines': sum(len(line) < 30 for line in lines) <= max_short_lines * len(lines)}

def quality_step(doc):
    """Lines about cookies and scripts go (C4). Then every rule must be met: the first that is not is the reason."""
    policy = '(?i)javascript|terms of use|privacy policy|cookie policy|uses? (of )?cookies'
    doc['text'] = text = '\n'.join(line for line in doc['text'].split('\n') if not re.search(policy, line)).strip()
    words = [word.strip('.,;:!?"\'()').lower() for word in text.split()]
    lines = [line.strip() for line in text.split('\n') if line.strip()]
    c4 = {'C4: lorem ipsum, {': not re.search('lorem ipsum|{', text, re.I)} # Raffel et al. 2020: placeholders and code
    rules = gopher(text, words, lines) | c4 | fineweb(text, lines)
    return next((reason for reason, met in rules.items() if not met), None)

hash_a, hash_b = np.random.default_rng(0).integers(1, 2**63, (2, 112), np.uint64) | np.uint64(1)
seen, signatures = {}, [] # the number of the first text with such a hash or band; the hashes of each text

def dedup_step(doc):
    """
    Exact copies, and near ones with FineWeb's MinHash (Broder 1997): the smallest hash of the runs of five words is the
    same in two texts with the probability of their Jaccard similarity. One of 14 bands of 8 hashes has to be the same.
    """
    words = re.findall(r'\w+', doc['text'].lower())
    grams = [zlib.crc32(' '.join(words[i:i + 5]).encode()) for i in range(max(1, len(words) - 4))]
    grams = np.array(grams[:100_000], np.uint64)[:, None] # the start of a long book will do
    signature = (grams * hash_a + hash_b >> np.uint64(32)).min(0).astype(np.uint32) # (112,); multiply-shift hashing
    keys = [hashlib.sha256(doc['text'].encode()).digest(), *enumerate(map(bytes, signature.reshape(14, 8)))]
    if keys[0] in seen:
        return 'exact'
    if any((signatures[i] == signature).mean() >= near_duplicate for i in {seen[key] for key in keys if key in seen}):
        return 'near'
    seen.update({key: len(signatures) for key in keys if key not in seen})
    signatures.append(signature)

PRIVATE = {
    'EMAIL': r'\b[\w.+%-]{1,64}@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b',
    'CARD': r'(?<![\w-])(?:[3-6]\d{3}([ -])(?:\d{4}\1\d{4}\1\d{1,4}|\d{6}\1\d{5})|[3-6]\d{12,18})(?![\w-])',
    'SSN': r'(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])',
    'PHONE': r'(?<![\w.-])(?:\+\d{1,3}[ .-]?(?:\(?\d{1,4}\)?[ .-]?){2,4}\d{2,4}'
             r'|(?:1[ .-])?(?:\(\d{3}\) ?\d{3}[ .-]|\d{3}([ .-])\d{3}\1)\d{4})(?![\w-]|\.\d)',
    'IP': r'(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)',
    'ADDRESS': r'(?<![\w.,-])\d{1,5} (?:[A-Z][a-z]+\.? ){1,3}(?:Street|St|Avenue|Ave|Road|Rd|Lane|Drive|Court)\b'}

def is_private(kind, found, before):
    """What a pattern cannot tell: check digits, public addresses, the word before (version 4.1.2.1, in 1999 Elm Rd)."""
    numbers = [int(number) for number in re.findall(r'\d+' if kind == 'IP' else r'\d', found)]
    if kind == 'CARD': # Luhn: double every second digit from the right; the sum of digits is a multiple of ten
        total = sum(sum(divmod(d * (1 + i % 2), 10)) for i, d in enumerate(reversed(numbers)))
        return 13 <= len(numbers) <= 19 and total % 10 == 0
    if kind == 'IP':
        public = max(numbers) < 256 and ipaddress.ip_address('.'.join(map(str, numbers))).is_global
        return public and not re.search(r'\b(version|release|firmware|build|chapter|section|v)\s*$', before, re.I)
    year = re.match(r'(1[5-9]|20)\d\d ', found) and re.search(r'\b(in|since|of|by|from|until|after) $', before, re.I)
    return kind != 'ADDRESS' or not year

def pii_step(doc):
    """Personal data give way to a placeholder of their kind."""
    doc['found'] = []
    for kind, pattern in PRIVATE.items():
        def hide(match):
            if not is_private(kind, match[0], match.string[max(0, match.start() - 20):match.start()]):
                return match[0]
            doc['found'].append(match[0])
            return f'<{kind}>'
        doc['text'] = re.sub(pattern, hide, doc['text'])

# -----------------------------------------------------------------------------
# the flow: every document goes through every step; what is kept waits on disk for the mixture
paths, known = [], r'(?<!raw.truth)\.(txt|md|html?|jsonl|jsonl\.gz|warc|warc\.gz)$' # truth.jsonl is no input
for name in map(os.path.expanduser, (files or die('no files: name them, --files=notes.txt,web/*.warc.gz')).split(',')):
    found = [name] if os.path.isfile(name) else glob.glob(f'{name}/**' if os.path.isdir(name) else name, recursive=True)
    paths += sorted(path for path in found if re.search(known, path) and os.path.isfile(path)) or die(
        f'no file {name} of a known kind: .txt .md .html .jsonl .jsonl.gz .warc .warc.gz')
ours = [f'{kind}_{side}.jsonl' for kind in ('chat', 'preferences', 'prompts') for side in ('train', 'val')]
ours += ['train', 'val', 'benchmarks', 'funnel.json'] + ['raw'] * (source == 'toytown') # what takes the old ones' place
if lost := [path for path in paths if os.path.relpath(path, data_dir).split(os.sep)[0] in ours]:
    die(f'{lost[0]} would be replaced by what is made of it: move it out of {data_dir}')
steps = dict(url=url_step, text=text_step, language=language_step, quality=quality_step, dedup=dedup_step, pii=pii_step)
steps = {name: step for name, step in steps.items() if name in ['text', *filters.split(',')]}
funnel, dropped = ({name: collections.Counter() for name in steps} for _ in range(2)) # sizes in and out; reasons
number, kept, sizes, fate = 0, [], collections.Counter(), {} # fate: of each URL, to score toytown only
waiting = open(f'{tmp}/waiting.jsonl', 'w+', encoding='utf-8')
size_of = lambda doc: len(doc['html'] if 'html' in doc else doc['text'].encode('utf-8', 'replace'))

for number, doc in enumerate(documents(paths), 1):
    if number % 2000 == 0:
        print0(f'{number:,} documents read, {len(kept):,} kept | {time.time() - start_time:.0f} s')
    for name, step in steps.items():
        funnel[name].update(docs_in=1, bytes_in=size_of(doc))
        reason = None if name in ('language', 'quality') and doc['source'] in curated.split(',') else step(doc)
        if reason:
            dropped[name][reason] += 1
            break
        funnel[name].update(docs_out=1, bytes_out=size_of(doc))
    if source == 'toytown' and doc['url'] in truth:
        fate[doc['url']] = dict(doc, stopped=reason and name)
    if not reason:
        kept.append((doc['source'], size_of(doc)))
        sizes[doc['source']] += size_of(doc)
        waiting.write(json.dumps({key: doc[key] for key in ('text', 'source', 'url')}) + '\n')

# -----------------------------------------------------------------------------
# the mixture and the split
if not re.fullmatch(r'([^:,]+:\s*\d*\.?\d+\s*(,|$))*', mixture):
    die(f"mixture = '{mixture}' is not of the form web:0.7,books:0.3")
weights = {k.strip(): float(v) for k, v in (part.split(':') for part in mixture.split(',') if part)} or sizes
if not sizes and (not rows_of or funnel['text']['docs_in']):
    lost = ', '.join(f"{name} dropped {row['docs_in'] - row['docs_out']:,}" for name, row in funnel.items())
    die(f"no document is left of {number:,} ({lost}); --filters=dedup,pii runs fewer steps" if number else
        f'{files}: nothing is in there, neither documents nor conversations')
if missing := set(weights) - set(sizes):
    die(f"mixture: no documents from {', '.join(sorted(missing))}; there are {', '.join(sizes) or 'none'}")
total = min((sizes[name] / weight for name, weight in weights.items() if weight), default=0) # until one runs dry
rng, chosen, taken, counts = np.random.default_rng(seed), set(), {}, collections.Counter()
for name, weight in weights.items():
    rows = rng.permutation([(i, size) for i, (owner, size) in enumerate(kept) if owner == name])
    rows = rows[np.cumsum(rows[:, 1]) - rows[:, 1] < weight * total * (1 - 1e-9)]
    chosen.update(rows[:, 0].tolist())
    taken[name] = int(rows[:, 1].sum())

def rows_on(side):
    """The chosen documents of a side. The text decides the side, so equal texts are never on both."""
    waiting.seek(0)
    for i, row in enumerate(map(json.loads, waiting)):
        if i in chosen and (unit(row['text']) < val_fraction) == (side == 'val'):
            counts.update({f'{side} documents': 1, f'{side} bytes': len(row['text'].encode())})
            yield row

for side in ('train', 'val') if sizes else ():
    for number, rows in itertools.groupby(rows_on(side), key=lambda _: counts[f'{side} bytes'] // shard_bytes):
        write_jsonl(f'{tmp}/{side}/{number:05d}.jsonl.gz', rows)
    if not counts[f'{side} documents']:
        die(f'{len(chosen)} documents are too few, {side} has none: val_fraction = {val_fraction}')
for kind, rows in rows_of.items():
    for end in [''] if kind.startswith('benchmarks/') else ['_train', '_val']:
        part = [row for row in rows if not end or f'_{side_of(row)}' == end]
        write_jsonl(f'{tmp}/{kind}{end}.jsonl', part or die(
            f'{len(rows)} rows for {kind} are too few: {kind}{end}.jsonl gets none at val_fraction = {val_fraction}'))
        print0(f'{kind}{end}.jsonl: {len(part):,} rows')

# -----------------------------------------------------------------------------
# the funnel, and how well each step found what was planted
arrived = list(fate)
for name in funnel if fate else ():
    gone = {url for url in arrived if fate[url]['stopped'] == name}
    want, have = {url for url in arrived if truth[url].get('fault') == name}, gone
    if name == 'text': # the lines that must be there, and those that are
        want, have = ({(url, line) for url in arrived for line in re.split(r'\s*\n\s*', page[url][key])}
                      for page, key in ((truth, 'text'), (fate, 'extracted')))
    elif name == 'pii':
        want, have = ({(url, found) for url in arrived for found in page[url].get(key, ())}
                      for page, key in ((truth, 'private'), (fate, 'found')))
    elif name == 'dedup': # of a group of copies one must stay, whichever
        stay = {truth[url].get('group', url): url for url in sorted(arrived, key=lambda url: url not in gone)}
        want = set(arrived) - set(stay.values())
    elif name == 'language': # junk is in no language: no mistake
        have = {url for url in gone if truth[url].get('fault') != 'quality'}
    right = len(want & have)
    funnel[name].update(planted=len(want), precision=right / max(1, len(have)), recall=right / max(1, len(want)))
    arrived = [url for url in arrived if url not in gone]
print0('\nstep      documents in      out    MB in      out  planted  precision  recall  dropped')
for name, row in funnel.items():
    score = f"{row['planted']:>9,}{row['precision']:>11.3f}{row['recall']:>8.3f}" if fate else ' ' * 28
    reasons = ', '.join(f'{reason} {n:,}' for reason, n in dropped[name].most_common(3))
    print0(f"{name:<9}{row['docs_in']:>13,}{row['docs_out']:>9,}"
           f"{row['bytes_in'] / 1e6:>9.2f}{row['bytes_out'] / 1e6:>9.2f}{score}  {reasons}")
for name, size in taken.items():
    wanted = weights[name] / sum(weights.values())
    print0(f'{name}: {size / 1e6:.2f} MB, {size / sum(taken.values()):.1%} of bytes (wanted {wanted:.1%})')
print0('corpus:', ', '.join(f'{what} {n:,}' for what, n in counts.items()) or 'empty', f'| skipped: {dict(skipped)}')
write_jsonl(f'{tmp}/funnel.json', [dict(steps=funnel, dropped=dropped, mixture=taken, counts=counts, skipped=skipped,
                                        seconds=round(time.time() - start_time, 1))])
for name in ours:
    for old, new in (f'{data_dir}/{name}', f'{tmp}/old_{name}'), (f'{tmp}/{name}', f'{data_dir}/{name}'):
        if os.path.exists(old): # all is whole: it takes the place of what an earlier run left
            os.replace(old, new)
print0(f'written to {data_dir} in {time.time() - start_time:.1f} s')
