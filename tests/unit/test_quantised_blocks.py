"""Blocks of GGUF, value by value, against the loops in which llama.cpp describes them."""

import struct
from collections.abc import Callable

import numpy as np
import pytest

from speechquilt.pretrained.quantised_blocks import KINDS, dequantised


def half(block: bytes, at: int) -> float:
    return struct.unpack_from("<e", block, at)[0]


def byte(block: bytes, at: int) -> int:
    return struct.unpack_from("<b", block, at)[0]


def nibble(block: bytes, at: int, i: int) -> int:
    return block[at + i] & 15 if i < 16 else block[at + i - 16] >> 4


def fifth(block: bytes, at: int, i: int) -> int:
    return (struct.unpack_from("<I", block, at)[0] >> i & 1) * 16


def q6_k(block: bytes, i: int) -> float:
    part, i = divmod(i, 128)
    quarter, column = divmod(i, 32)
    low = block[64 * part + column + 32 * (quarter % 2)]
    high = block[128 + 32 * part + column] >> 2 * quarter & 3
    value = (low & 15 if quarter < 2 else low >> 4) + 16 * high - 32
    return half(block, 208) * byte(block, 192 + 8 * part + 2 * quarter + column // 16) * value


LOOPS: dict[str, Callable[[bytes, int], float]] = {
    "F32": lambda b, i: struct.unpack("<f", b)[0],
    "F16": lambda b, i: half(b, 0),
    "BF16": lambda b, i: struct.unpack("<f", b"\0\0" + b)[0],
    "Q8_0": lambda b, i: half(b, 0) * byte(b, 2 + i),
    "Q4_0": lambda b, i: half(b, 0) * (nibble(b, 2, i) - 8),
    "Q4_1": lambda b, i: half(b, 0) * nibble(b, 4, i) + half(b, 2),
    "Q5_0": lambda b, i: half(b, 0) * (nibble(b, 6, i) + fifth(b, 2, i) - 16),
    "Q5_1": lambda b, i: half(b, 0) * (nibble(b, 8, i) + fifth(b, 4, i)) + half(b, 2),
    "Q6_K": q6_k,
}
HALVES = {"F16": [0], "Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q6_K": [208]}


@pytest.mark.parametrize("number", KINDS)
def test_every_value_is_what_the_loop_says(number: int) -> None:
    kind = KINDS[number]
    draw = np.random.default_rng(number)
    blocks_NB = draw.integers(0, 256, (5, kind.bytes), dtype=np.uint8)
    if kind.name in ("F32", "BF16"):
        blocks_NB[:, -1] &= 0xBF  # no infinities and no NaN
    for at in HALVES.get(kind.name, []):
        blocks_NB[:, at : at + 2] = draw.normal(size=(5, 1)).astype("<f2").view(np.uint8)
    expected = [LOOPS[kind.name](block.tobytes(), i) for block in blocks_NB for i in range(kind.values)]
    found = dequantised(blocks_NB.reshape(-1), number)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-6, atol=1e-7)
    assert len(set(found.tolist())) > min(4, kind.values), "equal values would hide their order"
