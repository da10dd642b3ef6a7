"""Generation with the exact network: transformers' own sampling and beam search on the last worker, the layers where they are.

The last worker runs `generate` over a model whose forward is a question to all workers; the others answer until told to stop.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, GPT2Config, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from rayllp.channel.base import MessageTag
from rayllp.data.base import Inputs
from rayllp.engine.exact_forward import ExactForward
from rayllp.models.randomness import seeded


class Decoder:
    """One worker's end. All workers of the layer group make one and call `generate` with the same arguments.

    Args:
        exact_forward: the network.
        sources: (sentences, time) of an encoder–decoder; None for a decoder alone.
    """

    def __init__(self, exact_forward: ExactForward, sources: Tensor | None = None) -> None:
        self.exact_forward, self.sources = exact_forward, sources
        self.group = exact_forward.group
        self.questions = 0

    def generate(self, prompts: Tensor, options: GenerationConfig) -> list[list[int]]:
        """Continuations (prompt included) of (sentences, time) prompts, on every worker."""
        self.announce(None)  # all workers are here: sampling holds the process's generator, which workers that are threads share
        if self.group.block.last:
            with torch.no_grad(), seeded(self.group.config.seed, "generation"):
                found = _Asking(self, options).generate(prompts, generation_config=options, row=torch.arange(len(prompts)))
            self.announce(None)
            answer = found.cpu()
        else:
            while (inputs := self.hear()) is not None:
                self.forward(inputs)
            answer = None
        return self.share(answer).tolist()

    def ask(self, tokens: Tensor, row: Tensor) -> Tensor:
        """Outputs of the network for these tokens; `row` is the sentence that each continues."""
        self.announce(torch.cat([row[:, None], tokens], 1))
        outputs = self.forward(self.inputs(tokens, row))
        assert outputs is not None
        return outputs

    def forward(self, inputs: Inputs) -> Tensor | None:
        """Outputs at the last position, on the last worker; None on all others."""
        return self.exact_forward(inputs, self._tag("forward"), last_only=True)

    def inputs(self, tokens: Tensor, row: Tensor) -> Inputs:
        """Tokens as the model takes them, beside their rows' sources where it translates."""
        device = self.group.device
        return tokens.to(device) if self.sources is None else (self.sources[row].to(device), tokens.to(device))

    # Words between workers ----------------------------------------------------------------------------------------------------

    def announce(self, table: Tensor | None) -> None:
        """Tell all workers what is asked: (rows, 1 + time), or that nothing more is."""
        self.share(torch.zeros((0, 0), dtype=torch.int64) if table is None else table)

    def hear(self) -> Inputs | None:
        """What the last worker wants evaluated next; None when it is done."""
        table = self.share(None)
        return self.inputs(table[:, 1:], table[:, 0]) if len(table) else None

    def share(self, table: Tensor | None) -> Tensor:
        """A table of integers from the last worker to all."""
        self.questions += 1
        shape = torch.zeros(2, dtype=torch.int64) if table is None else torch.tensor(table.shape)
        shape = self.group.channel.all_reduce(shape.to(self.group.device), self._tag("shape"))
        self.group.channel.finish()  # all workers are done with the last question: its states need not be held
        content = torch.zeros(tuple(shape.tolist()), dtype=torch.int64) if table is None else table
        if content.numel() == 0:
            return content
        return self.group.channel.all_reduce(content.to(self.group.device).contiguous(), self._tag("tokens")).cpu()

    def _tag(self, phase: str) -> MessageTag:
        return MessageTag(self.questions, "generation", phase)


class _Asking(PreTrainedModel, GenerationMixin):
    """What transformers' `generate` takes for a model."""

    config_class = GPT2Config  # any decoder's: generation reads no more of it than the vocabulary
    main_input_name = "input_ids"

    def __init__(self, decoder: Decoder, options: GenerationConfig) -> None:
        architecture = decoder.group.block.architecture
        super().__init__(GPT2Config(vocab_size=architecture.facts.vocabulary, n_layer=1, bos_token_id=0, eos_token_id=0, use_cache=False))  # type: ignore[attr-defined]
        self.generation_config = options
        self.decoder, self.window = decoder, decoder.group.config.sequence_length
        self.place = nn.Parameter(torch.zeros(()))

    def prepare_inputs_for_generation(self, input_ids: Tensor, row: Tensor, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": input_ids, "row": row}

    def forward(self, input_ids: Tensor, row: Tensor, **_: Any) -> CausalLMOutput:
        outputs = self.decoder.ask(input_ids[:, -self.window :], row)
        return CausalLMOutput(logits=outputs.float().cpu())


def continue_text(exact_forward: ExactForward, prompt: list[int], tokens: int, temperature: float = 0.8) -> list[int]:
    """A sampled continuation of `prompt`, on every worker of the layer group."""
    options = GenerationConfig(
        max_new_tokens=tokens, do_sample=True, temperature=temperature, top_k=0, use_cache=False, pad_token_id=0, eos_token_id=None
    )
    return Decoder(exact_forward).generate(torch.tensor([prompt]), options)[0][len(prompt) :]


def translate(exact_forward: ExactForward, sources: Tensor, beams: int) -> list[list[int]]:
    """Beam search: translations of (sentences, time) sources, without the token that begins them; on every worker."""
    facts = exact_forward.group.block.architecture.facts  # type: ignore[attr-defined]
    options = GenerationConfig(
        max_length=exact_forward.group.config.sequence_length, num_beams=beams, do_sample=False, early_stopping=True, use_cache=False,
        bos_token_id=facts.bos, eos_token_id=facts.eos, pad_token_id=facts.pad,
    )  # fmt: skip
    prompts = torch.full((len(sources), 1), facts.bos)
    return [row[1:] for row in Decoder(exact_forward, sources).generate(prompts, options)]
