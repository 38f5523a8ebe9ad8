"""The demonstrator's mental model: gym-pusht's physics without rendering, settable to any state.

Built from gym-pusht's own shapes, so that a simulated push is the push that will happen. Contact
in Push-T is without friction, and the block stops at once when the agent leaves it (damping 0):
agent position, agent velocity and block pose are the whole state.
"""

from __future__ import annotations

from typing import NamedTuple

import pymunk
from gym_pusht.envs.pusht import PushTEnv

from cmpolicy_data.generate.tee import Pose

# gym-pusht: PD control of the agent at 100 Hz, a new target every 10 substeps (10 Hz).
_KP, _KV, _DT, _SUBSTEPS = 100.0, 20.0, 0.01, 10
STEP_SECONDS = _DT * _SUBSTEPS
# How far behind a target at constant speed the agent is at the end of a step, in steps: kv / kp
# behind the mean of the target, which moves once a step.
LAG_STEPS = _KV / _KP / STEP_SECONDS - 0.5


class State(NamedTuple):
    """Agent position in px, agent velocity in px/s, block pose."""

    x: float
    y: float
    vx: float
    vy: float
    block: Pose


class World:
    """One simulated table."""

    def __init__(self) -> None:
        self._space = pymunk.Space()
        self._space.gravity = (0, 0)
        self._space.damping = 0.0
        corners = [(5, 506), (5, 5), (506, 5), (506, 506)]
        for a, b in zip(corners, corners[1:] + corners[:1], strict=True):
            self._space.add(PushTEnv.add_segment(self._space, a, b, 2))
        self._agent = PushTEnv.add_circle(self._space, (256, 400), 15)
        self._block, _ = PushTEnv.add_tee(self._space, (256, 300), 0)

    def set(self, state: State) -> None:
        """Put everything where `state` says."""
        self._agent.position = (state.x, state.y)
        self._agent.velocity = (state.vx, state.vy)
        self._block.angle = state.block.angle  # first: it turns about the centre of mass
        self._block.position = (state.block.x, state.block.y)
        self._block.velocity = (0, 0)
        self._block.angular_velocity = 0.0

    def state(self) -> State:
        """Where everything is now."""
        agent, block = self._agent, self._block
        pose = Pose(block.position.x, block.position.y, block.angle)
        return State(agent.position.x, agent.position.y, agent.velocity.x, agent.velocity.y, pose)

    def step(self, x: float, y: float) -> Pose:
        """One control step (0.1 s) with the agent's target at (x, y); the block's new pose."""
        agent, space = self._agent, self._space
        # The agent is kinematic: its own motion needs no reading back (which is slow).
        (px, py), (vx, vy) = agent.position, agent.velocity
        for _ in range(_SUBSTEPS):
            vx += (_KP * (x - px) - _KV * vx) * _DT
            vy += (_KP * (y - py) - _KV * vy) * _DT
            agent.velocity = vx, vy
            space.step(_DT)
            px += vx * _DT
            py += vy * _DT
        block = self._block
        return Pose(block.position.x, block.position.y, block.angle)
