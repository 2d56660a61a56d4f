# nanoGPT's first experiment: Shakespeare, character by character. The model has 377,472 parameters
# and trains in fifteen seconds on a laptop CPU.
#     python prepare_data.py config/shakespeare.py; python tokenizer.py config/shakespeare.py
#     python pretrain.py config/shakespeare.py; python chat.py out/shakespeare/base.pt

data_dir = 'data/shakespeare'
out_dir = 'out/shakespeare'

prepare_data = dict(source='shakespeare')
tokenizer = dict(kind='char')

pretrain = dict(
    arch='llama', n_layer=2, n_head=4, n_embd=128, n_hidden=320, block_size=64, qk_norm=True,
    key_shift=True, dropout=0.0, batch_size=10, max_iters=360,
    optimizer='muon', learning_rate=1.6e-2, momentum=0.8, beta2=0.99, min_lr=0.0, warmup_iters=10,
    eval_interval=1000, eval_iters=20, log_interval=20, save_interval=1000)
