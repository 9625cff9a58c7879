"""``python -m data_rice.shop_clips check DIR``; see check.py."""

import sys

from .check import main

if __name__ == "__main__":
    sys.exit(main())
