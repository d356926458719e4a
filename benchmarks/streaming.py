"""`lalte bench streaming`: one pretrained decoder over one long text, read in many ways (arXiv 2309.17453, figure 3).

    lalte       sinks and a window, positions counted in the cache (models.streaming)
    lalte h2o   the same size with retained tokens, and so for each policy that is asked for
    window      the same size without sinks
    recompute   no cache: the last tokens are read again for every new one
    dense       the whole text in the cache

For each cache size and each length of text: perplexity, milliseconds a token and bytes of the cache. The result is
written after every system; the same command continues an interrupted run. Imports nothing heavy at its head, so that
--help is quick. Shapes: B batch, T tokens.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.streaming_report import draw, earlier_rows, size_of, table

DESCRIPTION = """\
Reads one long text with a pretrained decoder in several ways: with sinks and a window (lalte), with tokens that a
policy retains (--retention), with a window alone, with the last tokens recomputed for every new one, and with
everything in the cache (dense). Reports perplexity, milliseconds a token and bytes of the cache against the length of
the text.
"""
EPILOG = """\
examples:
  lalte bench streaming                                       random small model: times and bytes, a minute
  lalte bench streaming --model smollm2.gguf --text book.txt --cache-sizes 256,1024 --lengths 2048,8192,20480
  lalte bench streaming --model other/llama --text book.txt --retention h2o,key_norm --budget 512 --cache-sizes 1024

A text may be compressed (.xz, .gz). A GGUF file needs the packages gguf and accelerate. The result is written after
every system; the same command continues a run that was interrupted.
"""
SYSTEMS = ("lalte", "window", "recompute", "dense")
WARM_UP = 2  # steps before those that are timed


@dataclass(frozen=True)
class Settings:
    """Settings of a run, as on the command line.

    Attributes:
        band: tokens before each length whose perplexity is taken.
        sampled: tokens of the band, evenly spread, on which the recomputation is compared.
        steps: single tokens after each length that are timed.
        dense_limit: longest text for the dense cache.
        retention: policies that retain tokens, a system each (models.streaming).
        budget: their retained tokens, out of the cache size; None: half of what the sinks leave of it.
    """

    model: str | None = None
    text: str | None = None
    out: str | None = None
    figure: str | None = None
    cache_sizes: tuple[int, ...] = (64, 256)
    lengths: tuple[int, ...] = (512, 1024)
    sinks: int = 4
    band: int = 256
    sampled: int = 16
    steps: int = 16
    dense_limit: int = 8192
    retention: tuple[str, ...] = ()
    budget: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    overwrite: bool = False

    def check(self) -> None:
        """Raises ValueError for settings that can't be run together."""
        for name in ("band", "sampled", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be 1 or more")
        if not self.cache_sizes or min(self.cache_sizes) <= self.sinks or self.sinks < 0:
            raise ValueError(f"cache-sizes: {self.cache_sizes} must each exceed the {self.sinks} sinks")
        room = min(self.cache_sizes) - self.sinks
        if self.retention and not 0 < (1 if self.budget is None else self.budget) < room:
            raise ValueError(
                f"budget: {self.budget} must be 1 to {room - 1}, to leave a window in the smallest cache"
            )
        if self.budget is not None and not self.retention:
            raise ValueError(f"budget: {self.budget} has no policy that fills it; give --retention")
        if self.sampled > self.band:
            raise ValueError(f"sampled: {self.sampled} tokens can't be spread over a band of {self.band}")
        if not self.lengths:
            raise ValueError("lengths: none given; name at least one")
        start = max(self.cache_sizes)
        for length in self.lengths:
            if length < start + self.band:
                raise ValueError(
                    f"lengths: {length} must be {start + self.band} or more: the largest cache, or the length before "
                    f"with its {self.steps} timed tokens, then the band of {self.band}"
                )
            start = length + self.steps + WARM_UP
        if self.model is not None and self.text is None:
            raise ValueError("text: none given; name a text file for the model to read")
        if self.model is None and self.text is not None:
            raise ValueError(
                f"text: {self.text} can't be read by the random small model, which has no tokenizer; give --model"
            )

    def rule(self, system: str, size: int) -> dict[str, Any]:
        """Arguments of `stream` for a system with a cache of `size` tokens."""
        sinks = 0 if system == "window" else self.sinks
        if not system.startswith("lalte "):
            return {"sinks": sinks, "window": size - sinks}
        budget = self.budget or (size - sinks) // 2
        policy = system.removeprefix("lalte ")
        return {"sinks": sinks, "window": size - sinks - budget, "budget": budget, "retention": policy}


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(",") if word.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 256,1024") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options, description and examples to a parser."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    default = Settings()
    add = parser.add_argument
    add(
        "--model", metavar="DIR", help="folder of a Hugging Face model, or a GGUF file; default: a random small Llama"
    )
    add("--text", metavar="FILE", help="text to read, in UTF-8")
    add("--out", metavar="FILE", help="result; default: benchmarks/results/<device>/streaming.json")
    add("--figure", metavar="FILE", help="also draw the result, as PNG or SVG")
    sizes = ",".join(map(str, default.cache_sizes))
    add("--cache-sizes", metavar="N,M", type=_numbers, default=default.cache_sizes, help=f"tokens; default: {sizes}")
    lengths = ",".join(map(str, default.lengths))
    add("--lengths", metavar="N,M", type=_numbers, default=default.lengths, help=f"of text; default: {lengths}")
    for name, text in (
        ("sinks", "first tokens kept for ever, out of the cache size"),
        ("band", "tokens before each length for the perplexity"),
        ("sampled", "of these, for the comparison with recomputation"),
        ("steps", "tokens that are timed at each length"),
        ("dense-limit", "longest text that is read densely; 0: none"),
    ):
        value = getattr(default, name.replace("-", "_"))
        add(f"--{name}", metavar="N", type=int, default=value, help=f"{text}; default: {value}")
    policies = "retain tokens by these policies too: h2o, tova, key_norm, random, recency"
    split = lambda text: tuple(word.strip() for word in text.split(",") if word.strip())
    add("--retention", metavar="A,B", type=split, default=default.retention, help=policies)
    add(
        "--budget", metavar="N", type=int, help="retained tokens, out of the cache size; default: half, without sinks"
    )
    add("--device", metavar="NAME", default="auto", help="auto (default), cpu, cuda, cuda:1, …")
    add("--dtype", metavar="NAME", default="auto", help="auto (default: as saved), float32, bfloat16, float16")
    add("--overwrite", action="store_true", help="replace a result that is there")


def run_from_arguments(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    settings = Settings(**{name: getattr(args, name) for name in asdict(Settings())})
    print(table(run(settings)))
    return 0


def run(settings: Settings) -> dict[str, Any]:
    """Measures, writes the result file (and the figure), and returns its content.

    Raises:
        ValueError: settings, model or text can't be used, or the file holds a finished run or another one.
    """
    settings.check()
    from eval.results import result, say, write_json
    from models.loading import pick_device
    from models.streaming_retention import policy_of

    for name in settings.retention:
        policy_of(name, budget=1)
    device = pick_device(settings.device)
    out = Path(settings.out or f"benchmarks/results/{_slug(device)}/streaming.json")
    make = lambda rows, complete: result(
        "streaming", rows, config=_config(settings), device=device, complete=complete
    )
    rows = earlier_rows(out, make([], False)) if out.exists() and not settings.overwrite else []
    model, ids_1T = _model_and_text(settings, device)
    for system, size in _systems(settings):
        name = system if size is None else f"cache of {size} tokens: {system}"
        if any(row["system"] == system and size_of(row) == size for row in rows):
            say(f"{name}: measured before")
            continue
        say(name)
        rows += _measure(system, model, ids_1T, size, settings)
        write_json(out, make(rows, False), overwrite=True)
    content = make(rows, True)
    write_json(out, content, overwrite=True)
    if settings.figure:
        draw(content, settings.figure)
    say(f"written: {out}")
    return content


def _systems(settings: Settings) -> list[tuple[str, int | None]]:
    """Systems and their cache sizes, in the order of the run."""
    retaining = [f"lalte {name}" for name in settings.retention]
    found = [(system, size) for size in settings.cache_sizes for system in ("lalte", *retaining, *SYSTEMS[1:3])]
    dense = any(length <= settings.dense_limit for length in settings.lengths)
    return [*found, ("dense", None)] if dense else found


def _config(settings: Settings) -> dict[str, Any]:
    """What the numbers depend on; files by their names, and what tells them from others of these names."""
    from benchmarks.harness import path_identity
    from eval.streaming import texts_identity

    names: dict[str, Any] = {}
    if settings.model:
        names |= {"model": Path(settings.model).name, "model_identity": path_identity(settings.model)}
    if settings.text:
        (names["text"],) = texts_identity([settings.text])  # its name, size and digest
    left_out = ("out", "figure", "overwrite")
    return {name: value for name, value in (asdict(settings) | names).items() if name not in left_out}


def _slug(device: Any) -> str:
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return "-".join(name.lower().split())


def _model_and_text(settings: Settings, device: Any) -> tuple[Any, Any]:
    """The model, and its tokens [1, T] of all lengths and timed steps."""
    import torch

    count = max(settings.lengths) + settings.steps + WARM_UP + 1
    if settings.model is None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_key_value_heads=2, **sizes)).eval().to(device)
        return model, torch.randint(0, 512, (1, count)).to(device)
    from models.loading import load_any

    text = _read_text(settings.text, 12 * count)
    model, tokenizer = load_any(settings.model, device, settings.dtype)
    ids_1T = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :count]
    if ids_1T.shape[1] < count:
        raise ValueError(f"text: {settings.text} has {ids_1T.shape[1]} tokens and {count} are needed; read less")
    return model, ids_1T.to(device)


def _read_text(path: str, characters: int) -> str:
    """At least the first characters of a text file, or all of it."""
    from eval.streaming import text_pieces

    found, size = [], 0
    for piece in text_pieces([path]):
        found.append(piece)
        size += len(piece)
        if size >= characters:
            break
    return "".join(found)


class Reader:
    """One system at work: reads tokens in order and knows what each one cost to predict."""

    def __init__(self, system: str, model: Any, ids_1T: Any, size: int | None, settings: Settings):
        from transformers import DynamicCache

        from models.streaming import stream

        self.system, self.model, self.ids, self.size, self.at = system, model, ids_1T, size, 0
        self.cache = None
        if system == "dense":
            self.cache = DynamicCache(config=model.config)
        elif system != "recompute":
            self.cache = stream(model, **settings.rule(system, size))

    def skip(self, until: int) -> None:
        """Read up to a position, without predictions."""
        while self.cache is not None and self.at < until:
            self._feed(min(self.at + 256, until), 1)
        self.at = until

    def losses(self, until: int, sampled: int) -> list[float]:
        """Negative log-likelihoods of tokens at + 1 to `until`; of `sampled` evenly spread ones by recomputation."""
        first = self.at
        if self.cache is None:
            picked = _spread(until - first, sampled)
            self.at = until
            return [self._loss(self._recompute(first + p + 1)[:, -1:], first + p + 1)[0] for p in picked]
        found = []
        while self.at < until:
            start = self.at
            found += self._loss(self._feed(min(start + 256, until), 0), start + 1)
        return found

    def step(self) -> None:
        """Read one token and predict the next."""
        if self.cache is None:
            self._recompute(self.at + 1)
            self.at += 1
        else:
            self._feed(self.at + 1, 1)

    def nbytes(self) -> int:
        if self.cache is None:
            return 0
        if self.system == "dense":
            return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)
        return self.cache.nbytes

    def _feed(self, until: int, keep: int) -> Any:
        tokens = self.ids[:, self.at : until]
        self.at = until
        return self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=keep).logits

    def _recompute(self, until: int) -> Any:
        tokens = self.ids[:, max(0, until - self.size) : until]
        return self.model(tokens, use_cache=False, logits_to_keep=1).logits

    def _loss(self, logits: Any, first: int) -> list[float]:
        """Losses of the tokens from position `first` on, one for each entry of logits [1, T, V]."""
        import torch.nn.functional as F

        target = self.ids[0, first : first + logits.shape[1]]
        return F.cross_entropy(logits[0].float(), target, reduction="none").tolist()


def _spread(count: int, picked: int) -> list[int]:
    return [(2 * p + 1) * count // (2 * picked) for p in range(picked)]


def _measure(system: str, model: Any, ids_1T: Any, size: int | None, settings: Settings) -> list[dict[str, Any]]:
    """Rows of one system at one cache size, over all lengths."""
    import torch

    from eval.results import row

    reader = Reader(system, model, ids_1T, size, settings)
    rows = []
    with torch.inference_mode():
        for length in settings.lengths:
            if system == "dense" and length > settings.dense_limit:
                break
            case = f"text {length}" if size is None else f"cache {size} text {length}"
            reader.skip(length - settings.band)
            losses = reader.losses(length, settings.sampled)
            if system != "recompute":
                rows.append(row(case, system, "perplexity", *_perplexity(losses)))
                losses = [losses[p] for p in _spread(settings.band, settings.sampled)]
            kept = {"losses": [round(loss, 6) for loss in losses]}  # for ratios of the same tokens
            rows.append(row(f"{case} sampled", system, "perplexity", *_perplexity(losses)) | kept)
            rows.append(row(case, system, "ms", *_time(reader.step, settings.steps, ids_1T.device)))
            nbytes = reader.nbytes()
            rows.append(row(case, system, "bytes", nbytes, nbytes, nbytes, 1))
    return rows


def _perplexity(losses: list[float]) -> tuple[float, float, float, int]:
    """exp of the mean, its 95 % interval and the number of tokens."""
    n = len(losses)
    mean = sum(losses) / n
    error = math.sqrt(sum((x - mean) ** 2 for x in losses) / max(1, n - 1) / n)
    return math.exp(mean), math.exp(mean - 1.96 * error), math.exp(mean + 1.96 * error), n


def _time(step: Callable[[], None], count: int, device: Any) -> tuple[float, float, float, int]:
    """Median, fastest and slowest milliseconds of a step."""
    import torch

    for _ in range(WARM_UP):
        step()
    taken = []
    for _ in range(count):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(1e3 * (time.perf_counter() - start))
    taken.sort()
    return taken[count // 2], taken[0], taken[-1], count
