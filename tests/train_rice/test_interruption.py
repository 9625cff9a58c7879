"""Runs that are interrupted and continued."""

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest

import train_rice
from tests.train_rice.runs import REPOSITORY, assert_same_weights, interrupt, results
from training_rice.run_lock import run_lock


class TestInterruption:
    @pytest.mark.parametrize(
        ("save_steps", "broken_off", "half_written"), [(2, 4, None), (3, 5, None), (2, 6, "model.safetensors")]
    )
    def test_same_weights_as_undisturbed(
        self, command, tmp_path, monkeypatch, caplog, save_steps, broken_off, half_written
    ):
        """Three steps are an epoch; dropout is on, and evaluations draw random numbers too."""
        words = ["--max_steps", "6", "--save_steps", str(save_steps), "--eval_steps", str(save_steps)]
        words += ["--model.decoder_dropout", "0.1"]
        train_rice.main(command(tmp_path / "whole", *words))
        disturbed = tmp_path / "disturbed"
        with monkeypatch.context() as patch:
            interrupt(patch, broken_off)
            with pytest.raises(KeyboardInterrupt):
                train_rice.main(command(disturbed, *words))
        assert not (disturbed / "model.safetensors").exists()
        newest = disturbed / f"checkpoint-{(broken_off - 1) // save_steps * save_steps}"
        expected = newest
        if half_written:
            content = (newest / half_written).read_bytes()
            (newest / half_written).write_bytes(content[: len(content) // 2])
            expected = disturbed / f"checkpoint-{int(newest.name.removeprefix('checkpoint-')) - save_steps}"
        with caplog.at_level(logging.INFO):
            train_rice.main(command(disturbed, *words))
        assert f"Continuing from {expected}." in caplog.text
        assert (f"Skipping {newest}: it is incomplete" in caplog.text) == bool(half_written)
        assert_same_weights(disturbed, tmp_path / "whole")
        for name, value in results(tmp_path / "whole").items():
            if "R@" in name or name == "eval_fusion_weight":
                assert results(disturbed)[name] == value, name

    def test_random_frames_and_augmentation_too(self, command, tmp_path, monkeypatch):
        words = ["--frame_sampling", "random", "--augment_crop", "0.5", "--augment_flip", "0.5"]
        train_rice.main(command(tmp_path / "whole", *words))
        interrupt(monkeypatch, 4)
        with pytest.raises(KeyboardInterrupt):
            train_rice.main(command(tmp_path / "disturbed", *words))
        monkeypatch.undo()
        train_rice.main(command(tmp_path / "disturbed", *words))
        assert_same_weights(tmp_path / "disturbed", tmp_path / "whole")

    def test_before_the_first_checkpoint(self, command, finished, tmp_path, monkeypatch):
        """The folder then holds arguments only, and may be used with others."""
        with monkeypatch.context() as patch:
            interrupt(patch, 1)
            with pytest.raises(KeyboardInterrupt):
                train_rice.main(command(tmp_path / "run", "--learning_rate", "1"))
        train_rice.main(command(tmp_path / "run"))
        assert_same_weights(tmp_path / "run", finished)

    def test_after_the_last_checkpoint(self, command, finished, copied):
        for name in ("model.safetensors", "config.json", "train_results.json"):
            (copied / name).unlink()
        train_rice.main(command(copied))
        assert_same_weights(copied, finished)
        assert not (copied / "checkpoint-5").exists()
        assert results(copied)["eval_fused_R@1"] == results(finished)["eval_fused_R@1"]

    def test_finished_run_is_not_changed(self, command, copied, caplog):
        before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copied.rglob("*") if path.is_file()}
        with caplog.at_level(logging.INFO):
            train_rice.main(command(copied))
        assert f"The run in {copied} is finished; there is nothing to do." in caplog.text
        after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copied.rglob("*") if path.is_file()}
        assert after == before

    def test_other_arguments_where_no_checkpoint_is_usable(self, refusal, copied):
        """As with another number of processes, each of which lacks its random state: nothing may start over."""
        for name in ("model.safetensors", "train_results.json"):
            (copied / name).unlink()
        for checkpoint in copied.glob("checkpoint-*"):
            (checkpoint / "rng_state.pth").unlink()
        arguments = (copied / "train_arguments.json").read_bytes()
        message = refusal("--learning_rate", "0.5", output_dir=copied)
        assert f"{copied} holds a run with learning_rate=0.01, not 0.5; choose another output_dir" in message
        assert (copied / "train_arguments.json").read_bytes() == arguments

    def test_other_arguments(self, refusal, copied):
        message = refusal("--learning_rate", "0.5", output_dir=copied)
        assert f"{copied} holds a run with learning_rate=0.01, not 0.5; choose another output_dir" in message
        shutil.rmtree(copied / "checkpoint-4")
        assert "num_frames=3, not 2" in refusal("--num_frames", "2", output_dir=copied)

    def test_asked_for_a_half_written_checkpoint(self, refusal, copied):
        (copied / "checkpoint-4" / "optimizer.pt").unlink()
        asked = str(copied / "checkpoint-4")
        message = refusal("--resume_from_checkpoint", asked, output_dir=copied)
        assert f"resume_from_checkpoint: {asked} is incomplete or damaged (optimizer.pt is missing)" in message


class TestDamage:
    @pytest.mark.parametrize(
        "names", [["rng_state.pth"], ["optimizer.pt", "scheduler.pt"], ["trainer_state.json"], ["rice_state.pt"]]
    )
    @pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
    def test_falls_back_and_names_the_files(self, command, finished, copied, caplog, names, damage):
        for name in ("model.safetensors", "train_results.json"):
            (copied / name).unlink()
        for name in names:
            content = bytearray((copied / "checkpoint-4" / name).read_bytes())
            middle = len(content) // 2
            content[middle] ^= 1
            content = {"cut": content[:middle], "flipped": content, "emptied": b""}[damage]
            (copied / "checkpoint-4" / name).write_bytes(content)
        with caplog.at_level(logging.INFO):
            train_rice.main(command(copied))
        (warning,) = [text for text in caplog.messages if "Skipping" in text]
        assert warning.startswith(f"Skipping {copied / 'checkpoint-4'}: it is incomplete or damaged (")
        assert all(name in warning for name in names)
        assert f"Continuing from {copied / 'checkpoint-2'}." in caplog.messages
        assert_same_weights(copied, finished)

    def test_best_checkpoint(self, refusal, copied):
        """The run ends with it, so that nothing else may take its place unsaid."""
        for name in ("model.safetensors", "train_results.json"):
            (copied / name).unlink()
        last, best = copied / "checkpoint-4", copied / "checkpoint-2"
        state = json.loads((last / "trainer_state.json").read_text()) | {"best_model_checkpoint": str(best)}
        (last / "trainer_state.json").write_text(json.dumps(state))
        (last / "checksums.json").unlink()
        weights = best / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        message = refusal(output_dir=copied)
        assert f"its best checkpoint {best}, but it is incomplete or damaged (model.safetensors is cut" in message


HOLD = """
import sys, time
from training_rice.run_lock import run_lock
with run_lock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(600)
"""


class TestOneRunPerFolder:
    @pytest.fixture
    def holder(self, tmp_path):
        """A process that holds the lock of a run's folder."""
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()
        process.communicate()

    def test_second_is_refused(self, refusal, holder, tmp_path):
        message = refusal(output_dir=tmp_path / "run")
        assert f"{tmp_path / 'run'} is in use by another training run (process id {holder.pid} on " in message
        assert not (tmp_path / "run" / "train_arguments.json").exists()

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_a_lock_of_a_dead_process_is_released(self, holder, tmp_path, number):
        holder.send_signal(number)
        holder.wait()
        assert str(holder.pid) in (tmp_path / "run" / ".lock").read_text()
        with run_lock(tmp_path / "run"):
            pass

    def test_children_do_not_hold_it(self, tmp_path):
        """A loader worker outlives a killed run by some seconds."""
        hold = HOLD.replace("    print", "    import os\n    if os.fork() == 0: time.sleep(600)\n    print")
        process = subprocess.Popen(
            [sys.executable, "-c", hold, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdout.readline() == "locked\n"
        process.kill()
        process.wait()
        try:
            with run_lock(tmp_path):
                pass
        finally:
            os.killpg(process.pid, signal.SIGKILL)

    def test_started_together(self, command, finished, environment, tmp_path):
        start = [sys.executable, str(REPOSITORY / "train_rice.py"), *command(tmp_path / "run")]
        options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        both = [subprocess.Popen(start, **options) for _ in range(2)]
        said = [process.communicate(timeout=300)[0] for process in both]
        winner = 0 if both[0].returncode == 0 else 1
        assert both[winner].returncode == 0 and "Saved the model" in said[winner], said
        refused = f"in use by another training run (process id {both[winner].pid} on"
        late = both[1 - winner].returncode == 0 and "is finished; there is nothing to do" in said[1 - winner]
        assert late or (both[1 - winner].returncode == 2 and refused in said[1 - winner]), said
        assert_same_weights(tmp_path / "run", finished)

    def test_file_system_without_locks(self, monkeypatch, tmp_path, caplog):
        def refuse(*_):
            raise OSError(37, "No locks available")

        monkeypatch.setattr("training_rice.run_lock.fcntl.lockf", refuse)
        with run_lock(tmp_path):
            pass
        assert "has no locks" in caplog.text

    def test_system_without_locks(self, monkeypatch, tmp_path):
        monkeypatch.setattr("training_rice.run_lock.fcntl", None)
        with pytest.raises(OSError, match="train on Linux or macOS"), run_lock(tmp_path):
            pass


class TestFullDisk:
    """A limit on the size of files stands for the disk's."""

    @pytest.mark.parametrize("share", [0.5, 1.5])
    def test_one_sentence_and_nothing_half_written(self, command, finished, environment, tmp_path, share):
        """The limit lets through nothing of a checkpoint's weights, or these but not the optimiser's state."""
        size = (finished / "model.safetensors").stat().st_size
        assert (finished / "checkpoint-2" / "optimizer.pt").stat().st_size > 1.5 * size
        run = tmp_path / "run"
        shutil.copytree(finished, run)
        for path in (*run.glob("*.safetensors"), run / "train_results.json"):
            path.unlink()
        shutil.rmtree(run / "checkpoint-4")
        limit = int(share * size)
        ended = subprocess.run(
            [sys.executable, str(REPOSITORY / "train_rice.py"), *command(run)],
            env=environment,
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
        assert ended.returncode == 2, ended.stderr
        assert "Traceback" not in ended.stderr
        last = ended.stderr.strip().splitlines()[-1]
        assert last.startswith(f"train_rice.py: error: checkpoint-4 could not be written to {run} (")
        assert "make room and run the same command again" in last
        assert not list(run.glob(".unfinished*")) and not list(run.glob("*.safetensors"))
        train_rice.main(command(run))
        assert_same_weights(run, finished)

    def test_at_the_end(self, refusal, command, finished, copied, monkeypatch):
        """The last checkpoint is there, and the model itself has no room."""
        for name in ("model.safetensors", "train_results.json"):
            (copied / name).unlink()
        with monkeypatch.context() as patch:
            full = OSError(28, "No space left on device")
            patch.setattr("safetensors.torch.save_file", lambda *_, **__: (_ for _ in ()).throw(full))
            patch.setattr("transformers.modeling_utils.safe_save_file", lambda *_, **__: (_ for _ in ()).throw(full))
            message = refusal(output_dir=copied)
        assert f"the model could not be written to {copied} ([Errno 28] No space left on device; " in message
        assert not (copied / "model.safetensors").exists()
        train_rice.main(command(copied))
        assert_same_weights(copied, finished)
