"""``cmpolicy <verb> [key=value ...]``: the one command, and the one place that reports errors.

A verb is a module of ``cmpolicy.cli`` with ``run(words) -> int``, which does the work and returns
the exit status, and ``help_text(words) -> str``. What a user can get wrong is raised as ValueError,
OSError or ImportError with a message for people; an exception class whose ``exit_status`` is 1
says that the work itself failed.

Exit status, of every verb: 0 done; 1 the work failed (a run, an environment, a robot; what was
saved before is kept); 2 bad settings, data or files; 130 stopped by Ctrl-C, 143 by SIGTERM, 141 by
the end of the program that read its output.
"""

from __future__ import annotations

import os
import select
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from cmpolicy.cli.plugins import load_plugins

#: Verb: its module in ``cmpolicy.cli`` and what ``cmpolicy --help`` says of it.
VERBS: dict[str, tuple[str, str]] = {
    "train": ("train", "train a policy from demonstrations, or continue a run"),
    "eval": ("eval", "score a policy in simulation, or compare result files"),
    "data": ("data", "inspect, validate, generate, download, convert and pack demonstrations"),
    "image": ("image", "train, sample and score one-step image generators"),
    "export": ("export", "write a policy as one ONNX or torch.export file"),
    "serve": ("serve", "serve a policy over WebSocket"),
    "publish": ("publish", "write the bundle to hand out, with its results in the card"),
    "bench": ("bench", "measure steps, latency, rollouts, the control loop and the server"),
    "study": ("study", "train by every objective, and check what is claimed of them"),
    "demo": ("demo", "train a one-step policy in minutes, score it and film it"),
    "robot-demo": ("robot_demo", "drive a simulated robot in real time and film it"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``cmpolicy``; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage(), end="")
        return 0 if words else 2
    verb, *rest = words
    if verb == "--version":
        from cmpolicy import __version__

        print(f"cmpolicy {__version__}")
        return 0
    if verb not in VERBS:
        print(
            f"cmpolicy: unknown command {verb!r}; choose one of {', '.join(VERBS)}",
            file=sys.stderr,
        )
        return 2
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning(verb, warnings.showwarning)
        return _run(verb, rest)


def _run(verb: str, words: list[str]) -> int:
    """Run the verb; errors become one message and an exit status."""
    try:
        load_plugins()
        # imported here, so that --help and a typing error load neither torch nor Hydra
        module = import_module(f"cmpolicy.cli.{VERBS[verb][0]}")
        asked = [word for word in words if word not in ("-h", "--help")]
        if len(asked) < len(words):
            print(module.help_text(asked).rstrip(), flush=True)
            return 0
        status: int = module.run(words)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f"cmpolicy {verb}: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141
        status = getattr(error, "exit_status", 0)
        if not status and not isinstance(error, ValueError | OSError | ImportError):
            raise  # a defect of ours: its traceback is what a report needs
        notes = getattr(error, "__notes__", [])
        text = "\n".join([f"cmpolicy {verb}: {error}", *notes])
        print(_printable(text), file=sys.stderr)
        return status or 2


def _nobody_reads() -> bool:
    """Whether the program that read the output has ended, as ``| head`` does."""
    output = select.poll()
    output.register(sys.stdout, select.POLLOUT)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False  # the pipe of something else
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    return True


def _printable(text: str) -> str:
    """A message with what it quotes of files: that may not steer the terminal."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def _show_warning(verb: str, otherwise: Any) -> Any:
    """Warnings that are for users, in one line; others as Python shows them."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, UserWarning):
            print(f"cmpolicy {verb}: warning: {message}", file=sys.stderr)
        else:
            otherwise(message, category, *place, **more)

    return show


def _usage() -> str:
    lines = [f"  {verb:<12}{summary}" for verb, (_, summary) in VERBS.items()]
    return (
        "usage: cmpolicy COMMAND [key=value ...]\n\n"
        "One-step policies for robots: train, score, run.\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\n`cmpolicy COMMAND --help` says what a command takes.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
