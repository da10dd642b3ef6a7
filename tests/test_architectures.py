"""Any model type of transformers: trained as transformers computes it, from its checkpoints and back, or refused with a message."""

import pytest
import torch
import transformers

from examples import architectures
from examples.architectures import EXACT, Random, config_of
from rayllp.channel import LocalChannel, run_workers
from rayllp.channel.base import MessageTag
from rayllp.checkpoint.export import export
from rayllp.checkpoint.run_metadata import write_model_json
from rayllp.config import load_run_config, make_config
from rayllp.data import DatasetFacts
from rayllp.engine import Engine
from rayllp.errors import CheckpointError, SettingsError
from rayllp.models import build_architecture, check_family, check_network
from rayllp.report import RunDirectory
from tests.conftest import merge, tiny
from tests.test_export import save

TYPES = [
    ("causal", "qwen3"), ("causal", "gemma3_text"), ("causal", "mistral"), ("causal", "olmo2"), ("causal", "gpt_neox"), ("causal", "phi3"),
    ("causal", "mixtral"), ("masked", "modernbert"), ("images", "dinov2"), ("translation", "t5"),
]  # fmt: skip
AUTO = {
    "causal": transformers.AutoModelForCausalLM, "masked": transformers.AutoModelForMaskedLM,
    "images": transformers.AutoModelForImageClassification, "translation": transformers.AutoModelForSeq2SeqLM,
}  # fmt: skip


@pytest.mark.parametrize(("task", "kind"), TYPES)
def test_on_any_number_of_workers_as_transformers(task, kind):
    """Compares outputs, loss and every gradient: exact steps on 1 to 3 workers, and enough iterations on 2."""
    result = architectures.check(task, kind)
    assert result["outcome"] == "trains" if kind != "t5" else result["outcome"].startswith("trains"), result  # T5's norms are in float32
    assert result["parallel"], result


def engine_of(config, channel):
    data = Random(config.model.task)
    return Engine(build_architecture(config, data.facts), config, data, channel, LocalChannel.alone(), torch.device("cpu"))


@pytest.mark.parametrize(("task", "kind"), TYPES)
def test_from_a_checkpoint_of_transformers_and_back(task, kind, tmp_path):
    """Without a family or a size set: what is loaded is what was stored, and after five steps transformers computes what the run does."""
    small = config_of(task, kind, 1, "serial")
    architecture = build_architecture(small, Random(task).facts)
    torch.manual_seed(1)
    model = architecture.model_class(architecture.config).double().eval()
    model.save_pretrained(tmp_path / "stored")
    values = small.model_dump(exclude_unset=True) | {"model": {"from_pretrained": str(tmp_path / "stored")}, "workers": 2, "steps": 5}
    values = {name: value for name, value in values.items() if name not in ("step", "buffers")}
    config = make_config(values)
    assert (config.model.architecture, config.model.layers, config.step.middle) == (kind, 6, 1.0)
    inputs, _ = Random(task).batch("validation", 3, 4)
    arguments = architecture.arguments(inputs)
    with torch.no_grad():
        stored = model(**arguments).logits

    def work(channel):
        engine = engine_of(config, channel)
        before = engine.exact_forward(inputs, MessageTag(0, "evaluation"))
        for step in range(config.steps):
            engine.train_step(step, EXACT)
        return engine, before, engine.exact_forward(inputs, MessageTag(5, "evaluation"))

    *_, (_, before, after) = found = run_workers(2, work)
    torch.testing.assert_close(before, stored, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(before, after)
    run = RunDirectory.create(tmp_path / "run", config)
    write_model_json(run.path, found[0][0].block.architecture.transformers_config())
    save([engine for engine, *_ in found], run, 5)
    assert load_run_config(run.path).model == config.model
    options = {"experts_implementation": "eager"} if kind == "mixtral" else {}  # the grouped one knows no float64
    loaded, info = AUTO[task].from_pretrained(export(run.path, tmp_path / "exported"), output_loading_info=True, **options)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        outputs = loaded.eval()(**arguments).logits
    # Gemma scales embeddings by a constant in the default dtype, which is float64 while transformers loads a float64 model.
    tolerance = 1e-6 if kind == "gemma3_text" else 1e-9
    torch.testing.assert_close(outputs, after, rtol=tolerance, atol=tolerance)


def test_an_unknown_type_is_refused_with_the_nearest():
    with pytest.raises(SettingsError, match=r"'qwen33' is no model type of transformers .*nearest: .*qwen3"):
        build_architecture(tiny(model={"architecture": "qwen33"}), Random("causal").facts)


def test_a_type_without_the_task_is_refused_with_what_it_has():
    with pytest.raises(SettingsError, match=r"no vit for model.head=causal: set model.head to one of images"):
        build_architecture(tiny(model={"architecture": "vit"}), Random("causal").facts)


def test_one_of_family_and_architecture():
    with pytest.raises(SettingsError, match=r"architecture 'qwen3' and family 'gpt2' are both set"):
        tiny(model={"architecture": "qwen3", "family": "gpt2"})
    with pytest.raises(SettingsError, match=r"without a model type"):
        check_family(tiny(model={"family": "transformers"}))


def test_post_norm_layers_are_trained_exactly_or_refused():
    config = config_of("masked", "bert", 2, "parallel")
    with pytest.raises(SettingsError, match=r"bert: its layers are no residual steps.*mode: serial.*roberta-prelayernorm"):
        build_architecture(config, Random("masked").facts)
    config = config_of("masked", "bert", 2, "serial")
    with pytest.raises(SettingsError, match=r"Δt must be 1: set step.middle=1"):
        build_architecture(config.model_copy(update={"step": config.step.model_copy(update={"middle": "1/N"})}), Random("masked").facts)
    assert architectures.check("masked", "bert")["outcome"] == "trains"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("gemma4_text", "which parameters outside the layers have made"), ("hrm_text", "not each of 6 once and in order")],
)
def test_a_model_that_cannot_be_cut_is_refused_with_the_reason(kind, reason):
    with pytest.raises(SettingsError, match=rf"model {kind} .* cannot be cut into layers: .*{reason}"):
        build_architecture(config_of("causal", kind, 1, "serial"), Random("causal").facts)


def test_a_checkpoint_says_its_sizes_by_whatever_names_its_type_has(tmp_path):
    transformers.DistilBertConfig(dim=24, n_heads=2, hidden_dim=40, n_layers=3, architectures=["DistilBertForMaskedLM"]).save_pretrained(
        tmp_path
    )
    model = make_config({"model": {"from_pretrained": str(tmp_path)}, "mode": "serial", "buffers": {"open": 0, "close": 0}}).model
    assert (model.architecture, model.head) == ("distilbert", "masked")
    assert (model.layers, model.width, model.heads, model.feed_forward) == (3, 24, 2, 40)


def test_a_size_that_contradicts_the_checkpoint_is_refused(tmp_path):
    architecture = build_architecture(config_of("causal", "llama", 1, "serial"), Random("causal").facts)
    architecture.model_class(architecture.config).save_pretrained(tmp_path)
    config = make_config({"model": {"from_pretrained": str(tmp_path), "width": 64}, "workers": 1, "mode": "serial"})
    with pytest.raises(CheckpointError, match=r"has width 32, but model.width is 64: leave the setting out"):
        build_architecture(config, Random("causal").facts)


def test_sizes_that_a_type_cannot_have():
    with pytest.raises(SettingsError, match=r"cannot make a configuration of mamba2"):
        build_architecture(tiny(model={"architecture": "mamba2"}), Random("causal").facts)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_generation_from_the_last_position_alone(kind):
    config = config_of("causal", kind, 1, "serial")
    engine = engine_of(config, LocalChannel.alone())
    inputs = torch.arange(12).view(2, 6)
    whole = engine.exact_forward(inputs, MessageTag(0, "evaluation"))
    last = engine.exact_forward(inputs, MessageTag(1, "generation"), last_only=True)
    torch.testing.assert_close(last, whole[:, -1:], rtol=1e-12, atol=1e-12)


def test_packed_texts_are_blind_to_each_other():
    config = config_of("causal", "qwen3", 1, "serial")
    config = config.model_copy(update={"data": config.data.model_copy(update={"documents": "packed"})})
    engine = engine_of(config, LocalChannel.alone())
    first, second = torch.arange(10)[None, :4], torch.arange(20, 30)[None, :6]
    row = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
    together = engine.exact_forward((row, positions), MessageTag(0, "evaluation"))
    apart = [engine.exact_forward((ids, torch.arange(ids.shape[1])[None]), MessageTag(0, "evaluation")) for ids in (first, second)]
    torch.testing.assert_close(together, torch.cat(apart, 1), rtol=1e-6, atol=1e-6)


def test_dropout_beside_several_layers_in_one_call_is_refused_before_a_worker_starts():
    small = config_of("causal", "phi3", 1, "parallel").model_dump(exclude_unset=True)
    config = make_config(merge(small, {"model": {"dropout": 0.1}, "mgrit": {"batched": True}}))
    with pytest.raises(SettingsError, match=r"mgrit.batched=true and dropout.*set model.dropout=0"):
        check_network(config, Random("causal").facts)


@pytest.mark.parametrize("tokens", [97, 30])
def test_a_tokenizer_of_another_model_is_refused(tokens, tmp_path):
    architecture = build_architecture(config_of("causal", "llama", 1, "serial"), Random("causal").facts)
    architecture.model_class(architecture.config).save_pretrained(tmp_path)
    config = make_config({"model": {"from_pretrained": str(tmp_path)}, "workers": 1, "mode": "serial"})
    with pytest.raises(CheckpointError, match=rf"has {tokens} tokens, and the embedding of model.from_pretrained 96 rows"):
        build_architecture(config, DatasetFacts(vocabulary=tokens))
    build_architecture(config, DatasetFacts(vocabulary=96))
