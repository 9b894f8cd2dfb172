"""Docstrings of the package as Markdown: formulas, cross references, and real signatures.

An extension of griffe, which mkdocstrings reads the package with. The docstrings have formulas in
Sphinx's roles and names in single backticks, so that ``help()`` is readable; constructors are made
from declared arguments, which only the running class knows.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

import fastdg

FORMULA = re.compile(r":math:`([^`]+)`")
BLOCK = re.compile(r"^( *)\.\. math::[ ]*(.*)\n((?:(?:\1[ ]+.*)?\n)*)", re.MULTILINE)
NAME = re.compile(r"(?<![`\w])`([A-Za-z_][\w.]*)`(?!`)")
RETURNED = re.compile(r"(Returns:\n +)(.*)")
HEADINGS = {"Example:": "Examples:"}


def block(match: re.Match[str]) -> str:
    """A ``.. math::`` directive as a display formula, indented as it was."""
    indent, first, rest = match.groups()
    lines = [line.strip() for line in [first, *rest.splitlines()] if line.strip()]
    body = " ".join(lines)
    if "&" in body or r"\\" in body:
        body = rf"\begin{{align*}} {body} \end{{align*}}"
    return f"{indent}\n{indent}$$\n{indent}{body}\n{indent}$$\n{indent}\n"


def reference(match: re.Match[str]) -> str:
    """A name in single backticks as a link, where the package has it, else as code."""
    name = match[1]
    path = name.removeprefix("fastdg.")
    module, _, member = path.rpartition(".")
    public = path in fastdg.__all__ and not inspect.ismodule(getattr(fastdg, path))
    if public or (module == "weightings" and member in fastdg.weightings.__all__):
        return f"[`{name}`][fastdg.{path}]"
    return f"`{name}`"


def returned(match: re.Match[str]) -> str:
    """Hide colons outside code, of which griffe takes the first for the end of a type."""
    parts = match[2].split("``")
    parts[::2] = [part.replace(":", "&#58;") for part in parts[::2]]
    return match[1] + "``".join(parts)


def markdown(text: str) -> str:
    """Return a docstring in Markdown, with the sections that griffe knows."""
    text = BLOCK.sub(block, text + "\n").rstrip("\n")
    text = RETURNED.sub(returned, text)
    text = FORMULA.sub(lambda match: f"${match[1]}$", text)
    text = NAME.sub(reference, text)
    lines = text.split("\n")
    return "\n".join(
        HEADINGS.get(line.strip(), line) if line in HEADINGS else line for line in lines
    )


def parameters(signature: inspect.Signature) -> griffe.Parameters:
    """Return a signature of the running class in griffe's form."""
    kinds = {
        inspect.Parameter.POSITIONAL_ONLY: griffe.ParameterKind.positional_only,
        inspect.Parameter.POSITIONAL_OR_KEYWORD: griffe.ParameterKind.positional_or_keyword,
        inspect.Parameter.VAR_POSITIONAL: griffe.ParameterKind.var_positional,
        inspect.Parameter.KEYWORD_ONLY: griffe.ParameterKind.keyword_only,
        inspect.Parameter.VAR_KEYWORD: griffe.ParameterKind.var_keyword,
    }
    made = []
    for p in signature.parameters.values():
        annotation = None if p.annotation is p.empty else str(p.annotation)
        annotation = annotation and re.sub(r"^InitVar\[(.*)\]$", r"\1", annotation)
        default = None if p.default is p.empty else repr(p.default)
        made.append(
            griffe.Parameter(p.name, annotation=annotation, kind=kinds[p.kind], default=default)
        )
    return griffe.Parameters(*made)


class Docstrings(griffe.Extension):
    """Rewrites what griffe has read, before mkdocstrings renders it."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        self._rewrite(pkg, set())
        for name in fastdg.__all__:
            value = getattr(fastdg, name)
            if inspect.isclass(value) and hasattr(value, "__signature__"):
                self._construct(pkg[name], value)

    def _rewrite(self, thing: griffe.Object, seen: set[int]) -> None:
        if id(thing) in seen:
            return
        seen.add(id(thing))
        if thing.docstring is not None:
            thing.docstring.value = markdown(thing.docstring.value)
        for member in thing.members.values():
            if not member.is_alias:
                self._rewrite(member, seen)

    def _construct(self, thing: griffe.Object, value: type) -> None:
        """Give the class the constructor that it has when it runs."""
        while thing.is_alias:
            thing = thing.final_target
        signature = inspect.signature(value)
        own = griffe.Function("__init__", parameters=parameters(signature), parent=thing)
        thing.set_member("__init__", own)
