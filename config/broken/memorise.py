# Too little text, read again and again: a town of 45 pages. val_loss rises, the training loss falls.
# Remedy: more text, or fewer steps. It needs data of its own, made in seconds:
#     python toytown.py      config/tiny.py config/broken/healthy.py config/broken/memorise.py
#     python prepare_data.py config/tiny.py config/broken/healthy.py config/broken/memorise.py
#     python tokenizer.py    config/tiny.py config/broken/healthy.py config/broken/memorise.py
out_dir = 'out/broken/memorise'
data_dir = 'data/broken/memorise'

toytown = dict(
    town_dir='data/raw/broken', n_pages=100, n_books=30, n_lessons=30, n_faults=10, n_chat=50,
    n_preferences=20, n_prompts=50, n_val=20)
prepare_data = dict(files='data/raw/broken', val_fraction=0.5)
tokenizer = dict(use='data/toytown/tokenizer.json')
