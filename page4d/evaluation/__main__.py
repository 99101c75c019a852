"""`python -m page4d.evaluation ...` is `page4d eval ...`."""

import sys

from ..cli.eval import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m page4d.evaluation"))
