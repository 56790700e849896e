"""What a proof found: one row of the table that `make prove` prints."""

from typing import NamedTuple


class Row(NamedTuple):
    """`tried` faults against a guarantee (G1 to G19), of which `survived` did no harm: all of them, or the proof failed."""

    guarantee: str
    what: str
    tried: int
    survived: int
    seconds: float
