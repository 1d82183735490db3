"""Public oracles for authors of memories, indexes and families: tiny models, plain references."""
