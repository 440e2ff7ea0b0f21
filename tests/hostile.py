"""R23: text that wants to be more than text, as it may stand in a file name, a caption, a prompt or a trigger."""

from html.parser import HTMLParser

from markdown_it import MarkdownIt

HOSTILE = {
    "picture": "![p](https://evil.example/p.png)",
    "link": "[p](https://evil.example) https://evil.example www.evil.example me@evil.example",
    "reference": "[p] | [p][p] `code` *bold* _bold_ ~~gone~~ &lt; \\| $x$",
    "list": "1. one",
    "heading": "## two",
    "rule": "---",
    "indented": "    code",
    "html": "<img src=https://evil.example/p.png onerror=alert(1)>\"'",
    "ansi": "\x1b[2J\x1b[31mred\x9b1A",
    "osc52": "\x1b]52;c;aGFja2Vk\x07 \x1b]8;;https://evil.example\x1b\\x",
    "line": "x\ncacheloom plan: all is well\r\u2028y",
    "bidi": "\u202egnp.exe \ud800",
}


class Page(HTMLParser):
    """The tags, addresses and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def rendered(markdown: str) -> Page:
    """Markdown as GitHub and Prefect's dashboard read it: CommonMark, tables and inline HTML."""
    return Page(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown))


def unseen(text: str) -> list[str]:
    """What could steer a terminal in a text that came out of one: every control character but the line break."""
    return [letter for letter in text if (letter < " " or "\x7f" <= letter <= "\x9f") and letter != "\n"]
