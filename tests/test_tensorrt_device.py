"""The device of TensorRT parts, against the names and arguments of torch.cuda: what is waited for, in which order."""

from types import SimpleNamespace
from unittest.mock import MagicMock, create_autospec

import pytest
import torch

from bakeoff.runtimes.tensorrt_device import Device
from bakeoff.runtimes.tensorrt_graphs import Graphs


@pytest.fixture
def gpu(monkeypatch):
    """Stand in for torch.cuda; what it is asked for is in `events`. Tensors are the CPU's."""
    events = []
    made = create_autospec(torch.cuda)
    made.current_device.return_value = 0
    own, callers = made.Stream.return_value, create_autospec(torch.cuda.Stream, instance=True)
    own.cuda_stream = 77
    made.current_stream.return_value = callers
    own.wait_stream.side_effect = lambda stream: events.append(("ours waits", stream is callers))
    callers.wait_stream.side_effect = lambda stream: events.append(("caller waits", stream is own))
    own.synchronize.side_effect = lambda: events.append("finish")
    made.empty_cache.side_effect = lambda: events.append("give back")
    made.stream.side_effect = lambda stream: Entered(events, "ours" if stream is own else "another")
    made.graph.side_effect = lambda graph, stream: Entered(events, "capture" if stream is own else "another capture")
    made.mem_get_info.return_value = (5_000, 10_000)
    monkeypatch.setattr(torch, "cuda", made)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: events.append(("kept", stream is callers)))
    device = Device()
    made.Stream.assert_called_once_with(torch.device("cuda", 0))
    device.name = torch.device("cpu")
    return SimpleNamespace(cuda=made, events=events, device=device, own=own, callers=callers)


class Entered:
    def __init__(self, events, name):
        self.events, self.name = events, name

    def __enter__(self):
        self.events.append(f"on {self.name}")

    def __exit__(self, *_):
        self.events.append(f"off {self.name}")


def test_work_waits_for_the_caller_and_keeps_what_it_reads(gpu):
    on_gpu, on_host = MagicMock(is_cuda=True), MagicMock(is_cuda=False)
    on_gpu.record_stream.side_effect = lambda stream: gpu.events.append(("read", stream is gpu.own))
    with gpu.device.working(on_gpu, on_host):
        gpu.events.append("work")
    assert gpu.events == [("ours waits", True), "on ours", "work", "off ours", ("read", True)]
    on_host.record_stream.assert_not_called()


def test_results_are_handed_over_behind_what_makes_them(gpu):
    gpu.device.hand_over(torch.zeros(1))
    assert gpu.events == [("caller waits", True), ("kept", True)]


def test_the_block_moves_when_all_is_done_and_gives_the_old_one_back_first(gpu):
    device, owner = gpu.device, object()
    device.expect(owner, 4_000)
    assert device.lacking == 4_000
    _, size = device.block(1_000)
    assert (size, device.lacking) == (1_000, 3_000)
    gpu.events.clear()
    assert device.block(900)[1] == 1_000
    assert gpu.events == []
    assert device.block(4_000)[1] == 4_000
    assert gpu.events == ["finish", "give back", "on ours", "off ours"]
    assert device.lacking == 0
    device.release(owner)
    assert gpu.events[-1] == "finish"
    assert device._block is None


def test_graphs_are_recorded_and_replayed_on_the_devices_stream(gpu):
    graphs, launched = Graphs(gpu.device), []
    context = SimpleNamespace(place=lambda block, tensors: launched.append(sorted(tensors)), enqueue=launched.append)
    given, made = {"x": torch.ones(2)}, {"y": torch.zeros(2)}
    graphs.context("key", lambda: context)
    graphs.run("key", (1, 2), given, made)
    assert launched == [["x", "y"], 77, 77]  # once to run, once to record
    assert "on capture" in gpu.events
    gpu.events.clear()
    graphs.run("key", (1, 2), given, made)
    assert launched == [["x", "y"], 77, 77]
    gpu.cuda.CUDAGraph.return_value.replay.assert_called_once_with()
    assert set(gpu.events) == {"on ours", "off ours"}


def test_memory_is_asked_of_the_driver(gpu):
    assert gpu.device.free_bytes() == 5_000
    gpu.cuda.mem_get_info.assert_called_once_with(gpu.device.name)
    gpu.device.finish()
    assert gpu.events == ["finish"]
    assert gpu.device.stream == 77
