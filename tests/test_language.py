"""Texts and names use the project's terms: data files at the root list what to avoid and what to write instead.

Hazards: a term that a reader of this field does not know; two terms for one thing.
"""

import re
from pathlib import Path

import pytest
from helpers.training_runs import ROOT

FOLDERS = ("hvd_adam", "launch", "docker", "tests", "docs", "examples", ".github")
SUFFIXES = {".py", ".sh", ".md", ".toml", ".cfg", ".yml", ".yaml", ".txt", ".cmake", ".rules", ".job", ""}


def rules() -> dict[str, str]:
    """Returns what to write instead, by the pattern of what to avoid."""
    words = dict(line.split("->") for line in ROOT.joinpath(".codespell-project.txt").read_text().splitlines())
    lines = ROOT.joinpath(".phrases-project.txt").read_text().splitlines()
    return words | dict(line.split(" -> ") for line in lines if not line.startswith("#"))


def texts() -> dict[Path, str]:
    files = [path for path in ROOT.iterdir() if path.suffix in (".md", ".cfg", ".toml", ".yml")]
    for folder in FOLDERS:
        files += [path for path in ROOT.joinpath(folder).rglob("*") if "__pycache__" not in path.parts]
    own = [
        path for path in files if path.suffix in SUFFIXES and path.name != "LICENSE" and ".min." not in path.name
    ]
    return {path: path.read_text() for path in own if path.is_file()}


TEXTS = texts()


def places(pattern: str) -> list[str]:
    """Returns file, line and match of each use of a phrase."""
    gap = r"(?:[^\S\n]*\n[^\S\n]*(?:[#>*-]+[^\S\n]+)?|[ _-])"
    phrase = re.compile(rf"(?<![A-Za-z])(?:{pattern.replace(' ', gap)})(?![A-Za-z])", re.IGNORECASE)
    return [
        f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {match.group()!r}"
        for path, text in TEXTS.items()
        for match in phrase.finditer(text)
    ]


@pytest.mark.parametrize(("pattern", "instead"), rules().items(), ids=lambda text: text[:30])
def test_words_to_avoid_occur_nowhere(pattern, instead):
    found = places(pattern)
    assert not found, f"write {instead!r}:\n" + "\n".join(found)


def test_line_breaks_comments_and_names_are_searched():
    made = ROOT / "example"
    TEXTS[made] = "It was\n# not here\ndef test_was_not_here(): pass\n"
    try:
        assert [place.split(":")[1] for place in places("was not here") if place.startswith("example")] == [
            "1",
            "3",
        ]
        assert not [place for place in places("as not") if place.startswith("example")]
    finally:
        del TEXTS[made]
