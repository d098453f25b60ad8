"""`vlm data`: list the data sets, make one ready."""

import json
from typing import Annotated, Any

import typer

app = typer.Typer(help="Show and prepare data sets.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@app.command("list")
def list_datasets(as_json: AsJson = False) -> None:
    """Every data set that travels with the library: licence, splits, and whether it is ready."""
    from vlm.data.catalogue import load_spec
    from vlm.data.prepare import status
    from vlm.paths import yaml_names

    rows: list[dict[str, Any]] = []
    for name in yaml_names("datasets"):
        spec, _ = load_spec(name)
        sizes = {split: {"records": s.size, "pictures": s.pictures} for split, s in spec.splits.items()}
        rows.append({"name": name, "licence": spec.licence, "splits": sizes, "status": status(name)})
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "licence", "splits: records (pictures)", "status")
    for row in rows:
        splits = "\n".join(
            f"{split}: {_count(counts['records'])} ({_count(counts['pictures'])})"
            for split, counts in row["splits"].items()
        )
        table.add_row(row["name"], row["licence"], splits, row["status"])
    Console().print(table, markup=False)


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="A data set of `vlm data list`, or a YAML file.")], as_json: AsJson = False
) -> None:
    """Make a data set ready and check it; prints its licence and where it lies."""
    from vlm.data.catalogue import load_spec
    from vlm.data.prepare import prepare as make_ready

    path = make_ready(name, progress=not as_json)
    spec, _ = load_spec(name)
    facts = {"name": spec.name, "path": str(path), "licence": spec.licence, "attribution": spec.attribution}
    typer.echo(json.dumps(facts) if as_json else f"{spec.name} is ready in {path}")


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"
