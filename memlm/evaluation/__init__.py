"""Perplexity with its protocol, intervals, comparison and the tuning of memories."""
