"""The results tables of README.md and cmpolicy/pretrained/README.md are what the result files give.

A row is found by the cells that name it, so a row that is added, renamed or taken away changes the
list of its table below. Several files are training runs of one recipe and are pooled, as by
``cmpolicy eval report pool=true``.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from cmpolicy.study.objectives import RunScores
from cmpolicy.study.objectives_report import markdown
from cmpolicy_eval.report import runs_table, table
from cmpolicy_eval.result import Result

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "eval/results"
STUDY = RESULTS / "study/objectives"
Row = dict[str, str]


def _runs(name: str) -> list[str]:
    """The files of three training seeds."""
    return [f"pusht/{name.format(seed)}.json" for seed in (0, 1, 2)]


def _pusht(name: str) -> list[str]:
    return [f"pusht/{name}.json"]


ISD, PSD = "isd_seed{}", "psd_seed{}"
SQUARE = [f"square/psd_seed{seed}_ta2_result_nfe1.json" for seed in range(3)]  # the first: `square`
BUNDLED = "psd_seed1"  # the run that is the bundle `pusht`

#: By document and first column of the table: of each row the cells that name it, and its files.
#: No files: a figure of others.
TABLES: dict[tuple[str, str], list[tuple[str, list[str]]]] = {
    ("README.md", "task, demonstrations, episodes"): [
        ("objective=psd, three runs | 1", _runs(f"{PSD}_result_nfe1")),
        ("objective=psd, three runs | 10", _runs(f"{PSD}_result_nfe10")),
        ("the middle one of psd's (pusht) | 1", _pusht(f"{BUNDLED}_result_nfe1")),
        ("iSD, three runs | 1", _runs(f"{ISD}_result_nfe1")),
        ("iSD, three runs | 4", _runs(f"{ISD}_result_nfe4")),
        ("iSD, three runs, along the diagonal | 10", _runs(f"{ISD}_diagonal_result_nfe10")),
        ("flow matching, the same recipe | 10", _pusht("fm_recentred_seed0_result_nfe10")),
        ("objective=psd, three runs | 1", _runs(f"{PSD}_gym_result_nfe1")),
        ("the middle one of psd's (pusht) | 1", _pusht(f"{BUNDLED}_gym_result_nfe1")),
        ("iSD, three runs | 1", _runs(f"{ISD}_gym_result_nfe1")),
        ("psd (pusht_scripted) | 1", _pusht("scripted_result_nfe1")),
        ("psd (pusht_scripted) | 1", _pusht("scripted_gym_result_nfe1")),
        ("iSD (pusht_image) | 1", ["pusht_image/isd_result_nfe1.json"]),
        ("iSD (lift) | 1", ["lift/eval_lift_result_nfe1.json"]),
        ("iSD (not bundled) | 1", ["lift_image/isd_result_nfe1.json"]),
        ("objective=psd (not bundled) | 1", ["can_image/psd_result_nfe1.json"]),
        ("iSD (can) | 1", ["can/eval_can_result_nfe1.json"]),
        ("objective=psd, three runs | 1", SQUARE),
        ("the middle one of these (square) | 1", SQUARE[:1]),
    ],
    ("cmpolicy/pretrained/README.md", "policy (same network)"): [
        ("objective=psd, three training runs | 1", _runs(f"{PSD}_result_nfe1")),
        ("objective=psd, three runs | 10", _runs(f"{PSD}_result_nfe10")),
        ("the middle one of the psd runs (pusht) | 1", _pusht(f"{BUNDLED}_result_nfe1")),
        ("pusht | 2", _pusht(f"{BUNDLED}_result_nfe2")),
        ("pusht | 10", _pusht(f"{BUNDLED}_result_nfe10")),
        ("pusht, along its diagonal | 10", _pusht(f"{BUNDLED}_diagonal_result_nfe10")),
        ("iSD, three training runs | 1", _runs(f"{ISD}_result_nfe1")),
        ("iSD, three runs | 2", _runs(f"{ISD}_result_nfe2")),
        ("iSD, three runs | 4", _runs(f"{ISD}_result_nfe4")),
        ("iSD, three runs | 10", _runs(f"{ISD}_result_nfe10")),
        ("iSD, three runs, along the diagonal | 10", _runs(f"{ISD}_diagonal_result_nfe10")),
        ("flow matching, the same recipe | 10", _pusht("fm_recentred_seed0_result_nfe10")),
        ("iSD, learning rate 1e-3, lowered after 1.01M | 1", _pusht("isd_rate1e3_result_nfe1")),
        ("iSD, the same | 4", _pusht("isd_rate1e3_result_nfe4")),
        ("iSD, the first bundle | 1", _pusht("isd_before_result_nfe1")),
        ("iSD, the first bundle | 4", _pusht("isd_before_result_nfe4")),
        ("flow matching, further from the same start | 10", _pusht("fm_further_result_nfe10")),
        ("flow matching, from scratch | 1", _pusht("fm_result_nfe1")),
        ("flow matching, from scratch | 10", _pusht("fm_result_nfe10")),
        ("flow matching, from scratch, noise scale 0.85 | 10", _pusht("fm_scaled_result_nfe10")),
    ],
    ("cmpolicy/pretrained/README.md", "task"): [
        ("iSD (lift) | 1", ["lift/eval_lift_result_nfe1.json"]),
        ("flow matching | 10", ["lift/fm_result_nfe10.json"]),
        ("iSD (can) | 1", ["can/eval_can_result_nfe1.json"]),
        ("flow matching | 10", ["can/fm_result_nfe10.json"]),
        ("psd, three training runs | 1", SQUARE),
        ("the middle one of these (square) | 1", SQUARE[:1]),
        ("flow matching | 10", ["square/fm_result_nfe10.json"]),
    ],
    ("cmpolicy/pretrained/README.md", "policy"): [
        ("iSD (pusht_image) | 1", ["pusht_image/isd_result_nfe1.json"]),
        ("iSD (pusht_image) | 4", ["pusht_image/isd_result_nfe4.json"]),
        (
            "iSD (pusht_image), along its diagonal | 10",
            ["pusht_image/isd_diagonal_result_nfe10.json"],
        ),
        ("flow matching, the same recipe | 10", ["pusht_image/fm_result_nfe10.json"]),
        ("published, one evaluation: DOT, gym-pusht's resets | 1", []),
        ("published, one evaluation: drifting | 1", []),
    ],
}


def _rows(text: str, first_column: str) -> list[Row]:
    """The rows of the first table whose first column has this name, by column."""
    found: list[list[str]] = []
    for line in re.sub(r"[*`]", "", text).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and (found or cells[0] == first_column):
            found.append(cells)
        elif found:
            break
    head, _, *rows = found
    return [dict(zip(head, row, strict=True)) for row in rows]


@cache
def _given(*files: str) -> Row:
    """The row that ``cmpolicy eval report`` prints of these files."""
    results = [Result.load(RESULTS / file) for file in files]
    (row,) = _rows(table(results) if len(results) == 1 else runs_table(results), "policy")
    return row


def _same(printed: str, given: str) -> bool:
    """Whether the numbers are equal to the last printed digit; a whole number is exact."""
    mine, theirs = (re.findall(r"[+-]?\d*\.?\d+", cell) for cell in (printed, given))
    return len(mine) == len(theirs) and all(
        abs(float(a) - float(b)) < 0.501 * 10.0 ** -(len(a.partition(".")[2]) or 3)
        for a, b in zip(mine, theirs, strict=True)
    )


@pytest.mark.parametrize(("document", "first_column"), TABLES)
def test_tables_say_what_the_result_files_say(document: str, first_column: str) -> None:
    rows = _rows((ROOT / document).read_text(encoding="utf-8"), first_column)
    expected = TABLES[document, first_column]
    names = [f"{row.get('policy', row[first_column])} | {row['evaluations']}" for row in rows]
    assert names == [name for name, _ in expected], "change the list above with the table"
    for row, (name, files) in zip(rows, expected, strict=True):
        given = _given(*files) if files else row
        assert row["evaluations"] == given["evaluations"], name
        for column in ("score", "success"):
            if row.get(column):
                assert _same(row[column], given[column]), (
                    f"{document}, {name}: {column} {row[column]}, but {given[column]} in {files}"
                )


def test_the_search_says_what_its_files_say() -> None:
    recipe = ROOT / "cmpolicy/pretrained/pusht/RECIPE.md"
    rows = _rows(recipe.read_text(encoding="utf-8"), "change")
    files = {row["file"]: f"pusht/search/{row['file']}_result_nfe1.json" for row in rows}
    kept = {f"pusht/search/{path.name}" for path in (RESULTS / "pusht/search").glob("*.json")}
    assert set(files.values()) == kept
    for row in rows:
        given = _given(files[row["file"]])
        for column in ("score", "success"):
            assert _same(row[column], given[column]), f"{row['file']}: {row[column]}, not {given}"


def test_the_table_of_objectives_says_what_the_study_says() -> None:
    study = markdown([RunScores.load(path) for path in sorted((STUDY / "results").iterdir())])
    kept = (STUDY / "table.md").read_text(encoding="utf-8")
    tables = [[x for x in text.splitlines() if x.startswith("|")] for text in (study, kept)]
    assert tables[0] == tables[1]
    scores = {row["objective"]: row for row in _rows(kept, "objective")}
    less = {
        row["objective"].split()[0]: row["score"]
        for row in _rows(kept.partition("paired by")[2], "objective")
    }
    rows = _rows((ROOT / "README.md").read_text(encoding="utf-8"), "objective")
    assert len(rows) == len(scores)
    for row in rows:
        name = re.split(r"\W", row["objective"])[0]
        fewest = "2 evaluations" if name == "mip" else "1 evaluation"
        pairs = {
            "1 evaluation": scores[name][fewest].partition("/")[2],
            "less isd, paired": less.get(name, ""),
            "10 evaluations": scores[name]["10 evaluations"].partition("/")[2],
        }
        for column, given in pairs.items():
            given = re.sub(r"\(ddim\)", "", given)
            assert _same(row[column], given), f"{name}: {column} {row[column]}, but {given}"
