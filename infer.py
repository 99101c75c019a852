"""Cameras, depth, points, tracks and the dynamics mask of a video: `python infer.py [INPUT ...]`, see `--help`."""

import sys

from page4d.cli.infer import main

if __name__ == "__main__":
    sys.exit(main())
