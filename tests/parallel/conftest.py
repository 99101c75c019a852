from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import pytest

MEMBER = Path(__file__).with_name("member.py")
LARGEST = 4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Team:
    """Processes that stay, with a gloo group of the first n of them for each n."""

    def __init__(self, folder: Path):
        self.folder, self.processes, self.pipes = folder, [], []

    def start(self) -> None:
        address = str(self.folder / f"pipe{len(list(self.folder.iterdir()))}")
        listener = Listener(address, "AF_UNIX", backlog=LARGEST)
        port = str(free_port())
        for rank in range(LARGEST):
            own = {"RANK": str(rank), "WORLD_SIZE": str(LARGEST), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
            self.processes.append(subprocess.Popen([sys.executable, str(MEMBER), address], env=os.environ | own))
        pipes: dict[int, Connection] = {}
        for _ in range(LARGEST):
            pipe = listener.accept()
            pipes[pickle.loads(pipe.recv_bytes())] = pipe
        self.pipes = [pipes[rank] for rank in range(LARGEST)]
        listener.close()

    def run(self, ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(group, *args)` returns on each rank. It is found by its name in its file."""
        if not self.pipes:
            self.start()
        call = pickle.dumps((function.__code__.co_filename, function.__name__, ranks, args))
        for pipe in self.pipes[:ranks]:
            pipe.send_bytes(call)
        answers = [pickle.loads(pipe.recv_bytes()) for pipe in self.pipes[:ranks]]
        problems = [f"rank {rank}:\n{problem}" for rank, (_, problem) in enumerate(answers) if problem]
        if problems:
            self.stop()  # the group may be of no use any more
            raise AssertionError("\n".join(problems))
        return [result for result, _ in answers]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes, self.pipes = [], []


@pytest.fixture(scope="session")
def team(tmp_path_factory):
    """`team.run(ranks, function, *args)` on several processes."""
    team = Team(tmp_path_factory.mktemp("team"))
    yield team
    team.stop()
