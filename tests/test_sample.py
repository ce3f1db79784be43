"""Pictures carry their prompts: grids without empty strips."""
import numpy as np
from PIL import Image

import sample

PICTURE = np.full((24, 24, 3), 200, np.uint8)


def height(path, texts, **more):
    """Of a grid of grey pictures, 96 + 8 pixels a row besides the texts."""
    sample.picture_grid([PICTURE] * len(texts), texts, path / "grid.png", columns=2, **more)
    return Image.open(path / "grid.png").height


def test_only_rows_with_texts_leave_room_for_them(tmp_path):
    bare, titled = height(tmp_path, [""] * 4), height(tmp_path, [""] * 4, titles=["early", "intermediate"])
    assert bare == titled == 8 + 2 * (96 + 8)
    last = height(tmp_path, ["", "", "two red circles above a blue square", "a green triangle"]) - bare
    assert last > 14 and height(tmp_path, ["a green triangle"] * 4) - bare == 2 * (14 + 4)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert (grid[8 + 96 + 2:8 + 96 + 18] < 100).any()                                     # the text of the first row
