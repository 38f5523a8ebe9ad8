"""Running an exported policy: what its file says of itself, checks, noise. No torch here.

Legend: B batch, To observation steps, T horizon, Ta executed and P planned actions, A action size.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmpolicy.observation import checked_actions, read_noise, read_observation, read_plan
from cmpolicy.spec import PolicySpec, SpecError, check_warm_start

FORMAT = "cmpolicy export"
FORMAT_VERSION = 2
_WITHOUT_WARM_START = 1  # what older readers know, and what is written where that will do
#: Where the text stands: a metadata property of an ONNX model, an extra file of a .pt2.
KEY = "cmpolicy"
#: Names of the inputs that are no observation, and of the outputs.
NOISE, ACTIONS, PLAN = "noise", "actions", "plan"
#: Of the further inputs of a policy with a warm start.
BEFORE, START = WARM = "before", "start"


class ExportError(ValueError):
    """An exported file that cannot be written, or was not written by cmpolicy, or is damaged."""


@dataclass(frozen=True)
class ExportFacts:
    """Of one exported policy.

    Attributes:
        spec: keys, shapes and window; the inputs of the file are in the order of ``spec.obs``.
        nfe: network evaluations per plan, unrolled in the file.
        path: of the flow map, ``linear`` or ``trigonometric``.
        sampler: how it samples, see ``cmpolicy.flow.sampler``.
        noise_scale: what the file multiplies its standard normal noise by.
        bundle_sha256: of the bundle's weights and normaliser, by file name.
        data: name of the data set that the policy was trained on, where the bundle says it.
        control_hz: rate of the actions, where the bundle says it.
        cmpolicy: version that wrote the file.
        protocol: that the policy is scored under, where the bundle says it.
        simulator: what the bundle says of the simulator of its data; empty if nothing.
        warm_start: time at which rows with a plan begin; None: the file takes no plan.
    """

    spec: PolicySpec
    nfe: int
    path: str
    sampler: str
    noise_scale: float
    bundle_sha256: dict[str, str]
    data: str | None
    control_hz: float | None
    cmpolicy: str
    protocol: str | None = None
    simulator: dict[str, str] = field(default_factory=dict)
    warm_start: float | None = None

    def to_json(self) -> str:
        """One line of JSON."""
        facts = asdict(self) | {"spec": self.spec.to_dict()}
        version = FORMAT_VERSION
        if self.warm_start is None:
            version = _WITHOUT_WARM_START
            del facts["warm_start"]
        return json.dumps({"format": FORMAT, "format_version": version} | facts)

    @classmethod
    def from_json(cls, text: str | None, file: str) -> ExportFacts:
        """The inverse of :meth:`to_json`; ``file`` is named in the errors.

        Raises:
            ExportError: no such text, a foreign or a newer one, or one that is incomplete.
        """
        remedy = "make one with `cmpolicy export policy=<bundle> out=<file>`"
        try:
            data: Any = json.loads(text or "null")
        except ValueError:
            data = None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ExportError(
                f"{file} was not exported by cmpolicy, or is cut short: it holds no {KEY!r} "
                f"metadata of format {FORMAT!r}; {remedy}"
            )
        version = data.get("format_version")
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise ExportError(
                f"{file} has export format version {version}, written by cmpolicy "
                f"{data.get('cmpolicy')}; this cmpolicy reads up to {FORMAT_VERSION}: upgrade "
                "cmpolicy, or export the policy again"
            )
        try:
            source, rate = data["data"], data["control_hz"]
            return cls(
                spec=PolicySpec.from_dict(data["spec"]),
                nfe=int(data["nfe"]),
                path=str(data["path"]),
                sampler=str(data["sampler"]),
                noise_scale=float(data["noise_scale"]),
                bundle_sha256={str(k): str(v) for k, v in data["bundle_sha256"].items()},
                data=None if source is None else str(source),
                control_hz=None if rate is None else float(rate),
                cmpolicy=str(data["cmpolicy"]),
                protocol=None if data.get("protocol") is None else str(data["protocol"]),
                simulator={str(k): str(v) for k, v in data.get("simulator", {}).items()},
                warm_start=check_warm_start(data.get("warm_start")),
            )
        except (KeyError, TypeError, ValueError, AttributeError, SpecError) as error:
            raise ExportError(
                f"{file} is damaged: its {KEY!r} metadata is incomplete ({error!r}); {remedy}"
            ) from error


def input_name(key: str) -> str:
    """Name of the input for an observation key: no other value of a graph has a slash in it."""
    return f"obs/{key}"


Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


class ExportedRuntime(ABC):
    """An exported policy: keeps the ``ChunkPolicy`` protocol, stateless, float32 at its core.

    ``facts`` is what the file says of itself. :meth:`infer` may be called from several threads.

    Args:
        facts: of the file.
        seed: of the noise of calls that bring none; None takes entropy from the system.
    """

    def __init__(self, facts: ExportFacts, seed: int | None = None) -> None:
        self.facts = facts
        self._rng = np.random.default_rng(seed)  # locks itself around every draw

    @abstractmethod
    def _run(
        self, obs: Sequence[Array], noise: Floats, warm: Sequence[Array], *, output: int
    ) -> Floats:
        """Output 0, the actions, or 1, the plan; ``obs`` in the order of the spec.

        ``warm`` holds the plans before and the start times, or nothing.
        """

    @property
    def spec(self) -> PolicySpec:
        """Observation keys and shapes, A, T, To and Ta."""
        return self.facts.spec

    @property
    def n_obs_steps(self) -> int:
        """To."""
        return self.facts.spec.n_obs_steps

    @property
    def n_action_steps(self) -> int:
        """Ta."""
        return self.facts.spec.n_action_steps

    @property
    def nfe(self) -> int:
        """Network evaluations per call, fixed at export."""
        return self.facts.nfe

    @property
    def control_hz(self) -> float | None:
        """Rate of the actions, where the bundle said it."""
        return self.facts.control_hz

    @property
    def warm_start(self) -> float | None:
        """Time at which decisions start that have a ``plan``, fixed at export; None: none has."""
        return self.facts.warm_start

    def infer(
        self,
        obs: Mapping[str, Array],
        noise: Array | None = None,
        *,
        nfe: int | None = None,
        plan: Array | None = None,
    ) -> Floats:
        """The actions to execute now, (B, Ta, A) in env units.

        Args:
            obs: (B, To, ...) per key, env units, oldest first, of any real dtype.
            noise: (B, T, A) standard normal; drawn here if not given.
            nfe: the file's own number of network evaluations, or None.
            plan: (B, T, A) in env units that rows start from, NaN in rows that have none; for a
                policy with :attr:`warm_start`.

        Raises:
            ValueError: another ``nfe``.
            SpecError: keys, shapes or a dtype that do not fit, NaN or inf (key and count), a plan
                for a policy without a warm start.
            NonFiniteActionError: the actions are not finite.
        """
        return checked_actions(self._run(*self._inputs(obs, noise, nfe, plan), output=0))

    def infer_plan(
        self,
        obs: Mapping[str, Array],
        noise: Array | None = None,
        *,
        nfe: int | None = None,
        plan: Array | None = None,
    ) -> Floats:
        """As :meth:`infer`, but every action from the newest observation on: (B, P, A)."""
        return checked_actions(self._run(*self._inputs(obs, noise, nfe, plan), output=1))

    def _inputs(
        self, obs: Mapping[str, Array], noise: Array | None, nfe: int | None, plan: Array | None
    ) -> tuple[list[Array], Floats, list[Array]]:
        if nfe not in (None, self.nfe):
            raise ValueError(
                f"nfe={nfe}, but this file was exported with nfe={self.nfe}; leave nfe out, or "
                f"export the policy again with nfe={nfe}"
            )
        batch = self.spec.check_obs(obs)
        arrays = [read_observation(self.spec, key, obs[key]) for key in self.spec.obs]
        warm = self._warm_inputs(plan, batch)
        if noise is None:
            want = (batch, *self.spec.noise_shape)
            return arrays, self._rng.standard_normal(want, dtype=np.float32), warm
        return arrays, read_noise(self.spec, noise, batch), warm

    def _warm_inputs(self, plan: Array | None, batch: int) -> list[Array]:
        time = self.facts.warm_start
        if time is None:
            if plan is not None:
                raise SpecError(
                    "a plan was given, but this file was exported without a warm start; leave it "
                    "out, or export the policy again with warm_start=..."
                )
            return []
        if plan is None:
            return [np.zeros((batch, *self.spec.noise_shape)), np.ones(batch, np.float32)]
        before = read_plan(self.spec, plan, batch)
        start = np.where(np.isnan(before[:, 0, 0]), 1.0, time).astype(np.float32)
        return [np.nan_to_num(before, copy=False), start]


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Whether the name is that of an exported policy, not of a bundle."""
    return Path(path).suffix in (".onnx", ".pt2")


def open_exported(path: str | os.PathLike[str], threads: int = 1) -> ExportedRuntime:
    """The policy in an ``.onnx`` file, run with that many threads.

    Raises:
        ExportError: another kind of file. A ``.pt2`` file is refused here, for loading one can run
            code that its author put into it; ``Pt2Policy`` opens one that you made yourself.
    """
    file = Path(path)
    if file.suffix == ".onnx":
        from cmpolicy.export.onnx import OnnxPolicy

        return OnnxPolicy(file, threads)
    if file.suffix == ".pt2":
        raise ExportError(
            f"{file} is not opened: torch reads parts of a .pt2 file by unpickling and by "
            "evaluating text, so a file from someone else can run any code (CVE-2026-4538). Give "
            "the policy bundle, or the policy as .onnx, which holds numbers and operations alone. "
            "For a file that you made yourself: cmpolicy.export.pt2.Pt2Policy(path, trust=True)"
        )
    raise ExportError(f"{file} is no exported policy: expected a name ending in .onnx")
