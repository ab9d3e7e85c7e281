"""What the site has beyond the pages of docs/: files of the repository as pages, links to them,
display equations without a script, and references made of what they describe.

A page reads on GitHub too: there its links lead to the files, and a fence `equation` is plain text.
"""

from __future__ import annotations

import argparse
import contextlib
import html
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import griffe
import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/"
#: A symbol with a subscript, such as λ_eff or V_λ, which may wear a bar.
SUBSCRIPT = re.compile("(?<!\\w)([A-Za-zα-ω][\u0300-\u036f]?)_([a-zλ]+\u0304?)(?!\\w|\\.\\w)")


@cache
def elsewhere() -> dict[str, str]:
    """Files outside of docs/ that the site shows, and where."""
    places = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
    for path in sorted((ROOT / "bench" / "results").rglob("*.md")):
        places[path.relative_to(ROOT).as_posix()] = path.relative_to(ROOT / "bench").as_posix()
    return places


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let a fence `equation` be set as one."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences["custom_fences"] = [{"name": "equation", "class": "equation", "format": equation}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files from elsewhere, and a page for each notebook."""
    for path, place in elsewhere().items():
        files.append(File.generated(config, place, content=(ROOT / path).read_text()))
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            place = f"{file.src_uri.removesuffix('.ipynb')}.md"
            text = notebook(Path(str(file.abs_src_path)))
            files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the references, and turn links into those of the site."""
    if page.parent is None or len(page.parent.children) == 1:
        page.meta["hide"] = ["navigation"]  # it would list this page alone
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", commands())
    if "<!-- params -->" in markdown:
        markdown = markdown.replace("<!-- params -->", params())
    origin = {place: path for path, place in elsewhere().items()}
    path = origin.get(page.file.src_uri, DOCS + page.file.src_uri)
    link = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
    return link.sub(lambda match: led(match, path), markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Set subscripts of symbols in the text, `π_ref`, outside of code and tags."""
    parts = re.split(r"(<pre.*?</pre>|<code.*?</code>|<[^>]+>)", content, flags=re.DOTALL)
    parts[::2] = [SUBSCRIPT.sub(r"\1<sub>\2</sub>", part) for part in parts[::2]]
    return "".join(parts)


def led(match: re.Match[str], path: str) -> str:
    """A link of the file `path` as the site has it; one to a file that it lacks is just its
    text.
    """
    mark, text, target = match.groups()
    file, hash_, anchor = target.partition("#")
    if not file or re.match(r"[a-z]+:", target):
        return match[0]
    here = os.path.dirname(_place(path))
    found = os.path.normpath(os.path.join(os.path.dirname(path), file))
    if _place(found) == found and (ROOT / found).exists():
        return text
    return f"{mark}[{text}]({os.path.relpath(_place(found), here or '.')}{hash_}{anchor})"


def _place(path: str) -> str:
    """Where the site has a file of the repository, or the path itself where it has it not."""
    return path.removeprefix(DOCS) if path.startswith(DOCS) else elsewhere().get(path, path)


def equation(source: str, *_: Any, **__: Any) -> str:
    """Lines of an equation with its subscripts, `_λ` or `_{λ ≥ 0}`, set as such."""
    text = html.escape(source)
    for subscript in ("_([^\\W_]+\u0304?|[+])", r"_\{([^{}]*)\}"):
        text = re.sub(subscript, r"<sub>\1</sub>", text)
    return f'<div class="equation" role="math">{text}</div>'


def notebook(path: Path) -> str:
    """A notebook as a page: its text, its code, and what that printed."""
    parts = [f"*This page is a notebook: [{path.name}]({path.name}).*"]
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        printed = "".join(output.get("text", "") for output in cell.outputs)
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    title, *rest = parts[1].split("\n", 1)
    return "\n\n".join([title, parts[0], *rest, *parts[2:]])


def params() -> str:
    """Each section of the default params under a heading of its own."""
    text = (ROOT / "params" / "default.yaml").read_text()
    blocks = re.split(r"\n(?=\w)", text[text.index("\nseed:") + 1 :])
    names = [block.partition(":")[0] for block in blocks]
    sections = [
        f"### {name}\n\n```yaml\n{block.rstrip()}\n```"
        for name, block in zip(names, blocks, strict=True)
    ]
    return "\n\n".join(sections)


def commands() -> str:
    """The help of `dualign` and of each of its commands."""
    from dualign.command import COMMANDS, overview
    from dualign.completion import whole

    with contextlib.chdir(ROOT):
        parsers: Any = whole()._actions[-1].choices
    texts = [f"```text\n{overview().format_help()}```"]
    for name in sorted(set(parsers) - {"repro"}):  # its options are DVC's
        parser = parsers[name]
        parser.description = f"{COMMANDS[name].about[0].upper()}{COMMANDS[name].about[1:]}."
        texts.append(f"## dualign {name}\n\n{helps(parser)}")
    return "\n\n".join(texts)


def helps(parser: argparse.ArgumentParser) -> str:
    """The help of a command, and of what it may be followed by."""
    texts = [f"```text\n{parser.format_help()}```"]
    for action in parser._actions:
        if isinstance(action.choices, dict):
            texts += [helps(command) for command in action.choices.values()]
    return "\n\n".join(texts)


class Doctests(griffe.Extension):
    """Fences examples in docstrings, which Markdown would take for quotations."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for everything that is documented."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(docstring: str) -> str:
    """The same text with a fence around each example, and no formula that Markdown takes for a
    link.
    """
    example = re.compile(r"^>>> .*(?:\n.+)*", flags=re.MULTILINE)
    text = example.sub(lambda match: f"```python\n{match[0]}\n```", docstring)
    return text.replace("](", "]\\(")
