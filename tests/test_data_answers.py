"""Fine-tuning on answers: what is predicted, chat templates, packing, long samples; and models that keep packed texts apart."""

import json

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rayllp.config import DataSettings
from rayllp.data import load_data
from rayllp.data.answers import load_answers
from rayllp.data.base import IGNORE
from rayllp.data.record import DataRecord
from rayllp.errors import DataError
from rayllp.models import build_architecture
from tests.conftest import make_engine, one_pass, tiny

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}\n{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)
LAST_ALONE = CHATML.replace("{{ m['content'] }}", "{% if loop.last %}<think></think>{% endif %}{{ m['content'] }}")


def save_tokenizer(folder, template=CHATML):
    """Save a tokenizer with one token per byte, and tokens for the marks of a chat."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    own = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"])
    own.chat_template = template
    own.save_pretrained(folder)
    return str(folder)


def chat(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def conversations(tmp_path, rows, template=CHATML, **changes):
    path = write(tmp_path / "chats.jsonl", [{"messages": row} for row in rows])
    tokenizer = save_tokenizer(tmp_path / f"tokenizer {hash(template)}", template)
    return DataSettings(path=path, tokenizer=tokenizer, messages_field="messages", **changes)


def told(data, row_ids, row_targets):
    """Return a row's text, and the part of it that is to be predicted."""
    counted = row_targets != IGNORE
    return data.tokenizer.decode(row_ids.tolist()), data.tokenizer.decode(row_targets[counted].tolist())


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_assistants_messages_alone_are_predicted(tmp_path, template):
    rows = [chat("Hi?", "Hello you."), chat("One", "two", "Three", "four"), chat("a", "b")]
    data = load_answers(conversations(tmp_path, rows, template, validation_fraction=0.3), 80, 0)
    inputs, targets = one_pass(data, "validation", 2)
    assert inputs.shape == targets.shape == (2, 80)
    assert told(data, inputs[0], targets[0])[1] == "b<|im_end|>" + "\n" * (template is CHATML)
    assert (targets[1] == IGNORE).all()
    found = {told(data, *row)[1].replace("\n", "") for row in zip(*(part for part in data.batch("train", 0, 2)), strict=True)}
    assert found == {"Hello you.<|im_end|>", "two<|im_end|>four<|im_end|>"}
    inputs, targets = data.batch("train", 0, 2)
    inner = (targets[:, :-1] != IGNORE) & (targets[:, 1:] != IGNORE)  # the last token of a row is a target alone
    assert inner.any()
    assert torch.equal(targets[:, :-1][inner], inputs[:, 1:][inner])


def test_templates_that_cannot_be_told_apart_or_are_missing_are_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"chats.jsonl, split train, row 0: the chat template writes message 1 differently once others follow"
    ):
        load_answers(conversations(tmp_path, [chat("a", "b", "c", "d")], LAST_ALONE), 80, 0)
    settings = conversations(tmp_path, [chat("a", "b"), chat("c", "d")], None)
    with pytest.raises(DataError, match=r"no chat template.*set data.chat_template to a file with one"):
        load_answers(settings, 80, 0)
    (tmp_path / "template.jinja").write_text(CHATML, encoding="utf-8")
    data = load_answers(settings.model_copy(update={"chat_template": str(tmp_path / "template.jinja")}), 80, 0)
    assert "<|im_start|>user" in told(data, *(part[0] for part in data.batch("train", 0, 1)))[0]
    with pytest.raises(DataError, match="no chat template"):
        load_answers(settings.model_copy(update={"tokenizer": "bytes"}), 80, 0)


def test_broken_conversations_are_refused_by_row_or_skipped(tmp_path):
    whole = [chat("a", "b"), chat("c", "d")]
    for broken, message in (
        (None, "row 2: column 'messages' holds nothing, not a list"), (chat("alone"), "row 2: .* has no message of role assistant"),
        ([{"role": "user", "content": None}], "row 2: .* has a message that is not {role: text, content: text}"),
    ):  # fmt: skip
        settings = conversations(tmp_path, [*whole, broken])
        with pytest.raises(DataError, match=message):
            load_answers(settings, 80, 0)
        assert load_answers(settings.model_copy(update={"on_error": "skip"}), 80, 0).skipped == {"rows": 1}


def pairs(tmp_path, rows, **changes):
    path = write(tmp_path / "pairs.jsonl", [{"prompt": prompt, "answer": answer} for prompt, answer in rows])
    return DataSettings(path=path, tokenizer="bytes", text_field="prompt", answer_field="answer", **changes)


def test_columns_of_prompts_and_answers(tmp_path):
    rows = [("2+2=", "4"), ("say ", "hello"), ("end", "!")]
    data = load_answers(pairs(tmp_path, rows, validation_fraction=0.34), 12, 0)
    inputs, targets = one_pass(data, "validation", 1)
    assert told(data, inputs[0], targets[0]) == ("end" + "\0" * 9, "!")
    with pytest.raises(DataError, match=r"has no column 'reply': set data.answer_field to one of \['prompt', 'answer'\]"):
        load_answers(pairs(tmp_path, rows).model_copy(update={"answer_field": "reply"}), 12, 0)
    with pytest.raises(DataError, match=r"row 1: column 'answer' holds nothing, not text"):
        load_answers(pairs(tmp_path, [("a", "b"), ("c", None)]), 12, 0)
    with pytest.raises(DataError, match=r"data.tokenizer=bpe:300 is made from a text"):
        load_answers(pairs(tmp_path, rows).model_copy(update={"tokenizer": "bpe:300"}), 12, 0)
    with_ends = load_answers(pairs(tmp_path, rows).model_copy(update={"tokenizer": save_tokenizer(tmp_path / "tokenizer")}), 12, 0)
    assert told(with_ends, *(part[0] for part in with_ends.batch("validation", 0, 1)))[1] == "!<|im_end|>"


def test_samples_that_are_too_long_are_cut_skipped_or_refused_and_counted(tmp_path):
    rows = [("a" * 3, "b" * 3), ("c" * 5, "d" * 20), ("e" * 30, "f"), ("g", "h")]
    cut = load_answers(pairs(tmp_path, rows), 8, 0)
    assert cut.skipped == {"ends of long samples": 2, "samples whose answer is beyond sequence_length": 1}
    assert {told(cut, *row)[1] for row in zip(*cut.batch("train", 0, 2), strict=True)} == {"bbb", "dddd"}
    skipped = load_answers(pairs(tmp_path, rows, on_long="skip"), 8, 0)
    assert skipped.skipped == {"long samples": 2}
    with pytest.raises(DataError, match=r"row 1 has 25 tokens, more than sequence_length=8.*set data.on_long to cut or skip"):
        load_answers(pairs(tmp_path, rows, on_long="refuse"), 8, 0)
    with pytest.raises(DataError, match=r"no sample with an answer \(\{'ends of long samples': 1, .*raise sequence_length=8"):
        load_answers(pairs(tmp_path, [rows[2]]), 8, 0)


def test_packed_samples_share_sequences_and_keep_their_positions(tmp_path):
    rows = [("a" * (1 + n % 5), chr(ord("b") + n % 20) * (1 + n % 3)) for n in range(60)]
    apart, packed = (load_answers(pairs(tmp_path, rows, documents=kind), 16, 0) for kind in ("joined", "packed"))
    assert packed.count("train") < 0.4 * apart.count("train")

    def answers(data, split):
        inputs_targets = [data.batch(split, step, 1) for step in range(data.count(split))]
        return "".join(bytes(targets[targets != IGNORE].tolist()).decode() for _, targets in inputs_targets)

    # In order, beginning with the held-out ones, which are the last.
    both = "".join(answer for _, answer in rows)
    assert both.endswith(answers(apart, "validation"))
    assert both.endswith(answers(packed, "validation"))
    assert sorted(answers(packed, "train") + answers(packed, "validation")) == sorted(both)
    (ids, positions), _ = packed.batch("train", 0, 4)
    for row in range(4):
        begins = [n for n in range(16) if positions[row, n] == 0 and ids[row, n]]
        assert begins[0] == 0
        assert len(begins) > 1
        for begin, end in zip(begins, [*begins[1:], 16], strict=True):
            filled = int((ids[row, begin:end] != 0).sum())
            assert positions[row, begin : begin + filled].tolist() == list(range(filled))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_text_in_a_packed_row_is_seen_as_if_it_were_alone(tmp_path, family):
    settings = pairs(tmp_path, [("a" * (1 + n % 5), "xyz"[n % 3] * (1 + n % 4)) for n in range(40)])
    data = settings.model_dump(exclude_unset=True) | {"validation_path": settings.path}
    found = {}
    for documents in ("packed", "joined"):
        model = {"family": family, "layers": 12}
        config = tiny(model=model, data=data | {"documents": documents}, mode="serial")
        engine = make_engine(config)
        found[documents] = engine.evaluate(0)["loss"]
        assert engine.batches.count("validation") == (40 if documents == "joined" else 14)
    assert found["packed"] == pytest.approx(found["joined"], rel=1e-10)


def test_a_run_on_answers_goes_on_with_the_same_ones(tmp_path):
    settings = pairs(tmp_path, [("a" * n, "b") for n in range(1, 20)])
    config = tiny(data=settings.model_dump(exclude_unset=True))
    data = load_data(config)
    record = DataRecord.of(config, data)
    assert record == DataRecord.of(config, load_data(config))
    assert set(record.splits) == {"train", "validation"}
    pairs(tmp_path, [("a" * n, "c" if n < 5 else "b") for n in range(1, 20)])
    with pytest.raises(DataError, match="not those that the run began with"):
        record.changes(config, DataRecord.of(config, load_data(config)))
    assert build_architecture(config, data.facts).facts.vocabulary == 256


def test_parquet_with_conversations_too(tmp_path):
    rows = [chat("a", "b"), chat("c", "d", "e", "f")]
    settings = conversations(tmp_path, rows)
    datasets.Dataset.from_dict({"messages": rows}).to_parquet(tmp_path / "chats.parquet")
    from_parquet = load_answers(settings.model_copy(update={"path": str(tmp_path / "chats.parquet")}), 80, 0)
    assert torch.equal(from_parquet.batch("train", 0, 2)[0], load_answers(settings, 80, 0).batch("train", 0, 2)[0])
