"""The model on several ranks against one process: golden cases, nano on the bundled clip, what is refused."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from page4d import Page4D, preset
from page4d.data import bundled_clip, load_frames
from page4d.errors import InputError, RankError
from page4d.execution.across import shares
from page4d.execution.ranks import Ranks
from page4d_kernels import use_backend
from page4d_kernels.testing import assert_within_budget

MODEL_TESTS = Path(__file__).parents[1] / "model"
GOLDEN = ["mask_84x126_s3", "mask_140x154_s2", "nomask_84x126_s3"]


@functools.cache
def golden_model():
    spec = importlib.util.spec_from_file_location("golden_conftest", MODEL_TESTS / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = Page4D(preset("tiny")).eval()
    model.load_state_dict({key: module.golden_parameter(key, value.shape) for key, value in model.state_dict().items()})
    return model


@functools.cache
def nano():
    return Page4D.from_pretrained("nano", device="cpu")


@functools.cache
def clip(frames):
    return load_frames([bundled_clip()], size=(112, 154), max_frames=frames).images


@functools.cache
def random_model(heads=4, dim=256):
    torch.manual_seed(3)
    config = preset("small").replace(num_heads=heads, point_head=None)
    model = Page4D(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.3)
            elif parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def own(images, group, dim):
    """This rank's frames."""
    return images.split(shares(images.shape[dim], group.size()), dim)[group.rank()]


def numbers(prediction):
    return {name: value.detach() for name, value in prediction.tensors().items()}


def together(parts):
    """The predictions of all ranks as one."""
    joined = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name in ("query_points", "attention_deviation"):
            assert all(torch.equal(value, values[0]) for value in values)
            joined[name] = values[0]
        else:
            joined[name] = torch.cat(values, 2 if name.endswith("_list") else 1)
    return joined


def run_golden(group, name, gradients):
    with np.load(MODEL_TESTS / "golden" / f"{name}.npz") as file:
        images, points = (torch.from_numpy(file[key]) if key in file.files else None for key in ("images", "query_points"))
    strength = 0.0 if name.startswith("nomask") else 64.0
    with torch.set_grad_enabled(gradients), use_backend("chunked" if gradients else "sdpa" if group.size() < 3 else "cpu"):
        return numbers(golden_model()(own(images, group, 1), points, mask_strength=strength, group=group))


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize(("ranks", "gradients"), [(1, False), (2, False), (2, True), (3, False), (3, True)])
def test_golden_cases(team, name, ranks, gradients):
    """Two heads: two ranks exchange heads, three pass keys round. With tracks, if the case has points."""
    with np.load(MODEL_TESTS / "golden" / f"{name}.npz") as file:
        if file["images"].shape[1] < ranks:
            pytest.skip("fewer frames than ranks")
        golden = {key: file[key] for key in file.files}
    found = together(team.run(ranks, run_golden, name, gradients))
    compared = [key for key in found if f"noise/{key}" in golden]
    assert len(compared) >= 5
    for key in compared:
        error = float((found[key].double() - torch.from_numpy(golden[key]).double()).abs().max())
        assert error <= 10 * float(golden[f"noise/{key}"]), key


def run_nano(group, frames, options):
    with torch.no_grad():
        return numbers(nano()(own(clip(frames), group, 0), group=group, **options))


@pytest.fixture(scope="module")
def oracle():
    """One process in fp64 and in fp32, on the clip."""

    @functools.cache
    def compute(frames, dtype, strength, attention):
        model = Page4D.from_pretrained("nano", device="cpu", dtype=dtype).to(dtype)
        with torch.no_grad():
            return numbers(model(clip(frames).to(dtype), mask_strength=strength, attention=attention))

    return compute


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("strength", "attention"), [(None, None), (0.0, None), (None, "balanced"), (None, "2x2")], ids=str)
def test_nano_on_the_bundled_clip(team, oracle, ranks, strength, attention):
    """Seven frames are not divisible by any number of ranks. Three ranks pass keys round, two and four exchange heads."""
    found = together(team.run(ranks, run_nano, 7, {"mask_strength": strength, "attention": attention}))
    exact, plain = (oracle(7, dtype, strength, attention) for dtype in (torch.float64, torch.float32))
    for name in ("pose_enc", "depth", "depth_conf", "mask"):
        assert_within_budget(name, found[name], exact[name], plain[name])
    if attention:
        torch.testing.assert_close(found["attention_deviation"], plain["attention_deviation"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("ranks", "backend"), [(2, "cpu"), (2, "sdpa"), (2, "chunked"), (2, "reference"), (4, "cpu"), (4, "sdpa")])
def test_bit_equal(team, ranks, backend):
    """One frame at a time, every matrix product has the same shape. Then all outputs of all-to-all are those of one process, bit by bit,
    with the backends whose result per head does not depend on the number of heads: cpu, sdpa. Those of chunked and reference do not on
    more than one head: for a single one, torch calls another matrix product.
    """
    images = torch.rand(1, 5, 3, 56, 84)
    (alone,) = team.run(1, run_bits, images, backend)
    found = together(team.run(ranks, run_bits, images, backend))
    differ = [name for name, value in found.items() if not torch.equal(value, alone[name])]
    assert not differ


def run_bits(group, images, backend):
    with use_backend(backend):
        return run_random(group, images, 4, {"memory_budget": 0, "mask_strength": 8.0})


def run_random(group, images, heads, options):
    with torch.no_grad():
        return numbers(random_model(heads)(own(images, group, 1), group=group, **options))


@pytest.mark.parametrize(("ranks", "heads"), [(2, 4), (3, 4), (4, 2), (4, 4)], ids=str)
@pytest.mark.parametrize("attention", [None, "balanced"])
@pytest.mark.parametrize("frames", [4, 9])
def test_two_sequences_and_a_mixture(team, ranks, heads, attention, frames):
    """B = 2. Four ranks with two heads: all-to-all between two, in rings of two. Four frames: one per rank."""
    images = torch.rand(2, frames, 3, 56, 84)
    options = {"mask_strength": 8.0, "attention": attention}
    with torch.no_grad():
        whole = numbers(random_model(heads)(images, **options))
    found = together(team.run(ranks, run_random, images, heads, options))
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def run_on_nodes(group, images, sizes):
    os.environ["LOCAL_WORLD_SIZE"] = str(sizes[group.rank()])
    Ranks.of(group, images.device).traffic.clear()
    try:
        found = run_random(group, images, 4, {"mask_strength": 8.0})
        return found, {kind for kind, traffic in Ranks.of(group, images.device).traffic.items() if traffic.exchanges}
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]


@pytest.mark.parametrize(("sizes", "rings"), [([2, 2, 2, 2], True), ([3, 3, 3, 1], True), ([4, 4, 4, 4], False)], ids=str)
def test_rings_go_between_nodes(team, sizes, rings):
    """Four heads: all-to-all of four ranks on one node, of two on two nodes; nodes of three and one have no number in common."""
    images = torch.rand(1, 5, 3, 56, 84)
    with torch.no_grad():
        whole = numbers(random_model(4)(images, mask_strength=8.0))
    parts = team.run(4, run_on_nodes, images, sizes)
    found = together([part for part, _ in parts])
    assert all(("ring" in kinds) == rings for _, kinds in parts)
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def run_low(group, images):
    model = Page4D.from_pretrained("nano", device="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        return numbers(model(own(images, group, 0), group=group, memory_budget=0))


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_trunk_in_bf16(team, ranks, oracle):
    (alone,) = team.run(1, run_low, clip(4))
    found = together(team.run(ranks, run_low, clip(4)))
    exact = oracle(4, torch.float64, None, None)
    for name in ("pose_enc", "depth", "mask"):
        assert_within_budget(name, found[name], exact[name], alone[name])


def run_on_gpus(group, images, backend):
    size, rank = group.size(), group.rank()
    if backend == "nccl":
        torch.cuda.set_device(rank)
        group = dist.new_group(list(range(size)), backend="nccl", use_local_synchronization=True)
    device = torch.device("cuda", rank % torch.cuda.device_count())
    model = Page4D.from_pretrained("nano", device=device, dtype=torch.float32)
    with torch.no_grad():
        return {name: value.cpu() for name, value in numbers(model(own(images, group, 0).to(device), group=group)).items()}


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_on_gpus(team, oracle, ranks, backend):
    """gloo also on a single one; nccl wants one for each process."""
    if backend == "nccl" and torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} GPUs are needed")
    found = together(team.run(ranks, run_on_gpus, clip(7), backend))
    exact = oracle(7, torch.float64, None, None)
    model = Page4D.from_pretrained("nano", device="cuda", dtype=torch.float32)
    with torch.no_grad():
        plain = numbers(model(clip(7).cuda()))
    for name in ("pose_enc", "depth", "mask"):
        assert_within_budget(name, found[name], exact[name], plain[name].cpu())


# --- what is refused ------------------------------------------------------------------------------------------------------------------


def refused(group, kind):
    """What this rank raises, and what the next pass gives."""
    rank, model = group.rank(), nano()
    images, options = clip(4)[rank : rank + 1], {}
    if kind == "size":
        images = images[..., : 112 - 14 * rank, :]
    elif kind == "strength":
        options = {"mask_strength": 1.0 + rank}
    elif kind == "plan":
        options = {"attention": "balanced" if rank else None}
    elif kind == "array":
        images = images.numpy() if rank else images.numpy()[:0]
    elif kind == "dtype" and rank == 1:
        model = Page4D.from_pretrained("nano", device="cpu", dtype=torch.bfloat16)
    elif kind == "backend":
        os.environ["LOCAL_WORLD_SIZE"] = "1"  # rings between nodes
    elif kind == "frames" and rank == 1:
        images = images[:0]
    elif kind == "values" and rank == 1:
        images = images * torch.nan
    elif kind == "outputs" and rank == 0:
        options = {"outputs": ["nonsense"]}
    try:
        with torch.no_grad(), use_backend({"backend": "sdpa", "attn": "auto" if rank else "chunked"}.get(kind, "auto")):
            model(images, group=group, **options)
        problem = None
    except (InputError, RankError) as error:
        problem = f"{type(error).__name__}: {error}"
    os.environ.pop("LOCAL_WORLD_SIZE", None)
    with torch.no_grad():
        nano()(clip(4)[rank : rank + 1], group=group)
    return problem


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("size", "InputError: all ranks of a group need the same image size: rank 0 has [112, 154], rank 1 has [98, 154]", None),
        ("strength", "InputError: all ranks of a group need the same mask_strength: rank 0 has 1.0, rank 1 has 2.0", None),
        ("plan", "InputError: all ranks of a group need the same attention plan: rank 0 has None, rank 1 has {", None),
        ("dtype", "InputError: all ranks of a group need the same dtype of the trunk: rank 0 has torch.float32, rank 1 has torch.bf", None),
        ("array", "InputError: rank 0 has no frame: give each rank", "RankError: rank 0 has no frame: give each rank"),
        ("attn", "InputError: all ranks of a group need the same attention backend: rank 0 has chunked, rank 1 has auto", None),
        ("frames", "RankError: rank 1 has no frame: give each rank", "InputError: rank 1 has no frame: give each rank"),
        (
            "backend",
            "InputError: 2 ranks are a ring of 2 ranks, and backend 'sdpa' cannot serve rings (it does not return the log-sum",
            None,
        ),
        ("values", "RankError: rank 1: images must be finite", "InputError: images must be finite"),
        ("outputs", "InputError: unknown output 'nonsense'", "RankError: rank 0: unknown output 'nonsense'"),
    ],
)
def test_what_does_not_fit_is_refused_on_all_ranks(team, kind, first, second):
    """In words, before anything is exchanged; the group can be used after it."""
    found = team.run(2, refused, kind)
    assert found[0].startswith(first) and found[1].startswith(second or first), found


def without_backend(group):
    try:
        Ranks(group, torch.device("mps"))
    except InputError as error:
        return str(error)


def test_a_group_without_a_backend_for_the_device(team):
    assert (
        team.run(2, without_backend)
        == ["the process group (cpu:gloo,cuda:gloo) has no backend for mps: use nccl for cuda, gloo for cpu"] * 2
    )
