# The settings that all runs of scaling.py share. scaling.py adds the width, the number of steps, the
# learning rate and the folders. The data: a town with enough text that no run reads a page twice.
#     for script in toytown prepare_data tokenizer; do python $script.py config/scaling.py; done
#     python scaling.py config/scaling.py

data_dir = 'data/scaling'
toytown = dict(
    town_dir='data/raw/scaling', n_people=48, n_pages=12000, n_books=16000, n_lessons=24000,
    n_faults=20, n_chat=20, n_preferences=20, n_prompts=20, n_val=20) # few of what is not needed
prepare_data = dict(files='data/raw/scaling', val_fraction=0.03)
tokenizer = dict(vocab_size=1024) # the head of a small model should not cost more than its blocks

pretrain = dict(
    arch='llama', n_layer=2, block_size=64, qk_norm=True, key_shift=True, dropout=0.0,
    batch_size=8, # 512 tokens: short runs need steps
    optimizer='muon', momentum=0.9, min_lr=0.0, warmup_iters=20,
    eval_iters=100, eval_interval=10**9, save_interval=10**9, # only at the end
    device='cpu', resume=False)
