"""The writer of robomimic's HDF5 layout, read back by the reader of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cmpolicy_data.robomimic_file import RobomimicFile
from cmpolicy_data.robomimic_writer import DemoWriter, Recording

h5py = pytest.importorskip("h5py")

ENV_ARGS = '{"env_name": "Lift", "type": 1, "env_kwargs": {}}'


def recording(length: int, seed: int = 0) -> Recording:
    rng = np.random.default_rng(seed)
    return Recording(
        obs={"object": rng.normal(size=(length + 1, 3)), "hand": rng.normal(size=(length + 1, 2))},
        actions=rng.uniform(-1, 1, (length, 7)),
        rewards=np.eye(1, length, length - 1)[0],
        dones=np.eye(1, length, length - 1, dtype=np.int64)[0],
        states=rng.normal(size=(length, 5)),
        model="<mujoco/>" * 20_000,  # longer than an HDF5 header holds
        attrs={"seed": seed},
    )


def write(path: Path, *recordings: Recording) -> None:
    with DemoWriter(path, ENV_ARGS, {"generator": "a test"}) as writer:
        names = [writer.add(one) for one in recordings]
        writer.add_mask("train", names[1:])
        writer.add_mask("valid", names[:1])


def test_the_reader_finds_what_was_written(tmp_path: Path) -> None:
    demos = [recording(length, length) for length in (*range(3, 14), 1)]
    path = tmp_path / "demos.hdf5"
    write(path, *demos)
    with RobomimicFile.open(path) as file:
        assert file.env_args == ENV_ARGS
        assert file.demos == tuple(f"demo_{i}" for i in range(12))
        assert file.masks["valid"] == ("demo_0",)
        assert file.masks["train"] == file.demos[1:]
        for name, expected in zip(file.demos, demos, strict=True):
            found = file.demo(name, ["object", "hand"])
            np.testing.assert_array_equal(found.actions, expected.actions)
            np.testing.assert_array_equal(found.states, expected.states)
            assert found.model == expected.model
            for key, value in found.obs.items():
                np.testing.assert_array_equal(value, expected.obs[key][:-1])


def test_the_rest_of_the_layout(tmp_path: Path) -> None:
    path = tmp_path / "demos.hdf5"
    demos = [recording(4, 1), recording(6, 2)]
    write(path, *demos)
    with h5py.File(path, "r") as file:
        data = file["data"]
        assert data.attrs["total"] == 10
        assert data.attrs["generator"] == "a test"
        assert sorted(file["mask"]) == ["train", "valid"]
        for name, demo in zip(("demo_0", "demo_1"), demos, strict=True):
            group = data[name]
            assert group.attrs["num_samples"] == len(demo)
            assert group.attrs["seed"] == demo.attrs["seed"]
            np.testing.assert_array_equal(group["next_obs/hand"], demo.obs["hand"][1:])
            np.testing.assert_array_equal(group["rewards"], demo.rewards)
            np.testing.assert_array_equal(group["dones"], demo.dones)


def test_a_failure_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "demos.hdf5"
    write(path, recording(3))
    before = path.read_bytes()

    def interrupted() -> None:
        with DemoWriter(path, ENV_ARGS) as writer:
            writer.add(recording(5))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "demos.hdf5"
    with DemoWriter(path, ENV_ARGS) as writer:
        writer.add(recording(5))
        assert not path.exists()
        assert writer.steps == 5
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_mask_names_demonstrations_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "demos.hdf5"
    with DemoWriter(path, ENV_ARGS) as writer:
        writer.add(recording(5))
        with pytest.raises(ValueError, match="mask/train: there is no demonstration 'demo_1'"):
            writer.add_mask("train", ["demo_0", "demo_1"])
        writer.add_mask("train", ["demo_0"])
    with RobomimicFile.open(path) as file:
        assert file.masks == {"train": ("demo_0",)}


def test_a_recording_needs_a_step() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        recording(0)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"states": np.zeros((4, 5))}, "of 3 actions has 4 rows of states; expected 3"),
        ({"rewards": np.zeros(2)}, "has 2 rows of rewards; expected 3"),
        ({"obs": {"object": np.zeros((3, 2))}}, "has 3 rows of obs/object; expected 4"),
    ],
)
def test_lengths_that_disagree(part: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(recording(3), **part)  # type: ignore[arg-type]
