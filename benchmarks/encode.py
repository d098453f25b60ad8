"""Features of a frozen image encoder from JPEG files: decode, transform, encode, against plain eager use of timm.

Ours fills the feature cache, hashing and writing included. Theirs is timm's model in eval mode with timm's own
transform, in batches of 64, pictures one after the other.
"""

import itertools
import os
import tempfile
from functools import cache
from typing import Any

import timm
import torch
from data_loading import files
from harness import Case, Step, main
from PIL import Image

from vlm.backbones.image import build_image_encoder
from vlm.backbones.image_encoder import ImageEncoder
from vlm.data.feature_cache import cache_features, frozen_features
from vlm.model_spec import ImageEncoderSpec

BATCH = 64
_folder = tempfile.TemporaryDirectory()
_turns = itertools.count()


@cache
def encoder(name: str) -> ImageEncoder:
    """Our encoder: the starter's weights, or random ones of a timm architecture."""
    if name.startswith("starter:"):
        return build_image_encoder(ImageEncoderSpec(name=name))
    folder = os.path.join(_folder.name, name)
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False)
    timm.models.save_for_hf(model, folder, model_config=model.pretrained_cfg)
    return build_image_encoder(ImageEncoderSpec(name=f"timm:{folder}"))


def ours(name: str, pictures: int) -> Step:
    """Fill an empty feature cache with the pooled features; returns them."""
    features = frozen_features(encoder(name), "pooled", lambda found: _pooled(found))
    assert features is not None
    paths = files()[:pictures]

    def run() -> torch.Tensor:
        os.environ["VLM_CACHE"] = os.path.join(_folder.name, f"turn-{next(_turns)}")
        vars(features).pop("folder", None)  # where they are kept is remembered
        cache = cache_features(features, paths, batch_size=BATCH)
        return torch.stack([cache(path) for path in paths])

    return run


def _pooled(found: Any) -> torch.Tensor:
    return found.pooled


def theirs(name: str, pictures: int) -> Step:
    """timm's model as its documentation shows it."""
    model: Any = encoder(name).tower.model
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    plain = timm.create_model("tf_efficientnet_lite0" if name.startswith("starter:") else name, num_classes=0).eval()
    plain.load_state_dict(model.state_dict())
    paths = files()[:pictures]

    @torch.inference_mode()
    def run() -> torch.Tensor:
        rows = []
        for start in range(0, len(paths), BATCH):
            batch = [transform(Image.open(path).convert("RGB")) for path in paths[start : start + BATCH]]
            rows.append(plain(torch.stack(batch)))
        return torch.cat(rows)

    return run


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    """Features agree to single precision."""
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def case(name: str, pictures: int, target: float) -> Case:
    """Both sides over so many pictures."""
    return Case(
        ours=lambda: ours(name, pictures),
        theirs=lambda: theirs(name, pictures),
        peer="timm, eager",
        amount=pictures,
        unit="pictures",
        repeats=3,
        speed_target=target,
        check=same,
    )


if __name__ == "__main__":
    main(
        {
            "EfficientNet-Lite0": case("starter:efficientnet_lite0", 192, 1.3),
            "ViT-S/16": case("vit_small_patch16_224", 128, 1.0),
        },
        ["timm", "torchvision"],
    )
