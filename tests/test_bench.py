"""`rayllp bench`: emulated layers, timelines on logical clocks, and the three commands on a real cluster."""

import json
import time
from itertools import pairwise

import pytest
import torch
from typer.testing import CliRunner

from rayllp.bench.emulated import EmulatedLayer, Emulation, RandomBatches, emulated_stack
from rayllp.channel import LocalChannel, run_workers
from rayllp.channel.timing import time_messages
from rayllp.cli import app
from rayllp.control import Controller
from rayllp.engine import Engine
from rayllp.errors import SettingsError
from rayllp.plan import Costs, predict
from rayllp.report.gantt import draw_timeline, write_trace
from rayllp.timeline import Timeline
from tests.conftest import tiny


def seconds_of(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def test_an_emulated_layer_takes_its_times_where_they_are_asked_for():
    layer = EmulatedLayer(4, Emulation(0.02, 0.04, 0.08))
    x = torch.randn(2, 3, 4, requires_grad=True)
    outputs = []
    assert seconds_of(lambda: outputs.append(layer(x))) >= 0.02
    y = outputs[0]
    seed = torch.ones_like(y)
    # The least of a few: a machine with other work may take longer for any of them.
    times = [seconds_of(lambda: torch.autograd.grad(y, x, seed, retain_graph=True)) for _ in range(5)]
    assert 0.04 <= min(times) < 0.12  # not the weight's
    assert seconds_of(lambda: torch.autograd.backward(y, seed, inputs=[x, layer.bias])) >= 0.12
    # What it computes is real.
    torch.testing.assert_close(x.grad, 1 + (x.abs() < 1).float())
    torch.testing.assert_close(layer.bias.grad, torch.full((4,), 6.0))


@pytest.mark.parametrize(
    ("text", "times"), [("10ms", (0.01, 0.01, 0.01)), ("1ms,500us,0.2s", (1e-3, 5e-4, 0.2)), ("2 ms", (0.002,) * 3), ("0s", (0, 0, 0))]
)
def test_times_are_read(text, times):
    assert Emulation.parse(text) == pytest.approx(Emulation(*times))


@pytest.mark.parametrize("text", ["", "10", "ms", "1ms,2ms", "-3ms", "1ms,2ms,3ms,4ms", "fast"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(SettingsError, match="--emulate"):
        Emulation.parse(text)


def test_a_step_s_timeline_is_the_predicted_one(monkeypatch):
    """Each worker does the same work in the same order, measured and on logical clocks. Where the order depends on when messages arrive,
    here they are always late, on logical clocks because they take long.
    """
    monkeypatch.setattr(LocalChannel, "arrived", lambda *_: False)
    config = tiny(workers=3, buffers={"open": 0, "close": 0}, model={"layers": 13}, dtype="float32", mgrit={"coarsening": 3})
    accuracy, times = Controller(config).chosen, Emulation(0.0, 0.0, 0.0)

    def work(channel):
        engine = Engine(emulated_stack(config, times), config, RandomBatches(config), channel, LocalChannel.alone(), torch.device("cpu"))
        engine.timeline = Timeline()
        engine.train_step(0, accuracy)
        return [span for span in engine.timeline.spans if span.kind == "compute" and span.phase]

    measured = run_workers(3, work)
    predicted = predict(config, accuracy, Costs(forward=1, record=1, input_gradient=1, full_gradient=2, message=100)).spans
    for mine, theirs in zip(measured, predicted, strict=True):
        theirs = [span for span in theirs if span.kind == "compute" and span.phase]
        # What the last sweep takes from the coarse solve is a span without length, which a prediction leaves out.
        known = {(s.solve, s.layer) for s in theirs if s.phase == "last sweep"}
        mine = [s for s in mine if s.phase != "last sweep" or (s.solve, s.layer) in known]
        assert [span[3:] for span in mine] == [span[3:] for span in theirs]
        assert all(a.end <= b.begin for a, b in pairwise(mine))


def test_a_timeline_is_drawn_and_written(tmp_path):
    config = tiny(workers=4, buffers={"open": 0, "close": 0}, model={"layers": 16})
    found = predict(config, Controller(config).chosen, Costs(forward=1, record=1, input_gradient=1, full_gradient=2, message=0.1))
    assert found.step_s == max(span.end for spans in found.spans for span in spans)
    draw_timeline(found.spans, tmp_path / "new" / "step.png")
    assert (tmp_path / "new" / "step.png").stat().st_size > 5000
    write_trace(found.spans, tmp_path / "step.json")
    events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == sum(map(len, found.spans))
    assert {event["tid"] for event in events} == {0, 1, 2, 3}
    assert max(event["ts"] + event["dur"] for event in events if event["ph"] == "X") == pytest.approx(1e6 * found.step_s)


def test_links_are_timed_pair_by_pair():
    found = run_workers(3, lambda channel: time_messages(channel, [1024, 4096], torch.device("cpu"), rounds=3))
    assert [[link.worker for link in links] for links in found] == [[0], [1], []]
    assert set(found[0][0].seconds) == {1024, 4096}
    assert found[0][0].bandwidth_gb_s > 0


@pytest.mark.usefixtures("ray_cluster")
def test_the_commands(tmp_path):
    def run(*arguments):
        result = CliRunner().invoke(app, ["bench", *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    small = ["model.layers=16", "model.width=16", "model.heads=2", "sequence_length=16", "batch_size=4", "workers=2", "mode=parallel"]
    sets = [part for setting in [*small, "buffers.open=0", "buffers.close=0"] for part in ("--set", setting)]
    times = ["--emulate", "4ms", "--steps", "3", "--json", str(tmp_path / "step.json"), "--picture", str(tmp_path / "step.svg")]
    output = run("step", *sets, *times, "--trace", str(tmp_path / "trace.json"))
    assert "time over ideal" in output
    found = json.loads((tmp_path / "step.json").read_text())
    assert set(found) == {"step_s", "forward_s", "backward_s", "serial_s", "ideal_s", "phases", "steps"}
    assert found["serial_s"] == pytest.approx(16 * 0.012)
    assert found["ideal_s"] <= found["step_s"]
    assert len(found["phases"]) == 2
    assert (tmp_path / "step.svg").exists()
    assert (tmp_path / "trace.json").exists()
    assert "4 KiB, µs" in run("links", *sets, "--json", str(tmp_path / "links.json"))
    assert len(json.loads((tmp_path / "links.json").read_text())) == 1
    assert "full gradient" in run("layers", *sets, "--json", str(tmp_path / "layers.json"))
    layers = json.loads((tmp_path / "layers.json").read_text())
    assert layers["parameter_bytes"] == 4 * (12 * 16 * 16 + 13 * 16)
    assert layers["graph_bytes"] > layers["state_bytes"] == 4 * 4 * 16 * 16
