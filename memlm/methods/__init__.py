"""The porch: one short file per published system, composed of parts from the rooms below."""
