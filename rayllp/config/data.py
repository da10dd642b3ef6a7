"""The settings of the data."""

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from rayllp.config.base import Settings


class SourceSettings(Settings):
    """Where a data set is, and which of its columns are read."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    path: str | None = Field(
        None, description="file or folder (.gz allowed): text, or tables (json, csv, parquet, arrow, save_to_disk); none: an embedded set"
    )
    validation_path: str | None = Field(None, description="held-out file; none: as data.validation_split says")
    dataset: str | None = Field(None, description="a Hugging Face `datasets` name or a folder written by save_to_disk")
    subset: str | None = Field(None, description="the data set's configuration name")
    split: str = Field("train", description="the data set's split to train on")
    validation_split: str | None = Field(
        None, description="its held-out split; none: its own (validation, valid, val, dev or test), else the end of data.split or data.path"
    )
    max_bytes: int | None = Field(None, ge=1, description="text, pairs or lines beyond this size are not read")
    text_field: str = Field("text", description="column that holds the text (a number for a file without column names)")
    messages_field: str | None = Field(
        None, description="fine-tuning: column of conversations, lists of {role, content}; loss on the assistant's messages alone"
    )
    answer_field: str | None = Field(None, description="fine-tuning: column of the answer to data.text_field; loss on it alone")


class SetSettings(SourceSettings):
    """Settings of one of several data sets that are mixed (`data.sets`), as far as they differ from `data`."""

    weight: float = Field(1.0, gt=0, description="how often its samples are taken, beside the others' weights")

    @model_validator(mode="after")
    def _one_source(self) -> "SetSettings":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("each of data.sets needs either path or dataset")
        return self


class DataSettings(SourceSettings):
    """What is trained on. The format that is read follows from model.family and model.head (docs/families.md)."""

    sets: tuple[SetSettings, ...] = Field(
        (), description="several texts, mixed: each {path or dataset, weight, and what else differs: split, text_field, answer_field, …}"
    )
    streaming: bool = Field(False, description="read a `datasets` name as a stream, up to data.max_bytes, instead of downloading it whole")
    chat_template: str | None = Field(None, description="a file with a Jinja template for conversations; none: the tokenizer's own")
    on_long: Literal["cut", "skip", "refuse"] = Field(
        "cut", description="an answer or sentence longer than sequence_length: cut, leave out (both counted), or stop"
    )
    pair_field: str | None = Field(None, description="column of the second sentence of a pair")
    label_field: str = Field("label", description="column of the label (a number without column names); for words upos, xpos or feats")
    source: str = Field("de", description="language translated from: a file's ending or a data set's key")
    target: str = Field("en", description="language translated to")
    tokenizer: str = Field(
        "bytes", description="bytes, characters, bpe:SIZE (trained on the text), a tokenizers JSON, a transformers name or folder"
    )
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="share of the end that is held out where no file or split is")
    sampling: Literal["epochs", "replacement"] = Field(
        "epochs", description="epochs: every sample once before any comes again, each epoch in another order; replacement: drawn from all"
    )
    documents: Literal["joined", "packed"] = Field(
        "joined", description="texts (files, rows): one stream; or each by itself, with positions of its own and no attention across"
    )
    cache: str | None = Field(None, description="folder on each host for what is made of the data once; default ~/.cache/rayllp")
    mask_fraction: float = Field(0.2, gt=0, lt=1, description="of the tokens that bert is to guess")
    min_count: int = Field(1, ge=1, description="occurrences that give a word its own entry in the vocabulary (words)")
    on_error: Literal["refuse", "skip"] = Field("refuse", description="a broken line or unseen label: stop, or leave it out and say so")
    on_change: Literal["refuse", "accept"] = Field(
        "refuse", description="a run goes on, and what the settings name holds other data: stop, or go on with these and say so"
    )

    @model_validator(mode="after")
    def _one_source(self) -> "DataSettings":
        if self.path and self.dataset:
            raise ValueError("data.path and data.dataset are both set: choose one")
        if self.sets and (self.path or self.dataset):
            raise ValueError("data.sets names all sets: leave data.path and data.dataset out")
        if self.messages_field and self.answer_field:
            raise ValueError("data.messages_field and data.answer_field are both set: choose one")
        if self.validation_path and self.validation_split:
            raise ValueError("data.validation_path and data.validation_split are both set: choose one")
        return self
