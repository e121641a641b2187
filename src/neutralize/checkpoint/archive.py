"""Archives: where the records of a zip file lie, as torch.save writes it: none compressed, none trusted.

Source: APPNOTE.TXT of the zip format, sections 4.3 (structures), 4.4 (fields) and 4.5.3 (sizes of 64 bits).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

from neutralize.errors import NeutralizeError

START = b"PK\x03\x04"
"""What an archive begins with."""

_DIRECTORY_LIMIT = 64 << 20
"""Bytes of a central directory that are read at all; that of 100,000 records has some 8 MB."""

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_IN_64_BITS = 0xFFFFFFFF


@dataclass(frozen=True)
class Record:
    """A file in an archive.

    Attributes:
        offset: of its bytes, from the start of the file that holds the archive.
        nbytes: how many.
        checksums: where its CRC-32 stands.
        is_plain: neither compressed nor encrypted.
    """

    offset: int
    nbytes: int
    checksums: tuple[int, ...]
    is_plain: bool


def read_records(file: BinaryIO, begin: int, nbytes: int, what: str) -> dict[str, Record]:
    """Return the records of an archive by name.

    Args:
        file: an open file.
        begin: where the archive begins in it.
        nbytes: how long the archive is; the file is as long at least.
        what: names it in messages.

    Raises:
        NeutralizeError: it is no archive, or is damaged.
    """
    archive = _Archive(file, begin, nbytes, what)
    try:
        return archive.records()
    except (struct.error, UnicodeDecodeError) as error:
        raise archive.broken("a directory", "bytes that are none") from error


@dataclass(frozen=True)
class _Entry:
    """What the central directory says of a record, and where in the archive it says so."""

    name: str
    place: int
    is_described: bool
    is_plain: bool
    nbytes: int
    header: int


@dataclass(frozen=True)
class _Archive:
    file: BinaryIO
    begin: int
    nbytes: int
    what: str

    def broken(self, expected: str, got: str) -> NeutralizeError:
        return NeutralizeError(
            f"checkpoint: expected {expected} in {self.what}, got {got}; it was cut off or damaged: fetch it again"
        )

    def records(self) -> dict[str, Record]:
        first, size, count = self._directory()
        found: dict[str, Record] = {}
        free = 0  # everything before it is taken
        for entry in sorted(self._entries(first, size, count), key=lambda entry: entry.header):
            if entry.header < free:
                raise self.broken("records apart from each other", f"two that overlap at {entry.name[:200]!r}")
            if entry.name in found:
                raise self.broken("each record once", f"two of the name {entry.name[:200]!r}")
            record, free = self._record(entry, first)
            found[entry.name] = record
        return found

    def _read(self, offset: int, nbytes: int) -> bytes:
        if offset < 0 or nbytes > self.nbytes - offset:
            raise self.broken(f"{nbytes} bytes at {offset}", f"{self.nbytes} bytes in all")
        self.file.seek(self.begin + offset)
        data = self.file.read(nbytes)
        if len(data) != nbytes:
            raise self.broken(f"{nbytes} bytes at {offset}", "its end")
        return data

    def _directory(self) -> tuple[int, int, int]:
        """Where the central directory begins, how long it is, and how many records it lists."""
        end = self.nbytes - _END.size
        if end < 0 or not (tail := self._read(end, _END.size)).startswith(b"PK\5\6") or tail[-2:] != b"\0\0":
            raise self.broken("a zip archive as torch.save writes it", "bytes without its end")
        narrow = _END.unpack(tail)[4:7]
        count, size, first = narrow
        if end >= _LOCATOR.size:
            signature, _, place, _ = _LOCATOR.unpack(self._read(end - _LOCATOR.size, _LOCATOR.size))
            if signature == b"PK\6\7":
                end = place
                signature, *_, count, size, first = _END64.unpack(self._read(place, _END64.size))
                limits = (0xFFFF, _IN_64_BITS, _IN_64_BITS)
                fits = all(a in (b, limit) for a, b, limit in zip(narrow, (count, size, first), limits, strict=True))
                if signature != b"PK\6\6" or not fits:
                    raise self.broken("one end of an archive", "another in 64 bits")
        if first > end or size != end - first or count * _ENTRY.size > size:
            raise self.broken("a directory of records before the end", f"one of {size} bytes at {first}")
        if size > _DIRECTORY_LIMIT:
            raise self.broken(f"a directory of at most {_DIRECTORY_LIMIT} bytes", f"one of {size}")
        return first, size, count

    def _entries(self, first: int, size: int, count: int) -> list[_Entry]:
        data, at, entries = self._read(first, size), 0, []
        for _ in range(count):
            fields = _ENTRY.unpack_from(data, at)
            signature, _, _, flags, method, _, _, _, packed, nbytes, name_size, extra_size, comment_size = fields[:13]
            header, after = fields[-1], at + _ENTRY.size + name_size + extra_size + comment_size
            if signature != b"PK\1\2" or after > size:
                raise self.broken("a list of records", f"other bytes at {first + at}")
            name = data[at + _ENTRY.size : at + _ENTRY.size + name_size].decode()
            extra = data[at + _ENTRY.size + name_size : at + _ENTRY.size + name_size + extra_size]
            nbytes, packed, header = _in_full((nbytes, packed, header), extra)
            is_plain = method == 0 and packed == nbytes and not flags & 1
            entries.append(_Entry(name, first + at, bool(flags & 8), is_plain, packed, header))
            at = after
        if at != size:
            raise self.broken(f"a directory of {count} records", f"{size - at} bytes more")
        return entries

    def _record(self, entry: _Entry, limit: int) -> tuple[Record, int]:
        """A record, and where its last byte is past."""
        wrong = f"another header of {entry.name[:200]!r}"
        header = self._read(entry.header, _LOCAL.size)
        signature, _, _, method, _, _, crc, _, _, name_size, extra_size = _LOCAL.unpack(header)
        name = self._read(entry.header + _LOCAL.size, name_size)
        if signature != START or (method and entry.is_plain) or name != entry.name.encode():
            raise self.broken("a directory that fits the records", wrong)
        offset = entry.header + _LOCAL.size + name_size + extra_size
        end = offset + entry.nbytes
        if end > limit:
            raise self.broken("records before the directory", f"{entry.name[:200]!r} past it")
        places = [entry.place + 16]
        if crc or not entry.is_described:
            places.append(entry.header + 14)
        if entry.is_described and entry.nbytes:  # miniz describes no empty record, whatever it says
            described = self._read(end, 16)
            if described[:4] != b"PK\x07\x08":
                raise self.broken("sizes after the record that announces them", wrong)
            places.append(end + 4)
            end += 16
        if end > limit:
            raise self.broken("records before the directory", f"{entry.name[:200]!r} past it")
        checksums = tuple(self.begin + place for place in places)
        return Record(self.begin + offset, entry.nbytes, checksums, entry.is_plain), end


def _in_full(values: tuple[int, int, int], extra: bytes) -> tuple[int, ...]:
    """Sizes and offset of a record, those of 64 bits taken from where the format puts them."""
    wide = b""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = extra[at + 4 : at + 4 + size]
        at += 4 + size
    found = []
    for value in values:
        if value == _IN_64_BITS:
            (value,), wide = struct.unpack_from("<Q", wide), wide[8:]
        found.append(value)
    return tuple(found)


def record_bytes(file: BinaryIO, records: Mapping[str, Record], name: str, limit: int, what: str) -> bytes:
    """Return what a record holds.

    Raises:
        NeutralizeError: there is none of that name, or it is longer than ``limit``.
    """
    record = records.get(name)
    if record is None:
        raise NeutralizeError(
            f"checkpoint: expected {name[:200]!r} in {what}, got an archive without it; save a state dict with "
            "torch.save"
        )
    if record.nbytes > limit:
        raise NeutralizeError(
            f"checkpoint: expected at most {limit} bytes in {name[:200]!r} of {what}, got {record.nbytes}; it is no "
            "such file"
        )
    file.seek(record.offset)
    return file.read(record.nbytes)
