"""Extraction: a model reads text once and its hidden states become a datastore."""
