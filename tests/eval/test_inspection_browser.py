"""The page of `lalte inspect` in headless Chromium.

Shapes: T tokens, H KV heads.
"""

import re
import shutil
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from eval.inspection_page import render
from lte.visibility import visible
from tests.inspections import BAD, made, page_json

# ---- the page in Chromium ----

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--window-size=1300,1000",
]  # fmt: skip
WORDS = ["future", "sink", "window", "retained", "evicted", "lost"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("needs Chromium and its driver (Debian: chromium, chromium-driver)")
    pytest.importorskip("selenium", reason="needs selenium: pip install -e '.[browser]'")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def show(browser, tmp_path):
    """Opens an inspection; at the end nothing may stand in the console."""

    def show(inspection, **names):
        file = tmp_path / "page.html"
        file.write_text(render(inspection, **{"model": "m", "text": "t.txt", **names}), encoding="utf-8")
        browser.get(file.as_uri())
        return browser

    browser.get_log("browser")
    yield show
    assert browser.get_log("browser") == []
    names = browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert [name for name in names if not name.startswith("data:")] == []


def frame(browser):
    """Waits until what was asked for is drawn."""
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def press(browser, *keys, into=None):
    """Each key is a string, or a tuple of held keys and one more."""
    from selenium.webdriver import ActionChains

    if into is not None:
        browser.execute_script("arguments[0].focus()", into)
    chain = ActionChains(browser)
    for key in keys:
        *held, key = [key] if isinstance(key, str) else key
        for modifier in held:
            chain.key_down(modifier)
        chain.send_keys(key)
        for modifier in held:
            chain.key_up(modifier)
    chain.perform()
    frame(browser)


def slide(browser, position):
    browser.execute_script(
        "const s = document.getElementById('slider'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input', {bubbles: true}))",
        position,
    )
    frame(browser)


def kinds_shown(browser):
    names = browser.execute_script("return [...document.querySelectorAll('#text .t')].map((e) => e.className)")
    return [WORDS[int(re.search(r"\bs(\d)\b", name)[1])] for name in names]


@lru_cache
def mask_of(inspection, layer):
    """The rule by its definition, not from lifetimes [H, T, T]."""
    record = inspection.layers[layer]
    length, heads = record.end_TH.shape
    rule = {"window": inspection.window, "sinks": inspection.sinks, "budget": inspection.budget}
    return visible(record.logits_TH[None], batch=1, length=length, heads=heads, **rule)[0]


def kinds_expected(inspection, layer, head, position):
    mask_HTT = mask_of(inspection, layer)
    kinds = []
    for j in range(mask_HTT.shape[1]):
        since = position - j
        was = since >= 0 and bool(mask_HTT[head, j:, j].sum() > inspection.window)
        if since < 0:
            kinds.append("future")
        elif j < inspection.sinks:
            kinds.append("sink")
        elif since < inspection.window:
            kinds.append("window")
        elif mask_HTT[head, position, j]:
            kinds.append("retained")
        else:
            kinds.append("lost" if was else "evicted")
    return kinds


def value(browser, name="slider"):
    return int(browser.execute_script("return document.getElementById(arguments[0]).value", name))


def pressed(browser, group):
    return browser.execute_script(
        "return [...document.querySelectorAll(`#${arguments[0]} button`)].findIndex("
        "(b) => b.getAttribute('aria-pressed') === 'true')",
        group,
    )


@pytest.fixture(scope="module")
def sample():
    return made([f" w{n}" for n in range(150)], heads=3, group=2, maps=True)


def test_page_shows_the_rule(show, sample):
    browser = show(sample, position=120)
    assert value(browser) == value(browser, "number") == 120
    assert kinds_shown(browser) == kinds_expected(sample, 0, 0, 120)
    seen = set()
    for layer, head, position in [(0, 0, 149), (0, 2, 60), (1, 2, 140), (1, 1, 0), (0, 1, 17)]:
        browser.execute_script(
            "document.querySelectorAll('#layers button')[arguments[0]].click();"
            "document.querySelectorAll('#heads button')[arguments[1]].click()", layer, head,
        )  # fmt: skip
        slide(browser, position)
        expected = kinds_expected(sample, layer, head, position)
        assert kinds_shown(browser) == expected
        seen |= set(expected)
        legend = browser.execute_script(
            "return [...document.querySelectorAll('#legend li')].map((e) => e.textContent)"
        )
        counts = {re.sub(r"^abc| \d+$", "", text): int(text.split()[-1]) for text in legend}
        names = dict(
            zip(WORDS, ["not read yet", "sink", "window", "retained", "evicted", "evicted later"], strict=True)
        )
        assert counts == {name: expected.count(word) for word, name in names.items()}
        bars = browser.execute_script("return [...document.querySelectorAll('#bars button')].map((e) => e.ariaLabel)")
        held = [kinds_expected(sample, n, h, position).count("retained") for n in (0, 1) for h in range(3)]
        assert [int(re.search(r"(\d+) retained", label)[1]) for label in bars] == held
    assert seen == set(WORDS)
    assert browser.execute_script("return document.querySelector('#text .here').textContent") == " w17"


def test_layers_of_other_kinds_are_listed(show, sample):
    browser = show(sample)
    names = browser.execute_script(
        "return [...document.querySelectorAll('#layers > *')].map((e) => [e.localName, e.textContent])"
    )
    assert names == [["span", "0 GDN"], ["button", "1 attention"], ["span", "2 GDN"], ["button", "3 attention"]]


def test_keyboard(show, sample):
    from selenium.webdriver.common.keys import Keys

    browser = show(sample, position=100)
    press(browser, Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_RIGHT)
    assert value(browser) == 99
    assert kinds_shown(browser) == kinds_expected(sample, 0, 0, 99)
    moves = [("]", 1, 0), ("l", 2, 0), ("l", 0, 0), ("h", 2, 0), ("[", 1, 0), ("j", 1, 1), ("j", 1, 0), ("k", 1, 1)]
    for key, head, layer in moves:
        press(browser, key)
        assert (pressed(browser, "heads"), pressed(browser, "layers")) == (head, layer), key
        assert kinds_shown(browser) == kinds_expected(sample, layer, head, 99)
    slider = browser.find_element("id", "slider")
    press(browser, Keys.HOME, into=slider)
    assert value(browser) == 0
    press(browser, Keys.ARROW_LEFT)
    assert value(browser) == 0
    press(browser, Keys.END, (Keys.SHIFT, Keys.ARROW_LEFT))
    assert value(browser) == 147
    press(browser, (Keys.CONTROL, "a"), "64", into=browser.find_element("id", "number"))
    assert value(browser) == 64
    press(browser, Keys.ARROW_UP)
    assert value(browser) == 65
    retained = [j for j, kind in enumerate(kinds_expected(sample, 1, 1, 65)) if kind == "retained"]
    browser.execute_script("document.activeElement.blur()")
    for key, j in (("n", retained[0]), ("n", retained[1]), ("p", retained[0]), ("p", retained[-1])):
        press(browser, key)
        assert browser.execute_script("return document.querySelector('#token dd').textContent") == str(j)
        assert browser.execute_script("return document.querySelector('#text .shown').textContent") == f" w{j}"


def test_focus_is_visible_and_everything_has_a_name(show, sample):
    from selenium.webdriver.common.keys import Keys

    browser = show(sample)
    stops = []
    for _ in range(8):
        press(browser, Keys.TAB)
        stops.append(browser.execute_script(
            "const e = document.activeElement; return [e.id || e.parentNode.id, getComputedStyle(e).outlineStyle,"
            "getComputedStyle(e).outlineWidth]"
        ))  # fmt: skip
    assert [name for name, *_ in stops[:5]] == ["layers", "heads", "slider", "number", "text"]
    assert all(style == "solid" and width == "3px" for _, style, width in stops[:5])
    nameless = browser.execute_script(
        "const all = 'button, input, [role=img], [role=group], [role=region], svg, img';"
        "return [...document.querySelectorAll(all)].filter("
        "(e) => !(e.ariaLabel || e.getAttribute('aria-labelledby') || e.alt || e.textContent.trim() ||"
        "e.labels?.length || e.closest('button')?.ariaLabel)).map((e) => e.outerHTML)"
    )
    assert nameless == []


def test_hover_and_click(show, sample):
    from selenium.webdriver import ActionChains

    browser = show(sample, position=140)
    span = browser.find_elements("css selector", "#text .t")[31]
    ActionChains(browser).move_to_element(span).perform()
    tip = browser.find_element("id", "tip")
    logit = float(sample.layers[0].logits_TH[31, 0])
    assert tip.is_displayed()
    assert "token: 31" in tip.text
    assert f"{1 / (1 + np.exp(-logit)):.3f} (logit {logit:.3f})" in tip.text
    kind = kinds_expected(sample, 0, 0, 140)[31]
    assert f"at the position: {'evicted later' if kind == 'lost' else kind}" in tip.text
    span.click()
    frame(browser)
    assert value(browser) == 31
    ActionChains(browser).move_to_element(browser.find_element("tag name", "h1")).perform()
    assert not tip.is_displayed()
    assert browser.execute_script("return document.querySelector('#token dd').textContent") == "31"


def test_charts_and_maps_follow_the_choice(show, sample):
    browser = show(sample)
    state = (
        "const all = document.querySelectorAll('#maps-large figure > .plot img');"
        "return [document.querySelector('#history .one').getAttribute('d'), [...all].map((e) => e.src),"
        "document.querySelector('#history svg').ariaLabel, document.getElementById('strip').toDataURL()]"
    )
    frame(browser)
    first = browser.execute_script(state)
    press(browser, "l")
    second = browser.execute_script(state)
    for before, after in zip(first, second, strict=True):
        assert before != after
    # query heads 2 and 3 belong to KV head 1
    maps = page_json(render(sample, model="m", text="t"))["maps"][0]
    assert second[1] == [maps["pieces"][2], maps["text"][2]]
    images = browser.execute_script(
        "return [...document.querySelectorAll('#maps img')].map((e) => [e.complete, e.naturalWidth])"
    )
    assert len(images) == 2 * 2 + 2 * 6, "two large ones and their scales, and one a layer and query head"
    assert all(width >= 16 for complete, width in images if complete)
    browser.execute_script("document.querySelectorAll('#maps-small button')[9].click()")
    frame(browser)
    assert (pressed(browser, "layers"), pressed(browser, "heads")) == (1, 1)
    assert "layer 3, query head 3" in browser.find_element("css selector", "#maps-large figcaption").text
    slide(browser, 70)
    held = kinds_expected(sample, 1, 1, 70).count("retained")
    assert f"layer 3, KV head 1: {held} retained" in browser.execute_script(
        "return document.querySelector('#bars [aria-pressed=true]').ariaLabel"
    )


def test_untrusted_text_in_the_browser(show):
    browser = show(made(BAD * 5), model="<i>m</i>", text="<b>t</b>", position=6)
    texts = browser.execute_script("return [...document.querySelectorAll('#text .t')].map((e) => e.textContent)")
    assert texts == BAD * 5
    assert "hacked" not in browser.title
    for j in range(len(BAD)):
        slide(browser, j)
    assert browser.execute_script("return document.querySelectorAll('#text img, #about b, #token img').length") == 0
    assert "<i>m</i> read 35 tokens of <b>t</b>" in browser.find_element("id", "about").text


@pytest.mark.parametrize("window", [17, None])
def test_models_without_a_scorer(show, window):
    found = made(["a"] * 60, window=window, budget=0, scorer=False, types=("nsa", "attention"))
    browser = show(found)
    frame(browser)
    shown = kinds_shown(browser)
    assert shown.count("retained") == 0
    assert shown.count("window") == (17 if window else 58)
    assert "none: the layer has no scorer" in browser.find_element("id", "token").text
    assert "NSA" in browser.find_element("id", "about").text


def test_tokens_that_a_policy_retained(show):
    found = made(["a"] * 60)
    layers = [replace(layer, logits_TH=None) for layer in found.layers]
    browser = show(replace(found, layers=layers, policy="h2o"))
    frame(browser)
    kept = (found.layers[0].end_TH[2 : 60 - 17, 0] == 60).sum()
    assert kinds_shown(browser).count("retained") == kept > 0
    assert "5 retained tokens per head, chosen by h2o" in browser.find_element("id", "about").text
    assert "slots, given by h2o" in browser.find_element("id", "meanings").text
    assert "the budget 5" in browser.find_element("id", "bars").text


def test_dark_and_light(show, sample):
    browser = show(sample)
    colours = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        frame(browser)
        colours.append(browser.execute_script(
            "return [getComputedStyle(document.body).backgroundColor, document.getElementById('strip').toDataURL()]"
        ))  # fmt: skip
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert colours[0][0] == "rgb(255, 255, 255)"
    assert colours[1][0] == "rgb(20, 23, 26)"
    assert colours[0][1] != colours[1][1], "the drawing changes its colours too"


def test_eight_thousand_tokens_stay_fluid(show):
    """From the slider to the picture: less than 50 ms of the page's thread, for steps and for jumps."""
    words = ["the", "of", "and", "retention", "window", "a", "sink", "token", "memory", "state"]
    found = made([f" {words[n * n % 10]}" for n in range(8192)], heads=8, window=768, sinks=4, budget=512)
    browser = show(found, position=4000)
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    used = lambda: {m["name"]: m["value"] for m in browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]}
    for place in ("3000 + n", "(n * 3571) % 8192"):
        before = used()["TaskDuration"]
        browser.execute_async_script(
            "const done = arguments[0], slider = document.getElementById('slider'); let n = 0;"
            "const step = () => { if (++n > 30) return done();"
            f"slider.value = {place}; slider.dispatchEvent(new Event('input', {{bubbles: true}}));"
            "requestAnimationFrame(() => setTimeout(step, 20)) }; step()"
        )
        each = (used()["TaskDuration"] - before) / 30
        assert each < 0.05, f"{place}: {1000 * each:.0f} ms"
    browser.execute_cdp_cmd("Performance.disable", {})
    assert value(browser) == 30 * 3571 % 8192
