# 1.9 billion parameters on 38 billion tokens, 20 per parameter: the size of nanochat's "d32".
# Nobody has run this profile here yet; the estimate is 960 dollars on 8 H100s. FSDP splits the
# weights, gradients and optimizer states, 30 GB, among the GPUs. The text is a sample of 10 billion
# tokens, so the model sees it four times; prepare_data.py has more with --source=commoncrawl.
#     python pretrain.py config/d32.py --estimate=8xH100
#     python prepare_data.py config/d32.py; python tokenizer.py config/d32.py
#     torchrun --standalone --nproc_per_node=8 pretrain.py config/d32.py

data_dir = 'data/d32'
out_dir = 'out/d32'
block_size = 2048
vocab_size = 65536 # of the tokenizer; --estimate needs it before there is a tokenizer

prepare_data = dict(source='fineweb_text', n_files=15)
tokenizer = dict(train_chars=2_000_000_000)

pretrain = dict(
    arch='llama', n_layer=32, n_head=16, n_embd=2048, n_hidden=5472, tie_embeddings=False,
    qk_norm=True, dropout=0.0,
    batch_size=4, total_batch_size=256, max_iters=0, tokens_per_param=20.0,
    parallel='fsdp', learning_rate=3e-4, min_lr=3e-5, warmup_iters=700,
    compile=True, eval_interval=250, eval_iters=10, save_interval=1000)
