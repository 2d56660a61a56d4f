# The data mixture of LLaMA (Touvron et al. 2023, table 1), with one file of each public source: a
# download of 13 GB. config/sources.json lists all sources.
#     python prepare_data.py config/llama_mixture.py

data_dir = 'data/llama_mixture'

prepare_data = dict(
    source='commoncrawl,c4,github,wikipedia,books,arxiv,stackexchange', max_epochs=2,
    mixture='commoncrawl:0.67,c4:0.15,github:0.045,wikipedia:0.045,books:0.045,arxiv:0.025,'
            'stackexchange:0.02')
