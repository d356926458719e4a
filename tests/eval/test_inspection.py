"""`lalte inspect`: what is collected agrees with the rule and the model, and the page works in a browser.

Shapes: B rows, T tokens, H KV heads, N query heads, D head dimension, R rows and columns of a map.
"""

import argparse
import base64
import hashlib
import html
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ByT5Tokenizer

import models.attention
from eval import inspection_cli
from eval.inspection import (
    Tokens,
    _read,
    attention_layers,
    attention_shares,
    inspect_text,
    short_pieces,
    split_text,
)
from eval.inspection_page import png_uri, render, script_json, shades, write_figures
from lte.visibility import lifetimes, visible
from tests.inspections import BAD, made, page_json
from tests.tiny_models import make_ids, make_model, make_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog, then the other fox laughs. " * 9
RULES = {
    "lalte": ("lalte", {}),
    "one scorer a layer": ("lalte", {"scorer_sharing": "heads"}),
    "one scorer": ("lalte", {"scorer_sharing": "layers"}),
    "rope_in_cache": ("lalte", {"position_encoding": "rope_in_cache"}),
    "no positions": ("lalte", {"position_encoding": "none"}),
    "streaming": ("streaming", {}),
    "full": ("gdn-full", {}),
}


def small(name="lalte", **changes):
    family, fields = RULES[name]
    return make_model(family, vocab_size=320, **fields, **changes)


def numbers(text, kind):
    return np.frombuffer(base64.b64decode(text), kind)


# ---- the text ----


@pytest.mark.parametrize("text", [TEXT, "aé😀\n\n  漢字\tz ", "x"])
def test_tokens_are_slices_of_the_text(text):
    tokens = split_text(make_tokenizer(), text)
    assert "".join(tokens.texts) == text
    assert tokens.ids == make_tokenizer()(text).input_ids
    assert tokens.total == len(tokens.ids) == len(tokens.texts) == len(tokens.special)


def test_special_tokens_keep_their_names():
    tokenizer = make_tokenizer()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokens = split_text(tokenizer, "fox </s> fox", limit=3)
    assert (tokens.texts[0], tokens.special[:2]) == ("<s>", [True, False])
    assert len(tokens.ids) == 3 < tokens.total
    whole = split_text(tokenizer, "fox </s> fox")
    assert whole.special[-1] is False, "the end that the tokenizer adds is dropped, the text's own stays text"
    assert "".join(whole.texts[1:]) == "fox </s> fox"
    with pytest.raises(ValueError, match="limit: 1 leaves only what the tokenizer adds to the text; use 2 or more"):
        split_text(tokenizer, "fox </s> fox", limit=1)


def test_tokenizer_without_offsets():
    tokens = split_text(ByT5Tokenizer(), "fox!")
    assert (tokens.texts, any(tokens.special)) == (list("fox!"), False)


@pytest.mark.parametrize(("text", "limit", "word"), [("", None, "no tokens"), ("fox", 0, "limit")])
def test_texts_that_cannot_be_read(text, limit, word):
    with pytest.raises(ValueError, match=word):
        split_text(make_tokenizer(), text, limit)


# ---- what is collected ----


@pytest.mark.parametrize("name", RULES)
def test_lifetimes_are_those_of_the_model(name, monkeypatch):
    """The ends are what the mixers used, and what the definition of the rule says."""
    used = []

    def spy(*args, **kwargs):
        used.append(lifetimes(*args, **kwargs))
        return used[-1]

    monkeypatch.setattr(models.attention, "lifetimes", spy)
    model = small(name)
    found = inspect_text(model, make_tokenizer(), TEXT, limit=73, maps=False, progress=False)
    assert len(found.layers) == len(used) == 2
    for record, end_BTH in zip(found.layers, used, strict=True):
        assert torch.equal(record.end_TH, end_BTH[0])
        mixer = model.model.layers[record.layer].mixer
        mask_HTT = visible(
            None if record.logits_TH is None else record.logits_TH[None],
            batch=1, length=73, heads=2, window=mixer.window, sinks=mixer.sinks, budget=mixer.budget,
        )[0]  # fmt: skip
        index = torch.arange(73)
        ours = (index[:, None] >= index) & (index[:, None] < record.end_TH.T[:, None, :])
        assert torch.equal(ours, mask_HTT)
        assert (record.logits_TH is not None) == (RULES[name][0] == "lalte")
    if found.layers[0].logits_TH is not None:
        lost = (found.layers[0].end_TH < 73) & (found.layers[0].logits_TH > 0)
        assert lost.any(), "the budget must be at work"


@pytest.mark.parametrize("policy", ["recency", "random", "key_norm", "delta_error", "h2o", "tova"])
def test_tokens_that_a_policy_retained_are_shown(policy):
    """What is said to be read at the end is what a cache holds there, and the page names who chose."""
    model, tokenizer = small(retention=policy), make_tokenizer()
    found = inspect_text(model, tokenizer, TEXT, limit=73, maps=False, progress=False)
    cache = model.new_cache(1)
    with torch.no_grad():
        model(input_ids=torch.tensor([found.tokens.ids]), past_key_values=cache)
    window = torch.arange(73 - 17, 73)
    for record in found.layers:
        assert record.logits_TH is None
        for head, held in enumerate(cache.states[record.layer].kv.positions[0]):
            ours = (record.end_TH[:, head] >= 73).nonzero().flatten()
            assert len(ours) == 2 + 3 + 17
            assert torch.equal(ours[-17:], window)
            assert torch.equal(ours, held[held >= 0].sort().values)
    assert page_json(render(found, model="m", text="t"))["policy"] == policy
    for changes in ({"retention": "lte"}, {"retention": policy, "budget": 0}):
        plain = inspect_text(small(**changes), tokenizer, TEXT, limit=73, maps=False, progress=False)
        assert plain.policy is None


def test_a_learned_sink_stands_in_front():
    model = small(sink_token="learnable")
    found = inspect_text(model, make_tokenizer(), TEXT, limit=40, progress=False)
    words = split_text(make_tokenizer(), TEXT, 40)
    assert found.tokens.texts == ["[sink]", *words.texts]
    assert found.tokens.special == [True, *words.special]
    for record, map_ in zip(found.layers, found.maps, strict=True):
        assert record.end_TH.shape == record.logits_TH.shape == (41, 2)
        assert (record.end_TH[: found.sinks] >= 41).all()
        assert map_.text_NRR.shape[-1] == 41
    page = page_json(render(found, model="m", text="t", position=None))
    assert page["tokens"][0] == "[sink]"


def test_budget_and_hooks_leave_the_model_as_it_was():
    model, ids = small(), make_ids(1, 60)
    before = model(ids).logits
    few = inspect_text(model, make_tokenizer(), TEXT, limit=73, budget=1, progress=False)
    assert few.budget == 1
    assert [layer.mixer.budget for layer in model.model.layers[1::2]] == [3, 3]
    assert torch.equal(model(ids).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    more = inspect_text(model, make_tokenizer(), TEXT, limit=73, maps=False, progress=False)
    assert (few.layers[0].end_TH <= more.layers[0].end_TH).all()
    assert (few.layers[0].end_TH < more.layers[0].end_TH).any()


@pytest.mark.parametrize("name", RULES)
@torch.no_grad()
def test_shares_are_the_attention_of_the_mixer(name):
    """Shares times values is the mixer's own output; they are none for evicted keys, and sum to 1."""
    model = small(name)
    length = 59
    seen = _read(model, make_ids(2, length))
    for layer, mixer in attention_layers(model).items():
        x_BTC, context = seen[layer].x_BTC, seen[layer].context
        shares_BTNK = attention_shares(mixer, seen[layer], torch.arange(length).expand(2, length), length)
        v_BTHD = mixer.v_proj(x_BTC).view(2, length, mixer.kv_heads, mixer.head_dim)
        v_BTND = v_BTHD.repeat_interleave(mixer.heads // mixer.kv_heads, 2)
        out = mixer.o_proj(torch.einsum("btnk,bknd->btnd", shares_BTNK, v_BTND).flatten(2))
        torch.testing.assert_close(out, mixer(x_BTC, context).hidden, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(shares_BTNK.sum(-1), torch.ones(2, length, mixer.heads), rtol=1e-5, atol=1e-5)
        mask_BHTT = visible(
            seen[layer].logits_BTH, batch=2, length=length, heads=2, window=mixer.window, sinks=mixer.sinks,
            budget=mixer.budget,
        )  # fmt: skip
        mask_BTNK = mask_BHTT.transpose(1, 2).repeat_interleave(mixer.heads // mixer.kv_heads, 2)
        assert torch.equal(shares_BTNK > 0, mask_BTNK)
        if name != "full":
            assert not mask_BTNK[:, -1].all()


def test_maps_are_averages():
    model, tokenizer = small(), make_tokenizer()
    found = inspect_text(model, tokenizer, TEXT, limit=131, progress=False)
    assert found.pieces == 8, "131 tokens hold eight pieces of 16"
    for maps in found.maps:
        assert maps.pieces_NRR.shape == (6, 16, 16)
        cells = maps.text_NRR.shape[-1]
        assert maps.text_NRR.shape == (6, cells, cells)
        assert cells == 96
        for map_NRR in (maps.pieces_NRR, maps.text_NRR):
            torch.testing.assert_close(map_NRR.sum(-1), torch.ones(map_NRR.shape[:2]), rtol=1e-4, atol=1e-4)
            assert (map_NRR.triu(1) == 0).all()
    with torch.no_grad():
        ids = torch.tensor([split_text(tokenizer, TEXT).ids[16:32]])
        seen = _read(model, ids)[1]
        alone = attention_shares(model.model.layers[1].mixer, seen, torch.arange(16)[None], 16)[0]
        all_pieces = [
            attention_shares(
                model.model.layers[1].mixer, _read(model, piece[None])[1], torch.arange(16)[None], 16
            )[0]
            for piece in short_pieces(split_text(tokenizer, TEXT, 131))
        ]  # fmt: skip
    torch.testing.assert_close(all_pieces[1], alone)
    mean_NRR = torch.stack(all_pieces).mean(0).transpose(0, 1)
    torch.testing.assert_close(found.maps[0].pieces_NRR, mean_NRR, rtol=1e-4, atol=1e-6)


def test_short_pieces():
    tokens = Tokens([9, *range(100, 145)], [""] * 46, [True] + [False] * 45, 46)
    pieces = short_pieces(tokens)
    assert pieces.tolist() == [[9, *range(100 + 15 * n, 115 + 15 * n)] for n in range(3)]
    short = Tokens([9, 100, 101], [""] * 3, [True, False, False], 3)
    assert short_pieces(short).tolist() == [[9, 100, 101]]


def test_models_without_attention_layers():
    with pytest.raises(ValueError, match=r"no layers of the kind attention \(only gated_deltanet\)"):
        inspect_text(make_model("gdn", vocab_size=320), make_tokenizer(), TEXT, progress=False)


def test_a_text_of_one_token():
    found = inspect_text(small(), make_tokenizer(), "x", progress=False)
    assert found.layers[0].end_TH.tolist() == [[1, 1]]
    assert found.maps[0].text_NRR.tolist() == found.maps[0].pieces_NRR.tolist() == [[[1.0]]] * 6
    assert page_json(render(found, model="m", text="x"))["position"] == 0


# ---- the page as a file ----


def test_page_holds_the_numbers():
    found = made([f" w{n}" for n in range(90)])
    data = page_json(render(found, model="m", text="t.txt", position=41))
    assert (data["tokens"], data["position"], data["budget"]) == (found.tokens.texts, 41, 5)
    for record, layer in zip(found.layers, data["layers"], strict=True):
        assert np.array_equal(numbers(layer["logits"], "<f4").reshape(2, 90).T, record.logits_TH.numpy())
        assert np.array_equal(numbers(layer["ends"], "<i4").reshape(2, 90).T, record.end_TH.numpy())


def test_untrusted_text_is_no_markup():
    page = render(made(BAD * 5), model="<i>m</i>", text="</title><script>1</script>")
    assert page.lower().count("<script") == page.lower().count("</script>") == 2, "the page's data and its script"
    assert "<img src=x" not in page
    assert "<i>m" not in page
    assert html.escape("</title><script>1</script>") in page
    data = page_json(page)
    assert data["tokens"] == BAD * 5
    assert json.loads(script_json({"<": "&</script>"})) == {"<": "&</script>"}


def test_page_needs_no_network():
    page = render(made(["a"] * 30, maps=True), model="m", text="t")
    addresses = set(re.findall(r"(?:https?:)?//[\w.]+\.\w+[^\s\"')]*", page))
    assert addresses == {"http://www.w3.org/2000/svg"}, "the name of the drawing's vocabulary, which is not fetched"
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1])
    assert policy.startswith("default-src 'none'; img-src data:;")
    for tag, start in (("style", "<style>"), ("script", '<script type="module">')):
        source = re.search(rf"{start}(.*?)</{tag}>", page, re.S)[1]
        assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'" in policy


@pytest.mark.parametrize("position", [-1, 30])
def test_positions_outside_the_text(position):
    with pytest.raises(ValueError, match=rf"position: {position} .* use 0 to 29"):
        render(made(["a"] * 30), model="m", text="t", position=position)


def test_pictures():
    weights = torch.tensor([[1.0, 0.0], [0.01, 1e-7]])
    assert shades(weights, 1e-4).tolist() == [[254, 255], [127, 0]]
    uri = png_uri(shades(weights, 1e-4))
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))).convert("RGBA")
    assert image.size == (2, 2)
    assert image.getpixel((0, 0)) == (253, 231, 36, 255), "viridis ends in yellow"
    assert image.getpixel((1, 0))[3] == 0
    assert image.getpixel((1, 1)) == (68, 1, 84, 255), "and begins in violet"


def test_figures(tmp_path):
    paths = write_figures(made(["a"] * 30, maps=True), tmp_path)
    assert [path.name for path in paths] == ["layer-01.png", "layer-03.png"]
    assert all(Image.open(path).width > 200 for path in paths)
    with pytest.raises(ValueError, match="exists already"):
        write_figures(made(["a"] * 30, maps=True), tmp_path)
    with pytest.raises(ValueError, match="no-maps"):
        write_figures(made(["a"] * 30), tmp_path / "other")


# ---- the command ----


def run(*args):
    parser = argparse.ArgumentParser()
    inspection_cli.add_arguments(parser)
    return inspection_cli.run_from_arguments(parser.parse_args([str(a) for a in args]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    small().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_command(saved, tmp_path, capsys):
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    where = ["--model", saved, "--text", tmp_path / "t.txt", "--out", tmp_path / "page.html", "--tokens", 64]
    assert run(*where, "--position", 50, "--budget", 2, "--attention-maps", tmp_path / "figures") == 0
    assert "64 tokens (the first of " in capsys.readouterr().out
    data = page_json((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert (data["position"], data["budget"], data["model"], data["text"]) == (50, 2, "tiny", "t.txt")
    assert len(data["tokens"]) == 64 < data["total"]
    assert len(data["maps"]) == 2
    assert len(list((tmp_path / "figures").iterdir())) == 2
    with pytest.raises(ValueError, match="exists already"):
        run(*where)
    assert run(*where, "--overwrite", "--no-maps") == 0
    assert not page_json((tmp_path / "page.html").read_text(encoding="utf-8"))["maps"]


@pytest.mark.parametrize(
    ("content", "args", "words"),
    [
        (None, [], "is no file"),
        (b"", [], "is empty"),
        (b"a\0b", [], "byte 1 is NUL"),
        (b"ab\xff", [], "byte 2 is 0xff"),
        (b"abc", ["--tokens", 0], "tokens: 0"),
        (b"abc", ["--position", 70000], "position: 70000"),
        (b"abc", ["--position", 60], "position: 60 lies outside"),
        (b"abc", ["--budget", -1], "budget"),
        (b"abc", ["--no-maps", "--attention-maps", "x"], "attention-maps"),
        (b"abc", ["--model", "nowhere"], "nowhere is no folder"),
    ],
)
def test_command_refuses(saved, tmp_path, content, args, words):
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        run("--model", saved, "--text", tmp_path / "t.txt", "--out", tmp_path / "p.html", *args)
    assert not (tmp_path / "p.html").exists()


def test_help_is_quick():
    code = (
        "import argparse, sys\nfrom eval import inspection_cli\np = argparse.ArgumentParser()\n"
        "inspection_cli.add_arguments(p)\np.format_help()\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
