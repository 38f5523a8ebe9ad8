from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cmpolicy import ConsistencyPolicy
from cmpolicy.flow.objectives import build_objective
from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.policy.policy import Batch
from cmpolicy.robot.history import ObservationHistory
from cmpolicy.spec import PolicySpec, SpecError

NET = UNet1DConfig((16, 32), kernel_size=3, n_groups=4, time_dim=16)


def _policy(
    *, obs: dict[str, tuple[int, ...]] | None = None, seed: int = 0, **options: Any
) -> ConsistencyPolicy:
    """A tiny policy in env units of hundreds, its last layer not zero, as after some training."""
    window = {"action_dim": 2, "horizon": 8, "n_obs_steps": 2, "n_action_steps": 4}
    window |= {name: options.pop(name) for name in tuple(window) if name in options}
    spec = PolicySpec(obs={"agent_pos": (2,), "keypoint": (3, 2)} if obs is None else obs, **window)
    rng = np.random.default_rng(0)
    shapes = {**spec.obs, "action": (spec.action_dim,)}
    normalizer = Normalizer.fit({k: rng.random((64, *s)) * 500 for k, s in shapes.items()})
    torch.manual_seed(seed)
    policy = ConsistencyPolicy(spec, NET, normalizer, **options)
    torch.nn.init.normal_(policy.net.head[-1].weight, std=0.3)  # type: ignore[arg-type]
    return policy.eval()


def _obs(policy: ConsistencyPolicy, batch: int, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    to = policy.n_obs_steps
    return {
        key: torch.rand(batch, to, *shape, generator=generator) * 500
        for key, shape in policy.spec.obs.items()
    }


def _noise(policy: ConsistencyPolicy, batch: int) -> Tensor:
    return torch.randn(batch, *policy.spec.noise_shape, generator=torch.Generator().manual_seed(2))


def _batch(policy: ConsistencyPolicy, batch: int) -> Batch:
    spec = policy.spec
    action = torch.rand(batch, spec.horizon, spec.action_dim, generator=torch.manual_seed(3)) * 500
    padded = torch.zeros(batch, spec.horizon, dtype=torch.bool)
    return {"obs": _obs(policy, batch), "action": action, "action_is_pad": padded}


def _numpy(obs: dict[str, Tensor]) -> dict[str, Any]:
    return {key: value.numpy() for key, value in obs.items()}


# -- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("to", "horizon", "ta"), [(1, 8, 8), (2, 8, 4), (3, 16, 8), (2, 2, 1)])
def test_shapes(batch: int, to: int, horizon: int, ta: int) -> None:
    policy = _policy(n_obs_steps=to, horizon=horizon, n_action_steps=ta, action_dim=3)
    obs = _obs(policy, batch)
    assert policy.spec.noise_shape == (horizon, 3)
    assert policy.predict_trajectory(obs).shape == (batch, horizon, 3)
    assert policy.predict_action_chunk(obs).shape == (batch, ta, 3)
    chunk = policy.infer(_numpy(obs))
    assert isinstance(chunk, np.ndarray)
    assert chunk.shape == (batch, ta, 3)
    assert chunk.dtype == np.float32


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3, 2)])
def test_observations_of_any_shape(shape: tuple[int, ...]) -> None:
    policy = _policy(obs={"state": shape})
    assert policy.predict_action_chunk(_obs(policy, 2)).shape == (2, 4, 2)


@pytest.mark.parametrize("to", [1, 2, 3])
def test_chunk_starts_now(to: int) -> None:
    """The first executed action is at the newest observation, To - 1 steps after the oldest."""
    policy = _policy(n_obs_steps=to)
    obs, noise = _obs(policy, 3), _noise(policy, 3)
    trajectory = policy.predict_trajectory(obs, noise=noise)
    chunk = policy.predict_action_chunk(obs, noise=noise)
    assert torch.equal(chunk, trajectory[:, to - 1 : to - 1 + 4])


def test_actions_are_in_env_units() -> None:
    """F = 0 leaves the noise, so the chunk is the noise in env units."""
    policy = _policy()
    torch.nn.init.zeros_(policy.net.head[-1].weight)  # type: ignore[arg-type]
    noise = _noise(policy, 2)
    trajectory = policy.predict_trajectory(_obs(policy, 2), noise=noise)
    assert torch.equal(trajectory, policy.normalizer.unnormalize("action", noise))
    assert trajectory.abs().max() > 50


def test_features_are_of_the_normalised_observations() -> None:
    policy = _policy()
    obs = _obs(policy, 2)
    swapped = dict(reversed(obs.items()))
    normal = {key: policy.normalizer.normalize(key, obs[key]) for key in policy.spec.obs}
    assert policy.encode(obs).shape == (2, 256)
    assert torch.equal(policy.encode(obs), policy.encoder(normal))
    assert torch.equal(policy.encode(swapped), policy.encode(obs))


def test_observations_are_encoded_once() -> None:
    """Per training step and per decision, however many evaluations share the features."""
    policy = _policy(objective=build_objective("isd"))
    calls: list[int] = []
    policy.encoder.register_forward_hook(lambda module, inputs, output: calls.append(1))
    policy.compute_loss(_batch(policy, 4), progress=1.0)
    assert len(calls) == 1
    policy.predict_action_chunk(_obs(policy, 2), nfe=5)
    assert len(calls) == 2


# -- inference ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("sampler", ["flow_map", "diagonal"])
def test_rows_do_not_depend_on_each_other(steps: int, sampler: Any) -> None:
    policy = _policy()
    obs, noise = _obs(policy, 4), _noise(policy, 4)
    options: dict[str, Any] = {"nfe": steps, "sampler": sampler}
    whole = policy.predict_action_chunk(obs, noise=noise, **options)
    for i in range(4):
        row = {key: value[i : i + 1] for key, value in obs.items()}
        one = policy.predict_action_chunk(row, noise=noise[i : i + 1], **options)
        torch.testing.assert_close(one[0], whole[i], rtol=0, atol=1e-3)  # of 500 px
    changed = {key: value.clone() for key, value in obs.items()}
    changed["keypoint"][2] += 20
    after = policy.predict_action_chunk(changed, noise=noise, **options)
    assert (after != whole).flatten(1).any(1).tolist() == [False, False, True, False]


def test_infer_is_the_chunk_in_numpy() -> None:
    policy = _policy()
    obs, noise = _obs(policy, 3), _noise(policy, 3)
    found = policy.infer(_numpy(obs), noise.numpy())
    assert np.array_equal(found, policy.predict_action_chunk(obs, noise=noise).numpy())


def test_the_policys_own_number_of_evaluations() -> None:
    """One meaning, one name: what arrays and tensors take where no other is given."""
    policy = _policy(nfe=3)
    obs, noise = _obs(policy, 3), _noise(policy, 3)
    three = policy.predict_action_chunk(obs, noise=noise, nfe=3).numpy()
    assert np.array_equal(policy.predict_action_chunk(obs, noise=noise).numpy(), three)
    assert np.array_equal(policy.infer(_numpy(obs), noise.numpy()), three)
    assert np.array_equal(policy.infer_plan(_numpy(obs), noise.numpy())[:, :4], three)
    one = policy.infer(_numpy(obs), noise.numpy(), nfe=1)
    assert np.array_equal(policy.predict_action_chunk(obs, noise=noise, nfe=1).numpy(), one)
    assert not np.array_equal(one, three)
    with pytest.raises(ValueError, match="nfe=0"):
        _policy(nfe=0)


def test_unknown_observations_are_ignored_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By ``infer``, and by the history of chunker and control loop."""
    policy = _policy()
    obs, noise = _numpy(_obs(policy, 1)), _noise(policy, 1).numpy()
    expected = policy.infer(obs, noise)
    more = {**obs, "prompt": "push the T", "stranger": np.full(3, np.nan)}
    found = [policy.infer(more, noise) for _ in range(3)]
    history = ObservationHistory(policy.spec)
    history.push({key: value[0, 0] for key, value in obs.items()} | {"camera": np.zeros(3)})
    texts = [record.getMessage() for record in caplog.records]
    assert [text[:55] for text in texts] == [
        "observation keys ['prompt', 'stranger'] are ignored: th",
        "observation keys ['camera'] are ignored: the policy was",
    ]
    assert all(np.array_equal(chunk, expected) for chunk in found)


def test_infer_takes_any_number_type_and_lists() -> None:
    policy = _policy()
    obs, noise = _numpy(_obs(policy, 2)), _noise(policy, 2).numpy()
    whole = {key: np.round(value) for key, value in obs.items()}
    expected = policy.infer(whole, noise)
    for convert in (np.int64, np.float64, np.float16):
        found = policy.infer({k: v.astype(convert) for k, v in whole.items()}, noise)
        assert np.array_equal(found, expected)
    assert np.array_equal(policy.infer({k: v.tolist() for k, v in whole.items()}, noise), expected)
    tensors = {k: torch.as_tensor(v) for k, v in whole.items()}
    assert np.array_equal(policy.infer(tensors, noise), expected)


def test_infer_changes_nothing() -> None:
    policy = _policy()
    obs, noise = _numpy(_obs(policy, 2)), _noise(policy, 2).numpy()
    before = {key: value.copy() for key, value in obs.items()}, noise.copy()
    first, again = policy.infer(obs, noise), policy.infer(obs, noise)
    assert np.array_equal(first, again)
    assert all(np.array_equal(obs[key], before[0][key]) for key in obs)
    assert np.array_equal(noise, before[1])


def test_noise_scale() -> None:
    """F = 0 leaves the noise, times the scale."""
    policy = _policy()
    torch.nn.init.zeros_(policy.net.head[-1].weight)  # type: ignore[arg-type]
    policy.noise_scale = 0.5
    obs, noise = _obs(policy, 2), _noise(policy, 2)
    expected = policy.normalizer.unnormalize("action", 0.5 * noise)
    assert torch.equal(policy.predict_trajectory(obs, noise=noise), expected)


def test_noise_is_drawn_where_none_is_given() -> None:
    policy = _policy()
    obs = _obs(policy, 2)
    torch.manual_seed(0)
    first = policy.predict_action_chunk(obs)
    assert not torch.equal(policy.predict_action_chunk(obs), first)
    torch.manual_seed(0)
    assert torch.equal(policy.predict_action_chunk(obs), first)


def test_double_precision_policy() -> None:
    policy = _policy().double()
    obs = _obs(policy, 2)  # float32: it is brought to the policy's precision
    chunk = policy.predict_action_chunk(obs, noise=_noise(policy, 2).double())
    assert chunk.dtype == torch.float64
    single = _policy().predict_action_chunk(obs, noise=_noise(policy, 2))
    torch.testing.assert_close(chunk.float(), single, rtol=0, atol=1e-2)
    assert policy.predict_action_chunk(obs).dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keypoint": None}, ["missing: ['keypoint']", "['agent_pos', 'keypoint']"]),
        ({"keypoint": (1, 2, 4, 2)}, ["'keypoint'", "(1, 2, 4, 2)", "(batch, 2, 3, 2)"]),
        ({"agent_pos": (2, 2)}, ["'agent_pos'", "(2, 2)", "(batch, 2, 2)", "n_obs_steps=2"]),
    ],
)
def test_wrong_observations(changes: dict[str, Any], words: list[str]) -> None:
    policy = _policy()
    obs = {k: v for k, v in _obs(policy, 1).items() if changes.get(k, k) is not None}
    obs |= {key: torch.zeros(shape) for key, shape in changes.items() if shape is not None}
    for call in (lambda: policy.predict_action_chunk(obs), lambda: policy.infer(_numpy(obs))):
        with pytest.raises(SpecError) as caught:
            call()
        for word in words:
            assert word in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_observation(bad: float) -> None:
    policy = _policy()
    obs = _numpy(_obs(policy, 2))
    obs["keypoint"][0, 1, 2] = bad
    with pytest.raises(SpecError, match="'keypoint' holds 2 NaN or infinite numbers"):
        policy.infer(obs)


def test_arrays_where_tensors_are_expected() -> None:
    policy = _policy()
    with pytest.raises(SpecError, match=r"'agent_pos' is a ndarray.*policy\.infer\(obs\)"):
        policy.predict_action_chunk(_numpy(_obs(policy, 1)))


def test_wrong_noise_and_steps() -> None:
    policy = _policy()
    obs = _obs(policy, 2)
    with pytest.raises(SpecError, match=r"noise has shape \(1, 8, 2\), expected \(2, 8, 2\)"):
        policy.predict_action_chunk(obs, noise=_noise(policy, 1))
    with pytest.raises(ValueError, match=r"nfe=0.*at least 1"):
        policy.predict_action_chunk(obs, nfe=0)
    with pytest.raises(ValueError, match="unknown sampler 'heun'"):
        policy.predict_action_chunk(obs, sampler="heun")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sampler=mip is for networks that predict the data"):
        policy.predict_action_chunk(obs, sampler="mip", nfe=2)
    with pytest.raises(ValueError, match="sampler=ddim is for networks that predict the noise"):
        policy.sampler = "ddim"
    assert policy.sampler == "flow_map"
    policy.sampler = "diagonal"


# -- construction -------------------------------------------------------------------------------


def test_horizon_that_the_net_does_not_divide() -> None:
    with pytest.raises(ValueError, match="horizon=7 is not divisible by 2"):
        _policy(horizon=7)


def test_unknown_path_and_sampler() -> None:
    with pytest.raises(ValueError, match="unknown path 'cubic'"):
        _policy(path="cubic")
    with pytest.raises(ValueError, match="unknown sampler 'heun'"):
        _policy(sampler="heun")


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"state": (4,)}, ["'action'", "(2,)", "None"]),
        ({"state": (5,), "action": (2,)}, ["'state'", "(4,)", "(5,)"]),
        ({"state": (4,), "action": (3,)}, ["'action'", "(2,)", "(3,)"]),
    ],
)
def test_normaliser_of_another_policy(shapes: dict[str, tuple[int, ...]], words: list[str]) -> None:
    spec = PolicySpec({"state": (4,)}, 2, 8, 2, 4)
    with pytest.raises(ValueError, match="normaliser and policy disagree") as caught:
        ConsistencyPolicy(spec, NET, Normalizer.identity(shapes))
    for word in words:
        assert word in str(caught.value)


# -- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fm", "isd"])
def test_loss(name: str) -> None:
    policy = _policy(objective=build_objective(name))
    output = policy.compute_loss(_batch(policy, 6), torch.Generator().manual_seed(0))
    assert output.per_example.shape == (6,)
    assert torch.equal(output.loss, output.per_example.mean())
    output.loss.backward()
    for key, parameter in policy.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.any(), key


def test_given_draws_are_those_of_the_generator() -> None:
    policy = _policy(objective=build_objective("isd"))
    batch = _batch(policy, 6)
    draws = policy.draw(6, torch.Generator().manual_seed(0))
    expected = policy.compute_loss(batch, torch.Generator().manual_seed(0))
    assert torch.equal(policy.compute_loss(batch, draws=draws).per_example, expected.per_example)
    assert torch.equal(
        policy(batch, draws=draws).per_example, expected.per_example
    )  # as DDP calls it


def test_loss_of_slices_is_the_loss_of_the_batch() -> None:
    policy = _policy(objective=build_objective("isd")).double()
    batch, draws = _batch(policy, 8), policy.draw(8, torch.Generator().manual_seed(0))
    whole = policy.compute_loss(batch, draws=draws).per_example
    for part in (slice(0, 4), slice(4, 8)):
        rank: Batch = {
            "obs": {key: value[part] for key, value in batch["obs"].items()},
            "action": batch["action"][part],
            "action_is_pad": batch["action_is_pad"][part],
        }
        found = policy.compute_loss(rank, draws=draws.slice(part.start, part.stop)).per_example
        torch.testing.assert_close(found, whole[part])


def test_condition_of_one_sample_changes_no_other_loss() -> None:
    policy = _policy(objective=build_objective("isd", sd_share=1.0)).double()
    batch, draws = _batch(policy, 5), policy.draw(5, torch.Generator().manual_seed(0))
    before = policy.compute_loss(batch, draws=draws).per_example
    batch["obs"]["agent_pos"][3] += 30
    after = policy.compute_loss(batch, draws=draws).per_example
    differs = ~torch.isclose(before, after, rtol=0, atol=1e-10)
    assert differs.nonzero().flatten().tolist() == [3]


def test_loss_under_autocast() -> None:
    policy = _policy(objective=build_objective("isd"))
    batch, draws = _batch(policy, 16), policy.draw(16, torch.Generator().manual_seed(0))
    expected = policy.compute_loss(batch, draws=draws)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = policy.compute_loss(batch, draws=draws)
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss, expected.loss, rtol=0.05, atol=0)
    found.loss.backward()


def test_padded_actions_are_trained_on_or_not() -> None:
    policy = _policy(objective=build_objective("fm")).double()
    batch, draws = _batch(policy, 4), policy.draw(4, torch.Generator().manual_seed(0))
    batch["action_is_pad"][1, 5:] = True
    whole = policy.compute_loss(batch, draws=draws).per_example
    policy.pad_loss = False
    masked = policy.compute_loss(batch, draws=draws).per_example
    assert (masked != whole).tolist() == [False, True, False, False]
    batch["action"][1, 5:] += 100.0  # still seen by the network, but no target
    x_t_alone = policy.compute_loss(batch, draws=draws).per_example
    assert (x_t_alone != masked).tolist() == [False, True, False, False]


def test_ema_weights_encode_for_themselves() -> None:
    """u_hat of the EMA weights is made of the EMA encoder's features."""
    settings = {"tangent_weights": "ema", "sd_begin": 0.0, "weight_power": 0.0}
    policy = _policy(objective=build_objective("isd", **settings)).double()
    batch, draws = _batch(policy, 4), policy.draw(4, torch.Generator().manual_seed(0))
    same = policy.compute_loss(batch, draws=draws, ema=policy).per_example
    ema = _policy().double()
    torch.nn.init.zeros_(ema.encoder.mlp[-1].weight)  # type: ignore[union-attr, index, arg-type]
    other = policy.compute_loss(batch, draws=draws, ema=ema).per_example
    assert not torch.allclose(same, other)


def test_training_without_objective() -> None:
    policy = _policy()
    with pytest.raises(ValueError, match=r"no objective.*build_objective\('psd'\)"):
        policy.compute_loss(_batch(policy, 2))


def test_few_steps_lower_the_loss() -> None:
    """On one fixed batch and draw the flow-matching error falls: gradients point the right way."""
    policy = _policy(objective=build_objective("isd", weight_power=0.0)).train()
    batch, draws = _batch(policy, 32), policy.draw(32, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        output = policy.compute_loss(batch, draws=draws)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.metrics["loss_fm"].item())
    assert losses[-1] < 0.6 * losses[0]


def test_health_is_finite() -> None:
    policy = _policy()
    health = policy.health(_batch(policy, 8), torch.Generator().manual_seed(0))
    for value in (health.semigroup, health.tangent, health.variance_ratio):
        assert torch.isfinite(value)
        assert value >= 0


# -- plans --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("to", "horizon", "ta"), [(1, 8, 8), (2, 8, 4), (3, 16, 8), (2, 2, 1)])
def test_a_plan_is_the_trajectory_from_the_newest_observation_on(
    to: int, horizon: int, ta: int
) -> None:
    policy = _policy(n_obs_steps=to, horizon=horizon, n_action_steps=ta, action_dim=3)
    obs, noise = _obs(policy, 2), _noise(policy, 2)
    plan = policy.infer_plan(_numpy(obs), noise.numpy())
    assert plan.shape == (2, policy.spec.n_plan_steps, 3) == (2, horizon - to + 1, 3)
    trajectory = policy.predict_trajectory(obs, noise=noise).numpy()
    np.testing.assert_array_equal(plan, trajectory[:, to - 1 :])
    np.testing.assert_array_equal(plan[:, :ta], policy.infer(_numpy(obs), noise.numpy()))


def test_a_plan_refuses_what_infer_refuses() -> None:
    policy = _policy()
    obs = _numpy(_obs(policy, 1))
    obs["keypoint"][0, 0, 0, 0] = np.nan
    with pytest.raises(SpecError, match="'keypoint' holds 1 NaN"):
        policy.infer_plan(obs)
