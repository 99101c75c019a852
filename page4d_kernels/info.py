"""`python -m page4d_kernels.info`: versions, devices, environment, and for each backend whether it can serve here or why not."""

from __future__ import annotations

import platform

import torch

from . import env, native
from .backends.registry import registries
from .qualify import record
from .qualify.report import describe
from .versions import cpu_name, version

PACKAGES = ("page4d", "torch", "triton", "flash-attn", "xformers", "numpy", "av")


def devices() -> list[str]:
    found = [f"cpu: {cpu_name()}, {torch.get_num_threads()} threads"]
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
        lines.append(f"{op} on {device} ({registry.variable}; auto without a record: {', '.join(registry.order)})")
        for backend in registry:
            reasons = registry.reasons(backend.name, registry.typical(device))
            state = f"no: {'; '.join(reasons)}" if reasons else "usable"
            lines.append(f"  {backend.name:<15} {backend.summary}\n  {'':<15} {state}")
    return "\n".join([*lines, "qualified kernels", *(f"  {line}" for line in _qualified(device))])


def _qualified(kind: str) -> list[str]:
    """What "auto" follows on this device, or why it follows nothing."""
    if record.mode() == "off":
        return ["PAGE4D_QUALIFY=off: no record is read"]
    if kind not in ("cpu", "cuda"):
        return [f"there are no records on {kind}"]
    entry = record.current(kind)
    if entry is not None:
        return describe(entry).splitlines()
    return [f"{record.stored(torch.device(kind))[1]}: run `page4d qualify`"]


if __name__ == "__main__":
    print(report())
