"""Language models: where keys are read, how targets are scored, and a memory attached to one."""
