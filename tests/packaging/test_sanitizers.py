"""Kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

csrc/tests/main.cpp runs the CPU kernels, including emulated AMX if the processor has AVX-512 BF16. csrc/tests/cuda_main.cpp runs the CUDA
kernels on the CPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from page4d_kernels import native

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_sanitizers(tmp_path):
    cmake = shutil.which("cmake")
    if cmake is None or shutil.which("c++") is None or native.why_missing():
        pytest.skip("needs cmake, a C++ compiler and the compiled library, which knows the processor's level")
    options = ["PAGE4D_TESTS", "PAGE4D_SANITIZE", "PAGE4D_EMULATE_AMX"]
    build = [
        [cmake, "-S", str(ROOT), "-B", str(tmp_path), *(f"-D{option}=ON" for option in options)],
        [cmake, "--build", str(tmp_path), "-j2"],
    ]
    for command in build:
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    cuda = subprocess.run([str(tmp_path / "page4d_cuda_tests")], capture_output=True, text=True)
    assert cuda.returncode == 0 and " checks, 0 failed" in cuda.stdout, cuda.stdout + cuda.stderr[-4000:]
    unwritten_is_nan = os.environ | {"ASAN_OPTIONS": "malloc_fill_byte=255:max_malloc_fill_size=1000000000"}
    result = subprocess.run([str(tmp_path / "page4d_tests")], capture_output=True, text=True, env=unwritten_is_nan)
    best = native.best_level()
    highest = "amx" if best == "avx512_bf16" else best  # the rest of the amx level is AVX-512 BF16, which is not emulated
    assert result.returncode == 0 and f", 0 failed, levels up to {highest}" in result.stdout, result.stdout + result.stderr[-4000:]
