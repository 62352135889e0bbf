"""From text to a context rank's share of a sample: documents, tokenizer, token store, loader."""
