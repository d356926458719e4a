"""Inspections of random logits, and what a page of one holds."""

import json
import re

import torch

from eval.inspection import AttentionMaps, Inspection, LayerRecord, Tokens
from lte.visibility import lifetimes

BAD = ["</script><script>document.title = 'hacked'</script>", "<img src=x onerror=\"document.title='hacked'\">",
       "<!--<script>", "&lt;b&gt;", "\u2028", "{{script}}", "a\nb"]  # fmt: skip


def made(tokens, heads=2, window=17, sinks=2, budget=5, types=("gated_deltanet", "attention") * 2, group=1, seed=0,
         maps=False, scorer=True):  # fmt: skip
    """An inspection of random logits."""
    generator = torch.Generator().manual_seed(seed)
    layers, drawn = [], []
    for layer, kind in enumerate(types):
        if kind != "attention":
            continue
        logits = torch.randn(1, len(tokens), heads, generator=generator) - 0.7 * torch.arange(heads)
        logits = logits if scorer else None
        end = lifetimes(
            logits, batch=1, length=len(tokens), heads=heads, window=window, sinks=sinks, budget=budget
        )[0]  # fmt: skip
        layers.append(LayerRecord(layer, logits[0] if scorer else None, end))
        if maps:
            weights = torch.rand(heads * group, 16, 16, generator=generator).tril()
            weights = weights / weights.sum(-1, keepdim=True)
            drawn.append(AttentionMaps(layer, weights, weights.flip(0)))
    read = Tokens(list(range(len(tokens))), list(tokens), [False] * len(tokens), len(tokens))
    return Inspection(read, list(types), heads * group, heads, window, sinks, budget, layers, 3 * maps, drawn)


def page_json(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
