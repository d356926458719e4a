"""The Python of docs/using.md does what the page says."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "using.md"

# errors name the page's line
RUN = """
import re, sys
text = open(sys.argv[1], encoding="utf-8").read()
names = {"__name__": "__main__"}
for block in re.finditer(r"^```python\\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
    lines = "\\n" * text.count("\\n", 0, block.start(1))
    exec(compile(lines + block[1], sys.argv[1], "exec"), names)
    print("ran the block at", text.count("\\n", 0, block.start()) + 1)
"""


def test_the_page_runs(tmp_path):
    """In a folder that has what the repository has, on the CPU, in a process of its own."""
    for name in ("checkpoints", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(PAGE)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    blocks = [n for n, line in enumerate(PAGE.read_text(encoding="utf-8").splitlines(), 1) if line == "```python"]
    assert len(blocks) >= 6
    assert [int(n) for n in re.findall(r"^ran the block at (\d+)$", done.stdout, re.MULTILINE)] == blocks


def test_names_that_come_late():
    """`RetentionCallback` brings training with it only when it is asked for."""
    code = """
import sys
import lalte
assert "RetentionCallback" in dir(lalte) and "training" not in sys.modules
from transformers import TrainerCallback
assert issubclass(lalte.RetentionCallback, TrainerCallback)
try:
    lalte.Retention
except AttributeError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "module 'lalte' has no attribute 'Retention'\n", done.stderr
