"""EVAPORATE: reading and building data, prompts, windows, score, the run and its command."""

import argparse
import gzip
import json

import pytest
import torch

from eval import build_cli, evaporate, evaporate_cli, evaporate_data
from eval.answering import answer
from eval.evaporate_data import Document, build_pairs, build_squad, read_documents, write_documents
from eval.evaporate_prompts import contains, cut, definition, make_samples, prompt
from tests.tiny_models import make_model
from tests.tiny_texts import make_llama, make_tokenizer

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def bos_tokenizer():
    return make_tokenizer(bos=True)


def long_text(place: int, words: int = 300) -> str:
    """Words, with `Publisher is ACME Press` after so many of them."""
    some = [WORDS[n % 10] + str(n) for n in range(words)]
    return " ".join([*some[:place], "The publisher is ACME Press,", *some[place:]])


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def squad_file(path):
    first = "Mount Ararat is a tall mountain. It was first climbed in 1829 by Friedrich Parrot. Snow covers it."
    second = "The lake is deep. Fishing boats cross the lake of Sevan every morning. They return at noon."
    third = "Bread is baked in the village. The baker is called Aram Petrosyan by all children."
    qas = lambda *triples: [
        {"id": q, "question": q, "answers": [{"text": a, "answer_start": c.find(a)}]} for q, a, c in triples
    ]
    paragraphs = [
        {"context": first, "qas": qas(("When was it climbed?", "1829", first), ("What is tall?", "Mount", first))},
        {"context": second, "qas": qas(("Which lake?", "Sevan", second))},
        {"context": third, "qas": qas(("Who bakes?", "Aram Petrosyan", third))},
    ]
    no_answer = {"id": "n", "question": "Who?", "answers": [], "is_impossible": True}
    paragraphs[2]["qas"].append(no_answer)
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    return path


# ---- prompts ----


def test_prompts_are_the_definitions():
    document = Document("\n A report on pumps. Made in May. \n applicant:", " Acme Inc. ", "applicant")
    ask = lambda task, document, **how: prompt(task, document, **({"scoring": "v1", "twice": False} | how))
    assert ask("fda", document, form="harness") == "A report on pumps. Made in May. \n applicant:"
    assert ask("fda", document, form="harness", scoring="v0") == document.text
    fda = Document("A report on pumps. Made in May.\napplicant:", "Acme", "applicant")
    assert ask("fda", fda, form="window") == "A report on pumps. Made in May. Applicant:"
    twice = "Information about Applicant. A report. Made in May.\nA report. Made in May. Applicant:"
    report = Document("A report. Made in May.\napplicant:", "Acme", "applicant")
    assert ask("fda", report, form="window", twice=True) == twice
    page = Document("A page. Title\n\nSummary of information above...\ntitle:", "x", "title")
    assert ask("swde", page, form="window") == "A page. Title. Title:"
    assert (
        ask("swde", page, form="window", twice=True)
        == "Information about Title. A page. Title.\nA page. Title. Title:"
    )
    squad = Document("Passage one.\nIt was called the ", "x")
    assert ask("squad", squad, form="harness") == "Passage one.\nIt was called the"
    assert ask("squad", squad, form="harness", scoring="v0") == "Passage one.\nIt was called the "
    assert ask("squad", squad, form="harness", twice=True) == (
        "It was called the Passage one.\nPassage one.\nIt was called the"
    )
    hub = Document("P.\nIt was", "x", context="P. Question: What?", question="What?")
    assert ask("squad", hub, form="window", twice=True) == "What? P. \nP.\nIt was"


def test_the_definition_names_what_was_run():
    harness = "EVAPORATE fda: prompt and score of lm-evaluation-harness, version 0"
    assert definition("fda", "v0", twice=False, windows=False) == harness
    windows = "; windows of length - 50 tokens (prefix-linear-attention)"
    assert definition("fda", "v0", twice=True, windows=True) == f"{harness}{windows}; text read twice"


def test_values_are_stripped_in_version_1_only(tokenizer):
    documents = [(0, Document("A page.", " ACME ", "publisher"))]
    for scoring, value in (("v0", " ACME "), ("v1", "ACME")):
        assert make_samples("fda", documents, tokenizer, None, scoring=scoring)[0].outputs == (value,)


def test_windows_of_swde_leave_out_the_summary(tokenizer):
    page = Document(
        f"Page of ACME Press. {long_text(9, 20)}\n\nSummary of information above...\npublisher:", "ACME", "p2"
    )
    short = cut("swde", page, tokenizer, 2000)
    assert short.text == page.text.split("\n\nSummary")[0]


def test_contains_escapes_and_ignores_case():
    assert contains(" it cost $1.50 (net).", "$1.50 (NET)") == 1.0
    assert contains("it cost 1x50", "1.50") == 0.0


@pytest.mark.parametrize("place", [2, 150, 299])
@pytest.mark.parametrize("name", ["tokenizer", "bos_tokenizer"])
def test_windows_are_centred_on_the_earliest_match(name, place, request):
    tokenizer = request.getfixturevalue(name)
    document = Document(f"  {long_text(place)}\npublisher:", "ACME Press", "publisher")
    length, room = 351, 301
    text = document.text.strip()
    ids = tokenizer(text).input_ids
    before = len(tokenizer(text[: text.index("publisher")]).input_ids)
    short = cut("fda", document, tokenizer, length)
    start = max(0, before - room // 2)
    assert short.text == tokenizer.decode(ids[start : start + room], skip_special_tokens=True)
    assert "ACME Press" in short.text
    inner = tokenizer(short.text, add_special_tokens=False).input_ids
    assert len(inner) <= room
    if place == 150:
        assert abs(len(inner) - room) <= 2
        (sample,) = make_samples("fda", [(0, document)], tokenizer, length)
        assert sample.text == f"{short.text.strip('.')}. Publisher:"
        assert 40 < sample.depth_percent < 60


def test_a_value_that_is_missing_gives_the_end_of_the_text(tokenizer):
    document = Document(long_text(3), "nowhere", "absent key")
    short = cut("fda", document, tokenizer, 150)
    ids = tokenizer(document.text).input_ids
    before = len(tokenizer(document.text[:-1]).input_ids)
    assert short.text == tokenizer.decode(ids[before - 50 : before + 50])
    assert make_samples("fda", [(0, document)], tokenizer, 150)[0].depth_percent is None


def test_answers_of_one_character_are_dropped(tokenizer):
    documents = [(0, Document(long_text(9), "7", "publisher")), (1, Document(long_text(9), "ACME", "p"))]
    assert make_samples("fda", documents, tokenizer, 200) == []
    assert len(make_samples("fda", documents, tokenizer, None)) == 2


def test_a_window_keeps_the_question_of_squad(tokenizer):
    document = Document(f"{long_text(20)}\nThe publisher's name was", "ACME Press")
    short = cut("squad", document, tokenizer, 200)
    assert short.text.endswith("\nThe publisher's name was")
    assert "ACME Press" in short.text
    assert len(tokenizer(short.text).input_ids) <= 151
    late = Document(f"{long_text(299)}\nThe publisher's name was", "ACME Press")
    assert cut("squad", late, tokenizer, 2000).text.endswith(late.text[-200:])
    with pytest.raises(ValueError, match="too short for the question"):
        cut("squad", document, tokenizer, 55)


# ---- data ----


def test_squad_is_built(tmp_path, tokenizer):
    path = squad_file(tmp_path / "squad.json")
    questions = build_squad(path)
    assert [d.value for d in questions] == ["1829", "Mount", "Sevan", "Aram Petrosyan"]
    assert questions[0].text.endswith("Snow covers it.\nQuestion: When was it climbed?\nAnswer:")
    sentences = build_squad(path, form="sentence")
    assert [d.text.rpartition("\n")[2] for d in sentences] == [
        "It was first climbed in",
        "Fishing boats cross the lake of",
        "The baker is called",
    ]
    for document in sentences:
        assert document.value in document.text.rpartition("\n")[0]
    packed = build_squad(path, lengths=[120, 300], tokenizer=tokenizer)
    for document in packed:
        assert len(tokenizer(document.text).input_ids) <= document.length - 50
        assert document.text.startswith(f"{document.context}\n"), "all of the passage, which may be read twice"
        assert document.text.removeprefix(f"{document.context}\n").count("\n") <= 1
    of = {length: {d.value: d for d in packed if d.length == length} for length in (120, 300)}
    assert len(of[300]) == 4
    assert of[300]["1829"].text.count("\n") > of[120].get("1829", of[300]["Sevan"]).text.count("\n") - 1
    whole = of[300]["1829"].text
    assert whole.index("Mount Ararat") < whole.index("The lake is deep") < whole.index("Bread is baked")
    assert build_squad(path, samples=2, seed=1) == build_squad(path, samples=2, seed=1)
    assert len(build_squad(path, samples=2)) == 2


def test_pages_and_pairs_are_built(tmp_path, tokenizer):
    with gzip.open(tmp_path / "pages.jsonl.gz", "wt") as pages:
        pages.write(json.dumps({"doc_id": "a", "text": "Blue Book\nPublisher\n: Acme Press\n"}) + "\n")
        pages.write(json.dumps({"doc_id": "b", "text": "Red Book"}) + "\n")
    pairs = [("a", "publisher", ": Acme Press"), ("a", "title", "Blue Book"), ("b", "title", "Green Book")]
    write_jsonl(tmp_path / "pairs.jsonl", [{"doc_id": d, "key": k, "value": v} for d, k, v in pairs])
    made = build_pairs(tmp_path / "pages.jsonl.gz", tmp_path / "pairs.jsonl")
    assert made == [
        Document("Blue Book\nPublisher\n: Acme Press\npublisher:", "Acme Press", "publisher"),
        Document("Blue Book\nPublisher\n: Acme Press\ntitle:", "Blue Book", "title"),
    ]
    for suffix in ("jsonl", "jsonl.gz"):
        path = tmp_path / f"made.{suffix}"
        assert write_documents(path, made) == 2
        assert read_documents("swde", path)[0] == made
    with pytest.raises(ValueError, match="exists already"):
        write_documents(path, made)


def test_reports_are_built_in_chunks(tmp_path, tokenizer):
    folder = tmp_path / "reports"
    folder.mkdir()
    (folder / "k1.txt").write_text(long_text(250))
    (tmp_path / "table.json").write_text(json.dumps({"reports/k1.txt": {"publisher": "ACME Press", "year": "1999"}}))
    (document,) = build_pairs(folder, tmp_path / "table.json", chunk=400, tokenizer=tokenizer)
    assert document.key == "publisher"
    assert "ACME Press" in document.text
    assert len(tokenizer(document.text).input_ids) < 410


def test_bad_data_is_named(tmp_path, tokenizer):
    good = {"text": "t", "key": "k", "value": "v"}
    for records, words in (
        ([good, {"text": "t", "value": "v"}], "line 2 lacks the field 'key'"),
        ([{**good, "value": "  "}], "line 1: value is '  '"),
        ([{**good, "length": "9"}], "length is '9'"),
        ([[1]], "line 1 is not a JSON object"),
    ):
        with pytest.raises(ValueError, match=words):
            read_documents("fda", write_jsonl(tmp_path / "bad.jsonl", records))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no document"):
        read_documents("fda", tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="UTF-8"):
        read_documents("fda", tmp_path / "latin.jsonl")
    with pytest.raises(ValueError, match="is not a file"):
        read_documents("fda", tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="'qa' is unknown"):
        read_documents("qa", tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="no SQuAD file"):
        build_squad(write_jsonl(tmp_path / "not.json", [{"data": 3}]))
    squad = squad_file(tmp_path / "squad.json")
    with pytest.raises(ValueError, match="tokenizer: missing"):
        build_squad(squad, lengths=[100])
    with pytest.raises(ValueError, match="50 leaves no text"):
        build_squad(squad, lengths=[50], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="in 60 tokens"):
        build_squad(squad, lengths=[60], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="form: 'cloze'"):
        build_squad(squad, form="cloze")
    with pytest.raises(ValueError, match="samples: -1 is not a positive"):
        build_squad(squad, samples=-1)
    write_jsonl(tmp_path / "pages.jsonl", [{"doc_id": "a", "text": "x"}])
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"doc_id": "b", "key": "k", "value": "v"}])
    with pytest.raises(ValueError, match="names the page 'b'"):
        build_pairs(tmp_path / "pages.jsonl", pairs)
    with pytest.raises(ValueError, match="samples: 0 is not a positive"):
        build_pairs(tmp_path / "pages.jsonl", pairs, samples=0)


def test_pages_are_named_with_or_without_their_suffix_and_null_is_no_value(tmp_path):
    folder = tmp_path / "pages"
    folder.mkdir()
    for name in ("K1.v2", "K2"):
        (folder / f"{name}.txt").write_text("Maker: Acme. Mode: none.")
    table = {"K1.v2": {"Maker": "Acme"}, "reports/K2.txt": {"Maker": "Acme", "Mode": None}}
    (tmp_path / "table.json").write_text(json.dumps(table))
    pairs = [{"doc_id": name, "key": "Maker", "value": "Acme"} for name in ("K1.v2.txt", "K2")]
    for source in (tmp_path / "table.json", write_jsonl(tmp_path / "pairs.jsonl", pairs)):
        assert [(made.key, made.value) for made in build_pairs(folder, source)] == [("Maker", "Acme")] * 2
    (tmp_path / "table.json").write_text('{"K3.v2": {"Maker": "Acme"}}')
    with pytest.raises(ValueError, match=r"names the page 'K3\.v2'"):
        build_pairs(folder, tmp_path / "table.json")


def test_files_with_a_byte_order_mark_and_broken_ones(tmp_path):
    record = json.dumps({"text": "t", "key": "k", "value": "v"})
    (tmp_path / "marked.jsonl").write_text("\ufeff" + record, encoding="utf-8")
    assert read_documents("fda", tmp_path / "marked.jsonl")[0] == [Document("t", "v", "k")]
    whole = gzip.compress(record.encode(), mtime=0)
    (tmp_path / "broken.jsonl.gz").write_bytes(whole[:10] + b"\x06" + whole[11:])  # an unknown kind of block
    with pytest.raises(ValueError, match=r"broken\.jsonl\.gz: can't be read"):
        read_documents("fda", tmp_path / "broken.jsonl.gz")


def test_a_missing_hub_data_set_is_one_clear_error(monkeypatch):
    import datasets

    def load(name, split):
        assert (name, split) == ("hazyresearch/based-swde-v2", "validation")
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=r"neither a file nor a data set.*no network"):
        read_documents("swde")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: [{"text": "t", "key": "k", "value": "v"}])
    assert read_documents("swde") == ([Document("t", "v", "k")], "hazyresearch/based-swde-v2")


# ---- the run ----


class Reader(torch.nn.Module):
    """Writes what stands after `key is` in the prompt, then another line; `failing` prompts get an error."""

    def __init__(self, tokenizer, failing=()):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = argparse.Namespace(model_type="reader", to_dict=dict)
        self.tokenizer, self.failing, self.prompts = tokenizer, failing, []

    def generate(self, input_ids, attention_mask, generation_config, stopping_criteria):
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            text = self.tokenizer.decode(ids[mask.bool()])
            self.prompts.append(text)
            if any(word in text for word in self.failing):
                raise RuntimeError("cannot read")
            said = text.partition("publisher is ")[2].split(",")[0]
            rows.append(self.tokenizer(f" {said.upper()} it is\nand more ACME Press").input_ids)
        width = max(map(len, rows))
        out = torch.cat([input_ids, torch.tensor([row + [1] * (width - len(row)) for row in rows])], 1)
        assert stopping_criteria(out, None).all()
        assert generation_config.max_new_tokens == 48
        return out


def records_for(count):
    return [
        {"text": f"{long_text(40 * n, 200)}\npublisher:", "key": "publisher", "value": "Acme Press" if n else "Other"}
        for n in range(count)
    ]


def run(model, tokenizer, out, **changes):
    return evaporate.run_evaporate(model, tokenizer, "fda", out, **({"progress": False, "batch_size": 2} | changes))


def test_a_run_scores_resumes_and_records_failures(tmp_path, tokenizer):
    data = write_jsonl(tmp_path / "fda.jsonl", records_for(5))
    model = Reader(tokenizer, failing=("alpha160",))
    settings = {"data": data, "lengths": [151, 4000]}
    content = run(model, tokenizer, tmp_path / "out", **settings)
    cells = {cell["case"]: cell for cell in content["cells"]}
    assert list(cells) == ["fda L151", "fda L4000"]
    assert cells["fda L4000"]["errors"] == 5
    rows = {row["case"]: row for row in content["rows"]}
    failed = cells["fda L151"]["errors"]
    assert 0 < failed < 5, "some windows hold the failing word and some don't"
    assert rows["fda L151"]["n"] == 5 - failed
    lines = (tmp_path / "out/samples/fda-L151.jsonl").read_text().splitlines()
    records = {record["index"]: record for record in map(json.loads, lines)}
    assert records[0]["score"] == 0.0
    assert records[1]["score"] == 1.0
    assert records[1]["prediction"] == " ACME PRESS it is"
    assert {r["error"] for r in records.values() if r["score"] is None} == {"RuntimeError: cannot read"}
    assert "| fda L151 | accuracy |" in (tmp_path / "out/table.md").read_text()
    assert (tmp_path / "out/heatmap-fda.png").read_bytes().startswith(b"\x89PNG")
    whole = Reader(tokenizer)
    content = run(whole, tokenizer, tmp_path / "out", **settings)
    assert len(whole.prompts) == failed + 5, "only what failed is read again"
    assert [(row["case"], row["median"], row["n"]) for row in content["rows"]] == [
        ("fda L151", 0.8, 5),
        ("fda L4000", 0.8, 5),
    ]
    assert any("short" in warning for warning in content["warnings"])
    with pytest.raises(ValueError, match="holds another run: seed is 0 there and 4 here"):
        run(whole, tokenizer, tmp_path / "out", **settings, seed=4)
    with pytest.raises(ValueError, match="scoring"):
        run(whole, tokenizer, tmp_path / "b", data=data, scoring="v2")
    with pytest.raises(ValueError, match="lengths: 50 leaves no text"):
        run(whole, tokenizer, tmp_path / "b", data=data, lengths=[50])


def test_packed_data_choose_the_lengths(tmp_path, tokenizer):
    texts = [{"text": f"{long_text(3, 20 * n)}\nWho?", "value": "ACME Press", "length": 100 * n} for n in (2, 4)]
    data = write_jsonl(tmp_path / "squad.jsonl", texts)
    arguments = {"data": data, "progress": False}
    content = evaporate.run_evaporate(Reader(tokenizer), tokenizer, "squad", tmp_path / "a", **arguments)
    assert [(row["case"], row["median"]) for row in content["rows"]] == [("squad L200", 1.0), ("squad L400", 1.0)]
    assert "windows" not in content["definition"]
    model = Reader(tokenizer)
    evaporate.run_evaporate(model, tokenizer, "squad", tmp_path / "b", lengths=[400], twice=True, **arguments)
    assert [text.count("ACME Press") for text in model.prompts] == [2]
    with pytest.raises(ValueError, match=r"packed to \[200, 400\], not to \[300\]"):
        evaporate.run_evaporate(model, tokenizer, "squad", tmp_path / "c", lengths=[300], **arguments)
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [*texts, {"text": "Some. Who?", "value": "ACME Press"}])
    with pytest.raises(ValueError, match=r"some documents were packed to \[200, 400\] and others weren't"):
        evaporate.run_evaporate(model, tokenizer, "squad", tmp_path / "d", **(arguments | {"data": mixed}))


@pytest.mark.parametrize("family", ["llama", "lalte"])
def test_rows_of_a_batch_are_answered_as_alone(tokenizer, family):
    model = make_llama() if family == "llama" else make_model("lalte", vocab_size=400, max_position_embeddings=400)
    texts = [long_text(n, 12 + 9 * n)[: 40 + 31 * n] for n in range(4)]
    together = answer(model, tokenizer, texts, 9, one_line=True)
    alone = [answer(model, tokenizer, [text], 9, one_line=True)[0] for text in texts]
    assert together == alone
    assert len(set(together)) > 1
    assert not any("\n" in text for text in together)


def test_the_commands(tmp_path, tokenizer, capsys):
    model = make_llama()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    squad_file(tmp_path / "squad.json")
    build = argparse.ArgumentParser()
    build_cli.add_arguments(build)
    out = str(tmp_path / "squad.jsonl")
    line = ["squad", "--source", str(tmp_path / "squad.json"), "--form", "sentence", "--out", out]
    line += ["--lengths", "300", "--tokenizer", str(tmp_path / "model")]
    assert build_cli.run_from_arguments(build.parse_args(line)) == 0
    for wrong, words in (
        (["swde", "--out", out], "pages: missing"),
        (["squad", "--source", "x", "--pages", "y", "--out", out], "pages: squad has no use for it"),
        (["swde", "--pages", "x", "--pairs", "y", "--form", "z", "--out", out], "form: swde has no use for it"),
        (line, "exists already"),
    ):
        with pytest.raises(ValueError, match=words):
            build_cli.run_from_arguments(build.parse_args(wrong))
    parser = argparse.ArgumentParser()
    evaporate_cli.add_arguments(parser)
    assert "examples:" in parser.format_help()
    line = ["--model", str(tmp_path / "model"), "--task", "squad", "--data", out, "--out", str(tmp_path / "run")]
    line += ["--samples", "2", "--config", "configs/eval/evaporate.yaml", "--lengths", "300"]
    assert evaporate_cli.run_from_arguments(parser.parse_args(line)) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["rows"][0]["case"] == "squad L300"
    assert result["rows"][0]["n"] == 2
    assert result["definition"].startswith("EVAPORATE squad: prompt and score of lm-evaluation-harness, version 1")
    assert "task: squad" in (tmp_path / "run/config.yaml").read_text()
    for wrong, words in (
        (["--model", "m", "--out", "o"], "task: missing"),
        (["--model", "m", "--out", "o", "--task", "x"], "task: 'x' is unknown"),
        (["--model", str(tmp_path / "nowhere"), "--out", "o", "--task", "fda"], "is no folder"),
    ):
        with pytest.raises(ValueError, match=words):
            evaporate_cli.run_from_arguments(parser.parse_args(wrong))


def test_module_constants_match_the_definition():
    assert evaporate.NEW_TOKENS == 48
    assert evaporate_data.ANSWER_ROOM == 50
