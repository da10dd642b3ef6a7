"""Choose the loader for a run's data by the task of its model."""

from rayllp.config import TrainConfig
from rayllp.data.answers import load_answers
from rayllp.data.base import Dataset
from rayllp.data.images import load_images
from rayllp.data.masked import load_masked
from rayllp.data.mixture import load_mixture
from rayllp.data.pairs import load_pairs
from rayllp.data.sentences import load_sentences
from rayllp.data.text import load_text
from rayllp.data.tokenizer_kinds import Tokenizer
from rayllp.data.words import load_words


def load_data(config: TrainConfig, tokenizer: Tokenizer | None = None) -> Dataset:
    """Load the data set of `config.data`, in the format that the model's task reads.

    Args:
        config: the settings of the run.
        tokenizer: the tokenizer of a run that is resumed; None: the one that `config.data.tokenizer` names.

    Raises:
        DataError: the data are missing, broken or too short; the message names file and line where one is at fault.
    """
    data, length, seed = config.data, config.sequence_length, config.seed
    if data.sets:
        return load_mixture(config, load_data, tokenizer)
    match config.model.task:
        case "sentences":
            return load_sentences(data, length, seed, tokenizer)
        case "masked":
            return load_masked(data, length, seed, tokenizer)
        case "words":
            return load_words(data, length, seed)
        case "images":
            return load_images(data, seed)
        case "translation":
            return load_pairs(data, length, seed, tokenizer)
        case _ if data.messages_field is not None or data.answer_field is not None:
            return load_answers(data, length, seed, tokenizer)
        case _:
            return load_text(data, length, seed, tokenizer)
