"""Foreign files: what a file without rows looks like, so that an error can name it.

Owns the signatures of common formats and of encodings other than UTF-8. A web page saved under
`.json` and a pointer where the data should be are daily bread; both fail elsewhere with a decoder's
complaint.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Foreign:
    """A format that is not read."""

    name: str
    """With its article."""
    mend: str
    is_text: bool = False
    """Plain text could begin so too."""


_FETCH = "Fetch the data itself, not the page around it."
_UNPACK = "Unpack it and give the files inside."

_WORKBOOK = Foreign("an Excel workbook", "Save the sheet as CSV (UTF-8).")
_ARCHIVE = Foreign("a zip archive", _UNPACK)

_SIGNATURES = (
    (b"%PDF-", Foreign("a PDF document", "Extract its text into rows first.")),
    (b"BZh", Foreign("a bzip2 file", "Unpack it with bunzip2.", is_text=True)),
    (b"\xfd7zXZ\0", Foreign("an xz file", "Unpack it with unxz.")),
    (b"\x04\x22\x4d\x18", Foreign("an lz4 file", "Unpack it with unlz4.")),
    (b"7z\xbc\xaf\x27\x1c", Foreign("a 7z archive", _UNPACK)),
    (b"Rar!\x1a", Foreign("a rar archive", _UNPACK)),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", Foreign("an old Excel or Word file", _WORKBOOK.mend)),
    (b"SQLite format 3\0", Foreign("an SQLite database", "Export the table as CSV.")),
    (b"\x89PNG\r\n", Foreign("a PNG image", "Only text is trained.")),
    (b"\xff\xd8\xff", Foreign("a JPEG image", "Only text is trained.")),
    (b"\x93NUMPY", Foreign("a NumPy array", "Write its rows as JSONL.")),
    (b"\x89HDF\r\n", Foreign("an HDF5 file", "Write its rows as JSONL.")),
    (b"FEA1", Foreign("an old Feather file (version 1)", "Save it again as Feather 2 or Parquet.")),
    (b"Obj\x01", Foreign("an Avro file", "Convert it to Parquet or JSONL.")),
    (b"ORC", Foreign("an ORC file", "Convert it to Parquet or JSONL.", is_text=True)),
    (
        b"version https://git-lfs.github.com/spec/",
        Foreign("a Git LFS pointer, which stands for the data", "Run `git lfs pull`."),
    ),
    (b"<!doctype html", Foreign("an HTML page", _FETCH, is_text=True)),
    (b"<html", Foreign("an HTML page", _FETCH, is_text=True)),
    (b"<?xml", Foreign("an XML file", "Convert it to JSONL or CSV.", is_text=True)),
    *(
        # Opcode PROTO of pickle, which is followed by the number of the protocol.
        (b"\x80" + bytes([protocol]), Foreign("a Python pickle", "Pickles are never read."))
        for protocol in (2, 3, 4, 5)
    ),
)


def looks_like(head: bytes) -> Foreign | None:
    """The format that begins with `head`, if it is a known one that is not read."""
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _WORKBOOK if b"xl/" in head or b"[Content_Types].xml" in head else _ARCHIVE
    if head[257:262] == b"ustar":
        return Foreign("a tar archive", _UNPACK)
    lowered = head[:64].lower()
    for signature, found in _SIGNATURES:
        if (lowered if found.is_text else head).startswith(
            signature.lower() if found.is_text else signature
        ):
            return found
    return None


def encoding_other_than_utf8(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by their byte order mark or the zero bytes of their first signs."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    # Brackets and quotes are ASCII whatever the texts are, so their other bytes are 0.
    first, zeros = head[:1], [byte == 0 for byte in head[:4]]
    if len(zeros) == 4 and sum(zeros) == 3 and zeros[1:3] == [True, True]:
        return "UTF-32LE" if first != b"\0" else "UTF-32BE"
    if zeros[:2] == [False, True] and first < b"\x80":
        return "UTF-16LE"
    if zeros[:2] == [True, False] and head[1:2] < b"\x80":
        return "UTF-16BE"
    return None
