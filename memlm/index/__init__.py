"""Nearest keys: exact search on torch, approximate search on FAISS, and what they cost."""
