"""Runs of several processes, started as users start them."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from transformers import AutoModel

import train_rice
from tests.train_rice.runs import REPOSITORY, TEXT_CONFIG, assert_same_weights, free_port, history, results


@pytest.fixture(scope="module")
def two(launch, tmp_path_factory):
    """The folder and the printed text of a run of two processes, each with half of the batch."""
    folder = tmp_path_factory.mktemp("two") / "run"
    options = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    words = ["--per_device_train_batch_size", "4", "--model.decoder_dropout", "0"]
    run = lambda: launch(options, folder, *words, ACCELERATE_USE_CPU="true")  # noqa: E731
    return folder, run(), run


class TestProcesses:
    def test_two_processes_train_together(self, two):
        folder, text, _ = two
        assert "2 process(es) x batch 4: negatives per query = 7" in text
        # Once: the second process leaves the talking to the first.
        assert text.count("negatives per query") == 1
        assert AutoModel.from_pretrained(folder).config.projection_dim == 16
        assert results(folder)["unreadable_media"] == 0
        assert json.loads((folder / "train_arguments.json").read_text())["num_processes"] == 2
        assert len(list((folder / "checkpoint-4").glob("rng_state_*.pth"))) == 2

    def test_same_losses_as_one(self, two, command, tmp_path):
        """accelerate deals batch by batch from one order, so two halves are the batch of one process."""
        train_rice.main(command(tmp_path / "one", "--model.decoder_dropout", "0"))
        together, alone = history(two[0]), history(tmp_path / "one")
        assert len(together) == len(alone) == 4
        # Logged with six digits; later steps drift apart, since Adam blows up rounding where gradients vanish.
        for a, b, tolerance in zip(together, alone, (2e-5, 1e-3, 2e-3, 2e-3), strict=True):
            for name in ("loss", "contrastive_loss", "matching_loss", "reconstruction_loss", "grad_norm"):
                assert a[name] == pytest.approx(b[name], rel=tolerance, abs=1e-6), (a["epoch"], name)

    def test_two_processes_continue(self, two, tmp_path):
        folder, _, run = two
        undisturbed = shutil.copytree(folder, tmp_path / "undisturbed")
        shutil.rmtree(folder / "checkpoint-4")
        for name in ("model.safetensors", "train_results.json"):
            (folder / name).unlink()
        assert f"Continuing from {folder / 'checkpoint-2'}." in run()
        assert_same_weights(folder, undisturbed)

    @pytest.mark.slow
    @pytest.mark.parametrize("processes", [1, 2])
    def test_killed_several_times(self, command, environment, tmp_path, processes):
        """All of them at once, wherever they are; steps, checkpoints and validations included."""
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port"]

        def start(folder: Path) -> subprocess.Popen:
            words = ["--per_device_train_batch_size", "4", "--max_steps", "40"]
            words += ["--save_steps", "4", "--eval_steps", "4"]
            words += ["--model.decoder_dropout", "0.1", "--augment_crop", "0.5", "--augment_flip", "0.5"]
            words += ["--frame_sampling", "random", "--dataloader_num_workers", "1", "--ema_decay", "0.9"]
            words += ["--memory_queue_size", "16", "--batch_sampler", "random" if processes == 1 else "same_live"]
            words += ["--use_text", "--model.text_config", json.dumps(TEXT_CONFIG)]
            words += ["--model.text_score_weight", "0.37", "--model.num_hard_negatives", "1"]
            port = [str(free_port())] if processes > 1 else []
            return subprocess.Popen(
                [*launcher, *port, str(REPOSITORY / "train_rice.py"), *command(folder, *words)],
                env=environment | {"ACCELERATE_USE_CPU": "true"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )

        whole, killed = tmp_path / "whole", tmp_path / "killed"
        undisturbed = start(whole)
        assert undisturbed.wait(timeout=300) == 0, undisturbed.stderr.read()
        generator, kills = random.Random(5), 0
        for step in (4, 12, 20, 36):
            running = start(killed)
            deadline = time.monotonic() + 300
            while running.poll() is None and not (killed / f"checkpoint-{step}").exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(generator.random())
            assert running.poll() in (None, 0), running.stderr.read()
            if running.poll() is None:
                kills += 1
                # A launcher's workers are in groups of their own.
                family = psutil.Process(running.pid).children(recursive=True)
                for process in [running, *family]:
                    process.kill()
                psutil.wait_procs(family)
            running.communicate()
        assert kills >= 3
        last = start(killed)
        assert last.wait(timeout=300) == 0, last.stderr.read()
        assert_same_weights(killed, whole)
        assert (killed / "config.json").read_text() == (whole / "config.json").read_text()

    @pytest.mark.slow
    def test_torchrun_without_the_variable(self, command, environment, tmp_path):
        """Two processes that would each train alone, into one folder."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        words = command(tmp_path / "run", "--use_cpu", "false")
        started = subprocess.run(
            [*launcher, str(REPOSITORY / "train_rice.py"), *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert started.returncode != 0
        assert "2 processes were started, but this one sees 1" in started.stderr
        assert not (tmp_path / "run" / "train_arguments.json").exists()

    @pytest.mark.slow
    def test_accelerate_with_one(self, launch, finished, tmp_path):
        text = launch(["--cpu", "--num_processes", "1"], tmp_path / "run")
        assert "1 process(es) x batch 8: negatives per query = 7" in text
        assert_same_weights(tmp_path / "run", finished)
