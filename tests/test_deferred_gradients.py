"""A layer's backward pass in two parts: the same gradients as in one, and a whole pass where the layer's modules do not tell enough."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from rayllp.engine.deferred_gradients import DeferredGradients, LayerModules, gradients_at

WIDTH = 6


class Layer(nn.Module):
    """A small pre-norm layer."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class InPlace(Layer):
    """Changes a module's output, which is a view, in place; its graph is then another one."""

    def forward(self, x):
        hidden = self.up(self.norm(x))
        return x + self.down(torch.relu_(hidden))


class Scaled(Layer):
    """Has a parameter of its own besides those of its modules."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x):
        return x + self.scale * (super().forward(x) - x)


class Upstream(Layer):
    """Its own parameter comes before its modules, as in layers with scales for attention and feed-forward."""

    def __init__(self):
        super().__init__()
        self.scale, self.again = nn.Parameter(torch.full((WIDTH,), 0.5)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.again(x + self.scale * (super().forward(x * self.scale) - x))


class Twice(Layer):
    def forward(self, x):
        return super().forward(super().forward(x))


class Shared(Layer):
    """Two modules have the same parameter."""

    def __init__(self):
        super().__init__()
        self.again = nn.Linear(WIDTH, 2 * WIDTH)
        self.again.weight = self.up.weight

    def forward(self, x):
        return super().forward(x) + self.down(torch.relu(self.again(x)))


class Around(Layer):
    """Uses a module's weight without calling the module, besides calling it. No hook can see that."""

    def forward(self, x):
        return super().forward(x) + functional.linear(x, self.up.weight)[..., :WIDTH]


class Several(Layer):
    """A module that returns more than a tensor."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Parameter(torch.randn(WIDTH, WIDTH))

        def forward(self, x):
            return x @ self.inner, x

    def __init__(self):
        super().__init__()
        self.both = self.Both()

    def forward(self, x):
        return super().forward(x) + self.both(x)[0]


class Frozen(Layer):
    def __init__(self):
        super().__init__()
        self.up.weight.requires_grad_(False)


def both_ways(make, *, known_right=False, before=None):
    """Return the gradients of input and parameters in one pass and in two, whether the two agreed, and the parts."""
    torch.manual_seed(0)
    layer, x, lam = make().double(), torch.randn(4, 3, WIDTH, dtype=torch.float64, requires_grad=True), torch.randn(4, 3, WIDTH).double()
    leaves = [p for p in layer.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(layer(x), [x, *leaves], lam)
    with LayerModules(layer, leaves).recorded() as parts:
        outputs = (layer(x),)
    at_inputs, at_parts = gradients_at(outputs, (x,), (lam,), parts)
    for leaf in leaves:
        leaf.grad = None if before is None else torch.full_like(leaf, before)
    agrees = DeferredGradients(outputs, (lam,), leaves, parts, at_parts).form(known_right=known_right)
    return wanted, (*at_inputs, *(leaf.grad for leaf in leaves)), agrees, parts


@pytest.mark.parametrize(
    ("make", "told", "agrees"),
    [
        (Layer, 3, True), (InPlace, 3, False), (Scaled, 4, True), (Upstream, 5, True), (Twice, 0, True), (Shared, 1, True),
        (Around, 3, False), (Several, 3, True), (Frozen, 3, True),
    ],
)  # fmt: skip
def test_two_parts_give_the_gradients_of_one_pass(make, told, agrees):
    wanted, found, agreed, parts = both_ways(make)
    assert len(parts.edges) == told
    assert agreed == agrees
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)
    wanted, found, agreed, _ = both_ways(make, before=2.0)  # gradients add up
    for one, other in zip(wanted[1:], found[1:], strict=True):
        torch.testing.assert_close(other, one + 2, rtol=1e-10, atol=1e-12)


def test_once_it_is_known_to_be_right_nothing_is_formed_twice(monkeypatch):
    calls = []
    whole = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: calls.append(args) or whole(*args, **kwargs))
    wanted, found, agreed, _ = both_ways(Upstream, known_right=True)
    assert len(calls) == 2  # the expected gradients, and those of the input
    assert agreed
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(other, one)


class Silent(nn.Module):
    """Uses a module's weight itself, too, which its two parts do not tell; all of it behind a factor of zero."""

    def __init__(self, scale=0.0):
        super().__init__()
        self.up, self.scale = nn.Linear(WIDTH, WIDTH, bias=False), nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        return x + self.scale * (torch.tanh(self.up(x)) @ self.up.weight)


def test_gradients_that_are_zero_tell_nothing():
    assert both_ways(Silent)[2] is None
    wanted, found, agreed, _ = both_ways(lambda: Silent(1.0))
    assert agreed is False
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(other, one)


def test_gradients_that_are_not_finite_tell_nothing():
    for value, finite in ((1.0, True), (torch.nan, False)):
        lam = (torch.full((2,), value), torch.ones(3))
        assert DeferredGradients((), lam, [], None, ()).is_finite == finite


def test_hooks_are_gone_afterwards_also_if_the_layer_fails():
    layer = Layer()
    with pytest.raises(RuntimeError), LayerModules(layer, list(layer.parameters())).recorded():
        layer(torch.randn(WIDTH + 1))
    assert not any(module._forward_hooks for module in layer.modules())
