# SmolLM2-135M (Allal et al. 2025), which others have pretrained on 2 trillion tokens, becomes an
# assistant: SFT, a reward model, RLHF. For one GPU with 12 to 24 GB; nobody has run it on one here.
#     python convert.py config/smollm2.py           # downloads the model, 0.3 GB
#     python prepare_data.py config/smollm2.py      # conversations, rankings, exams: 1.1 GB
#     python sft.py config/smollm2.py
#     python reward.py config/smollm2.py
#     python rlhf.py config/smollm2.py
#     python eval.py config/smollm2.py
#     python chat.py out/smollm2/rlhf.pt
# If you have the files, name them instead: the model's folder, and files or folders of the data.
#     python convert.py config/smollm2.py SmolLM2-135M out/smollm2/base.pt
#     python prepare_data.py config/smollm2.py --source=files --files=chats.jsonl,rankings.jsonl.gz
# SmolLM2-360M: name HuggingFaceTB/SmolLM2-360M and another out_dir. On 8 GPUs the same updates, with
# torchrun as in sft.py.
#
# A CPU reads some hundred tokens a second, so there take 200 rows of each file and short texts.
# Then SFT takes 5 GB of memory, the reward model 4 and RLHF 8.
#     mkdir -p data/cpu; for f in data/smollm2/*.jsonl; do head -n 200 $f > data/cpu/${f##*/}; done
#     python sft.py config/smollm2.py --data_dir=data/cpu --max_length=256 --total_batch_size=8
#     python reward.py config/smollm2.py --data_dir=data/cpu --max_length=256 --total_batch_size=8
#     python rlhf.py config/smollm2.py --data_dir=data/cpu --max_iters=10 --batch_size=8 \
#         --minibatch_size=8 --micro_batch_size=2 --max_new_tokens=32 --eval_prompts=8

data_dir = 'data/smollm2'
out_dir = 'out/smollm2'

# It knows 8,192 tokens. With 1,024 no batch is large; longer prompts are left out.
convert = dict(
    source='HuggingFaceTB/SmolLM2-135M', target='out/smollm2/base.pt', block_size=1024)

prepare_data = dict(
    source='dolly,oasst2,gsm8k,hh,ultrafeedback,' # conversations, ranked answers, prompts
           'arc,lambada,gsm8k_test')              # benchmarks

# Allal et al. take two epochs and 3e-4 with 1M tokens a step. Ours are 32,768, 1/32 of that, so the
# rate is divided by the root of 32.
sft = dict(
    epochs=2, batch_size=4, total_batch_size=32, learning_rate=5e-5,
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
