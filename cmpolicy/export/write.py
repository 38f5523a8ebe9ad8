"""Writing an exported policy: traced, checked against the policy, then moved into place."""

from __future__ import annotations

import copy
import importlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import cmpolicy
from cmpolicy.export.onnx import BLANK, SEAL, OnnxPolicy, seal
from cmpolicy.export.plan_map import PlanMap, Target, example_inputs, example_warm_inputs
from cmpolicy.export.pt2 import Pt2Policy
from cmpolicy.export.runtime import (
    ACTIONS,
    KEY,
    NOISE,
    PLAN,
    WARM,
    ExportedRuntime,
    ExportError,
    ExportFacts,
    input_name,
)
from cmpolicy.nn.kernels import MAX_BATCH
from cmpolicy.policy.policy import ConsistencyPolicy

Format = Literal["onnx", "pt2"]
TARGETS: dict[str, Target] = {"onnx": "onnxruntime", "pt2": "torch"}
#: Largest accepted difference to the policy, relative to the normalised actions or to their range.
TOLERANCE = 1e-5
#: The same of a diffusion, whose first steps divide the network's rounding by sqrt(a_k) = 1 / 64.
DIFFUSION_TOLERANCE = 1e-4
#: Evaluations are unrolled: beyond this a file is slow to make and to load.
MAX_NFE = 32
_CHECKED_BATCHES = (1, 2, MAX_BATCH + 1)


@dataclass(frozen=True)
class Exported:
    """A written file: size in bytes, and largest difference to the policy (see TOLERANCE)."""

    path: Path
    size: int
    difference: float


def export_policy(
    policy: ConsistencyPolicy,
    out: str | os.PathLike[str],
    *,
    format: Format,
    nfe: int | None = None,
    bundle_sha256: Mapping[str, str] | None = None,
) -> Exported:
    """Write ``policy`` as one file; an older one at the same place stays until the new one is good.

    Args:
        policy: with the ``sampler``, ``noise_scale`` and ``warm_start`` to export; of its metadata
            data, protocol and simulator are kept.
        out: the file, ending in ``.onnx`` or ``.pt2``.
        format: ``onnx`` or ``pt2``.
        nfe: network evaluations per plan; None takes the policy's own.
        bundle_sha256: of the files of the bundle it comes from.

    Raises:
        ImportError: onnx or onnxruntime are not installed.
        ExportError: a name or ``nfe`` that cannot be, or a file that disagrees with the policy.
        OSError: the disk is full or not writable.
    """
    target = Path(out).expanduser().absolute()
    check_request(target, format, nfe)
    if nfe is not None:
        policy = copy.copy(policy)  # the weights stay shared; nfe may change what noise it takes
        policy.nfe = nfe
    known = policy.metadata
    facts = ExportFacts(
        spec=policy.spec,
        nfe=policy.nfe,
        path=policy.path_name,
        sampler=policy.sampler,
        noise_scale=policy.noise_scale,
        bundle_sha256=dict(bundle_sha256 or {}),
        data=known.get("data"),
        control_hz=policy.control_hz,
        cmpolicy=cmpolicy.__version__,
        protocol=known.get("config", {}).get("task", {}).get("protocol"),
        simulator=dict(known.get("simulator", {})),
        warm_start=policy.warm_start,
    )
    module = PlanMap(policy, target=TARGETS[format]).eval()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        new = Path(folder) / target.name
        with quiet():
            (_write_onnx if format == "onnx" else _write_program)(module, policy, facts, new)
        written = OnnxPolicy(new) if format == "onnx" else Pt2Policy(new, trust=True)
        difference = largest_difference(written, policy)
        limit = DIFFUSION_TOLERANCE if policy.sampler in ("ddpm", "ddim") else TOLERANCE
        if not difference <= limit:
            raise ExportError(
                f"the exported policy differs from the policy by {difference:.2g} of the "
                f"normalised range, expected at most {limit:.0e}; nothing was written. Float32 "
                "cannot hold this map to that precision: check the policy's normaliser (a huge "
                "offset beside a tiny range) and its weights"
            )
        with new.open("rb") as stream:
            os.fsync(stream.fileno())
        new.replace(target)
    return Exported(target, target.stat().st_size, difference)


def check_request(target: Path, format: str, nfe: int | None = None) -> None:
    """Find what is quick to find before a policy is loaded.

    Raises:
        ExportError, ImportError: see :func:`export_policy`.
    """
    if target.suffix != f".{format}":
        raise ExportError(
            f"out={target.name}: a file of format={format} is named *.{format}; give "
            f"out={target.with_suffix('.' + format).name}"
        )
    if target.is_dir():
        raise ExportError(f"{target} is a directory; give out= the name of a file")
    if nfe is not None and not 1 <= nfe <= MAX_NFE:
        raise ExportError(
            f"nfe={nfe} must be between 1 and {MAX_NFE}: the evaluations are unrolled in the file"
        )
    if format == "onnx":
        try:
            for name in ("onnx", "onnxscript", "onnxruntime"):
                importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"exporting to ONNX needs {error.name}: pip install 'cmpolicy[export]'"
            ) from error


def largest_difference(runtime: ExportedRuntime, policy: ConsistencyPolicy) -> float:
    """Of plans, in normalised units, over the largest normalised action where that is above 1."""
    scale = policy.normalizer.to_arrays()["action.scale"].cpu()
    first, worst = policy.n_obs_steps - 1, 0.0
    for batch in _CHECKED_BATCHES:
        obs, noise = example_inputs(policy, batch, seed=batch)
        here = {
            key: value.to(policy.device) for key, value in zip(policy.spec.obs, obs, strict=True)
        }
        plan = _example_plan(policy, batch)
        trajectory = policy.predict_trajectory(
            here,
            noise=noise.to(policy.device, policy.dtype),
            plan=None if plan is None else plan.to(policy.device),
        )
        want = trajectory[:, first:].cpu()
        arrays = {key: value.numpy() for key, value in zip(policy.spec.obs, obs, strict=True)}
        start = None if plan is None else plan.numpy()
        got = torch.from_numpy(runtime.infer_plan(arrays, noise.numpy(), plan=start))
        normal = policy.normalizer.normalize("action", trajectory[:, first:]).cpu()
        relative = (got - want).abs() * scale.abs() / max(1.0, float(normal.abs().max()))
        found = float(relative.max())
        if not found <= worst:  # also of NaN
            worst = found
    return worst


def _example_plan(policy: ConsistencyPolicy, batch: int) -> Tensor | None:
    """As a caller gives it, with NaN in every other row; None without a warm start."""
    warm = example_warm_inputs(policy, batch, seed=batch)
    if not warm:
        return None
    plan, start = warm
    plan[start == 1] = torch.nan
    return plan


def _write_onnx(module: PlanMap, policy: ConsistencyPolicy, facts: ExportFacts, file: Path) -> None:
    warm_names = () if facts.warm_start is None else WARM
    program = torch.onnx.export(
        _traced(module, policy),
        dynamo=True,
        optimize=True,
        verbose=False,
        input_names=[*map(input_name, facts.spec.obs), NOISE, *warm_names],
        output_names=[ACTIONS, PLAN],
    )
    if program is None:
        raise ExportError("torch.onnx.export gave no program; upgrade torch")
    model = program.model
    for node in model.graph:  # stack traces of whoever exported
        node.metadata_props.clear()
    model.producer_name, model.producer_version = "cmpolicy", facts.cmpolicy
    model.metadata_props.update({KEY: facts.to_json(), SEAL: BLANK})
    file.write_bytes(seal(program.model_proto.SerializeToString()))


def _write_program(
    module: PlanMap, policy: ConsistencyPolicy, facts: ExportFacts, file: Path
) -> None:
    program = _traced(module, policy)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    torch.export.save(program, file, extra_files={KEY: facts.to_json()})


def _traced(module: PlanMap, policy: ConsistencyPolicy) -> torch.export.ExportedProgram:
    """The map as a program for any batch size.

    Raises:
        ExportError: a network or an encoder that ``torch.export`` cannot follow.
    """
    obs, noise = example_inputs(policy, batch=2)
    inputs = (obs, noise, *example_warm_inputs(policy, batch=2))
    rows = {0: torch.export.Dim("batch")}
    shapes = (tuple(rows for _ in obs), *(rows for _ in inputs[1:]))
    try:
        return torch.export.export(module, inputs, dynamic_shapes=shapes)
    except Exception as error:  # of the network's own, and of torch without a common base
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ExportError(
            f"torch.export cannot follow net.kind={policy.net_config.kind} or encoder.kind="
            f"{policy.encoder_config.kind} for any batch size: {why}; a module "
            "takes sizes from tensor.shape, not from len(tensor), and does not branch on values"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's remarks about packages that are not there and its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
