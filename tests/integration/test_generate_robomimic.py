"""Generated Robomimic demonstrations: reproducible, successful; files are handled with care."""

import multiprocessing
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmpolicy_data.robomimic_file import RobomimicFile
from cmpolicy_envs.robomimic_args import EnvArgs, default_env_args

h5py = pytest.importorskip("h5py")
pytest.importorskip("robosuite")

from cmpolicy.cli.main import main as command  # noqa: E402
from cmpolicy_data.generate.robomimic.attempt import (  # noqa: E402
    SKILLS,
    VERSION,
    Demonstrator,
    get_skill,
    portable_model,
)
from cmpolicy_data.generate.robomimic.crew import AttemptError, attempts  # noqa: E402
from cmpolicy_data.generate.robomimic.motion import Style  # noqa: E402
from cmpolicy_data.generate.robomimic.runner import generate  # noqa: E402


def main(words: Sequence[str]) -> int:
    """``cmpolicy data``."""
    return command(["data", *words])


SEED = 3
KEYS = {
    "object": 10,
    "robot0_eef_pos": 3,
    "robot0_eef_quat": 4,
    "robot0_gripper_qpos": 2,
    "robot0_gripper_qvel": 2,
    "robot0_joint_pos": 7,
    "robot0_joint_vel": 7,
}


@pytest.fixture(scope="module")
def demonstrators() -> Generator[dict[str, Demonstrator]]:
    made = {task: Demonstrator(task) for task in SKILLS}
    yield made
    for one in made.values():
        one.close()


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generated") / "lift.hdf5"
    calls: list[tuple[int, int]] = []
    report = generate(
        out,
        task="lift",
        episodes=3,
        seed=SEED,
        workers=1,
        progress=lambda *counts: calls.append(counts),
    )
    assert (report.path, report.task) == (out, "lift")
    assert report.kept == 3 <= report.attempted == len(calls)
    assert calls[-1] == (3, report.attempted)
    assert report.success_rate == 3 / report.attempted
    assert report.seconds > 0
    with h5py.File(out, "r") as file:
        assert file["data"].attrs["total"] == report.steps
    return out


def test_the_number_of_workers_changes_nothing(
    generated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again.hdf5"
    options = ["task=lift", "episodes=3", f"seed={SEED}", "workers=2", f"out={again}"]
    assert main(["generate", "robomimic", *options]) == 0
    assert again.read_bytes() == generated.read_bytes()
    out = capsys.readouterr().out
    assert f"{again}: lift, 3 episodes" in out
    assert f"cmpolicy data convert robomimic {again}" in out


def test_contents(generated: Path) -> None:
    with h5py.File(generated, "r") as file:
        data = file["data"]
        assert EnvArgs.from_json(data.attrs["env_args"], "file") == default_env_args("lift")
        assert data.attrs["command"] == (
            f"cmpolicy data generate robomimic task=lift episodes=3 seed={SEED}"
        )
        assert sorted(data) == ["demo_0", "demo_1", "demo_2"]
        seeds = [data[name].attrs["seed"] for name in data]
        assert seeds == sorted(set(seeds))
        assert seeds[0] >= SEED
        masks = {key: set(file["mask"][key].asstr()) for key in file["mask"]}
        assert masks["train"] | masks["valid"] == set(data)
        assert not masks["train"] & masks["valid"]
        assert masks["valid"]
        for demo in data.values():
            length = demo.attrs["num_samples"]
            assert 20 < length < 150
            assert demo["actions"].shape == (length, 7)
            assert np.abs(demo["actions"]).max() <= 1
            for part in ("obs", "next_obs"):
                shapes = {key: demo[part][key].shape for key in demo[part]}
                assert shapes == {key: (length, size) for key, size in KEYS.items()}
            hand = demo["obs/robot0_eef_pos"][:]
            np.testing.assert_array_equal(demo["next_obs/robot0_eef_pos"][:-1], hand[1:])
            # It ends with success and a few steps after it.
            successes = np.flatnonzero(demo["rewards"])
            assert 2 <= len(successes) <= length // 4
            assert successes[-1] == length - 1
            np.testing.assert_array_equal(demo["dones"][:], demo["rewards"][:])


def test_a_replay_from_the_first_state_is_the_same_episode(
    generated: Path, demonstrators: dict[str, Demonstrator]
) -> None:
    env = demonstrators["lift"].env
    with RobomimicFile.open(generated) as file:
        demo = file.demo("demo_1", [])
    assert demo.states is not None
    env.reset_to(demo.states[0], demo.model)
    success = False
    for action, state in zip(demo.actions.astype(np.float32), demo.states, strict=True):
        np.testing.assert_array_equal(env.get_state()["states"], state)
        _, _, success, _, _ = env.step(action)
    assert success


def test_robomimic_reads_it(generated: Path) -> None:
    dataset_module = pytest.importorskip("robomimic.utils.dataset")
    obs_utils = pytest.importorskip("robomimic.utils.obs_utils")
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": list(KEYS)}})
    dataset = dataset_module.SequenceDataset(
        hdf5_path=str(generated),
        obs_keys=list(KEYS),
        dataset_keys=("actions", "rewards", "dones"),
        frame_stack=2,
        seq_length=8,
        load_next_obs=True,
        filter_by_attribute="train",
    )
    item = dataset[0]
    assert item["actions"].shape == (9, 7)
    assert item["next_obs"]["object"].shape == (9, 10)
    dataset.close_and_delete_hdf5_handle()


def test_scenes_do_not_depend_on_where_they_were_made(generated: Path) -> None:
    with RobomimicFile.open(generated) as file:
        model = file.demo("demo_0", []).model
    assert model is not None
    assert 'file="robosuite/models/assets/' in model
    assert 'file="/' not in model
    assert portable_model(model) == model


@pytest.mark.parametrize("task", SKILLS)
def test_experts_act_on_what_the_last_two_observations_show(
    task: str, demonstrators: dict[str, Demonstrator]
) -> None:
    """An expert that has seen all of an episode does what one does that comes in late."""
    env, skill = demonstrators[task].env, get_skill(task)
    calm = replace(Style.draw(np.random.default_rng(0)), noise=0.0)

    def expert() -> Any:
        return skill.expert(calm, np.random.default_rng(1))

    obs, _ = env.reset(seed=0)
    old, before, success = expert(), None, False
    for step in range(skill.patience):
        action = old.act(obs)
        if before is not None and step % 5 == 0:
            late = expert()
            late.act(before)
            np.testing.assert_array_equal(late.act(obs), action)
        before = obs
        obs, _, success, _, _ = env.step(action)
        if success:
            break
    assert success


@pytest.mark.parametrize("task", SKILLS)
def test_experts_succeed(task: str, demonstrators: dict[str, Demonstrator]) -> None:
    seeds = (11, 12)
    done = [demonstrators[task].attempt(seed) for seed in seeds]
    assert all(attempt.recording is not None for attempt in done)
    lengths = [attempt.steps for attempt in done]
    assert len(set(lengths)) == len(seeds)  # each in its own way
    again = demonstrators[task].attempt(seeds[0]).recording
    first = done[0].recording
    assert again is not None
    assert first is not None
    np.testing.assert_array_equal(again.states, first.states)


@pytest.mark.parametrize("task", ["can", "square"])
def test_some_episodes_begin_astray_and_replay_all_the_same(
    task: str, demonstrators: dict[str, Demonstrator]
) -> None:
    strays, demonstrator = get_skill(task).strays, demonstrators[task]
    assert strays is not None
    astray = [
        seed for seed in range(200) if any(strays.acts(np.random.default_rng([VERSION, seed, 1])))
    ]
    assert 80 < len(astray) < 120
    for seed in (astray[0], next(seed for seed in range(200) if seed not in astray)):
        rest, _ = demonstrator.env.reset(seed=seed)
        recording = demonstrator.attempt(seed).recording
        assert recording is not None
        moved = np.linalg.norm(recording.obs["robot0_eef_pos"][0] - rest["robot0_eef_pos"])
        assert (moved > 0.03) == (seed in astray)
        demonstrator.env.reset_to(recording.states[0], recording.model)
        assert any(demonstrator.env.step(action)[2] for action in recording.actions)


def test_an_object_that_slips_is_grasped_again(demonstrators: dict[str, Demonstrator]) -> None:
    env, rng = demonstrators["lift"].env, np.random.default_rng(4)
    expert = get_skill("lift").expert(Style.draw(rng), rng)
    obs, _ = env.reset(seed=4)
    table = obs["object"][2]
    slipped, success = False, False
    for _ in range(250):
        obs, _, success, _, _ = env.step(expert.act(obs))
        if obs["object"][2] > table + 0.004 and not slipped:  # 0.01 is success
            slipped = True
            sim = env.robosuite.sim
            pose = sim.data.get_joint_qpos("cube_joint0").copy()
            pose[:3] = [0.02, -0.05, 0.83]
            sim.data.set_joint_qpos("cube_joint0", pose)
            sim.data.set_joint_qvel("cube_joint0", np.zeros(6))
            sim.forward()
            obs = env.get_obs()
            assert not env.is_success()
        if success:
            break
    assert slipped
    assert success


def test_a_process_that_dies_is_an_error_that_names_the_seed() -> None:
    others = set(multiprocessing.active_children())
    with closing(attempts("lift", range(500), workers=2)) as source:
        assert next(source).seed == 0
        victim = (set(multiprocessing.active_children()) - others).pop()
        victim.kill()
        with pytest.raises(AttemptError, match=r"at work on seed \d+ died \(exit code -9"):
            list(source)
    assert set(multiprocessing.active_children()) == others


def test_an_attempt_that_raises_is_an_error_that_names_the_seed() -> None:
    with pytest.raises(AttemptError, match=r"seed -1 failed:\n(.|\n)*ValueError"):
        list(attempts("lift", [-1], workers=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name the task (lift, can, square)"),
        (["task=lfit"], "lfit"),
        (["task=transport"], "no scripted expert for 'transport', only for lift, can, square"),
        (["task=lift", "episodes=0"], "episodes must be at least 1, got 0"),
        (["task=lift", "workers=0"], "workers must be at least 1, got 0"),
        (["task=lift", "seed=-1"], "got seed=-1 with 200 episodes"),
        (["task=lift", "seed=99999"], "at most 100000"),
        (["task=lift", "out=lift.zarr"], "must be a path that ends in .hdf5"),
        (["task=lift", "out=nowhere/lift.hdf5"], "nowhere is not a folder"),
        (["task=lift", "episode=3"], "unknown setting 'episode'; did you mean 'episodes'?"),
    ],
)
def test_bad_arguments(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "robomimic", *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_only_its_own_files_are_replaced(tmp_path: Path) -> None:
    for content in (b"of someone else", None):
        path = tmp_path / "demos.hdf5"
        if content is not None:
            path.write_bytes(content)
        else:
            with h5py.File(path, "w") as file:
                file.create_group("data").attrs["env_args"] = "{}"
        before = path.read_bytes()
        with pytest.raises(FileExistsError, match="was not written by `cmpolicy data generate"):
            generate(path, task="lift", episodes=1)
        assert path.read_bytes() == before
