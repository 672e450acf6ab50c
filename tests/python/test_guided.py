"""Guided rounding, and runs that start from it."""

import copy
import json

import pytest
import torch
from conftest import make_llama
from rounding import drawn

import libqat
from libqat import _core, data, finetune, layer_rounding, layer_sensitivity, ptq, run_folder

POLICY = libqat.Policy.preset("gguf-q4_0").with_scale("learned")
LAYER = "model.layers.1.mlp.down_proj"
OPTIONS = {"steps": 4, "batch_size": 2, "sequence_length": 32, "compute_dtype": "float32"}


@pytest.fixture
def tokens(hf_folder, text_file):
    return data.tokenize(libqat.load_tokenizer(hf_folder), data.read_texts([text_file]))


@pytest.fixture
def windows(tokens):
    return ptq.calibration_windows(tokens, 256, 32)


def prepared_decoder(folder):
    loaded = libqat.load_model(folder)
    return loaded, libqat.prepare(loaded.decoder, POLICY)


def clipped(squares):
    share = (squares / squares.mean()).clamp_max(8)
    return share / share.mean()


def gradients_by_autograd(model, windows, seed):
    """Of a transformers model's loss with drawn labels by a down_proj's outputs, two windows at a time."""
    generator = torch.Generator().manual_seed(seed)
    for part in windows.split(2):
        outputs = []
        hook = model.get_submodule(LAYER).register_forward_hook(lambda *a, o=outputs: o.append(a[2]))
        logits = model(part).logits.flatten(0, 1)
        hook.remove()
        labels = drawn(logits.detach(), generator)
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        yield torch.autograd.grad(loss, outputs[0])[0]


def sensitivity_by_autograd(model, windows, seed):
    """The definition: squared gradients of each down_proj's output."""
    return clipped(torch.cat([g.square().mean(-1) for g in gradients_by_autograd(model, windows, seed)]))


def test_tokens_count_by_the_gradients_of_the_layers_outputs(hf_folder, windows):
    _, prepared = prepared_decoder(hf_folder)
    found = _core.sensitivity(prepared, windows, seed=3, compute_dtype="float32")[0]
    expected = sensitivity_by_autograd(make_llama(), windows, seed=3)
    assert len(found) == 15  # seven layers of two blocks, and the tied embedding as the head
    # two implementations of the same forward pass in float32
    torch.testing.assert_close(found[f"{LAYER}.weight"], expected, rtol=2e-3, atol=1e-4)


def test_the_model_is_left_as_it_was(hf_folder, windows):
    loaded, prepared = prepared_decoder(hf_folder)
    loaded.decoder.set_trainable(True)
    before = {name: value.clone() for name, value in loaded.decoder.parameters().items()}
    first = _core.sensitivity(prepared, windows)[0]
    second = _core.sensitivity(prepared, windows)[0]
    for name, value in loaded.decoder.parameters().items():
        assert value.requires_grad
        assert value.grad is None
        assert torch.equal(value, before[name])
    assert all(torch.equal(first[name], second[name]) for name in first)


def output_curvature_by_autograd(model, windows, seed):
    """The mean product of gradients, each token clipped at 8 times the mean of those up to its call."""
    squares, total = [], 0
    for gradient in gradients_by_autograd(model, windows, seed):
        g = gradient.flatten(0, 1).double()
        squares.append(g.square().mean(1))
        bound = 8 * torch.cat(squares).mean()
        g = g * (bound / squares[-1]).clamp_max(1).sqrt()[:, None]
        total = total + g.T @ g
    return total / windows.numel()


def test_outputs_count_together_by_the_products_of_their_gradients(hf_folder, windows):
    _, prepared = prepared_decoder(hf_folder)
    found = _core.sensitivity(prepared, windows, seed=3, compute_dtype="float32")[2]
    expected = output_curvature_by_autograd(make_llama(), windows, seed=3)
    curvature = found[f"{LAYER}.weight"]
    assert curvature.shape == (1, *expected.shape)
    # two implementations of the same forward pass in float32
    torch.testing.assert_close(
        curvature[0].double(), expected, rtol=5e-3, atol=1e-3 * float(expected.abs().max())
    )


def test_it_is_gptq_with_these_tokens_sweeps_and_curvatures(hf_folder, windows):
    _, parts = prepared_decoder(hf_folder)
    weights, _, outputs = _core.sensitivity(parts, windows, seed=5)
    _core.apply_gptq(
        parts, windows, tokens=weights, outputs=outputs, damping=0.1, sweeps=4, input_correction=0.5
    )
    _, guided = prepared_decoder(hf_folder)
    libqat.guided(guided, windows, seed=5)
    _, plain = prepared_decoder(hf_folder)
    _core.apply_guided(plain, windows, seed=5)  # C++ has the same defaults
    one = libqat.dequantize(parts.freeze("", ""))
    for other in (libqat.dequantize(guided.freeze("", "")), libqat.dequantize(plain.freeze("", ""))):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_equal_tokens_and_no_sweeps_are_plain_gptq(hf_folder, windows):
    _, plain = prepared_decoder(hf_folder)
    libqat.gptq(plain, windows)
    _, alike = prepared_decoder(hf_folder)
    names = _core.sensitivity(alike, windows)[0]
    _core.apply_gptq(alike, windows, tokens={name: torch.ones(windows.shape) for name in names})
    one, two = libqat.dequantize(plain.freeze("", "")), libqat.dequantize(alike.freeze("", ""))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_guidance_and_sweeps_change_codes_and_stay_on_the_grid(hf_folder, windows, tmp_path):
    loaded, prepared = prepared_decoder(hf_folder)
    _, plain = prepared_decoder(hf_folder)
    libqat.gptq(plain, windows)
    done = libqat.guided(prepared, windows)
    assert len(done) == 14
    checkpoint = prepared.freeze(loaded.config)
    libqat.save(checkpoint, tmp_path / "guided.qat.safetensors")
    assert libqat.verify(tmp_path / "guided.qat.safetensors", checkpoint) == []
    key = f"{LAYER}.weight"
    assert not torch.equal(checkpoint.weight(key), plain.freeze("", "").weight(key))


def test_a_torch_module_is_guided_by_its_own_loss():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4))
    original = copy.deepcopy(model)
    rules = {"rules": [{"match": ".*", "weight": "int4_g32"}], "estimator": {"kind": "lsq"}}
    prepared = libqat.prepare(model, rules)
    batches = [torch.randn(8, 32) for _ in range(4)]
    seen = []

    def loss(output):
        seen.append(output.detach())
        return output.square().sum()

    found = libqat.guided(prepared, batches, loss=loss)
    assert [one.name for one in found] == ["0.weight", "2.weight"]
    assert all(torch.equal(a, original(b)) for a, b in zip(seen, batches, strict=True))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert model.training
    libqat.guided(libqat.prepare(original, rules), batches)  # by noise, when no loss is given


def run(hf_folder, tokens, folder, policy="gguf-q4_0", **changes):
    return finetune.start(hf_folder, tokens, policy, folder, **(OPTIONS | changes))


def test_a_run_starts_where_its_grids_do_best(hf_folder, tokens, tmp_path):
    said = []
    started = run(hf_folder, tokens, tmp_path / "run", on_start=lambda *a: said.append(a))
    assert started.start == "guided"
    assert said
    assert started.train()
    assert run_folder.read_finetune(tmp_path / "run")["start"] == "guided"
    options = json.loads((tmp_path / "run" / "run.json").read_text())["options"]
    recipe = libqat.recommended(libqat.Policy.preset("gguf-q4_0"))
    assert options["learning_rate"] == recipe.learning_rate
    assert run_folder.read_policy(tmp_path / "run")["estimator"] == {"kind": "ste", "scale": "learned"}
    plain = run(hf_folder, tokens, tmp_path / "plain", start="none")
    assert plain.start == "none"
    assert json.loads(plain.prepared.policy.to_json()) == json.loads(
        libqat.Policy.preset("gguf-q4_0").to_json()
    )


def test_a_run_from_a_start_resumes_bit_for_bit(hf_folder, tokens, tmp_path):
    whole = run(hf_folder, tokens, tmp_path / "whole")
    assert whole.train()
    part = run(hf_folder, tokens, tmp_path / "part")
    assert not part.train(lambda report: report.step < 2)
    said = []
    resumed = run(hf_folder, tokens, tmp_path / "part", resume=True, on_start=lambda *a: said.append(a))
    assert not said  # nothing is rounded again
    assert resumed.train()
    assert whole.checkpoint.read_bytes() == resumed.checkpoint.read_bytes()


def test_unknown_starts_are_refused(hf_folder, tokens, tmp_path):
    with pytest.raises(
        libqat.ArgumentError,
        match=r"start: expected one of guided, gptq, lattice, none or a \*\.safetensors file, got 'awq'",
    ):
        run(hf_folder, tokens, tmp_path / "run", start="awq")
    policy = {"rules": [{"match": ".*", "weight": "q4_0"}], "estimator": {"kind": "clipped_ste"}}
    with pytest.raises(libqat.ArgumentError, match="learned scales"):
        run(hf_folder, tokens, tmp_path / "run", policy, start="gptq")


def test_a_torch_module_has_the_same_curvatures(hf_folder, windows):
    prepared = libqat.prepare(make_llama(), POLICY)
    layers = layer_rounding.linear_layers("guided", prepared)
    found = layer_sensitivity.sensitivity_of(prepared, windows.split(2), layers, layer_rounding.call, None, 3)
    expected = output_curvature_by_autograd(make_llama(), windows, seed=3)
    # float32 against float64
    torch.testing.assert_close(
        found.outputs[f"{LAYER}.weight"][0].double(),
        expected,
        rtol=5e-3,
        atol=1e-3 * float(expected.abs().max()),
    )


def test_weights_make_up_for_the_layers_in_front_of_them():
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32))
    batches = [torch.randn(200, 64) @ torch.randn(64, 64) / 8 for _ in range(3)]
    policy = libqat.Policy.from_json(
        '{"rules": [{"match": "0", "weight": "int2_g32"}, {"match": "2", "weight": "int8_channel"}]}'
    ).with_scale("learned")

    def error(share):
        prepared = libqat.prepare(copy.deepcopy(model), policy)
        libqat.guided(
            prepared, batches, blocks=[prepared.model[0], prepared.model[2]], input_correction=share
        )
        with torch.no_grad():
            found = [(prepared.model(batch) - model(batch)).square().sum() for batch in batches]
        return float(sum(found))

    # 0.32 here: of the error of two bits, what is linear in the inputs can be made up for
    assert error(1.0) < 0.6 * error(0.0)
    with pytest.raises(libqat.ArgumentError, match="guided: input_correction: expected 0 to 1, got 2"):
        error(2.0)


def test_expected_kl_is_the_quadratic_form():
    """In float64; the last group has fewer rows than the others."""
    random = torch.Generator().manual_seed(5)
    e = torch.randn(10, 8, generator=random)
    x, g = torch.randn(50, 8, generator=random), torch.randn(3, 50, 4, generator=random)
    h, outputs = x.T @ x / 50, g.transpose(1, 2) @ g / 50
    expected = 0.0
    for group in range(3):
        rows = e[4 * group : 4 * group + 4].double()
        curvature = outputs[group, : len(rows), : len(rows)].double()
        expected += float(torch.trace(curvature @ rows @ h.double() @ rows.T)) / 2
    assert _core.expected_kl(e, h.double(), outputs) == pytest.approx(expected, rel=1e-5)  # float32 sums
    for wrong in ((e, h[:4], outputs), (e, h, outputs[:2]), (e[0], h, outputs), (e, h, outputs[0])):
        with pytest.raises(libqat.ArgumentError, match="expected_kl"):
            _core.expected_kl(*wrong)


@pytest.mark.parametrize("grid", ["q4_0", "q2_0"])
def test_expected_kl_foresees_what_a_layer_costs(hf_folder, grid):
    """One layer after the other by itself. Their costs differ by a factor of a thousand and more; what is
    expected is a third to all of them, as tokens and gradients are clipped and averaged apart."""
    windows = torch.randint(0, 256, (32, 32), generator=torch.Generator().manual_seed(4))
    loaded = libqat.load_model(hf_folder)
    rules = {"rules": [{"match": ".*_proj", "weight": grid}]}
    prepared = libqat.prepare(
        loaded.decoder, libqat.Policy.from_json(json.dumps(rules)).with_scale("learned")
    )
    found = libqat.guided(prepared, windows, compute_dtype="float32", input_correction=0.0)
    rounded = libqat.dequantize(prepared.freeze(loaded.config))
    decoder = libqat.load_model(hf_folder).decoder
    weights = decoder.parameters()
    costs = []
    with torch.no_grad():
        p = decoder.forward(windows).double().log_softmax(-1)
        for one in found:
            before = weights[one.name].clone()
            weights[one.name].copy_(rounded[one.name])
            q = decoder.forward(windows).double().log_softmax(-1)
            weights[one.name].copy_(before)
            costs.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert len(found) == 14
    assert max(costs) > 1000 * min(costs)
    shares = {one.name: one.expected_kl / cost for one, cost in zip(found, costs, strict=True)}
    assert all(0.25 < share < 1.1 for share in shares.values()), shares


def test_a_torch_module_expects_the_same(hf_folder, windows):
    model = make_llama()
    prepared = libqat.prepare(model, POLICY)
    found = libqat.guided(prepared, windows.split(2), blocks=model.model.layers, input_correction=0.0)
    costs = {one.name: one.expected_kl for one in found}
    _, decoder = prepared_decoder(hf_folder)
    expected = libqat.guided(decoder, windows, input_correction=0.0, compute_dtype="float32")
    # a decoder's layers see those rounded before them in their own block, too
    assert costs == pytest.approx({one.name: one.expected_kl for one in expected}, rel=0.05)


def test_other_methods_expect_nothing(hf_folder, windows):
    _, prepared = prepared_decoder(hf_folder)
    assert all(one.expected_kl is None for one in libqat.gptq(prepared, windows))


def test_sums_of_a_layers_gradients_keep_the_order_of_its_calls():
    generator = torch.Generator().manual_seed(2)
    calls = [torch.randn(tokens, 24, generator=generator) for tokens in (3, 50)]
    sums = _core.LayerSensitivity("it")
    places = [sums.expect(len(call)) for call in calls]
    assert not sums.counts()
    for place, call in reversed(list(zip(places, calls, strict=True))):  # as a backward pass meets them
        sums.add(place, call)
    assert sums.counts()
    squares = torch.cat(calls).square().mean(-1)
    torch.testing.assert_close(sums.tokens(), clipped(squares))
    whole = torch.cat(calls)  # nothing here is above 8 means
    torch.testing.assert_close(sums.outputs()[0], whole.T @ whole / len(whole), rtol=1e-4, atol=1e-5)
    assert sums.lookups() is None
    sums.add_lookups(torch.randn(53, 16, generator=generator))
    assert sums.outputs() is None
    assert sums.lookups().shape == (16, 16)
    for place, gradient in ((2, calls[0]), (-1, calls[0]), (0, calls[1]), (0, torch.ones(3, 5))):
        with pytest.raises(libqat.ArgumentError, match=r"LayerSensitivity.add: it: expected"):
            sums.add(place, gradient)


def test_gradients_that_are_not_finite_are_refused():
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    prepared = libqat.prepare(
        model, libqat.Policy.from_json('{"rules": [{"match": ".*", "weight": "q4_0"}]}').with_scale("learned")
    )
    batch = torch.full((4, 32), 1e25)  # whose squared gradients float32 does not hold
    with pytest.raises(libqat.NumericError, match=r"token_sensitivity: 0.weight: expected finite gradients"):
        libqat.guided(prepared, [batch], loss=lambda found: found.square().sum())
