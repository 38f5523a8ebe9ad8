"""Exported files give the policy's numbers: both formats, paths, samplers, batches, evaluations."""

from __future__ import annotations

import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn

from cmpolicy.experiment.evaluate import EvalSettings
from cmpolicy.experiment.protocols import Simulator
from cmpolicy.experiment.scored import given_policy
from cmpolicy.export import write
from cmpolicy.export.plan_map import PlanMap, Target, example_inputs
from cmpolicy.export.pt2 import Pt2Policy
from cmpolicy.export.runtime import ExportedRuntime, ExportError, open_exported
from cmpolicy.export.write import TOLERANCE, Format, export_policy, largest_difference
from cmpolicy.nn.kernels import MAX_BATCH
from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.observation import NonFiniteActionError
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.robot.policy import ChunkPolicy
from cmpolicy.spec import PolicySpec, SpecError

ODD_KEYS: dict[str, tuple[int, ...]] = {
    "arm.joint pos/0": (3,),
    "noise": (2, 2),
    "plan": (),
    "conv2d": (1,),
    "über%2E": (2,),
}
BATCHES = (1, 2, 3, MAX_BATCH + 1)


def make_policy(
    obs: dict[str, tuple[int, ...]] | None = None,
    *,
    dims: tuple[int, ...] = (8, 16),
    window: tuple[int, int, int] = (8, 2, 4),
    action_dim: int = 2,
    noise_scale: float = 0.7,
    **options: Any,
) -> ConsistencyPolicy:
    """A tiny policy in env units of hundreds, whose last layer is not zero."""
    horizon, to, ta = window
    spec = PolicySpec(obs or {"agent_pos": (2,), "keypoint": (3, 2)}, action_dim, horizon, to, ta)
    rng = np.random.default_rng(0)
    shapes = {**spec.obs, "action": (action_dim,)}
    normalizer = Normalizer.fit({k: rng.random((64, *s)) * 500 for k, s in shapes.items()})
    torch.manual_seed(0)
    net = UNet1DConfig(dims, kernel_size=3, n_groups=4, time_dim=8)
    policy = ConsistencyPolicy(spec, net, normalizer, **options)
    nn.init.normal_(policy.net.head[-1].weight, std=0.3)  # type: ignore[arg-type]
    policy.noise_scale = noise_scale
    return policy.eval().requires_grad_(False)


def inputs(policy: ConsistencyPolicy, batch: int) -> tuple[dict[str, Any], Any]:
    """Observations and noise as arrays."""
    obs, noise = example_inputs(policy, batch, seed=batch)
    return {k: v.numpy() for k, v in zip(policy.spec.obs, obs, strict=True)}, noise.numpy()


#: Stateless, so the tests share one per file.
@cache
def runtime_of(file: Path) -> ExportedRuntime:
    """The runtime of a file that was made here."""
    return Pt2Policy(file, trust=True) if file.suffix == ".pt2" else open_exported(file)


# -- the map, before it is written ----------------------------------------------------------------


@pytest.mark.parametrize("target", get_args(Target))
@pytest.mark.parametrize("path", ["linear", "trigonometric"])
@pytest.mark.parametrize("sampler", ["flow_map", "diagonal"])
@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_map_is_the_policy(target: Target, path: str, sampler: Any, nfe: int) -> None:
    policy = make_policy(path=path, sampler=sampler)
    policy.nfe = nfe
    plan_map = PlanMap(policy, target=target).eval()
    scale = policy.normalizer.to_arrays()["action.scale"]
    for batch in BATCHES:
        obs, noise = example_inputs(policy, batch)
        arrays = dict(zip(policy.spec.obs, obs, strict=True))
        want = policy.predict_trajectory(arrays, noise=noise)[:, 1:]
        with torch.inference_mode():
            actions, plan = plan_map(obs, noise)
        assert torch.equal(actions, plan[:, :4])
        normal = policy.normalizer.normalize("action", want).abs().max()
        assert ((plan - want) * scale).abs().max() <= TOLERANCE * max(1.0, float(normal))


@pytest.mark.parametrize("target", get_args(Target))
@pytest.mark.parametrize(
    ("dims", "window", "action_dim"),
    [
        ((8,), (1, 1, 1), 1),
        ((8, 16, 24), (4, 3, 2), 7),
        ((16, 8), (6, 1, 6), 3),
        ((4, 4), (2, 2, 1), 2),  # one number per group at the lowest level
    ],
)
def test_map_of_any_window_and_depth(
    target: Target, dims: tuple[int, ...], window: tuple[int, int, int], action_dim: int
) -> None:
    policy = make_policy(ODD_KEYS, dims=dims, window=window, action_dim=action_dim)
    obs, noise = example_inputs(policy, 3)
    arrays = dict(zip(policy.spec.obs, obs, strict=True))
    want = policy.predict_trajectory(arrays, noise=noise)[:, window[1] - 1 :]
    with torch.inference_mode():
        actions, plan = PlanMap(policy, target=target)(obs, noise)
    scale = policy.normalizer.to_arrays()["action.scale"]
    assert actions.shape == (3, window[2], action_dim)
    normal = policy.normalizer.normalize("action", want).abs().max()
    assert ((plan - want) * scale).abs().max() <= TOLERANCE * max(1.0, float(normal))


def test_map_leaves_the_policy_alone_and_keeps_its_numbers() -> None:
    policy = make_policy()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    obs, noise = example_inputs(policy, 2)
    for target in get_args(Target):
        plan_map = PlanMap(policy, target=target).eval()
        with torch.inference_mode():
            plan = plan_map(obs, noise)[1]
        assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
        twin = make_policy(noise_scale=1.0)
        changed = PlanMap(twin, target=target).eval()
        nn.init.zeros_(twin.net.head[-1].weight)  # type: ignore[arg-type]
        with torch.inference_mode():
            assert not torch.equal(changed(obs, noise)[1], plan)  # the noise scale is inside
            assert torch.equal(changed(obs, noise * 0.7)[1], plan)  # and the copy is its own


@pytest.mark.parametrize("value", [-1e4, -100.0, -20.0, -1.0, 0.0, 1.0, 20.0, 100.0, 1e4])
def test_mish_of_any_number(value: float) -> None:
    """Neither overflow nor a loss of digits where softplus is large or small."""
    from cmpolicy.export.kernels import _norm_mish

    norm = nn.GroupNorm(1, 1)
    # two steps of one channel normalise to -1 and 1: the weight makes any number of them
    x = torch.tensor([[[[-1.0, 1.0]]]])
    norm.weight = nn.Parameter(torch.tensor([-value]))
    norm.bias = nn.Parameter(torch.tensor([0.0]))
    found = _norm_mish(norm, x).flatten()
    unit = torch.group_norm(x, 1, eps=norm.eps).flatten()
    torch.testing.assert_close(found, nn.functional.mish(unit * value), rtol=1e-6, atol=1e-6)


# -- files ----------------------------------------------------------------------------------------

CASES: dict[str, tuple[ConsistencyPolicy, Format, int]] = {
    "onnx": (make_policy(), "onnx", 1),
    "onnx-odd": (
        make_policy(ODD_KEYS, dims=(8,), window=(5, 3, 2), path="trigonometric"),
        "onnx",
        1,
    ),
    "onnx-diagonal": (
        make_policy(dims=(8,), path="trigonometric", sampler="diagonal"),
        "onnx",
        2,
    ),
    "pt2": (make_policy(), "pt2", 1),
    "pt2-odd": (make_policy(ODD_KEYS, dims=(8,), window=(5, 3, 2), sampler="diagonal"), "pt2", 2),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file per case."""
    folder = tmp_path_factory.mktemp("exported")
    for name, (policy, format_, nfe) in CASES.items():
        policy.control_hz, policy.metadata = 10.0, {"data": "pusht_human"}
        written = export_policy(
            policy,
            folder / f"{name}.{format_}",
            format=format_,
            nfe=nfe,
            bundle_sha256={"model.safetensors": "ab" * 32},
        )
        assert written.size == written.path.stat().st_size
        assert 0 <= written.difference <= TOLERANCE
    left = sorted(path.name for path in folder.iterdir())
    assert left == sorted(f"{name}.{format_}" for name, (_, format_, _) in CASES.items())
    return {name: folder / f"{name}.{format_}" for name, (_, format_, _) in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_file_is_the_policy(files: dict[str, Path], name: str) -> None:
    policy, _, nfe = CASES[name]
    runtime = runtime_of(files[name])
    policy.nfe = nfe
    assert isinstance(runtime, ChunkPolicy)
    assert runtime.spec == policy.spec
    assert runtime.spec == policy.spec
    assert (runtime.n_obs_steps, runtime.n_action_steps) == (
        policy.n_obs_steps,
        policy.n_action_steps,
    )
    scale = policy.normalizer.to_arrays()["action.scale"].numpy()
    for batch in (*BATCHES, 50):
        obs, noise = inputs(policy, batch)
        want, plan = policy.infer_plan(obs, noise), runtime.infer_plan(obs, noise)
        assert plan.dtype == np.float32
        limit = TOLERANCE * max(1.0, np.abs(policy.infer(obs, noise) * scale).max())
        assert np.abs((plan - want) * scale).max() <= limit
        np.testing.assert_array_equal(runtime.infer(obs, noise), plan[:, : policy.n_action_steps])
    assert largest_difference(runtime, policy) <= TOLERANCE


@pytest.mark.parametrize("name", ["onnx-odd", "pt2-odd"])
def test_facts_travel_inside(files: dict[str, Path], name: str) -> None:
    policy, _, nfe = CASES[name]
    facts = runtime_of(files[name]).facts
    assert (facts.nfe, facts.path, facts.sampler) == (nfe, policy.path_name, policy.sampler)
    assert facts.noise_scale == policy.noise_scale
    assert facts.bundle_sha256 == {"model.safetensors": "ab" * 32}
    assert (facts.data, facts.control_hz) == ("pusht_human", 10.0)
    assert runtime_of(files[name]).control_hz == 10.0
    assert str(Path(__file__).parents[2]).encode() not in files[name].read_bytes()


def test_an_object_is_scored_in_the_simulator_that_its_file_tells_of(tmp_path: Path) -> None:
    policy = make_policy(dims=(8,))
    simulator = {"task": "lift", "env_args": "{}", "actions": "absolute"}
    task = {"task": {"protocol": "robomimic-ph"}}
    policy.metadata = {"data": "mine", "simulator": simulator, "config": task}
    written = export_policy(policy, tmp_path / "policy.pt2", format="pt2")
    for given in (policy, Pt2Policy(written.path, trust=True)):
        scored = given_policy(given, EvalSettings(policy="an object"))
        assert (scored.protocol, scored.data) == ("robomimic-ph", "mine")
        assert scored.simulator == Simulator(**simulator)


@pytest.mark.parametrize("name", ["onnx", "pt2"])
def test_any_dtype_and_noise_of_its_own(files: dict[str, Path], name: str) -> None:
    runtime = runtime_of(files[name])
    obs = {"agent_pos": np.full((2, 2, 2), 256), "keypoint": np.full((2, 2, 3, 2), 100)}
    _, noise = inputs(CASES["onnx"][0], 2)
    want = runtime.infer({k: v.astype(np.float32) for k, v in obs.items()}, noise)
    for dtype in (np.int64, np.uint16, np.float64, np.float16):
        cast: Any = {key: value.astype(dtype) for key, value in obs.items()}
        np.testing.assert_array_equal(runtime.infer(cast, noise.astype(np.float64)), want)
    fortran: Any = {key: np.asfortranarray(value) for key, value in obs.items()}
    np.testing.assert_array_equal(runtime.infer(fortran, noise), want)
    first, second = runtime.infer(obs), runtime.infer(obs)
    assert np.abs(first - second).max() > 1e-3
    assert np.abs(first[0] - first[1]).max() > 1e-3  # each row its own noise


@pytest.mark.parametrize("name", ["onnx", "pt2"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keypoint": None}, r"missing: \['keypoint'\]"),
        ({"agent_pos": np.zeros((1, 1, 2))}, r"'agent_pos' has shape \(1, 1, 2\)"),
        ({"agent_pos": np.zeros((0, 2, 2)), "keypoint": np.zeros((0, 2, 3, 2))}, "shape"),
        ({"agent_pos": np.zeros((2, 2, 2))}, "batch size"),
        ({"agent_pos": np.full((1, 2, 2), np.nan)}, "'agent_pos' holds 4 NaN"),
        ({"agent_pos": np.full((1, 2, 2), 1e300)}, "'agent_pos' holds 4 NaN or infinite"),
        ({"agent_pos": np.full((1, 2, 2), "x")}, "has dtype <U1, expected real numbers"),
        ({"agent_pos": np.full((1, 2, 2), 1j)}, "has dtype complex128"),
    ],
)
def test_observations_that_do_not_fit(
    files: dict[str, Path], name: str, change: dict[str, Any], message: str
) -> None:
    runtime = runtime_of(files[name])
    obs: dict[str, Any] = {"agent_pos": np.zeros((1, 2, 2)), "keypoint": np.zeros((1, 2, 3, 2))}
    obs = {key: value for key, value in (obs | change).items() if value is not None}
    with pytest.raises(SpecError, match=message):
        runtime.infer(obs)


def test_actions_that_are_not_finite_are_an_error_as_of_the_policy(files: dict[str, Path]) -> None:
    obs = {"agent_pos": np.full((1, 2, 2), 3e38), "keypoint": np.full((1, 2, 3, 2), 3e38)}
    for policy in (CASES["pt2"][0], runtime_of(files["pt2"])):
        for ask in (policy.infer, policy.infer_plan):
            with pytest.raises(NonFiniteActionError, match="actions are not finite"):
                ask(obs)


def test_noise_that_does_not_fit(files: dict[str, Path]) -> None:
    runtime = runtime_of(files["onnx"])
    obs, noise = inputs(CASES["onnx"][0], 2)
    with pytest.raises(SpecError, match=r"noise has shape \(1, 8, 2\), expected \(2, 8, 2\)"):
        runtime.infer(obs, noise[:1])
    noise[0, 0, 0] = np.inf
    with pytest.raises(SpecError, match="noise holds 1 NaN or infinite"):
        runtime.infer(obs, noise)


@pytest.mark.parametrize("name", ["onnx", "pt2"])
def test_threads_do_not_disturb_each_other(files: dict[str, Path], name: str) -> None:
    runtime, policy = runtime_of(files[name]), CASES[name][0]
    calls = [inputs(policy, 1 + i % 3) for i in range(60)]
    want = [runtime.infer(*call) for call in calls]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns inside whatever is not made for it
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda call: runtime.infer(*call), calls))
    finally:
        sys.setswitchinterval(interval)
    for a, b in zip(found, want, strict=True):
        # not to the last bit: products are chosen by where in memory their operands lie
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_a_policy_in_double_precision_is_exported_in_single(tmp_path: Path) -> None:
    policy = make_policy(dims=(8,)).double()
    written = export_policy(policy, tmp_path / "policy.pt2", format="pt2")
    assert 0 < written.difference <= TOLERANCE
    assert policy.dtype == torch.float64


# -- writing --------------------------------------------------------------------------------------


def test_a_file_that_disagrees_is_not_moved_into_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older file stays as it was, and nothing else is left."""
    out = tmp_path / "policy.pt2"
    out.write_bytes(b"older")
    monkeypatch.setattr(write, "TOLERANCE", -1.0)
    with pytest.raises(ExportError, match="differs from the policy by"):
        export_policy(make_policy(dims=(8,)), out, format="pt2")
    assert hashlib.sha256(out.read_bytes()).digest() == hashlib.sha256(b"older").digest()
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("name", "nfe", "message"),
    [
        ("policy.pt2", 1, r"out=policy\.pt2: a file of format=onnx .* give out=policy\.onnx"),
        ("policy", 1, r"give out=policy\.onnx"),
        ("policy.onnx", 0, "nfe=0 must be between 1 and"),
        ("policy.onnx", 33, "nfe=33 must be between 1 and 32"),
    ],
)
def test_requests_that_cannot_be(tmp_path: Path, name: str, nfe: int, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export_policy(make_policy(dims=(8,)), tmp_path / name, format="onnx", nfe=nfe)
    assert list(tmp_path.iterdir()) == []
