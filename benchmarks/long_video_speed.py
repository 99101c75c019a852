"""Time and memory of `page4d infer --chunk` by the length of the video: `python -m benchmarks.long_video_speed --frames 100,300,1000,3000`.

The video is a rendered walk of 300 frames, again and again. Each length is a process of its own. Its memory is what belongs to no file
(Linux: RssAnon), at its peak, from the start of Python to the last file.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from page4d.data.synthetic import SyntheticScenes
from page4d.data.video import write_video

from .measure import provenance

COMMAND = "python -m benchmarks.long_video_speed"
ROUND = 300  # frames of the walk
STAGES = ("preprocess", "align", "loops", "pose graph", "join", "export")


def measure(video: Path, folder: Path, options: list[str]) -> dict[str, float]:
    """Frames per second of reading, passes, alignment and export; of passes and alignment alone; seconds by stage; peak memory in GiB."""
    command = [sys.executable, "-m", "page4d", "infer", str(video), "--out", str(folder), *options]
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, _anonymous(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        output.seek(0)
        report = output.read()
    if process.returncode:
        raise RuntimeError(report)
    found = re.search(r"^(\d+) frames in ([\d.]+) s", report, re.MULTILINE)
    assert found is not None, report
    stages = {name: float(line[1]) for name in STAGES if (line := re.search(rf"^{name} +\d+ +([\d.]+)", report, re.MULTILINE))}
    frames, spent = int(found[1]), float(found[2])
    whole = spent + stages["preprocess"] + stages["export"]
    return {"frames": frames, "whole": frames / whole, "chunks": frames / spent, "process_s": seconds, "GiB": peak / 2**20, **stages}


def _anonymous(pid: int) -> int:
    """KiB of a process that belong to no file; 0 if it has just ended."""
    try:
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", default="100,300,1000,3000", help="lengths, separated by commas (default: 100,300,1000,3000)")
    parser.add_argument("--chunk", default="24,6")
    parser.add_argument("--export", default="default")
    parser.add_argument("--json", type=Path, help="write the values here")
    args = parser.parse_args(argv)
    images = SyntheticScenes("walk", frames=ROUND, size=(112, 168), seed=60, moving=3)[0].images
    rows = []
    print("| frames | frames/s with reading and writing | frames/s of chunks | GiB | " + " | ".join(f"{name}, s" for name in STAGES) + " |")
    print("|---|" + "---:|" * (3 + len(STAGES)))
    with tempfile.TemporaryDirectory() as folder:
        for frames in map(int, args.frames.split(",")):
            video = write_video(Path(folder) / f"{frames}.mp4", images.repeat(-(-frames // ROUND), 1, 1, 1)[:frames], 30)
            row = measure(video, Path(folder) / str(frames), ["--chunk", args.chunk, "--export", args.export])
            rows.append(row)
            stages = " | ".join(f"{row.get(name, 0):.1f}" for name in STAGES)
            print(f"| {frames} | {row['whole']:.1f} | {row['chunks']:.1f} | {row['GiB']:.2f} | {stages} |", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({**provenance("cpu", COMMAND), "arguments": vars(args) | {"json": None}, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
