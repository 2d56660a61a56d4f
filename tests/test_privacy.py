"""prepare_data.py, personal data: what is replaced and what stays, written by hand; linear time."""

import re
import sys
import time

import pytest
from conftest import definitions

ours = definitions('prepare_data.py')
redact = ours.redact

KINDS = ['EMAIL', 'PHONE', 'IP', 'SSN', 'CARD', 'ADDRESS']
PRIVATE = {
    'EMAIL': ['jo.doe+x@mail.example.org', "o'neil@example.co.uk", 'jörg@müller.de', '1234@x.io'],
    'PHONE': [
        '(212) 555-0123',
        '212-555-0123',
        '212.555.0123',
        '+1 (212) 555-0123',
        '1-800-555-0199',
        '(212)555-0123 ext. 89',
        '+44 20 7946 0958',
        '+44-20-7946-0958',
        '0049 30 1234567',
        '020 7946 0958',
        '(02) 9374 4000',
        '01 42 68 53 00',
        '+7 (495) 123-45-67',
        '8 (495) 123-45-67',
        '+972-2-123-4567',
        '+447700900123',
    ],
    'IP': [
        '8.8.8.8',
        '81.2.69.142',
        '2001:4860:4860::8888',
        '2a00:1450:4001:81b:1:22:333:4444',
        '::ffff:81.2.69.142',
    ],
    'SSN': ['123-45-6789'],
    'CARD': [
        '4111 1111 1111 1111',
        '4222-2222-2222-2',
        '378282246310005',
        '3400 000000 00009',
        '6011.1111.1111.1117',
    ],
    'ADDRESS': [
        '12 Harbour Street',
        '7 North Kingsley Road',
        '221B Baker Street, London NW1 6XE',
        '123 W 45th St',
        'PO Box 99',
        '1600 Pennsylvania Ave NW, Washington, DC 20500',
        '12 Oak Ln, Apt 4B',
        '350 FIFTH AVENUE',
        '12-14 High Street',
    ],
}
TRAPS = [
    'version 8.8.8.8',
    '4.1.2.1',
    '192.168.1.1',
    '127.0.0.1',
    '203.0.113.7',
    '2001:db8::1',
    'fe80::1',
    '::1',
    '224.0.0.1',
    '::ffff:10.0.0.1',
    'Chrome/81.2.69.142',
    '1.2.3.4.5',
    '256.1.2.3',
    'std::vector',
    'a::b',
    'dead::beef',
    '10:20:30',
    '00:1B:44:11:3A:B7',
    '4111 1111 1111 1112',
    '0000 0000 0000 0000',
    '9780306406157',
    'ISBN 978-0-306-40615-7',
    'ISBN 0-306-40615-2',
    '2024-05-17',
    '17.05.2024',
    '05/17/2024',
    '20240517102030',
    '$1,299.00',
    'in 1999 Harbour Street',
    'on May 4, 1999 Main Street',
    '12 Angry Men',
    '9 Supreme Court',
    'Elm Street 5',
    'Harbour Street',
    '1990 1991 1992',
    '51.5074, -0.1278',
    '21-14',
    '@toytown',
    '@app.route',
    'foo@bar',
    'image@2x.png',
    '123-45-6789-X',
    '000-12-3456',
    '666-12-3456',
    '123-00-4567',
    'order no. 212-555-0123',
    '5551234567',
    '555-0123',
    '100 - 200 - 3000',
    '212 555 0123 212 555 0123',
    '112-555-0123',
    '212-155-0123',
    '+100 200',
    '550e8400-e29b-41d4-a716-446655440000',
    'd41d8cd98f00b204e9800998ecf8427e',
    '3.14159265358979',
]


@pytest.mark.parametrize('kind, private', [(kind, private) for kind in PRIVATE for private in PRIVATE[kind]])
def test_found_whole_and_replaced_by_its_placeholder(kind, private):
    assert redact(f'It was {private}, they said ({private}).', KINDS) == (
        f'It was <{kind}>, they said (<{kind}>).',
        [(kind, private)] * 2,
    )


@pytest.mark.parametrize('trap', TRAPS)
def test_what_only_looks_private_stays(trap):
    assert redact(f'It was {trap}, they said.', KINDS) == (f'It was {trap}, they said.', [])


def test_some_are_private_only_after_a_word_for_them():
    assert (
        redact('SSN: 123 45 6789. Call 5551234567. Fax: 555-0123', KINDS)[0] == 'SSN: <SSN>. Call <PHONE>. Fax: <PHONE>'
    )
    assert redact('We saw 123 45 6789.', KINDS)[1] == []


def test_only_the_kinds_asked_for():
    text = 'jo@x.org or 212-555-0123'
    assert redact(text, ['EMAIL']) == ('<EMAIL> or 212-555-0123', [('EMAIL', 'jo@x.org')])
    assert redact(text, ['PHONE']) == ('jo@x.org or <PHONE>', [('PHONE', '212-555-0123')])
    assert redact(text, []) == (text, []) and redact('', KINDS) == ('', [])


@pytest.mark.parametrize('after', [' 12/27', ' 10 times', ' 2027', ', 4 cards', ' 4111111111111111', ' 123'])
def test_a_card_is_found_whatever_number_follows(after):
    assert redact(f'Paid with 4111 1111 1111 1111{after}', KINDS)[1][0] == ('CARD', '4111 1111 1111 1111')


def test_phones_of_any_form_after_a_word_for_them():
    for said in ('Call %s.', 'Phone: %s', 'call us at %s!', 'Tel.:\n%s', 'cell-%s', 'Contact Ann Lee on %s.',
                 'Ask the police to call on %s', 'Call 555-0123 or %s'):
        for phone in ('283-182-3829', '(555) 123-4567', '347 123 4567', '1234567890', '0490 75 40 81',
                      '212-555-0123 EXT623', '0471 / 80 60-745', '900 – 509 – 6941'):
            text, found = redact(said % phone, KINDS)
            assert ('PHONE', phone) in found, (said, phone, text)
    for said in ('call stack depth 1234567890', 'cell count 283-182-3829', 'text segment 347 123 4567',
                 'Last call 2024-05-17', 'mobile 2019-2020', 'Call 17.05.2024', 'phone 192.168.1.100', 'Tel. <PHONE>, Mo-Fr 9.00-16.00',
                 'Contact: <EMAIL>\n1234567890'):
        assert redact(said, KINDS) == (said, [])


def test_numbers_with_typographic_dashes_and_dots():
    for ssn in ('123-45-6789', '123–45–6789', '123‑45‑6789'):
        assert redact(f'It was {ssn}.', KINDS) == ('It was <SSN>.', [('SSN', ssn)])
    assert redact('SSN 123.45.6789', KINDS)[0] == 'SSN <SSN>' and not redact('part 123.45.6789', KINDS)[1]
    assert redact('Paid with 4111–1111–1111–1111', KINDS)[0] == 'Paid with <CARD>'
    assert redact('+81 158-23-2012', KINDS)[0] == '<PHONE>' # not a social security number after +81


def test_versions_are_no_ip_addresses():
    for said in ('Firefox 115.0.2.1', 'kernel 5.15.90.1', 'Acme Player 32.0.0.45', 'version 81.2.69.142'):
        assert redact(f'We run {said} here.', KINDS)[1] == []
    for said in ('The server 81.2.69.42', 'IP 81.2.69.42', 'It ended. 81.2.69.42'):
        assert redact(f'{said} here.', KINDS)[1] == [('IP', '81.2.69.42')]


def test_addresses_of_code_are_no_mail():
    for said in ('git@github.com:o/r.git', 'git@github.com', 'scp a.txt jo@host.example.org:/tmp/a', 'me@box.com:src/'):
        assert redact(said, KINDS)[1] == []
    assert redact('jo@x.org: yes', KINDS)[1] == redact('(jo@x.org)', KINDS)[1] == [('EMAIL', 'jo@x.org')]


def test_a_street_ends_its_phrase():
    for address in ('101 main st.', '12 Oak Street', '282 Highway 84', '98 Broadway', '12 rue de Rivoli',
                    '6 Avenue of the Americas', '742 Evergreen Terrace', '201 E. Nine Mile Rd.'):
        for said in ('She lives at %s', '%s\nHome', 'HQ: %s'):
            assert redact(said % address, KINDS)[1] == [('ADDRESS', address)], (said, address)
    assert redact('The shop at 12 Oak Street closed.', KINDS)[1] == [('ADDRESS', '12 Oak Street')]
    for said in ('0 Comments Email Follow Us Close', '5 Comments Email Follow Us Close', '30 Minute Drive', 'a 2 lane road.',
                 '7 Ways To Find Your Place', '15 Court Street lawyers', '3 Abbey Road albums', 'two 10 minute drives'):
        assert redact(said + '\nHome', KINDS)[1] == []


def test_invisible_characters_go_before_every_step():
    doc = dict(html='<p>Write to ann@exam&shy;ple.com, call 212-\u200b555-\u20600123\ufeff.'.encode(), type='')
    assert ours.text_step(doc) is None and doc['text'] == 'Write to ann@example.com, call 212-555-0123.'
    assert redact(doc['text'], KINDS)[0] == 'Write to <EMAIL>, call <PHONE>.'
    kept = dict(text='می\u200cخواهم 👩\u200d🌾') # Persian and emoji need the joiners
    assert ours.text_step(kept) is None and kept['text'] == 'می\u200cخواهم 👩\u200d🌾'


# -----------------------------------------------------------------------------
# time


def characters(parsed):
    """Some of each character that a parsed regular expression names."""
    found = set()
    for op, value in parsed:
        name = str(op)
        if name in ('LITERAL', 'NOT_LITERAL'):
            found.add(chr(value))
        elif name == 'RANGE':
            found.add(chr(value[0]))
        elif name == 'CATEGORY':
            found.add({'DIGIT': '1', 'SPACE': ' '}.get(str(value).split('_')[-1], 'a'))
        elif name == 'BRANCH':
            for branch in value[1]:
                found |= characters(branch)
        elif name == 'IN':
            found |= characters(value)
        elif isinstance(value, tuple):
            for part in value:
                found |= characters(part) if hasattr(part, 'getwidth') else set()
    return found


def units_of(pattern):
    """Short strings that the pattern could stumble over: one or two of its characters."""
    parser = pytest.importorskip('re._parser' if sys.version_info >= (3, 11) else 'sre_parse')
    kinds = {}
    for c in sorted(characters(parser.parse(pattern.pattern))):
        kind = 'Aa'[c.islower()] if c.isalpha() else '1' if c.isdigit() else '‐' if c in '‐–—―−' else c
        kinds.setdefault(kind, c) # one of each kind
    few = list(kinds.values())[:9]
    return few + [a + b for a in few for b in few]


REGEXES = {f"{row['kind']} {row['example']}": found[1] for row, found in zip(ours.PII['patterns'], ours.PII_PATTERNS)}
REGEXES |= {name: re.compile(pattern) for name, pattern in ours.PII['needed'].items()}
REGEXES |= {name: getattr(ours, name) for name in ('POLICY', 'CITATION', 'QUOTES', 'DASHES', 'UNSPACED', 'WORD')}


@pytest.mark.parametrize('name', REGEXES)
def test_every_pattern_takes_linear_time(name):
    """1 MB takes less than a second, where a quadratic pattern takes hours."""
    example = name.partition(' ')[2] or 'x'
    strings = [unit * (50_000 // len(unit)) for unit in units_of(REGEXES[name])]
    strings += [unit * (1_000_000 // len(unit)) for unit in {example, example[:-1] or 'x'}]
    for text in strings:
        start = time.process_time()
        REGEXES[name].sub('', text)
        assert time.process_time() - start < 5, text[:20]


@pytest.mark.parametrize('unit', ['1 ', 'a.', 'A ', '(2', '1 Oak St A ', "1 A'", '212 555 0123 ', 'call 1', '1 main st '])
def test_redaction_takes_linear_time(unit):
    start = time.process_time()
    redact(unit * (200_000 // len(unit)) + '@1', KINDS)
    assert time.process_time() - start < 15


@pytest.mark.parametrize('unit', ['.', '. ', '."', '\n', '\n ', '[', '[1', '# ', '…', "'", 'a', 'a ', '雨', '-', 'cookie ',
                                  'a' * 70 + '\n'])
def test_the_steps_that_judge_text_take_linear_time(unit):
    text = unit * (200_000 // len(unit))
    start = time.process_time()
    for name in ('language', 'repetition', 'quality', 'c4', 'fineweb'):
        getattr(ours, f'{name}_step')(dict(text=text))
    ours.minhash(text)
    assert time.process_time() - start < 15


def test_every_pattern_finds_its_example():
    for row, (kind, pattern, _) in zip(ours.PII['patterns'], ours.PII_PATTERNS):
        assert pattern.search(row['example']), row
        assert redact(f"It is {row['example']}.", [kind])[1][0][0] == kind


def test_the_step_replaces_or_drops():
    doc = dict(text='My number is 123-45-6789.')
    assert ours.pii_step(doc) is None
    assert doc == dict(text='My number is <SSN>.', private=[('SSN', '123-45-6789')])
    for kinds in ('SSN', 'ssn', 'card, ssn'):
        pii_step = definitions('prepare_data.py', drop_private=kinds).pii_step
        assert pii_step(dict(text='It is 123-45-6789.')) == 'has SSN'
