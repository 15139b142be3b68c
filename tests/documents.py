"""Code blocks of a document in Markdown, and the program that its Python makes."""

from __future__ import annotations

import re


def blocks(text: str) -> list[tuple[str, str]]:
    """Kind and content of every fenced block, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S)


def program(text: str) -> str:
    """The Python of a document, as one program."""
    return "\n\n".join(content for kind, content in blocks(text) if kind == "python")
