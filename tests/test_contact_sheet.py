"""The contact sheet shows each text's nearest pictures, best first."""

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.errors import VlmError
from vlm.evaluation.contact_sheet import CELL, GAP, LABEL, write_contact_sheet

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class ByColour:
    """Embeds a picture as its mean colour, and a colour's name as that colour."""

    def encode_image(self, images):
        return torch.tensor(np.stack([np.asarray(Image.open(image)).mean((0, 1)) for image in images])).float() / 255

    def encode_text(self, texts):
        return torch.tensor([COLOURS[text] for text in texts]).float() / 255


def test_each_row_begins_with_the_nearest_picture(tmp_path):
    paths = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (CELL, CELL), colour).save(tmp_path / f"{name}.png")
        paths.append(str(tmp_path / f"{name}.png"))
    sheet = Image.open(write_contact_sheet(ByColour(), ["blue", "red"], paths, tmp_path / "new" / "sheet.png"))
    assert sheet.size == (LABEL + 3 * (CELL + GAP), 2 * (CELL + GAP) + GAP)
    middle = GAP + CELL // 2
    assert sheet.getpixel((LABEL + 5, middle)) == COLOURS["blue"]
    assert sheet.getpixel((LABEL + 5, middle + CELL + GAP)) == COLOURS["red"]


def test_nothing_to_show_is_an_error(tmp_path):
    with pytest.raises(VlmError, match="texts and pictures"):
        write_contact_sheet(ByColour(), [], ["a.png"], tmp_path / "sheet.png")
