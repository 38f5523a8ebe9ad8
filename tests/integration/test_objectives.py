"""Every objective from a command to actions: trained, saved, run, served, exported, scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cmpolicy
from cmpolicy import ActionChunker, PolicyServer, RemotePolicy
from cmpolicy.experiment.objective import ObjectiveConfig
from cmpolicy.export.runtime import open_exported
from cmpolicy.export.write import DIFFUSION_TOLERANCE, export_policy, largest_difference
from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.objectives import OBJECTIVES, Draws, LossOutput, Objective, register
from cmpolicy.flow.objectives.objective import Examples, mean_over
from cmpolicy.policy.packing import pack, unpack
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.schema import ConfigError
from cmpolicy.spec import SpecError
from cmpolicy_data import ReplayBuffer

#: Sampler and evaluations of what is sampled in another way than a flow map.
OTHERS = [("restart", 3), ("regression", 1), ("mip", 2), ("ddpm", 4), ("ddim", 2)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "arm.zarr"
    buffer = ReplayBuffer.create(path)
    for episode in range(3):
        state = np.cumsum(np.random.default_rng(episode).normal(size=(60, 4)), axis=0)
        buffer.append_episode({"state": state, "action": state[:, :2]})
    return path


def _config(store: Path, *words: str) -> Any:
    short = ["net=tiny", "examples=256", "optim.warmup=0", "batch_size=32"]
    mine = ["task=custom", f"data.path={store}", "data.obs=[state]", "control_hz=10"]
    return cmpolicy.compose(*mine, *short, *words)


def _history(policy: Any, batch: int = 1) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        key: rng.normal(size=(batch, policy.n_obs_steps, *shape)).astype(np.float32)
        for key, shape in policy.spec.obs.items()
    }


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_train_save_and_act(store: Path, tmp_path: Path, name: str) -> None:
    few = ["eval.nfe=10"] if name == "ddpm" else []
    result = cmpolicy.train(_config(store, f"objective={name}", *few), tmp_path / "run")
    policy = result.load_policy()
    objective = OBJECTIVES[name]
    assert policy.sampler == objective.sampler
    assert policy.nfe == (10 if name == "ddpm" else objective.nfe)
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert "NaN" not in log
    assert ('"health_semigroup"' in log) == (objective.sampler in ("flow_map", "diagonal"))
    chunk = policy.infer(_history(policy, 2))
    assert chunk.shape == (2, policy.n_action_steps, 2)
    chunker = ActionChunker(policy, seed=0)
    actions = [chunker.select_action({"state": np.zeros(4)}) for _ in range(12)]
    assert np.isfinite(actions).all()


def test_resume_with_targets_from_ema_weights(store: Path, tmp_path: Path) -> None:
    """Two runs, one interrupted half-way, end alike: nothing of the objective is left behind."""
    words = ["objective=dct", "objective.weights=ema", "save_every=128"]
    whole = cmpolicy.train(_config(store, *words), tmp_path / "whole")
    cmpolicy.train(_config(store, *words), tmp_path / "parts", until=128)
    parts = cmpolicy.resume(tmp_path / "parts")
    for name, value in whole.load_policy().state_dict().items():
        assert torch.equal(value, parts.load_policy().state_dict()[name])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objective=mip", "eval.nfe=1"], "eval.nfe=1 does not go with objective=mip.*exactly 2"),
        (["objective=regression", "eval.nfe=4"], "exactly 1"),
        (["objective=ddpm", "eval.nfe=200"], "nfe=200.*1 to 50 of them"),
        (["objective=isd", "objective.sampler=heun"], "heun"),
        (["objective=fm", "objective.sampler=flow_map"], r"sampler=flow_map asks.*\['diagonal'\]"),
        (["objective=ct", "objective.sampler=diagonal"], "sampler=diagonal.*not teach"),
        (["objective=regression", "objective.sampler=mip"], "sampler=mip.*not teach"),
        (["objective=mip", "objective.sampler=ddim"], "predicts the data"),
        (["objective=psd", "objective.middle_end=0.9"], "middle_end=0.9"),
        (["objective=dct", "objective.steps_end=5"], "steps_end=5"),
        (["objective=alphaflow", "objective.alpha_end=0"], "alpha_end=0"),
        (["objective=meanflow", "objective.same_share=2"], "objective.same_share=2"),
    ],
)
def test_settings_that_cannot_be(store: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(store, *words)


@pytest.mark.parametrize("words", [["fm", "diagonal"], ["psd", "restart"], ["ddpm", "ddim"]])
def test_samplers_that_ask_for_what_an_objective_teaches(store: Path, words: list[str]) -> None:
    name, sampler = words
    config = _config(store, f"objective={name}", f"objective.sampler={sampler}", "eval.nfe=2")
    assert config.objective.sampler_kind == sampler


# -- other samplers, everywhere -----------------------------------------------------------------


@pytest.fixture(params=OTHERS, ids=lambda case: str(case[0]))
def policy(
    request: pytest.FixtureRequest, untrained_pusht: Callable[[], ConsistencyPolicy]
) -> ConsistencyPolicy:
    sampler, nfe = request.param
    bundle = replace(pack(untrained_pusht(), {}), sampler=sampler, nfe=nfe)
    return unpack(bundle, ConsistencyPolicy).eval().requires_grad_(False)


def _noise(policy: Any, batch: int) -> Any:
    rng = np.random.default_rng(1)
    return rng.standard_normal((batch, *policy.spec.noise_shape), dtype=np.float32)


def test_noise_has_the_shape_that_the_sampler_takes(policy: ConsistencyPolicy) -> None:
    several = {"restart": (3,), "ddpm": (4,)}.get(policy.sampler, ())
    assert policy.spec.noise_shape == (*several, 16, 2)
    if several:
        with pytest.raises(SpecError, match="draws of noise, horizon, action_dim"):
            policy.infer(_history(policy), np.zeros((1, 16, 2), np.float32))
    drawn = [policy.infer(_history(policy)) for _ in range(2)]
    assert np.array_equal(*drawn) == (policy.sampler in ("regression", "mip"))


def test_bundle(policy: ConsistencyPolicy, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path / "policy")
    loaded = ConsistencyPolicy.from_pretrained(tmp_path / "policy")
    assert (loaded.sampler, loaded.nfe, loaded.spec) == (policy.sampler, policy.nfe, policy.spec)
    obs, noise = _history(policy, 3), _noise(policy, 3)
    np.testing.assert_allclose(loaded.infer(obs, noise), policy.infer(obs, noise), atol=2e-3)


def test_export(policy: ConsistencyPolicy, tmp_path: Path) -> None:
    path = tmp_path / "policy.onnx"
    written = export_policy(policy, path, format="onnx")
    assert written.difference <= DIFFUSION_TOLERANCE
    runtime = open_exported(path)
    assert runtime.spec.noise_shape == policy.spec.noise_shape
    assert largest_difference(runtime, policy) <= DIFFUSION_TOLERANCE
    with pytest.raises(SpecError, match="noise"):
        runtime.infer(_history(policy, 2), np.zeros((2, 7, 2), np.float32))


def test_export_of_another_number_of_evaluations(policy: ConsistencyPolicy, tmp_path: Path) -> None:
    """Where it changes how much noise a decision takes, the file takes that much."""
    before = policy.nfe, policy.spec
    if len(policy.spec.noise_shape) == 2:
        pytest.skip("its noise does not depend on nfe")
    path = tmp_path / "policy.onnx"
    export_policy(policy, path, format="onnx", nfe=policy.nfe + 1)
    assert (policy.nfe, policy.spec) == before
    runtime = open_exported(path)
    policy.nfe += 1
    assert runtime.spec.noise_shape == policy.spec.noise_shape
    assert largest_difference(runtime, policy) <= DIFFUSION_TOLERANCE


def test_server(policy: ConsistencyPolicy) -> None:
    obs, noise = _history(policy, 2), _noise(policy, 2)
    with PolicyServer(policy, port=0) as server, RemotePolicy(server.address) as remote:
        assert remote.spec == policy.spec
        np.testing.assert_allclose(
            remote.infer(obs, noise), policy.infer(obs, noise), rtol=1e-4, atol=1e-3
        )


def test_scores_do_not_depend_on_the_batch(policy: ConsistencyPolicy) -> None:
    """Noise belongs to the seed, every draw of it, whoever shares the batch."""
    results = [
        cmpolicy.evaluate(policy, protocol="pusht-dp", seeds=seeds)
        for seeds in ("500000-500001", "500001")
    ]
    together, alone = (result.episodes[-1] for result in results)
    assert together.score == pytest.approx(alone.score, abs=1e-3)


# -- one more, from outside of the package ------------------------------------------------------


@pytest.fixture
def own_objective() -> Iterator[str]:
    @register("mean")
    @dataclass(frozen=True)
    class Mean(Objective):
        """The network's output is the data."""

        power: float = 2.0
        sampler = "regression"

        def draw(
            self, batch_size: int, shape: tuple[int, ...], generator: Any, device: torch.device
        ) -> Draws:
            t = torch.ones(batch_size, device=device)
            return Draws(torch.zeros(batch_size, *shape, device=device), t, torch.zeros_like(t))

        def loss(self, flow_map: FlowMap, examples: Examples) -> LossOutput:
            x, t, s = examples.x, examples.draws.t, examples.draws.s
            error = flow_map.output(torch.zeros_like(x), t, s, examples.features) - x
            loss = mean_over(error.abs().pow(self.power), examples.mask)
            return LossOutput(loss, {"loss_mean": loss.detach().mean()})

    yield "mean"
    del OBJECTIVES["mean"]


def test_an_objective_of_ones_own(store: Path, tmp_path: Path, own_objective: str) -> None:
    """It takes a class, and in the package a YAML for the command line."""
    objective = ObjectiveConfig.from_mapping({"name": own_objective, "power": 1.5})
    config = replace(_config(store), objective=objective)
    result = cmpolicy.train(config, tmp_path / "run")
    policy = result.load_policy()
    assert policy.sampler == "regression"
    assert np.isfinite(policy.infer(_history(policy))).all()
    assert '"loss_mean"' in (tmp_path / "run" / "log.jsonl").read_text()
