"""An extension of griffe: docstrings are written with Sphinx's roles, and the site is Markdown."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|meth|func|attr|mod):`~?(?:[^`<]*<)?([^`>]+)>?`")


class RolesAsCode(griffe.Extension):
    """Show ``:class:`~a.b.C``` as ``C`` and ``::`` as ``:``; Markdown takes the indented lines below as code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite a docstring before it is parsed."""
        if obj.docstring is not None:
            text = _ROLE.sub(lambda role: f"`{role[1].rsplit('.', 1)[-1]}`", obj.docstring.value)
            obj.docstring.value = re.sub(r"^::$\n", "", re.sub(r"(?<=\w)::$", ":", text, flags=re.M), flags=re.M)
