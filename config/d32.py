# The whole recipe with 1.9 billion parameters and 38 billion tokens, 20 per parameter: the size of
# nanochat's "d32". Nobody has run this profile here yet. FSDP splits the weights, gradients and
# optimizer states of what is trained, 16 bytes per parameter, among the GPUs; the models that RLHF
# only reads are kept whole, in bf16.
#     bash speedrun.sh config/d32.py --estimate=8xH100       # tokens, memory, hours, dollars, disk
#     bash speedrun.sh config/d32.py config/rehearse.py      # a tiny model on a laptop, in minutes
#     python prepare_data.py config/d32.py --download_only=true      # 110 GB; needs no GPU
#     bash speedrun.sh config/d32.py
# Sources, conversations and learning rates are those of config/d20.py, which tells where they are
# from, but for the text: 340 files of C4. The rates hold for this size, too: SmolLM2's is of 1.7
# billion parameters, InstructGPT's of 6 billion, those of Huang et al. of 1 to 7 billion.

data_dir = 'data/d32'
out_dir = 'out/d32'
block_size = 2048
vocab_size = 65536
parallel = 'fsdp'

prepare_data = dict(
    source='c4,oasst2,dolly,gsm8k,hellaswag_train,commonsense_qa_train,hh,ultrafeedback,'
           'core,mmlu,arc,gsm8k_test,humaneval',
    n_files=340, filters='repetition,quality,pii,dedup,decontaminate', val_fraction=0.005)

tokenizer = dict(train_chars=2_000_000_000, mid_chats=2, mid_text=0.0015)

pretrain = dict(
    arch='llama', n_layer=32, n_head=16, n_embd=2048, n_hidden=5472, tie_embeddings=False,
    qk_norm=True, dropout=0.0,
    batch_size=4, total_batch_size=256, max_iters=0, tokens_per_param=20.0, # 0.5M tokens a step
    learning_rate=3e-4, min_lr=3e-5, warmup_iters=700,
    compile=True, eval_interval=250, eval_iters=10, save_interval=1000)

sft = dict(
    epochs=2, batch_size=2, total_batch_size=32, learning_rate=7.5e-5,
    max_new_tokens=128, eval_interval=250)

reward = dict(
    epochs=1, batch_size=2, total_batch_size=64, learning_rate=9e-6, max_length=1024,
    eval_interval=500)

rlhf = dict(
    max_iters=100, batch_size=512, minibatch_size=512, micro_batch_size=2, sample_batch=32,
    max_new_tokens=256, ppo_epochs=4, learning_rate=3e-6, kl_coef=0.05, eval_interval=20,
    sample_interval=1_000_000) # print no samples: hh-rlhf holds offensive texts

eval = dict(limit=500, allow_code=True, max_new_tokens=256, batch_size=8)
