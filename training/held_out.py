"""Needle documents of a recipe that none of its runs trains on, for measuring what a model has learnt.

Shapes: T tokens of a document.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from training.config import load_config
from training.data import TrainingRows
from training.rows import IGNORED
from training.setup import plan_steps

FIRST_ROW = 1 << 40  # beyond any that a run trains on: rows are a function of seed, stage and number
SEED_ROWS = 1 << 20  # between the rows of one seed and those of the next


class HeldOutDocuments:
    """New documents of every kind in the last stage of a recipe, with labels on answers alone.

    Args:
        recipe: configuration of `lalte train`, such as the config.yaml in a run's folder.
        changes: to the recipe, as `lalte train` takes them, such as other text: `data.sources=[{path: b.txt}]`.
        rows: of each kind (needles.variants); a row has one document, or several if they are shorter.
        seed: of the documents, beside the recipe's own.

    Attributes:
        kinds: the needle's template of each kind.
        settings: what the documents depend on, but for the tokenizer.

    Raises:
        ValueError: a file that isn't there or can't be understood, a last stage without needle documents, or an
            argument that can't be used.
    """

    def __init__(
        self,
        recipe: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        changes: Sequence[str] = (),
        *,
        rows: int = 4,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        if not 1 <= rows <= SEED_ROWS:
            raise ValueError(f"rows: {rows} is not a whole number from 1 to {SEED_ROWS}")
        if not 0 <= seed < SEED_ROWS:
            raise ValueError(f"seed: {seed} is not a whole number from 0 to {SEED_ROWS - 1}")
        if not Path(recipe).is_file():
            raise ValueError(f"recipe: {recipe} is not a file; give the configuration of `lalte train`")
        config = load_config(recipe, changes)
        stage = plan_steps(config, 1)[0][-1]
        if not stage.needles.fraction:
            raise ValueError(f"recipe: {recipe} ends without needle documents (needles.fraction is 0); name another")
        given = stage.needles.variants
        kinds = [{name: value for name, value in kind.items() if name != "loss_on"} for kind in given]
        stage = replace(stage, needles=replace(stage.needles, fraction=1.0, loss_on="answer", variants=kinds))
        made = TrainingRows(config.data, [stage], tokenizer, seed=config.seed, progress=progress)
        self._makers = made.makers[0]
        self._numbers = range(FIRST_ROW + seed * SEED_ROWS, FIRST_ROW + seed * SEED_ROWS + rows)
        self.kinds = [maker.config.needle for maker in self._makers]
        origin = {"needles": asdict(stage.needles), "length": stage.sequence_length, "seed": config.seed}
        origin |= {"text": made.text, "weights": [source.weight for source in config.data.sources]}
        origin |= {"add_bos": config.data.add_bos}
        digest = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:16]
        self.settings = {"recipe": digest, "rows": rows, "seed": seed}

    def of_kind(self, kind: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and labels, int64 [T] each, of the documents of one kind; labels are -100 but for answers."""
        for number in self._numbers:
            row = self._makers[kind].row(number)
            start = 0
            for end in row.ends:
                labels_T = torch.from_numpy(row.labels[start:end])
                if (labels_T != IGNORED).any():  # a row may end with a document of padding
                    yield torch.from_numpy(row.tokens[start:end]), labels_T
                start = end
