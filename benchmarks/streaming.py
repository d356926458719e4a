"""`lalte bench streaming`: one pretrained decoder over one long text, read in four ways (arXiv 2309.17453, figure 3).

    lalte       sinks and a window, positions counted in the cache (models.streaming)
    window      the same cache without sinks
    recompute   no cache: the last tokens are read again for every new one
    dense       the whole text in the cache

For each cache size and each length of text: perplexity, milliseconds a token and bytes of the cache. Imports nothing
heavy at its head, so that --help is quick. Shapes: B batch, T tokens.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Reads one long text with a pretrained decoder in four ways: with sinks and a window (lalte), with a window alone,
with the last tokens recomputed for every new one, and with everything in the cache (dense). Reports perplexity,
milliseconds a token and bytes of the cache against the length of the text.
"""
EPILOG = """\
examples:
  lalte bench streaming                                       random small model: times and bytes, a minute
  lalte bench streaming --model smollm2.gguf --text book.txt --cache-sizes 256,1024 --lengths 2048,8192,20480

A text may be compressed (.xz, .gz). A GGUF file needs the packages gguf and accelerate.
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
        ValueError: settings, model or text can't be used, or the file exists.
    """
    settings.check()
    from eval.results import result, say, write_json
    from models.loading import pick_device

    device = pick_device(settings.device)
    out = Path(settings.out or f"benchmarks/results/{_slug(device)}/streaming.json")
    if out.exists() and not settings.overwrite:
        raise ValueError(f"out: {out} exists; choose another file, or give --overwrite")
    model, ids_1T = _model_and_text(settings, device)
    rows = []
    for size in settings.cache_sizes:
        for system in SYSTEMS[:3]:
            say(f"cache of {size} tokens: {system}")
            rows += _measure(system, model, ids_1T, size, settings)
    if any(length <= settings.dense_limit for length in settings.lengths):
        say("dense")
        rows += _measure("dense", model, ids_1T, None, settings)
    content = result("streaming", rows, config=asdict(settings), device=device, model=type(model).__name__)
    write_json(out, content, overwrite=settings.overwrite)
    if settings.figure:
        draw(content, settings.figure)
    say(f"written: {out}")
    return content


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
    text = _read_text(Path(settings.text), 12 * count)
    model, tokenizer = _load(Path(settings.model), settings.dtype, device)
    ids_1T = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :count]
    if ids_1T.shape[1] < count:
        raise ValueError(f"text: {settings.text} has {ids_1T.shape[1]} tokens and {count} are needed; read less")
    return model, ids_1T.to(device)


def _load(path: Path, dtype: str, device: Any) -> tuple[Any, Any]:
    from models.loading import load_any, pick_dtype

    if path.suffix != ".gguf":
        return load_any(path, device, dtype)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not path.is_file():
        raise ValueError(f"model: {path} is not a file")
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=pick_dtype(dtype))
    return model.eval().to(device), AutoTokenizer.from_pretrained(**where)


def _read_text(path: Path, characters: int) -> str:
    """The first characters of a text file, which may be compressed.

    Raises:
        ValueError: missing, or not text in UTF-8.
    """
    import gzip
    import lzma

    opener: Callable = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return file.read(characters)
    except (OSError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise ValueError(f"text: {path} can't be read as text ({error}); give a UTF-8 file, .xz or .gz") from error


class Reader:
    """One system at work: reads tokens in order and knows what each one cost to predict."""

    def __init__(self, system: str, model: Any, ids_1T: Any, size: int | None, sinks: int):
        from transformers import DynamicCache

        from models.streaming import stream

        self.system, self.model, self.ids, self.size, self.at = system, model, ids_1T, size, 0
        self.cache = None
        if system == "dense":
            self.cache = DynamicCache(config=model.config)
        elif system != "recompute":
            first = sinks if system == "lalte" else 0
            self.cache = stream(model, first, size - first)

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

    reader = Reader(system, model, ids_1T, size, settings.sinks)
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
            rows.append(row(f"{case} sampled", system, "perplexity", *_perplexity(losses)))
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


def table(content: dict[str, Any]) -> str:
    """The rows as lines for a terminal, with the ratio of each time to that of lalte in the same case."""
    own = {row["case"]: row["median"] for row in content["rows"] if (row["system"], row["metric"]) == ("lalte", "ms")}
    lines = [f"{'case':<34}{'system':<12}{'metric':<12}{'median':>14}  ratio"]
    for row in content["rows"]:
        ratio = f"{row['median'] / own[row['case']]:6.2f}" if row["metric"] == "ms" and row["case"] in own else ""
        value = f"{row['median']:.0f}" if row["metric"] == "bytes" else f"{row['median']:.2f}"
        lines.append(f"{row['case']:<34}{row['system']:<12}{row['metric']:<12}{value:>14}  {ratio}".rstrip())
    return "\n".join(lines)


def draw(content: dict[str, Any], path: str) -> None:
    """Perplexity and milliseconds a token against the length of the text, one panel a cache size."""
    from matplotlib.figure import Figure

    sizes = content["config"]["cache_sizes"]
    figure = Figure(figsize=(4 * len(sizes), 6), layout="constrained")
    for r, metric in enumerate(("perplexity", "ms")):
        for c, size in enumerate(sizes):
            axes = figure.add_subplot(2, len(sizes), r * len(sizes) + c + 1)
            for system in SYSTEMS:
                points = _points(content["rows"], system, metric, size)
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", label=system)
            axes.set(xscale="log", yscale="log", title=f"cache of {size}", xlabel="tokens read")
            axes.set_ylabel("perplexity" if metric == "perplexity" else "ms a token")
            axes.legend()
    figure.savefig(path)


def _points(rows: list[dict[str, Any]], system: str, metric: str, size: int) -> list[tuple[int, float]]:
    """(length, median) of a system; perplexities are those of the sampled tokens, which all systems share."""
    found = []
    for row in rows:
        words = row["case"].split()
        mine = words[0] == "text" or words[1] == str(size)
        shared = ("sampled" in words) == (metric == "perplexity")
        if row["system"] == system and row["metric"] == metric and mine and shared:
            found.append((int(words[words.index("text") + 1]), row["median"]))
    return found
