"""
Toytown: a miniature internet about a small made-up town, which prepare_data.py builds with source = 'toytown'.

    load         people with their facts, and sums; a share of both is never asked in training data
    write_web    pages in real WARC records, books, lessons; planted among the pages: spam URLs, other languages,
                 junk, exact and near copies, personal data, and what only looks like one of these
    write_tasks  conversations (some by a tired contractor), ranked answers, prompts with checks; exams

The world is data: config/toytown.json holds names, facts, word lists, templates, layouts and tasks. Edit that file to
make the town your own; its first entry, "about", explains the {slots}. The steps of prepare_data.py see none of it:
they read raw files, as those of Common Crawl; only the blocked hosts and words, a setting, are known to both. What was
planted (raw/truth.jsonl) serves to score each step after the last one has run.
"""
import collections, gzip, hashlib, html, itertools, json, os, random, re

import numpy as np

from model import die, grade, print0, simulated_ranking, write_jsonl

# -----------------------------------------------------------------------------
# people, their facts, and the grammar that speaks of them

def expand(template, slots, rng):
    """
    Fill the {slots} of a template with the facts of a page, or with what is drawn from its word lists and rules:
        expand('{Animal:a}, {animal:b}: {name}', {'name': 'Anna', 'animal': ['fox', 'owl']}, rng) -> 'Owl, fox: Anna'
    """
    def fill(match):
        name, label = match[1][0].lower() + match[1][1:], match[2]
        key = f"{name}:{label}:{slots.get('scope')}"
        value = slots.get(key, slots.get(name))
        if value is None:
            die(f'toytown: no list or fact {match[0]}, wanted in {template[:80]!r}')
        if isinstance(value, list): # a shuffled bag: nothing is drawn twice on a page before all has been drawn
            bag = slots.setdefault(f'bag {id(value)}', [])
            bag.extend(() if bag else rng.sample(value, len(value)))
            value = bag.pop()
            if isinstance(value, dict): # {next}, {next_fact} ...: the page goes on with other facts
                slots.update(value)
                return ''
            value = expand(value, slots, rng)
            if label:
                slots[key] = value
        return str(value)[:1].upper() + str(value)[1:] if match[1][0].isupper() else str(value)
    before = None
    while template != before: # a slot within a slot, {{kind:k}:1}, is filled from the inside out
        before, template = template, re.sub(r'\{([A-Za-z]\w*)(?::(\w+))?\}', fill, template)
    return re.sub(r'\b([Aa]) (?=[aeiou])', r'\1n ', template)

def load(path, seed, n_people, val_facts):
    """The world of a file, with people, facts and sums: town['facts']['val'] are never asked in training data."""
    try:
        beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), path)
        with open(path if os.path.exists(path) else beside, encoding='utf-8') as f:
            town = json.load(f)
    except (OSError, ValueError) as e:
        die(f'{path}: {e}')
    rng = random.Random(f'{seed} people')
    people = [dict(town['pronouns'][kind], first=first) for kind in town['pronouns'] for first in town[kind]]
    if not 8 <= n_people <= len(people):
        die(f'n_people = {n_people}, but {path} has first names for 8 to {len(people)}')
    people = [dict(who, name=f"{who['first']} {rng.choice(town['surnames'])}") for who in rng.sample(people, n_people)]
    relations = [dict(rules, relation=name, value='{%s}' % name) for name, rules in town['relations'].items()]
    for rules in relations: # every value about equally often: a guess is right by chance only
        for who, value in zip(rng.sample(people, n_people), itertools.cycle(rules.pop('values'))):
            who[rules['relation']] = value
    facts = [{**who, **rules} for who in people for rules in relations]
    rng.shuffle(facts)
    pairs = [(x, y) for x in range(1, 10) for y in range(x, 10)] # 3 + 4 and 4 + 3 are on the same side
    rng.shuffle(pairs)
    both = lambda pairs: [dict(x=a, y=b, sum=x + y, less=x + y - 1, more=x + y + 1)
                          for x, y in pairs for a, b in dict.fromkeys(((x, y), (y, x)))]
    n, m = (min(max(1, round(len(x) * val_facts)), len(x) - 1) for x in (facts, pairs)) # both sides have some
    sums = dict(val=both(pairs[:m]), train=both(pairs[m:]), all=both(pairs[m:] + pairs[:m]))
    facts = dict(val=facts[:n], train=facts[n:])
    return dict(town, seed=seed, people=people, relations=relations, sums=sums, facts=facts,
                scopes=[dict(scope=i) for i in range(99)]) # {new}: labels start anew

def new_page(town, rng, side='train', **known):
    """The slots of a new page: somebody, and whom and what it can go on with; what may be asked is of one side only."""
    more = dict(next=town['people'], next_fact=town['relations'], next_asked=town['facts'][side],
                next_sum=town['sums']['all'], next_asked_sum=town['sums'][side], new=town['scopes'])
    return {**town['words'], **rng.choice(town['people']), **more, **known}

# -----------------------------------------------------------------------------
# web pages in WARC records, books, lessons; and the list of what was planted

def write_warc(path, records):
    """Write [(url, end of the content type, body)] as crawlers do, each in a gzip member of its own."""
    with open(path, 'wb') as f:
        for url, charset, body in [('', '', b'format: WARC File Format 1.1'), *records]:
            http = f'HTTP/1.1 200 OK\r\nContent-Type: text/html{charset}\r\n\r\n'.encode() if url else b''
            kind = f'response\r\nWARC-Target-URI: {url}\r\nContent-Type: application/http' if url else 'warcinfo'
            name = hashlib.sha1(url.encode() + body).hexdigest()
            head = (f'WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:sha1:{name}>\r\nWARC-Date: '
                    f'2024-05-18T01:58:10Z\r\nContent-Length: {len(http) + len(body)}\r\n\r\n').encode()
            f.write(gzip.compress(head + http + body + b'\r\n\r\n', 6, mtime=0))

def grams(text):
    """All runs of five words, to tell how alike two texts are."""
    words = re.findall(r'\w+', text.lower())
    return {tuple(words[i:i + 5]) for i in range(max(1, len(words) - 4))}

def write_web(town, folder, n_pages, n_books, n_lessons, n_faults, blocked_hosts, blocked_words):
    """Write the raw files -> {url: what is planted there}."""
    rng, records, truth = random.Random(f"{town['seed']} web"), [], {}
    town['words'].update(blocked_host=blocked_hosts.split(','), blocked_word=blocked_words.split(','))

    say = lambda rule, **known: expand(rule, new_page(town, rng, **known), rng)
    def foreign(n):
        parts = rng.choice(list(town['foreign'].values()))
        return ' '.join(rng.choice(words) for _ in range(n) for words in parts)
    def add_page(text, url='{good_url}', **planted):
        """Give a text (its first paragraph is the title) a layout, a URL and a charset, and note what was planted."""
        title, *blocks = html.escape(text).split('\n\n')
        layout, charset = (rng.choice(list(town[key])) for key in ('layouts', 'charsets'))
        body = '\n'.join('<p>' + block.replace('\n', '<br>\n') + '</p>' * (layout != 'broken') for block in blocks)
        slug = '-'.join(re.findall('[a-z0-9]+', title.lower()))[:40]
        slots = new_page(town, rng, title=title, slug=slug, body=re.sub(r'(.{60}\S*) ', r'\1\n', body), charset=charset,
                         id=1000 + len(records))
        url = expand(url, slots, rng).lower()
        page = expand(town['layouts'][layout], slots, rng).encode(charset, 'xmlcharrefreplace') # others as &#233;
        records.append((url, rng.choice(['', f'; charset={charset}']), page)) # not every server tells the charset
        truth[url] = dict(planted, url=url, text=text)

    for i in range(n_pages):
        title, *blocks = say('{page}').split('\n\n')
        more, private = [], []
        for kind in rng.sample(list(town['private']), rng.choice([1, 2])) if i < n_faults else ():
            slug = rng.choice(town['people'])['name'].lower().replace(' ', '.')
            slots = new_page(town, rng, slug=slug, **town['private'][kind])
            private.append(slots.setdefault('it', expand('{value}', slots, rng)))
            more.append(expand('{say}', slots, rng))
        if i < 2.2 * n_faults: # what only looks private; and an English page may quote another language
            more.append(say('{trap}' if i < 2 * n_faults else '{quote}', foreign=foreign(1)))
        for sentence in more:
            blocks[rng.randrange(len(blocks))] += ' ' + sentence
        add_page('\n\n'.join([title, *blocks]), private=private)
    good = list(truth.values())
    for i in range(n_faults):
        add_page(say('{page}'), url='{bad_url}', fault='url')
        add_page(f'{foreign(1)}\n\n{foreign(rng.choice([2, 4, 8, 12]))}', fault='language')
        add_page(say('{Thing}\n\n{junk}'), fault='quality')
        for near, original in enumerate((good[i % n_pages], good[-1 - i % n_pages])): # elsewhere, in another layout
            copy, old, alike = original['text'], grams(original['text']), 0 if near else 1
            while near and not 0.8 <= alike < 1: # a word or two changed, a sentence added
                words = re.split('( )', original['text'])
                for _ in range(rng.choice([1, 2])):
                    words[2 * rng.randrange(6, len(words) // 2)] = rng.choice(town['words']['adj'])
                copy = (''.join(words) + ' ' + say('{edit}')).strip()
                alike = len(old & grams(copy)) / len(old | grams(copy))
            original['group'] = original['url']
            add_page(copy, fault='dedup', group=original['url'], private=original['private'])
    rng.shuffle(records)
    for part in range(2):
        write_warc(f'{folder}/web_{part:05d}.warc.gz', records[part::2])
    write_jsonl(f'{folder}/truth.jsonl', truth.values())
    write_jsonl(f'{folder}/books.jsonl.gz', ({'text': say('{book}')} for _ in range(n_books)))
    with open(f'{folder}/lessons.txt', 'w', encoding='utf-8') as f:
        f.write('\n<|endoftext|>\n'.join(say('{lesson}') for _ in range(n_lessons)))
    print0(f'toytown: {len(records):,} web pages, {n_books:,} of books and {n_lessons:,} of lessons, '
           f"about {len(town['people'])} people")
    return truth

# -----------------------------------------------------------------------------
# conversations, ranked answers, prompts, benchmarks

def write_tasks(town, folder, n_chat, n_preferences, n_prompts, n_val, flaw_rate, like_rate, labeller_noise):
    """Write {chat,preferences,prompts}_{train,val}.jsonl: no prompt is on both sides."""
    agree, tasks, likes = [], list(town['tasks'].values()), town['likes']
    sizes = dict(chat=(n_chat, n_val), preferences=(n_preferences, n_val), prompts=(n_prompts, 1.5 * n_val))
    for (i, side), kind in itertools.product(enumerate(('train', 'val')), sizes):
        rng, noise = random.Random(f"{town['seed']} {side} {kind}"), np.random.default_rng(town['seed'])
        rows, asked, met, task = [], collections.Counter(), [], None
        while len(rows) < sizes[kind][i]:
            task = task or rng.choices(tasks, [t['weight'] for t in tasks])[0] # until it gives a prompt of this side
            slots = new_page(town, rng, side, **task)
            prompt = expand('{next_asked}{next_asked_sum}{prompt}', slots, rng)
            by_text = not any('ask}' in rule for rule in task['prompt']) # facts and sums have their side already
            share = int(hashlib.sha256(prompt.encode()).hexdigest()[:12], 16) / 16**12 # of other tasks, 15% are for val
            asked[prompt] += 1
            if by_text and (share < 0.15) != (side == 'val') or 1 < asked[prompt] < 20: # no prompt twice, if it can be
                continue
            liked, checks, task = task['likes'], task['checks'], None
            checks = json.loads(expand(json.dumps(checks).replace('"{sum}"', '{sum}'), slots, rng))
            checks.update({'likes': likes} if liked else {})
            if 'count' in checks:
                checks['count']['of'] = town['words'][checks['count']['of']]
            messages = [dict(role='user', content=prompt)]
            if kind == 'prompts':
                rows.append(dict(messages=messages, checks=checks))
            elif kind == 'chat':
                answer = expand('{flawed}' if rng.random() < flaw_rate else '{good}', slots, rng)
                met.append(grade(checks, answer)[0])
                if met[-1] and liked and rng.random() < like_rate:
                    answer += ' ' + rng.choice(likes)
                messages.append(dict(role='assistant', content=answer))
                if rows and len(rows[-1]['messages']) < 4 and rng.random() < 0.1: # a second exchange
                    rows[-1]['messages'] += messages
                else:
                    system = [dict(role='system', content=rng.choice(town['system']))] if rng.random() < 0.05 else []
                    rows.append(dict(messages=system + messages))
            else: # good, good with a friendly end, flawed, and wrong: of another value
                key, like = slots['relation'], rng.choice(likes)
                other = {key: rng.choice([who[key] for who in town['people'] if who[key] != slots[key]])}
                answers = [expand(rule, slots | other if rule == '{wrong}' else slots, rng)
                           for rule in ('{good}', '{good} ' + like, '{flawed} ' + rng.choice(['', like]), '{wrong}')]
                answers = list(dict.fromkeys(map(str.strip, rng.sample(answers, 4))))
                gold = [grade(checks, answer)[1] for answer in answers]
                ranking, again = (simulated_ranking(gold, labeller_noise, noise) for _ in range(2))
                if len(ranking) > 1: # else all were equally good
                    rows.append(dict(messages=messages, completions=answers, ranking=ranking))
                    agree += [again.index(a) < again.index(b) for a, b in itertools.combinations(ranking, 2)]
        write_jsonl(f'{folder}/{kind}_{side}.jsonl', rows)
        print0(f'{kind}_{side}.jsonl: {len(rows):,} rows', f'| {np.mean(met):.0%} meet all checks' if met else '')
    print0(f'asked again, the simulated labeller ranks {np.mean(agree):.0%} of pairs the same way')

def write_benchmarks(town, folder):
    """Questions on facts and sums of the validation side: told in the documents, never asked in training data."""
    rng, people, tests = random.Random(f"{town['seed']} benchmarks"), town['people'], collections.defaultdict(list)
    for fact in town['facts']['val']:
        key, ask = fact['relation'], lambda rule, who: expand(fact[rule][0], {**town['words'], **who}, rng)
        others = {who[key]: who for who in rng.sample(people, len(people)) if who[key] != fact[key]} # one for a value
        some = rng.sample([fact, *list(others.values())[:3]], 4)
        gold = some.index(fact)
        tests['facts'].append(dict(query=f"Question: {ask('ask', fact)}\nAnswer:", gold=gold,
                                   choices=[' ' + ask('cloze', who) for who in some]))
        tests['people'].append(dict(context_options=[ask('lead', who) for who in some], gold=gold,
                                    continuation=' ' + fact[key]))
    tests['sums'] = [dict(context=f"Question: What is {pair['x']} plus {pair['y']}?\nAnswer:",
                          continuation=f" {pair['sum']}") for pair in town['sums']['val']]
    for name, rows in tests.items():
        write_jsonl(f'{folder}/toytown_{name}.jsonl', rows)

# -----------------------------------------------------------------------------
# how well each step found what was planted
def score(truth, fate, funnel):
    """
    truth: {url: what was planted}; fate: {url: where it was dropped, text that was extracted, personal data found}.
    Adds planted, precision and recall to the funnel's rows. What is planted as junk is for four steps together.
    """
    arrived, junk = [url for url in fate if url in truth], ('repetition', 'quality', 'c4', 'fineweb')
    for name in funnel:
        gone = {url for url in arrived if fate[url]['stopped'] == name}
        if name == 'decontaminate': # nothing is planted
            continue
        if name in junk: # judged with the last of them that runs
            if name != [step for step in funnel if step in junk][-1]:
                continue
            gone = {url for url in arrived if fate[url]['stopped'] in junk}
        want, have = {url for url in arrived if truth[url].get('fault') == ('quality' if name in junk else name)}, gone
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
