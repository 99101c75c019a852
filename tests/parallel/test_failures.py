"""A rank fails, is killed, stopped or hangs in the middle of a pass: all others end within a deadline, with its reason."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from page4d import Page4D, preset
from page4d.errors import InputError, RankError
from page4d.execution.ranks import Ranks

LATE = 40.0  # seconds: eight of waiting for the deadline, five for an answer to the roll call, and much for a busy machine


def spoil(kind):
    """What the failing rank does in the middle of an exchange."""
    if kind == "exception":
        raise ValueError("something is wrong\nin detail")
    if kind == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1000)  # hangs


def broken_pass(group, kind, who, backward):
    """How the pass ends on this rank, and after how many seconds."""
    model = Page4D(preset("small").replace(depth=4, masked_blocks=(1, 3), mask_after=1, kept_layers=(0, 1, 2, 3), track=None))
    start = time.monotonic()
    ranks = Ranks.of(group, torch.device("cpu"))
    if group.rank() == who:
        real, count = ranks.start, 0

        def start_exchange(*args):
            nonlocal count
            count += 1
            if count == (40 if backward else 6):
                spoil(kind)
            return real(*args)

        ranks.start = start_exchange
    images = torch.rand(1, 2, 3, 56, 84)
    try:
        with torch.set_grad_enabled(backward), ranks.guard():
            prediction = model(images, group=group, outputs=["camera", "depth"])
            if backward:
                (prediction.depth.sum() + prediction.pose_enc.sum()).backward()
    except (Exception, KeyboardInterrupt) as error:
        again = ""
        try:
            model(images, group=group)
        except RankError as later:
            again = str(later)
        return type(error).__name__, str(error), time.monotonic() - start, again
    return "none", "", time.monotonic() - start, ""


def again(group, file):
    """Passes in two more groups, in the store of a file: different results, watchers that are alive."""
    model = Page4D(preset("small").replace(depth=4, masked_blocks=(1, 3), mask_after=1, kept_layers=(0, 1, 2, 3), track=None)).eval()
    images, found = torch.rand(1, 2, 3, 56, 84), []
    dist.destroy_process_group()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(file, size)
    for name in ("first", "second"):
        dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=size)
        with torch.no_grad():
            for _ in range(3):
                found.append(model(images, group=dist.group.WORLD, outputs=["camera"]).pose_enc.sum().item())
        threads = [thread.name for thread in threading.enumerate()].count("page4d-watch")
        dist.destroy_process_group()
    return len(set(found)), threads


def test_groups_one_after_the_other(fresh_team):
    """The thread of each ends with it."""
    for answer in fresh_team.run(3, again, str(fresh_team.folder / "store")):
        assert answer == (1, 1)


def refuse_alone(group):
    """How long a refusal takes on a rank whose peers do not call."""
    model = Page4D(preset("small").replace(depth=4, masked_blocks=(1, 3), mask_after=1, kept_layers=(0, 1, 2, 3), track=None)).eval()
    images, seconds = torch.rand(1, 2, 3, 56, 84), 0.0
    if group.rank() == 1:
        start = time.monotonic()
        for _ in range(3):
            with pytest.raises(InputError):
                model(images[:, :0], group=group)
        seconds = time.monotonic() - start
    else:
        time.sleep(1)
        for _ in range(3):
            with pytest.raises(RankError, match="rank 1 has no frame"):
                model(images, group=group)
    with torch.no_grad():
        model(images, group=group)
    return seconds


class JustLate:
    """A piece of work that is done right after a wait for it has ended."""

    def __init__(self, work):
        self.work, self.waits = work, 0

    def wait(self, timeout):
        self.waits += 1
        if self.waits == 1:
            self.work.wait()
            raise RuntimeError("Operation timed out!")
        return self.work.wait(timeout)

    def is_completed(self):
        return self.work.is_completed()


def just_late(group):
    ranks = Ranks.of(group, torch.device("cpu"))
    send = torch.arange(3.0) + 10 * ranks.rank
    pending = ranks.start("test", send, [1, 1, 1], torch.empty(3), [1, 1, 1])
    pending.work = JustLate(pending.work)
    return pending.wait().tolist()


def test_what_comes_just_after_a_wait_counts(fresh_team):
    """A wait of half a second ends, and then the exchange is complete: no connection broke."""
    assert fresh_team.run(3, just_late) == [[0, 10, 20], [1, 11, 21], [2, 12, 22]]


def one_does_not_call(group):
    """What rank 0 raises, if rank 1 has used the group before or not, and after how many seconds."""
    if group.rank() > 0:
        time.sleep(20)
        return None
    start = time.monotonic()
    with pytest.raises(RankError) as error:
        Page4D(preset("small").replace(track=None))(torch.rand(1, 2, 3, 56, 84), group=group)
    return str(error.value), time.monotonic() - start


def test_ranks_that_do_not_call_the_model(fresh_team):
    words, seconds = fresh_team.run(3, one_does_not_call)[0]
    assert words == "ranks 1, 2 did not call the model within 8 s: all ranks of a group must" and seconds < LATE


def test_a_refusal_does_not_wait(fresh_team):
    assert max(fresh_team.run(3, refuse_alone)) < 8


@pytest.mark.parametrize(
    ("kind", "who", "reason"),
    [
        ("exception", 1, "rank 1: something is wrong"),
        ("memory", 0, "rank 0: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB)"),
        ("interrupt", 2, "rank 2: interrupted"),
        ("killed", 1, "rank 1 exited unexpectedly or does not respond"),
        ("stopped", 2, "rank 2 exited unexpectedly or does not respond"),
        ("hangs", 1, "rank 1 did not come to the exchange of ring within 8 s: it hangs, or is much slower"),
        ("killed", 0, "the process that keeps the common store has ended"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_all_end_with_the_reason_of_the_first(fresh_team, kind, who, reason, backward):
    """Rank 0 keeps the store here. The group is of no use afterwards, and says so."""
    found = fresh_team.outlive(
        broken_pass, kind, who, backward, seconds=100, without=who if kind in ("killed", "stopped", "hangs") else None
    )
    for rank, answer in enumerate(found):
        if rank == who:
            if kind in ("exception", "memory", "interrupt"):
                assert answer[0] == {"exception": "ValueError", "memory": "OutOfMemoryError", "interrupt": "KeyboardInterrupt"}[kind]
            continue
        name, message, seconds, again = answer
        assert name == "RankError" and message.startswith(reason), answer
        assert seconds < LATE, answer
        assert again.startswith(reason), answer
