"""The identity of code: names, and hashes that change with what is computed and with nothing else."""

from __future__ import annotations

import ast
import functools
import importlib.util
import itertools
import linecache
import operator
import pathlib
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lazyproc.core.identity import code_changed, code_hash, unnamed
from lazyproc.core.naming import function_name
from lazyproc.core.state import LARGEST

BYTE = f"byte{sys.version_info.major}{sys.version_info.minor}:"
counter = itertools.count()


@pytest.fixture
def load(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., types.ModuleType]:
    """Import a text as a module of a fixed name, from a file of its own each time."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load(text: str, name: str = "code_under_test") -> types.ModuleType:
        path = tmp_path / f"code_{next(counter)}.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


BASE = """
def f(x, power=2, *, shift=1.5):
    y = x ** power
    if y in {"a", "b", 3} or y == (1, 2.0):
        return None
    return y + shift
"""
COSMETIC = {
    "comments": BASE.replace("    if", "    # why\n    if").replace("power\n", "power  # raised\n"),
    "layout": "\n\n\n" + BASE.replace("x ** power", "(x**\n          power)").replace('"', "'").replace("    ", "\t"),
    "docstring": BASE.replace("    y = x", '    """What it does.\n\n  Long.\n    """\n    y = x'),
    "empty docstring": BASE.replace("    y = x", '    ""\n    y = x'),
    "neighbours": "import math\nZ = 3\ndef g():\n    return 1\n" + BASE + "\nf2 = f\n",
    "other future": "from __future__ import annotations\n" + BASE,
    "static method": "class C:\n  @staticmethod" + BASE.replace("\n", "\n  ") + "\nf = C.f\n",
}
CHANGED = {
    "constant": BASE.replace("2.0", "2.5"),
    "type of a constant": BASE.replace("2.0", "2"),
    "operator": BASE.replace("**", "*"),
    "default": BASE.replace("power=2", "power=3"),
    "keyword default": BASE.replace("1.5", "1.6"),
    "text": BASE.replace('"b"', '"c"'),
    "order of arguments": BASE.replace("x, power=2", "power, x=2"),
    "a line more": BASE + "    # no\n    pass\n".replace("    # no\n", "") + "\n",
    "generator": BASE.replace("return y + shift", "yield y + shift"),
}


@pytest.mark.parametrize("change", COSMETIC)
def test_cosmetic_changes_do_not_count(change: str, load: Callable[..., Any]) -> None:
    before, after = code_hash(load(BASE).f), code_hash(load(COSMETIC[change]).f)
    assert before.startswith("src:")
    assert len(before) == 20
    assert before == after
    assert code_changed(before, after) is False


@pytest.mark.parametrize("change", CHANGED)
def test_real_changes_count(change: str, load: Callable[..., Any]) -> None:
    before, after = code_hash(load(BASE).f), code_hash(load(CHANGED[change]).f)
    assert after.startswith("src:")
    assert code_changed(before, after) is True


def test_a_function_of_nothing_but_a_docstring(load: Callable[..., Any]) -> None:
    assert code_hash(load('def f():\n    "text"\n').f) == code_hash(load("def f(): pass").f)


def test_texts_of_many_lines_and_inner_functions_with_docstrings(load: Callable[..., Any]) -> None:
    text = 'class C:\n    def f(self):\n        t = """a\n  b{}\n"""\n'
    text += "        def g():\n{}            return t\n        return g\n"
    plain, documented = load(text.format("", "")), load(text.format("", '            "doc"\n'))
    assert code_hash(plain.C.f).startswith("src:")
    assert code_hash(plain.C.f) == code_hash(documented.C.f)
    assert code_hash(plain.C.f) == code_hash(plain.C().f)
    assert code_hash(plain.C.f) != code_hash(load(text.format(" ", "")).C.f)


def test_methods_in_their_class_have_a_source(load: Callable[..., Any]) -> None:
    text = """
class Base:
    @classmethod
    def make(cls): return cls
class C(Base):
    def __init__(self): super().__init__(); self.__hidden = 1
    @classmethod
    def make(cls): return super().make()
    async def wait(self, *, n: int = 3) -> "C": return [__class__ async for _ in self.__hidden]
def outer(a):
    class Inner:
        def m(self): return a + self.__x
    return Inner
"""
    module = load(text)
    for f in (module.C.__init__, module.C.make, module.C.wait, module.outer(1).m):
        assert code_hash(f).startswith("src:")
    assert code_hash(module.outer(1).m) == code_hash(module.outer(1).m)
    assert code_hash(module.outer(1).m) != code_hash(module.outer(2).m)


def test_closures_count_with_their_values(load: Callable[..., Any]) -> None:
    text = "def make(a, b=None):\n    def f(x):\n        return a, b, x\n    return f\n"
    make = load(text).make
    assert code_hash(make(1)) == code_hash(make(1)) == code_hash(make(np.int64(1))) == code_hash(load(text).make(1))
    hashes = {code_hash(make(*values)) for values in [(1,), (2,), (1.0,), (None, 1), ({"a": [1]},), (np.arange(3),)]}
    assert len(hashes) == 6
    assert all(text.startswith("src:") for text in hashes)
    assert code_hash(make(len)) != code_hash(make(max))
    assert code_hash(make(object())) == code_hash(make(object()))
    assert code_hash(make(object())) != code_hash(make(math_like := types.ModuleType("math_like")))
    assert code_hash(make(math_like)) == code_hash(make(types.ModuleType("math_like")))


def test_functions_in_closures_count_with_their_code(load: Callable[..., Any]) -> None:
    text = """
def make(g, h):
    def f(x):
        return g(x) + h(x)
    return f
def one(x): return 1
def two(x): return {}
"""
    module = load(text.format(2))
    make = module.make
    assert code_hash(make(module.one, module.two)) != code_hash(make(module.two, module.one))
    changed = load(text.format(3))
    assert code_hash(make(module.one, module.two)) != code_hash(make(changed.one, changed.two))
    assert code_hash(make(module.one, module.one)) == code_hash(make(changed.one, changed.one))
    assert code_hash(make(module.one, lambda x: 1)).startswith(BYTE)  # one part without source


def test_a_cell_not_yet_filled_is_no_problem(load: Callable[..., Any]) -> None:
    module = load("def make():\n    def f(): return later\n    if False: later = 1\n    return f\n")
    assert code_hash(module.make()).startswith("src:")


def test_what_a_function_uses_of_its_own_module_counts(load: Callable[..., Any]) -> None:
    text = """
import math
LEVEL = {level}
CACHE = {cache}
def scaled(x): return x * {factor}
def unused(x): return {factor} + {level}
def f(x): return [scaled(x) for _ in range(math.floor(LEVEL))] + list(CACHE)
"""
    base = code_hash(load(text.format(level=3, factor=2, cache="{}")).f)
    assert base != code_hash(load(text.format(level=3, factor=2, cache="{1: 2}")).f)
    assert base != code_hash(load(text.format(level=4, factor=2, cache="{}")).f)
    assert base != code_hash(load(text.format(level=3, factor=5, cache="{}")).f)


def test_functions_that_call_each_other(load: Callable[..., Any]) -> None:
    text = (
        "def even(n): return n == 0 or odd(n - 1)\ndef odd(n): return n != {} and even(n - 1)\ndef r(n): return r(n)\n"
    )
    module = load(text.format(0))
    assert code_hash(module.even) == code_hash(load(text.format(0)).even)
    assert code_hash(module.even) != code_hash(module.odd)
    assert code_hash(module.even) != code_hash(load(text.format(1)).even)
    assert code_hash(module.r).startswith("src:")
    ring = functools.partial(module.r)
    ring.__setstate__((module.r, (ring,), {}, {}))  # holds itself
    assert code_hash(ring) == code_hash(ring)


def test_decorators_count_with_what_they_wrap(load: Callable[..., Any]) -> None:
    text = """
import functools
def twice(g):
    @functools.wraps(g)
    def wrapper(*args):
        return {n} * g(*args)
    return wrapper
@twice
def f(x):
    return x + {c}
@functools.lru_cache
def cached(x):
    return x + {c}
"""
    base = load(text.format(n=2, c=1))
    wrapper, body = load(text.format(n=3, c=1)), load(text.format(n=2, c=2))
    assert code_hash(base.f) == code_hash(load(text.format(n=2, c=1)).f)
    assert len({code_hash(module.f) for module in (base, wrapper, body)}) == 3
    assert code_hash(base.cached) == code_hash(wrapper.cached) != code_hash(body.cached)
    assert function_name(base.f) == "code_under_test:f"
    assert function_name(base.cached) == "code_under_test:cached"


def test_lambdas_by_their_byte_code() -> None:
    def make(n: int) -> Any:
        return lambda x, y=1: x + n + y

    one, other = (lambda x: x + 1), (lambda x: x + 2)
    assert code_hash(one).startswith(BYTE)
    assert code_hash(one) == code_hash(lambda x: x + 1)
    assert code_hash(one) != code_hash(other)
    assert code_hash(make(1)) == code_hash(make(1)) != code_hash(make(2))
    assert code_hash(lambda x, n=3: x) != code_hash(lambda x, n=4: x)
    assert code_hash(lambda x, *, n=3: x) != code_hash(lambda x, *, n=4: x)
    assert code_hash(lambda x: x.real) != code_hash(lambda x: x.imag)
    assert code_hash(lambda x: [y + 1 for y in x]) != code_hash(lambda x: [y + 2 for y in x])
    assert code_hash(lambda: 1) != code_hash(lambda: True)
    assert code_hash(lambda: -0.0) != code_hash(lambda: 0.0)


def test_code_without_source() -> None:
    def define(text: str) -> Any:
        scope: dict[str, Any] = {"__name__": "made"}
        exec(text, scope)
        return scope["C"].m

    text = "class C:\n    def m(self, x):\n        {}\n        return x in {{'a', 'b', 'c'}}, {}\n"
    base = define(text.format("", 1))
    assert code_hash(base).startswith(BYTE)
    assert (
        code_hash(base)
        == code_hash(define(text.format("'docstring'", 1)))
        == code_hash(define("\n" + text.format("", 1)))
    )
    assert code_hash(base) != code_hash(define(text.format("", 2)))
    assert function_name(base) == "made:C.m"


def test_byte_code_hashes_are_the_same_in_every_process() -> None:
    code = "from lazyproc.core.identity import code_hash; print(code_hash(lambda x: x in {'a', 'b', 'c', 'd', 1.5}))"
    hashes = set()
    for seed in ("1", "2"):
        run = [sys.executable, "-c", code]
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
        hashes.add(subprocess.run(run, env=env, capture_output=True, text=True, check=True, timeout=60).stdout)
    assert len(hashes) == 1
    assert hashes.pop().startswith(BYTE)


def test_a_source_changed_after_its_import_is_not_taken_for_the_code_that_runs(load: Callable[..., Any]) -> None:
    module = load(BASE)
    before = code_hash(module.f)
    path = pathlib.Path(module.__file__ or "")
    path.write_text(BASE.replace("1.5", "99.5"), encoding="utf-8")  # a default: the code is still the same …
    assert code_hash(module.f).startswith(("src:", BYTE))
    path.write_text(BASE.replace("**", "//"), encoding="utf-8")
    assert code_hash(module.f).startswith(BYTE)
    path.write_text("# moved\n\n\n" + BASE, encoding="utf-8")
    assert code_hash(module.f) == before or code_hash(module.f).startswith(BYTE)
    path.unlink()
    assert code_hash(module.f).startswith((BYTE, "src:"))


def test_functions_of_a_notebook_have_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook compiles a cell statement by statement, and keeps its text in `linecache`."""

    def run(number: int, cell: str) -> dict[str, Any]:
        name, scope = f"/no/such/cell_{number}", {"__name__": "__main__"}
        monkeypatch.setitem(linecache.cache, name, (len(cell), None, cell.splitlines(keepends=True), name))
        for statement in ast.parse(cell).body:
            exec(compile(ast.Module([statement], []), name, "exec"), scope)
        return scope

    cell = "import numpy as np\nscale = {}\ndef f(x):\n    return scale * np.mean(x)\n"
    base = code_hash(run(1, cell.format(2))["f"])
    assert base.startswith("src:")
    assert base == code_hash(run(2, "# once more\n" + cell.format(2))["f"])
    assert base != code_hash(run(3, cell.format(3))["f"])


def test_partials(load: Callable[..., Any]) -> None:
    f = load(BASE).f
    plain, partial = code_hash(f), code_hash(functools.partial(f, power=3))
    assert partial.startswith("src:")
    assert partial != plain
    assert partial == code_hash(functools.partial(load(BASE).f, power=np.int32(3)))
    assert partial != code_hash(functools.partial(f, power=4))
    assert partial != code_hash(functools.partial(load(CHANGED["operator"]).f, power=3))
    assert code_hash(functools.partial(f, 1)) != code_hash(functools.partial(f, x=1))
    assert code_hash(functools.partial(f, f)) != code_hash(functools.partial(f, len))
    assert code_hash(functools.partial(np.clip, 1)) != code_hash(functools.partial(np.add, 1))
    assert function_name(functools.partial(functools.partial(f, 1), shift=2)) == "code_under_test:f"


def test_objects_that_can_be_called(load: Callable[..., Any]) -> None:
    text = "class C:\n    def __init__(self, n): self.n = n\n    def __call__(self, x): return x {} self.n\n"
    C = load(text.format("+")).C
    assert code_hash(C(1)) == code_hash(C(1)) != code_hash(C(2))
    assert code_hash(C(1)) != code_hash(load(text.format("-")).C(1))
    assert code_hash(C(1)).startswith("src:")
    assert function_name(C(1)) == "code_under_test:C"
    f, g = load(BASE).f, load(CHANGED["operator"]).f
    assert code_hash(np.vectorize(f)) == code_hash(np.vectorize(load(BASE).f)) != code_hash(np.vectorize(g))
    assert function_name(np.vectorize(f)) == "code_under_test:f"


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (len, "builtins:len"),
        (np.sin, "numpy:sin"),
        (str.upper, "builtins:str.upper"),
        (operator.itemgetter(1), "operator:itemgetter"),
        (dict, "builtins:dict"),
        (dict.fromkeys, "builtins:dict.fromkeys"),
        ([].append, "builtins:list.append"),
    ],
)
def test_what_has_no_python_code_goes_by_its_name(f: Any, name: str) -> None:
    assert function_name(f) == name
    base, _, more = code_hash(f).partition("+")
    assert base == f"name:{name}"
    assert bool(more) == (getattr(f, "__name__", "") in ("", "append"))  # which carry something along


def test_names_of_local_functions() -> None:
    def local() -> None: ...

    assert function_name(local) == f"{__name__}:test_names_of_local_functions.<locals>.local"
    assert function_name(lambda: 0).endswith(".<locals>.<lambda>")


@pytest.mark.parametrize(
    ("stored", "now", "expected"),
    [
        ("src:1", "src:1", False),
        ("src:1", "src:2", True),
        ("byte311:1", "byte311:1", False),
        ("byte311:1", "byte312:1", None),
        ("src:1", "byte311:1", None),
        ("name:numpy:sin", "name:numpy:sin", False),
        ("name:numpy:sin", "name:numpy:cos", True),
        ("name:numpy:sin", "src:1", None),
        ("", "src:1", None),
        ("", "", None),
        ("nonsense", "nonsense", None),
        ("src:1+src:0123456789abcdef", "src:1+src:0123456789abcdef", False),
        ("src:1+src:0123456789abcdef", "src:1+src:0123456789abcdee", True),
        ("src:1+src:0123456789abcdef", "src:2+src:0123456789abcdef", True),
        ("src:1", "src:1+src:0123456789abcdef", None),  # an earlier version looked at less
        ("src:1", "src:2+src:0123456789abcdef", True),
        ("name:operator:itemgetter", "name:operator:itemgetter+src:0123456789abcdef", None),
        ("src:1+src:0123456789abcdef", "src:1+byte311:0123456789abcdef", None),
    ],
)
def test_comparing_hashes(stored: str, now: str, expected: bool | None) -> None:
    assert code_changed(stored, now) is expected


# -- what a function carries along, or reads ---------------------------------------------------------------------------

USER = """
import functools, operator
CONF = {{"gain": {gain}, "other": [1, None, {{"x", "y", "z"}}]}}
K = [{k}]
CALLS = []
class P:
    GAIN = {attribute}
    @staticmethod
    def helper(x): return x + {helper}
    @property
    def double(self): return {double}
    def unused(self): return {unused}
class Model:
    def __init__(self, n): self.n = n
    def fit(self, x): return self.part(x) * self.n
    def part(self, x): return x + {part}
model = Model({model})
pick = operator.itemgetter({pick})
@functools.lru_cache
def cached(x): return x * {cached}
def f(x):
    CALLS.append(x)
    return CONF["gain"] * x[K[0]] + P.GAIN + P.helper(x) + P().double + model.fit(x) + pick(x) + cached(1)
"""
VALUES = dict.fromkeys(("gain", "k", "attribute", "helper", "double", "unused", "part", "model", "pick", "cached"), 1)


@pytest.mark.parametrize("name", VALUES)
def test_what_a_function_reads_of_its_module_counts(name: str, load: Callable[..., Any]) -> None:
    base, other = load(USER.format(**VALUES)), load(USER.format(**{**VALUES, name: 2}))
    before = code_hash(base.f)
    base.CALLS += [1, 2]  # the code itself changes it
    assert code_hash(base.f) == before
    assert code_hash(load("\n" + USER.format(**VALUES), "__main__").f) == before
    assert code_changed(before, code_hash(other.f)) is (name != "unused")
    assert unnamed(base.f) == ""


class Model:
    """One that users would write."""

    def __init__(self, n: Any) -> None:
        self.n = n

    def fit(self, x: Any) -> Any:
        return x * self.n


class Slots:
    __slots__ = ("n",)

    def __init__(self, n: Any) -> None:
        self.n = n

    def __call__(self, x: Any) -> Any:
        return x * self.n


def use(x: Any, model: Any = None) -> Any:
    return x, model


def closing_over(item: Any) -> Any:
    def f(x: Any) -> Any:
        return x, item

    return f


def with_default(item: Any) -> Any:
    def f(x: Any, item: Any = item) -> Any:
        return x, item

    return f


CARRYING: dict[str, tuple[Any, Any, str]] = {
    "reduce": (np.add.reduce, np.maximum.reduce, "reduce"),
    "itemgetter": (operator.itemgetter(0), operator.itemgetter(3), "itemgetter"),
    "methodcaller": (operator.methodcaller("sum"), operator.methodcaller("max"), "methodcaller"),
    "method": (Model(1).fit, Model(2).fit, "fit"),
    "method of an array": (np.arange(3).take, np.arange(4).take, "take"),
    "slots": (Slots(1), Slots(2), "Slots"),
    "partial": (functools.partial(use, model=Model(1)), functools.partial(use, model=Model(2)), "use"),
    "partial of a builtin": (
        functools.partial(np.add.reduce, axis=0),
        functools.partial(np.add.reduce, axis=1),
        "reduce",
    ),
    "lambda": (functools.partial(lambda x, m: m, m=Model(1)), functools.partial(lambda x, m: m, m=Model(2)), "lambda"),
    "closure": (closing_over(Model(1)), closing_over(Model([1])), ""),
    "closure of objects": (closing_over([Model(1)]), closing_over([Model(2)]), ""),
    "closure of a method": (closing_over(Model(1).fit), closing_over(Model(2).fit), ""),
    "default": (with_default(Model({"a": np.zeros(3)})), with_default(Model({"a": np.ones(3)})), ""),
    "random": (closing_over(np.random.default_rng(1)), closing_over(np.random.default_rng(2)), ""),
    "beside a lock": (closing_over([threading.Lock(), 1]), closing_over([threading.Lock(), 2]), ""),
    "vectorize": (np.vectorize(use, otypes="d"), np.vectorize(use, otypes="f"), ""),
}


@pytest.mark.parametrize("what", CARRYING)
def test_what_a_function_carries_along_counts(what: str) -> None:
    one, other, name = CARRYING[what]
    assert code_hash(one) == code_hash(one)
    assert code_hash(one).partition("+")[0] == code_hash(other).partition("+")[0] or what == "partial of a builtin"
    assert code_changed(code_hash(one), code_hash(other)) is True
    assert unnamed(one) == unnamed(other) == name


def test_equal_objects_carry_the_same() -> None:
    assert code_hash(Model(1).fit) == code_hash(Model(1).fit)
    assert code_hash(closing_over(Model({"a": 1, "b": 2}))) == code_hash(closing_over(Model({"b": 2, "a": 1})))
    ring = Model(None)
    ring.n = [ring, {ring: ring}]
    assert code_hash(ring.fit) == code_hash(ring.fit)


def test_a_function_for_each_type_is_the_same_after_a_call(load: Callable[..., Any]) -> None:
    """It keeps in weak references for which types it was called."""
    text = "import functools\n@functools.singledispatch\ndef f(x): return {}\n@f.register\ndef _(x: int): return {}\n"
    f = load(text.format(1, 1)).f
    before = code_hash(f)
    assert f(3.5) + f(1) == 2
    assert code_hash(f) == before
    assert code_changed(before, code_hash(load(text.format(1, 2)).f)) is True


def test_what_cannot_be_taken_apart_counts_by_its_type() -> None:
    """Nothing is said that might be another time, or take too long."""
    for made in (threading.Lock, object, lambda: (i for i in ()), lambda: Model(np.zeros(LARGEST // 8 + 1))):
        assert code_hash(closing_over(made())) == code_hash(closing_over(made()))
        assert "+" not in code_hash(closing_over(made()))
    assert "+" in code_hash(closing_over(Model(np.zeros(LARGEST // 8 - 100))))


def test_plain_functions_have_the_hashes_of_earlier_versions(load: Callable[..., Any]) -> None:
    assert code_hash(load(BASE).f) == "src:f177728e3ad40790"
    assert code_hash(functools.partial(load(BASE).f, power=[1, 2])) == "src:54d8ae2adc95e080"
    text = "import numpy as np\nN = (1, 'a')\nA = np.arange(3)\n"
    text += "def g(x): return x + N[0]\ndef f(x): return np.sum(g(x) * A)\n"
    assert code_hash(load(text).f) == "src:235ec1528a0c7d81"


def test_hashes_of_objects_are_the_same_in_every_process() -> None:
    code = (
        "import numpy as np, functools, fractions, re; from lazyproc.core.identity import code_hash\n"
        "class M:\n    def __init__(self, n): self.n = n\n    def f(self, x): return self.n\n"
        "n = [{'a', 'b', 3}, {'k': np.arange(3), 1: None}, np.random.default_rng(3), fractions.Fraction(3), M, len]\n"
        "print(code_hash(M(n).f), code_hash(M([re.compile('a'), object(), functools.partial(M(n).f, 1)]).f))"
    )
    hashes = set()
    for seed in ("1", "2", "3"):
        run = [sys.executable, "-c", code]
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
        hashes.add(subprocess.run(run, env=env, capture_output=True, text=True, check=True, timeout=60).stdout)
    assert len(hashes) == 1
    assert hashes.pop().count("+") == 2


def test_names_that_do_not_say_what_is_computed() -> None:
    class Empty:
        def f(self, x: Any) -> Any:
            return x

        @classmethod
        def g(cls, x: Any) -> Any:
            return x

    for f in (
        use,
        np.std,
        Empty().f,
        Empty.g,
        Empty.f,
        functools.lru_cache(use),
        functools.partial(use, model=[1, "a"]),
    ):
        assert unnamed(f) == "", f
    for f, name in ((len, "len"), (np.sin, "sin"), (lambda x: x, "lambda"), (Empty, "Empty")):
        assert unnamed(f) == name
    assert unnamed(functools.partial(use, model=lambda x: x)) == "use"
