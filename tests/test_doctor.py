"""What `rayllp doctor` finds on made-up nodes, and on the suite's own cluster."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from rayllp.cluster.doctor import Diagnosis, Node, _compare, _shared_place, examine, show

NODE = Node(
    id="a", address="10.0.0.1", host="one", versions={"Python": "3.12.1", "ray": "2.60.0", "torch": "2.13.0", "transformers": "5.20.0",
    "safetensors": "0.6", "rayllp": "0.1.0"}, cpus=8.0, gpus=[], nccl="–", clock_skew_s=0.01, shared="ok",
)  # fmt: skip
ONLY_RAY = {name: version if name in ("Python", "ray") else "–" for name, version in NODE.versions.items()}


def faults_of(*nodes):
    found = Diagnosis(nodes=list(nodes))
    _compare(found)
    return found.faults


def test_nodes_that_agree_have_no_fault():
    assert not faults_of(NODE, replace(NODE, host="two"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"versions": {**NODE.versions, "Python": "3.11.7"}}, "Python differs (one 3.12.1, two 3.11.7): install the same"),
        ({"versions": {**NODE.versions, "torch": "2.12.0"}}, "torch differs (one 2.13.0, two 2.12.0)"),
        ({"versions": ONLY_RAY}, "two lacks torch, transformers, safetensors"),
        ({"clock_skew_s": -3.2}, "the clock of two is -3.2 s off"),
        ({"shared": "FileNotFoundError"}, "two cannot use the shared path (FileNotFoundError)"),
    ],
)
def test_what_differs_is_told_with_what_to_do(change, message):
    assert any(message in fault for fault in faults_of(NODE, replace(NODE, host="two", **change)))


def test_workers_that_yield_to_everything_are_noted():
    found = Diagnosis(nodes=[replace(NODE, host="first"), replace(NODE, host="two", niceness=15, wait_policy="")])
    _compare(found)
    assert not found.faults
    assert [("two" in note, "first" in note) for note in found.notes] == [(True, False)] * 2
    assert "RAY_worker_niceness=0" in found.notes[0]
    assert "OMP_WAIT_POLICY=PASSIVE" in found.notes[1]


def test_no_node():
    assert faults_of() == ["no node answered: is the cluster up? `ray status` tells"]


def test_nothing_is_cut_off_where_there_are_80_columns():
    """80 columns are the width of a log, and of a usual terminal."""
    console = Console(width=80, file=io.StringIO())
    old = replace(NODE, host="old", address="10.0.0.3", gpus=["NVIDIA H200"] * 8, versions=ONLY_RAY)
    show(Diagnosis(nodes=[NODE, replace(NODE, host="two", address="10.0.0.2"), old]), console)
    text = console.file.getvalue()
    assert "one, two: Python 3.12.1, ray 2.60.0, torch 2.13.0, transformers 5.20.0, safetensors 0.6, rayllp 0.1.0, NCCL –\n" in text
    assert "old: Python 3.12.1, ray 2.60.0, torch –, transformers –, safetensors –, rayllp –, NCCL –\n" in text
    assert all(said in text for said in ("10.0.0.3", "+0.010", "shared path", "8 × NVIDIA H200"))
    assert "…" not in text


@pytest.mark.usefixtures("ray_cluster")
def test_a_real_cluster(tmp_path):
    found = examine(str(tmp_path / "shared"))
    assert not found.faults
    ((node,), (link,)) = found.nodes, found.links
    assert node.shared == "ok"
    assert not (tmp_path / "shared").exists()
    assert 0 < link.latency_s < 1
    assert link.bandwidth_gb_s > 0.01
    console = Console(record=True, width=200, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    show(found, console)
    assert "nothing to fix" in console.export_text()


def test_a_path_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    found = Diagnosis()
    with _shared_place(str(tmp_path / "file" / "below"), found) as place:
        assert place is None
    assert "cannot be written here" in found.faults[0]
