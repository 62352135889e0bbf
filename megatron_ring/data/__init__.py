"""From text to a context rank's share of a sample.

Once, before training, led by prepare: corpus (compression, documents) -> tokenizer_training -> tokenizer
(sentencepieces, hugging_face_tokens) -> shards by processes -> tokens, token_index, manifest.
In training: dataset opens tokens and tokenizer -> stream (samples or whole_documents, several in a mixture)
-> loader -> prefetch.
"""
