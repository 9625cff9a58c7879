"""What a run logs besides its losses."""

import pytest
import torch

from training_rice.monitor import in_batch_accuracy, run_figures, summary_table
from training_rice.profiling import PARTS, PartTimer


class TestAccuracy:
    def test_square(self):
        logits = torch.tensor([[3.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 5.0, 4.0]])
        assert in_batch_accuracy(logits).item() == pytest.approx(1 / 3)

    def test_same_product(self):
        """Row 1 prefers column 0, which shows the same product."""
        logits = torch.tensor([[3.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 5.0, 4.0]])
        assert in_batch_accuracy(logits, torch.tensor([7, 7, 8])).item() == pytest.approx(2 / 3)

    def test_positive_first(self):
        logits = torch.tensor([[3.0, 1.0], [2.0, 4.0], [1.0, 0.0], [0.0, 1.0]])
        assert in_batch_accuracy(logits, torch.arange(4)).item() == 0.5


class TestFigures:
    def test_over_the_logs(self):
        logs = [
            {"loss": 1.0, "clips_per_second": 10.0, "data_wait_share": 0.2, "memory_gb": 3.0, "nonfinite_steps": 0},
            {"eval_fused_R@1": 0.5},
            {"loss": 1.0, "clips_per_second": 20.0, "data_wait_share": 0.4, "memory_gb": 2.0, "nonfinite_steps": 1},
        ]
        figures = run_figures(logs)
        assert figures == pytest.approx(
            {"clips_per_second": 15.0, "data_wait_share": 0.3, "memory_gb": 3.0, "nonfinite_steps": 1}
        )
        text = summary_table(figures | {"eval_fused_R@1": 0.5, "train_loss": 1.0})
        assert "15.00" in text
        assert "30.0%" in text
        assert "validation R@1, fused" in text
        assert "matching" not in text

    def test_nothing_logged(self):
        assert run_figures([{"loss": 1.0}]) == {}


class TestPartTimer:
    def test_inner_parts_do_not_count_twice(self, monkeypatch):
        times = iter([0.0, 1.0, 4.0, 6.0])
        monkeypatch.setattr("time.perf_counter", lambda: next(times))
        timer = PartTimer(torch.device("cpu"))
        timer.enter("losses")
        timer.enter("encoder")
        timer.leave()
        timer.leave()
        assert timer.seconds == dict.fromkeys(PARTS, 0.0) | {"losses": 3.0, "encoder": 3.0}

    def test_timer_ends_after_an_error(self):
        timer = PartTimer(torch.device("cpu"))

        def fail():
            raise RuntimeError

        with pytest.raises(RuntimeError):
            timer.timed(fail, "decoder")()
        assert not timer._parts
