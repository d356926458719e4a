"""What the models have in common as models of transformers: loading, first weights, and arguments of `forward` that
transformers passes to every model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from lte.scorer import RetentionScorer
from lte.sparsity import PenaltyControl
from models.cache import HybridCache
from models.config import HybridConfig
from models.gated_deltanet import GatedDeltaNet
from models.padding import check_names, document_bounds


class HybridPreTrainedModel(PreTrainedModel):
    config_class = HybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _skip_keys_device_placement = "past_key_values"
    _is_stateful = True  # no assisted decoding: the cache can't be cropped
    # decays are exponentials of exponentials, and λ starts at 1e-9: too fine for 16 bits
    _keep_in_fp32_modules_strict = ("A_log", "dt_bias", "penalty_weight", "penalty_control.density")

    @classmethod
    def from_pretrained(cls, *args: object, **kwargs: object):
        """As in transformers.

        Raises:
            ValueError: a device_map that spreads the model, whose layers share rotary angles, scores and a cache.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        places = sorted({str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()})
        if len(places) > 1 or "disk" in places:
            raise ValueError(
                f"device_map={kwargs['device_map']!r} puts the model on {', '.join(places)}: it runs in the memory "
                'of one device; give that, as in device_map={"": 0}'
            )
        return loaded

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict | None = None, **others: object
    ) -> None:
        """As in transformers.

        Raises:
            ValueError: use_reentrant=True with a retention scorer, whose penalty would lose its gradient.
        """
        if self.config.has_scorer and (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs: use_reentrant=True would drop the gradient of the retention penalty; "
                "set it to False"
            )
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs, **others)

    def _bounds(
        self, cu_seqlens: Tensor | None, others: dict[str, object], mask: Tensor | None, cache: HybridCache | None
    ) -> Tensor | None:
        """cu_seqlens as given, or as other arguments of `forward` have them, which are checked.

        Raises:
            ValueError: a misspelt argument, or one that can't be obeyed.
        """
        check_names({"output_attentions": self.config.output_attentions, **others})
        if cu_seqlens is not None:
            return cu_seqlens
        if cache is None:
            return document_bounds(others, mask)
        for name in ("cu_seq_lens_q", "seq_idx"):
            if others.get(name) is not None:
                raise ValueError(f"{name} packs whole documents: use it without past_key_values")
        return None

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # transformers passes over a module of foreign code whose own tensors are loaded, and with it over what it
        # initialises in its submodules; ours leaves loaded tensors alone
        super()._initialize_weights(module, is_custom_code=False)

    @property
    def _embedding_std(self) -> float:
        own = self.config.embedding_range
        return self.config.initializer_range if own is None else own

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self._embedding_std)
        elif isinstance(module, nn.Linear):
            # outputs to the residual stream shrink with depth, as in GPT-2
            depth = 2 * self.config.num_hidden_layers if hasattr(module, "to_residual_stream") else 1
            init.normal_(module.weight, std=self.config.initializer_range / math.sqrt(depth))
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, GatedDeltaNet | RetentionScorer | PenaltyControl):
            _reset_the_missing(module)


def _reset_the_missing(module: GatedDeltaNet | RetentionScorer | PenaltyControl) -> None:
    """Start values for those of a module's tensors that transformers hasn't filled from a checkpoint."""
    tensors = [*module.parameters(), *module.buffers()]
    loaded = [x for x in tensors if getattr(x, "_is_hf_initialized", False)]
    if len(loaded) == len(tensors):
        return
    values = [x.clone() for x in loaded]
    module.reset_parameters()
    for x, value in zip(loaded, values, strict=True):
        x.copy_(value)
