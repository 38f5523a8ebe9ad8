"""From policy to robot: chunking, control loop, safety, policy server and its client.

What a control loop takes is named here; it needs numpy alone.
"""

from cmpolicy.observation import NonFiniteObservationError, ObservationError
from cmpolicy.robot.adapter import LeRobotAdapter
from cmpolicy.robot.chunker import ActionChunker
from cmpolicy.robot.episode import Tick, Timestamps
from cmpolicy.robot.loop import ControlLoop
from cmpolicy.robot.policy import ChunkPolicy
from cmpolicy.robot.report import LoopReport
from cmpolicy.robot.robot import RateMismatchError, Robot, RobotError
from cmpolicy.robot.safety import SafetyLimits
from cmpolicy.robot.schedule import Asynchronous, Synchronous
from cmpolicy.robot.watchdog import HungRobotError

__all__ = [
    "ActionChunker",
    "Asynchronous",
    "ChunkPolicy",
    "ControlLoop",
    "HungRobotError",
    "LeRobotAdapter",
    "LoopReport",
    "NonFiniteObservationError",
    "ObservationError",
    "RateMismatchError",
    "Robot",
    "RobotError",
    "SafetyLimits",
    "Synchronous",
    "Tick",
    "Timestamps",
]
