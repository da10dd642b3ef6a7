"""Next-token prediction on windows of a token stream. The text is tokenised once, into files of the cache (`cache.py`)."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import tokenizers
import torch
from torch import Tensor

from rayllp.config import DataSettings
from rayllp.data.base import IGNORE, Dataset, DatasetFacts, Inputs
from rayllp.data.cache import ArraySlice, CacheEntry, CacheWriter, fingerprint
from rayllp.data.datasets_io import up_to
from rayllp.data.files import BadRows
from rayllp.data.sampling import SampleOrder, in_order
from rayllp.data.sources import Source, joined, sources
from rayllp.data.tokenizer import identity, is_made_from_text, load_tokenizer, restore_tokenizer, smallest_dtype
from rayllp.data.tokenizer_kinds import Tokenizer
from rayllp.errors import DataError
from rayllp.keys import key

GOLDEN_RATIO = (5**0.5 - 1) / 2
GATHERED = 2**20
"""Short texts are gathered up to this many characters, then tokenised together."""


# Batches ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StreamBatches(Dataset):
    """Windows of a token stream: in training each one once per epoch, in evaluations always the same ones.

    Windows lie side by side, so that each token is predicted once per epoch; what is left over at the end is not used. Every training epoch
    starts at another offset, and so has other windows. Held-out windows are ordered so that any prefix of them is spread over the whole
    stream; they depend on neither the seed nor the batch size.

    Attributes:
        tokens: for each split, its token ids end to end.
        sequence_length: tokens in a sequence, special ones included.
        tokenizer: the tokenizer of the text.
    """

    tokens: dict[str, ArraySlice]
    sequence_length: int
    tokenizer: Tokenizer
    is_stream = True

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "held_out"}

    @property
    def length(self) -> int:
        """Tokens in a window."""
        return self.sequence_length

    @property
    def stride(self) -> int:
        """Distance between the starts of neighbouring windows, in tokens: the number of tokens that a window predicts."""
        return self.length

    @property
    def entries(self) -> tuple[CacheEntry, ...]:
        """Cache entries whose files a host needs."""
        return (self.tokens["train"].entry,)

    def with_entries(self, change: Callable[[CacheEntry], CacheEntry]) -> Self:
        """Return a copy in which the cache entry is replaced by `change(entry)`."""
        entry = change(self.entries[0])
        return replace(self, tokens={split: replace(part, entry=entry) for split, part in self.tokens.items()})

    @cached_property
    def held_out(self) -> np.ndarray:
        """Where each held-out window starts in the stream, in the order of evaluation."""
        return spread((len(self.tokens["validation"]) - self.length) // self.stride + 1) * self.stride

    def starts(self, split: str, step: int, size: int) -> np.ndarray:
        """Return where a batch's windows start in the stream; -1 beyond the last held-out window."""
        if split != "train":
            numbers = in_order(step, len(self.held_out), size)
            return np.where(numbers < 0, -1, self.held_out[np.maximum(numbers, 0)])
        room = len(self.tokens[split]) - self.length + 1
        if self.order.sampling == "replacement":
            return self.order.take(step, room, size)
        count = self.count(split)
        numbers, epochs = self.order.samples_at(self.order.positions(step, size), count)
        rest, order = room - (count - 1) * self.stride, self.order
        offsets = {epoch: key(order.seed, "offset", order.number, int(epoch)) % rest for epoch in np.unique(epochs)}
        return numbers * self.stride + np.array([offsets[epoch] for epoch in epochs])

    def windows(self, split: str, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of the windows, int64 of shape (size, length), and a mask of rows that exist (whose start is not -1)."""
        stream = self.tokens[split].values
        return np.stack([stream[start : start + self.length] for start in np.maximum(starts, 0)]).astype(np.int64), starts >= 0

    def count(self, split: str) -> int:
        """Return the number of training windows in an epoch, or of held-out windows."""
        room = len(self.tokens[split]) - self.length + 1
        return max(1, room // self.stride) if split == "train" else len(self.held_out)

    def content(self, split: str) -> list[Any]:
        """Return the checksum of a split's tokens."""
        return [["tokens", self.tokens[split].checksum]]


def spread(count: int) -> np.ndarray:
    """Return the numbers below `count` in an order whose prefixes are all spread evenly (multiples of the golden ratio, modulo 1)."""
    return np.argsort(np.argsort(np.arange(count) * GOLDEN_RATIO % 1, kind="stable"), kind="stable")


@dataclass(frozen=True, kw_only=True)
class TextBatches(StreamBatches):
    """Windows of a token stream for causal language models; targets are the inputs shifted by one.

    Attributes:
        packed: treat each text on its own: positions start at 0 in each, and the last token of a text does not predict the next text's
            first.
    """

    packed: bool = False

    @property
    def length(self) -> int:
        """Tokens in a window: one more than a sequence, for the last token's target."""
        return self.sequence_length + 1

    @property
    def stride(self) -> int:
        """Distance between the starts of windows, which share a token: the last target of one is the first input of the next."""
        return self.sequence_length

    @property
    def facts(self) -> DatasetFacts:
        """Size of the vocabulary. There is no padding: all sequences have the same length."""
        return DatasetFacts(vocabulary=self.tokenizer.vocabulary)

    def batch(self, split: str, step: int, size: int) -> tuple[Inputs, Tensor]:
        """Return input and target ids, both of shape (size, sequence_length); where texts are packed, inputs are (ids, positions)."""
        starts = self.starts(split, step, size)
        windows, filled = self.windows(split, starts)
        targets = np.where(filled[:, None], windows[:, 1:], IGNORE)
        inputs = torch.from_numpy(windows[:, :-1].copy())
        if not self.packed:
            return inputs, torch.from_numpy(targets)
        positions = self.positions(split, starts)
        targets[positions[:, 1:] == 0] = IGNORE
        return (inputs, torch.from_numpy(positions[:, :-1].copy())), torch.from_numpy(targets)

    def positions(self, split: str, starts: np.ndarray) -> np.ndarray:
        """Return for each token its distance from the start of its text or of the window, whichever is nearer."""
        part = self.tokens[split]
        beginnings = part.entry.array(f"{part.name}_texts")
        text_starts = np.zeros((len(starts), self.length), np.int64)
        for row, start in zip(text_starts, np.maximum(starts, 0) + part.start, strict=True):
            first, last = np.searchsorted(beginnings, (start, start + self.length))
            within = beginnings[first:last] - start
            row[within] = within
        return np.arange(self.length) - np.maximum.accumulate(text_starts, axis=1)


# Tokens -----------------------------------------------------------------------------------------------------------------------


def load_text(settings: DataSettings, sequence_length: int, seed: int, tokenizer: Tokenizer | None = None) -> TextBatches:
    """Read a text, tokenise it, and split it into training and held-out tokens.

    Raises:
        DataError: see `load_stream`.
    """
    packed = settings.documents == "packed"
    return TextBatches(**load_stream(settings, sequence_length, sequence_length + 1, seed, tokenizer), packed=packed)


def load_stream(settings: DataSettings, sequence_length: int, window: int, seed: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Read and tokenise a text; return the fields of `StreamBatches`: its tokens by split, and so on.

    Args:
        settings: say where the text is, and what is held out: a file or split of its own, or else the end of the text.
        sequence_length: tokens in a sequence.
        window: tokens that each split needs at least: one sequence and its targets.
        seed: determines the order of samples.
        tokenizer: the tokenizer of a run that is resumed; None: the one that the settings name.

    Raises:
        DataError: the text is missing, unreadable, empty, or not text; or either split is shorter than a window, or the tokenizer cannot
            encode the held-out text.
    """
    source, held_out = sources(settings)
    stamps = [source.stamp(), settings.max_bytes, settings.on_error]
    tokenizer = tokenizer or _tokenizer(settings, source, stamps)
    packed = settings.documents == "packed"
    write = WriteTokens(source, held_out, tokenizer, settings.on_error == "skip", packed)
    name = fingerprint("tokens", stamps, held_out and held_out.stamp(), packed, *identity(tokenizer))
    entry = CacheEntry(name, write, settings.cache, f"tokens of {source.name}").ensure_present()
    train = ArraySlice.whole(entry, "train")
    if held_out is None:
        cut = len(train) - int(len(train) * settings.validation_fraction)
        splits = {"train": replace(train, stop=cut), "validation": replace(train, start=cut)}
    else:
        splits = {"train": train, "validation": ArraySlice.whole(entry, "validation")}
    for split, tokens in splits.items():
        if len(tokens) < window:
            raise DataError(
                f"the {split} text has {len(tokens)} tokens, fewer than one sequence of {sequence_length} takes "
                f"({window}): give more text, or lower sequence_length"
            )
    order, skipped = SampleOrder(seed, settings.sampling), entry.metadata["skipped"]
    return {"tokens": splits, "sequence_length": sequence_length, "order": order, "tokenizer": tokenizer, "skipped": skipped}


def _tokenizer(settings: DataSettings, source: Source, stamps: list[Any]) -> Tokenizer:
    """Load the tokenizer that the settings name. One that is made from the text is made once and then read from the cache."""
    name = settings.tokenizer
    if not is_made_from_text(name):
        return load_tokenizer(name)
    write = WriteTokenizer(name, source, settings.on_error == "skip")
    entry = CacheEntry(
        fingerprint("tokenizer", stamps, name, tokenizers.__version__), write, settings.cache, f"data.tokenizer {name}"
    ).ensure_present()
    tokenizer = restore_tokenizer(name, entry.metadata["made"], None)
    assert tokenizer is not None
    return tokenizer


@dataclass(frozen=True)
class WriteTokenizer:
    """Makes a tokenizer from a text and writes it into a cache entry."""

    name: str
    source: Source
    skip: bool

    def __call__(self, writer: CacheWriter) -> None:
        """Store the serialised tokenizer that `restore_tokenizer` reads."""
        tokenizer = load_tokenizer(self.name, joined(self.source.documents(BadRows(self.skip)), self.source.max_bytes))
        writer.metadata["made"] = tokenizer.serialised


@dataclass(frozen=True)
class WriteTokens:
    """Tokenises a text and writes the tokens into a cache entry.

    Attributes:
        source, held_out: the texts; without the latter, the end of the former is held out.
        tokenizer: the tokenizer of both.
        skip: leave out and count what is broken.
        packed: tokenise each text on its own and record where it starts.
    """

    source: Source
    held_out: Source | None
    tokenizer: Tokenizer
    skip: bool
    packed: bool

    def __call__(self, writer: CacheWriter) -> None:
        """Write the tokens ("train", "validation"), where each text starts if texts are packed ("…_texts"), and how much was left out."""
        bad_rows = BadRows(self.skip)
        for name, source in (("train", self.source), ("validation", self.held_out)):
            if source is not None and not self._write_split(writer, name, source, bad_rows):
                raise DataError(f"{source.name} holds no text: give a file or folder with some")
        writer.metadata["skipped"] = bad_rows.counts

    def _write_split(self, writer: CacheWriter, name: str, source: Source, bad_rows: BadRows) -> int:
        """Write the tokens of a source and return their number."""
        count, dtype = 0, smallest_dtype(self.tokenizer.vocabulary)
        documents, limit = source.documents(bad_rows), source.max_bytes
        try:
            if not self.packed:
                for ids in self.tokenizer.stream("".join(some) for some in _together(joined(documents, limit))):
                    writer.append(name, ids.astype(dtype))
                    count += len(ids)
                return count
            for some in _together(up_to(limit, map("".join, documents), lambda text: len(text.encode()))):
                rows = [ids for ids in self._encode(some) if len(ids)]
                writer.append(f"{name}_texts", count + np.cumsum([0, *(len(ids) for ids in rows)])[:-1])
                writer.append(name, np.concatenate([np.zeros(0, dtype), *rows]).astype(dtype))
                count += sum(len(ids) for ids in rows)
            return count
        except KeyError as error:
            raise DataError(
                f"{source.name}: {error.args[0]!r} is not in the text that the alphabet was made from, so data.tokenizer=characters has no "
                "token for it; use bytes or bpe:SIZE"
            ) from None

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        """Return the token ids of each text, followed by the end-of-sequence id if the tokenizer has one."""
        end = self.tokenizer.eos
        rows = self.tokenizer.encode_all(texts)
        return rows if end is None else [np.append(ids, end).astype(np.int64) for ids in rows]


def _together(texts: Iterable[str]) -> Iterator[list[str]]:
    """Gather texts, or pieces of one, into lists of about GATHERED characters."""
    some, size = list[str](), 0
    for text in texts:
        some.append(text)
        size += len(text)
        if size >= GATHERED:
            yield some
            some, size = [], 0
    if some:
        yield some
