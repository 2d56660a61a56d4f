# The settings that all runs of scaling.py share. scaling.py adds the width, the number of steps and
# the folders.
#     python scaling.py

pretrain = dict(
    arch='llama', n_layer=3, block_size=128, qk_norm=True, key_shift=True, dropout=0.0,
    batch_size=8,
    optimizer='muon', learning_rate=1.2e-2, min_lr=0.0, warmup_iters=20, # good for all widths
    eval_iters=100, eval_interval=10**9, save_interval=10**9, # only at the end
    device='cpu', resume=False)
