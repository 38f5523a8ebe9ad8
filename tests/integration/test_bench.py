"""cmpolicy bench: each command end to end at tiny settings, and its bad input."""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from cmpolicy.bench import floor, gpu
from cmpolicy.bench.latency import (
    DIFFUSIONS,
    Contender,
    LatencySettings,
    measure_latency,
    time_calls,
)
from cmpolicy.bench.networks import Runtime, diffusion_chunk, make_runtime
from cmpolicy.bench.step import half_way_trainers, time_pairs
from cmpolicy.cli.main import main as command
from cmpolicy.cli.train import compose
from cmpolicy.experiment.data import load_training_data
from cmpolicy.export.plan_map import example_inputs
from cmpolicy.flow.sampler import SamplerKind
from cmpolicy.policy.bundle import read_bundle, write_bundle
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.training.device import make_accelerator
from cmpolicy.training.loader import augment_numbers
from cmpolicy_data import ReplayBuffer


def main(words: Sequence[str]) -> int:
    """``cmpolicy bench``."""
    return command(["bench", *words])


OBS = {"agent_pos": (2,), "keypoint": (9, 2)}


@pytest.fixture(scope="module")
def bundle(
    untrained_pusht: Callable[[], ConsistencyPolicy], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A small untrained Push-T policy."""
    folder = tmp_path_factory.mktemp("policy") / "bundle"
    untrained_pusht().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three short episodes of a robot that is no simulator's."""
    path = tmp_path_factory.mktemp("store") / "robot.zarr"
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer.create(path)
    for length in (30, 40, 50):
        state = rng.standard_normal((length, 3)).astype(np.float32)
        buffer.append_episode({"state": state, "action": state[:, :2]})
    return path


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    assert content["device"].startswith("cpu: ")
    assert {"python", "torch", "numpy", "cmpolicy"} <= set(content["versions"])
    assert content["command"].startswith(f"cmpolicy bench {content['benchmark']} ")
    assert "git_commit" in content
    return content


def _by_row(content: dict[str, Any]) -> dict[tuple[str, str, int], dict[str, Any]]:
    rows = content["rows"]
    found = {(row["runtime"], row["method"], row["evaluations"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def test_latency(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unrolled export and one in a loop beside the policy itself, and diffusion."""
    out = tmp_path / "new" / "latency.json"
    words = [f"policy={bundle}", "nfe=[1,5]", "calls=3", "threads=1", f"out={out}"]
    assert main(["latency", *words]) == 0
    content = _read(out)
    rows = _by_row(content)
    methods = [("flow map", 1), ("flow map", 5), ("ddpm", 100), ("ddim", 10)]
    assert set(rows) == {(r, *m) for r in ("eager", "onnx") for m in methods}
    summary = content["summary"]
    floor = summary["floor_ms"]
    assert floor == max(summary["floor_memory_ms"], summary["floor_compute_ms"]) > 0
    for (_, _, nfe), row in rows.items():
        assert row["calls"] == 3
        assert 0 < row["p50 ms"] <= row["p99 ms"]
        assert row["p50/floor"] == pytest.approx(row["p50 ms"] / (nfe * floor))
    one = summary["onnx_p50_ms_nfe1"]
    assert summary["onnx_ratio_5_to_1"] == pytest.approx(summary["onnx_p50_ms_nfe5"] / one)
    assert summary["onnx_ratio_ddpm_100_to_1"] == pytest.approx(
        summary["onnx_ddpm_p50_ms_nfe100"] / one
    )
    printed = capsys.readouterr().out
    assert "5 evaluations (flow map) cost" in printed
    assert "100 evaluations (ddpm) cost" in printed
    assert f"written to {out}" in printed


def test_latency_of_a_net_without_a_policy(tmp_path: Path) -> None:
    out = tmp_path / "latency.json"
    words = ["net=tiny", "nfe=[1]", "calls=2", "runtimes=[eager]", "diffusion=false"]
    assert main(["latency", *words, f"out={out}"]) == 0
    assert list(_by_row(_read(out))) == [("eager", "flow map", 1)]


def test_latency_of_an_encoder_without_a_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "latency.json"
    words = ["net=tiny", "encoder=compact", "nfe=[1]", "calls=2", "diffusion=false"]
    assert main(["latency", *words, f"out={out}"]) == 0
    rows = _by_row(_read(out))
    assert list(rows) == [
        ("eager", "flow map", 1),
        ("eager", "encoder", 0),
        ("onnx", "flow map", 1),
    ]
    printed = capsys.readouterr().out
    assert "net=tiny encoder=compact with random weights" in printed
    assert re.search(r"the encoder alone costs \d+\.\d\d times as much as 1\n", printed)


def test_latency_of_a_policy_that_takes_several_draws_of_noise(
    untrained_pusht: Callable[[], ConsistencyPolicy], tmp_path: Path
) -> None:
    policy = untrained_pusht()
    policy.save_pretrained(tmp_path / "ddpm")
    bundle = read_bundle(tmp_path / "ddpm")
    write_bundle(replace(bundle, sampler="ddpm", nfe=5), tmp_path / "ddpm")
    out = tmp_path / "latency.json"
    words = [f"policy={tmp_path / 'ddpm'}", "nfe=[2,3]", "calls=2", "diffusion=false"]
    assert main(["latency", *words, f"out={out}"]) == 0
    assert len(_by_row(_read(out))) == 4


@pytest.mark.parametrize("kind", ["plain", "warm", "ddpm"])
def test_the_floor_is_that_of_one_evaluation(
    untrained_pusht: Callable[[], ConsistencyPolicy],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """Whichever row was timed last, with a warm start, and with several draws of noise."""
    monkeypatch.setattr(floor, "_REPETITIONS", 1)
    policy = untrained_pusht()
    policy.warm_start = 0.5 if kind == "warm" else None
    policy.save_pretrained(tmp_path)
    if kind == "ddpm":
        write_bundle(replace(read_bundle(tmp_path), sampler="ddpm"), tmp_path)
    shared: dict[str, Any] = {"runtimes": ("eager",), "calls": 1, "diffusion": False}
    one, other = (
        measure_latency(LatencySettings(policy=str(tmp_path), nfe=nfe, **shared)).summary["flops"]
        for nfe in ((1,), (1, 3))
    )
    assert one == other > 0


def test_a_slow_row_ends_early_but_is_measured(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "latency.json"
    words = [f"policy={bundle}", "nfe=[2]", "calls=1000", "seconds=0", "runtimes=[eager]"]
    assert main(["latency", *words, "diffusion=false", f"out={out}"]) == 0
    (row,) = _read(out)["rows"]
    assert row["calls"] == 20


def _policy_and_network(
    bundle: Path, name: str
) -> tuple[ConsistencyPolicy, Runtime, dict[str, Any], Any]:
    policy = ConsistencyPolicy.from_pretrained(bundle)
    torch.nn.init.normal_(policy.net.head[-1].weight, std=0.3)  # type: ignore[arg-type]
    obs, noise = example_inputs(policy, 1)
    arrays = {key: value.numpy() for key, value in zip(policy.spec.obs, obs, strict=True)}
    return policy, make_runtime(name, policy, 1), arrays, noise.numpy()


@pytest.mark.parametrize("name", ["eager", "onnx", "pt2"])
def test_what_is_timed_is_the_policy(bundle: Path, name: str) -> None:
    """Unrolled, in a loop, and the network that the diffusion samplers call."""
    policy, runtime, obs, noise = _policy_and_network(bundle, name)
    for nfe in (1, 5):
        policy.nfe = nfe
        want = policy.infer(obs, noise)
        np.testing.assert_allclose(runtime.chunk(nfe)(obs, noise), want, rtol=0, atol=5e-3)
    x, t, s = torch.from_numpy(noise), torch.tensor([0.7]), torch.tensor([0.2])
    condition = policy.encode({key: torch.from_numpy(value) for key, value in obs.items()})
    with torch.inference_mode():
        found = runtime.network()(x, t, s, condition)
        torch.testing.assert_close(found, policy.net(x, t, s, condition), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("name", "nfe"), DIFFUSIONS.items())
def test_diffusion_makes_its_evaluations(bundle: Path, name: SamplerKind, nfe: int) -> None:
    """Of a network that is the noise predictor of one point, whose samples end there."""
    policy, _, obs, noise = _policy_and_network(bundle, "eager")
    scheduler = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    calls: list[float] = []

    def predictor(x: Tensor, t: Tensor, s: Tensor, features: Tensor | None) -> Tensor:
        assert torch.equal(t, s)
        calls.append(float(t))
        kept = scheduler.alphas_cumprod[round(float(t) * 100)]
        noise: Tensor = (x - kept.sqrt() * 0.5) / (1 - kept).sqrt()
        return noise

    chunk = diffusion_chunk(name, nfe, policy, predictor)(obs, noise)
    assert len(calls) == nfe
    assert calls == sorted(calls, reverse=True)
    normal = policy.normalizer.normalize("action", torch.from_numpy(chunk))
    torch.testing.assert_close(normal, torch.full_like(normal, 0.5), rtol=0, atol=1e-4)


def test_rows_alternate_and_the_first_call_of_a_block_has_no_time(bundle: Path) -> None:
    policy = ConsistencyPolicy.from_pretrained(bundle)
    called: list[str] = []

    def contender(name: str) -> Contender:
        def infer(obs: Any, noise: Any) -> Any:
            called.append(name)
            assert noise.shape == (1, 16, 2)
            assert set(obs) == set(OBS)
            return noise

        return Contender(name, "flow map", 1, infer)

    first, second = contender("first"), contender("second")
    time_calls([first, second], policy, LatencySettings(policy="x", calls=70))
    assert len(first.times) == len(second.times) == 70
    timed = called[10:]  # after warming up
    blocks = [(name, len(list(group))) for name, group in itertools.groupby(timed)]
    assert [name for name, _ in blocks] == ["first", "second"] * 2
    assert sum(n for name, n in blocks if name == "first") == 72  # one of each block untimed


def test_rollout(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rollout.json"
    words = [f"policy={bundle}", "episodes=2", "workers=1", f"out={out}"]
    assert main(["rollout", *words]) == 2
    assert "protocol" in capsys.readouterr().err  # which this bundle does not name
    assert main(["rollout", *words, "protocol=pusht-dp"]) == 0
    content = _read(out)
    (row,) = content["rows"]
    assert (row["episodes"], row["processes"], row["evaluations"]) == (2, 1, 1)
    assert 0 < row["steps"] <= 600
    assert content["summary"]["seconds"] > 0
    assert 0 <= content["summary"]["score_mean"] <= 1
    assert "2 episodes in" in capsys.readouterr().out


def test_rollout_beside_bare_environments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("robosuite")
    out = tmp_path / "rollout.json"
    words = ["policy=lift", "episodes=2", "workers=2", "bare_steps=20", f"out={out}"]
    assert main(["rollout", *words]) == 0
    summary = _read(out)["summary"]
    assert summary["success_rate"] == 1.0
    together, alone = summary["bare_together_steps_per_s"], summary["bare_steps_per_s"]
    assert summary["share_of_bare"] == pytest.approx(summary["steps_per_s"] / (2 * alone))
    assert summary["share_of_bare_together"] == pytest.approx(summary["steps_per_s"] / together)
    assert "2 bare environments at once make" in capsys.readouterr().out


def test_step(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.json"
    words = [
        "task=custom",
        "control_hz=10",
        f"data.path={store}",
        "data.obs=[state]",
        "net=tiny",
        "device=cpu",
    ]
    words += ["batch_size=8", "objective.sd_share=0.25", "pairs=2", "warmup=1", f"out={out}"]
    assert main(["step", *words]) == 0
    content = _read(out)
    assert [row["what"] for row in content["rows"]] == ["fm step", "psd step", "loader"]
    assert all(row["median ms"] > 0 for row in content["rows"])
    summary = content["summary"]
    assert summary["psd_to_fm"] > 0
    assert summary["loader_share_of_fm"] == pytest.approx(summary["loader_ms"] / summary["fm_ms"])
    assert content["settings"]["train"]["objective"]["settings"]["sd_share"] == 0.25
    assert "one psd step costs" in capsys.readouterr().out
    assert main(["step", *words, "objective=isd"]) == 0
    content = _read(out)
    assert content["settings"]["train"]["objective"]["name"] == "isd"
    assert content["settings"]["train"]["objective"]["settings"]["sd_share"] == 0.25
    assert content["summary"]["isd_to_fm"] > 0


def test_a_step_crops_frames_as_training_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer.create(tmp_path / "cameras.zarr")
    for _ in range(2):
        frames = rng.integers(0, 256, (30, 24, 24, 3), dtype=np.uint8)
        actions = rng.standard_normal((30, 2)).astype(np.float32)
        buffer.append_episode({"top": frames, "action": actions})
    words = ["task=custom", "control_hz=10", f"data.path={buffer.path}", "data.obs=[top]"]
    words += ["net=tiny", "encoder=compact", "device=cpu", "batch_size=8"]
    fm, psd = (compose(*words, f"objective={name}") for name in ("fm", "psd"))
    data, accelerator = load_training_data(psd), make_accelerator(psd)
    first, second, loader = half_way_trainers(fm, psd, data, accelerator, tmp_path)
    assert first.examples == second.examples == psd.examples // 2
    batch = loader.batch(8)
    n = second.model.encoder.n_augment
    assert n > 0
    numbers = augment_numbers(psd.seed, 8, 8, n)
    np.testing.assert_array_equal(batch["augment"], numbers)
    out = tmp_path / "step.json"
    assert main(["step", *words, "pairs=1", "warmup=0", f"out={out}"]) == 0
    content = json.loads(out.read_text())
    assert [row["what"] for row in content["rows"][3:]] == ["cameras' networks", "all of frames"]
    assert content["summary"]["frames_to_networks"] > 0


def test_pairs_alternate_and_warmup_is_dropped() -> None:
    done: list[str] = []
    times = time_pairs(
        lambda: done.append("first"),
        lambda: done.append("second"),
        lambda: done.append("load"),
        pairs=2,
        warmup=1,
        device=torch.device("cpu"),
    )
    pair = ["load", "first", "second"]
    assert done == [*pair, "load", "second", "first", *pair]
    assert times.first.shape == times.second.shape == times.load.shape == (2,)


def test_a_gpu_row_that_fails_without_a_message_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(config: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(gpu, "load_training_data", no_memory)
    settings = gpu.GpuSettings(device="cpu", batches=(8,), out=str(tmp_path / "gpu.json"))
    config = compose("net=tiny")
    report = gpu.measure_gpu(settings, [("tiny", config, config)], "")
    assert [row[-1] for row in report.rows] == ["failed: MemoryError: "] * 5


@pytest.mark.parametrize("words", ["latency policy=x", "delay policy=x", "step", "gpu"])
@pytest.mark.parametrize("out", ["folder.json", "delay", "step.png"])
def test_an_out_that_cannot_be_written_is_refused_before_measuring(
    words: str, out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.json").mkdir()
    assert main([*words.split(), f"out={tmp_path / out}"]) == 2
    assert f"out={tmp_path / out} must be a JSON file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["latency"], "give policy=<bundle>, or net=<preset>"),
        (["latency", "policy=x", "net=large"], "one of them, got policy=x and net=large"),
        (["latency", "policy=x", "encoder=compact"], "encoder=compact is for net=<preset>"),
        (["latency", "net=tiny", "encoder=eye"], "unknown choice encoder=eye"),
        (["latency", "net=huge"], "unknown choice net=huge"),
        (["latency", "policy=x", "runtimes=[tensorrt]"], "tensorrt"),
        (["latency", "policy=x", "runtimes=[]"], "runtimes=[] names no runtime"),
        (["latency", "policy=x", "runtimes=[onnx]", "device=cuda"], "run on the CPU, not on"),
        (["latency", "policy=nowhere/at/all"], "nowhere/at/all"),
        (["latency", "policy=x", "nfe=[0]"], "nfe=0 must be at least 1"),
        (["latency", "policy=x", "nfe=[]"], "nfe=[] names no number of evaluations"),
        (["latency", "policy=x", "cals=5"], "did you mean 'calls'?"),
        (["latency", "policy=x", "500"], "'500' is not a setting; settings are given as key=value"),
        (["latency", "policy=x", "nfe=[1"], "cannot read 'nfe=[1': quote values"),
        (["latency", "policy=x", "device=warp"], "device=warp is no device; use auto, cpu or cuda"),
        (["rollout", "policy=x", "episodes=0"], "episodes=0 must be at least 1"),
        (["step", "pairs=0"], "pairs=0 must be at least 1"),
        (["step", "objective=fm"], "name another objective, or none for psd"),
        (["step", "batchsize=3"], "did you mean 'batch_size'?"),
        (["gpu", "batches=[]"], "batches=[] and nets="),
        (["gpu", "minutes=-1"], "must be above 0"),
        (["gpu", "minutes=1"], "must be the folder of the run, such as out=outputs/gpu/run"),
        (["speed"], "unknown benchmark 'speed'"),
    ],
)
def test_bad_input(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [f"out={tmp_path / 'out.json'}"] if words[0] != "speed" else []
    assert main([*words, *out]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "out.json").exists()


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("step", "latency", "rollout"))
    assert main([]) == 2
