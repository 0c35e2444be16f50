"""Two micro-batches of the plugin in each process, under torchrun; the gradient, and how often it synchronised.

torchrun --nproc_per_node 2 tests/plugin_processes.py FILE
"""

import sys
from pathlib import Path

import torch


def micro_batch(tunable, inputs, seed):
    """The loss of one call, whose noise is drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return tunable(**inputs, generator=generator, output_type="latent", train_steps=[1, 3]).square().mean()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from accelerate import Accelerator
    from tiny_pipelines import make_pipeline

    from adt_pipeline import ConstrainedPipeline

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    pipeline, inputs = make_pipeline("sd3")
    network = accelerator.prepare(pipeline.transformer)
    tunable, synchronised = ConstrainedPipeline(pipeline, network=network), []
    # A hook of DDP's runs where gradients are averaged, and there alone.
    network.register_comm_hook(None, lambda _, bucket: synchronised.append(bucket.index()) or average(bucket.buffer()))

    def average(buffer):
        work = torch.distributed.all_reduce(buffer, async_op=True).get_future()
        return work.then(lambda done: done.value()[0] / accelerator.num_processes)

    for n in range(2):
        with accelerator.accumulate(network):
            loss = micro_batch(tunable, inputs, seed=2 * n + accelerator.process_index)
            tunable.backward(loss, accelerator)
    gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    if accelerator.is_main_process:
        torch.save({"gradient": gradient, "synchronised": synchronised}, sys.argv[1])
