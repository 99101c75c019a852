"""One module per op with `trials(setting, draw)` and `timed(setting)`."""
