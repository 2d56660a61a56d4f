"""prepare_data.py, main text: lists, tables, code; what is not main text; charsets; broken and hostile pages."""

import time

import pytest
from conftest import definitions

ours = definitions('prepare_data.py')
html_to_text, MAX_CHARS = ours.html_to_text, ours.MAX_CHARS


def decode(raw, content_type=''):
    return ours.decode(raw, content_type)[1]


STORY = 'The old house stood at the end of the long road, and nobody had lived in it for many, many years. '

def test_lines_of_lists_tables_code_headings_and_breaks():
    page = f'''<p>{STORY}</p>
<h2>Head <em>line</em></h2><p>one<br>two &lt;b&gt;</p><ul><li>a<li><p>b</p><p>b2</p></li></ul>
<table><tr><th>x<th>y</tr><tr><td>1</td><td><b>2</b></td></tr></table><pre>
def f():
    return  1 &lt; 2
</pre><p>A <a name=here>named</a> place,
broken line.<p>{STORY}'''
    assert html_to_text(page) == (
        f'{STORY.strip()}\n\nHead line\n\none\ntwo <b>\n\n- a\n- b\n\nb2\n\nx | y\n1 | 2\n\n'
        f'def f():\n    return  1 < 2\n\nA named place, broken line.\n\n{STORY.strip()}'
    )

@pytest.mark.parametrize(
    'noise',
    [
        '<nav>NOISE</nav>',
        '<div class="shareButtons">NOISE</div>',
        '<div id=comments><p>NOISE. ' + STORY * 3 + '</div>',
        '<div style="display: none"><p>NOISE.</div>',
        '<script>if (1 < 2) "<p>NOISE.</p>"</script>',
        '<style>NOISE</style>',
        '<!-- <p>NOISE.</p> -->',
        '<ul><li><a href=1>NOISE</a><li><a href=2>NOISE</a></ul>',
        '<div role="contentinfo">NOISE.</div>',
        '<svg><text>NOISE</text></svg>',
        '<p>Read more: NOISE of the town</p>',
        '<img alt="a > NOISE">',
    ],
)
def test_no_main_text(noise):
    text = html_to_text(f'<body><div><p>{STORY}</p>{noise}<p>Second. {STORY}</p></div></body>')
    assert text == f'{STORY.strip()}\n\nSecond. {STORY.strip()}'

LONG = (STORY * 4).strip()

@pytest.mark.parametrize(
    'tag',
    [
        'form method=post', # ASP.NET
        'div class="field--label-hidden"', # Drupal
        'div class=content-sidebar-wrap',
        'div class=no-sidebar',
        'div class=single-author',
        'div id=search-content',
        'div id="print-content" role=form',
        'body style="display:none"',
        'aside',
        'menu',
    ],
)
def test_an_element_that_holds_most_of_the_page_is_no_furniture(tag):
    noise = f'<div class=sidebar><p>NOISE. {STORY}</div><nav><p>NOISE. {STORY}</nav>'
    page = f'<p>{STORY}<{tag}><h1>Head</h1><p>{LONG}<p>{LONG}{noise}</{tag.split()[0]}>{noise}'
    assert html_to_text(page) == f'{STORY.strip()}\n\nHead\n\n{LONG}\n\n{LONG}'

def test_a_page_that_is_hidden_until_a_script_has_run():
    page = f'<p>{STORY}<div style="visibility: hidden"><p>{LONG * 6}</div>'
    assert html_to_text(page) == f'{STORY.strip()}\n\n{LONG * 6}'

def test_many_small_elements_with_bad_names_are_the_text_if_nothing_else_is():
    slides = [f'Slide {i}. {STORY}'.strip() for i in range(30)]
    page = ''.join(f'<div class="caption"><p>{slide}</div>' for slide in slides)
    assert html_to_text(f'<p>{STORY}{page}') == '\n\n'.join([STORY.strip(), *slides])

def test_comments_are_no_main_text_though_they_hold_most_of_the_page():
    page = f'<article><p>{LONG}</article><ol class=commentlist><li><p>{LONG} NOISE<li><p>{LONG}</ol>'
    assert html_to_text(page) == LONG

def test_articles_of_like_size_all_stay():
    page = ''.join(f'<article><p>{i} {LONG}</article>' for i in 'AB')
    assert html_to_text(page) == f'A {LONG}\n\nB {LONG}'
    longer = f'<article class=post><p>A {LONG * 4}</article><article class=post><p>B {LONG * 3}</article>'
    assert html_to_text(f'<p>{STORY}{longer}') == f'A {LONG * 4}\n\nB {LONG * 3}'

@pytest.mark.parametrize(
    'inside, text',
    [
        ('<svg><g><text>NOISE</text></g></svg>', ''),
        ('<button><div>NOISE</div></button>', ''),
        ('<select><option>NOISE<option>NOISE</select>', ''),
        ('<math><mi>x</mi><mo>=</mo><mn>2</mn><annotation>NOISE</annotation></math>', 'x=2'),
        ('<my-word class="x">word</my-word>', 'word'),
        ('<span hidden>NOISE <span>NOISE</span> NOISE</span>', ''),
        ('<a href=1 aria-hidden="true">NOISE</a>', ''),
        ('<i style="display:none">NOISE</i>', ''),
        ('<!-- -->', ''),
    ],
)
def test_a_sentence_is_not_cut_by_what_stands_in_it(inside, text):
    assert html_to_text(f'<p>{STORY}It is <b>{inside}</b>here.<p>{STORY}') == (
        f'{STORY}It is {text}here.\n\n{STORY.strip()}'
    )

def test_what_is_skipped_and_never_ends_ends_with_its_parent():
    assert html_to_text(f'<p>{STORY}<svg><g>NOISE</p><p>{LONG}') == f'{STORY.strip()}\n\n{LONG}'
    assert html_to_text(f'<p>{STORY}<p>{LONG}<span hidden>NOISE') == f'{STORY.strip()}\n\n{LONG}'

@pytest.mark.parametrize(
    'attributes, is_hidden',
    [
        ('hidden', True),
        ('HIDDEN=""', True),
        ('class=x hidden id=y', True),
        ('aria-hidden="true"', True),
        ('Aria-Hidden = TRUE', True),
        ('style="display:none"', True),
        ('style="color: red; DISPLAY : NONE !important"', True),
        ("style='visibility: hidden'", True),
        ('style=visibility:hidden', True),
        ('style="overflow: hidden"', False),
        ('style="overflow:hidden;display:block"', False),
        ('style="backface-visibility: hidden"', False),
        ('title="a hidden gem"', False),
        ('data-state="hidden"', False),
        ('alt="display: none"', False),
        ('aria-hidden="false"', False),
        ('data-hidden', False),
    ],
)
def test_hidden_is_what_a_browser_hides(attributes, is_hidden):
    text = html_to_text(f'<p>{LONG}<div {attributes}><p>Block. {STORY}</div><p>{LONG}')
    assert ('Block' not in text) == is_hidden
    assert text.count(LONG) == 2

@pytest.mark.parametrize(
    'tag',
    ['p class="gdpr-intro"', 'p class=copyright-law', 'h2 id=search-for-truth', 'blockquote class=author-quote'],
)
def test_names_do_not_decide_about_long_paragraphs(tag):
    end = tag.split()[0]
    page = f'<div><p>{LONG}<{tag}>Named. {STORY}</{end}><{tag}>NOISE</{end}><p>{LONG}</div>'
    assert html_to_text(page) == f'{LONG}\n\nNamed. {STORY.strip()}\n\n{LONG}'

def test_the_article_of_a_page_is_chosen_and_a_misleading_class_is_not_believed():
    outside = '<div><p>Outside. ' + STORY + '</p></div>'
    assert html_to_text(f'{outside}<article><p>{STORY * 3}</p></article>') == (STORY * 3).strip()
    assert 'Outside' in html_to_text(f'{outside}<article><p>Short.</p></article>') # it holds too little
    assert html_to_text(f'<div class="comments"><p>{STORY * 4}</div>') == (STORY * 4).strip() # there is nothing else

@pytest.mark.parametrize('label, codec', [('gb2312', 'gb18030'), ('shift_jis', 'cp932'), ('big5', 'big5hkscs')])
def test_charsets_as_browsers_alias_them(label, codec):
    for text in {'gb18030': '镕基', 'cp932': '①', 'big5hkscs': '㗎'}[codec], '':
        assert decode(text.encode(codec), f'text/html; charset={label}') == text
        assert decode(f'<meta charset="{label}">{text}'.encode(codec)).endswith(f'>{text}')

def test_a_sentence_is_no_leftover():
    page = f'<p>{STORY}<p>Share prices fell.<p>Photosynthesis needs light<p>Share<p>{STORY}'
    assert html_to_text(page).split('\n\n')[1:-1] == ['Share prices fell.', 'Photosynthesis needs light']

def test_charset_order_and_doubt():
    assert decode('é'.encode('utf-8-sig'), 'charset=koi8-r') == 'é' # the mark beats the header
    assert decode('<meta charset=koi8-r>é'.encode(), 'charset=utf-8').endswith('é') # the header beats the tag
    assert decode('“é”'.encode('cp1252'), 'charset=iso-8859-1') == '“é”'
    assert decode(b'+AGE-', 'charset=utf-7') == '+AGE-' # no browser reads UTF-7 any more
    assert decode('<meta charset=utf-16>é'.encode()).endswith('é') # whoever could read this tag reads no UTF-16
    assert decode(b'') == ''

N = 300_000
@pytest.mark.parametrize(
    'page',
    [
        '<' * N,
        '<!' * N,
        '<a ' * N,
        '<!--' * N,
        '<script>' * N,
        '<a href="' * N,
        "<p class='x" * N,
        '<a ' + '=' * N,
        '&#' + '9' * N,
        '&' * N,
        '\0' * N,
        '<div>' * 30_000 + '</p>' * 30_000 + 'deep',
        '<table><tr><td>' * 20_000,
        'word ' * 20 * N,
        '<main>x' * 57_000,
        '<main hidden>x' * 57_000,
        '<svg>' * 57_000 + '</g>' * 57_000,
        '<b hidden><b>x</b>' * 20_000,
        '<p class=' + 'x ' * N,
        '<p style="' + 'display ' * N,
        ''.join(f'<p {i} hidden' + ' a' * 1000 + '>' for i in range(500)),
    ],
    ids=lambda page: page[:12],
)
def test_hostile_pages_take_seconds_not_hours(page):
    start = time.process_time()
    assert len(html_to_text(page)) <= MAX_CHARS
    assert time.process_time() - start < 20 # quadratic ones would take hours; on a slow machine these take two


PAGE = '''<!doctype html><html><head><title>No</title>
<style>p { color: red }</style><script>if (a < b) document.write("<p>No</p>")</script></head>
<body class="no-sidebar"><div id="cookie-banner">No cookies</div><nav><a href=1>No</a></nav>
<div><a href=1>No</a> | <a href=2>No</a></div><h1>Title</h1><p>First &amp; <b>bold</b>
text with <a href=x>one link</a>.<p>Caf&eacute;&nbsp;&#8212; <!-- no -->second<br>line.</p>
<ul><li>one<li>two</ul><pre>  a
    b</pre></b></div><aside>No</aside><p class="advert">No<p>Last.<footer>No</footer></body>'''


def test_main_text_of_a_page():
    doc = dict(html=PAGE.encode(), type='text/html')
    assert ours.text_step(doc) is None
    assert doc['text'] == ('Title\n\nFirst & bold text with one link.\n\nCafé — second\nline.\n\n- one\n- two\n\n'
                           '  a\n    b\n\nLast.')


@pytest.mark.parametrize('page', ['<div>' * 20_000 + 'deep', '<p>cut <a href="', '<![CDATA[x', '<!doctype', '',
                                  '</p>' * 1000 + 'x', '<script>never closed', '&#xffffffff; &#0; &nosuch;',
                                  '<p\x00>nul', '<table><tr><td>' * 2000])
def test_broken_pages(page):
    assert isinstance(html_to_text(page), str)


def test_charsets():
    for raw, header in (
        ('Café'.encode(), ''),
        ('Café'.encode(), 'text/html; charset=UTF-8'),
        ('Café'.encode('cp1252'), 'text/html; charset=iso-8859-1'),
        ('Café'.encode('cp1252'), 'text/html'),
        ('Café'.encode('utf-16'), ''),
        ('\ufeffCafé'.encode(), ''),
        ('Café'.encode('cp1252'), 'text/html; charset=nosuchcharset'),
        ('Café'.encode(), 'charset="rot13"'),
    ):
        assert decode(raw, header) == 'Café', (raw, header)


MENU = '<ul>' + '<li><a href="/">Home</a></li>' * 3000 + '</ul>' # plain tags


@pytest.mark.parametrize('around', ['', MENU])
def test_a_page_without_a_charset_is_utf_8_or_windows_1252_whatever_stands_around(around):
    for text in ('“Hello” — café’s', '“', 'naïve', '…', '€ 5'):
        for page in (text, around + text, text + around):
            assert decode(page.encode('cp1252')) == page
            assert decode(page.encode()) == page
            assert decode(page.encode(), 'text/html; charset=utf-8') == page
            assert decode(page.encode('cp1252'), 'text/html; charset=utf-8') == page # the label is wrong
    page = around + 'Der Müller sagt: „Grüß Gott, schöne Gäste.“ \ufffd' # the page itself says U+FFFD
    assert decode(page.encode()) == page
    cut = ('é' * 20 + around).encode() + 'é'.encode()[:1] # crawlers cut long pages anywhere
    assert decode(cut).startswith('é' * 20)


@pytest.mark.parametrize('label', ['ISO-8859-1', 'iso8859-1', 'latin1', 'us-ascii', 'windows-1252', 'ISO-8859-15',
                                   'windows-1251', 'gbk', 'shift_jis', 'big5', 'euc-kr'])
def test_utf_8_under_a_wrong_label(label):
    for text in ('café isn’t', 'Grüße', '東京の天気', 'Привет'):
        page = f'<meta charset="{label}">{text}'
        assert decode(page.encode()) == page
        assert decode(text.encode(), f'text/html; charset={label}') == text
        assert decode((MENU + text).encode(), f'text/html; charset={label}').endswith(text)


def test_text_under_its_right_label():
    texts = {'iso-8859-2': 'Žluťoučký kůň', 'windows-1251': 'Съешь ещё этих мягких булок', 'koi8-r': 'Съешь ещё',
             'gb18030': '天地玄黄宇宙洪荒', 'big5': '天地玄黃宇宙洪荒', 'shift_jis': 'いろはにほへと東京',
             'euc-jp': 'いろはにほへと東京', 'iso-2022-jp': 'いろはにほへと', 'euc-kr': '다람쥐 헌 쳇바퀴에',
             'windows-1253': 'Ξεσκεπάζω την ψυχοφθόρα', 'windows-1256': 'نص حكيم له سر قاطع'}
    for label, text in texts.items():
        for page in (text, MENU + text, f'<meta http-equiv=content-type content="text/html; charset={label}">{text}'):
            header = '' if 'meta' in page else f'text/html;charset = "{label.upper()}"'
            assert decode(page.encode(label), header) == page, label
    assert decode('<meta charset=utf-16le>plain'.encode()).endswith('plain')
    assert decode('<meta charset=cp037>plain'.encode()).endswith('plain') # EBCDIC
    assert decode('“x” \ufffd'.encode('cp1252', 'replace') + '\ufffd'.encode(), 'charset=rot13') == '“x” ?ï¿½'
    assert decode('“odd”'.encode('utf-16') + b'x').startswith('“odd”') # a mark decides
