"""Export of a run's model to a folder that transformers' from_pretrained loads, with generation settings and tokenizer."""

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import tokenizers
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from rayllp.checkpoint.depth_prolongation import LAYER
from rayllp.checkpoint.location import Folder, at_hand, checkpoint_folder
from rayllp.checkpoint.run_metadata import MODEL_JSON, TOKENIZER_JSON, read_model_json
from rayllp.checkpoint.store import check_content, find_checkpoint, read_manifest
from rayllp.config import TrainConfig, load_run_config
from rayllp.config.nested import stage_of_depth
from rayllp.config.network import LoRASettings
from rayllp.data import load_data
from rayllp.data.special_tokens import SpecialTokens
from rayllp.data.tokenizer import SENTENCEPIECE_ENDINGS, load_tokenizer
from rayllp.errors import CheckpointError, DataError, SettingsError
from rayllp.hf_config import TASKS, count_layers, read_config, transformers_config, with_layers
from rayllp.models import build_architecture, model_types, refuse_unnamed_code
from rayllp.models.lora import NAME, save_adapter, stored_name
from rayllp.models.meta_device import build_on_meta
from rayllp.models.scaled import model_class, write_scaled
from rayllp.models.weights import INDEX, names_of_tied

SHARD, SHARD_BYTES = "model{suffix}.safetensors", 4 * 1024**3
DTYPES = {"F32": torch.float32, "F64": torch.float64}
# mBART has a shared embedding even if encoder and decoder have one each. Neither reads it then, and no piece of a checkpoint contains it.
STAND_INS = {"model.shared.weight": "model.encoder.embed_tokens.weight"}
BASE = ".base_layer.weight"


@dataclass(frozen=True)
class _StoredTensor:
    """The place of a parameter's value in a checkpoint.

    Attributes:
        file: the safetensors file.
        key: name of the tensor in the file.
        shape, dtype: those of the tensor; the dtype as safetensors names it.
        adapter: a LoRA adapter to add when the value is read.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    adapter: "_Adapter | None" = None

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self) -> Tensor:
        with safe_open(self.file, framework="pt") as file:
            value = file.get_tensor(self.key)
        return value if self.adapter is None else self.adapter.into(value)


@dataclass(frozen=True)
class _Adapter:
    """A LoRA adapter. It adds scale · up·down to the weight of a linear map, transposed for a Conv1D."""

    down: _StoredTensor
    up: _StoredTensor
    scale: float
    transposed: bool

    def into(self, weight: Tensor) -> Tensor:
        """Return the weight with the adapter added."""
        change = self.up.read() @ self.down.read() * self.scale
        return weight + (change.T if self.transposed else change)


def export(run: Path, to: Path, step: int | None = None, family: str | None = None, *, merge: bool = False) -> Path:
    """Write a run's model to the folder `to` in transformers' format. If step sizes differ from 1, add the code that loads the model.

    Args:
        run: the run directory.
        to: a folder that is new or empty; it is complete or does not exist afterwards.
        step: step of the checkpoint; None: the latest.
        family: the run's model.family, if it is a "module:Class" that this process has not registered.
        merge: for a run that trains adapters (model.lora): write the whole model with these added, not the adapters in peft's format.

    Raises:
        CheckpointError: there is no run or no such checkpoint, or it is not of a transformers model.
        SettingsError: `to` is not empty or cannot be written, or the run's adapters are of no use without `merge`.
        DataError: the run directory has no model.json, and the data by which the model could be built again are gone.
    """
    run, to = Path(run), Path(to).absolute()
    config, folder = _open_run(run, step, family)
    _refuse_occupied(to)
    with at_hand(folder) as checkpoint:
        if config.model.lora is not None and not merge:
            _export_adapters(run, config, checkpoint, to)
        else:
            _export(run, config, checkpoint, to)
    return to


def _export(run: Path, config: TrainConfig, checkpoint: Path, to: Path) -> None:
    stored = _find_tensors(checkpoint)
    stored_config = _read_stored_config(run, config)
    if config.nested.factors:  # use the depth that the network has in this checkpoint
        layers = len({tensor.file for tensor in stored.values() if tensor.file.name.startswith(LAYER)})
        config, stored_config = stage_of_depth(config, layers).config, with_layers(stored_config, layers)
    kind = model_class(stored_config["architectures"][0])
    model_config = kind.config_class.from_dict(stored_config)
    tensors = _match(kind, model_config, stored, checkpoint, config.model.lora)
    tokenizer = _make_tokenizer(run, config)
    model_config.dtype = DTYPES[next(iter(tensors.values())).dtype]
    if kind.can_generate():
        _let_generate(model_config, tokenizer)
    with _appearing(to) as folder:
        _write_tensors(tensors, folder)
        _write_configs(config, kind, model_config, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def _export_adapters(run: Path, config: TrainConfig, checkpoint: Path, to: Path) -> None:
    settings = config.model
    assert settings.lora is not None
    if settings.from_pretrained is None or settings.train:
        what = "model.train too" if settings.train else "new weights, not those of model.from_pretrained"
        raise SettingsError(f"{run} has trained {what}, so that its adapters alone are no model: export it with --merge")
    stored_config = _read_stored_config(run, config)
    with suppress(CheckpointError):  # the original model may be gone
        if count_layers(transformers_config(read_config(settings.from_pretrained))) != settings.layers:
            raise SettingsError(f"{run} has other layers than {settings.from_pretrained}, which takes no adapters of theirs: add --merge")
    kind = model_class(stored_config["architectures"][0])
    model_config = kind.config_class.from_dict(stored_config)
    layer = build_on_meta(kind, model_config).get_submodule(model_types.layer_names(model_config)[0])
    stored = {name: tensor for name, tensor in _find_tensors(checkpoint).items() if stored_name(name)}
    with _appearing(to) as folder:
        tensors = {name: tensor.read() for name, tensor in stored.items()}
        save_adapter(folder, tensors, settings.lora, layer, settings.from_pretrained, TASKS[settings.task].peft)


# Reading the run ----------------------------------------------------------------------------------------------------------------


def _open_run(run: Path, step: int | None, family: str | None) -> tuple[TrainConfig, Folder]:
    """Return the run's settings and the folder of the checkpoint."""
    config = load_run_config(run)
    refuse_unnamed_code(config, run, family)
    return config, find_checkpoint(run, checkpoint_folder(run, config.checkpoint.path), step)


def _find_tensors(checkpoint: Path) -> dict[str, _StoredTensor]:
    """Check the checkpoint's checksums, and return where it has each parameter."""
    stored: dict[str, _StoredTensor] = {}
    files = read_manifest(checkpoint)["files"]
    for path in (checkpoint / name for name in files):
        check_content(path, files)
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            for name in sorted(key.removeprefix("weight/") for key in keys if key.startswith("weight/")):
                # If the run has averaged its weights, its evaluations used the average, so that is exported.
                key = f"ema/{name}" if f"ema/{name}" in keys else f"weight/{name}"
                part = file.get_slice(key)
                stored[name] = _StoredTensor(path, key, tuple(part.get_shape()), part.get_dtype())
    # Parameters of a LayerStack begin like this; those of transformers' models do not.
    if any(name.startswith("layers.0.") for name in stored):
        raise CheckpointError(
            f"{checkpoint} is of a LayerStack, whose modules only your own program can build: load its safetensors (one file a piece) there"
        )
    return stored


def _read_stored_config(run: Path, config: TrainConfig) -> dict[str, Any]:
    """Return the model's transformers configuration: the one that the run has stored, else one made from the run's settings and data."""
    stored = read_model_json(run)
    if stored is None:
        # The run's own weights will be used, so a pretrained model that it started from is not needed, and may be gone.
        bare = config.model_copy(update={"model": config.model.model_copy(update={"from_pretrained": None})})
        made_anew = build_architecture(bare, load_data(bare).facts).transformers_config()
        assert made_anew is not None
        return made_anew
    if not stored.get("architectures"):
        stored = {**stored, "architectures": [model_types.model_class(stored["model_type"], config.model.task).__name__]}
    return stored


def _is_scaled(config: TrainConfig) -> bool:
    return any(size != 1 for size in config.step_sizes)


def _with_adapters(stored: Mapping[str, _StoredTensor], model: nn.Module, settings: LoRASettings) -> dict[str, _StoredTensor]:
    """Return the place of each of the model's own parameters, with its LoRA adapter where it has one."""
    tensors = {}
    for name, tensor in stored.items():
        path = name.removesuffix(BASE)
        if path != name:
            down, up = (stored[f"{path}.lora_{which}.{NAME}.weight"] for which in ("A", "B"))
            lora = _Adapter(down, up, settings.alpha / settings.rank, isinstance(model.get_submodule(path), Conv1D))
            tensors[f"{path}.weight"] = replace(tensor, adapter=lora)
        elif stored_name(name) is None:
            tensors[name.replace(".base_layer.", ".")] = tensor
    return tensors


def _match(
    kind: type[PreTrainedModel], config: PreTrainedConfig, stored: Mapping[str, _StoredTensor], checkpoint: Path, lora: LoRASettings | None
) -> dict[str, _StoredTensor]:
    """Return the place of each parameter of the model, by the name under which transformers saves it.

    Raises:
        CheckpointError: the model's parameters are not those of the checkpoint.
    """
    with torch.device("meta"):
        model = kind(config)
    tied = names_of_tied(model)
    if lora is not None:
        stored = _with_adapters(stored, model, lora)
    tensors = {tied.get(name, [name])[0]: tensor for name, tensor in stored.items()}
    shapes = {tied.get(name, [name])[0]: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, other in STAND_INS.items():
        if name in shapes and other in tensors:
            tensors.setdefault(name, tensors[other])
    unmatched = [name for name in (*shapes, *tensors) if name not in tensors or name not in shapes or tensors[name].shape != shapes[name]]
    if unmatched:
        has = tensors[unmatched[0]].shape if unmatched[0] in tensors else "nothing"
        raise CheckpointError(
            f"{checkpoint} is of another model than the run's settings say: {unmatched[0]} is {has}, {kind.__name__} has "
            f"{shapes.get(unmatched[0], 'nothing')}. Put back the config.yaml and {MODEL_JSON} that the run was made with"
        )
    return {name: tensors[name] for name in shapes}


def _let_generate(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Set those options in the configuration that generation reads, and that training has left out or changed."""
    config.use_cache = True
    if not config.is_encoder_decoder:
        # A stream of text has no token at its beginning or end; the ids in the run's configuration are those of ordinary tokens.
        config.bos_token_id = getattr(tokenizer, "bos_token_id", None)
        config.eos_token_id = getattr(tokenizer, "eos_token_id", None)


# Tokenizer ----------------------------------------------------------------------------------------------------------------------


def _make_tokenizer(run: Path, config: TrainConfig) -> PreTrainedTokenizerBase | None:
    """Return the run's tokenizer in transformers' form.

    None for bytes, characters and sentencepiece; None, with a warning, if the tokenizer is gone.
    """
    name = config.data.tokenizer
    if not TASKS[config.model.task].tokenizer or name in ("bytes", "characters") or name.endswith(SENTENCEPIECE_ENDINGS):
        return None
    try:
        tokenizer = _load_tokenizer(run, config)
    except DataError as error:
        warnings.warn(f"exported without a tokenizer: {error}", stacklevel=3)
        return None
    inner = tokenizer._tokenizer
    backend = inner if isinstance(inner, tokenizers.Tokenizer) else getattr(inner, "backend_tokenizer", None)
    if TASKS[config.model.task].framed and isinstance(backend, tokenizers.Tokenizer):
        return _framed(SpecialTokens.of(tokenizer), backend, config)
    return PreTrainedTokenizerFast(tokenizer_object=inner, **_options(config)) if inner is backend else inner


def _load_tokenizer(run: Path, config: TrainConfig) -> Any:
    stored, name = run / TOKENIZER_JSON, config.data.tokenizer
    if stored.is_file():
        return load_tokenizer(str(stored))
    # A tokenizer that is trained on the text is trained again.
    return load_data(config).tokenizer if name.startswith("bpe:") else load_tokenizer(name)


def _framed(special: SpecialTokens, backend: tokenizers.Tokenizer, config: TrainConfig) -> PreTrainedTokenizerFast:
    """Return a tokenizer that adds the special tokens around sentences as the run's data did, with the same ids."""
    ids = (special.pad, special.cls, special.sep, special.mask)
    if special.offset:
        names = [_unused(name, backend) for name in ("<pad>", "<cls>", "<sep>", "<mask>")]
        backend = _shifted(backend, names)
    else:
        names = [str(backend.id_to_token(number)) for number in ids]
    backend.add_special_tokens(names)
    pad, cls, sep, mask = names
    single = ["$A", sep] if config.model.task == "translation" else [cls, "$A", sep]
    backend.post_processor = TemplateProcessing(single=single, pair=[*single, "$B", sep], special_tokens=list(zip(names, ids, strict=True)))
    roles = {"pad_token": pad, "cls_token": cls, "bos_token": cls, "sep_token": sep, "eos_token": sep, "mask_token": mask}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles, **_options(config))


def _shifted(backend: tokenizers.Tokenizer, names: list[str]) -> tokenizers.Tokenizer:
    """Return the tokenizer with `names` as its first tokens, and the ids of its own tokens shifted accordingly."""
    table = json.loads(backend.to_str())
    model, offset = table["model"], len(names)
    if isinstance(model["vocab"], dict):
        model["vocab"] = {name: n for n, name in enumerate(names)} | {token: n + offset for token, n in model["vocab"].items()}
    else:  # Unigram: pairs of a piece and its score
        model["vocab"] = [[name, 0.0] for name in names] + model["vocab"]
        model["unk_id"] = None if model["unk_id"] is None else model["unk_id"] + offset
    for token in table["added_tokens"]:
        token["id"] += offset
    return tokenizers.Tokenizer.from_str(json.dumps(table | {"post_processor": None}))


def _unused(name: str, backend: tokenizers.Tokenizer) -> str:
    while backend.token_to_id(name) is not None:
        name = f"<{name}>"
    return name


def _options(config: TrainConfig) -> dict[str, Any]:
    return {"model_max_length": config.sequence_length, "clean_up_tokenization_spaces": False}


def _steps(config: TrainConfig, model_config: PreTrainedConfig) -> dict[str, Any]:
    """Return the step sizes and buffers, for which transformers' configuration has no place."""
    steps = {"step": {"middle": config.middle_step, "buffer": config.step.buffer}, "buffers": config.buffers.model_dump()}
    return {"step_sizes": list(config.step_sizes), "layers": model_types.layer_names(model_config), "steps": steps}


# Writing ------------------------------------------------------------------------------------------------------------------------


def _refuse_occupied(to: Path) -> None:
    if to.exists() and not to.is_dir():
        raise SettingsError(f"{to} is a file: give --to a folder that is new or empty")
    if to.is_dir() and any(to.iterdir()):
        raise SettingsError(f"{to} is not empty: give --to a folder that is new or empty")


@contextmanager
def _appearing(to: Path) -> Iterator[Path]:
    """Provide a folder beside `to`, which is renamed to `to` once everything is in it."""
    partial = to.with_name(f".{to.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.replace(to)
    except (OSError, SafetensorError) as error:
        raise SettingsError(f"{to} cannot be written ({error}): give --to another folder, with room for the model") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_tensors(tensors: Mapping[str, _StoredTensor], folder: Path) -> None:
    """Write the tensors to one file, or to several of SHARD_BYTES each with an index. Only one file's tensors are in memory at a time."""
    split = split_state_dict_into_shards_factory(
        dict(tensors), get_storage_size=lambda tensor: tensor.bytes, filename_pattern=SHARD, max_shard_size=SHARD_BYTES
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name].read() for name in names}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # safetensors makes the file readable for its owner only
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_configs(config: TrainConfig, kind: type[PreTrainedModel], model_config: PreTrainedConfig, folder: Path) -> None:
    model_config.save_pretrained(folder)
    if _is_scaled(config):
        write_scaled(folder, _steps(config, model_config), config.model.task)
    if kind.can_generate():
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_eos_token_id")
        options = {name: getattr(model_config, name, None) for name in names}
        if model_config.is_encoder_decoder:
            options["max_length"] = getattr(model_config, "max_position_embeddings", config.sequence_length)
        GenerationConfig(**options).save_pretrained(folder)
