"""Every command that README, docs and course show is one that the scripts understand."""
import argparse
import re
import shlex
from pathlib import Path

import pytest
from conftest import run

import common

ROOT = Path(common.__file__).parent


def shown_commands():
    commands = set()
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("course/*.md")]:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for found in re.findall(r"(?:python|_node \d+) (?:-m )?(\w+\.(?:py|\w+) [^`\n]*)", text):
            commands.add(shlex.join(shlex.split(found, comments=True)))
    return sorted(commands)


@pytest.mark.parametrize("command", shown_commands())
def test_every_command_that_the_pages_show_is_understood(command, monkeypatch):
    class Understood(Exception):
        pass
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self):
        parse_args(self)
        raise Understood
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    script, *flags = shlex.split(command)
    with pytest.raises(Understood):
        run(script, *flags, cwd=ROOT)
