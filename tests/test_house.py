"""The size and shape of the project: budgets of the core that may only fall, and imports that point one way."""
import ast
import io
import shutil
import subprocess
import sys
import tokenize

from conftest import ROOT

# Budgets of the core. Lower them when something goes out; what comes in has to make room first.
# Since the fused kernels of a GPU came in (kernels/fused.py and others, 4,700 tokens) they are above the 29,600 and 3,300 of before.
TOKENS = 32_025      # Python's NAME, OP, NUMBER and STRING tokens: comments and the length of lines do not count
LINES = 3_590
FUNCTION = 84        # lines of the longest function
WIDE = 0              # share of lines over 100 columns
NESTED = 0           # comprehensions inside of a comprehension

SCRIPTS = ("sample", "guard", "train", "eval")
CORE = [*(ROOT / f"{name}.py" for name in ("thinksafe", *SCRIPTS)), *sorted(ROOT.glob("kernels/*.py"))]
LAYERS = ("kernels", "thinksafe", "data", *SCRIPTS, "extras", "tests")     # each imports only what stands before it, or itself
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def name_of(path):
    return str(path.relative_to(ROOT))


def tree(path):
    return ast.parse(path.read_text("utf-8"))


def n_tokens(path):
    """The tokens of a file, with an f-string as one, as it was before Python 3.12."""
    n = inside = 0
    for token in tokenize.tokenize(io.BytesIO(path.read_bytes()).readline):
        kind = tokenize.tok_name[token.type]
        inside -= kind == "FSTRING_END"
        n += not inside and kind in ("NAME", "OP", "NUMBER", "STRING", "FSTRING_END")
        inside += kind == "FSTRING_START"
    return n


def nested_comprehensions(path):
    """file:line of each comprehension with another one inside of it."""
    return [f"{name_of(path)}:{node.lineno}" for node in ast.walk(tree(path)) if isinstance(node, COMPREHENSIONS)
            and any(isinstance(n, COMPREHENSIONS) for n in ast.walk(node) if n is not node)]


def test_the_core_is_small():
    tokens = {name_of(path): n_tokens(path) for path in CORE}
    lines = {name_of(path): len(path.read_text("utf-8").splitlines()) for path in CORE}
    assert sum(tokens.values()) <= TOKENS, str(tokens)
    assert sum(lines.values()) <= LINES, str(lines)


def test_no_function_of_the_core_is_long():
    sizes = {f"{name_of(path)}: {node.name}": node.end_lineno - node.lineno + 1 for path in CORE for node in ast.walk(tree(path))
             if isinstance(node, ast.FunctionDef)}
    assert not {name: size for name, size in sizes.items() if size > FUNCTION}


def test_lines_of_the_core_fit():
    lines = [(f"{name_of(path)}:{number}", line) for path in CORE for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)]
    wide = [where for where, line in lines if len(line) > 100]
    assert len(wide) <= WIDE * len(lines), str(wide)


def test_no_comprehension_of_the_core_is_nested():
    found = [where for path in CORE for where in nested_comprehensions(path)]
    assert len(found) <= NESTED, str(found)


# ---------------------------------------------------------------------------------------------
# Imports

KERNELS = {path.stem for path in ROOT.glob("kernels/*.py")}


def layer(module):
    """The layer of an imported module of ours, or None. A kernel is imported by its own name: kernels/ is no package."""
    top = module.partition(".")[0]
    return "kernels" if top in KERNELS else "data" if module == "tiny.world" else top if top in LAYERS else None


def imported(node):
    """The modules that a statement imports, as far as they can be told from it."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, ast.unparse(node)
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def imports_upwards(path, here):
    """file:line of each import, also inside of functions, of something above the layer `here`."""
    return [f"{name_of(path)}:{node.lineno}: {module}" for node in ast.walk(tree(path)) for module in imported(node)
            if layer(module) and LAYERS.index(layer(module)) > LAYERS.index(here)]


def test_imports_point_one_way():
    files = {path: path.stem for path in CORE if path.parent == ROOT}
    files |= {path: path.parent.name for folder in ("kernels", "data", "extras") for path in ROOT.glob(f"{folder}/*.py")}
    files[ROOT / "tiny" / "world.py"] = "data"                        # which eval.py asks for its oracle
    assert not [where for path, here in files.items() for where in imports_upwards(path, here)]


def test_kernels_import_nothing_of_ours_but_kernels():
    ours = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    found = {f"{path.stem}: {module}" for path in ROOT.glob("kernels/*.py") for node in ast.walk(tree(path)) for module in imported(node)
             if module.partition(".")[0] in ours}
    assert not found


def test_an_import_that_points_up_is_seen(tmp_path, monkeypatch):
    """So that the tests above can fail."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "guard.py"
    for line, n in (("from sample import Sampler", 0), ("import torch", 0), ("import train", 1), ("from eval import table", 2), ("from extras import chat", 2),
                    ("from tests.conftest import run", 2), ("def f():\n    import extras.chat", 1), ("x = [[i for i in j] for j in y]", 0)):
        path.write_text(line)
        assert len(imports_upwards(path, "guard")) == n, line
    assert len(nested_comprehensions(path)) == 1 and len(imports_upwards(path, "guard")) == 0


def test_kernels_is_no_package():
    """A package of that name would hide the hub's, or be hidden by it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


# ---------------------------------------------------------------------------------------------
# What is on top can go


HELP_OF_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    script = importlib.import_module(name)
    sys.argv = [name + ".py", "--help"]
    try:
        script.main()
    except SystemExit as e:
        assert e.code == 0
print("loaded:", sorted({"extras", "tests", "conftest"} & {name.partition(".")[0] for name in sys.modules}))
"""


def test_the_core_works_without_extras_and_tests(tmp_path):
    for path in ROOT.iterdir():
        if path.suffix == ".py":
            shutil.copy(path, tmp_path)
        elif path.name in ("kernels", "data", "tiny", "runs"):
            shutil.copytree(path, tmp_path / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-c", HELP_OF_ALL, *SCRIPTS], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.endswith("loaded: []\n")
    for name in SCRIPTS:
        assert f"usage: {name}.py" in done.stdout
