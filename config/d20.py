# The whole recipe with 561 million parameters and 11.2 billion tokens, 20 per parameter: the size of
# nanochat's "d20", its 100-dollar model. Nobody has run this profile here yet. All of it:
#     bash speedrun.sh config/d20.py --estimate=8xH100       # tokens, memory, hours, dollars, disk
#     bash speedrun.sh config/d20.py config/rehearse.py      # a tiny model on a laptop, in minutes
#     python prepare_data.py config/d20.py --download_only=true      # 33 GB; needs no GPU
#     bash speedrun.sh config/d20.py
# The first two stages need hours and no GPU. To save these dollars, start it on a cheaper machine, stop
# it with Ctrl-C when pretrain.py begins, and move the whole folder: `rsync -a` keeps the times of the
# files, which tell what is done. On fewer GPUs it does the same updates in more time. batch_size and
# micro_batch_size are what one GPU takes at once, for 80 GB: with less memory lower them.

data_dir = 'data/d20'
out_dir = 'out/d20'
block_size = 2048
vocab_size = 65536

# C4 is cleaned English: what is left to do is Gopher's rules, duplicates, personal data. They keep
# 70% or more of 100 files: 11.2 billion tokens, so nothing is repeated.
prepare_data = dict(
    source='c4,oasst2,dolly,gsm8k,hellaswag_train,commonsense_qa_train,' # text, conversations
           'hh,ultrafeedback,'                                           # ranked answers
           'core,mmlu,arc,gsm8k_test,humaneval',                         # benchmarks
    n_files=100, filters='repetition,quality,pii,dedup,decontaminate', val_fraction=0.005)

# Mid-training: the conversations twice, 60M tokens, and as much text: half each, as in OLMo 2 (OLMo
# et al. 2025)
tokenizer = dict(train_chars=2_000_000_000, mid_chats=2, mid_text=0.005)

pretrain = dict(
    arch='llama', n_layer=20, n_head=10, n_embd=1280, n_hidden=3424, tie_embeddings=False,
    qk_norm=True, dropout=0.0,
    batch_size=8, total_batch_size=256, max_iters=0, tokens_per_param=20.0, # 0.5M tokens a step
    optimizer='muon', learning_rate=8e-4, min_lr=0.0, warmup_iters=200,
    compile=True, eval_interval=250, eval_iters=10, save_interval=1000)

# SmolLM2 (Allal et al. 2025) takes two epochs and 3e-4 with 1M tokens a step. Ours are 65,536, 1/16
# of that, so the rate is divided by the root of 16.
sft = dict(
    epochs=2, batch_size=4, total_batch_size=32, learning_rate=7.5e-5,
    max_new_tokens=128, eval_interval=250)

# InstructGPT (Ouyang et al. 2022, C.2): one epoch, 64 rankings a step, 9e-6
reward = dict(
    epochs=1, batch_size=4, total_batch_size=64, learning_rate=9e-6, max_length=1024,
    eval_interval=500)

# Huang et al. 2024: 512 answers an update, in four epochs of one minibatch, 3e-6, KL 0.05.
# They sample a million answers of up to 53 tokens; this profile 51,200 of up to 256.
rlhf = dict(
    max_iters=100, batch_size=512, minibatch_size=512, micro_batch_size=4, sample_batch=128,
    max_new_tokens=256, ppo_epochs=4, learning_rate=3e-6, kl_coef=0.05, eval_interval=20,
    sample_interval=1_000_000) # print no samples: hh-rlhf holds offensive texts

# nanochat asks 500 questions of each task, too
eval = dict(limit=500, allow_code=True, max_new_tokens=256, batch_size=8)
