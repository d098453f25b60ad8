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
    from vlm.loading import load_model, model_folder
    from vlm.models.build import load_model_folder
    from vlm.models.export_llava import export_llava

    trained = model_folder(Path(run).expanduser())
    # Adapters that were trained on 4 or 8 bits are added to the whole weights.
    model = load_model(run, "cpu", dtype) if trained is None else load_model_folder(trained, "cpu", dtype, False)
    export_llava(model, folder.expanduser(), merge)
    typer.echo(f"{folder}: loads with transformers' LlavaForConditionalGeneration.from_pretrained, or load_model")
