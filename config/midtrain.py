# Mid-training, a stage between pretraining and SFT: train the base model of config/tiny.py further,
# on fewer pages and on conversations, which are written with the special tokens. This profile holds
# only what differs from config/tiny.py, so name both, in this order.
#     bash speedrun.sh                                      # first makes data/toytown, out/toytown
#     bash speedrun.sh config/tiny.py config/midtrain.py    # every single stage needs both, too

data_dir = 'data/midtrain'
out_dir = 'out/midtrain'

toytown = dict(town_dir='data/raw/midtrain', n_pages=800, n_books=250, n_lessons=700)
prepare_data = dict(files='data/raw/midtrain')
tokenizer = dict(use='data/toytown/tokenizer.json', conversations=1)

pretrain = dict(
    init_from='out/toytown/base.pt', max_iters=300, learning_rate=4e-3, eval_interval=150)

# `base` is the mid-trained model here; the one that it started from is the first column
eval = dict(models='out/toytown/base.pt,base,sft,dpo,rlhf')
