"""Evaluations: they use the same held-out samples whatever the batch size, the number of replicas and workers, and the seed."""

import numpy as np
import pytest
import torch

from rayllp.channel import LocalChannel, run_workers
from rayllp.config import EVALUATED, DataSettings
from rayllp.data.base import IGNORE, Batches
from rayllp.data.masked import load_masked
from rayllp.data.text import load_text, spread
from rayllp.errors import SettingsError
from tests.conftest import make_engine, tiny

TEXT = "".join(f"line {number} of {number % 7} things\n" for number in range(150))


@pytest.fixture
def files(tmp_path):
    """Write a file of each kind of data."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    rows = [f"{'good' if number % 3 else 'bad'} thing {number}\t{int(number % 3 > 0)}" for number in range(120)]
    (tmp_path / "rows.tsv").write_text("text\tlabel\n" + "\n".join(rows) + "\n", encoding="utf-8")
    words = [f"{place}\tword{(number + place) % 9}\t_\t{'AB'[place % 2]}" + "\t_" * 6 for number in range(120) for place in (1, 2, 3)]
    sentences = ["\n".join(words[start : start + 3]) for start in range(0, len(words), 3)]
    (tmp_path / "words.conllu").write_text("\n\n".join(sentences) + "\n", encoding="utf-8")
    (tmp_path / "pairs").mkdir()
    for language, greeting in (("de", "hallo"), ("en", "hello")):
        lines = [f"{greeting} {number}\n" for number in range(40)]
        for split in ("train", "val"):
            (tmp_path / "pairs" / f"{split}.{language}").write_text("".join(lines), encoding="utf-8")
    return tmp_path


def settings(kind, files):
    model = {"layers": 4, "width": 8, "heads": 2}
    data = {"validation_fraction": 0.3}
    return {
        "text": {"model": model, "data": data | {"path": str(files / "text.txt")}},
        "masked": {"model": model | {"family": "bert"}, "data": data | {"path": str(files / "text.txt")}},
        "sentences": {"model": model | {"family": "bert", "head": "sentences"}, "data": data | {"path": str(files / "rows.tsv")}},
        "words": {"model": model | {"family": "mc"}, "data": data | {"path": str(files / "words.conllu")}},
        "pairs": {"model": model | {"family": "mt"}, "data": data | {"path": str(files / "pairs")}},
        "images": {"model": model | {"family": "vit"}},
    }[kind]


def small(kind, files, **changes):
    return tiny(**settings(kind, files), mode="serial", buffers={"open": 0, "close": 0}, mgrit={"coarsening": 2}, **changes)


def evaluate(config):
    """Return the losses over 16 samples, and over all."""

    def on_worker(channel):
        alone = LocalChannel.alone()
        engine = make_engine(config, *((alone, channel) if config.layer_workers == 1 else (channel, alone)))
        return engine.evaluate(2), engine.evaluate(0)

    return run_workers(config.world, on_worker)[0]


@pytest.mark.parametrize("kind", ["text", "masked", "sentences", "words", "pairs", "images"])
def test_losses_do_not_depend_on_batch_size_replicas_and_workers(files, kind):
    some, all_of_them = evaluate(small(kind, files, batch_size=7))
    for changes in ({"batch_size": 6, "mesh": {"data": 2}, "workers": 2}, {"batch_size": 64, "workers": 2}):
        found = evaluate(small(kind, files, **changes))
        assert found[0] == pytest.approx(some, rel=1e-12)
        assert found[1] == pytest.approx(all_of_them, rel=1e-12)
    assert some["loss"] != all_of_them["loss"]


def test_eval_batches_counts_samples(files):
    config = small("text", files, batch_size=5)
    engine = make_engine(config)
    targets = [batch.targets for batch in engine._shares.held_out(3)]
    assert sum(int((part[:, 0] != IGNORE).sum()) for part in targets) == 3 * EVALUATED
    assert all(len(part) == 5 for part in targets)
    assert [len(batch.targets) for batch in make_engine(small("text", files, batch_size=64))._shares.held_out(1)] == [EVALUATED]


def text(files, seed=0, length=16):
    return load_text(DataSettings(path=str(files / "text.txt"), validation_fraction=0.3), length, seed)


def test_every_held_out_token_is_predicted_once(files):
    data = text(files)
    held_out = data.tokens["validation"]
    windows = (len(held_out) - 1) // 16
    inputs, targets = data.batch("validation", 0, windows + 3)
    assert (targets[windows:] == IGNORE).all()
    assert data.count("validation") == windows
    starts = np.argsort(data.held_out)
    assert torch.equal(inputs[starts].flatten(), torch.tensor(held_out[: windows * 16].astype(np.int64)))
    assert torch.equal(targets[starts].flatten(), torch.tensor(held_out[1 : windows * 16 + 1].astype(np.int64)))


def test_held_out_windows_do_not_depend_on_the_seed(files):
    path = DataSettings(path=str(files / "text.txt"), validation_fraction=0.3)
    for load in (load_text, load_masked):
        one, other = load(path, 16, 0), load(path, 16, 1)
        for first, second in zip(one.batch("validation", 1, 8), other.batch("validation", 1, 8), strict=True):
            assert torch.equal(first, second)
        assert not torch.equal(one.batch("train", 1, 8)[0], other.batch("train", 1, 8)[0])


@pytest.mark.parametrize("count", [1, 2, 9, 100, 4096])
def test_every_beginning_of_the_order_is_spread(count):
    order = spread(count)
    assert sorted(order) == list(range(count))
    for size in {min(size, count) for size in (1, 8, 64)}:
        gaps = np.diff([0, *sorted(order[:size]), count])
        assert gaps.max() <= 3 * count / size + 1


class Endless:
    """A user's own batches, which derive from no class of ours and have no end."""

    def batch(self, split, step, size):
        return torch.full((size, 1, 8, 8), float(step)), torch.zeros(size, dtype=torch.int64)


class Eleven(Batches):
    """The same batches, with an end."""

    batch = Endless.batch

    def count(self, split):
        return 11


@pytest.mark.parametrize(("batches", "wanted", "sizes"), [(Endless(), 3, [4, 4, 4]), (Eleven(), 0, [4, 4, 3]), (Eleven(), 1, [4, 4])])
def test_an_evaluation_on_a_users_batches_ends_where_they_do(files, batches, wanted, sizes):
    shares = make_engine(small("images", files, batch_size=4))._shares
    shares.batches = Batches.of(batches)
    assert [int((batch.targets != IGNORE).sum()) for batch in shares.held_out(wanted)] == sizes
    assert shares.batches.entries == ()
    assert shares.batches.with_files() is shares.batches


def test_what_has_no_batches_is_refused():
    with pytest.raises(SettingsError, match=r"a dict without a method batch\(split, step, size\).*derive from rayllp.data.Batches"):
        Batches.of({})
