"""Compares every family with transformers' own model: outputs, loss and gradients, on 1 to 3 workers, dropout included."""

import pytest
import torch

from rayllp.channel import LocalChannel, run_workers
from rayllp.control import Accuracy
from rayllp.data import IGNORE, Batches, DatasetFacts
from rayllp.engine import Engine
from rayllp.engine.pipeline import Pipeline
from rayllp.engine.reduce_gradients import add_shared_gradients
from rayllp.errors import SettingsError
from rayllp.models import build_architecture, families
from rayllp.models.randomness import FrozenRandomness
from tests.conftest import merge, run_processes, tiny

VOCABULARY, CLASSES, PAD = 23, ("a", "b", "c"), 20
CASES = [(family, "auto") for family in families()] + [("bert", "sentences")]
ENOUGH = Accuracy(serial=False, levels_forward=2, levels_backward=2, iterations_forward=3, iterations_backward=3)
SERIAL = Accuracy(serial=True, levels_forward=1, levels_backward=1, iterations_forward=1, iterations_backward=1)


class RandomBatches(Batches):
    """Random inputs and targets in a family's form, with padding if the family has it."""

    def __init__(self, family, head, length=10):
        self.family, self.head, self.length = family, head, length

    @property
    def facts(self):
        padded = self.head == "sentences" or self.family in ("bert", "mc", "mt")
        return DatasetFacts(
            vocabulary=VOCABULARY, classes=CLASSES, pad=PAD if padded else None, bos=21, eos=22, image=(2, 8, 12)
        )  # fmt: skip

    def tokens(self, generator, size, padded):
        tokens = torch.randint(0, PAD, (size, self.length), generator=generator)
        lengths = torch.randint(3, self.length + 1, (size, 1), generator=generator)
        return torch.where(torch.arange(self.length) < lengths, tokens, PAD) if padded else tokens

    def batch(self, split, step, size):
        g = torch.Generator().manual_seed(step)
        if self.family == "vit":
            return torch.randn(size, 2, 8, 12, generator=g), torch.randint(0, 3, (size,), generator=g)
        inputs = self.tokens(g, size, self.facts.pad is not None)
        if self.head == "sentences":
            return inputs, torch.randint(0, 3, (size,), generator=g)
        highest = 3 if self.family == "mc" else PAD
        targets = torch.randint(0, highest, (size, self.length), generator=g)
        if self.family == "mt":
            target_in = self.tokens(g, size, True)
            return (inputs, target_in), targets.masked_fill(target_in == PAD, IGNORE)
        return inputs, targets.masked_fill(inputs == PAD, IGNORE)


def config_of(family, head="auto", **changes):
    base = {
        "model": {"family": family, "head": head, "layers": 8, "width": 16, "heads": 4, "kv_heads": 2, "feed_forward": 24},
        "buffers": {"open": 1, "close": 1}, "step": {"middle": 1.0}, "sequence_length": 10,
        "mgrit": {} if changes.get("solver") == "windows" else {"coarsening": 2},
    }  # fmt: skip
    return tiny(**merge(base, changes))


def make(config, layer_channel):
    data = RandomBatches(config.model.family, config.model.head)
    architecture = build_architecture(config, data.facts)
    return Engine(architecture, config, data, layer_channel, LocalChannel.alone(), torch.device("cpu"))


def ours(config, accuracy):
    """Return outputs, loss and gradients of our model, merged over the layer group's threads."""

    def work(channel):
        engine = make(config, channel)
        outputs = []
        batch, architecture = engine.step_batch(5, accuracy), engine.block.architecture
        leave = architecture.leave
        architecture.leave = lambda *given: outputs.append(leave(*given)) or outputs[-1]
        formed = engine.gradients(batch)
        add_shared_gradients(engine.block, engine.layer_channel, 5)
        parameters = engine.block.parameters
        return (
            {name: p.grad for name, p in parameters.items()},
            {name: p.detach() for name, p in parameters.items()},
            outputs[0].detach() if outputs else None,
            formed.loss,
        )

    merged = {}, {}
    everyone = run_workers(config.layer_workers, work)
    for gradients, weights, *_ in everyone:
        merged[0].update(gradients)
        merged[1].update(weights)
    return *merged, *everyone[-1][2:]  # outputs and loss are on the last worker


class PieceByPiece(FrozenRandomness):
    """Keys the dropout of a whole transformers model as if its pieces were run separately."""

    def __init__(self, model, architecture, seed, step, samples):
        super().__init__((), samples)
        self.masks = {
            piece: FrozenRandomness((seed, step, piece), samples) for piece in (*range(architecture.layers), "embed", "head")
        }  # fmt: skip
        self.piece = "embed"
        for n in range(architecture.layers):
            layer = model.get_submodule(architecture.paths[n])
            layer.register_forward_pre_hook(lambda *_, n=n: self.go(n))
            layer.register_forward_hook(lambda *_, n=n: self.go("head" if n == architecture.layers - 1 else "embed"))

    def go(self, piece):
        self.piece = piece

    def generator(self, device, place):
        return self.masks[self.piece].generator(device, place)


def theirs(config, weights):
    """Return outputs, loss and gradients of transformers' own model with these weights."""
    data = RandomBatches(config.model.family, config.model.head)
    architecture = build_architecture(config, data.facts)
    model = architecture.model_class(architecture.config).double().train()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    known = {name for group in architecture.aliases for name in group} | {"final_logits_bias"}
    assert set(missing) <= known
    model.tie_weights()
    inputs, targets = data.batch("train", 5, config.batch_size)
    arguments = {"pixel_values": inputs.double()} if config.model.family == "vit" else {"input_ids": inputs}
    if config.model.family == "mt":
        arguments = {"input_ids": inputs[0], "decoder_input_ids": inputs[1], "attention_mask": inputs[0] != PAD}
    elif data.facts.pad is not None:
        arguments["attention_mask"] = inputs != PAD
    with PieceByPiece(model, architecture, config.seed, 5, tuple(range(config.batch_size))):
        outputs = model(**arguments).logits
    loss = architecture.training_loss(outputs, targets) / architecture.count(targets)
    loss.backward()
    return model, outputs.detach(), loss.detach()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("family", "head"), CASES)
def test_enough_iterations_equal_transformers(family, head, dropout):
    options = {"model": {"dropout": dropout, "label_smoothing": 0.1 if family == "mt" else 0.0}}
    weights = None
    for workers in (1, 2, 3):
        config = config_of(family, head, workers=workers, **options)
        gradients, weights, outputs, loss = ours(config, ENOUGH)
        model, wanted_outputs, wanted_loss = theirs(config, weights)
        torch.testing.assert_close(outputs, wanted_outputs, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(loss, wanted_loss, rtol=1e-9, atol=1e-9)
        wanted = {name: p.grad for name, p in model.named_parameters(remove_duplicate=False)}
        assert len(gradients) > 8 * 8
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("family", "head"), CASES)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_answer_does_not_depend_on_the_workers(family, head, recompute):
    few = Accuracy(serial=False, levels_forward=2, levels_backward=2, iterations_forward=2, iterations_backward=1)
    options = {"step": {"middle": "1/N"}, "model": {"dropout": 0.1}}
    wanted, _, _, wanted_loss = ours(config_of(family, head, **options), few)
    for workers in (2, 3):
        got, _, _, loss = ours(config_of(family, head, workers=workers, recompute=recompute, **options), few)
        torch.testing.assert_close(loss, wanted_loss, rtol=1e-10, atol=1e-12)
        for name, gradient in wanted.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12)


def steps_over_gloo(rank, size, config, accuracy, steps):
    from rayllp.channel.torch_dist import TorchChannel

    engine = make(config, TorchChannel(timeout_s=60))
    losses = [engine.train_step(step, accuracy).loss for step in range(steps)]
    return losses, engine.evaluate(2), isinstance(engine.gradients.exact, Pipeline)


@pytest.mark.parametrize("family", ["mt", "mc"])
def test_serial_mode_pipelines_states_of_two_tensors_and_masks(family):
    """1F1B over Gloo: masks are made for each microbatch, and common parameters are updated alike on all workers."""
    options = {"mode": "serial", "model": {"dropout": 0.1}}
    ((one, evaluated, _),) = run_processes(1, steps_over_gloo, config_of(family, **options), SERIAL, 4)
    for workers in (2, 3):
        outcome = run_processes(workers, steps_over_gloo, config_of(family, workers=workers, **options), SERIAL, 4)
        for losses, evaluation, piped in outcome:
            assert piped
            assert losses == pytest.approx(one, abs=1e-10)
            assert evaluation == pytest.approx(evaluated, abs=1e-10)


def test_metrics_are_those_of_the_family():
    names = {"gpt2": "perplexity", "llama": "perplexity", "bert": "masked_accuracy", "mc": "word_accuracy", "vit": "accuracy"}
    for family, name in names.items():
        evaluated = make(config_of(family), LocalChannel.alone()).evaluate(2)
        assert set(evaluated) == {"loss", name}
    assert set(make(config_of("bert", "sentences"), LocalChannel.alone()).evaluate(2)) == {"loss", "accuracy", "f1", "matthews"}


def test_unknown_families_and_heads_are_refused():
    with pytest.raises(SettingsError, match=r"'gpt9' is not known: choose from gpt2, llama.*model.architecture"):
        build_architecture(config_of("gpt9"), RandomBatches("bert", "auto").facts)
    with pytest.raises(SettingsError, match=r"head=sentences goes with model.family bert"):
        build_architecture(config_of("gpt2", "sentences"), RandomBatches("bert", "auto").facts)


def test_images_that_do_not_divide_into_patches():
    with pytest.raises(SettingsError, match="8 × 12 pixels do not divide into patches of 5"):
        build_architecture(config_of("vit", model={"patch_size": 5}), RandomBatches("vit", "auto").facts)
