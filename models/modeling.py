"""The hybrid language model as a transformers model: blocks (models/blocks.py) between embedding and output layer.

Shapes: B batch, T tokens, C hidden size, V vocabulary, N documents.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.generation import GenerationMode
from transformers.utils import can_return_tuple

from lte.layout import check_cu_seqlens
from lte.sparsity import RetentionStats
from models.attention import build_scorer
from models.blocks import Block
from models.cache import HybridCache
from models.config import HybridConfig
from models.losses import check_labels, cross_entropy, per_item, shift_labels
from models.mixer import Context
from models.ops import RMSNorm, is_plain, linear_cross_entropy
from models.outputs import HybridModelOutput, HybridOutput
from models.padding import LeftAligned, check_ends, check_mask, compose, prepend, unpad
from models.pretrained import HybridPreTrainedModel
from models.retention import RetentionControls, build_penalty_control
from models.rotary import rotary_angles


class HybridModel(HybridPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: HybridConfig):
        config.check()
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        learnable = config.sink_token == "learnable"
        self.sink_token = nn.Parameter(torch.empty(config.hidden_size)) if learnable else None
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.layer_types)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        shared = config.has_scorer and config.scorer_sharing == "layers"
        self.shared_scorer = build_scorer(config) if shared else None
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.sink_token is not None:
            init.normal_(self.sink_token, std=self._embedding_std)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        last_columns: int = 0,
        keep_all: bool = False,
        **others: object,
    ) -> HybridModelOutput:
        """Hidden states of a batch.

        Args:
            input_ids: [B, T], or `inputs_embeds` [B, T, C] in their place.
            attention_mask: [B, T] (or longer with a cache: its last T columns count); 0 for padding.
            past_key_values: the cache to continue and update.
            use_cache: make a cache if there is none.
            cu_seqlens: [N + 1], boundaries of packed documents, with B = 1 and without a cache.
            last_columns: return the hidden states of the last so many columns only; 0: of all.
            keep_all: the rule keeps everything and the scorer rests.
            others: cu_seq_lens_q, position_ids or seq_idx, as DataCollatorWithFlattening gives them, bound packed
                documents.

        Raises:
            ValueError: arguments that exclude each other or don't fit.
        """
        cu_seqlens = self._bounds(cu_seqlens, others, attention_mask, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        with_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        kind, axes = ("input_ids", 2) if inputs_embeds is None else ("inputs_embeds", 3)
        if tokens.ndim != axes or tokens.is_floating_point() != (axes == 3):
            shape = "[B, T] of integers" if axes == 2 else "[B, T, C] of floating point"
            raise ValueError(f"{kind} {tuple(tokens.shape)} in {tokens.dtype} must be {shape}")
        batch, length = tokens.shape[:2]
        if not length:
            raise ValueError(f"the input {tuple(tokens.shape)} holds no tokens; give at least one a row")
        if past_key_values is not None and not isinstance(past_key_values, HybridCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}, which doesn't hold what this model "
                "remembers: use model.new_cache(batch)"
            )
        if attention_mask is not None:
            past = past_key_values.columns if past_key_values is not None else 0
            attention_mask = check_mask(attention_mask, batch, length, past)
        if past_key_values is None and use_cache:
            past_key_values = HybridCache.allocate(self, batch)
        if past_key_values is not None:
            if cu_seqlens is not None:
                raise ValueError("cu_seqlens packs whole documents: use it without past_key_values")
            past_key_values.check(batch, len(self.layers))
            hidden, states = self._cached(tokens, attention_mask, past_key_values, last_columns, with_states)
            return HybridModelOutput(last_hidden_state=hidden, past_key_values=past_key_values, hidden_states=states)
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, batch, length)
            # what layers derive from it is kept for this tensor, which its owner may fill anew for the next rows
            cu_seqlens = cu_seqlens.clone()
            if attention_mask is not None:
                raise ValueError("packed rows (cu_seqlens) have no padding: leave attention_mask out")
        restore = None
        x_BTC = self._embed(tokens)
        if attention_mask is not None:
            x_BTC, cu_seqlens, restore = unpad(x_BTC, attention_mask)
        if self.sink_token is not None:
            x_BTC, cu_seqlens, without = prepend(self.sink_token, x_BTC, cu_seqlens)
            restore = without if restore is None else compose(restore, without)
        hidden, retention, states = self._run(x_BTC, cu_seqlens, None, None, keep_all, with_states)
        if restore is not None:
            hidden, states = restore(hidden), states and tuple(restore(x) for x in states)
        if last_columns:
            hidden = hidden[:, -last_columns:]
        return HybridModelOutput(last_hidden_state=hidden, hidden_states=states, retention=retention)

    def _embed(self, tokens: Tensor) -> Tensor:
        """[B, T, C] of ids [B, T], or of what is embedded already."""
        return tokens if tokens.is_floating_point() else self.embed_tokens(tokens)

    def _cached(
        self, tokens: Tensor, mask_BT: Tensor | None, cache: HybridCache, last_columns: int, with_states: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """The prompt in chunks, so that memory beyond the result doesn't grow with it."""
        length, chunk = tokens.shape[1], self.prefill_chunk(len(tokens))
        first_column = max(0, length - last_columns) if last_columns and not with_states else 0
        hiddens, all_states = [], []
        for start in range(0, length, chunk):
            piece = self._embed(tokens[:, start : start + chunk])
            aligned = None if mask_BT is None else LeftAligned.of(mask_BT[:, start : start + chunk])
            if aligned is not None:
                piece = aligned.apply(piece)
            lengths = aligned.lengths if aligned is not None else None
            columns = piece.shape[1]
            if self.sink_token is not None and not cache.columns:
                piece, _, _ = prepend(self.sink_token, piece, None)
                lengths = None if lengths is None else lengths + 1
            hidden, _, states = self._run(piece, None, lengths, cache, False, with_states)
            cache.columns += columns
            if start + chunk > first_column:
                skip = max(0, first_column - start)
                restore = aligned.restore if aligned is not None else lambda x: x
                hiddens.append(restore(hidden[:, -columns:])[:, skip:])
                all_states.append([restore(x[:, -columns:])[:, skip:] for x in states or ()])
        states = tuple(torch.cat(x, 1) for x in zip(*all_states, strict=True)) if with_states else None
        hidden = hiddens[0] if len(hiddens) == 1 else torch.cat(hiddens, 1)
        return hidden[:, -last_columns:], states

    def prefill_chunk(self, batch: int) -> int:
        """Tokens of a prompt that each of `batch` rows takes at once (`config.prefill_chunk`)."""
        if self.config.prefill_chunk is not None:
            return self.config.prefill_chunk
        # many tokens a launch on CUDA; elsewhere the chunk's masks are tensors
        return max(1024, 16384 // batch) if self.device.type == "cuda" else 2048

    def _run(
        self,
        x_BTC: Tensor,
        cu_seqlens: Tensor | None,
        lengths: Tensor | None,
        cache: HybridCache | None,
        keep_all: bool,
        with_states: bool,
    ) -> tuple[Tensor, list[RetentionStats], tuple[Tensor, ...] | None]:
        """All blocks over one layout."""
        context = self._context(x_BTC, cu_seqlens, lengths, cache, keep_all)
        retention, states = [], []
        for index, layer in enumerate(self.layers):
            if with_states:
                states.append(x_BTC)
            x_BTC, stats, writes = layer(x_BTC, context, cache.states[index] if cache is not None else None)
            if writes is not None:
                context = replace(context, writes=writes)
            if stats is not None:
                retention.append(stats)
        hidden = self.norm(x_BTC)
        return hidden, retention, (*states, hidden) if with_states else None

    def _context(self, x_BTC, cu_seqlens, lengths, cache: HybridCache | None, keep_all: bool) -> Context:
        context = Context(cu_seqlens=cu_seqlens, lengths=lengths, keep_all=keep_all, shared_scorer=self.shared_scorer)
        config, kinds = self.config, self.config.layer_types
        has_rotary = config.position_encoding == "rope" and "attention" in kinds
        has_nsa_rotary = config.position_encoding != "none" and "nsa" in kinds
        if not has_rotary and not has_nsa_rotary:
            return context
        positions_BT = context.positions(*x_BTC.shape[:2], x_BTC.device)
        if cache is not None:
            if "nsa" in kinds:
                seen_B = cache.states[kinds.index("nsa")].seen
            else:
                seen_B = cache.states[kinds.index("attention")].kv.seen
            positions_BT = seen_B[:, None] + torch.arange(x_BTC.shape[1], device=x_BTC.device)
        rotary = nsa_rotary = None
        if has_rotary:
            rotary = rotary_angles(positions_BT, config.head_dim, config.rope_theta)
        if has_nsa_rotary:
            nsa_rotary = rotary_angles(positions_BT, config.nsa_head_dim, config.rope_theta)
        return replace(context, rotary=rotary, nsa_rotary=nsa_rotary)


class HybridForCausalLM(RetentionControls, HybridPreTrainedModel, GenerationMixin):
    """The language model (arXiv 2510.20787): laLTE, laNSA and the baselines, by configuration.

    `forward` takes padded batches (attention_mask), packed documents (cu_seqlens) or new tokens of a cache
    (past_key_values); the three give the same logits.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HybridConfig):
        super().__init__(config)
        self.model = HybridModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.penalty_control = build_penalty_control(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **others: object,
    ) -> HybridOutput | tuple:
        """Logits and, with labels, the loss.

        Args:
            input_ids: [B, T] int64; a token's document is the row, or a packed document (cu_seqlens, with B = 1).
            attention_mask: [B, T]; 0 for padding, which is neither read nor predicted.
            past_key_values: cache of the tokens before; new tokens may be any number.
            labels: [B, T] int64, labels[t] is token t itself (the shift is made here); -100 is ignored.
            logits_to_keep: logits of the last so many columns, or of the columns with these numbers [N] int64; 0, or
                with labels: of all.
            num_items_in_batch: predicted tokens of the whole optimizer step, by which the loss is divided
                (gradient accumulation); None: those of this call.
            use_cache: make a cache if there is none; None: don't (`generate` does, and `config.use_cache` is its).
            others: as in `HybridModel`.

        Raises:
            ValueError: arguments that are misspelt, exclude each other or don't fit.
        """
        cu_seqlens = self._bounds(cu_seqlens, others, attention_mask, past_key_values)
        if labels is not None:
            check_labels(labels, input_ids if inputs_embeds is None else inputs_embeds[..., 0])
        if not isinstance(logits_to_keep, Tensor) and logits_to_keep < 0:
            raise ValueError(f"logits_to_keep={logits_to_keep}: give how many of the last columns, 0 for all")
        last = 0 if labels is not None or isinstance(logits_to_keep, Tensor) else logits_to_keep
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            output_hidden_states=output_hidden_states,
            last_columns=last,
            keep_all=self._keeps_all(),
            return_dict=True,
        )
        hidden = outputs.last_hidden_state
        if labels is None and isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        fused_loss = self.training and labels is not None and hidden.is_cuda and is_plain(self.lm_head)
        logits = None if fused_loss else self.lm_head(hidden)
        loss = lm_loss = None
        penalty = self._penalty_of(outputs.retention)
        if labels is not None:
            targets = shift_labels(labels.long(), attention_mask, cu_seqlens)
            if fused_loss:
                total = linear_cross_entropy(hidden, self.lm_head.weight, targets)
            else:
                total = cross_entropy(logits, targets)
            lm_loss, share = per_item(total, targets, num_items_in_batch)
            loss = lm_loss
            if penalty is not None and self.training:
                # a micro-batch carries its share of the step's penalty
                loss = loss + penalty * share
        return HybridOutput(
            loss=loss,
            lm_loss=lm_loss,
            aux_loss=penalty,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            retention=outputs.retention or None,
        )

    def parameter_groups(self, weight_decay: float, lr: float) -> list[dict]:
        """Optimizer groups: no decay for norms, biases, A_log, dt_bias; the scorer's rate is scaled."""
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            scorer = "scorer." in name
            decays = parameter.ndim >= 2 and not any(x in name for x in ("norm", "biases", "out_weight", "out_bias"))
            groups.setdefault((decays, scorer), []).append(parameter)
        return [
            {
                "params": parameters,
                "weight_decay": weight_decay if decays else 0.0,
                "lr": lr * (self.config.scorer_lr_scale if scorer else 1.0),
            }
            for (decays, scorer), parameters in groups.items()
        ]

    def new_cache(self, batch: int = 1) -> HybridCache:
        """An empty cache for `batch` rows."""
        return HybridCache.allocate(self.model, batch)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs: dict, generation_mode, batch_size: int, max_cache_length: int
    ) -> None:
        """`generate` makes our cache instead of a dynamic one."""
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} doesn't apply: "
                "this model has a cache of its own; leave it out"
            )
        rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        one_path = generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        if self.device.type == "cuda" and one_path and not generation_config.return_dict_in_generate:
            from models.decoding import take_cache

            # nobody sees this cache: one that is kept, with its graph, saves capturing another
            model_kwargs["past_key_values"] = take_cache(self, rows)
        else:
            model_kwargs["past_key_values"] = self.new_cache(rows)

    def _prefill(self, input_ids: Tensor, generation_config, model_kwargs: dict, **kwargs):
        """As in transformers, for prompts that end in a token."""
        prompt = model_kwargs.get("inputs_embeds")
        check_ends(model_kwargs.get("attention_mask"), (input_ids if prompt is None else prompt).shape[1])
        return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)

    def _sample(self, input_ids: Tensor, *args: object, **kwargs: object):
        """Greedy decoding and sampling of `generate`; on CUDA through graphs (models/decoding.py)."""
        if self.device.type != "cuda":
            return super()._sample(input_ids, *args, **kwargs)
        from models.decoding import generate

        return generate(self, super()._sample, input_ids, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,  # `generate` looks for this name before it takes a prompt of them
        **kwargs,
    ) -> dict:
        """As in transformers; after the prompt nothing is padding, so a decoding step needs no mask."""
        cache = kwargs.get("past_key_values")
        if next_sequence_length is not None and next_sequence_length < 1 and cache is not None:
            raise ValueError(
                f"input_ids {tuple(input_ids.shape)}: past_key_values has read {cache.get_seq_length()} columns of "
                "them; pass all ids so far and at least one new one, or the new ones alone with the whole mask"
            )
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )
        inputs.pop("position_ids", None)
        # pieces of a prompt (prefill_chunk_size), which may be padded, come without their length
        is_step = next_sequence_length is not None and not kwargs.get("is_first_iteration")
        if is_step and inputs.get("past_key_values") is not None:
            inputs.pop("attention_mask", None)
        return inputs
