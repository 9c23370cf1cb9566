"""Reading a binary file from front to back: little-endian numbers, strings and raw bytes, never past its end.

Trap: weights come from anywhere. A count in a damaged file may be any number, so nothing is reserved for it before its
bytes have been seen to exist.
"""

import struct
from pathlib import Path


class ByteReader:
    """`at` is the position of the next byte. Every method raises ValueError naming the file when it ends too early."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.at = 0
        self._data = memoryview(path.read_bytes())

    @property
    def left(self) -> int:
        """Bytes that were not read yet."""
        return len(self._data) - self.at

    def bytes(self, count: int) -> memoryview:
        """The next `count` bytes, not copied."""
        if count > self.left:
            raise ValueError(
                f"{self.path} ends at byte {len(self._data)} and {count} more are expected from byte {self.at}: it is cut "
                "short or of another kind; fetch it again"
            )
        self.at += count
        return self._data[self.at - count : self.at]

    def number(self, code: str) -> int:
        """An integer; `code` is a letter of the module `struct`."""
        return struct.unpack(f"<{code}", self.bytes(struct.calcsize(code)))[0]

    def real(self, code: str) -> float:
        """A floating-point number, "f" or "d"."""
        return struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))[0]

    def text(self, num_bytes: int) -> str:
        """UTF-8 of this many bytes."""
        try:
            return str(self.bytes(num_bytes), "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.path} has bytes that are no text before byte {self.at}: it is damaged or of another kind; fetch it again"
            ) from error
