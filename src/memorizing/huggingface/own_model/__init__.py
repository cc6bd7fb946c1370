"""Our own model as one of `transformers`: configuration, tokenizer, cache, `generate`."""
