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
    assert decode('“odd”'.encode('utf-16') + b'x').startswith('“odd”') # a mark decides
