"""`init_from`: a model starts from what an earlier run trained, or from what somebody published. Every key is accounted
for: taken, left out by rule, or an error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from vlm.backbones.blip2_checkpoint import is_blip2, read_blip2
from vlm.backbones.hf_loading import read_config
from vlm.backbones.lavis_checkpoint import is_lavis, read_lavis
from vlm.backbones.llava_checkpoint import read_projector
from vlm.errors import VlmError
from vlm.loading import HUB_ID
from vlm.models.build import DESCRIPTION, WEIGHTS, read_weights
from vlm.models.freezing import keep_frozen, load_trained_state, logical_name, some_names
from vlm.models.published_blip2 import bridge_state
from vlm.models.published_lavis import check_language, lavis_state
from vlm.paths import read_yaml

# What only a Q-Former's first stage has: its heads, and the side that reads texts.
_FIRST_STAGE = ("heads.", "bridge.embeddings.")
_TEXT_FFN = ".text_ffn."
# What a Q-Former gets for its second stage.
_SECOND_STAGE = ("bridge.language_projection.",)
_QUERIES = "bridge.query_tokens"  # every Q-Former has them


@dataclass(frozen=True)
class Start:
    """Tensors by the model's own names, and what they are in words.

    encoder_decoder: the kind of language model they were trained for; None where for none or any.
    language_model: its name; None where it is not known.
    """

    state: dict[str, Tensor]
    what: str
    encoder_decoder: bool | None = None
    language_model: str | None = None


def start_from(model: nn.Module, sources: str | Sequence[str]) -> str:
    """Fill a model with what the sources hold, a later one over an earlier; returns what was taken, left out, is new.

    Raises VlmError where there is nothing to start from, and for keys without a place, of another shape, or missing.
    """
    names = [sources] if isinstance(sources, str) else list(sources)
    starts = [_read(Path(name).expanduser()) for name in names]
    state = {name: value for start in starts for name, value in start.state.items()}
    kinds = [start.encoder_decoder for start in starts if start.encoder_decoder is not None]
    what = " and ".join(start.what for start in starts)
    told = [start.language_model for start in starts if start.language_model is not None]
    start = Start(state, what, kinds[-1] if kinds else None, told[-1] if told else None)
    return take(model, start, ", ".join(names))


def _read(source: Path) -> Start:
    for read in READERS:
        if (start := read(source)) is not None:
            return start
    raise VlmError(
        f"init_from: {source} holds no trained model (expected model/{WEIGHTS}) and no LLaVA's projector "
        "(mm_projector.bin), and is no BLIP-2 (a folder, or LAVIS' .pth)"
    )


def take(model: nn.Module, start: Start, source: str) -> str:
    """As `start_from`, of a state that was read.

    A Q-Former's second stage leaves out the heads and the text side of the first, and needs all the rest of it.
    """
    check_language(start.encoder_decoder, model, f"init_from: {source}")
    names = {logical_name(name) for name, _ in model.named_parameters()}
    left_out = [name for name in start.state if name not in names and _of_first_stage(name)]
    taken = {name: value for name, value in start.state.items() if name not in left_out}
    if _QUERIES in start.state and _QUERIES in names:
        lacking = sorted(n for n in names - taken.keys() if n.startswith("bridge.") and not n.startswith(_SECOND_STAGE))
        if lacking:
            raise VlmError(f"init_from: {source}: the Q-Former there lacks {some_names(lacking)}")
    keep_frozen(model, taken)
    fresh = load_trained_state(model, taken, where=f"init_from: {source}", partial=True)
    said = f"starting from {start.what}"
    if left_out:
        said += f"; {len(taken)} tensors taken, {len(left_out)} left out: {', '.join(_parts(left_out))}"
    # Of one width, tensors fit a language model that they mean nothing to; of one name in two places, they may be its.
    here = getattr(getattr(model, "language_model", None), "name", None)
    if here is not None and start.language_model not in (None, here):
        said += f"; WARNING: trained for the language model {start.language_model}, not for {here}"
    return said + (f"; new here: {', '.join(_parts(fresh))}" if fresh else "")


def from_run(source: Path) -> Start | None:
    """What an earlier run trained; None where `source` is no run folder and no `model` folder of one."""
    for path in (source / "model" / WEIGHTS, source / WEIGHTS):
        if path.is_file():
            named = _language_model_of(path.with_name(DESCRIPTION))
            return Start(read_weights(path), str(source), language_model=named)
    return None


def _language_model_of(description: Path) -> str | None:
    """The language model that a `model.yaml` names; None where there is none."""
    model = read_yaml(description).get("model") if description.is_file() else None
    language = model.get("language_model") if isinstance(model, dict) else None
    return str(language["name"]) if isinstance(language, dict) and "name" in language else None


def from_projector(source: Path) -> Start | None:
    """The projector of a published LLaVA; None where there is none."""
    state = read_projector(source)
    return None if state is None else Start(state, f"the projector of {source}")


def from_blip2(source: Path) -> Start | None:
    """The Q-Former of a published BLIP-2 or InstructBLIP in transformers' layout, a folder or a hub id; else None."""
    reference = str(source)
    if not (source / "config.json").is_file() and (source.exists() or not HUB_ID.fullmatch(reference)):
        return None
    if not is_blip2(read_config(reference)):
        return None
    checkpoint = read_blip2(reference)
    kind = None if checkpoint.retrieval else bool(checkpoint.text_config.is_encoder_decoder)
    return Start(bridge_state(checkpoint), f"the Q-Former of {source}", kind)


def from_lavis(source: Path) -> Start | None:
    """A checkpoint of LAVIS; None for other files."""
    if not is_lavis(source):
        return None
    checkpoint = read_lavis(source)
    return Start(lavis_state(checkpoint), str(source), checkpoint.encoder_decoder)


# Tried in this order; each returns None for what is not its own.
READERS: tuple[Callable[[Path], Start | None], ...] = (from_run, from_blip2, from_lavis, from_projector)


def _of_first_stage(name: str) -> bool:
    return name.startswith(_FIRST_STAGE) or (name.startswith("bridge.layers.") and _TEXT_FFN in name)


def _parts(names: list[str]) -> list[str]:
    """Where tensors lie: the first words of their names, without the numbers of layers."""
    words = [[word for word in name.split(".") if not word.isdigit()] for name in names]
    return sorted({".".join(w[: 3 if w[:2] == ["bridge", "layers"] else 2]) for w in words})
