"""The benchmarks at sizes of seconds: they run, check before they time, and keep what they measured."""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import attention, coldstart, cost, decode, harness, prefill, scaling, serving, timing, train
from eval.results import METRICS, read_json
from tests.tiny_models import make_ids, make_model

ROOT = Path(__file__).parents[2]


def run(module, tmp_path, *options, quick=True):
    """Exit status and result file of a benchmark."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--debug", action="store_true")
    module.add_arguments(parser)
    out = tmp_path / "result.json"
    common = ["--device", "cpu", "--seconds", "0.01", "--out", str(out), *(["--quick"] if quick else [])]
    status = module.run_from_arguments(parser.parse_args([*common, *options]))
    return status, read_json(out)


def options(**values):
    """Parsed options of a benchmark, all at their defaults but these."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--debug", action="store_true")
    harness.add_common_arguments(parser)
    args = parser.parse_args([])
    for name, value in {"device": "cpu", **values}.items():
        setattr(args, name, value)
    return args


def test_models_are_built_in_a_process_that_imported_nothing_else():
    code = (
        "import torch; from benchmarks.harness import build_model, model_config;"
        "print(type(build_model(model_config('lalte', 'tiny'), torch.device('cpu'), torch.float32)).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "HybridForCausalLM", done.stderr


@pytest.mark.parametrize(
    ("module", "arguments", "case", "metrics"),
    [
        (attention, ["--systems", "lalte,sdpa", "--cases", "fwdbwd B2 T96"], "fwdbwd B2 T96", {"ms"}),
        (attention, ["--systems", "lalte,flex", "--cases", "prefill"], "prefill B1 T128", {"ms"}),
        (attention, ["--cases", "scorer"], "scorer fwdbwd B2 T96", {"ms"}),
        (attention, ["--cases", "rule"], "rule B1 T128", {"ms"}),
        (train, ["--systems", "lalte,gdn", "--phase", "sparse"], "train tiny B2 T96", {"ms", "tokens_per_s"}),
        (train, ["--systems", "lalte", "--phase", "keep-all"], "train tiny B2 T96 all kept", {"ms", "tokens_per_s"}),
        (
            train,
            ["--systems", "lalte", "--phase", "sparse", "--packed", "--precision", "amp"],
            "train tiny B2 T96 amp packed",
            {"ms", "tokens_per_s"},
        ),
        (
            decode,
            ["--systems", "lalte,transformer", "--cases", "B3 T300"],
            "decode tiny B3 T300",
            {"ms", "tokens_per_s", "bytes"},
        ),
        (prefill, ["--systems", "lalte,gdn-full"], "prefill tiny B1 T333", {"ms", "tokens_per_s"}),
    ],
)
def test_every_benchmark_runs(module, arguments, case, metrics, tmp_path, capsys):
    status, found = run(module, tmp_path, *arguments)
    assert status == 0
    assert {"name", "device", "versions", "commit", "date", "config", "rows"} <= found.keys()
    assert not found["unavailable"]
    if module is decode:
        decode.draw(found["rows"], "decode tiny B3 T", str(tmp_path / "decode.svg"))
        assert "transformer" in (tmp_path / "decode.svg").read_text()
    rows = [r for r in found["rows"] if r["case"] == case]
    assert {r["metric"] for r in rows if r["system"] == "lalte"} == metrics
    assert metrics <= set(METRICS)
    for row in found["rows"]:
        assert row.keys() == {"case", "system", "metric", "median", "low", "high", "n"}
        assert 0 < row["low"] <= row["median"] <= row["high"]
    shown = capsys.readouterr().out
    assert case in shown
    assert "1.00 x ours" in shown


def test_steps_of_every_member(tmp_path, monkeypatch):
    status, found = run(train, tmp_path, "--phase", "steps", "--steps", "4")
    assert status == 0
    assert not found["unavailable"]
    shipped = {
        p.name.removesuffix("-0.4b.json") for p in (harness.RESULTS.parents[1] / "configs/models").glob("*-0.4b.json")
    }
    case = "train tiny B2 T96 steps"
    rows = {(r["case"], r["system"], r["metric"]): r for r in found["rows"]}
    assert {key[1] for key in rows} == set(train.MEMBERS) == shipped
    for member in shipped:
        first, last = (rows[f"{case} {number}", member, "loss"]["median"] for number in (1, 4))
        assert 0 < last < first
        losses = found["notes"][case][member]["losses"]
        assert (len(losses), losses[0], losses[-1]) == (4, first, last)
        assert rows[case, member, "ms"]["n"] == 2
        assert rows[case, member, "tokens_per_s"]["median"] == pytest.approx(
            2e3 * 96 / rows[case, member, "ms"]["median"]
        )
    monkeypatch.setattr(train, "LEARNING_RATE", 0.0)
    status, found = run(train, tmp_path / "still", "--phase", "steps", "--steps", "3", "--systems", "gdn")
    assert not found["rows"]
    assert "Disagreement: the loss doesn't fall: 5." in found["unavailable"][0]["reason"]
    with pytest.raises(ValueError, match="--steps 2 must be at least 3"):
        run(train, tmp_path / "few", "--phase", "steps", "--steps", "2")


def test_coldstart(tmp_path, monkeypatch):
    """The child's work, without a process of its own."""
    jobs = []

    def start(job, caches):
        assert not list(caches.iterdir())
        jobs.append(job)
        return coldstart.first_step({**job, "began": time.time()})

    monkeypatch.setattr(coldstart, "start", start)
    status, found = run(coldstart, tmp_path, "--systems", "lalte")
    assert status == 0
    assert len(jobs) == 2
    rows = {r["case"]: r for r in found["rows"]}
    assert rows.keys() == {"coldstart train tiny", "warmstart train tiny"}
    assert all(r["metric"] == "s" and r["median"] > 0 for r in rows.values())
    seconds = found["notes"]["coldstart train tiny"]["lalte"]["cold seconds"]
    assert list(seconds.values()) == sorted(seconds.values())


def test_scaling(tmp_path, monkeypatch):
    """Two processes of `lalte train`, sharded; what runs on one device runs in this process."""
    from training.config import load_config
    from training.trainer import train as run_training

    launch, counts = scaling.train, []

    def train_here(folder, name, processes, changes):
        counts.append(processes)
        if processes > 1:
            return launch(folder, name, processes, changes)
        path = run_training(load_config(folder / scaling.RUN, [f"output={folder / name}", *changes]))
        return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]

    monkeypatch.setattr(scaling, "train", train_here)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    status, found = run(scaling, tmp_path, "--systems", "lalte,fsdp x2")
    assert status == 0, found["unavailable"]
    assert counts == [1, 2, 1]
    rows = {(r["case"], r["system"]): r for r in found["rows"]}
    case, again = "scaling tiny B2 T96", "resume tiny x2 to x1"
    assert rows.keys() == {(case, "lalte"), (case, "fsdp x2"), (again, "lalte"), (again, "fsdp x2")}
    assert rows[again, "lalte"]["median"] == pytest.approx(rows[again, "fsdp x2"]["median"], rel=1e-5)
    assert rows[case, "lalte"]["metric"] == "tokens_per_s"
    assert found["notes"][again]["lalte"]["resumed"].keys() == {"4"}


def test_cost(tmp_path, capsys):
    """10.0 B tokens at 100 000 a second are 27.8 hours; two devices are two GPUs."""
    rows = [
        harness.row("train 0.4b B8 T4096 amp packed", "gdn", "tokens_per_s", 1e5, 9e4, 2e5, 5),
        harness.row("train 0.4b B8 T4096 amp packed", "gdn", "ms", 1.0, 1.0, 1.0, 5),
        harness.row("train 0.4b B8 T4096 amp packed", "stranger", "tokens_per_s", 1e5, 9e4, 2e5, 5),
        harness.row("train 0.4b B8 T4096", "gdn", "tokens_per_s", 1e5, 9e4, 2e5, 5),  # in bfloat16
        harness.row("train 0.4b B4 T4096 amp steps", "gdn", "tokens_per_s", 5e4, 4e4, 6e4, 5),
        harness.row("decode 0.4b B8", "gdn", "tokens_per_s", 1e5, 9e4, 2e5, 5),
        harness.row("scaling 1.4b B8 T4096", "fsdp x2", "tokens_per_s", 1e5, 9e4, 2e5, 5),
    ]
    found = {**harness.result("x", rows, config={}, device=torch.device("cpu")), "device": "some GPU"}
    (tmp_path / "x.json").write_text(json.dumps(found))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{cost.BEGIN}\nold\n{cost.END}\nafter\n")
    parser = argparse.ArgumentParser()
    cost.add_arguments(parser)
    assert cost.run_from_arguments(parser.parse_args([str(tmp_path / "x.json"), "--write", str(page)])) == 0
    shown = capsys.readouterr().out
    assert page.read_text() == f"before\n{cost.BEGIN}\n{shown}{cost.END}\nafter\n"
    assert shown.splitlines()[2:] == [
        "| gdn-0.4b | 10.0 B | some GPU | train 0.4b B8 T4096 amp packed, no optimizer | 100,000 | 28 |",
        "| gdn-0.4b | 10.0 B | some GPU | train 0.4b B4 T4096 amp steps | 50,000 | 56 |",
        "| lalte-1.4b | 30.0 B | some GPU | scaling 1.4b B8 T4096, fsdp x2 | 50,000 | 167 |",
    ]
    page.write_text("no marks")
    with pytest.raises(ValueError, match="the marks"):
        cost.write(page, "x")
    (tmp_path / "x.json").write_text(json.dumps({**found, "rows": rows[1:3]}))
    with pytest.raises(ValueError, match="no tokens_per_s of a recipe"):
        cost.run_from_arguments(parser.parse_args([str(tmp_path / "x.json")]))


def test_a_failing_child_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(coldstart.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="ended with status 1"):
        coldstart.start({"system": "lalte", "write": None}, tmp_path)


def test_wrong_results_are_never_timed(tmp_path, monkeypatch):
    ours = attention.interval_attention

    def wrong(q, k, v, end, *, backend="auto", **kwargs):
        return ours(q, k, v, end, backend=backend, **kwargs) * (1.01 if backend == "auto" else 1)

    monkeypatch.setattr(attention, "interval_attention", wrong)
    status, found = run(attention, tmp_path, "--systems", "lalte", "--cases", "prefill")
    assert status == 1
    assert found["rows"] == []
    assert "off by" in found["unavailable"][0]["reason"]


@pytest.mark.parametrize("check", [train.check, serving.check])
def test_the_checks_of_models_can_fail(check, monkeypatch):
    from models.gated_deltanet import GatedDeltaNet

    check("gdn", torch.device("cpu"))
    forward, calls = GatedDeltaNet.forward, []

    def drift(self, *args):
        calls.append(1)
        out = forward(self, *args)
        return replace(out, hidden=out.hidden * (1 + 0.1 * len(calls)))

    monkeypatch.setattr(GatedDeltaNet, "forward", drift)
    check.cache_clear()
    with pytest.raises(harness.Disagreement):
        check("gdn", torch.device("cpu"))


def test_timing():
    found = timing.Timing.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.median, found.n) == (3.0, 5)
    assert found.low == pytest.approx(1.4)
    assert found.high == pytest.approx(4.6)
    assert found.per(6) == pytest.approx((2000.0, 6000 / 4.6, 6000 / 1.4))
    calls = []
    timing.measure(calls.append, torch.device("cpu"), seconds=0, warmup=2, least=3)
    assert calls == [0, 1, 2, 0, 1, 2]


def test_the_time_limit_names_what_is_left(tmp_path, capsys):
    bench = harness.Bench("x", options(limit=0.0, out=str(tmp_path / "x.json")), {})
    bench.add_case("one", {"lalte": lambda: pytest.fail("it ran")})
    assert bench.run() == 0
    assert read_json(bench.path)["skipped"] == ["one lalte"]
    assert "one lalte" in capsys.readouterr().out


def test_results_are_written_case_by_case_and_continued(tmp_path):
    out = tmp_path / "x.json"

    def bench(**values):
        return harness.Bench("x", options(out=str(out), **values), {"a": 1})

    first, rows = bench(commit="one"), []
    first.add_case("case", {"lalte": lambda: first.add("case", "lalte", "ms", 1.0, 1.0, 1.0, 1)})
    first.add_case("other", {"lalte": lambda: rows.append(len(read_json(out)["rows"]))})
    first.run()
    assert rows == [1]
    second = bench(commit="one")
    second.add_case(
        "case",
        {
            "lalte": lambda: pytest.fail("it was measured already"),
            "peer": lambda: second.add("case", "peer", "ms", 2.0, 2.0, 2.0, 1),
        },
    )
    second.run()
    assert [r["system"] for r in read_json(out)["rows"]] == ["lalte", "peer"]
    with pytest.raises(ValueError, match=r"another commit \(one, now two\); use --overwrite"):
        bench(commit="two")
    with pytest.raises(ValueError, match="another config"):
        harness.Bench("x", options(out=str(out), commit="one"), {"a": 2})
    third = bench(commit="two", overwrite=True)
    third.write()
    found = json.loads(out.read_text())
    assert (found["commit"], found["rows"]) == ("two", [])


def test_what_fails_is_recorded_with_its_reason(tmp_path, capsys):
    bench = harness.Bench("x", options(out=str(tmp_path / "x.json")), {})

    def fails():
        raise torch.OutOfMemoryError("no memory\nleft")

    bench.add_case("case", {"lalte": lambda: bench.add("case", "lalte", "s", 4.0, 4.0, 4.0, 1), "peer": fails})
    bench.add_case("other", {"lalte": lambda: None})
    assert bench.run() == 0
    assert bench.unavailable == [{"case": "case", "system": "peer", "reason": "OutOfMemoryError: no memory left"}]
    assert "not available: peer: OutOfMemoryError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"systems": "lalte,per"}, "--systems per: none has that name; there are lalte, peer"),
        ({"cases": "B4"}, "--cases B4: no name contains it; there are case B2"),
    ],
)
def test_what_nothing_is_called_is_named(asked, message, tmp_path):
    bench = harness.Bench("x", options(out=str(tmp_path / "x.json"), **asked), {})
    never = lambda: pytest.fail("it ran")
    bench.add_case("case B2", {"lalte": never, "peer": never})
    with pytest.raises(ValueError, match=message):
        bench.run()
    assert not bench.path.exists()


def test_the_table_compares_within_a_case_and_metric():
    rows = [harness.row("a", s, "ms", x, x, x, 1) for s, x in (("peer", 3.0), ("lalte", 2.0))]
    rows += [harness.row("b", "peer", "ms", 8.0, 8.0, 8.0, 1)]
    lines = harness.table(rows, []).splitlines()
    assert "1.50 x ours" in lines[1]
    assert "1.00 x ours" in lines[2]
    assert "x ours" not in lines[4]


@pytest.mark.parametrize("tokens", [5, 19, 30, 150])
def test_a_filled_cache_has_the_places_of_a_read_one(tokens):
    """Sinks and ring hold the positions that reading so many tokens leaves there."""
    model = make_model()
    read, filled = model.new_cache(2), model.new_cache(2)
    with torch.no_grad():
        model(make_ids(2, tokens), past_key_values=read)
    serving.fill(filled, tokens)
    assert filled.columns == read.columns
    for ours, theirs in zip(filled.states, read.states, strict=True):
        if hasattr(ours, "kv"):
            kv = ours.kv
            first, ring = kv.sinks, kv.sinks + kv.budget
            assert torch.equal(kv.positions[:, :, :first], theirs.kv.positions[:, :, :first])
            assert torch.equal(kv.positions[:, :, ring:], theirs.kv.positions[:, :, ring:])
            assert torch.equal(kv.seen, theirs.kv.seen)
            held = kv.positions[:, :, first:ring]
            count = min(kv.budget, max(0, tokens - kv.window - kv.sinks))
            assert ((held >= 0).sum(-1) == count).all()
            assert (held < max(0, tokens - kv.window)).all()
            assert all(len(set(p[p >= 0].tolist())) == count for p in held.flatten(0, 1))
    with torch.no_grad():
        logits = model(make_ids(2, 1), past_key_values=filled).logits
    assert torch.isfinite(logits).all()


def test_a_filled_growing_cache_goes_on():
    model = make_model("gdn-full")
    cache = model.new_cache(2)
    serving.fill(cache, 300)
    found = decode.time_tokens(model, cache, 2, count=6, warmup=2)
    assert found.n == 6
    assert cache.columns == 308
    assert int(cache.states[1].kv.seen[0]) == 308


def test_the_density_is_set_and_measured():
    torch.manual_seed(0)
    config = train.model_config("lalte", "tiny", num_hidden_layers=2, layer_types=["gated_deltanet", "attention"])
    config.window, config.budget, config.max_position_embeddings = 24, 20, 224
    config.scorer_dropout = 0.0
    model = harness.build_model(config, torch.device("cpu"), torch.float32).train()
    ids = torch.randint(config.vocab_size, (2, 224))
    assert train.set_density(model, ids) == pytest.approx(config.target_density, abs=0.02)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, train.RetentionScorer):
                module.out_bias.add_(0.5)
        whole = train.kept_density(model, ids, packed=False)
        assert whole > 2 * config.target_density
        assert train.kept_density(model, ids, packed=True) == pytest.approx(whole, abs=1e-6)
    assert train.set_density(model, ids, packed=True) == pytest.approx(config.target_density, abs=0.02)


@pytest.mark.parametrize("phase", ["keep-all", "sparse"])
@pytest.mark.parametrize(("precision", "packed"), [("amp", True), ("bf16", False)])
def test_the_density_is_counted_in_the_form_that_is_timed(phase, precision, packed):
    config = train.model_config("lalte", "tiny", num_hidden_layers=2, layer_types=["gated_deltanet", "attention"])
    config.window, config.budget, config.max_position_embeddings = 24, 20, 96
    model = harness.build_model(config, torch.device("cpu"), torch.float32).train()
    seen = []

    def look(module, inputs, given):
        seen.append((torch.is_autocast_enabled("cpu"), "cu_seqlens" in given, tuple(given["input_ids"].shape)))

    model.model.register_forward_pre_hook(look, with_kwargs=True)
    args = argparse.Namespace(precision=precision, packed=packed)
    notes = train._prepare(model, system="lalte", phase=phase, shape=(2, 96), args=args)
    assert 0 < notes["kept_density"] <= 1
    assert set(seen) == {(precision == "amp", packed, (1, 192) if packed else (2, 96))}


@pytest.mark.parametrize("module", [attention, train, scaling, decode, prefill, coldstart])
def test_help_teaches(module):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    text = parser.format_help()
    assert "lalte bench" in text
    assert "--overwrite" in text
