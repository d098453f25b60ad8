"""`load_model`: what a name means, and one-line errors for what means nothing."""

import json
from pathlib import Path

import pytest

from vlm import VlmError, load_model


@pytest.mark.parametrize("name", ["nonsense", "a/b/c", "/no/such/folder", "./model"])
def test_a_name_that_means_nothing_is_told_what_it_may_be(name: str) -> None:
    with pytest.raises(VlmError, match=r"expected a run folder of vlm-train.*open_clip:ARCH/TAG"):
        load_model(name)


def test_a_model_that_is_neither_a_folder_nor_in_the_cache_is_one_line() -> None:
    with pytest.raises(VlmError, match=r"^runs/mistyped: no such folder and no such model on the hub") as error:
        load_model("runs/mistyped")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"model_type": "clop"}), "no model can be made of model_type 'clop'; did you mean 'clip'"),
        (json.dumps({}), "no model can be made of model_type ''; known: "),
        ("{torn", "config.json is not JSON"),
        ("[]", "config.json holds no mapping"),
    ],
)
def test_a_configuration_that_tells_no_known_model_is_an_error(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(VlmError, match=message):
        load_model(tmp_path)
