"""Every data set that travels with the library, from its published files to records.

The files are miniature copies, served by a machine that drops connections: fetched, unpacked, told what has to come by
hand, checked and read, by the YAML file as it is shipped but for addresses, sizes and checksums.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from file_server import Server
from published_copies import COPIES
from published_files import packed, told

from vlm.data.catalogue import load_dataset
from vlm.data.images import load_image
from vlm.data.prepare import check, prepare
from vlm.data.webdataset_shards import expand_braces
from vlm.errors import VlmError
from vlm.paths import find_yaml, read_yaml, yaml_names
from vlm.schema import dump_yaml

_IN_PACKAGES = {"easy_vqa", "easy_vqa_captions", "openmoji"}


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("vlm.data.download.time.sleep", lambda seconds: None)
    return tmp_path / "data"


def served(name: str, server: Server, folder: Path) -> tuple[str, dict[str, Any]]:
    """The shipped YAML file with the server's addresses, and its content; the server has the copy."""
    copy, content = COPIES[name], read_yaml(find_yaml("datasets", name))
    # Of thousands of shards the first three.
    content = json.loads(re.sub(r"\{0000\.\.\d{4}\}", "{0000..0002}", json.dumps(content)))
    used = set()
    for number, download in enumerate(content["downloads"]):
        for key in ("size", "sha256", "md5"):
            download.pop(key, None)
        if "by_hand" in download:
            continue
        start = f"{number}-{download['url'].split('/')[-1]}"
        ends = {url: end for url in expand_braces(download["url"]) for end in copy.files if url.endswith(f"/{end}")}
        assert set(ends) == set(expand_braces(download["url"])), download["url"]
        for place, (url, end) in zip(expand_braces(start), ends.items(), strict=True):
            server.files[f"/{place}"] = packed(url, copy.files[end])
            used.add(end)
        download["url"] = server.url(start)
    assert used == set(copy.files)
    for split, records in copy.records.items():
        content["splits"][split] |= {"size": len(records)}
        content["splits"][split].pop("pictures", None)
    dump_yaml(content, folder / f"{name}.yaml")
    return str(folder / f"{name}.yaml"), content


def test_every_data_set_has_a_copy_here() -> None:
    assert COPIES.keys() | _IN_PACKAGES == set(yaml_names("datasets"))


@pytest.mark.parametrize("name", sorted(COPIES))
def test_a_data_set_is_read_from_its_published_files(name: str, server: Server, tmp_path: Path, data: Path) -> None:
    copy = COPIES[name]
    file, content = served(name, server, tmp_path)
    assert copy.records.keys() == content["splits"].keys()
    assert len(check(file)) == len(content["downloads"])
    server.cut = [20, 0, 100]  # the first connections break
    if copy.by_hand:
        with pytest.raises(VlmError, match="needs what has to be fetched by hand") as caught:
            prepare(file, progress=False)
        for download in content["downloads"]:
            if "by_hand" in download:
                assert f"{data / download['to']}: {download['by_hand'].rstrip('.')}" in str(caught.value)
                assert any(place.startswith(download["to"]) for place in copy.by_hand)
        for place, written in copy.by_hand.items():
            (data / place).parent.mkdir(parents=True, exist_ok=True)
            (data / place).write_bytes(written)
    prepare(file, progress=False)
    assert copy.files == {} or any(asked for asked in server.asked)  # a broken one was resumed
    assert check(file) == []
    for split, expected in copy.records.items():
        records = load_dataset(file, split).records
        for record, wanted in zip(records, expected, strict=True):
            found = told(record, str(data))
            # Pictures within shards, tables and batches have no file of their own.
            assert found[1:] == wanted[1:]
            if wanted[0] is not None:
                assert found[0] == wanted[0]
        if pictures := [image for record in records for image in record.images]:
            assert load_image(pictures[-1]).mode == "RGB"
