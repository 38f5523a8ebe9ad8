"""``cmpolicy image``: train a one-step image generator, sample it, score it.

Exit status: as the commands' own; 2 for a command that there is not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

_USAGE = """\
usage: cmpolicy image COMMAND [key=value ...]

One-step class-conditional images, by the same flow as the policies.

commands:
  train     a model, from scratch
              dataset=digits|mnist|cifar10|folder preset=quick|standard|gpu objective=isd|fm
              net=... guidance=2 key=value ...; or to go on with a run: resume=outputs/<run>
  sample    a picture of samples
              model=outputs/<run>/model classes=0-9 per_class=8 nfe=1 out=grid.png
  eval      how good the samples are: recognised, distance to real images, variety, copies
              model=outputs/<run>/model nfe=[1,2,4,50] samples=2000 out=outputs/image-eval
            or results that are there, in one table
              report results=[a.json,b.json]

`cmpolicy image COMMAND --help` lists the settings of a command.
"""
_COMMANDS = ("train", "sample", "eval")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``cmpolicy image``; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if words else 2
    command, *rest = words
    # imported here so that --help does not wait for torch
    if command == "train":
        from cmpolicy.cli import image_train

        return image_train.main(rest)
    if command == "sample":
        from cmpolicy.cli import image_sample

        return image_sample.main(rest)
    if command == "eval":
        from cmpolicy.cli import image_eval

        return image_eval.main(rest)
    print(
        f"cmpolicy image: unknown command {command!r}; choose one of {', '.join(_COMMANDS)}",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
