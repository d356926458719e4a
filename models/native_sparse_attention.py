"""Native sparse attention: compressed, selected and window branch with a gate each (Yuan et al., arXiv 2502.11089).

Parameters and arithmetic agree with flash-linear-attention's layer of that name, so that weights can be exchanged:
blocks are compressed by their mean, queries and keys are rotated first, and its window_size counts keys as
nsa_window does, the query's own included.

Shapes: B batch, T tokens, C hidden size (in the state: blocks), N query heads, H KV heads, D head dimension,
K slots, M real tokens of all rows.
"""

from __future__ import annotations

import warnings
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte.attention import interval_attention
from lte.visibility import NEVER
from models import fla_adapter, nsa_reference
from models.config import HybridConfig
from models.mixer import Context, Mixer, MixerOutput
from models.ops import rotate

BRANCHES = 3


class NativeSparseState:
    """Keys, values and block means of all tokens of a layer: memory doubles whenever the tokens outgrow it.

    Args:
        batch: rows B.
        heads: KV heads H.
        head_dim: D.
        block_size: tokens in a block.
        dtype, device: of keys and values.

    Attributes:
        k, v: [B, H, K, D]; position p of a row lies in slot p, and K is a multiple of the block size.
        pooled_k, pooled_v: [B, H, K / block_size, D], means of the blocks; without meaning for those not full yet.
        seen: [B] real tokens of each row so far.
        longest: int64 on the CPU; no row has more tokens, so that slicing never asks the device.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        *,
        block_size: int,
        capacity: int = 256,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.block_size = block_size
        blocks = -(-capacity // block_size)
        self.k = torch.zeros(batch, heads, blocks * block_size, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.pooled_k = torch.zeros(batch, heads, blocks, head_dim, dtype=dtype, device=device)
        self.pooled_v = torch.zeros_like(self.pooled_k)
        self.seen = torch.zeros(batch, dtype=torch.int64, device=device)
        self.longest = torch.zeros((), dtype=torch.int64, device="cpu")

    @property
    def nbytes(self) -> int:
        """Bytes allocated, which grow with the tokens."""
        return sum(x.nbytes for x in (self.k, self.v, self.pooled_k, self.pooled_v, self.seen))

    @property
    def bytes_per_token(self) -> int:
        """Growth with every token of a row, its share of a block mean included; memory comes in doubling steps."""
        heads, _, dim = self.k.shape[1:]
        return 2 * heads * dim * self.k.element_size() * (self.block_size + 1) // self.block_size

    @property
    def rule(self) -> dict[str, str | int]:
        """Empty: nothing is evicted."""
        return {}

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        self.seen.zero_()
        self.longest.zero_()

    def reorder(self, index: Tensor) -> None:
        """Row b becomes the former row index[b] (beam search)."""
        for x in (self.k, self.v, self.pooled_k, self.pooled_v, self.seen):
            x.copy_(x.index_select(0, index.to(x.device)))

    def split_off(self) -> NativeSparseState:
        """What gradients may come back through: a copy, since later tokens are written into these places. The state
        itself keeps the numbers and forgets how they were made."""
        read = copy(self)
        for name in ("k", "v", "pooled_k", "pooled_v"):
            setattr(read, name, getattr(self, name).clone())
            setattr(self, name, getattr(self, name).detach())
        return read

    def append(self, k_BTHD: Tensor, v_BTHD: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Take in T new tokens, finite also where padding.

        Args:
            lengths_B: real tokens of each row, at its left; None: all T.

        Returns:
            Slot of each new token [B, T]; -1 for padding.
        """
        length, heads, dim = k_BTHD.shape[1:]
        self._reserve(length)
        slot_BT = self.seen[:, None] + torch.arange(length, device=self.seen.device)
        index_BT = slot_BT
        if lengths_B is not None:
            end_B1 = (self.seen + lengths_B.to(self.seen.device))[:, None]
            index_BT = torch.where(slot_BT < end_B1, slot_BT, -1)
            # the last slot, which is nobody's, takes what is padding
            slot_BT = torch.where(slot_BT < end_B1, slot_BT, self.k.shape[2] - 1)
        row = slot_BT[:, None, :, None].expand(-1, heads, -1, dim)
        self.k.scatter_(2, row, k_BTHD.transpose(1, 2).to(self.k.dtype))
        self.v.scatter_(2, row, v_BTHD.transpose(1, 2).to(self.v.dtype))
        self._pool(length)
        self.seen += length if lengths_B is None else lengths_B.to(self.seen.device)
        return index_BT

    def _reserve(self, length: int) -> None:
        """Room for `length` more tokens, and for a slot that holds none."""
        self.longest += length
        block_size, blocks = self.block_size, self.pooled_k.shape[2]
        needed = int(self.longest) // block_size + 1
        if needed <= blocks:
            return
        extra = max(needed - blocks, blocks)
        with torch.inference_mode(False):  # else later calls outside of that mode couldn't write
            self.k, self.v = (F.pad(x, (0, 0, 0, extra * block_size)) for x in (self.k, self.v))
            self.pooled_k, self.pooled_v = (F.pad(x, (0, 0, 0, extra)) for x in (self.pooled_k, self.pooled_v))

    def _pool(self, length: int) -> None:
        """Means of all blocks that `length` new tokens can have touched."""
        block_size = self.block_size
        device, heads = self.k.device, self.k.shape[1]
        touched = torch.arange((length + block_size - 2) // block_size + 1, device=device)
        block_BC = (self.seen[:, None] // block_size + touched).clamp(max=self.pooled_k.shape[2] - 1)
        slot_BCK = block_BC[..., None] * block_size + torch.arange(block_size, device=device)
        slot_BHK = slot_BCK.flatten(1)[:, None].expand(-1, heads, -1)
        row = block_BC[:, None, :, None].expand(-1, heads, -1, self.k.shape[3])
        for x, pooled in ((self.k, self.pooled_k), (self.v, self.pooled_v)):
            read = x.clone() if x.requires_grad else x  # gather keeps what it has read for the backward pass
            pooled.scatter_(2, row, nsa_reference.pool(nsa_reference.take(read, slot_BHK), block_size))


class NativeSparseAttention(Mixer):
    """Native sparse attention mixer (arXiv 2502.11089).

    On a CUDA device flash-linear-attention's kernels compute the compressed and the selected branch of whole
    documents and of prompts, where the sizes and the dtype suit them (`fla_adapter.nsa_obstacle`); everything else,
    decoding included, is PyTorch, and a warning says so once where the kernels would have been used.

    Args:
        config: the nsa fields of a `HybridConfig`.

    Raises:
        ValueError: nsa fields that don't fit each other.
    """

    def __init__(self, config: HybridConfig):
        super().__init__()
        _check(config)
        self.heads, self.kv_heads, self.head_dim = (
            config.nsa_num_heads,
            config.nsa_num_key_value_heads,
            config.nsa_head_dim,
        )
        self.block_size, self.selected_blocks, self.window = (
            config.nsa_block_size,
            config.nsa_selected_blocks,
            config.nsa_window,
        )
        self.backend = config.attention_backend
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.g_proj = nn.Linear(config.hidden_size, self.heads * BRANCHES, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def allocate_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> NativeSparseState:
        """An empty cache for `batch` rows."""
        return NativeSparseState(
            batch, self.kv_heads, self.head_dim, block_size=self.block_size, dtype=dtype, device=device
        )

    def forward(self, x_BTC: Tensor, context: Context, state: NativeSparseState | None = None) -> MixerOutput:
        """Mix the tokens of x_BTC [B, T, C]; with a state, after the cached ones, updating it in place.

        Raises:
            ValueError: packed documents together with a state.
        """
        if state is not None and context.is_packed:
            raise ValueError("a state holds one document a row: pass rows with lengths instead of cu_seqlens")
        if context.lengths is not None:
            x_BTC = x_BTC.masked_fill((context.documents(*x_BTC.shape[:2], x_BTC.device) < 0)[..., None], 0)
        q = self.q_proj(x_BTC).unflatten(-1, (self.heads, self.head_dim))
        k = self.k_proj(x_BTC).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.v_proj(x_BTC).unflatten(-1, (self.kv_heads, self.head_dim))
        gates = self.g_proj(x_BTC).unflatten(-1, (self.heads, BRANCHES)).sigmoid()
        if context.nsa_rotary is not None:
            q, k = rotate(q, context.nsa_rotary), rotate(k, context.nsa_rotary)
        if state is None:
            blocks, near = self._parallel(q, k, v, gates, context)
        else:
            blocks, near = self._cached(q, k, v, gates, context, state)
        out = blocks + near * gates[..., 2:]
        return MixerOutput(self.o_proj(out.flatten(2)))

    def _parallel(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The two gated block branches, and the window branch without its gate, each [B, T, N, D]."""
        near = nsa_reference.parallel_window(q, k, v, window=self.window, layout=context, backend=self.backend)
        sizes = {"block_size": self.block_size, "selected_blocks": self.selected_blocks}
        if self._has_kernel(q):
            # padding lies behind what is read, so the kernels need no lengths
            return fla_adapter.nsa_blocks(q, k, v, gates, cu_seqlens=context.cu_seqlens, **sizes), near
        return nsa_reference.parallel_blocks(q, k, v, gates, layout=context, **sizes), near

    def _cached(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, context: Context, state: NativeSparseState
    ) -> tuple[Tensor, Tensor]:
        """As `_parallel`, over cached and new keys."""
        index_BT = state.append(k, v, context.lengths)
        if torch.is_grad_enabled():
            state = state.split_off()
        near = self._cached_window(q, index_BT, state)
        # the kernels have no gradients where queries and keys differ in number
        if q.shape[1] > 1 and not torch.is_grad_enabled() and self._has_kernel(q):
            return self._cached_kernel(q, gates, index_BT, state), near
        used = -(-int(state.longest) // self.block_size)
        blocks = nsa_reference.attend_blocks(
            q,
            state.k,
            state.v,
            state.pooled_k[:, :, :used],
            state.pooled_v[:, :, :used],
            gates,
            index_BT=index_BT,
            first_BT=torch.zeros_like(index_BT),
            start_C=torch.arange(used, device=q.device) * self.block_size,
            block_size=self.block_size,
            selected_blocks=self.selected_blocks,
        )
        return blocks, near

    def _cached_window(self, q: Tensor, index_BT: Tensor, state: NativeSparseState) -> Tensor:
        """Window branch: the new tokens and the window - 1 before them, gathered from the cache."""
        length = q.shape[1]
        offset_K = torch.arange(1 - self.window, length, device=q.device)
        first_B1 = state.seen[:, None] - (index_BT >= 0).sum(1, keepdim=True)
        slot_BK = first_B1 + offset_K
        held_BK = (slot_BK >= 0) & (slot_BK < state.seen[:, None])
        slot_BHK = slot_BK.clamp(0, state.k.shape[2] - 1)[:, None].expand(-1, self.kv_heads, -1)
        k, v = (nsa_reference.take(x, slot_BHK).transpose(1, 2).to(q.dtype) for x in (state.k, state.v))
        end_K = torch.arange(len(offset_K), device=q.device) + self.window if length > 1 else NEVER
        end_BK = torch.where(held_BK, end_K, 0).to(torch.int32)
        end_BKH = end_BK[..., None].expand(-1, -1, self.kv_heads)
        return interval_attention(q, k, v, end_BKH, window=self.window, backend=self.backend)

    def _cached_kernel(self, q: Tensor, gates: Tensor, index_BT: Tensor, state: NativeSparseState) -> Tensor:
        """Block branches of a chunk by the kernels: rows packed, those without new tokens left out."""
        real_BT = index_BT >= 0
        new_B = real_BT.sum(1)
        keys_B = torch.where(new_B > 0, state.seen, 0)
        longest = int(state.longest)
        held_BK = torch.arange(longest, device=q.device) < keys_B[:, None]
        k, v = (x[:, :, :longest].transpose(1, 2)[held_BK][None].to(q.dtype) for x in (state.k, state.v))
        bounds = tuple(F.pad(n[new_B > 0].cumsum(0), (1, 0)).to(torch.int32) for n in (new_B, keys_B))
        out = torch.zeros_like(q)
        if len(bounds[0]) > 1:
            out[real_BT] = fla_adapter.nsa_blocks(
                q[real_BT][None],
                k,
                v,
                gates[real_BT][None],
                block_size=self.block_size,
                selected_blocks=self.selected_blocks,
                cu_seqlens=bounds,
            )[0]
        return out

    def _has_kernel(self, q: Tensor) -> bool:
        """Whether fla's kernels take over; on a CUDA device a warning says why they can't."""
        if not q.is_cuda:
            return False
        obstacle = fla_adapter.nsa_obstacle(
            q.dtype, self.heads // self.kv_heads, self.head_dim, self.block_size, self.selected_blocks
        )
        if obstacle is not None:
            warnings.warn(f"native sparse attention runs in PyTorch, which is slow: {obstacle}", stacklevel=2)
        return obstacle is None


def _check(config: HybridConfig) -> None:
    for name in ("num_heads", "num_key_value_heads", "head_dim", "block_size", "window"):
        if getattr(config, f"nsa_{name}") < 1:
            raise ValueError(f"nsa_{name}={getattr(config, f'nsa_{name}')} must be at least 1")
    if config.nsa_selected_blocks < 3:
        raise ValueError(
            f"nsa_selected_blocks={config.nsa_selected_blocks} must be at least 3: a document's first block, the "
            "query's own and the one before are always among them"
        )
    if config.nsa_num_heads % config.nsa_num_key_value_heads:
        raise ValueError(
            f"nsa_num_heads={config.nsa_num_heads} is not divisible by nsa_num_key_value_heads="
            f"{config.nsa_num_key_value_heads}; query heads share KV heads in equal groups"
        )
    if config.position_encoding != "none" and config.nsa_head_dim % 2:
        raise ValueError(
            f"nsa_head_dim={config.nsa_head_dim} must be even for position_encoding={config.position_encoding!r}"
        )
