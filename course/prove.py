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
import operator
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
    """The report of the tests, run in this process."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        quiet = ["-p", "no:terminal", "-p", "no:cacheprovider"]
        pytest.main([*tests, *quiet, f"--junitxml={report}", *flags])
        return course.read_report(report, tests)


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
    with pytest.MonkeyPatch.context() as patch:
        for file, name in functions:
            module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
            function = inspect.unwrap(operator.attrgetter(name)(module))
            code = find_code(compile(sources[file], str(ROOT / file), "exec"), name)
            patch.setattr(function, "__code__", code)
        yield


def round_trips(file, name):
    source = course.read(ROOT / file)
    empty = course.blank([(file, name)], "0.0", ROOT)[file]
    again = course.replace_body(empty, name, course.split_body(source, name)[1])
    return again == source != empty


def find_faults(exercise, blocks):
    """What is wrong with an exercise, a line each; blocks: its wrong blocks."""
    functions = exercise.functions
    faults = [f"{name} does not survive the round trip" for file, name in functions
              if not round_trips(file, name)]
    reasons = run_tests(exercise.tests)
    faults += [f"{test} does not pass" for test in exercise.tests if any(reasons[test])]
    with planted(functions, course.blank(functions, exercise.number, ROOT)):
        reasons = run_tests(exercise.tests)
    message = f"NotImplementedError: exercise {exercise.number}:"
    faults += [f"{test} does not fail on blank functions as it should" for test in exercise.tests
               if not all(message in reason for reason in reasons[test])]
    for one in functions:
        if not is_noticed(exercise, [one], course.blank([one], exercise.number, ROOT)):
            faults.append(f"no test needs {one[1]}")
    for name, hunks in blocks:
        if not is_noticed(exercise, functions, course.plant(exercise, hunks, ROOT)):
            faults.append(f"not noticed: {name}")
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
