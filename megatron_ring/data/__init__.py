"""From text files to the tokens that each rank trains on.

A batch is made in six steps, each with its module docstring:

1. *Files to documents*, once, before training: corpus.py selects files (file_search.py) and cuts
   them into shards, documents.py reads the documents of each file: it recognizes the format
   (file_formats.py), opens what is compressed or archived (compression.py, archives.py), and takes
   the texts from lines, rows or whole files (json_lines.py, parquet_rows.py, document_text.py).
2. *Documents to tokens*: tokenizer_training.py trains a tokenizer if none is given, shards.py
   tokenizes (tokenizer.py), worker_pool.py spreads the shards over processes, and prepare.py joins
   them into one token store.
3. *The token store* on disk: tokens.py (``P.bin``), token_index.py (``P.idx``), manifest.py
   (``P.json``).
4. *Tokens to samples*, during training: dataset.py opens the stores and splits their documents;
   samples.py or whole_documents.py numbers the samples of a store; blend.py blends stores.
5. *Samples to micro-batches*: loader.py picks the samples of this data rank and, of each sample,
   the tokens of this context rank; document_boundaries.py adds positions, targets and boundaries.
6. prefetch.py prepares the batches of the next steps in a thread.
"""
