"""``cmpolicy train``: train a policy, go on with a run, or train several beside each other."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, Glob, Override

from cmpolicy.cli.parse import (
    HYDRA_VERSION_BASE,
    PACKAGE,
    SEARCH_PATH,
    Composition,
    parse,
    parse_sweep,
    search_path,
)
from cmpolicy.cli.plugins import load_plugins
from cmpolicy.experiment.config import TrainConfig
from cmpolicy.files import write_atomically
from cmpolicy.flow.objectives import OBJECTIVES
from cmpolicy.nn.registry import ENCODERS, NETS, load_built_in
from cmpolicy.schema import ConfigError

load_built_in()
#: Choices that are no YAML file: what is registered, with its own defaults.
KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "net": ("kind", NETS),
    "encoder": ("kind", ENCODERS),
    "objective": ("name", OBJECTIVES),
}
COMPOSITION = Composition(TrainConfig, kinds=KINDS)
_HEADER = """\
usage: cmpolicy train [task=...] [preset=...] [data=...] [objective=...] [net=...] [key=value ...]
       cmpolicy train resume=outputs/<run> [examples=...]
       cmpolicy train -m seed=0,1,2 [hydra/launcher=joblib] ...

Train a one-step policy from demonstrations. With -m (--multirun) every combination of the values
separated by commas is a run in a folder of its own, and a table of them follows."""
_TABLE = "table.md"
_COLUMNS = ("success", "score", "val_action_error", "val_loss")


def help_text(words: Sequence[str]) -> str:
    """The groups and all settings; ``words`` may choose groups."""
    return COMPOSITION.help(_HEADER, words)


def run(words: Sequence[str]) -> int:
    """Train as the words say; the exit status."""
    if {"-m", "--multirun"} & set(words):
        return _sweep([word for word in words if word not in ("-m", "--multirun")])
    from cmpolicy.experiment.run import stopped_text
    from cmpolicy.experiment.train import closing_text

    result, config = train_words(words, f"cmpolicy train {shlex.join(words)}".rstrip())
    if not result.is_main:
        return 0
    if not result.finished:
        print(stopped_text(result, "train", config.examples))
        return 128 + (result.end.signum or 0)
    print(closing_text(result, config))
    return 0


def compose(*words: str) -> TrainConfig:
    """The settings of a command line: ``compose("task=pusht", "preset=standard", "seed=1")``.

    Raises:
        ConfigError: what is wrong with the words.
    """
    settings = COMPOSITION.compose(words)
    settings.pop("out")
    return TrainConfig.from_mapping(settings)


def train_words(
    words: Sequence[str], command: str, out: str | None = None
) -> tuple[Any, TrainConfig]:
    """Train as the words say; the result and the settings.

    Args:
        words: ``key=value``, or ``resume=<run>`` and what changes.
        command: recorded in the model card.
        out: folder of a new run, in place of ``out=`` among the words.

    Raises:
        ConfigError: what is wrong with the words; else as :func:`cmpolicy.experiment.train.train`.
    """
    from cmpolicy.experiment.train import resume, train

    overrides = {override.key_or_group: override for override in parse(words)}
    if "resume" in overrides:
        changes = COMPOSITION.values(overrides.values())
        result = resume(changes.pop("resume"), changes, command=command)
        return result, TrainConfig.from_mapping(_written(result.run_dir))
    settings = COMPOSITION.compose(words)
    chosen = settings.pop("out")
    config = TrainConfig.from_mapping(settings)
    return train(config, out or chosen, command=command), config


def _written(run_dir: Path) -> dict[str, Any]:
    from cmpolicy.experiment.run import CONFIG_FILE, read_yaml

    return read_yaml(run_dir / CONFIG_FILE)


# -- several runs ---------------------------------------------------------------------------------


def _sweep(words: Sequence[str]) -> int:
    """One run for every combination, by Hydra's sweeper and launcher; then the table."""
    import hydra

    overrides = parse_sweep(words)
    keys = [override.key_or_group for override in overrides]
    if "resume" in keys:
        raise ConfigError("-m starts new runs; resume=... goes on with one run at a time")
    out = COMPOSITION.values(o for o in overrides if o.key_or_group == "out").get("out")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(out or f"outputs/sweep-{stamp}").expanduser().absolute()
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"out={folder} exists and is not an empty folder; choose another out")
    places = search_path(overrides)
    files = COMPOSITION.files(places)
    passed: list[str] = []
    swept: set[str] = set()
    for override in overrides:
        key, word = override.key_or_group, str(override.input_line)
        if key in ("out", SEARCH_PATH):
            continue
        if key in KINDS and not _in_files(override, files[key]):
            key, word = f"{key}.{KINDS[key][0]}", word.replace("=", f".{KINDS[key][0]}=", 1)
        # Hydra's own composition holds the differences only, so single values are added to it.
        passed.append(word if key in files or key.startswith("hydra") else f"++{word}")
        if override.is_sweep_override():
            swept.add(key)
    where = [f"{SEARCH_PATH}={places}"] if places else []

    @hydra.main(f"pkg://{PACKAGE}", "train", version_base=HYDRA_VERSION_BASE)
    def job(_: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        config = HydraConfig.get()
        words = [str(word) for word in config.overrides.task]
        _run_job(int(config.job.num), [*words, *where], swept, folder)

    argv = ["cmpolicy train", "-m", *passed, *where, f"hydra.sweep.dir='{folder}'"]
    before, sys.argv = sys.argv, argv
    signum = 0
    try:
        job()
    except KeyboardInterrupt as stop:  # the runs that have not begun are left out
        signum = stop.args[0] if stop.args else signal.SIGINT
    finally:
        sys.argv = before
    jobs = [json.loads(file.read_text()) for file in sorted(folder.glob("job-*.json"))]
    table = _table(sorted(jobs, key=lambda found: int(found["job"])))
    write_atomically(folder / _TABLE, (table + "\n").encode())
    print(f"{table}\n\n  {folder / _TABLE}")
    if signum:
        print(f"stopped; go on with a run: cmpolicy train resume={folder}/<run>")
        return 128 + signum
    return 1 if not jobs or any(found["error"] for found in jobs) else 0


def _run_job(number: int, words: Sequence[str], swept: set[str], folder: Path) -> None:
    """Train one combination; what came of it, an error too, goes into a file beside its folder.

    Raises:
        KeyboardInterrupt: a signal stopped it; its argument is the signal's number.
    """
    load_plugins()  # a launcher may run this in a process of its own
    plain = [word.removeprefix("++") for word in words]
    what = [word for word in plain if word.partition("=")[0] in swept]
    name = "-".join([str(number), *(w.replace("/", "_") for w in what)])
    found: dict[str, Any] = {
        "job": number,
        "what": what,
        "folder": name,
        "error": "",
        "metrics": {},
    }
    signum = None
    try:
        command = f"cmpolicy train {shlex.join(plain)}"
        result, _ = train_words(plain, command, out=str(folder / name))
        found["metrics"] = dict(result.metrics)
        if not result.finished:
            found["error"] = f"stopped at {result.end.examples} examples"
            signum = result.end.signum
    except Exception as error:  # the other runs go on
        found["error"] = f"{error}".splitlines()[0]
    write_atomically(folder / f"job-{number}.json", json.dumps(found).encode())
    if signum:
        raise KeyboardInterrupt(signum)


def _in_files(override: Override, known: Sequence[str]) -> bool:
    """Whether all values of a word choose YAML files, which Hydra itself can do."""
    value = override.value()
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    return isinstance(value, Glob) or all(str(one) in known for one in values)


def _table(jobs: Sequence[dict[str, Any]]) -> str:
    from cmpolicy_eval.report import aligned

    columns = [c for c in _COLUMNS if any(c in found["metrics"] for found in jobs)]
    rows = []
    for found in jobs:
        numbers = [f"{found['metrics'].get(c, float('nan')):.4g}" for c in columns]
        rows.append([found["folder"], *numbers, found["error"]])
    head = ["run", *columns, "error"]
    return aligned(head, rows, left=len(head))
