# A learning rate 10 times too low: the loss falls smoothly, but too slowly.
# Remedy: raise learning_rate, until the loss at the end gets no lower.
out_dir = 'out/broken/low_lr'
pretrain = dict(learning_rate=6e-4)
