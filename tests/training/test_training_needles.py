"""Needle documents: what they hold, what is labelled, that they tokenise like whole text, and that they repeat."""

import re

import numpy as np
import pytest

from training.needles import NeedleMaker
from training.rows import IGNORED
from training.sources import SourceConfig
from training.store import open_store
from training.tokenizer import train_tokenizer
from training.wording import NeedleConfig, check_needles, choose_wording, wordings


@pytest.fixture(scope="module")
def needle_tokenizer(texts):
    wording = wordings(NeedleConfig(), 0, 200)
    return train_tokenizer([*texts, *wording], 600)


@pytest.fixture(scope="module")
def store(tmp_path_factory, needle_tokenizer, texts):
    folder = tmp_path_factory.mktemp("store")
    (folder / "texts.txt").write_text("\n<end>\n".join(texts))
    source = SourceConfig(path=str(folder / "texts.txt"), separator="\n<end>\n")
    return open_store(source, needle_tokenizer, folder, name="s", add_bos=False, add_eos=True, progress=False)


def maker(tokenizer, store=None, row_length=311, **fields):
    stores, weights = ([store], [1.0]) if store is not None else (None, None)
    config = NeedleConfig(fraction=1, **fields)
    return NeedleMaker(config, tokenizer, row_length=row_length, seed=3, stores=stores, weights=weights)


def documents(row):
    starts = [0, *row.ends[:-1]]
    return [(row.tokens[a:b], row.labels[a:b]) for a, b in zip(starts, row.ends, strict=True)]


@pytest.mark.parametrize("haystack", ["noise", "text", "needles"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"keys": [2, 5], "questions": [1, 3], "digits": 3}, {"value_type": "uuid"}, {"keys": [4, 4], "queries": 2}],
)
def test_whole_text_gives_the_same_ids(needle_tokenizer, store, haystack, fields):
    made = maker(needle_tokenizer, store, haystacks=[haystack], **fields)
    for index in range(5):
        row = made.row(index)
        assert len(row.tokens) == 311
        tokens, _ = documents(row)[0]
        assert tokens[-1] == needle_tokenizer.eos_token_id
        text = needle_tokenizer.decode(tokens[:-1])
        assert needle_tokenizer(text, add_special_tokens=False)["input_ids"] == tokens[:-1].tolist()


@pytest.mark.parametrize("haystack", ["noise", "text", "needles"])
def test_answers_stand_in_the_haystack_and_are_all_that_is_labelled(needle_tokenizer, store, haystack):
    made = maker(
        needle_tokenizer, store, haystacks=[haystack], row_length=553, keys=[2, 4], questions=[2, 2], loss_on="answer"
    )
    seen = set()
    for index in range(20):
        tokens, labels = documents(made.row(index))[0]
        text = needle_tokenizer.decode(tokens)
        facts = dict(re.findall(r"One of the special magic numbers for (.+?) is: (\d{7})\.", text))
        asked = re.findall(r"What is the special magic number for (.+?) mentioned in the provided text\?", text)
        assert len(asked) == 2
        assert all(key in facts for key in asked)
        if haystack != "needles":
            assert 2 <= len(facts) <= 4
        answer = needle_tokenizer.decode(labels[labels != IGNORED])
        assert answer == "".join(f" {facts[key]}." for key in asked) + needle_tokenizer.eos_token
        np.testing.assert_array_equal(labels[labels != IGNORED], tokens[labels != IGNORED])
        seen.update(facts)
    assert len(seen) > 30


def test_needles_lie_everywhere(needle_tokenizer):
    made = maker(needle_tokenizer, row_length=700)
    depths = []
    for index in range(60):
        tokens, _ = documents(made.row(index))[0]
        lines = needle_tokenizer.decode(tokens).split("\n")[1:-1]
        depths.append(next(i for i, line in enumerate(lines) if "special magic" in line) / (len(lines) - 1))
    assert min(depths) < 0.1
    assert max(depths) > 0.9
    assert 0.35 < np.mean(depths) < 0.65


def test_needles_stand_between_any_two_lines_alike(needle_tokenizer):
    made = maker(needle_tokenizer, row_length=700, keys=[6, 6], digits=2)
    depths = []
    for index in range(60):
        tokens, _ = documents(made.row(index))[0]
        lines = needle_tokenizer.decode(tokens).split("\n")[1:-1]
        needles = [i for i, line in enumerate(lines) if line.startswith("One of the special")]
        assert len(needles) == 6
        depths += [place / (len(lines) - 1) for place in needles]
    # the mean of 360 numbers of a standard deviation below 0.35
    assert abs(np.mean(depths) - 0.5) < 3 * 0.35 / 360**0.5


def test_needles_stand_behind_sentences_of_a_text(needle_tokenizer, store):
    made = maker(needle_tokenizer, store, haystacks=["text"], keys=[4, 4])
    for index in range(20):
        tokens, _ = documents(made.row(index))[0]
        body = needle_tokenizer.decode(tokens).partition("\n")[2]
        before = [body[: match.start()] for match in re.finditer("One of the special", body)]
        assert len(before) == 4
        assert all(text.rstrip()[-1:] in (".", "") for text in before)


def test_what_does_not_fit_is_left_out_from_the_end(needle_tokenizer):
    """Facts that nobody asks about go first; then the last question, and with it its fact."""
    made = maker(needle_tokenizer, row_length=2000, noise="", keys=[1, 9], questions=[1, 6])

    def read(seed, length):
        tokens, _ = made._document(np.random.default_rng(seed), length)
        assert len(tokens) <= length
        text = needle_tokenizer.decode(tokens)
        facts = re.findall(r"One of the special magic numbers for (.+?) is: \d{7}\.", text)
        return facts, re.findall(r"What is the special magic number for (.+?) mentioned", text), len(tokens)

    cut = 0
    for seed in range(8):
        facts, asked, size = all_facts, all_asked, _ = read(seed, 2000)
        for length in range(size - 1, made.least, -7):
            before, (facts, asked, size) = (facts, asked, size), read(seed, length)
            assert asked == all_asked[: len(asked)]
            assert set(asked) <= set(facts) <= set(all_facts)
            spare = len(facts) - len(asked)
            assert spare <= 1 if len(asked) < len(all_asked) else spare <= len(all_facts) - len(all_asked)
            if before[2] <= length:
                assert size == before[2], "what fits is kept"
            cut += len(asked) < len(all_asked)
        assert len(asked) < len(all_asked) or len(all_asked) == 1
    assert cut > 50


def test_rows_depend_on_seed_stage_and_index_only(needle_tokenizer, store):
    first = maker(needle_tokenizer, store, haystacks=["noise", "text"])
    again = maker(needle_tokenizer, store, haystacks=["noise", "text"])
    rows = [first.row(i) for i in range(6)]
    for index in reversed(range(6)):
        np.testing.assert_array_equal(again.row(index).tokens, rows[index].tokens)
    assert len({row.tokens.tobytes() for row in rows}) == 6


def test_lengths_fill_a_row(needle_tokenizer):
    made = maker(needle_tokenizer, row_length=1024, length=[150, 260], digits=2)
    for index in range(10):
        lengths = [len(tokens) for tokens, labels in documents(made.row(index)) if (labels != IGNORED).any()]
        assert len(lengths) >= 3
        assert all(size <= 260 for size in lengths[:-1])
        assert 1024 - sum(lengths) < 80
    row = made.row(0)
    padding = row.tokens[row.ends[-2] :]
    if (row.labels[row.ends[-2] :] == IGNORED).all():
        assert (padding == needle_tokenizer.eos_token_id).all()


def test_where_keys_run_out_the_rest_is_noise(needle_tokenizer):
    made = maker(needle_tokenizer, row_length=1024, haystacks=["needles"], key_type="number", digits=1)
    for index in range(3):
        tokens, _ = documents(made.row(index))[0]
        keys = re.findall(r"magic numbers for (\d) is: \d\.", needle_tokenizer.decode(tokens))
        assert sorted(keys) == [str(key) for key in range(10)]
        assert 1024 - len(tokens) < 80


@pytest.mark.parametrize("haystack", ["noise", "needles"])
def test_a_haystack_without_noise(needle_tokenizer, haystack):
    made = maker(needle_tokenizer, haystacks=[haystack], noise="")
    tokens, _ = documents(made.row(0))[0]
    needles = needle_tokenizer.decode(tokens).count("One of the special magic numbers for")
    assert needles > 1 if haystack == "needles" else needles == 1


def test_own_wording(needle_tokenizer):
    made = maker(
        needle_tokenizer,
        row_length=64,
        preamble="Facts:",
        needle="{key} has {value}.",
        question="{key}?",
        prefix="It is",
        value_type="word",
        noise="So it goes.",
    )
    text = needle_tokenizer.decode(documents(made.row(0))[0][0])
    key, value = re.search(r"\n(\S+) has (.+)\.\n", text).groups()
    assert text.startswith("Facts:\n")
    assert text.endswith(f"\n{key}? It is {value}.{needle_tokenizer.eos_token}")


@pytest.mark.parametrize("haystack", ["noise", "text", "needles"])
def test_alternatives_are_drawn_for_each_document(needle_tokenizer, store, haystack):
    made = maker(
        needle_tokenizer,
        store,
        haystacks=[haystack],
        keys=[2, 2],
        preamble="[Facts|What is known]:",
        needle="[{key} has {value}.|{key} owns {value}.] [sic]",
        question="[What of {key}?|{key}?]",
        prefix="[It is|The answer: it is]",
        value_type="serial",
        key_type="compound",
        digits=6,
    )
    preambles, needles, questions = set(), set(), set()
    for index in range(30):
        tokens, _ = documents(made.row(index))[0]
        text = needle_tokenizer.decode(tokens[:-1])
        assert needle_tokenizer(text, add_special_tokens=False)["input_ids"] == tokens[:-1].tolist()
        preambles.add(text[: text.index(":\n")])
        found = re.findall(r"(\S+-\S.*?) (has|owns) ([0-9a-f]{4}-[0-9a-f]{2})\. \[sic\]", text)
        assert len({verb for _, verb, _ in found}) == 1, "one wording a document"
        needles.add(found[0][1])
        asked = re.search(r"\n(What of )?(\S.*)\? (It|The answer: it) is (\S+)\.$", text)
        questions.add((asked[1], asked[3]))
        assert (asked[2], asked[4]) in {(key.splitlines()[-1], value) for key, _, value in found}
    assert (preambles, needles) == ({"Facts", "What is known"}, {"has", "owns"})
    assert len(questions) == 4


@pytest.mark.parametrize(
    ("template", "texts"),
    [
        ("It [really |]is", {"It really is", "It is"}),
        ("It [|]is", {"It is"}),
        ("[sic] a | b [note]", {"[sic] a | b [note]"}),
        ("[see [a|b]]", {"[see a]", "[see b]"}),
        ("[[a]] b", {"[[a]] b"}),
        ("a ] b [", {"a ] b ["}),
        ("[a|b|c] [d|e]", {f"{one} {other}" for one in "abc" for other in "de"}),
    ],
)
def test_what_brackets_stand_for(template, texts):
    config = NeedleConfig(prefix=template)
    check_needles(config)
    rng = np.random.default_rng(0)
    assert {choose_wording(rng, config).prefix for _ in range(99)} == texts


def test_without_alternatives_nothing_is_drawn():
    """So that documents of such recipes are those that they were before there were alternatives."""
    rng, config = np.random.default_rng(0), NeedleConfig(prefix="[sic] It is")
    assert choose_wording(rng, config) == config
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fraction": 1.5}, r"needles\.fraction=1\.5 is outside"),
        ({"haystacks": ["hay"]}, r"needles\.haystacks holds 'hay'"),
        ({"haystacks": []}, r"needles\.haystacks is empty"),
        ({"keys": [3, 2]}, r"needles\.keys=\[3, 2\] is no range"),
        ({"digits": 0}, r"needles\.digits=0 is below 1"),
        ({"queries": 2}, r"queries=2"),
        ({"loss_on": "some"}, r"needles\.loss_on='some' is unknown: use one of all, answer"),
        ({"needle": "{key} is {valu}"}, r"needles\.needle=.* is no template"),
        ({"question": "What?"}, r"needles\.question='What\?' lacks \{key\}"),
        ({"question": "[What of {key}?|What?]"}, r"needles\.question=.* lacks \{key\}"),
        ({"needle": "[{key} has {value}|{key} has [sic] {value}]"}, r"needles\.needle=.* has brackets within"),
        ({"answer": "[[{value}.|{value}]|{value}!]"}, r"needles\.answer=.* has brackets within"),
        ({"prefix": "[It is\n[a]|One\nreads]"}, r"needles\.prefix=.* has brackets within"),
        ({"prefix": "[It is|One reads"}, r"needles\.prefix=.* has brackets within .* never closed"),
        ({"question_many": "[All of {key}?|All?]"}, r"needles\.question_many=.* lacks \{key\}"),
        # whole it can be filled in, with "|" to pad the key, but neither alternative can
        ({"prefix": "[{key:|<5} is]"}, r"needles\.prefix=.* is no template"),
        ({"prefix": "{key.name} is"}, r"needles\.prefix=.* is no template"),
    ],
)
def test_bad_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        check_needles(NeedleConfig(**fields))


def test_too_short_rows_are_an_error_before_training(needle_tokenizer):
    with pytest.raises(ValueError, match=r"sequence_length=40 tokens can't hold a needle document, which takes \d+"):
        maker(needle_tokenizer, row_length=40)
    with pytest.raises(ValueError, match=r"needles\.length=50 tokens can't hold"):
        maker(needle_tokenizer, row_length=400, length=[50, 300])
    with pytest.raises(ValueError, match=r"haystacks holds 'text' but no text source"):
        maker(needle_tokenizer, haystacks=["text"])
