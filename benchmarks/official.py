"""Times the official release from a user's own clone, in a separate process, with the same weights and images as our model.

The clone is never part of this repository. It needs einops, matplotlib and huggingface_hub. The process
loads the model once. It runs one forward pass for every line on its standard
input, so that its calls can be interleaved with ours.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from page4d.model.checkpoint import save_official
from page4d_kernels.profiling import peak_bytes, reset_peak

from .measure import CHECKOUT
from .model import ModelInputs, joined, random_model

NAME = "official release"
CLASS = "page.models.vggt:VGGT"  # in the folder model/ of the release's clone
OLDER_CLASS = "vggt.models.vggt:VGGT"  # at the root of clones of VGGT
OPTIONS = {
    "enable_track": False,
    "mask_hold_start": 0,
    "mask_hold_end": 1,
}  # the schedule ends at once: eval mode uses the mask
MARK = "benchmark: "  # marks our answers among the lines that the clone prints


class OfficialError(RuntimeError):
    """The clone cannot be run. The message ends with the last line of its error output."""


class Official(contextlib.AbstractContextManager):
    """The process. A call runs one forward pass. `outputs` and `peak` (memory, counted as in `measure`) are those of the first pass."""

    def __init__(self, clone: Path, name: str, inputs: ModelInputs):
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        device = inputs.images.device.type
        save_official(random_model(inputs.preset, torch.float32, torch.float32, device), folder / "weights.pt")
        torch.save({"images": inputs.images.cpu(), "dtype": inputs.dtype}, folder / "inputs.pt")
        command = [sys.executable, "-m", "benchmarks.official", str(clone.resolve()), name, device, str(folder)]
        self._errors = (folder / "errors").open("w+")
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True, cwd=CHECKOUT)
        try:
            self._answer()
            self()
            self.peak = int(json.loads((folder / "peak.json").read_text()))
            self.outputs: Tensor = torch.load(folder / "outputs.pt", weights_only=True)
        except BaseException:
            self.__exit__()
            raise

    def __call__(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # _answer reports the reason
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        self._answer()

    def _answer(self) -> None:
        assert self._process.stdout is not None
        if any(line.startswith(MARK) for line in self._process.stdout):
            return
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["its process ended without an error message"]
        raise OfficialError(f"the official release could not be run: {lines[-1]}")

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()
        self._folder.cleanup()


def serve(clone: str, name: str, device: str, folder: Path) -> None:
    """Main function of the process: one pass per line of standard input. Writes outputs and memory of the first pass to `folder`."""
    sys.path[:0] = [clone, f"{clone}/model"]
    if name == CLASS and not any(Path(folder, "page").is_dir() for folder in sys.path[:2]):
        name = OLDER_CLASS
    module, _, attribute = name.partition(":")
    inputs = torch.load(folder / "inputs.pt", weights_only=True)
    images, dtype = inputs["images"].to(device), inputs["dtype"]
    model = getattr(importlib.import_module(module), attribute)(**OPTIONS)
    missing, unexpected = model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True, mmap=True)["model"], strict=False)
    if missing or unexpected:
        raise ValueError(f"the weights do not fit {name}: missing {missing[:3]} ... ({len(missing)}), {len(unexpected)} unexpected")
    model = model.to(device).eval()
    low = dtype != torch.float32
    reset_peak(torch.device(device))  # on the CPU, the memory-mapped weights count while they are loaded
    before = peak_bytes(torch.device(device)) if device == "cuda" else 0
    print(f"\n{MARK}ready", flush=True)
    for _ in sys.stdin:
        with torch.no_grad(), torch.autocast(device, dtype if low else torch.bfloat16, enabled=low):
            found = model(images)
        if device == "cuda":
            torch.cuda.synchronize()
        if not (folder / "peak.json").exists():
            torch.save(joined(found).cpu(), folder / "outputs.pt")
            (folder / "peak.json").write_text(json.dumps(peak_bytes(torch.device(device)) - before))
        if device == "cuda":
            torch.cuda.empty_cache()  # otherwise our memory plan would not see the memory cached here
        print(f"\n{MARK}done", flush=True)


if __name__ == "__main__":
    _clone, _name, _device, _folder = sys.argv[1:]
    serve(_clone, _name, _device, Path(_folder))
