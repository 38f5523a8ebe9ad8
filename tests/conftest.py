"""Fixtures that every test folder shares."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import hypothesis
import numpy as np
import pytest

# No timed assertion in the suite: a busy machine is not a failure. The same examples in every run,
# new ones with `make unit PYTEST_ARGS="--hypothesis-profile search tests/property"`.
_untimed = hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("search", _untimed)
hypothesis.settings.register_profile("cmpolicy", _untimed, derandomize=True, database=None)
hypothesis.settings.load_profile("cmpolicy")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much tests/attack does; here, since options of a folder's conftest come too late."""
    parser.addoption("--attack-scale", type=int, default=1, help="factor on attacks (suite: 1)")


REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Tiny tensors: threads cost more than they give, and the pytest workers share the cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Rendered and decoded frames go into a folder of this run, not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_proxy_to_this_machine() -> Iterator[None]:
    """The tests' own servers are reached without a proxy that the environment names."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("no_proxy", "NO_PROXY"):
            hosts = [os.environ.get(name, ""), "127.0.0.1", "localhost"]
            patch.setenv(name, ",".join(filter(None, hosts)))
        yield


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


@pytest.fixture(scope="session")
def write_robomimic() -> Callable[..., Path]:
    """Writes files in robomimic's layout with random numbers in them; no simulator is asked.

    ``write(path, lengths=(5, 3, 4), first=0, seed=0, task="lift")``: demonstrations named from
    ``demo_<first>`` on; the last one is in mask/valid, the others in mask/train.
    """
    h5py = pytest.importorskip("h5py")
    from cmpolicy_envs.robomimic_args import default_env_args

    def write(
        path: Path,
        lengths: Sequence[int] = (5, 3, 4),
        first: int = 0,
        seed: int = 0,
        task: str = "lift",
    ) -> Path:
        rng = np.random.default_rng(seed)
        arms = 2 if task == "transport" else 1
        names = [f"demo_{first + i}" for i in range(len(lengths))]
        with h5py.File(path, "w") as file:
            data = file.create_group("data")
            data.attrs["env_args"] = default_env_args(task).to_json()
            data.attrs["total"] = sum(lengths)
            for name, length in zip(names, lengths, strict=True):
                demo = data.create_group(name)
                demo.attrs["num_samples"] = length
                demo.attrs["model_file"] = f'<mujoco model="{name}"/>'
                demo["actions"] = rng.uniform(-1, 1, (length, 7 * arms))
                demo["states"] = rng.normal(size=(length, 32))
                demo["rewards"], demo["dones"] = np.zeros(length), np.zeros(length, int)
                for moment in ("obs", "next_obs"):
                    demo[f"{moment}/object"] = rng.normal(size=(length, 10))
                    for arm in range(arms):
                        for key, size in (("eef_pos", 3), ("eef_quat", 4), ("gripper_qpos", 2)):
                            demo[f"{moment}/robot{arm}_{key}"] = rng.normal(size=(length, size))
            file["mask/train"] = np.array([name.encode() for name in names[:-1]])
            file["mask/valid"] = np.array([name.encode() for name in names[-1:]])
        return path

    return write
