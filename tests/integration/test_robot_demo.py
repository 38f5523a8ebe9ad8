"""The Push-T simulator as a robot in its own process, and the command that drives it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import pytest
from PIL import Image

from cmpolicy.cli.main import main as command
from cmpolicy_envs.simulated_robot import SimulatedPushT


def main(words: Sequence[str]) -> int:
    """``cmpolicy robot-demo``."""
    return command(["robot-demo", *words])


@pytest.fixture
def robot() -> Iterator[SimulatedPushT]:
    robot = SimulatedPushT(100_003)
    robot.connect()
    yield robot
    robot.disconnect()


def test_it_lives_in_real_time(robot: SimulatedPushT) -> None:
    first = robot.get_observation()
    assert set(first) == {"timestamp", "coverage", "agent_pos", "keypoint", "state"}
    assert first["keypoint"].shape == (9, 2)
    np.testing.assert_allclose(first["agent_pos"], robot.start, atol=1.0)
    assert abs(time.monotonic() - first["timestamp"]) < 5.0  # the same clock
    target = np.array([250.0, 130.0])
    robot.send_action(target)
    distances = []
    for number in range(40):  # nothing more is sent, and it moves on
        time.sleep(0.3)
        distances.append(float(np.linalg.norm(robot.get_observation()["agent_pos"] - target)))
        if number >= 3 and distances[-1] < 3.0:  # later where a busy machine has lost time
            break
    assert distances[-1] < 3.0
    assert distances == sorted(distances, reverse=True) or distances[-1] < 1.0
    later = robot.get_observation()
    assert later["timestamp"] >= first["timestamp"] + 1.0


def test_stop_keeps_it_where_it_is(robot: SimulatedPushT) -> None:
    robot.send_action(np.array([500.0, 500.0]))
    time.sleep(0.2)
    robot.stop()
    time.sleep(1.5)  # the controller swings in
    here = robot.get_observation()["agent_pos"]
    time.sleep(0.3)
    np.testing.assert_allclose(robot.get_observation()["agent_pos"], here, atol=2.0)


def test_what_is_not_there_is_an_error() -> None:
    robot = SimulatedPushT(1)
    with pytest.raises(ConnectionError, match="not connected"):
        robot.get_observation()
    robot.disconnect()  # nothing to do
    robot.connect()
    assert robot._process is not None
    robot._process.kill()
    robot._process.wait()
    with pytest.raises(ConnectionError):
        robot.get_observation()
    robot.disconnect()
    assert not robot.is_connected


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["seconds=2", "delay_ms=120", f"out={out}"]) == 0
    printed = capsys.readouterr().out
    for part in ("seed 100003", "async, 10 Hz", "120 ms added", "stopped by", "best coverage"):
        assert part in printed
    reader: Any = imageio.get_reader(out / "run.mp4")
    frames = [frame for frame in reader]  # noqa: C416  # list() asks for an infinite length
    assert 1 <= len(frames) <= 20
    frame = np.asarray(frames[-1]).astype(int)
    assert frame.shape == (544, 512, 3)
    red = (frame[..., 0] > 180) & (frame[..., 1] < 110) & (frame[..., 2] < 90)
    assert red.sum() > 20  # the plan
    assert Image.open(out / "ticks.png").size == (1200, 720)


@pytest.mark.parametrize("hangs", [False, True])
def test_ctrl_c_ends_the_demo_with_its_report(tmp_path: Path, hangs: bool) -> None:
    """Also where the robot cannot be disconnected."""
    code = (
        "import sys, time; from cmpolicy.cli.main import main\n"
        "from cmpolicy_envs.simulated_robot import SimulatedPushT\n"
        "send = SimulatedPushT.send_action\n"
        "def tell(self, action):\n"
        "    send(self, action); print('sent', flush=True)\n"
        "SimulatedPushT.send_action = tell\n"
        f"{'SimulatedPushT.disconnect = lambda self: time.sleep(60)' if hangs else ''}\n"
        f"sys.exit(main(['robot-demo', 'seconds=600', 'out={tmp_path}']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "sent\n"
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert "stopped by     SIGINT" in printed
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["policy=nowhere/at/all"], "nowhere/at/all"),
        (["seconds=0"], "seconds=0.0 must be above 0"),
        (["seed=-1"], "seed=-1 must be in"),
        (["delay_ms=-1"], "delay_ms=-1.0"),
        (["mode=warp"], "'warp' is not one of sync, async"),
        (["sped=3"], "did you mean 'seed'?"),
        (["30"], "'30' is not a setting"),
    ],
)
def test_bad_input(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "delay_ms=0" in capsys.readouterr().out
