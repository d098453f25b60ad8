"""Intervals of every metric, protocol and group, from the same resamples of pictures; scores that are no numbers."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from evaluation_parts import FakeModel, toy_benchmark, toy_records
from test_matching_task import Tells
from test_reranking import captioned, plan

from vlm.data.records import Record
from vlm.evaluation import Benchmark, bootstrap_interval, evaluate
from vlm.evaluation.error_bars import error_bars
from vlm.evaluation.intervals import Medians, bootstrap_each, interval_of, mean_parts
from vlm.evaluation.task import Job, Judged, Prediction
from vlm.evaluation.tasks import TASKS

rng = np.random.default_rng(0)


def asked(number: int, **meta: Any) -> Record:
    """A question of yes or no, two about each picture, with all that any protocol reads."""
    meta |= {"question_type": f"type {number % 3}", "answer_type": "yes/no", "semantic_type": "obj", "subject": "art"}
    meta |= {"category": ("color", "code_reasoning", "random")[number // 2 % 3], "l2-category": "all", "grade": "1"}
    meta |= {"choices": ["yes", "no"], "correct_choice": number % 2}
    answers = ("yes", "no")[number % 2 :][:1]
    return Record(str(number), (f"{number // 2}.png",), question="is it?", answers=answers, meta=meta)


RECORDS = [asked(number) for number in range(60)]
SAID = [Prediction(("yes", "no")[int(n)]) for n in rng.integers(0, 2, 60)]


def check_bars(judged: dict[str, Judged], plan: Benchmark, unreadable: int = 0) -> None:
    """Every score has an interval, and lies in it."""
    bars = error_bars(judged, plan, [f"lost {n}" for n in range(unreadable)])
    headline = judged[plan.protocol]
    assert bars.metrics.keys() == headline.scores.keys()
    for name, (low, high) in bars.metrics.items():
        assert low - 1e-9 <= headline.scores[name] <= high + 1e-9, name
        if name not in ("acc@5",) and not name.endswith("@10"):  # which find nearly all
            assert low < high, name
    assert bars.protocols.keys() == judged.keys()
    for protocol, (low, high) in bars.protocols.items():
        assert low - 1e-9 <= judged[protocol].scores[plan.metric] <= high + 1e-9
    assert bars.protocols[plan.protocol] == bars.metrics[plan.metric]
    tables = {title: table for title, table in headline.tables.items() if table}
    assert bars.tables.keys() == tables.keys()
    for title, table in tables.items():
        assert bars.tables[title].keys() == table.keys()
        for group, (low, high) in bars.tables[title].items():
            assert low - 1e-9 <= table[group] <= high + 1e-9, (title, group)


QUESTIONS = ["official", "gqa", "aokvqa", "scienceqa", "choices", "circular", "pope", "mme", "lavis-okvqa"]


@pytest.mark.parametrize("protocol", QUESTIONS)
@pytest.mark.parametrize("unreadable", [0, 20])
def test_every_score_of_questions_has_an_interval(
    protocol: str, unreadable: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm.evaluation.lemmas._parser", lambda: lambda text: [])
    also = ["lmms", "evalai", "exact"] if protocol == "official" else []
    plan = Benchmark.model_validate({"name": "x", "dataset": "x", "protocol": protocol, "also": also})
    job = Job(plan, RECORDS, RECORDS, unreadable)
    said = SAID if protocol != "scienceqa" else [Prediction("AB"[prediction.text == "no"]) for prediction in SAID]
    judged = {name: TASKS["vqa"].judge(job, said, name) for name in (plan.protocol, *plan.also)}
    if protocol == "lavis-okvqa":  # nothing is right that has no words
        bars = error_bars(judged, plan, [])
        assert bars.metrics == {"accuracy": (0, 0)}
        assert bars.tables["per_question_type"].keys() == {"type 0", "type 1", "type 2"}
        return
    assert judged[protocol].tables or protocol == "aokvqa"
    check_bars(judged, plan, unreadable)


def test_every_score_of_captions_classes_and_retrieval_has_an_interval(tmp_path: Path) -> None:
    words = ["red", "blue", "dog", "cat", "house", "runs", "sits", "sees", "a", "the"]

    def text() -> str:
        return " ".join(rng.choice(words, 7))

    told = [
        Record(str(n), (f"{n}.png",), captions=(text(), text()), label=words[n % 5], meta={"domain": "in-domain"})
        for n in range(40)
    ]
    own = Benchmark.model_validate({"name": "x", "dataset": "x", "task": "caption", "also": ["whitespace"]})
    job = Job(own, told, told, 3)
    said = [Prediction(" ".join([*record.captions[0].split()[:5], "bird"])) for record in told]
    said[0] = Prediction(None, "broken")
    check_bars({name: TASKS["caption"].judge(job, said, name) for name in ("ptb", "whitespace")}, own, 3)
    own = Benchmark.model_validate({"name": "x", "dataset": "x", "task": "zero_shot"})
    guesses = [tuple(map(str, rng.permutation(words[:5])))[:5] for _ in told]
    job = Job(own, told, told, 0)
    found = TASKS["zero_shot"].judge(job, [Prediction(guess[0], ranking=guess) for guess in guesses], "standard")
    check_bars({"standard": found}, own)
    file, paths, captions = captioned(tmp_path, single=True)
    model = Tells(paths, [texts[0] for texts in captions], 1)
    retrieval = plan(file, rerank=3, also=["expected-5fold"])
    result = evaluate(retrieval, model, output=tmp_path / "r", progress=False)
    assert result.intervals.keys() == result.metrics.keys() > {"ITC_TR@1", "rsum", "IR_median_rank"}
    assert result.score_intervals.keys() == {"expected", "expected-5fold"}
    result = evaluate(plan(file, task="matching"), model, output=tmp_path / "m", progress=False)
    assert result.intervals.keys() == result.metrics.keys()


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**31), n=st.integers(2, 40), clusters=st.integers(1, 12))
def test_metrics_that_share_resamples_are_those_drawn_alone(seed: int, n: int, clusters: int) -> None:
    random = np.random.default_rng(seed)
    own = random.integers(0, clusters, n).tolist()
    values = random.random(n)
    some = sorted(random.choice(n, size=max(1, n // 2), replace=False).tolist())
    medians = Medians(values, np.zeros(n, dtype=int))
    mean, part, median = bootstrap_each(
        [(mean_parts(values), range(n)), (mean_parts(values[some]), some), (medians, range(n))], own, resamples=50
    )
    assert interval_of(mean) == bootstrap_interval(values.tolist(), own, resamples=50)
    # The same draws, by hand: cluster by cluster.
    numbers = {cluster: place for place, cluster in enumerate(dict.fromkeys(own))}
    draws = np.random.default_rng(0).multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), size=50)
    for times, got_mean, got_part, got_median in zip(draws, mean, part, median):
        sample = [n for n, cluster in enumerate(own) for _ in range(times[numbers[cluster]])]
        assert got_mean == pytest.approx(values[sample].mean())
        assert got_median == pytest.approx(np.median(values[sample]))
        inside = [n for n in sample if n in some]
        assert got_part == pytest.approx(values[inside].mean() if inside else np.nan, nan_ok=True)


def test_a_group_of_pictures_that_agree_has_no_width_and_the_others_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = toy_records(tmp_path)
    result = evaluate(toy_benchmark(records, tmp_path, monkeypatch), FakeModel(), progress=False)
    assert result.table_intervals["per_question_type"]["colour"] == (0, 100)
    assert result.score_intervals == {"exact": result.interval, "official": pytest.approx(result.interval)}
    assert result.table_groups == {"per_question_type": "question_type", "per_answer_type": "answer_type"}
    written = json.loads((result.output / "results.json").read_text())
    assert written["table_intervals"]["per_question_type"]["colour"] == [0, 100]
    assert written["score_intervals"]["official"] == pytest.approx(list(result.interval))
    report = (result.output / "report.html").read_text()
    assert "33.33 (0.00 to 100.00)" in report


def test_a_rank_that_is_infinite_is_null_in_json_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of most pictures nothing can be read: no rank stands in the middle."""
    file, paths, captions = captioned(tmp_path, single=True)
    for path in paths[:10]:
        Path(path).write_bytes(b"no picture")
    model = Tells(paths, [texts[0] for texts in captions], 0)
    result = evaluate(plan(file, rerank=0), model, output=tmp_path / "out", progress=False)
    assert np.isinf(result.metrics["TR_median_rank"])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    written = json.loads((tmp_path / "out/results.json").read_text(), parse_constant=refuse)
    assert written["metrics"]["TR_median_rank"] is None
    assert written["intervals"]["TR_median_rank"][1] is None
    message = "TR_median_rank is infinite: half of the queries or more find no right candidate"
    assert written["notes"][0] == message
    assert "∞" in (tmp_path / "out/report.html").read_text()
    from vlm.cli.eval import _print_result

    _print_result(result)
    assert message in capsys.readouterr().out


# Clicks what the report's script listens to, in place of a browser, and prints what is to be seen.
BROWSER = """
const html = require("fs").readFileSync(process.argv[2], "utf8");
const decode = text => text.replaceAll("&quot;", '"').replaceAll("&#x27;", "'").replaceAll("&lt;", "<")
  .replaceAll("&gt;", ">").replaceAll("&amp;", "&");
function element(extra) {
  return {hidden: false, value: "", textContent: "", handlers: {}, attributes: {}, append() {}, scrollIntoView() {},
    addEventListener(name, f) { this.handlers[name] = f; },
    setAttribute(name, value) { this.attributes[name] = value; }, ...extra};
}
const attribute = (tag, name) => { const m = tag.match(new RegExp(name + '="([^"]*)"')); return m && decode(m[1]); };
const articles = html.split("<article").slice(1).map(part => {
  const rows = part.split('<div class="q ').slice(1).map(row => element({
    dataset: {id: attribute(row, "data-id"), groups: attribute(row, "data-groups") || undefined},
    textContent: row, classList: {contains: name => row.startsWith(name)}}));
  return element({dataset: {score: attribute(part, "data-score")}, querySelectorAll: () => rows, rows});
});
const buttons = [...html.matchAll(/<button data-by[^>]*>/g)].map(([tag]) => element({
  dataset: {by: attribute(tag, "data-by"), group: attribute(tag, "data-group")}}));
const byId = {};
globalThis.document = {
  getElementById: id => byId[id] ||= element({}),
  querySelector: () => byId.main ||= element({}),
  querySelectorAll: what => what === "article" ? articles : buttons,
};
eval(html.match(/<script>([^]*)<\\/script>/)[1].replace('"use strict";', ""));
const seen = () => articles.flatMap(a => a.hidden ? [] : a.rows.filter(r => !r.hidden).map(r => r.dataset.id)).sort();
const out = [seen()];
const odd = buttons.find(b => b.dataset.group === "odd");
odd.handlers.click();
out.push(seen(), byId.clear.textContent, odd.attributes["aria-pressed"]);
byId.kind.value = "wrong"; byId.kind.handlers.change();
out.push(seen());
byId.clear.handlers.click();
out.push(seen(), byId.clear.hidden);
console.log(JSON.stringify(out));
"""


def test_a_click_on_a_group_of_the_report_shows_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = toy_records(tmp_path)
    for record in records:
        if record.meta["question_type"] == "odd":
            record.meta["answer_type"] = "\"<b>'&"  # a group's name is somebody's text
    result = evaluate(toy_benchmark(records, tmp_path, monkeypatch), FakeModel(), progress=False)
    report = (result.output / "report.html").read_text()
    assert '<button data-by="question_type" data-group="odd" aria-pressed="false">odd</button>' in report
    assert 'data-group="&quot;&lt;b&gt;&#x27;&amp;"' in report
    assert 'data-groups="{&quot;question_type&quot;: &quot;colour&quot;, &quot;answer_type&quot;: ' in report
    if shutil.which("node") is None:
        return
    (tmp_path / "browser.js").write_text(BROWSER)
    command = ["node", str(tmp_path / "browser.js"), str(result.output / "report.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    everything, odd, chip, pressed, wrong, wrong_of_all, hidden = json.loads(done.stdout)
    assert everything == ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]
    assert (odd, chip, pressed) == (["1-0", "1-1", "1-2"], "question type: odd ✕", "true")
    assert (wrong, wrong_of_all, hidden) == (["1-0"], ["0-1", "0-2", "1-0"], True)
