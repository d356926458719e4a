"""One token through the whole model with fused kernels: five launches a Gated DeltaNet block, six an attention block.

Projections that read the same input are one product: their parameters become views of one tensor, with the same
names, shapes, values and dtypes as before, so that a model can be saved and trained on as if nothing had happened.

Shapes: B batch, C hidden size, V vocabulary, D head dimension.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lte.cache import RetainedCache
from lte.scorer import RetentionScorer
from lte.sparsity import PenaltyControl
from models.attention import AttentionState, RetainedAttention
from models.blocks import MLP, Block
from models.cache import HybridCache
from models.gated_deltanet import GatedDeltaNet, GatedDeltaNetState, GatedRMSNorm, ShortConvolution
from models.mixer import Context
from models.modeling import HybridForCausalLM, HybridModel
from models.ops import RMSNorm
from models.rotary import rotary_frequencies

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
# whose weights the step reads without calling them; whatever else stands in the model, an adapter or a quantized
# map, may mean another function than the weight that it shows
READ = (
    *(HybridForCausalLM, HybridModel, Block, MLP, GatedDeltaNet, GatedRMSNorm, ShortConvolution, RetainedAttention),
    *(RetentionScorer, PenaltyControl, RMSNorm, nn.Linear, nn.Embedding, nn.ModuleList, nn.ParameterList),
)


def obstacle(model: HybridForCausalLM, cache: HybridCache) -> str | None:
    """Why a step of this model can't be captured as a CUDA graph; None if it can."""
    weight = model.model.embed_tokens.weight
    if weight.device.type != "cuda":
        return f"the model is on {weight.device.type}"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on"
    return unsupported(model, cache)


def unread_sink(model: HybridForCausalLM, cache: HybridCache) -> str | None:
    """Why a step would be too early: a learned sink comes in front of the first tokens that a cache reads."""
    if model.model.sink_token is not None and not cache.columns:
        return "the sink token has yet to be read; give the cache a prompt first"
    return None


def unsupported(model: HybridForCausalLM, cache: HybridCache) -> str | None:
    """Why `DecodeStep` can't run this model, on whatever device; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    weight = model.model.embed_tokens.weight
    if weight.dtype not in DTYPES:
        return f"the model is in {weight.dtype}"
    for index, (layer, state) in enumerate(zip(model.model.layers, cache.states, strict=True)):
        reason = _unsupported_layer(layer, state)
        if reason is not None:
            return f"layer {index} {reason}"
    for name, module in model.named_modules():
        if type(module) not in READ:
            kind = type(module)
            return f"{name or 'the model'} is a {kind.__module__}.{kind.__qualname__}, which no kernel computes"
        if isinstance(module, nn.Linear) and module.bias is not None:
            return f"{name} has a bias"
        # a call is skipped here, and what hangs on it with it
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name or 'the model'} has hooks"
    for name, parameter in model.named_parameters():
        if parameter.device != weight.device or type(parameter) is not nn.Parameter:
            return f"{name} is not an ordinary tensor on {weight.device}"
        if name.endswith(("proj.weight", "head.weight", "conv1d.weight")) and parameter.dtype != weight.dtype:
            return f"{name} is in {parameter.dtype}, the embedding in {weight.dtype}"
    return None


def _unsupported_layer(layer: Block, state: object) -> str | None:
    mixer = layer.mixer
    if isinstance(mixer, GatedDeltaNet):
        return None
    if not isinstance(mixer, RetainedAttention):
        return f"is {type(mixer).__name__}, which has no kernel for one token"
    if not isinstance(state.kv, RetainedCache):
        return "attends to everything: its cache grows, and a graph's addresses are fixed"
    if state.policy is not None:
        return f"retains by {type(state.policy).__name__}, whose ranks no kernel computes"
    if mixer.head_dim > MAX_HEAD_DIM:
        return f"has head_dim {mixer.head_dim}, the kernels take up to {MAX_HEAD_DIM}"
    return None


# ---- parameters side by side


def side_by_side(parameters: list[nn.Parameter]) -> Tensor | None:
    """One view over parameters that lie behind one another along their first dimension; None if they don't."""
    first = parameters[0]
    at = first.data_ptr()
    for parameter in parameters:
        same_storage = parameter.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same_storage or parameter.data_ptr() != at or not parameter.is_contiguous():
            return None
        at += parameter.nbytes
    shape = (sum(len(x) for x in parameters), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride())


def _groups(layer: Block) -> Iterator[list[nn.Parameter]]:
    mixer = layer.mixer
    if isinstance(mixer, GatedDeltaNet):
        yield _weights(mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj, mixer.a_proj, mixer.b_proj)
        yield _weights(mixer.q_conv1d, mixer.k_conv1d, mixer.v_conv1d)
    elif isinstance(mixer, RetainedAttention):
        yield _weights(mixer.q_proj, mixer.k_proj, mixer.v_proj)
    yield _weights(layer.mlp.gate_proj, layer.mlp.up_proj)


def _weights(*modules: nn.Module) -> list[nn.Parameter]:
    return [module.weight for module in modules]


def fuse_projections(model: HybridForCausalLM) -> None:
    """Put the weights that read the same input side by side, layer by layer, if they aren't already.

    The parameters stay what they were for everybody else: the same objects, names, shapes and values, now views.
    Optimizers that update in place go on working; what replaces the data of a parameter (`model.to(...)`) undoes
    the fusion, and the next call repairs it. Besides the model, memory for one layer's weights is needed meanwhile.
    """
    if _apart not in model._state_dict_hooks.values():
        model.register_state_dict_post_hook(_apart)
    # also where the caller is in inference mode: parameters must stay fit for training
    with torch.inference_mode(False), torch.no_grad():
        for layer in model.model.layers:
            for parameters in _groups(layer):
                if side_by_side(parameters) is not None:
                    continue
                joined = torch.cat([x.detach() for x in parameters])
                for parameter, piece in zip(parameters, joined.split([len(x) for x in parameters]), strict=True):
                    parameter.data = piece


def _apart(model: nn.Module, state: dict[str, object], prefix: str, metadata: object) -> None:
    """Tensors of a state dict that lie in one storage get one each over the same memory: savers such as Accelerate's
    take names of one storage for names of one tensor, and leave all but one out."""
    for name, x in state.items():
        plain = name.startswith(prefix) and isinstance(x, Tensor) and not x.requires_grad
        if plain and x.untyped_storage().nbytes() > x.nbytes:
            state[name] = torch.from_dlpack(x)


def addresses(model: HybridForCausalLM, cache: HybridCache) -> tuple[int, ...]:
    """Where everything lies that a captured step reads or writes."""
    return tuple(x.data_ptr() for x in (*model.parameters(), *cache.tensors().values()))


# ---- the step


class DecodeStep:
    """One token of every row into a cache, and the logits of the next; free of host synchronisation.

    Args:
        model: its projections are put side by side (`fuse_projections`).
        cache: one that `unsupported` and `unread_sink` have nothing against.
        overlap: start kernels while their predecessors still run (Hopper and later).
    """

    def __init__(self, model: HybridForCausalLM, cache: HybridCache, overlap: bool = False):
        fuse_projections(model)
        self.model, self.cache, self.overlap = model, cache, overlap
        config = model.config
        attention = [i for i, kind in enumerate(config.layer_types) if kind == "attention"]
        self.seen_B = self.frequencies = None
        if attention and config.position_encoding == "rope":
            self.seen_B = cache.states[attention[0]].kv.seen
            self.frequencies = rotary_frequencies(config.head_dim, config.rope_theta, self.seen_B.device)

    @torch.no_grad()
    def __call__(self, token_B1: Tensor, block: Callable[..., Tensor] | None = None) -> Tensor:
        """Logits [B, V] of the token after token_B1. The cache moves on, but for its count of columns.

        Args:
            block: called in place of `block` for every block.
        """
        block = self.block if block is None else block
        from lte.kernels.decode_linear import norm_linear
        from lte.kernels.decode_start import start_step

        body = self.model.model
        x_BC, angles = start_step(
            token_B1, body.embed_tokens.weight, self.seen_B, self.frequencies, overlap=self.overlap
        )
        for layer, state in zip(body.layers, self.cache.states, strict=True):
            x_BC = block(layer, x_BC, angles, state)
        return norm_linear(x_BC, body.norm.weight, body.norm.eps, self.model.lm_head.weight, overlap=self.overlap)

    def block(self, layer: Block, x_BC: Tensor, angles: tuple[Tensor, Tensor] | None, state: object) -> Tensor:
        """One block: residual stream in, residual stream out."""
        from lte.kernels.decode_linear import linear_add, norm_swiglu

        if isinstance(layer.mixer, GatedDeltaNet):
            x_BC = self._delta_net(layer, x_BC, state)
        elif layer.mixer.position_encoding == "rope_in_cache":
            # places in the cache are counted anew for every token: plain PyTorch
            context = Context(shared_scorer=self.model.model.shared_scorer)
            return layer(x_BC[:, None], context, state)[0][:, 0]
        else:
            x_BC = self._attention(layer, x_BC, angles, state)
        mlp, norm = layer.mlp, layer.mlp_norm
        gate_up = side_by_side(_weights(mlp.gate_proj, mlp.up_proj))
        inner_BI = norm_swiglu(x_BC, norm.weight, norm.eps, gate_up, overlap=self.overlap)
        return linear_add(inner_BI, mlp.down_proj.weight, x_BC, overlap=self.overlap)

    def _delta_net(self, layer: Block, x_BC: Tensor, state: GatedDeltaNetState) -> Tensor:
        from lte.kernels.decode_delta import delta_step
        from lte.kernels.decode_linear import linear_add, norm_linear

        mixer, norm, overlap = layer.mixer, layer.mixer_norm, self.overlap
        projections, filters = (side_by_side(x) for x in list(_groups(layer))[:2])
        mixed = norm_linear(
            x_BC,
            norm.weight,
            norm.eps,
            projections,
            convolution=(filters.squeeze(1), state.conv_BCL),
            overlap=overlap,
        )
        keys, values = mixer.num_heads * mixer.head_dim, mixer.num_heads * mixer.value_dim
        q, k, v, gate, a, b = mixed.split([keys, keys, values, values, mixer.num_heads, mixer.num_heads], 1)
        out = delta_step(q, k, v, a, b, mixer.A_log, mixer.dt_bias, state.recurrent_BHKV, overlap=overlap)
        return linear_add(
            out,
            mixer.o_proj.weight,
            x_BC,
            norm=mixer.o_norm.weight,
            gate_BK=gate,
            groups=mixer.num_heads,
            eps=mixer.o_norm.eps,
            overlap=overlap,
        )

    def _attention(
        self, layer: Block, x_BC: Tensor, angles: tuple[Tensor, Tensor] | None, state: AttentionState
    ) -> Tensor:
        from lte.kernels.cache_step import cache_step, fits_kernel
        from lte.kernels.decode_attention import decode_attention
        from lte.kernels.decode_linear import linear_add, norm_linear

        mixer, norm, kv, overlap = layer.mixer, layer.mixer_norm, state.kv, self.overlap
        projections = side_by_side(next(_groups(layer)))
        mixed = norm_linear(x_BC, norm.weight, norm.eps, projections, overlap=overlap)
        heads = mixed.unflatten(1, (-1, mixer.head_dim))
        q, k, v = heads.split([mixer.heads, mixer.kv_heads, mixer.kv_heads], 1)
        scorer = mixer.scorer if mixer.scorer is not None else self.model.model.shared_scorer
        counter = torch.empty(len(x_BC) * mixer.kv_heads, dtype=torch.int32, device=x_BC.device)
        scores = None
        if state.scorer is not None and not fits_kernel(scorer):
            scores = scorer.stream(torch.cat([k, v], -1)[:, None], state.scorer, kv.seen)[:, 0]
        cache_step(
            kv,
            k,
            v,
            scores_BH=scores,
            scorer=scorer if scores is None else None,
            state=state.scorer,
            rotary=angles,
            counter=counter,
            overlap=overlap,
        )
        out = decode_attention(
            q,
            kv.k,
            kv.v,
            kv.positions,
            off_by_one=mixer.off_by_one,
            rotary=angles,
            counter=counter,
            seen_B=kv.seen,
            overlap=overlap,
        )
        return linear_add(out.flatten(1), mixer.o_proj.weight, x_BC, overlap=overlap)
