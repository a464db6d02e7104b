"""Bytes that PyTorch operations move and keep alive, counted while they run on any device."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Context manager that watches every PyTorch operation run inside it.

    Each operation counts as one kernel that reads its inputs from memory once and writes its outputs once; views move
    nothing. That is the traffic of a GPU whose caches hold nothing from one kernel to the next.

    moved: operation's name -> bytes read and written.
    alive, peak: bytes, now and at most, of the buffers made inside that some tensor still looks into. A buffer counts
    whole, and until its last tensor is gone; buffers that already existed before do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved: dict[str, int] = {}
        self.alive = self.peak = 0
        self._users: dict[int, int] = {}  # address of a buffer made inside -> number of tensors that look into it

    @property
    def moved_bytes(self) -> int:
        """Bytes read and written by all operations together."""
        return sum(self.moved.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run one operation and count it; called by PyTorch."""
        result = func(*args, **(kwargs or {}))
        taken = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        old = {x.untyped_storage().data_ptr() for x in taken}
        for x in made:
            self._watch(x, new=x.untyped_storage().data_ptr() not in old)
        name = str(func).removeprefix("aten.").split(".")[0]
        if not (func.is_view or name == "_unsafe_view"):
            self.moved[name] = self.moved.get(name, 0) + sum(x.nbytes for x in taken + made)
        return result

    def _watch(self, x: torch.Tensor, new: bool) -> None:
        address, size = x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
        if new and address not in self._users:
            self._users[address] = 0
            self.alive += size
            self.peak = max(self.peak, self.alive)
        if address in self._users:
            self._users[address] += 1
            weakref.finalize(x, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._users[address] -= 1
        if self._users[address] == 0:
            del self._users[address]
            self.alive -= size
