"""Pictures carry their prompts: in a font that has the letters, in lines that fit, in grids without empty strips."""
import numpy as np
import pytest
from PIL import Image, ImageFont

import sample

PICTURE = np.full((24, 24, 3), 200, np.uint8)
CHINESE = "三个绿色的圆形在一个蓝色的正方形上方，两个红色的圆形在一个黄色的三角形下方。"


@pytest.fixture
def poor():
    """Pillow's own font, which has no accents and no Chinese."""
    return ImageFont.load_default(11)


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


def test_a_font_tells_which_letters_it_lacks(poor):
    assert sample.lacking(poor, ["ein grüner Kreis", "一个 circle"]) == "ü一个" and sample.lacking(poor, ["two red circles, 2.5 %"]) == ""


def test_the_font_that_has_the_letters_is_chosen(monkeypatch, poor):
    better = ImageFont.load_default(11)
    fonts = {"poor.ttf": poor, "better.ttf": better}
    monkeypatch.setattr(sample, "FONTS", ("none.ttf", *fonts))

    def truetype(name, size):
        if name not in fonts:
            raise OSError
        return fonts[name]
    monkeypatch.setattr(ImageFont, "truetype", truetype)
    monkeypatch.setattr(sample, "lacking", lambda face, texts: "" if face is better else "".join(sorted(set("".join(texts)) & {*"éü"})))
    assert sample.font(["a circle"]) is poor and sample.font(["un círculo é"]) is better


@pytest.mark.parametrize("path", [None, "some.ttf"])
def test_letters_that_no_font_has_are_named_in_one_line(tmp_path, monkeypatch, capsys, poor, path):
    monkeypatch.setattr(sample, "FONTS", ())
    monkeypatch.setattr(ImageFont, "truetype", lambda name, size, **_: poor)
    sample.font(["two red circles", "两个红色"], path)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "missing are 两个红色" in out and (path or "no font") in out
    height(tmp_path, [CHINESE, "two red circles"])
    assert "missing are 。" in capsys.readouterr().out
    height(tmp_path, ["two red circles"])
    assert not capsys.readouterr().out


def test_lines_fit_and_lose_nothing(poor):
    english = "two red circles to the left of a blue square"
    lines = sample.wrap(english, 96, poor)
    assert len(lines) > 2 and " ".join(lines) == english
    for text in (CHINESE, CHINESE.replace("在", " in ")):
        lines = sample.wrap(text, 96, poor)
        assert len(lines) > 2 and "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert all(poor.getlength(line) <= 96 and line[0] not in "，。" for line in lines)
    assert sample.wrap("一个circle", 300, poor) == ["一个circle"] and sample.wrap("", 96, poor) == [""]
