"""Data sets by name: what their YAML files may say, where their files lie, and loading one split."""

import importlib.util
import shlex
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pydantic import Field, field_validator, model_validator

from vlm.backbones.starter import package_file
from vlm.data.formats import FORMATS, read_records
from vlm.data.parsing import BrokenRecord
from vlm.data.records import Record
from vlm.data.webdataset_shards import expand_braces, has_braces, shards_of
from vlm.errors import VlmError, did_you_mean
from vlm.paths import cache_dir, data_dir, find_yaml, read_yaml, yaml_names
from vlm.schema import Strict, validate

IN_PACKAGE = "package:"
PREPARED = "prepared:"
IN_DATA = "data:"


class SplitSpec(Strict):
    """One split. A place is `package:MODULE/PATH` (inside an installed package), `prepared:PATH` (made by
    `vlm data prepare`), `data:PATH` (in the data folder `VLM_DATA`, downloaded or put there by hand), or a path,
    relative to the YAML file; of `webdataset`, with braces for several shards.

    path: the annotation file or folder. images: folder of the pictures, if not the format's own place. questions: the
    second file of formats that part questions from answers.
    size, pictures: how many records and pictures there are; checked by `vlm data prepare`.
    """

    path: str
    images: str | None = None
    questions: str | None = None
    size: int | None = Field(default=None, ge=1)
    pictures: int | None = Field(default=None, ge=1)


class Download(Strict):
    """A file that the data set needs, in the data folder `VLM_DATA`; data sets that need the same one share it.

    url: http(s), or `hf://datasets/OWNER/NAME/PATH`; with `by_hand`, the page to get it from. to: where it goes, a
    place in the data folder; both may have braces for several files, as shards have.
    size (bytes), sha256, md5: of the file as it is downloaded.
    unpack: of an archive, the files and folders to take out of it; `to` is then the folder they go to.
    splits: those that need it, all where none are named. by_hand: how to get it where a licence or a form stands before
    it; `vlm data prepare` then does not fetch it.
    """

    url: str = Field(pattern=r"^(https?://|hf://datasets/[^/]+/[^/]+/)[^\s]+$")
    to: str
    size: int | None = Field(default=None, ge=1)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    md5: str | None = Field(default=None, pattern=r"^[0-9a-f]{32}$")
    unpack: list[str] = []
    splits: list[str] = []
    by_hand: str = ""

    @field_validator("to", "unpack")
    @classmethod
    def _inside(cls, value: str | list[str]) -> str | list[str]:
        for name in [value] if isinstance(value, str) else value:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name:
                raise ValueError("expected a place inside the data folder, e.g. coco/annotations")
        return value

    @model_validator(mode="after")
    def _as_many_addresses_as_places(self) -> "Download":
        if not self.unpack and not self.by_hand and len(expand_braces(self.url)) != len(expand_braces(self.to)):
            raise ValueError("`url` and `to` name different numbers of files")
        return self

    def places(self) -> list[str]:
        """What has to be there in the end, relative to the data folder."""
        if self.unpack:
            return [str(PurePosixPath(self.to) / name) for name in self.unpack]
        return expand_braces(self.to)


class DatasetSpec(Strict):
    """One data set.

    packages: PyPI packages it comes from, importable name -> what to install.
    downloads: files it needs, in the data folder. checksums: place of a file -> its SHA-256. notes: what preparing
    does, and what else to know.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    homepage: str = ""
    licence: str
    attribution: str = ""
    format: str
    packages: dict[str, str] = {}
    downloads: list[Download] = []
    splits: dict[str, SplitSpec] = Field(min_length=1)
    checksums: dict[str, str] = {}
    notes: str = ""

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        if value not in FORMATS:
            raise ValueError(f"unknown format{did_you_mean(value, FORMATS)}")
        return value

    @model_validator(mode="after")
    def _downloads_of_its_own_splits(self) -> "DatasetSpec":
        for split in (split for download in self.downloads for split in download.splits):
            if split not in self.splits:
                raise ValueError(f"a download is for the split {split!r}{did_you_mean(split, self.splits)}")
        return self


@dataclass
class Dataset:
    """One split in memory; `broken` lists the entries that could not be read."""

    name: str
    split: str
    records: list[Record]
    broken: list[BrokenRecord] = field(default_factory=list)
    licence: str = ""


def load_spec(name: str) -> tuple[DatasetSpec, Path]:
    """A shipped data set by name, or a YAML file, with the path of the file. Raises VlmError with the nearest names."""
    # A file or folder of yours that happens to have the name of a shipped one does not hide it.
    path = find_yaml("datasets", f"datasets/{name}" if name in yaml_names("datasets") else name)
    return validate(DatasetSpec, read_yaml(path), where=str(path)), path


def load_dataset(
    name: str,
    split: str,
    format: str | None = None,
    images: str | None = None,
    limit: int | None = None,
    questions: str | None = None,
    need_pictures: bool = True,
) -> Dataset:
    """The records of one split, at most `limit`.

    name: a shipped data set, a YAML file, or with `format` an annotation file or folder. images: folder of the
    pictures, in place of the data set's own. questions: the file of questions, where `name` holds the answers alone.
    need_pictures: whether a data set by name must have its pictures (to score predictions its annotations are enough).
    Raises VlmError for a missing file, an unknown split or format, no records, or a data set that is not prepared.
    """
    place = _place(name, split, format, images, questions, need_pictures)
    records, broken = read_records(place.format, place.path, split, place.images, limit, place.questions)
    if not records:
        first = f"; {len(broken)} malformed, the first: {broken[0].where}: {broken[0].reason}" if broken else ""
        raise VlmError(f"data set {place.name!r}, split {split!r}: no records in {place.path}{first}")
    return Dataset(place.name, split, records, broken, place.licence)


def find_shards(name: str, split: str, format: str | None = None, images: str | None = None) -> list[Path] | None:
    """The shards of a split, named as for `load_dataset`; None if its format is another than `webdataset`."""
    place = _place(name, split, format, images)
    return shards_of(place.path, split) if place.format == "webdataset" else None


@dataclass(frozen=True)
class _Place:
    """Where a split lies and how it is read."""

    name: str
    licence: str
    format: str
    path: Path
    images: Path | None
    questions: Path | None


def _place(
    name: str,
    split: str,
    format: str | None,
    images: str | None,
    questions: str | None = None,
    need_pictures: bool = True,
) -> _Place:
    folder = Path(images).expanduser() if images else None
    asked = Path(questions).expanduser() if questions else None
    is_yaml = name in yaml_names("datasets") or Path(name).suffix in (".yaml", ".yml")
    if is_yaml or (format is None and not Path(name).expanduser().exists()):
        spec, file = load_spec(name)
        chosen = _split(spec, split)
        if folder is None and chosen.images:
            try:
                folder = locate(spec, file, chosen.images)
            except VlmError:
                if need_pictures:
                    raise
        if asked is None and chosen.questions:
            asked = locate(spec, file, chosen.questions)
        path, licence, format = locate(spec, file, chosen.path), spec.licence, format or spec.format
        name = spec.name
    elif format is None:
        raise VlmError(f"{name}: say how to read it: give `format`, one of {', '.join(FORMATS)}")
    else:
        path, licence = Path(name).expanduser(), "not stated"
    return _Place(name, licence, format, path, folder, asked)


def locate(spec: DatasetSpec, file: Path, place: str) -> Path:
    """Where a place of the data set described in `file` lies. Raises VlmError that says how to get what is missing."""
    if place.startswith(IN_PACKAGE):
        if missing := missing_packages(spec):
            raise VlmError(f"data set {spec.name!r} comes from a package that is not installed; run: {missing}")
        module, _, relative = place.removeprefix(IN_PACKAGE).partition("/")
        return package_file(module, relative)
    if place.startswith(PREPARED):
        path = prepared_folder(spec) / place.removeprefix(PREPARED)
        if not path.exists():
            raise VlmError(f"data set {spec.name!r} is not prepared; run: vlm data prepare {spec.name}")
        return path
    if place.startswith(IN_DATA):
        path = data_dir() / place.removeprefix(IN_DATA)
        if not path.exists() and not (has_braces(path) and _some_shard(path)):
            raise VlmError(
                f"data set {spec.name!r}: {path} is missing; run: vlm data prepare {spec.name} "
                "(it fetches it or says where to get it; VLM_DATA chooses another data folder)"
            )
        return path
    path = file.parent / Path(place).expanduser()
    if not path.exists() and not (spec.format == "webdataset" and has_braces(path)):
        raise VlmError(f"{file}: {place!r} is missing: no such file or folder {path}")
    return path


def prepared_folder(spec: DatasetSpec) -> Path:
    """Where `vlm data prepare` puts the data set."""
    return cache_dir() / "data" / spec.name


def missing_packages(spec: DatasetSpec) -> str | None:
    """The command that installs the packages the data set comes from and that are missing; None if none is."""
    missing = [install for module, install in spec.packages.items() if importlib.util.find_spec(module) is None]
    # Without dependencies: one of the packages asks for a C++ build that its data does not need.
    return f"pip install --no-deps {shlex.join(missing)}" if missing else None


def _some_shard(pattern: Path) -> bool:
    return any(Path(name).is_file() for name in expand_braces(str(pattern)))


def _split(spec: DatasetSpec, split: str) -> SplitSpec:
    if split not in spec.splits:
        raise VlmError(f"data set {spec.name!r}: no split {split!r}{did_you_mean(split, spec.splits)}")
    return spec.splits[split]
