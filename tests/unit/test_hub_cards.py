"""The cards of policies and data sets, as the hub's own library reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import DatasetCard, ModelCard
from huggingface_hub.utils import validate_repo_id

from cmpolicy.policy.card import with_header
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy_data import ReplayBuffer


def test_a_policy_is_found_by_the_hubs_search():
    """Library, task and tags are the words that the hub filters by."""
    metadata = {"config": {"data": {"repo_id": "lerobot/pusht"}}}
    data = ModelCard(with_header("# Mine\n", metadata)).data
    assert (data.library_name, data.pipeline_tag) == ("cmpolicy", "robotics")
    assert data.tags == ["robotics", "cmpolicy"]
    assert data.datasets == "lerobot/pusht"
    validate_repo_id(data.datasets)


def test_a_checkpoint_of_lerobots_says_so():
    data = ModelCard(with_header("# Mine\n", {}, "lerobot")).data
    assert (data.library_name, data.tags) == ("lerobot", ["robotics", "lerobot", "cmpolicy"])
    assert data.datasets is None


@pytest.mark.parametrize("repo_id", [None, "/home/me/data", "data", 3])
def test_only_data_of_the_hub_is_named(repo_id: object):
    card = with_header("# Mine\n", {"config": {"data": {"repo_id": repo_id}}})
    assert ModelCard(card).data.datasets is None
    assert "me/data" not in card


def test_a_header_of_ones_own_stays():
    card = "---\nlicense: mit\n---\n# Mine\n"
    assert with_header(card, {}) == card
    text = ModelCard(with_header("# Mine\n\ntext\n", {})).text
    assert text == "# Mine\n\ntext\n"


@pytest.mark.parametrize("license", [None, "cc-by-4.0"])
def test_a_data_set_has_lerobots_tags_and_files(tmp_path: Path, license: str | None):
    """The files that the header names are those that hold the rows."""
    pytest.importorskip("pyarrow")
    from cmpolicy_data.convert.lerobot.writing import write

    buffer = ReplayBuffer.create(tmp_path / "x.zarr", attrs={"robot_type": "so101"})
    rows = np.ones((5, 2), np.float32)
    buffer.append_episode({"state": rows, "action": rows})
    write(buffer.path, tmp_path / "d", task="lift: a \x1b[31mcube", fps=10, license=license)
    card = DatasetCard.load(tmp_path / "d" / "README.md")
    assert card.data.license == license
    assert card.data.task_categories == ["robotics"]
    assert card.data.tags == ["LeRobot", "so101"]
    (config,) = card.data.to_dict()["configs"]
    assert config["config_name"] == "default"
    files = list((tmp_path / "d").glob(config["data_files"]))
    assert files == [tmp_path / "d/data/chunk-000/file-000.parquet"]
    assert "1 episodes, 5 steps at 10 per second" in card.text
    assert "- lift: a \\x1b[31mcube" in card.text


def test_every_bundle_that_is_written_has_the_header(tmp_path: Path):
    """So one that ``push_to_hub`` uploads has it."""
    policy = ConsistencyPolicy.from_pretrained("pusht")
    policy.save_pretrained(tmp_path / "mine", metadata={"config": {"data": {"repo_id": "me/arm"}}})
    data = ModelCard.load(tmp_path / "mine/README.md").data
    assert (data.library_name, data.pipeline_tag, data.datasets) == (
        "cmpolicy",
        "robotics",
        "me/arm",
    )
