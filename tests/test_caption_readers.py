"""Readers of published captions, on miniature copies in the layouts their authors publish."""

from pathlib import Path

import pytest
from reader_parts import read, write

from vlm.data.formats import read_records
from vlm.errors import VlmError


def test_visual_genome_regions_become_captions(tmp_path: Path) -> None:
    regions = [
        {"region_id": 1, "image_id": 2, "phrase": phrase, "x": x, "y": 1, "width": 5, "height": 6}
        for x, phrase in enumerate(("the clock is green ", "a sign", "the clock is green", ""))
    ]
    (tmp_path / "VG_100K").mkdir()
    write(tmp_path / "VG_100K_2/2.jpg", "")
    file = write(
        tmp_path / "region_descriptions.json", [{"id": 2, "regions": regions}, {"id": 3, "regions": []}, {"id": 4}]
    )
    records, broken = read_records("visual_genome", file, "train")
    assert records[0].captions == ("the clock is green", "a sign")
    assert records[0].images == (str(tmp_path / "VG_100K_2/2.jpg"),)
    assert records[0].meta["regions"] == [(0, 1, 5, 6), (1, 1, 5, 6)]
    assert [b.reason for b in broken] == ["no list `regions`"]


def test_nocaps_domains_are_kept(tmp_path: Path) -> None:
    image = {"id": 0, "file_name": "0013ea.jpg", "domain": "near-domain", "open_images_id": "0013ea", "width": 1}
    image["coco_url"] = "https://s3.amazonaws.com/open-images-dataset/validation/0013ea.jpg"
    content = {"images": [image], "annotations": [{"image_id": 0, "id": 0, "caption": "A baby."}]}
    (record,) = read("coco_captions", write(tmp_path / "nocaps.json", content))
    assert dict(record.meta) == {"image_id": 0, "domain": "near-domain"}


LISTS = {
    "cc3m.tsv": 'a "very\ttypical\thttp://a.org/1\nsecond\thttp://a.org/2\nthird\thttps://a.org/3\n',
    "cc12m.tsv": "http://a.org/1\tfirst\nhttp://a.org/2\tsecond\nhttp://a.org/3\tthird\n",
    "header.tsv": "caption\turl\nfirst\thttp://a.org/1\nsecond\thttp://a.org/2\nthird\thttp://a.org/3\n",
    "sbu.json": {"image_urls": [f"http://a.org/{n}" for n in (1, 2, 3)], "captions": ["first", "second", "third"]},
}


@pytest.mark.parametrize("name", LISTS)
def test_pictures_of_a_list_are_found_where_img2dataset_puts_them(tmp_path: Path, name: str) -> None:
    for row in (1, 2):
        write(tmp_path / f"images/00000/00000000{row}.jpg", "")
    records = read("url_list", write(tmp_path / name, LISTS[name]), images=tmp_path / "images")
    assert [(r.id, r.captions[0], r.meta["url"].partition("//")[2]) for r in records] == [
        ("000000001", "second", "a.org/2"),
        ("000000002", "third", "a.org/3"),
    ]
    assert records[0].images == (str(tmp_path / "images/00000/000000001.jpg"),)


def test_rows_of_later_shards_are_counted_on(tmp_path: Path) -> None:
    write(tmp_path / "00001/000010003.webp", "")
    file = write(tmp_path / "l.tsv", "".join(f"caption {n}\thttp://a.org/{n}\n" for n in range(10_005)))
    assert [(r.id, r.captions) for r in read("url_list", file)] == [("000010003", ("caption 10003",))]


def test_a_list_without_pictures_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(VlmError, match=r"no picture of l\.tsv .*; fetch them with: img2dataset"):
        read("url_list", write(tmp_path / "l.tsv", "a\thttp://a.org/1\n"))
    with pytest.raises(VlmError, match="expected lists `image_urls` and `captions` of one length"):
        read("url_list", write(tmp_path / "l.json", {"image_urls": ["x"], "captions": []}))


def test_parquet_is_read_or_says_what_is_missing(tmp_path: Path) -> None:
    write(tmp_path / "00000/000000001.jpg", "")
    file = tmp_path / "laion.parquet"
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        file.write_bytes(b"PAR1")
        with pytest.raises(VlmError, match="parquet is read by pyarrow; run: pip install pyarrow"):
            read("url_list", file)
        return
    columns = {"SAMPLE_ID": [1, 2], "URL": ["http://a.org/1", "http://a.org/2"], "TEXT": ["first", "second"]}
    parquet.write_table(pyarrow.table(columns), file)
    (record,) = read("url_list", file)
    assert (record.captions, record.meta["url"]) == (("second",), "http://a.org/2")


def test_textcaps_has_a_record_a_picture(tmp_path: Path) -> None:
    entries = [
        {"image_id": "b1", "caption_str": "A sign that says stop. "},
        {"image_id": "c2", "caption_str": "A bottle of red wine."},
        {"image_id": "b1", "caption_str": "Stop sign."},
        {"image_id": 3},
    ]
    file = write(tmp_path / "TextCaps_0.1_val.json", {"data": entries})
    records, broken = read_records("textcaps", file, "val")
    assert [(r.images, r.captions) for r in records] == [
        ((str(tmp_path / "b1.jpg"),), ("A sign that says stop.", "Stop sign.")),
        ((str(tmp_path / "c2.jpg"),), ("A bottle of red wine.",)),
    ]
    assert len(broken) == 1
    (test,) = read("textcaps", write(tmp_path / "test.json", {"data": [{"image_id": "d"}]}), "test")
    assert test.captions == ()
    with pytest.raises(VlmError, match="a list `data`"):
        read("textcaps", write(tmp_path / "list.json", []))
