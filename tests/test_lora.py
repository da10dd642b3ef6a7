"""Adapters and frozen parameters: gradients equal peft's, what is frozen costs nothing, adapters are read and written in peft's format."""

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

from examples.architectures import ENOUGH, EXACT, Random, config_of, ours
from rayllp.channel import LocalChannel, run_workers
from rayllp.channel.base import MessageTag
from rayllp.checkpoint.export import export
from rayllp.checkpoint.run_metadata import write_model_json
from rayllp.config import make_config
from rayllp.errors import CheckpointError, SettingsError
from rayllp.models import build_architecture
from rayllp.report import RunDirectory
from tests.conftest import merge
from tests.test_architectures import engine_of
from tests.test_export import save


def with_model(kind, workers=1, mode="serial", **changes):
    config = config_of("causal", kind, workers, mode)
    return config.model_copy(
        update={"model": type(config.model).model_validate(merge(config.model.model_dump(exclude_unset=True), changes))}
    )


LORA = {"lora": {"rank": 3, "alpha": 5.0, "targets": ["q_proj", "down_proj"]}}


@pytest.mark.parametrize(("kind", "targets"), [("qwen3", ["q_proj", "down_proj"]), ("gpt2", ["c_attn"])])
def test_gradients_of_adapters_are_those_of_peft(kind, targets):
    """On 1 and 2 workers, by exact steps and by enough iterations; nothing but the adapters has a gradient."""
    change = {"lora": {"rank": 3, "alpha": 5.0, "targets": targets}}
    config = with_model(kind, **change)
    gradients, weights, outputs, _ = ours(config, EXACT)
    architecture = build_architecture(config, Random("causal").facts)
    model = architecture.model_class(architecture.config).double()
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=5.0, target_modules=targets, fan_in_fan_out=kind == "gpt2")).train()
    _, unexpected = model.get_base_model().load_state_dict(weights, strict=False)
    assert not unexpected
    inputs, wanted = Random("causal").batch("train", 1, 4)
    found = model(input_ids=inputs).logits
    (architecture.loss(found, wanted) / architecture.count(wanted)).backward()
    torch.testing.assert_close(outputs, found.detach(), rtol=1e-9, atol=1e-9)
    theirs = {name.removeprefix("base_model.model."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {name for name, gradient in gradients.items() if gradient is not None} == set(theirs)
    for workers, mode, accuracy in ((1, "serial", EXACT), (2, "serial", EXACT), (2, "parallel", ENOUGH)):
        again = ours(with_model(kind, workers, mode, **change), accuracy)[0]
        for name, gradient in theirs.items():
            torch.testing.assert_close(again[name], gradient, rtol=1e-9, atol=1e-9)


def test_frozen_parameters_have_no_state_and_do_not_move():
    config = with_model("qwen3", train=["*.q_proj.*", "model.norm.*"])
    engine = engine_of(config, LocalChannel.alone())
    before = {name: p.detach().clone() for name, p in engine.block.parameters.items()}
    for step in range(2):
        engine.train_step(step, EXACT)
    for name, parameter in engine.block.parameters.items():
        trained = ".q_proj." in name or name == "model.norm.weight"
        assert torch.equal(parameter, before[name]) != trained, name
        assert bool(engine.optimizer.state_of(parameter)) == trained
        assert tuple(engine.optimizer.moments_of(parameter)) == (("exp_avg", "exp_avg_sq") if trained else ())


def test_losses_of_adapters_do_not_depend_on_workers():
    def losses(workers):
        config = with_model("qwen3", workers, **LORA)

        def work(channel):
            engine = engine_of(config, channel)
            return [engine.train_step(step, EXACT).loss for step in range(3)]

        return run_workers(workers, work)[0]

    alone = losses(1)
    assert len(set(alone)) == 3
    assert losses(2) == pytest.approx(alone, rel=1e-12)
    assert losses(3) == pytest.approx(alone, rel=1e-12)


def test_what_matches_nothing_is_refused_with_what_there_is():
    facts = Random("causal").facts
    with pytest.raises(SettingsError, match=r"targets has 'q_prj', which is no linear map .*down_proj, .*\(q_proj\?\)"):
        build_architecture(with_model("qwen3", lora={"targets": ["q_prj"]}), facts)
    with pytest.raises(SettingsError, match=r"model.train has 'h.\*', which matches no parameter: there are model.embed_tokens.weight"):
        build_architecture(with_model("qwen3", train=["h.*"]), facts)
    with pytest.raises(CheckpointError, match=r"no adapter_model.safetensors there"):
        build_architecture(with_model("qwen3", lora={"from_pretrained": "nowhere"}), facts).build(0, 0)


def test_adapters_out_merged_or_not_and_in_again(tmp_path):
    """The model that peft and transformers load computes what the run does, and adapters that are loaded train on from where they were."""
    small = config_of("causal", "gpt2", 1, "serial")
    architecture = build_architecture(small, Random("causal").facts)
    torch.manual_seed(1)
    architecture.model_class(architecture.config).double().save_pretrained(tmp_path / "base")
    values = small.model_dump(exclude_unset=True) | {"workers": 2, "steps": 3}
    values = {name: value for name, value in values.items() if name not in ("step", "buffers")}
    lora = {"rank": 2, "targets": ["c_proj", "c_attn"]}
    config = make_config(values | {"model": {"from_pretrained": str(tmp_path / "base"), "lora": lora}})
    inputs, _ = Random("causal").batch("validation", 3, 4)

    def trained(config, steps):
        def work(channel):
            engine = engine_of(config, channel)
            for step in range(steps):
                engine.train_step(step, EXACT)
            return engine, engine.exact_forward(inputs, MessageTag(steps, "evaluation"))

        found = run_workers(2, work)
        return [engine for engine, _ in found], found[-1][1]

    engines, wanted = trained(config, 3)
    run = RunDirectory.create(tmp_path / "run", config)
    write_model_json(run.path, engines[0].block.architecture.transformers_config())
    save(engines, run, 3)
    adapters = export(run.path, tmp_path / "adapters")
    assert {path.name for path in adapters.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"} - {"README.md"}
    merged = transformers.AutoModelForCausalLM.from_pretrained(export(run.path, tmp_path / "merged", merge=True))
    of_peft = AutoPeftModelForCausalLM.from_pretrained(adapters)
    for model in (merged, of_peft):
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(input_ids=inputs).logits, wanted, rtol=1e-9, atol=1e-9)
    again = make_config(values | {"model": {"from_pretrained": str(tmp_path / "base"), "lora": lora | {"from_pretrained": str(adapters)}}})
    torch.testing.assert_close(trained(again, 0)[1], wanted, rtol=1e-12, atol=1e-12)
    with pytest.raises(CheckpointError, match=r"\(2, 32\) there and \(3, 32\) here: set model.lora.rank"):
        trained(
            again.model_copy(update={"model": again.model.model_copy(update={"lora": again.model.lora.model_copy(update={"rank": 3})})}), 0
        )
