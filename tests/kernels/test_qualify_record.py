"""The record of qualified kernels: written, read, damaged, foreign, shared; and what auto makes of it."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os

import pytest
import torch

from page4d_kernels import TokenLayout, mask_attention, registries
from page4d_kernels.backends.mask_attention.problem import AttentionProblem
from page4d_kernels.qualify import record
from page4d_kernels.qualify.__main__ import Saving
from page4d_kernels.qualify.classes import class_of
from page4d_kernels.qualify.record import Entry, OpRecord, Verdict
from page4d_kernels.testing import attention_inputs

CPU = torch.device("cpu")
ATTENTION = registries()["mask_attention"]

TYPICAL = AttentionProblem.typical("cpu")


@pytest.fixture(autouse=True)
def mine(monkeypatch):
    """A further backend that auto may take: the reference under another name."""
    copy = dataclasses.replace(ATTENTION.get("reference"), name="mine", automatic=True)
    monkeypatch.setattr(ATTENTION, "_backends", ATTENTION._backends | {"mine": copy})


def entry_with(times: dict[str, list[float]], failed: dict[str, str] | None = None, made: str = "2026-01-01 00:00:00") -> Entry:
    """A record of `mask_attention` in which these backends were timed for the typical problem."""
    backends = {name: Verdict(["float32 forward, head dim 64"], dict(failed or {})) for name in times}
    return Entry(record.environment(CPU), made, {"mask_attention": OpRecord(backends, {class_of(TYPICAL): times})})


def choice() -> str:
    return ATTENTION.choose(TYPICAL).name


def test_auto_takes_the_fastest_that_qualified(cache):
    record.save(CPU, entry_with({"chunked": [2.0, 3.0], "mine": [1.0, 3.0]}))
    assert choice() == "mine"
    assert ATTENTION.choose(TYPICAL, "sdpa").name == "sdpa"  # a named backend is never replaced
    other = AttentionProblem("cpu", torch.float32, 1, 16, 700, 700, 32)
    assert ATTENTION.choose(other).name in ("cpu", "sdpa")  # a class without a record: the documented order
    out = mask_attention(*torch.randn(3, 1, 2, 10, 64), layout=None)
    assert out.isfinite().all()


def test_a_baseline_is_not_taken_however_fast(cache):
    record.save(CPU, entry_with({"reference": [1.0, 9.0], "cpu": [1.0, 1.0]}))
    assert choice() == "sdpa"


def test_who_was_timed_but_did_not_pass_is_not_taken(cache):
    entry = entry_with({"mine": [1.0, 9.0], "cpu": [1.0, 1.0]})
    entry.ops["mask_attention"].backends["mine"].passed = ["bfloat16 forward, head dim 64"]
    record.save(CPU, entry)
    assert choice() == "sdpa"


def test_judging_one_backend_takes_no_other_out_of_the_order(cache):
    before = choice()
    record.save(CPU, entry_with({"mine": [1.0, 0.5]}))
    assert choice() == before


def test_runs_of_different_dtypes_add_up(cache):
    """A later run replaces what it judged again, and nothing else."""
    bf16 = class_of(dataclasses.replace(TYPICAL, dtype=torch.bfloat16))
    record.save(CPU, entry_with({"mine": [1.0, 3.0]}))
    later = entry_with({})
    later.ops["mask_attention"] = OpRecord(
        {"mine": Verdict(["bfloat16 forward, head dim 64"], {"float16 forward, head dim 64": "wrong"})}, {bf16: {"mine": [1.0, 2.0]}}
    )
    record.save(CPU, later)
    found = record.current("cpu").ops["mask_attention"]
    assert found.backends["mine"].passed == ["float32 forward, head dim 64", "bfloat16 forward, head dim 64"]
    assert found.backends["mine"].failed == {"float16 forward, head dim 64": "wrong"}
    assert choice() == "mine" and found.factors(bf16) == {"mine": 2.0}
    record.save(CPU, Entry(later.environment, "", {"mask_attention": OpRecord({"mine": Verdict([], {"everything": "it crashed"})})}))
    found = record.current("cpu").ops["mask_attention"]
    assert found.times == {} and found.backends["mine"].passed == [] and choice() != "mine"


def test_auto_takes_the_safe_backend_where_nothing_is_faster(cache):
    record.save(CPU, entry_with({"cpu": [1.0, 1.0], "mine": [1.0, 1.04]}))
    assert choice() == "sdpa"


def test_a_failed_backend_is_not_taken_in_any_class_of_its_dtype(cache):
    record.save(CPU, entry_with({"cpu": [1.0, 9.0]}, {"float32 forward, head dim 64": "wrong"}))
    assert choice() == "sdpa"
    for dtype, kinds in ((torch.float32, {"sdpa"}), (torch.bfloat16, {"cpu", "sdpa"})):
        assert ATTENTION.choose(AttentionProblem("cpu", dtype, 1, 16, 700, 700, 32)).name in kinds
    assert ATTENTION.choose(TYPICAL, "cpu").name == "cpu" if not ATTENTION.reasons("cpu", TYPICAL) else True


def test_a_qualified_backend_that_cannot_serve_is_passed_over(cache):
    record.save(CPU, entry_with({"cuda": [1.0, 9.0], "gone_since": [1.0, 9.0], "cpu": [1.0, 1.0]}))
    assert choice() == "sdpa"


def test_records_are_not_read_with_off(cache, monkeypatch):
    before = choice()
    record.save(CPU, entry_with({"mine": [1.0, 3.0]}))
    assert choice() == "mine"
    monkeypatch.setenv("PAGE4D_QUALIFY", "off")
    assert choice() == before


NO_TIMES = {
    "environment": {"device": "x"},
    "made": "",
    "tried": [],
    "ops": {"mask_attention": {"backends": {}, "times": {"float32 forward: c": {"cpu": [0, 1]}}}},
}
HUGE = json.dumps({"format": 2, "entries": [NO_TIMES]}).replace("[0, 1]", f"[1{'0' * 400}, 1]")
DAMAGED = [
    HUGE,
    "[" * 100_000,
    "",
    "{",
    "[]",
    "null",
    '{"format": 2}',
    '{"format": 99, "entries": []}',
    '{"format": 2, "entries": [{}]}',
    "\x00\xff",
]


@pytest.mark.parametrize("text", [*DAMAGED, json.dumps({"format": 2, "entries": [NO_TIMES]})], ids=lambda text: text[:20])
def test_a_damaged_record_is_ignored_with_a_warning(cache, text, caplog):
    before = choice()
    path = record.path_of(CPU)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("latin-1"))
    record.forget()
    assert choice() == before
    assert "is ignored" in caplog.text and "page4d qualify" in caplog.text
    record.save(CPU, entry_with({"mine": [1.0, 3.0]}))  # and replaced by the next run
    assert choice() == "mine"


VERDICT = {"passed": [], "failed": {}, "skipped": {}, "timed": [], "lengths": []}


@pytest.mark.parametrize(
    "wrong",
    [
        {"passed": "float32 forward"},
        {"passed": [3]},
        {"passed": [""]},
        {"failed": {"": "why"}},
        {"lengths": ["3"]},
        {"skipped": []},
        {"timed": None},
    ],
    ids=str,
)
def test_a_verdict_with_other_types_is_damaged(cache, wrong, caplog):
    item = {"environment": record.environment(CPU), "made": "", "tried": [], "ops": {"mask_attention": {"backends": {}, "times": {}}}}
    path = record.path_of(CPU)
    path.parent.mkdir(parents=True)
    for verdict in (VERDICT, VERDICT | wrong):
        item["ops"]["mask_attention"]["backends"] = {"mine": verdict}
        path.write_text(json.dumps({"format": record.FORMAT, "entries": [item]}))
        record.forget()
        assert (record.current("cpu") is None) == (verdict != VERDICT)
    assert "is ignored" in caplog.text


def test_a_folder_that_cannot_be_read_is_no_error(cache, monkeypatch, caplog):
    before = choice()
    monkeypatch.setenv("XDG_CACHE_HOME", f"/{'a' * 5000}")
    record.forget()
    assert choice() == before and "is ignored" in caplog.text


def test_a_crash_speaks_for_everything_until_its_part_is_judged_again():
    crashed = Verdict([], {"everything": "it crashed", "bfloat16 forward": "it crashed"})
    found = Verdict(["float32 forward"])
    found.merge(crashed)
    assert found.failure("float32 forward") and found.done("float16 training")
    found.merge(Verdict(["float32 forward"]))
    assert found.failure("float32 forward") == "it crashed"
    found.merge(Verdict(["bfloat16 forward"]))
    assert not found.failed and set(found.passed) == {"float32 forward", "bfloat16 forward"}


def test_what_is_not_served_takes_nothing_else_away():
    found = Verdict(["float32 forward, head dim 64"], {"float16 forward, head dim 64": "wrong"}, timed=["float32 forward, head dim 64"])
    found.merge(Verdict(skipped={"float32 forward, head dim 128": "it takes head dim 64"}))
    assert found.done("float32 forward, head dim 64") and found.done("float32 forward, head dim 128")
    assert not found.done("bfloat16 forward, head dim 64") and found.failure("float16 training, head dim 64") == "wrong"
    found.merge(Verdict(skipped={"everything": "it could not be loaded"}))
    assert found.done("bfloat16 forward, head dim 64")
    found.merge(Verdict(["bfloat16 forward, head dim 64"]))
    assert "everything" not in found.skipped and not found.done("bfloat16 forward, head dim 64")  # it has no times yet


def test_what_is_no_file_is_not_read(cache):
    path = record.path_of(CPU)
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    assert record.current("cpu") is None


def test_half_a_file_is_damaged(cache, caplog):
    path = record.save(CPU, entry_with({"mine": [1.0, 3.0]}))
    whole = path.read_text()
    for length in (len(whole) // 3, len(whole) - 3):
        path.write_text(whole[:length])
        record.forget()
        assert record.current("cpu") is None
    assert "is ignored" in caplog.text


def test_a_foreign_record_is_ignored_with_a_warning(cache, caplog):
    entry = entry_with({"mine": [1.0, 3.0]})
    entry.environment["device"] = "Another Processor"
    record.save(CPU, entry)
    found, why = record.stored(CPU)
    assert found is None and "device" in why
    assert "is a record of 'Another Processor'" in caplog.text and choice() != "mine"


def test_changed_sources_make_a_record_useless(cache, monkeypatch):
    record.save(CPU, entry_with({"mine": [1.0, 3.0]}))
    monkeypatch.setattr(record, "sources", lambda: "0123456789abcdef")
    record.forget()
    assert choice() != "mine"
    assert record.stored(CPU)[1] == "the record of 2026-01-01 00:00:00 was made in another environment (other sources)"
    record.save(CPU, entry_with({"chunked": [1.0, 3.0]}))
    monkeypatch.undo()
    data = json.loads(next(cache.rglob("*.json")).read_text())
    assert len(data["entries"]) == 2  # the old sources keep their entry


def test_a_table_of_tiles_is_part_of_a_gpus_environment(cache, monkeypatch, tmp_path):
    table = tmp_path / "tiles.json"
    monkeypatch.setenv("PAGE4D_AUTOTUNE_TABLE", str(table))
    assert record._tiles() == "shipped"
    table.write_text("{}")
    first = record._tiles()
    table.write_text("[]")
    assert len({"shipped", first, record._tiles()}) == 3


def test_each_of_several_gpus_follows_its_own_record(cache, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["Small", "Large"][index])
    monkeypatch.setattr(record, "stored", lambda device: (entry_with({"mine": [1.0, 3.0 + torch.cuda.current_device()]}), ""))
    record._name_of.cache_clear()
    factors = []
    for index in (0, 1, 0):
        monkeypatch.setattr(torch.cuda, "current_device", lambda index=index: index)
        factors += [factor for _, factor in record.advice("mask_attention", "cuda", class_of(TYPICAL)).faster]
    record._name_of.cache_clear()
    record.forget()
    assert factors == [3.0, 4.0, 3.0]


def test_old_environments_are_dropped(cache):
    for i in range(record.KEPT + 3):
        entry = entry_with({"mine": [1.0, 3.0]})
        entry.environment["torch"] = str(i)
        path = record.save(CPU, entry)
    found = [entry["environment"]["torch"] for entry in json.loads(path.read_text())["entries"]]
    assert found == [str(i) for i in range(3, record.KEPT + 3)]


def test_a_later_run_replaces_what_it_judged_again_and_keeps_the_rest(cache):
    record.save(CPU, entry_with({"mine": [1.0, 3.0], "chunked": [1.0, 2.0]}))
    record.save(CPU, entry_with({"mine": [1.0, 1.5]}, made="2026-01-02 00:00:00"))
    found = record.current("cpu")
    assert found.made == "2026-01-02 00:00:00" and found.ops["mask_attention"].factors(class_of(TYPICAL)) == {
        "chunked": 2.0,
        "mine": 1.5,
    }


def test_a_folder_that_cannot_be_written(cache, monkeypatch, capsys):
    """The run is not lost: this process follows it. Root may write anywhere, so a file stands in the folder's place."""
    (cache / "page4d").write_text("in the way")
    saving = Saving(CPU)
    saving(entry_with({"mine": [1.0, 3.0]}))
    saving(entry_with({"chunked": [2.0, 3.0]}))
    assert "cannot be written" in saving.words and "this process follows it" in saving.words
    assert set(record.current("cpu").ops["mask_attention"].backends) == {"mine", "chunked"}
    assert choice() == "mine"
    with record.only_one(CPU) as alone:
        assert alone


def _write(number: int) -> None:
    for i in range(5):
        record.save(CPU, entry_with({f"backend_{number}_{i}": [1.0, 2.0]}))


def test_many_writers_lose_nothing(cache):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(number,)) for number in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    record.forget()
    assert len(record.current("cpu").ops["mask_attention"].backends) == 30
    assert not list(cache.rglob("*.tmp"))


def test_gated_rows_go_to_the_fastest_qualified_backend(cache):
    """As the operator's calls show. The result stays the same within rounding."""
    inputs = attention_inputs(TokenLayout(3, 59, 5))
    plain, calls = inputs.attend("sdpa"), []
    rows = AttentionProblem("cpu", torch.float32, 1, 2, 15, 177, 64, biased=True)
    entry = entry_with({})
    names = {"sdpa": [1.0, 9.0], "sdpa_rows": [1.0, 3.0], "chunked": [1.0, 1.5]}  # sdpa does not run inside the operator
    entry.ops["mask_attention"] = OpRecord({name: Verdict(["float32 forward, head dim 64"]) for name in names}, {class_of(rows): names})
    record.save(CPU, entry)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function is torch.ops.page4d.mask_attention.default:
                calls.append(arguments[-1])
            return function(*arguments, **(options or {}))

    with Watch():
        out = inputs.attend("sdpa")
    assert calls == ["sdpa_rows"]
    assert not torch.equal(out, plain) and (out - plain).abs().max() < 1e-5


@pytest.mark.slow
def test_a_record_is_followed_inside_torch_compile(cache):
    """The look-up is a constant of the graph: no break, and no file is read while the graph runs."""
    record.save(CPU, entry_with({"chunked": [1.0, 3.0]}))
    x = torch.randn(3, 1, 16, 2 * 893, 64)
    inputs = attention_inputs(TokenLayout(2, 893, 5), heads=16)
    expected = mask_attention(*x, inputs.query_gate, inputs.key_bias, layout=inputs.layout, backend="chunked")
    compiled = torch.compile(
        lambda q, k, v: mask_attention(q, k, v, inputs.query_gate, inputs.key_bias, layout=inputs.layout), fullgraph=True
    )
    assert torch.equal(compiled(*x), expected)


def test_without_a_record_a_gpu_user_gets_one_hint(cache, monkeypatch, caplog):
    record._hint.cache_clear()
    monkeypatch.setattr(record, "stored", lambda device: (None, "there is no record of this device"))
    for length in (512, 2048):
        assert record.advice("mask_attention", "cuda", f"bfloat16 forward, head dim 64: no mask, up to {length} tokens") == record.Advice()
    assert caplog.text.count("run `page4d qualify` once") == 1
    record.forget()
    monkeypatch.setenv("PAGE4D_QUALIFY", "off")
    record._hint.cache_clear()
    record.advice("mask_attention", "cuda", "bfloat16 forward, head dim 64: no mask, up to 512 tokens")
    assert caplog.text.count("run `page4d qualify` once") == 1


def test_no_home_is_no_error(cache, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def expanduser(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(record.Path, "expanduser", expanduser)
    assert record.folder().name == "page4d"
