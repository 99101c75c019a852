"""`import page4d` stays light and needs neither CUDA nor Triton."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_without_triton_and_cuda():
    code = "import sys; sys.modules['triton'] = None; import torch; torch.cuda.is_available = lambda: False; import page4d, page4d_kernels"
    python(code)


def test_import_loads_nothing_heavy_beyond_torch():
    heavy = ["triton", "av", "PIL", "huggingface_hub", "matplotlib", "flash_attn", "xformers", "page4d.cli", "page4d.export"]
    loaded = python("import torch, sys; before = set(sys.modules); import page4d; print(*(set(sys.modules) - before))").split()
    assert "page4d.model" in loaded and not set(heavy) & set(loaded)


def test_an_operator_does_not_load_the_compiler():
    code = """
import sys, torch, page4d_kernels
x = torch.ones(1, 1, 4, 8, requires_grad=True)
out = page4d_kernels.mask_attention(x, x, x, backend="chunked")
out.sum().backward()
print("torch._dynamo" in sys.modules)
"""
    assert python(code) == "False"


def test_versions_agree():
    (declared,) = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert python("import page4d; print(page4d.__version__)") == declared


def test_every_environment_variable_is_in_the_table():
    from page4d_kernels.env import VARIABLES

    used = set()
    for path in [*ROOT.glob("page4d*/**/*.py"), *ROOT.glob("*.py")]:
        for word in path.read_text().replace('"', " ").replace("`", " ").replace("=", " ").replace(",", " ").replace(")", " ").split():
            if word.startswith("PAGE4D_") and word.isupper():
                used.add(word.rstrip(".:;"))
    assert used and used <= set(VARIABLES), used - set(VARIABLES)
