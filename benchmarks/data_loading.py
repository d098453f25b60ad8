"""Pictures from JPEG files to pixels an encoder reads, against plain PIL and torchvision; the pixels are the same.

Ours is what training and the feature cache do: upright RGB by `load_image`, the encoder's evaluation transform, in
threads. Theirs is a loop of the same transform as torchvision writes it. Files are 500 x 375 pixels, as ImageNet's are.
"""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from harness import Case, Step, main
from PIL import Image
from torchvision import transforms

from vlm.data.feature_cache import READERS
from vlm.data.images import load_image
from vlm.data.transforms import ImageTransform

PICTURES = 200
_folder = tempfile.TemporaryDirectory()


@cache
def files() -> list[str]:
    """JPEG files with shapes and noise, so that they take as long to decode as photographs of their size."""
    random = np.random.default_rng(0)
    paths = []
    for number in range(PICTURES):
        coarse = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = (picture + random.integers(-12, 13, picture.shape)).clip(0, 255).astype(np.uint8)
        paths.append(os.path.join(_folder.name, f"{number}.jpg"))
        Image.fromarray(noisy).save(paths[-1], quality=90)
    return paths


def ours() -> Step:
    """All pictures through the threads of the feature cache."""
    transform, paths = ImageTransform(), files()

    def run() -> torch.Tensor:
        with ThreadPoolExecutor(READERS) as pool:
            return torch.stack(list(pool.map(lambda path: transform.eval(load_image(path)), paths)))

    return run


def theirs() -> Step:
    """All pictures, one after the other."""
    like, paths = ImageTransform(), files()
    transform = transforms.Compose(
        [
            transforms.Resize(like.size[0], transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(like.size),
            transforms.ToTensor(),
            transforms.Normalize(like.mean, like.std),
        ]
    )
    return lambda: torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    """The pixels are equal bit by bit."""
    assert torch.equal(one, other), "the pixels differ"


if __name__ == "__main__":
    case = Case(ours, theirs, "PIL and torchvision", PICTURES, "pictures", 5, speed_target=1.5, check=same)
    main({"JPEG 500 x 375 to 224": case}, ["torchvision", "pillow"])
