"""What every page keeps: text is text, whatever stands in it."""

from myna.data.web_page import document, prose, text


def test_text_has_no_tags_and_nothing_that_cannot_be_seen() -> None:
    assert text('<b a="c">&\n\x1b\u202e') == "&lt;b a=&quot;c&quot;&gt;&amp;↵\n␛‹U+202E›"
    assert text("\ud800") == "?"


def test_prose_keeps_its_lines_and_nothing_else() -> None:
    assert prose("a\tb\n<i>\r\x00") == "a\tb\n&lt;i&gt;␍␀"


def test_a_page_forbids_the_browser_to_load_anything() -> None:
    page = document("<t>", ["<p>body</p>"], style="p { color: red }", footer=" · <f>")
    assert "<title>&lt;t&gt;</title>" in page and "· &lt;f&gt;</footer>" in page
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    assert "p { color: red }</style>" in page
