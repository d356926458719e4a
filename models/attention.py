"""The attention mixer: sinks, sliding window and retained tokens, with or without a retention scorer.

Shapes: B batch, T tokens, C hidden size, N query heads, H KV heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lte.attention import in_cache_attention, interval_attention
from lte.cache import GrowingCache, RetainedCache
from lte.policies import POLICIES, Arrivals, Policy, observed_attention, observed_lifetimes, policy_name
from lte.scorer import RetentionScorer, ScorerState, channels_of
from lte.sparsity import RetentionStats, retention_stats
from lte.straight_through import LateGradient, give_gradient
from lte.visibility import lifetimes
from models.config import HybridConfig
from models.mixer import Context, Mixer, MixerOutput
from models.ops import linears, rotate
from models.rotary import rotary_frequencies


@dataclass(frozen=True)
class AttentionState:
    """The cache of one attention layer: keys and values, and what fills its retained slots.

    Attributes:
        scorer: streaming state of the retention scorer, under `lte`.
        policy: what ranks tokens instead. A cache keeps the one it was made for.
    """

    kv: RetainedCache | GrowingCache
    scorer: ScorerState | None
    policy: Policy | None = None

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes + (self.scorer.nbytes if self.scorer is not None else 0)

    @property
    def bytes_per_token(self) -> int:
        return self.kv.bytes_per_token

    @property
    def rule(self) -> dict[str, str | int]:
        """Slots by what they are for, and what fills the retained ones."""
        if isinstance(self.kv, GrowingCache):
            return {}
        retention = policy_name(self.policy) if self.policy is not None else "lte" if self.scorer else "none"
        return {
            "retention": retention,
            "budget": self.kv.budget,
            "sinks": self.kv.sinks,
            "window": self.kv.window,
        }

    def reset(self) -> None:
        self.kv.reset()
        if self.scorer is not None:
            self.scorer.reset()

    def reorder(self, index: Tensor) -> None:
        self.kv.reorder(index)
        if self.scorer is not None:
            self.scorer.reorder(index)


def build_scorer(config: HybridConfig) -> RetentionScorer:
    """A scorer as the config describes it."""
    return RetentionScorer(
        config.num_key_value_heads,
        config.head_dim,
        kernel_sizes=tuple(config.scorer_kernel_sizes),
        dilations=tuple(config.scorer_dilations),
        dropout=config.scorer_dropout,
        share_heads=config.scorer_sharing != "none",
        init_scale=config.scorer_init_scale,
    )


class RetainedAttention(Mixer):
    """Grouped-query attention under the visibility rule (arXiv 2510.20787).

    Without a window it is full attention, without a budget sliding-window attention with sinks.

    Args:
        config: the attention fields of a `HybridConfig`.

    Attributes:
        budget: slots for retained tokens in evaluation and in caches allocated from now on.
        retention: what fills them: `lte` (the scorer), `none`, or a policy of lte/policies.py.
    """

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.window, self.sinks, self.budget = config.window, config.sinks, config.budget
        self.retention = config.retention
        self.lookahead = config.lookahead if config.has_scorer else 0
        self.position_encoding, self.rope_theta = config.position_encoding, config.rope_theta
        self.backend, self.off_by_one = config.attention_backend, config.softmax_off_by_one
        self.gradient_from = config.straight_through
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.scorer_sizes = tuple(config.scorer_kernel_sizes), tuple(config.scorer_dilations)
        self.scorer = build_scorer(config) if config.has_scorer and config.scorer_sharing != "layers" else None

    def set_retention(self, retention: str) -> None:
        """What fills the budget from now on."""
        self.retention = retention

    def set_budget(self, budget: int) -> None:
        """Slots for retained tokens, enforced in evaluation and in caches allocated from now on."""
        self.budget = budget

    @property
    def policy(self) -> Policy | None:
        """What ranks tokens in place of the scorer; None under `lte` and `none`."""
        return POLICIES[self.retention]() if self.retention in POLICIES else None

    def allocate_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> AttentionState:
        """An empty cache for `batch` rows, with the budget and the policy in force."""
        if self.window is None:
            return AttentionState(GrowingCache(batch, self.kv_heads, self.head_dim, dtype=dtype, device=device), None)
        learned = self.retention == "lte"
        kv = RetainedCache(
            batch,
            self.kv_heads,
            self.head_dim,
            window=self.window,
            sinks=self.sinks,
            budget=self.budget if self.retention != "none" else 0,
            lookahead=self.lookahead if learned else 0,
            dtype=dtype,
            device=device,
        )
        scorer = None
        if learned and self.budget:
            sizes, dilations = self.scorer_sizes
            channels = channels_of(self.head_dim, len(sizes))
            scorer = ScorerState.allocate(
                batch, self.kv_heads, channels, sizes, dilations, dtype=dtype, device=device
            )
        return AttentionState(kv, scorer, self.policy if self.budget else None)

    def forward(self, x_BTC: Tensor, context: Context, state: AttentionState | None = None) -> MixerOutput:
        """Mix the tokens of x_BTC [B, T, C]; with a state, after the cached ones, updating it in place."""
        batch, length = x_BTC.shape[:2]
        projected = linears(x_BTC, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (x.view(batch, length, -1, self.head_dim) for x in projected)
        scorer = self.scorer if self.scorer is not None else context.shared_scorer
        if state is not None:
            out = self._cached(q, k, v, scorer, context, state)
            stats = None
        else:
            out, stats = self._parallel(q, k, v, scorer, context)
        return MixerOutput(self.o_proj(out.flatten(2)), stats)

    def _parallel(
        self, q: Tensor, k: Tensor, v: Tensor, scorer: RetentionScorer | None, context: Context
    ) -> tuple[Tensor, RetentionStats | None]:
        policy = self.policy if self.budget else None
        if policy is not None and policy.observes:
            return self._observed(policy, q, k, v, context), None
        logits = stats = late = None
        window, budget = self.window, self.budget
        if policy is not None:
            positions_BT = context.positions(*k.shape[:2], k.device)
            logits = policy.ranks(Arrivals(k, positions_BT, context.writes))
        elif self.retention == "lte" and scorer is not None and not context.keep_all:
            logits = scorer(torch.cat([k, v], -1), context)
            if self.training:
                budget = None
            stats = retention_stats(logits, window=window, sinks=self.sinks, layout=context)
            v, late = give_gradient(v, logits, sinks=self.sinks, layout=context, gradient_from=self.gradient_from)
        if context.keep_all:
            window = None
        batch, length = q.shape[:2]
        end_BTH = lifetimes(
            logits,
            batch=batch,
            length=length,
            heads=self.kv_heads,
            window=window,
            sinks=self.sinks,
            budget=budget,
            layout=context,
            device=q.device,
        )
        positions_BTH = None
        if self.position_encoding == "rope_in_cache":
            positions_BTH = torch.arange(length, device=q.device)[None, :, None].expand(batch, -1, self.kv_heads)
        return self._attend(q, k, v, end_BTH, positions_BTH, window, context, late=late), stats

    def _cached(
        self, q: Tensor, k: Tensor, v: Tensor, scorer: RetentionScorer | None, context: Context, state: AttentionState
    ) -> Tensor:
        kv = state.kv
        logits = None
        if state.scorer is not None:
            logits = scorer.stream(torch.cat([k, v], -1), state.scorer, kv.seen, context.lengths)
        elif state.policy is not None and not state.policy.observes:
            positions_BT = kv.seen[:, None] + torch.arange(k.shape[1], device=k.device)
            logits = state.policy.ranks(Arrivals(k, positions_BT, context.writes))
        if context.rotary is not None:
            q, k = rotate(q, context.rotary), rotate(k, context.rotary)
        if state.policy is not None and state.policy.observes:
            return observed_attention(
                kv,
                state.policy,
                q,
                k,
                v,
                context.lengths,
                frequencies=self._frequencies(q),
                off_by_one=self.off_by_one,
            )
        span = kv.append(k, v, logits, context.lengths)
        # under autocast the cache has the weights' dtype
        read = (q.to(span.k.dtype), span.k, span.v, span.end, span.positions)
        return self._attend(*read, self.window, context, rotated=True).to(q.dtype)

    def _observed(self, policy: Policy, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Whole documents under a policy that is defined by decoding: decoded first for what each query reads."""
        if context.rotary is not None:
            q, k = rotate(q, context.rotary), rotate(k, context.rotary)
        end_BTH = observed_lifetimes(
            policy,
            q,
            k,
            window=self.window,
            sinks=self.sinks,
            budget=self.budget,
            layout=context,
            frequencies=self._frequencies(q),
            off_by_one=self.off_by_one,
        )
        positions_BTH = torch.arange(k.shape[1], device=k.device)[None, :, None].expand(end_BTH.shape)
        return self._attend(q, k, v, end_BTH, positions_BTH, self.window, replace(context, rotary=None))

    def _frequencies(self, x: Tensor) -> Tensor | None:
        """Radians per place where keys are rotated in the cache, float32."""
        if self.position_encoding != "rope_in_cache":
            return None
        return rotary_frequencies(self.head_dim, self.rope_theta, x.device).float()

    def _attend(
        self,
        q,
        k,
        v,
        end,
        positions,
        window,
        context: Context,
        rotated: bool = False,
        late: LateGradient | None = None,
    ) -> Tensor:
        if self.position_encoding == "rope_in_cache":
            return in_cache_attention(
                q, k, v, end, positions=positions, frequencies=self._frequencies(q), off_by_one=self.off_by_one
            )
        if context.rotary is not None and not rotated:
            q, k = rotate(q, context.rotary), rotate(k, context.rotary)
        return interval_attention(
            q,
            k,
            v,
            end,
            window=window,
            off_by_one=self.off_by_one,
            backend=self.backend,
            cu_seqlens=None if rotated else context.cu_seqlens,
            late=late,
        )
