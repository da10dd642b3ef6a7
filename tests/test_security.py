"""What is refused in files that others have written (docs/security.md)."""

import os

import pytest
import yaml

from rayllp.checkpoint.export import export
from rayllp.config import make_config
from rayllp.errors import CheckpointError, SettingsError
from rayllp.models import FAMILIES, refuse_unnamed_code
from rayllp.training.messages import describe_other_length
from rayllp.training.prepare import prepare
from rayllp.tuning.run import _refuse_others_files

STRANGER = "stranger.module:Class"


def test_code_that_a_runs_own_settings_name_is_not_imported_unless_named_again(tmp_path, monkeypatch):
    config = make_config({"model": {"family": STRANGER}})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    for refused in (lambda: prepare(None, resume=tmp_path), lambda: export(tmp_path, tmp_path / "to")):
        with pytest.raises(SettingsError, match=f"name code to import, model.family '{STRANGER}'"):
            refused()
    for named in (lambda: prepare(config, resume=tmp_path), lambda: export(tmp_path, tmp_path / "to", family=STRANGER)):
        with pytest.raises(CheckpointError, match="no complete checkpoint"):
            named()
    with pytest.raises(SettingsError, match="--family"):
        refuse_unnamed_code(config, tmp_path, "another:Class")
    monkeypatch.setitem(FAMILIES, "mine", STRANGER)
    refuse_unnamed_code(config, tmp_path)


def test_a_sweep_that_others_own_or_may_write_is_not_gone_on_with(tmp_path, monkeypatch):
    (tmp_path / "tune").mkdir()
    state = tmp_path / "tune" / "searcher-state.pkl"
    state.write_bytes(b"")
    state.chmod(0o600)
    _refuse_others_files(tmp_path)
    state.chmod(0o666)
    with pytest.raises(SettingsError, match=r"searcher-state\.pkl can be written by every user.*pickled.*chmod"):
        _refuse_others_files(tmp_path)
    state.chmod(0o600)
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(SettingsError, match="belongs to another user"):
        _refuse_others_files(tmp_path)
    _refuse_others_files(tmp_path / "absent")


def test_a_run_that_is_made_longer_says_what_its_learning_rate_becomes():
    config = make_config({"steps": 300})
    words = describe_other_length(config, 250, 250)
    assert words.startswith("300 steps instead of 250: ")
    assert "from 0.0001 to 0.000167 at once" in words
