"""From text to a context rank's share of a sample.

Once, before training, led by prepare: documents -> tokenizer_training -> tokenizer -> tokens, token_index, manifest.
In training: dataset opens tokens and tokenizer -> stream (samples or whole_documents, several in a mixture)
-> loader -> prefetch.
"""
