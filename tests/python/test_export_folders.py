"""What all targets that write a folder keep to: bytes that threads do not change, whole folders or none."""

import os

import pytest
import torch
from conftest import make_llama
from exporting import checkpoint_of, mixed_compressed_tensors, mixed_mobile

import libqat

CHECKPOINTS = {
    "hf": lambda: checkpoint_of(make_llama()),
    "compressed-tensors": mixed_compressed_tensors,
    "gemma-mobile": mixed_mobile,
    "mlx": lambda: checkpoint_of(make_llama(), grid="mlx3_g32", embedding="mlx4_g32"),
}
with_targets = pytest.mark.parametrize("target", CHECKPOINTS)


@with_targets
def test_the_bytes_do_not_depend_on_threads(tmp_path, target):
    checkpoint, threads = CHECKPOINTS[target](), torch.get_num_threads()
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            libqat.export(checkpoint, tmp_path / str(count), target=target, max_shard_size="20KB")
    finally:
        torch.set_num_threads(threads)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert sum(name.startswith("model-") for name in names) > 2
    assert names == sorted(path.name for path in (tmp_path / "4").iterdir())
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "4" / name).read_bytes(), name
    assert libqat.verify(tmp_path / "1", checkpoint) == []


@with_targets
def test_an_interrupted_export_keeps_the_old_folder(tmp_path, target):
    def interrupt(done, total):
        raise KeyboardInterrupt

    checkpoint = CHECKPOINTS[target]()
    with pytest.raises(KeyboardInterrupt):
        libqat.export(checkpoint, tmp_path / "out", target=target, progress=interrupt)
    assert os.listdir(tmp_path) == []
    libqat.export(checkpoint, tmp_path / "out", target=target)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(libqat.FileError, match="overwrite"):
        libqat.export(checkpoint, tmp_path / "out", target=target)
    with pytest.raises(KeyboardInterrupt):
        libqat.export(checkpoint, tmp_path / "out", target=target, overwrite=True, progress=interrupt)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
