"""Types, errors, files and settings that every room stands on; no model code."""
