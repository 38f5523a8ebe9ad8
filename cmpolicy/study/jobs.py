"""What is trained: a job is one objective with one setting, for several seeds and rates at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from cmpolicy.flow.objectives import OBJECTIVES, Objective, build_objective
from cmpolicy.flow.sampler import get_sampler
from cmpolicy.schema import ConfigError
from cmpolicy.study.one_sided import OneSidedIsd

Start = Literal["fresh", "truth", "constant"]
#: What every job has in common unless it says otherwise: the exact derivative, and, as in the
#: paper, self-distillation from the first step and on every example.
COMMON: Mapping[str, Any] = {"derivative": "jvp", "sd_begin": 0.0, "sd_share": 1.0}
#: Objectives of the study alone.
_OWN: dict[str, type[Objective]] = {"isd_one_sided": OneSidedIsd}


@dataclass(frozen=True)
class Job:
    """One training of ``len(rates) * seeds`` networks.

    Args:
        experiment: which figure it belongs to.
        name: unique within the experiment; the result file's name.
        target: see :data:`cmpolicy.study.targets.TARGETS`.
        objective: see :func:`jump_objectives`.
        settings: of the objective, over :data:`COMMON`.
        batch: examples a step.
        rates: learning rates.
        seeds: networks of each rate.
        steps: optimizer steps.
        start: from fresh weights, or from networks that were first fitted to the ``truth`` or to
            the ``constant`` map, the mean of the data.
        stages: shares of the run at which the networks are measured.
        probes: further measurements, see :mod:`cmpolicy.study.probes`.
    """

    experiment: str
    name: str
    target: str
    objective: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 128
    rates: tuple[float, ...] = (1e-3,)
    seeds: int = 5
    steps: int = 1000
    start: Start = "fresh"
    stages: tuple[float, ...] = (0.0, 0.1, 0.4, 0.7, 1.0)
    probes: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """Name of the result file."""
        return f"{self.experiment}-{self.name}.json"

    def build(self) -> Objective:
        """The objective with its settings.

        Raises:
            ConfigError: an unknown objective or setting.
        """
        return build_study_objective(self.objective, self.settings)


def build_study_objective(name: str, settings: Mapping[str, Any]) -> Objective:
    """An objective with :data:`COMMON`, as far as it has such settings, and ``settings``.

    Raises:
        ConfigError: an unknown objective or setting.
    """
    own = _OWN.get(name)
    known = {f.name for f in fields(own or OBJECTIVES.get(name, Objective))}  # type: ignore[arg-type]
    merged = {k: v for k, v in COMMON.items() if k in known} | dict(settings)
    return build_objective(name, **merged) if own is None else own(**merged)


def jump_objectives() -> tuple[str, ...]:
    """Every objective whose networks are flow maps, all of it or (consistency) its jumps to 0."""
    return tuple(name for name, cls in OBJECTIVES.items() if makes_jumps(cls))


def makes_jumps(objective: Objective | type[Objective]) -> bool:
    """Whether the networks of an objective are flow maps, or the part of one with s = 0."""
    return get_sampler(objective.sampler).is_flow_map or objective.sampler == "restart"


@dataclass(frozen=True)
class _Size:
    """``batches`` and ``extreme`` are batch sizes; the second are those of consistency alone."""

    seeds: int
    steps: int
    targets: tuple[str, ...]
    starts: tuple[str, ...]
    batches: tuple[int, ...]
    extreme: tuple[int, ...]


SIZES: dict[str, _Size] = {
    "tiny": _Size(2, 6, ("gaussian1",), ("gaussian1",), (16,), (8,)),
    "quick": _Size(5, 150, ("mixture2",), ("gaussian2",), (128,), (8,)),
    "standard": _Size(5, 700, ("mixture2", "checkerboard2"), ("gaussian2",), (32, 128), (8, 256)),
}


def fit_steps(size: str) -> int:
    """Steps of the regression that brings networks to a start."""
    return SIZES[size].steps


def jobs_of(size: str) -> list[Job]:
    """All jobs of a size, the long ones first.

    Raises:
        ConfigError: an unknown size.
    """
    if size not in SIZES:
        raise ConfigError(f"size={size!r} is not one of {', '.join(SIZES)}")
    chosen = SIZES[size]
    jobs = [*_grid(chosen), *_degenerate(chosen), *_probed(chosen), *_derivative(chosen)]
    jobs += _settings(chosen)
    # long jobs first, so that the last worker is not left alone with one; further targets last
    others = chosen.targets[1:]
    return sorted(jobs, key=lambda job: (job.target in others, -job.batch * job.steps))


def _grid(size: _Size) -> list[Job]:
    """Every objective, target, batch size and learning rate."""
    return [
        Job(
            "grid",
            f"{target}-{name}-b{batch}",
            target,
            name,
            batch=batch,
            rates=(1e-3, 1e-2),
            seeds=size.seeds,
            steps=size.steps,
        )
        for target in size.targets
        for name in jump_objectives()
        for batch in (size.batches if target == size.targets[0] else size.batches[-1:])
    ]


def _degenerate(size: _Size) -> list[Job]:
    """Consistency training by batch size, from truth and constant, in pictures and closed form."""
    jobs = [
        Job(
            "batch",
            f"{name}-b{batch}",
            size.targets[0],
            name,
            batch=batch,
            rates=(1e-3, 1e-2),
            seeds=size.seeds,
            steps=size.steps,
        )
        for name in ("ct", "dct", "isd")
        for batch in size.extreme
    ]
    starts: tuple[Start, ...] = ("truth", "constant")
    jobs += [
        Job(
            "start",
            f"{start}-{where}-{name}",
            where,
            name,
            rates=(1e-4, 1e-3),
            seeds=size.seeds,
            steps=size.steps // 2,
            start=start,
            probes=("noise",),
        )
        for where in size.starts
        for name in ("ct", "dct", "meanflow", "isd")
        for start in starts
    ]
    jobs += [
        Job(
            "picture",
            name,
            "mixture1",
            name,
            batch=32,
            rates=(1e-3, 1e-2),
            seeds=size.seeds,
            steps=size.steps,
            stages=(0.0, 1.0),
            probes=("picture",),
        )
        for name in ("ct", "dct", "isd")
    ]
    family = Job("family", "gaussian2", "gaussian2", "ct", seeds=size.seeds, steps=0)
    return [*jobs, replace(family, stages=(0.0,), probes=("family",))]


def _probed(size: _Size) -> list[Job]:
    """iSD and ESD without the adaptive weight, looked at closely while they train."""
    fine = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
    return [
        Job(
            "probe",
            f"{target}-{name}",
            target,
            name,
            {"weight_power": 0.0},
            batch=128,
            seeds=size.seeds,
            steps=size.steps,
            stages=fine,
            probes=("tangent", "lengths") if name == "isd" else (),
        )
        for target in size.targets[:2]
        for name in ("isd", "esd")
    ]


def _derivative(size: _Size) -> list[Job]:
    """iSD by the ways to take dF/dt."""
    ways: list[tuple[str, dict[str, Any]]] = [("jvp", {"derivative": "jvp"})]
    for epsilon in (0.005, 0.02, 0.05):
        central = {"derivative": "difference", "epsilon": epsilon}
        ways += [(f"central-{epsilon}", central), (f"onesided-{epsilon}", central)]
    return [
        Job(
            "derivative",
            way,
            size.targets[0],
            "isd_one_sided" if way.startswith("onesided") else "isd",
            settings,
            seeds=size.seeds,
            steps=size.steps,
            stages=(0.0, 1.0),
            probes=("derivative",) if way == "jvp" else (),
        )
        for way, settings in ways
    ]


#: One setting at a time, against ``base``.
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "time_a=1": {"time_a": 1.0},
    "time_a=2": {"time_a": 2.0},
    "zero_share=0": {"zero_share": 0.0},
    "one_share=0": {"one_share": 0.0},
    "zero_share=0 one_share=0": {"zero_share": 0.0, "one_share": 0.0},
    "weight_power=0": {"weight_power": 0.0},
    "weight_power=0.5": {"weight_power": 0.5},
    "sd_share=0.5": {"sd_share": 0.5},
    "sd_share=0.25": {"sd_share": 0.25},
    "sd_begin=0.3": {"sd_begin": 0.3},
    "tangent=data": {"tangent": "data"},
    "tangent=schedule": {"tangent": "schedule"},
}


def _settings(size: _Size) -> list[Job]:
    """What single settings of iSD change."""
    return [
        Job(
            "settings",
            name.replace(" ", "-"),
            size.targets[0],
            "isd",
            settings,
            seeds=size.seeds,
            steps=size.steps,
            stages=(0.0, 1.0),
        )
        for name, settings in VARIANTS.items()
    ]
