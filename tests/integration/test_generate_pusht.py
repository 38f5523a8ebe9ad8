"""The Push-T generator: reproducible, always successful, careful with files."""

from pathlib import Path

import numpy as np
import pytest

from cmpolicy.cli.main import main
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.robot.chunker import ActionChunker
from cmpolicy_data import ReplayBuffer
from cmpolicy_data.generate import pusht
from cmpolicy_data.generate.pusht import Lead, _is_astray, demonstrate, generate, replay
from cmpolicy_envs import keypoints_from_pose
from cmpolicy_envs.pusht import PushTEnv
from cmpolicy_envs.pusht_states import dp_initial_state


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generated") / "demos.zarr.zip"
    calls = []
    report = generate(
        out, episodes=2, seed=4, workers=1, progress=lambda *counts: calls.append(counts)
    )
    assert report.path == out
    assert report.kept == 2 <= report.attempted == len(calls)
    assert calls[-1] == (2, report.attempted)
    assert report.steps == ReplayBuffer.open(out).n_steps
    assert report.seconds > 0.0
    return out


def test_the_number_of_workers_changes_nothing(generated: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.zarr.zip"
    generate(again, episodes=2, seed=4, workers=2)
    assert again.read_bytes() == generated.read_bytes()


def test_contents(generated: Path) -> None:
    store = ReplayBuffer.open(generated)
    assert store.keys() == ["action", "keypoint", "state"]
    dtypes = {store[key].dtype for key in ("action", "keypoint", "state")}
    assert dtypes == {np.dtype("float32")}
    assert store["action"].shape[1:] == (2,)
    state = store.load("state")
    expected = keypoints_from_pose(state[:, 2:4], state[:, 4])
    np.testing.assert_allclose(store.load("keypoint"), expected, atol=1e-4)
    lengths = np.diff(store.episode_ends, prepend=0)
    assert np.all((lengths >= 20) & (lengths <= 300))


def test_attributes_say_how_it_was_made(generated: Path) -> None:
    attrs = ReplayBuffer.open(generated).attrs
    assert attrs["seed"] == 4
    assert len(attrs["seeds"]) == 2
    assert attrs["seeds"][0] >= 4
    assert attrs["command"] == "cmpolicy data generate pusht episodes=2 seed=4"
    assert attrs["version"] >= 1


def test_every_episode_succeeds_when_played_again(generated: Path) -> None:
    store = ReplayBuffer.open(generated)
    action, state = store.load("action"), store.load("state")
    starts = np.concatenate([[0], store.episode_ends[:-1]])
    for seed, start, end in zip(store.attrs["seeds"], starts, store.episode_ends, strict=True):
        assert replay(action[start:end], dp_initial_state(seed)) > 0.95
        assert replay(action[start:end], state[start], exact_pose=True) > 0.95


def test_what_went_astray_is_demonstrated_from_there(tmp_path: Path) -> None:
    out = tmp_path / "astray.zarr.zip"
    generate(out, episodes=2, seed=20000, astray=1.0)
    store = ReplayBuffer.open(out)
    assert store.attrs["command"] == "cmpolicy data generate pusht episodes=2 seed=20000 astray=1"
    action, state = store.load("action"), store.load("state")
    starts = np.concatenate([[0], store.episode_ends[:-1]])
    for seed, start, end in zip(store.attrs["seeds"], starts, store.episode_ends, strict=True):
        _, info = PushTEnv().reset(options={"reset_to_state": dp_initial_state(seed)})
        assert not np.allclose(state[start, 2:], info["state"][2:], atol=1.0)  # the block moved
        assert replay(action[start:end], state[start], exact_pose=True) > 0.95
    again = tmp_path / "again.zarr.zip"
    generate(again, episodes=2, seed=20000, astray=1.0, workers=2)
    assert again.read_bytes() == out.read_bytes()


def test_a_policy_leads_astray_and_the_demonstrator_finds_back(tmp_path: Path) -> None:
    out, words = tmp_path / "led.zarr.zip", ["data", "generate", "pusht", "episodes=2"]
    words += ["seed=31000", "astray=1", "astray_by=pusht"]
    assert main([*words, "workers=1", f"out={out}"]) == 0
    store = ReplayBuffer.open(out)
    assert store.attrs["command"] == "cmpolicy " + " ".join(words)
    action, state = store.load("action"), store.load("state")
    starts = np.concatenate([[0], store.episode_ends[:-1]])
    policy = ConsistencyPolicy.from_pretrained("pusht")
    for seed, start, end in zip(store.attrs["seeds"], starts, store.episode_ends, strict=True):
        assert replay(action[start:end], state[start], exact_pose=True) > 0.95
        env, chunker, seen = PushTEnv(), ActionChunker(policy, seed=seed), []
        obs, info = env.reset(options={"reset_to_state": dp_initial_state(seed)})
        for _ in range(300):
            seen.append(info["state"])
            obs, *_, info = env.step(np.clip(chunker.select_action(obs), 0, 512))
        assert np.abs(np.array(seen) - state[start]).max(1).min() < 1e-3  # a state of its way
    again = tmp_path / "again.zarr.zip"
    assert main([*words, "workers=2", f"out={again}"]) == 0
    assert again.read_bytes() == out.read_bytes()


def test_a_policy_that_never_fails_leads_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pusht, "_LEAD_PATIENCE", 1)
    policy = ConsistencyPolicy.from_pretrained("pusht")
    lead = Lead("mine", lambda seed: ActionChunker(policy, seed=seed).select_action)
    with pytest.raises(
        RuntimeError, match=r"^mine succeeded by itself in 1 attempts in a row \(last"
    ):
        generate(tmp_path / "led.zip", episodes=30, seed=31000, astray=1.0, lead=lead)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["astray_by=pusht"], "astray_by changes attempts that begin astray; add astray=0.5"),
        (["astray=1", "astray_by=pusht_image"], "sees agent_pos, image and gives 2 numbers; a pol"),
        (["astray=1", "astray_by=nowhere"], "nowhere"),
    ],
)
def test_who_cannot_lead_astray(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    out = tmp_path / "led.zarr.zip"
    assert main(["data", "generate", "pusht", *words, f"out={out}"]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_share_goes_astray_and_the_others_stay_as_they_were() -> None:
    strays = [_is_astray(seed, 0.25) for seed in range(1000)]
    assert 200 < sum(strays) < 300
    seed = strays.index(False)
    episodes = demonstrate(seed, 0.25), demonstrate(seed)
    assert episodes[0] is not None
    assert episodes[1] is not None
    np.testing.assert_array_equal(episodes[0].state, episodes[1].state)


def test_replaces_only_its_own_files(tmp_path: Path) -> None:
    for name, content in [("text.zip", b"somebody's notes"), ("empty.zip", b"")]:
        foreign = tmp_path / name
        foreign.write_bytes(content)
        with pytest.raises(FileExistsError, match="was not written by"):
            generate(foreign, episodes=1)
        assert foreign.read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes": 0}, "episodes must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 100000}, "belong to evaluation"),
        ({"astray": 1.5}, r"astray must be a share in \[0, 1\], got 1.5"),
        ({"astray": float("nan")}, r"astray must be a share in \[0, 1\], got nan"),
        ({"out": "demos.zarr"}, "must be a path that ends in .zip"),
    ],
)
def test_bad_arguments(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    arguments = {"episodes": 1, "seed": 0, "workers": 1, **changes}
    out = tmp_path / str(arguments.pop("out", "demos.zarr.zip"))
    with pytest.raises(ValueError, match=message):
        generate(out, **arguments)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Create it first"):
        generate(tmp_path / "nowhere" / "demos.zarr.zip", episodes=1)
