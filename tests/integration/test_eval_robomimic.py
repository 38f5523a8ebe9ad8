"""Robomimic tasks under evaluation: processes, a worker that dies, videos, cameras."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cloudpickle
import imageio.v2 as imageio
import numpy as np
import pytest

pytest.importorskip("robosuite", reason="needs the extra cmpolicy[robomimic]")

from cmpolicy_envs.offscreen import OpenGLError
from cmpolicy_envs.robomimic import RobomimicEnv
from cmpolicy_eval import RolloutError, get_protocol, rollout
from cmpolicy_eval.video import annotate, replay, write_videos

# Environment processes cannot import this file, so its classes travel by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

PROTOCOL = get_protocol("robomimic-ph", task="can")


@dataclass
class Drift:
    """Moves away from the robot, faster the higher the can lies."""

    n_obs_steps: int = 2
    n_action_steps: int = 3

    def infer(self, obs: Mapping[str, np.ndarray]) -> np.ndarray:
        chunk = np.zeros((len(obs["object"]), 3, 7), np.float32)
        chunk[..., 0], chunk[..., 1] = 0.5, obs["object"][:, -1, 9:10]
        return chunk


class Dies(RobomimicEnv):
    """Its process ends in the first step of seed 5."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.doomed = seed == 5
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        if self.doomed:
            os._exit(17)
        return super().step(action)


def run(make_env: Any, seeds: list[int], n_workers: int, **kwargs: Any) -> list[Any]:
    done = rollout(
        make_env, Drift(), seeds, max_steps=5, n_workers=n_workers, batch_size=2, **kwargs
    )
    return [replace(episode, infer_ms=()) for episode in done]


@pytest.fixture(scope="module")
def visible() -> Iterator[RobomimicEnv]:
    """An environment that renders, else the test is skipped."""
    env = RobomimicEnv("can", render_mode="rgb_array", render_size=64, cameras=["agentview"])
    try:
        env.reset(seed=0)
    except OpenGLError as error:
        pytest.skip(str(error))
    yield env
    env.close()


def test_two_processes_score_what_one_does() -> None:
    one = run(PROTOCOL.make_env, [3, 4, 6], n_workers=1, keep_chunks=3)
    two = run(PROTOCOL.make_env, [3, 4, 6], n_workers=2, keep_chunks=3)
    assert one == two
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.chunks, b.chunks)


def test_a_dying_worker_is_an_error_that_names_the_seed() -> None:
    with pytest.raises(RolloutError, match=r"episode of seed 5.*: .*exit"):
        run(lambda: Dies("can"), [4, 5], n_workers=2)


def test_the_protocol() -> None:
    assert PROTOCOL.name == "robomimic-ph can"
    assert PROTOCOL.default_seeds == (100_000, 100_099)
    assert (PROTOCOL.max_steps, PROTOCOL.control_hz, PROTOCOL.batch_size) == (400, 20, 20)
    assert get_protocol("robomimic-ph", task="transport").max_steps == 700
    with pytest.raises(ValueError, match=r"needs a task: task=lift \| can \| square"):
        get_protocol("robomimic-ph")
    with pytest.raises(ValueError, match="did you mean 'tool_hang'"):
        get_protocol("robomimic-ph", task="toolhang")


def test_images_show_the_scene(visible: RobomimicEnv) -> None:
    obs, _ = visible.reset(seed=1)
    image = visible.render()
    assert image is not None
    assert image.shape == (64, 64, 3)
    assert obs["agentview_image"].shape == (84, 84, 3)
    assert obs in visible.observation_space
    assert image.std() > 20
    np.testing.assert_array_equal(visible.render(), image)
    # The can is red, and where its place is projected to.
    from cmpolicy_envs.offscreen import project

    sim = visible.robosuite.sim
    place = np.array(obs["object"][7:10], dtype=np.float64)
    big = visible.image("agentview", 84).astype(int)
    x, y = project(sim.model._model, sim.data._data, "agentview", place, 84)
    patch = big[int(y) - 2 : int(y) + 3, int(x) - 2 : int(x) + 3]
    assert (patch[..., 0] - patch[..., 1:].max(-1)).max() > 60
    with pytest.raises(ValueError, match="there is no camera 'moon'; known: frontview"):
        visible.image("moon", 64)


def test_plans_start_at_the_gripper(visible: RobomimicEnv) -> None:
    from cmpolicy_envs.offscreen import project

    obs, _ = visible.reset(seed=1)
    sim = visible.robosuite.sim
    still = visible.action_pixels(np.zeros((3, 7)))
    gripper = obs["robot0_eef_pos"].astype(np.float64)
    expected = project(sim.model._model, sim.data._data, "agentview", gripper, 64)
    np.testing.assert_allclose(still, np.broadcast_to(expected, (3, 1, 2)), atol=1e-3)
    moved = visible.action_pixels(np.tile([0, 1, 0, 0, 0, 0, 0], (3, 1)))
    assert (np.diff(moved[:, 0, 0]) > 1).all()  # to the right


def test_videos_show_the_scored_episode(visible: RobomimicEnv, tmp_path: Path) -> None:
    (episode,) = run(PROTOCOL.make_env, [7], n_workers=1, keep_chunks=1)
    moments = list(replay(PROTOCOL, episode))
    assert [m.step for m in moments] == list(range(6))
    assert moments[0].plan is not None
    assert moments[0].plan.shape == (3, 1, 2)
    np.testing.assert_array_equal(moments[0].plan, moments[2].plan)
    frame = annotate(moments[0], 7)
    assert frame.shape == (288, 256, 3)
    assert (np.abs(frame[32:].astype(int) - moments[0].image) > 50).any()  # the plan
    (path,) = write_videos(tmp_path, PROTOCOL, [episode])
    with imageio.get_reader(path) as reader:
        assert reader.get_meta_data()["fps"] == 20
        assert reader.count_frames() == 6


def test_without_opengl_a_package_is_named() -> None:
    code = (
        "import ctypes.util\n"
        "ctypes.util.find_library = lambda name: None\n"
        "from cmpolicy_envs import offscreen\n"
        "try:\n"
        "    offscreen._context()\n"
        "except offscreen.OpenGLError as error:\n"
        "    print(error)\n"
    )
    environ = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith("cannot render: neither EGL nor OSMesa is installed.")
    assert "apt-get install libosmesa6" in line
