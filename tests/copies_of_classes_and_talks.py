"""Miniature copies of the published data sets of classes and of conversations."""

from typing import Any

from published_files import JPG, TRAIN_2017, Copy, as_json


def talk(first: str, second: str, **more: Any) -> dict[str, Any]:
    return {**more, "conversations": [{"from": "human", "value": first}, {"from": "gpt", "value": second}]}


def cifar(labels: bytes) -> bytes:
    return labels + bytes(3072)


SHAPES = "coco/train2017/000000000009.jpg"

MIX = [
    ("coco", SHAPES),
    ("gqa", "gqa/images/2354786.jpg"),
    ("ocr", "ocr_vqa/images/140031996.jpg"),
    ("text", "textvqa/train_images/00train.jpg"),
    ("vg", "vg/VG_100K_2/1.jpg"),
]

CLASSES_AND_TALKS: dict[str, Copy] = {
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
}
