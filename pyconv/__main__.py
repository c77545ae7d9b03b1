"""``python -m pyconv``: see `pyconv.cli`."""

import sys

from pyconv.cli import main

if __name__ == "__main__":
    sys.exit(main())
