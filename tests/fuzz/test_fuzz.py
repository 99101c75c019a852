"""Random metadata, checkpoints and command lines: they work or end in one line, never in a traceback.

A few cases run with the suite. `pytest tests/fuzz --full-fuzz` runs all: 3 000 EXIF blocks, 1 000 checkpoints, 500 command lines.
"""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from page4d import Page4D
from page4d.cli.main import COMMANDS, main
from page4d.data import load_frames
from page4d.errors import CheckpointError
from page4d.model.checkpoint import BUNDLED, CONFIG_KEY, stored_config

FULL = {"exif": 3000, "checkpoint": 1000, "command": 500}
FEW = {"exif": 100, "checkpoint": 60, "command": 60}


@pytest.fixture
def seeds(request: pytest.FixtureRequest):
    counts = FULL if request.config.getoption("--full-fuzz") else FEW
    return lambda kind: [random.Random(seed) for seed in range(counts[kind])]


def random_exif(generator: random.Random) -> bytes:
    """A TIFF block: usual tags of unusual types, counts and offsets, sometimes cut off or with flipped bytes."""
    order = generator.choice("<>")
    tags = [
        0x100,
        0x101,
        0x10F,
        0x110,
        0x112,
        0x11A,
        0x11B,
        0x128,
        0x131,
        0x132,
        0x201,
        0x8769,
        0x8825,
        0x927C,
        0xA002,
        0xA005,
        700,
        0x8773,
    ]
    rows = b""
    count = generator.randrange(9)
    for _ in range(count):
        tag = generator.choice([*tags, generator.randrange(65536)])
        size = generator.choice([0, 1, 2, 4, 100, 1 << 16, (1 << 32) - 1])
        rows += struct.pack(order + "HHII", tag, generator.randrange(16), size, generator.choice([6, 8, 100, (1 << 32) - 1]))
    block = struct.pack(order + "2sHIH", b"II" if order == "<" else b"MM", 42, 8, count) + rows + bytes(4) + generator.randbytes(40)
    data = bytearray(b"Exif\0\0" + block)
    for _ in range(generator.choice([0, 0, 1, 5])):
        data[generator.randrange(len(data))] = generator.randrange(256)
    return bytes(data[: generator.choice([len(data), len(data), generator.randrange(6, len(data))])])


def test_exif(seeds, tmp_path: Path) -> None:
    """Every photo that decodes is read, whatever its metadata says."""
    for generator in seeds("exif"):
        path = tmp_path / f"a.{generator.choice(['jpg', 'png', 'webp'])}"
        Image.new("RGB", (16, 16)).save(path, exif=random_exif(generator))
        assert load_frames([path], size=(14, 14)).images.shape == (1, 3, 14, 14)


def damaged(data: bytes, generator: random.Random) -> bytes:
    """Flipped bits, a cut tail, a header that lies about lengths, or numbers of its text replaced."""
    result = bytearray(data)
    kind = generator.choice(["bits", "header bits", "cut", "length", "numbers"])
    if kind == "cut":
        return bytes(result[: generator.randrange(len(result))])
    if kind == "length":
        place = generator.randrange(min(64, len(result) - 8))
        result[place : place + 8] = generator.randbytes(8)
    if kind == "numbers":
        head = bytes(result[:4000])
        digits = [i for i in range(len(head)) if chr(head[i]).isdigit()]
        for place in generator.sample(digits, min(len(digits), generator.randrange(1, 6))):
            result[place] = ord(generator.choice("0123456789-.e"))
    for _ in range(generator.randrange(1, 20) if "bits" in kind else 0):
        place = generator.randrange(min(len(result), 6000) if kind == "header bits" else len(result))
        result[place] ^= 1 << generator.randrange(8)
    return bytes(result)


def random_configuration(config: dict, generator: random.Random) -> str:
    """The configuration with up to three values of other kinds."""
    values = [-1, 0, 1, 3, 10**9, 10**40, 1.5, 1e308, True, None, "x", [], [1], [0, 1, 2, 3], {}, {"depth": 2}]
    changed = json.loads(json.dumps(config))
    for _ in range(generator.randrange(1, 4)):
        part = generator.choice([changed, *(value for value in changed.values() if isinstance(value, dict))])
        if part:
            part[generator.choice(sorted(part))] = generator.choice(values)
    return json.dumps(changed)


def test_checkpoints(seeds, tmp_path: Path) -> None:
    small = {key: value[:1].clone() if value.dim() else value for key, value in load_file(BUNDLED["nano"]).items()}
    config = stored_config("nano")
    assert config is not None
    stored = json.loads(config.to_json())
    torch.save({"model": small}, tmp_path / "small.pt")
    pickled = (tmp_path / "small.pt").read_bytes()
    for generator in seeds("checkpoint"):
        suffix = generator.choice([".safetensors", ".safetensors", ".pt"])
        path = tmp_path / f"w{suffix}"
        if suffix == ".pt":
            path.write_bytes(damaged(pickled, generator))
        else:
            text = random_configuration(stored, generator) if generator.random() < 0.5 else config.to_json()
            save_file(small, path, {"format": "pt", CONFIG_KEY: text})
            if generator.random() < 0.6:
                path.write_bytes(damaged(path.read_bytes(), generator))
        try:
            Page4D.from_pretrained(path, device="cpu")
        except CheckpointError as error:
            assert "\n" not in str(error) and str(error).isprintable()


WORDS = [
    "",
    "-",
    "--",
    "x",
    "no such file.mp4",
    "*.png",
    "http://a/b",
    "0",
    "-1",
    "1e9",
    "9" * 400,
    "nan",
    "14x14",
    "28x30",
    "a,b",
    "1,2",
    "\udcff",
    "é",
]
OPTIONS = {
    "infer": ["--weights", "--out", "--frames", "--stride", "--fps", "--size", "--fit", "--range", "--device", "--dtype", "--memory-budget",
              "--attn", "--mask-strength", "--attention", "--attention-check", "--export",
              "--query-points", "--track-grid", "--chunk", "--resume", "--no-loops", "--cameras", "--view", "--nonsense"],
    "view": ["--save", "--port", "--host", "--no-open", "--moving", "--confidence", "--fps", "--points", "--nonsense"],
    "eval": ["--weights", "--tasks", "--frames", "--sequences", "--size", "--align", "--seed", "--mask-strength", "--chunk", "--no-loops",
             "--device", "--dtype"],
    "preview": ["--kind", "--sequences", "--frames", "--size", "--seed", "--motion-blur", "--noise"],
    "train": ["--resume", "--device"],
    "info": ["--nonsense"],
    "qualify": ["--op", "--backend", "--device", "--dtypes", "--head-dims", "--seconds", "--seed", "--import", "--nonsense"],
    "bench": ["--nonsense", "nothing"],
}  # fmt: skip


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.new("RGB", (28, 28)).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def test_command_lines(seeds, picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Options that are valid but slow are left to other tests: the model never runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Page4D, "forward", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr("page4d.data.synthetic.dataset.SyntheticScenes.__getitem__", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr("page4d_kernels.qualify.__main__.qualify", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
    for generator in seeds("command"):
        name = generator.choice(sorted(COMMANDS))
        arguments = [name]
        if name == "infer" and generator.random() < 0.7:
            arguments.append(picture)
        for _ in range(generator.randrange(1, 4)):
            arguments.append(generator.choice(OPTIONS[name]))
            if generator.random() < 0.8:
                arguments.append(generator.choice(WORDS))
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        assert code in (0, 2, 130), (arguments, printed.err)
        if code == 2:
            lines = [line for line in printed.err.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1 and printed.err.rstrip().endswith(lines[0]) and len(lines[0]) < 1000, (arguments, printed.err)
