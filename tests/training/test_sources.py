"""Reading text: every format and compression gives the same documents, and broken files are named."""

import gzip
import io
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest

from training import sources
from training.sources import SourceConfig, iter_documents

SEPARATOR = "\n<end>\n"


def read(**fields) -> list[str]:
    return list(iter_documents(SourceConfig(**fields), "data.sources[0]"))


# gzip's header is whole, and then deflate begins with a kind of block that there isn't
WHOLE = gzip.compress(b"text " * 99, mtime=0)
UNKNOWN_BLOCK = WHOLE[:10] + b"\x06" + WHOLE[11:]
# parquet's footer is whole, and the page of the text isn't
PARQUET = io.BytesIO()
pyarrow.parquet.write_table(pyarrow.table({"text": [f"text {n}" for n in range(99)]}), PARQUET)
DAMAGED_PAGE = PARQUET.getvalue()[:4] + b"\xff" * 40 + PARQUET.getvalue()[44:]


def write_zst(path, data: bytes) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as out:
        out.write(data)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_formats_agree(tmp_path, texts, kind, suffix, monkeypatch):
    # small chunks cut separators, lines and multi-byte characters in two
    monkeypatch.setattr(sources, "CHUNK_BYTES", 7)
    texts = [*texts, "Grüße, 世界 🙂", "line\nbreak and \u2028 separator"]
    if kind == "txt":
        data = SEPARATOR.join(texts).encode()
    else:
        data = "".join(json.dumps({"id": 1, "body": t}, ensure_ascii=False) + "\n" for t in texts).encode()
    path = tmp_path / f"file.{kind}{suffix}"
    write = {"": lambda p, d: p.write_bytes(d), ".gz": lambda p, d: p.write_bytes(gzip.compress(d))}
    write |= {".xz": lambda p, d: p.write_bytes(lzma.compress(d)), ".zst": write_zst}
    write[suffix](path, data)
    assert read(path=str(path), separator=SEPARATOR, text_field="body") == texts


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_a_byte_order_mark_is_no_text(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(sources, "CHUNK_BYTES", chunk)
    mark = "\ufeff"
    for name, text in (("a.txt", f"Grüße {mark}!"), ("b.jsonl", '{"text": "Grüße \ufeff!"}\n')):
        (tmp_path / name).write_text(mark + text, encoding="utf-8")
        assert read(path=str(tmp_path / name)) == [f"Grüße {mark}!"]
    (tmp_path / "a.txt").write_bytes((mark + "one").encode() + b"\xff")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text: byte 6 "):
        read(path=str(tmp_path / "a.txt"))


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_lines_of_other_systems_end_with_line_feeds(tmp_path, monkeypatch, end, chunk):
    """Otherwise a separator of line feeds stands nowhere in the file, which is one document then."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", chunk)
    (tmp_path / "a.txt").write_bytes(end.join(["one", "two", "", "", "three", ""]).encode())
    assert read(path=str(tmp_path / "a.txt"), separator="\n\n\n") == ["one\ntwo", "three\n"]
    assert read(path=str(tmp_path / "a.txt")) == ["one\ntwo\n\n\nthree\n"]
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a\\r\\nb"}\r\n{"text": "c"}\r\n')
    assert read(path=str(tmp_path / "b.jsonl")) == ["a\r\nb", "c"], "what a string holds is its own"


def test_parquet_folder_and_limits(tmp_path, texts):
    for number, part in enumerate((texts[:20], texts[20:])):
        table = pyarrow.table({"text": part, "other": list(range(len(part)))})
        pyarrow.parquet.write_table(table, tmp_path / f"part-{number}.parquet")
    assert read(path=str(tmp_path)) == texts
    assert read(path=str(tmp_path / "*.parquet"), max_documents=3) == texts[:3]


def test_empty_documents_are_left_out_and_white_space_collapses(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one \n two<end> \n<end>three")
    assert read(path=str(path), separator="<end>", collapse_whitespace=True) == ["one two", "three"]


def test_hub_dataset(tmp_path, texts, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    table = pyarrow.table({"body": texts, "number": list(range(len(texts)))})
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "set" / "train.parquet")
    for streaming in (False, True):
        assert read(hub=str(tmp_path / "set"), text_field="body", streaming=streaming) == texts
        with pytest.raises(
            ValueError, match=r"text_field='other' is missing in .*set \(train\): it has body, number"
        ):
            read(hub=str(tmp_path / "set"), text_field="other", streaming=streaming)


def test_a_hub_dataset_of_one_revision(monkeypatch):
    asked = []

    def load(*names, **options):
        asked.append((*names, options))
        raise ValueError("no network")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(ValueError, match=r"hub='some/name' .*revision='v1'\) can't be loaded: no network"):
        read(hub="some/name", revision="v1", streaming=True)
    assert asked == [("some/name", None, {"split": "train", "revision": "v1", "streaming": True})]


def test_wrong_encoding_names_the_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 5)
    path = tmp_path / "latin.txt"
    good = "Grüße ".encode() * 3
    path.write_bytes(good + b"\xfcber")
    with pytest.raises(ValueError, match=rf"latin\.txt is not UTF-8 text: byte {len(good)} "):
        read(path=str(path))
    path.write_bytes(good + "ü".encode()[:1])
    with pytest.raises(ValueError, match=rf"byte {len(good)} "):
        read(path=str(path))


@pytest.mark.parametrize(
    ("name", "data", "fields", "message"),
    [
        ("x.txt", b"text", {"path": "missing-*.txt"}, r"path='missing-\*\.txt' names no file"),
        ("x.bin", b"text", {}, r"x\.bin can't be told.*set data\.sources\[0\]\.format"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ', {}, r"x\.jsonl, line 2 is no JSON"),
        ("x.jsonl", b'{"body": "a"}\n', {}, r"text_field='text' is missing in .*line 1: it has body"),
        ("x.jsonl", b'{"text": 3}\n', {}, r"text_field='text' holds int"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}\n', {}, r"line 2: .*text_field='text' holds '.\w+', half a"),
        ("x.parquet", b"PAR1 but no more", {}, r"x\.parquet is no readable parquet"),
        ("x.parquet", DAMAGED_PAGE, {}, r"x\.parquet is damaged"),
        ("x.txt.gz", b"not compressed", {}, r"x\.txt\.gz is damaged"),
        ("x.txt.gz", UNKNOWN_BLOCK, {}, r"x\.txt\.gz is damaged"),
        ("x.txt.zst", b"not compressed", {}, r"x\.txt\.zst is damaged"),
        ("x.txt.xz", lzma.compress(b"text " * 99)[:-9], {}, r"x\.txt\.xz is damaged"),
        ("x.txt", b"text", {"hub": "some/name"}, r"set exactly one"),
        ("x.txt", b"text", {"revision": "v1"}, r"sources\[0\]\.revision='v1' is of a hub source"),
        ("x.txt", b"text", {"weight": 0.0}, r"weight=0\.0 is not positive"),
        ("x.txt", b"text", {"format": "csv"}, r"format='csv' is unknown"),
        ("x.txt", b"text", {"package": "no_such_package_here"}, r"package='no_such_package_here' is not installed"),
    ],
)
def test_bad_sources_are_named(tmp_path, name, data, fields, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read(**{"path": str(tmp_path / name), **fields})


def test_package_files():
    names = read(package="training", path="*.py", format="text")
    assert len(names) > 5
    assert all(isinstance(text, str) for text in names)
