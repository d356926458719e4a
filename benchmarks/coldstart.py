"""From nothing to the end of the first training step: imports, model, compilation and tuning of every kernel."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import OURS, Bench, add_common_arguments, build_model, device_of, model_config
from benchmarks.train import batch_of
from eval.results import say

DESCRIPTION = """\
Starts a process with empty caches of compiled kernels (Triton, Inductor) and waits for the end of its first training
step, as `lalte train precision=bf16` does it: packed documents, autocast, backward, optimizer. `coldstart` is that,
`warmstart` a second process that finds the caches filled. The notes say when imports, model and step were ready, and
which kernels were tuned or looked up. --write-configs keeps what was tuned, so that it need not be tuned again.
"""
EPILOG = """\
examples:
  lalte bench coldstart
  lalte bench coldstart --systems lalte --repeats 3
  lalte bench coldstart --quick --device cpu --out coldstart.json
"""
SYSTEMS = (OURS, "gdn", "transformer")
CONFIG_FIELDS = ("kwargs", "num_warps", "num_stages", "num_ctas", "maxnreg", "ir_override")
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def first_step(job: dict[str, Any]) -> dict[str, Any]:
    """In the child process: seconds from its start to each point, and the kernels that were tuned.

    Args:
        job: began (time of the start), system, size, batch, length, device, and where to write configurations.
    """
    import torch

    import models.auto  # noqa: F401 - what any user imports

    points = {"imports": time.time() - job["began"]}
    device = device_of(job["device"])
    cuda = device.type == "cuda"
    config = job_config(job)
    model = build_model(config, device, torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda)
    points["model"] = time.time() - job["began"]
    ids = torch.randint(config.vocab_size, (job["batch"], job["length"]), device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
        loss = model(**batch_of(ids, packed=True), use_cache=False).loss
    loss.backward()
    optimizer.step()
    model.update_retention_penalty()
    loss = float(loss.detach())  # waits for the device
    points["first step"] = time.time() - job["began"]
    assert loss == loss, "the loss is NaN"
    if job["write"]:
        run_other_forms(job, ids)
        write_configurations(Path(job["write"]))
    return {"seconds": points, "tuned": tuned_kernels()}


def job_config(job: dict[str, Any]) -> Any:
    """The model of a job."""
    changes = {"max_position_embeddings": job["length"]} if job["system"] == OURS else {}
    return model_config(job["system"], job["size"], **changes)


def run_other_forms(job: dict[str, Any], ids: Any) -> None:
    """Have the kernels tuned for weights in bfloat16, for rows that aren't packed, and for prompts, too."""
    import torch

    from models.generation import prefill

    model = build_model(job_config(job), ids.device, torch.bfloat16).train()
    for packed in (False, True):
        model(**batch_of(ids, packed), use_cache=False).loss.backward()
    with torch.no_grad():
        prefill(model.eval(), ids[:1], model.new_cache(1))


def write_configurations(folder: Path) -> None:
    """Add the winners of the library's tuned kernels to the files that it reads (FLA_CONFIG_DIR)."""
    import triton

    cache = importlib.import_module("fla.ops.utils.cache")
    folder.mkdir(parents=True, exist_ok=True)
    for tuner in tuners():
        if not isinstance(tuner, cache.CachedAutotuner):
            continue
        path = folder / f"{tuner.kernel_name}.json"
        content = json.loads(path.read_text()) if path.exists() else {"kernel_name": tuner.kernel_name}
        content["triton_version"] = triton.__version__
        entries = content.setdefault("autotune_entries", {})
        for key, config in tuner.cache.items():
            chosen = {name: getattr(config, name, None) for name in CONFIG_FIELDS}
            entries[cache.AutotuneKey.key_hash(key)] = {"autotune_key": list(key), "config": chosen}
        path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def tuners() -> list[Any]:
    """Triton's autotuners of this process that have chosen between configurations."""
    from triton.runtime.autotuner import Autotuner

    return [x for x in gc.get_objects() if issubclass(type(x), Autotuner) and x.cache and len(x.configs) > 1]


def tuned_kernels() -> dict[str, dict[str, int]]:
    """Configurations of each autotuned kernel that ran, and for how many sizes it was tuned (or looked up)."""
    found: dict[str, dict[str, int]] = {}
    for tuner in tuners() if "triton" in sys.modules else []:
        kernel = tuner.fn
        while not hasattr(kernel, "__name__"):
            kernel = kernel.fn
        entry = found.setdefault(kernel.__name__, {"configurations": len(tuner.configs), "sizes": 0})
        entry["sizes"] += len(tuner.cache)
    return dict(sorted(found.items()))


def start(job: dict[str, Any], caches: Path) -> dict[str, Any]:
    """Run `first_step` in a process of its own.

    Raises: RuntimeError with the end of what it said, if it fails.
    """
    environment = {**os.environ, **{name: str(caches / name.lower()) for name in CACHES}}
    if job["write"]:
        environment["FLA_CACHE_MODE"] = "disabled"  # tune, whatever is shipped
    command = [sys.executable, "-m", "benchmarks.coldstart", json.dumps({**job, "began": time.time()})]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process ended with status {done.returncode}: …{done.stderr[-250:]}")
    return json.loads(done.stdout.splitlines()[-1])


def time_system(bench: Bench, case: str, job: dict[str, Any]) -> None:
    """Cold and warm starts, in turns."""
    system = job["system"]
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(bench.args.repeats):
        with tempfile.TemporaryDirectory(prefix="lalte-coldstart-") as caches:
            for kind in seconds:
                found = start(job, Path(caches))
                seconds[kind].append(found["seconds"]["first step"])
                bench.note(case, system, **{f"{kind} seconds": found["seconds"]})
                if kind == "cold":
                    bench.note(case, system, tuned=found["tuned"])
                say(f"{bench.name}: {system} {kind}: {found['seconds']}")
    for kind, times in seconds.items():
        ordered = sorted(times)
        name = case if kind == "cold" else case.replace("coldstart", "warmstart")
        bench.add(name, system, "s", ordered[len(ordered) // 2], ordered[0], ordered[-1], len(ordered))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `lalte bench coldstart`."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add = parser.add_argument
    add("--config", metavar="SIZE", default="0.4b", help="0.4b (default), 1.4b or tiny")
    add("--batch", metavar="B", type=int, default=8, help="rows; default: 8")
    add("--length", metavar="T", type=int, default=4096, help="tokens a row; default: 4096")
    add(
        "--write-configs",
        metavar="DIR",
        help="also write the kernel configurations that were tuned, as models/fla_configs/<architecture> ships them",
    )
    add("--repeats", metavar="N", type=int, default=3, help="cold and warm starts of each system; default: 3")
    add_common_arguments(parser)


def run_from_arguments(args: argparse.Namespace) -> int:
    """Run the benchmark; the exit status."""
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats} must be at least 1")
    size, batch, length = args.config, args.batch, args.length
    if args.quick:
        size, batch, length, args.repeats = "tiny", 1, 64, 1
    bench = Bench(
        "coldstart" if size != "1.4b" else "coldstart-1.4b", args, {"size": size, "batch": batch, "length": length}
    )
    case = f"coldstart train {size}"
    runs = {}
    for system in SYSTEMS:
        job = {"system": system, "size": size, "batch": batch, "length": length, "device": str(bench.device)}
        job["write"] = str(Path(args.write_configs).absolute()) if args.write_configs else None
        runs[system] = partial(time_system, bench, case, job)
    bench.add_case(case, runs)
    return bench.run()


if __name__ == "__main__":
    print(json.dumps(first_step(json.loads(sys.argv[1]))))
