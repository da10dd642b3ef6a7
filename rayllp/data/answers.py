"""Supervised fine-tuning on conversations, or on prompts and answers: only the answers' tokens are predicted."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from rayllp.config import DataSettings
from rayllp.data.base import IGNORE, Dataset, DatasetFacts, Inputs
from rayllp.data.cache import CacheEntry, CacheWriter, fingerprint
from rayllp.data.datasets_io import up_to
from rayllp.data.files import BadRows, chunks, count_kept, local_path
from rayllp.data.sampling import SampleOrder
from rayllp.data.sources import Table, tables
from rayllp.data.tokenizer import identity, is_made_from_text, load_tokenizer, smallest_dtype
from rayllp.data.tokenizer_kinds import Pretrained, Tokenizer
from rayllp.errors import DataError

ASSISTANT = "assistant"
AT_ONCE = 1000
"""Rows that are tokenised together."""


@dataclass(frozen=True, kw_only=True)
class AnswerBatches(Dataset):
    """Tokenised conversations or prompt–answer pairs. Only tokens of answers are targets; all others are IGNORE.

    Attributes:
        entry: the cache entry with the arrays of both splits: tokens ("train"), which of them belong to answers ("train_answers"), where
            each sample starts ("train_samples") and with which sample each sequence starts ("train_sequences"); the last two have a final
            element for the end.
        spans: for each split, the name of its arrays, its first sequence, and the end of its sequences (exclusive).
        sequence_length: tokens in a sequence.
        tokenizer: the tokenizer of all texts.
        packed: several samples may share a sequence; positions start at 0 in each.
    """

    entry: CacheEntry
    spans: dict[str, tuple[str, int, int]]
    sequence_length: int
    tokenizer: Tokenizer
    packed: bool

    @property
    def entries(self) -> tuple[CacheEntry, ...]:
        """Cache entries whose files a host needs."""
        return (self.entry,)

    def with_entries(self, change: Callable[[CacheEntry], CacheEntry]) -> Self:
        """Return a copy in which the cache entry is replaced by `change(entry)`."""
        return replace(self, entry=change(self.entry))

    def content(self, split: str) -> list[Any]:
        """Return a split's place in the cache entry, and the checksums of the arrays there."""
        span = self.spans[split]
        checksums = [self.entry.checksum(span[0] + each) for each in ("", "_answers", "_samples", "_sequences")]
        return [["", [*span, *checksums]], ["spans", span]]

    @property
    def facts(self) -> DatasetFacts:
        """Size of the vocabulary.

        There is no padding id: sequences are filled up at their end, which causal attention hides from all tokens before it.
        """
        return DatasetFacts(vocabulary=self.tokenizer.vocabulary)

    def batch(self, split: str, step: int, size: int) -> tuple[Inputs, Tensor]:
        """Return token ids (with their positions, where samples are packed) and the next token's id where it belongs to an answer.

        All have shape (size, sequence_length); targets elsewhere are IGNORE.
        """
        name, first, _ = self.spans[split]
        chosen = self.chosen(split, step, size)
        ids, positions, targets = (np.full((size, self.sequence_length), fill, np.int64) for fill in (0, 0, IGNORE))
        for row, number in enumerate(chosen):
            if number >= 0:
                self._fill(name, first + int(number), ids[row], positions[row], targets[row])
        inputs = torch.from_numpy(ids)
        return (inputs, torch.from_numpy(positions)) if self.packed else inputs, torch.from_numpy(targets)

    def _fill(self, name: str, sequence: int, ids: np.ndarray, positions: np.ndarray, targets: np.ndarray) -> None:
        """Copy the samples of one sequence into a row of the batch's arrays."""
        tokens, answers, samples, sequences = (self.entry.array(name + part) for part in ("", "_answers", "_samples", "_sequences"))
        start = 0
        for sample in range(sequences[sequence], sequences[sequence + 1]):
            begin, end = samples[sample], samples[sample + 1]
            row = slice(start, start + int(end - begin) - 1)
            ids[row] = tokens[begin : end - 1]
            positions[row] = np.arange(end - begin - 1)
            targets[row] = np.where(answers[begin + 1 : end], tokens[begin + 1 : end].astype(np.int64), IGNORE)
            start = row.stop

    def count(self, split: str) -> int:
        """Return the number of sequences in a split."""
        _, first, last = self.spans[split]
        return last - first


def load_answers(settings: DataSettings, sequence_length: int, seed: int, tokenizer: Tokenizer | None = None) -> AnswerBatches:
    """Tokenise a table of conversations (`data.messages_field`) or of prompts and answers (`data.text_field`, `data.answer_field`).

    Raises:
        DataError: there is no table, or it lacks these columns; a row is broken and broken rows are not skipped; the tokenizer has no chat
            template; a sample is longer than `sequence_length` and `data.on_long` refuses that; no sample has an answer.
    """
    train, held_out = tables(settings)
    if is_made_from_text(settings.tokenizer) and tokenizer is None:
        raise DataError(
            f"data.tokenizer={settings.tokenizer} is made from a text, not from answers: give bytes, a tokenizers JSON, or a "
            "transformers name or folder"
        )
    tokenizer = tokenizer or load_tokenizer(settings.tokenizer)
    write = WriteAnswers(train, held_out, tokenizer, settings, sequence_length, read_template(settings))
    options = [write.template, settings.messages_field, settings.text_field, settings.answer_field, settings.documents, settings.on_long]
    stamps = [train.rows_stamp(), held_out and held_out.rows_stamp(), settings.on_error, settings.max_bytes, sequence_length, options]
    key = fingerprint("answers", stamps, *identity(tokenizer))
    entry = CacheEntry(key, write, settings.cache, f"samples of {train.name}").ensure_present()
    count = len(entry.array("train_sequences")) - 1
    if held_out is not None:
        spans = {"train": ("train", 0, count), "validation": ("validation", 0, len(entry.array("validation_sequences")) - 1)}
    else:
        kept = count_kept(count, settings.validation_fraction, train.name, "sequence", ", or set data.validation_path")
        spans = {"train": ("train", 0, kept), "validation": ("train", kept, count)}
    return AnswerBatches(
        entry=entry, spans=spans, sequence_length=sequence_length, order=SampleOrder(seed, settings.sampling), tokenizer=tokenizer,
        packed=settings.documents == "packed", skipped=entry.metadata["skipped"],
    )  # fmt: skip


def read_template(settings: DataSettings) -> str | None:
    """Return the chat template that the settings name; None: use the tokenizer's own."""
    if settings.chat_template is None:
        return None
    path = local_path(settings.chat_template, "data.chat_template")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template {path} cannot be read: {error}; give a file with a Jinja template") from None


@dataclass(frozen=True)
class _Sample:
    """Token ids of a row, a mask of those that belong to an answer, and the row's place for errors."""

    ids: np.ndarray
    answers: np.ndarray
    place: str


@dataclass(frozen=True)
class WriteAnswers:
    """Writes the tokenised samples of a table into a cache entry."""

    train: Table
    held_out: Table | None
    tokenizer: Tokenizer
    settings: DataSettings
    length: int
    template: str | None

    def __call__(self, writer: CacheWriter) -> None:
        """Write the arrays that `AnswerBatches` reads."""
        bad_rows = BadRows(self.settings.on_error == "skip")
        for name, table in (("train", self.train), ("validation", self.held_out)):
            if table is None:
                continue
            if not self._write_split(writer, name, self._fitting(self._samples(table, bad_rows), bad_rows)):
                left_out = f" ({bad_rows.counts} were left out)" if bad_rows.counts else ""
                raise DataError(f"{table.name} has no sample with an answer{left_out}: give some, or raise sequence_length={self.length}")
        writer.metadata["skipped"] = bad_rows.counts

    def _write_split(self, writer: CacheWriter, name: str, samples: Iterator[_Sample]) -> int:
        """Write a split's arrays and return the number of its samples."""
        dtype, packed = smallest_dtype(self.tokenizer.vocabulary), self.settings.documents == "packed"
        writer.append(f"{name}_samples", np.zeros(1, np.int64))
        writer.append(f"{name}_sequences", np.zeros(1, np.int64))
        tokens, count, used = 0, 0, 0
        for some in chunks(samples, AT_ONCE):
            ends, begun = tokens + np.cumsum([len(sample.ids) for sample in some]), []
            for number, sample in enumerate(some, count):
                taken = len(sample.ids) - 1
                if number and (not packed or used + taken > self.length):
                    begun.append(number)
                    used = 0
                used += taken
            writer.append(name, np.concatenate([sample.ids for sample in some]).astype(dtype))
            writer.append(f"{name}_answers", np.concatenate([sample.answers for sample in some]))
            writer.append(f"{name}_samples", ends)
            writer.append(f"{name}_sequences", np.array(begun, np.int64))
            tokens, count = int(ends[-1]), count + len(some)
        writer.append(f"{name}_sequences", np.array([count], np.int64))
        return count

    def _fitting(self, samples: Iterable[_Sample], bad_rows: BadRows) -> Iterator[_Sample]:
        """Yield the samples that have something to predict and fit in a sequence, cutting long ones if the settings say so."""
        room, long = self.length + 1, self.settings.on_long
        for sample in samples:
            size = len(sample.ids)
            if size > room:
                if long == "refuse":
                    raise DataError(
                        f"{sample.place} has {size} tokens, more than sequence_length={self.length} and the last target: raise it, or set "
                        "data.on_long to cut or skip"
                    )
                bad_rows.count_skipped("long samples" if long == "skip" else "ends of long samples")
                if long == "skip":
                    continue
                sample = _Sample(sample.ids[:room], sample.answers[:room], sample.place)
            if not sample.answers[1:].any():
                bad_rows.count_skipped("samples without an answer" if size <= room else "samples whose answer is beyond sequence_length")
                continue
            yield sample

    def _samples(self, table: Table, bad_rows: BadRows) -> Iterator[_Sample]:
        """Yield a table's rows as samples; broken rows are refused or counted."""
        settings, limit = self.settings, table.max_bytes
        split = table.open()
        if settings.messages_field is not None:
            split.require({"data.messages_field": settings.messages_field})
            chat = ChatTemplate.of(self.tokenizer, self.template, split.source)
            for place, (messages,) in up_to(limit, split.rows(settings.messages_field), _bytes_in_row):
                if fault := fault_of(messages):
                    bad_rows.refuse_or_count("rows", f"{place}: column {settings.messages_field!r} {fault}")
                    continue
                yield _Sample(*chat.encode(messages, place), place)
            return
        assert settings.answer_field is not None
        fields = {"data.text_field": settings.text_field, "data.answer_field": settings.answer_field}
        split.require(fields)
        columns = tuple(fields.values())
        rows = up_to(limit, split.rows(*columns), _bytes_in_row)
        whole = ((place, values) for place, values in rows if _is_text(place, values, columns, bad_rows))
        for some in chunks(whole, AT_ONCE):
            yield from self._pairs(some)

    def _pairs(self, rows: list[tuple[str, tuple[Any, ...]]]) -> Iterator[_Sample]:
        """Join prompts with their answers, between the bos and eos of the tokenizer's model where it has them."""
        begin, end = self.tokenizer.bos, self.tokenizer.eos
        prompts, answers = (self.tokenizer.encode_all([texts[side] for _, texts in rows]) for side in (0, 1))
        for (place, _), prompt, answer in zip(rows, prompts, answers, strict=True):
            first = [*([] if begin is None else [begin]), *prompt]
            last = [*answer, *([] if end is None else [end])]
            yield _Sample(np.array([*first, *last], np.int64), np.repeat([False, True], (len(first), len(last))), place)


def _is_text(place: str, texts: tuple[Any, ...], fields: tuple[str, ...], bad_rows: BadRows) -> bool:
    """True if all columns of a row hold text; otherwise the row is refused or counted."""
    for text, column in zip(texts, fields, strict=True):
        if not isinstance(text, str):
            kind = "nothing" if text is None else type(text).__name__
            bad_rows.refuse_or_count("rows", f"{place}: column {column!r} holds {kind}, not text")
            return False
    return True


def _bytes_in_row(row: tuple[str, tuple[Any, ...]]) -> int:
    return bytes_in(row[1])


def bytes_in(value: Any) -> int:
    """Return the size in bytes (UTF-8) of all texts in a row's columns, or in a conversation."""
    if isinstance(value, str):
        return len(value.encode())
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(bytes_in(part) for part in parts)


def fault_of(messages: Any) -> str | None:
    """Return what is wrong with a conversation; None if nothing is."""
    if not isinstance(messages, list) or not messages:
        return f"holds {'nothing' if not messages else type(messages).__name__}, not a list of messages"
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            return f"has a message that is not {{role: text, content: text}}: {str(message)[:80]}"
    if all(message["role"] != ASSISTANT for message in messages):
        return f"has no message of role {ASSISTANT}, so there is nothing to predict"
    return None


@dataclass(frozen=True)
class ChatTemplate:
    """Writes conversations as text by a chat template of transformers, and finds the assistant's turns in it.

    Attributes:
        tokenizer: a fast tokenizer of transformers.
        template: a Jinja template; None: the tokenizer's own.
        marks: True if the template itself marks the assistant's turns, by {% generation %}.
    """

    tokenizer: Any
    template: str | None
    marks: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer, template: str | None, source: str) -> "ChatTemplate":
        """Return the chat template of a tokenizer, or the one that is given in its place.

        Raises:
            DataError: the tokenizer has none, or cannot tell which characters a token stands for.
        """
        own = tokenizer._tokenizer if isinstance(tokenizer, Pretrained) else None
        known = template or getattr(own, "chat_template", None)
        if own is None or not getattr(own, "is_fast", False) or not known:
            raise DataError(
                f"{source} has conversations, and data.tokenizer no chat template that could write them: give a transformers name or "
                "folder that has one, set data.chat_template to a file with one, or give columns (data.text_field, data.answer_field)"
            )
        return cls(own, template, "{% generation" in str(known) or "{%- generation" in str(known))

    def encode(self, messages: list[dict[str, Any]], place: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a conversation's token ids and a mask of those in the assistant's turns.

        Raises:
            DataError: the template refuses the conversation, or writes a turn differently once others follow, so that it cannot be found.
        """
        try:
            if self.marks:
                encoding = self.tokenizer.apply_chat_template(
                    messages, chat_template=self.template, return_dict=True, return_assistant_tokens_mask=True
                )
                return np.array(encoding["input_ids"], np.int64), np.array(encoding["assistant_masks"], bool)
            text = self._render(messages)
            spans = [self._span(messages, turn, text, place) for turn, message in enumerate(messages) if message["role"] == ASSISTANT]
        except DataError:
            raise
        except Exception as error:  # templates raise whatever they like
            raise DataError(f"{place}: the chat template refuses this conversation: {error}") from None
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        begins, ends = np.array(encoding["offset_mapping"], np.int64).reshape(-1, 2).T
        answers = np.zeros(len(begins), bool)
        for begin, end in spans:
            answers |= (begins >= begin) & (ends <= end) & (begins < ends)
        return np.array(encoding["input_ids"], np.int64), answers

    def _render(self, messages: list[dict[str, Any]], *, answering: bool = False) -> str:
        return str(
            self.tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False, add_generation_prompt=answering)
        )

    def _span(self, messages: list[dict[str, Any]], turn: int, text: str, place: str) -> tuple[int, int]:
        """Return the range of characters of an assistant's turn: from the end of the generation prompt through the turn's end marker."""
        before, behind = self._render(messages[:turn], answering=True), self._render(messages[: turn + 1])
        if not text.startswith(behind) or not behind.startswith(before):
            raise DataError(
                f"{place}: the chat template writes message {turn} differently once others follow, so its tokens cannot be found: give "
                "conversations that end with their only answer, or a template with {% generation %} in data.chat_template"
            )
        return len(before), len(behind)
