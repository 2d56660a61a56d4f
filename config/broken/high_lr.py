# A learning rate 10 times too high: every step goes too far, and the loss stays far up.
# Remedy: lower learning_rate, until the loss at the end gets no lower.
out_dir = 'out/broken/high_lr'
pretrain = dict(learning_rate=6e-2)
