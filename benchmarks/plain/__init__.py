"""The plain side of the benchmarks, and the measurement of both sides."""

import sys
from pathlib import Path

# The scripts also run from a checkout without installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
