"""`python -m page4d.data.synthetic ...` is `page4d preview ...`."""

import sys

from ...cli.preview import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m page4d.data.synthetic"))
