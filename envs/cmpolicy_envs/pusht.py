"""Push-T with the observation of the public demonstrations, on the physics of gym-pusht.

A step is one 10 Hz action (a target position of the agent), tracked by gym-pusht's PD controller
over ten physics steps of 10 ms. The trajectories and the coverage are those of
``gym_pusht/PushT-v0``: the physics bit for bit, the coverage to rounding. What differs is the
observation, and that nothing is computed which is not asked for (images, contact counts).
"""

import os
from typing import Any

import cv2
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from cmpolicy_envs.coverage import GOAL_POSE, coverage
from cmpolicy_envs.pusht_states import keypoints_from_pose

# pygame greets on stdout when it is imported, which gym-pusht does.
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
import pygame
from gym_pusht.envs.pusht import PushTEnv as GymPushTEnv

Observation = dict[str, NDArray[np.float32]]

ARENA = 512.0
SUCCESS_COVERAGE = 0.95
# The block may stick out of the arena at reset, or be squeezed into a wall by the agent.
_MARGIN = 256.0


class PushTEnv(GymPushTEnv):  # type: ignore[misc]  # gym-pusht ships no types
    """Push a T-shaped block onto its goal pose.

    Observation (float32, px): ``agent_pos`` (2,), ``keypoint`` (9, 2).
    Action (float32, px): (2,) target position of the agent in [0, 512].
    Reward: ``clip(coverage / 0.95, 0, 1)``; the episode terminates when coverage exceeds 0.95.
    Info: ``coverage`` (share of the goal that the block covers), ``is_success`` (coverage > 0.95)
    and ``state`` (5,) float64 [agent x, agent y, block x, block y, block angle in [0, 2 pi)].

    ``reset(seed=k)`` draws gym-pusht's initial state. ``reset(options={"reset_to_state": s})`` with
    s (5,) sets the state as gym-pusht and Diffusion Policy do: position first, then the angle about
    the centre of gravity, so that the block's position moves. :meth:`set_pose` restores a recorded
    ``info["state"]`` or ``data/state`` exactly.

    Args:
        render_mode: None (no images) or ``"rgb_array"``.
        render_size: height and width of rendered images, px.
    """

    def __init__(self, render_mode: str | None = None, render_size: int = 512) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"PushT: render_mode must be None or 'rgb_array', got {render_mode!r}")
        super().__init__(
            obs_type="state",
            render_mode=render_mode,
            visualization_width=render_size,
            visualization_height=render_size,
        )
        self.metadata = {**GymPushTEnv.metadata, "render_modes": ["rgb_array"]}

    def _initialize_observation_space(self) -> None:
        low, high = -_MARGIN, ARENA + _MARGIN
        self.observation_space = spaces.Dict(
            {
                "agent_pos": spaces.Box(low, high, (2,), np.float32),
                "keypoint": spaces.Box(low, high, (9, 2), np.float32),
            }
        )

    def _setup(self) -> None:
        super()._setup()
        # Counting contacts costs a Python call per contact and physics step, and nothing reads it:
        # move the shapes out of the collision type that gym-pusht's handler listens to.
        for shape in self.space.shapes:
            shape.collision_type = 1

    def _get_coverage(self) -> float:
        x, y = self.block.position
        return coverage(x, y, self.block.angle, GOAL_POSE)

    def get_obs(self) -> Observation:
        """The observation of the present state; also used for replayed states."""
        block = self.block
        return {
            "agent_pos": np.array(self.agent.position, dtype=np.float32),
            "keypoint": keypoints_from_pose(block.position, block.angle).astype(np.float32),
        }

    def _get_info(self) -> dict[str, Any]:
        agent, block = self.agent.position, self.block.position
        angle = self.block.angle % (2 * np.pi)
        return {"state": np.array([agent.x, agent.y, block.x, block.y, angle])}

    def render(self) -> NDArray[np.uint8] | None:
        """Image (H, W, 3) of the present state, without marks; None if made without render mode."""
        if self.render_mode is None:
            return None
        screen = self._draw()
        image = np.frombuffer(pygame.image.tobytes(screen, "RGB"), dtype=np.uint8)
        image = image.reshape(screen.get_height(), screen.get_width(), 3)
        size = (self.visualization_width, self.visualization_height)
        if size != screen.get_size():
            return cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
        return image.copy()  # writable

    def action_pixels(self, actions: ArrayLike) -> NDArray[np.float64]:
        """Where on the rendered image (x, y) actions (..., 2) lie, to draw a plan."""
        scale = np.array([self.visualization_width, self.visualization_height]) / ARENA
        return np.asarray(actions, dtype=np.float64) * scale

    def set_pose(self, state: ArrayLike) -> None:
        """Put agent and block exactly where ``state`` (5,) says, at rest, without stepping.

        Unlike ``reset_to_state`` this is the inverse of ``info["state"]``.
        """
        values = _checked_state(state, "set_pose")
        self._setup()
        self._place(values)
        self.n_contact_points = 0

    def _place(self, values: list[float]) -> None:
        self.agent.position = values[:2]
        self.block.angle = values[4]
        self.block.position = values[2:4]
        self.space.reindex_shapes_for_body(self.agent)
        self.space.reindex_shapes_for_body(self.block)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        if options is not None:
            unknown = sorted(set(options) - {"reset_to_state"})
            if unknown:
                raise ValueError(
                    f"PushT: unknown reset option {unknown[0]!r}; known: 'reset_to_state'"
                )
            if options.get("reset_to_state") is not None:
                state = _checked_state(options["reset_to_state"], "reset_to_state")
                options = {"reset_to_state": state}
        observation, info = super().reset(seed=seed, options=options)
        covered = self._get_coverage()
        info["coverage"] = covered
        info["is_success"] = bool(covered > SUCCESS_COVERAGE)
        return observation, info

    def step(self, action: ArrayLike) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One 10 Hz action; raises ValueError on a shape other than (2,) or non-finite values."""
        target = np.asarray(action, dtype=np.float64)
        if target.shape != (2,) or not np.isfinite(target).all():
            raise ValueError(
                f"PushT: expected an action of two finite numbers (px), got {action!r}"
            )
        target_x, target_y = target.tolist()
        k_p, k_v, dt, agent, space = self.k_p, self.k_v, self.dt, self.agent, self.space
        # gym-pusht's loop on plain floats, in its order of operations (bit for bit the same).
        for _ in range(int(1 / (dt * self.control_hz))):
            (x, y), (v_x, v_y) = agent.position, agent.velocity
            agent.velocity = (
                v_x + (k_p * (target_x - x) + k_v * (0 - v_x)) * dt,
                v_y + (k_p * (target_y - y) + k_v * (0 - v_y)) * dt,
            )
            space.step(dt)
        covered = self._get_coverage()
        success = bool(covered > SUCCESS_COVERAGE)
        info = self._get_info()
        info["coverage"] = covered
        info["is_success"] = success
        reward = min(covered / SUCCESS_COVERAGE, 1.0)
        return self.get_obs(), reward, success, False, info


class PushTImageEnv(PushTEnv):
    """Push-T seen by a camera from above.

    Observation: ``image`` (96, 96, 3) uint8, gym-pusht's rendering as in the public demonstrations,
    and ``agent_pos`` (2,) float32, px. All else as :class:`PushTEnv`.

    Args:
        render_mode, render_size: as there; they do not change the observation.
        image_size: height and width of the observed image.
    """

    def __init__(
        self, render_mode: str | None = None, render_size: int = 512, image_size: int = 96
    ) -> None:
        self._image_size = image_size
        super().__init__(render_mode, render_size)

    def _initialize_observation_space(self) -> None:
        low, high = -_MARGIN, ARENA + _MARGIN
        size = self._image_size
        self.observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, (size, size, 3), np.uint8),
                "agent_pos": spaces.Box(low, high, (2,), np.float32),
            }
        )

    def frame(self) -> NDArray[np.uint8]:
        """The camera's image of the present state."""
        # gym-pusht's _get_img, bit for bit, without its slow copy of a transposed array
        screen = self._draw()
        image = np.frombuffer(pygame.image.tobytes(screen, "RGB"), dtype=np.uint8)
        size = (self._image_size, self._image_size)
        whole = image.reshape(*screen.get_size()[::-1], 3)
        return np.asarray(cv2.resize(whole, size), dtype=np.uint8)

    def frame_at(self, state: ArrayLike) -> NDArray[np.uint8]:
        """The camera's image of a recorded state (5,); reset before the next step."""
        if not hasattr(self, "space"):
            self._setup()
        self._place(_checked_state(state, "frame_at"))
        return self.frame()

    def get_obs(self) -> dict[str, NDArray[Any]]:
        agent = np.array(self.agent.position, dtype=np.float32)
        return {"image": self.frame(), "agent_pos": agent}


def _checked_state(state: ArrayLike, what: str) -> list[float]:
    values = np.asarray(state, dtype=np.float64)
    if values.shape != (5,) or not np.isfinite(values).all():
        raise ValueError(
            f"PushT: {what} needs five finite numbers [agent x, agent y, block x, block y, angle], "
            f"got {state!r}"
        )
    return [float(v) for v in values]
