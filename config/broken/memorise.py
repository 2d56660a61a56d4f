# Too little text, read again and again: 45 documents. val_loss rises, the training loss falls to 0.
# Remedy: more text, or fewer steps. It needs data of its own, which is made in seconds: first run
# toytown.py, prepare_data.py and tokenizer.py with the same three profiles as pretrain.py.
out_dir = 'out/broken/memorise'
data_dir = 'data/broken/memorise'

toytown = dict(
    town_dir='data/raw/broken', n_pages=100, n_books=30, n_lessons=30, n_faults=10, n_chat=50,
    n_preferences=20, n_prompts=50, n_val=20)
prepare_data = dict(files='data/raw/broken', val_fraction=0.5)
tokenizer = dict(use='data/toytown/tokenizer.json')
