"""An explanation page, parsed: its scripts' JSON."""

import json
from html.parser import HTMLParser

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
