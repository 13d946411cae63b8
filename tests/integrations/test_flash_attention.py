"""transformers' models with ranvier's attention: what goes to the kernel, what to sdpa, and that both compute the same."""

from __future__ import annotations

import pytest
import torch
from tiny_families import FAMILIES, tiny_model
from tiny_lm import tiny_llama, token_batch

from ranvier.integrations import flash_attention
from ranvier.ops._declare import OPS

pytest.importorskip("transformers")


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """The shapes of the queries that reach the kernel."""
    seen, op = [], OPS["flash_attention"]
    run = op.implementations["cpu"]
    monkeypatch.setitem(op.implementations, "cpu", lambda q, *rest: seen.append(tuple(q.shape)) or run(q, *rest))
    return seen


def with_kernel(model):
    flash_attention.register()
    model.set_attn_implementation(flash_attention.NAME)
    return model.eval()


def test_prompts_go_to_the_kernel_and_give_sdpas_logits(calls) -> None:
    """A prompt in every layer; one token after it not; generate gives the same tokens."""
    ids, model = token_batch(24), tiny_llama().eval()
    with torch.no_grad():
        want = model(ids).logits
        generated = model.generate(ids, max_new_tokens=5, do_sample=False)
        with_kernel(model)
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
        assert len(calls) == model.config.num_hidden_layers and {shape[2] for shape in calls} == {24}
        calls.clear()
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), generated)
        assert {shape[2] for shape in calls} == {24}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    """Every family that the library is tested with computes what it does with sdpa."""
    model = tiny_model(family).eval()
    ids = torch.randint(1, 20, (2, 12), generator=torch.Generator().manual_seed(1))
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        with pytest.raises(ValueError, match="softcap"):
            with_kernel(model)(ids)
        return
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        want = model(ids).logits
        torch.testing.assert_close(with_kernel(model)(ids).logits, want, rtol=1e-4, atol=1e-5)


def test_what_the_kernel_has_not_goes_to_sdpa(calls) -> None:
    """Padded rows, a chunk after a cache, short prompts and training take sdpa and give its values."""
    ids, plain, model = token_batch(24), tiny_llama().eval(), with_kernel(tiny_llama())
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    with torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)
        assert torch.equal(model(ids[:, :5]).logits, plain(ids[:, :5]).logits) and not calls
        both = [m(ids[:, :12], use_cache=True).past_key_values for m in (model, plain)]
        assert len(calls) == model.config.num_hidden_layers
        calls.clear()
        after = [m(ids[:, 12:], past_key_values=c).logits for m, c in zip((model, plain), both, strict=True)]
        torch.testing.assert_close(*after, rtol=1e-4, atol=1e-5)
        assert not calls
    model(ids).logits.sum().backward()
    assert not calls and model.model.embed_tokens.weight.grad.abs().max() > 0


def test_compiled() -> None:
    """torch.compile takes it in one graph."""
    torch._dynamo.reset()
    model, ids = with_kernel(tiny_llama()), token_batch(16)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
