"""What the demo claims: each claim is a proof that holds or fails, with the figures that decided it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Proof:
    """One claim, decided.

    Attributes:
        claim: what is claimed, in words.
        holds: whether it was found to be so.
        evidence: the figures it was decided on.
    """

    claim: str
    holds: bool
    evidence: str = ""

    @property
    def verdict(self) -> str:
        """The verdict in a word."""
        return "ok" if self.holds else "FAILED"

    @property
    def statement(self) -> str:
        """The claim with its evidence."""
        return f"{self.claim} ({self.evidence})" if self.evidence else self.claim


@dataclass(frozen=True)
class Figure:
    """A known figure, as it was published.

    Attributes:
        value: the figure.
        tolerance: how far a measurement may be from it: half a unit of the last digit published.
    """

    value: float
    tolerance: float

    def proof(self, what: str, measured: float) -> Proof:
        """Compare a measurement with the figure.

        Args:
            what: what was measured, in words.
            measured: in the unit of the figure; NaN agrees with nothing.
        """
        agrees = abs(measured - self.value) <= self.tolerance
        evidence = f"{measured:.5f} against {self.value:g} +- {self.tolerance:g}"
        return Proof(f"{what} is the known figure", agrees, evidence)


KNOWN_LOSSES: Mapping[int | None, Figure] = {
    None: Figure(3.232, 0.0005),
    4: Figure(3.303, 0.0005),
    0: Figure(10.07, 0.005),
}
"""Mean loss in nats of SmolLM2-135M on the first 20,000 characters of the GPL-3 text, in windows of 512 tokens: intact
(``None``), and with one block off."""
