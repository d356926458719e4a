"""The invariants of whole models: one function in three ways, independent rows, independent documents; and training.

Shapes: B rows, T tokens, V vocabulary.
"""

import math
import warnings
from itertools import pairwise

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import DataCollatorWithFlattening, DynamicCache, Trainer, TrainingArguments

import lalte
from lte import sparsity
from lte.layout import Layout
from models import HybridForCausalLM
from models.attention import RetainedAttention
from models.losses import shift_labels
from models.ops import IGNORE
from tests.op_modes import NoReading
from tests.tiny_models import (
    VARIANTS,
    assert_close,
    make_config,
    make_ids,
    make_model,
    make_variant,
    random_split,
    run_in_pieces,
)

DOCUMENTS = (1, 2, 7, 300)
LENGTH = 200


def left_padded(texts, width=None):
    """ids [B, T] with random tokens for padding, and the mask."""
    width = width or max(t.shape[1] for t in texts)
    ids = make_ids(len(texts), width, seed=99)
    mask = torch.zeros(len(texts), width, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, width - text.shape[1] :] = text[0]
        mask[row, width - text.shape[1] :] = 1
    return ids, mask


def packed(texts):
    lengths = torch.tensor([0, *(t.shape[1] for t in texts)])
    return torch.cat(texts, 1), lengths.cumsum(0).to(torch.int32)


# ---- one function, three ways ----


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_parallel_is_chunked_is_token_by_token(variant):
    model, ids = make_variant(variant), make_ids(2, LENGTH)
    expected = model(ids).logits
    for seed in range(2):
        assert_close(run_in_pieces(model, ids, random_split(LENGTH, seed)), expected)
    assert_close(run_in_pieces(model, ids, [1] * LENGTH), expected)
    assert_close(model(ids, use_cache=True).logits, expected)  # chunks of config.prefill_chunk


@torch.no_grad()
def test_budget_overflows_and_matters():
    """The sizes above test something: budgets overflow, and another budget gives other logits."""
    model, ids = make_model(), make_ids(2, LENGTH)
    cache = model.new_cache(2)
    run_in_pieces(model, ids, [50] * 4, cache)
    kv = cache.states[1].kv
    assert (kv.positions[:, :, 2:5] >= 2).all()
    mixer, hidden = model.model.layers[1].mixer, torch.randn(1, 50, 36)
    shape = (1, 50, 2, 12)
    logits = mixer.scorer(
        torch.cat([mixer.k_proj(hidden).view(shape), mixer.v_proj(hidden).view(shape)], -1), Layout()
    )
    assert 0.2 < (logits > 0).float().mean() < 0.8
    other = make_model(budget=50)
    other.load_state_dict(model.state_dict())
    assert (other(ids).logits - model(ids).logits).abs().max() > 0.01


@torch.no_grad()
def test_ties_among_logits():
    """With equal logits the earliest tokens stay, in every way of running."""
    model, ids = make_model(), make_ids(2, 120)
    for layer in (1, 3):
        scorer = model.model.layers[layer].mixer.scorer
        scorer.out_weight.zero_()
        scorer.out_bias.fill_(0.25)
    expected = model(ids).logits
    cache = model.new_cache(2)
    assert_close(run_in_pieces(model, ids, random_split(120, 3), cache), expected)
    assert cache.states[1].kv.positions[:, :, 2:5].sort().values.tolist() == [[[2, 3, 4]] * 2] * 2
    assert_close(run_in_pieces(model, ids, [1] * 120), expected)


@pytest.mark.parametrize("prompt", [1, 2, 5, 16, 170])
@pytest.mark.parametrize("variant", ["lalte", "gdn-full", "lalte, rope_in_cache"])
@torch.no_grad()
def test_short_and_long_prompts(variant, prompt):
    """Shorter than sinks and lookahead, one short of the window, and longer than all slots; then token by token."""
    model, ids = make_variant(variant), make_ids(1, prompt + 23)
    assert_close(run_in_pieces(model, ids, [prompt] + [1] * 23), model(ids).logits)


@torch.no_grad()
def test_embeddings_in_place_of_ids():
    model, ids = make_model(), make_ids(2, 45)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)
    assert_close(model(inputs_embeds=embedded, use_cache=True).logits, model(ids).logits)


@torch.no_grad()
def test_bfloat16_ways_agree():
    model, ids = make_model().bfloat16(), make_ids(1, 60)
    assert_close(run_in_pieces(model, ids, [20, 1, 39]), model(ids).logits, 5e-2)


# ---- rows ----


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_rows_do_not_depend_on_padding(variant):
    """Left-padded rows of mixed lengths, then a second turn of mixed lengths, against each text alone."""
    model = make_variant(variant)
    first = [make_ids(1, n, seed=n) for n in (1, 5, 37, 90)]
    second = [make_ids(1, n, seed=100 + n) for n in (30, 44, 1, 3)]
    texts = [torch.cat(pair, 1) for pair in zip(first, second, strict=True)]
    alone = [model(text).logits[0] for text in texts]
    ids, mask = left_padded(first)
    cache = model.new_cache(4)
    cached, parallel = model(ids, mask, past_key_values=cache).logits, model(ids, mask).logits
    ids2, mask2 = left_padded(second)
    turn = model(ids2, torch.cat([mask, mask2], 1), past_key_values=cache).logits
    for row, (a, b) in enumerate(zip(first, second, strict=True)):
        length, more = a.shape[1], b.shape[1]
        assert_close(parallel[row, -length:], alone[row][:length])
        assert_close(cached[row, -length:], alone[row][:length])
        assert_close(turn[row, -more:], alone[row][length:])


@pytest.mark.parametrize("variant", ["lalte", "gdn", "transformer"])
@torch.no_grad()
def test_batch_of_one_with_padding(variant):
    model, text = make_variant(variant), make_ids(1, 41)
    ids, mask = left_padded([text], 60)
    expected = model(text).logits
    assert_close(model(ids, mask).logits[:, -41:], expected)
    assert_close(model(ids, mask, use_cache=True).logits[:, -41:], expected)


@torch.no_grad()
def test_decoding_after_padding():
    model = make_model()
    texts = [make_ids(1, n, seed=n) for n in (3, 50)]
    ids, mask = left_padded(texts)
    cache = model.new_cache(2)
    model(ids, mask, past_key_values=cache)
    tail = make_ids(2, 30, seed=7)
    actual = run_in_pieces(model, tail, [1] * 30, cache)
    for row, text in enumerate(texts):
        full = torch.cat([text, tail[row : row + 1]], 1)
        assert_close(actual[row], model(full).logits[0, text.shape[1] :])


@torch.no_grad()
def test_logits_to_keep():
    model, ids = make_model(), make_ids(2, 80)
    expected = model(ids).logits
    for keep in (1, 3, 40, 80):
        assert_close(model(ids, logits_to_keep=keep).logits, expected[:, -keep:])
        assert_close(model(ids, use_cache=True, logits_to_keep=keep).logits, expected[:, -keep:])
    columns = torch.tensor([2, 7, 3])
    for use_cache in (False, True):
        assert_close(model(ids, use_cache=use_cache, logits_to_keep=columns).logits, expected[:, columns])
    assert model(ids, labels=ids, logits_to_keep=columns).logits.shape == expected.shape


@torch.no_grad()
def test_hidden_states():
    model = make_model()
    ids, mask = left_padded([make_ids(1, 50), make_ids(1, 9)])
    parallel = model(ids, mask, output_hidden_states=True).hidden_states
    cached = model(ids, mask, output_hidden_states=True, use_cache=True).hidden_states
    last = model(ids, mask, output_hidden_states=True, use_cache=True, logits_to_keep=3)
    assert len(parallel) == len(cached) == model.config.num_hidden_layers + 1
    for a, b, c in zip(parallel, cached, last.hidden_states, strict=True):
        assert_close(b[0], a[0])
        assert_close(b[1, -9:], a[1, -9:])
        assert torch.equal(c, b), "of all columns, however many have logits"
    assert_close(last.logits, model(ids, mask).logits[:, -3:])


@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_the_config_says_what_is_returned(use_cache):
    """As in transformers: what a call doesn't say is taken from the config."""
    model, ids = make_model(), make_ids(1, 9)
    model.config.output_hidden_states = True
    for part in (model, model.model):
        assert len(part(ids, use_cache=use_cache).hidden_states) == model.config.num_hidden_layers + 1
        assert part(ids, use_cache=use_cache, output_hidden_states=False).hidden_states is None
    model.config.output_hidden_states = False
    model.config.return_dict = False
    for part in (model, model.model):
        expected = part(ids, use_cache=use_cache, return_dict=True)[0]
        assert torch.equal(part(ids, use_cache=use_cache)[0], expected)
        assert isinstance(part(ids, use_cache=use_cache), tuple)
    model.config.return_dict, model.config.output_attentions = True, True
    with pytest.raises(ValueError, match="output_attentions=True: attention weights are never formed"):
        model(ids)


# ---- documents ----


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_packed_documents_are_independent(variant):
    model = make_variant(variant)
    texts = [make_ids(1, n, seed=n) for n in DOCUMENTS]
    row, cu_seqlens = packed(texts)
    actual = model(row, cu_seqlens=cu_seqlens).logits[0].split(DOCUMENTS)
    for text, logits in zip(texts, actual, strict=True):
        assert_close(logits, model(text).logits[0])


@pytest.mark.parametrize("variant", ["lalte", "gdn", "lalte, one scorer"])
def test_loss_and_gradients_of_packed_documents(variant):
    """The packed loss is the mean over all predicted tokens of the documents alone, and so are its gradients."""
    model = make_variant(variant)
    texts = [make_ids(1, n, seed=n) for n in (1, 2, 7, 60)]
    row, cu_seqlens = packed(texts)
    output = model(row, labels=row, cu_seqlens=cu_seqlens)
    output.loss.backward()
    actual = [p.grad for p in model.parameters()]
    model.zero_grad()
    items = sum(t.shape[1] - 1 for t in texts)
    loss = sum(model(t, labels=t, num_items_in_batch=items).loss for t in texts[1:])
    loss.backward()
    assert_close(output.loss[None], loss[None])
    for grad, parameter in zip(actual, model.parameters(), strict=True):
        assert_close(grad, parameter.grad, 1e-4)


def test_loss_ignores_padding_and_labels():
    model = make_model()
    texts = [make_ids(1, n, seed=n) for n in (5, 33)]
    ids, mask = left_padded(texts)
    labels = ids.clone()
    labels[1, 10:20] = IGNORE
    expected = 0.0
    for row, text in enumerate(texts):
        logits = model(text).logits[0, :-1]
        targets = labels[row, -text.shape[1] + 1 :]
        expected += torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    assert_close(model(ids, mask, labels=labels).loss[None], (expected / (4 + 32 - 10))[None])


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)])
def test_a_step_that_predicts_nothing_has_no_loss(items):
    """All labels of an optimizer step masked: the weights stay finite."""
    model, ids = make_model().train(), make_ids(2, 30)
    output = model(ids, labels=torch.full_like(ids, IGNORE), num_items_in_batch=items)
    output.loss.backward()
    assert output.lm_loss == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# ---- arguments ----


def test_arguments_that_do_not_fit():
    model, ids = make_model(), make_ids(2, 9)
    one = make_ids(1, 9)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"\(2, 0\) holds no tokens"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match=r"past_key_values has 3 rows, the input 2"):
        model(ids, past_key_values=model.new_cache(3))
    for layers in (2, 6):
        other = make_model(layer_types=["gated_deltanet", "attention"] * (layers // 2)).new_cache(2)
        with pytest.raises(ValueError, match=f"past_key_values has {layers} layers, the model 4"):
            model(ids, past_key_values=other)
    with pytest.raises(ValueError, match=r"past_key_values is a DynamicCache, .* use model\.new_cache\(batch\)"):
        model(ids, past_key_values=DynamicCache(), attention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match="output_attentions=True: attention weights are never formed"):
        model.generate(ids, max_new_tokens=1, output_attentions=True, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="attention_mask is zero everywhere: give at least one token"):
        model(ids, attention_mask=torch.zeros_like(ids))
    with pytest.raises(ValueError, match=r"attention_mask \(2, 8\) must be \[2, 9\]"):
        model(ids, attention_mask=torch.ones(2, 8))
    with pytest.raises(ValueError, match="without past_key_values"):
        model(one, cu_seqlens=bounds, use_cache=True)
    with pytest.raises(ValueError, match="have no padding"):
        model(one, cu_seqlens=bounds, attention_mask=torch.tensor([[0] + [1] * 8]))
    with pytest.raises(ValueError, match=r"rise from 0 to the row's length 9, got 0 … 8"):
        model(one, cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="batch has 2 rows"):
        model(ids, cu_seqlens=bounds)
    with pytest.raises(ValueError, match="cu_seqlens is a list: give an integer tensor"):
        model(one, cu_seqlens=[0, 4, 9])
    with pytest.raises(ValueError, match=r"attention_mask is a list: give a tensor \[2, 9\]"):
        model(ids, attention_mask=[[1] * 9] * 2)
    for inputs, shape in ((ids[0], r"\(9,\) in torch.int64"), (ids.float(), r"\(2, 9\) in torch.float32")):
        with pytest.raises(ValueError, match=rf"input_ids {shape} must be \[B, T\] of integers"):
            model(inputs)
    with pytest.raises(ValueError, match=r"inputs_embeds \(2, 9\) in torch.int64 must be \[B, T, C\] of floating"):
        model(inputs_embeds=ids)
    for labels in (ids[:, 1:], ids.float()):
        with pytest.raises(ValueError, match=r"^labels .* must be the ids themselves, \(2, 9\) in int64; the shift"):
            model(ids, labels=labels)
    assert_close(model(ids, labels=ids.int()).loss[None], model(ids, labels=ids).loss[None])
    with pytest.raises(ValueError, match=r"position_ids \(9,\) must be \[B, T\], a number for each token"):
        model(one, position_ids=torch.arange(9))
    for name in ("cu_seq_lens_q", "seq_idx"):
        with pytest.raises(ValueError, match=f"{name} packs whole documents: use it without past_key_values"):
            model(one, past_key_values=model.new_cache(1), **{name: bounds})
    for rows in (0, "2", True):
        with pytest.raises(ValueError, match=f"batch={rows!r} must be a whole number of at least 1 row"):
            model.new_cache(rows)
    with pytest.raises(ValueError, match="logits_to_keep=-2: give how many of the last columns"):
        model(ids, logits_to_keep=-2)


@pytest.mark.parametrize("model", [make_model(), make_model().model], ids=["for causal LM", "base"])
def test_misspelt_arguments_are_not_passed_over(model):
    """A packed row would be read as one document; what other models have, and transformers passes on, is let be."""
    ids, bounds = make_ids(1, 9), torch.tensor([0, 4, 9], dtype=torch.int32)
    for name, meant in (("cu_seqlen", "cu_seqlens"), ("attention_masks", "attention_mask"), ("seq_id", "seq_idx")):
        with pytest.raises(ValueError, match=rf"^{name}: the model has no such argument; is {meant} meant\?$"):
            model(ids, **{name: bounds})
    model(ids, token_type_ids=torch.zeros_like(ids), tokenizer="any", max_length_q=5, cu_seqlen=None)


def test_outputs_begin_as_those_of_transformers():
    """Code that takes them by their place gets what it wants."""
    model, ids = make_model(), make_ids(2, 9)
    expected = model(ids, labels=ids)
    loss, logits = model(ids, labels=ids, return_dict=False)[:2]
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)
    logits, cache = model(ids, use_cache=True, return_dict=False)[:2]
    assert_close(logits, expected.logits)
    assert cache.columns == 9
    assert_close(model(ids)[0], expected.logits)


def test_norms_are_called():
    """Hooks see them, and what replaces them need not be a norm of this project."""
    model, ids, seen = make_model(), make_ids(2, 9), []
    expected = model(ids).logits
    block = model.model.layers[1]
    for norm in (block.mixer_norm, block.mlp_norm):
        norm.register_forward_hook(lambda module, *_: seen.append(module))
    assert_close(model(ids).logits, expected)
    assert seen == [block.mixer_norm, block.mlp_norm]


# ---- training ----


def trainable(**changes):
    return make_model("lalte", initializer_range=0.05, **changes).train()


def test_loss_falls_and_the_penalty_is_steered():
    """A plain loop, on texts of a short period."""
    model = trainable(penalty_interval=4, penalty_min=1e-3)
    optimizer = torch.optim.AdamW(model.parameter_groups(weight_decay=0.1, lr=5e-3))
    ids = make_ids(2, 10).repeat(1, 6)
    losses = []
    for _ in range(12):
        output = model(ids, labels=ids)
        assert torch.isfinite(output.loss)
        assert_close(output.loss[None], (output.lm_loss + output.aux_loss)[None])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        model.update_retention_penalty()
        losses.append(output.lm_loss.item())
    assert losses[-1] < 0.8 * losses[0]
    control = model.penalty_control
    assert int(control.steps) == 12
    assert (control.density >= 0).all()
    raised = control.density > model.config.target_density
    assert raised.any(), "the target density 3 / 183 is tiny, so something lies above it"
    assert (control.penalty_weight[raised] > 0).any()
    report = model.retention_report()
    assert math.isclose(report["kept_density"], float(control.density.mean()), rel_tol=1e-6)
    assert report["lambda_max"] == float(control.penalty_weight.max())


@pytest.mark.parametrize("keep_all_steps", [0, 3])
def test_a_loop_that_never_steers_the_penalty_is_told_so(keep_all_steps, monkeypatch):
    monkeypatch.setattr(sparsity, "FORGOTTEN", 3)
    model, ids = trainable(keep_all_steps=keep_all_steps), make_ids(1, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):  # two passes a step
            model(ids), model(ids)
            model.update_retention_penalty()
        model(ids), model(ids)
        with torch.no_grad():
            model(ids)
        model.eval()(ids)
    with pytest.warns(UserWarning, match="3 training passes .* call model.update_retention_penalty()"):
        model.train()(ids)


def test_every_parameter_is_trained():
    model = trainable()
    ids = make_ids(2, 60)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_penalty_is_the_weighted_mean_excess():
    model = trainable()
    model.penalty_control.penalty_weight.copy_(torch.tensor([[0.5, 0.0], [0.25, 2.0]]))
    seen = []
    for layer in (1, 3):
        model.model.layers[layer].mixer.scorer.register_forward_hook(lambda _, __, out: seen.append(out))
    ids = make_ids(2, 40)
    output = model(ids, labels=ids)
    excess_LH = torch.stack([(x.sigmoid() - 0.5).clamp(min=0).mean((0, 1)) for x in seen])
    expected = (model.penalty_control.penalty_weight * excess_LH).sum()
    assert_close(output.aux_loss[None], expected[None])
    model.eval()
    assert model(ids, labels=ids).loss == model(ids, labels=ids).lm_loss


@pytest.mark.parametrize("variant", ["lalte", "lalte, one scorer", "gdn", "lalte, rope_in_cache"])
def test_gradient_checkpointing_changes_nothing(variant):
    family, changes = VARIANTS[variant]
    ids = make_ids(2, 50)
    grads, counts = [], []
    for checkpointing in (False, True):
        model = make_model(family, scorer_dropout=0.1, **changes).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters()])
        if model.penalty_control is not None:
            counts.append(model.penalty_control.counts.clone())
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert all(torch.equal(counts[0], other) for other in counts)


def test_checkpointing_that_would_lose_the_penalty_is_refused():
    with pytest.raises(ValueError, match="use_reentrant=True"):
        make_model().gradient_checkpointing_enable({"use_reentrant": True})
    make_model("gdn").gradient_checkpointing_enable({"use_reentrant": True})


def test_checkpointing_that_would_read_twice_is_refused():
    """A layer's second pass would find its own tokens in the cache; without a second pass there is no harm."""
    model, ids = make_model().train(), make_ids(2, 9)
    model.gradient_checkpointing_enable()
    for given in ({"use_cache": True}, {"past_key_values": model.new_cache(2)}):
        with pytest.raises(ValueError, match="use_cache=True or past_key_values: gradient checkpointing"):
            model(ids, labels=ids, **given)
    with torch.no_grad():
        expected = model(ids, use_cache=True).logits
    model.gradient_checkpointing_disable()
    assert torch.equal(model(ids, use_cache=True).logits, expected)


@pytest.mark.parametrize("bounds", [[0, 0, 3, 6], [0, 3, 3, 6], [0, 3, 6, 6]])
def test_empty_documents_lose_no_target(bounds):
    targets = shift_labels(torch.arange(1, 7)[None], None, torch.tensor(bounds))
    assert targets.tolist() == [[2, 3, -100, 5, 6, -100]]


def test_the_trainer_of_transformers_evaluates(tmp_path):
    model, ids = make_model(), make_ids(6, 20)
    data = [{"input_ids": row, "labels": row} for row in ids]
    args = TrainingArguments(tmp_path, per_device_eval_batch_size=3, report_to="none", use_cpu=True)
    trainer = Trainer(model, args, eval_dataset=data)
    with torch.no_grad():
        expected = model(ids, labels=ids)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected.loss), rel=1e-5)
    assert trainer.predict(data).predictions.shape == (6, 20, model.config.vocab_size)


def test_the_trainer_of_transformers_resumes(tmp_path):
    """With the callback, as if it had never stopped: weights, λ and the count of steps."""
    data = [{"input_ids": row, "labels": row} for row in make_ids(16, 40)]

    def run(folder, steps, **more):
        torch.manual_seed(0)
        changes = {"initializer_range": 0.05, "penalty_interval": 1, "penalty_min": 1e-3, "scorer_dropout": 0.0}
        model = make_model("lalte", **changes).train()
        values = {"max_steps": steps, "save_steps": 2, "lr_scheduler_type": "constant", "learning_rate": 1e-2}
        args = TrainingArguments(folder, **values, report_to="none", use_cpu=True, disable_tqdm=True)
        Trainer(model, args, train_dataset=data, callbacks=[lalte.RetentionCallback()]).train(**more)
        return model

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "part", 2)
    resumed = run(tmp_path / "part", 4, resume_from_checkpoint=True)
    for (name, x), y in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    assert (whole.penalty_control.steps_done(), bool((whole.penalty_control.penalty_weight > 0).any())) == (4, True)


@pytest.mark.parametrize("family", ["lalte", "gdn-swa"])
def test_the_trainer_of_transformers_smooths_labels_only_without_a_penalty(tmp_path, family):
    data = [{"input_ids": row, "labels": row} for row in make_ids(4, 40)]
    values = {"max_steps": 1, "label_smoothing_factor": 0.1, "save_strategy": "no", "disable_tqdm": True}
    args = TrainingArguments(tmp_path, **values, report_to="none", use_cpu=True)
    trainer = Trainer(make_model(family).train(), args, train_dataset=data, callbacks=[lalte.RetentionCallback()])
    if family == "lalte":
        with pytest.raises(ValueError, match=r"^label_smoothing_factor=0\.1: .* without the model's penalty"):
            trainer.train()
    else:
        trainer.train()


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"return_flash_attn_kwargs": True, "return_position_ids": False},
        {"return_seq_idx": True, "return_position_ids": False},
        {"return_seq_idx": True},
    ],
)
def test_flattened_documents_do_not_see_each_other(names):
    """transformers' collator for packed documents gives what cu_seqlens gives."""
    model, lengths = trainable(scorer_dropout=0.0), (7, 1, 12)
    rows = [{"input_ids": make_ids(1, length)[0].tolist()} for length in lengths]
    batch = DataCollatorWithFlattening(return_tensors="pt", **names)(rows)
    bounds = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    expected = model(batch["input_ids"], labels=batch["input_ids"], cu_seqlens=bounds)
    output = model(**batch)
    assert_close(output.logits, expected.logits)
    assert_close(output.loss[None], expected.loss[None])
    alone = model(batch["input_ids"][:, :7], position_ids=torch.arange(7)[None])
    assert_close(alone.logits, expected.logits[:, :7])
    hidden = model.model(**{name: x for name, x in batch.items() if name != "labels"}).last_hidden_state
    assert_close(hidden, model.model(batch["input_ids"], cu_seqlens=bounds).last_hidden_state)
    with pytest.raises(ValueError, match=r"seq_idx \(2, 4\) start anew within rows: pack"):
        model(make_ids(2, 4), seq_idx=torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]))
    for begun in ([0, 1, 0, 1], [5, 6, 0, 1]):
        with pytest.raises(ValueError, match=r"position_ids \(2, 4\) start anew within rows: pack"):
            model(make_ids(2, 4), position_ids=torch.tensor([begun, [0, 1, 2, 3]]))


@pytest.mark.parametrize("lengths", [(7, 13), (7, 1, 12)])
def test_a_flattened_row_may_begin_within_a_document(lengths):
    """As when a long row of documents is cut into rows of one length."""
    model, ids = make_model(), make_ids(1, 20)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    positions[:, : lengths[0]] += 30
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    assert_close(model(ids, position_ids=positions).logits, model(ids, cu_seqlens=bounds).logits)


def test_a_scorer_of_zero_output_starts_from_keeping_everything():
    """Also where values are large, of which a random one drops some at once."""
    ids = make_ids(2, 60)
    kept = []
    for scale in (0.0, 1.0):
        torch.manual_seed(0)
        model = HybridForCausalLM(make_config("lalte", scorer_init_scale=scale)).train()
        with torch.no_grad():
            for layer in (1, 3):
                model.model.layers[layer].mixer.v_proj.weight.mul_(100.0)
        model(ids, labels=ids)
        model.update_retention_penalty()
        kept.append(model.penalty_control.density)
    assert (kept[0] == 1).all()
    assert (kept[1] < 1).any()


def test_keep_all_steps():
    """For the first steps nothing is dropped and the scorer rests; then the rule holds."""
    model = trainable(keep_all_steps=2)
    full = make_model("gdn-full")
    shared = {name: x for name, x in model.state_dict().items() if "scorer" not in name and "penalty" not in name}
    full.load_state_dict(shared)
    ids = make_ids(2, 60)
    for step in range(3):
        output = model(ids, labels=ids)
        model.zero_grad()
        output.loss.backward()
        scorer = model.model.layers[1].mixer.scorer.out_bias
        if step < 2:
            assert_close(output.logits, full(ids).logits)
            assert scorer.grad is None
            assert output.aux_loss is None
        else:
            assert (output.logits - full(ids).logits).abs().max() > 1e-4
            assert scorer.grad.abs().max() > 0
        model.update_retention_penalty()
        assert ("kept_per_head" in model.retention_report()) == (step == 2), "no zero before anything was measured"
    assert_close(model.eval()(ids).logits, run_in_pieces(model, ids, [60]))


def gradients(ids, straight_through, scale=1.0, **kwargs):
    """Logits of one forward pass, and the gradients of `scale` times its loss: all, and those of the last scorer."""
    model = trainable(straight_through=straight_through)
    output = model(ids, labels=ids, **kwargs)
    (scale * output.lm_loss).backward()
    scorer = model.model.layers[3].mixer.scorer.parameters()
    return output.logits, torch.cat([p.grad.flatten() for p in model.parameters()]), [p.grad for p in scorer]


@pytest.mark.parametrize("straight_through", ["beyond_window", "weight_beyond_window", "presence_beyond_window"])
def test_the_scorer_may_learn_from_late_readers_only(straight_through):
    """Then texts that fit into the window teach it nothing, packed ones what each does, and the output stays."""
    ids = make_ids(1, 60)
    logits, _, from_all = gradients(ids, "all")
    again, _, from_late = gradients(ids, straight_through)
    assert torch.equal(logits, again)
    for a, b in zip(from_all, from_late, strict=True):
        assert (a - b).abs().max() > 0.01 * a.abs().max() > 0
        assert b.any()
    assert not any(grad.any() for grad in gradients(ids[:, :17], straight_through)[2])
    assert all(grad.any() for grad in gradients(ids[:, :17], "all")[2])
    bounds = [0, 31, 60]
    _, packed, late = gradients(ids, straight_through, cu_seqlens=torch.tensor(bounds), scale=58 * 1e4)
    pieces = [gradients(ids[:, a:b], straight_through, scale=(b - a - 1) * 1e4) for a, b in pairwise(bounds)]
    assert_close(packed, sum(piece[1] for piece in pieces))
    for i, grad in enumerate(late):
        assert_close(grad, sum(piece[2][i] for piece in pieces), 1e-4)


def test_training_reads_no_tensor():
    """Two steps that keep everything and two that don't, then again from a checkpoint."""
    model = trainable(keep_all_steps=2, penalty_interval=1)
    ids = make_ids(2, 20)
    with NoReading():
        for step in range(4):
            output = model(ids, labels=ids)
            assert (output.aux_loss is None) == (step < 2)
            output.loss.backward()
            model.update_retention_penalty()
    again = trainable(keep_all_steps=6)
    again.load_state_dict(model.state_dict())
    assert again(ids).aux_loss is None  # may read, once
    with NoReading():
        for step in range(4, 8):
            assert (again(ids).aux_loss is None) == (step < 6)
            again.update_retention_penalty()


def test_keep_all_steps_in_compiled_code():
    model = trainable(keep_all_steps=2)
    compiled = torch.compile(lambda x: x if model._keeps_all() else -x, backend="eager")
    for step in range(4):
        assert (compiled(torch.ones(1)) > 0) == (step < 2)
        model.update_retention_penalty()


@torch.no_grad()
def test_training_has_no_budget_and_evaluation_has():
    model, ids = make_model(), make_ids(1, 120)
    unlimited = make_model(budget=120)
    trained, evaluated = model.train()(ids).logits, model.eval()(ids).logits
    assert_close(trained, unlimited.train()(ids).logits)
    assert_close(trained, unlimited.eval()(ids).logits)
    assert (trained - evaluated).abs().max() > 0.01


@torch.no_grad()
def test_set_retention_budget():
    model, ids = make_model(), make_ids(2, 100)
    own = model(ids).logits
    zero = make_model(budget=0)
    zero.load_state_dict(model.state_dict())
    model.set_retention_budget(0)
    assert_close(model(ids).logits, zero(ids).logits)
    assert_close(run_in_pieces(model, ids, random_split(100, 5)), zero(ids).logits)
    assert model.new_cache().nbytes == zero.new_cache().nbytes
    streaming = make_model("lalte", budget=0, retention="none")
    streaming.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "scorer" not in k and "penalty" not in k}
    )
    assert_close(model(ids).logits, streaming(ids).logits)
    model.set_retention_budget(None)
    assert torch.equal(model(ids).logits, own)
    with pytest.raises(ValueError, match="budget=-1 must be 0 or more"):
        model.set_retention_budget(-1)
    with pytest.raises(ValueError, match="no retention scorer"):
        make_model("gdn-swa").set_retention_budget(4)


def test_parameter_groups():
    model = make_model(scorer_lr_scale=0.1)
    groups = model.parameter_groups(weight_decay=0.2, lr=1e-3)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    where = {id(p): g for g in groups for p in g["params"]}
    named = dict(model.named_parameters())
    expected = {
        "model.embed_tokens.weight": (0.2, 1e-3),
        "model.layers.0.mixer.q_proj.weight": (0.2, 1e-3),
        "model.layers.0.mixer.A_log": (0.0, 1e-3),
        "model.layers.0.mixer.dt_bias": (0.0, 1e-3),
        "model.layers.0.mixer.o_norm.weight": (0.0, 1e-3),
        "model.layers.1.mixer_norm.weight": (0.0, 1e-3),
        "model.layers.1.mixer.scorer.weights.0": (0.2, 1e-4),
        "model.layers.1.mixer.scorer.biases.0": (0.0, 1e-4),
        "model.layers.1.mixer.scorer.out_bias": (0.0, 1e-4),
    }
    for name, (decay, lr) in expected.items():
        group = where[id(named[name])]
        assert (group["weight_decay"], group["lr"]) == (decay, pytest.approx(lr)), name


def test_initialisation():
    """Scorers start by keeping everything; decays and time steps lie in their ranges; outputs shrink with depth."""
    torch.manual_seed(3)
    model = HybridForCausalLM(make_config(hidden_size=96, initializer_range=0.02, head_dim=32, gdn_head_dim=32))
    gdn, attention = model.model.layers[0].mixer, model.model.layers[1].mixer
    assert isinstance(attention, RetainedAttention)
    assert (attention.scorer.out_bias == 0.5).all()
    assert 0.9 < attention.scorer.weights[0].std() * math.sqrt(3 * 64 / 2) < 1.1
    assert ((gdn.A_log.exp() >= 0) & (gdn.A_log.exp() <= 16)).all()
    step = torch.nn.functional.softplus(gdn.dt_bias)
    assert ((step >= 1e-3 * 0.99) & (step <= 0.1 * 1.01)).all()
    assert 0.9 < attention.q_proj.weight.std() / 0.02 < 1.1
    for linear in (attention.o_proj, gdn.o_proj, model.model.layers[2].mlp.down_proj):
        assert 0.9 < linear.weight.std() / (0.02 / math.sqrt(8)) < 1.1


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_may_start_from_a_range_of_their_own(tied):
    torch.manual_seed(3)
    changes = {"tie_word_embeddings": tied, "sink_token": "learnable", "initializer_range": 0.02}
    model = HybridForCausalLM(make_config(hidden_size=96, embedding_range=0.3, **changes))
    assert 0.9 < model.model.embed_tokens.weight.std() / 0.3 < 1.1
    assert 0.7 < model.model.sink_token.std() / 0.3 < 1.3
    assert 0.9 < model.lm_head.weight.std() / (0.3 if tied else 0.02) < 1.1
    assert 0.9 < model.model.layers[1].mixer.q_proj.weight.std() / 0.02 < 1.1
    plain = HybridForCausalLM(make_config(hidden_size=96, **changes))
    assert 0.9 < plain.model.embed_tokens.weight.std() / 0.02 < 1.1
    with pytest.raises(ValueError, match="embedding_range=-1"):
        make_config(embedding_range=-1.0)


def test_the_output_carries_what_the_scorers_decided():
    model = make_model()
    ids = make_ids(2, 40)
    output = model(ids)
    assert len(output.retention) == model.config.layer_types.count("attention")
    for stats in output.retention:
        assert (stats.kept <= stats.eligible).all()
        assert stats.tokens == ids.numel()
    assert not model.penalty_control.counts.any(), "evaluation doesn't steer λ"
    assert model(ids, past_key_values=model.new_cache(2)).retention is None


# ---- a learned sink


@torch.no_grad()
def test_a_learned_sink_is_an_embedding_in_front_of_every_document():
    model = make_model("streaming", sink_token="learnable", sinks=1)
    plain = make_model("streaming", sinks=1)
    plain.load_state_dict({k: x for k, x in model.state_dict().items() if k != "model.sink_token"})
    ids = make_ids(2, 60)
    sink = model.model.sink_token.expand(2, 1, -1)
    expected = plain(inputs_embeds=torch.cat([sink, plain.model.embed_tokens(ids)], 1)).logits[:, 1:]
    assert_close(model(ids).logits, expected)
    output = model(ids, use_cache=True, output_hidden_states=True)
    assert_close(output.logits, expected)
    assert {x.shape[1] for x in output.hidden_states} == {60}
    assert output.past_key_values.columns == 60
    attention = next(s for s in output.past_key_values.states if hasattr(s, "kv"))
    assert attention.kv.seen.tolist() == [61, 61]
    assert (attention.kv.positions[:, :, 0] == 0).all(), "the sink is never evicted"


def test_a_learned_sink_is_trained_and_kept(tmp_path):
    model = make_model(sink_token="learnable").train()
    cu_seqlens = torch.tensor([0, 7, 7, 40])
    model(make_ids(1, 40), labels=make_ids(1, 40), cu_seqlens=cu_seqlens).loss.backward()
    assert model.model.sink_token.grad.any()
    model.save_pretrained(tmp_path)
    again = HybridForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.sink_token, model.model.sink_token)
    fresh = HybridForCausalLM(make_config(sink_token="learnable", initializer_range=0.3))
    assert 0.1 < fresh.model.sink_token.std() < 0.6


@torch.no_grad()
def test_a_graph_wants_the_learned_sink_to_be_read():
    from models.decode_step import unread_sink

    model = make_model(sink_token="learnable")
    cache = model.new_cache(1)
    assert "sink token has yet to be read" in unread_sink(model, cache)
    model(make_ids(1, 1), past_key_values=cache)
    assert unread_sink(model, cache) is None


# ---- loading what isn't all there


@pytest.fixture
def junk(monkeypatch):
    """Fresh memory is full of NaN, so that what nobody has set shows."""
    move = HybridForCausalLM._move_missing_keys_from_meta_to_device

    def filled(self, missing, *args):
        move(self, missing, *args)
        for name in missing:
            tensor = self.get_parameter_or_buffer(name).data
            tensor.fill_(math.nan if tensor.is_floating_point() else -77)

    monkeypatch.setattr(HybridForCausalLM, "_move_missing_keys_from_meta_to_device", filled)


@pytest.mark.parametrize(
    "missing",
    [
        "model.layers.0.mixer.q_conv1d.weight",
        "model.layers.0.mixer.o_norm.weight",
        "model.layers.0.mixer.dt_bias",
        "model.layers.0.mixer.q_proj.weight",
        "model.layers.1.mixer.scorer.weights.1",
        "model.layers.1.mixer.scorer.out_bias",
        "penalty_control.density",
        "penalty_control.steps",
    ],
)
def test_a_missing_tensor_has_its_start_value(tmp_path, junk, missing):
    """And the others of its module those of the file."""
    model = make_model()
    model.penalty_control.steps.fill_(5)
    model.penalty_control.penalty_weight.fill_(0.5)
    state = model.state_dict()
    del state[missing]
    model.save_pretrained(tmp_path, state_dict=state)
    again = HybridForCausalLM.from_pretrained(tmp_path)
    for name, x in again.state_dict().items():
        if name in state:
            assert torch.equal(x, state[name]), name
    found, fresh = again.state_dict()[missing], HybridForCausalLM(model.config).state_dict()[missing]
    assert torch.isfinite(found).all()
    if fresh.unique().numel() == 1:
        assert torch.equal(found, fresh)
    else:
        assert 0 < found.abs().max() < 5 * fresh.abs().max()
    assert again.penalty_control.steps_done() == (0 if missing.endswith("steps") else 5)


@torch.no_grad()
def test_boundaries_may_be_written_anew_in_place():
    """As a loader does that has one buffer for them: what was derived from the former ones is not used again."""
    model, ids, seen = make_model(), make_ids(1, 40), []
    model.model.layers[0].mixer.register_forward_pre_hook(lambda _, args: seen.append(args[1].cu_seqlens))
    bounds = torch.tensor([0, 7, 40], dtype=torch.int32)
    model(ids, cu_seqlens=bounds)
    bounds.copy_(torch.tensor([0, 30, 40]))
    model(ids, cu_seqlens=bounds)
    assert [x.tolist() for x in seen] == [[0, 7, 40], [0, 30, 40]]
    assert seen[0] is not seen[1]


@torch.no_grad()
@pytest.mark.parametrize("family", ["lalte", "gdn-full", "transformer"])
def test_a_cache_under_autocast(family):
    """The cache has the weights' dtype, and queries have autocast's."""
    model, ids = make_model(family), make_ids(2, 40)
    expected = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        cached = run_in_pieces(model, ids, [20, 1, 1, 18])
    assert_close(cached.float(), expected, 5e-2)


def test_stats_are_seen_where_outputs_are_taken_apart():
    """DataParallel, in which the Trainer evaluates where several GPUs are visible, DDP, FSDP and export do so."""
    stats = make_model()(make_ids(2, 40)).retention
    assert len(tree_leaves(stats)) == 4 * len(stats)


@torch.no_grad()
def test_passes_without_gradients_count_nothing():
    """Scores of the same tokens that are taken in training mode, as reinforcement learning does, are no new ones."""
    model = make_model().train()
    model(make_ids(2, 60))
    assert not model.penalty_control.counts.any()
