# A tokenizer that fits the text badly: with one merge, almost every byte is a token.
# Remedy: more merges. Compare val_bpb, not the loss. It needs data of its own: first run
# prepare_data.py and tokenizer.py with the same three profiles as pretrain.py.
out_dir = 'out/broken/wrong_tokenizer'
data_dir = 'data/broken/wrong_tokenizer'

tokenizer = dict(vocab_size=263) # 256 bytes, 6 special tokens, one merge: the fewest
