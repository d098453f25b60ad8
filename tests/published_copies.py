"""Miniature copies of the data sets that travel with the library: the files as their authors publish them.

`COPIES`: data set -> what lies at the addresses of its YAML file (an archive as a mapping of its members), what comes
by hand (place in the data folder -> content), and what the reader has to make of it.
"""

import base64
import gzip
import io
import json
import tarfile
import zipfile
from dataclasses import dataclass, field
from typing import Any

from PIL import Image


def jpg(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "jpeg")
    return buffer.getvalue()


JPG = jpg()
Members = dict[str, bytes]


@dataclass(frozen=True)
class Copy:
    """files: end of an address -> content, or members of the archive there. by_hand: place -> content.

    records: split -> what `told` says of each record.
    """

    records: dict[str, list[tuple[Any, ...]]]
    files: dict[str, bytes | Members] = field(default_factory=dict)
    by_hand: Members = field(default_factory=dict)


def told(record: Any, folder: str) -> tuple[Any, ...]:
    """(picture in the data folder, its text: label, captions, question or turns, answers)."""
    picture = record.images[0].removeprefix(f"{folder}/") if record.images else None
    if record.messages:
        return (picture, *[message.text for message in record.messages])
    if record.question is not None:
        return picture, record.question, record.answers
    if record.label is not None:
        return picture, record.label
    return picture, record.captions


def packed(address: str, content: bytes | Members) -> bytes:
    """An archive of the kind that the address names."""
    if isinstance(content, bytes):
        return content
    buffer = io.BytesIO()
    if address.endswith(".zip"):
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, data in content.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return gzip.compress(buffer.getvalue()) if address.endswith(".gz") else buffer.getvalue()


def as_json(content: Any) -> bytes:
    return json.dumps(content).encode()


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


def humans(*answers: str) -> list[dict[str, Any]]:
    return [{"answer_id": n, "answer_confidence": "yes", "answer": text} for n, text in enumerate(answers, 1)]


TEN = ("net",) * 7 + ("netting", "mesh", "net")


def vqa_files(prefix: str, questions: str, annotations: str, part: str, number: int) -> tuple[Members, Members]:
    """Questions and annotations of a part, in their archives."""
    question = {"image_id": number, "question": f"What is {part}?", "question_id": 10 * number}
    note = {
        "question_type": "what is",
        "multiple_choice_answer": "net",
        "answers": humans(*TEN),
        "image_id": number,
        "answer_type": "other",
        "question_id": 10 * number,
    }
    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": part}
    return (
        {f"{prefix}{questions}": as_json({**head, "questions": [question], "task_type": "Open-Ended"})},
        {f"{prefix}{annotations}": as_json({**head, "annotations": [note]})},
    )


VQA_TRAIN = vqa_files(
    "v2_", "OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json", "train2014", 9
)
VQA_VAL = vqa_files("v2_", "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json", "val2014", 42)
VQA_DEV, _ = vqa_files("v2_", "OpenEnded_mscoco_test-dev2015_questions.json", "", "test2015", 1)
VQA_TEST, _ = vqa_files("v2_", "OpenEnded_mscoco_test2015_questions.json", "", "test2015", 1)
OK_TRAIN = vqa_files(
    "", "OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json", "train2014", 9
)
OK_VAL = vqa_files("", "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json", "val2014", 42)
TRAIN_2014 = {"train2014/COCO_train2014_000000000009.jpg": JPG}
VAL_2014 = {"val2014/COCO_val2014_000000000042.jpg": JPG}
TRAIN_2017, VAL_2017, TEST_2017 = (
    {f"{part}/{number:012d}.jpg": JPG} for part, number in (("train2017", 9), ("val2017", 42), ("test2017", 1))
)
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


def talk(first: str, second: str, **more: Any) -> dict[str, Any]:
    return {**more, "conversations": [{"from": "human", "value": first}, {"from": "gpt", "value": second}]}


def table(rows: list[dict[str, Any]]) -> bytes:
    """A table of VLMEvalKit."""
    lines = ["\t".join(rows[0]), *("\t".join(str(value) for value in row.values()) for row in rows)]
    return ("\n".join(lines) + "\n").encode()


PICTURE = base64.b64encode(JPG).decode()


def mmbench(question: str, first: str, answer: str | None = "A") -> bytes:
    row = {"index": 241, "question": question, "hint": "", "A": first, "B": "x", "C": "y", "D": "z"}
    more = {} if answer is None else {"answer": answer}
    row |= {**more, "category": "identity_reasoning", "image": PICTURE, "source": "s", "l2-category": "attribute"}
    turned = {
        **row,
        "index": 1_000_241,
        "A": "x",
        "B": first,
        **({} if answer is None else {"answer": "B"}),
        "image": 241,
    }
    return table([row, turned])


def pope(word: str) -> bytes:
    rows = [
        {"question_id": n, "image": "COCO_val2014_000000000042.jpg", "text": f"Is there a {word}?", "label": label}
        for n, label in enumerate(("yes", "no"), 1)
    ]
    return "\n".join(map(json.dumps, rows)).encode()


def science(split: str, image: str | None) -> dict[str, Any]:
    return {
        "question": f"Which one, {split}?",
        "choices": ["Ohio", "Iowa"],
        "answer": 1,
        "hint": "",
        "image": image,
        "task": "closed choice",
        "grade": "grade2",
        "subject": "social science",
        "topic": "geography",
        "category": "Geography",
        "skill": "Read a map",
        "lecture": "",
        "solution": "",
        "split": split,
    }


SCIENCE = {
    str(n): science(split, image)
    for n, (split, image) in enumerate(
        [(split, image) for split in ("train", "val", "test") for image in ("image.png", None)], 1
    )
}


def science_pictures(split: str) -> Members:
    number = next(key for key, item in SCIENCE.items() if item["split"] == split and item["image"])
    return {f"{split}/{number}/image.png": JPG}


def science_records(split: str, with_text: bool) -> list[tuple[Any, ...]]:
    number = next(key for key, item in SCIENCE.items() if item["split"] == split and item["image"])
    both = [(f"scienceqa/images/{split}/{number}/image.png", f"Which one, {split}?", ("Iowa",))]
    return both + ([(None, f"Which one, {split}?", ("Iowa",))] if with_text else [])


def textvqa(split: str, answers: bool) -> bytes:
    item = {
        "question": "what brand?",
        "image_id": f"00{split}",
        "image_classes": ["Phone"],
        "image_width": 4,
        "image_height": 4,
        "question_tokens": ["what", "brand"],
        "question_id": 0,
        "set_name": split,
    }
    if answers:
        item["answers"] = ["nokia"] * 9 + ["noka"]
    return as_json({"dataset_type": split, "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": [item]})


def rosetta(split: str) -> bytes:
    return as_json({"data": [{"image_id": f"00{split}", "ocr_tokens": ["NOKIA"], "ocr_info": []}]})


NOKIA = ("nokia",) * 9 + ("noka",)


def gqa(key: str, answer: str | None) -> bytes:
    item: dict[str, Any] = {"question": "Is the sky dark?", "imageId": "2354786", "isBalanced": True}
    if answer:
        types = {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"}
        item |= {"answer": answer, "fullAnswer": "Yes.", "types": types, "semantic": [], "groups": {"global": None}}
    return as_json({key: item})


SKY = ("gqa/images/2354786.jpg", "Is the sky dark?", ("yes",))


def cifar(labels: bytes) -> bytes:
    return labels + bytes(3072)


def aokvqa(image: int, truth: bool) -> bytes:
    item = {"split": "x", "image_id": image, "question_id": "22Mex", "question": "What now?", "choices": ["a", "b"]}
    if truth:
        item |= {
            "correct_choice_idx": 1,
            "direct_answers": ["b"] * 10,
            "rationales": ["r"],
            "difficult_direct_answer": False,
        }
    return as_json([item])


def vizwiz(split: str, answers: bool) -> bytes:
    item: dict[str, Any] = {"image": f"VizWiz_{split}_00000000.jpg", "question": "What's this?"}
    if answers:
        told_by = [{"answer": "basil", "answer_confidence": "yes"}] * 10
        item |= {"answers": told_by, "answer_type": "other", "answerable": 1}
    return as_json([item])


def nocaps_info(domain: str | None) -> bytes:
    url = "https://s3.amazonaws.com/nocaps/val/0013ea2087020901.jpg"
    more = {"open_images_id": "0013ea2087020901", "coco_url": url, **({"domain": domain} if domain else {})}
    if domain:
        return official_captions((0, "0013ea2087020901.jpg", ["A baby."] * 10), **more)
    return as_json({"info": {}, "images": [{"id": 0, "file_name": "0013ea2087020901.jpg", **more}]})


SHAPES = "coco/train2017/000000000009.jpg"
MIX = [
    ("coco", SHAPES),
    ("gqa", "gqa/images/2354786.jpg"),
    ("ocr", "ocr_vqa/images/140031996.jpg"),
    ("text", "textvqa/train_images/00train.jpg"),
    ("vg", "vg/VG_100K_2/1.jpg"),
]
REGION = {"region_id": 1382, "width": 82, "height": 139, "y": 57, "x": 421}

COPIES: dict[str, Copy] = {
    "aokvqa": Copy(
        files={
            "aokvqa_v1p0.tar.gz": {
                "./aokvqa_v1p0_train.json": aokvqa(9, True),
                "./aokvqa_v1p0_val.json": aokvqa(42, True),
                "./aokvqa_v1p0_test.json": aokvqa(1, False),
                "./large_vocab_train.csv": b"",
            },
            "train2017.zip": TRAIN_2017,
            "val2017.zip": VAL_2017,
            "test2017.zip": TEST_2017,
        },
        records={
            "train": [("coco/train2017/000000000009.jpg", "What now?", ("b",) * 10)],
            "val": [("coco/val2017/000000000042.jpg", "What now?", ("b",) * 10)],
            "test": [("coco/test2017/000000000001.jpg", "What now?", ())],
        },
    ),
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
    "cifar10": Copy(
        files={
            "cifar-10-binary.tar.gz": {
                **{f"cifar-10-batches-bin/data_batch_{n}.bin": cifar(bytes([n])) for n in range(1, 6)},
                "cifar-10-batches-bin/test_batch.bin": cifar(b"\x09"),
                "cifar-10-batches-bin/batches.meta.txt": b"\n".join(
                    [
                        b"airplane",
                        b"automobile",
                        b"bird",
                        b"cat",
                        b"deer",
                        b"dog",
                        b"frog",
                        b"horse",
                        b"ship",
                        b"truck",
                        b"",
                    ]
                ),
                "cifar-10-batches-bin/readme.html": b"",
            }
        },
        records={
            "train": [(None, name) for name in ("automobile", "bird", "cat", "deer", "dog")],
            "test": [(None, "truck")],
        },
    ),
    "cifar100": Copy(
        files={
            "cifar-100-binary.tar.gz": {
                "cifar-100-binary/train.bin": cifar(b"\x01\x02") + cifar(b"\x01\x00"),
                "cifar-100-binary/test.bin": cifar(b"\x00\x01"),
                "cifar-100-binary/fine_label_names.txt": b"\n".join(b"class_%d" % n for n in range(100)) + b"\n",
                "cifar-100-binary/coarse_label_names.txt": b"fish\npeople\n",
            }
        },
        records={"train": [(None, "class_2"), (None, "class_0")], "test": [(None, "class_1")]},
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
    "gqa": Copy(
        files={
            "questions1.2.zip": {
                "train_balanced_questions.json": gqa("02930152", "yes"),
                "val_balanced_questions.json": gqa("05451384", "yes"),
                "testdev_balanced_questions.json": gqa("201307251", "yes"),
                "test_balanced_questions.json": gqa("201973434", None),
                "train_all_questions/train_all_questions_0.json": b"{}",
                "readme.txt": b"",
            },
            "gqa/images.zip": {"images/2354786.jpg": JPG},
        },
        records={"train": [SKY], "val": [SKY], "testdev": [SKY], "test": [(*SKY[:2], ())]},
    ),
    "imagenet": Copy(
        by_hand={
            "imagenet/train/n01440764/n01440764_10026.JPEG": JPG,
            "imagenet/val/n01440764/ILSVRC2012_val_00000293.JPEG": JPG,
            "imagenet/val/n01443537/ILSVRC2012_val_00000236.JPEG": JPG,
        },
        records={
            "train": [("imagenet/train/n01440764/n01440764_10026.JPEG", "n01440764")],
            "val": [
                ("imagenet/val/n01440764/ILSVRC2012_val_00000293.JPEG", "n01440764"),
                ("imagenet/val/n01443537/ILSVRC2012_val_00000236.JPEG", "n01443537"),
            ],
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
    "llava_instruct_150k": Copy(
        files={
            "llava_instruct_150k.json": as_json(
                [talk("<image>\nWhat colors?", "Red.", id="000000000009", image="000000000009.jpg")]
            ),
            "train2017.zip": TRAIN_2017,
        },
        records={"train": [(SHAPES, "<image>\nWhat colors?", "Red.")]},
    ),
    "llava_mix_665k": Copy(
        files={
            "llava_v1_5_mix665k.json": as_json(
                [
                    *(talk("<image>\nWhat?", name, id=name, image=place) for name, place in MIX),
                    talk("How are you?", "Well.", id="wgByO4Y_0", model=""),
                ]
            ),
            "train2017.zip": TRAIN_2017,
            "gqa/images.zip": {"images/2354786.jpg": JPG},
            "train_val_images.zip": {"train_images/00train.jpg": JPG},
            "VG_100K_2/images.zip": {"VG_100K/2.jpg": JPG},
            "images2.zip": {"VG_100K_2/1.jpg": JPG},
        },
        by_hand={"ocr_vqa/images/140031996.jpg": JPG},
        records={"train": [*((place, "<image>\nWhat?", name) for name, place in MIX), (None, "How are you?", "Well.")]},
    ),
    "llava_pretrain": Copy(
        files={
            "blip_laion_cc_sbu_558k.json": as_json(
                [talk("Sum up the photo.\n<image>", "a mattress", id="004539375", image="00453/004539375.jpg")]
            ),
            "images.zip": {"00453/004539375.jpg": JPG},
        },
        records={"train": [("llava_pretrain/images/00453/004539375.jpg", "Sum up the photo.\n<image>", "a mattress")]},
    ),
    "mmbench": Copy(
        files={
            "MMBench_DEV_EN.tsv": mmbench("Which?", "A dog"),
            "MMBench_TEST_EN.tsv": mmbench("Which?", "A dog", None),
            "MMBench_DEV_CN.tsv": mmbench("图中是什么?", "狗"),
            "MMBench_TEST_CN.tsv": mmbench("图中是什么?", "狗", None),
        },
        records={
            "dev": [(None, "Which?", ("A dog",))] * 2,
            "test": [(None, "Which?", ())] * 2,
            "dev-cn": [(None, "图中是什么?", ("狗",))] * 2,
            "test-cn": [(None, "图中是什么?", ())] * 2,
        },
    ),
    "mme": Copy(
        files={
            "MME.tsv": table(
                [
                    {"index": n, "image": PICTURE, "question": "Is it?", "answer": answer, "category": "color"}
                    for n, answer in enumerate(("Yes", "No"))
                ]
            )
        },
        records={"test": [(None, "Is it?", ("Yes",)), (None, "Is it?", ("No",))]},
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
    "ocr_vqa": Copy(
        by_hand={
            "ocr_vqa/dataset.json": as_json(
                {
                    str(split): {
                        "imageURL": f"http://ecx.images-amazon.com/images/I/{split}.jpg",
                        "title": "Mom's Plan",
                        "split": split,
                        "questions": ["Who wrote this?"],
                        "answers": ["Sandra"],
                    }
                    for split in (1, 2, 3)
                }
            ),
            **{f"ocr_vqa/images/{split}.jpg": JPG for split in (1, 2, 3)},
        },
        records={
            split: [(f"ocr_vqa/images/{number}.jpg", "Who wrote this?", ("Sandra",))]
            for number, split in enumerate(("train", "val", "test"), 1)
        },
    ),
    "okvqa": Copy(
        files={
            "data/OpenEnded_mscoco_train2014_questions.json.zip": OK_TRAIN[0],
            "data/mscoco_train2014_annotations.json.zip": OK_TRAIN[1],
            "data/OpenEnded_mscoco_val2014_questions.json.zip": OK_VAL[0],
            "data/mscoco_val2014_annotations.json.zip": OK_VAL[1],
            "train2014.zip": TRAIN_2014,
            "val2014.zip": VAL_2014,
        },
        records={
            "train": [("coco/train2014/COCO_train2014_000000000009.jpg", "What is train2014?", TEN)],
            "val": [("coco/val2014/COCO_val2014_000000000042.jpg", "What is val2014?", TEN)],
        },
    ),
    "pope": Copy(
        files={
            **{f"coco_pope_{kind}.json": pope(kind) for kind in ("random", "popular", "adversarial")},
            "val2014.zip": VAL_2014,
        },
        records={
            split: [
                ("coco/val2014/COCO_val2014_000000000042.jpg", f"Is there a {kind}?", (label,))
                for kind in kinds
                for label in ("yes", "no")
            ]
            for split, kinds in {
                "test": ("random", "popular", "adversarial"),
                **{kind: (kind,) for kind in ("random", "popular", "adversarial")},
            }.items()
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
    "scienceqa": Copy(
        files={
            "problems.json": as_json(SCIENCE),
            **{f"images/{split}.zip": science_pictures(split) for split in ("train", "val", "test")},
        },
        records={
            f"{split}{end}": science_records(split, with_text=not end)
            for split in ("train", "val", "test")
            for end in ("", "-images")
        },
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
    "textvqa": Copy(
        files={
            **{f"TextVQA_0.5.1_{split}.json": textvqa(split, split != "test") for split in ("train", "val", "test")},
            **{f"TextVQA_Rosetta_OCR_v0.2_{split}.json": rosetta(split) for split in ("train", "val", "test")},
            "train_val_images.zip": {f"train_images/00{split}.jpg": JPG for split in ("train", "val")},
            "test_images.zip": {"test_images/00test.jpg": JPG},
        },
        records={
            "train": [("textvqa/train_images/00train.jpg", "what brand?", NOKIA)],
            "val": [("textvqa/train_images/00val.jpg", "what brand?", NOKIA)],
            "test": [("textvqa/test_images/00test.jpg", "what brand?", ())],
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
    "vizwiz": Copy(
        files={
            "Annotations.zip": {f"{split}.json": vizwiz(split, split != "test") for split in ("train", "val", "test")},
            **{
                f"images/{split}.zip": {f"{split}/VizWiz_{split}_00000000.jpg": JPG}
                for split in ("train", "val", "test")
            },
        },
        records={
            split: [
                (
                    f"vizwiz/{split}/VizWiz_{split}_00000000.jpg",
                    "What's this?",
                    ("basil",) * 10 if split != "test" else (),
                )
            ]
            for split in ("train", "val", "test")
        },
    ),
    "vqav2": Copy(
        files={
            "v2_Questions_Train_mscoco.zip": VQA_TRAIN[0],
            "v2_Annotations_Train_mscoco.zip": VQA_TRAIN[1],
            "v2_Questions_Val_mscoco.zip": VQA_VAL[0],
            "v2_Annotations_Val_mscoco.zip": VQA_VAL[1],
            "v2_Questions_Test_mscoco.zip": VQA_TEST | VQA_DEV,
            "train2014.zip": TRAIN_2014,
            "val2014.zip": VAL_2014,
            "test2015.zip": {"test2015/COCO_test2015_000000000001.jpg": JPG},
        },
        records={
            "train": [("coco/train2014/COCO_train2014_000000000009.jpg", "What is train2014?", TEN)],
            "val": [("coco/val2014/COCO_val2014_000000000042.jpg", "What is val2014?", TEN)],
            "test": [("coco/test2015/COCO_test2015_000000000001.jpg", "What is test2015?", ())],
            "test-dev": [("coco/test2015/COCO_test2015_000000000001.jpg", "What is test2015?", ())],
        },
    ),
}
