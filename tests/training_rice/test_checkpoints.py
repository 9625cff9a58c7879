"""Training checkpoints: written completely or not at all, damaged ones detected, the newest found."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from training_rice.checkpoints import (
    RESULTS_FILE,
    clear_staging,
    is_trained,
    publish,
    rotate,
    why_broken,
)
from training_rice.setup import find_checkpoint, is_finished


def cut(path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


class TestCheckpoints:
    def test_newest_by_number(self, training, write_checkpoint):
        assert find_checkpoint(training) is None
        for step in (8, 9, 10):
            newest = write_checkpoint(step)
        assert find_checkpoint(training) == newest

    def test_other_names_are_left_alone(self, training, write_checkpoint, tmp_path):
        whole = write_checkpoint(5)
        (tmp_path / "run" / "checkpoint-best").mkdir()
        (tmp_path / "run" / "checkpoint-9").write_text("no folder")
        assert find_checkpoint(training) == whole

    @pytest.mark.parametrize(
        "name",
        ["model.safetensors", "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"],
    )
    @pytest.mark.parametrize("damage", ["missing", "cut"])
    def test_half_written_is_skipped(self, training, write_checkpoint, caplog, name, damage):
        whole, newest = write_checkpoint(4), write_checkpoint(6)
        path = Path(newest) / name
        path.unlink() if damage == "missing" else cut(path)
        assert find_checkpoint(training) == whole
        (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert newest in warning
        assert "incomplete" in warning
        assert name.partition(".")[0] in warning or damage == "cut"

    def test_asked_for(self, training, write_checkpoint):
        older, _ = write_checkpoint(4), write_checkpoint(6)
        assert find_checkpoint(dataclasses.replace(training, resume_from_checkpoint=older)) == older

    def test_asked_for_and_of_another_number_of_processes(self, training, write_checkpoint):
        asked = write_checkpoint(4)
        for rank in (0, 1):
            shutil.copyfile(f"{asked}/rng_state.pth", f"{asked}/rng_state_{rank}.pth")
        os.remove(f"{asked}/rng_state.pth")
        with pytest.raises(ValueError, match=r"was written by 2 process\(es\), but 1 were started.*; start 2, or"):
            find_checkpoint(dataclasses.replace(training, resume_from_checkpoint=asked))

    def test_asked_for_and_half_written(self, training, write_checkpoint):
        write_checkpoint(4)
        asked = write_checkpoint(6)
        cut(Path(asked) / "model.safetensors")
        with pytest.raises(ValueError, match=f"{asked} is incomplete .*choose an earlier one"):
            find_checkpoint(dataclasses.replace(training, resume_from_checkpoint=asked))

    def test_asked_for_and_missing(self, training):
        with pytest.raises(FileNotFoundError, match="resume_from_checkpoint: there is no folder nowhere"):
            find_checkpoint(dataclasses.replace(training, resume_from_checkpoint="nowhere"))

    def test_random_state_of_a_process_is_missing(self, training, write_checkpoint):
        older, newest = (Path(write_checkpoint(step)) for step in (4, 6))
        for folder in (older, newest):
            for rank in range(2):
                shutil.copy(folder / "rng_state.pth", folder / f"rng_state_{rank}.pth")
            (folder / "rng_state.pth").unlink()
        (newest / "rng_state_1.pth").unlink()
        assert why_broken(newest, 2) == "rng_state_1.pth is missing"
        assert why_broken(older, 2) is None

    @pytest.mark.parametrize("asked", ["False", "false", False])
    def test_start_again(self, training, write_checkpoint, asked, tmp_path):
        anew = dataclasses.replace(training, resume_from_checkpoint=asked)
        assert find_checkpoint(anew) is None
        write_checkpoint(4)
        with pytest.raises(ValueError, match="resume_from_checkpoint is false, but .* holds a run; choose another"):
            find_checkpoint(anew)
        assert not is_finished(anew)

    def test_trained(self, write_checkpoint):
        assert not is_trained(write_checkpoint(9))
        assert is_trained(write_checkpoint(10))
        assert why_broken(write_checkpoint(10)) is None

    def test_finished(self, training, write_checkpoint, tmp_path):
        checkpoint = write_checkpoint(10)
        run = tmp_path / "run"
        assert not is_finished(training)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(f"{checkpoint}/{name}", run)
        assert not is_finished(training)
        (run / RESULTS_FILE).write_text("{}")
        assert is_finished(training)
        assert not is_finished(dataclasses.replace(training, resume_from_checkpoint=checkpoint))
        (run / RESULTS_FILE).write_text('{"train_loss": ')
        assert not is_finished(training)
        (run / RESULTS_FILE).write_text("{}")
        cut(run / "model.safetensors")
        assert not is_finished(training)


class TestFiles:
    def write(self, folder: Path, step: int, size: int = 10) -> Path:
        path = clear_staging(folder) / f"checkpoint-{step}"
        path.mkdir()
        (path / "model").write_bytes(b"x" * size)
        return publish(path, folder)

    def test_replaces_another_checkpoint(self, tmp_path):
        self.write(tmp_path, 4)
        assert self.write(tmp_path, 4, size=20) == tmp_path / "checkpoint-4"
        assert (tmp_path / "checkpoint-4" / "model").stat().st_size == 20

    def test_rotation_keeps_newest_and_best(self, tmp_path):
        for step in (2, 4, 6, 8):
            path = self.write(tmp_path, step)
            os.utime(path, (step, step))
        (tmp_path / "checkpoint-best").mkdir()
        rotate(tmp_path, 2, str(tmp_path / "checkpoint-2"))
        left = {path.name for path in tmp_path.glob("checkpoint-*")}
        assert left == {"checkpoint-2", "checkpoint-8", "checkpoint-best"}
        rotate(tmp_path, None, None)
        assert len(list(tmp_path.glob("checkpoint-*"))) == 3

    def test_rotation_keeps_the_checkpoint_written_last(self, tmp_path):
        """The newest is the one that was written last, not the one with the highest step."""
        for age, step in enumerate((4, 8, 5)):
            os.utime(self.write(tmp_path, step), (age, age))
        rotate(tmp_path, 1, None)
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
