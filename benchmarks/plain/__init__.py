"""The plain side of the benchmarks, and how both sides are measured."""

import sys
from pathlib import Path

# The scripts also run from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
