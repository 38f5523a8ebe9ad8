"""An exported policy run by onnxruntime: numpy and onnxruntime alone, no torch.

A file holds a checksum of itself, so that a damaged model is never run: ``cmpolicy-seal:`` and 64
hexadecimal digits, the SHA-256 of the file with zeros in their place. Reading it back needs neither
onnx nor protobuf. The checksum finds damage; it does not tell who made a file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from cmpolicy.export.runtime import (
    ACTIONS,
    KEY,
    NOISE,
    PLAN,
    WARM,
    Array,
    ExportedRuntime,
    ExportError,
    ExportFacts,
    Floats,
    input_name,
)
from cmpolicy.schema import at_least

#: Name of the metadata property that holds the seal, and what its value begins with.
SEAL = "cmpolicy-seal"
_MARK = f"{SEAL}:".encode()
_DIGITS = 64
#: The value to serialise with, before the digest is known.
BLANK = f"{SEAL}:{'0' * _DIGITS}"
#: How protobuf writes the key of a tensor whose numbers are in another file.
_EXTERNAL = b"\x0a\x08location\x12"


class OnnxPolicy(ExportedRuntime):
    """Runs a file of ``cmpolicy export format=onnx`` on the CPU.

    Keeps the ``ChunkPolicy`` protocol, so it stands wherever a ``ConsistencyPolicy`` does: in a
    control loop, a server, an evaluation.

    Args:
        path: the ``.onnx`` file.
        threads: of onnxruntime. Two are faster by a third where a second core is idle all the time,
            and slower by far where it is not; one leaves the other cores to the robot.
        seed: of the noise of calls that bring none.

    Raises:
        ImportError: onnxruntime is not installed.
        FileNotFoundError: no such file.
        ExportError: a foreign, damaged, cut-short or newer file.
        ValueError: ``threads`` below 1.
    """

    def __init__(
        self, path: str | PathLike[str], threads: int = 1, *, seed: int | None = None
    ) -> None:
        file = Path(path).expanduser().absolute()
        at_least("threads", threads, 1)
        session = _open(file, threads)
        facts = ExportFacts.from_json(
            session.get_modelmeta().custom_metadata_map.get(KEY), str(file)
        )
        super().__init__(facts, seed)
        self._session = session
        warm = () if facts.warm_start is None else WARM
        self._names = [*map(input_name, facts.spec.obs), NOISE, *warm]
        self._outputs = [[ACTIONS], [PLAN]]
        found = [value.name for value in session.get_inputs()]
        if sorted(found) != sorted(self._names):
            raise ExportError(f"{file} is damaged: inputs {found}, expected {self._names}")

    def _run(
        self, obs: Sequence[Array], noise: Floats, warm: Sequence[Array], *, output: int
    ) -> Floats:
        feeds = dict(zip(self._names, [*obs, noise, *warm], strict=True))
        # a session may run in several threads at once, and lets go of Python's lock meanwhile
        result: Floats = np.asarray(self._session.run(self._outputs[output], feeds)[0])
        return result


def _open(file: Path, threads: int) -> Any:
    """The session, once the file is known to be whole."""
    data = _read(file)
    check_seal(data, str(file))
    if _EXTERNAL in data:
        raise ExportError(
            f"{file} takes numbers from other files, which no file of `cmpolicy export` does; make "
            "one with `cmpolicy export policy=<bundle> out=<file>.onnx`"
        )
    try:
        return open_session(data, threads)
    except ImportError:
        raise
    except Exception as error:  # onnxruntime's own share no other base
        raise ExportError(
            f"{file}: onnxruntime cannot load this model: {error}; upgrade onnxruntime, or export "
            "the policy again"
        ) from error


def open_session(model: bytes, threads: int) -> Any:
    """A session for one short call after another on the CPU.

    Raises:
        ImportError: onnxruntime is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ImportError(
            "running an ONNX policy needs onnxruntime: pip install 'cmpolicy[export]'"
        ) from error
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1  # the graph is a chain: nothing to run side by side
    # One thread has nobody to wait for. Several gain only where those that wait for the next of 300
    # short operations spin (asleep they are slower than one), and they stop spinning with the call:
    # between two calls the cores are the robot's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3  # errors: warnings are about folding that ORT decided against
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _read(file: Path) -> bytes:
    if file.is_dir():
        raise ExportError(
            f"{file} is a directory, expected an .onnx file; a policy bundle is exported with "
            "`cmpolicy export policy=<bundle> format=onnx out=<file>.onnx`"
        )
    return file.read_bytes()


def seal(data: bytes) -> bytes:
    """``data``, which holds :data:`BLANK` once, with the digest filled in."""
    start = data.rindex(BLANK.encode()) + len(_MARK)
    return data[:start] + _digest(data, start) + data[start + _DIGITS :]


def check_seal(data: bytes, file: str) -> None:
    """Raise ExportError where the file holds no seal, or another one than its content asks for."""
    start = data.rfind(_MARK) + len(_MARK)
    found = data[start : start + _DIGITS]
    if start < len(_MARK) or not re.fullmatch(rb"[0-9a-f]{64}", found):
        raise ExportError(
            f"{file} ({len(data)} bytes) is not a whole ONNX file of cmpolicy: it holds no "
            f"{SEAL!r}, so it was made by something else or is cut short; copy it again, or make "
            "one with `cmpolicy export policy=<bundle> format=onnx out=<file>.onnx`"
        )
    if found != _digest(data, start):
        raise ExportError(
            f"{file} is damaged: its SHA-256 is not the one it holds; copy it again, or export the "
            "policy again"
        )


def _digest(data: bytes, start: int) -> bytes:
    view = memoryview(data)
    digest = hashlib.sha256(view[:start])
    digest.update(b"0" * _DIGITS)
    digest.update(view[start + _DIGITS :])
    return digest.hexdigest().encode()
