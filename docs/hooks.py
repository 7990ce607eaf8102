"""Hooks of MkDocs: pages that are outside of docs/ or made from the code, links to them, and formulas as MathML."""

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from recipe_keys import recipe_page  # beside this file


ROOT = Path(__file__).parent.parent

# Where a page of the repository is on the site. What is in docs/ is there under its own name
PAGES = {
    "README.md": "index.md",
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
# Folders whose files pages link to; the site has copies
COPIED = ("recipes", "examples")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and files that are outside of docs/, and the list of all keys."""
    files.append(File.generated(config, "recipe_reference.md", content=recipe_page()))
    copied = [path.relative_to(ROOT).as_posix() for name in COPIED for path in (ROOT / name).rglob("*.*")]
    for source, target in {**PAGES, **{path: path for path in copied}}.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    sources = {target: source for source, target in PAGES.items()}
    here = page.file.src_uri
    folder = posixpath.dirname(sources.get(here, f"docs/{here}"))

    def on_site(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link["path"]))
        if not (ROOT / path).is_file():
            return link[0]  # MkDocs warns of what is not on the site either
        target = PAGES.get(path, path.removeprefix("docs/"))
        return f"]({posixpath.relpath(target, posixpath.dirname(here) or '.')}{link['anchor'] or ''})"

    return re.sub(r"\]\((?!\w+:)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]+)?\)", on_site, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn formulas into MathML, which browsers show without a script, a font, or a network."""

    def mathml(formula: re.Match[str]) -> str:
        tex, display = html.unescape(formula[2]).strip(), "block" if formula[1] == r"\[" else "inline"
        # The converter leaves no space behind the names of functions
        return re.sub(r"(<mi>(?:log|exp|cos)</mi>)", r'\1<mspace width="0.167em" />', convert(tex, display=display))

    return re.sub(
        r'<(?:span|div) class="arithmatex">(\\[(\[])(.*?)\\[)\]]</(?:span|div)>', mathml, content, flags=re.S
    )
