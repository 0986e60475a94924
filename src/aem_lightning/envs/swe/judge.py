"""The runner of the tests, as a script that runs inside the sandbox: pytest, watched.

The host sends this file's own text to the sandbox's Python, and on standard input a key that no
file and no argument holds. The last line that it writes is what became of each test, sealed with
the key: what the tested code prints, or a program that it puts in this one's place, has no seal.

The tested code runs in this process, so it can be fought here and not shut out. Therefore: tests of
random names that have to fail run between the others; pytest's own functions, its hooks and the
tests are looked at again while they run; an expected failure counts only where the test declares
it; what equals a literal must not equal one that is a little different; and the file of a test is
emptied before it imports anything, but for tests that name ``__file__``: it is whole while one of
those runs. Of a ``conftest.py``, tests get the fixtures; its hooks would steer the runner.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import random
import secrets
import sys
from types import CodeType, FunctionType, ModuleType
from typing import NoReturn

import pytest

MARK = "aem-judge"
# Where an outcome is decided.
WATCHED = (
    *("_pytest.assertion", "_pytest.assertion.rewrite", "_pytest.config", "_pytest.fixtures"),
    *("_pytest.main", "_pytest.nodes", "_pytest.outcomes", "_pytest.python", "_pytest.reports"),
    *("_pytest.runner", "_pytest.skipping", "_pytest.unittest", "builtins", "pluggy._callers"),
    *("pluggy._hooks", "pluggy._manager", "pluggy._result", "unittest.case"),
)
DECOYS = 4
PLAIN = (int, float, str, bytes, tuple, list)
SEEN = "__aem_seen__"
SHADOWS = {SEEN, "AssertionError"}  # what assertions look up by name
# What no product code does while it is tested, but code that searches or steers its tests.
REFUSED = (
    *("sys.settrace", "sys.setprofile", "sys._current_frames", "sys.monitoring.register_callback"),
    *("gc.get_objects", "gc.get_referrers", "gc.get_referents", "os.exec"),
)


class Judge:
    """What became of each test; what was found changed."""

    def __init__(self) -> None:
        self.statuses: dict[str, str] = {}
        self.canaries: dict[str, str] = {}
        self.changed: set[str] = set()
        self.bodies: dict[str, object] = {}
        self.declared: set[str] = set()  # tests that are expected to fail, as they say
        self.finished = False
        self.before: dict[tuple[str, ...], object] = {}
        self.emptied: dict[str, bytes] = {}  # what stood in the files of tests
        self.brought: set[str] = set()  # each `conftest.py` whose fixtures are known

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Remember everything while no tested code has been imported."""
        self.before = picture(session.config)
        self.config = session.config
        sys.addaudithook(self.audit)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Put canaries among the tests."""
        self.bodies = {item.nodeid: body(item) for item in items}
        self.declared = {i.nodeid for i in items if i.get_closest_marker("xfail") is not None}
        last = len(items)
        for place in (last, random.randint(0, last)) if items else ():
            parent = items[min(place, last - 1)].getparent(pytest.Module)
            if parent is not None:
                name = f"test_{secrets.token_hex(8)}"
                canary = pytest.Function.from_parent(parent, name=name, callobj=fails)
                self.canaries[canary.nodeid] = "none"
                items.insert(place, canary)

    def read(self, path: str, source: bytes) -> None:
        """The file of a test was read, and none of it has run yet."""
        self.emptied[path] = source
        fill(path, b"")  # before the tested code, which may read what is expected
        folders = [os.path.dirname(path)]
        while folders[-1] != (above := os.path.dirname(folders[-1])):
            folders.append(above)
        for folder in reversed(folders):
            file = os.path.join(folder, "conftest.py")
            inside = os.path.join(str(self.config.rootpath), "")
            if file.startswith(inside) and file not in self.brought and os.path.isfile(file):
                self.brought.add(file)
                self.bring_fixtures(file)

    def bring_fixtures(self, file: str) -> None:
        """Give tests the fixtures of a `conftest.py`; of nested ones, the inner comes last.

        They are known to tests beside its folder too: how pytest is told of a folder hangs on its
        release.
        """
        module, fixtures = import_file(file), ModuleType(file)
        found = {name: it for name, it in vars(module).items() if not name.startswith("pytest_")}
        vars(fixtures).update({name: it for name, it in found.items() if name[:2] != "__"})
        self.config.pluginmanager.register(fixtures, f"fixtures of {file}, without its hooks")

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item):  # type: ignore[no-untyped-def]
        """Give a test that reads its own file what it reads."""
        path, code = os.path.abspath(str(item.path)), body(item)
        is_whole = path in self.emptied and isinstance(code, CodeType) and names_its_file(code)
        if is_whole:
            fill(path, self.emptied[path])
        yield
        if is_whole:
            fill(path, b"")

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
        """Note the outcome of a part of a test."""
        report = (yield).get_result()
        name, error = item.nodeid, call.excinfo and call.excinfo.value
        status = {"passed": "PASSED", "skipped": "SKIPPED"}.get(report.outcome, "FAILED")
        if hasattr(report, "wasxfail"):
            status = "XPASS" if status == "PASSED" else "XFAIL"
        undeclared = status == "XFAIL" and name not in self.declared
        skipped = (
            status == "SKIPPED" and call.excinfo is not None and from_product(item, call.excinfo)
        )
        if undeclared or skipped or (status == "PASSED" and error is not None):
            status = "FAILED"
        if status == "FAILED" and call.when != "call":
            status = "ERROR"
        kept = self.canaries if name in self.canaries else self.statuses
        if call.when == "call" or status != "PASSED":
            kept[name] = status
        if name in self.canaries:
            if call.when == "call":
                self.look()
        elif (
            body(item) is not self.bodies.get(name)
            or {"runtest", "setup"} & vars(item).keys()
            or SHADOWS & vars(getattr(item, "module", item)).keys()
        ):
            self.changed.add(name)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be collected is an error."""
        if report.failed:
            self.statuses[report.nodeid] = "ERROR"

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """Look once more; pytest itself puts things back after that."""
        self.look()
        self.finished = True

    def audit(self, event: str, arguments: object) -> None:
        """Note what the interpreter says that somebody does."""
        if event in REFUSED:
            self.changed.add(event)

    def look(self) -> None:
        """Find what is not as it was."""
        now = picture(self.config)
        for key, value in self.before.items():
            if now.get(key) is not value and now.get(key) != value:
                self.changed.add(".".join(key))

    def verdict(self) -> dict[str, object]:
        """All of it."""
        survivors = [name for name, status in self.canaries.items() if status in SURVIVED]
        changed = sorted(self.changed) + ["a test that has to fail did not"] * bool(survivors)
        changed += [] if self.finished else ["the session did not end"]
        return {"statuses": self.statuses, "changed": changed}


SURVIVED = ("PASSED", "XFAIL", "XPASS", "SKIPPED", "none")


def fails() -> None:
    """The canary."""
    raise AssertionError("this test has to fail")


def from_product(item: pytest.Item, error: pytest.ExceptionInfo[BaseException]) -> bool:
    """Whether the tested code has a part in an exception that skips a test."""
    places = [
        os.path.relpath(str(entry.path), str(item.config.rootpath)) for entry in error.traceback
    ]
    return any("test" not in place and not place.startswith("..") for place in places)


def body(item: pytest.Item) -> object:
    """The code of a test."""
    function = getattr(item, "_obj", None) or getattr(item, "obj", None)
    return getattr(getattr(function, "__func__", function), "__code__", None)


def names_its_file(code: CodeType) -> bool:
    """Whether code asks where it stands."""
    inner = (part for part in code.co_consts if isinstance(part, CodeType))
    return "__file__" in code.co_names or any(map(names_its_file, inner))


def fill(path: str, content: bytes) -> None:
    """Make this all that a file holds."""
    with open(path, "wb") as file:
        file.write(content)


def import_file(path: str) -> ModuleType:
    """A module by its file, under the name that tests import it by."""
    folder, name = os.path.split(os.path.splitext(path)[0])
    names = [name]
    while os.path.isfile(os.path.join(folder, "__init__.py")):
        folder, name = os.path.split(folder)
        names.insert(0, name)
    if len(names) == 1:  # of which there may be one in each folder
        sys.modules.pop(name, None)
    sys.path.insert(0, folder)
    return importlib.import_module(".".join(names))


def picture(config: pytest.Config) -> dict[tuple[str, ...], object]:
    """Functions, classes and hooks that decide on an outcome, by where they are."""
    found: dict[tuple[str, ...], object] = {}
    for name in WATCHED:
        if name in sys.modules:
            for key, value in list(vars(sys.modules[name]).items()):
                if name == "builtins" and callable(value):
                    found[name, key] = value
                elif isinstance(value, FunctionType):
                    found[name, key] = (value, value.__code__)
                elif isinstance(value, type):
                    found[name, key] = value
                    if value.__module__ == name:
                        for part, member in list(vars(value).items()):
                            if callable(member) or isinstance(member, property):
                                found[name, key, part] = (member, getattr(member, "__code__", 0))
    manager = config.pluginmanager
    found["hooks", "call"] = vars(manager).get("_inner_hookexec")
    for hook in vars(manager.hook):
        caller = getattr(manager.hook, hook)
        if hook.startswith(("pytest_runtest", "pytest_pyfunc", "pytest_collection")):
            found["hooks", hook] = tuple(impl.function for impl in caller.get_hookimpls())
    return found


# ----------------------------------------------------------------------- equality, a second time


class Seen(ast.NodeTransformer):
    """In assertions, has what is compared with a literal looked at."""

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        """``x == literal``, either way round."""
        self.generic_visit(node)
        if len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq):
            if is_literal(node.comparators[0]):
                node.left = looked_at(node.left, node.comparators[0])
            elif is_literal(node.left):
                node.comparators = [looked_at(node.comparators[0], node.left)]
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """``self.assertEqual(x, literal)``."""
        self.generic_visit(node)
        name = getattr(node.func, "attr", "")
        if name in ("assertEqual", "assertEquals") and len(node.args) > 1:
            if is_literal(node.args[1]):
                node.args[0] = looked_at(node.args[0], node.args[1])
            elif is_literal(node.args[0]):
                node.args[1] = looked_at(node.args[1], node.args[0])
        return node


def is_literal(node: ast.expr) -> bool:
    """Whether it says all of its value."""
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return False
    return True


def looked_at(node: ast.expr, literal: ast.expr) -> ast.expr:
    """The same value, after `seen`."""
    call = ast.Call(ast.Name(SEEN, ast.Load()), [node, literal], [])
    return ast.fix_missing_locations(ast.copy_location(call, node))


def seen(value: object, literal: object) -> object:
    """``value``, where it equals nothing that is nearly ``literal``."""
    others = [other_than(literal) for _ in range(random.randint(2, DECOYS))]
    at = random.randint(0, len(others))
    try:
        equal = [bool(value == other) for other in [*others[:at], literal, *others[at:]]]
    except Exception:  # arrays, which are compared part by part
        return value
    base = next((kind for kind in PLAIN if isinstance(literal, kind)), object)
    is_itself = not isinstance(value, base) or base.__eq__(value, literal) is not False
    if equal.pop(at) and (any(equal) or not is_itself):
        raise AssertionError("the value equals something else than what is expected as well")
    return value


def other_than(literal: object) -> object:
    """A value of the same form, one part of which is another."""
    if isinstance(literal, bool):
        return not literal
    if isinstance(literal, (int, float, complex)):
        other = literal + random.choice((1, -1, 2, 17))
        return other if other != literal else 0
    if isinstance(literal, str):
        return literal + random.choice("x .1")
    if isinstance(literal, bytes):
        return literal + b"x"
    if isinstance(literal, (list, tuple)) and literal:
        at = random.randrange(len(literal))
        parts = [*literal[:at], other_than(literal[at]), *literal[at + 1 :]]
        return type(literal)(parts)
    if isinstance(literal, dict) and literal:
        key = random.choice(list(literal))
        return {**literal, key: other_than(literal[key])}
    if isinstance(literal, (set, frozenset)):
        return type(literal)([*literal, secrets.token_hex(4)])
    return secrets.token_hex(4)  # of None, and of what is empty


def main() -> NoReturn:
    """Run pytest with the arguments; the exit status is pytest's, but for its canaries."""
    sys.modules["__main__"] = ModuleType("__main__")  # not to be found by its name
    seal = hashlib.blake2b(key=sys.stdin.buffer.read())
    channel, write, leave = os.dup(1), os.write, os._exit
    rewrite, judge = importlib.import_module("_pytest.assertion.rewrite"), Judge()
    plain = rewrite.rewrite_asserts
    tests = {os.path.abspath(name) for name in sys.argv[1:] if os.path.isfile(name)}

    def rewrite_asserts(tree: ast.Module, source: bytes, path: str, *others: object) -> None:
        for node in ast.walk(tree):
            if isinstance(node, (ast.Assert, ast.Expr)):
                Seen().visit(node)
        plain(tree, source, path, *others)
        if os.path.abspath(path) in tests:
            judge.read(os.path.abspath(path), source)

    vars(rewrite)["rewrite_asserts"] = rewrite_asserts
    importlib.import_module("builtins").__dict__[SEEN] = seen
    code = int(pytest.main(sys.argv[1:], plugins=[judge]))
    if code == 1 and not {"FAILED", "ERROR"} & set(judge.statuses.values()):
        code = 0
    text = ascii(judge.verdict())  # in C, as the seal is: no code of Python's can be put between
    seal.update(text.encode())
    line = f"\n{MARK} {seal.hexdigest()} {text}\n".encode()
    while line:
        line = line[write(channel, line) :]
    leave(code)


if __name__ == "__main__":
    main()
