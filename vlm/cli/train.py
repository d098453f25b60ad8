"""`vlm-train`: train what a recipe says."""

from typing import Annotated

import typer

from vlm.cli.errors import one_line_errors, run
from vlm.cli.processes import leave_the_group

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe's file, or the name of a shipped one.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. train.steps=10")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in the output folder is.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it costs and whether it fits; train nothing.")] = False,
    gpu: Annotated[str, typer.Option("--gpu", help="With --plan: the kind of GPU, e.g. a100 or rtx4090.")] = "h100",
    gpus: Annotated[int, typer.Option("--gpus", help="With --plan: how many.")] = 1,
    share: Annotated[float, typer.Option("--share", help="With --plan: share of their peak they reach.")] = 0.4,
    tokens: Annotated[int | None, typer.Option("--tokens", help="With --plan: text tokens of a sample.")] = None,
    samples: Annotated[int | None, typer.Option("--samples", help="With --plan: samples of an epoch.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the shipped recipes.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing while training.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the last metrics, or the plan, as JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train what RECIPE says; also under `torchrun` and `accelerate launch`."""
    with one_line_errors(debug):
        from vlm.errors import VlmError

        if list_:
            from vlm.paths import yaml_names

            print("\n".join(yaml_names("recipes")))
            return
        if recipe is None:
            raise VlmError("name a recipe: a file, or one of `vlm-train --list`")
        from vlm.recipe import load_recipe

        checked = load_recipe(recipe, overrides or [])  # before torch is imported: a typo is told at once
        if plan:
            import json

            from vlm.planning.plan import make_plan
            from vlm.planning.report import plan_text

            found = make_plan(checked, gpu, gpus, share, tokens, samples)
            print(json.dumps(found.to_dict(), indent=1) if json_ else plan_text(found))
            return
        from vlm.training import train as run

        result = run(checked, resume=resume, quiet=quiet or json_)
        leave_the_group()
        if json_:
            import json

            print(json.dumps({"folder": str(result.folder), "steps": result.steps, **result.metrics}))


def main() -> None:
    """Entry point of the `vlm-train` command."""
    run(app)


if __name__ == "__main__":
    main()
