"""``cmpolicy data``: look at, check, generate, download, convert and pack demonstrations.

Exit status: 0 well, 1 ``validate`` found problems, 2 the command could not be carried out.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from cmpolicy.cli import data_robomimic
from cmpolicy.cli.data_options import names, read_options, whole

_DESCRIPTION = "Look at, check, generate, download, convert and pack demonstrations."
_SHOWN_PROBLEMS = 50


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``cmpolicy data``; returns the exit status."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return command(arguments)
    except KeyboardInterrupt:
        print("cmpolicy data: stopped", file=sys.stderr)
        return 130
    # All that the data package raises on bad input, and packages of an extra that is not installed.
    except (ValueError, OSError, ImportError) as error:
        print(f"cmpolicy data: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cmpolicy data", description=_DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, summary: str, run: Callable[[argparse.Namespace], int], options: str = ""
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=summary + ("\n\noptions as key=value:\n" + options) * bool(options),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    store = "a store (directory or .zip), or pusht_scripted, pusht_human"
    inspect = add("inspect", "Print keys, shapes, ranges and episodes of a store.", _inspect)
    inspect.add_argument("path", help=store)
    validate = add(
        "validate", "List everything that is wrong with a store.", _validate, _VALIDATE_OPTIONS
    )
    validate.add_argument("path", help=store)
    generate = add(
        "generate", "Make scripted demonstrations in the simulator.", _generate, _GENERATE_OPTIONS
    )
    generate.add_argument("task", choices=["pusht", "robomimic"])
    download = add("download", "Fetch human demonstrations.", _download, _DOWNLOAD_OPTIONS)
    download.add_argument("task", choices=["pusht", "robomimic"])
    convert = add(
        "convert",
        "Convert demonstrations of another layout to a store.",
        data_robomimic.convert,
        data_robomimic.CONVERT_OPTIONS,
    )
    convert.add_argument("layout", choices=["robomimic", "robosuite"])
    convert.add_argument("source", help="the HDF5 file")
    replay = add(
        "replay",
        "Play the actions of a converted store in the simulator: how many episodes succeed again.",
        data_robomimic.replay,
        data_robomimic.REPLAY_OPTIONS,
    )
    replay.add_argument("layout", choices=["robomimic"])
    replay.add_argument("path", help="a store that `convert robomimic` made")
    pack = add("pack", "Pack a directory store into one .zip.", _pack)
    pack.add_argument("source", help="a directory store")
    pack.add_argument("target", help="the .zip to write")
    for command in (validate, generate, download, convert, replay):
        command.add_argument("options", nargs="*", metavar="key=value")
    return parser


_VALIDATE_OPTIONS = "  keys=[action]     keys or selectors that the store must have\n"
_GENERATE_OPTIONS = (
    "  episodes=N        how many; default: pusht 300, robomimic 200\n"
    "  seed=0            first seed of the initial states\n"
    "  workers=2         simulator processes; the result does not depend on it\n"
    " pusht:\n"
    "  out=pusht_scripted.zarr.zip\n"
    " robomimic:\n" + data_robomimic.GENERATE_OPTIONS
)
_DOWNLOAD_OPTIONS = (
    "  out=FOLDER        default CMPOLICY_DATA, else ~/.cache/cmpolicy\n"
    " pusht:\n"
    "  url=...           another source of the archive\n"
    "  sha256=...        what the archive must hash to\n"
    " robomimic:\n" + data_robomimic.DOWNLOAD_OPTIONS
)


def _inspect(arguments: argparse.Namespace) -> int:
    from cmpolicy_data.catalog import resolve
    from cmpolicy_data.summary import format_summary, summarize

    print(format_summary(summarize(resolve(arguments.path))))
    return 0


def _validate(arguments: argparse.Namespace) -> int:
    from cmpolicy_data.catalog import resolve
    from cmpolicy_data.validation import validate

    options = read_options(arguments, {"keys": "[action]"})
    path = resolve(arguments.path)
    problems = validate(path, names(options, "keys"))
    for problem in problems[:_SHOWN_PROBLEMS]:
        print(problem)
    if len(problems) > _SHOWN_PROBLEMS:
        print(f"... and {len(problems) - _SHOWN_PROBLEMS} more")
    print(f"{path}: {len(problems)} problem(s)" if problems else f"{path}: no problems")
    return 1 if problems else 0


def _generate(arguments: argparse.Namespace) -> int:
    if arguments.task == "robomimic":
        return data_robomimic.generate(arguments)
    from cmpolicy_data.generate.pusht import generate

    options = read_options(
        arguments,
        {"episodes": "300", "seed": "0", "workers": "2", "out": "pusht_scripted.zarr.zip"},
    )
    episodes = whole(options, "episodes")
    with tqdm(total=episodes, unit="episode", disable=None) as bar:

        def show(kept: int, attempted: int) -> None:
            bar.set_postfix(attempted=attempted, refresh=False)
            bar.update(kept - bar.n)

        report = generate(
            Path(options["out"]),
            episodes=episodes,
            seed=whole(options, "seed"),
            workers=whole(options, "workers"),
            progress=show,
        )
    print(
        f"{report.path}: {report.kept} episodes, {report.steps} steps "
        f"({report.attempted} attempted, {report.seconds:.0f} s)"
    )
    print(f"look at it with: cmpolicy data inspect {shlex.quote(str(report.path))}")
    return 0


def _download(arguments: argparse.Namespace) -> int:
    if arguments.task == "robomimic":
        return data_robomimic.download(arguments)
    from cmpolicy_data.download import DATASETS, download

    options = read_options(arguments, {"out": "", "url": "", "sha256": ""})
    # disable=None: no bar unless stderr is a terminal
    with tqdm(unit="B", unit_scale=True, unit_divisor=1000, disable=None) as bar:

        def show(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        path = download(
            DATASETS[arguments.task],
            options["out"] or None,
            url=options["url"] or None,
            sha256=options["sha256"] or None,
            progress=show,
        )
    print(f"{path}: verified")
    print(
        "train on it with: cmpolicy train task=pusht data=pusht_human "
        f"data.path={shlex.quote(str(path))}"
    )
    return 0


def _pack(arguments: argparse.Namespace) -> int:
    from cmpolicy_data.pack import pack

    path = pack(arguments.source, arguments.target)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
