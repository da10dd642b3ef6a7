"""Exports: the model that transformers loads computes what the run computed, generates, and can be trained again; all refusals."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from rayllp import LayerStack
from rayllp.channel import LocalChannel, run_workers
from rayllp.channel.base import MessageTag
from rayllp.checkpoint import PieceWriter, checkpoints, commit, locate, staging
from rayllp.checkpoint import export as export_module
from rayllp.checkpoint.export import export
from rayllp.checkpoint.run_metadata import TOKENIZER_JSON, read_model_json, write_model_json, write_tokenizer_json
from rayllp.cli import app
from rayllp.config import load_config, make_config, to_yaml
from rayllp.control import Accuracy
from rayllp.engine import Engine
from rayllp.errors import CheckpointError, DataError, SettingsError
from rayllp.hf_config import with_layers
from rayllp.models import build_architecture, weights
from rayllp.models.scaled import load_scaled
from rayllp.models.weights import PretrainedWeights
from rayllp.report import RunDirectory
from rayllp.training import prepare
from tests.conftest import make_engine, tiny
from tests.test_families import CASES, PAD, SERIAL, RandomBatches, config_of, make

AUTO = {
    "gpt2": transformers.AutoModelForCausalLM, "llama": transformers.AutoModelForCausalLM, "bert": transformers.AutoModelForMaskedLM,
    "mc": transformers.AutoModelForTokenClassification, "vit": transformers.AutoModelForImageClassification,
    "mt": transformers.AutoModelForSeq2SeqLM, "sentences": transformers.AutoModelForSequenceClassification,
}  # fmt: skip
ONE_ITERATION = Accuracy(serial=False, levels_forward=2, levels_backward=2, iterations_forward=1, iterations_backward=1)


def save(engines, run, step):
    """Write a checkpoint of a layer group's engines."""
    folder, files = staging(run.checkpoints, step), {}
    for engine in engines:
        writer = PieceWriter()
        writer.begin(engine, folder)
        files |= writer.finish()
    return commit(folder, step, files, {}, keep=9)


def trained(config, path, steps=1):
    """Return a run directory with a checkpoint after `steps` steps, and the engines of its layer group."""

    def work(channel):
        engine = make(config, channel)
        for step in range(steps):
            engine.train_step(step, ONE_ITERATION)
        return engine

    engines = run_workers(config.layer_workers, work)
    run = RunDirectory.create(path, config)
    write_model_json(run.path, engines[0].block.architecture.transformers_config())
    save(engines, run, steps)
    return run, engines


def load(family, head, folder, scaled=False):
    load_model = load_scaled if scaled else AUTO[head if head == "sentences" else family].from_pretrained
    model, info = load_model(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def arguments_of(family, head, inputs):
    if family == "vit":
        return {"pixel_values": inputs.double()}
    if family == "mt":
        return {"input_ids": inputs[0], "decoder_input_ids": inputs[1], "attention_mask": inputs[0] != PAD}
    padded = head == "sentences" or family in ("bert", "mc")
    return {"input_ids": inputs, **({"attention_mask": inputs != PAD} if padded else {})}


def exact(config, inputs):
    """Return the outputs of the network that `trained` made, computed over its layer group."""

    def work(channel):
        engine = make(config, channel)
        engine.train_step(0, ONE_ITERATION)
        return engine.exact_forward(inputs, MessageTag(0, "evaluation"))

    return run_workers(config.layer_workers, work)[-1]


def tensors_of(folder):
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# What is loaded -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("middle", [1.0, "1/N"])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("family", "head"), CASES)
def test_transformers_computes_what_the_run_computes(family, head, workers, middle, tmp_path):
    config = config_of(family, head, workers=workers, step={"middle": middle}, model={"dropout": 0.1})
    trained(config, tmp_path / "run")
    inputs, _ = RandomBatches(family, head).batch("validation", 7, 4)
    wanted = exact(config, inputs)
    to = export(tmp_path / "run", tmp_path / "model")
    model = load(family, head, to, scaled=middle != 1.0)
    assert next(model.parameters()).dtype == torch.float64
    models = [model]
    if middle != 1.0:  # by transformers alone, with the code that is in the folder
        auto = AUTO[head if head == "sentences" else family]
        models.append(auto.from_pretrained(to, trust_remote_code=True).eval())
        assert not type(models[-1]).__module__.startswith("rayllp")
        models[-1].save_pretrained(tmp_path / "again")
        models.append(load(family, head, tmp_path / "again", scaled=True))
    for each in models:
        with torch.no_grad():
            outputs = each(**arguments_of(family, head, inputs)).logits
        torch.testing.assert_close(outputs, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "bert", "mt"])
def test_tied_and_untied_embeddings_and_float32(family, tie, tmp_path):
    config = config_of(family, workers=2, dtype="float32", model={"tie_embeddings": tie})
    trained(config, tmp_path / "run")
    inputs, _ = RandomBatches(family, "auto").batch("validation", 7, 4)
    to = export(tmp_path / "run", tmp_path / "model")
    model = load(family, "auto", to)
    tensors = tensors_of(to)
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    # As many numbers as the model has: nothing twice.
    assert sum(value.numel() for value in tensors.values()) == sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        outputs = model(**arguments_of(family, "auto", inputs)).logits
    torch.testing.assert_close(outputs, exact(config, inputs), rtol=1e-5, atol=1e-6)


def greedy(engine, prompt, tokens):
    """Return the generated sequence, and the outputs by which each new token was chosen."""
    sequence, outputs = list(prompt), []
    for index in range(tokens):
        outputs.append(engine.exact_forward(torch.tensor([sequence]), MessageTag(index, "generation"))[:, -1])
        sequence.append(int(outputs[-1].argmax()))
    return sequence, torch.cat(outputs)


@pytest.mark.parametrize("middle", [1.0, "1/N"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_greedy_generation(family, middle, tmp_path):
    config = config_of(family, step={"middle": middle}, sequence_length=24, model={"tie_embeddings": False})
    run, (engine,) = trained(config, tmp_path / "run")
    for parameter in engine.block.parameters.values():  # so that it matters what came before
        parameter.data *= 8 if parameter.ndim > 1 else 1
    save([engine], run, 2)
    model = load(family, "auto", export(run.path, tmp_path / "model"), scaled=middle != 1.0)
    assert model.generation_config.use_cache is not False
    assert model.generation_config.eos_token_id is None
    options = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for prompt in ([3, 1, 4, 1], [5, 9, 2]):
        wanted, outputs = greedy(engine, prompt, 16)
        assert len(set(wanted[len(prompt) :])) > 1
        for cache in (True, False):
            found = model.generate(torch.tensor([prompt]), use_cache=cache, **options)
            assert found.sequences[0].tolist() == wanted
            torch.testing.assert_close(torch.cat(found.logits).double(), outputs, rtol=1e-6, atol=1e-6)
            assert (found.past_key_values is not None) == cache


@pytest.mark.parametrize("middle", [1.0, "1/N"])
def test_translation_generates(middle, tmp_path):
    config = config_of("mt", step={"middle": middle})
    trained(config, tmp_path / "run")
    model = load("mt", "auto", export(tmp_path / "run", tmp_path / "model"), scaled=middle != 1.0)
    (sources, _), _ = RandomBatches("mt", "auto").batch("validation", 0, 3)
    options = {"input_ids": sources, "attention_mask": sources != PAD, "do_sample": False}
    found = [model.generate(**options, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*found)
    assert found[0].shape[1] <= config.sequence_length
    assert set(found[0][:, 0].tolist()) == {21}
    assert model.generate(**options, num_beams=3).shape[0] == 3


def test_a_scaled_model_is_saved_as_one_and_captures_scaled_states(tmp_path):
    config = config_of("gpt2", step={"middle": "1/N"})
    run, (engine,) = trained(config, tmp_path / "run")
    export(run.path, tmp_path / "model")
    model = load("gpt2", "auto", tmp_path / "model", scaled=True)
    model.save_pretrained(tmp_path / "again")
    again = load("gpt2", "auto", tmp_path / "again", scaled=True)
    tokens = torch.arange(8)[None]
    outputs = model(tokens, output_hidden_states=True)
    assert torch.equal(outputs.logits, again(tokens).logits)
    bound = engine.block.bind_for_evaluation(tokens)
    state = bound.enter(tokens)
    torch.testing.assert_close(outputs.hidden_states[1], bound.layer(0, outputs.hidden_states[0]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(outputs.hidden_states[1], state, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(outputs.hidden_states[2], bound.layer(1, state), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")


# What is imported ---------------------------------------------------------------------------------------------------------------


def imported(config, folder, channel=None):
    steps = {"step": {"middle": config.step.middle}, "buffers": {"open": 1, "close": 1}}
    options = {**steps, "model": {"from_pretrained": str(folder), "tie_embeddings": config.model.tie_embeddings}}
    return make(config_of(config.model.family, config.model.head, workers=config.workers, **options), channel or LocalChannel.alone())


@pytest.mark.parametrize("middle", [1.0, "1/N"])
@pytest.mark.parametrize(("family", "head"), CASES)
def test_round_trip_bit_for_bit(family, head, middle, tmp_path):
    config = config_of(family, head, step={"middle": middle})
    trained(config, tmp_path / "run")
    first = export(tmp_path / "run", tmp_path / "first")
    run = RunDirectory.create(tmp_path / "again", config)
    save([imported(config, first)], run, 0)
    # Without model.json the configuration comes from the data, and these have none that load_data knows.
    shutil.copy(tmp_path / "run" / "model.json", run.path)
    second = export(run.path, tmp_path / "second")
    assert_equal(tensors_of(first), tensors_of(second))
    assert (first / "config.json").read_text() == (second / "config.json").read_text()
    load(family, head, first, scaled=middle != 1.0).save_pretrained(tmp_path / "theirs")
    assert_equal(weights_of([imported(config, tmp_path / "theirs")]), weights_of([imported(config, first)]))


def weights_of(engines):
    return {name: parameter.detach().clone() for engine in engines for name, parameter in engine.block.parameters.items()}


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "mt"])
def test_training_goes_on_as_if_never_exported(family, tie, tmp_path):
    config = config_of(family, workers=2, step={"middle": "1/N"}, model={"tie_embeddings": tie})
    _, engines = trained(config, tmp_path / "run")
    folder = export(tmp_path / "run", tmp_path / "model")
    trained_to = [weights_of([engine]) for engine in engines]

    def work(channel, came_back):
        engine = imported(config, folder, channel) if came_back else make(config, channel)
        if not came_back:
            for name, parameter in engine.block.parameters.items():
                parameter.data.copy_(trained_to[channel.rank][name])
        losses = [engine.train_step(step, ONE_ITERATION).loss for step in range(3)]
        return losses, weights_of([engine])

    there_and_back = run_workers(2, lambda channel: work(channel, True))
    stayed = run_workers(2, lambda channel: work(channel, False))
    for (losses, found), (wanted_losses, wanted) in zip(there_and_back, stayed, strict=True):
        assert losses == wanted_losses
        assert_equal(found, wanted)


def test_shards_are_written_and_read(tmp_path, monkeypatch):
    config = config_of("llama", workers=3)
    trained(config, tmp_path / "run")
    whole = export(tmp_path / "run", tmp_path / "whole")
    monkeypatch.setattr(export_module, "SHARD_BYTES", 20_000)
    cut = export(tmp_path / "run", tmp_path / "cut")
    files = sorted(path.name for path in cut.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(sum(t.nbytes for t in load_file(cut / file).values()) <= 20_000 for file in files)
    assert_equal(tensors_of(whole), tensors_of(cut))
    model, plain = load("llama", "auto", cut), load("llama", "auto", whole)
    assert_equal(model.state_dict(), plain.state_dict())
    assert_equal(weights_of([imported(config, cut)]), weights_of([imported(config, whole)]))


def test_a_worker_reads_its_own_tensors_alone(tmp_path, monkeypatch):
    trained(config_of("gpt2"), tmp_path / "run")
    folder = export(tmp_path / "run", tmp_path / "model")
    read, really_read = [], weights._read
    monkeypatch.setattr(weights, "_read", lambda path, keys: read.extend(keys) or really_read(path, keys))
    imported(config_of("gpt2", workers=3), folder, LocalChannel.group(3)[1])
    assert {name.split(".")[2] for name in read} == {"3", "4"}


def test_a_new_head_on_an_old_base(tmp_path):
    trained(config_of("bert"), tmp_path / "run")
    folder = export(tmp_path / "run", tmp_path / "model")
    engine = make(config_of("bert", "sentences", model={"from_pretrained": str(folder)}), LocalChannel.alone())
    fresh = make(config_of("bert", "sentences"), LocalChannel.alone())
    stored = tensors_of(folder)
    for name, parameter in engine.block.parameters.items():
        assert torch.equal(parameter, stored[name] if name in stored else fresh.block.parameters[name]), name
    assert not any(name.startswith("classifier") for name in stored)


def test_a_base_model_saved_by_transformers_without_prefix(tmp_path):
    config = config_of("gpt2")
    trained(config, tmp_path / "run")
    folder = export(tmp_path / "run", tmp_path / "model")
    transformers.AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "base")
    assert "wte.weight" in tensors_of(tmp_path / "base")
    assert_equal(weights_of([imported(config, tmp_path / "base")]), weights_of([imported(config, folder)]))


# Tokenizers and model.json ------------------------------------------------------------------------------------------------------

TEXT = "the cat sat on the mat. a dog ate the hat, and that was that!\n" * 60


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def run_on_text(path, text, tokenizer, **changes):
    config = tiny(data={"path": str(text), "tokenizer": tokenizer}, **changes)
    engine = make_engine(config)
    run = RunDirectory.create(path, config)
    save([engine], run, 0)
    return run, engine


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_trained_tokenizer_comes_along(family, text, tmp_path):
    run, engine = run_on_text(tmp_path / "run", text, "bpe:280", model={"family": family})
    tokenizer = transformers.AutoTokenizer.from_pretrained(export(run.path, tmp_path / "model"))
    words = "the cat ate."
    special = engine.batches.special if family == "bert" else engine.batches.tokenizer
    ids = special.encode(words).tolist()
    assert tokenizer(words, add_special_tokens=False)["input_ids"] == ids
    assert tokenizer.decode(ids) == words
    if family == "bert":
        assert tokenizer(words)["input_ids"] == [special.cls, *ids, special.sep]
        assert tokenizer(words, "that")["input_ids"] == [special.cls, *ids, special.sep, *special.encode("that"), special.sep]
        assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (special.pad, special.mask)
        assert len(tokenizer) == special.vocabulary
    # The text gone: what the run directory kept serves.
    write_model_json(run.path, engine.block.architecture.transformers_config())
    text.unlink()
    with pytest.warns(UserWarning, match=r"without a tokenizer: data.path .*no such file"):
        assert not (export(run.path, tmp_path / "bare") / TOKENIZER_JSON).exists()
    write_tokenizer_json(run.path, engine.batches)
    kept = transformers.AutoTokenizer.from_pretrained(export(run.path, tmp_path / "kept"))
    assert kept(words)["input_ids"] == tokenizer(words)["input_ids"]


def word_tokenizer(first):
    words = {word: n for n, word in enumerate([*first, *sorted(set(TEXT.split()))])}
    fast = Tokenizer(models.WordLevel(words, unk_token=first[0]))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast, [words["cat"], words["sat"]]


def test_tokenizers_of_files_and_of_transformers(text, tmp_path):
    fast, ids = word_tokenizer(["<end>"])
    fast.save(str(tmp_path / "words.json"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>").save_pretrained(tmp_path / "folder")
    for name, ends in (("words.json", None), ("folder", 0)):
        run, _ = run_on_text(tmp_path / f"run_{name}", text, str(tmp_path / name))
        folder = export(run.path, tmp_path / f"model_{name}")
        assert transformers.AutoTokenizer.from_pretrained(folder)("cat sat")["input_ids"] == ids
        assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == ends


def test_a_tokenizer_with_special_tokens_of_its_own_keeps_their_ids(text, tmp_path):
    fast, ids = word_tokenizer(["[MASK]", "[SEP]", "[PAD]", "[CLS]"])
    fast.save(str(tmp_path / "words.json"))
    run, _ = run_on_text(tmp_path / "run", text, str(tmp_path / "words.json"), model={"family": "bert"})
    tokenizer = transformers.AutoTokenizer.from_pretrained(export(run.path, tmp_path / "model"))
    assert tokenizer("cat sat")["input_ids"] == [3, *ids, 1]
    assert (tokenizer.pad_token, tokenizer.mask_token_id) == ("[PAD]", 0)


def test_unigram_pieces_move_behind_the_special_tokens(text, tmp_path):
    pieces = ["?", "the", "cat", *sorted(set(TEXT))]
    fast = Tokenizer(models.Unigram([(piece, -1.0 * len(piece)) for piece in pieces], unk_id=0))
    fast.add_tokens(["hat"])
    fast.save(str(tmp_path / "pieces.json"))
    run, engine = run_on_text(tmp_path / "run", text, str(tmp_path / "pieces.json"), model={"family": "bert"})
    tokenizer = transformers.AutoTokenizer.from_pretrained(export(run.path, tmp_path / "model"))
    special = engine.batches.special
    for words in ("the cat", "a hat", "\u03c1"):
        assert tokenizer(words)["input_ids"] == [special.cls, *special.encode(words), special.sep]


def test_bytes_and_characters_have_no_tokenizer_files(text, tmp_path):
    for name in ("bytes", "characters"):
        run, _ = run_on_text(tmp_path / f"run_{name}", text, name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            folder = export(run.path, tmp_path / f"model_{name}")
        written = {"config.json", "generation_config.json", "model.safetensors", "modeling_rayllp.py"}
        assert {path.name for path in folder.iterdir()} == written


def test_model_json_as_plain_transformers_configuration_or_none(text, tmp_path):
    run, engine = run_on_text(tmp_path / "run", text, "bytes", step={"middle": 1.0})
    made = export(run.path, tmp_path / "made")
    (run.path / "model.json").write_text(engine.block.architecture.config.to_json_string(use_diff=False))
    text.unlink()
    kept = export(run.path, tmp_path / "kept")
    assert (made / "config.json").read_text() == (kept / "config.json").read_text()
    assert json.loads((made / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    (run.path / "model.json").unlink()
    with pytest.raises(DataError, match="no such file"):
        export(run.path, tmp_path / "none")
    (run.path / "model.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"model.json cannot be read .* made anew from the run's data"):
        export(run.path, tmp_path / "none")


def test_the_command_line(tmp_path):
    run, (engine,) = trained(config_of("gpt2"), tmp_path / "run")
    first = weights_of([engine])
    engine.train_step(1, SERIAL)
    save([engine], run, 2)
    for step, options in ((1, ["--step", "1"]), (2, [])):
        done = CliRunner().invoke(app, ["export", str(run.path), "--to", str(tmp_path / f"model_{step}"), *options])
        assert done.exit_code == 0, done.output
        assert f"transformers.GPT2LMHeadModel.from_pretrained('{tmp_path}/model_{step}')" in done.output.replace("\n", "")
    assert_equal(tensors_of(tmp_path / "model_1"), first)
    assert_equal(tensors_of(tmp_path / "model_2"), weights_of([engine]))


# Refusals -----------------------------------------------------------------------------------------------------------------------


def test_export_refuses(tmp_path):
    config = config_of("gpt2")
    run, _ = trained(config, tmp_path / "run")
    empty = RunDirectory.create(tmp_path / "empty", config)
    file, full = tmp_path / "file", tmp_path / "full"
    file.write_text("")
    full.mkdir()
    (full / "note").write_text("mine")
    for source, to, step, error, message in (
        (tmp_path / "nowhere", "a", None, CheckpointError, "not a run directory"),
        (empty.path, "a", None, CheckpointError, "no complete checkpoint to export"),
        (run.path, "a", 7, CheckpointError, "no checkpoint of step 7: give --step one of 1"),
        (run.path, "full", None, SettingsError, "full is not empty"),
        (run.path, "file", None, SettingsError, "file is a file"),
        (run.path, "file/a", None, SettingsError, r"file/a cannot be written \(.*give --to another folder"),
    ):
        with pytest.raises(error, match=message):
            export(source, tmp_path / to, step)
    assert [path.name for path in full.iterdir()] == ["note"]
    assert not (tmp_path / "a").exists()
    (tmp_path / "there").mkdir()
    export(run.path, tmp_path / "there")
    assert not list(tmp_path.glob(".*.partial"))


def test_export_refuses_damaged_and_strange_checkpoints(tmp_path):
    run, _ = trained(config_of("gpt2"), tmp_path / "run")
    other = RunDirectory.create(tmp_path / "other", config_of("gpt2", model={"width": 32}))
    other_network = build_architecture(config_of("gpt2", model={"width": 32}), RandomBatches("gpt2", "auto").facts)
    write_model_json(other.path, other_network.transformers_config())
    shutil.copytree(run.checkpoints, other.checkpoints)
    with pytest.raises(CheckpointError, match=r"another model .*wte.weight is \(23, 16\), GPT2LMHeadModel has \(23, 32\)"):
        export(other.path, tmp_path / "model")
    piece = checkpoints(run.checkpoints)[-1] / "layer_00003.safetensors"
    piece.write_bytes(piece.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"layer_00003.*altered"):
        export(run.path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_export_refuses_a_layer_stack(tmp_path):
    config = tiny(model={"layers": 6, "width": 4, "heads": 1}, mgrit={"coarsening": 2}, buffers={"open": 1, "close": 1})
    stack = LayerStack(
        embed=torch.nn.Linear(4, 4), layers=[torch.nn.Linear(4, 4) for _ in range(6)], head=torch.nn.Linear(4, 1),
        loss=lambda outputs, targets: (outputs - targets).square().sum(),
    )  # fmt: skip
    engine = Engine(stack, config, None, LocalChannel.alone(), LocalChannel.alone(), torch.device("cpu"))
    run = RunDirectory.create(tmp_path / "run", config)
    write_model_json(run.path, stack.transformers_config())
    assert not (run.path / "model.json").exists()
    save([engine], run, 0)
    with pytest.raises(CheckpointError, match="of a LayerStack, whose modules only your own program can build"):
        export(run.path, tmp_path / "model")


def test_import_refuses(tmp_path):
    trained(config_of("gpt2"), tmp_path / "run")
    folder = export(tmp_path / "run", tmp_path / "model")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"\x80")
    shutil.copy(folder / "config.json", pickled)
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (damaged / "model.safetensors").write_bytes(b"no safetensors")
    for family, source, changes, message in (
        ("gpt2", tmp_path / "nowhere", {}, r"no config.json there that could be read"),
        ("gpt2", pickled, {}, "pickled weights are not read; save the model with save_pretrained"),
        ("gpt2", damaged, {}, "its safetensors cannot be read"),
        ("gpt2", folder, {"width": 32}, "the checkpoint has width 16, but model.width is 32"),
    ):
        with pytest.raises(CheckpointError, match=message):
            make(config_of(family, model={"from_pretrained": str(source), **changes}), LocalChannel.alone())


@pytest.mark.parametrize(("layers", "sources"), [(5, (0, 2, 4, 5, 7)), (14, (0, *[n for n in range(1, 7) for _ in "ab"], 7))])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_layers_are_taken_out_of_a_checkpoint_or_become_several(family, layers, sources, tmp_path, monkeypatch):
    trained(config_of(family), tmp_path / "run")  # 1 + 6 + 1 layers
    folder = export(tmp_path / "run", tmp_path / "model")
    there = tensors_of(folder)
    changes = {"from_pretrained": str(folder), "layers": layers}
    buffers = {"open": 1, "close": 1}
    assert make_config({"model": changes, "buffers": buffers}).middle_step == (0.5 if layers == 14 else 1.0)
    config = config_of(family, workers=2, model=changes, mode="serial")
    alone = config_of(family, model=changes, mode="serial")
    read_text, read = Path.read_text, []
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", lambda path, *args, **options: read.append(path.name) or read_text(path, *args, **options))
        make(alone, LocalChannel.alone())
    assert read.count("config.json") == 1
    run, _ = trained(config, tmp_path / "deeper", steps=0)
    found = tensors_of(export(run.path, tmp_path / "exported"))
    layer = "transformer.h" if family == "gpt2" else "model.layers"
    for name, value in found.items():
        if name.startswith(layer):
            number, _, rest = name.removeprefix(layer + ".").partition(".")
            name = f"{layer}.{sources[int(number)]}.{rest}"
        assert torch.equal(value, there[name]), name
    assert len({name.split(".")[2] for name in found if name.startswith(layer)}) == layers


def test_layers_that_a_checkpoints_do_not_make_are_refused(tmp_path):
    trained(config_of("gpt2"), tmp_path / "run")
    folder = str(export(tmp_path / "run", tmp_path / "model"))
    with pytest.raises(SettingsError, match=r"model.layers=9 .*6 of which .* set model.layers to 8 or fewer, or to 14, 20, 26"):
        make(config_of("gpt2", model={"from_pretrained": folder, "layers": 9}), LocalChannel.alone())
    trained(config_of("mt"), tmp_path / "pairs")
    folder = str(export(tmp_path / "pairs", tmp_path / "translates"))
    with pytest.raises(SettingsError, match=r"an encoder–decoder keeps all its layers; leave model.layers out"):
        make(config_of("mt", model={"from_pretrained": folder, "layers": 6, "encoder_layers": 3}), LocalChannel.alone())


def test_a_checkpoint_of_another_kind_of_model_is_refused(tmp_path):
    trained(config_of("gpt2"), tmp_path / "run")
    folder = export(tmp_path / "run", tmp_path / "model")
    with pytest.raises(SettingsError, match=r"is a gpt2, and model.family llama is a llama: leave that out"):
        make(config_of("llama", model={"from_pretrained": str(folder)}), LocalChannel.alone())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}), ("llama", {"rms_norm_eps": 0.1}),
        ("llama", {"tie_word_embeddings": False}), ("gpt2", {"activation_function": "relu"}), ("bert", {"layer_norm_eps": 0.1}),
    ],
)  # fmt: skip
def test_what_a_checkpoints_configuration_says_beyond_sizes_is_kept(family, changes, tmp_path):
    config = config_of(family)
    plan = build_architecture(config, RandomBatches(family, "auto").facts)
    values = {**plan.config.to_dict(), **changes}
    torch.manual_seed(0)
    theirs = plan.model_class(type(plan.config).from_dict(values)).double().eval()
    theirs.save_pretrained(tmp_path / "pre")
    engine = make(config_of(family, model={"from_pretrained": str(tmp_path / "pre")}), LocalChannel.alone())
    inputs = engine.step_batch(0, split="validation").inputs
    mask = {"attention_mask": inputs != engine.block.architecture.facts.pad} if family == "bert" else {}
    torch.testing.assert_close(engine.exact_forward(inputs, MessageTag(0, "test")), theirs(inputs, **mask).logits, rtol=1e-9, atol=1e-9)


def test_a_run_goes_on_without_the_checkpoint_it_started_from(tmp_path):
    trained(config_of("llama"), tmp_path / "run")
    folder = export(tmp_path / "run", tmp_path / "model")
    config = config_of("llama", model={"from_pretrained": str(folder)})
    plan = build_architecture(config, RandomBatches("llama", "auto").facts)
    write_model_json(tmp_path, plan.transformers_config())
    shutil.rmtree(folder)
    again = build_architecture(load_config_again(config, tmp_path), plan.facts, read_model_json(tmp_path))
    assert again.config.to_dict() == plan.config.to_dict()


def test_a_run_that_goes_on_has_the_dropout_of_its_settings():
    facts = RandomBatches("gpt2", "auto").facts
    kept = build_architecture(config_of("gpt2", model={"dropout": 0.1}), facts).transformers_config()
    again = build_architecture(config_of("gpt2", model={"dropout": 0.0}), facts, kept)
    assert again.config.resid_pdrop == again.config.attn_pdrop == 0
    assert not again.stochastic


def test_entries_of_each_layer_go_where_their_number_changes():
    config = {"n_layer": 2, "layer_types": ["a", "b"], "width": 3}
    assert with_layers(config, 4) == {"n_layer": 4, "width": 3}
    assert with_layers(config, 2) == config


def load_config_again(config, folder):
    (folder / "config.yaml").write_text(to_yaml(config))
    return load_config(folder / "config.yaml")


def test_shorter_sequences_may_be_tuned_and_longer_ones_are_refused(tmp_path):
    trained(config_of("bert"), tmp_path / "run")
    folder = export(tmp_path / "run", tmp_path / "model")
    make(config_of("bert", model={"from_pretrained": str(folder)}, sequence_length=6), LocalChannel.alone())
    with pytest.raises(SettingsError, match="sequence_length 11 is more than the 10 positions of the checkpoint"):
        make(config_of("bert", model={"from_pretrained": str(folder)}, sequence_length=11), LocalChannel.alone())


def test_scaled_model_refuses(tmp_path):
    trained(config_of("gpt2"), tmp_path / "run")
    plain = export(tmp_path / "run", tmp_path / "plain")
    with pytest.raises(CheckpointError, match="plain transformers model of type gpt2, without step sizes"):
        load_scaled(plain)
    (plain / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json that can be read"):
        load_scaled(plain)
    with pytest.raises(CheckpointError, match="neither a folder"):
        load_scaled(tmp_path / "nowhere")
    trained(config_of("gpt2", step={"middle": 0.5}), tmp_path / "half")
    scaled = export(tmp_path / "half", tmp_path / "scaled")
    values = json.loads((scaled / "config.json").read_text())
    for change, message in (
        ({"step_sizes": [0.5]}, "1 step_sizes for 8 layers"),
        ({"transformers_config": {"architectures": ["OPTForCausalLM"]}}, "OPTForCausalLM has no attribute `transformer`"),
        ({"transformers_config": {"architectures": ["NoSuchModel"]}}, "has no NoSuchModel"),
    ):
        (scaled / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(CheckpointError, match=message):
            load_scaled(scaled)


def test_nothing_pretrained_has_nothing():
    architecture = build_architecture(config_of("gpt2"), RandomBatches("gpt2", "auto").facts)
    nothing = PretrainedWeights.open(None, architecture.model)
    assert not nothing.has("transformer.h.0")
    assert nothing.place("transformer.h.0.ln_1.weight") is None


@pytest.mark.parametrize("url", [False, True])
def test_a_copy_that_somebody_made_beside_checkpoints_is_none(tmp_path, url):
    root = locate(f"memory://{tmp_path.name}") if url else tmp_path
    for step in (3, 6):
        commit(staging(root, step), step, {}, {}, keep=9)
    for name in ("step_6_good", "step_6_1", "step_old"):  # int("6_1") is 61
        (root / name).mkdir()
        (root / name / "manifest.json").write_text("{}")
    (root / "step_notes").mkdir()
    (root / "step_notes" / "text").write_text("mine")
    commit(staging(root, 9), 9, {}, {}, keep=1)
    assert [path.name for path in checkpoints(root)] == ["step_9"]
    assert (root / "step_6_good" / "manifest.json").is_file()
    assert (root / "step_notes" / "text").is_file()


def test_a_damaged_manifest_does_not_hide_whose_checkpoints_they_are(tmp_path):
    config = tiny(checkpoint={"path": str(tmp_path)})
    commit(staging(tmp_path, 3), 3, {}, {"config": config.model_dump(mode="json")}, keep=9)
    commit(staging(tmp_path, 6), 6, {}, {}, keep=9)
    (tmp_path / "step_6" / "manifest.json").write_text('{"format": 2, "st')
    # Who reads them takes the one that is whole.
    assert [path.name for path in prepare._find_own(str(tmp_path), config)] == ["step_3", "step_6"]
    with pytest.raises(SettingsError, match="checkpoints of a run with other seed"):
        prepare._find_own(str(tmp_path), tiny(seed=1, checkpoint={"path": str(tmp_path)}))
