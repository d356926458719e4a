"""The gated delta rule and its short convolution in plain PyTorch (arXiv 2412.06464).

Per head, with keys of unit length, a decay exp(g) in (0, 1] and a writing strength beta in [0, 1]:

    S_t = exp(g_t) S_{t-1} + k_t u_t^T        u_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t)
    o_t = S_t^T q_t / sqrt(K)

Three forms of one function: a token loop (the reference), a chunked form for training and prefill, and a
step for decoding. All compute in float32, or in float64 where the queries are float64.

Shapes: B batch, T tokens, H heads, K key channels of a head, V value channels of a head, N chunks,
C tokens of a chunk (in the convolution: channels), L inputs that a convolution remembers, W its width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lte.layout import Layout


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def recurrent_gated_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    initial_state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The rule as a loop over tokens: slow, differentiable, the reference of every other form.

    Args:
        q_BTHK, k_BTHK, v_BTHV: queries, keys and values; q and k are used as they are, without normalisation.
        g_BTH: logarithm of the decay, at most 0.
        beta_BTH: writing strength.
        initial_state_BHKV: state before the first token; zeros if None.

    Returns:
        Outputs [B, T, H, V] in the dtype of v, and the state after the last token [B, H, K, V].
    """
    dtype = compute_dtype(q_BTHK)
    q, k, v, g, beta = (x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH))
    state_BHKV = _first_state(k, v, initial_state_BHKV)
    outputs = []
    for t in range(q.shape[1]):
        state_BHKV, o_BHV, _ = _advance(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state_BHKV)
        outputs.append(o_BHV)
    return torch.stack(outputs, dim=1).to(v_BTHV.dtype), state_BHKV


@torch.no_grad()
def step_gated_delta_rule(
    q_B1HK: Tensor,
    k_B1HK: Tensor,
    v_B1HV: Tensor,
    g_B1H: Tensor,
    beta_B1H: Tensor,
    state_BHKV: Tensor,
    writes_B1H: Tensor | None = None,
) -> Tensor:
    """One token, for decoding: the state is updated in place, without gradients.

    Args:
        writes_B1H: to be filled with the norm of u_t; None: not wanted.

    Returns:
        Output [B, 1, H, V] in the dtype of v.
    """
    q, k, v, g, beta = (x[:, 0].to(state_BHKV.dtype) for x in (q_B1HK, k_B1HK, v_B1HV, g_B1H, beta_B1H))
    with torch.autocast(state_BHKV.device.type, enabled=False):
        new_state_BHKV, o_BHV, u_BHV = _advance(q, k, v, g, beta, state_BHKV)
    state_BHKV.copy_(new_state_BHKV)
    if writes_B1H is not None:
        writes_B1H.copy_(torch.linalg.vector_norm(u_BHV, dim=-1)[:, None])
    return o_BHV[:, None].to(v_B1HV.dtype)


def chunk_gated_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    layout: Layout | None = None,
    chunk_size: int = 64,
    writes: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The rule in chunks: within a chunk one triangular solve, between chunks one matrix product.

    Every decay is the exponential of a sum of non-positive numbers, taken without subtracting running sums, so
    that strong decays neither overflow nor lose digits. No state crosses the boundary of a packed document;
    padding leaves the state as it is.

    Args:
        q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH: as in `recurrent_gated_delta_rule`.
        initial_state: [B, H, K, V], the state before the first token; zeros if None.
        output_final_state: whether to return the state after each row's last real token.
        layout: where the real tokens lie; None: every row is one document of T tokens.
        chunk_size: tokens of a chunk.
        writes: [B, T, H] to be filled with the norms of the u_t, without gradients; None: not wanted.

    Returns:
        Outputs [B, T, H, V] in the dtype of v, and the final state [B, H, K, V] or None.

    Raises:
        ValueError: packed documents together with a state.
    """
    layout = layout or Layout()
    if layout.is_packed and (initial_state is not None or output_final_state):
        raise ValueError(
            "cu_seqlens packs several documents, which have no common state: leave initial_state None and "
            "output_final_state False, or pass rows with lengths"
        )
    with torch.autocast(q_BTHK.device.type, enabled=False):
        return _chunked(
            q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, initial_state, output_final_state, layout, chunk_size, writes
        )


def _chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    initial_state_BHKV: Tensor | None,
    output_final_state: bool,
    layout: Layout,
    chunk_size: int,
    writes_BTH: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    batch, length, _, key_dim = q_BTHK.shape
    size = min(chunk_size, length)
    dtype = compute_dtype(q_BTHK)
    documents_BT = layout.documents(batch, length, q_BTHK.device)
    if layout.lengths is not None:
        padding_BT1 = (documents_BT < 0)[..., None]
        g_BTH, beta_BTH = g_BTH.masked_fill(padding_BT1, 0), beta_BTH.masked_fill(padding_BT1, 0)

    q, k, v = (_split(x.to(dtype), size) for x in (q_BTHK, k_BTHK, v_BTHV))
    g, beta = (_split(x.to(dtype)[..., None], size) for x in (g_BTH, beta_BTH))  # [B, H, N, C, 1]
    q = q * key_dim**-0.5
    decay_BHNCC, inflow_BHNC1 = _decays(g, documents_BT if layout.is_packed else None)

    # With U the rows u_t: (I + A) U = beta V - beta inflow K S, for every chunk at once.
    lower_BHNCC = (k @ k.mT * decay_BHNCC).tril(-1) * beta
    right_side = torch.cat([beta * v, beta * inflow_BHNC1 * k], dim=-1)
    solved = torch.linalg.solve_triangular(lower_BHNCC, right_side, upper=False, unitriangular=True)
    own_BHNCV, read_BHNCK = solved.split([v.shape[-1], key_dim], dim=-1)

    # The last row of the decays reaches from each token to the chunk's end.
    outflow_BHNKC = (k * decay_BHNCC[..., -1, :, None]).mT
    carried_BHN11 = inflow_BHNC1[..., -1:, :]
    eye_KK = torch.eye(key_dim, dtype=dtype, device=k.device)
    states_BHNKV, final_BHKV = _scan(
        carried_BHN11 * eye_KK - outflow_BHNKC @ read_BHNCK,
        outflow_BHNKC @ own_BHNCV,
        _first_state(k_BTHK.to(dtype), v_BTHV.to(dtype), initial_state_BHKV),
    )
    u_BHNCV = own_BHNCV - read_BHNCK @ states_BHNKV
    if writes_BTH is not None:
        norm_BHT = torch.linalg.vector_norm(u_BHNCV.detach(), dim=-1).flatten(2)[..., :length]
        writes_BTH.copy_(norm_BHT.transpose(1, 2))
    o_BHNCV = (q * inflow_BHNC1) @ states_BHNKV + (q @ k.mT * decay_BHNCC) @ u_BHNCV
    o_BTHV = o_BHNCV.flatten(2, 3).transpose(1, 2)[:, :length]
    return o_BTHV.to(v_BTHV.dtype), final_BHKV if output_final_state else None


def _split(x_BTHD: Tensor, size: int) -> Tensor:
    """[B, T, H, D] as chunks [B, H, N, C, D], the last one filled up with zeros."""
    x_BTHD = F.pad(x_BTHD, (0, 0, 0, 0, 0, -x_BTHD.shape[1] % size))
    return x_BTHD.transpose(1, 2).unflatten(2, (-1, size)).contiguous()


def _decays(g_BHNC1: Tensor, documents_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """Decay from token j to token t of a chunk [B, H, N, C, C], and from the chunk's start to t [B, H, N, C, 1].

    Both are 0 across a document's boundary, and the first for j > t.
    """
    chunks, size = g_BHNC1.shape[2:4]
    ones_CC = g_BHNC1.new_ones(size, size)
    # sum over j < i <= t of g_i as one product of masked matrices: its terms have one sign, so it is exact even
    # where a difference of two running sums would cancel
    sums_BHNCC = (g_BHNC1.mT * ones_CC.tril()) @ ones_CC.tril(-1)
    decay_BHNCC = sums_BHNCC.exp().tril()
    inflow_BHNC1 = g_BHNC1.cumsum(dim=3).exp()
    if documents_BT is None:
        return decay_BHNCC, inflow_BHNC1
    # the filling of the last chunk belongs to the last document
    missing = chunks * size - documents_BT.shape[1]
    documents = torch.cat([documents_BT, documents_BT[:, -1:].expand(-1, missing)], dim=1)
    documents_BNC = documents.unflatten(1, (chunks, size))
    before_BN = F.pad(documents_BNC[:, :-1, -1], (1, 0), value=-1)
    same_BNCC = documents_BNC[..., :, None] == documents_BNC[..., None, :]
    carried_BNC1 = (documents_BNC == before_BN[..., None])[..., None]
    return decay_BHNCC * same_BNCC[:, None], inflow_BHNC1 * carried_BNC1[:, None]


def _scan(transition_BHNKK: Tensor, write_BHNKV: Tensor, state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
    """S_{n+1} = transition_n S_n + write_n: the states before each chunk [B, H, N, K, V], and the last one."""
    batch_heads = state_BHKV.shape[:2]
    state = state_BHKV.flatten(0, 1)
    states = []
    for transition, write in zip(
        transition_BHNKK.flatten(0, 1).unbind(1), write_BHNKV.flatten(0, 1).unbind(1), strict=True
    ):
        states.append(state)
        state = torch.baddbmm(write, transition, state)
    return torch.stack(states, dim=1).unflatten(0, batch_heads), state.unflatten(0, batch_heads)


def _first_state(k_BTHK: Tensor, v_BTHV: Tensor, initial_state_BHKV: Tensor | None) -> Tensor:
    if initial_state_BHKV is not None:
        return initial_state_BHKV.to(k_BTHK.dtype)
    batch, _, heads, key_dim = k_BTHK.shape
    return k_BTHK.new_zeros(batch, heads, key_dim, v_BTHV.shape[-1])


def _advance(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, g_BH: Tensor, beta_BH: Tensor, state_BHKV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One token: the new state [B, H, K, V], the output and u [B, H, V]."""
    state_BHKV = state_BHKV * g_BH.exp()[..., None, None]
    read_BHV = (k_BHK[..., None, :] @ state_BHKV).squeeze(-2)
    u_BHV = beta_BH[..., None] * (v_BHV - read_BHV)
    state_BHKV = state_BHKV + k_BHK[..., :, None] * u_BHV[..., None, :]
    o_BHV = (q_BHK[..., None, :] @ state_BHKV).squeeze(-2) * q_BHK.shape[-1] ** -0.5
    return state_BHKV, o_BHV, u_BHV


def causal_conv1d(
    x_BTC: Tensor, weight_CW: Tensor, state_BCL: Tensor | None = None, layout: Layout | None = None
) -> Tensor:
    """Depthwise causal convolution, then SiLU. Inputs before a document's start count as zero.

    Args:
        x_BTC: inputs.
        weight_CW: one filter a channel; the last column weighs the token itself.
        state_BCL: the last L = W - 1 inputs of each row, oldest first, read and then updated in place;
            None: the rows start here.
        layout: where the real tokens lie.

    Returns:
        [B, T, C] in the dtype of x.

    Raises:
        ValueError: packed documents together with a state.
    """
    layout = layout or Layout()
    batch, length, channels = x_BTC.shape
    width = weight_CW.shape[1]
    if state_BCL is None:
        past_BLC = x_BTC.new_zeros(batch, width - 1, channels)
    elif layout.is_packed:
        raise ValueError(
            "cu_seqlens packs several documents, which have no common state: pass state_BCL None, or lengths"
        )
    else:
        past_BLC = state_BCL.mT.to(x_BTC.dtype)
    history_BSC = torch.cat([past_BLC, x_BTC], dim=1)
    position_BT1 = layout.positions(batch, length, x_BTC.device)[..., None] if layout.is_packed else None
    weight = weight_CW.to(compute_dtype(x_BTC))
    y_BTC = history_BSC[:, width - 1 :] * weight[:, -1]
    for back in range(1, width):
        shifted_BTC = history_BSC[:, width - 1 - back : width - 1 - back + length]
        if position_BT1 is not None:
            shifted_BTC = shifted_BTC.masked_fill(position_BT1 < back, 0)
        y_BTC = y_BTC + shifted_BTC * weight[:, -1 - back]
    if state_BCL is not None:
        update_conv_state(state_BCL, x_BTC, layout.lengths)
    return F.silu(y_BTC).to(x_BTC.dtype)


@torch.no_grad()
def update_conv_state(state_BCL: Tensor, x_BTC: Tensor, lengths_B: Tensor | None) -> None:
    """Keep, in place, each row's last L inputs out of the state followed by its real tokens."""
    kept, length = state_BCL.shape[2], x_BTC.shape[1]
    if lengths_B is None and length >= kept:
        state_BCL.copy_(x_BTC[:, length - kept :].mT)
        return
    history_BSC = torch.cat([state_BCL.mT.to(x_BTC.dtype), x_BTC], dim=1)
    if lengths_B is None:
        last_BLC = history_BSC[:, length:]
    else:
        index_BL = lengths_B.to(x_BTC.device)[:, None] + torch.arange(kept, device=x_BTC.device)
        last_BLC = history_BSC.gather(1, index_BL[..., None].expand(-1, -1, x_BTC.shape[2]))
    state_BCL.copy_(last_BLC.mT)


@torch.no_grad()
def step_causal_conv1d(x_BC: Tensor, weight_CW: Tensor, state_BCL: Tensor) -> Tensor:
    """One token of `causal_conv1d` [B, C], for decoding: the state is updated in place, without gradients."""
    window_BCW = torch.cat([state_BCL.to(x_BC.dtype), x_BC[..., None]], dim=-1)
    y_BC1 = F.conv1d(window_BCW, weight_CW[:, None].to(x_BC.dtype), groups=x_BC.shape[1])
    state_BCL.copy_(window_BCW[..., 1:])
    return F.silu(y_BC1[..., 0])
