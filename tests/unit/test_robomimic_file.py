"""Reading robomimic's HDF5 layout: what is in it, and everything that can be wrong with it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmpolicy_data.robomimic_file import RobomimicFile, RobomimicFileError

h5py = pytest.importorskip("h5py")

Write = Callable[..., Path]
KEYS = ["object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"]


@pytest.fixture
def path(tmp_path: Path, write_robomimic: Write) -> Path:
    return write_robomimic(tmp_path / "demos.hdf5")


def edit(path: Path, change: Callable[[Any], object]) -> Path:
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def read(path: Path, name: str = "demo_1") -> None:
    """All that a converter reads."""
    with RobomimicFile.open(path) as file:
        file.demo(name, file.low_dim_keys())


def test_a_demonstration_comes_as_it_was_written(path: Path):
    with RobomimicFile.open(path) as file:
        demo = file.demo("demo_1", KEYS)
        assert json.loads(file.env_args)["env_name"] == "Lift"
        assert file.low_dim_keys() == KEYS
    with h5py.File(path) as raw:
        group = raw["data/demo_1"]
        np.testing.assert_array_equal(demo.actions, group["actions"][()])
        np.testing.assert_array_equal(demo.states, group["states"][()])
        for key in KEYS:
            np.testing.assert_array_equal(demo.obs[key], group[f"obs/{key}"][()])
    assert len(demo) == 3
    assert demo.model == '<mujoco model="demo_1"/>'
    assert demo.goals is None


def test_demonstrations_come_by_number_and_masks_by_name(tmp_path: Path, write_robomimic: Write):
    path = write_robomimic(tmp_path / "x.hdf5", lengths=[2] * 12, first=1)
    with RobomimicFile.open(path) as file:
        assert file.demos == tuple(f"demo_{i}" for i in range(1, 13))
        assert file.masks == {"train": file.demos[:-1], "valid": file.demos[-1:]}
        assert file.select(None) == file.demos
        assert file.select("valid") == ("demo_12",)
        with pytest.raises(RobomimicFileError, match=r"no filter 'test'.*filters: train, valid"):
            file.select("test")


def test_images_are_no_low_dim_key_but_can_be_read(path: Path):
    image = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)
    edit(path, lambda file: file.create_dataset("data/demo_0/obs/agentview_image", data=image))
    with RobomimicFile.open(path) as file:
        assert file.low_dim_keys() == KEYS
        read_back = file.demo("demo_0", ["agentview_image"]).obs["agentview_image"]
    assert read_back.dtype == np.uint8
    np.testing.assert_array_equal(read_back, image)


def test_states_model_and_goals_may_be_missing_or_there(path: Path):
    def change(file: Any) -> None:
        demo = file["data/demo_1"]
        del demo["states"], demo.attrs["model_file"], demo.attrs["num_samples"]
        demo["actions_abs"] = np.ones((3, 7), np.float32)

    edit(path, change)
    with RobomimicFile.open(path) as file:
        demo = file.demo("demo_1", KEYS)
    assert demo.states is None
    assert demo.model is None
    assert demo.goals is not None
    assert demo.goals.shape == (3, 7)


def test_without_masks_there_are_none(path: Path):
    edit(path, lambda file: file.pop("mask"))
    with RobomimicFile.open(path) as file:
        assert file.masks == {}
        with pytest.raises(RobomimicFileError, match="filters: none"):
            file.select("train")


class TestBadFiles:
    def test_nothing_there(self, tmp_path: Path):
        with pytest.raises(FileNotFoundError, match=r"no file .*nope\.hdf5.*download robomimic"):
            RobomimicFile.open(tmp_path / "nope.hdf5")

    def test_a_folder(self, tmp_path: Path):
        with pytest.raises(RobomimicFileError, match="is a folder"):
            RobomimicFile.open(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip, say", b"x" * 5000])
    def test_not_hdf5(self, tmp_path: Path, content: bytes):
        path = tmp_path / "demos.hdf5"
        path.write_bytes(content)
        with pytest.raises(RobomimicFileError, match=r"not an HDF5 file"):
            RobomimicFile.open(path)

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
    def test_cut_off(self, path: Path, share: float):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(RobomimicFileError, match=r"cut off.*Copy or download it again"):
            RobomimicFile.open(path)

    def test_damaged_inside(self, tmp_path: Path):
        # Compressed chunks, of which one is overwritten: the file opens, the data does not.
        path = tmp_path / "demos.hdf5"
        values = np.random.default_rng(0).normal(size=(200, 7))
        with h5py.File(path, "w") as file:
            file.create_group("data").attrs["env_args"] = '{"env_name": "Lift"}'
            file.create_dataset("data/demo_0/actions", data=values, compression="gzip")
            chunk = file["data/demo_0/actions"].id.get_chunk_info(0)
        raw = bytearray(path.read_bytes())
        raw[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
        path.write_bytes(raw)
        with (
            RobomimicFile.open(path) as file,
            pytest.raises(RobomimicFileError, match=r"demo_0/actions cannot be read.*damaged"),
        ):
            file.demo("demo_0", ())

    def test_other_hdf5(self, tmp_path: Path):
        path = tmp_path / "other.hdf5"
        with h5py.File(path, "w") as file:
            file["weights"] = np.ones(3)
        with pytest.raises(RobomimicFileError, match=r"no group data.*Expected a robomimic HDF5"):
            RobomimicFile.open(path)

    def test_no_demonstrations(self, path: Path):
        def change(file: Any) -> None:
            for name in list(file["data"]):
                file.move(f"data/{name}", f"data/episode_{name}")

        with pytest.raises(RobomimicFileError, match="holds no demonstrations"):
            RobomimicFile.open(edit(path, change))

    def test_no_env_args(self, path: Path):
        edit(path, lambda file: file["data"].attrs.pop("env_args"))
        with pytest.raises(RobomimicFileError, match=r"lacks the attribute env_args"):
            RobomimicFile.open(path)

    @pytest.mark.parametrize("text", ["{", "[1]", '{"type": 1}', '{"env_name": 3}'])
    def test_unreadable_env_args(self, path: Path, text: str):
        edit(path, lambda file: file["data"].attrs.modify("env_args", text))
        with pytest.raises(RobomimicFileError, match="env_args of data"):
            RobomimicFile.open(path)

    def test_a_mask_of_unknown_names(self, path: Path):
        edit(path, lambda file: file.create_dataset("mask/odd", data=[b"demo_1", b"demo_77"]))
        with pytest.raises(RobomimicFileError, match=r"mask/odd names 'demo_77'.*3 demonstrations"):
            RobomimicFile.open(path)

    def test_h5py_is_not_installed(self, path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "h5py", None)
        with pytest.raises(ImportError, match=r"need h5py; .*pip install 'cmpolicy\[robomimic\]'"):
            RobomimicFile.open(path)


def _set(key: str, value: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        demo = file["data/demo_1"]
        del demo[key]
        demo[key] = value

    return change


def _put(key: str, at: tuple[int, ...], value: float) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        file[f"data/demo_1/{key}"][at] = value

    return change


def _empty(file: Any) -> None:
    demo = file["data/demo_1"]
    for key in ("actions", "states", *(f"obs/{key}" for key in KEYS)):
        shape = demo[key].shape[1:]
        del demo[key]
        demo[key] = np.zeros((0, *shape))
    demo.attrs["num_samples"] = 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_empty, r"demo_1: a demonstration of zero length.*filter="),
        (_set("actions", np.zeros((4, 7))), r"lengths disagree: actions 4, obs/object 3"),
        (_set("states", np.zeros((2, 32))), r"lengths disagree: .*states 2"),
        (_set("obs/object", np.zeros((9, 10))), r"lengths disagree: .*obs/object 9"),
        (_set("actions", np.zeros(3)), r"actions have shape \(3,\); expected one vector per step"),
        (_set("states", np.zeros(3)), r"states has shape \(3,\)"),
        (_set("actions", np.array([b"a", b"b", b"c"])), r"demo_1/actions.*expected numbers"),
        (_set("obs/object", np.array([b"a", b"b", b"c"])), r"obs/object.*expected numbers"),
        (_put("actions", (2, 4), np.nan), r"actions: nan \(not finite\) at step 2, column 4; 1 su"),
        (_put("obs/object", (0, 9), np.inf), r"obs/object: inf \(not finite\) at step 0, column 9"),
        (_put("states", (1, 0), -np.inf), r"states: -inf \(not finite\) at step 1"),
        (_put("obs/object", (0, 0), 1e300), r"obs/object: 1e\+300 \(too large for float32\)"),
        (lambda f: f["data/demo_1"].attrs.modify("num_samples", 9), r"num_samples is 9, but .* 3"),
        (lambda f: f.pop("data/demo_1/actions"), r"demo_1 has no actions"),
        (lambda f: f.pop("data/demo_1/obs/object"), r"demo_1: no observation 'object' \(keys: rob"),
        (
            lambda f: f.create_dataset("data/demo_1/actions_abs", data=np.zeros((3, 6))),
            r"actions_abs has shape \(3, 6\), actions \(3, 7\)",
        ),
    ],
)
def test_bad_demonstrations(path: Path, change: Callable[[Any], object], message: str):
    edit(path, change)
    with pytest.raises(RobomimicFileError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("how", ["no obs", "empty obs", "no obs in one"])
def test_a_raw_file_says_how_to_extract_observations(path: Path, how: str):
    def change(file: Any) -> None:
        for name in ["demo_1"] if how == "no obs in one" else list(file["data"]):
            del file[f"data/{name}/obs"]
            if how == "empty obs":
                file.create_group(f"data/{name}/obs")

    edit(path, change)
    with pytest.raises(RobomimicFileError, match=r"raw file") as caught:
        read(path)
    expected = f"python -m robomimic.scripts.dataset_states_to_obs --dataset {path} --output_name"
    assert expected in str(caught.value)


def test_only_images(path: Path):
    def change(file: Any) -> None:
        for name in file["data"]:
            del file[f"data/{name}/obs"]
            file[f"data/{name}/obs/view"] = np.zeros((3, 4, 4, 3), np.uint8)

    edit(path, change)
    with pytest.raises(RobomimicFileError, match=r"none of the observations .*\(view\)"):
        read(path)
