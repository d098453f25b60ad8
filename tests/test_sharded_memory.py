"""What `--plan` says of a sharded step's memory is what a process of it takes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from test_planning import SAYING, conversations_of_one_length, real_step
from training_parts import program_in_processes, tiny_recipe

from vlm.planning.measure import measure
from vlm.planning.memory import memory
from vlm.recipe import Recipe

PROGRAM = """
import sys
from test_planning import allocated
from vlm import load_recipe
from vlm.cli.processes import leave_the_group
from vlm.training.loop import Trainer
for file in sys.argv[1:]:
    trainer = Trainer(load_recipe(file), quiet=True)
    trainer.model.train()
    samples = trainer._samples(0)
    trainer.train_step(samples)  # the optimiser's state is made here
    peak = allocated(lambda: trainer.train_step(samples))
    if trainer.rank == 0:
        print("peak", peak, flush=True)
    del trainer
leave_the_group()
"""


def test_memory_is_that_of_a_process_of_a_sharded_step(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Gathered layers, gradients on their way and a process's share of them included; wide layers make them count."""
    data = conversations_of_one_length(tmp_path / "data", 8, (" ".join([SAYING] * 4), " ".join([SAYING[::-1]] * 4)))
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "run", batch_size=4, steps=2)
    language = _wider(Path(recipe.model.language_model.name.removeprefix("hf:")), tmp_path / "wide")
    cases = [
        _case(recipe, language, whole, train={"fsdp": True, "precision": precision, "gradient_checkpointing": less})
        for whole, precision, less in ((True, "bf16", True), (True, "bf16", False), (False, "fp32", False))
    ]
    files = [tmp_path / f"{number}.yaml" for number in range(len(cases))]
    for file, case in zip(files, cases):
        file.write_text(yaml.safe_dump({**case.model_dump(mode="json"), "output": str(tmp_path / file.stem)}))
    said = program_in_processes(tmp_path, 2, PROGRAM, *map(str, files))
    peaks = [int(line.split()[1]) for line in said.splitlines() if line.startswith("peak")]
    assert len(peaks) == len(cases)
    for case, peak in zip(cases, peaks):
        alone = case.model_copy(update={"train": case.train.model_copy(update={"fsdp": False})})
        _, _, work = real_step(alone, cached=False)
        precision, less = case.train.precision, case.train.gradient_checkpointing
        found = measure(case, work, precision, 2, 2, cached=False, checkpointing=less, shares=2)
        planned = memory(found.held, found.working, accumulates=False, processes=2, sharded=True)
        assert planned.activations + planned.buffers + planned.gradients == pytest.approx(peak, rel=0.15)


def _case(recipe: Recipe, language: Path, whole: bool, train: dict[str, object]) -> Recipe:
    """With another language model, which learns as a whole or by adapters."""
    content = recipe.model_dump(mode="json")
    content["model"]["language_model"]["name"] = f"hf:{language}"
    if whole:
        content["model"]["language_model"]["lora"] = None
        content["trainable"] = ["bridge.*", "language_model.*"]
    return Recipe.model_validate({**content, "train": {**content["train"], **train}})


def _wider(source: Path, folder: Path) -> Path:
    """A copy of a tiny Llama with six layers of width 256."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(source)
    config.update({"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "head_dim": 64})
    config.num_key_value_heads = config.num_attention_heads
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder
