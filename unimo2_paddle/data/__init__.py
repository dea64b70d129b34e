"""Tokenizer, images, corpora and batches."""
