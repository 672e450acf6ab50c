"""Hugging Face's Trainer trains a prepared model as it trains any other."""

import copy

import pytest
import torch
from conftest import VOCABULARY, make_llama
from libqat.hf import DistillationTrainer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import libqat

STEPS = 6


def examples(count=24, length=16):
    """Rotations of one random sequence: something that two layers can learn in a few steps."""
    sequence = torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(0))
    rows = [torch.roll(sequence, shift) for shift in range(count)]
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return TrainingArguments(**(settings | changes))


def prepared_llama(**changes):
    return libqat.prepare(make_llama(**changes), "gguf-q4_0").model


def train(model, folder, resume=None, **changes):
    trainer = Trainer(model, arguments(folder, **changes), train_dataset=examples())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_state(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name


def shipped_model(model):
    """An ordinary model with the weights that the checkpoint of `model` holds."""
    shipped = make_llama(seed=1).eval()
    shipped.load_state_dict(dict(libqat.dequantize(libqat.freeze(model))), strict=False)  # the head is tied
    return shipped


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """Six steps without any option, the yardstick. Tests must not change its model."""
    torch.set_num_threads(1)
    return train(prepared_llama(), tmp_path_factory.mktemp("plain"))


def test_the_loss_falls_and_what_ships_is_what_forward_saw(plain_run):
    assert losses(plain_run)[-1] < 0.85 * losses(plain_run)[0]
    model = plain_run.model.eval()
    ids = examples()[3]["input_ids"][None]
    with torch.no_grad():
        seen = model(ids).logits
        assert torch.equal(shipped_model(model)(ids).logits, seen)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*requires_grad=True.*")
def test_gradient_checkpointing_changes_nothing(plain_run, tmp_path, use_reentrant):
    trainer = train(
        prepared_llama(),
        tmp_path / "again",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    assert losses(trainer) == losses(plain_run)
    assert_same_state(trainer.model, plain_run.model)


def test_bfloat16_compute_keeps_float32_latents(plain_run, tmp_path):
    trainer = train(prepared_llama(), tmp_path / "bf16", bf16=True)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    # 8 bits of mantissa in the products: the losses agree to about two digits
    assert losses(trainer) == pytest.approx(losses(plain_run), rel=0.02)
    assert losses(trainer) != losses(plain_run)


def test_a_model_loaded_in_bfloat16_trains_float32_latents(hf_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.bfloat16)
    latent = model.model.layers[0].mlp.up_proj.weight
    libqat.prepare(model, "gguf-q4_0")
    before = latent.detach().clone()
    # a hundredth of a bfloat16 step of most weights: bfloat16 latents would stay where they are
    trainer = train(model, tmp_path, bf16=True, learning_rate=1e-7)
    moved = (latent - before).abs()
    assert latent.dtype == torch.float32
    assert 0 < moved.max() < 2e-6
    assert (before.bfloat16() == latent.bfloat16()).float().mean() > 0.95
    assert latent is trainer.model.model.layers[0].mlp.up_proj.weight


def test_micro_batches_sum_to_the_batch(plain_run, tmp_path):
    trainer = train(
        prepared_llama(), tmp_path / "micro", per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    # the same four rows in two halves: float32 sums in another order
    assert losses(trainer) == pytest.approx(losses(plain_run), rel=1e-4)


def test_compiled_training_equals_eager(plain_run, tmp_path):
    torch._dynamo.reset()
    trainer = train(
        prepared_llama(),
        tmp_path / "compiled",
        torch_compile=True,
        torch_compile_backend="aot_eager",
        save_strategy="steps",
        save_steps=STEPS,
    )
    # the traced graph decomposes norms and softmax: float32 rounding in another order
    assert losses(trainer) == pytest.approx(losses(plain_run), rel=1e-4)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "compiled" / f"checkpoint-{STEPS}")
    assert_same_state(saved, trainer.model)


def test_checkpoints_are_ordinary_and_resume_exactly(plain_run, tmp_path):
    halves = {"save_strategy": "steps", "save_steps": STEPS // 2}
    whole = train(prepared_llama(), tmp_path / "whole", **halves)
    assert_same_state(whole.model, plain_run.model)

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / f"checkpoint-{STEPS}")
    assert_same_state(saved, whole.model)  # the latents, under the ordinary keys
    assert type(saved.model.layers[0].mlp.up_proj) is torch.nn.Linear

    half = str(tmp_path / "whole" / f"checkpoint-{STEPS // 2}")
    resumed = train(prepared_llama(seed=9), tmp_path / "resumed", resume=half, **halves)
    assert losses(resumed) == losses(whole)
    assert_same_state(resumed.model, whole.model)


def test_full_bfloat16_evaluation_does_not_round_the_latents(tmp_path):
    model = prepared_llama()
    latent = model.model.layers[0].mlp.up_proj.weight
    before = latent.detach().clone()
    trainer = Trainer(model, arguments(tmp_path, bf16_full_eval=True), eval_dataset=examples())
    with pytest.warns(
        UserWarning, match=r"bfloat16 parameters; a prepared model keeps its latents in float32"
    ):
        trainer.evaluate()
    assert torch.equal(latent, before)
    assert model.model.norm.weight.dtype == torch.bfloat16


# ---- distillation


def reference_loss(student, teacher, labels, kl, ce, temperature):
    """Both terms as PyTorch computes them, over the targets that are not masked."""
    keep = labels[:, 1:] != -100
    q, p = student[:, :-1][keep], teacher[:, :-1][keep]
    divergence = F.kl_div(
        F.log_softmax(q / temperature, -1),
        F.log_softmax(p / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    return kl * temperature**2 * divergence + ce * F.cross_entropy(q, labels[:, 1:][keep])


def distilling(folder, teacher, model=None, **changes):
    settings = {name: changes.pop(name) for name in ("kl", "ce", "temperature") if name in changes}
    return DistillationTrainer(
        model or prepared_llama(),
        arguments(folder, **changes),
        train_dataset=examples(),
        eval_dataset=examples(8),
        teacher=teacher,
        **settings,
    )


@pytest.mark.parametrize("masked", ["nothing", "some", "first", "all"])
def test_the_objective_is_the_documented_sum(tmp_path, masked):
    teacher = make_llama()
    setting = {"kl": 0.7, "ce": 0.3, "temperature": 2.0}
    trainer = distilling(tmp_path, teacher, **setting)
    ids = torch.stack([row["input_ids"] for row in examples(3)])
    labels = ids.clone()
    if masked == "some":
        labels[0, 5:9] = labels[2, 10:] = -100
    elif masked == "first":
        labels[:, 0] = -100
    elif masked == "all":
        labels[:] = -100
    loss = trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": labels})
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in trainer.model.parameters()]
    trainer.model.zero_grad()
    if masked == "all":
        assert loss == 0
        assert all((gradient == 0).all() for gradient in gradients)
        return
    expected = reference_loss(trainer.model(ids).logits, teacher(ids).logits, labels, **setting)
    expected.backward()
    # float32 softmax over 320 numbers, summed in another order
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for gradient, parameter in zip(gradients, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("bf16", [False, True])
def test_distillation_brings_the_student_to_its_teacher(tmp_path, bf16):
    # larger weights than usual, so that the teacher is sure of something that 2 bits lose
    teacher, student = make_llama(initializer_range=0.1), make_llama(initializer_range=0.1)
    libqat.prepare(student, {"rules": [{"match": ".*_proj", "weight": "int2_channel"}]})
    before = copy.deepcopy(teacher.state_dict())
    trainer = distilling(tmp_path, teacher, model=student, bf16=bf16, learning_rate=1e-3, max_steps=20)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * start
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_float_model_is_at_zero(tmp_path):
    # KL of equal distributions: float32 rounding only
    assert distilling(tmp_path, make_llama(), model=make_llama()).evaluate()["eval_loss"] == pytest.approx(
        0, abs=1e-6
    )


def test_accumulated_distillation_weighs_tokens_not_batches(tmp_path):
    data = examples(8)
    for row in data[::2]:
        row["labels"][4:] = -100
    results = []
    for micro in (4, 1):
        trainer = DistillationTrainer(
            prepared_llama(),
            arguments(
                tmp_path,
                max_steps=2,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=4 // micro,
            ),
            train_dataset=data,
            teacher=make_llama(seed=3),
        )
        trainer.train()
        results.append(losses(trainer))
    # the same tokens, summed in another order
    assert results[1] == pytest.approx(results[0], rel=1e-4)


def test_refuses_what_is_no_teacher(tmp_path):
    model = make_llama()
    prepared = libqat.prepare(model, "gguf-q4_0")
    prepared.enabled(False)
    for teacher in (model, copy.deepcopy(model)):
        with pytest.raises(libqat.ArgumentError, match="copy the model before prepare"):
            distilling(tmp_path, teacher, model=model)
    with pytest.raises(libqat.ArgumentError, match="label_smoothing"):
        distilling(tmp_path, make_llama(), label_smoothing_factor=0.1)
    trainer = distilling(tmp_path, make_llama())
    with pytest.raises(libqat.ArgumentError, match=r"labels in each batch, got input_ids.*DataCollator"):
        trainer.compute_loss(trainer.model, {"input_ids": examples()[0]["input_ids"][None]})


def test_generate_uses_what_ships(plain_run):
    model = plain_run.model.eval()
    prompt = examples()[0]["input_ids"][None, :4]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(prompt, **options), shipped_model(model).generate(prompt, **options))
