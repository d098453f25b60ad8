"""`vlm quickstart`: the starter recipes of each model family, trained, scored and shown."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

QUERIES = ("red apple", "smiling cat", "crescent moon", "sailboat", "birthday cake", "musical instrument")
# Without articles, as the names of pictograms are.
LABELS = ("animal", "building", "clothing", "face", "flag", "food", "person", "plant", "symbol", "vehicle")


@dataclass(frozen=True)
class Stage:
    """Recipes that follow each other, the benchmarks that score the last one, and what is shown of it then."""

    recipes: tuple[str, ...]
    benchmarks: tuple[str, ...]
    show: Callable[[Path], None] | None = None


def quickstart(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For all recipes, e.g. train.steps=10")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first N records of a benchmark.")] = None,
) -> None:
    """Train, score and show the starter recipes. What is trained already stays as it is."""
    from vlm.cli.data import prepare

    given = overrides or []
    minutes: dict[str, float] = {}
    with _timed(minutes, "vlm data prepare openmoji"):
        prepare("openmoji")
    for stage in STAGES:
        folder = _train_all(stage.recipes, given, minutes)
        if folder is None:  # stopped by SIGTERM: the next quickstart goes on here
            return
        from vlm.cli.eval import evaluate

        for benchmark in stage.benchmarks:
            with _timed(minutes, f"vlm-eval {benchmark} --model {folder}"):
                evaluate([benchmark], model=str(folder), limit=limit)
        if stage.show is not None:
            stage.show(folder)
    typer.echo("minutes: " + ", ".join(f"{what} {spent:.1f}" for what, spent in minutes.items()))


def _train_all(recipes: tuple[str, ...], overrides: list[str], minutes: dict[str, float]) -> Path | None:
    """Train recipes in order; the last one's run folder, or None if one was stopped."""
    from vlm.cli.train import train
    from vlm.recipe import load_recipe

    folder = Path()
    for name in recipes:
        folder = Path(load_recipe(name, overrides).output).expanduser()
        done = folder / "model" / "model.yaml"
        if done.is_file():
            typer.echo(f"{folder} is trained already; delete it to train again")
            continue
        with _timed(minutes, f"vlm-train {name}", "".join(f" {text}" for text in overrides)):
            train(name, overrides, resume=(folder / "recipe.yaml").is_file())
        if not done.is_file():
            return None
    return folder


@contextmanager
def _timed(minutes: dict[str, float], command: str, rest: str = "") -> Iterator[None]:
    """Print a command as if it were typed, and note how long it takes."""
    typer.echo(f"$ {command}{rest}")
    began = time.monotonic()
    yield
    minutes[command] = (time.monotonic() - began) / 60


def _show_retrieval(folder: Path) -> None:
    """A contact sheet of held-out pictograms, and one of them classified without training on classes."""
    from vlm import load_model
    from vlm.data.catalogue import load_dataset
    from vlm.evaluation.contact_sheet import write_contact_sheet

    model: Any = load_model(folder)
    records = load_dataset("openmoji", "test").records
    images = [record.images[0] for record in records]
    sheet = write_contact_sheet(model, QUERIES, images, folder / "contact_sheet.png")
    typer.echo(f"contact sheet: {sheet}")
    for record in records[:: len(records) // 6]:  # a few from all over the set, whatever they turn out to be
        (shares,) = model.classify(record.images[0], LABELS, templates=["{}"]).tolist()
        share, label = max(zip(shares, LABELS))
        typer.echo(f"zero-shot: {record.captions[0]!r} -> {label} ({100 * share:.0f} %)")


STAGES = (
    Stage(("starter/clip_openmoji",), ("openmoji_retrieval",), _show_retrieval),
    Stage(("starter/llava_pretrain", "starter/llava_finetune"), ("easy_vqa",)),
    Stage(("starter/blip2_stage1",), ("openmoji_retrieval", "easy_vqa_matching")),
    Stage(("starter/blip2_stage2",), ("easy_vqa_captions",)),
)
