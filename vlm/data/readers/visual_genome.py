"""Region descriptions of Visual Genome (Krishna et al. 2017) as captions of the whole picture, as ALBEF and BLIP do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm.data.parsing import Entry, Malformed, checked_text, each_entry, file_of, need_mapping, read_json_list
from vlm.data.records import Record

_FOLDERS = ("VG_100K", "VG_100K_2")


def read_visual_genome(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
    """`[{id, regions: [{phrase, x, y, width, height}]}]`: a record for each picture, a caption for each phrase.

    images: the folder of pictures `ID.jpg`, or the one that holds `VG_100K/` and `VG_100K_2/`. `meta["regions"]` holds
    the boxes (x, y, width, height in pixels), one for each caption.
    """
    file = file_of(path, split, (".json",))
    folder = images or file.parent
    # The release parts the pictures by no rule.
    parts = {name: base for base in _FOLDERS if (folder / base).is_dir() for name in _names(folder / base)}

    def record(_: int, item: Any) -> Record:
        need_mapping(item)
        image, regions = item.get("id"), item.get("regions")
        if not isinstance(image, int):
            raise Malformed(f"`id` is {image!r}, expected a number")
        if not isinstance(regions, list):
            raise Malformed("no list `regions`")
        captions: dict[str, tuple[Any, ...]] = {}  # the same phrase about two regions is one caption
        for region in regions:
            need_mapping(region)
            if str(region.get("phrase") or "").strip():  # a few are empty
                phrase = checked_text(region["phrase"], "`phrase`").strip()
                captions.setdefault(phrase, tuple(region.get(key) for key in ("x", "y", "width", "height")))
        if not captions:
            raise Malformed("no phrase says anything")
        name = f"{image}.jpg"
        return Record(
            id=str(image),
            images=(str(folder / parts.get(name, "") / name),),
            captions=tuple(captions),
            meta={"image_id": image, "regions": list(captions.values())},
        )

    # A picture in which nobody described a region is no error.
    items = [item for item in read_json_list(file) if not (isinstance(item, dict) and item.get("regions") == [])]
    yield from each_entry(file, items, record)


def _names(folder: Path) -> Iterator[str]:
    return (entry.name for entry in folder.iterdir())
