"""What all model families share: registering a family, initialisation, frozen randomness in any module, generation."""

import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rayllp.channel import LocalChannel, run_workers
from rayllp.channel.base import ChannelWrapper
from rayllp.data import Batches, DatasetFacts
from rayllp.engine import Engine
from rayllp.engine.generation import continue_text, remembers, translate
from rayllp.errors import CheckpointError
from rayllp.models import FAMILIES, Family, LayerStack, build_architecture, register
from rayllp.models.metrics import Confusion
from rayllp.state import tensors
from tests.conftest import tiny
from tests.test_engine import ENOUGH, SERIAL
from tests.test_families import PAD, RandomBatches, config_of, make, ours, theirs

QWEN2 = Family(
    "qwen2",
    residual_outputs=("self_attn.o_proj", "mlp.down_proj"),
    inner=("self_attn.v_proj", "mlp.up_proj"),
    fields={"rms_norm_eps": 0.01},
)
"""A family that rayllp does not know: Llama with biased projections."""


@pytest.mark.parametrize("named", ["registered", "by module"])
def test_a_family_added_from_outside_is_trained_like_the_others(named):
    register("qwen2", QWEN2)
    try:
        config = config_of("qwen2" if named == "registered" else f"{__name__}:QWEN2", workers=2)
        gradients, weights, outputs, loss = ours(config, ENOUGH)
        model, wanted_outputs, wanted_loss = theirs(config, weights)
    finally:
        del FAMILIES["qwen2"]
    assert "model.layers.3.self_attn.q_proj.bias" in gradients
    assert (model.config.max_position_embeddings, model.config.rms_norm_eps) == (10, 0.01)
    torch.testing.assert_close(outputs, wanted_outputs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-9, atol=1e-9)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-9)


# Initialisation -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "vit", "mt"])
def test_initialisations_scale_what_they_name(family):
    def layer(kind):
        config = config_of(family, model={"initialisation": kind})
        architecture = build_architecture(config, RandomBatches(family, "auto").facts)
        return architecture, architecture.build(2, 0)

    architecture, default = layer("default")
    for kind, factor, names in (
        ("deep", math.sqrt(math.log(16)), (*architecture.family.residual_outputs, *architecture.family.inner)),
        ("scaled", 1 / 4, architecture.family.residual_outputs),
    ):
        changed = layer(kind)[1]
        if (family, kind) == ("gpt2", "scaled"):  # transformers' own is that already
            factor = 1
        for name in names:
            torch.testing.assert_close(architecture.scaled_weight(changed, name), architecture.scaled_weight(default, name) * factor)
        same = [n for n, p in default.named_parameters() if torch.equal(p, changed.get_parameter(n))]
        assert len(same) >= 4


@pytest.mark.parametrize("initialisation", ["default", "deep", "scaled"])
def test_gradients_of_a_128_layer_bert_are_bounded_at_initialisation(initialisation):
    """Per layer, h = 1: the largest gradient norm of a layer is within two orders of magnitude of the smallest."""
    config = config_of("bert", model={"layers": 128, "width": 32, "initialisation": initialisation}, dtype="float32")
    gradients, *_ = ours(config, SERIAL)
    norms = torch.tensor(
        [math.sqrt(sum(g.square().sum().item() for name, g in gradients.items() if f".layer.{n}." in name)) for n in range(128)]
    )
    assert torch.isfinite(norms).all()
    assert norms.min() > 0
    assert norms.max() < 100 * norms.min()


# Randomness in a module that knows nothing of it ------------------------------------------------------------------------------------


class Wild(nn.Module):
    """Residual attention with dropout of every kind, drop-path drawn by torch.rand among them."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out, self.drop = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8), nn.Dropout(0.2)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        p = 0.2 if self.training else 0.0
        y = self.drop(self.out(nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=p)))
        if not self.training:
            return x + y
        keep = (torch.rand((x.shape[0], 1, 1), dtype=x.dtype) > 0.2).to(x.dtype)
        return x + y * keep / 0.8


class Vectors(Batches):
    def batch(self, split, step, size):
        g = torch.Generator().manual_seed(step)
        return torch.randn(size, 5, 8, generator=g, dtype=torch.float64), torch.randn(size, 5, 8, generator=g, dtype=torch.float64)


def test_every_kind_of_dropout_is_frozen_within_a_step_in_a_users_module():
    stack = LayerStack(
        embed=lambda: nn.Linear(8, 8), layers=[Wild] * 12, head=lambda: nn.Linear(8, 8), loss=lambda y, t: (y - t).square().sum()
    )

    def gradients(workers, accuracy, step=4):
        config = tiny(workers=workers, step={"middle": 0.5}, mgrit={"coarsening": 4})

        def work(channel):
            engine = Engine(stack, config, Vectors(), channel, LocalChannel.alone(), torch.device("cpu"))
            engine.gradients(engine.step_batch(step, accuracy))
            return {name: p.grad for name, p in engine.block.parameters.items()}

        return {name: grad for mine in run_workers(workers, work) for name, grad in mine.items()}

    wanted = gradients(1, SERIAL)
    other = gradients(1, SERIAL, step=5)
    assert not torch.allclose(wanted["layers.3.out.weight"], other["layers.3.out.weight"])
    for workers in (1, 2, 3):
        got = gradients(workers, ENOUGH)
        for name, gradient in wanted.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-12)


# Generation and evaluation ----------------------------------------------------------------------------------------------------------


class Held(ChannelWrapper):
    """Counts messages that a channel may still hold: those sent since it was last asked to finish."""

    now, most = 0, 0

    def send(self, state, destination, tag):
        super().send(state, destination, tag)
        self.now += 1
        self.most = max(self.most, self.now)

    def finish(self):
        super().finish()
        self.now = 0


@pytest.mark.parametrize("solver", ["mgrit", "windows"])
def test_evaluation_and_generation_hold_few_messages_however_long_they_go_on(solver):
    def work(channel):
        held = Held(channel)
        engine = make(config_of("gpt2", workers=3, solver=solver), held)
        engine.evaluate(5)
        evaluated, held.most = held.most, 0
        continue_text(engine.exact_forward, [1, 2, 3], 5)
        return evaluated, held.most, held.now

    evaluated, generated, left = zip(*run_workers(3, work), strict=True)
    assert 1 <= max(evaluated) <= 2
    assert 1 <= max(generated) <= 3  # a state, and a token for each of two workers
    assert not any(left)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sampled_text_does_not_depend_on_the_workers(family):
    def sample(workers):
        config = config_of(family, workers=workers)
        return run_workers(workers, lambda channel: continue_text(make(config, channel).exact_forward, [1, 2, 3], 12))

    (wanted,) = sample(1)
    assert len(wanted) == 12
    assert len(set(wanted)) > 3
    for workers in (2, 3):
        assert sample(workers) == [wanted] * workers


def count_tokens(engine):
    """Return a running count, by layer, of the positions that a worker's layers compute from now on."""
    counted = dict.fromkeys(engine.block.layers, 0)
    advance = engine.block.architecture.advance

    def counting(index, layer, state, context, common):
        counted[index] += tensors(state)[-1].shape[1]
        return advance(index, layer, state, context, common)

    engine.block.architecture.advance = counting
    return counted


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_each_token_goes_through_the_layers_once(family):
    """Beyond the context length every token changes its position, so all of them are computed again."""

    def sample(workers, forget):
        def work(channel):
            engine = make(config_of(family, workers=channel.size), channel)
            if forget:
                engine.block.architecture.past = lambda: None
            counted = count_tokens(engine)
            return continue_text(engine.exact_forward, [1, 2, 3], tokens), sorted(counted.values())

        return run_workers(workers, work)

    for tokens in (6, 12):  # with three more in the prompt; the context has ten
        ((text, all_of_them),) = sample(1, forget=True)
        ((found, once),) = sample(1, forget=False)
        assert found == text
        assert [found for found, _ in sample(3, forget=False)] == [text] * 3
        assert all_of_them[0] == sum(min(3 + n, 10) for n in range(tokens))
        assert once[0] == (3 + tokens - 1 if tokens == 6 else 10 + 10 * 4)


@pytest.mark.parametrize("length", [2, 3])
def test_contexts_of_a_few_tokens(length):
    config = config_of("gpt2", sequence_length=length)
    (found,) = run_workers(1, lambda channel: continue_text(make(config, channel).exact_forward, [1, 2, 3], 4))
    assert len(found) == 4


def test_layers_that_remember_otherwise_take_all_tokens_again():
    """If the layers of one worker cannot go on from cached keys and values, all workers compute whole sequences."""
    (wanted,) = run_workers(1, lambda channel: continue_text(make(config_of("llama"), channel).exact_forward, [1, 2, 3], 5))

    def work(channel):
        engine = make(config_of("llama", workers=2), channel)
        if channel.rank == 1:
            for layer in engine.block.layers.values():
                attend = layer.self_attn.forward
                layer.self_attn.forward = lambda *args, attend=attend, **kwargs: attend(*args, **{**kwargs, "cache": None})
        remembered = remembers(engine.block, lambda tokens: tokens, torch.tensor([[1, 2, 3, 4]]))
        return continue_text(engine.exact_forward, [1, 2, 3], 5), remembered

    assert run_workers(2, work) == [(wanted, True), (wanted, False)]


def test_beam_search_over_workers_is_that_of_transformers():
    sources = RandomBatches("mt", "auto").batch("train", 1, 4)[0][0]
    config = config_of("mt", model={"width": 32, "tie_embeddings": False})

    def work(channel):
        engine = make(config_of("mt", workers=channel.size, model={"width": 32, "tie_embeddings": False}), channel)
        for parameter in engine.block.parameters.values():
            parameter.data.mul_(3)  # outputs of a fresh network are too alike to tell beams apart
        return translate(engine.exact_forward, sources, 3), {name: p.detach() for name, p in engine.block.parameters.items()}

    ((wanted, weights),) = run_workers(1, work)
    for found, _ in run_workers(3, work):
        assert found == wanted
    architecture = build_architecture(config, RandomBatches("mt", "auto").facts)
    model = architecture.model_class(architecture.config).double().eval()
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    model.generation_config.forced_eos_token_id = None
    theirs_ = model.generate(
        sources, attention_mask=sources != PAD, num_beams=3, max_length=10, early_stopping=True, do_sample=False, use_cache=False,
        decoder_start_token_id=21,
    )  # fmt: skip
    assert [row[1:] for row in theirs_.tolist()] == wanted
    assert len({tuple(row) for row in wanted}) > 1


# Metrics ----------------------------------------------------------------------------------------------------------------------------


def test_figures_of_a_matrix_are_those_of_all_samples():
    from sklearn.metrics import f1_score, matthews_corrcoef

    g = torch.Generator().manual_seed(0)
    for classes in (2, 4):
        outputs, targets = torch.randn(200, classes, generator=g), torch.randint(0, classes, (200,), generator=g)
        outputs[range(100), targets[:100]] += 1
        metric = Confusion(classes)
        tally = metric.tally(outputs[:80], targets[:80]) + metric.tally(outputs[80:], targets[80:])
        found = metric.read(tally, 0.0)
        assert set(metric.read(0 * tally, 0.0).values()) == {0.0}
        alone = metric.read(metric.tally(torch.eye(classes)[[0, 0]], torch.zeros(2, dtype=torch.long)), 0.0)
        assert (alone["accuracy"], alone["matthews"]) == (1, 0)
        assert found["matthews"] == pytest.approx(matthews_corrcoef(targets, outputs.argmax(-1)))
        average = "binary" if classes == 2 else "macro"
        assert found["f1"] == pytest.approx(f1_score(targets, outputs.argmax(-1), average=average))
        assert found["accuracy"] == pytest.approx((outputs.argmax(-1) == targets).double().mean().item())


def test_a_table_that_is_filled_up_keeps_its_size(tmp_path):
    filled_up = LlamaConfig(
        vocab_size=128, hidden_size=8, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    saved = LlamaForCausalLM(filled_up)
    saved.save_pretrained(tmp_path)
    model = {"family": "llama", "from_pretrained": str(tmp_path), "layers": 4, "width": 8}
    config = tiny(model=model, buffers={"open": 0, "close": 0}, mgrit={"coarsening": 2})
    built = build_architecture(config, DatasetFacts(vocabulary=100))
    assert torch.equal(built.embed()["model.embed_tokens"].weight, saved.model.embed_tokens.weight)
    assert built.transformers_config()["vocab_size"] == 128
    again = build_architecture(config, DatasetFacts(vocabulary=100), built.transformers_config())  # a run that goes on
    assert again.transformers_config()["vocab_size"] == 128
    with pytest.raises(CheckpointError, match=r"has 60 tokens, and the embedding of model.from_pretrained 128 rows: .*set data.tokenizer"):
        build_architecture(config, DatasetFacts(vocabulary=60))
