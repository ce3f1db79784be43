"""course/tour.ipynb: a dozen cells that import and show; here they run in order, on tiny models."""
import ast
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import save_run, tiny_pipeline
from PIL import Image

import common

NOTEBOOK = Path(common.__file__).parent / "course" / "tour.ipynb"


@pytest.fixture
def cells():
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def test_it_defines_nothing_and_holds_no_outputs(cells):
    assert 10 <= len(cells) <= 13
    for cell in cells:
        assert cell["outputs"] == [] and cell["execution_count"] is None
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            assert not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda))


def test_its_cells_run_one_after_the_other(cells, clip_folder, toy_data, tmp_path, monkeypatch):
    shutil.copytree(toy_data, tmp_path / "data" / "shapes")
    pipeline = tiny_pipeline(clip_folder, size=24, patch=8, data="data/shapes")
    save_run(pipeline, tmp_path / "runs" / "uvit_fusion")
    (tmp_path / "course").mkdir()
    monkeypatch.chdir(tmp_path / "course")                       # as a notebook server does
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = {}
    shown = []
    for number, cell in enumerate(cells):
        *statements, last = ast.parse("".join(cell["source"])).body
        code = ast.Module(statements, [])
        if isinstance(last, ast.Expr):                           # its value is what is shown
            exec(compile(code, f"cell {number}", "exec"), names)
            code = ast.Expression(last.value)
            shown.append(eval(compile(code, f"cell {number}", "eval"), names))
        else:
            code.body.append(last)
            exec(compile(code, f"cell {number}", "exec"), names)
    assert Path(os.getcwd()) == tmp_path                         # the project's folder
    assert sum(isinstance(value, Image.Image) for value in shown) >= 8
