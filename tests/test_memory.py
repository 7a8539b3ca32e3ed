import sys

import pytest

from bakeoff import memory
from bakeoff.errors import BakeoffError, InputError


def allocate(megabytes):
    import numpy as np

    block = np.ones(megabytes << 20, dtype=np.uint8)
    return int(block.sum() >> 20)


def allocate_and_free():
    """Free small blocks below one that is held: they stay with the process."""
    import torch

    blocks = [torch.ones(1 << 14) for _ in range(4000)]
    del blocks[:-1]
    freed = memory.rss_bytes("RssAnon")
    memory.give_back()
    return [freed, memory.rss_bytes("RssAnon")]


def give_back_without_torch():
    memory.give_back()
    return "torch" in sys.modules


def fail():
    message = "got this"
    raise InputError(message, fix="type that")


def die():
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def here(request):
    return str(request.path.parent)


def test_a_childs_peak_is_its_own(here):
    small, large = (memory.in_child("test_memory:allocate", {"megabytes": mb}, extra_path=here) for mb in (1, 300))
    assert large[0] == 300
    grown = large[1].anon_bytes - small[1].anon_bytes
    assert grown == pytest.approx(299 << 20, rel=0.05)


def test_a_childs_error_is_ours(here):
    with pytest.raises(InputError, match="got this") as caught:
        memory.in_child("test_memory:fail", {}, extra_path=here)
    assert caught.value.fix == "type that"


def test_a_childs_death_is_said(here):
    with pytest.raises(BakeoffError, match=r"signal 9[\s\S]*it held 0\.0[1-9] GB"):
        memory.in_child("test_memory:die", {}, extra_path=here)


def test_freed_memory_is_given_back(here):
    (freed, after), _ = memory.in_child("test_memory:allocate_and_free", {}, extra_path=here)
    assert freed - after > 200 << 20


def test_what_torch_keeps_of_a_gpu_is_given_back_to_other_backends(here, monkeypatch):
    import torch

    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    memory.give_back()
    assert not emptied
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    memory.give_back()
    assert emptied
    assert memory.in_child("test_memory:give_back_without_torch", {}, extra_path=here)[0] is False
