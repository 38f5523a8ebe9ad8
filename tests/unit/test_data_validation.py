"""``validate`` finds every problem and names it."""

from pathlib import Path

import numpy as np
import pytest
import zarr

from cmpolicy_data import ReplayBuffer, SelectorError, validate


def write(path: Path, data: dict[str, np.ndarray], ends: object, chunk: int = 4) -> Path:
    """A format 3 store that holds just this, whatever is wrong with it."""
    root = zarr.create_group(path)
    for key, values in data.items():
        array = root.create_array(
            f"data/{key}",
            shape=values.shape,
            chunks=(chunk, *values.shape[1:]),
            dtype=values.dtype,
        )
        array[...] = values
    if ends is not None:
        values = np.asarray(ends)
        root.create_array("meta/episode_ends", shape=values.shape, dtype=values.dtype)[...] = values
    return path


def good() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "action": rng.uniform(1, 2, (20, 2)).astype(np.float32),
        "state": rng.uniform(1, 2, (20, 3)),
    }


def found(path: Path, required: list[str] | None = None) -> list[tuple[str, int | None, str]]:
    problems = validate(path) if required is None else validate(path, required)
    assert all(problem.path == path for problem in problems)
    return [(problem.key, problem.index, problem.message) for problem in problems]


def test_the_human_demonstrations_have_no_problems(pusht_human: Path, tmp_path: Path):
    # All but the images, which take seconds to decode.
    (tmp_path / "data").mkdir()
    for name in (".zgroup", "meta", "data/.zgroup", "data/action", "data/state", "data/keypoint"):
        (tmp_path / name).symlink_to(pusht_human / name)
    assert validate(tmp_path, ["action", "state[:5]", "keypoint"]) == []


def test_every_bad_value_is_found_with_step_and_episode(tmp_path: Path):
    data = good()
    data["action"][9, 1] = np.nan
    data["action"][10, 0] = np.inf
    data["state"][0, 2] = -np.inf
    data["state"][19, 0] = 1e300
    problems = found(write(tmp_path / "x.zarr", data, [8, 20]))
    assert problems == [
        (
            "data/action",
            9,
            "nan (not finite) at step 9 (episode 1, its step 1), column 1; "
            "2 such values in 2 steps there",
        ),
        (
            "data/state",
            0,
            "-inf (not finite) at step 0 (episode 0, its step 0), column 2; "
            "1 such values in 1 steps there",
        ),
        (
            "data/state",
            19,
            "1e+300 (too large for float32) at step 19 (episode 1, its step 11), column 0; "
            "1 such values in 1 steps there",
        ),
    ]


def test_wrong_lengths(tmp_path: Path):
    data = good()
    data["state"] = data["state"][:17]
    data["extra"] = np.ones((25, 1))
    assert found(write(tmp_path / "x.zarr", data, [8, 20])) == [
        ("data/extra", 20, "wrong length: 25 steps, but the last episode ends at step 20"),
        ("data/state", 17, "wrong length: 17 steps, but the last episode ends at step 20"),
    ]


def test_episode_ends_that_do_not_match_any_array(tmp_path: Path):
    problems = found(write(tmp_path / "x.zarr", good(), [8, 21]))
    assert [key for key, _, _ in problems] == ["data/action", "data/state"]
    assert all("20 steps, but the last episode ends at step 21" in m for _, _, m in problems)


def test_episode_ends_that_do_not_increase(tmp_path: Path):
    problems = found(write(tmp_path / "x.zarr", good(), [8, 8, 5, 20]))
    assert problems == [
        (
            "meta/episode_ends",
            1,
            "not increasing: entry 1 is 8 after 8, so episode 1 has no steps",
        ),
        (
            "meta/episode_ends",
            2,
            "not increasing: entry 2 is 5 after 8, so episode 2 has no steps",
        ),
    ]


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (None, "missing: (E,) integers"),
        (np.zeros(0, np.int64), "empty: the store has no episodes"),
        (np.array([8.0, 20.0]), "must be 1-D integers, got shape (2,), dtype float64"),
        (np.array([[8], [20]]), "must be 1-D integers, got shape (2, 1), dtype int64"),
    ],
)
def test_bad_episode_ends(tmp_path: Path, ends: object, message: str):
    ((key, _, text),) = found(write(tmp_path / "x.zarr", good(), ends))
    assert key == "meta/episode_ends"
    assert text.startswith(message)


def test_missing_keys_and_columns(tmp_path: Path):
    path = write(tmp_path / "x.zarr", {"state": good()["state"]}, [8, 20])
    assert found(path) == [("data/action", None, "missing key 'action' (keys: state)")]
    assert found(path, ["state[:3]"]) == []
    ((key, _, text),) = found(path, ["state[:4]"])
    assert key == "data/state"
    assert "state has 3 columns" in text
    with pytest.raises(SelectorError, match="Cannot read"):
        validate(path, ["state["])


def test_no_data(tmp_path: Path):
    ((key, _, text),) = found(write(tmp_path / "x.zarr", {}, [8]))
    assert key == "data"
    assert "has no group data/" in text
    root = zarr.open_group(tmp_path / "x.zarr", mode="r+")
    root.create_group("data")
    texts = [text for _, _, text in found(tmp_path / "x.zarr")]
    assert texts[0].startswith("there are no arrays under data/")


@pytest.mark.filterwarnings("ignore:.*does not have a Zarr V3 specification")
def test_wrong_dtypes(tmp_path: Path):
    data = good() | {"words": np.full((20,), "a"), "wave": np.ones((20, 1), np.complex64)}
    problems = found(write(tmp_path / "x.zarr", data, [8, 20]))
    assert [(key, text[:21]) for key, _, text in problems] == [
        ("data/wave", "wrong dtype complex64"),
        ("data/words", "wrong dtype <U1: expe"),
    ]


def test_truncated_stores(tmp_path: Path):
    path = write(tmp_path / "x.zarr", good(), [8, 20])
    (path / "data/action/c/2/0").unlink()
    (path / "data/state/c/1/0").write_bytes(b"")
    problems = found(path)
    assert [(key, index) for key, index, _ in problems] == [("data/action", 8), ("data/state", 0)]
    assert "1 of 5 chunks of data/action are not there" in problems[0][2]
    assert "chunk data/state/c/1/0 (steps 4 to 7) cannot be decoded" in problems[1][2]


def test_what_is_no_store_is_one_problem(tmp_path: Path):
    (tmp_path / "x.zip").write_bytes(b"PK")
    ((key, _, text),) = found(tmp_path / "x.zip")
    assert key == ""
    assert "not a whole .zip archive" in text
    with pytest.raises(FileNotFoundError, match="no data at"):
        validate(tmp_path / "nope.zarr")


def test_many_problems_are_found_together(tmp_path: Path):
    data = good()
    data["state"][3] = np.nan
    data["action"] = data["action"][:15]
    keys = [key for key, _, _ in found(write(tmp_path / "x.zarr", data, [8, 8, 20]), ["pose"])]
    assert keys == ["meta/episode_ends", "data/pose", "data/action", "data/state"]


def test_our_own_stores_are_good(tmp_path: Path):
    buffer = ReplayBuffer.create(tmp_path / "x.zarr")
    buffer.append_episode({"action": np.zeros((5, 2)), "flag": np.zeros(5, bool)})
    assert validate(buffer.path) == []
