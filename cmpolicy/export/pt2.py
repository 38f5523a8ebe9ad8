"""An exported policy run by torch: a ``.pt2`` program of ``torch.export``."""

from __future__ import annotations

import threading
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch

from cmpolicy.export.runtime import KEY, Array, ExportedRuntime, ExportError, ExportFacts, Floats


class Pt2Policy(ExportedRuntime):
    """Runs a file of ``cmpolicy export format=pt2`` on the CPU; no cmpolicy network code is needed.

    Keeps the ``ChunkPolicy`` protocol. torch reads parts of a ``.pt2`` file by unpickling and by
    evaluating text, so opening a file from someone else can run any code (CVE-2026-4538). To share
    a policy, use a bundle or an ``.onnx`` file.

    Args:
        path: the ``.pt2`` file.
        trust: has to be true: the caller says that the file is of their own making.
        compiled: let ``torch.compile`` make machine code of the program at its first call: slower
            to start, faster to run; needs a C++ compiler.
        seed: of the noise of calls that bring none.

    Raises:
        FileNotFoundError: no such file.
        ExportError: not trusted, or a foreign, damaged, cut-short or newer file.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        trust: bool = False,
        compiled: bool = False,
        seed: int | None = None,
    ) -> None:
        file = Path(path).expanduser().absolute()
        if trust is not True:
            raise ExportError(
                f"{file} is not opened: loading a .pt2 file can run code that its author put into "
                "it. If you made it yourself, say so: Pt2Policy(path, trust=True); else ask for "
                "the policy bundle or an .onnx file"
            )
        super().__init__(_read_facts(file), seed)
        try:
            with warnings.catch_warnings():  # that the file is mapped read-only: nobody writes
                warnings.simplefilter("ignore")
                module = torch.export.load(file).module()
        except Exception as error:  # of torch's readers, without a common base
            raise ExportError(
                f"{file}: torch {torch.__version__} cannot load this program: {error}; upgrade "
                "torch, or export the policy again"
            ) from error
        self._module = torch.compile(module) if compiled else module
        self._turn = threading.Lock()  # torch's check of the inputs' sizes is for one at a time

    @torch.inference_mode()
    def _run(
        self, obs: Sequence[Array], noise: Floats, warm: Sequence[Array], *, output: int
    ) -> Floats:
        tensors = tuple(
            torch.from_numpy(np.require(value, requirements=["C", "W"])) for value in obs
        )
        others = [torch.from_numpy(value) for value in (noise, *warm)]
        with self._turn:
            result: Floats = self._module(tensors, *others)[output].numpy()
        return result


def _read_facts(file: Path) -> ExportFacts:
    """The text inside, once every record of the file (a zip archive) has its checksum."""
    if file.is_dir():
        raise ExportError(f"{file} is a directory, expected a .pt2 file")
    foreign = (
        f"{file} is not a whole .pt2 file of torch.export ({{}}); copy it again, or make one with "
        "`cmpolicy export policy=<bundle> format=pt2 out=<file>.pt2`"
    )
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            names = [name for name in archive.namelist() if name.endswith(f"/extra/{KEY}")]
            text = archive.read(names[0]).decode() if names else None
    except (zipfile.BadZipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise ExportError(foreign.format(error)) from error
    if damaged is not None:
        raise ExportError(foreign.format(f"its record {damaged} is damaged"))
    return ExportFacts.from_json(text, str(file))
