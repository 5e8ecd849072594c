"""The bytes of a sealed object: ``stream/FORMAT.md``, section *Sealed object*; change both together. Pure.

What lies in S3 is a header in the clear (which object, which data key, that key as each region's KMS wrapped it) and the
object in chunks, each AES-256-GCM with the object's place as associated data. The key and the salt of an object are made of
its data key, its place and its content. So one data key never meets a nonce twice with different bytes, and sealing the same
bytes with the same data key gives the same object: a put that is repeated, and a copy in another region, are byte for byte
equal.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import zlib
from dataclasses import dataclass

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from controller.domain.model import SegmentRef, SnapshotRef
from controller.errors import Corrupt

VERSION = 1
MAGIC = b"DRENC\x00"
CHUNK_BYTES = 64 * 1024
"""Plain bytes of a chunk: what a ranged read has to fetch at least. Larger ones seal no faster here; 16 KiB costs a third."""
TAG_BYTES = 16
KEY_BYTES = 32
MAX_WRAPS = 16
"""As many as a group has regions at most."""
MAX_HEADER_BYTES = 64 * 1024

_START = struct.Struct(">6sHI")  # magic, version, length of the header
_CRC_BYTES = 4
_ENCODER = msgspec.msgpack.Encoder()


class Wrap(msgspec.Struct, frozen=True, array_like=True):
    """The data key as the KMS of one region wrapped it."""

    region: str
    data: bytes


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """The header of a sealed object."""

    kind: str
    """``segment`` or ``snapshot``."""
    group: str
    stream: str
    seq: int
    epoch: int
    size: int
    """Bytes of the object that is sealed."""
    chunk: int
    """Bytes of it in each chunk but the last."""
    key: bytes
    """The data key's name, 16 bytes made of itself."""
    salt: bytes
    """32 bytes made of the data key, the place and the content."""
    wraps: tuple[Wrap, ...]

    @property
    def wrapped_for(self) -> tuple[str, ...]:
        """Regions whose KMS opens it."""
        return tuple(wrap.region for wrap in self.wraps)


_DECODER = msgspec.msgpack.Decoder(Envelope)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class DataKey:
    """A plain data key. Never printed: its repr is its name."""

    plain: bytes
    name: bytes

    @classmethod
    def of(cls, plain: bytes) -> DataKey:
        """Raises Corrupt when it has another length."""
        if len(plain) != KEY_BYTES:
            raise Corrupt(f"a data key has {len(plain)} bytes and not {KEY_BYTES}", hint="look at the KMS key that wrapped it")
        return cls(plain, _mac(plain, b"agent-dr data key")[:16])

    def __repr__(self) -> str:
        return f"DataKey({self.name.hex()[:8]}…)"


@dataclass(frozen=True, slots=True)
class Place:
    """Which object: a segment or a snapshot of one stream of one group."""

    kind: str
    group: str
    stream: str
    seq: int
    epoch: int

    @classmethod
    def of(cls, group: str, ref: SegmentRef | SnapshotRef) -> Place:
        kind = "segment" if isinstance(ref, SegmentRef) else "snapshot"
        return cls(kind, group, ref.stream, ref.seq, ref.epoch)

    @property
    def packed(self) -> bytes:
        return _ENCODER.encode([self.kind, self.group, self.stream, self.seq, self.epoch])

    def __str__(self) -> str:
        return f"{self.kind} {self.seq} of epoch {self.epoch} of stream {self.stream!a} of group {self.group!a}"


def place_of(envelope: Envelope) -> Place:
    """What a sealed object says that it is."""
    return Place(envelope.kind, envelope.group, envelope.stream, envelope.seq, envelope.epoch)


def salt_of(key: DataKey, place: Place, data: bytes) -> bytes:
    """Tells whether ``data`` is what an envelope of that salt seals, without opening it."""
    return _mac(key.plain, b"agent-dr salt" + place.packed + hashlib.sha256(data).digest())


def envelope_for(key: DataKey, wraps: tuple[Wrap, ...], place: Place, data: bytes) -> Envelope:
    """The header that ``data`` gets under ``key``."""
    return Envelope(
        kind=place.kind,
        group=place.group,
        stream=place.stream,
        seq=place.seq,
        epoch=place.epoch,
        size=len(data),
        chunk=CHUNK_BYTES,
        key=key.name,
        salt=salt_of(key, place, data),
        wraps=wraps,
    )


def seal(key: DataKey, envelope: Envelope, data: bytes) -> bytes:
    """The sealed object. ``envelope`` must have been made of the same data and key. CPU: about 0.4 ms per MiB."""
    header = _ENCODER.encode(envelope)
    cipher, context = _cipher(key, envelope)
    view = memoryview(data)
    parts = [_START.pack(MAGIC, VERSION, len(header)), header, zlib.crc32(header).to_bytes(_CRC_BYTES, "big")]
    count = _chunks(envelope)
    for number in range(count):
        plain = view[number * envelope.chunk : (number + 1) * envelope.chunk]
        parts.append(cipher.encrypt(_nonce(number, count), plain, context))
    return b"".join(parts)


def read_envelope(data: bytes) -> tuple[Envelope, int] | None:
    """The header and where the chunks begin; None: the object is not sealed. Raises Corrupt."""
    if data[: len(MAGIC)] != MAGIC:
        return None
    if len(data) < _START.size:
        raise _broken("ends within its first bytes")
    _, version, length = _START.unpack_from(data)
    if version != VERSION:
        raise _broken(f"has format version {version}, this program reads {VERSION}", hint="upgrade this controller")
    begin = _START.size + length + _CRC_BYTES
    if length > MAX_HEADER_BYTES or begin > len(data):
        raise _broken(f"says that its header has {length} bytes")
    header = data[_START.size : _START.size + length]
    if zlib.crc32(header).to_bytes(_CRC_BYTES, "big") != data[begin - _CRC_BYTES : begin]:
        raise _broken("has a header that does not match its checksum")
    try:
        envelope = _DECODER.decode(header)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        raise _broken(f"has a header that cannot be read: {str(error)[:200]!a}") from None
    if not (1024 <= envelope.chunk <= 16 * 1024**2) or envelope.size < 0 or not (0 < len(envelope.wraps) <= MAX_WRAPS):
        raise _broken(f"says chunk {envelope.chunk}, size {envelope.size}, {len(envelope.wraps)} wraps")
    return envelope, begin


def open_sealed(key: DataKey, envelope: Envelope, data: bytes, begin: int) -> bytes:
    """What was sealed. Raises Corrupt naming the bytes that do not open."""
    plain, bad = _open(key, envelope, data, begin)
    if bad:
        first, last = bad[0] * envelope.chunk, min(envelope.size, (bad[-1] + 1) * envelope.chunk)
        raise _broken(
            f"does not open: {len(bad)} of {_chunks(envelope)} chunks were changed, or belong to another object "
            f"(bytes {first:,} to {last:,} of what it seals)"
        )
    if len(data) != begin + envelope.size + _chunks(envelope) * TAG_BYTES:
        raise _broken("has bytes behind its last chunk")
    return plain


def open_damaged(key: DataKey, envelope: Envelope, data: bytes, begin: int) -> bytes:
    """As far as it opens; zeros where it does not. Only to tell which part of it is damaged: nothing of it is proven."""
    return _open(key, envelope, data, begin)[0]


def with_wraps(envelope: Envelope, wraps: tuple[Wrap, ...]) -> Envelope:
    """The same object for other regions' KMS too: wraps prove themselves, so nothing else changes."""
    return msgspec.structs.replace(envelope, wraps=wraps)


def _open(key: DataKey, envelope: Envelope, data: bytes, begin: int) -> tuple[bytes, list[int]]:
    count = _chunks(envelope)
    most = -(-max(0, len(data) - begin) // (envelope.chunk + TAG_BYTES)) + 1
    if count > most:  # its header says more than there is: no memory for what does not exist
        raise _broken(f"ends before its {envelope.size:,} bytes do")
    cipher, context = _cipher(key, envelope)
    view = memoryview(data)
    parts, bad = [], []
    for number in range(count):
        size = min(envelope.chunk, envelope.size - number * envelope.chunk)
        at = begin + number * (envelope.chunk + TAG_BYTES)
        try:
            parts.append(cipher.decrypt(_nonce(number, count), view[at : at + size + TAG_BYTES], context))
        except (InvalidTag, ValueError):
            bad.append(number)
            parts.append(bytes(size))
    return b"".join(parts), bad


def _cipher(key: DataKey, envelope: Envelope) -> tuple[AESGCM, bytes]:
    """The object's own key, and what every chunk is bound to."""
    context = place_of(envelope).packed + _ENCODER.encode([envelope.size, envelope.chunk, envelope.key, envelope.salt])
    return AESGCM(_mac(key.plain, b"agent-dr object key" + context)), context


def _nonce(number: int, count: int) -> bytes:
    """Eleven bytes number, one byte that says whether it is the last chunk. Unique, because the key is the object's own."""
    return number.to_bytes(11, "big") + (b"\x01" if number == count - 1 else b"\x00")


def _chunks(envelope: Envelope) -> int:
    """At least one, so that an empty object is bound to its place too."""
    return max(1, -(-envelope.size // envelope.chunk))


def _mac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")


def _broken(what: str, *, hint: str = "repair it from another region: drctl verify, then drctl repair") -> Corrupt:
    return Corrupt(f"the sealed object {what}", hint=hint)
