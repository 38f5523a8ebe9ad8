"""One-step consistency policies: trained from scratch, scored in simulation, run on a robot.

The public names are resolved on first use, so that `import cmpolicy` alone (a version check, a
command's --help) loads neither torch nor a network library.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cmpolicy.cli.train import compose
    from cmpolicy.experiment.config import DataConfig, TaskConfig, TrainConfig
    from cmpolicy.experiment.evaluate import evaluate
    from cmpolicy.experiment.train import TrainResult, resume, train
    from cmpolicy.export.onnx import OnnxPolicy
    from cmpolicy.image.pipeline import ConsistencyImagePipeline
    from cmpolicy.policy.policy import ConsistencyPolicy
    from cmpolicy.robot.chunker import ActionChunker
    from cmpolicy.robot.loop import ControlLoop
    from cmpolicy.serve.client import RemotePolicy
    from cmpolicy.serve.server import PolicyServer

__version__ = "0.1.0"
__all__ = [
    "ActionChunker",
    "ConsistencyImagePipeline",
    "ConsistencyPolicy",
    "ControlLoop",
    "DataConfig",
    "OnnxPolicy",
    "PolicyServer",
    "RemotePolicy",
    "TaskConfig",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "compose",
    "evaluate",
    "resume",
    "train",
]

_MODULES = {
    "ActionChunker": "cmpolicy.robot.chunker",
    "ConsistencyImagePipeline": "cmpolicy.image.pipeline",
    "ConsistencyPolicy": "cmpolicy.policy.policy",
    "ControlLoop": "cmpolicy.robot.loop",
    "DataConfig": "cmpolicy.experiment.config",
    "OnnxPolicy": "cmpolicy.export.onnx",
    "PolicyServer": "cmpolicy.serve.server",
    "RemotePolicy": "cmpolicy.serve.client",
    "TaskConfig": "cmpolicy.experiment.config",
    "TrainConfig": "cmpolicy.experiment.config",
    "TrainResult": "cmpolicy.experiment.train",
    "compose": "cmpolicy.cli.train",
    "evaluate": "cmpolicy.experiment.evaluate",
    "resume": "cmpolicy.experiment.train",
    "train": "cmpolicy.experiment.train",
}


def __getattr__(name: str) -> object:
    """Resolve the lazy exports (PEP 562)."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
