"""``cmpolicy study stability``: what is stable and what one-step maps learn, with ground truth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cmpolicy.files import only_writer
from cmpolicy.schema import ConfigError, at_least
from cmpolicy.study.folder import claim_folder, read_results, run_jobs
from cmpolicy.study.jobs import SIZES, jobs_of


@dataclass(frozen=True)
class StabilitySettings:
    """Of the study.

    Args:
        size: ``quick`` (minutes, a look) or ``standard`` (what the results are from).
        out: the study folder; a study that was stopped goes on from there.
        workers: jobs side by side, one core each.
    """

    size: str = "standard"
    out: str = "outputs/study"
    workers: int = 2

    def __post_init__(self) -> None:
        at_least("workers", self.workers, 1)
        if self.size not in SIZES:
            raise ConfigError(f"size={self.size!r} is not one of {', '.join(SIZES)}")


def run_stability(settings: StabilitySettings, command: str) -> Path:
    """Run what is left of the study, and write its tables, figures and page; the page's path.

    Raises:
        ConfigError: the folder holds another study.
        InUseError: another process works on it.
        WriteError: the disk is full or not writable.
    """
    from cmpolicy.study.stability_report import write_report

    folder, jobs = Path(settings.out), jobs_of(settings.size)
    with only_writer(folder, "the study folder"):
        claim_folder(folder, settings.size, jobs)
        run_jobs(folder, settings.size, jobs, settings.workers)
        return write_report(folder, read_results(folder, jobs), command)
