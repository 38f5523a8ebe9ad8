"""The wheel: the five packages with every data file, and it works away from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACKAGES = {
    "cmpolicy": "cmpolicy",
    "cmpolicy_envs": "envs/cmpolicy_envs",
    "cmpolicy_data": "data/cmpolicy_data",
    "cmpolicy_eval": "eval/cmpolicy_eval",
    "cmpolicy_conf": "conf/cmpolicy_conf",
}
MEGABYTE = 2**20


def _run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    target = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.glob("*.whl")
    return zipfile.ZipFile(built)


@pytest.fixture(scope="module")
def unpacked(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("unpacked")
    wheel.extractall(target)
    return target


def test_top_level_is_the_five_packages(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)


@pytest.mark.parametrize(("package", "folder"), PACKAGES.items())
def test_every_file_of_a_package_is_shipped(
    wheel: zipfile.ZipFile, repository: Path, package: str, folder: str
) -> None:
    source = repository / folder
    expected = {
        f"{package}/{path.relative_to(source).as_posix()}"
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    shipped = {name for name in wheel.namelist() if name.startswith(f"{package}/")}
    assert shipped == expected
    assert f"{package}/py.typed" in shipped


def test_data_files_are_there(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {"cmpolicy_conf/train.yaml", "cmpolicy_conf/encoder/mlp.yaml"} <= names
    assert "cmpolicy_data/assets/pusht_scripted.zarr.zip" in names
    bundle = ("config.json", "model.safetensors", "normalizer.safetensors", "README.md")
    assert {f"cmpolicy/pretrained/pusht/{name}" for name in bundle} <= names


def test_data_files_stay_small(wheel: zipfile.ZipFile) -> None:
    sizes = {info.filename: info.file_size for info in wheel.infolist()}
    assert sizes["cmpolicy_data/assets/pusht_scripted.zarr.zip"] <= 3 * MEGABYTE
    weights = {name: size for name, size in sizes.items() if name.endswith("/model.safetensors")}
    assert weights
    assert {name: size for name, size in weights.items() if size > 8 * MEGABYTE} == {}


def test_it_works_away_from_the_checkout(unpacked: Path, tmp_path: Path) -> None:
    script = tmp_path / "use.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "import cmpolicy, cmpolicy_conf, cmpolicy_data, cmpolicy_envs, cmpolicy_eval\n"
        "root = Path(sys.argv[1])\n"
        "for package in (cmpolicy, cmpolicy_conf, cmpolicy_data, cmpolicy_envs, cmpolicy_eval):\n"
        "    assert root in Path(package.__file__).parents, package.__file__\n"
        "policy = cmpolicy.ConsistencyPolicy.from_pretrained('pusht')\n"
        "assert policy.spec.action_dim == 2\n"
        "path = cmpolicy_data.bundled_path('pusht')\n"
        "assert root in path.parents, path\n"
        "assert cmpolicy_data.ReplayBuffer.open(path).n_episodes >= 200\n"
    )
    _run(sys.executable, script, unpacked, PYTHONPATH=str(unpacked), HF_HUB_OFFLINE="1")
