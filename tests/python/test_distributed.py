"""Two processes on the CPU: DDP, accelerate and FSDP2 around a prepared model.

One pair of processes does everything and saves what each rank saw; the tests read it.
"""

import os

import pytest
import torch
from conftest import VOCABULARY, make_llama

import libqat
from libqat import ops

WORLD = 2
STEPS = 3


def batch():
    return torch.randint(VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))


def prepared_llama():
    return libqat.prepare(make_llama(), "gguf-q4_0").model


def sgd(model):
    """Adam would blow the rounding noise of tiny gradients up to whole steps."""
    return torch.optim.SGD(model.parameters(), lr=0.5)


def train(model, optimizer, ids, backward=torch.Tensor.backward):
    losses = []
    for _ in range(STEPS):
        loss = model(ids, labels=ids).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run_ddp(ids):
    model = prepared_llama()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    losses = train(wrapped, sgd(wrapped), ids)
    shipped = dict(libqat.dequantize(libqat.freeze(wrapped)))
    return {"losses": losses, "state": model.state_dict(), "shipped": shipped}


def run_accelerate(ids):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = prepared_llama()
    wrapped, optimizer = accelerator.prepare(model, sgd(model))
    losses = train(wrapped, optimizer, ids, accelerator.backward)
    same = accelerator.unwrap_model(wrapped) is model
    return {"losses": losses, "state": model.state_dict(), "same": same, "ranks": accelerator.num_processes}


def refusals(**attempts):
    errors = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except libqat.Error as error:
            errors[name] = f"{type(error).__name__}: {error}"
    return errors


def tensor_parallel(model, mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    return parallelize_module(model, mesh, {"model.layers.0.mlp.up_proj": ColwiseParallel()})


def run_fsdp1(ids):
    """The older wrapper, with its parameters in pieces of their own or in one flat parameter."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    seen = {"errors": {}}
    for own in (True, False):
        model = prepared_llama()
        wrapped = FullyShardedDataParallel(model, use_orig_params=own, device_id=torch.device("cpu"))
        seen["losses"] = train(wrapped, sgd(wrapped), ids)
        seen["errors"] |= refusals(
            **{
                f"freeze wrapper, {own}": lambda wrapped=wrapped: libqat.freeze(wrapped),
                f"freeze model, {own}": lambda model=model: libqat.freeze(model),
                f"report, {own}": lambda model=model: libqat.PreparedModel(model).report(),
                f"prepare, {own}": lambda wrapped=wrapped: libqat.prepare(wrapped, "gguf-q8_0"),
            }
        )
        if own:
            with FullyShardedDataParallel.summon_full_params(wrapped):
                seen["shipped"] = dict(libqat.dequantize(libqat.freeze(wrapped)))
                seen["state"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    return seen


def sharded_run(model, ids):
    """Losses under fully_shard, and the whole state afterwards; and the mesh."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh)
    losses = train(model, sgd(model), ids)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {"losses": losses, "state": get_model_state_dict(model, options=options)}, mesh


def run_fsdp(ids):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = prepared_llama()
    seen, mesh = sharded_run(model, ids)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    errors = refusals(
        freeze=lambda: libqat.freeze(model),
        report=lambda: libqat.PreparedModel(model).report(),
        prepare=lambda: libqat.prepare(fully_shard(make_llama(), mesh=mesh), "gguf-q4_0"),
        bf16=lambda: fully_shard(prepared_llama(), mesh=mesh, mp_policy=half)(ids),
        parallel=lambda: libqat.prepare(tensor_parallel(make_llama(), mesh), "gguf-q4_0"),
    )
    return seen | {"errors": errors}


def learned_llama():
    policy = {"rules": [{"match": ".*_proj", "weight": "q4_0"}], "estimator": {"kind": "lsq"}}
    return libqat.prepare(make_llama(), policy).model


def run_learned(ids):
    """Learned scales are gathered and split as every other parameter."""
    seen, _ = sharded_run(learned_llama(), ids)
    return seen


def worker(rank, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # accelerate asks; the store below is used
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD)
    ids = batch()[rank::WORLD]
    seen = {run.__name__: run(ids) for run in (run_ddp, run_accelerate, run_fsdp, run_fsdp1, run_learned)}
    torch.save(seen, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone():
    torch.set_num_threads(1)
    model = prepared_llama()
    losses = train(model, sgd(model), batch())
    return {"losses": losses, "state": model.state_dict()}


@pytest.mark.parametrize("run", ["run_ddp", "run_accelerate"])
def test_replicas_stay_identical(ranks, run):
    first, second = (rank[run]["state"] for rank in ranks)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("run", "tolerance"), [("run_ddp", 1e-4), ("run_accelerate", 2e-2), ("run_fsdp", 1e-4)]
)
def test_two_processes_equal_one(ranks, alone, run, tolerance):
    losses = [sum(pair) / WORLD for pair in zip(*(rank[run]["losses"] for rank in ranks), strict=True)]
    # the mean of two halves' gradients is the batch's, in another order of sums (and in bfloat16 products
    # under accelerate); a weight on a rounding border may take the neighbouring code
    assert losses == pytest.approx(alone["losses"], rel=tolerance)
    assert losses[-1] < losses[0] - 0.1
    for name, value in ranks[0][run]["state"].items():
        start, end = make_llama().state_dict()[name], alone["state"][name]
        assert (value - end).norm() <= 10 * tolerance * (end - start).norm(), name


def test_learned_scales_in_two_processes_equal_one(ranks):
    torch.set_num_threads(1)
    model = learned_llama()
    start = model.state_dict()["model.layers.1.mlp.up_proj.weight_scales"].clone()
    losses = train(model, sgd(model), batch())
    shared = [
        sum(pair) / WORLD for pair in zip(*(rank["run_learned"]["losses"] for rank in ranks), strict=True)
    ]
    assert shared == pytest.approx(losses, rel=1e-4)  # see test_two_processes_equal_one
    for name, value in model.state_dict().items():
        if not name.endswith("weight_scales"):
            continue
        torch.testing.assert_close(ranks[0]["run_learned"]["state"][name], value, rtol=1e-3, atol=1e-6)
    moved = model.state_dict()["model.layers.1.mlp.up_proj.weight_scales"] - start
    assert moved.abs().max() > 1e-6


@pytest.mark.parametrize("run", ["run_ddp", "run_fsdp1"])
def test_what_was_trained_ships(ranks, run):
    state, shipped = ranks[0][run]["state"], ranks[0][run]["shipped"]
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(shipped[name], ops.fake_quantize(state[name], "q4_0"))


def test_accelerate_really_ran_two_processes(ranks):
    assert [rank["run_accelerate"]["ranks"] for rank in ranks] == [WORLD, WORLD]
    assert all(rank["run_accelerate"]["same"] for rank in ranks)


def test_sharded_weights_are_refused_and_whole_ones_ship(ranks):
    errors = ranks[0]["run_fsdp"]["errors"]
    assert "before fully_shard" in errors["prepare"]
    assert "load the full state_dict" in errors["freeze"]
    assert "load the full state_dict" in errors["report"]
    assert "float32 latent" in errors["bf16"]
    assert "layers.0.mlp.up_proj: its weight is a DTensor" in errors["parallel"]
    whole = prepared_llama()
    whole.load_state_dict(ranks[0]["run_fsdp"]["state"])
    shipped = dict(libqat.dequantize(libqat.freeze(whole)))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(shipped[name], ops.fake_quantize(whole.get_parameter(name).detach(), "q4_0"))


def test_pieces_of_the_older_wrapper_are_refused(ranks):
    errors = ranks[0]["run_fsdp1"]["errors"]
    assert len(errors) == 8
    for name, message in errors.items():
        assert ("before fully_shard" if "prepare" in name else "load the full state_dict") in message, name
