"""The build of the compiled library: with and without a compiler, by hand and on demand, never with torch."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from page4d_kernels import native

ROOT = Path(__file__).parents[2]
TOOLS = shutil.which("cmake") and shutil.which("c++") and importlib.util.find_spec("pybind11")
NEEDS = pytest.mark.skipif(not TOOLS, reason="needs cmake, pybind11 and a C++ compiler")


@pytest.fixture
def build(tmp_path):
    """Runs build_ext on a copy of the sources, with a torch that must not be imported. Returns the process and the record."""
    source = tmp_path / "source"
    keep = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt", "csrc", "page4d_kernels")
    for name in keep:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("_native.*", "build_record.json", "__pycache__"))
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(path, source)
    trap = tmp_path / "trap"
    trap.mkdir()
    (trap / "torch.py").write_text("raise RuntimeError('the build imports torch')")

    def run(**environment):
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("PAGE4D_", "CXX", "CUDA"))}
        environment = {**clean, "PYTHONPATH": str(trap), "PAGE4D_BUILD_CUDA": "0", **environment}
        result = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
        record = tmp_path / "lib" / "page4d_kernels" / "build_record.json"
        return result, json.loads(record.read_text()) if record.exists() else None

    return run


@NEEDS
@pytest.mark.slow
def test_build(build, tmp_path):
    result, record = build(PAGE4D_BUILD_EXT="1", PAGE4D_BUILD_CUDA="auto", MAX_JOBS="2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert ("nvcc" in record["cuda"]) == (record["left_out"] == [])
    assert record["built"] and record["levels"][0] == "scalar" and record["compiler"]
    (library,) = (tmp_path / "lib" / "page4d_kernels").glob("_native.*")
    needed = subprocess.run(["ldd", str(library)], capture_output=True, text=True).stdout if shutil.which("ldd") else ""
    assert "torch" not in needed and "cuda" not in needed and "python" not in needed


@NEEDS
@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false"])
def test_a_broken_compiler_leaves_pure_python(build, compiler):
    result, record = build(CXX=compiler)
    assert result.returncode == 0, result.stderr
    assert not record["built"] and record["reason"].startswith("cmake failed: ")
    assert f"page4d: no compiled library ({record['reason']})" in result.stderr


@NEEDS
def test_a_broken_compiler_is_an_error_on_demand(build):
    result, record = build(CXX="false", PAGE4D_BUILD_EXT="1")
    assert result.returncode != 0 and record is None
    assert "page4d: the compiled library could not be built: cmake failed: " in result.stderr


@NEEDS
@pytest.mark.slow
def test_without_nvcc(build):
    result, record = build(PAGE4D_BUILD_CUDA="auto", CUDACXX="/nowhere/nvcc")
    assert result.returncode == 0 and record["built"] and record["cuda"] == ""
    assert record["left_out"] == ["cuda: no nvcc works here (put it on PATH or name it in CUDACXX)"]
    assert record["left_out"][0] in result.stderr


@NEEDS
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_an_nvcc_that_does_not_take_the_sources(build):
    result, record = build(PAGE4D_BUILD_CUDA="auto", PAGE4D_CUDA_ARCHS="7")
    assert result.returncode == 0 and record["built"] and record["cuda"] == ""
    assert record["left_out"][0].startswith("cuda: cmake failed: ") and "compute_7" in record["left_out"][0]


@NEEDS
def test_cuda_on_demand(build):
    result, record = build(PAGE4D_BUILD_CUDA="1", CUDACXX="/nowhere/nvcc")
    assert result.returncode != 0 and record is None
    assert "page4d: the compiled library could not be built: cmake failed: " in result.stderr
    assert "PAGE4D_BUILD_CUDA=1, but no nvcc works here" in result.stderr


def test_cuda_without_a_library(build):
    result, _ = build(PAGE4D_BUILD_CUDA="1", PAGE4D_BUILD_EXT="0")
    assert result.returncode != 0 and "PAGE4D_BUILD_CUDA=1 needs the compiled library" in result.stderr


@NEEDS
def test_wrong_architectures_are_named(build):
    result, _ = build(PAGE4D_CUDA_ARCHS="hopper")
    assert result.returncode != 0 and "PAGE4D_CUDA_ARCHS='hopper': give compute capabilities" in result.stderr


def test_no_cmake(build, tmp_path):
    result, record = build(PATH=str(tmp_path))
    assert result.returncode == 0 and record == {"built": False, "reason": "cmake is not installed"}


def test_not_wanted(build):
    result, record = build(PAGE4D_BUILD_EXT="0")
    assert result.returncode == 0 and record == {"built": False, "reason": "PAGE4D_BUILD_EXT=0"}


def test_an_unknown_wish_is_named(build):
    result, _ = build(PAGE4D_BUILD_EXT="yes")
    assert result.returncode != 0 and "PAGE4D_BUILD_EXT='yes': choose one of auto, 0, 1" in result.stderr


@NEEDS
def test_a_wrong_number_of_jobs_is_named(build):
    result, _ = build(MAX_JOBS="many")
    assert result.returncode != 0 and "MAX_JOBS='many': give a number of at least 1" in result.stderr and "Traceback" not in result.stderr


def test_sources_and_python_agree_about_the_interface():
    header = (ROOT / "csrc" / "include" / "page4d" / "common.h").read_text()
    assert int(re.search(r"#define PAGE4D_INTERFACE (\d+)", header)[1]) == native.INTERFACE
