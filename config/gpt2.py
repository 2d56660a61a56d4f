# GPT-2 124M on 10 billion tokens of FineWeb, with settings from the literature. Nobody has run this
# profile here yet; `bash speedrun.sh config/gpt2.py --estimate=8xH100` says 45 minutes, 18 dollars.
#     python prepare_data.py config/gpt2.py; python tokenizer.py config/gpt2.py
#     torchrun --standalone --nproc_per_node=8 pretrain.py config/gpt2.py
# One GPU computes the same updates in eight times the time: total_batch_size is the batch of one
# update, batch_size is what one GPU takes at once.

data_dir = 'data/gpt2'
out_dir = 'out/gpt2'

prepare_data = dict(source='fineweb', n_files=101) # 20 GB of published token shards
tokenizer = dict(kind='gpt2')

pretrain = dict(
    batch_size=64, total_batch_size=512, max_iters=19073, # 0.5M tokens a step, 10.0B in all
    dropout=0.0, learning_rate=6e-4, min_lr=6e-5, warmup_iters=700, # Brown et al. 2020, table 2.1
    compile=True, eval_interval=250, eval_iters=20, save_interval=1000)
