"""Builds the compiled library with one call of CMake; everything else is in pyproject.toml. Never imports torch.

PAGE4D_BUILD_EXT=auto  (default) build it; if that fails, install without it and record why
PAGE4D_BUILD_EXT=1     build it or fail
PAGE4D_BUILD_EXT=0     do not build it
PAGE4D_BUILD_CUDA=auto (default) with CUDA kernels if nvcc is installed and compiles them
PAGE4D_BUILD_CUDA=1    with CUDA kernels or fail
PAGE4D_BUILD_CUDA=0    without CUDA kernels
PAGE4D_CUDA_ARCHS=...  compute capabilities for nvcc, separated by commas (default 80,90a)
MAX_JOBS=N             compile at most N files at a time (default: one per core, fewer if memory is short: 1 GiB each)
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
RECORD = "build_record.json"  # beside the module; page4d_kernels/native.py reads it
GIB_PER_JOB = 1


class BuildFailed(Exception):
    """The compiled library could not be built; the message says why."""


def jobs() -> int:
    wanted = os.environ.get("MAX_JOBS", "").strip()
    if wanted:
        if not wanted.isdecimal() or int(wanted) < 1:
            raise SystemExit(f"MAX_JOBS={wanted!r}: give a number of at least 1")
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**30
    except (ValueError, OSError, AttributeError):
        memory = 4
    return max(1, min(cores, memory // GIB_PER_JOB))


def switch(name: str) -> str:
    wanted = os.environ.get(name, "").strip() or "auto"
    if wanted not in {"auto", "0", "1"}:
        raise SystemExit(f"{name}={wanted!r}: choose one of auto, 0, 1")
    return wanted


def architectures() -> list[str]:
    """The -D argument for CMake, if the user sets architectures."""
    wanted = os.environ.get("PAGE4D_CUDA_ARCHS", "").replace(" ", "")
    if wanted and not re.fullmatch(r"\d+[af]?(,\d+[af]?)*", wanted):
        raise SystemExit(f"PAGE4D_CUDA_ARCHS={wanted!r}: give compute capabilities without the dot, separated by commas, like 80,90a")
    return [f"-DPAGE4D_CUDA_ARCHS={wanted}"] if wanted else []


def run(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildFailed(f"{command[0]}: {error.strerror}") from None
    sys.stdout.write(result.stdout)
    if result.returncode != 0:
        sys.stderr.write(result.stderr)
        lines = [line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()]
        diagnostics = [line for line in lines if re.search(r"\b(error|fatal) *:", line, re.IGNORECASE)]  # from a compiler, not CMake
        diagnostics = diagnostics or [line for line in lines if "error" in line.lower()] or lines
        first = diagnostics[0][:300] if diagnostics else f"exit code {result.returncode}"
        raise BuildFailed(f"{Path(command[0]).name} failed: {first}")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        target.mkdir(parents=True, exist_ok=True)
        for stale in target.glob("_native.*"):  # a library from older sources must not be imported
            stale.unlink()
        wanted, cuda = switch("PAGE4D_BUILD_EXT"), switch("PAGE4D_BUILD_CUDA")
        if wanted == "0" and cuda == "1":
            raise SystemExit("PAGE4D_BUILD_CUDA=1 needs the compiled library, and PAGE4D_BUILD_EXT=0 leaves it out: drop one of them")
        record: dict[str, object] = {"built": False, "reason": "PAGE4D_BUILD_EXT=0"}
        if wanted != "0":
            try:
                record = {"built": True, "reason": ""} | self.compile_with_or_without(cuda, target)
            except BuildFailed as failure:
                if wanted == "1" or cuda == "1":
                    raise SystemExit(f"page4d: the compiled library could not be built: {failure}") from None
                record["reason"] = str(failure)
        (target / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        left_out = record.get("left_out") or []
        assert isinstance(left_out, list)
        for line in [f"page4d: no compiled library ({record['reason']})"] if not record["built"] else left_out:
            print(line, file=sys.stderr)

    def compile_with_or_without(self, cuda: str, target: Path) -> dict[str, object]:
        """If nvcc fails and CUDA is optional, build the library without the CUDA kernels."""
        try:
            return self.compile(target, cuda)
        except BuildFailed as with_cuda:
            if cuda != "auto":
                raise
            record = self.compile(target, "0")  # if this fails too, its error is the one reported
            return record | {"left_out": [line if not line.startswith("cuda: ") else f"cuda: {with_cuda}" for line in record["left_out"]]}

    def compile(self, target: Path, cuda: str) -> dict[str, Any]:
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        if cmake is None:
            raise BuildFailed("cmake is not installed")
        try:
            import pybind11
        except ImportError:
            raise BuildFailed("pybind11 is not installed") from None
        build = Path(self.build_temp).resolve() / "page4d"
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"),
            *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
            *(f"-DPAGE4D_BUILD_CUDA={cuda}", *architectures()),
            *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
        ]
        run(configure)
        run([cmake, "--build", str(build), "--parallel", str(jobs())])
        run([cmake, "--install", str(build), "--prefix", str(target)])
        pairs = [line.split("=", 1) for line in (build / "record.txt").read_text().splitlines()]
        values = dict(pairs)
        return {
            "compiler": values["compiler"],
            "levels": values["levels"].split(","),
            "cuda": values["cuda"],
            "left_out": [value for key, value in pairs if key == "left_out"],
        }

    def copy_extensions_to_source(self) -> None:
        """For an editable install, copy the library and its record beside the sources, where Python looks for them."""
        package = ROOT / "page4d_kernels"
        built = Path(self.build_lib).resolve() / "page4d_kernels"
        for stale in package.glob("_native.*"):
            stale.unlink()
        for file in [*built.glob("_native.*"), built / RECORD]:
            shutil.copy2(file, package)


setup(ext_modules=[Extension("page4d_kernels._native", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
