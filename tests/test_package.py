"""The package: what an import costs, which way imports run, what is installed."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.resources
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from usid_files import make_usid_file

import lazyproc

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lazyproc"
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("asyncio", "dask.array", "distributed", "xarray", "matplotlib", "scipy")


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- what an import costs --------------------------------------------------------------------------------------------

LOADED = f"import json; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"


def test_importing_the_package_loads_nothing_heavy():
    assert json.loads(run_python(f"import sys, lazyproc; {LOADED}")) == []
    assert json.loads(run_python(f"import sys; from lazyproc import Process, Output, Dimension; {LOADED}")) == []


SMALL_JOB = f"""
import sys, lazyproc
class Mean(lazyproc.Process):
    outputs = {{"Mean": lazyproc.Output("f4")}}
    @staticmethod
    def _map_function(spectrum):
        return spectrum.mean()
with Mean(sys.argv[1], cores=int(sys.argv[2])) as process:
    process.test()
    process.plan()
    assert process.compute()["Mean"].shape == (20, 1)
    process.compute()
{LOADED}
"""


@pytest.mark.parametrize("cores", ["1", "2"])
def test_a_small_job_loads_neither_dask_arrays_nor_a_cluster(tmp_path, cores):
    address = "::".join(make_usid_file(tmp_path / "a.h5"))
    assert json.loads(run_python(SMALL_JOB, address, cores)) == []


NOT_NEEDED = (
    "lazyproc.core.plan",
    "lazyproc.engine.distant",
    "lazyproc.engine.messages",
    "lazyproc.engine.mpi",
    "lazyproc.engine.ranks",
    "lazyproc.engine.spread",
    "lazyproc.engine.trial",
    "lazyproc.hdf5.claims",
    "lazyproc.hdf5.counter",
    "lazyproc.hdf5.shared_file",
    "lazyproc.hooks.ranks",
    "lazyproc.layout",
    "lazyproc.results",
    "lazyproc.run.collective",
    "lazyproc.run.retry",
    "lazyproc.views",
    "multiprocessing",
    "tempfile",
)


def test_a_run_in_this_process_loads_nothing_of_clusters_ranks_and_views(tmp_path):
    """What a short job loads is most of what it takes."""
    code = f"""
import json, sys, lazyproc
group = lazyproc.map_positions(len, sys.argv[1], lazyproc.Output("f4"), cores=1)
print(json.dumps([name for name in {NOT_NEEDED!r} if name in sys.modules]))
"""
    assert json.loads(run_python(code, "::".join(make_usid_file(tmp_path / "a.h5")))) == []


def test_a_worker_process_loads_no_hdf5():
    """For contiguous data, which it reads and writes as bytes; and nobody loads `numpy.ma` to tell what is masked."""
    code = """import sys, json
import numpy, lazyproc.engine.worker, lazyproc.hdf5.sink, lazyproc.hdf5.extents
from lazyproc.hdf5.extents import ExtentSource
print(json.dumps([name for name in ("h5py", "numpy.ma", "dask", "psutil") if name in sys.modules]))"""
    assert json.loads(run_python(code)) == []
    code = "import sys, lazyproc.process, lazyproc.mapping; print('numpy.ma' in sys.modules, 'html' in sys.modules)"
    assert run_python(code).split() == ["False", "False"]


def test_every_name_of_the_package_is_there():
    assert sorted(lazyproc.__all__) == lazyproc.__all__
    for name in lazyproc.__all__:
        assert getattr(lazyproc, name).__doc__, name
        assert name in dir(lazyproc)
    with pytest.raises(AttributeError, match="no attribute 'Porcess'"):
        lazyproc.Porcess  # noqa: B018


# --- which way imports run -------------------------------------------------------------------------------------------

FLOORS = [
    {"core"},
    {"hdf5", "engine"},
    {
        "arguments",
        "clusters",
        "drain",
        "layout",
        "main_handle",
        "progress",
        "results",
        "status",
        "together",
        "verbose",
        "views",
        "watch",
    },
    {"hooks", "run"},
    {"definition", "opening", "showing"},
    {"process"},
    {"compat", "loading", "making", "mapping", "slurm"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
"""From the ground up; a module may import its own floor and those below, except that the two of `APART` are apart."""
APART = [{"hdf5", "engine"}, {"hooks", "run"}]


def part_of(module: str) -> str:
    """Return the part of lazyproc that a module belongs to: "lazyproc.core.runs" to "core"."""
    return module.split(".")[1] if "." in module else ""


def level(part: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if part in floor)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class Imports(ast.NodeVisitor):
    """Collects what a file imports when it runs, inside functions, too."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) != "TYPE_CHECKING":
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, f"line {node.lineno}: a relative import"
        module = node.module or ""
        names = {f"{module}.{alias.name}" for alias in node.names}
        self.found |= {name for name in names if is_module(name)} or {module}


def imported(path: Path) -> set[str]:
    """Return the modules that a file imports."""
    imports = Imports()
    imports.visit(ast.parse(path.read_text(encoding="utf-8")))
    return imports.found


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return name.startswith("lazyproc.") and (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file())


def own_imports(path: Path) -> set[str]:
    return {name for name in imported(path) if name.startswith("lazyproc.")}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_downward(path):
    part = part_of(name_of(path))
    if not part:
        return  # the package itself, which loads names only when they are used
    for name in own_imports(path):
        other = part_of(name)
        assert level(other) <= level(part), f"{name_of(path)} imports {name}"
        assert {part, other} not in APART, f"{name_of(path)} imports {name}"


def test_every_module_has_a_floor_and_no_floor_is_empty():
    parts = {part_of(name_of(path)) for path in MODULES} - {""}
    assert parts == set().union(*FLOORS)


def test_modules_of_a_floor_import_each_other_without_a_circle():
    graph = {name_of(path): own_imports(path) for path in MODULES if name_of(path) != "lazyproc"}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle of imports: {' -> '.join((*way, name))}"
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


LIBRARIES = {"core": {"numpy"}, "hdf5": {"deflate", "h5py", "isal", "numcodecs", "numpy", "psutil", "xxhash"}}


@pytest.mark.parametrize("path", [path for path in MODULES if part_of(name_of(path)) in LIBRARIES], ids=name_of)
def test_the_lower_floors_need_few_libraries(path):
    outside = {name.partition(".")[0] for name in imported(path)} - set(sys.stdlib_module_names) - {"lazyproc"}
    assert outside <= LIBRARIES[part_of(name_of(path))]


@pytest.mark.parametrize("path", [path for path in MODULES if part_of(name_of(path)) == "engine"], ids=name_of)
def test_engines_know_nothing_of_hdf5(path):
    assert not {name.partition(".")[0] for name in imported(path)} & {"h5py", "xarray"}


# --- manners ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_prints_or_swallows_everything(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the first line states the idea of the module"
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.Name) and node.id == "print"), f"line {node.lineno} prints"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"line {node.lineno}: a bare except"


def test_types_are_shipped():
    assert importlib.resources.files("lazyproc").joinpath("py.typed").is_file()


# --- what is installed -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirement(text: str) -> tuple[str, str]:
    """Split "NumPy >=1.26" into a normalised name and its bounds."""
    match = re.fullmatch(r"\s*([A-Za-z0-9._-]+)\s*(.*?)\s*", text)
    assert match, text
    return re.sub(r"[-_.]+", "-", match[1]).lower(), match[2].replace(" ", "")


def test_the_version_is_the_same_everywhere(project):
    assert project["version"] == lazyproc.__version__
    assert re.search(rf"^## {re.escape(lazyproc.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_installed_package_is_this_one(project):
    assert importlib.metadata.version("lazyproc") == project["version"]
    (point,) = importlib.metadata.entry_points(group="console_scripts", name="lazyproc")
    assert point.value == project["scripts"]["lazyproc"]


def test_the_conda_environment_equals_the_dependencies(project):
    yaml = pytest.importorskip("yaml")
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["channels"] == ["conda-forge"]
    listed = environment["dependencies"]
    conda = [requirement(item.replace("python-isal", "isal")) for item in listed if isinstance(item, str)]
    pip = [requirement(text) for item in listed if isinstance(item, dict) for text in item["pip"]]
    versions = dict(conda)
    assert len(versions) == len(conda), "a package is listed twice"
    assert versions.pop("python").replace(" ", "") == project["requires-python"].replace(" ", "")
    versions.pop("pip", None)
    extras = [text for name in ("dashboard", "mpi") for text in project["optional-dependencies"][name]]
    wanted = [text for text in project["dependencies"] + extras if not text.startswith("lazyproc[")]
    assert {**versions, **dict(pip)} == dict(map(requirement, wanted))


def test_what_is_imported_is_a_dependency(project):
    known = {requirement(text)[0] for text in project["dependencies"]} | {"mpi4py"}  # loaded under mpiexec only
    outside = {name.partition(".")[0] for path in MODULES for name in imported(path)}
    outside -= {*sys.stdlib_module_names, "lazyproc"}
    assert {name.lower().replace("_", "-") for name in outside} <= known


def test_the_extras_are_there(project):
    assert set(project["optional-dependencies"]) >= {"docs", "interop", "mpi", "test"}
    assert project["requires-python"] == ">=3.11"
    assert project["license"] == "MIT"
    assert (ROOT / "LICENSE").is_file()


def test_the_command_line_starts_without_loading_what_it_does_not_need():
    code = f"import sys; sys.argv = ['lazyproc', '--help']; import lazyproc.cli; {LOADED}"
    assert json.loads(run_python(code)) == []
    assert importlib.import_module("lazyproc.cli").main.name
