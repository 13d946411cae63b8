"""SpikingCache in transformers' models: generation against whole prompts, padding, cropping, and every way to misuse it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_lm import WORDS, tiny_llama, token_batch

from ranvier import SpikeConfig
from ranvier.integrations._kv_layers import SpikingCacheLayer
from ranvier.integrations.spiking_cache import (
    NAME,
    OBSERVE,
    SpikingCache,
    calibrate_masks,
    register,
    spiking_attention,
)
from ranvier.methods.spikellm.kv_saliency import KVMasks
from ranvier.reference import kv_attention as reference

PLAIN = SpikeConfig(salient=0.0)


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    torch.set_num_threads(1)


def tiny_qwen(full_layers: int = 1):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(5)
    config = Qwen3Config(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, head_dim=32,
        vocab_size=len(WORDS), eos_token_id=0, pad_token_id=0, use_sliding_window=True, sliding_window=7,
        max_window_layers=full_layers,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def prepared(model):
    register()
    model.set_attn_implementation(NAME)
    return model


@pytest.fixture(params=[tiny_llama, tiny_qwen], ids=["llama", "qwen3-sliding"])
def model(request: pytest.FixtureRequest):
    return prepared(request.param())


def cache_of(model):
    return SpikingCache.for_model(model, SpikeConfig(salient=0.1), [token_batch(32, seed=1)])


@torch.no_grad()
def test_one_token_at_a_time_equals_the_whole_prompt(model) -> None:
    """Logits of incremental decoding are those of one prefill: tokens are quantized before anyone attends to them.

    Attention gives equal bits for equal queries; float32 linear layers of other shapes round differently, which may move a
    code: one step of a key or value, so the bound is a small share of the logits, and most are equal to 1e-5.
    """
    ids = token_batch(20, seed=3)
    whole = model(ids, past_key_values=cache_of(model)).logits
    cache = cache_of(model)
    parts = [model(ids[:, :9], past_key_values=cache).logits]
    parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(9, 20)]
    error = (torch.cat(parts, 1) - whole).abs()
    assert error.max() < 0.05 * whole.abs().max() and error.median() < 1e-5
    assert cache.get_seq_length() == 20
    exact = model(ids[:, :5], past_key_values=cache.fresh()).logits
    assert torch.allclose(exact, whole[:, :5], atol=1e-4)


@torch.no_grad()
def test_attention_reads_what_the_layer_stores() -> None:
    """A model on the cache equals itself on the dequantized keys and values by plain attention."""
    from transformers import AttentionInterface

    model, ids = prepared(tiny_llama()), token_batch(30, seed=4)
    got = model(ids, past_key_values=cache_of(model)).logits

    def plain(module, query, key, value, mask, scaling=None, **_):
        layer = key.spiking_layer
        keys, values = (x.double() for x in layer.decoded())
        seen = reference.visible(torch.tensor([layer.length]), None, query.shape[2], layer.length)
        out = reference.kv_attention(query.double(), keys, values, seen, None, scaling)
        return out.float().transpose(1, 2), None

    AttentionInterface.register("ranvier_test_plain", plain)
    cache = cache_of(model)
    model.set_attn_implementation("ranvier_test_plain")
    expected = model(ids, past_key_values=cache).logits
    # The kernel's error, below 1e-3 of a value, can move a code of the second layer.
    assert (got - expected).abs().max() < 0.02 * expected.abs().max()
    assert (got - expected).abs().median() < 1e-3


def test_generate_with_left_padding(model) -> None:
    """A padded batch generates what each row generates alone; a second call on fresh() repeats it."""
    short, long = token_batch(5, seed=5), token_batch(11, seed=6)
    ids = torch.cat([torch.cat([torch.zeros(1, 6, dtype=torch.long), short], 1), long])
    seen = torch.ones_like(ids)
    seen[0, :6] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = cache_of(model)
    both = model.generate(ids, attention_mask=seen, past_key_values=cache, **options)
    again = model.generate(ids, attention_mask=seen, past_key_values=cache.fresh(), **options)
    assert torch.equal(both, again)
    for row, prompt in zip(both, (short, long), strict=True):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache.fresh(), **options)
        assert torch.equal(row[11:], alone[0, prompt.shape[1] :])


@torch.no_grad()
def test_masks_with_holes_and_given_masks(model) -> None:
    """Padding in the middle, and a four-dimensional mask of one's own, hide what they should."""
    ids = token_batch(12, seed=7)
    seen = torch.ones_like(ids)
    seen[0, 4:6] = 0
    changed = ids.clone()
    changed[0, 4:6] = ids[0, 4:6] % (len(WORDS) - 1) + 1
    outs = [model(x, attention_mask=seen, past_key_values=cache_of(model)).logits[:, 6:] for x in (ids, changed)]
    assert torch.equal(*outs)
    causal = torch.ones(12, 12, dtype=torch.bool).tril()[None, None] & seen.bool()[:, None, None]
    if model.config.model_type == "llama":
        given = model(ids, attention_mask=causal, past_key_values=cache_of(model), position_ids=torch.arange(12)[None]).logits
        plain = model(ids, attention_mask=seen, past_key_values=cache_of(model), position_ids=torch.arange(12)[None]).logits
        assert torch.allclose(given[:, 6:], plain[:, 6:], atol=1e-5)


@torch.no_grad()
def test_crop_reset_reorder_and_select() -> None:
    """After cropping, resetting and reordering the cache is the one that never saw what was dropped."""
    model = prepared(tiny_llama())
    ids, cache = torch.cat([token_batch(70, seed=8), token_batch(70, seed=9)]), cache_of(model)
    model(ids, past_key_values=cache)
    cache.crop(-30)
    tail = model(ids[:, 40:45], past_key_values=cache).logits
    fresh = cache.fresh()
    model(ids[:, :40], past_key_values=fresh)
    assert torch.equal(tail, model(ids[:, 40:45], past_key_values=fresh).logits)
    fresh.crop(-5)
    fresh.reorder_cache(torch.tensor([1, 0]))
    assert torch.allclose(model(ids[:, 40:45].flip(0), past_key_values=fresh).logits, tail.flip(0), atol=1e-5)
    fresh.crop(-5)
    fresh.batch_select_indices(torch.tensor([0]))
    fresh.batch_repeat_interleave(2)
    both = model(ids[1:, 40:45].repeat(2, 1), past_key_values=fresh).logits
    assert torch.equal(both[0], both[1]) and torch.allclose(both[0], tail[1], atol=1e-5)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes() == 0
    with pytest.raises(ValueError, match="down to -0"):
        cache.crop(-1)


@torch.no_grad()
def test_sliding_window_is_kept() -> None:
    """Two layers with windows of 7 see 12 tokens back: the last of 20 does not depend on the first, the tenth does."""
    model, ids = prepared(tiny_qwen(full_layers=0)), token_batch(20, seed=3)
    changed, cache = ids.clone(), cache_of(model)
    changed[0, 0] = ids[0, 0] % (len(WORDS) - 1) + 1
    one, other = (model(x, past_key_values=cache.fresh()).logits[0] for x in (ids, changed))
    assert torch.equal(one[13:], other[13:]) and not torch.equal(one[9], other[9])


def test_growing_keeps_what_is_stored() -> None:
    """A layer filled in pieces, over the ends of its blocks, holds the bytes of one filled at once; room is let go by reset."""
    masks = KVMasks(*(torch.arange(16).repeat(2, 1) < n for n in (1, 3)))
    key, value = torch.randn(2, 2, 2, 200, 16)
    whole, parts = SpikingCacheLayer(masks), SpikingCacheLayer(masks)
    whole.update(key, value)
    for begin, end in ((0, 1), (1, 60), (60, 70), (70, 129), (129, 200)):
        handle, _ = parts.update(key[:, :, begin:end], value[:, :, begin:end])
        assert handle.shape == (2, 2, end, 16) and handle.spiking_layer is parts
    assert all(torch.equal(a, b) for a, b in zip(whole.decoded(), parts.decoded(), strict=True))
    assert whole.nbytes() == parts.nbytes() == 2 * 2 * 4 * whole.form.block_bytes
    parts.crop(-100)
    assert parts.nbytes() == 2 * 2 * 2 * whole.form.block_bytes  # of 100 tokens, whatever room there is
    ragged = SpikingCacheLayer(KVMasks(*(torch.arange(16) < torch.tensor([[n], [5]]) for n in (1, 3))))
    ragged.update(key, value)  # bits for the head with the most
    assert (ragged.form.key_salient, ragged.form.value_salient) == (5, 5)
    full = SpikingCacheLayer(masks)
    for begin, end, blocks in ((0, 60, 1), (60, 64, 1), (64, 65, 2)):  # a block is used up before another is taken
        full.update(key[:, :, begin:end], value[:, :, begin:end])
        assert full.packed.shape[2] == blocks
    for wrong in (value[:, :, :1], value[..., :8]):
        with pytest.raises(ValueError, match="its masks are for"):
            SpikingCacheLayer(masks).update(key, wrong)
    with pytest.raises(ValueError, match="does not offload"):
        parts.offload()
    parts.reset()
    assert not parts.is_initialized and parts.nbytes() == 0
    with pytest.raises(ValueError, match="its masks are for"):
        parts.update(key[:, :1], value[:, :1])


@torch.no_grad()
def test_calibration_marks_the_same_share_of_every_head_and_leaves_the_model() -> None:
    """calibrate_masks: two of 16 channels a head, deterministic; the attention that was set is set again."""
    model = tiny_llama()
    before = model.config._attn_implementation
    first, second = (calibrate_masks(model, [token_batch(32, seed=1)], 0.1) for _ in range(2))
    assert model.config._attn_implementation == before
    for one, other in zip(first, second, strict=True):
        assert one.key.sum(1).tolist() == one.value.sum(1).tolist() == [2, 2]
        assert torch.equal(one.key, other.key) and torch.equal(one.value, other.value)
    together = calibrate_masks(model, [token_batch(32, seed=1)], 0.1, per_head=False)
    assert [m.key.sum().item() for m in together] == [4, 4]
    prepared(model)
    for per_head, expected in ((True, first), (False, together)):
        made = SpikingCache.for_model(model, SpikeConfig(salient=0.1), [token_batch(32, seed=1)], per_head=per_head).masks
        assert all(torch.equal(a.key, b.key) and torch.equal(a.value, b.value) for a, b in zip(made, expected, strict=True))
    assert not all(torch.equal(a.value, b.value) for a, b in zip(first, together, strict=True))


@torch.no_grad()
def test_what_is_of_another_kind_is_refused() -> None:
    """Batches that are no ids, another config, another module, other masks, rows of another number: each is named."""
    model = prepared(tiny_llama())
    for given, error, message in (
        (Path("text"), ValueError, "pass token ids"),
        (3, TypeError, "calibration is int; pass an iterable"),
        ([token_batch().float()], TypeError, r"one is torch\.float32"),
        ([torch.tensor([[99]])], ValueError, "gives the id 99, and the embedding has 14 rows"),
    ):
        with pytest.raises(error, match=message):
            SpikingCache.for_model(model, SpikeConfig(), given)
        assert model.config._attn_implementation == NAME
    with pytest.raises(TypeError, match=r"SpikingCache: config is dict; pass a ranvier\.SpikeConfig"):
        SpikingCache.for_model(model, {})
    with pytest.raises(TypeError, match="Linear is no model of transformers"):
        SpikingCache.for_model(torch.nn.Linear(2, 2), PLAIN)
    for masks in (None, [torch.zeros(2, 16, dtype=torch.bool)]):
        with pytest.raises(TypeError, match="pass a list of KVMasks"):
            SpikingCache(masks)
    cache = SpikingCache.for_model(model, PLAIN)
    model(token_batch(), past_key_values=cache)
    with pytest.raises(ValueError, match=r"it holds 1 rows and the call 2; begin another batch with cache\.fresh\(\)"):
        model(token_batch().repeat(2, 1), past_key_values=cache)


@torch.no_grad()
def test_misuse_is_refused() -> None:
    """No cache, another cache, another attention, no calibration, a share too large, dropout."""
    from transformers import DynamicCache

    model = tiny_llama()
    with pytest.raises(ValueError, match="set_attn_implementation"):
        SpikingCache.for_model(model, PLAIN)
    prepared(model)
    with pytest.raises(ValueError, match="need calibration"):
        SpikingCache.for_model(model, SpikeConfig())
    with pytest.raises(ValueError, match=r"0 to 0\.2"):
        SpikingCache.for_model(model, SpikeConfig(salient=0.5), [token_batch()])
    with pytest.raises(ValueError, match="saw no tokens"):
        SpikingCache.for_model(model, SpikeConfig(), [])
    for options in ({"use_cache": False}, {"past_key_values": DynamicCache()}):
        with pytest.raises(ValueError, match="do not come from a SpikingCache"):
            model(token_batch(), **options)
    cache = SpikingCache.for_model(model, PLAIN)
    model(token_batch(), past_key_values=cache)
    model.set_attn_implementation("eager")
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(token_batch(), past_key_values=cache.fresh()).logits.sum().item()


@torch.no_grad()
def test_scale_and_what_the_kernel_has_not() -> None:
    """The model's own scale of the logits is used; dropout, softcap, sinks and biases are refused."""
    layer = SpikingCacheLayer(KVMasks(*(torch.zeros(2, 16, dtype=torch.bool) for _ in range(2))))
    handle, _ = layer.update(*torch.randn(2, 1, 2, 9, 16))
    query = torch.randn(1, 4, 9, 16)
    got, _ = spiking_attention(None, query, handle, handle, None, scaling=0.7)
    seen = reference.visible(torch.tensor([9]), None, 9, 9)
    expected = reference.kv_attention(query.double(), *(x.double() for x in layer.decoded()), seen, None, 0.7)
    # Values of a few units, whose weights are exact to 2^-15 or so.
    torch.testing.assert_close(got.transpose(1, 2).double(), expected, rtol=0, atol=1e-3)
    for option in ({"dropout": 0.1}, {"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1)}):
        with pytest.raises(ValueError, match=f"has no {next(iter(option))}"):
            spiking_attention(None, query, handle, handle, None, **option)
    assert spiking_attention(None, query, handle, handle, None, softcap=None, dropout=0.0)[0].shape == (1, 9, 4, 16)


@torch.no_grad()
def test_observing_changes_nothing(model) -> None:
    """The attention that saliency is measured by is the model's own: grouped heads, windows and scale."""
    register()
    for attention in model.modules():
        if hasattr(attention, "scaling"):
            attention.scaling *= 1.7
    ids = token_batch(20, seed=3)
    model.set_attn_implementation("eager")
    expected = model(ids, use_cache=False).logits
    model.set_attn_implementation(OBSERVE)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
