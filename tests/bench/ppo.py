"""
Episodes a second of rlhf.py against TRL's last PPOTrainer, on the CPU. By hand, in a venv of its own:

$ pip install -r requirements.txt 'trl==0.23.0' 'transformers<5'
$ OMP_NUM_THREADS=1 python tests/bench/ppo.py

Both have four models of 4 layers x 128 (GPT-2's architecture, random weights, 512 tokens, fp32), and in each update 64
prompts of 32 tokens, 64 answers of 64 tokens, 4 epochs of one minibatch, PPO with GAE, and AdamW. No answer may end
earlier, since TRL does not use that. Each runs 4 updates in turn, three times; the first update of a turn does not
count. Medians of CPU seconds of this process, which other programs disturb less than the clock.
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.update(HF_HUB_OFFLINE='1', TRANSFORMERS_VERBOSITY='error', TOKENIZERS_PARALLELISM='false')
import base64, contextlib, io, json, runpy, statistics, sys, tempfile, time, warnings

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..')
sys.path.insert(0, ROOT)
warnings.simplefilter('ignore')
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import WordLevel

import model
from model import GPT, GPTConfig, ScalarModel, Tokenizer, save_checkpoint

ANSWERS, PROMPT, RESPONSE, VOCAB, UPDATES = 64, 32, 64, 512, 4
SIZE = dict(n_layer=4, n_head=4, n_embd=128)
folder = Path(tempfile.mkdtemp())

# -----------------------------------------------------------------------------
# ours: checkpoints and prompts

SPECIALS = ['<|endoftext|>', '<|system|>', '<|user|>', '<|assistant|>', '<|end|>', '<|pad|>']
pieces = [bytes([b]) for b in range(256)]
pieces += [bytes([a, b]) for a in b'abcdefghijklmnopqrstuvwxyz' for b in b'abcdefghij'][:VOCAB - 256 - len(SPECIALS)]
tok = Tokenizer(dict(version=1, kind='bpe', pattern=r'[^\S\n]?\w+|[^\w\s]+|\s', special_tokens=SPECIALS,
                     ranks=[base64.b64encode(piece).decode() for piece in pieces]))
assert tok.n_vocab == VOCAB
torch.manual_seed(0)
config = GPTConfig('gpt2', VOCAB, 128, **SIZE)
save_checkpoint(f'{folder}/sft.pt', 'sft', GPT(config).state_dict(), vars(config), tok, {}, 0, {})
save_checkpoint(f'{folder}/reward.pt', 'reward', ScalarModel(config).state_dict(), vars(config), tok, {}, 0, {})
rows = [dict(messages=[dict(role='user', content=f'{i:027}')]) for i in range(ANSWERS * UPDATES)]
prompts = [tok.render(row['messages'], prompt=True)[0] for row in rows]
assert {len(ids) for ids in prompts} == {PROMPT}
for split in ('train', 'val'):
    text = ''.join(json.dumps(row) + '\n' for row in rows)
    (folder / f'prompts_{split}.jsonl').write_text(text, encoding='utf-8')

generate = model.generate
should_stop = model.should_stop

def ours(*flags):
    """Run the script -> CPU seconds of each update after the first one."""
    stamps = []
    def stamp(run): # rlhf.py calls should_stop when an update begins
        stamps.append(time.process_time())
        return should_stop(run)
    model.should_stop = stamp
    model.generate = lambda net, queries, n, stop, temperature: generate(net, queries, n, None, temperature)
    sys.argv = ['rlhf.py', f'--data_dir={folder}', f'--out_dir={folder}', '--device=cpu', '--dtype=float32',
                f'--batch_size={ANSWERS}', f'--minibatch_size={ANSWERS}', f'--micro_batch_size={ANSWERS}',
                f'--max_new_tokens={RESPONSE}', '--ppo_epochs=4', f'--max_iters={UPDATES}', '--eval_interval=1000',
                '--eval_prompts=1', '--resume=false', *flags]
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(os.path.join(ROOT, 'rlhf.py'), run_name='__main__')
    model.generate = generate
    model.should_stop = should_stop
    return [after - before for before, after in zip(stamps[1:], stamps[2:])]

# -----------------------------------------------------------------------------
# TRL

names = {f't{i}': i for i in range(VOCAB)}
hf_tok = transformers.PreTrainedTokenizerFast(
    tokenizer_object=RustTokenizer(WordLevel(names, 't0')), padding_side='left', pad_token=f't{tok.pad}',
    eos_token=f't{tok.end}')
hf_config = transformers.GPT2Config(VOCAB, 128, **SIZE, bos_token_id=tok.eot, eos_token_id=tok.end,
                                    pad_token_id=tok.pad, num_labels=1)
dataset = Dataset.from_dict(dict(input_ids=prompts))

class Stamps(transformers.TrainerCallback):
    def __init__(self):
        self.stamps = []

    def on_step_end(self, args, state, control, **more):
        self.stamps.append(time.process_time())

def theirs():
    stamps = Stamps()
    args = trl.PPOConfig(
        output_dir=f'{folder}/trl', per_device_train_batch_size=ANSWERS, gradient_accumulation_steps=1,
        num_mini_batches=1, num_ppo_epochs=4, total_episodes=ANSWERS * UPDATES, response_length=RESPONSE,
        temperature=1.0, stop_token=None, local_rollout_forward_batch_size=ANSWERS, num_sample_generations=0,
        report_to='none', save_strategy='no', use_cpu=True, bf16=False, gradient_checkpointing=False, learning_rate=1e-5,
        disable_tqdm=True)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = trl.PPOTrainer(
            args=args, processing_class=hf_tok, model=transformers.GPT2LMHeadModel(hf_config),
            ref_model=transformers.GPT2LMHeadModel(hf_config),
            reward_model=transformers.GPT2ForSequenceClassification(hf_config),
            value_model=transformers.GPT2ForSequenceClassification(hf_config),
            train_dataset=dataset, eval_dataset=dataset, callbacks=[stamps])
        trainer.train()
    return [after - before for before, after in zip(stamps.stamps, stamps.stamps[1:])]

# -----------------------------------------------------------------------------

ways = {
    f'TRL {trl.__version__}': theirs,
    'rlhf.py, separate critic': lambda: ours('--critic=separate'),
    'rlhf.py, shared critic': lambda: ours('--critic=shared')}
seconds = {name: [] for name in ways}
for _ in range(3):
    for name, way in ways.items():
        seconds[name] += way()

print(f'{ANSWERS} answers of {PROMPT} + {RESPONSE} tokens; torch {torch.__version__}, '
      f'{torch.get_num_threads()} threads')
slowest = statistics.median(seconds[f'TRL {trl.__version__}'])
for name, measured in seconds.items():
    median = statistics.median(measured)
    print(f'{name:28} {median:6.2f} CPU s an update ({min(measured):.2f} to {max(measured):.2f}), '
          f'{ANSWERS / median:6.1f} episodes a CPU second, {slowest / median:4.2f}x')
