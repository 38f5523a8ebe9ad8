"""A policy with eyes, end to end: own store, training, resume, rollout, robot, server, export."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from safetensors import safe_open

import cmpolicy
from cmpolicy import ConsistencyPolicy, ControlLoop, PolicyServer, RemotePolicy
from cmpolicy.cli.main import main
from cmpolicy.experiment.data import load_training_data
from cmpolicy.experiment.data_checks import DataWarning
from cmpolicy.experiment.run import FACTS_FILE
from cmpolicy.nn.encoders.image import CompactEncoderConfig, ImageEncoder
from cmpolicy.nn.registry import ENCODERS
from cmpolicy.observation import ObservationError, encode_jpeg, read_observation
from cmpolicy.robot import SafetyLimits
from cmpolicy.spec import PolicySpec, SpecError
from cmpolicy.training.trackers import read_log
from cmpolicy_data import ReplayBuffer, bundled_path
from cmpolicy_eval import get_protocol

NET = ["net.down_dims=[8,16]", "net.n_groups=4", "net.time_dim=8", "net.kernel_size=3"]
EYES = ["encoder.width=8", "encoder.camera_dim=8", "encoder.dim=8"]
RUN = ["batch_size=8", "optim.warmup=0", "eval.windows=8", "log.trackers=[]", "device=cpu"]
SIZES = {"top": (24, 32, 3), "wrist": (16, 16, 3)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three episodes of two cameras and an arm."""
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer.create(tmp_path_factory.mktemp("store") / "my.zarr")
    for length in (30, 25, 20):
        cameras = {
            f"camera_{key}": rng.integers(0, 256, (length, *shape), dtype=np.uint8)
            for key, shape in SIZES.items()
        }
        state = np.cumsum(rng.normal(size=(length, 9)), axis=0).astype(np.float32)
        buffer.append_episode({**cameras, "state": state, "action": state[:, :2]})
    return buffer.path


def _words(store: Path, *more: str) -> list[str]:
    obs = "data.obs={top: camera_top, wrist: camera_wrist, arm: 'state[:7]'}"
    mine = ["task=custom", f"data.path={store}", obs, "control_hz=20", "encoder=compact"]
    mine.append("data.targets={pose: 'state[7:]'}")
    return [*mine, *NET, *EYES, *RUN, "encoder.jitter=0.1", "data.val_fraction=0.34", *more]


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "straight"
    assert main(["train", *_words(store), "examples=48", f"out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def policy(run: Path) -> ConsistencyPolicy:
    """With a head that is not zero: frames then matter to actions."""
    policy = ConsistencyPolicy.from_pretrained(run / "policy_last")
    torch.manual_seed(0)
    for name, p in policy.net.named_parameters():
        if name.startswith("head"):
            torch.nn.init.normal_(p, std=0.2)
    return policy


def _step(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    frames = {k: rng.integers(0, 256, s, dtype=np.uint8) for k, s in SIZES.items()}
    return {**frames, "arm": rng.normal(size=7).astype(np.float32)}


def _batch(rows: int) -> dict[str, Any]:
    steps = [[_step(2 * row), _step(2 * row + 1)] for row in range(rows)]
    return {key: np.stack([[s[key] for s in pair] for pair in steps]) for key in steps[0][0]}


def _noise(rows: int) -> Any:
    return np.random.default_rng(9).standard_normal((rows, 16, 2), dtype=np.float32)


def test_a_resumed_run_is_the_straight_one_to_the_bit(store: Path, run: Path) -> None:
    """Order, crops and jitter are functions of the example counter; also from mapped frames."""
    out = run.parent / "resumed"
    config = cmpolicy.compose(*_words(store, "examples=48", "data.image_memory=1e-6"))
    assert not cmpolicy.train(config, out, until=24).finished
    assert cmpolicy.resume(out).finished
    for name in ("model.safetensors", "normalizer.safetensors"):
        straight, resumed = ((p / "policy_last" / name).read_bytes() for p in (run, out))
        assert straight == resumed


def test_held_out_frames_are_encoded_as_few_at_a_time_as_in_training(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that just fits into the memory must not end the run at its first evaluation."""
    rows: list[int] = []

    class Counted(CompactEncoderConfig):
        kind = "counted"

        def build(self, spec: PolicySpec) -> ImageEncoder:
            encoder = super().build(spec)
            encoder.register_forward_pre_hook(lambda _, given: rows.append(len(given[0]["top"])))
            return encoder

    monkeypatch.setitem(ENCODERS, "counted", Counted)
    words = _words(store, "examples=16", "eval.windows=20", "encoder.kind=counted")
    run = cmpolicy.train(cmpolicy.compose(*words), tmp_path / "run")
    assert "health_semigroup" in run.metrics
    assert max(rows) == 8


def test_the_bundle_knows_its_frames(policy: ConsistencyPolicy, run: Path) -> None:
    assert policy.spec.images == ("top", "wrist")
    assert policy.spec.obs["top"] == SIZES["top"]
    assert policy.encoder_config.kind == "compact"
    assert "top.scale" not in policy.normalizer.to_arrays()
    card = (run / "policy_last/README.md").read_text()
    assert "`top` (24, 32, 3)" in card
    assert "the policy does not see: `pose`" in card


def test_targets_keep_their_scaling_when_the_data_grow(store: Path, tmp_path: Path) -> None:
    """The features learned to tell them in it."""
    grown = tmp_path / "grown.zarr"
    shutil.copytree(store, grown)
    config = cmpolicy.compose(*_words(grown, "examples=48"))
    cmpolicy.train(config, tmp_path / "run", until=16)
    before = load_training_data(config)
    buffer = ReplayBuffer.open(grown, "r+")
    far = {key: np.asarray(buffer[key][:30]) for key in buffer}
    buffer.append_episode({**far, "state": 20 * far["state"]})
    with pytest.warns(DataWarning, match="scaling stays"):
        cmpolicy.resume(tmp_path / "run", {"data.changed": "accept"}, until=32)
    cmpolicy.resume(tmp_path / "run")
    facts = json.loads((tmp_path / "run" / FACTS_FILE).read_text())
    assert facts["target_span"] == before.target_span.tolist()
    now = load_training_data(config)
    assert abs(now.target_span).max() > 5 * abs(before.target_span).max()
    again = now.with_held_out_of(facts, 0.34, 0)
    np.testing.assert_array_equal(again.targets[:75], before.targets[:75])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.targets={action: 'state[7:]'}"], "data.targets has the key 'action'"),
        (["data.normalize.top=gaussian"], "frames are always scaled from 0..255"),
        (["data.obs.arm={key: state, kind: state, layout: chw}"], "layout is of images"),
    ],
)
def test_settings_that_would_do_nothing(
    store: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *_words(store, *words)]) == 2
    assert message in capsys.readouterr().err


def test_numbers_that_look_like_frames_and_names_that_cannot_be_served(tmp_path: Path) -> None:
    buffer = ReplayBuffer.create(tmp_path / "my.zarr")
    rng = np.random.default_rng(0)
    for _ in range(3):
        steps = np.cumsum(rng.normal(size=(20, 2)), axis=0)
        buffer.append_episode({"small": rng.random((20, 3, 8, 9)), "step": steps, "action": steps})
    words = [f"data.path={buffer.path}", "task=custom", "control_hz=10", "examples=8", *RUN, *NET]
    with pytest.warns(DataWarning) as said:
        cmpolicy.train(cmpolicy.compose(*words, "data.obs=[small,step]"), tmp_path / "run")
    text = str(said[0].message)
    assert "small: has the shape of camera frames, channels first" in text
    assert "step: cmpolicy serve knows another meaning of this name" in text
    obs = "data.obs={small: {key: small, kind: state}, phase: step}"
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        cmpolicy.train(cmpolicy.compose(*words, obs), tmp_path / "told")


def test_what_the_features_told_in_training_is_logged_and_not_kept(
    policy: ConsistencyPolicy, run: Path
) -> None:
    entries = read_log(run)
    assert all("target_error" in e for e in entries if e["kind"] == "train")
    assert all("val_target_error" in e for e in entries if e["kind"] == "eval")
    assert {e["kind"] for e in entries} == {"train", "eval"}
    assert policy.target_head is None
    with safe_open(run / "policy_last/model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "target" in name]  # noqa: SIM118
    assert set(policy.spec.obs) == {"top", "wrist", "arm"}


def test_every_frame_matters(policy: ConsistencyPolicy) -> None:
    obs, noise = _batch(1), _noise(1)
    plain = policy.infer(obs, noise)
    for key in SIZES:
        for step in range(2):
            changed = {k: v.copy() for k, v in obs.items()}
            changed[key][0, step] = 255 - changed[key][0, step]
            assert not np.array_equal(policy.infer(changed, noise), plain), (key, step)
    as_floats = {k: v.astype(np.float32) for k, v in obs.items()}
    assert np.array_equal(policy.infer(as_floats, noise), plain)
    with pytest.raises(ObservationError, match=r"'top' .*not whole.*multiply by 255"):
        policy.infer({**obs, "top": obs["top"] / 255}, noise)
    with pytest.raises(ValueError, match=r"'top' has shape \(1, 2, 24, 32, 4\)"):
        policy.infer({**obs, "top": np.zeros((1, 2, 24, 32, 4), np.uint8)}, noise)
    tensors = {key: torch.from_numpy(value) for key, value in obs.items()}
    tensors["top"] = tensors["top"] / 255  # as torchvision gives them: nearly black here
    with pytest.raises(SpecError, match=r"'top' holds torch.float32; frames are torch.uint8"):
        policy.predict_trajectory(tensors)


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_exports_take_frames(
    policy: ConsistencyPolicy, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    """Crop, scaling and network are in the file: equal to torch within 1e-4."""
    policy.save_pretrained(tmp_path / "bundle")
    file = tmp_path / f"policy.{format}"
    words = [f"policy={tmp_path / 'bundle'}", f"format={format}", f"out={file}"]
    assert main(["export", *words]) == 0
    use = "cmpolicy.OnnxPolicy" if format == "onnx" else "cmpolicy.export.pt2.Pt2Policy"
    assert f"next: {use}({str(file)!r}" in capsys.readouterr().out  # no simulator to score it in
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        exported: Any = cmpolicy.OnnxPolicy(file)
    else:
        from cmpolicy.export.pt2 import Pt2Policy

        exported = Pt2Policy(file, trust=True)
    for rows in (1, 3):
        obs, noise = _batch(rows), _noise(rows)
        np.testing.assert_allclose(
            exported.infer(obs, noise), policy.infer(obs, noise), rtol=1e-4, atol=1e-4
        )
    # from BGR, and from a camera that hangs upside down: views that torch does not take
    views = {key: obs[key][..., ::-1, ::-1, ::-1] for key in SIZES}
    copies = {key: value.copy() for key, value in views.items()}
    expected = policy.infer({**obs, **copies}, noise)
    assert np.array_equal(policy.infer({**obs, **views}, noise), expected)
    np.testing.assert_allclose(
        exported.infer({**obs, **views}, noise), expected, rtol=1e-4, atol=1e-4
    )


def test_server_with_frames(policy: ConsistencyPolicy) -> None:
    """A real client of ours, and openpi's, which sends (H, W, 3) uint8 and a prompt."""
    obs, noise = _batch(3), _noise(3)
    with PolicyServer(policy, port=0) as server:
        with RemotePolicy(server.address) as remote:
            assert remote.spec.images == ("top", "wrist")
            np.testing.assert_allclose(
                remote.infer(obs, noise), policy.infer(obs, noise), rtol=1e-4, atol=1e-5
            )
        module = pytest.importorskip("openpi_client.websocket_client_policy")
        client = module.WebsocketClientPolicy("127.0.0.1", server.port)
        message = {**_step(), "prompt": "push", "noise": noise[0]}
        one = {key: np.stack([value, value])[None] for key, value in _step().items()}
        np.testing.assert_allclose(
            client.infer(message)["actions"], policy.infer(one, noise[:1])[0], rtol=1e-4, atol=1e-5
        )
        with pytest.raises(RuntimeError, match="'top' has its channels first"):
            client.infer({**message, "top": np.moveaxis(message["top"], -1, 0)})
        client._ws.close()


def test_server_with_frames_as_files(policy: ConsistencyPolicy) -> None:
    obs, noise = _batch(3), _noise(3)
    files = {key: [[encode_jpeg(f, 80) for f in history] for history in obs[key]] for key in SIZES}
    decoded = {k: read_observation(policy.spec, k, v) for k, v in files.items()}
    expected = policy.infer({**obs, **decoded}, noise)
    assert not np.allclose(expected, policy.infer(obs, noise), atol=1e-3)
    with PolicyServer(policy, port=0, max_batch=512) as server:
        with RemotePolicy(server.address, jpeg=80) as remote:
            np.testing.assert_allclose(remote.infer(obs, noise), expected, rtol=1e-4, atol=1e-5)
            many = {key: value[:1].repeat(300, axis=0) for key, value in obs.items()}
            assert len(remote.infer(many)) == 300  # more than a list of the wire holds
        module = pytest.importorskip("openpi_client.websocket_client_policy")
        client = module.WebsocketClientPolicy("127.0.0.1", server.port)
        step = {**_step(), "noise": noise[0]}
        with pytest.raises(RuntimeError, match="'top' holds bytes that are no JPEG or PNG"):
            client.infer({**step, "top": b"\xff\xd8"})
        step["top"] = encode_jpeg(step["top"], 95)
        assert client.infer(step)["actions"].shape == (policy.n_action_steps, 2)
        client._ws.close()


def test_a_policy_that_resizes(policy: ConsistencyPolicy, tmp_path: Path) -> None:
    resizing = copy.deepcopy(policy)
    resizing.spec = dataclasses.replace(policy.spec, resize=True)
    resizing.save_pretrained(tmp_path / "bundle")
    resizing = ConsistencyPolicy.from_pretrained(tmp_path / "bundle")
    obs, noise = _batch(2), _noise(2)
    doubled = obs["top"].repeat(2, axis=2).repeat(2, axis=3)  # each pixel four times
    np.testing.assert_allclose(
        resizing.infer({**obs, "top": doubled}, noise), policy.infer(obs, noise), atol=1e-6
    )
    tensors = {key: torch.from_numpy(value) for key, value in {**obs, "top": doubled}.items()}
    chunk = resizing.predict_action_chunk(tensors, noise=torch.from_numpy(noise))
    np.testing.assert_allclose(chunk.numpy(), policy.infer(obs, noise), atol=1e-6)
    with PolicyServer(resizing, port=0) as server, RemotePolicy(server.address) as remote:
        np.testing.assert_allclose(
            remote.infer({**obs, "top": doubled}, noise),
            policy.infer(obs, noise),
            rtol=1e-4,
            atol=1e-5,
        )
    with pytest.raises(ObservationError, match=r"'top' has an empty frame \(0 x 32 x 3\)"):
        resizing.infer({**obs, "top": obs["top"][:, :, :0]}, noise)
    arm = _Arm()
    arm.wrong = True  # a frame of 23 x 32
    with ControlLoop(resizing, arm, schedule=cmpolicy.robot.Synchronous(), hz=20) as loop:
        assert loop.run(steps=5).stopped_by == "completed"


class _Arm:
    """Two cameras and seven joints."""

    def __init__(self) -> None:
        self.count = 0
        self.wrong = False

    def connect(self) -> None: ...

    def get_observation(self) -> dict[str, Any]:
        self.count += 1
        step = _step(self.count)
        return {**step, "top": step["top"][:-1]} if self.wrong else step

    def send_action(self, action: Any) -> None:
        assert action.shape == (2,)

    def disconnect(self) -> None: ...


def test_control_loop_with_frames(policy: ConsistencyPolicy) -> None:
    arm = _Arm()
    with ControlLoop(policy, arm, schedule=cmpolicy.robot.Synchronous(), hz=20, seed=0) as loop:
        report = loop.run(steps=10)
        assert report.stopped_by == "completed"
        assert report.plans >= 2
        arm.wrong = True
        with pytest.raises(ObservationError, match=r"frames of 23 x 32 x 3: .* of 24 x 32"):
            loop.run(steps=3)


def test_a_camera_that_stops_delivering_ends_the_run(policy: ConsistencyPolicy) -> None:
    class Frozen(_Arm):
        def get_observation(self) -> dict[str, Any]:
            step = super().get_observation()
            return {**step, "wrist": _step(0)["wrist"]} if self.count > 12 else step

    limits = SafetyLimits(max_frozen=5)
    schedule = cmpolicy.robot.Synchronous()
    with ControlLoop(policy, Frozen(), schedule=schedule, safety=limits) as loop:
        report = loop.run(steps=100)
    assert (
        report.stopped_by == "camera 'wrist' has brought the same frame for 6 ticks (max_frozen=5)"
    )
    assert report.interventions["frozen camera"] == 6
    assert report.ticks - report.missed < 30  # a busy machine misses some


def test_push_t_seen_by_a_camera(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled demonstrations, rendered, trained on and scored in the simulator with a video."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = ReplayBuffer.open(bundled_path("pusht"))
    few = ReplayBuffer.create(tmp_path / "few.zarr")
    start = 0
    for end in whole.episode_ends[:2]:
        few.append_episode({k: whole[k][start:end] for k in ("state", "action", "keypoint")})
        start = int(end)
    words = ["task=pusht_image", f"data.path={tmp_path / 'few.zarr'}", "data.augment=mirror"]
    out = tmp_path / "run"
    short = ["examples=16", "eval.episodes=1", "eval.workers=1", f"out={out}"]
    assert main(["train", *words, *NET, *EYES, *RUN, *short]) == 0
    policy = ConsistencyPolicy.from_pretrained(out / "policy")
    assert policy.spec.obs == {"agent_pos": (2,), "image": (96, 96, 3)}
    scored = ["seeds=500000", "videos=1", "workers=1", f"out={tmp_path / 'eval'}"]
    assert main(["eval", f"policy={out / 'policy'}", *scored]) == 0
    result = next((tmp_path / "eval").glob("result*.json")).read_text()
    assert '"protocol": "pusht-image-dp"' in result

    larger = dataclasses.replace(
        get_protocol("pusht-image-dp"),
        make_env=functools.partial(gymnasium.make, "cmpolicy/PushTImage-v0", image_size=192),
    )
    one = {"protocol": larger, "seeds": 500000, "workers": 1}
    with pytest.raises(ValueError, match=r"image: \(192, 192, 3\)}; not matching: image"):
        cmpolicy.evaluate(policy, **one)
    policy.spec = dataclasses.replace(policy.spec, resize=True)
    found = cmpolicy.evaluate(policy, **one, videos=1, out=tmp_path / "larger")
    assert len(found.episodes) == 1
    assert list((tmp_path / "larger" / "videos").glob("*.mp4"))


def test_frames_need_an_encoder_of_frames(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [w for w in _words(store) if not w.startswith("encoder")]
    assert main(["train", *words, f"out={tmp_path / 'x'}"]) == 2
    assert "encoder.kind=mlp takes no camera frames" in capsys.readouterr().err


def test_bench_of_a_loop_with_large_frames(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "loop.json"
    words = [f"policy={run / 'policy_last'}", "hz=10", "seconds=1", f"out={out}"]
    assert main(["bench", "loop", *words, "frames=[48,80]"]) == 0
    report = json.loads(out.read_text())["settings"]["report"]
    assert (report["ticks"], report["stopped_by"]) == (10, "completed")
    assert not report.get("frozen")
