"""A clone is the same on Windows and macOS, which convert line ends and ignore case."""

import re
import subprocess

from conftest import ROOT
from emotion.utils.files import check_covered


def git(*args) -> str:
    return subprocess.run(["git", *map(str, args)], check=True, capture_output=True, text=True).stdout


def test_line_ends_are_not_converted(tmp_path):
    clone = tmp_path / "clone"
    git("clone", "--no-checkout", ROOT, clone, "--config", "core.autocrlf=true")
    git("-C", clone, "checkout", "HEAD", "--", ".gitattributes", "weights/qat-int4")
    check_covered(clone / "weights" / "qat-int4")


def test_names_fit_every_system():
    names = git("-C", ROOT, "ls-files").splitlines()
    assert max(map(len, names)) < 150
    assert len({name.lower() for name in names}) == len(names)
    assert not [name for name in names if re.search(r'[<>:"|?*\\]|[ .](/|$)', name)]
