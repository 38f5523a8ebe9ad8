"""What an import loads: a robot installs light, and a version check does not load torch."""

import json
import subprocess
import sys

import pytest

SIMULATION = {"gymnasium", "gym_pusht", "pymunk", "pygame"}
STORES_AND_CONFIG = {"zarr", "hydra", "omegaconf"}
SOURCE_ROOTS = {"cmpolicy_envs", "cmpolicy_data", "cmpolicy_eval", "cmpolicy_conf"}


def _loaded_by(statement: str) -> set[str]:
    """Top-level names of the modules that the statement loads in a fresh interpreter."""
    code = (
        f"{statement}\nimport json, sys\n"
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_cmpolicy_alone_is_light() -> None:
    assert not _loaded_by("import cmpolicy") & {"torch", "numpy", "diffusers"}


def test_a_control_loop_loads_numpy_alone() -> None:
    loaded = _loaded_by("import cmpolicy; cmpolicy.ControlLoop; cmpolicy.ActionChunker")
    unwanted = (
        SIMULATION | STORES_AND_CONFIG | SOURCE_ROOTS | {"torch", "websockets", "onnxruntime"}
    )
    assert loaded & unwanted == set()
    assert "numpy" in loaded


def test_policy_loads_no_store_config_or_simulator() -> None:
    loaded = _loaded_by("import cmpolicy.policy, cmpolicy; cmpolicy.ConsistencyPolicy")
    unwanted = SIMULATION | STORES_AND_CONFIG | SOURCE_ROOTS
    unwanted |= {"diffusers", "accelerate", "matplotlib", "tensorboard", "imageio"}
    assert loaded & unwanted == set()
    assert "torch" in loaded


@pytest.mark.parametrize("root", sorted(SOURCE_ROOTS))
def test_source_roots_load_neither_torch_nor_cmpolicy(root: str) -> None:
    loaded = _loaded_by(f"import {root}")
    assert loaded & {"torch", "cmpolicy"} == set()


def test_data_does_not_load_the_simulator() -> None:
    assert _loaded_by("import cmpolicy_data") & (SIMULATION | {"cmpolicy_envs"}) == set()


def test_images_load_no_extra_before_it_is_needed() -> None:
    loaded = _loaded_by("import cmpolicy.image.datasets, cmpolicy.image.metrics.fidelity")
    unwanted = {"sklearn", "torchvision", "torch_fidelity", "efficientnet_lite_pytorch"}
    assert loaded & (unwanted | SIMULATION | STORES_AND_CONFIG | SOURCE_ROOTS) == set()
