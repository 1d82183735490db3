"""Stores, indexes and explicit state become token memories."""
