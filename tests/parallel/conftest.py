from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
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
    """Processes with a gloo group of the first n of them for each n."""

    def __init__(self, folder: Path, size: int = LARGEST, **variables: str):
        self.folder, self.size, self.variables = folder, size, variables
        self.processes: list[subprocess.Popen] = []
        self.pipes: list[Connection] = []

    def start(self) -> None:
        address, port = str(self.folder / f"pipe{time.monotonic_ns()}"), str(free_port())
        listener = Listener(address, "AF_UNIX", backlog=self.size)
        common = {"WORLD_SIZE": str(self.size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        for rank in range(self.size):
            env = os.environ | common | self.variables | {"RANK": str(rank)}
            self.processes.append(subprocess.Popen([sys.executable, str(MEMBER), address], env=env))
        pipes: dict[int, Connection] = {}
        for _ in range(self.size):
            pipe = listener.accept()
            pipes[pickle.loads(pipe.recv_bytes())] = pipe
        self.pipes = [pipes[rank] for rank in range(self.size)]
        listener.close()

    def send(self, ranks: int, function: Callable[..., Any], *args: Any) -> None:
        if not self.pipes:
            self.start()
        call = pickle.dumps((function.__code__.co_filename, function.__name__, ranks, args))
        for pipe in self.pipes[:ranks]:
            pipe.send_bytes(call)

    def run(self, ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(group, *args)` returns on each rank. It is found by its name in its file."""
        self.send(ranks, function, *args)
        answers = [pickle.loads(pipe.recv_bytes()) for pipe in self.pipes[:ranks]]
        problems = [f"rank {rank}:\n{problem}" for rank, (_, problem) in enumerate(answers) if problem]
        if problems:
            self.stop()  # the group may be of no use any more
            raise AssertionError("\n".join(problems))
        return [result for result, _ in answers]

    def outlive(self, function: Callable[..., Any], *args: Any, seconds: float, without: int | None) -> list[Any]:
        """As `run`, for a function that a rank does not survive or does not leave: None for it, and for all that take longer."""
        self.send(self.size, function, *args)
        end, answers = time.monotonic() + seconds, []
        for rank, pipe in enumerate(self.pipes):
            try:
                answers.append(
                    None if rank == without else pickle.loads(pipe.recv_bytes())[0] if pipe.poll(max(0, end - time.monotonic())) else None
                )
            except EOFError:
                answers.append(None)
        return answers

    def stop(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
        self.processes, self.pipes = [], []


@pytest.fixture(scope="session")
def team(tmp_path_factory):
    """`team.run(ranks, function, *args)` on up to four processes, which stay."""
    team = Team(tmp_path_factory.mktemp("team"))
    yield team
    team.stop()


@pytest.fixture
def fresh_team(tmp_path):
    """Three processes for one test, that wait eight seconds for each other."""
    team = Team(tmp_path, 3, PAGE4D_DEADLINE="8")
    yield team
    team.stop()
