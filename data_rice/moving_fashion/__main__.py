"""``python -m data_rice.moving_fashion prepare DIR``; see prepare.py."""

import sys

from .prepare import main

if __name__ == "__main__":
    sys.exit(main())
