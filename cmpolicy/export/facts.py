"""What an exported file says of itself: the text that travels inside it, written and read back.

No torch here: a robot reads it with numpy and onnxruntime alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from cmpolicy.spec import PolicySpec, SpecError

FORMAT = "cmpolicy export"
FORMAT_VERSION = 1
#: Where the text stands: a metadata property of an ONNX model, an extra file of a .pt2.
KEY = "cmpolicy"
#: Names of the inputs that are no observation, and of the outputs.
NOISE, ACTIONS, PLAN = "noise", "actions", "plan"


class ExportError(ValueError):
    """An exported file that cannot be written, or was not written by cmpolicy, or is damaged."""


@dataclass(frozen=True)
class ExportFacts:
    """Of one exported policy.

    Attributes:
        spec: keys, shapes and window; the inputs of the file are in the order of ``spec.obs``.
        nfe: network evaluations per plan, unrolled in the file.
        path: of the flow map, ``linear`` or ``trigonometric``.
        sampler: ``flow_map`` or ``diagonal``.
        noise_scale: what the file multiplies its standard normal noise by.
        bundle_sha256: of the bundle's weights and normaliser, by file name.
        data: name of the data set that the policy was trained on, where the bundle says it.
        control_hz: rate of the actions, where the bundle says it.
        cmpolicy: version that wrote the file.
        protocol: that the policy is scored under, where the bundle says it.
        simulator: what the bundle says of the simulator of its data; empty if nothing.
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

    def to_json(self) -> str:
        """One line of JSON."""
        head = {"format": FORMAT, "format_version": FORMAT_VERSION}
        return json.dumps(head | asdict(self) | {"spec": self.spec.to_dict()})

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
            )
        except (KeyError, TypeError, ValueError, AttributeError, SpecError) as error:
            raise ExportError(
                f"{file} is damaged: its {KEY!r} metadata is incomplete ({error!r}); {remedy}"
            ) from error


def input_name(key: str) -> str:
    """Name of the input for an observation key: no other value of a graph has a slash in it."""
    return f"obs/{key}"
