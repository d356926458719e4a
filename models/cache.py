"""The cache of a whole model, in the form that transformers' `generate` expects.

Shapes: B batch.
"""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Cache

from models.files import atomic_path
from models.mixer import MixerState

if TYPE_CHECKING:
    from models.modeling import HybridModel


class HybridCache(Cache):
    """One state a layer. Unless a layer attends to everything, its size never changes after construction.

    Args:
        states: the states of the layers, in order.
        batch: rows B.

    Attributes:
        columns: columns of the batch seen so far, padding included (what transformers calls the sequence length).
    """

    def __init__(self, states: list[MixerState], batch: int):
        super().__init__(layers=[])
        self.states = states
        self.batch = batch
        self.columns = 0

    @classmethod
    def allocate(cls, model: HybridModel, batch: int) -> HybridCache:
        """An empty cache for `batch` rows, in the model's dtype and on its device.

        Raises:
            ValueError: a number that isn't one of rows.
        """
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch={batch!r} must be a whole number of at least 1 row")
        weight = model.embed_tokens.weight
        with torch.inference_mode(False):  # else later calls outside of that mode couldn't write
            states = [layer.mixer.allocate_state(batch, weight.dtype, weight.device) for layer in model.layers]
        return cls(states, batch)

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(state.nbytes for state in self.states)

    @property
    def rule(self) -> dict[str, str]:
        """Rows, and the slots and the policy of the layers that evict; several values where layers differ."""
        rules = [state.rule for state in self.states if state.rule]
        names = rules[0] if rules else {}
        shared = {name: ", ".join(dict.fromkeys(str(rule[name]) for rule in rules)) for name in names}
        return {"batch": str(self.batch), **shared}

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return (
            f"HybridCache({len(self.states)} layers, batch {self.batch}, {self.columns} columns, {self.nbytes} bytes)"
        )

    def check(self, batch: int, layers: int) -> None:
        """Raises ValueError: it was made for other rows, or for a model with other layers."""
        if self.batch != batch:
            raise ValueError(
                f"past_key_values has {self.batch} rows, the input {batch}; allocate a cache of that size"
            )
        if len(self.states) != layers:
            raise ValueError(
                f"past_key_values has {len(self.states)} layers, the model {layers}; use the cache of this model"
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far: `generate` takes what follows them in its input as new."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no limit."""
        return -1

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def batch_size(self) -> int:
        return self.batch

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        for state in self.states:
            state.reset()
        self.columns = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes the former row beam_idx[b]. Raises: ValueError for another number of rows."""
        if tuple(beam_idx.shape) != (self.batch,):
            raise ValueError(f"beam_idx {tuple(beam_idx.shape)} must name a former row for each of {self.batch} rows")
        for state in self.states:
            state.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: what was evicted can't be brought back."""
        raise ValueError("a HybridCache can't be cropped: evicted tokens are gone; use a copy made earlier")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Raises ValueError: the number of rows is fixed."""
        raise ValueError("the rows of a HybridCache are fixed; make another one with model.new_cache(rows)")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Raises ValueError: the number of rows is fixed."""
        raise ValueError("the rows of a HybridCache are fixed; make another one with model.new_cache(rows)")

    def update(self, *args, **kwargs):
        """Raises ValueError: another kind of model calls it."""
        raise ValueError("past_key_values: a HybridCache holds no keys of this model; use the model that made it")

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for saving."""
        found: dict[str, Tensor] = {}
        for layer, state in enumerate(self.states):
            _collect(state, f"{layer}", found)
        return found

    def save(self, path: Path | str, metadata: dict[str, str] | None = None) -> None:
        """Write the cache to a safetensors file, whole or not at all.

        Args:
            metadata: strings to keep with it (a model's fingerprint, say), beside the rule and the columns.

        Raises:
            OSError: it couldn't be written; a file that was there before is whole.
        """
        tensors = {name: x.contiguous() for name, x in self.tensors().items()}
        extra = {"columns": str(self.columns), "rule": json.dumps(self.rule), **(metadata or {})}
        with atomic_path(Path(path)) as temporary:
            try:
                save_file(tensors, temporary, metadata=extra)
            except SafetensorError as error:
                raise OSError(f"{path} could not be written ({error}); make room on the disk") from error

    def load(self, path: Path | str, expect: dict[str, str] | None = None) -> dict[str, str]:
        """Fill this cache from a file written by `save`.

        Args:
            expect: metadata that the file must have.

        Returns:
            The file's metadata.

        Raises:
            ValueError: not such a file, other metadata, another rule, or tensors that don't fit this cache.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                loaded = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a session file ({error}); start a new one") from error
        for key, value in (expect or {}).items():
            if metadata.get(key) != value:
                raise ValueError(
                    f"{path} belongs to another model, or this one in another form ({key} is {metadata.get(key)!r}, "
                    f"here {value!r}); use what wrote it, or another file"
                )
        if "rule" in metadata:
            _refuse_another_rule(path, json.loads(metadata["rule"]), self.rule)
        if not {"columns", "rule"} <= metadata.keys() or self.tensors().keys() != loaded.keys():
            raise ValueError(f"{path} is not a session of this model: it holds other tensors; start a new one")
        own = self.tensors()
        for name, x in own.items():
            fits = x.shape == loaded[name].shape or self._grows(name, x, loaded[name])
            if not fits or x.dtype != loaded[name].dtype:
                raise ValueError(
                    f"{path}: {name} is {tuple(loaded[name].shape)} {loaded[name].dtype}, this model's cache has "
                    f"{tuple(x.shape)} {x.dtype}; use the model, budget and dtype that wrote it"
                )
        self._grow_to(loaded)
        for name, x in self.tensors().items():
            x.copy_(loaded[name])
        self.columns = int(metadata["columns"])
        return metadata

    def _grows(self, name: str, x: Tensor, saved: Tensor) -> bool:
        """Whether x grows with the text, [B, H, tokens, D], and differs from the saved tensor in tokens at most."""
        if not self.states[int(name.split(".")[0])].bytes_per_token or x.ndim != 4 or saved.ndim != 4:
            return False
        return x[:, :, :0].shape == saved[:, :, :0].shape

    @torch.inference_mode(False)
    def _grow_to(self, loaded: dict[str, Tensor]) -> None:
        """Give the tensors that grow as many tokens as the saved ones have."""
        for name, x in self.tensors().items():
            layer, *path, last = name.split(".")
            if x.shape != loaded[name].shape:
                owner = reduce(getattr, path, self.states[int(layer)])
                setattr(owner, last, x.new_zeros(loaded[name].shape))


def _refuse_another_rule(path: Path | str, saved: dict[str, str], own: dict[str, str]) -> None:
    """Raises ValueError naming what differs. Caches of other kinds of layers are told apart by their tensors."""
    if saved.keys() != own.keys() or saved == own:
        return
    names = [name for name in own if saved[name] != own[name]]
    there, here = (", ".join(f"{name}={rule[name]}" for name in names) for rule in (saved, own))
    raise ValueError(f"{path} was written with {there}, this cache has {here}; use {there}, or another file")


def _collect(value: object, prefix: str, found: dict[str, Tensor]) -> None:
    """Tensors of a state, found through attributes and tuples."""
    if isinstance(value, Tensor):
        found[prefix] = value
    elif isinstance(value, tuple | list):
        for index, entry in enumerate(value):
            _collect(entry, f"{prefix}.{index}", found)
    elif hasattr(value, "__dict__"):
        for name, entry in vars(value).items():
            _collect(entry, f"{prefix}.{name}", found)


@torch.no_grad()
def cache_bytes(model: HybridModel, batch: int = 1, dtype: torch.dtype | None = None) -> tuple[int, int]:
    """Bytes of a cache of `batch` rows, found on the meta device: of the layers that never grow, and the growth of
    the others with every token of the rows.

    Args:
        dtype: of keys, values and convolution states; the model's by default.
    """
    dtype = dtype or model.embed_tokens.weight.dtype
    states = [layer.mixer.allocate_state(batch, dtype, torch.device("meta")) for layer in model.layers]
    fixed = sum(state.nbytes for state in states if not state.bytes_per_token)
    return fixed, batch * sum(state.bytes_per_token for state in states)
