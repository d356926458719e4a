"""Modes that watch the operations of PyTorch: how many there are, and whether the host waits for a number."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class CountOps(TorchDispatchMode):
    """Counts operations by name, in `names`."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class NoReading(TorchDispatchMode):
    """Raises where a number is read from a tensor (int, float, bool, item), which would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ != "_local_scalar_dense", "a tensor is read"
        return func(*args, **(kwargs or {}))
