"""The command line: ``memlm <verb>``. Verbs are flat dataclasses; work happens in other rooms."""
