"""What a user would pick instead: one file per peer, each with its ``PEERS``.

A peer that is not installed stays in the list and says how to install it.
"""

from peers import llama_cpp, torch_float, torch_int4, torch_int8, torchao_int8
from peers.base import Peer

PEERS: list[Peer] = [
    *torch_float.PEERS,
    *torch_int8.PEERS,
    *torch_int4.PEERS,
    *torchao_int8.PEERS,
    *llama_cpp.PEERS,
]
