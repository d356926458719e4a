"""The command `lalte`: help, sizes, generation with sessions, loading, and errors in one line."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lalte
from models import terminal
from models.generation import TextStream, stream_tokens
from tests.tiny_models import make_model, make_tokenizer

ROOT = Path(__file__).parents[1]
PROMPT = "the quick fox — laughs"
NEW = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model and its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    make_model(vocab_size=300).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def broken(folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(folder, tmp_path / "broken")


@pytest.fixture
def run(capsys):
    """Runs the command: exit status, output, errors."""

    def run(*arguments):
        capsys.readouterr()
        status = lalte.main([str(each) for each in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def fails(run):
    """Runs a command that must fail with one line, and gives that line."""

    def fails(*arguments):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "")
        assert re.fullmatch(r"lalte: error: .*\n", err), err
        return err.removeprefix("lalte: error: ").rstrip()

    return fails


@torch.no_grad()
def expected_text(folder, prompt, count, model=None):
    model, tokenizer = lalte.load(folder, device="cpu") if model is None else model
    ids = torch.tensor([tokenizer(prompt).input_ids])
    tokens = [int(t) for t in stream_tokens(model, ids, max_new_tokens=count)]
    return tokenizer.decode(tokens, skip_special_tokens=True)


# ---- help ----


@pytest.mark.parametrize("words", [[], ["train"], ["eval"], ["eval", "niah"], ["generate"], ["info"]])
def test_help_teaches(words, capsys):
    with pytest.raises(SystemExit) as done:
        lalte.main([*words, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert re.search(r"examples?:\n +lalte ", text)
    assert "usage: " + " ".join(["lalte", *words]) in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_help_lists_what_exists(capsys):
    with pytest.raises(SystemExit):
        lalte.main(["--help"])
    text = capsys.readouterr().out
    for name in lalte.COMMANDS:
        assert re.search(rf"^ +{name} ", text, re.MULTILINE), name


@pytest.mark.parametrize(
    ("command", "shown"), [("generate", "--session FILE"), ("import", "--out DIR"), ("train", "--tokenise")]
)
def test_help_is_quick(command, shown):
    """The command's module loads nothing heavy, so that --help takes a fraction of a second."""
    code = (
        f"import sys; sys.argv = ['/somewhere/bin/lalte', '{command}', '--help']\n"
        "import lalte\n"
        "try: lalte.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'omegaconf', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert time.perf_counter() - started < 5  # a tenth of a second on an idle machine


def test_no_command(capsys):
    for words in ([], ["eval"], ["bake"], ["generate"], ["info", "x", "--nothing"]):
        with pytest.raises(SystemExit) as done:
            lalte.main(words)
        assert done.value.code == 2
        assert "usage: lalte" in capsys.readouterr().err


# ---- info ----


def test_info(run, fails, folder):
    status, out, err = run("info", ROOT / "configs/models/lalte-0.4b.json")
    assert (status, err) == (0, "")
    assert "360,246,144" in out.splitlines()[0]
    short = out
    assert "72,926,304 bytes for a sequence in bfloat16, the same at any length" in out
    assert re.search(r"^retention +lte \(trained scorer\), lookahead 6, shared over: none$", out, re.MULTILINE)
    for name, words in (("streaming", "none"), ("gdn-full", "none: nothing is evicted"), ("gdn", None)):
        shown = run("info", ROOT / f"configs/models/{name}-tiny.json")[1]
        found = re.search(r"^retention +(.*)$", shown, re.MULTILINE)
        assert (found and found[1]) == words
    model = make_model(vocab_size=300)
    out = run("info", folder, "--batch", 3, "--dtype", "float32")[1]
    assert f"{sum(p.numel() for p in model.parameters()):,}" in out
    assert f"{model.new_cache(3).nbytes:,} bytes for 3 sequences in float32" in out
    assert "a new token               794 M operations, 796 MB to read, after 4,096 tokens" in short
    assert json.loads(run("info", folder, "--json", "--length", 77)[1])["costs"]["length"] == 77
    assert "length=0 must be at least 1" in fails("info", folder, "--length", 0)
    assert "int8 is unknown; use float32" in fails("info", folder, "--dtype", "int8")
    assert "nowhere.json is no file" in fails("info", "nowhere.json")
    assert "batch=0 must be at least 1" in fails("info", folder, "--batch", 0)


# ---- generate ----


def generate(folder, *arguments):
    return ("generate", "--model", folder, "--device", "cpu", *arguments)


def test_generate(run, folder, tmp_path, monkeypatch):
    expected = expected_text(folder, PROMPT, NEW) + "\n"
    status, out, err = run(*generate(folder, "--prompt", PROMPT, "--max-new-tokens", NEW))
    assert (status, out) == (0, expected)
    count = len(make_tokenizer()(PROMPT).input_ids)
    size = make_model(vocab_size=300).new_cache().nbytes
    pattern = (
        rf"prompt: {count} tokens, [\d,]+ tokens/s; new: {NEW} tokens, [\d,.]+ tokens/s; cache: {size:,} bytes\n"
    )
    assert re.fullmatch(pattern, err)
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbf" + PROMPT.encode())
    assert run(*generate(folder, "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", NEW))[1] == expected
    for arguments in (["-"], ["--prompt-file", "-"]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
        assert run(*generate(folder, *arguments, "--max-new-tokens", NEW))[1] == expected


def test_generate_draws(run, folder):
    def text(seed):
        options = ("--temperature", "1.0", "--top-k", 50, "--top-p", 0.95, "--seed", seed)
        return run(*generate(folder, "--prompt", PROMPT, "--max-new-tokens", NEW, *options))[1]

    assert text(1) == text(1) != text(2)


def test_generate_stops_at_the_end_token(run, folder, broken):
    model, tokenizer = lalte.load(folder)
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    tokens = [int(t) for t in stream_tokens(model, ids, max_new_tokens=NEW)]
    end = tokens[9]
    config = json.loads((broken / "generation_config.json").read_text())
    (broken / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": end}))
    _, out, err = run(*generate(broken, "--prompt", PROMPT, "--max-new-tokens", NEW))
    assert out == tokenizer.decode(tokens[: tokens.index(end)]) + "\n"
    assert f"new: {tokens.index(end) + 1} tokens" in err
    _, out, _ = run(*generate(broken, "--prompt", PROMPT, "--max-new-tokens", NEW, "--ignore-end"))
    assert out == tokenizer.decode(tokens) + "\n"


def test_generate_with_another_budget(run, folder):
    model, tokenizer = lalte.load(folder)
    model.set_retention_budget(0)
    prompt = PROMPT * 5
    _, out, err = run(*generate(folder, "--prompt", prompt, "--max-new-tokens", NEW, "--budget", 0))
    assert out == expected_text(folder, prompt, NEW, (model, tokenizer)) + "\n"
    assert f"cache: {model.new_cache().nbytes:,} bytes" in err
    assert out != run(*generate(folder, "--prompt", prompt, "--max-new-tokens", NEW))[1]


def test_generate_with_another_policy(run, fails, folder, tmp_path):
    model, tokenizer = lalte.load(folder)
    prompt, session = PROMPT * 5, tmp_path / "s"
    options = ("--retention", "h2o", "--budget", 5)
    written = {}
    for policy in ("none", "random", "h2o"):
        model.use_retention(policy, None if policy == "none" else 5)
        written[policy] = expected_text(folder, prompt, NEW, (model, tokenizer)) + "\n"
    assert len(set(written.values())) == 3
    first = run(*generate(folder, "--prompt", prompt, "--session", session, "--max-new-tokens", 7, *options))[1]
    message = fails(*generate(folder, "--session", session))
    assert "was written with retention=h2o, budget=5, this cache has retention=lte, budget=3" in message
    assert "retention=h2o, this cache has retention=random" in fails(
        *generate(folder, "--session", session, "--retention", "random", "--budget", 5)
    )
    second = run(*generate(folder, "--session", session, "--max-new-tokens", NEW - 7, *options))[1]
    assert first.removesuffix("\n") + second == written["h2o"]
    out = run(*generate(folder, "--prompt", prompt, "--max-new-tokens", NEW, "--retention", "none"))[1]
    assert out == written["none"]
    assert "retention='lru' is unknown; use one of none, lte" in fails(
        *generate(folder, "--prompt", "x", "--retention", "lru")
    )


def test_prompts_that_are_refused(fails, tmp_path, monkeypatch):
    """Before the model is touched: here there is none."""

    def error(content, *arguments):
        if content is not None:
            (tmp_path / "p").write_bytes(content)
        return fails(*generate("no/model", *(arguments or ("--prompt-file", tmp_path / "p"))))

    assert re.search(r"p is binary: byte 3 is NUL; give a text in UTF-8", error(b"abc\0def"))
    assert re.search(r"p is not UTF-8: byte 3 is 0xe9; convert it", error(b"caf\xe9 au lait"))
    assert re.search(r"p is empty; give at least one character", error(b""))
    assert re.search(r"missing.txt is no file", error(None, "--prompt-file", tmp_path / "missing.txt"))
    assert "--prompt is empty" in error(None, "--prompt", "")
    assert "there is nothing to continue; give --prompt" in error(None, "--device", "cpu")
    assert "there is nothing to continue; give --prompt" in error(None, "--session", tmp_path / "new")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert "the standard input is not UTF-8: byte 0 is 0xff" in error(None, "-")
    for options, message in [
        (("--max-new-tokens", -2), "--max-new-tokens -2 must be 0 or more"),
        (("--temperature", -1), "temperature=-1.0 must be 0"),
        (("--top-p", 0), r"top_p=0.0 must lie in"),
        (("--session", tmp_path), "can't be written; name a file in a folder that exists"),
        (("--session", tmp_path / "no" / "s"), "can't be written; name a file in a folder that exists"),
    ]:
        assert message in error(None, "--prompt", "x", *options)


# ---- sessions ----


def test_session_goes_on_where_it_stopped(run, folder, tmp_path):
    """Three calls write what one does; a new prompt follows everything before it."""
    session = tmp_path / "s"
    whole = expected_text(folder, PROMPT, NEW)
    text = ""
    for prompt, count in ((["--prompt", PROMPT], 11), ([], 1), ([], NEW - 12)):
        status, out, err = run(*generate(folder, *prompt, "--session", session, "--max-new-tokens", count))
        assert status == 0
        assert err.endswith(f"session: {session}\n")
        text += out.removesuffix("\n")
    model, tokenizer = lalte.load(folder)
    assert tokenizer(text).input_ids, "text was written"
    assert text == whole
    ids = tokenizer(PROMPT).input_ids
    ids += [int(t) for t in stream_tokens(model, torch.tensor([ids]), max_new_tokens=NEW)]
    ids += tokenizer(" then the dog").input_ids
    expected = tokenizer.decode([int(t) for t in stream_tokens(model, torch.tensor([ids]), max_new_tokens=9)])
    out = run(*generate(folder, "--prompt", " then the dog", "--session", session, "--max-new-tokens", 9))[1]
    assert out == expected + "\n"


def test_session_of_a_prompt_only(run, fails, folder, tmp_path):
    session = tmp_path / "s"
    _, out, err = run(*generate(folder, "--prompt", "the quick", "--session", session, "--max-new-tokens", 0))
    assert out == ""
    assert "new: 0 tokens" in err
    kept = session.read_bytes()
    assert "there is nothing to continue" in fails(*generate(folder, "--session", session))
    assert session.read_bytes() == kept
    out = run(*generate(folder, "--prompt", " fox", "--session", session, "--max-new-tokens", 8))[1]
    assert out == expected_text(folder, "the quick fox", 8) + "\n"


def test_sessions_that_are_refused(run, fails, folder, tmp_path):
    session, other = tmp_path / "s", tmp_path / "other"
    run(*generate(folder, "--prompt", PROMPT, "--session", session, "--max-new-tokens", 4))
    kept = session.read_bytes()
    make_model(vocab_size=300, seed=7).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    assert "belongs to another model" in fails(*generate(other, "--session", session))
    assert "was written with budget=3, this cache has budget=1; use budget=3" in fails(
        *generate(folder, "--session", session, "--budget", 1)
    )
    assert "in another form (dtype is 'torch.float32', here 'torch.bfloat16')" in fails(
        *generate(folder, "--session", session, "--dtype", "bfloat16")
    )
    assert "seed=-1 is outside 0 to" in fails(*generate(folder, "--prompt", PROMPT, "--seed", -1))
    (tmp_path / "text").write_text("no session at all")
    assert "is not a session file" in fails(*generate(folder, "--session", tmp_path / "text"))
    model, _ = lalte.load(folder)
    identity = {"dtype": "torch.float32", "model": terminal.fingerprint(model)}
    model.new_cache().save(tmp_path / "cache", identity)
    assert "no session of a text" in fails(*generate(folder, "--session", tmp_path / "cache"))
    assert session.read_bytes() == kept


def test_interrupted_between_tokens(run, folder, tmp_path, monkeypatch):
    """Ctrl-C ends the text after a whole token, keeps the session, and puts the old handler back."""
    session, seen = tmp_path / "s", []
    push = TextStream.push

    def interrupting(self, token):
        seen.append(token)
        if len(seen) == 6:
            signal.raise_signal(signal.SIGINT)
        return push(self, token)

    monkeypatch.setattr(TextStream, "push", interrupting)
    before = signal.getsignal(signal.SIGINT)
    status, first, err = run(*generate(folder, "--prompt", PROMPT, "--session", session, "--max-new-tokens", -1))
    assert status == 130
    assert len(seen) == 6
    assert "new: 6 tokens" in err
    assert signal.getsignal(signal.SIGINT) is before
    second = run(*generate(folder, "--session", session, "--max-new-tokens", NEW - 6))[1]
    tokens = lalte.load(folder)[1].decode(seen)
    assert tokens == expected_text(folder, PROMPT, NEW)
    assert first.removesuffix("\n") + second.removesuffix("\n") == tokens


def test_interrupted_within_a_token(run, folder, tmp_path, monkeypatch):
    """A second Ctrl-C stops in the middle of a token; the session on the disk stays as it was."""
    session = tmp_path / "s"
    run(*generate(folder, "--prompt", PROMPT, "--session", session, "--max-new-tokens", 3))
    kept = session.read_bytes()
    model_class = type(lalte.load(folder)[0].model)
    forward, calls = model_class.forward, []

    def impatient(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(model_class, "forward", impatient)
    status, _, err = run(*generate(folder, "--session", session, "--max-new-tokens", -1))
    assert (status, err) == (130, "")
    assert session.read_bytes() == kept


def test_full_disk_keeps_the_session(run, folder, tmp_path, monkeypatch):
    session = tmp_path / "s"
    run(*generate(folder, "--prompt", PROMPT, "--session", session, "--max-new-tokens", 3))
    kept = session.read_bytes()

    def full(tensors, path, metadata):
        raise OSError(28, "No space left on device", str(session))

    monkeypatch.setattr("models.cache.save_file", full)
    status, _, err = run(*generate(folder, "--session", session, "--max-new-tokens", 3))
    assert status == 2
    assert err.startswith("lalte: error: [Errno 28] No space left on device")
    assert session.read_bytes() == kept


def test_closed_pipe(folder, tmp_path):
    """A process that would write for ever ends quietly when its reader has enough, and leaves a session."""
    session = tmp_path / "s"
    options = ["--max-new-tokens", -1, "--ignore-end", "--prompt", PROMPT, "--session", session]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "lalte.py"), *map(str, generate(folder, *options))],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    text = process.stdout.read(30)
    process.stdout.close()
    errors = process.stderr.read()
    assert (process.wait(60), errors) == (141, "")
    process.stderr.close()
    model, tokenizer = lalte.load(folder)
    cache = model.new_cache()
    last = terminal.open_session(session, cache, {"model": terminal.fingerprint(model)})
    assert len(last) == 1
    done = cache.columns - len(tokenizer(PROMPT).input_ids) + 1
    assert expected_text(folder, PROMPT, done, (model, tokenizer)).startswith(text)


# ---- loading ----


def test_load(folder):
    model, tokenizer = lalte.load(folder, device="cpu", dtype="bfloat16")
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].mixer.A_log.dtype == torch.float32
    assert tokenizer.eos_token == "</s>"


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def replace_shape(weights):
    weights["model.layers.1.mixer.k_proj.weight"] = torch.zeros(3, 4)


FOLDERS = {
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config.json; give a folder"),
    "a foreign model": (
        lambda f: change_config(f, model_type="llama"),
        r"model_type='llama' is another kind of model",
    ),
    "a misspelt field": (lambda f: change_config(f, sink=3), r"unknown field sink=3; did you mean sinks\?"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model.safetensors is missing; save the model"),
    "pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"model.safetensors is missing \(pytorch_model.bin is never read: opening it could run code\)",
    ),
    "truncated weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        r"model.safetensors is truncated or no safetensors file \(.*\); copy it again",
    ),
    "a missing shard": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002.safetensors"}}'),
        r"model-00002.safetensors is missing",
    ),
    "an index that is none": (
        lambda f: (f / "model.safetensors.index.json").write_text("[]"),
        r"model.safetensors.index.json can't be read",
    ),
    "a missing tensor": (
        lambda f: change_weights(f, lambda w: w.pop("model.layers.0.mlp.up_proj.weight")),
        r"don't fit its config.json: 1 tensors of the model are missing \(model.layers.0.mlp.up_proj.weight\)",
    ),
    "an unknown tensor": (
        lambda f: change_weights(f, lambda w: w.update(extra=torch.zeros(2))),
        r"1 tensors don't exist in the model \(extra\)",
    ),
    "another shape": (
        lambda f: change_weights(f, replace_shape),
        r"1 tensors have another shape \(model.layers.1.mixer.k_proj.weight: \(3, 4\) saved, \(24, 36\) here\)",
    ),
    "another depth": (
        lambda f: change_config(f, num_hidden_layers=2, layer_types=["gated_deltanet", "attention"]),
        r"2 tensors have another shape \(penalty_control.density: \(2, 2\) saved, \(1, 2\) here, ",
    ),
    "no tokenizer": (
        lambda f: [file.unlink() for file in f.glob("tokenizer*")],
        r"holds no tokenizer; save the one of the training",
    ),
    "a broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), r"the tokenizer in .* can't be read"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_are_refused(name, broken, fails):
    damage, message = FOLDERS[name]
    damage(broken)
    assert re.search(message, fails(*generate(broken, "--prompt", "x")))


def test_more_that_is_refused(folder, broken, fails, tmp_path):
    assert "no/where is no folder" in fails(*generate("no/where", "--prompt", "x"))
    assert "dtype='int8' is unknown; use auto, float32" in fails(
        *generate(folder, "--prompt", "x", "--dtype", "int8")
    )
    message = fails("generate", "--model", folder, "--prompt", "x", "--device", "gpu")
    assert message.startswith("device='gpu' can't be used (")
    make_model(vocab_size=120).save_pretrained(broken)
    message = fails(*generate(broken, "--prompt", "x"))
    assert re.search(r"the tokenizer in .* has \d+ entries, the model's vocab_size is 120", message)
    assert "no retention scorer" in fails(*generate(_gdn(tmp_path), "--prompt", "x", "--budget", 5))


def _gdn(folder):
    make_model("gdn", vocab_size=300).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


# ---- errors ----


def test_errors_are_one_line_unless_debugging(run, fails, monkeypatch):
    assert (
        fails("info", "a\nb") == "a b is no file; give a model configuration such as configs/models/lalte-tiny.json"
    )
    with pytest.raises(ValueError, match="is no file"):
        lalte.main(["info", "nowhere.json", "--debug"])
    with pytest.raises(ValueError, match="nowhere is no folder"):
        lalte.main(["eval", "--debug", "perplexity", "--model", "nowhere", "--text", "nothing", "--out", "out"])

    for words, debugging in (
        (["info", "x"], False),
        (["bench", "attention"], False),
        (["bench", "--debug", "attention"], True),
        (["bench", "attention", "--debug"], True),
    ):
        assert lalte.build_parser().parse_args(words).debug is debugging

    def raising(error):
        def load_config(*_):
            raise error

        monkeypatch.setattr("models.config.load_config", load_config)
        return run("info", "x")

    assert raising(KeyboardInterrupt())[0] == 130
    assert raising(RuntimeError("out of memory"))[2] == "lalte: error: out of memory (--debug shows where)\n"
    assert raising(FileNotFoundError(2, "No such file", "x"))[2] == "lalte: error: [Errno 2] No such file: 'x'\n"
    with pytest.raises(AssertionError):
        raising(AssertionError("a defect of the program isn't a user's error"))


# ---- the other commands ----

TRAINING = """
model:
  config: {config}
  overrides: {{vocab_size: 300, hidden_size: 32, intermediate_size: 32, num_attention_heads: 2,
    num_key_value_heads: 1, head_dim: 16, window: 16, budget: 8,
    num_hidden_layers: 2, layer_types: [gated_deltanet, attention]}}
data:
  sources: [{{path: {text}}}]
  sequence_length: 64
  cache_dir: {cache}
tokenizer: {{train_vocab_size: 300}}
batch: {{sequences: 2}}
log: {{progress: false, tensorboard: false}}
device: cpu
output: {output}
steps: 3
"""


def test_train_generate_evaluate(run, fails, tmp_path):
    """From text to a score, by commands only."""
    text, output = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("the grass is green and the sky is blue; one of the special magic numbers is 1234567.\n" * 60)
    config = tmp_path / "train.yaml"
    values = {"config": ROOT / "configs/models/lalte-tiny.json", "cache": tmp_path / "cache"}
    config.write_text(TRAINING.format(text=text, output=output, **values))
    assert "optimizer.learning_rate" in fails("train", config, "optimizer.learning_rate=1")
    assert not output.exists()
    status, shown, _ = run("train", config, "--show", "steps=2")
    assert status == 0
    assert not output.exists()
    status, out, _ = run("train", config, "steps=2")
    assert status == 0
    assert (output / "config.yaml").read_text() == shown
    assert f"the model is in {output}" in out
    assert (output / "config.yaml").read_text().count("steps: 2") == 1
    assert len(run(*generate(output, "--prompt", "the grass", "--max-new-tokens", 5))[1]) > 0
    options = ("--tasks", "single_1", "--lengths", "500", "--samples", "1", "--new-tokens", "4")
    status, _, _ = run("eval", "niah", "--model", output, "--out", tmp_path / "niah", "--device", "cpu", *options)
    assert status == 0
    assert json.loads((tmp_path / "niah" / "result.json").read_text())["rows"]
    assert "unknown" in fails("eval", "niah", "--model", output, "--out", tmp_path / "x", "--tasks", "single_9")


def test_changes_stand_anywhere(run, fails):
    """Before, between and after the options of `lalte train`."""
    config = ROOT / "configs/train/tiny.yaml"
    changes = ["seed=3", "steps=7"]
    status, expected, _ = run("train", config, *changes, "--show")
    assert status == 0
    assert {"seed: 3", "steps: 7", "output: runs/tiny"} <= set(expected.splitlines())
    for words in (
        [config, "--show", *changes],
        [config, "seed=3", "--show", "steps=7"],
        ["--show", config, *changes],
    ):
        assert run("train", *words) == (0, expected, "")
    assert "'steps' is no change" in fails("train", config, "--show", "steps")
    for words in (["--show", "--nothing"], ["--show", "--tokenise"]):
        with pytest.raises(SystemExit) as done:
            lalte.main(["train", str(config), *words])
        assert done.value.code == 2
