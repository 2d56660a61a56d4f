# The healthy run that the experiments of this folder break, each in one way: config/tiny.py with a
# layer less, and AdamW instead of Muon, which forgives more. About 30 seconds on a quiet core.
#     python pretrain.py config/tiny.py config/broken/healthy.py
#     python pretrain.py config/tiny.py config/broken/healthy.py config/broken/high_lr.py
#     python eval.py config/tiny.py config/broken/healthy.py config/broken/high_lr.py
# eval.py draws the curve of the healthy run (config/curves.json) behind that of the broken one, in
# out/broken/high_lr/report.html. All need data/toytown, which `bash speedrun.sh` makes.

out_dir = 'out/broken/healthy'

pretrain = dict(
    n_layer=2, qk_norm=False, batch_size=5, max_iters=200,
    optimizer='adamw', learning_rate=6e-3,
    eval_interval=50, eval_iters=20, log_interval=10, save_interval=1000)
