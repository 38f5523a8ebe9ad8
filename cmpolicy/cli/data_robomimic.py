"""Commands of ``cmpolicy data`` for the Robomimic tasks."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from tqdm import tqdm

from cmpolicy.cli.data_options import UsageError, names, read_options, whole, yes

GENERATE_OPTIONS = (
    "  task=lift         lift, can, square\n"
    "  out=TASK.hdf5     the file to write, in robomimic's layout\n"
)
CONVERT_OPTIONS = (
    "  out=NAME.zarr     the store to write (.zarr or .zip); default: named as the source\n"
    "  actions=delta     or absolute: target poses, 10 numbers per arm\n"
    " robomimic:\n"
    "  obs=[]            observation keys; default: all that are one vector per step\n"
    "  filter=           convert only the demonstrations of this mask (train, valid, ...)\n"
    "  states=true       false leaves out what only `replay` reads, most of the bytes\n"
    "  workers=1         simulator processes that recover absolute actions\n"
)
REPLAY_OPTIONS = (
    "  episodes=         only so many, from the first on\n  workers=1         simulator processes\n"
)
DOWNLOAD_OPTIONS = (
    "  task=lift         lift, can, square, transport, tool_hang\n"
    "  type=ph           ph (proficient human), mh (multi human), mg (machine), paired\n"
    "  endpoint=...      a mirror of the Hugging Face hub\n"
    "  revision=main     of the data set repository\n"
)


def generate(arguments: argparse.Namespace) -> int:
    """``generate robomimic``: demonstrations of scripted experts."""
    from cmpolicy_data.generate.robomimic import attempt, runner

    options = read_options(
        arguments, {"task": "", "episodes": "200", "seed": "0", "workers": "2", "out": ""}
    )
    task = options["task"]
    if not task:
        known = ", ".join(attempt.SKILLS)
        raise UsageError(
            f"Name the task ({known}), for example: cmpolicy data generate robomimic task=lift"
        )
    episodes = whole(options, "episodes")
    with tqdm(total=episodes, unit="episode", disable=None) as bar:

        def show(kept: int, attempted: int) -> None:
            bar.set_postfix(attempted=attempted, refresh=False)
            bar.update(kept - bar.n)

        report = runner.generate(
            options["out"] or f"{task}.hdf5",
            task=task,
            episodes=episodes,
            seed=whole(options, "seed"),
            workers=whole(options, "workers"),
            progress=show,
        )
    path = shlex.quote(str(report.path))
    print(
        f"{report.path}: {report.task}, {report.kept} episodes, {report.steps} steps "
        f"({report.attempted} attempted, {report.success_rate:.1%} succeeded, "
        f"{report.seconds:.0f} s)"
    )
    print(f"convert it with: cmpolicy data convert robomimic {path} out={report.task}.zarr")
    return 0


def convert(arguments: argparse.Namespace) -> int:
    """``convert robomimic FILE``, ``convert robosuite FILE``: HDF5 to a store."""
    from cmpolicy_data.convert import human, robomimic

    defaults = {"out": "", "actions": "delta"}
    if arguments.layout == "robomimic":
        defaults |= {"obs": "", "filter": "", "states": "true", "workers": "1"}
    options = read_options(arguments, defaults)
    source, actions = Path(arguments.source), options["actions"]
    suffix = "_abs.zarr" if actions == "absolute" else ".zarr"
    out = options["out"] or f"{source.stem}{suffix}"
    with tqdm(unit="episode", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        if arguments.layout == "robosuite":
            report = human.convert(source, out, actions=actions, progress=show)
        else:
            report = robomimic.convert(
                source,
                out,
                actions=actions,
                keys=names(options, "obs") or None,
                filter_key=options["filter"] or None,
                states=yes(options, "states"),
                workers=whole(options, "workers"),
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
    print(f"train on it with: cmpolicy train task={report.task} data=robomimic data.path={shown}")
    return 0


def replay(arguments: argparse.Namespace) -> int:
    """``replay robomimic STORE``: how many episodes succeed again."""
    from cmpolicy_data.convert import replay as replaying

    options = read_options(arguments, {"episodes": "", "workers": "1"})
    with tqdm(unit="episode", disable=None) as bar:

        def show(done: int, failed: int) -> None:
            bar.set_postfix(failed=failed, refresh=False)
            bar.update(done - bar.n)

        report = replaying.replay(
            arguments.path,
            episodes=whole(options, "episodes") if options["episodes"] else None,
            workers=whole(options, "workers"),
            progress=show,
        )
    succeeded = report.episodes - len(report.failed)
    print(
        f"{report.path}: {succeeded} of {report.episodes} episodes succeed again with "
        f"{report.actions} actions ({report.success_rate:.1%}, {report.seconds:.0f} s)"
    )
    if report.failed:
        print(f"failed: {', '.join(map(str, report.failed))}")
    return 0


def download(arguments: argparse.Namespace) -> int:
    """``download robomimic``: an official file."""
    from cmpolicy_data.robomimic_download import download as fetch

    options = read_options(
        arguments, {"task": "", "type": "ph", "out": "", "endpoint": "", "revision": "main"}
    )
    if not options["task"]:
        raise UsageError("Name the task, for example: cmpolicy data download robomimic task=lift")
    path = fetch(
        options["task"],
        options["type"],
        options["out"] or None,
        endpoint=options["endpoint"] or None,
        revision=options["revision"],
    )
    print(f"{path}: readable")
    print(
        f"convert it with: cmpolicy data convert robomimic {shlex.quote(str(path))} "
        f"out={options['task']}_{options['type']}.zarr"
    )
    return 0
