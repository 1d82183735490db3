"""Readers of files that other programs wrote; nothing of them is ever executed."""
