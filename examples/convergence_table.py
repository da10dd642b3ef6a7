"""How accurate are so many iterations? State and gradient errors of one random transformer, against the exact solve.

    python examples/convergence_table.py

32 pre-LN GPT blocks of width 128, 4 heads, weights N(0, 0.02), c_f = 4, L = 2, F-relaxation, standard normal input (8, 64, 128), on one
worker (the answer does not depend on the number of workers). The gradients are of the output's product with
standard normal weights; float64.
"""

import argparse

import torch
from torch import Tensor, nn

import rayllp
from rayllp.channel import LocalChannel
from rayllp.control import Accuracy
from rayllp.data import Batches
from rayllp.engine import Engine
from rayllp.models import LayerStack


class GPTBlock(nn.Module):
    def __init__(self, width: int = 128, heads: int = 4, std: float = 0.02) -> None:
        super().__init__()
        self.l1, self.l2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.f1, self.f2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for linear in (self.qkv, self.o, self.f1, self.f2):
            nn.init.normal_(linear.weight, 0, std)
            nn.init.zeros_(linear.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(self.l1(x_BTD)).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        a = self.o(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, D))
        return x_BTD + a + self.f2(nn.functional.gelu(self.f1(self.l2(x_BTD + a))))


class NormalInput(Batches):
    """The one batch, and the weights of the loss: standard normal numbers."""

    def batch(self, split: str, step: int, size: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        return tuple(torch.randn(size, 64, 128, generator=generator, dtype=torch.float64) for _ in range(2))


def measure(layers: int, h: float, forward: int, backward: int) -> tuple[Tensor, Tensor, float | None]:
    """Final state, middle layers' gradients and forward ρ after so many iterations (0: exact)."""
    config = rayllp.make_config(
        {
            "workers": 1,
            "dtype": "float64",
            "model": {"layers": layers},
            "buffers": {"open": 0, "close": 0},
            "step": {"middle": h},
            "solver": "mgrit",
            "mode": "parallel",
        }
    )
    stack = LayerStack(embed=nn.Identity, layers=[GPTBlock] * layers, head=nn.Identity, loss=lambda y, w: (w * y).sum(), count=lambda _: 1)
    engine = Engine(stack, config, NormalInput(), LocalChannel.alone(), LocalChannel.alone(), torch.device("cpu"))
    levels = [2 if count else 1 for count in (forward, backward)]
    accuracy = Accuracy(
        serial=False,
        levels_forward=levels[0],
        levels_backward=levels[1],
        iterations_forward=max(1, forward),
        iterations_backward=max(1, backward),
    )
    outputs: list[Tensor] = []
    engine.block.head.register_forward_pre_hook(lambda _, arguments: outputs.append(arguments[0].detach()))  # type: ignore[union-attr]
    shares = engine.gradients(engine.step_batch(0, accuracy)).forward
    assert shares is not None
    found = shares.convergence(shares.flat)  # one worker has all of it
    gradients = torch.cat([p.grad.flatten() for p in engine.block.parameters.values() if p.grad is not None])
    return outputs[0], gradients, found.convergence_factor


def error(value: Tensor, exact: Tensor) -> float:
    return ((value - exact).norm() / exact.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    layers = parser.parse_args().layers
    for name, h in (("1/N", 1 / layers), ("1", 1.0)):
        state, gradient, _ = measure(layers, h, 0, 0)
        print(f"h = {name}")
        for forward in (1, 2, 3, 4):
            got, _, rho = measure(layers, h, forward, 1)
            shown = f", ρ {rho:.2g}" if rho is not None else ""
            print(f"  {forward} forward: relative error of the last state {error(got, state):.1e}{shown}")
        for forward, backward in ((1, 1), (2, 1), (2, 2)):
            _, got, _ = measure(layers, h, forward, backward)
            cosine = nn.functional.cosine_similarity(got, gradient, 0).item()
            print(f"  {forward}+{backward}: relative error of the gradient {error(got, gradient):.1e}, cosine {cosine:.4f}")


if __name__ == "__main__":
    main()
