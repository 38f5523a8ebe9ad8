"""The header of a model card, which the hub's search goes by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def with_header(card: str, metadata: Mapping[str, Any], library: str = "cmpolicy") -> str:
    """A card with a YAML header: library, task, tags, and the data set if the hub has it.

    Args:
        card: text of the card; one that has a header already stays as it is.
        metadata: of the bundle; the data set's id is looked for where ``cmpolicy train`` notes it.
        library: whose ``from_pretrained`` loads the folder, ``cmpolicy`` or ``lerobot``.
    """
    from huggingface_hub import ModelCardData

    if card.startswith("---"):
        return card
    data = (metadata.get("config") or {}).get("data") or {}
    repo_id = data.get("repo_id")
    on_the_hub = isinstance(repo_id, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id)
    header = ModelCardData(
        library_name=library,
        pipeline_tag="robotics",
        tags=list(dict.fromkeys(["robotics", library, "cmpolicy"])),
        datasets=repo_id if on_the_hub else None,
    )
    return f"---\n{header.to_yaml()}\n---\n{card}"
