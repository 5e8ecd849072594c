"""What requests and bytes cost at AWS, by the public list prices of us-east-1 and us-west-2 (equal in both), in US dollars.

Sources, as known in November 2026 (on-demand, no free tier, no tiers for large users, no tax; look again before you rely on
them): https://aws.amazon.com/s3/pricing/ (Standard), https://aws.amazon.com/dynamodb/pricing/on-demand/ (Standard table class,
after the price cut of November 2024), https://aws.amazon.com/ec2/pricing/on-demand/#Data_Transfer (to another region).
"""

from __future__ import annotations

from dataclasses import dataclass

S3_PUT = 0.005 / 1000
"""PUT, COPY, POST, LIST."""
S3_GET = 0.0004 / 1000
"""GET, HEAD and all others."""
WRITE_UNIT = 0.625 / 1e6
READ_UNIT = 0.125 / 1e6
S3_BYTE_MONTH = 0.023 / 1e9
DYNAMODB_BYTE_MONTH = 0.25 / 1e9
TRANSFER_BYTE = 0.02 / 1e9
"""From one region to another (us-east-1 to us-west-2)."""


@dataclass(frozen=True, slots=True)
class Use:
    """Of two regions together, for some number of checkpoints. Everything that is written is kept for one month."""

    s3_puts: float = 0.0
    s3_gets: float = 0.0
    write_units: float = 0.0
    read_units: float = 0.0
    transfer_bytes: float = 0.0
    s3_bytes: float = 0.0
    dynamodb_bytes: float = 0.0

    def dollars(self) -> dict[str, float]:
        """By kind, and ``total``."""
        parts = {
            "requests": self.s3_puts * S3_PUT
            + self.s3_gets * S3_GET
            + self.write_units * WRITE_UNIT
            + self.read_units * READ_UNIT,
            "transfer": self.transfer_bytes * TRANSFER_BYTE,
            "storage": self.s3_bytes * S3_BYTE_MONTH + self.dynamodb_bytes * DYNAMODB_BYTE_MONTH,
        }
        return {**parts, "total": sum(parts.values())}
