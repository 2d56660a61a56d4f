# Too few tokens: the run ends while the loss still falls fast.
# Remedy: raise max_iters, or tokens_per_param with --max_iters=0.
out_dir = 'out/broken/few_tokens'
pretrain = dict(max_iters=40)
