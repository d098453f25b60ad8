"""BLIP-2's Q-Former at its published size, in the library and in LAVIS, with the same random weights and inputs."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm.bridges.qformer import QFormer
from vlm.bridges.qformer_heads import QFormerHeads
from vlm.bridges.qformer_keys import to_lavis
from vlm.bridges.qformer_layers import QFormerSizes
from vlm.model_spec import QFormerSpec
from vlm.models.qformer_model import QFormerModel

DROPOUT = 0.1  # what BLIP-2 was trained with
IMAGE_TOKENS, IMAGE_WIDTH, EMBED_WIDTH = 257, 1408, 256  # of EVA ViT-g at 224 pixels
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = 30522  # of bert-base-uncased; [DEC] comes behind it
PAD, FIRST, LAST = 0, 2, 3


class _Encoder(nn.Module):
    """In place of the image encoder, which nobody runs here: the model is given image tokens, as from the cache."""

    num_tokens = IMAGE_TOKENS


def sizes(dropout: float = DROPOUT) -> QFormerSizes:
    """Of the published Q-Former."""
    return QFormerSizes(768, 12, 12, 3072, 32, IMAGE_WIDTH, VOCABULARY + 1, 512, dropout=dropout)


def our_model(dropout: float = DROPOUT) -> QFormerModel:
    """The library's stage-1 model with random weights, always the same, large enough that no pass is without effect."""
    spec = QFormerSpec.model_validate({"image_encoder": "timm:none"})
    torch.manual_seed(0)
    bridge = QFormer(sizes(dropout))
    heads = QFormerHeads(bridge.width, VOCABULARY + 1, EMBED_WIDTH)
    with torch.no_grad():
        for parameter in (*bridge.parameters(), *heads.parameters()):
            if parameter.ndim > 1:
                parameter.normal_(std=0.05)
    tokenizer = SimpleNamespace(start=VOCABULARY, pad=PAD)
    return QFormerModel(spec, _Encoder(), bridge, heads, tokenizer)  # type: ignore[arg-type]


def image_tokens(count: int) -> Tensor:
    """Random image tokens [count,257,1408]."""
    return torch.randn(count, IMAGE_TOKENS, IMAGE_WIDTH, generator=torch.Generator().manual_seed(1))


def token_ids(lengths: tuple[int, ...]) -> list[list[int]]:
    """A random text of each length, [CLS] and [SEP] included."""
    generator = torch.Generator().manual_seed(2)
    return [
        [FIRST, *torch.randint(len(SPECIAL), VOCABULARY, (n - 2,), generator=generator).tolist(), LAST] for n in lengths
    ]


def lavis_state(model: QFormerModel) -> dict[str, Tensor]:
    """The model's weights by LAVIS' names."""
    named = {name: t.detach() for name, t in model.state_dict().items() if name.startswith(("bridge.", "heads."))}
    return {name: t.clone() for name, t in to_lavis(named).items()}


class Lavis:
    """LAVIS with the weights of `our_model`, in a process and an environment of its own. Ends with this object."""

    def __init__(self, images: Tensor, ids: list[list[int]], dropout: float = DROPOUT) -> None:
        here = Path(__file__).parent
        # `make bench` says where it put it, which is beside the environment of this Python unless told otherwise.
        folder = os.environ.get("VLM_BENCH_LAVIS") or f"{sys.prefix}-lavis"
        python = Path(folder, "bin", "python")
        if not python.exists():
            raise SystemExit(f"LAVIS' environment is missing: bash {here / 'lavis.sh'} {folder} {sys.prefix}")
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  LAVIS is talkative: shown only where it fails
        self.process = subprocess.Popen(
            [str(python), "-W", "ignore", str(here / "lavis_side.py")],
            env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": str(torch.get_num_threads())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
        )
        self.pid = self.process.pid
        words = SPECIAL + [f"w{number}" for number in range(len(SPECIAL), VOCABULARY)]
        with tempfile.TemporaryDirectory() as folder:
            weights, tokens = f"{folder}/weights.safetensors", f"{folder}/images.safetensors"
            save_file(lavis_state(our_model()), weights)
            save_file({"images": images}, tokens)
            ours = {**asdict(sizes()), "embed_width": EMBED_WIDTH}
            self.ask("build", weights=weights, sizes=ours, vocabulary=words, dropout=dropout)
            self.ask("inputs", images=tokens, texts=[" ".join(words[i] for i in row[1:-1]) for row in ids])

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have something done (a method of `lavis_side.Side`)."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        if not (answer := self.process.stdout.readline()):
            self.process.wait()
            self.said.seek(0)
            raise RuntimeError(f"LAVIS' process ended in {do!r}: {self.said.read()[-2000:]}")
        result: dict[str, Any] = json.loads(answer)
        return result

    def __del__(self) -> None:
        if process := getattr(self, "process", None):
            process.stdin.close()
            process.wait()
