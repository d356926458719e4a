"""Packing, order, sharding over ranks, resuming of streams, and the curriculum's plan."""

import copy
import os
import shutil
import time

import numpy as np
import pyarrow.parquet
import pytest
import torch

from training import data as data_module
from training import packing
from training.data import DataConfig, StageConfig, StepBatches, TrainingRows, plan_stages
from training.rows import IGNORED, collate
from training.sources import SourceConfig
from training.store import ABANDONED, TokenStore, open_store
from training.streams import LaneReader
from training.tokenizer import check_vocabulary
from training.wording import NeedleConfig

SEPARATOR = "\n<end>\n"


def make_rows(tokenizer, text_file, *, rank=0, world=1, steps=4, seed=5, needles=None, curriculum=(), **fields):
    streaming, sequences = fields.pop("streaming", False), fields.pop("sequences", 3)
    config = DataConfig(
        sources=[SourceConfig(path=str(text_file), separator=SEPARATOR, streaming=streaming)],
        cache_dir=str(text_file.parent / "cache"),
        **{"sequence_length": 37, **fields},
    )
    stages = plan_stages(config, needles or NeedleConfig(), list(curriculum), steps=steps, sequences=sequences)
    return TrainingRows(config, stages, tokenizer, seed=seed, rank=rank, world=world, progress=False)


def all_keys(rows, **fields):
    return [key for batch in StepBatches(rows.stages, accumulation=1, **fields) for key in batch]


def test_lanes_go_on_when_another_is_sent_back(text_file, texts):
    reader = LaneReader(SourceConfig(path=str(text_file), separator=SEPARATOR), "s", [0, 1], 2)
    assert reader.take(0, 3) == texts[0:6:2]
    assert reader.take(1, 4) == texts[1:9:2]
    reader.seek(0, 0, 1)
    assert reader.take(1, 2) == texts[9:13:2]
    assert reader.take(0, 4) == texts[2:10:2]


@pytest.mark.parametrize("split", [True, False])
def test_an_epoch_holds_every_token_once(tokenizer, text_file, texts, split):
    rows = make_rows(tokenizer, text_file, split_documents=split)
    packed = rows.packed[0, 0]
    epoch = [packed.row(i) for i in range(packed.count)]
    tokens = np.concatenate([row.tokens[row.labels != IGNORED] for row in epoch])
    expected = np.concatenate([tokenizer(t)["input_ids"] + [tokenizer.eos_token_id] for t in texts])
    lost = len(expected) - len(tokens)
    assert 0 <= lost < 37
    assert lost == 0 or split
    counts, wanted = np.bincount(tokens, minlength=300), np.bincount(expected, minlength=300)
    assert (counts <= wanted).all()
    assert all(len(row.tokens) == 37 and row.ends[-1] == 37 and (np.diff(row.ends) > 0).all() for row in epoch)


def test_documents_keep_their_boundaries(tokenizer, text_file, texts):
    rows = make_rows(tokenizer, text_file, sequence_length=211)
    whole = {tuple(tokenizer(t)["input_ids"] + [tokenizer.eos_token_id]) for t in texts}
    inner = 0
    for i in range(rows.packed[0, 0].count):
        row = rows.packed[0, 0].row(i)
        for a, b in zip(row.ends[:-2], row.ends[1:-1], strict=True):
            assert tuple(row.tokens[a:b]) in whole
            inner += 1
    assert inner > 10


def test_unsplit_documents_are_whole_where_they_fit(tokenizer, text_file, texts):
    rows = make_rows(tokenizer, text_file, sequence_length=61, split_documents=False)
    whole = sorted(tuple(tokenizer(t)["input_ids"] + [tokenizer.eos_token_id]) for t in texts)
    found = []
    for i in range(rows.packed[0, 0].count):
        row = rows.packed[0, 0].row(i)
        starts = [0, *row.ends[:-1]]
        found += [tuple(row.tokens[a:b]) for a, b in zip(starts, row.ends, strict=True) if row.labels[a] != IGNORED]
    fitting = [one for one in whole if len(one) <= 61]
    assert len(fitting) > 20
    assert [one for one in sorted(found) if one in set(fitting)] == fitting


def test_whole_documents_share_a_row_while_they_fit():
    """Lengths 3, 4, 2, 9 and 1 in rows of 8: what is longer than a row is cut, and its rest starts one."""
    rows = packing._fill_rows(np.array([3, 4, 2, 9, 1]), 8)
    assert rows == [[(0, 3), (3, 7)], [(7, 9)], [(9, 17)], [(17, 18), (18, 19)]]


def test_rows_begin_elsewhere_in_each_epoch(tokenizer, text_file):
    packed = make_rows(tokenizer, text_file).packed[0, 0]
    slack = packed.store.total - packed.count * packed.length
    offsets = []
    for epoch in range(40):
        packed.row(epoch * packed.count)
        offsets.append(packed.offset)
    assert slack > 2
    assert min(offsets) >= 0
    assert max(offsets) <= slack
    assert len(set(offsets)) > 2


def test_epochs_differ_and_repeat_by_seed(tokenizer, text_file):
    rows, again = (make_rows(tokenizer, text_file) for _ in range(2))
    other = make_rows(tokenizer, text_file, seed=6)
    count = rows.packed[0, 0].count
    first = [rows.packed[0, 0].row(i).tokens.tobytes() for i in range(2 * count)]
    assert first[:count] != first[count:]
    backwards = [again.packed[0, 0].row(i).tokens.tobytes() for i in reversed(range(2 * count))]
    assert backwards[::-1] == first
    assert [other.packed[0, 0].row(i).tokens.tobytes() for i in range(count)] != first[:count]


def test_ranks_share_no_row_and_together_give_the_single_rank_order(tokenizer, text_file):
    rows = make_rows(tokenizer, text_file, steps=6)
    ranks = [all_keys(rows, rank=r, world=3) for r in range(3)]
    assert len({key for keys in ranks for key in keys}) == sum(map(len, ranks)) == 6 * 3 * 3
    joined = [
        key for step in zip(*(np.array_split(np.array(keys), 6) for keys in ranks), strict=True) for key in step
    ]
    assert np.concatenate(joined).tolist() == [[0, i] for i in range(54)]


def test_streams_of_ranks_are_disjoint_and_complete(tokenizer, text_file, texts):
    found = []
    for rank in range(2):
        rows = make_rows(tokenizer, text_file, rank=rank, world=2, streaming=True, shuffle_buffer=7, sequences=4)
        stream = rows.streams[0, rank]
        seen = set()
        while stream.epoch == 0:
            row = stream.row(50)
            starts = [0, *row.ends[:-1]]
            seen |= {tuple(row.tokens[a:b]) for a, b in zip(starts, row.ends, strict=True)}
        found.append(seen)
    whole = {tuple(tokenizer(t)["input_ids"] + [tokenizer.eos_token_id]) for t in texts}
    mine = [{one for one in seen if one in whole} for seen in found]
    assert not mine[0] & mine[1]
    assert min(map(len, mine)) > 5


NEEDLES = NeedleConfig(fraction=0.3, needle="{key}: {value}.", preamble="", question="{key}?", prefix="", digits=1)


def mixed_rows(tokenizer, text_file, *, rank, world, accumulation):
    """Rows of a cached source, two streams and needles, over two stages; 8 rows a step, then 4."""
    file = {"path": str(text_file), "separator": SEPARATOR}
    sources = [SourceConfig(**file), *(SourceConfig(**file, streaming=True, max_documents=n) for n in (13, 8))]
    config = DataConfig(
        sources=sources, sequence_length=160, shuffle_buffer=5, lanes=4, cache_dir=str(text_file.parent / "cache")
    )
    stages = plan_stages(
        config,
        NEEDLES,
        [StageConfig(until_step=6, sequence_length=80)],
        steps=13,
        sequences=1,
        parts=world * accumulation,
        tokens_per_step=640,
    )
    return TrainingRows(config, stages, tokenizer, seed=5, rank=rank, world=world, progress=False)


def all_batches(rows, *, rank, world, accumulation):
    return list(StepBatches(rows.stages, accumulation=accumulation, rank=rank, world=world))


def read_steps(rows, batches, steps, accumulation):
    """Tokens of every row by step, and the cursors after the last."""
    read, cursors = [], {}
    for step in steps:
        micro = [[rows[key] for key in batch] for batch in batches[step * accumulation : (step + 1) * accumulation]]
        read.append([row.tokens for batch in micro for row in batch])
        cursors = next((row.cursors for batch in micro[::-1] for row in batch[::-1] if row.cursors), cursors)
    return read, cursors


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (2, 2), (4, 1)])
def test_ranks_read_what_one_rank_reads_and_go_on_where_others_stopped(tokenizer, text_file, world, accumulation):
    """Every row once, in the order of one rank, streamed ones included; then on, on one rank, from all cursors."""
    single = mixed_rows(tokenizer, text_file, rank=0, world=1, accumulation=1)
    batches = all_batches(single, rank=0, world=1, accumulation=1)
    expected, _ = read_steps(single, batches, range(13), 1)
    assert [len(step) for step in expected] == [8] * 6 + [4] * 7
    assert max(stream.epoch for stream in single.streams.values()) >= 1
    cursors, union = {}, [[] for _ in range(9)]
    for rank in range(world):
        rows = mixed_rows(tokenizer, text_file, rank=rank, world=world, accumulation=accumulation)
        own = all_batches(rows, rank=rank, world=world, accumulation=accumulation)
        read, last = read_steps(rows, own, range(9), accumulation)
        union = [[*before, *now] for before, now in zip(union, read, strict=True)]
        assert not cursors.keys() & last.keys()
        cursors |= last
    for ours, theirs in zip(union, expected, strict=False):
        np.testing.assert_array_equal(ours, theirs)
    resumed = mixed_rows(tokenizer, text_file, rank=0, world=1, accumulation=1)
    resumed.load_cursors(cursors)
    for ours, theirs in zip(read_steps(resumed, batches, range(9, 13), 1)[0], expected[9:], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # and the other way: from one rank to the last of many
    again = mixed_rows(tokenizer, text_file, rank=0, world=1, accumulation=1)
    _, cursors = read_steps(again, batches, range(9), 1)
    assert cursors.keys() == {f"{source}/{lane}" for source, lane in again.streams}
    rows = mixed_rows(tokenizer, text_file, rank=world - 1, world=world, accumulation=accumulation)
    rows.load_cursors(cursors)
    read, _ = read_steps(rows, own, range(9, 13), accumulation)
    for ours, theirs in zip(read, expected[9:], strict=True):
        np.testing.assert_array_equal(ours, theirs[-len(ours) :])


def test_lanes_of_a_rank_read_the_source_once(tokenizer, text_file, monkeypatch):
    from training import streams

    reads, read = [], streams.iter_documents
    monkeypatch.setattr(streams, "iter_documents", lambda *args: (reads.append(1), read(*args))[1])
    rows = make_rows(tokenizer, text_file, streaming=True, lanes=3, shuffle_buffer=2, steps=200)
    epochs = 0
    for index in range(600):
        rows[0, index]
        epochs = 1 + max(stream.epoch for stream in rows.streams.values())
    assert epochs > 3
    assert len(reads) == epochs


def test_lanes_that_ranks_can_not_share(tokenizer, text_file):
    with pytest.raises(ValueError, match=r"data\.lanes=3 can't be shared by 2 ranks"):
        make_rows(tokenizer, text_file, world=2, streaming=True, lanes=3)
    with pytest.raises(ValueError, match=r"holds no text for lane 70 of 80: add documents, or lower data\.lanes"):
        make_rows(tokenizer, text_file, streaming=True, lanes=80, sequences=80).streams[0, 70].row(9)


def test_every_lane_is_read_in_every_step(tokenizer, text_file):
    """Otherwise documents of the others wait in memory for good."""
    message = r"data\.lanes=3 doesn't divide the 4 rows of a step \(steps 0 to \d+\), .*batch\.tokens_per_step"
    with pytest.raises(ValueError, match=message):
        make_rows(tokenizer, text_file, streaming=True, lanes=3, sequences=4)
    make_rows(tokenizer, text_file, lanes=3, sequences=4)


def test_a_step_of_so_many_tokens():
    data = DataConfig(sequence_length=96)
    stages = plan_stages(
        data,
        NeedleConfig(),
        [StageConfig(until_step=2, sequence_length=48)],
        steps=4,
        sequences=99,
        parts=2,
        tokens_per_step=384,
    )
    assert [(s.rows, s.step_rows) for s in stages] == [(4, 8), (2, 4)]
    with pytest.raises(
        ValueError, match=r"tokens_per_step=384 is no multiple of 2 .* curriculum\[0\]\.sequence_length=36"
    ):
        plan_stages(
            data,
            NeedleConfig(),
            [StageConfig(until_step=2, sequence_length=36)],
            steps=4,
            sequences=2,
            parts=2,
            tokens_per_step=384,
        )


@pytest.mark.parametrize("split", [True, False])
def test_a_stream_goes_on_from_its_cursor(tokenizer, text_file, split):
    fields = {"streaming": True, "shuffle_buffer": 11, "split_documents": split}
    rows = make_rows(tokenizer, text_file, **fields)
    keys = [(0, i) for i in range(300)]
    whole = [rows[key] for key in keys]
    assert rows.streams[0, 0].epoch >= 1
    for stop in (0, 1, 17, 164, 290):
        resumed = make_rows(tokenizer, text_file, **fields)
        if stop:
            resumed.load_cursors(collate(whole[:stop])["cursors"])
        for key, row in zip(keys[stop:], whole[stop:], strict=True):
            np.testing.assert_array_equal(resumed[key].tokens, row.tokens)


def test_shares_of_the_mix(tokenizer, text_file):
    needles = NeedleConfig(
        fraction=0.25, needle="{key}: {value}.", preamble="", question="{key}?", prefix="", digits=1
    )
    rows = make_rows(tokenizer, text_file, needles=needles, sequence_length=160)
    kinds = [rows._deal(0, i)[0] for i in range(400)]
    for start in range(0, 400, 40):
        assert abs(kinds[start : start + 40].count(data_module.NEEDLES) - 10) <= 1
    places = [rows._deal(0, i)[1] for i in range(400) if kinds[i] == 0]
    assert places == list(range(len(places)))
    assert rows._deal(0, 9000) == make_rows(tokenizer, text_file, needles=needles, sequence_length=160)._deal(0, 9000)


def test_collate_gives_one_packed_sequence(tokenizer, text_file):
    rows = make_rows(tokenizer, text_file)
    picked = [rows[0, i] for i in range(3)]
    batch = collate(picked)
    assert batch["input_ids"].shape == batch["labels"].shape == (1, 111)
    assert batch["cu_seqlens"].dtype == torch.int32
    bounds = batch["cu_seqlens"].tolist()
    assert bounds[0] == 0
    assert bounds == sorted(set(bounds))
    assert {37, 74, 111} <= set(bounds)
    assert torch.equal(batch["input_ids"][0, 37:74], torch.from_numpy(picked[1].tokens))


def test_curriculum(tokenizer):
    data = DataConfig(sequence_length=96)
    curriculum = [
        StageConfig(until_step=10, sequence_length=32, needles={"digits": 1}),
        StageConfig(until_step=15, sequence_length=64),
    ]
    stages = plan_stages(data, NeedleConfig(digits=5), curriculum, steps=40, sequences=4)
    assert [(s.first, s.last, s.sequence_length, s.rows) for s in stages] == [
        (0, 10, 32, 12),
        (10, 15, 64, 6),
        (15, 40, 96, 4),
    ]
    assert [s.needles.digits for s in stages] == [1, 5, 5]
    longer = [StageConfig(until_step=5, sequence_length=97)]
    with pytest.raises(ValueError, match=r"curriculum\[0\]\.sequence_length=97 is above data\.sequence_length=96"):
        plan_stages(data, NeedleConfig(), longer, steps=9, sequences=4)
    keys = list(StepBatches(stages, accumulation=2))
    assert len(keys) == 80
    assert [len(batch) for batch in keys[18:22]] == [12, 12, 6, 6]
    assert keys[20][0] == (1, 0)
    shorter = plan_stages(data, NeedleConfig(), curriculum, steps=12, sequences=4)
    assert [(s.first, s.last) for s in shorter] == [(0, 10), (10, 12)]
    with pytest.raises(ValueError, match=r"curriculum\[1\]\.until_step=10 is not after step 10"):
        plan_stages(data, NeedleConfig(), [curriculum[0]] * 2, steps=40, sequences=4)
    with pytest.raises(ValueError, match=r"curriculum\[0\]\.needles\.digit is unknown"):
        plan_stages(data, NeedleConfig(), [StageConfig(until_step=5, needles={"digit": 1})], steps=9, sequences=4)


def test_store_is_built_once_and_survives_a_dead_writer(tokenizer, text_file, monkeypatch):
    source = SourceConfig(path=str(text_file), separator=SEPARATOR)
    cache = text_file.parent / "cache"
    build = lambda: open_store(source, tokenizer, cache, name="s", add_bos=True, add_eos=True, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(TokenStore, "_open", lambda self: None)
        patch.setattr("numpy.save", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            build()
    assert list(cache.iterdir()) == []
    store = build()
    assert store.tokens[0] == tokenizer.bos_token_id
    assert store.tokens[store.ends[0]] == tokenizer.bos_token_id
    with monkeypatch.context() as patch:
        patch.setattr("training.store._build", None)
        assert build().total == store.total
    text_file.write_text("changed")
    assert build().total < store.total


def test_an_abandoned_store_goes_and_another_writer_stays(tokenizer, text_file, monkeypatch):
    source = SourceConfig(path=str(text_file), separator=SEPARATOR)
    cache = text_file.parent / "cache"
    build = lambda: open_store(source, tokenizer, cache, name="s", add_bos=True, add_eos=True, progress=False)
    folder = build().folder
    now = time.time()
    for name, age in (("old", 2 * ABANDONED), ("own", 60)):
        work = cache / f"{folder.name}.{name}.partial"
        work.mkdir()
        (work / "tokens.bin").write_bytes(b"1")
        for path in (work / "tokens.bin", work):
            os.utime(path, (now - age, now - age))
    (folder / "meta.json").unlink()
    shutil.rmtree(folder)
    build()
    assert {path.name for path in cache.iterdir()} == {folder.name, f"{folder.name}.own.partial"}


def test_the_store_of_a_local_hub_folder_follows_its_files(tokenizer, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    source = SourceConfig(hub=str(tmp_path / "set"))
    for count in (10, 30):
        pyarrow.parquet.write_table(pyarrow.table({"text": texts[:count]}), tmp_path / "set" / "train.parquet")
        store = open_store(source, tokenizer, tmp_path / "c", name="s", add_bos=True, add_eos=True, progress=False)
        assert len(store) == count


def test_empty_data_and_short_data(tokenizer, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text(f" \n{SEPARATOR} ")
    with pytest.raises(ValueError, match=r"data\.sources\[0\] \(.*texts\.txt\) holds no text"):
        make_rows(tokenizer, path)
    with pytest.raises(ValueError, match=r"holds no text for lane 0"):
        make_rows(tokenizer, path, streaming=True)[0, 0]
    path.write_text("Too short.")
    with pytest.raises(ValueError, match=r"holds \d+ tokens, less than one row of 37"):
        make_rows(tokenizer, path)
    with pytest.raises(ValueError, match=r"data\.sources is empty"):
        data_module.check_data(DataConfig(), plan_stages(DataConfig(), NeedleConfig(), [], steps=1, sequences=1))


def test_vocabulary_check(tokenizer):
    check_vocabulary(tokenizer, len(tokenizer))
    with pytest.raises(ValueError, match=rf"has {len(tokenizer)} entries but the model's vocab_size is 299"):
        check_vocabulary(tokenizer, 299)


def test_a_begin_token_that_the_tokenizer_lacks(tokenizer, text_file):
    without = copy.deepcopy(tokenizer)
    without.bos_token = None
    with pytest.raises(ValueError, match=r"data\.add_bos=True, but the tokenizer has no bos_token"):
        make_rows(without, text_file, add_bos=True)
    make_rows(without, text_file)
