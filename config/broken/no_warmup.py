# No warm-up: Adam does not know the size of the gradients yet, so its first steps are too large.
# Remedy: --warmup_iters=20. The rate is higher than that of healthy.py, so that it matters.
out_dir = 'out/broken/no_warmup'
pretrain = dict(warmup_iters=0, learning_rate=2e-2)
