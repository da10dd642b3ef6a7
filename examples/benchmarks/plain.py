"""transformers' GPT-2 with nothing of ours, and a training step of it: what the benchmarks compare with."""

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from rayllp.config import TrainConfig
from rayllp.config.schedule import learning_rate


def plain_gpt2(config: TrainConfig, vocabulary: int) -> GPT2LMHeadModel:
    """A GPT-2 of the settings' sizes, in training mode; its GELU is one operation, as in ours."""
    m = config.model
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_positions=config.sequence_length, n_embd=m.width, n_layer=m.layers, n_head=m.heads,
            embd_pdrop=0, attn_pdrop=0, resid_pdrop=0, bos_token_id=0, eos_token_id=0, attn_implementation="sdpa", use_cache=False,
            activation_function="gelu_pytorch_tanh",
        )
    ).train()  # fmt: skip


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, inputs: Tensor, targets: Tensor
) -> float:
    """One optimizer step as the engine does it; the loss."""
    logits = model(input_ids=inputs).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config.optimizer, step, config.steps)
    optimizer.step()
    return loss.item()
