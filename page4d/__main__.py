"""`python -m page4d COMMAND ...` is `page4d COMMAND ...`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
