"""SpikeGroup: layers that read one tensor encode it once, and never read codes that are no longer true."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from spiking import CONFIGS, K, generator, linear, mask, same, spiking, tokens
from torch import Tensor, nn

from ranvier import _C, SpikeConfig
from ranvier.nn import SpikeGroup, SpikingLinear

pytestmark = pytest.mark.usefixtures("poisoned")


@contextmanager
def counting() -> Iterator[list[int]]:
    """Counts the encodings of groups: the C++ call runs as ever, and leaves an entry."""
    calls, real = [], _C.spike_encode_panels

    def counted(*arguments: object) -> None:
        calls.append(1)
        real(*arguments)

    _C.spike_encode_panels = counted
    try:
        yield calls
    finally:
        _C.spike_encode_panels = real


def test_a_group_is_the_same_as_its_members_alone(isa: str) -> None:
    """Layers that share a mask and a group give the bits they give alone, from one encoding.  # spec spikellm O22"""
    for config in CONFIGS:
        alone = [spiking(config, seed=seed) for seed in (1, 5, 6)]
        together, group = copy.deepcopy(alone), SpikeGroup()
        for member in together:
            member.group, member.salient_mask = group, group.share(member.salient_mask)
        x = tokens(13)
        with torch.no_grad():
            with counting() as calls:
                results = [member(x) for member in together]
            assert len(calls) == 1
            assert all(same(a, layer(x)) for a, layer in zip(results, alone, strict=True))


def pair(config: SpikeConfig = CONFIGS[0]) -> tuple[SpikingLinear, SpikingLinear, SpikeGroup]:
    first, second, group = spiking(config), spiking(config, seed=5), SpikeGroup()
    for member in (first, second):
        member.group, member.salient_mask = group, group.share(member.salient_mask)
    return first, second, group


def test_group_sees_a_change_of_x() -> None:
    """Written in place, through a view, given other memory, or another tensor: encoded anew. Untouched: found."""
    first, second, _ = pair()
    alone = copy.deepcopy(second)
    alone.group = None

    def new_memory(x: Tensor) -> None:
        x.data = torch.randn(x.shape, generator=generator(12))

    with torch.no_grad():
        for change, expected in [
            (lambda x: None, 0),
            (lambda x: x.mul_(-3), 1),
            (lambda x: x[2:3].zero_(), 1),
            (lambda x: x.view(-1)[5:].copy_(torch.randn(7 * K - 5)), 1),
            (lambda x: x.copy_(x.flip(0)), 1),
            (new_memory, 1),
        ]:
            x = tokens()
            first(x)
            change(x)
            with counting() as calls:
                y = second(x)
            assert len(calls) == expected and same(y, alone(x))
        x, equal = tokens(), tokens()
        first(x)
        with counting() as calls:
            second(equal)
        assert len(calls) == 1


def test_group_sees_another_mask_and_format() -> None:
    """Members that differ in mask or format never read each other's codes."""
    first, second, group = pair()
    x = tokens()
    with torch.no_grad():
        other = SpikingLinear.from_linear(linear(), CONFIGS[0], mask(seed=20))
        finer = SpikingLinear.from_linear(linear(), SpikeConfig(steps=4), mask())
        clipped = SpikingLinear.from_linear(linear(), SpikeConfig(act_clip=0.7), mask())
        expected = [layer(x) for layer in (other, finer, clipped)]
        other.group = finer.group = clipped.group = group
        first(x)
        assert same(other(x), expected[0])
        assert same(finer(x), expected[1])
        first(x)
        assert same(clipped(x), expected[2]) and not same(clipped(x), first(x))
        first(x)
        first.salient_mask.copy_(mask(seed=21))
        changed = copy.deepcopy(second)
        changed.group = None
        assert same(second(x), changed(x))


def test_group_frees_the_codes_with_the_tensor() -> None:
    """When x dies its codes go; a view or a copy of x is another tensor; a group that dies leaves nothing behind."""
    first, second, group = pair()
    x = tokens()
    with torch.no_grad():
        first(x)
        assert group._last is not None
        del x
        gc.collect()
        assert group._last is None
        first(tokens().t().contiguous().t())  # the contiguous copy inside forward is gone with the call
        assert group._last is None
        x = tokens()
        first(x)
        first.group = second.group = None
        del group
        gc.collect()
        del x


def test_group_ignores_inference_tensors() -> None:
    """Inference-mode tensors have no version counter: never kept, always right."""
    first, second, group = pair()
    with torch.inference_mode():
        x = tokens()
        first(x)
        assert group._last is None
        x.mul_(2)
        expected = copy.deepcopy(second)
        expected.group = None
        assert same(second(x).clone(), expected(x).clone())


def test_group_in_two_threads() -> None:
    """Two threads with tensors of their own share a group and get their own results."""
    first, second, _ = pair()
    wrong: list[int] = []
    with torch.no_grad():
        inputs = [tokens(seed=seed) for seed in (30, 31)]
        expected = [(first(x), second(x)) for x in inputs]

    def work(i: int) -> None:
        with torch.no_grad():
            for step in range(300):
                x = inputs[i].clone() if step % 3 == 0 else inputs[i]
                if not (same(first(x), expected[i][0]) and same(second(x), expected[i][1])):
                    wrong.append(step)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_group_copies_stay_apart() -> None:
    """A deepcopy of grouped layers has one group of its own, which carries no codes over; pickle too."""
    model = nn.ModuleList(pair()[:2])
    x = tokens()
    with torch.no_grad():
        expected = [layer(x) for layer in model]
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin[0].group is twin[1].group and twin[0].group is not model[0].group
            assert twin[0].group._last is None
            with counting() as calls:
                results = [layer(x) for layer in twin]
            assert len(calls) == 1
            assert all(same(a, b) for a, b in zip(results, expected, strict=True))
