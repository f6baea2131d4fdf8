"""Extracts plain prose from HTML files: one paragraph or list item per line; no tables, listings or
headers.

usage: html_text.py FILE.html ...   (standard library only; writes to standard output)
"""
import html.parser
import sys

BLOCKS = {"p", "li", "dd", "dt"}
SKIPPED = {"table", "pre", "script", "style", "head", "h1", "h2", "h3", "h4", "h5", "h6"}


class Prose(html.parser.HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.skip = 0
        self.words = []
        self.lines = []

    def flush(self):
        line = " ".join("".join(self.words).split())
        self.words = []
        if len(line) >= 40 and line[-1] in ".:!?":  # only sentences, no titles and links
            self.lines.append(line)

    def handle_starttag(self, tag, attrs):
        if ("class", "toc") in attrs or ("class", "navheader") in attrs or self.skip and tag == "div":
            self.skip += tag == "div"
        if tag in SKIPPED:
            self.skip += 1
        if tag in BLOCKS:
            self.flush()

    def handle_endtag(self, tag):
        if self.skip and (tag in SKIPPED or tag == "div"):
            self.skip -= 1
        if tag in BLOCKS:
            self.flush()

    def handle_data(self, data):
        if not self.skip:
            self.words.append(data)


for path in sys.argv[1:]:
    prose = Prose()
    with open(path, encoding="utf-8") as file:
        prose.feed(file.read())
    prose.flush()
    print("\n\n".join(prose.lines), end="\n\n")
