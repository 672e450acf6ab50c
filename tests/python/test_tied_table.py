"""Methods that look at a layer's inputs, on a table that is the embedding and the head."""

import json

import numpy as np
import pytest
import torch
from conftest import make_llama
from rounding import drawn

import libqat
from libqat import _core, data, finetune, layer_rounding, ptq

TABLE = "model.embed_tokens.weight"


def policy(table="q4_0", blocks="q4_0"):
    rules = [{"match": "model.embed_tokens", "weight": table}, {"match": ".*_proj", "weight": blocks}]
    return libqat.Policy.from_json(json.dumps({"rules": rules})).with_scale("learned")


@pytest.fixture
def windows(hf_folder, text_file):
    ids = data.tokenize(libqat.load_tokenizer(hf_folder), data.read_texts([text_file]))
    return ptq.calibration_windows(ids, 512, 32)


def prepared_decoder(folder, table="q4_0"):
    return libqat.prepare(libqat.load_model(folder).decoder, policy(table))


def shipped(prepared):
    return libqat.dequantize(prepared.freeze("", ""))


def sharp_llama():
    """Inputs of the head whose sizes differ and answers that are not uniform, so that the Hessian matters."""
    model = make_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(4.0)
        model.model.norm.weight.mul_(torch.logspace(-1.7, 1.3, 64))
    return model


@pytest.fixture(scope="module")
def folder(hf_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("tied")
    sharp_llama().save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((hf_folder / name).read_bytes())
    return path


def clipped(squares):
    share = (squares / squares.mean()).clamp_max(8)
    return share / share.mean()


def hessians_by_autograd(model, windows, seed):
    """Of the table, on a transformers model: E[h h^T] of the head's inputs, and the guided one."""
    generator = torch.Generator().manual_seed(seed)
    inputs, squares, lookups = [], [], []
    for part in windows.split(2):
        rows = model.model.embed_tokens(part).detach().requires_grad_()
        hidden = model.model(inputs_embeds=rows).last_hidden_state
        logits = model.lm_head(hidden).flatten(0, 1)
        labels = drawn(logits.detach(), generator)
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        by_logits, by_rows = torch.autograd.grad(loss, (logits, rows))
        inputs.append(hidden.detach().flatten(0, 1).double())
        squares.append(by_logits.double().square().sum(-1))
        lookups.append(by_rows.double().flatten(0, 1))
    x, s, g = torch.cat(inputs), torch.cat(squares), torch.cat(lookups)
    unit = g / g.norm(dim=1, keepdim=True)
    sizes = clipped(g.square().sum(1)) * g.square().sum(1).mean()
    head = (x * clipped(s)[:, None]).T @ x / len(x)
    place = (unit * sizes[:, None]).T @ unit / len(g)
    return x.T @ x / len(x), head + place / s.mean()


def numpy_gptq(weight, hessian, damping):
    """The consumer's scales of Q4_0 from the compensated weights; columns are eliminated one by one."""
    w, h = weight.astype(np.float64), hessian.copy()
    n = w.shape[1]
    h[np.diag_indices(n)] += damping * np.diag(h).mean()
    inverse = np.linalg.inv(h)
    rounded = np.zeros_like(w)
    for j in range(n):
        block = slice(j // 32 * 32, j // 32 * 32 + 32)
        if j % 32 == 0:
            scales = _core.grid_choose("q4_0", np.ascontiguousarray(w[:, block], dtype=np.float32))
        stored = _core.grid_store("q4_0", scales, 32)
        now = np.ascontiguousarray(w[:, block], dtype=np.float32)
        codes = _core.grid_encode("q4_0", now, scales)
        rounded[:, j] = _core.grid_decode("q4_0", codes, stored)[:, j % 32]
        error = (w[:, j] - rounded[:, j]) / inverse[j, j]
        w[:, j:] -= np.outer(error, inverse[j, j:])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        w[:, j] = rounded[:, j]
    return rounded


@pytest.mark.parametrize("method", ["gptq", "guided"])
def test_the_table_is_rounded_by_the_heads_inputs_and_its_rows_place(method, folder, windows):
    model = sharp_llama()
    plain, guided = hessians_by_autograd(model, windows, seed=3)
    prepared = prepared_decoder(folder)
    if method == "gptq":
        done = libqat.gptq(prepared, windows, scale="reference", compute_dtype="float32")
    else:
        options = {"sweeps": 0, "seed": 3, "compute_dtype": "float32"}
        done = libqat.guided(prepared, windows, scale="reference", **options)
    assert done[0].name == TABLE  # before the blocks
    assert len(done) == 15
    table = model.model.embed_tokens.weight.detach().numpy()
    hessian, damping = (plain, 0.01) if method == "gptq" else (guided, 0.1)
    expected = numpy_gptq(table, hessian.numpy(), damping)
    other = numpy_gptq(table, (guided if method == "gptq" else plain).numpy(), damping)
    found = shipped(prepared)[TABLE].numpy()
    # float32 forward and backward passes of two programs: a weight on a border may fall to the other side,
    # and move those behind it
    assert (found != expected).mean() < 0.02
    assert (found != other).mean() > 0.1
    error = found - table
    energy = np.trace(error @ hessian.numpy() @ error.T) / np.trace(table @ hessian.numpy() @ table.T)
    assert done[0].output_error == pytest.approx(energy**0.5, rel=1e-3)


def test_blocks_are_rounded_behind_the_rounded_rows(folder, windows):
    prepared = prepared_decoder(folder)
    libqat.gptq(prepared, windows, compute_dtype="float32")
    result = shipped(prepared)
    model = sharp_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(result[TABLE])
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(windows)).flatten(0, 1).double()
    layer = model.model.layers[0].self_attn.q_proj.weight.detach()
    latent, scales = _core.gptq_tensor(layer, x.T @ x / len(x), "q4_0")
    codes = _core.grid_encode("q4_0", latent.numpy(), scales.numpy())
    expected = _core.grid_decode("q4_0", codes, _core.grid_store("q4_0", scales.numpy(), 64))
    found = result["model.layers.0.self_attn.q_proj.weight"].numpy()
    assert (found != expected).mean() < 0.01  # moments are float32 sums within a batch there


METHODS = [libqat.gptq, libqat.guided, libqat.weighted_search, libqat.awq]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("table", ["q8_0", "f32"])
def test_a_table_on_a_fine_grid_or_none_stays(method, table, folder, windows):
    prepared = prepared_decoder(folder, table)
    latent = prepared.decoder.parameters()[TABLE].detach().clone()
    before = shipped(prepared)
    done = method(prepared, windows)
    assert TABLE not in [
        name for one in done for name in ([one.name] if hasattr(one, "name") else one.weights)
    ]
    assert torch.equal(prepared.decoder.parameters()[TABLE], latent)
    if table != "f32":
        assert torch.equal(shipped(prepared)[TABLE], before[TABLE])


def test_rounding_the_table_keeps_the_models_answers(folder, windows):
    """On the text that it saw; the blocks stay float."""
    only = libqat.Policy.from_json('{"rules": [{"match": "model.embed_tokens", "weight": "q4_0"}]}')
    with torch.no_grad():
        expected = sharp_llama()(windows).logits.log_softmax(-1)

    def divergence(method):
        decoder = libqat.load_model(folder).decoder
        prepared = libqat.prepare(decoder, only.with_scale("learned" if method else "search"))
        if method:
            method(prepared, windows, compute_dtype="float32")
        with torch.no_grad():
            found = decoder(windows).log_softmax(-1)
        return float((expected.exp() * (expected - found)).sum(-1).mean())

    searched = divergence(None)
    # 0.92 and 0.66 here: a random model's residual stream is most of its answer, and plain GPTQ leaves it out
    assert divergence(libqat.guided) < 0.8 * searched
    assert divergence(libqat.gptq) < searched


def test_one_table_ships(folder, windows, tmp_path):
    loaded = libqat.load_model(folder)
    prepared = libqat.prepare(loaded.decoder, policy())
    libqat.guided(prepared, windows)
    checkpoint = prepared.freeze(loaded.config)
    libqat.save(checkpoint, tmp_path / "tied.qat.safetensors")
    assert libqat.verify(tmp_path / "tied.qat.safetensors", checkpoint) == []
    from safetensors import safe_open

    with safe_open(tmp_path / "tied.qat.safetensors", "pt") as file:
        tables = [key for key in file.keys() if "embed" in key or "lm_head" in key]  # noqa: SIM118
    assert sorted(tables) == [f"{TABLE}.codes", f"{TABLE}.scales"]


def test_a_run_from_a_rounded_table_resumes_bit_for_bit(folder, hf_folder, text_file, tmp_path):
    tokens = data.tokenize(libqat.load_tokenizer(hf_folder), data.read_texts([text_file]))
    rules = json.loads(policy().to_json())["rules"]

    def run(name, **changes):
        options = {"steps": 3, "batch_size": 2, "sequence_length": 32, "compute_dtype": "float32"}
        return finetune.start(folder, tokens, {"rules": rules}, tmp_path / name, **(options | changes))

    whole = run("whole")
    assert whole.start == "guided"
    assert whole.train()
    assert not run("part").train(lambda report: report.step < 2)
    resumed = run("part", resume=True)
    assert resumed.train()
    assert whole.checkpoint.read_bytes() == resumed.checkpoint.read_bytes()


# ---- any torch.nn model


@pytest.mark.parametrize("method", ["gptq", "guided", "weighted_search"])
def test_a_module_with_a_tied_head_gets_what_a_decoder_gets(method, folder, windows, monkeypatch):
    prepared = prepared_decoder(folder)
    options = {"seed": 3} if method == "guided" else {}
    getattr(libqat, method)(prepared, windows, compute_dtype="float32", **options)
    expected = shipped(prepared)[TABLE]
    model = sharp_llama()
    module = libqat.prepare(model, policy())
    monkeypatch.setattr(layer_rounding, "_PART", 5000)  # in parts of 78 rows
    found = getattr(libqat, method)(module, list(windows.split(2)), blocks=model.model.layers, **options)
    assert found[0].name == TABLE
    assert len(found) == 15
    weights = libqat.dequantize(libqat.freeze(module))
    # float32 forward and backward passes of two programs
    assert (weights[TABLE] != expected).float().mean() < 0.02
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.requires_grad
    assert model.lm_head.weight.grad is None


def test_a_module_in_one_pass_gets_the_same_table(folder, windows):
    tables = []
    for blocks in (True, False):
        model = sharp_llama()
        module = libqat.prepare(model, policy())
        libqat.gptq(module, list(windows.split(2)), blocks=model.model.layers if blocks else None)
        tables.append(libqat.dequantize(libqat.freeze(module))[TABLE])
    assert torch.equal(*tables)


def test_a_modules_table_on_a_fine_grid_stays(windows):
    model = sharp_llama()
    module = libqat.prepare(model, policy("q8_0"))
    before = libqat.dequantize(libqat.freeze(module))[TABLE]
    assert len(libqat.guided(module, list(windows.split(2)))) == 14
    assert torch.equal(libqat.dequantize(libqat.freeze(module))[TABLE], before)
