"""``python -m memlm <verb>``: the command line where a launcher starts modules, like torchrun."""

import sys

from memlm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
