"""How much speech a text may become: the one rule by which spoken spans are refused for their length (spec 1, 5.2 step 5).

Trap: a limit in speech tokens per text token means nothing without the frame rate. The numbers here are for 12.5 Hz; the same
sound has four times as many tokens at 50 Hz.
"""

from typing import Literal

USUAL_RATE = 12.5  # speech tokens per second that limits are written for, and of models that do not say theirs
LEAST, MOST = 1.0, 9.0  # speech tokens per text token of a believable span, at USUAL_RATE
JUDGED_FROM = 3  # text tokens; shorter spans are too short to judge by their rate


def at_rate(limit: float, frame_rate: float) -> float:
    """A number of speech tokens at USUAL_RATE -> those of the same sound at `frame_rate`."""
    return limit * (frame_rate / USUAL_RATE)


def misfit(num_speech: int, num_text: int, least: float, most: float) -> Literal["", "few", "many"]:
    """Whether a text of `num_text` tokens got too "few" or too "many" speech tokens; "" when it fits or cannot be judged."""
    if num_text < JUDGED_FROM:
        return ""
    if num_speech < least * num_text:
        return "few"
    return "many" if num_speech > most * num_text else ""
