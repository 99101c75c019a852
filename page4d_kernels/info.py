"""`python -m page4d_kernels.info`: versions, devices, environment, and for each backend whether it can serve here or why not."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import env, native
from .backends.registry import registries

PACKAGES = ("page4d", "torch", "triton", "flash-attn", "xformers", "numpy", "av")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[str]:
    found = [f"cpu: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        found.append(f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    if torch.backends.mps.is_available():
        found.append("mps: Apple GPU")
    return found


def report() -> str:
    lines = ["versions", f"  python {platform.python_version()}"]
    lines += [f"  {package} {version(package)}" for package in PACKAGES]
    lines += ["devices", *(f"  {device}" for device in devices())]
    lines += ["compiled library", *(f"  {line}" for line in native.report())]
    lines += ["environment"]
    lines += [f"  {name}={env.get(name) or '(not set)'}: {meaning}" for name, meaning in env.VARIABLES.items()]
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    for op, registry in registries().items():
        lines.append(f"{op} on {device} ({registry.variable}; auto tries {', '.join(registry.order)})")
        for backend in registry:
            reasons = registry.reasons(backend.name, registry.typical(device))
            state = f"no: {'; '.join(reasons)}" if reasons else "usable"
            lines.append(f"  {backend.name:<15} {backend.summary}\n  {'':<15} {state}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
