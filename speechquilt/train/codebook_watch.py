"""Notices that a codebook collapses while it happens: fewer codes are chosen, or the encoder runs away from them.

Trap: the loss says so only later, when the heads have already learnt to do without the tokens.
"""

from collections.abc import Mapping

FEWER = 0.5  # of the most codes that a line has had
FARTHER = 3.0  # times the nearest that the vectors have been to their codes


class CodebookWatch:
    """Reads the scalars `codes` and `commitment` of one metrics line after the other."""

    def __init__(self) -> None:
        self.most, self.nearest = 0.0, float("inf")

    def __call__(self, scalars: Mapping[str, float | None]) -> str | None:
        """What is wrong, with what to do; None when nothing is, or while there is no codebook."""
        codes, distance = scalars.get("codes") or 0.0, scalars.get("commitment") or 0.0
        if not codes or not distance:
            return None
        self.most, self.nearest = max(self.most, codes), min(self.nearest, distance)
        if codes < FEWER * self.most:
            return f"the codebook collapses: {codes:.0f} codes in a batch, {self.most:.0f} before; lower lower_lr or lr"
        if distance > FARTHER * self.nearest:
            return (
                f"the encoder runs away from its codes: {distance:.3g} from them, {self.nearest:.3g} before; raise "
                "model.commitment_weight, or lower lower_lr or model.vq_decay"
            )
        return None
