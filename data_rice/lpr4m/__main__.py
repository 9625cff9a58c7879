"""``python -m data_rice.lpr4m fetch|prepare|verify``: see commands.py."""

import sys

from .commands import main

if __name__ == "__main__":
    sys.exit(main())
