"""Generation with the exact network: the last worker runs transformers' own sampling and beam search; the layers stay where they are.

The last worker calls `generate` on a model whose forward is a request to all workers. The others answer requests until they are told to
stop. A request consists of whole sequences. Each worker looks up in the previous request which of their tokens its layers have been
through already.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, GPT2Config, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from rayllp.channel.base import MessageTag, StateSpec
from rayllp.data.base import Inputs
from rayllp.engine.block import Block
from rayllp.engine.exact_forward import ExactForward
from rayllp.models.randomness import seeded
from rayllp.state import State, like, tensors

MEMORY_TEST_TOKENS = 4
"""Number of tokens on which the layers' cache of past tokens is tested."""
MEMORY_TOLERANCE = 1e-3
"""By how much results with and without the cache may differ, relative to their norm."""


class Decoder:
    """One worker's end of a generation. All workers of the layer group make one, and call `generate` with the same arguments.

    Args:
        exact_forward: the network.
        sources: the source sentences of an encoder–decoder, shape (sentences, time); None for a decoder alone.

    Attributes:
        requests: number of tables broadcast so far, by which messages are numbered.
        past: the cache of the tokens that layers have been through; None if every request is computed from scratch.
    """

    def __init__(self, exact_forward: ExactForward, sources: Tensor | None = None) -> None:
        self.exact_forward, self.sources = exact_forward, sources
        self.group = exact_forward.group
        self.requests = 0
        self.past: Any = None

    def generate(self, prompts: Tensor, options: GenerationConfig) -> list[list[int]]:
        """Return the continuations of prompts of shape (sentences, time), prompts included, on every worker."""
        with self.group.block.uncompiled():
            # All workers agree on this before sampling, which locks the process's random generator: workers that are threads share that.
            self.past = self.group.block.architecture.past() if self._all_remember(prompts) else None
            if self.group.block.last:
                with torch.no_grad(), seeded(self.group.config.seed, "generation"):
                    found = _RemoteModel(self, options).generate(prompts, generation_config=options, row=torch.arange(len(prompts)))
                self.request(None)
                answer = found.cpu()
            else:
                while len(table := self.broadcast(None)):
                    self.forward(table)
                answer = None
        return self.broadcast(answer).tolist()

    def _all_remember(self, prompts: Tensor) -> bool:
        """Return True if the cache of past tokens works on all workers' layers."""
        if self.exact_forward.remembers is None:  # tested once for this worker's layers: evaluations generate in many small parts
            count = min(MEMORY_TEST_TOKENS, self.group.config.sequence_length)
            tokens = prompts[:1].repeat(1, count)[:, :count]
            row = torch.zeros(1, dtype=torch.int64)
            self.exact_forward.remembers = remembers(self.group.block, lambda tokens: self.inputs(tokens, row), tokens)
        fails = torch.tensor([not self.exact_forward.remembers], dtype=torch.int64, device=self.group.device)
        return not self.group.channel.all_reduce(fails, self._tag("memory")).item()

    def evaluate(self, tokens: Tensor, row: Tensor) -> Tensor:
        """Return the network's outputs for these tokens, on the last worker, after telling all workers to compute them.

        Args:
            tokens: shape (rows, time).
            row: for each row, the number of the sentence that it continues.
        """
        table = torch.cat([row[:, None], tokens], 1)
        self.request(table)
        outputs = self.forward(table)
        assert outputs is not None
        return outputs

    def forward(self, table: Tensor) -> Tensor | None:
        """Return the outputs at the last position for a table of shape (rows, 1 + time), on the last worker; None on all others.

        Column 0 of the table is the number of the sentence, the others are tokens.
        """
        inputs = self.inputs(table[:, 1:], table[:, 0])
        if self.past is None:
            return self.exact_forward(inputs, self._tag("forward"), last_only=True)
        self.past.begin(table)
        outputs = self.exact_forward(inputs, self._tag("forward"), last_only=True, past=self.past)
        self.past.end(table)
        return outputs

    def inputs(self, tokens: Tensor, row: Tensor) -> Inputs:
        """Return tokens as the model takes them; in translation together with their rows' source sentences."""
        device = self.group.device
        return tokens.to(device) if self.sources is None else (self.sources[row].to(device), tokens.to(device))

    # Messages between workers -------------------------------------------------------------------------------------------------

    def request(self, table: Tensor | None) -> None:
        """Send all workers the next request, a table of shape (rows, 1 + time); None tells them that there are no more."""
        self.broadcast(torch.zeros((0, 0), dtype=torch.int64) if table is None else table)

    def broadcast(self, table: Tensor | None) -> Tensor:
        """Return the last worker's table of integers, on every worker. All others pass None."""
        self.requests += 1
        shape = self._broadcast(None if table is None else torch.tensor(table.shape), (2,), "shape")
        return self._broadcast(table, tuple(shape.tolist()), "tokens")

    def _broadcast(self, numbers: Tensor | None, shape: tuple[int, ...], phase: str) -> Tensor:
        """Return the last worker's integers of this shape, on every worker."""
        channel, device = self.group.channel, self.group.device
        spec = StateSpec((torch.Size(shape),), (torch.int64,), device)
        found = channel.broadcast(None if numbers is None else numbers.to(device), spec, channel.size - 1, self._tag(phase))
        channel.finish()  # all workers are done with the previous request, so its states need not be kept
        assert isinstance(found, Tensor)
        return found.cpu()

    def _tag(self, phase: str) -> MessageTag:
        return MessageTag(self.requests, "generation", phase)


class _RemoteModel(PreTrainedModel, GenerationMixin):
    """The model that is handed to transformers' `generate`. Its forward is a request to all workers."""

    config_class = GPT2Config  # any decoder's would do: generation reads only the size of the vocabulary
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
        outputs = self.decoder.evaluate(input_ids[:, -self.window :], row)
        return CausalLMOutput(logits=outputs.float().cpu())


def remembers(block: Block, inputs_of: Callable[[Tensor], Inputs], tokens: Tensor) -> bool:
    """Test whether this worker's pieces can use a cache of past tokens.

    They can if they compute the same for the last token with the cache as from all tokens. Each kind of layer is tested once.

    Args:
        block: this worker's pieces.
        inputs_of: makes the network's inputs of tokens of shape (1, time).
        tokens: the tokens to test with.
    """
    architecture, common = block.architecture, block.common
    past, whole, shorter = architecture.past(), inputs_of(tokens), inputs_of(tokens[:, :-1])
    if past is None:
        return False
    generator = torch.Generator().manual_seed(0)
    layers = {architecture.kind(n): n for n in block.layers}.values()

    def advanced(state: State, context: Any) -> list[Tensor]:
        return [tensors(architecture.advance(n, block.layers[n], state, context, common))[-1][:, -1:] for n in layers]

    with torch.no_grad():
        block.train(False)
        spec, context = architecture.state_spec(whole, block.dtype, block.device), architecture.context(whole, block.dtype)
        state = like(spec.zeros(), tuple(torch.randn(s, generator=generator).to(block.device, block.dtype) for s in spec.shapes))
        wanted = advanced(state, context)
        if block.embed is not None:
            wanted.append(tensors(architecture.enter(block.embed, whole, context))[-1][:, -1:])
        try:
            advanced(_at(state, slice(None, -1)), architecture.context(shorter, block.dtype, past))
            past.end(torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], 1))
            context = architecture.context(whole, block.dtype, past)
            found = advanced(_at(state, slice(-1, None)), context)
            if block.embed is not None:
                found.append(tensors(architecture.enter(block.embed, whole, context))[-1])
        except Exception:  # layers with another kind of cache may fail with any error
            return False
    return all(a.shape == b.shape and (a - b).norm() <= MEMORY_TOLERANCE * b.norm() for a, b in zip(found, wanted, strict=True))


def _at(state: State, positions: slice) -> State:
    """Return the state at these positions; of an encoder–decoder, the decoder's."""
    *others, last = tensors(state)
    return like(state, (*others, last[:, positions]))


def continue_text(exact_forward: ExactForward, prompt: list[int], tokens: int, temperature: float = 0.8) -> list[int]:
    """Return a sampled continuation of `prompt`, without the prompt, on every worker of the layer group."""
    options = GenerationConfig(
        max_new_tokens=tokens, do_sample=True, temperature=temperature, top_k=0, use_cache=False, pad_token_id=0, eos_token_id=None
    )
    return Decoder(exact_forward).generate(torch.tensor([prompt]), options)[0][len(prompt) :]


def translate(exact_forward: ExactForward, sources: Tensor, beams: int) -> list[list[int]]:
    """Return translations of sources of shape (sentences, time) by beam search, without the token that begins them; on every worker."""
    facts = exact_forward.group.block.architecture.facts  # type: ignore[attr-defined]
    options = GenerationConfig(
        max_length=exact_forward.group.config.sequence_length, num_beams=beams, do_sample=False, early_stopping=True, use_cache=False,
        bos_token_id=facts.bos, eos_token_id=facts.eos, pad_token_id=facts.pad,
    )  # fmt: skip
    prompts = torch.full((len(sources), 1), facts.bos)
    return [row[1:] for row in Decoder(exact_forward, sources).generate(prompts, options)]
