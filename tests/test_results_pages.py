"""Figures that pages state are those of the results' files."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import cost

ROOT = Path(__file__).parents[1]
SMALL = ROOT / "results" / "small"
SEEDS = (SMALL, SMALL / "seed-1", SMALL / "seed-2", SMALL / "seed-3")
LENGTHS = (512, 1024, 2048, 4096)
BUDGET = re.compile(r"budget (\d+)$")
MEASURED = ("scaling", "train-amp", "train-steps", "train-1.4b")  # of the table of costs


def tables(page):
    """(line of the first row, header, rows) of each table of a page; cells without what makes them bold."""
    found, lines = [], page.read_text(encoding="utf-8").splitlines()
    cells = lambda line: [cell.strip().replace("**", "") for cell in line.strip("|").split("|")]
    for number, line in enumerate(lines):
        if line.startswith("|---"):
            last = next((n for n in range(number, len(lines)) if not lines[n].startswith("|")), len(lines))
            found.append((number + 2, cells(lines[number - 1]), list(map(cells, lines[number + 1 : last]))))
    return found


def results(folder, model, budget=None):
    """Medians by case of all evaluations of a model: as it is, or with another budget."""
    change = "" if budget is None else f"budget-{budget}-"
    files = [folder / f"{model}.{change}{kind}.json" for kind in ("niah-lines", "niah-essays", "validation")]
    rows = [row for file in files if file.is_file() for row in json.loads(file.read_text())["rows"]]
    return {row["case"]: row["median"] for row in rows}


def measured(found, column):
    """What stands in the results under the name of a column, by length."""
    if column == "perplexity":
        return [found[f"rows T{length}"] for length in LENGTHS[2:]]
    return [found[f"niah_{column} L{length}"] for length in LENGTHS]


def assert_rounded(stated, exact, where):
    """Every stated figure is the exact one, rounded to as many places."""
    assert len(stated) == len(exact), where
    for text, value in zip(stated, exact, strict=True):
        places = len(text.partition(".")[2])
        assert abs(float(text) - value) <= 0.5 * 10**-places + 1e-9, f"{where}: {text}, measured {value}"


def seed_tables():
    return [(i, table) for i, table in enumerate(t for t in tables(SMALL / "README.md") if "perplexity" in t[1])]


def test_there_is_a_table_for_every_seed():
    assert len(seed_tables()) == len(SEEDS)


@pytest.mark.parametrize(("seed", "table"), seed_tables(), ids=lambda value: value if isinstance(value, int) else "")
def test_the_small_study_states_what_was_measured(seed, table):
    line, (_, *columns), rows = table
    assert rows
    name = ""  # "its budget 0" is that of the row before
    for offset, (model, *cells) in enumerate(rows):
        where = f"results/small/README.md, line {line + offset}, {model}"
        if "," in model:  # several, which found nothing
            names = model.split(", ")
            found = [results(SMALL / "variants", name) for name in names]
            assert cells[:-1] == ["0 everywhere", *["0"] * (len(cells) - 2)], where
            assert not any(value for one in found for column in columns[:-1] for value in measured(one, column)), (
                where
            )
            stated = [pair.split(" / ") for pair in cells[-1].split(", ")]
            for pair, one in zip(stated, found, strict=True):
                assert_rounded(pair, measured(one, "perplexity"), where)
            continue
        changed = BUDGET.search(model)
        name = name if changed else model
        folder = SEEDS[seed] if (SEEDS[seed] / f"{name}.niah-lines.json").is_file() else SMALL / "variants"
        found = results(folder, name, changed and changed[1])
        for column, cell in zip(columns, cells, strict=True):
            if cell:
                assert_rounded(cell.split(" / "), measured(found, column), f"{where}, {column}")
            else:
                assert (column, bool(changed)) == ("perplexity", True), where


SYSTEMS = {  # of the table in README.md: model, budget
    "laLTE, 192 retained tokens a head": ("lalte", None),
    "laLTE, budget 0": ("lalte", 0),
    "laLTE with the paper's gradient": ("lalte-all", None),
    "gdn-swa with laLTE's memory as its window": ("gdn-swa-wide", None),
    "gdn-swa": ("gdn-swa", None),
    "gdn": ("gdn", None),
    "laNSA": ("lansa", None),
    "Transformer": ("transformer", None),
}


def test_the_readme_states_what_the_small_study_measured():
    """Every seed's figure, in order, of S-NIAH at the trained length."""
    ((line, (_, _, *columns), rows),) = [table for table in tables(ROOT / "README.md") if "multivalue" in table[1]]
    assert [row[0] for row in rows] == list(SYSTEMS)
    for offset, (system, _, *cells) in enumerate(rows):
        found = [one for one in (results(folder, *SYSTEMS[system]) for folder in SEEDS) if one]
        for column, cell in zip(columns, cells, strict=True):
            exact = [one[f"niah_{column} L2048"] for one in found]
            assert_rounded(cell.split(", "), exact, f"README.md, line {line + offset}, {column}")


def test_what_the_recipes_cost_is_what_was_measured():
    files = [ROOT / "benchmarks/results/nvidia-h200" / f"{name}.json" for name in MEASURED]
    lines = [cells for file in files for cells in cost.costs(json.loads(file.read_text()))]
    assert f"{cost.BEGIN}\n{cost.table(lines)}\n{cost.END}" in (ROOT / "docs" / "training.md").read_text(
        encoding="utf-8"
    )
