# Gradients are not clipped, at a rate higher than that of healthy.py. AdamW hardly notices: it
# divides by the size of past gradients. Compare with --grad_clip=1 before you believe in a setting.
out_dir = 'out/broken/no_clipping'
pretrain = dict(grad_clip=0.0, learning_rate=2e-2)
