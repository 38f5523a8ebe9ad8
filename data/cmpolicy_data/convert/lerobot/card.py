"""README.md of a data set, whose YAML header the hub's search and viewer go by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cmpolicy_data.chunks import printable


def data_card(info: Mapping[str, Any], tasks: Sequence[str], license: str | None = None) -> str:
    """The card.

    Args:
        info: what ``meta/info.json`` says. tasks: what the episodes do.
        license: the hub's name of one, such as ``mit``; None says nothing about it.
    """
    from huggingface_hub import DatasetCardData

    header = DatasetCardData(
        license=license,
        task_categories=["robotics"],
        tags=["LeRobot", *([info["robot_type"]] if info["robot_type"] else [])],
        configs=[{"config_name": "default", "data_files": "data/*/*.parquet"}],
    )
    rows = "\n".join(
        f"| `{name}` | {feature['dtype']} | {tuple(feature['shape'])} |"
        for name, feature in info["features"].items()
        if name == "action" or name.startswith("observation.")
    )
    told = "\n".join(f"- {printable(task)}" for task in tasks)
    return f"""---
{header.to_yaml()}
---
# A LeRobot data set

{info["total_episodes"]} episodes, {info["total_frames"]} steps at {info["fps"]:g} per second, in
the layout LeRobotDataset {info["codebase_version"]}. Tasks:

{told}

| feature | type | shape |
|---|---|---|
{rows}
"""
