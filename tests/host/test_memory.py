import gc
import weakref

import pytest

from deploy.host.memory import release


class Part:
    """Hangs in a cycle with itself, as the values of a graph do with its nodes."""

    def __init__(self) -> None:
        self.whole = self


@pytest.fixture
def collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(("size", "freed"), [(10**9, True), (1000, False)])
def test_what_a_large_model_leaves_in_cycles_is_freed_at_once(collector, size, freed):
    part = weakref.ref(Part())
    release(size)
    assert (part() is None) == freed


def test_blocks_that_the_c_library_keeps_go_back_to_the_system(collector):
    blocks = [bytearray(100_000) for _ in range(1000)]  # below the size from which each is a mapping of its own
    full = resident()
    del blocks[:-1]
    release(10**9)
    assert resident() < full - 80_000_000


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
