# Mid-training: the base model of config/tiny.py goes on with fewer pages and with conversations among them, spelled
# with the special tokens, before SFT.
#     bash speedrun.sh                    # makes data/toytown and out/toytown/base.pt
#     for stage in prepare_data tokenizer pretrain sft reward rlhf eval; do python $stage.py config/midtrain.py; done

data_dir = 'data/midtrain'
out_dir = 'out/midtrain'

prepare_data = dict(n_people=48, val_facts=0.2, n_pages=800, n_books=250, n_lessons=700, n_chat=7000, flaw_rate=0.3)
tokenizer = dict(use='data/toytown/tokenizer.json', conversations=1)

pretrain = dict(
    init_from='out/toytown/base.pt', block_size=160, dropout=0.0, batch_size=10, max_iters=300,
    optimizer='muon', learning_rate=4e-3, min_lr=0.0, warmup_iters=20,
    eval_interval=150, eval_iters=40, log_interval=50, save_interval=200)

sft = dict(epochs=3, batch_size=32, learning_rate=1e-3, eval_interval=100, log_interval=50, save_interval=100)

reward = dict(sample_prompts=2500, sample_answers=6, max_new_tokens=48, batch_size=16, learning_rate=5e-4,
              eval_interval=50, log_interval=20, save_interval=50)

rlhf = dict(max_iters=20, batch_size=128, minibatch_size=128, micro_batch_size=64, max_new_tokens=48, ppo_epochs=2,
            learning_rate=3e-4, kl_coef=0.05, eval_interval=8, sample_interval=8)

eval = dict(batch_size=64, max_new_tokens=80)
