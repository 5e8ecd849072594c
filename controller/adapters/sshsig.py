"""OpenSSH file signatures (SSHSIG): the wire format, verification and signing. No file of trusted keys here: see ``identity``.

Source: ``PROTOCOL.sshsig`` and ``PROTOCOL.u2f`` of OpenSSH. The parser is strict where OpenSSH is lenient: nothing may follow a
field, so one signature has one encoding. It is our own because the ``sshsig`` package knows neither ECDSA nor hardware
(``sk-``) keys, and checks some lengths with ``assert``. Every size is bounded before anything is parsed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from controller.errors import Refused

MAGIC = b"SSHSIG"
VERSION = 1
MAX_SIGNATURE_CHARS = 16 * 1024
MAX_MESSAGE_BYTES = 1024 * 1024
MIN_RSA_BITS = 2048
USER_PRESENT = 0x01

BEGIN = "-----BEGIN SSH SIGNATURE-----"
END = "-----END SSH SIGNATURE-----"

_CURVES: dict[bytes, tuple[ec.EllipticCurve, hashes.HashAlgorithm]] = {
    b"nistp256": (ec.SECP256R1(), hashes.SHA256()),
    b"nistp384": (ec.SECP384R1(), hashes.SHA384()),
    b"nistp521": (ec.SECP521R1(), hashes.SHA512()),
}
_RSA_HASHES: dict[bytes, hashes.HashAlgorithm] = {b"rsa-sha2-256": hashes.SHA256(), b"rsa-sha2-512": hashes.SHA512()}

PrivateKey = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


class Garbled(ValueError):
    """Bytes that are not what the format says."""


class _Reader:
    """Reads SSH wire fields, strictly."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise Garbled("a field is longer than the data")
        part, self._at = self._data[self._at : end], end
        return part

    def number(self) -> int:
        return int(struct.unpack(">I", self.take(4))[0])

    def string(self) -> bytes:
        return self.take(self.number())

    def mpint(self) -> int:
        raw = self.string()
        if raw and raw[0] & 0x80:
            raise Garbled("a negative number")
        return int.from_bytes(raw, "big")

    def end(self) -> None:
        if self._at != len(self._data):
            raise Garbled("bytes follow the last field")


def _string(value: bytes) -> bytes:
    return struct.pack(">I", len(value)) + value


def _mpint(value: int) -> bytes:
    return _string(value.to_bytes(value.bit_length() // 8 + 1, "big") if value else b"")


@dataclass(frozen=True, slots=True)
class Signature:
    """A parsed signature: the key that it claims, and what it covers."""

    key: bytes
    namespace: str
    hash_name: str
    blob: bytes


def fingerprint(key: bytes) -> str:
    """As ``ssh-keygen -l`` prints it: ``SHA256:…``."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(key).digest()).decode().rstrip("=")


def parse(armored: str) -> Signature:
    """The parts of an armored signature. Raises Garbled."""
    if len(armored) > MAX_SIGNATURE_CHARS:
        raise Garbled(f"longer than {MAX_SIGNATURE_CHARS} characters")
    lines = armored.strip().splitlines()
    if len(lines) < 3 or lines[0].strip() != BEGIN or lines[-1].strip() != END:
        raise Garbled(f"not an armored signature ({BEGIN!r} … {END!r})")
    try:
        raw = base64.b64decode("".join(line.strip() for line in lines[1:-1]), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Garbled("not base64") from error
    reader = _Reader(raw)
    if reader.take(len(MAGIC)) != MAGIC:
        raise Garbled("no SSHSIG magic")
    if (version := reader.number()) != VERSION:
        raise Garbled(f"format version {version} instead of {VERSION}")
    key, namespace, reserved = reader.string(), reader.string(), reader.string()
    if reserved:  # it is not signed as it stands here, so anybody could make a second encoding of one signature with it
        raise Garbled("the reserved field is not empty")
    hash_name, blob = reader.string(), reader.string()
    reader.end()
    try:
        return Signature(key, namespace.decode("utf-8"), hash_name.decode("ascii"), blob)
    except UnicodeDecodeError as error:
        raise Garbled("namespace or hash name is not text") from error


def _to_be_signed(namespace: str, hash_name: str, message: bytes) -> bytes:
    if hash_name not in ("sha256", "sha512"):
        raise Garbled(f"hash {hash_name!r} is neither sha256 nor sha512")
    if len(message) > MAX_MESSAGE_BYTES:
        raise Garbled(f"message longer than {MAX_MESSAGE_BYTES} bytes")
    digest = hashlib.new(hash_name, message).digest()
    return MAGIC + _string(namespace.encode()) + _string(b"") + _string(hash_name.encode()) + _string(digest)


def check(signature: Signature, message: bytes) -> None:
    """Raises InvalidSignature when the key in ``signature`` did not sign ``message``, Garbled when it cannot be told."""
    signed = _to_be_signed(signature.namespace, signature.hash_name, message)
    key, blob = _Reader(signature.key), _Reader(signature.blob)
    key_type, algorithm, raw = key.string(), blob.string(), blob.string()
    try:
        if key_type.startswith(b"sk-"):
            _check_hardware(key_type, key, algorithm, raw, blob, signed)
        else:
            blob.end()
            _check_software(key_type, key, algorithm, raw, signed)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise error if isinstance(error, Garbled) else Garbled(f"the key or signature is malformed: {error}") from error


def _check_software(key_type: bytes, key: _Reader, algorithm: bytes, raw: bytes, signed: bytes) -> None:
    if key_type == b"ssh-rsa":
        if algorithm not in _RSA_HASHES:
            raise Garbled(f"RSA signatures with {algorithm!r} are not accepted")
        exponent, modulus = key.mpint(), key.mpint()
        key.end()
        if modulus.bit_length() < MIN_RSA_BITS:
            raise Garbled(f"RSA key of {modulus.bit_length()} bits; at least {MIN_RSA_BITS} are needed")
        public = rsa.RSAPublicNumbers(exponent, modulus).public_key()
        public.verify(raw, signed, padding.PKCS1v15(), _RSA_HASHES[algorithm])
        return
    if algorithm != key_type:
        raise Garbled(f"a signature of type {algorithm!r} by a key of type {key_type!r}")
    if key_type == b"ssh-ed25519":
        ed = ed25519.Ed25519PublicKey.from_public_bytes(key.string())
        key.end()
        ed.verify(raw, signed)
    elif key_type.startswith(b"ecdsa-sha2-"):
        curve_name, point = key.string(), key.string()
        key.end()
        if key_type != b"ecdsa-sha2-" + curve_name:
            raise Garbled("the curve is not the one that the key's type names")
        _check_ecdsa(curve_name, point, raw, signed)
    else:
        raise Garbled(f"keys of type {key_type!r} are not accepted")


def _check_ecdsa(curve_name: bytes, point: bytes, raw: bytes, signed: bytes) -> None:
    if curve_name not in _CURVES:
        raise Garbled(f"curve {curve_name!r} is not accepted")
    curve, hash_algorithm = _CURVES[curve_name]
    reader = _Reader(raw)
    der = encode_dss_signature(reader.mpint(), reader.mpint())
    reader.end()
    ec.EllipticCurvePublicKey.from_encoded_point(curve, point).verify(der, signed, ec.ECDSA(hash_algorithm))


def _check_hardware(key_type: bytes, key: _Reader, algorithm: bytes, raw: bytes, blob: _Reader, signed: bytes) -> None:
    """A FIDO key signs its application, flags and counter with the hash of the message; a person must have touched it."""
    if algorithm != key_type:
        raise Garbled(f"a signature of type {algorithm!r} by a key of type {key_type!r}")
    flags, counter = blob.take(1), blob.take(4)
    blob.end()
    curve = key.string() if key_type == b"sk-ecdsa-sha2-nistp256@openssh.com" else b""
    point, application = key.string(), key.string()
    key.end()
    data = hashlib.sha256(application).digest() + flags + counter + hashlib.sha256(signed).digest()
    if not flags[0] & USER_PRESENT:
        raise Garbled("the hardware key was not touched")
    if key_type == b"sk-ssh-ed25519@openssh.com":
        ed25519.Ed25519PublicKey.from_public_bytes(point).verify(raw, data)
    elif curve == b"nistp256":
        _check_ecdsa(curve, point, raw, data)
    else:
        raise Garbled(f"keys of type {key_type!r} are not accepted")


def public_blob(private: PrivateKey) -> bytes:
    """The public key's wire form."""
    line = private.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return base64.b64decode(line.split()[1])


def make(private: PrivateKey, message: bytes, namespace: str, hash_name: str = "sha512") -> str:
    """An armored signature that ``ssh-keygen -Y verify`` accepts."""
    signed = _to_be_signed(namespace, hash_name, message)
    key = public_blob(private)
    if isinstance(private, ed25519.Ed25519PrivateKey):
        blob = _string(b"ssh-ed25519") + _string(private.sign(signed))
    elif isinstance(private, rsa.RSAPrivateKey):
        blob = _string(b"rsa-sha2-512") + _string(private.sign(signed, padding.PKCS1v15(), hashes.SHA512()))
    elif isinstance(private, ec.EllipticCurvePrivateKey):
        key_type = _Reader(key).string()
        hash_algorithm = _CURVES[key_type.removeprefix(b"ecdsa-sha2-")][1]
        r, s = decode_dss_signature(private.sign(signed, ec.ECDSA(hash_algorithm)))
        blob = _string(key_type) + _string(_mpint(r) + _mpint(s))
    else:
        raise Refused(f"a key of type {type(private).__name__} cannot sign approvals", hint="use an Ed25519, ECDSA or RSA key")
    raw = MAGIC + struct.pack(">I", VERSION) + _string(key) + _string(namespace.encode()) + _string(b"")
    text = base64.b64encode(raw + _string(hash_name.encode()) + _string(blob)).decode()
    return "\n".join([BEGIN, *(text[i : i + 70] for i in range(0, len(text), 70)), END, ""])


__all__ = [
    "Garbled",
    "InvalidSignature",
    "PrivateKey",
    "Signature",
    "check",
    "fingerprint",
    "make",
    "parse",
    "public_blob",
]
