"""``python -m cmpolicy``: the command ``cmpolicy``."""

import sys

from cmpolicy.cli.main import main

sys.exit(main())
