"""Streaming question answering: data, turns, judged answers against one forward pass, and the command."""

import argparse
import copy
import gzip
import json

import pytest
import torch
from transformers import DynamicCache

from eval import streamqa_cli
from eval.choices import Question, conversation, read_questions
from eval.streamqa import one_shot, pieces, run_streamqa
from eval.streams import encode
from tests.eval.test_streaming_eval import Rememberer
from tests.tiny_models import make_model
from tests.tiny_texts import make_llama, make_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}[be brief]{% endif %}<{{ m['role'] }}>{{ m['content'] }}</>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUESTIONS = [
    Question(f"Which of these is number {n}?", tuple(f"{n * k} things" for k in range(1, 4 + n % 2)), n % 3)
    for n in range(5)
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def records(folder, system):
    lines = (folder / "samples" / f"{system}.jsonl").read_text().splitlines()
    return {record["index"]: record for record in map(json.loads, lines)}


def test_questions_are_read_in_every_form(tmp_path):
    ours = [{"question": q.text, "choices": list(q.choices), "gold": q.gold} for q in QUESTIONS]
    labels = {"label": ["1", "2", "3", "4"]}
    theirs = [
        {"question": q.text, "choices": {"text": list(q.choices), **labels}, "answerKey": str(q.gold + 1)}
        for q in QUESTIONS
    ]
    (tmp_path / "a.json").write_text(json.dumps(ours))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, theirs)) + "\n\n")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, ours)))
    for name in ("a.json", "b.jsonl", "c.jsonl.gz"):
        found, source = read_questions("arc_easy", tmp_path / name)
        assert found == QUESTIONS
        assert source.startswith(f"{name} {(tmp_path / name).stat().st_size} ")
    odd = ours[0] | {"question": "Which\u2028one,\x85of these?"}
    (tmp_path / "d.jsonl").write_text("\ufeff" + json.dumps(odd, ensure_ascii=False), encoding="utf-8")
    assert read_questions("arc_easy", tmp_path / "d.jsonl")[0][0].text == odd["question"]
    for text, words in (
        ("[]", "holds no question"),
        ("[{}]", "entry 0 is no question"),
        ('{"question": "a", "choices": ["b", "c"], "gold": 2}', "line 1: gold 2 of 2"),
        ('{"question": "a", "choices": ["b", " "], "gold": 1}', "none of them empty"),
        ("{", "can't be read"),
    ):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(ValueError, match=words):
            read_questions("arc_easy", tmp_path / "bad.jsonl")
    whole = gzip.compress(b"text " * 99, mtime=0)
    (tmp_path / "broken.jsonl.gz").write_bytes(whole[:10] + b"\x06" + whole[11:])  # an unknown kind of block
    with pytest.raises(ValueError, match=r"broken\.jsonl\.gz can't be read"):
        read_questions("arc_easy", tmp_path / "broken.jsonl.gz")
    with pytest.raises(ValueError, match="is not a file"):
        read_questions("arc_easy", tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="task: 'arc'"):
        read_questions("arc", tmp_path / "a.json")


def test_turns_are_those_of_the_chat_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for kind in ("letter", "text"):
        write = conversation(tokenizer, kind, chat=True)
        parts = [write(question, place == 0) for place, question in enumerate(QUESTIONS[:3])]
        messages = []
        for question, (ask, answer, _) in zip(QUESTIONS, parts, strict=False):
            said = ask.partition("<user>")[2].partition("</>")[0]
            assert said.startswith(question.asked())
            assert answer == (("ABC"[question.gold]) if kind == "letter" else question.choices[question.gold])
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
        assert "".join(map("".join, parts)) == tokenizer.apply_chat_template(messages, tokenize=False)
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(ValueError, match="changes earlier turns"):
        conversation(tokenizer, "letter", chat=True)(QUESTIONS[0], False)
    plain = conversation(tokenizer, "letter", chat=False)
    assert "".join(plain(QUESTIONS[1], True)) == (
        "Questions, each with its right answer.\n\n"
        "Question: Which of these is number 1?\nA. 1 things\nB. 2 things\nC. 3 things\nD. 4 things\nAnswer: B\n\n"
    )


@pytest.mark.parametrize("answers", ["letter", "text"])
def test_answers_are_those_of_one_pass(answers, tokenizer, tmp_path):
    """Dense, and caches that hold everything, guess what a pass over the whole stream does; small ones don't."""
    model = make_llama()
    write = conversation(tokenizer, answers, chat=False)

    def guesses(source, count):
        found, ids, inside = {}, [], []
        for _ in range(count):
            piece = next(source)
            new, own = encode(piece, tokenizer)
            ids, inside = ids + new, inside + [piece.line if flag else None for flag in own]
        with torch.no_grad():
            likeliest = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        for place, line in enumerate(inside):
            if line is not None:
                found.setdefault(line, []).append((ids[place], likeliest[place - 1]))
        return {
            line: (tokenizer.decode([g for _, g in pairs]), float(all(t == g for t, g in pairs)))
            for line, pairs in found.items()
        }

    seen = lambda folder, system: {n: (r["prediction"], r["score"]) for n, r in records(folder, system).items()}
    expected = guesses(pieces(QUESTIONS, range(5), write), 5)
    alone = {n: guesses(one_shot(QUESTIONS, n, write), 2)[n] for n in range(5)}
    how = {"answers": answers, "progress": False}
    run = lambda out, **more: run_streamqa(model, tokenizer, QUESTIONS, tmp_path / out, **how, **more)
    content = run("large", window=700, chunk=37)
    for system in ("dense", "window", "streaming"):
        assert seen(tmp_path / "large", system) == expected
    assert seen(tmp_path / "large", "one-shot") == alone
    assert [row["system"] for row in content["rows"] if row["metric"] == "accuracy"] == [
        *("dense", "window", "streaming", "one-shot")
    ]
    nbytes = {row["system"]: row["median"] for row in content["rows"] if row["metric"] == "bytes"}
    assert nbytes["window"] == nbytes["streaming"] == 2 * 2 * 2 * 704 * 6 * 4 + 8  # layers, k and v, heads, slots, D
    small = {"window": 30, "systems": ["window", "streaming"]}
    run("small", **small)
    assert seen(tmp_path / "small", "streaming") not in (expected, seen(tmp_path / "small", "window"))
    run("chunks", chunk=19, **small)
    assert seen(tmp_path / "chunks", "streaming") == seen(tmp_path / "small", "streaming")
    kept = {"systems": ["streaming"], "sinks": 2, "budget": 9}
    run("retained", window=30, retention="recency", **kept)
    run("longer", window=39, systems=["streaming"], sinks=2)
    assert seen(tmp_path / "retained", "streaming") == seen(tmp_path / "longer", "streaming")


def test_a_system_that_fails_does_not_end_the_others(tokenizer, tmp_path, monkeypatch):
    """The whole stream may not fit into the memory where a window does."""
    model = make_llama()
    forward = model.forward

    def limited(input_ids, past_key_values=None, **more):
        if isinstance(past_key_values, DynamicCache) and past_key_values.get_seq_length() > 90:
            raise torch.cuda.OutOfMemoryError("too long")
        return forward(input_ids=input_ids, past_key_values=past_key_values, **more)

    monkeypatch.setattr(model, "forward", limited)
    how = {"chunk": 32, "progress": False}
    systems = ["dense", "streaming"]
    content = run_streamqa(model, tokenizer, QUESTIONS, tmp_path / "a", systems=systems, window=30, **how)
    assert [(cell["system"], cell["errors"]) for cell in content["cells"]] == [("dense", 5), ("streaming", 0)]
    assert {row["system"] for row in content["rows"]} == {"streaming"}
    with pytest.raises(RuntimeError, match="no stream could be read: OutOfMemoryError: too long"):
        run_streamqa(model, tokenizer, QUESTIONS, tmp_path / "b", systems=["dense"], **how)


def test_streams_of_plain_text_begin_as_the_tokenizer_begins_texts(tmp_path):
    tokenizer = make_tokenizer(bos=True)
    model, read = Rememberer(10**6), []
    forward = model.forward
    model.forward = lambda input_ids, **more: (read.append(input_ids[0].tolist()), forward(input_ids, **more))[1]
    run_streamqa(model, tokenizer, QUESTIONS, tmp_path, systems=["own"], chat=False, progress=False)
    assert read[0][0] == 2
    assert sum(ids.count(2) for ids in read) == 1


def test_another_chat_template_is_another_run(tokenizer, tmp_path):
    own = copy.deepcopy(tokenizer)
    how = {"systems": ["own"], "progress": False}
    for template, words in ((TEMPLATE, None), (TEMPLATE.replace("brief", "quick"), "wording is")):
        own.chat_template = template
        if words is None:
            run_streamqa(Rememberer(10**6), own, QUESTIONS, tmp_path, **how)
            continue
        with pytest.raises(ValueError, match=f"holds another run: .*{words}"):
            run_streamqa(Rememberer(10**6), own, QUESTIONS, tmp_path, **how)


def test_a_model_that_remembers_answers_again(tokenizer, tmp_path):
    """The same questions twice, for a model that continues as the text did before; a run continues where it was."""
    twice = QUESTIONS * 2
    model = Rememberer(10**6)
    content = run_streamqa(model, tokenizer, twice, tmp_path / "a", progress=False)
    scores = [record["score"] for _, record in sorted(records(tmp_path / "a", "own").items())]
    assert scores[5:] == [1.0] * 5
    assert content["cells"][0] == {"case": "streamqa arc_easy", "system": "own", "samples": 10, "errors": 0}
    calls = len(model.calls)
    assert run_streamqa(model, tokenizer, twice, tmp_path / "a", progress=False)["rows"] == content["rows"]
    assert len(model.calls) == calls
    forgetful = run_streamqa(Rememberer(100), tokenizer, twice, tmp_path / "b", systems=["own"], progress=False)
    assert forgetful["rows"][0]["median"] < content["rows"][0]["median"]
    split = run_streamqa(Rememberer(10**6), tokenizer, twice, tmp_path / "c", streams=5, batch_size=2, progress=False)
    assert [record["score"] for _, record in sorted(records(tmp_path / "c", "own").items())][5:] == [1.0] * 5
    assert split["rows"][0]["n"] == 10


def test_ours_are_read_under_another_rule(tokenizer, tmp_path):
    model = make_model("lalte", vocab_size=400, max_position_embeddings=400)
    own, found = (model.retention, model.retention_budget), []
    for budget in (2, 5):
        how = {"systems": ["own"], "retention": "tova", "budget": budget, "progress": False}
        content = run_streamqa(model, tokenizer, QUESTIONS, tmp_path / str(budget), **how)
        assert (content["config"]["retention"], content["config"]["budget"]) == ("tova", budget)
        found += [row["median"] for row in content["rows"] if row["metric"] == "bytes"]
    assert 0 < found[0] < found[1]
    assert (model.retention, model.retention_budget) == own


def test_what_can_not_be_run(tokenizer, tmp_path):
    model = make_llama()
    for how, words in (
        ({"systems": ["sparse"]}, "systems: .'sparse'"),
        ({"systems": ["dense", "dense"]}, "each once"),
        ({"systems": ["own"]}, "LlamaForCausalLM has no cache of its own"),
        ({"systems": ["dense"], "window": 9}, "window: 9 is of the systems window and streaming; leave window out"),
        ({"systems": ["dense"], "budget": 3}, "budget: 3 is of the systems window and streaming; leave budget out"),
        ({"systems": ["one-shot"], "retention": "h2o"}, "retention: h2o is of the systems window and streaming"),
        ({"answers": "number"}, "answers: 'number'"),
        ({"chat": True}, "no chat template"),
        ({"samples": 0}, "samples: 0"),
        ({"streams": 0}, "streams: 0"),
        ({"budget": 3}, "budget=3 needs a policy"),
    ):
        with pytest.raises(ValueError, match=words):
            run_streamqa(model, tokenizer, QUESTIONS, tmp_path / "out", progress=False, **how)
    with pytest.raises(ValueError, match=r"systems: window needs another cache, .* its own; use own or one-shot"):
        run_streamqa(Rememberer(9), tokenizer, QUESTIONS, tmp_path / "out", systems=["window"], progress=False)
    ours = make_model("lalte", vocab_size=400)
    for how in ({"budget": -1}, {"retention": "h3o"}):
        with pytest.raises(ValueError, match=f"{next(iter(how))}[:=]"):
            run_streamqa(ours, tokenizer, QUESTIONS, tmp_path / "out", progress=False, **how)
    assert not (tmp_path / "out").exists(), "a folder that is claimed would refuse the run as it was meant"


def test_the_command(tmp_path, tokenizer):
    make_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    entries = [{"question": q.text, "choices": list(q.choices), "gold": q.gold} for q in QUESTIONS]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    parser = argparse.ArgumentParser()
    streamqa_cli.add_arguments(parser)
    line = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.json"), "--samples", "3"]
    line += [
        "--config",
        "configs/eval/streamqa.yaml",
        "--systems",
        "window,streaming",
        "--out",
        str(tmp_path / "out"),
    ]
    assert streamqa_cli.run_from_arguments(parser.parse_args(line)) == 0
    content = json.loads((tmp_path / "out/result.json").read_text())
    assert content["config"]["systems"] == {"window": "stream 0+1024", "streaming": "stream 4+1020"}
    assert {row["n"] for row in content["rows"] if row["metric"] == "accuracy"} == {3}
    assert "task: arc_easy" in (tmp_path / "out/config.yaml").read_text()
