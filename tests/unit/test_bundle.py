from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cmpolicy import ConsistencyPolicy
from cmpolicy.nn.encoders.state import StateEncoderConfig
from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.policy.bundle import (
    CARD,
    CONFIG,
    FORMAT_VERSION,
    MODEL,
    NORMALIZER,
    BundleError,
    bundled_names,
    read_bundle,
)
from cmpolicy.robot.robot import RateMismatchError, check_rates
from cmpolicy.spec import PolicySpec

FILES = {CARD, CONFIG, MODEL, NORMALIZER}


def _policy(seed: int = 0, *, width: int = 16, **options: Any) -> ConsistencyPolicy:
    spec = PolicySpec({"agent_pos": (2,), "keypoint": (3, 2)}, 2, 8, 2, 4)
    rng = np.random.default_rng(seed)
    shapes = {**spec.obs, "action": (2,)}
    normalizer = Normalizer.fit({k: rng.random((64, *s)) * 500 for k, s in shapes.items()})
    torch.manual_seed(seed)
    net = UNet1DConfig((width, 32), kernel_size=3, n_groups=4, time_dim=16)
    policy = ConsistencyPolicy(spec, net, normalizer, **options)
    torch.nn.init.normal_(policy.net.head[-1].weight, std=0.3)  # type: ignore[arg-type]
    return policy


def _chunk(policy: ConsistencyPolicy) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    obs = {k: torch.rand(3, 2, *s, generator=generator) * 500 for k, s in policy.spec.obs.items()}
    return policy.predict_action_chunk(obs, noise=torch.randn(3, 8, 2, generator=generator))


def _is_still(directory: Path, policy: ConsistencyPolicy) -> None:
    """Every number of the bundle is the policy's, bit by bit."""
    loaded = ConsistencyPolicy.from_pretrained(directory).state_dict()
    for name, value in policy.state_dict().items():
        assert torch.equal(loaded[name], value), name


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A good bundle, to be damaged."""
    _policy().save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


# -- round trip ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"path": "trigonometric"}, {"sampler": "diagonal"}], ids=str
)
def test_round_trip_is_bit_equal(tmp_path: Path, options: dict[str, Any]) -> None:
    policy = _policy(**options)
    policy.save_pretrained(
        tmp_path / "policy", card="# Mine\n", metadata={"result": {"score": 0.9}}
    )
    assert {p.name for p in (tmp_path / "policy").iterdir()} == FILES
    loaded = ConsistencyPolicy.from_pretrained(tmp_path / "policy")
    assert loaded.spec == policy.spec
    assert loaded.net_config == policy.net_config
    assert (loaded.path_name, loaded.sampler) == (policy.path_name, policy.sampler)
    _is_still(tmp_path / "policy", policy)
    torch.testing.assert_close(_chunk(loaded), _chunk(policy), rtol=0, atol=1e-3)  # of 500 px
    assert (tmp_path / "policy" / CARD).read_text().endswith("\n---\n# Mine\n")
    assert read_bundle(tmp_path / "policy").metadata == {"result": {"score": 0.9}}


def test_noise_scale_travels_along(tmp_path: Path) -> None:
    policy = _policy()
    policy.noise_scale = 0.85
    policy.save_pretrained(tmp_path / "policy")
    assert ConsistencyPolicy.from_pretrained(tmp_path / "policy").noise_scale == 0.85
    _edit(noise_scale=None)(tmp_path / "policy")  # a bundle from before there was one
    assert ConsistencyPolicy.from_pretrained(tmp_path / "policy").noise_scale == 1.0


def test_a_checkpoint_of_lerobot_holds_a_bundle(tmp_path: Path) -> None:
    policy = _policy()
    policy.save_pretrained(tmp_path / "checkpoint" / "cmpolicy")
    (tmp_path / "checkpoint" / CONFIG).write_text('{"type": "cmpolicy"}')
    (tmp_path / "checkpoint" / MODEL).write_bytes(b"theirs")
    loaded = ConsistencyPolicy.from_pretrained(tmp_path / "checkpoint")
    torch.testing.assert_close(_chunk(loaded), _chunk(policy), rtol=0, atol=1e-3)


def test_number_of_evaluations_travels_along(tmp_path: Path) -> None:
    """A policy trained for 10 evaluations is deployed with 10."""
    _policy(sampler="diagonal", nfe=10).save_pretrained(tmp_path / "policy")
    loaded = ConsistencyPolicy.from_pretrained(tmp_path / "policy")
    assert loaded.nfe == 10
    obs = {key: torch.rand(1, 2, *shape) for key, shape in loaded.spec.obs.items()}
    noise = torch.randn(1, 8, 2)
    ten = loaded.predict_action_chunk(obs, noise=noise, nfe=10)
    assert torch.equal(loaded.predict_action_chunk(obs, noise=noise), ten)


def test_bundles_of_format_1_still_load() -> None:
    """Written by the code of that format: the encoder inside the network, no nfe of its own."""
    folder = Path(__file__).parents[1] / "golden" / "bundle_format1"
    policy = ConsistencyPolicy.from_pretrained(folder)
    assert (policy.nfe, policy.noise_scale, policy.control_hz) == (2, 0.85, 10.0)
    assert (policy.encoder_config, policy.sampler) == (StateEncoderConfig(6), "diagonal")
    assert policy.spec.action_rotations == ()
    assert policy.metadata["config"]["examples"] == policy.metadata["examples"] == 64
    rng = np.random.default_rng(1)
    obs = {k: (rng.random((2, 2, *s)) * 500).astype("f4") for k, s in policy.spec.obs.items()}
    noise = rng.standard_normal((2, 8, 2)).astype("f4")
    expected = np.array(json.loads((folder / "plan.json").read_text()))
    np.testing.assert_allclose(policy.infer_plan(obs, noise), expected, rtol=0, atol=5e-3)  # of 500


def test_control_rate_travels_along_and_is_checked(tmp_path: Path) -> None:
    policy = _policy()
    policy.save_pretrained(tmp_path / "unknown")
    assert ConsistencyPolicy.from_pretrained(tmp_path / "unknown").control_hz is None
    policy.control_hz = 10.0
    policy.save_pretrained(tmp_path / "policy")
    loaded = ConsistencyPolicy.from_pretrained(tmp_path / "policy")
    check_rates(10, object(), loaded)
    with pytest.raises(RateMismatchError, match="control_hz is 10"):
        check_rates(30, object(), loaded)


def test_loaded_policy_is_for_inference(bundle: Path) -> None:
    loaded = ConsistencyPolicy.from_pretrained(str(bundle))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.objective is None
    assert loaded.device == torch.device("cpu")


def test_half_precision_storage(tmp_path: Path) -> None:
    policy = _policy()
    for name in ("a", "b"):
        policy.save_pretrained(tmp_path / name, weights_dtype=torch.float16)
    assert (tmp_path / "a" / MODEL).read_bytes() == (tmp_path / "b" / MODEL).read_bytes()
    assert all(v.dtype == torch.float16 for v in load_file(tmp_path / "a" / MODEL).values())
    policy.save_pretrained(tmp_path / "full")
    half, full = ((tmp_path / n / MODEL).stat().st_size for n in ("a", "full"))
    assert half < 0.6 * full
    loaded = ConsistencyPolicy.from_pretrained(tmp_path / "a")
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(_chunk(loaded), _chunk(policy), rtol=0, atol=1.0)  # of 500 px
    # stored once more, nothing is lost again
    loaded.save_pretrained(tmp_path / "c", weights_dtype=torch.float16)
    assert (tmp_path / "c" / MODEL).read_bytes() == (tmp_path / "a" / MODEL).read_bytes()


def test_normaliser_is_stored_exactly_in_half_precision(tmp_path: Path) -> None:
    policy = _policy()
    policy.save_pretrained(tmp_path / "a", weights_dtype=torch.float16)
    loaded = ConsistencyPolicy.from_pretrained(tmp_path / "a")
    for name, value in policy.normalizer.to_arrays().items():
        assert torch.equal(loaded.normalizer.to_arrays()[name], value)


def test_no_pickle_in_a_bundle(bundle: Path) -> None:
    for file in bundle.iterdir():
        assert not file.read_bytes().startswith((b"PK", b"\x80")), file


def test_readable_by_others(bundle: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert bundle.stat().st_mode & 0o777 == 0o777 & ~mask


# -- overwriting --------------------------------------------------------------------------------


def test_overwrite(bundle: Path) -> None:
    (bundle / "result.json").write_text("{}")
    (bundle / ".git").mkdir()
    policy = _policy(1, width=32)
    policy.save_pretrained(bundle)
    _is_still(bundle, policy)
    assert {p.name for p in bundle.iterdir()} == FILES | {"result.json", ".git"}
    assert [p.name for p in bundle.parent.iterdir()] == ["policy"]


def test_into_an_empty_directory_and_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        _policy().save_pretrained(target)
        ConsistencyPolicy.from_pretrained(target)


def test_refuses_what_is_no_bundle(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("three years")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / CONFIG).write_text('{"model_type": "bert"}')
    for directory in (home, foreign):
        before = sorted(p.name for p in directory.iterdir())
        with pytest.raises(BundleError, match=r"is not a policy bundle.*nothing was written") as e:
            _policy().save_pretrained(directory)
        assert str(directory) in str(e.value)
        assert sorted(p.name for p in directory.iterdir()) == before
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(BundleError, match="is a file; a policy bundle is a directory"):
        _policy().save_pretrained(file)
    assert file.read_text() == "x"


def test_refuses_weights_that_are_not_finite(bundle: Path) -> None:
    broken = _policy(1)
    with torch.no_grad():
        broken.net.head[-1].bias[0] = torch.nan  # type: ignore[index]
    with pytest.raises(BundleError, match=r"refusing.*'net\.head\.3\.bias' is not finite"):
        broken.save_pretrained(bundle)
    big = _policy(1)
    with torch.no_grad():
        big.net.head[-1].bias[0] = 1e6  # type: ignore[index]
    with pytest.raises(BundleError, match=r"not finite as torch\.float16"):
        big.save_pretrained(bundle, weights_dtype=torch.float16)
    _is_still(bundle, _policy())


def test_refuses_metadata_that_is_not_json(bundle: Path) -> None:
    with pytest.raises(BundleError, match="metadata must be JSON-ready"):
        _policy(1).save_pretrained(bundle, metadata={"device": torch.device("cpu")})
    _is_still(bundle, _policy())


def test_full_disk_leaves_the_previous_bundle(bundle: Path) -> None:
    """This process may write no file above 20 kB while it tries to replace the bundle."""
    resource = pytest.importorskip("resource", reason="file size limits are POSIX")
    before = {p.name: p.read_bytes() for p in bundle.iterdir()}
    assert len(before[MODEL]) > 20_000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            _policy(1).save_pretrained(bundle)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for word in (str(bundle), "it needs 0.", "MB free", "was there before is intact"):
        assert word in str(caught.value)
    assert {p.name: p.read_bytes() for p in bundle.iterdir()} == before
    assert [p.name for p in bundle.parent.iterdir()] == ["policy"], "litter"
    _is_still(bundle, _policy())


def test_interrupted_swap_puts_the_previous_bundle_back(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rename fails: the operating system is what is replaced here, not our code."""
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    monkeypatch.setattr("cmpolicy.files._RENAME_EXCHANGE", -1)  # as on a system without it
    with pytest.raises(OSError, match=r"No space left on device.*MB free.*before is intact"):
        _policy(1).save_pretrained(bundle)
    monkeypatch.undo()
    assert [p.name for p in bundle.parent.iterdir()] == ["policy"]
    _is_still(bundle, _policy())


# -- bad bundles --------------------------------------------------------------------------------


def _edit(**changes: Any) -> Callable[[Path], None]:
    """Change entries of config.json; None removes one."""

    def edit(directory: Path) -> None:
        file = directory / CONFIG
        config = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return edit


def _truncate(name: str) -> Callable[[Path], None]:
    def truncate(directory: Path) -> None:
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[: len(data) // 2])

    return truncate


def _replace(name: str, data: bytes, *, rehash: bool = False) -> Callable[[Path], None]:
    def replace(directory: Path) -> None:
        (directory / name).write_bytes(data)
        if rehash:
            config = json.loads((directory / CONFIG).read_text())
            config["sha256"][name] = hashlib.sha256(data).hexdigest()
            (directory / CONFIG).write_text(json.dumps(config))

    return replace


def _wider_net(directory: Path) -> None:
    """config.json of another network, with its own valid hashes."""
    config = json.loads((directory / CONFIG).read_text())
    config["net"]["down_dims"] = [32, 32]
    (directory / CONFIG).write_text(json.dumps(config))


def _other_weights(directory: Path) -> None:
    _policy(1).save_pretrained(directory.parent / "other")
    shutil.copy(directory.parent / "other" / MODEL, directory / MODEL)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / CONFIG).unlink(), ["is no policy bundle", "config.json is missing"]),
        (lambda d: (d / MODEL).unlink(), ["model.safetensors is missing", "copy the bundle again"]),
        (lambda d: (d / NORMALIZER).unlink(), ["normalizer.safetensors is missing"]),
        (_truncate(CONFIG), ["config.json is truncated or not JSON"]),
        (_truncate(MODEL), ["model.safetensors is truncated", "SHA-256"]),
        (_truncate(NORMALIZER), ["normalizer.safetensors is truncated"]),
        (_replace(CONFIG, b"\x80\x04pickle"), ["truncated or not JSON"]),
        (_replace(CONFIG, b"[1, 2]"), ["not written by cmpolicy", "'cmpolicy-policy'"]),
        (_replace(CONFIG, b'{"model_type": "bert"}'), ["not written by cmpolicy"]),
        (_replace(MODEL, b"PK\x03\x04 a torch zip"), ["belongs to another bundle"]),
        (_replace(MODEL, b"PK\x03\x04 a zip", rehash=True), ["cannot be read as safetensors"]),
        (_other_weights, ["belongs to another bundle"]),
        (_edit(format_version=FORMAT_VERSION + 1), [f"version {FORMAT_VERSION + 1}", "upgrade"]),
        (_edit(format_version=None), ["format version None"]),
        (_edit(sha256=None), ["damaged", "hashes"]),
        (_edit(sha256=[1]), ["damaged", "hashes"]),
        (_edit(spec=None), ["config.json is damaged: it lacks 'spec'"]),
        (_edit(spec={"obs": {}}), ["is damaged", "incomplete"]),
        (_edit(net={"kind": "unet1d", "width": 3}), ["is damaged", "net.width"]),
        (_edit(net=3), ["is damaged", "net must be a group"]),
        (_edit(encoder={"kind": "cnn"}), ["config.json: unknown encoder.kind 'cnn'"]),
        (_edit(nfe=0), ["nfe=0"]),
        (_edit(path="cubic"), ["unknown path 'cubic'"]),
        (_edit(sampler="heun"), ["unknown sampler 'heun'"]),
        (_wider_net, ["do not fit together", "do not fit together", "copy the whole directory"]),
    ],
)
def test_bad_bundle(bundle: Path, damage: Callable[[Path], None], words: list[str]) -> None:
    damage(bundle)
    with pytest.raises(BundleError) as caught:
        ConsistencyPolicy.from_pretrained(bundle)
    for word in (*words, str(bundle)):
        assert word in str(caught.value)


def test_model_card_may_be_missing(bundle: Path) -> None:
    (bundle / CARD).unlink()
    ConsistencyPolicy.from_pretrained(bundle)


# -- finding a bundle ---------------------------------------------------------------------------


def test_a_file_is_no_bundle(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"model\.safetensors is a file; .* is a directory"):
        ConsistencyPolicy.from_pretrained(bundle / MODEL)


def test_a_directory_of_other_things(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is no policy bundle: config\.json is missing"):
        ConsistencyPolicy.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["no-such-policy", "outputs/run", "./a/b", "deep/er/path", "~/a"])
def test_nothing_of_that_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of these looks like a hub id, so nobody is asked over the network."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match="no policy bundle at") as caught:
        ConsistencyPolicy.from_pretrained(name)
    for word in (str(bundled_names()), "hub id 'owner/name'", name.rpartition("/")[2]):
        assert word in str(caught.value)


def test_mistyped_path_is_not_looked_up_on_the_hub(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle.parent)
    (bundle.parent / "runs").mkdir()
    with pytest.raises(BundleError, match=r"no policy bundle at .*runs/polcy.*not one of"):
        ConsistencyPolicy.from_pretrained("runs/polcy")


def test_relative_path_and_home(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle.parent)
    ConsistencyPolicy.from_pretrained("policy")
    monkeypatch.setenv("HOME", str(bundle.parent))
    ConsistencyPolicy.from_pretrained("~/policy")


def _run(script: str, folder: Path) -> str:
    """In a process of its own, offline: huggingface_hub reads its settings at import."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "HF_TOKEN": ""}
    done = subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=folder,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_hub_without_a_network(bundle: Path) -> None:
    script = """
        from cmpolicy import ConsistencyPolicy
        from cmpolicy.policy.bundle import BundleError

        try:
            ConsistencyPolicy.from_pretrained("someone/pusht")
        except BundleError as error:
            print("LOAD", str(error).replace("\\n", " "))
        try:
            ConsistencyPolicy.from_pretrained("policy").push_to_hub("someone/pusht")
        except BundleError as error:
            print("PUSH", str(error).replace("\\n", " "))
        """
    load, push = _run(script, bundle.parent).splitlines()
    assert load.startswith("LOAD no policy bundle at")
    assert "'someone/pusht' could not be fetched from the hub" in load
    assert push.startswith("PUSH could not push the policy to 'someone/pusht'")
    assert "hf auth login" in push
    assert [p.name for p in bundle.parent.iterdir() if p.name != "hf"] == ["policy"]


def test_bundled_names_load() -> None:
    for name in bundled_names():
        policy = ConsistencyPolicy.from_pretrained(name)
        kinds = dict.fromkeys(policy.spec.images, torch.uint8)
        obs = {
            key: torch.zeros(1, policy.n_obs_steps, *shape, dtype=kinds.get(key))
            for key, shape in policy.spec.obs.items()
        }
        assert policy.predict_action_chunk(obs).shape == (
            1,
            policy.n_action_steps,
            policy.spec.action_dim,
        )
