"""Writing files whole or not at all, finding the configurations that are shipped, and reading text."""

from __future__ import annotations

import gzip
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHIPPED = "configs"  # folder beside the packages, in a checkout and where they are installed


def config_path(path: str | Path) -> Path:
    """Where a configuration lies: as named from the working folder or, if nothing is there and the name begins with
    `configs/`, among those of the project."""
    path = Path(path).expanduser()
    if path.exists() or path.is_absolute() or path.parts[:1] != (SHIPPED,):
        return path
    shipped = Path(__file__).parents[1] / path
    return shipped if shipped.exists() else path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place if the block ends well, and vanishes otherwise.

    A reader sees the old file or the whole new one, also when the disk is full or the process is killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def decode_text(data: bytes, name: str) -> str:
    """A file's bytes as text, without a byte order mark.

    Args:
        name: what the bytes are, for the errors.

    Raises:
        ValueError: they are empty, binary or not UTF-8.
    """
    if not data:
        raise ValueError(f"{name} is empty; give at least one character")
    if (nul := data.find(0)) >= 0:
        raise ValueError(f"{name} is binary: byte {nul} is NUL; give a text in UTF-8")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is 0x{data[error.start]:02x}"
        raise ValueError(f"{name} is not UTF-8: {byte}; convert it to UTF-8") from None


def read_text_file(path: Path) -> str:
    """A whole UTF-8 file, plain or .gz, without a byte order mark.

    Raises:
        ValueError: the reason why it can't be read; the caller names the file.
    """
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from error
