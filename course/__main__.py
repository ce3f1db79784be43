"""Exercises from the one source: handed out, checked, graded and proven.

    python -m course make out --week 1           # a copy for students, with functions to be written
    python -m course check 1.2                   # there: the tests of an exercise, in seconds
    python -m course grade out --json marks.json      # fill and mend exercises, in two minutes
    python -m course prove                       # the tests take right code, and no wrong code
    python -m course pack                        # trained weights as a zip, for the impatient

EXERCISES.md says what is to be done, and which functions and tests an exercise has. TEACHERS.md has
the answers, and wrong code that the tests must notice. The code itself has no markers: what is
blanked is the body of a function behind its docstring.

A submission gives nothing but the bodies of the functions of its exercises; whatever else it has
changed neither counts nor hurts. Grading runs these bodies: use a container for code of strangers.
"""
import argparse
import ast
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# not for students
HIDDEN = ("course/TEACHERS.md", "tests/test_course.py", "tests/mutants.py", ".ci/")
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


class Slip(Exception):
    """Something the user can put right, in one line."""


# ----------------------------------------------------------------------------------- the manifest
@dataclass
class Exercise:
    number: str                     # "1.2": the second exercise of the first week
    title: str
    marks: dict                     # {"fill": 3, "predict": 4}
    functions: list                 # [(file, "Class.function"), ...], to be written or mended
    tests: list                     # ["tests/test_x.py::test_y", ...]

    @property
    def graded(self):
        """The marks that `grade` gives; a teacher gives the others."""
        return self.marks.get("fill", 0) + self.marks.get("mend", 0)


def read(path):
    return path.read_text(encoding="utf-8-sig")


def read_sections(page):
    """{"1.2": (title, text)} of the headings "## 1.2 Title" of a page in course/."""
    found = re.findall(r"^## (\d\.\d) (.+)\n((?:(?!## ).*\n)*)", read(ROOT / "course" / page), re.M)
    return {number: (title, text) for number, title, text in found}


def read_list(text, name):
    """The line "- name: `file`: `a`, `b`; `file`: `c`" of a section: [(file, "a"), ...]."""
    found = re.search(rf"^- {name}: (.*\n(?:  .*\n)*)", text, re.M)
    parts = [part.split(":") for part in found[1].replace("`", "").split(";")] if found else []
    return [(file.strip(), one.strip()) for file, names in parts for one in names.split(",")]


def read_exercises():
    """{"1.2": Exercise} of EXERCISES.md."""
    exercises = {}
    for number, (title, text) in read_sections("EXERCISES.md").items():
        kinds = re.findall(r"(fill|mend|predict|extend) (\d+)", text.strip().split("\n")[0])
        marks = {kind: int(count) for kind, count in kinds}
        functions = read_list(text, "blank") + read_list(text, "mend")
        tests = [f"{file}::{name}" for file, name in read_list(text, "check")]
        exercises[number] = Exercise(number, title, marks, functions, tests)
    return exercises


def choose(numbers, week=None):
    """The exercises of these numbers, of a week, or all."""
    exercises = read_exercises()
    chosen = numbers or [number for number in exercises if number[0] == str(week or number[0])]
    if not chosen or not set(chosen) <= set(exercises):
        raise Slip(f"no such exercise or week: choose from {', '.join(exercises)}")
    return [exercises[number] for number in chosen]


def read_wrong(number):
    """[(name, [(old lines, new lines), ...])]: the wrong blocks of an exercise in TEACHERS.md."""
    _, text = read_sections("TEACHERS.md")[number]
    blocks = []
    for name, diff in re.findall(r"^```diff wrong: (.+)\n((?:[-+].*\n)+)```", text, re.M):
        hunks = re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", diff, re.M)
        sides = [re.sub("^.", "", side, flags=re.M) for hunk in hunks for side in hunk]
        blocks.append((name, list(zip(sides[::2], sides[1::2]))))
    return blocks


# ----------------------------------------------------------------------------- bodies of functions
parse = functools.lru_cache(maxsize=32)(ast.parse)        # files are read again and again


def find_function(source, name):
    """The syntax tree of "Class.function" in the code of a file."""
    nodes = [parse(source)]
    for part in name.split("."):
        nodes = [child for child in nodes[-1].body if getattr(child, "name", None) == part]
        if not nodes:
            raise Slip(f"there is no {name}")
    return nodes[-1]                                # of two with one name, the last one counts


def split_body(source, name):
    """The code of a file: up to a function's docstring, the function's body, and the rest."""
    function = find_function(source, name)
    start = function.body[0].lineno - 1
    if ast.get_docstring(function) is not None:
        start = function.body[0].end_lineno
    lines = source.splitlines(keepends=True)
    return ["".join(part) for part in (
        lines[:start], lines[start:function.end_lineno], lines[function.end_lineno:])]


def replace_body(source, name, body):
    before, _, rest = split_body(source, name)
    return before + body + rest


def blank(functions, number, root):
    """{file: its code with nothing in these functions but that they are an exercise}."""
    sources = {file: read(root / file) for file, _ in functions}
    for file, name in functions:
        indent = "    " * (name.count(".") + 1)
        message = f"exercise {number}: see course/EXERCISES.md"
        body = f'{indent}raise NotImplementedError("{message}")\n'
        sources[file] = replace_body(sources[file], name, body)
    return sources


def plant(exercise, hunks, root):
    """{file: its code with a wrong block}: each hunk's old lines must occur once in a function."""
    sources = {file: read(root / file) for file, _ in exercise.functions}
    for old, new in hunks:
        count = 0
        for file, name in exercise.functions:
            body = split_body(sources[file], name)[1]
            count += body.count(old)
            sources[file] = replace_body(sources[file], name, body.replace(old, new))
        if count != 1:
            raise Slip(f"{exercise.number} in TEACHERS.md: not exactly once in the code: {old!r}")
    return sources


# --------------------------------------------------------------------------- making and checking
def copy_project(out, hidden=()):
    """Copies the tracked files into a new folder."""
    if out.exists():
        raise Slip(f"{out} already exists: name a new folder")
    try:
        names = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    except subprocess.CalledProcessError:
        raise Slip("make and grade need a git clone: git lists the files to copy") from None
    for name in names:
        if not name.startswith(hidden):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, out / name)


def make(out, exercises, number):
    """Makes a copy for students; number: which wrong block stands in exercises to mend, from 1."""
    copy_project(out, HIDDEN)
    for exercise in exercises:
        sources = blank(exercise.functions, exercise.number, out)
        if "mend" in exercise.marks:
            blocks = read_wrong(exercise.number)
            _, hunks = blocks[(number - 1) % len(blocks)]
            sources = plant(exercise, hunks, out)
        for file, source in sources.items():
            (out / file).write_text(source, encoding="utf-8")
    print(f"{out}: {', '.join(exercise.number for exercise in exercises)}")


def check(exercises):
    """Runs the tests of exercises until one fails; returns pytest's exit status."""
    tests = [test for exercise in exercises for test in exercise.tests]
    if not tests:
        raise Slip(f"{exercises[0].number} has no tests: its answer is words and pictures")
    return subprocess.call([*PYTEST, "-x", "--tb=short", *tests], cwd=ROOT)


# ---------------------------------------------------------------------------------------- grading
def move_bodies(submission, copy, exercise):
    """Moves the bodies of an exercise's functions into a copy of the project."""
    for file, name in exercise.functions:
        try:
            if not (submission / file).is_file():
                raise Slip("there is no such file")
            body = split_body(read(submission / file).expandtabs(4), name)[1]
        except Exception as error:                  # code that is none can raise nearly anything
            raise Slip(f"{file}: {str(error) or type(error).__name__}") from None
        source = replace_body(read(copy / file), name, body)
        (copy / file).write_text(source, encoding="utf-8")


def read_report(path, tests):
    """{test: why each of its cases failed, "" for those that passed} of pytest's JUnit file."""
    reasons = {}
    for case in ElementTree.parse(path).iter("testcase"):
        test = f"{case.get('classname').replace('.', '/')}.py::{case.get('name').split('[')[0]}"
        reason = " ".join(child.get("message") or child.tag for child in case)
        reasons.setdefault(test, []).append(" ".join(reason.split()))
    return {test: reasons.get(test, ["it did not run"]) for test in tests}


def run_tests(copy, tests, limit):
    """The report of a process that ends within `limit` seconds."""
    report = copy.with_suffix(".xml")
    # no capture: what a submission prints without end is thrown away, not kept
    process = subprocess.Popen(
        [*PYTEST, "-s", f"--junitxml={report}", *tests], cwd=copy, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(limit)
        return read_report(report, tests)
    except subprocess.TimeoutExpired:
        raise Slip(f"stopped after {limit} s") from None
    except (OSError, ElementTree.ParseError):
        raise Slip("the code ended the process before the tests finished") from None
    finally:
        with contextlib.suppress(ProcessLookupError, AttributeError):   # Windows has no groups
            os.killpg(process.pid, signal.SIGKILL)                      # and what it has started
        process.kill()
        process.wait()


def grade_exercise(submission, exercise, limit):
    """The share of an exercise's marks, and one line that says why."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy = Path(folder) / "copy"                # a new one: code may write where it likes
        try:
            copy_project(copy)
            move_bodies(submission, copy, exercise)
            reasons = run_tests(copy, exercise.tests, limit)
        except Slip as slip:
            return 0.0, " ".join(str(slip).split())[:200]
    failed = [f"; {test.split('::')[1]}: {max(cases)}" for test, cases in reasons.items()
              if any(cases)]
    share = 1 - len(failed) / len(reasons)
    if "mend" in exercise.marks:
        share = int(share)                          # the copy handed out passes some of the tests
    line = f"{len(reasons) - len(failed)} of {len(reasons)} tests" + "".join(failed[:1])
    return share, line[:200]


def grade(submission, exercises, path=None, limit=120):
    """Prints a line for each exercise, and writes Gradescope's JSON."""
    if not submission.is_dir():
        raise Slip(f"{submission} is not a folder")
    tests = []
    for exercise in exercises:
        if exercise.graded:
            share, line = grade_exercise(submission, exercise, limit)
            marks = round(share * exercise.graded, 2)
            print(f"{exercise.number}  {marks:g} of {exercise.graded}  {line}", flush=True)
            tests.append({"name": f"{exercise.number} {exercise.title}", "score": marks,
                          "max_score": exercise.graded, "output": line})
    print(f"{sum(test['score'] for test in tests):g} of {sum(test['max_score'] for test in tests)}")
    if path:
        Path(path).write_text(json.dumps({"tests": tests}, indent=2) + "\n")


def pack():
    """Packs the base model, its early weights and the tiny CLIP, to be unpacked in a copy."""
    names = ("runs/uvit_fusion/*.json", "runs/uvit_fusion/*.safetensors", "runs/toy/clip/*")
    paths = [path for name in names for path in sorted(ROOT.glob(name))]
    if not (ROOT / "runs/uvit_fusion/model.safetensors").exists():
        raise Slip("there is no base model yet: python uvit_fusion.py --train")
    with zipfile.ZipFile("weights.zip", "w") as file:
        for path in paths:
            file.write(path, path.relative_to(ROOT))
    print("weights.zip: unpack it in the project's folder")


# ------------------------------------------------------------------------------------------- main
def parse_args():
    parser = argparse.ArgumentParser(prog="course", description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    numbers = dict(nargs="*", metavar="1.1", help="exercises (default: all)")
    make = actions.add_parser("make", help="make a copy to hand out")
    make.add_argument("out", type=Path, help="a new folder")
    make.add_argument("exercises", **numbers)
    make.add_argument("--week", type=int, help="the exercises of a week")
    make.add_argument("--plant", type=int, default=1, metavar="N",
                      help="exercises to mend get their Nth wrong block (default 1)")
    check = actions.add_parser("check", help="run the tests of exercises")
    check.add_argument("exercises", **numbers)
    grade = actions.add_parser("grade", help="grade a student's copy; this runs the student's code")
    grade.add_argument("submission", type=Path, help="the folder with the student's files")
    grade.add_argument("exercises", **numbers)
    grade.add_argument("--json", help="write Gradescope's results to this file")
    prove = actions.add_parser("prove", help="prove that the tests accept only right code")
    prove.add_argument("exercises", **numbers)
    prove.add_argument("--json", action="store_true", help="write course/results.json")
    actions.add_parser("pack", help="write trained weights to weights.zip")
    return parser.parse_args()


def main():
    args = parse_args()
    try:
        if args.action == "pack":
            return pack()
        exercises = choose(args.exercises, getattr(args, "week", None))
        if args.action == "make":
            return make(args.out, exercises, args.plant)
        if args.action == "grade":
            return grade(args.submission, exercises, args.json)
        if args.action == "check":
            sys.exit(check(exercises))
        from course import prove  # it loads torch, which the others do without
        sys.exit(prove.prove(exercises, args.json))
    except (Slip, OSError) as error:
        print(f"course: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
