"""The record: which backends passed the battery on a device, and how fast they were. One JSON file per device in the user's cache folder.

A file holds one entry per environment: device, driver, versions, and a hash of the kernels' sources. Only the entry of exactly this
environment counts. The file is replaced as a whole under a lock, so readers see the old or the new one, and no writer loses another's.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import env, native
from ..versions import cpu_name, version
from .classes import part_in
from .errors import QualifyError

logger = logging.getLogger("page4d_kernels")

FORMAT = 2
KEPT = 8  # entries of a file: the newest environments
MARGIN = 1.05  # "auto" leaves the safe backend only for one that was faster by this factor
ENTIRE = "everything"  # in `Verdict.failed`, instead of a dtype and direction


@dataclass
class Verdict:
    """What was found about one backend of one op. A part is a dtype, a direction and a variant, such as "bfloat16 forward, head dim 64"."""

    passed: list[str] = field(default_factory=list)  # parts
    failed: dict[str, str] = field(default_factory=dict)  # by part, or ENTIRE: the reason
    skipped: dict[str, str] = field(default_factory=dict)  # by part, or ENTIRE: why it does not serve it or could not be judged
    timed: list[str] = field(default_factory=list)  # parts of which each class has had its turn
    lengths: list[int] = field(default_factory=list)  # token counts that were drawn at random

    def failure(self, part: str) -> str:
        """Why it must not serve `part`. A failure in one variant counts for all, and one in the forward for training too."""
        dtype, direction = part.partition(",")[0].split()
        wrong = (reason for key, reason in self.failed.items() if key.partition(",")[0] in (f"{dtype} forward", f"{dtype} {direction}"))
        return self.failed.get(ENTIRE) or next(wrong, "")

    def done(self, part: str) -> bool:
        """Whether a run has answered all about `part`."""
        return bool({part, ENTIRE} & {*self.skipped}) or bool(self.failure(part)) or (part in self.passed and part in self.timed)

    def merge(self, newer: Verdict) -> None:
        """Take over what was judged later. What was found about other parts stays."""
        judged = {*newer.passed, *newer.failed, *newer.skipped}
        crashed = {part for part, reason in self.failed.items() if part != ENTIRE and reason == self.failed.get(ENTIRE)}
        if crashed <= judged:  # the crash speaks for everything, until that part is judged again
            self.failed.pop(ENTIRE, None)
        if ENTIRE in newer.failed:
            self.passed, self.timed = [], []
        self.passed = [part for part in self.passed if part not in judged] + [part for part in newer.passed if part not in newer.failed]
        self.failed = {part: reason for part, reason in self.failed.items() if part not in judged} | newer.failed
        kept = {part: reason for part, reason in self.skipped.items() if part not in judged and (part != ENTIRE or not judged)}
        self.skipped = kept | newer.skipped
        self.timed = sorted({*(part for part in self.timed if part not in judged), *newer.timed})
        self.lengths = sorted({*self.lengths, *newer.lengths})


@dataclass
class OpRecord:
    backends: dict[str, Verdict] = field(default_factory=dict)
    times: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # by class and backend: its seconds, the safe backend's

    def factors(self, name: str) -> dict[str, float]:
        """By backend, how many times faster than the safe backend it was in this class; only those that passed."""
        part = part_in(name)
        timed = self.times.get(name, {})
        good = [name for name, verdict in self.backends.items() if name in timed and part in verdict.passed and not verdict.failure(part)]
        return {backend: timed[backend][1] / timed[backend][0] for backend in good}


@dataclass
class Entry:
    environment: dict[str, str]
    made: str = ""
    ops: dict[str, OpRecord] = field(default_factory=dict)
    tried: list[str] = field(default_factory=list)  # dtypes and directions for which all backends have had a run

    def verdict(self, op: str, backend: str) -> Verdict:
        """An empty one if it has not been judged."""
        return self.ops.get(op, OpRecord()).backends.get(backend, Verdict())

    def merge(self, newer: Entry) -> None:
        """Take over what a newer run found. What it did not look at stays. Nothing of `newer` is shared."""
        self.made = newer.made
        self.tried = sorted({*self.tried, *newer.tried})
        for op, found in newer.ops.items():
            mine = self.ops.setdefault(op, OpRecord())
            for backend, verdict in found.backends.items():
                mine.backends.setdefault(backend, Verdict()).merge(verdict)
                for name in mine.times:  # what was judged again loses its old times
                    if part_in(name) in verdict.passed or mine.backends[backend].failure(part_in(name)):
                        mine.times[name].pop(backend, None)
            for name, timed in found.times.items():
                mine.times.setdefault(name, {}).update({backend: list(pair) for backend, pair in timed.items()})
            mine.times = {name: timed for name, timed in mine.times.items() if timed}


# --- where and for what ------------------------------------------------------------------------------------------------------


def folder() -> Path:
    """`page4d` in XDG_CACHE_HOME, by default in ~/.cache; in the folder for temporary files if there is no home."""
    base = os.environ.get("XDG_CACHE_HOME", "").strip()
    try:
        return Path(base or "~/.cache").expanduser() / "page4d"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "page4d"


def path_of(device: torch.device) -> Path:
    name = re.sub(r"[^A-Za-z0-9]+", "-", _name(device)).strip("-").lower()
    return folder() / f"{name or 'device'}.json"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def environment(device: torch.device) -> dict[str, str]:
    """All that a result depends on. A record counts only where every item is equal."""
    facts = {"device": _name(device), "torch": torch.__version__, "packages": _packages(), "sources": sources()}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return facts | {"capability": f"{major}.{minor}", "driver": _driver(), "tiles": _tiles(), "model": _model()}
    level = "none" if native.why_missing() else native.LEVELS[native.level()]
    return facts | {"capability": level, "threads": str(torch.get_num_threads())}


@functools.cache
def _packages() -> str:
    names = ("triton", "flash-attn", "flash-attn-3", "flash-attn-4", "xformers")
    return " ".join([*(f"{name} {version(name)}" for name in names), f"cudnn {torch.backends.cudnn.version()}"])


@functools.cache
def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        text = ""
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found.group() if found else f"cuda {torch.version.cuda}"


@functools.cache
def sources() -> str:
    """A hash of the package's sources and its compiled library."""
    root = Path(__file__).parents[1]
    return _hash(root, [*root.rglob("*.py"), *root.glob("_native*"), *root.rglob("tables/*.json")])


@functools.cache
def _model() -> str:
    """The same of the model, whose CUDA graphs are judged on a GPU."""
    root = Path(__file__).parents[2] / "page4d" / "model"
    return _hash(root, list(root.rglob("*.py")))


def _hash(root: Path, paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _tiles() -> str:
    """A hash of the user's own table of tile sizes."""
    with contextlib.suppress(OSError):
        return hashlib.sha256(Path(env.get("PAGE4D_AUTOTUNE_TABLE")).read_bytes()).hexdigest()[:16]
    return "shipped"


# --- reading and writing -----------------------------------------------------------------------------------------------------


def _parse(text: str) -> list[Entry]:
    """The entries of a file. ValueError, TypeError, KeyError or AttributeError if it is damaged."""
    data = json.loads(text)
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']!r}, this version writes {FORMAT}")
    return [_entry(item) for item in data["entries"]]


def _entry(item: Any) -> Entry:
    def texts(value: Any) -> dict[str, str]:
        if not all(isinstance(x, str) for pair in value.items() for x in pair):
            raise ValueError(f"{value!r} should hold texts")
        return dict(value)

    def parts(value: dict[str, Any], *more: str) -> dict[str, Any]:
        for name in value:
            if name not in more and len(name.partition(",")[0].split()) != 2:
                raise ValueError(f"{name!r} is not a dtype and direction")
        return value

    def listed(value: Any, kind: type) -> list[Any]:
        if not isinstance(value, list) or not all(isinstance(x, kind) for x in value):
            raise ValueError(f"{value!r} is not a list of {kind.__name__}")
        return value

    def verdict(value: Any) -> Verdict:
        passed, timed = (list(parts(dict.fromkeys(listed(value[name], str)))) for name in ("passed", "timed"))
        failed, skipped = parts(texts(value["failed"]), ENTIRE), parts(texts(value["skipped"]), ENTIRE)
        return Verdict(passed, failed, skipped, timed, listed(value["lengths"], int))

    def pair(value: Any) -> list[float]:
        seconds, safe = (float(x) for x in value)
        if not (0 < seconds < float("inf") and 0 < safe < float("inf")):
            raise ValueError(f"{value!r} are not two times")
        return [seconds, safe]

    ops = {
        op: OpRecord(
            {name: verdict(value) for name, value in found["backends"].items()},
            {name: {backend: pair(value) for backend, value in timed.items()} for name, timed in found["times"].items()},
        )
        for op, found in item["ops"].items()
    }
    for name in (name for found in ops.values() for name in found.times):
        parts({part_in(name): name})
    return Entry(texts(item["environment"]), str(item["made"]), ops, listed(item["tried"], str))


def _read(path: Path) -> list[Entry]:
    """All entries of a file; none, with a warning, if it is damaged."""
    try:
        return _parse(path.read_text()) if path.is_file() else []
    except Exception as error:  # whatever a damaged file makes of the parser
        reason = f"{type(error).__name__}: {error}"
        logger.warning(f"{path} is not a record of qualified kernels and is ignored ({reason}): run `page4d qualify` to replace it")
        return []


def stored(device: torch.device) -> tuple[Entry | None, str]:
    """The entry of this device and environment, or None and the reason in words."""
    path = path_of(device)
    entries = _read(path)
    if not entries:
        return None, "there is no record of this device"
    wanted = environment(device)
    for entry in entries:
        if entry.environment == wanted:
            return entry, ""
    old = entries[-1].environment
    changed = ", ".join(name for name in wanted if old.get(name) != wanted[name])
    if old.get("device") != wanted["device"]:
        logger.warning(f"{path} is a record of {old.get('device')!r}, not of {wanted['device']!r}, and is ignored")
    return None, f"the record of {entries[-1].made} was made in another environment (other {changed})"


def save(device: torch.device, entry: Entry) -> Path:
    """Merge `entry` into the device's file.

    Raises:
        QualifyError: the folder or the file cannot be written. Nothing has changed then.
    """
    path = path_of(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            entries = _read(path)
            mine = next((found for found in entries if found.environment == entry.environment), None)
            others = [found for found in entries if found is not mine]
            mine = mine or Entry(entry.environment)
            mine.merge(entry)
            text = json.dumps({"format": FORMAT, "entries": [asdict(found) for found in [*others, mine][-KEPT:]]}, indent=1)
            _parse(text)  # what could not be read again must not replace what can
            temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            try:
                temporary.write_text(text)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise QualifyError(f"the record {path} cannot be written ({error.strerror or error})") from None
    forget()
    return path


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Whether this process holds the lock beside `path`. Where there are no file locks, it always does, and the last writer wins."""
    try:
        import fcntl
    except ImportError:
        yield True
        return
    with open(path.with_name(f"{path.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


@contextlib.contextmanager
def only_one(device: torch.device) -> Iterator[bool]:
    """Whether this process is the only one that judges the device's backends: two at once would spoil each other's times."""
    path = path_of(device).with_suffix(".judging")
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            alone = stack.enter_context(_locked(path, wait=False))
        except OSError:  # a folder that cannot be written; the caller keeps the result in the process
            alone = True
        yield alone


def writable(device: torch.device) -> bool:
    """Whether `save` can be expected to work."""
    path = path_of(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(path.parent, os.W_OK)


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


# --- what "auto" learns ------------------------------------------------------------------------------------------------------

_entries: dict[str, Entry | None] = {}  # by device name: read once per process
_aside = threading.Lock()
_asides: dict[str, Entry] = {}  # the same, of runs whose record could not be written


def mode() -> str:
    """PAGE4D_QUALIFY: auto or off."""
    name = env.get("PAGE4D_QUALIFY").lower() or "auto"
    if name not in ("auto", "off"):
        raise env.VariableError(f"PAGE4D_QUALIFY={name!r}: choose auto or off")
    return name


def forget() -> None:
    """Read the record again at the next call."""
    _entries.clear()
    _advice.cache_clear()


def keep_in_process(device: torch.device, entry: Entry) -> None:
    """Let this process follow `entry` although it cannot be saved."""
    with _aside:
        _asides.setdefault(_name(device), Entry(entry.environment)).merge(entry)
    forget()


def current(kind: str) -> Entry | None:
    """The entry that "auto" follows on a device type; None if there is none, or with PAGE4D_QUALIFY=off."""
    if mode() == "off" or kind not in ("cpu", "cuda"):
        return None
    name = _current_name(kind)
    if name not in _entries:
        _entries[name] = _asides.get(name) or stored(torch.device(kind))[0]
    return _entries[name]


def _current_name(kind: str) -> str:
    """Of the processor, or of the current GPU: there may be several kinds in one machine."""
    return _name_of(kind, torch.cuda.current_device() if kind == "cuda" and torch.cuda.is_available() else None)


@functools.cache
def _name_of(kind: str, index: int | None) -> str:
    return cpu_name() if kind == "cpu" else kind if index is None else torch.cuda.get_device_name(index)


@dataclass(frozen=True)
class Advice:
    """`faster`: the backends that beat the safe one in this class, the fastest first, with their factors."""

    faster: tuple[tuple[str, float], ...] = ()
    compared: tuple[str, ...] = ()  # all that were timed in this class
    failed: tuple[str, ...] = ()


def advice(op: str, kind: str, name: str) -> Advice:
    """What the record says about a class of problems of `op` on a device type."""
    return Advice() if mode() == "off" else _advice(op, kind, name, _current_name(kind))


@functools.cache
def _hint() -> None:
    logger.warning("no kernel has qualified on this GPU yet, so the safe ones are used: run `page4d qualify` once")


@functools.cache
def _advice(op: str, kind: str, name: str, device: str) -> Advice:
    entry = current(kind)
    if entry is None and kind == "cuda":
        _hint()
    if entry is None or op not in entry.ops:
        return Advice()
    found, part = entry.ops[op], part_in(name)
    factors = sorted(found.factors(name).items(), key=lambda item: -item[1])
    faster = tuple((backend, factor) for backend, factor in factors if factor >= MARGIN)
    failed = tuple(backend for backend, verdict in found.backends.items() if verdict.failure(part))
    return Advice(faster, tuple(found.times.get(name, ())), failed)


# What torch.compiler.assume_constant_result sets, without importing the compiler. It keeps the reading of the file from being traced.
advice._dynamo_marked_constant = True  # type: ignore[attr-defined]
