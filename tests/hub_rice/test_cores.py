"""Work on all cores gives what the plain loop gives, in its order."""

import threading

import pytest
import torch

from hub_rice.cores import map_on_cores


@pytest.fixture
def three_threads(one_thread):
    torch.set_num_threads(3)


def test_results_are_those_of_map_in_order(three_threads):
    layer = torch.nn.Linear(4, 4)
    batches = [torch.randn(2, 4) for _ in range(20)]
    assert all(map(torch.equal, map_on_cores(layer, batches), map(layer, batches)))
    assert len(list(map_on_cores(layer, batches))) == 20


def test_items_run_at_once_with_one_torch_thread_each(three_threads):
    together = threading.Barrier(3, timeout=30)

    def work(item):
        # Passes only if three calls run at the same time.
        together.wait()
        return item, torch.get_num_threads(), threading.get_ident()

    items, threads, names = zip(*map_on_cores(work, range(6)))
    assert items == (0, 1, 2, 3, 4, 5) and set(threads) == {1} and len(set(names)) == 3
    assert torch.get_num_threads() == 3


def test_few_items_are_read_ahead(three_threads):
    read = []

    def items():
        for item in range(100):
            read.append(item)
            yield item

    results = map_on_cores(str, items())
    assert next(results) == "0" and len(read) == 4
    results.close()
    assert len(read) == 4 and torch.get_num_threads() == 3


@pytest.mark.parametrize("enabled", [True, False])
def test_gradient_mode_is_that_of_the_caller(three_threads, enabled):
    with torch.set_grad_enabled(enabled):
        assert set(map_on_cores(lambda item: torch.is_grad_enabled(), range(5))) == {enabled}


def test_autocast_is_that_of_the_caller(three_threads):
    layer, batches = torch.nn.Linear(4, 4), [torch.randn(2, 4) for _ in range(5)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = list(map_on_cores(layer, batches))
        assert all(map(torch.equal, found, map(layer, batches)))
    assert {result.dtype for result in found} == {torch.bfloat16}
    assert {result.dtype for result in map_on_cores(layer, batches)} == {torch.float32}


def test_caller_reads_with_one_thread_and_uses_results_with_all(three_threads):
    reading = []
    items = (reading.append(torch.get_num_threads()) for _ in range(9))
    using = [torch.get_num_threads() for _ in map_on_cores(str, items)]
    assert set(reading) == {1} and set(using) == {3}


def test_error_of_an_item_reaches_the_caller(three_threads):
    with pytest.raises(ZeroDivisionError):
        list(map_on_cores(lambda item: 1 // item, [1, 0, 1, 1, 1]))
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(("threads", "device"), [(1, "cpu"), (3, "meta")])
def test_one_thread_or_another_device_works_in_the_calling_thread(one_thread, threads, device):
    torch.set_num_threads(threads)
    assert set(map_on_cores(lambda item: threading.get_ident(), range(4), device)) == {threading.get_ident()}


def test_a_single_item_has_all_threads(three_threads):
    found = list(map_on_cores(lambda item: (torch.get_num_threads(), threading.get_ident()), ["item"]))
    assert found == [(3, threading.get_ident())] and list(map_on_cores(str, [])) == []
