"""GPT-2 from transformers' own modules: decoder-only, pre-LN, learned positions."""

import torch
from torch import Tensor, nn
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2PreTrainedModel

from rayllp.channel.base import StateSpec
from rayllp.config import TrainConfig
from rayllp.models.base import Architecture

# Shape suffixes: B batch, T time (tokens), D width, V vocabulary.


class _Piece(GPT2PreTrainedModel):
    """Part of a GPT-2. Its subclasses differ from transformers' classes only in what they hold."""

    def initialise(self) -> None:
        # Not post_init: it takes classes outside transformers for remote code, and then passes over GPT-2's scaled projections.
        self.apply(self._init_weights)


class GPT2Embed(_Piece):
    """Token and position embeddings, as GPT2Model's beginning."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.initialise()

    def forward(self, tokens_BT: Tensor) -> Tensor:
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        return self.drop(self.wte(tokens_BT) + self.wpe(positions_T))


class GPT2Layer(_Piece):
    """Holds one block only to have transformers initialise it."""

    def __init__(self, config: GPT2Config, index: int) -> None:
        super().__init__(config)
        self.block = GPT2Block(config, layer_idx=index)
        self.initialise()


class GPT2Head(_Piece):
    """Final norm and language-modelling head, as GPT2LMHeadModel's end."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.transformer = nn.ModuleDict({"ln_f": nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)})
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.initialise()

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.lm_head(self.transformer["ln_f"](x_BTD))


class GPT2(Architecture):
    """The adapter; parameter names are those of transformers' GPT2LMHeadModel."""

    def __init__(self, config: GPT2Config) -> None:
        self.config, self.layers = config, config.n_layer
        self.stochastic = max(config.embd_pdrop, config.attn_pdrop, config.resid_pdrop) > 0
        self.tied = (("transformer.wte.weight", "lm_head.weight"),) if config.tie_word_embeddings else ()

    @classmethod
    def from_settings(cls, config: TrainConfig, vocabulary: int) -> "GPT2":
        model = config.model
        return cls(
            GPT2Config(
                vocab_size=vocabulary, n_positions=config.sequence_length, n_embd=model.width, n_layer=model.layers,
                n_head=model.heads, embd_pdrop=model.dropout, attn_pdrop=model.dropout, resid_pdrop=model.dropout,
                tie_word_embeddings=model.tie_embeddings, bos_token_id=0, eos_token_id=0, attn_implementation="sdpa", use_cache=False,
            )
        )  # fmt: skip

    def embed(self) -> nn.Module:
        return GPT2Embed(self.config)

    def layer(self, index: int) -> nn.Module:
        return GPT2Layer(self.config, index).block

    def head(self) -> nn.Module:
        return GPT2Head(self.config)

    def embed_prefix(self) -> str:
        return "transformer."

    def layer_prefix(self, index: int) -> str:
        return f"transformer.h.{index}."

    def head_prefix(self) -> str:
        return ""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        logits = outputs.float() if outputs.dtype == torch.bfloat16 else outputs
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    def count(self, targets: Tensor) -> int:
        return targets.numel()

    def state_spec(self, inputs: Tensor, dtype: torch.dtype, device: torch.device) -> StateSpec:
        return StateSpec((torch.Size((*inputs.shape, self.config.n_embd)),), (dtype,), device)
