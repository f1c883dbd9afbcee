"""The documents: api.md leaves nothing out, the README is short, and links lead somewhere."""

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from nanovllm import LLM, CompletionOutput, Increment, Logprob, RequestOutput, SamplingParams
from nanovllm.config import Config
from nanovllm.outputs import RequestMetrics

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def section(title):
    """The text of api.md under a heading, up to the next one of its level or above."""
    level, api = title.split()[0], (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    return re.split(rf"\n#{{2,{len(level)}}} ", api.split(f"\n{title}\n")[1])[0]


def rows(title):
    """The first two cells of the rows of a section's table."""
    return [(name, cell.strip()) for name, cell in re.findall(r"^\| `(\w+)` \|(.*?)\|", section(title), re.M)]


@pytest.mark.parametrize(
    ("title", "settings"), [("## Options of LLM", Config), ("## Sampling parameters", SamplingParams)]
)
def test_every_setting_is_there_with_its_default(title, settings):
    defaults = [(f.name, "" if f.default is MISSING else f"`{f.default!r}`") for f in fields(settings)]
    assert rows(title) == defaults


@pytest.mark.parametrize("output", [RequestOutput, CompletionOutput, Increment, Logprob, RequestMetrics])
def test_every_field_of_an_output_is_there(output):
    names = output._fields if output is Logprob else [f.name for f in fields(output)]
    inherited = [f.name for f in fields(CompletionOutput)] if output is Increment else []
    assert inherited + [name for name, _ in rows(f"### {output.__name__}")] == list(names)


def test_every_public_method_is_there():
    headings = re.findall(r"^### (.*)", section("## Methods"), re.M)
    described = re.findall(r"`(\w+)`", " ".join(headings))
    assert sorted(described) == sorted(name for name in vars(LLM) if not name.startswith("_"))


def test_the_readme_is_short():
    assert len(DOCUMENTS[0].read_text(encoding="utf-8").splitlines()) <= 140


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if not link.startswith("http"):
            target = document.parent / path if path else document
            assert target.exists(), link
            headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.M) if anchor else []
            anchors = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
            assert not anchor or anchor in anchors, link
