"""The figures, tables and links on the page of a report."""

from html.parser import HTMLParser

import pandas as pd

EMPTY = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source"}


class Page(HTMLParser):
    """Figures, tables and links, by the name of the figure that they are in."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.images, self.tables, self.targets, self.open = [], {}, {}, [], []
        self.text, self.figure, self.downloads = "", None, {}
        self.best, self.hover, self.looks, self.legends = {}, {}, {}, 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if "id" in found:
            self.ids.append(found["id"])
        if tag == "figure":
            self.figure = found["id"]
        if tag == "img":
            self.images[self.figure] = found
        if tag == "table":
            self.tables[self.figure] = []
        if tag == "tr":
            self.tables[self.figure].append([])
        if tag in ("td", "th"):
            self.tables[self.figure][-1].append("")
        if found.get("class") == "best":
            rows = self.tables[self.figure]
            self.best.setdefault(self.figure, []).append((len(rows) - 1, len(rows[-1]) - 1))
        self.legends += found.get("class") == "legend"
        if "title" in found:
            self.hover.setdefault(self.figure, []).append(found["title"])
        if {"stroke", "fill"} & {*found}:  # of a swatch, which stands before its label
            look = found.get("stroke"), found.get("stroke-dasharray"), found.get("fill")
            self.looks.setdefault(self.figure, []).append(look)
        if "download" in found:
            self.downloads[found["download"]] = found["href"]
        self.targets += [
            found[n] for n in ("src", "href", "srcset", "data", "action") if n in found
        ]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag  # well nested
        if tag == "figure":
            self.figure = None

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & {*self.open}:
            self.tables[self.figure][-1][-1] += data


def read(out, name):
    """Read the numbers of a figure or table."""
    return pd.read_csv(out / f"{name}.csv")
