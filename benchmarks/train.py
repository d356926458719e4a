"""Training of whole models of equal size: forward and backward, and a few optimizer steps of every member."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import OURS, Bench, Disagreement, add_common_arguments, build_model, model_config
from benchmarks.timing import Timing, measure, peak_bytes, time_once
from lte.scorer import RetentionScorer

DESCRIPTION = """\
Times forward and backward of training (loss included, optimizer not) for laLTE and models of equal size: Transformer,
Gated DeltaNet, and it with windowed or full attention. `keep-all` is laLTE as it starts, everything kept; `sparse` as
it ends, with the target density kept: each scorer's last bias is set to the quantile of its own logits on random
tokens that leaves this share of the eligible ones positive. What is kept then is measured and noted in the result.

--phase steps trains every member of the family for --steps optimizer steps (AdamW, clipped) on one random batch over
64 words, and reports the first and the last loss, which must fall, the peak of all memory, and the steps' time.
"""
EPILOG = """\
examples:
  lalte bench train
  lalte bench train --phase sparse --systems lalte,gdn
  lalte bench train --precision amp --packed
  lalte bench train --phase steps --precision amp
  lalte bench train --quick --device cpu --out train.json
"""
SYSTEMS = (OURS, "gdn", "transformer", "gdn-swa", "gdn-full")
MEMBERS = (*SYSTEMS, "streaming", "nsa", "lansa")
WORDS, LEARNING_RATE = 64, 3e-4
COLD_STEPS = 2  # whose time is that of making kernels
BUFFERS = 4
LOSS_TOLERANCE = 5e-3
GRADIENT_TOLERANCE = 5e-2


def kept_density(model: nn.Module, ids: Tensor, packed: bool) -> float:
    """Share of the eligible tokens that the model keeps of rows ids [B, T], fed as `inputs_of` says."""
    stats = model.model(**inputs_of(ids, packed)).retention
    return float(sum(s.kept.sum() for s in stats) / sum(s.eligible.sum() for s in stats).clamp(min=1))


def set_density(model: nn.Module, ids: Tensor, packed: bool = False, rounds: int = 3) -> float:
    """Shift the last bias of every scorer so that the target density is kept on these tokens; the density reached.

    Args:
        ids: [B, T] tokens.
        packed: feed them as one row with boundaries.
        rounds: a shift changes the inputs of the layers above, so that it is repeated.
    """
    config = model.config
    eligible = slice(config.sinks, max(config.sinks + 1, ids.shape[1] - config.window))
    target = config.target_density

    def shift(scorer: RetentionScorer, _: Any, logits_BTH: Tensor) -> Tensor:
        rows_BTH = logits_BTH.reshape(*ids.shape, -1)
        threshold_H = rows_BTH[:, eligible].flatten(0, 1).float().quantile(1 - target, dim=0)
        if len(scorer.out_bias) < len(threshold_H):
            threshold_H = threshold_H.mean(0, keepdim=True)  # one scorer for all heads
        scorer.out_bias.sub_(threshold_H.to(scorer.out_bias.dtype))
        return logits_BTH - threshold_H

    with torch.no_grad():
        hooks = [m.register_forward_hook(shift) for m in model.modules() if isinstance(m, RetentionScorer)]
        for _ in range(rounds):
            model.model(**inputs_of(ids, packed))
        for hook in hooks:
            hook.remove()
        return kept_density(model, ids, packed)


@functools.cache
def check(system: str, device: torch.device) -> None:
    """The tiny model's training loss and gradients on the device, in bfloat16 there, against float32 on the CPU.

    Both have the same weights, rounded to bfloat16: rounding them alone moves a gradient of this model by up to 23 %.

    Raises: Disagreement.
    """
    config = model_config(system, "tiny", initializer_range=0.1, vocab_size=512, **_without_dropout(system))
    ids = torch.randint(config.vocab_size, (2, 131), generator=torch.Generator().manual_seed(0))
    exact = build_model(config, torch.device("cpu"), torch.float32).train()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    other = build_model(config, device, dtype).train()
    other.load_state_dict(exact.state_dict())
    exact.load_state_dict(other.state_dict())
    losses, norms = [], []
    for model in (exact, other):
        loss = model(ids.to(model.device), labels=ids.to(model.device)).lm_loss
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(model.model.embed_tokens.weight.grad.float().norm()))
    if not abs(losses[1] - losses[0]) <= LOSS_TOLERANCE * losses[0]:
        raise Disagreement(f"the loss of the tiny model is {losses[1]:.4f}, on the CPU it is {losses[0]:.4f}")
    if not abs(norms[1] - norms[0]) <= GRADIENT_TOLERANCE * norms[0]:
        raise Disagreement(f"the embedding's gradient has norm {norms[1]:.4g}, on the CPU {norms[0]:.4g}")


def _without_dropout(system: str) -> dict[str, Any]:
    return {"scorer_dropout": 0.0} if system == OURS else {}


def inputs_of(ids: Tensor, packed: bool) -> dict[str, Tensor]:
    """Arguments of a model for rows [B, T], or for them packed into one row as the Trainer packs documents."""
    if not packed:
        return {"input_ids": ids}
    rows, length = ids.shape
    bounds = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=ids.device)
    return {"input_ids": ids.view(1, -1), "cu_seqlens": bounds}


def batch_of(ids: Tensor, packed: bool) -> dict[str, Tensor]:
    """The same with labels."""
    inputs = inputs_of(ids, packed)
    return {**inputs, "labels": inputs["input_ids"]}


def time_system(
    bench: Bench, case: str, system: str, config: Any, batch: int, length: int, prepare: Callable[[nn.Module], dict]
) -> None:
    """Check, build, time."""
    check(system, bench.device)
    cuda, amp = bench.device.type == "cuda", bench.args.precision == "amp"
    dtype = torch.bfloat16 if cuda and not amp else torch.float32
    model = build_model(config, bench.device, dtype).train()
    bench.note(case, system, parameters=sum(p.numel() for p in model.parameters()), **prepare(model))
    shape = (batch, length)
    sets = [torch.randint(config.vocab_size, shape, device=bench.device) for _ in range(BUFFERS)]
    items = batch * (length - 1)

    def run(i: int) -> None:
        inputs = batch_of(sets[i % BUFFERS], bench.args.packed)
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=amp):
            loss = model(**inputs, num_items_in_batch=items, use_cache=False).loss
        loss.backward()

    clear = partial(model.zero_grad, set_to_none=True)
    timing = measure(run, bench.device, seconds=bench.args.seconds, before=clear, warmup=3, most=50)
    clear()
    with peak_bytes(bench.device) as peak:
        run(0)
        bench.add_bytes(case, system, peak())
    bench.add_timing(case, system, timing, tokens=batch * length)


def train_steps(bench: Bench, case: str, system: str, config: Any, batch: int, length: int) -> None:
    """Optimizer steps of a new model on one batch: losses, the peak of all memory, and the steps' time.

    Raises: Disagreement if the loss doesn't fall.
    """
    amp, steps = bench.args.precision == "amp", bench.args.steps
    dtype = torch.bfloat16 if bench.device.type == "cuda" and not amp else torch.float32
    losses, samples = [], []
    with peak_bytes(bench.device) as peak:
        model = build_model(config, bench.device, dtype).train()
        optimizer = torch.optim.AdamW(model.parameter_groups(weight_decay=0.1, lr=LEARNING_RATE))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(min(WORDS, config.vocab_size), (batch, length), generator=generator).to(bench.device)
        inputs = batch_of(ids, bench.args.packed)

        def step() -> None:
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=amp):
                output = model(**inputs, num_items_in_batch=batch * (length - 1), use_cache=False)
            output.loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.update_retention_penalty()
            losses.append(output.lm_loss.detach())

        for _ in range(steps):
            samples.append(time_once(step, bench.device))
        bench.add_bytes(case, system, peak())
    losses = [float(loss) for loss in losses]
    if not losses[-1] < losses[0]:
        raise Disagreement(f"the loss doesn't fall: {', '.join(f'{loss:.3f}' for loss in losses)}")
    bench.note(case, system, parameters=sum(p.numel() for p in model.parameters()), losses=losses)
    bench.add_timing(case, system, Timing.of(samples[COLD_STEPS:]), tokens=batch * length)
    for number in (1, steps):
        loss = losses[number - 1]
        bench.add(f"{case} {number}", system, "loss", loss, loss, loss, 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `lalte bench train`."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add = parser.add_argument
    add("--config", metavar="SIZE", default="0.4b", help="0.4b (default), 1.4b or tiny")
    add("--batch", metavar="B", type=int, help="rows; default: 8, of --phase steps 4")
    add("--length", metavar="T", type=int, default=4096, help="tokens a row; default: 4096")
    phases = ["keep-all", "sparse", "both", "steps"]
    add("--phase", choices=phases, default="both", help="what laLTE keeps (default: both), or optimizer steps")
    add("--steps", metavar="N", type=int, default=10, help="of --phase steps; default: 10")
    add(
        "--precision",
        choices=["bf16", "amp"],
        default="bf16",
        help="bf16: weights in bfloat16 (default); amp: float32 weights under autocast, as `lalte train` has them",
    )
    add("--packed", action="store_true", help="rows packed into one with boundaries, as `lalte train` feeds them")
    add_common_arguments(parser)


def run_from_arguments(args: argparse.Namespace) -> int:
    """Run the benchmark; the exit status."""
    stepping = args.phase == "steps"
    size, batch, length = args.config, args.batch or (4 if stepping else 8), args.length
    if args.steps <= COLD_STEPS:
        raise ValueError(
            f"--steps {args.steps} must be at least {COLD_STEPS + 1}: the first {COLD_STEPS} aren't timed"
        )
    changes: dict[str, Any] = {}
    if args.quick:
        size, batch, length = "tiny", 2, 96
        changes = {"num_hidden_layers": 2, "vocab_size": 256}
    name = ("train-steps" if stepping else "train") + ("" if size == "0.4b" else f"-{size}")
    bench = Bench(name, args, {"size": size, "batch": batch, "length": length, **changes})
    suffix = (" amp" if args.precision == "amp" else "") + (" packed" if args.packed else "")
    if stepping:
        case = f"train {size} B{batch} T{length}{suffix} steps"
        configs = {system: _config(system, size, length, args.quick, changes) for system in MEMBERS}
        bench.add_case(
            case, {s: partial(train_steps, bench, case, s, config, batch, length) for s, config in configs.items()}
        )
        return bench.run()
    phases = ["sparse", "keep-all"] if args.phase == "both" else [args.phase]
    for phase in phases:
        case = f"train {size} B{batch} T{length}{suffix}" + (" all kept" if phase == "keep-all" else "")
        runs = {}
        for system in SYSTEMS:
            if system != OURS and phase == "keep-all" and len(phases) > 1:
                continue  # they have no phases
            config = _config(system, size, length, args.quick, changes)
            prepare = partial(_prepare, system=system, phase=phase, shape=(batch, length), args=args)
            runs[system] = partial(time_system, bench, case, system, config, batch, length, prepare)
        bench.add_case(case, runs)
    return bench.run()


def _prepare(
    model: nn.Module, *, system: str, phase: str, shape: tuple[int, int], args: argparse.Namespace
) -> dict[str, Any]:
    """Bring our model into the phase; what to note about it.

    In the precision and the form that are timed, so that no kernel is made or tuned for this alone.
    """
    if system != OURS:
        return {}
    ids = torch.randint(model.config.vocab_size, shape, device=model.device)
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=args.precision == "amp"):
        if phase == "sparse":
            return {
                "kept_density": set_density(model, ids, args.packed),
                "target_density": model.config.target_density,
            }
        return {"kept_density": kept_density(model, ids, args.packed)}


def _config(system: str, size: str, length: int, quick: bool, changes: dict[str, Any]) -> Any:
    """A member's configuration; `quick` makes it one of two layers, with a rule that is at work in short rows."""
    kept = {"max_position_embeddings": length} if system == OURS else {}
    if not quick:
        return model_config(system, size, **changes, **kept)
    whole = model_config(system, size).layer_types
    rule = {"window": 24, "budget": 10} if system == OURS else {}
    return model_config(system, size, layer_types=whole[:2], **rule, **changes, **kept)
