"""CapFilt (Li et al. 2022 (BLIP), section 3.3): a captioner writes captions for pictures of the web, and a filter keeps
those captions, the web's and its own, that match their picture.

Shard by shard: a shard is written whole or not at all, and one that was written is not done again, so that a run that
was killed goes on. Processes take the shards in turn. What comes out depends on neither.
"""

import hashlib
import json
import os
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.data.images import BrokenImage, load_image
from vlm.data.parsing import BrokenRecord
from vlm.data.records import Record
from vlm.data.shard_writer import add_record
from vlm.data.webdataset_shards import read_shard
from vlm.errors import VlmError

if TYPE_CHECKING:
    from PIL.Image import Image

COUNTS = ("records", "broken", "web", "web_kept", "synthetic", "synthetic_kept", "records_kept")
_SETTINGS = "recaption.json"


@dataclass(frozen=True)
class Recaptioning:
    """What is asked for. BLIP's own: one caption by nucleus sampling with p = 0.9, 5 to 20 tokens long; a text is
    dropped where the matching head finds it more probable that it does not match, which is the threshold 0.5.

    captioner, matcher: names of models, None for no synthetic captions and no filter. prompt: of the captioner, its own
    where None. captions: synthetic ones a picture. seed: of the sampling, with a record's id. size: records of a shard
    where the data set is not in shards. batch_size: pictures at once, up to 32.
    """

    captioner: str | None
    matcher: str | None
    threshold: float = 0.5
    prompt: str | None = None
    captions: int = 1
    top_p: float = 0.9
    temperature: float = 1.0
    min_new_tokens: int = 5
    max_new_tokens: int = 20
    seed: int = 0
    size: int = 10_000
    batch_size: int = 32

    def check(self) -> None:
        """Raises VlmError for what cannot be."""
        if self.captioner is None and self.matcher is None:
            raise VlmError("give a captioner to write captions, a matcher to filter them, or both")
        if not 0 <= self.threshold <= 1 or not 0 < self.top_p <= 1 or self.temperature <= 0:
            raise VlmError("expected 0 <= threshold <= 1, 0 < top_p <= 1 and a temperature above 0")
        if not (self.captions >= 1 and self.size >= 1 and 1 <= self.batch_size <= 32):
            raise VlmError("expected at least 1 caption and 1 record a shard, and 1 to 32 pictures at once")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens or self.max_new_tokens < 1:
            raise VlmError("expected 0 <= min_new_tokens <= max_new_tokens, and at least one token")


@dataclass(frozen=True)
class Piece:
    """The records of one shard to write, and its name without `.tar`."""

    name: str
    read: Callable[[], Iterable[Record | BrokenRecord]] = field(repr=False)


def pieces_of(
    dataset: str, split: str, size: int, format: str | None = None, images: str | None = None
) -> tuple[list[Piece], str]:
    """The pieces of a split, named as for `load_dataset` (its shards, if it has some), and what LICENCE.txt says."""
    from vlm.data.catalogue import find_shards, load_dataset, load_spec
    from vlm.paths import yaml_names

    notes = ""
    if dataset in yaml_names("datasets") or Path(dataset).suffix in (".yaml", ".yml"):
        spec, _ = load_spec(dataset)
        notes = "\n".join(line for line in (spec.licence, spec.attribution, spec.homepage) if line) + "\n"
    if (shards := find_shards(dataset, split, format, images)) is not None:
        return pieces_of_shards(shards), notes
    data = load_dataset(dataset, split, format=format, images=images)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{Path(data.name).stem if format else data.name}-{split}")
    return pieces_of_records(data.records, name, size), notes


def pieces_of_shards(shards: Sequence[Path]) -> list[Piece]:
    """A piece for each shard. Raises VlmError for two of the same name."""
    names = Counter(shard.stem for shard in shards)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise VlmError(f"{len(repeated)} shards have the name of another, the first: {repeated[0]}.tar")

    return [Piece(shard.stem, lambda shard=shard: read_shard(shard)) for shard in shards]  # type: ignore[misc]


def pieces_of_records(records: Sequence[Record], name: str, size: int) -> list[Piece]:
    """A piece for each `size` records."""
    starts = range(0, len(records), size)
    return [Piece(f"{name}-{n:06d}", lambda s=s: records[s : s + size]) for n, s in enumerate(starts)]  # type: ignore[misc]


def recaption(
    pieces: Sequence[Piece],
    output: Path,
    settings: Recaptioning,
    captioner: Any = None,
    matcher: Any = None,
    part: tuple[int, int] = (0, 1),
    notes: str = "",
    advance: Callable[[dict[str, int]], None] = lambda counts: None,
) -> dict[str, int] | None:
    """Write the shards of `output` that are not there yet; the sums of `COUNTS` once all are, else None.

    captioner: has `caption(images, prompt, **generation)`. matcher: `match(images, texts)`, or `match_each` as well.
    part: this process and how many there are; each takes every n-th shard. notes: what LICENCE.txt says.
    advance: told the counts of every shard, also of those that were there.
    A record keeps its web captions and the synthetic ones that match, `meta.caption_sources` says which is which, and
    `meta.match` how probable; one that keeps none is left out. Where the same words come from both, they are the web's.
    Raises VlmError where the folder holds what other settings wrote.
    """
    settings.check()
    output.mkdir(parents=True, exist_ok=True)
    _same_settings(output, asdict(settings) | {"shards": [piece.name for piece in pieces]})
    if notes:
        _write(output / "LICENCE.txt", notes)
    for piece in pieces[part[0] :: part[1]]:
        done = _counts_of(output, piece)
        if done is None:
            done = _rewritten(piece, output, settings, captioner, matcher)
        advance(done)
    every = {piece.name: _counts_of(output, piece) for piece in pieces}
    counts = [found for found in every.values() if found is not None]
    if len(counts) < len(every):
        return None
    # The last to end finds everything there; should two do so at once, they write the same.
    sizes = {f"{name}.tar": found["records_kept"] for name, found in every.items() if found and found["records_kept"]}
    _write(output / "sizes.json", json.dumps(sizes, indent=2) + "\n")
    total = {key: sum(found[key] for found in counts) for key in COUNTS}
    _write(output / "counts.json", json.dumps(total, indent=2) + "\n")
    return total


def _rewritten(piece: Piece, output: Path, settings: Recaptioning, captioner: Any, matcher: Any) -> dict[str, int]:
    counts = dict.fromkeys(COUNTS, 0)
    handle, aside = tempfile.mkstemp(prefix=f".{piece.name}.", dir=output)
    try:
        with os.fdopen(handle, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for record in _kept(piece, settings, captioner, matcher, counts):
                add_record(tar, record, counts["records_kept"])
                counts["records_kept"] += 1
        if counts["records_kept"]:
            os.chmod(aside, 0o644)  # mkstemp's files are the owner's alone
            Path(aside).replace(output / f"{piece.name}.tar")
    finally:
        Path(aside).unlink(missing_ok=True)
    _write(_mark(output, piece), json.dumps(counts) + "\n")  # last: what it says is done
    return counts


def _kept(
    piece: Piece, settings: Recaptioning, captioner: Any, matcher: Any, counts: dict[str, int]
) -> Iterator[Record]:
    entries = iter(piece.read())
    while batch := list(islice(entries, settings.batch_size)):
        records: list[Record] = []
        images: list[Image] = []
        for entry in batch:
            counts["records"] += 1
            try:
                if not isinstance(entry, BrokenRecord) and entry.images:
                    images.append(load_image(entry.images[0]))
                    records.append(entry)
                    continue
            except BrokenImage:
                pass
            counts["broken"] += 1
        if not records:
            continue
        told = [[(text, "web") for text in dict.fromkeys(record.captions)] for record in records]
        for turn in range(settings.captions if captioner is not None else 0):
            seeds = [_seed(settings.seed, piece.name, record.id, turn) for record in records]
            for own, text in zip(told, _sampled(captioner, images, seeds, settings), strict=True):
                if text and text not in (known for known, _ in own):
                    own.append((text, "synthetic"))
        matches = _matches(matcher, images, [[text for text, _ in own] for own in told])
        for record, own, probabilities in zip(records, told, matches, strict=True):
            rows = [
                (text, source, match)
                for (text, source), match in zip(own, probabilities, strict=True)
                if match is None or match >= settings.threshold
            ]
            for _, source in own:
                counts[source] += 1
            for _, source, _ in rows:
                counts[f"{source}_kept"] += 1
            if rows:
                said: dict[str, Any] = {"caption_sources": [source for _, source, _ in rows]}
                if matcher is not None:
                    said["match"] = [round(float(match or 0), 6) for _, _, match in rows]
                yield replace(record, captions=tuple(text for text, _, _ in rows), meta={**record.meta, **said})


def _sampled(captioner: Any, images: "list[Image]", seeds: list[int], settings: Recaptioning) -> list[str]:
    from vlm.models.nucleus import SeededNucleus

    texts = captioner.caption(
        images,
        prompt=settings.prompt,
        do_sample=False,
        num_beams=1,
        min_new_tokens=settings.min_new_tokens,
        max_new_tokens=settings.max_new_tokens,
        logits_processor=[SeededNucleus(seeds, settings.top_p, settings.temperature)],
    )
    return [str(text).strip() for text in texts]


def _matches(matcher: Any, images: "list[Image]", texts: list[list[str]]) -> list[list[float | None]]:
    """The probability that each picture and each of its texts match; None without a matcher."""
    if matcher is None:
        return [[None] * len(own) for own in texts]
    asked = [number for number, own in enumerate(texts) if own]
    found: list[list[float | None]] = [[] for _ in texts]
    if asked and hasattr(matcher, "match_each"):  # which looks at each picture once
        every = [text for own in texts for text in own]
        ends = [sum(map(len, texts[: n + 1])) for n in range(len(texts))]
        wanted = [list(range(ends[n] - len(texts[n]), ends[n])) for n in asked]
        for number, logits in zip(asked, matcher.match_each([images[n] for n in asked], every, wanted), strict=True):
            found[number] = logits.float().softmax(-1)[:, 1].tolist()
    elif asked:
        pairs = [(number, text) for number in asked for text in texts[number]]
        said = matcher.match([images[number] for number, _ in pairs], [text for _, text in pairs])
        for (number, _), match in zip(pairs, said.tolist(), strict=True):
            found[number].append(match)
    return found


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big") >> 1


def _mark(output: Path, piece: Piece) -> Path:
    return output / f"{piece.name}.counts.json"


def _counts_of(output: Path, piece: Piece) -> dict[str, int] | None:
    """The counts of a shard that was written, None of one that was not."""
    try:
        found = json.loads(_mark(output, piece).read_text(encoding="utf-8"))
        return {key: int(found[key]) for key in COUNTS}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _same_settings(output: Path, settings: dict[str, Any]) -> None:
    file = output / _SETTINGS
    if not file.exists() and any(output.glob("*.tar")):
        raise VlmError(f"{output} holds shards that something else wrote; choose another folder")
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        _write(file, json.dumps(settings, indent=2) + "\n")
        return
    except ValueError as error:
        raise VlmError(f"{file}: not JSON: {error}") from error
    changed = [key for key in settings if known.get(key) != settings[key] and key != "batch_size"]
    if changed:
        raise VlmError(
            f"{output} was begun with another {changed[0]} ({known.get(changed[0])!r}, now {settings[changed[0]]!r}); "
            "choose another folder or remove it"
        )


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(aside, 0o644)
    Path(aside).replace(path)
