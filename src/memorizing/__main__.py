"""`python -m memorizing` is `memorizing`."""

import sys

from memorizing.cli import main

if __name__ == "__main__":
    sys.exit(main())
