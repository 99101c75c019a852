"""Triton kernels and their launch: `<op>.py` and `<op>_backward.py` hold @triton.jit code, `<op>_launch.py` the Python around it.

Imported by the backends on first use only: `import page4d_kernels` does not need Triton.
"""
