"""The retention scorer's convolutions, forward and backward: dilated taps as matrix products, nothing unfolded.

A layer is one kernel each way: a tile of tokens reads its inputs straight from the layer before, applies SiLU and
dropout to them in registers, and multiplies with each tap's matrix. Only what a layer gives before its SiLU is kept;
dropout is a hash of a seed and an element's number, so the backward pass draws it again instead of reading a mask.

Letters in shape suffixes: B batch, T tokens, H KV heads, C input and O output channels of a layer, S stacks (H, or 1
if heads share one), K taps, P shares of the tokens, N numbers of all parameters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lte.kernels.launch import on_device
from lte.kernels.scorer_products import backward_kernel, convolve_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS, SINGLE_ROWS = 128, 32  # tokens of a tile, in 16 bits and in float32
CHANNELS, SINGLE_CHANNELS = 128, 32  # input channels of a product
BACKWARD_TILES = ((64, 2), (32, 2), (32, 1), (16, 1))  # tokens of a tile and pipeline stages, the best first
BACKWARD_CHANNELS, SINGLE_BACKWARD_CHANNELS = 64, 32
ACCUMULATORS, SINGLE_ACCUMULATORS = 24576, 8192  # of a backward program, for the weight's gradient
HELD = 24576  # numbers in registers with which two backward programs share a multiprocessor
PROGRAMS = 264  # of a backward pass: two a multiprocessor of a large device
LARGE_SHARED_BYTES = 200 * 1024  # of Hopper's kind
SHARED_BYTES = {True: 160 * 1024, False: 80 * 1024}  # that tiles may take, on such devices and on others


@dataclass(frozen=True)
class Layer:
    """One convolution of a call: its sizes, and what is done to its inputs."""

    channels: int
    outputs: int
    taps: int
    dilation: int
    reach: int
    activated: bool
    dropout: float
    salt: int
    is_last: bool

    def constants(self, dtype: torch.dtype, has_documents: bool, is_shared: bool) -> dict[str, int | bool | str]:
        """Compile-time arguments that all kernels share."""
        return dict(
            IN=self.channels,
            OUT=self.outputs,
            PAD_OUT=_padded(self.outputs),
            TAPS=self.taps,
            DILATION=self.dilation,
            REACH=self.reach,
            ACTIVATED=self.activated,
            DROPS=self.dropout > 0,
            SALT=self.salt,
            HAS_DOCUMENTS=has_documents,
            PRECISION="ieee" if dtype == torch.float32 else "tf32",
            IS_LAST=self.is_last,
            SHARED=is_shared,
        )

    def noise(self) -> tuple[int, float]:
        """What a hash must reach for an element to stay (of 2 ** 16), and the factor of those that do."""
        return round(self.dropout * 2**16), 1 / (1 - self.dropout)


def _rows(dtype: torch.dtype) -> int:
    return SINGLE_ROWS if dtype == torch.float32 else ROWS


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    """Shared memory to plan with."""
    large = True
    if device.type == "cuda":
        large = torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= LARGE_SHARED_BYTES
    return SHARED_BYTES[large]


@functools.cache
def _layers(
    channels: tuple[int, ...], sizes: tuple[int, ...], dilations: tuple[int, ...], dropout: float
) -> tuple[Layer, ...]:
    return tuple(
        Layer(c, o, taps, dilation, (taps - 1) // 2 * dilation, index > 0, dropout, index, index == len(sizes) - 1)
        for index, (c, o, taps, dilation) in enumerate(
            zip(channels[:-1], channels[1:], sizes, dilations, strict=True)
        )
    )


@functools.cache
def _forward_plan(
    layer: Layer, dtype: torch.dtype, device: torch.device, has_documents: bool, is_shared: bool
) -> dict[str, int | bool | str]:
    """Constants, tiles, warps and pipeline stages of a convolution: two stages where they fit."""
    rows = _rows(dtype)
    block = min(_padded(layer.channels), SINGLE_CHANNELS if dtype == torch.float32 else CHANNELS)
    # inputs may lie in float32
    tile = block * (rows * 4 + _padded(layer.outputs) * dtype.itemsize)
    stages = 2 if 2 * tile <= _shared_bytes(device) else 1
    warps = 8 if layer.channels > 64 and rows == ROWS else 4
    # two programs of 8 warps share a multiprocessor if a thread has 128 registers; these tiles need hardly more
    limited = 64 < layer.channels <= 128 and layer.outputs <= 64 and device.type == "cuda"
    return dict(
        **layer.constants(dtype, has_documents, is_shared),
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
        num_stages=stages,
        **({"maxnreg": 128} if limited else {}),
    )


@functools.cache
def _backward_plan(
    layer: Layer, dtype: torch.dtype, device: torch.device, has_documents: bool, is_shared: bool
) -> dict[str, int | bool | str]:
    """Constants, tiles, warps and pipeline stages of a layer's backward pass: the first tiles that fit."""
    single = dtype == torch.float32
    columns = layer.taps * _padded(layer.outputs)
    limit = (SINGLE_ACCUMULATORS if single else ACCUMULATORS) // columns
    most = SINGLE_BACKWARD_CHANNELS if single else BACKWARD_CHANNELS
    block = min(_padded(layer.channels), most, max(16, 1 << (limit.bit_length() - 1)))
    # what comes from the layers after the first may lie in float32
    row = block * 4 + columns * (4 if layer.is_last else dtype.itemsize)
    weights = columns * block * dtype.itemsize
    tiles = BACKWARD_TILES[1:] if single else BACKWARD_TILES
    rows, stages = next(((r, s) for r, s in tiles if r * s * row + weights <= _shared_bytes(device)), tiles[-1])
    # two programs share a multiprocessor if a thread has 128 registers
    held = columns * block + (4 if layer.activated else 2) * rows * block
    held += 4 * rows * _padded(layer.outputs) if layer.is_last else 0
    aligned = layer.outputs == _padded(layer.outputs)
    limited = not single and aligned and held <= HELD and device.type == "cuda"
    return dict(
        **layer.constants(dtype, has_documents, is_shared),
        ROWS=rows,
        BLOCK=block,
        num_warps=8,
        num_stages=stages,
        **({"maxnreg": 128} if limited else {}),
    )


def _strides(x: Tensor, is_first: bool) -> tuple[int, int, int]:
    """Steps of batch, head and token in [B, T, H, C] (what the first layer reads) or [B, H, T, C]."""
    x_b, x_h, x_t, _ = x.stride()
    return (x_b, x_t, x_h) if is_first else (x_b, x_h, x_t)


def _kept_dtype(is_first: bool, dtype: torch.dtype) -> torch.dtype:
    """Of what a layer gives before its SiLU: float32, for SiLU's result is rounded again.

    The first layer's, by far the largest, stays in the dtype of the products (docs/kernels.md, the scorer).
    """
    return dtype if is_first else torch.float32


def _convolve(
    layer: Layer,
    x: Tensor,
    w_SKCO: Tensor,
    bias_SO: Tensor,
    document_BT: Tensor | None,
    seed: Tensor | None,
    z_BHTO: Tensor,
    last: tuple[Tensor | None, Tensor | None, Tensor | None],
    strides: tuple[int, int, int],
    source: int,
    *,
    is_first: bool,
    activates: bool = False,
) -> None:
    """Fill z; of the last layer also the logits [B, T, H] of `last`, its weight, bias and logits.

    Args:
        activates: SiLU of z takes z's place.
    """
    batch, heads, tokens, _ = z_BHTO.shape
    dtype = w_SKCO.dtype
    convolve_kernel[(triton.cdiv(tokens, _rows(dtype)), batch * heads)](
        x, w_SKCO, bias_SO, z_BHTO, document_BT, seed, *last, *strides, heads, tokens, source, *layer.noise(),
        ROUNDS=_kept_dtype(is_first, dtype) == dtype, ACTIVATES=activates,
        **_forward_plan(layer, dtype, x.device, document_BT is not None, len(w_SKCO) == 1),
    )  # fmt: skip


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTHC, document_BT, layers, *parameters):
        batch, tokens, heads, _ = x_BTHC.shape
        dtype, device = x_BTHC.dtype, x_BTHC.device
        weights = [w.to(dtype).contiguous() for w in parameters[: len(layers)]]
        *biases, out_weight_SO, out_bias_S = (p.contiguous() for p in parameters[len(layers) :])
        seed = None
        if layers[0].dropout:
            # drawn on the device: nothing waits, and checkpointed layers draw it again
            seed = torch.randint(2**31 - 1, (1,), dtype=torch.int32, device=device)
        logits_BTH = torch.empty(batch, tokens, heads, dtype=torch.float32, device=device)
        kept = [x_BTHC]
        with on_device(x_BTHC):
            for layer, weight, bias in zip(layers, weights, biases, strict=True):
                x, is_first = kept[-1], not layer.activated
                kept_dtype = _kept_dtype(is_first, dtype)
                kept.append(torch.empty(batch, heads, tokens, layer.outputs, dtype=kept_dtype, device=device))
                last = (out_weight_SO, out_bias_S, logits_BTH) if layer.is_last else (None, None, None)
                strides = _strides(x, is_first)
                _convolve(
                    layer, x, weight, bias, document_BT, seed, kept[-1], last, strides, tokens, is_first=is_first
                )
        ctx.save_for_backward(document_BT, seed, out_weight_SO, *kept, *weights)
        ctx.layers, ctx.parameters = layers, [(p.shape, p.dtype) for p in parameters]
        return logits_BTH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_BTH):
        document_BT, seed, out_weight_SO, *rest = ctx.saved_tensors
        layers = ctx.layers
        kept, weights = rest[: len(layers) + 1], rest[len(layers) + 1 :]
        sizes = [math.prod(shape) for shape, _ in ctx.parameters]
        partial_PN = _partial_sums(layers[0], kept[0], document_BT is not None, len(out_weight_SO), sum(sizes))
        # dz of the last layer is made of its z
        dz, grad_BTH = kept[-1], grad_BTH.contiguous()
        with on_device(grad_BTH):
            for index in reversed(range(len(layers))):
                layer, x, weight = layers[index], kept[index], weights[index]
                bias = len(layers) + index
                # the weight, the biases of the layer before and of this one, the last map's weight and bias
                places = [sum(sizes[:i]) for i in (index, bias - 1, bias, -2, -1)]
                last = (grad_BTH, out_weight_SO) if layer.is_last else (None, None)
                dz = _backward(layer, x, dz, weight, document_BT, seed, last, partial_PN, places)
        return dz, None, None, *_gradients(partial_PN, ctx.parameters, sizes)


def _partial_sums(first: Layer, x_BTHC: Tensor, has_documents: bool, stacks: int, size: int) -> Tensor:
    """Memory for the parameters' gradients: a row for each share of the tokens, and of each head that shares."""
    batch, tokens, heads, _ = x_BTHC.shape
    plan = _backward_plan(first, x_BTHC.dtype, x_BTHC.device, has_documents, stacks == 1)
    # wide layers are shared by their channels too: at most two rounds of programs, or the sums outgrow the inputs
    most = min(PROGRAMS, 2 * PROGRAMS // triton.cdiv(first.channels, plan["BLOCK"])) // heads
    parts = max(1, min(most, batch * triton.cdiv(tokens, plan["ROWS"])))
    rows = parts * (heads if stacks == 1 else 1)
    return torch.empty(rows, size, dtype=torch.float32, device=x_BTHC.device)


def _gradients(
    partial_PN: Tensor, parameters: Sequence[tuple[torch.Size, torch.dtype]], sizes: Sequence[int]
) -> list[Tensor]:
    """The parameters' gradients in their dtypes: one sum for all."""
    total_N = partial_PN.sum(0)
    dtypes = {dtype for _, dtype in parameters}
    if len(dtypes) == 1:
        total_N = total_N.to(dtypes.pop())
    grads = total_N.split(sizes)
    return [grad.view(shape).to(dtype) for grad, (shape, dtype) in zip(grads, parameters, strict=True)]


def _backward(
    layer: Layer,
    x: Tensor,
    dz_BHTO: Tensor,
    w_SKCO: Tensor,
    document_BT: Tensor | None,
    seed: Tensor | None,
    last: tuple[Tensor | None, Tensor | None],
    partial_PN: Tensor,
    places: Sequence[int],
) -> Tensor:
    """The gradient of a layer's inputs before their SiLU; the parameters' sums go into partial, at their places.

    Args:
        dz_BHTO: the gradient of what the layer gives before its SiLU; of the last layer that itself.
        last: gradient of the logits [B, T, H], and the last map's weight, for the last layer.
        places: where in a row of partial the sums of those parameters start that backward_kernel names.
    """
    batch, heads, tokens, _ = dz_BHTO.shape
    is_shared = len(w_SKCO) == 1
    dx = torch.empty_like(x, dtype=w_SKCO.dtype)
    plan = _backward_plan(layer, w_SKCO.dtype, x.device, document_BT is not None, is_shared)
    rows, size = partial_PN.shape
    grid = rows // heads if is_shared else rows, heads, triton.cdiv(layer.channels, plan["BLOCK"])
    backward_kernel[grid](
        dz_BHTO, w_SKCO, x, dx, partial_PN, document_BT, seed, *last, *_strides(x, not layer.activated), batch,
        tokens, size, *places, *layer.noise(), **plan,
    )  # fmt: skip
    return dx


def score(
    x_BTHC: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    out_weight_SO: Tensor,
    out_bias_S: Tensor,
    *,
    dilations: Sequence[int],
    dropout: float = 0.0,
    document_BT: Tensor | None = None,
) -> Tensor:
    """Retention logits [B, T, H] (float32) of whole documents (arXiv 2510.20787), differentiable.

    Args:
        x_BTHC: [k ; v] of all tokens, bfloat16, float16 or float32.
        weights: [S, K, C, O] a layer, S = H or 1; biases: [S, O]. Products are taken in x's dtype.
        out_weight_SO, out_bias_S: the last map, applied in float32.
        dilations: one a layer.
        dropout: before each layer.
        document_BT: integers, equal within a document: no tap reads across a change. None: one document a row.
    """
    channels = [weights[0].shape[2], *(w.shape[3] for w in weights)]
    layers = _layers(tuple(channels), tuple(w.shape[1] for w in weights), tuple(dilations), dropout)
    if document_BT is not None:
        document_BT = document_BT.to(torch.int32).contiguous()
    x_BTHC = x_BTHC.contiguous()
    return _Score.apply(x_BTHC, document_BT, layers, *weights, *biases, out_weight_SO, out_bias_S)


def convolve(
    x_BHSC: Tensor, weight_SKCO: Tensor, bias_SO: Tensor, dilation: int, tokens: int, *, is_first: bool
) -> Tensor:
    """SiLU of one convolution [B, H, T, O], without gradients: output t reads inputs t, t + dilation, …

    It is rounded where `score` rounds it, to the same bits: both forms keep the same tokens.

    Args:
        x_BHSC: inputs of S = T + (K - 1) * dilation tokens, as they are to be multiplied; C contiguous.
        is_first: whether it is the scorer's first layer, whose result `score` keeps in x's dtype ahead of SiLU.
    """
    assert x_BHSC.stride(-1) == 1
    batch, heads, source, channels = x_BHSC.shape
    layer = Layer(channels, bias_SO.shape[1], weight_SKCO.shape[1], dilation, 0, False, 0.0, 0, False)
    weight = weight_SKCO.to(x_BHSC.dtype).contiguous()
    y_BHTO = x_BHSC.new_empty(batch, heads, tokens, layer.outputs)
    with on_device(x_BHSC):
        _convolve(
            layer, x_BHSC, weight, bias_SO.contiguous(), None, None, y_BHTO, (None,) * 3, _strides(x_BHSC, False),
            source, is_first=is_first, activates=True,
        )  # fmt: skip
    return y_BHTO
