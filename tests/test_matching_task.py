"""The task `matching`: right captions and the nearest wrong ones, judged by a model that looks at both."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_qformer_model import qformer_spec
from test_reranking import captioned, plan
from tiny_models import randomize

from vlm.errors import UnsupportedTask, VlmError
from vlm.evaluation import evaluate
from vlm.model_spec import QFormerSpec
from vlm.models.build import build_model


class Tells:
    """Embeds captions and pictures on a circle by their number, and thinks that what is at most `far` apart matches."""

    def __init__(self, paths: list[str], captions: list[str], far: int) -> None:
        self.place = {path: n for n, path in enumerate(paths)} | {text: n for n, text in enumerate(captions)}
        self.count, self.far = len(captions), far

    def _points(self, names: list[str]) -> torch.Tensor:
        from vlm.data.images import load_image

        for name in names:
            if name.endswith((".png", ".jpg")):
                load_image(name)
        angles = torch.tensor([self.place[name] * 2.0 / self.count for name in names])
        return torch.stack([angles.cos(), angles.sin()], 1)

    encode_image = encode_text = _points

    def match_each(self, images: list[str], texts: list[str], wanted: list[list[int]]) -> list[torch.Tensor]:
        found = []
        for image, numbers in zip(images, wanted):
            apart = torch.tensor([abs(self.place[image] - self.place[texts[n]]) for n in numbers])
            found.append(torch.stack([apart.float() - self.far, 0.5 * torch.ones(len(numbers))], 1))
        return found


def matching(file: Path, **options: Any) -> Any:
    return plan(file, task="matching", **options)


@pytest.mark.parametrize(("far", "scores"), [(0, (100, 100, 100)), (1, (50, 100, 0)), (-1, (50, 0, 100))])
def test_the_wrong_caption_is_the_nearest(tmp_path: Path, far: int, scores: tuple[float, ...]) -> None:
    """Far 1 takes a neighbour for a match: every wrong caption that is asked about is one."""
    file, paths, captions = captioned(tmp_path, single=True)
    model = Tells(paths, [told[0] for told in captions], far)
    found = evaluate(matching(file), model, output=tmp_path / "out", progress=False)
    assert tuple(found.metrics[name] for name in ("accuracy", "accuracy_right", "accuracy_wrong")) == scores
    assert found.count == 2 * len(paths)
    wrong = [sample for sample in found.samples if ":wrong:" in sample.id]
    for number, sample in enumerate(wrong):
        assert abs(model.place[sample.question or ""] - number) == 1
        assert sample.answers == ["no match"]


def test_captions_that_read_the_same_are_never_wrong(tmp_path: Path) -> None:
    """All pictures share one caption but the last: the only wrong caption of the others is the last one's."""
    file, paths, _ = captioned(tmp_path, single=True, same=14)
    model = Tells(paths, ["the same", "another"], 0)
    found = evaluate(matching(file), model, output=tmp_path / "out", progress=False)
    wrong = [sample.question for sample in found.samples if ":wrong:" in sample.id]
    assert wrong == [*["another"] * 14, "the same"]


def test_as_many_wrong_captions_as_a_picture_has_right_ones(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Against a real Q-Former: the judgement is that of `match`, the wrong ones are the nearest by its embeddings."""
    model = build_model(QFormerSpec.model_validate(qformer_spec(tiny_folder)), device="cpu", precision="fp32")
    randomize(model.bridge)
    randomize(model.heads)
    file, paths, captions = captioned(tmp_path)
    found = evaluate(matching(file), model, output=tmp_path / "out", progress=False)
    texts = [text for told in captions for text in told]
    sims = (model.encode_image(paths) @ model.encode_text(texts).T).amax(1)
    for number, path in enumerate(paths):
        mine = [sample for sample in found.samples if sample.image == path]
        right = [sample.question for sample in mine if sample.answers == ["match"]]
        wrong = [sample.question for sample in mine if sample.answers == ["no match"]]
        assert right == captions[number]
        order = [texts[i] for i in sims[number].argsort(descending=True).tolist() if texts[i] not in captions[number]]
        assert wrong == order[: len(right)]
        says = model.match(path, [sample.question for sample in mine]) > 0.5
        assert [sample.prediction == "match" for sample in mine] == says.tolist()


def test_a_broken_picture_counts_as_wrong(tmp_path: Path) -> None:
    file, paths, captions = captioned(tmp_path, single=True)
    model = Tells(paths, [told[0] for told in captions], 0)
    Path(paths[2]).write_bytes(b"no picture")
    found = evaluate(matching(file), model, output=tmp_path / "out", progress=False)
    assert found.metrics["accuracy"] == pytest.approx(100 * 14 / 15)
    assert [entry["id"] for entry in found.broken] == ["2:right:1", "2:wrong:1"]


def test_who_can_match_is_named(tmp_path: Path) -> None:
    file, _, _ = captioned(tmp_path)
    with pytest.raises(UnsupportedTask, match="Q-Former models can"):
        evaluate(matching(file), object(), output=tmp_path / "out", progress=False)


def judged(tmp_path: Path) -> tuple[Path, Any, list[dict[str, Any]]]:
    """Data, a model's result on them (of 30 pairs 15 + 13 are judged rightly), and the rows of its samples.jsonl."""
    file, paths, captions = captioned(tmp_path, single=True)
    model = Tells(paths, [told[0] for told in captions], 0)
    found = evaluate(matching(file), model, output=tmp_path / "model", progress=False)
    rows = [json.loads(line) for line in (tmp_path / "model/samples.jsonl").read_text().splitlines()]
    for row in rows[1:4:2]:
        row["prediction"] = "match"  # two wrong captions taken for right
    return file, found, rows


def scored(file: Path, rows: list[dict[str, Any]], **options: Any) -> Any:
    given = file.parent / "given.json"
    given.write_text(json.dumps(rows))
    out = file.parent / "out"
    return evaluate(matching(file), predictions=given, output=out, progress=False, **options)


def test_judgements_of_a_file_are_scored_as_a_models_are(tmp_path: Path) -> None:
    file, model, rows = judged(tmp_path)
    again = evaluate(
        matching(file), predictions=tmp_path / "model/samples.jsonl", output=tmp_path / "again", progress=False
    )
    assert (again.metrics, again.samples, again.intervals) == (model.metrics, model.samples, model.intervals)
    found = scored(file, rows)
    assert found.metrics == {
        "accuracy": pytest.approx(100 * 28 / 30),
        "accuracy_right": pytest.approx(100),
        "accuracy_wrong": pytest.approx(100 * 13 / 15),
    }
    assert [sample.id for sample in found.samples if not sample.score] == ["0:wrong:1", "1:wrong:1"]
    others = [
        {"image_id": row["id"].split(":")[0], "caption": row["question"], "match": said}
        for row in rows
        for said in [{"match": 0.7, "no match": False}[row["prediction"]]]
    ]
    other = scored(file, others[::-1])  # in any order
    assert (other.metrics, other.samples) == (found.metrics, found.samples)
    few = scored(file, others, limit=4)
    assert few.count == 8
    assert few.metrics["accuracy_wrong"] == 50


def test_a_picture_that_the_files_author_could_not_read_is_wrong(tmp_path: Path) -> None:
    file, _, rows = judged(tmp_path)
    for row in rows[4:6]:
        row |= {"prediction": None, "error": "2.png: no picture"}
    found = scored(file, rows)
    assert found.metrics["accuracy"] == pytest.approx(100 * 26 / 30)
    assert [entry["error"] for entry in found.broken] == ["2.png: no picture"] * 2


def test_pairs_that_are_not_the_data_sets_are_named_and_refused_unless_partial(tmp_path: Path) -> None:
    file, _, rows = judged(tmp_path)
    own, wrong = rows[0]["question"], rows[1]["question"]
    more = [
        rows[0],  # again
        rows[2] | {"id": "99:right:1"},  # no picture
        rows[1] | {"question": "a caption of nobody"},
        rows[1] | {"question": rows[-1]["question"]},  # a second wrong caption of a picture with one right
    ]
    with pytest.raises(VlmError, match=r"the pair ids do not match the data set's 30: 2 missing \(9:right:1, 9:wrong"):
        scored(file, rows[:18] + rows[20:])
    message = r"3 unknown \(0: a caption of nobody, 0:wrong:2, 99: .*\); 1 given more than once \(0:right:1\)"
    with pytest.raises(VlmError, match=message):
        scored(file, rows + more)
    found = scored(file, rows[:18] + rows[20:] + more, partial=True)
    assert found.settings["partial"] == {"missing": 2, "unknown": 3, "repeated": 1}
    assert found.count == 28
    for bad, message in (
        ([own], "expected {image_id, caption, match}"),
        ([{"image_id": 0, "caption": own}], "found keys 'image_id', 'caption'"),
        ([{"image_id": 0, "caption": own, "match": 1.5}], "found 1.5"),
        ([{"image_id": 0, "caption": own, "match": "perhaps"}], "found 'perhaps'"),
        ([{"image_id": 0, "caption": 3, "match": True}], "the caption must be text, found 3"),
        ([{"image_id": 77, "caption": wrong, "match": True}], "1 unknown"),
    ):
        with pytest.raises(VlmError, match=message):
            scored(file, bad)
    with pytest.raises(VlmError, match="none of 1 pairs is about the 15 records"):
        scored(file, [{"image_id": 77, "caption": wrong, "match": True}], partial=True)
