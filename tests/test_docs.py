"""The README and docs/ stay short, and everything they name exists: links, files, options, scripts.

Hazards: a page that grows too long; a link to a page or a heading that was renamed; an option, a file or a module
that no longer exists; a script without its execute bit; pages that MkDocs cannot build; a figure without command.
"""

import os
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec

import pytest
from helpers import documents
from helpers.documents import DOCUMENTS, PAGES, README, ROOT
from helpers.forked_python import forked_python

# Options of other programs that the documents name.
FOREIGN_OPTIONS = {"--gpus", "--user", "--build-context", "--strict", "--device", "--network", "--ipc"}


@pytest.fixture(params=DOCUMENTS, ids=lambda path: path.stem)
def document(request):
    return request.param


def test_no_document_is_longer_than_200_lines(document):
    assert len(document.read_text().splitlines()) <= 200


def test_every_page_is_in_the_navigation():
    assert sorted(PAGES) == sorted((ROOT / "docs").glob("*.md"))


def test_every_kind_of_block_is_known(document):
    blocks = [block for block in documents.BLOCKS if block.document == document]
    assert len(blocks) == document.read_text().count("```") / 2
    for block in blocks:
        assert block.language in ("sh", "python", "text")
        assert re.fullmatch(r"|cluster|self|file: \w+\.py", block.kind), block.kind


def test_every_link_leads_to_a_file_and_a_heading_that_exist(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", documents.prose(document)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), target
        assert not anchor or anchor in documents.headings(path), target


def test_the_readme_links_to_every_part_of_the_documentation():
    linked = set(re.findall(r"\]\(docs/(\w+\.md)", README.read_text()))
    assert linked >= {page.name for page in PAGES} - {"reference.md", "run_folder.md"}


@cache
def known_options() -> str:
    helps = ""
    benches = [f"bench.{name}" for name in ("adam", "step", "wire", "allreduce", "memory", "checkpoint", "data")]
    names = ["train", "evaluate", "predict", "export", "report", "compare", "doctor", "advise", *benches]
    names += ["simulate.calibrate", "simulate.predict", "simulate.tune"]
    for name in names:
        words = re.sub(r"(bench|simulate)\.", r"\1 ", f"hvd_adam.{name}").split()
        command = [sys.executable, "-m", *words, "--help"]
        helps += subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sources = [path for pattern in ("*.sh", "docker/*", "tests/*.py", "docs/*.py") for path in ROOT.rglob(pattern)]
    return helps + "".join(path.read_text() for path in sources if path.is_file() and ".venv" not in path.parts)


@pytest.mark.slow
def test_every_option_named_exists(document):
    for span in re.findall(r"`([^`\n]+)`", documents.prose(document)):
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span):
            assert option in FOREIGN_OPTIONS or option in known_options(), option


def test_every_file_named_exists(document):
    for path in re.findall(
        r"`((?:launch|docker|tests|docs|examples|hvd_adam)/[\w./*]*)`", documents.prose(document)
    ):
        assert list(ROOT.glob(path.rstrip("/"))), path


def test_every_module_and_script_in_a_command_exists_and_can_be_executed():
    figures = subprocess.run(
        [ROOT / "docs/make_figures.sh", "--list"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert figures
    spans = [span for path in DOCUMENTS for span in re.findall(r"`([^`\n]+)`", documents.prose(path))]
    for command in [*figures, *documents.commands("", "self", "cluster"), *spans]:
        for module in re.findall(r"-m (hvd_adam[\w.]*)", command):
            assert find_spec(module), command
        for script in re.findall(r"(?:^|[\s/])((?:launch|docker|docs|tests)/[\w/]+\.(?:sh|py))\b", command):
            assert (ROOT / script).exists(), command
            sourced = "/lib/" in script
            assert script.endswith(".py") or sourced or os.access(ROOT / script, os.X_OK), script


def test_every_figure_has_a_command():
    table = (ROOT / "docs/figures.md").read_text()
    figures = subprocess.run(["bash", ROOT / "docs/make_figures.sh", "--list"], capture_output=True, text=True)
    for command in figures.stdout.splitlines():
        assert f"`{command}`" in table, command
    rows = re.findall(r"^\| (?!figure|---|CPU|system|software).*\|$", table, re.MULTILINE)
    for row in filter(lambda row: row.count("|") == 4, rows):
        assert "`" in row.split("|")[3] or "the command above" in row, row


def test_the_scripts_of_the_figures_parse():
    subprocess.run(["bash", "-n", ROOT / "docs/make_figures.sh"], check=True)
    for script in (ROOT / "docs").glob("*.py"):
        subprocess.run([forked_python(), script, "--help"], check=True, capture_output=True)


def test_the_documents_show_or_name_every_example():
    examples = {path.name: path.read_text() for path in (ROOT / "examples").glob("*.py")}
    shown = documents.scripts()
    assert {name: examples.get(name) for name in shown} == shown
    text = "".join(path.read_text() for path in DOCUMENTS)
    assert not [name for name in examples if name not in text]


@pytest.mark.slow
def test_mkdocs_builds_the_pages_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_picture_is_shown_and_has_a_command_that_makes_it():
    table = (ROOT / "docs/figures.md").read_text()
    pictures = {path.resolve() for path in (ROOT / "docs").rglob("*.png")}
    for page in PAGES:
        for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", page.read_text()):
            pictures.remove((page.parent / target).resolve())
            assert f"({page.name}" in table, f"figures.md has no command for {target}"
    assert not pictures
    script = (ROOT / "docs/report_figure.py").read_text()
    for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", (ROOT / "docs/report.md").read_text()):
        assert f'folder / "{target}"' in script
