"""``cmpolicy robot-demo``: drive a simulated robot in real time and film it."""

from __future__ import annotations

from collections.abc import Sequence

from cmpolicy.cli.parse import describe, read
from cmpolicy.experiment.robot_demo import RobotDemoSettings, drive

_HEADER = """\
usage: cmpolicy robot-demo [key=value ...]

Drive the Push-T simulator as a robot: a process of its own that goes on in real time, whether
actions come or not. Prints the report of the control loop and films the run with its plans."""


def help_text(words: Sequence[str]) -> str:
    """All settings."""
    return describe(RobotDemoSettings, _HEADER)


def run(words: Sequence[str]) -> int:
    """Drive; the exit status."""
    return drive(read(RobotDemoSettings, words))
