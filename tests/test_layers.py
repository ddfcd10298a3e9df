"""The house rules that a parser can check: reading order, one home per dependency, lazy names, ceilings."""

import ast
import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import skillbank

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "skillbank"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}

ORDER = [
    *(
        "words",
        "memory",
        "certificate",
        "tensors",
        "core",
        "skill",
        "adapter",
        "lints",
        "formats",
        "layers",
        "attach",
        "folding",
        "model",
        "tokenizer",
        "statistics",
    ),
    "localise",
    *("merge", "bank", "gate", "mixture", "routers", "runtime", "load", "server", "shards", "exchange", "search", "artifacts"),
    *("progress", "fit", "learn", "kshot", "recipe", "reproduce", "models", "tasks", "online"),
    *("levels", "unlearn", "evaluation", "discovery", "report", "display", "cli"),
]
"""Reading order: at module level a part of the package imports from those before it only."""

BANK = [
    *("refs", "sealed", "card", "layout", "aliases", "query", "index", "checkpoint", "records", "links", "publish", "removal", "folder", "hub"),
    *("remote", "verify"),
    *("reader", "transfer", "store"),
]
"""Reading order inside the bank."""

HOMES = {
    "accelerate": {"fit", "progress", "runtime.sharded"},
    "dm_control": {"tasks.environments"},
    "filelock": {"bank.sealed"},
    "fsspec": {"bank.remote"},
    "datasets": {"tasks.records"},
    "gymnasium": {"online", "tasks.ball", "tasks.environments"},
    "h5py": {"tasks.demonstrations"},
    "huggingface_hub": {"bank.hub"},
    "hydra": {"recipe"},
    "nevergrad": {"learn"},
    "jinja2": {"report"},
    "matplotlib": {"report"},
    "minari": {"tasks.demonstrations"},
    "lm_eval": {"evaluation"},
    "mujoco": {"tasks.dynamics"},
    "omegaconf": set(),
    "peft": {"attach"},
    "PIL": {"report"},
    "rich": {"display"},
    "safetensors": {"tensors", "bank.records"},
    "stable_baselines3": {"online"},
    "tokenizers": {"tokenizer"},
    "tqdm": {"fit"},
    "transformers": {"attach", "layers", "shards", "models.encoder", "models.pretrained", "models.transformer", "tasks.tokens", "tokenizer"},
    "triton": {"runtime.kernels", "tasks.environments"},
    "typer": {"cli.app", "cli.look", "cli.write"},
    "wandb": {"artifacts", "fit"},
}
"""Where each dependency beside torch and numpy may be imported, at module level or lazily; an empty set is nowhere in the package."""

OPTIONAL = [
    "PIL",
    "datasets",
    "dm_control",
    "gymnasium",
    "h5py",
    "hydra",
    "jinja2",
    "matplotlib",
    "minari",
    "mujoco",
    "omegaconf",
    "rich",
    "stable_baselines3",
    "triton",
    "typer",
    "wandb",
]
CEILINGS = {"": (400, 60), "bank": (350, 50)}
"""Lines of a file and of a function; fewer in the bank."""


def test_the_tables_above_are_complete():
    assert {name.split(".")[1] for name in FILES} == set(ORDER)
    assert {name.split(".")[2] for name in FILES if name.startswith("skillbank.bank.")} == set(BANK)


def typing_only(tree):
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return {id(inner) for block in blocks for statement in block.body for inner in ast.walk(statement)}


def imports(path, *, lazy):
    """Names of the modules that a file imports outside TYPE_CHECKING, at module level or, with `lazy`, anywhere."""
    tree = ast.parse(path.read_text())
    hidden = typing_only(tree)
    for node in ast.walk(tree) if lazy else ast.iter_child_nodes(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and isinstance(node.args[0], ast.Constant):
            yield node.args[0].value


@pytest.mark.parametrize("name", FILES)
def test_reading_order_is_import_order(name):
    parts = name.split(".")[1:]
    for imported in imports(FILES[name], lazy=False):
        if not imported.startswith("skillbank."):
            continue
        other = imported.split(".")[1:]
        if other[0] != parts[0]:
            assert ORDER.index(other[0]) < ORDER.index(parts[0]), f"{name} imports {imported}"
        elif parts[0] == "bank" and len(parts) == len(other) == 2:
            assert BANK.index(other[1]) < BANK.index(parts[1]), f"{name} imports {imported}"
    assert "skillbank" not in imports(FILES[name], lazy=True), f"{name} imports the package itself"


def test_models_and_tasks_share_nothing_but_the_protocols_and_the_bank():
    for name, path in FILES.items():
        part = name.split(".")[1]
        if part in ("models", "tasks"):
            parts = {imported.split(".")[1] for imported in imports(path, lazy=True) if imported.startswith("skillbank.")}
            assert parts <= {part, "model", "skill", "bank", "tokenizer"}, name


def test_every_dependency_has_its_one_home():
    found = {dependency: set() for dependency in HOMES}
    for name, path in FILES.items():
        for imported in imports(path, lazy=True):
            top = imported.split(".")[0]
            if top not in (*sys.stdlib_module_names, "skillbank", "torch", "numpy"):
                assert top in HOMES, f"{name} imports {imported}, which has no home yet"
                found[top].add(name.removeprefix("skillbank."))
    assert found == HOMES


def test_what_is_imported_is_declared():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {line.split(">")[0].replace("-", "_").lower() for line in lines}
    owners = packages_distributions()
    for top in {*HOMES, "torch", "numpy"} - {"omegaconf"}:
        assert any(owner.replace("-", "_").lower() in declared for owner in owners[top]), top


IMPORT = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import skillbank as sb
heavy = {{"torch", "numpy", "peft", "transformers", "accelerate", "safetensors"}} & set(sys.modules)
assert not heavy, heavy
for name in sb.__all__:
    getattr(sb, name)
import skillbank.merge, skillbank.fit, skillbank.load, skillbank.attach
from skillbank.merge import merge
assert sb.merge is merge and callable(sb.fit) and callable(sb.load) and callable(sb.attach)
assert set(sb.__all__) <= set(dir(sb))
"""


def test_the_package_needs_its_core_dependencies_only():
    code = IMPORT.format(blocked=OPTIONAL)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr[-2000:]


def test_functions_are_not_hidden_by_their_modules():
    import skillbank.attach
    import skillbank.fit
    import skillbank.load
    import skillbank.merge

    for name in ("attach", "fit", "load", "merge"):
        assert getattr(skillbank, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'skillbank' has no attribute 'mrege'"):
        skillbank.mrege  # noqa: B018


def test_public_names_are_documented_and_exist():
    for name in skillbank.__all__:
        assert getattr(skillbank, name).__doc__, name
    for module, path in FILES.items():
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), module
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{module}.{node.name}"


def body_lines(function):
    """Lines of a function without its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_ceilings():
    scripts = [ROOT / "train.py", ROOT / "compose.py", *(ROOT / "benchmarks").glob("*.py")]
    for path in [*FILES.values(), PACKAGE / "__init__.py", *scripts]:
        text = path.read_text()
        lines, body = CEILINGS["bank" if path.parent == PACKAGE / "bank" else ""]
        assert len(text.splitlines()) <= lines, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert body_lines(node) <= body, f"{path}: {node.name}"


def test_no_python_in_the_bank():
    """A Python file there would shadow, or become, the PyPI package `adapters`."""
    assert not [*(ROOT / "adapters").rglob("*.py")]


def test_the_wheel_holds_the_package_only(tmp_path):
    import tomllib

    from setuptools import find_packages

    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set(find_packages(str(ROOT), include=tool["packages"]["find"]["include"]))
    assert found == {"skillbank", *(name for name, path in FILES.items() if path.name == "__init__.py")}
    assert {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in FILES.values()} == found
    assert (PACKAGE / "py.typed").exists()
    assert tool["package-data"] == {"skillbank": ["py.typed"]}
