"""transformers' model types: build their configurations from our settings, and look up their classes by task."""

import difflib
import math
from collections.abc import Mapping
from typing import Any, get_args

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from rayllp.config import TrainConfig
from rayllp.config.network import Task
from rayllp.data.base import DatasetFacts
from rayllp.errors import CheckpointError, SettingsError
from rayllp.hf_config import SIZES, TASKS, count_layers, layer_sources, sizes_in, with_sources
from rayllp.models.families import Family
from rayllp.models.layer_lists import layer_paths
from rayllp.models.meta_device import build_on_meta

CLASSES: dict[Task, Mapping[str, Any]] = {task: getattr(auto, TASKS[task].classes) for task in get_args(Task)}
"""Class names by model type, for each task."""
MOST_UNUSED = 64
"""An embedding may have this many rows without a token, or a twentieth of its rows if that is more, since many are padded to a multiple
that suits the hardware. With more, it is another tokenizer's."""
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


def layer_names(config: PreTrainedConfig) -> list[str]:
    """Return the full names of a stored model's layers in order; they are the same for all tasks of a model."""
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    kind = kind or next(model_class(config.model_type, task) for task, classes in CLASSES.items() if config.model_type in classes)
    return layer_paths(build_on_meta(kind, config))[0]


def check_type(model_type: str) -> None:
    """Refuse a model type that transformers does not know."""
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING), 4, 0.5)
        raise SettingsError(
            f"model.architecture {model_type!r} is no model type of transformers {transformers.__version__}"
            + (f"; the nearest: {', '.join(near)}" if near else ": its documentation lists them")
        )


def configuration(
    settings: TrainConfig, facts: DatasetFacts, resumed: Mapping[str, Any] | None, pretrained: Mapping[str, Any] | None, family: Family
) -> PreTrainedConfig:
    """Return transformers' configuration of the model.

    Args:
        resumed: the configuration of a run that is resumed.
        pretrained: the configuration of the checkpoint to start from. If both are None, a new one of the settings' sizes is made.
        family: the model type, and how a new model of it differs from the type's defaults.

    Raises:
        SettingsError: there is no such model type, it lacks a field, it has fewer positions than a sequence, or is not the checkpoint's.
        CheckpointError: the stored configuration is of other sizes than the settings', or of another tokenizer.
    """
    model, wanted = settings.model, family.model_type or settings.model.architecture
    stored = pretrained if resumed is None else resumed
    if stored is None:
        assert wanted is not None
        check_type(wanted)
        return _new(wanted, settings, facts, family)
    model_type = str(stored.get("model_type", ""))
    check_type(model_type)
    if wanted not in (None, model_type):
        named = f"model.architecture is {wanted}" if model.architecture else f"model.family {model.family} is a {wanted}"
        raise SettingsError(
            f"model.from_pretrained {model.from_pretrained} is a {model_type}, and {named}: leave that out, so that the checkpoint decides"
        )
    if resumed is None:
        stored = at_depth(stored, settings)
        _check_sizes(stored, settings)
    config = CONFIG_MAPPING[model_type].from_dict({**stored, **model.config_overrides})
    _check_vocabulary(config, settings, facts)
    config = _adapted(config, settings, facts, family)
    _check_positions(config, settings, family.unused_positions(facts.pad))
    return config


def at_depth(stored: Mapping[str, Any], settings: TrainConfig) -> dict[str, Any]:
    """Return a checkpoint's configuration, changed to as many layers as the settings ask for.

    Raises:
        SettingsError: that number cannot be made from the checkpoint's layers.
    """
    stored_layers, layers = count_layers(stored), settings.model.layers
    if stored_layers is None or stored_layers == layers:
        return dict(stored)
    return with_sources(stored, layer_sources(layers, stored_layers, settings.buffers.open, settings.buffers.close))


def labels_of(facts: DatasetFacts) -> dict[str, Any]:
    """Return transformers' configuration fields for the class names; empty if there are none."""
    if not facts.classes:
        return {}
    return {"id2label": dict(enumerate(facts.classes)), "label2id": {name: i for i, name in enumerate(facts.classes)}}


def _check_vocabulary(config: PreTrainedConfig, settings: TrainConfig, facts: DatasetFacts) -> None:
    """Refuse a tokenizer that does not belong to the checkpoint: ids beyond its embedding, or far too few for it."""
    rows, tokens = getattr(config.get_text_config(), "vocab_size", 0), facts.vocabulary
    if rows and tokens and not 0 <= rows - tokens < max(MOST_UNUSED, rows // 20):
        raise CheckpointError(
            f"data.tokenizer={settings.data.tokenizer} has {tokens} tokens, and the embedding of model.from_pretrained {rows} rows: it is "
            "another model's; set data.tokenizer to the checkpoint's own (the same folder or name)"
        )


def _check_sizes(stored: Mapping[str, Any], settings: TrainConfig) -> None:
    """Refuse sizes that contradict the checkpoint's."""
    for name, size in sizes_in(stored).items():
        wanted = getattr(settings.model, name)
        if name in ("layers", "width", "heads") and wanted != size:
            raise CheckpointError(f"the checkpoint has {name} {size}, but model.{name} is {wanted}: leave the setting out, or match it")


def _check_positions(config: PreTrainedConfig, settings: TrainConfig, unused: int) -> None:
    """Refuse sequences that are longer than a stored model's table of positions."""
    room = getattr(config, "max_position_embeddings", math.inf) - unused
    if settings.model.task != "images" and settings.sequence_length > room:
        raise SettingsError(f"sequence_length {settings.sequence_length} is more than the {room} positions of the checkpoint: lower it")


def _new(model_type: str, settings: TrainConfig, facts: DatasetFacts, family: Family) -> PreTrainedConfig:
    """Return a new configuration of the settings' sizes."""
    model, kind = settings.model, CONFIG_MAPPING[model_type]
    if settings.model.task == "images" and "vision_config" in kind.sub_configs:  # CLIP and the like: only the vision half is trained
        vision = _sizes(settings, facts, kind.sub_configs["vision_config"](), family)
        return _adapted(_build(kind, {"vision_config": vision, **model.config_overrides}), settings, facts, family)
    plain = _build(kind, {})
    known = set(vars(plain)) | set(kind.attribute_map)
    if not known & set(SIZES["width"]):
        text = f"{model_type}_text"
        raise SettingsError(
            f"model.architecture {model_type} is made of several networks ({', '.join(kind.sub_configs)}), whose sizes are not "
            "settings: " + (f"choose {text}, or " if text in CONFIG_MAPPING else "") + "start from a checkpoint (model.from_pretrained)"
        )
    sizes = _sizes(settings, facts, plain, family)
    fields = {**sizes, **_tokens(facts, plain), **family.fields, **model.config_overrides}
    return _adapted(_build(kind, fields), settings, facts, family)


def _sizes(settings: TrainConfig, facts: DatasetFacts, plain: PreTrainedConfig, family: Family) -> dict[str, Any]:
    """Return the settings' sizes under the field names that this kind of configuration uses."""
    model, known = settings.model, set(vars(plain)) | set(type(plain).attribute_map)
    inner = model.feed_forward or int(model.width * family.feed_forward)
    wanted = {
        "width": model.width, "heads": model.heads, "kv_heads": model.kv_heads or model.heads, "feed_forward": inner,
        "head_dim": model.width // model.heads, "tie_word_embeddings": model.tie_embeddings, **_layers(plain, settings, inner),
    }  # fmt: skip
    names = {ours: SIZES.get(ours, (ours,)) for ours in wanted}
    sizes: dict[str, Any] = {next((n for n in names[ours] if n in known), names[ours][0]): value for ours, value in wanted.items()}
    positions = settings.sequence_length + family.unused_positions(facts.pad)
    # A family's table of positions is as long as its sequences; another type's is its own, unless sequences are longer.
    if model.task != "images" and (family.model_type or positions > getattr(plain, "max_position_embeddings", positions)):
        sizes["max_position_embeddings"] = positions
    if facts.image is not None:
        channels, height, width = facts.image
        if family.model_type and (height % model.patch_size or width % model.patch_size):
            raise SettingsError(
                f"images of {height} × {width} pixels do not divide into patches of {model.patch_size}: set model.patch_size to a divisor"
            )
        square = height if height == width else (height, width)
        sizes |= {"image_size": square, "num_channels": channels, "patch_size": model.patch_size}
    if "qk_rope_head_dim" in known:
        known -= {"head_dim"}  # in latent attention, the head size follows from other fields
    return {name: value for name, value in sizes.items() if name in known}


def _layers(plain: PreTrainedConfig, settings: TrainConfig, inner: int) -> dict[str, int]:
    """Return the fields for the number of layers, whose names depend on the model type; `inner` is the inner size of MLPs."""
    model, heads = settings.model, settings.model.heads
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


def _adapted(config: PreTrainedConfig, settings: TrainConfig, facts: DatasetFacts, family: Family) -> PreTrainedConfig:
    """Set the fields that the run decides rather than the checkpoint: class names, token ids, dropout."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0 if "layer" in name or name in family.undropped else settings.model.dropout)
    for name in OUTSIDE:
        if hasattr(config, name):
            setattr(config, name, False)
    if facts.pad is not None:
        config.pad_token_id = facts.pad
    if settings.model.task == "translation":
        config.decoder_start_token_id, config.bos_token_id, config.eos_token_id = facts.bos, facts.bos, facts.eos
        if hasattr(config, "forced_eos_token_id"):
            config.forced_eos_token_id = facts.eos
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
