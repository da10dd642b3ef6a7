"""`rayllp report`: the page shows what the run's files hold, whatever that is; and what listeners and TensorBoard get."""

import ast
import json
import time
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from typer.testing import CliRunner

import rayllp
from rayllp.cli import app
from rayllp.errors import NotARunError, SettingsError
from rayllp.report import Journal, read_lines
from rayllp.report.loggers import opened_loggers
from rayllp.report.page import compare, read_run, read_runs, write_report
from rayllp.report.page.charts import Chart, Curve, thin, write_count, write_number, write_time
from rayllp.report.page.compare import t_quantile
from rayllp.report.page.figures import build_charts
from rayllp.report.page.workers import memory, step_timelines, time_splits
from rayllp.timeline import Span, TimedStep, Timeline, sum_kinds
from tests.synthetic import begin_run, long_run, metric, probe, small_run, timed_step

VOID = set("meta link input br img hr".split())


class Page(HTMLParser):
    """Parses a page into its elements, and checks that every one of them is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.attributes, self.rows = [], [], {}, [], []
        self.scripts, self.titles = [], {}  # the latter by the ids of the pictures' places
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"
        drawn = {root["id"]: root for root in json.loads(self.scripts[0])["roots"]}
        self.pictures = [(title, drawn.pop(key)) for key, title in self.titles.items()]
        assert not drawn, "pictures without a place"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "script":
            self.scripts.append("")
        if dict(attributes).get("class") == "plot":
            self.titles[dict(attributes)["id"]] = self.texts["h3"][-1]

    def handle_startendtag(self, tag, attributes):
        self.attributes.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    @property
    def words(self):
        return " ".join(" ".join(part for tag, parts in self.texts.items() if tag not in ("script", "style") for part in parts).split())

    def models(self, title, kind):
        """Return the attributes of Bokeh's models of a kind, in the first picture whose title begins so."""
        found = next(root for name, root in self.pictures if name.startswith(title))
        return [each["attributes"] for each in models(found) if each["name"] == kind]

    def drawn(self, title, glyph, number=0):
        """Return the columns of what is drawn with this glyph; `number` selects one of several."""
        renderer = [each for each in self.models(title, "GlyphRenderer") if each["glyph"]["name"] == glyph][number]
        columns = dict(renderer["data_source"]["attributes"]["data"]["entries"])
        return {name: plain(column) for name, column in columns.items()}

    def curves(self, title):
        """Return a chart's curves by name: their horizontal and vertical values."""
        found = self.drawn(title, "MultiLine")
        return {name: (x, y) for name, x, y in zip(found["name"], found["xs"], found["ys"], strict=True)}


def models(value):
    """Yield Bokeh's models in a part of a page's data."""
    if isinstance(value, dict):
        if value.get("type") == "object" and "attributes" in value:
            yield value
        value = list(value.values())
    for each in value if isinstance(value, list) else []:
        yield from models(each)


def plain(value):
    """Return a column as a Python list."""
    if isinstance(value, dict):
        return float(value["value"])
    return [plain(each) for each in value] if isinstance(value, list) else value


def page_of(*runs, **options):
    return Page(write_report([run.path for run in runs], **options).page.read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("runs") / "small", sample="ROMEO: what light", seed=3)


@pytest.fixture(scope="module")
def page(run):
    return page_of(run)


# The page of one run ------------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_records(page, run):
    facts = dict(zip((text for text in page.texts["dt"]), page.texts["dd"], strict=True))
    metrics, evaluations = read_lines(run.path / "metrics.jsonl"), read_lines(run.path / "evals.jsonl")
    assert facts["Validation loss"] == f"{evaluations[-1]['loss']:.4f} after 100 steps"
    assert facts["Steps"] == "100 of 100"
    assert facts["In parallel"] == "80 % of the steps"
    assert facts["Tokens"] == "51.2 k" == write_count(sum(m["tokens"] for m in metrics))
    assert facts["Training loss"].startswith(f"{np.mean([m['loss'] for m in metrics[-5:]]):.4f}")
    assert facts["Events"] == "1 switch, 1 fault, 1 resize"
    assert (facts["Workers"], facts["Seed"]) == ("2 to 4", "3")


def test_curves_are_those_of_the_records(page, run):
    loss = page.curves("Loss against tokens")
    metrics = read_lines(run.path / "metrics.jsonl")
    assert list(loss) == ["training", "validation"]
    assert loss["training"][0] == pytest.approx(list(np.cumsum([m["tokens"] for m in metrics]) / 1e3))
    assert loss["training"][1] == pytest.approx([m["loss"] for m in metrics], rel=1e-5)
    assert loss["validation"] == ([25.6, 51.2], [2.0, 1.5])
    assert page.models("Loss against tokens", "LinearAxis")[1]["axis_label"] == "tokens (or patches of images), k"
    assert page.curves("Loss against time")["training"][0][-1] == pytest.approx(sum(m["step_time_s"] for m in metrics))
    assert page.models("Loss against time", "LinearAxis")[1]["axis_label"] == "time of the steps, s"
    assert {name: y for name, (_, y) in page.curves("Bias").items()} == {"bias": [0.05], "noise": [0.4]}
    assert {name: y for name, (_, y) in page.curves("Loss of the solve").items()} == {"difference": [-0.002]}
    # without the probe's four, and 0 where serial
    assert page.curves("Iterations in use")["forward"] == ([0, 80, 80, 100, 100], [2, 2, 0, 0, 0])
    assert page.curves("Workers")["workers"] == ([0, 50, 50, 100, 100], [4, 4, 2, 2, 2])
    assert ["validation", "25,600", "2", ""] in page.rows
    # 2 + 16 + 2 layers, intervals of 4: those that are exact are no points.
    assert page.curves("Convergence factor by layer") == {
        "forward, step 25": ([10, 14], [0.2, 0.3]), "backward, step 25": ([6, 10], [0.4, 0.5])
    }  # fmt: skip
    dots = page.drawn("Loss against tokens", "Scatter")
    assert (dots["x"], dots["y"]) == loss["validation"]


def test_curves_can_be_told_apart_without_colours(page):
    found = page.drawn("Convergence factor", "MultiLine")
    assert (found["name"], found["dash"]) == (["forward", "backward"], ["solid", "dashed"])
    assert len(set(found["colour"])) == 2


def test_marks_bands_and_events_are_those_of_the_run(page):
    marks = page.drawn("Loss against tokens", "VSpan")
    assert list(zip(marks["kind"], marks["x"], strict=True)) == [("fault", 12.8), ("resize", 25.6), ("switch", 40.96)]
    assert "4 workers became 2" in marks["text"][1]
    symbols = page.drawn("Loss against tokens", "Text")
    assert list(zip(symbols["glyph"], symbols["x"], strict=True)) == [("✕", 12.8), ("▲", 25.6), ("◆", 40.96)]
    assert [words for words in page.texts["span"] if words in ("switch", "fault", "resize")] == ["switch", "fault", "resize"]
    band = page.drawn("Loss against tokens", "VStrip")
    assert (band["left"], band["right"]) == ([40.96], [51.2])
    kinds = [row[1] for row in page.rows if len(row) == 4 and row[1] in ("fault", "restore", "resize", "switch")]
    assert kinds == ["fault", "restore", "resize", "switch"]
    assert any(row[2:] == ["step 25: restored from memory, 3 steps lost", "2.5 s"] for row in page.rows)
    assert "1 checkpoint." in page.words


def test_thresholds_are_drawn(run, page):
    charts = {chart.key: chart for chart in build_charts(read_runs([run.path]))}
    assert [(rule.y, rule.text) for rule in charts["rho"].rules] == [(1.0, "threshold 1 (not watched: rule bias)")]
    assert [(rule.y, rule.text) for rule in charts["bias"].rules] == [(0.1, "limit 0.1")]
    assert [span["location"] for span in page.models("Bias", "Span")] == [0.1]
    assert "limit 0.1" in [label["text"] for label in page.models("Bias", "Label")]
    assert page.models("Bias", "LogAxis")
    assert not page.models("Loss against tokens", "LogAxis")


def test_workers_times_and_memory(page, run):
    record = read_run(run.path)
    parallel, serial = time_splits(record)
    assert (parallel.kind, serial.kind) == ("2 forward + 1 backward iterations, 4 workers", "serial, 2 workers")
    assert parallel.workers[0] == pytest.approx({"compute": 0.06, "send": 0.01, "wait": 0.02, "other": 0.01})
    assert serial.step_s == pytest.approx(0.2)
    assert ["0", "60.00", "10.00", "20.00", "10.00"] in page.rows
    assert ["adjoint last sweep", "50.00", "50.00", "50.00", "50.00"] in page.rows
    assert [worker.resident for worker in memory(record)] == [2**30, 2**30 + 2**20]
    assert "1 GiB" in page.words
    first = step_timelines(record)[0]
    assert first.seconds == pytest.approx(0.103)
    span = first.workers[3][0]  # of a worker that began 3 ms after the first
    assert span[:2] == pytest.approx((0.003, 0.013))
    assert span[2:] == ("compute", "forward", "coarse solve", 1, 0)
    bars = page.drawn("Timeline of step 33", "HBar")
    drawn = list(zip(*(bars[name] for name in ("row", "name", "begin", "end")), strict=True))
    assert ("3", "forward coarse solve", 3.0, 13.0) in drawn
    assert len(drawn) == 16  # four workers, four spans each
    bars = page.drawn("Where a step's time goes: serial", "HBar")
    assert (bars["name"][:4], bars["end"][:4]) == (["compute", "send", "wait", "other"], pytest.approx([120, 140, 180, 200]))
    assert page.drawn("Memory by worker", "HBar")["end"] == [1024, 1025]


def test_settings_and_sample(page):
    assert ["seed", "3", "0"] in page.rows
    assert "ROMEO: what light" in page.texts["pre"]
    assert any("layers: 20" in text for text in page.texts["pre"])


def test_the_page_needs_no_other_and_can_be_heard(page):
    for tag, attributes in page.attributes:
        assert not ({"src", "srcset", "action", "poster"} & attributes.keys()), (tag, attributes)
        assert attributes.get("href", "data:,") == "data:,"
    assert "url(" not in "".join(page.texts["style"])
    assert "@import" not in "".join(page.texts["style"])
    policy = next(a["content"] for tag, a in page.attributes if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    pictures = [a for _, a in page.attributes if a.get("class") == "plot"]
    assert len(pictures) == len(page.pictures) > 8
    assert all(len(a["aria-label"]) > 20 for a in pictures)
    assert any("validation: first 2, last 1.5, least 1.5, largest 2" in a["aria-label"] for a in pictures)
    targets = [a["aria-labelledby"] for tag, a in page.attributes if tag == "section"]
    assert set(targets) <= {a["id"] for _, a in page.attributes if "id" in a}
    assert page.tags.count("h1") == 1


def test_a_run_that_recorded_little(tmp_path):
    run = begin_run(tmp_path / "run", timeline_every=0)
    run.metric(metric(0))
    page = page_of(run)
    assert "No step of this run was timed" in page.words
    assert "No switch, fault or resize." in page.words
    assert "What the model writes" not in page.words


# What runs hold may be anything -------------------------------------------------------------------------------------------------

EVIL = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>\" onmouseover=alert(3) x='{{ 7 * 7 }}"


def test_texts_are_escaped(tmp_path):
    name = "<img src=x onerror=alert(2)>\" onmouseover='alert(3)"
    run = small_run(tmp_path / name, sample=EVIL, name=EVIL.replace("/", "")[-100:])  # part of a path
    run.event(1, "fault", reason=EVIL, ranks=[0])
    run.evaluation(100, "validation", 1.25, **{EVIL: 3.0})
    page = page_of(run, title=EVIL)
    assert "img" not in page.tags
    assert not any(key.startswith("on") for _, attributes in page.attributes for key in attributes)
    kinds = [a.get("type") for tag, a in page.attributes if tag == "script"]
    assert kinds == ["application/json", None, None]  # what Bokeh draws, Bokeh, and the page's own
    assert page.texts["h1"] == [EVIL]
    assert EVIL in page.texts["pre"]
    assert any(EVIL in row[2] for row in page.rows if len(row) == 4)
    assert any(EVIL in text for text in page.drawn("Loss against tokens", "VSpan")["text"])
    assert EVIL in page.curves(EVIL)


def test_a_long_sample_is_cut_and_the_page_says_so(tmp_path):
    run = small_run(tmp_path / "run", steps=10, sample="x" * 20_100)
    text = next(text for text in page_of(run).texts["pre"] if text.startswith("xxx"))
    assert text == "x" * 20_000 + "\n… and 100 characters more"


def test_many_events_are_cut_and_the_page_says_so(tmp_path):
    run = begin_run(tmp_path / "run")
    run.metric(metric(0))
    for step in range(340):
        run.event(step, "fault", reason=f"number {step}", ranks=[])
    page = page_of(run)
    assert "40 events in the middle are left out." in page.words
    told = [row[2] for row in page.rows if len(row) == 4 and row[1] == "fault"]
    assert (len(told), told[149], told[150]) == (300, "step 149: fault: number 149", "step 190: fault: number 190")


def test_values_that_are_not_finite(tmp_path):
    run = begin_run(tmp_path / "run")
    for step, rho in enumerate((0.1, float("inf"), float("nan"), 0.0)):
        run.metric(probe(step, rho_forward=rho, bias=rho))
    page = page_of(run)
    assert page.curves("Convergence factor")["forward"][1] == [0.1, pytest.approx(np.nan, nan_ok=True), pytest.approx(np.nan, nan_ok=True),
                                                               pytest.approx(np.nan, nan_ok=True)]  # fmt: skip
    beyond = page.drawn("Convergence factor", "Scatter", 1)  # the first are the points
    assert list(zip(beyond["x"], beyond["text"], beyond["marker"], strict=True)) == [
        (1, "forward: ∞", "triangle"), (2, "forward: not finite", "triangle"), (3, "forward: 0", "inverted_triangle"),
    ]  # fmt: skip
    (plot,) = page.models("Convergence factor", "Figure")
    top, bottom = plot["y_range"]["attributes"]["end"], plot["y_range"]["attributes"]["start"]
    assert top > beyond["y"][0] == beyond["y"][1] > 1.0
    assert 0.1 > beyond["y"][2] > bottom > 0
    assert "∞" in [row[2] for row in page.rows if len(row) == 4]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "is not a run directory .no config.yaml.: give the directory that a run printed"),
        (lambda path: begin_run(path), "has no step in metrics.jsonl, and a report needs at least one: wait for"),
        (lambda path: _broken(path), "metrics.jsonl, line 2: not JSON .*: remove or fix it"),
    ],
)
def test_runs_that_are_none(tmp_path, prepare, message):
    path = tmp_path / "run"
    prepare(path)
    with pytest.raises(SettingsError, match=message):
        write_report([path])
    assert not (path / "report.html").exists()


def _broken(path):
    run = begin_run(path)
    run.metric(metric(0))
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1,\n')
    run.metric(metric(2))


def test_other_refusals(run, tmp_path):
    with pytest.raises(SettingsError, match="no run given"):
        write_report([])
    with pytest.raises(SettingsError, match="is given twice"):
        write_report([run.path, run.path])
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"--output .*report\.html cannot be written"):
        write_report([run.path], output=tmp_path / "file" / "report.html")
    with pytest.raises(SettingsError, match=r"--png .*pictures cannot be written"):
        write_report([run.path], png=tmp_path / "file" / "pictures")
    with pytest.raises(NotARunError):
        CliRunner().invoke(app, ["report", str(tmp_path / "gone")], catch_exceptions=False)


def test_a_line_cut_off_and_a_step_done_twice(tmp_path):
    run = begin_run(tmp_path / "run")
    for step, loss in ((0, 4.0), (1, 3.0), (1, 2.5)):
        run.metric(metric(step, loss=loss))
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert list(read_run(run.path).column("loss")) == [4.0, 2.5]


# Several runs, and how far apart they end ----------------------------------------------------------------------------------------


def runs_of(folder, mode, losses, seeds=None, **settings):
    seeds = range(len(losses)) if seeds is None else seeds
    return [
        small_run(folder / f"{mode}_{seed}", steps=20, mode=mode, seed=seed, losses=(3.0, loss), **settings)
        for seed, loss in zip(seeds, losses, strict=True)
    ]


def test_paired_gap(tmp_path):
    serial, adaptive = runs_of(tmp_path, "serial", (2.0, 2.1, 2.2)), runs_of(tmp_path, "adaptive", (2.02, 2.1, 2.211))
    (gap,) = compare(read_runs([run.path for run in (*serial, *adaptive)]), "serial").gaps
    gaps = [1.0, 0.0, 0.5]
    assert (gap.kind, gap.way, gap.seeds, gap.step, gap.differs) == ("adaptive", "paired", 3, 20, ())
    assert gap.percent == pytest.approx(0.5)
    assert gap.half_width == pytest.approx(4.302653 * np.std(gaps, ddof=1) / np.sqrt(3), rel=1e-5)
    page = page_of(*serial, *adaptive, output=tmp_path / "page.html", baseline="serial")
    assert "+0.50 %" in page.words
    assert "95 % t-interval -0.74 to +1.74 % over 3 seeds (the same seeds in both). It includes 0: no difference is shown." in page.words
    assert sum(tag == "input" for tag in page.tags) == 6
    curves = page.drawn("Loss against tokens", "MultiLine")
    assert sorted(set(curves["run"])) == list(range(6))
    assert len(set(curves["colour"])) == 6
    assert curves["name"][2:4] == ["serial_1, training", "serial_1, validation"]
    lanes = page.drawn("Loss against tokens", "Quad")
    assert lanes["run"] == [run for run in range(6) for _ in ("parallel", "serial")]
    assert len(set(lanes["colour"])) == len(set(lanes["top"])) == 6
    assert lanes["alpha"] == [1.0, 0.3] * 6
    (plot,) = page.models("Loss against tokens", "Figure")
    assert all(plot["y_range"]["attributes"]["start"] < edge < 2.0 for edge in lanes["bottom"] + lanes["top"])  # below all curves


def test_unpaired_gap_and_one_seed(tmp_path):
    serial, other = runs_of(tmp_path, "serial", (2.0, 2.02)), runs_of(tmp_path, "parallel", (2.2, 2.24), seeds=(5, 6))
    (gap,) = compare(read_runs([run.path for run in (*serial, *other)]), "serial").gaps
    assert (gap.way, gap.seeds) == ("unpaired", 2)
    assert gap.percent == pytest.approx(100 * (2.22 / 2.01 - 1))
    ratio = 2.22 / 2.01
    error = np.sqrt(0.0008 / 2 + ratio**2 * 0.0002 / 2) / 2.01
    assert gap.half_width == pytest.approx(100 * 12.7062 * error, rel=1e-4)  # 1.5 degrees of freedom, taken as 1
    (gap,) = compare(read_runs([serial[0].path, other[0].path]), "serial").gaps
    assert (gap.way, gap.half_width) == ("one seed", None)
    assert gap.sentence("serial").endswith("One seed only: how far another seed would end from this is not known.")
    page = page_of(serial[0], other[0], output=tmp_path / "page.html", baseline="serial")
    assert "One seed only" in page.words
    result = CliRunner().invoke(
        app, ["report", str(serial[0].path), str(other[0].path), "--compare", "serial", "--output", str(tmp_path / "x" / "p.html")]
    )
    assert result.exit_code == 0
    assert "parallel: validation loss 2.2000 after 20 steps, 10.00 % above serial's 2.0000. One seed only" in result.output


def test_kinds_are_told_apart_and_disagreement_is_said(tmp_path):
    serial = runs_of(tmp_path / "a", "serial", (2.0,))
    fine = runs_of(tmp_path / "b", "adaptive", (2.0,), solver="mgrit", mgrit={"coarsening": 2})
    coarse = runs_of(tmp_path / "c", "adaptive", (2.1,), solver="mgrit", mgrit={"coarsening": 4}, optimizer={"lr": 1e-2})
    found = compare(read_runs([run.path for run in (*serial, *fine, *coarse)]), "serial").gaps
    assert [gap.kind for gap in found] == [
        "adaptive, mgrit.coarsening 2, optimizer.lr 0.001", "adaptive, mgrit.coarsening 4, optimizer.lr 0.01",
    ]  # fmt: skip
    assert [gap.differs for gap in found] == [(), ("optimizer.lr",)]


def test_comparisons_that_cannot_be(tmp_path):
    serial, other = runs_of(tmp_path, "serial", (2.0,)), runs_of(tmp_path, "parallel", (2.0,))
    records = read_runs([serial[0].path, other[0].path])
    with pytest.raises(SettingsError, match="--compare fast: give a mode: serial, parallel or adaptive"):
        compare(records, "fast")
    with pytest.raises(SettingsError, match=r"of serial_0 .serial., parallel_0 .parallel. none is in mode adaptive: add one"):
        compare(records, "adaptive")
    with pytest.raises(SettingsError, match="all are in mode serial: add one"):
        compare(records[:1], "serial")
    short = begin_run(tmp_path / "short", mode="serial")
    short.metric(metric(0))
    with pytest.raises(SettingsError, match=r"last evaluations: parallel_0 20, short never: set eval\.every alike"):
        compare(read_runs([other[0].path, short.path]), "serial")


def test_quantiles_of_t():
    # tables of Student's distribution, 95 % between both sides
    for freedom, value in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (29, 2.045), (100, 1.984)):
        assert t_quantile(freedom) == pytest.approx(value, abs=6e-4)


def test_names_of_runs_that_are_called_alike(tmp_path):
    for folder in ("a", "b"):
        begin_run(tmp_path / folder / "run").metric(metric(0))
    assert [run.name for run in read_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"])] == ["a/run", "b/run"]


# Long runs ----------------------------------------------------------------------------------------------------------------------


def test_thinning_keeps_spikes():
    y = np.sin(np.arange(20_000) / 3000)
    y[7777], y[3] = 50.0, -60.0
    found = thin(np.arange(20_000), y, 400)
    assert len(found.x) == len(found.y) == 400
    assert (found.high.max(), found.low.min()) == (50.0, -60.0)
    assert found.y[100] == pytest.approx(y[5000:5050].mean())
    assert (np.diff(found.x) > 0).all()
    y[100] = np.nan
    assert np.isinf(thin(np.arange(20_000), y, 400).high[2])
    few = thin(np.arange(800), y[:800], 400)
    assert few.low is None
    assert len(few.y) == 800


def test_a_run_of_20000_steps(tmp_path):
    run = long_run(tmp_path / "long", steps=20_000)
    began = time.process_time()
    text = write_report([run.path]).page.read_text()
    seconds = time.process_time() - began
    assert len(text.encode()) < 2_800_000  # 1.3 MB are Bokeh; the bound is 5 MB
    assert seconds < 8
    page = Page(text)
    loss = page.curves("Loss against tokens")
    assert [len(x) for x, _ in loss.values()] == [400, 400, 400, 40]
    assert max(loss["training, largest"][1]) == 40.0  # the spike of one step
    assert max(page.drawn("Loss against tokens", "Patches")["ys"][0]) == 40.0
    assert loss["training"][0][-1] < 20_000 * 512 / 1e6


# Files, listeners and TensorBoard ------------------------------------------------------------------------------------------------


def test_pictures(tmp_path):
    run = begin_run(tmp_path / "run")
    for step in range(4):
        run.metric(metric(step, loss=4.0 - step, grad_norm=10.0**step))  # a logarithmic axis
    run.event(2, "resize", workers_before=4, workers=2, blocks=[8, 8], seconds=1.0)
    run.timeline(3, {"mode": "serial", "iterations_forward": None, "iterations_backward": None}, [(timed_step(), (1, None))], spans=True)
    written = write_report([run.path], output=tmp_path / "page.html", png=tmp_path / "png")
    keys = {chart.key for chart in build_charts(read_runs([run.path]))}
    assert {"loss_tokens", "loss_time", "iterations", "step_time", "grad_norm"} <= keys
    assert {path.stem for path in written.pictures} == {*keys, "timeline_0_0"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written.pictures)


def test_timelines_are_forgotten_with_their_steps(tmp_path):
    run = begin_run(tmp_path / "run")
    for step in (25, 75):
        run.timeline(step, {"mode": "serial"}, [(timed_step(), (1, None))], spans=step == 25)
    with (run.path / "timeline.jsonl").open("a") as file:
        file.write('{"step": 125, "wor')
    run.mend()
    run.truncate(75)
    (line,) = read_lines(run.path / "timeline.jsonl")
    assert line["step"] == 25
    assert [Span(*row) for row in line["spans"][0]] == list(timed_step().spans)
    phases = {"forward coarse solve": 0.01, "send": 0.01, "wait": 0.02, "adjoint last sweep": 0.05}
    assert line["workers"][0]["phases"] == pytest.approx(phases)


def test_sums_of_a_step():
    assert sum_kinds(TimedStep(0.0, 1.0, ())) == {"compute": 0, "send": 0, "wait": 0, "other": 1.0}
    clock = iter((5.0, 9.0)).__next__
    timeline = Timeline(clock)
    timeline.spans = [Span(0.0, 0.5, "compute", "enter"), Span(1.0, 2.0, "compute", "forward"), Span(3.0, 4.0, "compute", "adjoint")]
    timeline.fill(1, 0.5)
    assert [(s.begin, s.end) for s in timeline.spans if s.kind == "wait"] == [(0.5, 1.0), (2.0, 3.0), (4.0, 5.0)]


class Heard(rayllp.Listener):
    """Defines one method of `Listener`, and inherits the others."""

    def __init__(self):
        self.losses = []

    def on_step(self, metric):
        self.losses.append(metric["loss"])


@pytest.fixture
def files_in_order(monkeypatch):
    """Keep files in order. TensorBoard sorts those of the same second by a number as text: the 10th before the 9th."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(1000))


@pytest.mark.usefixtures("files_in_order")
def test_listeners_and_tensorboard(tmp_path):
    run, heard = begin_run(tmp_path / "run", steps=3), Heard()
    config = rayllp.load_config(run.path / "config.yaml")
    with opened_loggers(config, run, print) as loggers, Journal.open(run, 3, 0, Console(file=StringIO()), [heard, *loggers]) as journal:
        journal.step(metric(0, loss=4.0))
        journal.step(probe(1, loss=3.0, lipschitz=[1.0, 2.0, float("nan")]))
        journal.event(1, "fault", reason="worker 0 was lost")
        journal.evaluation(2, {"loss": 2.5})
        journal.end(2, {"loss": 2.5, "perplexity": 12.0}, "O <b>Romeo</b>\n# no heading")
    assert heard.losses == [4.0, 3.0]
    board = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    assert [event.value for event in board.Scalars("train/loss")] == [4.0, 3.0]
    assert (board.Histograms("layers/lipschitz")[0].histogram_value.num, board.Histograms("layers/lipschitz")[0].step) == (2, 1)
    histograms = {f"rho_{way}/level_{level}": count for way in ("forward", "backward") for level, count in ((0, 2), (1, 1))}
    assert {name: board.Histograms(name)[0].histogram_value.num for name in histograms} == histograms
    assert board.Histograms("layers/bias")[0].histogram_value.num == 64
    assert board.Tensors("sample/text_summary")[0].tensor_proto.string_val[0].decode() == "    O <b>Romeo</b>\n    # no heading\n"
    assert board.Scalars("hparam/perplexity")[0].value == 12.0
    assert "hparams" in board.SummaryMetadata("_hparams_/experiment").plugin_data.plugin_name


@pytest.mark.usefixtures("files_in_order")
def test_tensorboard_shows_each_step_once_after_a_fault_and_a_resume(tmp_path):
    run = begin_run(tmp_path / "run", steps=3)
    config = rayllp.load_config(run.path / "config.yaml")
    with opened_loggers(config, run, print) as loggers, Journal.open(run, 9, 0, Console(file=StringIO()), loggers) as journal:
        for step in range(5):
            journal.step(metric(step, loss=4.0))
            if step == 2:
                journal.evaluation(3, {"loss": 2.5})
        journal.rewind(3)  # a worker was lost: back to a copy after three steps
        for step in (3, 4, 5):
            journal.step(metric(step, loss=3.0))
    # From a checkpoint after five:
    with opened_loggers(config, run, print, 5) as loggers, Journal.open(run, 9, 5, Console(file=StringIO()), loggers) as journal:
        journal.step(metric(5, loss=2.0))
    board = EventAccumulator(str(run.path / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert found == [(0, 4.0), (1, 4.0), (2, 4.0), (3, 3.0), (4, 3.0), (5, 2.0)]
    assert [(event.step, event.value) for event in board.Scalars("validation/loss")] == [(3, 2.5)]


def test_the_listener_in_the_docs(monkeypatch, capsys):
    text = (Path(__file__).parent.parent / "docs" / "report.md").read_text()
    (block,) = [block.partition("```")[0] for block in text.split("```python\n")[1:]]

    def train(config, *, listeners):
        for listener in listeners:
            listener.on_step(probe(7, loss=3.5))
            listener.on_event(7, "fault", {"reason": "worker 0 was lost"})
            listener.on_evaluation(8, {"loss": 2.5})

    monkeypatch.setattr(rayllp, "train", train, raising=False)
    monkeypatch.chdir(Path(__file__).parent.parent)
    exec(block, {})
    assert capsys.readouterr().out == "8 2.5\n"


def test_numbers_are_written_for_people():
    assert [write_number(v) for v in (0.0, 1.5, -2.0, 1e-5, 123456.0, float("inf"))] == ["0", "1.5", "−2", "1e−5", "123,456", "∞"]
    assert [write_time(v) for v in (0.25, 2.0, 600.0, 7200.0, 36000.0)] == ["250 ms", "2 s", "10 min", "120 min", "10 h"]


@pytest.mark.parametrize(("scale", "end", "unit"), [("time", 600.0, (60.0, "min")), ("count", 2.5e6, (1e6, "M")), ("count", 12, (1.0, ""))])
def test_units_of_axes(scale, end, unit):
    curve = Curve(name="loss", run=0, x=np.array([0.0, end]), y=np.ones(2))
    assert Chart(key="loss", title="", caption="", x_label="", y_label="", curves=(curve,), scale=scale).unit == unit


def test_reports_need_no_ray():
    root, waiting, seen = Path(rayllp.__file__).parent.parent, ["rayllp.report.page.write"], set()
    while waiting:
        module = waiting.pop()
        parents = {module.rsplit(".", n)[0] for n in range(module.count(".") + 1)}
        for name in parents - seen:
            seen.add(name)
            place = root.joinpath(*name.split("."))
            path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            for node in ast.parse(path.read_text()).body:  # what is imported as the module is, and not later
                found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    found = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
                assert not any(each.split(".")[0] == "ray" for each in found), name
                waiting += [each for each in found if each.startswith("rayllp.") and _is_module(root, each)]
    assert "rayllp.report.run_directory" in seen
    assert "rayllp.timeline" in seen


def _is_module(root, name):
    place = root.joinpath(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").is_file()
