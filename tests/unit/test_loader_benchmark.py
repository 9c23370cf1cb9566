"""The loader makes the batches that plain loops over tokens make, through every patching of the benchmark."""

import pytest

from benchmarks.loader import CASES, digest, packed, plain, write_shards

BATCHES = 6


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return folder, write_shards(folder, num_documents=40)


@pytest.mark.parametrize("case", list(CASES))
def test_the_loader_is_the_plain_loops(shards, case):
    """Past the edge of an epoch, and through the whole of the curriculum."""
    folder, tokenizer = shards
    ours = packed(folder, case, tokenizer, rows=2, total_batches=BATCHES)
    theirs = plain(folder, case, tokenizer, rows=2, total_batches=BATCHES)
    for _ in range(BATCHES):
        assert digest(ours.next_batch().validate()) == digest(theirs.next_batch())
    assert min(ours.mixture.epochs.values()) > 1
