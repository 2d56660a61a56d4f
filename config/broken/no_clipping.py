# Gradients are not clipped. The rate is higher than that of healthy.py, so that it matters.
# Remedy: --grad_clip=1.
out_dir = 'out/broken/no_clipping'
pretrain = dict(grad_clip=0.0, learning_rate=2e-2)
