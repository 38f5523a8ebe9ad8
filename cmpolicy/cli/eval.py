"""``cmpolicy eval``: score a policy under a protocol, or compare results that are there.

Exit status: 0 scored; 1 an environment failed; 2 bad settings, policy or files; 130 Ctrl-C.
"""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from cmpolicy.cli.parse import read_words
from cmpolicy.experiment.protocols import (
    ROBOMIMIC,
    Simulator,
    open_protocol,
    own_protocol,
    read_env_args,
    require_protocol,
)
from cmpolicy.export.runtime import is_exported, open_exported
from cmpolicy.schema import ConfigError, from_mapping, unknown_key_message
from cmpolicy_eval.evaluate import Evaluation, evaluate
from cmpolicy_eval.policy import ActionChunkPolicy
from cmpolicy_eval.protocol import EvalProtocol, check_protocol
from cmpolicy_eval.report import difference_table, table, write_report
from cmpolicy_eval.result import Result
from cmpolicy_eval.rollout import RolloutError
from cmpolicy_eval.seeds import SeedOverlapWarning, parse_seeds

_HEADER = """Score a policy in simulation, or compare result files.

cmpolicy eval policy=outputs/<run>/policy|<file>.onnx|<file>.pt2 [key=value ...]
cmpolicy eval report results=[a.json,b.json] [out=outputs/report]

Settings and their values:
"""


@dataclass(frozen=True)
class EvalConfig:
    """Settings of ``cmpolicy eval``; ``eval.yaml`` in ``cmpolicy_conf`` says what each means."""

    policy: str
    name: str | None
    protocol: str | None
    task: str | None
    env_args: str | None
    seeds: Any
    nfe: tuple[int, ...]
    sampler: Literal["flow_map", "diagonal"] | None
    noise_scale: float | None
    time_floor: float | None
    workers: int | None
    batch_size: int | None
    device: Literal["auto", "cpu", "cuda"]
    videos: int
    out: str

    def __post_init__(self) -> None:
        if not self.nfe or min(self.nfe) < 1:
            raise ConfigError(f"nfe must hold numbers of at least 1, got {list(self.nfe)}")
        if len(set(self.nfe)) != len(self.nfe):
            raise ConfigError(f"nfe holds a number twice: {list(self.nfe)}")
        if self.noise_scale is not None and not self.noise_scale > 0:
            raise ConfigError(f"noise_scale must be above 0, got {self.noise_scale}")
        if self.time_floor is not None and not (0 < self.time_floor < 1 < min(self.nfe)):
            raise ConfigError(
                f"time_floor={self.time_floor} must lie in (0, 1) and needs nfe of at least 2, got "
                f"nfe={list(self.nfe)}"
            )
        for key, minimum in {"batch_size": 1, "videos": 0, "workers": 1}.items():
            value = getattr(self, key)
            if value is not None and value < minimum:
                raise ConfigError(f"{key} must be at least {minimum}, got {value}")


@dataclass(frozen=True)
class ReportConfig:
    """Settings of ``cmpolicy eval report``: result files, and the folder of the report."""

    results: tuple[str, ...]
    out: str = "outputs/report"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``cmpolicy eval``; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or {"-h", "--help"} & set(words):
        print(_HEADER + _defaults_text(), end="")
        return 0 if words else 2
    with warnings.catch_warnings():
        warnings.simplefilter("always", SeedOverlapWarning)
        warnings.showwarning = _show_warning
        return _guarded(words)


def _guarded(words: Sequence[str]) -> int:
    """Run the command; what a user can get wrong becomes one message."""
    try:
        if words[0] == "report":
            return _report(from_mapping(ReportConfig, _parse(words[1:], _names(ReportConfig))))
        settings = {**_defaults(), **_parse(words, _names(EvalConfig))}
        if isinstance(settings["nfe"], int):
            settings["nfe"] = [settings["nfe"]]
        return _score(from_mapping(EvalConfig, settings), shlex.join(["cmpolicy", "eval", *words]))
    except RolloutError as error:
        print(f"cmpolicy eval: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"cmpolicy eval: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cmpolicy eval: stopped", file=sys.stderr)
        return 130


def _score(config: EvalConfig, command: str) -> int:
    # What is quick to find wrong comes before torch is loaded.
    if config.protocol is not None:
        check_protocol(config.protocol)
    given = None if config.seeds is None else parse_seeds(config.seeds)
    scored = _open(config)
    protocol = _protocol(config, scored)
    first, last = protocol.default_seeds
    seeds = given or list(range(first, last + 1))
    out = Path(config.out).expanduser()
    results: list[Result] = []
    for nfe in config.nfe:
        scored.set_nfe(nfe)
        evaluation = evaluate(
            scored.policy,
            protocol,
            seeds,
            nfe=nfe,
            policy_name=scored.label,
            n_workers=config.workers,
            batch_size=config.batch_size,
            keep_chunks=config.videos,
            progress=f"nfe={nfe}",
            device=scored.device,
            data=scored.data,
            # one warning will do
            training_seeds=() if results else _training_seeds(scored.data),
            command=command,
        )
        evaluation.result.save(out / f"result_nfe{nfe}.json")
        results.append(evaluation.result)
        _write_videos(out / "videos", protocol, evaluation, config.videos)
    return _write(results, out, extra=[out / "videos"] if config.videos else [])


def _protocol(config: EvalConfig, scored: _Scored) -> EvalProtocol:
    """The protocol asked for, else that of the policy's own task."""
    name = require_protocol(config.protocol or scored.protocol, config.policy)
    if config.env_args is not None and name != ROBOMIMIC:
        raise ConfigError(
            f"env_args={config.env_args} is of {ROBOMIMIC}; protocol {name!r} is one environment. "
            "Leave it out"
        )
    simulator = scored.simulator
    if config.env_args is not None:
        simulator = replace(simulator, env_args=read_env_args(config.env_args))
    return open_protocol(name, config.task, simulator)


def _report(config: ReportConfig) -> int:
    if not config.results:
        raise ConfigError("results is empty; give result files: results=[a.json,b.json]")
    results = [Result.load(Path(path).expanduser()) for path in config.results]
    return _write(results, Path(config.out).expanduser(), extra=[])


def _write(results: Sequence[Result], out: Path, *, extra: Iterable[Path]) -> int:
    text, figure = write_report(results, out)
    print(table(results))
    differences = difference_table(results)
    if differences:
        print(f"\n{differences}")
    print("\n" + "\n".join(f"  {path}" for path in (text, figure, *extra)))
    return 0


def _write_videos(folder: Path, protocol: EvalProtocol, evaluation: Evaluation, count: int) -> None:
    if not count:
        return
    from cmpolicy_eval.video import write_grid, write_videos

    episodes = evaluation.episodes[:count]
    suffix = f"_nfe{evaluation.result.nfe}"
    write_videos(folder, protocol, episodes, suffix)
    write_grid(folder / f"grid{suffix}.gif", protocol, episodes)


@dataclass(frozen=True)
class _Scored:
    """A policy ready to be scored: its name in tables, the data it was trained on, its device.

    ``protocol`` and ``simulator`` are what it says of its own task.
    """

    policy: ActionChunkPolicy
    set_nfe: Callable[[int], None]
    label: str
    data: str | None
    device: str
    protocol: str | None
    simulator: Simulator


def _open(config: EvalConfig) -> _Scored:
    return _open_exported(config) if is_exported(config.policy) else _open_bundle(config)


def _open_bundle(config: EvalConfig) -> _Scored:
    import torch

    from cmpolicy.policy.bundle import read_metadata
    from cmpolicy.policy.policy import ConsistencyPolicy

    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError(
            "device=cuda, but torch sees no GPU; use device=cpu, or install a torch build for your "
            "GPU"
        )
    device = "cuda" if has_gpu and config.device != "cpu" else "cpu"
    policy = ConsistencyPolicy.from_pretrained(config.policy, device).eval()
    label = config.name or config.policy
    if config.sampler is not None and config.sampler != policy.sampler:
        label += f" [{config.sampler}]"
        policy.sampler = config.sampler
    if config.noise_scale is not None and config.noise_scale != policy.noise_scale:
        label += f" [noise {config.noise_scale}]"
        policy.noise_scale = config.noise_scale
    if config.time_floor is not None:
        label += f" [floor {config.time_floor}]"
        policy.time_floor = config.time_floor
    metadata = read_metadata(config.policy)
    return _Scored(
        policy,
        lambda nfe: setattr(policy, "nfe", nfe),
        label,
        metadata.get("data"),
        f"cuda ({torch.cuda.get_device_name(policy.device)})" if device == "cuda" else "cpu",
        own_protocol(metadata),
        Simulator.from_mapping(metadata.get("simulator", {})),
    )


def _open_exported(config: EvalConfig) -> _Scored:
    """What was fixed at export cannot be set here."""
    policy = open_exported(config.policy)
    facts = policy.facts
    again = f"export it again: cmpolicy export policy=<bundle> out={config.policy}"
    if config.nfe != (facts.nfe,):
        raise ConfigError(
            f"{config.policy} makes {facts.nfe} evaluation(s), not nfe={list(config.nfe)}; give "
            f"nfe={facts.nfe}, or {again} nfe=..."
        )
    for name, own in (("sampler", facts.sampler), ("noise_scale", facts.noise_scale)):
        if getattr(config, name) not in (None, own):
            raise ConfigError(
                f"{config.policy} has {name}={own}, not {getattr(config, name)}; set it in the "
                f"bundle and {again}"
            )
    if config.time_floor is not None:
        raise ConfigError(
            f"{config.policy} has fixed times; leave out time_floor, or give a bundle"
        )
    if config.device == "cuda":
        raise ConfigError(f"{config.policy} runs on the CPU; give device=cpu or a bundle")
    label = config.name or config.policy
    simulator = Simulator.from_mapping(facts.simulator)
    return _Scored(policy, lambda nfe: None, label, facts.data, "cpu", facts.protocol, simulator)


def _training_seeds(source: str | None) -> list[int] | None:
    """Seeds of the episodes that a policy was trained on, where the data say; else None."""
    if source != "pusht_scripted":
        return None
    from cmpolicy_data import ReplayBuffer, bundled_path

    seeds = ReplayBuffer.open(bundled_path("pusht")).attrs.get("seeds")
    return None if seeds is None else [int(seed) for seed in seeds]


def _parse(words: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    """``key=value`` words to a mapping; values are read as YAML.

    Raises:
        ConfigError: a word without ``=``, a value that is not YAML, an unknown key.
    """
    how = "`cmpolicy eval --help` lists all settings with their values"
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r} is not a setting; settings are given as key=value. {how}")
        if key not in known:
            raise ConfigError(unknown_key_message(key, known, how=how))
    settings = read_words(words)
    for key in {"policy", "name", "env_args", "out"} & set(settings):
        if settings[key] is not None:  # a bundle may be called 2026
            settings[key] = str(settings[key])
    return settings


def _names(config: type) -> list[str]:
    return [field.name for field in fields(config)]


def _defaults_text() -> str:
    return files("cmpolicy_conf").joinpath("eval.yaml").read_text(encoding="utf-8")


def _defaults() -> dict[str, Any]:
    defaults = OmegaConf.to_container(OmegaConf.create(_defaults_text()))
    return (
        {str(key): value for key, value in defaults.items()} if isinstance(defaults, dict) else {}
    )


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"cmpolicy eval: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
