"""The classroom: what is handed out, how submissions are graded, what `prove` proves."""
import ast
import json
import subprocess
import sys
import textwrap

import pytest
import torch

from course import __main__ as course
from course import lab, prove
from uvit_fusion import Diffusion

THING = '''
"""A file with two exercises."""


def double(x):
    """Twice x."""
    # a number and itself
    return x + x


class Counter:
    def count(self, items, start=0):
        """How many items, from start."""
        for _ in items:
            start += 1
        return start
'''
TESTS = '''
import pytest

from thing import Counter, double


def test_twice():
    assert double(3) == 6


@pytest.mark.parametrize("n", [0, 2])
def test_count(n):
    assert Counter().count("x" * n) == n


def test_start():
    assert Counter().count("ab", 5) == 7
'''
EXERCISES = '''
# Exercises

## 1.1 Twice

fill 4 · 5 min · seconds

- read: nothing
- blank: `thing.py`: `double`
- check: `tests/test_thing.py`: `test_twice`

Words.

## 1.2 Counting

fill 2, predict 3 · 5 min · seconds

- blank: `thing.py`: `Counter.count`
- check: `tests/test_thing.py`: `test_count`,
  `test_start`

## 2.1 Mend

mend 5 · 5 min · seconds

- mend: `thing.py`: `double`, `Counter.count`
- check: `tests/test_thing.py`: `test_twice`, `test_start`

## 2.2 Predict

predict 6 · 5 min · seconds
'''
TEACHERS = '''
## 1.1 Twice

```diff wrong: the square
-    return x + x
+    return x * x
```

## 1.2 Counting

```diff wrong: from one
-        for _ in items:
+        start += 1
+        for _ in items:
```

## 2.1 Mend

```diff wrong: half of it
-    return x + x
+    return x
```

```diff wrong: all of it
-    return x + x
+    return x
-            start += 1
+            start = 1
```
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A tiny project with a course, in place of this one."""
    root = tmp_path / "project"
    files = {"thing.py": THING, "tests/test_thing.py": TESTS, "course/EXERCISES.md": EXERCISES,
             "course/TEACHERS.md": TEACHERS, ".ci/run": "", "tests/test_course.py": ""}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subprocess.run("git init -q && git add -A", shell=True, cwd=root, check=True)
    (root / "untracked.py").write_text("")
    for module in (course, prove):
        monkeypatch.setattr(module, "ROOT", root)
    return root


def call(monkeypatch, capsys, *arguments):
    """Runs `python -m course`: (exit status, output, errors)."""
    monkeypatch.setattr(sys, "argv", ["course", *map(str, arguments)])
    status = 0
    try:
        course.main()
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def marks(submission, numbers=(), limit=60):
    """{number: (marks, line)} of the JSON that is written for Gradescope."""
    path = submission.parent / "results.json"
    course.grade(submission, course.choose(numbers), path, limit)
    return {test["name"].split()[0]: (test["score"], test["output"])
            for test in json.loads(path.read_text())["tests"]}


# --------------------------------------------------------------------------------- handing out
def test_a_copy_has_empty_functions_and_no_answers(project, tmp_path):
    out = tmp_path / "out"
    course.make(out, course.choose([], week=1), 1)
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {"thing.py", "tests/test_thing.py", "course/EXERCISES.md"}
    expected = THING.replace('''    # a number and itself
    return x + x
''', '''    raise NotImplementedError("exercise 1.1: see course/EXERCISES.md")
''').replace('''        for _ in items:
            start += 1
        return start
''', '''        raise NotImplementedError("exercise 1.2: see course/EXERCISES.md")
''')
    assert (out / "thing.py").read_text() == expected
    course.make(tmp_path / "one", course.choose(["1.2"]), 1)
    assert "return x + x" in (tmp_path / "one" / "thing.py").read_text()


def test_what_is_to_be_mended_has_the_fault_that_was_asked_for(project, tmp_path):
    half = THING.replace("return x + x", "return x")
    whole = half.replace("start += 1", "start = 1")
    for number, expected in ((1, half), (2, whole)):
        course.make(tmp_path / str(number), course.choose(["2.1"]), number)
        assert (tmp_path / str(number) / "thing.py").read_text() == expected


def test_an_exercise_is_checked_by_its_own_tests(project, tmp_path, capfd):
    assert course.check(course.choose(["1.1", "1.2"])) == 0
    assert "4 passed" in capfd.readouterr().out
    empty = course.blank([("thing.py", "double")], "1.1", project)
    (project / "thing.py").write_text(empty["thing.py"])
    assert course.check(course.choose(["1.2"])) == 0
    assert course.check(course.choose(["1.1"])) == 1
    assert "NotImplementedError: exercise 1.1: see course/EXERCISES.md" in capfd.readouterr().out


@pytest.mark.parametrize("arguments, words", [
    (["check", "2.2"], "2.2 has no tests"), (["check", "3.1"], "1.1, 1.2, 2.1, 2.2"),
    (["make", "x", "--week", "7"], "1.1, 1.2, 2.1, 2.2"), (["make", "."], "already exists"),
    (["grade", "nowhere"], "nowhere is not a folder"), (["pack"], "uvit_fusion.py --train")])
def test_a_slip_is_one_line(project, monkeypatch, capsys, arguments, words):
    status, out, errors = call(monkeypatch, capsys, *arguments)
    assert status == 2 and out == ""
    assert errors.startswith("course: error: ") and words in errors and errors.count("\n") == 1


def test_weights_are_packed_without_what_only_a_resumed_training_needs(
        project, tmp_path, monkeypatch, capsys):
    names = ["runs/uvit_fusion/config.json", "runs/uvit_fusion/model.safetensors",
             "runs/uvit_fusion/step1400.safetensors", "runs/toy/clip/vocabulary.txt"]
    for name in [*names, "runs/uvit_fusion/state.pt"]:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, capsys, "pack")[0] == 0
    subprocess.run([sys.executable, "-m", "zipfile", "-e", "weights.zip", "copy"], cwd=tmp_path)
    copy = tmp_path / "copy"
    found = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert found == set(names)


# ------------------------------------------------------------------------------------- grading
def hand_in(tmp_path, code):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "thing.py").write_text(code, encoding="utf-8", errors="surrogateescape")
    return tmp_path / "in"


def test_marks_are_the_share_of_an_exercises_tests(project, tmp_path, capsys):
    code = THING.replace("x + x", "2 * x").replace("start += 1", "start += 1 + (start >= 5)")
    found = marks(hand_in(tmp_path, code))
    assert found["1.1"] == (4, "1 of 1 tests")
    assert found["1.2"][0] == 1 and found["1.2"][1].startswith("1 of 2 tests; test_start: Assert")
    assert found["2.1"][0] == 0 and found["2.1"][1].startswith("1 of 2 tests"), "all or nothing"
    assert set(found) == {"1.1", "1.2", "2.1"}
    assert "1.2  1 of 2  1 of 2 tests" in capsys.readouterr().out


def test_a_wrong_exercise_costs_nothing_in_another(project, tmp_path):
    code = THING.replace("return x + x", "import os; os._exit(0)")
    found = marks(hand_in(tmp_path, code), ["1.1", "1.2"])
    assert found["1.1"][0] == 0 and found["1.2"] == (2, "2 of 2 tests")


def test_nothing_but_the_named_bodies_counts(project, tmp_path):
    code = THING.replace("x + x", "2 * x").replace("(x)", "(x, y=1)") + "\nraise ValueError\n"
    submission = hand_in(tmp_path, code.replace("    ", "\t"))
    (submission / "tests").mkdir()
    (submission / "tests" / "test_thing.py").write_text("def test_twice():\n    assert False\n")
    (submission / "conftest.py").write_text("raise ValueError\n")
    assert marks(submission, ["1.1"]) == {"1.1": (4, "1 of 1 tests")}
    empty = course.blank([("thing.py", "double")], "1.1", project)
    (submission / "thing.py").write_text(empty["thing.py"])
    (submission / "tests" / "test_thing.py").write_text("def test_twice():\n    pass\n")
    assert marks(submission, ["1.1"])["1.1"][0] == 0


@pytest.mark.parametrize("body, limit, line", [
    ("while True:\n    pass", 4, "stopped after 4 s"),
    ("while True:\n    print('x' * 10_000)", 4, "stopped after 4 s"),
    ("import os\nos._exit(0)", 60, "the code ended the process before the tests finished"),
    ("import sys\nsys.exit(0)", 60, "0 of 1 tests; test_twice: SystemExit"),
    ("import pytest\npytest.skip('no')", 60, "0 of 1 tests; test_twice: "),
    ("open('tests/test_thing.py', 'w').close()\nreturn 7", 60, "0 of 1 tests; test_twice: assert"),
    ("return 'x' * 10**6", 60, "0 of 1 tests; test_twice: "),
    ("return (", 60, "thing.py: '(' was never closed")])
def test_whatever_code_does_it_gets_its_marks_and_one_line(project, tmp_path, body, limit, line):
    code = THING.replace("    return x + x\n", textwrap.indent(body, "    ") + "\n")
    found, why = marks(hand_in(tmp_path, code), ["1.1"], limit)["1.1"]
    assert found == 0 and why.startswith(line), why
    assert "\n" not in why and len(why) <= 200


@pytest.mark.parametrize("code, line", [
    (THING.replace("def double", "def twice"), "thing.py: there is no double"),
    ("\0", "thing.py: source code string cannot contain null bytes"),
    ("\udcff", "thing.py: 'utf-8' codec can't decode byte 0xff"),
    ("x = " + "(" * 9999, "thing.py: ")])
def test_a_file_that_is_no_code_costs_its_exercises(project, tmp_path, code, line):
    found = marks(hand_in(tmp_path, code), ["1.1"])["1.1"]
    assert found[0] == 0 and found[1].startswith(line)
    (tmp_path / "in" / "thing.py").unlink()
    (tmp_path / "in" / "thing.py").mkdir()
    assert marks(tmp_path / "in", ["1.1"])["1.1"] == (0, "thing.py: there is no such file")


# ------------------------------------------------------------------------------------- proving
def prove_it(project, monkeypatch, capsys):
    """Status and output of `prove` in the tiny project, whose modules are imported again."""
    monkeypatch.syspath_prepend(project)
    monkeypatch.chdir(project)
    for name in ("thing", "test_thing"):
        sys.modules.pop(name, None)
    status = prove.prove(course.choose([]), write=False)
    for name in ("thing", "test_thing"):
        sys.modules.pop(name, None)
    return status, capsys.readouterr().out


def test_exercises_that_hold_are_proven(project, monkeypatch, capsys):
    status, out = prove_it(project, monkeypatch, capsys)
    assert status == 0 and out.count(": proven\n") == 3
    assert "4 exercises, 4 of 4 wrong blocks caught" in out


def test_what_does_not_hold_is_told(project, monkeypatch, capsys):
    for file, old, new in [
            ("tests/test_thing.py", "assert double(3) == 6", "assert double(3) in (6, 9)"),
            ("tests/test_thing.py", 'assert Counter().count("ab", 5) == 7', "assert False"),
            ("tests/test_thing.py", '== n\n', "== n\n\n\ndef test_true():\n    pass\n"),
            ("course/EXERCISES.md", "`test_twice`\n", "`test_twice`, `test_true`\n"),
            ("course/EXERCISES.md", "`test_twice`, `test_start`", "`test_twice`"),
            ("course/TEACHERS.md", "```diff wrong: from one", "```diff")]:
        text = (project / file).read_text()
        assert old in text, old
        (project / file).write_text(text.replace(old, new))
    status, out = prove_it(project, monkeypatch, capsys)
    assert status
    for line in (
            "not noticed: the square",
            "tests/test_thing.py::test_start does not pass",
            "tests/test_thing.py::test_true does not fail on blank functions as it should",
            "TEACHERS.md has no wrong block", "no test needs Counter.count",
            "4 exercises, 2 of 3 wrong blocks caught"):
        assert line in out, out


def test_wrong_lines_that_are_not_there_are_told(project, tmp_path):
    text = (project / "course/TEACHERS.md").read_text().replace("-    return x", "-    return 1")
    (project / "course/TEACHERS.md").write_text(text)
    with pytest.raises(course.Slip, match="2.1 in TEACHERS.md: not exactly once"):
        course.make(tmp_path / "out", course.choose(["2.1"]), 1)


# ------------------------------------------------------------------------------------- the lab
@pytest.mark.parametrize("sampler", lab.SAMPLERS)
def test_the_perfect_denoiser_leads_every_sampler_to_one_of_its_pictures(sampler):
    data = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    diffusion = Diffusion("cosine", "x0")
    denoiser = lab.perfect_denoiser(diffusion, data)
    drawn = lab.draw(denoiser, diffusion, (16, 3, 8, 8), sampler, 25)
    number, off = lab.nearest(drawn, data)
    assert off.max() < 0.01 and len(number.unique()) > 1
    first = denoiser(torch.randn(16, 3, 8, 8), torch.full((16,), diffusion.T))
    assert lab.rms(first - data.mean(0)) < 0.01, "at t = T the answer is the mean of all pictures"


# ----------------------------------------------------------------------------- the course itself
def test_the_marks_are_100_and_at_most_40_for_filling_in():
    kinds = [exercise.marks for exercise in course.read_exercises().values()]
    assert sum(sum(marks.values()) for marks in kinds) == 100
    assert sum(marks.get("fill", 0) for marks in kinds) <= 40


def test_each_exercise_is_complete():
    exercises = course.read_exercises()
    assert list(exercises) == sorted(exercises) == sorted(course.read_sections("TEACHERS.md"))
    functions = [function for exercise in exercises.values() for function in exercise.functions]
    assert len(set(functions)) == len(functions)          # none is in two exercises
    for exercise in exercises.values():
        title, text = course.read_sections("TEACHERS.md")[exercise.number]
        assert title == exercise.title and exercise.marks
        assert bool(exercise.graded) == bool(exercise.functions) == bool(exercise.tests)
        assert text.count("```diff wrong: ") == len(course.read_wrong(exercise.number))
        for _, hunks in course.read_wrong(exercise.number):
            course.plant(exercise, hunks, course.ROOT)
        for file, name in exercise.functions:
            body = course.split_body(course.read(course.ROOT / file), name)[1]
            assert len(body.splitlines()) <= 45, f"{name} is too long for an exercise"


@pytest.mark.parametrize("file", ["uvit_fusion.py", "toy/judge.py"])
def test_every_function_comes_back_as_it_was(file):
    names = function_names(course.read(course.ROOT / file))
    assert len(names) > 10
    for name in names:
        assert prove.round_trips(file, name), name


def function_names(source):
    names = []
    for node in ast.parse(source).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        names += [prefix + child.name for child in inner if isinstance(child, ast.FunctionDef)]
    return names
