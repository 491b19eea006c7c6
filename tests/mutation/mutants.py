"""Mutants of a module: copies that differ in one place, as a slip of the pen would.

A mutant's name is "function: before -> after", without a line number, so that it stays the same while lines move.
What no test could notice is left out: docstrings, annotations, decorators, texts for people, the log.
"""

import ast
import dataclasses
import types

_COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_OPERATIONS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
    ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.BitXor: ast.BitOr, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift, ast.Pow: ast.Mult,
}  # fmt: skip


def _compare(node):
    for number, operator in enumerate(node.ops):
        operators = list(node.ops)
        operators[number] = _COMPARISONS[type(operator)]()
        yield ast.Compare(node.left, operators, node.comparators)


def _operation(node):
    yield ast.BinOp(node.left, _OPERATIONS[type(node.op)](), node.right)


def _both(node):
    yield ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)


def _unary(node):
    yield node.operand


def _constant(node):
    value = node.value
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, (int, float)):
        yield ast.Constant(value + 1)
    elif isinstance(value, bytes):
        yield ast.Constant(value + b"X")
    elif isinstance(value, str) and " " not in value:
        yield ast.Constant(value + "X")


def _condition(node):
    # A comparison and a negation have mutants of their own that turn the branch.
    if not isinstance(node.test, (ast.Compare, ast.UnaryOp)):
        yield type(node)(**{**dict(ast.iter_fields(node)), "test": ast.UnaryOp(ast.Not(), node.test)})


def _return(node):
    if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
        yield ast.Return(ast.Constant(None))


def _nothing(node):
    yield ast.Pass()


def _expression(node):
    if not isinstance(node.value, (ast.Constant, ast.Yield, ast.YieldFrom)):
        yield ast.Pass()


def _continue(node):
    yield ast.Break()


_MUTATIONS = {
    ast.Compare: _compare,
    ast.BinOp: _operation,
    ast.BoolOp: _both,
    ast.UnaryOp: _unary,
    ast.Constant: _constant,
    ast.If: _condition,
    ast.IfExp: _condition,
    ast.While: _condition,
    ast.Return: _return,
    ast.Raise: _nothing,
    ast.AugAssign: _nothing,
    ast.Delete: _nothing,
    ast.Expr: _expression,
    ast.Continue: _continue,
}
_SHOWN_MAX = 80
"""Characters of what a constant stands in (choice)."""
_LEFT_OUT = (ast.JoinedStr, ast.Import, ast.ImportFrom)
_FIELDS_LEFT_OUT = {"decorator_list", "annotation", "returns"}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """name: see above. line: in the source. code: of the whole module."""

    name: str
    line: int
    code: types.CodeType


def _places(node, inside):
    """Every (parent, field, position or None, node, name of the function) below `node`."""
    for field, value in ast.iter_fields(node):
        if field in _FIELDS_LEFT_OUT:
            continue
        for position, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or isinstance(child, _LEFT_OUT) or _is_for_people(child):
                continue
            yield node, field, position, child, inside
            is_scope = isinstance(child, (ast.FunctionDef, ast.ClassDef))
            yield from _places(child, f"{inside}.{child.name}".lstrip(".") if is_scope else inside)


def _is_for_people(node):
    if isinstance(node, ast.Expr):
        node = node.value
        if isinstance(node, ast.Constant):
            return True  # a docstring, also one below a constant
        return isinstance(node, ast.Call) and ast.unparse(node.func).startswith("log.")
    # __all__ and __repr__
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]) in ("__all__", "log")
    return isinstance(node, ast.FunctionDef) and node.name == "__repr__"


def _put(parent, field, position, node):
    if position is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[position] = node


def _first_line(node):
    lines = ast.unparse(node).splitlines()
    return lines[0] + (" ..." if len(lines) > 1 else "")


def mutants(source, path):
    """Yields a Mutant for each place of `source`, text, that a slip may change. path: for tracebacks."""
    tree = ast.parse(source)
    seen = {}
    for parent, field, position, node, inside in list(_places(tree, "")):
        for changed in _MUTATIONS.get(type(node), lambda node: ())(node):
            # A constant alone says little, so the name shows what it stands in, where that is short.
            shown = parent if isinstance(node, ast.Constant) and len(ast.unparse(parent)) <= _SHOWN_MAX else node
            before = _first_line(shown)
            _put(parent, field, position, changed)
            after = _first_line(parent if shown is parent else changed)
            name = f"{inside or 'module'}: {before} -> {after}"
            seen[name] = seen.get(name, 0) + 1
            if seen[name] > 1:
                name = f"{name} #{seen[name]}"
            ast.fix_missing_locations(tree)
            yield Mutant(name, getattr(node, "lineno", 0), compile(tree, path, "exec"))
            _put(parent, field, position, node)
