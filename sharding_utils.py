# Copyright 2026 The ADT training example authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A network divided among the processes, `--shard`: torch's `fully_shard` under accelerate's data-parallel launch.

Each process keeps its part of every weight, gradient, optimizer state and average. A pass gathers a block's weights
before it computes and drops them behind it.

- `shard_network`, `is_sharded`, `gathered`;
- what is divided as a whole, in the files that one process writes: `whole_network`, `load_whole`,
  `keep_optimizer_whole`;
- `own_parts`, `exchange_values`: for its average.

What is called collective must be called by every process, as often and in the same order as by the others. This module
knows no family, no command line and no accelerator.
"""

import contextlib

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard_network(network, param_dtype, device_type):
    """Divides a network among all processes, in place: its blocks each for itself, and the rest together. Collective.

    Before its optimizer and its average are made, since these are to hold the parts. Every process has loaded the
    same weights. They stay in float32, in which gradients are reduced, too.

    Args:
        network: of diffusers, whose `_no_split_modules` names the classes of its blocks; on the CPU.
        param_dtype: what a pass gathers the weights in.
        device_type: such as cuda.
    """
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    # Inputs stay as they are: a timestep in bfloat16 is another timestep. Autocast does what a layer needs.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = [module for module in network.modules() if type(module).__name__ in network._no_split_modules]
    for module in (*reversed(blocks), network):  # a block before the one that it is in
        # The outermost one, too: torch would leave it whole behind a pass without gradient.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def is_sharded(network) -> bool:
    return isinstance(network, FSDPModule)


@contextlib.contextmanager
def gathered(network):
    """A context with all weights of a sharded network on every process, for many passes without gradient. Collective.

    Within it a pass communicates nothing, so that processes may make different numbers of them. Of another network it
    does nothing.
    """
    parts = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def whole_network(network, network_class):
    """A network to save: a sharded one's weights put together on the CPU, in its plain class. Collective.

    Returns:
        the network itself where it is not sharded; None on other processes than the first, where it is.
    """
    if not is_sharded(network):
        return network
    state = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() != 0:
        return None
    with init_empty_weights():
        whole = network_class.from_config(network.config)
    whole.load_state_dict(state, assign=True)
    return whole


def load_whole(network, state):
    """Loads a whole network's `state_dict`, which every process has, into a network that may be sharded."""
    if is_sharded(network):
        set_model_state_dict(network, state, options=StateDictOptions(full_state_dict=True))
    else:
        network.load_state_dict(state)


def keep_optimizer_whole(optimizer):
    """Has the optimizer of a sharded network save and load what it would if the network were whole. Collective.

    `state_dict` then has the state on the first process alone, on the CPU.
    """

    def gather(optimizer, state_dict):
        state = {}
        for index, values in state_dict["state"].items():
            whole = {name: full(value) for name, value in values.items()}
            if dist.get_rank() == 0:
                state[index] = {name: value.cpu() for name, value in whole.items()}
        return state_dict | {"state": state}

    def divide(optimizer, state_dict):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = {
            index: {name: part(value, parameters[index]) for name, value in values.items()}
            for index, values in state_dict["state"].items()
        }
        return state_dict | {"state": state}

    def full(value):
        return value.full_tensor() if isinstance(value, DTensor) else value

    def part(value, parameter):
        if value.shape != parameter.shape:  # a count of steps
            return value
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)

    optimizer.register_state_dict_post_hook(gather)
    optimizer.register_load_state_dict_pre_hook(divide)


def own_parts(parameters) -> list[torch.Tensor]:
    """This process's parts of parameters, as plain tensors that share their values; whole ones as they are.

    They require grad as the parameters do, which diffusers' `EMAModel` looks at.
    """
    return [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in parameters]


@torch.no_grad()
def exchange_values(tensors, others):
    """Exchanges two lists' values, not the tensors: a pass gathers a part from where it was at first."""
    for tensor, other in zip(tensors, others, strict=True):
        kept = tensor.clone()
        tensor.copy_(other)
        other.copy_(kept)
