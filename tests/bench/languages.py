"""
How good and how fast is the language step? By hand, on your own paragraphs; py3langid, a peer, on the same ones.

    $ pip install py3langid
    $ python tests/bench/languages.py FOLDER       # FOLDER/<anything>/<code>.txt, one paragraph per line
"""

import glob, os, sys, time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from conftest import definitions

language_scores = definitions('prepare_data.py').language_scores

try:
    from py3langid.langid import LanguageIdentifier, MODEL_FILE

    peer = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
except ImportError:
    peer = None
THRESHOLD = 0.65
is_english = {'ours': lambda text: language_scores(text)['en'] >= THRESHOLD}
if peer:
    is_english['py3langid'] = lambda text: (lambda code, p: code == 'en' and p >= THRESHOLD)(*peer.classify(text))
is_english_file = lambda path: os.path.basename(path).split('.')[0].split('_')[0] in ('en', 'eng')

texts = {}
for path in sorted(glob.glob(f'{sys.argv[1]}/**/*.txt', recursive=True)):
    with open(path, encoding='utf-8') as f:
        texts[os.path.relpath(path, sys.argv[1])] = [line.strip() for line in f if len(line) >= 200]
size = sum(len(text.encode()) for lines in texts.values() for text in lines) / 1e6
print(f'{len(texts)} files, {sum(map(len, texts.values())):,} paragraphs of 200 characters or more, {size:.1f} MB')
kept, seconds = {}, {}
for name, function in is_english.items():
    function('warm up')
    start = time.perf_counter()
    kept[name] = {path: sum(map(function, lines)) for path, lines in texts.items() if lines}
    seconds[name] = time.perf_counter() - start
for title, english in (('English kept', True), ('others kept', False)):
    paths = [path for path in texts if texts[path] and is_english_file(path) == english]
    print(f'\n{title:40}' + ''.join(f'{name:>12}' for name in is_english))
    paths.sort(key=lambda path: (1 - 2 * english) * kept['ours'][path] / len(texts[path]), reverse=True)
    for path in paths[:30]:
        print(f'{path:40}' + ''.join(f'{kept[name][path] / len(texts[path]):12.2%}' for name in is_english))
    if paths:
        total = sum(len(texts[path]) for path in paths)
        shares = [sum(map(kept[name].get, paths)) / total for name in is_english]
        print(f'{f"all {len(paths)} files":40}' + ''.join(f'{share:12.2%}' for share in shares))
print(f'\n{"MB/s":40}' + ''.join(f'{size / seconds[name]:12.2f}' for name in is_english))
