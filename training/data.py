"""The training data of a run: a plan of stages, and rows that are a function of (seed, stage, index).

Rows come from text sources (packed from the token cache, or streamed) and from needle documents. Nothing about the
order is kept in memory that a resumed run or another rank would lack; only streamed sources carry a cursor.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from training.needles import NeedleMaker
from training.packing import PackedRows
from training.rows import Row
from training.sources import SourceConfig, check_source, local_files
from training.store import TokenStore, open_store
from training.streams import LaneReader, TokenStream
from training.tokenizer import check_begin, check_vocabulary
from training.wording import NeedleConfig, merge_needles, variants

GOLDEN = (5**0.5 - 1) / 2
NEEDLES = -1


@dataclass
class DataConfig:
    """Where text comes from and how it becomes rows.

    sequence_length: tokens of a row, the longest that a document can be in training.
    split_documents: a document may go on in another row; off: rows are filled up instead, and only documents longer
        than a row are cut.
    add_bos, add_eos: put the tokenizer's begin or end token around each document.
    shuffle: order documents and rows by the seed. shuffle_buffer: the same for streamed documents, within blocks of a
        lane.
    lanes: parts into which streamed sources are cut, a multiple of the ranks; the rows depend on it and not on the
        ranks. Null: one a rank, and the run can't go on with another number of ranks.
    cache_dir: folder of the tokenised sources. workers: processes that prepare batches (streams use at most one).
    """

    sources: list[SourceConfig] = field(default_factory=list)
    sequence_length: int = 1024
    split_documents: bool = True
    add_bos: bool = False
    add_eos: bool = True
    shuffle: bool = True
    shuffle_buffer: int = 1000
    lanes: int | None = None
    cache_dir: str = "~/.cache/lalte"
    workers: int = 0


@dataclass
class StageConfig:
    """One stage of the curriculum, for the optimizer steps before `until_step`. Unset fields keep the run's values.

    needles: changes to the needle settings, for example {digits: 1, fraction: 0.9}.
    """

    until_step: int = 0
    sequence_length: int | None = None
    needles: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A resolved stage: steps first … last - 1. A row has `sequence_length` tokens, a micro-batch of one rank `rows`
    rows, and the whole step `step_rows`.
    """

    first: int
    last: int
    sequence_length: int
    rows: int
    needles: NeedleConfig
    step_rows: int


def plan_stages(
    data: DataConfig,
    needles: NeedleConfig,
    curriculum: list[StageConfig],
    *,
    steps: int,
    sequences: int,
    parts: int = 1,
    tokens_per_step: int | None = None,
) -> list[Stage]:
    """Resolve the curriculum; steps after its last stage use the run's own settings.

    A step has `parts` micro-batches, over all ranks. The tokens of one, sequences · data.sequence_length, stay about
    the same in every stage; with tokens_per_step those of a step are exactly this many.
    Raises: ValueError naming the stage's field.
    """
    stages, first = [], 0
    closing = StageConfig(until_step=steps)
    for number, stage in enumerate([*curriculum, closing]):
        name = f"curriculum[{number}]"
        inner = "" if stage is closing else f"{name}."  # the closing stage is the run's own settings
        if stage is not closing and stage.until_step <= first and number < len(curriculum):
            raise ValueError(
                f"{name}.until_step={stage.until_step} is not after step {first}, where the stage begins: "
                "stages are listed in order"
            )
        last = min(stage.until_step, steps)
        if first >= last:
            break
        length = data.sequence_length if stage.sequence_length is None else stage.sequence_length
        if length < 2:
            raise ValueError(f"{name}.sequence_length={length} is below 2: a row needs a token to predict")
        if length > data.sequence_length:
            raise ValueError(
                f"{name}.sequence_length={length} is above data.sequence_length={data.sequence_length}, the longest "
                "of the run, which model and retention are made for: raise that"
            )
        settings = merge_needles(needles, stage.needles, f"{inner}needles")
        rows = max(1, sequences * data.sequence_length // length)
        if tokens_per_step is not None:
            rows = tokens_per_step // (length * parts)
            if rows * length * parts != tokens_per_step:
                raise ValueError(
                    f"batch.tokens_per_step={tokens_per_step} is no multiple of {parts} micro-batches times "
                    f"{name}.sequence_length={length}: use lengths that divide data.sequence_length"
                )
        stages.append(Stage(first, last, length, rows, settings, rows * parts))
        first = last
    return stages


class TrainingRows(Dataset):
    """All rows of a run. A key is (stage, index); the rows of a stage are dealt to sources by their weights.

    Raises: ValueError for bad settings, missing or empty data, and rows too short for their needles.
    """

    def __init__(
        self,
        config: DataConfig,
        stages: list[Stage],
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        progress: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        self.config, self.stages, self.seed, self.tokenizer = config, stages, seed, tokenizer
        self.names = [f"data.sources[{i}]" for i in range(len(config.sources))]
        check_data(config, stages)
        check_begin(tokenizer, config.add_bos)
        if vocab_size is not None:
            check_vocabulary(tokenizer, vocab_size)
        # text for haystacks; filled below, once the settings of the needles are known to be right
        self.texts: list[TokenStore] = []
        self.makers = [self._makers(s) for s in range(len(stages))]
        self.stores: dict[int, TokenStore] = {}
        self.streamed: dict[str, list[int]] = {}  # by name: files and bytes
        self.lanes = config.lanes or world
        if self.lanes % world:
            raise ValueError(
                f"data.lanes={self.lanes} can't be shared by {world} ranks: use a multiple of them, and the same one "
                "for the whole run"
            )
        self._check_lanes()
        self.streams: dict[tuple[int, int], TokenStream] = {}  # by source and lane
        own = range(rank * self.lanes // world, (rank + 1) * self.lanes // world)
        for i, source in enumerate(config.sources):
            if source.streaming:
                sizes = [file.stat().st_size for file in local_files(source, self.names[i])]
                self.streamed[self.names[i]] = [len(sizes), sum(sizes)]
                self.streams |= self._streams(i, source, own)
            else:
                self.stores[i] = self._store(i, source, progress)
                self.texts.append(self.stores[i])
        self.cursors: dict[str, Any] = {}
        self.packed: dict[tuple[int, int], PackedRows] = {}
        for s in range(len(stages)):
            if stages[s].needles.fraction < 1:
                self.packed |= {(s, i): self._packed(s, i) for i in self.stores}
        self.dealt: tuple[int, np.ndarray, np.ndarray] | None = None

    def _check_lanes(self) -> None:
        """Every lane must be read in every step: the text of one that isn't would wait in memory, and be missed."""
        if not any(source.streaming for source in self.config.sources):
            return
        for stage in self.stages:
            if stage.needles.fraction < 1 and stage.step_rows % self.lanes:
                raise ValueError(
                    f"data.lanes={self.lanes} doesn't divide the {stage.step_rows} rows of a step (steps "
                    f"{stage.first} to {stage.last - 1}), so some of the streamed text would not be read: use a "
                    "divisor, or other rows a step (batch.tokens_per_step)"
                )

    def _store(self, i: int, source: SourceConfig, progress: bool) -> TokenStore:
        c = self.config
        return open_store(
            source,
            self.tokenizer,
            Path(c.cache_dir),
            name=self.names[i],
            add_bos=c.add_bos,
            add_eos=c.add_eos,
            progress=progress,
        )

    def _streams(self, i: int, source: SourceConfig, lanes: range) -> dict[tuple[int, int], TokenStream]:
        c = self.config
        reader = LaneReader(source, self.names[i], lanes, self.lanes)
        return {
            (i, lane): TokenStream(
                reader,
                self.tokenizer,
                seed=[self.seed, 2, i],
                lane=lane,
                buffer=c.shuffle_buffer if c.shuffle else 1,
                add_bos=c.add_bos,
                add_eos=c.add_eos,
                split=c.split_documents,
            )
            for lane in lanes
        }

    def _packed(self, stage: int, i: int) -> PackedRows:
        c = self.config
        return PackedRows(
            self.stores[i],
            self.stages[stage].sequence_length,
            seed=[self.seed, 0, stage, i],
            shuffle=c.shuffle,
            split=c.split_documents,
            pad=self.tokenizer.eos_token_id,
            name=self.names[i],
        )

    def _makers(self, stage: int) -> list[NeedleMaker]:
        settings = self.stages[stage].needles
        if settings.fraction == 0:
            return []
        kinds = variants(settings, "needles")
        return [
            NeedleMaker(
                kind,
                self.tokenizer,
                row_length=self.stages[stage].sequence_length,
                seed=self.seed,
                stage=stage,
                stores=self.texts,
                weights=[source.weight for source in self.config.sources if not source.streaming],
                add_bos=self.config.add_bos,
                name=f"needles.variants[{i}]" if len(kinds) > 1 else "needles",
            )
            for i, kind in enumerate(kinds)
        ]

    def __getitem__(self, key: tuple[int, int]) -> Row:
        stage, index = key
        kind, place = self._deal(stage, index)
        if kind == NEEDLES:
            makers = self.makers[stage]
            return makers[place % len(makers)].row(place)
        if kind in self.packed_sources(stage):
            return self.packed[stage, kind].row(place)
        lane = self.lane(stage, index)
        stream = self.streams[kind, lane]
        row = stream.row(self.stages[stage].sequence_length)
        self.cursors = {**self.cursors, f"{kind}/{lane}": stream.cursor()}
        row.cursors = self.cursors
        return row

    def lane(self, stage: int, index: int) -> int:
        """The lane that a row takes streamed text from: each rank's part of a step has lanes of its own."""
        step_rows = self.stages[stage].step_rows
        return index % step_rows * self.lanes // step_rows

    @property
    def text(self) -> dict[str, list[int]]:
        """What the rows depend on: documents and tokens of each source in the cache, and of each streamed one the
        files that are read and their bytes, as they were when the run began."""
        cached = {self.names[i]: [len(store), store.total] for i, store in self.stores.items()}
        return cached | self.streamed

    def packed_sources(self, stage: int) -> list[int]:
        """Numbers of the sources that this stage reads from the cache."""
        return [i for s, i in self.packed if s == stage]

    def load_cursors(self, cursors: dict[str, Any]) -> None:
        """Go on with the streamed sources where a checkpoint left them; cursors of other ranks' lanes are let be."""
        for (source, lane), stream in self.streams.items():
            if cursor := cursors.get(f"{source}/{lane}"):
                stream.seek(cursor)
                self.cursors[f"{source}/{lane}"] = cursor

    def _deal(self, stage: int, index: int) -> tuple[int, int]:
        """What row `index` of a stage is made of, and how many rows of that kind came before it."""
        weights = np.asarray([s.weight for s in self.config.sources], float)
        share = self.stages[stage].needles.fraction
        parts = np.concatenate([[share], (1 - share) * weights / weights.sum() if len(weights) else []])
        if self.dealt is None or self.dealt[0] != stage or len(self.dealt[1]) <= index:
            # multiples of the golden ratio are spread evenly, so that every batch has close to the wanted shares
            count = max(4096, 2 * index + 2)
            shift = np.random.default_rng([self.seed, 1, stage]).random()
            points = (shift + GOLDEN * np.arange(count)) % 1.0
            kinds = np.minimum(np.searchsorted(np.cumsum(parts), points, side="right"), len(parts) - 1)
            places = np.empty(count, np.int64)
            for kind in range(len(parts)):
                chosen = kinds == kind
                places[chosen] = np.arange(int(chosen.sum()))
            self.dealt = (stage, kinds, places)
        return int(self.dealt[1][index]) - 1, int(self.dealt[2][index])


def check_data(config: DataConfig, stages: list[Stage]) -> None:
    """Raises: ValueError for settings of the data that can't work, before anything is read at length."""
    if not config.sources and any(stage.needles.fraction < 1 for stage in stages):
        raise ValueError("data.sources is empty: name text, or set needles.fraction=1 to train on needles alone")
    for i, source in enumerate(config.sources):
        check_source(source, f"data.sources[{i}]")
    if config.workers < 0 or config.shuffle_buffer < 1:
        raise ValueError(
            f"data.workers={config.workers}, data.shuffle_buffer={config.shuffle_buffer}: workers is 0 or more, "
            "shuffle_buffer 1 or more"
        )
    if config.workers > 1 and any(source.streaming for source in config.sources):
        raise ValueError(f"data.workers={config.workers} with a streamed source: a stream is read by one, set 0 or 1")


class StepBatches(Sampler[list[tuple[int, int]]]):
    """The row keys of every micro-batch of one rank, in order: a step is cut into one part a rank, in turn.

    The union over the ranks is every row once, whatever their number.
    """

    def __init__(self, stages: list[Stage], *, accumulation: int, rank: int = 0, world: int = 1) -> None:
        self.stages, self.accumulation, self.rank, self.world = stages, accumulation, rank, world

    def __len__(self) -> int:
        return sum(stage.last - stage.first for stage in self.stages) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number, stage in enumerate(self.stages):
            for step in range(stage.last - stage.first):
                first = (step * self.world + self.rank) * self.accumulation
                for micro in range(first, first + self.accumulation):
                    yield [(number, index) for index in range(micro * stage.rows, (micro + 1) * stage.rows)]
