"""The scaling benchmark runs at tiny size, and its simulation gives values worked out by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_rice import RiceConfig

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def rows(*words: str) -> list[dict]:
    command = [sys.executable, str(BENCHMARKS / "bench_scaling.py"), *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def simulate():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from bench_scaling import simulate
    finally:
        sys.path.remove(str(BENCHMARKS))
    return simulate


@pytest.mark.slow
def test_two_processes():
    tiny = ["--size", "tiny", "--batch_size", "4", "--frames", "2", "--side", "64", "--steps", "2", "--workers", "1"]
    one, two = rows(*tiny, "--cpu")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["efficiency"] == 1.0
    for row in (one, two):
        assert row["clips_per_second"] > 0
        assert 0 <= row["data_wait_share"] <= 1
        assert len(row["memory_per_process"]) == row["processes"]
    assert one["exchanged_mb_per_step"] == 0
    assert two["exchanged_mb_per_step"] > 0


class TestSimulation:
    def test_one_process_has_no_network(self, simulate):
        row = simulate(RiceConfig(), 32, 0.5, 1, gpus_per_node=1, parameters=100)
        assert row["seconds"] == 0.5
        assert row["efficiency"] == 1.0
        assert row["clips_per_second"] == 64

    def test_by_hand(self, simulate):
        """Two nodes of one GPU, 8 gigabits = 10^9 bytes per second, no latency."""
        config = RiceConfig(projection_dim=8, use_decoder=False)
        row = simulate(
            config,
            4,
            2.0,
            2,
            gpus_per_node=1,
            network_gbits=8.0,
            latency_us=0.0,
            overlap=0.0,
            parameters=500_000_000,
        )
        assert row["gradient_seconds"] == pytest.approx(2.0)
        # Two embeddings of 8 numbers for 4 pairs, there and back, and 4 ids.
        assert row["exchange_seconds"] == pytest.approx((2 * 4 * 2 * 4 * 8 + 8 * 4) / 1e9)
        assert row["seconds"] == pytest.approx(4.0, rel=1e-6)

    def test_backward_pass_hides_gradients(self, simulate):
        options = {"gpus_per_node": 1, "network_gbits": 8.0, "latency_us": 0.0, "parameters": 500_000_000}
        config = RiceConfig(use_decoder=False)
        assert simulate(config, 4, 10.0, 2, overlap=1.0, **options)["gradient_seconds"] == pytest.approx(0.0)
        assert simulate(config, 4, 1.0, 2, overlap=1.0, **options)["gradient_seconds"] == pytest.approx(1.5)

    def test_decoder_pairs_grow_with_the_processes(self, simulate):
        """Each pair costs 4 keys x width + 18 width^2 operations, three times over with the backward pass."""
        config = RiceConfig()
        row = simulate(config, 2, 1.0, 4, gpus_per_node=1, frames=1, teraflops=1.0, parameters=1)
        assert row["pairs_seconds"] == pytest.approx(3 * 2 * 2 * 3 * (4 * 50 * 512 + 18 * 512**2) / 1e12)
        assert simulate(RiceConfig(use_decoder=False), 2, 1.0, 4, parameters=1)["pairs_seconds"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--simulate"], "--simulate needs --compute_seconds"),
        (["--batch_size", "2"], "at least 4"),
        (["--overlap", "2"], "--overlap must lie in 0..1"),
    ],
)
def test_bad_options(words, message):
    result = subprocess.run(
        [sys.executable, str(BENCHMARKS / "bench_scaling.py"), *words], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert message in result.stderr
