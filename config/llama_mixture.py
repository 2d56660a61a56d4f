# The mixture of LLaMA (Touvron et al. 2023, table 1), one file of each part from public sources: 13 GB to download.
#     python prepare_data.py config/llama_mixture.py            (config/sources.json lists all sources)

data_dir = 'data/llama_mixture'

prepare_data = dict(
    source='commoncrawl,c4,github,wikipedia,books,arxiv,stackexchange', max_epochs=2,
    mixture='commoncrawl:0.67,c4:0.15,github:0.045,wikipedia:0.045,books:0.045,arxiv:0.025,stackexchange:0.02')
