"""The guard of a decoder that writes one id after the other: it stops one that says the same thing again and again.

Whisper does so on short clips that are not padded to 30 s, before it has been trained on them.
Trap: somebody who really says a phrase of six ids twice without a word between is cut short as well.
"""

from collections.abc import Sequence

LOOP_IDS = 12  # a phrase and its repetitions have at least so many ids: names and numbers said twice stay


def repeated_ids(ids: Sequence[int]) -> int:
    """How many ids at the end only repeat the phrase before them, which is said at least twice; 0 without a loop."""
    for period in range(1, len(ids) // 2 + 1):
        times = max(2, -(-LOOP_IDS // period))
        if ids[-1] != ids[-1 - period] or times * period > len(ids):
            continue
        if list(ids[-times * period :]) == list(ids[-period:]) * times:
            return (times - 1) * period
    return 0
