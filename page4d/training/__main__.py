"""`python -m page4d.training ...` is `page4d train ...`."""

import sys

from ..cli.train import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m page4d.training"))
