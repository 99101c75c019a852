"""Qualification: the battery catches every planted fault, the record survives everything, and auto follows it."""

from __future__ import annotations

import functools
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from page4d_kernels import BackendError, TokenLayout, env, registries
from page4d_kernels.backends.mask_attention import sdpa_kernels
from page4d_kernels.backends.mask_attention.problem import AttentionArgs, AttentionProblem
from page4d_kernels.qualify import battery, record, worker
from page4d_kernels.qualify.__main__ import first_run, main
from page4d_kernels.qualify.classes import class_of
from page4d_kernels.qualify.report import describe
from page4d_kernels.qualify.run import Job, done, jobs, qualify
from page4d_kernels.qualify.run import _environment as children_environment
from page4d_kernels.qualify.trial import Draw, Setting, settings, trials_of
from page4d_kernels.qualify.worker import measure
from page4d_kernels.testing import attention_inputs

CPU = torch.device("cpu")
PART = "float32 forward, head dim 64"
SHORT = f"{PART}: mask with layout, up to 512 tokens"
ATTENTION = registries()["mask_attention"]
HERE = str(Path(__file__).parent)


@pytest.fixture
def planted(monkeypatch):
    """The module of planted backends, registered for one test."""
    monkeypatch.setattr(ATTENTION, "_backends", dict(ATTENTION._backends))
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("PYTHONPATH", HERE + os.pathsep + str(Path(HERE).parents[1]))
    sys.modules.pop("planted", None)
    import planted

    return planted


def judge(backend: str, training: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[str, list[int]]:
    """The reason for a disqualification, and the lengths of the trials so far."""
    draw = Draw(random.Random(seed))
    try:
        served, _ = battery.judge(
            ATTENTION, backend, trials_of("mask_attention").trials(Setting("cpu", dtype, training), draw), lambda name, safe: None
        )
    except battery.Disqualified as error:
        return str(error), draw.lengths
    assert served
    return "", draw.lengths


# --- the battery -------------------------------------------------------------------------------------------------------------


SLOW = [(op, dtype) for op in sorted(registries()) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
QUICK = [("mask_attention", torch.float32), *((op, torch.bfloat16) for op in sorted(registries()) if op != "mask_attention")]


def pass_all(op: str, dtype: torch.dtype, training: bool) -> None:
    """Backends that are right, on other lengths in every run. The baselines of `mask_attention` round the mask or are too slow."""
    for backend in registries()[op]:
        if backend.automatic and not backend.unavailable():
            draw = Draw(random.SystemRandom())
            trials = trials_of(op).trials(Setting("cpu", dtype, training), draw)
            battery.judge(registries()[op], backend.name, trials, lambda name, safe: None)


@pytest.mark.parametrize(("op", "dtype"), QUICK, ids=lambda value: str(value).removeprefix("torch."))
def test_a_backend_that_is_right_passes(op, dtype):
    pass_all(op, dtype, training=op != "mask_attention")


@pytest.mark.slow
@pytest.mark.parametrize(("op", "dtype"), SLOW, ids=lambda value: str(value).removeprefix("torch."))
def test_a_backend_that_is_right_passes_with_and_without_gradients(op, dtype):
    for training in (False, True):
        pass_all(op, dtype, training)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("one_percent", "off on average|over its budget"),
        ("ragged_tail", "over its budget"),
        ("special_rows", "views of one projection.*over its budget"),
        ("mask_ignored", "over its budget"),
        ("unwritten", "never written"),
        ("not_repeatable", "not repeatable"),
        ("second_call", "failed with RuntimeError: the workspace is gone$"),
        ("changes_inputs", "it changes its inputs|not repeatable"),
        ("remembers", "over its budget"),
        ("same_buffer", "a later call changes the results of an earlier one"),
        ("wrong_gradient_of_c", "gradient of key_bias.*over its budget"),
    ],
)
def test_planted_faults_are_caught(planted, name, reason):
    found, _ = judge(f"planted_{name}", training=name == "wrong_gradient_of_c")
    assert found and re.search(reason, found), found
    if name == "wrong_gradient_of_c":
        assert judge(f"planted_{name}")[0] == ""  # its forward is right


def test_no_memory_is_not_the_backends_fault(planted):
    with pytest.raises(torch.OutOfMemoryError):
        judge("planted_out_of_memory")


def test_what_is_wrong_only_at_full_size_is_caught_while_it_is_timed(planted):
    said: list[dict] = []
    assert judge("planted_long_zeros")[0] == ""
    job = {"op": "mask_attention", "backend": "planted_long_zeros", "timed": []}
    measure(ATTENTION, job, {PART: Setting("cpu", torch.float32)}, 60.0, lambda **what: said.append(what))
    assert said[-1]["failed"] == PART and "its result is not that of the safe backend" in said[-1]["reason"]


def test_one_percent_is_caught_in_bf16(planted):
    assert "off on average" in judge("planted_one_percent", dtype=torch.bfloat16)[0]


@pytest.mark.slow
def test_a_backend_that_knows_the_lengths_of_one_run_fails_in_another(planted):
    _, lengths = judge("chunked", seed=1)
    planted.LENGTHS.update(lengths)
    assert judge("planted_these_lengths", seed=1) == ("", lengths)
    reason, others = judge("planted_these_lengths", seed=2)
    assert "over its budget" in reason and set(others) - set(lengths)


@pytest.fixture
def measured(monkeypatch):
    """What the worker says while it times one short call of a backend."""
    trials = trials_of("mask_attention")
    monkeypatch.setattr(trials, "timed", lambda setting: [trials._timed(attention_inputs(TokenLayout(2, 59, 5)), setting.training)])

    def words(backend: str, seconds: float, timed: Sequence[str] = ()) -> list[dict]:
        said: list[dict] = []
        job = {"op": "mask_attention", "backend": backend, "timed": timed}
        measure(ATTENTION, job, {PART: Setting("cpu", torch.float32)}, seconds, lambda **what: said.append(what))
        return [what for what in said if "at" not in what]

    return words


def test_an_error_while_it_is_timed_disqualifies(planted, measured):
    *_, last = measured("planted_second_call", 60.0)
    assert last["failed"] == PART and last["reason"].endswith("RuntimeError: the workspace is gone")


def test_what_the_record_holds_is_not_judged_or_timed_again(measured):
    said: list[dict] = []
    job = {"op": "mask_attention", "backend": "chunked", "device": "cpu", "dtypes": ["float32"], "directions": ["forward"]}
    job |= {"head_dims": [64], "seed": 0, "judged": [PART], "passed": [PART]}
    passed = worker.judge(ATTENTION, job, lambda **what: said.append(what))
    assert passed == {PART: Setting("cpu", torch.float32)} and not said
    job["passed"] = []
    assert worker.judge(ATTENTION, job, lambda **what: said.append(what)) == {} and not said
    assert measured("chunked", 60.0, timed=[SHORT]) == [{"complete": PART}]


def test_a_class_without_time_stays_open_and_one_that_cannot_be_compared_does_not(measured, monkeypatch):
    said = measured("chunked", 60.0)
    assert said[0]["timed"] == SHORT and said[1:] == [{"complete": PART}]
    assert measured("chunked", 0.0) == [{"untimed": SHORT}]
    assert measured("sdpa", 60.0) == [{"complete": PART}]  # it is the safe one itself

    def no_memory(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(worker, "interleaved", no_memory)
    said = measured("chunked", 1e9)
    assert "no time" not in str(said) and said[0]["lacked"].startswith(SHORT) and said[1:] == [{"complete": PART}]


def test_settings_are_looked_at_once():
    found = settings("mask_head", "cpu", ["float32"], ["training", "forward"], [64, 128])
    assert list(found) == ["float32 forward", "float32 training"]
    found = settings("mask_attention", "cpu", ["float32"], ["forward"], [64, 128])
    assert list(found) == [PART, "float32 forward, head dim 128"]


# --- child processes ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_children_that_hang_crash_and_dawdle(planted, cache):
    """The four are judged at once. The parent lives on, each gets its reason, and auto takes none of them."""
    names = ["planted_hangs", "planted_kills", "planted_segfaults", "planted_slow"]
    for name in names:
        registries()["mask_attention"].get(name)
    todo = [Job("mask_attention", name, ("planted",)) for name in names]
    entry, _ = qualify(CPU, todo, 150.0, dtypes=["float32"], stall=25.0, seed=3)
    verdicts = entry.ops["mask_attention"].backends
    where = f"{PART}, views of one projection"
    assert (
        where in verdicts["planted_hangs"].failed["everything"]
        and "it hangs (no word for 25 s)" in verdicts["planted_hangs"].failed["everything"]
    )
    assert where in verdicts["planted_kills"].failed["everything"] and "exit code 7" in verdicts["planted_kills"].failed["everything"]
    assert "SIGSEGV" in verdicts["planted_segfaults"].failed["everything"]
    assert verdicts["planted_slow"].passed == [PART] and not verdicts["planted_slow"].failed
    assert 177 in verdicts["planted_slow"].lengths and len(verdicts["planted_slow"].lengths) > 5
    factors = [entry.ops["mask_attention"].factors(name)["planted_slow"] for name in entry.ops["mask_attention"].times]
    assert factors and all(factor < 1 for factor in factors)
    record.save(CPU, entry)
    assert ATTENTION.choose(AttentionProblem.typical("cpu")).name in ("cpu", "sdpa")
    text = describe(entry)
    assert (
        f"planted_kills failed: {PART}" in text
        and text.count("planted_kills failed") == 1
        and "auto takes the safe backend (planted_slow 0." in text
    )


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """Makes a job whose child runs a script instead of a backend. It has `say`, and what it was `asked`."""

    def make(backend: str, script: str) -> Job:
        name = f"scripted_{backend}"
        start = "import json, os, sys, time\nsay = lambda **what: print(json.dumps(what), flush=True)\n"
        (tmp_path / f"{name}.py").write_text(
            start + "say(ready=True)\nasked = json.loads(sys.stdin.readline())\nsys.stdin.readline()\n" + script
        )
        return Job("mask_attention", backend, worker=name)

    monkeypatch.syspath_prepend(tmp_path)
    return make


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("end", ["time.sleep(60)", "sys.exit(3)", "os.kill(os.getpid(), 9)"])
def test_what_counts_against_a_backend(scripted, safe, end):
    """That it hangs or ends the process, unless its answers were computed, or the system ended the process."""
    job = scripted("ends", f"say(at='{PART}, x', part='{PART}', safe={safe})\n{end}")
    entry, missed = qualify(CPU, [job], 8.0, dtypes=["float32"], stall=0.5)
    if safe or "kill" in end:
        assert entry.ops == {} and missed["mask_attention ends"][0].startswith(f"stopped at {PART}, x")
    else:
        failed = entry.verdict(job.op, job.backend).failed
        assert set(failed) == {"everything", PART} and missed == {}
        assert ("it hangs" if "sleep" in end else "it ended the process (exit code 3") in failed["everything"]


@pytest.mark.slow
def test_what_was_judged_is_kept_when_the_run_is_cut(planted, cache):
    """Ctrl-C while a child hangs: what had passed is kept, the rest is not judged, and parent and child end soon."""
    command = [sys.executable, "-m", "page4d_kernels.qualify", "--device", "cpu", "--op", "mask_attention", "--forward-only"]
    command += ["--import", "planted", "--backend", "planted_hangs_in_bf16", "--dtypes", "float32,bfloat16", "--seconds", "600"]
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # in the background, shells let programs ignore it
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    deadline = time.monotonic() + 100
    while (entry := record.stored(CPU)[0]) is None and time.monotonic() < deadline:
        time.sleep(0.2)
    children = subprocess.run(["pgrep", "-P", str(parent.pid)], capture_output=True, text=True).stdout.split()
    time.sleep(3.0)  # now it hangs
    parent.send_signal(signal.SIGINT)
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode == 130 and "the next run goes on from here" in errors
    assert children and not any(Path(f"/proc/{child}").exists() for child in children)
    entry = record.stored(CPU)[0]
    verdict = entry.verdict("mask_attention", "planted_hangs_in_bf16")
    assert verdict.passed == [PART] and verdict.failed == {} and not verdict.done(PART)  # it has no times yet


def test_a_run_goes_on_with_what_the_last_had_no_time_for(scripted, cache):
    asked = {"dtypes": ["float32"], "directions": ["forward"], "head_dims": [64]}
    passed = f"say(passed='{PART}', lengths=[])\nsay(ready=True)\nsys.stdin.readline()\n"
    job = scripted("late", passed + f"say(at='timing, {SHORT}', part='{PART}', safe=True)\ntime.sleep(60)")
    entry, missed = qualify(CPU, [job], 1.5, dtypes=["float32"])
    assert missed == {"mask_attention late": [f"stopped at timing, {SHORT}"]} and not done(entry, job, **asked)
    check = f"assert asked['judged'] == asked['passed'] == ['{PART}'] and asked['timed'] == []\nsay(ready=True)\nsys.stdin.readline()\n"
    job = scripted("late", check + f"say(timed='{SHORT}', seconds=[1.0, 2.0])\nsay(complete='{PART}')\nsay(done=True)")
    later, missed = qualify(CPU, [job], 60.0, dtypes=["float32"], known=entry)
    entry.merge(later)
    assert missed == {} and done(entry, job, **asked) and not done(entry, job, **asked | {"head_dims": [128]})
    assert entry.ops["mask_attention"].factors(SHORT) == {"late": 2.0}


@pytest.mark.slow
def test_a_first_run_judges_once(cache):
    assert "judged once on this machine, saved in" in first_run(CPU, torch.float32)
    assert first_run(CPU, torch.float32) == ""
    assert record.stored(CPU)[0] is not None


def test_a_first_run_waits_for_no_other(cache):
    with record.only_one(CPU) as alone:
        assert alone
        assert "another process is judging" in first_run(CPU, torch.float32)


def test_off_forbids_it(cache, monkeypatch):
    monkeypatch.setenv("PAGE4D_QUALIFY", "off")
    assert first_run(CPU, torch.float32) == ""
    assert not any(cache.rglob("*.json"))
    monkeypatch.setenv("PAGE4D_QUALIFY", "never")
    with pytest.raises(env.VariableError, match="choose auto or off"):
        first_run(CPU, torch.float32)


def test_no_time_is_not_a_disqualification(cache):
    entry, missed = qualify(CPU, [Job("mask_attention", "chunked")], 0.5, dtypes=["float32"])
    assert entry.ops == {} and missed["mask_attention chunked"][0].startswith("stopped at")


# --- the command -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "attention"], "unknown op 'attention': choose one of mask_attention"),
        (["--backend", "warp"], "no op has a backend 'warp'"),
        (["--backend", "chunked", "--backend", ""], "no op has a backend ''"),
        (["--import", "mine.py"], "give a module's name, without .py"),
        (["--seconds", "0"], "--seconds must be from 1 to 86400"),
        (["--seconds", "nan"], "--seconds must be from 1 to 86400"),
        (["--dtypes", "int8"], "--dtypes int8: choose from float32"),
        (["--head-dims", "64,x"], "--head-dims 64,x: give numbers"),
        (["--import", "no_such_module"], "--import no_such_module: No module named"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "there is no CUDA device here")]),
    ],
)
def test_mistakes_are_one_line(cache, arguments, message, capsys):
    assert main(["--device", "cpu", *arguments]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and message in text and text.count("\n") == 1


def test_where_nothing_can_be_judged_it_says_so(cache, capsys):
    for op in (op for op in registries() if not jobs(CPU, [op])):
        assert main(["--device", "cpu", "--op", op]) == 0
        assert "there is nothing to judge here" in capsys.readouterr().out


def test_jobs():
    """By itself, only what auto may take; by name, everything."""
    names = {(job.op, job.backend) for job in jobs(CPU)}
    assert names <= {("mask_attention", "cpu"), ("mask_attention", "sdpa_rows"), ("mask_head", "cpu"), ("qk_norm_rope", "cpu")}
    assert [job.backend for job in jobs(CPU, ["mask_attention"], ["sdpa_augmented"])] == ["sdpa_augmented"]
    with pytest.raises(BackendError, match="unknown op"):
        jobs(CPU, ["nothing"])


@pytest.mark.slow
def test_the_command_writes_a_record_that_info_shows(cache, planted):
    command = [sys.executable, "-m", "page4d_kernels.qualify", "--op", "mask_attention", "--dtypes", "float32", "--forward-only"]
    command += ["--import", "planted", "--backend", "planted_one_percent", "--seconds", "60"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"planted_one_percent failed in {PART}" in result.stdout and "saved in" in result.stdout
    shown = subprocess.run([sys.executable, "-m", "page4d_kernels.info"], capture_output=True, text=True).stdout
    assert f"planted_one_percent failed in {PART}" in shown.partition("qualified kernels")[2]


def test_classes_depend_on_no_exact_length():
    layout = TokenLayout(2, 893, 5)
    names = [class_of(AttentionProblem("cuda", torch.bfloat16, 1, 16, n, n, 64, True, layout)) for n in (513, 2048, 2049)]
    assert names[0] == names[1] == "bfloat16 forward, head dim 64: mask with layout, up to 2048 tokens" != names[2]
    training = AttentionProblem("cuda", torch.float16, 1, 16, 9000, 9000, 64, needs_grad=frozenset("q"))
    assert class_of(training) == "float16 training, head dim 64: no mask, over 8192 tokens"


# --- torch's kernels as candidates, and the gated rows ------------------------------------------------------------------------


class FakeSwitch:
    """torch's switch between flash attention packages, with what it was turned to."""

    def __init__(self, current=None, names=("FA3", "FA4")):
        self.current, self.names, self.turned = current, names, []

    def activate_flash_attention_impl(self, name):
        self.current = name
        self.turned.append(name)

    def restore_flash_attention_impl(self):
        self.current = None
        self.turned.append("back")

    def current_flash_attention_impl(self):
        return self.current

    def list_flash_attention_impls(self):
        return list(self.names)


@pytest.mark.parametrize(("name", "kernel"), [("sdpa_flash", "flash"), ("sdpa_cudnn", "cudnn"), ("sdpa_efficient", "mem_efficient")])
def test_a_named_kernel_is_the_only_one_that_torch_may_take(monkeypatch, name, kernel):
    seen = {}

    def attention(q, k, v, scale):
        enabled = ("flash", "mem_efficient", "math", "cudnn")
        seen["kernels"] = [kind for kind in enabled if getattr(torch.backends.cuda, f"{kind}_sdp_enabled")()]
        return torch.zeros_like(q)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    q = torch.zeros(1, 1, 2, 8)
    ATTENTION.get(name).forward(AttentionArgs(q, q, q, None, None, None, 1.0))
    assert seen["kernels"] == [kernel]


def test_the_switch_is_turned_for_one_call_and_never_against_the_user(monkeypatch):
    switch = FakeSwitch()
    monkeypatch.setattr(sdpa_kernels, "_switch", lambda: switch)
    monkeypatch.setattr(sdpa_kernels, "import_error", lambda module: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, scale: q)
    backend = ATTENTION.get("sdpa_fa3")
    assert backend.unavailable() == []
    q = torch.zeros(1, 1, 2, 8)
    for _ in range(2):
        backend.forward(AttentionArgs(q, q, q, None, None, None, 1.0))
    assert switch.turned == ["FA3", "back", "FA3", "back"]
    switch.current = "FA3"
    backend.forward(AttentionArgs(q, q, q, None, None, None, 1.0))
    assert len(switch.turned) == 4  # the user has turned it
    assert ATTENTION.get("sdpa_fa4").unavailable() == ["torch's switch for flash attention has been turned to FA3"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "this GPU has 8" in backend.unavailable()[0]
    switch.names = ()
    assert "has no switch for FA3" in backend.unavailable()[0]
    monkeypatch.setattr(sdpa_kernels, "_switch", lambda: None)
    assert "has no switch for FA3" in backend.unavailable()[0]


@pytest.mark.parametrize("name", ["sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "sdpa_fa3"])
def test_they_say_what_they_cannot_do(name):
    problem = AttentionProblem("cpu", torch.float64, 1, 1, 9, 9, 63)
    text = "; ".join(ATTENTION.get(name).unsupported(problem))
    assert "it runs on cuda" in text and "not float64" in text and "head dim must be a multiple of 8" in text


def test_children_see_only_their_gpu(monkeypatch):
    for visible, index, seen in (("", 1, "1"), ("3,5", 1, "5"), ("3", 0, "3"), ("GPU-a, GPU-b", 1, "GPU-b")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert children_environment(torch.device("cuda", index))["CUDA_VISIBLE_DEVICES"] == seen
