"""A hook of mkdocs: what the experiments write is in the site as it stands, under the paths of the repository."""

from pathlib import Path

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
