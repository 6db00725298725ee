"""Lets `strategy=hift` compose in any Hydra application.

Hydra imports this whenever it starts, in every application of the environment: import nothing but Hydra here.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class HiFTSearchPath(SearchPathPlugin):
    """Adds the group `strategy` of HiFT behind an application's own files, which so win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder `conf` that lies beside this file."""
        search_path.append(provider="hift-lightning", path="pkg://hydra_plugins.hift_lightning.conf")
