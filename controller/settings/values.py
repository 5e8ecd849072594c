"""Rules on single values of the settings, and the form in which a broken rule is told.

Each rule here looks at one value and nothing else; rules between values are in :mod:`controller.settings.rules`. A rule
says what is required and, where a typical mistake is recognisable, what to write instead.
"""

from __future__ import annotations

import difflib
import ipaddress
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from controller.domain.outward import INSIDE, LOOPBACK, address_problem, host_problem, port_problem

_SHOWN = 120
"""Characters of a wrong value that are shown."""

_UNIT_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken rule. ``fields`` are all that it looked at, the one to correct first."""

    fields: tuple[str, ...]
    value: str
    rule: str
    hint: str = ""

    def line(self) -> str:
        """``field = value: rule; hint``."""
        return f"{self.fields[0]} = {self.value}: {self.rule}" + (f"; {self.hint}" if self.hint else "")


def shown(value: object) -> str:
    """A wrong value as people see it: on one line, escaped, capped. Nested containers are not opened: they may hold secrets."""
    if isinstance(value, Path):
        value = str(value)
    plain = (str, int, float, bool, type(None))
    if not (isinstance(value, plain) or (isinstance(value, list) and all(isinstance(item, plain) for item in value))):
        return f"({type(value).__name__})"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"


def broken(rule: str, hint: str = "") -> PydanticCustomError:
    """The error by which a field's validator says that ``rule`` is broken."""
    return PydanticCustomError("rule", "{rule}", {"rule": rule, "hint": hint})


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean …?`` or "" when nothing is near."""
    found = difflib.get_close_matches(name.lower(), sorted(known), n=1, cutoff=0.6)
    return f"did you mean {found[0]!r}?" if found else ""


# --------------------------------------------------------------------------------------------------------------- numbers


def _plain_number(value: Any) -> Any:
    """Refuses what pydantic would take for a number although a person meant something else (``true``) and explains units."""
    if isinstance(value, bool):
        raise broken("must be a number, not a boolean")
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|min|h|d)\s*", value)):
        number = float(match[1]) * _UNIT_SECONDS[match[2]]
        raise broken("must be a plain number of seconds, without a unit", f"write {number:g}")
    try:
        finite = math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return value  # pydantic says what is wrong with it
    if not finite:
        raise broken("must be a finite number")
    return value


Seconds = Annotated[float, BeforeValidator(_plain_number), Field(gt=0, le=86_400, allow_inf_nan=False)]
"""More than 0, at most a day, finite."""
LongSeconds = Annotated[float, BeforeValidator(_plain_number), Field(gt=0, le=3_650 * 86_400, allow_inf_nan=False)]
"""More than 0, at most ten years, finite."""
SecondsOrZero = Annotated[float, BeforeValidator(_plain_number), Field(ge=0, le=86_400, allow_inf_nan=False)]
WholeSeconds = Annotated[int, BeforeValidator(_plain_number), Field(ge=1, le=86_400)]
Count = Annotated[int, BeforeValidator(_plain_number), Field(ge=1)]
CountOrZero = Annotated[int, BeforeValidator(_plain_number), Field(ge=0)]
Rate = Annotated[float, BeforeValidator(_plain_number), Field(gt=0, allow_inf_nan=False)]
RateOrZero = Annotated[float, BeforeValidator(_plain_number), Field(ge=0, allow_inf_nan=False)]


def _weight(value: int) -> int:
    if not 1 <= value <= 255:
        raise broken("must be 1 to 255", "Route 53 allows 0 to 255, and 0 would leave the active region without traffic")
    return value


Weight = Annotated[int, BeforeValidator(_plain_number), AfterValidator(_weight)]

# ----------------------------------------------------------------------------------------------------------------- names


def _name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", value):
        raise broken("must be 1 to 63 lower-case letters, digits and inner hyphens: it becomes part of keys and record names")
    return value


def _instance(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9](?:[a-z0-9._-]{0,126}[a-z0-9])?", value) or ".." in value:
        raise broken("must be 1 to 128 lower-case letters, digits and inner '.', '_', '-': it becomes part of keys")
    return value


def _aws_region(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", value):
        raise broken("must be the name of an AWS region", "for example eu-west-1; availability zones have a letter more")
    return value


def _bucket(value: str) -> str:
    """Rules: "General purpose bucket naming rules" of the Amazon S3 user guide."""
    if value.startswith(("s3://", "arn:")):
        raise broken("must be the bucket's name alone", "without s3:// or arn:")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", value):
        raise broken("must be 3 to 63 lower-case letters, digits, dots and hyphens, and begin and end with a letter or digit")
    if ".." in value or re.fullmatch(r"\d+\.\d+\.\d+\.\d+", value):
        raise broken("must not hold two dots in a row or look like an IP address")
    if value.startswith(("xn--", "sthree-", "amzn-s3-demo-")) or value.endswith(("-s3alias", "--ol-s3", ".mrap", "--x-s3")):
        raise broken("begins or ends in a way that S3 keeps for itself")
    return value


def _account_id(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        raise broken("must be text", f'write "{value:012d}": an account may begin with 0')
    if not isinstance(value, str) or not re.fullmatch(r"[0-9]{12}", value):
        raise broken("must be an AWS account's number: twelve digits, without hyphens")
    return value


def _table(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]{3,255}", value):
        raise broken("must be 3 to 255 letters, digits, '_', '.' and '-'", "DynamoDB's rule for table names")
    return value


def _climbs(value: str) -> bool:
    return any(part in {".", ".."} for part in value.split("/"))


def _etcd_prefix(value: str) -> str:
    if _climbs(value) or not re.fullmatch(r"(?:/[A-Za-z0-9._-]+)+", value) or len(value) > 200:
        raise broken("must be a path like /dr: it begins with '/', does not end with one, and has no '.' or '..' parts")
    return value


def _object_prefix(value: str) -> str:
    if _climbs(value) or not re.fullmatch(r"[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)*", value) or len(value) > 200:
        raise broken("must be a path like dr or team/dr: no '/' at its ends, no '.' or '..' parts")
    return value


def _zone_id(value: str) -> str:
    if value.startswith("/hostedzone/"):
        raise broken("must be the id alone", f"write {value.removeprefix('/hostedzone/')!r}")
    if not re.fullmatch(r"[A-Z0-9]{1,32}", value):
        raise broken("must be a hosted zone's id: 1 to 32 capital letters and digits")
    return value


def _dns_name(value: str) -> str:
    """Returns the name in lower case with its final dot, so that it compares equal wherever it comes from."""
    name = value.lower().removesuffix(".")
    labels = name.split(".")
    good = all(re.fullmatch(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", label) for label in labels)
    if len(labels) < 2 or len(name) > 240 or not good:
        raise broken("must be a full DNS name like agents.dr.example. (labels of 1 to 63 letters, digits and inner hyphens)")
    return name + "."


def _kms_key(value: str) -> str:
    arn = r"arn:aws[a-z-]*:kms:[a-z0-9-]+:[0-9]{12}:(key/[A-Za-z0-9-]+|alias/[A-Za-z0-9/_-]+)"
    if not re.fullmatch(
        rf"{arn}|alias/[A-Za-z0-9/_-]{{1,250}}|mrk-[0-9a-f]{{32}}|[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}", value
    ):
        raise broken("must be the ARN, the id or the alias (alias/…) of a KMS key", "aws kms list-keys shows them")
    return value


GroupName = Annotated[str, AfterValidator(_name)]
RegionName = Annotated[str, AfterValidator(_name)]
InstanceName = Annotated[str, AfterValidator(_instance)]
AwsRegionName = Annotated[str, AfterValidator(_aws_region)]
KmsKey = Annotated[str, AfterValidator(_kms_key)]
Bucket = Annotated[str, AfterValidator(_bucket)]
AccountId = Annotated[str, BeforeValidator(_account_id)]
Table = Annotated[str, AfterValidator(_table)]
EtcdPrefix = Annotated[str, AfterValidator(_etcd_prefix)]
ObjectPrefix = Annotated[str, AfterValidator(_object_prefix)]
ZoneId = Annotated[str, AfterValidator(_zone_id)]
DnsName = Annotated[str, AfterValidator(_dns_name)]

# ------------------------------------------------------------------------------------------------------------- addresses


def split_url(url: str) -> SplitResult:
    """The parts of an ``http(s)://host[:port]`` URL. Raises ValueError saying what is wrong with it."""
    if any(char.isspace() or not char.isprintable() for char in url):
        raise ValueError("must not hold spaces or control characters")
    if "\\" in url:
        raise ValueError("must not hold backslashes: some libraries take one for a slash")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("must be a URL with a port of 1 to 65535") from None
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must be a URL that begins with http:// or https://")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not hold a user name or password")
    if port == 0:
        raise ValueError("must be a URL with a port of 1 to 65535")
    if problem := host_problem(parts.hostname):
        raise ValueError(f"must be a URL whose host every library reads alike: it {problem}")
    return parts


def is_loopback(host: str | None) -> bool:
    """Whether ``host`` is a literal address in 127.0.0.0/8. Names are not: what they mean is decided elsewhere."""
    try:
        return ipaddress.ip_address(host or "") in ipaddress.ip_network("127.0.0.0/8")
    except ValueError:
        return False


def _url(value: str) -> str:
    try:
        parts = split_url(value)
    except ValueError as why:
        raise broken(str(why)) from None
    if parts.path not in {"", "/"} or parts.query or parts.fragment:
        raise broken("must end after host and port", f"write '{parts.scheme}://{parts.netloc}'")
    return value.removesuffix("/")


def _etcd_endpoint(value: str) -> str:
    if "://" not in value:
        raise broken("must begin with http:// or https://", f"write 'https://{value}'")
    url = _url(value)
    if urlsplit(url).port is None:
        raise broken("must name its port", f"write '{url}:2379'")
    return url


def _webhook(value: str) -> str:
    """A webhook's path is often its secret, so it may have one, and its value is never shown."""
    try:
        parts = split_url(value)
    except ValueError as why:
        raise broken(str(why)) from None
    if problem := port_problem(parts.port or 443):
        raise broken(f"must go to a port of HTTP: {problem}")
    try:
        address = ipaddress.ip_address(parts.hostname or "")
    except ValueError:
        return value
    # Private and loopback addresses need notify.networks: a rule between the two.
    if problem := address_problem(address, (*INSIDE, *LOOPBACK)):
        raise broken(f"must not lead there: {problem}", "nobody pages by such an address")
    return value


def _network(value: str) -> str:
    try:
        network = ipaddress.ip_network(value)
    except ValueError:
        raise broken("must be a network in CIDR form, without host bits", "for example 10.20.0.0/16") from None
    if not any(network.version == known.version and network.subnet_of(known) for known in (*INSIDE, *LOOPBACK)):  # type: ignore[arg-type]
        raise broken("must lie in a private or loopback range", "public addresses need no permission, all others get none")
    return str(network)


def _ipv4(value: str) -> str:
    try:
        address = ipaddress.IPv4Address(value)
    except ValueError:
        raise broken("must be an IPv4 address: it becomes the value of an A record") from None
    if address.is_unspecified or address.is_multicast:
        raise broken("must be an address that clients can reach")
    return value


def _dns_server(value: str) -> str:
    host, colon, port = value.rpartition(":")
    rule = "must be address:port with a literal IP address, because names need the very DNS that is being checked"
    try:
        ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        raise broken(rule, "for example 10.0.0.2:53 or [fd00::2]:53") from None
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise broken(rule, "the port must be 1 to 65535")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise broken(rule, f"write '[{host}]:{port}'")
    return value


def _host(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._:-]{1,253}", value):
        raise broken("must be an IP address or a host name, without a port")
    return value


def _certificate_name(value: str) -> str:
    if not re.fullmatch(r"[\x21-\x7e]{1,255}", value) or "*" in value:
        raise broken(
            "must be a DNS name or URI as it stands in a certificate, without wildcards",
            "for example drctl://fleet/eu-west-1/a",
        )
    return value


def _path(value: Any) -> Any:
    if isinstance(value, str) and (not value.strip() or "\0" in value):
        raise broken("must be a path", "leave the setting out when there is none")
    return value


def no_duplicates(values: list[str]) -> list[str]:
    """Compares without regard to case."""
    seen: set[str] = set()
    for value in values:
        if value.lower() in seen:
            raise broken(f"holds {value!r} twice", "two names for one thing count as two where a majority is counted")
        seen.add(value.lower())
    return values


Url = Annotated[str, AfterValidator(_url)]
EtcdEndpoint = Annotated[str, AfterValidator(_etcd_endpoint)]
WebhookUrl = Annotated[str, AfterValidator(_webhook)]
Network = Annotated[str, AfterValidator(_network)]
IPv4 = Annotated[str, AfterValidator(_ipv4)]
DnsServer = Annotated[str, AfterValidator(_dns_server)]
Host = Annotated[str, AfterValidator(_host)]
CertificateName = Annotated[str, AfterValidator(_certificate_name)]
Port = Annotated[int, BeforeValidator(_plain_number), Field(ge=0, le=65535)]
FilePath = Annotated[Path, BeforeValidator(_path)]
