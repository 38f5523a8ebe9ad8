"""One network in several runtimes: eager, compiled, exported to .pt2, exported to ONNX.

Legend: B batch, T horizon, A action size, D features.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import numpy.typing as npt
import torch
from torch import Tensor

from cmpolicy.export.kernels import prepare
from cmpolicy.export.onnx import open_session
from cmpolicy.export.pt2 import Pt2Policy
from cmpolicy.export.runtime import open_exported
from cmpolicy.export.write import Format, export_policy, quiet
from cmpolicy.flow.flow_map import FlowMap, Network
from cmpolicy.flow.sampler import SamplerKind
from cmpolicy.nn.unet1d import UNet1D
from cmpolicy.policy.packing import pack, unpack
from cmpolicy.policy.policy import ConsistencyPolicy

Array = npt.NDArray[Any]
Obs = Mapping[str, Array]
#: One action chunk: observations (1, To, ...) per key and noise (1, T, A) to (1, Ta, A).
Infer = Callable[[Obs, Array], Array]

#: An export is unrolled up to here; for more evaluations the exported network is called in a loop.
UNROLLED = 4


class Runtime(Protocol):
    """What runs the network of ``policy``; made of it by one of :data:`RUNTIMES`."""

    def chunk(self, nfe: int) -> Infer:
        """The policy's action chunk with that many evaluations."""
        ...

    def network(self) -> Network:
        """F(x, t, s, features) of tensors, for samplers of any kind."""
        ...


class TorchRuntime:
    """torch as it is, or with the network compiled (for batch 1, at the first call)."""

    def __init__(self, policy: ConsistencyPolicy, *, compiled: bool) -> None:
        self._policy = policy
        if compiled:
            self._policy = copy.deepcopy(policy)
            self._policy.net.compile(dynamic=False)

    def chunk(self, nfe: int) -> Infer:
        def infer(obs: Obs, noise: Array) -> Array:
            self._policy.nfe = nfe
            return self._policy.infer(obs, noise)

        return infer

    def network(self) -> Network:
        return self._policy.net


class ExportedRuntimes:
    """Files of ``cmpolicy export``, made for the purpose."""

    def __init__(self, policy: ConsistencyPolicy, format: Format, threads: int) -> None:
        self._policy, self._format, self._threads = policy, format, threads

    def chunk(self, nfe: int) -> Infer:
        if nfe > UNROLLED:
            looped = _with_network(self._policy, self.network())
            looped.nfe = nfe
            return looped.infer
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"policy.{self._format}"
            export_policy(self._policy, file, format=self._format, nfe=nfe)
            if self._format == "pt2":
                return Pt2Policy(file, trust=True).infer
            return open_exported(file, self._threads).infer

    def network(self) -> Network:
        """See :class:`Runtime`; exported once."""
        return self._exported_network

    @cached_property
    def _exported_network(self) -> Network:
        net = cast(UNet1D, copy.deepcopy(self._policy.net))
        module = net.at_any_times(prepare if self._format == "onnx" else None).eval()
        spec = self._policy.spec
        feature_dim = int(cast(Any, self._policy.encoder).feature_dim)
        x = torch.zeros(1, spec.horizon, spec.action_dim)
        inputs = (x, torch.ones(1), torch.zeros(1), torch.zeros(1, feature_dim))
        if self._format == "pt2":
            program: Network = torch.export.export(module, inputs).module()
            return program
        with quiet():
            exported = torch.onnx.export(
                module, inputs, dynamo=True, verbose=False, input_names=["x", "t", "s", "features"]
            )
        if exported is None:
            raise RuntimeError("torch.onnx.export gave no program")
        session = open_session(exported.model_proto.SerializeToString(), self._threads)

        def run(x: Tensor, t: Tensor, s: Tensor, features: Tensor | None) -> Tensor:
            values = {"x": x, "t": t, "s": s, "features": features}
            feeds = {name: value.numpy() for name, value in values.items() if value is not None}
            return torch.from_numpy(session.run(None, feeds)[0])

        return run


def diffusion_chunk(
    kind: SamplerKind, nfe: int, policy: ConsistencyPolicy, network: Network
) -> Infer:
    """An action chunk by ``ddpm`` or ``ddim``, the network taken for one that predicts the noise.

    The actions mean nothing, their time does. Each draws as much noise as it needs.
    """
    bundle = replace(pack(policy, {}), sampler=kind, nfe=nfe, warm_start=None)
    diffusion = unpack(bundle, ConsistencyPolicy).to(policy.device, policy.dtype)
    diffusion = _with_network(diffusion.eval().requires_grad_(False), network)
    return lambda obs, _: diffusion.infer(obs)


def _with_network(policy: ConsistencyPolicy, network: Network) -> ConsistencyPolicy:
    """A copy of the policy that calls ``network`` instead of its own."""
    copied = copy.deepcopy(policy)
    copied.flow_map = FlowMap(network, policy.flow_map.path)
    # its dtype and device are read off its parameters, which it has to keep
    copied.register_parameter("weights", next(policy.parameters()))
    return copied


def make_runtime(name: str, policy: ConsistencyPolicy, threads: int) -> Runtime:
    """The runtime of that name: one of ``eager``, ``compiled``, ``pt2``, ``onnx``."""
    if name == "onnx" or name == "pt2":
        return ExportedRuntimes(policy, "onnx" if name == "onnx" else "pt2", threads)
    return TorchRuntime(policy, compiled=name == "compiled")
