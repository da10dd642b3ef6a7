"""SGD and Adafactor compared with torch's, and averaged weights: on any number of workers, in checkpoints, evaluations and exports."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rayllp.channel import run_workers
from rayllp.checkpoint import commit, load_pieces
from rayllp.checkpoint.export import export
from rayllp.checkpoint.states import BlockState
from rayllp.errors import CheckpointError
from rayllp.plan import Device, make_plan
from rayllp.report import RunDirectory
from tests.conftest import losses_over_threads, make_engine, tiny, train_engine
from tests.test_optimizer import saved
from tests.test_planner import layers

SGD = {"optimizer": {"name": "sgd", "lr": 0.1, "warmup": 2, "momentum": 0.9}}
PLAIN_SGD = {"optimizer": {**SGD["optimizer"], "momentum": 0}}
ADAFACTOR = {"optimizer": {"name": "adafactor", "lr": 0.3, "warmup": 2}}
EMA = {"optimizer": {"ema": 0.9, "lr": 1e-2, "warmup": 2}}
ALL = {"sgd": SGD, "sgd without momentum": PLAIN_SGD, "adafactor": ADAFACTOR, "average": EMA}


def bare(name, parameters):
    """Return torch's own optimizer with the settings above."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, momentum=0.9) if name == "sgd" else torch.optim.Adafactor(groups)


@pytest.mark.parametrize("changes", [SGD, ADAFACTOR], ids=["sgd", "adafactor"])
def test_updates_are_torchs(changes):
    name, numbers = changes["optimizer"]["name"], torch.Generator().manual_seed(0)
    engine = make_engine(tiny(**changes))
    twins = {key: torch.nn.Parameter(p.detach().clone()) for key, p in engine.block.parameters.items()}
    optimizer = bare(name, list(twins.values()))
    for lr in (0.01, 0.03, 0.02):
        for key, parameter in engine.block.parameters.items():
            parameter.grad = torch.randn(parameter.shape, generator=numbers, dtype=parameter.dtype)
            twins[key].grad = parameter.grad.clone()
        engine.optimizer.step(lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    for key, parameter in engine.block.parameters.items():
        torch.testing.assert_close(parameter.detach(), twins[key].detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["sgd", "adafactor"])
@pytest.mark.parametrize("changes", [{"mode": "serial"}, {"mgrit": {"coarsening": 2}}], ids=["serial", "MGRIT"])
def test_losses_fall_and_do_not_depend_on_the_number_of_workers(name, changes):
    wanted = losses_over_threads(tiny(**ALL[name], **changes), 6)
    assert losses_over_threads(tiny(**ALL[name], **changes, workers=3), 6) == pytest.approx(wanted, rel=1e-9)
    assert wanted[-1] < wanted[0] - 0.2


@pytest.mark.parametrize("case", ALL)
def test_a_checkpoint_and_a_state_in_memory_go_on(case, tmp_path):
    engine = make_engine(tiny(**ALL[case]))
    train_engine(engine, 3)
    folder, state = saved(engine, tmp_path / "step_3"), BlockState(engine)
    kept = state.new_buffer()
    state.copy_into(kept)
    wanted = [stats.grad_norm for stats in train_engine(engine, 3, first=3)], engine.evaluate(2)
    state.restore(kept)
    assert ([stats.grad_norm for stats in train_engine(engine, 3, first=3)], engine.evaluate(2)) == wanted

    def go_on(channel):
        again = make_engine(tiny(**ALL[case], workers=channel.size), channel)
        with torch.no_grad():  # all must be overwritten
            for parameter in again.block.parameters.values():
                parameter.fill_(torch.nan)
        load_pieces(again, folder)
        return [stats.grad_norm for stats in train_engine(again, 3, first=3)], again.evaluate(2)

    assert run_workers(1, go_on)[0] == wanted
    norms, found = run_workers(2, go_on)[0]
    assert norms == pytest.approx(wanted[0], rel=1e-9)
    assert found == pytest.approx(wanted[1], rel=1e-9)


def test_the_average_is_what_is_evaluated_and_training_does_not_see_it():
    engine, plain = make_engine(tiny(**EMA)), make_engine(tiny(optimizer={**EMA["optimizer"], "ema": None}))
    average = None
    for step in range(4):
        norms = [train_engine(trained, 1, first=step)[0].grad_norm for trained in (engine, plain)]
        assert norms[0] == norms[1]
        now = {name: p.detach().clone() for name, p in plain.block.parameters.items()}
        decay = min(0.9, (1 + step) / (10 + step))
        average = now if average is None else {name: decay * value + (1 - decay) * now[name] for name, value in average.items()}
        found = engine.evaluate(2)
        assert all(torch.equal(p, now[name]) for name, p in engine.block.parameters.items())  # to the last bit
    assert found != plain.evaluate(2)
    with torch.no_grad():
        for name, parameter in plain.block.parameters.items():
            parameter.copy_(average[name])
    assert found == pytest.approx(plain.evaluate(2), rel=1e-12)


def test_an_average_may_begin_and_end_where_a_run_goes_on(tmp_path):
    plain = make_engine(tiny())
    train_engine(plain, 2)
    begun = make_engine(tiny(**EMA))
    load_pieces(begun, saved(plain, tmp_path / "step_2"))
    assert begun.evaluate(2) == plain.evaluate(2)
    train_engine(begun, 1, first=2)
    ended = make_engine(tiny())
    load_pieces(ended, saved(begun, tmp_path / "step_3"))
    assert ended.evaluate(2) != begun.evaluate(2)


def test_the_average_is_what_is_exported(tmp_path):
    config = tiny(**EMA, dtype="float32", step={"middle": 1.0})
    run = RunDirectory.create(tmp_path / "run", config)
    engine = make_engine(config)
    train_engine(engine, 3)
    staged = saved(engine, tmp_path / "piece")
    run.checkpoints.mkdir()
    partial = run.checkpoints / ".step_3.partial"
    staged.rename(partial)
    contents = {path.name: path.read_bytes() for path in partial.iterdir()}
    files = {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in contents.items()}
    folder = commit(partial, 3, files, {"config": config.model_dump(mode="json")}, 1)
    model = AutoModelForCausalLM.from_pretrained(export(run.path, tmp_path / "model"))
    stored = load_file(folder / "layer_00005.safetensors")
    name = "transformer.h.5.attn.c_attn.weight"
    assert torch.equal(model.get_parameter(name), stored[f"ema/{name}"])
    assert not torch.equal(stored[f"ema/{name}"], stored[f"weight/{name}"])


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    engine = make_engine(tiny(**SGD))
    train_engine(engine, 1)
    folder = saved(engine, tmp_path / "step_1")
    for changes, has in ((ADAFACTOR, "row_var, col_var"), (PLAIN_SGD, "none")):
        with pytest.raises(CheckpointError, match=f"optimizer's momentum_buffer, but optimizer.name=.* goes on from {has}"):
            load_pieces(make_engine(tiny(**changes)), folder)


def test_the_planner_counts_what_is_kept():
    model = layers(parameter_bytes=1e6)

    def memory(**optimizer):
        return make_plan(tiny(batch_size=16, optimizer=optimizer), model, Device(), 2).best.memory

    adafactor = memory(name="adafactor")
    wanted = {"sgd": 3, "adamw": 4, "muon": 3}
    assert {name: memory(name=name) for name in wanted} == pytest.approx({name: n / 2 * adafactor for name, n in wanted.items()})
    assert memory(name="sgd", momentum=0) == adafactor
    assert memory(name="adafactor", ema=0.9) == memory(name="sgd")


def test_the_planner_counts_no_state_of_what_is_frozen():
    def memory(frozen):
        return make_plan(tiny(batch_size=16), layers(parameter_bytes=1e6, frozen_bytes=frozen), Device(), 2).best.memory

    assert memory(1e6) == pytest.approx(memory(0) / 4)  # weights alone, of weights, gradients and two averages
