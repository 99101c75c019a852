"""Backends. `registry.py` is generic. Each op has a folder with its registry in `__init__.py` and one file per backend."""
