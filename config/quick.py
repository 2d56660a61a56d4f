# All stages in 90 seconds, for the impatient: everything is real, the answers are poor. It comes
# after config/tiny.py:
#     bash speedrun.sh --quick

data_dir = 'data/quick'
out_dir = 'out/quick'

toytown = dict(
    town_dir='data/raw/quick', n_people=16, n_pages=500, n_books=160, n_lessons=400, n_chat=1200,
    n_faults=50, n_preferences=200, n_prompts=300, n_val=50)
prepare_data = dict(files='data/raw/quick')
pretrain = dict(max_iters=100, eval_interval=50, eval_iters=4, log_interval=20, save_interval=60)
sft = dict(epochs=1, eval_interval=50, eval_prompts=50, log_interval=10)
reward = dict(sample_prompts=60, sample_answers=4, eval_interval=50, log_interval=10)
rlhf = dict(max_iters=3, batch_size=32, eval_interval=3, eval_prompts=50)
eval = dict(n_prompts=50, pool_prompts=10)
