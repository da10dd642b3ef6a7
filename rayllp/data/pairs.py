"""Translation: pairs of lines in two languages."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayllp.config import DataSettings
from rayllp.data.base import IGNORE, Dataset, DatasetFacts
from rayllp.data.datasets_io import HELD_OUT_SPLITS, Split, is_table, load_split, load_splits, named, up_to
from rayllp.data.files import BadRows, RaggedArray, bytes_of, hold_out, local_path, plain_or_gz, read_lines
from rayllp.data.sampling import SampleOrder
from rayllp.data.sources import tables
from rayllp.data.special_tokens import SpecialTokens
from rayllp.data.tokenizer import load_tokenizer
from rayllp.data.tokenizer_kinds import Tokenizer
from rayllp.errors import DataError

VALIDATION_NAMES = HELD_OUT_SPLITS[:-1]
"""Names that the files of the held-out set may have. Test sets are read too, as splits of their own."""
TRANSLATION = "translation"
"""Column that data sets of translations have; it maps each language to a text."""


@dataclass(frozen=True)
class _Pair:
    """A line, its translation, and its place (file:line) for errors."""

    source: str
    target: str
    place: str


@dataclass(frozen=True)
class _Side:
    """One language of a split: its lines, and their ids, each ended by eos."""

    lines: list[str]
    ids: RaggedArray


@dataclass(frozen=True, kw_only=True)
class PairBatches(Dataset):
    """Lines and their translations, as ids of one vocabulary; targets are the translations.

    Attributes:
        sides: for each split, source and target language. Splits are train, validation, and any test sets by name.
        sequence_length: largest number of tokens in a line, eos included.
        tokenizer: the tokenizer of both languages.
    """

    sides: dict[str, tuple[_Side, _Side]]
    sequence_length: int
    tokenizer: Tokenizer

    @property
    def special(self) -> SpecialTokens:
        """The special tokens that go with the tokenizer; cls serves as bos and sep as eos."""
        return SpecialTokens.of(self.tokenizer)

    @property
    def facts(self) -> DatasetFacts:
        """Size of the vocabulary, and the ids of padding, bos and eos."""
        special = self.special
        return DatasetFacts(vocabulary=special.vocabulary, pad=special.pad, bos=special.cls, eos=special.sep)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits: train, validation, then any test sets."""
        return tuple(self.sides)

    def batch(self, split: str, step: int, size: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Return (source ids, decoder input ids) and target ids, all of shape (size, sequence_length).

        The decoder's input is the target shifted right by one: bos, then all tokens before eos.
        """
        source, target = self.sides[split]
        special = self.special
        indices = self.chosen(split, step, size)
        source_BS = source.ids.padded(indices, self.sequence_length, special.pad)
        # Attention needs at least one token that is not padding, so rows beyond the end hold sep.
        source_BS[indices < 0, 0] = special.sep
        targets_BT = target.ids.padded(indices, self.sequence_length, IGNORE)
        return (torch.from_numpy(source_BS), torch.from_numpy(self._shift(targets_BT))), torch.from_numpy(targets_BT)

    def _shift(self, targets_BT: np.ndarray) -> np.ndarray:
        """Return the decoder's input for these targets: bos, then all tokens but the last (eos)."""
        special = self.special
        shifted_BT = np.full_like(targets_BT, special.pad)
        shifted_BT[:, 0] = special.cls
        before_BT = targets_BT[:, :-1]
        shifted_BT[:, 1:] = np.where((before_BT == IGNORE) | (before_BT == special.sep), special.pad, before_BT)
        return shifted_BT

    def count(self, split: str) -> int:
        """Return the number of pairs in a split."""
        return len(self.sides[split][0].ids)

    def content(self, split: str) -> list[Any]:
        """Return the lines and ids of both languages of a split."""
        return [["sides", [[side.lines, side.ids.parts] for side in self.sides[split]]]]

    def sources(self, split: str) -> list[str]:
        """Return the lines of the source language, as they were read."""
        return self.sides[split][0].lines

    def references(self, split: str) -> list[str]:
        """Return the reference translations, as they were read."""
        return self.sides[split][1].lines

    def encode_source(self, lines: list[str]) -> Tensor:
        """Return ids of shape (lines, sequence_length); each line is cut to fit, ended by eos and padded.

        Raises:
            DataError: the tokenizer has no token for a character.
        """
        try:
            rows = RaggedArray.of(_truncate(_encode(self.special, line), self.sequence_length) for line in lines)
        except KeyError as error:
            raise DataError(f"{_unknown(error)}: leave it out of the line") from None
        return torch.from_numpy(rows.padded(np.arange(len(lines)), self.sequence_length, self.special.pad))

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids up to the first eos, without special tokens."""
        end = ids.index(self.special.sep) if self.special.sep in ids else len(ids)
        return self.special.decode(ids[:end])


def load_pairs(settings: DataSettings, sequence_length: int, seed: int, tokenizer: Tokenizer | None = None) -> PairBatches:
    """Read both languages, make one tokenizer for them if the settings ask for it, and tokenise.

    Pairs with an empty line are left out. A pair with more than sequence_length - 1 tokens in one language is left out of training, and cut
    in other splits.

    Raises:
        DataError: files are missing or broken, the two languages have different numbers of lines, or no pair is left; a character is not in
            the tokenizer's alphabet and bad rows are not skipped.
    """
    path = None if settings.path is None else local_path(settings.path, "data.path")
    from_table = bool(settings.dataset) or (path is not None and path.exists() and is_table(path))
    if settings.validation_path and not from_table:
        raise DataError(
            f"data.validation_path {settings.validation_path} is not read for translation: leave it out; "
            f"val.{settings.source} and val.{settings.target} in data.path, or the data set's own split, are held out"
        )
    bad_rows = BadRows(settings.on_error == "skip")
    skipped = bad_rows.counts
    read = _read_dataset(settings, bad_rows) if from_table else _read_folder(settings)
    kept = {split: _leave_out_empty(pairs, bad_rows) for split, pairs in read.items()}
    lines = [pair.source for pair in kept["train"]] + [pair.target for pair in kept["train"]]
    tokenizer = tokenizer or load_tokenizer(settings.tokenizer, ["\n".join(lines)])
    special = SpecialTokens.of(tokenizer)
    sides: dict[str, tuple[_Side, _Side]] = {}
    for split, pairs in kept.items():
        sides[split] = _encode_pairs(pairs, special, sequence_length, split == "train", bad_rows)
        if not sides[split][0].lines:
            raise DataError(
                f"no pair of split {split} is left, {skipped} were left out: give more or shorter lines, or raise "
                f"sequence_length={sequence_length}"
            )
    order = SampleOrder(seed, settings.sampling)
    return PairBatches(sides=sides, sequence_length=sequence_length, order=order, tokenizer=tokenizer, skipped=skipped)


# Tokens -----------------------------------------------------------------------------------------------------------------------


def _leave_out_empty(pairs: list[_Pair], bad_rows: BadRows) -> list[_Pair]:
    kept = [pair for pair in pairs if pair.source.strip() and pair.target.strip()]
    bad_rows.count_skipped("empty lines", len(pairs) - len(kept))
    return kept


def _encode_pairs(pairs: list[_Pair], special: SpecialTokens, length: int, training: bool, bad_rows: BadRows) -> tuple[_Side, _Side]:
    """Tokenise both languages of a split; training pairs that are too long are left out."""
    kept: list[_Pair] = []
    encoded: list[tuple[np.ndarray, np.ndarray]] = []
    for pair in pairs:
        try:
            source, target = (_encode(special, line) for line in (pair.source, pair.target))
        except KeyError as error:
            bad_rows.refuse_or_count("characters", f"{pair.place}: {_unknown(error)}")
            continue
        if training and max(len(source), len(target)) > length:
            bad_rows.count_skipped("long pairs")
            continue
        kept.append(pair)
        encoded.append((_truncate(source, length), _truncate(target, length)))
    sources = _Side([pair.source for pair in kept], RaggedArray.of(source for source, _ in encoded))
    return sources, _Side([pair.target for pair in kept], RaggedArray.of(target for _, target in encoded))


def _encode(special: SpecialTokens, line: str) -> np.ndarray:
    """Return a line's ids, followed by eos."""
    return np.append(special.encode(line), special.sep).astype(np.int32)


def _truncate(ids: np.ndarray, length: int) -> np.ndarray:
    """Cut to at most `length` ids, of which the last is still eos."""
    return ids if len(ids) <= length else np.append(ids[: length - 1], ids[-1])


def _unknown(error: KeyError) -> str:
    return f"{error.args[0]!r} is in no training line, so data.tokenizer=characters has no token for it (bytes and bpe:SIZE have)"


# Files and data sets ----------------------------------------------------------------------------------------------------------


def _read_folder(settings: DataSettings) -> dict[str, list[_Pair]]:
    """Read the pairs of each split from the files of a folder."""
    source, target = settings.source, settings.target
    files = f"train.{source}, train.{target}, val.{source} and val.{target} (plain or .gz)"
    if settings.path is None:
        raise DataError(f"translation needs data.path, a folder with {files} or a table, or data.dataset with a column translation")
    folder = local_path(settings.path, "data.path")
    if not folder.is_dir():
        raise DataError(f"data.path {folder} is not a folder: give one with {files}")
    validation = next((name for name in VALIDATION_NAMES if plain_or_gz(folder / f"{name}.{source}")), None)
    if validation is None:
        tried = ", ".join(f"{name}.{source}" for name in VALIDATION_NAMES)
        raise DataError(f"data.path {folder} has no validation file ({tried}): give a folder with {files}")
    names = {path.name.removesuffix(".gz").removesuffix(f".{source}") for path in folder.glob(f"test*.{source}*")}
    tests = sorted(name for name in names if plain_or_gz(folder / f"{name}.{source}"))
    stems = {"train": "train", "validation": validation} | {name: name for name in tests}
    return {split: _read_files(folder, stem, settings) for split, stem in stems.items()}


def _read_files(folder: Path, stem: str, settings: DataSettings) -> list[_Pair]:
    paths = []
    for language in (settings.source, settings.target):
        path = plain_or_gz(folder / f"{stem}.{language}")
        if path is None:
            raise DataError(f"data.path {folder} has no {stem}.{language}, nor a .gz of it: add it, or set data.source and data.target")
        paths.append(path)
    sources, targets = (read_lines(path, "data.path") for path in paths)
    if len(sources) != len(targets):
        raise DataError(
            f"data.path {paths[0]} has {len(sources)} lines, {paths[1]} has {len(targets)}: each line must be the "
            "translation of the same line in the other; give files that belong together"
        )
    pairs = (_Pair(source, target, f"{paths[0]}:{number}") for number, (source, target) in enumerate(zip(sources, targets, strict=True), 1))
    return _limit(pairs, settings, str(paths[0]))


def _limit(pairs: Iterable[_Pair], settings: DataSettings, where: str) -> list[_Pair]:
    """Return the first pairs, up to data.max_bytes of both languages, line ends included."""
    kept = list(up_to(settings.max_bytes, pairs, lambda pair: bytes_of((pair.source, pair.target))))
    if not kept:
        raise DataError(f"{where} has no pair within data.max_bytes={settings.max_bytes}: raise it, or give lines")
    return kept


def _read_dataset(settings: DataSettings, bad_rows: BadRows) -> dict[str, list[_Pair]]:
    """Read the pairs of each split from a data set or table."""
    train, held_out = tables(settings)
    pairs = {"train": _read_split(train.open(), settings, bad_rows)}
    if held_out is None:
        pairs = dict(zip(("train", "validation"), hold_out(pairs["train"], settings.validation_fraction, named(settings)), strict=True))
    else:
        pairs["validation"] = _read_split(held_out.open(), settings, bad_rows)
    if (held_out is None or held_out.split != "test") and "test" in load_splits(train.settings, stream=True):
        pairs["test"] = _read_split(load_split(train.settings, "data.split", "test", stream=True), settings, bad_rows)
    return pairs


def _read_split(split: Split, settings: DataSettings, bad_rows: BadRows) -> list[_Pair]:
    languages = (settings.source, settings.target)
    if TRANSLATION in split.columns:
        rows = ((place, translation) for place, (translation,) in split.rows(TRANSLATION))
    elif set(languages) <= set(split.columns):
        rows = ((place, dict(zip(languages, texts, strict=True))) for place, texts in split.rows(*languages))
    else:
        raise DataError(
            f"{split.source} has columns {split.columns}, neither {TRANSLATION} nor {languages[0]} and {languages[1]}: "
            "set data.source and data.target, or choose another data set"
        )
    pairs = (_pick(texts, languages, place, bad_rows) for place, texts in rows)
    return _limit((pair for pair in pairs if pair is not None), settings, split.source)


def _pick(texts: Any, languages: tuple[str, str], place: str, bad_rows: BadRows) -> _Pair | None:
    """Return the pair of texts in a row; None where one is missing and bad rows are skipped."""
    if texts is None or (isinstance(texts, dict) and any(texts.get(language, "") is None for language in languages)):
        bad_rows.refuse_or_count("rows", f"{place} has nothing in {languages[0]} or {languages[1]}")
        return None
    holds = sorted(texts) if isinstance(texts, dict) else f"a {type(texts).__name__}"
    source, target = (texts.get(language) if isinstance(texts, dict) else None for language in languages)
    if not isinstance(source, str) or not isinstance(target, str):
        raise DataError(f"{place} holds {holds}, no text for each of {languages[0]} and {languages[1]}: set data.source and data.target")
    return _Pair(source, target, place)
