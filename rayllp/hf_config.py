"""Sizes and types that a pretrained checkpoint fixes. They are read from its config.json, so that they need not be set again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayllp.errors import CheckpointError, SettingsError

SIZES = {
    "width": ("hidden_size", "d_model", "n_embd", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"),
    "feed_forward": ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "hidden_dim", "encoder_ffn_dim"),
    "kv_heads": ("num_key_value_heads",),
    "patch_size": ("patch_size",),
    "encoder_layers": ("encoder_layers",),
}
"""For each of our model settings, the names that transformers' configurations use for it."""
LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
"""Names that these configurations use for the number of layers."""
LISTED = ("layer_types", "mlp_layer_types")
"""Entries of these configurations that are lists with one item for each layer."""


@dataclass(frozen=True)
class TaskNames:
    """What transformers and peft call a task, and how its data use a tokenizer.

    Attributes:
        auto: transformers' auto class.
        classes: the table of transformers.models.auto.modeling_auto that has the classes of all model types.
        endings: how the names of these classes end.
        peft: peft's task type; None if it has none.
        tokenizer: True if the data are text that a tokenizer has read.
        framed: True if the data put special tokens around each sentence.
    """

    auto: str
    classes: str
    endings: tuple[str, ...]
    peft: str | None = None
    tokenizer: bool = True
    framed: bool = False


TASKS = {
    "causal": TaskNames("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", ("ForCausalLM", "LMHeadModel"), "CAUSAL_LM"),
    "masked": TaskNames("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES", ("ForMaskedLM",), framed=True),
    "words": TaskNames(
        "AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", ("ForTokenClassification",), "TOKEN_CLS",
        tokenizer=False,
    ),
    "sentences": TaskNames(
        "AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", ("ForSequenceClassification",), "SEQ_CLS",
        framed=True,
    ),
    "images": TaskNames(
        "AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", ("ForImageClassification",), tokenizer=False
    ),
    "translation": TaskNames(
        "AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", ("ForConditionalGeneration",), "SEQ_2_SEQ_LM", framed=True
    ),
}  # fmt: skip
"""The tasks, by the value of model.head that selects them."""


def read_config(source: str) -> dict[str, Any]:
    """Return a checkpoint's config.json.

    Args:
        source: a folder, or a name that the Hugging Face cache or hub knows.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = Path(source) / "config.json"
    try:
        if not Path(source).is_dir():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(source, "config.json"))
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except Exception as error:  # the hub's client raises whatever its connections do
        if Path(source).is_dir():
            raise CheckpointError(
                f"model.from_pretrained {source} is a folder here, and its config.json cannot be read ({type(error).__name__}): give one "
                "written by `rayllp export` or save_pretrained; for the model of that name on the hub, call the folder something else"
            ) from None
        raise CheckpointError(
            f"model.from_pretrained {source}: no config.json there that could be read ({type(error).__name__}); give a folder written by "
            "`rayllp export` or save_pretrained, or a model's name where there is a network"
        ) from None


def transformers_config(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the transformers configuration in a config.json: its entry transformers_config, or all of it if there is none."""
    return dict(stored.get("transformers_config", stored))


def layer_sources(here: int, there: int, open_: int = 0, close: int = 0) -> tuple[int, ...]:
    """Return, for each of `here` layers, the layer of a checkpoint with `there` layers that it is initialised from.

    Fewer layers are taken from the checkpoint at equal distances, the first and the last among them. For more layers each middle layer is
    repeated several times in a row, as in nested iteration (arXiv:1912.08974).

    Args:
        open_, close: number of buffer layers at each end, which are not repeated.

    Raises:
        SettingsError: more layers are wanted, and the middle ones are no multiple of the checkpoint's.
    """
    if here <= there:
        return tuple(round(n * (there - 1) / max(here - 1, 1)) for n in range(here))
    middle, wanted = there - open_ - close, here - open_ - close
    if middle < 1 or wanted % middle:
        nearest = ", ".join(str(there + factor * middle) for factor in (1, 2, 3)) if middle > 0 else "fewer buffers"
        raise SettingsError(
            f"model.layers={here} and a checkpoint of {there} layers, {max(middle, 0)} of which are not buffers and could be repeated: "
            f"set model.layers to {there} or fewer, or to {nearest}"
        )
    middles = (open_ + n // (wanted // middle) for n in range(wanted))
    return (*range(open_), *middles, *range(there - close, there))


def count_layers(config: Mapping[str, Any]) -> int | None:
    """Return the number of layers in a transformers configuration, encoder and decoder together; None if it does not say."""
    if config.get("num_decoder_layers"):  # T5's
        return int(config["num_layers"] + config["num_decoder_layers"])
    if config.get("encoder_layers") and config.get("decoder_layers"):
        return int(config["encoder_layers"] + config["decoder_layers"])
    return next((int(config[name]) for name in LAYERS if name in config), None)


def with_sources(config: Mapping[str, Any], sources: Sequence[int]) -> dict[str, Any]:
    """Return the transformers configuration of a model whose layers are those numbered `sources` in the given configuration's model.

    Raises:
        SettingsError: the model is an encoder–decoder, or its configuration has no known name for the number of layers.
    """
    if config.get("is_encoder_decoder") or not any(name in config for name in LAYERS):
        raise SettingsError(
            f"model.layers={len(sources)} and a checkpoint of {count_layers(config)} layers: an encoder–decoder keeps all its layers; "
            "leave model.layers out"
        )
    listed = {name: [config[name][source] for source in sources] for name in LISTED if config.get(name) is not None}
    return {**config, **listed, **{name: len(sources) for name in LAYERS if name in config}}


def sizes_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes that a transformers configuration has, by the names of our settings of the model."""
    found = {ours: next((config[name] for name in names if config.get(name) is not None), None) for ours, names in SIZES.items()}
    if config.get("num_decoder_layers"):  # T5's
        found["encoder_layers"] = config["num_layers"]
    return {name: size for name, size in {**found, "layers": count_layers(config)}.items() if size is not None}


def with_layers(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return a transformers configuration with `layers` layers. The number is set under the name that the configuration has for it."""
    listed = {name for name in LISTED if config.get(name) is not None and len(config[name]) != layers}  # transformers derives it
    kept = {name: value for name, value in config.items() if name not in listed}
    return {**kept, **{name: layers for name in LAYERS if name in config}}


def _kind_of(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, str]:
    """Return model.architecture and model.head of a stored model.

    Empty if the user has set a family; without model.head if the stored class has no known task.
    """
    if given.get("family") is not None:
        return {}
    found = {"architecture": str(config.get("model_type", ""))}
    stored = str((config.get("architectures") or [""])[0])
    return found | next(({"head": task} for task, names in TASKS.items() if stored.endswith(names.endings)), {})


def with_pretrained_sizes(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `values` with the sizes, Δt and buffers of model.from_pretrained wherever the user has set none."""
    model = values.get("model")
    source = model.get("from_pretrained") if isinstance(model, Mapping) else None
    if not source or not isinstance(model, Mapping) or {"layers", "width", "heads", *SIZES} <= set(model):
        return values  # a run's own config.yaml has all of them, and its checkpoint may be gone
    stored = read_config(str(source))
    config = transformers_config(stored)
    sizes = sizes_in(config)
    layers = sizes.get("layers")
    steps = stored.get("steps") or {"step": {"middle": 1.0, "buffer": 1.0}, "buffers": {"open": 0, "close": 0}}
    sizes |= _kind_of(config, model)
    given = {group: dict(values.get(group) or {}) for group in ("step", "buffers")}
    merged = {group: {**steps[group], **given[group]} for group in given}
    wanted = model.get("layers")
    if isinstance(wanted, int) and layers and wanted > layers and "middle" not in given["step"]:
        # A layer that is repeated k times takes k steps, each of a k-th of the original time.
        sources = layer_sources(wanted, layers, merged["buffers"]["open"], merged["buffers"]["close"])
        merged["step"]["middle"] /= sources.count(sources[merged["buffers"]["open"]])
    return {**values, **merged, "model": {**sizes, **dict(model)}}
