# Mid-training, between pretraining and SFT: one pass over the conversations, which are written with
# the special tokens, and over a fifth of the documents. It starts from the base model of
# config/tiny.py. This profile holds only what differs, so name both, in this order.
#     bash speedrun.sh                                      # first makes data/toytown, out/toytown
#     bash speedrun.sh config/tiny.py config/midtrain.py    # every single stage needs both, too

data_dir = 'data/midtrain'
out_dir = 'out/midtrain'

# another folder than that of prepare_data.py, so the town of the first run is not made again
toytown = dict(town_dir='data/raw/midtrain')
tokenizer = dict(use='data/toytown/tokenizer.json', mid_chats=1, mid_text=0.2)
pretrain = dict(init_from='out/toytown/base.pt', mid_lr_scale=0.3)

# The first column is the model that mid-training started from
eval = dict(models='out/toytown/base.pt,mid,sft,dpo,rlhf')
