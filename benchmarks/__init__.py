"""Benchmarks: ratios against a baseline in the same run, with the floor (operations, bytes)."""
