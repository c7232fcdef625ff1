"""Explanations as a page and as text: whole, self-contained, safe with any text, and on the command line."""

import json
import re
import signal
import subprocess
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from browser import Browser, chromium
from processes import code_of, start, start_ranks
from test_collab_command import command, refusal
from test_resume import kill_when

from corpora import sample
from decode.collab import main
from decode.engine.attribution import Explanation
from decode.explain.page import Explained, PageWriter
from decode.explain.text import in_colours, plain
from decode.pipeline.record import Record
from decode.pipeline.config import Options
from minillama import Tokenizer

SENTENCES = [*sample().source[:5], "", *sample().source[5:9]]
HOSTILE = "</script><script>alert(1)</script><!-- <b>\u2028 &amp; \"'\\ ]]> @@end@@ 文\U0001f600"
VOID = {"meta", "link", "input", "br", "hr", "img"}


class Page(HTMLParser):
    """Balanced elements, the attributes of all, and the text of each script by its id."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.scripts = [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []
        assert text.startswith("<!doctype html>")

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts[dict(attributes).get("id", "")] = ""
            self.script = dict(attributes).get("id", "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts[self.script] += data

    @property
    def run(self):
        return json.loads(self.scripts["run"])

    @property
    def end(self):
        return json.loads(self.scripts["end"])

    @property
    def sentences(self):
        return [json.loads(line) for line in self.scripts["sentences"].split("\n") if line]


def page_of(path):
    return Page(path.read_text(encoding="utf-8"))


def made(pieces=None, references=(), weights=None, **options):
    weights = {"L": 1.0, "S_src": 0.5, "S_base": -0.25} if weights is None else weights
    pieces = {7: b" dog", 8: b"\xe3\x81", 9: b"<|end|>"} if pieces is None else pieces
    return Explained(weights, Options("ja", "en", **options), pieces, references)


def token(number, margin=1.0, ranks=(1, 2, 3)):
    pushes = [margin - 0.5, 0.75, -0.25]
    return Explanation(number, -0.5, 8, -0.5 - margin, [-0.1, -2.0, -9.0], list(ranks), pushes, [7, 8, 9], [-0.1] * 3)


RECORD = Record(0, "the dog", [7, 8], [-0.5, -0.5], "stop", explanations=[list(token(n)) for n in (7, 8, 9)])


def arguments(folders, folder, *extra):
    source = folder / "src.txt"
    if not source.exists():
        source.write_text("\n".join(SENTENCES) + "\n", encoding="utf-8")
    models = ["--model", f"A={folders['A']}", "--model", f"C={folders['C']}", "--combine", "A + 0.5*C"]
    texts = ["--source", "ja", "--target", "en", "--input", str(source), "--output", str(folder / "hyp.txt")]
    return [*models, *texts, "--max-new-tokens", "10", *extra]


def test_the_page_stands_by_itself_and_holds_any_text(tmp_path):
    pieces = {7: HOSTILE.encode(), 8: b"\xe3\x81", 9: b"</script>"}
    with PageWriter(str(tmp_path / "r.html"), made(pieces, ["", HOSTILE])) as writer:
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


def test_figures_have_four_decimals_and_the_decider_behind_them(tmp_path):
    values = token(7)._replace(logprob=-0.123456, pushes=[0.98765432, 0.0, -0.5])
    with PageWriter(str(tmp_path / "r.html"), made()) as writer:
        writer.put_sentence(0, "s", Record(0, "t", [7], [-0.5], "length", explanations=[list(values)]))
    *figures, decider = page_of(tmp_path / "r.html").sentences[0]["tokens"][0]
    expected = [7, -0.1235, 8, -1.5, [-0.1, -2.0, -9.0], [1, 2, 3], [0.9877, 0.0, -0.5], [7, 8, 9], [-0.1] * 3]
    assert figures == expected
    assert decider == 0


def test_what_decides_where_no_member_does(tmp_path):
    for options, other in (({}, "nobody"), ({"sample": True}, "the draw"), ({"beam": 4}, "the search")):
        with PageWriter(str(tmp_path / "r.html"), made(**options)) as writer:
            behind = Record(0, "t", [7], [-0.5], "length", explanations=[list(token(7, margin=-1.0))])
            writer.put_sentence(0, "s", behind)
        page = page_of(tmp_path / "r.html")
        assert page.run["other"] == other
        assert page.sentences[0]["tokens"][0][-1] == -1


def test_a_page_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "r.html"
    path.write_text("an older page")
    with pytest.raises(KeyboardInterrupt), PageWriter(str(path), made()):
        raise KeyboardInterrupt
    assert path.read_text() == "an older page"

    def interrupted(writer):
        writer.put_sentence(2, "s", RECORD)
        assert path.read_text() == "an older page"
        writer.write_finished()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), PageWriter(str(path), made()) as writer:
        interrupted(writer)
    page = page_of(path)
    assert not page.end["whole"]
    assert len(page.sentences) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["r.html"]


def test_text_is_aligned_and_says_the_same():
    lines = plain(made(references=["a dog"]), 0, "犬", RECORD).split("\n")
    assert lines[:3] == ["1  犬", "   the dog", "   reference: a dog"]
    assert lines[3:] == [
        "    token     p     by     L              S_src          S_base          ahead  runner-up",
        "    dog       0.61  S_src  0.90 #1 +0.50  0.14 #2 +0.75  1e-04 #3 -0.25  1.00   \\xe3\\x81 0.22",
        "    \\xe3\\x81  0.61  S_src  0.90 #1 +0.50  0.14 #2 +0.75  1e-04 #3 -0.25  1.00   \\xe3\\x81 0.22",
        "    <|end|>   0.61  S_src  0.90 #1 +0.50  0.14 #2 +0.75  1e-04 #3 -0.25  1.00   \\xe3\\x81 0.22",
        "",
    ]


def test_a_terminal_gets_colours_and_no_control_characters_of_a_text():
    explained = made({7: b"\x1b[31m\n", 8: b" ", 9: b"e"}, ["\x1b[2J"])
    record = replace(RECORD, text="\x1b[2Jdog")
    text, bare = (write(explained, 0, "犬\u3000\x1b[2J\u2028", record) for write in (in_colours, plain))
    assert "\x1b[1;33m" in text  # bold in the second member's colour
    assert "\x1b" not in bare
    for shown in (text, bare):
        assert "\x1b[2J" not in shown
        assert "\x1b[31m\n" not in shown
        assert "犬\u3000\\x1b[2J\\u2028" in shown
        assert "\\x1b[31m\\n" in shown


def test_the_command_writes_translations_as_before_and_a_page_of_all_lines(model_folders, tmp_path):
    assert main(arguments(model_folders, tmp_path)) == 0
    expected = (tmp_path / "hyp.txt").read_bytes()
    details = tmp_path / "details.jsonl"
    extra = ("--explain", str(tmp_path / "r.html"), "--details", str(details), "--reference", str(tmp_path / "src.txt"))
    assert main(arguments(model_folders, tmp_path, *extra)) == 0
    assert (tmp_path / "hyp.txt").read_bytes() == expected
    page = page_of(tmp_path / "r.html")
    assert page.run["members"] == [["A", 1.0], ["C", 0.5]]
    assert page.end["whole"]
    assert [s["line"] for s in page.sentences] == [1, 2, 3, 4, 5, 7, 8, 9, 10]
    assert [s["source"] for s in page.sentences] == [s["reference"] for s in page.sentences]
    assert [s["source"] for s in page.sentences] == [sentence for sentence in SENTENCES if sentence]
    tokenizer = Tokenizer.from_pretrained(model_folders["A"])
    entries = [json.loads(line) for line in details.read_text(encoding="utf-8").splitlines()]
    for sentence in page.sentences:
        entry = entries[sentence["line"] - 1]
        assert sentence["text"] == entry["text"]
        assert [figures[0] for figures in sentence["tokens"]][: len(entry["tokens"])] == entry["tokens"]
        assert [found[0] for found in entry["explanations"]] == [figures[0] for figures in sentence["tokens"]]
        for figures in sentence["tokens"]:
            piece = page.end["pieces"][str(figures[0])]
            assert "\\x" in piece or piece == tokenizer.decode([figures[0]]) or figures[0] in (0, 1)


def test_explained_sentences_survive_a_kill(model_folders, tmp_path):
    page = tmp_path / "r.html"
    extra = ("--explain", str(page), "--batch-size", "2")
    assert main(arguments(model_folders, tmp_path, *extra)) == 0
    expected = page.read_bytes()
    page.unlink()
    (tmp_path / "hyp.txt").unlink()
    kill_when(start(arguments(model_folders, tmp_path, *extra)), tmp_path / "hyp.txt.journal", 3)
    assert not page.exists()
    assert main(arguments(model_folders, tmp_path, *extra, "--resume")) == 0
    assert page.read_bytes() == expected


def test_a_run_without_explanations_is_not_resumed_by_one_with_them(model_folders, tmp_path, capsys):
    kill_when(start(arguments(model_folders, tmp_path, "--batch-size", "2")), tmp_path / "hyp.txt.journal", 3)
    extra = ("--resume", "--explain", str(tmp_path / "r.html"))
    error = refusal(arguments(model_folders, tmp_path, *extra), capsys)
    assert "explain was False, is True; --no-resume starts afresh" in error
    assert not (tmp_path / "r.html").exists()


def test_two_processes_make_one_page(model_folders, tmp_path):
    page = tmp_path / "r.html"
    extra = ("--explain", str(page), "--batch-size", "2")
    assert main(arguments(model_folders, tmp_path, *extra)) == 0
    alone = page_of(page)
    page.unlink()
    processes = start_ranks(arguments(model_folders, tmp_path, *extra), 2, tmp_path)
    assert [code_of(process) for process in processes] == [0, 0]
    together = page_of(page)
    assert together.end == alone.end
    for one, other in zip(alone.sentences, together.sentences, strict=True):
        assert [figures[0] for figures in one["tokens"]] == [figures[0] for figures in other["tokens"]]


def test_standard_input_is_explained_as_it_streams(model_folders, tmp_path):
    page = tmp_path / "r.html"
    argv = arguments(model_folders, tmp_path, "--input", "-", "--output", "-", "--explain", str(page))
    with command(*argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for sentence in SENTENCES[:3]:
            process.stdin.write(sentence.encode() + b"\n")
            process.stdin.flush()
            assert process.stdout.readline().endswith(b"\n")
        process.stdin.close()
        assert process.wait(60) == 0
    assert [sentence["source"] for sentence in page_of(page).sentences] == SENTENCES[:3]


def test_an_interrupted_run_leaves_the_page_of_what_was_finished(model_folders, tmp_path):
    (tmp_path / "src.txt").write_text("\n".join(sorted(sample().source, key=len)[::-1] * 20) + "\n", encoding="utf-8")
    argv = arguments(model_folders, tmp_path, "--batch-size", "2", "--explain", str(tmp_path / "r.html"))
    with command(*argv) as process:
        process.stderr.readline()  # what it will do
        while not ((tmp_path / "hyp.txt").exists() and (tmp_path / "hyp.txt").stat().st_size):
            time.sleep(0.02)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        error = process.stderr.read().decode()
        assert process.wait(60) == 130
    count = int(re.search(r"interrupted: ([\d,]+) of 800", error)[1].replace(",", ""))
    page = page_of(tmp_path / "r.html")
    assert len(page.sentences) == count
    assert not page.end["whole"]


def test_as_text_it_takes_the_place_of_the_translations_on_standard_output(model_folders, tmp_path, capfd):
    assert main(arguments(model_folders, tmp_path)) == 0
    translations = (tmp_path / "hyp.txt").read_text(encoding="utf-8").split("\n")
    capfd.readouterr()
    assert main(arguments(model_folders, tmp_path, "--output", "-", "--explain", "-")) == 0
    blocks = capfd.readouterr().out.split("\n\n")
    assert len([block for block in blocks if block.strip()]) == len(SENTENCES) - 1
    shown = re.sub("[\x00-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", translations[0])
    assert blocks[0].split("\n")[:2] == [f"1  {SENTENCES[0]}", f"   {shown}"]
    assert main(arguments(model_folders, tmp_path, "--explain", "-")) == 0
    assert capfd.readouterr().out.startswith(f"1  {SENTENCES[0]}")
    assert (tmp_path / "hyp.txt").read_text(encoding="utf-8").split("\n") == translations
    assert main(arguments(model_folders, tmp_path, "--output", "/dev/null", "--beam", "2", "--explain", "-")) == 0
    assert capfd.readouterr().out.startswith(f"1  {SENTENCES[0]}")


def test_a_page_that_cannot_be_written_is_refused_before_anything_is(model_folders, tmp_path, capsys):
    for file, named in (
        ("/no/such/folder/r.html", "/no/such/folder/r.html: cannot be written"),
        (str(tmp_path / "src.txt"), "is also an input"),
        (str(tmp_path), "is a folder"),
    ):
        assert named in refusal(arguments(model_folders, tmp_path, "--explain", file), capsys)
    assert not (tmp_path / "hyp.txt").exists()


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="needs Chromium: apt-get install chromium")
def test_the_page_in_a_browser_by_keyboard_dark_and_on_a_phone(tmp_path):
    path = tmp_path / "r.html"
    with PageWriter(str(path), made()) as writer:
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
