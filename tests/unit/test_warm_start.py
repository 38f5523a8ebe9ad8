"""Decisions that start from the plan before: policy, chunker, planners, sessions, files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cmpolicy import ActionChunker, ConsistencyPolicy
from cmpolicy.cli.export import ExportSettings
from cmpolicy.cli.publish import PublishSettings
from cmpolicy.cli.serve import ServeSettings
from cmpolicy.experiment.evaluate import EvalSettings
from cmpolicy.experiment.robot_demo import RobotDemoSettings
from cmpolicy.export.pt2 import Pt2Policy
from cmpolicy.export.runtime import ExportedRuntime, open_exported
from cmpolicy.export.write import TOLERANCE, Format, export_policy
from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.path import get_path
from cmpolicy.flow.sampler import sample
from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.policy.bundle import CONFIG, BundleError
from cmpolicy.robot.policy import plan_window
from cmpolicy.robot.schedule import Asynchronous, Synchronous
from cmpolicy.serve.requests import Answer, Request, RequestError, Session
from cmpolicy.spec import PolicySpec, SpecError

SPEC = PolicySpec(
    {"pos": (2,), "grip": ()}, action_dim=3, horizon=8, n_obs_steps=3, n_action_steps=4
)
T, A, P = 8, 3, 6
NET = UNet1DConfig((8, 16), kernel_size=3, n_groups=4, time_dim=8)
BAD = [0.0, -0.5, 1.5, math.nan, math.inf, True, "0.5"]


def _policy(warm_start: float | None = 0.4, *, fresh: bool = False, **options: Any) -> Any:
    """A tiny policy in env units of hundreds; ``fresh``: its network is F = 0."""
    rng = np.random.default_rng(0)
    shapes = {**SPEC.obs, "action": (A,)}
    normalizer = Normalizer.fit({k: rng.random((64, *s)) * 500 for k, s in shapes.items()})
    torch.manual_seed(0)
    policy = ConsistencyPolicy(SPEC, NET, normalizer, **options)
    if not fresh:
        torch.nn.init.normal_(policy.net.head[-1].weight, std=0.3)  # type: ignore[arg-type]
    policy.noise_scale, policy.warm_start = 0.7, warm_start
    return policy.eval().requires_grad_(False)


def _inputs(batch: int, seed: int = 1) -> tuple[dict[str, Any], Any, Any]:
    """Observations, noise and plans of a batch."""
    rng = np.random.default_rng(seed)
    obs = {k: (rng.random((batch, 3, *s)) * 500).astype(np.float32) for k, s in SPEC.obs.items()}
    noise = rng.standard_normal((batch, T, A), dtype=np.float32)
    return obs, noise, rng.random((batch, T, A)) * 400 + 50


# -- shifting -------------------------------------------------------------------------------------


@given(st.integers(0, 12))
def test_a_plan_is_shifted_to_the_present_window(steps: int) -> None:
    """Row i of a plan made at time 0 is for time i; the window of time n begins at n - To + 1."""
    shifted = SPEC.shifted(np.arange(P)[:, None] * np.ones(A), steps)
    assert shifted.shape == (T, A)
    if steps > P:
        assert np.isnan(shifted).all()  # it ended long ago
    else:
        times = [min(max(steps - 2 + row, 0), P - 1) for row in range(T)]
        np.testing.assert_array_equal(shifted, np.array(times)[:, None] * np.ones(A))


def test_planners_know_how_far_the_plan_is() -> None:
    window = plan_window(_policy())
    plan = np.arange(P)[:, None] * np.ones(A)
    waiting, timed = Synchronous().planner(window), Asynchronous(blend=0).planner(window)
    for planner in (waiting, timed):
        assert planner.running(0) is None
        planner.begin(3)
        planner.arrive(5, plan)
        planner.choose(5)
    for planner, over in ((waiting, 1), (timed, 4)):  # what was sent, and what time it is
        running = planner.running(7)
        assert running is not None
        np.testing.assert_array_equal(running[0], plan)
        assert running[1] == over


# -- the policy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["linear", "trigonometric"])
@pytest.mark.parametrize("sampler", ["flow_map", "diagonal"])
@pytest.mark.parametrize("nfe", [1, 3])
def test_at_time_1_it_is_plain_sampling(path: str, sampler: str, nfe: int) -> None:
    obs, noise, plan = _inputs(4)
    warm = _policy(1.0, path=path, sampler=sampler, nfe=nfe)
    plain = _policy(None, path=path, sampler=sampler, nfe=nfe)
    np.testing.assert_array_equal(warm.infer(obs, noise, plan=plan), plain.infer(obs, noise))
    np.testing.assert_array_equal(warm.infer(obs, noise), plain.infer(obs, noise))


def test_it_starts_on_the_line_between_plan_and_noise() -> None:
    """A network of F = 0 stays where it starts."""
    obs, noise, plan = _inputs(2)
    policy = _policy(0.4, fresh=True)
    normal = policy.normalizer.normalize("action", torch.from_numpy(plan)).numpy()
    start = torch.from_numpy(0.6 * normal + 0.4 * 0.7 * noise)
    want = policy.normalizer.unnormalize("action", start)[:, 2:]
    np.testing.assert_allclose(policy.infer_plan(obs, noise, plan=plan), want, rtol=1e-5)


def test_near_time_0_it_stays_with_the_plan() -> None:
    obs, noise, plan = _inputs(2)
    plan = np.clip(plan, 60, 440)
    found = _policy(1e-4).infer_plan(obs, noise, plan=plan)
    np.testing.assert_allclose(found, plan[:, 2:], atol=1.0)


def test_rows_with_and_without_a_plan_do_not_touch_each_other() -> None:
    obs, noise, plan = _inputs(4)
    policy = _policy(nfe=2)
    plain, warm = policy.infer(obs, noise), policy.infer(obs, noise, plan=plan)
    plan[[0, 2]] = np.nan
    mixed = policy.infer(obs, noise, plan=plan)
    np.testing.assert_array_equal(mixed[[0, 2]], plain[[0, 2]])
    np.testing.assert_array_equal(mixed[[1, 3]], warm[[1, 3]])
    assert not np.array_equal(plain[1], warm[1])


def test_every_row_has_its_own_times() -> None:
    times: list[Tensor] = []

    def network(x: Tensor, t: Tensor, s: Tensor, features: Tensor | None) -> Tensor:
        times.append(torch.stack([t, s]))
        return torch.zeros_like(x)

    start = torch.tensor([1.0, 0.6])
    sample(FlowMap(network, get_path("linear")), torch.zeros(2, 4, 1), nfe=2, start=start)
    torch.testing.assert_close(
        torch.stack(times), torch.tensor([[[1.0, 0.6], [0.5, 0.3]], [[0.5, 0.3], [0.0, 0.0]]])
    )


def test_plans_that_do_not_fit() -> None:
    obs, noise, plan = _inputs(2)
    with pytest.raises(SpecError, match="no warm_start"):
        _policy(None).infer(obs, noise, plan=plan)
    policy = _policy()
    with pytest.raises(SpecError, match=r"plan has shape \(1, 8, 3\), expected \(2, 8, 3\)"):
        policy.infer(obs, noise, plan=plan[:1])
    with pytest.raises(SpecError, match=r"plan has shape \(2, 6, 3\).*spec.shifted"):
        policy.infer(obs, noise, plan=plan[:, 2:])
    for bad in (np.nan, np.inf):
        plan[1, 2, 0] = bad
        with pytest.raises(SpecError, match="NaN or infinite numbers in row 1"):
            policy.infer(obs, noise, plan=plan)
    with pytest.raises(SpecError, match="plan has shape"):
        policy.predict_trajectory(
            {k: torch.from_numpy(v) for k, v in obs.items()}, plan=torch.zeros(2, 6, 3)
        )


@pytest.mark.parametrize("value", BAD)
def test_times_that_are_none(value: Any) -> None:
    with pytest.raises(ValueError, match=r"warm_start=.* must be a time in \(0, 1\]"):
        _policy(value)
    if isinstance(value, float):
        for settings in (
            lambda: EvalSettings(policy="p", warm_start=value),
            lambda: ExportSettings(policy="p", out="p.onnx", warm_start=value),
            lambda: PublishSettings(policy="p", out="p", warm_start=value),
            lambda: ServeSettings(policy="p", warm_start=value),
            lambda: RobotDemoSettings(warm_start=value),
        ):
            with pytest.raises(ValueError, match="must be a time in"):
                settings()


def test_samplers_without_a_flow_have_none() -> None:
    for sampler in ("ddim", "restart", "regression"):
        with pytest.raises(ValueError, match="sampler flow_map or diagonal"):
            _policy(0.5, sampler=sampler)
    obs, noise, plan = _inputs(1)
    policy = _policy(0.5)
    with pytest.raises(ValueError, match="sampler flow_map or diagonal"):
        policy.sampler = "restart"
    cold = _policy(None, sampler="restart")
    with pytest.raises(ValueError, match="sampler flow_map or diagonal"):
        cold.warm_start = 0.5
    assert cold.warm_start is None
    tensors = {key: torch.from_numpy(value) for key, value in obs.items()}
    with pytest.raises(ValueError, match="sampler flow_map or diagonal"):
        policy.predict_trajectory(
            tensors, noise=torch.from_numpy(noise), plan=torch.from_numpy(plan), sampler="restart"
        )


def test_bundles_keep_it(tmp_path: Path) -> None:
    obs, noise, plan = _inputs(2)
    _policy(0.25).save_pretrained(tmp_path / "warm")
    _policy(None).save_pretrained(tmp_path / "plain")
    loaded = ConsistencyPolicy.from_pretrained(tmp_path / "warm")
    assert loaded.warm_start == 0.25
    assert ConsistencyPolicy.from_pretrained(tmp_path / "plain").warm_start is None
    np.testing.assert_allclose(
        loaded.infer(obs, noise, plan=plan), _policy(0.25).infer(obs, noise, plan=plan), rtol=1e-5
    )
    file = tmp_path / "warm" / CONFIG
    config = json.loads(file.read_text())
    assert "warm_start" not in json.loads((tmp_path / "plain" / CONFIG).read_text())
    for bad in (0, 2, math.nan, "half"):
        file.write_text(json.dumps(config | {"warm_start": bad}))
        with pytest.raises(BundleError, match="warm_start"):
            ConsistencyPolicy.from_pretrained(tmp_path / "warm")
    file.write_text(json.dumps(config | {"sampler": "ddim"}))
    with pytest.raises(BundleError, match="warm start"):
        ConsistencyPolicy.from_pretrained(tmp_path / "warm")


# -- the chunker ----------------------------------------------------------------------------------


def _steps(n: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(4)
    return [{"pos": rng.random(2) * 500, "grip": rng.random() * 500} for _ in range(n)]


def _stack(steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: np.stack([s[key] for s in steps])[None].astype(np.float32) for key in steps[0]}


def test_chunks_start_from_the_chunk_before() -> None:
    policy, steps, rng = _policy(), _steps(8), np.random.default_rng(5)
    noise = [rng.standard_normal((T, A), dtype=np.float32)[None] for _ in range(2)]
    chunker = ActionChunker(policy, seed=5)
    for _ in range(2):  # the second episode begins without the plan of the first
        actions = np.stack([chunker.select_action(step) for step in steps])
        first = policy.infer_plan(_stack([steps[0]] * 3), noise[0])[0]
        plan = SPEC.shifted(first, 4)[None]
        second = policy.infer_plan(_stack(steps[2:5]), noise[1], plan=plan)[0]
        np.testing.assert_array_equal(actions, np.concatenate([first[:4], second[:4]]))
        chunker.reset()


def test_ensembled_plans_start_from_the_plan_of_the_call_before() -> None:
    policy, steps, rng = _policy(), _steps(2), np.random.default_rng(5)
    noise = [rng.standard_normal((T, A), dtype=np.float32)[None] for _ in range(2)]
    policy.spec = PolicySpec(**{**SPEC.__dict__, "action_rotations": ()})
    chunker = ActionChunker(policy, ensemble=-50.0, seed=5)  # the newest plan alone counts
    for _ in range(2):
        found = [chunker.select_action(step) for step in steps]
        first = policy.infer_plan(_stack([steps[0]] * 3), noise[0])[0]
        plan = SPEC.shifted(first, 1)[None]
        second = policy.infer_plan(_stack([steps[0], *steps]), noise[1], plan=plan)[0]
        np.testing.assert_allclose(found, [first[0], second[0]], rtol=1e-6)
        chunker.reset()


# -- sessions of a server -------------------------------------------------------------------------


def _ask(session: Session, message: dict[str, Any], value: float = 0.0) -> Request:
    """Read a message of one step and answer it with a plan of ``value``, ``value`` + 1, ..."""
    request = session.read({"pos": np.zeros(2), "grip": 0.0} | message)
    assert request is not None
    plan = (value + np.arange(P))[None, :, None] * np.ones(A)
    session.answered(request, Answer(plan, 1.0, 1.0, 1))
    return request


def _starts(request: Request) -> list[float] | None:
    return None if request.plan is None else request.plan[0, :, 0].tolist()


def test_a_session_keeps_the_plan_of_its_episode() -> None:
    session = Session(SPEC, max_batch=4, is_warm=True)
    assert _starts(_ask(session, {"step": 0}, 10)) is None
    assert _starts(_ask(session, {"step": 4}, 20)) == [12, 13, 14, 15, 15, 15, 15, 15]
    assert _starts(_ask(session, {"step": 5}, 30)) == [20, 20, 21, 22, 23, 24, 25, 25]
    assert np.isnan(_starts(_ask(session, {"step": 50}, 40)) or []).all()  # it ended long ago
    assert _starts(_ask(session, {"step": 3}, 50)) is None  # a smaller step: a new episode
    assert _starts(_ask(session, {"step": 4, "reset": True}, 60)) is None
    assert session.read({"reset": True}) is None
    assert _starts(_ask(session, {"step": 5}, 70)) is None
    assert _starts(_ask(session, {})) is None  # of unknown age
    own = np.full((T, A), 7.0)
    assert _starts(_ask(session, {"step": 6, "plan": own})) == [7.0] * T


def test_a_session_refuses_plans_that_do_not_fit() -> None:
    step = {"pos": np.zeros(2), "grip": 0.0}
    with pytest.raises(RequestError, match="no warm start"):
        Session(SPEC, max_batch=4).read(step | {"plan": np.zeros((T, A))})
    session = Session(SPEC, max_batch=4, is_warm=True)
    for bad in (np.zeros((P, A)), np.zeros((1, T, A)), "plan", np.full((T, A), np.inf)):
        with pytest.raises(RequestError, match="plan"):
            session.read(step | {"plan": bad})
    plain = Session(SPEC, max_batch=4)
    _ask(plain, {"step": 0})
    assert _starts(_ask(plain, {"step": 4})) is None


# -- files ----------------------------------------------------------------------------------------


def _opened(file: Path) -> ExportedRuntime:
    return Pt2Policy(file, trust=True) if file.suffix == ".pt2" else open_exported(file)


@pytest.mark.parametrize(
    ("format_", "path", "sampler", "nfe"),
    [
        ("onnx", "linear", "flow_map", 1),
        ("onnx", "trigonometric", "diagonal", 2),
        ("pt2", "linear", "flow_map", 2),
    ],
)
def test_files_are_the_policy(
    tmp_path: Path, format_: Format, path: str, sampler: str, nfe: int
) -> None:
    policy = _policy(path=path, sampler=sampler, nfe=nfe)
    file = tmp_path / f"warm.{format_}"
    assert export_policy(policy, file, format=format_).difference <= TOLERANCE
    runtime = _opened(file)
    assert runtime.warm_start == 0.4
    obs, noise, plan = _inputs(3)
    plan[1] = np.nan
    scale = policy.normalizer.to_arrays()["action.scale"].numpy()
    for start in (None, plan):
        want = policy.infer_plan(obs, noise, plan=start)
        found = runtime.infer_plan(obs, noise, plan=start)
        assert np.abs((found - want) * scale).max() <= 1e-4
        np.testing.assert_array_equal(runtime.infer(obs, noise, plan=start), found[:, :4])
    with pytest.raises(SpecError, match="plan has shape"):
        runtime.infer(obs, noise, plan=plan[:1])
    chunks = [
        np.stack([chunker.select_action(step) for step in _steps(8)])
        for chunker in (ActionChunker(policy, seed=1), ActionChunker(runtime, seed=1))
    ]
    assert np.abs((chunks[0] - chunks[1]) * scale).max() <= 1e-4


def test_plain_files_take_no_plan(tmp_path: Path) -> None:
    file = tmp_path / "plain.pt2"
    export_policy(_policy(None), file, format="pt2")
    obs, noise, plan = _inputs(1)
    assert _opened(file).warm_start is None
    with pytest.raises(SpecError, match="exported without a warm start"):
        _opened(file).infer(obs, noise, plan=plan)
