"""How fast a LeRobot data set with two cameras of 480 x 640 becomes a store, against its decoding.

``python conversion.py make FOLDER [EPISODES [STEPS]]`` writes it (AV1, as lerobot records);
``python conversion.py time FOLDER OUT.json [PAIRS]`` decodes every video to RGB and nothing else,
then converts, in turn, each in a process of its own. No LeRobot is needed.
"""

from __future__ import annotations

import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

HEIGHT, WIDTH = 480, 640
CAMERAS = ("top", "wrist")
_CONVERTED = ".converted.zarr"


def frames(camera: int, episode: int, steps: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Eight frames at a time of a texture that moves, with a little noise."""
    rng = np.random.default_rng(camera)
    coarse = rng.integers(30, 226, (70, 90, 3)).astype(np.float32)
    texture = coarse.repeat(10, 0).repeat(10, 1).astype(np.int16)
    noise = rng.integers(-3, 4, (8, HEIGHT, WIDTH, 3), dtype=np.int16)
    for first in range(0, steps, 8):
        part = []
        for step in range(first, min(first + 8, steps)):
            y = int(60 + 50 * np.cos(step / 25 + episode))
            x = int(60 + 50 * np.sin(step / 20 + episode))
            part.append(texture[y : y + HEIGHT, x : x + WIDTH] + noise[step % 8])
        yield np.stack(part).astype(np.uint8)


def make(folder: Path, episodes: int = 50, steps: int = 60) -> None:
    """Write the data set."""
    from cmpolicy_data import ReplayBuffer
    from cmpolicy_data.convert.lerobot.writing import write
    from cmpolicy_data.parts import Parts

    attrs = {"control_hz": 30, "tasks": ["push"] * episodes}
    buffer = ReplayBuffer.create(folder.with_suffix(".source.zarr"), attrs=attrs)
    rng = np.random.default_rng(0)
    for episode in range(episodes):
        numbers = rng.normal(size=(2, steps, 14)).astype(np.float32)
        shape = (steps, HEIGHT, WIDTH, 3)
        pictures = {
            f"images.{name}": Parts(shape, np.dtype(np.uint8), frames(i, episode, steps))
            for i, name in enumerate(CAMERAS)
        }
        buffer.append_episode({"state": numbers[0], "action": numbers[1], **pictures})
    write(buffer.path, folder)
    shutil.rmtree(buffer.path)


def decode(folder: Path) -> int:
    """Decode all videos to RGB, two files at a time; the number of frames."""
    import av

    def one(file: Path) -> int:
        count = 0
        with av.open(str(file)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            for frame in container.decode(video=0):
                frame.to_ndarray(format="rgb24")
                count += 1
        return count

    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(one, sorted(folder.glob("videos/**/*.mp4"))))


def convert(folder: Path) -> int:
    """Convert; the number of frames."""
    from cmpolicy_data.convert.lerobot.reading import read

    report = read(folder, folder.with_suffix(_CONVERTED))
    return report.steps * len(report.cameras)


def once(what: str, folder: Path) -> None:
    """Do it in this process and print seconds, processor seconds, frames and peak MiB."""
    began, cpu = time.perf_counter(), time.process_time()
    count = {"decode": decode, "convert": convert}[what](folder)
    took = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    shutil.rmtree(folder.with_suffix(_CONVERTED), ignore_errors=True)
    print(json.dumps({**took, "frames": count, "peak_mib": peak}))


def measure(folder: Path, out: Path, pairs: int = 5) -> None:
    """Both in turn, and the medians."""
    runs: dict[str, list[dict[str, Any]]] = {"decode": [], "convert": []}
    for _ in range(pairs):
        for what, found in runs.items():
            command = [sys.executable, __file__, what, str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout))
            print(what, done.stdout.strip(), flush=True)
    speeds = [a["seconds"] / b["seconds"] for a, b in zip(*runs.values(), strict=True)]
    cpus = [a["cpu_seconds"] / b["cpu_seconds"] for a, b in zip(*runs.values(), strict=True)]
    result = {
        "command": "python conversion.py make FOLDER; python conversion.py time FOLDER OUT.json",
        "machine": {"cpu": cpu_name(), "python": platform.python_version()},
        "speed_of_decoding_alone": median(speeds),
        "speed_of_decoding_alone_cpu": median(cpus),
        "peak_mib": max(run["peak_mib"] for run in runs["convert"]),
        "runs": runs,
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    print({k: v for k, v in result.items() if k != "runs"})


def cpu_name() -> str:
    """Model, cores, and the vector units that matter."""
    found = dict(
        line.split(":", 1)
        for line in subprocess.run(["lscpu"], capture_output=True, text=True).stdout.splitlines()
        if ":" in line
    )
    flags = found.get("Flags", "").split()
    units = [u for u in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if u in flags]
    return f"{found['Model name'].strip()}, {found['CPU(s)'].strip()} cores, {' '.join(units)}"


if __name__ == "__main__":
    task, place, *rest = sys.argv[1:]
    if task == "make":
        make(Path(place), *map(int, rest))
    elif task == "time":
        measure(Path(place), Path(rest[0]), *map(int, rest[1:]))
    else:
        once(task, Path(place))
