"""Memory that launches of a kernel hand on to each other, zero between them."""

import torch
from torch import Tensor


class StreamState:
    """Words on a GPU that are zero before a launch and zero again after it, so that a stream needs them only once."""

    def __init__(self, words: int, device: torch.device) -> None:
        """words: of 32 bits. device: the GPU."""
        self.words, self.device = words, device
        self.of_stream: dict[int, Tensor] = {}

    def current(self) -> Tensor:
        """int32 (words,), for a launch on the current stream; while a graph is captured, one of the graph's own."""
        if torch.cuda.is_current_stream_capturing():
            return self._zeros()
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        if stream not in self.of_stream:
            self.of_stream[stream] = self._zeros()
        return self.of_stream[stream]

    def forget(self) -> None:
        """After a launch that was cut off, when they may hold anything: begin anew."""
        self.of_stream.clear()

    def _zeros(self) -> Tensor:
        return torch.zeros(self.words, dtype=torch.int32, device=self.device)
