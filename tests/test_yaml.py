"""Settings as text: read by the rules of YAML 1.2 and the type of each setting, in files, in sweeps and on the command line."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayllp.config import DataSettings, TrainConfig, kind_in, load_config, make_config, to_text, to_yaml
from rayllp.config.groups import AdaptiveSettings, MGRITSettings
from rayllp.config.network import StepSettings
from rayllp.config.parse import parse_yaml
from rayllp.errors import SettingsError
from rayllp.tuning.sweep import load_sweep

TEXTS = (
    "no",
    "off",
    "0123",
    "1e5",
    "1:30",
    "2024-10-05",
    "0x1F",
    "true",
    "#1",
    "a: b",
    "[x",
    "*a",
    "%",
    "1_000",
    "..",
    "null",
    "~",
    "é\x85x",
)


def from_file(folder: Path, text: str) -> TrainConfig:
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    return load_config(folder / "config.yaml")


@pytest.mark.parametrize(
    ("override", "name", "wanted"),
    [
        ("data.path=0123", "data.path", "0123"), ("data.path=1e5", "data.path", "1e5"), ("data.path=#1.txt", "data.path", "#1.txt"),
        ("data.path=no", "data.path", "no"), ("data.path='a b'", "data.path", "a b"), ("data.path=null", "data.path", None),
        ("data.path=1:30", "data.path", "1:30"), ("data.path=[a", "data.path", "[a"), ("data.path=a=b", "data.path", "a=b"),
        ("name=2024-10-05", "name", "2024-10-05"), ("data.source=no", "data.source", "no"), ("seed=010", "seed", 10),
        ("optimizer.lr=1e-2", "optimizer.lr", 0.01), ("steps=1e1", "steps", 10), ("step.middle=1e-2", "step.middle", 0.01),
        ("step.middle=1/N", "step.middle", "1/N"), ("data.streaming=yes", "data.streaming", True), ("compile=true", "compile", True),
        ("adaptive.ladder=[2+1, 3+1]", "adaptive.ladder", ("2+1", "3+1")), ("windows.length=[4, 12]", "windows.length", (4, 12)),
    ],
)  # fmt: skip
def test_a_value_is_read_by_its_settings_type(tmp_path, override, name, wanted):
    def at(config):
        for part in name.split("."):
            config = getattr(config, part)
        return config

    assert at(load_config(None, [override])) == wanted
    key, _, value = override.partition("=")
    lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate(key.split("."))]
    if value not in ("#1.txt", "[a"):  # in a file a comment, and a list that does not end
        assert at(from_file(tmp_path, "\n".join(lines) + f" {value}\n")) == wanted


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=", "--set 'data.path=': no value: write null for none"),
        ("data.path=''", "data.path: .*at least 1 character"),
        ("steps=", "no value"),
        ("steps=#3", "no value"),
        ("steps=1:30", r"steps: .*'1:30'"),
        ("workers={min: 1, min: 2}", "workers: "),
    ],
)
def test_a_value_that_is_none_is_refused(override, message):
    with pytest.raises(SettingsError, match=message):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 3\nmodel:\n  layers: 8\n  layers: 9\n", "line 4: layers is given again, after line 3: keep one of the two"),
        ("model:\n\tlayers: 8\n", "line 2: .*indent by spaces, not by tabs"),
        ("a: 1\n---\nb: 2\n", "line 2: .*another document"),
        ("? [1]\n: 2\n", "line 1: a key is a sequence"),
        ("mgrit: &a {cycle: *a}\n", "line 1: mgrit.cycle contains itself"),
        ("name: \x07\n", "is not YAML"),
        ("<<: 3\n", "line 1: << takes a mapping"),
        ('data: {path: ""}\n', "data.path: .*at least 1 character"),
    ],
)
def test_a_file_that_means_two_things_is_refused_by_line(tmp_path, text, message):
    with pytest.raises(SettingsError, match=message):
        from_file(tmp_path, text)


def test_aliases_and_merged_mappings_are_read(tmp_path):
    config = from_file(tmp_path, "data: &all {source: no, target: de}\nbuffers: {<<: [{open: 1, close: 3}], close: 1}\nname: &n 007\n")
    assert (config.data.source, config.buffers.open, config.buffers.close, config.name) == ("no", 1, 1, "007")


def test_a_byte_order_mark_is_no_setting(tmp_path):
    (tmp_path / "config.yaml").write_bytes("steps: 7\n".encode("utf-8-sig"))
    assert load_config(tmp_path / "config.yaml").steps == 7


def test_a_sweep_is_read_by_the_settings_types_too(tmp_path):
    (tmp_path / "sweep.yaml").write_text(
        "name: 010\nsettings:\n  data.source: no\n  data.path: 0123\n  optimizer.lr: 1e-3\n  seed: 010\n"
        "space:\n  data.text_field: {choice: [0123, no]}\n  optimizer.warmup: {choice: [010, 1e1]}\n"
        "  data.label_field: {choice: [1e5], when: {data.text_field: 0123}}\n  optimizer.weight_decay: {log: [1e-3, 1e-1]}\n"
        "objective: {kind: loss}\nscheduler: none\n",
        encoding="utf-8",
    )
    sweep = load_sweep(tmp_path / "sweep.yaml", ["settings.data.target=off", "trials=010", "name=1:30"])
    assert (sweep.name, sweep.trials) == ("1:30", 10)
    assert sweep.settings == {"data.source": "no", "data.path": "0123", "optimizer.lr": 1e-3, "seed": 10, "data.target": "off"}
    by_name = {parameter.name: parameter for parameter in sweep.search_space.varying}
    assert by_name["data.text_field"].values == ("0123", "no")
    assert by_name["optimizer.warmup"].values == (10, 10.0)
    assert by_name["data.label_field"].when == (("data.text_field", ("0123",)),)
    assert by_name["optimizer.weight_decay"].values == (1e-3, 1e-1)


text = st.one_of(st.sampled_from(TEXTS), st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8))
number = st.floats(min_value=1e-12, max_value=1e12)
group = st.one_of(
    st.builds(
        DataSettings,
        path=st.none() | text,
        source=text,
        tokenizer=text,
        max_bytes=st.none() | st.integers(1, 2**70),
        streaming=st.booleans(),
    ),
    st.builds(StepSettings, middle=st.one_of(number, st.just("1/N"), st.just("2.5e-3/N")), buffer=number),
    st.builds(
        MGRITSettings, coarsening=st.one_of(st.integers(2, 99), st.lists(st.integers(2, 99), min_size=1)), tolerance=st.none() | number
    ),
    st.builds(
        AdaptiveSettings, ladder=st.none() | st.lists(st.sampled_from(["1+1", "0+2", "2+1 FCF"]), min_size=1), switch_at=st.integers(0)
    ),
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(group)
def test_what_is_printed_is_parsed_as_it_was(values):
    kind = type(values)
    found = parse_yaml(to_text(values.model_dump(mode="json")), lambda path: kind_in(kind, path))
    assert kind.model_validate(found) == values


@pytest.mark.parametrize("given_text", TEXTS)
def test_text_that_looks_like_something_else_survives(given_text):
    printed = to_yaml(make_config({"data": {"path": given_text}}))
    assert parse_yaml(printed, lambda path: None)["data"]["path"] == given_text
