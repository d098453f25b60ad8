"""`vlm export`: a run as a folder that other libraries load."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[str, typer.Argument(help="A run folder, or any name that `load_model` takes.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not hold anything.")],
    merge: Annotated[bool, typer.Option("--merge", help="Add LoRA to the weights it adapts.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the weights: fp32, bf16 or fp16.")] = "fp32",
) -> None:
    """Write a LLaVA for transformers' `LlavaForConditionalGeneration`."""
    from vlm.loading import load_model
    from vlm.models.export_llava import export_llava

    export_llava(load_model(run, "cpu", dtype), folder.expanduser(), merge)
    typer.echo(f"{folder}: loads with transformers' LlavaForConditionalGeneration.from_pretrained, or load_model")
