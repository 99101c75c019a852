from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("benchmarks", reason="the benchmarks belong to the repository, not to the package")

from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as command
from benchmarks import cases as data
from benchmarks import formulas, measure, official, report
from benchmarks import model as whole
from benchmarks.bandwidth_ops import BANDWIDTH_OPS
from page4d.config import preset
from page4d.execution.attention_plan import AttentionPlan
from page4d.model import Page4D
from page4d_kernels import use_backend
from page4d_kernels.profiling import peak_bytes

DIRECTIONS = ("forward", "backward")
SMALL = [data.Case(op, direction, 1, torch.float32, heads=2) for op in ("mask_head", "qk_norm_rope") for direction in DIRECTIONS]
LIMITS = {"matrix_flops_bfloat16": 1e12, "matrix_flops_float32": 1e11, "copy_bytes": 1e10, "exp2": 1e9}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(command, "limits", lambda device: LIMITS)


def test_every_case_has_a_unique_name_and_variants():
    names = [case.name for case in data.cases()]
    assert len(set(names)) == len(names)
    for case in data.cases():
        assert any(variant.name in ("sdpa", "reference", "official arithmetic") for variant in data.variants(case, "cpu"))


def test_attention_variants_include_the_official_arithmetic_and_the_dense_bias():
    case = data.Case("mask_attention", "forward", 2, torch.bfloat16)
    assert {"torch sdpa without mask", "sdpa", "sdpa_augmented", "torch sdpa, dense bias"} <= {v.name for v in data.variants(case, "cpu")}
    long = dataclasses.replace(case, frames=100)
    assert "torch sdpa, dense bias" not in {v.name for v in data.variants(long, "cpu")}


def test_formulas():
    """16 heads of 64 channels, 8 930 tokens: 0.327 TFLOP forward, 2.5 times that backward."""
    assert formulas.attention_flops(1, 16, 8930, 8930, 64, "forward") == pytest.approx(0.3266e12, rel=1e-3)
    assert formulas.attention_flops(1, 16, 8930, 8930, 64, "backward") == pytest.approx(0.8166e12, rel=1e-3)


def test_work_of_the_bandwidth_ops():
    """One frame of 893 tokens, 888 of them patches, with 16 heads of 64 channels in bf16."""

    def work(op, direction):
        return data.Case(op, direction, 1, torch.bfloat16).work()

    assert work("mask_head", "forward") == {"bytes": 2 * 888 * 2048, "flops": 2 * 888 * (1024 * 256 + 9 * 1024 + 256)}
    assert work("mask_head", "backward")["flops"] == 3 * work("mask_head", "forward")["flops"]
    assert work("qk_norm_rope", "forward") == {"bytes": 4 * 893 * 2048}
    assert work("qk_norm_rope", "backward") == {"bytes": 7 * 893 * 2048}
    assert work("residual_norm", "forward") == {"bytes": 893 * 1024 * (2 * 4 + 2 * 2)}
    assert work("residual_norm", "backward") == {"bytes": 893 * 1024 * (3 * 4 + 3 * 2)}


def test_a_new_bandwidth_op_needs_one_entry(monkeypatch):
    """With one entry in the table the op has cases, variants, work and a gate."""
    monkeypatch.setitem(BANDWIDTH_OPS, "new_op", BANDWIDTH_OPS["residual_norm"])
    assert {case.direction for case in data.cases() if case.op == "new_op"} == {"forward", "backward"}
    rows = command.measure(data.Case("new_op", "forward", 1, torch.float32, heads=2), "cpu", 0.0, LIMITS)
    assert "reference" in {row["variant"] for row in rows} and all(row["median"] > 0 and row["unit"] == "bytes" for row in rows)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_rows(case):
    rows = command.measure(case, "cpu", 0.0, LIMITS)
    for row in rows:
        assert row["reason"] == "" and row["lower"] <= row["median"] <= row["upper"] and row["calls"] == 3
        assert row["rate"] == pytest.approx(case.work()[row["unit"]] / row["median"])
        ceilings = case.ceilings(LIMITS)
        assert row["of_limit"] == pytest.approx(max(work / ceilings[unit] for unit, work in case.work().items()) / row["median"])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_wrong_variant_is_not_timed(direction, monkeypatch):
    """One variant drops the mask, another is 1 % off."""
    case = data.Case("mask_attention", direction, 1, torch.float32, heads=1)
    ours = data.Variant("ours", lambda inputs: data.page4d_attention(inputs, "sdpa"))
    dropped = data.Variant(
        "dropped", lambda inputs: data.page4d_attention_without_mask(inputs, "sdpa") + 0 * inputs.query_gate.sum() * inputs.key_bias.sum()
    )
    off = data.Variant("off", lambda inputs: data.page4d_attention(inputs, "sdpa") * 1.01)
    monkeypatch.setattr(command, "variants", lambda case, device: [ours, dropped, off])
    rows = {row["variant"]: row for row in command.measure(case, "cpu", 0.0, LIMITS)}
    assert "median" in rows["ours"] and "is off by" not in rows["ours"]["reason"]
    for name in ("dropped", "off"):
        assert "is off by" in rows[name]["reason"] and "median" not in rows[name]
    assert "is off by" in report.table({"rows": list(rows.values()), "limits": LIMITS})


def test_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "QUICK", SMALL[2:3])
    monkeypatch.setattr(command, "startup", lambda: {"import page4d": 1.0})
    path = tmp_path / "new" / "results.json"
    assert command.main(["run", "--quick", "--device", "cpu", "--seconds", "0", "--out", str(path)]) == 0
    results = json.loads(path.read_text())
    assert {"device", "torch", "commit", "date"} <= set(results["provenance"])
    assert results["provenance"]["command"].startswith("python -m benchmarks run --quick --device cpu")
    assert results["startup"] == {"import page4d": 1.0}
    assert 0 <= results["rows"][0]["error"] < 1e-5
    assert results["rows"][0]["case"] == SMALL[2].name
    assert "| qk_norm_rope-forward-1x893-float32 | reference |" in capsys.readouterr().out
    assert command.main(["list"]) == 0 and "sdpa_augmented" in capsys.readouterr().out


@pytest.mark.slow
def test_startup():
    """Each run starts three Python processes."""
    seconds = measure.startup()
    assert seconds["import page4d"] > 0 and len(seconds) == 4


def test_errors_are_one_line(capsys):
    assert command.main(["run", "--cases", "nope"]) == 2
    assert capsys.readouterr().err == "error: no case matches nope: see `python -m benchmarks list`\n"


def test_messages_name_the_program(capsys):
    """`page4d bench` passes its name."""
    assert command.main(["run", "--cases", "nope"], prog="page4d bench") == 2
    assert "see `page4d bench list`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["run", "--help"], prog="page4d bench")
    assert capsys.readouterr().out.startswith("usage: page4d bench run ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    assert command.main(["run", "--device", "cuda", "--quick"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["exact", "balanced", "fast"])
@pytest.mark.parametrize(("frames", "size"), [(1, (336, 518)), (3, (112, 154))])
def test_flops_of_the_trunk(frames, size, name):
    """The formula equals torch's counter, on the meta device at the official size."""
    config = preset("page4d")
    plan = AttentionPlan.preset(name, config)
    with torch.device("meta"):
        model = Page4D(config.replace(point_head=None, depth_head=None, track=None))
        images = torch.rand(1, frames, 3, *size)

    def attention(q, k, v, *rest, out_shape=None, **options):  # the counter does not know our operator
        batch, heads, queries, head_dim = q
        return formulas.attention_flops(batch, heads, queries, k[2], head_dim, "forward")

    mapping = {torch.ops.page4d.mask_attention: attention}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad(), use_backend("reference"):
        model.aggregator(images, mask_strength=0.0, layers=(23,), want_mask=False, plan=plan)
    counted = {"weights": 0, "attention": 0}
    for operator, flops in counter.get_flop_counts()["Global"].items():
        counted["attention" if "attention" in str(operator) else "weights"] += flops
    found = formulas.trunk_flops(config, frames, size, plan)
    assert counted["weights"] == found["weights"]
    assert counted["attention"] == found["within frames"] + found["across frames"]
    assert found["within frames"] == 24 * formulas.attention_flops(frames, 16, *[found_tokens(size)] * 2, 64, "forward") * 2
    if name != "exact" and frames > 1:
        return
    assert found["across frames"] == 24 * formulas.attention_flops(1, 16, *[frames * found_tokens(size)] * 2, 64, "forward")


def found_tokens(size):
    return 5 + size[0] // 14 * (size[1] // 14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["trunk", "model"])
def test_the_whole_model_passes_its_gate(op, dtype):
    """Our model and the official arithmetic agree with float64. A model without the mask does not."""
    case = data.Case(op, "forward", 4, dtype)
    for variant in data.variants(case, "cpu"):
        assert data.gate(case, variant, data.make_inputs(case, "cpu", small=True)).reason == ""

    def dropped(inputs):
        model = whole.random_model(inputs.preset, inputs.dtype, torch.float32, "cpu")
        with torch.inference_mode():
            return whole.joined(model(inputs.images, outputs=inputs.outputs, mask_strength=0.0).tensors())

    if dtype == torch.float32:
        assert "off by" in data.gate(case, data.Variant("dropped", dropped), data.make_inputs(case, "cpu", small=True)).reason


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_block_passes_its_gate(dtype, direction, monkeypatch):
    """With a small frame, so that the float64 oracle is fast."""
    monkeypatch.setattr(whole, "GRID", (4, 4))
    case = data.Case("block", direction, 1, dtype)
    for variant in data.variants(case, "cpu"):
        verdict = data.gate(case, variant, data.make_inputs(case, "cpu", small=True))
        assert not verdict.reason and verdict.error is not None and verdict.error < (1e-5 if dtype == torch.float32 else 2e-2)
    half = data.Variant("half", lambda inputs: whole.our_block(inputs) * 0.5)
    assert "off by" in data.gate(case, half, data.make_inputs(case, "cpu", small=True)).reason


def test_attention_also_reports_the_error_of_the_gated_rows():
    case = data.Case("mask_attention", "forward", 1, torch.bfloat16, heads=1)
    inputs = data.make_inputs(case, "cpu", small=True)
    found = {
        name: data.gate(case, data.Variant(name, lambda g, name=name: data.page4d_attention(g, name)), inputs)
        for name in ("sdpa", "sdpa_augmented")
    }
    assert not any(verdict.reason for verdict in found.values())
    assert found["sdpa"].gated_error * 4 < found["sdpa_augmented"].gated_error


def test_work_of_the_whole_model():
    trunk, model = (data.Case(op, "forward", 4, torch.bfloat16).work()["flops"] for op in ("trunk", "model"))
    assert trunk == pytest.approx(8.36e12, rel=0.01) and model - trunk == pytest.approx(4 * 0.372e12, rel=0.01)
    assert data.Case("trunk", "forward", 4, torch.bfloat16).ceilings(LIMITS) == {"flops": 1e12}


def test_a_case_that_takes_minutes_is_skipped():
    case = data.Case("model", "forward", 1000, torch.bfloat16)
    rows = command.measure(case, "cpu", 0.0, LIMITS)
    assert rows and all(row["reason"].startswith("skipped: at the peak rate of this machine a call takes") for row in rows)


def test_resident_peak(capsys):
    assert 1 << 26 < command.resident_peak(data.Case("qk_norm_rope", "forward", 4, torch.float32), "reference") < 1 << 33


def test_the_report_matches_the_result_files():
    """After new results: `python -m benchmarks report`."""
    assert report.PAGE.read_text() == report.page()
    assert report.README.read_text() == report.readme() and "| 8 | 7" in report.readme()
    for machine, files in report.machines().items():
        for name, results in files:
            assert all(path.exists() for path in report.plots(machine, name, results))


def test_report(tmp_path, monkeypatch):
    rows: list[dict] = [
        {
            "case": f"trunk-forward-{frames}x893-float32",
            "variant": variant,
            "reason": "",
            "median": frames * factor,
            "lower": frames * factor * 0.9,
            "upper": frames * factor * 1.1,
            "unit": "flops",
            "rate": 1e12,
            "of_limit": 0.5 / factor,
            "peak_bytes": 3 << 20,
        }
        for frames in (1, 4)
        for variant, factor in (("page4d", 1.0), ("other", 2.0))
    ]
    rows.append(rows[0] | {"case": "trunk-forward-8x893-float32"})
    rows.append({"case": "trunk-forward-8x893-float32", "variant": "other", "reason": "out of memory"})
    made = dict.fromkeys(("device", "torch", "triton", "python", "commit", "date", "command"), "x")
    (tmp_path / "results" / "machine").mkdir(parents=True)
    content = {"provenance": made, "limits": {"exp2": 1e9}, "rows": rows}
    (tmp_path / "results" / "machine" / "some.json").write_text(json.dumps(content))
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "PAGE", tmp_path / "RESULTS.md")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "SHOWN", ("machine", "some", "trunk-forward-float32", ("page4d", "other")))
    (tmp_path / "README.md").write_text("before\n" + "old\n".join(report.MARKS) + "after\n")
    assert command.main(["report"]) == 0
    page = (tmp_path / "RESULTS.md").read_text()
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n<!-- results -->\n\n| frames | `page4d` | `other` |") and readme.endswith("-->\nafter\n")
    assert "| 4 | 4000 ms, 50% | 8000 ms, 25% |" in readme and "| 8 | 1000 ms, 50% |  |" in readme and "old" not in readme
    assert "## machine: some" in page and "![by frames](results/machine/some-trunk-forward-float32.png)" in page
    assert "| trunk-forward-4x893-float32 | page4d | 4000.000 (3600.000 to 4400.000) | 1.00 TFLOP/s | 50% | 3 |  |" in page
    assert "| trunk-forward-8x893-float32 | other | out of memory | | | | |" in page
    assert (tmp_path / "results" / "machine" / "some-trunk-forward-float32.png").stat().st_size > 5000


def test_the_others_run_when_a_variant_fails_at_full_size(monkeypatch):
    case = SMALL[0]
    mask_head = BANDWIDTH_OPS["mask_head"].call

    def fails_at_full_size(tensors):
        if tensors[0].shape[1] == case.frames and fails_at_full_size.gated:
            raise torch.OutOfMemoryError("CUDA out of memory\nmore detail")
        fails_at_full_size.gated = True
        return mask_head(tensors, "reference")

    fails_at_full_size.gated = False
    found = [data.Variant("large", fails_at_full_size), data.Variant("reference", lambda tensors: mask_head(tensors, "reference"))]
    monkeypatch.setattr(command, "variants", lambda case, device: found)
    rows = command.measure(case, "cpu", 0.0, LIMITS)
    assert rows[0]["reason"] == "CUDA out of memory" and "median" not in rows[0] and rows[1]["median"] > 0


def test_a_process_does_not_inherit_the_peak_of_its_parent():
    large = torch.ones(200_000_000)  # 800 MB
    here = peak_bytes(torch.device("cpu"))
    code = "import torch; from page4d_kernels.profiling import peak_bytes; print(peak_bytes(torch.device('cpu')))"
    there = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert there < large.nbytes < here


class TestOfficial:
    """The clone is a stand-in: a package with a class that takes the official options and returns a dictionary."""

    CODE = """
import sys
import torch
from page4d import Page4D, preset

class VGGT(torch.nn.Module):
    def __new__(cls, **options):
        assert options == {"enable_track": False, "mask_hold_start": 0, "mask_hold_end": 1}
        print("the clone prints too")
        model = Page4D(preset(PRESET).replace(track=None))
        model.register_forward_hook(lambda module, args, out: out.tensors())
        return model
"""

    @pytest.fixture
    def inputs(self):
        generator = torch.Generator().manual_seed(0)
        return whole.ModelInputs("tiny", torch.rand(1, 2, 3, 28, 42, generator=generator), torch.float32, ("camera", "depth", "points"))

    def clone(self, folder, preset="tiny", package="model/page"):
        """As the official release's clone has it: the package is below `model`."""
        (folder / package / "models").mkdir(parents=True)
        (folder / package / "models" / "vggt.py").write_text(self.CODE.replace("PRESET", repr(preset)))
        return folder

    @pytest.mark.slow
    @pytest.mark.parametrize("package", ["model/page", "vggt"])
    def test_the_default_class_is_found_from_the_root_of_the_clone(self, inputs, tmp_path, package):
        with official.Official(self.clone(tmp_path, package=package), official.CLASS, inputs) as process:
            assert process.outputs.isfinite().all()

    def test_row(self, inputs, monkeypatch):
        """The comparison with our outputs and the row, without a process."""
        case = data.Case("model", "forward", 2, torch.float32)
        monkeypatch.setattr(command, "variants", lambda case, device: [])
        monkeypatch.setattr(command, "make_inputs", lambda case, device, small=False: inputs)

        class Doubled(contextlib.AbstractContextManager):
            """A clone whose outputs are twice ours."""

            outputs, peak = whole.ours(inputs) * 2, 1 << 20

            def __init__(self, folder, name, inputs):
                pass

            def __call__(self):
                pass

            def __exit__(self, *exception):
                pass

        monkeypatch.setattr(command, "Official", Doubled)
        (row,) = command.measure(case, "cpu", 0.0, LIMITS, (None, official.CLASS))
        assert row["variant"] == "official release" and row["difference"] == pytest.approx(1.0)
        assert row["peak_bytes"] == 1 << 20 and row["median"] >= 0 and "official_peak" not in row

    @pytest.mark.slow
    def test_side_by_side(self, inputs, tmp_path, monkeypatch):
        case = data.Case("model", "forward", 2, torch.float32)
        monkeypatch.setattr(command, "variants", lambda case, device: [data.Variant("page4d", whole.ours)])
        monkeypatch.setattr(command, "make_inputs", lambda case, device, small=False: inputs)
        monkeypatch.setattr(command, "resident_peak", lambda case, variant: 1)
        rows = command.measure(case, "cpu", 0.0, LIMITS, (self.clone(tmp_path), official.CLASS))
        assert [row["variant"] for row in rows] == ["page4d", "official release"]
        row = rows[1]
        assert row["median"] > 0 and row["calls"] == 3 and 1 << 26 < row["peak_bytes"] < 1 << 33
        assert 0 <= row["difference"] < 1e-5
        assert "from ours |" in report.table({"rows": rows})

    @pytest.mark.parametrize(
        ("entry", "message"),
        [("nothing:VGGT", "No module named 'nothing'"), ("page.models.vggt:Other", "has no attribute 'Other'")],
    )
    def test_a_clone_that_does_not_run_gives_a_reason(self, inputs, tmp_path, entry, message):
        with pytest.raises(official.OfficialError, match=message):
            official.Official(self.clone(tmp_path), entry, inputs)

    def test_other_weights(self, inputs, tmp_path):
        with pytest.raises(official.OfficialError, match=r"size mismatch|the weights do not fit"):
            official.Official(self.clone(tmp_path, "small"), official.CLASS, inputs)

    def test_a_run_that_is_cut_off_keeps_the_rows_it_has(self, tmp_path, monkeypatch, capsys):
        rows = iter([[{"case": "a", "variant": "b", "biased": True, "reason": "no time"}]])

        def measured(*args):
            try:
                return next(rows)
            except StopIteration:
                raise KeyboardInterrupt from None

        for name in ("provenance", "limits", "startup"):
            monkeypatch.setattr(command, name, lambda *args: {})
        monkeypatch.setattr(command, "measure", measured)
        monkeypatch.setattr(report, "table", lambda results: f"{len(results['rows'])} row")
        assert command.main(["run", "--quick", "--device", "cpu", "--out", str(tmp_path / "r.json")]) == 130
        assert "1 row" in capsys.readouterr().out and '"no time"' in (tmp_path / "r.json").read_text()

    def test_no_folder(self, tmp_path, capsys):
        assert command.main(["run", "--quick", "--device", "cpu", "--official", str(tmp_path / "none")]) == 2
        assert "there is no such folder" in capsys.readouterr().err
