"""
tokenizer.py beside `tokenizers` (its Rust trainer), tiktoken and minbpe: same merges, same ids, times, memory. By hand:

    pip install tokenizers                        DATA_DIR: a folder with train/ and val/ as prepare_data.py writes them
    python tests/bench/bpe.py merges DATA_DIR     merges and time at 512, 4,096 and 32,768
    python tests/bench/bpe.py encode DATA_DIR     MB/s, beside tiktoken's encode_ordinary_batch
    python tests/bench/bpe.py export DATA_DIR [TEXT ..]    ids of its tokenizer, exported: code, emoji, files TEXT
    python tests/bench/bpe.py minbpe FOLDER TEXT  FOLDER: a checkout of karpathy/minbpe; 1 MB of TEXT, vocabulary of 512
    python tests/bench/bpe.py memory DATA_DIR     peak memory on a corpus of 1 GB, made of DATA_DIR's words

Times are medians, ours and theirs in turn, with two processes or threads.
"""

import collections, concurrent.futures, glob, gzip, json, os, random, re, statistics, subprocess
import sys, tempfile, time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
os.environ['TOKENIZERS_PARALLELISM'] = 'true'
os.environ['RAYON_NUM_THREADS'] = '2'
import numpy as np
import bpe, huggingface, model


def read(data_dir):
    return [
        row['text'] for path in sorted(glob.glob(f'{data_dir}/train/*.jsonl.gz')) for _, row in model.read_jsonl(path)
    ]


def ours(data_dir, *flags):
    """Run tokenizer.py on the documents, in a folder of its own -> (what it printed, that folder)."""
    with tempfile.TemporaryDirectory() as folder:
        for split in 'train', 'val':
            os.symlink(os.path.abspath(f'{data_dir}/{split}'), f'{folder}/{split}')
        done = subprocess.run(
            [sys.executable, f'{ROOT}/tokenizer.py', f'--data_dir={folder}', '--processes=2', *flags],
            capture_output=True,
            encoding='utf-8',
            check=True,
        )
        return done.stdout, model.Tokenizer.load(f'{folder}/tokenizer.json')


def seconds(work):
    t0 = time.time()
    return work(), time.time() - t0


def merges(data_dir):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    def theirs():
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(bpe.PATTERNS['gpt4']), 'isolated'),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tok.train_from_iterator(
            read(data_dir),
            trainers.BpeTrainer(
                vocab_size=size - 6,
                min_frequency=2,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        return [tuple(pair) for pair in json.loads(tok.to_str())['model']['merges']]

    for size in 512, 4096, 32768:
        times = [], []
        for _ in range(3):
            want, t = seconds(theirs)
            times[1].append(t)
            said, tok = ours(data_dir, f'--vocab_size={size}')
            times[0].append(float(re.search(r'special tokens \| (\S+) s', said)[1]))
        have = [
            tuple(''.join(huggingface.CHARS[b] for b in part) for part in pair)
            for pair in huggingface.merges_of(tok.tokens)
        ]
        a, b = map(statistics.median, times)
        print(
            f'{size:6,}: {len(have):,} merges, {"identical" if have == want else "DIFFERENT"} | ours {a:.2f} s, '
            f'tokenizers {b:.2f} s, ratio {a / b:.2f} | all: {times}',
            flush=True,
        )


def batch(data_dir, tokenizer_json, name):
    """Seconds to encode documents that are in memory, two threads, in a process of its own."""
    texts, tok, lists = read(data_dir), model.Tokenizer.load(tokenizer_json), [[]]
    for text in texts:
        if sum(map(len, lists[-1])) > (1_000_000 if name == 'ours' else 100_000):
            lists.append([])
        lists[-1].append(text)
    if name == 'ours':  # the functions of the script, without the script
        source = open(f'{ROOT}/tokenizer.py', encoding='utf-8').read()
        source = re.sub(r'\nconfig = configure.*', '', source[: source.index('# look at the tokenizer')])
        space = dict(tok=tok, dtype=np.uint16, workers=2)
        exec(source, space)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            print(seconds(lambda: list(space['in_parallel'](pool, space['encode_documents'], lists)))[1])
    else:
        texts = ['\n'.join(part) for part in lists] if name == 'packs' else texts
        print(seconds(lambda: tok.enc.encode_ordinary_batch(texts, num_threads=2))[1])


def encode(data_dir):
    n_bytes = sum(len(text.encode()) for text in read(data_dir))
    times = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(7):
            said, tok = ours(data_dir, '--vocab_size=4096')
            with open(f'{folder}/tokenizer.json', 'w', encoding='utf-8') as f:
                json.dump(tok.spec, f)
            times['ours: read, encode, shuffle, write'].append(
                float(re.search(r'^train: .* (\S+) s$', said, re.M)[1])
            )
            for name, label in (
                ('ours', 'ours: encode'),
                ('packs', 'tiktoken, packs of 100 KB'),
                ('documents', 'tiktoken, a document a call'),
            ):
                command = [sys.executable, __file__, 'batch', data_dir, f'{folder}/tokenizer.json', name]
                times[label].append(float(subprocess.run(command, capture_output=True, check=True).stdout))
    for name, all_times in times.items():
        rate = n_bytes / 1e6 / statistics.median(all_times)
        print(f'{name:36} {rate:6.1f} MB/s', *(f'{t:.2f}' for t in sorted(all_times)), 's')


def export(data_dir, *paths):
    from tokenizers import Tokenizer
    import tiktoken, tiktoken.load

    tok, rng = model.Tokenizer.load(f'{data_dir}/tokenizer.json'), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, f'{ROOT}/tokenizer.py', f'--data_dir={data_dir}', f'--export={folder}'], check=True
        )
        other = Tokenizer.from_file(f'{folder}/tokenizer.json')
        ranks = tiktoken.load.load_tiktoken_bpe(f'{folder}/tokenizer.tiktoken')
    assert ranks == {token: i for i, token in enumerate(tok.tokens)}
    texts = [
        open(path, encoding='utf-8').read()
        for path in [*glob.glob(f'{ROOT}/*.py'), *glob.glob(f'{ROOT}/config/*'), *paths]
    ]
    texts += [''.join(rng.choices('🙂🎉👍🏽👩‍👧🇳🇴❤️ ⛵a1\n\t.', k=1000)) for _ in range(50)]
    texts += [
        ''.join(
            chr(
                rng.choice(
                    [
                        rng.randrange(32, 0x250),
                        rng.randrange(0x370, 0x1000),
                        rng.randrange(0x3040, 0x9FFF),
                        rng.randrange(0xAC00, 0xD7A0),
                    ]
                )
            )
            for _ in range(1000)
        )
        for _ in range(100)
    ]
    n = different = 0
    for text in texts:
        for line in re.findall(r'[\s\S]{1,2000}', text.replace('<|', '< |')):  # a special token there is one for them
            ids = other.encode(line, add_special_tokens=False).ids
            n += len(line.encode())
            different += ids != tok.encode(line) or other.decode(ids, skip_special_tokens=False) != tok.decode(ids)
    print(f'{n / 1e6:.2f} MB, pieces with other ids or text: {different}')


def minbpe(folder, path):
    sys.path.insert(0, folder)
    from minbpe import RegexTokenizer
    import regex

    text = open(path, encoding='utf-8').read()[:1_000_000]
    _, theirs = seconds(lambda: RegexTokenizer().train(text, 512))

    def train():
        return bpe.train_bpe(collections.Counter(regex.findall(bpe.PATTERNS['gpt4'], text)), 256)

    mine = [seconds(train)[1] for _ in range(5)]
    print(
        f'1 MB, 256 merges: minbpe {theirs:.1f} s, ours {statistics.median(mine):.3f} s in one process, '
        f'{theirs / statistics.median(mine):.0f} times faster'
    )


def memory(data_dir):
    words, rng = ' '.join(read(data_dir)).split(' '), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        for split, size in (('train', 10**9), ('val', 10**6)):
            os.mkdir(f'{folder}/{split}')
            with gzip.open(f'{folder}/{split}/000000_000.jsonl.gz', 'wt', 1, encoding='utf-8') as f:
                while size > 0:  # real words; one in fifty is new, as names, numbers and typing errors are
                    k = rng.randrange(len(words))
                    text = ' '.join(
                        w if rng.random() > 0.02 else w + ''.join(rng.choices('aeiounrstlk', k=7))
                        for w in words[k:k + 5000]
                    )
                    f.write(json.dumps(dict(text=text), ensure_ascii=False) + '\n')
                    size -= len(text.encode())
        done = subprocess.Popen(
            [sys.executable, f'{ROOT}/tokenizer.py', f'--data_dir={folder}', '--processes=2', '--vocab_size=32768']
        )
        peak = 0
        while done.poll() is None:  # the memory of parent and children together; shared pages count in part (PSS)
            total = 0
            for pid in [
                done.pid,
                *map(
                    int, subprocess.run(['pgrep', '-P', str(done.pid)], capture_output=True, text=True).stdout.split()
                ),
            ]:
                try:
                    total += int(re.search(r'^Pss:\s+(\d+)', open(f'/proc/{pid}/smaps_rollup').read(), re.M)[1])
                except (OSError, TypeError):
                    pass
            peak = max(peak, total)
            time.sleep(1)
        print(f'peak memory, all processes: {peak / 1e6:.2f} GB')


if __name__ == '__main__':
    globals()[sys.argv[1]](*sys.argv[2:])
