"""A robot for lerobot that has two joints and writes down what it is told; no test itself.

Its name is one that lerobot's commands import where it is installed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, ClassVar

from lerobot.robots import Robot, RobotConfig


@RobotConfig.register_subclass("dummy")
@dataclass
class DummyRobotConfig(RobotConfig):
    """No settings; its calibration is in a folder of its own."""

    calibration_dir: Path | None = field(default_factory=lambda: Path(mkdtemp()))


class DummyRobot(Robot):
    """Where it is told to be, it is."""

    config_class = DummyRobotConfig
    name = "dummy"

    def __init__(self, config: DummyRobotConfig) -> None:
        super().__init__(config)
        self.told: list[list[float]] = []
        self.connected = False
        self.cameras: dict[str, Any] = {}

    observation_features: ClassVar = {"a.pos": float, "b.pos": float}
    action_features: ClassVar = observation_features
    is_calibrated = True

    @property
    def is_connected(self) -> bool:
        return self.connected

    def connect(self, calibrate: bool = True) -> None:
        self.connected = True

    def disconnect(self) -> None:
        self.connected = False

    def calibrate(self) -> None: ...

    def configure(self) -> None: ...

    def get_observation(self) -> dict[str, Any]:
        self._check()
        a, b = self.told[-1] if self.told else (0.0, 0.0)
        return {"a.pos": a, "b.pos": b}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        self._check()
        self.told.append([float(action["a.pos"]), float(action["b.pos"])])
        return action

    def _check(self) -> None:
        if not self.connected:
            raise RuntimeError("the robot is not connected")
