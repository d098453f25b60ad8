"""Miniature copies of the published data sets of captions."""

from typing import Any

from published_files import JPG, TEST_2017, TRAIN_2014, TRAIN_2017, VAL_2014, VAL_2017, Copy, Members, as_json, packed


def official_captions(*pictures: tuple[int, str, list[str]], **more: Any) -> bytes:
    """COCO's file of captions."""
    images = [
        {"license": 5, "file_name": name, "coco_url": "http://a/b.jpg", "height": 4, "width": 4, "id": number, **more}
        for number, name, _ in pictures
    ]
    notes = [
        {"image_id": number, "id": 10 * number + n, "caption": text}
        for number, _, texts in pictures
        for n, text in enumerate(texts)
    ]
    return as_json({"info": {}, "images": images, "licenses": [], "annotations": notes})


def image_info(number: int, name: str) -> bytes:
    return as_json(
        {"info": {}, "images": [{"id": number, "file_name": name, "width": 4, "height": 4}], "categories": []}
    )


def karpathy(*entries: dict[str, Any]) -> bytes:
    images = [
        {
            "imgid": n,
            "sentids": [n],
            **{key: value for key, value in entry.items() if key != "raw"},
            "sentences": [
                {"tokens": text.lower().split(), "raw": text, "imgid": n, "sentid": n} for text in entry["raw"]
            ],
        }
        for n, entry in enumerate(entries)
    ]
    return as_json({"images": images, "dataset": "x"})


KARPATHY = {
    "dataset_coco.json": karpathy(
        {
            "filepath": "train2014",
            "filename": "COCO_train2014_000000000009.jpg",
            "split": "train",
            "cocoid": 9,
            "raw": ["A."],
        },
        {
            "filepath": "val2014",
            "filename": "COCO_val2014_000000000007.jpg",
            "split": "restval",
            "cocoid": 7,
            "raw": ["B."],
        },
        {
            "filepath": "val2014",
            "filename": "COCO_val2014_000000000042.jpg",
            "split": "val",
            "cocoid": 42,
            "raw": ["C."],
        },
        {
            "filepath": "val2014",
            "filename": "COCO_val2014_000000000073.jpg",
            "split": "test",
            "cocoid": 73,
            "raw": ["D.", "E"],
        },
    ),
    "dataset_flickr8k.json": b"{}",
    "dataset_flickr30k.json": karpathy(
        *(
            {"filename": f"{n}.jpg", "split": s, "raw": [f"{s} one.", "two"]}
            for n, s in enumerate(("train", "val", "test"))
        )
    ),
}


def sharded(key: str) -> Members:
    """What img2dataset puts into a shard."""
    about = as_json({"caption": "a café", "url": "http://a/b.jpg", "key": key, "status": "success", "width": 4})
    return {f"{key}.jpg": JPG, f"{key}.json": about, f"{key}.txt": "a café".encode()}


def nocaps_info(domain: str | None) -> bytes:
    url = "https://s3.amazonaws.com/nocaps/val/0013ea2087020901.jpg"
    more = {"open_images_id": "0013ea2087020901", "coco_url": url, **({"domain": domain} if domain else {})}
    if domain:
        return official_captions((0, "0013ea2087020901.jpg", ["A baby."] * 10), **more)
    return as_json({"info": {}, "images": [{"id": 0, "file_name": "0013ea2087020901.jpg", **more}]})


REGION = {"region_id": 1382, "width": 82, "height": 139, "y": 57, "x": 421}

CAPTIONS: dict[str, Copy] = {
    "cc12m": Copy(
        files={f"cc12m-train-{n:04d}.tar": sharded(f"{n:09d}") for n in range(3)},
        records={"train": [(None, ("a café",))] * 3},
    ),
    "cc3m": Copy(
        files={f"cc3m-train-{n:04d}.tar": sharded(f"{n:09d}") for n in range(3)}
        | {f"cc3m-validation-{n:04d}.tar": sharded(f"{n:09d}") for n in range(3)},
        records={split: [(None, ("a café",))] * 3 for split in ("train", "val")},
    ),
    "cc_sbu_align": Copy(
        by_hand={
            "cc_sbu_align/filter_cap.json": as_json({"annotations": [{"image_id": "2", "caption": "A long story."}]}),
            "cc_sbu_align/image/2.jpg": JPG,
        },
        records={"train": [("cc_sbu_align/image/2.jpg", ("A long story.",))]},
    ),
    "coco_captions": Copy(
        files={
            "caption_datasets.zip": KARPATHY,
            "train2014.zip": TRAIN_2014,
            "val2014.zip": VAL_2014 | {f"val2014/COCO_val2014_{n:012d}.jpg": JPG for n in (7, 73)},
        },
        records={
            "train": [
                ("coco/train2014/COCO_train2014_000000000009.jpg", ("A.",)),
                ("coco/val2014/COCO_val2014_000000000007.jpg", ("B.",)),
            ],
            "restval": [("coco/val2014/COCO_val2014_000000000007.jpg", ("B.",))],
            "val": [("coco/val2014/COCO_val2014_000000000042.jpg", ("C.",))],
            "test": [("coco/val2014/COCO_val2014_000000000073.jpg", ("D.", "E"))],
        },
    ),
    "coco_captions_2014": Copy(
        files={
            "annotations_trainval2014.zip": {
                "annotations/captions_train2014.json": official_captions(
                    (9, "COCO_train2014_000000000009.jpg", ["A."])
                ),
                "annotations/captions_val2014.json": official_captions(
                    (42, "COCO_val2014_000000000042.jpg", ["B.", "C"])
                ),
                "annotations/instances_val2014.json": b"{}",
            },
            "image_info_test2014.zip": {
                "annotations/image_info_test2014.json": image_info(1, "COCO_test2014_000000000001.jpg")
            },
            "train2014.zip": TRAIN_2014,
            "val2014.zip": VAL_2014,
            "test2014.zip": {"test2014/COCO_test2014_000000000001.jpg": JPG},
        },
        records={
            "train": [("coco/train2014/COCO_train2014_000000000009.jpg", ("A.",))],
            "val": [("coco/val2014/COCO_val2014_000000000042.jpg", ("B.", "C"))],
            "test": [("coco/test2014/COCO_test2014_000000000001.jpg", ())],
        },
    ),
    "coco_captions_2017": Copy(
        files={
            "annotations_trainval2017.zip": {
                "annotations/captions_train2017.json": official_captions((9, "000000000009.jpg", ["A."])),
                "annotations/captions_val2017.json": official_captions((42, "000000000042.jpg", ["B.", "C"])),
            },
            "image_info_test2017.zip": {"annotations/image_info_test2017.json": image_info(1, "000000000001.jpg")},
            "train2017.zip": TRAIN_2017,
            "val2017.zip": VAL_2017,
            "test2017.zip": TEST_2017,
        },
        records={
            "train": [("coco/train2017/000000000009.jpg", ("A.",))],
            "val": [("coco/val2017/000000000042.jpg", ("B.", "C"))],
            "test": [("coco/test2017/000000000001.jpg", ())],
        },
    ),
    "flickr30k": Copy(
        files={"caption_datasets.zip": KARPATHY},
        by_hand={f"flickr30k/flickr30k-images/{n}.jpg": JPG for n in range(3)},
        records={
            split: [(f"flickr30k/flickr30k-images/{n}.jpg", (f"{split} one.", "two"))]
            for n, split in enumerate(("train", "val", "test"))
        },
    ),
    "laion400m": Copy(
        by_hand={
            "laion400m/train/00000.tar": packed("00000.tar", sharded("000000000")),
            "laion400m/train/00000_stats.json": as_json({"successes": 1, "count": 2}),
            "laion400m/train/00000.parquet": b"",
            "laion400m/train/00001.tar": packed("00001.tar", sharded("000010000")),
        },
        records={"train": [(None, ("a café",))] * 2},
    ),
    "nocaps": Copy(
        files={
            "nocaps_val_4500_captions.json": nocaps_info("out-domain"),
            "nocaps_test_image_info.json": nocaps_info(None),
        },
        by_hand={f"nocaps/{part}/0013ea2087020901.jpg": JPG for part in ("val", "test")},
        records={
            "val": [("nocaps/val/0013ea2087020901.jpg", ("A baby.",) * 10)],
            "test": [("nocaps/test/0013ea2087020901.jpg", ())],
        },
    ),
    "sbu": Copy(
        files={
            "sbu-captions-all.tar.gz": {
                "sbu-captions-all.json": as_json(
                    {
                        "image_urls": ["http://static.flickr.com/1.jpg", "http://static.flickr.com/2.jpg"],
                        "captions": ["Green field ", "gone"],
                        "user_ids": ["a", "b"],
                    }
                )
            }
        },
        by_hand={"sbu/images/00000/000000000.jpg": JPG},
        records={"train": [("sbu/images/00000/000000000.jpg", ("Green field",))]},
    ),
    "textcaps": Copy(
        files={
            **{
                f"TextCaps_0.1_{split}.json": as_json(
                    {"data": [{"image_id": f"00{split}", "caption_str": text} for text in ("a sign", "it says stop")]}
                )
                for split in ("train", "val")
            },
            "TextCaps_0.1_test.json": as_json({"data": [{"image_id": "00test"}]}),
            "train_val_images.zip": {f"train_images/00{split}.jpg": JPG for split in ("train", "val")},
            "test_images.zip": {"test_images/00test.jpg": JPG},
        },
        records={
            "train": [("textvqa/train_images/00train.jpg", ("a sign", "it says stop"))],
            "val": [("textvqa/train_images/00val.jpg", ("a sign", "it says stop"))],
            "test": [("textvqa/test_images/00test.jpg", ())],
        },
    ),
    "visual_genome": Copy(
        files={
            "region_descriptions.json.zip": {
                "region_descriptions.json": as_json(
                    [
                        {"id": 1, "regions": [{**REGION, "image_id": 1, "phrase": "the clock is green"}]},
                        {"id": 2, "regions": [{**REGION, "image_id": 2, "phrase": text} for text in ("a", "b", "a")]},
                    ]
                )
            },
            "VG_100K_2/images.zip": {"VG_100K/2.jpg": JPG},
            "images2.zip": {"VG_100K_2/1.jpg": JPG},
        },
        records={"train": [("vg/VG_100K_2/1.jpg", ("the clock is green",)), ("vg/VG_100K/2.jpg", ("a", "b"))]},
    ),
}
