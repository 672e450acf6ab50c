"""Token files, and the order in which a run reads them."""

import numpy as np
import pytest
import torch

from libqat import ArgumentError, FileError, _core


@pytest.fixture(scope="module")
def data():
    tokens = torch.randint(41, (1000,), generator=torch.Generator().manual_seed(1))
    return _core.TokenData.from_tensor(tokens, 41)


def mix(value: int) -> int:
    """splitmix64's output function."""
    mask = 2**64 - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def permute(index: int, count: int, seed: int, epoch: int) -> int:
    """The documented order of the data: an 8-round Feistel network with cycle walking."""
    key = mix(mix(seed % 2**64) ^ epoch)
    half = ((count - 1).bit_length() + 1) // 2
    while True:
        left, right = index >> half, index & (2**half - 1)
        for number in range(8):
            key_of_round = (key + number) % 2**64
            left, right = right, left ^ (mix(key_of_round ^ mix(right)) & (2**half - 1))
        index = left << half | right
        if index < count:
            return index


@pytest.mark.parametrize("seed", [0, 7, -2])
def test_the_order_of_the_data_is_the_documented_one(data, seed):
    windows = 1000 // 12
    for index in (0, 1, 40, 41, 200):
        batch = data.batch(index, 2, 12, seed)
        for row in range(2):
            epoch, place = divmod(index * 2 + row, windows)
            window = permute(place, windows, seed, epoch)
            assert batch[row].equal(data.tokens()[window * 12 : window * 12 + 12])


def test_token_files(tmp_path):
    path = tmp_path / "a.tokens"
    _core.write_tokens(path, torch.tensor([3, 1, 2]), 4)
    raw = path.read_bytes()
    assert raw[:8] == b"QATTOK1\0"
    assert np.frombuffer(raw, "<u4", offset=8).tolist() == [4, 0, 3, 1, 2]
    data = _core.TokenData.open(path)
    assert (len(data), data.vocabulary, data.tokens().tolist()) == (3, 4, [3, 1, 2])
    path.write_bytes(raw[:-4] + b"\x04\0\0\0")
    with pytest.raises(FileError, match="token 2: expected an id below the vocabulary of 4, got 4"):
        _core.TokenData.open(path)
    with pytest.raises(ArgumentError, match=r"tokens\[4\]: expected an id in \[0, 4\), got 4"):
        _core.write_tokens(path, torch.arange(5), 4)
    with pytest.raises(FileError, match=r"nothing\.tokens"):
        _core.TokenData.open(tmp_path / "nothing.tokens")
