"""Explanations as a page and as text: complete, self-contained, safe with any text, usable by keyboard."""

import re
from dataclasses import replace

import pytest
from browser import Browser, chromium
from pages import page_of

from decode.engine.attribution import Explanation
from decode.explain.page import ExplainedRun, PageWriter
from decode.explain.text import in_colours, plain
from decode.pipeline.config import Options
from decode.pipeline.journal import Record

HOSTILE = "</script><script>alert(1)</script><!-- <b>\u2028 &amp; \"'\\ ]]> @@end@@ 文\U0001f600"


def run_of(pieces=None, references=(), weights=None, **options):
    weights = {"L": 1.0, "S_src": 0.5, "S_base": -0.25} if weights is None else weights
    pieces = {7: b" dog", 8: b"\xe3\x81", 9: b"<|end|>"} if pieces is None else pieces
    return ExplainedRun(weights, Options("ja", "en", **options), pieces, references)


def token(number, margin=1.0, ranks=(1, 2, 3)):
    pushes = [margin - 0.5, 0.75, -0.25]
    return Explanation(number, -0.5, 8, -0.5 - margin, [-0.1, -2.0, -9.0], list(ranks), pushes, [7, 8, 9], [-0.1] * 3)


RECORD = Record(0, "the dog", [7, 8], [-0.5, -0.5], "stop", explanations=[list(token(n)) for n in (7, 8, 9)])


def test_the_page_is_self_contained_and_holds_any_text(tmp_path):
    pieces = {7: HOSTILE.encode(), 8: b"\xe3\x81", 9: b"</script>"}
    with PageWriter(str(tmp_path / "r.html"), run_of(pieces, ["", HOSTILE])) as writer:
        writer.put_sentence(1, HOSTILE, Record(1, HOSTILE, [7], [-0.5], "length", explanations=[list(token(7))]))
        writer.put_sentence(0, "", None)
    page = page_of(tmp_path / "r.html")
    assert set(page.scripts) == {"run", "sentences", "end", ""}
    (sentence,) = page.sentences
    assert (sentence["line"], sentence["source"], sentence["reference"], sentence["text"]) == (2, *[HOSTILE] * 3)
    assert page.end == {"whole": True, "pieces": {"7": HOSTILE, "8": "\\xe3\\x81", "9": "</script>"}}
    # Nothing is loaded: no address but the empty icon, no import, no url() in the style, and a policy that forbids it.
    addresses = [value for name, value in page.attributes if name in ("src", "href", "action", "data", "srcset")]
    assert addresses == ["data:,"]
    assert any(value.startswith("default-src 'none'") for name, value in page.attributes if name == "content")
    text = (tmp_path / "r.html").read_text(encoding="utf-8").replace("@@end@@ 文", "")
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttpRequest|innerHTML|@@", text)


def test_figures_have_four_decimals_and_the_deciding_member_is_last(tmp_path):
    values = token(7)._replace(logprob=-0.123456, pushes=[0.98765432, 0.0, -0.5])
    with PageWriter(str(tmp_path / "r.html"), run_of()) as writer:
        writer.put_sentence(0, "s", Record(0, "t", [7], [-0.5], "length", explanations=[list(values)]))
    *figures, decider = page_of(tmp_path / "r.html").sentences[0]["tokens"][0]
    expected = [7, -0.1235, 8, -1.5, [-0.1, -2.0, -9.0], [1, 2, 3], [0.9877, 0.0, -0.5], [7, 8, 9], [-0.1] * 3]
    assert figures == expected
    assert decider == 0


def test_what_decides_if_no_member_does(tmp_path):
    for options, other in (({}, "no member"), ({"sample": True}, "sampling"), ({"beam": 4}, "the search")):
        with PageWriter(str(tmp_path / "r.html"), run_of(**options)) as writer:
            record = Record(0, "t", [7], [-0.5], "length", explanations=[list(token(7, margin=-1.0))])
            writer.put_sentence(0, "s", record)
        page = page_of(tmp_path / "r.html")
        assert page.run["other"] == other
        assert page.sentences[0]["tokens"][0][-1] == -1


def test_a_page_is_written_atomically(tmp_path):
    path = tmp_path / "r.html"
    path.write_text("an older page")
    with pytest.raises(KeyboardInterrupt), PageWriter(str(path), run_of()):
        raise KeyboardInterrupt
    assert path.read_text() == "an older page"

    def interrupted(writer):
        writer.put_sentence(2, "s", RECORD)
        assert path.read_text() == "an older page"
        writer.write_finished()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), PageWriter(str(path), run_of()) as writer:
        interrupted(writer)
    page = page_of(path)
    assert not page.end["whole"]
    assert len(page.sentences) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["r.html"]


def test_text_is_aligned_and_has_the_same_figures():
    lines = plain(run_of(references=["a dog"]), 0, "犬", RECORD).split("\n")
    assert lines[:3] == ["1  犬", "   the dog", "   reference: a dog"]
    assert lines[3:] == [
        "    token     p     decider  L              S_src          S_base          margin  runner-up",
        "    dog       0.61  S_src    0.90 #1 +0.50  0.14 #2 +0.75  1e-04 #3 -0.25  1.00    \\xe3\\x81 0.22",
        "    \\xe3\\x81  0.61  S_src    0.90 #1 +0.50  0.14 #2 +0.75  1e-04 #3 -0.25  1.00    \\xe3\\x81 0.22",
        "    <|end|>   0.61  S_src    0.90 #1 +0.50  0.14 #2 +0.75  1e-04 #3 -0.25  1.00    \\xe3\\x81 0.22",
        "",
    ]


def test_a_member_that_is_left_out_has_no_figures(tmp_path):
    values = token(7)._replace(
        logprobs=[-0.1, None, -9.0],
        ranks=[1, None, 3],
        pushes=[1.25, 0.0, -0.25],
        bests=[7, None, 9],
        best_logprobs=[-0.1, None, -0.1],
    )
    record = Record(0, "t", [7], [-0.5], "length", explanations=[list(values)])
    assert "0.90 #1 +1.25  –" in plain(run_of(), 0, "s", record)
    with PageWriter(str(tmp_path / "r.html"), run_of()) as writer:
        writer.put_sentence(0, "s", record)
    page = page_of(tmp_path / "r.html")
    assert page.sentences[0]["tokens"][0][4:6] == [[-0.1, None, -9.0], [1, None, 3]]
    assert set(page.end["pieces"]) == {"7", "8", "9"}


def test_a_terminal_gets_colours_and_no_control_characters_of_a_text():
    explained = run_of({7: b"\x1b[31m\n", 8: b" ", 9: b"e"}, ["\x1b[2J"])
    record = replace(RECORD, text="\x1b[2Jdog")
    text, bare = (write(explained, 0, "犬\u3000\x1b[2J\u2028", record) for write in (in_colours, plain))
    assert "\x1b[1;33m" in text  # bold in the second member's colour
    assert "\x1b" not in bare
    for shown in (text, bare):
        assert "\x1b[2J" not in shown
        assert "\x1b[31m\n" not in shown
        assert "犬\u3000\\x1b[2J\\u2028" in shown
        assert "\\x1b[31m\\n" in shown


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="needs Chromium: apt-get install chromium")
def test_the_page_in_a_browser_by_keyboard_dark_and_on_a_phone(tmp_path):
    path = tmp_path / "r.html"
    with PageWriter(str(path), run_of()) as writer:
        for line in range(120):
            ranks = (2, 1, 1) if line == 3 else (1, 1, 1)
            explanations = [list(token(n, ranks=ranks if n == 8 else (1, 1, 1))) for n in (7, 8, 9)]
            source = HOSTILE if line == 5 else f"犬 {line}"
            writer.put_sentence(
                line, source, Record(line, "dog", [7, 8], [-0.5] * 2, "stop", explanations=explanations)
            )
    focused = "document.activeElement.getAttribute('aria-label')"
    panel = "document.getElementById('panel').innerText"
    with Browser() as browser:
        browser.open(str(path))
        assert browser.value("document.querySelectorAll('article').length") == 50
        assert "All 120 sentences" in browser.value("document.getElementById('count').textContent")
        assert browser.value("document.querySelector('#s6 .source').textContent") == HOSTILE
        browser.value("document.getElementById('decided').focus()")
        browser.press("Tab")
        assert browser.value(focused) == "dog, 0.61, decided by S_src"
        assert browser.value(panel).startswith("␣dog 0.61")
        assert browser.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        browser.press("ArrowRight", "ArrowDown", "ArrowDown", "ArrowDown", "End", "ArrowLeft")
        assert browser.value("document.activeElement.closest('article').id") == "s4"
        assert browser.value(focused) == "\\xe3\\x81, 0.61, decided by S_src, L overruled"
        assert browser.value("location.hash") == "#4.2"
        assert "L is overruled." in browser.value(panel)
        assert "+1.00" in browser.value(panel)
        browser.press("Escape")
        assert "Choose a token" in browser.value(panel)
        browser.press("/", "9", "9")
        browser.wait("document.querySelectorAll('article').length === 1")
        assert browser.value("document.querySelector('article').id") == "s100"
        for name, value, event in (("text", "", "input"), ("overruled", "0", "change")):
            browser.value(f"document.getElementById('{name}').value = '{value}'")
            browser.value(f"document.getElementById('{name}').dispatchEvent(new Event('{event}'))")
        browser.wait("document.querySelectorAll('article').length === 1")
        assert browser.value("document.querySelectorAll('.token:not(.dim)').length") == 1
        light = browser.value("getComputedStyle(document.body).backgroundColor")
        for dark in (False, True):
            browser.open(f"{path}#4.2", width=390, height=844, scale=2, dark=dark)
            assert browser.value("innerWidth") == 390
            assert browser.value("document.documentElement.scrollWidth") == 390
            assert browser.value("document.getElementById('panel').scrollWidth") <= 390
            assert (browser.value("getComputedStyle(document.body).backgroundColor") == light) != dark
        assert browser.problems == []
