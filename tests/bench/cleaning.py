"""
From WARC to clean text: how fast are all steps together, per core, and how does memory grow? Beside them datatrove's
pipeline for FineWeb with trafilatura, on the same file in the same run; without its language step, which downloads a
model, and without duplicates. Ours has both.

$ pip install 'datatrove[io,processing]' trafilatura warcio lxml_html_clean orjson spacy faust-cchardet python-magic
                                                                # without: our figures only
$ python tests/bench/cleaning.py FOLDER_WITH_HTML [copies]    # every page is put into the WARC file so many times
"""

import glob, gzip, os, random, socket, subprocess, sys, tempfile, time

ROOT = os.path.abspath(os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..'))
PEER = '''
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.filters import (C4QualityFilter, FineWebQualityFilter, GopherQualityFilter,
                                        GopherRepetitionFilter, URLFilter)
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.pipeline.readers import WarcReader
from datatrove.pipeline.writers.jsonl import JsonlWriter
folder, pattern, out = sys.argv[1:]
LocalPipelineExecutor(pipeline=[
    WarcReader(folder, glob_pattern=pattern), Trafilatura(favour_precision=True, timeout=10), GopherRepetitionFilter(),
    GopherQualityFilter(), C4QualityFilter(filter_no_terminal_punct=False), FineWebQualityFilter(), PIIFormatter(),
    JsonlWriter(out + '/text'), ], tasks=1, workers=1, logging_dir=out + '/logs').run()
'''


def warc(path, pages):
    """Write pages as a WARC file, as a crawler would: each record in a gzip member of its own."""
    with open(path, 'wb') as f:
        for i, page in enumerate(pages):
            http = b'HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n' + page
            head = (
                f'WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://site{i}.example/page\r\nWARC-Record-ID: '
                f'<urn:uuid:00000000-0000-0000-0000-{i:012d}>\r\nWARC-Date: 2024-05-18T01:58:10Z\r\nContent-Type: '
                f'application/http; msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n'
            ).encode()
            f.write(gzip.compress(head + http + b'\r\n\r\n', 4, mtime=0))


def timed(command, n=1):
    """Wall seconds, peak MB of the largest of n processes, CPU seconds of all."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        env = dict(
            os.environ,
            OMP_NUM_THREADS='1',
            WORLD_SIZE=str(n),
            MASTER_ADDR='127.0.0.1',
            MASTER_PORT=str(s.getsockname()[1]),
        )
    began, peak, cpu = time.time(), 0, 0
    running = [
        subprocess.Popen(command, env=dict(env, RANK=str(r)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for r in range(n)
    ]
    for child in running:
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            print(child.stderr.read().decode()[-2000:])
        peak = max(peak, usage.ru_maxrss / 1024)
        cpu += usage.ru_utime + usage.ru_stime
    return time.time() - began, peak, cpu


def ours(files, out, n=1):
    return timed(
        [
            sys.executable,
            f'{ROOT}/prepare_data.py',
            '--source=files',
            f'--files={files}',
            f'--data_dir={out}',
            '--languages=en',
        ],
        n,
    )


if __name__ == '__main__':
    names, copies = sorted(glob.glob(f'{glob.escape(sys.argv[1])}/**/*.htm*', recursive=True)), int(
        (sys.argv + ['1'])[2]
    )
    pages = [open(name, 'rb').read() for name in names] * copies
    random.Random(0).shuffle(pages)
    with tempfile.TemporaryDirectory() as tmp:
        size = sum(map(len, pages)) / 1e6
        for i in range(2):
            warc(f'{tmp}/half{i}.warc.gz', pages[i::2])
        warc(f'{tmp}/whole.warc.gz', pages)
        warc(f'{tmp}/small.warc.gz', pages[:10])
        start, _, start_cpu = ours(f'{tmp}/small.warc.gz', f'{tmp}/a')  # imports, mostly
        one, peak, one_cpu = ours(f'{tmp}/whole.warc.gz', f'{tmp}/b')
        print(f'{len(pages):,} pages, {size:.0f} MB; the start alone takes {start:.1f} s')
        rate = len(pages) / (one_cpu - start_cpu)
        print(f'ours, one process    {one:6.1f} s  {rate:7.1f} pages per CPU second  peak {peak:,.0f} MB')
        single, _, _ = ours(f'{tmp}/half*.warc.gz', f'{tmp}/c')
        double, _, _ = ours(f'{tmp}/half*.warc.gz', f'{tmp}/d', 2)
        print(
            f'two files: one process {single:.1f} s, two {double:.1f} s: {(single - start) / (double - start):.2f}x'
        )
        try:
            import datatrove, trafilatura
        except ImportError:
            sys.exit('no datatrove with trafilatura here to compare with')
        peer = lambda pattern, out: timed([sys.executable, '-c', PEER, tmp, pattern, out])
        start_peer = peer('small.warc.gz', f'{tmp}/e')[2]
        theirs, _, theirs_cpu = peer('whole.warc.gz', f'{tmp}/f')
        rate = len(pages) / (theirs_cpu - start_peer)
        print(f'datatrove            {theirs:6.1f} s  {rate:7.1f} pages per CPU second')
        print(f'ratio {(theirs_cpu - start_peer) / (one_cpu - start_cpu):.2f}x')
