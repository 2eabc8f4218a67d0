"""The README and the pages of docs/, and the fenced blocks in them.

A comment on the line before a block gives its kind:

    (none)                run in order in a copy of the repository
    <!-- cluster -->      needs several hosts, Slurm, Docker or Kubernetes: checked, not run
    <!-- self -->         is the test run itself, or takes minutes: checked, not run
    <!-- file: NAME -->   Python that is saved as NAME for the commands that follow
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
NAVIGATION = re.findall(r"\b([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
PAGES = [ROOT / "docs" / name for name in NAVIGATION]
DOCUMENTS = [README, *PAGES]  # in reading order

_BLOCK = re.compile(r"^(?:<!-- (.*?) -->\n)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its document, its kind ("" without a comment), its language and its text."""

    document: Path
    kind: str
    language: str
    text: str


BLOCKS = [Block(path, *match) for path in DOCUMENTS for match in _BLOCK.findall(path.read_text())]


def commands(*kinds: str) -> list[str]:
    """Returns the commands of the `sh` blocks of these kinds, each once, in reading order."""
    blocks = [block for block in BLOCKS if block.language == "sh" and block.kind in kinds]
    return list(dict.fromkeys(line for block in blocks for line in block.text.splitlines()))


def scripts() -> dict[str, str]:
    """Returns the Python files that commands run, by name."""
    files = [block for block in BLOCKS if block.kind.startswith("file: ")]
    return {block.kind.removeprefix("file: "): block.text for block in files}


def prose(path: Path) -> str:
    """Returns a document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def headings(path: Path) -> set[str]:
    """Returns the anchors of a document's headings, as MkDocs and GitHub make them."""
    titles = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}
