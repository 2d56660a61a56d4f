"""
From the rows of public data sets to rows of our own: conversations, ranked answers, prompts, questions of benchmarks.

FORMS names a function for the keys by which a row is known. It takes the row and the one before it, and gives the
[(kind, our row)] that the row is good for; the kind None with a reason is counted, and left out. read_row checks them.
"""
import functools, re

import requests

from model import die, grade

LANGUAGES = ('en',) # of the conversations of oasst

turns = lambda asked, said: [dict(role='user', content=asked.strip()), dict(role='assistant', content=said.strip())]

def dialog(text, pattern=r'(?:^|\n\n)(Human|Assistant): ?'):
    """'\\n\\nHuman: Hi\\n\\nAssistant: Hello' -> messages."""
    first, *parts = re.split(pattern, text.lstrip())
    if first or not parts:
        raise ValueError('not a dialogue of the form "\\n\\nHuman: ... \\n\\nAssistant: ..."')
    roles = {'Human': 'user', 'User': 'user', 'Assistant': 'assistant'}
    return [dict(role=roles[who], content=said.strip()) for who, said in zip(parts[::2], parts[1::2])]

def ranked(messages, completions, scores):
    """A ranking, best first; of completions with one score only the first is listed."""
    first = {score: i for i, score in reversed([*enumerate(scores)])}
    ranking = [first[score] for score in sorted(first, reverse=True)]
    row = dict(messages=messages, completions=[text.strip() for text in completions], ranking=ranking)
    return [('preferences', row) if len(ranking) > 1 else (None, 'ranking with nothing but ties')]

def alpaca(row, last):
    """instruction and input or context, or both in Alpaca's template; output or response."""
    asked = row['prompt'] if 'prompt' in row else [row['instruction'], row.get('input') or row.get('context')]
    if 'prompt' in row:
        filled = re.search(r'### Instruction:\n(.*?)(?:\n+### Input:\n(.*?))?\n+### Response:', asked, re.S)
        asked = filled.groups() if filled else [asked]
    said = row['response'] if 'response' in row else row['output']
    return [('chat', dict(messages=turns('\n\n'.join(filter(None, asked)), said)))]

def gsm8k(row, last):
    """The answer ends in #### and a number; <<2+3=5>> was for a calculator."""
    messages = turns(row['question'], re.sub(r'<<.*?>>', '', row['answer']))
    number = re.findall(r'#### *(-?[\d.]*\d)', row['answer'].replace(',', ''))[:1]
    return [('prompts', dict(messages=messages[:1], checks={'number': float(n)})) for n in number] + [
        ('chat', dict(messages=messages))]

def hh(row, last):
    a, b = dialog(row['chosen']), dialog(row['rejected'])
    n = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), 0) # up to here they are the same
    if not n or not a[n]['role'] == b[n]['role'] == 'assistant':
        return [(None, 'pair that does not differ in an answer')]
    return ranked(a[:n], [a[n]['content'], b[n]['content']], [1, 0])

def helpsteer2(row, last):
    """The two answers to a prompt are two rows, one after the other; a prompt may hold earlier turns."""
    messages = dialog('<extra_id_1>User\n' + row['prompt'], r'(?:^|\n*)<extra_id_1>(User|Assistant)\n')
    pair = last and last['prompt'] == row['prompt'] and [last, row]
    return ranked(messages, [r['response'] for r in pair], [r['helpfulness'] for r in pair]) if pair else []

def ultrafeedback(row, last):
    """Four answers; the score of each is the mean of GPT-4's ratings of four virtues, where it gave one."""
    ratings = [[v['Rating'] for v in a['annotations'].values() if v['Rating'] != 'N/A'] for a in row['completions']]
    scores = [sum(map(float, given)) / max(1, len(given)) for given in ratings]
    return ranked(turns(row['instruction'], '')[:1], [a['response'] for a in row['completions']], scores)

@functools.lru_cache(1)
def gpt2():
    import tiktoken
    try:
        return tiktoken.get_encoding('gpt2')
    except requests.RequestException as e: # it is downloaded the first time
        die(f"no tokens of GPT-2 ({type(e).__name__}): set TIKTOKEN_CACHE_DIR to a folder that has them")

def best_of_4(row, last):
    """Token ids of GPT-2. Which of four is best was asked, no more: three pairs, the best and each of the others."""
    text = lambda ids: gpt2().decode([i for i in ids if i < 50257]).strip() # the rest is padding
    asked, texts = turns(text(row['query']), '')[:1], [text(row[f'sample{i}']) for i in range(4)]
    best = texts[row['best']]
    others = [other for other in dict.fromkeys(texts) if other != best]
    return [pair for other in others for pair in ranked(asked, [best, other], [1, 0])] or ranked(asked, texts, [0] * 4)

def oasst(row, last):
    """A tree of turns: the conversation of the best answers, and all that people have ranked; rank 0 is the best."""
    if row['prompt']['lang'] not in LANGUAGES:
        return [(None, 'conversation in another language')]
    rank = lambda node: 1e9 if node.get('rank') is None else node['rank']
    items, best, waiting = [], None, [([], row['prompt'])]
    while waiting:
        before, node = waiting.pop()
        messages = before + [dict(role=node['role'].replace('prompter', 'user'), content=node['text'].strip())]
        replies = sorted(node['replies'], key=rank)
        best = best or (None if replies else messages) # the first way down is that of the best replies
        answers = [reply for reply in replies if reply['role'] == 'assistant' and rank(reply) < 1e9]
        if len(answers) > 1:
            items += ranked(messages, [answer['text'] for answer in answers], [-rank(answer) for answer in answers])
        waiting += [(messages, reply) for reply in reversed(replies)]
    best = best[:len(best) // 2 * 2] # to an answer
    return [('chat', dict(messages=best)) if best else (None, 'question without an answer'), *items]

def hellaswag(row, last):
    text = lambda s: re.sub(' {2,}', ' ', re.sub(r'\[.*?\]', '', s.replace(' [title]', '.'))).strip() # WikiHow's marks
    return [('benchmarks', dict(query=text(f"{row['activity_label']}: {row['ctx']}"),
                                choices=[*map(text, row['endings'])], gold=int(row['label'])))]

as_it_is = lambda kind, *keys: lambda row, last: [(kind, {key: row[key] for key in keys or row if key in row})]
FORMS = { # by the keys that a row must have: the first that fits
    'messages completions ranking': as_it_is('preferences', 'messages', 'completions', 'ranking', 'checks'),
    'messages checks': as_it_is('prompts', 'messages', 'checks'), 'messages': as_it_is('chat', 'messages'),
    'prompt response helpfulness': helpsteer2, 'prompt response': alpaca, 'instruction output': alpaca,
    'instruction response': alpaca, 'question answer': gsm8k, 'chosen rejected': hh, 'message_tree_id prompt': oasst,
    'instruction completions': ultrafeedback, 'query sample0 best': best_of_4, 'text': as_it_is('text', 'text'),
    'query choices gold': as_it_is('benchmarks'), 'context continuation': as_it_is('benchmarks'),
    'context_options gold': as_it_is('benchmarks'), 'task_id prompt test': as_it_is('benchmarks'),
    'endings label activity_label': hellaswag}
EXAMS = { # what these rows are in a source of benchmarks: GSM8K's checked prompts, and LAMBADA's last word
    'question answer': lambda row, last: [('benchmarks', new) for kind, new in gsm8k(row, last) if kind == 'prompts'],
    'text': lambda row, last: [('benchmarks', dict(zip(('context', 'continuation'), row['text'].rsplit(' ', 1))))]}

def read_row(row, last, forms):
    """Yield (kind, our row), checked, of all that a row is good for."""
    form = next((form for form in forms if set(form.split()) <= set(row)), None)
    if not form:
        raise ValueError(f"no known form has the keys {', '.join(sorted(row))}; FORMS in forms.py lists them")
    asked = None
    for kind, new in forms[form](row, last):
        if kind == 'text':
            new['text'] + '' # a TypeError, if it is none
        elif kind == 'benchmarks' and 'choices' in new and not 0 <= int(new['gold']) < len(new['choices']):
            raise ValueError(f"gold {new['gold']} is none of {len(new['choices'])} choices")
        elif kind in ('chat', 'preferences', 'prompts'):
            grade(new.get('checks', {'equals': ''}), 'a 1') # a check that is of no use is found here, not hours later
            roles = {message['role'] for message in new['messages'] if message['content'].strip()}
            if 'user' not in roles or not roles <= {'system', 'user', 'assistant'}:
                raise ValueError('messages need a user turn and no roles but system, user, assistant; '
                                 f'not {sorted(roles)}')
            if kind == 'chat' and 'assistant' not in roles:
                raise ValueError('a conversation with no assistant turn, or an empty one')
            order = 's?(ua)+' if kind == 'chat' else 's?(ua)*u'
            if not re.fullmatch(order, ''.join(message['role'][0] for message in new['messages'])):
                kind, new = None, 'turns in another order than user, assistant'
        if kind == 'preferences':
            r, texts = new['ranking'], new['completions']
            if not (1 < len(r) == len({*r} & {*range(len(texts))}) and {*map(type, r)} == {int}
                    and {*map(type, texts)} == {str}):
                raise ValueError(f'ranking {r} must name two or more of the completions, which are texts, each once')
            if 'ranking' not in form and new['messages'] != asked: # its prompt is also one to practise on
                asked = new['messages']
                yield 'prompts', dict(messages=asked)
        yield kind, new
