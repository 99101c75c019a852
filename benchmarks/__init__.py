"""Speed and memory of the kernels against their baselines: `python -m benchmarks list`, `python -m benchmarks run`."""
