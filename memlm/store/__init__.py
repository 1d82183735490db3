"""The on-disk datastore of keys and next tokens: writer, reader, verify; knows no model."""
