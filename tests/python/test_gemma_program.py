"""The program of `make gemma`: its comparisons on one shape, and its page."""

import gguf_file
import page
import pytest
import shapes
import study
import torch

from libqat import llama_cpp


@pytest.mark.skipif(not llama_cpp.available(), reason="needs xllamacpp: pip install xllamacpp")
@pytest.mark.parametrize("key", ["llama-smollm2", "gemma4-26b-a4b"])
def test_a_shape_gives_a_row_for_each_way_out(tmp_path, monkeypatch, key):
    monkeypatch.setattr(study, "STEPS", 16)
    rows = study.rows(shapes.BY_KEY[key], tmp_path)
    assert [row["export"] for row in rows] == ["gguf", "gemma-mobile", "compressed-tensors"]
    asked = {"family", "shape", "parity_max_abs", "grad_parity", "qat_loss_first", "qat_loss_last", "export"}
    asked |= {"consumer", "differing_values", "top1_equal"}
    for row in rows:
        assert asked <= row.keys()
        assert row["qat_loss_last"] < row["qat_loss_first"]
        assert row["top1_positions"] > 8
    assert page.wrong(rows, [], None) == []


def test_differences_are_counted(tmp_path, monkeypatch):
    """Comparisons that could not fail would prove nothing."""
    monkeypatch.setattr(study, "STEPS", 10)
    monkeypatch.setattr(study, "EXPORTS", study.EXPORTS[:1])
    [row] = study.rows(shapes.BY_KEY["gemma3-270m"], tmp_path)
    assert row["differing_values"] == 0
    import libqat
    from libqat import _core

    place = tmp_path / "gemma3-270m" / "gguf"
    weights = _core.dequantize(libqat.load(place / "run" / "model.qat.safetensors"))
    weights.pop("lm_head.weight", None)
    changed = weights["model.layers.1.mlp.up_proj.weight"].clone()
    changed[0, :3] += 1
    weights |= {"model.layers.1.mlp.up_proj.weight": changed, "model.layers.9.norm.weight": torch.ones(5)}
    assert gguf_file.differing(place / "model.gguf", weights) == 8


def test_what_is_wrong_is_said_and_tables_find_their_places(tmp_path):
    row = {
        "family": "gemma4", "shape": "E2B", "parity_max_abs": 1e-5, "grad_parity": 1e-5,
        "qat_loss_first": 0.2, "qat_loss_last": 0.1, "export": "gguf", "grids": ["q4_0"],
        "consumer": "llama.cpp", "weights": 9, "differing_values": 0, "top1_equal": True, "top1_positions": 3,
    }  # fmt: skip
    assert page.wrong([row], [], None) == []
    bad = [{"differing_values": 1}, {"top1_equal": False}, {"qat_loss_last": 0.3}, {"grad_parity": 1.0}]
    assert len(page.wrong([row | change for change in bad], [], None)) == len(bad)
    path = tmp_path / "models.md"
    path.write_text("before\n<!-- gemma: shapes -->\nold\n<!-- end -->\nafter\n")
    page.write(path, {"shapes": page.shapes_table([row])})
    written = path.read_text()
    assert "old" not in written
    assert "| gemma4 E2B | 1.0e-05 | 1.0e-05 | gguf (q4_0) | 0.2000 → 0.1000 | llama.cpp |" in written
    page.write(path, {"shapes": page.shapes_table([row])})
    assert path.read_text() == written
    with pytest.raises(ValueError, match="markers"):
        page.write(path, {"sizes": ""})
