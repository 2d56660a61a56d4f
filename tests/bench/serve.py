"""
How fast is the server of chat.py? Run by hand, on a machine that does nothing else:

    python tests/bench/serve.py [OUT_DIR]        # the folder of finished checkpoints; else out/toytown

Clients ask one after the other, and then 16 at a time, for streamed answers of the base model, which are all of the
same length. It prints: the time to the first token, tokens per second of one client and of 16, the slowest of 16
against the median; and the same for short answers of the assistant.
"""
import http.client
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
N_CLIENTS = 16

def ask(port, path, **body):
    """One streamed answer -> (time to the first token, total time, tokens)."""
    start = time.perf_counter()
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=120)
    body = dict(body, stream=True, stream_options=dict(include_usage=True))
    connection.request('POST', path, json.dumps(body), {'Content-Type': 'application/json'})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    first = None
    for line in response:
        if line.startswith(b'data: {'):
            first = first or time.perf_counter() - start
            last = line
    usage = json.loads(last[6:])['usage']
    return first, time.perf_counter() - start, usage['completion_tokens']

def crowd(port, n_clients, n_each, path, **body):
    """Clients that ask n_each times, one after the other -> (tokens per second, the time that each client took)."""
    results = [[] for _ in range(n_clients)]
    def client(k):
        for i in range(n_each):
            results[k].append(ask(port, path, seed=1 + 100 * k + i, **body))
    threads = [threading.Thread(target=client, args=[k]) for k in range(n_clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    n_tokens = sum(tokens for rows in results for _, _, tokens in rows)
    return n_tokens / seconds, [sum(row[1] for row in rows) for rows in results]

def main():
    out_dir = sys.argv[1] if len(sys.argv) > 1 else 'out/toytown'
    server = subprocess.Popen([sys.executable, str(ROOT / 'chat.py'), '--web=true', '--port=0', f'--out_dir={out_dir}'],
                              stderr=subprocess.PIPE, text=True)
    try:
        for line in server.stderr:
            if found := re.search(r'http://127.0.0.1:(\d+)', line):
                break
        port = int(found[1])
        question = dict(messages=[dict(role='user', content='Tell me a story about a wolf and a lantern.')])
        jobs = [('base model, 128 tokens', '/v1/completions', dict(prompt='Anna', model='base', max_tokens=128)),
                ('assistant', '/v1/chat/completions', question)]
        for name, path, body in jobs:
            ask(port, path, **body) # loads the model
            firsts = [ask(port, path, **body)[0] for _ in range(20)]
            print(f'{name}: first token after {1000 * statistics.median(firsts):.1f} ms (median), '
                  f'{1000 * max(firsts):.1f} ms (slowest of 20)')
            for _ in range(3):
                alone, _ = crowd(port, 1, 5, path, **body)
                together, times = crowd(port, N_CLIENTS, 5, path, **body)
                print(f'  1 client {alone:6.0f} tokens/s | {N_CLIENTS} clients {together:6.0f} tokens/s, '
                      f'{together / alone:.1f} x | slowest {max(times) / statistics.median(times):.2f} x the median')
    finally:
        server.terminate()

main()
