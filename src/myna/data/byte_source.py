"""Bytes of a data file: found, opened, unpacked (gzip, zstd) and hashed as a stream.

Owns everything that can be wrong with a file before its content is looked at. What the bytes mean
is told in `files.py`.
"""

import contextlib
import difflib
import gzip
import hashlib
import io
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

from myna.errors import DataError

SUFFIXES = (
    ".json",
    ".jsonl",
    ".ndjson",
    ".csv",
    ".tsv",
    ".parquet",
    ".arrow",
    ".feather",
    ".txt",
)
"""Of data files, before `.gz` or `.zst`."""

BOM = b"\xef\xbb\xbf"

_MAGIC: tuple[tuple[bytes, Literal["gzip", "zstd"]], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
)
_PACKED_SUFFIXES = (".gz", ".zst", ".zstd")
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class ByteSource:
    """A file, and how its bytes are packed."""

    path: Path
    packing: Literal["gzip", "zstd"] | None

    @contextlib.contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The unpacked bytes from their beginning.

        Raises DataError in the body where they cannot be read on.
        """
        try:
            if self.packing == "zstd":
                stream = cast(BinaryIO, io.BufferedReader(_Zstd(self.path), _BLOCK))
            elif self.packing == "gzip":
                stream = cast(BinaryIO, gzip.open(self.path))  # noqa: SIM115 — closed below
            else:
                stream = open(self.path, "rb", buffering=_BLOCK)  # noqa: SIM115 — closed below
            with stream:
                yield stream
        except EOFError:
            raise DataError(
                f"{self.path.name}: the {self.packing} file ends in its middle; expected its end "
                "mark.\n  Was it cut off? Fetch or pack it again. Training has not started."
            ) from None
        except (OSError, zlib.error) as error:
            raise DataError(_unreadable(self.path, error, self.packing)) from error


class _Zstd(io.RawIOBase):
    """Unpacked bytes of a zstd file; what goes wrong is an OSError or an EOFError."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        self._failures = pyarrow.ArrowException
        self._stream = pyarrow.input_stream(str(path), compression="zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        try:
            data = self._stream.read(len(buffer))
        except (OSError, self._failures) as error:
            if "truncated" in str(error).lower():
                raise EOFError from error
            raise OSError(str(error).split("\n")[0]) from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def find_source(path: Path) -> ByteSource:
    """The file under `path`, unpacked if its first bytes say that it is packed.

    Raises:
        DataError: not found (with the nearest names), a folder, no file, empty, unreadable.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise DataError(_is_folder(path))
        if not stat.S_ISREG(status.st_mode):
            raise DataError(
                f"{path} is no regular file; expected one that can be read more than once.\n"
                "  Write the rows into a file. Training has not started."
            )
        with open(path, "rb") as stream:
            head = stream.read(4)
    except FileNotFoundError:
        raise DataError(_not_found(path)) from None
    except OSError as error:
        raise DataError(_unreadable(path, error, None)) from error
    except ValueError:  # a NUL in the name
        raise DataError(f"{str(path)!r} is no name of a file.") from None
    return ByteSource(path, next((name for magic, name in _MAGIC if head.startswith(magic)), None))


def content_sha256(path: Path) -> str:
    """sha256 of the bytes of a file as they are on disk, in hexadecimal.

    Raises:
        DataError: as `find_source`.
    """
    source = find_source(path)
    digest = hashlib.sha256()
    with ByteSource(source.path, None).opened() as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def content_hash(digests: Sequence[str]) -> str:
    """One digest for the data: that of the only file, or of the digests of all in order."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def data_suffix(path: Path) -> str:
    """The suffix in lower case, that of the content where the file is packed (`a.csv.gz`)."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _PACKED_SUFFIXES else suffix


def _unreadable(path: Path, error: Exception, packing: str | None) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    what = f"as a {packing} file " if packing else ""
    return f"{path} could not be read {what}({reason}).\n  Training has not started."


def _is_folder(path: Path) -> str:
    inside = sorted(entry.name for entry in path.iterdir() if data_suffix(entry) in SUFFIXES)
    return (
        f"{path} is a folder; expected a data file.\n"
        f"  {'Files in it: ' + ', '.join(inside[:20]) if inside else 'It holds none.'}"
    )


def _not_found(path: Path) -> str:
    folder = path.parent
    lines = [f"{path} was not found (working directory: {Path.cwd()})."]
    if folder.is_dir():
        names = [entry.name for entry in folder.iterdir() if entry.is_file()]
        near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
        data_files = sorted(name for name in names if data_suffix(Path(name)) in SUFFIXES)
        if near:
            lines.append(f"Did you mean {' or '.join(str(folder / name) for name in near)}?")
        elif data_files:
            lines.append(f"Data files in {folder}: {', '.join(data_files[:10])}.")
        else:
            lines.append(f"{folder} holds no data file ({', '.join(SUFFIXES)}).")
    else:
        lines.append(f"The folder {folder} does not exist.")
    return "\n  ".join(lines)
