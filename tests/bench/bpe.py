"""
tokenizer.py next to `tokenizers` (its Rust trainer), tiktoken and minbpe: same merges, times, memory. By hand:

    pip install tokenizers                        DATA_DIR: a folder with train/ and val/ as prepare_data.py writes them
    python tests/bench/bpe.py corpus DATA_DIR SRC makes one: 20 MB of English from a folder of public data
    python tests/bench/bpe.py merges DATA_DIR     merges and time at 512, 4,096 and 32,768
    python tests/bench/bpe.py encode DATA_DIR     MB/s, next to tiktoken's encode_ordinary_batch
    python tests/bench/bpe.py minbpe FOLDER TEXT  FOLDER: a checkout of karpathy/minbpe; 1 MB of TEXT, vocabulary of 512
    python tests/bench/bpe.py memory DATA_DIR     peak memory on a corpus of 1 GB, made of DATA_DIR's words

Times are medians, ours and theirs in turn, with two processes or threads.
"""
import collections
import concurrent.futures
import csv
import glob
import gzip
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time

os.environ['TOKENIZERS_PARALLELISM'] = 'true'
os.environ['RAYON_NUM_THREADS'] = '2'
TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, TESTS)

import numpy as np
import regex

from conftest import ROOT, definitions # puts ROOT on the path
import model

stage = definitions('tokenizer.py', n_workers=2, dtype=np.uint16)


def read(data_dir):
    texts = []
    for path in sorted(glob.glob(f'{data_dir}/train/*.jsonl.gz')):
        texts += [row['text'] for _, row in model.read_jsonl(path)]
    return texts


def strings_of(value):
    """All strings in an object of JSON."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return []
    found = []
    for item in value:
        found += strings_of(item)
    return found


def corpus(folder, shared):
    """Questions, dialogues, Shakespeare and stories: *.jsonl, core/*.jsonl, mmlu/*/*.csv, *.txt of `shared`."""
    docs = []
    for path in sorted(glob.glob(f'{shared}/*.jsonl*') + glob.glob(f'{shared}/core/*.jsonl')):
        if not re.search('operators|dyck|repeat_copy|language_id|cs_algo|HumanEval', path):
            docs += ['\n'.join(strings_of(row)) for _, row in model.read_jsonl(path)]
    for path in sorted(glob.glob(f'{shared}/mmlu/*/*.csv')):
        with open(path, encoding='utf-8') as f:
            docs += ['\n'.join(row) for row in csv.reader(f)]
    for path in sorted(glob.glob(f'{shared}/*.txt')):
        with open(path, encoding='utf-8') as f:
            text = f.read()
        docs += [text[i:i + 4000] for i in range(0, len(text), 4000)]
    docs = list(dict.fromkeys(docs))
    random.Random(0).shuffle(docs)
    size = sum(len(doc.encode()) for doc in docs)
    while size > 20_000_000:
        size -= len(docs.pop().encode())
    for split, part in (('train', docs), ('val', docs[:200])):
        os.makedirs(f'{folder}/{split}', exist_ok=True)
        model.write_jsonl(f'{folder}/{split}/000.jsonl.gz', [dict(text=doc) for doc in part])
    print(f'{len(docs):,} documents, {size / 1e6:.1f} MB')


def ours(data_dir, *flags):
    """Run tokenizer.py on the documents, in a folder of its own -> (what it printed, the tokenizer)."""
    with tempfile.TemporaryDirectory() as folder:
        for split in 'train', 'val':
            os.symlink(os.path.abspath(f'{data_dir}/{split}'), f'{folder}/{split}')
        command = [sys.executable, f'{ROOT}/tokenizer.py', f'--data_dir={folder}', '--processes=2', *flags]
        done = subprocess.run(command, capture_output=True, encoding='utf-8', check=True)
        return done.stdout, model.Tokenizer.load(f'{folder}/tokenizer.json')


def seconds(work):
    start = time.time()
    return work(), time.time() - start


def merges(data_dir):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    def theirs():
        split = pre_tokenizers.Split(Regex(stage.PATTERNS['gpt4']), 'isolated')
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
        trainer = trainers.BpeTrainer(vocab_size=size - 6, min_frequency=2, show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        tok.train_from_iterator(read(data_dir), trainer)
        state = json.loads(tok.to_str())['model']
        ids = state['vocab']
        return [(ids[left], ids[right]) for left, right in state['merges']]

    chunks = collections.Counter()
    for text in read(data_dir):
        chunks.update(regex.findall(stage.PATTERNS['gpt4'], text))
    print(f'{chunks.total():,} chunks, {len(chunks):,} of them distinct')
    for size in 512, 4096, 32768:
        our_times = []
        their_times = []
        for _ in range(3):
            want, t = seconds(theirs)
            their_times.append(t)
            said, tok = ours(data_dir, f'--vocab_size={size}')
            our_times.append(float(re.search(r'special tokens \| (\S+) s', said)[1]))
        have = stage.train_bpe(chunks, size - 262)
        same = have == want and stage.merges_to_tokens(have) == tok.tokens
        a = statistics.median(our_times)
        b = statistics.median(their_times)
        print(f'{size:6,}: {len(have):,} merges, {"identical" if same else "DIFFERENT"} | ours {a:.2f} s, '
              f'tokenizers {b:.2f} s, ratio {a / b:.2f} | all: {our_times} {their_times}', flush=True)


def batch(data_dir, tokenizer_json, name):
    """Seconds to encode documents that are in memory, two threads, in a process of its own."""
    tok = model.Tokenizer.load(tokenizer_json)
    texts = read(data_dir)
    size = 1_000_000 if name == 'ours' else 100_000
    packs = [[]]
    for text in texts:
        if sum(map(len, packs[-1])) > size:
            packs.append([])
        packs[-1].append(text)
    if name == 'ours':
        stage.space['tok'] = tok
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            print(seconds(lambda: list(stage.map_in_order(pool, stage.encode_documents, packs)))[1])
    else:
        texts = ['\n'.join(part) for part in packs] if name == 'packs' else texts
        print(seconds(lambda: tok.enc.encode_ordinary_batch(texts, num_threads=2))[1])


def encode(data_dir):
    n_bytes = sum(len(text.encode()) for text in read(data_dir))
    labels = dict(ours='ours: encode', packs='tiktoken, packs of 100 KB', documents='tiktoken, a document a call')
    times = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(7):
            said, tok = ours(data_dir, '--vocab_size=4096')
            model.write_text(f'{folder}/tokenizer.json', json.dumps(tok.spec))
            times['ours: read, encode, shuffle, write'].append(float(re.search(r'^train: .* (\S+) s$', said, re.M)[1]))
            for name, label in labels.items():
                command = [sys.executable, __file__, 'batch', data_dir, f'{folder}/tokenizer.json', name]
                times[label].append(float(subprocess.run(command, capture_output=True, check=True).stdout))
    for label, all_times in times.items():
        rate = n_bytes / 1e6 / statistics.median(all_times)
        print(f'{label:36} {rate:6.1f} MB/s', *(f'{t:.2f}' for t in sorted(all_times)), 's')


def minbpe(folder, path):
    sys.path.insert(0, folder)
    from minbpe import RegexTokenizer

    with open(path, encoding='utf-8') as f:
        text = f.read()[:1_000_000]
    _, theirs = seconds(lambda: RegexTokenizer().train(text, 512))
    mine = []
    for _ in range(5):
        _, t = seconds(lambda: stage.train_bpe(collections.Counter(regex.findall(stage.PATTERNS['gpt4'], text)), 256))
        mine.append(t)
    mine = statistics.median(mine)
    print(f'1 MB, 256 merges: minbpe {theirs:.1f} s, ours {mine:.3f} s in one process, {theirs / mine:.0f} times faster')


def memory_of(pid):
    """PSS of a process in kB: shared pages count in part."""
    try:
        with open(f'/proc/{pid}/smaps_rollup') as f:
            return int(re.search(r'^Pss:\s+(\d+)', f.read(), re.M)[1])
    except (OSError, TypeError): # it has ended
        return 0


def memory(data_dir):
    words = ' '.join(read(data_dir)).split(' ')
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        for split, size in (('train', 10**9), ('val', 10**6)):
            os.mkdir(f'{folder}/{split}')
            with gzip.open(f'{folder}/{split}/000.jsonl.gz', 'wt', 1, encoding='utf-8') as f:
                while size > 0: # real words; one in fifty is new, as names, numbers and typing errors are
                    k = rng.randrange(len(words))
                    part = words[k:k + 5000]
                    for i in range(len(part)):
                        if rng.random() < 0.02:
                            part[i] += ''.join(rng.choices('aeiounrstlk', k=7))
                    text = ' '.join(part)
                    f.write(json.dumps(dict(text=text), ensure_ascii=False) + '\n')
                    size -= len(text.encode())
        flags = [f'--data_dir={folder}', '--processes=2', '--vocab_size=32768']
        done = subprocess.Popen([sys.executable, f'{ROOT}/tokenizer.py', *flags])
        peak = 0
        while done.poll() is None: # the memory of parent and children together
            children = subprocess.run(['pgrep', '-P', str(done.pid)], capture_output=True, text=True).stdout.split()
            peak = max(peak, sum(memory_of(pid) for pid in [done.pid, *children]))
            time.sleep(1)
        print(f'peak memory, all processes: {peak / 1e6:.2f} GB')


if __name__ == '__main__':
    globals()[sys.argv[1]](*sys.argv[2:])
