"""Data sets by name: where they are looked for, and what is said when they are not there."""

from pathlib import Path

import numpy as np
import pytest

from cmpolicy_data import DatasetNotFoundError, ReplayBuffer, bundled_path, resolve
from cmpolicy_data.catalog import HUMAN_STORE, cache_dir, data_dir


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CMPOLICY_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make_store(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ReplayBuffer.create(path).append_episode({"action": np.ones((3, 2))})
    return path


def test_human_demonstrations_by_path(tmp_path: Path):
    store = make_store(tmp_path / "here" / HUMAN_STORE)
    assert resolve("pusht_human", store) == store
    assert resolve("pusht_human", store.parent) == store
    other = make_store(tmp_path / "other.zarr")
    assert resolve("pusht_human", other) == other


def test_human_demonstrations_by_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    store = make_store(tmp_path / "env" / HUMAN_STORE)
    for value in (store, store.parent):
        monkeypatch.setenv("CMPOLICY_DATA", str(value))
        assert resolve("pusht_human") == store
        assert data_dir() == store.parent


def test_human_demonstrations_in_the_cache(tmp_path: Path):
    assert cache_dir() == data_dir() == tmp_path / "cache" / "cmpolicy"
    store = make_store(cache_dir() / HUMAN_STORE)
    assert resolve("pusht_human") == store


def test_the_default_cache(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "cmpolicy"


def test_the_error_lists_where_it_looked_and_what_helps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    with pytest.raises(DatasetNotFoundError) as error:
        resolve("pusht_human")
    text = str(error.value)
    assert "data.path: not set" in text
    assert "CMPOLICY_DATA: not set" in text
    assert f"download cache: {cache_dir()} is not, and does not hold, {HUMAN_STORE}" in text
    assert "cmpolicy data download pusht" in text
    assert "cmpolicy train task=pusht" in text
    monkeypatch.setenv("CMPOLICY_DATA", str(tmp_path))
    with pytest.raises(DatasetNotFoundError, match=f"CMPOLICY_DATA: {tmp_path} is not"):
        resolve("pusht_human")


def test_any_path(tmp_path: Path):
    store = make_store(tmp_path / "mine.zarr")
    assert resolve(str(store)) == store
    with pytest.raises(DatasetNotFoundError, match=r"'nope' is neither.*pusht_human.*path"):
        resolve("nope")
    with pytest.raises(DatasetNotFoundError, match=r"no data at .*gone \(data.path\)"):
        resolve("pusht_human", tmp_path / "gone")


def test_bundled_demonstrations():
    path = bundled_path("pusht")
    assert path == resolve("pusht_scripted")
    assert path.name == "pusht_scripted.zarr.zip"
    with pytest.raises(DatasetNotFoundError, match=r"no bundled data set 'kitchen'.*pusht"):
        bundled_path("kitchen")
