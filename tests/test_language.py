"""The language score: sentences that a reader can judge, and arithmetic on a table of three words."""

import json
import random

import pytest
from conftest import definitions

ours = definitions('prepare_data.py')
language_scores = ours.language_scores

SENTENCES = {
    'en': 'When the rain had stopped, we walked down to the harbour to see whether the boats were back from the sea.',
    'de': 'Als der Regen aufgehört hatte, gingen wir zum Hafen, um zu sehen, ob die Boote wieder da waren.',
    'nl': 'Toen de regen was opgehouden, liepen we naar de haven om te zien of de boten al terug waren van zee.',
    'fr': 'Quand la pluie a cessé, nous sommes descendus au port pour voir si les bateaux étaient déjà rentrés.',
    'es': 'Cuando dejó de llover, bajamos al puerto para ver si los barcos ya habían vuelto del mar con la pesca.',
    'da': 'Da regnen var holdt op, gik vi ned til havnen for at se, om bådene var kommet tilbage fra havet.',
    'pl': 'Kiedy deszcz przestał padać, poszliśmy do portu, żeby zobaczyć, czy łodzie już wróciły z morza.',
    'eo': 'Kiam la pluvo ĉesis, ni iris al la haveno por vidi, ĉu la boatoj jam revenis de la maro kun la fiŝoj.',
    'ru': 'Когда дождь кончился, мы пошли в порт, чтобы посмотреть, вернулись ли уже лодки с моря или нет.',
    'zh': '雨停了以后,我们走到港口去看看船是不是已经从海上回来了。',
    'sco': 'Whan the rain wis by, we gaed doon tae the herbour tae see gin the boats wis hame frae the sea or no.',
}
ENGLISH = [
    'lol u r so funny, i cant wait 2 see u at the party on friday, what r u gonna wear, me and my bro r there',
    'Thou art more lovely and more temperate: rough winds do shake the darling buds, and summer hath too short a date',
    'Preheat the oven to 180 C. Mix 200 g flour, 2 eggs and the sugar in a bowl. Add the milk. Bake for 30 minutes.',
    'Tom has 3 apples and 4 pears. He gives 2 apples to Ann. How many apples does he have left? He has 3 - 2 = 1 left.',
]
JUNK = [
    '',
    '8 7 3 12 44 9.1 3.0 55',
    'Year Total\n' + '1 2 3\n' * 50,
    'xqz 8 7 f% kk zz 98 a;; qwe3 #!',
    'q29tZSBvbi4gVGhpcyBpcyBiYXNl NjQgYW5kIG5vdCBhIHRleHQ aWYgeW91IGNhbiByZWFkIHRoaXMgeW91IGFyZQ',
    ' '.join(''.join(random.Random(i).choices('abcdefghijklmnopqrstuvwxyz', k=1 + i % 9)) for i in range(100)),
]


@pytest.mark.parametrize('code', SENTENCES)
def test_best_score_is_the_language(code):
    scores = language_scores(SENTENCES[code])
    assert max(scores, key=scores.get) == code and scores[code] >= 0.65
    assert sum(scores.values()) == pytest.approx(1) and (scores['en'] >= 0.65) == (code == 'en')


@pytest.mark.parametrize('text', ENGLISH)
def test_english_of_many_kinds(text):
    assert language_scores(text)['en'] >= 0.65


@pytest.mark.parametrize('text', JUNK)
def test_junk_is_no_language(text):
    assert language_scores(text)['en'] < 0.65


def test_only_the_start_of_a_page_counts():
    text = (SENTENCES['en'] + ' ') * 200  # more than 10,000 characters
    assert language_scores(text[:10_000]) == language_scores(text + SENTENCES['de'] * 1000)


def test_by_hand(tmp_path):
    """x: 'a' one word in 2, y: 'b' one in 2, z: 'c' one in 4; so any other word is 0.5, 0.5, 0.6 (of 0.75, at most)."""
    (tmp_path / 't.json').write_text(json.dumps({'x': ['', 'a'], 'y': ['', 'b'], 'z': ['', '', 'c']}))
    mine = definitions('prepare_data.py')
    table = mine.language_table(tmp_path / 't.json')
    mine.space['language_table'] = lambda: table
    mean, prior = 0.5 / 3, 2.718281828459045**5 # und: the mean of the three, and the head start
    p = dict(x=0.5 * 0.5, y=1e-5 * 0.5, z=1e-5 * 0.6, und=mean * 0.7 * prior) # of the words a and other
    total = sum(p.values())
    assert mine.language_scores('A other') == pytest.approx({code: value / total for code, value in p.items()})


def test_the_step():
    story = 'The apple trees were white in spring, and the children of the street came to play under them. '
    english = definitions('prepare_data.py', languages='en', min_language=0.65).language_step
    both = definitions('prepare_data.py', languages='en,de').language_step
    assert english(dict(text=story)) is None and english(dict(text=SENTENCES['de'])) == 'de'
    assert english(dict(text=story * 2 + ' "El perro de mi hermana," he said.')) is None
    assert both(dict(text=SENTENCES['de'])) is None and both(dict(text=SENTENCES['fr'])) == 'fr'
