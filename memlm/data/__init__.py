"""Text to documents to tokens to windows to batches; knows no model."""
