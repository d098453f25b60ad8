"""Published CLIP, SigLIP and SigLIP 2: the same embeddings as in their own libraries, every key accounted for."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dual_encoder_parts import HF_KINDS, OPEN_CLIP, TEXTS, hf_embeddings, published_name, tiny_hf_dual, tiny_open_clip
from PIL import Image

from vlm import VlmError, load_model
from vlm.model_spec import DualEncoderSpec
from vlm.models.build import build_model, load_model_folder, save_model_folder
from vlm.models.published_dual_encoder import published_spec

LONG = "a photo of a red cat and a blue chair, " * 20


def pictures(count: int = 3) -> list[Image.Image]:
    """Random pictures of unequal shapes."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40 + 9 * i, 71, 3), dtype=np.uint8)) for i in range(count)]


def close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", HF_KINDS)
def test_embeddings_and_logits_are_those_of_transformers(tiny_folder: Any, kind: str) -> None:
    model = load_model(published_name(tiny_folder, kind))
    texts = [*TEXTS, LONG]
    lower = [text.lower() for text in texts] if kind == "siglip2" else texts
    images, words, logits = hf_embeddings(tiny_folder(tiny_hf_dual, kind), pictures(), lower)
    close(model.encode_image(pictures()), images)
    close(model.encode_text(texts), words)
    torch.testing.assert_close(
        model.bridge.logits(model.encode_image(pictures()), model.encode_text(texts)), logits, atol=1e-4, rtol=1e-5
    )
    assert images.std(0).max() > 0.01  # not all alike
    assert words.std(0).max() > 0.01


@pytest.mark.parametrize("kind", OPEN_CLIP)
def test_embeddings_and_logits_are_those_of_open_clip(tiny_folder: Any, kind: str) -> None:
    import open_clip

    model = load_model(published_name(tiny_folder, kind))
    checkpoint = str(tiny_folder(tiny_open_clip, kind) / "open_clip.pt")
    theirs, _, transform = open_clip.create_model_and_transforms(kind, pretrained=checkpoint)
    theirs.eval()
    texts = [*TEXTS, LONG]
    with torch.no_grad():
        images = theirs.encode_image(torch.stack([transform(image) for image in pictures()]), normalize=True)
        words = theirs.encode_text(open_clip.get_tokenizer(kind)(texts), normalize=True)
        logits = theirs.logit_scale.exp() * images @ words.T
        logits = logits + theirs.logit_bias if theirs.logit_bias is not None else logits
    close(model.encode_image(pictures()), images)
    close(model.encode_text(texts), words)
    torch.testing.assert_close(
        model.bridge.logits(model.encode_image(pictures()), model.encode_text(texts)), logits, atol=1e-4, rtol=1e-5
    )
    assert images.std(0).max() > 0.01  # not all alike
    assert words.std(0).max() > 0.01


def test_siglip2_text_is_read_in_lower_case(tiny_folder: Any) -> None:
    model = load_model(published_name(tiny_folder, "siglip2"))
    _, kept, _ = hf_embeddings(tiny_folder(tiny_hf_dual, "siglip2"), pictures(1), TEXTS)
    close(model.encode_text([text.upper() for text in TEXTS]), model.encode_text(TEXTS))
    assert not torch.allclose(model.encode_text(TEXTS)[1], kept[1], atol=1e-3)  # the tokeniser alone keeps the case


@pytest.mark.parametrize("kind", [*HF_KINDS, *OPEN_CLIP])
def test_a_text_beyond_the_context_is_cut_and_keeps_its_end_token(tiny_folder: Any, kind: str) -> None:
    encoder = load_model(published_name(tiny_folder, kind)).text_encoder
    ids = encoder.tokenize([LONG])["ids"]
    short = encoder.tokenize(["cat"])
    end = short["ids"][0, short["mask"][0].nonzero()[-1, 0]] if "siglip" not in kind else _end_of(short["ids"][0])
    assert ids.shape == (1, encoder.context_length)
    assert ids[0, -1] == end


def _end_of(ids: torch.Tensor) -> torch.Tensor:
    """The last token in front of padding; SigLIP pads with the end token itself or with zeros behind it."""
    return ids[-1] if ids[-1] != 0 else ids[ids.nonzero()[-1, 0]]


@pytest.mark.parametrize("layout", ["one file", "shards", "pickle", "with position ids"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_every_layout_of_the_hub_is_read(tiny_folder: Any, tmp_path: Path, kind: str, layout: str) -> None:
    import transformers
    from safetensors.torch import load_file, save_file

    source = tiny_folder(tiny_hf_dual, kind)
    folder = Path(shutil.copytree(source, tmp_path / "copy"))
    state = load_file(folder / "model.safetensors")
    assert {key.split(".")[0] for key in state} >= {"text_model", "vision_model", "logit_scale"}  # as on the hub
    if layout == "shards":
        (folder / "model.safetensors").unlink()
        transformers.AutoModel.from_pretrained(source).save_pretrained(folder, max_shard_size="40kB")
        assert len(list(folder.glob("*.safetensors"))) > 1
    elif layout == "pickle":
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
    elif layout == "with position ids":
        state["text_model.embeddings.position_ids"] = torch.arange(16)[None]
        state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model, expected = load_model(folder), load_model(source)
    assert torch.equal(model.encode_text(TEXTS), expected.encode_text(TEXTS))
    assert torch.equal(model.bridge.logit_scale, expected.bridge.logit_scale)


@pytest.mark.parametrize(
    ("kind", "key", "message"),
    [
        ("clip", "logit_scale", "lacks the key logit_scale"),
        ("siglip", "logit_bias", "lacks the key logit_bias"),
        ("clip", "visual_projection.weight", "lacks the key visual_projection.weight"),
        ("clip", "text_projection.weight", r"1 missing: text_projection\.weight"),
        ("siglip", "text_model.head.bias", r"1 missing: .*head\.bias"),
        ("siglip", "vision_model.head.probe", r"probe"),
        ("clip", "vision_model.encoder.layers.0.mlp.fc1.weight", r"1 missing: .*layers\.0\.mlp\.fc1\.weight"),
    ],
)
def test_a_missing_key_is_named(tiny_folder: Any, tmp_path: Path, kind: str, key: str, message: str) -> None:
    folder = _edited(tiny_folder(tiny_hf_dual, kind), tmp_path, lambda state: state.pop(key))
    with pytest.raises(VlmError, match=message):
        load_model(folder)


@pytest.mark.parametrize("key", ["surplus", "text_model.extra.weight", "vision_model.extra.weight"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_left_over_key_is_named(tiny_folder: Any, tmp_path: Path, kind: str, key: str) -> None:
    folder = _edited(tiny_folder(tiny_hf_dual, kind), tmp_path, lambda state: state.update({key: torch.zeros(2)}))
    ending = key.removeprefix("text_model.").removeprefix("vision_model.")  # transformers 5 names it without its tower
    with pytest.raises(VlmError, match=f"1 left over: .*{re.escape(ending)}"):
        load_model(folder)


def test_a_key_of_another_shape_is_named(tiny_folder: Any, tmp_path: Path) -> None:
    key = "text_projection.weight"
    folder = _edited(tiny_folder(tiny_hf_dual, "clip"), tmp_path, lambda state: state.update({key: torch.zeros(8, 32)}))
    with pytest.raises(VlmError, match=f"of another shape: {key}"):
        load_model(folder)


def _edited(source: Path, place: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(source, place / "copy"))
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("text_projection"), "Missing key.*text_projection|text_projection"),
        (lambda state: state.update(surplus=torch.zeros(1)), "Unexpected key.*surplus"),
        (lambda state: state.update({"visual.proj": torch.zeros(2, 2)}), "size mismatch for visual.proj"),
    ],
)
def test_keys_of_open_clip_are_accounted_for(
    tiny_folder: Any, tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    state = torch.load(tiny_folder(tiny_open_clip, "vlm-test-vit") / "open_clip.pt", weights_only=True)
    change(state)
    torch.save(state, tmp_path / "edited.pt")
    with pytest.raises(VlmError, match=message) as error:
        load_model(f"open_clip:vlm-test-vit/{tmp_path / 'edited.pt'}")
    assert "\n" not in str(error.value)


def test_weights_of_clip_are_not_taken_for_siglip(tiny_folder: Any, tmp_path: Path) -> None:
    state = torch.load(tiny_folder(tiny_open_clip, "vlm-test-siglip") / "open_clip.pt", weights_only=True)
    del state["logit_bias"]
    torch.save(state, tmp_path / "edited.pt")
    with pytest.raises(VlmError, match="lack the key logit_bias"):
        load_model(f"open_clip:vlm-test-siglip/{tmp_path / 'edited.pt'}")


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 torn"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_torn_file_is_one_line(tiny_folder: Any, tmp_path: Path, content: bytes, suffix: str) -> None:
    tiny_folder(tiny_open_clip, "vlm-test-vit")  # makes the architecture known
    file = tmp_path / f"torn{suffix}"
    file.write_bytes(content)
    with pytest.raises(VlmError, match=r"^open_clip:vlm-test-vit/") as error:
        load_model(f"open_clip:vlm-test-vit/{file}")
    assert "\n" not in str(error.value)


def test_a_pickle_that_would_run_code_is_refused(tiny_folder: Any, tmp_path: Path) -> None:
    tiny_folder(tiny_open_clip, "vlm-test-vit")
    proof = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (proof,))

    torch.save({"state_dict": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(VlmError):
        load_model(f"open_clip:vlm-test-vit/{tmp_path / 'trap.pt'}")
    assert not proof.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:ViT-B-31/openai", "did you mean 'ViT-B-32'"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79", "did you mean 'laion2b_s34b_b79k'"),
        ("open_clip:ViT-B-32", "names no weights; give open_clip:ViT-B-32/TAG"),
        ("open_clip:ViT-B-32-quickgelu/laion2b_s34b_b79k", "no weights 'laion2b_s34b_b79k' for ViT-B-32-quickgelu"),
    ],
)
def test_an_unknown_name_shows_the_nearest(name: str, message: str) -> None:
    with pytest.raises(VlmError, match=message):
        load_model(name)


def test_siglip2_of_any_resolution_is_told_to_be_unknown(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "siglip2"}')
    with pytest.raises(VlmError, match="model_type 'siglip2'; did you mean 'siglip'"):
        load_model(tmp_path)


@pytest.fixture
def tag(tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Publish the tiny ViT under a tag of open_clip's, with what its table says of a tag."""
    from open_clip import pretrained

    folder = tiny_folder(tiny_open_clip, "vlm-test-vit")

    def publish(name: str, **facts: Any) -> str:
        known = pretrained._pcfg(**facts) | {"file": str(folder / "open_clip.pt")}
        tags = pretrained._PRETRAINED.get("vlm-test-vit", {})
        monkeypatch.setitem(pretrained._PRETRAINED, "vlm-test-vit", {**tags, name: known})
        return f"open_clip:vlm-test-vit/{name}"

    return publish


def test_a_tag_decides_on_quickgelu(tag: Callable[..., str], tiny_folder: Any) -> None:
    plain, quick = load_model(tag("plain")), load_model(tag("quick", quick_gelu=True))
    assert quick.spec.image_encoder.name.endswith("/quick")
    same = load_model(published_name(tiny_folder, "vlm-test-vit-quickgelu"))  # the same weights by construction
    assert torch.equal(quick.encode_image(pictures()), same.encode_image(pictures()))
    assert torch.equal(quick.encode_text(TEXTS), same.encode_text(TEXTS))
    assert not torch.allclose(quick.encode_image(pictures()), plain.encode_image(pictures()), atol=1e-3)
    assert not torch.allclose(quick.encode_text(TEXTS), plain.encode_text(TEXTS), atol=1e-3)


def test_a_tag_decides_on_the_transform_and_a_file_takes_the_usual_one(tag: Callable[..., str]) -> None:
    half = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "resize_mode": "squash", "interpolation": "bilinear"}
    special = load_model(tag("special", **half)).image_encoder.transform
    assert (special.mean, special.std, special.resize, special.interpolation) == (
        (0.5, 0.5, 0.5),
        (0.5, 0.5, 0.5),
        "square",
        "bilinear",
    )
    name = tag("a", mean=(0.4, 0.4, 0.4))
    file = load_model(name).image_encoder.transform
    assert file.mean == (0.4, 0.4, 0.4)
    from open_clip import pretrained

    weights = pretrained._PRETRAINED["vlm-test-vit"]["a"]["file"]
    tag("b", mean=(0.4, 0.4, 0.4))  # two of three have it now
    assert load_model(f"open_clip:vlm-test-vit/{weights}").image_encoder.transform.mean == (0.4, 0.4, 0.4)


def test_weights_without_quickgelu_are_not_forced_into_it(tag: Callable[..., str], tiny_folder: Any) -> None:
    from open_clip import pretrained

    tiny_folder(tiny_open_clip, "vlm-test-vit-quickgelu")
    tag("plain")
    pretrained._PRETRAINED["vlm-test-vit-quickgelu"] = pretrained._PRETRAINED["vlm-test-vit"]
    try:
        with pytest.raises(VlmError, match="trained without QuickGELU; use open_clip:vlm-test-vit/plain"):
            load_model("open_clip:vlm-test-vit-quickgelu/plain")
    finally:
        del pretrained._PRETRAINED["vlm-test-vit-quickgelu"]


@pytest.mark.parametrize("kind", ["clip", "siglip", "vlm-test-resnet", "vlm-test-siglip-map"])
def test_a_published_model_can_be_trained_on_and_kept_in_a_folder(tiny_folder: Any, tmp_path: Path, kind: str) -> None:
    name = published_name(tiny_folder, kind)
    spec = published_spec(name if name.startswith("open_clip:") else f"hf:{name}")
    assert DualEncoderSpec.model_validate_json(spec.model_dump_json()) == spec
    patterns = ["text_encoder.*", "bridge.*"]
    model = build_model(spec, patterns, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    save_model_folder(model, patterns, tmp_path / "model")
    again = load_model_folder(tmp_path / "model", device="cpu", precision="fp32")
    close(again.encode_text(TEXTS), model.eval().encode_text(TEXTS))
    assert not torch.allclose(again.encode_text(TEXTS), load_model(name).encode_text(TEXTS), atol=1e-4)
    assert again.bridge.logit_scale.item() == pytest.approx(3.01)
    assert torch.equal(again.encode_image(pictures()), load_model(name).encode_image(pictures()))


def test_precision_is_that_of_frozen_weights_while_the_scale_stays_exact(tiny_folder: Any) -> None:
    model = load_model(published_name(tiny_folder, "siglip"), dtype="bf16")
    assert {p.dtype for p in model.image_encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.text_encoder.parameters()} == {torch.bfloat16}
    assert model.bridge.logit_scale.dtype == torch.float32
    exact = load_model(published_name(tiny_folder, "siglip"))
    similarity = (model.encode_image(pictures()) * exact.encode_image(pictures())).sum(-1)
    assert model.encode_image(pictures()).dtype == torch.float32
    assert similarity.min() > 0.99


def test_published_logits_need_one_published_model_with_such_logits(tiny_folder: Any) -> None:
    clip, siglip = (f"hf:{published_name(tiny_folder, kind)}" for kind in ("clip", "siglip"))
    linear = {"logit_scale": "published"}
    spec = published_spec(clip).model_dump(mode="json")
    mixed = DualEncoderSpec.model_validate({**spec, "text_encoder": siglip, "bridge": linear})
    with pytest.raises(VlmError, match="both encoders must come from one published dual encoder"):
        build_model(mixed)
    spec = published_spec(siglip).model_dump(mode="json")
    wrong = DualEncoderSpec.model_validate({**spec, "bridge": {**spec["bridge"], "logits": "softmax"}})
    with pytest.raises(VlmError, match=r"bridge\.logits: softmax: the published model has sigmoid logits"):
        build_model(wrong)


def test_weights_that_cannot_be_fetched_are_one_line_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(VlmError, match=r"^open_clip:ViT-B-32/laion2b_e16: Failed to download") as error:
        load_model("open_clip:ViT-B-32/laion2b_e16")
    assert "\n" not in str(error.value)
    assert caplog.records == []
