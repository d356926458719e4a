"""The shipped winners of tuning: the library finds each under the key it asks with, and our sizes are all there."""

import json
import warnings
from pathlib import Path

import pytest

from models.config import load_config

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "models" / "fla_configs").glob("sm*/*.json"))
PACKED = {"torch.int32", "torch.int64"}  # dtypes of the documents' boundaries


def keys_of(path):
    return [entry["autotune_key"] for entry in json.loads(path.read_text())["autotune_entries"].values()]


@pytest.fixture(scope="module")
def library():
    pytest.importorskip("triton", reason="flash-linear-attention doesn't import without it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no GPU
        return pytest.importorskip("fla.ops.utils.cache")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_entry_is_found_by_the_key_of_a_launch(path, library):
    content = library.KernelConfigFile.from_file(path)
    assert content.kernel_name == path.stem
    assert content.autotune_entries
    for key in keys_of(path):
        found = content.lookup_exact(library.AutotuneKey(tuple(key)))
        assert found["autotune_key"] == key
        assert found["config"]["num_warps"] >= 1


@pytest.mark.parametrize("size", ["0.4b", "1.4b"])
@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda path: path.name)
def test_kernels_of_the_delta_rule_have_entries_of_our_sizes(folder, size):
    """Forward and backward, packed and not: a size left out is tuned for minutes in a first step."""
    config = load_config(ROOT / "configs" / "models" / f"lalte-{size}.json")
    heads, channels = config.gdn_num_heads, config.gdn_head_dim
    sizes = {
        "chunk_gated_delta_rule_fwd_kkt_solve_kernel": [heads, heads, channels],
        "causal_conv1d_fwd_kernel": [heads * channels],
        "causal_conv1d_bwd_kernel": [heads * channels],
    }
    state = [heads, heads, channels, int(channels * config.gdn_expand_v)]
    for kernel in (
        "chunk_bwd_kernel_dqkwg",
        "chunk_bwd_kernel_dv_local",
        "chunk_fwd_kernel_o",
        "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64",
        "chunk_gated_delta_rule_fwd_kernel_h_blockdim64",
        "prepare_wy_repr_bwd_kernel",
        "recompute_w_u_fwd_kernel",
    ):
        sizes[kernel] = state
    for kernel, begin in sizes.items():
        keys = [key for key in keys_of(folder / f"{kernel}.json") if key[: len(begin)] == begin]
        packed = {bool(PACKED & {str(part) for part in key}) for key in keys}
        assert packed == {True, False}, f"{kernel}, {size}"
