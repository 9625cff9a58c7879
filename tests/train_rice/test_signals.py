"""Ctrl-C and SIGTERM: one sentence, the status of the signal, and a last checkpoint with --save_on_signal."""

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import train_rice
from evaluation_rice.retrieval import Loading
from tests.train_rice.runs import REPOSITORY, TEXT_CONFIG, assert_same_weights, free_port, results

# Enough steps for a signal to arrive within, at any speed.
LONG = ["--max_steps", "100000", "--save_steps", "2", "--eval_steps", "2"]
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture
def start(command, environment):
    """A function that starts a training command, each process in a session of its own as launchers do it."""
    running = []

    def start(folder, *words: str, processes: int = 1, limits: dict | None = None) -> list[subprocess.Popen]:
        port, ours = str(free_port()), []
        for rank in range(processes):
            several = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            several |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
            ours.append(
                subprocess.Popen(
                    [sys.executable, str(REPOSITORY / "train_rice.py"), *command(folder, *words)],
                    env=environment | (several if processes > 1 else {}),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                    preexec_fn=partial(limit_files, (limits or {}).get(rank)),
                )
            )
        running.extend(ours)
        return ours

    yield start
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def limit_files(size: int | None) -> None:
    if size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def wait_for(path: Path, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        time.sleep(0.02)


def finish(processes: list[subprocess.Popen]) -> None:
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said


def end(processes: list[subprocess.Popen], number: int, group: bool) -> list[str]:
    """Sends a signal, to loader workers too where it goes to the group; returns what was printed."""
    for process in processes:
        os.killpg(process.pid, number) if group else process.send_signal(number)
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [STATUS[number]] * len(processes), said
    assert not any("Traceback" in text or "Exception ignored" in text for text in said), said
    return said


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, "1"), (signal.SIGTERM, "0")])
def test_ends_with_a_sentence(start, tmp_path, number, workers):
    run = tmp_path / "run"
    processes = start(run, *LONG, "--dataloader_num_workers", workers)
    wait_for(run / "checkpoint-2", processes)
    (said,) = end(processes, number, group=True)
    last = said.strip().splitlines()[-1]
    assert last.startswith(
        f"train_rice.py: stopped by {number.name}; run the same command again to continue from {run}/"
    )
    assert not (run / "model.safetensors").exists()


def signalled(monkeypatch, step: int, number: int, times: int = 1) -> None:
    """Makes the next run get a signal in the middle of a step, counted from 1."""
    original, steps = train_rice.RiceTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        steps.append(None)
        for _ in range(times if len(steps) == step else 0):
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(train_rice.RiceTrainer, "training_step", training_step)


TEXT = ["--use_text", "--model.text_config", json.dumps(TEXT_CONFIG), "--model.text_score_weight", "0.37"]
BY_EPOCH = ["--eval_strategy", "epoch", "--save_strategy", "epoch"]
# Three steps are an epoch, and seven the run. Signals come where nothing is due, where a validation is, at the end of
# an epoch, between validations of each step, in the last step, and in the best step so far, of which the undisturbed
# run keeps no checkpoint to end with.
CASES = [
    (5, ["--eval_steps", "3", "--save_steps", "3"], 5),
    (4, ["--eval_steps", "4", "--save_steps", "8", "--load_best_model_at_end", "no"], 4),
    (3, BY_EPOCH, 3),
    (5, ["--save_strategy", "best", "--eval_steps", "1"], 5),
    (7, BY_EPOCH, 7),
    (1, ["--eval_steps", "1", "--save_steps", "7"], 1),
]


@pytest.mark.parametrize(("step", "words", "checkpoint"), CASES)
def test_last_checkpoint_continues_to_the_same_weights(
    command, tmp_path, monkeypatch, capsys, step, words, checkpoint
):
    words = ["--max_steps", "7", "--model.decoder_dropout", "0.1", "--ema_decay", "0.9", *TEXT, *words]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_rice.main(command(whole, *words))
    with monkeypatch.context() as patch:
        signalled(patch, step, signal.SIGTERM)
        with pytest.raises(SystemExit) as end:
            train_rice.main(command(stopped, *words, "--save_on_signal", "true"))
    assert end.value.code == 143
    last = stopped / f"checkpoint-{checkpoint}"
    said = f"stopped by SIGTERM; run the same command again to continue from {last}."
    assert said in capsys.readouterr().err
    train_rice.main(command(stopped, *words))
    assert_same_weights(stopped, whole)
    assert (stopped / "config.json").read_text() == (whole / "config.json").read_text()
    assert results(stopped)["train_loss"] == pytest.approx(results(whole)["train_loss"])


def test_validation_is_finished_when_its_workers_get_the_signal_too(command, tmp_path, monkeypatch, capsys):
    words = ["--max_steps", "4", "--dataloader_num_workers", "1", "--per_device_eval_batch_size", "1"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_rice.main(command(whole, *words))
    batches, sent = Loading.batches, []

    def to_all(self, *args, **kwargs):
        for batch in batches(self, *args, **kwargs):
            if not sent:
                sent.extend(multiprocessing.active_children())
                for child in sent:
                    os.kill(child.pid, signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Loading, "batches", to_all)
        with pytest.raises(SystemExit) as end:
            train_rice.main(command(stopped, *words, "--save_on_signal", "true"))
    assert sent and end.value.code == 143
    assert f"run the same command again to continue from {stopped}/checkpoint-2." in capsys.readouterr().err
    train_rice.main(command(stopped, *words))
    assert_same_weights(stopped, whole)


def test_second_signal_does_not_wait(command, tmp_path, monkeypatch):
    signalled(monkeypatch, 3, signal.SIGINT, times=2)
    with pytest.raises(SystemExit) as end:
        train_rice.main(command(tmp_path / "run", "--save_on_signal", "true"))
    assert end.value.code == 130
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-2"}


def test_handlers_are_restored(command, tmp_path):
    before = [signal.getsignal(number) for number in STATUS]
    with pytest.raises(SystemExit):
        train_rice.main(command(tmp_path / "run", "--learning_rat", "1"))
    assert [signal.getsignal(number) for number in STATUS] == before


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_signal_to_all_processes_and_workers(start, tmp_path, processes):
    words = ["--max_steps", "60", "--save_steps", "60", "--eval_steps", "20", "--dataloader_num_workers", "1"]
    words += ["--per_device_train_batch_size", "4", "--model.decoder_dropout", "0.1", "--save_on_signal", "true"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(start(whole, *words, processes=processes))
    running = start(stopped, *words, processes=processes)
    while "{'loss'" not in (line := running[0].stdout.readline()):
        assert line, "the run ended before its first step"
    end(running, signal.SIGTERM, group=True)
    (checkpoint,) = stopped.glob("checkpoint-*")
    assert int(checkpoint.name.removeprefix("checkpoint-")) < 60
    finish(start(stopped, *words, processes=processes))
    assert_same_weights(stopped, whole)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.5, 1.5])
def test_a_full_disk_of_the_first_process_ends_all(start, finished, tmp_path, share):
    """A limit on the size of files stands for the disk's; the arguments do not fit, or a checkpoint's parts."""
    limit = int(share * (finished / "model.safetensors").stat().st_size) or 1000
    words = ["--per_device_train_batch_size", "4"]
    both = start(tmp_path / "run", *words, processes=2, limits={0: limit})
    said = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [2, 2], said
    assert "Traceback" not in said[0] + said[1]
    last = said[0].strip().splitlines()[-1]
    assert last.startswith("train_rice.py: error: ") and f"could not be written to {tmp_path / 'run'} (" in last
    assert "error:" not in said[1]
    finish(start(tmp_path / "run", *words, processes=2))
