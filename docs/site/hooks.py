"""What the site has beside the guides: the README as its first page, and a reference made of docstrings.

The guides are written for a code host. Their links to files outside docs/ become the names of these here.
"""

import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[2]
WORKER = "iframe-worker.js"
REFERENCE = {  # what a program calls, and what a plugin implements
    "In Python": ["dit_moe.load", "dit_moe.train", "dit_moe.ImageModel", "dit_moe.TextModel"],
    "To build on": [
        "dit_moe.moe.routers.base",
        "dit_moe.moe.routing",
        "dit_moe.data.base",
        "dit_moe.diffusion.base",
        "dit_moe.metrics.base",
        "dit_moe.extractors.base",
        "dit_moe.autoencoders.base",
        "dit_moe.models.base",
        "dit_moe.registry",
    ],
}
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_config(config):
    """Headings are linked to as a code host names them."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files, config):
    """Add the pages that no file in docs/ holds."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = re.sub(r"(\]\(|src=\")docs/", r"\1", readme)
    reference = "# Python\n"
    for title, names in REFERENCE.items():
        reference += f"\n## {title}\n\n" + "".join(f"::: {name}\n\n" for name in names)
    pages = {"index.md": readme, "reference.md": reference}
    for name in ("style.css", WORKER):
        pages[name] = (Path(__file__).parent / name).read_text(encoding="utf-8")
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_post_page(output, page, **_):
    """The one script that the theme would take from the network lies beside the pages."""
    output = output.replace("https://unpkg.com/iframe-worker/shim", WORKER)
    if fetched := re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?://[^>]*>', output):
        raise PluginError(f"{page.file.src_uri} needs the network for {fetched}")
    return output


def on_page_markdown(markdown, page, **_):
    """Links to files that the site does not have become their names."""

    def within_the_site(link):
        text, path, anchor = link.groups(default="")
        return f"[{text}](index.md{anchor})" if path == "README.md" else f'<abbr title="{path}">{text}</abbr>'

    return OUTSIDE.sub(within_the_site, markdown)
