"""The retention scorer's convolutions, forward and backward: dilated taps as matrix products, nothing unfolded.

A layer is one kernel: a tile of tokens reads its inputs once a tap, straight from the layer before, applies SiLU and
dropout to them in registers, and multiplies with the tap's matrix. Only what a layer gives before its SiLU is kept;
dropout is a hash of a seed and an element's number, so the backward pass draws it again instead of reading a mask.

Letters in shape suffixes: B batch, T tokens, H KV heads, C input and O output channels of a layer, S stacks (H, or 1
if heads share one), K taps, P partial sums.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lte.kernels.launch import on_device
from lte.kernels.scorer_products import (
    convolve_kernel,
    input_gradient_kernel,
    logits_backward_kernel,
    weight_gradient_kernel,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS, SINGLE_ROWS = 128, 32  # tokens of a tile, in 16 bits and in float32
CHANNELS, SINGLE_CHANNELS = 128, 32  # input channels of a product
ACCUMULATORS, SINGLE_ACCUMULATORS = 32768, 8192  # of a weight gradient's program
PROGRAMS = 264  # of a weight gradient: two a multiprocessor of a large device
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

    def constants(self, dtype: torch.dtype, has_documents: bool) -> dict[str, int | bool | str]:
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
        )

    def noise(self) -> tuple[int, float]:
        """What a hash must reach for an element to stay (of 2 ** 31), and the factor of those that do."""
        return round(self.dropout * 2**31), 1 / (1 - self.dropout)

    def block(self, dtype: torch.dtype) -> int:
        """Input channels of a tile."""
        return min(_padded(self.channels), SINGLE_CHANNELS if dtype == torch.float32 else CHANNELS)


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


def _layers(channels: Sequence[int], sizes: Sequence[int], dilations: Sequence[int], dropout: float) -> list[Layer]:
    return [
        Layer(c, o, taps, dilation, (taps - 1) // 2 * dilation, index > 0, dropout, index)
        for index, (c, o, taps, dilation) in enumerate(
            zip(channels[:-1], channels[1:], sizes, dilations, strict=True)
        )
    ]


def _strides(x: Tensor, is_first: bool) -> tuple[int, int, int]:
    """Steps of batch, head and token in [B, T, H, C] (what the first layer reads) or [B, H, T, C]."""
    return (x.stride(0), x.stride(2), x.stride(1)) if is_first else (x.stride(0), x.stride(1), x.stride(2))


def _kept_dtype(is_first: bool, dtype: torch.dtype) -> torch.dtype:
    """Of what a layer gives before its SiLU: float32, for SiLU's result is rounded again.

    The first layer's, by far the largest, stays in the dtype of the products (docs/kernels.md, the scorer).
    """
    return dtype if is_first else torch.float32


def _per_head(x_S: Tensor) -> int:
    """Step from one head's parameters to the next: 0 where heads share them."""
    return 0 if len(x_S) == 1 else x_S.stride(0)


def _convolve(
    layer: Layer,
    x: Tensor,
    w_SKCO: Tensor,
    bias_SO: Tensor,
    document_BT: Tensor | None,
    seed: Tensor,
    z_BHTO: Tensor,
    last: tuple[Tensor, Tensor, Tensor] | None,
    strides: tuple[int, int, int],
    source: int,
) -> None:
    """Fill z; with the `last` weight, bias and logits [B, T, H] those too."""
    batch, heads, tokens, _ = z_BHTO.shape
    weight, bias, logits = (bias_SO, bias_SO, z_BHTO) if last is None else last
    dtype = w_SKCO.dtype
    convolve_kernel[(triton.cdiv(tokens, _rows(dtype)), batch * heads)](
        x, w_SKCO, bias_SO, z_BHTO, seed if document_BT is None else document_BT, seed, weight, bias, logits,
        *strides, heads, _per_head(w_SKCO), _per_head(bias_SO), 0 if last is None or len(bias) == 1 else 1,
        tokens, source, *layer.noise(),
        **layer.constants(dtype, document_BT is not None), HAS_LOGITS=last is not None,
        **_options(layer, dtype, x.device), **_register_limit(layer, x),
    )  # fmt: skip


def _options(layer: Layer, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """Tiles, warps and pipeline stages of a layer's products over tiles of tokens: two stages where they fit."""
    rows = _rows(dtype)
    # inputs may lie in float32
    tile = layer.block(dtype) * (rows * 4 + _padded(layer.outputs) * dtype.itemsize)
    stages = 2 if 2 * tile <= _shared_bytes(device) else 1
    warps = 8 if layer.channels > 64 and rows == ROWS else 4
    return dict(ROWS=rows, BLOCK=layer.block(dtype), num_warps=warps, num_stages=stages)


def _register_limit(layer: Layer, x: Tensor) -> dict[str, int]:
    """Two programs of 8 warps share a multiprocessor if a thread has 128 registers; these tiles need hardly more."""
    return {"maxnreg": 128} if 64 < layer.channels <= 128 and layer.outputs <= 64 and x.is_cuda else {}


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTHC, document_BT, layers, out_weight_SO, out_bias_S, *parameters):
        batch, tokens, heads, _ = x_BTHC.shape
        dtype = x_BTHC.dtype
        weights = [w.to(dtype).contiguous() for w in parameters[: len(layers)]]
        biases = [b.contiguous() for b in parameters[len(layers) :]]
        # drawn on the device: nothing waits, and checkpointed layers draw it again
        seed = torch.randint(2**31 - 1, (1,), dtype=torch.int32, device=x_BTHC.device)
        logits_BTH = torch.empty(batch, tokens, heads, dtype=torch.float32, device=x_BTHC.device)
        out_weight_SO = out_weight_SO.contiguous()
        kept = [x_BTHC]
        with on_device(x_BTHC):
            for layer, weight, bias in zip(layers, weights, biases, strict=True):
                x = kept[-1]
                kept_dtype = _kept_dtype(layer is layers[0], dtype)
                kept.append(torch.empty(batch, heads, tokens, layer.outputs, dtype=kept_dtype, device=x.device))
                last = (out_weight_SO, out_bias_S, logits_BTH) if layer is layers[-1] else None
                strides = _strides(x, not layer.activated)
                _convolve(layer, x, weight, bias, document_BT, seed, kept[-1], last, strides, tokens)
        ctx.save_for_backward(document_BT, seed, out_weight_SO, out_bias_S, *kept, *weights)
        ctx.layers, ctx.dtypes = layers, [p.dtype for p in parameters]
        return logits_BTH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_BTH):
        document_BT, seed, out_weight_SO, out_bias_S, *rest = ctx.saved_tensors
        layers = ctx.layers
        kept, weights = rest[: len(layers) + 1], rest[len(layers) + 1 :]
        grad_weights, grad_biases = [], []
        with on_device(grad_BTH):
            dz_BHTO, grad_out_weight, grad_out_bias = _logits_backward(
                grad_BTH.contiguous(), kept[-1], out_weight_SO, kept[0].dtype
            )
            for layer, x, weight in reversed(list(zip(layers, kept, weights, strict=False))):
                grad_weight, grad_bias = _weight_gradient(layer, x, dz_BHTO, document_BT, seed, len(weight))
                grad_weights.insert(0, grad_weight)
                grad_biases.insert(0, grad_bias)
                dz_BHTO = _input_gradient(layer, x, dz_BHTO, weight, document_BT, seed)
        grads = [g.to(dtype) for g, dtype in zip([*grad_weights, *grad_biases], ctx.dtypes, strict=True)]
        return (
            dz_BHTO,
            None,
            None,
            grad_out_weight.to(out_weight_SO.dtype),
            grad_out_bias.to(out_bias_S.dtype),
            *grads,
        )


def _logits_backward(
    grad_BTH: Tensor, z_BHTO: Tensor, out_weight_SO: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """dz of the last layer in `dtype`, and the gradients of the last weight [S, O] and bias [S] (float32)."""
    batch, heads, tokens, outputs = z_BHTO.shape
    dz_BHTO = torch.empty_like(z_BHTO, dtype=dtype)
    blocks = triton.cdiv(tokens, ROWS)
    partial = torch.empty(blocks * batch, heads, outputs + 1, dtype=torch.float32, device=z_BHTO.device)
    logits_backward_kernel[(blocks, batch * heads)](
        grad_BTH, z_BHTO, out_weight_SO, dz_BHTO, partial, heads, int(len(out_weight_SO) > 1), tokens,
        OUT=outputs, PAD_OUT=_padded(outputs), ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    total_HO = _of_stacks(partial.sum(0), len(out_weight_SO))
    return dz_BHTO, total_HO[:, :-1], total_HO[:, -1]


def _input_gradient(
    layer: Layer, x: Tensor, dz_BHTO: Tensor, w_SKCO: Tensor, document_BT: Tensor | None, seed: Tensor
) -> Tensor:
    batch, heads, tokens, _ = dz_BHTO.shape
    dtype = dz_BHTO.dtype
    dx = torch.empty_like(x, dtype=dtype)
    options = _options(layer, dtype, x.device)
    grid = triton.cdiv(tokens, options["ROWS"]), batch * heads, triton.cdiv(layer.channels, options["BLOCK"])
    input_gradient_kernel[grid](
        dz_BHTO, w_SKCO, x, dx, seed if document_BT is None else document_BT, seed,
        *_strides(x, not layer.activated), heads, _per_head(w_SKCO), tokens, *layer.noise(),
        **layer.constants(dtype, document_BT is not None), **options,
    )  # fmt: skip
    return dx


def _weight_gradient(
    layer: Layer, x: Tensor, dz_BHTO: Tensor, document_BT: Tensor | None, seed: Tensor, stacks: int
) -> tuple[Tensor, Tensor]:
    """Gradients of weight [S, K, C, O] and bias [S, O] (float32)."""
    batch, heads, tokens, outputs = dz_BHTO.shape
    taps = triton.next_power_of_2(layer.taps)
    dtype = dz_BHTO.dtype
    limit = SINGLE_ACCUMULATORS if dtype == torch.float32 else ACCUMULATORS
    block = min(layer.block(dtype), max(16, limit // (taps * _padded(outputs))))
    tile = 2 * (block * x.element_size() + taps * _padded(outputs) * dtype.itemsize)  # two stages of a row
    rows = next((rows for rows in (64, 32) if rows * tile <= _shared_bytes(x.device)), 16)
    parts = max(1, min(PROGRAMS // heads, batch * triton.cdiv(tokens, rows)))
    make = lambda *shape: torch.empty(shape, dtype=torch.float32, device=x.device)
    dw_PHKCO, dbias_PHO = make(parts, heads, layer.taps, layer.channels, outputs), make(parts, heads, outputs)
    weight_gradient_kernel[(parts, heads, triton.cdiv(layer.channels, block))](
        dz_BHTO, x, dw_PHKCO, dbias_PHO, seed if document_BT is None else document_BT, seed,
        *_strides(x, not layer.activated), batch, tokens, *layer.noise(),
        **layer.constants(dtype, document_BT is not None),
        ROWS=rows, BLOCK=block, PAD_TAPS=taps, num_warps=8, num_stages=2,
    )  # fmt: skip
    return _of_stacks(dw_PHKCO.sum(0), stacks), _of_stacks(dbias_PHO.sum(0), stacks)


def _of_stacks(grad_H: Tensor, stacks: int) -> Tensor:
    """Gradients of heads summed where they share parameters."""
    return grad_H.sum(0, keepdim=True) if stacks == 1 else grad_H


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
    layers = _layers(channels, [w.shape[1] for w in weights], dilations, dropout)
    if document_BT is not None:
        document_BT = document_BT.to(torch.int32).contiguous()
    x_BTHC = x_BTHC.contiguous()
    return _Score.apply(x_BTHC, document_BT, layers, out_weight_SO, out_bias_S, *weights, *biases)


def convolve(
    x_BHSC: Tensor, weight_SKCO: Tensor, bias_SO: Tensor, dilation: int, tokens: int, *, is_first: bool
) -> Tensor:
    """One convolution before its SiLU [B, H, T, O], without gradients: output t reads inputs t, t + dilation, …

    Args:
        x_BHSC: inputs of S = T + (K - 1) * dilation tokens, as they are to be multiplied; C contiguous.
        is_first: whether it is the scorer's first layer, whose result is in x's dtype, others' in float32.
    """
    assert x_BHSC.stride(-1) == 1
    batch, heads, source, channels = x_BHSC.shape
    layer = Layer(channels, bias_SO.shape[1], weight_SKCO.shape[1], dilation, 0, False, 0.0, 0)
    weight = weight_SKCO.to(x_BHSC.dtype).contiguous()
    dtype = _kept_dtype(is_first, x_BHSC.dtype)
    z_BHTO = torch.empty(batch, heads, tokens, layer.outputs, dtype=dtype, device=x_BHSC.device)
    with on_device(x_BHSC):
        strides = _strides(x_BHSC, False)
        _convolve(layer, x_BHSC, weight, bias_SO.contiguous(), None, x_BHSC, z_BHTO, None, strides, source)
    return z_BHTO
