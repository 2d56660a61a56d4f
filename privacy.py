"""
Personal data in running text: what gives way to a placeholder of its kind, and what only looks like it.

    hide('Call (555) 234-5678 or mail ann@example.com', KINDS) -> ('Call <PHONE> or mail <EMAIL>', [(kind, found), ...])

Patterns find what has the form; is_private then asks what no pattern can tell: check digits, public addresses, and the
words around (version 4.1.2.1, in 1999 Elm Rd). How much is found and missed, per kind: tests/bench/privacy.py.
"""
import ipaddress, re

# Patterns begin with a set of characters, to which re can jump, and look behind only from there: that is
# ten times as fast. Every repetition has a limit or an end, so they take linear time.
GAP, ALONE = r'[ \xa0.‐-―-]', r'(?!\w|[.,/]?\d|-\w)' # between groups of digits (any dash), after the last
EXT = r'(?:,? ?(?:ext\b\.?|x) ?\d{1,5})?'
US = rf'\d\d(?:[)\]][ -]?[2-9]\d\d{GAP}|(?:({GAP})[2-9]\d\d\1|/[2-9]\d\d-))\d{{4}}{EXT}{ALONE}'
WORD = r"(?:[A-Z](?:[\w'’-]{0,20}|[A-Za-z]{0,2}\.)|\d{1,3}(?i:st|nd|rd|th)) " # of the name of a street
STREET = (r'(?=[A-Z])(?i:street|avenue|road|boulevard|lane|drive|court|place|way|terrace|parkway|highway|crescent|'
          r'close|square|circle|gardens|mews|plaza|trail|alley|(?:st|ave|rd|blvd|ln|dr|ct|pl|ter|pkwy|hwy)\b\.?)(?!\w)'
          r'(?: (?:[NS]\.[EW]\.|[NS][EW]?|[EW]|(?i:north|south|east|west))(?!\w))?'
          r'(?:,? (?:(?i:apt|apartment|suite|ste|unit|floor|room|rm|fl)\b\.? ?#?\w{1,5}|#\w{1,5}))?')
CITY = (r"(?:,?[ \n](?:[A-Z][\w.'-]{1,20}(?:,? |\n)){1,3}(?:(?:(?:[A-Z]{2}|[A-Z][a-z]{3,12}\.?),? )?\d{5}(?:-\d{4})?"
        r'|[A-Z]{1,2}\d[A-Z\d]? ?\d[A-Z]{2})\b)?') # with a ZIP or postcode
PRIVATE = [(kind, re.compile(pattern)) for kind, pattern in (
    ('EMAIL', r"\w(?<!\w\w)(?<!\w[.+%'-]\w)[\w.+%'-]{0,63}@(?:[\w-]{1,63}\.)+"
              r'(?!(?:png|jpe?g|gif|svg|webp)\b)[^\W\d_]{2,24}(?!\w)'), # no image@2x.png
    ('CARD', rf'[2-6](?<![\w.,+-].)\d{{3}}({GAP})\d{{4}}\1\d{{4}}\1\d{{4}}\1\d{{3}}{ALONE}'),
    ('CARD', r'[2-6](?<![\w.,+-].)(?:\d{12,18}|'
             rf'\d{{3}}({GAP})(?:\d{{4}}\1\d{{4}}\1\d{{1,4}}|\d{{6}}\1\d{{4,5}})){ALONE}'),
    ('SSN', rf'[0-8](?<![\w.,+/-].)\d\d(?<!000|666)([ -]?)(?!00)\d\d\1(?!0000)\d{{4}}{ALONE}'),
    ('IP', r'[23](?<![\w.-].)(?<![\da-fA-F:]:.)[\da-fA-F]{3}(?:::?[\da-fA-F]{1,4}){1,7}(?:::)?(?!\w|:\w)'), # IPv6
    ('IP', r':(?<![\w:].):[fF]{4}:(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)'),
    ('IP', r'[0-9](?<![\w.-].)(?<!\w/.)\d{0,2}(?:\.\d{1,3}){3}(?!\w|\.\d|-[A-Za-z])'),
    ('ADDRESS', r'[0-9](?<![\w.,$£€#/-].)\d{0,4}[A-Za-z]?(?:(?:, ?|[-–])\d{1,5}[A-Z]?)?(?: 1/2)?,? '
                rf'(?:{WORD}){{1,5}}?{STREET}{CITY}'),
    ('ADDRESS', rf'P(?<!\w.)(?:\.? ?O\.? ?|ost Office )(?:Box|BOX) \d{{1,6}}\b{CITY}'),
    ('PHONE', rf'[+1](?<![\w.,+/-].)(?:(?<=\+)1{GAP}?|(?<=1){GAP})[(\[]?[2-9]{US}'),
    ('PHONE', rf'\+(?<!\w.)[1-9](?:(?:[ \xa0()/‐-―-]{{0,3}}|\.)\d){{7,12}}(?!\d){EXT}'),
    ('PHONE', rf'[(\[2-9](?<![\w.,+/-].)(?:(?<=\d)(?!\d\d[)\]])|(?<=[(\[])[2-9](?=\d\d[)\]])){US}'),
    ('PHONE', r'0(?<![\w.,+-].)(?:0|11 )[1-9](?:(?:[ \xa0()/-]{0,3}|\.)\d){8,13}(?!\d)'),
    ('PHONE', r'[(0](?<![\w.,+-].)(?:(?<=0)|0(?=\d{1,4}\)))(?=(?:\D{0,2}\d){8,11}(?!\d))[1-9](?:([ .-])\d\d\1\d\d\1\d\d'
              rf'\1\d\d|\d{{0,3}}(?:\)? ?/?|-)(?:\d{{5,8}}|\d{{3,4}}[ -]\d{{3,4}})){ALONE}'), # Europe, Australia, Asia
    ('PHONE', rf'8(?<![\w.,+-].)[ -]\(?\d{{3}}\)?[ -]\d{{3}}-\d\d-\d\d{ALONE}'), # Russia
    ('PHONE', rf'[0-9](?<![\w.,+/-].)(?:\d\d-\d{{4}}|\d{{9,10}}){ALONE}'))] # only after CALL
KINDS = tuple(dict.fromkeys(kind for kind, _ in PRIVATE))
DIGITS = r'[0-9](?:[^A-Za-z0-9]{0,3}[0-9]){6}'
NEEDS = dict(EMAIL='@', IP=r'[0-9:](?:(?<=:)[\da-fA-F]{0,4}:|\d{0,2}\.\d{1,3}\.\d)', ADDRESS='[0-9]',
             CARD=DIGITS, SSN=DIGITS, PHONE=DIGITS) # a text without is done at once
BANK = r'4(\d{12}|\d{15}|\d{18})|3[47]\d{13}|3[0689]\d{12}|(5[1-5]|2[2-7]|35)\d{14}|(5[0678]|6\d)\d{11,17}' # lengths
CALL = r'(?i)\b(tel|phone|telephone|call|fax|mobile|cell|text|dial|ring|whatsapp|hotline|contact)\b[^\d\n]{0,25}$'
NO_CALL = (r'(?i)\b(order|part|item|invoice|ticket|case|serial|sku|model|account|acct|isbn(-1[03])?|issn|patent|'
           r'tracking|ref|catalog|id|pmid|oclc|s/n|p/n|po)\b\.?( (number|num|no|id)\b\.?)?[\s:#(]*$')
YEAR = (r'(?i)\b(in|since|of|by|from|until|till|after|before|during|circa|the|and|'
        r'(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?( \d{1,2})?,?) $')
NO_STREET = (r'\S+ (The|A|In|No|Way|.*(Supreme|High|District|Circuit|Federal|Crown|County|Appeals?|Tennis) C(our)?t|'
             r'.*(Hard|Flash|USB|Test|Disk|Year) Drive|.*(One|Two|Milky|Long) Way|.*(Wall|Sesame) Street|'
             r'(First|Second|Third|Last) Place|(Years?|Days?|Million|Percent)\b.*)\b')

def is_private(kind, found, before, after):
    """What a pattern cannot tell: check digits, public addresses, words before (version 4.1.2.1, in 1999 Elm Rd)."""
    if kind == 'EMAIL':
        return True
    if kind == 'CARD': # Luhn: double every second digit from the right; the sum of digits is a multiple of ten
        number = re.sub(r'\D', '', found)
        total = sum(sum(divmod(int(d) * (1 + i % 2), 10)) for i, d in enumerate(reversed(number)))
        return total % 10 == 0 and re.fullmatch(BANK, number)
    if kind == 'IP':
        try:
            ip = ipaddress.ip_address(found)
        except ValueError:
            return False
        small = ip.version == 4 and max(ip.packed) < 20 and len(set(ip.packed)) > 1 # 4.1.2.1: a version, or a section
        ip = getattr(ip, 'ipv4_mapped', None) or ip
        return ip.is_global and not ip.is_multicast and not small and not re.search(
            r'(?i)\b(version|ver|release|firmware|build|chapter|section|v)\.?\s*$', before)
    if kind == 'ADDRESS':
        year = re.match(r'(1[5-9]|20)\d\d,? ', found) and re.search(YEAR, before)
        row = re.match(r'\w+, ?\d', found) and not re.search(r'(?i)\b(flat|apt|apartment|unit|suite|room)\.? $', before)
        numbered = re.search(r'(?i)\b(exit|page|chapter|bus|route|psalm|top) $', before)
        return not (year or row or numbered or re.match(NO_STREET, found))
    if kind == 'SSN' and '-' not in found:
        return re.search(r'(?i)\b(ssn|ss#|soc\w*\.? sec\w*)[^\d\n]{0,20}$', before)
    if re.fullmatch(r'\d{3}-\d{4}|\d+', found):
        return re.search(CALL, before)
    row = ' ' in found and (re.search(r'\d[ ,\t|]*$', before) or re.match(r'[ ,\t|]*\d', after)) # of a table
    return found[0] == '+' or not row and not re.search(NO_CALL, before)

def hide(text, kinds):
    """Personal data give way to a placeholder of their kind. -> (text, [(kind, what stood there), ...])"""
    needs = {NEEDS[kind] for kind in kinds} if re.search('[0-9]', text) else {'@'}
    found, needs = [], {need for need in needs if re.search(need, text)}
    for kind, pattern in PRIVATE:
        def put(match):
            i, j = match.span()
            if not is_private(kind, match[0], text[max(0, i - 50):i], text[j:j + 5]):
                return match[0]
            found.append((kind, match[0]))
            return f'<{kind}>'
        if kind in kinds and NEEDS[kind] in needs:
            text = pattern.sub(put, text)
    return text, found
