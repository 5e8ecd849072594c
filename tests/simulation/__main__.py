"""``python -m tests.simulation``: see ``command.py`` (worker processes cannot import a ``__main__``)."""

import sys

from tests.simulation.command import main

if __name__ == "__main__":
    sys.exit(main())
