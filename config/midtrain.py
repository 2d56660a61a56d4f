# Mid-training: the base model of config/tiny.py goes on with fewer pages and with conversations among them, spelled
# with the special tokens, before SFT. It changes what is other than in config/tiny.py, so it stands after it:
#     bash speedrun.sh                                        # makes data/toytown and out/toytown/base.pt
#     bash speedrun.sh config/tiny.py config/midtrain.py      # or stage by stage, with both profiles

data_dir = 'data/midtrain'
out_dir = 'out/midtrain'

toytown = dict(town_dir='data/raw/midtrain', n_pages=800, n_books=250, n_lessons=700)
prepare_data = dict(files='data/raw/midtrain')
tokenizer = dict(use='data/toytown/tokenizer.json', conversations=1)

pretrain = dict(init_from='out/toytown/base.pt', max_iters=300, learning_rate=4e-3, eval_interval=150)
