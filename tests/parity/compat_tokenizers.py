"""Tokenizer files: the ids of AutoTokenizer."""
