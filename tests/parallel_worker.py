"""What each of two processes does in tests/integrations/test_parallel.py; the parent looks at what they found."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
import torch.distributed as dist

import ranvier
from ranvier.integrations import parallel
from ranvier.nn import SpikingLinear

WORLD = 2


def wide_llama(spike: bool = True):
    """Heads and channels that divide by two in blocks of 32; the second layer's MLP does not, evenly."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.manual_seed(5)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "tie_word_embeddings": False}
    config = LlamaConfig(**sizes, **heads, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = LlamaForCausalLM(config).eval()
    uneven = copy.deepcopy(config)
    uneven.intermediate_size = 165
    model.model.layers[1].mlp = LlamaMLP(uneven).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    if spike:
        ranvier.spike_(model, ranvier.SpikeConfig(), [ids(32, 1)])
    return model


def even_llama():
    """A model that transformers can build from its config: both MLPs alike."""
    model = wide_llama(spike=False)
    model.model.layers[1].mlp = copy.deepcopy(model.model.layers[0].mlp)
    ranvier.spike_(model, ranvier.SpikeConfig(), [ids(32, 1)])
    return model


def ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 50, (2, length), generator=torch.Generator().manual_seed(seed))


def held_bytes(model) -> int:
    layers = [module for module in model.modules() if isinstance(module, SpikingLinear)]
    return sum(layer.weight_packed.numel() for layer in layers)


def gradients(model) -> dict[str, torch.Tensor]:
    """Of the loss of one batch: to the embeddings and to every bias."""
    given = model.get_input_embeddings()(ids(9)).detach().requires_grad_(True)
    logits = model(inputs_embeds=given).logits
    logits.square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if name.endswith("bias")}
    return {"input": given.grad, **found}


def tensor_parallel(found: dict) -> None:
    model = parallel.tensor_parallel_(wide_llama())
    with torch.no_grad():
        found["logits"] = [model(ids(n)).logits for n in (1, 7)]
    found["generated"] = model.generate(ids(5), max_new_tokens=6, do_sample=False)
    found["styles"] = {
        name: (module.split_input, module.gather_output)
        for name, module in model.named_modules()
        if isinstance(module, parallel.ParallelSpikingLinear)
    }
    found["bytes"] = held_bytes(model)
    found["gradients"] = gradients(model)


def loaded(found: dict, folder: Path) -> None:
    model = parallel.load_parallel(folder)
    with torch.no_grad():
        found["loaded"] = model(ids(7)).logits
    found["loaded_bytes"] = held_bytes(model)
    q, k = model.model.layers[0].self_attn.q_proj.part, model.model.layers[0].self_attn.k_proj.part
    found["loaded_group"] = q.group is not None and q.group is k.group and q.salient_mask is k.salient_mask is q.group.mask


def sharded_parameters(found: dict) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    model = wide_llama()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    bias = model.model.layers[0].self_attn.q_proj.bias
    found["fsdp_local"] = bias.to_local().numel()
    with torch.no_grad():
        found["fsdp_logits"] = [model(ids(n)).logits for n in (7, 7)]
    # The embedding belongs to the root, whose parameters are whole only inside its forward.
    model(ids(9)).logits.square().mean().backward()
    found["fsdp_gradients"] = {
        name: p.grad.full_tensor() for name, p in model.named_parameters() if name.endswith("bias") or "embed" in name
    }
    torch.optim.SGD(model.parameters(), 0.1).step()
    with torch.no_grad():
        found["fsdp_trained"] = model(ids(7)).logits


def run(rank: int, folder: str, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict = {}
    tensor_parallel(found)
    loaded(found, Path(folder) / "model")
    sharded_parameters(found)
    torch.save(found, Path(folder) / f"found-{rank}.pt")
    dist.destroy_process_group()
