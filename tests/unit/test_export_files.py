"""OnnxPolicy away from torch, and files that are not what they should be."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cmpolicy.export.onnx import BLANK, SEAL, OnnxPolicy, seal
from cmpolicy.export.pt2 import Pt2Policy
from cmpolicy.export.runtime import KEY, ExportError, ExportFacts, open_exported
from cmpolicy.export.write import export_policy
from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.spec import PolicySpec

SPEC = PolicySpec({"state": (3,)}, action_dim=2, horizon=4, n_obs_steps=2, n_action_steps=2)


@pytest.fixture(scope="module")
def policy() -> ConsistencyPolicy:
    """A tiny one."""
    torch.manual_seed(0)
    net = UNet1DConfig((8,), kernel_size=3, n_groups=4, time_dim=8)
    normalizer = Normalizer.identity({**SPEC.obs, "action": (2,)})
    made = ConsistencyPolicy(SPEC, net, normalizer).eval().requires_grad_(False)
    nn.init.normal_(made.net.head[-1].weight, std=0.3)  # type: ignore[arg-type]
    return made


@pytest.fixture(scope="module")
def good(policy: ConsistencyPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with policy.onnx and policy.pt2."""
    folder = tmp_path_factory.mktemp("good")
    export_policy(policy, folder / "policy.onnx", format="onnx")
    export_policy(policy, folder / "policy.pt2", format="pt2")
    return folder


def test_runs_where_torch_cannot_be_imported(
    policy: ConsistencyPolicy, good: Path, tmp_path: Path
) -> None:
    obs = np.linspace(-1, 1, 6, dtype=np.float32).reshape(1, 2, 3)
    noise = np.linspace(-2, 2, 8, dtype=np.float32).reshape(1, 4, 2)
    np.savez(tmp_path / "in.npz", obs=obs, noise=noise)
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxscript', 'safetensors'):\n"
        "    sys.modules[name] = None\n"  # importing it raises ImportError
        "import numpy as np\n"
        "import cmpolicy\n"
        "from cmpolicy.robot.policy import ChunkPolicy\n"
        "given = np.load('in.npz')\n"
        f"policy = cmpolicy.OnnxPolicy({str(good / 'policy.onnx')!r})\n"
        "assert isinstance(policy, ChunkPolicy)\n"
        "plan = policy.infer_plan({'state': given['obs']}, given['noise'])\n"
        "assert policy.infer({'state': given['obs']}).shape == (1, 2, 2)\n"
        "np.save('out.npy', plan)\n"
        "try:\n"
        "    policy.infer({'other': given['obs']})\n"
        "except ValueError as error:\n"
        "    assert 'missing' in str(error)\n"
        "else:\n"
        "    raise SystemExit('a wrong key was let through')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    want = policy.infer_plan({"state": obs}, noise)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), want, rtol=0, atol=1e-5)


def test_without_onnxruntime(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: ConsistencyPolicy
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install 'cmpolicy\[export\]'"):
        OnnxPolicy(good / "policy.onnx")
    with pytest.raises(ImportError, match=r"needs onnxruntime: pip install 'cmpolicy\[export\]'"):
        export_policy(policy, tmp_path / "policy.onnx", format="onnx")


def test_wrong_places(tmp_path: Path, good: Path) -> None:
    with pytest.raises(FileNotFoundError):
        OnnxPolicy(tmp_path / "none.onnx")
    with pytest.raises(FileNotFoundError):
        Pt2Policy(tmp_path / "none.pt2", trust=True)
    with pytest.raises(ExportError, match="is a directory, expected"):
        OnnxPolicy(tmp_path)
    with pytest.raises(ExportError, match="is a directory, expected"):
        Pt2Policy(tmp_path, trust=True)
    with pytest.raises(ExportError, match=r"ending in \.onnx"):
        open_exported(good / "policy.zip")
    with pytest.raises(ValueError, match="threads=0 must be at least 1"):
        OnnxPolicy(good / "policy.onnx", threads=0)


def test_threads_and_seed(good: Path) -> None:
    obs = {"state": np.zeros((1, 2, 3), np.float32)}
    first, same, other = (
        OnnxPolicy(good / "policy.onnx", n, seed=s) for n, s in [(1, 3), (2, 3), (1, 4)]
    )
    want = first.infer(obs)
    np.testing.assert_allclose(same.infer(obs), want, rtol=0, atol=1e-6)
    assert np.abs(other.infer(obs) - want).max() > 1e-3


def _open(file: Path) -> object:
    return OnnxPolicy(file) if file.suffix == ".onnx" else Pt2Policy(file, trust=True)


class _Payload:
    """What an attacker pickles: code that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.mark, "executed")


def test_a_program_of_somebody_else_is_not_opened(good: Path, tmp_path: Path) -> None:
    """The file is a good one but for its example inputs, which torch unpickles while loading."""
    mark, bad = tmp_path / "mark", tmp_path / "policy.pt2"
    inputs = io.BytesIO()
    torch.save(_Payload(mark), inputs)
    with zipfile.ZipFile(good / "policy.pt2") as old, zipfile.ZipFile(bad, "w") as new:
        for info in old.infolist():
            is_input = "sample_inputs" in info.filename
            new.writestr(info, inputs.getvalue() if is_input else old.read(info))
    for refused in (lambda: Pt2Policy(bad), lambda: open_exported(bad)):
        with pytest.raises(ExportError, match=r"run (any )?code.*trust=True"):
            refused()
    assert not mark.exists()
    with contextlib.suppress(ExportError):  # why the question is asked
        Pt2Policy(bad, trust=True)
    assert mark.read_text() == "executed"


def test_a_model_that_reads_other_files(tmp_path: Path) -> None:
    """Sealed, and by all else a model of cmpolicy: numbers from outside are refused."""
    import onnx

    model = onnx.load_model_from_string(_foreign_model({SEAL: BLANK, KEY: _facts()}))
    outside = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1])
    outside.data_location = onnx.TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="/etc/hostname")
    model.graph.initializer.append(outside)
    onnx.helper.set_model_props(model, {SEAL: BLANK, KEY: _facts()})
    file = tmp_path / "model.onnx"
    file.write_bytes(seal(model.SerializeToString()))
    with pytest.raises(ExportError, match="takes numbers from other files"):
        OnnxPolicy(file)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99, -1])
@pytest.mark.parametrize("name", ["policy.onnx", "policy.pt2"])
def test_cut_short(good: Path, tmp_path: Path, name: str, keep: float) -> None:
    data = (good / name).read_bytes()
    length = int(keep * len(data)) if 0 < keep < 1 else int(keep)
    (tmp_path / name).write_bytes(data[:length])
    with pytest.raises(ExportError, match=r"is not a whole .* copy it again|or is cut short"):
        _open(tmp_path / name)


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_one_flipped_bit_of_a_weight(good: Path, tmp_path: Path, place: float) -> None:
    """Also where the model would still load and run, and give other actions."""
    data = bytearray((good / "policy.onnx").read_bytes())
    data[int(place * len(data))] ^= 1
    (tmp_path / "policy.onnx").write_bytes(data)
    with pytest.raises(ExportError, match="is damaged: its SHA-256 is not the one it holds"):
        OnnxPolicy(tmp_path / "policy.onnx")


def test_a_flipped_bit_of_a_program(good: Path, tmp_path: Path) -> None:
    data = bytearray((good / "policy.pt2").read_bytes())
    with zipfile.ZipFile(good / "policy.pt2") as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data[largest.header_offset + 300] ^= 1
    (tmp_path / "policy.pt2").write_bytes(data)
    with pytest.raises(ExportError, match=r"is not a whole \.pt2 file"):
        Pt2Policy(tmp_path / "policy.pt2", trust=True)


def _foreign_model(metadata: dict[str, str]) -> bytes:
    """A valid ONNX model of somebody else, with these metadata."""
    import onnx
    from onnx import TensorProto, helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.helper.set_model_props(model, metadata)
    data: bytes = model.SerializeToString()
    return seal(data) if SEAL in metadata else data


def _facts(**changes: object) -> str:
    facts = ExportFacts(SPEC, 1, "linear", "flow_map", 1.0, {}, None, None, "0.1.0")
    return json.dumps(json.loads(facts.to_json()) | changes)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "is not a whole ONNX file of cmpolicy"),
        ({KEY: _facts()}, "is not a whole ONNX file of cmpolicy"),
        ({SEAL: BLANK}, "was not exported by cmpolicy"),
        ({SEAL: BLANK, KEY: "{"}, "was not exported by cmpolicy"),
        ({SEAL: BLANK, KEY: "[1]"}, "was not exported by cmpolicy"),
        (
            {SEAL: BLANK, KEY: _facts(format_version=3, cmpolicy="9.1")},
            r"version 3, written by cmpolicy 9\.1; this cmpolicy reads up to 2: upgrade",
        ),
        ({SEAL: BLANK, KEY: _facts(format_version="new")}, "export format version new"),
        ({SEAL: BLANK, KEY: _facts(spec={"obs": {}})}, "metadata is incomplete"),
        ({SEAL: BLANK, KEY: _facts(nfe="many")}, "metadata is incomplete"),
        ({SEAL: BLANK, KEY: _facts()}, r"is damaged: inputs \['x'\], expected"),
    ],
)
def test_foreign_and_newer_models(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(_foreign_model(metadata))
    with pytest.raises(ExportError, match=message) as raised:
        OnnxPolicy(file)
    assert str(file) in str(raised.value)


def test_a_sealed_file_that_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(seal(b"not protobuf at all " + BLANK.encode()))
    with pytest.raises(ExportError, match="onnxruntime cannot load this model"):
        OnnxPolicy(file)


@pytest.mark.parametrize("text", [None, _facts(format_version=7)])
def test_foreign_and_newer_programs(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "program.pt2"
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, file, extra_files={} if text is None else {KEY: text})
    match = "was not exported by cmpolicy" if text is None else "reads up to 2: upgrade"
    with pytest.raises(ExportError, match=match):
        Pt2Policy(file, trust=True)


def test_facts_survive_json() -> None:
    facts = ExportFacts(SPEC, 4, "linear", "diagonal", 0.85, {"m": "0f"}, "mine", 12.5, "0.1.0")
    assert ExportFacts.from_json(facts.to_json(), "x") == facts
