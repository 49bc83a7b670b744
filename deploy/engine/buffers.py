"""The memory that an execution context keeps for its inputs and outputs, on the GPU and pinned on the host."""

import numpy as np

from deploy.engine.cuda import Device, Memory, Stream

PIECE = 1 << 20
"""The bytes that are staged before their copy begins: the copy of one piece overlaps the staging of the next."""


class Buffers:
    """A buffer on the GPU and a pinned one for each tensor, by name. They grow to the largest size that was requested.

    All are used on `stream` alone, in whose order the memory on the GPU is freed.
    """

    def __init__(self, device: Device, stream: Stream) -> None:
        self._device = device
        self._stream = stream
        self._memories: dict[str, Memory] = {}
        self._hosts: dict[str, np.ndarray] = {}

    def memory(self, name: str, nbytes: int = 0) -> Memory:
        """The device memory of a tensor, at least `nbytes`. What it held, and its address, last until it has to grow."""
        memory = self._memories.get(name)
        if memory is None or memory.nbytes < nbytes:
            del memory
            self._memories.pop(name, None)  # freed first: there may be no room for both
            memory = self._memories[name] = self._device.allocate(nbytes, self._stream)
        return memory

    def host(self, name: str, nbytes: int) -> np.ndarray:
        """(nbytes,) uint8, pinned. No copy of this tensor may be under way."""
        host = self._hosts.get(name)
        if host is None or host.size < nbytes:
            del host
            self._hosts.pop(name, None)
            host = self._hosts[name] = self._device.pinned(nbytes)
        return host[:nbytes]

    def stage(self, name: str, array: np.ndarray) -> Memory:
        """Queue the copy of a C-contiguous array to the device memory of a tensor."""
        memory, host = self.memory(name, array.nbytes), self.host(name, array.nbytes)
        source = array.reshape(-1).view(np.uint8)
        for start in range(0, source.size, PIECE):
            piece = host[start : start + PIECE]
            piece[:] = source[start : start + PIECE]
            memory.write(piece, self._stream, start)
        return memory

    def clear(self) -> None:
        self._memories.clear()
        self._hosts.clear()
