"""Both sides of the benchmarks compute the same thing, and the scripts print their rows. Nothing here is timed."""

import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    """As when a script of the folder is started."""
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def model():
    from plain import measure

    return measure.build_model("tiny")


@pytest.fixture
def batch():
    import bench_train_step

    options = bench_train_step.parse_arguments(["--batch_size", "6", "--frames", "4", "--size", "tiny"])
    return bench_train_step.make_batch(options, side=32)


def test_padding_has_the_requested_share(batch):
    assert batch["frame_mask"].sum() == 24 - round(0.22 * 24) and batch["frame_mask"][:, 0].all()
    assert not batch["pixel_values_videos"][~batch["frame_mask"]].any()


def test_a_training_step_has_equal_loss_and_gradients(model, batch):
    from plain import procedure

    loss = procedure.training_loss(model, **batch)
    loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    output = model(**batch)
    output.loss.backward()
    assert loss.item() == pytest.approx(output.loss.item(), rel=1e-5)
    largest = max(gradient.abs().max() for gradient in plain.values())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            error = (parameter.grad - plain[name]).abs().max()
            assert error < 1e-4 * plain[name].abs().max() + 1e-6 * largest, name


def test_scores_are_equal(model, batch):
    from plain import procedure

    model.eval()
    with torch.no_grad():
        images = procedure.encode_tokens(model, batch["pixel_values"])
        videos = procedure.encode_tokens(model, batch["pixel_values_videos"].flatten(0, 1)).unflatten(0, (6, 4))
    mask = batch["frame_mask"][:, :, None].expand(-1, -1, videos.shape[2]).flatten(1)
    expected = procedure.match(model, images, videos.flatten(1, 2), mask)
    gallery = model.encode_gallery(batch["pixel_values"])
    clips = model.encode_clips(batch["pixel_values_videos"], batch["frame_mask"])
    torch.testing.assert_close(model.match(clips, gallery), expected, atol=1e-5, rtol=0)


def test_operations_of_the_published_sizes():
    """At ViT-B/32, batch 8 with 10 frames, 22 % of them padding, the plain side does about 1.3 times the work."""
    import bench_train_step

    from modeling_rice import RiceConfig

    options = bench_train_step.parse_arguments([])
    frame_mask = bench_train_step.make_batch(options, side=2)["frame_mask"]
    operations = bench_train_step.count_operations(RiceConfig(), frame_mask, "hardest")
    assert operations["plain"] / operations["rice"] == pytest.approx(1.3, abs=0.02)
    # One ViT-B/32 forward pass of a picture takes 8.7 GFLOP; the encoder is nearly all of the step.
    assert operations["rice"] == pytest.approx(3 * 70 * 8.7e9, rel=0.05)


def test_bench_decoder_prints_one_row_per_shop(capsys):
    import bench_decoder

    bench_decoder.main("--size tiny --images 5 40 --plain_pairs 8 --repeats 1 --device cpu".split())
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["pairs"] for row in rows] == [5, 40]
    for row in rows:
        assert row["max_score_difference"] < 1e-5 and row["speedup"] > 0 and row["plain_pairs"] == 8


def test_bench_train_step_prints_one_row_per_side_and_precision(capsys, monkeypatch):
    import bench_train_step

    monkeypatch.setattr(bench_train_step.subprocess, "run", run_here(bench_train_step))
    bench_train_step.main("--size tiny --batch_size 4 --frames 4 --repeats 1 --device cpu".split())
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["side"], row["precision"]) for row in rows] == [
        (side, precision) for precision in ("fp32", "bf16") for side in ("plain", "rice")
    ]
    assert rows[1]["loss_difference"] < 1e-4 and rows[3]["speedup_over_plain_fp32"] > 0
    assert [row["attention"] for row in rows] == ["sdpa", "sdpa", "eager", "eager"]
    assert rows[3]["cpu_speedup_over_plain_fp32"] > 0 and rows[3]["loss_difference"] < 0.05 * rows[3]["loss"]
    assert all(row["arithmetic_ceiling"] > 1 and row["peak_memory_mb"] >= 0 for row in rows)


def run_here(module):
    """A process costs seconds to start; what it would do is done here."""

    class Result:
        returncode = 0

    def run(command, **_):
        assert command[0] == sys.executable
        Result.stdout = json.dumps(module.measure_side(module.parse_arguments(command[2:])))
        return Result

    return run


def test_batches_too_small_for_negatives_are_refused(capsys):
    import bench_train_step

    with pytest.raises(SystemExit):
        bench_train_step.parse_arguments(["--batch_size", "3"])
    assert "at least 4" in capsys.readouterr().err
