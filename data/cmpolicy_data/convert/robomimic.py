"""robomimic's HDF5 files, converted to a store that policies are trained on.

The store has ``data/<obs key>`` (float32; images as they are), ``data/action`` (float32),
``data/state`` (float64, the simulator's flattened states: time, qpos, qvel), the scenes (see
`scenes`) and these attributes: ``task``, ``env_args`` (JSON, in robosuite 1.5's terms), ``actions``
(``delta`` | ``absolute``), ``obs`` (the keys), ``demos`` (names of the episodes), ``masks`` (filter
-> numbers of its episodes), ``source`` (name and SHA-256 of the file).

Delta actions are as in the file: per arm position 3, rotation 3, gripper 1, each in [-1, 1].
Absolute actions have 10 numbers per arm (see `goals`). The sign of a gripper's quaternion is made
the one that the environment gives (`cmpolicy_envs.robomimic_signs`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import numpy.typing as npt

from cmpolicy_data.convert.goals import Recording, absolute_actions, recover_goals
from cmpolicy_data.convert.recorded_env import RecordedEnv, recorded_env
from cmpolicy_data.convert.writing import ConvertedEpisode, check_target, write_store
from cmpolicy_data.robomimic_file import Array, Demo, RobomimicFile, RobomimicFileError
from cmpolicy_envs.robomimic_signs import canonical_observation

CONVERTER = "cmpolicy_data.convert.robomimic"
VERSION = 1
ACTIONS = ("delta", "absolute")
_RESERVED = ("action", "state")

Actions = Literal["delta", "absolute"]


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        path: of the store. task: its Robomimic task. actions: ``delta`` or ``absolute``.
        obs: the observation keys. left_out: those of the file that were not taken.
        masks: filter -> number of its episodes.
        goals_from_file: episodes whose absolute actions the file held already (``actions_abs``).
    """

    path: Path
    task: str
    actions: str
    obs: tuple[str, ...]
    left_out: tuple[str, ...]
    episodes: int
    steps: int
    masks: dict[str, int]
    goals_from_file: int
    seconds: float


def convert(
    source: str | Path,
    out: str | Path,
    *,
    actions: str = "delta",
    keys: Sequence[str] | None = None,
    filter_key: str | None = None,
    states: bool = True,
    cameras: Sequence[str] = (),
    camera_size: int = 84,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Convert a robomimic file to the store ``out``, which appears whole or not at all.

    Args:
        source: the HDF5 file, with observations.
        out: a path that ends in .zarr (a folder) or .zip. A store there is replaced only if a
            converter wrote it.
        actions: ``"delta"``, or ``"absolute"``: the controller's goals, from ``actions_abs`` where
            the file has it in the world frame, else recovered from the states in the simulator.
        keys: observation keys; default all that are one vector per step.
        filter_key: convert only the demonstrations of this filter (``train``).
        states: keep the states and scenes, most of the bytes: training does without them, `replay`
            does not.
        cameras: to render at the recorded states, such as ``agentview``; each becomes the key
            ``<camera>_image``, (H, W, 3) uint8.
        camera_size: height and width of these images, px.
        workers: simulator processes that recover absolute actions.
        progress: called with (done, all) after each demonstration.

    Raises:
        FileNotFoundError, FileExistsError, RobomimicFileError, EnvArgsError, RecordedEnvError,
        ValueError: files, settings or demonstrations that cannot be used; each says what to do.
        ImportError: h5py, or robosuite where it is needed, is not installed.
    """
    began = time.monotonic()
    source, out = Path(source).expanduser(), Path(out).expanduser()
    if actions not in ACTIONS:
        raise ValueError(f"actions must be {' or '.join(ACTIONS)}, got {actions!r}.")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}.")
    check_target(out)
    with RobomimicFile.open(source) as file:
        env = recorded_env(file.env_args, str(source))
        if env.actions == "absolute" and actions == "delta":
            raise RobomimicFileError(
                f"{source}: its actions are absolute (the controller's input_type); they cannot be "
                "converted to deltas. Use actions=absolute."
            )
        names = file.select(filter_key)
        if not names:
            raise RobomimicFileError(f"{source}: the filter {filter_key!r} is empty.")
        obs_keys, found = _obs_keys(file, keys), file.obs_keys()
        source_hash = _sha256(source)
        numbers = {name: i for i, name in enumerate(names)}
        masks = {
            key: [numbers[name] for name in chosen if name in numbers]
            for key, chosen in file.masks.items()
        }
        render = _renderer(env, tuple(cameras), camera_size) if cameras else None
        reader = _Reader(file, env, obs_keys, names, states, render)
        obs_keys = [*obs_keys, *(f"{camera}_image" for camera in cameras)]
        episodes = reader.delta() if actions == "delta" else reader.absolute(workers)
        attrs = {
            "version": VERSION,
            "task": env.task.name,
            "env_args": env.env_args.to_json(),
            "actions": actions,
            "obs": obs_keys,
            "demos": list(names),
            "masks": masks,
            "source": {"name": source.name, "sha256": source_hash},
        }
        steps = write_store(out, CONVERTER, _counted(episodes, len(names), progress), attrs)
    return ConversionReport(
        path=out,
        task=env.task.name,
        actions=actions,
        obs=tuple(obs_keys),
        left_out=tuple(key for key in found if key not in obs_keys),
        episodes=len(names),
        steps=steps,
        masks={key: len(chosen) for key, chosen in masks.items()},
        goals_from_file=reader.goals_from_file,
        seconds=time.monotonic() - began,
    )


class _Reader:
    """Reads demonstrations in order and gives episodes with delta or absolute actions."""

    def __init__(
        self,
        file: RobomimicFile,
        env: RecordedEnv,
        keys: list[str],
        names: tuple[str, ...],
        states: bool,
        render: Callable[[Recording], dict[str, npt.NDArray[np.uint8]]] | None,
    ) -> None:
        self._render = render
        self._file, self._env, self._keys, self._names = file, env, keys, names
        self._states = states
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.goals_from_file = 0

    def delta(self) -> Iterator[ConvertedEpisode]:
        for demo in self._demos():
            yield self._episode(demo, demo.actions)

    def absolute(self, workers: int) -> Iterator[ConvertedEpisode]:
        # Goals that the file has are free; only the others cost a simulator, and only then one is
        # started. The demonstrations run ahead of the goals by a few, which wait in `pending`.
        pending: list[tuple[Demo, npt.NDArray[np.float64] | None]] = []

        def recordings() -> Iterator[Recording]:
            for demo in self._demos():
                known = self._known_goals(demo)
                pending.append((demo, known))
                if known is None:
                    yield self._recording(demo)

        def ready() -> Iterator[ConvertedEpisode]:
            while pending and pending[0][1] is not None:
                demo, known = pending.pop(0)
                self.goals_from_file += self._env.actions == "delta"
                yield self._episode(demo, absolute_actions(cast(Array, known)))

        for goals in recover_goals(self._env, recordings(), workers):
            yield from ready()
            demo, _ = pending.pop(0)
            yield self._episode(demo, absolute_actions(goals))
        yield from ready()

    def _demos(self) -> Iterator[Demo]:
        for name in self._names:
            demo = self._file.demo(name, self._keys)
            self._check(demo)
            yield demo

    def _check(self, demo: Demo) -> None:
        where = f"{self._file.path}, {demo.name}"
        if demo.actions.shape[1] != self._env.action_dim:
            raise RobomimicFileError(
                f"{where}: actions have {demo.actions.shape[1]} columns; {self._env.task.name} "
                f"under OSC_POSE takes {self._env.action_dim} (per arm position 3, rotation 3, "
                "gripper 1)"
            )
        shapes = {key: value.shape[1:] for key, value in demo.obs.items()}
        if demo.states is not None:
            shapes["states"] = demo.states.shape[1:]
        self._shapes = self._shapes or shapes
        if shapes != self._shapes:
            raise RobomimicFileError(
                f"{where}: has {shapes} per step, but {self._names[0]} has {self._shapes}"
            )

    def _known_goals(self, demo: Demo) -> npt.NDArray[np.float64] | None:
        if self._env.actions == "absolute":
            if not self._env.in_world:
                raise RobomimicFileError(
                    f"{self._file.path}: its actions are poses in the frame of the robot's base "
                    "(input_ref_frame); only those in the world frame can be converted"
                )
            return demo.actions
        return demo.goals if self._env.in_world else None

    def _recording(
        self, demo: Demo, use: str = "absolute actions are recovered from. Use actions=delta"
    ) -> Recording:
        if demo.states is None:
            raise RobomimicFileError(
                f"{self._file.path}: {demo.name} has no states, which {use}, "
                "or take a file with states."
            )
        return Recording(demo.states, demo.actions, demo.model)

    def _episode(self, demo: Demo, action: npt.NDArray[np.float64]) -> ConvertedEpisode:
        task = self._env.task
        obs = {key: canonical_observation(key, value, task) for key, value in demo.obs.items()}
        if self._render is not None:
            obs |= self._render(self._recording(demo, "images are rendered at. Leave cameras out"))
        if not self._states:
            return ConvertedEpisode(obs, action, None, None)
        return ConvertedEpisode(obs, action, demo.states, demo.model)


def _renderer(
    recorded: RecordedEnv, cameras: tuple[str, ...], size: int
) -> Callable[[Recording], dict[str, npt.NDArray[np.uint8]]]:
    """What the cameras see at the states of a recording; holds one simulator."""
    from cmpolicy_envs.robomimic import RobomimicEnv

    env = RobomimicEnv(
        recorded.task.name, env_args=recorded.env_args, cameras=cameras, camera_size=size
    )

    def render(recording: Recording) -> dict[str, npt.NDArray[np.uint8]]:
        env.reset_to(recording.states[0], recording.model)
        frames: dict[str, list[npt.NDArray[np.uint8]]] = {f"{name}_image": [] for name in cameras}
        for state in recording.states:
            env.sim.restore(state, None)
            for key, frame in env.camera_images().items():
                frames[key].append(frame)
        return {key: np.stack(rows) for key, rows in frames.items()}

    return render


def _obs_keys(file: RobomimicFile, keys: Sequence[str] | None) -> list[str]:
    chosen = file.low_dim_keys() if keys is None else list(dict.fromkeys(keys))
    if not chosen:
        raise RobomimicFileError("No observation keys were named; leave them out for all.")
    clash = [key for key in chosen if key in _RESERVED]
    if clash:
        raise RobomimicFileError(
            f"{file.path}: the observation {clash[0]!r} has the name of an array that every store "
            "has. Name the keys to convert without it."
        )
    return chosen


def _counted(
    episodes: Iterator[ConvertedEpisode], total: int, progress: Callable[[int, int], None] | None
) -> Iterator[ConvertedEpisode]:
    for done, episode in enumerate(episodes, 1):
        yield episode
        if progress is not None:
            progress(done, total)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
