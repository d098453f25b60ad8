"""What is exported loads in transformers and answers the same there."""

import pytest
import torch
from generative_parts import generative_model, generative_spec, pictures
from PIL import Image
from tiny_models import tiny_hf_image_model, tiny_timm_image_model
from typer.testing import CliRunner

from vlm import VlmError, load_model
from vlm.cli.main import app
from vlm.models.build import build_model, save_model_folder
from vlm.models.export_llava import export_llava


def _llava(folder):
    from llava_parts import tiny_llava

    return tiny_llava(folder)


QUESTIONS = ["what color is the shape?", "is it red?", "what"]
SPEC = {"bridge": {"type": "mlp", "match_embeddings": False}}


def _run(tiny_folder, folder, kind="llama", image="clip", **options):
    """A run folder of a tiny LLaVA with LoRA that does something."""
    encoder = {"name": f"hf:{tiny_folder(tiny_hf_image_model, image)}", "layer": -2, **options.pop("encoder", {})}
    options.setdefault("language", {"lora": {"rank": 2, "alpha": 8}})
    spec = generative_spec(tiny_folder, kind, image_encoder=encoder, **SPEC, **options)
    trainable = ["bridge.*"] + (["language_model.lora.*"] if spec.language_model.lora else [])
    model = build_model(spec, trainable, device="cpu", precision="fp32")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    save_model_folder(model, trainable, folder)
    return folder


def _their_answers(folder, images):
    """Through transformers alone: processor, chat template, generate."""
    import transformers as t

    model, info = t.LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    processor = t.AutoProcessor.from_pretrained(folder)
    answers = []
    for image, question in zip(images, QUESTIONS):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        bos = processor.tokenizer.bos_token
        inputs = processor(
            images=Image.open(image), text=prompt, return_tensors="pt", add_special_tokens=not prompt.startswith(bos)
        )
        ids = model.eval().generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs.input_ids.shape[1] :]
        answers.append(processor.decode(ids, skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize(
    ("kind", "image", "template", "resize"),
    [
        ("llama", "clip", "vicuna_v1", "pad"),
        ("llama", "clip", "compact", None),
        ("qwen2", "clip", "chatml", "square"),
        ("llama", "siglip", "llama_2", None),
        ("qwen2", "siglip", "tokenizer", None),
    ],
)
def test_an_export_answers_as_the_run_in_both_libraries(tiny_folder, tmp_path, kind, image, template, resize):
    run = _run(tiny_folder, tmp_path / "run", kind, image, template=template, encoder={"resize": resize})
    done = CliRunner().invoke(app, ["export", str(run), "--merge", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    images = pictures(tmp_path, 3)
    ours = load_model(run, "cpu", "fp32")
    said = ours.answer(images, QUESTIONS, max_new_tokens=6)
    assert len(set(said)) > 1
    assert _their_answers(tmp_path / "out", images) == said
    again = load_model(tmp_path / "out", "cpu", "fp32")
    assert again.answer(images, QUESTIONS, max_new_tokens=6) == said
    assert again.spec.template == template


def test_pictures_that_are_no_squares_become_the_same_pixels(tiny_folder, tmp_path):
    import transformers as t

    (picture,) = pictures(tmp_path, 1)
    Image.open(picture).resize((75, 40)).save(picture)
    for resize in ("pad", "shortest", "square"):
        run = _run(tiny_folder, tmp_path / f"run-{resize}", encoder={"resize": resize})
        model = load_model(run, "cpu", "fp32")
        export_llava(model, tmp_path / resize, merge=True)
        theirs = t.AutoImageProcessor.from_pretrained(tmp_path / resize, use_fast=False, backend="pil")
        pixels = theirs(Image.open(picture), return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(model._pixels([picture])[0], pixels, rtol=0, atol=0.02)


def test_a_trained_tower_is_exported(tiny_folder, tmp_path):
    import transformers as t

    encoder = {"name": f"hf:{tiny_folder(tiny_hf_image_model, 'clip')}", "layer": -2}
    spec = generative_spec(tiny_folder, "llama", image_encoder=encoder, **SPEC)
    model = build_model(spec, ["bridge.*", "image_encoder.*"], device="cpu", precision="fp32")
    with torch.no_grad():
        next(iter(model.image_encoder.parameters())).add_(1.0)
    export_llava(model, tmp_path / "out")
    theirs = t.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").model.vision_tower.state_dict()
    for key, tensor in model.image_encoder.tower.model.state_dict().items():
        torch.testing.assert_close(theirs[key], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"bridge": {"reduce": "pixel_shuffle"}}, "pixel_shuffle"),
        ({"bridge": {"reduce": "pool", "tokens": 4}}, "pool"),
        ({"bridge": {"input_norm": True}}, "input_norm"),
        ({"bridge": {"type": "linear"}}, "linear"),
        ({"bridge": {"depth": 3}}, "depth: 3"),
        ({"encoder": {"layer": -1}}, "layer: -1"),
    ],
)
def test_what_transformers_cannot_express_is_refused_in_one_line(tiny_folder, tmp_path, options, error):
    encoder = {"name": f"hf:{tiny_folder(tiny_hf_image_model, 'clip')}", "layer": -2, **options.pop("encoder", {})}
    model = generative_model(tiny_folder, "llama", image_encoder=encoder, **options)
    with pytest.raises(VlmError, match=error) as raised:
        export_llava(model, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_other_encoders_and_encoder_decoders_are_refused(tiny_folder, tmp_path):
    timm = {"name": f"timm:{tiny_folder(tiny_timm_image_model, 'vit')}", "layer": -2}
    with pytest.raises(VlmError, match=r"only `hf:` CLIP and SigLIP"):
        export_llava(generative_model(tiny_folder, "llama", image_encoder=timm), tmp_path / "out")
    with pytest.raises(VlmError, match="encoder-decoder"):
        export_llava(generative_model(tiny_folder, "t5"), tmp_path / "out")
    with pytest.raises(VlmError, match="gpt2 as language model"):
        export_llava(generative_model(tiny_folder, "gpt2"), tmp_path / "out")
    with pytest.raises(VlmError, match="without the start token"):
        export_llava(generative_model(tiny_folder, "llama", template="tokenizer"), tmp_path / "out")


def test_lora_needs_merge_and_a_full_folder_stays(tiny_folder, tmp_path):
    run = _run(tiny_folder, tmp_path / "run")
    done = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "--merge" in done.output
    done = CliRunner().invoke(app, ["export", str(run), "--merge", str(run)])
    assert done.exit_code == 2
    assert "exists already" in done.output
    assert (run / "model.yaml").is_file()


def test_adapters_trained_on_4_bits_are_added_to_the_whole_weights(tiny_folder, tmp_path):
    run = _run(tiny_folder, tmp_path / "run")
    description = (run / "model.yaml").read_text()
    whole = load_model(run, "cpu", "fp32").answer(pictures(tmp_path, 3), QUESTIONS, max_new_tokens=6)
    (run / "model.yaml").write_text(description.replace("quantization: none", "quantization: 4bit"))
    done = CliRunner().invoke(app, ["export", str(run), "--merge", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert (
        load_model(tmp_path / "out", "cpu", "fp32").answer(pictures(tmp_path, 3), QUESTIONS, max_new_tokens=6) == whole
    )


def test_a_published_layout_is_exported_to_the_other(tiny_folder, tmp_path):
    from llava_parts import original_llava

    hf = tiny_folder(_llava)
    merged = original_llava(hf, tmp_path, "projector")
    done = CliRunner().invoke(app, ["export", str(merged), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    images = pictures(tmp_path, 3)
    said = load_model(merged, "cpu", "fp32").answer(images, QUESTIONS, max_new_tokens=6)
    assert load_model(tmp_path / "out", "cpu", "fp32").answer(images, QUESTIONS, max_new_tokens=6) == said


def test_rows_for_the_picture_token_are_never_the_most_likely(tiny_folder, tmp_path):
    import transformers as t

    model = generative_model(
        tiny_folder, "llama", image_encoder={"name": f"hf:{tiny_folder(tiny_hf_image_model, 'clip')}", "layer": -2}
    )
    old = len(model.language_model.embeddings.weight)
    export_llava(model, tmp_path / "out")
    theirs = t.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert theirs.lm_head.weight.shape[0] % 64 == 0
    assert theirs.lm_head.weight.shape[0] > theirs.config.image_token_index
    logits = theirs.lm_head(torch.randn(500, 32, generator=torch.Generator().manual_seed(0)))
    assert int(logits.argmax(-1).max()) < old
