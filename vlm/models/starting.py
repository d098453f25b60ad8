"""`init_from`: a model starts from what an earlier run trained, or from what somebody published. Every key is accounted
for: taken, left out by rule, or an error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from vlm.backbones.llava_checkpoint import read_projector
from vlm.errors import VlmError
from vlm.models.build import WEIGHTS, read_weights
from vlm.models.freezing import load_trained_state, logical_name, some_names

# What only a Q-Former's first stage has: its heads, and the side that reads texts.
_FIRST_STAGE = ("heads.", "bridge.embeddings.")
_TEXT_FFN = ".text_ffn."
# What a Q-Former gets for its second stage.
_SECOND_STAGE = ("bridge.language_projection.",)
_QUERIES = "bridge.query_tokens"  # every Q-Former has them


@dataclass(frozen=True)
class Start:
    """Tensors by the model's own names, and what they are in words."""

    state: dict[str, Tensor]
    what: str


def start_from(model: nn.Module, source: Path) -> str:
    """Fill a model with what `source` holds; returns what was taken, left out and is new, as one line.

    Raises VlmError where there is nothing to start from, and for keys without a place, of another shape, or missing.
    """
    for read in READERS:
        if (start := read(source)) is not None:
            return take(model, start, source)
    raise VlmError(
        f"init_from: {source} holds no trained model (expected model/{WEIGHTS}) and no LLaVA's projector "
        "(mm_projector.bin)"
    )


def take(model: nn.Module, start: Start, source: Path) -> str:
    """As `start_from`, of a state that was read.

    A Q-Former's second stage leaves out the heads and the text side of the first, and needs all the rest of it.
    """
    names = {logical_name(name) for name, _ in model.named_parameters()}
    left_out = [name for name in start.state if name not in names and _of_first_stage(name)]
    taken = {name: value for name, value in start.state.items() if name not in left_out}
    if _QUERIES in start.state and _QUERIES in names:
        lacking = sorted(n for n in names - taken.keys() if n.startswith("bridge.") and not n.startswith(_SECOND_STAGE))
        if lacking:
            raise VlmError(f"init_from: {source}: the Q-Former there lacks {some_names(lacking)}")
    fresh = load_trained_state(model, taken, where=f"init_from: {source}", partial=True)
    said = f"starting from {start.what}"
    if left_out:
        said += f"; {len(taken)} tensors taken, {len(left_out)} left out: {', '.join(_parts(left_out))}"
    return said + (f"; new here: {', '.join(_parts(fresh))}" if fresh else "")


def from_run(source: Path) -> Start | None:
    """What an earlier run trained; None where `source` is no run folder and no `model` folder of one."""
    for path in (source / "model" / WEIGHTS, source / WEIGHTS):
        if path.is_file():
            return Start(read_weights(path), str(source))
    return None


def from_projector(source: Path) -> Start | None:
    """The projector of a published LLaVA; None where there is none."""
    state = read_projector(source)
    return None if state is None else Start(state, f"the projector of {source}")


# Tried in this order; each returns None for what is not its own.
READERS: tuple[Callable[[Path], Start | None], ...] = (from_run, from_projector)


def _of_first_stage(name: str) -> bool:
    return name.startswith(_FIRST_STAGE) or (name.startswith("bridge.layers.") and _TEXT_FFN in name)


def _parts(names: list[str]) -> list[str]:
    """Where tensors lie: the first words of their names, without the numbers of layers."""
    words = [[word for word in name.split(".") if not word.isdigit()] for name in names]
    return sorted({".".join(w[: 3 if w[:2] == ["bridge", "layers"] else 2]) for w in words})
