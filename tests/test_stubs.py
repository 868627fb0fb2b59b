"""``_core.pyi`` against the extension: the same names, arguments and kinds of result, both ways."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

import fastcell
from fastcell import _core

STUB = Path(fastcell.__file__).with_name("_core.pyi")

# What pybind11 gives to an argument that the binding does not name.
UNNAMED = re.compile(r"arg\d+")


class Function(NamedTuple):
    """A callable: its arguments without ``self``, and the head of its result's type.

    An argument that only its position names is None: nobody can pass it by a keyword.
    """

    arguments: tuple[str | None, ...]
    result: str


PROPERTY = "property"
Members = dict[str, Function | str]


def members_of_module() -> Members:
    """What the extension has, read from the signatures that pybind11 writes into docstrings."""
    found: Members = {}
    for name, value in public(_core):
        if not isinstance(value, type):
            found[name] = signature(name, value.__doc__)
            continue
        found[name] = "class"
        found[f"{name}.__init__"] = signature("__init__", value.__init__.__doc__)
        for member, inner in public(value):
            known = PROPERTY if isinstance(inner, property) else signature(member, inner.__doc__)
            found[f"{name}.{member}"] = known
    return found


def public(owner: object) -> list[tuple[str, object]]:
    return [(name, getattr(owner, name)) for name in dir(owner) if not name.startswith("_")]


def signature(name: str, doc: str | None) -> Function:
    line = (doc or "").splitlines()[0] if doc else ""
    assert line.startswith(f"{name}("), f"no signature of {name} in {doc!r}"
    (node,) = ast.parse(f"def {line}: ...").body
    assert isinstance(node, ast.FunctionDef)
    arguments = [a.arg for a in node.args.args if a.arg != "self"]
    named = tuple([None if UNNAMED.fullmatch(a) else a for a in arguments])
    return Function(named, head(node.returns))


def members_of_stub(source: str) -> Members:
    found: Members = {}

    def add(prefix: str, body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                found[node.name] = "class"
                add(f"{node.name}.", node.body)
            elif isinstance(node, ast.FunctionDef):
                found[prefix + node.name] = declared(node)

    add("", ast.parse(source).body)
    return found


def declared(node: ast.FunctionDef) -> Function | str:
    if any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list):
        return PROPERTY
    args = node.args
    assert [args.vararg, args.kwarg, *args.kwonlyargs] == [None, None], "plain arguments only"
    by_position: list[str | None] = [None for a in args.posonlyargs if a.arg != "self"]
    named = [a.arg for a in args.args if a.arg != "self"]
    return Function((*by_position, *named), head(node.returns))


def head(annotation: ast.expr | None) -> str:
    """``list`` of ``list[str]``."""
    while isinstance(annotation, ast.Subscript):
        annotation = annotation.value
    return "" if annotation is None else ast.unparse(annotation).removeprefix("typing.").lower()


def differences(source: str) -> list[str]:
    stub, module = members_of_stub(source), members_of_module()
    return [
        f"{name}: the stub says {stub.get(name)}, the module {module.get(name)}"
        for name in sorted(stub.keys() | module.keys())
        if stub.get(name) != module.get(name)
    ]


def test_the_stub_is_the_module():
    assert not differences(STUB.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("right", "wrong", "name"),
    [
        ("def isas()", "def isa_names()", "isas"),
        ("whole: bool", "all: bool", "fingerprint"),
        ("def packed_bytes(self)", "def packed_size(self)", "Stack.packed_bytes"),
        ("layers: int,", "", "Stack.__init__"),
        ("threads: int, /) -> None", "threads: int) -> None", "Stack.pack"),
        ("-> list[str]", "-> str", "isas"),
        ("class Stack:", "def extra() -> None: ...\n\nclass Stack:", "extra"),
    ],
)
def test_a_wrong_stub_is_noticed(right, wrong, name):
    source = STUB.read_text(encoding="utf-8")
    assert right in source
    found = differences(source.replace(right, wrong, 1))
    assert any(line.startswith(f"{name}:") for line in found), found
