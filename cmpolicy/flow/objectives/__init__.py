"""Training objectives: one frozen dataclass of settings each.

To add one: write the class in a file of its own and decorate it with ``@register("name")``.
``objective=name`` then chooses it, once its module is imported (below, or by ``CMPOLICY_PLUGINS``:
see cmpolicy/training/README.md).
"""

from cmpolicy.flow.objectives.consistency import ConsistencyTraining, DiscreteConsistencyTraining
from cmpolicy.flow.objectives.ddpm import Ddpm
from cmpolicy.flow.objectives.fm import FlowMatching
from cmpolicy.flow.objectives.isd import Isd
from cmpolicy.flow.objectives.mean_flow import AlphaFlow, ImprovedMeanFlow, MeanFlow
from cmpolicy.flow.objectives.objective import (
    OBJECTIVES,
    Draws,
    Examples,
    LossOutput,
    Objective,
    VelocityTarget,
    build_objective,
    register,
)
from cmpolicy.flow.objectives.regression import MinimalIterativePolicy, Regression
from cmpolicy.flow.objectives.self_distillation import (
    EulerianSelfDistillation,
    LagrangianSelfDistillation,
    ProgressiveSelfDistillation,
)

__all__ = [
    "OBJECTIVES",
    "AlphaFlow",
    "ConsistencyTraining",
    "Ddpm",
    "DiscreteConsistencyTraining",
    "Draws",
    "EulerianSelfDistillation",
    "Examples",
    "FlowMatching",
    "ImprovedMeanFlow",
    "Isd",
    "LagrangianSelfDistillation",
    "LossOutput",
    "MeanFlow",
    "MinimalIterativePolicy",
    "Objective",
    "ProgressiveSelfDistillation",
    "Regression",
    "VelocityTarget",
    "build_objective",
    "register",
]
