"""Weights in and out: strict, safe, and in one line when they do not fit."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from page4d import Page4D, preset
from page4d.errors import CheckpointError
from page4d.model import checkpoint
from page4d.model.checkpoint import HUB, compare_keys, save_official, save_pretrained, stored_config

OFFICIAL = Path(__file__).parent / "official_state_dict.txt"
TINY = preset("tiny")


def official_shapes() -> dict[str, tuple[tuple[int, ...], bool]]:
    """Shape and whether VGGT-1B has the key too."""
    lines = [line.split() for line in OFFICIAL.read_text().splitlines() if not line.startswith("#")]
    return {key: (tuple(map(int, shape.split("x"))), not new) for key, shape, *new in lines}


def on_meta(name: str, **changes) -> Page4D:
    with torch.device("meta"):
        return Page4D(preset(name).replace(**changes))


def load(path, **kwargs) -> Page4D:
    return Page4D.from_pretrained(path, device="cpu", **kwargs)


def refuse(path, **kwargs) -> str:
    with pytest.raises(CheckpointError) as error:
        load(path, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_same(model: Page4D, weights: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for key, value in weights.items():
        assert state[key].dtype == torch.float32
        assert (state[key] - value.float()).abs().max() <= tolerance * value.float().abs().max(), key


class TestManifest:
    def test_every_official_key_in_its_shape(self):
        ours = {key: tuple(value.shape) for key, value in on_meta("page4d").state_dict().items()}
        official = {key: shape for key, (shape, _) in official_shapes().items()}
        assert len(ours) == 1803 and sum(torch.Size(shape).numel() for shape in ours.values()) == 1256810413
        assert ours == official

    def test_files_without_track_head(self):
        keys = [key for key in official_shapes() if not key.startswith("track_head.")]
        assert sorted(on_meta("page4d", track=None).state_dict()) == sorted(keys) and len(keys) == 1409

    def test_vggt_lacks_the_six_keys_of_the_mask_head(self):
        keys = [key for key, (_, in_vggt) in official_shapes().items() if in_vggt]
        assert sorted(on_meta("vggt").state_dict()) == sorted(keys) and len(keys) == 1797

    def test_parameters_of_the_fine_tuned_part(self):
        aggregator = on_meta("page4d").aggregator
        parts = [*aggregator.frame_blocks[10:20], *aggregator.global_blocks[10:20], aggregator.spatial_mask_head]
        assert sum(p.numel() for part in parts for p in part.parameters()) == 252243457

    def test_only_the_unused_token_needs_no_gradient(self):
        frozen = [name for name, p in on_meta("page4d").named_parameters() if not p.requires_grad]
        assert frozen == ["aggregator.patch_embed.mask_token"]


class TestRoundTrip:
    def test_safetensors_carries_its_configuration(self, tiny, golden_weights, tmp_path):
        path = save_pretrained(tiny, tmp_path / "tiny.safetensors")
        model = load(path)
        assert model.config == TINY
        assert_same(model, golden_weights)
        assert os.listdir(tmp_path) == ["tiny.safetensors"]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_files(self, tiny, golden_weights, tmp_path, dtype):
        path = save_pretrained(tiny, tmp_path / "tiny.safetensors", dtype)
        assert_same(load(path), golden_weights, torch.finfo(dtype).eps)

    @pytest.mark.parametrize("wrapped", [True, False], ids=["under model", "bare"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_official_files(self, golden_weights, tmp_path, wrapped, dtype):
        state = {key: value.to(dtype) for key, value in golden_weights.items()}
        extra = {"prev_epoch": 3, "steps": {"train": 7}, "time_elapsed": 1.5}
        torch.save({"model": state, **extra} if wrapped else state, tmp_path / "w.pt")
        assert_same(load(tmp_path / "w.pt", config=TINY), state)

    def test_old_torch_format(self, golden_weights, tmp_path):
        torch.save({"model": golden_weights}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
        assert_same(load(tmp_path / "w.pt", config=TINY), golden_weights)

    def test_back_to_the_official_code(self, tiny, golden_weights, tmp_path):
        path = save_official(tiny.set_compute_dtype(torch.float64), tmp_path / "w.pt")
        content = torch.load(path, weights_only=True)
        assert list(content) == ["model"]
        assert all(torch.equal(content["model"][key], value) for key, value in golden_weights.items())
        assert_same(load(path, config=TINY), golden_weights)

    def test_outputs_survive(self, tiny, tmp_path):
        images = torch.rand(2, 3, 28, 28)
        loaded = load(save_pretrained(tiny, tmp_path / "tiny.safetensors"))
        with torch.no_grad():
            assert torch.equal(loaded(images).depth, tiny(images).depth)
        assert loaded.training is False

    def test_dtype_of_the_trunk(self, tiny, tmp_path):
        model = load(save_pretrained(tiny, tmp_path / "tiny.safetensors"), dtype=torch.bfloat16)
        assert model.aggregator.frame_blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
        assert model.camera_head.pose_branch.fc1.weight.dtype == torch.float32

    def test_a_failed_save_leaves_the_old_file(self, tiny, tmp_path, monkeypatch):
        path = save_official(tiny, tmp_path / "w.pt")
        before = path.read_bytes()

        def fail(state, file):
            Path(file).write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            save_official(tiny, path)
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["w.pt"]

    def test_suffix(self, tiny, tmp_path):
        with pytest.raises(CheckpointError, match=r"end in \.safetensors"):
            save_pretrained(tiny, tmp_path / "tiny.bin")


class TestHeadsThatAreAbsent:
    def test_no_track_head_switches_tracking_off(self, golden_weights, tmp_path):
        torch.save({k: v for k, v in golden_weights.items() if not k.startswith("track_head.")}, tmp_path / "w.pt")
        model = load(tmp_path / "w.pt", config=TINY)
        assert model.track_head is None and model.config.track is None
        with pytest.raises(ValueError, match="no track head"):
            model(torch.rand(1, 3, 140, 140), torch.zeros(1, 2))

    def test_half_a_track_head_is_an_error(self, golden_weights, tmp_path):
        state = {k: v for k, v in golden_weights.items() if not k.startswith("track_head.tracker.updateformer")}
        torch.save(state, tmp_path / "w.pt")
        assert "missing (track_head.*" in refuse(tmp_path / "w.pt", config=TINY)

    def test_vggt_files_have_no_mask(self, golden_weights, tmp_path):
        save_file({k: v for k, v in golden_weights.items() if "spatial_mask_head" not in k}, tmp_path / "w.safetensors")
        model = load(tmp_path / "w.safetensors", config=TINY.replace(mask_strength=0.0))
        assert model.aggregator.spatial_mask_head is None and "mask" not in model.available
        assert "no mask head" in refuse(tmp_path / "w.safetensors", config=TINY)

    def test_a_mask_head_nobody_wants(self, golden_weights, tmp_path):
        torch.save(golden_weights, tmp_path / "w.pt")
        assert "mask_hidden" in refuse(tmp_path / "w.pt", config=TINY.replace(mask_hidden=None, mask_strength=0.0))


class TestErrors:
    def test_keys_that_do_not_fit_are_grouped(self, golden_weights, tmp_path):
        state = dict(golden_weights)
        for key in [key for key in state if key.startswith("camera_head.trunk.0")]:
            del state[key]
        state["depth_head.norm.weight"] = torch.zeros(7)
        state["adapter.lora.weight"] = torch.zeros(1)
        torch.save(state, tmp_path / "w.pt")
        message = refuse(tmp_path / "w.pt", config=TINY)
        assert "14 missing (camera_head.* 14): camera_head.trunk.0.norm1.weight, " in message
        assert "1 unexpected (adapter.* 1): adapter.lora.weight" in message
        assert "1 mis-shaped (depth_head.* 1): depth_head.norm.weight: (7,) instead of (256,)" in message

    def test_report_of_a_fit(self, tiny, golden_weights):
        report = compare_keys(tiny, golden_weights)
        assert report.fits and str(report) == "all keys fit"

    def test_wrong_size_of_model(self, golden_weights, tmp_path):
        torch.save(golden_weights, tmp_path / "w.pt")
        assert "instead of" in refuse(tmp_path / "w.pt", config=preset("small"))

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    @pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.999])
    def test_truncated(self, tiny, tmp_path, suffix, keep):
        path = (save_official if suffix == ".pt" else save_pretrained)(tiny, tmp_path / f"w{suffix}")
        content = path.read_bytes()
        path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
        assert "w" + suffix in refuse(path, config=TINY)

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    @pytest.mark.parametrize("content", [b"not weights\n", b"PK\x03\x04garbage", b"\x80\x04N.", b"\x00" * 64, b"\xff" * 64])
    def test_something_else(self, tmp_path, suffix, content):
        path = tmp_path / f"w{suffix}"
        path.write_bytes(content)
        assert path.name in refuse(path)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_pickled_code_is_not_executed(self, tmp_path, zipped):
        proof = tmp_path / "executed"

        class Payload:
            def __reduce__(self):
                return os.mkdir, (str(proof),)

        if zipped:
            torch.save({"model": Payload()}, tmp_path / "w.pt")
        else:
            (tmp_path / "w.pt").write_bytes(pickle.dumps({"model": Payload()}))
        assert "not executed" in refuse(tmp_path / "w.pt")
        assert not proof.exists()

    @pytest.mark.parametrize("content", [{}, {"model": {}}, {"model": {"a": 1}}, torch.zeros(3), [1, 2]])
    def test_no_state_dict(self, tmp_path, content):
        torch.save(content, tmp_path / "w.pt")
        assert "holds no state dict" in refuse(tmp_path / "w.pt")

    @pytest.mark.parametrize(
        "state",
        [{3: torch.zeros(1)}, {"a": torch.zeros(1, dtype=torch.int64)}, {"a": torch.zeros(1, dtype=torch.complex64)}],
        ids=["key", "integers", "complex"],
    )
    def test_no_floating_point_weights(self, tmp_path, state):
        torch.save(state, tmp_path / "w.pt")
        assert "not a named floating-point weight" in refuse(tmp_path / "w.pt")

    def test_missing_file_and_folder(self, tmp_path):
        assert "does not exist" in refuse(tmp_path / "w.pt")
        assert "is a directory" in refuse(tmp_path)
        assert "page4d-mask" in refuse("pag4d")
        assert "random:small" in refuse("small")

    def test_damaged_configuration(self, tmp_path):
        save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors", {"page4d_config": "{"})
        assert "not a model configuration" in refuse(tmp_path / "w.safetensors")


class TestBundled:
    def test_nano(self):
        """Small enough to travel with the source: at most 12 M parameters in 24 MB. It says what it was trained for."""
        assert stored_config("nano") == preset("nano") == load("nano").config
        assert sum(p.numel() for p in load("nano").parameters()) == 4_287_909
        assert checkpoint.BUNDLED["nano"].stat().st_size < 10e6

    def test_an_installation_without_it(self, monkeypatch, tmp_path):
        monkeypatch.setitem(checkpoint.BUNDLED, "nano", tmp_path / "nano.safetensors")
        assert "missing from this installation; install page4d again" in refuse("nano")

    def test_what_a_file_says_without_being_read(self, tiny, golden_weights, tmp_path):
        save_pretrained(tiny, tmp_path / "w.safetensors")
        save_official(tiny, tmp_path / "w.pt")
        assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "w.pt").stat().st_mode
        save_file(golden_weights, tmp_path / "other.safetensors")
        assert stored_config(tmp_path / "w.safetensors") == tiny.config and stored_config("vggt") == preset("vggt")
        assert stored_config(tmp_path / "w.pt") is None and stored_config(tmp_path / "other.safetensors") is None
        (tmp_path / "w.safetensors").write_bytes(b"broken")
        with pytest.raises(CheckpointError, match="may be truncated"):
            stored_config(tmp_path / "w.safetensors")


class TestHub:
    def test_names(self, golden_weights, tmp_path, monkeypatch):
        """The real download function gets these arguments; the file it would fetch is made here."""
        asked = []

        def download(repository, filename, repo_type):
            asked.append((repository, filename, repo_type))
            drop = ("track_head",) if "PAGE4D" in repository else ("spatial_mask_head",)
            state = {k: v for k, v in golden_weights.items() if not any(name in k for name in drop)}
            path = tmp_path / filename
            save_file(state, path) if path.suffix == ".safetensors" else torch.save({"model": state}, path)
            return str(path)

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        tiny = {"page4d": TINY.replace(mask_strength=0.0), "page4d-mask": TINY, "vggt": TINY.replace(mask_strength=0.0, mask_hidden=None)}
        models = {name: load(name, config=config) for name, config in tiny.items()}
        assert asked == [
            ("zhouk777/PAGE4D", "checkpoint_nomask.pt", "dataset"),
            ("zhouk777/PAGE4D", "checkpoint_mask.pt", "dataset"),
            ("facebook/VGGT-1B", "model.safetensors", "model"),
        ]
        assert [model.config.mask_strength for model in models.values()] == [0.0, 64.0, 0.0]
        assert models["vggt"].track_head is not None and models["page4d"].track_head is None

    def test_no_connection(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        for name, file in HUB.items():
            message = refuse(name)
            assert file.repository in message and "download the file and give its path" in message
