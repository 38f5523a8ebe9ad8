"""A robot for lerobot that has two joints and writes down what it is told; no test itself."""

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

    observation_features: ClassVar = {"a.pos": float, "b.pos": float}
    action_features: ClassVar = observation_features
    is_connected = is_calibrated = True

    def connect(self, calibrate: bool = True) -> None: ...

    def disconnect(self) -> None: ...

    def calibrate(self) -> None: ...

    def configure(self) -> None: ...

    def get_observation(self) -> dict[str, Any]:
        a, b = self.told[-1] if self.told else (0.0, 0.0)
        return {"a.pos": a, "b.pos": b}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        self.told.append([float(action["a.pos"]), float(action["b.pos"])])
        return action
