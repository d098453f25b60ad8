"""Reading a hidden state that is not the last: a check that all sources share."""

from vlm.errors import VlmError


def check_layer(name: str, layer: int, count: int | None) -> None:
    """Raise VlmError unless `layer` counts from the end (-1: the last) within `count` layers (None: unknown)."""
    if layer >= 0:
        raise VlmError(f"{name}: `layer: {layer}`: layers count from the end, -1 is the last")
    if count is not None and -layer > count:
        raise VlmError(f"{name}: `layer: {layer}`: the model has {count} layers, so -{count} is the first")
