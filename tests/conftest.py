"""Fixtures that every test folder shares."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# No timed assertion in the suite: a busy machine is not a failure.
hypothesis.settings.register_profile("cmpolicy", deadline=None)
hypothesis.settings.load_profile("cmpolicy")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Tiny tensors: threads cost more than they give, and the pytest workers share the cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the data sets that are not part of the repository, else the test is skipped.

    It is named by CMPOLICY_SHARED_DATA, or lies beside the checkout as ../shared/data.
    """
    named = os.environ.get("CMPOLICY_SHARED_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; name its folder in CMPOLICY_SHARED_DATA")
    return folder


@pytest.fixture(scope="session")
def pusht_human(shared_data: Path) -> Path:
    """The human Push-T demonstrations (Zarr format 2), else the test is skipped."""
    store = shared_data / "pusht_cchi_v7_replay.zarr"
    if not store.is_dir():
        pytest.skip(f"no human Push-T demonstrations at {store}")
    return store
