# Files that other people wrote, on a laptop CPU in under 20 minutes. All stages take them, but so
# small a model learns little from them. LOG.md has the commands and the results.
#     python prepare_data.py config/files.py --files=plays.txt,dolly.jsonl,hh.jsonl.gz,arc.jsonl

data_dir = 'data/files'
out_dir = 'out/files'

prepare_data = dict(source='files', chat_as_text=True, filters='url,language,dedup,pii')
tokenizer = dict(vocab_size=2048)

pretrain = dict(
    arch='llama', n_layer=4, n_head=4, n_embd=128, block_size=256, qk_norm=True, key_shift=True,
    dropout=0.0, batch_size=8, max_iters=900,
    optimizer='muon', learning_rate=1.2e-2, min_lr=0.0, warmup_iters=20,
    eval_interval=500, eval_iters=20, log_interval=50, save_interval=200)

sft = dict(
    epochs=1, batch_size=4, learning_rate=1e-3,
    eval_interval=100, log_interval=20, save_interval=100)

reward = dict(
    batch_size=16, learning_rate=3e-4,
    eval_interval=50, log_interval=20, save_interval=50)

rlhf = dict(
    max_iters=16, batch_size=32, minibatch_size=32, micro_batch_size=32, max_new_tokens=48,
    ppo_epochs=2, learning_rate=1e-4, eval_interval=10, eval_prompts=64,
    sample_interval=1_000_000) # print no samples: hh-rlhf holds offensive texts

eval = dict(max_new_tokens=48, limit=200, n_prompts=100)
