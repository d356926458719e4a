"""Checkpoints of a model that is sharded over ranks: every rank writes its part, any number of ranks reads it.

The files are safetensors, written and read by torch.distributed.checkpoint, which cuts them anew for whoever reads:
FSDP2 over another number of ranks, or a whole model on one. Weights and buffers keep their names; what the optimizer
holds of a parameter is `optimizer.<parameter>.<name>`.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

FOLDER = "sharded"
PREFIX = "optimizer."


def is_sharded(checkpoint: Path) -> bool:
    """Whether a checkpoint holds parts of ranks instead of whole files."""
    return (checkpoint / FOLDER).is_dir()


def save(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write this rank's part; all ranks call it together.

    model: with plain or sharded parameters; optimizer: over the same ones.
    """
    state = {**weights(model), **moments(model, optimizer)}
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(checkpoint / FOLDER), save_distributed=True))


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Read into a model, in place, or into its optimizer if that is given; all ranks call it together."""
    reader = dcp.HuggingFaceStorageReader(str(checkpoint / FOLDER))
    if optimizer is None:
        _read(weights(model), reader)
        return
    state, saved = {}, reader.read_metadata().state_dict_metadata
    parameters = dict(model.named_parameters())
    for name in sorted(saved):
        if name.startswith(PREFIX):
            owner, _, key = name.removeprefix(PREFIX).rpartition(".")
            parameter = parameters[owner].detach()
            state[name] = torch.zeros_like(parameter) if saved[name].size else _count(0.0, parameter, optimizer)
            optimizer.state[parameters[owner]][key] = state[name]
    _read(state, reader)


def _read(state: dict[str, Tensor], reader: dcp.HuggingFaceStorageReader) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process reads it all
        dcp.load(state, storage_reader=reader)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors by name, not copied; tied ones once."""
    found, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


def gather(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The whole weights of a sharded model on the CPU, on the ranks that keep them; all ranks call it together."""
    found = {}
    for name, tensor in weights(model).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = whole.cpu()
    return found


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer holds of each parameter that it has moved."""
    return {
        f"{PREFIX}{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def spread_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Put the state of an optimizer over a whole model, as `optimizer.state_dict()` gave it, into a sharded one's."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in state["param_groups"] for n in group["params"]]
    for number, parameter in zip(numbers, held, strict=True):
        for key, value in state["state"].get(number, {}).items():
            if value.ndim == 0:
                value = _count(float(value), parameter, optimizer)
            else:
                value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
            optimizer.state[parameter][key] = value


def _count(steps: float, parameter: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """A parameter's number of steps, where the optimizer wants it: fused ones read it on the device."""
    device = parameter.device if optimizer.defaults.get("fused") else "cpu"
    return torch.tensor(steps, dtype=torch.float32, device=device)


def shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every weight and buffer of a sharded checkpoint, from the files' headers."""
    saved = dcp.HuggingFaceStorageReader(str(checkpoint / FOLDER)).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in saved.items() if not name.startswith(PREFIX)}
