"""`vlm data`: list the data sets, make one ready, check one, write one as shards."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Show and prepare data sets.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A data set of `vlm data list`, or a YAML file.")]
Splits = Annotated[list[str] | None, typer.Option(help="Only this split; may be given again.")]
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
    name: Name,
    split: Splits = None,
    as_json: AsJson = False,
) -> None:
    """Download or make a data set, check it, and say where it lies; prints its licence, and what to fetch by hand."""
    from vlm.data.catalogue import load_spec
    from vlm.data.prepare import prepare as make_ready

    path = make_ready(name, progress=not as_json, splits=split or [])
    spec, _ = load_spec(name)
    facts = {"name": spec.name, "path": str(path), "licence": spec.licence, "attribution": spec.attribution}
    typer.echo(json.dumps(facts) if as_json else f"{spec.name} is ready in {path}")


@app.command()
def check(
    name: Name,
    split: Splits = None,
    checksums: Annotated[bool, typer.Option("--checksums", help="Read every file and compare its checksum.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what is missing or wrong of a data set and which file goes where; fetches nothing. Exit status 1 if it is."""
    from vlm.data.prepare import check as look

    lines = look(name, split or [], checksums)
    if as_json:
        typer.echo(json.dumps({"name": name, "problems": lines}))
    else:
        typer.echo("\n".join(lines) or f"{name}: nothing is missing")
    raise typer.Exit(1 if lines else 0)


@app.command()
def shard(
    dataset: Annotated[
        str, typer.Argument(help="A data set of `vlm data list`, a YAML file, or with --format a path.")
    ],
    output: Annotated[Path, typer.Option(help="A new folder for the shards.")],
    split: Annotated[str, typer.Option(help="The split to write.")] = "train",
    size: Annotated[int, typer.Option(min=1, help="Records in a shard.")] = 10_000,
    format: Annotated[str | None, typer.Option(help="How to read a file or folder of yours.")] = None,
    images: Annotated[str | None, typer.Option(help="Folder of the pictures, if not the data set's own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Write only the first N records.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a split as WebDataset shards: pictures as they are, a caption each, and the whole record as JSON."""
    from rich.console import Console
    from rich.progress import Progress

    from vlm.data.catalogue import load_dataset, load_spec
    from vlm.data.shard_writer import write_shards
    from vlm.paths import yaml_names

    data = load_dataset(dataset, split, format=format, images=images, limit=limit)
    notes = ""
    if dataset in yaml_names("datasets") or Path(dataset).suffix in (".yaml", ".yml"):
        spec, _ = load_spec(dataset)
        notes = "\n".join(line for line in (spec.licence, spec.attribution, spec.homepage) if line) + "\n"
    stem = Path(data.name).stem if format else data.name
    console = Console(stderr=True)
    with Progress(console=console, disable=as_json or not console.is_terminal) as bar:
        task = bar.add_task(f"{stem} {split}", total=len(data.records))
        name = f"{_safe(stem)}-{_safe(split)}"
        done = write_shards(data.records, output, size, name, notes, lambda n: bar.advance(task, n))
    broken = data.broken + done.broken
    if as_json:
        facts = {"shards": [str(path) for path in done.shards], "records": done.records}
        typer.echo(json.dumps({**facts, "broken": [{"where": b.where, "reason": b.reason} for b in broken]}))
        return
    typer.echo(f"{done.records:,} records in {len(done.shards):,} shards in {output}")
    if broken:
        typer.echo(
            f"left out {len(broken):,} that are broken, the first: {broken[0].where}: {broken[0].reason}", err=True
        )


@app.command()
def recaption(
    dataset: Annotated[
        str, typer.Argument(help="A data set of `vlm data list`, a YAML file, or with --format a path.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the shards; one begun before goes on.")],
    captioner: Annotated[str | None, typer.Option(help="A model that writes captions.")] = None,
    matcher: Annotated[str | None, typer.Option(help="A model that says which captions match (Q-Former).")] = None,
    threshold: Annotated[float, typer.Option(help="Captions less probable to match are dropped.")] = 0.5,
    split: Annotated[str, typer.Option(help="The split to read.")] = "train",
    format: Annotated[str | None, typer.Option(help="How to read a file or folder of yours, e.g. webdataset.")] = None,
    images: Annotated[str | None, typer.Option(help="Folder of the pictures, if not the data set's own.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What the captioner is given, verbatim; else its own.")] = None,
    captions: Annotated[int, typer.Option(help="Captions to write for a picture.")] = 1,
    top_p: Annotated[float, typer.Option(help="Nucleus that captions are sampled from.")] = 0.9,
    temperature: Annotated[float, typer.Option(help="Temperature of the sampling.")] = 1.0,
    min_new_tokens: Annotated[int, typer.Option(help="A caption's least tokens.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(help="A caption's most tokens.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    size: Annotated[int, typer.Option(help="Records in a shard, where the data set is not in shards.")] = 10_000,
    batch_size: Annotated[int, typer.Option(help="Pictures at once, at most 32.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Write captions for pictures and keep those, the web's and the new ones, that match (BLIP's CapFilt), as shards.

    Also under torchrun: processes take the shards in turn. A run that was killed goes on when started again.
    """
    from vlm.evaluation.responses import processes
    from vlm.models.capfilt import Recaptioning, pieces_of, recaption

    settings = Recaptioning(
        captioner=captioner,
        matcher=matcher,
        threshold=threshold,
        prompt=prompt,
        captions=captions,
        top_p=top_p,
        temperature=temperature,
        min_new_tokens=min_new_tokens,
        max_new_tokens=max_new_tokens,
        seed=seed,
        size=size,
        batch_size=batch_size,
    )
    settings.check()
    pieces, notes = pieces_of(dataset, split, size, format, images)
    from vlm.loading import load_model

    writer = load_model(captioner) if captioner else None
    judge = writer if matcher == captioner else load_model(matcher) if matcher else None
    rank, world = processes()
    total = recaption(pieces, output, settings, writer, judge, (rank, world), notes)
    if total is None:
        typer.echo(f"process {rank} of {world} has done its shards", err=True)
    elif as_json:
        typer.echo(json.dumps(total))
    else:
        typer.echo(
            f"{total['records']:,} records, {total['broken']:,} broken; kept {total['web_kept']:,} of {total['web']:,} "
            f"web captions and {total['synthetic_kept']:,} of {total['synthetic']:,} synthetic ones: "
            f"{total['records_kept']:,} records in {output}"
        )


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name) or "shard"


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"
