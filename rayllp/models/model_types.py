"""transformers' model types: build their configurations from our settings, and look up their classes by task."""

import difflib
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from rayllp.config import TrainConfig
from rayllp.config.network import Task
from rayllp.data.base import DatasetFacts
from rayllp.errors import CheckpointError, SettingsError
from rayllp.hf_config import count_layers, layer_sources, with_sources
from rayllp.models.post_ln import STORED_POST_LN, refuse_post_ln

CLASSES: dict[Task, Mapping[str, Any]] = {
    "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "words": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "sentences": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "images": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "translation": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
"""Class names by model type, for each task."""
SIZES = {
    "hidden_size": ("hidden_size", "d_model", "n_embd", "dim"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "hidden_dim"),
}
MOST_UNUSED = 64
"""An embedding may have this many rows without a token, or a twentieth of its rows if that is more; else it is another tokenizer's."""
OUTSIDE = ("use_cache", "output_router_logits")
"""Fields that have to be off: caches are for generation only, and router losses need the outputs of all layers at once."""


def model_class(model_type: str, task: Task) -> type[PreTrainedModel]:
    """Return transformers' class of a model type for a task.

    Raises:
        SettingsError: there is no such type (the message names similar ones), or it has no class for this task (it names those it has).
    """
    name = CLASSES[task].get(model_type)
    if name is None:
        check_type(model_type)
        tasks = [each for each, classes in CLASSES.items() if model_type in classes]
        raise SettingsError(
            f"transformers has no {model_type} for model.head={task}: "
            + (f"set model.head to one of {', '.join(tasks)}" if tasks else "it has none that could be trained here; choose another type")
        )
    return getattr(transformers, name if isinstance(name, str) else name[0])


def any_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class that a stored configuration names, else the first that its type has for any task."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    return named or next(model_class(config.model_type, task) for task, classes in CLASSES.items() if config.model_type in classes)


def check_type(model_type: str) -> None:
    """Refuse a model type that transformers does not know."""
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING), 4, 0.5)
        raise SettingsError(
            f"model.architecture {model_type!r} is no model type of transformers {transformers.__version__}"
            + (f"; the nearest: {', '.join(near)}" if near else ": its documentation lists them")
        )


def check_model_type(stored: str, ours: str, source: str) -> None:
    """Refuse a checkpoint of another model type than the family's."""
    if stored == ours:
        return
    refuse_post_ln(stored, f"model.from_pretrained {source}: {stored}", STORED_POST_LN)
    raise SettingsError(
        f"model.from_pretrained {source} is a {stored or 'model of no type'}, but the family's model is a {ours}: set model.family to "
        "match, or add an adapter for it (docs/families.md)"
    )


def configuration(
    settings: TrainConfig, facts: DatasetFacts, resumed: Mapping[str, Any] | None, pretrained: Mapping[str, Any] | None
) -> PreTrainedConfig:
    """Return transformers' configuration of the model.

    Args:
        resumed: the configuration of a run that is resumed.
        pretrained: the configuration of the checkpoint to start from. Without either, a new one of the settings' sizes is made.

    Raises:
        SettingsError: there is no such model type, or it lacks a field.
        CheckpointError: the stored configuration is of another model type than the settings'.
    """
    model = settings.model
    stored = pretrained if resumed is None else resumed
    if stored is None:
        assert model.architecture is not None
        check_type(model.architecture)
        return _new(settings, facts)
    model_type = str(stored.get("model_type", ""))
    check_type(model_type)
    if model.architecture not in (None, model_type):
        raise CheckpointError(f"model.from_pretrained is a {model_type}, and model.architecture is {model.architecture}: leave it out")
    sizes = stored if resumed is not None else at_depth(stored, settings)
    config = CONFIG_MAPPING[model_type].from_dict({**sizes, **model.config_overrides})
    _check_vocabulary(config, settings, facts)
    return _adapted(config, settings, facts)


def at_depth(stored: Mapping[str, Any], settings: TrainConfig) -> dict[str, Any]:
    """Return a checkpoint's configuration, changed to as many layers as the settings ask for.

    Raises:
        SettingsError: that number cannot be made from the checkpoint's layers.
    """
    stored_layers, layers = count_layers(stored), settings.model.layers
    if stored_layers is None or stored_layers == layers:
        return dict(stored)
    return with_sources(stored, layer_sources(layers, stored_layers, settings.buffers.open, settings.buffers.close))


def is_table_of(rows: int, tokens: int) -> bool:
    """True if an embedding of so many rows may belong to a tokenizer; many are padded to a multiple that suits the hardware."""
    return 0 <= rows - tokens < max(MOST_UNUSED, rows // 20)


def labels_of(facts: DatasetFacts) -> dict[str, Any]:
    """Return transformers' configuration fields for the class names; empty if there are none."""
    if not facts.classes:
        return {}
    return {"id2label": dict(enumerate(facts.classes)), "label2id": {name: i for i, name in enumerate(facts.classes)}}


def _check_vocabulary(config: PreTrainedConfig, settings: TrainConfig, facts: DatasetFacts) -> None:
    """Refuse a tokenizer that does not belong to the checkpoint: ids beyond its embedding, or far too few for it."""
    rows, tokens = getattr(config.get_text_config(), "vocab_size", 0), facts.vocabulary
    if rows and tokens and not is_table_of(rows, tokens):
        raise CheckpointError(
            f"data.tokenizer={settings.data.tokenizer} has {tokens} tokens, and the embedding of model.from_pretrained {rows} rows: it is "
            "another model's; set data.tokenizer to the checkpoint's own (the same folder or name)"
        )


def _new(settings: TrainConfig, facts: DatasetFacts) -> PreTrainedConfig:
    """Return a new configuration of the settings' sizes."""
    model = settings.model
    kind = CONFIG_MAPPING[str(model.architecture)]
    if settings.model.task == "images" and "vision_config" in kind.sub_configs:  # CLIP and the like: only the vision half is trained
        vision = _sizes(settings, facts, kind.sub_configs["vision_config"]())
        return _adapted(_build(kind, {"vision_config": vision, **model.config_overrides}), settings, facts)
    plain = _build(kind, {})
    known = set(vars(plain)) | set(kind.attribute_map)
    if not known & set(SIZES["hidden_size"]):
        text = f"{model.architecture}_text"
        raise SettingsError(
            f"model.architecture {model.architecture} is made of several networks ({', '.join(kind.sub_configs)}), whose sizes are not "
            "settings: " + (f"choose {text}, or " if text in CONFIG_MAPPING else "") + "start from a checkpoint (model.from_pretrained)"
        )
    sizes = _sizes(settings, facts, plain)
    return _adapted(_build(kind, {**sizes, **_tokens(facts, plain), **model.config_overrides}), settings, facts)


def _sizes(settings: TrainConfig, facts: DatasetFacts, plain: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings' sizes under the field names that this kind of configuration uses."""
    model, known = settings.model, set(vars(plain)) | set(type(plain).attribute_map)
    wanted = {
        "hidden_size": model.width, "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads or model.heads,
        "head_dim": model.width // model.heads, "intermediate_size": model.feed_forward or 4 * model.width,
        "tie_word_embeddings": model.tie_embeddings, **_layers(plain, settings),
    }  # fmt: skip
    sizes: dict[str, Any] = {next((n for n in SIZES.get(name, (name,)) if n in known), name): value for name, value in wanted.items()}
    if settings.model.task != "images" and settings.sequence_length > getattr(plain, "max_position_embeddings", settings.sequence_length):
        sizes["max_position_embeddings"] = settings.sequence_length
    if facts.image is not None:
        channels, height, width = facts.image
        square = height if height == width else (height, width)
        sizes |= {"image_size": square, "num_channels": channels, "patch_size": model.patch_size}
    if "qk_rope_head_dim" in known:
        known -= {"head_dim"}  # in latent attention, the head size follows from other fields
    return {name: value for name, value in sizes.items() if name in known}


def _layers(plain: PreTrainedConfig, settings: TrainConfig) -> dict[str, int]:
    """Return the fields for the number of layers, whose names depend on the model type."""
    model = settings.model
    heads, inner = model.heads, model.feed_forward or 4 * model.width
    if model.task != "translation" and "decoder_layers" in vars(plain):
        return {"decoder_layers": model.layers, "decoder_attention_heads": heads, "decoder_ffn_dim": inner}
    if not plain.is_encoder_decoder:
        return {"num_hidden_layers" if "num_layers" not in vars(plain) else "num_layers": model.layers}
    encoder = model.encoder_layers or model.layers // 2
    decoder = model.layers - encoder
    if hasattr(plain, "encoder_layers"):
        return {
            "encoder_layers": encoder, "decoder_layers": decoder, "encoder_attention_heads": heads, "decoder_attention_heads": heads,
            "encoder_ffn_dim": inner, "decoder_ffn_dim": inner,
        }  # fmt: skip
    return {"num_layers": encoder, "num_decoder_layers": decoder, "d_kv": model.width // heads}


def _tokens(facts: DatasetFacts, plain: PreTrainedConfig) -> dict[str, int | None]:
    """Return the data's token ids as configuration fields. Defaults that lie beyond the vocabulary are replaced."""
    if not facts.vocabulary:
        return {}
    fields: dict[str, int | None] = {"vocab_size": facts.vocabulary, "bos_token_id": facts.bos, "eos_token_id": facts.eos}
    for name, value in vars(plain).items():
        if name.endswith("token_id") and name not in fields:
            outside = isinstance(value, int) and not 0 <= value < facts.vocabulary
            fields[name] = (None if name == "pad_token_id" else facts.bos) if outside else value
    if facts.pad is not None:
        fields["pad_token_id"] = facts.pad
    return {name: value for name, value in fields.items() if name in vars(plain)}


def _adapted(config: PreTrainedConfig, settings: TrainConfig, facts: DatasetFacts) -> PreTrainedConfig:
    """Set the fields that the run decides rather than the checkpoint: class names, token ids, dropout."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0 if "layer" in name else settings.model.dropout)
    for name in OUTSIDE:
        if hasattr(config, name):
            setattr(config, name, False)
    if facts.pad is not None:
        config.pad_token_id = facts.pad
    if settings.model.task == "translation":
        config.decoder_start_token_id, config.bos_token_id, config.eos_token_id = facts.bos, facts.bos, facts.eos
    for name, value in labels_of(facts).items():
        setattr(config, name, value)
    return config


def _build(kind: type[PreTrainedConfig], values: Mapping[str, Any]) -> PreTrainedConfig:
    try:
        return kind(**values)
    except Exception as error:  # each configuration class raises errors of its own
        raise SettingsError(
            f"transformers cannot make a configuration of {kind.model_type} with these sizes ({type(error).__name__}: {error}): set "
            "model.config_overrides, or start from a checkpoint (model.from_pretrained)"
        ) from None
