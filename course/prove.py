"""`python -m course prove`: the tests of each exercise take the right code, and no wrong code.

    real      all of its tests pass
    blank     each of them fails, by the NotImplementedError of the exercise
    alone     to blank a single one of its functions is noticed, too
    wrong     each wrong block of TEACHERS.md fails a test
    round     a body that is taken out and put back, or handed in, is as it was

All in one process, which changes the code of the functions while the tests run: in seconds.
"""
import contextlib
import importlib
import inspect
import io
import os
import tempfile
import time
import types
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

import common  # noqa: E402
from course import __main__ as course  # noqa: E402
from course.__main__ import ROOT  # noqa: E402


def run_tests(tests, *flags):
    """{test: why each of its cases failed, "" for those that passed}"""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            pytest.main([*tests, "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *flags])
        return course.read_report(report)


def is_noticed(exercise, functions, sources):
    """Whether a test fails while functions run other code."""
    with planted(functions, sources):
        return any(map(any, run_tests(exercise.tests, "-x").values()))


def find_code(code, name):
    """The code of "Class.function" within a compiled file."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found = constant if constant.co_qualname == name else find_code(constant, name)
            if found:
                return found


@contextlib.contextmanager
def planted(functions, sources):
    """Within the block, functions [(file, name)] run the code that {file: code} has for them."""
    before = []
    for file, name in functions:
        function = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        for part in name.split("."):
            function = getattr(function, part)
        function = inspect.unwrap(function)
        before.append((function, function.__code__))
        function.__code__ = find_code(compile(sources[file], str(ROOT / file), "exec"), name)
    yield
    for function, code in before:
        function.__code__ = code


def blanked(number, functions):
    sources = {file: course.read(ROOT / file) for file, _ in functions}
    for file, name in functions:
        sources[file] = course.blank(sources[file], name, number)
    return sources


def round_trips(file, name):
    source = course.read(ROOT / file)
    empty = course.blank(source, name, "0.0")
    again = course.replace_body(empty, name, course.split_body(source, name)[1])
    return again == source != empty


def find_faults(exercise, blocks):
    """What is wrong with an exercise, a line each; blocks: its wrong blocks."""
    functions = exercise.functions
    faults = [f"{name} does not come back as it was" for file, name in functions
              if not round_trips(file, name)]
    reasons = run_tests(exercise.tests)
    faults += [f"{test} does not pass" for test in exercise.tests
               if any(reasons.get(test, ["it did not run"]))]
    with planted(functions, blanked(exercise.number, functions)):
        reasons = run_tests(exercise.tests)
    message = f"NotImplementedError: exercise {exercise.number}:"
    faults += [f"{test} does not fail on blank functions as it should" for test in exercise.tests
               if not all(message in reason for reason in reasons.get(test, [""]))]
    faults += [f"no test needs {name}" for file, name in functions if not is_noticed(
        exercise, [(file, name)], blanked(exercise.number, [(file, name)]))]
    faults += [f"not noticed: {name}" for name, hunks in blocks if not is_noticed(
        exercise, functions, course.plant(exercise, hunks, ROOT))]
    return faults if blocks else [*faults, "TEACHERS.md has no wrong block"]


def prove(exercises, write):
    """Prints a line for each exercise; write: results.json, too. Returns the exit status."""
    begin = time.time()
    os.chdir(ROOT)
    faults = []
    count = 0
    for exercise in exercises:
        if exercise.graded:
            blocks = course.read_wrong(exercise.number)
            found = find_faults(exercise, blocks)
            faults += found
            count += len(blocks)
            print(f"{exercise.number}  {len(exercise.tests)} tests, {len(blocks)} wrong blocks: "
                  f"{'; '.join(found) or 'proven'}", flush=True)
    caught = count - sum(fault.startswith("not noticed") for fault in faults)
    figures = {"exercises": len(exercises), "wrong_blocks": count, "caught": caught,
               "seconds": time.time() - begin}
    print("{exercises} exercises, {caught} of {wrong_blocks} wrong blocks caught, "
          "{seconds:.0f} s".format_map(figures))
    if write:
        common.write_results(ROOT / "course", figures)
    return bool(faults)
