"""What the library does to the process it lives in: modules, OpenMP runtimes, threads, forks, the interpreter's lock."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest
import torch
from compiled import python
from spiking import CONFIGS, spiking, tokens

from ranvier import _C, SpikeConfig
from ranvier.nn import SpikeGroup, SpikingGatedMLP, SpikingLinear, SpikingRMSNorm, TernaryLinear
from ranvier.ops import (
    KVFormat,
    flash_attention,
    hadamard,
    kv_attention,
    kv_encode,
    spike_encode,
    spike_linear,
    spike_linear_dynamic,
    spike_rms_norm,
    spike_silu_mul,
    ternary_linear,
)

HEAVY = ("transformers", "numba", "triton", "matplotlib", "gguf", "tqdm.notebook", "huggingface_hub")
# A layer that several threads share, and its output's bits.
LAYER = """
import hashlib, torch, ranvier
from ranvier import SpikeConfig, _C
from ranvier.nn import SpikingLinear
torch.manual_seed(3)
layer = SpikingLinear.from_linear(torch.nn.Linear(256, 512), SpikeConfig(), torch.arange(256) % 10 == 0)
x = torch.randn(64, 256)
def bits():
    with torch.no_grad():
        return hashlib.sha256(layer(x).numpy().tobytes()).hexdigest()
"""


@pytest.fixture(scope="module")
def bits() -> str:
    """The output of LAYER in a process where nothing is unusual."""
    return python(f"{LAYER}\nprint(bits())").strip()


def test_import_is_light() -> None:
    """import ranvier, its layers and its ops load no optional or slow package; torch alone is not what loads them."""
    code = f"""
import sys, torch
before = set(sys.modules)
import ranvier, ranvier.nn, ranvier.ops, ranvier.reference, ranvier.methods.spikellm
print(*[name for name in {HEAVY} if name in set(sys.modules) - before])
"""
    assert python(code).split() == []


def test_works_without_optional_packages(bits: str) -> None:
    """Where none of them is installed, a layer still runs and what needs one names the extra that brings it."""
    missing = tuple(name for name in HEAVY if "." not in name)
    code = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in {missing} else self.finder.find_spec(name, *rest)
sys.meta_path[:] = map(Without, sys.meta_path)
{LAYER}
from ranvier.methods.spikellm import spike_
from ranvier.integrations.transformers import load_causal_lm
try:
    load_causal_lm("nowhere")
except ImportError as error:
    print(bits(), "models" in str(error))
"""
    assert python(code).split() == [bits, "True"]


def test_one_openmp_runtime() -> None:
    """After torch's, ours and numba's kernels ran, one OpenMP library is mapped: torch's."""
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("no /proc/self/maps here")
    code = f"""{LAYER}
from ranvier.ops import spike_events
bits(), torch.randn(1000, 1000) @ torch.randn(1000, 1000), spike_events(layer, x[:2])
print(open("/proc/self/maps").read())
"""
    libraries = set(re.findall(r"/\S*/lib(?:gomp|iomp5?|omp)\b\S*", python(code)))
    assert len(libraries) == 1, libraries


@pytest.mark.usefixtures("threads")
def test_thread_count_is_torchs() -> None:
    """torch.set_num_threads is obeyed at once, and the bits do not change."""
    layer, x, results = spiking(), tokens(64), []
    for count in (1, 2, 1):
        torch.set_num_threads(count)
        assert _C.num_threads() == count
        with torch.no_grad():
            results.append(layer(x))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "replacement", ["lambda path: object()", "lambda path: exec('raise OSError(path)')"], ids=["no-symbols", "no-library"]
)
def test_serial_where_torch_offers_no_threads(replacement: str, bits: str) -> None:
    """With a torch that does not export its thread pool the kernels run serially and give the same bits."""
    code = f"""
import ctypes, torch
real, ctypes.CDLL = ctypes.CDLL, {replacement}
import ranvier.backend
ctypes.CDLL = real
{LAYER}
torch.set_num_threads(2)
print(ranvier.backend.connect_threads(), _C.num_threads(), bits())
"""
    assert python(code).split() == ["False", "1", bits]


def test_forked_child_computes(bits: str) -> None:
    """A child of a process that used the pool has none of its threads: it runs serially instead of waiting for them."""
    code = f"""
import os, sys
{LAYER}
torch.set_num_threads(2)
bits()
child = os.fork()
if child == 0:
    print(_C.num_threads(), bits(), flush=True)
    os._exit(0)
{PARENT}
print(_C.num_threads(), bits())
"""
    assert python(code).split() == ["1", bits, "2", bits]


PARENT = """
import signal, time
end = time.monotonic() + 30
while os.waitpid(child, os.WNOHANG) == (0, 0):
    if time.monotonic() > end:
        os.kill(child, signal.SIGKILL)
        sys.exit("the child hangs")
    time.sleep(0.01)
"""


def test_data_loader_worker_computes(bits: str) -> None:
    """A forked DataLoader worker gives the parent's bits, before and after the parent computed."""
    code = f"""{LAYER}
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return bits()
torch.set_num_threads(2)
loader = torch.utils.data.DataLoader(Data(), num_workers=2, batch_size=None, timeout=60, multiprocessing_context="fork")
found = {{*loader, bits(), *loader}}
print(*found)
"""
    assert python(code).split() == [bits]


def test_python_threads_share_a_layer() -> None:
    """Several threads that call one layer at once get the bits of a lone call, whatever their batch."""
    layer, wrong = spiking(CONFIGS[1]), []
    with torch.no_grad():
        expected = {count: layer(tokens(count, seed=count)) for count in (1, 3, 17, 64)}
    start = threading.Barrier(len(expected))

    def work(count: int) -> None:
        x = tokens(count, seed=count)
        start.wait()
        with torch.no_grad():
            wrong.extend(count for _ in range(200) if not torch.equal(layer(x), expected[count]))

    workers = [threading.Thread(target=work, args=(count,)) for count in expected]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not wrong and not any(worker.is_alive() for worker in workers)


# Entries that only answer a question.
ASKING = {"set_parallel", "num_threads", "isa", "detected_isa", "set_isa", "isa_levels", "cpu_features", "spike_encoding_bytes"}
COMPUTING = {name for name in dir(_C) if not name.startswith("_")} - ASKING


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[int]]]:
    """How far another Python thread counted inside each call of a compiled entry: 0 where the lock was held.

    No thread is interrupted: the counter gives the lock away itself, so only the entry can let it count.
    """
    count, stop, found = [0], threading.Event(), defaultdict(list)

    def counter() -> None:
        while not stop.is_set():
            count[0] += 1
            time.sleep(0)

    def watched(name: str, entry: Callable) -> Callable:
        def call(*args: object) -> object:
            before = count[0]
            result = entry(*args)
            found[name].append(count[0] - before)
            return result

        return call

    for name in COMPUTING:
        monkeypatch.setattr(_C, name, watched(name, getattr(_C, name)))
    interval, level = sys.getswitchinterval(), _C.isa()
    sys.setswitchinterval(1000)
    _C.set_isa("scalar")  # the slowest: every call is long enough to be seen
    thread = threading.Thread(target=counter)
    thread.start()
    yield found
    stop.set()
    thread.join(60)
    sys.setswitchinterval(interval)
    _C.set_isa(level)


def test_kernels_release_the_lock(counted: dict[str, list[int]]) -> None:
    """While any compiled entry runs, another Python thread does."""
    layer = SpikingLinear.from_linear(torch.nn.Linear(512, 512), SpikeConfig())
    group = SpikingLinear.from_linear(torch.nn.Linear(512, 512), SpikeConfig())
    x, form, weight = torch.randn(256, 512), layer.format, layer.packed_weight
    layer.group = SpikeGroup()
    group.group = layer.group
    layer.salient_mask = group.salient_mask = layer.group.share(layer.salient_mask)
    large = torch.zeros(64 << 20, dtype=torch.uint8)
    tokens, norm = torch.randn(4096, 512), SpikingRMSNorm(torch.nn.Parameter(torch.ones(512)), 1e-5)
    keys, mask = torch.randn(1, 4, 512, 128), torch.zeros(4, 128, dtype=torch.bool)
    form_of_cache = KVFormat(128, 0, 0)
    cache = form_of_cache.empty(1, 4, 8)
    with torch.no_grad():
        encoded = spike_encode(tokens, **form.rule)
        spike_linear(type(encoded)(*(t[:256] for t in encoded)), weight, form, 512)
        spike_linear_dynamic(x, weight, form, 512)
        layer(x), group(x), group(torch.randn(4096, 512))
        for _ in range(2):  # the second time the norm knows who reads it
            layer(norm(tokens.clone()))
        spike_rms_norm(tokens, torch.ones(512))
        spike_silu_mul(tokens, tokens)
        SpikingGatedMLP(layer, group, SpikingLinear.from_linear(torch.nn.Linear(512, 512), SpikeConfig()))(x.clone())
        hadamard(tokens)
        two_bit = TernaryLinear.from_linear(torch.nn.Linear(512, 512))
        ternary_linear(encoded.codes[:256], encoded.scale[:256], two_bit.packed_weight, 512)
        SpikingLinear.from_linear(torch.nn.Linear(512, 512), SpikeConfig(act_bits=None))(x)
        flash_attention(torch.randn(1, 8, 512, 128), keys, keys)
        kv_encode(keys, keys, cache, mask, mask, 0, form=form_of_cache)
        kv_attention(torch.randn(1, 32, 8, 128), cache, mask, mask, torch.tensor([512]), form=form_of_cache)
        _C.machine_dot(20_000_000)
        _C.machine_read(large.data_ptr(), large.numel())
    assert counted.keys() == COMPUTING
    assert all(max(counts) > 0 for counts in counted.values()), dict(counted)
