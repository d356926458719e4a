"""What wrong answers to S-NIAH are: the value of another needle, the beginning of the right one, or neither.

    python -m benchmarks.small_wrong runs/small-eval --tokenizer runs/small/lalte --out results/small --overwrite

Writes OUT/wrong.md from the samples in RUNS/NAME/…niah…, of models as they are and with budget 0. Samples have no
prompts: these are made anew from the evaluation's settings, with the models' tokenizer.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.small import BUDGET, exit_status, results_parser
from benchmarks.small_tables import split_label
from eval.compare import read_samples
from eval.loading import load_tokenizer
from eval.needles import NEEDLE, make_samples
from eval.results import read_json, write_bytes

DIGITS = 7  # of a value that is a number
RUN = 3  # figures of a value in a row that are hardly there by chance
_LINE = re.escape(NEEDLE.format(kind="number", key="KEY", value="VALUE"))
VALUE = re.compile(_LINE.replace("KEY", r"\S+").replace("VALUE", rf"(\d{{{DIGITS}}})"))
HEAD = ["model", "case", "answers", "right", "of another needle", *(f"first {n}" for n in range(DIGITS)), "inside"]
NOTE = f"""Answers by their first number: the right value, the whole value of another needle of the same prompt, and
the others by how many of the right value's first figures they begin with. Inside: of those that begin with none, how
many have {RUN} or more of its figures in a row. Tasks that ask for one number of {DIGITS} figures.
"""


def first_figures(answer: str, value: str) -> int:
    """How many of a value's first figures an answer begins with."""
    same = [a == b for a, b in zip(answer, value, strict=False)]
    return (*same, False).index(False)


def has_run(answer: str, value: str) -> bool:
    """Whether an answer has `RUN` figures of a value in a row."""
    return any(value[i : i + RUN] in answer for i in range(len(value) - RUN + 1))


def form(prediction: str, value: str, others: set[str]) -> list[str]:
    """The columns of `HEAD` in which an answer counts.

    Args:
        prediction: what the model wrote; its first number is the answer.
        value: that was asked for.
        others: values of the prompt's other needles.
    """
    found = re.search(r"\d+", prediction)
    answer = found.group() if found else ""
    if answer == value:
        return ["right"]
    if answer in others:
        return ["of another needle"]
    begun = min(first_figures(answer, value), DIGITS - 1)  # a longer number may begin with all of them
    return [f"first {begun}", *(["inside"] if begun == 0 and has_run(answer, value) else [])]


def counts(folder: Path, prompts: Callable[..., Any]) -> dict[tuple[str, int], Counter[str]]:
    """Forms of the answers of one evaluation by task and length.

    Args:
        folder: of the evaluation, with settings.json and samples.
        prompts: gives the samples of (task, length, samples, seed, new tokens, step) with their prompts.

    Raises:
        ValueError: the samples don't belong to these prompts.
    """
    settings = read_json(folder / "settings.json")
    drawn = [settings[name] for name in ("samples", "seed", "new_tokens", "step")]
    found: dict[tuple[str, int], Counter[str]] = {}
    for task, samples in read_samples(folder).items():
        for sample in samples:
            made = prompts(task, sample["length"], *drawn)[sample["index"]]
            if list(made.outputs) != sample["expected"] or made.tokens != sample["tokens"]:
                raise ValueError(
                    f"--tokenizer: sample {sample['index']} of {task}, {sample['length']} tokens, in {folder} had "
                    "another prompt; give the tokenizer that the model was evaluated with"
                )
            if len(made.outputs) > 1 or not re.fullmatch(rf"\d{{{DIGITS}}}", made.outputs[0]):
                continue
            others = set(VALUE.findall(made.prompt)) - set(made.outputs)
            cell = found.setdefault((task, sample["length"]), Counter())
            cell.update(["answers", *form(sample["prediction"], made.outputs[0], others)])
    return found


def wrong_table(runs: Path, tokenizer: Any) -> str:
    """The table of all models in `runs`, as Markdown.

    Raises:
        ValueError: no samples, or not those of this tokenizer.
    """

    @cache
    def prompts(task: str, length: int, samples: int, seed: int, new_tokens: int, step: int | None) -> Any:
        return make_samples(task, tokenizer, length, samples, seed, new_tokens, step=step)

    cells = {}
    for folder in runs.glob("*/*niah-*"):
        member, change = split_label(f"{folder.parent.name}.{folder.name}")
        if change in ("", f"{BUDGET}0"):
            name = "-".join(filter(None, (member, change)))
            cells.update({(name, *case): cell for case, cell in counts(folder, prompts).items()})
    if not cells:
        raise ValueError(f"runs: {runs} holds no samples of S-NIAH in NAME/EVALUATION/samples; evaluate models first")
    lines = [
        [name, f"{task} L{length}", *(str(cell[column]) for column in HEAD[2:])]
        for (name, task, length), cell in sorted(cells.items())
    ]
    row = lambda cells: f"| {' | '.join(cells)} |"
    return "\n".join([NOTE, row(HEAD), "|---|---|" + "---:|" * len(HEAD[2:]), *map(row, lines)]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 2 for an error of the user's."""
    made = results_parser(__doc__, what="folder of evaluations, as small_tables reads it")
    made.add_argument("--tokenizer", metavar="DIR", required=True, help="of the evaluated models")
    args = made.parse_args(argv)

    def command() -> None:
        text = wrong_table(Path(args.runs), load_tokenizer(args.tokenizer))
        write_bytes(Path(args.out) / "wrong.md", text.encode(), overwrite=args.overwrite)

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
