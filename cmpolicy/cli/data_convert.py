"""``cmpolicy data convert LAYOUT SOURCE``: other layouts of demonstrations to stores and back."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cmpolicy.cli.data_sources import showing


@dataclass(frozen=True, kw_only=True)
class RobomimicSettings:
    """Of ``convert robomimic``.

    Args:
        out: store to write (.zarr or .zip); null: named as the source.
        actions: delta, or absolute: target poses, 10 numbers per arm.
        obs: observation keys, those of images too; empty: all that are one vector per step.
        filter: convert only the demonstrations of this mask (train, valid, ...).
        states: false leaves out what only `replay` reads, most of the bytes.
        cameras: to render at the recorded states, such as [agentview,robot0_eye_in_hand].
        camera_size: height and width of these images, px.
        workers: simulator processes that recover absolute actions.
    """

    out: str | None = None
    actions: Literal["delta", "absolute"] = "delta"
    obs: tuple[str, ...] = ()
    filter: str | None = None
    states: bool = True
    cameras: tuple[str, ...] = ()
    camera_size: int = 84
    workers: int = 1


@dataclass(frozen=True, kw_only=True)
class AlohaSettings:
    """Of ``convert aloha``.

    Args:
        out: store to write (.zarr or .zip); null: named as the folder.
        control_hz: actions per second.
    """

    out: str | None = None
    control_hz: float = 50.0


@dataclass(frozen=True, kw_only=True)
class LeRobotSettings:
    """Of ``convert lerobot``.

    Args:
        out: store to write (.zarr or .zip); null: named as the source.
        revision: of an id of the hub: commit, tag or branch.
        check_stats: compare the values with the least and greatest that the metadata gives.
        threads: that decode videos; null: one per core.
    """

    out: str | None = None
    revision: str | None = None
    check_stats: bool = True
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class ToLeRobotSettings:
    """Of ``convert to-lerobot``.

    Args:
        out: folder to write; null: named as the store.
        task: what the episodes do, a text; null: the store's attribute tasks.
        fps: steps per second; null: the store's attribute control_hz.
        keys: of the store to write; empty: all.
        images: video, or image: pictures inside the parquet files, without loss.
        codec: of videos: av1 (as lerobot records), h264 or hevc.
        crf: quality of videos, smaller is better.
        robot_type: a name; null: the store's attribute.
        license: of the data, for its card on the hub, such as mit or cc-by-4.0.
    """

    out: str | None = None
    task: str | None = None
    fps: float | None = None
    keys: tuple[str, ...] = ()
    images: Literal["video", "image"] = "video"
    codec: Literal["av1", "h264", "hevc"] = "av1"
    crf: int = 30
    robot_type: str | None = None
    license: str | None = None


_ARM = ("eef_pos", "eef_quat", "gripper_qpos")


def _robomimic(settings: RobomimicSettings, source: str) -> int:
    from cmpolicy_data.chunks import printable
    from cmpolicy_data.convert import robomimic

    suffix = "_abs.zarr" if settings.actions == "absolute" else ".zarr"
    with showing(None, "episode") as show:
        report = robomimic.convert(
            Path(source),
            settings.out or f"{Path(source).stem}{suffix}",
            actions=settings.actions,
            keys=list(settings.obs) or None,
            filter_key=settings.filter,
            states=settings.states,
            cameras=settings.cameras,
            camera_size=settings.camera_size,
            workers=settings.workers,
            progress=show,
        )
    shown = shlex.quote(str(report.path))
    print(
        f"{report.path}: {report.task}, {report.episodes} episode(s), {report.steps} steps, "
        f"{report.actions} actions ({report.seconds:.0f} s)"
    )
    if report.goals_from_file:
        print(f"absolute actions of {report.goals_from_file} episode(s): the file's actions_abs")
    for name, count in report.masks.items():
        print(f"mask {name}: {count} episode(s)")
    print(f"check it with: cmpolicy data replay robomimic {shown}")
    if report.left_out:
        print(printable(f"left out (obs=[...] names what is taken): {', '.join(report.left_out)}"))
    task = f"task={report.task}"
    frames = [key for key in report.obs if key.endswith("_image")]
    arm = [key for key in report.obs if key.partition("_")[2] in _ARM]  # of robot0, robot1
    if frames:  # with what the arm itself knows, and not where the objects are
        obs = ",".join([*frames, *arm])
        task += f" task.protocol=robomimic-ph-image encoder=compact 'data.obs=[{obs}]'"
    elif len(arm) < len(_ARM) or "object" not in report.obs:
        task += f" 'data.obs=[{','.join(report.obs)}]'"
    print(f"train on it with: cmpolicy train {task} data=robomimic data.path={shown}")
    return 0


def _aloha(settings: AlohaSettings, source: str) -> int:
    from cmpolicy_data.chunks import printable
    from cmpolicy_data.convert import aloha
    from cmpolicy_data.frames import looks_like_frames

    out = settings.out or f"{Path(source).expanduser().resolve().stem}.zarr"
    with showing(None, "episode") as show:
        buffer = aloha.convert(source, out, control_hz=settings.control_hz, progress=show)
    keys = [key for key in buffer if key != "action"]
    obs = ",".join(keys)
    encoder = " encoder=compact" if any(looks_like_frames(buffer[key]) for key in keys) else ""
    print(f"{out}: {buffer.n_episodes} episode(s), {buffer.n_steps} steps, keys {buffer.keys()}")
    for name in buffer.attrs[aloha.LEFT_OUT]:
        print(printable(f"left out: {name}"))
    print(
        f"train on it with: cmpolicy train task=custom {shlex.quote(f'data.path={out}')} "
        f"{shlex.quote(f'data.obs=[{obs}]')}{encoder}"
    )
    return 0


def _lerobot(settings: LeRobotSettings, source: str) -> int:
    from cmpolicy_data.chunks import printable
    from cmpolicy_data.convert.lerobot import hub, reading

    found = hub.find(source, settings.revision)
    with showing(None, "episode") as show:
        report = reading.read(
            found.root,
            settings.out or f"{Path(found.name).name}.zarr",
            name=found.name,
            commit=found.commit,
            check_stats=settings.check_stats,
            threads=settings.threads,
            progress=show,
        )
    print(
        f"{report.path}: {report.episodes} episode(s), {report.steps} steps at {report.fps:g} per "
        f"second, keys {', '.join(report.keys)} ({report.seconds:.0f} s)"
    )
    for task in report.tasks:
        print(printable(f"task: {task}"))
    for name, why in report.left_out.items():
        print(printable(f"left out: {name} ({why})"))
    obs = ",".join(key for key in report.keys if key != "action")
    encoder = " encoder=compact" if report.cameras else ""
    path = f"data.path={report.path}"
    print(
        f"train on it with: cmpolicy train task=custom {shlex.quote(path)} "
        f"{shlex.quote(f'data.obs=[{obs}]')}{encoder}"
    )
    return 0


def _to_lerobot(settings: ToLeRobotSettings, source: str) -> int:
    from cmpolicy_data.catalog import resolve
    from cmpolicy_data.convert.lerobot import writing

    store = resolve(source)
    name = store.name.removesuffix(".zip").removesuffix(".zarr")
    with showing(None, "episode") as show:
        report = writing.write(
            store,
            settings.out or f"{name}_lerobot",
            task=settings.task,
            fps=settings.fps,
            keys=settings.keys,
            images=settings.images,
            codec=settings.codec,
            crf=settings.crf,
            robot_type=settings.robot_type,
            license=settings.license,
            progress=show,
        )
    print(
        f"{report.path}: LeRobotDataset v3.0, {report.episodes} episode(s), {report.steps} steps "
        f"at {report.fps:g} per second, {', '.join(report.features)} ({report.seconds:.0f} s)"
    )
    print(
        "train on it with lerobot: lerobot-train --dataset.repo_id=me/data "
        f"--dataset.root={shlex.quote(str(report.path))} ..."
    )
    return 0


class Layout(NamedTuple):
    """One way to convert: what it takes, and what it does with settings and source."""

    argument: str
    summary: str
    settings: type[Any]
    run: Callable[..., int]


LAYOUTS: dict[str, Layout] = {
    "robomimic": Layout("FILE.hdf5", "robomimic's files to a store", RobomimicSettings, _robomimic),
    "aloha": Layout(
        "FOLDER", "ALOHA's episodes, one HDF5 file each, to a store", AlohaSettings, _aloha
    ),
    "lerobot": Layout(
        "FOLDER|OWNER/NAME",
        "a LeRobot data set (v3.0, v2.1; a folder, or from the hub) to a store",
        LeRobotSettings,
        _lerobot,
    ),
    "to-lerobot": Layout(
        "STORE", "a store to a LeRobotDataset v3.0", ToLeRobotSettings, _to_lerobot
    ),
}
"""The layouts of ``cmpolicy data convert``."""
