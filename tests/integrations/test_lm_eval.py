"""lm-evaluation-harness on a spiking model, through its HFLM, with a task whose data lie beside it."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from tiny_lm import tiny_llama, tiny_tokenizer, token_batch

import ranvier
from ranvier.integrations import transformers as lm

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed: pip install 'ranvier[eval]'", allow_module_level=True)
pytest.importorskip("transformers")

QUESTIONS = [
    {"prompt": "the node of", "choices": [" ranvier", " leap"], "gold": 0},
    {"prompt": "a nerve impulse", "choices": [" work", " leap far"], "gold": 1},
    {"prompt": "far while the", "choices": [" work rests", " of"], "gold": 0},
]
TASK = """
task: leap
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    data = tmp_path / "questions.json"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "leap.yaml").write_text(TASK.replace("DATA", str(data)))
    for name, value in {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_DATASETS_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "task"


def log_likelihood(model, prompt: str, choice: str) -> float:
    tokenizer = tiny_tokenizer()
    ids = torch.tensor([tokenizer(prompt + choice)["input_ids"]])
    start = len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        chances = model(ids).logits[0].double().log_softmax(-1)
    return float(sum(chances[t - 1, ids[0, t]] for t in range(start, ids.shape[1])))


def test_harness_scores_a_reloaded_spiking_model(task, tmp_path):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM

    lm.register()
    tiny_llama().save_pretrained(tmp_path / "plain")
    config = ranvier.SpikeConfig(calibration=[token_batch(32, seed=1)])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    model.save_pretrained(tmp_path / "spiking")
    tiny_tokenizer().save_pretrained(tmp_path / "spiking")
    # By the folder's name, as its command line does.
    harness = HFLM(pretrained=str(tmp_path / "spiking"), device="cpu", dtype="float32", batch_size=1)
    assert isinstance(harness.model.model.layers[0].mlp.up_proj, ranvier.nn.SpikingLinear)
    found = lm_eval.simple_evaluate(
        harness,
        tasks=["leap"],
        task_manager=TaskManager(include_path=str(task), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    right = 0
    for sample, question in zip(sorted(found["samples"]["leap"], key=lambda s: s["doc_id"]), QUESTIONS, strict=True):
        wanted = [log_likelihood(model, question["prompt"], choice) for choice in question["choices"]]
        got = [float(response[0]) for response in sample["filtered_resps"]]
        # Float32 log-softmax and sums of up to two terms, against float64 of the same logits.
        assert got == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        right += wanted.index(max(wanted)) == question["gold"]
    assert found["results"]["leap"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
