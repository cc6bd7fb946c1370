"""The command line: one verb, one function call, printed.

Everything heavy is imported inside the verbs, so that `memorizing --help` does not wait for torch.
"""

from memorizing.cli.main import app, main

__all__ = ["app", "main"]
