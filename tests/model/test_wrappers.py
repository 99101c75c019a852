"""Checkpoints as other programs save them, and configurations with numbers that cannot be."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from page4d import Page4D, Page4DConfig, Prediction
from page4d.errors import CheckpointError, ConfigError, InputError
from page4d.model.checkpoint import BUNDLED, CONFIG_KEY, read_pretrained
from page4d.model.wrappers import PREFIXES, find_state, strip

NANO = BUNDLED["nano"]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return load_file(NANO)


@pytest.fixture(scope="module")
def config() -> Page4DConfig:
    return read_pretrained(NANO)[0]


def load(content: object, path: Path, config: Page4DConfig) -> Page4D:
    torch.save(content, path)
    return Page4D.from_pretrained(path, config=config, device="cpu")


WRAPPERS = {
    "module.": lambda state: {f"module.{key}": value for key, value in state.items()},
    "model.": lambda state: {f"model.{key}": value for key, value in state.items()},
    "_orig_mod.": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "module._orig_mod.": lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    "a compiled part": lambda state: {key.replace("aggregator.", "aggregator._orig_mod."): value for key, value in state.items()},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}},
    "model, EMA and optimizer": lambda state: {
        "ema": {key: value + 1 for key, value in state.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "model": state,
        "step": 7,
        "args": {"lr": 0.1},
    },
    "lightning": lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}, "epoch": 1, "callbacks": {}},
    "numbers beside the weights": lambda state: {**state, "epoch": 3, "name": "run"},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_taken_off_and_named(
    wrapper: str, state, config: Page4DConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(WRAPPERS[wrapper](state), tmp_path / "w.pt", config)
    loaded = model.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], value.float()) for key, value in state.items())
    if "." in wrapper:
        assert f"read without {wrapper!r}" in caplog.text


def test_only_ema_weights_are_taken_and_said(state, config: Page4DConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load({"ema": state, "step": 1}, tmp_path / "w.pt", config)
    assert "weights are taken from the entry 'ema'" in caplog.text


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_prefixes_in_both_formats(suffix: str, state, config: Page4DConfig, tmp_path: Path) -> None:
    wrapped = {f"module.{key}": value for key, value in state.items()}
    path = tmp_path / f"w.{suffix}"
    save_file(wrapped, path) if suffix == "safetensors" else torch.save(wrapped, path)
    assert Page4D.from_pretrained(path, config=config, device="cpu").config == config


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(PREFIXES), max_size=4), st.lists(st.sampled_from(["model", "state_dict", "module"]), max_size=3))
def test_any_nesting_of_wrappers(prefixes: list[str], entries: list[str]) -> None:
    names = ["aggregator.camera_token", "camera_head.a.weight", "depth_head.b"]
    content: dict = {"".join(prefixes) + name: torch.zeros(2) for name in names}
    for entry in entries:
        content = {entry: content, "epoch": 1}
    assert list(strip(find_state(content, "w.pt"), "w.pt")) == names


def refusal(content: object, path: Path, config: Page4DConfig | None = None) -> str:
    torch.save(content, path)
    with pytest.raises(CheckpointError) as error:
        Page4D.from_pretrained(path, config=config, device="cpu")
    assert re.search(r"[\x00-\x1f\x7f]", str(error.value)) is None
    return str(error.value)


def test_advice_is_about_the_names_before_it_is_about_heads(state, tmp_path: Path) -> None:
    """Weights of another model have no mask head either, but that is not what is wrong with them."""
    line = refusal({f"backbone.{key}": value for key, value in state.items()}, tmp_path / "w.pt")
    assert "holds no PAGE-4D or VGGT weights: its names are backbone.aggregator" in line and "mask" not in line


def test_a_whole_module_is_one_line(tmp_path: Path) -> None:
    line = refusal(nn.Linear(2, 2), tmp_path / "w.pt")
    assert "holds pickled Python objects such as a whole module" in line and "save its state_dict() alone" in line


BAD_NUMBERS = [
    ({"embed_dim": 10**9}, "embed_dim must be at most 65536"),
    ({"depth": 10**9}, "depth must be at most 1000"),
    ({"rope_base": 10**400}, "rope_base must be at most"),
    ({"depth_head": {"features": 32, "out_channels": []}}, "depth_head.out_channels must be 4 whole numbers"),
    ({"depth_head": {"features": 32, "out_channels": [32, 64, 96]}}, "depth_head.out_channels must be 4 whole numbers"),
    ({"encoder": None}, "encoder must be of type EncoderConfig"),
    ({"camera": 3}, "camera must be of type CameraHeadConfig"),
    ({"layer_scale": "x"}, "layer_scale must be a finite number"),
    ({"masked_blocks": [0, 1, 2]}, "masked_blocks must be 2 whole numbers"),
    ({"image_size": [1, 2, 3]}, "image_size must be"),
    ({"no_such_field": 1}, "not a model configuration"),
]


def with_config(path: Path, text: str) -> Path:
    save_file(load_file(NANO), path, {"format": "pt", CONFIG_KEY: text})
    return path


@pytest.mark.parametrize(("changes", "words"), BAD_NUMBERS, ids=[str(words) for _, words in BAD_NUMBERS])
def test_numbers_that_cannot_be(changes: dict, words: str, config: Page4DConfig, tmp_path: Path) -> None:
    text = json.dumps(json.loads(config.to_json()) | changes)
    with pytest.raises(CheckpointError) as error:
        Page4D.from_pretrained(with_config(tmp_path / "w.safetensors", text), device="cpu")
    assert words in str(error.value) and len(str(error.value)) < 300


def test_a_number_of_thousands_of_digits(config: Page4DConfig) -> None:
    text = config.to_json().replace('"embed_dim": 128', f'"embed_dim": 1{"0" * 6000}')
    with pytest.raises(ConfigError) as error:
        Page4DConfig.from_json(text)
    assert len(str(error.value)) < 300


def test_deeply_nested_json_is_an_error() -> None:
    with pytest.raises(ConfigError, match="not a model configuration"):
        Page4DConfig.from_json("[" * 10_000 + "]" * 10_000)
    with pytest.raises(ConfigError, match="not a model configuration"):
        Page4DConfig.from_json('{"encoder":' * 10_000 + "1" + "}" * 10_000)


def test_whole_numbers_are_fractions_too(config: Page4DConfig, tmp_path: Path) -> None:
    text = config.replace(layer_scale=1).to_json().replace('"layer_scale": 1.0', '"layer_scale": 1')
    model = Page4D.from_pretrained(with_config(tmp_path / "w.safetensors", text), device="cpu")
    assert isinstance(model.config.layer_scale, float) and isinstance(Page4D(config.replace(layer_scale=1)), Page4D)


@pytest.mark.parametrize(
    ("changes", "words"), [({"depth": 999}, "depth 6 "), ({"embed_dim": 4096, "num_heads": 32}, "embed_dim 128 instead of 4096")]
)
def test_a_configuration_of_another_size_is_refused_before_a_model_is_made(
    changes: dict, words: str, config: Page4DConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Page4D, "__init__", lambda *args: pytest.fail("a model was made"))
    with pytest.raises(CheckpointError, match=words):
        Page4D.from_pretrained(with_config(tmp_path / "w.safetensors", config.replace(**changes).to_json()), device="cpu")


def test_hundreds_of_thousands_of_tensors_are_refused_at_once(tmp_path: Path) -> None:
    header = {f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(300_000)}
    text = json.dumps(header).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4 * len(header)))
    with pytest.raises(CheckpointError, match="holds 300000 tensors, more than any PAGE-4D model has"):
        Page4D.from_pretrained(path, device="cpu")


@pytest.fixture(scope="module")
def nano() -> Page4D:
    return Page4D.from_pretrained("nano", device="cpu")


def test_arrays_whose_meaning_is_plain_are_accepted(nano: Page4D) -> None:
    images = torch.rand(2, 3, 28, 42)
    with torch.inference_mode():
        expected = nano(images)
        assert nano(images.numpy()) == expected and nano(images.numpy()[::-1]) == nano(images.flip(0))
        assert nano(images.numpy().astype(">f4")) == expected and isinstance(nano(images.double().numpy()), Prediction)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.rand(2, 3, 28, 42) * 255, "found values from .* to 25.*: divide them by 255"),
        (torch.randn(2, 3, 28, 42) * 2, "without mean and standard deviation"),
        (torch.full((2, 3, 28, 42), float("nan")), "must be finite"),
        ((torch.rand(2, 3, 28, 42) * 255).byte().numpy(), "must be floating point"),
        (torch.rand(2, 28, 42, 3).numpy(), r"must be \(B, S, 3, H, W\)"),
        (torch.rand(2, 3, 28, 42).to_sparse(), "must be a dense tensor"),
        ("images.png", "must be a tensor or a numpy array, not str"),
        ([[1, 2], [3]], "must be a tensor or a numpy array, not list"),
    ],
    ids=["0 to 255", "normalised", "NaN", "bytes", "channels last", "sparse", "a name", "a ragged list"],
)
def test_arrays_that_cannot_be_images_say_what_was_found(images: object, words: str, nano: Page4D) -> None:
    with pytest.raises(InputError, match=words):
        nano(images)  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.recursive(st.none() | st.integers() | st.floats() | st.text(max_size=5) | st.booleans(), st.lists, max_leaves=4), st.data())
def test_any_value_of_any_field_is_a_configuration_or_an_error(value: object, data: st.DataObject) -> None:
    fields = json.loads(Page4DConfig().to_json())
    name = data.draw(st.sampled_from(sorted(fields)))
    if isinstance(fields[name], dict) and data.draw(st.booleans()):
        fields[name][data.draw(st.sampled_from(sorted(fields[name])))] = value
    else:
        fields[name] = value
    try:
        Page4DConfig.from_json(json.dumps(fields))
    except ConfigError as error:
        assert "\n" not in str(error)
