"""
Toytown: a miniature internet about a small made-up town, the default raw data.

It writes what a web crawl, a library and people who label data would deliver. prepare_data.py reads
the folder like any other files. Faults are planted among the pages (spam URLs, other languages,
junk, copies, personal data), so that each cleaning step can be scored.

Reads   config/toytown.json: names, facts, templates, page layouts, tasks. Edit it to make the town
        your own; its first entry, "about", explains the {slots} of the templates
Writes  town_dir/web_*.warc.gz, books.jsonl.gz, lessons.txt   documents; mixture.json: shares
        town_dir/{chat,preferences,prompts}_{train,val}.jsonl   data for SFT, reward model, RLHF
        town_dir/benchmarks/*.jsonl                             questions for eval.py
        town_dir/truth.jsonl     what was planted: prepare_data.py scores its steps with it

the tiny world    $ python toytown.py config/tiny.py
another town      $ python toytown.py --seed=7 --n_people=20 --town_dir=data/raw/my_town
It takes one CPU core and a few seconds. The same settings give the same bytes.
Left out: images, links between the pages, questions that refer to an earlier turn.
"""
from configurator import configure # first, so that Ctrl-C gives no traceback while torch loads
import collections, gzip, hashlib, html, itertools, json, os, random, re, shutil

import numpy as np

from model import atomic_write, grade, print0, simulated_ranking, write_jsonl, write_text

# -----------------------------------------------------------------------------
# settings
# the town
world = 'config/toytown.json' # names, facts, word lists, templates, tasks
town_dir = 'data/raw/toytown' # output folder; it is replaced as a whole
seed = 1337             # random seed
n_people = 60           # number of people, with six facts each
val_facts = 0.3         # share of facts and sums that the training data never asks about
# documents
n_pages = 5000          # number of good web pages
n_books = 1600          # number of pages with stories
n_lessons = 1300        # number of pages with sums, lists, notes, questions
n_faults = 300          # number of pages for each kind of planted fault
# tasks
n_chat = 3000           # number of training conversations
n_preferences = 1500    # number of training prompts with ranked answers
n_prompts = 4000        # number of training prompts for RLHF
n_val = 200             # number of validation rows of each kind (1.5 times as many prompts)
flaw_rate = 0.4         # share of conversations whose answer is flawed, as by a tired contractor
like_rate = 0.3         # share of the other answers that end with a friendly phrase
labeller_noise = 0.2    # standard deviation of the labeller's noise, in units of the gold score
config = configure(globals())

for name in ('n_pages', 'n_chat', 'n_preferences', 'n_prompts', 'n_val'):
    assert config[name] > 0, f'{name} must be positive, not {config[name]}'
for name in ('val_facts', 'flaw_rate', 'like_rate'):
    assert 0 <= config[name] <= 1, f'{name} is a share between 0 and 1, not {config[name]}'

# -----------------------------------------------------------------------------
# the grammar of the templates
SLOT = re.compile(r'\{([A-Za-z]\w*)(?::(\w+))?\}') # {animal} or {animal:a}: a name and a label
SCOPES = [dict(scope=i) for i in range(99)] # {new} draws one: from there on, labels start afresh

def fill_slot(match, slots):
    """The text for one slot; see expand."""
    name, label = match.groups()
    key = name.lower()
    label_key = f"{key}:{label}:{slots.get('scope')}" # after {new}, {animal:a} is drawn anew
    value = slots.get(label_key, slots.get(key))
    assert value is not None, f'{world}: no word list or fact for {match[0]}: add or rename it'

    if isinstance(value, list):
        # draw without repeats: on one page, every entry comes once before any comes twice
        bag = slots.setdefault(f'bag {id(value)}', [])
        if not bag:
            bag.extend(random.sample(value, len(value)))
        value = bag.pop()
        if isinstance(value, dict): # {next}: the page turns to another person, with other facts
            slots.update(value)
            return ''
        if '{' in value: # most entries are plain words
            value = expand(value, slots)
        if label:
            slots[label_key] = value
    text = str(value)
    if name != key: # {Animal} begins with a capital letter
        text = text[:1].upper() + text[1:]
    return text

def expand(template, slots):
    """Fill the {slots} of a template. slots is the memory of one page: its facts (texts), what can
    be drawn (lists of templates), and what was drawn for each label so far. Example:

        slots = {'name': 'Anna', 'animal': ['{size} owl', 'fox'], 'size': ['tiny']}
        expand('{Animal:a} saw a {animal:b}. {name} saw the {animal:a}.', slots)
        -> 'Tiny owl saw a fox. Anna saw the tiny owl.'

    {animal:a} is drawn from its list, filled too, and remembered, so both times it is the owl."""
    filled = None
    while filled != template: # twice for {{kind:k}:1}: it becomes {birds:1} first
        filled = template
        template = SLOT.sub(lambda match: fill_slot(match, slots), filled)
    return re.sub(r'\b([Aa]) (?=[aeiou])', r'\1n ', filled) # a owl -> an owl

def new_page(side='train', **known):
    """The slots of a new page about a random person. It may ask about facts of one side only."""
    person = random.choice(people)
    moves = dict(next=people, next_fact=relations, next_asked=facts[side], next_sum=sums['all'],
                 next_asked_sum=sums[side], new=SCOPES)
    return {**words, **person, **moves, **known}

def say(template, **known):
    """Fill a template with the slots of a new page."""
    return expand(template, new_page(**known))

# -----------------------------------------------------------------------------
# people, facts and sums. Documents tell all of them. The validation side is never asked about in
# training data, so a right answer there shows knowledge from pretraining.
def split(items):
    """Two sides, with at least one item each."""
    n = max(1, round(len(items) * val_facts))
    n = min(n, len(items) - 1)
    return dict(val=items[:n], train=items[n:])

if not os.path.exists(world): # the script is run from another folder
    world = os.path.join(os.path.dirname(__file__), world)
try:
    with open(world, encoding='utf-8') as f:
        town = json.load(f)
except ValueError as e:
    raise AssertionError(f'{world} is not valid JSON: {e}: correct that place') from None
words = town['words'] # word lists and templates

random.seed(f'{seed} people')
first_names = town['first_names']
most = len(first_names)
assert 8 <= n_people <= most, f'n_people = {n_people}, but {world} has names for 8 to {most} people'
people = [dict(first=first) for first in random.sample(first_names, n_people)]
for person in people:
    person['name'] = person['first'] + ' ' + random.choice(town['surnames'])

relations = town['relations'] # job, pet, food, ...: each has the templates that speak of it
for rules in relations:
    # deal the values like cards: all are equally frequent, so that guessing is right only by chance
    values = itertools.cycle(rules['values'])
    for person, value in zip(random.sample(people, n_people), values):
        person[rules['relation']] = value

all_facts = [{**person, **rules} for person, rules in itertools.product(people, relations)]
random.shuffle(all_facts)
facts = split(all_facts)

pairs = list(itertools.combinations_with_replacement(range(1, 10), 2))
random.shuffle(pairs)
sums = dict(train=[], val=[])
for side, side_pairs in split(pairs).items():
    for x, y in side_pairs:
        total = x + y
        for a, b in sorted({(x, y), (y, x)}): # 3 + 4 and 4 + 3 are on one side; 3 + 3 comes once
            sums[side].append(dict(x=a, y=b, sum=total, less=total - 1, more=total + 1))
sums['all'] = sums['train'] + sums['val']

# -----------------------------------------------------------------------------
# documents: web pages with planted faults, books, lessons
def foreign_text(n_sentences):
    parts = random.choice(list(town['foreign'].values())) # subjects, verbs, ...
    return ' '.join(random.choice(part) for part in parts * n_sentences)

def five_grams(text):
    """All runs of five words, to measure how alike two texts are."""
    found = re.findall(r'\w+', text.lower())
    return {tuple(found[i:i + 5]) for i in range(len(found) - 4)}

def near_copy(text):
    """Change a word or two and add a sentence, until 80% or more of the five-grams are shared."""
    old = five_grams(text)
    for _ in range(1000): # about 20 are needed
        parts = text.split(' ')
        if len(parts) < 8:
            break
        for _ in range(random.choice([1, 2])):
            adjective = random.choice(words['adj'])
            parts[random.randrange(6, len(parts) - 1)] = adjective
        copy = ' '.join(parts) + ' ' + say('{edit}')
        new = five_grams(copy)
        if 0.8 <= len(old & new) / len(old | new) < 1:
            return copy.strip()
    raise AssertionError(f'{world}: no near copy of the page {text[:60]!r}: write longer pages')

def add_page(text, url='{good_url}', **planted):
    """Give a text (title, blank line, paragraphs) a layout, charset and URL; record its faults."""
    layout = random.choice(town['layouts'])
    charset = random.choice(town['charsets'])
    title, *paragraphs = html.escape(text).split('\n\n')
    paragraphs = ['<p>' + part.replace('\n', '<br>\n') + layout['end'] for part in paragraphs]
    body = re.sub(r'(.{60}\S*) ', r'\1\n', '\n'.join(paragraphs)) # lines as an editor breaks them
    title_words = re.findall('[a-z0-9]+', title.lower())
    slug = '-'.join(title_words)[:40]
    slots = new_page(title=title, slug=slug, body=body, charset=charset, id=1000 + len(truth))

    url = expand(url, slots).lower()
    page = expand(layout['page'], slots)
    # not every server tells the charset. Characters that it lacks are written as &#233;
    content_type = 'text/html' + random.choice(['', f'; charset={charset}'])
    http = f'HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\n\r\n'.encode()
    headers = f'WARC-Type: response\r\nWARC-Target-URI: {url}\r\nContent-Type: application/http'
    records.append((headers, http + page.encode(charset, 'xmlcharrefreplace')))
    truth[url] = dict(planted, url=url, text=text)

def write_warc(path, records):
    """Write a WARC file (ISO 28500), each record in its own gzip member, as crawlers do."""
    info = ('WARC-Type: warcinfo', b'format: WARC File Format 1.1')
    with atomic_write(path) as partial, open(partial, 'wb') as f:
        for headers, block in [info, *records]:
            name = hashlib.sha1(block).hexdigest()
            head = (f'WARC/1.0\r\n{headers}\r\nWARC-Record-ID: <urn:sha1:{name}>\r\n'
                    f'WARC-Date: 2024-05-18T01:58:10Z\r\nContent-Length: {len(block)}\r\n\r\n')
            f.write(gzip.compress(head.encode() + block + b'\r\n\r\n', mtime=0))

random.seed(f'{seed} web')
files = collections.defaultdict(list) # name -> rows; the last section writes them
records = [] # of the WARC files: headers, block
truth = {} # url -> what is planted there

for i in range(n_pages):
    blocks = say('{page}').split('\n\n') # a title and paragraphs
    sentences = []
    private = []
    if i < n_faults: # personal data, which the step pii should redact
        n_kinds = random.choice([1, 2])
        for kind in random.sample(town['private'], n_kinds):
            name = random.choice(people)['name']
            slots = new_page(slug=name.lower().replace(' ', '.'), **kind)
            slots['it'] = expand('{value}', slots)
            private.append(slots['it'])
            sentences.append(expand('{say}', slots))
    if i < 2.2 * n_faults: # traps: numbers that only look like personal data, which the step pii
        # should leave alone, or a foreign quotation on a page that the step language should keep
        template = '{trap}' if i < 2 * n_faults else '{quote}'
        sentences.append(say(template, foreign=foreign_text(1)))
    for sentence in sentences:
        blocks[random.randrange(1, len(blocks))] += ' ' + sentence
    add_page('\n\n'.join(blocks), private=private)

good_pages = list(truth.values())
for i in range(n_faults):
    # the step url should drop blocked hosts, blocked words and bare IP addresses
    add_page(say('{page}'), url='{bad_url}', fault='url')

    # the step language should drop other languages than English
    title = foreign_text(1)
    n_sentences = random.choice([2, 4, 8, 12])
    add_page(title + '\n\n' + foreign_text(n_sentences), fault='language')

    # one of the steps repetition, quality, c4, fineweb should drop junk
    add_page(say('{Thing}\n\n{junk}'), fault='quality')

    # the step dedup should drop exact copies and near copies, at another URL, in another layout
    for index in (i % n_pages, -1 - i % n_pages): # from the front, from the end
        original = good_pages[index]
        text = original['text']
        if index < 0: # pages from the end get a near copy, pages from the front an exact one
            text = near_copy(text)
        original['group'] = original['url'] # one page of each group should stay, no matter which
        add_page(text, fault='dedup', group=original['url'], private=original['private'])

random.shuffle(records)
files['truth.jsonl'] = truth.values()

# people have chosen the books and lessons, so no faults are planted there
files['books.jsonl.gz'] = [dict(text=say('{book}')) for _ in range(n_books)]
lessons = [say('{lesson}') for _ in range(n_lessons)]
files['mixture.json'] = [town['mixture']]

# -----------------------------------------------------------------------------
# tasks: conversations, ranked answers, prompts. No prompt is on both sides.
weights = [task['weight'] for task in town['tasks']]
likes = words['like'] # friendly phrases: the labeller likes them, no check asks for them
sizes = dict(chat_train=n_chat, preferences_train=n_preferences, prompts_train=n_prompts,
             chat_val=n_val, preferences_val=n_val, prompts_val=1.5 * n_val)
for name, n_rows in sizes.items():
    kind, side = name.split('_')
    random.seed(f'{seed} {side} {kind}')
    noise = np.random.default_rng(seed)
    asked = collections.Counter()
    rows = []
    n_draws = 0
    while len(rows) < n_rows:
        # draw a task, and a new prompt for it that belongs to this side
        task = random.choices(town['tasks'], weights)[0]
        while True:
            slots = new_page(side, **task)
            prompt = expand('{next_asked}{next_asked_sum}{prompt}', slots)
            asked[prompt] += 1
            n_draws += 1
            # else it might draw for ever: all prompts on the other side, or answers that are equal
            most = 10_000 + 30 * n_rows
            assert n_draws < most, (
                f"{world}: only {len(rows)} rows for {name} are found in {n_draws:,} draws, the last "
                f"is '{prompt:.60}': add prompts, or answers that differ")
            digest = hashlib.sha256(prompt.encode()).hexdigest()
            is_val = int(digest[:12], 16) < 0.15 * 16**12 # 15% of the prompts
            # a fact or sum decides the side of a task about it; for other tasks the prompt decides
            wrong_side = task['by_prompt'] and is_val != (side == 'val')
            repeated = 1 < asked[prompt] < 20 # after 20 draws there are too few new prompts
            if not wrong_side and not repeated:
                break

        # the checks are a template too: fill the slots in their JSON
        template = json.dumps(task['checks']).replace('"{sum}"', '{sum}') # a number, not a text
        checks = json.loads(expand(template, slots))
        if 'count' in checks:
            count = checks['count']
            count['of'] = words[count['of']] # the entries of the list instead of its name
        if task['likes']:
            checks['likes'] = likes

        messages = [dict(role='user', content=prompt)]
        if kind == 'prompts': # for practice: the checks are the gold reward
            rows.append(dict(messages=messages, checks=checks, task=task['task']))
        elif kind == 'chat': # for imitation: some answers are as by a tired contractor
            flawed = random.random() < flaw_rate
            answer = expand('{flawed}' if flawed else '{good}', slots)
            all_met, _ = grade(checks, answer)
            if all_met and task['likes'] and random.random() < like_rate:
                answer += ' ' + random.choice(likes)
            messages.append(dict(role='assistant', content=answer))
            if rows and len(rows[-1]['messages']) < 4 and random.random() < 0.1:
                rows[-1]['messages'] += messages # a second turn
                continue
            if random.random() < 0.05:
                system = random.choice(town['system'])
                messages.insert(0, dict(role='system', content=system))
            rows.append(dict(messages=messages))
        else: # preferences: the labeller sees the gold score through noise
            relation = slots['relation']
            wrong = [value for value in slots['values'] if value != slots[relation]]
            slots['next_wrong'] = [{relation: value} for value in wrong]
            answers = [expand(rule, slots).strip() for rule in town['rankings']]
            answers = list(dict.fromkeys(answers)) # without repeats
            random.shuffle(answers)

            gold = [grade(checks, answer)[1] for answer in answers]
            ranking = simulated_ranking(gold, labeller_noise, noise)
            if len(ranking) > 1: # else all answers are equally good
                rows.append(dict(messages=messages, completions=answers, ranking=ranking))
    files[f'{name}.jsonl'] = rows

# -----------------------------------------------------------------------------
# benchmarks: facts and sums of the validation side, in the forms that eval.py reads
random.seed(f'{seed} benchmarks')
for fact in facts['val']:
    relation = fact['relation']
    others = {person[relation]: person for person in random.sample(people, n_people)}
    del others[fact[relation]] # one person is left for each wrong value
    options = random.sample([fact, *list(others.values())[:3]], 4)
    gold = options.index(fact)
    pages = [{**words, **person} for person in options]
    question = expand(fact['ask'][0], pages[gold])
    choices = [' ' + expand(fact['cloze'][0], page) for page in pages]
    files['benchmarks/toytown_facts.jsonl'].append(
        dict(query=f'Question: {question}\nAnswer:', gold=gold, choices=choices))
    # the other way round: whom does this fact belong to?
    contexts = [expand(fact['lead'][0], page) for page in pages]
    files['benchmarks/toytown_people.jsonl'].append(
        dict(context_options=contexts, gold=gold, continuation=' ' + fact[relation]))

for pair in sums['val']:
    question = expand(words['sum_ask'][0], pair)
    files['benchmarks/toytown_sums.jsonl'].append(
        dict(context=f'Question: {question}\nAnswer:', continuation=f" {pair['sum']}"))

# -----------------------------------------------------------------------------
# write everything to a new folder, then let it take the place of the old one
town_dir = os.path.realpath(town_dir) # no slash at the end; if it is a link, the folder behind it
partial_dir = town_dir + '.partial'
replaced_dir = town_dir + '.replaced'
shutil.rmtree(partial_dir, ignore_errors=True) # of a run that was killed
os.makedirs(partial_dir + '/benchmarks')
for name, rows in files.items():
    write_jsonl(f'{partial_dir}/{name}', rows)
for part in range(2):
    write_warc(f'{partial_dir}/web_0000{part}.warc.gz', records[part::2])
write_text(f'{partial_dir}/lessons.txt', '\n<|endoftext|>\n'.join(lessons))

# if a run is killed between two of these lines, the same command puts it right
if os.path.exists(town_dir):
    extra = set(os.listdir(town_dir)) - set(os.listdir(partial_dir))
    assert not extra, f'{town_dir} holds {extra}, not our files: move them, or set --town_dir'
    shutil.rmtree(replaced_dir, ignore_errors=True)
    os.rename(town_dir, replaced_dir)
os.rename(partial_dir, town_dir)
shutil.rmtree(replaced_dir, ignore_errors=True)
print0('written to', town_dir)
