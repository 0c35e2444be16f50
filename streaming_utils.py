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
"""Rows of a data set that is read as it is needed, by `datasets`' streaming, shuffled and resumable.

- `Stream`: one process's share of them, for a data loader's workers;
- `StreamPosition`: where a reader of it is.

A process has its own shards, or each of its rows where there are fewer shards than processes, and its workers, the
readers, share them out. A reader shuffles the order of its shards and reads them in blocks: while it gives out one
block in a random order, it reads the next, a row for a row. So it holds `--shuffle_buffer_size` rows, and where it is
needs no rows to be written down: it is the library's position at the block's beginning, and how many of the block's
rows have been given out.
"""

import copy
import json
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node
from packaging.version import Version

from training_utils import ADTError


NEEDED_VERSION = "4.8"  # of `datasets`: earlier ones do not shuffle shards by the epoch


@dataclass(frozen=True)
class StreamPosition:
    """Where a reader is: at row `used` of the shuffled block `block` of an epoch, which begins at `start`."""

    epoch: int = 0
    block: int = 0
    start: Any = None  # the library's `state_dict`; None at an epoch's beginning
    used: int = 0


class Stream:
    """One process's endless rows, in an order that follows from the seed and the numbers of processes and readers.

    Args:
        rows: a `datasets.IterableDataset` that knows its columns.

    Attributes:
        num_readers: how many share the rows of this process: its data loader's workers, at most one for each shard, or
            itself.
        positions: {reader: `StreamPosition`}, up to which the rows have been trained on.
    """

    def __init__(self, rows, args, num_processes=1, process_index=0):
        if Version(datasets.__version__) < Version(NEEDED_VERSION):
            raise ADTError(f"--streaming needs datasets {NEEDED_VERSION}; this is {datasets.__version__}.")
        self.num_shards = rows.num_shards
        if num_processes <= self.num_shards:
            rows = rows.shard(num_processes, process_index, contiguous=False)
        else:
            rows = split_dataset_by_node(rows, process_index, num_processes)  # which reads all, and takes some
        self.rows, self.seed = rows, args.seed
        self.num_processes, self.process_index = num_processes, process_index
        self.num_workers = min(args.dataloader_num_workers, rows.num_shards)
        self.num_readers = max(1, self.num_workers)
        self.block_size = -(-args.shuffle_buffer_size // self.num_readers)
        self.positions = {}

    def read(self, reader):
        """Yields (row, the `StreamPosition` behind it) from `positions` on, without end where there are rows."""
        at = self.positions.get(reader, StreamPosition())
        rows = copy.deepcopy(self.rows)  # the workers' share their epoch, which each counts for itself
        while True:
            # Shards are shuffled by the epoch's number, alike in all processes, which may have to share one shard.
            rows.set_epoch(1 + self.draw(at.epoch).integers(2**31).item())
            rows.load_state_dict(at.start)
            following = iter(rows)
            block = list(islice(following, self.block_size))
            if not block and at == StreamPosition():
                raise ADTError(
                    "Some shards of the stream are empty, and a worker has no others: take fewer "
                    "--dataloader_num_workers."
                )
            while block:
                start, read = rows.state_dict(), []
                order = self.draw(at.epoch, self.process_index, reader, at.block).permutation(len(block))
                for used, index in enumerate(order, start=1):
                    read += islice(following, 1)
                    if used > at.used:
                        yield block[index], replace(at, used=used)
                    block[index] = None
                block, at = read, StreamPosition(at.epoch, at.block + 1, start)
            at = StreamPosition(at.epoch + 1)

    def draw(self, *key):
        return np.random.default_rng([self.seed % 2**63, *key])

    def head(self, count) -> list[dict]:
        """The first rows of this process, as they lie."""
        return list(islice(self.rows, count))

    def save(self, directory):
        positions = {reader: asdict(position) for reader, position in self.positions.items()}
        self.file(directory).write_text(json.dumps(positions))

    def load(self, directory):
        positions = json.loads(self.file(directory).read_text())
        self.positions = {int(reader): StreamPosition(**position) for reader, position in positions.items()}

    def file(self, directory) -> Path:
        return Path(directory, f"stream_{self.process_index}.json")

    def identify(self) -> dict:
        """What a resumed run's stream must agree with: not the rows, which nobody has read."""
        return {
            "shards": self.num_shards,
            "columns": sorted(self.rows.column_names),
            "processes": self.num_processes,
            "workers": self.num_workers,
        }
