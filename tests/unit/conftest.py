"""Tiny LeRobot data sets in the documented layouts, written by pyarrow and PyAV alone."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SIZE = (64, 80)
FPS = 10
TASKS = ("push", "lift")


class LeRobotWriter:
    """Writes data sets with random numbers and frames whose brightness says which one they are."""

    def __init__(self) -> None:
        self.pa = pytest.importorskip("pyarrow")
        self.pq = pytest.importorskip("pyarrow.parquet")
        self.av = pytest.importorskip("av")

    def __call__(
        self,
        root: Path,
        version: str = "v3.0",
        lengths: Sequence[int] = (7, 4, 9),
        cameras: Sequence[str] = ("top",),
        mode: str = "video",
        per_file: int = 2,
    ) -> dict[str, Any]:
        """Write one; returns the arrays that are in it."""
        rng = np.random.default_rng(0)
        total = sum(lengths)
        state = rng.normal(size=(total, 3)).astype(np.float32)
        action = rng.normal(size=(total, 2))
        names = [f"observation.images.{camera}" for camera in cameras]
        kept = names if mode == "image" else []
        ends = np.cumsum(lengths)
        rows, done = [], 0
        for number, length in enumerate(lengths):
            part = slice(done, done + length)
            rows.append(self._table(number, part, state, action, kept))
            done += length
        v3 = version == "v3.0"
        group = per_file if v3 else 1
        for file, first in enumerate(range(0, len(lengths), group)):
            tables = rows[first : first + group]
            self._write(self.pa.concat_tables(tables), self.data_file(root, file, v3))
            if mode == "video":
                count = sum(lengths[first : first + group])
                start = int(ends[first]) - lengths[first]
                for name in names:
                    self.video(self.video_file(root, name, file, v3), start, count)
        write_meta = self._meta3 if v3 else self._meta2
        write_meta(root, lengths, names if mode == "video" else [], state, action, group)
        camera = {"dtype": mode, "shape": [*SIZE, 3], "names": ["height", "width", "channels"]}
        numbers = {
            "observation.state": {"dtype": "float32", "shape": [3], "names": ["a", "b", "c"]},
            "action": {"dtype": "float64", "shape": [2], "names": {"motors": ["x", "y"]}},
            "next.reward": {"dtype": "float32", "shape": [1], "names": None},
        }
        place = "chunk-{chunk_index:03d}/file-{file_index:03d}"
        place2 = "chunk-{episode_chunk:03d}"
        file2 = "episode_{episode_index:06d}"
        info = {
            "codebase_version": version,
            "robot_type": "arm",
            "total_episodes": len(lengths),
            "total_frames": total,
            "total_tasks": 2,
            "chunks_size": 1000,
            "fps": FPS,
            "data_path": f"data/{place}.parquet" if v3 else f"data/{place2}/{file2}.parquet",
            "video_path": f"videos/{{video_key}}/{place}.mp4"
            if v3
            else f"videos/{place2}/{{video_key}}/{file2}.mp4",
            "features": {**numbers, **dict.fromkeys(names, camera)},
        }
        (root / "meta" / "info.json").write_text(json.dumps(info))
        return {"state": state, "action": action, "levels": levels(np.arange(total))}

    def data_file(self, root: Path, file: int, v3: bool = True) -> Path:
        """Where a parquet file is."""
        name = f"file-{file:03d}" if v3 else f"episode_{file:06d}"
        return root / "data" / "chunk-000" / f"{name}.parquet"

    def video_file(self, root: Path, name: str, file: int, v3: bool = True) -> Path:
        """Where an mp4 file is."""
        if v3:
            return root / "videos" / name / "chunk-000" / f"file-{file:03d}.mp4"
        return root / "videos" / "chunk-000" / name / f"episode_{file:06d}.mp4"

    def video(self, path: Path, first: int, count: int, fps: int = FPS, skip: int = -1) -> None:
        """A video of ``count`` frames, without the one numbered ``skip``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=fps, options={"g": "4", "crf": "10"})
            stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
            for i in range(count):
                if i == skip:
                    continue
                frame = self.av.VideoFrame.from_ndarray(picture(first + i), format="rgb24")
                frame.pts = i
                frame.time_base = 1 / stream.average_rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))

    def edit(self, path: Path, change: Callable[[Any], Any]) -> None:
        """Replace a parquet file by what ``change`` makes of its table."""
        self._write(change(self.pq.ParquetFile(path).read()), path)

    def edit_info(self, root: Path, **values: Any) -> None:
        """Replace entries of meta/info.json."""
        path = root / "meta" / "info.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    def _table(self, number: int, part: slice, state: Any, action: Any, pictures: list[str]) -> Any:
        steps = np.arange(part.stop - part.start)
        table = {
            "observation.state": self._lists(state[part]),
            "action": self._lists(action[part]),
            "next.reward": np.zeros(len(steps), np.float32),
            "timestamp": (steps / FPS).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full(len(steps), number),
            "index": np.arange(part.start, part.stop),
            "task_index": np.full(len(steps), number % 2),
        }
        for name in pictures:
            cells = [{"bytes": png(picture(i)), "path": None} for i in range(part.start, part.stop)]
            table[name] = self.pa.array(cells)
        return self.pa.table(table)

    def _lists(self, rows: Any) -> Any:
        return self.pa.FixedSizeListArray.from_arrays(self.pa.array(rows.ravel()), rows.shape[1])

    def _write(self, table: Any, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.pq.write_table(table, path)

    def _meta3(
        self, root: Path, lengths: Sequence[int], videos: list[str], s: Any, a: Any, group: int
    ) -> None:
        rows, ends = [], np.cumsum(lengths).tolist()
        for number, (length, end) in enumerate(zip(lengths, ends, strict=True)):
            file = {"chunk_index": 0, "file_index": number // group}
            base = ends[number // group * group] - lengths[number // group * group]
            row: dict[str, Any] = {
                "episode_index": number,
                "tasks": [TASKS[number % 2]],
                "length": length,
                "dataset_from_index": end - length,
                "dataset_to_index": end,
                **{f"data/{key}": value for key, value in file.items()},
            }
            for name in videos:
                row |= {f"videos/{name}/{key}": value for key, value in file.items()}
                row[f"videos/{name}/from_timestamp"] = (end - length - base) / FPS
                row[f"videos/{name}/to_timestamp"] = (end - base) / FPS
            for name, values in (("observation.state", s), ("action", a)):
                row[f"stats/{name}/min"] = values[end - length : end].min(0).tolist()
                row[f"stats/{name}/max"] = values[end - length : end].max(0).tolist()
            rows.append(row)
        file = root / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
        self._write(self.pa.Table.from_pylist(rows), file)
        tasks = {"task_index": [0, 1], "__index_level_0__": list(TASKS)}
        self._write(self.pa.table(tasks), root / "meta" / "tasks.parquet")

    def _meta2(
        self, root: Path, lengths: Sequence[int], videos: list[str], s: Any, a: Any, group: int
    ) -> None:
        ends = np.cumsum(lengths).tolist()
        episodes, stats = [], []
        for number, (length, end) in enumerate(zip(lengths, ends, strict=True)):
            task = [TASKS[number % 2]]
            episodes.append({"episode_index": number, "tasks": task, "length": length})
            own = {
                name: {
                    "min": values[end - length : end].min(0).tolist(),
                    "max": values[end - length : end].max(0).tolist(),
                }
                for name, values in (("observation.state", s), ("action", a))
            }
            stats.append({"episode_index": number, "stats": own})
        tasks = [{"task_index": i, "task": text} for i, text in enumerate(TASKS)]
        (root / "meta").mkdir(parents=True)
        files = (("episodes", episodes), ("episodes_stats", stats), ("tasks", tasks))
        for name, rows in files:
            text = "\n".join(json.dumps(row) for row in rows)
            (root / "meta" / f"{name}.jsonl").write_text(text)


def levels(number: Any) -> Any:
    """Brightness of a frame."""
    return 40 + number * 7 % 170


def picture(number: int) -> Any:
    """One grey frame; frames beside each other differ."""
    return np.full((*SIZE, 3), levels(number), np.uint8)


def png(frame: Any) -> bytes:
    """As a file."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def write_lerobot() -> LeRobotWriter:
    """``write(root, version="v3.0", lengths=(7, 4, 9), cameras=("top",), mode="video")``."""
    return LeRobotWriter()
