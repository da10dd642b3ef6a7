"""Settings and the command line: what is refused, and with which message."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from rayllp import cli
from rayllp.cli import app
from rayllp.config import TrainConfig, default_blocks, load_config, make_config, setting_names, to_yaml
from rayllp.errors import SettingsError
from rayllp.report import RunDirectory, read_lines
from rayllp.report.settings import WORTH_KNOWING, documents, settings_table
from rayllp.training.checkpointing import Checkpointer
from rayllp.training.prepare import prepare

FIXED_NAMES = (
    "model.family model.layers model.width model.heads model.dropout data.path data.dataset data.tokenizer sequence_length "
    "batch_size steps seed dtype workers mesh.data mesh.layer device channel mode mgrit.coarsening mgrit.levels.forward "
    "mgrit.levels.backward mgrit.iterations.forward mgrit.iterations.backward mgrit.relaxation.fine mgrit.relaxation.coarse "
    "mgrit.cycle mgrit.coarse_step_weight buffers.open buffers.close step.middle step.buffer "
    "adaptive.probe_every adaptive.threshold optimizer.lr optimizer.warmup optimizer.weight_decay optimizer.clip eval.every "
    "checkpoint.every checkpoint.keep "
).split()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mgrit.coarsning=4", "unknown setting mgrit.coarsning; did you mean mgrit.coarsening"),
        ("coarsening=4", "unknown setting coarsening; did you mean mgrit.coarsening"),
        ("steps=many", r"steps: .*integer.*'many'"),
        ("steps=0", "steps: .*greater than or equal to 1"),
        ("mgrit.coarsening=16", "coarsening .16. of 16 layers leaves one coarse step"),
        ("mgrit.levels.forward=4", "leaves one coarse step on level 2.*fewer mgrit.levels than 4"),
        ("workers=17", "17 layer-parallel workers for 16 middle layers: use at most 16"),
        ("buffers.open=18", r"leave 0 of 20 layers for the middle"),
        ("mesh.data=3", "workers|batch_size 8 does not divide by mesh.data=3"),
        ("model.heads=5", "width 64 does not divide by 5 heads"),
        ("step.middle=1/L", "give a positive number"),
        ("mode=fast", "mode: .*'parallel', 'serial' or 'adaptive'.*'fast'"),
        ("mgrit.relaxation.fine=FC", "'F' or 'FCF'"),
        ("model=3", "model: "),
        ("accumulate=3", "do not divide into accumulate=3"),
        ("novalue", "write key=value"),
        ("optimizer.lr=inf", "optimizer.lr: .*finite number.*inf"),
        ("step.middle=nan", "step.middle"),
        ("step.middle=nan/N", "give a positive number"),
        ("optimizer.muon_lr=0.02", "muon_lr=0.02 is Muon's, and name is adamw: set name: muon, or leave muon_lr out"),
        ("optimizer.betas=[0.9, 1.0]", r"betas \(0.9, 1.0\): each must be at least 0 and below 1"),
    ],
)
def test_bad_settings_are_refused_in_words(override, message):
    with pytest.raises(SettingsError, match=message):
        load_config(None, ["solver=mgrit", override] if override.startswith("mgrit") else [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "mgrit.coarsening=8",
            "mgrit.coarsening is of solver: mgrit, and solver is windows: set solver: mgrit, or leave mgrit.coarsening out",
        ),
        ("mesh.placement=cyclic", "mesh.placement is now solver: windows takes layers in turn, mgrit blocks of neighbouring ones"),
        ("mgrit.window=4", "mgrit.window is now windows.length"),
        ("mgrit.recompute=true", "mgrit.recompute is now recompute"),
        ("adaptive.cut_windows=false", "adaptive.cut_windows is now windows.rolling"),
        ("windows.cut=false", "windows.cut is now windows.rolling"),
    ],
)
def test_settings_of_earlier_versions_and_of_another_solver_are_refused(override, message):
    with pytest.raises(SettingsError, match=message):
        load_config(None, [override])


def test_levels_that_a_ladder_alone_asks_for_are_refused_too():
    serial = {"solver": "mgrit", "model": {"layers": 8}, "mgrit": {"levels": {"forward": 1, "backward": 1}}}
    for ladder in (None, ["0+1"]):
        make_config({**serial, "adaptive": {"ladder": ladder}})
    with pytest.raises(SettingsError, match=r"coarsening \[4\] of 4 layers leaves one coarse step"):
        make_config({**serial, "adaptive": {"ladder": ["0+1", "1+1"]}})


def test_all_faults_are_listed_at_once():
    with pytest.raises(SettingsError) as caught:
        make_config({"steps": -1, "sede": 1, "model": {"width": "wide"}})
    assert all(part in str(caught.value) for part in ("steps", "sede; did you mean seed", "model.width"))


def test_fixed_names_exist_and_the_table_lists_all():
    names = setting_names()
    assert set(FIXED_NAMES) <= set(names)
    table = settings_table()
    assert all(f"| `{name}` |" in table for name in names)
    assert "| – |\n" not in table
    assert all(line.count(" | ") == 3 for line in table.splitlines()[2:])


def test_the_documents_have_the_tables_of_the_code():
    assert set(WORTH_KNOWING) <= set(setting_names())
    for path, text in documents(Path(__file__).parents[1]).items():
        assert path.read_text() == text, f"{path.name} is behind: python -m rayllp.report.settings"


def test_a_config_survives_yaml(tmp_path):
    config = load_config(
        None, ["solver=mgrit", "mgrit.coarsening=[4, 2]", "mgrit.levels.forward=3", "optimizer.lr=1e-4", "step.middle=1/N"]
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert config.optimizer.lr == 1e-4
    assert config.middle_step == 1 / 16


def test_files_that_are_no_settings(tmp_path):
    with pytest.raises(SettingsError, match="cannot read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(SettingsError, match="must be a mapping"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(SettingsError, match="is not YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(SettingsError, match=r"latin\.yaml is not UTF-8 text \(.* at byte 6\)"):
        load_config(tmp_path / "latin.yaml")


def test_a_group_that_a_file_leaves_empty_can_be_set(tmp_path):
    (tmp_path / "config.yaml").write_text("solver: mgrit\nmgrit:\n")
    assert load_config(tmp_path / "config.yaml", ["mgrit.coarsening=8"]).mgrit.coarsening == 8


def test_blocks_are_cut_at_c_points_where_that_is_free():
    assert default_blocks(16, 2, 4) == (8, 8)
    assert default_blocks(12, 2, 4) == (6, 6)
    assert default_blocks(32, 4, 8) == (8, 8, 8, 8)
    assert default_blocks(30, 4, 4) == (8, 8, 8, 6)
    assert default_blocks(3, 2, 4) == (2, 1)
    for layers, workers, c in ((23, 5, 4), (17, 3, 2), (64, 7, 8)):
        assert sum(default_blocks(layers, workers, c)) == layers


def test_the_command_line_refuses_without_a_traceback(tmp_path):
    result = CliRunner().invoke(app, ["train", "--set", "steps=0", "--output", str(tmp_path / "run")])
    assert isinstance(result.exception, SettingsError)
    assert not (tmp_path / "run").exists()
    assert CliRunner().invoke(app, ["train", "--resume", "x", "--output", "y"]).exit_code == 2
    assert "x is not a run directory" in str(CliRunner().invoke(app, ["train", "--resume", "x", "--set", "steps=1"]).exception)
    assert "mgrit.coarsening" in CliRunner().invoke(app, ["settings"]).output


def test_the_default_is_valid_and_immutable():
    config = TrainConfig()
    assert config.world == 2
    assert config.model.layers >= 16
    with pytest.raises(ValueError):
        config.steps = 3


def test_settings_change_in_a_run_whose_last_event_was_cut_off(tmp_path):
    before, now = make_config({"steps": 3}), make_config({"steps": 4})
    run = RunDirectory.create(tmp_path / "run", before)
    run.event(1, "checkpoint")
    with (run.path / "events.jsonl").open("a") as file:
        file.write('{"step": 2, "ki')
    run.change_settings(before, now)
    assert [event["kind"] for event in read_lines(run.path / "events.jsonl")] == ["checkpoint", "settings"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("held", r"held holds another run: choose another with --output, or resume it with --resume"),
        ("full", r"full holds other files"),
        ("file", r"file is a file"),
        ("file/run", r"file/run cannot be written: .*file is a file"),
        ("x" * 300, r"cannot be written: File name too long"),
    ],
)
def test_output_is_refused_before_a_cluster_is_started(tmp_path, output, message):
    (tmp_path / "file").touch()
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    with pytest.raises(SettingsError, match=message):
        prepare(make_config({}), output=tmp_path / output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "held"]
    assert prepare(make_config({}), output=tmp_path / "new" / "run").run is None
    assert not (tmp_path / "new").exists()


def test_names_are_parts_of_paths():
    with pytest.raises(SettingsError, match="name"):
        make_config({"name": "a/b"})
    assert make_config({"name": "β 1"}).name == "β 1"


def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path):
    config = make_config({"checkpoint": {"best": True}})
    checkpointer = Checkpointer(RunDirectory.create(tmp_path / "run", config), None, None, config)
    checkpointer.note_loss(1, float("nan"), 4)
    assert not checkpointer.is_wanted(1)
    checkpointer.note_loss(2, 3.0, 4)
    assert checkpointer.is_wanted(2)


@pytest.mark.parametrize(("encoding", "wanted"), [("ascii", "? at ?t ? 1 ?"), ("utf-8", "ρ at Δt → 1 ∞")])
def test_output_that_cannot_show_a_sign_goes_on(monkeypatch, encoding, wanted):
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", shown)
    monkeypatch.setattr(cli, "app", lambda: Console().print("ρ at Δt → 1 ∞"))
    cli.main()
    shown.flush()
    assert shown.buffer.getvalue().decode().strip() == wanted
