"""Fixtures of the attack tests, and the count of what they tried."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from tests.hub_rice.conftest import (  # noqa: F401
    client,
    hub,
    hub_environment,
    running_hub,
    tiny_checkpoint,
)
from tests.retrieval_rice.conftest import (  # noqa: F401
    index_model,
    index_processor,
    make_index_model,
    make_shop_rows,
    shop,
)
from tests.train_rice.conftest import command, environment, finished, mini  # noqa: F401

_COUNTS = pytest.StashKey[dict]()
KINDS = ("kills survived", "files tried", "files refused", "bombs refused", "full disks told")
FAULTS = ("tracebacks", "silent errors", "lost", "sentences that name nothing", "crashes of a library")


@pytest.fixture
def count(request):
    """A function that adds to what was tried: the kind, the door, and how many."""
    counts = request.config.stash.setdefault(_COUNTS, {})

    def add(kind: str, door: str, number: int = 1) -> None:
        assert kind in KINDS + FAULTS
        counts.setdefault(kind, Counter())[door] += number

    return add


def pytest_terminal_summary(terminalreporter, config) -> None:
    counts = config.stash.get(_COUNTS, {})
    if not counts:
        return
    kinds = {kind: counts.get(kind, Counter()) for kind in KINDS + FAULTS}
    terminalreporter.section("attacks")
    for kind, doors in kinds.items():
        listed = ", ".join(f"{door} {number:,}" for door, number in doors.items() if number)
        terminalreporter.line(f"{kind}: {sum(doors.values()):,}{f' ({listed})' if listed else ''}")
    # Named by who wants to keep it.
    path = os.environ.get("RICE_ATTACK_COUNTS")
    if path:
        text = json.dumps({kind: {"all": sum(doors.values()), **doors} for kind, doors in kinds.items()}, indent=2)
        Path(path).write_text(text + "\n", encoding="utf-8")
