"""Tiles of keys and of query rows, as the kernels of interval attention load them; letters as in attention.py."""

import triton
import triton.language as tl


@triton.jit
def load_tile(ptr, row, stride, inside, DIM: tl.constexpr, PAD_DIM: tl.constexpr, CHECK: tl.constexpr):
    """[rows, PAD_DIM] tile of the given rows; channels past DIM, and rows outside if CHECK, are 0."""
    dim = tl.arange(0, PAD_DIM)
    at = ptr + row[:, None] * stride + dim[None, :]
    if CHECK:
        return tl.load(at, mask=inside[:, None] & (dim < DIM)[None, :], other=0.0)
    elif DIM != PAD_DIM:
        return tl.load(at, mask=(dim < DIM)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def row_offsets(row, stride_t, stride_h, GROUP: tl.constexpr):
    """Element offset of each (token, head of the group) row in a [T, G, D] view."""
    return (row // GROUP).to(tl.int64) * stride_t + (row % GROUP) * stride_h


@triton.jit
def load_key_tile(k_ptr, v_ptr, j, stride_k, stride_v, inside, DIM, PAD_DIM: tl.constexpr, CHECK: tl.constexpr):
    """Keys and values of the indices j."""
    k = load_tile(k_ptr, j, stride_k, inside, DIM, PAD_DIM, CHECK)
    v = load_tile(v_ptr, j, stride_v, inside, DIM, PAD_DIM, CHECK)
    return k, v


@triton.jit
def load_row_block(
    q_ptr, do_ptr, lse_ptr, delta_ptr, block, q_t, q_h, do_t, do_h, rows,
    GROUP: tl.constexpr, DIM: tl.constexpr, PAD_DIM: tl.constexpr, ROWS: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Queries, output gradients, softmax sums and deltas of one block of rows."""
    lane = tl.arange(0, ROWS)
    row = block * ROWS + lane
    inside = row < rows
    if ROWS % GROUP == 0:  # one 64-bit offset for the block, 32-bit ones within it
        token = tl.cast(block * (ROWS // GROUP), tl.int64)
        q_at = (lane // GROUP) * q_t + (lane % GROUP) * q_h
        do_at = (lane // GROUP) * do_t + (lane % GROUP) * do_h
        q = load_tile(q_ptr + token * q_t, q_at, 1, inside, DIM, PAD_DIM, CHECK)
        do = load_tile(do_ptr + token * do_t, do_at, 1, inside, DIM, PAD_DIM, CHECK)
    else:
        q = load_tile(q_ptr, row_offsets(row, q_t, q_h, GROUP), 1, inside, DIM, PAD_DIM, CHECK)
        do = load_tile(do_ptr, row_offsets(row, do_t, do_h, GROUP), 1, inside, DIM, PAD_DIM, CHECK)
    if CHECK:
        lse = tl.load(lse_ptr + row, mask=inside, other=float("inf"))
        delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
    else:
        lse = tl.load(lse_ptr + row)
        delta = tl.load(delta_ptr + row)
    return q, do, lse, delta
