import argparse

import pytest

from data_rice.commands import mistakes_end


def test_a_mistake_ends_with_one_sentence_and_status_2(capsys):
    parser = argparse.ArgumentParser(prog="tool")
    for error in (ValueError("no such\n  split"), FileNotFoundError("no such\n  split")):
        with pytest.raises(SystemExit) as end, mistakes_end(parser):
            raise error
        assert end.value.code == 2 and capsys.readouterr().err == "tool: error: no such split\n"


def test_what_is_no_mistake_of_the_users_is_shown_in_full():
    parser = argparse.ArgumentParser()
    with pytest.raises(RuntimeError), mistakes_end(parser):
        raise RuntimeError("a defect")
    with pytest.raises(SystemExit), mistakes_end(parser, (RuntimeError,)):
        raise RuntimeError("told")
