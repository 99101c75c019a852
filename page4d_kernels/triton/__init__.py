"""Triton kernels and their launch. `<op>.py` and `<op>_backward.py` hold the @triton.jit code, `<op>_launch.py` the host code.

The backends import these modules on first use, so `import page4d_kernels` does not need Triton.
"""
