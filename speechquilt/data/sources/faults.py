"""Why a recording, or what is said of it, cannot be used.

Trap: `reason` is a class of fault that is counted, so it holds no names and no numbers of the item; they belong into
`detail`.
"""


class BrokenAudio(ValueError):
    """A recording that cannot be used: a short class of fault, and what a person needs to find and mend it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class BrokenText(BrokenAudio):
    """A transcript that cannot be used; the recording itself may be good."""
