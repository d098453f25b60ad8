"""`vlm-eval`: score a model, or a file of predictions, on benchmarks."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm.cli.errors import one_line_errors, run
from vlm.cli.processes import leave_the_group
from vlm.errors import VlmError

if TYPE_CHECKING:
    from vlm.evaluation import EvaluationResult
    from vlm.evaluation.benchmark import Benchmark

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def evaluate(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="BENCHMARK|KEY=VALUE",
            help="Benchmarks by name or YAML file, and overrides that reach into them, e.g. protocol=official-2017.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="A run folder, a local folder or a published model's name.")] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(help="Score a file: [{question_id, answer}] or [{image_id, caption}] JSON, or samples.jsonl."),
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Score the predictions that match, though ids are missing or unknown.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first N records.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results.json, samples.jsonl and report.html; with several benchmarks, one folder each in "
            "it. By default eval/BENCHMARK in the run folder, else eval-results/BENCHMARK."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Records asked at once.")] = 64,
    submit: Annotated[
        bool, typer.Option("--submit", help="Score nothing: write the file that EvalAI or the COCO server takes.")
    ] = False,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep answers, and take those the model gave before.")
    ] = True,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Let a run folder's language model run the code beside its weights."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json, one line per benchmark.")] = False,
    show_list: Annotated[
        bool, typer.Option("--list", help="List the benchmarks that travel with the library.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Score a model, or a file of predictions, on one or more benchmarks."""
    with one_line_errors(debug):
        if show_list:
            _print_benchmarks(as_json)
            return
        overrides = [text for text in targets or [] if "=" in text]
        names = [text for text in targets or [] if "=" not in text]
        if not names:
            raise VlmError("name a benchmark, e.g. `vlm-eval easy_vqa --model RUN`; `vlm-eval --list` shows them")
        if (model is None) == (predictions is None):
            raise VlmError("give either --model NAME or --predictions FILE")
        if predictions is not None and len(names) > 1:
            raise VlmError(f"--predictions holds the answers of one benchmark, but {len(names)} are named")
        if partial and predictions is None:
            raise VlmError("--partial is about a file: give --predictions FILE, or leave it out")
        if submit:
            if model is None:
                raise VlmError("--submit asks a model: give --model NAME")
            for given, option in ((limit, "--limit"), (as_json, "--json")):
                if given:
                    raise VlmError(f"--submit writes the whole file and scores nothing: leave {option} out")
        asked = _Asked(names, overrides, model, predictions, limit, output, batch_size, partial, cache)
        if submit:
            _submit_all(asked, trust_remote_code)
        else:
            _evaluate_all(asked, trust_remote_code, as_json)
        leave_the_group()


@dataclass(frozen=True)
class _Asked:
    """What is to be scored, or written down, and how: see `evaluate`."""

    names: list[str]
    overrides: list[str]
    model: str | None
    predictions: Path | None
    limit: int | None
    output: Path | None
    batch_size: int
    partial: bool
    cache: bool

    def folder(self, name: str) -> Path:
        """Where the results of a benchmark go."""
        from vlm.evaluation.runner import default_output

        if self.output is None:
            return default_output(self.model, name)
        return self.output / name if len(self.names) > 1 else self.output

    def load(self, trust_remote_code: bool) -> tuple[list["Benchmark"], Any]:
        """The benchmarks, and the model unless a file is scored. A misspelt name stops before a model is loaded."""
        from vlm.evaluation import load_benchmark

        plans = [load_benchmark(name, self.overrides) for name in self.names]
        if self.model is None:
            return plans, None
        from vlm.loading import load_model

        return plans, load_model(self.model, trust_remote_code=trust_remote_code)


def _submit_all(asked: _Asked, trust_remote_code: bool) -> None:
    from vlm.evaluation.submission import submit

    plans, model = asked.load(trust_remote_code)
    for plan in plans:
        file = submit(
            plan,
            model,
            output=asked.folder(plan.name),
            batch_size=asked.batch_size,
            model_name=asked.model,
            cache=asked.cache,
        )
        if _is_first():
            print(file)


def _evaluate_all(asked: _Asked, trust_remote_code: bool, as_json: bool) -> None:
    from vlm.evaluation.runner import evaluate

    plans, model = asked.load(trust_remote_code)
    for plan in plans:
        result = evaluate(
            plan,
            model=model,
            predictions=asked.predictions,
            limit=asked.limit,
            output=asked.folder(plan.name),
            batch_size=asked.batch_size,
            model_name=asked.model,
            partial=asked.partial,
            cache=asked.cache,
        )
        if not _is_first():
            continue
        if as_json:
            print(json.dumps(result.summary(), ensure_ascii=False, allow_nan=False))
        else:
            _print_result(result)


def _is_first() -> bool:
    """Whether this process prints: under torchrun one does."""
    return os.environ.get("RANK", "0") == "0"


def _print_result(result: "EvaluationResult") -> None:
    """The table on screen: ours, the baselines and what others published, in per cent."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from vlm.evaluation.baselines import BASELINES
    from vlm.evaluation.tasks import TASKS

    noun = TASKS[result.task].noun
    others = [protocol for protocol in result.scores if protocol != result.protocol]
    limit = result.settings["limit"]
    dropped = result.settings["partial"]
    part = "" if limit is None else f" (the first {limit:,} of {result.settings['records_in_data_set']:,})"
    table = Table(
        title=f"{result.benchmark}: {result.metric} in %, {result.count:,} {noun}{part}", title_justify="left"
    )
    table.add_column("")
    table.add_column(result.protocol, justify="right")
    table.add_column("95 % interval", justify="right")
    for protocol in others:
        table.add_column(protocol, justify="right")
    low, high = result.interval
    ours = []
    for protocol in others:
        least, most = result.score_intervals[protocol]
        ours.append(f"{result.scores[protocol]:.2f} ({least:.2f} to {most:.2f})")
    table.add_row(escape(result.model), f"{result.score:.2f}", f"{low:.2f} to {high:.2f}", *ours, style="bold")
    for key, score in result.baselines.items():
        table.add_row(BASELINES.get(key, key), f"{score:.2f}")
    for entry in result.published:
        mark = " (other settings)" if entry["differs"] else ""
        table.add_row(escape(f"published: {entry['model']}{mark}"), f"{entry['score']:.2f}")
    console = Console()
    console.print(table)
    if len(result.metrics) > 1:
        every = "  ".join(f"{name.replace('_', ' ')} {score:.2f}" for name, score in result.metrics.items())
        console.print(every, soft_wrap=True, highlight=False)
    for note in result.notes:
        console.print(escape(note), style="yellow", soft_wrap=True)
    if dropped:
        told = ", ".join(f"{count:,} {what}" for what, count in dropped.items())
        console.print(f"partial: of the ids in the file and the data set {told}", style="yellow", soft_wrap=True)
    if result.broken:
        first = result.broken[0]
        text = f"{len(result.broken):,} samples could not be asked and count as wrong; the first: {first['error']}"
        console.print(escape(text), style="yellow", soft_wrap=True)
    console.print(f"report: {escape(str(result.output / 'report.html'))}", soft_wrap=True, highlight=False)


def _print_benchmarks(as_json: bool) -> None:
    from vlm.paths import yaml_names

    names = yaml_names("eval")
    if as_json:
        print(json.dumps(names))
        return
    from vlm.evaluation import load_benchmark

    for name in names:
        print(f"{name}  {load_benchmark(name).description}")


def main() -> None:
    """The console script."""
    run(app)


if __name__ == "__main__":
    main()
