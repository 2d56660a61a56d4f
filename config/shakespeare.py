data_dir = 'data/shakespeare'
out_dir = 'out/shakespeare'
tokenizer = dict(kind='char')
pretrain = dict(
    arch='llama', n_layer=4, n_head=4, n_embd=128, n_hidden=320, block_size=64, qk_norm=True, key_shift=True, dropout=0.0,
    batch_size=16, max_iters=150, optimizer='muon', learning_rate=1.2e-2, min_lr=0.0, warmup_iters=10,
    eval_interval=1000, eval_iters=200, log_interval=50, save_interval=1000)
