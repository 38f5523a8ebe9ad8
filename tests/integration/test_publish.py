"""cmpolicy publish: the bundle that is handed out, its card and its results."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import cmpolicy
from cmpolicy.cli.main import main as command
from cmpolicy.experiment.evaluate import EvalSettings
from cmpolicy.experiment.scored import open_policy
from cmpolicy.policy.bundle import read_bundle, write_bundle
from cmpolicy.policy.policy import ConsistencyPolicy

OBS = {"agent_pos": np.full((1, 2, 2), 256.0), "keypoint": np.full((1, 2, 9, 2), 256.0)}
NOISE = np.random.default_rng(0).standard_normal((1, 16, 2))


def evaluate(words: Sequence[str]) -> int:
    """``cmpolicy eval``."""
    return command(["eval", *words])


def main(words: Sequence[str]) -> int:
    """``cmpolicy publish``."""
    return command(["publish", *words])


def train(words: Sequence[str]) -> int:
    """``cmpolicy train``."""
    return command(["train", *words])


TINY = ["net=tiny", "net.down_dims=[8,16]", "net.n_groups=4", "net.time_dim=8", "encoder.dim=8"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy of two training steps."""
    run = tmp_path_factory.mktemp("run") / "run"
    words = ["task=pusht", *TINY, "examples=16", "batch_size=8", "optim.warmup=0", f"out={run}"]
    words += ["eval.episodes=0", "eval.windows=8", "log.trackers=[]", "device=cpu"]
    assert train(words) == 0
    return run / "policy"


def test_half_precision_and_results(trained: Path, tmp_path: Path) -> None:
    """The published bundle is scored as it is stored, then completed in place."""
    out, scored = tmp_path / "mine", tmp_path / "scored"
    assert main([f"policy={trained}", f"out={out}"]) == 0
    size = (out / "model.safetensors").stat().st_size
    assert size < 0.6 * (trained / "model.safetensors").stat().st_size
    assert evaluate([f"policy={out}", "seeds=500000-500001", "workers=1", f"out={scored}"]) == 0
    assert main([f"policy={out}", f"out={out}", f"results=[{scored}/result_nfe1.json]"]) == 0
    card = (out / "README.md").read_text()
    assert "## Results" in card
    assert "cmpolicy eval policy=" in card
    assert (out / "results" / "scored_result_nfe1.json").is_file()
    assert read_bundle(out).metadata == read_bundle(trained).metadata
    half, full = (ConsistencyPolicy.from_pretrained(p).infer(OBS, NOISE) for p in (out, trained))
    np.testing.assert_allclose(half, full, atol=0.5)


def test_bad_input(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One message, no traceback, and nothing is written."""
    out = tmp_path / "mine"
    assert main([f"policy={tmp_path / 'none'}", f"out={out}"]) == 2
    assert "no policy bundle" in capsys.readouterr().err
    assert main([f"policy={trained}", f"out={out}", "results=[missing.json]"]) == 2
    assert "missing.json" in capsys.readouterr().err
    assert main([f"policy={trained}", f"out={out}", "weights=int8"]) == 2
    assert "weights" in capsys.readouterr().err
    bare = tmp_path / "bare"
    ConsistencyPolicy.from_pretrained(trained).save_pretrained(bare, metadata={})
    assert main([f"policy={bare}", f"out={out}"]) == 2
    assert "does not say how it was trained" in capsys.readouterr().err
    assert not out.exists()


def test_what_a_policy_tells_of_itself_survives_loading_and_saving(
    trained: Path, tmp_path: Path
) -> None:
    policy = ConsistencyPolicy.from_pretrained(trained)
    policy.save_pretrained(tmp_path / "again")
    assert read_bundle(tmp_path / "again").metadata == read_bundle(trained).metadata != {}
    assert main([f"policy={tmp_path / 'again'}", f"out={tmp_path / 'mine'}"]) == 0
    result = cmpolicy.evaluate(policy, seeds=[500_000])  # its own protocol
    assert (result.protocol, result.data) == ("pusht-dp", read_bundle(trained).metadata["data"])


def test_evaluations_that_the_sampler_cannot_do_are_not_published(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bundle(replace(read_bundle(trained), sampler="regression"), tmp_path / "one")
    before = (tmp_path / "one/config.json").read_bytes()
    assert main([f"policy={tmp_path / 'one'}", f"out={tmp_path / 'one'}", "nfe=4"]) == 2
    assert "exactly 1" in capsys.readouterr().err
    assert (tmp_path / "one/config.json").read_bytes() == before


def test_results_of_the_same_name_are_all_kept(trained: Path, tmp_path: Path) -> None:
    files = [tmp_path / run / "eval/result_nfe1.json" for run in ("a", "b")]
    for file in files:
        cmpolicy.evaluate(str(trained), seeds=[500_000], name=file.parts[-3], out=file.parent)
    listed = ",".join(map(str, files))
    assert main([f"policy={trained}", f"out={tmp_path / 'mine'}", f"results=[{listed}]"]) == 0
    names = sorted(p.name for p in (tmp_path / "mine/results").iterdir())
    assert names == ["a_eval_result_nfe1.json", "b_eval_result_nfe1.json"]


def test_noise_scale_travels(trained: Path, tmp_path: Path) -> None:
    """It is stored, and multiplies the noise of every sample."""
    out = tmp_path / "mine"
    assert main([f"policy={trained}", f"out={out}", "weights=fp32", "noise_scale=0.5"]) == 0
    scaled, plain = (ConsistencyPolicy.from_pretrained(p) for p in (out, trained))
    assert (scaled.noise_scale, plain.noise_scale) == (0.5, 1.0)
    np.testing.assert_array_equal(scaled.infer(OBS, NOISE), plain.infer(OBS, NOISE * 0.5))
    assert np.abs(scaled.infer(OBS, NOISE) - plain.infer(OBS, NOISE)).max() > 1e-3


def test_policies_may_plan_more_often(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`n_action_steps` of eval and publish: the same plans, of which less is executed."""
    out = tmp_path / "mine"
    assert main([f"policy={trained}", f"out={out}", "weights=fp32", "n_action_steps=2"]) == 0
    often, plain = (ConsistencyPolicy.from_pretrained(p) for p in (out, trained))
    assert (often.n_action_steps, plain.n_action_steps) == (2, 8)
    np.testing.assert_array_equal(often.infer(OBS, NOISE), plain.infer(OBS, NOISE)[:, :2])
    scored = open_policy(EvalSettings(policy=str(trained), n_action_steps=2))
    assert (scored.policy.n_action_steps, scored.label) == (2, f"{trained} [steps 2]")
    assert cmpolicy.evaluate(str(trained), seeds=[500_000], n_action_steps=2).seeds == (500_000,)
    capsys.readouterr()
    assert main([f"policy={trained}", f"out={tmp_path / 'new'}", "n_action_steps=16"]) == 2
    assert "lower n_action_steps=16" in capsys.readouterr().err
    assert evaluate([f"policy={trained}", "n_action_steps=0", f"out={tmp_path / 'new'}"]) == 2
    assert "n_action_steps=0 must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_noise_scale_must_be_positive(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By both commands that take it, before anything is loaded or written."""
    assert main([f"policy={trained}", f"out={tmp_path / 'mine'}", "noise_scale=0"]) == 2
    assert evaluate([f"policy={trained}", "noise_scale=-1", f"out={tmp_path / 'scored'}"]) == 2
    assert capsys.readouterr().err.count("must be above 0") == 2
    assert not (tmp_path / "mine").exists()
