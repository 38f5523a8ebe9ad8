"""A checksum inside the file that it covers, so that a damaged ONNX model is never run.

The model holds ``cmpolicy-seal:`` and 64 hexadecimal digits: the SHA-256 of the file with zeros in
their place. Reading it back needs neither onnx nor protobuf.
"""

from __future__ import annotations

import hashlib
import re

from cmpolicy.export.facts import ExportError

#: Name of the metadata property that holds the seal, and what its value begins with.
SEAL = "cmpolicy-seal"
_MARK = f"{SEAL}:".encode()
_DIGITS = 64
#: The value to serialise with, before the digest is known.
BLANK = f"{SEAL}:{'0' * _DIGITS}"


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
