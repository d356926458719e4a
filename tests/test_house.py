"""The order of the house: which package may import which, what is never used, and what a CPU never loads."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("lte", "models", "training", "eval")
ALLOWED = {
    "lte": {"lte"},
    "models": {"lte", "models"},
    "training": {"lte", "models", "training"},
    "eval": {"lte", "models", "eval"},
    "lalte": {"lte", "models", "training", "eval", "benchmarks"},
}
FILES = sorted([ROOT / "lalte.py", *(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))])


def name(file):
    return str(file.relative_to(ROOT))


def package(file):
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(file):
    """(module, line) of every import, in functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = file.relative_to(ROOT).with_suffix("").parts[: -node.level]
                yield ".".join([*parts, node.module or ""]).rstrip("."), node.lineno
            else:
                yield node.module, node.lineno
                for alias in node.names:  # from lte import kernels
                    yield f"{node.module}.{alias.name}", node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((arg.value, node.lineno) for arg in node.args if isinstance(arg, ast.Constant))


def top(module):
    return module.split(".")[0]


def test_there_are_files():
    assert {package(file) for file in FILES} == {*PACKAGES, "lalte"}


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_go_one_way(file):
    own = {*PACKAGES, "lalte", "tests", "benchmarks"}
    wrong = [(m, n) for m, n in imported(file) if top(m) in own - ALLOWED[package(file)]]
    assert not wrong, f"{name(file)} may only import {ALLOWED[package(file)]}"


@pytest.mark.parametrize("file", FILES, ids=name)
def test_where_libraries_enter(file):
    modules = {top(m) for m, _ in imported(file)}
    if package(file) == "lte":
        assert not modules & {"transformers", "fla", "datasets", "accelerate"}
        assert "triton" not in modules or file.is_relative_to(ROOT / "lte" / "kernels")
    else:
        assert "triton" not in modules
    assert "fla" not in modules or name(file) == "models/fla_adapter.py"


@pytest.mark.parametrize("file", FILES, ids=name)
def test_kernels_are_imported_where_they_are_used(file):
    """Importing a module must not import Triton; only a call may."""
    if file.is_relative_to(ROOT / "lte" / "kernels"):
        return
    tree = ast.parse(file.read_text(encoding="utf-8"))
    outer = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
    for node in outer.body:
        text = ast.unparse(node)
        assert not re.search(r"lte\.kernels|from lte import .*kernels|\bfla\b|\btriton\b", text), text


@pytest.mark.parametrize("file", FILES, ids=name)
def test_no_pickle(file):
    """Weights and sessions are safetensors; nothing that could run code is ever opened."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert not {top(m) for m, _ in imported(file)} & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
    safe = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False", "numpy.load": "allow_pickle=False"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            call, options = ast.unparse(node.func), {ast.unparse(k) for k in node.keywords}
            assert call != "torch.save", f"line {node.lineno}"
            assert safe.get(call) in {None, *options}, f"line {node.lineno}: {call} without {safe[call]}"
            assert not options & {"weights_only=False", "allow_pickle=True", "trust_remote_code=True"}, node.lineno


def test_a_cpu_needs_neither_triton_nor_fla():
    """`import lalte` registers the models with transformers; they run where neither library can be imported."""
    code = """
import sys
sys.modules["triton"] = sys.modules["fla"] = None  # importing them fails
import lalte
import torch
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model(
    "lalte", vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, gdn_num_heads=2,
    gdn_head_dim=8, window=9, budget=3, sinks=1)
model = AutoModelForCausalLM.from_config(config)
ids = torch.arange(30)[None]
model(ids, labels=ids).loss.backward()
model.eval().generate(ids, max_new_tokens=3, do_sample=False)
print(type(model).__name__, [name for name in sys.modules if name.startswith("lte.kernels")])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "HybridForCausalLM []\n"
