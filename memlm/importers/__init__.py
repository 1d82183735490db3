"""Files of other programs become ours: mapping only; reading them is in `memlm.formats`."""
