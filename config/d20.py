# 561 million parameters on 11.2 billion tokens, 20 per parameter: the size of nanochat's "d20", its
# 100-dollar model. Nobody has run this profile here yet; the estimate is 83 dollars on 8 H100s.
#     python pretrain.py config/d20.py --estimate=8xH100
#     python prepare_data.py config/d20.py; python tokenizer.py config/d20.py
#     torchrun --standalone --nproc_per_node=8 pretrain.py config/d20.py

data_dir = 'data/d20'
out_dir = 'out/d20'
block_size = 2048
vocab_size = 65536 # of the tokenizer; --estimate needs it before there is a tokenizer

prepare_data = dict(source='fineweb_text', n_files=15)
tokenizer = dict(train_chars=2_000_000_000)

pretrain = dict(
    arch='llama', n_layer=20, n_head=10, n_embd=1280, n_hidden=3424, tie_embeddings=False,
    qk_norm=True, dropout=0.0,
    batch_size=8, total_batch_size=256, max_iters=0, tokens_per_param=20.0, # 0.5M tokens a step
    optimizer='muon', learning_rate=8e-4, min_lr=0.0, warmup_iters=200,
    compile=True, eval_interval=250, eval_iters=10, save_interval=1000)
