"""Names of parts: `SOURCE:REFERENCE`, e.g. `timm:vit_base_patch16_clip_224.openai` or `starter:smollm2-135m`."""

from dataclasses import dataclass

from vlm.errors import VlmError, did_you_mean

SOURCES = ("timm", "open_clip", "hf", "gguf", "starter")


@dataclass(frozen=True)
class PartName:
    """A part's source library and what that library calls it."""

    source: str
    reference: str

    def __str__(self) -> str:
        return f"{self.source}:{self.reference}"


def parse_part_name(name: str, allowed: tuple[str, ...] = SOURCES) -> PartName:
    """Split `SOURCE:REFERENCE`. Raises VlmError if the source is unknown or not one of `allowed`."""
    source, colon, reference = name.partition(":")
    if not colon or not reference:
        raise VlmError(f"part name {name!r}: expected SOURCE:NAME with SOURCE one of {', '.join(allowed)}")
    if source not in allowed:
        raise VlmError(f"part name {name!r}: unknown source {source!r} here{did_you_mean(source, allowed)}")
    return PartName(source, reference)
