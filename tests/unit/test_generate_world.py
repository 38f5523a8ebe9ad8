"""The demonstrator's geometry and its simulated world against the real simulator."""

import numpy as np
import pytest

from cmpolicy_data.generate.demonstrator import Demonstrator, NoPushError
from cmpolicy_data.generate.pushes import Push, Search, start_push
from cmpolicy_data.generate.route import clearance, route
from cmpolicy_data.generate.tee import (
    AGENT_RADIUS,
    GOAL,
    OUTLINE,
    Pose,
    Ring,
    goal_distance,
    outline_at,
    to_body,
)
from cmpolicy_data.generate.world import State, World
from cmpolicy_envs.coverage import GOAL_POSE
from cmpolicy_envs.pusht import PushTEnv


def test_outline_is_that_of_the_simulator() -> None:
    env = PushTEnv()
    env.reset(seed=0)
    corners = {tuple(v) for shape in env.block.shapes for v in shape.get_vertices()}
    assert {tuple(v) for v in OUTLINE} == corners
    assert tuple(GOAL) == pytest.approx(tuple(GOAL_POSE))


def test_goal_distance() -> None:
    assert goal_distance(GOAL) == pytest.approx(0.0, abs=1e-12)
    assert goal_distance(Pose(GOAL.x + 3.0, GOAL.y + 4.0, GOAL.angle)) == pytest.approx(5.0)
    assert goal_distance(Pose(GOAL.x, GOAL.y, GOAL.angle + np.pi)) > 50.0


def test_body_frame_is_inverted() -> None:
    pose = Pose(200.0, 310.0, 2.3)
    np.testing.assert_allclose(to_body(pose, outline_at(pose)), OUTLINE, atol=1e-12)


def test_ring_keeps_its_distance_and_points_inward() -> None:
    ring = Ring(17.0)
    along = np.linspace(0.0, ring.length, 40)
    points, inward = ring.at(along), ring.inward(along)
    still = Pose(0.0, 0.0, 0.0)
    np.testing.assert_allclose(clearance(points, still), 17.0, atol=0.2)
    nearer = points + 5.0 * np.stack([np.cos(inward), np.sin(inward)], axis=-1)
    assert np.all(clearance(nearer, still) < 14.5)
    assert ring.locate(points[7]) == pytest.approx(along[7])


def test_world_moves_as_the_simulator_does() -> None:
    env = PushTEnv()
    _, info = env.reset(options={"reset_to_state": [120.0, 260.0, 250.0, 240.0, 0.4]})
    world = World()
    agent, block = env.agent, env.block
    world.set(State(*agent.position, *agent.velocity, Pose(*block.position, block.angle)))
    start = info["state"]
    for step in range(25):
        target = 130.0 + 8.0 * step, 260.0 + step
        *_, info = env.step(np.array(target))
        world.step(*target)
        state = world.state()
        found = [state.x, state.y, *state.block]
        np.testing.assert_allclose(found, info["state"], atol=1e-6)
    assert np.linalg.norm(info["state"][2:4] - start[2:4]) > 20.0


@pytest.mark.parametrize("seed", range(20))
def test_routes_go_around_the_block(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pose = Pose(*rng.uniform(180.0, 330.0, 2), rng.uniform(-np.pi, np.pi))
    ring = Ring(45.0)
    start, entry = outline_at(pose, ring.at(rng.uniform(0.0, ring.length, 2)))
    inward = ring.inward(ring.locate(to_body(pose, entry))) + pose.angle
    contact = entry + 25.0 * np.array([np.cos(inward), np.sin(inward)])
    path = route(start, entry, contact, pose)
    assert path is not None
    np.testing.assert_allclose(path[[0, -1]], [start, contact], atol=1e-9)
    assert np.linalg.norm(np.diff(path, axis=0), axis=1).max() < 9.0
    # The path ends at the contact; until then the agent stays clear of the block.
    assert clearance(path, pose).min() > AGENT_RADIUS


def test_push_starts_under_way() -> None:
    world = World()
    push = Push(100.0, 120.0, 0.5, 0.0)
    target = start_push(world, push, Pose(300.0, 300.0, 0.0), 8.0)
    before = world.state()
    for step in range(1, 6):
        at = target + 8.0 * step * np.array([np.cos(0.5), np.sin(0.5)])
        world.step(*at)
    after = world.state()
    moved = np.hypot(after.x - before.x, after.y - before.y)
    assert moved == pytest.approx(5 * 8.0, rel=0.03)


def test_a_block_out_of_reach() -> None:
    demonstrator = Demonstrator(np.random.default_rng(0))
    with pytest.raises(NoPushError, match="No push can be made from"):
        demonstrator.act(State(250.0, 250.0, 0.0, 0.0, Pose(-900.0, 250.0, 0.0)))


def test_what_it_does_follows_from_what_it_sees() -> None:
    """From nearly the same state nearly the same push: a choice by chance cannot be imitated."""
    rng = np.random.default_rng(0)
    near = []
    for _ in range(6):
        agent, block = (
            rng.uniform(50.0, 450.0, 2),
            Pose(*rng.uniform(180.0, 330.0, 2), rng.normal()),
        )
        pushes = []
        for shift in (0.0, 0.0, 1.5):
            moved = block._replace(x=block.x + shift, angle=block.angle + 0.01 * shift)
            push = Search(7.5).best(State(*agent, 0.0, 0.0, moved))[0].push
            pushes.append(to_body(moved, np.array([push.x, push.y])))
        np.testing.assert_array_equal(pushes[0], pushes[1])
        near.append(np.linalg.norm(pushes[2] - pushes[0]) < 20.0)
    assert np.mean(near) > 0.8
