"""Training objectives: one frozen dataclass of settings each.

To add one: write the class in a file of its own here, decorate it with ``@register("name")``,
import it below, and add a YAML of that name to ``conf/cmpolicy_conf/objective/``.
"""

from cmpolicy.flow.objectives.fm import FlowMatching
from cmpolicy.flow.objectives.isd import Isd
from cmpolicy.flow.objectives.objective import (
    OBJECTIVES,
    Draws,
    LossOutput,
    Objective,
    VelocityTarget,
    build_objective,
    register,
)

__all__ = [
    "OBJECTIVES",
    "Draws",
    "FlowMatching",
    "Isd",
    "LossOutput",
    "Objective",
    "VelocityTarget",
    "build_objective",
    "register",
]
