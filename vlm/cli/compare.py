"""`vlm compare`: two evaluations of one benchmark, sample by sample."""

import json
from typing import Annotated

import typer

from vlm.cli.data import AsJson


def compare(
    run_a: Annotated[str, typer.Argument(help="A run folder, or a folder of results.")],
    run_b: Annotated[str, typer.Argument(help="Another one.")],
    benchmark: Annotated[str, typer.Argument(help="What both were evaluated on.")],
    as_json: AsJson = False,
) -> None:
    """Whether two evaluations differ by more than chance: a bootstrap over their common pictures."""
    from vlm.evaluation.compare import compare as compared

    found = compared(run_a, run_b, benchmark)
    if as_json:
        typer.echo(json.dumps(found.summary()))
        return
    low, high = found.interval
    typer.echo(f"{benchmark}, mean score of a sample x100")
    typer.echo(f"A  {run_a}  {found.a:.2f}")
    typer.echo(f"B  {run_b}  {found.b:.2f}")
    typer.echo(f"B - A  {found.difference:+.2f}  95 % interval {low:+.2f} to {high:+.2f}  p {found.p:.4f}")
    typer.echo(f"B is better on {found.better:,} samples, worse on {found.worse:,}, the same on {found.same:,}")
