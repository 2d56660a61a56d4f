# The whole recipe on a laptop CPU, in minutes: Toytown and a model of a million parameters.
#     bash speedrun.sh            or stage by stage: python pretrain.py config/tiny.py

toytown = dict(
    n_people=48, val_facts=0.2, n_pages=4200, n_books=1300, n_lessons=3600, n_chat=7000,
    flaw_rate=0.3)
tokenizer = dict(vocab_size=2048) # enough for every frequent word of the town to be one token

pretrain = dict(
    arch='llama', n_layer=3, n_head=4, n_embd=128, block_size=160, qk_norm=True, key_shift=True,
    dropout=0.0, batch_size=10, max_iters=1500,
    optimizer='muon', learning_rate=1.2e-2, min_lr=0.0, warmup_iters=20,
    eval_interval=500, eval_iters=20, log_interval=50, save_interval=250)

sft = dict(
    epochs=2, batch_size=8, learning_rate=2e-3,
    eval_interval=200, log_interval=50, save_interval=100)

reward = dict(
    sample_prompts=1000, sample_answers=6, max_new_tokens=48, epochs=1, batch_size=16,
    learning_rate=1e-3, beta=0.4, eval_interval=100, log_interval=20, save_interval=50)

rlhf = dict(
    max_iters=8, batch_size=128, minibatch_size=16, micro_batch_size=16, max_new_tokens=48,
    ppo_epochs=1, learning_rate=6e-4, critic_learning_rate=2e-3, cliprange_value=0.0, kl_coef=0.1,
    eval_interval=4, sample_interval=4)

# 80 tokens are more than a good answer needs: a model that does not stop should be seen
eval = dict(n_prompts=200, pool_prompts=75, sample_batch=256, max_new_tokens=80)
