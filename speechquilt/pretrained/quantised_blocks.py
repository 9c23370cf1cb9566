"""What a GGUF file's tensors are stored as: blocks of a few values with common scales, back to float32.

d is the scale of a block and m its smallest value, both float16. Four-bit values stand two in a byte: the lower halves
of a block's bytes are its first values, the upper halves the rest. Where a fifth bit exists, the 32 of a block are one
number.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from speechquilt.pretrained.model_files import bfloat16

# N blocks, B bytes or values of one


@dataclass(frozen=True)
class BlockKind:
    """`values` in a block of `bytes`; `read` turns blocks (uint8, `[N, bytes]`) into float32 `[N, values]`."""

    name: str
    values: int
    bytes: int
    read: Callable[[np.ndarray], np.ndarray]


def dequantised(raw: np.ndarray, kind: int) -> np.ndarray:
    """Bytes of whole blocks of the kind with this number -> their values, float32 in one row."""
    found = KINDS[kind]
    return found.read(raw.reshape(-1, found.bytes)).reshape(-1)


def _as(dtype: str, bytes_NB: np.ndarray) -> np.ndarray:
    """The same bytes as numbers of another type, little-endian."""
    return np.ascontiguousarray(bytes_NB).view(dtype)


def _scale(block_NB: np.ndarray, at: int) -> np.ndarray:
    return _as("<f2", block_NB[:, at : at + 2]).astype(np.float32)


def _four_bits(bytes_NB: np.ndarray) -> np.ndarray:
    return np.concatenate([bytes_NB & 15, bytes_NB >> 4], axis=1)


def _fifth_bit(bytes_NB: np.ndarray) -> np.ndarray:
    """Four bytes -> 32 values, 16 where the bit is set."""
    return np.unpackbits(bytes_NB, axis=1, bitorder="little") << 4


def _q8_0(block_NB: np.ndarray) -> np.ndarray:
    return _scale(block_NB, 0) * _as("<i1", block_NB[:, 2:])


def _q4_0(block_NB: np.ndarray) -> np.ndarray:
    return _scale(block_NB, 0) * (_four_bits(block_NB[:, 2:]).astype(np.float32) - 8)


def _q4_1(block_NB: np.ndarray) -> np.ndarray:
    return _scale(block_NB, 0) * _four_bits(block_NB[:, 4:]) + _scale(block_NB, 2)


def _q5_0(block_NB: np.ndarray) -> np.ndarray:
    values_NB = _four_bits(block_NB[:, 6:]) | _fifth_bit(block_NB[:, 2:6])
    return _scale(block_NB, 0) * (values_NB.astype(np.float32) - 16)


def _q5_1(block_NB: np.ndarray) -> np.ndarray:
    values_NB = _four_bits(block_NB[:, 8:]) | _fifth_bit(block_NB[:, 4:8])
    return _scale(block_NB, 0) * values_NB + _scale(block_NB, 2)


def _q6_k(block_NB: np.ndarray) -> np.ndarray:
    """Two halves of 128 values: 64 bytes of lower four bits, 32 of upper two; 16 int8 scales of 16 values each; d."""
    num_blocks = len(block_NB)
    low, high = block_NB[:, :128].reshape(-1, 2, 64), block_NB[:, 128:192].reshape(-1, 2, 32)
    four = np.concatenate([low & 15, low >> 4], axis=2)
    two = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=2)
    values = (four | two << 4).reshape(num_blocks, 16, 16).astype(np.float32) - 32
    scales = _scale(block_NB, 208) * _as("<i1", block_NB[:, 192:208])
    return (values * scales[:, :, None]).reshape(num_blocks, 256)


KINDS = {
    0: BlockKind("F32", 1, 4, lambda block_NB: _as("<f4", block_NB)),
    1: BlockKind("F16", 1, 2, lambda block_NB: _as("<f2", block_NB).astype(np.float32)),
    2: BlockKind("Q4_0", 32, 18, _q4_0),
    3: BlockKind("Q4_1", 32, 20, _q4_1),
    6: BlockKind("Q5_0", 32, 22, _q5_0),
    7: BlockKind("Q5_1", 32, 24, _q5_1),
    8: BlockKind("Q8_0", 32, 34, _q8_0),
    14: BlockKind("Q6_K", 256, 210, _q6_k),
    30: BlockKind("BF16", 1, 2, lambda block_NB: bfloat16(_as("<u2", block_NB))),
}
