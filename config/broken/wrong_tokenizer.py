# A tokenizer that fits the text badly: with one merge, almost every byte is a token.
# Remedy: more merges. Compare val_bpb, not the loss. It needs data of its own:
#     python prepare_data.py config/tiny.py config/broken/healthy.py config/broken/wrong_tokenizer.py
#     python tokenizer.py    config/tiny.py config/broken/healthy.py config/broken/wrong_tokenizer.py
out_dir = 'out/broken/wrong_tokenizer'
data_dir = 'data/broken/wrong_tokenizer'

tokenizer = dict(vocab_size=263) # 256 bytes, 6 special tokens, one merge: the fewest
