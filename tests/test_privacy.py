"""prepare_data.py, personal data: what is replaced and what stays, written by hand; linear time."""

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


@pytest.mark.parametrize(
    'unit',
    [
        '1 ',
        'a',
        '1.',
        ':',
        'A ',
        '1 A ',
        'a@',
        'a.',
        '4444 ',
        '(2',
        '2001:',
        '+1 ',
        '1 Oak St A ',
        'a@b.',
        '1-',
        '0 ',
        "1 A'",
        '212 555 0123 ',
    ],
)
def test_linear_time(unit):
    start = time.process_time()
    redact(unit * (300_000 // len(unit)) + '@1', KINDS)
    assert time.process_time() - start < 15  # less than 1 s; a quadratic pattern would take hours


def test_every_pattern_finds_its_example():
    for row, (kind, pattern, _) in zip(ours.PII['patterns'], ours.PII_PATTERNS):
        assert pattern.search(row['example']), row
        assert redact(f"It is {row['example']}.", [kind])[1][0][0] == kind


def test_the_step_replaces_or_drops():
    doc = dict(text='My number is 123-45-6789.')
    assert ours.pii_step(doc) is None
    assert doc == dict(text='My number is <SSN>.', private=[('SSN', '123-45-6789')])
    assert definitions('prepare_data.py', drop_private='SSN').pii_step(dict(text='It is 123-45-6789.')) == 'has SSN'
