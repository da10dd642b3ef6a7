"""Whatever a layer draws is a function of (seed, step, layer, sample); what cannot be is refused by name, before training."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from rayllp.channel import LocalChannel, run_workers
from rayllp.data import Batches
from rayllp.engine import Engine
from rayllp.errors import SettingsError
from rayllp.models import LayerStack
from rayllp.models import randomness as by_key
from rayllp.models.randomness import FrozenRandomness
from rayllp.training.prepare import validate
from tests.conftest import tiny
from tests.test_engine import ENOUGH, SERIAL

WIDTH, TIME = 8, 5


class Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, inner, *, after=lambda y: y):
        super().__init__()
        self.norm, self.inner, self.after = nn.LayerNorm(WIDTH), inner, after

    def forward(self, x):
        return x + self.after(self.inner(self.norm(x)))


class SelfAttention(nn.Module):
    """nn.MultiheadAttention, with its weights as a result (a path of its own) or without."""

    def __init__(self, *, weights):
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(WIDTH, 2, dropout=0.3, batch_first=True), weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.weights)[0]


class DropPath(nn.Module):
    """timm's DropPath: drops whole samples, by bernoulli_ on a tensor with one number per sample."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.drop_prob)
        return x * keep.div_(1 - self.drop_prob)


class TimmBlock(nn.Module):
    """timm's transformer block, with attn_drop, proj_drop and drop_path."""

    def __init__(self, drop_path=0.3, fused=True):
        super().__init__()
        self.norm1, self.norm2, self.fused = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), fused
        self.qkv, self.attn_drop, self.proj, self.proj_drop = (
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Dropout(0.2),
            nn.Linear(WIDTH, WIDTH),
            nn.Dropout(0.1),
        )
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, WIDTH), nn.Dropout(0.1))
        self.drop_path = DropPath(drop_path)

    def attention(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = functional.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            y = self.attn_drop((q @ k.transpose(-2, -1)).softmax(-1)) @ v
        return self.proj_drop(self.proj(y.transpose(1, 2).reshape(b, t, WIDTH)))

    def forward(self, x):
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Windows(nn.Module):
    """Swin's attention within windows, which are put into dimension 0 with the samples."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Dropout(0.3)

    def forward(self, x):
        windows = x.unflatten(-1, (2, -1)).transpose(1, 2).flatten(0, 1)
        return self.inner(windows).unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)


class Draws(nn.Module):
    """A module whose random numbers are those that a function draws, in training."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return self.draw(x) if self.training else x


def layer_drop(x):
    return x * (torch.rand([]) > 0.3)


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, **options)


BLOCKS = {
    "nn.TransformerEncoderLayer": partial(encoder_layer, dropout=0.1),
    "nn.TransformerEncoderLayer, pre-LN": partial(encoder_layer, dropout=0.1, norm_first=True, activation="gelu"),
    "nn.MultiheadAttention": lambda: Residual(SelfAttention(weights=False)),
    "nn.MultiheadAttention with weights": lambda: Residual(SelfAttention(weights=True)),
    "nn.AlphaDropout": lambda: Residual(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SELU(), nn.AlphaDropout(0.2))),
    "nn.FeatureAlphaDropout": lambda: Residual(nn.FeatureAlphaDropout(0.2)),
    "nn.Dropout1d": lambda: Residual(nn.Dropout1d(0.2)),
    "dropout2d": lambda: Residual(Draws(lambda x: functional.dropout2d(x.unflatten(-1, (2, -1)), 0.2).flatten(2))),
    "dropout3d": lambda: Residual(Draws(lambda x: functional.dropout3d(x.unflatten(-1, (2, 2, -1)), 0.2).flatten(2))),
    "nn.RReLU": lambda: Residual(nn.RReLU()),
    "in place": lambda: Residual(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2, inplace=True))),
    "timm": TimmBlock,
    "timm, not fused": partial(TimmBlock, fused=False),
    "windows": lambda: Residual(Windows()),
    "LayerDrop": lambda: Residual(Draws(layer_drop)),
    "randn_like": lambda: Residual(Draws(lambda x: x + 0.1 * torch.randn_like(x))),
    "uniform_": lambda: Residual(Draws(lambda x: x * torch.empty_like(x).uniform_(0.5, 1.5))),
    "normal_, not contiguous": lambda: Residual(Draws(lambda x: x + torch.empty(x.shape[0], WIDTH, TIME).mT.normal_().to(x.dtype))),
    "bernoulli": lambda: Residual(Draws(lambda x: x * torch.bernoulli(torch.full_like(x, 0.7)))),
    "randint": lambda: Residual(Draws(lambda x: x * torch.randint(0, 2, (len(x), 1, 1)))),
    "gumbel_softmax": lambda: Residual(Draws(lambda x: functional.gumbel_softmax(x))),
    "native_dropout, as on a GPU": lambda: Residual(Draws(lambda x: torch.native_dropout(x, 0.3, True)[0])),
    "torch.distributions": lambda: Residual(Draws(lambda x: torch.distributions.Normal(x, 0.1).rsample())),
    "a generator of its own": lambda: Residual(Draws(partial(lambda g, x: x + torch.rand(x.shape, generator=g), torch.Generator()))),
}  # fmt: skip


class Vectors(Batches):
    def batch(self, split, step, size):
        g = torch.Generator().manual_seed(step)
        return torch.randn(size, TIME, WIDTH, generator=g, dtype=torch.float64), torch.randn(
            size, TIME, WIDTH, generator=g, dtype=torch.float64
        )


def stack(layer, layers=6, **options):
    return LayerStack(
        embed=lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)),
        layers=[layer] * layers, head=lambda: nn.Linear(WIDTH, WIDTH), loss=lambda y, t: (y - t).square().sum(), **options,
    )  # fmt: skip


def settings(**changes):
    return tiny(
        **{"model": {"layers": 6}, "buffers": {"open": 1, "close": 1}, "step": {"middle": 0.5}, "mgrit": {"coarsening": 2}, **changes}
    )


def gradients(model, accuracy, times=1, **changes):
    config = settings(**changes)

    def work(channel):
        engine = Engine(model, config, Vectors(), channel, LocalChannel.alone(), torch.device("cpu"))
        batch, found = engine.step_batch(3, accuracy), []
        for _ in range(times):
            engine.gradients(batch)
            found.append({name: p.grad.clone() for name, p in engine.block.parameters.items()})
            engine.gradients.forget()
        return found

    everyone = run_workers(config.layer_workers, work)
    return [{name: grad for mine in everyone for name, grad in mine[n].items()} for n in range(times)]


@pytest.mark.parametrize("name", BLOCKS)
def test_what_a_block_draws_is_the_same_in_every_sweep(name):
    """Two exact gradients of a step are equal to the last bit; gradients by MGRIT over workers, and accumulated ones, up to rounding."""
    model = stack(BLOCKS[name])
    one, other = gradients(model, SERIAL, times=2)
    for parameter, gradient in one.items():
        assert torch.equal(gradient, other[parameter]), parameter
    recomputed = {"mgrit": {"coarsening": 2}, "recompute": True, "workers": 2}
    for found in (gradients(model, ENOUGH, **recomputed)[0], gradients(model, SERIAL, accumulate=2)[0]):
        for parameter, gradient in one.items():
            torch.testing.assert_close(found[parameter], gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", BLOCKS)
def test_what_a_block_draws_differs_between_steps_layers_and_samples(name):
    torch.manual_seed(0)
    block, x = BLOCKS[name]().double().train(), torch.randn(1, TIME, WIDTH, dtype=torch.float64)
    x = x.expand(8, -1, -1).contiguous()

    def run(*parts, samples=tuple(range(8))):
        with FrozenRandomness(parts, samples):
            return block(x[: len(samples)])

    state = torch.get_rng_state()
    found = run(0, 3, 1)
    assert torch.equal(found, run(0, 3, 1))
    torch.testing.assert_close(torch.cat([run(0, 3, 1, samples=(0, 1, 2)), run(0, 3, 1, samples=(3, 4, 5, 6, 7))]), found)
    rows = len({tuple(row.flatten().tolist()) for row in found})
    assert rows > 1 or name == "LayerDrop"  # one number for all samples
    assert any(not torch.equal(found, run(0, step, 1)) for step in range(4, 30))
    assert any(not torch.equal(found, run(0, 3, layer)) for layer in range(2, 30))
    assert torch.equal(state, torch.get_rng_state())


class TimeFirst(nn.Module):
    """nn.MultiheadAttention with its default layout (time first), between two transpositions, and dropout of its output."""

    def __init__(self):
        super().__init__()
        self.attention, self.drop = nn.MultiheadAttention(WIDTH, 2), nn.Dropout(0.3)

    def forward(self, x):
        x = x.transpose(0, 1)
        return self.drop(self.attention(x, x, x, need_weights=False)[0]).transpose(0, 1)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3))

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


REFUSED = {
    "nn.LSTM": (lambda: nn.LSTM(WIDTH, WIDTH, 2, dropout=0.1, batch_first=True), r"inner \(LSTM\): lstm"),
    "torch.randperm": (lambda: Draws(lambda x: x[:, torch.randperm(TIME)]), r"inner \(Draws\): randperm"),
    "out=": (lambda: Draws(lambda x: x + torch.randn(x.shape, out=torch.empty(0))), r"inner \(Draws\): randn"),
    "one number in a tensor": (
        lambda: Draws(lambda x: x * torch.rand(1, 1, 1)),
        r"inner \(Draws\): rand draws .*shape \(1, 1, 1\).* batch",
    ),
    "time first": (TimeFirst, r"inner.drop \(Dropout\).* batch"),
    "Python's random": (lambda: Draws(lambda x: x * (random.random() > 0.5)), "Python's random"),
    "numpy.random": (lambda: Draws(lambda x: x * np.random.rand()), "numpy.random"),
    "checkpoint": (Checkpointed, r"inner.inner.1 \(Dropout\), by bernoulli_ draws again in the backward pass"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_keyed_is_refused_by_name_before_training(name):
    build, words = REFUSED[name]

    def after(y):
        return y[0] if isinstance(y, tuple) else y

    model, config = stack(lambda: Residual(build(), after=after)), settings()
    with pytest.raises(SettingsError, match=rf"layer \d draws random numbers .*{words}"):
        validate(config, model, Vectors())  # before a cluster is started
    with pytest.raises(SettingsError, match=words):
        Engine(model, config, Vectors(), LocalChannel.alone(), LocalChannel.alone(), torch.device("cpu")).train_step(0, SERIAL)


def test_a_network_is_seen_to_draw_whatever_its_modules_call_it():
    """The first of timm's layers has a rate of 0: only the last layers draw. Only batched calls of several layers are refused."""
    rates = iter([0.0, 0.0, 0.0, 0.0, 0.2, 0.2])
    layers = [Residual(DropPath(rate)) for rate in rates]
    model = LayerStack(embed=nn.Identity(), layers=layers, head=nn.Identity(), loss=lambda y, t: (y - t).square().sum())
    config = settings(mgrit={"coarsening": 2, "batched": True})
    with pytest.raises(SettingsError, match=r"mgrit.batched=true and dropout.*layer 4: inner \(DropPath\), by bernoulli_"):
        validate(config, model, Vectors())
    with pytest.raises(SettingsError, match=r"layer 4: inner \(DropPath\)"):
        Engine(model, config, Vectors(), LocalChannel.alone(), LocalChannel.alone(), torch.device("cpu")).train_step(0, SERIAL)
    calm = LayerStack(embed=nn.Identity(), layers=layers[:4] + layers[:2], head=nn.Identity(), loss=lambda y, t: (y - t).square().sum())
    validate(config, calm, Vectors())


def test_layers_side_by_side_work_inside_frozen_randomness():
    """A user's network runs with its draws frozen, whether it draws or not, and so do several layers in one call."""
    model = LayerStack(
        embed=nn.Identity(), layers=[partial(TimmBlock, 0.0)] * 6, head=nn.Linear(WIDTH, WIDTH), loss=lambda y, t: (y - t).square().sum()
    )
    for layer in (built := [model.layer(n) for n in range(6)]):
        for part in layer.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
    model = LayerStack(embed=nn.Identity(), layers=built, head=nn.Identity(), loss=lambda y, t: (y - t).square().sum())
    one, other = (gradients(model, ENOUGH, mgrit={"coarsening": 2, "batched": batched})[0] for batched in (True, False))
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-9, atol=1e-11)


def test_the_check_leaves_a_layer_as_it_was():
    block = Residual(nn.Sequential(nn.Dropout(0.2), nn.Flatten(0, 1), nn.BatchNorm1d(WIDTH), nn.Unflatten(0, (-1, TIME))))
    engine = Engine(stack(lambda: block), settings(), Vectors(), LocalChannel.alone(), LocalChannel.alone(), torch.device("cpu"))
    before = {name: value.clone() for name, value in engine.block.layers[0].state_dict().items()}
    engine.check_first_batch(engine.step_batch(0, SERIAL))
    layer = engine.block.layers[0]
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert not layer.training
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in layer.modules())
    assert all(p.grad is None for p in layer.parameters())


def test_every_operator_of_torch_that_draws_is_known():
    """If a new PyTorch has more of them, someone has to look at these."""
    known, composed = set(by_key.DRAWING), {"dropout", "alpha_dropout", "_scaled_dot_product_attention_math"}
    with_generator = {
        schema.name.removeprefix("aten::") for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("aten::") and any("Generator" in str(argument.type) for argument in schema.arguments)
    }  # fmt: skip
    tagged = {
        name for name in dir(torch.ops.aten) if hasattr(packet := getattr(torch.ops.aten, name), "overloads")
        and any(torch.Tag.nondeterministic_seeded in getattr(packet, overload).tags for overload in packet.overloads())
    }  # fmt: skip
    composed.add("scaled_dot_product_attention")  # replaced by the one before it
    # Composed of others, or no operators of a layer: seeds, and TorchScript's initialisations.
    apart = composed | {
        "rrelu",
        "rrelu_",
        "manual_seed",
        "initial_seed",
        "seed",
        "normal_functional",
        "_no_grad_normal_",
        "_no_grad_uniform_",
    }
    backward = {name for name in tagged if name.endswith("_backward")}
    assert {name for name in tagged | with_generator if "." not in name} - known - apart - backward == set()
