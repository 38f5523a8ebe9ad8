"""A file of scripted demonstrations, in robomimic's layout."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cmpolicy_data.generate.request import FIRST_EVALUATION_SEED, check_request
from cmpolicy_data.generate.robomimic.attempt import VERSION, get_skill
from cmpolicy_data.generate.robomimic.crew import attempts
from cmpolicy_data.robomimic_file import RobomimicFileError, import_h5py
from cmpolicy_data.robomimic_writer import DemoWriter
from cmpolicy_envs.robomimic_args import default_env_args
from cmpolicy_envs.robomimic_tasks import get_task
from cmpolicy_envs.robosuite_make import import_robosuite

GENERATOR = "cmpolicy_data.generate.robomimic"
_PATIENCE = 25  # failed attempts in a row after which it is the simulator, not bad luck
_VALID_SHARE = 0.1


@dataclass(frozen=True)
class GenerateReport:
    """What a call of `generate` did.

    Attributes:
        task: that was demonstrated.
        attempted, kept: episodes. steps: of the kept ones. seconds: it took.
        path: of the file.
    """

    task: str
    attempted: int
    kept: int
    steps: int
    seconds: float
    path: Path

    @property
    def success_rate(self) -> float:
        return self.kept / self.attempted


def generate(
    out: str | Path,
    *,
    task: str,
    episodes: int,
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> GenerateReport:
    """Write ``episodes`` successful demonstrations of a task.

    Attempts start from the seeds ``seed``, ``seed + 1``, ... of the environment; those that fail
    are left out. The file appears whole or not at all, and does not depend on ``workers``. A tenth
    of the demonstrations is in ``mask/valid``, the others in ``mask/train``.

    Args:
        out: the file, ``.hdf5``; replaced if an earlier call wrote it.
        task: ``lift``, ``can`` or ``square``.
        episodes: at least 1.
        seed: of the first attempt, below 100000 with all that follow.
        workers: simulator processes; with 1 the work is done in this one.
        progress: called with kept and attempted after each attempt.

    Raises:
        ValueError: an argument out of range, or a task without an expert.
        FileNotFoundError: the folder of ``out`` is not there.
        FileExistsError: ``out`` is something that this function did not write.
        ImportError: robosuite or h5py is not installed; names the extra.
        AttemptError: a simulator process died or failed; names the seed.
        RuntimeError: attempt after attempt fails.
    """
    out = Path(out).expanduser()
    task = get_task(task).name
    get_skill(task)  # raises
    check_request("robomimic", out, (".hdf5", ".h5"), episodes, seed, workers, _is_ours)
    import_robosuite()
    began = time.monotonic()
    attrs = {
        "generator": GENERATOR,
        "generator_version": VERSION,
        "seed": seed,
        "command": f"cmpolicy data generate robomimic task={task} episodes={episodes} seed={seed}",
    }
    attempted = failed = kept = 0
    with (
        DemoWriter(out, default_env_args(task).to_json(), attrs) as writer,
        closing(attempts(task, range(seed, FIRST_EVALUATION_SEED), workers)) as source,
    ):
        for attempt in source:
            attempted += 1
            failed = failed + 1 if attempt.recording is None else 0
            if attempt.recording is not None:
                writer.add(attempt.recording)
                kept += 1
            if progress is not None:
                progress(kept, attempted)
            if kept == episodes:
                break
            if failed == _PATIENCE:
                raise RuntimeError(
                    f"{failed} attempts in a row failed (last seed {attempt.seed}). Check the "
                    "installed robosuite and mujoco versions."
                )
        if kept < episodes:
            raise RuntimeError(f"Only {kept} of {episodes} succeeded before seeds ran out.")
        steps = writer.steps
        for name, numbers in _masks(episodes, seed).items():
            writer.add_mask(name, [f"demo_{number}" for number in numbers])
    return GenerateReport(task, attempted, kept, steps, time.monotonic() - began, out)


def _masks(episodes: int, seed: int) -> dict[str, list[int]]:
    """A tenth at random for validation, at least one where there are two."""
    count = max(1, round(_VALID_SHARE * episodes)) if episodes > 1 else 0
    order = np.random.default_rng([VERSION, seed, episodes]).permutation(episodes).tolist()
    masks = {"train": sorted(order[count:])}
    return masks | ({"valid": sorted(order[:count])} if count else {})


def _is_ours(path: Path) -> bool:
    h5py = import_h5py()
    try:
        with h5py.File(path, "r") as file:
            return bool(file["data"].attrs.get("generator") == GENERATOR)
    except (OSError, KeyError, AttributeError, RobomimicFileError):
        return False
