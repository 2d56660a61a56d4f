# GPT-2 124M (Radford et al. 2019), as OpenAI has published it, becomes an assistant: SFT, a reward
# model, RLHF. For one GPU with 12 to 24 GB; nobody has run it on one here.
#     python convert.py config/gpt2_chat.py           # downloads the model, 0.5 GB
#     python prepare_data.py config/gpt2_chat.py      # conversations, rankings, exams: 1.1 GB
#     python sft.py config/gpt2_chat.py
#     python reward.py config/gpt2_chat.py
#     python rlhf.py config/gpt2_chat.py
#     python eval.py config/gpt2_chat.py
#     python chat.py out/gpt2_chat/rlhf.pt
# config/smollm2.py says what to write for files that you have, for 8 GPUs, and for a CPU: the same
# holds here. Your own GPT-2 of config/gpt2.py is one more start:
#     python sft.py config/gpt2_chat.py --init_from=out/gpt2/base.pt

data_dir = 'data/gpt2_chat'
out_dir = 'out/gpt2_chat'

convert = dict(source='openai-community/gpt2', target='out/gpt2_chat/base.pt')

prepare_data = dict(
    source='dolly,oasst2,gsm8k,hh,ultrafeedback,' # conversations, ranked answers, prompts
           'arc,lambada,gsm8k_test')              # benchmarks

# GPT-2 has not seen much that looks like a conversation, so it needs more of them than SmolLM2
sft = dict(
    epochs=3, batch_size=4, total_batch_size=32, learning_rate=5e-5,
    max_new_tokens=128, eval_interval=200)

# InstructGPT (Ouyang et al. 2022, C.2): one epoch, 64 rankings a step, 9e-6
reward = dict(
    epochs=1, batch_size=2, total_batch_size=64, learning_rate=9e-6, eval_interval=200)

# Huang et al. 2024: 512 answers an update, in four epochs of one minibatch, 3e-6, KL 0.05; here fewer
rlhf = dict(
    max_iters=200, batch_size=128, minibatch_size=128, micro_batch_size=4, max_new_tokens=128,
    ppo_epochs=4, learning_rate=3e-6, kl_coef=0.05, eval_interval=20,
    sample_interval=1_000_000) # print no samples: hh-rlhf holds offensive texts

eval = dict(limit=500, max_new_tokens=128, batch_size=8)
