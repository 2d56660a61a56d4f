"""
The main text of a web page: no menus, adverts, lists of links, readers' comments. On the standard library alone.

Four steps, each linear in the size of the page, none of which builds a tree:
    strip     comments, scripts and other raw text go
    scan      one regular expression splits the page at its tags; a stack of open elements makes blocks of the rest
    choose    the part of the page that holds the article, and of its blocks those that are no links and no leftovers
    join      blocks to text, with the lines of lists, tables and code as they were

Ideas: text and link density of blocks (boilerpipe, Kohlschuetter et al. 2010), neighbours decide about short blocks
(jusText, Pomikalek 2011), class names that give a block away (readability; trafilatura, Barbaresi 2021).
Not on html.parser: on pages without their scripts it takes 8.5 ms where this expression takes 1.0 (a mean page of
78,000 characters), and older patch versions of Python have inputs on which its time is quadratic.

$ python extract.py page.html
"""
import collections, contextlib, functools, html, re, sys

MAX_CHARS = 5_000_000 # of a page that are looked at, to bound memory (0.6 GB); Common Crawl cuts pages at 1 or 5 MiB

# elements: without an end; with no break around them; no main text; a second of which ends the first
VOID = set('area base body br col embed head hr html img input link meta param source track wbr'.split())
INLINE = set('abbr acronym b bdi bdo big cite code data del dfn em font i ins kbd label mark nobr q rb rt ruby s samp '
             'small span strike strong sub sup time tt u var'.split())
SKIP = set('aside audio button canvas datalist dialog footer form map math menu nav object select svg video'.split())
LINES = set('li dd dt td th pre'.split()) # short texts are usual in them
REPEATS = set('p li dt dd tr td th option h1 h2 h3 h4 h5 h6'.split())
NOT_TEXT = 'script style title textarea iframe noscript noembed noframes template xmp'.split()
RAW = re.compile(rf"<(?:!--|({'|'.join(NOT_TEXT)})\b)", re.I)
RAW_END = {tag: re.compile(f'</{tag}[^>]*>?', re.I) for tag in NOT_TEXT}
# a '>' may stand in quotes; an end of the page may stand for all that is missing, so no match is ever tried in vain
TAG = re.compile(r'''<(?:(/?[a-zA-Z][^\s/>]*)([^>=]*(?:=(?:\s*"[^"]*"?|\s*'[^']*'?)?[^>=]*){0,500})|[!?/][^>]*)>?''')
NAMES = re.compile(r'''\b(?:class|id|role|itemprop)\s*=\s*("[^"]*|'[^']*|[^\s>]+)''', re.I)
HIDDEN = re.compile(r'''\shidden(?![\w-])|display\s*:\s*none|aria-hidden\s*=\s*["']?true''', re.I)
WORD = re.compile('[A-Z]?[a-z]+|[A-Z]+')
LONG_NUMBER = re.compile('&#(?:[0-9]{8}|[xX][0-9a-fA-F]{8})[0-9a-fA-F]*') # on which int() fails or takes for ever
BREAK = '\x1e' # stands for <br> until white space is squeezed
# what the words of a class, id or role say (cut at '-', '_' and capitals): no main text, or this is it
BAD = set('''
    ad ads adv advert advertisement advertising adverts anzeige werbung sponsor sponsored promo promotion outbrain
    taboola nav navbar navi navigation menu submenu topbar toolbar breadcrumb breadcrumbs pager pagination paging
    search skip sidebar footer foot contentinfo copyright legal cookie cookies consent gdpr banner popup modal
    newsletter login signup subscribe subscription share sharing shares sharedaddy addthis sharethis social socials
    facebook twitter teilen related recommend recommended recommendation recommendations trending popular teaser
    teasers widget widgets blogroll comment comments commentlist kommentare disqus respond reply feedback rating
    ratings tags taglist archive author authorbox bio byline meta metadata postmeta caption figcaption wpcaption
    credit credits hidden noprint print printonly screenreader'''.split())
GOOD = re.compile(r'(?:article|post|entry|story|news|blog|main|page)[-_]?(?:body|content|text|inhalt)|storytext|'
                  r'(?:body|content)[-_]?(?:article|post|entry|text)|\b(?:h?entry|post)\b', re.I)
# short lines that head or make up what is left of a page's furniture, in the languages of many pages
LEFTOVER = re.compile(
    r'(share|tweet|teilen|drucken|print|tags?|temas|photo|foto|folge|related|subscribe|newsletter|comments?)\b|'
    r'schlagw|kategorie|categories|kontakt|impressum|source:|quelle|'
    r'bild:|©|getty|more (on|from|about)|read (more|also)|see also|you (might|may)|also read|'
    r'mehr (zu|zum|aus|von)|weitere |verwandte|ähnliche|das könnte|auch interessant|lesen sie|am meisten|'
    r'follow (us|the)|leave a|post a comment|hinterlasse|schreibe einen|kommentar|view comments|'
    r'sign up|copyright|all rights|this entry was|posted (in|by|on)|filed under|'
    r'letzte änderung|last (modified|updated)|zurück|back to|inne artyku|źródło|czytaj|zobacz|lire aussi|à lire|'
    r'lea también|advertisement|anzeige|diesen (artikel|beitrag)|artikel teilen|permalink', re.I)

Block = collections.namedtuple('Block', 'text linked node kind row') # linked: share of characters that are in links

def strip(page):
    """The page without comments, scripts and the like. What is never closed goes on to the end, as in browsers."""
    parts, pos = [], 0
    for match in RAW.finditer(page):
        if match.start() >= pos:
            parts.append(page[pos:match.start()])
            end = RAW_END[match[1].lower()].search(page, match.end()) if match[1] else None
            pos = page.find('-->', match.end() - 2) + 3 if not match[1] else end.end() if end else 2 # <!--> is whole
            if pos == 2: # no end
                return ' '.join(parts)
    return ' '.join([*parts, page[pos:]])

@functools.lru_cache(20_000) # the same few again and again
def verdict(attrs):
    """What its attributes say about an element: -1 no main text, 1 or 2 the main text, 0 nothing."""
    names = ' '.join(NAMES.findall(attrs))
    if not BAD.isdisjoint(map(str.lower, WORD.findall(names))) or HIDDEN.search(attrs):
        return -1
    return 2 if GOOD.search(names) else int('main' in names and 'role' in attrs)

def scan(page, by_name=True):
    """-> blocks in order, the parent of each element, its verdict. by_name: leave out what a name gives away."""
    blocks, parent, verdicts = [], [0], [0]
    stack, opened = [('', 0)], collections.Counter()
    skip, link, linked, row, bullet = 0, 0, 0, 0, False # skip, link: depth of the stack from which they hold, or 0
    parts = TAG.split(strip(page[:MAX_CHARS]).replace(BREAK, ' '))
    buffer, parts = parts[:1], iter(parts[1:])

    def flush():
        """What was read since the last break becomes a block."""
        nonlocal linked, bullet
        text, share, linked = ''.join(buffer), linked, 0
        buffer.clear()
        if not text or text.isspace(): # as between most tags
            return
        text = html.unescape(LONG_NUMBER.sub('\ufffd', text)) if '&' in text else text
        if opened['pre']:
            text = text.replace(BREAK, '\n').strip('\r\n').rstrip()
        else:
            text = '\n'.join(' '.join(line.split()) for line in text.split(BREAK)).strip()
        if text and not text.isspace(): # &nbsp; alone is nothing
            kind = 'pre' if opened['pre'] else 'li' if bullet else stack[-1][0]
            blocks.append(Block(text, share / len(text), stack[-1][1], kind, row))
            bullet = False

    def pop():
        nonlocal skip, link
        tag = stack.pop()[0]
        opened[tag] -= 1
        skip, link = skip * (skip <= len(stack)), link * (link <= len(stack))
        return tag

    for tag, attrs, text in zip(parts, parts, parts): # the text is what follows the tag
        tag = tag.lower() if tag else 'b' # a bogus comment such as <!doctype html>
        name = tag[1:] if tag[0] == '/' else tag
        if name in INLINE:
            pass
        elif name == 'a': # the second of two starts, or an end, ends the first
            link = len(stack) if tag == 'a' and ('href' in attrs or 'HREF' in attrs) else 0
        elif name in VOID:
            if tag == 'br' and not skip:
                buffer.append(BREAK)
            elif tag in ('hr', '/body'):
                flush()
        elif tag != name: # the end of an element also ends what was left open in it; a stray one ends nothing
            flush()
            while opened[name] and pop() != name:
                pass
            row, bullet = row * (name not in ('tr', 'table')), bullet and name != 'li'
        else:
            flush()
            if stack[-1][0] == 'p' or name in REPEATS and stack[-1][0] == name:
                pop()
            stack.append((name, len(parent)))
            opened[name] += 1
            said = 0 if skip or len(attrs) < 5 else verdict(attrs[:400])
            parent.append(stack[-2][1])
            verdicts.append(max(said, 1) if name in ('article', 'main') else said)
            if not skip and (name in SKIP or by_name and verdicts[-1] < 0
                             or name == 'header' and not opened['article'] + opened['main']):
                skip = len(stack)
            row, bullet = len(parent) if name == 'tr' else row, name == 'li' or bullet and name not in ('ul', 'ol')
        if not skip:
            buffer.append(text)
            linked += len(text.strip()) if link else 0
    flush()
    return blocks, parent, verdicts

def choose(blocks, parent, verdicts):
    """The blocks of the main text."""
    good = [len(b.text) * (b.linked < 0.3 and (len(b.text) > 80 or b.kind == 'pre')) for b in blocks]
    size, inside = [0] * len(parent), [False] * len(parent) # of elements; parents come before their children
    for block, n in zip(blocks, good):
        size[block.node] += n
    for i in range(len(parent) - 1, 0, -1):
        size[parent[i]] += size[i]
    scope = max((i for i, said in enumerate(verdicts) if said > 0 and size[i] > 0.4 * sum(good)),
                key=lambda i: (verdicts[i], size[i]), default=0)
    for i in range(scope, len(parent)):
        inside[i] = i == scope or inside[parent[i]]
    rows = [(b, n) for b, n in zip(blocks, good) if inside[b.node] and b.linked < 0.5]
    paragraphs = [i for i, (_, n) in enumerate(rows) if n] or [0, len(rows)]
    kept = []
    for i, (b, n) in enumerate(rows):
        heading, lined = re.fullmatch('h[1-6]', b.kind), b.kind in LINES or '\n' in b.text
        edge = i > paragraphs[-1] or i < paragraphs[0] and not heading # of the article: no paragraph before or after
        short = len(b.text) < 60 and not b.text.endswith(('.', '!', '?', '"', '”'))
        limit = 0 if b.kind == 'pre' else 15 if b.text.endswith('.') else 120 # "Share prices fell." is a sentence
        if not (edge and short and not lined or len(b.text) < limit and LEFTOVER.match(b.text)):
            kept.append(b)
    return kept

def html_to_text(page):
    """The main text of a page: paragraphs with an empty line between them, '- ' before items, ' | ' between cells."""
    blocks, size = choose(*scan(page)), lambda blocks: sum(len(b.text) for b in blocks)
    if size(blocks) < 200: # names of classes may mislead; half of a page is no menu
        again = choose(*scan(page, by_name=False))
        blocks = again if size(again) > 2 * size(blocks) + 200 else blocks
    parts, last = [], Block('', 0, 0, '', 0)
    for b in blocks:
        cell = b.row and b.row == last.row and b.kind in ('td', 'th') and len(b.text) + len(last.text) < 400
        line = b.kind in LINES and last.kind in LINES and 'pre' not in (b.kind, last.kind)
        parts += [' | ' if cell else '\n' if line else '\n\n' if parts else '', '- ' * (b.kind == 'li'), b.text]
        last = b
    return ''.join(parts)

# labels that mean another charset to browsers (whatwg.org, Encoding); only those in CHARSET are believed at all
ALIAS = dict(pair.split(':') for pair in '''iso-8859-1:cp1252 iso8859-1:cp1252 latin1:cp1252 latin-1:cp1252
    ascii:cp1252 us-ascii:cp1252 iso-8859-9:cp1254 iso-8859-11:cp874 tis-620:cp874 gb2312:gb18030 gbk:gb18030
    x-gbk:gb18030 big5:big5hkscs shift_jis:cp932 shift-jis:cp932 sjis:cp932 x-sjis:cp932 euc-kr:cp949
    ks_c_5601-1987:cp949 iso-8859-8-i:iso-8859-8 macintosh:mac_roman x-mac-cyrillic:mac_cyrillic
    utf-16:utf-16-le'''.split())
CHARSET = re.compile(r'utf-?(8|16-?[lb]e)|(windows-|cp)\d+|iso-?8859-\d+|koi8-[ru]|gb18030|big5hkscs|euc-jp|'
                     r'iso-2022-jp|mac_\w+')

def read_as(raw, content_type=''):
    """Bytes -> (charset, text) by the byte order mark, the HTTP header, the meta tag, as UTF-8, or as windows-1252."""
    label = lambda text: re.findall(r'charset\s*=\s*["\']?\s*([\w-]+)', text.lower())
    meta = ['utf-8' if 'utf-16' in name else name for name in label(raw[:4096].decode('latin-1'))] # read as ASCII
    mark = ['utf-8'] * raw.startswith(b'\xef\xbb\xbf') + ['utf-16-le'] * raw.startswith(b'\xff\xfe')
    for name in [*mark, *['utf-16-be'] * raw.startswith(b'\xfe\xff'), *label(content_type), *meta[:3], 'utf-8']:
        name = ALIAS.get(name, name)
        with contextlib.suppress(LookupError, UnicodeError): # no such charset
            if CHARSET.fullmatch(name):
                text = raw.decode(name, 'replace').replace('\ufeff', '')
                if text.count('\ufffd') <= len(text) / 200: # a few broken bytes: still the right charset
                    return name, text
    return 'cp1252', raw.decode('cp1252', 'replace')

def decode(raw, content_type=''):
    return read_as(raw, content_type)[1]

if __name__ == '__main__':
    try:
        with open(*sys.argv[1:2] or sys.exit('error: name a file, as in: python extract.py page.html'), 'rb') as f:
            print(html_to_text(decode(f.read())).encode('utf-8', 'replace').decode())
    except OSError as e:
        sys.exit(f'error: {e.filename}: {e.strerror}')
