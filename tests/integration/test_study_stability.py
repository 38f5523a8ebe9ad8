"""``cmpolicy study stability`` from the command to the page, in its smallest size."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import psutil
import pytest

from cmpolicy.cli.main import main
from cmpolicy.study.figures import FIGURES
from cmpolicy.study.folder import STUDY_VERSION
from cmpolicy.study.jobs import jobs_of
from cmpolicy.study.stability_report import PAGE

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def _study(out: Path, *words: str) -> int:
    return main(["study", "stability", "size=tiny", f"out={out}", "workers=2", *words])


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study") / "out"
    assert _study(out) == 0
    return out


def test_everything_is_written(study: Path) -> None:
    jobs = jobs_of("tiny")
    assert {p.name for p in (study / "jobs").iterdir()} == {job.file for job in jobs}
    told = json.loads((study / "claims.json").read_text())
    assert {c["verdict"] for c in told["claims"]} <= {"supported", "refuted", "unclear"}
    assert {c["figure"] for c in told["claims"]} <= set(FIGURES)
    with (study / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(job.rates) for job in jobs)
    assert {p.stem for p in (study / "figures").iterdir()} == set(FIGURES)


def test_what_is_done_is_not_done_again(study: Path) -> None:
    """A study that was cut off goes on: only the missing job runs, and gives the same again."""
    files = sorted((study / "jobs").iterdir())
    before = {p: p.stat().st_mtime_ns for p in files}
    lost = files[0]
    content = json.loads(lost.read_text())
    lost.unlink()
    page = (study / PAGE).read_text()
    assert _study(study) == 0
    again = json.loads(lost.read_text())
    assert content.pop("seconds") > 0
    again.pop("seconds")
    assert again == content
    assert {p: p.stat().st_mtime_ns for p in files[1:]} == {p: before[p] for p in files[1:]}
    assert re.sub(r"\d+ minutes", "", (study / PAGE).read_text()) == re.sub(
        r"\d+ minutes", "", page
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_study_that_is_stopped_keeps_what_is_done(tmp_path: Path, number: int) -> None:
    """Its workers end with it, and every result is whole."""
    out = tmp_path / "out"
    words = ["study", "stability", "size=tiny", f"out={out}"]
    study = subprocess.Popen(
        [sys.executable, "-m", "cmpolicy", *words],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # a job in the background of a shell hands down that SIGINT is ignored
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        _wait(lambda: any((out / "jobs").glob("*.json")))
        workers = psutil.Process(study.pid).children(recursive=True)
        study.send_signal(number)
        assert study.wait(300) == (130 if number == signal.SIGINT else -number)
        _wait(lambda: not any(map(_is_alive, workers)))
    finally:
        study.kill()
    done = list((out / "jobs").glob("*.json"))
    assert 0 < len(done) < len(jobs_of("tiny"))
    for path in done:
        assert json.loads(path.read_text())["steps"]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it has just ended
        return False


def _wait(condition: Callable[[], bool], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_another_study_is_refused(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label = study / "study.json"
    good = label.read_text()
    try:
        for key, value in (("version", STUDY_VERSION + 1), ("size", "quick"), ("jobs", "0")):
            label.write_text(json.dumps({**json.loads(good), key: value}))
            assert _study(study) == 2
            message = capsys.readouterr().err
            assert "another" in message
            assert "out=" in message
        label.write_text("{")
        assert _study(study) == 2
        assert "damaged" in capsys.readouterr().err
        label.unlink()
        assert _study(study) == 2
        assert "study.json" in capsys.readouterr().err
    finally:
        label.write_text(good)


def test_settings_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "stability", "size=huge", f"out={tmp_path}"]) == 2
    assert "standard" in capsys.readouterr().err
    assert main(["study", "stability", "workers=0"]) == 2
    assert main(["study"]) == 2
    assert main(["study", "stabilty"]) == 2
    assert "stability" in capsys.readouterr().err
    assert main(["study", "stability", "--help"]) == 0
    assert "workers" in capsys.readouterr().out


class _Links(HTMLParser):
    """Everything that a page would fetch, its tags and its images."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]


def test_page_needs_no_network(study: Path) -> None:
    text = (study / PAGE).read_text()
    page = _Links()
    page.feed(text)
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert page.tags.count("img") == len(FIGURES)
    assert not {"script", "iframe", "object", "embed"} & set(page.tags)
    assert "@import" not in text
    assert "url(" not in text
    assert page.tags[-1] != "html"
    anchors = {link[1:] for link in page.links if link.startswith("#")}
    assert all(f'id="{anchor}"' in text for anchor in anchors)


def test_page_in_a_browser(study: Path, tmp_path: Path) -> None:
    """Chromium draws it: every image has a size of its own, and nothing is fetched."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium or Chrome on this machine to open the page with")
    probe = (
        "<script>addEventListener('load', () => { document.title = JSON.stringify({"
        "sizes: [...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight]),"
        "fetched: performance.getEntriesByType('resource').map(e => e.name),"
        "height: document.body.scrollHeight}); });</script>"
    )
    copy = tmp_path / "page.html"
    copy.write_text((study / PAGE).read_text().replace("</body>", f"{probe}</body>"))
    dom = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom", copy.as_uri(),
        ],
        capture_output=True, text=True, timeout=300, check=True,
    ).stdout  # fmt: skip
    found = re.search(r"<title>(\{.*?\})</title>", dom)
    assert found, dom[:500]
    told = json.loads(found[1])
    assert len(told["sizes"]) == len(FIGURES)
    assert all(done and width > 100 and height > 100 for done, width, height in told["sizes"])
    assert [name for name in told["fetched"] if not name.startswith("data:")] == []
    assert told["height"] > 1000
