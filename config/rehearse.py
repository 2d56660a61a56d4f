# A rehearsal of a large profile, in minutes on a laptop, before GPUs are rented: the same commands,
# sources, file forms, stages and checkpoints, with a model of two layers and the first rows of every
# file. Name it after the profile that it rehearses:
#     bash speedrun.sh config/d20.py config/rehearse.py          # or config/d20.py --rehearse=true
#     NPROC=2 bash speedrun.sh config/d32.py config/rehearse.py  # two processes, without GPUs, too
# It downloads about 30 MB. With --mirror=http://127.0.0.1:8000 all files come from there.

data_dir = 'data/rehearsal'
out_dir = 'out/rehearsal'
block_size = 256
vocab_size = 1024
batch_size = 2
total_batch_size = 16 # for up to 8 processes
log_interval = 5
eval_interval = 20
save_interval = 10
compile = False # takes a minute and a C++ compiler; try --compile=true on the rented machine

prepare_data = dict(first_bytes=200_000, n_files=2, val_fraction=0.1)
tokenizer = dict(mid_text=0.2)
pretrain = dict(n_layer=2, n_head=2, n_embd=64, n_hidden=176, max_iters=30, warmup_iters=5, eval_iters=4)
sft = dict(epochs=1, max_new_tokens=16, eval_prompts=8)
rlhf = dict(
    max_iters=4, batch_size=16, minibatch_size=16, micro_batch_size=2, max_new_tokens=16,
    eval_interval=2, eval_prompts=8, save_interval=2)
eval = dict(
    limit=4, n_robust=2, n_prompts=8, pool_prompts=2, val_tokens=20_000, max_new_tokens=16,
    max_exam_tokens=16)
