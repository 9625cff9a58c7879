import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from data_rice.commands import mistakes_end

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_mistake_ends_with_one_sentence_and_status_2(capsys):
    parser = argparse.ArgumentParser(prog="tool")
    for error in (ValueError("no such\n  split"), FileNotFoundError("no such\n  split")):
        with pytest.raises(SystemExit) as end, mistakes_end(parser):
            raise error
        assert end.value.code == 2 and capsys.readouterr().err == "tool: error: no such split\n"


def test_errors_of_the_program_show_their_traceback():
    parser = argparse.ArgumentParser()
    with pytest.raises(RuntimeError), mistakes_end(parser):
        raise RuntimeError("a defect")
    with pytest.raises(SystemExit), mistakes_end(parser, (RuntimeError,)):
        raise RuntimeError("told")


def test_messages_are_shown_but_not_requests_of_the_hub_client(capfd):
    code = "import logging\nfrom data_rice.commands import log_plainly\nlog_plainly()\n"
    code += "logging.getLogger('httpx').info('HTTP Request: HEAD')\nlogging.getLogger('httpx').warning('refused')\n"
    code += "logging.getLogger('rice').info('step 1')\n"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
    assert capfd.readouterr().err.splitlines() == ["refused", "step 1"]
