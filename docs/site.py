"""What mkdocs.yml adds to the pages in this folder: documents that stand elsewhere in the tree, and what is generated.

A document of the tree, such as the specification of the format, is a page of the site and stays where it is.  Links
between documents lead to the page if there is one, to the file's page on GitHub otherwise.
"""

from __future__ import annotations

import html
import inspect
import posixpath
import re
from pathlib import Path

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from shiradelta.cli import main

ROOT = Path(__file__).parent.parent
GITHUB = "https://github.com/shiradelta/shiradelta/blob/main/"
RAW = "https://raw.githubusercontent.com/shiradelta/shiradelta/main/"
#: File of the tree -> page of the site.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/results/README.md": "results.md",
    "examples/serve/README.md": "serve.md",
    "libshd/README.md": "c-library.md",
    "spec/CHAIN.md": "chain-format.md",
    "spec/FORMAT.md": "format.md",
    "spec/REGISTRY.md": "registry.md",
    "spec/SIGNATURES.md": "signature-file.md",
}
#: Options of every command, which docs/command-line.md explains once.
_SHARED = {"--json", "--quiet", "--verbose", "--help"}
_FILES = {page: file for file, page in PAGES.items()}
#: A link or a picture: its text is left alone.
_LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the documents, and the pictures that documents show."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    for path in (ROOT / "benchmarks" / "results").glob("*.png"):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills in what a page takes from elsewhere, and turns its links to files into links to pages."""
    markdown = markdown.replace("<!-- quickstart: README.md -->", _quickstart())
    markdown = markdown.replace("<!-- commands: docs/site.py -->", commands())
    source = _FILES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return _LINK.sub(lambda found: f"]({_target(found[1], source, page.file.src_uri)}{found[2] or ''})", markdown)


def _target(link: str, source: str, page: str) -> str:
    """Where a link of a document leads on the site; a link to no file of the tree stays as it is."""
    for prefix in (GITHUB, RAW):
        if link.startswith(prefix):
            name = link.removeprefix(prefix)
            break
    else:
        if ":" in link:
            return link
        name = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if not (ROOT / name).exists():
        return link
    folder = posixpath.dirname(page) or "."
    if name in PAGES:
        return posixpath.relpath(PAGES[name], folder)
    if name.startswith("docs/") and name.endswith(".md"):
        return posixpath.relpath(name.removeprefix("docs/"), folder)
    if name.startswith("benchmarks/results/") and name.endswith(".png"):
        return posixpath.relpath(f"results/{posixpath.basename(name)}", folder)
    return GITHUB + name


def _quickstart() -> str:
    """README's quickstart, without its heading."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^## Quickstart\n(.*?)(?=^## )", text, re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError("README.md has no section Quickstart; docs/quickstart.md shows it")
    return found[1].strip()


def commands(group: click.Group = main, above: str = "") -> str:
    """A section for each command, as click knows it, and for those of each group."""
    parts = []
    for name, command in group.commands.items():
        parts.append(_command(f"{above}{name}", command))
        if isinstance(command, click.Group):
            parts.append(commands(command, f"{above}{name} "))
    return "\n\n".join(parts)


def _command(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=f"shiradelta {name}")
    lines = [f"shiradelta {name} {' '.join(command.collect_usage_pieces(context))}"]
    lines += [f"shiradelta {example}" for example in getattr(command, "examples", ())]
    rows = ["| option | what it does |", "|---|---|"]
    for option in command.params:
        record = option.get_help_record(context)
        if isinstance(option, click.Option) and record is not None and not _SHARED.intersection(option.opts):
            names, _, choices = record[0].partition(" [")
            one_of = f" One of {', '.join(choices.rstrip(']').split('|'))}." if choices else ""
            rows.append(f"| `{names}` | {_escaped(record[1] + one_of)} |")
    parts = [f"### {name}", _escaped(inspect.cleandoc(command.help or "").replace("\b\n", ""))]
    parts.append("\n".join(["```text", lines[0], "", *lines[1:], "```"]))
    return "\n\n".join(parts + ["\n".join(rows)] * (len(rows) > 2))


def _escaped(text: str) -> str:
    """Plain text for Markdown."""
    return re.sub(r"([*_`|])", r"\\\1", html.escape(text, quote=False))
