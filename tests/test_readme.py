"""README.md and README.zh.md say the same: commands, outputs, numbers and links, part by part."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"^```.*?^```$|(?:^ {4}\S[^\n]*\n?)+", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)]+)\)")
LANGUAGES = ("README.md", "README.zh.md")


def parts(name: str) -> list[str]:
    return re.split(r"^## ", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)


def links(text: str) -> list[str]:
    """Their targets; places within the page have names in its language."""
    targets = [target for target in LINK.findall(text) if target not in LANGUAGES]
    return sorted("#" if target.startswith("#") else target for target in targets)


def numbers(text: str) -> list[str]:
    return sorted(re.findall(r"\d+(?:[.,]\d+)*", LINK.sub("", CODE.sub("", text))))


ENGLISH, CHINESE = map(parts, LANGUAGES)


def test_they_have_the_same_parts() -> None:
    assert len(ENGLISH) == len(CHINESE)


@pytest.mark.parametrize("number", range(len(ENGLISH)), ids=[part[:20] for part in ENGLISH])
def test_a_part_has_the_same_code_numbers_and_links(number: int) -> None:
    english, chinese = ENGLISH[number], CHINESE[number]
    assert CODE.findall(chinese) == CODE.findall(english)
    assert numbers(chinese) == numbers(english)
    assert links(chinese) == links(english)


@pytest.mark.parametrize("name", LANGUAGES)
def test_places_within_the_page_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings}
    for target in LINK.findall(text):
        if target.startswith("#"):
            assert target[1:] in slugs
