"""`vlm-eval`: score a model, or a file of predictions, on benchmarks."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm.cli.errors import one_line_errors, run
from vlm.cli.processes import leave_the_group
from vlm.errors import VlmError

if TYPE_CHECKING:
    from vlm.evaluation import EvaluationResult

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
        if submit:
            _submit_all(names, overrides, model, output, batch_size, cache, trust_remote_code)
        else:
            _evaluate_all(
                names,
                overrides,
                model,
                predictions,
                limit,
                output,
                batch_size,
                as_json,
                partial,
                cache,
                trust_remote_code,
            )
        leave_the_group()


def _submit_all(
    names: list[str],
    overrides: list[str],
    model: str | None,
    output: Path | None,
    batch_size: int,
    cache: bool,
    trust_remote_code: bool,
) -> None:
    from vlm.evaluation import load_benchmark
    from vlm.evaluation.runner import default_output
    from vlm.evaluation.submission import submit
    from vlm.loading import load_model

    if model is None:
        raise VlmError("--submit asks a model: give --model NAME")
    plans = [load_benchmark(name, overrides) for name in names]
    loaded = load_model(model, trust_remote_code=trust_remote_code)
    for plan in plans:
        folder = output or default_output(model, plan.name)
        file = submit(plan, loaded, output=folder, batch_size=batch_size, model_name=model, cache=cache)
        if os.environ.get("RANK", "0") == "0":
            print(file)


def _evaluate_all(
    names: list[str],
    overrides: list[str],
    model: str | None,
    predictions: Path | None,
    limit: int | None,
    output: Path | None,
    batch_size: int,
    as_json: bool,
    partial: bool,
    cache: bool,
    trust_remote_code: bool,
) -> None:
    from vlm.evaluation import load_benchmark
    from vlm.evaluation.runner import default_output, evaluate

    is_first = os.environ.get("RANK", "0") == "0"  # under torchrun one process prints
    plans = [load_benchmark(name, overrides) for name in names]  # a misspelt one stops before a model is loaded
    loaded: Any = None
    if model is not None:
        from vlm.loading import load_model

        loaded = load_model(model, trust_remote_code=trust_remote_code)
    for plan in plans:
        folder = default_output(model, plan.name)
        if output is not None:
            folder = output / plan.name if len(plans) > 1 else output
        result = evaluate(
            plan,
            model=loaded,
            predictions=predictions,
            limit=limit,
            output=folder,
            batch_size=batch_size,
            model_name=model,
            partial=partial,
            cache=cache,
        )
        if not is_first:
            continue
        if as_json:
            print(json.dumps(result.summary(), ensure_ascii=False, allow_nan=False))
        else:
            _print_result(result)


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
