"""Statistics that one glitch cannot fool, and findings about data that only looks healthy."""

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from cmpolicy_data import ReplayBuffer
from cmpolicy_data.report import decision_steps, examine, examine_store, table
from cmpolicy_data.statistics import KeyStatistics
from cmpolicy_data.windows import window_index

RNG = np.random.default_rng(0)
ENDS = np.arange(60, 601, 60)
N = 600


def smooth(columns: int = 2) -> np.ndarray:
    return np.sin(np.linspace(0, 30, N)[:, None] + np.arange(columns))


def messages(ends: np.ndarray = ENDS, **values: np.ndarray) -> str:
    return "\n".join(map(str, examine(values, ends)))


class TestStatistics:
    def test_a_glitch_does_not_set_the_range(self) -> None:
        values = smooth()
        values[123, 0], values[400, 1] = 5000, -3000
        statistics = KeyStatistics.of(values)
        assert statistics.maximum[0] == 5000
        np.testing.assert_allclose(statistics.low, [-1, -1], atol=0.01)
        np.testing.assert_allclose(statistics.high, [1, 1], atol=0.01)
        assert statistics.n_outliers.tolist() == [1, 1]
        assert abs(statistics.mean[0]) < 0.1  # without the glitch
        for method, high in (("minmax", 5000), ("auto", 1), ("quantile", 1)):
            assert statistics.span(method)[1][0] == pytest.approx(high, rel=0.01)
        low, high = statistics.span("gaussian")
        np.testing.assert_allclose((high - low) / 2, statistics.std)

    @given(st.integers(0, 2**32 - 1), st.floats(-1e6, 1e6), st.floats(1e-3, 1e3))
    @settings(max_examples=30, deadline=None)
    def test_without_outliers_the_range_is_that_of_all_values(
        self, seed: int, shift: float, scale: float
    ) -> None:
        values = shift + scale * np.random.default_rng(seed).uniform(-1, 1, (200, 3))
        statistics = KeyStatistics.of(values)
        np.testing.assert_array_equal(statistics.low, values.min(axis=0))
        np.testing.assert_array_equal(statistics.high, values.max(axis=0))
        np.testing.assert_allclose(statistics.mean, values.mean(axis=0))

    @pytest.mark.parametrize("noise", [0.0, 1e-4])
    def test_percentiles_do_not_lose_a_trigger_that_is_seldom_pressed(self, noise: float) -> None:
        values = noise * RNG.normal(size=(N, 2))
        values[300:304, 0] = 1
        values[:, 1] = np.sin(np.arange(N))
        low, high = KeyStatistics.of(values).span("quantile")
        np.testing.assert_allclose([low[0], high[0]], [0, 1], atol=0.01)
        np.testing.assert_array_equal([low[1], high[1]], np.percentile(values[:, 1], (1, 99)))
        assert "=quantile" not in messages(values=values)  # which would not scale it

    def test_a_switch_that_is_seldom_pressed_is_no_outlier(self) -> None:
        values = np.zeros((N, 1))
        values[300] = 1
        statistics = KeyStatistics.of(values)
        assert (statistics.low[0], statistics.high[0]) == (0, 1)
        assert statistics.n_outliers[0] == 0

    def test_many_far_values_are_no_outliers(self) -> None:
        values = RNG.normal(0, 0.01, (N, 1))
        values[::50] = 1  # bursts in one step of fifty
        assert KeyStatistics.of(values).high[0] == 1

    def test_few_steps(self) -> None:
        statistics = KeyStatistics.of(np.array([[0.0], [1000.0], [1.0]]))
        assert (statistics.low[0], statistics.high[0]) == (0, 1000)

    def test_keys_of_any_shape(self) -> None:
        values = RNG.normal(size=(N, 4, 3))
        statistics = KeyStatistics.of(values)
        assert statistics.low.shape == statistics.std.shape == (4, 3)
        assert statistics.percentiles.shape == (5, 4, 3)


class TestFindings:
    def test_healthy_data_gives_none(self) -> None:
        assert messages(state=smooth(), action=smooth(3)) == ""

    def test_outliers_name_key_column_episode_step_and_setting(self) -> None:
        action = smooth()
        action[130, 1] = 5000
        text = messages(action=action)
        assert "action[1]: 5000 in episode 2, step 10, is out of all bounds" in text
        assert "data.normalize.action=minmax" in text

    def test_single_precision(self) -> None:
        assert messages(gps=smooth() * 2 + 5_400.0) == ""
        assert messages(gps=smooth() * 0.01 + 5_400_000.0) == ""  # stays float64 in training
        text = messages(gps=(smooth() * 0.5 + 5_400_000.0).astype(np.float32))
        assert "gps[0]: values around 5.4e+06 differ by at most 1, and single precision" in text
        assert "relative to a fixed value" in text

    def test_a_clock(self) -> None:
        unix = 1.7e9 + np.arange(N)[:, None] * 3600.0
        assert "state[0]: looks like a clock" in messages(state=unix)
        assert "looks like a clock" in messages(state=1.7e9 + np.arange(N)[:, None] * 0.1)
        ticks = (1.7e9 + np.arange(N)[:, None] * 3.0).astype(np.float32)
        assert "It looks like a clock" in messages(state=ticks)

    def test_angles_that_wrap(self) -> None:
        turns = np.linspace(0, 40, N)[:, None]
        wrapped = (turns + np.pi) % (2 * np.pi) - np.pi
        assert "angle in radians that jumps by a turn" in messages(state=wrapped)
        assert "angle in degrees that jumps" in messages(state=np.degrees(wrapped))
        assert "jumps" not in messages(state=np.hstack([np.cos(turns), np.sin(turns)]))

    def test_between_episodes_anything_may_jump(self) -> None:
        sweep = np.tile(np.linspace(-np.pi, np.pi, 60), 10)[:, None]
        assert messages(state=sweep) == ""

    def test_quaternions_that_change_their_sign(self) -> None:
        angle = np.linspace(0, 3, N)
        four = np.stack([np.sin(angle), 0 * angle, 0 * angle, np.cos(angle)], 1)
        assert messages(pose=np.hstack([smooth(3), four])) == ""
        four[250:] *= -1
        text = messages(pose=np.hstack([smooth(3), four]))
        assert "pose[3]: columns 3 to 6 look like a quaternion that changes its sign 1" in text
        assert "in episode 4, step 10" in text

    def test_pauses(self) -> None:
        state, action = smooth(), smooth()
        for values in (state, action):
            values[100:119] = values[100]
        assert messages(state=state, action=action) == ""  # a short one
        for values in (state, action):
            values[300:360] = values[300]
            values[400:419] = values[400]
        text = messages(state=state, action=action)
        assert "16% of the steps repeat the one before" in text
        assert "the longest run is 60 steps in episode 5 from step 0" in text

    def test_most_values_in_a_small_part_of_the_range(self) -> None:
        force = RNG.normal(0, 0.001, (N, 2))
        force[::40, 1] = 1.0
        text = messages(force=force)
        assert "force[1]: nine in ten values lie in" in text
        assert "data.normalize.force=quantile" in text

    def test_a_store_with_a_clock_and_left_out_chunks(self, tmp_path: Path) -> None:
        root = zarr.create_group(tmp_path / "s.zarr")
        times = np.arange(N) * 0.1
        times[250:] += 3.0
        action = smooth()
        action[:60] = 0
        for key, values in (("action", action), ("timestamp", times)):
            array = root.create_array(
                f"data/{key}",
                shape=values.shape,
                chunks=(60, *values.shape[1:]),
                dtype=values.dtype,
            )
            array[...] = values
        root.create_array("meta/episode_ends", shape=ENDS.shape, dtype=ENDS.dtype)[...] = ENDS
        text = "\n".join(map(str, examine_store(tmp_path / "s.zarr")))
        assert (
            "timestamp: 1 steps are not of the usual 0.1, first 3.1 in episode 4, step 10" in text
        )
        assert "action: 1 chunks are not there and are read as 0" in text

    def test_our_bundled_stores(self) -> None:
        from cmpolicy_data import bundled_path

        assert examine_store(bundled_path("lift")) == []


def test_the_table_is_aligned() -> None:
    lines = table({"state": smooth(), "scalar": smooth(1), "wide": smooth(100)})
    assert len({len(line) for line in lines}) == 1
    assert [line.split()[0] for line in lines[1:]] == ["state[0]", "state[1]", "scalar"]


def test_decision_steps() -> None:
    sizes = {"horizon": 64, "n_obs_steps": 2, "n_action_steps": 8}
    windows = window_index(ENDS, **sizes)
    text = decision_steps(ENDS, windows.episode, windows.obs[:, -1])
    assert text == (
        "training decides at 530 of 600 steps (88%), not at the last 7 of each episode, whose "
        "actions were not recorded"
    )


def test_one_dimensional_keys(tmp_path: Path) -> None:
    buffer = ReplayBuffer.create(tmp_path / "s.zarr")
    buffer.append_episode({"action": smooth(), "grip": smooth(1)[:, 0]})
    assert examine_store(buffer.path) == []


def test_frames_in_other_numbers_than_levels(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).random((N, 16, 16, 3), dtype=np.float32)
    buffer = ReplayBuffer.create(tmp_path / "s.zarr")
    whole = np.round(255 * frames)
    first = np.moveaxis(frames, -1, 1)
    buffer.append_episode({"action": smooth(), "unit": frames, "whole": whole, "first": first})
    found = {finding.key: finding for finding in examine_store(buffer.path)}
    assert set(found) == {"unit", "first"}
    assert (found["unit"].episode, found["unit"].step) == (0, 0)
    assert "training with these frames refuses them" in str(found["unit"])
    assert "say data.obs.first={key: first, layout: chw}" in str(found["first"])


def test_findings_that_the_scaling_answers_are_left_out() -> None:
    values = {"state": smooth(), "pose": smooth()}
    values["state"][123, 0] = values["pose"][123, 0] = 5000
    for method, n in (("auto", 1), ("minmax", 0), ("quantile", 0), ("gaussian", 0)):
        found = [f for f in examine(values, ENDS, normalize={"state": method}) if f.key == "state"]
        assert sum("out of all bounds" in f.message for f in found) == n
    (of_target,) = [
        f for f in examine(values, ENDS, normalize={"state": "auto"}) if f.key == "pose"
    ]
    assert "repair them" in of_target.message
    assert "data.normalize" not in of_target.message  # a target has no such setting


def test_signs_of_the_second_arm_too() -> None:
    angle = np.linspace(0, 3, N)
    still = np.stack([np.cos(angle), np.sin(angle), 0 * angle, 0 * angle], axis=1)
    flipped = still * np.where(np.arange(N) < 100, 1, -1)[:, None]
    for arms, column in (([flipped, still], 0), ([still, flipped], 4)):
        found = messages(state=np.concatenate(arms, axis=1))
        assert f"columns {column} to {column + 3} look like a quaternion" in found
