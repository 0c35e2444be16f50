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
"""What `--streaming` holds in memory, by how many rows it has read; the rows are made on the fly.

python benchmarks/stream_memory.py [--rows 1000000] [--row_bytes 20000] [--shuffle_buffer_size 1000]
"""

import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import psutil


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from streaming_utils import Stream  # noqa: E402


def make_rows(shards, num_rows, row_bytes):
    for _ in shards:
        for n in range(num_rows):
            image = n.to_bytes(8, "big") * (row_bytes // 8)
            yield {"image": {"bytes": image, "path": None}, "text": f"row {n}"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--row_bytes", type=int, default=20_000)
    parser.add_argument("--shuffle_buffer_size", type=int, default=1000)
    args = parser.parse_args()
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    sizes = {"shards": list(range(10)), "num_rows": args.rows // 10, "row_bytes": args.row_bytes}
    rows = datasets.IterableDataset.from_generator(make_rows, features=features, gen_kwargs=sizes)
    options = SimpleNamespace(seed=0, dataloader_num_workers=0, shuffle_buffer_size=args.shuffle_buffer_size)
    process, started = psutil.Process(), time.perf_counter()
    print(f"| rows read of {args.row_bytes} bytes | resident memory, MB | seconds |\n|---:|---:|---:|")
    milestones = {10**power for power in range(3, 10)} | {args.rows}
    for count, (_row, _) in enumerate(Stream(rows, options).read(0), start=1):
        if count in milestones:
            print(
                f"| {count:,} | {process.memory_info().rss / 1e6:.0f} | {time.perf_counter() - started:.0f} |",
                flush=True,
            )
        if count == args.rows:
            break
