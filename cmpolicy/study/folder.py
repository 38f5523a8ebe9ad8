"""A study folder: one result file a job, so that a study can stop and go on at any point."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cmpolicy.files import write_atomically
from cmpolicy.schema import ConfigError
from cmpolicy.study.jobs import Job, fit_steps
from cmpolicy.study.run_job import run_job
from cmpolicy.study.truth import Truth, make_truth
from cmpolicy_eval.progress import progress_bar

#: Changes when results of before can no longer stand beside new ones.
STUDY_VERSION = 1


def claim_folder(folder: Path, size: str, jobs: Sequence[Job]) -> None:
    """Make the folder this study's own, or see that it is.

    Raises:
        ConfigError: it holds a study of another version or of other settings, or other files.
    """
    own = {"version": STUDY_VERSION, "size": size, "jobs": _fingerprint(jobs)}
    label = folder / "study.json"
    if not label.exists():
        if (folder / "jobs").exists():
            raise ConfigError(f"{folder} holds results but no study.json; choose another out=")
        (folder / "jobs").mkdir(parents=True, exist_ok=True)
        write_atomically(label, (json.dumps(own, indent=2) + "\n").encode())
        return
    try:
        found = json.loads(label.read_text())
    except ValueError as error:
        raise ConfigError(f"{label} is damaged ({error}); choose another out=") from error
    found = found if isinstance(found, dict) else {}
    for key, what in (("version", "version"), ("size", "size"), ("jobs", "list of jobs")):
        if found.get(key) != own[key]:
            raise ConfigError(
                f"{folder} holds a study of another {what} ({found.get(key)!r}, this one has "
                f"{own[key]!r}); choose another out=, or remove the folder to begin anew"
            )


def _fingerprint(jobs: Sequence[Job]) -> str:
    """Of what is run, in whatever order."""
    text = json.dumps(sorted(json.dumps(asdict(job), sort_keys=True) for job in jobs))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_jobs(folder: Path, size: str, jobs: Sequence[Job], workers: int) -> None:
    """Run what is not done yet, ``workers`` side by side, with a progress bar.

    Stopped by Ctrl-C or by a job that fails, it stops the others at once: files are written whole.

    Raises:
        Exception: whatever a job raises.
    """
    # spawn: a fork would copy torch's threads in whatever state they are
    context = multiprocessing.get_context("spawn")
    (folder / "truth").mkdir(exist_ok=True)
    targets = sorted({job.target for job in jobs})
    truths = [t for t in targets if not _truth_file(folder, t).exists()]
    todo = [job for job in jobs if not (folder / "jobs" / job.file).exists()]
    if not todo:
        return
    others = multiprocessing.active_children()
    with (
        ProcessPoolExecutor(workers, mp_context=context, initializer=_follow) as pool,
        progress_bar(len(truths) + len(jobs), unit="job", initial=len(jobs) - len(todo)) as bar,
    ):
        try:
            _finish((pool.submit(_write_truth, folder, name) for name in truths), bar.update)
            steps = fit_steps(size)
            _finish((pool.submit(_write_job, folder, job, steps) for job in todo), bar.update)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                if child not in others:
                    child.terminate()
            raise


def _follow() -> None:
    """In a worker: leave Ctrl-C to the study's process, and end with it, whatever ends that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _finish(futures: Iterable[Future[None]], update: Callable[[], Any]) -> None:
    left = set(futures)
    while left:
        done, left = wait(left, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
            update()


def _truth_file(folder: Path, target: str) -> Path:
    return folder / "truth" / f"{target}.npz"


def _write_truth(folder: Path, target: str) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **asdict(make_truth(target)))
    write_atomically(_truth_file(folder, target), buffer.getvalue())


def _write_job(folder: Path, job: Job, steps: int) -> None:
    with np.load(_truth_file(folder, job.target)) as arrays:
        truth = Truth(**{name: arrays[name] for name in arrays.files})
    result = run_job(job, truth, steps)
    content = json.dumps(result, allow_nan=False, separators=(",", ":")) + "\n"
    write_atomically(folder / "jobs" / job.file, content.encode())


def read_results(folder: Path, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """The results of all jobs, in their order.

    Raises:
        ConfigError: a job that is not done, or a damaged file.
    """
    results = []
    for job in jobs:
        path = folder / "jobs" / job.file
        try:
            results.append(json.loads(path.read_text()))
        except FileNotFoundError:
            raise ConfigError(f"{folder} lacks {job.file}; run the study to its end") from None
        except ValueError as error:
            raise ConfigError(f"{path} is damaged ({error}); remove it and run again") from error
    return results
