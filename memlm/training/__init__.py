"""Training from scratch: tokenizers and small causal language models."""
