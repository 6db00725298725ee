"""A hook of mkdocs: what the experiments write is in the site as it stands, under the paths of the repository."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
ENDINGS = {".md", ".png", ".csv", ".json", ".txt"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages, pictures and raw results, under which the pages' own links hold."""
    for path in sorted(ROOT.glob("experiments/**/*")):
        if path.suffix in ENDINGS:
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Let links from pages of `docs/` hold, which is the root of the site and beside `experiments/` in the checkout."""
    return re.sub(r"\]\(\.\./((?:\.\./)*experiments/)", r"](\1", markdown)
