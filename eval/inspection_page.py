"""The page of `lalte inspect`: one file that needs no network, and the attention maps as pictures.

The page holds two numbers a token and head, the logit and the end of the token's life; it works out what was visible
at a position by itself.

Shapes: T tokens, N query heads, H KV heads, R rows and columns of a map.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .inspection import PIECE_TOKENS, AttentionMaps, Inspection, LayerRecord
from .results import write_bytes

# attention weights from here to 1 are told apart: of single keys, and of the stretches of a long text
LEAST_WEIGHT = {"pieces": 5e-3, "text": 1e-4}
COLOURS = "viridis"  # even in lightness, and readable without seeing red or green


# ---- pictures ----


def shades(weights_RR: Tensor, least: float) -> np.ndarray:
    """Palette entries 0 … 254 for weights from `least` to 1, evenly in their logarithm; 255: no weight at all."""
    weights = weights_RR.double().numpy()
    with np.errstate(divide="ignore"):
        level = 1 - np.log(weights) / np.log(least)
    return np.where(weights > 0, np.clip(np.round(254 * level), 0, 254), 255).astype(np.uint8)


def _palette() -> list[int]:
    from matplotlib import colormaps

    colours = colormaps[COLOURS](np.linspace(0, 1, 255), bytes=True)[:, :3]
    return [*colours.flatten().tolist(), 255, 255, 255]


def png_uri(shades_RR: np.ndarray) -> str:
    """A data URI of a PNG with one pixel a cell; shade 255 is transparent."""
    from PIL import Image

    image = Image.fromarray(shades_RR)
    image.putpalette(_palette())
    data = io.BytesIO()
    image.save(data, format="PNG", transparency=255, optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def write_figures(inspection: Inspection, folder: str | Path, *, overwrite: bool = False) -> list[Path]:
    """Draws the attention maps of each layer as layer-NN.png: above, short pieces; below, the whole text.

    Raises:
        ValueError: a file exists and `overwrite` is off, or the inspection has no maps.
    """
    if not inspection.maps:
        raise ValueError("attention-maps: none were made; leave --no-maps out")
    paths = []
    for maps in inspection.maps:
        paths.append(Path(folder) / f"layer-{maps.layer:02d}.png")
        write_bytes(paths[-1], _figure(inspection, maps), overwrite=overwrite)
    return paths


def _figure(inspection: Inspection, maps: AttentionMaps) -> bytes:
    # a Figure of its own with Agg: no window system, and none of pyplot's global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    heads, length = inspection.query_heads, len(inspection.tokens.ids)
    figure = Figure(figsize=(1.6 + 1.7 * heads, 4.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(2, heads, squeeze=False)
    lines = (("pieces", maps.pieces_NRR, maps.pieces_NRR.shape[-1]), ("text", maps.text_NRR, length))
    for (kind, maps_NRR, size), line in zip(lines, axes, strict=True):
        least = LEAST_WEIGHT[kind]
        for head, place in enumerate(line):
            weights = maps_NRR[head].numpy()
            image = place.imshow(
                np.where(weights > 0, weights.clip(least, 1), np.nan),
                cmap=COLOURS,
                norm=LogNorm(least, 1),
                extent=(0, size, size, 0),
                interpolation="nearest",
            )
            place.set_title(f"head {head}", fontsize=9)
        figure.colorbar(image, ax=line, label="attention weight")
    axes[0, 0].set_ylabel(f"mean of {inspection.pieces} pieces\nquery")
    axes[1, 0].set_ylabel("the whole text\nquery")
    axes[1, 0].set_xlabel("key")
    figure.suptitle(f"Attention weights of layer {maps.layer}", fontsize=11)
    data = io.BytesIO()
    canvas.print_png(data)
    return data.getvalue()


# ---- the page ----


def _base64(values_TH: Tensor, kind: str) -> str:
    """Little-endian numbers, head after head."""
    return base64.b64encode(np.ascontiguousarray(values_TH.numpy().T.astype(kind)).tobytes()).decode()


def _layer(record: LayerRecord) -> dict[str, Any]:
    return {
        "layer": record.layer,
        "logits": None if record.logits_TH is None else _base64(record.logits_TH, "<f4"),
        "ends": _base64(record.end_TH, "<i4"),
    }


def _maps(maps: AttentionMaps) -> dict[str, Any]:
    kinds = {"pieces": maps.pieces_NRR, "text": maps.text_NRR}
    pictures = {k: [png_uri(shades(each, LEAST_WEIGHT[k])) for each in maps_NRR] for k, maps_NRR in kinds.items()}
    return {"layer": maps.layer, **pictures}


def page_data(inspection: Inspection, *, model: str, text: str, position: int) -> dict[str, Any]:
    """What the page's script reads."""
    tokens = inspection.tokens
    scale = np.arange(255, dtype=np.uint8)[None].repeat(8, 0)
    return {
        "model": model,
        "text": text,
        "position": position,
        "tokens": tokens.texts,
        "special": [i for i, added in enumerate(tokens.special) if added],
        "total": tokens.total,
        "layer_types": inspection.layer_types,
        "heads": inspection.heads,
        "query_heads": inspection.query_heads,
        "window": inspection.window,
        "sinks": inspection.sinks,
        "budget": inspection.budget,
        "policy": inspection.policy,
        "layers": [_layer(record) for record in inspection.layers],
        "pieces": inspection.pieces,
        "piece_tokens": inspection.maps[0].pieces_NRR.shape[-1] if inspection.maps else PIECE_TOKENS,
        "map_cells": inspection.maps[0].text_NRR.shape[-1] if inspection.maps else 0,
        "maps": [_maps(each) for each in inspection.maps],
        "least_weights": LEAST_WEIGHT,
        "scale": png_uri(scale) if inspection.maps else None,
    }


def script_json(data: Any) -> str:
    """JSON that can stand in a <script> element: none of its characters can end the element or open another."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def check_position(position: int | None, length: int) -> None:
    """Raises ValueError for a position outside a text of `length` tokens; None stands for the last."""
    if position is not None and not 0 <= position < length:
        raise ValueError(f"position: {position} lies outside the text of {length} tokens; use 0 to {length - 1}")


def render(inspection: Inspection, *, model: str, text: str, position: int | None = None) -> str:
    """The page as HTML.

    Nothing of the text, of names or of tokens stands in it as markup, and its policy lets no other script run and
    nothing be fetched.

    Args:
        model, text: how the page names the model and the text.
        position: the position shown first, from 0; None: the last.

    Raises:
        ValueError: the position lies outside the text.
    """
    length = len(inspection.tokens.ids)
    check_position(position, length)
    folder = files(__package__)
    read = lambda name: (folder / name).read_text(encoding="utf-8")
    parts = {name: read(f"inspection.{name}") for name in ("html", "css")}
    parts["js"] = read("inspection.js") + read("inspection_charts.js")
    data = page_data(inspection, model=model, text=text, position=length - 1 if position is None else position)
    slots = {
        "title": html.escape(f"{text}: what {model} kept"),
        "policy": f"default-src 'none'; img-src data:; style-src {_digest(parts['css'])}; "
        f"script-src {_digest(parts['js'])}; base-uri 'none'; form-action 'none'",
        "style": parts["css"],
        "data": script_json(data),
        "script": parts["js"],
    }
    pieces = parts["html"].split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, rest = piece.split("}}", 1)
        filled += [slots[name], rest]
    return "".join(filled)


def _digest(source: str) -> str:
    """An inline element's name in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
