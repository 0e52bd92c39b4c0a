"""Reading pages back, and a browser that shows them."""

from __future__ import annotations

import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder


class Page(HTMLParser):
    """The elements of a page. What is not closed, or closed in another order, or an attribute given twice, fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.builder, self.open = TreeBuilder(), list[str]()
        self.feed(text)
        self.close()
        assert self.open == []
        self.root: Element = self.builder.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names))
        self.builder.start(tag, {name: value or "" for name, value in attrs})
        if tag in ("meta", "link", "img", "source"):
            self.builder.end(tag)
        else:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.builder.end(tag)

    def handle_data(self, data: str) -> None:
        self.builder.data(data)

    def find(self, path: str) -> list[Element]:
        return self.root.findall(f".//{path}")

    def at(self, name: str) -> Element:
        (found,) = self.find(f"*[@id='{name}']")
        return found


def text(element: Element) -> str:
    return " ".join("".join(element.itertext()).split())


def shown(element: Element) -> str:
    """The text but for the titles and descriptions of pictures."""
    if element.tag in ("title", "desc"):
        return ""
    return (element.text or "") + "".join(shown(child) + (child.tail or "") for child in element)


def browse(browser: str, folder: Path, file: Path, *options: str) -> str:
    """What Chromium prints of a file."""
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    command = [browser, *words, f"--user-data-dir={folder / 'profile'}", *options, file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
