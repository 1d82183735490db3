"""Text chunks and their neighbours: RETRO's database, its retrievers, and the data it trains on."""
