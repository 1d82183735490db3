"""Positions as parts: what a token's place adds to attention scores."""
