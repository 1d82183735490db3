"""Why was this token predicted: what in a memory spoke for it, for people to read."""
