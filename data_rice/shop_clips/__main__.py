"""``python -m data_rice.shop_clips check DIR`` and ``novel SHOP OUTPUT``; see check.py and novel.py."""

import sys

from .check import main

if __name__ == "__main__":
    sys.exit(main())
